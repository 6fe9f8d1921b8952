"""`cluster_sum`: the sum of every cluster's rows."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from ._checks import accumulation_dtype, check_floating, check_offsets, check_out, host_offsets
from ._library import call, define_op_with_out, refuse_autograd


def cluster_sum_out_plain(values: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> None:
    """Compute `cluster_sum` by its definition, into `out`."""
    dtype = accumulation_dtype(values, out)
    for row, (begin, end) in zip(out.unbind(), pairwise(host_offsets(offsets, values.shape[0])), strict=True):
        total = values[begin:end].sum(0, dtype=dtype)
        row.copy_(row + total if accumulate else total)


def _empty(values: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty([offsets.shape[0] - 1, values.shape[1]])


_cluster_sum, _cluster_sum_out = define_op_with_out(
    "cluster_sum(Tensor values, Tensor offsets", plain=cluster_sum_out_plain, empty=_empty
)
refuse_autograd("cluster_sum", "it is itself part of a backward pass; detach its inputs")


def cluster_sum_unchecked(values: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `cluster_sum` where no gradient is recorded, of arguments known to be as it expects."""
    if out is None:
        return call(_cluster_sum, "cluster_sum", values, offsets)
    call(_cluster_sum_out, "cluster_sum_out", values, offsets, out, False)
    return out


def cluster_sum(
    values: Tensor, offsets: Tensor, *, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """Sum of the rows of every cluster: the gradient of a bias, or of a parameter that all samples share.

    Args:
        values: [N, D], floating point; rows in the order of their clusters.
        offsets: int64 [K + 1]; cluster k has the rows offsets[k] … offsets[k + 1] − 1, so that offsets[0] = 0 and
            offsets[K] = N. On the CPU, where they are checked, or beside the values.
        out: [K, D], floating point, of any dtype and strides: where to put the result.
        accumulate: add to `out` instead of overwriting it.

    Returns:
        [K, D], zeros for an empty cluster; `out`, or a new tensor in the dtype of the values. Sums are formed in
        float32 at least, and the same inputs give the same bits.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: shapes or devices do not fit, offsets on the CPU do not divide N rows, `out` overlaps itself,
            or `accumulate` without `out`.
        RuntimeError: with `out`, an input requires a gradient; without it, the same when one is computed.
    """
    check_floating(values=values)
    if values.dim() != 2:
        raise ValueError(f"values: expected shape [N, D], found {list(values.shape)}")
    check_offsets(offsets, values)
    if out is None:
        if accumulate:
            raise ValueError("accumulate: expected an out to add to, found none")
        return _cluster_sum(values, offsets)
    check_out(out, (offsets.shape[0] - 1, values.shape[1]), values=values)
    call(_cluster_sum_out, "cluster_sum_out", values, offsets, out, accumulate)
    return out
