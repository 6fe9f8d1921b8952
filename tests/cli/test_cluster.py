"""What `diffmtl-fast cluster` prints."""

from __future__ import annotations

import json

import numpy as np

from diffmtl_fast.cli.cluster import as_json, table
from diffmtl_fast.clustering import IntervalClustering

CLUSTERS = IntervalClustering([0, 2, 12], 1.5)


def test_table():
    expected = (
        "cluster  timesteps  size     log-SNR\n"
        "      0        0–1     2     11 … 10\n"
        "      1       2–11    10  9 … -0.125\n"
        "cost 1.5"
    )
    assert table(CLUSTERS, np.append(np.arange(11, 0, -1.0), -0.125)) == expected


def test_json():
    state = json.loads(as_json(CLUSTERS, scheduler="linear"))
    assert state == {"scheduler": "linear", "k": 2, "sizes": [2, 10], "boundaries": [0, 2, 12], "cost": 1.5}
