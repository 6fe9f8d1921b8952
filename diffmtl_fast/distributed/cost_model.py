"""What a step of many processes costs each of them: bytes sent, memory and time, before anything is run.

Bytes are those that the best algorithm of every collective has to send (a ring), as they are counted in real steps
by tests/distributed/test_cost_model.py. Memory and time are estimates.
``python -m diffmtl_fast.distributed.cost_model docs/figures/scale.png`` draws them.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from .._figures import new_figure, save
from .buckets import LIMIT
from .sharded_jacobian import MOST_UNDER_WAY

#: How gradients of clusters are formed and added up; "plain" ones are those of a step without clusters.
Mode: TypeAlias = Literal["plain replicated", "replicated", "cluster-parallel", "plain sharded", "sharded"]

_WORD = 4  # bytes of a parameter, a gradient and an element of an optimizer's state
_HELD = 4  # parameters, gradients and the two states of AdamW


@dataclass(frozen=True)
class Cluster:
    """The machines. The defaults are nominal figures of nodes of eight H100, not measured ones.

    Attributes:
        node: processes of one machine.
        inside: bytes a second that a process sends to others of its machine.
        between: bytes a second that it sends to other machines.
        latency: seconds of a message that another one waits for.
        message: seconds of one of many messages that are sent together.
    """

    node: int = 8
    inside: float = 300e9
    between: float = 50e9
    latency: float = 10e-6
    message: float = 2e-6


@dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
        parameters: P, all of them trained, in float32.
        num_clusters: K.
        processes: W.
        replicas: of a sharded model (HSDP); 1 where all processes hold shards of one.
        on_a_rank: m, the most clusters that the batch of a rank has samples of; at most K.
        jacobian_bytes: of an element of the Jacobian, 2 for bfloat16.
        groups: how many parts of the model are sharded, gathered and reduced one after the other.
        kept: share of the parameters that are not resharded after the forward.
        compute: seconds of a forward and backward of a rank's batch.
    """

    parameters: int
    num_clusters: int
    processes: int
    replicas: int = 1
    on_a_rank: int = 1
    jacobian_bytes: int = _WORD
    groups: int = 30
    kept: float = 0.0
    compute: float = 0.1


@dataclass(frozen=True)
class Cost:
    """Of one step, for every process.

    Attributes:
        gradients: bytes sent for gradients and updates.
        gathers: bytes sent to gather sharded parameters.
        memory: bytes of parameters, gradients, AdamW's state, the Jacobian and buffers; no activations.
        seconds: of the step.
    """

    gradients: float
    gathers: float
    memory: float
    seconds: float

    @property
    def bytes_sent(self) -> float:
        """All bytes that a process sends."""
        return self.gradients + self.gathers


def cost(mode: Mode, job: Job, cluster: Cluster | None = None) -> Cost:
    """Estimate a step.

    All modes exchange gradients while they compute, so that the longer one of the two counts; replicas with
    clusters give each other the update afterwards. An all-to-all has a message for every other process, sent
    together; the other collectives have log2 W, one after the other. Shards of a replica are taken to lie in one
    machine if they fit.

    Args:
        mode: how gradients are added up.
        job: the training run.
        cluster: the machines.

    Raises:
        ValueError: an unknown mode, or a job that cannot be.
    """
    cluster = Cluster() if cluster is None else cluster
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {list(get_args(Mode))}, found {mode!r}")
    if not 1 <= job.on_a_rank <= job.num_clusters or min(job.parameters, job.processes, job.groups) < 1:
        raise ValueError(f"job: expected at least 1 of everything and on_a_rank <= num_clusters, found {job}")
    if job.replicas < 1 or job.processes % job.replicas:
        raise ValueError(f"job: expected replicas that divide the processes, found {job}")
    if mode not in ("plain sharded", "sharded"):
        return _replicated(mode, job, cluster)
    return _sharded(mode, job, cluster)


def _replicated(mode: Mode, job: Job, cluster: Cluster) -> Cost:
    size, rows = job.processes, job.num_clusters
    whole, row = _WORD * job.parameters, job.jacobian_bytes * job.parameters
    share, hops = _share(size), _hops(size)
    bandwidth, buckets = _bandwidth(size, cluster), math.ceil(whole / LIMIT)
    waiting, memory = hops * buckets * cluster.latency, float(_HELD * whole)
    if mode == "plain replicated":
        seconds = max(job.compute, 2 * whole * share / bandwidth + 2 * waiting)
        return Cost(2 * whole * share, 0.0, memory + min(whole, LIMIT), seconds)
    sent = (rows if mode == "replicated" else job.on_a_rank) * row
    messages = math.ceil(sent / LIMIT) * (size - 1)
    memory += sent + rows * row / size + whole + 2 * min(sent, MOST_UNDER_WAY * LIMIT)
    exchange = sent * share / bandwidth + messages * cluster.message
    seconds = max(job.compute, exchange) + whole * share / bandwidth + waiting
    return Cost((sent + whole) * share, 0.0, memory, seconds)


