"""What the compiled kernels let one expect of their speed, written to kernels/PREDICTIONS.md.

Needs no GPU: `python tests/kernels/predict.py`. Little's law: a memory of bandwidth B and latency L is busy
while B · L bytes are on their way. How many a kernel has on its way on a multiprocessor is read from its
machine code: the bytes of the loads that a warp issues before it waits for the first of them, times the
warps that registers and shared memory leave room for. What the code computes besides is counted by kind, and
held against the units that do it. All of it is a prediction, to be held against a measurement on the GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget

from tests.kernels import aot

OUT = Path(__file__).parents[2] / "kernels" / "PREDICTIONS.md"

#: What every kernel moves for each element of its result or row; of those in one or few programs, that.
KERNELS = {
    "error_sum": "squared errors: 2 reads",
    "error_backward": "their gradient: 2 reads, 1 write",
    "add_noise": "noisy images: 2 reads, 1 write",
    "philox_normal": "generated noise: 1 write",
    "combine": "update from K = 5 rows: 5 reads, 1 write",
    "gram_vector": "Gramian of K = 5 rows: 5 reads",
    "gram_tile": "Gramian of K = 20 rows: 20 reads",
    "cluster_wgrad": "weight gradients of clusters: tiles of both operands, by tensor cores",
    "cluster_sum": "cluster sums: 1 read",
    "add_shares": "sum of the shares: 1 read per share, 1 write",
    "group_norm_backward": "backward of group normalisation: 2 (+ 2 cached) reads, 1 write",
    "norm_rows_backward": "backward of layer normalisation: 2 reads, 1 write",
    "sum": "sum of partial Gramians: few programs",
    "sample_mean": "losses of the samples: few programs",
    "cluster_mean": "losses of the clusters: K programs",
    "uncertainty": "uncertainty loss: one program",
    "pcgrad": "PCGrad's weights: one program",
    "nash": "Nash weights: one program",
    "eigh": "eigenvalues of a Gramian: one program",
}
#: What is compiled in the use that matters; of others the first case that sets none of `FLAGS`.
WANTED: dict[str, dict[str, object]] = {
    "gram_tile": {"K": 20},
    "eigh": {"K": 5},
    "nash": {"K": 5},
    "cluster_wgrad": {"PRECISION": "ieee", "ADD": False},
}
FLAGS = ("DELTA", "MIXED", "SEEDED", "ADD", "WHOLE", "WEIGHTED")
DTYPES = ("fp32", "bf16", "fp64")

TEXT = """# Predicted speed of the Triton kernels

**Nobody has measured any of this.** It is read from the compiled machine code (`python
tests/kernels/predict.py`), and stands here so that a measurement (`benchmarks/gpu.sh`) can be held against
it.

