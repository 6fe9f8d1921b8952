"""What the compiled kernels let one expect of their bandwidth, written to kernels/PREDICTIONS.md.

Needs no GPU: `python tests/kernels/predict.py`. Little's law: a memory of bandwidth B and latency L is busy
while B · L bytes are on their way. How many a kernel has on its way on a multiprocessor is read from its
machine code: the bytes of the loads that a warp issues before it waits for the first of them, times the
warps that registers and shared memory leave room for. All of it is a prediction, to be held against a
measurement on the GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget

from diffmtl_fast.kernels import clusters, combine, gram, group_norm, losses, noise, norm_rows
from tests.kernels import aot

OUT = Path(__file__).parents[2] / "kernels" / "PREDICTIONS.md"

TEXT = """# Predicted bandwidth of the Triton kernels

**Nobody has measured any of this.** It is read from the compiled machine code (`python
tests/kernels/predict.py`), and stands here so that a measurement (`benchmarks/gpu.sh`) can be held against
it.

In every cell: registers per thread · warps of the multiprocessor's {warps} that fit · loads of global
memory in the code, number × bytes · bytes on their way per multiprocessor · the share of the memory's
bandwidth that these allow by Little's law (1 at most). Bandwidths are those of the data sheets, latencies
assumptions, and what has to be on its way is their product over the multiprocessors: {needs}.

{header}
|---|---|{rule}
{lines}

