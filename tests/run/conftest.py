"""The tiny run of the trainer's tests, for the analyses of one."""

from __future__ import annotations

from tests.train.conftest import tiny

__all__ = ["tiny"]
