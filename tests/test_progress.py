"""Progress: what reaches the terminal."""

from __future__ import annotations

import re

from diffmtl_fast import _progress
from diffmtl_fast._progress import BarProgress, LineProgress, NoProgress, open_progress


def test_no_terminal_gets_plain_lines(capsys):
    progress = open_progress(20, 5, unit="task")
    assert isinstance(progress, LineProgress)
    progress.update(6)
    progress.close()
    assert capsys.readouterr().out == ""  # nothing new to say
    progress.update(9, "first")
    progress.update(10, "second")
    progress.close()
    assert re.fullmatch(r"10/20  [\d.]+ task/s  second\n", capsys.readouterr().out)


def test_lines_are_printed_when_it_is_time(capsys, monkeypatch):
    monkeypatch.setattr(_progress, "SECONDS_BETWEEN_LINES", 0.0)
    progress = LineProgress(3, 0, "it")
    for done in (1, 2):
        progress.update(done, f"news {done}")
    progress.close()
    assert [line[-6:] for line in capsys.readouterr().out.splitlines()] == ["news 1", "news 2"]


def test_a_terminal_gets_a_bar(capsys):
    progress = BarProgress(20, 5)
    progress.update(9, "fine")
    progress.update(10)
    progress.close()
    assert re.search(r"10/20 .*fine", capsys.readouterr().out)


def test_silence(capsys):
    progress = NoProgress()
    progress.update(1, "news")
    progress.close()
    assert capsys.readouterr().out == ""
