"""Continuous uncertainty: the published scalar, what u learns, its discrete limit, infinite levels, refusals."""

from __future__ import annotations

import math

import pytest
import torch

import diffmtl_fast as dm


def test_continuous_uncertainty_is_the_published_scalar(device):
    weighting = dm.ContinuousUncertainty(channels=6).to(device).double()
    weighting.weight.data = torch.tensor([0.5, -1.0, 2.0, 0.3, 0.1, -0.7], dtype=torch.float64, device=device)
    loss = torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64, device=device, requires_grad=True)
    sigma = torch.tensor([0.02, 0.5, 30.0], dtype=torch.float64)
    terms = []
    for value, level in zip(loss, sigma.tolist(), strict=True):
        u = 0.0
        for i, quantile in enumerate((1 / 6, 3 / 6, 5 / 6)):  # of |N(0, 1)|
            frequency = 2 * math.pi * float(torch.special.ndtri(torch.tensor(0.5 + quantile / 2).double()))
            angle = frequency * math.log(level) / 4
            u = u + weighting.weight[i] * math.sqrt(2 / 6) * math.cos(angle)
            u = u + weighting.weight[3 + i] * math.sqrt(2 / 6) * math.sin(angle)
        terms.append(torch.exp(-u) * value + u)
    expected = torch.stack(terms).mean()
    found = weighting(loss, (-2 * sigma.log()).to(device))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # frequencies are kept in float32
    slopes = torch.autograd.grad(found, [loss, weighting.weight])
    torch.testing.assert_close(
        slopes, torch.autograd.grad(expected, [loss, weighting.weight]), rtol=1e-5, atol=1e-6
    )


def test_it_starts_as_ordinary_training():
    loss = torch.rand(8)
    weighting = dm.ContinuousUncertainty()
    assert torch.equal(weighting(loss, torch.linspace(-9, 9, 8)), loss.mean())
    assert not weighting.log_var(torch.linspace(-30, 30, 8)).any()


def test_u_learns_the_logarithm_of_the_loss_at_every_level():
    generator = torch.Generator().manual_seed(0)
    weighting, model = dm.ContinuousUncertainty(), torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(dm.param_groups(model, weighting, lr=1e-4))
    assert optimizer.param_groups[1]["lr"] == 0.025

    def log_loss(log_snr):  # of noise prediction: a few thousandths at high noise, about 1 at low noise
        return 0.7 * torch.nn.functional.logsigmoid(log_snr) + 0.3 * torch.sin(log_snr / 3)

    for _ in range(300):
        log_snr = (4 * torch.randn(128, generator=generator)).clamp(-9, 9)
        noisy = log_loss(log_snr) + 0.2 * torch.randn(128, generator=generator)
        optimizer.zero_grad()
        weighting(noisy.exp(), log_snr).backward()
        optimizer.step()
    levels = torch.linspace(-9, 9, 100)
    assert (weighting.log_var(levels) - log_loss(levels)).abs().mean() < 0.1


class OneHot(torch.nn.Module):
    """One feature for each of T noise levels."""

    def __init__(self, levels):
        super().__init__()
        self.levels = levels

    def forward(self, log_snr):
        return (log_snr[..., None] == self.levels).double() * len(self.levels) ** 0.5


def test_with_a_feature_per_timestep_it_is_uncertainty_weighting_of_as_many_clusters():
    """Σ ½ (e^{−v} L / T + v) is T / 2 times mean (e^{−u} L + u) at v = u − log T, but for a constant."""
    number, generator = 10, torch.Generator().manual_seed(0)
    levels = torch.linspace(5, -5, number).double()
    continuous = dm.ContinuousUncertainty(number).double()
    continuous.features = OneHot(levels)
    clustered = dm.UncertaintyWeighting(number).double()
    u = torch.randn(number, generator=generator).double()
    continuous.weight.data, clustered.log_var.data = u.clone(), u - math.log(number)
    loss = torch.rand(number, generator=generator).double().requires_grad_()
    order = torch.randperm(number, generator=generator)
    one, other = continuous(loss[order], levels[order]), clustered(loss)
    torch.testing.assert_close(other, number / 2 * (one - math.log(number)))
    ours = torch.autograd.grad(one, [loss, continuous.weight])
    theirs = torch.autograd.grad(other, [loss, clustered.log_var])
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(its, number / 2 * mine)


def test_pure_signal_and_pure_noise_have_a_weight():
    weighting = dm.ContinuousUncertainty()
    weighting.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    ends = weighting.log_var(torch.tensor([math.inf, 20.0, -20.0, -math.inf]))
    assert ends.isfinite().all()
    assert ends[0] == ends[1] != ends[2] == ends[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_outside(dtype):
    weighting = dm.ContinuousUncertainty()
    weighting.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    levels = torch.linspace(-9, 9, 16)
    expected = weighting.log_var(levels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weighting.log_var(levels), expected)
    assert weighting(torch.ones(16, dtype=dtype), levels.to(dtype)).dtype == torch.float32


def test_nothing_is_read_on_the_host():
    weighting = dm.ContinuousUncertainty().to("meta")
    weighting(torch.ones(8, device="meta"), torch.ones(8, device="meta")).backward()
    assert weighting.weight.grad.shape == (128,)


def test_the_state_resumes(tmp_path):
    weighting = dm.ContinuousUncertainty(16)
    weighting.weight.data.normal_()
    torch.save(weighting.state_dict(), tmp_path / "state.pt")
    resumed = dm.ContinuousUncertainty(16)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    levels = torch.linspace(-9, 9, 16)
    assert torch.equal(resumed.log_var(levels), weighting.log_var(levels))


def test_continuous_uncertainty_refuses():
    for channels in (0, 7):
        with pytest.raises(ValueError, match=f"even number of at least 2, found {channels}"):
            dm.ContinuousUncertainty(channels)
    weighting = dm.ContinuousUncertainty()
    with pytest.raises(
        TypeError, match=r"log_snr: expected a floating-point tensor \[B\], found torch.int64"
    ):
        weighting(torch.ones(3), torch.arange(3))
    for loss, levels in ((torch.ones(3), torch.ones(2)), (torch.ones(()), torch.ones(()))):
        with pytest.raises(ValueError, match=r"expected loss and log_snr of one shape \[B\], found"):
            weighting(loss, levels)
