"""Every op under torch.library's own checks and under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from diffmtl_fast import ops
from diffmtl_fast.ops import PLAIN, _eigh, _library

K, B, P = 3, 6, 10


def mse_inputs(device, dtype, requires_grad):
    pred, target = (torch.randn(B, 2, 5, device=device).to(dtype) for _ in range(2))
    return pred.requires_grad_(requires_grad), target


def parts(device, dtype, requires_grad):
    """A Jacobian in parts, one of them in another dtype."""
    shapes, dtypes = [(K, P), (K,), (K, 2, 3, 1)], [dtype, dtype, torch.float32]
    return [
        torch.randn(shape, device=device).to(t).requires_grad_(requires_grad)
        for shape, t in zip(shapes, dtypes, strict=True)
    ]


def cluster(device):
    return torch.tensor([0, 2, 2, 0, 0, 2], device=device)


def gramian(device, dtype):
    jacobian = torch.randn(K, P, device=device, dtype=dtype)
    return jacobian @ jacobian.T


def offsets(device):
    return torch.tensor([0, 2, 2, B], device=device)


def order(device):
    return torch.tensor([[1, 2], [2, 0], [0, 1]], device=device)


SAMPLES = {
    "sample_mse": lambda d, t, g: mse_inputs(d, t, g),
    "sample_mse_backward": lambda d, t, g: (torch.randn(B, device=d), *mse_inputs(d, t, False)),
    "sample_mse_backward_both": lambda d, t, g: (torch.randn(B, device=d), *mse_inputs(d, t, False)),
    "add_noise": lambda d, t, g: (*mse_inputs(d, t, g), torch.rand(B, device=d), torch.rand(B, device=d)),
    "philox_normal": lambda d, t, g: (torch.tensor(7, device=d), torch.randn(B, 2, 5, device=d).to(t)),
    "sample_loss": lambda d, t, g: (
        *mse_inputs(d, t, g),
        torch.randn(B, 2, 5, device=d).to(t),
        torch.randn(2, B, device=d),
        torch.rand(B, device=d),
        0.5,
    ),
    "sample_loss_backward": lambda d, t, g: (
        torch.randn(B, device=d),
        *mse_inputs(d, t, False),
        torch.randn(B, 2, 5, device=d).to(t),
        torch.randn(2, B, device=d),
        None,
    ),
    "cluster_mean": lambda d, t, g: (torch.randn(B, device=d).to(t).requires_grad_(g), cluster(d), K),
    "cluster_mean_backward": lambda d, t, g: (torch.randn(K, device=d), cluster(d)),
    "cluster_mse": lambda d, t, g: (*mse_inputs(d, t, g), cluster(d), K, torch.rand(B, device=d)),
    "cluster_sum": lambda d, t, g: (torch.randn(B, P, device=d).to(t), offsets(d)),
    "cluster_sum_out": lambda d, t, g: (
        torch.randn(B, P, device=d).to(t),
        offsets(d),
        torch.randn(K, P, device=d),
        True,
    ),
    "cluster_conv_wgrad": lambda d, t, g: (
        torch.randn(B, 4, 3, 5, device=d).to(t),
        torch.randn(B, 2, 5, 5, device=d).to(t),
        offsets("cpu"),
        [3, 3],
        [2, 1],
        [1, 1],
        [1, 1],
        2,
    ),
    "cluster_conv_wgrad_out": lambda d, t, g: (
        torch.randn(B, 4, 5, device=d).to(t),
        torch.randn(B, 2, 5, device=d).to(t),
        offsets("cpu"),
        [3],
        [1],
        [1],
        [1],
        1,
        torch.randn(K, 4, 2, 3, device=d),
        True,
    ),
    "cluster_wgrad": lambda d, t, g: (
        torch.randn(B, 4, device=d).to(t),
        torch.randn(B, P, device=d).to(t),
        offsets(d),
    ),
    "cluster_wgrad_out": lambda d, t, g: (
        torch.randn(B, 4, device=d).to(t),
        torch.randn(B, P, device=d).to(t),
        offsets("cpu"),
        torch.randn(K, 4, P, device=d),
        False,
    ),
    "cluster_norm_backward": lambda d, t, g: (
        *torch.randn(2, B, 4, 3, device=d).to(t),
        *torch.rand(2, B, 2, device=d),
        torch.randn(4, device=d),
        offsets(d),
        *torch.randn(2, K, 4, device=d),
        [True, False],
    ),
    "group_norm_backward": lambda d, t, g: (
        *torch.randn(2, B, 4, 3, device=d).to(t),
        *torch.rand(2, B, 2, device=d),
        torch.randn(4, device=d),
    ),
    "uncertainty_loss": lambda d, t, g: (
        *mse_inputs(d, t, g),
        cluster(d),
        torch.randn(K, device=d).requires_grad_(g),
    ),
    "uncertainty_loss_backward": lambda d, t, g: (
        torch.randn([], device=d),
        torch.rand(B, device=d),
        *torch.randn(2, K, device=d),
        *mse_inputs(d, t, False),
    ),
    "gram": lambda d, t, g: (parts(d, t, g),),
    "combine": lambda d, t, g: (parts(d, t, g), torch.randn(K, device=d).requires_grad_(g)),
    "combine_": lambda d, t, g: (
        [torch.randn(part.shape[1:], device=d) for part in parts(d, t, False)],
        parts(d, t, False),
        torch.randn(K, device=d),
        [True, False, True],
    ),
    "pcgrad_weights": lambda d, t, g: (
        gramian(d, torch.float32).to(t),
        order(d),
        torch.ones(K, dtype=torch.bool, device=d),
    ),
    "gramian_weights": lambda d, t, g: (
        gramian(d, torch.float32).to(t),
        torch.tensor([True, False, True], device=d),
        "CAGrad",
        [0.5],
    ),
    "gradvac_weights": lambda d, t, g: (
        gramian(d, torch.float32).to(t),
        order(d),
        torch.ones(K, dtype=torch.bool, device=d),
        torch.rand(K, K, device=d, dtype=torch.float64),
        0.5,
    ),
    "nash_weights": lambda d, t, g: (
        gramian(d, torch.float32).to(t),
        torch.tensor([True, False, True], device=d),
    ),
    "eigh": lambda d, t, g: (gramian(d, torch.float64),),
}


DIFFERENTIABLE = (
    "add_noise",
    "cluster_mean",
    "cluster_mse",
    "combine",
    "gram",
    "sample_loss",
    "sample_mse",
    "uncertainty_loss",
)
TWICE_DIFFERENTIABLE = ("add_noise", "combine", "gram")
WRITING = (
    "cluster_conv_wgrad_out",
    "cluster_norm_backward",
    "cluster_sum_out",
    "cluster_wgrad_out",
    "combine_",
)
CONSTANT = tuple(name for name in SAMPLES if name not in (*DIFFERENTIABLE, *WRITING))


def overload(name):
    return getattr(torch.ops.diffmtl, name).default


def written(name, args):
    """Return the tensors that an op writes."""
    places = zip(args, overload(name)._schema.arguments, strict=False)
    return tree_flatten([arg for arg, place in places if place.is_write])[0]


def run(name, args):
    """Run an op; return all tensors that it made or wrote."""
    made = overload(name)(*args)
    return [t for t in tree_flatten(made)[0] if t is not None] + written(name, args)


def of_inputs(name, device, dtype=torch.float64):
    """Return an op as a scalar function of what its sample differentiates, and these inputs."""
    leaves, structure = tree_flatten(SAMPLES[name](device, dtype, True))
    leaves = [
        leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
        for leaf in leaves
    ]
    wanted = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]

    def total(*inputs):
        filled = list(leaves)
        for i, value in zip(wanted, inputs, strict=True):
            filled[i] = value
        results = [t for t in run(name, tree_unflatten(filled, structure)) if t.is_floating_point()]
        # Squared, so that the gradient which reaches the op depends on its inputs.
        return sum(t.square().sum() for t in results)

    return total, [leaves[i].detach().requires_grad_() for i in wanted]


def test_every_op_is_checked():
    names = {name for name in dir(torch.ops.diffmtl) if not name.startswith("_") and name != "name"}
    assert names == set(SAMPLES)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, dtype, requires_grad, device):
    op = getattr(torch.ops.diffmtl, name).default
    torch.library.opcheck(op, SAMPLES[name](device, dtype, requires_grad))


class Seen(TorchDispatchMode):
    """Notes which of the library's ops run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "diffmtl":
            self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


