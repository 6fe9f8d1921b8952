"""Checkpoints: folders of safetensors weights and plain state, written atomically and checked on reading.

A checkpoint holds ``<name>.safetensors`` for every module, ``state.pt`` for everything else (readable with
``torch.load(weights_only=True)``) and ``manifest.json`` with the SHA-256 of each. Of a run that may be sharded,
``shards`` of torch.distributed.checkpoint take the place of the modules: any number of processes reads them. It is
imported where it is used, for it takes longer than all the rest of a start.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._errors import UserError, blame
from .._extras import require
from .._files import remove, replacing
from ..distributed import launched

MANIFEST = "manifest.json"
STATE = "state.pt"
SHARDS = "shards"


def save(
    folder: Path,
    iteration: int,
    modules: Mapping[str, nn.Module],
    state: Mapping[str, Any],
    keep: int,
    shards: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint and delete the oldest ones.

    Args:
        folder: where the run's checkpoints lie.
        iteration: optimizer steps done.
        modules: modules whose weights to save, by name.
        state: tensors, numbers, strings and containers of them.
        keep: how many checkpoints stay.
        shards: state dicts by name, of which every process may have a part; the others call `save_shards`.

    Returns:
        The checkpoint's path.

    Raises:
        UserError: it cannot be written; those before it stay.
    """
    target = folder / f"iter-{iteration:08d}"
    with _writing(target), replacing(target) as aside:
        aside.mkdir()
        for name, module in modules.items():
            save_module(aside / f"{name}.safetensors", module)
        if shards is not None:
            save_shards(aside / SHARDS, shards)
        torch.save(dict(state), aside / STATE)
        manifest = {
            "iteration": iteration,
            "sha256": {name: _sha256(aside / name) for name in sorted(_files(aside))},
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for old in checkpoints(folder)[:-keep]:
        remove(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("iter-" + "[0-9]" * 8))


def iteration(path: Path) -> int:
    """The optimizer steps done at a checkpoint."""
    return int(path.name.removeprefix("iter-"))


def verify(path: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        UserError: a file is missing or altered. The message names it, and the newest intact checkpoint before.
    """
    found = defect(path)
    if found is not None:
        raise UserError(_corrupt(path, found))


def load_state(path: Path) -> dict[str, Any]:
    """The state of a verified checkpoint, its tensors on the CPU.

    Raises:
        UserError: it cannot be read.
    """
    with blame(f"checkpoint {path}: {STATE} cannot be read"):
        return dict(torch.load(path / STATE, map_location="cpu", weights_only=True))


def save_module(path: Path, module: nn.Module) -> None:
    """Write a module's weights as safetensors; tied ones once."""
    require("safetensors.torch", "train").save_model(module, str(path))


def load_module(path: Path, name: str, module: nn.Module) -> None:
    """Copy the weights saved under a name into a module.

    Raises:
        UserError: they cannot be read, or are another module's.
    """
    if (path / SHARDS).exists():
        load_shards(path, {name: module.state_dict()})
        return
    with blame(f"checkpoint {path}: {name}.safetensors does not fit"):
        require("safetensors.torch", "train").load_model(module, str(path / f"{name}.safetensors"))


def save_shards(path: Path | None, shards: Mapping[str, Any]) -> None:
    """Write this process's part of state dicts; all processes call it, and the first one says where."""
    from torch.distributed.checkpoint import save

    with _one_or_many():
        save(dict(shards), checkpoint_id=launched.of_the_first(path), no_dist=launched.world() == 1)


def load_shards(path: Path, shards: dict[str, Any]) -> None:
    """Read state dicts in place; those with sharded tensors are read by all processes together.

    Raises:
        UserError: they cannot be read, or are others'.
    """
    from torch.distributed.checkpoint import load

    together = any(hasattr(each, "to_local") for part in shards.values() for each in part.values())
    with blame(f"checkpoint {path}: {SHARDS} do not fit"), _one_or_many():
        load(shards, checkpoint_id=path / SHARDS, no_dist=not together)


def optimizer_shards(modules: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, by the names of the parameters in the modules that it trains."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return dict(get_optimizer_state_dict(modules, optimizer))


def load_optimizer_shards(modules: nn.Module, optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Give an optimizer the state that `optimizer_shards` named, read in place."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(modules, optimizer, state)


@contextmanager
def _one_or_many() -> Iterator[None]:
    """Without PyTorch's warning that one process reads or writes alone, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    # A full disk: torch and safetensors have errors of their own for it.
    errors = (OSError, RuntimeError, require("safetensors", "train").SafetensorError)
    try:
        yield
    except errors as error:
        free = shutil.disk_usage(target.parent).free / 2**20
        raise UserError(
            f"checkpoint {target}: cannot be written with {free:.0f} MiB free ({error})"
        ) from error


def defect(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is as its manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        digests, done = dict(manifest["sha256"]), manifest["iteration"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    if done != iteration(path):
        return f"{MANIFEST} is of iteration {done}"
    for name in {STATE, *_files(path)} - {MANIFEST}:
        if name not in digests:
            return f"{MANIFEST} does not list {name}"
    for name, digest in digests.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != digest:
            return f"{name} does not have the SHA-256 in {MANIFEST}"
    return None


def intact_before(path: Path) -> Path | None:
    """The newest intact checkpoint before one, if there is any."""
    older = [other for other in reversed(checkpoints(path.parent)) if other.name < path.name]
    return next((other for other in older if defect(other) is None), None)


def _corrupt(path: Path, reason: str) -> str:
    older = [other for other in checkpoints(path.parent) if other.name < path.name]
    intact = intact_before(path)
    if intact is not None:
        way_out = f"--checkpoint {intact} continues from an older one"
    else:
        way_out = "the older ones are corrupt too" if older else "there is no older one"
    return f"checkpoint {path} is corrupt: {reason}; {way_out}"


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
