"""The report of a study: Markdown and pictures, from what is stored alone."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np

from .._errors import UserError, blame
from .._files import replacing, write_json
from ..clustering import IntervalClustering
from ..clustering.continuous import in_timesteps
from ..diffusion.training_noise import TrainingNoise
from ..run.plots import training as plot_training
from ..run.titles import COST_TITLES
from ..train import history
from ..train.components import build_clusters, build_noise, build_scheduler
from ..train.config import Clusters
from . import plots, report_setup
from .claims import UNKNOWN, VERDICTS, claims, ratio
from .folder import StudyFolder
from .plan import STUDIED, VANILLA, VARIANTS, Plan, Variant
from .results import METRICS, Axis, Results, load_results
from .samples import Samples, draw_samples
from .statistics import Differences
from .tables import intervals, mean_sd, median, table


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
    base = results.plan.base
    noise = build_noise(base, build_scheduler(base))
    with blame("scheduler"):
        levels = noise.log_snr()
    out.mkdir(parents=True, exist_ok=True)
    others = [variant for variant in results.cases() if variant != VANILLA]
    clusters = _boundaries(results.plan, study, noise)
    drawn = draw_samples(results, study)
    text = "\n\n".join(
        [
            _introduction(results, study),
            _READING,
            *_claims(results, levels),
            _quality(results, others, out),
            *_samples(drawn, out),
            _convergence(results, others, out),
            _clusters(results, study, clusters, out),
            _transfer(results, out),
            *_difficulty(study, out),
            report_setup.phases(results, clusters["curriculum"]),
            *_training(results, study, out),
            report_setup.costs(results, None if drawn is None else drawn.parameters),
            report_setup.settings(results, clusters),
            report_setup.method(results),
        ]
    )
    write_json(out / "results.json", results.to_dict())
    path = out / "report.md"
    with replacing(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")
    return path


_READING = """## How to read it

- **Fréchet distance**: how far the pictures that a model draws are from real ones. Lower is better.
- **Ratio**: the figure of a method over that of plain training with the same seed, geometric mean over the seeds.
  0.80 says that it is 20 % lower.
- **Interval**, in brackets: the ratios that fit what was measured. If it contains 1, the study cannot tell whether
  the method is better or worse. The intervals of a column are so wide that in 19 of 20 such studies all of them
  together contain the true ratios. With a single seed there is none.
- **Better** is a method whose whole interval lies below 1, and whose ratio is below 1 with every single seed;
  **worse** one for which both lie above 1. All others are **undecided**. For times to equal quality the words are
  faster and slower.
