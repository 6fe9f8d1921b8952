"""Input checks shared by the ops; all of them free of host synchronisation on accelerators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

# The dtypes that ops take numbers in.
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FLOATING = frozenset(FLOATING)
_STRIDED = torch.strided
_SUPPORTED = "float32, float64, bfloat16 or float16"

_Value = TypeVar("_Value")


class ByDtype(dict[torch.dtype, _Value]):
    """What kernels know a dtype by; a TypeError for others, which no op's public function lets through."""

    def __missing__(self, dtype: torch.dtype) -> NoReturn:
        raise TypeError(f"expected {_SUPPORTED}, found {dtype}")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that sums are formed in: the promoted dtype, and float32 at least."""
    sums = torch.float32
    for dtype in {tensor.dtype for tensor in tensors}:
        if dtype != sums:
            sums = torch.promote_types(sums, dtype)
    return sums


def _found(value: Any) -> str:
    """Say what stands where a dense tensor was expected."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    layout = "" if value.layout is _STRIDED else f" with layout {value.layout}"
    return f"{value.dtype}{layout}"


def _refuse_floating(name: str, value: Any) -> NoReturn:
    raise TypeError(
        f"{name}: expected a floating-point tensor, found {_found(value)}; supported are dense tensors of "
        f"{_SUPPORTED}"
    )


# Small ops spend much of their time in checks: these call nothing where there is nothing to refuse.
def check_floating(**tensors: Tensor) -> None:
    """Refuse all but dense tensors of a dtype that ops take numbers in."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATING or tensor.layout is not _STRIDED:
            _refuse_floating(name, tensor)


def check_each_floating(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Refuse what is no sequence of tensors as `check_floating` wants them; return it as a list."""
    if not isinstance(tensors, Iterable):
        raise TypeError(f"{name}: expected a sequence of tensors, found {_found(tensors)}")
    members = list(tensors)
    for i, tensor in enumerate(members):  # there may be hundreds
        if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATING or tensor.layout is not _STRIDED:
            _refuse_floating(f"{name}[{i}]", tensor)
    return members


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuse all but a dense tensor, of any dtype."""
    if not isinstance(tensor, Tensor) or tensor.layout is not _STRIDED:
        raise TypeError(f"{name}: expected a dense tensor, found {_found(tensor)}")


def check_same_device(**tensors: Tensor) -> None:
    """Refuse tensors that live on different devices."""
    devices = [tensor.device for tensor in tensors.values()]
    if devices.count(devices[0]) < len(devices):
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"expected all tensors on one device, found {found}")


def check_jacobian(jacobian: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Refuse what is not J, [K, P] or one [K, ...] per parameter on one device; return it as a list."""
    if isinstance(jacobian, Tensor):
        check_floating(jacobian=jacobian)
        if jacobian.dim() != 2:
            raise ValueError(f"jacobian: expected shape [K, P], found {list(jacobian.shape)}")
        return [jacobian]
    return check_parts(jacobian)


def check_parts(jacobian: Sequence[Tensor]) -> list[Tensor]:
    """Refuse what is not J in parts, one [K, ...] per parameter on one device; return it as a list."""
    members = check_each_floating("jacobian", jacobian)
    if not members:
        raise ValueError("jacobian: expected at least one tensor, found an empty sequence")
    if members[0].dim() == 0:
        raise ValueError("jacobian[0]: expected shape [K, ...], found []")
    k, device = members[0].shape[0], members[0].device
    for i, member in enumerate(members):  # there may be hundreds: few calls for each
        shape = member.shape
        if not shape or shape[0] != k:
            raise ValueError(
                f"jacobian[{i}]: expected shape [{k}, ...] as the first one, found {list(shape)}"
            )
        if member.device != device:
            raise ValueError(f"jacobian[{i}]: expected a tensor on {device}, found one on {member.device}")
    return members


def check_weights(weights: Tensor, jacobian: Sequence[Tensor]) -> None:
    """Refuse weights that are not floating-point [K] beside the rows of J."""
    check_floating(weights=weights)
    check_same_device(jacobian=jacobian[0], weights=weights)
    if weights.shape != jacobian[0].shape[:1]:
        raise ValueError(
            f"weights: expected shape {list(jacobian[0].shape[:1])}, one for each row of the jacobian, "
            f"found {list(weights.shape)}"
        )


