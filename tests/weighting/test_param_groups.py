"""The optimizer's parameter groups."""

from __future__ import annotations

import torch

import diffmtl_fast as dm


def test_param_groups_give_the_log_variances_a_rate_of_their_own():
    model, weighting = torch.nn.Linear(3, 2), dm.UncertaintyWeighting(4)
    model.bias.requires_grad_(False)
    groups = dm.param_groups(model, weighting, lr=1e-4, weight_decay=0.1)
    assert groups[0] == {"params": [model.weight], "lr": 1e-4, "weight_decay": 0.1}
    assert groups[1] == {"params": [weighting.log_var], "lr": 0.025, "weight_decay": 0.0}
    wrapped = dm.ClusteredMTL(model, 4, weighting)
    assert [g["params"] for g in dm.param_groups(wrapped, weighting)] == [[model.weight], [weighting.log_var]]
    assert len(dm.param_groups(model, dm.PCGrad(), lr=1e-4)) == 1
