"""What training measured: averaged over a few iterations, then one line of log.jsonl each."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._errors import TrainingDiverged, UserError, blame
from ..gradients.diagnostics import conflicts, cosines
from .sinks import Sink

#: What is collected between two lines, by its name in checkpoints.
PARTS = ("losses", "present", "weights", "cosines", "norms", "dropped")


class History:
    """Collects per-cluster figures on the device and writes their means.

    Nothing is copied to the host between two lines, so that logging does not hold up a GPU.

    Args:
        path: the JSONL file; lines are appended.
        sinks: receive the figures of every line too; they are closed with it.
        measure: gives further figures of an iteration's line.
    """

    def __init__(
        self,
        path: Path,
        sinks: Sequence[Sink] = (),
        measure: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        self._file = path.open("ab")
        self._sum = zlib.crc32(path.read_bytes()) if path.is_file() else 0  # of the file's bytes
        self._sinks, self._measure = sinks, measure
        # Since the last line: a tensor of every pass or step that had one.
        self._parts: dict[str, list[Tensor]] = {name: [] for name in PARTS}

    def add(
        self,
        losses: Tensor,
        present: Tensor,
        weights: Tensor | None = None,
        gramian: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> None:
        """Take in one backward pass.

        Args:
            losses: [K] mean loss of every cluster.
            present: bool [K], the clusters that have samples.
            weights: [K] weights of the clusters.
            gramian: [K, K] Gramian of their gradients.
            dropped: bool [K], the clusters that were left out of the step.
        """
        found = {"losses": losses, "present": present, "weights": weights, "dropped": dropped}
        found["cosines"] = None if gramian is None else cosines(gramian.detach()).float()
        for name, value in found.items():
            if value is not None:
                self._parts[name].append(value.detach())

    def add_gradient_norm(self, norm: Tensor) -> None:
        """Take in the gradient norm of an optimizer step, before clipping."""
        self._parts["norms"].append(norm.detach())

    def check(self, iteration: int) -> None:
        """Raise if a loss since the last line is not finite.

        Raises:
            TrainingDiverged: with the first such cluster.
        """
        losses, present = self._parts["losses"], self._parts["present"]
        if not losses:
            return
        bad = torch.stack(present) & ~torch.stack(losses).isfinite()
        if bad.any():
            cluster = int(bad.nonzero()[0, 1])
            raise TrainingDiverged(
                f"the loss of cluster {cluster} is not finite at or before iteration {iteration}"
            )

    def flush(self, iteration: int, **scalars: float) -> dict[str, Any]:
        """Write the means since the last line.

        Args:
            iteration: optimizer steps done.
            **scalars: further numbers of the line.

        Returns:
            The line: ``losses`` [K] with None for a cluster never seen, their mean ``loss``, and what else
            was measured of ``weights`` [K], ``cosines`` [K][K], ``conflicts`` (the share of pairs of clusters with
            a negative cosine), ``gradient_norm``, ``dropped`` [K], the passes that a cluster was left out of.
            What is not finite is None, for JSON has no such numbers.
        """
        self.check(iteration)
        parts = self._parts
        losses = _masked_mean(parts["losses"], parts["present"])
        line: dict[str, Any] = {
            "iteration": iteration,
            "loss": _plain(losses.nanmean()),
            "losses": _plain(losses),
        }
        if parts["weights"]:
            line["weights"] = _plain(_masked_mean(parts["weights"], parts["present"]))
        if parts["cosines"]:
            measured = torch.stack(parts["cosines"])
            line["cosines"] = _plain(measured.nanmean(0))
            line["conflicts"] = _plain(conflicts(measured).nanmean())
        if parts["norms"]:
            line["gradient_norm"] = _plain(torch.stack(parts["norms"]).mean())
        if parts["dropped"]:
            line["dropped"] = torch.stack(parts["dropped"]).sum(0).tolist()
        line |= scalars | ({} if self._measure is None else self._measure(iteration))
        with blame(f"{self._file.name}: cannot be written", (OSError,)):
            written = json.dumps(line, allow_nan=False).encode() + b"\n"
            self._file.write(written)
            self._file.flush()
        self._sum = zlib.crc32(written, self._sum)
        for sink in self._sinks:
            sink.scalars(_scalars(line), iteration)
        for part in parts.values():
            part.clear()
        return line

    def state_dict(self) -> dict[str, Any]:
        """What is collected but not yet written, and the length and the checksum of the file."""
        with blame(f"{self._file.name}: cannot be written", (OSError,)):
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"bytes": self._file.tell(), "crc32": self._sum, **self._parts}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Cut the file back to where :meth:`state_dict` was taken, so that no line appears twice.

        Raises:
            UserError: the file has been shortened or damaged since.
        """
        found = self._file.seek(0, os.SEEK_END)
        if found < state["bytes"]:
            raise UserError(
                f"{self._file.name}: expected the {state['bytes']} bytes of the checkpoint, found {found}"
            )
        self._file.truncate(state["bytes"])
        self._file.seek(0, os.SEEK_END)
        path = Path(self._file.name)
        read(path)
        self._sum = zlib.crc32(path.read_bytes())
        if state.get("crc32", self._sum) != self._sum:
            raise UserError(f"{path}: expected the lines that the checkpoint was saved with, found others")
        for name, part in self._parts.items():
            saved = state.get(name, []) if name == "dropped" else state[name]  # not in the oldest checkpoints
            part[:] = [tensor.to(device) for tensor in saved]

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        for sink in self._sinks:
            sink.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl file.

    Raises:
        UserError: a line is damaged.
    """
    lines = []
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            with blame(f"{path}: expected JSON in line {number}"):
                lines.append(dict(json.loads(text)))
    return lines


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by name."""
    found = {name: line.get(name) for name in ("loss", "gradient_norm", "conflicts", "phase")}
    for name in ("losses", "weights", "validation"):
        found |= {f"{name}/cluster_{cluster}": value for cluster, value in enumerate(line.get(name, ()))}
    for i, row in enumerate(line.get("cosines", ())):
        found |= {f"cosines/{j}_{i}": row[j] for j in range(i)}
    return {name: value for name, value in found.items() if value is not None}


def describe(line: dict[str, Any]) -> str:
    """The losses of a line of the history, and the phase of a curriculum, in words."""
    losses = " ".join("-" if loss is None else f"{loss:.3f}" for loss in line["losses"])
    phase = f"  phase {line['phase']}" if "phase" in line else ""
    loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
    return f"loss {loss}  clusters {losses}{phase}"


def _masked_mean(values: list[Tensor], present: list[Tensor]) -> Tensor:
    mask = torch.stack(present)
    total = torch.where(mask, torch.stack(values).float(), 0.0).sum(0)
    return total / mask.sum(0)


def _plain(values: Tensor) -> Any:
    """Nested lists with None for NaN, which JSON does not have."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        return value if math.isfinite(value) else None

    return convert(values.tolist())
