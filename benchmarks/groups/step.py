"""One training step, from forward to ``.grad``: plain, as published, by peers, by hand, and with the library.

Time over the plain step in the same round, peak memory in a fresh process, and the error of the gradients against
float64, over models, numbers of clusters and batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from itertools import product

import torch
from torch import Tensor

import diffmtl_fast as dm
from benchmarks.benchmark import Benchmark, Options
from benchmarks.harness import Candidate, GateError, relative_error
from benchmarks.models import MODELS, TITLES, Case
from benchmarks.names import MANY_K, TYPICAL_K, Group
from benchmarks.reference import (
    cluster_gradients,
    nash_residual,
    pcgrad,
    plain_step,
    random_orders,
    update_direction,
)
from benchmarks.step_implementations import (
    SEED,
    Outcome,
    Rows,
    StepWay,
    projecting,
    slice_batches,
    step_ways,
    uncertainty,
)

ALLOWANCE = 2.0  # times the plain step's time of all rounds; see `compare`
CHUNK = 8  # samples of a float64 forward

Expected = dict[Outcome, Tensor]  # rows in float64: [1, P], the Jacobian [K, P]


@dataclass(frozen=True)
class Setting:
    """What a case is about, and what any process can build it from."""

    model: str
    batch: int
    k: int
    device: str
    autocast: bool

    def case(self) -> Case:
        """Build the case, the same in every process."""
        torch.manual_seed(SEED)
        case = MODELS[self.model](self.batch, self.k).to(torch.device(self.device))
        return replace(case, autocast=self.autocast)


def exact_jacobian(case: Case) -> Tensor:
    """Return every cluster's gradient by its definition in float64, [K, P]: of its own samples, by the chunk."""
    case = case.exact()
    rows = []
    for part in slice_batches(case):
        case.model.zero_grad(set_to_none=True)
        size = len(part.target)
        for start in range(0, size, CHUNK):
            losses = case.losses(case.model, part.narrow(start, min(CHUNK, size - start)))
            (losses.sum() / size).backward()
        rows.append(_flat([p.grad for p in case.model.parameters()], case))
    return torch.stack(rows)


def directions(case: Case, jacobian: Tensor) -> Expected:
    """Balance a float64 Jacobian by the published definitions."""
    k = case.num_clusters
    present = torch.ones(k, dtype=torch.bool, device=jacobian.device)
    orders = projecting(case).draw_order(k, case.device)
    torchjd_orders = random_orders(k, torch.Generator().manual_seed(SEED))
    variances = uncertainty(case).log_var.detach().to(jacobian)
    gramian = jacobian @ jacobian.T
    found: dict[Outcome, Tensor] = {
        "mean": torch.tensor(case.sizes).to(jacobian) @ jacobian / sum(case.sizes),
        "uncertainty": update_direction(jacobian, 0.5 * torch.exp(-variances), present),
        "pcgrad": update_direction(jacobian, _projecting(gramian, orders), present),
        "pcgrad, torchjd's order": update_direction(jacobian, _projecting(gramian, torchjd_orders), present),
        "nash": update_direction(jacobian, _bargaining(gramian), present),
    }
    if min(relative_error(found[name], jacobian.mean(0)) for name in ("pcgrad", "nash")) < 0.01:
        raise GateError(f"{case.name}: expected gradients to balance, found all weights near 1")
    return {name: direction.unsqueeze(0) for name, direction in found.items()}


def _projecting(gramian: Tensor, orders: Tensor) -> Tensor:
    """Return PCGrad's weights: its loop over vectors of K elements that have the gradients' inner products."""
    factor = torch.linalg.cholesky(gramian)
    projected = pcgrad(factor, orders).unsqueeze(0)
    return torch.linalg.solve_triangular(factor, projected, upper=False, left=False).squeeze(0)


def _bargaining(gramian: Tensor) -> Tensor:
    """Return the bargaining weights, certified by the equations that only they solve."""
    weights = dm.ops.nash_weights(gramian)
    residual = nash_residual(gramian.cpu().numpy(), weights.cpu().numpy())
    if not residual < 1e-8:
        raise GateError(f"Nash weights: expected max |α(Ĝα) − 1| < 1e-8, found {residual:.3g}")
    return weights


def tolerances(case: Case, expected: Expected) -> dict[Outcome, float]:
    """Return how much error autocast excuses: twice what one backward per cluster has under it."""
    if not case.autocast:
        return dict.fromkeys(expected, 0.0)
    parameters = list(case.model.parameters())
    losses = case.losses(case.model, case.batch)
    jacobian = cluster_gradients(losses, case.batch.cluster, parameters, case.num_clusters).jacobian.double()
    found = {**directions(case, jacobian), "jacobian": jacobian}
    return {name: 2 * relative_error(found[name], expected[name]) for name in expected}


