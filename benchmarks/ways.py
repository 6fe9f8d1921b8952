"""The ways of doing one training step that balances K clusters: published, by peers, by hand, and ours.

The ways of a step end with the update in ``.grad``, those of the gradients alone with every cluster's gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import diffmtl_fast as dm
from benchmarks.harness import GateError
from benchmarks.models import Case
from benchmarks.reference import Batch, cluster_gradients, nash_step, pcgrad_step, plain_step
from benchmarks.report.results import Role
from diffmtl_fast._extras import require
from diffmtl_fast.gradients.cluster_jacobian import ClusterJacobian

SEED = 0
OURS = "diffmtl_fast"
# of gradients, one tensor per parameter; a row is an update or a cluster
Rows = Iterable[Sequence[Tensor | None]]
Run = Callable[[], Rows]
Weighting = dm.LossWeighting | dm.GramianWeighting
EngineName = Literal["grouped", "sliced"]
Memory = Literal["full", "lean"]
Outcome = Literal["mean", "uncertainty", "pcgrad", "pcgrad, torchjd's order", "nash", "jacobian"]


@dataclass(frozen=True)
class Way:
    """One way of doing the step.

    Attributes:
        name: row label.
        outcome: what it computes: an update direction by that method, or every cluster's gradient and no update.
        role: what it stands for.
        prepare: set up what lasts from step to step, and return the step.
        tolerance: largest relative error in float32; a step that adds up its inner products in float32 needs more.
        peer: may be absent or refuse a model: the work of others, and what a compiler makes.
        detail: of interest at the typical K and batch size alone.
    """

    name: str
    outcome: Outcome
    role: Role
    prepare: Callable[[Case], Run]
    tolerance: float = 1e-5
    peer: bool = False
    detail: bool = False


PLAIN = "plain step"
ROUNDED = 1e-3
PROJECTED: Outcome = "pcgrad, torchjd's order"


def step_ways() -> list[Way]:
    """Return the ways of a whole step, the plain one first."""
    return [
        Way(PLAIN, "mean", "limit", lambda case: plain(case)),
        Way("K backwards, PCGrad", "pcgrad", "reference", k_backwards, ROUNDED),
        Way("K backwards, NashMTL", "nash", "reference", k_backwards_nash, 1e-2, peer=True, detail=True),
        Way("slices by hand, PCGrad", "pcgrad", "baseline", slices_pcgrad, ROUNDED),
        Way("TorchJD autojac, PCGrad", PROJECTED, "peer", autojac, ROUNDED, peer=True),
        Way("TorchJD autogram, PCGrad", PROJECTED, "peer", autogram, ROUNDED, peer=True),
        Way(
            f"{OURS}, UncertaintyWeighting",
            "uncertainty",
            "ours",
            _step("grouped", "full", uncertainty),
            detail=True,
        ),
        Way(f"{OURS}, DifficultyCurriculum", "mean", "ours", curriculum, detail=True),
        Way(f"{OURS} grouped, PCGrad", "pcgrad", "ours", _step("grouped", "full", projecting)),
        Way(f"{OURS} grouped, NashMTL", "nash", "ours", _step("grouped", "full", bargaining)),
        Way(f"{OURS} sliced, PCGrad", "pcgrad", "ours", _step("sliced", "full", projecting)),
        Way(f"{OURS} sliced, NashMTL", "nash", "ours", _step("sliced", "full", bargaining), detail=True),
        Way(f"{OURS} lean, PCGrad", "pcgrad", "ours", _step("grouped", "lean", projecting)),
        Way(f"{OURS} lean, NashMTL", "nash", "ours", _step("grouped", "lean", bargaining), detail=True),
    ]


def compiled_ways() -> list[Way]:
    """Return what becomes of the step where torch.compile takes the model, beside the plain one without it."""
    return [
        Way(PLAIN, "mean", "limit", lambda case: plain(case)),
        Way(
            "plain step, torch.compile",
            "mean",
            "baseline",
            lambda case: plain(case, compiled=True),
            1e-4,
            True,
        ),
        Way(f"{OURS} grouped, PCGrad", "pcgrad", "ours", _step("grouped", "full", projecting)),
        Way(f"{OURS} sliced, PCGrad, torch.compile", "pcgrad", "ours", _compiled_step, ROUNDED, peer=True),
    ]


def gradient_ways() -> list[Way]:
    """Return the ways of forming the gradients of all clusters and nothing else, beside the plain step."""
    return [
        Way(PLAIN, "mean", "limit", lambda case: plain(case)),
        Way(f"{OURS} grouped", "jacobian", "ours", lambda case: cluster_jacobian(case, "grouped")),
        Way(f"{OURS} sliced", "jacobian", "ours", lambda case: cluster_jacobian(case, "sliced")),
        Way("K backwards", "jacobian", "reference", k_gradients),
        Way("slices by hand", "jacobian", "baseline", slices),
        Way("vmap(grad)", "jacobian", "baseline", vmap_of_grad, peer=True),
        Way("is_grads_batched", "jacobian", "baseline", batched_gradients, peer=True),
        Way("TorchJD autojac", "jacobian", "peer", autojac_gradients, peer=True),
    ]


def _step(
    engine: EngineName, memory: Memory, weighting: Callable[[Case], Weighting]
) -> Callable[[Case], Run]:
    def prepare(case: Case) -> Run:
        if (engine, memory) not in case.wrapped:
            # Shared by the weightings, and with it the memory of the Jacobian.
            case.wrapped[engine, memory] = dm.ClusteredMTL(
                case.model, case.num_clusters, dm.Equal(), engine=engine, memory=memory
            )
        return ours(case, case.wrapped[engine, memory], weighting(case))

    return prepare


def _compiled_step(case: Case) -> Run:
    model = cast(nn.Module, torch.compile(case.model, dynamic=False))
    return ours(
        case, dm.ClusteredMTL(model, case.num_clusters, dm.Equal(), engine="sliced"), projecting(case)
    )


def plain(case: Case, *, compiled: bool = False) -> Run:
    """Train on the mean loss of the batch."""
    model = cast(nn.Module, torch.compile(case.model)) if compiled else case.model

    def run() -> Rows:
        model.zero_grad(set_to_none=True)
        plain_step(model, case.losses, case.batch)
        return update(case.model)

    return run


def k_backwards(case: Case) -> Run:
    """Do as published: one backward per cluster, PCGrad's loop over the vectors."""
    orders = projecting(case).draw_order(case.num_clusters, case.device)

    def run() -> Rows:
        case.model.zero_grad(set_to_none=True)
        pcgrad_step(case.model, case.losses, case.batch, orders)
        return update(case.model)

    return run


