"""The loop: against one written out by hand, for every method, and to the same bits after a stop."""

from __future__ import annotations

import gc
import inspect
import sys
from dataclasses import replace
from itertools import product
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from diffmtl_fast import weighting
from diffmtl_fast._errors import TrainingDiverged, UserError
from diffmtl_fast._progress import NoProgress
from diffmtl_fast.clustering import NoiseClustering
from diffmtl_fast.data import Batch
from diffmtl_fast.diffusion import LOSS_WEIGHTS, log_snr
from diffmtl_fast.ops import _library
from diffmtl_fast.run.titles import LOSS_TITLES
from diffmtl_fast.train import checkpoint, history
from diffmtl_fast.train.components import build_data, build_model, build_noise, build_scheduler
from diffmtl_fast.train.config import CONTINUOUS, PLAIN, Component, Loss
from diffmtl_fast.train.history import History
from diffmtl_fast.train.loop import Trainer

METHODS = (PLAIN, CONTINUOUS, *weighting.METHODS)


def kind(method):
    """What the trainer sees of a method: what it balances by; whether it learns, draws, clips or skips steps."""
    made = method.build(3, torch.device("cpu"), 0)
    return (
        method.forms_gramian,
        any(True for _ in made.parameters()),
        "generator" in inspect.signature(method.cls).parameters,
        method.clip > 0,
        method.published_every is not None,
    )


# One method of each kind: the trainer knows no other difference. All methods are tested to train and to resume.
KINDS = (PLAIN, CONTINUOUS, *{kind(method): name for name, method in weighting.METHODS.items()}.values())


class Silent:
    def update(self, iteration, line=None):
        pass

    def close(self):
        pass


def fit(config, folder):
    """Train in a fresh folder; the trainer and the lines of its log."""
    folder.mkdir()
    log = History(folder / "log.jsonl")
    trainer = Trainer(config)
    trainer.fit(folder, log, Silent())
    log.close()
    return trainer, history.read(folder / "log.jsonl")


def same_weights(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("accumulate", "weight", "kind"),
    [
        (1, "none", "epsilon"),
        (3, "none", "epsilon"),
        (1, "p2", "epsilon"),
        (1, "none", "v_prediction"),
        (3, "p2", "v_prediction"),
        (1, "none", "sample"),
    ],
)
def test_vanilla_is_the_loop_that_everybody_writes(tiny, tmp_path, device, accumulate, weight, kind):
    config = tiny(
        method="vanilla",
        iterations=3,
        accumulate=accumulate,
        loss={"weight": weight},
        scheduler={"args": {"prediction_type": kind}},
    )
    trainer, _ = fit(config, tmp_path / "run")

    data, scheduler = build_data(config), build_scheduler(config)
    model = build_model(config, data, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator(device).manual_seed(0)
    order = torch.from_numpy(np.random.default_rng([0, 0]).permutation(1437))
    for step in range(3):
        optimizer.zero_grad()
        for part in range(accumulate):
            start = 12 * (step * accumulate + part)
            index = order[start : start + 12]
            images, labels = data.train[index].to(device), data.train_labels[index].to(device)
            t = torch.randint(20, (12,), generator=generator, device=device)
            noise = torch.randn(images.shape, generator=generator, device=device)
            predicted = model(scheduler.add_noise(images, noise, t), t, class_labels=labels).sample
            velocity = scheduler.get_velocity(images, noise, t)
            target = {"epsilon": noise, "v_prediction": velocity, "sample": images}[kind]
            errors = (predicted - target).square().mean((1, 2, 3))
            signal = scheduler.alphas_cumprod[t.cpu()].to(device)
            if weight == "p2":  # 1 / (1 + SNR) is the share of noise; ε's squared error is α² times that of v
                errors = errors * (1 - signal) * (signal if kind == "v_prediction" else 1)
            (errors.mean() / accumulate).backward()
        optimizer.step()
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        # AdamW divides small gradients by their own size, and so magnifies the rounding of their sums.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(
    ("method", "cost"),
    [*product(METHODS, ["snr"]), *product(KINDS, ["timestep", "affinity"])],
)
def test_every_method_on_every_clustering(tiny, tmp_path, method, cost):
    clusters = {"cost": cost}
    if cost == "affinity":
        distance = np.abs(np.subtract.outer(np.arange(20.0), np.arange(20.0)))
        np.save(tmp_path / "tas.npy", np.exp(-distance / 5))
        clusters["affinity"] = str(tmp_path / "tas.npy")
    trainer, lines = fit(tiny(method=method, iterations=3, clusters=clusters), tmp_path / "run")
    assert trainer.iteration == 3
    assert [line["iteration"] for line in lines] == [2, 3]
    assert all(loss is None or loss > 0 for line in lines for loss in line["losses"])
    assert ("weights" in lines[0]) == (method != PLAIN)
    assert ("cosines" in lines[0]) == (method in weighting.METHODS)
    assert ("gradient_norm" in lines[0]) == (trainer.config.clip > 0)


