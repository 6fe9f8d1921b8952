"""The command line: what it does, and what it says of bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml

from diffmtl_fast.cli import main
from diffmtl_fast.diffusion.named_schedules import named_log_snr
from diffmtl_fast.train.config import CONTINUOUS
from diffmtl_fast.weighting import METHODS

COUNT = "an integer >= 1 and <= 10^9"
CHOICES = ", ".join(f"'{name}'" for name in (CONTINUOUS, *METHODS))

TINY = """
iterations: 4
batch_size: 12
clusters: {k: 3}
model:
  path: diffusers.UNet2DModel
  args:
    {sample_size: 8, in_channels: 1, out_channels: 1, num_class_embeds: 10, layers_per_block: 1,
     block_out_channels: [8, 8], down_block_types: [DownBlock2D, DownBlock2D],
     up_block_types: [UpBlock2D, UpBlock2D], norm_num_groups: 4}
scheduler: {path: diffusers.DDPMScheduler, args: {num_train_timesteps: 20, beta_schedule: linear}}
sampling: {steps: 2}
evaluation: {num_samples: 0}
logging: {every: 2, tensorboard: false}
checkpoints: {every: 2}
"""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Relative paths, such as the default run folder, lead to a temporary place."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny(tmp_path, device):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY + f"device: {device}\n")
    return str(path)


def refused(capsys, *arguments):
    """The one line that a refused command prints."""
    status = main(arguments)
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def test_train_sample_evaluate(tiny, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", "--config", tiny, "--run-dir", run, "--method=pcgrad", "--clusters.k", "2"]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["method"], config["clusters"]["k"], config["batch_size"]) == ("pcgrad", 2, 12)

    assert main(["train", "--config", f"{run}/config.yaml", "--run_dir", run, "--resume"]) == 0
    assert "already complete" in capsys.readouterr().out
    assert "clusters.k: expected 2, as in the run" in refused(
        capsys, "train", "--config", tiny, "--run-dir", run, "--resume"
    )
    assert "--resume continues it" in refused(capsys, "train", "--config", tiny, "--run-dir", run)

    load = ["--run-dir", run, "--device", config["device"]]
    assert main(["sample", *load, "--num", "7", "--out", "a.npy", "--label", "3", "--seed", "5"]) == 0
    pictures = np.load("a.npy")
    assert pictures.shape == (7, 1, 8, 8)
    assert pictures.dtype == np.float32
    assert np.abs(pictures).max() <= 1.0
    assert main(["sample", *load, "--num", "12", "--out", "a.png"]) == 0
    with open("a.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"
    assert refused(capsys, "sample", *load, "--out", "a.gif").startswith("out: expected a file name")
    assert (
        refused(capsys, "sample", *load, "--num", "0") == "num: expected an integer >= 1 and <= 10^6, found 0"
    )
    assert refused(capsys, "sample", *load, "--label", "10").startswith("label: expected 0 <= label < 10")
    assert "out: cannot write" in refused(capsys, "sample", *load, "--num", "1", "--out", "nowhere/a.npy")

    capsys.readouterr()
    assert main(["evaluate", *load, "--num", "20", "--out", "metrics.json"]) == 0
    assert "frechet distance" in capsys.readouterr().out
    with open("metrics.json") as file:
        assert json.load(file)["num_samples"] == 20
    assert not (tmp_path / "run" / "metrics.json").exists()

    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    (newest / "ema.safetensors").write_bytes(b"damaged")
    assert main(["sample", *load, "--num", "1", "--out", "b.npy"]) == 0
    assert f"checkpoint {newest} is corrupt: ema.safetensors" in capsys.readouterr().err
    assert "is corrupt" in refused(capsys, "sample", *load, "--num", "1", "--checkpoint", newest.name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "best"],
            f"method: expected one of 'vanilla', {CHOICES}, found best",
        ),
        (["--clusters.k", "21"], "clusters: k: expected 1 <= k <= T = 20, found 21"),
        (["--clusters.k", "many"], "clusters.k: expected an integer >= 1 and <= 10^9 or 'auto', found many"),
        (["--clusters.k", "0"], "clusters.k: expected an integer >= 1 and <= 10^9 or 'auto', found 0"),
        (["--clust.k", "3"], "unrecognized arguments: --clust.k 3"),
        (["--iter", "3"], "unrecognized arguments: --iter 3"),
        (
            ["--curriculum.patience", "long"],
            "curriculum.patience: expected an integer >= 1 and <= 10^9 or null, found",
        ),
        (
            ["--curriculum.max_length", "x"],
            f"curriculum.max_length: expected {COUNT} or [{COUNT}, …] or null, found x",
        ),
        (
            ["--curriculum.order", "up"],
            "curriculum.order: expected one of 'none', 'easy_to_hard', 'hard_to_easy'",
        ),
        (
            ["--curriculum.order=easy_to_hard", "--curriculum.clusters.k=21"],
            "curriculum.clusters: k: expected 1 <= k <= T = 20, found 21",
        ),
        (["--timesteps.sampler", "x"], "timesteps.sampler: expected 'uniform', "),
        (["--timesteps.sampler", "beta", "--timesteps.args.a", "2"], "timesteps.args: "),
        (["--clusters.cost", "affinity"], "clusters.affinity: expected a .npy or .json file"),
        (
            ["--clusters.cost", "affinity", "--clusters.affinity", "none.npy"],
            "clusters.affinity: cannot read none.npy",
        ),
        (["--scheduler.args.trained_betas", "[" + "0.1, " * 19 + ".nan]"], "scheduler: alphas_cumprod: "),
        (["--scheduler.args.trained_betas", str([0.1, -0.1] * 10)], "clusters: "),
        (["--device", "cuda:99"], "device: 'cuda:99' is not there"),
        (["--device", "abacus"], "device: expected auto, cpu, cuda or cuda:N, found 'abacus'"),
        (["--model.path", "no.Model"], "model.path: cannot import 'no.Model'"),
        (["--model.args.depth", "3"], "model.args: diffusers.UNet2DModel: "),
        (["--optimizer.lr", "-1"], "optimizer.lr: expected a number > 0 and <= 10^30, found -1"),
        (["--iterations", "1.5"], "iterations: expected an integer >= 1 and <= 10^9, found 1.5"),
        (["--no-such-option"], "unrecognized arguments: --no_such_option"),
        (["--config", "none.yaml"], "config: "),
        (["--run-dir", "tiny.yaml/run"], "run folder tiny.yaml/run: cannot be read"),
        (["--checkpoint", "iter-00000001"], "--checkpoint: expected an existing run"),
    ],
)
def test_bad_input_to_train(tiny, tmp_path, capsys, arguments, message):
    assert refused(capsys, "train", "--config", tiny, *arguments).startswith(message)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}


@pytest.mark.parametrize("text", ["method: [", "metod: uw", "clusters: {k: 0}", "- 1"])
def test_bad_configuration_files(tmp_path, capsys, text):
    (tmp_path / "bad.yaml").write_text(text)
    refused(capsys, "train", "--config", "bad.yaml")


def test_a_resumed_run_needs_none_of_its_options_again(tiny, tmp_path, capsys):
    run = str(tmp_path / "run")
    curriculum = [
        "--curriculum.order=easy_to_hard",
        "--curriculum.clusters.k",
        "2",
        "--curriculum.patience",
        "1",
    ]
    options = ["--config", tiny, "--method", "pcgrad", "--clusters.k", "auto", *curriculum]
    assert main(["train", *options, "--run-dir", run]) == 0
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "order: easy_to_hard" in config
    capsys.readouterr()
    assert main(["train", "--run-dir", run, "--resume"]) == 0
    assert "already complete" in capsys.readouterr().out

    assert main(["train", "--run-dir", run, "--resume", "--iterations", "6"]) == 0
    assert "continuing" in capsys.readouterr().out
    assert (tmp_path / "run" / "config.yaml").read_text() == config.replace("iterations: 4", "iterations: 6")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    assert all("phase" in line for line in lines)

    message = refused(capsys, "train", "--run-dir", run, "--resume", "--method", "uw")
    assert message.startswith("method: expected 'pcgrad', as in the run that --resume continues, found 'uw'")
    message = refused(capsys, "train", "--run-dir", run, "--resume", "--curriculum.patience", "2")
    assert message.startswith("curriculum.patience: expected 1, as in the run")


def test_read_only_folder(tiny, tmp_path, capsys):
    (tmp_path / "place").mkdir(mode=0o555)
    message = refused(capsys, "train", "--config", tiny, "--run-dir", "place/run")
    assert message.startswith("run folder place/run: cannot be written to")


def test_divergence_is_told_apart_from_bad_input(tiny, capsys):
    assert main(["train", "--config", tiny, "--optimizer.lr", "1e30", "--method", "vanilla"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the ")
    assert "not finite" in error
    assert "the last good checkpoint is" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["sample"],
        ["evaluate", "--run-dir", "none"],
        ["train", "--seed"],
        ["analyze"],
        ["analyze", "fly"],
        ["analyze", "affinity"],
        ["analyze", "negative-transfer"],
        ["analyze", "difficulty", "--run", "none"],
        ["analyze", "difficulty", "--run", "none", "--checkpoint", "iter-00000001"],
    ],
)
def test_bad_commands(capsys, arguments):
    refused(capsys, *arguments)


@pytest.mark.parametrize(
    "command", [[], ["train"], ["sample"], ["evaluate"], ["cluster"], ["samplers"], ["analyze"]]
)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: diffmtl-fast" in capsys.readouterr().out


def test_printed_configuration_can_be_read_back(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--print_config", "--seed", "7"])
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["train", "--config", "all.yaml", "--print_config"])
    assert capsys.readouterr().out == (tmp_path / "all.yaml").read_text()


def test_samplers_table_and_plot(tmp_path, capsys):
    assert main(["samplers", "--timesteps", "40", "--k", "3", "--plot", "a.png"]) == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["sampler", "cluster", "0", "cluster", "1", "cluster", "2"]
    shares = {line[:22].strip(): [float(share) for share in line.split()[-3:]] for line in lines}
    assert shares["stratified"] == [0.333, 0.333, 0.333]
    assert shares["curriculum, phase 1"] == [0, 0, 1]
    assert shares["loss"][0] > shares["uniform"][0] > shares["curriculum, phase 2"][0] == 0
    assert all(abs(sum(line) - 1) < 0.002 for line in shares.values())
    assert refused(capsys, "samplers", "--timesteps", "4", "--k", "5").startswith("k: expected 1 <= k")


def test_cluster_table_and_plot(tmp_path, capsys):
    assert main(["cluster", "--k", "5", "--plot", "a.png"]) == 0
    out = capsys.readouterr().out
    assert "881–999" in out
    assert "cost 705.505514" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_cluster_json_from_a_file(tmp_path, capsys):
    np.save(tmp_path / "levels.npy", named_log_snr("linear", 1000))
    assert main(["cluster", "--scheduler", "levels.npy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["boundaries"] == [0, 153, 394, 624, 823, 1000]
    assert found["cost"] == pytest.approx(781.740483, abs=1e-6)


def test_cluster_by_timestep_and_affinity(tmp_path, capsys):
    assert main(["cluster", "--cost", "timestep", "--timesteps", "10", "--k", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["boundaries"] == [0, 5, 10]
    np.save(tmp_path / "tas.npy", np.kron(np.eye(2), np.ones((3, 3))))
    arguments = ["--timesteps", "6", "--k", "2", "--cost", "affinity", "--affinity", "tas.npy", "--json"]
    assert main(["cluster", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["boundaries"] == [0, 3, 6]


def test_cluster_chooses_k_and_draws_the_cost_curve(tmp_path, capsys):
    levels = np.concatenate([np.arange(20) * 0.001, 5 + np.arange(20) * 0.001, 9 + np.arange(20) * 0.001])
    (tmp_path / "levels.json").write_text(json.dumps(levels.tolist()))
    options = ["--scheduler", "levels.json", "--k", "auto", "--k-max", "8", "--json", "--plot", "a.png"]
    for cost in ("snr", "squared"):
        assert main(["cluster", *options, "--cost", cost]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["boundaries"] == [0, 20, 40, 60]
        assert found["path"]["k"] == list(range(1, 9))
        assert found["path"]["cost"] == sorted(found["path"]["cost"], reverse=True)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("levels", "arguments", "message"),
    [
        (
            [1.0, np.nan],
            ["--k", "2"],
            "scheduler: expected finite numbers in levels.npy, found nan at index 1",
        ),
        ([1.0, 0.0, 0.5], ["--k", "2"], "clusters: log_snr"),
        ([1.0, 0.5, 0.0], ["--k", "4"], "clusters: k: expected 1 <= k <= T = 3, found 4"),
        ([1.0, 0.5, 0.0], ["--k", "2", "--min-size", "2"], "clusters: "),
        ([[1.0, 0.5]], ["--k", "1"], "scheduler: expected numbers [T] in levels.npy, found shape [1, 2]"),
        (3.0, ["--k", "1"], "scheduler: expected numbers [T] in levels.npy, found shape []"),
        (["a"], ["--k", "1"], "scheduler: cannot read levels.npy: expected an array of numbers"),
        ([1.0, 0.0], ["--k", "many"], "k: expected an integer >= 1 and <= 10^9 or 'auto', found many"),
        ([1.0, 0.0], ["--k", "0"], "k: expected an integer"),
        ([1.0, 0.0], ["--k", "2", "--k-max", "9"], "k_max: expected none without --k auto, found 9"),
        ([1.0, 0.0], ["--k", "auto", "--k-max", "0"], "k_max: expected an integer"),
        ([1.0, 0.0], ["--k", "1", "--cost", "affinity"], "affinity: expected a .npy or .json file"),
        ([1.0, 0.0], ["--k", "1", "--plot", "none/a.png"], "plot: cannot write none/a.png"),
        ([1.0, 0.0], ["--k", "1", "--plot", "a.xyz"], "plot: "),
    ],
)
def test_bad_input_to_cluster(tmp_path, capsys, levels, arguments, message):
    np.save(tmp_path / "levels.npy", np.array(levels))
    assert refused(capsys, "cluster", "--scheduler", "levels.npy", *arguments).startswith(message)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [("sigmoid", "scheduler: expected squaredcos_cap_v2"), ("none.npy", "scheduler: cannot read none.npy")],
)
def test_bad_schedules(capsys, scheduler, message):
    assert refused(capsys, "cluster", "--scheduler", scheduler).startswith(message)


def test_analyze_affinity(tiny, tmp_path, capsys):
    assert main(["train", "--config", tiny, "--run-dir", "run"]) == 0
    capsys.readouterr()
    options = ["--run", "run", "--tasks", "4", "--samples", "2", "--projection", "64", "--strided"]
    assert main(["analyze", "affinity", *options]) == 0
    assert "wrote run/analysis/affinity.npy" in capsys.readouterr().out
    assert np.load("run/analysis/affinity.npy").shape == (20, 20)
    about = json.loads((tmp_path / "run" / "analysis" / "affinity.json").read_text())
    assert (about["tasks"], about["strided"], about["projection"]) == (4, True, 64)
    message = refused(capsys, "analyze", "affinity", "--run", "run", "--memory", "0")
    assert message == "memory: expected a number > 0 and <= 10^30, found 0"
    message = refused(capsys, "analyze", "affinity", "--run", "run", "--checkpoint", "iter-00000003")
    assert message.startswith("--checkpoint: expected one of run/checkpoints")
    assert "memory: expected at least" in refused(
        capsys, "analyze", "affinity", "--run", "run", "--memory", "1e-4"
    )


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr("diffmtl_fast.cli.cluster.cluster", broken)
    with pytest.raises(ZeroDivisionError):
        main(["cluster"])


def test_sigkill_and_resume_end_at_the_same_weights(tiny, tmp_path, capsys, device):
    options = [
        "train",
        "--config",
        tiny,
        "--iterations",
        "400",
        "--checkpoints.every",
        "4",
        "--checkpoints.keep",
        "1",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffmtl_fast.cli", *options, "--run-dir", "killed"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("iter-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = int(max(checkpoints.glob("iter-*")).name.removeprefix("iter-"))
    assert 0 < done < 400
    options[options.index("400")] = str(done + 6)
    for folder in ("killed", "whole"):
        assert main([*options, "--run-dir", folder, "--resume"]) == 0
    last = f"checkpoints/iter-{done + 6:08d}/ema.safetensors"
    if device.type == "cpu":
        assert (tmp_path / "killed" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def test_a_binary_configuration_and_an_unknown_schedule_are_refused(tmp_path, capsys):
    (tmp_path / "binary.yaml").write_bytes(b"\x00\xff{")
    assert refused(capsys, "train", "--config", str(tmp_path / "binary.yaml")).startswith(
        "config: expected text in UTF-8"
    )
    options = ["--run-dir", str(tmp_path / "run"), "--scheduler.args.beta_schedule", "foo"]
    assert "foo is not implemented" in refused(capsys, "train", *options)
    assert not (tmp_path / "run").exists()


def test_analyze_negative_transfer_and_difficulty(tiny, tmp_path, capsys):
    assert main(["train", "--config", tiny, "--run-dir", "run"]) == 0
    experts = ["--run", "run", "--intervals", "2", "--cost", "snr", "--iterations", "3"]
    capsys.readouterr()
    options = ["--num", "20", "--steps", "2", "--resamples", "3"]
    assert main(["analyze", "negative-transfer", *experts, *options]) == 0
    assert "wrote run/analysis/negative-transfer.json" in capsys.readouterr().out
    assert main(["analyze", "negative-transfer", *experts, *options, "--expert-iteration", "2"]) == 0
    assert "wrote run/analysis/negative-transfer-at-2.json" in capsys.readouterr().out
    assert main(["analyze", "difficulty", *experts, "--fraction", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("already complete") == 2
    assert "wrote run/analysis/convergence.png" in printed
    found = [json.loads((tmp_path / f"run/analysis/{name}.json").read_text()) for name in
             ("negative-transfer", "difficulty")]  # fmt: skip
    assert found[0]["boundaries"] == found[1]["boundaries"]
    assert (found[0]["sampling_steps"], found[1]["fraction"]) == (2, 0.5)
    for name in ("negative-transfer", "convergence", "relative-entropy"):
        assert (tmp_path / f"run/analysis/{name}.png").read_bytes().startswith(b"\x89PNG")


BOMB = "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "expected at most 100000 values, found "),
        ("model: {args: {" + ", ".join(BOMB.splitlines()) + "}}", "expected at most 100000 values, found "),
        ("iterations: 5\nseed: 1\niterations: 7", "expected every option once, found iterations 2 times"),
        ("# no options\n", "expected options, found an empty text"),
        ("clusters: {k: 3, k: 4}", "expected every option once, found k 2 times"),
        ("model: {args: &a {b: *a}}", "expected values that end, found one that contains itself"),
    ],
)
def test_texts_that_hold_nothing_too_much_or_a_name_twice(tmp_path, capsys, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    assert refused(capsys, "train", "--config", "bad.yaml").startswith(f"config: bad.yaml: {message}")
    assert refused(capsys, "train", "--config=bad.yaml").startswith(f"config: bad.yaml: {message}")
    assert message in refused(capsys, "study", "--config", "bad.yaml", "--quick")
    if "*" in text and "\n" not in text:
        value = text.removeprefix("model: {args: ").removesuffix("}")
        assert refused(capsys, "train", "--model.args", value).startswith(f"model.args: {message}")


def shell(command, **environment):
    program = f"{sys.executable} -m diffmtl_fast.cli"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    command = ["bash", "-c", command.replace("diffmtl-fast", program)]
    return subprocess.run(command, capture_output=True, env=environment, timeout=120)


def test_output_that_takes_nothing_or_no_such_letters(tmp_path):
    for unbuffered in ("1", None):
        found = shell("diffmtl-fast cluster > /dev/full", PYTHONUNBUFFERED=unbuffered)
        assert found.stderr.startswith(b"error: standard output")
        assert found.stderr.count(b"\n") == 1
        assert found.returncode == 2
    found = shell("diffmtl-fast cluster --k 2", PYTHONIOENCODING="ascii", HOME=None)
    assert (found.returncode, found.stderr) == (0, b"")
    assert b"cost 1457.77739" in found.stdout


def test_paths_that_are_no_text(tiny, tmp_path, capsys):
    name = os.fsdecode(b"run\xff")
    for command in ("train", "sample", "evaluate"):
        assert "expected a path in UTF-8" in refused(capsys, command, "--run-dir", name)
    assert main(["cluster", "--plot", f"{name}.png"]) == 0
    assert {os.fsencode(path.name) for path in tmp_path.iterdir()} == {b"tiny.yaml", b"run\xff.png"}


@pytest.mark.parametrize("out", ["pipe.png", "folder.png", "nowhere/a.png", "file/a.png"])
def test_where_nothing_can_be_written_is_told_before_the_work(tiny, tmp_path, capsys, monkeypatch, out):
    os.mkfifo("pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    assert refused(capsys, "sample", "--run-dir", "none", "--out", out).startswith(
        f"out: cannot write {out} ("
    )
    assert refused(capsys, "evaluate", "--run-dir", "none", "--out", out).startswith(
        f"out: cannot write {out} ("
    )


def test_damaged_checkpoints_of_a_run_that_is_evaluated(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--config", tiny, "--run-dir", "run", "--evaluation.num_samples", "20"]) == 0
    metrics = (run / "metrics.json").read_bytes()
    assert main(["evaluate", "--run-dir", "run"]) == 0
    assert (run / "metrics.json").read_bytes() == metrics
    older, newest = sorted((run / "checkpoints").iterdir())
    (newest / "ema.safetensors").write_bytes(b"damaged")
    capsys.readouterr()
    assert main(["evaluate", "--run-dir", "run"]) == 0
    assert f"going back to {older.name}" in capsys.readouterr().err
    assert (
        run / "metrics.json"
    ).read_bytes() == metrics  # of the newest, which those of an older one do not replace
    assert "is corrupt: ema.safetensors" in refused(
        capsys, "evaluate", "--run", "run", "--checkpoint", newest.name
    )
    assert "is corrupt: ema.safetensors" in refused(capsys, "analyze", "affinity", "--run", "run")
    (older / "manifest.json").write_bytes(b"{")
    for command in (["evaluate"], ["sample"], ["analyze", "negative-transfer"]):
        assert "the older ones are corrupt too" in refused(capsys, *command, "--run", "run")
    assert "is corrupt: manifest.json" in refused(capsys, "analyze", "affinity", "--run", "run")
