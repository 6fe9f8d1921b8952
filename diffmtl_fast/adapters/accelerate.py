"""Hugging Face Accelerate: prepare a `ClusteredMTL` and call its backward, as `Accelerator` does for models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING
from weakref import WeakSet

from torch import Tensor

from ..gradients import ClusteredMTL

if TYPE_CHECKING:
    from accelerate import Accelerator

_accumulating: WeakSet[ClusteredMTL] = WeakSet()


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


@contextmanager
def accumulate(accelerator: Accelerator, mtl: ClusteredMTL) -> Iterator[None]:
    """Take the place of ``accelerator.accumulate(model)``, around forward, backward and the optimizer's step.

    The batches of a step are weighed as one, and processes exchange gradients once; see `ClusteredMTL.no_sync`.

    Args:
        accelerator: that has prepared the wrapper.
        mtl: the wrapper.
    """
    _accumulating.add(mtl)
    try:
        with accelerator.accumulate(mtl), nullcontext() if accelerator.sync_gradients else mtl.no_sync():
            yield
    finally:
        _accumulating.discard(mtl)


def backward(accelerator: Accelerator, mtl: ClusteredMTL, loss: Tensor) -> None:
    """Run ``mtl.backward`` in the place of ``accelerator.backward``, with float16's scaler.

    Within `accumulate` losses are means over the samples of all batches of a step. Where every batch is weighed by
    itself they are divided by the number of batches.

    Args:
        accelerator: that has prepared the wrapper.
        mtl: the wrapper.
        loss: losses of the samples, [B].
    """
    # Under `accelerator.accumulate(mtl)` alone several processes accumulate by `no_sync`, one does not.
    as_one = mtl in _accumulating or mtl.accumulates
    batches = 1 if as_one else accelerator.gradient_accumulation_steps
    mtl.backward(loss / batches, scaler=accelerator.scaler)
