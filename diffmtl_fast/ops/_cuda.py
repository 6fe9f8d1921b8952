"""The Triton kernels behind the ops: how each is launched, and their registration for CUDA (and ROCm) tensors.

Every launcher has the signature of its op's plain definition. Where a kernel does not cover an input, the launcher
hands it to that definition and the reason is logged once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..kernels import clusters as cluster_kernels
from ..kernels import combine as combine_kernels
from ..kernels import gram as gram_kernels
from ..kernels import group_norm as group_norm_kernels
from ..kernels import losses as loss_kernels
from ..kernels import noise as noise_kernels
from ..kernels import settings
from ..kernels import weights as weight_kernels
from ._checks import accumulation_dtype, host_offsets
from ._launches import TRITON_DTYPES, Launch, add_up, plan
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

# What sums are formed in.
_SUM_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _in_one_order(pred: Tensor, *others: Tensor | None) -> tuple[list[Tensor | None], torch.memory_format]:
    """Bring all tensors into one order in memory, without a copy where they are so already.

    Every order used here keeps a sample's elements together, which is all that the kernels ask for; generated
    noise asks for the row-major one.
    """
    order = torch.contiguous_format
    seeds = [t for t in others if t is not None and is_seed(t)]
    channels_last = None if seeds else CHANNELS_LAST.get(pred.dim())
    if (
        channels_last is not None
        and not pred.is_contiguous()
        and pred.is_contiguous(memory_format=channels_last)
    ):
        order = channels_last
    tensors = [t if t is None or is_seed(t) else t.contiguous(memory_format=order) for t in (pred, *others)]
    return tensors, order


def _loss_settings(
    pred: Tensor, first: Tensor, second: Tensor | None, delta: float | None
) -> tuple[int, int, int, dict[str, Any]]:
    """Return batch, elements per sample, programs per sample, and what the kernels are compiled for."""
    size = math.prod(pred.shape[1:])
    block, num_warps = settings.stream_settings(size)
    compiled = {
        "DELTA": delta,
        "MIXED": second is not None,
        "SEEDED": is_seed(first if second is None else second),
        "BLOCK": block,
        "ACCUMULATE": _SUM_DTYPES[accumulation_dtype(pred, first)],
        "num_warps": num_warps,
    }
    return pred.shape[0], size, settings.ceil_div(size, block), compiled


def sample_loss(
    pred: Tensor,
    first: Tensor,
    second: Tensor | None,
    mix: Tensor | None,
    weight: Tensor | None,
    delta: float | None,
) -> Tensor:
    """Launch `sample_loss`: sums per chunk of a sample, then their mean; one chunk needs no second step."""
    batch, size, chunks, compiled = _loss_settings(pred, first, second, delta)
    partial = torch.empty(batch, chunks, dtype=accumulation_dtype(pred, first), device=pred.device)
    if batch == 0:
        return partial.view(0)
    tensors, _ = _in_one_order(pred, first, second)
    mix = None if mix is None else mix.contiguous()
    weight = None if weight is None else weight.contiguous()
    whole = chunks == 1
    loss_kernels._error_sum_kernel[batch * chunks,](
        *tensors, mix, weight if whole else None, partial, batch, size, chunks, WHOLE=whole, **compiled
    )
    if whole:
        return partial.view(batch)
    losses = partial.new_empty(batch)
    loss_kernels._sample_mean_kernel[settings.ceil_div(batch, 128),](
        partial, weight, losses, batch, chunks, size, WEIGHTED=weight is not None, BLOCK=128
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
    batch, size, chunks, compiled = _loss_settings(pred, first, second, delta)
    tensors, order = _in_one_order(pred, first, second)
    grads = [Result(leaf, order) for leaf in ((pred, first) if both else (pred,))]
    if batch == 0:
        return tuple(grad.finish() for grad in grads)
    mix = None if mix is None else mix.contiguous()
    loss_kernels._error_backward_kernel[batch * chunks,](
        scale.contiguous(),
        *tensors,
        mix,
        grads[0].written,
        grads[1].written if both else None,
        batch,
        size,
        chunks,
        **compiled,
    )
    return tuple(grad.finish() for grad in grads)


def sample_loss_backward(
    scale: Tensor, pred: Tensor, first: Tensor, second: Tensor | None, mix: Tensor | None, delta: float | None
) -> Tensor:
    """Launch `sample_loss_backward`."""
    return _loss_gradients(scale, pred, first, second, mix, delta, both=False)[0]


def sample_mse(pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Launch `sample_mse`."""
    return sample_loss(pred, target, None, None, weight, None)


