"""Noise processes: against diffusers, the definition in float64 and analytic identities."""

from __future__ import annotations

import diffusers
import pytest
import torch

from diffmtl_fast.diffusion import EDM, LOSS_WEIGHTS, DiscreteVP, FlowMatching, noise_process

KINDS = ("epsilon", "v_prediction", "sample")
T = 20


def scheduler_of(kind="epsilon", cls=diffusers.DDPMScheduler):
    return cls(T, beta_schedule="squaredcos_cap_v2", prediction_type=kind)


def drawn(device, batch=7, shape=(3, 5, 5)):
    generator = torch.Generator(device).manual_seed(1)
    x0, noise, pred = torch.randn(3, batch, *shape, generator=generator, device=device)
    return x0, noise, pred, torch.randint(T, (batch,), generator=generator, device=device)


def shares(t):
    """α and σ in float64, [B, 1, 1, 1]."""
    signal = scheduler_of().alphas_cumprod.double().to(t.device)[t].view(-1, 1, 1, 1)
    return signal.sqrt(), (1 - signal).sqrt()


def plain_target(kind, x0, noise, t):
    alpha, sigma = shares(t)
    return {"epsilon": noise.double(), "v_prediction": alpha * noise - sigma * x0, "sample": x0.double()}[
        kind
    ]


@pytest.mark.parametrize("batch", [1, 7, 33])
def test_noisy_images_are_those_of_diffusers(device, batch):
    x0, noise, _, t = drawn(device, batch)
    scheduler = scheduler_of()
    found = DiscreteVP(scheduler, device).noisy(x0, noise, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scheduler.add_noise(x0, noise, t))


