"""Every private name of PyTorch that the package uses; no other file names one (tests/test_torch.py).

Tried on PyTorch 2.9.1, 2.11.0 and 2.13.0: all of the names exist in all three. Beside each stands what replaces it
in a release that lacks it: where code does so here, the package goes on by itself; where a comment does, the
import of the package or the call fails with the missing name, and the replacement is to be put here.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Lets an autograd.Function be recorded at the innermost level of torch.func. Replaced by autograd.Function's own
# apply, which wants a static `vmap`.
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

# Replaced by functions of our own over lists, tuples and dicts; other containers would then be leaves.
from torch.utils._pytree import tree_flatten, tree_unflatten

_Class = TypeVar("_Class", bound=Tensor)

_BEFORE_2_13 = torch.__version__ < "2.13"

# ----- Operators and the dispatcher

# Types for annotations and isinstance. Replaced by type(torch.ops.aten.add.default) and type(torch.ops.aten.add).
OpOverload: TypeAlias = torch._ops.OpOverload
OpOverloadPacket: TypeAlias = torch._ops.OpOverloadPacket
DispatchKeySet: TypeAlias = torch._C.DispatchKeySet  # for annotations alone

# Context managers: no autocast; no autograd; neither autograd nor the counting of in-place changes.
# Replaced by torch.autocast(device, enabled=False) for every device; the other two by redispatch with a key set.
DisableAutocast = torch._C._DisableAutocast
AutoDispatchBelowAutograd = torch._C._AutoDispatchBelowAutograd
AutoDispatchBelowADInplaceOrView = torch._C._AutoDispatchBelowADInplaceOrView

# The keys behind the one that counts in-place changes. Replaced as the context managers are.
AFTER_ADINPLACEORVIEW: DispatchKeySet = torch._C._after_ADInplaceOrView_keyset

# Whether a tensor among the arguments, or in a list of them, requires a gradient. Replaced by a loop, which costs
# as much host time as the rest of a small op.
any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad

# Whether a transform of torch.func is active. Where it is missing the answer is yes: right, and slower.
functorch_transforms_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)

# Whether autocast is enabled for any device. Where it is missing the answer is yes: right, and slower.
autocast_enabled: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)

# x.view(shape) that tells autograd the result does not share memory. Replaced by `reshape`.
unsafe_view = torch.ops.aten._unsafe_view.default


# How many dispatch modes are on. Where it is missing the answer is one: right, and slower.
dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def factors(node: Any) -> list[Tensor]:
    """Return the tensors that a node multiplied or divided. Replaced by []: a scaler's losses pass unseen."""
    found = [getattr(node, name, None) for name in ("_saved_self", "_saved_other")]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def scale_of(scaler: torch.amp.GradScaler) -> Tensor | None:
    """Return a GradScaler's tensor of its scale. Replaced by None, as above."""
    return getattr(scaler, "_scale", None)


def schema(op: OpOverload) -> Any:
    """Return an op's schema, with `arguments` and `returns`. Replaced by the string that the op was defined by."""
    return op._schema


def let_compiler_dispatch_rms_norm() -> None:
    """Let compiled code hand F.rms_norm on to subclasses of Tensor, as other norms are.

    PyTorch 2.9 traces into it and fails; PyTorch 2.13 needs nothing.
    """
    if _BEFORE_2_13:
        torch.compiler.allow_in_graph(F.rms_norm)


def forget_changes(tensors: Sequence[Tensor]) -> None:
    """Let compiled backwards of PyTorch 2.9 find tensors unchanged that were written to since the forward.

    Those of PyTorch 2.13 do not look at the versions of what they write to themselves.
    """
    if _BEFORE_2_13:
        torch._C._autograd._unsafe_set_version_counter(tuple(tensors), (0,) * len(tensors))


def op_of(operation: Any) -> Any:
    """Return the op behind what `torch.library.custom_op` returns, anything else as it is.

    Where the attribute is missing, such functions are looked up as they are and have no rule.
    """
    return getattr(operation, "_opoverload", operation)


def forward_mode_active() -> bool:
    """Whether forward-mode differentiation is on. Replaced by a look for tangents of every argument."""
    return forward_ad._current_level >= 0


def function_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return what `function.apply` comes to after it has looked for transforms of torch.func.

    It takes a third of the time. Replaced by `function.apply`.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def function_of(node: Any) -> Any:
    """Return the `torch.autograd.Function` whose backward a node is. Replaced by None: it then runs in slices."""
    return getattr(node, "_forward_cls", None)


