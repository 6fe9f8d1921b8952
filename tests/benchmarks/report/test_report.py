"""Reading, tabulating, drawing and comparing results that are made up here, so that every figure is known."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import Comparison, Machine, Results, Spread, Way, changes, machines
from benchmarks.report.command import main
from benchmarks.report.compare import FLOOR
from benchmarks.report.compare import table as changes_table
from benchmarks.report.goals import GOALS, Goal, reached, share
from benchmarks.report.goals import table as goals_table
from benchmarks.report.plots import CAPTIONS, PLOTS, captions, draw
from benchmarks.report.readme import rewrite
from benchmarks.report.results import FORMAT, entry
from benchmarks.report.tables import ratio_text, report, table
from benchmarks.report.text import duration, figure, fraction

STEP = "full training step"
OURS, SLOW = "diffmtl_fast grouped, PCGrad", "K backwards, PCGrad"


def comparison(
    ratio: float = 1.1,
    jitter: Sequence[float] = (1.0, 1.02, 0.98, 1.01, 0.99),
    group: str = STEP,
    case: str = "DiT, K = 5",
    parameters: Mapping[str, Any] | None = None,
) -> Comparison:
    """A step that takes `ratio` of the plain one, which takes 10 ms, 20 ms … in rounds of growing load."""
    load = [0.01 * (1 + i) for i in range(len(jitter))]
    turns = tuple(range(len(jitter)))
    return Comparison(
        group,
        case,
        (
            Way("plain step", "limit", tuple(load), turns, memory=2**20),
            Way(OURS, "ours", tuple(ratio * s for s in load), turns, 1e-6, 2**21),
            Way(SLOW, "reference", (4 * load[1],), (1,), 2e-6),
        ),
        tuple(s * j for s, j in zip(load, jitter, strict=True)),
        {"TorchJD": "expected it to be installed"},
        {"title": "DiT", "k": 5, "batch": 40} if parameters is None else parameters,
    )


def results(*comparisons: Comparison, gpu: str | None = None, device: str = "cpu", **changed: Any) -> Results:
    environment = {
        "date": "2026-01-02T00:00:00+00:00",
        "cpu": "Some CPU",
        "threads": 2,
        "load": [0.1, 0.1, 0.1],
        "gpu": gpu,
        "python": "3.12.1",
        "versions": {"torch": "2.13.0", "torchjd": None},
        **changed,
    }
    return Results(environment, "0123456789abcdef", {"device": device}, comparisons, "a")


def machine(*comparisons: Comparison) -> Machine:
    return Machine((results(*comparisons),))


def write(path: Path, found: Results, **changed: Any) -> Path:
    """Write a file as the suite's session does, through `entry`."""
    record = {
        "machine_info": dict(found.environment),
        "commit_info": {"id": found.commit},
        "settings": dict(found.settings),
        "format": FORMAT,
        "left_out": [
            {"group": c.group, "case": c.case, "way": way, "reason": reason}
            for c in found.comparisons
            for way, reason in c.left_out.items()
        ],
        "benchmarks": [
            {"group": c.group, "extra_info": entry(c, way), "stats": {"data": list(way.seconds)}}
            for c in found.comparisons
            for way in (*c.ways[1:], c.ways[0])
        ],
        **changed,
    }
    path.write_text(json.dumps(record))
    return path


def test_spread_has_the_quantiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, pytest.approx(1.8), pytest.approx(4.2))
    assert Spread(2.0, 1.0, 4.0).over(8.0) == Spread(4.0, 2.0, 8.0)


def test_ratios_are_formed_within_rounds() -> None:
    found = comparison(1.5)
    assert found.ratio(found[OURS]) == Spread(pytest.approx(1.5), pytest.approx(1.5), pytest.approx(1.5))
    # The slow way took part in the second round alone, when everything took twice as long.
    assert found.ratio(found[SLOW]).median == pytest.approx(4.0)
    assert found.ratio(found[OURS], found[SLOW]).median == pytest.approx(1.5 / 4)
    assert found[OURS].time.median == pytest.approx(0.045)
    with pytest.raises(KeyError, match="nothing"):
        found["nothing"]


