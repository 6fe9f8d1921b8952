"""Access to the compiled extension, with an error that says how to get it."""

from __future__ import annotations

try:
    from . import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        "expected the compiled extension diffmtl_fast._C, found none that loads "
        f"({error}); install a wheel, or run `pip install .` in the repository root, which needs a C++17 "
        "compiler"
    ) from error

__all__ = ["_C"]
