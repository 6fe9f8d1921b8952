"""A user's own cost: compiled into rows for the C++ solvers, and checked for the quadrangle inequality."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

_SAMPLES = 2048
_EXHAUSTIVE = 64  # up to this T every adjacent quadruple is checked


@lru_cache(maxsize=32)
def compile_rows(cost: Callable[[int, int], float]) -> Any:
    """Compile ``cost(l, r)`` into a C function that fills a row of costs.

    Args:
        cost: an ``@numba.njit`` function of two int64.

    Returns:
        A Numba C function, int64 f(r, first, last, double* out), whose ``address`` the C++ solvers call
        without the
        GIL: it writes cost(l, r) for l = first … last and returns 0, or 1 + the l at which ``cost`` raised.

    Raises:
        TypeError: ``cost`` is not compiled by Numba, or does not return a number for two integers.
    """
    import numba
    from numba.core.errors import NumbaError
    from numba.extending import is_jitted

    if not is_jitted(cost):
        raise TypeError(f"cost: expected a function compiled by @numba.njit or a matrix, found {cost!r}")
    types = numba.types
    signature = types.int64(types.int64, types.int64, types.int64, types.CPointer(types.float64))

    def fill(r, first, last, out):  # type: ignore[no-untyped-def]
        row = numba.carray(out, last - first + 1)
        l = first
        try:
            while l <= last:
                row[l - first] = cost(l, r)
                l += 1
        except Exception:  # Numba compiles no narrower clause
            return l + 1
        return 0

    try:
        return numba.cfunc(signature)(fill)
    except NumbaError as error:
        raise TypeError(f"cost: expected a float from cost(int64, int64); Numba says: {error}") from error


def sample_quadrangle_inequality(
    evaluate: Callable[[np.ndarray, np.ndarray], np.ndarray], num_timesteps: int
) -> None:
    """Look for a quadruple a < b ≤ c < d with cost(a, c) + cost(b, d) > cost(a, d) + cost(b, c).

    Adjacent quadruples (b = a + 1, d = c + 1) imply all others; for small T all of them are checked, else a
    fixed random sample of adjacent and of wide ones. Rounding of 1e-9 of the costs involved is forgiven.

    Args:
        evaluate: costs of the intervals l[i] … r[i], both ends included.
        num_timesteps: T.

    Raises:
        ValueError: the inequality fails, naming the quadruple, or a cost is not finite.
    """
    if num_timesteps < 3:
        return
    if num_timesteps <= _EXHAUSTIVE:
        a, c = (i.ravel() for i in np.mgrid[: num_timesteps - 1, : num_timesteps - 1])
        a, c = a[a < c], c[a < c]
        b, d = a + 1, c + 1
    else:
        generator = np.random.default_rng(0)
        wide = np.sort(generator.integers(0, num_timesteps, (_SAMPLES, 4)), axis=1)
        ends = np.sort(generator.integers(0, num_timesteps - 1, (_SAMPLES, 2)), axis=1)
        adjacent = np.stack([ends[:, 0], ends[:, 0] + 1, ends[:, 1], ends[:, 1] + 1], axis=1)
        quadruples = np.concatenate([wide, adjacent])
        a, b, c, d = quadruples[
            (quadruples[:, 0] < quadruples[:, 1]) & (quadruples[:, 1] <= quadruples[:, 2])
        ].T
    left_1, left_2, right_1, right_2 = evaluate(a, c), evaluate(b, d), evaluate(a, d), evaluate(b, c)
    scale = abs(left_1) + abs(left_2) + abs(right_1) + abs(right_2)
    if not np.isfinite(scale).all():
        i = int(np.flatnonzero(~np.isfinite(scale))[0])
        raise ValueError(f"cost: expected finite values, found one that is not between {a[i]} and {d[i]}")
    bad = np.flatnonzero(left_1 + left_2 - right_1 - right_2 > 1e-9 * scale)
    if bad.size:
        i = int(bad[0])
        raise ValueError(
            f"monge: expected cost(a, c) + cost(b, d) <= cost(a, d) + cost(b, c), found {left_1[i]} + "
            f"{left_2[i]} > {right_1[i]} + {right_2[i]} at (a, b, c, d) = ({a[i]}, {b[i]}, {c[i]}, {d[i]}); "
            "use monge=False"
        )
