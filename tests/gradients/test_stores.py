"""The store of per-cluster gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffmtl_fast.gradients.stores import Jacobian, LeanGramian


def make_parameters(device):
    shapes = [(2, 3), (4,), ()]
    parameters = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    image = torch.zeros(2, 3, 2, 2, device=device).to(memory_format=torch.channels_last)
    return [*parameters, nn.Parameter(image)]


def test_only_what_was_written_counts(device):
    jacobian = Jacobian(make_parameters(device), 2)
    assert jacobian.touched == [False] * 4
    assert jacobian.gramian().tolist() == [[0, 0], [0, 0]]
    jacobian.add_row(1, 1, torch.ones(4, device=device))
    assert jacobian.touched == [False, True, False, False]
    assert jacobian.gramian().tolist() == [[0, 0], [0, 4]]
    jacobian.clear()
    assert jacobian.touched == [False] * 4


def test_parts_add_up_however_they_come(device):
    parameters = make_parameters(device)
    jacobian, whole = Jacobian(parameters, 2), torch.zeros(2, 2, 3, device=device)
    first, row, last = (torch.randn(shape, device=device) for shape in [(2, 2, 3), (2, 3), (2, 2, 3)])
    jacobian.lend(0).copy_(first)
    assert jacobian.lend(0) is None
    with pytest.raises(RuntimeError, match="expected the block of parameter 0 back"):
        jacobian.add(0, last)
    jacobian.accept(0)
    assert jacobian.lend(0) is None
    jacobian.add_row(0, 1, row)
    jacobian.add(0, last)
    whole += first + last
    whole[1] += row
    torch.testing.assert_close(jacobian.blocks[0], whole)
    torch.testing.assert_close(jacobian.gramian().float(), whole.flatten(1) @ whole.flatten(1).T)


def test_gradients_are_written_like_autograd_writes_them(device):
    parameters = make_parameters(device)
    jacobian, weights = Jacobian(parameters, 2), torch.tensor([1.0, -2.0], device=device)
    values = [torch.randn(2, *p.shape, device=device) for p in parameters]
    for position in (0, 2, 3):
        jacobian.add(position, values[position])
    before = torch.randn(2, 3, device=device)
    parameters[0].grad = before.clone()
    square = jacobian.update(weights, None)
    assert parameters[1].grad is None
    torch.testing.assert_close(parameters[0].grad, before + values[0][0] - 2 * values[0][1])
    torch.testing.assert_close(parameters[3].grad, values[3][0] - 2 * values[3][1])
    assert parameters[3].grad.stride() == parameters[3].stride()
    expected = sum(p.grad.double().square().sum() for p in parameters if p.grad is not None)
    torch.testing.assert_close(square, expected)


def test_lower_precision_storage(device):
    parameters = make_parameters(device)
    jacobian, value = Jacobian(parameters, 2, torch.bfloat16), torch.randn(2, 2, 3, device=device)
    jacobian.add(0, value)
    assert jacobian.blocks[0].dtype == torch.bfloat16
    assert jacobian.gramian().dtype == torch.float64
    stored = value.bfloat16().float().flatten(1)
    torch.testing.assert_close(jacobian.gramian(), (stored @ stored.T).double())
    jacobian.update(torch.ones(2, device=device), None)
    assert parameters[0].grad.dtype == torch.float32


def test_lean_waits_for_the_last_use_of_a_parameter(device):
    parameters = make_parameters(device)
    lean = LeanGramian(parameters, 2, {0: 2, 1: 1}, [1], False)
    parts = torch.randn(2, 2, 2, 3, device=device)
    row = torch.randn(4, device=device)
    lean.add(0, parts[0].clone())
    lean.add_row(1, 0, row)
    lean.add(0, parts[1].clone())
    whole = parts.sum(0).flatten(1)
    expected = whole @ whole.T
    expected[0, 0] += row @ row
    torch.testing.assert_close(lean.gramian().float(), expected)
