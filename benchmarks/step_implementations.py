"""Implementations of a training step that balances K clusters: published, of other libraries, by hand, and ours.

Those of a whole step end with the update in ``.grad``, those of the gradients alone with every cluster's gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import diffmtl_fast as dm
from benchmarks.harness import GateError
from benchmarks.models import Case, as_sampled
from benchmarks.names import (
    AUTOJAC_PCGRAD,
    COMPILED_PCGRAD,
    COMPILED_PLAIN,
    CURRICULUM,
    K_BACKWARDS_PCGRAD,
    OURS,
    PLAIN_STEP,
    SLICES_PCGRAD,
    UNCERTAINTY,
    engine_step,
)
from benchmarks.reference import Batch, cluster_gradients, nash_step, pcgrad_step, plain_step
from benchmarks.report.results import Role
from diffmtl_fast._extras import require
from diffmtl_fast.gradients.cluster_jacobian import ClusterJacobian

SEED = 0
#: gradients, one tensor per parameter in each row; a row is an update or a cluster
Rows = Iterable[Sequence[Tensor | None]]
Run = Callable[[], Rows]
Weighting = dm.LossWeighting | dm.GramianWeighting
EngineName = Literal["auto", "grouped", "sliced"]
Memory = Literal["full", "lean"]
Outcome = Literal["mean", "uncertainty", "pcgrad", "pcgrad, torchjd's order", "nash", "jacobian"]


@dataclass(frozen=True)
class StepWay:
    """One way of doing the step.

    Attributes:
        name: row label.
        outcome: what it computes: an update direction by that method, or every cluster's gradient and no update.
        role: limit, ours, reference, baseline or peer; see `benchmark`.
        prepare: set up what lasts from step to step, and return the step.
        tolerance: largest relative error in float32; a step that adds up its inner products in float32 needs more.
        peer: may be absent or refuse a model: the work of others, and what a compiler makes.
        detail: measured at the typical K alone.
    """

    name: str
    outcome: Outcome
    role: Role
    prepare: Callable[[Case], Run]
    tolerance: float = 1e-5
    peer: bool = False
    detail: bool = False


ROUNDED = 1e-3
PROJECTED: Outcome = "pcgrad, torchjd's order"
VMAP = "vmap(grad)"
COMPILED = "torch.compile"


def step_ways() -> list[StepWay]:
    """Return the ways of a whole step, the plain one first."""
    return [
        StepWay(PLAIN_STEP, "mean", "limit", plain),
        StepWay(K_BACKWARDS_PCGRAD, "pcgrad", "reference", k_backwards, ROUNDED),
        StepWay("K backwards, NashMTL", "nash", "reference", k_backwards_nash, 1e-2, peer=True, detail=True),
        StepWay(SLICES_PCGRAD, "pcgrad", "baseline", slices_pcgrad, ROUNDED),
        StepWay(f"{VMAP}, PCGrad", "pcgrad", "baseline", vmap_pcgrad, ROUNDED, peer=True),
        StepWay(AUTOJAC_PCGRAD, PROJECTED, "peer", autojac, ROUNDED, peer=True),
        StepWay("TorchJD autogram, PCGrad", PROJECTED, "peer", autogram, ROUNDED, peer=True),
        StepWay(UNCERTAINTY, "uncertainty", "ours", _step("grouped", "full", uncertainty), detail=True),
        StepWay(CURRICULUM, "mean", "ours", curriculum, detail=True),
        _ours("grouped", "PCGrad"),
        _ours("grouped", "NashMTL"),
        _ours("sliced", "PCGrad"),
        _ours("sliced", "NashMTL", detail=True),
        _ours("lean", "PCGrad"),
        _ours("lean", "NashMTL", detail=True),
    ]


def compiled_ways() -> list[StepWay]:
    """Return the ways of a step with torch.compile, beside the plain step and the best without it."""
    return [
        StepWay(PLAIN_STEP, "mean", "limit", plain),
        StepWay(COMPILED_PLAIN, "mean", "baseline", compiled_plain, 1e-4, peer=True),
        StepWay(f"{VMAP}, PCGrad", "pcgrad", "baseline", vmap_pcgrad, ROUNDED, peer=True),
        StepWay(
            f"{COMPILED}({VMAP}), PCGrad", "pcgrad", "baseline", compiled_vmap_pcgrad, ROUNDED, peer=True
        ),
        _ours("grouped", "PCGrad"),
        StepWay(COMPILED_PCGRAD, "pcgrad", "ours", partial(_compiled_step, "auto"), ROUNDED, peer=True),
        StepWay(
            f"{OURS} sliced, PCGrad, {COMPILED}",
            "pcgrad",
            "ours",
            partial(_compiled_step, "sliced"),
            ROUNDED,
            peer=True,
        ),
    ]


def gradient_ways() -> list[StepWay]:
    """Return the ways of forming the gradients of all clusters and nothing else, beside the plain step."""
    return [
        StepWay(PLAIN_STEP, "mean", "limit", plain),
        StepWay(f"{OURS} grouped", "jacobian", "ours", lambda case: cluster_jacobian(case, "grouped")),
        StepWay(f"{OURS} sliced", "jacobian", "ours", lambda case: cluster_jacobian(case, "sliced")),
        StepWay("K backwards", "jacobian", "reference", k_gradients),
        StepWay("slices by hand", "jacobian", "baseline", slices),
        StepWay(VMAP, "jacobian", "baseline", vmap_gradients, peer=True),
        StepWay("is_grads_batched", "jacobian", "baseline", batched_gradients, peer=True),
        StepWay("TorchJD autojac", "jacobian", "peer", autojac_gradients, peer=True),
    ]


def _ours(engine: str, method: Literal["PCGrad", "NashMTL"], detail: bool = False) -> StepWay:
    """Return our step with an engine, or "lean" for the grouped one with lean memory, and a weighting."""
    outcome: Outcome = "pcgrad" if method == "PCGrad" else "nash"
    weighting = projecting if method == "PCGrad" else bargaining
    lean = engine == "lean"
    step = _step("grouped" if lean else cast(EngineName, engine), "lean" if lean else "full", weighting)
    return StepWay(engine_step(engine, method), outcome, "ours", step, detail=detail)


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


def _compiled_step(engine: EngineName, case: Case) -> Run:
    model = cast(nn.Module, torch.compile(case.model, dynamic=False))
    return ours(case, dm.ClusteredMTL(model, case.num_clusters, dm.Equal(), engine=engine), projecting(case))


def plain(case: Case) -> Run:
    """Train on the mean loss of the batch."""
    return _plain(case, case.model)


def compiled_plain(case: Case) -> Run:
    """Train on the mean loss of the batch, with a compiled model."""
    return _plain(case, cast(nn.Module, torch.compile(case.model)))


def _plain(case: Case, model: nn.Module) -> Run:
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
    parameters, cluster = list(case.model.parameters()), as_sampled(case.batch.cluster)

    def loss(model: Callable[..., object]) -> Tensor:
        return dm.ops.sample_mse(case.predict(model, case.batch), case.batch.target)

    def run() -> Rows:
        former(loss, cluster)
        return MatrixRows(former.matrix, parameters)

    return run


class MatrixRows:
    """The rows of a Jacobian [K, P], each as one tensor per parameter; formed when one iterates over them."""

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
    """Do by hand what the library does: gradients of slices, Gramian, weights, combination."""
    gradients, parameters = slices(case), list(case.model.parameters())
    orders = projecting(case).draw_order(case.num_clusters, case.device)

    def run() -> Rows:
        case.model.zero_grad(set_to_none=True)
        project_by_hand(stacked(gradients()), parameters, orders)
        return update(case.model)

    return run


def stacked(rows: Rows) -> list[Tensor]:
    """Return every parameter's gradients of all clusters in one tensor, [K, ...], of one row for each cluster."""
    return [torch.stack([g for g in column if g is not None]) for column in zip(*rows, strict=True)]


