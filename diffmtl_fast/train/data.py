"""The bundled data under the name that configurations know; everything of data is in `diffmtl_fast.data`."""

from __future__ import annotations

from ..data import ImageData, digits

__all__ = ["ImageData", "digits"]
