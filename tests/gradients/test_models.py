"""ClusteredMTL on the models of diffusers, against one torch.autograd.grad per cluster."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel

import diffmtl_fast as dm
from benchmarks.reference import cluster_gradients, update_direction

K = 3


def unet():
    return UNet2DModel(
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


def dit():
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=2,
        num_embeds_ada_norm=1000,
    ).eval()  # its label dropout draws random numbers, which one slice and the whole batch draw differently


@pytest.mark.parametrize("cluster", [[0, 0, 1, 1, 1, 2], [2, 0, 2, 1, 0, 2], [2, 0, 2, 2, 0, 0]], ids=str)
@pytest.mark.parametrize("make", [unet, dit])
def test_exact_on_diffusers_models(make, cluster, device):
    torch.manual_seed(0)
    model = make().to(device)
    batch = len(cluster)
    x, noise = torch.randn(batch, 2, 8, 8, device=device), torch.randn(batch, 2, 8, 8, device=device)
    t, labels = torch.randint(1000, (batch,), device=device), torch.randint(10, (batch,), device=device)
    cluster = torch.tensor(cluster, device=device)

    loss = dm.ops.sample_mse(model(x, timestep=t, class_labels=labels).sample, noise)
    expected = cluster_gradients(loss, cluster, list(model.parameters()), K)
    mtl = dm.ClusteredMTL(model, K, dm.NashMTL())
    output = mtl(x, timestep=t, class_labels=labels, cluster=cluster)
    mtl.backward(dm.ops.sample_mse(output.sample, noise))

    gramian = expected.jacobian @ expected.jacobian.T
    assert ((mtl.last.gramian - gramian).norm() / gramian.norm()).item() < 1e-5
    direction = update_direction(expected.jacobian, mtl.last.weights, expected.present)
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert ((found - direction).norm() / direction.norm()).item() < 1e-5


def test_a_tuple_output_is_a_tuple_again(device):
    model = unet().to(device)
    x, t = torch.randn(4, 2, 8, 8, device=device), torch.tensor([1, 2, 3, 4], device=device)
    labels, cluster = (
        torch.zeros(4, dtype=torch.int64, device=device),
        torch.tensor([1, 0, 1, 0], device=device),
    )
    (found,) = dm.ClusteredMTL(model, 2, dm.PCGrad())(x, t, labels, return_dict=False, cluster=cluster)
    torch.testing.assert_close(found, model(x, t, labels).sample)
