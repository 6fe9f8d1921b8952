"""One training step in two gloo processes of a thread each, from forward to ``.grad``.

Beside the step of `DistributedDataParallel`: exact PCGrad by one backward per cluster whose gradients are averaged
one after the other, by all-reducing the Jacobian, and by the library, with samples of all clusters in every
process and of one in each. Both processes have half of the batch. The gradient of `DistributedDataParallel` has to
be that of a plain step on the whole batch in one process, the other ways' that of the all-reduced Jacobian.
"""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
import weakref
from collections.abc import Callable, Iterator
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import diffmtl_fast as dm
from benchmarks.benchmark import Benchmark, Options
from benchmarks.harness import Candidate, GateError
from benchmarks.models import MODELS, TITLES, Case
from benchmarks.names import DDP_STEP, PARALLEL_PCGRAD, REPLICATED_PCGRAD, TYPICAL_K, Group
from benchmarks.reference import Batch
from benchmarks.report.results import Role

RANKS = 2
DIRECTIONS = 16  # that gradients are compared along
TOLERANCE = 1e-3  # as for PCGrad in one process
WAYS: dict[str, Role] = {
    DDP_STEP: "limit",
    "K backwards averaged by all-reduce, PCGrad": "reference",
    "all-reduce of J, PCGrad": "baseline",
    REPLICATED_PCGRAD: "ours",
    PARALLEL_PCGRAD: "ours",
}
PLAIN, BACKWARDS, ALL_REDUCED, REPLICATED, PARALLEL = WAYS
WHOLE = "plain step of the whole batch in one process"  # of the gate


def benchmarks(options: Options) -> Iterator[Benchmark]:
    """Yield the cases of this group: as many clusters as processes, of which none has more than one, and five."""
    if options.gpu:  # two processes need two
        return
    model, batch = options.pick("tiny", "dit"), options.batch or options.pick(20, 40)
    for k in (RANKS, TYPICAL_K):
        yield Benchmark(
            Group.DISTRIBUTED,
            f"{TITLES[model]}, K = {k}, batch {batch}, {RANKS} processes",
            WAYS,
            partial(_candidates, model, batch, k),
            options.pick(2, 7),
            {"title": TITLES[model], "k": k, "batch": batch, "model": model},
        )


def _candidates(model: str, batch: int, k: int) -> list[Candidate]:
    processes = cache(lambda: Processes(model, batch, k))

    def error(way: str) -> float:
        expected = WHOLE if way == PLAIN else ALL_REDUCED
        found, wanted = (processes().sketch(each) for each in (way, expected))
        return float((found - wanted).norm() / wanted.norm())

    return [
        Candidate(
            way,
            lambda way=way: processes().call(way),  # type: ignore[misc]
            None if way == ALL_REDUCED else partial(error, way),
            TOLERANCE,
        )
        for way in WAYS
    ]


class Processes:
    """Two processes that take the same step at the same time."""

    def __init__(self, model: str, batch: int, k: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._connections: list[Connection] = []
        started = []
        for rank in range(RANKS):
            here, there = context.Pipe()
            args = (there, rank, str(Path(self._folder.name) / "meeting"), model, batch, k)
            started.append(context.Process(target=_serve, args=args, daemon=True))
            started[-1].start()
            there.close()
            self._connections.append(here)
        for process in started:
            weakref.finalize(self, process.kill)

    def call(self, way: str, sketched: bool = False) -> list[list[float]]:
        """Take a step; return what every process has in ``.grad``, as `_sketch` of it, or nothing."""
        for connection in self._connections:
            connection.send((way, sketched))
        return [connection.recv() for connection in self._connections]

    def sketch(self, way: str) -> torch.Tensor:
        """Take a step; return the sketch of its gradient.

        Raises:
            GateError: the processes have different gradients.
        """
        found = self.call(way, sketched=True)
        if found[0] != found[1]:
            raise GateError(f"{way}: expected the same gradients in both processes, found {found}")
        return torch.tensor(found[0], dtype=torch.float64)


def _serve(connection: Connection, rank: int, meeting: str, model: str, batch: int, k: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    case = MODELS[model](batch, k)
    replicas = nn.parallel.DistributedDataParallel(copy.deepcopy(case.model))
    steps = _steps(case, replicas, rank, k)
    while True:
        way, sketched = connection.recv()
        trained = replicas if way == PLAIN else case.model
        trained.zero_grad(set_to_none=True)
        steps[way]()
        connection.send(_sketch(trained) if sketched else [])


def _sketch(model: nn.Module) -> list[float]:
    """Return inner products of the gradient with random directions: gradients that differ have others."""
    draws = torch.Generator().manual_seed(0)
    total = torch.zeros(DIRECTIONS, dtype=torch.float64)
    for parameter in model.parameters():
        directions = torch.randn(DIRECTIONS, parameter.numel(), generator=draws)
        if parameter.grad is not None:
            total += (directions @ parameter.grad.flatten()).double()
    return [float(each) for each in total]


class FixedOrder(dm.PCGrad):
    """PCGrad whose orders are no matter of chance."""

    def draw_order(self, k: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return every task's others in their own order."""
        return torch.stack([torch.tensor([j for j in range(k) if j != i]) for i in range(k)])


def _steps(case: Case, replicas: nn.Module, rank: int, k: int) -> dict[str, Callable[[], object]]:
    share, size = len(case.batch.target) // RANKS, len(case.batch.target) // k
    parallel = case.batch.narrow(rank * share, share)  # the batch is sorted: of the fewest clusters
    half = size // RANKS
    parts = [case.batch.narrow(i * size + rank * half, half) for i in range(k)]
    mixed = Batch(
        tuple(torch.cat(inputs) for inputs in zip(*(part.inputs for part in parts), strict=True)),
        torch.cat([part.target for part in parts]),
        torch.cat([part.cluster for part in parts]),
    )
    model = case.model
    parameters = list(model.parameters())
    weighting = FixedOrder()
    mtl = dm.ClusteredMTL(model, k, weighting, engine="grouped")

    def plain(model: nn.Module, batch: Batch) -> None:
        case.losses(model, batch).mean().backward()

    def jacobian(each: bool) -> None:
        rows = []
        for part in parts:
            found = torch.autograd.grad(case.losses(model, part).mean() / (k * RANKS), parameters)
            rows.append(torch.cat([g.flatten() for g in found]))
            if each:
                dist.all_reduce(rows[-1])
        both = torch.stack(rows)
        if not each:
            dist.all_reduce(both)
        weights = weighting(both @ both.T, torch.ones(k, dtype=torch.bool))
        direction = weights @ both
        for p, part in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def ours(batch: Batch) -> None:
        mtl.backward(case.losses(partial(mtl, cluster=batch.cluster), batch))

    return {
        PLAIN: partial(plain, replicas, mixed),
        WHOLE: partial(plain, model, case.batch),
        BACKWARDS: partial(jacobian, True),
        ALL_REDUCED: partial(jacobian, False),
        REPLICATED: partial(ours, mixed),
        PARALLEL: partial(ours, parallel),
    }
