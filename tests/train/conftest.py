"""A run small enough for a test: a tiny denoiser, twenty timesteps, a few iterations."""

from __future__ import annotations

import copy

import pytest
import torch

from diffmtl_fast.train.config import from_dict

TINY = {
    "iterations": 6,
    "batch_size": 12,
    "clusters": {"k": 3},
    "model": {
        "path": "diffusers.UNet2DModel",
        "args": {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "num_class_embeds": 10,
            "layers_per_block": 1,
            "block_out_channels": [8, 8],
            "down_block_types": ["DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D"],
            "norm_num_groups": 4,
        },
    },
    "scheduler": {
        "path": "diffusers.DDPMScheduler",
        "args": {"num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2"},
    },
    "data": {"path": "diffmtl_fast.train.data.digits"},
    "optimizer": {"lr": 1e-3},
    "sampling": {"steps": 2},
    "evaluation": {"num_samples": 0},
    "logging": {"every": 2, "cosines_every": 2, "tensorboard": False},
    "checkpoints": {"every": 2},
}


#: Changes that make the tiny run one of another noise process.
PROCESSES = {
    "vp": {},
    "edm": {
        "scheduler": {
            "path": "diffusers.EDMEulerScheduler",
            "args": {"num_train_timesteps": 20, "sigma_data": 0.5},
        }
    },
    "flow": {
        "scheduler": {
            "path": "diffusers.FlowMatchEulerDiscreteScheduler",
            "args": {"num_train_timesteps": 20},
        },
        "timesteps": {"sampler": "logit_normal"},
    },
}


def _merged(base, changes):
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


@pytest.fixture(autouse=True)
def _one_thread():
    """Small work: threads of several test processes would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(device):
    """Make the tiny configuration with changes: ``tiny(method="nash", process="edm")``."""

    def make(**changes):
        base = {**TINY, "device": str(device)}
        kind = PROCESSES[changes.pop("process", "vp")]
        return from_dict(_merged({**base, **copy.deepcopy(kind)}, changes))

    return make
