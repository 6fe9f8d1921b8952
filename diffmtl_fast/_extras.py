"""Optional dependencies: loaded where they are used, with an error that names the command to run."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: import path, for example ``"matplotlib.pyplot"``.
        extra: the extra of this package that installs it, for example ``"train"``.

    Returns:
        The imported module.

    Raises:
        ImportError: the module is not installed; the message names the pip command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"expected the package of `{module}` to be installed ({error}); "
            f"run `pip install 'diffmtl-fast[{extra}]'`"
        ) from error
