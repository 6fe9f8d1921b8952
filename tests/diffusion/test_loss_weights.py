"""Loss weights: their formulas for every prediction, one loss for all of them, and versions that are wrong."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmtl_fast import diffusion
from diffmtl_fast.clustering import LogitNormalTime, ModeTime
from diffmtl_fast.diffusion import LOSS_WEIGHTS, loss_weight, min_snr_weight, p2_weight, predicted_weight

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "loss-weighting.md"
SNR = torch.tensor([0.0, 1e-3, 1.0, 5.0, 50.0, math.inf], dtype=torch.float64)


def test_min_snr():
    expected = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1, 0.0], dtype=torch.float64)
    torch.testing.assert_close(min_snr_weight(SNR.log(), gamma=5), expected)


def test_p2():
    torch.testing.assert_close(p2_weight(SNR.log(), gamma=0.5, k=2.0), (2.0 + SNR) ** -0.5)


def test_dtype_and_shape_are_kept():
    log_snr = torch.randn(2, 3, dtype=torch.float32)
    for weight in (min_snr_weight(log_snr), p2_weight(log_snr)):
        assert (weight.shape, weight.dtype) == (log_snr.shape, torch.float32)


def test_bad_input():
    with pytest.raises(ValueError, match="gamma: expected a positive"):
        min_snr_weight(SNR, gamma=0)
    with pytest.raises(ValueError, match="k > 0"):
        p2_weight(SNR, k=0)


@pytest.mark.parametrize("name", ["gamma", "snr_gamma", "min_snr_gamma"])
@pytest.mark.parametrize("weight", ["min_snr", "soft_min_snr"])
def test_names_that_people_type(weight, name):
    expected = predicted_weight(LOSS_WEIGHTS[weight](LEVELS, gamma=3.0), LEVELS, "v_prediction")
    assert torch.equal(loss_weight(weight, LEVELS, "v_prediction", **{name: 3.0}), expected)


def test_weights_by_name_refuse():
    with pytest.raises(ValueError, match=r"name: expected one of min_snr, .*, found 'snr'"):
        loss_weight("snr", LEVELS)
    with pytest.raises(ValueError, match="expected each setting once, found gamma, snr_gamma"):
        loss_weight("min_snr", LEVELS, gamma=1, snr_gamma=5)
    with pytest.raises(TypeError, match="snr_gamma"):
        loss_weight("p2", LEVELS, snr_gamma=5)


@pytest.mark.parametrize(
    ("law", "name", "arguments"),
    [
        (LogitNormalTime(0.3, 0.7), "logit_normal", {"logit_mean": 0.3, "logit_std": 0.7}),
        (ModeTime(0.81), "mode", {"mode_scale": 0.81}),
    ],
)
def test_densities_and_weights_of_the_velocity_are_one(law, name, arguments):
    time = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    found = loss_weight(name, law.log_snr(time), "flow_prediction", **arguments)
    torch.testing.assert_close(found, law.density(time))


KINDS = ("epsilon", "sample", "v_prediction", "flow_prediction")
LEVELS = torch.linspace(-8, 8, 33, dtype=torch.float64)  # 0, where every min and max has its kink, among them


def squared_errors(kind, log_snr):
    """The squared error of ε, and that of another prediction, of one denoiser that guesses x_0 at each level."""
    generator = torch.Generator().manual_seed(0)
    x, noise, guess = torch.randn(3, len(log_snr), generator=generator, dtype=torch.float64)
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    if kind == "flow_prediction":  # the same SNR on the straight path
        sigma = 1 / (1 + torch.exp(0.5 * log_snr))
        alpha = 1 - sigma
    guessed = (alpha * x + sigma * noise - alpha * guess) / sigma
    error = {
        "epsilon": noise - guessed,
        "sample": x - guess,
        "v_prediction": (alpha * noise - sigma * x) - (alpha * guessed - sigma * guess),
        "flow_prediction": (noise - x) - (guessed - guess),
    }[kind]
    return (noise - guessed).square(), error.square()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSS_WEIGHTS)
def test_every_prediction_has_the_same_loss(name, kind):
    weight = LOSS_WEIGHTS[name](LEVELS)
    of_noise, error = squared_errors(kind, LEVELS)
    torch.testing.assert_close(predicted_weight(weight, LEVELS, kind) * error, weight * of_noise)


def normal_density(t, mean, std):
    logit = np.log(t / (1 - t))
    return np.exp(-((logit - mean) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi) * t * (1 - t))


def mode_density(t, scale):
    """By the slope of the share of draws below t, from a fine grid of u."""
    u = np.linspace(0, 1, 2_000_001)
    times = 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    return np.interp(t, times[::-1], (-1 / np.gradient(times, u))[::-1])


OPTIONS = {
    "min_snr": [{}, {"gamma": 2.0}],
    "soft_min_snr": [{}, {"gamma": 2.0}],
    "p2": [{}, {"gamma": 0.5, "k": 2.0}],
    "debiased": [{}],
    "edm": [{}, {"sigma_data": 1.0}],
    "truncated_snr": [{}],
    "logit_normal": [{}, {"logit_mean": -0.5, "logit_std": 0.7}],
    "mode": [{}, {"mode_scale": -0.5}],
    "cosmap": [{}],
    "sigma_sqrt": [{}],
}


def cells():
    """The cells of the guide's table: weight, prediction, formula."""
    table = GUIDE.read_text(encoding="utf-8").partition("<!-- loss weights -->\n")[2].partition("\n\n")[0]
    for row in table.splitlines()[2:]:
        name, *formulas = re.findall(r"`([^`]*)`", row)
        assert len(formulas) == len(KINDS)
        yield from ((name, kind, formula) for kind, formula in zip(KINDS, formulas, strict=True))


