"""Pictures: written as pictures; the smoothing against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffmtl_fast.clustering import cluster_path, cluster_snr
from diffmtl_fast.clustering.inputs import named_cost
from diffmtl_fast.diffusion.named_schedules import named_log_snr
from diffmtl_fast.run import plots

PNG = b"\x89PNG"


def _line(iteration, **more):
    return {"iteration": iteration, "losses": [1.0, 0.5, None], **more}


@pytest.mark.parametrize(
    "lines",
    [
        [_line(1)],
        [
            _line(1, weights=[1.0, 0.0, -1.0], cosines=[[1.0, None, 0.5]] * 3, conflicts=0.5),
            _line(2),
            _line(3, weights=[1.0, 1.0, 1.0]),
            _line(4, cosines=[[1.0, None, -0.5]] * 3, conflicts=None),
        ],
        [_line(1, phase=1), _line(2, phase=1), _line(3, phase=2), _line(4, phase=4)],
    ],
    ids=["losses", "everything", "phases"],
)
def test_training(tmp_path, lines):
    plots.training(tmp_path / "a.png", lines, "title")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_phases_are_shaded_where_they_were(monkeypatch, tmp_path):
    shaded, written = [], []
    axes = pytest.importorskip("matplotlib.axes").Axes
    monkeypatch.setattr(axes, "axvspan", lambda self, left, right, **how: shaded.append((left, right)))
    monkeypatch.setattr(axes, "text", lambda self, x, y, text, **how: written.append((x, text)))
    phases = [1, 1, 2, 2, 2, 4, 4, 5]
    lines = [_line(10 * i, phase=phase) for i, phase in enumerate(phases, start=1)]
    plots.training(tmp_path / "a.png", lines, "title")
    assert shaded == [(30, 60), (80, 80)]
    assert written == [(15, "1"), (45, "2"), (70, "4")]


@pytest.mark.parametrize("k", [1, 5, 40])
def test_clusters(tmp_path, k):
    levels = named_log_snr("linear", 100)
    plots.clusters(tmp_path / "a.png", cluster_snr(levels, k), levels, "title")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 1, 7, 7])])
def test_samples(tmp_path, channels, labels):
    plots.samples(tmp_path / "a.png", torch.zeros(5, channels, 4, 6), labels, "title")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("reach", [0, 1, 20])
def test_smooth_is_the_mean_of_the_neighbours(reach):
    values = np.random.default_rng(0).standard_normal((9, 2))
    values[2, 0] = values[4:8, 1] = np.nan
    expected = np.full_like(values, np.nan)
    for i, j in np.ndindex(*values.shape):
        window = values[max(0, i - reach) : i + reach + 1, j]
        if not np.isnan(window).all():
            expected[i, j] = np.nanmean(window)
    np.testing.assert_allclose(plots.smooth(values, reach), expected, rtol=1e-9)


def test_the_cost_curve_shows_the_choice():
    path = cluster_path(named_cost("timestep", np.arange(30.0)), 9)
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    plots._plot_costs(path, axes)
    curve, chosen = axes.lines
    np.testing.assert_array_equal(curve.get_ydata(), path.costs)
    assert chosen.get_xdata() == [path.chosen.k]