def sample_mse_backward(scale: Tensor, pred: Tensor, target: Tensor) -> Tensor:
    """Launch `sample_mse_backward`."""
    return sample_loss_backward(scale, pred, target, None, None, None)


def sample_mse_backward_both(scale: Tensor, pred: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Launch `sample_mse_backward_both`."""
    return _loss_gradients(scale, pred, target, None, None, None, both=True)


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Launch `add_noise`."""
    tensors, order = _in_one_order(x0, noise)
    noisy = Result(x0, order)
    if x0.numel() == 0:
        return noisy.finish()
    batch, size = x0.shape[0], math.prod(x0.shape[1:])
    block, num_warps = settings.stream_settings(size)
    chunks = settings.ceil_div(size, block)
    noise_kernels._add_noise_kernel[batch * chunks,](
        *tensors,
        alpha.contiguous(),
        sigma.contiguous(),
        noisy.written,
        size,
        chunks,
        SEEDED=is_seed(noise),
        BLOCK=block,
        ACCUMULATE=_SUM_DTYPES[accumulation_dtype(x0)],
        num_warps=num_warps,
    )
    return noisy.finish()


def philox_normal(seed: Tensor, like: Tensor) -> Tensor:
    """Launch `philox_normal`."""
    out = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    if like.numel():
        size = math.prod(like.shape[1:])
        block, num_warps = settings.stream_settings(size)
        chunks = settings.ceil_div(size, block)
        noise_kernels._philox_normal_kernel[like.shape[0] * chunks,](
            seed, out, size, chunks, BLOCK=block, num_warps=num_warps
        )
    return out


def cluster_means(values: Tensor, cluster: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Launch the mean and the size of every cluster."""
    means = torch.empty(k, dtype=accumulation_dtype(values), device=values.device)
    counts = torch.empty(k, dtype=torch.int64, device=values.device)
    batch = values.shape[0]
    loss_kernels._cluster_mean_kernel[k,](
        values.contiguous(), cluster.contiguous(), means, counts, batch, BLOCK=settings.sample_block(batch)
    )
    return means, counts


def cluster_mean(values: Tensor, cluster: Tensor, k: int) -> Tensor:
    """Launch `cluster_mean`."""
    return cluster_means(values, cluster, k)[0]


def cluster_mse(
    pred: Tensor, target: Tensor, cluster: Tensor, k: int, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch `cluster_mse`."""
    return cluster_means(sample_mse(pred, target, weight), cluster, k)


def uncertainty_loss(
    pred: Tensor, target: Tensor, cluster: Tensor, log_var: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `uncertainty_loss`."""
    k, batch = log_var.shape[0], pred.shape[0]
    means, counts = cluster_mse(pred, target, cluster, k, weight)
    loss, slope, log_var_grad = means.new_empty([]), means.new_empty(batch), log_var.new_empty(k)
    loss_kernels._uncertainty_kernel[1,](
        means,
        counts,
        log_var.contiguous(),
        cluster.contiguous(),
        None if weight is None else weight.contiguous(),
        loss,
        slope,
        log_var_grad,
        batch,
        k,
        WEIGHTED=weight is not None,
        TILE=settings.power_of_two(k),
        BLOCK=settings.sample_block(batch),
    )
    return loss, slope, log_var_grad


def uncertainty_loss_backward(
    grad: Tensor, slope: Tensor, log_var_grad: Tensor, log_var: Tensor, pred: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch `uncertainty_loss_backward`."""
    return sample_mse_backward(grad * slope, pred, target), grad * log_var_grad


def _uncovered(jacobian: Sequence[Tensor], *others: Tensor) -> str | None:
    """Say why no kernel covers these rows, if so."""
    for tensor in (*jacobian, *others):
        if tensor.dtype not in TRITON_DTYPES:
            return f"no kernel for {tensor.dtype}"
    k = jacobian[0].shape[0]
    return None if 1 <= k <= settings.MAX_CLUSTERS else f"no kernel for K = {k}"


def gram(jacobian: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Launch `gram`: partial Gramians of blocks of columns, and their sum."""
    k, total = jacobian[0].shape[0], dtype or accumulation_dtype(*jacobian)
    if reason := _uncovered(jacobian):
        return run_plain("gram", reason, jacobian, dtype)
    few = k <= settings.MAX_VECTOR_CLUSTERS
    if total == torch.float64 and not few:
        return run_plain("gram", f"no kernel for K = {k} in {total}", jacobian, dtype)
    parts = [dense_rows(member) for member in jacobian]
    launches = plan(parts, parts, [False] * len(parts))
    partial = [
        _gram_vectors(launch, k, dtype or accumulation_dtype(launch.rows[0]))
        if few
        else _gram_tiles(launch, k)
        for launch in launches
    ]
    return add_up(partial, k, total, jacobian[0].device)


def _gram_vectors(launch: Launch, k: int, dtype: torch.dtype) -> Tensor:
    block, num_warps = settings.gram_settings(k, launch.longest, dtype.itemsize, launch.aligned)
    programs = launch.programs(block)
    partial = torch.empty(k, k, programs, dtype=dtype, device=launch.device)
    gram_kernels._gram_vector_kernel[programs,](
        **launch.arguments(block),
        p_partial=partial,
        K=k,
        BLOCK=block,
        ACCUMULATE=_SUM_DTYPES[dtype],
        num_warps=num_warps,
    )
    return partial


def _gram_tiles(launch: Launch, k: int) -> Tensor:
    block, num_warps = settings.gram_settings(k, launch.longest, 4, launch.aligned)
    run = settings.ceil_div(launch.columns, settings.TILE_PROGRAMS * block)
    programs = launch.programs(run * block)
    partial = torch.empty(k, k, programs, dtype=torch.float32, device=launch.device)
    gram_kernels._gram_tile_kernel[programs,](
        **launch.arguments(run * block),
        p_partial=partial,
        run=run,
        K=k,
        TILE=max(16, settings.power_of_two(k)),
        BLOCK=block,
        PRECISION="ieee" if launch.dtype == torch.float32 else "tf32",
        num_warps=num_warps,
    )
    return partial


def combine(jacobian: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Launch `combine`."""
    if reason := _uncovered(jacobian, weights):
        return run_plain("combine", reason, jacobian, weights)
    out = [empty_row(member) for member in jacobian]
    parts = [rows_like(member, written) for member, written in zip(jacobian, out, strict=True)]
    for launch in plan(parts, out, [False] * len(out)):
        _combine(launch, weights.contiguous())
    return out


def combine_(
    out: Sequence[Tensor], jacobian: Sequence[Tensor], weights: Tensor, accumulate: Sequence[bool]
) -> Tensor:
    """Launch `combine_`: blocks of columns, and the sum of their squared norms."""
    if reason := _uncovered(jacobian, *out, weights):
        return run_plain("combine_", reason, out, jacobian, weights, accumulate)
    dense = [written if is_dense(written) else written.contiguous() for written in out]
    parts = [rows_like(member, written) for member, written in zip(jacobian, dense, strict=True)]
    squares = [_combine(launch, weights.contiguous()) for launch in plan(parts, dense, accumulate)]
    for written, computed in zip(out, dense, strict=True):
        if written is not computed:
            written.copy_(computed)
    return add_up(squares, 1, accumulation_dtype(*out, *jacobian), weights.device).view(())


def _combine(launch: Launch, weights: Tensor) -> Tensor:
    block, num_warps = settings.stream_settings(launch.longest)
    dtype, programs = accumulation_dtype(launch.rows[0], launch.outputs[0]), launch.programs(block)
    squares = torch.empty(1, 1, programs, dtype=dtype, device=launch.device)
    combine_kernels._combine_kernel[programs,](
        **launch.arguments(block),
        p_weight=weights,
        p_out=launch.outputs[0],
        p_square=squares,
        K=weights.shape[0],
        BLOCK=block,
        ACCUMULATE=_SUM_DTYPES[dtype],
        OUT_DTYPE=TRITON_DTYPES[launch.out_dtype],
        ADD=any(add for *_, add in launch.records),
        num_warps=num_warps,
    )
    return squares


def _add_shares(parts: Tensor, out: Tensor, accumulate: bool) -> None:
    """Add up what the shares of every cluster have given, [shares, K, ...]."""
    size = out[0].numel()
    block, num_warps = settings.stream_settings(size)
    cluster_kernels._add_shares_kernel[settings.ceil_div(size, block), out.shape[0]](
        parts, out, parts.shape[0], size, out.stride(0), ADD=accumulate, BLOCK=block, num_warps=num_warps
    )


def _launch_in_shares(kernel: Callable[..., None], shares: int, out: Tensor, accumulate: bool) -> None:
    """Call `kernel(result, distance between clusters, distance between shares, whether to add to the result)`."""
    if shares == 1:
        kernel(out, out.stride(0), 0, accumulate)
        return
    parts = torch.empty(shares, *out.shape, dtype=accumulation_dtype(out), device=out.device)
    kernel(parts, parts.stride(1), parts.stride(0), False)
    _add_shares(parts, out, accumulate)


def _device_offsets(offsets: Tensor, rows: Tensor) -> Tensor:
    """Check offsets that the host knows, and bring them to the device without waiting for it."""
    if offsets.device.type == "cpu":
        host_offsets(offsets, rows.shape[0])
    return offsets.to(rows.device, non_blocking=True).contiguous()


def cluster_sum_out(values: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> None:
    """Launch `cluster_sum_out`."""
    bounds = _device_offsets(offsets, values)
    if out.numel() == 0:
        return
    values, (k, size) = in_rows(values), out.shape
    rows, block, shares, num_warps = settings.cluster_sum_settings(k, values.shape[0], size)

    def launch(result: Tensor, stride_cluster: int, stride_share: int, add: bool) -> None:
        cluster_kernels._cluster_sum_kernel[settings.ceil_div(size, block), k, shares](
            values,
            bounds,
            result,
            values.shape[0],
            size,
            values.stride(0),
            stride_cluster,
            stride_share,
            ADD=add,
            ACCUMULATE=_SUM_DTYPES[accumulation_dtype(values)],
            ROWS=rows,
            BLOCK=block,
            num_warps=num_warps,
        )

    with contiguous_clusters(out, accumulate) as (result, add):
        _launch_in_shares(launch, shares, result, add)


def cluster_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Launch `cluster_sum`."""
    out = values.new_empty([offsets.shape[0] - 1, values.shape[1]])
    cluster_sum_out(values, offsets, out, False)
    return out


def _batched(x: Tensor, offsets: Tensor, out: Tensor) -> bool:
    """Whether one product of the BLAS library gives the weight gradients: it is faster than a kernel of ours.

    The host must know that the clusters have equal sizes, and the library must write the dtype of `out`.
    """
    if not (x.is_cuda and offsets.device.type == "cpu") or x.shape[0] == 0:
        return False
    sizes = set(offsets.diff().tolist())
    written = {x.dtype}
    if torch.version.hip is None and x.dtype in (torch.bfloat16, torch.float16):
        written.add(torch.float32)
    return len(sizes) == 1 and out.dtype in written


def _batched_wgrad(grad_out: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> None:
    """Multiply clusters of one size, with the precision that PyTorch's settings give to any linear layer."""
    left, right = (rows.unflatten(0, (out.shape[0], -1)) for rows in (grad_out, x))
    dtype: dict[str, Any] = {} if out.dtype == x.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.baddbmm(out, left.transpose(1, 2), right, **dtype, out=out)
    else:
        torch.bmm(left.transpose(1, 2), right, **dtype, out=out)


def cluster_wgrad_out(grad_out: Tensor, x: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> None:
    """Launch `cluster_wgrad_out`."""
    bounds = _device_offsets(offsets, x)
    if out.numel() == 0:
        return
    if _batched(x, offsets, out):
        _batched_wgrad(grad_out, x, out, accumulate)
        return
    grad_out, x, (k, outputs, inputs) = in_rows(grad_out), in_rows(x), out.shape
    chosen = settings.wgrad_settings(k, x.shape[0], outputs, inputs, x.element_size())
    tiles = settings.ceil_div(outputs, chosen.outputs) * settings.ceil_div(inputs, chosen.inputs)
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"

    def launch(result: Tensor, stride_cluster: int, stride_share: int, add: bool) -> None:
        cluster_kernels._cluster_wgrad_kernel[tiles, k, chosen.shares](
            grad_out,
            x,
            bounds,
            result,
            x.shape[0],
            outputs,
            inputs,
            grad_out.stride(0),
            x.stride(0),
            stride_cluster,
            stride_share,
            ADD=add,
            PRECISION="tf32" if tf32 else "ieee",
            ACCUMULATE=_SUM_DTYPES[accumulation_dtype(x)],
            BLOCK_N=chosen.rows,
            BLOCK_O=chosen.outputs,
            BLOCK_I=chosen.inputs,
            num_warps=chosen.num_warps,
        )

    with contiguous_clusters(out, accumulate) as (result, add):
        _launch_in_shares(launch, chosen.shares, result, add)


def cluster_conv_wgrad_out(grad_out: Tensor, x: Tensor, offsets: Tensor, *rest: Any) -> None:
    """Run `cluster_conv_wgrad_out` by the library's convolutions, in the dtype of the inputs."""
    *geometry, out, accumulate = rest
    bounds = host_offsets(offsets, x.shape[0])
    multiply_by_library(grad_out, x, bounds, Geometry(*geometry), out, accumulate)


def cluster_conv_wgrad(
    grad_out: Tensor, x: Tensor, offsets: Tensor, kernel_size: Sequence[int], *geometry: Any
) -> Tensor:
    """Run `cluster_conv_wgrad` by the library's convolutions, in the dtype of the inputs."""
    out = empty_result(grad_out, x, offsets, kernel_size, *geometry)
    cluster_conv_wgrad_out(grad_out, x, offsets, *geometry, out, False)
    return out


def cluster_wgrad(grad_out: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Launch `cluster_wgrad`."""
    out = x.new_empty([offsets.shape[0] - 1, grad_out.shape[1], x.shape[1]])
    cluster_wgrad_out(grad_out, x, offsets, out, False)
    return out


def group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `group_norm_backward`."""
    dtypes = {tensor.dtype for tensor in (x, mean, rstd, weight) if tensor is not None}
    uncovered = [dtype for dtype in dtypes if dtype not in TRITON_DTYPES]
    if x.dtype == torch.float64 or uncovered:  # the kernel adds up in float32
        reason = f"no kernel for {(uncovered or [x.dtype])[0]}"
        return run_plain("group_norm_backward", reason, grad, x, mean, rstd, weight)
    (samples, channels), size, groups = x.shape[:2], math.prod(x.shape[2:]), mean.shape[1]
    by_x = x.new_empty(x.shape)
    by_weight, by_bias = (x.new_empty(samples, channels, dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return by_x, by_weight.zero_(), by_bias.zero_()
    rows, block, num_warps = settings.group_norm_settings(channels // groups, size)
    group_norm_kernels._group_norm_backward_kernel[samples * groups,](
        grad.contiguous(),
        x.contiguous(),
        mean.contiguous(),
        rstd.contiguous(),
        None if weight is None else weight.contiguous(),
        by_x,
        by_weight,
        by_bias,
        groups,
        channels // groups,
        size,
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
    )
    return by_x, by_weight, by_bias


def pcgrad_weights(gramian: Tensor, order: Tensor, present: Tensor) -> Tensor:
    """Launch `pcgrad_weights`."""
    k = gramian.shape[0]
    if k > settings.MAX_CLUSTERS:
        return run_plain("pcgrad_weights", f"no kernel for K = {k}", gramian, order, present)
    weights = gramian.new_empty(k)
    tile, num_warps = settings.weight_settings(k)
    weight_kernels._pcgrad_kernel[1,](
        gramian.contiguous(),
        order.contiguous(),
        present.contiguous(),
        weights,
        K=k,
        TILE=tile,
        num_warps=num_warps,
    )
    return weights


def nash_weights(gramian: Tensor, present: Tensor) -> Tensor:
    """Launch `nash_weights`."""
    k = gramian.shape[0]
    float64 = gramian.dtype == torch.float64
    if k > (settings.MAX_FLOAT64_NASH_CLUSTERS if float64 else settings.MAX_CLUSTERS):
        return run_plain("nash_weights", f"no kernel for K = {k} in {gramian.dtype}", gramian, present)
    weights = gramian.new_empty(k)
    tile, num_warps = settings.weight_settings(k, settings.NASH_WARPS)
    weight_kernels._nash_kernel[1,](
        gramian.contiguous(),
        present.contiguous(),
        weights,
        DELTA=ridge_unit(gramian.dtype),
        CONVERGED=CONVERGED,
        K=k,
        TILE=tile,
        NEWTON_STEPS=NEWTON_STEPS,
        LINE_SEARCH_STEPS=LINE_SEARCH_STEPS,
        num_warps=num_warps,
    )
    return weights


LAUNCHERS: dict[str, Any] = {
    launcher.__name__: launcher
    for launcher in (
        add_noise,
        cluster_conv_wgrad,
        cluster_conv_wgrad_out,
        cluster_mean,
        cluster_mse,
        cluster_sum,
        cluster_sum_out,
        cluster_wgrad,
        cluster_wgrad_out,
        combine,
        combine_,
        gram,
        group_norm_backward,
        nash_weights,
        pcgrad_weights,
        philox_normal,
        sample_loss,
        sample_loss_backward,
        sample_mse,
        sample_mse_backward,
        sample_mse_backward_both,
        uncertainty_loss,
        uncertainty_loss_backward,
    )
}


def register() -> None:
    """Use the kernels for CUDA tensors (ROCm's too, which PyTorch files under the same key)."""
    for name, launcher in LAUNCHERS.items():
        register_kernel(name, "CUDA", launcher)
