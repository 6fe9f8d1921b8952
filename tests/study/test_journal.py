"""The record of a study's work: what it took, pauses left out."""

from __future__ import annotations

import pytest

from diffmtl_fast.study import journal


def test_elapsed_time_leaves_pauses_out(tmp_path):
    path = tmp_path / "journal.jsonl"
    assert journal.read(path) == journal.Journal()
    journal.add_command(path, "study --seeds 3")
    journal.add_work(path, "a", 100.0, 10.0)
    journal.add_work(path, "b", 104.0, 3.0)  # beside a, and done before it
    journal.add_work(path, "c", 108.0, 7.0)
    for _ in range(2):
        journal.add_command(path, "study --jobs 4")
    journal.add_work(path, "d", 1000.0, 5.0)
    found = journal.read(path)
    assert found.commands == ["study --seeds 3", "study --jobs 4"]
    assert found.elapsed == pytest.approx(15.0 + 5.0)
    assert found.work == pytest.approx(25.0)
