"""What the ranks do in loops of other frameworks."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from programs import K, Outcome, batches, make_model, make_weighting, outcome
from torch import Tensor

import diffmtl_fast as dm

EXAMPLES = Path(__file__).parents[2] / "examples"


def launched() -> Any:
    """Set the variables that torchrun sets."""
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    size = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return mock.patch.dict(os.environ, place | size | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})


def accumulate_with_accelerate(layout: Any, weighting: str) -> tuple[Outcome, str]:
    """Take a step of two batches in Accelerate's loop; return also what a wrapper in its DDP is told."""
    import accelerate

    from diffmtl_fast.adapters import accelerate as adapter

    rank, ranks = dist.get_rank(), dist.get_world_size()
    with launched():
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        assert (accelerator.process_index, accelerator.num_processes) == (rank, ranks)
        mtl = dm.ClusteredMTL(make_model(torch.float64), K, make_weighting(weighting).double())
        mtl = adapter.prepare(accelerator, mtl)
        for number in range(2):
            batch = batches(layout, ranks, torch.float64, seed=number)[rank]
            with adapter.accumulate(accelerator, mtl):
                pred = mtl(batch.x, batch.t, cluster=batch.cluster)
                adapter.backward(accelerator, mtl, dm.ops.sample_mse(pred, batch.target))
        assert accelerator.sync_gradients
        wrapped = accelerator.prepare(dm.ClusteredMTL(make_model(torch.float64), K, dm.PCGrad()))
        with pytest.raises(TypeError) as error:
            wrapped(batch.x, batch.t, cluster=batch.cluster)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return outcome(mtl), str(error.value)


def train_with_lightning(steps: int, batch: int) -> tuple[list[float], Tensor, Tensor]:
    """Train the example's module on two processes; return the losses, the parameters and the last weights."""
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    from diffmtl_fast.adapters.lightning import ClusteredStrategy

    spec = importlib.util.spec_from_file_location("lightning_module", EXAMPLES / "lightning_module.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    args = example.parse(["--steps", str(steps), "--batch", str(batch)])
    torch.manual_seed(0)
    data = torch.randn(steps * batch * dist.get_world_size(), 1).expand(-1, args.width).contiguous()
    torch.manual_seed(dist.get_rank())  # models of their own, too
    module = example.Diffusion(args)
    with launched():
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy=ClusteredStrategy(),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(data), batch))
    flat = torch.nn.utils.parameters_to_vector(module.mtl.parameters()).detach()
    return torch.stack(module.losses).tolist(), flat, module.mtl.last.weights
