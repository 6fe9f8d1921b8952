"""Philox noise against its published vectors and its distribution; add_noise against its definition."""

from __future__ import annotations

import pytest
import torch

from diffmtl_fast import ops
from diffmtl_fast.ops.philox import philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known answers of the authors' Random123 distribution for philox4x32-10.
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox(torch.tensor(key), tuple(torch.tensor(word) for word in counter))
    assert [int(word) for word in words] == expected


def test_noise_is_standard_normal(device):
    noise = ops.philox_normal(torch.tensor(3, device=device), torch.empty(64, 4096, device=device)).double()
    count = noise.numel()
    assert noise.mean().abs() < 5 / count**0.5
    assert (noise.var() - 1).abs() < 5 * (2 / count) ** 0.5
    assert (noise.pow(4).mean() - 3).abs() < 5 * (96 / count) ** 0.5
    # Neighbours, samples and seeds are independent.
    other = ops.philox_normal(torch.tensor(4, device=device), torch.empty(64, 4096, device=device)).double()
    for a, b in ((noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:]), (noise, other)):
        assert (a * b).mean().abs() < 5 / a.numel() ** 0.5
    # Kolmogorov-Smirnov against the normal distribution, far beyond its 0.1 % point of 1.95 / √n only if wrong.
    ordered = noise.flatten().sort().values
    steps = torch.arange(count, device=device, dtype=torch.float64) / count
    assert (torch.special.ndtr(ordered) - steps).abs().max() < 1.95 / count**0.5 + 1 / count


def test_noise_depends_on_the_seed_alone(device):
    like = torch.empty(3, 2, 5, device=device)
    seed = torch.tensor(11, device=device)
    assert torch.equal(ops.philox_normal(seed, like), ops.philox_normal(seed, like.half()))
    assert not torch.equal(ops.philox_normal(seed, like), ops.philox_normal(seed + 1, like))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seeded", [False, True])
def test_add_noise(seeded, dtype, generator, device):
    x0 = torch.randn(5, 3, 7, generator=generator, device=device).to(dtype)
    alpha, sigma = torch.rand(2, 5, generator=generator, device=device)
    noise = torch.randn(5, 3, 7, generator=generator, device=device).to(dtype)
    given = torch.tensor(9, device=device) if seeded else noise
    drawn = ops.philox_normal(given, x0) if seeded else noise
    found = ops.add_noise(x0, given, alpha, sigma)
    column = (-1, 1, 1)
    expected = alpha.double().view(column) * x0.double() + sigma.double().view(column) * drawn.double()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert found.dtype == dtype
    assert ((found.double() - expected).norm() / expected.norm()).item() < tolerance


def test_add_noise_has_the_gradient_of_its_definition(generator, device):
    x0, noise = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator, device=device).requires_grad_()
    alpha, sigma = torch.rand(2, 3, generator=generator, device=device, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: ops.add_noise(a, b, alpha, sigma), (x0, noise))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "velocity"])
def test_a_seed_stands_for_its_noise(prediction, generator, device):
    seed = torch.tensor(77, device=device)
    pred, x0 = torch.randn(2, 4, 3, 5, generator=generator, device=device)
    alpha, sigma = torch.rand(2, 4, generator=generator, device=device)
    scales = {"alpha": alpha, "sigma": sigma} if prediction == "v" else {}
    noise = ops.philox_normal(seed, x0)
    found = ops.denoising_loss(pred, x0, seed, prediction=prediction, **scales)
    assert torch.equal(found, ops.denoising_loss(pred, x0, noise, prediction=prediction, **scales))


@pytest.mark.parametrize(
    ("noise", "alpha", "error", "message"),
    [
        (torch.zeros(2, 4), torch.ones(2), ValueError, r"expected shape \[2, 3\] or a seed, found \[2, 4\]"),
        (
            torch.tensor([1]),
            torch.ones(2),
            TypeError,
            r"int64 scalar tensor, found torch.int64 of shape \[1\]",
        ),
        (torch.tensor(1, dtype=torch.int32), torch.ones(2), TypeError, "found torch.int32"),
        (torch.zeros(2, 3), torch.ones(3), ValueError, r"alpha: expected shape \[2\], found \[3\]"),
        (torch.zeros(2, 3), torch.ones(2, requires_grad=True), ValueError, "alpha: expected a constant"),
    ],
)
def test_refuses(noise, alpha, error, message):
    with pytest.raises(error, match=message):
        ops.add_noise(torch.zeros(2, 3), noise, alpha, torch.ones(2))


def test_refuses_what_has_no_samples():
    seed, scalar, one = torch.tensor(1), torch.tensor(1.0), torch.ones(1)
    with pytest.raises(ValueError, match=r"x0: expected .*, found a 0-dimensional tensor"):
        ops.add_noise(scalar, seed, one, one)
    with pytest.raises(ValueError, match=r"like: expected .*, found a 0-dimensional tensor"):
        ops.philox_normal(seed, scalar)
    with pytest.raises(TypeError, match=r"x0: expected a floating-point tensor, found torch\.int64"):
        ops.add_noise(torch.zeros(1, 2, dtype=torch.int64), seed, one, one)
