"""sample_mse, cluster_mean and cluster_mse against their definitions in float64."""

from __future__ import annotations

import pytest
import torch

from diffmtl_fast import ops

SHAPES = [(7,), (1, 1), (6, 3), (5, 3, 7, 11), (64, 4, 8, 8)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def draw(shape, dtype, generator):
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)).item()


def sample_mse_by_hand(pred, target):
    return torch.stack(
        [((p.double() - q.double()) ** 2).sum() / p.numel() for p, q in zip(pred, target, strict=True)]
    )


def cluster_means_by_hand(losses, cluster, k):
    rows = [losses[cluster == i] for i in range(k)]
    return torch.stack([row.sum() / max(len(row), 1) for row in rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sample_mse(shape, dtype, generator):
    pred = draw(shape, dtype, generator).requires_grad_()
    target = draw(shape, dtype, generator).requires_grad_()
    loss = ops.sample_mse(pred, target)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    upstream = draw(shape[:1], loss.dtype, generator)

    pred64, target64 = (x.detach().double().requires_grad_() for x in (pred, target))
    expected = sample_mse_by_hand(pred64, target64)
    assert relative_error(loss, expected) <= TOLERANCE[dtype]

    loss.backward(upstream)
    expected.backward(upstream.double())
    for found, exact in ((pred, pred64), (target, target64)):
        assert found.grad.dtype == dtype
        assert relative_error(found.grad, exact.grad) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 9])
def test_cluster_mse(shape, dtype, k, device, generator):
    pred = draw(shape, dtype, generator).requires_grad_()
    target = draw(shape, dtype, generator)
    # Unsorted, of unequal sizes; the last cluster of several is empty, and with B = 1 all but one are.
    cluster = torch.randint(max(k - 1, 1), shape[:1], generator=generator, device=device)
    losses = ops.cluster_mse(pred, target, cluster, k)
    upstream = draw((k,), losses.dtype, generator)

    pred64 = pred.detach().double().requires_grad_()
    expected = cluster_means_by_hand(sample_mse_by_hand(pred64, target), cluster, k)
    assert relative_error(losses, expected) <= TOLERANCE[dtype]
    if k > 1:
        assert losses[-1] == 0

    losses.backward(upstream)
    expected.backward(upstream.double())
    assert relative_error(pred.grad, pred64.grad) <= GRADIENT_TOLERANCE[dtype]


def test_cluster_mean_is_the_masked_mean(device):
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], device=device, requires_grad=True)
    cluster = torch.tensor([2, 0, 2, 2], device=device)
    means = ops.cluster_mean(values, cluster, 4)
    torch.testing.assert_close(means, torch.tensor([2.0, 0.0, 13 / 3, 0.0], device=device))
    means.backward(torch.tensor([1.0, 5.0, 6.0, 7.0], device=device))
    torch.testing.assert_close(values.grad, torch.tensor([2.0, 1.0, 2.0, 2.0], device=device))


def test_a_nan_stays_in_its_own_cluster(device):
    values = torch.tensor([float("nan"), 1.0, 3.0], device=device)
    means = ops.cluster_mean(values, torch.tensor([0, 1, 1], device=device), 2)
    assert means[0].isnan()
    assert means[1] == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_multiply_the_samples(dtype, device, generator):
    pred, target = (draw((6, 3, 5), dtype, generator) for _ in range(2))
    weight = torch.rand(6, generator=generator, device=device)
    cluster = torch.tensor([0, 2, 2, 0, 0, 2], device=device)
    pred64 = pred.double().requires_grad_()
    weighted = weight.double() * sample_mse_by_hand(pred64, target)
    assert relative_error(ops.sample_mse(pred, target, weight), weighted) <= TOLERANCE[dtype]

    pred.requires_grad_()
    losses, counts = ops.cluster_mse(pred, target, cluster, 3, weight, return_counts=True)
    expected = cluster_means_by_hand(weighted, cluster, 3)
    assert counts.tolist() == [3, 0, 3]
    assert relative_error(losses, expected) <= TOLERANCE[dtype]
    (losses * torch.tensor([1.0, 2.0, 3.0], device=device)).sum().backward()
    (expected * torch.tensor([1.0, 2.0, 3.0], device=device)).sum().backward()
    assert relative_error(pred.grad, pred64.grad) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(3), ValueError, r"expected shape \[2\], found \[3\]"),
        (torch.ones(2, dtype=torch.int64), TypeError, "found torch.int64"),
        (torch.ones(2, requires_grad=True), ValueError, "expected a constant"),
    ],
)
def test_bad_weights_are_refused(weight, error, message):
    with pytest.raises(error, match=message):
        ops.sample_mse(torch.zeros(2, 3), torch.zeros(2, 3), weight)


