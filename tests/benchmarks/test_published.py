"""A checkout with the authors' interfaces, and with the faults that are known of them, written for this test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.benchmark import Options
from benchmarks.measure import measure
from benchmarks.names import Group
from benchmarks.published import Checkout, CheckoutError, checkout
from benchmarks.suite import GROUPS

CLUSTERING = """
import numpy as np


def _solve(n, k, loss):
    best = np.full((k, n), np.inf)
    last = np.zeros((k, n), dtype=int)
    best[0] = [loss(0, end) for end in range(n)]
    for j in range(1, k):
        for end in range(j, n):
            totals = {s: best[j - 1, s] + loss(s + 1, end) for s in range(j FIRST, end)}
            totals = {s: total for s, total in totals.items() if ZERO}
            if totals:
                last[j, end] = min(totals, key=totals.get)
                best[j, end] = totals[last[j, end]]
    ends = [n - 1]
    for j in range(k - 1, 0, -1):
        ends.append(last[j, ends[-1]])
    starts = [0.0, *(float(end + EARLY) for end in reversed(ends[1:]))]
    return [(start, stop - 1) for start, stop in zip(starts, [*starts[1:], LAST + 1])]


def snr_based_clustering(snr, k):
    return _solve(len(snr), k, lambda l, r: np.abs(snr[l : r + 1] - snr[CENTRE]).sum())


def tas_based_clustering(tas, k):
    return _solve(len(tas), k, lambda l, r: -tas[(l + r + 1) // 2, l : r + 1].sum())
"""
PCGRAD = """
import random

import torch


class PCgrad:
    def __init__(self, num_tasks, model_module):
        self.num_tasks, self.model = num_tasks, model_module

    def do_pc_grad(self, grads):
        total = torch.zeros_like(grads[0])
        for i in range(self.num_tasks):
            row, order = grads[i].clone(), list(range(self.num_tasks))
            random.shuffle(order)
            for j in order:
                inner = torch.dot(row, grads[j])
                if inner < 0 and OTHERS:
                    row -= inner / grads[j].norm() ** 2 * grads[j] * STRENGTH
            total += row
        return total

    def _reset_grad(self, new_grads):
        for p in self.model.parameters():
            p.grad, new_grads = new_grads[: p.numel()].view_as(p), new_grads[p.numel() :]
"""
NASH = """
import numpy as np
from diffmtl_fast.ops import nash_weights
import torch


class NashMTL:
    def __init__(self, num_tasks, model_module, device, opt):
        self.normalization_factor = np.ones((1,))

    def _init_optim_problem(self):
        pass

    def solve_optimization(self, gtg):
        return nash_weights(torch.from_numpy(gtg)).numpy() / np.sqrt(self.normalization_factor) ** SCALED
"""
FAULTY = {
    "FIRST": "", "ZERO": "total != 0", "EARLY": "0", "LAST": "1000",
    "CENTRE": "round((l + r + 1) / 2) if l < r else l",
    "OTHERS": "True", "STRENGTH": "1", "SCALED": "1",
}  # fmt: skip
MENDED = FAULTY | {
    "FIRST": "- 1", "ZERO": "True", "EARLY": "1", "LAST": "n - 1", "CENTRE": "(l + r + 1) // 2",
    "OTHERS": "j != i", "SCALED": "0",
}  # fmt: skip


def write(folder: Path, **changes: str) -> Path:
    """Write a checkout; `changes` are put in place of the words in capitals."""
    (folder / "mtl_library").mkdir(parents=True)
    for name, text in (
        ("interval_clustering.py", CLUSTERING),
        ("mtl_library/pcgrad.py", PCGRAD),
        ("mtl_library/nash.py", NASH),
    ):
        for word, value in {**FAULTY, **changes}.items():
            text = text.replace(word, value)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    pytest.importorskip("ecos")
    return write(tmp_path / "faulty")


def measured(path: Path, group: Group, word: str) -> tuple[dict[str, float | None], dict[str, str]]:
    """Measure a case with a checkout: errors of what was timed, and why the rest was not."""
    options = Options("cpu", "quick", compile=False, memory=False, rounds=1, reference_repo=str(path))
    found = measure(next(b for b in GROUPS[group](options) if word in b.case), options)
    return {way.name: way.error for way in found.ways}, dict(found.left_out)


def test_known_faults_are_named(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checkout(faulty)
    assert capsys.readouterr().out.count("authors' code: ") == len(found.faults()) == 6
    text = "\n".join(found.faults())
    assert "begin one timestep early" in text
    assert "the last cluster of T = 30 ends at 1000" in text
    assert "partitions without cost are passed over" in text
    assert "rounded half to even" in text
    assert "projected against itself" in text
    assert "10 times smaller at a Gramian 100 times as large" in text


def test_mended_code_has_no_faults(tmp_path: Path) -> None:
    pytest.importorskip("ecos")
    found = checkout(write(tmp_path / "mended", **{k: v for k, v in MENDED.items() if k != "EARLY"}))
    # How cuts are read is the one thing that depends on the fault: a mended list would be read one step late.
    assert found.faults() == ["clusters after the first begin one timestep early"]


@pytest.mark.parametrize(
    ("group", "word"),
    [
        (Group.CLUSTERING, "log-SNR, T = 60"),
        (Group.CLUSTERING, "affinity"),
        (Group.WEIGHTS, "PCGrad"),
        (Group.WEIGHTS, "Nash"),
    ],
)
def test_right_results_are_timed(faulty: Path, group: Group, word: str) -> None:
    errors, _ = measured(faulty, group, word)
    assert errors["authors' code"] is not None
    assert errors["authors' code"] <= 0.02
    assert not {"published", "published loop over vectors", "cvxpy + ECOS, as published"} & errors.keys()


def test_the_step_uses_their_loop(faulty: Path) -> None:
    errors, _ = measured(faulty, Group.STEP, "tiny")
    error = errors["K backwards, PCGrad (authors' code)"]
    assert error is not None
    assert error < 1e-4


def test_a_wrong_result_is_not_timed(tmp_path: Path) -> None:
    pytest.importorskip("ecos")
    errors, left_out = measured(write(tmp_path / "wrong", STRENGTH="0.5"), Group.WEIGHTS, "PCGrad")
    assert "authors' code" not in errors
    assert "expected a relative error <= 0.02" in left_out["authors' code"]


def test_a_folder_without_the_interfaces(tmp_path: Path) -> None:
    with pytest.raises(CheckoutError, match="expected a folder, found"):
        checkout(tmp_path / "none")
    with pytest.raises(CheckoutError, match=r"expected interval_clustering\.py in"):
        checkout(tmp_path)
    (tmp_path / "interval_clustering.py").write_text("def snr_based_clustering(snr, k): ...\n")
    with pytest.raises(CheckoutError, match="expected tas_based_clustering in"):
        checkout(tmp_path)


def test_without_ecos_weights_of_one_are_not_timed(faulty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    found: Checkout = checkout(faulty)
    monkeypatch.setattr(cvxpy, "installed_solvers", lambda: ["CLARABEL"])
    candidate = found.bargaining("theirs", torch.eye(3))
    assert candidate.peer
    with pytest.raises(ImportError, match="without it these weights are all 1"):
        candidate.run()
