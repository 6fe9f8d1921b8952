"""The negative transfer gap where it is known, its confidence interval, and the switch between two models."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from diffmtl_fast.analysis import (
    FrechetDistance,
    NegativeTransfer,
    SwitchedModel,
    negative_transfer,
    plot_negative_transfer,
)
from diffmtl_fast.clustering import IntervalClustering, cluster_timesteps

INTERVALS = IntervalClustering(np.array([0, 2, 3, 6]))


class Adds(nn.Module):
    """A denoiser that moves samples by so much per timestep; remembers the timesteps it was called for."""

    def __init__(self, amount):
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(float(amount)))
        self.seen = []

    def forward(self, x, t, scale=1.0):
        self.seen += t.flatten().tolist()
        return SimpleNamespace(sample=x + scale * self.amount)


def sample(model):
    """Six timesteps from the same noise."""
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        for t in reversed(range(6)):
            x = model(x, torch.tensor(t)).sample
    return x


def measure(amounts, **options):
    """The multi-task model adds 1 per timestep; the real data lie where an addition of 0 leads."""
    multitask, experts = Adds(1.0), [Adds(amount) for amount in amounts]
    real = np.random.default_rng(1).standard_normal((5000, 2))
    found = negative_transfer(
        multitask, experts.__getitem__, INTERVALS, sample, lambda x: x.numpy(), real, **options
    )
    return found, experts, real


def test_gaps_are_the_differences_of_the_distances():
    found, experts, real = measure([0.0, 1.0, 3.0], resamples=50)
    assert [sorted(expert.seen) for expert in experts] == [[0, 1], [2], [3, 4, 5]]
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    distance = FrechetDistance(real)
    assert found.multitask == pytest.approx(distance(noise + 6.0))
    expected = [distance(noise + shift) for shift in (4.0, 6.0, 12.0)]
    np.testing.assert_allclose(found.switched, expected)
    np.testing.assert_allclose(found.gaps, np.array(expected) - found.multitask)
    assert found.gaps[0] < 0 < found.gaps[2]
    # Paired: the expert that does what the multi-task model does has no gap in any resample.
    assert (found.gaps[1], found.low[1], found.high[1]) == (0.0, 0.0, 0.0)
    assert (found.low <= found.gaps).all()
    assert (found.gaps <= found.high).all()


def test_intervals_narrow_with_less_confidence_and_repeat_with_the_seed():
    wide, narrow, again = (measure([0.5, 1.0, 1.5], resamples=200, confidence=c)[0] for c in (0.99, 0.5, 0.5))
    assert wide.high[0] - wide.low[0] > narrow.high[0] - narrow.low[0] > 0
    np.testing.assert_array_equal(narrow.low, again.low)
    np.testing.assert_array_equal(narrow.high, again.high)


def test_the_bootstrap_covers_the_gap_of_many_samples():
    """Sixty draws of 200 samples: 90 % intervals hold the gap of the distributions in most of them."""
    rng, covered = np.random.default_rng(0), 0
    real = rng.standard_normal((20_000, 3))
    exact = 3 * (0.5**2 - 0.8**2)  # shifts of 0.5 and 0.8 along three axes, equal covariances
    for draw in range(60):
        noise = rng.standard_normal((200, 3))
        models = {"multitask": noise + 0.8, "expert": noise + 0.5}
        found = negative_transfer(
            nn.Identity(),
            lambda j: nn.Identity(),
            cluster_timesteps(4, 1),
            lambda model: models["expert" if isinstance(model, SwitchedModel) else "multitask"],  # noqa: B023
            lambda x: x,
            real,
            resamples=100,
            confidence=0.9,
            seed=draw,
        )
        covered += bool(found.low[0] <= exact <= found.high[0])
    assert 46 <= covered <= 60


def test_a_batch_with_both_kinds_of_timesteps():
    model = SwitchedModel(Adds(1.0), Adds(10.0), 2, 4)
    x = torch.arange(10.0).view(5, 2)
    found = model(x, torch.tensor([1, 2, 3, 4, 0]), scale=2.0)
    torch.testing.assert_close(found, x + torch.tensor([2.0, 20, 20, 2, 2])[:, None])
    assert model(x, 3).sample.equal(x + 10)
    assert model(x, torch.tensor(1.5)).sample.equal(x + 1)
    assert next(model.parameters()) is model.outside.amount


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resamples": 0}, "resamples: expected at least 1, found 0"),
        ({"confidence": 1.0}, "confidence: expected a number between 0 and 1, found 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        measure([1.0] * 3, **options)


def test_another_number_of_samples_is_refused():
    def uneven(model):
        return torch.zeros(3 if isinstance(model, SwitchedModel) else 4, 2)

    with pytest.raises(ValueError, match="expected the same number of samples from all models"):
        negative_transfer(
            nn.Identity(), lambda j: nn.Identity(), INTERVALS, uneven, lambda x: x.numpy(), np.eye(2)
        )


def test_progress(capsys):
    measure([1.0] * 3, resamples=2, progress=True)
    assert "3/3" in capsys.readouterr().out


def test_the_picture(tmp_path):
    gaps = np.array([1.5, -0.2, -2.0])
    found = NegativeTransfer(INTERVALS, 5.0, 5.0 + gaps, gaps - 0.4, gaps + 0.3, 0.95)
    plot_negative_transfer(tmp_path / "a.png", found, "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
