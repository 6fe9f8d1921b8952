"""EDM2's loss with a log-variance learned for every noise level; lines marked with < differ from EDM2 itself."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import diffmtl_fast as dm


class Precond(nn.Module):
    """EDM's preconditioning of a network; in your model's place."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.level = nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, sigma: Tensor, data: float = 0.5) -> Tensor:
        """Return the denoised x [B, width] at noise levels sigma [B, 1]."""
        total = (sigma**2 + data**2).sqrt()
        raw = self.last(torch.tanh(self.first(x / total) + self.level(sigma.log() / 4)))
        return (data / total) ** 2 * x + sigma * data / total * raw


def draw(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return data, noise [B, width] and noise levels [B]."""
    x0 = 0.5 * torch.randn(args.batch, 1, device=args.device).expand(-1, args.width).contiguous()  # your data
    sigma = (args.p_mean + args.p_std * torch.randn(args.batch, device=args.device)).exp()
    return x0, torch.randn_like(x0), sigma


def sample_losses(model: nn.Module, x0: Tensor, noise: Tensor, sigma: Tensor, data: float = 0.5) -> Tensor:
    """Return the weighted squared error [B] of the denoised samples."""
    denoised = model(x0 + sigma[:, None] * noise, sigma[:, None])
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    return dm.ops.denoising_loss(
        denoised, x0, noise, prediction="x0", weight=weight
    )  # < was: weight * (…) ** 2


def train(args: argparse.Namespace) -> tuple[nn.Module, dm.ContinuousUncertainty, list[float]]:
    """Train; return the model, the weighting and the mean unweighted loss of every step."""
    torch.manual_seed(args.seed)
    model = Precond(args.width, args.hidden).to(args.device)
    weighting = dm.ContinuousUncertainty().to(args.device)  # < was: return_logvar=True in the model
    optimizer = torch.optim.Adam(dm.param_groups(model, weighting, lr=args.lr))  # <
    history = []
    for _ in range(args.steps):
        x0, noise, sigma = draw(args)
        loss = sample_losses(model, x0, noise, sigma)
        optimizer.zero_grad()
        weighting(
            loss, -2 * sigma.log()
        ).backward()  # < was: (loss / logvar.exp() + logvar).mean().backward()
        optimizer.step()
        history.append(loss.detach().mean())
    return model, weighting, torch.stack(history).tolist()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=16, help="numbers in a sample")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--p-mean", type=float, default=-0.4, help="mean of log σ")
    parser.add_argument("--p-std", type=float, default=1.0, help="standard deviation of log σ")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    *_, losses = train(parse())
    print(f"loss: {losses[0]:.3f} at first, {sum(losses[-20:]) / len(losses[-20:]):.3f} in the end")
