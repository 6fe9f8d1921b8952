"""The package as a whole: what importing it needs, what it says when something is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import diffmtl_fast as dm
from diffmtl_fast import _extras


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_public_names_exist():
    assert sorted(dm.__all__) == sorted(set(dm.__all__))
    for name in dm.__all__:
        assert getattr(dm, name) is not None


def test_the_core_imports_without_the_extras():
    blocked = (
        "diffusers, matplotlib, sklearn, scipy, yaml, rich, jsonargparse, tensorboard, safetensors, cvxpy"
    )
    code = (
        "import sys\n"
        f"for name in '{blocked}'.split(', '): sys.modules[name] = None\n"
        "import diffmtl_fast as dm\n"
        "print(dm.cluster_timesteps(10, 2).boundaries.tolist(), 'numba' in sys.modules, 'triton' in sys.modules)"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[0, 5, 10] False False"


def test_a_missing_extension_names_the_command():
    result = run("import sys; sys.modules['diffmtl_fast._C'] = None; import diffmtl_fast")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "expected the compiled extension diffmtl_fast._C" in last
    assert "`pip install .`" in last


def test_a_missing_extra_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'diffmtl-fast\[train\]'"):
        _extras.require("matplotlib", "train")
    assert _extras.require("json", "train").dumps({}) == "{}"