def test_measuring_cosines_keeps_no_jacobian(tiny, tmp_path):
    """A method that needs the losses alone takes no K times the parameters' memory for what is logged."""

    def tensors():
        gc.collect()
        return [each for each in gc.get_objects() if type(each) is torch.Tensor and each.dim() > 1]

    others = tensors()  # as failed tests leave; kept alive, so that no new one takes the id of an old one
    known = {id(each) for each in others}
    trainer = Trainer(tiny(method="uw", clusters={"k": 3}))
    trainer.model.train()
    largest = max(p.numel() for p in trainer.model.parameters())
    log = History(tmp_path / "log.jsonl")
    trainer.step(log)
    line = log.flush(1)
    log.close()
    assert "cosines" in line
    held = [each for each in tensors() if id(each) not in known]
    shapes = {tuple(p.shape) for p in trainer.model.parameters()}
    rows = [each for each in held if each.shape[0] == 3 and tuple(each.shape[1:]) in shapes]
    assert not [each for each in rows if each.numel() >= 3 * largest]


@pytest.mark.parametrize("method", ["uw", "famo", "nash", "pcgrad", PLAIN])
def test_logs_and_measurements_change_no_bit_of_a_run(tiny, tmp_path, method):
    (tmp_path / "checkpoints").mkdir()

    def weights(**logging):
        trainer = Trainer(tiny(method=method, nash_update_every=3, optimizer={"clip": 0.5}, logging=logging))
        trainer.fit(tmp_path / "checkpoints", History(tmp_path / "log.jsonl"), NoProgress())
        return [*trainer.model.state_dict().values(), trainer.generator.get_state(), torch.get_rng_state()]

    without = weights(every=6, cosines_every=0)
    for found, expected in zip(weights(every=1, cosines_every=2), without, strict=True):
        assert torch.equal(found, expected)


