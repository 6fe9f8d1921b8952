"""Costs of an interval of timesteps, for :func:`cluster_intervals` and :func:`cluster_path`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from torch import Tensor

from .._native import _C
from .user_cost import compile_rows, sample_quadrangle_inequality

Values: TypeAlias = "np.ndarray | Tensor | Sequence[float]"
Solutions: TypeAlias = "list[tuple[np.ndarray, float]]"


@runtime_checkable
class Cost(Protocol):
    """A cost that the solvers know how to minimise."""

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps T."""

    def solve(
        self, first_k: int, last_k: int, min_size: int, max_size: int, solver: str, threads: int
    ) -> Solutions:
        """Optimal boundaries and cost for every k in first_k … last_k."""


@dataclass(frozen=True, eq=False)
class AbsoluteDeviation:
    """Σ |x(t) − x(t_c)|, t_c the middle timestep, index ⌊(l + r + 1) / 2⌋ in l … r: the L1 cost.

    x is monotone, so the middle is a median. Costs of this form, min over a centre c of Σ g(|x − c|) with a
    non-decreasing g, satisfy the quadrangle inequality w(a, c) + w(b, d) ≤ w(a, d) + w(b, c) for half-open
    intervals with a ≤ b ≤ c ≤ d. Proof, x rising: let u and v be the best centres of [a, d) and [b, c). If u
    ≤ v, give [a, c) the centre u and [b, d) the centre v: compared with the right-hand side only [c, d) has
    changed its centre, from u to v, and its elements are ≥ v, so nothing got dearer. If u > v, exchange the
    roles, and only [a, b) has changed, from u to v, with elements ≤ v. Size limits keep it: with them w is
    infinite for sizes outside min … max, and the sizes on the left lie between those on the right. So does
    the tie-break on Σ size², convex in the size.

    Computed in 128-bit integers: values are rounded to 2^-61 of the largest magnitude (2^-51 at T = 10⁷),
    then every sum and comparison is exact. What is smaller than that resolution is lost: beside an outlier at
    10^13 times their spread the other values were still clustered optimally, at 10^20 no longer (by 10 to 40 %).

    Args:
        values: [T], finite, non-decreasing or non-increasing; used in float64.
        name: what to call the values in errors.

    Raises:
        TypeError: the values are not real numbers.
        ValueError: the shape is not [T], or, when solved, a value is not finite or breaks the order.
    """

    values: Values
    name: str = "values"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _sequence(self.values, self.name))

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps T."""
        return len(self.values)

    def solve(
        self, first_k: int, last_k: int, min_size: int, max_size: int, solver: str, threads: int
    ) -> Solutions:
        """Optimal boundaries and cost for every k in first_k … last_k."""
        return _C.cluster_absolute(
            self.values, first_k, last_k, min_size, max_size, solver, threads, self.name
        )


@dataclass(frozen=True, eq=False)
class SquaredDeviation:
    """Σ (x(t) − mean)² of a monotone x: one-dimensional k-means, solved exactly up to rounding.

    The quadrangle inequality holds by the proof in :class:`AbsoluteDeviation`, with g the square and the mean
    as best centre. Computed in 128-bit integers, rounded to 73 bits or more of the largest cost that one
    interval can have, and exact up to that resolution alone. Where the values live on two scales whose ratio
    is beyond about 10^12, the smaller one is rounded away: with an outlier at 10^13 times the spread of the
    others, boundaries among these follow their sizes alone (more than twice the optimal cost for eleven of
    them). :class:`AbsoluteDeviation`, which squares nothing, reaches further.

    Args:
        values: [T], finite, non-decreasing or non-increasing; used in float64.
        name: what to call the values in errors.

    Raises:
        TypeError: the values are not real numbers.
        ValueError: the shape is not [T], or, when solved, a value is not finite or breaks the order.
    """

    values: Values
    name: str = "values"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _sequence(self.values, self.name))

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps T."""
        return len(self.values)

    def solve(
        self, first_k: int, last_k: int, min_size: int, max_size: int, solver: str, threads: int
    ) -> Solutions:
        """Optimal boundaries and cost for every k in first_k … last_k."""
        return _C.cluster_squared(
            self.values, first_k, last_k, min_size, max_size, solver, threads, self.name
        )


