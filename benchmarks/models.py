"""The models that training steps are timed on, each with a batch: for two CPU cores, and two for a GPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.reference import Batch
from diffmtl_fast._extras import require
from diffmtl_fast.clustering.drawing import hand_over


@dataclass(frozen=True)
class Case:
    """A model and a batch.

    Attributes:
        name: the model's.
        model: the model.
        batch: sorted by cluster.
        num_clusters: K.
        options: the model's keyword arguments; a diffusers model returns a tuple with ``return_dict=False``.
        autocast: run the model under bfloat16 autocast.
        wrapped: what ways of the same step share: the library's wrappers, and with them the Jacobian's memory.
    """

    name: str
    model: nn.Module
    batch: Batch
    num_clusters: int
    options: dict[str, Any]
    autocast: bool = False
    wrapped: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where model and batch are."""
        return self.batch.target.device

    @property
    def sizes(self) -> list[int]:
        """The number of samples of each cluster."""
        return self.batch.cluster.bincount(minlength=self.num_clusters).tolist()

    def to(self, device: torch.device) -> Case:
        """Move the batch, and the model in place."""
        return replace(self, model=self.model.to(device), batch=_map(self.batch, lambda x: x.to(device)))

    def exact(self) -> Case:
        """Return a copy in float64."""
        batch = _map(self.batch, lambda x: x.double() if x.is_floating_point() else x)
        return replace(
            self, model=copy.deepcopy(self.model).double(), batch=batch, autocast=False, wrapped={}
        )

    def predict(self, model: Callable[..., Any], batch: Batch, **extra: Any) -> Tensor:
        """Run the model, or what stands for it, on a batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            output = model(*batch.inputs, **self.options, **extra)
        return output[0] if isinstance(output, tuple) else output

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Return the per-sample mean squared errors, [B]."""
        return _sample_mse(self.predict(model, batch), batch.target)


def as_sampled(cluster: Tensor) -> Tensor:
    """Return a batch's sorted clusters as the library's samplers hand them over: drawn on the host.

    Everything here that gives clusters to the library gives it what this returns, formed outside the timing.
    """
    host = cluster.cpu()
    return hand_over(host, host, cluster.device)[1]


def _sample_mse(pred: Tensor, target: Tensor) -> Tensor:
    return (pred - target).square().flatten(1).mean(1)