def test_continuous_uncertainty_is_the_three_lines_of_the_guide(tiny, tmp_path, device):
    """The loop of plain training with another scalar, and the log-variances at a rate of their own."""
    config = tiny(method=CONTINUOUS, iterations=3, loss={"weight": "p2"}, logging={"every": 1})
    trainer, lines = fit(config, tmp_path / "run")

    data, scheduler = build_data(config), build_scheduler(config)
    model = build_model(config, data, device)
    learned = weighting.ContinuousUncertainty().to(device)
    optimizer = torch.optim.AdamW(weighting.param_groups(model, learned, lr=1e-3, weight_decay=0.0))
    generator = torch.Generator(device).manual_seed(0)
    order = torch.from_numpy(np.random.default_rng([0, 0]).permutation(1437))
    levels = torch.from_numpy(log_snr(scheduler)).float().to(device)
    for step in range(3):
        index = order[12 * step : 12 * step + 12]
        images, labels = data.train[index].to(device), data.train_labels[index].to(device)
        t = torch.randint(20, (12,), generator=generator, device=device)
        noise = torch.randn(images.shape, generator=generator, device=device)
        predicted = model(scheduler.add_noise(images, noise, t), t, class_labels=labels).sample
        errors = (predicted - noise).square().mean((1, 2, 3)) / (1 + levels[t].exp())
        weights = torch.exp(-learned.log_var(levels[t])).detach()
        cluster = trainer.clusters.assign(t)
        for k, found in enumerate(lines[step]["weights"]):
            if (cluster == k).any():
                assert found == pytest.approx(float(weights[cluster == k].mean()), rel=1e-3)
        optimizer.zero_grad()
        learned(errors, levels[t]).backward()
        optimizer.step()
    assert learned.weight.abs().min() > 0
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(trainer.weighting.weight, learned.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", KINDS)
def test_the_loss_goes_down(tiny, tmp_path, method):
    config = tiny(
        method=method, iterations=20, optimizer={"lr": 1e-2}, logging={"every": 5, "cosines_every": 0}
    )
    _, lines = fit(config, tmp_path / "run")
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_continues_to_the_same_bits(tiny, tmp_path, method, device):
    if device.type != "cpu":
        pytest.skip("the same bits are promised on CPUs")
    # Stops in the middle of an epoch, of a line of the log and of the Nash updates, with dropout.
    config = tiny(
        method=method,
        iterations=7,
        nash_update_every=2,
        model={"args": {"dropout": 0.1}},
        logging={"every": 3},
        checkpoints={"every": 4},
        batch_size=100,
    )
    whole, lines = fit(config, tmp_path / "whole")

    torch.manual_seed(99)  # what the process has drawn before must not matter
    log = History(tmp_path / "whole" / "log.jsonl")
    resumed = Trainer(config)
    resumed.load(tmp_path / "whole" / "iter-00000004", log)
    assert resumed.iteration == 4
    (tmp_path / "again").mkdir()
    resumed.fit(tmp_path / "again", log, Silent())
    log.close()
    assert same_weights(whole.model, resumed.model)
    assert same_weights(whole.ema.model, resumed.ema.model)
    again = history.read(tmp_path / "whole" / "log.jsonl")
    for line in (*lines, *again):
        del line["seconds"]
    assert lines == again


CURRICULUM = {
    "order": "easy_to_hard", "patience": 3, "max_length": 5, "smoothing": 0.5, "clusters": {"k": 4}
}  # fmt: skip


@pytest.mark.parametrize(("method", "accumulate"), [*((method, 1) for method in KINDS), ("uw", 2)])
def test_a_curriculum_stopped_in_the_middle_of_a_phase_continues_to_the_same_bits(
    tiny, tmp_path, method, accumulate, device
):
    if device.type != "cpu":
        pytest.skip("the same bits are promised on CPUs")
    config = tiny(
        method=method,
        iterations=12,
        accumulate=accumulate,
        curriculum=CURRICULUM,
        logging={"every": 3},
        checkpoints={"every": 2, "keep": 20},
    )
    whole, lines = fit(config, tmp_path / "whole")
    assert 1 == lines[0]["phase"] < lines[-1]["phase"]
    states = {path: checkpoint.load_state(path)["timesteps"] for path in (tmp_path / "whole").glob("iter-*")}
    middle = next(path for path, state in states.items() if state["current_phase"] > 1 and state["age"] > 1)

    log = History(tmp_path / "whole" / "log.jsonl")
    resumed = Trainer(config)
    resumed.load(middle, log)
    assert resumed.timesteps.phase > 1
    (tmp_path / "again").mkdir()
    resumed.fit(tmp_path / "again", log, Silent())
    log.close()
    assert same_weights(whole.model, resumed.model)
    states = [list(trainer.timesteps.buffers()) for trainer in (whole, resumed)]
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)
    again = history.read(tmp_path / "whole" / "log.jsonl")
    for line in (*lines, *again):
        del line["seconds"]
    assert lines == again


@pytest.mark.parametrize("order", ["easy_to_hard", "hard_to_easy"])
@pytest.mark.parametrize("method", KINDS)
def test_phases_of_a_curriculum(tiny, tmp_path, method, order):
    curriculum = {"order": order, "patience": None, "max_length": 2, "clusters": {"k": 3}}
    _, lines = fit(
        tiny(method=method, curriculum=curriculum, iterations=8, logging={"every": 1}), tmp_path / "run"
    )
    assert [line["phase"] for line in lines] == [1, 2, 2, 3, 3, 4, 4, 4]
    # The curriculum has the clusters of the tasks here: one more of them is trained in every phase.
    trained = [[loss is not None for loss in line["losses"]] for line in lines]
    for line, phase in zip(trained, [1, 1, 2, 2, 3, 3, 4, 4], strict=True):
        inactive = line[: max(0, 3 - phase)] if order == "easy_to_hard" else line[phase:]
        assert not any(inactive)
        if method in weighting.METHODS:
            assert sum(line) == min(phase, 3)


