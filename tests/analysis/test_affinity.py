"""Task affinity against known gradients, against the published loop, and through interruptions."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import diffmtl_fast as dm
from benchmarks.reference import pairwise_cosines, timestep_gradients
from diffmtl_fast.analysis import TaskAffinity, plot_affinity, task_affinity
from diffmtl_fast.clustering import IntervalClustering, cluster_affinity, cluster_timesteps
from diffmtl_fast.clustering.inputs import load_values

T = 12


class Regression:
    """y = x W, with targets of its own for every timestep: the gradient is (2 / B) Xᵀ(X W − Y_t)."""

    def __init__(self, device, dtype=torch.float64):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(5, 3, generator=generator, dtype=dtype).to(device)
        self.y = torch.randn(T, 5, 2, generator=generator, dtype=dtype).to(device)
        self.model = nn.Linear(3, 2, bias=False).to(device, dtype)

    def loss(self, model, t, generator):
        """The five rows of every task, in turn."""
        row = torch.arange(len(t), device=t.device) % 5
        return (model(self.x[row]) - self.y[t, row]).square().sum(1)

    def cosines(self):
        weight = self.model.weight.detach()
        rows = (self.x.T @ (self.x @ weight.T - self.y)).flatten(1).double().cpu().numpy()
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows @ rows.T


class Drawn:
    """A loss that draws its samples, and remembers them."""

    def __init__(self, device, fail_at=math.inf):
        torch.manual_seed(0)
        layers = nn.Conv2d(2, 3, 3, padding=1), nn.SiLU(), nn.Conv2d(3, 2, 3, padding=1)
        self.model = nn.Sequential(*layers).to(device, torch.float64)
        self.fail_at, self.calls, self.seen = fail_at, 0, []

    def loss(self, model, t, generator):
        self.calls += 1
        if self.calls > self.fail_at:
            raise KeyboardInterrupt
        x = torch.randn(len(t), 2, 4, 4, generator=generator, device=t.device, dtype=torch.float64)
        target = torch.cos(t.double().view(-1, 1, 1, 1) / 3) * x
        self.seen.append((t, x, target))
        return (model(x) - target).square().flatten(1).mean(1)

    def gradients(self):
        """The mean gradient [n, P] by every timestep that was seen, over all its samples."""
        t, x, target = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        rows = []
        for step in t.unique():
            loss = (self.model(x[t == step]) - target[t == step]).square().mean()
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.model.parameters())]))
        return rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch_size", [5, 17, 60, 1000])
def test_exact_on_linear_regression(batch_size, dtype, device):
    problem = Regression(device, dtype)
    found = task_affinity(problem.model, problem.loss, T, samples=5, batch_size=batch_size)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(found.cosines, problem.cosines(), rtol=0, atol=tolerance)
    assert (found.cosines == found.cosines.T).all()
    assert (found.cosines.diagonal() == 1.0).all()
    assert found.error_bound == 0.0


def test_equals_the_published_loop(device):
    problem = Regression(device)
    found = task_affinity(problem.model, problem.loss, T, samples=5)

    def losses(t):
        return [problem.loss(problem.model, torch.full((5,), t, device=device), None).mean()]

    gradients = timestep_gradients(problem.model, losses, [0, 5, 11])
    np.testing.assert_allclose(
        found.cosines[np.ix_([0, 5, 11], [0, 5, 11])], pairwise_cosines(gradients).numpy(), atol=1e-12
    )


@pytest.mark.parametrize(
    ("samples", "batch_size"), [(1, 5), (3, 1), (4, 9), (7, 3), (2, 500)], ids=lambda v: str(v)
)
def test_the_gradient_is_the_mean_over_all_passes(samples, batch_size, device):
    drawn = Drawn(device)
    found = task_affinity(drawn.model, drawn.loss, T, samples=samples, batch_size=batch_size)
    assert all(len(t) <= batch_size for t, _, _ in drawn.seen)
    counts = torch.bincount(torch.cat([t for t, _, _ in drawn.seen]), minlength=T)
    assert counts.tolist() == [samples] * T
    expected = pairwise_cosines(drawn.gradients())
    np.testing.assert_allclose(found.cosines, expected.numpy(), rtol=0, atol=1e-12)


def test_groups_draw_all_their_timesteps_and_strides_the_middle_one(device):
    tasks = IntervalClustering(np.array([0, 1, 5, 12]))
    drawn = Drawn(device)
    task_affinity(drawn.model, drawn.loss, tasks, samples=100, batch_size=300)
    assert torch.cat([t for t, _, _ in drawn.seen]).unique().tolist() == list(range(12))
    drawn = Drawn(device)
    found = task_affinity(drawn.model, drawn.loss, tasks, samples=2, strided=True)
    assert torch.cat([t for t, _, _ in drawn.seen]).tolist() == [0, 0, 3, 3, 8, 8]
    assert found.matrix.shape == (12, 12)
    task = tasks.assign(torch.arange(12)).numpy()
    for i, j in np.ndindex(12, 12):
        assert found.matrix[i, j] == found.cosines[task[i], task[j]]


def test_the_mean_over_checkpoints_and_the_weights_put_back(device):
    problem = Regression(device)
    weights = [torch.randn(2, 3, dtype=torch.float64, device=device) for _ in range(2)]
    expected = []
    original = problem.model.weight.detach().clone()
    for weight in weights:
        problem.model.load_state_dict({"weight": weight})
        expected.append(problem.cosines())
    problem.model.load_state_dict({"weight": original})
    checkpoints = {
        f"step {i}": lambda model, w=w: model.load_state_dict({"weight": w}) for i, w in enumerate(weights)
    }
    found = task_affinity(problem.model, problem.loss, T, samples=5, checkpoints=checkpoints)
    assert found.checkpoints == ("step 0", "step 1")
    np.testing.assert_allclose(found.by_checkpoint, expected, atol=1e-12)
    np.testing.assert_allclose(found.cosines, np.mean(expected, axis=0), atol=1e-12)
    assert torch.equal(problem.model.weight, original)


@pytest.mark.parametrize("projection", [None, 8])
def test_an_interrupted_measurement_ends_at_the_same_bits(projection, tmp_path, device):
    options = {"samples": 2, "batch_size": 8, "projection": projection}  # three blocks
    checkpoints = {"a": lambda model: None, "b": lambda model: torch.nn.init.ones_(model[0].bias)}

    def measure(drawn, folder):
        return task_affinity(
            drawn.model, drawn.loss, T, folder=folder, checkpoints=checkpoints, **options
        ).by_checkpoint

    whole = measure(Drawn(device), None)
    done = []
    for fail_at in (2, 2, 1):
        drawn = Drawn(device, fail_at)
        with pytest.raises(KeyboardInterrupt):
            measure(drawn, tmp_path / "folder")
        done.append(drawn.calls - 1)
    last = Drawn(device)
    np.testing.assert_array_equal(measure(last, tmp_path / "folder"), whole)
    # Six blocks in all, and none of them twice.
    assert sum(done) + last.calls == 6 + 0 * len(done)
    again = Drawn(device, 0)
    np.testing.assert_array_equal(measure(again, tmp_path / "folder"), whole)
    assert not list(tmp_path.rglob("rows-*.npy"))


def test_a_folder_of_another_measurement_is_refused(tmp_path, device):
    problem = Regression(device)
    task_affinity(problem.model, problem.loss, T, samples=5, folder=tmp_path)
    with pytest.raises(ValueError, match=r"expected seed as in the measurement that it holds, 0, found 1"):
        task_affinity(problem.model, problem.loss, T, samples=5, folder=tmp_path, seed=1)
    torch.nn.init.ones_(problem.model.weight)
    with pytest.raises(ValueError, match="expected sha256 as in the measurement that it holds"):
        task_affinity(problem.model, problem.loss, T, samples=5, folder=tmp_path)


def test_projected_cosines_are_within_their_bound(device):
    torch.manual_seed(1)
    model = nn.Linear(60, 60, bias=False).to(device, torch.float64)
    x = torch.randn(T, 60, dtype=torch.float64, device=device)

    def loss(model, t, generator):
        return (model(x[t]) - x[t] * t.double()[:, None]).square().sum(1)

    exact = task_affinity(model, loss, T, samples=1)
    squares = []
    for seed in range(20):
        found = task_affinity(model, loss, T, samples=1, projection=64, seed=seed)
        assert (found.cosines.diagonal() == 1.0).all()
        squares.append(np.square(found.cosines - exact.cosines))
    assert found.error_bound == pytest.approx((2 + math.sqrt(2)) / 8)
    assert 0.0 < math.sqrt(np.mean(squares)) < found.error_bound
    distant = ~np.eye(T, dtype=bool)
    typical = (1 - exact.cosines**2) / 8
    assert math.sqrt(np.mean(squares, 0)[distant].mean()) < 1.2 * math.sqrt(
        np.square(typical)[distant].mean()
    )


class Noisy:
    """Sample gradients g_t + σ_t ε with given g_t, σ_t: of the loss ⟨w, g_t + σ_t ε⟩, linear in the weights w."""

    WIDTH = 2000

    def __init__(self, device, noise, angles):
        self.model = nn.Linear(1, self.WIDTH, bias=False).to(device, torch.float64)
        self.noise = torch.as_tensor(noise, device=device, dtype=torch.float64)
        angles = torch.as_tensor(angles, device=device, dtype=torch.float64)
        self.true = torch.zeros(len(angles), self.WIDTH, device=device, dtype=torch.float64)
        self.true[:, 0], self.true[:, 1] = angles.cos(), angles.sin()

    def loss(self, model, t, generator):
        shape = (len(t), self.WIDTH)
        noise = torch.randn(shape, generator=generator, device=t.device, dtype=torch.float64)
        gradient = self.true[t] + self.noise[t, None] * noise
        return (model(torch.ones_like(gradient[:, :1])) * gradient).sum(1)


def test_attenuation_is_corrected_where_the_true_cosines_are_known(device):
    angles = np.linspace(0.0, 2.0, T)
    noise = np.linspace(0.02, 0.2, T)  # a reliability of 0.97 down to 0.29 with 32 samples
    problem = Noisy(device, noise, angles)
    found = task_affinity(problem.model, problem.loss, T, samples=32, reliability=True)
    true, distinct = np.cos(np.subtract.outer(angles, angles)), ~np.eye(T, dtype=bool)
    expected = 1 / (1 + noise**2 * Noisy.WIDTH / 32)
    np.testing.assert_allclose(found.reliability[0], expected, atol=0.05)
    attenuated = true * np.sqrt(np.outer(expected, expected))
    np.testing.assert_allclose(found.cosines[distinct], attenuated[distinct], atol=0.05)
    assert np.abs(found.cosines - true).max() > 0.5
    np.testing.assert_allclose(found.disattenuated.cosines, true, atol=0.12)
    assert (found.disattenuated.cosines.diagonal() == 1.0).all()


@pytest.mark.parametrize("projection", [None, 8])
@pytest.mark.parametrize(("samples", "batch_size"), [(2, 2), (6, 5), (6, 60), (4, 1)], ids=str)
def test_reliability_is_that_of_the_halves(samples, batch_size, projection, tmp_path, device):
    options = {"samples": samples, "batch_size": batch_size, "projection": projection}
    drawn = Drawn(device)
    plain = task_affinity(drawn.model, drawn.loss, T, **options)
    found = task_affinity(drawn.model, drawn.loss, T, **options, reliability=True, folder=tmp_path)
    np.testing.assert_allclose(found.cosines, plain.cosines, rtol=0, atol=1e-12)  # of the same samples
    t, x, target = (torch.cat(parts) for parts in zip(*drawn.seen[len(drawn.seen) // 2 :], strict=True))
    for step in range(T):
        index = (t == step).nonzero().flatten()
        halves = []
        for half in (index[::2], index[1::2]):
            loss = (drawn.model(x[half]) - target[half]).square().mean()
            parts = torch.autograd.grad(loss, list(drawn.model.parameters()))
            halves.append(torch.cat([part.flatten() for part in parts]))
        expected = halves[0] @ halves[1] / ((halves[0] + halves[1]) / 2).square().sum()
        assert found.reliability[0, step] == pytest.approx(float(expected), abs=1e-10)
    again = Drawn(device, 0)  # from the folder
    stored = task_affinity(again.model, again.loss, T, **options, reliability=True, folder=tmp_path)
    np.testing.assert_array_equal(stored.reliability, found.reliability)
    task_affinity(drawn.model, drawn.loss, T, **options, folder=tmp_path / "plain")
    with pytest.raises(ValueError, match="expected parts as in the measurement that it holds, None, found 2"):
        task_affinity(drawn.model, drawn.loss, T, **options, reliability=True, folder=tmp_path / "plain")


def test_what_is_nothing_but_noise_is_not_corrected():
    cosines, reliability = np.array([[[1, 0.5], [0.5, 1]]]), np.array([[0.5, -0.1]])
    found = TaskAffinity(cluster_timesteps(4, 2), ("a",), cosines, 0.0, reliability)
    np.testing.assert_array_equal(found.disattenuated.cosines, [[1.0, np.nan], [np.nan, 1.0]])
    with pytest.raises(ValueError, match="expected a measurement with reliability=True, found one without"):
        TaskAffinity(cluster_timesteps(4, 2), ("a",), cosines).disattenuated  # noqa: B018 (it raises)


def test_what_is_saved_is_what_the_clustering_takes(tmp_path):
    two = np.kron(np.eye(2), np.ones((3, 3)))
    found = TaskAffinity(cluster_timesteps(12, 6), ("a",), two[None])
    found.save(tmp_path / "affinity.npy")
    saved = load_values(tmp_path / "affinity.npy")
    np.testing.assert_array_equal(saved, found.matrix)
    assert cluster_affinity(saved, 2).boundaries.tolist() == [0, 6, 12]


def test_the_model_trains_on_as_before(device):
    """Nothing is left in .grad, and the mode stays."""
    drawn = Drawn(device)
    drawn.model.eval()
    state = copy.deepcopy(drawn.model.state_dict())
    task_affinity(drawn.model, drawn.loss, 4, samples=1)
    assert not drawn.model.training
    assert all(p.grad is None for p in drawn.model.parameters())
    assert all(torch.equal(state[name], value) for name, value in drawn.model.state_dict().items())


def test_progress_is_shown_where_wanted(capsys, device):
    problem = Regression(device)
    task_affinity(problem.model, problem.loss, T, samples=5)
    assert capsys.readouterr().out == ""
    task_affinity(problem.model, problem.loss, T, samples=5, progress=True)
    assert "12/12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 0}, "tasks: expected a number of timesteps >= 1, or a clustering, found 0"),
        ({"samples": 0}, "samples: expected an integer >= 1, found 0"),
        ({"batch_size": 2.0}, r"batch_size: expected an integer >= 1, found 2\.0"),
        ({"reliability": True}, "samples: expected an even number, for two halves, found 5"),
        ({"seed": -1}, "seed: expected an integer >= 0, found -1"),
        ({"checkpoints": {}}, "checkpoints: expected at least one, found none"),
        ({"projection": 12}, "projection: expected a power of two, at least 2, found 12"),
        ({"memory": 100}, r"memory: expected at least 0\.01 GiB for one gradient of 6 elements"),
        ({"memory": 600, "samples": 100}, r"memory: .* for the gradients of 12 tasks.*give a folder"),
    ],
)
def test_bad_input_is_refused(options, message, device):
    problem = Regression(device)
    with pytest.raises(ValueError, match=message):
        task_affinity(problem.model, problem.loss, **{"tasks": T, "samples": 5, **options})


@pytest.mark.parametrize(("value", "what"), [(0.0, "of zeros"), (math.nan, "that is not finite")])
def test_a_task_without_a_gradient_is_named(value, what, device):
    problem = Regression(device)

    def loss(model, t, generator):
        return torch.where(t == 7, value, 1.0) * problem.loss(model, t, generator)

    with pytest.raises(ValueError, match=f"expected a gradient for timesteps 7 to 7, found one {what}"):
        task_affinity(problem.model, loss, T, samples=5)


@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e25])
def test_gradients_whose_products_float32_does_not_hold(scale, device):
    problem = Regression(device, torch.float32)

    def loss(model, t, generator):
        return torch.where(t == 7, scale, 1.0) * problem.loss(model, t, generator)

    found = task_affinity(problem.model, loss, T, samples=5, batch_size=15)
    np.testing.assert_allclose(found.cosines, problem.cosines(), rtol=0, atol=1e-6)


def test_frozen_model_is_refused(device):
    problem = Regression(device)
    problem.model.requires_grad_(False)
    with pytest.raises(ValueError, match="at least one parameter that requires a gradient"):
        task_affinity(problem.model, problem.loss, T)


@pytest.mark.parametrize("tasks", [cluster_timesteps(40, 8), IntervalClustering(np.array([0, 40]))])
def test_the_picture(tasks, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((tasks.k, 3))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    affinity = TaskAffinity(tasks, ("a",), (rows @ rows.T)[None])
    plot_affinity(tmp_path / "a.png", affinity, np.linspace(9, -9, 40), "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"log_snr: expected shape \[40\], found \[39\]"):
        plot_affinity(tmp_path / "a.png", affinity, np.linspace(9, -9, 39), "title")


def test_public_names():
    assert dm.analysis.task_affinity is task_affinity
