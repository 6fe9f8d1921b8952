"""From the Jacobian to PCGrad's direction, and from the Gramian to the weights of every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Options
from benchmarks.groups.fused_ops import LIMITS, Memory, moved
from benchmarks.harness import Candidate, relative_error
from benchmarks.names import (
    COMPILED_ONCE,
    GRAMIAN_WEIGHTS,
    LOOP,
    NASH_WEIGHTS,
    OURS,
    PCGRAD_GIVEN_J,
    REBUILT,
    TORCHJD,
    Group,
)
from benchmarks.reference import nash_weights, pcgrad, random_orders
from benchmarks.report.results import Role
from diffmtl_fast import ops
from diffmtl_fast._extras import require
from diffmtl_fast.ops.gramian_weights import DEFINITIONS
from diffmtl_fast.weighting import METHODS, Method

MATMULS, DEFINITION = "J @ J.T and w @ J", "its definition in PyTorch"
SOLVE, PLAIN = "one K x K solve", "the same Newton method in PyTorch"
SEED = 0
# TorchJD's classes by the names of ours, how they are made, and how far their directions may be from the
# definition: some iterate to a tolerance of their own. None where theirs is random.
THEIRS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "MGDA": ("MGDAWeighting", {}, 0.1),
    "UPGrad": ("UPGradWeighting", {}, 1e-2),
    "DualProj": ("DualProjWeighting", {}, 1e-2),
    "CAGrad": ("CAGradWeighting", {"c": 0.5}, 1e-2),
    "AlignedMTL": ("AlignedMTLWeighting", {}, 1e-3),
    "IMTLG": ("IMTLGWeighting", {}, 1e-3),
    "FairGrad": ("FairGradWeighting", {"alpha": 2.0}, 1e-2),
    "GradVac": ("GradVacWeighting", {}, None),
    "PCGrad": ("PCGradWeighting", {}, None),
}


def benchmarks(options: Options) -> Iterator[Benchmark]:
    """Yield the cases of this group."""
    yield _pcgrad(options, k=5, parameters=options.pick(1003, 33_000_000))
    for k in options.pick((5,), (5, 20)):
        yield _nash(options, k)
        for method in METHODS.values():
            if method.forms_gramian and method.name != "nash":
                yield _method(options, method, k)


def jacobian(k: int, parameters: int, device: torch.device) -> Tensor:
    """Draw gradients that conflict, [K, P]: without conflicts PCGrad would have nothing to do."""
    found = torch.randn(k, parameters, device=device)
    found[1:] -= found[:1] / 2
    return found


def _pcgrad(options: Options, k: int, parameters: int) -> Benchmark:
    published = options.published()
    name = LOOP if published is None else published.label
    megabytes = _megabytes(options)
    ways: dict[str, Role] = {
        LIMITS["copy"]: "limit",
        OURS: "ours",
        name: "reference",
        MATMULS: "baseline",
        TORCHJD: "peer",
    }

    row = 4 * parameters
    settings = {
        "k": k,
        "P": parameters,
        "bytes": (2 * k + 1) * row,  # J twice, the direction once
        "limit_bytes": moved(megabytes, "copy"),
        "bound": "copy",
        "kind": "memory",
        "op": PCGRAD_GIVEN_J,
        "dtype": "float32",
    }
    return Benchmark(
        Group.WEIGHTS,
        f"{PCGRAD_GIVEN_J}, K = {k}, P = {parameters:,}",
        ways,
        partial(_pcgrad_candidates, options, k, parameters, name),
        options.pick(2, 9),
        settings,
        {"LibMTL": "its loop over vectors is the published one"},
        memory=True,
        grace=15.0,
    )


def _megabytes(options: Options) -> int:
    megabytes: int = options.pick(1, 1024 if options.gpu else 256)
    return megabytes


def _pcgrad_candidates(options: Options, k: int, parameters: int, name: str) -> list[Candidate]:
    published = options.published()
    device = torch.device(options.device)
    given = jacobian(k, parameters, device)
    orders = random_orders(k, torch.Generator().manual_seed(SEED))
    on_device = orders.to(device)
    weights = torch.rand(k, device=device)
    # Inner products of millions of float32 numbers are known to their rounding only; those of PyTorch lose two
    # digits more, in the loop as published and in what is written by hand.
    tolerance, published_tolerance = 1e-4, 2e-2

    @cache
    def expected() -> Tensor:
        return pcgrad(given.double(), orders)

    def ours() -> Tensor:
        return ops.combine(given, ops.pcgrad_weights(ops.gram(given), on_device))

    def loop() -> Tensor:
        return pcgrad(given, orders)

    def matmuls() -> tuple[Tensor, Tensor]:
        return given @ given.T, weights @ given

    def torchjd() -> Tensor:
        torch.manual_seed(SEED)  # of the orders, which are then the same
        return require("torchjd.aggregation", "bench").PCGrad()(given)

    def gated(way: str, run: Callable[[], Tensor], most: float, peer: bool = False) -> Candidate:
        return Candidate(way, run, lambda: relative_error(run(), expected()), most, peer)

    def products_error() -> float:
        gramian, combined = matmuls()
        wide = given.double()
        return max(relative_error(gramian, wide @ wide.T), relative_error(combined, weights.double() @ wide))

    return [
        Memory(_megabytes(options), device).candidate("copy"),
        gated(OURS, ours, tolerance),
        gated(name, loop, published_tolerance)
        if published is None
        else published.projection(name, given, published_tolerance),
        Candidate(MATMULS, matmuls, products_error, published_tolerance),
        gated(TORCHJD, torchjd, published_tolerance, peer=True),
    ]


def _nash(options: Options, k: int) -> Benchmark:
    published = options.published()
    name = REBUILT if published is None else published.label
    ways: dict[str, Role] = {
        SOLVE: "limit",
        OURS: "ours",
        name: "reference",
        COMPILED_ONCE: "reference",
        PLAIN: "baseline",
    }

    def build() -> list[Candidate]:
        device = torch.device(options.device)
        given = jacobian(k, 4096, device)
        gramian = given @ given.T
        present, ones = torch.ones(k, dtype=torch.bool, device=device), torch.ones(k, device=device)

        def residual(run: Callable[[], Tensor]) -> Callable[[], float]:
            """max |α (Ĝα) − 1|, zero at the solution alone; weights of 1, an old failure's, are far from it."""

            def error() -> float:
                alpha, exact = run().double().cpu(), gramian.double().cpu()
                return float((alpha * (exact / exact.norm() @ alpha) - 1).abs().max())

            return error

        def ours() -> Tensor:
            return ops.nash_weights(gramian, present)

        def plain() -> Tensor:
            return ops.PLAIN["nash_weights"](gramian, present)

        def rebuilt() -> Tensor:
            return nash_weights(gramian, recompile=True)

        def once() -> Tensor:
            return nash_weights(gramian)

        reference = (
            Candidate(name, rebuilt, residual(rebuilt), 1e-3, peer=True)
            if published is None
            else published.bargaining(name, gramian)
        )
        return [
            Candidate(SOLVE, lambda: torch.linalg.solve(gramian, ones)),
            Candidate(OURS, ours, residual(ours), 1e-3),
            reference,
            Candidate(COMPILED_ONCE, once, residual(once), 1e-3, peer=True),
            Candidate(PLAIN, plain, residual(plain), 1e-3),
        ]

    return Benchmark(
        Group.WEIGHTS,
        f"{NASH_WEIGHTS}, K = {k}",
        ways,
        build,
        options.pick(2, 9),
        {"op": NASH_WEIGHTS, "k": k},
        {
            "TorchJD": "calls the same solver; its weights are scaled otherwise",
            "LibMTL": "the published solver",
        },
        least=0.0 if options.quick else 2e-3,
        grace=10.0,
    )


