"""The Gramian of rows that come in blocks, against one product in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffmtl_fast.analysis import rows as module
from diffmtl_fast.analysis.rows import Rows, cosines, gram


@pytest.mark.parametrize("columns", [1, 30, 10**6])
@pytest.mark.parametrize("panel", [1, 3, 256])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gram_in_panels_and_columns(columns, panel, dtype, monkeypatch, device):
    monkeypatch.setattr(module, "_COLUMNS", columns)
    monkeypatch.setattr(module, "_PANEL", panel)
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((7, 25)).astype(dtype)
    found = gram([whole[:2], whole[2:3], whole[3:]], device)
    expected = whole.astype(np.float64) @ whole.astype(np.float64).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 if dtype == np.float32 else 1e-13)
    assert (found == found.T).all()


def test_cosines():
    rows = np.array([[3.0, 4.0], [-8.0, 6.0], [-3.0, -4.0], [0.0, 0.0]])
    found = cosines(rows @ rows.T)
    np.testing.assert_array_equal(found[:3, :3], [[1, 0, -1], [0, 1, 0], [-1, 0, 1]])
    assert np.isnan(found[3]).all()
    assert np.isnan(found[:, 3]).all()


@pytest.mark.parametrize("in_files", [False, True])
def test_blocks_come_back_as_they_went(in_files, tmp_path):
    folder = tmp_path / "rows" if in_files else None
    rows = Rows(folder)
    values = torch.arange(12.0).view(4, 3)
    assert not rows.has(0)
    rows.put(2, values[2:])
    rows.put(0, values[:2])
    assert rows.has(2)
    np.testing.assert_array_equal(np.concatenate(rows.blocks([0, 2])), values.numpy())
    if in_files:
        (folder / ".tmp-1-rows-00000004.npy").write_bytes(b"half")  # of a killed process
        again = Rows(folder)
        assert again.has(0)
        assert not again.has(4)
        np.testing.assert_array_equal(again.blocks([2])[0], values[2:].numpy())
        assert len(list(folder.iterdir())) == 2
    rows.clear()
    assert not rows.has(0)
