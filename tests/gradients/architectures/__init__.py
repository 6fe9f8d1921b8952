"""The table of architectures that the engines are held to, by family; see `case`."""

from . import adversarial, layers, mixing, models, parameters, programs
from .case import Case

CASES: dict[str, Case] = {}
for family in (layers, parameters, adversarial, models, programs, mixing):
    for case in family.CASES:
        assert case.name not in CASES, f"expected each name once, found {case.name} twice"
        CASES[case.name] = case