def saved_tensors_are_packed() -> bool:
    """Whether hooks pack saved tensors, as non-reentrant checkpoints and offloading do.

    Replaced by a node that saves a tensor and sees whether it gets the same one back.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has fast products of bfloat16 or float16 on this processor. No, where PyTorch can't say."""
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    check = getattr(torch.ops.mkldnn, names[dtype], None)
    return check is not None and bool(check())


def foreach_div_(tensors: list[Tensor], divisor: float) -> None:
    """Divide all tensors in place, in few calls. Replaced by a loop."""
    torch._foreach_div_(tensors, divisor)


def foreach_lerp_(tensors: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Move all tensors in place towards `ends`, in few calls. Replaced by a loop."""
    torch._foreach_lerp_(tensors, ends, weight)


# ----- Tensors

# Context manager: operations do not see the __torch_function__ of subclasses.
# Replaced by `Tensor.__torch_function__`, called with the function and its arguments.
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass


def make_subclass(cls: type[_Class], data: Tensor, requires_grad: bool = False) -> _Class:
    """Return a leaf of a subclass that shares the memory of `data`. Replaced by `data.as_subclass(cls)`."""
    made: _Class = Tensor._make_subclass(cls, data, requires_grad)
    return made


def is_view(tensor: Tensor) -> bool:
    """Tell whether autograd knows a tensor as a view of another one. Replaced by True: slices then."""
    return tensor._is_view()


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written in place. Replaced by nothing: comparing values costs a pass."""
    return tensor._version


def has_hooks(parameter: Tensor) -> bool:
    """Whether hooks wait for a parameter's gradient. Where PyTorch can't say, nobody is asked: no."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def sparse_values(tensor: Tensor) -> Tensor:
    """Return the stored values of a sparse tensor that may be uncoalesced, without summing duplicates.

    Replaced by `tensor.coalesce().values()`.
    """
    return tensor._values()


# ----- Modules

# The class of all batch normalisations. Replaced by BatchNorm1d, BatchNorm2d, BatchNorm3d and SyncBatchNorm.
BatchNorm = nn.modules.batchnorm._BatchNorm


def data_parallel_processes() -> int:
    """Return how many processes a `DistributedDataParallel` that is running its module has; 0 without one.

    Where PyTorch can't say, there is none.
    """
    running = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    return 0 if running is None else int(running.process_group.size())


def default_store() -> Any:
    """Return the key-value store that the processes met in. Replaced by a store of the package's own."""
    return torch.distributed.distributed_c10d._get_default_store()


def timeout_of(group: Any, device: torch.device) -> Any:
    """Return how long the exchanges of a process group take at most. Replaced by None, PyTorch's own default."""
    return group._get_backend(device).options._timeout


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return what `model.modules()` yields, in its order: that one climbs the whole tree for each of them."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            waiting.extend(reversed(module._modules.values()))
    return list(found)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dictionary that holds a module's own parameters. Replaced by `setattr` and `getattr`."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dictionary that holds a module's own buffers. Replaced by `setattr` and `getattr`."""
    return module._buffers


def refresh_flat_weights(module: nn.RNNBase) -> None:
    """Make a recurrent module use the tensors that its parameters' names stand for now.

    It keeps a list of them beside its parameters. Replaced by nothing: a release without the list needs none.
    """
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def parametrize_cached() -> bool:
    """Whether the caller is inside `torch.nn.utils.parametrize.cached()`. Replaced by a patch of that function."""
    return bool(parametrize._cache_enabled)


# ----- Fully sharded models (FSDP2). What has no underscore here is undocumented all the same.


def fully_sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules that `torch.distributed.fsdp.fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and nothing is sharded without it
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def sharded_groups(model: nn.Module) -> list[Any]:
    """Return FSDP2's groups of parameters that are reduced together. Replaced by nothing."""
    found: dict[int, Any] = {}
    for module in fully_sharded_modules(model):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group is not None:
                found[id(group)] = group
    return list(found.values())


def sharded_compute_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Return the dtypes that a `MixedPrecisionPolicy` lets FSDP2 compute in. Replaced by a look at a parameter."""
    return {group.mp_policy.param_dtype for group in sharded_groups(model)} - {None}


def unsharded_parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Yield every sharded parameter with the leaf that a forward used in its place, after a first forward.

    Replaced by a look at the modules' attributes during a forward.
    """
    for group in sharded_groups(model):
        for parameter in group.fsdp_params:
            if hasattr(parameter, "_unsharded_param"):
                yield parameter.sharded_param, parameter._unsharded_param


def _without_replicas(mesh_info: Any) -> Any:
    """Return FSDP2's description of a mesh as one of shards alone, which are not reduced any further."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

    found = copy.copy(mesh_info)
    found.__class__ = FSDPMeshInfo
    return found


@contextmanager
def sharded_gradients_summed(model: nn.Module, reduce_scatter: Any = None) -> Iterator[None]:
    """Let FSDP2 add gradients up instead of averaging them, those of unused parameters too, as zeros.

    Its public setters, which have no getters, replace it; then a plain backward of the model adds up, too. In
    releases without zeros for unused parameters all ranks have to use the same ones.

    Args:
        model: the model.
        reduce_scatter: what takes the reduce-scatter's place, if anything; see `set_custom_reduce_scatter`.
            Nothing is then reduced between replicas.
    """
    settings: dict[str, Any] = {
        "gradient_divide_factor": 1.0,
        "force_sum_reduction_for_comms": True,
        "reduce_scatter_unused_params": True,
    }
    groups = sharded_groups(model)
    if reduce_scatter is not None:
        settings |= {"_reduce_scatter_comm": reduce_scatter, "mesh_info": None}
    before = [{name: getattr(group, name) for name in settings if hasattr(group, name)} for group in groups]
    for group in groups:
        if reduce_scatter is not None:
            settings["mesh_info"] = _without_replicas(group.mesh_info)
        vars(group).update(settings)
    try:
        yield
    finally:
        for group, values in zip(groups, before, strict=True):
            vars(group).update(values)


# ----- The compiler


def dynamo() -> ModuleType | None:
    """Return torch._dynamo if it was imported: that takes seconds, and nothing is compiled without it."""
    return sys.modules.get("torch._dynamo")


def at_fixed_address(tensor: Tensor) -> Tensor:
    """Let CUDA graphs read and write a tensor where it is; without the mark they work on a copy of an input."""
    loaded = dynamo()
    if loaded is not None:
        loaded.mark_static_address(tensor, guard=False)
    return tensor


def compiled_graphs() -> int:
    """Return how many graphs the compiler has made in this process. Replaced by a check before every step."""
    loaded = sys.modules.get("torch._dynamo.utils")
    return 0 if loaded is None else int(loaded.counters["stats"]["unique_graphs"])


def compiled_modules(model: nn.Module) -> Iterator[str]:
    """Name the modules that `torch.compile` wraps or `nn.Module.compile` compiles; a model itself is ``""``.

    Replaced by the type's name, "OptimizedModule", and nothing for the second.
    """
    loaded = dynamo()
    for name, module in model.named_modules():
        wrapped = loaded is not None and isinstance(module, loaded.OptimizedModule)
        if wrapped or module._compiled_call_impl is not None:
            yield name


# RMS normalisation, and what it multiplied by. Replaced by F.rms_norm, and by its definition for the backward.
fused_rms_norm = torch.ops.aten._fused_rms_norm


__all__ = [
    "AFTER_ADINPLACEORVIEW",
    "AutoDispatchBelowADInplaceOrView",
    "AutoDispatchBelowAutograd",
    "BatchNorm",
    "DisableAutocast",
    "DisableTorchFunctionSubclass",
    "DispatchKeySet",
    "OpOverload",
    "OpOverloadPacket",
    "any_requires_grad",
    "autocast_enabled",
    "compiled_graphs",
    "compiled_modules",
    "data_parallel_processes",
    "default_store",
    "dynamo",
    "enable_single_level_autograd_function",
    "foreach_div_",
    "foreach_lerp_",
    "forward_mode_active",
    "fully_sharded_modules",
    "function_apply",
    "functorch_transforms_active",
    "fused_rms_norm",
    "has_hooks",
    "make_subclass",
    "modules_of",
    "onednn_multiplies",
    "op_of",
    "own_buffers",
    "own_parameters",
    "parametrize_cached",
    "refresh_flat_weights",
    "saved_tensors_are_packed",
    "schema",
    "sharded_compute_dtypes",
    "sharded_gradients_summed",
    "sparse_values",
    "timeout_of",
    "tree_flatten",
    "tree_unflatten",
    "unsafe_view",
    "unsharded_parameters",
    "version",
]