@pytest.mark.parametrize(
    ("jitter", "noise"),
    [((1.0,) * 5, 0.0), ((1.0, 1.1, 1.1, 1.1, 1.0), 0.1), ((0.8, 0.8, 0.8, 1.0, 1.0), 0.25)],
)
def test_noise_is_how_far_the_yardstick_is_from_itself(jitter: Sequence[float], noise: float) -> None:
    found = comparison(jitter=jitter)
    assert found.noise == pytest.approx(noise)
    assert not found.differs(Spread.of([1 + 0.99 * noise]))
    assert not found.differs(Spread.of([1 / (1 + 0.99 * noise)]))
    assert found.differs(Spread.of([1.01 + 1.01 * noise]))
    assert found.differs(Spread.of([1 / (1.01 + 1.01 * noise)]))


def test_a_ratio_within_the_noise_is_not_called_a_difference() -> None:
    noisy = comparison(1.05, jitter=(1.1, 1.1, 1.1, 1.1, 1.1))
    assert ratio_text(noisy, noisy.ratio(noisy[OURS])) == "1.05 ≈"
    assert "| 1.05 ≈ |" in table(noisy)
    quiet = comparison(1.05, jitter=(1.0,) * 5)
    assert ratio_text(quiet, quiet.ratio(quiet[OURS])) == "1.05"


def test_a_ratio_whose_rounds_lie_on_both_sides_of_one_is_no_difference() -> None:
    quiet = comparison(jitter=(1.0,) * 5)
    assert not quiet.differs(Spread(1.08, 0.99, 1.13))
    assert not quiet.differs(Spread(0.93, 0.90, 1.0))
    assert quiet.differs(Spread(1.08, 1.01, 1.13))
    assert ratio_text(quiet, Spread(1.08, 0.99, 1.13)) == "1.08 ≈"
    # What differs from 1 does not read as 1.
    assert ratio_text(quiet, Spread(1.0042, 1.003, 1.005)) == "1.004"


def test_files_hold_everything(tmp_path: Path) -> None:
    expected = results(comparison(), comparison(case="another"), comparison(group="fused ops"))
    found = Results.read(write(tmp_path / "a.json", expected))
    assert found == expected
    assert found.machine == "Some CPU, 2 threads"
    assert results(gpu="Some GPU").machine == "Some GPU"
    assert found.find(STEP, "another") == expected.comparisons[1]
    assert found.find(STEP, "missing") is None


