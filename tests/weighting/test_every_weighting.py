"""What holds for every registered weighting: a new one is tested here by being registered."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffmtl_fast as dm
from diffmtl_fast.ops import PLAIN
from diffmtl_fast.weighting import METHODS

GRAMIAN = [name for name, method in METHODS.items() if issubclass(method.cls, dm.GramianWeighting)]
LOSSES = [name for name in METHODS if name not in GRAMIAN]
# Those that promise that no cluster's loss rises along the update.
HARMLESS = ["dualproj", "fairgrad", "mgda", "nash", "upgrad"]
K = 4
DRAWS = 3000


def build(name, device, k=K):
    return METHODS[name].build(k, device, seed=0)


def gramian(device, k=K, seed=0):
    jacobian = torch.randn(k, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    jacobian = jacobian * torch.arange(1, k + 1)[:, None]  # lengths that differ
    return (jacobian @ jacobian.T).float().to(device)


def repetitions(name):
    """How often to ask a method, and the tolerance that the mean deserves; more than once if it draws numbers."""
    random = "generator" in inspect.signature(METHODS[name].cls).parameters
    tolerance = 0.05 if random else 1e-4
    return DRAWS if random else 1, {"rtol": tolerance, "atol": tolerance}


def mean_weights(name, gramian, present=None):
    """The weights; of a method that draws random numbers their mean, and the tolerance that it deserves."""
    weighting = build(name, gramian.device, len(gramian))
    number, tolerance = repetitions(name)
    return torch.stack([weighting(gramian, present) for _ in range(number)]).mean(0), tolerance


def slopes(weighting, losses, present=None, number=None):
    """The scalar of a weighting of losses, and the weights n ∂scalar/∂L that it implies."""
    losses = losses.clone().requires_grad_()
    scalar = weighting(losses, present)
    if number is None:
        number = len(losses) if present is None else int(present.sum())
    return scalar, torch.autograd.grad(scalar, losses)[0] * number


def mean_slopes(name, losses, present=None):
    """What `slopes` finds of a new weighting, of one that draws random numbers the mean, and the tolerance."""
    weighting = build(name, losses.device, len(losses))
    number, tolerance = repetitions(name)
    scalars, weights = zip(*(slopes(weighting, losses, present) for _ in range(number)), strict=True)
    return torch.stack(scalars).mean(0), torch.stack(weights).mean(0), tolerance if number > 1 else {}


@pytest.mark.parametrize("name", GRAMIAN)
def test_weights_have_the_shape_and_device_of_the_clusters(name, device):
    for k in (1, 2, K):
        found = build(name, device, k)(gramian(device, k))
        assert found.shape == (k,)
        assert found.device == gramian(device).device
        assert found.is_floating_point()
        assert found.isfinite().all()
        assert not found.requires_grad


@pytest.mark.parametrize("name", GRAMIAN)
def test_weights_follow_a_permutation_of_the_clusters(name, device):
    order, g = torch.tensor([2, 0, 3, 1]), gramian(device)
    found, tolerance = mean_weights(name, g[order][:, order])
    torch.testing.assert_close(found, mean_weights(name, g)[0][order], **tolerance)


@pytest.mark.parametrize("name", GRAMIAN)
def test_the_direction_does_not_depend_on_the_scale_of_the_gradients(name, device):
    one, tolerance = mean_weights(name, gramian(device))
    for factor in (1e-15, 16, 1e15):
        other, _ = mean_weights(name, factor * gramian(device))
        torch.testing.assert_close(other / other.norm(), one / one.norm(), **tolerance)


@pytest.mark.parametrize("name", HARMLESS)
def test_the_update_harms_no_cluster(name, device, jacobians):
    """⟨d, g_k⟩ ≥ 0 up to rounding, relative to the longest gradient."""
    for rows in jacobians(number=60):
        rows = (rows / rows.norm(dim=1).amax()).to(device)
        w = build(name, device, len(rows))(rows @ rows.T)
        products = rows @ (w @ rows) / rows.norm(dim=1)
        assert products.amin() >= -2e-7 * (w.abs() @ rows.norm(dim=1)), (name, rows)


class Definitions(TorchDispatchMode):
    """Runs the plain definitions of the ops, as an accelerator without kernels does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "diffmtl":
            return PLAIN[function._opname](*args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("k", [K, 8])
@pytest.mark.parametrize("name", GRAMIAN)
def test_an_accelerator_is_never_waited_for(name, k):
    """Tensors of the device "meta" have no values: reading one on the host is an error."""
    method = METHODS[name]
    supplied = {"num_clusters": k} if "num_clusters" in inspect.signature(method.cls).parameters else {}
    weighting = method.cls(**supplied).to("meta")
    g, present = torch.empty(k, k, device="meta"), torch.empty(k, dtype=torch.bool, device="meta")
    for _ in range(2):
        with Definitions():
            found = weighting(g, present)
        assert found.shape == (k,)
        assert found.is_meta


@pytest.mark.parametrize("absent", [[0], [1, 3]])
@pytest.mark.parametrize("name", GRAMIAN)
def test_absent_clusters_weigh_nothing_and_change_nothing(name, absent, device):
    g, present = gramian(device), torch.ones(K, dtype=torch.bool, device=device)
    present[absent] = False
    found, tolerance = mean_weights(name, g, present)
    assert (found[~present] == 0).all()
    torch.testing.assert_close(found[present], mean_weights(name, g[present][:, present])[0], **tolerance)


@pytest.mark.parametrize("name", GRAMIAN)
def test_a_gramian_that_overflowed_leaves_no_trace(name, device):
    """Steps later the weights are finite again; and one such step does not fail."""
    for bad in (float("nan"), float("inf")):
        weighting = build(name, device)
        weighting(gramian(device))
        weighting(torch.full((K, K), bad, device=device))
        for _ in range(2):
            assert weighting(gramian(device, seed=1)).isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_become_a_scalar_with_a_finite_weight_for_each(name, device):
    for k in (1, 2, K):
        scalar, weights = slopes(build(name, device, k), torch.arange(1.0, k + 1, device=device))
        assert scalar.shape == ()
        assert scalar.isfinite()
        assert weights.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_scalar_ignores_the_order_of_the_clusters(name, device):
    order, losses = torch.tensor([2, 0, 3, 1]), torch.tensor([0.5, 2.0, 1.0, 4.0], device=device)
    one, weights, _ = mean_slopes(name, losses)
    other, permuted, tolerance = mean_slopes(name, losses[order])
    torch.testing.assert_close(other, one, **tolerance)
    torch.testing.assert_close(permuted, weights[order], **tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_an_absent_cluster_changes_nothing(name, device):
    losses = torch.tensor([0.5, 2.0, 1.0, 4.0], device=device)
    present = torch.tensor([True, False, True, True], device=device)
    expected, weights, _ = mean_slopes(name, losses[present])
    for value in (0.0, 2.0, 1e6):
        given = losses.index_fill(0, torch.tensor([1], device=device), value)
        found, implied, tolerance = mean_slopes(name, given, present)
        torch.testing.assert_close(found, expected, **tolerance)
        torch.testing.assert_close(implied[present], weights, **tolerance)
        assert implied[1] == 0


@pytest.mark.parametrize("name", LOSSES)
def test_an_absent_cluster_keeps_its_state(name, device):
    """Steps without it leave every buffer's entry of a cluster as it was, and its parameters without slopes."""
    weighting = build(name, device)
    weighting(torch.tensor([0.5, 2.0, 1.0, 4.0], device=device))
    before = {key: value.clone() for key, value in weighting.named_buffers()}
    present = torch.tensor([True, False, True, True], device=device)
    for value in (0.0, 3.0):
        scalar, _ = slopes(weighting, torch.tensor([0.4, value, 0.9, 3.0], device=device), present)
        assert scalar.isfinite()
    for key, value in weighting.named_buffers():
        torch.testing.assert_close(value[1], before[key][1], rtol=0, atol=0, equal_nan=True)
    losses = torch.tensor([0.4, 3.0, 0.9, 3.0], device=device, requires_grad=True)
    weighting(losses, present).backward()
    assert all(parameter.grad[1] == 0 for parameter in weighting.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_read_on_the_host(name):
    """A tensor on the meta device has no values to wait for: reading one raises."""
    weighting = build(name, torch.device("cpu")).to("meta")
    losses, present = torch.ones(K, device="meta"), torch.ones(K, dtype=torch.bool, device="meta")
    for given in (None, present):
        scalar, weights = slopes(weighting, losses, given, number=K)
        assert scalar.shape == ()
        assert weights.shape == (K,)
        weighting(losses.clone().requires_grad_(), given).backward()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_overflowed_leave_no_trace(name, device):
    """Steps later the weights are what they are without that step, but for the parameters, a scaler's matter."""
    good = torch.tensor([0.5, 2.0, 1.0, 4.0], device=device)
    for bad in (float("nan"), float("inf")):
        struck, spared = build(name, device), build(name, device)
        for weighting in (struck, spared):
            slopes(weighting, good)
        slopes(struck, torch.full((K,), bad, device=device))
        for key, value in struck.named_buffers():
            torch.testing.assert_close(value, spared.get_buffer(key), rtol=0, atol=0, equal_nan=True)
        assert all(found.isfinite().all() for found in slopes(struck, good))


@pytest.mark.parametrize("name", METHODS)
def test_the_state_resumes(name, device, tmp_path):
    needs = name in GRAMIAN

    def step(weighting, seed):
        given = gramian(device, seed=seed) if needs else gramian(device, seed=seed).diagonal()
        found = weighting(given)
        for index, parameter in enumerate(weighting.parameters()):
            parameter.data += 0.1 * (index + seed)  # as an optimizer would
        return found

    weighting = build(name, device)
    for seed in range(3):
        step(weighting, seed)
    torch.save(weighting.state_dict(), tmp_path / "state.pt")
    resumed = build(name, device)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(3, 6):
        torch.testing.assert_close(step(resumed, seed), step(weighting, seed), rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_it_is_a_name_of_the_package_and_trains_a_model(name, device):
    method = METHODS[name]
    assert getattr(dm, method.cls.__name__) is method.cls
    assert method.cls.__name__ in dm.__all__
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(device)
    weighting = build(name, device)
    mtl = dm.ClusteredMTL(model, K, weighting)
    optimizer = torch.optim.Adam(dm.param_groups(model, weighting, lr=1e-2))
    x, cluster = torch.randn(16, 3, device=device), torch.arange(16, device=device) % K
    losses = []
    for _ in range(20):
        loss = (mtl(x, cluster=cluster) - 1).square().mean(1)
        optimizer.zero_grad()
        mtl.backward(loss)
        optimizer.step()
        losses.append(loss.detach().mean())
    assert losses[-1] < 0.9 * losses[0]


def readme_row(method):
    """A line of README's table: how the class is called, its update, and what a step costs."""
    arguments = ["k"] * ("num_clusters" in inspect.signature(method.cls).parameters)
    arguments += [f"{option.name}={option.default}" for option in method.options]
    cost = "one forward and backward" if method.forms_gramian else "a plain step"
    if method.forms_gramian and method.cls.needs_gramian is not dm.GramianWeighting.needs_gramian:
        cost += "; a plain step between updates"
    return f"| `{method.cls.__name__}({', '.join(arguments)})` | {method.update} | {cost} |"


def test_what_readme_says_is_what_is_registered():
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    table = text.partition("| weighting | update direction | a step costs |\n")[2].partition("\n\n")[0]
    rows = {
        re.match(r"\| `(\w+)\(", row)[1]: row  # type: ignore[index]
        for row in table.splitlines()[1:]
    }
    registered = {method.cls.__name__: readme_row(method) for method in METHODS.values()}
    assert len(rows) >= 4
    assert rows == {name: registered[name] for name in registered if name in rows}
