"""A step of ClusteredMTL beside one torch.autograd.grad per cluster of the same model in the same condition."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

import diffmtl_fast as dm
from benchmarks.reference import cluster_gradients, update_direction

#: sorted; unsorted, a cluster of one sample; a cluster absent
CLUSTERS = {"sorted": [0, 0, 1, 2, 2, 2], "unsorted": [2, 0, 2, 1, 0, 2], "absent": [0, 2, 2, 0, 2, 2]}
K = 3
#: the ways to form the gradients: arguments of ClusteredMTL
WAYS = {
    "grouped": {"engine": "grouped"},
    "lean": {"engine": "grouped", "memory": "lean"},
    "sliced": {"engine": "sliced"},
}


class Given(dm.weighting.GramianWeighting):
    """Fixed weights, one of them negative, so that no error in a row of J can hide in the direction."""

    def forward(self, gramian: Tensor | None, present: Tensor | None = None) -> Tensor:
        assert gramian is not None
        assert present is not None
        weights = torch.tensor([1.5, -0.7, 0.4, 2.0, -1.1], dtype=gramian.dtype, device=gramian.device)
        return torch.where(present, weights[: len(present)], 0)


def sample_losses(out: Tensor) -> Tensor:
    """Some loss of every sample, [B], with a gradient at every element of the output that no symmetry cancels."""
    rows = out.flatten(1)
    target = torch.cos(torch.arange(rows.numel(), device=out.device) * 1.7).view(rows.shape)
    return (rows.float() if out.dtype.itemsize < 4 else rows).sub(target).square().mean(1)


def assert_exact(
    model: nn.Module,
    *args: object,
    cluster: Sequence[int] | Sequence[Sequence[int]] = (2, 0, 2, 1, 0, 2),
    rtol: float = 1e-9,
    loss_of: Callable[..., Tensor] = sample_losses,
    context: Callable[[], object] = nullcontext,
    wrap: Callable[[dm.ClusteredMTL], nn.Module] = lambda mtl: mtl,
    steps: int = 2,
    options: dict | None = None,
    plain: nn.Module | None = None,
    **kwargs: object,
) -> dm.ClusteredMTL:
    """Take steps with ClusteredMTL and compare outputs, Gramian and ``.grad`` with the reference's.

    Args:
        model: the model; left with the gradients of the last step.
        *args: its arguments.
        cluster: of every sample; or of every sample in every step, one step after the other.
        rtol: of the norm of the difference to the norm of the whole.
        loss_of: output to losses [B].
        context: entered for the forwards, ours and the reference's, such as autocast.
        wrap: what to do to the ClusteredMTL before it is called, such as compiling it.
        steps: how many, with the same clusters; the later ones find everything prepared by the first.
        options: of ClusteredMTL.
        plain: the reference's model, where it is not a copy of the model.
        **kwargs: the model's arguments.
    """
    device = next(model.parameters()).device
    clusters = torch.as_tensor(cluster, device=device)
    clusters = clusters.expand(steps, -1) if clusters.dim() == 1 else clusters
    plain = copy.deepcopy(model) if plain is None else plain
    mtl = dm.ClusteredMTL(model, K, Given(), **(options or {}))
    called = wrap(mtl)
    for step, cluster in enumerate(clusters):
        torch.manual_seed(step)
        with context():
            output = plain(*args, **kwargs)
            losses = loss_of(output)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        trained = [p for p in plain.parameters() if p.requires_grad]
        expected = cluster_gradients(losses, cluster, trained, K)

        torch.manual_seed(step)
        model.zero_grad()
        with context():
            found = loss_of(called(*args, **kwargs, cluster=cluster))
        called.backward(found)

        assert_near(found.detach(), losses.detach(), rtol, "losses")
        assert torch.equal(mtl.last.present, expected.present)
        assert_near(mtl.last.gramian, expected.jacobian @ expected.jacobian.T, 4 * rtol, "Gramian")
        direction = update_direction(expected.jacobian, mtl.last.weights, expected.present)
        parts = direction.split([p.numel() for p in trained])
        own = dict(model.named_parameters())
        scale = direction.norm()
        for name, part in zip(names, parts, strict=True):
            gradient = own[name].grad
            if gradient is None:
                assert not part.any(), f"{name}: expected a gradient, found none"
            else:
                assert gradient.dtype == own[name].dtype
                assert gradient.stride() == own[name].stride() or not own[name].is_contiguous()
                part = part.view_as(own[name])
                assert (gradient - part).norm() <= rtol * (part.norm() + scale / len(parts)), (
                    f"{name}: expected {part}, found {gradient}"
                )
        if mtl.last.grad_norm is not None:
            norm = torch.nn.utils.get_total_norm(
                [p.grad.double() for p in own.values() if p.grad is not None]
            )
            lowest = max(
                torch.finfo(p.dtype).eps for p in trained
            )  # a .grad is measured before it is rounded
            torch.testing.assert_close(mtl.last.grad_norm.double(), norm, rtol=max(lowest, 1e-5), atol=0)
    return mtl


def assert_near(found: Tensor, expected: Tensor, rtol: float, what: str) -> None:
    """Compare in the norm."""
    difference = (found.to(expected.dtype) - expected).norm()
    assert difference <= rtol * expected.norm(), f"{what}: expected {expected}, found {found}"


def in_slices(mtl: dm.ClusteredMTL) -> list[str] | None:
    """Name the modules that the last step ran in slices; None where that was the whole model."""
    grouped = mtl._engine.grouped
    if grouped is None:
        return None
    names = {module: name for name, module in mtl.module.named_modules()}
    return sorted(names[module] for module in grouped.slices.reasons)
