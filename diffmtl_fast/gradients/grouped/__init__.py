"""The grouped engine, in the order of a step.

`grouped_engine` runs the model with a `cluster_parameter` in every parameter's place. `dispatch` chooses how each
operation on one is run, `node` is its autograd node, and `delivery` brings its gradients to the store; with lean
memory `deferred_update` forms its part of the update later. `module_slices` runs modules without a rule in slices.
`noise_check` checks that all of it is exact, by what `operation` says of every operation.
"""

from __future__ import annotations

from .grouped_engine import GroupedEngine
from .operation import CannotGroup

__all__ = ["CannotGroup", "GroupedEngine"]
