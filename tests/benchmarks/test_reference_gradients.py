from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.reference import cluster_gradients, cluster_means


def _losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ((model(x) - y) ** 2).mean(1)


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Unsorted, unequal clusters; cluster 2 of 4 is absent."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = (torch.randn(7, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    return model, x, y, torch.tensor([3, 0, 1, 0, 3, 3, 0])


def test_jacobian_equals_central_differences(problem: tuple[nn.Module, Tensor, Tensor, Tensor]) -> None:
    model, x, y, cluster = problem
    parameters = list(model.parameters())
    gradients = cluster_gradients(_losses(model, x, y), cluster, parameters, 4)

    def means() -> Tensor:
        losses = _losses(model, x, y)
        return torch.stack([losses[cluster == k].mean() for k in (0, 1, 3)])

    columns, step = [], 1e-6
    with torch.no_grad():
        for parameter in parameters:
            flat = parameter.view(-1)
            for i in range(len(flat)):
                value = flat[i].item()
                flat[i] = value + step
                above = means()
                flat[i] = value - step
                columns.append((above - means()) / (2 * step))
                flat[i] = value
    torch.testing.assert_close(gradients.jacobian[[0, 1, 3]], torch.stack(columns, 1), rtol=1e-6, atol=1e-9)


def test_absent_cluster_is_a_zero_row(problem: tuple[nn.Module, Tensor, Tensor, Tensor]) -> None:
    model, x, y, cluster = problem
    losses = _losses(model, x, y)
    gradients = cluster_gradients(losses, cluster, list(model.parameters()), 4)
    assert gradients.present.tolist() == [True, True, False, True]
    assert gradients.jacobian[2].count_nonzero() == 0
    assert gradients.losses[2] == 0
    assert cluster_means(losses, cluster, 4)[2] is None
    torch.testing.assert_close(gradients.losses[0], losses.detach()[[1, 3, 6]].mean())


def test_unused_parameter_has_a_zero_gradient() -> None:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    losses = used.sum() * torch.tensor([1.0, 2.0])
    gradients = cluster_gradients(losses, torch.tensor([0, 1]), [used, unused], 2)
    assert gradients.jacobian.tolist() == [[1, 1, 0, 0, 0], [2, 2, 0, 0, 0]]