class Expectations:
    """What every way has to find, formed when the first gate asks for it."""

    def __init__(self, case: Case) -> None:
        self.case = case

    @cached_property
    def _all(self) -> tuple[Expected, dict[Outcome, float]]:
        jacobian = exact_jacobian(self.case)
        expected: Expected = {**directions(self.case, jacobian), "jacobian": jacobian}
        excused = tolerances(self.case, expected)
        expected["jacobian"] = jacobian.cpu()  # [K, P] in float64 is more than a GPU should keep
        return expected, excused

    def candidate(self, way: StepWay) -> Candidate:
        """Return a way with its gate: it must find what is expected, but for what autocast excuses.

        How much that is takes a step under autocast to find out. The gate does so when it is called, and compares
        by itself; the candidate's own tolerance is infinite.
        """
        prepared = cache(lambda: way.prepare(self.case))

        def error() -> float:
            expected, excused = self._all
            found = _error(prepared()(), expected[way.outcome], self.case)
            tolerance = max(way.tolerance, excused[way.outcome])
            if not found <= tolerance:
                raise GateError(
                    f"{way.name}: expected a relative error <= {tolerance:.3g}, found {found:.3g}"
                )
            return found

        return Candidate(way.name, lambda: prepared()(), error, float("inf"), way.peer)


def _error(found: Rows, expected: Tensor, case: Case) -> float:
    """Return the relative error of all rows together, forming one in float64 at a time."""
    deviation = norm = 0.0
    for row, exact in zip(found, expected, strict=True):
        exact = exact.to(case.device)
        deviation += float((_flat(row, case) - exact).square().sum())
        norm += float(exact.square().sum())
    return (deviation / norm) ** 0.5


def _flat(row: Sequence[Tensor | None], case: Case) -> Tensor:
    """Concatenate the gradients of all parameters, [P] in float64."""
    pairs = zip(row, case.model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in pairs])


def benchmarks(options: Options) -> Iterator[Benchmark]:
    """Yield the cases of this group."""
    for setting in settings(options):
        yield benchmark(Group.STEP, setting, step_ways, options)


def settings(options: Options) -> list[Setting]:
    """Return what to measure: the typical K of every model and batch size, and other K at the first batch size.

    Unless everything is measured, other K are of one model alone, and the largest of the UNet, too, for its goal.
    """
    large = ("dit-s2", "dit-b2") if options.gpu else ("dit", "unet", "diffusers-dit")
    models = options.models or options.pick(("tiny",), large)
    ks = options.pick((TYPICAL_K,), (2, TYPICAL_K, 10, MANY_K))
    batches = (
        (options.batch,) if options.batch else (256,) if options.gpu else options.pick((10,), (40,), (40, 20))
    )
    curve = None if options.gpu else models[0]  # of time against K, where there is time for one
    return [
        Setting(model, batch, k, options.device, options.gpu)
        for model, batch, k in product(models, batches, ks)
        if k == TYPICAL_K
        or (batch == batches[0] and (options.full or model == curve or (model == "unet" and k == MANY_K)))
    ]


def benchmark(
    group: Group, setting: Setting, ways: Callable[[], Sequence[StepWay]], options: Options
) -> Benchmark:
    """Return the benchmark of the ways that count at one setting."""
    typical = setting.k == TYPICAL_K
    title, precision = TITLES[setting.model], "bf16 autocast" if setting.autocast else "float32"
    # A fresh process for every way takes longer than timing them.
    with_memory = options.full or setting.model == settings(options)[0].model
    return Benchmark(
        group,
        f"{title}, K = {setting.k}, batch {setting.batch}, {precision}",
        {way.name: way.role for way in _chosen(setting, ways, options)},
        partial(_candidates, setting, ways, options),
        options.pick(2, 5, 9 if typical else 5),
        {"title": title} | {name: value for name, value in asdict(setting).items() if name != "device"},
        memory=typical and with_memory and not options.quick,
        allowance=ALLOWANCE,
        grace=0.0,
        warmup=0,  # the gate ran every way once
    )


def _chosen(setting: Setting, ways: Callable[[], Sequence[StepWay]], options: Options) -> list[StepWay]:
    """Return the ways that are measured at a setting, with the authors' code where there is any."""
    chosen = [way for way in ways() if setting.k == TYPICAL_K or not way.detail]
    published = options.published()
    return chosen if published is None else [replace(way, **published.step(way)) for way in chosen]


def _candidates(setting: Setting, ways: Callable[[], Sequence[StepWay]], options: Options) -> list[Candidate]:
    case = setting.case()
    # A step of one sample first: what any step allocates once (code, the threads' stacks, scratch memory of
    # libraries) would otherwise count as the memory of the way that is measured.
    plain_step(case.model, case.losses, case.batch.narrow(0, 1))
    case.model.zero_grad(set_to_none=True)
    expectations = Expectations(case)
    return [expectations.candidate(way) for way in _chosen(setting, ways, options)]
