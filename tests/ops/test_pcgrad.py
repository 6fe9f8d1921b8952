"""pcgrad_weights against the published loop over gradient vectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.reference import pcgrad as pcgrad_by_vectors
from diffmtl_fast import PCGrad, ops


@settings(max_examples=200, deadline=None)
@given(k=st.integers(1, 8), width=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_equals_the_loop_over_vectors(k, width, seed):
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(k, width, generator=generator, dtype=torch.float64)
    order = PCGrad(generator).draw_order(k)
    weights = ops.pcgrad_weights(jacobian @ jacobian.T, order)
    expected = pcgrad_by_vectors(jacobian, order)
    # A product of zero in exact arithmetic may round to either side; the vectors agree all the same.
    torch.testing.assert_close(weights @ jacobian, expected, rtol=1e-9, atol=1e-9 * jacobian.norm().item())


def test_closed_form_for_two_conflicting_gradients(device):
    gramian = torch.tensor([[4.0, -1.0], [-1.0, 9.0]], dtype=torch.float64, device=device)
    weights = ops.pcgrad_weights(gramian, torch.tensor([[1], [0]], device=device))
    # g_1' = g_1 + (1/9) g_2 and g_2' = g_2 + (1/4) g_1.
    torch.testing.assert_close(
        weights, torch.tensor([1 + 1 / 4, 1 + 1 / 9], dtype=torch.float64, device=device)
    )


def test_without_conflict_nothing_changes(device, generator):
    jacobian = torch.rand(5, 7, generator=generator, device=device)
    weights = PCGrad(generator)(ops.gram(jacobian))
    assert weights.tolist() == [1, 1, 1, 1, 1]


def test_absent_clusters_neither_project_nor_count(device):
    gramian = torch.zeros(3, 3, dtype=torch.float64)
    gramian[0, 0], gramian[2, 2], gramian[0, 2], gramian[2, 0] = 4, 9, -1, -1
    present = torch.tensor([True, False, True], device=device)
    order = torch.tensor([[1, 2], [0, 2], [1, 0]], device=device)
    weights = ops.pcgrad_weights(gramian.to(device), order, present)
    expected = torch.tensor([1 + 1 / 4, 0, 1 + 1 / 9], dtype=torch.float64, device=device)
    torch.testing.assert_close(weights, expected)


def test_one_cluster(device):
    order = torch.empty(1, 0, dtype=torch.int64, device=device)
    assert ops.pcgrad_weights(torch.tensor([[2.0]], device=device), order).tolist() == [1]


def test_refuses_an_order_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"int64 of shape \[3, 2\], found torch.int64 of shape \[3, 3\]"):
        ops.pcgrad_weights(torch.eye(3), torch.zeros(3, 3, dtype=torch.int64))
