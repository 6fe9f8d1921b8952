"""The layout of a batch: read from its clusters, or known from the sampler without reading them."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm
from diffmtl_fast._host import upload_clusters
from diffmtl_fast.gradients.batch import BatchLayout, check_cluster

META = torch.device("meta")


def known(*cluster):
    """Clusters that nothing can be read of."""
    return upload_clusters(torch.tensor(cluster), META)


@pytest.mark.parametrize(
    ("cluster", "bounds"),
    [([0, 0, 1, 2, 2], (0, 2, 3, 5, 5)), ([1, 1], (0, 0, 2, 2, 2)), ([3], (0, 0, 0, 0, 1))],
)
def test_sorted_batches(cluster, bounds, device):
    for layout in (BatchLayout(torch.tensor(cluster, device=device), 4), BatchLayout(known(*cluster), 4)):
        assert layout.clusters.bounds == bounds
        assert layout.whole.bounds == (0, len(cluster))
        assert layout.batch_size == len(cluster)
        assert layout.order is None


def test_unsorted_batches(device):
    layout = BatchLayout(torch.tensor([2, 0, 2, 0, 1], device=device), 4)
    assert layout.clusters.bounds == (0, 2, 3, 5, 5)
    assert layout.order.tolist() == [1, 3, 4, 0, 2]


@pytest.mark.parametrize("cluster", [[1, 4], [-1, 0], [7, 1]])
def test_clusters_out_of_range(cluster, device):
    message = rf"cluster: expected indices in 0\.\.3, found {min(cluster)}\.\.{max(cluster)}"
    with pytest.raises(ValueError, match=message):
        BatchLayout(torch.tensor(cluster, device=device), 4)
    with pytest.raises(ValueError, match=message):
        check_cluster(torch.tensor(cluster), 4)


def test_known_clusters_out_of_range():
    for check in (BatchLayout, check_cluster):
        with pytest.raises(ValueError, match=r"cluster: expected indices in 0\.\.1, found 1\.\.2"):
            check(known(1, 2), 2)


def test_what_only_the_device_knows_is_not_read_by_the_check():
    check_cluster(torch.tensor([5], device="meta"), 2)


def test_the_wrapper_takes_what_a_sampler_drew_and_refuses_other_numbers_of_clusters():
    """Without reading: the tensor has no values."""
    _, cluster = dm.cluster_timesteps(20, 5).sample(10, device="meta")
    mtl = dm.ClusteredMTL(torch.nn.Linear(2, 2), num_clusters=3, weighting=dm.PCGrad())
    with pytest.raises(ValueError, match=r"cluster: expected indices in 0\.\.2, found 0\.\.4"):
        mtl(torch.zeros(10, 2), cluster=cluster)
    mtl = dm.ClusteredMTL(torch.nn.Linear(2, 2), num_clusters=5, weighting=dm.PCGrad())
    assert mtl(torch.zeros(10, 2), cluster=cluster).shape == (10, 2)
