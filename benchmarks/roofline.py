"""Every op against the speed of the memory, the same work in plain PyTorch, and that under torch.compile.

    python -m benchmarks.roofline [--quick] [--device cuda]

The bytes that the work must move (inputs once for each pass, results once), over the time, are put beside the
bandwidth of copying or reading memory in the same round. A batch that the caches hold, a layer's weight gradient,
the weights of K clusters and the host's own work, on tensors of a few elements, are compared with PyTorch alone.
Prints tables; writes benchmarks/results/roofline_<device>.json and a plot in docs/images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import op_cases
from benchmarks.harness import (
    Candidate,
    Comparison,
    Spread,
    compare,
    device_clock,
    environment,
    wall_clock,
    write,
)
from benchmarks.op_cases import Bound, Case, Sizes
from diffmtl_fast._extras import require

PLOT = Path(__file__).parents[1] / "docs" / "images" / "roofline.png"
OURS, PLAIN, COMPILED = "diffmtl_fast", "PyTorch", "torch.compile"
COLOURS = {OURS: "tab:blue", COMPILED: "tab:orange", PLAIN: "tab:gray"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Memory:
    """What copying and reading memory takes: the yardstick of a run."""

    def __init__(self, megabytes: int, device: torch.device) -> None:
        self._source = torch.ones(megabytes << 18, device=device)
        self._copy = torch.empty_like(self._source)

    def candidate(self, bound: Bound) -> Candidate:
        """Return one pass over the memory."""
        if bound == "read":
            return Candidate("read memory", lambda: self._source.sum())
        return Candidate("copy memory", lambda: self._copy.copy_(self._source))

    def moved(self, bound: Bound) -> int:
        """Return the bytes of that pass."""
        return self._source.nbytes * (1 if bound == "read" else 2)


def compiled(case: Case) -> Candidate:
    """Return the plain composition under torch.compile, which may fail."""
    torch._dynamo.reset()
    tolerance = 1e-4 if case.dtype == torch.float32 else 5e-2  # sums may be formed in the type of the inputs
    candidate = case.candidate(COMPILED, torch.compile(case.plain, dynamic=False), tolerance)
    return replace(candidate, peer=True)


class Run:
    """One run: its settings, and what was found so far."""

    def __init__(
        self, device: torch.device, rounds: int, compiles: bool, megabytes: int, least: float = 0.0
    ) -> None:
        self.device, self.rounds, self.compiles, self.least = device, rounds, compiles, least
        self.memory = Memory(megabytes, device)
        self.comparisons: list[Comparison] = []
        self.records: list[dict[str, Any]] = []

    def measure(self, group: str, cases: Iterable[Case]) -> None:
        """Time cases: the group "memory" beside the memory, the others beside plain PyTorch."""
        for case in cases:
            bound = case.bound if group == "memory" else None
            baseline, *ways = self._ways(case, bound)
            comparison = compare(
                f"{group}: {case.name}",
                baseline,
                ways,
                self.rounds,
                clock=device_clock if self.device.type == "cuda" and group != "host" else wall_clock,
                least=self.least,
            )
            self.comparisons.append(comparison)
            self.records.append(self._record(group, case, comparison, bound))
            print(comparison.table(), flush=True)

    def _ways(self, case: Case, bound: Bound | None) -> list[Candidate]:
        """Return the baseline and what is compared with it."""
        ways = [case.candidate(PLAIN, case.plain, None), case.fused_candidate()]
        ways += [Candidate(name, run) for name, run in case.others.items()]
        if bound is None:
            return ways
        if self.compiles and case.compiles:
            ways.append(compiled(case))
        return [self.memory.candidate(bound), *ways]

    def _record(self, group: str, case: Case, comparison: Comparison, bound: Bound | None) -> dict[str, Any]:
        seconds = {row.name: row.seconds.median for row in comparison.rows}
        ours = seconds.pop(OURS)
        record: dict[str, Any] = {
            "group": group,
            "op": case.op,
            "shape": case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "seconds": ours,
            "times_ours": {way: time / ours for way, time in seconds.items()},
            "bound": bound,
        }
        if bound:
            work = case.moved / self.memory.moved(bound)
            shares = {row.name: asdict(_inverse(work, row.ratio)) for row in comparison.rows[1:]}
            record |= {"bytes": case.moved, "share": shares}
        return record


def _inverse(numerator: float, ratio: Spread) -> Spread:
    return Spread(numerator / ratio.median, numerator / ratio.high, numerator / ratio.low)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Format what was found as Markdown: time, share of the memory's speed, the others' times over ours."""
    lines = [
        "| | | ms | of the memory's speed | PyTorch / ours | torch.compile / ours | others / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        share = f"{record['share'][OURS]['median']:.2f}" if record["bound"] else ""
        times = {way: f"{ratio:.1f}" for way, ratio in record["times_ours"].items()}
        plain, by_compiler = times.pop(PLAIN), times.pop(COMPILED, "")
        others = ", ".join(f"{ratio} ({way})" for way, ratio in times.items() if not way.endswith(" memory"))
        title = f"{record['group']} | {record['op']} {record['shape']} {record['dtype']}"
        cells = [title, f"{record['seconds'] * 1e3:.3g}", share, plain, by_compiler, others]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(records: list[dict[str, Any]], machine: str, path: Path) -> None:
    """Draw the share of the memory's speed that every way reaches."""
    records = [record for record in records if record["bound"]]
    dtypes = sorted({record["dtype"] for record in records}, reverse=True)
    names = list(dict.fromkeys(record["op"] for record in records))
    figure = require("matplotlib.figure", "train").Figure(
        figsize=(4.6 * len(dtypes) + 1.4, 0.42 * len(names) + 1.2), layout="constrained"
    )
    axes = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axis, dtype in zip(axes, dtypes, strict=True):
        for offset, (way, colour) in zip((-0.27, 0, 0.27), COLOURS.items(), strict=True):
            chosen = [
                (names.index(record["op"]) + offset, record["share"][way])
                for record in records
                if record["dtype"] == dtype and way in record["share"]
            ]
            if not chosen:
                continue
            places, shares = zip(*chosen, strict=True)
            middle = [share["median"] for share in shares]
            spread = [
                [share["median"] - share["low"] for share in shares],
                [share["high"] - share["median"] for share in shares],
            ]
            axis.barh(places, middle, 0.27, xerr=spread, color=colour, label=way, error_kw={"lw": 0.8})
        axis.axvline(1, color="black", lw=0.8, ls="--")
        axis.set(title=dtype, xlabel="bandwidth / that of the memory")
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[-1].legend(frameon=False, fontsize=8, loc="best")
    figure.suptitle(f"{machine}; losses forward and backward unless said", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def measure_all(run: Run, sizes: Sizes, dtypes: Sequence[torch.dtype]) -> None:
    """Measure every op in every dtype."""
    for dtype in dtypes:
        torch.manual_seed(0)
        run.measure("memory", op_cases.loss_cases(sizes.large, dtype, run.device))
        run.measure("memory", op_cases.jacobian_cases(sizes.parameters, dtype, run.device))
        layers = list(op_cases.layer_cases(sizes.rows, sizes.columns, dtype, run.device))
        run.measure("memory", [case for case in layers if case.bound])
        run.measure("arithmetic", [case for case in layers if not case.bound])
        run.measure("cache", op_cases.loss_cases(sizes.small, dtype, run.device))
    run.measure("latency", op_cases.weight_cases(run.device))
    tiny = op_cases.TINY
    run.measure("host", op_cases.loss_cases(tiny.small, torch.float32, run.device))
    run.measure("host", op_cases.jacobian_cases(tiny.parameters, torch.float32, run.device))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description="Time every op.")
    parser.add_argument("--quick", action="store_true", help="two rounds of small tensors, nothing written")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the full run (default 15)")
    parser.add_argument(
        "--device", choices=list(op_cases.FULL), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--note", help="stored with the results: what else the machine was doing")
    options = parser.parse_args(arguments)
    device, dtypes = torch.device(options.device), [DTYPES[name] for name in options.dtypes]
    if options.quick:
        run = Run(device, rounds=2, compiles=False, megabytes=1)
        measure_all(run, op_cases.QUICK, dtypes)
        print(table(run.records))
        return
    measured_in, gpu = environment(), device.type == "cuda"
    run = Run(device, options.rounds, True, 1024 if gpu else 256, least=5e-3 if gpu else 1e-3)
    measure_all(run, op_cases.FULL[device.type], dtypes)
    print(table(run.records))
    write(f"roofline_{device.type}", run.comparisons, measured_in, note=options.note, summary=run.records)
    machine = measured_in["gpu"] if gpu else f"{measured_in['cpu']}, {measured_in['threads']} threads"
    plot(run.records, machine, PLOT.with_stem(f"roofline_{device.type}") if gpu else PLOT)


if __name__ == "__main__":
    main()
