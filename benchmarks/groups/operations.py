"""The host's work for an operation with a rule: the same operation many times in a row, on a few elements.

Timed is a long chain of operations less a short one, so that what a step does once is not in it; what it does for
every module and parameter is. An operation costs the difference to plain PyTorch by the number of operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.benchmark import Benchmark, Options
from benchmarks.harness import Candidate, relative_error
from benchmarks.names import OURS, TYPICAL_K, Group
from diffmtl_fast.gradients.cluster_jacobian import ClusterJacobian

PLAIN = "PyTorch"
SHORT, BATCH = 20, 10


class Embedded(nn.Module):
    """x + the embedding of a label."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 4)
        self.register_buffer("labels", torch.arange(BATCH) % 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(self.labels)


class Product(nn.Module):
    """x W."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Shift(nn.Module):
    """x + b, which is broadcast over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


#: by the operation: one of it, and the shape of a sample
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear with bias": (lambda: nn.Linear(4, 4), (4,)),
    "conv2d with bias": (lambda: nn.Conv2d(2, 2, 3, padding=1), (2, 4, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 2, 2)),
    "layer norm": (lambda: nn.LayerNorm(4), (4,)),
    "embedding": (Embedded, (4,)),
    "matmul": (Product, (4,)),
    "broadcast addition": (Shift, (4,)),
}


class Chain:
    """An operation many times in a row, run plainly or with the gradients of all clusters.

    Args:
        operation: its name in `CASES`.
        length: how many times.
        device: where it is run.
        by_cluster: whether the gradients of all clusters are formed.
    """

    def __init__(self, operation: str, length: int, device: torch.device, by_cluster: bool) -> None:
        torch.manual_seed(0)
        make, shape = CASES[operation]
        self.model = nn.Sequential(*[make() for _ in range(length)]).to(device)
        self._x = torch.randn(BATCH, *shape, device=device, requires_grad=True)
        self._cluster = torch.arange(BATCH) * TYPICAL_K // BATCH
        self._jacobian = ClusterJacobian(self.model, TYPICAL_K, engine="grouped") if by_cluster else None

    def run(self) -> tuple[float, float]:
        """Return the seconds of a forward and those of a backward."""
        seconds = 0.0

        def loss(model: Callable[[Tensor], Tensor]) -> Tensor:
            nonlocal seconds
            start = time.perf_counter()
            out = model(self._x)
            seconds = time.perf_counter() - start
            return out.flatten(1).mean(1)

        self.model.zero_grad()
        start = time.perf_counter()
        if self._jacobian is None:
            loss(self.model).mean().backward()
        else:
            self._jacobian(loss, self._cluster)
        return seconds, time.perf_counter() - start - seconds

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss; here all clusters have equally many samples."""
        self.run()
        if self._jacobian is not None:
            return self._jacobian.matrix().mean(0)
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def own_clock(run: Callable[[], object], repeats: int = 1) -> float:
    """Return the mean of the seconds that the runs say they took."""
    taken = [run() for _ in range(repeats)]
    return sum(seconds for seconds in taken if isinstance(seconds, float)) / repeats


def benchmarks(options: Options) -> Iterator[Benchmark]:
    """Yield a case for the forward and one for the backward of every operation."""
    device, operations = torch.device(options.device), options.pick(20, 100)
    for operation in CASES:
        for part, direction in enumerate(("forward", "backward")):
            yield Benchmark(
                Group.GRADIENTS,
                f"host: {direction} of {operations} operations, {operation}",
                {PLAIN: "limit", OURS: "ours"},
                partial(_candidates, operation, operations, part, device),
                options.pick(2, 40, 100),
                {"kind": "host", "op": operation, "direction": direction, "operations": operations},
                clock=own_clock,
                allowance=float("inf"),
                warmup=3,
            )


def _candidates(operation: str, operations: int, part: int, device: torch.device) -> list[Candidate]:
    lengths = SHORT, SHORT + operations
    plain, ours = (
        [Chain(operation, length, device, by_cluster) for length in lengths] for by_cluster in (False, True)
    )

    def error() -> float:
        return relative_error(ours[0].gradient(), plain[0].gradient())

    def seconds(chains: list[Chain]) -> float:
        short, long = (chain.run()[part] for chain in chains)
        return long - short

    return [Candidate(PLAIN, lambda: seconds(plain)), Candidate(OURS, lambda: seconds(ours), error, 1e-4)]
