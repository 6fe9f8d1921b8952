"""ClusteredMTL on models of diffusers and a hand-written DiT, against one torch.autograd.grad per cluster."""

from __future__ import annotations

import copy
import functools
import logging

import diffusers
import pytest
import torch
from exactness import WAYS, Given, assert_exact, in_slices, sample_losses
from torch import Tensor

import diffmtl_fast as dm
from benchmarks.models import DiT
from benchmarks.reference import cluster_gradients, update_direction

B, K = 6, 3
UNSORTED, SORTED = [2, 0, 2, 1, 0, 2], [0, 0, 1, 2, 2, 2]
ENGINES = {"auto": {}, **WAYS}

pytestmark = pytest.mark.usefixtures("full_precision")


def unet() -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=10,
    )


def conditional_unet(**options: object) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=6,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    )


def sdxl_unet() -> diffusers.UNet2DConditionModel:
    """Linear projections around attention, and six numbers per sample whose embedding folds them into rows."""
    return conditional_unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )


def diffusers_dit() -> diffusers.DiTTransformer2DModel:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        norm_num_groups=2,
        num_embeds_ada_norm=10,
    )


def pixart() -> diffusers.PixArtTransformer2DModel:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        norm_num_groups=2,
        cross_attention_dim=24,
        caption_channels=6,
        use_additional_conditions=True,
    )


def sd3(**options: object) -> diffusers.SD3Transformer2DModel:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
        **options,
    )


def sd35() -> diffusers.SD3Transformer2DModel:
    """Queries and keys normalised, a second attention in the first block."""
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0,))


def hand_written_dit() -> DiT:
    return DiT(width=24, depth=2, heads=3, channels=2, size=8)


MAKERS = {
    "UNet2DModel": unet,
    "UNet2DConditionModel": conditional_unet,
    "UNet2DConditionModel of SDXL": sdxl_unet,
    "DiTTransformer2DModel": diffusers_dit,
    "PixArtTransformer2DModel": pixart,
    "SD3Transformer2DModel": sd3,
    "SD3Transformer2DModel of SD3.5": sd35,
    "DiT": hand_written_dit,
}


