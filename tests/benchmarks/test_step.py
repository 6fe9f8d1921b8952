from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffmtl_fast as dm
from benchmarks import models, step
from benchmarks.harness import Candidate, GateError, compare
from benchmarks.models import Case
from benchmarks.reference import cluster_gradients, pcgrad
from benchmarks.step import Setting
from benchmarks.ways import COMPILED, Way, ours, projecting, ways


def small_dit(batch_size: int, num_clusters: int) -> Case:
    batch = models.dit(batch_size, num_clusters).batch
    return Case("DiT", models.DiT(width=24, depth=1), batch, num_clusters, {})


def small_unet(batch_size: int, num_clusters: int) -> Case:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    batch = models.unet(batch_size, num_clusters).batch
    return Case("UNet2DModel", model, batch, num_clusters, {"return_dict": False})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "MODELS", {"dit": small_dit, "unet": small_unet})


@pytest.fixture
def case(tiny: None, device: torch.device) -> Case:
    return Setting("dit", 10, 5, str(device), autocast=False).case()


def errors(setting: Setting) -> dict[str, float | str]:
    """Return the error of every way that passes its gate, and of the others why not."""
    baseline, *others = step.candidates(setting.case(), [COMPILED])
    result = compare("case", baseline, others, rounds=1, warmup=0)
    return result.left_out | {row.name: row.error for row in result.rows if row.error is not None}


@pytest.mark.parametrize(("model", "k"), [("dit", 2), ("dit", 5), ("unet", 5)])
def test_every_way_is_right(tiny: None, model: str, k: int, device: torch.device) -> None:
    found = errors(Setting(model, 10, k, str(device), autocast=False))
    assert len(found) == 13
    for name, error in found.items():
        if name.startswith("TorchJD") and "torchjd" not in sys.modules:
            assert "pip install 'diffmtl-fast[bench]'" in str(error)
        else:
            assert isinstance(error, float), f"{name}: {error}"
            assert error <= 1e-5 or not name.startswith("diffmtl_fast")


def test_under_autocast_ours_are_as_right_as_a_backward_per_cluster(tiny: None, device: torch.device) -> None:
    found = errors(Setting("dit", 10, 2, str(device), autocast=True))
    for name, error in found.items():
        if name.startswith("diffmtl_fast"):
            assert isinstance(error, float)
            assert 1e-5 < error < 0.1, name


def test_unequal_clusters_leave_out_only_vmap(tiny: None, device: torch.device) -> None:
    found = errors(Setting("dit", 11, 5, str(device), autocast=False))
    left_out = {name: why for name, why in found.items() if isinstance(why, str) and "TorchJD" not in name}
    assert left_out == {
        "vmap(grad), gradients only": "ValueError: expected clusters of one size, found 2 to 3 samples"
    }


def test_without_torchjd_the_command_is_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchjd.autojac", "torchjd.autogram", "torchjd.aggregation"):
        monkeypatch.setitem(sys.modules, module, None)
    found = {way.name: way for way in ways(case) if way.name.startswith("TorchJD")}
    assert len(found) == 2
    for way in found.values():
        assert way.peer
        with pytest.raises(ImportError, match=r"pip install 'diffmtl-fast\[bench\]'"):
            way.prepare()


def test_the_gate_sees_a_wrong_row(case: Case) -> None:
    jacobian = step.exact_jacobian(case)
    by_hand = next(way for way in ways(case) if way.outcome == "jacobian").prepare()()
    assert step._error(by_hand, jacobian, case) < 1e-5
    assert step._error(by_hand[::-1], jacobian, case) > 0.1


def test_exact_gradients_are_those_of_one_backward_per_cluster(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "CHUNK", 1)  # unlike the clusters, of two samples each
    exact = case.exact()
    losses = exact.losses(exact.model, exact.batch)
    expected = cluster_gradients(losses, exact.batch.cluster, list(exact.model.parameters()), 5).jacobian
    torch.testing.assert_close(step.exact_jacobian(case), expected, rtol=1e-9, atol=1e-12)
    assert next(case.model.parameters()).dtype == torch.float32


def test_projection_is_that_of_the_vectors(case: Case) -> None:
    jacobian = torch.randn(5, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.3
    jacobian[::2] *= -1
    found = step.directions(case, jacobian.to(case.device))["pcgrad"][0]
    orders = projecting(case).draw_order(5, case.device)
    expected = pcgrad(jacobian.to(case.device), orders) / 5
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found, jacobian.mean(0).to(found))


