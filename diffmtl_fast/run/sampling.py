"""Drawing pictures from a trained denoiser."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import UserError, blame
from .._extras import require
from ..data import Autoencoder, Classes, Conditioning, ImageData
from ..data.items import Conditions
from ..diffusion import noise_process
from ..train.components import Data, denoise, import_object, prediction
from ..train.config import Sampling


def build_sampler(config: Sampling, scheduler: Any, clip: bool = True) -> Any:
    """The sampler, on the noise schedule of training.

    Args:
        config: names it.
        scheduler: of training.
        clip: let it keep its estimates of the data in [-1, 1], where it does so by default.

    Raises:
        UserError: it cannot be made from that schedule.
    """
    sampler_class: Any = type(scheduler)
    if config.scheduler.path != "auto":
        sampler_class = import_object("sampling.scheduler", config.scheduler.path)
    elif not noise_process(scheduler).continuous:
        sampler_class = require("diffusers", "train").DDIMScheduler
    with blame("sampling"):
        cuts = not clip and "clip_sample" in inspect.signature(sampler_class).parameters
        options = ({"clip_sample": False} if cuts else {}) | config.scheduler.args
        sampler = sampler_class.from_config(scheduler.config, **options)
        sampler.set_timesteps(config.steps)
        _refuse_sampler(sampler, scheduler)
    return sampler


def _refuse_sampler(sampler: Any, scheduler: Any) -> None:
    if len(sampler.timesteps) == 0:
        raise ValueError(f"expected timesteps of {type(sampler).__name__}, found none")
    try:
        found = (
            "FlowMatching" if sampler.config.get("use_flow_sigmas") else type(noise_process(sampler)).__name__
        )
    except (TypeError, ValueError, AttributeError):
        return  # one that no noise process of training is known of
    expected = type(noise_process(scheduler)).__name__
    if found != expected:
        raise ValueError(
            f"expected a sampler of the process of training, {expected}, found {type(sampler).__name__} of {found}"
        )


@torch.no_grad()
def draw(
    model: nn.Module,
    scheduler: Any,
    config: Sampling,
    shape: Sequence[int],
    labels: Conditions,
    seed: int,
    conditioning: Conditioning | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Denoise pictures from noise.

    The noise comes from a generator on the CPU, so that a seed gives the same pictures on every device and with
    every batch size, up to rounding.

    Args:
        model: the denoiser; the EMA weights give the best pictures.
        scheduler: the scheduler of training.
        config: sampler, steps, batch size.
        shape: [N, C, H, W].
        labels: conditions of the pictures, such as int64 [N] classes, or None.
        seed: of the noise.
        conditioning: passes the conditions to the model; by default as ``class_labels``.
        decode: makes pictures of latents; None for pictures, which are kept in [-1, 1].

    Returns:
        float32 [N, C, H, W] on the CPU.

    Raises:
        UserError: the sampler cannot draw with this model, or draws what is not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tuple(shape), generator=generator)
    with blame("model"):
        model.eval()
    parts = []
    for start in range(0, len(noise), config.batch_size):
        part = slice(start, start + config.batch_size)
        sampler, arguments = (
            build_sampler(config, scheduler, clip=decode is None),
            _arguments(conditioning or Classes(0), labels, part, device, config.guidance),
        )
        with blame("sampling"):
            drawn = _denoise(model, sampler, noise[part].to(device), arguments, generator, config.guidance)
            if drawn.shape != noise[part].shape:
                raise ValueError(
                    f"expected pictures {list(noise[part].shape)} of {type(sampler).__name__}, found "
                    f"{list(drawn.shape)}"
                )
            parts.append(drawn)
    pictures = torch.cat(parts)
    if not pictures.isfinite().all():
        raise UserError(
            f"sampling: expected finite pictures, found NaN or infinity after {config.steps} steps of "
            f"{config.scheduler.path} (of pure noise epsilon tells nothing: predict v, or sample)"
        )
    return pictures.clamp(-1.0, 1.0) if decode is None else decode(pictures)


def build_decoder(data: Data, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """What makes pictures of latents: their autoencoder; where it is not known they stay. None for pictures.

    Raises:
        UserError: the autoencoder cannot be loaded.
    """
    if isinstance(data, ImageData) or not data.latent:
        return None
    if data.autoencoder is None:
        return torch.Tensor.cpu
    with blame("data.args.autoencoder"):
        return _autoencoder(data.autoencoder, device).decode


@functools.lru_cache(maxsize=1)
def _autoencoder(folder: str, device: torch.device) -> Autoencoder:
    return Autoencoder(folder, device)


def balanced_labels(count: int, num_classes: int) -> Tensor | None:
    """Classes 0, 1, ... C-1, 0, 1, ..., int64 [count]; None for data without classes."""
    return torch.arange(count) % num_classes if num_classes else None


def _arguments(
    conditioning: Conditioning, labels: Conditions, part: slice, device: torch.device, guidance: float
) -> list[dict[str, Any]]:
    """Arguments of the model for some of the pictures; with guidance also those without a condition."""
    if labels is None:
        return [{}]
    values = labels[part]
    values = values.to(device) if isinstance(values, Tensor) else values
    found = [conditioning.arguments(values)]
    if guidance != 1.0:
        found.append(conditioning.arguments(values, torch.ones(len(values), dtype=torch.bool, device=device)))
    return found


def _denoise(
    model: nn.Module, sampler: Any, x: Tensor, arguments: Any, generator: torch.Generator, guidance: float
) -> Tensor:
    stochastic = "generator" in inspect.signature(sampler.step).parameters
    x = x * getattr(sampler, "init_noise_sigma", 1.0)  # flow matching starts from the noise as it is
    for t in sampler.timesteps:
        scaled = sampler.scale_model_input(x, t) if hasattr(sampler, "scale_model_input") else x
        told = t.to(x.device).expand(len(x))
        output, *without = (prediction(denoise(model, scaled, told, each)) for each in arguments)
        if without:
            output = torch.lerp(without[0], output, guidance)
        x = sampler.step(output.float(), t, x, **({"generator": generator} if stochastic else {})).prev_sample
    return x.float().cpu()