def test_a_case_cut_short_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", results(comparison()))
    record = json.loads(path.read_text())
    record["benchmarks"] = [b for b in record["benchmarks"] if b["extra_info"]["role"] != "limit"]
    path.write_text(json.dumps(record))
    assert Results.read(path).comparisons == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected the JSON of a"),
        ("[]", "expected the JSON"),
        ('{"format": 9}', "format 1, found 9"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Results.read(path)


def test_report_says_what_there_is_and_what_is_missing() -> None:
    text = report([results(comparison()), results(comparison(), gpu="Some GPU", device="cuda")])
    assert text.count("# Some CPU, 2 threads\n") == text.count("# Some GPU\n") == 1
    assert "Not installed: torchjd." in text
    assert text.count(f"| ours | {OURS} | 1.10 | 1.10 to 1.10 | 33 ms | 5 | 2 MiB | 1e-06 |") == 2
    assert text.count("| | TorchJD | expected it to be installed |") == 2
    # The bar of a GPU is another.
    assert "| PCGrad step / plain step | DiT, K = 5 | ≤ 1.15 | ≤ 1.05 | 1.10 | 1.10 to 1.10 | met |" in text
    assert "| ≤ 1.1 | ≤ 1.03 | 1.10 | 1.10 to 1.10 | within noise of the bar |" in text
    assert "for want of" not in text
    short = report([results(comparison(1.2))])
    assert "| 1.20 | 1.20 to 1.20 | short |" in short
    assert "Not measured, for want of a GPU: PCGrad step / plain step ≤ 1.1; NashMTL" in short


def test_a_goal_in_seconds_is_read_as_a_time() -> None:
    found = comparison(1.0, group="interval clustering", parameters={"T": 1000, "k": 5, "cost": "log-SNR"})
    ways = (found.ways[0], Way("diffmtl_fast", "ours", (1e-4,) * 5, found.ways[0].turns))
    text = report([results(Comparison(found.group, found.case, ways, found.again, {}, found.parameters))])
    assert "| ≤ 1 ms | ≤ 200 µs | 100 µs | 100 µs to 100 µs | met |" in text


def test_faults_and_steps_are_said() -> None:
    found = comparison()
    ways = (
        found.ways[0],
        Way("theirs", "reference", (1.0,), (0,), notes={"faults": ["the end is fixed"], "steps": [20, 30]}),
    )
    text = table(Comparison(found.group, found.case, ways, found.again))
    assert "theirs: the end is fixed." in text
    assert "theirs: 20, 30 steps." in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs"), (7e-9, "7 ns")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(12345.6, "12,346"), (123.4, "123"), (1.234, "1.23"), (0.0123, "0.0123")]
)
def test_figures(value: float, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(("value", "text"), [(1 / 8, "1/8"), (0.0404, "1/24.8"), (1 / 2500, "1/2,500")])
def test_fractions(value: float, text: str) -> None:
    assert fraction(value) == text


def test_the_best_way_counts_for_a_goal() -> None:
    goal = Goal("", STEP, (OURS, "missing", SLOW), 1.15, 1.05, {"k": 5})
    assert goal.value(comparison(1.3)) == comparison(1.3).ratio(comparison(1.3)[OURS])
    assert list(reached(goal, machine(comparison(1.3)))) == [(comparison(1.3), goal.value(comparison(1.3)))]
    assert not list(reached(goal, machine(comparison(group="other"))))
    assert not list(reached(goal, machine(comparison(parameters={"k": 2}))))
    assert Goal("", STEP, ("missing",), 1, 1).value(comparison()) is None


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (Spread(1.08, 1.05, 1.13), "short"),
        (Spread(0.95, 0.93, 0.99), "met"),
        (Spread(1.08, 1.01, 1.13), "within noise of the bar"),  # the bar is between the quantiles
        (Spread(1.03, 1.025, 1.04), "short"),  # both quantiles are beyond it, however near
        (Spread(1.005, 1.002, 1.008), "within noise of the bar"),  # no further from the bar than the noise
    ],
)
def test_a_bar_is_missed_beyond_both_quantiles_and_met_beyond_the_noise(value: Spread, verdict: str) -> None:
    quiet = comparison(jitter=(1.0, 1.02, 1.02, 1.02, 1.0))
    assert Goal("", STEP, (OURS,), 1.02, 1.01).verdict(quiet, value) == verdict


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (Spread(0.68, 0.67, 0.69), "short"),
        (Spread(0.9, 0.85, 0.95), "met"),
        (Spread(0.71, 0.705, 0.715), "within noise of the bar"),
        (Spread(0.69, 0.68, 0.71), "within noise of the bar"),
    ],
)
def test_a_share_is_missed_below_its_bar(value: Spread, verdict: str) -> None:
    quiet = comparison(jitter=(1.0, 1.02, 1.02, 1.02, 1.0))
    assert Goal("", STEP, (OURS,), 0.7, 0.9, measure="share").verdict(quiet, value) == verdict


def test_bytes_are_not_judged_by_the_noise_of_times() -> None:
    noisy = comparison(jitter=(1.3,) * 5)
    goal = Goal("", STEP, (OURS,), 2, 2, measure="gib")
    assert goal.verdict(noisy, Spread(1.99, 1.99, 1.99)) == "met"
    assert goal.verdict(noisy, Spread(2.01, 2.01, 2.01)) == "short"


