"""Samplers with every weighting, with loss weights, and with clusters of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import diffmtl_fast as dm
from diffmtl_fast.clustering import LogNormalSigma, cluster_noise
from diffmtl_fast.diffusion import min_snr_weight, p2_weight
from diffmtl_fast.diffusion.named_schedules import named_log_snr

T, B, TASKS, N = 50, 16, 3, 6
LEVELS = named_log_snr("squaredcos_cap_v2", T)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 4))

    def forward(self, x, t):
        return self.net(torch.cat([x, t.to(x)[:, None] / T], dim=1))


def weightings():
    return {
        "equal": dm.Equal(),
        "uw": dm.UncertaintyWeighting(TASKS),
        "pcgrad": dm.PCGrad(),
        "nash": dm.NashMTL(),
        "nash every second step": dm.NashMTL(update_every=2),
    }


LOSS_WEIGHTS = {"none": torch.zeros_like, "min-snr": min_snr_weight, "p2": p2_weight}


@pytest.mark.parametrize("sampling", ["union", "clusters", "tasks"])
@pytest.mark.parametrize("loss_weight", LOSS_WEIGHTS)
@pytest.mark.parametrize("name", weightings())
def test_a_curriculum_with_every_weighting_and_loss_weight(name, loss_weight, sampling, device):
    torch.manual_seed(0)
    tasks = dm.cluster_snr(LEVELS, k=TASKS)
    curriculum = dm.DifficultyCurriculum(
        dm.cluster_snr(LEVELS, k=N), None, max_length=2, tasks=tasks, sampling=sampling,
        generator=torch.Generator(device).manual_seed(0),
    )  # fmt: skip
    weighting = weightings()[name].to(device)
    model = Denoiser().to(device)
    mtl = dm.ClusteredMTL(model, num_clusters=TASKS, weighting=weighting)
    optimizer = torch.optim.AdamW(dm.param_groups(model, weighting, lr=1e-3))
    log_snr = torch.tensor(LEVELS, dtype=torch.float32, device=device)
    seen = []
    for _ in range(2 * N + 2):
        t, cluster = curriculum.sample(B)
        x, target = torch.randn(B, 4, device=device), torch.randn(B, 4, device=device)
        loss = dm.ops.sample_mse(mtl(x, t, cluster=cluster), target)
        factor = LOSS_WEIGHTS[loss_weight](log_snr[t]) if loss_weight != "none" else curriculum.weight(t)
        optimizer.zero_grad()
        mtl.backward(loss * factor)
        present = torch.bincount(cluster, minlength=TASKS) > 0
        assert torch.equal(mtl.last.present, present)
        assert mtl.last.weights.isfinite().all()
        assert (mtl.last.weights[~present] == 0).all()
        if name == "equal":
            expected = torch.stack([(loss.detach() * factor)[cluster == k].mean() for k in cluster.unique()])
            torch.testing.assert_close(mtl.last.losses[present], expected)
            _check_gradient(model, x, t, cluster, target, factor)
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        curriculum.update(loss, t)
        seen.append(int(present.sum()))
    assert seen[0] == 1  # the noisiest cluster lies in one task
    assert seen[-1] == TASKS
    assert curriculum.finished


def _check_gradient(model, x, t, cluster, target, factor):
    found = [p.grad.clone() for p in model.parameters()]
    loss = (model(x, t) - target).square().mean(1) * factor
    mean = torch.stack([loss[cluster == k].mean() for k in cluster.unique()]).mean()
    for ours, theirs in zip(found, torch.autograd.grad(mean, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", weightings())
def test_importance_sampling_with_every_weighting(name, device):
    torch.manual_seed(0)
    tasks = dm.cluster_snr(LEVELS, k=TASKS)
    sampler = dm.LossSecondMomentSampler(tasks, cells=5, history=2)
    model = Denoiser().to(device)
    mtl = dm.ClusteredMTL(model, num_clusters=TASKS, weighting=weightings()[name].to(device))
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(4):
        t, cluster = sampler.sample(B, generator=generator)
        x = torch.randn(B, 4, device=device)
        loss = dm.ops.sample_mse(mtl(x, t, cluster=cluster), x * (1 + t[:, None]))
        mtl.backward(loss * sampler.weight(t))
        sampler.update(loss, t)
        assert all(p.grad.isfinite().all() for p in model.parameters())
    weights = sampler.weight(torch.arange(T, device=device))
    assert weights.max() > 1.1 * weights.min()  # it has learned


def test_a_curriculum_over_edm_levels_with_a_weighting(device):
    torch.manual_seed(0)
    distribution = LogNormalSigma()
    tasks = cluster_noise(distribution, TASKS)
    curriculum = dm.DifficultyCurriculum(
        cluster_noise(distribution, N, cost="quantile"), 2, tasks=tasks, generator=torch.Generator(device)
    )
    model = Denoiser().to(device)
    mtl = dm.ClusteredMTL(model, num_clusters=TASKS, weighting=dm.PCGrad())
    lowest = []
    for _ in range(3 * N):
        sigma, cluster = curriculum.sample(B)
        x = torch.randn(B, 4, device=device)
        loss = dm.ops.sample_mse(mtl(x * sigma[:, None], sigma, cluster=cluster), x)
        mtl.backward(loss)
        curriculum.update(1.0)
        lowest.append(float(sigma.min()))
    assert curriculum.finished
    assert lowest[0] > np.median(lowest) > lowest[-1]
