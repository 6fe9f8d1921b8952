"""The authors' own code in place of our reference, from a checkout that the user names.

    python -m pytest benchmarks/bench_suite.py --reference-repo PATH

Used are ``interval_clustering.py`` (``snr_based_clustering(snr, k)`` and ``tas_based_clustering(tas, k)``, which
return K pairs of first and last timestep), ``mtl_library/pcgrad.py`` (``PCgrad``) and ``mtl_library/nash.py``
(``NashMTL``). What they do otherwise than the paper says is shown by small probes and stated beside every figure;
a result that is wrong beyond that is refused by the gate, like anybody's.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.harness import Candidate, GateError, relative_error
from benchmarks.models import Case
from benchmarks.names import K_BACKWARDS_PCGRAD
from benchmarks.reference import (
    cluster_gradients,
    nash_residual,
    pcgrad,
)
from benchmarks.reference.clustering import affinity_cost, optimal_intervals, snr_cost
from benchmarks.step_implementations import Rows, StepWay, projecting, update

Array = NDArray[np.float64]
CLUSTERING, PCGRAD, NASH = "interval_clustering.py", "mtl_library/pcgrad.py", "mtl_library/nash.py"
#: how much dearer than the best a partition may be: the code measures from another centre, and cannot make the
#: first clusters as small as it should
SLACK = 0.02


class CheckoutError(ValueError):
    """The folder is not a checkout with the expected interfaces."""


@cache
def checkout(path: Path) -> Checkout:
    """Import the code of a checkout.

    Raises:
        CheckoutError: files or functions are missing.
    """
    if not path.is_dir():
        raise CheckoutError(f"--reference-repo: expected a folder, found {path}")
    # Its Nash-MTL installs cvxpy with pip where it is missing; nothing is installed behind the user's back.
    cvxpy = importlib.util.find_spec("cvxpy") is not None
    found = Checkout(
        _module(path, CLUSTERING, "snr_based_clustering", "tas_based_clustering"),
        _module(path, PCGRAD, "PCgrad"),
        _module(path, NASH, "NashMTL") if cvxpy else None,
    )
    for line in found.faults():
        print(f"{found.label}: {line}", flush=True)
    return found


def _module(path: Path, name: str, *needed: str) -> ModuleType:
    file = path / name
    if not file.is_file():
        raise CheckoutError(f"--reference-repo: expected {name} in {path.name}, found none")
    spec = importlib.util.spec_from_file_location(f"_published_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for attribute in needed:
        if not hasattr(module, attribute):
            raise CheckoutError(f"--reference-repo: expected {attribute} in {name}, found none")
    return module


@dataclass(frozen=True, eq=False)
class Checkout:
    """The imported code."""

    intervals: ModuleType
    projections: ModuleType
    bargains: ModuleType | None
    label: str = "authors' code"

    # ---- Interval clustering ---------------------------------------------------------------------------------

    def boundaries(self, clusters: Sequence[tuple[float, float]], size: int) -> list[int]:
        """Return the cuts that the dynamic programme chose: its list names the timestep before each cluster."""
        starts = [int(first) + 1 for first, _ in clusters[1:]]
        return [0, *starts, size]

    def clustering(self, name: str, work: Any) -> Candidate:
        """Return log-SNR clustering; `work` is a `benchmarks.groups.clustering.Work`."""

        def solve() -> list[int]:
            return self.boundaries(self.intervals.snr_based_clustering(work.x, work.k), len(work.x))

        return self._noted(work.candidate(name, "absolute", solve, SLACK, peer=True), self.clustering_faults)

    def affinity_clustering(self, name: str, tas: Array, least: Callable[[], float]) -> Candidate:
        """Return clustering by task affinity."""

        def solve() -> list[int]:
            return self.boundaries(self.intervals.tas_based_clustering(tas, 5), len(tas))

        def error() -> float:
            return abs(sum(affinity_cost(tas)(l, e) for l, e in pairwise(solve())) / least() - 1.0)

        return self._noted(Candidate(name, solve, error, SLACK, peer=True), self.clustering_faults)

    def clustering_faults(self) -> list[str]:
        """Return what the clustering does otherwise than the paper says."""
        found = []
        size = 30
        snr = np.linspace(5.0, -5.0, size) ** 3
        clusters = self.intervals.snr_based_clustering(snr, 3)
        exact, least = optimal_intervals(snr_cost(snr), size, 3)
        starts = [int(first) for first, _ in clusters]
        cuts = self.boundaries(clusters, size)
        if _cost(snr_cost(snr), cuts) < _cost(snr_cost(snr), [0, *starts[1:], size]):
            found.append("clusters after the first begin one timestep early")
        if int(clusters[-1][1]) != size - 1:
            found.append(f"the last cluster of T = {size} ends at {int(clusters[-1][1])}")
        steps = np.repeat([3.0, 0.0, -3.0], [1, 5, 6])  # three clusters of cost 0, the first of one timestep
        flat = self.boundaries(self.intervals.snr_based_clustering(steps, 3), len(steps))
        if _cost(snr_cost(steps), flat) > 0:
            found.append("partitions without cost are passed over")
        if _cost(snr_cost(snr), cuts) > least * (1 + 1e-12) or cuts != exact.tolist():
            excess = _cost(snr_cost(snr), cuts) / least - 1
            found.append(f"centres are rounded half to even: {excess:.1e} above the least cost")
        return found

    # ---- PCGrad ----------------------------------------------------------------------------------------------

    def projection(self, name: str, jacobian: Tensor, tolerance: float) -> Candidate:
        """Return the projection of given gradients, in orders that keep its visit to itself without effect."""
        module, seed = nn.Linear(1, 1), self._harmless_seed(jacobian @ jacobian.T)
        method = self.projections.PCgrad(len(jacobian), module)

        def run() -> Tensor:
            random.seed(seed)
            return method.do_pc_grad(jacobian)

        def error() -> float:
            return relative_error(run(), pcgrad(jacobian.double(), orders_of(seed, len(jacobian))))

        return self._noted(Candidate(name, run, error, tolerance, peer=True), self.pcgrad_faults)

    @staticmethod
    def _harmless_seed(gramian: Tensor) -> int:
        """Return a seed of orders in which no projected gradient points against its own original."""
        factor = torch.linalg.cholesky(gramian.double().cpu())
        for seed in range(1000):
            permutations = permutations_of(seed, len(factor))
            without = pcgrad(factor, orders_of(seed, len(factor)))
            if torch.allclose(_visiting_all(factor, permutations), without, rtol=1e-9, atol=1e-12):
                return seed
        raise GateError("expected an order in which PCGrad's visit to itself has no effect, found none")

    def pcgrad_faults(self) -> list[str]:
        """Return what the projection does otherwise than the paper says."""
        # Against the second the first gradient loses so much that it then points against itself.
        jacobian = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -1.0]], dtype=torch.float64)
        method = self.projections.PCgrad(3, nn.Linear(1, 1))
        for seed in range(50):
            random.seed(seed)
            found = method.do_pc_grad(jacobian)
            if not torch.allclose(found, pcgrad(jacobian, orders_of(seed, 3)), rtol=1e-6, atol=1e-9):
                return ["a gradient is projected against itself as well"]
        return []

    def step(self, way: StepWay) -> dict[str, Any]:
        """Return what changes of a way of the full training step: PCGrad's loop and writing into ``.grad``."""
        if way.name != K_BACKWARDS_PCGRAD:
            return {}
        return {"name": f"{K_BACKWARDS_PCGRAD} ({self.label})", "prepare": self._prepare_step, "peer": True}

    def _prepare_step(self, case: Case) -> Callable[[], Rows]:
        parameters = list(case.model.parameters())
        method = self.projections.PCgrad(case.num_clusters, case.model)
        k = case.num_clusters
        wanted = projecting(case).draw_order(k, case.device).tolist()

        def run() -> Rows:
            case.model.zero_grad(set_to_none=True)
            losses = case.losses(case.model, case.batch)
            found = cluster_gradients(losses, case.batch.cluster, parameters, k)
            with _orders(self.projections, wanted):
                # Its direction is the sum, where the others' is the mean.
                method._reset_grad(method.do_pc_grad(found.jacobian) / k)
            return update(case.model)

        return run

    # ---- Nash ------------------------------------------------------------------------------------------------

    def bargaining(self, name: str, gramian: Tensor) -> Candidate:
        """Return a solve from the first iterate, as in the first step of a training."""
        unit = (gramian / gramian.norm()).double().cpu().numpy()

        def run() -> NDArray[Any]:
            return self._solve(unit, np.ones((1,)))

        def error() -> float:
            return nash_residual(unit, np.asarray(run(), dtype=np.float64))

        return self._noted(Candidate(name, run, error, 1e-3, peer=True), self.nash_faults)

    def _solve(self, unit: Array, norm: Array) -> NDArray[Any]:
        if self.bargains is None:
            raise ImportError("expected the package of `cvxpy` to be installed; its own pip call is not made")
        cvxpy = sys.modules.get("cvxpy") or importlib.import_module("cvxpy")
        if "ECOS" not in cvxpy.installed_solvers():
            raise ImportError("expected cvxpy to find the solver ECOS: without it these weights are all 1")
        method = self.bargains.NashMTL(len(unit), nn.Linear(1, 1), "cpu", None)
        method.normalization_factor = norm
        method._init_optim_problem()
        return np.asarray(method.solve_optimization(unit))

    def nash_faults(self) -> list[str]:
        """Return what the weights do otherwise than the paper says."""
        unit = np.array([[1.0, 0.2], [0.2, 0.5]])
        unit /= np.linalg.norm(unit)
        try:
            ones, scaled = self._solve(unit, np.ones((1,))), self._solve(unit, np.full((1,), 100.0))
        except ImportError as error:
            return [str(error)]
        if np.allclose(scaled, ones, rtol=0.05):
            return []
        shrunk = float(np.median(ones / scaled))
        return [
            f"weights depend on the gradients' scale: {shrunk:.3g} times smaller at a Gramian 100 times as large"
        ]

    # ---- Both ------------------------------------------------------------------------------------------------

    def faults(self) -> list[str]:
        """Return everything that the probes show."""
        return [*self.clustering_faults(), *self.pcgrad_faults(), *self.nash_faults()]

    def _noted(self, candidate: Candidate, faults: Callable[[], list[str]]) -> Candidate:
        return replace(candidate, notes=lambda: {"faults": faults()})


