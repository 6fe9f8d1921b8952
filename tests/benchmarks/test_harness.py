from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Candidate, GateError, compare, relative_error
from benchmarks.report import Spread


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


def test_rounds_run_every_candidate_and_the_yardstick_twice() -> None:
    yardstick, other = Counter(), Counter()
    result = compare([Candidate("base", yardstick), Candidate("other", other)], rounds=5, warmup=1)
    assert (yardstick.calls, other.calls) == (1 + 2 * 5, 1 + 5)
    assert [way.name for way in result.ways] == ["base", "other"]
    assert result.ratio(result["base"]) == Spread(1.0, 1.0, 1.0)
    assert result.rounds == 5


@pytest.mark.parametrize("error", [0.2, float("nan")])
def test_nothing_is_timed_behind_a_red_gate(error: float) -> None:
    yardstick, other = Counter(), Counter()
    wrong = Candidate("wrong", other, lambda: error, tolerance=0.1)
    with pytest.raises(GateError, match=r"wrong: expected a relative error <= 0.1, found"):
        compare([Candidate("base", yardstick), wrong], rounds=3)
    assert yardstick.calls == other.calls == 0


def test_without_a_yardstick_nothing_is_timed() -> None:
    peer = Candidate("base", Counter(), lambda: 1.0, tolerance=0.5, peer=True)
    with pytest.raises(GateError, match="case: expected a yardstick, found base: expected"):
        compare([peer, Candidate("other", Counter())], rounds=1, case="case")


def test_ratios_are_those_within_a_round() -> None:
    # The machine slows down tenfold half-way; the other always takes twice the yardstick's time.
    base, other = Counter(), Counter()

    def slow_clock(run: object, repeats: int) -> float:
        assert isinstance(run, Counter)
        run()
        load = 1.0 if other.calls + base.calls <= 15 else 10.0
        return load * (2.0 if run is other else 1.0)

    candidates = [Candidate("base", base), Candidate("other", other)]
    result = compare(candidates, rounds=10, warmup=0, clock=slow_clock)
    assert result.ratio(result["other"]) == Spread(2.0, 2.0, 2.0)
    assert result.repeat == Spread(1.0, 1.0, 1.0)
    assert result.noise == 0.0
    assert result["other"].time.high == 20.0


def test_short_work_is_repeated() -> None:
    turns: list[tuple[str, int]] = []

    def clock(run: Callable[[], object], repeats: int) -> float:
        turns.append((str(run()), repeats))
        return 0.4 if run() == "slow" else 0.03

    slow, fast = Candidate("slow", lambda: "slow"), Candidate("fast", lambda: "fast")
    compare([slow, fast], rounds=1, clock=clock, least=0.1)
    assert turns[:2] == [("slow", 1), ("fast", 1)]
    assert sorted(turns[2:]) == [("fast", 4), ("slow", 1), ("slow", 1)]


@pytest.mark.parametrize(("grace", "runs"), [(0.0, [6, 3, 1]), (50.0, [6, 6, 3])])
def test_slow_ways_sit_rounds_out(grace: float, runs: list[int]) -> None:
    slow, slower, base = Counter(), Counter(), Counter()
    price = {base: 1.0, slow: 4.0, slower: 24.0}

    def clock(run: object, repeats: int) -> float:
        assert isinstance(run, Counter)
        run()
        return price[run]

    candidates = [Candidate("base", base), Candidate("slow", slow), Candidate("slower", slower)]
    result = compare(candidates, 6, warmup=0, clock=clock, allowance=2.0, grace=grace)
    # Without grace taken part in: 0 (4 > 2), 2 (8 > 6), 4; and 0 alone.
    assert [len(way.seconds) for way in result.ways] == runs
    if not grace:
        assert result["slow"].turns == (0, 2, 4)
    assert [result.ratio(way).median for way in result.ways] == [1.0, 4.0, 24.0]
    assert result.repeat == Spread(1.0, 1.0, 1.0)


def test_what_a_turn_takes_counts_not_what_a_repeat_takes() -> None:
    # Repeated until both take 0.1 s a turn, neither has to sit out.
    price = {"quick": 1e-4, "slow": 1e-1}
    quick, slow = Candidate("quick", lambda: "quick"), Candidate("slow", lambda: "slow")

    def clock(run: Callable[[], object], repeats: int) -> float:
        return price[str(run())]

    result = compare([quick, slow], rounds=5, clock=clock, least=0.1, allowance=2.0)
    assert len(result["slow"].seconds) == 5


def test_a_round_is_announced_and_notes_are_taken() -> None:
    turns: list[int] = []
    noted = Candidate("noted", Counter(), begin=turns.append, notes=lambda: {"turns": len(turns)})
    result = compare(
        [Candidate("base", Counter()), noted], rounds=3, roles={"base": "limit", "noted": "peer"}
    )
    assert turns == [0, 1, 2]
    assert result["noted"].notes == {"turns": 3}
    assert [way.role for way in result.ways] == ["limit", "peer"]


def test_peers_that_fail_are_left_out_with_the_reason() -> None:
    def broken() -> float:
        raise RuntimeError("no a|b\nmore")

    peers = [
        Candidate("wrong", Counter(), lambda: 1.0, tolerance=0.5, peer=True),
        Candidate("broken", Counter(), broken, peer=True),
        Candidate("right", Counter(), lambda: 0.25, tolerance=0.5, peer=True),
    ]
    result = compare([Candidate("base", Counter()), *peers], rounds=1, parameters={"k": 5})
    assert [(way.name, way.error) for way in result.ways] == [("base", None), ("right", 0.25)]
    assert result.left_out == {
        "wrong": "wrong: expected a relative error <= 0.5, found 1",
        "broken": r"RuntimeError: no a\|b",
    }
    assert result.parameters == {"k": 5}
    with pytest.raises(RuntimeError, match="no a"):
        compare([Candidate("base", Counter()), Candidate("ours", Counter(), broken)], rounds=1)


def test_what_is_wrong_with_a_refused_peer_is_said() -> None:
    def notes() -> dict[str, object]:
        return {"faults": ["rounds half to even", "begins early"]}

    def unknown() -> dict[str, object]:
        raise ValueError("no such thing")

    found = compare(
        [
            Candidate("yardstick", lambda: None),
            Candidate("theirs", lambda: None, lambda: 0.5, 0.1, peer=True, notes=notes),
            Candidate("others", lambda: None, lambda: 0.5, 0.1, peer=True, notes=unknown),
        ],
        rounds=1,
    )
    refused = "expected a relative error <= 0.1, found 0.5"
    assert found.left_out == {
        "theirs": f"theirs: {refused}; rounds half to even; begins early",
        "others": f"others: {refused}; its faults are not known: ValueError: no such thing",
    }


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_the_machine_is_described_without_its_name(device: torch.device) -> None:
    import platform

    found = harness.environment(device)
    assert found["versions"]["torch"] == torch.__version__
    assert (found["gpu"] is None) == (device.type == "cpu")
    assert platform.node() not in [str(value) for value in found.values()]
    assert not any("/" in str(value) for value in found.values())
    assert harness.commit().keys() == {"id", "modified"}
