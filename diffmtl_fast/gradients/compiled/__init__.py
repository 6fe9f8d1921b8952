"""The engine of compiled models, in the order of a step.

`compiled_engine` runs the model with a `stand_in` in every parameter's place. `dispatch`, which the compiler
traces, chooses how each operation on one is run, and `operations` holds their autograd functions, whose backward
writes every cluster's gradient straight into the Jacobian.
"""

from __future__ import annotations

from .compiled_engine import CompiledEngine

__all__ = ["CompiledEngine"]
