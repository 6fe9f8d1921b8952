"""Makes the helpers beside these tests importable: the suite runs without packages (import-mode importlib)."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def full_precision(monkeypatch):
    """Let float32 be float32 in convolutions, too: on GPUs it is TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=["grouped", "lean", "sliced"])
def options(request):
    """Run a test with every way to form the gradients: arguments of ClusteredMTL."""
    from exactness import WAYS

    return WAYS[request.param]


def pytest_terminal_summary(terminalreporter):
    """Count what came of the runs of the table of architectures."""
    verdicts = Counter(
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "verdict" and report.when == "call"
    )
    if verdicts:
        kinds = ("exact", "refused", "wrong", "unclear")
        terminalreporter.write_line(
            f"architectures: {verdicts.total()} runs, " + ", ".join(f"{verdicts[k]} {k}" for k in kinds)
        )
