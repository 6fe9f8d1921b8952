import pytest
import torch

from benchmarks import affinity
from benchmarks.harness import GateError
from benchmarks.reference import pairwise_cosines, timestep_gradients


def test_pairwise_cosines_and_gradients_by_hand():
    model = torch.nn.Linear(2, 1, bias=False).double()
    inputs = {0: [3.0, 4.0], 1: [-8.0, 6.0], 2: [-6.0, -8.0]}

    def losses(t):
        return [model(torch.tensor(inputs[t], dtype=torch.float64)).sum() for _ in range(2)]

    gradients = timestep_gradients(model, losses, [0, 1, 2])
    assert [g.tolist() for g in gradients] == [[6.0, 8.0], [-16.0, 12.0], [-12.0, -16.0]]
    assert all(p.grad is None for p in model.parameters())
    expected = torch.tensor([[1.0, 0, -1], [0, 1, 0], [-1, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(pairwise_cosines(gradients), expected)
    torch.testing.assert_close(pairwise_cosines(gradients[:1], gradients[1:]), expected[:1, 1:])


def test_both_ways_agree_before_they_are_timed(monkeypatch):
    pytest.importorskip("diffusers")
    result = affinity.compare((8, 8), 12, 2, 3)
    assert result.error <= affinity.TOLERANCE
    assert all(ratio > 0 for ratio in result.ratios)
    assert result.row().count("|") == 8
    monkeypatch.setattr(affinity, "pairwise_cosines", lambda gradients: torch.zeros(3, 3))
    with pytest.raises(GateError, match="expected cosines equal"):
        affinity.compare((8, 8), 12, 2, 3)