- **Own noise**: the factor by which the row's ratio varies between seeds at equal steps (one standard deviation).
- **Seeds that agree**: how many seeds have a ratio on the same side of 1 as the mean, at equal steps."""


def _introduction(results: Results, study: StudyFolder) -> str:
    plan, base = results.plan, results.plan.base
    done, planned = len(results.curves), plan.seeds * len(plan.variants)
    missing = "" if done == planned else f" **{planned - done} of {planned} runs are missing.**"
    return (
        "# Study: multi-task diffusion training on "
        f"{base.data.path.rpartition('.')[2]}\n\n{len(results.cases())} ways of training, {plan.seeds} "
        f"seed{'s' * (plan.seeds != 1)}, {plan.iterations:,} iterations of {base.batch_size} images each, "
        f"evaluated {plan.evaluations} times with {base.evaluation.num_samples} pictures of "
        f"{base.sampling.steps} denoising steps (averaged "
        f"weights).{missing}\n\n{report_setup.origin(results, study)} All figures and pictures here are "
        "computed from its stored results (those of the runs are in [results.json](results.json)), again "
        "by `diffmtl-fast study --report-only --study-dir DIR`, DIR being the folder in which the study was made."
    )


def _claims(results: Results, levels: np.ndarray) -> list[str]:
    found = claims(results, levels)
    if all(claim.verdict == UNKNOWN for claim in found):
        return []
    rows = [[claim.source, claim.statement, f"**{claim.verdict}**", claim.evidence] for claim in found]
    criteria = dict.fromkeys(f"- {_subject(claim.statement)}: {claim.criterion}." for claim in found)
    return [
        "## What reproduces\n\n"
        + table(["paper", "observation", "here", "figures"], rows)
        + "\n\nANT: Go et al., NeurIPS 2023, arXiv 2306.00354. Curriculum: Kim et al., ICLR 2025, arXiv "
        "2403.10348. Every verdict is computed by a rule. "
        "Unless the criterion says otherwise:\n\n"
        + "\n".join(f"- *{verdict}*: {rule};" for verdict, rule in VERDICTS.items()).rstrip(";")
        + ".\n\nCriteria:\n\n"
        + "\n".join(criteria)
    ]


def _subject(statement: str) -> str:
    return statement.partition(":")[0] if ":" in statement else statement


def _quality(results: Results, others: list[Variant], out: Path) -> str:
    rows = []
    for variant in results.cases():
        at_time = [mean_sd(results.at_budget(variant, axis)) for axis in ("calibrated", "measured")]
        end, *rest = [mean_sd(results.figures(variant, metric)) for metric in METRICS]
        rows.append([variant.title, str(len(results.seeds(variant))), end, *at_time, *rest])
    headers = [
        "", "seeds", "Fréchet distance", "at equal time (calibrated)", "at equal time (measured)", "precision",
        "recall", "class agreement",
    ]  # fmt: skip
    parts = [
        "## Quality",
        table(headers, rows, numbers=True),
        "Mean ± standard deviation over the seeds. The Fréchet distance is that at the end of training, "
        "which is that at equal steps; at equal time it is that when the shortest run of the seed ended. "
        "The last three are at the end of training.",
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
            _ratio_table(["equal steps", "equal time (calibrated)", "equal time (measured)"], pairs, quality),
            _noise(quality["steps"], pairs),
            "### Steps and time to equal quality, relative to plain training of the same seed",
            "Below 1 is faster. Of a method and plain training with the same seed, the one that ends at "
            "the poorer Fréchet distance sets the level; the ratio is of what both needed to come down to "
            "it. So both runs get there, and a slow method counts in full.",
            _ratio_table(["steps", "time (calibrated)", "time (measured)"], names, times),
            _noise(times["steps"], names),
            "![Ratios to plain training with their intervals, on a logarithmic axis](comparisons.png)",
        ]
    )


def _pair_title(one: Variant, other: Variant) -> str:
    return one.title if other == VANILLA else f"{one.title} / {other.title}"


def _ratio_table(headers: list[str], names: list[str], columns: dict[Axis, Differences]) -> str:
    steps = columns["steps"]
    rows = [
        [name, *(ratio(found, j) for found in columns.values()), _own_noise(steps, j), _agreement(steps, j)]
        for j, name in enumerate(names)
    ]
    return table(["", *headers, "own noise", "seeds that agree"], rows, numbers=True)


def _own_noise(found: Differences, index: int) -> str:
    return f"× {np.exp(found.own[index]):.2f}" if np.isfinite(found.own[index]) else "–"


def _agreement(found: Differences, index: int) -> str:
    return f"{found.agreeing[index]} of {found.seeds[index]}"


def _noise(found: Differences, names: list[str]) -> str:
    if found.freedom == 0:
        return "With one seed there are no intervals, and nothing is decided."
    text = (
        f"By all runs together a single ratio varies by a factor of {np.exp(found.sd):.2f} between seeds "
        f"(one standard deviation, equal steps, {found.freedom} degree{'s' * (found.freedom != 1)} of freedom)."
    )
    doubtful = [name for name, suspect in zip(names, found.suspect, strict=True) if suspect]
    if doubtful:
        listed = "; ".join(doubtful)
        text += f" **More than twice as noisy, so that their intervals may be too narrow: {listed}.**"
    if 2 * len(doubtful) > len(names):
        text += " What most rows share is plain training, which is likely the noisy one."
    return text


def _convergence(results: Results, others: list[Variant], out: Path) -> str:
    plots.curves(out / "curves.png", results)
    headers = ["", "½ of plain training: steps", "plain steps", "s", "all of it: steps", "plain steps", "s"]
    axes: tuple[Axis, ...] = ("steps", "calibrated", "measured")
    rows = [
        [
            variant.title,
            *(median(results.reached(variant, axis, share)) for share in (0.5, 1.0) for axis in axes),
        ]
        for variant in [VANILLA, *others]
    ]
    return "\n\n".join(
        [
            "## Convergence",
            "![Fréchet distance against iterations and against calibrated training time](curves.png)",
            "Geometric mean over the seeds, and their range shaded.",
            "### When plain training's quality is reached",
            table(headers, rows, numbers=True),
            "When the Fréchet distance first falls to that of plain training of the same seed at half and "
            "at the end of its iterations: median over the seeds, – where most of them do not get there. "
            "This describes what was seen; no verdict rests on it, as the level is itself a noisy end "
            "point.",
        ]
    )


def _clusters(results: Results, study: StudyFolder, found: dict[str, IntervalClustering], out: Path) -> str:
    plots.clusters(out / "clusters.png", {name: each.boundaries for name, each in found.items()})
    parts = [
        "## Clusters",
        "![The intervals of timesteps of every clustering](clusters.png)",
        "\n".join(f"- {name}: {intervals(each)}" for name, each in found.items() if each.k <= 10),
    ]
    for matrix, words in (
        (study.affinity, "Task affinities of plain training, by which the variants cluster"),
        (study.disattenuated, "The same of more images, corrected for attenuation"),
    ):
        picture = matrix.with_suffix(".png")
        if picture.exists():
            shutil.copyfile(picture, out / picture.name)
            parts += [f"![{words}]({picture.name})"]
    if results.disattenuated is not None:
        parts += [_attenuation(results)]
    rows = []
    for variant in results.cases():
        shares = [results.curves[variant.name, seed].conflicts for seed in results.seeds(variant)]
        measured = [share for share in shares if share is not None]
        if measured:
            rows.append([variant.title, mean_sd(100 * np.array(measured), digits=1)])
    if rows:
        parts += [
            table(["", "conflicting pairs of clusters (%)"], rows, numbers=True),
            "Pairs of clusters whose gradients have a negative cosine, mean over training, where the "
            "method forms the Gramian anyway.",
        ]
    return "\n\n".join(parts)


def _attenuation(results: Results) -> str:
    return (
        "The noise of a few images draws the cosine c of two gradients towards 0, of noisy tasks more than of "
        f"others. The second measurement, of {results.plan.more_samples} other images each, is c / √(r r′) with "
        "the reliabilities r and r′ of the two gradients: the share of its squared norm that is not noise, "
        "estimated from the gradients of two halves of the images (correction for attenuation, Spearman, 1904). "
        "Observation O1 rests on it, and on one run."
    )


def _boundaries(plan: Plan, study: StudyFolder, noise: TrainingNoise) -> dict[str, IntervalClustering]:
    def boundaries(clusters: Clusters) -> IntervalClustering:
        number, law = noise.num_timesteps, noise.distribution
        return in_timesteps(build_clusters(clusters, noise.log_snr, number, distribution=law), number)

    found = {}
    of_cost = {variant.cost: variant for variant in VARIANTS if variant.family == "clusters"}
    for variant in of_cost.values():
        if variant.cost != "affinity" or study.affinity.exists():
            config = plan.config(variant, 0, study.affinity)
            found[COST_TITLES[config.clusters.cost]] = boundaries(config.clusters)
    found["curriculum"] = boundaries(plan.base.curriculum.clusters)
    return found


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
            mean_sd(gaps[:, j]),
            ratio(found, j),
            *(ratio(each, j) for each in measured.values()),
            mean_sd(steps[:, j], digits=0),
        ]
        for j, (low, end) in enumerate(pairwise(edges))
    ]
    return "\n\n".join(
        [
            "## Negative transfer and difficulty",
            "An expert of an interval is plain training on its timesteps alone. It denoises inside its "
            "interval, plain training elsewhere: below a gap of 0 or a ratio of 1 the expert is better.",
            "![Fréchet distance with the expert of every interval over that without](negative-transfer.png)",
            table(headers, rows, numbers=True),
            _exposure(results, bool(measured)),
        ]
    )


def _exposure(results: Results, measured: bool) -> str:
    plan = results.plan
    flattering = (
        "At equal iterations an expert has had as many steps as plain training, all of them on one of "
        f"{plan.intervals} intervals, and has seen each of its timesteps {plan.intervals} times as often: "
        "while plain training is far from converged, a gap below 0 may show no more than that."
    )
    if not measured:
        why = "" if plan.exposures else ": the experts keep no checkpoint so early; more evaluations would"
        return f"{flattering} The gap at equal exposure, which would tell, is not measured{why}."
    return (
        f"{flattering} At equal exposure, after {plan.equal_exposure:.0f} of {plan.iterations} iterations, "
        f"it has seen them as often as plain training has, in 1/{plan.intervals} of the optimizer's steps. "
        "That is against the experts: where one is better nevertheless, the other timesteps do harm, but "
        "where none is, harm is not ruled out. Experts keep checkpoints at some iterations only; in "
        "between the logarithm of the ratio is interpolated in that of the iteration."
    )


def _samples(drawn: Samples | None, out: Path) -> list[str]:
    if drawn is None:
        return []
    plots.samples(out / "samples.png", drawn.pictures)
    return [
        "### Pictures",
        "![Real pictures, and those that every method draws](samples.png)",
        f"A picture of each class by every method, all from the same noise (seed {drawn.seed}, end of "
        "training).",
    ]


def _difficulty(study: StudyFolder, out: Path) -> list[str]:
    """The pictures of the analyses of plain training with the first seed, where they are."""
    titles = {
        "convergence.png": "Loss of the experts, and iterations until 90 % of its fall",
        "relative-entropy.png": "Relative entropy of neighbouring noise levels",
    }
    parts = []
    for name, title in titles.items():
        picture = study.affinity.with_name(name)
        if picture.exists():
            shutil.copyfile(picture, out / name)
            parts.append(f"![{title}]({name})")
    return (
        [*parts, "Experts of seed 0; the relative entropies are of the data and the schedule."]
        if parts
        else []
    )


def _training(results: Results, study: StudyFolder, out: Path) -> list[str]:
    """The course of a curriculum, with its phases, and of a method with weights and conflicts."""
    parts = []
    newest = [method.name for method in STUDIED if method.forms_gramian][-1]
    for name, chosen in (
        ("training-curriculum.png", lambda variant: variant.order == "easy_to_hard"),
        (f"training-{newest}.png", lambda variant: variant.method == newest),
    ):
        variant = next((variant for variant in results.cases() if chosen(variant)), None)
        if variant is None:
            continue
        seed = results.seeds(variant)[0]
        lines = history.read(study.run(variant, seed).log)
        if "losses" not in lines[0]:
            continue
        title = f"{variant.title}, seed {seed}"
        plot_training(out / name, lines, title)
        parts.append(f"![Course of training: {title}]({name})")
    return (
        [*parts, "Every second phase of a curriculum is shaded, as far as the log tells them apart."]
        if parts
        else []
    )