def test_the_table_of_the_guide_has_every_weight():
    assert [name for name, kind, _ in cells() if kind == "epsilon"] == list(LOSS_WEIGHTS) == list(OPTIONS)


@pytest.mark.parametrize(("name", "kind", "formula"), [*cells()])
def test_the_formula_of_the_guide(name, kind, formula):
    for options in OPTIONS[name]:
        s = LEVELS.exp().numpy()
        t = 1 / (1 + np.sqrt(s))
        names = {
            "s": s,
            "t": t,
            "π": np.pi,
            "min": np.minimum,
            "max": np.maximum,
            "sqrt": np.sqrt,
            "γ": options.get("gamma", 1.0 if name == "p2" else 5.0),
            "k": options.get("k", 1.0),
            "d": options.get("sigma_data", 0.5),
            "p": normal_density(t, options.get("logit_mean", 0.0), options.get("logit_std", 1.0)),
            "q": mode_density(t, options.get("mode_scale", 1.29)) if name == "mode" else None,
        }
        expected = torch.from_numpy(np.broadcast_to(eval(formula, names), s.shape).copy()).double()
        found = predicted_weight(LOSS_WEIGHTS[name](LEVELS, **options), LEVELS, kind)
        torch.testing.assert_close(found, expected, rtol=1e-5 if name == "mode" else 1e-10, atol=0)


@pytest.mark.parametrize("name", ["logit_normal", "mode", "cosmap"])
def test_the_weight_of_the_velocity_is_a_density_of_the_time(name):
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    log_snr = 2 * torch.log((1 - t) / t)
    weight = predicted_weight(LOSS_WEIGHTS[name](log_snr), log_snr, "flow_prediction")
    assert float(weight.mean()) == pytest.approx(1, rel=1e-4)


