"""Breaking the trainer: kills, damaged files, malformed options, components that fail, calls of the ops.

Seeded. `make campaign` (DIFFMTL_CAMPAIGN=1) does all of it, `make test` a part; docs/reliability.md has figures.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import shutil
import signal
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from safetensors.torch import load_file

import diffmtl_fast as dm
from diffmtl_fast.cli import commands, main
from diffmtl_fast.train import checkpoint, history
from diffmtl_fast.train.config import Config, to_dict
from diffmtl_fast.train.data import ImageData, digits
from diffmtl_fast.train.folder import RunFolder

sys.path.insert(0, str(Path(__file__).parent))
import broken_parts
import killed_run

WHOLE = bool(os.environ.get("DIFFMTL_CAMPAIGN"))
KILLS = int(os.environ.get("DIFFMTL_KILLS", 100 if WHOLE else 1))
DAMAGED = 200 if WHOLE else 3
CALLS = 5000 if WHOLE else 300


@pytest.fixture
def run_of(tiny, tmp_path, monkeypatch):
    """Train the tiny run, changed, in this process; returns status and what was printed on standard error."""
    (tmp_path / "syntax_error.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    # diffusers writes to the standard error that it was imported with, which was an earlier test's
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [])

    def run(capsys, folder, *arguments, **changes):
        path = tmp_path / "config.yaml"
        own = {
            name: {"args": {}, **given}
            for name, given in changes.items()
            if isinstance(given, dict) and "path" in given
        }
        values = to_dict(tiny(**{name: given for name, given in changes.items() if name not in own})) | own
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
    """What changes of the tiny run, and the option that the error is to begin with."""

    def model(kind, **args):
        return {"data": OWN_DATA, "model": {**OWN_MODEL, "args": {"kind": kind, **args}}}

    def items(kind, **args):
        data = {"path": "broken_parts.files", "args": {"kind": kind, **args}}
        return {"data": data, "model": {**OWN_MODEL, "args": {}}, "unreadable": 5}

    for kind in ("none", "dict", "dict of sample", "int", "tuple", "list", "detached", "shape", "row",
                 "input", "complex", "integers", "mean", "frozen", "meta", "save",
                 "saves nothing", "no super", "not copied", "nan weights"):  # fmt: skip
        yield model(kind), "model"
    for kind in ("late none", "late shape", "late rows", "late type"):
        yield model(kind, after=5), ("model", "training")
    for kind in ("labels", "negative label", "float labels", "test shape", "bytes", "uint8", "constant", "nan",
                 "no images", "flat", "absent", "none", "tuple", "dict", "tensor"):  # fmt: skip
        yield (
            {"data": {**OWN_DATA, "args": {"kind": kind}}, "model": {**OWN_MODEL, "args": {}}},
            ("data", "model"),
        )
    for kind in ("empty", "negative", "longer than it is", "float length", "none", "alone", "nan", "other shape",
                 "text", "integers", "double", "label out of range", "negative label",
                 "label of another type", "float"):  # fmt: skip
        yield items(kind), ("data", "unreadable", "conditioning")
    for kind in ("no config", "no number", "number of another type", "none", "empty", "matrix", "short", "nan",
                 "text", "above one", "negative"):  # fmt: skip
        yield (
            {"scheduler": {"path": "broken_parts.Schedule", "args": {"kind": kind}}},
            ("scheduler", "clusters"),
        )
    for error in range(len(broken_parts.ERRORS)):
        yield {"data": {**OWN_DATA, "args": {"kind": "raise", "error": error}}}, "data"
        yield items("raise", error=error), ("data", "unreadable")
        yield items("length raises", error=error), "data"
        yield items("name raises", error=error), "data"
        yield model("construct", error=error), "model"
        for after in (0, 5):
            yield model("call", error=error, after=after), ("model", "training")
        yield model("mode", error=error, after=1), "model"
        yield model("state", error=error), "model"
    for name in broken_parts.SAMPLERS:
        yield {"sampling": {"scheduler": {"path": f"broken_parts.{name}"}}}, "sampling"
    yield {"model": {"path": "syntax_error.f", "args": {}}}, "model.path"
    yield model("", classes=3), "model"
    yield {"sampling": {"steps": 21}}, "sampling"
    yield {"sampling": {"scheduler": {"path": "diffusers.FlowMatchEulerDiscreteScheduler"}}}, "sampling"
    zero = {"rescale_betas_zero_snr": True, "num_train_timesteps": 20, "beta_schedule": "linear"}
    yield {"scheduler": {"args": zero}, "clusters": {"clip": [-20.0, 20.0]}}, "sampling"


@pytest.mark.parametrize("method", ["vanilla", "pcgrad"] if WHOLE else ["pcgrad"])
def test_broken_components_are_one_line(run_of, tmp_path, capsys, method):
    cases, wrong = list(broken_components()), []
    for changes, options in cases if WHOLE else random.Random(0).sample(cases, 6):
        folder = tmp_path / "run"
        try:
            message = one_line(*run_of(capsys, folder, method=method, **changes))
            if not message.startswith(options):
                wrong.append(f"{changes}: {message[:300]}")
        except BaseException as error:
            wrong.append(f"{changes}: {type(error).__name__}: {str(error)[:300]}")
        shutil.rmtree(folder, ignore_errors=True)
    assert not wrong, "\n".join(wrong)


def ranged(annotation, name=""):
    """The numbers with a range and the choices in an annotation."""
    if get_origin(annotation) is Literal or not get_args(annotation):
        return [annotation]
    return [each for part in get_args(annotation) for each in ranged(part)]


def bad_values(annotation):
    """Values that no option of this type takes."""
    kinds = ranged(annotation)
    if bool in kinds:
        return ["maybe", "2.5", "[1]", "{a: 1}", "''"]
    numbers = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, int | float)]
    choices = [kind for kind in kinds if get_origin(kind) is Literal]
    if not numbers and not choices:
        return []
    values = [
        "1e300",
        "-1e300",
        "nan",
        "abc",
        "{a: 1}",
        "inf",
        "-inf",
        "''",
        "1e",
        "0x",
        "[abc]",
        "[[1]]",
        "1 2",
        "\u0663x",
    ]
    if type(None) not in kinds:
        values.append("null")
    if numbers:
        (_, low), (_, high) = numbers[0]._restrictions
        whole = issubclass(numbers[0], int)
        values += [str(high * 10), str(high + 1) if whole else "2e30", str(low - 1) if whole else "-2e30"]
        values += ["1.5"] if whole else []
    return values


def options_of_commands():
    """Of every command: its words, the options' names and annotations."""
    for words, command in every_command(commands(), []):
        for name, annotation in get_type_hints(command).items():
            yield words, name, annotation
    yield from ((["train"], name, annotation) for name, annotation in configured(Config, ""))