In every cell: registers per thread · warps (of AMD's, wavefronts of 64) of those that a multiprocessor holds
· loads of global memory in the code, number × bytes · bytes on their way per multiprocessor · the share of
the memory's bandwidth that these allow by Little's law (1 at most) · **what limits**. Bandwidths are those of
the data sheets, latencies assumptions, and what has to be on its way is their product over the
multiprocessors: {needs}.

What limits is the slowest of these: *bandwidth*, the bytes of the code's loads and stores over the
multiprocessor's part of it; *float64*, the sums and conversions in float64 over the units that do them;
*float32*, those in the other units; *issue*, all instructions, of which NVIDIA's multiprocessors start four a
clock and AMD's one of 64 lanes. Where the share is below 1 it is *registers*, if twice the warps would be
enough, else *latency*; where there are *matrix* products, those. A kernel of one or few programs is as long as
its chain of dependent steps and its *launch*.

{tables}

Where the share is below 1, too few bytes are on their way; elsewhere nothing in the code stands against the
full bandwidth, and what is lost will be lost to what the table does not see: the last wave of programs,
launches, rows that are not aligned. Instructions are counted once each, in loops or not, so that what a
program does once at its end, such as the tree of a sum, counts too much where it loops. Kernels that loop
have more on their way than one batch of loads per warp, where warps wait at different places, so that their
shares are pessimistic.

## Instructions

Of a warp's code: loads / stores of global memory · float32 (and lower) arithmetic · float64 arithmetic ·
conversions, in brackets those from and to float64 · matrix products · all.

{mix}
"""


class Gpu(NamedTuple):
    """What the data sheets say, and the latency of a load that misses all caches, an assumption."""

    name: str
    target: GPUTarget
    processors: int
    bandwidth: float  # bytes per ns
    latency: float  # ns
    shared: int  # bytes per multiprocessor
    clock: float  # per ns
    float32: int  # lanes, each a multiplication and sum a clock
    float64: int
    conversions: int  # lanes that convert from and to float64
    registers: int  # of a multiprocessor, 32 bits for one thread each
    warps: int  # that it holds at most
    step: int  # registers are given to a thread in multiples of this
    issue: int  # instructions of a warp that start in a clock

    @property
    def needed(self) -> float:
        """Bytes on their way on every multiprocessor that keep the memory busy."""
        return self.bandwidth / self.processors * self.latency


def _nvidia(arch: int) -> GPUTarget:
    return GPUTarget("cuda", arch, 32)


GPUS = [
    Gpu("A100 (sm_80)", _nvidia(80), 108, 2039, 600, 164 << 10, 1.41, 64, 32, 16, 65536, 64, 8, 4),
    Gpu("H100 (sm_90)", _nvidia(90), 132, 3350, 700, 228 << 10, 1.83, 128, 64, 16, 65536, 64, 8, 4),
    Gpu("H200 (sm_90)", _nvidia(90), 132, 4800, 700, 228 << 10, 1.83, 128, 64, 16, 65536, 64, 8, 4),
    Gpu("B200 (sm_100)", _nvidia(100), 148, 8000, 800, 228 << 10, 1.85, 128, 64, 16, 65536, 64, 8, 4),
    Gpu(
        "MI300X (gfx942)",
        GPUTarget("hip", "gfx942", 64),
        *(304, 5300, 800, 64 << 10, 2.1, 128, 64, 16, 4 * 512 * 64, 32, 8, 1),
    ),
]
PROGRAMS = 32  # of a multiprocessor


class Code(NamedTuple):
    """What one program takes of a multiprocessor, and what it asks of the memory and the units."""

    registers: int
    shared: int
    batch: int  # bytes that a warp's loads have on their way at once, at most
    loads: dict[int, int]  # loads of global memory by a thread's bytes
    stored: int  # bytes that a thread stores
    mix: Counter[str]  # instructions by kind


def kind_of(instruction: str) -> str:
    """Return the kind of an instruction of either vendor's."""
    for kind, pattern in _KINDS.items():
        if re.match(pattern, instruction):
            return kind
    return "other"


_KINDS = {
    "loads": r"LDG|(global|buffer|flat)_load",
    "stores": r"STG|(global|buffer|flat)_store",
    "matrix": r"[HDQIU]\w*MMA|v_s?mfma",
    "wide conversions": r"F2F\S*F64|[FI]2[FI]\S*\.64|I2F\S*F64|F2I\S*F64|v_cvt_\w*f64",
    "conversions": r"F2F|F2FP|I2F|F2I|v_cvt_",
    "float64": r"D(FMA|ADD|MUL|SETP|MNMX)\b|v_\w+_f64",
    "float32": r"[FH](FMA|ADD|MUL|MNMX)\d?\b|MUFU|v_\w*(fm|mad|add|sub|mul|max|min|rcp|rs?q|exp|log)\w*_f(16|32)",
}


def read(case: aot.Case, gpu: Gpu) -> Code:
    """Compile a kernel for a GPU and read its needs from its machine code."""
    assembly = aot.compile_case(case, gpu.target)
    return read_amd(assembly) if gpu.target.backend == "hip" else read_nvidia(assembly.asm["cubin"])


_LOAD = re.compile(r"\b(LDG|LDGSTS)\.E(\S*)\s+(?:P\d, )?(\[?R\d+|\[)")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?\b")
_SASS = re.compile(r"\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def _width(modifiers: str) -> int:
    return 16 if ".128" in modifiers else 8 if ".64" in modifiers else 2 if "16" in modifiers else 4


def read_nvidia(cubin: bytes) -> Code:
    """Read what NVIDIA's disassembler shows."""
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
    loads: Counter[int] = Counter()
    mix: Counter[str] = Counter()
    waiting: set[int] = set()
    batch = outstanding = stored = 0
    for line in sass.splitlines():
        code = line.partition("*/")[2].partition(";")[0]
        instruction = _SASS.match(code)
        if instruction and instruction[1] != "NOP":
            mix[kind_of(instruction[1])] += 1
            if instruction[1].startswith("STG"):
                stored += _width(instruction[1])
        load = _LOAD.search(code)
        registers = [int(number) for number, _ in _REGISTER.findall(code)]
        # A load's own result waits for nothing; whatever else names a register that is on its way does.
        used = registers[1:] if load and load[1] == "LDG" else registers
        if waiting & set(used) or "DEPBAR" in code:
            waiting, outstanding = set(), 0
        if load:
            width = _width(load[2])
            loads[width] += 1
            outstanding += 32 * width
            batch = max(batch, outstanding)
            if load[1] == "LDG" and registers:
                waiting |= set(range(registers[0], registers[0] + max(width // 4, 1)))
    return Code(int(found[1]), int(found[2]), batch, _descending(loads), stored, mix)


_BYTES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "dword": 4, "dwordx2": 8}
_BYTES |= {"dwordx3": 12, "dwordx4": 16}
_GCN = re.compile(r"\s+([a-z]\w+)(.*)")
_MEMORY = re.compile(r"(?:global|buffer|flat)_(load|store)(?:_lds)?_(?:\w*?)(dwordx?\d?|[us]?byte|u?short)")


def read_amd(compiled: triton.compiler.CompiledKernel) -> Code:
    """Read AMD's assembly, which says by `vmcnt` how many memory instructions may still be on their way."""
    text = compiled.asm["amdgcn"]
    numbers = {key: int(n) for key, n in re.findall(r"\.(\w+_count|group_segment_fixed_size):\s+(\d+)", text)}
    loads: Counter[int] = Counter()
    mix: Counter[str] = Counter()
    flight: list[int] = []
    batch = stored = 0
    for line in text.splitlines():
        instruction = _GCN.match(line)
        if not instruction:
            continue
        name, rest = instruction.groups()
        mix[kind_of(name)] += 1
        moved = _MEMORY.match(name)
        if moved:
            width = _BYTES[moved[2]]
            is_load = moved[1] == "load"
            flight.append(64 * width if is_load else 0)
            batch = max(batch, sum(flight))
            if is_load:
                loads[width] += 1
            else:
                stored += width
        left = re.search(r"vmcnt\((\d+)\)", rest) if name == "s_waitcnt" else None
        if left:
            flight = flight[len(flight) - min(int(left[1]), len(flight)) :]
    registers = numbers["vgpr_count"] + numbers.get("agpr_count", 0)
    return Code(registers, numbers["group_segment_fixed_size"], batch, _descending(loads), stored, mix)


def _descending(loads: Counter[int]) -> dict[int, int]:
    return dict(sorted(loads.items(), reverse=True))


def programs(code: Code, num_warps: int, gpu: Gpu) -> int:
    """Programs that are on a multiprocessor at a time."""
    lanes = gpu.target.warp_size
    per_warp = -(-max(code.registers, 1) // gpu.step) * gpu.step * lanes
    reserved = 1024 if gpu.target.backend == "cuda" else 0
    by_shared = gpu.shared // max(code.shared + reserved, 1)
    return min(gpu.registers // (per_warp * num_warps), gpu.warps // num_warps, PROGRAMS, by_shared)


class Row(NamedTuple):
    """A kernel in the use that its speed matters in."""

    kernel: str
    dtype: str
    case: aot.Case


def rows() -> list[Row]:
    """Every kernel, in the `DTYPES` that it is compiled for, in the order of `KERNELS`."""
    chosen: dict[tuple[str, str], Row] = {}
    for case in aot.all_cases():
        name = case.kernel.__name__[1:].removesuffix("_kernel")
        dtype = next((kind for kind in case.pointers.values() if not kind.startswith("i")), "")
        wanted = WANTED.get(name, dict.fromkeys(FLAGS, False) | ({"K": 5} if "K" in case.constants else {}))
        fits = all(
            not case.constants.get(k) if v is False else case.constants.get(k) == v for k, v in wanted.items()
        )
        sums = case.constants.get("ACCUMULATE")
        widened = dtype != "fp64" and sums is not None and sums is aot.ELEMENTS["fp64"]
        if fits and not widened and dtype in DTYPES and "p_record" not in case.pointers:
            chosen.setdefault((name, dtype), Row(name, dtype, case))
    order = list(KERNELS)
    return sorted(chosen.values(), key=lambda row: (order.index(row.kernel), DTYPES.index(row.dtype)))


def limit(row: Row, code: Code, gpu: Gpu, share: float) -> str:
    """Say what a kernel waits for."""
    if "program" in KERNELS[row.kernel]:
        return "launch"
    lanes, mix = gpu.target.warp_size, code.mix
    stored = code.stored if row.case.writes else 0  # others store sums, once
    moved = lanes * (stored + sum(width * count for width, count in code.loads.items()))
    clocks = {
        "bandwidth": moved / (gpu.bandwidth / gpu.processors / gpu.clock),
        "float64": lanes * max(mix["float64"] / gpu.float64, mix["wide conversions"] / gpu.conversions),
        "float32": lanes * mix["float32"] / gpu.float32,
        "issue": sum(mix.values()) / gpu.issue,
    }
    slowest = max(clocks, key=lambda kind: clocks[kind])
    if mix["matrix"]:
        return "matrix"
    if slowest != "bandwidth" or share == 1 or _writes_alone(row.case):
        return slowest
    return "registers" if 2 * share >= 1 else "latency"


def _writes_alone(case: aot.Case) -> bool:
    return case.writes and not case.streams


def cell(row: Row, code: Code, gpu: Gpu) -> str:
    """What there is to say of a kernel on one GPU."""
    warps = programs(code, row.case.num_warps, gpu) * row.case.num_warps
    flight = warps * code.batch
    share = min(1.0, flight / gpu.needed)
    widths = " ".join(f"{count}×{width}" for width, count in code.loads.items()) or "none"
    allowed = "stores alone" if _writes_alone(row.case) else f"{share:.2f}"
    return (
        f"{code.registers} · {warps / gpu.warps:.0%} · {widths} · {flight / 1024:.0f} KiB · {allowed} · "
        f"**{limit(row, code, gpu, share)}**"
    )


def instructions(code: Code) -> str:
    """How many instructions of each kind there are."""
    mix = code.mix
    converted = mix["conversions"] + mix["wide conversions"]
    return (
        f"{mix['loads']} / {mix['stores']} · {mix['float32']} · {mix['float64']} · {converted} "
        f"({mix['wide conversions']}) · {mix['matrix']} · {sum(mix.values())}"
    )


def table(header: list[str], lines: list[list[str]]) -> str:
    """Lay out a table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def main() -> None:
    """Write the tables."""
    found = [(row, [read(row.case, gpu) for gpu in GPUS]) for row in rows()]
    named = [f"{row.kernel}, {row.dtype}" for row, _ in found]
    cells = [[cell(row, code, gpu) for code, gpu in zip(codes, GPUS, strict=True)] for row, codes in found]
    words = [KERNELS[row.kernel] for row, _ in found]
    large = table(
        ["kernel", "elements moved", *(gpu.name for gpu in GPUS)],
        [[name, moved, *line] for name, moved, line in zip(named, words, cells, strict=True)],
    )
    shown = [i for i, gpu in enumerate(GPUS) if not gpu.name.startswith("H200")]
    mix = table(
        ["kernel", *(GPUS[i].name for i in shown)],
        [
            [name, *(instructions(codes[i]) for i in shown)]
            for name, (_, codes) in zip(named, found, strict=True)
        ],
    )
    needs = "; ".join(
        f"{g.name}: {g.bandwidth:.0f} GB/s, {g.latency:.0f} ns, {g.needed / 1024:.0f} KiB" for g in GPUS
    )
    OUT.write_text(TEXT.format(needs=needs, tables=large, mix=mix))
    print(OUT.read_text())


if __name__ == "__main__":
    main()
