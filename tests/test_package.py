"""The package as a whole: what importing it needs, what it says when something is missing."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import diffmtl_fast as dm
from diffmtl_fast import _extras

ROOT = Path(__file__).resolve().parents[1]


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


def test_importing_the_core_takes_nothing_that_torch_does_not():
    # Import time is modules: compilers (Triton, Numba, Inductor) and extras must wait until they are used.
    code = (
        "import sys, torch, numpy\n"
        "before = set(sys.modules)\n"
        "import diffmtl_fast\n"
        "new = set(sys.modules) - before\n"
        "roots = {name.partition('.')[0] for name in new} - set(sys.stdlib_module_names)\n"
        "print(sorted(roots - {'numpy'}), sorted(name for name in new if name.startswith('torch')))"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['diffmtl_fast'] []"


# Of the package's folders: each imports only from lines above its own; those of one line may import each other.
ORDER = (
    {"kernels", "clustering"},
    {"ops"},
    {"weighting", "diffusion", "data"},
    {"gradients", "distributed"},
    {"curriculum", "analysis"},
    {"adapters", "train"},
    {"run"},
    {"study"},
    {"cli"},
)


def test_folders_import_only_what_is_below_them():
    place = {name: level for level, names in enumerate(ORDER) for name in names}
    package = ROOT / "diffmtl_fast"
    # kernels/ is beside the package here, and in it where it is installed.
    assert set(place) == {path.parent.name for path in package.glob("*/__init__.py")} | {"kernels"}
    upward = []
    for path in package.glob("*/**/*.py"):
        *folders, _ = path.relative_to(package).parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level <= len(folders):
                continue  # from within the folder, or from elsewhere
            named = [node.module] if node.module else [alias.name for alias in node.names]
            found = {name.partition(".")[0] for name in named} & set(place) - {folders[0]}
            upward += [f"{path}: {name}" for name in found if place[name] > place[folders[0]]]
    assert not upward


def test_a_missing_extension_names_the_command():
    result = run("import sys; sys.modules['diffmtl_fast._C'] = None; import diffmtl_fast")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "expected the compiled extension diffmtl_fast._C" in last
    assert "`pip install .`" in last


def test_the_citation_names_this_library_and_both_papers():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert found["title"] == project["name"]
    papers = [identifier["value"] for paper in found["references"] for identifier in paper["identifiers"]]
    assert papers == ["arXiv:2306.00354", "arXiv:2403.10348"]


def test_wheels_are_for_the_pythons_that_are_supported():
    found = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(found["project"]["classifiers"]))
    assert found["tool"]["cibuildwheel"]["build"] == [f"cp{name.replace('.', '')}-*" for name in named]
    assert found["project"]["requires-python"] == f">={named[0]},<3.{int(named[-1].split('.')[1]) + 1}"


def test_a_build_without_a_compiler_says_what_is_missing(tmp_path):
    cmake = shutil.which(
        "cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if cmake is None:
        pytest.skip("needs cmake")
    command = [
        cmake,
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path),
        "-G",
        "Unix Makefiles",
        "-DCMAKE_MAKE_PROGRAM=make",
    ]
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "expected a C++17 compiler in CXX or PATH, found none" in " ".join(done.stderr.split())


def test_a_missing_extra_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'diffmtl-fast\[train\]'"):
        _extras.require("matplotlib", "train")
    assert _extras.require("json", "train").dumps({}) == "{}"
