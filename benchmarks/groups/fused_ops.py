"""Every op against the speed of the memory, the same work in plain PyTorch, and that under torch.compile.

The bytes that the work must move (inputs once for each pass, results once), over the time, are put beside the
bandwidth of copying or reading memory in the same round. A batch that the caches hold, a layer's weight gradient
and the host's own work, on tensors of a few elements, are compared with PyTorch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from benchmarks.benchmark import Benchmark, Options
from benchmarks.groups import op_cases
from benchmarks.groups.op_cases import Bound, Case, Sizes
from benchmarks.harness import Candidate, Clock, device_clock, wall_clock
from benchmarks.names import OURS, Group
from benchmarks.report.results import Role

PLAIN, COMPILED = "PyTorch", "torch.compile"
LIMITS: dict[Bound, str] = {"read": "read memory", "copy": "copy memory"}
PRODUCTS = (op_cases.GRAM, "combine")  # soon compiled
PEERS = {"TorchJD, LibMTL": "have no such ops: their losses are PyTorch's"}
Generate = Callable[[torch.device], Iterator[Case]]


class Memory:
    """What copying and reading memory takes: the yardstick."""

    def __init__(self, megabytes: int, device: torch.device) -> None:
        self._source = torch.ones(megabytes << 18, device=device)
        self._copy = torch.empty_like(self._source)

    def candidate(self, bound: Bound) -> Candidate:
        """Return one pass over the memory."""
        if bound == "read":
            return Candidate(LIMITS[bound], lambda: self._source.sum())
        return Candidate(LIMITS[bound], lambda: self._copy.copy_(self._source))


def moved(megabytes: int, bound: Bound) -> int:
    """Return the bytes of a pass over memory of that size."""
    return (megabytes << 20) * (1 if bound == "read" else 2)


def compiled(case: Case) -> Candidate:
    """Return the plain composition under torch.compile, which may fail."""
    torch._dynamo.reset()
    return case.plain_candidate(COMPILED, torch.compile(case.plain, dynamic=False))


@dataclass(frozen=True)
class Family:
    """Cases that are measured alike.

    Attributes:
        kind: "memory" is compared with the speed of the memory, the others with plain PyTorch.
        generate: makes the cases on a device.
        clock: what takes the time.
    """

    kind: str
    generate: Generate
    clock: Clock


def benchmarks(options: Options) -> Iterator[Benchmark]:
    """Yield the cases of this group."""
    sizes = op_cases.QUICK if options.quick else op_cases.FULL["cuda" if options.gpu else "cpu"]
    for dtype in options.pick((torch.float32,), (torch.float32, torch.bfloat16)):
        for family in families(sizes, dtype, options):
            # Names, shapes and bytes are known without a byte of memory.
            for i, case in enumerate(family.generate(torch.device("meta"))):
                if (case.bound is not None) == (family.kind == "memory"):
                    yield benchmark(family, i, case, options)


def families(sizes: Sizes, dtype: torch.dtype, options: Options) -> Iterator[Family]:
    """Yield what is measured in one dtype."""
    clock = device_clock if options.gpu else wall_clock
    yield Family("memory", partial(op_cases.loss_cases, sizes.large, dtype), clock)
    yield Family("memory", partial(op_cases.jacobian_cases, sizes.parameters, dtype), clock)
    layer = partial(op_cases.layer_cases, sizes.rows, sizes.columns, dtype)
    yield Family("memory", layer, clock)
    yield Family("memory", partial(op_cases.norm_cases, sizes.image, dtype), clock)
    yield Family("arithmetic", layer, clock)
    yield Family("arithmetic", partial(op_cases.conv_cases, op_cases.SMALL_IMAGES, dtype), clock)
    if options.full or options.gpu:
        yield Family("cache", partial(_unbound, partial(op_cases.loss_cases, sizes.small, dtype)), clock)
    if dtype == torch.float32:
        tiny = op_cases.TINY
        for cases in (
            partial(op_cases.loss_cases, tiny.small, dtype),
            partial(op_cases.jacobian_cases, tiny.parameters, dtype),
            partial(op_cases.norm_cases, tiny.image, dtype),
        ):
            yield Family("host", partial(_unbound, cases), wall_clock)


def _unbound(generate: Generate, device: torch.device) -> Iterator[Case]:
    """Yield cases whose tensors are so small that memory is not what limits them."""
    for case in generate(device):
        yield replace(case, bound=None)


@lru_cache(maxsize=1)
def _generated(generate: Generate, device: torch.device) -> list[Case]:
    """Return the cases of one family, whose inputs take longer to draw than the work on them."""
    return list(generate(device))


def benchmark(family: Family, index: int, case: Case, options: Options) -> Benchmark:
    """Return the benchmark of one case, which is given without data, on PyTorch's meta device."""
    bound, megabytes = case.bound, options.pick(1, 1024 if options.gpu else 256)
    # Every op is compiled in float32, and in bfloat16 where that is soon done or in a full run.
    soon = case.dtype == torch.float32 or case.op in PRODUCTS or options.full
    compiles = options.compile and bound is not None and case.compiles and soon and not options.quick
    ways: dict[str, Role] = {}
    if bound is not None:
        ways[LIMITS[bound]] = "limit"
    ways |= {PLAIN: "reference", OURS: "ours"}
    absent = dict(PEERS)
    if compiles:
        ways[COMPILED] = "baseline"
    elif bound is not None and options.compile:
        absent[COMPILED] = (
            "timed in a full run" if case.compiles else "the composition is not one that a compiler fuses"
        )

    def build() -> list[Candidate]:
        device = torch.device(options.device)
        chosen = replace(
            _generated(family.generate, device)[index]
        )  # a copy: what its gate computes is not kept
        found = [chosen.plain_candidate(PLAIN, chosen.plain), chosen.fused_candidate()]
        if bound is not None:
            found.append(Memory(megabytes, device).candidate(bound))
        if compiles:
            found.append(compiled(chosen))
        return found

    kind = str(case.dtype).removeprefix("torch.")
    parameters: dict[str, Any] = {
        "kind": family.kind,
        "op": case.op,
        "shape": case.shape,
        "dtype": kind,
        "bound": bound,
    }
    if bound is not None:
        parameters |= {"bytes": case.moved, "limit_bytes": moved(megabytes, bound)}
    return Benchmark(
        Group.OPS,
        f"{family.kind}: {case.name}",
        ways,
        build,
        options.pick(2, 9, 15),
        parameters,
        absent,
        clock=family.clock,
        least=0.0 if options.quick else 5e-3 if options.gpu else 1e-3,
        allowance=float("inf"),
    )