def arguments(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """What a model is called with beside the noisy images."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    t, labels = (torch.randint(high, (B,), generator=generator).to(device) for high in (1000, 10))
    text = {"timestep": t, "encoder_hidden_states": normal(B, 5, 6)}
    mask = torch.ones(B, 5, device=device)
    mask[2, 3:] = 0
    given: dict[str, dict[str, object]] = {
        "UNet2DModel": {"timestep": t, "class_labels": labels},
        "UNet2DConditionModel": {**text, "encoder_attention_mask": mask},
        "UNet2DConditionModel of SDXL": {
            **text,
            "added_cond_kwargs": {"text_embeds": normal(B, 10), "time_ids": 8 * normal(B, 6).abs().round()},
        },
        "DiTTransformer2DModel": {"timestep": t, "class_labels": labels},
        "PixArtTransformer2DModel": {
            **text,
            "encoder_attention_mask": mask,
            "added_cond_kwargs": {
                "resolution": 8 + normal(B, 2).abs(),
                "aspect_ratio": 1 + normal(B, 1).abs(),
            },
        },
        "SD3Transformer2DModel": {**text, "pooled_projections": normal(B, 10)},
        "SD3Transformer2DModel of SD3.5": {**text, "pooled_projections": normal(B, 10)},
        "DiT": {"t": t},
    }
    return given[name]


def images(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, 2, 8, 8, generator=torch.Generator().manual_seed(2)).to(device, dtype)


@functools.cache
def made(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return MAKERS[name]().eval()  # DiT's label dropout draws its numbers for the batch in the clusters' order


def model_of(name: str, device: torch.device) -> torch.nn.Module:
    return copy.deepcopy(made(name)).to(device)


def losses_of(output: object) -> Tensor:
    return sample_losses(output if isinstance(output, Tensor) else output.sample)


@pytest.mark.parametrize("way", ENGINES)
@pytest.mark.parametrize("name", MAKERS)
def test_models_are_exact_and_need_no_slices(name, way, device, caplog):
    model = model_of(name, device)
    with caplog.at_level(logging.INFO, "diffmtl_fast"):
        mtl = assert_exact(
            model,
            images(device),
            **arguments(name, device),
            cluster=UNSORTED,
            # Measured on the CPU: at most 2.1e-6, the Gramian 3.6e-6 (for which 4e-5 is allowed).
            rtol=1e-5,
            loss_of=losses_of,
            options=ENGINES[way],
        )
    chosen = "sliced engine" if way == "sliced" else "grouped engine"
    assert in_slices(mtl) == (None if way == "sliced" else [])
    assert [chosen in message for message in caplog.messages if "engine for K" in message] == [True]
    assert all(p.grad is not None for p in model.parameters())


@functools.cache
def autocast_error(name: str, device: torch.device) -> tuple[Tensor, float]:
    """The direction in float64, and the error that one backward per cluster has under autocast."""

    def direction(model: torch.nn.Module, dtype: torch.dtype, autocast: bool) -> Tensor:
        parameters = list(model.parameters())
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            losses = losses_of(model(images(device, dtype), **arguments(name, device, dtype)))
        expected = cluster_gradients(losses, torch.tensor(UNSORTED, device=device), parameters, K)
        weights = Given()(expected.jacobian, expected.present)
        return update_direction(expected.jacobian.double(), weights.double(), expected.present)

    exact = direction(model_of(name, device).double(), torch.float64, autocast=False)
    rounded = direction(model_of(name, device), torch.float32, autocast=True)
    return exact, ((rounded - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("way", ENGINES)
@pytest.mark.parametrize("name", MAKERS)
def test_under_autocast_as_right_as_a_backward_per_cluster(name, way, device):
    model = model_of(name, device)
    mtl = dm.ClusteredMTL(model, K, Given(), **ENGINES[way])
    cluster = torch.tensor(UNSORTED, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        losses = losses_of(mtl(images(device), **arguments(name, device), cluster=cluster))
    mtl.backward(losses)
    found = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    exact, error = autocast_error(name, device)
    assert 1e-3 < error < 0.03  # autocast took place, and the bound below means something
    # Measured over three seeds: 0.7 to 1.05 times, as sums are rounded in another order.
    assert (found - exact).norm() / exact.norm() <= 1.25 * error
    assert in_slices(mtl) == (None if way == "sliced" else [])


@pytest.mark.parametrize("options", [WAYS["grouped"], WAYS["lean"]], ids=["grouped", "lean"])
def test_dropped_labels_are_those_of_the_plain_model(options, device):
    model = diffusers_dit().to(device).train()
    model.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob = 0.5
    arrived = arguments("DiTTransformer2DModel", device)
    assert_exact(
        model, images(device), **arrived, cluster=SORTED, rtol=1e-5, loss_of=losses_of, options=options
    )
    unconditional = model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.grad[10]
    assert unconditional.any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["UNet2DConditionModel", "SD3Transformer2DModel"])
def test_with_the_models_own_checkpoints(name, way, device):
    model = model_of(name, device).train()
    model.enable_gradient_checkpointing()
    assert_exact(
        model,
        images(device),
        **arguments(name, device),
        rtol=1e-5,
        loss_of=losses_of,
        steps=1,
        options=WAYS[way],
    )


def test_a_tuple_output_is_a_tuple_again(device):
    model = model_of("UNet2DModel", device)
    given, cluster = arguments("UNet2DModel", device), torch.tensor(UNSORTED, device=device)
    (found,) = dm.ClusteredMTL(model, K, dm.PCGrad())(
        images(device), **given, return_dict=False, cluster=cluster
    )
    torch.testing.assert_close(found, model(images(device), **given).sample)
