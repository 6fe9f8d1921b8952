import json

import numpy as np
import pytest

from diffmtl_fast.clustering import (
    LogNormalSigma,
    UniformTime,
    cluster_intervals,
    cluster_snr,
    cluster_timesteps,
)
from diffmtl_fast.clustering.continuous import in_timesteps
from diffmtl_fast.clustering.inputs import load_affinity, load_values, named_clusters, named_cost


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


@pytest.mark.parametrize(("cost", "probabilities"), [("timestep", [0, 0.5, 1]), ("affinity", [0, 0.25, 1])])
def test_named_clusters_of_continuous_levels(cost, probabilities):
    affinity = np.kron(np.eye(4), np.ones((2, 2)))
    affinity[2:, 2:] = 1.0  # tasks in two blocks of 2 and 6
    found = named_clusters(cost, 2, affinity, distribution=UniformTime())
    assert found.probabilities.tolist() == probabilities
    assert in_timesteps(found, 8).boundaries.tolist() == [8 * share for share in probabilities]


def test_limits_of_named_clusters_are_shares_of_continuous_levels():
    given = {"distribution": LogNormalSigma(), "min_size": 3, "max_size": 4}
    found = named_clusters("snr", 3, np.arange(10.0), **given)
    shares = np.diff(found.probabilities)
    assert ((shares > 0.2999) & (shares < 0.4001)).all()


def test_named_clusters_of_timesteps():
    values = np.linspace(3, -3, 12) ** 3
    assert named_clusters("snr", 3, values, max_size=5) == cluster_snr(values, 3, max_size=5)
    assert named_clusters("timestep", "auto", values) == cluster_timesteps(12, "auto")


def test_affinities_of_another_number_of_timesteps_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(3))
    np.testing.assert_array_equal(load_affinity(tmp_path / "a.npy", 3), np.eye(3))
    with pytest.raises(ValueError, match=r"^expected \[T, T\] with T = 4, found \[3, 3\]"):
        load_affinity(tmp_path / "a.npy", 4)
    with pytest.raises(ValueError, match=r"^cannot read .*b\.npy"):
        load_affinity(tmp_path / "b.npy", 4)
