"""What training scripts habitually write works, or is refused with the line to write: docs/integrations.md."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch

import diffmtl_fast as dm

diffusers = pytest.importorskip("diffusers")


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip


def update_ema(ema, model, decay=0.5):
    """As DiT's script does: by the names of the model's parameters."""
    averages = OrderedDict(ema.named_parameters())
    for name, parameter in model.named_parameters():
        averages[name].mul_(decay).add_(parameter.data, alpha=1 - decay)


@torch.no_grad()
def test_an_average_by_names_is_of_the_module():
    mtl = dm.ClusteredMTL(unet(), 2, dm.UncertaintyWeighting(2))
    ema = copy.deepcopy(mtl.module)
    mtl.module.conv_in.bias += 1
    with pytest.raises(KeyError, match=r"module\."):
        update_ema(ema, mtl)
    update_ema(ema, mtl.module)
    torch.testing.assert_close(ema.conv_in.bias, mtl.module.conv_in.bias - 0.5)


def test_diffusers_average_is_of_the_module():
    from diffusers.training_utils import EMAModel

    mtl = dm.ClusteredMTL(unet(), 2, dm.UncertaintyWeighting(2))
    model = mtl.module
    ema = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    assert len(ema.shadow_params) == len(list(model.parameters()))
    assert (
        len(EMAModel(mtl.parameters()).shadow_params) == len(ema.shadow_params) + 1
    )  # the log-variances, too
    ema.step(model.parameters())
    ema.copy_to(model.parameters())


def test_config_and_dtype_are_the_modules():
    mtl = dm.ClusteredMTL(unet(), 2, dm.PCGrad())
    assert mtl.module.config.sample_size == 4
    assert mtl.module.dtype == torch.float32
    assert not hasattr(mtl, "config")


def test_the_state_of_a_compiled_model_has_the_plain_names_without_the_prefix():
    model = unet()
    names = list(model.state_dict())
    mtl = dm.ClusteredMTL(torch.compile(model), 2, dm.PCGrad())
    assert list(mtl.state_dict()) == [f"_orig_mod.{name}" for name in names]
    assert list(mtl.module._orig_mod.state_dict()) == names
    assert list(dm.ClusteredMTL(unet(), 2, dm.PCGrad(), compile=True).state_dict()) == names
