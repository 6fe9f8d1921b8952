"""DB-MTL: what is added has one length."""

from __future__ import annotations

import torch

import diffmtl_fast as dm


def test_all_gradients_are_as_long_as_the_longest(jacobians):
    for rows in jacobians():
        weights = dm.DBMTL()(rows @ rows.T)
        lengths = (weights.unsqueeze(1) * rows).norm(dim=1)
        torch.testing.assert_close(lengths, rows.norm(dim=1).amax().expand(len(rows)))
