"""Named schedules against diffusers, and the costs known from the literature's settings."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest

from diffmtl_fast.clustering import cluster_snr
from diffmtl_fast.diffusion import log_snr
from diffmtl_fast.diffusion.named_schedules import SCHEDULES, named_log_snr, read_log_snr

CONSTANTS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (1e-4, 0.02)}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [10, 1000])
def test_same_as_diffusers(name, num_timesteps):
    start, end = CONSTANTS[name]
    scheduler = diffusers.DDPMScheduler(num_timesteps, beta_start=start, beta_end=end, beta_schedule=name)
    np.testing.assert_allclose(named_log_snr(name, num_timesteps), log_snr(scheduler), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "cost"),
    [("linear", 781.740483), ("squaredcos_cap_v2", 705.505514), ("scaled_linear", 482.773327)],
)
def test_known_costs_of_five_clusters(name, cost):
    assert cluster_snr(named_log_snr(name, 1000), 5).cost == pytest.approx(cost, abs=1e-6)


def test_unknown_name():
    with pytest.raises(ValueError, match="schedule: expected one of"):
        named_log_snr("sigmoid", 10)


def test_read_log_snr(tmp_path):
    np.testing.assert_array_equal(read_log_snr("linear", 30), named_log_snr("linear", 30))
    assert read_log_snr("linear", 1000, [-2, 2]).min() == -2
    np.save(tmp_path / "levels.npy", [3.0, 0.0, -np.inf])
    path = str(tmp_path / "levels.npy")
    assert read_log_snr(path, 30, [-20, 20]).tolist() == [3.0, 0.0, -20.0]
    with pytest.raises(ValueError, match=r"^expected finite numbers in .*, found -inf at index 2"):
        read_log_snr(path, 30)
    with pytest.raises(ValueError, match=r"^expected squaredcos_cap_v2, .* file, found 'sigmoid'"):
        read_log_snr("sigmoid", 30)
