"""`gram`: the Gramian of the cluster gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._checks import accumulation_dtype, check_jacobian
from ._layout import as_matrix
from ._library import define_op, register_autograd


def gram_plain(jacobian: Sequence[Tensor]) -> Tensor:
    """Compute `gram` by its definition."""
    gramian = _fake(jacobian).zero_()
    for member in jacobian:
        rows = as_matrix(member).to(gramian.dtype)
        gramian += rows @ rows.T
    # A library's product is symmetric only up to rounding; the Gramian is symmetric by definition.
    return (gramian + gramian.T) / 2


def _fake(jacobian: Sequence[Tensor]) -> Tensor:
    return jacobian[0].new_empty([jacobian[0].shape[0]] * 2, dtype=accumulation_dtype(*jacobian))


_gram = define_op("gram(Tensor[] jacobian) -> Tensor", plain=gram_plain, fake=_fake)


def _setup_context(ctx: Any, inputs: tuple[Sequence[Tensor]], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[0])


def _backward(ctx: Any, grad: Tensor) -> list[Tensor]:
    factor = grad + grad.T
    return [(factor @ as_matrix(j).to(grad.dtype)).to(j.dtype).view(j.shape) for j in ctx.saved_tensors]


register_autograd("gram", _backward, _setup_context)


def gram(jacobian: Tensor | Sequence[Tensor]) -> Tensor:
    """Gramian of the rows of J, G = J Jᵀ.

    Args:
        jacobian: J, [K, P], floating point; row k is the gradient of cluster k. Or J in parts, one tensor [K, ...]
            for every parameter, of any sizes and dtypes: one pass covers all of them.

    Returns:
        G, [K, K], exactly symmetric; in float32, or in float64 where a part of J is. Every part is accumulated in
        its own dtype and float32 at least.

    Raises:
        TypeError: J is not floating point.
        ValueError: J is not two-dimensional; its parts are none, or differ in K or device.
    """
    return _gram(check_jacobian(jacobian))
