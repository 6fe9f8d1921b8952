"""The code of README and of the guide runs as it is written."""

from __future__ import annotations

import doctest
import logging
import re
from pathlib import Path

import pytest

import diffmtl_fast as dm
from diffmtl_fast.gradients.rules import RULES, registry

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "gradients.md").read_text(encoding="utf-8")
WEIGHTS = (ROOT / "docs" / "loss-weighting.md").read_text(encoding="utf-8")


def run_blocks(text: str, name: str, at_least: int = 3) -> dict[str, object]:
    """Run the Python blocks of a document in order; returns their names."""
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= at_least
    namespace: dict[str, object] = {}
    for block in blocks:
        if block.startswith(">>>"):
            examples = doctest.DocTestParser().get_doctest(block, namespace, name, name, 0)
            assert doctest.DocTestRunner().run(examples).failed == 0
        else:
            exec(compile(block, name, "exec"), namespace)
    return namespace


def test_python_blocks_run_in_order():
    namespace = run_blocks(README, "README.md")
    assert isinstance(namespace["mtl"].module, namespace["UNet2DModel"])
    assert namespace["model"].conv_in.weight.grad is not None


def test_blocks_of_the_guide_run_in_order(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "diffmtl_fast")
    monkeypatch.setattr(registry, "RULES", dict(RULES))  # the guide's rules end with it
    namespace = run_blocks(GUIDE, "docs/gradients.md")
    chosen = [message for message in caplog.messages if "engine for" in message]
    assert len(chosen) == 5  # of mtl, lean, half, saving and ruled
    assert all("grouped engine for K = 5" in message for message in chosen)
    assert all("every parameter has a rule" in message for message in chosen)
    for name in ("mtl", "lean", "half", "saving", "ruled"):
        assert namespace[name].last.gramian.shape == (5, 5)
    assert namespace["squared_gain"] in registry.RULES


def test_blocks_of_the_guide_to_loss_weights_run_in_order():
    namespace = run_blocks(WEIGHTS, "docs/loss-weighting.md")
    assert namespace["loss"].isfinite()
    assert namespace["mtl"].last.weights.isfinite().all()


@pytest.mark.parametrize("page", ["fused-ops"])
def test_blocks_of_other_pages_run_in_order(page):
    run_blocks((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), page)


def test_names_and_links_exist():
    for name in re.findall(r"dm\.ops\.(\w+)", README):
        assert hasattr(dm.ops, name)
    for name in re.findall(r"\| `(\w+)\(", README):
        assert hasattr(dm, name), name
    for target in re.findall(r"\]\(([^)#][^)]*)\)", README):
        path, _, anchor = target.partition("#")
        assert target.startswith("https://") or (ROOT / path).exists(), target
        if anchor and not target.startswith("https://"):
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


def test_it_is_short():
    assert len(README.splitlines()) <= 250


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_figures_are_what_the_command_makes_of_the_stored_results():
    from benchmarks.report import Results, machines
    from benchmarks.report.plots import captions
    from benchmarks.report.readme import rewrite

    results = [Results.read(path) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    for file in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
        text = file.read_text(encoding="utf-8")
        names = [machine.name for machine in machines(results)]
        pictures = captions(ROOT / "docs" / "figures", names, file.parent)
        assert rewrite(text, results, pictures) == text, f"{file.name}: run `make figures`"
