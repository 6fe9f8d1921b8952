"""The folder of a study and what lies in it."""

from __future__ import annotations

from pathlib import Path

from ..run.analyses import affinity_file, negative_transfer_file
from ..train.folder import RunFolder
from .plan import VANILLA, Plan, Variant


class StudyFolder:
    """Paths of a study.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = path / "plan.json"
        self.calibration = path / "calibration.json"
        self.journal = path / "journal.jsonl"
        self.output = path / "output"
        self.report = path / "report"

    def run(self, variant: Variant, seed: int) -> RunFolder:
        """The folder of a run, an ordinary one of the trainer."""
        return RunFolder(self.path / "runs" / run_name(variant, seed))

    def evaluations(self, variant: Variant, seed: int) -> Path:
        """Where the metrics of a run lie, one for every checkpoint."""
        return self.path / "evaluations" / f"{run_name(variant, seed)}.json"

    @property
    def affinity(self) -> Path:
        """The task affinities of plain training with the first seed, by which the variants cluster."""
        return affinity_file(self.run(VANILLA, 0))

    @property
    def disattenuated(self) -> Path:
        """The same of more images and corrected for their noise, which the claims rest on."""
        return affinity_file(self.run(VANILLA, 0), disattenuated=True)

    def gaps(self, seed: int, iteration: int | None = None) -> Path:
        """The negative transfer gaps of plain training with a seed, by experts at their end or at an iteration."""
        return negative_transfer_file(self.run(VANILLA, seed), iteration)


def run_name(variant: Variant, seed: int) -> str:
    """The name of a run, for folders and messages."""
    return f"{variant.name}-seed-{seed}"


def all_runs(plan: Plan) -> list[tuple[Variant, int]]:
    """The runs of a study, seed by seed, so that an interrupted one has whole seeds."""
    return [(variant, seed) for seed in range(plan.seeds) for variant in plan.variants]
