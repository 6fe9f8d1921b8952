import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffmtl_fast.diffusion import log_snr

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_variance_preserving(name, schedule):
    scheduler = getattr(diffusers, name)(num_train_timesteps=500, beta_schedule=schedule)
    found = log_snr(scheduler)
    alphas_cumprod = scheduler.alphas_cumprod.double().numpy()
    assert found.dtype == np.float64
    np.testing.assert_allclose(1 / (1 + np.exp(-found)), alphas_cumprod, rtol=2e-4, atol=1e-9)
    assert (np.diff(found) < 0).all()


def test_more_precise_than_float32_alphas_cumprod():
    betas = np.linspace(1e-4, 0.02, 1000)
    found = log_snr(diffusers.DDPMScheduler())
    alphas_cumprod = np.cumprod(1 - betas)
    np.testing.assert_allclose(found, np.log(alphas_cumprod / (1 - alphas_cumprod)), rtol=1e-5, atol=1e-6)


def test_shifted_snr_is_read_from_alphas_cumprod():
    scheduler = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0, rescale_betas_zero_snr=False)
    alphas_cumprod = scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(log_snr(scheduler), np.log(alphas_cumprod / (1 - alphas_cumprod)), rtol=1e-12)


def test_zero_terminal_snr_is_refused_and_clipped():
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"-inf at index 999 .* clip=\(-20, 20\)"):
        log_snr(scheduler)
    found = log_snr(scheduler, clip=(-12.0, 4.0))
    assert found[-1] == -12.0
    assert found.max() <= 4.0


def test_flow_matching():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(ValueError, match="-inf at index 0"):
        log_snr(scheduler)
    found = log_snr(scheduler, clip=(-20, 20))
    sigmas = scheduler.sigmas.double().numpy()[1:]
    np.testing.assert_allclose(found[1:], 2 * np.log((1 - sigmas) / sigmas), rtol=1e-12)
    assert found[0] == -20
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_drops_the_final_zero(name):
    scheduler = getattr(diffusers, name)(num_train_timesteps=40)
    found = log_snr(scheduler)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(
        np.exp(-found / 2), scheduler.sigmas.double().numpy()[: len(found)], rtol=1e-12
    )


def test_sampling_sigmas_are_refused():
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="set_timesteps"):
        log_snr(scheduler)


def test_plain_attributes_suffice():
    alphas_cumprod = torch.tensor([0.9, 0.5, 0.1])
    found = log_snr(SimpleNamespace(alphas_cumprod=alphas_cumprod))
    np.testing.assert_allclose(found, [math.log(9), 0, -math.log(9)], rtol=1e-6, atol=1e-7)


def test_bad_input():
    with pytest.raises(TypeError, match="expected alphas_cumprod or sigmas, found neither on object"):
        log_snr(object())
    with pytest.raises(ValueError, match="clip: expected"):
        log_snr(diffusers.DDPMScheduler(), clip=(1, -1))


def test_a_schedule_whose_last_level_the_scheduler_changed_is_read_as_it_stands():
    scheduler = pytest.importorskip("diffusers").EulerDiscreteScheduler(
        num_train_timesteps=50, rescale_betas_zero_snr=True
    )
    last = float(scheduler.alphas_cumprod[-1])
    assert last == 2.0**-24
    assert log_snr(scheduler)[-1] == pytest.approx(math.log(last) - math.log1p(-last), rel=1e-9)
    assert log_snr(scheduler)[-1] == pytest.approx(-16.64, abs=0.01)
