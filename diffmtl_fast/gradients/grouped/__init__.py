"""The grouped engine, in the order of a step.

`grouped_engine` runs the model with a `cluster_parameter` in every parameter's place; `dispatch` decides what a use
of one means; `module_slices` runs what has no rule; `verification` checks that all of it is exact; `node` stands in
the graph; `delivery` brings gradients to the store; `deferred` forms an operation's part of the update later.
"""

from __future__ import annotations

from .grouped_engine import GroupedEngine
from .operation import CannotGroup

__all__ = ["CannotGroup", "GroupedEngine"]
