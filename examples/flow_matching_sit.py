"""Flow matching as in SiT, with data at t = 1; lines marked with < differ from ordinary training."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

import diffmtl_fast as dm
from diffmtl_fast.clustering import UniformTime


class Velocity(nn.Module):
    """Predicts the velocity; in your model's place."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity at x [B, width] and times t [B]."""
        return self.last(torch.tanh(self.first(x) + self.time(t[:, None])))


def draw(args: argparse.Namespace, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return data, noise [B, width] and t [B]."""
    x0 = torch.randn(len(t), 1, device=t.device).expand(-1, args.width).contiguous()  # your data
    return x0, torch.randn_like(x0), t


def sample_losses(call: Callable[..., Tensor], x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the squared error [B] against x0 − noise: what `transport.training_losses` does, with t given."""
    pred = call(dm.ops.add_noise(x0, noise, t, 1 - t), t)  # x_t = t x0 + (1 − t) noise
    return dm.ops.denoising_loss(pred, x0, noise, prediction="velocity", data_at=1)  # < was: mean_flat(...)


def train(args: argparse.Namespace) -> tuple[dm.ClusteredMTL, list[float]]:
    """Train; return the wrapper and the mean loss of every step."""
    torch.manual_seed(args.seed)
    model = Velocity(args.width, args.hidden).to(args.device)

    clusters = dm.cluster_noise(UniformTime(data_at=1), k=args.clusters)  # <
    mtl = dm.ClusteredMTL(model, num_clusters=clusters.k, weighting=dm.PCGrad())  # <
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0)
    history = []
    for _ in range(args.steps):
        t, cluster = clusters.sample(
            args.batch, device=args.device
        )  # < was: t, x0, x1 = transport.sample(x1)
        loss = sample_losses(lambda *x, c=cluster: mtl(*x, cluster=c), *draw(args, t))  # < was: model
        optimizer.zero_grad()
        mtl.backward(loss)  # < was: loss.mean().backward()
        optimizer.step()
        history.append(loss.detach().mean())
    return mtl, torch.stack(history).tolist()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=16, help="numbers in a sample")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--clusters", type=int, default=5)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    _, losses = train(parse())
    print(f"loss: {losses[0]:.3f} at first, {sum(losses[-20:]) / len(losses[-20:]):.3f} in the end")
