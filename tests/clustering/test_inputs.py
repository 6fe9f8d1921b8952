import json

import numpy as np
import pytest

from diffmtl_fast.clustering import cluster_intervals
from diffmtl_fast.clustering.inputs import load_values, named_cost


def test_load_values(tmp_path):
    values = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "b.npy", values.astype(np.float32))
    (tmp_path / "c.json").write_text(json.dumps(values.tolist()))
    for name, dtype in (("a.npy", np.float64), ("b.npy", np.float32), ("c.json", np.float64)):
        found = load_values(tmp_path / name)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"1"),
        ("a.npy", b""),
        ("a.npy", b"junk"),
        ("a.npy", b"PK\x03\x04junk"),
        ("a.json", b'{"a": 1}'),
        ("a.json", b"[[1], 2]"),
    ],
)
def test_files_without_numbers_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: expected an array of numbers"):
        load_values(tmp_path / name)


@pytest.mark.parametrize("array", [np.array([1j]), np.array([b"1"]), np.array([True]), np.array(["1"])])
def test_arrays_of_something_else_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match="expected an array of numbers"):
        load_values(tmp_path / "a.npy")


def test_archives_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", np.ones(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="expected an array of numbers"):
        load_values(tmp_path / "a.npy")


def test_pickles_are_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match="expected an array of numbers"):
        load_values(tmp_path / "a.npy")


@pytest.mark.parametrize("name", ["timestep", "snr", "squared", "affinity"])
def test_named_cost(name):
    values = np.eye(12) if name == "affinity" else np.linspace(3, -3, 12) ** 3
    assert cluster_intervals(named_cost(name, values), k=3).k == 3


def test_bad_names_and_shapes():
    with pytest.raises(
        ValueError, match="cost: expected one of timestep, snr, squared, affinity, found 'l2'"
    ):
        named_cost("l2", np.zeros(3))
    with pytest.raises(ValueError, match=r"snr cost: expected one value per timestep, found shape \[2, 2\]"):
        named_cost("snr", np.zeros((2, 2)))
