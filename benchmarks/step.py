"""One training step, from forward to ``.grad``: plain, as published, by hand, and with the library.

    python -m benchmarks.step [--quick]

prints a table of ratios to the plain step and writes them to benchmarks/results/step.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import diffmtl_fast as dm
from benchmarks import models
from benchmarks.harness import (
    Candidate,
    Comparison,
    GateError,
    compare,
    environment,
    relative_error,
    write,
)
from benchmarks.models import Case
from benchmarks.reference import (
    ClusterGradients,
    cluster_gradients,
    nash_step,
    nash_weights,
    pcgrad,
    pcgrad_step,
    plain_step,
    update_direction,
    uw_step,
)

BATCH_SIZE, NUM_CLUSTERS, SEED = 40, 5, 0
CASES: tuple[Callable[[int, int], Case], ...] = (models.dit, models.unet, models.diffusers_dit)
# Slices add the same float32 numbers in another order. Balancing adds the rounding of float32 dot products
# over all parameters (a Gramian on one thread: 5e-5) and, for Nash, what ECOS leaves unsolved in the oracle.
EXACT, ROUNDED = 1e-5, 1e-3


def candidates(case: Case) -> list[Candidate]:
    """Return the ways to compare, the plain step first.

    The oracle is one backward per cluster, its gradients balanced in float64 by the reference.
    """
    gradients = k_backwards(case)
    jacobian, present = gradients.jacobian.double(), gradients.present
    orders = _pcgrad().draw_order(NUM_CLUSTERS)
    uncertainty = _uncertainty()
    equal = update_direction(jacobian, torch.ones(NUM_CLUSTERS), present)
    weighted = update_direction(jacobian, 0.5 * torch.exp(-uncertainty.log_var.detach()), present)
    projected = pcgrad(jacobian, orders) / NUM_CLUSTERS
    bargained = update_direction(jacobian, nash_weights(jacobian @ jacobian.T), present)
    if min(relative_error(projected, equal), relative_error(bargained, equal)) < 0.01:
        raise GateError(f"{case.name}: expected gradients to balance, found all weights near 1")

    def step(name: str, run: Callable[[], object], expected: Tensor, tolerance: float = EXACT) -> Candidate:
        def fresh() -> None:
            case.model.zero_grad(set_to_none=True)
            run()

        def error() -> float:
            fresh()
            return relative_error(_grad(case), expected)

        return Candidate(name, fresh, error, tolerance)

    def by_hand_error() -> float:
        found = torch.stack([torch.cat([g.flatten() for g in row]) for row in by_hand(case)])
        return relative_error(found, jacobian)

    work = case.model, case.losses, case.batch
    return [
        step("plain", lambda: plain_step(*work), equal),
        Candidate("K backwards, gradients only", lambda: k_backwards(case)),
        step("K backwards + PCGrad", lambda: pcgrad_step(*work, orders), projected, ROUNDED),
        step("K backwards + Nash", lambda: nash_step(*work, NUM_CLUSTERS), bargained, ROUNDED),
        Candidate("slices by hand, gradients only", lambda: by_hand(case), by_hand_error, EXACT),
        step("published UW", lambda: uw_step(*work, uncertainty.log_var), weighted),
        step("diffmtl_fast, UncertaintyWeighting", ours(case, _uncertainty()), weighted),
        step("diffmtl_fast, PCGrad", ours(case, _pcgrad()), projected, ROUNDED),
        step("diffmtl_fast, NashMTL", ours(case, dm.NashMTL(update_every=1)), bargained, ROUNDED),
    ]


def ours(case: Case, weighting: dm.LossWeighting | dm.GramianWeighting) -> Callable[[], None]:
    """Return the library's step.

    The gate sees the first step only; a weighting that skips its gradients in later ones would be timed as a
    plain step, so every step is held to having formed them.
    """
    balances_gradients = isinstance(weighting, dm.GramianWeighting)
    mtl = dm.ClusteredMTL(case.model, num_clusters=NUM_CLUSTERS, weighting=weighting)

    def run() -> None:
        pred = case.predict(mtl, case.batch, cluster=case.batch.cluster)
        mtl.backward(dm.ops.sample_mse(pred, case.batch.target))
        assert mtl.last is not None
        if (mtl.last.gramian is not None) != balances_gradients:
            raise GateError(
                f"{weighting}: expected a Gramian in every step: {balances_gradients}, found otherwise"
            )

    return run


def k_backwards(case: Case) -> ClusterGradients:
    """Form the Jacobian by one backward per cluster."""
    losses = case.losses(case.model, case.batch)
    return cluster_gradients(losses, case.batch.cluster, list(case.model.parameters()), NUM_CLUSTERS)


def by_hand(case: Case) -> list[tuple[Tensor, ...]]:
    """Run a small forward and backward per cluster, as anyone can without a library, and keep the gradients."""
    parameters, rows, start = list(case.model.parameters()), [], 0
    for size in case.batch.cluster.bincount(minlength=NUM_CLUSTERS).tolist():
        losses = case.losses(case.model, case.batch.narrow(start, size))
        rows.append(torch.autograd.grad(losses.mean(), parameters))
        start += size
    return rows


def _pcgrad() -> dm.PCGrad:
    """Return a PCGrad whose first order is known."""
    return dm.PCGrad(generator=torch.Generator().manual_seed(SEED))


def _uncertainty() -> dm.UncertaintyWeighting:
    """Return an uncertainty weighting with unequal log-variances, as after some training."""
    weighting = dm.UncertaintyWeighting(NUM_CLUSTERS)
    with torch.no_grad():
        weighting.log_var.copy_(torch.linspace(-1, 1, NUM_CLUSTERS))
    return weighting


def _grad(case: Case) -> Tensor:
    """Copy the gradients into one vector."""
    return torch.cat([p.grad.flatten() for p in case.model.parameters() if p.grad is not None])


def run_case(make: Callable[[int, int], Case], batch_size: int, rounds: int) -> Comparison:
    """Measure one model."""
    torch.manual_seed(SEED)
    case = make(batch_size, NUM_CLUSTERS)
    baseline, *others = candidates(case)
    return compare(case.name, baseline, others, rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="Time one training step.")
    parser.add_argument("--quick", action="store_true", help="two rounds of a small batch, nothing written")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the full run (default 15)")
    options = parser.parse_args(arguments)
    batch_size, rounds = (10, 2) if options.quick else (BATCH_SIZE, options.rounds)
    measured_in = environment()
    comparisons = []
    for make in CASES:
        comparisons.append(run_case(make, batch_size, rounds))
        print(comparisons[-1].table(), flush=True)
    if not options.quick:
        write("step", comparisons, measured_in, batch_size=batch_size, num_clusters=NUM_CLUSTERS)


if __name__ == "__main__":
    main()
