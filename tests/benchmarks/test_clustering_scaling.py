import numpy as np
import pytest

from benchmarks import clustering_scaling as scaling


@pytest.mark.parametrize("method", ["kmeans1d", "ruptures", "published"])
def test_peers_find_our_cost(method):
    if method != "published":
        pytest.importorskip(method)
    for n, k in ((30, 3), (60, 5)):
        assert abs(scaling.excess(method, scaling.normal(n), k)) < 1e-9


def test_total_is_the_definition():
    x = np.array([0.0, 1.0, 3.0, 10.0, 12.0])
    assert scaling.total("absolute", x, np.array([0, 3, 5])) == 5.0
    assert scaling.total("squared", x, np.array([0, 3, 5])) == pytest.approx(14 / 3 + 2)


def test_large_reports_time_and_memory():
    row = scaling.large(5000, 20, "squared")
    assert row["seconds"] > 0
    assert row["peak_gib"] >= row["before_gib"] > 0


def test_plot(tmp_path):
    rows = [
        {"method": m, "T": t, "k": k, "seconds": 1e-3 * t * k}
        for m in ("absolute", "kmeans1d")
        for t, k in ((100, 8), (1000, 8), (1000, 2), (1000, 4))
    ]
    pytest.importorskip("matplotlib")
    scaling.plot(rows, tmp_path / "docs" / "growth.png")
    assert (tmp_path / "docs" / "growth.png").stat().st_size > 1000
