"""Lightning's automatic optimisation takes the steps that a loop of one's own would take."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diffmtl_fast as dm
from diffmtl_fast.adapters.lightning import ClusteredBackward

lightning = pytest.importorskip("lightning")
CLUSTER = torch.tensor([0, 0, 1, 1])


class Training(ClusteredBackward, lightning.LightningModule):
    def __init__(self, weighting, reduce=lambda loss: loss):
        super().__init__()
        torch.manual_seed(0)
        self.mtl = dm.ClusteredMTL(nn.Linear(3, 3), 2, weighting)
        self.reduce = reduce

    def training_step(self, batch, _):
        return self.reduce(self.mtl(batch[0], cluster=CLUSTER).square().mean(1))

    def configure_optimizers(self):
        return torch.optim.SGD(dm.param_groups(self.mtl.module, self.mtl.weighting, lr=0.1))


def fit(module, data, **options):
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(data), 4))


@pytest.mark.parametrize("weighting", [dm.PCGrad, lambda: dm.UncertaintyWeighting(2)])
def test_steps_are_those_of_a_loop(weighting):
    """Accumulation of two batches, and clipping."""
    data, module = torch.randn(16, 3), Training(weighting())
    mtl = copy.deepcopy(module.mtl)
    fit(module, data, accumulate_grad_batches=2, gradient_clip_val=0.01)
    optimizer = torch.optim.SGD(dm.param_groups(mtl.module, mtl.weighting, lr=0.1))
    for number, x in enumerate(data.split(4)):
        mtl.backward(mtl(x, cluster=CLUSTER).square().mean(1) / 2)
        if number % 2:
            torch.nn.utils.clip_grad_norm_(mtl.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
    for found, expected in zip(module.mtl.parameters(), mtl.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    assert not torch.equal(module.mtl.module.weight, Training(weighting()).mtl.module.weight)


def test_a_mean_and_another_wrapper_are_refused():
    with pytest.raises(ValueError, match=r"loss: expected per-sample losses of shape \[4\]"):
        fit(Training(dm.PCGrad(), torch.mean), torch.randn(4, 3))
    module = Training(dm.PCGrad())
    module.other = copy.deepcopy(module.mtl)
    with pytest.raises(TypeError, match="expected one ClusteredMTL in it, found 2"):
        fit(module, torch.randn(4, 3))


def test_losses_of_float16_are_refused():
    module = Training(dm.PCGrad())
    module._trainer = types.SimpleNamespace(precision_plugin=types.SimpleNamespace(scaler=object()))
    with pytest.raises(ValueError, match="precision: expected float32 or bfloat16"):
        module.backward(torch.ones(4))
