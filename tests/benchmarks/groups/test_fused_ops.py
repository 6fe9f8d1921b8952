from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from benchmarks.benchmark import Benchmark, Options
from benchmarks.groups import fused_ops, op_cases
from benchmarks.groups.fused_ops import COMPILED, OURS, PLAIN
from benchmarks.groups.op_cases import QUICK, TOLERANCE, Case
from benchmarks.harness import GateError, compare

CPU = torch.device("cpu")
OPTIONS = Options("cpu", "quick", compile=False, memory=False)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    torch.manual_seed(0)
    yield from op_cases.loss_cases(QUICK.small, dtype, CPU)
    yield from op_cases.jacobian_cases(QUICK.parameters, dtype, CPU)
    yield from op_cases.layer_cases(QUICK.rows, QUICK.columns, dtype, CPU)
    yield from op_cases.norm_cases(QUICK.image, dtype, CPU)
    yield from op_cases.conv_cases(op_cases.SMALL_IMAGES, dtype, CPU)


def case(op: str, dtype: torch.dtype = torch.float32) -> Case:
    return next(case for case in cases(dtype) if case.op == op)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_op_passes_its_gate(dtype: torch.dtype) -> None:
    for found in cases(dtype):
        candidate = found.fused_candidate()
        assert candidate.error is not None
        assert candidate.error() <= candidate.tolerance, found.name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_plain_composition_passes_its_gate(dtype: torch.dtype) -> None:
    for found in cases(dtype):
        candidate = found.plain_candidate(PLAIN, found.plain)
        assert candidate.peer
        if found.op == "add_noise, seed":  # its noise is another
            assert candidate.error is None
            continue
        assert candidate.error is not None
        assert candidate.error() <= candidate.tolerance, found.name


def test_a_wrong_composition_is_left_out_with_the_reason() -> None:
    right = case("gram")
    wrong = replace(right, plain=lambda jacobian: 1.1 * jacobian @ jacobian.T, exact=op_cases.gram)
    found = compare([right.fused_candidate(), wrong.plain_candidate(PLAIN, wrong.plain)], rounds=1)
    assert found.left_out == {PLAIN: "PyTorch: expected a relative error <= 0.02, found 0.1"}


def test_a_wrong_op_is_not_timed() -> None:
    right = case("sample_mse")
    wrong = replace(right, fused=lambda pred, target: 2 * op_cases.sample_mse(pred, target))
    with pytest.raises(GateError, match="diffmtl_fast: expected a relative error <= 1e-05, found 1"):
        compare([right.plain_candidate(PLAIN, right.plain), wrong.fused_candidate()], rounds=1)


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
        "cluster_sum": QUICK.rows * QUICK.columns,
        "group_norm_backward": 3 * 3 * 8 * 5 * 3,  # gradient, input and result
    }
    for op, moved in expected.items():
        assert case(op, dtype).moved == moved * size, op


def test_cases_are_known_without_memory() -> None:
    # What is said of a case on no device is true of the one that is measured.
    found = [b for b in fused_ops.benchmarks(OPTIONS) if b.parameters["kind"] == "memory"]
    there = {c.op: c for c in cases(torch.float32) if c.bound}
    by_op: dict[str, list[Benchmark]] = {}
    for work in found:
        by_op.setdefault(work.parameters["op"], []).append(work)
    assert by_op.keys() == there.keys()
    for op in ("gram", "gram of parts", "combine_ into .grad", "cluster_sum"):
        assert by_op[op][0].parameters["bytes"] == there[op].moved
        assert by_op[op][0].parameters["shape"] == there[op].shape


def test_every_benchmark_builds_what_it_names() -> None:
    for work in fused_ops.benchmarks(OPTIONS):
        assert [candidate.name for candidate in work.candidates()] == list(work.ways), work.case


def test_the_yardstick_moves_the_bytes_it_says() -> None:
    memory = fused_ops.Memory(1, CPU)
    assert fused_ops.moved(1, "copy") == 2 * fused_ops.moved(1, "read") == 2 * memory._source.nbytes
    memory.candidate("copy").run()
    assert torch.equal(memory._copy, memory._source)


def test_what_the_compiler_takes_part_in() -> None:
    found = {
        (work.parameters["op"], work.parameters["dtype"])
        for work in fused_ops.benchmarks(Options("cpu"))
        if COMPILED in work.ways
    }
    assert {("gram", dtype) for dtype in ("float32", "bfloat16")} <= found
    assert ("sample_mse", "float32") in found
    assert ("sample_mse", "bfloat16") not in found
    full = fused_ops.benchmarks(Options("cpu", "full"))
    assert ("sample_mse", "bfloat16") in {
        (work.parameters["op"], work.parameters["dtype"]) for work in full if COMPILED in work.ways
    }


@pytest.mark.compile
def test_a_compiled_composition_is_gated_or_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))

    def broken(*inputs: object) -> object:
        raise RuntimeError("no such thing\nand more")

    def doubled(x0: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return (2 if x0.dtype == torch.float32 else 1) * op_cases.add_noise(x0, *rest)

    work = case("add_noise")
    ours = work.fused_candidate()
    right = compare([ours, fused_ops.compiled(work)], rounds=1)
    wrong = compare([ours, fused_ops.compiled(replace(work, plain=doubled))], rounds=1)
    assert [way.name for way in right.ways] == [OURS, COMPILED]
    assert "expected a relative error <= 0.0001, found 1" in wrong.left_out[COMPILED]
    with pytest.raises(RuntimeError, match="no such thing"):
        fused_ops.compiled(replace(work, plain=broken)).run()
