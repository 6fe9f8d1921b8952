"""What a study runs: the variants, and the configuration of every run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from .._errors import UserError
from .._files import write_json
from ..run.titles import METHOD_TITLES
from ..train.config import CONTINUOUS, PLAIN, Checkpoints, Config, differences, from_dict, to_dict
from ..weighting import METHODS, Method


@dataclass(frozen=True)
class Variant:
    """A way of training.

    Attributes:
        name: in folders and tables.
        title: in words.
        method: balancing of the clusters.
        cost: that the clusters minimise; None where there is nothing to balance.
        order: of a curriculum.
    """

    name: str
    title: str
    method: str
    cost: Literal["timestep", "snr", "affinity"] | None = None
    order: Literal["none", "easy_to_hard", "hard_to_easy"] = "none"

    @property
    def kind(self) -> str:
        """Variants of a kind cost the same per step: the method, or the order of the curriculum.

        Which timesteps a cluster holds does not matter, as all clusters get equally many images.
        """
        return self.method if self.order == "none" else self.order

    @property
    def family(self) -> Literal["baseline", "clusters", "curriculum", "others"]:
        """Which of the papers' claims it is evidence for; methods that are not the papers' are for none."""
        if self.order != "none":
            return "curriculum"
        if self.method == PLAIN:
            return "baseline"
        return "clusters" if self.method in {method.name for method in STUDIED} else "others"


def listed(methods: Sequence[Method], last: str = "and") -> str:
    """Methods by their short names, such as "A, B and C"."""
    *names, end = [method.short for method in methods]
    return f"{', '.join(names)} {last} {end}" if names else end


#: The weightings that a study compares with plain training.
STUDIED = tuple(method for method in METHODS.values() if method.studied)
_COSTS: tuple[tuple[Literal["timestep", "snr", "affinity"], str], ...] = (
    ("timestep", "timestep"), ("snr", "log-SNR"), ("affinity", "affinity"),
)  # fmt: skip

VANILLA = Variant(PLAIN, METHOD_TITLES[PLAIN], PLAIN)
CURRICULUM = Variant("curriculum", "curriculum", PLAIN, order="easy_to_hard")
ANTI_CURRICULUM = Variant("anti-curriculum", "anti-curriculum", PLAIN, order="hard_to_easy")
VARIANTS = (
    VANILLA,
    *(
        Variant(f"{method.name}-{cost}", f"{method.short}, {kind} clusters", method.name, cost)
        for method in STUDIED
        for cost, kind in _COSTS
    ),
    CURRICULUM,
    ANTI_CURRICULUM,
)
# All others, on the clusters that a run has by default.
OTHERS = (
    Variant(CONTINUOUS, METHOD_TITLES[CONTINUOUS], CONTINUOUS),
    *(
        Variant(f"{method.name}-snr", f"{method.short}, log-SNR clusters", method.name, "snr")
        for method in METHODS.values()
        if not method.studied and method.name not in ("equal", "constant")
    ),
)


@dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        base: configuration that all runs share; method, cost of the clusters and order of the curriculum vary.
        seeds: number of seeds, 0, 1, …
        evaluations: how often each run is evaluated, at equal distances, the last time at its end.
        intervals: of equal length, whose experts show negative transfer.
        tasks: groups of timesteps whose affinities are measured.
        samples: images per task for that.
        methods: "papers", those of the papers; "all", the others too; or names with commas between them, which
            are compared with plain training alone.
    """

    base: Config
    seeds: int
    evaluations: int
    intervals: int
    tasks: int
    samples: int
    methods: str = "papers"

    def __post_init__(self) -> None:
        for name in ("seeds", "evaluations", "intervals", "tasks", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.base.iterations % self.evaluations:
            raise UserError(
                f"evaluations: expected a divisor of the {self.base.iterations} iterations, "
                f"found {self.evaluations}"
            )
        if self.base.evaluation.num_samples == 0:
            raise UserError("evaluation.num_samples: expected pictures to evaluate, found 0")
        unknown = set(self.methods.split(",")) - {variant.method for variant in self.variants}
        if self.methods not in ("papers", "all") and unknown:
            raise UserError(
                f"methods: expected papers, all, or names of methods with commas, found {', '.join(unknown)}"
            )

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What is trained, plain training first."""
        if self.methods in ("papers", "all"):
            return VARIANTS + (OTHERS if self.methods == "all" else ())
        names = self.methods.split(",")
        return VANILLA, *(variant for variant in (*VARIANTS[1:], *OTHERS) if variant.method in names)

    @property
    def iterations(self) -> int:
        """Of every run."""
        return self.base.iterations

    @property
    def more_samples(self) -> int:
        """Images per task for the affinities that are corrected for the noise of the images."""
        return 4 * self.samples

    @property
    def equal_exposure(self) -> float:
        """The iterations after which an expert has seen each of its timesteps as often as a run of all of them."""
        return self.iterations / self.intervals

    @property
    def exposures(self) -> tuple[int, ...]:
        """Iterations of an expert's checkpoints just before and after equal exposure, or of one exactly at it.

        Empty if its first checkpoint comes after equal exposure.
        """
        every = self.iterations // self.evaluations
        below = self.iterations // (self.intervals * every) * every
        if below == 0:
            return ()
        return (below,) if below == self.equal_exposure else (below, below + every)

    def config(self, variant: Variant, seed: int, affinity: Path | None = None) -> Config:
        """The configuration of a run.

        Args:
            variant: how it is trained.
            seed: of everything in it.
            affinity: the file of task affinities, for variants that cluster by them.
        """
        clusters = replace(self.base.clusters, cost="snr", affinity=None)
        if variant.cost is not None:
            by_affinity = str(affinity) if variant.cost == "affinity" else None
            clusters = replace(clusters, cost=variant.cost, affinity=by_affinity)
        return replace(
            self.base,
            method=variant.method,
            seed=seed,
            clusters=clusters,
            curriculum=replace(self.base.curriculum, order=variant.order),
            checkpoints=Checkpoints(self.iterations // self.evaluations, keep=self.evaluations),
        )

    def to_dict(self) -> dict[str, Any]:
        """As nested dictionaries of JSON's types, for :meth:`from_dict`."""
        return {**asdict(self), "base": to_dict(self.base)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """What :meth:`to_dict` was made from."""
        return cls(**{**values, "base": from_dict(values["base"])})

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: there is none.
        """
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except FileNotFoundError as error:
            raise UserError(f"{path.parent}: expected a study, found no {path.name}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: expected the plan of a study ({error})") from error

    def check_same(self, stored: Plan) -> None:
        """Refuse to go on with a study that was begun with another plan.

        Raises:
            UserError: with the first option that differs.
        """
        for key in ("seeds", "evaluations", "intervals", "tasks", "samples", "methods"):
            if getattr(self, key) != getattr(stored, key):
                raise UserError(
                    f"{key}: expected {getattr(stored, key)}, as in the study that is there, "
                    f"found {getattr(self, key)}"
                )
        for key, (now, then) in differences(self.base, stored.base).items():
            raise UserError(f"{key}: expected {then!r}, as in the study that is there, found {now!r}")


def bundled(*, quick: bool = False) -> dict[str, Any]:
    """The bundled plan as nested dictionaries: on digits, or a few steps of a tiny model."""
    import yaml

    name = "quick.yaml" if quick else "digits.yaml"
    return yaml.safe_load(files("diffmtl_fast.study").joinpath(name).read_text())


def make_plan(
    base: Mapping[str, Any] | None = None,
    *,
    quick: bool = False,
    iterations: int | None = None,
    seeds: int | None = None,
    evaluations: int | None = None,
    methods: str = "papers",
) -> Plan:
    """A plan from the bundled one.

    Args:
        base: configuration of the runs as nested dictionaries, instead of the bundled one.
        quick: start from the tiny plan.
        iterations: of every run.
        seeds: number of seeds.
        evaluations: of every run.
        methods: see `Plan`.

    Raises:
        UserError: an option is unknown or out of range.
    """
    values = bundled(quick=quick)
    config = dict(values["base"] if base is None else base)
    if iterations is not None:
        config["iterations"] = iterations
    return Plan(
        base=from_dict(config),
        seeds=values["seeds"] if seeds is None else seeds,
        evaluations=values["evaluations"] if evaluations is None else evaluations,
        intervals=values["intervals"],
        methods=methods,
        **values["affinity"],
    )
