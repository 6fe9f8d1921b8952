"""Where the figures and pictures of training go beside log.jsonl: TensorBoard, Weights & Biases."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .._errors import blame
from .._extras import require


class Sink(Protocol):
    """Takes what training measured at a step."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Take numbers by name."""
        ...

    def pictures(self, values: Tensor, step: int) -> None:
        """Take pictures, float32 [N, C, H, W] in [0, 1] with C of 1 or 3."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorBoard:
    """Event files of TensorBoard.

    Args:
        folder: of the files.
        start: iterations done before; events of later ones are dropped.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        writer = require("torch.utils.tensorboard", "train").SummaryWriter
        with blame(f"logging.tensorboard: cannot write {folder}"):
            self._writer = writer(str(folder), purge_step=start + 1 if start else None)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write an event for each number."""
        with blame("logging.tensorboard"):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def pictures(self, values: Tensor, step: int) -> None:
        """Write the pictures as a grid."""
        with blame("logging.tensorboard"):
            self._writer.add_images("samples", values, step)

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose own environment variables (WANDB_MODE=offline, …) hold.

    Args:
        project: its name there.
        folder: of the run; its local files go there too.
        config: the options of the run.
        resumed: go on with the run that the folder was before.

    Raises:
        UserError: wandb is not installed or refuses.
    """

    def __init__(self, project: str, folder: Path, config: dict[str, Any], resumed: bool) -> None:
        known = folder / ".wandb-id"
        if not (resumed and known.is_file()):
            known.write_text(uuid.uuid4().hex)
        with blame("logging.wandb"):
            self._wandb: Any = require("wandb", "wandb")
            self._run = self._wandb.init(
                project=project,
                name=folder.name,
                dir=str(folder),
                id=known.read_text(),
                resume="allow",
                config=config,
            )

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log the numbers."""
        with blame("logging.wandb"):
            self._run.log(values, step=step)

    def pictures(self, values: Tensor, step: int) -> None:
        """Log the pictures."""
        with blame("logging.wandb"):
            drawn = [self._wandb.Image(each) for each in values.movedim(1, -1).numpy()]
            self._run.log({"samples": drawn}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
