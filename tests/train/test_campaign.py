"""Breaking the trainer: kills, damaged files, malformed options, components that fail, calls of the ops.

Seeded. `make campaign` (DIFFMTL_CAMPAIGN=1) does all of it, `make test` a part; docs/reliability.md has figures.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

import diffmtl_fast as dm
from diffmtl_fast.cli import main
from diffmtl_fast.train import checkpoint
from diffmtl_fast.train.config import to_dict
from diffmtl_fast.train.data import ImageData, digits

WHOLE = bool(os.environ.get("DIFFMTL_CAMPAIGN"))
KILLS = int(os.environ.get("DIFFMTL_KILLS", 100 if WHOLE else 1))
DAMAGED = 200 if WHOLE else 3
OPTIONS = 1000 if WHOLE else 12
CALLS = 5000 if WHOLE else 300

COMPONENTS = """
import torch
from torch import nn
from diffmtl_fast.train.data import ImageData, digits

ERRORS = [RuntimeError, KeyError, IndexError, ImportError, FileNotFoundError, OSError, AssertionError, MemoryError,
          ZeroDivisionError, AttributeError, ValueError, StopIteration, SystemExit]

def data(kind="", error=0):
    if kind == "raise":
        raise ERRORS[error]("as asked")
    found = digits()
    train, labels = found.train[:60].clone(), found.train_labels[:60].clone()
    test, test_labels = found.test[:20], found.test_labels[:20]
    if kind == "labels":
        labels[3] = 50
    if kind == "test shape":
        test = test[..., :4]
    if kind == "bytes":
        train = train * 127.5 + 127.5
    if kind == "constant":
        train = torch.full_like(train, 3.0)
    if kind == "absent":
        labels[labels == 4] = 5
    return ImageData(train, labels, test, test_labels)

class Model(nn.Module):
    def __init__(self, kind="", error=0, after=0, classes=10):
        super().__init__()
        if kind == "construct":
            raise ERRORS[error]("as asked")
        self.kind, self.error, self.after, self.calls = kind, error, after, 0
        self.layer, self.time, self.label = nn.Linear(64, 64), nn.Embedding(20, 64), nn.Embedding(classes, 64)
        if kind == "frozen":
            self.requires_grad_(False)
        if kind == "meta":
            self.to("meta")
    def forward(self, x, t, class_labels=None):
        self.calls += 1
        if self.kind == "call" and self.calls > self.after:
            raise ERRORS[self.error]("as asked")
        out = self.layer(x.flatten(1) + self.time(t) + self.label(class_labels)).view(x.shape)
        return {"none": None, "dict": {"a": out}, "int": 3, "tuple": (out,), "detached": out.detach(),
                "shape": out[:, :, :4], "row": out[:1]}.get(self.kind, out) if self.kind != "none" else None
    def save_pretrained(self, path):
        if self.kind == "save":
            raise RuntimeError("as asked")
        path = __import__("pathlib").Path(path); path.mkdir(); torch.save(self.state_dict(), path / "weights.pt")

class Config(dict):
    __getattr__ = dict.get

class Schedule:
    def __init__(self, kind=""):
        self.config = None if kind == "no config" else Config(num_train_timesteps=20)
        if kind == "no number":
            self.config = Config()
        signal = torch.linspace(0.99, 0.01, 20)
        self.alphas_cumprod = {"none": None, "empty": signal[:0], "matrix": signal.view(4, 5), "short": signal[:7],
                               "nan": signal * float("nan"), "text": "abc"}.get(kind, signal)