def test_what_was_reached_reads_differently_from_the_bar() -> None:
    assert Goal("", STEP, (OURS,), 1.02, 1.01).text(1.0223) == "1.022"
    assert Goal("", STEP, (OURS,), 1.02, 1.01).text(1.02) == "1.02"
    assert Goal("", STEP, (OURS,), 1 / 200, 1 / 200).text(0.00785) == "1/127"
    assert Goal("", STEP, (OURS,), 2, 2, measure="gib").text(0.4123) == "0.41 GiB"
    assert Goal("", STEP, (OURS,), 1 / 4, "in words").stretch_text == "in words"


def test_goals_without_figures_are_named() -> None:
    found = comparison(
        group="Nash/PCGrad weights", case="Nash weights, K = 5", parameters={"op": "Nash weights"}
    )
    ways = (found.ways[0], Way("diffmtl_fast", "ours", (0.01,) * 5, found.ways[0].turns))
    absent = {"cvxpy + ECOS, as published": "expected ECOS to be installed"}
    text = goals_table(
        machine(Comparison(found.group, found.case, ways, found.again, absent, found.parameters))
    )
    row = (
        "Nash weights / cvxpy + ECOS, as published | Nash weights, K = 5 | ≤ 1/200 | on device, no host sync"
    )
    reason = "not measured: cvxpy + ECOS, as published: expected ECOS to be installed"
    assert f"| {row} | – | – | {reason} |" in text
    assert "Not measured: PCGrad step / plain step ≤ 1.15; NashMTL step" in text
    assert "GPU kernel" not in text


def test_runs_of_one_machine_are_put_together() -> None:
    early = results(comparison(1.1), comparison(group="fused ops"), comparison(1.2, case="K = 2"))
    late = results(
        comparison(1.3, case="K = 2"), comparison(case="K = 10"), date="2026-01-03", load=[9, 9, 9]
    )
    other = results(comparison(), gpu="Some GPU", device="cuda")
    first, second = machines([late, other, early])
    assert (first.title, second.title) == ("Some CPU, 2 threads", "Some GPU")
    assert [(c.group, c.case) for c in first.comparisons] == [
        (STEP, "DiT, K = 5"),
        (STEP, "K = 2"),
        (STEP, "K = 10"),
        ("fused ops", "DiT, K = 5"),
    ]
    assert first.comparisons[1] == late.comparisons[0]
    assert [first.run_of(c) is late for c in first.comparisons] == [False, True, True, False]
    text = report([late, other, early])
    assert text.count(f"## {STEP}\n") == 2  # once for each machine
    assert "Run 1: Commit 0123456789, 2026-01-02" in text
    assert "Run 2: Commit 0123456789, 2026-01-03" in text
    assert text.count("The machine was busy") == 1
    assert text.count(" Run 2.\n") == text.count(" Run 1.\n") == 2
    line = rewrite("<!-- figures: machines -->\n<!-- end of figures -->", [late, other, early])
    runs = "2026-01-02, commit 0123456789; 2026-01-03, commit 0123456789, beside other work"
    assert f"Some CPU, 2 threads (torch 2.13.0; {runs}); Some GPU (torch" in line


def test_a_share_is_bandwidth_over_that_of_the_memory() -> None:
    # Half the bytes in 1.25 of the time.
    found = comparison(1.25, parameters={"bytes": 500, "limit_bytes": 1000})
    assert share(found, OURS).median == pytest.approx(0.4)
    goal = Goal("", STEP, (OURS,), 0.7, 0.9, measure="share")
    assert goal.value(found) == share(found, OURS)


def test_goals_of_time_memory_and_other_ways() -> None:
    found = comparison(1.0)
    assert Goal("", STEP, (OURS,), 1, 1, measure="seconds").value(found) == found[OURS].time
    assert Goal("", STEP, (OURS,), 1, 1, measure="gib").value(found) == Spread(*[2.0**-9] * 3)
    assert Goal("", STEP, (SLOW,), 1, 1, measure="gib").value(found) is None
    over = Goal("", STEP, (OURS,), 1 / 8, 1 / 12, over=SLOW)
    assert over.value(found) == found.ratio(found[OURS], found[SLOW])
    assert (over.bar_text, over.stretch_text) == ("≤ 1/8", "≤ 1/12")
    assert Goal("", STEP, (OURS,), 1, 1, over="missing").value(found) is None
    assert len({(g.title, g.measure, g.device) for g in GOALS}) == len(GOALS)


