"""What Accelerate saves of a prepared wrapper comes back, and a step is that of the wrapper alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import diffmtl_fast as dm
from diffmtl_fast.adapters import accelerate as adapter

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _no_settings_of_other_tests():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


CLUSTER = torch.tensor([0, 0, 1, 1])


def test_the_state_of_the_weighting_comes_back(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    mtl = adapter.prepare(accelerator, dm.ClusteredMTL(nn.Linear(3, 3), 2, dm.UncertaintyWeighting(2)))
    saved = {name: torch.full_like(value, 0.7) for name, value in mtl.weighting.state_dict().items()}
    mtl.weighting.load_state_dict(saved)
    weight = mtl.module.weight.detach().clone()
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for parameter in mtl.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path))
    assert torch.equal(mtl.module.weight, weight)
    for name, value in mtl.weighting.state_dict().items():
        assert torch.equal(value, saved[name])


def test_a_wrapper_that_is_prepared_by_itself_says_what_is_not_saved(caplog):
    accelerator = accelerate.Accelerator(cpu=True)
    told = []
    for weighting in (dm.UncertaintyWeighting(2), dm.MGDA()):
        mtl = accelerator.prepare(dm.ClusteredMTL(nn.Linear(3, 3), 2, weighting))
        for _ in range(2):
            mtl.backward(mtl(torch.randn(4, 3), cluster=CLUSTER).square().mean(1))
        told.append(sum("register_for_checkpointing" in record.message for record in caplog.records))
    assert told == [1, 1]


def test_batches_of_a_step_are_weighed_as_one():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model, x = nn.Linear(3, 3), torch.randn(8, 3)
    alone = dm.ClusteredMTL(copy.deepcopy(model), 2, dm.PCGrad())
    alone.backward(alone(x, cluster=torch.cat([CLUSTER, CLUSTER])).square().mean(1))
    mtl = adapter.prepare(accelerator, dm.ClusteredMTL(model, 2, dm.PCGrad()))
    for part in x.split(4):
        assert model.weight.grad is None
        with adapter.accumulate(accelerator, mtl):
            adapter.backward(accelerator, mtl, mtl(part, cluster=CLUSTER).square().mean(1))
    torch.testing.assert_close(model.weight.grad, alone.module.weight.grad)


def test_accumulated_steps_are_those_of_the_wrapper():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model, x = nn.Linear(3, 3), torch.randn(4, 3)
    alone = dm.ClusteredMTL(copy.deepcopy(model), 2, dm.PCGrad())
    alone.backward(alone(x, cluster=CLUSTER).square().mean(1) / 2)
    mtl = adapter.prepare(accelerator, dm.ClusteredMTL(model, 2, dm.PCGrad()))
    with accelerator.accumulate(mtl):
        adapter.backward(accelerator, mtl, mtl(x, cluster=CLUSTER).square().mean(1))
    assert torch.equal(model.weight.grad, alone.module.weight.grad)


def test_a_step_of_fewer_batches_at_the_end_of_the_data_is_not_divided():
    """Its only batch is the one that processes exchange gradients in."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model, x = nn.Linear(3, 3), torch.randn(4, 3)
    alone = dm.ClusteredMTL(copy.deepcopy(model), 2, dm.PCGrad())
    alone.backward(alone(x, cluster=CLUSTER).square().mean(1))
    mtl = adapter.prepare(accelerator, dm.ClusteredMTL(model, 2, dm.PCGrad()))
    loader = accelerator.prepare(torch.utils.data.DataLoader(list(x) * 3, batch_size=4))
    for batch in loader:
        model.zero_grad()
        with adapter.accumulate(accelerator, mtl):
            adapter.backward(accelerator, mtl, mtl(batch, cluster=CLUSTER).square().mean(1))
    assert torch.equal(model.weight.grad, alone.module.weight.grad)


def test_batches_that_are_weighed_as_one_are_not_divided():
    """What `accelerator.accumulate(mtl)` does in several processes."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model, x = nn.Linear(3, 3), torch.randn(8, 3)
    alone = dm.ClusteredMTL(copy.deepcopy(model), 2, dm.PCGrad())
    alone.backward(alone(x, cluster=CLUSTER.repeat(2)).square().mean(1))
    mtl = adapter.prepare(accelerator, dm.ClusteredMTL(model, 2, dm.PCGrad()))
    with mtl.no_sync():
        adapter.backward(accelerator, mtl, mtl(x[:4], cluster=CLUSTER).square().mean(1))
    adapter.backward(accelerator, mtl, mtl(x[4:], cluster=CLUSTER).square().mean(1))
    torch.testing.assert_close(model.weight.grad, alone.module.weight.grad)


def test_hooks_of_scripts_see_the_bare_model(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    mtl = adapter.prepare(accelerator, dm.ClusteredMTL(nn.Linear(3, 3), 2, dm.PCGrad()))
    seen = []
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: seen.extend(models))
    accelerator.save_state(str(tmp_path))
    assert seen == [mtl.module]
