"""A benchmark: a piece of work and the ways of doing it; and the options that a run of the suite has.

Every way has a role:

- *limit*: the least that the work consists of, done plainly: a plain step, memory read or copied, one small solve.
  It is measured, and no bound: a way whose data stay in the caches, or that has less overhead, can be faster.
- *ours*: this library.
- *reference*: the published procedure.
- *baseline*: what an expert writes by hand or lets a compiler make.
- *peer*: another library.

Names and roles are stated before anything is built, so that a way that fails is known to be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from benchmarks.harness import Candidate, Clock, wall_clock
from benchmarks.names import Group
from benchmarks.published import Checkout, checkout
from benchmarks.report.results import Role

#: sizes that show that everything runs · what takes a quarter of an hour on two cores · every curve
Scale = Literal["quick", "default", "full"]
SCALES: tuple[Scale, ...] = ("quick", "default", "full")
Build: TypeAlias = Callable[[], Sequence[Candidate]]


@dataclass(frozen=True)
class Options:
    """One run of the suite.

    Attributes:
        device: cpu or cuda.
        scale: how much of it.
        groups: keys of the groups to measure; all by default.
        compile: let torch.compile make its baselines.
        memory: measure peak memory, on a CPU in a fresh process for each way.
        rounds: rounds of every comparison; by default each has its own number.
        models: names of models; by default those that suit device and scale.
        batch: batch size of the models; by default what suits the device.
        reference_repo: a checkout of the authors' repository, in place of our reference.
    """

    device: str = "cpu"
    scale: Scale = "default"
    groups: tuple[str, ...] | None = None
    compile: bool = True
    memory: bool = True
    rounds: int | None = None
    models: tuple[str, ...] | None = None
    batch: int | None = None
    reference_repo: str | None = None

    @property
    def quick(self) -> bool:
        """Whether sizes are as small as they can be."""
        return self.scale == "quick"

    @property
    def full(self) -> bool:
        """Whether everything is measured."""
        return self.scale == "full"

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return torch.device(self.device).type == "cuda"

    def pick(self, quick: Any, default: Any, full: Any = None) -> Any:
        """Return what suits the scale; the full one is the default one if not given."""
        return {"quick": quick, "default": default, "full": default if full is None else full}[self.scale]

    def published(self) -> Checkout | None:
        """Return the authors' code, if a checkout is given."""
        return None if self.reference_repo is None else checkout(Path(self.reference_repo))


@dataclass(frozen=True)
class Benchmark:
    """A piece of work and the ways of doing it.

    Attributes:
        group: capability.
        case: title, unique in the group.
        ways: name to role, the yardstick first.
        build: makes the candidates of these names, in any order. It is cheap: what a gate compares with is
            computed when the gate is called.
        rounds: how often every way has its turn.
        parameters: what sets it apart in its group; for curves and tables.
        absent: ways that cannot do this work, and why.
        memory: measure peak memory. On a CPU every way is then built once more in a process of its own, to which
            `build` is sent, so that it has to be picklable: a function of a module, or a partial of one.
        clock, least, allowance, grace, warmup: see `compare`.
    """

    group: Group
    case: str
    ways: Mapping[str, Role]
    build: Build
    rounds: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    memory: bool = False
    clock: Clock = wall_clock
    least: float = 0.0
    allowance: float = 2.0
    grace: float = 1.0
    warmup: int = 1

    def candidates(self) -> list[Candidate]:
        """Build the candidates, in the order of `ways`.

        Raises:
            ValueError: they are not those of `ways`.
        """
        found = {candidate.name: candidate for candidate in self.build()}
        if found.keys() != self.ways.keys():
            raise ValueError(f"{self.group}: {self.case}: expected ways {set(self.ways)}, found {set(found)}")
        return [found[name] for name in self.ways]