@pytest.mark.parametrize(
    "timesteps",
    [
        {"sampler": "mode", "args": {"mode_scale": 0.8}},
        {"sampler": "speed"},
        {"sampler": "loss", "args": {"cells": 4}},
        {"sampler": "range", "args": {"ranges": [[0, 10, 20], [3, 0, 20]]}},
    ],
    ids=lambda options: options["sampler"],
)
def test_samplers_continue_to_the_same_bits(tiny, tmp_path, timesteps, device):
    if device.type != "cpu":
        pytest.skip("the same bits are promised on CPUs")
    config = tiny(method="uw", timesteps=timesteps, iterations=6, checkpoints={"every": 2, "keep": 9})
    whole, lines = fit(config, tmp_path / "whole")
    log = History(tmp_path / "whole" / "log.jsonl")
    resumed = Trainer(config)
    resumed.load(tmp_path / "whole" / "iter-00000002", log)
    (tmp_path / "again").mkdir()
    resumed.fit(tmp_path / "again", log, Silent())
    log.close()
    assert same_weights(whole.model, resumed.model)
    if timesteps["sampler"] == "range":  # the noisier half alone, and then all
        trained = [[loss is not None for loss in line["losses"]] for line in lines]
        assert [line[0] for line in trained] == [False, True, True]


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize(
    "timesteps",
    [
        {"sampler": "logit_normal"},
        {"sampler": "laplace", "args": {"scale": 2.0}},
        {"sampler": "second_moment", "args": {"cells": 3, "history": 2}},
    ],
    ids=lambda options: options["sampler"],
)
def test_methods_with_other_timesteps(tiny, tmp_path, method, timesteps):
    trainer, lines = fit(tiny(method=method, timesteps=timesteps, iterations=4), tmp_path / "run")
    assert all(loss is None or loss > 0 for line in lines for loss in line["losses"])
    assert "phase" not in lines[0]
    if timesteps["sampler"] == "second_moment":
        assert (trainer.timesteps.counts >= 2).all()
        other = Trainer(trainer.config)
        other.load(sorted((tmp_path / "run").glob("iter-*"))[-1], History(tmp_path / "run" / "log.jsonl"))
        assert torch.equal(other.timesteps.losses, trainer.timesteps.losses)


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("order", ["none", "easy_to_hard"])
def test_loss_weights_with_every_method_and_the_curriculum(tiny, tmp_path, method, order):
    # By log-SNR the first phase would be one timestep, of whose only weight some methods are independent.
    curriculum = {"order": order, "clusters": {"k": 4, "cost": "timestep"}, "patience": 1}
    options = {"method": method, "iterations": 3, "curriculum": curriculum}
    plain, _ = fit(tiny(**options), tmp_path / "plain")
    ones = {"weight": "min_snr", "args": {"gamma": 1e30}}
    same, _ = fit(tiny(**options, loss=ones), tmp_path / "ones")
    assert same_weights(plain.model, same.model)
    weighted, lines = fit(tiny(**options, loss={"weight": "p2"}), tmp_path / "weighted")
    assert not same_weights(plain.model, weighted.model)
    assert all(np.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"weight": "min_snr", "args": {"gamma": 0}}, "loss.args: gamma: expected a positive number"),
        ({"weight": "min_snr", "args": {"k": 1}}, "loss.args: "),
        ({"weight": "p2", "args": {"gamma": -1}}, "loss.args: expected gamma >= 0 and k > 0"),
        ({"args": {"gamma": 1}}, "loss.args: expected none without a loss.weight"),
        (
            {"weight": "min_snr", "args": {"gamma": 1, "snr_gamma": 5}},
            "loss.args: expected each setting once, found gamma, snr_gamma",
        ),
        ({"weight": "p2", "args": {"snr_gamma": 5}}, "loss.args: "),
        ({"weight": "best"}, "loss.weight: expected one of 'none', 'min_snr', 'soft_min_snr', 'p2', "),
    ],
)
def test_bad_loss_weights(tiny, loss, message):
    with pytest.raises(UserError) as caught:
        Trainer(tiny(loss=loss))
    assert str(caught.value).startswith(message)


def test_every_loss_weight_is_a_choice():
    choices = get_args(get_type_hints(Loss)["weight"])
    assert choices == ("none", *LOSS_WEIGHTS) == tuple(LOSS_TITLES)


