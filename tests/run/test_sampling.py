"""Sampling with a denoiser that is exact."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

from diffmtl_fast._errors import UserError
from diffmtl_fast.diffusion import EDM, noise_process
from diffmtl_fast.run.sampling import balanced_labels, build_sampler, draw
from diffmtl_fast.train.config import Component, Sampling


class ExactDenoiser(nn.Module):
    """Predicts the noise exactly for data that are one constant image per class."""

    def __init__(self, scheduler, values):
        super().__init__()
        self.alphas_cumprod = scheduler.alphas_cumprod
        self.values = nn.Parameter(values)

    def forward(self, x, t, class_labels):
        bar = self.alphas_cumprod.to(x.device)[t.long()].view(-1, 1, 1, 1)
        return (x - bar.sqrt() * self.values[class_labels].view(-1, 1, 1, 1)) / (1 - bar).sqrt()


@pytest.fixture
def scheduler():
    return diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")


@pytest.fixture
def denoiser(scheduler, device):
    return ExactDenoiser(scheduler, torch.tensor([-0.5, 0.25, 1.0])).to(device)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers with NumPy 2
@pytest.mark.parametrize("sampler", ["DDIM", "DDPM", "DPMSolverMultistep", "EulerDiscrete"])
def test_an_exact_denoiser_gives_the_data(scheduler, denoiser, sampler):
    labels = balanced_labels(7, 3)
    config = Sampling(Component(f"diffusers.{sampler}Scheduler"), steps=20, batch_size=7)
    pictures = draw(denoiser, scheduler, config, (7, 1, 4, 4), labels, seed=0)
    expected = torch.tensor([-0.5, 0.25, 1.0])[labels].view(-1, 1, 1, 1).expand(7, 1, 4, 4)
    torch.testing.assert_close(pictures, expected, atol=2e-2, rtol=0)


class ExactNetwork(nn.Module):
    """What EDM's or flow matching's network is to predict, for data that are one constant image per class."""

    def __init__(self, process, values):
        super().__init__()
        self.process, self.values = process, nn.Parameter(values)

    def forward(self, x, t, class_labels):
        data = self.values[class_labels].view(-1, 1, 1, 1)
        if isinstance(self.process, EDM):
            level = (4 * t).exp()
            x = x * (level.square() + self.process.sigma_data**2).sqrt().view(-1, 1, 1, 1)
        else:
            level = t / 1000
        alpha, sigma = (share.view(-1, 1, 1, 1) for share in self.process.shares(level))
        return self.process.target(data.expand_as(x), (x - alpha * data) / sigma, level)


@pytest.mark.parametrize(
    ("training", "sampler"),
    [
        ("EDMEulerScheduler", "auto"),
        ("EDMEulerScheduler", "diffusers.EDMDPMSolverMultistepScheduler"),
        ("FlowMatchEulerDiscreteScheduler", "auto"),
        ("FlowMatchEulerDiscreteScheduler", "diffusers.FlowMatchHeunDiscreteScheduler"),
    ],
)
def test_an_exact_network_gives_the_data(device, training, sampler):
    scheduler = getattr(diffusers, training)()
    values = torch.tensor([-0.5, 0.25, 1.0])
    network = ExactNetwork(noise_process(scheduler), values).to(device)
    labels = balanced_labels(7, 3)
    config = Sampling(Component(sampler), steps=12, batch_size=7)
    pictures = draw(network, scheduler, config, (7, 1, 4, 4), labels, seed=0)
    expected = values[labels].view(-1, 1, 1, 1).expand(7, 1, 4, 4)
    torch.testing.assert_close(pictures, expected, atol=5e-3, rtol=0)


def test_pictures_depend_on_the_seed_and_not_on_the_batch_size(scheduler, denoiser):
    def pictures(seed, batch_size):
        config = Sampling(steps=1, batch_size=batch_size)
        model = nn.Module()
        model.forward = lambda x, t, class_labels: 0.5 * x + 0.01 * class_labels.view(-1, 1, 1, 1)
        model.weight = nn.Parameter(torch.zeros(1))
        return draw(model, scheduler, config, (5, 1, 4, 4), balanced_labels(5, 3), seed)

    assert torch.equal(pictures(1, 5), pictures(1, 2))
    assert not torch.equal(pictures(1, 5), pictures(2, 5))


def test_balanced_labels():
    assert balanced_labels(5, 3).tolist() == [0, 1, 2, 0, 1]
    assert balanced_labels(5, 0) is None


@pytest.mark.parametrize("path", ["diffusers.NoSuchScheduler", "torch.nn.Linear"])
def test_refuses_what_is_no_sampler(scheduler, path):
    with pytest.raises(UserError, match="sampling"):
        build_sampler(Sampling(Component(path)), scheduler)
