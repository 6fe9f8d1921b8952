"""``diffmtl-fast evaluate``."""

from __future__ import annotations

import json
from pathlib import Path

from .._number_types import PositiveFloat, Size
from ..run.evaluation import table
from ..run.trained_denoiser import load_run
from ..train.folder import RunFolder
from .output import check_target, writing


def evaluate(
    run_dir: str,
    checkpoint: str | None = None,
    device: str = "auto",
    num: Size | None = None,
    steps: Size | None = None,
    sigma_rel: PositiveFloat | None = None,
    out: str | None = None,
) -> None:
    """Compare a run's pictures with real ones: Fréchet distance, precision and recall, class agreement.

    Beside them the same for real test images (floor) and for noise (ceiling).

    Args:
        run_dir: folder of the run
        checkpoint: name of the checkpoint to use, not the newest
        device: auto, cpu, cuda or cuda:N
        num: number of pictures; the run's own if not given
        steps: denoising steps; the run's own if not given
        sigma_rel: relative width of a power EMA, of a run with sigma_rels; the run's own if not given
        out: JSON file to write; RUN_DIR/metrics.json if no option above changes what the run measured
    """
    target = None if out is None else Path(out)
    if target is not None:
        check_target("out", target)
    trained = load_run(run_dir, checkpoint, device, steps=steps, sigma_rel=sigma_rel)
    run = RunFolder(run_dir)
    # Those of an older checkpoint, where the newest is corrupt, are not the run's own.
    own = trained.iteration == run.iteration
    if own and (out, num, steps, sigma_rel, checkpoint) == (None,) * 5:
        target = run.metrics
    metrics = trained.evaluate(num)
    if target is not None:
        with writing("out", target) as aside:
            aside.write_text(json.dumps(metrics, indent=2) + "\n")
    print(table(metrics))