def check_pair(pred: Tensor, target: Tensor, name: str = "target") -> None:
    """Refuse prediction and target, or what the argument is called, that do not match sample for sample."""
    check_floating(pred=pred)
    check_floating(**{name: target})
    if pred.device != target.device:
        check_same_device(**{"pred": pred, name: target})
    if pred.shape != target.shape:
        raise ValueError(
            f"expected pred and {name} of one shape, found {list(pred.shape)} and {list(target.shape)}"
        )
    if pred.dim() == 0:
        raise ValueError("pred: expected [B, ...], found a 0-dimensional tensor")
    if pred.shape[0] > 0 and pred.numel() == 0:
        raise ValueError(f"pred: expected at least one element per sample, found {list(pred.shape)}")


def check_weight(weight: Tensor | None, pred: Tensor) -> None:
    """Refuse per-sample weights that are not a floating-point constant [B] beside `pred`."""
    if weight is None:
        return
    check_floating(weight=weight)
    check_same_device(pred=pred, weight=weight)
    if weight.shape != pred.shape[:1]:
        raise ValueError(f"weight: expected shape {list(pred.shape[:1])}, found {list(weight.shape)}")
    if weight.requires_grad:
        raise ValueError("weight: expected a constant, found a tensor that requires a gradient")


def check_cluster(cluster: Tensor, k: int, values: Tensor) -> None:
    """Refuse cluster indices that are not int64 [B] beside the values of B samples.

    On the CPU the op itself refuses those outside 0..k-1.
    """
    if k < 1:
        raise ValueError(f"k: expected at least one cluster, found {k}")
    check_dense("cluster", cluster)
    if cluster.dtype != torch.int64:
        raise TypeError(f"cluster: expected int64 indices, found {cluster.dtype}")
    if cluster.device != values.device:
        raise ValueError(f"cluster: expected it on {values.device}, found {cluster.device}")
    if cluster.shape != values.shape[:1]:
        raise ValueError(f"cluster: expected shape {list(values.shape[:1])}, found {list(cluster.shape)}")


def check_square(name: str, matrix: Tensor) -> None:
    """Refuse anything but a floating-point [K, K] matrix with K >= 1."""
    check_floating(**{name: matrix})
    shape = matrix.shape
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"{name}: expected shape [K, K] with K >= 1, found {list(shape)}")


def check_present(present: Tensor, k: int) -> None:
    """Refuse anything but a bool mask [K]."""
    _check_exact("present", present, torch.bool, (k,), "a bool mask")


def check_order(order: Tensor, k: int) -> None:
    """Refuse anything but int64 [K, K - 1]."""
    _check_exact("order", order, torch.int64, (k, k - 1), "int64")


def check_targets(targets: Tensor, k: int) -> None:
    """Refuse anything but float64 [K, K]."""
    _check_exact("targets", targets, torch.float64, (k, k), "float64")


def _check_exact(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], what: str) -> None:
    check_dense(name, tensor)
    if tensor.dtype != dtype or tensor.shape != shape:
        error = TypeError if tensor.dtype != dtype else ValueError
        found = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise error(f"{name}: expected {what} of shape {list(shape)}, found {found}")


def check_offsets(offsets: Tensor, rows: Tensor) -> None:
    """Refuse offsets that are not int64 [K + 1] with K >= 1, on the CPU or beside the `rows` they divide."""
    if not isinstance(offsets, Tensor) or offsets.layout is not _STRIDED:
        check_dense("offsets", offsets)
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets: expected int64, found {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets: expected shape [K + 1] with K >= 1, found {list(offsets.shape)}")
    if not offsets.is_cpu and offsets.device != rows.device:
        raise ValueError(f"offsets: expected them on the CPU or on {rows.device}, found {offsets.device}")


def host_offsets(offsets: Tensor, num_rows: int) -> list[int]:
    """Read offsets, and refuse them if they do not divide `num_rows` rows into ranges."""
    bounds: list[int] = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != num_rows or bounds != sorted(bounds):
        raise ValueError(f"offsets: expected nondecreasing 0 … {num_rows}, found {bounds}")
    return bounds


def check_out(out: Tensor, shape: tuple[int, ...], name: str = "out", /, **inputs: Tensor) -> None:
    """Refuse an `out` that results of `shape` cannot be written to, or that a gradient would have to pass."""
    check_floating(**{name: out})
    check_same_device(**{name: out}, **inputs)
    if out.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, found {list(out.shape)}")
    strides = out.stride()
    if 0 in strides and any(
        size > 1 and stride == 0 for size, stride in zip(out.shape, strides, strict=True)
    ):
        raise ValueError(f"{name}: expected memory of its own for each element, found strides {strides}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out, *inputs.values())):
        found = ", ".join(given for given, t in {name: out, **inputs}.items() if t.requires_grad)
        raise RuntimeError(
            f"{name}: expected constants, or torch.no_grad(); found a gradient required by {found}"
        )
