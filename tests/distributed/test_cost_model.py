"""The estimates of docs/scale.md: bytes are those that real steps exchange."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fully_sharded_programs import bytes_by_mode
from programs import K

from diffmtl_fast.distributed.cost_model import Cluster, Job, cost, draw

EVERYWHERE, ONE_EACH, TWO_EACH = [[0, 1, 2, 3, 4]] * 4, [[2], [0], [4], [2]], [[2, 0], [0], [4, 3], [2]]
TWO_TWO = [[2, 0], [0, 1], [4, 3], [2, 4]]


@pytest.mark.parametrize(
    ("mode", "layout", "kind", "ranks"),
    [
        ("plain replicated", EVERYWHERE, "", 2),
        ("replicated", EVERYWHERE, "", 2),
        ("replicated", EVERYWHERE, "", 4),
        ("cluster-parallel", ONE_EACH, "", 2),
        ("cluster-parallel", TWO_TWO, "", 4),
        ("plain sharded", EVERYWHERE, "fsdp", 2),
        ("plain sharded", EVERYWHERE, "hsdp", 4),
        ("sharded", EVERYWHERE, "fsdp", 4),
        ("sharded", ONE_EACH, "fsdp", 4),
        ("sharded", TWO_EACH, "fsdp", 4),
        ("sharded", EVERYWHERE, "hsdp", 4),
        ("sharded", ONE_EACH, "hsdp", 4),
    ],
)
def test_bytes_are_those_of_real_steps(on_ranks, mode, layout, kind, ranks):
    most = max(len(set(clusters)) for clusters in layout[:ranks])
    for gradients, gathers, parameters, kept in on_ranks(ranks, bytes_by_mode, mode, layout[:ranks], kind):
        job = Job(parameters, K, ranks, 2 if kind == "hsdp" else 1, most, kept=kept)
        found = cost(mode, job)
        assert gradients == pytest.approx(found.gradients, rel=0.02)
        assert gathers == pytest.approx(found.gathers, rel=0.02)


def test_ratios_that_are_stated():
    """A rank with one cluster moves what plain training moves; replicas (K + 1)/2 of it."""
    for size in (2, 8, 64, 4096):
        job = Job(675_000_000, K, size)
        plain = cost("plain replicated", job).bytes_sent
        assert cost("replicated", job).bytes_sent / plain == pytest.approx((K + 1) / 2)
        assert cost("cluster-parallel", job).bytes_sent == pytest.approx(plain)
        assert cost("sharded", job).bytes_sent == cost("plain sharded", job).bytes_sent
        several = Job(675_000_000, K, size, on_a_rank=K)
        assert cost("sharded", several).bytes_sent == K * cost("plain sharded", job).bytes_sent


def test_shards_need_less_memory_and_large_groups_more_time():
    jobs = [Job(675_000_000, K, size) for size in (8, 64, 512, 4096)]
    memory = [cost("sharded", job).memory for job in jobs]
    assert memory == sorted(memory, reverse=True)
    assert memory[-1] > cost("plain sharded", jobs[-1]).memory
    seconds = [cost("replicated", job).seconds for job in jobs]
    assert seconds == sorted(seconds)
    # With no latency the time of an exchange is that of its bytes.
    ideal = Cluster(latency=0.0, message=0.0)
    found = cost("cluster-parallel", jobs[-1], ideal)
    assert found.seconds == pytest.approx(jobs[-1].compute + found.bytes_sent / 2 / ideal.between)


@pytest.mark.parametrize(
    "job", [Job(0, K, 2), Job(10, K, 0), Job(10, K, 2, on_a_rank=K + 1), Job(10, K, 4, replicas=3)]
)
def test_jobs_that_cannot_be(job):
    with pytest.raises(ValueError, match=r"job: expected .*, found Job"):
        cost("sharded", job)


def test_the_table_of_times():
    page = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[0]) for row in rows] == [8, 64, 512, 4096]
    for size, *stated in rows:
        number = int(size)
        modes = [("plain replicated", 1, 1), ("replicated", 5, 1), ("cluster-parallel", 1, 1)]
        modes += [("plain sharded", 1, 1), ("sharded", 5, 1), ("sharded", 1, 1)]
        modes += [("sharded", 5, number // 8), ("sharded", 1, number // 8)]
        for text, (mode, clusters, replicas) in zip(stated, modes, strict=True):
            found = cost(mode, Job(675_000_000, 5, number, replicas, clusters))
            assert int(text) == round(1e3 * found.seconds)


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="mode: expected one of"):
        cost("by hand", Job(10, K, 2))


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw(tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
