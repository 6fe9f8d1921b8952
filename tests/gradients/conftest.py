"""Makes the helper beside these tests importable: the suite runs without packages (import-mode importlib)."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def full_precision(monkeypatch):
    """Let float32 be float32 in convolutions, too: on GPUs it is TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
