from __future__ import annotations

import functools
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import diffmtl_fast as dm
from benchmarks import models
from benchmarks.benchmark import Options
from benchmarks.groups import compiled, step
from benchmarks.groups.step import Expectations, Setting
from benchmarks.harness import GateError, compare
from benchmarks.models import Case
from benchmarks.reference import cluster_gradients, pcgrad
from benchmarks.step_implementations import (
    StepWay,
    compiled_ways,
    gradient_ways,
    ours,
    projecting,
    slices,
    step_ways,
)


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


def errors(setting: Setting, ways: list[StepWay]) -> dict[str, float | str]:
    """Return the error of every way that passes its gate, and of the others why not."""
    expectations = Expectations(setting.case())
    chosen = [expectations.candidate(way) for way in ways]
    result = compare(chosen, rounds=1, warmup=0)
    return dict(result.left_out) | {way.name: way.error for way in result.ways if way.error is not None}


@pytest.mark.parametrize(("model", "k"), [("dit", 2), ("dit", 5), ("unet", 5)])
@pytest.mark.parametrize("group", [step_ways, gradient_ways], ids=["step", "gradients"])
def test_every_way_is_right(tiny: None, model: str, k: int, group: Any, device: torch.device) -> None:
    pytest.importorskip("ecos")
    found = errors(Setting(model, 10, k, str(device), autocast=False), group())
    assert len(found) == {step_ways: 15, gradient_ways: 8}[group]
    left_out = {name: why for name, why in found.items() if isinstance(why, str)}
    if find_spec("torchjd") is None:
        for name in [name for name in left_out if name.startswith("TorchJD")]:
            assert "pip install 'diffmtl-fast[bench]'" in str(left_out.pop(name))
    # Every other way is there, peers that are installed too, but for vmap, which knows no rule for a convolution's
    # memory format.
    refused = {"is_grads_batched"} if (model, group) == ("unet", gradient_ways) else set()
    assert left_out.keys() == refused
    assert all("inside of vmap" in why for why in left_out.values())
    for name, error in found.items():
        assert name in left_out or error <= 1e-5 or not name.startswith("diffmtl_fast"), name


def test_torchjd_keeps_nothing_from_step_to_step(case: Case) -> None:
    pytest.importorskip("torchjd")
    way = next(way for way in gradient_ways() if way.name == "TorchJD autojac")
    run, expected = way.prepare(case), step.exact_jacobian(case)
    for _ in range(3):
        assert step._error(run(), expected, case) < 1e-5


def test_under_autocast_ours_are_as_right_as_a_backward_per_cluster(tiny: None, device: torch.device) -> None:
    mine = [way for way in step_ways() if way.role in ("limit", "ours")]
    for name, error in errors(Setting("dit", 10, 2, str(device), autocast=True), mine).items():
        assert isinstance(error, float)
        assert error < 0.1, name
        assert error > 1e-5 or "grouped" not in name


def test_unequal_clusters_leave_out_nobody(tiny: None, device: torch.device) -> None:
    setting = Setting("dit", 11, 5, str(device), autocast=False)
    assert setting.case().sizes == [3, 2, 2, 2, 2]
    found = errors(setting, [way for way in gradient_ways() + step_ways() if "TorchJD" not in way.name])
    assert [why for why in found.values() if isinstance(why, str)] == []
    assert {"vmap(grad)", "vmap(grad), PCGrad"} < found.keys()


@pytest.mark.compile
@pytest.mark.parametrize("model", ["dit", "unet"])
def test_compiled_ways_are_right(
    tiny: None, model: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = errors(Setting(model, 10, 5, str(device), autocast=False), compiled_ways())
    assert len(found) == len(compiled_ways())
    left_out = {name: why for name, why in found.items() if isinstance(why, str)}
    # The compiler's vmap has no rule for the memory format in which the UNet upsamples.
    assert left_out.keys() == ({"torch.compile(vmap(grad)), PCGrad"} if model == "unet" else set())
    assert all("memory_format) inside vmap" in why for why in left_out.values())


def test_gradients_that_the_compiler_refuses_are_left_out_by_name(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(function: Any, **options: Any) -> Any:
        assert options["fullgraph"]

        def run(*inputs: Any) -> Any:
            raise RuntimeError("no rule for this model")

        return run

    monkeypatch.setattr(torch, "compile", refusing)
    (way,) = (way for way in compiled_ways() if "compile(vmap(grad))" in way.name)
    expectations = Expectations(case)
    found = compare([expectations.candidate(step_ways()[0]), expectations.candidate(way)], rounds=1)
    assert found.left_out == {"torch.compile(vmap(grad)), PCGrad": "RuntimeError: no rule for this model"}


def test_without_torchjd_the_command_is_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchjd.autojac", "torchjd.autogram", "torchjd.aggregation"):
        monkeypatch.setitem(sys.modules, module, None)
    found = {way.name: way for way in [*step_ways(), *gradient_ways()] if way.name.startswith("TorchJD")}
    assert len(found) == 3
    for way in found.values():
        assert way.peer
        with pytest.raises(ImportError, match=r"pip install 'diffmtl-fast\[bench\]'"):
            way.prepare(case)


def test_the_gate_sees_a_wrong_row(case: Case) -> None:
    jacobian = step.exact_jacobian(case)
    by_hand = list(slices(case)())
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


def test_a_wrong_direction_is_not_timed(case: Case) -> None:
    def doubled(case: Case) -> Any:
        run = step_ways()[0].prepare(case)
        return lambda: [[2 * g for g in row if g is not None] for row in run()]

    expectations = Expectations(case)
    candidates = [
        expectations.candidate(way) for way in (step_ways()[0], StepWay("wrong", "mean", "ours", doubled))
    ]
    with pytest.raises(GateError, match="wrong: expected a relative error <= 1e-05, found 1"):
        compare(candidates, rounds=1)


def test_every_k_at_the_first_batch_size_and_the_typical_one_at_the_others() -> None:
    found = step.settings(Options("cpu", "full", models=("dit",)))
    assert [(s.batch, s.k) for s in found] == [(40, 2), (40, 5), (40, 10), (40, 20), (20, 5)]


def test_settings_follow_the_device() -> None:
    cpu, gpu = step.settings(Options("cpu")), step.settings(Options("cuda:1"))
    assert [(s.model, s.batch, s.k, s.autocast) for s in cpu] == [
        *(("dit", 40, k, False) for k in (2, 5, 10, 20)), *(("unet", 40, k, False) for k in (5, 20)),
        ("diffusers-dit", 40, 5, False),
    ]  # fmt: skip
    assert [(s.model, s.batch, s.autocast) for s in gpu] == [("dit-s2", 256, True), ("dit-b2", 256, True)]
    assert [s.batch for s in step.settings(Options("cuda", batch=8))] == [8, 8]


def test_the_compiler_takes_part_on_a_gpu_or_in_a_full_run() -> None:
    def ks(options: Options) -> set[int]:
        return {b.parameters["k"] for b in compiled.benchmarks(options)}

    assert ks(Options("cuda")) == {5, 20}
    assert ks(Options("cpu", "full")) == {5, 20}
    assert ks(Options("cpu", groups=("compiled",))) == {5, 20}
    assert not ks(Options("cpu"))
    assert not ks(Options("cuda", compile=False))