@pytest.mark.parametrize(("later", "regressed", "improved"), [(1.3, 1, 0), (1.11, 0, 0), (0.9, 0, 1)])
def test_a_regression_is_slower_by_more_than_the_noise(later: float, regressed: int, improved: int) -> None:
    found = changes(results(comparison(1.1)), results(comparison(later)))
    assert not found.missing
    (change,) = found.times
    assert change.ratio == pytest.approx(later / 1.1)
    assert (change.regressed, change.improved) == (regressed, improved)
    text = changes_table(found)
    assert ("(slower)" in text, "(faster)" in text) == (regressed, improved)
    assert (
        f"{1 - regressed - improved} of 1 ratios differ by no more than in two runs of the same code" in text
    )


def test_noise_of_both_runs_excuses_a_difference() -> None:
    quiet, noisy = (1.0,) * 5, (1.3,) * 5
    for before, after in ((quiet, noisy), (noisy, quiet)):
        (change,) = changes(results(comparison(1.0, before)), results(comparison(1.24, after))).times
        assert not change.regressed
        assert change.threshold > 0.24
    (change,) = changes(results(comparison(1.0, quiet)), results(comparison(1.24, quiet))).times
    assert change.regressed
    assert change.threshold == FLOOR


def test_what_is_no_longer_measured_is_said() -> None:
    before, after = results(comparison(), comparison(case="gone")), results(comparison())
    found = changes(before, after)
    assert (len(found.times), found.missing) == (1, (f"{STEP}: gone: {OURS}",))
    assert found.regressed
    assert f"No longer measured: {STEP}: gone: {OURS}" in changes_table(found)
    with pytest.raises(ValueError, match="expected two runs of one device, found 'Some CPU' and 'Some GPU'"):
        changes(before, results(gpu="Some GPU"))


def test_command_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "before.json", results(comparison(1.1)))
    slower = write(tmp_path / "slower.json", results(comparison(1.3)))
    assert main(["compare", str(before), str(before)]) == 0
    assert main(["compare", str(before), str(slower)]) == 1
    assert "(slower)" in capsys.readouterr().out
    assert main(["compare", str(slower), str(before)]) == 0
    other = write(tmp_path / "other.json", results(comparison(), gpu="Some GPU"))
    assert main(["compare", str(before), str(other)]) == 2
    assert capsys.readouterr().err.startswith("error: after: expected two runs of one device")
    assert main(["compare", str(before), str(tmp_path / "none.json")]) == 2
    assert "error: after: expected a file, found none at" in capsys.readouterr().err


def cases() -> list[Comparison]:
    """Something for every picture."""
    curves = [
        comparison(
            n / 100,
            group="interval clustering",
            case=f"{n} {k}",
            parameters={"cost": "deviation", "T": n, "k": k},
        )
        for n, k in ((100, 8), (1000, 8), (1000, 2))
    ]
    steps = [
        comparison(case=f"DiT, K = {k}", parameters={"title": "DiT", "k": k, "batch": 40}) for k in (2, 5)
    ]
    op = {"op": "gram", "dtype": "float32", "bytes": 500, "limit_bytes": 1000}
    return [*curves, *steps, comparison(group="fused ops", case="gram", parameters=op)]


def test_command_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = write(tmp_path / "a.json", results(*cases()))
    assert main(["report", str(file)]) == 0
    assert capsys.readouterr().out == report([results(*cases())]) + "\n"
    assert main(["report", str(file), "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out" / "a").iterdir()} == PLOTS.keys() == CAPTIONS.keys()
    assert (tmp_path / "out" / "report.md").read_text() == report([results(*cases())])
    assert all(path.stat().st_size > 1000 for path in (tmp_path / "out" / "a").iterdir())
    assert main(["report", str(tmp_path / "none.json")]) == 2