def test_mixed_dtypes_promote(device, generator):
    pred, target = draw((4, 5), torch.bfloat16, generator), draw((4, 5), torch.float32, generator)
    loss = ops.sample_mse(pred.requires_grad_(), target)
    assert loss.dtype == torch.float32
    assert relative_error(loss, sample_mse_by_hand(pred, target)) < 1e-6
    loss.sum().backward()
    assert pred.grad.dtype == torch.bfloat16


def test_non_contiguous_inputs(device, generator):
    pred, target = draw((3, 4, 5), torch.float32, generator), draw((5, 4, 3), torch.float32, generator)
    found = ops.sample_mse(pred.transpose(0, 2), target)
    assert relative_error(found, sample_mse_by_hand(pred.transpose(0, 2), target)) < 1e-6


def test_an_empty_batch_is_an_empty_loss(device):
    pred = torch.empty(0, 3, device=device, requires_grad=True)
    loss = ops.sample_mse(pred, torch.empty(0, 3, device=device))
    assert loss.shape == (0,)
    losses = ops.cluster_mse(pred, pred.detach(), torch.empty(0, dtype=torch.int64, device=device), 2)
    assert losses.tolist() == [0, 0]
    losses.sum().backward()
    assert pred.grad.shape == (0, 3)


def test_autocast_changes_nothing(device, generator):
    pred, target = draw((4, 300), torch.float32, generator), draw((4, 300), torch.float32, generator)
    plain = ops.sample_mse(pred, target)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(ops.sample_mse(pred, target), plain)


@pytest.mark.parametrize(
    ("pred", "target", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), ValueError, r"one shape, found \[2, 3\] and \[3, 2\]"),
        (
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(2),
            TypeError,
            "floating-point tensor, found torch.int64",
        ),
        (torch.zeros(()), torch.zeros(()), ValueError, "0-dimensional"),
        (torch.zeros(2, 0), torch.zeros(2, 0), ValueError, "at least one element"),
    ],
)
def test_sample_mse_refuses(pred, target, error, message):
    with pytest.raises(error, match=message):
        ops.sample_mse(pred, target)


@pytest.mark.parametrize(
    ("cluster", "k", "error", "message"),
    [
        (torch.tensor([0, 1, 3]), 3, ValueError, r"indices in 0..2, found 3"),
        (torch.tensor([0, -1, 2]), 3, ValueError, r"indices in 0..2, found -1"),
        (torch.tensor([0, 1]), 3, ValueError, r"shape \[3\], found \[2\]"),
        (torch.tensor([0.0, 1.0, 2.0]), 3, TypeError, "int64 indices, found torch.float32"),
        (torch.tensor([0, 1, 2]), 0, ValueError, "at least one cluster"),
    ],
)
def test_cluster_mse_refuses(cluster, k, error, message):
    with pytest.raises(error, match=message):
        ops.cluster_mse(torch.zeros(3, 2), torch.zeros(3, 2), cluster, k)


def test_double_backward_is_refused(device):
    pred = torch.ones(2, 2, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.sample_mse(pred, torch.zeros_like(pred)).sum(), pred, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative of the squared error"):
        grad.sum().backward()
