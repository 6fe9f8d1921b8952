"""What every op says of inputs that it cannot take: a TypeError that names them, what it expected and found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffmtl_fast import ops

K, B = 2, 4


def pair():
    return {"pred": torch.randn(B, 3), "target": torch.randn(B, 3)}


# Of every public op: its inputs by name, all that are tensors or sequences of them.
INPUTS = {
    "add_noise": lambda: {
        "x0": torch.randn(B, 3),
        "noise": torch.randn(B, 3),
        "alpha": torch.rand(B),
        "sigma": torch.rand(B),
    },
    "cluster_conv_wgrad": lambda: {
        "grad_out": torch.randn(B, 2, 5),
        "x": torch.randn(B, 3, 5),
        "offsets": torch.tensor([0, 1, B]),
        "kernel_size": 1,
        "out": torch.empty(K, 2, 3, 1),
    },
    "cluster_mean": lambda: {"values": torch.randn(B), "cluster": torch.zeros(B, dtype=torch.int64), "k": K},
    "cluster_mse": lambda: {
        **pair(),
        "cluster": torch.zeros(B, dtype=torch.int64),
        "k": K,
        "weight": torch.rand(B),
    },
    "cluster_norm_backward": lambda: {
        "grad": torch.randn(B, 4, 3),
        "x": torch.randn(B, 4, 3),
        "mean": torch.randn(B, 2),
        "rstd": torch.rand(B, 2),
        "weight": torch.rand(4),
        "offsets": torch.tensor([0, 1, B]),
        "by_weight": torch.empty(K, 4),
        "by_bias": torch.empty(K, 4),
    },
    "cluster_sum": lambda: {
        "values": torch.randn(B, 3),
        "offsets": torch.tensor([0, 1, B]),
        "out": torch.empty(K, 3),
    },
    "cluster_wgrad": lambda: {
        "grad_out": torch.randn(B, 2),
        "x": torch.randn(B, 3),
        "offsets": torch.tensor([0, 1, B]),
        "out": torch.empty(K, 2, 3),
    },
    "combine": lambda: {"jacobian": torch.randn(K, 3), "weights": torch.rand(K)},
    "combine_": lambda: {
        "out": [torch.empty(3)],
        "jacobian": [torch.randn(K, 3)],
        "weights": torch.rand(K),
    },
    "denoising_loss": lambda: {
        "pred": torch.randn(B, 3),
        "x0": torch.randn(B, 3),
        "noise": torch.randn(B, 3),
        "prediction": "v",
        "alpha": torch.rand(B),
        "sigma": torch.rand(B),
        "weight": torch.rand(B),
    },
    "gram": lambda: {"jacobian": [torch.randn(K, 3), torch.randn(K, 2, 2)]},
    "group_norm_backward": lambda: {
        "grad": torch.randn(B, 4, 3),
        "x": torch.randn(B, 4, 3),
        "mean": torch.randn(B, 2),
        "rstd": torch.rand(B, 2),
        "weight": torch.rand(4),
    },
    "gradvac_weights": lambda: {
        "gramian": torch.eye(K),
        "order": torch.tensor([[1], [0]]),
        "targets": torch.zeros(K, K, dtype=torch.float64),
        "beta": 0.5,
        "present": torch.ones(K, dtype=torch.bool),
    },
    "gramian_weights": lambda: {
        "gramian": torch.eye(K),
        "method": "UPGrad",
        "present": torch.ones(K, dtype=torch.bool),
    },
    "nash_weights": lambda: {"gramian": torch.eye(K), "present": torch.ones(K, dtype=torch.bool)},
    "pcgrad_weights": lambda: {
        "gramian": torch.eye(K),
        "order": torch.tensor([[1], [0]]),
        "present": torch.ones(K, dtype=torch.bool),
    },
    "philox_normal": lambda: {"seed": torch.tensor(1), "like": torch.randn(B, 3)},
    "sample_huber": lambda: {**pair(), "weight": torch.rand(B)},
    "sample_mse": lambda: {**pair(), "weight": torch.rand(B)},
    "uncertainty_loss": lambda: {
        **pair(),
        "cluster": torch.zeros(B, dtype=torch.int64),
        "log_var": torch.zeros(K),
        "weight": torch.rand(B),
    },
}

# By name: what is put in a tensor's place, and what the error must say was found.
WRONG = {
    "list": (lambda t: t.tolist(), "list|float|int|bool"),
    "array": (lambda t: t.numpy(), "ndarray"),
    "number": (lambda t: 3.0, "float"),
    "text": (lambda t: "tensor", "str"),
    "sparse": (lambda t: t.to_sparse(), r"torch\.\w+ with layout torch\.sparse_coo"),
    "complex": (lambda t: t.to(torch.complex64), r"torch\.complex64"),
    "fp8": (lambda t: t.float().to(torch.float8_e4m3fn), r"torch\.float8_e4m3fn"),
}


def wrong_inputs():
    for name, inputs in INPUTS.items():
        for argument, value in inputs().items():
            if isinstance(value, torch.Tensor | list):
                for kind in WRONG:
                    yield name, argument, kind


def test_every_op_has_its_inputs():
    assert set(INPUTS) == set(ops.__all__) - {"PLAIN"}
    for name, inputs in INPUTS.items():
        getattr(ops, name)(**inputs())


@pytest.mark.parametrize(("name", "argument", "kind"), list(wrong_inputs()))
def test_ops_say_what_they_expected_and_found(name, argument, kind):
    inputs = INPUTS[name]()
    make, found = WRONG[kind]
    given = inputs[argument]
    if isinstance(given, torch.Tensor):
        inputs[argument], place = (
            make(given),
            rf"{argument}(\[0\])?",
        )  # what is no tensor is taken for J in parts
    else:
        inputs[argument], place = [*given[:-1], make(given[-1])], rf"{argument}\[{len(given) - 1}\]"
    with pytest.raises(TypeError, match=rf"^{place}: expected .*found ({found})"):
        getattr(ops, name)(**inputs)


@pytest.mark.parametrize(
    ("name", "argument"), [("combine_", "out"), ("combine_", "jacobian"), ("gram", "jacobian")]
)
def test_a_number_is_no_sequence(name, argument):
    inputs = INPUTS[name]() | {argument: 3.0}
    with pytest.raises(TypeError, match=f"^{argument}: expected a sequence of tensors, found float"):
        getattr(ops, name)(**inputs)


def test_a_jacobian_of_numpy_rows_is_refused_by_part():
    with pytest.raises(TypeError, match=r"jacobian\[0\]: expected a floating-point tensor, found ndarray"):
        ops.gram(np.zeros((2, 3)))
