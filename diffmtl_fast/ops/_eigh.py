"""Eigenvalues of a Gramian, which on a GPU no host has to wait for."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define_op, refuse_autograd


def _plain(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors.contiguous()  # LAPACK writes columns


_eigh = define_op(
    "eigh(Tensor matrix) -> (Tensor, Tensor)",
    plain=_plain,
    fake=lambda matrix: (matrix.new_empty(matrix.shape[:1]), matrix.new_empty(matrix.shape)),
)
refuse_autograd("eigh", "weights are constants of the update; detach the Gramian")


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues of a symmetric matrix, [K] in ascending order, and eigenvectors, columns of [K, K].

    As `torch.linalg.eigh`, which reads on the host whether the method converged; its kernel for GPUs, for K up to
    64, does not.

    Args:
        matrix: float64 [K, K], symmetric and finite.
    """
    values, vectors = _eigh(matrix)
    return values, vectors
