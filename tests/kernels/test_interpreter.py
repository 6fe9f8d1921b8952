"""With DIFFMTL_TEST_DEVICE=interpreter every op of the library reaches its launcher for GPUs, a whole step too."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import diffmtl_fast as dm
from diffmtl_fast import _host
from diffmtl_fast.ops import _library, cuda

pytestmark = pytest.mark.skipif(
    os.environ.get("DIFFMTL_TEST_DEVICE") != "interpreter", reason="of DIFFMTL_TEST_DEVICE=interpreter"
)


class Reached(Exception):
    pass


def test_ops_reach_their_launchers(monkeypatch):
    def refuse(*args):
        raise Reached

    for name in (
        "stream_settings",
        "gram_settings",
        "weight_settings",
        "cluster_sum_settings",
        "wgrad_settings",
    ):
        monkeypatch.setattr(cuda.layers.settings, name, refuse)
    j, g, offsets = torch.randn(2, 5), torch.eye(2), torch.tensor([0, 1, 2])
    present = torch.ones(2, dtype=torch.bool)
    for call in (
        lambda: dm.ops.sample_mse(j, j),
        lambda: dm.ops.gram(j),
        lambda: dm.ops.combine(j, g[0]),
        lambda: dm.ops.nash_weights(g, present),
        lambda: dm.ops.cluster_sum(j, offsets),
        lambda: dm.ops.cluster_wgrad(j, j, offsets),
    ):
        with pytest.raises(Reached):
            call()


@pytest.mark.parametrize("engine", ["grouped", "lean", "sliced"])
@pytest.mark.parametrize("method", ["uw", "pcgrad", "nash", "upgrad"])
def test_a_training_goes_the_way_of_the_cpu(method, engine, monkeypatch):
    """Three steps by the launchers, and by the CPU's kernels, from the same weights on the same data."""
    options = {"lean": {"memory": "lean"}, "sliced": {"engine": "sliced"}}.get(engine, {"engine": "grouped"})

    def train():
        torch.manual_seed(0)
        weighting = dm.weighting.METHODS[method].build(3, torch.device("cpu"), 0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 1, 1)
        )
        mtl = dm.ClusteredMTL(Timed(model), 3, weighting, **options)
        optimizer = torch.optim.SGD(dm.param_groups(model, weighting, lr=0.1))
        clusters = dm.cluster_timesteps(20, 3)
        for _ in range(3):
            t, cluster = clusters.sample(9)
            noise = torch.randn(9, 1, 4, 4)
            optimizer.zero_grad()
            mtl.backward(dm.ops.sample_mse(mtl(noise, t, cluster=cluster), noise))
            optimizer.step()
        return [*model.parameters(), *weighting.parameters(), mtl.last.weights, mtl.last.losses]

    launched = train()
    try:
        _library.register_kernels("CPU", dm.ops.cpu.kernels())
        monkeypatch.setattr(_host, "_READABLE", {"cpu"})
        expected = train()
    finally:
        _library.register_kernels("CPU", cuda.kernels())
        _library._CPU.clear()
    torch.testing.assert_close(launched, expected, rtol=2e-4, atol=1e-6)


class Timed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, t):
        return self.inner(x * (1 + t.view(-1, 1, 1, 1) / 20))
