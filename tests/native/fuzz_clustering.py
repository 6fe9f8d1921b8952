"""Call the compiled clustering functions with all kinds of arguments, good and bad.

    python tests/native/fuzz_clustering.py FOLDER [--seconds 60] [--seed 0]

FOLDER holds the extension. Every call must return valid boundaries or raise ValueError or TypeError; valid calls
are repeated with every solver, whose costs must agree. Meant for a build with sanitizers; see check.py.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import math
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

EXTREMES = [0, -1, 1, 2, 2**31, 2**63 - 1, -(2**63)]
SPECIAL = [np.nan, np.inf, -np.inf, 1.7e308, -1.7e308, 5e-324, -0.0, 1e-300, 2.0**53]
DTYPES = [np.float64, np.float32, np.float16, np.int64, np.int8, np.bool_, np.complex128, object]
CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_double)
)


def load(folder: Path) -> ModuleType:
    path = next(folder.glob("_C*.so"))
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fuzzer:
    def __init__(self, module: ModuleType, seed: int) -> None:
        self.module = module
        self.random = np.random.default_rng(seed)
        self.calls = self.refused = 0

    def chance(self, p: float) -> bool:
        return bool(self.random.random() < p)

    def pick(self, options: Any) -> Any:
        return options[int(self.random.integers(len(options)))]

    def sequence(self) -> np.ndarray:
        n = int(self.random.integers(0, self.pick([3, 12, 70, 300])))
        values = self.pick(
            [
                lambda: self.random.normal(size=n) * 10.0 ** self.random.integers(-300, 300),
                lambda: self.random.integers(-3, 4, n).astype(float),
                lambda: np.full(n, self.random.normal()),
                lambda: np.arange(n) * 0.1 + self.pick([0.0, 1e15, -1e300]),
                lambda: self.random.normal(size=n) ** 15,
                lambda: self.random.choice(SPECIAL, n),
                lambda: np.repeat(np.arange((n + 1) // 2) * 10.0, 2)[:n] + np.arange(n) % 2,
            ]
        )()
        if not self.chance(0.05):
            values = np.sort(values)
        return values[::-1].copy() if self.chance(0.3) else values

    def matrix(self) -> np.ndarray:
        n = int(self.random.integers(0, self.pick([3, 12, 90])))
        values = self.random.normal(size=(n, n)) * self.pick([1.0, 1e-300, 1e300, 0.0])
        if self.chance(0.1) and n:
            values[self.random.integers(n), self.random.integers(n)] = self.pick(SPECIAL)
        return values

    def disguise(self, array: np.ndarray) -> Any:
        """Odd strides, dtypes and shapes: accepted or refused, never misread."""
        if self.chance(0.8):
            return array
        return self.pick(
            [
                lambda: np.repeat(array, 2, axis=0)[::2],
                lambda: array[::-1],
                lambda: np.asfortranarray(array),
                lambda: array[..., None],
                lambda: array.astype(array.dtype.newbyteorder()),
                lambda: np.lib.stride_tricks.as_strided(array, array.shape, (0,) * array.ndim),
                lambda: np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:].view(array.dtype),
                lambda: array.tolist(),
                lambda: self.cast(array),
                lambda: None,
            ]
        )()

    def cast(self, array: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return array.astype(self.pick(DTYPES))

    def request(self, n: int) -> list[Any]:
        """first_k, last_k, min_size, max_size, solver, threads."""
        n = max(n, 1)
        k = int(self.random.integers(1, min(n, self.pick([3, 20, 20, 20, n + 1])) + 1))
        last = k if self.chance(0.7) else min(n, k + int(self.random.integers(4)))
        low = 1 if self.chance(0.5) else int(self.random.integers(1, n // last + 1))
        high = n if self.chance(0.5) else int(self.random.integers(-(-n // k), n + 1))
        request = [
            k,
            last,
            low,
            high,
            self.pick(["auto", "divide", "penalised", "dense"]),
            self.pick([1, 2, 5]),
        ]
        if self.chance(0.1):
            request[int(self.random.integers(4))] = self.pick(EXTREMES)
        if self.chance(0.03):
            request[5] = self.pick([0, -1, 1025, 2**40])
        if self.chance(0.02):
            request[4] = self.pick(["", "fast", "dense\0"])
        return request

    def call(self, function: Any, *arguments: Any) -> Any:
        self.calls += 1
        try:
            return function(*arguments)
        except (ValueError, TypeError):
            self.refused += 1
            return None

    def check(self, solutions: Any, n: int, request: list[Any], forbidden: bool = False) -> None:
        first, last, low, high = request[:4]
        assert len(solutions) == last - first + 1
        for k, (boundaries, cost) in zip(range(first, last + 1), solutions, strict=True):
            if forbidden and not len(boundaries):
                continue
            sizes = np.diff(boundaries)
            assert boundaries[0] == 0
            assert boundaries[-1] == n
            assert len(sizes) == k
            assert sizes.min() >= low
            assert sizes.max() <= high
            assert not np.isnan(cost)

    def values(self) -> None:
        x = self.sequence()
        given = self.disguise(x)
        request = self.request(len(x))
        function = self.pick([self.module.cluster_absolute, self.module.cluster_squared])
        found = self.call(function, given, *request, "x")
        if found is None or given is not x:
            return
        self.check(found, len(x), request)
        squared = function is self.module.cluster_squared
        scale = np.finfo(float).eps * len(x) * float(np.ptp(x)) ** (2 if squared else 1)
        for solver in ("divide", "penalised", "dense"):
            other = self.call(function, x, *request[:4], solver, request[5], "x")
            self.check(other, len(x), request)
            for (_, a), (_, b) in zip(found, other, strict=True):
                assert a == b or abs(a - b) <= 1e-12 * abs(a) + scale, (a, b, request)

    def affinity(self) -> None:
        matrix = self.matrix()
        if self.chance(0.4):
            with np.errstate(over="ignore", under="ignore"):
                matrix = matrix.astype(np.float32)
        given = self.disguise(matrix)
        request = self.request(len(matrix))
        found = self.call(self.module.cluster_affinity, given, *request)
        if found is not None and given is matrix:
            self.check(found, len(matrix), request)

    def user_matrix(self) -> None:
        matrix = self.matrix()
        given = self.disguise(matrix)
        request = self.request(len(matrix))
        found = self.call(self.module.cluster_matrix, given, *request, self.chance(0.4))
        if found is not None and given is matrix:
            self.check(found, len(matrix), request, forbidden=True)

    def callback(self) -> None:
        n = int(self.random.integers(0, 40))
        fails = int(self.random.integers(1, 60))

        def rows(r: int, first: int, last: int, out: Any) -> int:
            for l in range(first, last + 1):
                if (l * 31 + r) % 60 == fails:
                    return l + 1
                out[l - first] = float((l * r) % 7 + (r - l) ** 2)
            return 0

        function = CALLBACK(rows)
        address = ctypes.cast(function, ctypes.c_void_p).value
        request = self.request(n)
        found = self.call(self.module.cluster_callback, address, n, *request, self.chance(0.4))
        if found is not None:
            self.check(found, n, request)

    def run(self, seconds: float = math.inf, rounds: float = math.inf) -> None:
        kinds = [self.values, self.values, self.affinity, self.user_matrix, self.callback]
        end = time.monotonic() + seconds
        done = 0
        while done < rounds and time.monotonic() < end:
            self.pick(kinds)()
            done += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    fuzzer = Fuzzer(load(arguments.folder), arguments.seed)
    fuzzer.run(seconds=arguments.seconds)
    print(f"{fuzzer.calls} calls, {fuzzer.refused} of them refused, no finding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
