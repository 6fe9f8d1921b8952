"""Counter-based normal noise: Philox4x32-10 and Box-Muller, the same in every kernel and in this definition.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The key is the seed; the counter is
(element // 4, 0, sample, 0), and its four words are the noise of four neighbouring elements.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import check_dense, check_floating
from ._library import define_op, refuse_autograd

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of a 32 × 32 bit product, within int64."""
    upper, lower = (factor >> 16) * word, (factor & 0xFFFF) * word
    return (upper + (lower >> 16)) >> 16, (factor * word) & _WORD


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return four words in 0 … 2³²−1, int64, for each counter of four words; `seed` is int64 []."""
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    a, b, c, d = counter
    for _ in range(ROUNDS):
        (high_a, low_a), (high_c, low_c) = _multiply(MULTIPLIERS[0], a), _multiply(MULTIPLIERS[1], c)
        a, b, c, d = high_c ^ b ^ keys[0], low_c, high_a ^ d ^ keys[1], low_a
        keys = [(key + step) & _WORD for key, step in zip(keys, KEY_STEPS, strict=True)]
    return a, b, c, d


def _uniform(word: Tensor) -> Tensor:
    """Map a word to (0, 1] in float32, on a grid of 2⁻²⁴ so that nothing is rounded."""
    return ((word >> 8) + 1).float() * 2.0**-24


def philox_normal_plain(seed: Tensor, like: Tensor) -> Tensor:
    """Compute `philox_normal` by its definition."""
    batch, size = like.shape[0], math.prod(like.shape[1:])
    group = torch.arange(-(-size // 4), device=like.device).expand(batch, -1)
    sample = torch.arange(batch, device=like.device).unsqueeze(1).expand_as(group)
    zero = torch.zeros_like(group)
    u = [_uniform(word) for word in philox(seed, (group, zero, sample, zero))]
    normals = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        length, turn = torch.sqrt(-2 * torch.log(radius)), 2 * math.pi * angle
        normals += [length * torch.cos(turn), length * torch.sin(turn)]
    return torch.stack(normals, dim=2).flatten(1)[:, :size].reshape(like.shape).contiguous()


_philox_normal = define_op(
    "philox_normal(Tensor seed, Tensor like) -> Tensor",
    plain=philox_normal_plain,
    fake=lambda seed, like: like.new_empty(like.shape, dtype=torch.float32),
)
refuse_autograd("philox_normal", "noise depends on nothing that has a gradient")


def is_seed(noise: Tensor) -> bool:
    """Whether an argument that may be noise is the seed of it instead."""
    return not noise.is_floating_point()


def check_seed(seed: Tensor, like: Tensor) -> None:
    """Refuse anything but an int64 scalar beside `like`."""
    check_dense("seed", seed)
    if seed.dtype != torch.int64 or seed.dim() != 0:
        raise TypeError(
            f"seed: expected an int64 scalar tensor, found {seed.dtype} of shape {list(seed.shape)}"
        )
    if seed.device != like.device:
        raise ValueError(f"seed: expected it on {like.device}, found {seed.device}")


def philox_normal(seed: Tensor, like: Tensor) -> Tensor:
    """Standard normal noise that `add_noise` and `denoising_loss` generate from a seed, written out.

    Args:
        seed: int64 scalar tensor, on the device of `like`; a tensor, so that a CUDA graph can change it.
        like: [B, ...], whose shape and device the noise gets.

    Returns:
        float32 [B, ...], contiguous. The same seed gives the same bits on every CPU; on another kind of device the
        last bits of the logarithm and the cosine may differ.

    Raises:
        TypeError: the seed is no int64 scalar.
        ValueError: it is on another device, or `like` has no batch dimension.
    """
    check_floating(like=like)
    check_seed(seed, like)
    if like.dim() == 0:
        raise ValueError("like: expected [B, ...], found a 0-dimensional tensor")
    return _philox_normal(seed, like.detach())