def everything(pred, x0, index, jacobian, log_var, alpha, sigma):
    """A loss of all ops but those that write into an output."""
    k, seed = len(log_var), torch.tensor(3, device=pred.device)
    noisy = ops.add_noise(pred, seed, alpha, sigma) + ops.add_noise(x0, pred, alpha, sigma)
    samples = ops.sample_mse(noisy, ops.philox_normal(seed, x0)) + ops.sample_huber(pred, x0, weight=alpha)
    samples = samples + ops.denoising_loss(pred, x0, seed, prediction="v", alpha=alpha, sigma=sigma)
    samples = samples + ops.denoising_loss(pred, x0, seed, prediction="epsilon") + ops.sample_mse(pred, noisy)
    losses = ops.cluster_mean(samples, index, k) + ops.cluster_mse(pred, x0, index, k, sigma)
    total = losses.sum() + ops.uncertainty_loss(pred, x0, index, log_var)
    gramian = ops.gram(jacobian.detach())
    weights = ops.nash_weights(gramian) + ops.pcgrad_weights(gramian, order(pred.device))
    targets = torch.zeros(k, k, dtype=torch.float64, device=pred.device)
    weights = weights + ops.gramian_weights(gramian, "UPGrad") + _eigh.eigh(gramian.double())[0]
    weights = weights + ops.gradvac_weights(gramian, order(pred.device), targets, 0.5)[0]
    rows, bounds = pred.detach().flatten(1), offsets(pred.device)
    constants = ops.cluster_sum(rows, bounds).sum() + ops.cluster_wgrad(rows, rows, bounds).sum()
    moments = torch.ones(2, len(rows), 1, device=pred.device)
    constants = constants + sum(t.sum() for t in ops.group_norm_backward(rows, rows, *moments, rows[0]))
    images = pred.detach()  # of one dimension
    constants = constants + ops.cluster_conv_wgrad(images, images, bounds, 3, padding=1).sum()
    combined = ops.combine(jacobian, weights).sum() + ops.combine([jacobian, jacobian], weights)[1].sum()
    return total + combined + ops.gram([jacobian, jacobian]).sum() + constants


