"""The checks of a model with an adapter in every layer take as many forwards as with one."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_exact
from torch import nn

import diffmtl_fast as dm


class Layer(nn.Module):
    """A low-rank update that is formed by running the adapter on an identity matrix, as DoRA does."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x):
        update = self.up(self.down(torch.eye(4, dtype=x.dtype, device=x.device))).T
        return torch.tanh(nn.functional.linear(x, self.base.weight + update))


def calls(depth, batch):
    torch.manual_seed(0)
    model, count = nn.Sequential(*[Layer() for _ in range(depth)]).double(), []
    model[0].register_forward_pre_hook(lambda *_: count.append(1))
    mtl = dm.ClusteredMTL(model, 3, dm.PCGrad())
    x = torch.randn(batch, 4, dtype=torch.float64)
    mtl.backward(mtl(x, cluster=torch.arange(batch) % 3).square().mean(1))
    return len(count)


@pytest.mark.parametrize("batch", [6, 4])  # 4 divides the rows of the identity
def test_forwards_of_checks_do_not_grow_with_depth(batch):
    assert calls(12, batch) <= calls(2, batch) + 4  # a bisection takes the logarithm of the depth


def test_gradients_are_exact():
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64)
    assert_exact(nn.Sequential(Layer(), Layer()).double(), x, cluster=[2, 0, 2, 1, 0, 2])
