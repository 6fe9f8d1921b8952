"""The Gramian of rows that come in blocks, against one product in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffmtl_fast.analysis import rows as module
from diffmtl_fast.analysis.rows import Rows, cosines, gram


@pytest.mark.parametrize("columns", [1, 30, 10**6])
@pytest.mark.parametrize("cuts", [(), (2, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gram_of_blocks_by_columns(columns, cuts, dtype, monkeypatch, device):
    monkeypatch.setattr(module, "_COLUMNS", columns)
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((7, 25)).astype(dtype)
    found = gram(np.split(whole, cuts), device)
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
    memory = torch.empty(2 if in_files else 5, 3)
    rows = Rows(folder, memory)
    values = torch.arange(15.0).view(5, 3)
    assert not rows.has(0)
    rows.put(2, values[2:4])
    rows.put(0, values[:2])
    assert rows.has(2)
    assert not rows.has(4)
    rows.vacant(4, 1).copy_(values[4:])
    assert not rows.has(4)  # before it is put
    place = rows.vacant(4, 1)
    rows.put(4, place.copy_(values[4:]))
    np.testing.assert_array_equal(np.concatenate(rows.blocks([0, 2, 4])), values.numpy())
    if in_files:
        (folder / ".tmp-1-rows-00000006.npy").write_bytes(b"half")  # of a killed process
        again = Rows(folder, torch.empty(2, 3))
        assert again.has(0)
        assert not again.has(6)
        np.testing.assert_array_equal(again.blocks([2])[0], values[2:4].numpy())
        assert len(list(folder.iterdir())) == 3
    rows.clear()
    assert not rows.has(0)
