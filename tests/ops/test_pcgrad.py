"""pcgrad_weights against the published loop over gradient vectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.reference import pcgrad as pcgrad_by_vectors
from diffmtl_fast import PCGrad, ops
from diffmtl_fast.ops import PLAIN


def everyone(gramian):
    return torch.ones(len(gramian), dtype=torch.bool, device=gramian.device)


# The kernel of the device and the definition.
by_both = pytest.mark.parametrize(
    "weigh",
    [ops.pcgrad_weights, lambda g, o, p=None: PLAIN["pcgrad_weights"](g, o, everyone(g) if p is None else p)],
    ids=["kernel", "plain"],
)


def coefficients(jacobian, order):
    """Return g_k' of every cluster written in the gradients, by the published loop."""
    rows = torch.eye(len(jacobian), dtype=jacobian.dtype)
    for row, partners in zip(rows, order.tolist(), strict=True):
        for j in partners:
            row[j] -= (row @ jacobian @ jacobian[j]).clamp(max=0) / jacobian[j].square().sum()
    return rows


def of_present(order, present):
    """Renumber the order for the present clusters alone."""
    numbers = torch.cumsum(present, 0) - 1
    rows = [numbers[row[present[row]]] for row in order[present]]
    return torch.stack(rows) if rows else order[:0, :0]


@by_both
@settings(max_examples=200, deadline=None)
@given(
    k=st.integers(1, 8),
    width=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    rubbish=st.sampled_from([1.0, -1e200, float("inf"), float("nan")]),
)
def test_equals_the_loop_over_the_vectors_of_present_clusters(weigh, k, width, seed, rubbish):
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(k, width, generator=generator, dtype=torch.float64)
    order = PCGrad(generator).draw_order(k)
    present = torch.rand(k, generator=generator) < 0.7
    gramian = torch.where(present.outer(present), jacobian @ jacobian.T, rubbish)
    weights = weigh(gramian, order, present)
    assert (weights[~present] == 0).all()
    expected = pcgrad_by_vectors(jacobian[present], of_present(order, present))
    # A product of zero in exact arithmetic may round to either side; the vectors agree all the same.
    found = weights[present] @ jacobian[present]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * jacobian.norm().item())


@by_both
@settings(max_examples=50, deadline=None)
@given(k=st.integers(2, 8), seed=st.integers(0, 10_000))
def test_equivariant_under_permutation(weigh, k, seed):
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(k, 3, generator=generator, dtype=torch.float64)
    gramian, order = jacobian @ jacobian.T, PCGrad(generator).draw_order(k)
    places = torch.randperm(k, generator=generator)
    permuted = weigh(gramian[places][:, places], places.argsort()[order[places]])
    torch.testing.assert_close(permuted, weigh(gramian, order)[places], rtol=1e-9, atol=1e-12)


@by_both
def test_any_scale_that_the_dtype_holds(weigh, device):
    gramian = torch.tensor([[4.0, -1.0, -3.0], [-1.0, 9.0, 2.0], [-3.0, 2.0, 5.0]], device=device).double()
    order = torch.tensor([[2, 1], [0, 2], [1, 0]], device=device)
    for dtype, lowest, highest in ((torch.float32, -149, 124), (torch.float64, -1074, 1020)):
        expected = weigh(gramian.to(dtype), order)
        assert expected.tolist() != [1, 1, 1]
        for exponent in (lowest, lowest // 2, 0, highest // 2, highest):
            scaled = torch.ldexp(
                gramian, torch.tensor(exponent // 2)
            )  # in two steps: 2^exponent may overflow
            scaled = torch.ldexp(scaled, torch.tensor(exponent - exponent // 2)).to(dtype)
            torch.testing.assert_close(weigh(scaled, order), expected, rtol=1e-6, atol=0)


@by_both
@settings(max_examples=50, deadline=None)
@given(k=st.integers(2, 6), seed=st.integers(0, 10_000), spread=st.integers(0, 120))
def test_gradients_of_very_different_scales(weigh, k, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(k, 4, generator=generator, dtype=torch.float64)
    order = PCGrad(generator).draw_order(k)
    scales = 10.0 ** (spread * (torch.rand(k, generator=generator, dtype=torch.float64) - 0.5))
    scaled = jacobian * scales.unsqueeze(1)
    expected = (coefficients(jacobian, order) * scales.unsqueeze(1) / scales).sum(0)
    torch.testing.assert_close(weigh(scaled @ scaled.T, order), expected, rtol=1e-9, atol=0)


@by_both
def test_an_absent_cluster_does_not_project_others(weigh, device):
    gramian = torch.tensor([[4.0, -2.0, -1.0], [-2.0, 5.0, -1.0], [-1.0, -1.0, 10.0]], device=device)
    order = torch.tensor([[2, 1], [2, 0], [0, 1]], device=device)
    present = torch.tensor([True, True, False], device=device)
    # g_1' = g_1 + (2/5) g_2 and g_2' = g_2 + (2/4) g_1.
    assert weigh(gramian, order, present).tolist() == pytest.approx([1.5, 1.4, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@by_both
def test_overflowed_gradients_are_not_hidden(weigh, value, device):
    gramian, order = torch.eye(2, device=device), torch.tensor([[1], [0]], device=device)
    gramian[1, 1] = value
    assert weigh(gramian, order).isnan().all()
    assert weigh(gramian, order, torch.tensor([True, False], device=device)).tolist() == [1, 0]


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
