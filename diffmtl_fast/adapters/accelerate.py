"""Hugging Face Accelerate: prepare a `ClusteredMTL` and call its backward, as `Accelerator` does for models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..gradients import ClusteredMTL

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepare(accelerator: Accelerator, mtl: ClusteredMTL) -> ClusteredMTL:
    """Give a wrapper to an accelerator, in the place of ``accelerator.prepare(model)``.

    The model is moved to the accelerator's device, runs in its mixed precision, and is the one that
    ``accelerator.save_state``, ``load_state`` and their hooks see, with the weighting's state beside it. It is not
    put into `DistributedDataParallel`: the wrapper adds up the gradients of all processes itself. Optimizers,
    loaders and schedulers are prepared as usual.

    Args:
        accelerator: an `accelerate.Accelerator`.
        mtl: the wrapper.

    Returns:
        The wrapper.

    Raises:
        ValueError: the accelerator would compile the model.
    """
    backend = accelerator.state.dynamo_plugin.backend.value
    if backend != "NO":
        raise ValueError(
            f"dynamo_backend: expected none, found {backend}; compile by ClusteredMTL(..., compile=True)"
        )
    accelerator.prepare_model(mtl.module, evaluation_mode=True)
    accelerator.register_for_checkpointing(mtl.weighting)
    return mtl.to(accelerator.device) if accelerator.device_placement else mtl


def backward(accelerator: Accelerator, mtl: ClusteredMTL, loss: Tensor) -> None:
    """Run ``mtl.backward`` in the place of ``accelerator.backward``.

    float16's scaler is passed on. Where every batch is weighed by itself, losses are divided by the number of
    accumulated batches. In several processes ``accelerator.accumulate(mtl)`` has the batches weighed as one, by
    `ClusteredMTL.no_sync`, whose losses are means over all of them already.

    Args:
        accelerator: that has prepared the wrapper.
        mtl: the wrapper.
        loss: losses of the samples, [B].
    """
    parts = 1 if mtl.accumulates else accelerator.gradient_accumulation_steps
    mtl.backward(loss / parts, scaler=accelerator.scaler)
