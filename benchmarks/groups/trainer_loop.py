"""What the bundled trainer adds to its steps by reading data and by logging, on the digits.

Both ways train the same model by the same trainer; the one without gets the same batch from memory at every step
and keeps no figures. The gate sees that the other one logs its last step.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.benchmark import Benchmark, Options
from benchmarks.harness import Candidate
from benchmarks.names import OURS, Group

if TYPE_CHECKING:
    from diffmtl_fast.train.history import History
    from diffmtl_fast.train.loop import Trainer

STEPS = 10  # a line of the log is of so many, by default
WITHOUT, WITH = "trainer's steps without data and log", f"{OURS}, trainer"


def loop_benchmark(options: Options) -> Benchmark:
    """Return the case: ten steps and a line of the log, with TensorBoard."""
    return Benchmark(
        Group.TRAINING,
        f"{STEPS} steps of the trainer on the digits, data and log",
        {WITHOUT: "limit", WITH: "ours"},
        partial(_candidates, options.device, options.pick(10, 125)),
        options.pick(1, 10, 20),
    )


def _candidates(device: str, batch_size: int) -> list[Candidate]:
    from diffmtl_fast.train.config import digits, from_dict
    from diffmtl_fast.train.history import History, read
    from diffmtl_fast.train.loop import Trainer
    from diffmtl_fast.train.sinks import TensorBoard

    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    config = from_dict({**digits(), "device": device, "batch_size": batch_size})
    bare, whole = Trainer(config), Trainer(config)
    batch = bare._next_batch()
    bare._next_batch = lambda: batch  # type: ignore[method-assign]
    log = History(place / "log.jsonl", [TensorBoard(place / "board")])
    atexit.register(log.close)

    def logged() -> None:
        _steps(whole, log)
        log.flush(whole.iteration)

    def error() -> float:
        logged()
        return float(read(place / "log.jsonl")[-1]["iteration"] != whole.iteration)

    silent = _silent(place / "none.jsonl")
    return [Candidate(WITHOUT, partial(_steps, bare, silent)), Candidate(WITH, logged, error)]


def _steps(trainer: Trainer, log: History) -> None:
    trainer.model.train()
    for _ in range(STEPS):
        trainer.step(log)


def _silent(path: Path) -> History:
    """Return a history that keeps nothing."""
    from diffmtl_fast.train.history import History

    class Silent(History):
        def add(self, *given: object) -> None:
            pass

        def add_gradient_norm(self, norm: object) -> None:
            pass

    return Silent(path)
