"""The folder of a run and what lies in it."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from .._errors import UserError, blame
from .._files import TEMPORARY_PREFIX, remove, remove_leftovers, replacing
from . import checkpoint
from .config import CONTINUOUS, Config, read, to_dict
from .ema import POWER_EMA

# What a file system without locks answers.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class RunFolder:
    """Paths of a run, and checks of its state.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path = Path(path)
        self.config = path / "config.yaml"
        self.log = path / "log.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.power_ema = self.checkpoints / POWER_EMA
        self.model = path / "model"
        self.samples = path / "samples.png"
        self.clusters = path / "clusters.png"
        self.training = path / "training.png"
        self.uncertainty = path / "uncertainty.png"
        self.metrics = path / "metrics.json"
        self.analysis = path / "analysis"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def begun(self) -> bool:
        """Whether there is a run.

        Raises:
            UserError: the path is no folder, or one that holds something else, or is not text.
        """
        try:
            str(self).encode()
        except UnicodeEncodeError as error:  # safetensors would write to it, and then not read it
            raise UserError(f"run folder {self}: expected a path in UTF-8, found other bytes") from error
        try:
            entries = [entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")]
        except FileNotFoundError:
            return False
        except OSError as error:
            raise UserError(f"run folder {self}: cannot be read ({error.strerror})") from error
        if self.config.is_file():
            return True
        # create() makes this one before the configuration is there.
        if set(entries) - {self.checkpoints.name}:
            raise UserError(
                f"run folder {self}: expected a run or nothing, found other files and no config.yaml"
            )
        return False

    @property
    def iteration(self) -> int | None:
        """Of the newest checkpoint, intact or not; None if there is none."""
        found = checkpoint.checkpoints(self.checkpoints)
        return checkpoint.iteration(found[-1]) if found else None

    def create(self) -> None:
        """Make the folder.

        Raises:
            UserError: it cannot be written to.
        """
        nearest = self.path.absolute()
        while not os.path.lexists(nearest):
            nearest = nearest.parent
        # The superuser may write anywhere; a folder that nobody may write to is still meant to stay as it is.
        if nearest.is_dir() and not nearest.stat().st_mode & 0o222:
            raise UserError(f"run folder {self}: cannot be written to ({nearest} is read-only)")
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / f"{TEMPORARY_PREFIX}{os.getpid()}-probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"run folder {self}: cannot be written to ({error.strerror})") from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second training process out; the lock ends with the process, however that ends.

        Raises:
            UserError: another process trains in the folder.
        """
        with (self.path / ".lock").open("w") as file, contextlib.ExitStack() as held:
            if sys.platform != "win32":
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise UserError(f"run folder {self}: another process is training in it") from error
                except OSError as error:
                    if error.errno not in NO_LOCKS:
                        raise
                    held.enter_context(self._lock_file(error))
            for folder in (self.path, self.checkpoints, self.power_ema):
                remove_leftovers(folder)
            yield

    @contextlib.contextmanager
    def _lock_file(self, reason: OSError) -> Iterator[None]:
        """Keep a second process out by a file, where the file system has no locks."""
        path, host = self.path / ".lock-file", platform.node()
        print(
            f"run folder {self}: no locks here ({reason.strerror}); {path} stands in for one", file=sys.stderr
        )
        held = path.read_text().split(" on ") if path.exists() else []
        if held[1:] == [host] and held[0].isdecimal() and not _runs(int(held[0])):
            path.unlink()  # of a process that was killed
        try:
            with path.open("x") as file:
                file.write(f"{os.getpid()} on {host}")
        except FileExistsError as error:
            raise UserError(
                f"run folder {self}: process {path.read_text()} is training in it, or was killed; in that case "
                f"delete {path}"
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def read_config(self) -> Config:
        """The configuration that the run was started with.

        Raises:
            UserError: there is no run.
        """
        if not self.begun:
            raise UserError(f"run folder {self}: expected a run, found none; `diffmtl-fast train` makes one")
        return read(self.config)

    def write_config(self, config: Config) -> None:
        """Save the configuration."""
        import yaml

        with blame(f"{self.config}: cannot be written", (OSError,)), replacing(self.config) as aside:
            aside.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))

    def checkpoint(self, chosen: Path | str | None = None) -> Path | None:
        """The newest intact checkpoint, or the chosen one, verified; None if there is none yet.

        Raises:
            UserError: all are corrupt, or the chosen one is, or is not there.
        """
        found = checkpoint.checkpoints(self.checkpoints)
        if chosen is None:
            path = found[-1] if found else None
        else:
            chosen = Path(chosen)
            path = self.checkpoints / chosen.name
            if path not in found or (chosen.parent != Path() and chosen.resolve() != path.resolve()):
                names = ", ".join(each.name for each in found) or "none"
                raise UserError(f"--checkpoint: expected one of {self.checkpoints} ({names}), found {chosen}")
        if chosen is None and path is not None:
            path = self._newest_intact(path)
        elif path is not None:
            checkpoint.verify(path)
        return path

    def _newest_intact(self, path: Path) -> Path:
        """The newest checkpoint, or where it is corrupt the newest intact one before, which is told."""
        defect = checkpoint.defect(path)
        older = None if defect is None else checkpoint.intact_before(path)
        if older is None:
            checkpoint.verify(path)
            return path
        print(f"checkpoint {path} is corrupt: {defect}; going back to {older.name}", file=sys.stderr)
        return older

    def remove_newer(self, path: Path) -> None:
        """Delete the checkpoints, and the snapshots of power EMAs, after one."""
        for other in (*checkpoint.checkpoints(self.checkpoints), *self.snapshots().values()):
            if other.stem > path.name:
                remove(other)

    def snapshots(self) -> dict[int, Path]:
        """The files of power EMAs, by iteration."""
        return {int(path.stem.removeprefix("iter-")): path for path in sorted(self.power_ema.glob("iter-*"))}

    def remove_outputs(self) -> None:
        """Delete the model, the pictures and the metrics."""
        for path in (self.model, self.samples, self.clusters, self.training, self.uncertainty, self.metrics):
            if path.exists():
                remove(path)

    def outputs(self, config: Config) -> list[Path]:
        """What a finished run leaves beside its logs and checkpoints."""
        outputs = [self.model, self.samples, self.clusters, self.training]
        outputs += [self.uncertainty] if config.method == CONTINUOUS else []
        return [*outputs, self.metrics] if config.evaluation.num_samples else outputs


def _runs(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return True