def test_only_what_was_measured_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw(machine(), tmp_path) == []
    assert [path.name for path in draw(machine(comparison()), tmp_path)] == ["step_ratios.png"]


README = "before\n<!-- figures: steps -->\nold\n<!-- end of figures -->\nafter\n"


def test_command_rewrites_the_marked_sections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, readme = write(tmp_path / "a.json", results(comparison())), tmp_path / "README.md"
    readme.write_text(README)
    assert main(["report", str(file), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text == rewrite(README, [results(comparison())])
    assert text.startswith(
        "before\n<!-- figures: steps -->\n| Some CPU, 2 threads, time / plain step | DiT |\n"
    )
    assert "| `diffmtl_fast` grouped, PCGrad | 1.10 (2.00) |" in text
    assert "old" not in text
    assert text.endswith("<!-- end of figures -->\nafter\n")
    assert rewrite(text, [results(comparison())]) == text
    readme.write_text("nothing marked")
    assert main(["report", str(file), "--readme", str(readme)]) == 2
    assert "expected a section" in capsys.readouterr().err


def test_sections_of_a_readme() -> None:
    def section(name: str, *found: Results) -> str:
        return rewrite(f"<!-- figures: {name} -->\n<!-- end of figures -->", found)

    assert "Nothing has been measured yet." in section("goals")
    assert "Nothing has been measured yet." in section("steps", results())
    both = results(comparison(1.2)), results(comparison(1.05), gpu="Some GPU", device="cuda")
    goals = section("goals", *both)
    assert "| 1.20 | 1.20 to 1.20 | short |" in goals
    assert "| ≤ 1.1 | ≤ 1.03 | 1.05 | 1.05 to 1.05 | met |" in goals
    assert "Some CPU, 2 threads (torch 2.13.0; 2026-01-02, commit 0123456789); Some GPU" in section(
        "machines", *both
    )
    with pytest.raises(ValueError, match=r"figures: expected one of steps, ops, .*, found nothing"):
        section("nothing", *both)


def test_section_of_the_ops() -> None:
    parameters = {"op": "gram", "dtype": "float32", "bytes": 30, "limit_bytes": 10}
    found = comparison(4.0, group="fused ops", case="memory: gram", parameters=parameters)
    text = rewrite("<!-- figures: ops -->\n<!-- end of figures -->", [results(found)])
    # Three times the bytes in four times the time, which is as long as the reference takes.
    assert "| gram | 0.75 (2.5e-07 of 3.33e-07) | 1.0 ≈ | – |" in text


def test_a_picture_of_its_own_section_is_not_among_the_others() -> None:
    links = {"docs/figures/a/step_growth.png": "growth", "docs/figures/a/roofline.png": "ops"}
    own = "<!-- figures: step_growth -->\n<!-- end of figures -->\n"
    rest = "<!-- figures: pictures -->\n<!-- end of figures -->"
    first, second = rewrite(own + rest, [], links).split("<!-- figures: pictures -->")
    assert "step_growth.png" in first
    assert "roofline.png" not in first
    assert "step_growth.png" not in second
    assert "roofline.png" in second


def test_ratios_are_finite() -> None:
    assert all(math.isfinite(goal.bar) and goal.bar > 0 for goal in GOALS)
    assert all(goal.stretch > 0 for goal in GOALS if not isinstance(goal.stretch, str))


def test_pictures_are_linked_from_where_they_are_shown(tmp_path: Path) -> None:
    (tmp_path / "docs" / "figures" / "a").mkdir(parents=True)
    (tmp_path / "docs" / "figures" / "a" / "roofline.png").touch()
    links = captions(tmp_path / "docs" / "figures", ["a", "b"], tmp_path / "docs")
    assert links == {"figures/a/roofline.png": CAPTIONS["roofline.png"]}
    text = rewrite("<!-- figures: pictures -->\n<!-- end of figures -->", [], links)
    assert f"![{CAPTIONS['roofline.png']}](figures/a/roofline.png)" in text
