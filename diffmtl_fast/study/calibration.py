"""What a step of each method costs, in plain steps: all are timed in turn, as the speed of a machine varies."""

from __future__ import annotations

import os
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._extras import require
from ..train.components import resolve_device
from ..train.history import History
from ..train.loop import Trainer
from .plan import VANILLA, Plan, Variant

#: A second trainer of plain training, whose ratio would be 1 if nothing varied.
CONTROL = f"{VANILLA.kind} again"
WARM_UP = 3


@dataclass(frozen=True)
class Cost:
    """The price of a step.

    Attributes:
        ratio: to the plain step of the same round, median over the rounds.
        low: lower end of the median's 95 % interval.
        high: upper end.
        seconds: of a step, median.
    """

    ratio: float
    low: float
    high: float
    seconds: float


def calibrate(plan: Plan, rounds: int) -> dict[str, Any]:
    """Time a step of every kind of variant, in random order within every round.

    Args:
        plan: the study.
        rounds: how often each is timed.

    Returns:
        ``seconds`` [rounds] by kind, for `costs`, and the ``machine`` that they were measured on; JSON.
    """
    kinds = {variant.kind: variant for variant in plan.variants if variant.cost in (None, "snr")}
    with tempfile.TemporaryDirectory() as folder, _steppers(plan, kinds, Path(folder)) as steppers:
        seconds: dict[str, list[float]] = {name: [] for name in steppers}
        order, shuffle = list(steppers), random.Random(0)
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                seconds[name].append(steppers[name].time())
    machine = {
        "device": str(resolve_device(plan.base.device)),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return {"seconds": seconds, "machine": machine}


def costs(calibration: dict[str, Any]) -> dict[str, Cost]:
    """The cost by kind of variant, from what `calibrate` returned."""
    seconds = {name: np.array(values) for name, values in calibration["seconds"].items()}
    found = {}
    for name, values in seconds.items():
        ratios = values / seconds[VANILLA.kind]
        low, high = _median_interval(ratios)
        found[name] = Cost(float(np.median(ratios)), low, high, float(np.median(values)))
    return found


def _median_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % interval of a median by the sign test, which holds for any distribution; else the whole range."""
    found = require("scipy.stats", "train").quantile_test(values, q=float(np.median(values)), p=0.5)
    low, high = found.confidence_interval(0.95)
    # Fewer than six values allow no such interval.
    return (
        float(values.min() if np.isnan(low) else low),
        float(values.max() if np.isnan(high) else high),
    )


class _Stepper:
    """A trainer that is timed step by step, its log on the side."""

    def __init__(self, trainer: Trainer, log: History) -> None:
        self._trainer, self.log = trainer, log
        for _ in range(WARM_UP):
            self.time()

    def time(self) -> float:
        begun = time.perf_counter()
        self._trainer.step(self.log)
        self.log.check(self._trainer.iteration)  # waits for the device
        seconds = time.perf_counter() - begun
        self.log.flush(self._trainer.iteration)
        return seconds


@contextmanager
def _steppers(plan: Plan, kinds: dict[str, Variant], folder: Path) -> Iterator[dict[str, _Stepper]]:
    variants = {**kinds, CONTROL: kinds[VANILLA.kind]}
    quiet = replace(plan.base.logging, tensorboard=False)
    made: dict[str, _Stepper] = {}
    try:
        for index, (name, variant) in enumerate(variants.items()):
            trainer = Trainer(replace(plan.config(variant, 0), logging=quiet))
            trainer.model.train()
            made[name] = _Stepper(trainer, History(folder / f"{index}.jsonl"))
        yield made
    finally:
        for stepper in made.values():
            stepper.log.close()
