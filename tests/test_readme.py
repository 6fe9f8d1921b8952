"""README's code runs as it is written."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import diffmtl_fast as dm

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    for block in blocks:
        if block.startswith(">>>"):
            examples = doctest.DocTestParser().get_doctest(block, namespace, "README", "README.md", 0)
            assert doctest.DocTestRunner().run(examples).failed == 0
        else:
            exec(compile(block, "README.md", "exec"), namespace)
    assert isinstance(namespace["mtl"].module, namespace["UNet2DModel"])
    assert namespace["model"].conv_in.weight.grad is not None


def test_names_and_links_exist():
    for name in re.findall(r"`(?:dm\.)?(ops\.\w+)", README):
        assert hasattr(dm.ops, name.removeprefix("ops."))
    for name in re.findall(r"\| `(\w+)\(", README):
        assert hasattr(dm, name), name
    for target in re.findall(r"\]\(([^)#][^)]*)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
