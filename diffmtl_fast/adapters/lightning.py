"""Lightning: automatic optimisation with a `ClusteredMTL` in the module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..gradients import ClusteredMTL


class ClusteredBackward:
    """A mixin for a `LightningModule` with a `ClusteredMTL` in it, whose ``training_step`` returns losses [B].

    Lightning then does what it always does: it divides the losses by ``accumulate_grad_batches``, clips, steps
    and schedules. Each accumulated batch is weighed by itself. The mixin comes first among the bases:
    ``class Diffusion(ClusteredBackward, LightningModule)``.
    """

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the wrapper's backward in the place of ``loss.backward()``; Lightning calls it.

        Raises:
            TypeError: there is not one wrapper in the module.
            ValueError: the losses are not as `ClusteredMTL.backward` says, or Lightning has scaled them for
                float16.
        """
        assert isinstance(self, nn.Module)
        wrappers = [module for module in self.modules() if isinstance(module, ClusteredMTL)]
        if len(wrappers) != 1:
            raise TypeError(f"module: expected one ClusteredMTL in it, found {len(wrappers)}")
        trainer: Any = self.trainer
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "precision: expected float32 or bfloat16, found float16, whose scaled losses would be weighed; "
                "use manual optimisation with mtl.backward(loss, scaler=scaler)"
            )
        wrappers[0].backward(loss)
