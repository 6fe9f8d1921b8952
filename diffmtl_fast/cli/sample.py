"""``diffmtl-fast sample``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .._errors import UserError
from .._number_types import NonNegativeInt, PositiveFloat, Seed, Size
from ..run import plots
from ..run.sampling import balanced_labels
from ..run.trained_denoiser import load_run
from .output import check_target, writing


def sample(
    run_dir: str,
    checkpoint: str | None = None,
    device: str = "auto",
    num: Size = 64,
    label: NonNegativeInt | None = None,
    caption: str | None = None,
    seed: Seed = 0,
    steps: Size | None = None,
    sigma_rel: PositiveFloat | None = None,
    out: str = "samples.png",
) -> list[Path]:
    """Draw pictures with the averaged (EMA) weights of a run.

    Args:
        run_dir: folder of the run
        checkpoint: name of the checkpoint to use, not the newest
        device: auto, cpu, cuda or cuda:N
        num: number of pictures
        label: class to draw; all in turn if not given
        caption: what to draw; captions of the data in turn if not given
        seed: of the noise
        steps: denoising steps; the run's own if not given
        sigma_rel: relative width of a power EMA, of a run with sigma_rels; the run's own if not given
        out: .png for a grid, .npy for float32 [N, C, H, W] in [-1, 1]
    """
    target = Path(out)
    if target.suffix not in (".png", ".npy"):
        raise UserError(f"out: expected a file name that ends in .png or .npy, found {out}")
    check_target("out", target)
    trained = load_run(run_dir, checkpoint, device, steps=steps, sigma_rel=sigma_rel)
    classes = trained.data.num_classes
    labels = balanced_labels(num, classes)
    if label is not None:
        if not classes:
            raise UserError(f"label: expected none of a run without classes, found {label}")
        if not 0 <= label < classes:
            raise UserError(f"label: expected 0 <= label < {classes} (classes in the data), found {label}")
        labels = torch.full((num,), label)
    wanted = trained.conditions(num) if labels is None else labels
    if caption is not None:
        if not isinstance(wanted, list):
            raise UserError(f"caption: expected none of a run without captions, found {caption!r}")
        wanted = [caption] * num
    pictures = trained.draw(wanted, num, seed)
    with writing("out", target) as aside:
        if target.suffix == ".npy":
            np.save(aside, pictures.numpy())
        else:
            plots.samples(aside, pictures, labels, trained.title)
    return [target]
