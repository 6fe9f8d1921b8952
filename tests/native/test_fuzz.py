"""Short runs of the fuzzers on the installed extension; `make check-native` runs them longer, under sanitizers."""

import importlib.util
from pathlib import Path

import pytest

from diffmtl_fast import ops
from diffmtl_fast._native import _C


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_call_returns_valid_boundaries_or_refuses(seed):
    fuzzer = load("fuzz_clustering").Fuzzer(_C, seed)
    fuzzer.run(rounds=400)
    assert 0 < fuzzer.refused < fuzzer.calls


def test_every_op_answers_to_the_same_bits_or_refuses():
    fuzzer = load("fuzz_ops").Fuzzer(1)
    fuzzer.run(rounds=320)
    assert set(fuzzer.calls) == set(ops.__all__) - {"PLAIN"}
    assert 0 < fuzzer.refused < fuzzer.calls.total() / 3
