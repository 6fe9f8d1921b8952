"""The adapter beside diffusers' own functions, and its loss beside weights by hand."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

import diffmtl_fast as dm
from diffmtl_fast.adapters.diffusers import (
    SCHEMES,
    SchedulerLoss,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from diffmtl_fast.diffusion import log_snr, loss_weight, min_snr_weight

training_utils = pytest.importorskip("diffusers.training_utils")
diffusers = pytest.importorskip("diffusers")

SIGMAS = torch.linspace(0.01, 1.0, 50)


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("logit_normal", {"logit_mean": 0.3, "logit_std": 0.7}),
        ("mode", {"mode_scale": 0.81}),
        ("mode", {"mode_scale": 1.29}),
        ("none", {}),
        ("cosmap", {}),
    ],
)
def test_times_are_drawn_as_in_diffusers(scheme, settings):
    def draw(function, seed):
        return function(scheme, 20_000, **settings, generator=torch.Generator().manual_seed(seed))

    ours = draw(compute_density_for_timestep_sampling, 0)
    theirs = draw(training_utils.compute_density_for_timestep_sampling, 1)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert scipy.stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 1e-3


def test_more_densities_and_their_defaults():
    def draw(scheme, **settings):
        return compute_density_for_timestep_sampling(scheme, 20_000, **settings)

    for found, law in (
        (draw("logit_normal"), dm.clustering.LogitNormalTime()),
        (draw("mode"), dm.clustering.ModeTime()),
        (draw("beta", a=2.0, b=1.0), dm.clustering.BetaTime(2.0, 1.0)),
        (draw("laplace", scale=2.0), dm.clustering.LaplaceTime(0.0, 2.0)),
    ):
        assert ((found > 0) & (found < 1)).all()
        assert scipy.stats.kstest(law.cdf(found.double()).numpy(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "logit_normal", "mode", "none"])
def test_weights_are_those_of_diffusers(scheme):
    expected = training_utils.compute_loss_weighting_for_sd3(scheme, SIGMAS)
    torch.testing.assert_close(compute_loss_weighting_for_sd3(scheme, SIGMAS), expected)


def test_weights_of_a_prediction_make_one_loss():
    time = SIGMAS[:-1]  # at pure noise ε tells nothing of x_0
    for scheme in ("sigma_sqrt", "cosmap", "min_snr", "debiased"):
        velocity, image = (
            compute_loss_weighting_for_sd3(scheme, time, kind) for kind in ("flow_prediction", "sample")
        )
        torch.testing.assert_close(velocity, image * time**2)
    torch.testing.assert_close(
        compute_loss_weighting_for_sd3("sigma_sqrt", SIGMAS, "flow_prediction"), torch.ones(50)
    )
    found = compute_loss_weighting_for_sd3("min_snr", time, "sample", snr_gamma=3.0)
    torch.testing.assert_close(found, ((1 - time) / time).square().clamp(max=3.0))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_losses_are_weighed_by_their_timesteps(kind, device):
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    t = torch.tensor([0, 10, 500, 999], device=device)
    loss = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device, requires_grad=True)
    snr = torch.from_numpy(log_snr(scheduler)).exp()[t.cpu()]
    weight = snr.clamp(max=5) / (snr + (kind == "v_prediction"))
    found = SchedulerLoss(scheduler, "min_snr", snr_gamma=5.0)(loss, t)
    torch.testing.assert_close(found.cpu(), (weight * loss.cpu()).mean().float())
    torch.testing.assert_close(SchedulerLoss(scheduler)(loss, t), loss.mean())


def test_flow_matching_timesteps_are_found_again():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    index = torch.tensor([1, 10, 500, 999])
    weigh = SchedulerLoss(scheduler, "logit_normal", logit_mean=0.2, logit_std=0.9)
    levels = torch.from_numpy(log_snr(scheduler, clip=(-80, 80)))[index]
    weights = loss_weight("logit_normal", levels, "flow_prediction", logit_mean=0.2, logit_std=0.9)
    for i, weight in zip(index, weights, strict=True):
        t = scheduler.timesteps[i : i + 1]
        torch.testing.assert_close(weigh(torch.ones(1), t), weight.float())
    assert weigh(torch.ones(1), scheduler.timesteps[:1]).isfinite()  # pure noise


def test_uncertainty_is_learned_on_top():
    scheduler = diffusers.DDPMScheduler()
    loss_of = SchedulerLoss(scheduler, "min_snr", uncertainty=True)
    groups = dm.param_groups(torch.nn.Linear(1, 1), loss_of, lr=1e-3)
    assert [len(group["params"]) for group in groups] == [2, 1]
    loss, t = torch.rand(8), torch.randint(1000, (8,), generator=torch.Generator().manual_seed(0))
    levels = torch.from_numpy(log_snr(scheduler)).float()[t]
    torch.testing.assert_close(loss_of(loss, t), (loss * min_snr_weight(levels)).mean())  # u starts at 0
    loss_of(loss, t).backward()
    assert loss_of.uncertainty.weight.grad.abs().sum() > 0


def test_refuses():
    with pytest.raises(ValueError, match=r"weighting_scheme: expected one of none, .*, found 'lognorm'"):
        compute_density_for_timestep_sampling("lognorm", 2)
    assert "min_snr" in SCHEMES
    with pytest.raises(ValueError, match="prediction_type: expected one for min_snr, found None"):
        compute_loss_weighting_for_sd3("min_snr", SIGMAS)
    scheduler = diffusers.DDPMScheduler()
    with pytest.raises(ValueError, match="name: expected one of min_snr"):
        SchedulerLoss(scheduler, "snr")
    with pytest.raises(TypeError, match="expected no arguments without a weight, found gamma"):
        SchedulerLoss(scheduler, gamma=1)
    with pytest.raises(ValueError, match=r"loss and timesteps of one shape \[B\], found \[3\] and \[2\]"):
        SchedulerLoss(scheduler)(torch.ones(3), torch.arange(2))
    with pytest.raises(TypeError, match="loss: expected a floating-point tensor"):
        SchedulerLoss(scheduler)(torch.arange(3), torch.arange(3))
    ends = diffusers.DDPMScheduler(rescale_betas_zero_snr=True)
    ends.alphas_cumprod[-1] = 0.0
    with pytest.raises(ValueError, match="weight: expected one that is bounded for prediction type epsilon"):
        SchedulerLoss(ends, "debiased")
