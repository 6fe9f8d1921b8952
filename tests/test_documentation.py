"""The code of the documentation runs as it is written, its commands exist, and its pages are in the site."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import diffmtl_fast as dm
from diffmtl_fast import cli
from diffmtl_fast.train import config
from tests.test_readme import ROOT, run_blocks

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *DOCS.rglob("*.md")))
# Pages that a test of their own runs, with what their code needs.
ELSEWHERE = {"README.md", "docs/gradients.md", "docs/loss-weighting.md", "docs/distributed.md"}
WITH_CODE = [
    page
    for page in PAGES
    if page not in ELSEWHERE and "```python" in (ROOT / page).read_text(encoding="utf-8")
]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", WITH_CODE)
def test_blocks_run_in_order(page):
    torch.manual_seed(0)
    namespace = run_blocks((ROOT / page).read_text(encoding="utf-8"), page, at_least=1)
    wrapped = [value for value in namespace.values() if isinstance(value, dm.ClusteredMTL) and value.last]
    assert all(mtl.last.weights.isfinite().all() for mtl in wrapped)


def test_the_quickstart_trains():
    namespace = run_blocks((DOCS / "quickstart.md").read_text(encoding="utf-8"), "quickstart", at_least=3)
    assert namespace["mtl"].num_clusters == 5
    assert 0 <= namespace["loss"].mean() < 2  # of a denoiser that has learned nothing it is 1


def test_the_configuration_and_the_data_of_the_guide_go_together(monkeypatch, tmp_path):
    page = "docs/how-to/own-data.md"
    (code,), (text,) = blocks(page, "python"), blocks(page, "yaml")
    (tmp_path / "mydata.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = config.from_dict(yaml.safe_load(text))
    module, _, name = found.data.path.rpartition(".")
    data = getattr(load(tmp_path / f"{module}.py"), name)(**found.data.args)
    assert data.shape == (1, 8, 8)
    assert data.num_classes == found.model.args["num_class_embeds"]


def commands() -> list[tuple[str, str]]:
    lines = [(page, line) for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    for file in sorted((ROOT / "examples" / "configs").glob("*.yaml")):
        text = file.read_text(encoding="utf-8").replace(" \\\n#", " ")
        found = re.findall(r"^#   (diffmtl-fast .*)$", text, flags=re.MULTILINE)
        assert found, f"{file.name}: expected the commands that run it"
        lines += [(file.name, line) for line in found]
    return [(page, line) for page, line in lines if line.strip()]


def test_commands_exist(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    Path("mine.yaml").write_text(blocks("docs/how-to/own-data.md", "yaml")[0], encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(commands()) > 20
    for page, line in commands():
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, flags=re.MULTILINE), f"{page}: {line}"
        elif program == "diffmtl-fast" and "--help" not in arguments:
            cli._parse(cli._underscored(arguments))
        elif program == "pip":
            for extra in re.findall(r"\[(\w+)\]", line):
                assert extra in project["optional-dependencies"], f"{page}: {line}"
        elif program not in ("diffmtl-fast", "torchrun", "accelerate"):
            assert (ROOT / program).exists(), f"{page}: {line}"


def test_names_of_the_tables_exist():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"`dm\.([\w.]+)", text):
            found = dm
            for part in name.strip(".").split("."):
                found = getattr(found, part)
        if page in ("README.md", "docs/clusters.md", "docs/curricula.md"):
            for name in re.findall(r"^\| `(\w+)\(", text, flags=re.MULTILINE):
                assert hasattr(dm, name), f"{page}: {name}"
    for name in re.findall(
        r"^\| (.*?) \|", (DOCS / "ops.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    ):
        for op in re.findall(r"`(\w+_?)`", name):
            assert hasattr(dm.ops, op), op


MODULES = ("gradients", "weighting", "clustering", "curriculum", "diffusion", "ops", "analysis")


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_has_every_public_name(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = inventory(tmp_path / "objects.inv")
    for module in MODULES:
        for name in importlib.import_module(f"diffmtl_fast.{module}").__all__:
            full = f"diffmtl_fast.{module}.{name}"
            assert {full, f"{full}.{name}"} & found, (
                f"docs/api: {full}"
            )  # a function may have its module's name
    for page in tmp_path.rglob("*.html"):  # nothing of it is loaded from elsewhere
        sources = re.findall(r'(?:src=|<link[^>]* href=)"(https?://[^"]*)"', page.read_text(encoding="utf-8"))
        assert not sources, f"{page.name}: {sources}"


def inventory(file: Path) -> set[str]:
    """The names of an inventory in the format of Sphinx: four lines, then compressed ones."""
    compressed = file.read_bytes().split(b"\n", 4)[4]
    return {line.split()[0] for line in zlib.decompress(compressed).decode().splitlines()}


def test_pictures_are_drawn(tmp_path):
    pictures = load(DOCS / "pictures.py")
    pictures.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in (DOCS / "images").glob("*.svg")
    }


def test_every_page_is_in_the_site():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w./-]+\.md", text.partition("\nnav:")[2]))
    generated = {"changelog.md", "contributing.md"}
    assert listed - generated == {page.removeprefix("docs/") for page in PAGES} - {"README.md"}
