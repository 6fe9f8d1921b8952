"""A denoiser in miniature: every kind of layer of diffusion models, on images [6, 2, 4, 4]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

B = 6
SORTED, UNSORTED = [0, 0, 1, 2, 2, 2], [2, 0, 2, 1, 0, 2]


class Block(nn.Module):
    """Attention, modulated by the time step, as in diffusion transformers."""

    def __init__(self, width, dropout):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.proj, self.modulation = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, condition):
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, -1)
        h = self.norm(x) * (1 + scale) + shift
        q, k, v = self.qkv(h).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.dropout(self.proj(h))


class Denoiser(nn.Module):
    """Convolutions, group normalisation, embeddings and two transformer blocks."""

    def __init__(self, width=8, dropout=0.0):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(2, width, 2, stride=2), nn.GroupNorm(2, width)
        self.time, self.label = nn.Linear(1, width), nn.Embedding(5, width)
        self.position = nn.Parameter(0.1 * torch.randn(1, 4, width))
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(2))
        self.head = nn.Conv2d(width, 2 * 4, 1)

    def forward(self, x, t, label=None):
        hidden = self.norm(self.patch(x)).flatten(2).transpose(1, 2) + self.position
        condition = F.silu(self.time(t.to(x.dtype).unsqueeze(1) / 1000))
        if label is not None:
            condition = condition + self.label(label)
        for block in self.blocks:
            hidden = self.run(block, hidden, condition)
        return F.pixel_shuffle(self.head(hidden.transpose(1, 2).unflatten(2, (2, 2))), 2)

    def run(self, block, *args):
        """Run a block."""
        return block(*args)


def make(device, dtype=torch.float64, cls=Denoiser, **options):
    """Return a model and its arguments."""
    torch.manual_seed(0)
    return cls(**options).to(device, dtype), *batch(device, dtype)


def batch(device, dtype=torch.float64, size=B, seed=1):
    """Return images, time steps and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, 4, 4, generator=generator).to(device, dtype)
    t, label = (torch.randint(n, (size,), generator=generator).to(device) for n in (1000, 5))
    return x, t, label
