"""The sections of the report on the set-up of a study: its command, the cost of its steps, its settings."""

from __future__ import annotations

import numpy as np

from ..clustering import IntervalClustering
from ..train import history
from . import journal
from .calibration import CONTROL, Cost
from .folder import StudyFolder
from .plan import STUDIED, VANILLA, Plan, Variant, make_plan
from .results import Results
from .tables import duration, intervals, table, timesteps

#: Iterations without improvement that end a phase in the paper of the curriculum.
PAPER_PATIENCE = 200


def origin(results: Results, study: StudyFolder) -> str:
    """By which command the study was made, and how long it took."""
    record = journal.read(study.journal)
    if record.commands:
        made = f"Made by {', then '.join(f'`{command}`' for command in record.commands)}."
    else:
        made = f"Made by the plan of `{command_of(results.plan)}`; the command itself was not recorded."
    names = {f"{name}-seed-{seed}" for name, seed in results.curves}
    unknown = len(names - record.spans.keys())
    if not unknown:
        return (
            f"{made} It took {duration(record.elapsed)}, in which {duration(record.work)} of work were done."
        )
    runs = "How long it took was" if unknown == len(names) else f"The times of {unknown} runs were"
    return f"{made} {runs} not recorded; {_work(results, study)}."


def command_of(plan: Plan) -> str:
    """A command that makes the same plan."""
    words, sizes = ["diffmtl-fast study --config BASE.yaml"], ["seeds", "evaluations", "methods"]
    bundled = make_plan()
    for quick in (False, True):
        same = make_plan(
            quick=quick,
            seeds=plan.seeds,
            evaluations=plan.evaluations,
            iterations=plan.iterations,
            methods=plan.methods,
        )
        if same == plan:
            words = ["diffmtl-fast study", *["--quick"] * quick]
            sizes, bundled = [*sizes, "iterations"], make_plan(quick=quick)
    given = {name: getattr(plan, name) for name in sizes}
    return " ".join(
        [*words, *(f"--{name} {value}" for name, value in given.items() if value != getattr(bundled, name))]
    )


def _work(results: Results, study: StudyFolder) -> str:
    """What the stored times of training alone add up to."""
    runs = sum(curve.position["measured"][-1] for curve in results.curves.values())
    experts = 0.0
    for seed in results.gaps:
        for log in sorted(study.gaps(seed).parent.glob("experts/*/log.jsonl")):
            experts += history.read(log)[-1]["seconds"]
    return f"training alone took {duration(runs)} in all for the runs and {duration(experts)} for the experts"


def costs(results: Results, parameters: int | None) -> str:
    """What a step of each kind costs.

    Args:
        results: of the study.
        parameters: of the model, where they are known.
    """
    if not results.costs:
        return "## Cost of a step\n\nNot calibrated: the calibrated time is that of equally fast steps."
    rows = [
        [kind, f"{cost.ratio:.3f}", f"{cost.low:.3f} to {cost.high:.3f}", f"{cost.seconds:.3f}"]
        for kind, cost in results.costs.items()
    ]
    size = "" if parameters is None else f" of {parameters:,} parameters"
    machine = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    return "\n\n".join(
        [
            "## Cost of a step",
            table(["", "ratio to the plain step", "95 % interval", "s"], rows, numbers=True),
            "All kinds of steps in turn, in random order, by one process alone; the ratio is the median "
            "over the rounds of ratios within a round, so that a machine whose speed varies disturbs all "
            f"alike; its interval is that of the sign test. Machine: {machine}.",
            f"The ratios are those of this model{size} with {results.plan.base.batch_size} images a step "
            "on this machine, not of the methods: keeping the clusters' gradients apart weighs more where "
            "the model is small and a step is made of short operations. For other models see the "
            "benchmarks in README.",
            _cost_noise(results),
        ]
    )


