"""Every architecture of the table, with every engine: exact or refused by name, never wrong and never unclear.

`make test` runs a part that is drawn with a seed, with every architecture in it; DIFFMTL_CAMPAIGN=1, as set by
`make campaign`, runs the whole.
"""

from __future__ import annotations

import os
import random
import re

import pytest
from architectures import CASES
from architectures.verdict import ORDERS, WAYS, expected, judge

PER_CASE = 2
#: PyTorch does not compile models that differentiate in their forward
NOT_COMPILED = re.compile("score-of|gradient-penalty")


def _runs():
    campaign = os.environ.get("DIFFMTL_CAMPAIGN") == "1"
    draw = random.Random(0)
    for name, case in CASES.items():
        orders = ORDERS[:1] if case.random else ORDERS
        runs = [
            (name, way, order, precision)
            for way in WAYS
            for order in orders
            for precision in case.floats
            if way != "compiled" or (precision == "float64" and not NOT_COMPILED.search(name))
        ]
        yield from runs if campaign else draw.sample(runs, min(PER_CASE, len(runs)))


@pytest.mark.parametrize(("name", "way", "order", "precision"), list(_runs()))
def test_exact_or_refused(name, way, order, precision, record_property):
    case = CASES[name]
    verdict = judge(case, way, order, precision)
    record_property("verdict", verdict.kind)
    assert verdict.meets(case, way), (
        f"{verdict.kind}: {verdict.words}\nexpected: {expected(case, way)[0] or 'exact'}"
    )


def test_the_table_is_whole():
    assert len(CASES) >= 250
