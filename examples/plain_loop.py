"""A plain PyTorch loop, one task per interval of timesteps; lines marked with < differ from ordinary training."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import diffmtl_fast as dm


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
    torch.manual_seed(args.seed)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, args.timesteps, dtype=torch.float64), 0)
    alpha, sigma = alphas.sqrt().float(), (1 - alphas).sqrt().float()
    model = Denoiser(args.width, args.hidden, args.timesteps).to(args.device)

    clusters = dm.cluster_snr(torch.log(alphas / (1 - alphas)), k=args.clusters)  # <
    mtl = dm.ClusteredMTL(model, num_clusters=clusters.k, weighting=dm.PCGrad())  # <
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    losses = []
    for _ in range(args.steps):
        x0 = torch.randn(args.batch, 1).expand(-1, args.width).to(args.device)  # your data
        t, cluster = clusters.sample(len(x0), device=args.device)  # < was: t = torch.randint(...)
        noise = torch.randn_like(x0)
        noisy = alpha.to(t.device)[t, None] * x0 + sigma.to(t.device)[t, None] * noise
        pred = mtl(noisy, t, cluster=cluster)  # < was: model(noisy, t)
        loss = dm.ops.sample_mse(pred, noise)  # < was: mse_loss(pred, noise); one per sample
        optimizer.zero_grad()
        mtl.backward(loss)  # < was: loss.mean().backward()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, mtl.last.grad_norm)
        optimizer.step()
        losses.append(loss.detach().mean())
    return mtl, torch.stack(losses).tolist()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=16, help="numbers in a sample")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--timesteps", type=int, default=1000)
    parser.add_argument("--clusters", type=int, default=5)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    _, losses = train(parse())
    print(f"loss: {losses[0]:.3f} at first, {sum(losses[-20:]) / len(losses[-20:]):.3f} in the end")
