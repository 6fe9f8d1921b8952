"""Random projection of gradients that are too many to keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ELEMENTS = 2**22  # of the intermediate results


class RandomProjection:
    """A linear map S from R^P to R^D that keeps inner products on average.

    The vector is cut into pieces x_c of D elements. Each gets random signs, a Hadamard rotation and random signs
    again, and the results are added up: S x = Σ_c E_c H D_c x_c with H orthonormal, D_c and E_c diagonal. For any
    unit vectors u and v, over the draw of the signs,

        E ⟨S u, S v⟩ = ⟨u, v⟩   and   E (⟨S u, S v⟩ − ⟨u, v⟩)² ≤ (1 + ⟨u, v⟩²) / D ≤ 2 / D.

    The inner products within a piece are exact. Between two pieces c ≠ c', the products of elements of H D_c u_c
    and H D_c' v_c' carry independent signs E_c E_c', so they have mean 0 and do not correlate; each element's
    square is ‖u_c‖² / D on average. Adding up gives Σ_{c<c'} (‖u_c‖² ‖v_c'‖² + ‖u_c'‖² ‖v_c‖² +
    2 ⟨u_c, v_c⟩ ⟨u_c', v_c'⟩) / D, which is at most the bound.

    It takes P bytes of signs twice, and about 2 √D multiplications per element, as products with the two factors
    of H.

    Args:
        width: P.
        dimension: D, a power of two.
        seed: of the signs.
        device: where the rows are.

    Raises:
        ValueError: the dimension is no power of two.
    """

    def __init__(self, width: int, dimension: int, seed: int = 0, device: torch.device | str = "cpu") -> None:
        if dimension < 2 or dimension & (dimension - 1):
            raise ValueError(f"projection: expected a power of two, at least 2, found {dimension}")
        self.width, self.dimension = width, dimension
        pieces = math.ceil(width / dimension)
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices draw the same
        draw = torch.randint(2, (2, pieces, dimension), generator=generator, dtype=torch.int8)
        self.inner, self.outer = (2 * draw - 1).to(device)
        log2 = dimension.bit_length() - 1
        self.factors = [_hadamard(2 ** (log2 // 2)).to(device), _hadamard(2 ** (log2 - log2 // 2)).to(device)]

    def __call__(self, rows: Tensor) -> Tensor:
        """Project every row.

        Args:
            rows: [n, P], floating point.

        Returns:
            [n, D], same dtype.
        """
        count, size = rows.shape[0], self.dimension
        out = rows.new_zeros(count, size)
        step = max(1, _ELEMENTS // (count * size))
        left, right = (factor.to(rows.dtype) for factor in self.factors)
        for first in range(0, len(self.inner), step):
            part = rows[:, first * size : (first + step) * size]
            pieces = min(step, len(self.inner) - first)
            part = torch.nn.functional.pad(part, (0, pieces * size - part.shape[1]))
            part = part.reshape(count, pieces, size) * self.inner[first : first + step]
            part = left @ part.reshape(count, pieces, len(left), len(right)) @ right
            out += torch.einsum(
                "ncd,cd->nd", part.flatten(2), self.outer[first : first + step].to(rows.dtype)
            )
        return out


def cosine_error_bound(dimension: int) -> float:
    """Bound on the root mean square error of the cosine of S u and S v as an estimate of that of u and v.

    For unit vectors let a, b, c = ⟨S u, S v⟩, ‖S u‖², ‖S v‖². By the Cauchy-Schwarz inequality |a| ≤ √(b c), so

        |a / √(b c) − ⟨u, v⟩| ≤ |a − ⟨u, v⟩| + |1 − √(b c)| ≤ |a − ⟨u, v⟩| + max(|b − 1|, |c − 1|),

    and each of the three has a root mean square of at most √(2 / D): together (2 + √2) / √D. To first order the
    errors partly cancel, which leaves about (1 − ⟨u, v⟩²) / √D.

    Args:
        dimension: D.
    """
    return (2.0 + math.sqrt(2.0)) / math.sqrt(dimension)


def _hadamard(size: int) -> Tensor:
    """The orthonormal Hadamard matrix [size, size] of Sylvester's construction, symmetric."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / math.sqrt(size)
