"""The structure of diffusers' train_unconditional.py; the lines marked with < differ from it.

accelerate launch diffusers_unconditional.py --images folder --size 64 --channels 128 256 512 --steps 100000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import diffmtl_fast as dm
from diffmtl_fast.adapters import accelerate as adapter
from diffmtl_fast.data import image_folder
from diffmtl_fast.diffusion import log_snr


def load(args: argparse.Namespace) -> Tensor:
    """Return images in [-1, 1], [N, 3, size, size]: those of a folder, or made-up ones of one colour each."""
    if args.images:
        return image_folder(args.images, size=args.size).images(args.samples).train
    colours = torch.rand(args.samples, 3, 1, 1) * 2 - 1
    return colours.expand(-1, -1, args.size, args.size).contiguous()


def sample_losses(
    call: Callable[..., Any], scheduler: DDPMScheduler, images: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Return the squared error [B] of the predicted noise."""
    pred = call(scheduler.add_noise(images, noise, t), t).sample
    return dm.ops.sample_mse(pred, noise)  # < was: F.mse_loss(pred, noise); one per sample


def train(args: argparse.Namespace) -> tuple[dm.ClusteredMTL, list[float]]:
    """Train and save a pipeline; return the wrapper and the mean loss of every step."""
    accelerator = Accelerator(cpu=args.cpu, gradient_accumulation_steps=args.accumulate)
    set_seed(args.seed, device_specific=True)
    model = UNet2DModel(
        sample_size=args.size, block_out_channels=args.channels, layers_per_block=args.layers,
        norm_num_groups=min(32, args.channels[0] // 4), attention_head_dim=8,
        down_block_types=["DownBlock2D"] * (len(args.channels) - 1) + ["AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * (len(args.channels) - 1),
    )  # fmt: skip
    ema = EMAModel(model.parameters(), use_ema_warmup=True, model_cls=UNet2DModel, model_config=model.config)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    loader = DataLoader(TensorDataset(load(args)), args.batch, shuffle=True, drop_last=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=args.warmup, num_training_steps=args.steps)

    clusters = dm.cluster_snr(log_snr(scheduler), k=args.clusters)  # <
    mtl = dm.ClusteredMTL(model, num_clusters=clusters.k, weighting=dm.PCGrad())  # <
    mtl = adapter.prepare(accelerator, mtl)  # < was: model among those below
    optimizer, loader, schedule = accelerator.prepare(optimizer, loader, schedule)
    ema.to(accelerator.device)
    losses: list[Tensor] = []
    while len(losses) < args.steps * args.accumulate:
        for (images,) in loader:
            noise = torch.randn_like(images)
            t, cluster = clusters.sample(len(images), device=images.device)  # < was: t = torch.randint(...)
            with accelerator.accumulate(mtl):  # < was: model
                call = partial(mtl, cluster=cluster)  # < was: model
                loss = sample_losses(call, scheduler, images, noise, t)
                adapter.backward(accelerator, mtl, loss)  # < was: accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(model.parameters())
            losses.append(loss.detach().mean())
    if args.output and accelerator.is_main_process:
        ema.copy_to(model.parameters())
        DDPMPipeline(accelerator.unwrap_model(model), scheduler).save_pretrained(args.output)
    return mtl, torch.stack(losses).tolist()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"steps": 60, "warmup": 5, "batch": 10, "accumulate": 1, "samples": 200, "size": 8, "layers": 1}
    for name, value in (numbers | {"clusters": 5, "seed": 0}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--images", help="a folder of images; made-up ones without it")
    parser.add_argument("--output", type=Path, help="where to save the pipeline")
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    _, losses = train(parse())
    print(f"loss: {losses[0]:.3f} at first, {sum(losses[-20:]) / len(losses[-20:]):.3f} in the end")
