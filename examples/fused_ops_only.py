"""The fused ops alone: a loop without clusters or wrapper; lines marked with < differ from the eager ones."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import diffmtl_fast as dm


class Denoiser(nn.Module):
    """Predicts v; in your model's place."""

    def __init__(self, width: int, hidden: int, timesteps: int) -> None:
        super().__init__()
        self.time = nn.Embedding(timesteps, hidden)
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return v of x [B, width] at timesteps t [B]."""
        return self.last(torch.tanh(self.first(x) + self.time(t)))


def draw(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return data [B, width], the seed of their noise, and timesteps [B]."""
    x0 = torch.randn(args.batch, 1, device=args.device).expand(-1, args.width).contiguous()  # your data
    seed = torch.randint(2**62, (), device=args.device)  # < was: noise = torch.randn_like(x0)
    return x0, seed, torch.randint(args.timesteps, (args.batch,), device=args.device)


def sample_losses(model: nn.Module, x0: Tensor, seed: Tensor, t: Tensor) -> Tensor:
    """Return the Min-SNR weighted squared error [B] of v; noise and target are never stored."""
    timesteps = model.time.num_embeddings
    total = torch.cumprod(1 - torch.linspace(1e-4, 0.02, timesteps, device=t.device), 0)[t]
    alpha, sigma = total.sqrt(), (1 - total).sqrt()
    snr = total / (1 - total)
    pred = model(
        dm.ops.add_noise(x0, seed, alpha, sigma), t
    )  # < was: alpha[:, None] * x0 + sigma[:, None] * noise
    weight = snr.clamp(max=5) / (snr + 1)
    return dm.ops.denoising_loss(  # < was: mse_loss(pred, alpha * noise - sigma * x0, ...) * weight
        pred, x0, seed, prediction="v", alpha=alpha, sigma=sigma, weight=weight
    )


def train(args: argparse.Namespace) -> tuple[nn.Module, list[float]]:
    """Train; return the model and the mean loss of every step."""
    torch.manual_seed(args.seed)
    model = Denoiser(args.width, args.hidden, args.timesteps).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    history = []
    for _ in range(args.steps):
        loss = sample_losses(model, *draw(args)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.detach())
    return model, torch.stack(history).tolist()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=16, help="numbers in a sample")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--timesteps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    _, losses = train(parse())
    print(f"loss: {losses[0]:.3f} at first, {sum(losses[-20:]) / len(losses[-20:]):.3f} in the end")
