"""ClusterJacobian against one torch.autograd.grad per cluster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.reference import cluster_gradients
from diffmtl_fast.gradients import ClusterJacobian

K = 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(9, 4), nn.Linear(2, 4), nn.Linear(4, 2)
        self.unused = nn.Linear(1, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x) + self.embed(t))) * self.frozen


def make(device, dtype=torch.float64):
    torch.manual_seed(0)
    model = Net().to(device, dtype)
    x, t = torch.randn(6, 2, device=device, dtype=dtype), torch.arange(6, device=device)
    return model, x, t


def oracle(model, x, t, cluster):
    losses = (model(x, t) - x).square().sum(1)
    return cluster_gradients(losses, cluster, [p for p in model.parameters() if p.requires_grad], K)


@pytest.mark.parametrize("engine", ["grouped", "sliced"])
@pytest.mark.parametrize("cluster", [[0, 0, 1, 1, 2, 2], [2, 0, 0, 2, 2, 0]], ids=["sorted", "absent"])
def test_rows_are_the_gradients_of_the_cluster_means(engine, cluster, device):
    model, x, t = make(device)
    cluster = torch.tensor(cluster, device=device)
    jacobian = ClusterJacobian(model, K, engine=engine)
    for _ in range(2):  # the second call starts anew
        losses = jacobian(lambda run: (run(x, t) - x).square().sum(1), cluster)
    expected = oracle(model, x, t, cluster)
    torch.testing.assert_close(jacobian.matrix(), expected.jacobian)
    torch.testing.assert_close(losses, expected.losses)
    assert all(p.grad is None for p in model.parameters())


def test_calls_add_up_where_asked(device):
    model, x, t = make(device)
    jacobian, total = ClusterJacobian(model, K), 0
    for i, cluster in enumerate(torch.tensor([[0, 0, 1, 1, 1, 1], [2, 0, 0, 2, 2, 2]], device=device)):
        jacobian(lambda run: (run(x, t) - x).square().sum(1), cluster, add=i > 0)
        total = total + oracle(model, x, t, cluster).jacobian
    torch.testing.assert_close(jacobian.matrix(), total)


def test_the_first_rows_go_where_they_are_wanted(device):
    model, x, t = make(device)
    jacobian, cluster = ClusterJacobian(model, K), torch.tensor([0, 0, 1, 1, 2, 2], device=device)
    jacobian(lambda run: (run(x, t) - x).square().sum(1), cluster)
    expected = jacobian.matrix()
    whole = torch.zeros(4, expected.shape[1] + 2, dtype=torch.float32, device=device)
    out = whole[1:3, 1:-1]
    assert jacobian.matrix(out) is out
    torch.testing.assert_close(out, expected[:2].float())
    assert not whole[[0, 3]].any()
    assert not whole[:, [0, -1]].any()


@pytest.mark.parametrize("shape", [(K + 1, 62), (2, 61), (2, 63), (62,)], ids=str)
def test_a_place_of_another_shape_is_refused(shape, device):
    model, x, t = make(device)
    jacobian, cluster = ClusterJacobian(model, K), torch.tensor([0, 0, 1, 1, 2, 2], device=device)
    jacobian(lambda run: (run(x, t) - x).square().sum(1), cluster)
    width = jacobian.matrix().shape[1]
    assert width == 62
    with pytest.raises(ValueError, match=rf"out: expected shape \[n, 62\], n <= {K}, found"):
        jacobian.matrix(torch.empty(shape, device=device))
    with pytest.raises(TypeError, match=r"out: expected floating point, found torch\.int64"):
        jacobian.matrix(torch.zeros(2, 62, dtype=torch.int64, device=device))


def test_gradients_are_formed_where_they_are_disabled(device):
    model, x, t = make(device)
    jacobian, cluster = ClusterJacobian(model, K), torch.tensor([0, 0, 1, 1, 2, 2], device=device)
    with torch.no_grad():
        jacobian(lambda run: (run(x, t) - x).square().sum(1), cluster)
    torch.testing.assert_close(jacobian.matrix(), oracle(model, x, t, cluster).jacobian)


def test_bad_input_is_refused(device):
    model, x, t = make(device)
    cluster = torch.tensor([0, 0, 1, 1, 2, 2], device=device)
    with pytest.raises(ValueError, match="num_clusters: expected at least 1, found 0"):
        ClusterJacobian(model, 0)
    jacobian = ClusterJacobian(model, K)
    with pytest.raises(TypeError, match="cluster: expected an int64 tensor"):
        jacobian(lambda run: (run(x, t) - x).square().sum(1), cluster.int())
    with pytest.raises(ValueError, match=r"loss: expected per-sample losses of shape \[6\]"):
        jacobian(lambda run: (run(x, t) - x).square().mean(), cluster)
    with pytest.raises(
        ValueError, match="loss: expected it to call the model that it is given, found that it did"
    ):
        jacobian(lambda run: (model(x, t) - x).square().sum(1), cluster)
    with pytest.raises(
        ValueError, match=r"engine: expected one of \['auto', 'grouped', 'sliced'\], found 'x'"
    ):
        ClusterJacobian(model, K, engine="x")
    with pytest.raises(ValueError, match="found one without gradient"):
        jacobian(lambda run: x.sum(1), cluster)
