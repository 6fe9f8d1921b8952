"""What the ranks do with samplers of timesteps, and the same in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import programs
import torch
import torch.distributed as dist
from programs import K, make_model
from torch import Tensor

import diffmtl_fast as dm

CLUSTERS = dm.cluster_timesteps(50, k=K)
SAMPLERS = {
    "uniform": dm.UniformSampler,
    "stratified": dm.StratifiedSampler,
    "distribution": lambda clusters, **options: dm.DistributionSampler(
        clusters, dm.clustering.LogitNormalTime(0.0, 1.0), **options
    ),
    "second moment": lambda clusters, **options: dm.LossSecondMomentSampler(
        clusters, cells=5, history=4, **options
    ),
    "loss": lambda clusters, **options: dm.LossSampler(clusters, cells=5, **options),
    "curriculum": lambda clusters, **options: dm.DifficultyCurriculum(
        clusters, patience=2, max_length=8, smoothing=0.5, **options
    ),
}


@dataclass
class Course:
    """What a rank has drawn, and its sampler's state in the end."""

    levels: list[Tensor]
    clusters: list[Tensor]
    state: dict[str, Tensor]
    generator: Tensor


def make_sampler(name: str, alone: bool, seed: int | None = 0) -> dm.TimestepSampler:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    group = None if alone else dist.group.WORLD
    return SAMPLERS[name](CLUSTERS, generator=generator, process_group=group)


def draw_and_learn(name: str, steps: int, batch: int, alone: bool = False, part: bool = False) -> Course:
    """Draw batches and learn from losses that stop falling; with `part`, rank 1 from two losses less."""
    sampler, levels, clusters = make_sampler(name, alone), [], []
    for step in range(steps):
        level, cluster = sampler.sample(batch)
        loss = (1 + level.double() % 7) / (1 + step // 4)
        if part and dist.get_rank() == 1:
            level, loss = level[2:], loss[2:]
        sampler.update(loss, level)
        levels.append(level)
        clusters.append(cluster)
    state = {name: value for name, value in sampler.state_dict().items() if isinstance(value, Tensor)}
    return Course(levels, clusters, state, sampler.generator.get_state())


def draw(seeds: list[int | None]) -> tuple[Tensor, Tensor, str]:
    """Draw levels; return them, the state of the generator, and the error about a generator of one's own."""
    torch.manual_seed(dist.get_rank())
    sampler, error = make_sampler("uniform", False, seeds[dist.get_rank()]), ""
    try:
        sampler.sample(4, generator=torch.Generator())
    except ValueError as found:
        error = str(found)
    return sampler.sample(8)[0], sampler.generator.get_state(), error


def train_with_a_curriculum(weighting: str, steps: int, batch: int, alone: bool = False) -> dict[str, Tensor]:
    """Train on what a curriculum draws, with losses of its own on every rank; return the whole state."""
    model = make_model(torch.float64)
    chosen = {
        "uw": lambda: dm.UncertaintyWeighting(K),
        "dwa": lambda: dm.DWA(K),
        "rlw": lambda: dm.RLW(torch.Generator().manual_seed(5)),
    }[weighting]().double()
    curriculum, mtl = make_sampler("curriculum", alone), dm.ClusteredMTL(model, K, chosen)
    optimizer = torch.optim.SGD([*model.parameters(), *chosen.parameters()], lr=0.05)
    for _ in range(steps):
        t, cluster = curriculum.sample(batch)
        x = torch.sin(t.double()[:, None] * torch.arange(1, 7))
        optimizer.zero_grad()
        loss = dm.ops.sample_mse(mtl(x, t, cluster=cluster), torch.cos(x))
        mtl.backward(loss)
        curriculum.update(loss.detach(), t)
        optimizer.step()
    states: dict[str, Any] = {"model": model, "weighting": chosen, "curriculum": curriculum}
    return {
        f"{name}.{key}": value
        for name, module in states.items()
        for key, value in module.state_dict().items()
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isnan().any()
    } | {"curriculum.current_phase": curriculum.current_phase}


def random_weights() -> tuple[Tensor, Tensor]:
    """Take a step with random weights of the losses; return them and a gradient."""
    rank = dist.get_rank()
    model = make_model(torch.float64)
    mtl = dm.ClusteredMTL(model, K, dm.RLW(torch.Generator().manual_seed(rank)))
    parts = programs.batches("sorted", dist.get_world_size(), torch.float64)
    programs.step(mtl, parts[rank])
    # What one process with all samples does with these weights.
    single, batch = make_model(torch.float64), programs.joined(parts)
    losses = dm.ops.cluster_mse(single(batch.x, batch.t), batch.target, batch.cluster, K)
    (mtl.last.weights @ losses / K).backward()
    torch.testing.assert_close(model.first.weight.grad, single.first.weight.grad)
    return mtl.last.weights, model.first.weight.grad