"""


@pytest.fixture
def run_of(tiny, tmp_path, monkeypatch):
    """Train the tiny run, changed, in this process; returns status and what was printed on standard error."""
    (tmp_path / "broken_parts.py").write_text(COMPONENTS)
    (tmp_path / "syntax_error.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_parts", raising=False)

    def run(capsys, folder, *arguments, **changes):
        path = tmp_path / "config.yaml"
        values = to_dict(tiny(**changes))
        path.write_text(yaml.safe_dump(values))
        status = main(["train", "--config", str(path), "--run-dir", str(folder), *arguments])
        return status, capsys.readouterr().err

    return run


OWN_MODEL = {"path": "broken_parts.Model"}
OWN_DATA = {"path": "broken_parts.data"}


def one_line(status, printed):
    assert status == 2, printed
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, printed
    assert "Traceback" not in printed
    return lines[0].removeprefix("error: ")


def broken_components():
    cases = [({"model": {**OWN_MODEL, "args": {"kind": kind}}}, "model") for kind in
             ("none", "dict", "int", "tuple", "detached", "shape", "row", "frozen", "meta", "save")]  # fmt: skip
    cases += [({"data": {**OWN_DATA, "args": {"kind": kind}}}, "") for kind in
              ("labels", "test shape", "bytes", "constant", "absent")]  # fmt: skip
    cases += [({"scheduler": {"path": "broken_parts.Schedule", "args": {"kind": kind}}}, "scheduler") for kind in
              ("no config", "no number", "none", "empty", "matrix", "short", "nan", "text")]  # fmt: skip
    for error in range(13):
        cases.append(({"data": {**OWN_DATA, "args": {"kind": "raise", "error": error}}}, "data"))
        cases.append(({"model": {**OWN_MODEL, "args": {"kind": "construct", "error": error}}}, "model"))
        for after in (0, 12):
            given = {"kind": "call", "error": error, "after": after}
            cases.append(({"model": {**OWN_MODEL, "args": given}}, ""))
    cases.append(({"model": {"path": "syntax_error.f", "args": {}}}, "model.path"))
    cases.append(({"model": {**OWN_MODEL, "args": {"classes": 3}}}, "model"))
    cases.append(({"sampling": {"steps": 21}}, "sampling"))
    cases.append(
        ({"sampling": {"scheduler": {"path": "diffusers.FlowMatchEulerDiscreteScheduler"}}}, "sampling")
    )
    zero = {"rescale_betas_zero_snr": True, "num_train_timesteps": 20, "beta_schedule": "linear"}
    cases.append(({"scheduler": {"args": zero}, "clusters": {"clip": [-20.0, 20.0]}}, "sampling"))
    return cases


@pytest.mark.parametrize("method", ["vanilla", "pcgrad"] if WHOLE else ["pcgrad"])
def test_broken_components_are_one_line(run_of, tmp_path, capsys, method):
    cases = broken_components()
    for i, (changes, option) in enumerate(cases if WHOLE else random.Random(0).sample(cases, 5)):
        if "model" not in changes and "scheduler" not in changes and "sampling" not in changes:
            changes = {"model": {**OWN_MODEL, "args": {}}, **changes}
        if "model" in changes or changes.get("scheduler", {}).get("path"):
            changes = {"data": {**OWN_DATA, "args": {}}, **changes}
        message = one_line(*run_of(capsys, tmp_path / f"run{i}", method=method, **changes))
        assert message.startswith(option or ""), (changes, message)
        assert "as asked" in message or "expected" in message or option, message


def bad_options(generator):
    """Options and values that no run takes."""
    numbers = [
        "-1",
        "0",
        "nan",
        "inf",
        "1e300",
        "99999999999999999999",
        "abc",
        "null",
        "[1]",
        "{a: 1}",
        "1.5",
        "''",
    ]
    counts = [
        "iterations",
        "batch_size",
        "accumulate",
        "sampling.steps",
        "logging.every",
        "checkpoints.every",
    ]
    option = generator.choice(
        [*counts, "seed", "optimizer.lr", "clusters.k", "ema_decay", "precision", "method"]
    )
    refused = {
        "seed": ["-1", "18446744073709551616", "abc", "1.5", "[1]"],
        "ema_decay": ["-1", "2", "abc", "[1]"],
    }
    refused |= {"optimizer.lr": ["-1", "0", "nan", "inf", "1e300", "abc", "[1]"]}
    refused |= {"precision": numbers, "method": numbers}
    refused |= {"clusters.k": ["-1", "0", "1e300", "99999999999999999999", "abc", "1.5", "[1]"]}
    return [f"--{option}", generator.choice(refused.get(option, numbers))]


def test_malformed_options_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = random.Random(1)
    others = [
        ["sample", "--run-dir", "none", "--num", "99999999999"],
        ["cluster", "--timesteps", "99999999999999"],
        ["cluster", "--plot", "."],
        ["cluster", "--k_max", "3"],
        ["analyze", "affinity", "--run", "none", "--memory", "1e300"],
        ["train", "--run-dir", "a", "--resume", "maybe"],
        ["train", "--run-dir", "a", "--model.args", "[" * 5000],
    ]
    for i in range(OPTIONS):
        arguments = others[i] if i < len(others) else ["train", "--run-dir", "x", *bad_options(generator)]
        status = main(arguments)
        printed = capsys.readouterr().err
        message = one_line(status, printed)
        assert len(message) < 2500, arguments
    assert not (tmp_path / "x").exists()


def test_yaml_that_ends_nowhere_or_says_nothing_is_one_line(tmp_path, capsys):
    texts = [
        "a: &a [*a]",
        "model: {args: &a {b: *a}}",
        "null",
        "- 1",
        "checkpoint: [1]",
        "iterations: null",
        "model: null",
    ]
    for text in texts:
        path = tmp_path / "c.yaml"
        path.write_text(text + "\n")
        one_line(
            main(["train", "--run-dir", str(tmp_path / "r"), "--config", str(path)]), capsys.readouterr().err
        )


def test_an_array_file_that_claims_terabytes_is_refused(tmp_path, capsys):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header)
    message = one_line(main(["cluster", "--scheduler", str(path)]), capsys.readouterr().err)
    assert message.startswith("scheduler: cannot read")


def trained(run_of, capsys, folder):
    status, printed = run_of(capsys, folder)
    assert status == 0, printed
    return checkpoint.checkpoints(folder / "checkpoints")[-1]


def weights(folder):
    return load_file(checkpoint.checkpoints(folder / "checkpoints")[-1] / "model.safetensors")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def damage(path, generator):
    data = bytearray(path.read_bytes())
    kind = generator.choice(["flip", "cut", "empty", "delete", "noise"])
    if kind == "delete":
        return path.unlink()
    if kind == "flip" and data:
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    if kind == "cut":
        del data[generator.randrange(len(data) + 1) :]
    if kind == "empty":
        data.clear()
    if kind == "noise":
        data[:] = generator.randbytes(64)
    return path.write_bytes(bytes(data))


def test_damaged_checkpoints_are_gone_back_from(run_of, tmp_path, capsys):
    """To the newest intact one, and from there to the same bits."""
    whole = tmp_path / "whole"
    trained(run_of, capsys, whole)
    expected, generator = weights(whole), random.Random(2)
    for i in range(DAMAGED):
        folder = tmp_path / "copy"
        shutil.copytree(whole, folder)
        newest = checkpoint.checkpoints(folder / "checkpoints")[-1]
        before = {p: p.read_bytes() for p in newest.iterdir()}
        damage(generator.choice(sorted(newest.iterdir())), generator)
        if {p: p.read_bytes() for p in newest.iterdir()} != before:
            status, printed = run_of(capsys, folder, "--resume")
            assert status == 0, (i, printed)
            assert "is corrupt" in printed
            assert "going back" in printed
        assert_same(weights(folder), expected)
        shutil.rmtree(folder)


@pytest.mark.parametrize("text", [b"{\n", b"\xff\xfe\n", b"[1]\n"])
def test_a_damaged_log_is_named_before_training_goes_on(run_of, tmp_path, capsys, text):
    folder = tmp_path / "run"
    trained(run_of, capsys, folder)
    log = folder / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(text.rjust(len(lines[0])) + b"".join(lines[1:]))
    message = one_line(*run_of(capsys, folder, "--resume", "--iterations", "8"))
    assert f"{log}: expected JSON in line 1" in message


def test_a_checkpoint_under_another_name_is_refused(run_of, tmp_path, capsys):
    newest = trained(run_of, capsys, tmp_path / "run")
    shutil.copytree(newest, newest.with_name("iter-00000009"))
    status, printed = run_of(capsys, tmp_path / "run", "--resume", "--iterations", "9")
    assert status == 0
    assert "manifest.json is of iteration 6" in printed


def test_data_that_changed_are_refused(run_of, tmp_path, capsys):
    folder = tmp_path / "run"
    trained(run_of, capsys, folder)
    status, printed = run_of(capsys, folder, "--resume", "--iterations", "8")
    assert status == 0, printed
    text = folder / "config.yaml"
    text.write_text(text.read_text().replace("diffmtl_fast.train.data.digits", "broken_parts.data"))
    message = one_line(
        main(["train", "--run-dir", str(folder), "--resume", "--iterations", "9"]), capsys.readouterr().err
    )
    assert message.startswith("data: expected those of")


def test_what_training_does_not_depend_on_is_free_on_resume(run_of, tmp_path, capsys):
    folder = tmp_path / "run"
    trained(run_of, capsys, folder)
    pictures = (folder / "samples.png").read_bytes()
    status, printed = run_of(capsys, folder, "--resume", "--sampling.steps", "5", "--logging.every", "3")
    assert status == 0, printed
    assert (folder / "samples.png").read_bytes() != pictures


def test_a_folder_without_locks_has_a_lock_of_its_own(run_of, tmp_path, capsys, monkeypatch):
    import errno
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    status, printed = run_of(capsys, tmp_path / "run")
    assert status == 0
    assert "stands in for one" in printed
    (tmp_path / "run" / ".lock-file").write_text("17 on elsewhere")
    message = one_line(*run_of(capsys, tmp_path / "run", "--resume", "--iterations", "8"))
    assert "17 on elsewhere" in message


def _start(config, folder):
    command = [
        sys.executable,
        "-m",
        "diffmtl_fast.cli",
        "train",
        "--config",
        str(config),
        "--run-dir",
        str(folder),
    ]
    return subprocess.Popen([*command, "--resume"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_runs_lose_nothing(tiny, tmp_path, capsys):
    """Killed at any moment, and resumed, to the same bits; asked to stop, they save and say how to go on."""
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(to_dict(tiny(iterations=40))))
    assert main(["train", "--config", str(config), "--run-dir", str(tmp_path / "whole")]) == 0
    expected, generator = weights(tmp_path / "whole"), random.Random(3)
    kills = 0
    while kills < KILLS:
        folder = tmp_path / "killed"
        for _ in range(min(3, KILLS)):  # of one run
            process = _start(config, folder)
            found = checkpoint.checkpoints(folder / "checkpoints")
            while process.poll() is None and checkpoint.checkpoints(folder / "checkpoints") == found:
                time.sleep(0.002)
            time.sleep(generator.random() * 0.3)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL if kills % 4 else signal.SIGTERM)
            _, printed = process.communicate()
            if kills % 4 == 0 and process.returncode not in (0, -signal.SIGTERM):
                assert process.returncode == 130, printed
                assert "--resume continues" in printed
            assert "Traceback" not in printed
            kills += 1
        process.communicate()
        assert main(["train", "--config", str(config), "--run-dir", str(folder), "--resume"]) == 0
        assert_same(weights(folder), expected)
        shutil.rmtree(folder)
    capsys.readouterr()


def arguments(generator):
    values = [
        None,
        3,
        -1.5,
        "text",
        [],
        [1, 2],
        torch.zeros(0),
        torch.randn(3),
        torch.randn(3, 4),
        torch.randn(2, 3, 4),
    ]
    values += [torch.zeros(3, dtype=torch.int64), torch.tensor([0, 9, -5]), torch.ones(3, dtype=torch.bool)]
    values += [
        torch.randn(3, 4).to_sparse(),
        torch.randn(3, 4, dtype=torch.complex64),
        torch.randn(3, 4, device="meta"),
    ]
    values += [
        torch.randn(3, 4).to(torch.float8_e4m3fn),
        torch.full((3, 4), float("nan")),
        [torch.randn(3, 4)] * 2,
    ]
    values += [torch.randn(3, 4).double(), torch.randn(4, 3).T, torch.eye(3), object()]
    return generator.choice(values)


def test_calls_with_anything_answer_or_raise_by_name():
    generator = random.Random(4)
    torch.manual_seed(0)
    names = [name for name in dm.ops.__all__ if callable(getattr(dm.ops, name))]
    for _ in range(CALLS):
        name = generator.choice(names)
        given = [arguments(generator) for _ in range(generator.randrange(1, 5))]
        with contextlib.suppress(TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
            getattr(dm.ops, name)(*given)


def test_images_of_bytes_are_scaled_on_request():
    found = digits()
    bytes_ = ((found.train + 1) * 127.5).round().to(torch.uint8)
    scaled = ImageData.scaled(bytes_, found.train_labels, bytes_[:20], found.train_labels[:20])
    torch.testing.assert_close(scaled.train, found.train, rtol=0, atol=0.005)


def test_ten_thousand_gramians_solve_the_bargain():
    """|α (G̃α) − 1| of random Gramians with a solution, their norms over six decades."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(10_000 if WHOLE else 500):
        k = int(torch.randint(2, 21, (1,), generator=generator))
        rows = torch.randn(k, 4 * k, generator=generator, dtype=torch.float64)
        rows = rows * 10 ** (6 * torch.rand(k, 1, generator=generator, dtype=torch.float64) - 3)
        gramian = rows @ rows.T
        alpha = dm.ops.nash_weights(gramian)
        assert (alpha * (gramian @ alpha) / gramian.norm() - 1).abs().max() <= 1e-6