@dataclass(frozen=True, eq=False)
class Affinity:
    """−Σ TAS(t_c, t), t_c the middle timestep as in :class:`AbsoluteDeviation`: the gradient clustering.

    The quadrangle inequality does not hold (rows of the matrix need not be related), so the solver is the O(K
    T²) programme, in 64-bit fixed point; the matrix is neither copied nor prefix-summed.

    Args:
        tas: task affinity [T, T], finite, float32 or float64 (others are converted); row t_c holds the
            affinity of t_c to every t.

    Raises:
        TypeError: the entries are not real numbers.
        ValueError: the matrix is not square, or, when solved, not finite.
    """

    tas: Values

    def __post_init__(self) -> None:
        matrix = as_floats(self.tas, "tas", keep_float32=True)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"tas: expected a square matrix, found shape {list(matrix.shape)}")
        object.__setattr__(self, "tas", matrix)

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps T."""
        return len(self.tas)

    def solve(
        self, first_k: int, last_k: int, min_size: int, max_size: int, solver: str, threads: int
    ) -> Solutions:
        """Optimal boundaries and cost for every k in first_k … last_k."""
        return _C.cluster_affinity(self.tas, first_k, last_k, min_size, max_size, solver, threads)


@dataclass(frozen=True, eq=False)
class MatrixCost:
    """A cost given for every interval.

    Args:
        matrix: [T, T], entry [l, r] for l ≤ r is the cost of the timesteps l … r, both included; used in
            float64. Infinity forbids an interval (where ``monge`` is false); NaN is refused.
        monge: whether the quadrangle inequality holds, which allows the O(K T log T) solver. It is checked on
            a sample, on all adjacent quadruples for T ≤ 64.

    Raises:
        TypeError: the entries are not real numbers.
        ValueError: the matrix is not square, or the inequality fails (the message names the quadruple).
    """

    matrix: Values
    monge: bool = False

    def __post_init__(self) -> None:
        matrix = as_floats(self.matrix, "cost")
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"cost: expected a square matrix, found shape {list(matrix.shape)}")
        object.__setattr__(self, "matrix", matrix)
        if self.monge:
            sample_quadrangle_inequality(lambda l, r: matrix[l, r], len(matrix))

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps T."""
        return len(self.matrix)

    def solve(
        self, first_k: int, last_k: int, min_size: int, max_size: int, solver: str, threads: int
    ) -> Solutions:
        """Optimal boundaries and cost for every k in first_k … last_k."""
        return _C.cluster_matrix(
            self.matrix, first_k, last_k, min_size, max_size, solver, threads, self.monge
        )


@dataclass(frozen=True, eq=False)
class FunctionCost:
    """A cost compiled by Numba, called by the C++ solvers without the GIL and on all threads.

    Args:
        function: ``cost(l, r)`` of the timesteps l … r, both included: an ``@numba.njit`` function of two int64
            that returns a float. Infinity and NaN as in :class:`MatrixCost`.
        num_timesteps: number of timesteps T.
        monge: as in :class:`MatrixCost`.

    Raises:
        TypeError: the function is not compiled by Numba, or does not take two integers; or
            ``num_timesteps`` is no integer.
        ValueError: ``num_timesteps < 1``, or the inequality fails (the message names the quadruple).
    """

    function: Callable[[int, int], float]
    num_timesteps: int
    monge: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_timesteps", as_integer(self.num_timesteps, "num_timesteps"))
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps: expected at least 1, found {self.num_timesteps}")
        compile_rows(self.function)  # fails here rather than when solved
        if self.monge:
            sample_quadrangle_inequality(self._evaluate, self.num_timesteps)

    def solve(
        self, first_k: int, last_k: int, min_size: int, max_size: int, solver: str, threads: int
    ) -> Solutions:
        """Optimal boundaries and cost for every k in first_k … last_k."""
        rows = compile_rows(self.function)
        return _C.cluster_callback(
            rows.address, self.num_timesteps, first_k, last_k, min_size, max_size, solver, threads, self.monge
        )

    def _evaluate(self, l: np.ndarray, r: np.ndarray) -> np.ndarray:
        """Costs of the intervals l[i] … r[i]."""
        return np.array([self.function(int(a), int(b)) for a, b in zip(l, r, strict=True)])


def as_integer(value: Any, name: str) -> int:
    """The integer that ``value`` is, of Python's, NumPy's or Torch's.

    Raises:
        TypeError: not an integer.
        ValueError: more than 64 bits.
    """
    try:
        integer = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: expected an integer, found {value!r}") from error
    if not -(2**63) <= integer < 2**63:
        raise ValueError(f"{name}: expected an integer of at most 64 bits, found {integer}")
    return integer


def _sequence(values: Any, name: str) -> np.ndarray:
    array = as_floats(values, name)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected shape [T], found {list(array.shape)}")
    return array


def as_floats(values: Any, name: str, keep_float32: bool = False) -> np.ndarray:
    """A contiguous float64 array (or float32, on demand), without a copy where the values already are one.

    Raises:
        TypeError: not real numbers.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values if values.dtype == values.float().dtype else values.double()).numpy()
    try:
        array = np.asarray(values)
        if np.iscomplexobj(array):
            raise TypeError(f"found {array.dtype}")
        keep = keep_float32 and array.dtype == np.float32
        return np.require(array, np.float32 if keep else np.float64, ["C", "A"]).reshape(array.shape)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected real numbers ({error})") from error
