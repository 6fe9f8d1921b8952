"""Call every op on the CPU with all shapes, dtypes and strides, good and bad.

    python tests/native/fuzz_ops.py FOLDER [--seconds 60] [--seed 0]

FOLDER holds the extension that takes the place of the installed one. Every call must answer, to the same bits when
it is repeated, or raise an error of Python. Meant for a build with sanitizers, which see what is read or written
outside a tensor; see check.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, 1e38, -1e-40]
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError)


def put_in_place(folder: Path) -> ModuleType:
    """Load the extension in `folder` as the package's own, before the package is imported."""
    spec = importlib.util.spec_from_file_location("diffmtl_fast._C", next(folder.glob("_C*.so")))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["diffmtl_fast._C"] = module
    return module


class Fuzzer:
    def __init__(self, seed: int) -> None:
        from diffmtl_fast import ops
        from diffmtl_fast._native import _C

        self.ops, self.native = ops, _C
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.calls: Counter[str] = Counter()
        self.refused = 0

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def size(self, *largest: int) -> int:
        return self.random.randint(0 if self.chance(0.05) else 1, self.random.choice(largest or (3, 9, 40)))

    def shape(self, *first: int) -> list[int]:
        return [*first, *(self.size(3, 9, 30) for _ in range(self.random.randrange(4)))]

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Numbers at any strides and offset, now and then with one that is not finite or is extreme."""
        dtype = dtype or self.random.choice(DTYPES)
        found = torch.randn(shape, dtype=torch.float64)
        found = found.mul(10.0 ** self.random.choice([0, 0, -20, 15])).to(dtype)
        if found.numel() and self.chance(0.1):
            found.view(-1)[self.random.randrange(found.numel())] = self.random.choice(SPECIAL)
        kind = self.random.randrange(6)
        if kind == 0 and found.dim() > 1:
            found = found.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == 1:
            found = torch.stack([found, found], -1)[..., 1]
        if kind == 2 and found.dim() == 4:
            found = found.contiguous(memory_format=torch.channels_last)
        if kind == 3:
            found = torch.cat([found.new_zeros(1), found.reshape(-1)])[1:].view(shape)
        return found

    def offsets(self, rows: int) -> Tensor:
        """int64 [K + 1]: clusters of `rows` rows, equal or not, some of them empty."""
        k = self.size(3, 9)
        if k and rows % k == 0 and self.chance(0.3):
            return torch.arange(k + 1) * (rows // k)
        inner = sorted(self.random.randint(0, rows) for _ in range(max(k, 1) - 1))
        return torch.tensor([0, *inner, rows])

    def into(self, *shape: int) -> dict[str, Any]:
        """The options `out` and `accumulate`, or none."""
        return {"out": self.tensor(*shape), "accumulate": self.chance(0.5)} if self.chance(0.5) else {}

    def weight(self, count: int) -> dict[str, Any]:
        return {"weight": self.tensor(count)} if self.chance(0.5) else {}

    def jacobian(self, rows: int) -> list[Tensor]:
        return [self.tensor(*self.shape(rows)) for _ in range(self.size(3))]

    def rows(self) -> int:
        """Few or, where the kernels take panels instead, more than they hold at once."""
        return self.size(4, 20, self.native.CPU_MAX_ROWS, 2 * self.native.CPU_MAX_ROWS + 3)

    def gram(self) -> tuple[str, dict[str, Any]]:
        return "gram", {"jacobian": self.jacobian(self.rows())}

    def combine(self) -> tuple[str, dict[str, Any]]:
        rows = self.rows()
        return "combine", {"jacobian": self.jacobian(rows), "weights": self.tensor(rows)}

    def combine_in_place(self) -> tuple[str, dict[str, Any]]:
        rows = self.rows()
        members = self.jacobian(rows)
        out = [self.tensor(*member.shape[1:]) for member in members]
        return "combine_", {"out": out, "jacobian": members, "weights": self.tensor(rows)}

    def pair(self) -> dict[str, Any]:
        shape = self.shape(self.size())
        return {"pred": self.tensor(*shape), "target": self.tensor(*shape)}

    def clusters(self, count: int) -> dict[str, Any]:
        k = self.random.choice([1, 3, 40])
        return {"cluster": torch.randint(k, (count,)), "k": k}

    def sample_mse(self) -> tuple[str, dict[str, Any]]:
        pair = self.pair()
        return self.random.choice(["sample_mse", "sample_huber"]), {**pair, **self.weight(len(pair["pred"]))}

    def denoising_loss(self) -> tuple[str, dict[str, Any]]:
        shape = self.shape(self.size())
        given = {name: self.tensor(*shape) for name in ("pred", "x0", "noise")}
        given |= {name: self.tensor(shape[0]) for name in ("alpha", "sigma")}
        return "denoising_loss", {
            **given,
            "prediction": self.random.choice(["epsilon", "x0", "v", "velocity"]),
            **self.weight(shape[0]),
        }

    def cluster_mse(self) -> tuple[str, dict[str, Any]]:
        pair = self.pair()
        count = len(pair["pred"])
        return "cluster_mse", {**pair, **self.clusters(count), **self.weight(count)}

    def cluster_mean(self) -> tuple[str, dict[str, Any]]:
        count = self.size()
        return "cluster_mean", {"values": self.tensor(count), **self.clusters(count)}

    def uncertainty_loss(self) -> tuple[str, dict[str, Any]]:
        pair = self.pair()
        count = len(pair["pred"])
        clusters = self.clusters(count)
        log_var = self.tensor(clusters.pop("k"))
        return "uncertainty_loss", {**pair, **clusters, "log_var": log_var, **self.weight(count)}

    def add_noise(self) -> tuple[str, dict[str, Any]]:
        shape = self.shape(self.size())
        noise = self.tensor(*shape) if self.chance(0.5) else torch.tensor(self.random.getrandbits(60))
        return "add_noise", {
            "x0": self.tensor(*shape),
            "noise": noise,
            "alpha": self.tensor(shape[0]),
            "sigma": self.tensor(shape[0]),
        }

    def philox_normal(self) -> tuple[str, dict[str, Any]]:
        seed = torch.tensor(self.random.getrandbits(60))
        return "philox_normal", {"seed": seed, "like": self.tensor(*self.shape(self.size()))}

    def cluster_wgrad(self) -> tuple[str, dict[str, Any]]:
        rows, outputs, inputs = self.size(3, 9, 150), self.size(), self.size()
        offsets, dtype = self.offsets(rows), self.random.choice(DTYPES)
        given = {
            "grad_out": self.tensor(rows, outputs, dtype=dtype),
            "x": self.tensor(rows, inputs, dtype=dtype),
            "offsets": offsets,
        }
        return "cluster_wgrad", {**given, **self.into(len(offsets) - 1, outputs, inputs)}

    def cluster_sum(self) -> tuple[str, dict[str, Any]]:
        rows, width = self.size(3, 9, 150), self.size()
        offsets = self.offsets(rows)
        given = {"values": self.tensor(rows, width), "offsets": offsets}
        return "cluster_sum", {**given, **self.into(len(offsets) - 1, width)}

    def cluster_conv_wgrad(self) -> tuple[str, dict[str, Any]]:
        axes, groups, dtype = (
            self.random.choice([1, 2, 2, 3]),
            self.random.choice([1, 1, 2]),
            self.random.choice(DTYPES),
        )
        samples, inputs, outputs = self.size(3, 12), groups * self.size(3, 9), groups * self.size(3, 9)
        kernel = [self.random.randint(1, 4) for _ in range(axes)]
        stride = [self.random.randint(1, 3) for _ in range(axes)]
        padding = [self.random.randint(0, 2) for _ in range(axes)]
        dilation = [self.random.randint(1, 2) for _ in range(axes)]
        image = [self.random.randint(d * (k - 1) + 1, 12) for k, d in zip(kernel, dilation, strict=True)]
        reached = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(image, kernel, stride, padding, dilation, strict=True)
        ]
        offsets = self.offsets(samples)
        given = {
            "grad_out": self.tensor(samples, outputs, *reached, dtype=dtype),
            "x": self.tensor(samples, inputs, *image, dtype=dtype),
            "offsets": offsets,
            "kernel_size": kernel,
        }
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        out = self.into(len(offsets) - 1, outputs, inputs // groups, *kernel)
        return "cluster_conv_wgrad", {**given, **options, **out}

    def group_norm_backward(self) -> tuple[str, dict[str, Any]]:
        samples, groups = self.size(), self.random.choice([1, 2, 8])
        channels, dtype = groups * self.size(3, 9), self.random.choice(DTYPES)
        shape = self.shape(samples, channels)
        return "group_norm_backward", {
            "grad": self.tensor(*shape, dtype=dtype),
            "x": self.tensor(*shape, dtype=dtype),
            "mean": self.tensor(samples, groups),
            "rstd": self.tensor(samples, groups),
            **self.weight(channels),
        }

    def cluster_norm_backward(self) -> tuple[str, dict[str, Any]]:
        _, given = self.group_norm_backward()
        if self.chance(0.5):  # over rows
            rows, width, dtype = self.size(3, 9, 150), self.size(3, 40, 1500), self.random.choice(DTYPES)
            given = {name: self.tensor(rows, width, dtype=dtype) for name in ("grad", "x")}
            given |= {name: self.tensor(rows, 1) for name in ("mean", "rstd")} | self.weight(width)
        samples, channels = given["x"].shape[:2]
        offsets = self.offsets(samples)
        sums = {name: self.tensor(len(offsets) - 1, channels) for name in ("by_weight", "by_bias")}
        kept = {name: out for name, out in sums.items() if self.chance(0.7)}
        given = {"weight": None, **given, "offsets": offsets, **kept}
        if self.chance(0.3):
            given["mean"] = None
        accumulate = (self.chance(0.5), self.chance(0.5))
        return "cluster_norm_backward", {**given, "accumulate": accumulate}

    def gramian(self) -> tuple[Tensor, dict[str, Any]]:
        k, dtype = self.size(3, 20, 70), self.random.choice(DTYPES[:2])
        rows = self.tensor(k, k + self.size(), dtype=dtype)
        present = {"present": torch.rand(k) < 0.8} if self.chance(0.5) else {}
        return (rows @ rows.T if self.chance(0.8) else self.tensor(k, k, dtype=dtype)), present

    def nash(self) -> tuple[str, dict[str, Any]]:
        gramian, present = self.gramian()
        return "nash_weights", {"gramian": gramian, **present}

    def pcgrad(self) -> tuple[str, dict[str, Any]]:
        gramian, present = self.gramian()
        k = len(gramian)
        others = [self.random.sample([j for j in range(k) if j != i], max(k - 1, 0)) for i in range(k)]
        order = torch.tensor(others, dtype=torch.int64).view(k, max(k - 1, 0))
        return "pcgrad_weights", {"gramian": gramian, "order": order, **present}

    def gradvac(self) -> tuple[str, dict[str, Any]]:
        _, given = self.pcgrad()
        k = len(given["gramian"])
        return "gradvac_weights", {**given, "targets": 0.9 * torch.rand(k, k).double(), "beta": 0.5}

    def gramian_weights(self) -> tuple[str, dict[str, Any]]:
        gramian, present = self.gramian()
        settings = {"MGDA": [], "DualProj": [], "UPGrad": [], "IMTLG": [], "AlignedMTL": [], "CAGrad": [0.5],
                    "FairGrad": [2.0], "DBMTL": []}  # fmt: skip
        method = self.random.choice(list(settings))
        return "gramian_weights", {
            "gramian": gramian,
            "method": method,
            "settings": settings[method],
            **present,
        }

    def spoil(self, given: dict[str, Any]) -> None:
        """Make one argument wrong: of another size, dtype or type, or with entries out of range."""
        name = self.random.choice(list(given))
        value = given[name]
        if isinstance(value, list) and value and self.chance(0.5):
            given[name] = value[:-1]
        elif isinstance(value, Tensor) and self.chance(0.9):
            whole = value.dtype in (torch.bool, torch.int64)
            given[name] = self.random.choice(
                [value[..., :-1] if value.dim() else value.view(1), value.unsqueeze(-1), value.to(torch.int32),
                 value[:0] if value.dim() else value, value + 1, -1 * value, value.to(torch.complex64),
                 value.to("meta"), torch.full_like(value, 2**40 if whole else 1)]
            )  # fmt: skip
        else:
            given[name] = self.random.choice([None, -1, 2**62, "text", [], 1.5])

    def call(self, name: str, given: dict[str, Any]) -> Any:
        self.calls[name] += 1
        try:
            return getattr(self.ops, name)(**given)
        except REFUSALS:
            self.refused += 1
            return None

    def run(self, seconds: float = math.inf, rounds: float = math.inf) -> None:
        kinds: list[Callable[[], tuple[str, dict[str, Any]]]] = [
            self.gram, self.combine, self.combine_in_place, self.sample_mse, self.denoising_loss, self.cluster_mse,
            self.cluster_mean, self.uncertainty_loss, self.add_noise, self.philox_normal, self.cluster_wgrad,
            self.cluster_sum, self.cluster_conv_wgrad, self.group_norm_backward, self.nash, self.pcgrad,
            self.gradvac, self.gramian_weights, self.cluster_norm_backward,
        ]  # fmt: skip
        end = time.monotonic() + seconds
        done = 0
        while done < rounds and time.monotonic() < end:
            self.native.cpu_select_kernels(self.random.choice(self.native.cpu_kernels()))
            name, given = kinds[done % len(kinds)]()
            spoiled = self.chance(0.2)
            if spoiled:
                self.spoil(given)
            found = self.call(name, given)
            if found is not None and not spoiled and "out" not in given:
                assert_same_bits(found, self.call(name, given), name)
            done += 1
        self.native.cpu_select_kernels(None)


def assert_same_bits(found: Any, again: Any, name: str) -> None:
    pairs = zip(*([each] if isinstance(each, Tensor) else each for each in (found, again)), strict=True)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs), name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    put_in_place(arguments.folder)
    fuzzer = Fuzzer(arguments.seed)
    fuzzer.run(seconds=arguments.seconds)
    print(
        f"{fuzzer.calls.total()} calls of {len(fuzzer.calls)} ops, {fuzzer.refused} of them refused, no finding"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
