from __future__ import annotations

import pytest
import torch

from benchmarks.benchmark import Options
from benchmarks.groups import step
from benchmarks.models import MODELS


@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("2")])  # those are a GPU's
def test_every_model_takes_its_batch(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    case = MODELS[name](4, 2).to(device)
    assert case.sizes == [2, 2]
    one = case.batch.narrow(1, 1)
    with torch.no_grad():
        pred = case.predict(case.model, one)
        losses = case.losses(case.model, one)
    assert pred.shape == one.target.shape
    assert pred.dtype == torch.float32
    assert losses.isfinite().tolist() == [True]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_asked_for(name: str) -> None:
    (found, *_) = step.benchmarks(Options(models=(name,)))
    assert found.parameters["model"] == name
    assert found.case.startswith(str(found.parameters["title"]))
