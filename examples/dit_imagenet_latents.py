"""A DiT with learned variance on latents with labels, in one or several processes; lines marked with < differ.

torchrun --nproc-per-node 8 dit_imagenet_latents.py --hidden 1152 --depth 28 --heads 16 --size 32 --classes 1000
"""

from __future__ import annotations

import argparse
import copy
import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DiTTransformer2DModel
from torch import Tensor

import diffmtl_fast as dm


def build(args: argparse.Namespace) -> DiTTransformer2DModel:
    """Return a DiT that predicts noise and variance, and drops one label in ten for classifier-free guidance."""
    return DiTTransformer2DModel(
        num_attention_heads=args.heads,
        attention_head_dim=args.hidden // args.heads,
        in_channels=args.channels,
        out_channels=2 * args.channels,
        num_layers=args.depth,
        sample_size=args.size,
        num_embeds_ada_norm=args.classes,
    ).to(args.device)


def sample_losses(call: Callable[..., Any], x0: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Return the hybrid loss [B]: squared error, and the bound's term in bits, which trains the variance alone."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=t.device)
    total = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones_like(total[:1]), total[:-1]])
    posterior = beta * (1 - before) / (1 - total)
    posterior[0] = posterior[1]
    shrink = beta / ((1 - total) * (1 - beta)).sqrt()
    column = torch.stack(
        [total.sqrt(), (1 - total).sqrt(), shrink, beta.log(), posterior.log(), (1 - beta).sqrt()]
    )
    alpha, sigma, shrink, most, least, keep = column.float()[:, t, None, None, None]

    noisy = alpha * x0 + sigma * noise
    pred, fraction = call(noisy, t, y).sample.float().chunk(2, 1)
    log_var = least + (fraction + 1) / 2 * (most - least)
    apart = shrink * (pred.detach() - noise)
    kl = 0.5 * (log_var - least - 1 + (least - log_var).exp() + apart**2 * (-log_var).exp())
    centred = x0 - (noisy / keep - shrink * pred.detach())
    above, below = (torch.special.ndtr((centred + d / 255) * (-0.5 * log_var).exp()) for d in (1, -1))
    above, below = above.masked_fill(x0 > 0.999, 1.0), below.masked_fill(x0 < -0.999, 0.0)
    bound = torch.where(t[:, None, None, None] == 0, -(above - below).clamp(min=1e-12).log(), kl)
    return dm.ops.sample_mse(pred, noise) + bound.flatten(1).mean(1) / math.log(2)  # < was: … .mean()


def draw(args: argparse.Namespace, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, noise, t and labels."""
    y = torch.randint(args.classes, (len(t),), device=t.device)
    pattern = torch.cos(y[:, None, None] + torch.arange(args.channels, device=t.device)[:, None, None, None])
    x0 = pattern.movedim(0, 1).expand(-1, -1, args.size, args.size).contiguous()  # your latents
    return x0, torch.randn_like(x0), t, y


def train(args: argparse.Namespace) -> tuple[dm.ClusteredMTL, list[float]]:
    """Train; return the wrapper and the mean loss of every step."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(args.seed + rank)
    model = build(args)
    ema = copy.deepcopy(model).requires_grad_(False)

    total = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)  # <
    clusters = dm.cluster_snr(torch.log(total / (1 - total)), k=args.clusters)  # <
    mtl = dm.ClusteredMTL(model, num_clusters=clusters.k, weighting=dm.PCGrad())  # < was: DDP(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0)
    history = []
    for _ in range(args.steps):
        t, cluster = clusters.sample(args.batch, device=args.device)  # < was: t = torch.randint(...)
        loss = sample_losses(lambda *x, c=cluster: mtl(*x, cluster=c), *draw(args, t))  # < was: model
        optimizer.zero_grad()
        mtl.backward(loss)  # < was: loss.mean().backward()
        optimizer.step()
        for average, parameter in zip(ema.parameters(), mtl.module.parameters(), strict=True):
            average.lerp_(parameter.detach(), 1 - args.ema)
        history.append(loss.detach().mean())
    return mtl, torch.stack(history).tolist()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"hidden": 32, "depth": 1, "heads": 2, "channels": 4, "size": 4, "classes": 10}
    for name, value in ({"steps": 60, "batch": 20, "clusters": 5} | sizes).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--ema", type=float, default=0.9999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse()
    if "RANK" in os.environ:
        dist.init_process_group("gloo" if options.device == "cpu" else "nccl")
        options.device = options.device if options.device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}"
    _, losses = train(options)
    print(f"loss: {losses[0]:.3f} at first, {sum(losses[-20:]) / len(losses[-20:]):.3f} in the end")
