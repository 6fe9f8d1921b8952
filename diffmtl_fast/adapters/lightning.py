"""Lightning: several processes whose gradients a `ClusteredMTL` adds up."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy


class ClusteredStrategy(DDPStrategy):
    """Lightning's processes and samplers without `DistributedDataParallel` around the module.

    A `ClusteredMTL` in the module finds the processes, and adds up the gradients of all of them itself. Other
    modules with trainable parameters are not kept in step.

    Example:
        ``Trainer(accelerator="cpu", devices=2, strategy=ClusteredStrategy())``
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is."""
