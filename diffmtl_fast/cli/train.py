"""``diffmtl-fast train``."""

from __future__ import annotations

from typing import Any

from ..run import training
from ..train.config import Config, digits, from_dict
from ..train.folder import RunFolder


def train(
    run_dir: str = "runs/digits", resume: bool = False, checkpoint: str | None = None, **options: Any
) -> None:
    """Train a model.

    What is not given is as in the run that --resume continues, or else as in the bundled run on digits.

    Args:
        run_dir: folder of the run
        resume: continue the run in the folder; start one if there is none. Without it an existing run is refused
        checkpoint: name of the checkpoint to continue from, not the newest; newer ones are deleted
        **options: see the configuration.
    """
    for name, bundled in digits().items():  # arguments of the bundled run are none of another class's
        given = options[name]
        if isinstance(bundled, dict) and "args" in bundled and given and given["path"] != bundled["path"]:
            given["args"] = {} if given["args"] == bundled["args"] else given["args"]
    config = from_dict({name: options[name] for name in Config.names()})
    training.train(config, RunFolder(run_dir), resume=resume, chosen=checkpoint)
