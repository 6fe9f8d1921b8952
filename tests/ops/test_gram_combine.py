"""gram and combine against their definitions in float64."""

from __future__ import annotations

import pytest
import torch

from diffmtl_fast import ops

SHAPES = [(1, 1), (1, 5), (2, 0), (3, 17), (5, 4097), (64, 33)]
DTYPES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def draw(shape, dtype, generator):
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram(shape, dtype, generator):
    jacobian = draw(shape, dtype, generator)
    gramian = ops.gram(jacobian)
    expected = torch.einsum("kp,lp->kl", jacobian.double(), jacobian.double())
    assert gramian.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(gramian, gramian.T)
    scale = expected.diagonal().max().item() if shape[1] else 1.0
    torch.testing.assert_close(gramian.double(), expected, rtol=0, atol=DTYPES[dtype] * scale * 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_combine(shape, dtype, generator):
    jacobian, weights = draw(shape, dtype, generator), draw(shape[:1], torch.float32, generator)
    direction = ops.combine(jacobian, weights)
    assert direction.dtype == dtype
    expected = (weights.double().unsqueeze(1) * jacobian.double()).sum(0)
    bound = (weights.double().abs().unsqueeze(1) * jacobian.double().abs()).sum(0)
    unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float64).eps)
    assert ((direction.double() - expected).abs() <= 2 * unit * bound + 1e-7 * (unit > 1e-10) * bound).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 17)], ids=str)
def test_gradients_by_finite_differences(shape, generator):
    jacobian = draw(shape, torch.float64, generator).requires_grad_()
    weights = draw(shape[:1], torch.float64, generator).requires_grad_()
    assert torch.autograd.gradcheck(ops.gram, (jacobian,))
    assert torch.autograd.gradcheck(ops.combine, (jacobian, weights))


def test_gram_of_strided_rows(generator):
    jacobian = draw((17, 3), torch.float32, generator).T
    torch.testing.assert_close(ops.gram(jacobian), ops.gram(jacobian.contiguous()))


def test_autocast_changes_nothing(device, generator):
    jacobian, weights = draw((3, 100), torch.float32, generator), draw((3,), torch.float32, generator)
    gramian, direction = ops.gram(jacobian), ops.combine(jacobian, weights)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(ops.gram(jacobian), gramian)
        assert torch.equal(ops.combine(jacobian, weights), direction)


def test_half_precision_accumulates_in_float32(device):
    jacobian = torch.ones(1, 100_000, dtype=torch.float16, device=device)  # the sum is beyond float16's 65504
    assert ops.gram(jacobian).item() == 100_000


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.gram(torch.zeros(3)), ValueError, r"\[K, P\], found \[3\]"),
        (lambda: ops.gram(torch.zeros(3, 2, dtype=torch.int32)), TypeError, "found torch.int32"),
        (lambda: ops.combine(torch.zeros(3, 2), torch.zeros(2)), ValueError, r"found \[3, 2\] and \[2\]"),
        (lambda: ops.combine(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)), TypeError, "torch.int64"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
