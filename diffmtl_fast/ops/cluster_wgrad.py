"""`cluster_wgrad`: the gradient of a linear layer's weight, of every cluster of rows by itself."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from ._checks import (
    accumulation_dtype,
    check_floating,
    check_offsets,
    check_out,
    check_same_device,
    host_offsets,
)
from ._library import call, define_op_with_out, refuse_autograd


def cluster_wgrad_out_plain(
    grad_out: Tensor, x: Tensor, offsets: Tensor, out: Tensor, accumulate: bool
) -> None:
    """Compute `cluster_wgrad` by its definition, into `out`."""
    dtype = accumulation_dtype(grad_out, out)
    bounds = host_offsets(offsets, x.shape[0])
    for row, (begin, end) in zip(out.unbind(), pairwise(bounds), strict=True):
        product = grad_out[begin:end].to(dtype).T @ x[begin:end].to(dtype)
        row.copy_(row + product if accumulate else product)


def _empty(grad_out: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty([offsets.shape[0] - 1, grad_out.shape[1], x.shape[1]])


_cluster_wgrad, _cluster_wgrad_out = define_op_with_out(
    "cluster_wgrad(Tensor grad_out, Tensor x, Tensor offsets", plain=cluster_wgrad_out_plain, empty=_empty
)
refuse_autograd("cluster_wgrad", "it is itself part of a backward pass; detach its inputs")


def cluster_wgrad_unchecked(
    grad_out: Tensor, x: Tensor, offsets: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return `cluster_wgrad` where no gradient is recorded, of arguments known to be as it expects."""
    if out is None:
        return call(_cluster_wgrad, "cluster_wgrad", grad_out, x, offsets)
    call(_cluster_wgrad_out, "cluster_wgrad_out", grad_out, x, offsets, out, False)
    return out


def cluster_wgrad(
    grad_out: Tensor, x: Tensor, offsets: Tensor, *, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """Weight gradient of a linear layer per cluster, W_k = Σ_n grad_out_n ⊗ x_n over the rows n of cluster k.

    Args:
        grad_out: gradient by the layer's output, [N, O], floating point; rows in the order of their clusters.
        x: the layer's input, [N, I], in the same dtype.
        offsets: int64 [K + 1]; cluster k has the rows offsets[k] … offsets[k + 1] − 1, so that offsets[0] = 0 and
            offsets[K] = N. On the CPU or beside the data: what the host knows is checked, and clusters of
            equal size then take one batched product; offsets on an accelerator are never waited for.
        out: [K, O, I], floating point, of any dtype and strides: where to put the result.
        accumulate: add to `out` instead of overwriting it.

    Returns:
        [K, O, I], zeros for an empty cluster; `out`, or a new tensor in the dtype of the inputs. Sums are formed
        in float32 at least, and the same inputs give the same bits. Autocast does not change it. On a CPU that
        multiplies bfloat16 itself, sums over many rows are rounded to it on their way into a wider `out`, as those
        of a linear layer are.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: shapes or devices do not fit, offsets on the CPU do not divide N rows, `out` overlaps itself,
            or `accumulate` without `out`.
        RuntimeError: with `out`, an input requires a gradient; without it, the same when one is computed.
    """
    check_floating(grad_out=grad_out, x=x)
    if grad_out.dtype != x.dtype:
        raise TypeError(f"expected grad_out and x of one dtype, found {grad_out.dtype} and {x.dtype}")
    if grad_out.dim() != 2 or x.dim() != 2 or grad_out.shape[0] != x.shape[0]:
        raise ValueError(
            f"expected grad_out [N, O] and x [N, I], found {list(grad_out.shape)} and {list(x.shape)}"
        )
    check_offsets(offsets, x)
    if out is None:
        check_same_device(grad_out=grad_out, x=x)
        if accumulate:
            raise ValueError("accumulate: expected an out to add to, found none")
        return _cluster_wgrad(grad_out, x, offsets)
    check_out(out, (offsets.shape[0] - 1, grad_out.shape[1], x.shape[1]), grad_out=grad_out, x=x)
    call(_cluster_wgrad_out, "cluster_wgrad_out", grad_out, x, offsets, out, accumulate)
    return out
