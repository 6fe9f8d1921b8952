"""A device without a GPU: tensors that compute on the CPU, but say of themselves that they are on an accelerator.

The device is called "meta", the only one besides the CPU whose tensors autograd knows without hardware. What a GPU
refuses is refused here, operands on two devices; what makes the host wait for it is noted with the place in the
package that it comes from: reading values, shapes that depend on them, copies from pageable memory.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.optim import adam
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

import diffmtl_fast as dm
from diffmtl_fast import _host
from diffmtl_fast.gradients.grouped import cluster_parameter
from diffmtl_fast.ops import PLAIN, cuda

DEVICE = torch.device("meta")
PACKAGE = Path(dm.__file__).parent
aten = torch.ops.aten

#: Operators whose result, or its shape, depends on values that the host has to see.
READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "histc"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "multinomial", "allclose"),
    # LAPACK's verdict is read on the host, but for the variants called _ex.
    *("_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_cholesky", "linalg_inv", "linalg_lstsq"),
    *("_linalg_check_errors", "linalg_ldl_factor", "linalg_lu_factor", "linalg_matrix_rank"),
}
#: Operators that take indices of the CPU, which they copy.
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Remote(torch.Tensor):
    """A tensor of the accelerator; `values` is the CPU's tensor that it computes with."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )

    def __init__(self, values):
        self.values = values.detach()

    def __repr__(self):
        return f"Remote({self.values})"

    def tolist(self):
        Accelerator.current.note("_local_scalar_dense")
        return self.values.tolist()

    def data_ptr(self):
        return self.values.data_ptr()

    def untyped_storage(self):
        return self.values.untyped_storage()

    def __deepcopy__(self, memo):
        return Remote(self.values.clone()).requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return Accelerator.current.run(op, args, kwargs)  # where the modes are set aside


class _Generators(type):
    own = torch.Generator

    def __instancecheck__(cls, instance):
        return isinstance(instance, cls.own)


class Generator(metaclass=_Generators):
    """Generators of the accelerator draw on the CPU."""

    def __new__(cls, device="cpu"):
        return cls.own("cpu" if torch.device(device) == DEVICE else device)


class Accelerator(TorchDispatchMode):
    """The accelerator at work. `waits` counts what the host waited for, by the function of the package."""

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._kernels = cuda.kernels()
        Accelerator.current = self

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return self.run(op, args, kwargs)

    def run(self, op, args, kwargs):
        kwargs = dict(kwargs or {})
        with self:  # made of other operators, of which each comes here
            out = op.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        name = op.overloadpacket.__name__
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        remote = any(isinstance(tensor, Remote) for tensor in tensors)
        target = kwargs.get("device")
        made_there = DEVICE if target is None and remote else torch.device(target or "cpu")
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        if remote or made_there == DEVICE:
            self._note_waits(name, args, kwargs, tensors, made_there)
        if op.namespace == "diffmtl" and name not in self._kernels:
            with self:
                return PLAIN[name](*args, **kwargs)
        out = op(*tree_map(_values, args), **tree_map(_values, kwargs))
        if made_there != DEVICE or name == "_local_scalar_dense":
            return out
        wrapped = tree_map(lambda leaf: Remote(leaf) if isinstance(leaf, torch.Tensor) else leaf, out)
        if not remote:
            return wrapped
        return return_and_correct_aliasing(op, args, kwargs, wrapped)

    def _note_waits(self, name, args, kwargs, tensors, made_there):
        host = [t for t in tensors if not isinstance(t, Remote)]
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            there = isinstance(args[0], Remote) if name == "copy_" else made_there == DEVICE
            asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if there and not isinstance(source, Remote):
                if not (asynchronous and getattr(source, "pinned", False)):
                    self.note("copy from pageable memory")
            elif isinstance(source, Remote) and not there:
                self.note("copy to the host")
            return
        if name in INDEXES:
            if any(t.dtype in (torch.bool, torch.uint8) for t in _indices(args)):
                self.note(f"{name} by a mask")
            if any(not isinstance(t, Remote) for t in _indices(args)):
                self.note(f"{name} by indices of the host")
            return
        if name in READS or (name == "repeat_interleave" and "output_size" not in kwargs):
            self.note(name)
        mixed = [t for t in host if t.dim() > 0 and not _is_offsets(name, t)]
        if mixed:
            found = [f"{list(t.shape)} on {t.device}" for t in tensors]
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {found}")

    def note(self, what):
        frame, inner = sys._getframe(2), None
        while frame is not None:
            path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
            if path.is_relative_to(PACKAGE) and not name.startswith("<"):
                inner = f"{path.relative_to(PACKAGE)} {name}"
                break
            frame = frame.f_back
        self.waits[f"{inner or 'outside'}: {what}"] += 1


def _indices(args):
    return [t for t in args[1] if t is not None]


def _is_offsets(name, tensor):
    """Offsets may be the host's; the launchers take care of them."""
    return name.startswith("cluster_") and tensor.dtype == torch.int64 and tensor.dim() == 1


def _values(leaf):
    return leaf.values if isinstance(leaf, Remote) else leaf


@contextmanager
def accelerator(monkeypatch):
    """Run what is inside with the accelerator at hand; yields its `waits`."""

    def pin_memory(self):
        pinned = self.clone()
        pinned.pinned = True
        return pinned

    def make_subclass(cls, data, requires_grad):
        settings = {"dtype": data.dtype, "device": data.device, "requires_grad": requires_grad}
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, strides=data.stride(), **settings)

    def through_the_host(make):
        """Of data for the device "meta" PyTorch makes a tensor without values."""

        def made(data, dtype=None, device=None, **options):
            if isinstance(data, torch.Tensor):
                return make(data, dtype=dtype, device=device, **options)
            return make(data, dtype=dtype, **options).to(device or "cpu")

        return made

    class Autocast(torch.autocast):
        def __init__(self, device_type, *args, **options):
            super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **options)

    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "pin_memory", pin_memory)
        patched.setattr(torch, "autocast", Autocast)
        for name in ("tensor", "as_tensor"):
            patched.setattr(torch, name, through_the_host(getattr(torch, name)))
        patched.setattr(torch, "Generator", Generator)
        patched.setattr(cluster_parameter, "make_subclass", make_subclass)
        handle = cluster_parameter.ClusterParameter
        patched.setattr(handle, "__torch_dispatch__", Remote.__torch_dispatch__, raising=False)
        patched.setattr(_host, "_PINS", {DEVICE.type})
        patched.setattr(adam, "_device_dtype_check_for_fused", lambda parameter: None)  # knows GPUs by name
        patched.setattr(torch, "is_autocast_enabled", lambda d="cuda": d != DEVICE.type and enabled(d))
        patched.setattr(
            torch, "get_autocast_dtype", lambda d: torch.bfloat16 if d == DEVICE.type else dtype(d)
        )
        with Accelerator() as mode:
            yield mode.waits
