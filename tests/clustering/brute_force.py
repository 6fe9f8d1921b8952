"""Plain definitions in exact rational arithmetic, and enumeration of every partition."""

from __future__ import annotations

import itertools
from fractions import Fraction


def absolute(values):
    x = [Fraction(v) for v in values]

    def cost(l, e):
        return sum(abs(x[i] - x[(l + e) // 2]) for i in range(l, e))

    return cost


def squared(values):
    x = [Fraction(v) for v in values]

    def cost(l, e):
        mean = sum(x[l:e]) / (e - l)
        return sum((v - mean) ** 2 for v in x[l:e])

    return cost


def affinity(matrix):
    a = [[Fraction(v) for v in row] for row in matrix]

    def cost(l, e):
        return -sum(a[(l + e) // 2][l:e])

    return cost


def total(cost, boundaries):
    return sum(cost(l, e) for l, e in itertools.pairwise(boundaries))


def best(cost, n, k, min_size=1, max_size=None):
    """Boundaries and cost, or None: least (cost, Σ size²), then the smallest boundaries from the right."""
    max_size = n if max_size is None else max_size
    table = {}

    def cached(l, e):
        if (l, e) not in table:
            table[l, e] = cost(l, e)
        return table[l, e]

    found = None
    for inner in itertools.combinations(range(1, n), k - 1):
        b = (0, *inner, n)
        sizes = [e - l for l, e in itertools.pairwise(b)]
        if min(sizes) < min_size or max(sizes) > max_size:
            continue
        total = sum(cached(l, e) for l, e in itertools.pairwise(b))
        key = (total, sum(s * s for s in sizes), b[::-1])
        if found is None or key < found:
            found = key
    return None if found is None else (list(found[2][::-1]), found[0])