def k_backwards_nash(case: Case) -> Run:
    """Do as published: one backward per cluster, the weights from cvxpy and ECOS."""

    def run() -> Rows:
        case.model.zero_grad(set_to_none=True)
        nash_step(case.model, case.losses, case.batch, case.num_clusters)
        return update(case.model)

    return run


def k_gradients(case: Case) -> Run:
    """Differentiate one cluster's loss after the other through one graph."""
    parameters = list(case.model.parameters())

    def run() -> Rows:
        losses = case.losses(case.model, case.batch)
        found = cluster_gradients(losses, case.batch.cluster, parameters, case.num_clusters)
        return MatrixRows(lambda: found.jacobian, parameters)

    return run


def batched_gradients(case: Case) -> Run:
    """Differentiate all clusters' losses at once, under vmap."""
    parameters = list(case.model.parameters())
    directions = torch.eye(case.num_clusters, device=case.device)

    def run() -> Rows:
        means = shares(case) @ case.losses(case.model, case.batch) * case.num_clusters
        found = torch.autograd.grad(means, parameters, directions, is_grads_batched=True)
        return list(zip(*found, strict=True))

    return run


def cluster_jacobian(case: Case, engine: EngineName) -> Run:
    """Form the gradients with the library."""
    former = ClusterJacobian(case.model, case.num_clusters, engine=engine)
    parameters, cluster = list(case.model.parameters()), case.batch.cluster.cpu()

    def loss(model: Callable[..., object]) -> Tensor:
        return dm.ops.sample_mse(case.predict(model, case.batch), case.batch.target)

    def run() -> Rows:
        former(loss, cluster)
        return MatrixRows(former.matrix, parameters)

    return run