def _method(options: Options, method: Method, k: int) -> Benchmark:
    """The weights of a method, as the training step calls it."""
    name = method.cls.__name__
    ways: dict[str, Role] = {SOLVE: "limit", OURS: "ours"}
    if name in DEFINITIONS:
        ways[DEFINITION] = "baseline"
    if name in THEIRS:
        ways[TORCHJD] = "peer"

    def build() -> list[Candidate]:
        device = torch.device(options.device)
        given = jacobian(k, 4096, device)
        gramian, ones = given @ given.T, torch.ones(k, device=device)
        weighting = method.build(k, device, SEED)

        def direction(weights: Tensor) -> Tensor:
            found = weights.double() @ given.double()
            return found / found.norm()

        def definition() -> Tensor:
            settings: tuple[float, ...] = getattr(weighting, "settings", ())
            return ops.PLAIN["gramian_weights"](gramian, None, name, settings)

        def gated(way: str, run: Callable[[], Tensor], most: float | None, peer: bool = False) -> Candidate:
            if most is None or name not in DEFINITIONS:  # random orders: their tests compare them with a loop
                return Candidate(way, run, peer=peer)
            error = lambda: relative_error(direction(run()), direction(definition()))  # noqa: E731
            return Candidate(way, run, error, most, peer)

        candidates = [
            Candidate(SOLVE, lambda: torch.linalg.solve(gramian, ones)),
            gated(OURS, lambda: weighting(gramian), 1e-4),
        ]
        if name in DEFINITIONS:
            candidates.append(Candidate(DEFINITION, definition))
        if name in THEIRS:
            theirs, settings, most = THEIRS[name]

            def torchjd() -> Tensor:
                made: Callable[[Tensor], Tensor] = peer()
                return made(gramian)

            @cache
            def peer() -> Any:
                return getattr(require("torchjd.aggregation", "bench"), theirs)(**settings)

            candidates.append(gated(TORCHJD, torchjd, most, peer=True))
        return candidates

    return Benchmark(
        Group.WEIGHTS,
        f"{name}, K = {k}",
        ways,
        build,
        options.pick(2, 9),
        {"op": GRAMIAN_WEIGHTS if name in THEIRS else name, "method": name, "k": k},
        {} if name in THEIRS else {"TorchJD": "has no such method"},
        least=0.0 if options.quick else 2e-3,
        grace=10.0,
    )
