"""What the host knows of clusters it has sent; tensors on the meta device have no values that could be read."""

from __future__ import annotations

import gc

import pytest
import torch

from diffmtl_fast import _host
from diffmtl_fast._host import known_counts, upload, upload_clusters

META = torch.device("meta")
CLUSTER = torch.tensor([0, 0, 2, 2, 2])


def test_counts_are_known_of_the_very_tensor_alone():
    cluster = upload_clusters(CLUSTER, META)
    assert (cluster.device, cluster.shape, cluster.dtype) == (META, (5,), torch.int64)
    assert known_counts(cluster) == [2, 0, 3]
    for other in (cluster[:], cluster.clone(), cluster[:3], cluster.view(5), torch.empty_like(cluster)):
        assert known_counts(other) is None


@pytest.mark.parametrize("write", [lambda c: c.add_(1), lambda c: c[:2].zero_()])
def test_clusters_that_were_written_to_are_unknown(write):
    cluster = upload_clusters(CLUSTER, META)
    write(cluster)
    assert known_counts(cluster) is None


def test_writes_are_told_only_where_they_are_counted():
    with torch.inference_mode():
        assert known_counts(upload_clusters(CLUSTER, META)) is None


def test_what_stays_on_the_host_is_read_there():
    assert upload_clusters(CLUSTER, CLUSTER.device) is CLUSTER
    assert known_counts(CLUSTER) is None


def test_knowledge_ends_with_the_tensor():
    gc.collect()
    before = len(_host._counts)
    cluster = upload_clusters(CLUSTER, META)
    assert len(_host._counts) == before + 1
    del cluster
    gc.collect()
    assert len(_host._counts) == before


def test_upload_keeps_values(device):
    for there, back in ((device, "cpu"), ("cpu", device)):
        values = torch.arange(6, device=back).view(2, 3).T
        uploaded = upload(values, torch.device(there))
        assert uploaded.device.type == torch.device(there).type
        assert uploaded.tolist() == values.tolist()
