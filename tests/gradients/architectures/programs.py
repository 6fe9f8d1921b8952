"""Random programs: every parameter raw, derived, several times in one call, in any order."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Family, rows

WIDTH = 4
#: A parameter [4] and others to a tensor [4] that is derived from them.
VECTORS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda v, u: v,
    lambda v, u: 1 + v,
    lambda v, u: v * u,
    lambda v, u: v.exp(),
    lambda v, u: v.flip(0),
    lambda v, u: torch.cat([v[:2], u[2:]]),
    lambda v, u: (v + u).tanh(),
    lambda v, u: v.detach() + u,
]
#: A vector and a matrix [4, 4] to a matrix.
MATRICES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda w, v: w,
    lambda w, v: w.T,
    lambda w, v: w * v[:, None],
    lambda w, v: w + v,
    lambda w, v: w @ w,
    lambda w, v: torch.outer(v, v),
    lambda w, v: F.normalize(w, dim=1),
    lambda w, v: torch.diag(v) + w,
]
#: An activation [B, 4], a matrix and two vectors to an activation.
OPERATIONS: list[Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = [
    lambda h, w, v, u: F.linear(h, w, v),
    lambda h, w, v, u: F.linear(h, w),
    lambda h, w, v, u: F.linear(h * u, w, v),
    lambda h, w, v, u: h @ w + u,
    lambda h, w, v, u: F.layer_norm(h, (WIDTH,), v, u),
    lambda h, w, v, u: F.rms_norm(h, (WIDTH,), v) + u,
    lambda h, w, v, u: F.group_norm(h, 2, v, u),
    lambda h, w, v, u: F.conv1d(h[:, None], w[:, None], v, padding=2)[:, :, 1:5].mean(1),
    lambda h, w, v, u: F.conv1d(h[..., None], w[..., None], u)[..., 0],
    lambda h, w, v, u: h * v + u,
    lambda h, w, v, u: torch.lerp(h, v, u.sigmoid()),
    lambda h, w, v, u: torch.where(h > 0, h * v, u),
    lambda h, w, v, u: F.layer_norm(F.linear(h, w, v), (WIDTH,), u, v),
    lambda h, w, v, u: torch.cat([h[:, :2] * v[:2], (h * u)[:, 2:]], 1),
]


class Program(nn.Module):
    """A random sequence of operations on two matrices and three vectors, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, WIDTH) / 2) for _ in range(2)])
        self.vectors = nn.ParameterList([nn.Parameter(torch.rand(WIDTH) + 0.5) for _ in range(3)])
        self.seed = seed

    def forward(self, x: Tensor) -> Tensor:
        """Run the program."""
        draw = random.Random(self.seed)

        def vector() -> Tensor:
            derive = draw.choice(VECTORS)
            return derive(draw.choice(self.vectors), draw.choice(self.vectors))

        for _ in range(draw.randint(1, 4)):
            matrix = draw.choice(MATRICES)(draw.choice(self.matrices), draw.choice(self.vectors))
            x = torch.tanh(draw.choice(OPERATIONS)(x, matrix, vector(), vector()))
        return x


add = Family("programs")
CASES = add.cases
for seed in range(24):
    add(str(seed), functools.partial(Program, seed), rows(WIDTH))
