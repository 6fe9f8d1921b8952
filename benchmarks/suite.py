"""What is measured: for every capability, pieces of work and the ways of doing them.

A way belongs to a role: *limit*, the least that the work consists of, done plainly (a plain step, memory read or
copied, one small solve), measured and no bound: what stays in the caches or has less overhead can be below it;
*ours*; *reference*, the published procedure; *baseline*, what an expert writes by hand or lets a compiler make;
*peer*, other libraries. Names and roles are known before anything is built, so that a way that fails is missed.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from benchmarks.harness import Candidate, Clock, compare, wall_clock
from benchmarks.memory import in_fresh_process, peak
from benchmarks.report.results import Comparison, Role

if TYPE_CHECKING:
    from benchmarks.published import Checkout

#: does it still run · a quarter of an hour on two cores · every curve
Scale = Literal["quick", "default", "full"]
SCALES: tuple[Scale, ...] = ("quick", "default", "full")
Build: TypeAlias = Callable[[], Sequence[Candidate]]


@dataclass(frozen=True)
class Options:
    """One run of the suite.

    Attributes:
        device: cpu or cuda.
        scale: how much of it.
        compile: let torch.compile make its baselines.
        memory: measure peak memory, on a CPU in a fresh process for each way.
        rounds: rounds of every comparison; by default each has its own number.
        models: names of models; by default those that suit device and scale.
        batch: batch size of the models; by default what suits the device.
        reference_repo: a checkout of the authors' repository, in place of our reference.
    """

    device: str = "cpu"
    scale: Scale = "default"
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
        """Whether the device is one."""
        return torch.device(self.device).type == "cuda"

    def pick(self, quick: Any, default: Any, full: Any = None) -> Any:
        """Return what suits the scale; the full one is the default one if not given."""
        return {"quick": quick, "default": default, "full": default if full is None else full}[self.scale]

    def published(self) -> Checkout | None:
        """Return the authors' code, if a checkout is given."""
        if self.reference_repo is None:
            return None
        from benchmarks.published import checkout

        return checkout(Path(self.reference_repo))


@dataclass(frozen=True)
class Benchmark:
    """A piece of work and the ways of doing it.

    Attributes:
        group: capability.
        case: title, unique in the group.
        ways: name to role, the yardstick first.
        build: set up the candidates of these names, in any order; cheap, with gates that form what they expect
            when they are called.
        rounds: how often each has its turn.
        parameters: what sets it apart in its group; for curves and tables.
        absent: ways that cannot be there, and why.
        memory: measure peak memory.
        clock, least, allowance, grace, warmup: see `compare`.
    """

    group: str
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

    @property
    def names(self) -> list[str]:
        """The names of all ways, present or not."""
        return [*self.ways, *self.absent]


def benchmarks(options: Options) -> Iterator[Benchmark]:
    """Yield everything that a run measures, by group."""
    from benchmarks import affinity, clustering, end_to_end, fused_ops, gradients, step, weights

    for module in (clustering, fused_ops, weights, gradients, step, affinity, end_to_end):
        for benchmark in module.benchmarks(options):
            rounds = benchmark.rounds if options.rounds is None else options.rounds
            yield replace(benchmark, rounds=rounds, memory=benchmark.memory and options.memory)


@cache
def find(options: Options, group: str, case: str) -> Benchmark:
    """Return a benchmark of a run."""
    return next(b for b in benchmarks(options) if (b.group, b.case) == (group, case))


def measure(benchmark: Benchmark, options: Options) -> Comparison:
    """Gate and time all ways, and measure their memory."""
    _settle(options)
    memory = _peaks(benchmark, options) if benchmark.memory else {}
    torch.manual_seed(0)
    found = compare(
        benchmark.candidates(),
        benchmark.rounds,
        benchmark.warmup,
        roles=benchmark.ways,
        group=benchmark.group,
        case=benchmark.case,
        clock=benchmark.clock,
        least=benchmark.least,
        allowance=benchmark.allowance,
        grace=benchmark.grace,
        parameters=benchmark.parameters,
    )
    ways = tuple(replace(way, memory=memory.get(way.name)) for way in found.ways)
    return replace(found, ways=ways, left_out={**found.left_out, **benchmark.absent})


def _settle(options: Options) -> None:
    """Give back what an earlier benchmark held: it is the next one's to use."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if options.gpu:
        torch.cuda.empty_cache()


def _peaks(benchmark: Benchmark, options: Options) -> dict[str, int]:
    """Return the peak memory of every way; those that fail have none.

    Each is measured in a process of its own, but on a GPU in this one: what other ways have allocated does not
    count there, and every process would first set up the device.
    """
    found = {}
    for name in benchmark.ways:
        work = options, benchmark.group, benchmark.case, name
        try:
            found[name] = peak_of(*work) if options.gpu else in_fresh_process(peak_of, *work)
        except LeftOut as failure:
            print(f"{name}: no peak memory, {failure}", flush=True)
        _settle(options)
    return found


class LeftOut(RuntimeError):
    """A peer failed where only its memory was looked at; the gate will say why."""


def peak_of(options: Options, group: str, case: str, name: str) -> int:
    """Return the bytes that two runs of a way add to what it works on."""
    torch.manual_seed(0)
    candidate = next(c for c in find(options, group, case).candidates() if c.name == name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # said where times are taken
        try:
            return peak(candidate.run, torch.device(options.device))
        except Exception as failure:
            if candidate.peer:
                raise LeftOut(f"{type(failure).__name__}: {failure}") from failure
            raise
