"""The compiled kernels behind the ops on CPU tensors: what each is given, and their registration.

Every function has the signature of its op's plain definition and takes what the op's public function has checked.
Where a kernel does not cover an input, that definition is used and the reason is logged once. Kernels run on
PyTorch's threads (`torch.set_num_threads`), and their number changes no bit of a result. Nor does the instruction
set where nothing is added up over elements: of noise, noisy images and the gradients of losses.

The kernels are compiled for several instruction sets and the best one that the processor has is used; the
environment variable ``DIFFMTL_CPU_KERNELS`` (``plain``, ``avx2``, ``avx512``), read at import, chooses another.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .._native import _C
from ._checks import accumulation_dtype, host_offsets
from ._layout import (
    CHANNELS_LAST,
    Result,
    contiguous_clusters,
    dense_rows,
    empty_row,
    in_rows,
    is_dense,
    rows_like,
)
from ._library import register_kernel, run_plain
from .cluster_conv_wgrad import Geometry, empty_result, multiply_by_library
from .nash import CONVERGED, LINE_SEARCH_STEPS, NEWTON_STEPS, ridge_unit
from .philox import is_seed

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Address, dtype and distance between the entries of the first dimension: what a kernel knows of a tensor.
Handle: TypeAlias = tuple[int, int, int]


def _handle(tensor: Tensor) -> Handle:
    return tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.stride(0)


def _optional_handle(tensor: Tensor | None) -> Handle | None:
    return None if tensor is None else _handle(tensor)


def _elements(tensor: Tensor) -> Handle:
    """Return the handle of a tensor or of the noise that a seed stands for."""
    return (tensor.data_ptr(), _C.CPU_SEED, 0) if is_seed(tensor) else _handle(tensor)


def _unsupported(*tensors: Tensor | None) -> str | None:
    """Say which dtype no kernel reads, if any."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in _DTYPES and not is_seed(tensor):
            return f"no CPU kernel for {tensor.dtype}"
    return None


def _uncovered(jacobian: Sequence[Tensor], *others: Tensor) -> str | None:
    """Say why no kernel covers these rows, if so."""
    if reason := _unsupported(*jacobian, *others):
        return reason
    k = jacobian[0].shape[0]
    return None if 1 <= k <= _C.CPU_MAX_ROWS else f"expected 1 to {_C.CPU_MAX_ROWS} rows, found {k}"