def _cost(cost: Callable[[int, int], float], boundaries: Sequence[int]) -> float:
    if any(l >= e for l, e in pairwise(boundaries)):
        return float("inf")
    return sum(cost(l, e) for l, e in pairwise(boundaries))


def permutations_of(seed: int, k: int) -> list[list[int]]:
    """Return the orders that Python's generator gives k lists of all k clusters, shuffled one after the other."""
    generator = random.Random(seed)
    permutations = [list(range(k)) for _ in range(k)]
    for permutation in permutations:
        generator.shuffle(permutation)
    return permutations


def orders_of(seed: int, k: int) -> Tensor:
    """Return the same without the cluster itself, [K, K-1]."""
    permutations = permutations_of(seed, k)
    return torch.tensor([[j for j in order if j != i] for i, order in enumerate(permutations)])


def _visiting_all(jacobian: Tensor, permutations: Sequence[Sequence[int]]) -> Tensor:
    """PCGrad whose gradients also visit themselves."""
    total = torch.zeros_like(jacobian[0])
    for i, order in enumerate(permutations):
        row = jacobian[i].clone()
        for j in order:
            inner = row @ jacobian[j]
            if inner < 0:
                row -= inner / (jacobian[j] @ jacobian[j]) * jacobian[j]
        total += row
    return total


class _orders:
    """Have a module's ``random.shuffle`` put these orders first to last, each cluster first in its own."""

    def __init__(self, module: ModuleType, orders: Sequence[Sequence[int]]) -> None:
        self._module, self._orders = module, orders

    def __enter__(self) -> None:
        self._original = self._module.random
        waiting = iter(enumerate(self._orders))

        class Shuffler:
            @staticmethod
            def shuffle(target: list[int]) -> None:
                k, order = next(waiting)
                target[:] = [k, *order]  # first in its own order, where the visit has no effect

        self._module.random = Shuffler  # type: ignore[attr-defined]

    def __exit__(self, *error: object) -> None:
        self._module.random = self._original  # type: ignore[attr-defined]
