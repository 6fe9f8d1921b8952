"""A short run of the fuzzer on the installed extension; `make check-native` runs it longer, under sanitizers."""

import importlib.util
from pathlib import Path

import pytest

from diffmtl_fast._native import _C

_spec = importlib.util.spec_from_file_location(
    "fuzz_clustering", Path(__file__).with_name("fuzz_clustering.py")
)
fuzz_clustering = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz_clustering)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_call_returns_valid_boundaries_or_refuses(seed):
    fuzzer = fuzz_clustering.Fuzzer(_C, seed)
    fuzzer.run(rounds=400)
    assert 0 < fuzzer.refused < fuzzer.calls
