"""What contains a wrapper loads what it saved, with the weighting's state."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import diffmtl_fast as dm


def wrapper(value):
    mtl = dm.ClusteredMTL(nn.Linear(3, 3), 2, dm.UncertaintyWeighting(2))
    with torch.no_grad():
        for parameter in mtl.parameters():
            parameter.fill_(value)
    return mtl


def holds(mtl, value):
    return all(bool((parameter == value).all()) for parameter in mtl.parameters())


def test_module_dict():
    saved, loaded = nn.ModuleDict({"mtl": wrapper(0.5)}), nn.ModuleDict({"mtl": wrapper(0.0)})
    loaded.load_state_dict(saved.state_dict())
    assert holds(loaded["mtl"], 0.5)


def test_lightning():
    lightning = pytest.importorskip("lightning")

    class Training(lightning.LightningModule):
        def __init__(self, value):
            super().__init__()
            self.mtl = wrapper(value)

    loaded = Training(0.0)
    loaded.load_state_dict(Training(0.5).state_dict())
    assert holds(loaded.mtl, 0.5)


def test_ema_pytorch():
    ema_pytorch = pytest.importorskip("ema_pytorch")
    container = nn.Sequential(wrapper(0.5))
    saved = ema_pytorch.EMA(container, include_online_model=False)
    loaded = ema_pytorch.EMA(nn.Sequential(wrapper(0.0)), include_online_model=False)
    loaded.load_state_dict(saved.state_dict())
    assert holds(loaded.ema_model, 0.5)


def test_distributed_checkpoint(tmp_path):
    saved, loaded = nn.ModuleDict({"mtl": wrapper(0.5)}), nn.ModuleDict({"mtl": wrapper(0.0)})
    dcp.save({"training": saved}, checkpoint_id=tmp_path, no_dist=True)
    dcp.load({"training": loaded}, checkpoint_id=tmp_path, no_dist=True)
    assert holds(loaded["mtl"], 0.5)
