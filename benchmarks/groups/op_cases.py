"""Every op beside the PyTorch functions that it replaces, and the bytes that such work must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.harness import Candidate, relative_error
from benchmarks.names import GRAM, OURS
from diffmtl_fast import ops

K = 5
# Results are formed from the inputs as they are rounded; what remains is the rounding of sums and of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
# PyTorch may round in between and add up in the type of the inputs; inner products of millions of float32 numbers,
# added up in float32, are known to two digits.
PLAIN_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
LONG_SUMS = 2e-2
Function: TypeAlias = Callable[..., Any]
Bound: TypeAlias = Literal["read", "copy"]


class Sizes(NamedTuple):
    """Shapes of a run: of a batch, parameters of the model, rows and columns of a layer's output, its image."""

    small: tuple[int, ...]
    large: tuple[int, ...]
    parameters: int
    rows: int
    columns: int
    image: tuple[int, ...]


TINY = Sizes((10, 4), (10, 4), 64, 20, 8, (4, 8, 2, 2))
QUICK = Sizes((6, 2, 2, 2), (10, 2, 3, 2), 1003, 20, 6, (3, 8, 5, 3))
# Images of a small UNet's inner levels: convolutions of which a call takes longer than its arithmetic.
SMALL_IMAGES = (50, 32, 8, 8)
# 64 MiB and 512 MiB of float32 each: more than the caches hold, and on a GPU long enough to hide the launch.
FULL = {
    "cpu": Sizes((256, 4, 32, 32), (4096, 4, 32, 32), 33_000_000, 16_384, 1024, (128, 128, 32, 32)),
    "cuda": Sizes((256, 4, 32, 32), (32_768, 4, 32, 32), 33_000_000, 131_072, 1024, (256, 512, 32, 32)),
}
# The gradients of a transformer: matrices, and vectors that are not worth a launch each.
PARAMETER_SIZES = (2_359_296, 768, 589_824, 768, 1_769_472, 2304)


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        op: name of the op, with what distinguishes the case.
        inputs: arguments of `fused` and `plain`; if one requires a gradient, the case is forward and backward.
        fused: the op.
        plain: what one writes without it.
        moved: bytes of the inputs, once for each pass over more than the caches hold, and of the results.
        bound: which speed of the memory limits it; None where that is not the limit.
        exact: the definition, where `plain` is something else; it is given the inputs in float64.
        compiles: whether `plain` is something for torch.compile.
        tolerance: largest relative error of the op; that of its dtype by default.
        plain_tolerance: of `plain`, compiled or not; that of its dtype by default, infinite if its result cannot
            be known, as of noise that it draws itself.
    """

    op: str
    inputs: tuple[Any, ...]
    fused: Function
    plain: Function
    moved: int = 0
    bound: Bound | None = None
    exact: Function | None = None
    compiles: bool = True
    tolerance: float | None = None
    plain_tolerance: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the first floating-point input."""
        return next(t.dtype for t in _tensors(self.inputs) if t.is_floating_point())

    @property
    def shape(self) -> list[int]:
        """That of the first input; of a Jacobian in parts, as of one."""
        first = self.inputs[0]
        if isinstance(first, Tensor):
            return list(first.shape)
        return [first[0].shape[0], sum(part[0].numel() for part in first)]

    @property
    def name(self) -> str:
        """Title of its table."""
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    def candidate(self, way: str, function: Function, tolerance: float, peer: bool = False) -> Candidate:
        """Return the function, applied to the inputs, as a way to be timed; an infinite tolerance is no gate."""

        def run() -> Any:
            return _run(function, self.inputs)

        if tolerance == float("inf"):
            return Candidate(way, run, peer=peer)
        return Candidate(way, run, lambda: _error(run(), self._expected), tolerance, peer)

    def fused_candidate(self) -> Candidate:
        """Return the op behind its gate."""
        tolerance = TOLERANCE[self.dtype] if self.tolerance is None else self.tolerance
        return self.candidate(OURS, self.fused, tolerance)

    def plain_candidate(self, way: str, function: Function) -> Candidate:
        """Return the plain composition, or what a compiler made of it; left out where it is wrong."""
        tolerance = PLAIN_TOLERANCE[self.dtype] if self.plain_tolerance is None else self.plain_tolerance
        return self.candidate(way, function, tolerance, peer=True)

    @cached_property
    def _expected(self) -> list[Tensor]:
        def doubled(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            return tensor.detach().double().requires_grad_(tensor.requires_grad)

        exact = tree_map_only(Tensor, doubled, self.inputs)
        return [t.detach() for t in _tensors(_run(self.exact or self.plain, exact))]


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _run(function: Function, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    output = function(*inputs)
    leaves = [t for t in _tensors(inputs) if t.requires_grad]
    if not leaves:
        return (output,)
    return output, *torch.autograd.grad(output, leaves, torch.ones_like(output))


def _error(found: Any, expected: list[Tensor]) -> float:
    return max(relative_error(f.detach(), e) for f, e in zip(_tensors(found), expected, strict=True))


def _bytes(*values: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(values))


# ---- What one writes without the ops ------------------------------------------------------------------------


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor as training scripts give it to a loss: what bfloat16 counts ends at 256."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def sample_mse(pred: Tensor, target: Tensor) -> Tensor:
    return (_wide(pred) - _wide(target)).square().flatten(1).mean(1)


def sample_huber(pred: Tensor, target: Tensor) -> Tensor:
    losses = torch.nn.functional.huber_loss(_wide(pred), _wide(target), reduction="none")
    return losses.flatten(1).mean(1)


def cluster_mse(pred: Tensor, target: Tensor, cluster: Tensor) -> Tensor:
    losses = sample_mse(pred, target)
    zeros = losses.new_zeros(K)
    sums, counts = zeros.index_add(0, cluster, losses), zeros.index_add(0, cluster, torch.ones_like(losses))
    return sums / counts.clamp(min=1)


def uncertainty_loss(pred: Tensor, target: Tensor, cluster: Tensor, log_var: Tensor) -> Tensor:
    return (0.5 * (torch.exp(-log_var) * cluster_mse(pred, target, cluster) / K + log_var)).sum()


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def v_loss(pred: Tensor, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return sample_mse(pred, _column(alpha, x0) * noise - _column(sigma, x0) * x0)


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return _column(alpha, x0) * x0 + _column(sigma, x0) * noise


def draw_and_add_noise(x0: Tensor, seed: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return add_noise(x0, torch.randn_like(x0), alpha, sigma)


def gram(jacobian: Tensor) -> Tensor:
    return jacobian @ jacobian.T


def combine(jacobian: Tensor, weights: Tensor) -> Tensor:
    return weights.to(jacobian.dtype) @ jacobian


def gram_of_parts(parts: list[Tensor]) -> Tensor:
    return sum((gram(part) for part in parts), torch.zeros([], device=parts[0].device))


def combine_into(parts: list[Tensor], grads: list[Tensor], weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(combine(part, weights))
    return torch.stack(torch._foreach_norm(grads)).square().sum(), grads


def cluster_sum(values: Tensor, offsets: Tensor) -> Tensor:
    return torch.stack([values[begin:end].sum(0) for begin, end in pairwise(offsets.tolist())])


def cluster_wgrad(grad_out: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return torch.stack([grad_out[begin:end].T @ x[begin:end] for begin, end in pairwise(offsets.tolist())])


def cluster_conv_wgrad(grad_out: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    shape = (grad_out.shape[1], x.shape[1], 3, 3)
    return torch.stack(
        [
            conv2d_weight(x[begin:end], shape, grad_out[begin:end], padding=1)
            for begin, end in pairwise(offsets.tolist())
        ]
    )


def group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own gradient by x; its parameters' gradients are sums over samples, formed here before that."""
    (samples, channels), size, groups = x.shape[:2], x[0, 0].numel(), mean.shape[1]
    by_x, _, _ = torch.ops.aten.native_group_norm_backward(
        grad, x, mean, rstd, weight, samples, channels, size, groups, [True, False, False]
    )
    slope, values = _wide(grad).flatten(2), _wide(x).flatten(2)
    by_bias = slope.sum(2)
    centre, scale = (t.repeat_interleave(channels // groups, 1) for t in (mean, rstd))
    return by_x, ((slope * values).sum(2) - centre * by_bias) * scale, by_bias


# ---- Cases --------------------------------------------------------------------------------------------------


def loss_cases(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Losses of a batch, forward and backward, and the forward process."""
    pred, x0, noise = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    alpha, sigma = torch.rand(2, shape[0], device=device)
    cluster = torch.arange(shape[0], device=device) % K
    leaf, log_var = pred.clone().requires_grad_(), torch.linspace(-1, 1, K, device=device).requires_grad_()
    seed = torch.tensor(3, device=device)
    one, pair = _bytes(pred), _bytes(pred, x0)
    both = 2 * pair + one  # two passes over the inputs, one gradient

    yield Case("sample_mse, forward", (pred, x0), ops.sample_mse, sample_mse, pair, "read")
    yield Case("sample_mse", (leaf, x0), ops.sample_mse, sample_mse, both, "copy")
    yield Case("sample_huber", (leaf, x0), ops.sample_huber, sample_huber, both, "copy")

    def fused_cluster_mse(pred: Tensor, target: Tensor, cluster: Tensor) -> Tensor:
        return ops.cluster_mse(pred, target, cluster, K)

    yield Case("cluster_mse", (leaf, x0, cluster), fused_cluster_mse, cluster_mse, both, "copy")
    inputs: tuple[Any, ...] = (leaf, x0, cluster, log_var)
    yield Case("uncertainty_loss", inputs, ops.uncertainty_loss, uncertainty_loss, both, "copy")

    def fused_v_loss(pred: Tensor, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return ops.denoising_loss(pred, x0, noise, prediction="v", alpha=alpha, sigma=sigma)

    inputs = (leaf, x0, noise, alpha, sigma)
    yield Case("denoising_loss v", inputs, fused_v_loss, v_loss, both + 2 * one, "copy")
    inputs = (x0, noise, alpha, sigma)
    yield Case("add_noise", inputs, ops.add_noise, add_noise, pair + one, "copy")
    exact = ops.PLAIN["add_noise"]
    inputs = (x0, seed, alpha, sigma)
    # Compiled or not, the composition draws noise of its own: nothing to hold it to.
    yield Case(
        "add_noise, seed",
        inputs,
        ops.add_noise,
        draw_and_add_noise,
        2 * one,
        "copy",
        exact,
        compiles=False,
        plain_tolerance=float("inf"),
    )


def jacobian_cases(parameters: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """From the Jacobian to the direction, whole and in parts."""
    jacobian = torch.randn(K, parameters, device=device).to(dtype)
    weights = torch.rand(K, device=device)
    once = _bytes(jacobian)
    row = once // K

    long = max(LONG_SUMS, PLAIN_TOLERANCE[dtype])

    yield Case(GRAM, (jacobian,), ops.gram, gram, once, "read", plain_tolerance=long)
    yield Case("combine", (jacobian, weights), ops.combine, combine, once + row, "copy")
    parts = list(jacobian.split(_split(parameters), dim=1))
    parts = [part.contiguous() for part in parts]
    grads = [torch.empty_like(part[0]) for part in parts]

    def fused_combine_into(
        parts: list[Tensor], grads: list[Tensor], weights: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        return ops.combine_(grads, parts, weights), grads

    yield Case(
        "gram of parts",
        (parts,),
        ops.gram,
        gram_of_parts,
        once,
        "read",
        compiles=False,
        plain_tolerance=long,
    )
    yield Case(
        "combine_ into .grad",
        (parts, grads, weights),
        fused_combine_into,
        combine_into,
        once + row,
        "copy",
        compiles=False,
    )


def _split(parameters: int) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < parameters:
        size = PARAMETER_SIZES[len(sizes) % len(PARAMETER_SIZES)]
        sizes.append(min(size, parameters - sum(sizes)))
    return sizes


def layer_cases(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Gradients of a layer's bias and weight, per cluster of rows."""
    x, grad_out = (torch.randn(rows, columns, device=device).to(dtype) for _ in range(2))
    equal = torch.arange(K + 1) * (rows // K)
    equal[-1] = rows
    unequal = torch.tensor([0, rows // 16, rows // 8, rows // 2, rows // 2 + 1, rows])
    moved = _bytes(x)
    yield Case("cluster_sum", (x, equal), ops.cluster_sum, cluster_sum, moved, "read", compiles=False)
    # Limited by arithmetic: compared with the products one by one.
    quarter = slice(0, rows // 4)
    for kind, offsets in (("equal", equal // 4), ("unequal", unequal // 4)):
        inputs = (grad_out[quarter], x[quarter], offsets)
        yield Case(f"cluster_wgrad, {kind}", inputs, ops.cluster_wgrad, cluster_wgrad, compiles=False)


def conv_cases(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Gradients of a 3 x 3 convolution's weight, with as many outputs as inputs, of clusters of unequal sizes."""
    x, grad_out = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    samples = shape[0]
    offsets = torch.tensor([0, samples // 8, samples // 4, samples // 2, samples // 2 + 1, samples])

    def fused(grad_out: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
        return ops.cluster_conv_wgrad(grad_out, x, offsets, 3, padding=1)

    yield Case("cluster_conv_wgrad", (grad_out, x, offsets), fused, cluster_conv_wgrad, compiles=False)


def norm_cases(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Backward of a normalisation, with the parameters' gradients of every sample."""
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    rows = x.float().view(shape[0], min(32, shape[1] // 2), -1)  # of the groups: 32, as in most models
    mean, rstd = rows.mean(2), (rows.var(2, correction=0) + 1e-5).rsqrt()
    inputs = (grad, x, mean, rstd, torch.randn(shape[1], device=device))
    moved = _bytes(grad, x) + _bytes(x)  # a group is read twice, the second time from the caches
    exact = ops.PLAIN["group_norm_backward"]
    yield Case(
        "group_norm_backward", inputs, ops.group_norm_backward, group_norm_backward, moved, "copy", exact
    )