@pytest.mark.compile
@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_of_every_op_compiles_into_one_graph(autocast, device):
    def gradients(function):
        torch.manual_seed(0)
        pred, x0 = mse_inputs(device, torch.float32, True)
        leaves = [
            pred,
            torch.randn(K, P, device=device).requires_grad_(),
            torch.randn(K, device=device).requires_grad_(),
        ]
        inputs = (pred, x0, cluster(device), *leaves[1:], *torch.rand(2, B, device=device))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            value = function(*inputs)
        return value, *torch.autograd.grad(value, leaves)

    with Seen() as seen:
        expected = gradients(everything)
    assert seen.names == set(SAMPLES) - set(WRITING)
    found = gradients(torch.compile(everything, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(found, expected)


@pytest.mark.compile
def test_ops_that_write_into_their_output_compile(device):
    def gradients(grad_out, x, bounds, jacobian, direction):
        ops.cluster_wgrad(grad_out, x, bounds, out=jacobian[:, : 4 * P].view(K, 4, P), accumulate=True)
        ops.cluster_sum(grad_out, bounds, out=jacobian[:, 4 * P :])
        rstd = torch.ones(len(x), 1, device=jacobian.device)
        by_x = ops.cluster_norm_backward(x, x, None, rstd, None, bounds, by_weight=jacobian[:, :P])
        halves, ones = [jacobian[:, : 2 * P], jacobian[:, 2 * P :]], torch.ones(K, device=jacobian.device)
        square = ops.combine_(
            [direction[: 2 * P], direction[2 * P :]], halves, ones, accumulate=[True, False]
        )
        return jacobian.square().sum() + ops.cluster_wgrad(grad_out, x, bounds).sum() + square + by_x.sum()

    for bounds in (offsets(device), offsets("cpu")):
        inputs = (torch.randn(B, 4, device=device), torch.randn(B, P, device=device), bounds)
        expected, found = (
            [torch.ones(shape, device=device) for shape in ((K, 4 * P + 4), 4 * P + 4)] for _ in range(2)
        )
        value = gradients(*inputs, *expected)
        compiled = torch.compile(gradients, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs, *found), value)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", CONSTANT)
def test_constants_refuse_to_be_differentiated(name, device):
    def require(tensor):
        return tensor.detach().requires_grad_(tensor.is_floating_point())

    results = run(name, tree_map_only(torch.Tensor, require, SAMPLES[name](device, torch.float32, False)))
    with pytest.raises(RuntimeError, match=f"diffmtl::{name} has no gradient: "):
        results[0].sum().backward()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_right_or_refused(name, device):
    function, inputs = of_inputs(name, device)
    if name in TWICE_DIFFERENTIABLE:
        torch.autograd.gradgradcheck(function, inputs)
        return
    for i in range(len(inputs)):  # each derivative by itself: none may be taken for a constant
        (first,) = torch.autograd.grad(function(*inputs), inputs[i], create_graph=True)
        with pytest.raises(RuntimeError, match=r"_backward has no gradient: the second derivative"):
            first.sum().backward()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_refused(name, device):
    function, inputs = of_inputs(name, device)
    inputs = tuple(x.detach() for x in inputs)
    with pytest.raises(NotImplementedError, match=f"diffmtl::{name} has no forward-mode gradient"):
        jvp(function, inputs, inputs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_functional_gradients_are_those_of_backward(name, device):
    function, inputs = of_inputs(name, device)
    everything = tuple(range(len(inputs)))
    expected = torch.autograd.grad(function(*inputs), inputs)
    inputs = [x.detach() for x in inputs]
    for found in (
        grad(function, everything)(*inputs),
        torch.func.vjp(function, *inputs)[1](torch.tensor(1.0)),
    ):
        for gradient, reference in zip(found, expected, strict=True):
            assert torch.equal(gradient, reference)
    per_entry = vmap(grad(function, everything))(*(torch.stack([x, 2 * x]) for x in inputs))
    again = grad(function, everything)(*(2 * x for x in inputs))
    for gradient, reference, other in zip(per_entry, expected, again, strict=True):
        torch.testing.assert_close(gradient, torch.stack([reference, other]))


@pytest.mark.parametrize("name", SAMPLES)
def test_vmap_runs_the_op_for_each_entry(name, device):
    samples = [SAMPLES[name](device, torch.float32, False) for _ in range(2)]
    structure = tree_flatten(samples[0])[1]
    leaves = list(zip(*(tree_flatten(sample)[0] for sample in samples), strict=True))
    tensors = [i for i, (leaf, _) in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    read = [i for i in tensors if not any(leaves[i][0] is t for t in written(name, samples[0]))]
    batched = [
        i for i in tensors if i != read[0]
    ] or tensors  # of one of several there is one for all entries
    dims = tuple(min(leaf.dim(), 1) if i in batched else None for i, (leaf, _) in enumerate(leaves))
    inputs = [
        pair[0] if dim is None else torch.stack(pair, dim) for pair, dim in zip(leaves, dims, strict=True)
    ]

    def function(*entry):
        return tuple(run(name, tree_unflatten(list(entry), structure)))

    found = vmap(function, dims)(*inputs)
    for i in range(2):
        entry = [pair[0 if dim is None else i] for pair, dim in zip(leaves, dims, strict=True)]
        for tensor, reference in zip(found, run(name, tree_unflatten(entry, structure)), strict=True):
            assert torch.equal(tensor[i], reference)


def test_vmap_of_vmap(device):
    pred, target = torch.randn(2, 3, 4, 5, device=device), torch.randn(3, 4, 5, device=device)
    found = vmap(vmap(ops.sample_mse), (0, None))(pred, target)
    assert torch.equal(found, torch.stack([torch.stack([*map(ops.sample_mse, p, target)]) for p in pred]))


def test_vmap_refuses_what_has_no_answer(device):
    values, out = torch.randn(2, B, P, device=device), torch.zeros(K, P, device=device)
    with pytest.raises(
        ValueError, match="cluster_sum_out under vmap: expected out, which it writes, to be batched"
    ):
        vmap(lambda x: ops.cluster_sum(x, offsets(device), out=out))(values)
    with pytest.raises(ValueError, match="sample_mse under vmap: expected at least one entry, found none"):
        vmap(ops.sample_mse)(values[:0], values[:0])


# Weights as a user's mask or schedule gives them: other dtypes than the prediction's.
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_autocast_changes_no_bit(name, dtype, autocast, device):
    inputs = SAMPLES[name](device, dtype, name in DIFFERENTIABLE)
    twins = tree_map_only(torch.Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), inputs)

    def results(args):
        made = run(name, args)
        wanted = [t for t in tree_flatten(args)[0] if isinstance(t, torch.Tensor) and t.requires_grad]
        total = sum(t.sum() for t in made if t.requires_grad)
        return made + list(torch.autograd.grad(total, wanted)) if wanted else made

    expected = results(inputs)
    with torch.autocast(device.type, dtype=autocast):
        found = results(twins)
    for tensor, reference in zip(found, expected, strict=True):
        assert tensor.dtype == reference.dtype
        assert torch.equal(tensor, reference)


def test_autocast_leaves_plain_definitions_alone(device):
    jacobian, weights = (
        torch.randn(65, 7, device=device),
        torch.randn(65, device=device),
    )  # no kernel for so many
    expected = ops.gram(jacobian), ops.combine(jacobian, weights)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = ops.gram(jacobian), ops.combine(jacobian, weights)
    assert all(map(torch.equal, found, expected))


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated
def test_small_ops_reach_their_kernel_without_the_dispatcher_where_it_would_do_nothing(monkeypatch):
    """And nowhere else: a gradient is refused, and modes, transforms and compilers see the op."""
    straight = []

    def note(gramian, *rest):
        straight.append(gramian)
        return PLAIN["gramian_weights"](gramian, *rest)

    monkeypatch.setitem(_library._CPU, "gramian_weights", note)

    def weigh(gramian):
        return ops.gramian_weights(gramian, "DualProj")

    given = gramian("cpu", torch.float32)
    expected = weigh(given)
    assert len(straight) == 1
    with Seen() as seen:
        torch.testing.assert_close(weigh(given), expected)
    assert seen.names == {"gramian_weights"}
    with pytest.raises(RuntimeError, match="gramian_weights has no gradient"):
        weigh(given.clone().requires_grad_()).sum().backward()
    with pytest.raises(NotImplementedError, match="gramian_weights has no forward-mode gradient"):
        jvp(weigh, (given,), (given,))
    torch.testing.assert_close(vmap(weigh)(given[None])[0], expected)
    torch.testing.assert_close(torch.compile(weigh, fullgraph=True, backend="eager")(given), expected)
    assert "gramian_weights" in str(torch.jit.trace(weigh, given, check_trace=False).graph)
    torch.testing.assert_close(weigh(torch.nn.Parameter(given, requires_grad=False)), expected)  # a subclass
    assert len(straight) == 1
