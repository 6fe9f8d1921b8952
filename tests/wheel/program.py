"""What a wheel must do where it and PyTorch are all there is: ``python -I program.py`` outside a checkout."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import platform
import sys

import numba
import torch

import diffmtl_fast as dm
from diffmtl_fast._native import _C


def check_package() -> None:
    """It is the installed one, complete, and has one version."""
    files = importlib.resources.files("diffmtl_fast")
    assert "site-packages" in str(files), files
    for name in ("py.typed", "train/configs/digits.yaml", "study/digits.yaml", "kernels/losses.py"):
        assert files.joinpath(name).is_file(), name
    assert importlib.metadata.version("diffmtl-fast") == dm.__version__


def check_clustering() -> None:
    """The stated optimum, and a cost of the user's own, which numba compiles."""
    assert dm.cluster_timesteps(1000, 5).boundaries.tolist() == [0, 200, 400, 600, 800, 1000]

    @numba.njit
    def cost(left: int, right: int) -> float:
        return float((right - left + 1) ** 2)

    found = dm.cluster_intervals(cost, 60, 3)
    assert found.boundaries.tolist() == [0, 20, 40, 60], found


def check_kernels() -> None:
    """Every instruction set of this processor computes what the plain definitions do."""
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 5e-2)):
        pred, target, jacobian = (
            torch.randn(shape, generator=generator).to(dtype) for shape in ((8, 333), (8, 333), (5, 333))
        )
        for name in _C.cpu_kernels():
            _C.cpu_select_kernels(name)
            mse = (pred.double() - target.double()).square().mean(1)
            torch.testing.assert_close(dm.ops.sample_mse(pred, target).double(), mse, rtol=tolerance, atol=0)
            gramian = jacobian.double() @ jacobian.double().T
            torch.testing.assert_close(
                dm.ops.gram(jacobian).double(), gramian, rtol=tolerance, atol=tolerance
            )
    _C.cpu_select_kernels(None)


def check_training() -> None:
    """Cluster gradients are those of one backward per cluster, in both engines, and a step lowers the loss."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 16))
    x, noise, cluster = torch.randn(20, 16), torch.randn(20, 16), torch.arange(20) % 5
    rows = []
    for k in range(5):
        loss = (model(x) - noise).square().mean(1)[cluster == k].mean()
        rows.append(torch.cat([g.ravel() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    expected = torch.stack(rows) @ torch.stack(rows).T
    for engine in ("grouped", "sliced"):
        mtl = dm.ClusteredMTL(model, num_clusters=5, weighting=dm.NashMTL(), engine=engine)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        loss = dm.ops.sample_mse(mtl(x, cluster=cluster), noise)
        mtl.backward(loss)
        torch.testing.assert_close(mtl.last.gramian, expected.double(), rtol=1e-4, atol=1e-6)
        if engine == "sliced":
            optimizer.step()
            assert dm.ops.sample_mse(model(x), noise).mean() < loss.mean()
        optimizer.zero_grad()


def main() -> None:
    """Run the checks and say what they ran on."""
    check_package()
    check_clustering()
    check_kernels()
    check_training()
    print(
        f"diffmtl-fast {dm.__version__} works with Python {platform.python_version()} and torch "
        f"{torch.__version__}; instruction sets: {', '.join(_C.cpu_kernels())}",
        file=sys.stdout,
    )


if __name__ == "__main__":
    main()