def test_the_process_is_the_schedule_of_alphas_cumprod(device):
    """Also of a scheduler whose own ``add_noise`` scales x_t by 1 / α, which it undoes when it samples."""
    x0, noise, _, t = drawn(device)
    found, expected = (
        DiscreteVP(scheduler_of(cls=cls), device).noisy(x0, noise, t)
        for cls in (diffusers.EulerDiscreteScheduler, diffusers.DDPMScheduler)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_its_definition(device, kind, weighted, dtype):
    x0, noise, pred, t = drawn(device)
    pred = pred.to(dtype).requires_grad_()
    process = DiscreteVP(scheduler_of(kind), device, LOSS_WEIGHTS["p2"] if weighted else None)
    weights = process.weights
    found = process.loss(pred, x0, noise, t)
    exact = pred.detach().double().requires_grad_()
    expected = (exact - plain_target(kind, x0, noise, t)).square().mean((1, 2, 3))
    if weights is not None:
        expected = expected * weights[t]
    torch.testing.assert_close(found, expected.float())
    assert found.dtype == torch.float32
    factor = torch.arange(1.0, 8.0, device=device)  # a loss weight that differs by sample, as clusters have
    (grad,) = torch.autograd.grad((found * factor).sum(), pred)
    (expected_grad,) = torch.autograd.grad((expected * factor).sum(), exact)
    torch.testing.assert_close(grad, expected_grad.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_undoing_the_noise_costs_nothing(device, kind):
    """What the model should have said, by the inverse of each parametrisation, has loss 0; nothing else has."""
    x0, noise, _, _ = drawn(device)
    t = torch.arange(3, 17, 2, device=device)
    process = DiscreteVP(scheduler_of(kind), device)
    noisy = process.noisy(x0, noise, t).double()
    alpha, sigma = shares(t)
    right = {
        "epsilon": (noisy - alpha * x0) / sigma,
        "v_prediction": (alpha * noisy - x0) / sigma,
        "sample": (noisy - sigma * noise) / alpha,
    }[kind].float()
    assert (process.loss(right, x0, noise, t) < 1e-9).all()
    torch.testing.assert_close(process.loss(right + 0.5, x0, noise, t), torch.full((7,), 0.25, device=device))


def test_prediction_types(device):
    with pytest.raises(ValueError, match=r"prediction_type: expected epsilon, v_.* or sample, found 'flow'"):
        DiscreteVP(scheduler_of("flow"), device)


def continuous(device, kind):
    generator = torch.Generator(device).manual_seed(3)
    x0, noise, pred = torch.randn(3, 7, 2, 4, 4, generator=generator, device=device)
    level = torch.rand(7, generator=generator, device=device) * (3.0 if kind == "edm" else 0.98) + 0.01
    return EDM(0.7) if kind == "edm" else FlowMatching(), x0, noise, pred, level


@pytest.mark.parametrize("kind", ["edm", "flow"])
def test_continuous_processes_are_their_definitions(device, kind):
    process, x0, noise, pred, level = continuous(device, kind)
    s = level.double().view(-1, 1, 1, 1)
    x = x0 + s * noise if kind == "edm" else (1 - s) * x0 + s * noise
    torch.testing.assert_close(process.noisy(x0, noise, level), x.float())
    scaled, time = process.inputs(x.float(), level)
    if kind == "edm":
        skip, out = 0.49 / (s**2 + 0.49), s * 0.7 / (s**2 + 0.49).sqrt()
        target = (x0 - skip * x) / out
        torch.testing.assert_close(scaled, (x / (s**2 + 0.49).sqrt()).float())
        torch.testing.assert_close(time, level.log() / 4)
    else:
        target = noise.double() - x0.double()
        assert torch.equal(scaled, x.float())
        torch.testing.assert_close(time, 1000 * level)
    torch.testing.assert_close(process.target(x0, noise, level), target.float(), rtol=1e-4, atol=1e-5)
    expected = (pred - target).square().mean((1, 2, 3)).float()
    torch.testing.assert_close(process.loss(pred, x0, noise, level), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["edm", "flow"])
def test_a_loss_weight_of_the_noise_error_is_one_for_every_prediction(device, kind):
    """The same denoiser has the same weighted loss, whether by its ε or by what the network predicts."""
    process, x0, noise, _, level = continuous(device, kind)
    process.loss_weight = LOSS_WEIGHTS["min_snr"]
    noisy = process.noisy(x0, noise, level)
    wrong = noise + 0.1 * x0  # a denoiser that takes this for the noise
    alpha, sigma = (share.view(-1, 1, 1, 1) for share in process.shares(level))
    pred = process.target((noisy - sigma * wrong) / alpha, wrong, level)
    expected = (wrong - noise).square().mean((1, 2, 3)) * LOSS_WEIGHTS["min_snr"](process.log_snr(level))
    torch.testing.assert_close(process.loss(pred, x0, noise, level), expected, rtol=2e-3, atol=1e-5)


def test_edm_weights_make_the_network_error_count_once(device):
    process, *_, level = continuous(device, "edm")
    process.loss_weight = lambda levels: LOSS_WEIGHTS["edm"](levels, 0.7)
    torch.testing.assert_close(process.weight(level), torch.ones_like(level))


def test_preconditioning_is_that_of_diffusers(device):
    process, x0, noise, _, level = continuous(device, "edm")
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.7)
    noisy = process.noisy(x0, noise, level)
    scaled, time = process.inputs(noisy, level)
    s = level.view(-1, 1, 1, 1)
    torch.testing.assert_close(scaled, scheduler.precondition_inputs(noisy, s))
    torch.testing.assert_close(time, scheduler.precondition_noise(level))
    target = process.target(x0, noise, level)
    torch.testing.assert_close(scheduler.precondition_outputs(noisy, target, s), x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        (diffusers.DDIMScheduler(), DiscreteVP),
        (diffusers.EDMEulerScheduler(), EDM),
        (diffusers.EDMDPMSolverMultistepScheduler(), EDM),
        (diffusers.FlowMatchEulerDiscreteScheduler(), FlowMatching),
        (diffusers.FlowMatchHeunDiscreteScheduler(), FlowMatching),
    ],
)
def test_the_process_of_a_scheduler(scheduler, kind):
    assert type(noise_process(scheduler)) is kind


def test_what_is_no_process():
    with pytest.raises(TypeError, match="expected alphas_cumprod, scale_noise or a sigma_data"):
        noise_process(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="sigma_data: expected a positive number"):
        EDM(0.0)
    with pytest.raises(ValueError, match="prediction_type: expected epsilon, found 'v_prediction'"):
        noise_process(diffusers.EDMEulerScheduler(prediction_type="v_prediction"))


def test_a_schedule_that_ends_in_pure_noise(device):
    scheduler = scheduler_of("v_prediction")
    scheduler.alphas_cumprod[-1] = 0.0
    process = DiscreteVP(scheduler, device, LOSS_WEIGHTS["min_snr"])
    x0, noise, _, _ = drawn(device, 1)
    last = torch.tensor([T - 1], device=device)
    assert torch.equal(process.noisy(x0, noise, last), noise)
    assert torch.equal(process.target(x0, noise, last), -x0)
    assert 0.0 <= process.weight(last).item() < 1e-30
