"""Shared by all tests: the device they run on, and memory that is never zero by luck.

``DIFFMTL_TEST_DEVICE`` is ``cpu``, ``cuda``, or ``interpreter``: tensors of the CPU that go through the library as
those of a GPU do, to the launchers of the Triton kernels, which Triton's interpreter runs.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("DIFFMTL_TEST_DEVICE", "cpu")
if DEVICE in ("cpu", "interpreter"):  # before the first import of triton
    os.environ["TRITON_INTERPRET"] = "1"
_ALLOCATORS = {torch: ("empty", "empty_like", "empty_strided"), torch.Tensor: ("new_empty",)}


def _take_the_cpu_for_a_gpu():
    """Run the GPU's launchers on CPU tensors, which the host may not read in a step."""
    from diffmtl_fast import _host
    from diffmtl_fast.ops import _library, cuda

    _library.register_kernels("CPU", cuda.kernels())
    _library._CPU.clear()  # no way past the dispatcher
    _host._READABLE.clear()


if DEVICE == "interpreter":
    _take_the_cpu_for_a_gpu()


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.numel() else tensor

    return wrapper


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch, request):
    """Fill uninitialised memory with NaN, so that an element left unwritten fails its test."""
    if "compile" in request.keywords:  # a compiler traces the allocators themselves
        return
    for owner, names in _ALLOCATORS.items():
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=DEVICE == "interpreter")
def products_of_bfloat16(monkeypatch):
    """Widen bfloat16 operands of a product for Triton's interpreter, which takes their bits for integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def widening(self, a, b, *args):
        return create_dot(self, widened(a), widened(b), *args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widening)


@pytest.fixture
def device() -> torch.device:
    """The device under test: DIFFMTL_TEST_DEVICE, by default the CPU."""
    return torch.device("cpu" if DEVICE == "interpreter" else DEVICE)


@pytest.fixture
def generator(device) -> torch.Generator:
    """A freshly seeded generator on the device under test."""
    return torch.Generator(device).manual_seed(0)