def _sharded(mode: Mode, job: Job, cluster: Cluster) -> Cost:
    size, rows = job.processes // job.replicas, job.num_clusters
    plain, several = mode == "plain sharded", job.replicas > 1
    whole, part = _WORD * job.parameters, _WORD * job.parameters / job.groups
    row = job.jacobian_bytes * job.parameters / size
    passes = 1 if plain else job.on_a_rank
    alike = plain or passes == rows  # all ranks run the same cluster at a time
    reduced = passes * whole * _share(size)
    gathers = (2 - job.kept) * reduced
    memory = _HELD * whole / size + 3 * part + job.kept * whole + (0 if plain else rows * row)
    waiting = passes * job.groups * 3 * _hops(size) * cluster.latency
    between, far = 0.0, _bandwidth(job.processes, cluster)
    afterwards = 0.0
    if alike:
        between = passes * 2 * whole / size * _share(job.replicas)
        waiting += passes * job.groups * 2 * _hops(job.replicas) * cluster.latency + between / far
    else:  # all-to-all in the reduce-scatter's place
        memory += part
        each = (size - 1) * cluster.message - _hops(size) * cluster.latency
        waiting += passes * job.groups * each
    if several and not alike:  # replicas add up the rows of all their clusters
        sent = min(rows, passes * size) * row
        between = (sent + whole / size) * _share(job.replicas)
        memory += rows * row / job.replicas + whole / size + 2 * min(sent, MOST_UNDER_WAY * LIMIT)
        messages = math.ceil(sent / LIMIT) * (job.replicas - 1)
        afterwards = between / far + messages * cluster.message + _hops(job.replicas) * cluster.latency
    exchange = (reduced + gathers) / _bandwidth(size, cluster) + waiting
    return Cost(reduced + between, gathers, memory, max(job.compute, exchange) + afterwards)


def _share(size: int) -> float:
    return (size - 1) / size


def _hops(size: int) -> int:
    return math.ceil(math.log2(size))


def _bandwidth(size: int, cluster: Cluster) -> float:
    return cluster.inside if size <= cluster.node else cluster.between


def draw(path: Path) -> None:
    """Draw bytes, memory and time of a process against the number of processes, for a DiT-XL/2 and 5 clusters."""
    # With m, and how many shards a replica has; 0 for as many as there are processes.
    jobs: dict[str, tuple[Mode, int, int]] = {
        "plain replicas": ("plain replicated", 1, 1),
        "replicas": ("replicated", 5, 1),
        "replicas, one cluster a rank": ("cluster-parallel", 1, 1),
        "plain FSDP2": ("plain sharded", 1, 0),
        "FSDP2, five clusters a rank": ("sharded", 5, 0),
        "FSDP2, one cluster a rank": ("sharded", 1, 0),
        "HSDP over machines of 8": ("sharded", 5, 8),
        "HSDP, one cluster a rank": ("sharded", 1, 8),
    }
    sizes = [2**exponent for exponent in range(3, 13)]
    figure = new_figure(12, 4)
    columns = figure.subplots(1, 3)
    for name, (mode, clusters, shards) in jobs.items():
        found = [
            cost(mode, Job(675_000_000, 5, size, size // shards if shards else 1, clusters)) for size in sizes
        ]
        values = (
            [each.bytes_sent / 1e9 for each in found],
            [each.memory / 1e9 for each in found],
            [each.seconds for each in found],
        )
        # Dashed above the others, since one may lie on another.
        style = {"linestyle": "--", "linewidth": 3, "zorder": 3} if name.startswith("plain") else {}
        for axes, each in zip(columns, values, strict=True):
            axes.plot(sizes, each, marker=".", label=name, **style)
    for axes, label in zip(
        columns, ("gigabytes sent in a step", "gigabytes of memory", "seconds of a step"), strict=True
    ):
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="processes", ylabel=label)
        axes.grid(alpha=0.3)
    columns[2].legend(fontsize=7)
    figure.suptitle(
        "Each process of a DiT-XL/2 (675M parameters), 5 clusters, 100 ms of computing: estimates"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
