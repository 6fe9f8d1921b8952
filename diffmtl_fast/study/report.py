"""The report of a study: Markdown and pictures, from what is stored alone."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np

from .._files import replacing, write_json
from ..clustering import IntervalClustering
from ..diffusion import log_snr
from ..train.components import build_clusters, build_scheduler
from ..train.errors import UserError, blame
from ..train.trained import COST_TITLES
from . import plots
from .calibration import CONTROL
from .claims import claims, ratio
from .folder import StudyFolder
from .plan import VANILLA, VARIANTS, Plan, Variant
from .results import METRICS, Axis, Results, load_results
from .statistics import Differences

COMMAND = "diffmtl-fast study"


def write_report(study: StudyFolder, out: Path) -> Path:
    """Write report.md and its pictures.

    Args:
        study: with at least one complete run of plain training.
        out: folder of the report; made where it is missing.

    Returns:
        The Markdown file.

    Raises:
        UserError: there is no study, or nothing to report yet.
    """
    results = load_results(study)
    if not results.seeds(VANILLA):
        raise UserError(
            f"{study.path}: expected a complete run of plain training to compare with, found none yet"
        )
    scheduler = build_scheduler(results.plan.base)
    with blame("scheduler"):
        levels = log_snr(scheduler)
    out.mkdir(parents=True, exist_ok=True)
    others = [variant for variant in results.cases() if variant != VANILLA]
    text = "\n\n".join(
        [
            _introduction(results),
            _claims(results, levels),
            _quality(results, others, out),
            _convergence(results, others, out),
            _clusters(results, study, levels, out),
            _transfer(results, out),
            _phases(results),
            _costs(results),
            _method(results),
        ]
    )
    write_json(out / "results.json", results.to_dict())
    path = out / "report.md"
    with replacing(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")
    return path


def _introduction(results: Results) -> str:
    plan, base = results.plan, results.plan.base
    done, planned = len(results.curves), plan.seeds * len(VARIANTS)
    missing = "" if done == planned else f" **{planned - done} of {planned} runs are missing.**"
    return (
        f"# Study: multi-task diffusion training on {base.data.path.rpartition('.')[2]}\n\n"
        f"{len(results.cases())} ways of training, {plan.seeds} seed{'s' * (plan.seeds != 1)}, "
        f"{plan.iterations:,} iterations of {base.batch_size} images each, evaluated {plan.evaluations} times "
        f"with {base.evaluation.num_samples} pictures of {base.sampling.steps} denoising steps (averaged "
        f"weights).{missing} Made by `{COMMAND}`; all figures and pictures here are computed from its stored "
        "results (those of the runs are in "
        "[results.json](results.json)) by "
        f"`{COMMAND} --report-only --study-dir DIR`."
    )


def _claims(results: Results, levels: np.ndarray) -> str:
    found = claims(results, levels)
    rows = [[claim.source, claim.statement, f"**{claim.verdict}**", claim.evidence] for claim in found]
    criteria = dict.fromkeys(f"- {_subject(claim.statement)}: {claim.criterion}." for claim in found)
    return (
        "## What reproduces\n\n"
        + _table(["paper", "observation", "here", "figures"], rows)
        + "\n\nANT: Go et al., NeurIPS 2023, arXiv 2306.00354. Curriculum: Kim et al., ICLR 2025, arXiv "
        "2403.10348. A verdict is computed by its criterion; *not shown* says that the differences do not exceed "
        "the noise, not that there are none.\n\nCriteria:\n\n" + "\n".join(criteria)
    )


def _subject(statement: str) -> str:
    return statement.partition(":")[0] if ":" in statement else statement


def _quality(results: Results, others: list[Variant], out: Path) -> str:
    rows = []
    for variant in results.cases():
        figures = [_mean_sd(results.figures(variant, metric)) for metric in METRICS]
        rows.append([variant.title, str(len(results.seeds(variant))), *figures])
    parts = [
        "## Quality at the end of training",
        _table(
            ["", "seeds", "Fréchet distance", "precision", "recall", "class agreement"], rows, numbers=True
        ),
        "Mean ± standard deviation over the seeds.",
    ]
    if others:
        parts += [_paired(results, out)]
    return "\n\n".join(parts)


def _paired(results: Results, out: Path) -> str:
    pairs = [_pair_title(*pair) for pair in results.pairs()]
    names = [one.title for one, other in results.pairs() if other == VANILLA]
    axes: tuple[Axis, ...] = ("steps", "calibrated", "measured")
    quality = {axis: results.quality(axis) for axis in axes}
    times = {axis: results.time_to_quality(axis) for axis in axes}
    plots.comparisons(
        out / "comparisons.png",
        {
            "Fréchet distance at equal steps": (pairs, quality["steps"]),
            "Fréchet distance at equal time (calibrated)": (pairs, quality["calibrated"]),
            "steps to equal quality": (names, times["steps"]),
            "time to equal quality (calibrated)": (names, times["calibrated"]),
        },
    )
    return "\n\n".join(
        [
            "### Fréchet distance relative to plain training of the same seed",
            "Below 1 is better.",
            _ratio_table(pairs, quality),
            _noise(quality["steps"], pairs),
            "### Steps and time to equal quality, relative to plain training of the same seed",
            "Below 1 is faster. Of a method and plain training with the same seed, the one that ends at the "
            "poorer Fréchet distance sets the level; the ratio is of what both needed to come down to it. So both "
            "runs get there, and a slow method counts in full.",
            _ratio_table(names, times),
            _noise(times["steps"], names),
            "![Ratios to plain training with their intervals, on a logarithmic axis](comparisons.png)",
        ]
    )


def _pair_title(one: Variant, other: Variant) -> str:
    return one.title if other == VANILLA else f"{one.title} / {other.title}"


def _ratio_table(names: list[str], columns: dict[Axis, Differences]) -> str:
    headers = ["", "equal steps", "equal time (calibrated)", "equal time (measured)"]
    if len(names) == 0:
        return ""
    steps = columns["steps"]
    rows = [
        [name, *(ratio(found, j) for found in columns.values()), _own_noise(steps, j), _agreement(steps, j)]
        for j, name in enumerate(names)
    ]
    return _table([*headers, "own noise", "seeds that agree"], rows, numbers=True)


def _own_noise(found: Differences, index: int) -> str:
    return f"× {np.exp(found.own[index]):.2f}" if np.isfinite(found.own[index]) else "–"


def _agreement(found: Differences, index: int) -> str:
    return f"{found.agreeing[index]} of {found.seeds[index]}"


def _noise(found: Differences, names: list[str]) -> str:
    if found.freedom == 0:
        return "With one seed there are no intervals, and nothing is decided."
    text = (
        f"By all runs together a single ratio varies by a factor of {np.exp(found.sd):.2f} between seeds "
        f"(one standard deviation, equal steps, {found.freedom} degrees of freedom)."
    )
    doubtful = [name for name, suspect in zip(names, found.suspect, strict=True) if suspect]
    if doubtful:
        listed = ", ".join(doubtful)
        text += f" **More than twice as noisy, so that their intervals may be too narrow: {listed}.**"
    return text


def _convergence(results: Results, others: list[Variant], out: Path) -> str:
    plots.curves(out / "curves.png", results)
    headers = ["", "½ of plain training: steps", "plain steps", "s", "all of it: steps", "plain steps", "s"]
    axes: tuple[Axis, ...] = ("steps", "calibrated", "measured")
    rows = [
        [
            variant.title,
            *(_median(results.reached(variant, axis, share)) for share in (0.5, 1.0) for axis in axes),
        ]
        for variant in [VANILLA, *others]
    ]
    return "\n\n".join(
        [
            "## Convergence",
            "![Fréchet distance against iterations and against calibrated training time](curves.png)",
            "Mean over the seeds and their range.",
            "### Time to quality",
            _table(headers, rows, numbers=True),
            "Where the Fréchet distance first falls to that of plain training of the same seed at half and at the "
            "end of its iterations: median over the seeds, – where most of them do not get there.",
        ]
    )


def _clusters(results: Results, study: StudyFolder, levels: np.ndarray, out: Path) -> str:
    found = _boundaries(results.plan, study, levels)
    plots.clusters(out / "clusters.png", {name: each.boundaries for name, each in found.items()})
    parts = [
        "## Clusters",
        "![The intervals of timesteps of every clustering](clusters.png)",
        "\n".join(f"- {name}: {_intervals(each)}" for name, each in found.items() if each.k <= 10),
    ]
    picture = study.affinity.with_suffix(".png")
    if picture.exists():
        shutil.copyfile(picture, out / "affinity.png")
        parts += ["![Task affinities of plain training](affinity.png)"]
    rows = []
    for variant in results.cases():
        shares = [results.curves[variant.name, seed].conflicts for seed in results.seeds(variant)]
        measured = [share for share in shares if share is not None]
        if measured:
            rows.append([variant.title, _mean_sd(100 * np.array(measured), digits=1)])
    if rows:
        parts += [
            _table(["", "conflicting pairs of clusters (%)"], rows, numbers=True),
            "Pairs of clusters whose gradients have a negative cosine, mean over training, where the method forms "
            "the Gramian anyway.",
        ]
    return "\n\n".join(parts)


def _boundaries(plan: Plan, study: StudyFolder, levels: np.ndarray) -> dict[str, IntervalClustering]:
    number = len(levels)
    found = {}
    for variant in VARIANTS:
        if variant.method == "uw" and (variant.cost != "affinity" or study.affinity.exists()):
            config = plan.config(variant, 0, study.affinity)
            found[COST_TITLES[config.clusters.cost]] = build_clusters(config.clusters, lambda: levels, number)
    found["curriculum"] = build_clusters(plan.base.curriculum.clusters, lambda: levels, number)
    return found


def _intervals(clusters: IntervalClustering) -> str:
    edges = clusters.boundaries.tolist()
    return ", ".join(f"{first}–{end - 1}" for first, end in pairwise(edges))


def _transfer(results: Results, out: Path) -> str:
    found = results.transfer()
    if found is None:
        return "## Negative transfer\n\nNot measured yet."
    plots.gaps(out / "negative-transfer.png", results)
    plan = results.plan
    edges = next(iter(results.gaps.values()))["boundaries"]
    gaps = np.array([gap["gaps"] for gap in results.gaps.values()])
    steps = np.array(
        [
            [np.nan if each is None else each for each in entry["steps_to_fraction"]]
            for entry in results.difficulty.values()
        ]
    )
    early = {f"at {n}": results.transfer(n) for n in plan.exposures if n != plan.equal_exposure}
    early[f"equal exposure, at {plan.equal_exposure:.0f}"] = results.transfer(plan.equal_exposure)
    measured = {title: each for title, each in early.items() if each is not None}
    headers = [
        "timesteps", "gap (Fréchet distance), equal iterations", f"ratio, equal iterations, at {plan.iterations}",
        *(f"ratio, {title}" for title in measured), "expert's steps to 90 % of the fall",
    ]  # fmt: skip
    rows = [
        [
            f"{low}–{end - 1}",
            _mean_sd(gaps[:, j]),
            ratio(found, j),
            *(ratio(each, j) for each in measured.values()),
            _mean_sd(steps[:, j], digits=0),
        ]
        for j, (low, end) in enumerate(pairwise(edges))
    ]
    return "\n\n".join(
        [
            "## Negative transfer and difficulty",
            "An expert of an interval is plain training on its timesteps alone. It denoises inside its interval, "
            "plain training elsewhere: below a gap of 0 or a ratio of 1 the expert is better.",
            "![Fréchet distance with the expert of every interval over that without](negative-transfer.png)",
            _table(headers, rows, numbers=True),
            _exposure(results, bool(measured)),
        ]
    )


def _exposure(results: Results, measured: bool) -> str:
    plan = results.plan
    flattering = (
        f"At equal iterations an expert has had as many steps as plain training, all of them on one of "
        f"{plan.intervals} intervals, and has seen each of its timesteps {plan.intervals} times as often: while "
        "plain training is far from converged, a gap below 0 may show no more than that."
    )
    if not measured:
        why = "" if plan.exposures else ": the experts keep no checkpoint so early; more evaluations would"
        return f"{flattering} The gap at equal exposure, which would tell, is not measured{why}."
    return (
        f"{flattering} At equal exposure, after {plan.equal_exposure:.0f} of {plan.iterations} iterations, it has "
        f"seen them as often as plain training has, in 1/{plan.intervals} of the optimizer's steps. That is "
        "against the experts: where one is better nevertheless, the other timesteps do harm, but where none is, "
        "harm is not ruled out. Experts keep checkpoints at some iterations only; in between the logarithm of the "
        "ratio is interpolated in that of the iteration."
    )


def _phases(results: Results) -> str:
    rows = []
    for variant in results.cases():
        if variant.family != "curriculum":
            continue
        runs = [results.curves[variant.name, seed] for seed in results.seeds(variant)]
        starts = [next(reversed(run.phases.values())) for run in runs if run.phases]
        last = max((max(run.phases) for run in runs if run.phases), default=0)
        rows.append([variant.title, str(last), ", ".join(str(start) for start in starts)])
    if not rows:
        return "## Curricula\n\nNot measured yet."
    settings = results.plan.base.curriculum
    return (
        "## Curricula\n\n"
        + _table(["", "last phase", "which began at iteration, by seed"], rows)
        + f"\n\nPatience {settings.patience}, at most {settings.max_length} iterations a phase, "
        f"{settings.clusters.k} clusters."
    )


def _costs(results: Results) -> str:
    if not results.costs:
        return "## Cost of a step\n\nNot calibrated: the calibrated time is that of equally fast steps."
    rows = []
    for kind, cost in results.costs.items():
        rows.append([kind, f"{cost.ratio:.3f}", f"{cost.low:.3f} to {cost.high:.3f}", f"{cost.seconds:.3f}"])
    control = results.costs.get(CONTROL)
    noise = (
        "" if control is None else f" The control, plain training a second time, came to {control.ratio:.3f}."
    )
    return (
        "## Cost of a step\n\n"
        + _table(["", "ratio to the plain step", "quartiles", "s"], rows, numbers=True)
        + "\n\nAll kinds of steps in turn, in random order, by one process alone; the ratio is the median over "
        "the rounds of ratios within a round, so that a machine whose speed varies disturbs all alike."
        + noise
        + " Machine: "
        + ", ".join(f"{name} {value}" for name, value in results.machine.items())
        + "."
    )


def _method(results: Results) -> str:
    seconds = [curve.position["measured"][-1] for curve in results.curves.values()]
    ratio_of = {variant: results.costs[variant.kind].ratio for variant in results.cases() if results.costs}
    paces = [
        results.curves[variant.name, seed].position["measured"][-1] / (results.plan.iterations * cost)
        for variant, cost in ratio_of.items()
        for seed in results.seeds(variant)
    ]
    spread = (
        f" A plain step took {min(paces):.3f} to {max(paces):.3f} s by run, once the method's cost is divided "
        "out: that much the machine's speed varied."
        if paces
        else ""
    )
    return (
        "## How it was measured\n\n"
        "Runs of a seed share initial weights, order of the images, and the noise of the evaluation. Plain "
        "training draws timesteps uniformly, the clustered methods equally often from every cluster, as in the "
        "paper; what that alone does is not told apart here. Calibrated time is steps × the cost of a step in "
        "plain steps, and is the figure to go by, since machines are noisy; measured time is that of training "
        "alone, without evaluation, several runs at a time on a shared machine "
        f"({sum(seconds) / 3600:.1f} h in all).{spread} At equal time all runs of a seed are read at the time "
        "that the shortest of them took, interpolated between evaluations.\n\n"
        f"Affinity clusters come from plain training with seed 0 ({results.plan.tasks} groups of timesteps, "
        f"{results.plan.samples} images each, mean over its {results.plan.evaluations} checkpoints)."
    )


def _mean_sd(values: np.ndarray, digits: int = 3) -> str:
    known = values[np.isfinite(values)]
    if not known.size:
        return "–"
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{known.mean():.{digits}f} ± {known.std(ddof=1):.{digits}f}"


def _median(values: list[float]) -> str:
    middle = float(np.median(values)) if values else float("inf")
    return f"{middle:.0f}" if np.isfinite(middle) else "–"


def _table(headers: list[str], rows: list[list[str]], *, numbers: bool = False) -> str:
    """A Markdown table; the columns after the first are aligned right if they are numbers."""
    rule = ["---", *(["---:" if numbers else "---"] * (len(headers) - 1))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [headers, rule, *rows])
