import json

import numpy as np
import pytest

from diffmtl_fast.clustering import IntervalClustering, cluster_intervals, cluster_path
from diffmtl_fast.clustering.report import as_dict, load_values, named_cost, plot_path, table

CLUSTERS = IntervalClustering([0, 2, 12], 1.5)


def test_table():
    expected = (
        "cluster  timesteps  size     log-SNR\n"
        "      0        0–1     2     11 … 10\n"
        "      1       2–11    10  9 … -0.125\n"
        "cost 1.5"
    )
    values = np.append(np.arange(11, 0, -1.0), -0.125)
    assert table(CLUSTERS, values) == expected
    assert table(CLUSTERS).splitlines()[0] == "cluster  timesteps  size"


def test_dict_is_json():
    state = json.loads(json.dumps(as_dict(CLUSTERS, scheduler="linear")))
    assert state == {"scheduler": "linear", "k": 2, "sizes": [2, 10], "boundaries": [0, 2, 12], "cost": 1.5}


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


def test_plot_shows_the_choice(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    path = cluster_path(named_cost("timestep", np.arange(30.0)), 9)
    axes = figure.subplots()
    plot_path(path, axes)
    curve, chosen = axes.lines
    np.testing.assert_array_equal(curve.get_ydata(), path.costs)
    assert chosen.get_xdata() == [path.chosen.k]
    plot_path(path, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