@pytest.mark.parametrize("name", ["gamma", "snr_gamma", "min_snr_gamma"])
@pytest.mark.parametrize("weight", ["min_snr", "soft_min_snr"])
def test_names_that_people_type(tiny, weight, name):
    config = tiny(loss={"weight": weight, "args": {name: 3.0}})
    scheduler = build_scheduler(config)
    expected = LOSS_WEIGHTS[weight](torch.from_numpy(log_snr(scheduler)), gamma=3.0).float()
    torch.testing.assert_close(build_noise(config, scheduler).process.weights, expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weight", LOSS_WEIGHTS)
def test_loss_weights_of_a_schedule_that_ends_in_pure_noise(tiny, weight, kind):
    args = {"prediction_type": kind, "rescale_betas_zero_snr": True, "beta_schedule": "linear"}
    config = tiny(loss={"weight": weight}, scheduler={"args": args})
    scheduler = build_scheduler(config)
    scheduler.alphas_cumprod[-1] = 0.0  # diffusers leaves 2^-24
    bounded = kind == "v_prediction" or weight in ("min_snr", "soft_min_snr", "p2", "logit_normal")
    if bounded:
        found = build_noise(config, scheduler).process.weights
        assert found.isfinite().all()
    else:
        with pytest.raises(
            UserError, match=f"expected one that is bounded for prediction type {kind} .* found {weight}"
        ):
            build_noise(config, scheduler)


@pytest.mark.parametrize("process", ["edm", "flow"])
@pytest.mark.parametrize("method", ["vanilla", "continuous_uw", "uw", "nash"])
def test_continuous_processes(tiny, tmp_path, process, method):
    """Clusters, a curriculum and loss weights; a stop in the middle changes nothing."""
    config = tiny(
        process=process,
        method=method,
        iterations=5,
        loss={"weight": "min_snr"},
        curriculum={"order": "easy_to_hard", "patience": None, "max_length": 1, "clusters": {"k": 3}},
        timesteps={"sampler": None},
        checkpoints={"every": 3},
    )
    whole, lines = fit(config, tmp_path / "whole")
    assert isinstance(whole.clusters, NoiseClustering)
    assert whole.clusters.k == 3
    assert lines[0]["phase"] < lines[-1]["phase"]
    log = History(tmp_path / "whole" / "log.jsonl")
    resumed = Trainer(config)
    resumed.load(tmp_path / "whole" / "iter-00000003", log)
    (tmp_path / "again").mkdir()
    resumed.fit(tmp_path / "again", log, Silent())
    log.close()
    if config.device == "cpu":
        assert same_weights(whole.model, resumed.model)


LAWS = {
    "edm": [
        (None, {}, 1.0, "LogNormalSigma(mean=-1.2, std=1.2)"),
        ("log_normal", {"mean": -0.4, "std": 1.0}, 1.0, "LogNormalSigma(mean=-0.4, std=1.0)"),
        ("laplace", {}, 1.0, "LaplaceSigma(mean=0.0, scale=0.5)"),
        ("second_moment", {"cells": 3}, 1.0, "LogNormalSigma(mean=-1.2, std=1.2)"),
    ],
    "flow": [
        (None, {}, 1.0, "UniformTime()"),
        ("uniform", {}, 3.0, "ShiftedTime(shift=3.0)"),
        ("logit_normal", {"std": 2.0}, np.e, "LogitNormalTime(mean=1.0, std=2.0)"),
        ("laplace", {}, np.e, "LaplaceTime(mean=-2.0, scale=0.5)"),
        ("beta", {"a": 1.5, "b": 1.0}, 1.0, "BetaTime(a=1.5, b=1.0)"),
    ],
}


@pytest.mark.parametrize("cost", ["snr", "timestep"])
@pytest.mark.parametrize("method", ["vanilla", "uw"])
@pytest.mark.parametrize(("process", "law"), [(key, law) for key, laws in LAWS.items() for law in laws])
def test_distributions_of_continuous_levels(tiny, process, law, method, cost):
    sampler, args, shift, expected = law
    scheduler = {"args": {"shift": shift}} if process == "flow" else {}
    timesteps = {"sampler": sampler, "args": args}
    config = tiny(
        process=process, method=method, timesteps=timesteps, scheduler=scheduler, clusters={"cost": cost}
    )
    trainer = Trainer(config)
    assert str(trainer.clusters.distribution) == expected
    if cost == "timestep":
        np.testing.assert_allclose(trainer.clusters.probabilities, [0, 1 / 3, 2 / 3, 1])
    level, cluster = trainer.timesteps.sample(30, generator=torch.Generator().manual_seed(0))
    assert level.is_floating_point()
    if method == "uw" and sampler not in ("second_moment", "uniform"):
        assert cluster.bincount().tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    ("process", "sampler", "message"),
    [
        ("edm", "logit_normal", "timesteps: sampler: expected log_normal or laplace for EDM's σ"),
        ("flow", "log_normal", "timesteps: sampler: expected logit_normal, mode, beta or laplace for times"),
    ],
)
def test_distributions_of_other_levels_are_refused(tiny, process, sampler, message):
    with pytest.raises(UserError) as caught:
        Trainer(tiny(process=process, timesteps={"sampler": sampler}))
    assert str(caught.value).startswith(message)


def test_the_number_of_clusters_can_be_chosen(tiny, tmp_path):
    trainer, lines = fit(tiny(clusters={"k": "auto"}, iterations=2), tmp_path / "run")
    assert 1 < trainer.clusters.k == trainer.mtl.num_clusters == len(lines[0]["losses"]) < 20


