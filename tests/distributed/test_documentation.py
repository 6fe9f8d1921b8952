"""The example of docs/distributed.md runs as it is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DESTROY = "dist.destroy_process_group()"
CHECKED = f"""
_, own = map(weakref.ref, dist.distributed_c10d._world.pg_map)
{DESTROY}
assert own() is None
"""


def test_the_example_runs_under_torchrun(tmp_path):
    block, *_ = re.findall(
        r"```python\n(.*?)```",
        (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    # Were the wrapper's group kept, its threads would go on until the end, and might abort the process.
    block = f"import weakref\n{block.replace(DESTROY, CHECKED)}"
    assert "assert" in block
    script = tmp_path / "train.py"
    script.write_text(block, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    # Both may write at once, one into the other's line.
    lines = re.findall(r"rank \d: (weights .*? parameters [\d.]+?)(?=rank|\s|$)", done.stdout)
    assert len(lines) == 2, done.stdout
    assert lines[0] == lines[1]