def project_by_hand(gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter], orders: Tensor) -> None:
    """Write PCGrad's direction into ``.grad``: J @ J.T, projections of vectors of K elements, w @ J.

    Args:
        gradients: of every parameter those of all clusters, [K, ...]; together they are the Jacobian J.
        parameters: what they are the gradients of.
        orders: of the projections, [K, K-1].
    """
    parts = [gradient.flatten(1) for gradient in gradients]
    gramian = torch.stack([part @ part.T for part in parts]).sum(0)
    present = torch.ones(len(gramian), dtype=torch.bool, device=gramian.device)
    weights = dm.ops.PLAIN["pcgrad_weights"](gramian, orders, present) / len(gramian)
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = (weights @ part).view_as(parameter)


def curriculum(case: Case) -> Run:
    """Draw timesteps by the curriculum and report losses to it; the batch stays the one whose update is known."""
    sampler = dm.DifficultyCurriculum(dm.cluster_timesteps(1000, 20)).to(case.device)
    size = len(case.batch.target)

    def run() -> Rows:
        t, _ = sampler.sample(size, device=case.device)
        case.model.zero_grad(set_to_none=True)
        losses = plain_step(case.model, case.losses, case.batch)
        sampler.update(losses, t)
        return update(case.model)

    return run


def vmap_gradients(case: Case) -> Run:
    """Vectorise the gradient over the clusters."""
    gradients = vectorised(case)
    return lambda: list(zip(*gradients(), strict=True))


