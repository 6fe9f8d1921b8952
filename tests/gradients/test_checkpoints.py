"""Activation checkpoints, against one torch.autograd.grad per cluster."""

from __future__ import annotations

import copy

import pytest
import torch
from denoiser import SORTED, UNSORTED, B, make
from exactness import WAYS, assert_exact, in_slices
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpointed(model, use_reentrant):
    """Let a denoiser checkpoint its blocks; returns a copy that does not, for the reference."""
    plain = copy.deepcopy(model)
    model.run = lambda block, *args: checkpoint(block, *args, use_reentrant=use_reentrant)
    return plain


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpoints(dropout, options, device):
    model, *inputs = make(device, dropout=dropout)
    if options == WAYS["sliced"] and dropout:
        pytest.skip("slices draw other random numbers than the whole batch")
    plain = checkpointed(model, use_reentrant=False)
    cluster = SORTED if dropout else UNSORTED
    mtl = assert_exact(model, *inputs, cluster=cluster, plain=plain, options=options)
    assert in_slices(mtl) in ([], None)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_reentrant_checkpoints(dropout, device):
    model, *inputs = make(device, dropout=dropout)
    plain = checkpointed(model, use_reentrant=True)
    mtl = assert_exact(
        model, *inputs, cluster=SORTED if dropout else UNSORTED, plain=plain, options=WAYS["grouped"]
    )
    assert in_slices(mtl) == []


@pytest.mark.parametrize("way", ["lean", "sliced"])
def test_reentrant_checkpoints_are_refused_where_they_lose_gradients(way, device):
    model, *inputs = make(device)
    plain = checkpointed(model, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"use_reentrant=False"):
        assert_exact(model, *inputs, plain=plain, options=WAYS[way])


def test_checkpoints_under_autocast(options, device):
    model, *inputs = make(device, torch.float32)
    plain = checkpointed(model, use_reentrant=False)
    context = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731
    assert_exact(model, *inputs, context=context, rtol=0.02, plain=plain, options=options)


class Mixed(nn.Module):
    """A parameter that is computed, and a module that runs in slices, in one checkpoint."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.use_reentrant = None  # no checkpoint

    def forward(self, x):
        x = self.before(x)
        if self.use_reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)

    def inner(self, x):
        return self.attention(*[self.normed(x)] * 3, need_weights=False)[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_of_modules_in_slices_and_computed_parameters(use_reentrant, device):
    torch.manual_seed(0)
    model, x = Mixed().to(device).double(), torch.randn(B, 3, 4, dtype=torch.float64, device=device)
    plain, model.use_reentrant = copy.deepcopy(model), use_reentrant
    mtl = assert_exact(model, x, plain=plain, options=WAYS["grouped"])
    assert in_slices(mtl) == ["attention"]
