"""The ways of doing one training step that balances K clusters: published, by peers, by hand, and ours.

A way ends with the update in ``.grad``, but for the two made by hand: they end with the cluster gradients, so that
nobody's choice of how to balance them counts against them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import diffmtl_fast as dm
from benchmarks.harness import GateError
from benchmarks.models import Case
from benchmarks.reference import Batch, pcgrad_step, plain_step
from diffmtl_fast._extras import require

SEED = 0
COMPILED = "plain, torch.compile"
Rows = Sequence[
    Sequence[Tensor | None]
]  # of gradients, one tensor per parameter; a row is an update or a cluster
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
        prepare: set up what lasts from step to step, and return the step.
        tolerance: largest relative error in float32; a step that adds up its inner products in float32 needs more.
        peer: the work of others, which may be absent or refuse a model.
        detail: of interest at the typical K and batch size alone.
    """

    name: str
    outcome: Outcome
    prepare: Callable[[], Run]
    tolerance: float = 1e-5
    peer: bool = False
    detail: bool = False


def ways(case: Case) -> list[Way]:
    """Return the ways, the plain step first."""
    return [*_of_others(case), *_of_the_library(case)]


def _of_others(case: Case) -> list[Way]:
    projected: Outcome = "pcgrad, torchjd's order"
    rounded = 1e-3
    return [
        Way("plain", "mean", lambda: plain(case)),
        Way(COMPILED, "mean", lambda: plain(case, compiled=True), peer=True, detail=True),
        Way("K backwards, PCGrad", "pcgrad", lambda: k_backwards(case), rounded),
        Way("TorchJD autojac, PCGrad", projected, lambda: autojac(case), rounded, peer=True),
        Way("TorchJD autogram, PCGrad", projected, lambda: autogram(case), rounded, peer=True),
        Way("slices by hand, gradients only", "jacobian", lambda: slices(case)),
        Way("vmap(grad), gradients only", "jacobian", lambda: vmap_of_grad(case), peer=True),
    ]


def _of_the_library(case: Case) -> list[Way]:
    @cache
    def wrapped(engine: EngineName, memory: Memory) -> dm.ClusteredMTL:
        # Shared by the weightings, and with it the memory of the Jacobian.
        return dm.ClusteredMTL(case.model, case.num_clusters, dm.Equal(), engine=engine, memory=memory)

    def step(engine: EngineName, memory: Memory, weighting: Callable[[Case], Weighting]) -> Callable[[], Run]:
        return lambda: ours(case, wrapped(engine, memory), weighting(case))

    found = [
        Way(
            "diffmtl_fast, UncertaintyWeighting",
            "uncertainty",
            step("grouped", "full", uncertainty),
            detail=True,
        )
    ]
    modes: list[tuple[str, EngineName, Memory]] = [
        ("grouped", "grouped", "full"),
        ("sliced", "sliced", "full"),
        ("lean", "grouped", "lean"),
    ]
    for name, engine, memory in modes:
        found += [
            Way(f"diffmtl_fast {name}, PCGrad", "pcgrad", step(engine, memory, projecting)),
            Way(
                f"diffmtl_fast {name}, NashMTL",
                "nash",
                step(engine, memory, bargaining),
                detail=name != "grouped",
            ),
        ]
    return found


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