Where the share is below 1, too few bytes are on their way; elsewhere nothing in the code stands against the
full bandwidth, and what is lost will be lost to what the table does not see: the last wave of programs,
launches, rows that are not aligned, float64 sums on GPUs that have few units for them. Kernels that loop
have more on their way than one batch of loads per warp, where warps wait at different places, so that their
shares are pessimistic.
"""


class Gpu(NamedTuple):
    """What the data sheets say, and the latency of a load that misses all caches, an assumption."""

    name: str
    arch: int
    processors: int
    bandwidth: float  # bytes per ns
    latency: float  # ns
    shared: int  # bytes per multiprocessor

    @property
    def needed(self) -> float:
        """Bytes on their way on every multiprocessor that keep the memory busy."""
        return self.bandwidth / self.processors * self.latency


GPUS = [
    Gpu("A100 (sm_80)", 80, 108, 2039, 600, 164 << 10),
    Gpu("H100 (sm_90)", 90, 132, 3350, 700, 228 << 10),
    Gpu("B200 (sm_100)", 100, 148, 8000, 800, 228 << 10),
]
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor, on all three


class Usage(NamedTuple):
    """What one program takes of a multiprocessor, and what it asks of the memory at a time."""

    registers: int
    shared: int
    batch: int  # bytes that a warp's loads have on their way at once, at most
    loads: dict[int, int]  # loads of global memory by width in bytes

    def programs(self, num_warps: int, gpu: Gpu) -> int:
        """Programs that are on a multiprocessor at a time."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_shared = gpu.shared // max(self.shared + 1024, 1)
        return min(REGISTERS // (per_warp * num_warps), WARPS // num_warps, BLOCKS, by_shared)


_LOAD = re.compile(r"\b(LDG|LDGSTS)\.E(\S*)\s+(?:P\d, )?(\[?R\d+|\[)")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?\b")


def usage(cubin: bytes) -> Usage:
    """Read a kernel's needs from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        resources, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) .*SHARED:(\d+)", resources)
    assert found, resources
    loads: dict[int, int] = {}
    waiting: set[int] = set()
    batch = outstanding = 0
    for line in sass.splitlines():
        code = line.partition("*/")[2].partition(";")[0]
        load = _LOAD.search(code)
        registers = [int(number) for number, _ in _REGISTER.findall(code)]
        # A load's own result waits for nothing; whatever else names a register that is on its way does.
        used = registers[1:] if load and load[1] == "LDG" else registers
        if waiting & set(used) or "DEPBAR" in code:
            waiting, outstanding = set(), 0
        if load:
            width = 16 if ".128" in load[2] else 8 if ".64" in load[2] else 2 if "16" in load[2] else 4
            loads[width] = loads.get(width, 0) + 1
            outstanding += 32 * width
            batch = max(batch, outstanding)
            if load[1] == "LDG" and registers:
                waiting |= set(range(registers[0], registers[0] + max(width // 4, 1)))
    return Usage(int(found[1]), int(found[2]), batch, dict(sorted(loads.items(), reverse=True)))


class Row(NamedTuple):
    """A kernel in the use that its bandwidth matters in."""

    name: str
    case: aot.Case
    moved: str  # bytes per element of the result or of a row, in words


def rows() -> list[Row]:
    """The kernels that move large tensors, in float32 and bfloat16."""
    kernels = {
        losses._error_sum_kernel: "squared errors: 2 reads",
        losses._error_backward_kernel: "their gradient: 2 reads, 1 write",
        noise._add_noise_kernel: "noisy images: 2 reads, 1 write",
        noise._philox_normal_kernel: "generated noise: 1 write",
        combine._combine_kernel: "update from K = 5 rows: 5 reads, 1 write",
        gram._gram_vector_kernel: "Gramian of K = 5 rows: 5 reads",
        gram._gram_tile_kernel: "Gramian of K = 20 rows: 20 reads",
        clusters._cluster_sum_kernel: "cluster sums: 1 read",
        clusters._add_shares_kernel: "sum of the shares: 1 read per share, 1 write",
        group_norm._group_norm_backward_kernel: "backward of group normalisation: 2 (+ 2 cached) reads, 1 write",
        norm_rows._norm_rows_backward_kernel: "backward of layer normalisation: 2 reads, 1 write",
    }
    cases = aot.streaming_cases() + aot.combine_cases() + aot.gram_cases()
    cases += aot.cluster_sum_cases() + aot.group_norm_cases() + aot.norm_rows_cases()
    chosen: dict[tuple[str, str], Row] = {}
    for case in cases:
        constants = case.constants
        plain = not any(constants.get(flag) for flag in ("DELTA", "MIXED", "SEEDED", "ADD", "WHOLE"))
        k = constants.get("K", 5)
        few = k == (20 if case.kernel is gram._gram_tile_kernel else 5)
        dtype = next(iter(case.pointers.values())) if "p_record" not in case.pointers else None
        if case.kernel is noise._philox_normal_kernel:
            dtype = "fp32"
        if not plain or not few or case.kernel not in kernels or dtype not in ("fp32", "bf16"):
            continue
        name = f"{case.kernel.__name__[1:]}, {dtype}"
        chosen.setdefault((name, dtype), Row(name, case, kernels[case.kernel]))
    return list(chosen.values())


def line(row: Row) -> str:
    """One line of the table, over all GPUs."""
    cells = []
    for gpu in GPUS:
        found = usage(aot.compile_case(row.case, GPUTarget("cuda", gpu.arch, 32)).asm["cubin"])
        programs = found.programs(row.case.num_warps, gpu)
        warps = programs * row.case.num_warps
        flight = warps * found.batch
        share = f"{min(1.0, flight / gpu.needed):.2f}" if row.case.streams else "stores alone"
        widths = " ".join(f"{count}×{width}" for width, count in found.loads.items())
        cells.append(
            f"{found.registers} · {warps / WARPS:.0%} · {widths or 'none'} · {flight / 1024:.0f} KiB · {share}"
        )
    return f"| {row.name} | {row.moved} | " + " | ".join(cells) + " |"


def main() -> None:
    """Write the table."""
    header = "| kernel | elements moved | " + " | ".join(gpu.name for gpu in GPUS) + " |"
    lines = [line(row) for row in rows()]
    needs = "; ".join(
        f"{g.name}: {g.bandwidth:.0f} GB/s, {g.latency:.0f} ns, {g.needed / 1024:.0f} KiB" for g in GPUS
    )
    OUT.write_text(
        TEXT.format(warps=WARPS, needs=needs, header=header, rule="---|" * len(GPUS), lines="\n".join(lines))
    )
    print(OUT.read_text())


if __name__ == "__main__":
    main()