class MatrixRows:
    """The rows of a Jacobian [K, P], each as one tensor per parameter; copied when they are looked at."""

    def __init__(self, matrix: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
        self._matrix, self._parameters = matrix, parameters

    def __iter__(self) -> Iterator[list[Tensor]]:
        for row in self._matrix():
            parts = row.split([p.numel() for p in self._parameters])
            yield [part.view_as(p) for part, p in zip(parts, self._parameters, strict=True)]


def autojac_gradients(case: Case) -> Run:
    """Let TorchJD form the Jacobian of the cluster losses, one after the other, and keep it in ``.jac``."""
    torchjd = require("torchjd.autojac", "bench")
    parameters = list(case.model.parameters())
    share = shares(case) * case.num_clusters

    def run() -> Rows:
        for parameter in parameters:
            if hasattr(parameter, "jac"):  # TorchJD adds to what is there
                del parameter.jac
        torchjd.backward(
            share @ case.losses(case.model, case.batch), inputs=parameters, parallel_chunk_size=1
        )
        return list(zip(*(p.jac for p in parameters), strict=True))  # type: ignore[attr-defined]

    return run


def autojac(case: Case) -> Run:
    """Let TorchJD form the Jacobian of the cluster losses, one after the other.

    All at once under vmap, its default, is slower than that on a CPU and refuses convolutions.
    """
    torchjd = require("torchjd.autojac", "bench")
    aggregator = require("torchjd.aggregation", "bench").PCGrad()
    parameters = list(case.model.parameters())
    share = shares(case)

    def run() -> Rows:
        torch.manual_seed(SEED)  # of the orders
        case.model.zero_grad(set_to_none=True)
        torchjd.backward(
            share @ case.losses(case.model, case.batch), inputs=parameters, parallel_chunk_size=1
        )
        torchjd.jac_to_grad(parameters, aggregator)
        return update(case.model)

    return run


def autogram(case: Case) -> Run:
    """Let TorchJD form the Gramian of all samples, add it up by cluster, and differentiate the weighted loss."""
    model = copy.deepcopy(case.model)  # TorchJD leaves hooks in it
    engine = require("torchjd.autogram", "bench").Engine(model, batch_dim=0)
    weighting = require("torchjd.aggregation", "bench").PCGradWeighting()
    share = shares(case)

    def run() -> Rows:
        torch.manual_seed(SEED)
        model.zero_grad(set_to_none=True)
        losses = case.losses(model, case.batch)
        gramian = engine.compute_gramian(losses)
        losses.backward(weighting(share @ gramian @ share.T) @ share)
        return update(model)

    return run


def shares(case: Case) -> Tensor:
    """Return each sample's share in the loss of each cluster over K, [K, B]."""
    members = nn.functional.one_hot(case.batch.cluster, case.num_clusters).T
    return members / (members.sum(1, keepdim=True) * case.num_clusters)


def slices(case: Case) -> Run:
    """Run a small forward and backward per cluster, as anyone can without a library, and keep the gradients."""
    parameters = list(case.model.parameters())
    batches = list(slice_batches(case))

    def run() -> Rows:
        return [torch.autograd.grad(case.losses(case.model, part).mean(), parameters) for part in batches]

    return run


def slices_pcgrad(case: Case) -> Run:
    """Do by hand what the library does: slices, J @ J.T, the projections on vectors of K elements, w @ J."""
    gradients, parameters = slices(case), list(case.model.parameters())
    orders = projecting(case).draw_order(case.num_clusters, case.device)

    def run() -> Rows:
        case.model.zero_grad(set_to_none=True)
        project_by_hand(gradients(), parameters, orders)
        return update(case.model)

    return run


def project_by_hand(rows: Rows, parameters: Sequence[nn.Parameter], orders: Tensor) -> None:
    """Write PCGrad's direction into ``.grad``: J @ J.T, projections of vectors of K elements, w @ J."""
    jacobian = torch.stack([torch.cat([g.flatten() for g in row if g is not None]) for row in rows])
    present = torch.ones(len(jacobian), dtype=torch.bool, device=jacobian.device)
    weights = dm.ops.PLAIN["pcgrad_weights"](jacobian @ jacobian.T, orders, present)
    direction = weights @ jacobian / len(jacobian)
    for parameter, part in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def curriculum(case: Case) -> Run:
    """Draw timesteps by the curriculum and report losses to it; the batch stays the one that the gate knows."""
    sampler = dm.DifficultyCurriculum(dm.cluster_timesteps(1000, 20)).to(case.device)
    size = len(case.batch.target)

    def run() -> Rows:
        t, _ = sampler.sample(size, device=case.device)
        case.model.zero_grad(set_to_none=True)
        losses = plain_step(case.model, case.losses, case.batch)
        sampler.update(losses, t)
        return update(case.model)

    return run


def vmap_of_grad(case: Case) -> Run:
    """Vectorise the gradient over the clusters, which must be of one size."""
    sizes = case.sizes
    if len(set(sizes)) > 1:
        raise ValueError(f"expected clusters of one size, found {min(sizes)} to {max(sizes)} samples")
    parameters = {name: p.detach() for name, p in case.model.named_parameters()}

    def loss(parameters: dict[str, Tensor], target: Tensor, *inputs: Tensor) -> Tensor:
        def model(*args: Tensor, **kwargs: object) -> object:
            return functional_call(case.model, parameters, args, kwargs)

        return case.losses(model, Batch(inputs, target, case.batch.cluster)).mean()

    per_cluster = vmap(grad(loss), in_dims=(None, 0, *[0] * len(case.batch.inputs)))
    tensors = [x.unflatten(0, (case.num_clusters, -1)) for x in (case.batch.target, *case.batch.inputs)]

    def run() -> Rows:
        found = per_cluster(parameters, *tensors)
        return list(zip(*(found[name] for name in parameters), strict=True))

    return run


def ours(case: Case, mtl: dm.ClusteredMTL, weighting: Weighting) -> Run:
    """Return the library's step.

    The gate sees the first step only; a weighting that skips its gradients in later ones would be timed as a
    plain step, so every step is held to having formed them.
    """
    balances_gradients = isinstance(weighting, dm.GramianWeighting)
    weighting = weighting.to(case.device)
    cluster = case.batch.cluster.cpu()  # where a sampler has it anyway, and no step waits for the device

    def run() -> Rows:
        case.model.zero_grad(set_to_none=True)
        mtl.weighting = weighting
        pred = case.predict(mtl, case.batch, cluster=cluster)
        mtl.backward(dm.ops.sample_mse(pred, case.batch.target))
        assert mtl.last is not None
        if (mtl.last.gramian is not None) != balances_gradients:
            raise GateError(
                f"{weighting}: expected a Gramian in every step: {balances_gradients}, found otherwise"
            )
        return update(case.model)

    return run


def projecting(case: Case) -> dm.PCGrad:
    """Return a PCGrad whose first order is known."""
    return dm.PCGrad(generator=torch.Generator(case.device).manual_seed(SEED))


def bargaining(case: Case) -> dm.NashMTL:
    """Return a NashMTL, which bargains in every step."""
    return dm.NashMTL(update_every=1)


def uncertainty(case: Case) -> dm.UncertaintyWeighting:
    """Return an uncertainty weighting with unequal log-variances, as after some training."""
    weighting = dm.UncertaintyWeighting(case.num_clusters)
    with torch.no_grad():
        weighting.log_var.copy_(torch.linspace(-1, 1, case.num_clusters))
    return weighting


def slice_batches(case: Case) -> Iterator[Batch]:
    """Yield the samples of each cluster."""
    start = 0
    for size in case.sizes:
        yield case.batch.narrow(start, size)
        start += size


def update(model: nn.Module) -> Rows:
    """Return what is in ``.grad`` as a single row."""
    return [[p.grad for p in model.parameters()]]
