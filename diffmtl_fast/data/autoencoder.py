"""Pictures to latents and back, through an autoencoder of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._extras import require

#: Pictures decoded at a time, which takes far more memory than a latent does.
DECODED_AT_ONCE = 8


class Autoencoder:
    """An autoencoder of diffusers (AutoencoderKL, AutoencoderTiny, VQModel and the like) with frozen weights.

    Latents are scaled as pipelines of diffusers scale them, to about unit variance: z = (E(x) − shift_factor) ·
    scaling_factor with the factors of its configuration; where that has ``latents_mean`` and ``latents_std`` of
    the channels, z = (E(x) − latents_mean) / latents_std · scaling_factor.

    Args:
        folder: what its ``save_pretrained`` wrote, or that of a pipeline, which has it in ``vae`` or ``vqvae``.
        device: where it runs.
        dtype: of its weights and of the latents.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: it is no autoencoder of pictures that diffusers knows.
    """

    def __init__(
        self, folder: str | Path, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        places = [Path(folder), *(Path(folder) / name for name in ("vae", "vqvae"))]
        place = next((each for each in places if (each / "config.json").is_file()), None)
        if place is None:
            raise FileNotFoundError(f"expected an autoencoder of diffusers, found no config.json in {folder}")
        self.kind = json.loads((place / "config.json").read_text()).get("_class_name")
        known: Any = getattr(require("diffusers", "train"), str(self.kind), None)
        if not (callable(getattr(known, "encode", None)) and callable(getattr(known, "decode", None))):
            raise ValueError(f"expected an autoencoder of diffusers in {place}, found {self.kind}")
        model = known.from_pretrained(place, local_files_only=True, torch_dtype=dtype)
        self._model = model.requires_grad_(False).eval().to(device)
        self.channels: int | None = model.config.get("in_channels")
        self._scale = model.config.get("scaling_factor") or 1.0
        mean, std = (model.config.get(name) for name in ("latents_mean", "latents_std"))
        self._shift = model.config.get("shift_factor") or 0.0 if mean is None else self._by_channel(mean)
        self._std = 1.0 if std is None else self._by_channel(std)

    @torch.no_grad()
    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents [B, c, h, w] of pictures.

        Args:
            x: float [B, C, H, W] in [-1, 1], of the autoencoder's channels.
            generator: draws from the posterior where the autoencoder has one; None for the posterior's mean.

        Raises:
            ValueError: the latents are no finite [B, c, h, w].
        """
        if self.channels not in (None, x.shape[1]):
            raise ValueError(
                f"expected pictures of {self.channels} channels, as {self.kind} takes, found {x.shape[1]}"
            )
        found = self._model.encode(x.to(self._model.device, self._model.dtype))
        if hasattr(found, "latent_dist"):
            posterior = found.latent_dist
            z = posterior.mode() if generator is None else posterior.sample(generator)
        else:
            z = found.latents if hasattr(found, "latents") else found.latent
        if z.dim() != 4 or not z.isfinite().all():
            raise ValueError(
                f"expected finite latents [B, c, h, w] of {self.kind}, found {list(z.shape)} in {z.dtype}"
                f"{'' if z.isfinite().all() else ' with NaN or infinity; another dtype may do'}"
            )
        return (z - self._shift) / self._std * self._scale

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures, float32 [B, C, H, W] in [-1, 1] on the CPU, of scaled latents [B, c, h, w]."""
        found = []
        for part in z.split(DECODED_AT_ONCE):
            raw = part.to(self._model.device, self._model.dtype) / self._scale * self._std + self._shift
            found.append(self._model.decode(raw).sample.float().clamp(-1.0, 1.0).cpu())
        return torch.cat(found)

    def _by_channel(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=self._model.dtype, device=self._model.device).view(1, -1, 1, 1)
