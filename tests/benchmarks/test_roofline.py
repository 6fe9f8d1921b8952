from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import harness, op_cases, roofline
from benchmarks.harness import Candidate, GateError
from benchmarks.op_cases import QUICK, TOLERANCE, Case

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_ecos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the published solver, which has tests of its own and takes seconds to load."""

    def unavailable(*inputs: object, **options: object) -> None:
        raise ImportError("expected cvxpy to find the solver ECOS")

    monkeypatch.setattr(op_cases, "nash_weights", unavailable)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    torch.manual_seed(0)
    yield from op_cases.loss_cases(QUICK.small, dtype, CPU)
    yield from op_cases.jacobian_cases(QUICK.parameters, dtype, CPU)
    yield from op_cases.layer_cases(QUICK.rows, QUICK.columns, dtype, CPU)
    yield from op_cases.weight_cases(CPU)


def case(op: str, dtype: torch.dtype = torch.float32) -> Case:
    return next(case for case in cases(dtype) if case.op == op)


def small_run(rounds: int = 2) -> roofline.Run:
    return roofline.Run(CPU, rounds, compiles=False, megabytes=1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_op_passes_its_gate(dtype: torch.dtype) -> None:
    for found in cases(dtype):
        candidate = found.fused_candidate()
        assert candidate.error is not None
        assert candidate.error() <= candidate.tolerance, found.name


def test_every_plain_composition_does_the_same_work() -> None:
    for found in cases(torch.float32):
        if found.op == "add_noise, seed":  # its noise is another
            continue
        candidate = found.candidate("plain", found.plain, 1e-4)
        assert candidate.error is not None
        assert candidate.error() <= candidate.tolerance, found.name


def test_a_wrong_op_is_not_timed() -> None:
    wrong = replace(case("sample_mse"), fused=lambda pred, target: 2 * op_cases.sample_mse(pred, target))
    with pytest.raises(GateError, match="diffmtl_fast: expected a relative error <= 1e-05, found 1"):
        small_run().measure("memory", [wrong])


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=str)
def test_moved_bytes(dtype: torch.dtype, size: int) -> None:
    elements, parameters = 6 * 2 * 2 * 2, QUICK.parameters
    expected = {
        "sample_mse, forward": 2 * elements,
        "sample_mse": 5 * elements,  # prediction and target twice, and the gradient
        "denoising_loss v": 7 * elements,
        "add_noise": 3 * elements,
        "add_noise, seed": 2 * elements,
        "gram": 5 * parameters,
        "gram of parts": 5 * parameters,
        "combine_ into .grad": 6 * parameters,
        "gram + pcgrad_weights + combine": 11 * parameters,
        "cluster_sum": QUICK.rows * QUICK.columns,
    }
    for op, moved in expected.items():
        assert case(op, dtype).moved == moved * size, op


def test_a_share_is_bandwidth_over_that_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    run, work = small_run(rounds=4), case("add_noise")
    seconds = {"copy memory": 2.0, "PyTorch": 0.5, "diffmtl_fast": 0.25}
    monkeypatch.setattr(roofline, "compare", stopped(seconds))
    run.measure("memory", [work])
    (record,) = run.records
    assert record["bytes"] == 3 * 48 * 4
    moved = run.memory.moved("copy")
    assert moved == 2 * 2**20
    ours = record["bytes"] / 0.25
    assert record["share"]["diffmtl_fast"]["median"] == pytest.approx(ours / (moved / 2.0))
    assert record["times_ours"] == {"copy memory": 8.0, "PyTorch": 2.0}


def stopped(seconds: dict[str, float]) -> Callable[..., harness.Comparison]:
    """A `compare` whose clock shows the seconds of each way."""

    def compare(
        case: str, baseline: Candidate, others: list[Candidate], rounds: int, **options: object
    ) -> harness.Comparison:
        def timed(candidate: Candidate) -> Candidate:
            def run() -> float:
                return seconds[candidate.name]

            return replace(candidate, run=run)

        def clock(run: Callable[[], object], repeats: int) -> float:
            answer = run()
            assert isinstance(answer, float)
            return answer

        return harness.compare(case, timed(baseline), [timed(other) for other in others], rounds, clock=clock)

    return compare


@pytest.mark.compile
def test_a_compiled_composition_is_gated_or_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))

    def broken(*inputs: object) -> object:
        raise RuntimeError("no such thing\nand more")

    def doubled(x0: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return (2 if x0.dtype == torch.float32 else 1) * op_cases.add_noise(x0, *rest)

    run, work = roofline.Run(CPU, rounds=1, compiles=True, megabytes=1), case("add_noise")
    run.measure("memory", [work, replace(work, plain=doubled)])
    right, wrong = run.comparisons
    assert [row.name for row in right.rows][-1] == "torch.compile"
    assert "expected a relative error <= 0.0001, found 1" in wrong.left_out["torch.compile"]
    assert "torch.compile" not in run.records[1]["times_ours"]
    with pytest.raises(RuntimeError, match="no such thing"):
        roofline.compiled(replace(work, plain=broken)).run()


def test_quick_run_measures_everything_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    roofline.main(["--quick", "--device", "cpu", "--dtypes", "float32"])
    printed = capsys.readouterr().out
    for group in ("memory", "arithmetic", "cache", "latency", "host"):
        assert f"| {group} | " in printed
    assert not list(tmp_path.iterdir())


def test_records_are_json_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = small_run()
    for dtype in TOLERANCE:
        run.measure("memory", [case("sample_mse", dtype), case("gram", dtype)])
    run.records[0]["share"]["torch.compile"] = run.records[0]["share"]["PyTorch"]
    assert json.loads(json.dumps(run.records)) == run.records
    roofline.plot(run.records, "a machine", tmp_path / "images" / "roofline.png")
    assert (tmp_path / "images" / "roofline.png").stat().st_size > 1000