def test_other_clusters_than_those_of_the_checkpoint_are_refused(tiny, tmp_path):
    distance = np.abs(np.subtract.outer(np.arange(20.0), np.arange(20.0)))
    np.save(tmp_path / "tas.npy", np.exp(-distance / 5))
    config = tiny(iterations=2, clusters={"cost": "affinity", "affinity": str(tmp_path / "tas.npy")})
    fit(config, tmp_path / "run")
    np.save(tmp_path / "tas.npy", np.kron(np.diag([1.0, 1, 1]), np.ones((7, 7)))[:20, :20])
    log = History(tmp_path / "run" / "log.jsonl")
    with pytest.raises(UserError, match=r"clusters: expected those of .*iter-00000002, IntervalClustering"):
        Trainer(config).load(tmp_path / "run" / "iter-00000002", log)
    log.close()


def test_bf16_is_autocast(tiny, tmp_path):
    config = tiny(precision="bf16", iterations=2)
    trainer, lines = fit(config, tmp_path / "run")
    _, exact = fit(tiny(iterations=2), tmp_path / "full")
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert lines[0]["loss"] != exact[0]["loss"]
    assert lines[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.02)


@pytest.mark.compile
@pytest.mark.parametrize("method", ["vanilla", "nash"])
def test_a_compiled_model_takes_the_same_step(tiny, tmp_path, monkeypatch, method):
    (tmp_path / "my_project.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_project", raising=False)
    config = replace(
        tiny(method=method, iterations=2, logging={"every": 1}),
        model=Component("my_project.Denoiser", {"width": 4}),
        data=Component("my_project.images", {"count": 30}),
    )
    _, plain = fit(config, tmp_path / "plain")
    compute = replace(config.compute, compile=True)
    trainer, compiled = fit(replace(config, compute=compute), tmp_path / "compiled")
    assert isinstance(trainer._run, torch._dynamo.OptimizedModule)
    assert compiled[1]["loss"] == pytest.approx(plain[1]["loss"], rel=1e-4)


def test_the_optimizer_is_fused(tiny):
    assert Trainer(tiny()).optimizer.defaults["fused"]


def test_gradients_are_clipped(tiny, tmp_path):
    config = tiny(method="vanilla", optimizer={"clip": 1e-3}, iterations=1)
    trainer, lines = fit(config, tmp_path / "run")
    norm = torch.stack([p.grad.square().sum() for p in trainer.model.parameters()]).sum().sqrt()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    assert lines[0]["gradient_norm"] > 1e-3


@pytest.mark.parametrize(
    ("method", "kind"), [*product(METHODS, ["epsilon"]), *product(KINDS, ["v_prediction", "sample"])]
)
def test_a_step_runs_no_plain_definition(tiny, tmp_path, monkeypatch, method, kind):
    def refuse(name, reason):
        raise AssertionError(f"{name} ran its plain definition: {reason}")

    config = tiny(method=method, scheduler={"args": {"prediction_type": kind}}, loss={"weight": "p2"})
    trainer = Trainer(config)
    monkeypatch.setattr(_library, "_log_fallback", refuse)
    for name in ("add_noise", "get_velocity"):  # nor the scheduler's
        monkeypatch.delattr(type(trainer.scheduler), name)
    log = History(tmp_path / "log.jsonl")
    trainer.step(log)
    log.close()


def test_unknown_prediction_type(tiny, tmp_path):
    with pytest.raises(UserError, match="prediction_type"):
        fit(tiny(scheduler={"args": {"prediction_type": "score"}}), tmp_path / "run")


@pytest.mark.parametrize("method", KINDS)
def test_divergence_stops_the_run_and_keeps_what_was_good(tiny, tmp_path, method):
    config = tiny(method=method, iterations=50, checkpoints={"every": 1})
    trainer = Trainer(config)
    log = History(tmp_path / "log.jsonl")
    trainer.step(log)
    good = trainer.save(tmp_path, log)
    with torch.no_grad():
        trainer.model.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingDiverged, match="not finite"):
        trainer.fit(tmp_path, log, Silent())
    log.close()
    assert sorted(tmp_path.glob("iter-*")) == [good]
    trainer.load(good, History(tmp_path / "log.jsonl"))
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


MODULE = """
import torch
from diffmtl_fast.train.data import ImageData

class Denoiser(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, width, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(width, 1, 3, padding=1)
        )

    def forward(self, x, t):
        return self.net(x)

class Normed(Denoiser):
    def forward(self, x, t):
        return self.norm(self.net(x))

    def __init__(self):
        super().__init__(4)
        self.norm = torch.nn.BatchNorm2d(1)

def images(count):
    return ImageData(torch.zeros(count, 1, 4, 4), None, torch.zeros(2, 1, 4, 4), None)
"""


