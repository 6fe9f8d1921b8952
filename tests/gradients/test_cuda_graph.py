"""A CUDA graph of a whole step, and of what follows the gradients alone, does at a replay what the step does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import diffmtl_fast as dm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def capture(function):
    """Warm up on a stream of its own, as PyTorch asks, and capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph, out


@pytest.mark.parametrize("weigh", [dm.ops.nash_weights, dm.ops.pcgrad_weights], ids=["nash", "pcgrad"])
def test_from_gradients_to_the_update(weigh):
    jacobian = [torch.randn(5, 300, device="cuda"), torch.randn(5, 7, 3, device="cuda")]
    order = (torch.arange(5).view(5, 1) + torch.arange(1, 5)) % 5
    options = {"order": order.cuda()} if weigh is dm.ops.pcgrad_weights else {}

    def update():
        return dm.ops.combine(jacobian, weigh(dm.ops.gram(jacobian), **options))

    graph, out = capture(update)
    for part in jacobian:
        part.copy_(torch.randn_like(part))
    graph.replay()
    torch.testing.assert_close(out, update())


@pytest.mark.parametrize(
    "options", [{}, {"memory": "lean"}, {"engine": "sliced"}], ids=["grouped", "lean", "sliced"]
)
def test_a_whole_step(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.LayerNorm(16), nn.Linear(16, 8)).cuda()
    mtl = dm.ClusteredMTL(model, 5, dm.NashMTL().cuda(), **options)
    x, target = torch.randn(2, 20, 8, device="cuda")
    _, cluster = dm.cluster_timesteps(1000, 5).sample(20, device="cuda")

    def step():
        for parameter in model.parameters():
            parameter.grad = None
        mtl.backward(dm.ops.sample_mse(mtl(x, cluster=cluster), target))
        return [parameter.grad for parameter in model.parameters()]

    graph, grads = capture(step)
    x.copy_(torch.randn_like(x))
    graph.replay()
    found = [grad.clone() for grad in grads]
    torch.testing.assert_close(found, [grad.clone() for grad in step()])
