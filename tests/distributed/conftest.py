"""Makes the helpers beside these tests importable, here and in the processes that they start."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def pools(tmp_path_factory):
    """Groups of processes by their number; they live as long as the tests, because starting one takes seconds."""
    from ranks import Pool

    started: dict[int, Pool] = {}

    def pool(size: int) -> Pool:
        if size not in started or not started[size].alive:
            started[size] = Pool(size, tmp_path_factory.mktemp("group"))
        return started[size]

    yield pool
    for each in started.values():
        each.stop()


@pytest.fixture
def on_ranks(pools):
    """Call a function of `programs` on so many ranks; returns what each returned."""
    return lambda size, function, *args, **kwargs: pools(size).call(function, *args, **kwargs)


@pytest.fixture
def fresh_pool(tmp_path):
    """Start processes for a test that ends them."""
    from ranks import Pool

    started = []

    def start(size: int, timeout: float = 4) -> Pool:
        started.append(Pool(size, tmp_path, timeout))
        return started[-1]

    yield start
    for each in started:
        each.stop()
