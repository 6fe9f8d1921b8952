"""What is refused of a YAML text before its values are made: no text, endless aliases, options given twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

from .._errors import UserError

#: Of a text, aliases counted as often as they are used.
MOST_VALUES = 100_000


def check_text(text: str, where: str) -> None:
    """Refuse a text without values, or whose values do not fit into memory, contain themselves or are named twice.

    Args:
        text: YAML.
        where: it comes from; it begins the message.

    Raises:
        UserError: it is such.
        yaml.YAMLError: it is not YAML.
    """
    root = yaml.compose(text, yaml.SafeLoader)
    if root is None:
        raise UserError(f"{where}: expected options, found an empty text")
    count = _count(root, {}, where)
    if count > MOST_VALUES:
        raise UserError(
            f"{where}: expected at most {MOST_VALUES} values, found {count:.3g}, aliases counted as often as "
            "they are used"
        )


def _count(node: Any, known: dict[Any, int | None], where: str) -> int:
    """The values in a node; `known` has those of others, and None of the ones that it is in."""
    if node in known:
        found = known[node]
        if found is None:
            raise UserError(f"{where}: expected values that end, found one that contains itself")
        return found
    known[node] = None
    inner: list[Any] = []
    if isinstance(node, yaml.MappingNode):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, times in names.items():
            if times > 1:
                raise UserError(f"{where}: expected every option once, found {name} {times} times")
        inner = [each for pair in node.value for each in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    known[node] = found = 1 + sum(_count(each, known, where) for each in inner)
    return found