def _members(parts: Sequence[Tensor], k: int) -> list[tuple[int, int, int, int]]:
    """Return address, dtype, row stride and columns of every part."""
    return [(rows.data_ptr(), _DTYPES[rows.dtype], rows.stride(0), rows.numel() // k) for rows in parts]


def gram(jacobian: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Run `gram`."""
    k = jacobian[0].shape[0]
    if reason := "expected at least 1 row, found 0" if k == 0 else _unsupported(*jacobian):
        return run_plain("gram", reason, jacobian, dtype)
    gramian = torch.empty(k, k, dtype=dtype or accumulation_dtype(*jacobian))
    parts = [dense_rows(member) for member in jacobian]  # kept while the kernel reads their memory
    kernel = _C.cpu_gram if k <= _C.CPU_MAX_ROWS else _C.cpu_gram_panels
    products = _DTYPES[dtype or torch.float32]  # at least
    kernel(
        _members(parts, k), k, products, gramian.data_ptr(), _DTYPES[gramian.dtype], torch.get_num_threads()
    )
    return gramian


def combine(jacobian: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Run `combine`."""
    if reason := _uncovered(jacobian, weights):
        plain: list[Tensor] = run_plain("combine", reason, jacobian, weights)
        return plain
    out = [empty_row(member) for member in jacobian]
    _write_combination(out, jacobian, weights, [False] * len(out))
    return out


def combine_(
    out: Sequence[Tensor], jacobian: Sequence[Tensor], weights: Tensor, accumulate: Sequence[bool]
) -> Tensor:
    """Run `combine_`."""
    if reason := _uncovered(jacobian, *out, weights):
        return run_plain("combine_", reason, out, jacobian, weights, accumulate)
    dense = [written if is_dense(written) else written.contiguous() for written in out]
    square = _write_combination(dense, jacobian, weights, accumulate)
    for written, computed in zip(out, dense, strict=True):
        if written is not computed:
            written.copy_(computed)
    return torch.tensor(square, dtype=accumulation_dtype(*out, *jacobian))


def _write_combination(
    dense: Sequence[Tensor], jacobian: Sequence[Tensor], weights: Tensor, accumulate: Sequence[bool]
) -> float:
    """Write the weighted sums into dense tensors; return their squared norm."""
    parts = [rows_like(member, written) for member, written in zip(jacobian, dense, strict=True)]
    square: float = _C.cpu_combine(
        [
            (written.data_ptr(), _DTYPES[written.dtype], add)
            for written, add in zip(dense, accumulate, strict=True)
        ],
        _members(parts, weights.shape[0]),
        weights.shape[0],
        _handle(weights),
        torch.get_num_threads(),
    )
    return square


def _sample_is_contiguous(tensor: Tensor) -> bool:
    """Whether the elements of a sample lie in row-major order without gaps; the samples may lie anywhere."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _in_one_order(*tensors: Tensor | None) -> tuple[list[Any], torch.memory_format]:
    """Bring the samples of all tensors into one order in memory, without a copy where they are so already.

    The first one decides; generated noise asks for the row-major order.
    """
    order = torch.contiguous_format
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            break
    else:  # the usual case, found without the generator that costs as much as a kernel's launch
        return list(tensors), order
    present = [t for t in tensors if t is not None]
    given = [t for t in present if not is_seed(t)]
    lead = given[0]
    channels_last = CHANNELS_LAST.get(lead.dim()) if len(given) == len(present) else None
    if channels_last is not None and lead.is_contiguous(memory_format=channels_last):
        order = channels_last

    def arranged(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or is_seed(tensor):
            return tensor
        if order is torch.contiguous_format and _sample_is_contiguous(tensor):
            return tensor
        return tensor.contiguous(memory_format=order)

    return [arranged(t) for t in tensors], order


def _target(first: Tensor, second: Tensor | None, mix: Tensor | None) -> tuple[Handle | None, ...]:
    """Return what a target is formed from: two kinds of elements and their shares."""
    if second is None or mix is None:
        return _elements(first), None, None, None
    share, other = mix.unbind(0)
    return _elements(first), _elements(second), _handle(share), _handle(other)


def sample_loss(
    pred: Tensor,
    first: Tensor,
    second: Tensor | None,
    mix: Tensor | None,
    weight: Tensor | None,
    delta: float | None,
) -> Tensor:
    """Run `sample_loss`."""
    if reason := _unsupported(pred, first, second, mix, weight):
        return run_plain("sample_loss", reason, pred, first, second, mix, weight, delta)
    losses = torch.empty(pred.shape[0], dtype=accumulation_dtype(pred, first))
    (pred, first, second), _ = _in_one_order(pred, first, second)
    _C.cpu_sample_loss(
        _handle(pred),
        *_target(first, second, mix),
        delta,
        pred.shape[0],
        math.prod(pred.shape[1:]),
        _optional_handle(weight),
        losses.data_ptr(),
        torch.get_num_threads(),
    )
    return losses


def _loss_gradients(
    scale: Tensor,
    pred: Tensor,
    first: Tensor,
    second: Tensor | None,
    mix: Tensor | None,
    delta: float | None,
    both: bool,
) -> tuple[Tensor, ...]:
    """Write the gradient by `pred` and, of `both`, that by the target `first`, in one pass."""
    (a, b, c), order = _in_one_order(pred, first, second)
    grads = [Result(leaf, order) for leaf in ((pred, first) if both else (pred,))]
    _C.cpu_sample_loss_backward(
        _handle(scale),
        _handle(a),
        *_target(b, c, mix),
        delta,
        pred.shape[0],
        math.prod(pred.shape[1:]),
        [grad.written.data_ptr() for grad in grads],
        torch.get_num_threads(),
    )
    return tuple([grad.finish() for grad in grads])


def sample_loss_backward(
    scale: Tensor, pred: Tensor, first: Tensor, second: Tensor | None, mix: Tensor | None, delta: float | None
) -> Tensor:
    """Run `sample_loss_backward`."""
    if reason := _unsupported(scale, pred, first, second, mix):
        return run_plain("sample_loss_backward", reason, scale, pred, first, second, mix, delta)
    return _loss_gradients(scale, pred, first, second, mix, delta, both=False)[0]


def sample_mse(pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Run `sample_mse`."""
    return sample_loss(pred, target, None, None, weight, None)


def sample_mse_backward(scale: Tensor, pred: Tensor, target: Tensor) -> Tensor:
    """Run `sample_mse_backward`."""
    return sample_loss_backward(scale, pred, target, None, None, None)


def sample_mse_backward_both(scale: Tensor, pred: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Run `sample_mse_backward_both`."""
    if reason := _unsupported(scale, pred, target):
        plain: tuple[Tensor, ...] = run_plain("sample_mse_backward_both", reason, scale, pred, target)
        return plain
    return _loss_gradients(scale, pred, target, None, None, None, both=True)


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Run `add_noise`."""
    if reason := _unsupported(x0, noise, alpha, sigma):
        return run_plain("add_noise", reason, x0, noise, alpha, sigma)
    (image, drawn), order = _in_one_order(x0, noise)
    noisy = Result(x0, order)
    _C.cpu_add_noise(
        _handle(image),
        _elements(drawn),
        _handle(alpha),
        _handle(sigma),
        x0.shape[0],
        math.prod(x0.shape[1:]),
        noisy.written.data_ptr(),
        torch.get_num_threads(),
    )
    return noisy.finish()


def philox_normal(seed: Tensor, like: Tensor) -> Tensor:
    """Run `philox_normal`."""
    noise = torch.empty(like.shape, dtype=torch.float32)
    _C.cpu_philox_normal(
        _elements(seed), like.shape[0], math.prod(like.shape[1:]), noise.data_ptr(), torch.get_num_threads()
    )
    return noise


def cluster_mse(
    pred: Tensor, target: Tensor, cluster: Tensor, k: int, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run `cluster_mse`."""
    if reason := _unsupported(pred, target, weight):
        return run_plain("cluster_mse", reason, pred, target, cluster, k, weight)
    (pred, target), _ = _in_one_order(pred, target)
    losses = torch.empty(k, dtype=accumulation_dtype(pred, target))
    counts = torch.empty(k, dtype=torch.int64)
    _C.cpu_cluster_mse(
        _handle(pred),
        _handle(target),
        pred.shape[0],
        math.prod(pred.shape[1:]),
        cluster.data_ptr(),
        cluster.stride(0),
        k,
        _optional_handle(weight),
        losses.data_ptr(),
        counts.data_ptr(),
        torch.get_num_threads(),
    )
    return losses, counts


def cluster_mean(values: Tensor, cluster: Tensor, k: int) -> Tensor:
    """Run `cluster_mean`."""
    if reason := _unsupported(values):
        return run_plain("cluster_mean", reason, values, cluster, k)
    means = torch.empty(k, dtype=accumulation_dtype(values))
    _C.cpu_cluster_mean(
        _handle(values), values.shape[0], cluster.data_ptr(), cluster.stride(0), k, means.data_ptr()
    )
    return means


def cluster_mean_backward(grad: Tensor, cluster: Tensor) -> Tensor:
    """Run `cluster_mean_backward`."""
    if reason := _unsupported(grad):
        return run_plain("cluster_mean_backward", reason, grad, cluster)
    by_values = torch.empty(cluster.shape[0], dtype=grad.dtype)
    _C.cpu_cluster_mean_backward(
        _handle(grad),
        grad.shape[0],
        cluster.data_ptr(),
        cluster.stride(0),
        cluster.shape[0],
        by_values.data_ptr(),
    )
    return by_values


def uncertainty_loss(
    pred: Tensor, target: Tensor, cluster: Tensor, log_var: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `uncertainty_loss`."""
    if reason := _unsupported(pred, target, log_var, weight):
        return run_plain("uncertainty_loss", reason, pred, target, cluster, log_var, weight)
    (pred, target), _ = _in_one_order(pred, target)
    dtype = accumulation_dtype(pred, target)
    loss, slope = torch.empty((), dtype=dtype), torch.empty(pred.shape[0], dtype=dtype)
    log_var_grad = torch.empty(log_var.shape, dtype=log_var.dtype)
    _C.cpu_uncertainty_loss(
        _handle(pred),
        _handle(target),
        pred.shape[0],
        math.prod(pred.shape[1:]),
        cluster.data_ptr(),
        cluster.stride(0),
        _handle(log_var),
        log_var.shape[0],
        _optional_handle(weight),
        loss.data_ptr(),
        slope.data_ptr(),
        log_var_grad.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, slope, log_var_grad


def uncertainty_loss_backward(
    grad: Tensor, slope: Tensor, log_var_grad: Tensor, log_var: Tensor, pred: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Run `uncertainty_loss_backward`."""
    return sample_mse_backward(grad * slope, pred, target), grad * log_var_grad


def pcgrad_weights(gramian: Tensor, order: Tensor, present: Tensor) -> Tensor:
    """Run `pcgrad_weights`."""
    if reason := _unsupported(gramian):
        return run_plain("pcgrad_weights", reason, gramian, order, present)
    gramian, order, present = gramian.contiguous(), order.contiguous(), present.contiguous()
    weights = torch.empty(gramian.shape[0], dtype=gramian.dtype)
    _C.cpu_pcgrad_weights(
        _handle(gramian), gramian.shape[0], order.data_ptr(), present.data_ptr(), weights.data_ptr()
    )
    return weights


def nash_weights(gramian: Tensor, present: Tensor) -> Tensor:
    """Run `nash_weights`."""
    if reason := _unsupported(gramian):
        return run_plain("nash_weights", reason, gramian, present)
    gramian, present = gramian.contiguous(), present.contiguous()
    weights = torch.empty(gramian.shape[0], dtype=gramian.dtype)
    _C.cpu_nash_weights(
        _handle(gramian),
        gramian.shape[0],
        ridge_unit(gramian.dtype),
        present.data_ptr(),
        NEWTON_STEPS,
        LINE_SEARCH_STEPS,
        CONVERGED,
        weights.data_ptr(),
    )
    return weights


@functools.cache
def _library_multiplies(dtype: torch.dtype) -> bool:
    """Whether PyTorch has fast products of these numbers on this processor; others are widened to float32."""
    check = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }.get(dtype)
    return check is None or (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, check)())


def _longest_own(dtype: torch.dtype, out_dtype: torch.dtype) -> int:
    """Return up to how many rows a cluster is multiplied faster by our kernel than by PyTorch's library.

    Ours writes the result once and past the caches, which counts where there is little else to do; it multiplies
    everything in float32 at least, where the library may have an instruction for shorter numbers, and does not
    divide the rows into blocks.
    """
    if dtype.itemsize > 2 or not _library_multiplies(dtype):
        return 1024
    return 8 if out_dtype == dtype else 32  # the library's product has yet to be converted


def _multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Put a batch of products into `out`, or add it, with PyTorch's library."""
    if not _library_multiplies(a.dtype):
        a, b = a.float(), b.float()
    if a.dtype != out.dtype:
        product = a @ b
        out.add_(product) if accumulate else out.copy_(product)
    elif accumulate:
        out.baddbmm_(a, b)
    else:
        torch.bmm(a, b, out=out)


def _runs(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Give the runs of clusters of one size: the size and which clusters."""
    first = 0
    for size, run in itertools.groupby(sizes):
        last = first + len(list(run))
        yield size, slice(first, last)
        first = last


def cluster_wgrad_out(grad_out: Tensor, x: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> None:
    """Run `cluster_wgrad_out`."""
    if reason := _unsupported(grad_out, out):
        run_plain("cluster_wgrad_out", reason, grad_out, x, offsets, out, accumulate)
        return
    longest = _longest_own(x.dtype, out.dtype)
    bounds = host_offsets(offsets, x.shape[0])
    sizes = [end - begin for begin, end in pairwise(bounds)]
    with contiguous_clusters(out, accumulate) as (result, add):
        if own := [(k, bounds[k], bounds[k + 1]) for k, size in enumerate(sizes) if size <= longest]:
            rows = in_rows(grad_out), in_rows(x)
            _C.cpu_cluster_wgrad(
                *map(_handle, rows), own, *out.shape[1:], _handle(result), add, torch.get_num_threads()
            )
        for size, run in _runs(sizes):
            if size > longest:
                span = slice(bounds[run.start], bounds[run.stop])
                a, b = (t[span].unflatten(0, (-1, size)) for t in (grad_out, x))
                _multiply(a.transpose(1, 2), b, result[run], add)


def cluster_wgrad(grad_out: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Run `cluster_wgrad`."""
    out = x.new_empty([offsets.shape[0] - 1, grad_out.shape[1], x.shape[1]])
    cluster_wgrad_out(grad_out, x, offsets, out, False)
    return out


# Ways to a convolution's weight gradients: one grouped convolution, our kernel, one convolution per cluster.
_ConvWay: TypeAlias = Literal["groups", "planes", "library"]


def _conv_way(grad_out: Tensor, x: Tensor, sizes: Sequence[int], weight: int) -> _ConvWay:
    """Choose the fastest way, as measured beside oneDNN.

    Its calls take 0.1 ms, and it divides the work by samples: few of them or small images are slow. One call
    serves clusters of one size, unless weights are large or channels few. It has no float64, and may have an
    instruction for shorter numbers.

    Args:
        grad_out: gradient by the output.
        x: input.
        sizes: samples of every cluster.
        weight: number of weights.
    """
    if (
        x.dtype == torch.float64
        or not torch.backends.mkldnn.is_available()
        or not _library_multiplies(x.dtype)
    ):
        return "planes"
    products = grad_out.numel() // grad_out.shape[1] // len(sizes) * weight  # of a cluster
    if (
        len(set(sizes)) == 1
        and sizes[0]
        and weight <= 40_000
        and grad_out.is_contiguous()
        and x.is_contiguous()
    ):
        few_channels = min(grad_out.shape[1], x.shape[1]) < 16
        if products <= (1_000_000 if few_channels else 20_000_000):
            return "groups"
    return "planes" if products <= 5_000_000 else "library"


def _multiply_in_groups(
    grad_out: Tensor, x: Tensor, bounds: Sequence[int], geometry: Geometry, out: Tensor, accumulate: bool
) -> None:
    """Form the gradients of clusters of one size as groups of one convolution, side by side in the channels."""
    num = len(bounds) - 1
    grad_out, x = (t.unflatten(0, (num, -1)).transpose(0, 1).flatten(1, 2) for t in (grad_out, x))
    found = x.new_empty(1, num * out.shape[1], *out.shape[2:])
    wider = geometry._replace(groups=num * geometry.groups)
    multiply_by_library(grad_out, x, [0, x.shape[0]], wider, found, False)
    out.add_(found.view_as(out)) if accumulate else out.copy_(found.view_as(out))


def _multiply_planes(
    grad_out: Tensor, x: Tensor, bounds: Sequence[int], geometry: Geometry, out: Tensor, accumulate: bool
) -> None:
    """Form the gradients of all clusters by our kernel, for three spatial dimensions."""
    dtype = accumulation_dtype(x)
    direct = out.dtype == dtype and out[0].is_contiguous()
    result = out if direct else torch.empty(out.shape, dtype=dtype)
    missing = 5 - x.dim()
    ones, zeros = [1] * missing, [0] * missing
    stride, padding, dilation, groups = geometry
    # Of a dimension with one output the stride means nothing; copies have the stride's residues side by side.
    stride = [step if size > 1 else 1 for step, size in zip(stride, grad_out.shape[2:], strict=True)]
    whole = ([*ones, *out.shape[3:]], [*ones, *stride], [*zeros, *padding], [*ones, *dilation])
    images = _images(grad_out), _images(x)
    _C.cpu_cluster_conv_wgrad(
        *images, bounds, groups, whole, _handle(result), accumulate and direct, torch.get_num_threads()
    )
    if not direct:
        out.add_(result) if accumulate else out.copy_(result)
    torch.autograd.graph.increment_version(out)


def _images(tensor: Tensor) -> tuple[int, int, list[int], list[int]]:
    """Give a tensor to a kernel for three spatial dimensions."""
    missing = 5 - tensor.dim()
    shape, strides = list(tensor.shape), list(tensor.stride())
    shape[2:2], strides[2:2] = [1] * missing, [0] * missing
    return tensor.data_ptr(), _DTYPES[tensor.dtype], shape, strides


_CONV_WAYS: dict[_ConvWay, Callable[..., None]] = {
    "groups": _multiply_in_groups,
    "planes": _multiply_planes,
    "library": multiply_by_library,
}


def cluster_conv_wgrad_out(grad_out: Tensor, x: Tensor, offsets: Tensor, *rest: Any) -> None:
    """Run `cluster_conv_wgrad_out`."""
    *geometry, out, accumulate = rest
    if reason := _unsupported(grad_out, out):
        run_plain("cluster_conv_wgrad_out", reason, grad_out, x, offsets, *rest)
        return
    bounds = host_offsets(offsets, x.shape[0])
    if out.numel():
        sizes = [end - begin for begin, end in pairwise(bounds)]
        multiply = _CONV_WAYS[_conv_way(grad_out, x, sizes, out[0].numel())]
        multiply(grad_out, x, bounds, Geometry(*geometry), out, accumulate)


def cluster_conv_wgrad(
    grad_out: Tensor, x: Tensor, offsets: Tensor, kernel_size: Sequence[int], *geometry: Any
) -> Tensor:
    """Run `cluster_conv_wgrad`."""
    out = empty_result(grad_out, x, offsets, kernel_size, *geometry)
    cluster_conv_wgrad_out(grad_out, x, offsets, *geometry, out, False)
    return out


def cluster_sum_out(values: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> None:
    """Run `cluster_sum_out`."""
    if reason := _unsupported(values, out):
        run_plain("cluster_sum_out", reason, values, offsets, out, accumulate)
        return
    bounds = host_offsets(offsets, values.shape[0])
    values = in_rows(values)
    with contiguous_clusters(out, accumulate) as (result, add):
        _C.cpu_cluster_sum(
            _handle(values), bounds, values.shape[1], _handle(result), add, torch.get_num_threads()
        )


def cluster_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Run `cluster_sum`."""
    out = values.new_empty([offsets.shape[0] - 1, values.shape[1]])
    cluster_sum_out(values, offsets, out, False)
    return out


def group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `group_norm_backward`."""
    if reason := _unsupported(x, mean, rstd, weight):
        return run_plain("group_norm_backward", reason, grad, x, mean, rstd, weight)
    grad, x, mean, rstd = grad.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous()
    samples, channels = x.shape[:2]
    by_x = torch.empty_like(x)
    by_weight, by_bias = (torch.empty(samples, channels, dtype=torch.float64) for _ in range(2))
    if by_weight.numel():
        _C.cpu_group_norm_backward(
            *map(_handle, (grad, x)),
            *((t.data_ptr(), _DTYPES[t.dtype], 1) for t in (mean, rstd)),
            None if weight is None else _handle(weight),
            samples,
            channels,
            math.prod(x.shape[2:]),
            mean.shape[1],
            _handle(by_x),
            by_weight.data_ptr(),
            by_bias.data_ptr(),
            torch.get_num_threads(),
        )
    dtype = accumulation_dtype(x)
    return by_x, by_weight.to(dtype), by_bias.to(dtype)


_KERNELS: tuple[Callable[..., Any], ...] = (
    gram,
    combine,
    combine_,
    sample_loss,
    sample_loss_backward,
    sample_mse,
    sample_mse_backward,
    sample_mse_backward_both,
    add_noise,
    philox_normal,
    cluster_mse,
    cluster_mean,
    cluster_mean_backward,
    cluster_conv_wgrad,
    cluster_conv_wgrad_out,
    cluster_sum,
    cluster_sum_out,
    cluster_wgrad,
    cluster_wgrad_out,
    group_norm_backward,
    uncertainty_loss,
    uncertainty_loss_backward,
    pcgrad_weights,
    nash_weights,
)


def select_instruction_set() -> str:
    """Use the instruction set that ``DIFFMTL_CPU_KERNELS`` names, else the best one, and return its name.

    Raises:
        ValueError: this processor does not have it.
    """
    name: str = _C.cpu_select_kernels(os.environ.get("DIFFMTL_CPU_KERNELS"))
    return name


def register() -> None:
    """Choose the instruction set and register every kernel over its op's plain definition."""
    select_instruction_set()
    for kernel in _KERNELS:
        register_kernel(kernel.__name__, "CPU", kernel)
