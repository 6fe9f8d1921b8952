"""The registry: what it derives from a class, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from diffmtl_fast.weighting import METHODS, LossWeighting, Option
from diffmtl_fast.weighting._registry import register


def test_options_are_the_parameters_that_a_run_does_not_supply():
    assert METHODS["nash"].options == (
        Option("update_every", int, 1, "steps from one refresh of the weights to the next"),
    )
    assert METHODS["pcgrad"].options == METHODS["uw"].options == METHODS["equal"].options == ()


def test_build_supplies_clusters_and_random_numbers(device):
    assert METHODS["uw"].build(3, device, 0).log_var.shape == (3,)
    one, same, other = (METHODS["pcgrad"].build(3, device, seed).draw_order(5) for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert METHODS["nash"].build(3, device, 0, update_every=4).update_every == 4


def test_refuses():
    with pytest.raises(ValueError, match="expected one that is free, found 'uw' of UncertaintyWeighting"):
        register("uw", title="", update="")(LossWeighting)

    class Needy(LossWeighting):
        def __init__(self, rate: float) -> None:
            super().__init__()

    with pytest.raises(ValueError, match="Needy: expected a default and a docstring of the option rate"):
        register("needy", title="", update="")(Needy)
    assert "needy" not in METHODS
