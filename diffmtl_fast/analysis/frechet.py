"""The Fréchet distance of two sets of features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class FrechetDistance:
    """Squared Fréchet distances of Gaussians fitted to sets of features, from one fixed set.

    |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a^½ Σ_b Σ_a^½)^½), where the trace of the root is the sum of the roots of
    the eigenvalues of a symmetric matrix: no general matrix root, which singular covariances upset.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017.

    Args:
        features: [N, D], those of the real pictures for example.
    """

    def __init__(self, features: Array) -> None:
        self._mean = features.mean(0)
        self._root = _root(_covariance(features))

    def __call__(self, features: Array) -> float:
        """The distance to another set, [M, D]."""
        covariance = _covariance(features)
        crossed = np.linalg.eigvalsh(self._root @ covariance @ self._root).clip(min=0.0)
        distance = np.square(self._mean - features.mean(0)).sum()
        distance += np.square(self._root).sum() + np.trace(covariance) - 2.0 * np.sqrt(crossed).sum()
        return float(max(distance, 0.0))


def _covariance(features: Array) -> Array:
    return np.atleast_2d(np.cov(features, rowvar=False))


def _root(matrix: Array) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
