"""The stored results of a study whose outcome is known, written by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffmtl_fast.study.folder import StudyFolder, all_runs
from diffmtl_fast.study.plan import VANILLA, make_plan

STEPS = np.array([2, 4, 8])
#: Factor of the Fréchet distance to plain training.
FACTOR = {"uw-snr": 0.5, "uw-timestep": 0.5, "uw-affinity": 0.5, "pcgrad-snr": 2.0, "curriculum": 0.5}


@pytest.fixture
def study(tmp_path):
    """A finished study: plain training's Fréchet distance is 100 / step, with a little noise by run."""
    folder = StudyFolder(tmp_path / "study")
    folder.path.mkdir()
    plan = make_plan(quick=True, seeds=3, evaluations=2)
    plan.save(folder.plan)
    kinds = ("vanilla", "uw", "pcgrad", "nash", "easy_to_hard", "hard_to_easy", "vanilla again")
    ratios = (1.0, 1.0, 1.25, 1.5, 1.0, 1.0, 1.0)
    pace = np.array([0.1, 0.3, 0.2])  # of the machine, by round
    seconds = {kind: (pace * ratio).tolist() for kind, ratio in zip(kinds, ratios, strict=True)}
    _write(folder.calibration, {"seconds": seconds, "machine": {"cores": 2}})
    rng = np.random.default_rng(0)
    for variant, seed in all_runs(plan):
        noise = np.exp(0.01 * rng.standard_normal())
        distances = 100.0 / STEPS * FACTOR.get(variant.name, 1.0) * noise * (1 + seed)
        rows = [
            {"iteration": int(step), "seconds": 0.5 * float(step), "frechet_distance": float(distance),
             "precision": 0.9, "recall": 0.8, "class_agreement": 0.7}
            for step, distance in zip(STEPS, distances, strict=True)
        ]  # fmt: skip
        _write(folder.evaluations(variant, seed), rows)
        lines = [{"iteration": 4, "conflicts": 0.2}, {"iteration": 8, "conflicts": 0.4}]
        if variant.family == "curriculum":
            # Four phases, then ordinary training.
            lines = [{"iteration": 4, "phase": 2}, {"iteration": 6, "phase": 5}, {"iteration": 8, "phase": 5}]
        lines = [{**line, "losses": [1.0, 1.0 / line["iteration"]]} for line in lines]
        log = folder.run(variant, seed).log
        log.parent.mkdir(parents=True)
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for seed in range(3):
        switched = [8.0 + 0.01 * seed, 10.0]
        gaps = {"boundaries": [0, 50, 100], "frechet_distance": 10.0, "switched_frechet_distance": switched,
                "gaps": [distance - 10.0 for distance in switched]}  # fmt: skip
        _write(folder.gaps(seed), gaps)
        early = [9.0 + 0.01 * seed, 20.0]
        _write(folder.gaps(seed, 4), {**gaps, "switched_frechet_distance": early})
        _write(
            folder.gaps(seed).with_name("difficulty.json"), {"steps_to_fraction": [7.0 + seed, 3.0 + seed]}
        )
    places = np.arange(100.0)
    affinity = np.exp(-np.abs(np.subtract.outer(places, places)) / 20)
    np.save(folder.affinity, affinity)
    np.save(folder.disattenuated, affinity)
    assert folder.run(VANILLA, 0).analysis.exists()
    return folder


def _write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
