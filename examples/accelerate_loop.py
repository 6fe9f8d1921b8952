"""A loop of Hugging Face Accelerate, with mixed precision, accumulation and EMA; the lines marked with < differ.

accelerate launch --num_processes 2 accelerate_loop.py --mixed-precision bf16
"""

from __future__ import annotations

import argparse
import copy

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import diffmtl_fast as dm
from diffmtl_fast.adapters import accelerate as adapter


class Denoiser(nn.Module):
    """Predicts the noise; in your model's place."""

    def __init__(self, width: int, hidden: int, timesteps: int) -> None:
        super().__init__()
        self.time = nn.Embedding(timesteps, hidden)
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the noise in x [B, width] at timesteps t [B]."""
        return self.last(torch.tanh(self.first(x) + self.time(t)))


def train(args: argparse.Namespace) -> tuple[dm.ClusteredMTL, list[float]]:
    """Train; return the wrapper and the mean loss of every step."""
    accelerator = Accelerator(
        cpu=args.cpu, mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulate
    )
    torch.manual_seed(args.seed + accelerator.process_index)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, args.timesteps, dtype=torch.float64), 0)
    alpha, sigma = alphas.sqrt().float(), (1 - alphas).sqrt().float()
    model = Denoiser(args.width, args.hidden, args.timesteps)
    ema = copy.deepcopy(model).requires_grad_(False).to(accelerator.device)

    clusters = dm.cluster_snr(torch.log(alphas / (1 - alphas)), k=args.clusters)  # <
    mtl = dm.ClusteredMTL(model, num_clusters=clusters.k, weighting=dm.PCGrad())  # <
    mtl = adapter.prepare(accelerator, mtl)  # < was: model = accelerator.prepare(model)
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=args.lr))
    losses = []
    for _ in range(args.steps):
        x0 = torch.randn(args.batch, 1).expand(-1, args.width).to(accelerator.device)  # your data
        t, cluster = clusters.sample(len(x0), device=accelerator.device)  # < was: t = torch.randint(...)
        noise = torch.randn_like(x0)
        noisy = alpha.to(t.device)[t, None] * x0 + sigma.to(t.device)[t, None] * noise
        with adapter.accumulate(accelerator, mtl):  # < was: accelerator.accumulate(model)
            pred = mtl(noisy, t, cluster=cluster)  # < was: model(noisy, t)
            loss = dm.ops.sample_mse(pred, noise)  # < was: mse_loss(pred, noise); one per sample
            adapter.backward(accelerator, mtl, loss)  # < was: accelerator.backward(loss.mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(parameter.detach(), 1 - args.ema)
        losses.append(loss.detach().mean())
    return mtl, torch.stack(losses).tolist()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=16, help="numbers in a sample")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--timesteps", type=int, default=1000)
    parser.add_argument("--clusters", type=int, default=5)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accumulate", type=int, default=2, help="batches of an optimizer step")
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    _, losses = train(parse())
    print(f"loss: {losses[0]:.3f} at first, {sum(losses[-20:]) / len(losses[-20:]):.3f} in the end")