def test_truncated_snr_and_edm_with_unit_data_are_known_weights_of_v():
    v = predicted_weight(diffusion.edm_weight(LEVELS, sigma_data=1.0), LEVELS, "v_prediction")
    torch.testing.assert_close(v, torch.ones_like(v))
    x0 = predicted_weight(diffusion.truncated_snr_weight(LEVELS), LEVELS, "sample")
    torch.testing.assert_close(x0, LEVELS.exp().clamp(min=1))


#: Versions that are about: the weight, the prediction that it is used for, and what is used, of SNR s and γ = 5.
WRONG = {
    "the clamp inverted": ("min_snr", "sample", lambda s: s.clamp(min=5)),
    "the clamp inverted, for noise": ("min_snr", "epsilon", lambda s: s.clamp(min=5) / s),
    "v without plus one": ("min_snr", "v_prediction", lambda s: s.clamp(max=5) / s),
    "the weight of noise on x0": ("min_snr", "sample", lambda s: s.clamp(max=5) / s),
    "the root of the SNR": ("min_snr", "epsilon", lambda s: s.sqrt().clamp(max=5) / s.sqrt()),
    "debiased v": ("debiased", "v_prediction", lambda s: 1 / (s + 1)),
    "sigma_sqrt on the velocity": ("sigma_sqrt", "flow_prediction", lambda s: (1 + s.sqrt()) ** 2),
}
#: What is right, in numbers worked out by hand, at SNR 1, 16 and 1/16.
RIGHT = {
    ("min_snr", "sample"): [1, 5, 1 / 16],
    ("min_snr", "epsilon"): [1, 5 / 16, 1],
    ("min_snr", "v_prediction"): [1 / 2, 5 / 17, 1 / 17],
    ("debiased", "v_prediction"): [1 / 2, 4 / 17, 4 / 17],
    ("sigma_sqrt", "flow_prediction"): [1, 1, 1],
}


@pytest.mark.parametrize("version", WRONG)
def test_it_is_not(version):
    name, kind, used = WRONG[version]
    s = torch.tensor([1.0, 16.0, 1 / 16], dtype=torch.float64)
    found = predicted_weight(LOSS_WEIGHTS[name](s.log()), s.log(), kind)
    torch.testing.assert_close(found, torch.tensor(RIGHT[name, kind], dtype=torch.float64))
    # The wrong version makes another loss of the same denoiser: not just a constant times the right one.
    of_noise, error = squared_errors(kind, s.log())
    ratio = used(s) * error / (LOSS_WEIGHTS[name](s.log()) * of_noise)
    assert ratio.max() / ratio.min() > 1.5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("soft_min_snr", {"gamma": 0}, "gamma: expected a positive number, found 0"),
        ("edm", {"sigma_data": -1}, "sigma_data: expected a positive number, found -1"),
        ("logit_normal", {"logit_std": 0}, "logit_std: expected a positive number, found 0"),
        ("mode", {"mode_scale": 1.8}, "mode_scale: expected above -1 and below"),
        ("mode", {"mode_scale": -1}, "mode_scale: expected above -1 and below"),
    ],
)
def test_weights_refuse(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LOSS_WEIGHTS[name](LEVELS, **options)


def test_every_weight_keeps_dtype_and_shape():
    for name, function in LOSS_WEIGHTS.items():
        found = function(LEVELS.float().reshape(3, 11))
        assert (found.shape, found.dtype) == ((3, 11), torch.float32), name
        torch.testing.assert_close(found.double().flatten(), function(LEVELS), rtol=1e-4, atol=0)


def test_min_snr_of_other_predictions():
    levels = SNR[:-1].log()
    weight = min_snr_weight(levels, gamma=5)
    torch.testing.assert_close(predicted_weight(weight, levels, "sample"), SNR[:-1].clamp(max=5.0))
    velocity = SNR[:-1].clamp(max=5.0) / (SNR[:-1] + 1)
    torch.testing.assert_close(predicted_weight(weight, levels, "v_prediction"), velocity)
    with pytest.raises(ValueError, match="prediction_type: expected"):
        predicted_weight(weight, levels, "score")
