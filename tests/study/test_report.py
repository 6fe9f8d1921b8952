"""The report: complete, of the stored results alone, and able to do with a part of them."""

from __future__ import annotations

import json
import re

import pytest

from diffmtl_fast._errors import UserError
from diffmtl_fast.study.report import write_report


def test_report(study, tmp_path):
    picture = study.affinity.with_name("convergence.png")
    picture.write_bytes(b"\x89PNG of the analyses")
    path = write_report(study, tmp_path / "out" / "study")
    text = path.read_text()
    for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text):
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG")
    assert "| UW, log-SNR clusters | 3 |" in text
    assert "| nash | 1.500 | 1.500 to 1.500 |" in text
    assert "| PCGrad, log-SNR clusters | 30.0 ± 0.0 |" in text  # conflicting pairs
    assert "| curriculum | 6, 6, 6 |" in text
    assert "(training-curriculum.png)" in text
    assert "(convergence.png)" in text
    assert "(samples.png)" not in text  # there is no checkpoint
    assert "| UW, log-SNR clusters | 0.50 (" in text
    assert "| × 1.0" in text
    assert "| curriculum / anti-curriculum | 0.50 (" in text
    assert "runs are missing" not in text
    assert "nan" not in text
    results = json.loads((path.parent / "results.json").read_text())
    assert len(results["runs"]) == 36
    assert results["runs"]["nash-snr-seed-0"]["calibrated"] == pytest.approx([3.0, 6.0, 12.0])


def test_report_of_a_part(study, tmp_path):
    for path in study.path.glob("evaluations/*.json"):
        if path.name != "vanilla-seed-1.json":
            path.unlink()
    study.calibration.unlink()
    study.affinity.unlink()
    for seed in range(3):
        study.gaps(seed).unlink()
    text = write_report(study, tmp_path / "out").read_text()
    assert "**35 of 36 runs are missing.**" in text
    assert "Not calibrated" in text
    for path in study.path.glob("evaluations/*.json"):
        path.unlink()
    with pytest.raises(UserError, match="expected a complete run of plain training"):
        write_report(study, tmp_path / "out")
