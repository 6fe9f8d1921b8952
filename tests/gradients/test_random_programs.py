"""Random programs with every engine: a parameter raw, derived, several times in one call, in any order."""

from __future__ import annotations

import functools
import os

import pytest
from architectures.case import Case, rows
from architectures.programs import WIDTH, Program
from architectures.verdict import ORDERS, WAYS, judge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = 500 if os.environ.get("DIFFMTL_CAMPAIGN") == "1" else 25


@pytest.mark.parametrize("way", WAYS)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32 - 1), order=st.sampled_from(ORDERS))
def test_exact(way, seed, order):
    case = Case(f"program-{seed}", functools.partial(Program, seed), (rows(WIDTH),), {})
    verdict = judge(case, way, order, "float64")
    assert verdict.kind == "exact", verdict.words