def every_command(known, words):
    for name, (command, _) in known.items():
        if isinstance(command, dict):
            yield from every_command(command, [*words, name])
        else:
            yield [*words, name], command


def configured(cls, prefix):
    for name, annotation in get_type_hints(cls).items():
        if is_dataclass(annotation):
            yield from configured(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, annotation


def test_every_number_of_the_command_line_has_a_range():
    plain = [(words, name) for words, name, annotation in options_of_commands()
             if {int, float} & set(ranged(annotation))]  # fmt: skip
    assert not plain


def test_malformed_options_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = [(words, name, value) for words, name, annotation in options_of_commands()
             for value in bad_values(annotation)]  # fmt: skip
    wrong = []
    assert len(cases) > 1000
    for words, name, value in cases if WHOLE else random.Random(1).sample(cases, 12):
        status = main(
            [
                *words,
                *(["--run-dir", "x"] if words[0] in ("train", "sample", "evaluate") else []),
                f"--{name}={value}",
            ]
        )
        printed = capsys.readouterr().err
        try:
            message = one_line(status, printed)
            assert (name.rpartition(".")[0] or name) in message
            assert len(message) < 2500
        except AssertionError:
            wrong.append(f"{words} --{name}={value}: {status} {printed[:300]}")
    assert not wrong, "\n".join(wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--run-dir", "none", "--num", "99999999999"],
        ["cluster", "--timesteps", "99999999999999"],
        ["cluster", "--plot", "."],
        ["cluster", "--k_max", "3"],
        ["cluster", "--clip", "[1]"],
        ["analyze", "affinity", "--run", "none", "--memory", "1e300"],
        ["train", "--run-dir", "a", "--resume", "maybe"],
        ["train", "--run-dir", "a", "--model.args", "[" * 5000],
    ],
)
def test_requests_that_fit_nothing_are_one_line(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert len(one_line(main(arguments), capsys.readouterr().err)) < 2500
    assert not list(tmp_path.iterdir())


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


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def trained(run_of, trained_once, tmp_path, capsys):
    """A copy of the tiny run, trained to its end."""
    if not trained_once.exists():
        status, printed = run_of(capsys, trained_once)
        assert status == 0, printed
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


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
    if kind == "flip":
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    if kind == "cut":
        del data[generator.randrange(len(data)) :]
    if kind == "empty":
        data.clear()
    if kind == "noise":
        data[:] = generator.randbytes(64)
    return path.write_bytes(bytes(data))


def test_damaged_checkpoints_are_gone_back_from(run_of, trained, tmp_path, capsys):
    """To the newest intact one, and from there to the same bits."""
    expected, generator = weights(trained), random.Random(2)
    for i in range(DAMAGED):
        folder = tmp_path / "copy"
        shutil.copytree(trained, folder)
        newest = checkpoint.checkpoints(folder / "checkpoints")[-1]
        damage(generator.choice(sorted(newest.iterdir())), generator)
        assert RunFolder(folder).checkpoint().name == "iter-00000004"
        printed = capsys.readouterr().err
        assert "is corrupt" in printed
        assert "going back" in printed
        if i % 20 == 0:
            status, printed = run_of(capsys, folder, "--resume")
            assert status == 0, (i, printed)
            assert_same(weights(folder), expected)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl"])
def test_a_damaged_configuration_or_log_is_one_line_or_the_same_run(trained, tmp_path, capsys, name):
    """A digit that became another one is found, too: checkpoints know both files."""
    folder, generator = tmp_path / "copy", random.Random(6)
    expected = (trained / name).read_bytes()
    for _ in range(DAMAGED // 10 or 1):
        shutil.copytree(trained, folder)
        shutil.rmtree(checkpoint.checkpoints(folder / "checkpoints")[-1])  # there is something left to do
        damage(folder / name, generator)
        status = main(["train", "--run-dir", str(folder), "--resume"])
        printed = capsys.readouterr().err
        if status:
            one_line(status, printed)
        else:
            assert_same(weights(folder), weights(trained))
            if name == "log.jsonl":
                lines = [history.read(path / name) for path in (folder, trained)]
                assert [{**each, "seconds": 0} for each in lines[0]] == [
                    {**each, "seconds": 0} for each in lines[1]
                ]
        assert (trained / name).read_bytes() == expected
        shutil.rmtree(folder)


@pytest.mark.parametrize("text", [b"{\n", b"\xff\xfe\n", b"[1]\n"])
def test_a_damaged_log_is_named_before_training_goes_on(run_of, trained, capsys, text):
    log = trained / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(text.rjust(len(lines[0])) + b"".join(lines[1:]))
    message = one_line(*run_of(capsys, trained, "--resume", "--iterations", "8"))
    assert f"{log}: expected JSON in line 1" in message


def test_a_checkpoint_under_another_name_is_refused(run_of, trained, capsys):
    newest = checkpoint.checkpoints(trained / "checkpoints")[-1]
    shutil.copytree(newest, newest.with_name("iter-00000009"))
    status, printed = run_of(capsys, trained, "--resume", "--iterations", "9")
    assert status == 0
    assert "manifest.json is of iteration 6" in printed


def test_data_that_changed_are_refused(run_of, trained, capsys, monkeypatch):
    monkeypatch.setattr("diffmtl_fast.train.data.digits", broken_parts.data)
    message = one_line(*run_of(capsys, trained, "--resume", "--iterations", "8"))
    assert message.startswith("data: expected those of")


def test_what_training_does_not_depend_on_is_free_on_resume(run_of, trained, capsys):
    pictures = (trained / "samples.png").read_bytes()
    status, printed = run_of(capsys, trained, "--resume", "--sampling.steps", "5", "--logging.every", "3")
    assert status == 0, printed
    assert (trained / "samples.png").read_bytes() != pictures


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


@pytest.fixture
def forks():
    made = killed_run.Forks()
    yield made
    made.close()


def test_killed_runs_lose_nothing(tiny, tmp_path, forks):
    """Killed at any moment, and resumed, to the same bits; asked to stop, they save and say how to go on."""
    config, log, whole = tmp_path / "c.yaml", tmp_path / "printed", tmp_path / "whole"
    config.write_text(yaml.safe_dump(to_dict(tiny(iterations=12, checkpoints={"every": 1}))))
    options = ["train", "--config", str(config), "--resume", "--run-dir"]
    assert forks.run([*options, str(whole)], log) == 0, log.read_text()

    @functools.cache
    def longest(outputs):
        return forks.cpu_seconds([*options, str(tmp_path / f"timed-{outputs}")], log, outputs)

    generator, kills, runs, folder = random.Random(3), 0, 0, tmp_path / "killed"
    outputs = False
    while kills < KILLS or folder.exists():
        moment = generator.random() * longest(outputs) if kills < KILLS else float("inf")
        process, asked = forks.start([*options, str(folder)], log, outputs), kills % 4 == 3
        ended = forks.wait(process, moment)
        if ended is None:
            kills += 1
            os.kill(process, signal.SIGTERM if asked else signal.SIGKILL)
            ended = forks.wait(process)
        printed = log.read_text()
        assert ended in (0, 130, -signal.SIGTERM, -signal.SIGKILL), printed
        assert ended != 130 or "--resume continues" in printed
        if ended == 0 and outputs:
            runs += 1
            print(f"{kills} kills in {runs} runs", flush=True)
            assert_same_run(folder, whole)
            shutil.rmtree(folder)
        outputs = folder.exists() and (outputs or ended == 0)  # what is trained to its end gets its pictures


def assert_same_run(folder, expected):
    assert_same(weights(folder), weights(expected))
    assert (folder / "samples.png").read_bytes() == (expected / "samples.png").read_bytes()
    logs = [history.read(path / "log.jsonl") for path in (folder, expected)]
    assert [{**line, "seconds": 0} for line in logs[0]] == [{**line, "seconds": 0} for line in logs[1]]


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
