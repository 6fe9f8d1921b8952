"""Hugging Face Accelerate: prepare a `ClusteredMTL` and call its backward, as `Accelerator` does for models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..gradients import ClusteredMTL

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepare(accelerator: Accelerator, mtl: ClusteredMTL) -> ClusteredMTL:
    """Give a wrapper to an accelerator, in the place of ``accelerator.prepare(model)``.

    It is moved to the accelerator's device and runs in its mixed precision, and ``accelerator.save_state`` and
    ``load_state`` keep the weighting's state beside the model's. It is not put into `DistributedDataParallel`: it
    adds up the gradients of all processes itself. Optimizers, loaders and schedulers are prepared as usual.

    Args:
        accelerator: an `accelerate.Accelerator`.
        mtl: the wrapper.

    Returns:
        The wrapper.
    """
    prepared: ClusteredMTL = accelerator.prepare_model(mtl, evaluation_mode=True)
    accelerator.register_for_checkpointing(mtl.weighting)
    return prepared


def backward(accelerator: Accelerator, mtl: ClusteredMTL, loss: Tensor) -> None:
    """Run ``mtl.backward`` in the place of ``accelerator.backward``.

    The losses are divided by the number of accumulated batches, and float16's scaler is passed on.

    Args:
        accelerator: that has prepared the wrapper.
        mtl: the wrapper.
        loss: losses of the samples, [B].
    """
    mtl.backward(loss / accelerator.gradient_accumulation_steps, scaler=accelerator.scaler)
