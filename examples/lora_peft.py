"""LoRA in batches of 1 to 4 samples, with the surgery across the batches of a step; lines marked with < differ.

A small batch has no sample of most clusters, so weighing it by itself would find few conflicts. `ClusterJacobian`
adds up the gradients of every cluster over the batches, and the weights are those of the sums.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import diffmtl_fast as dm
from diffmtl_fast.gradients import ClusterJacobian


class Denoiser(nn.Module):
    """Predicts the noise; in your pretrained model's place."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.time = nn.Embedding(1000, hidden)
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the noise in x [B, width] at timesteps t [B]."""
        return self.last(torch.tanh(self.first(x) + self.time(t)))


TOTAL = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)  # ᾱ


def draw(args: argparse.Namespace, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return data, noise [B, width] and t [B]."""
    x0 = torch.randn(len(t), 1, device=t.device).expand(-1, args.width).contiguous()  # your data
    return x0, torch.randn_like(x0), t


def sample_losses(call: Callable[..., Tensor], x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the squared error [B] of the predicted noise."""
    alpha, sigma = TOTAL.to(t.device)[t].sqrt().float(), (1 - TOTAL.to(t.device)[t]).sqrt().float()
    return dm.ops.sample_mse(call(dm.ops.add_noise(x0, noise, alpha, sigma), t), noise)  # < was: … .mean()


def accumulate(args: argparse.Namespace, jacobian: ClusterJacobian, t: Tensor, cluster: Tensor) -> Tensor:
    """Add up every cluster's gradients over batches of at most `args.batch`; return its losses, summed, [K]."""
    sums = torch.zeros(args.clusters, device=t.device)
    for rows in torch.arange(len(t)).split(args.batch):
        batch, own = draw(args, t[rows]), cluster[rows]
        size = torch.bincount(own)[own]  # makes sums of the clusters' means

        def loss(
            call: Callable[..., Tensor], batch: tuple[Tensor, ...] = batch, size: Tensor = size
        ) -> Tensor:
            return sample_losses(call, *batch) * size

        sums += jacobian(loss, own, add=bool(rows[0]))  # < was: loss.mean().backward()
    return sums


def train(args: argparse.Namespace) -> tuple[nn.Module, list[float]]:
    """Train; return the model with its adapter and the mean loss of every step."""
    torch.manual_seed(args.seed)
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=args.targets)
    model = get_peft_model(Denoiser(args.width, args.hidden), config).to(args.device)
    trained = [p for p in model.parameters() if p.requires_grad]

    clusters = dm.cluster_snr(torch.log(TOTAL / (1 - TOTAL)), k=args.clusters)  # <
    jacobian, weighting = ClusterJacobian(model, clusters.k), dm.PCGrad()  # <
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    history = []
    for _ in range(args.steps):
        t, cluster = clusters.sample(
            args.batch * args.accumulate
        )  # < was: t = torch.randint(...), in every batch
        order = torch.randperm(len(t))
        t, cluster = t[order].to(args.device), cluster[order].to(args.device)
        history.append(accumulate(args, jacobian, t, cluster).sum() / len(t))
        counts = torch.bincount(cluster, minlength=clusters.k)
        rows = jacobian.matrix() / counts.clamp(min=1)[:, None]  # < gradients of the clusters' means
        update = dm.ops.combine(rows, weighting(dm.ops.gram(rows), counts > 0))  # <
        for p, gradient in zip(trained, update.split([p.numel() for p in trained]), strict=True):  # <
            p.grad = gradient.view_as(p)
        optimizer.step()
    return model, torch.stack(history).tolist()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2, help="samples of a batch")
    parser.add_argument("--accumulate", type=int, default=8, help="batches of an optimizer step")
    parser.add_argument("--width", type=int, default=16, help="numbers in a sample")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="+", default=["first", "last"], help="modules that get an adapter")
    parser.add_argument("--clusters", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    _, losses = train(parse())
    print(f"loss: {losses[0]:.3f} at first, {sum(losses[-20:]) / len(losses[-20:]):.3f} in the end")
