"""Configurations: defaults, checks, comparison."""

from __future__ import annotations

import pytest
import yaml

from diffmtl_fast._errors import UserError
from diffmtl_fast.train.config import CONTINUOUS, differences, digits, from_dict, read, to_dict
from diffmtl_fast.weighting import METHODS


def test_bundled_configuration_is_complete_and_survives_yaml():
    config = from_dict(digits())
    assert config.method == "uw"
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


CHOICES = ", ".join(f"'{name}'" for name in (CONTINUOUS, *METHODS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "best"},
            f"method: expected one of 'vanilla', {CHOICES}, found best",
        ),
        ({"metod": "uw"}, "metod: unknown option"),
        ({"clusters": {"cots": "snr"}}, "clusters.cots: unknown option"),
        ({"clusters": {"k": 0}}, "clusters.k: expected an integer >= 1 and <= 10^9 or 'auto', found 0"),
        ({"clusters": {"k": 2.5}}, "clusters.k: expected an integer >= 1 and <= 10^9 or 'auto', found 2.5"),
        (
            {"clusters": {"k": "many"}},
            "clusters.k: expected an integer >= 1 and <= 10^9 or 'auto', found many",
        ),
        (
            {"curriculum": {"clusters": {"k": 0}}},
            "curriculum.clusters.k: expected an integer >= 1 and <= 10^9 or 'auto'",
        ),
        ({"curriculum": {"clusters": {"min_size": 0}}}, "curriculum.clusters.min_size: expected an integer"),
        ({"curriculum": {"clusters": {"cost": "affinity"}}}, "curriculum.clusters.affinity: expected a .npy"),
        ({"curriculum": {"order": "easy"}}, "curriculum.order: expected one of 'none', 'easy_to_hard'"),
        ({"timesteps": {"sampler": "normal"}}, "timesteps.sampler: expected 'uniform', 'stratified'"),
        (
            {"timesteps": {"sampler": "beta"}, "curriculum": {"order": "hard_to_easy"}},
            "timesteps.sampler: expected null with a curriculum, which draws the timesteps, found 'beta'",
        ),
        *(
            (
                {"method": "vanilla", "timesteps": {"interval": value}},
                "timesteps.interval: expected [first, end]",
            )
            for value in ([1], [2, 2], [3, 1])
        ),
        *(
            ({"timesteps": {"interval": value}}, "timesteps.interval: expected [an integer >= 0 and ")
            for value in ([0, 2.5], [False, 3], [-1, 3], 5)
        ),
        ({"timesteps": {"interval": [0, 9]}}, "timesteps.interval: expected null, or method vanilla"),
        (
            {"method": "vanilla", "timesteps": {"interval": [0, 9], "sampler": "beta"}},
            "timesteps.interval: expected null, or method vanilla without curriculum or sampler, found [0, 9]",
        ),
        ({"clusters": 5}, "clusters: expected a mapping of options, found 5"),
        ({"clusters": {"cost": "affinity"}}, "clusters.affinity: expected a .npy or .json file"),
        ({"clusters": {"affinity": "a.npy"}}, "clusters.affinity: expected a .npy or .json file"),
        ({"iterations": True}, "iterations: expected an integer >= 1 and <= 10^9, found True"),
        ({"optimizer": {"lr": 0.0}}, "optimizer.lr: expected a number > 0 and <= 10^30, found 0.0"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: expected a number > 0 and <= 10^30, found nan"),
        (
            {"optimizer": {"clip": -1.0}},
            "optimizer.clip: expected a number >= 0 and <= 10^30 or null, found -1.0",
        ),
        ({"ema_decay": 1.5}, "ema_decay: expected a number >= 0 and <= 1, found 1.5"),
        ({"model": {"path": "UNet"}}, "model.path: expected an import path"),
        ({"evaluation": {"num_samples": 3}}, "evaluation.num_samples: expected 0 or more than 3, found 3"),
        ({"evaluation": {"num_real": 3}}, "evaluation.num_real: expected more than 3, found 3"),
        ({"precision": "fp8"}, "precision: expected one of 'fp32', 'bf16', 'fp16'"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(UserError) as caught:
        from_dict({**digits(), **changes})
    assert str(caught.value).startswith(message)


def test_methods_and_their_options_come_from_the_registry():
    for name, method in METHODS.items():
        config = from_dict({**digits(), "method": name})
        assert config.clip == method.clip
        assert config.method_options() == {option.name: option.default for option in method.options}
    config = from_dict({**digits(), "method": "nash", "nash_update_every": 25})
    assert config.method_options() == {"update_every": 25}
    assert not from_dict({**digits(), "method": "vanilla"}).method_options()


def test_strings_in_arguments_of_components_stay_strings():
    args = {"act_fn": "1e-3", "flag": "true", "nested": {"x": "null"}}
    config = from_dict({**digits(), "model": {"path": "a.b", "args": args}})
    assert config.model.args == args


def test_nash_clips_to_one_unless_told_otherwise():
    assert from_dict({**digits(), "method": "nash"}).clip == 1.0
    assert from_dict({**digits(), "method": "nash", "optimizer": {"clip": 0.0}}).clip == 0.0
    assert from_dict({**digits(), "method": "uw"}).clip == 0.0


def test_differences_name_the_options():
    ours = from_dict({**digits(), "seed": 3, "data": {"path": "a.b", "args": {"x": (1, 2)}}})
    theirs = from_dict({**digits(), "data": {"path": "a.b", "args": {"x": [1, 2]}}})
    assert differences(ours, theirs) == {"seed": (3, 0)}


@pytest.mark.parametrize("text", ["- 1\n", "a: [1\n", "text"])
def test_read_refuses_what_is_no_configuration(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        read(path)