@pytest.mark.parametrize("method", KINDS)
def test_any_module_and_data_without_labels(tiny, tmp_path, monkeypatch, method):
    (tmp_path / "my_project.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_project", raising=False)
    config = replace(
        tiny(method=method, iterations=2),
        model=Component("my_project.Denoiser", {"width": 4}),
        data=Component("my_project.images", {"count": 30}),
    )
    _, lines = fit(config, tmp_path / "run")
    assert lines[0]["loss"] > 0
    if method in ("pcgrad", "nash"):  # what mixes the samples of a batch has no gradients by cluster
        with pytest.raises(UserError, match=r"^model: expected layers .* BatchNorm2d"):
            fit(replace(config, model=Component("my_project.Normed")), tmp_path / "normed")
    with pytest.raises(UserError, match=r"evaluation\.num_samples: expected 0 for data without labels"):
        Trainer(replace(config, evaluation=replace(config.evaluation, num_samples=10)))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 0.5, 0]), ("cosine", [0.5, 1, 0.5, 0])],
)
def test_learning_rates_rise_and_fall(tiny, tmp_path, schedule, expected):
    config = tiny(iterations=4, optimizer={"lr": 1e-2, "warmup": 2, "schedule": schedule})
    trainer, found = Trainer(config), []
    log = History(tmp_path / "log.jsonl")
    for _ in range(4):
        trainer.step(log)
        found.append(trainer.optimizer.param_groups[0]["lr"] / 1e-2)
    log.close()
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("method", ["vanilla", "uw", "nash"])
def test_fp16_scales_and_continues(tiny, tmp_path, method):
    """The first scale of 65536 overflows nothing that a skipped step would not answer; the state is kept."""
    options = {"precision": "fp16", "iterations": 4, "checkpoints": {"every": 2}}
    whole, lines = fit(tiny(method=method, optimizer={"clip": 1.0}, **options), tmp_path / "run")
    _, exact = fit(tiny(method=method, iterations=4), tmp_path / "full")
    assert lines[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05)
    log = History(tmp_path / "run" / "log.jsonl")
    resumed = Trainer(whole.config)
    resumed.load(tmp_path / "run" / "iter-00000002", log)
    log.close()
    assert resumed.scaler.state_dict()["_growth_tracker"] <= 2
    assert resumed.scaler.get_scale() > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_norm_of_the_step_is_that_of_its_gradients(tiny, tmp_path, monkeypatch, accumulate):
    config = tiny(method="pcgrad", optimizer={"clip": 1e-3}, accumulate=accumulate, logging={"every": 1})
    with monkeypatch.context() as patched:  # nothing measures it again
        patched.delattr(torch.nn.utils, "clip_grad_norm_")
        trainer, lines = fit(replace(config, iterations=1), tmp_path / "run")
    norm = torch.stack([p.grad.square().sum() for p in trainer.model.parameters()]).sum().sqrt()
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)
    free = Trainer(replace(config, optimizer=replace(config.optimizer, clip=0.0)))
    log = History(tmp_path / "log.jsonl")
    free.step(log)
    log.close()
    norm = torch.stack([p.grad.square().sum() for p in free.model.parameters()]).sum().sqrt()
    assert lines[0]["gradient_norm"] == pytest.approx(float(norm), rel=1e-3)