def _cost_noise(results: Results) -> str:
    control = results.costs.get(CONTROL)
    text = (
        "The noise of these ratios is not in the intervals of the columns at equal time (calibrated), "
        "which take the costs as known."
    )
    if control is not None:
        text += (
            " How large it is shows in the control, plain training timed a second time: "
            f"{_interval(control)} where 1 is true."
        )
    slopes = [_slope(results, seed) for seed in results.seeds(VANILLA)]
    known = [slope for slope in slopes if np.isfinite(slope)]
    if known and np.mean(known) > 0.05:  # else it did not fall
        text += (
            " A cost that is 1 % too high makes the Fréchet distance at equal time about "
            f"{np.mean(known):.1f} % too high, as plain training improves by so much with 1 % more steps "
            "(mean over the second half of its iterations)."
        )
    return text


def _interval(cost: Cost) -> str:
    return f"{cost.ratio:.3f} ({cost.low:.3f} to {cost.high:.3f})"


def _slope(results: Results, seed: int) -> float:
    """By how many per cent the Fréchet distance falls with 1 % more steps, late in plain training."""
    curve = results.curves[VANILLA.name, seed]
    steps = curve.position["steps"]
    if len(steps) < 2:
        return float("nan")
    early = max(float(steps[-1]) / 2, float(steps[0]))
    fall = np.log(curve.at("steps", early) / curve.at("steps", float(steps[-1])))
    return float(fall / np.log(steps[-1] / early))


def settings(results: Results, clusters: dict[str, IntervalClustering]) -> str:
    """What differs from the papers, or favours one method.

    Args:
        results: of the study.
        clusters: every clustering, that of the curriculum among them.
    """
    points = [
        _undertraining(results),
        _curriculum(results.plan, clusters["curriculum"]),
        *_updates(results.plan),
        _distribution({name: each for name, each in clusters.items() if name != "curriculum"}),
    ]
    return "\n\n".join(
        ["## What the settings favour and handicap", "\n".join(f"- {point}" for point in points if point)]
    )


def _undertraining(results: Results) -> str:
    falls = []
    for seed in results.seeds(VANILLA):
        distance = results.curves[VANILLA.name, seed].figures["frechet_distance"]
        falls += [distance[-2:]] if len(distance) > 1 else []
    if not falls:
        return ""
    before, end = np.mean(falls, axis=0)
    if end >= before:
        return ""
    steps = results.plan.iterations // results.plan.evaluations
    return (
        f"Training is short: over its last {steps} iterations the Fréchet distance of plain training still "
        f"went from {before:.2f} to {end:.2f} (mean over the seeds). The papers compare models that are "
        "trained to the end; here a method that learns faster also ends better."
    )


def _curriculum(plan: Plan, clusters: IntervalClustering) -> str:
    settings, edges = plan.base.curriculum, clusters.boundaries.tolist()
    if settings.patience is None:
        pacing = f"A phase takes {settings.max_length} iterations"
    else:
        limit = "" if settings.max_length is None else f", or after {settings.max_length} in all"
        pacing = f"A phase ends after {settings.patience} iterations without improvement{limit}"
    text = (
        f"Curricula have {clusters.k} clusters. {pacing}. The paper waits for {PAPER_PATIENCE} iterations "
        "without improvement, in training that is far longer."
    )
    if clusters.k > 1:
        first, second = timesteps(*edges[-2:]), timesteps(*edges[-3:-1])
        first = f"timestep{'s' if edges[-1] - edges[-2] > 1 else ''} {first}"
        text += (
            f" The one from easy to hard begins with {first} alone, then adds {second}. Phases "
            "of few timesteps teach little, and their iterations are missing later, which counts against "
            "curricula."
        )
    return text


def _updates(plan: Plan) -> list[str]:
    """The methods that refresh their weights more or less often than in the paper of the clusters."""
    points = []
    for method in STUDIED:
        every = getattr(plan.base, f"{method.name}_update_every", None)
        if every != method.published_every:
            when = "at every step" if every == 1 else f"every {every} steps"
            points.append(
                f"{method.short} solves for its weights {when}, in the paper every {method.published_every}: its "
                "steps cost more here than they need to, which counts against it at equal time."
            )
    return points


