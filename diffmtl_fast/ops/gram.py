"""`gram`: the Gramian of the cluster gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._host import on_host
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
            shorter numbers the products are exact then, and none can overflow or vanish. (More than 8 rows of
            float32 on a GPU are multiplied in float32 after a power of two has scaled each: none overflows or
            vanishes there either.) Default: as below.

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


# Between these the squared norm of a row, formed in float32, has lost nothing that counts.
_LEAST_SQUARE, _MOST_SQUARE = 2.0**-90, 2.0**126


def gram_at_any_scale(jacobian: Sequence[Tensor]) -> Tensor:
    """Gramian of the rows of J in float64, in which no scale of J can overflow or vanish.

    On the CPU float32 products do where they are in range, which costs a look at K numbers. An accelerator cannot
    look without being waited for, and forms `gram` in float64.

    Args:
        jacobian: J in parts; see `gram`.

    Returns:
        G, float64 [K, K], exactly symmetric, with the rounding of J's own dtypes, float32 at least.
    """
    if on_host(jacobian[0]):
        found = gram(jacobian).double()
        squares = found.diagonal()
        for k in (~((squares > _LEAST_SQUARE) & (squares < _MOST_SQUARE))).nonzero().flatten().tolist():
            if squares[k] != 0 or any(
                bool(torch.linalg.vector_norm(part[k], math.inf) != 0) for part in jacobian if part.numel()
            ):
                break
        else:
            return found
    return gram(jacobian, dtype=torch.float64)
