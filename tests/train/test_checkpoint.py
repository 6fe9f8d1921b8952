"""Checkpoints: what goes in comes out; what was damaged is found."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from torch import nn

from diffmtl_fast._errors import UserError
from diffmtl_fast.train import checkpoint

STATE = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "iteration": 4, "none": None}


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def _save(folder, iteration, keep=2):
    return checkpoint.save(folder, iteration, {"model": _tied()}, STATE, keep)


def test_round_trip_with_tied_weights(tmp_path):
    model, other = _tied(), _tied()
    path = checkpoint.save(tmp_path, 4, {"model": model}, STATE, keep=2)
    checkpoint.verify(path)
    checkpoint.load_module(path, "model", other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    state = checkpoint.load_state(path)
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], torch.ones(3))
    assert state["none"] is None
    assert checkpoint.iteration(path) == 4


def test_keeps_the_newest(tmp_path):
    for iteration in (5, 10, 100):
        _save(tmp_path, iteration)
    assert [checkpoint.iteration(path) for path in checkpoint.checkpoints(tmp_path)] == [10, 100]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EFBIG)),
        RuntimeError("unexpected pos 48"),
    ],
    ids=str,
)
def test_a_full_disk_keeps_the_checkpoints_before(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    good = _save(tmp_path, 1)
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"iter-00000002: cannot be written with \d+ MiB free"):
        _save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [good]
    checkpoint.verify(good)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize(
    "damage", [_flip, _truncate, lambda path: path.unlink(), lambda path: path.write_bytes(b"")]
)
def test_damage_is_found_and_the_older_checkpoint_named(tmp_path, name, damage):
    older, newer = _save(tmp_path, 1), _save(tmp_path, 2)
    damage(newer / name)
    with pytest.raises(UserError) as caught:
        checkpoint.verify(newer)
    assert f"checkpoint {newer} is corrupt" in str(caught.value)
    assert f"--checkpoint {older}" in str(caught.value)
    checkpoint.verify(older)


def test_the_older_checkpoint_that_is_named_is_intact(tmp_path):
    paths = [_save(tmp_path, iteration, keep=3) for iteration in (1, 2, 3)]
    _flip(paths[2] / "state.pt")
    _truncate(paths[1] / "model.safetensors")
    with pytest.raises(UserError, match=r"--checkpoint .*iter-00000001 continues from an older one"):
        checkpoint.verify(paths[2])
    (paths[0] / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"iter-00000003 is corrupt: .*; the older ones are corrupt too"):
        checkpoint.verify(paths[2])


@pytest.mark.parametrize("manifest", [[], {"sha256": {}}, {"sha256": 3}])
def test_a_manifest_that_lists_nothing_is_corrupt(tmp_path, manifest):
    path = _save(tmp_path, 1)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="there is no older one"):
        checkpoint.verify(path)


@pytest.mark.parametrize("other", [nn.Linear(3, 3), nn.Sequential(nn.Linear(4, 4))], ids=["keys", "shape"])
def test_weights_of_another_module_are_one_error(tmp_path, other):
    path = _save(tmp_path, 1)
    with pytest.raises(UserError, match=r"iter-00000001: model\.safetensors does not fit"):
        checkpoint.load_module(path, "model", other)


def test_a_truncated_state_is_one_error(tmp_path):
    """Also where its manifest was not looked at."""
    path = _save(tmp_path, 1)
    _truncate(path / checkpoint.STATE)
    with pytest.raises(UserError, match=r"iter-00000001.*state\.pt"):
        checkpoint.load_state(path)
