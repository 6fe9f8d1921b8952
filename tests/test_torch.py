"""Private names of PyTorch stand in diffmtl_fast/_torch.py and nowhere else."""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import diffmtl_fast
from diffmtl_fast import _torch

PACKAGE = Path(diffmtl_fast.__file__).parent

OWN = "_torch.py"


@functools.cache
def private_names() -> set[str]:
    """The private attributes of the objects of PyTorch that the package holds."""
    owners = (
        torch.nn.Parameter(torch.zeros(1)),
        nn.Module(),
        nn.GRU(1, 1),
        torch.optim.SGD([torch.zeros(1)]),
        torch.autograd.Function,
        torch.ops.aten.add,
        torch.ops.aten.add.default,
        torch.library.Library("diffmtl_names", "FRAGMENT"),
        torch.library.custom_op(
            "diffmtl_names::f", lambda x: x.clone(), mutates_args=(), schema="(Tensor x) -> Tensor"
        ),
    )
    return {name for owner in owners for name in (*dir(owner), *vars(type(owner))) if is_private(name)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def dotted(node: ast.AST) -> list[str]:
    """The names of an expression such as torch.ops.aten, from its beginning; [] of anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (front := dotted(node.value)):
        return [*front, node.attr]
    return []


def from_torch(tree: ast.Module) -> set[str]:
    """The names that stand for something of PyTorch in a file: what is imported, and what is assigned from it."""
    known = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            known |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            known |= {a.asname for a in node.names if a.asname and a.name.split(".")[0] == "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and dotted(node.value)[:1] and dotted(node.value)[0] in known:
            known |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return known


def found_in(source: str, names: set[str]) -> list[str]:
    """List the private names of PyTorch in a source, with their lines."""
    tree = ast.parse(source)
    known, found = from_torch(tree), []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            imported = [] if isinstance(node, ast.Import) else [a.name for a in node.names]
            for module in modules:
                if module.split(".")[0] == "torch":
                    parts = [*module.split("."), *imported]
                    found += [f"{line}: {module} {part}" for part in parts if is_private(part)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            front = dotted(node.value)
            if front[:1] and front[0] in known:
                found.append(f"{line}: {'.'.join(front)}.{node.attr}")
            elif node.attr in names and front not in (["self"], ["cls"]):
                found.append(f"{line}: .{node.attr}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith("torch.") and any(map(is_private, node.value.split("."))):
                found.append(f"{line}: {node.value!r}")
        elif isinstance(node, ast.Call) and dotted(node.func) in (["getattr"], ["setattr"], ["hasattr"]):
            name = getattr(node.args[1], "value", None)
            if name in names:
                found.append(f"{line}: {name!r}")
    return found


def test_no_other_file_names_what_is_private_in_torch():
    names, found = private_names(), []
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE)
        if str(where) != OWN:
            found += [f"{where}:{what}" for what in found_in(path.read_text(), names)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch._C._any_requires_grad(x)",
        "import torch; torch._foreach_div_(x, 2)",
        "import torch._dynamo",
        "from torch._functorch.utils import x",
        "from torch.utils._pytree import tree_flatten",
        "from torch.utils import _pytree",
        "from torch.autograd import forward_ad; forward_ad._current_level",
        "import torch; _aten = torch.ops.aten; _aten._unsafe_view(x)",
        "tensor._version",
        "p.grad._version",
        "sparse()._values()",
        "module._parameters[name]",
        "p._post_accumulate_grad_hooks",
        "m._flat_weights",
        "op._schema.arguments",
        "getattr(operation, '_opoverload', None)",
        "sys.modules.get('torch._dynamo')",
        "m._compiled_call_impl",
    ],
)
def test_private_names_are_found(line):
    assert found_in(line, private_names())


@pytest.mark.parametrize(
    "line",
    ["self._parameters", "torch.__version__", "loss_kernels._error_kernel[1](x)", "geometry._replace()"],
)
def test_other_names_are_not(line):
    assert not found_in(line, private_names())


def test_a_missing_transform_check_means_yes(monkeypatch):
    """The one name whose replacement is code: without it, functions take the way that is right for all."""
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    try:
        assert importlib.reload(_torch).functorch_transforms_active()
    finally:
        monkeypatch.undo()
        importlib.reload(_torch)
    assert not _torch.functorch_transforms_active()


class Tagged(torch.Tensor):
    pass


def test_what_the_names_do():
    x = torch.zeros(2)
    assert (_torch.version(x), _torch.version(x.add_(1))) == (0, 1)
    made = _torch.make_subclass(Tagged, x, True)
    assert (type(made), made.requires_grad, made.is_leaf, made.data_ptr()) == (
        Tagged,
        True,
        True,
        x.data_ptr(),
    )
    parameter = nn.Parameter(x)
    assert not _torch.has_hooks(parameter)
    parameter.register_post_accumulate_grad_hook(lambda p: None)
    assert _torch.has_hooks(parameter)
    shared = nn.Linear(1, 1)
    nested = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared, nn.Sequential(nn.Tanh()))
    nested.register_module("missing", None)
    assert _torch.modules_of(nested) == list(nested.modules())
    assert not _torch.autocast_enabled()
    with torch.autocast("cpu"):
        assert _torch.autocast_enabled()
    norm = nn.BatchNorm1d(2)
    assert _torch.own_parameters(norm)["weight"] is norm.weight
    assert _torch.own_buffers(norm)["running_mean"] is norm.running_mean
    rnn = nn.GRU(1, 1)
    _torch.own_parameters(rnn)["weight_ih_l0"] = other = nn.Parameter(torch.zeros(3, 1))
    _torch.refresh_flat_weights(rnn)
    assert any(w is other for w in rnn._flat_weights)
    twice = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (1,))
    assert _torch.sparse_values(twice).tolist() == [1, 2]
    assert not _torch.saved_tensors_are_packed()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert _torch.saved_tensors_are_packed()
    assert not _torch.parametrize_cached()
    with nn.utils.parametrize.cached():
        assert _torch.parametrize_cached()
    numbers = [torch.ones(2), torch.ones(3)]
    _torch.foreach_div_(numbers, 2)
    _torch.foreach_lerp_(numbers, [torch.zeros(2), torch.ones(3)], 0.5)
    assert [t.tolist() for t in numbers] == [[0.25] * 2, [0.75] * 3]
    assert list(_torch.compiled_modules(nn.Sequential(nn.Linear(1, 1)))) == []
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].compile()
    assert list(_torch.compiled_modules(model)) == ["0"]