def vmap_pcgrad(case: Case) -> Run:
    """Do the whole step by hand, with the gradient vectorised over the clusters."""
    return _vmap_pcgrad(case, vectorised(case))


def compiled_vmap_pcgrad(case: Case) -> Run:
    """Do the same with compiled gradients, or fail where the compiler cannot take all of them as one graph."""
    return _vmap_pcgrad(case, torch.compile(vectorised(case), fullgraph=True, dynamic=False))


def _vmap_pcgrad(case: Case, gradients: Callable[[], list[Tensor]]) -> Run:
    parameters = list(case.model.parameters())
    orders = projecting(case).draw_order(case.num_clusters, case.device)

    def run() -> Rows:
        case.model.zero_grad(set_to_none=True)
        project_by_hand(gradients(), parameters, orders)
        return update(case.model)

    return run


def vectorised(case: Case) -> Callable[[], list[Tensor]]:
    """Return ``vmap(grad(loss))`` over the clusters: every parameter's gradients of all clusters, [K, ...].

    Clusters smaller than the largest are filled up with repetitions of their last sample, which have no weight.
    """
    parameters = {name: p.detach() for name, p in case.model.named_parameters()}
    sample, weight = _filled_up(case)
    tensors = [x[sample] for x in (case.batch.target, *case.batch.inputs)]

    def loss(parameters: dict[str, Tensor], weight: Tensor, target: Tensor, *inputs: Tensor) -> Tensor:
        def model(*args: Tensor, **kwargs: object) -> object:
            return functional_call(case.model, parameters, args, kwargs)

        return case.losses(model, Batch(inputs, target, case.batch.cluster)) @ weight

    per_cluster = vmap(grad(loss), in_dims=(None, 0, *[0] * len(tensors)))

    def gradients() -> list[Tensor]:
        return list(per_cluster(parameters, weight, *tensors).values())

    return gradients


def _filled_up(case: Case) -> tuple[Tensor, Tensor]:
    """Return every cluster's samples and their weights in its mean loss, both [K, size of the largest cluster]."""
    sizes = torch.tensor(case.sizes, device=case.device).unsqueeze(1)
    first, place = sizes.cumsum(0) - sizes, torch.arange(int(sizes.max()), device=case.device)
    weight = (place < sizes) / sizes
    return first + torch.minimum(place, sizes - 1), weight.to(case.batch.target.dtype)


def ours(case: Case, mtl: dm.ClusteredMTL, weighting: Weighting) -> Run:
    """Return the library's step.

    The gate sees the first step only; a weighting that skips its gradients in later ones would be timed as a
    plain step, so every step is checked to have formed them.
    """
    balances_gradients = isinstance(weighting, dm.GramianWeighting)
    weighting = weighting.to(case.device)
    cluster = as_sampled(case.batch.cluster)

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
