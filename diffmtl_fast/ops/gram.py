"""`gram`: the Gramian of the cluster gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import accumulation_dtype, check_jacobian
from ._layout import as_matrix
from ._library import define_op, register_autograd


def gram_plain(jacobian: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Compute `gram` by its definition."""
    gramian = _fake(jacobian, dtype).zero_()
    for member in jacobian:
        rows = as_matrix(member).to(gramian.dtype)
        gramian += rows @ rows.T
    # A library's product is symmetric only up to rounding; the Gramian is symmetric by definition.
    return (gramian + gramian.T) / 2


def _fake(jacobian: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    return jacobian[0].new_empty([jacobian[0].shape[0]] * 2, dtype=dtype or accumulation_dtype(*jacobian))


_gram = define_op("gram(Tensor[] jacobian, ScalarType? dtype=None) -> Tensor", plain=gram_plain, fake=_fake)


def _setup_context(ctx: Any, inputs: tuple[Sequence[Tensor], torch.dtype | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[0])


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None]:
    factor = grad + grad.T
    by_parts = [(factor @ as_matrix(j).to(grad.dtype)).to(j.dtype).view(j.shape) for j in ctx.saved_tensors]
    return by_parts, None


register_autograd("gram", _backward, _setup_context)


def gram(jacobian: Tensor | Sequence[Tensor], *, dtype: torch.dtype | None = None) -> Tensor:
    """Gramian of the rows of J, G = J Jᵀ.

    Args:
        jacobian: J, [K, P], floating point; row k is the gradient of cluster k. Or J in parts, one tensor [K, ...]
            for every parameter, of any sizes and dtypes: one pass covers all of them.
        dtype: `torch.float64` forms every product and sum in float64, whatever the dtypes of J: of float32 and
            shorter numbers the products are exact then, and none can overflow or vanish. Default: as below.

    Returns:
        G, [K, K], exactly symmetric; in `dtype`. By default in float32, or in float64 where a part of J is, every
        part accumulated in its own dtype and float32 at least.

    Raises:
        TypeError: J is not floating point.
        ValueError: J is not two-dimensional; its parts are none, or differ in K or device; `dtype` is another one.
    """
    if dtype not in (None, torch.float64):
        raise ValueError(f"dtype: expected None or torch.float64, found {dtype}")
    return _gram(check_jacobian(jacobian), dtype)