def _map(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    inputs = tuple(function(x) for x in batch.inputs)
    return Batch(inputs, function(batch.target), function(batch.cluster))


def _batch(channels: int, size: int, batch_size: int, num_clusters: int, *conditions: Tensor) -> Batch:
    """Draw a batch sorted by cluster, as a stratified sampler does.

    The targets of neighbouring clusters lean to opposite sides. In an untrained model the gradients of all
    noise levels agree, and gradient surgery, which the gate is to check, would have nothing to do.
    """
    x, noise = torch.randn(2, batch_size, channels, size, size)
    cluster = torch.arange(batch_size) * num_clusters // batch_size
    t = cluster * 1000 // num_clusters + torch.randint(1000 // num_clusters, (batch_size,))
    lean = 0.7 - 1.4 * (cluster % 2).view(-1, 1, 1, 1)
    return Batch((x, t, *conditions), noise + lean, cluster)


class DiT(nn.Module):
    """A diffusion transformer with adaptive layer norm (Peebles & Xie, 2023) and SiLU time embedding.

    Modulation starts at PyTorch's defaults instead of zero, so that every parameter has a gradient to compare.
    """

    def __init__(
        self, width: int = 192, depth: int = 6, heads: int = 3, channels: int = 3, size: int = 16
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, width, kernel_size=2, stride=2)
        self.position = Position((size // 2) ** 2, width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4 * channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = self.position(self.patch(x).flatten(2).transpose(1, 2))
        condition = F.silu(self.time(sinusoidal(t, 256).to(self.head.weight.dtype)))
        for block in self.blocks:
            tokens = block(tokens, condition)
        patches = (
            self.head(self.norm(tokens)).transpose(1, 2).unflatten(2, [side // 2 for side in x.shape[2:]])
        )
        return F.pixel_shuffle(patches, 2)


class Position(nn.Module):
    """Add a learned vector to every token; a module of its own, as TorchJD's autogram is quicker that way."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(1, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=2)
        x = x + gate1 * self._attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def sinusoidal(t: Tensor, width: int) -> Tensor:
    """Return sines and cosines of timesteps, [B, width]."""
    frequencies = torch.exp(torch.arange(width // 2, device=t.device) * (-math.log(10_000) / (width // 2)))
    angles = t.float().unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def dit(batch_size: int, num_clusters: int) -> Case:
    """Return the hand-written DiT: width 192, 6 layers, 64 tokens, 4.1M parameters."""
    return Case("DiT", DiT(), _batch(3, 16, batch_size, num_clusters), num_clusters, {})


def tiny_dit(batch_size: int, num_clusters: int) -> Case:
    """Return a DiT that only shows that everything runs: width 24, one layer."""
    model = DiT(width=24, depth=1)
    return Case("DiT, tiny", model, _batch(3, 16, batch_size, num_clusters), num_clusters, {})


def dit_s2(batch_size: int, num_clusters: int) -> Case:
    """Return DiT-S/2 on latents of 32×32×4, without labels: width 384, 12 layers, 256 tokens, 33M parameters."""
    model = DiT(width=384, depth=12, heads=6, channels=4, size=32)
    return Case("DiT-S/2", model, _batch(4, 32, batch_size, num_clusters), num_clusters, {})


def dit_b2(batch_size: int, num_clusters: int) -> Case:
    """Return DiT-B/2 on latents of 32×32×4, without labels: width 768, 12 layers, 256 tokens, 129M parameters."""
    model = DiT(width=768, depth=12, heads=12, channels=4, size=32)
    return Case("DiT-B/2", model, _batch(4, 32, batch_size, num_clusters), num_clusters, {})


def dit_l2(batch_size: int, num_clusters: int) -> Case:
    """Return DiT-L/2 on latents of 32×32×4, without labels: width 1024, 24 layers, 256 tokens, 457M parameters."""
    model = DiT(width=1024, depth=24, heads=16, channels=4, size=32)
    return Case("DiT-L/2", model, _batch(4, 32, batch_size, num_clusters), num_clusters, {})


def unet(batch_size: int, num_clusters: int) -> Case:
    """Return a diffusers UNet2DModel: two levels of 64 and 128 channels, attention in the lower, 16×16 images."""
    model = require("diffusers", "train").UNet2DModel(
        sample_size=16,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    batch = _batch(3, 16, batch_size, num_clusters)
    return Case("UNet2DModel", model, batch, num_clusters, {"return_dict": False})


def small_unet(batch_size: int, num_clusters: int) -> Case:
    """Return a diffusers UNet2DModel of 0.16M parameters, whose operations are small."""
    model = require("diffusers", "train").UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    batch = _batch(3, 16, batch_size, num_clusters)
    return Case("UNet2DModel, small", model, batch, num_clusters, {"return_dict": False})


def diffusers_dit(batch_size: int, num_clusters: int) -> Case:
    """Return a diffusers DiTTransformer2DModel: width 192, 4 layers, 64 tokens.

    In evaluation mode, because its random dropping of labels would make two ways of doing the same step differ.
    """
    model = require("diffusers", "train").DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=48, in_channels=4, num_layers=4, sample_size=16
    )
    batch = _batch(4, 16, batch_size, num_clusters, torch.randint(1000, (batch_size,)))
    return Case("DiTTransformer2DModel", model.eval(), batch, num_clusters, {"return_dict": False})


def conditional_unet(batch_size: int, num_clusters: int) -> Case:
    """Return a diffusers UNet2DConditionModel: like `unet`, with attention to 16 tokens of text in both levels."""
    model = require("diffusers", "train").UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
    )
    batch = _batch(4, 16, batch_size, num_clusters, torch.randn(batch_size, 16, 64))
    return Case("UNet2DConditionModel", model, batch, num_clusters, {"return_dict": False})


def pixart(batch_size: int, num_clusters: int) -> Case:
    """Return a diffusers PixArtTransformer2DModel: width 192, 4 layers, 64 tokens, 16 tokens of text."""
    model = require("diffusers", "train").PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        sample_size=16,
        cross_attention_dim=192,
        caption_channels=64,
        use_additional_conditions=False,
    )
    batch = _batch(4, 16, batch_size, num_clusters, torch.randn(batch_size, 16, 64))
    batch = _reordered(batch, 0, 2, 1)
    options = {"added_cond_kwargs": {}, "return_dict": False}
    return Case("PixArtTransformer2DModel", model, batch, num_clusters, options)


def sd3(batch_size: int, num_clusters: int) -> Case:
    """Return a diffusers SD3Transformer2DModel: width 192, 4 layers, 64 tokens, 16 tokens of text."""
    model = require("diffusers", "train").SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=192,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
    )
    text = torch.randn(batch_size, 16, 64)
    batch = _batch(4, 16, batch_size, num_clusters, text, text.mean(1))
    return Case(
        "SD3Transformer2DModel", model, _reordered(batch, 0, 2, 3, 1), num_clusters, {"return_dict": False}
    )


def _reordered(batch: Batch, *order: int) -> Batch:
    """Put the inputs into the order of a model's arguments."""
    return replace(batch, inputs=tuple(batch.inputs[i] for i in order))


#: by their names on the command line
MODELS: dict[str, Callable[[int, int], Case]] = {
    "tiny": tiny_dit,
    "dit": dit,
    "unet": unet,
    "small-unet": small_unet,
    "diffusers-dit": diffusers_dit,
    "conditional-unet": conditional_unet,
    "pixart": pixart,
    "sd3": sd3,
    "dit-s2": dit_s2,
    "dit-b2": dit_b2,
    "dit-l2": dit_l2,
}
#: as tables call them
TITLES = {
    "tiny": "DiT, tiny",
    "dit": "DiT",
    "unet": "UNet2DModel",
    "small-unet": "UNet2DModel, small",
    "diffusers-dit": "DiTTransformer2DModel",
    "conditional-unet": "UNet2DConditionModel",
    "pixart": "PixArtTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "dit-s2": "DiT-S/2",
    "dit-b2": "DiT-B/2",
    "dit-l2": "DiT-L/2",
}