@pytest.mark.parametrize("method", ["vanilla", "uw", "pcgrad", "nash"])
def test_batches_that_are_weighed_as_one_are_one_big_batch(tiny, tmp_path, monkeypatch, method):
    """In float64: six batches of two samples, and one of twelve; gradients, weights and the line of the log."""
    real_randn, images = torch.randn, torch.rand(12, 1, 8, 8, dtype=torch.float64) * 2 - 1
    noise = real_randn(12, 1, 8, 8, dtype=torch.float64)
    found = []
    for batch_size, accumulate in ((12, 1), (2, 6)):
        options = {"batch_size": batch_size, "accumulate": accumulate, "weigh_per": "step", "device": "cpu"}
        trainer = Trainer(tiny(method=method, optimizer={"clip": 1e-3}, **options))
        trainer.model.double().train()
        trainer.ema.model.double()
        starts = iter(range(0, 12, batch_size))

        def batch(trainer=trainer, size=batch_size, starts=starts):
            own = slice(start := next(starts), start + size)
            monkeypatch.setattr(torch, "randn", lambda *_, **__: noise[own])
            return Batch(images[own], torch.arange(12)[own] % 10)

        monkeypatch.setattr(trainer, "_next_batch", batch)
        log = History(tmp_path / f"{accumulate}.jsonl")
        trainer.step(log)
        monkeypatch.setattr(torch, "randn", real_randn)
        found.append((trainer, log.flush(1)))
        log.close()
    (one, line), (six, lines) = found
    for ours, theirs in zip(six.model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)
    for name in {"gradient_norm"} if method == "vanilla" else line:
        np.testing.assert_allclose(
            np.array(lines[name], dtype=float), np.array(line[name], dtype=float), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weigh_per": "step", "compute": {"memory": "lean"}}, "weigh_per: expected batch with compute.memory"),
        ({"weigh_per": "step", "compute": {"sharding": "fsdp2"}}, "weigh_per: expected batch with compute"),
        ({"precision": "fp16", "compute": {"sharding": "fsdp2"}}, "precision: expected fp32 or bf16 with compute"),
        ({"sigma_rels": [0.1], "compute": {"sharding": "fsdp2"}}, "sigma_rels: expected [] with compute.sharding"),
        ({"sigma_rels": [0.05, 0.3]}, "sigma_rels: sigma_rel: expected more than 0 and less"),
        ({"sigma_rels": [0.1], "sampling": {"sigma_rel": 0.2}}, "sampling.sigma_rel: expected null, or at least"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(tiny, options, message):
    with pytest.raises(UserError) as caught:
        tiny(**options)
    assert str(caught.value).startswith(message)


def test_power_emas_of_a_stopped_run_continue_to_the_same_bits(tiny, tmp_path, device):
    if device.type != "cpu":
        pytest.skip("the same bits are promised on CPUs")
    config = tiny(method="vanilla", iterations=4, sigma_rels=[0.05, 0.1])
    whole, _ = fit(config, tmp_path / "whole")
    log = History(tmp_path / "whole" / "log.jsonl")
    resumed = Trainer(config)
    resumed.load(tmp_path / "whole" / "iter-00000002", log)
    (tmp_path / "again").mkdir()
    resumed.fit(tmp_path / "again", log, Silent())
    log.close()
    assert same_weights(whole.power_ema.models, resumed.power_ema.models)
    assert not same_weights(*whole.power_ema.models)


@pytest.mark.parametrize(
    "compute",
    [
        {"engine": "sliced"},
        {"memory": "lean"},
        {"jacobian_dtype": "bfloat16"},
        {"channels_last": True},
        {"checkpointing": True},
    ],
)
def test_ways_to_compute_the_same_step(tiny, tmp_path, compute):
    options = {"method": "nash", "iterations": 2, "logging": {"every": 1}}
    _, plain = fit(tiny(**options), tmp_path / "plain")
    _, other = fit(tiny(**options, compute=compute), tmp_path / "other")
    assert other[1]["loss"] == pytest.approx(plain[1]["loss"], rel=2e-2)


def test_adapters_alone_are_trained(tiny, tmp_path):
    pytest.importorskip("peft")
    base = Trainer(tiny())
    weights = tmp_path / "base.safetensors"
    checkpoint.save_module(weights, base.model)
    compute = {"lora": 2, "lora_targets": ["conv1"], "weights": str(weights)}
    trainer, _ = fit(tiny(method="pcgrad", iterations=2, compute=compute), tmp_path / "run")
    state = trainer.model.state_dict()
    assert torch.equal(state["conv_in.weight"], base.model.conv_in.weight)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert any(state[name].abs().max() > 0 for name in trained if "lora_B" in name)


@pytest.mark.parametrize("nonfinite", ["stop", "drop"])
def test_a_cluster_without_finite_losses_stops_the_run_or_is_dropped(tiny, tmp_path, nonfinite):
    """The model fails below t = 4, which lies within one cluster; without it the others go on."""
    (tmp_path / "run").mkdir()
    trainer = Trainer(tiny(method="pcgrad", clusters={"cost": "timestep"}, loss={"nonfinite": nonfinite}))

    def fail_at_low_noise(_, arguments, named, output):
        times = arguments[1] if len(arguments) > 1 else named["timestep"]
        output.sample = output.sample * torch.where(times < 4, torch.nan, 1.0).view(-1, 1, 1, 1)
        return output

    trainer.model.register_forward_hook(fail_at_low_noise, with_kwargs=True)
    log = History(tmp_path / "run" / "log.jsonl")
    if nonfinite == "stop":
        with pytest.raises(TrainingDiverged, match="not finite"):
            trainer.fit(tmp_path / "run", log, Silent())
        log.close()
        return
    trainer.fit(tmp_path / "run", log, Silent())
    log.close()
    dropped = sum(np.array(line["dropped"]) for line in history.read(tmp_path / "run" / "log.jsonl"))
    assert np.count_nonzero(dropped) == 1
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
