"""The structure of diffusers' train_text_to_image.py; the lines marked with < differ from it.

accelerate launch diffusers_text_to_image.py --size 512 --pretrained stable-diffusion-v1-5/stable-diffusion-v1-5
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import diffmtl_fast as dm
from diffmtl_fast.adapters import accelerate as adapter
from diffmtl_fast.diffusion import log_snr, scheduler_weights

COLOURS = {"red": (1.0, -1, -1), "green": (-1.0, 1, -1), "blue": (-1.0, -1, 1), "white": (1.0, 1, 1)}
PARTS = (CLIPTokenizer, CLIPTextModel, AutoencoderKL, UNet2DConditionModel, DDPMScheduler)


def build(args: argparse.Namespace) -> list[Any]:
    """Return the PARTS: pretrained, or tiny and random, without a tokenizer."""
    if args.pretrained:
        names = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
        return [p.from_pretrained(args.pretrained, subfolder=n) for p, n in zip(PARTS, names, strict=True)]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=128, max_position_embeddings=8, **sizes)
    small = {"norm_num_groups": 4, "layers_per_block": 1, "block_out_channels": (16, 32)}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(**small, **blocks)
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}
    unet = UNet2DConditionModel(8, **small, **blocks, cross_attention_dim=16, attention_head_dim=2)
    return [None, CLIPTextModel(text), vae, unet, DDPMScheduler(beta_schedule="scaled_linear")]


def load(args: argparse.Namespace, tokenizer: CLIPTokenizer | None) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of an image in [-1, 1] and the tokens of its caption; your data in their place."""
    pairs = []
    for caption, colour in COLOURS.items():
        tokens = torch.tensor([*caption.encode().ljust(8)])  # for the tiny text encoder
        if tokenizer is not None:
            tokens = tokenizer(caption, padding="max_length", return_tensors="pt").input_ids[0]
        image = torch.tensor(colour).view(3, 1, 1).expand(-1, args.size, args.size)
        pairs += [(image, tokens)] * (args.samples // len(COLOURS))
    return pairs


def sample_losses(call: Any, scheduler: DDPMScheduler, weights: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    """Return the weighted squared error [B] of the predicted noise."""
    latents, noise, t, text = batch
    pred = call(scheduler.add_noise(latents, noise, t), t, text).sample
    return dm.ops.sample_mse(pred, noise) * weights[t]  # < was: the lines under `if args.snr_gamma is None`


def train(args: argparse.Namespace) -> tuple[dm.ClusteredMTL, list[float]]:
    """Train and save a pipeline; return the wrapper and the mean loss of every step."""
    accelerator = Accelerator(cpu=args.cpu, gradient_accumulation_steps=args.accumulate)
    set_seed(args.seed, device_specific=True)
    tokenizer, text_encoder, vae, unet, scheduler = build(args)
    for frozen in (text_encoder, vae):
        frozen.requires_grad_(False).to(accelerator.device)
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr)
    loader = DataLoader(load(args, tokenizer), args.batch, shuffle=True, drop_last=True)

    weights = scheduler_weights(scheduler, "min_snr", gamma=args.snr_gamma).to(accelerator.device)  # <
    clusters = dm.cluster_snr(log_snr(scheduler), k=args.clusters)  # <
    mtl = dm.ClusteredMTL(unet, num_clusters=clusters.k, weighting=dm.NashMTL())  # <
    mtl = adapter.prepare(accelerator, mtl)  # < was: unet among those below
    optimizer, loader = accelerator.prepare(optimizer, loader)
    ema.to(accelerator.device)
    losses: list[Tensor] = []
    while len(losses) < args.steps * args.accumulate:
        for images, tokens in loader:
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
                text = text_encoder(tokens).last_hidden_state
            noise = torch.randn_like(latents)
            t, cluster = clusters.sample(len(images), device=images.device)  # < was: t = torch.randint(...)
            batch = latents, noise, t, text
            with accelerator.accumulate(mtl):  # < was: unet
                loss = sample_losses(partial(mtl, cluster=cluster), scheduler, weights, batch)  # <
                adapter.backward(accelerator, mtl, loss)  # < was: accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(unet.parameters())
            losses.append(loss.detach().mean())
    if args.output and accelerator.is_main_process:
        ema.copy_to(unet.parameters())
        accelerator.unwrap_model(unet).save_pretrained(args.output / "unet")
    return mtl, torch.stack(losses).tolist()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    numbers = {"steps": 60, "batch": 10, "accumulate": 1, "samples": 200, "size": 16, "clusters": 5}
    for name, value in (numbers | {"seed": 0, "lr": 2e-3, "snr-gamma": 5.0}).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--pretrained", help="a pipeline of diffusers; tiny and random without it")
    parser.add_argument("--output", type=Path, help="where to save the UNet")
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    _, losses = train(parse())
    print(f"loss: {losses[0]:.3f} at first, {sum(losses[-20:]) / len(losses[-20:]):.3f} in the end")