def _distribution(clusters: dict[str, IntervalClustering]) -> str:
    rows = []
    for name, each in clusters.items():
        factors = each.num_timesteps / (each.k * np.diff(each.boundaries))
        rows.append(f"{name} clusters {_factors(factors)}")
    return (
        "Clusters change what is trained on, too: every cluster gets equally many images, as in the "
        "paper, however many timesteps it holds. Compared with plain training a timestep is drawn: by "
        f"{'; by '.join(rows)}. Timestep clusters are the control: they leave the timesteps uniform in the "
        "mean, so that what they gain comes from the method, or from batches that hold all clusters "
        "alike. What other clusters gain beyond them may come from the timesteps that they draw more "
        "often."
    )


def _factors(factors: np.ndarray) -> str:
    low, high = factors.min(), factors.max()
    return "as often" if high - low < 0.005 else f"{low:.2f} to {high:.2f} times as often"


def phases(results: Results, clusters: IntervalClustering) -> str:
    """How far the curricula came.

    Args:
        results: of the study.
        clusters: of the curricula.
    """
    rows = []
    for variant in results.cases():
        if variant.family == "curriculum":
            rows.append([variant.title, _ordinary(results, variant, clusters.k)])
    if not rows:
        return "## Curricula\n\nNot measured yet."
    return (
        f"## Curricula\n\nAfter the last of {clusters.k} phases training is ordinary, on all timesteps: phase "
        f"{clusters.k + 1} in the pictures. The clusters: {intervals(clusters)}.\n\n"
        + table(["", "ordinary training began at iteration, by seed"], rows)
        + "\n\nThese are rounded up to lines of the log, which has one every "
        f"{results.plan.base.logging.every} iterations."
    )


def _ordinary(results: Results, variant: Variant, number: int) -> str:
    found = []
    for seed in results.seeds(variant):
        starts = results.curves[variant.name, seed].phases
        phase = max(starts, default=0)
        began = str(starts[phase]) if phase > number else f"never (it ended in phase {phase})"
        found.append(began)
    return ", ".join(found)


def method(results: Results) -> str:
    """How runs were made comparable, and how the noise is estimated."""
    plan = results.plan
    seconds = [curve.position["measured"][-1] for curve in results.curves.values()]
    ratio_of = {variant: results.costs[variant.kind].ratio for variant in results.cases() if results.costs}
    paces = [
        results.curves[variant.name, seed].position["measured"][-1] / (plan.iterations * cost)
        for variant, cost in ratio_of.items()
        for seed in results.seeds(variant)
    ]
    spread = (
        f" A plain step took {min(paces):.3f} to {max(paces):.3f} s by run, once the method's cost is divided "
        "out: that much the machine's speed varied."
        if paces
        else ""
    )
    return "\n\n".join(
        [
            "## How it was measured",
            "**Runs.** Runs of a seed share the initial weights, the order of the images in the first "
            "epoch, and the noise of the evaluation. Later epochs differ, as methods draw differently "
            "many random numbers.",
            "**Time.** Calibrated time is steps × the cost of a step in plain steps, and is the figure to "
            "go by, since machines are noisy; measured time is that of training alone, without "
            f"evaluation, several runs at a time on a shared machine ({duration(sum(seconds))} in "
            f"all).{spread} At equal time all runs of a seed are read at the time that the shortest of "
            "them took, the logarithm of the Fréchet distance interpolated in that of the time between "
            "evaluations.",
            "**Noise.** The logarithm of the Fréchet distance is taken to be a sum of an effect of the "
            "method, an effect of the seed, and noise (a randomised block design; two-way analysis of "
            "variance). The noise is what remains of all runs once both effects are fitted, and is taken "
            "to be equally large for all methods. A ratio's interval is that of Student's t, with "
            "Bonferroni's correction for the number of rows, so that a column has a wrong interval in at "
            "most one study of twenty. The columns are not corrected for each other. If plain training "
            "alone were twice as noisy as the methods, it would be one study of eight. The ratios of "
            "times are treated likewise.",
            f"**Affinity clusters** come from plain training with seed 0 ({plan.tasks} groups of timesteps, "
            f"{plan.samples} images each, mean over its {plan.evaluations} checkpoints).",
        ]
    )