def test_nash_weights_that_solve_nothing_are_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(gramian: Tensor) -> Tensor:
        return torch.ones(len(gramian), dtype=gramian.dtype)

    monkeypatch.setattr(dm.ops, "nash_weights", ones)
    with pytest.raises(GateError, match="Nash weights: expected"):
        step._bargaining(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)))


def test_a_step_that_skips_its_gradients_is_not_timed(case: Case) -> None:
    mtl = dm.ClusteredMTL(case.model, 5, dm.Equal())
    run = ours(case, mtl, dm.NashMTL(update_every=2))
    run()
    with pytest.raises(GateError, match="expected a Gramian in every step"):
        run()


def test_every_k_at_the_first_batch_size_and_the_typical_one_at_the_others() -> None:
    options = step.parse(["--device", "cpu", "--models", "dit", "--k", "2", "5", "--batch", "40", "80"])
    found = [(setting.batch, setting.k) for setting in step.settings(options)]
    assert found == [(40, 2), (40, 5), (80, 5)]


def test_defaults_follow_the_device() -> None:
    cpu, gpu = step.parse(["--device", "cpu"]), step.parse(["--device", "cuda:1"])
    assert (cpu.models, cpu.batch, cpu.autocast, cpu.compile) == (
        ["dit", "unet", "diffusers-dit"],
        [40, 20],
        False,
        False,
    )
    assert (gpu.models, gpu.batch, gpu.autocast, gpu.compile) == (["dit-s2", "dit-b2"], [256], True, True)
    assert not step.parse(["--device", "cuda", "--no-autocast"]).autocast


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(function: Callable[..., object], *args: object) -> object:
        return function(*args)

    def once(run: Callable[[], object], device: torch.device) -> int:
        run()
        return 100

    monkeypatch.setattr(step, "in_fresh_process", here)
    monkeypatch.setattr(step, "peak", once)


def test_a_run_writes_its_table_and_plot(
    tiny: None, one_process: None, tmp_path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--device", device.type, "--models", "dit", "--no-compile", "--out", str(tmp_path)]
    step.main([*arguments, "--k", "2", "3", "--batch", "6", "--rounds", "1", "--no-autocast"])
    record = json.loads((tmp_path / f"step_{device.type}.json").read_text())
    first, second = record["comparisons"]
    assert (first["parameters"]["k"], second["parameters"]["k"]) == (2, 3)
    assert first["rows"][0] == first["rows"][0] | {"name": "plain", "runs": 1, "memory": 100}
    assert second["rows"][0]["memory"] is None
    details = {row["name"] for row in first["rows"]} - {row["name"] for row in second["rows"]}
    assert details == {
        f"diffmtl_fast{way}" for way in (", UncertaintyWeighting", " sliced, NashMTL", " lean, NashMTL")
    }
    table = step.summary(record)
    assert capsys.readouterr().out.endswith(table + "\n")
    assert table.count("\n") == 1 + 12
    # Drawn again from the file alone.
    plot = next(tmp_path.glob("step_cost*.png"))
    plot.unlink()
    step.main([*arguments, "--report"])
    assert plot.stat().st_size > 10_000
    assert capsys.readouterr().out == table + "\n"


def test_a_peer_without_peak_memory_has_none(
    tiny: None, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Any:
        raise MemoryError

    found = [Way("plain", "mean", lambda: list), Way("peer", "mean", fail, peer=True)]
    monkeypatch.setattr(step, "ways", lambda case: found)
    setting = Setting("dit", 4, 2, "cpu", autocast=False)
    assert step.peaks(setting) == {"plain": 100}
    found.append(Way("ours", "mean", fail))
    with pytest.raises(MemoryError):
        step.peaks(setting)


def test_summary_shows_what_is_missing() -> None:
    def compared(model: str, *others: Candidate) -> dict[str, Any]:
        plain = Candidate("plain", lambda: None)
        return asdict(compare(model, plain, others, 1, title=model, model=model, k=5, batch=4))

    def absent() -> float:
        raise ImportError("not installed")

    record = {
        "settings": {"k": [2, 5], "batch": [4]},
        "comparisons": [
            compared("A", Candidate("way", lambda: None)),
            compared("B", Candidate("peer", lambda: None, absent, peer=True)),
        ],
    }
    lines = step.summary(record).splitlines()
    assert lines[0] == "| | A | B | memory, A | memory, B |"
    assert lines[2].startswith("| way | ")
    assert lines[2].endswith(" | – | – | – |")
    assert lines[3] == "| peer | – | – | – | – |"
