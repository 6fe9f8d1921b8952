"""A LightningModule with automatic and one with manual optimisation; lines marked with < differ without tasks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import diffmtl_fast as dm
from diffmtl_fast.adapters.lightning import ClusteredBackward

TOTAL = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)  # ᾱ


class Denoiser(nn.Module):
    """Predicts the noise; in your model's place."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.time = nn.Embedding(1000, hidden)
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the noise in x [B, width] at timesteps t [B]."""
        return self.last(torch.tanh(self.first(x) + self.time(t)))


def sample_losses(call: Callable[..., Tensor], x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the squared error [B] of the predicted noise."""
    total = TOTAL[t.cpu()].to(t.device)
    noisy = dm.ops.add_noise(x0, noise, total.sqrt().float(), (1 - total).sqrt().float())
    return dm.ops.sample_mse(call(noisy, t), noise)  # < was: mse_loss(...); one per sample


class Diffusion(ClusteredBackward, lightning.LightningModule):  # < was: lightning.LightningModule
    """Trains a denoiser; Lightning accumulates, clips and steps."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.lr, self.losses = args.lr, list[Tensor]()
        model = Denoiser(args.width, args.hidden)
        self.clusters = dm.cluster_snr(torch.log(TOTAL / (1 - TOTAL)), k=args.clusters)  # <
        self.mtl = dm.ClusteredMTL(model, self.clusters.k, dm.PCGrad())  # < was: self.model = model

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the losses [B] of data [B, width]."""
        (x0,) = batch
        t, cluster = self.clusters.sample(len(x0), device=self.device)  # < was: t = torch.randint(...)
        call = partial(self.mtl, cluster=cluster)  # < was: self.model
        loss = sample_losses(call, x0, torch.randn_like(x0), t)
        self.losses.append(loss.detach().mean())
        self.log("loss", self.losses[-1])
        return loss  # < was: loss.mean()

    def configure_optimizers(self) -> Any:
        """Return AdamW."""
        return torch.optim.AdamW(dm.param_groups(self.mtl.module, self.mtl.weighting, lr=self.lr))


class ManualDiffusion(Diffusion):
    """The same with manual optimisation, as float16 and several optimizers need it."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], number: int) -> None:
        """Take a step on data [B, width]."""
        optimizer = self.optimizers()
        loss = super().training_step(batch, number)
        optimizer.zero_grad()
        self.mtl.backward(loss)  # < was: self.manual_backward(loss.mean())
        optimizer.step()


def train(args: argparse.Namespace) -> tuple[dm.ClusteredMTL, list[float]]:
    """Train; return the wrapper and the mean loss of every step."""
    lightning.seed_everything(args.seed, verbose=False)
    data = torch.randn(args.steps * args.batch, 1).expand(-1, args.width).contiguous()  # your data
    module = ManualDiffusion(args) if args.manual else Diffusion(args)
    trainer = lightning.Trainer(
        max_steps=args.steps, accelerator=args.accelerator, devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(data), args.batch, shuffle=True))
    return module.mtl, torch.stack(module.losses).tolist()


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
    parser.add_argument("--manual", action="store_true", help="optimise by hand")
    parser.add_argument("--accelerator", default="auto", help="Lightning's")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    _, losses = train(parse())
    print(f"loss: {losses[0]:.3f} at first, {sum(losses[-20:]) / len(losses[-20:]):.3f} in the end")
