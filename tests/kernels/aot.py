"""Compile every Triton kernel ahead of time for the GPUs it must run on, and read what came out.

Needs no GPU: `python tests/kernels/aot.py`. Fails if a kernel does not compile, if a CUDA build spills
registers to local memory, or if a streaming kernel lacks the 16-byte memory accesses that its bandwidth rests on.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

if __name__ == "__main__":  # tests read the list of cases, and run the kernels in the interpreter
    os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffmtl_fast.kernels import (
    clusters,
    combine,
    eigh,
    gram,
    group_norm,
    losses,
    norm_rows,
    parts,
    settings,
    weights,
)
from diffmtl_fast.kernels import noise as noises

TARGETS = [
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx942", 64),
]
DTYPES = {
    "fp32": tl.float32,
    "fp64": tl.float64,
    "bf16": tl.float32,
    "fp16": tl.float32,
}  # and what they add up in
ELEMENTS = {"fp32": tl.float32, "fp64": tl.float64, "bf16": tl.bfloat16, "fp16": tl.float16}
SUM = {"fp32": "fp32", "fp64": "fp64", "bf16": "fp32", "fp16": "fp32"}
# Into registers, or into shared memory.
SIXTEEN_BYTES = r"ld\.global\S*\.(v4\.b32|v2\.b64)|cp\.async\.c[ag]\.shared\.global .*, 0x10,"


def cluster_sums() -> list[tuple[str, str, bool]]:
    """Dtypes of the rows and of the result, and whether the sums are added to what is there."""
    return [(d, out, add) for d in DTYPES for out in sorted({d, SUM[d]}) for add in (False, True)]


# ptxas gives up a register of its own accord where that lets one more block run on a multiprocessor; its place in
# local memory takes 8 bytes.
ONE_REGISTER = 8


class Case(NamedTuple):
    """One specialisation of a kernel."""

    kernel: triton.JITFunction
    pointers: dict[str, str]  # argument → element type; all are 16-byte aligned, as PyTorch allocates them
    integers: tuple[str, ...]
    constants: dict[str, object]
    num_warps: int = 4
    streams: bool = False
    counts: tuple[str, ...] = ()  # integers of any divisibility
    writes: bool = False  # a stream too


def streaming_cases() -> list[Case]:
    block, warps = settings.stream_settings(1 << 20)
    cases = []
    for dtype, accumulate in DTYPES.items():
        constants = {"BLOCK": block, "ACCUMULATE": accumulate}
        for delta, second in ((None, None), (None, dtype), (0.5, dtype), (None, "i64")):
            loss = {**constants, "DELTA": delta, "MIXED": second is not None, "SEEDED": second == "i64"}
            pointers = {"p_pred": dtype, "p_first": dtype}
            if second is not None:
                pointers |= {"p_second": second, "p_mix": "fp32"}
            else:
                loss |= {"p_second": None, "p_mix": None}
            sums, grads = (
                {**pointers, "p_partial": SUM[dtype]},
                {**pointers, "p_scale": SUM[dtype], "p_grad": dtype},
            )
            integers = ("batch", "size", "chunks")
            part, whole = {"WHOLE": False, "p_weight": None}, {"WHOLE": True}
            cases.append(Case(losses._error_sum_kernel, sums, integers, loss | part, warps, True))
            weighted = {**sums, "p_weight": "fp32"}
            cases.append(Case(losses._error_sum_kernel, weighted, integers, loss | whole, warps, True))
            one = {**loss, "p_by_first": None}
            cases.append(Case(losses._error_backward_kernel, grads, integers, one, warps, True, (), True))
        plain = {**constants, "DELTA": None, "MIXED": False, "p_second": None, "p_mix": None}
        for first in (dtype, "i64"):
            pointers = {"p_scale": SUM[dtype], "p_pred": dtype, "p_first": first, "p_grad": dtype}
            compiled = {**plain, "SEEDED": first == "i64"}
            if first == "i64":
                compiled["p_by_first"] = None
            else:
                pointers["p_by_first"] = dtype
            cases.append(
                Case(losses._error_backward_kernel, pointers, integers, compiled, warps, True, (), True)
            )
        for noise in (dtype, "i64"):
            pointers = {"p_x0": dtype, "p_noise": noise, "p_alpha": "fp32", "p_sigma": "fp32", "p_out": dtype}
            forward = {**constants, "SEEDED": noise == "i64"}
            cases.append(
                Case(noises._add_noise_kernel, pointers, ("size", "chunks"), forward, warps, True, (), True)
            )
    noise = {"p_seed": "i64", "p_out": "fp32"}
    written = Case(noises._philox_normal_kernel, noise, ("size", "chunks"), {"BLOCK": block}, warps)
    cases.append(written._replace(writes=True))
    return cases


class Rows(NamedTuple):
    """How a kernel finds the rows of a Jacobian: in arguments, or in a table of several parts."""

    pointers: dict[str, str]
    integers: tuple[str, ...]
    constants: dict[str, object]
    aligned: bool


def one_part(dtype: str) -> Rows:
    constants = {"p_record": None, "p_part": None, "DTYPE": ELEMENTS[dtype], "ALIGNED": False}
    return Rows({"p_rows": dtype}, ("size", "stride"), constants, True)


def many_parts(dtype: str, aligned: bool) -> Rows:
    constants = {"p_rows": None, "size": None, "stride": None, "DTYPE": ELEMENTS[dtype], "ALIGNED": aligned}
    return Rows({"p_record": "i64", "p_part": "i32"}, (), constants, aligned)


def combine_case(rows: Rows, dtype: str, out: str, add: bool) -> Case:
    block, warps = settings.stream_settings(1 << 20)
    pointers = {**rows.pointers, "p_weight": "fp32", "p_out": out, "p_square": SUM[dtype]}
    constants = {"K": 5, "BLOCK": block, "ACCUMULATE": DTYPES[dtype], "OUT_DTYPE": ELEMENTS[out], "ADD": add}
    constants |= rows.constants
    return Case(
        combine._combine_kernel, pointers, rows.integers, constants, warps, rows.aligned, (), rows.aligned
    )


def combine_cases() -> list[Case]:
    cases = []
    for dtype in DTYPES:
        cases.append(combine_case(one_part(dtype), dtype, dtype, False))
        cases += [combine_case(many_parts(dtype, True), dtype, dtype, add) for add in (False, True)]
        cases.append(combine_case(many_parts(dtype, False), dtype, dtype, True))
    for dtype, out in (
        ("bf16", "fp32"),
        ("fp16", "fp32"),
        ("fp32", "bf16"),
        ("fp64", "fp32"),
        ("fp64", "bf16"),
    ):
        cases.append(combine_case(many_parts(dtype, True), dtype, out, True))
    return cases


def gram_case(rows: Rows, dtype: str, k: int, sums: str | None = None) -> Case:
    sums = sums or SUM[dtype]
    block, warps = settings.gram_settings(k, 1 << 20, 8 if sums == "fp64" else 4, rows.aligned)
    pointers = {**rows.pointers, "p_partial": sums}
    constants = {**rows.constants, "K": k, "BLOCK": block, "ACCUMULATE": ELEMENTS[sums]}
    if k <= settings.MAX_VECTOR_CLUSTERS:
        return Case(gram._gram_vector_kernel, pointers, rows.integers, constants, warps, rows.aligned)
    constants["TILE"] = max(16, settings.power_of_two(k))
    constants["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
    return Case(gram._gram_tile_kernel, pointers, (*rows.integers, "run"), constants, warps)


def gram_cases() -> list[Case]:
    cases = []
    for dtype in DTYPES:
        cases += [gram_case(one_part(dtype), dtype, k) for k in (2, 5, 8)]
        cases += [gram_case(many_parts(dtype, True), dtype, k) for k in (2, 5, 8)]
        cases.append(gram_case(many_parts(dtype, False), dtype, 8))
    for dtype in ("fp32", "bf16", "fp16"):
        cases += [gram_case(one_part(dtype), dtype, k) for k in (10, 20, 64)]
        cases += [gram_case(many_parts(dtype, aligned), dtype, 64) for aligned in (False, True)]
    for dtype in ("fp32", "bf16", "fp16"):
        cases += [gram_case(one_part(dtype), dtype, k, "fp64") for k in (2, 5, 8)]
        cases += [gram_case(many_parts(dtype, aligned), dtype, 8, "fp64") for aligned in (False, True)]
    return cases


def wgrad_cases() -> list[Case]:
    """Weight gradients: many rows, few rows, small layers, sizes that are no multiple of anything."""
    cases = []
    for k, rows, outputs, inputs in [
        (5, 2560, 768, 192),
        (20, 40, 4096, 4096),
        (5, 40, 64, 32),
        (2, 9, 3, 5),
    ]:
        for dtype, out, add in cluster_sums():
            chosen = settings.wgrad_settings(k, rows, outputs, inputs, {"fp32": 4, "fp64": 8}.get(dtype, 2))
            for precision in ("ieee", "tf32") if dtype == "fp32" else ("ieee",):
                constants = {"ADD": add, "PRECISION": precision, "ACCUMULATE": DTYPES[dtype]}
                constants |= {"BLOCK_N": chosen.rows, "BLOCK_O": chosen.outputs, "BLOCK_I": chosen.inputs}
                pointers = {"p_grad": dtype, "p_x": dtype, "p_offset": "i64", "p_out": out}
                integers = ("num_rows", "num_outputs", "num_inputs", "stride_grad", "stride_x")
                integers += ("stride_cluster", "stride_share")
                # TF32 operands are transposed on their way through registers.
                streams = not add and precision == "ieee" and inputs > 16
                case = Case(
                    clusters._cluster_wgrad_kernel, pointers, integers, constants, chosen.num_warps, streams
                )
                cases.append(case)
    return cases


def cluster_sum_cases() -> list[Case]:
    cases = []
    for dtype, out, add in cluster_sums():
        for k, rows, columns in ((5, 2560, 768), (5, 40, 12288)):
            chosen = settings.cluster_sum_settings(k, rows, columns)
            constants = {"ADD": add, "ACCUMULATE": DTYPES[dtype], "ROWS": chosen.rows, "BLOCK": chosen.block}
            pointers = {"p_value": dtype, "p_offset": "i64", "p_out": out}
            integers = ("num_rows", "size", "stride_value", "stride_cluster", "stride_share")
            case = Case(
                clusters._cluster_sum_kernel, pointers, integers, constants, chosen.num_warps, not add
            )
            cases.append(case)
        block, warps = settings.stream_settings(1 << 20)
        pointers, constants = {"p_share": SUM[out], "p_out": out}, {"ADD": add, "BLOCK": block}
        integers = ("shares", "size", "stride_cluster")
        cases.append(Case(clusters._add_shares_kernel, pointers, integers, constants, warps, not add))
    return cases


def group_norm_cases() -> list[Case]:
    """Large images, short rows of many channels, sizes that are no multiple of anything."""
    cases = []
    for dtype in ("fp32", "bf16", "fp16"):
        pointers = {"p_grad": dtype, "p_x": dtype, "p_mean": "fp32", "p_rstd": "fp32", "p_by_x": dtype}
        pointers |= {"p_by_weight": "fp32", "p_by_bias": "fp32"}
        for channels, size in ((4, 4096), (16, 64), (1, 1024), (3, 35), (64, 1)):
            rows, block, warps = settings.group_norm_settings(channels, size)
            aligned = size % 16 == 0
            sizes = ("size",) if aligned else ()
            constants = {"ROWS": rows, "BLOCK": block}
            for weight in (None, dtype):
                given = pointers if weight is None else pointers | {"p_weight": weight}
                compiled = constants | {"p_weight": None} if weight is None else constants
                counts = ("groups", "channels") if aligned else ("groups", "channels", "size")
                kernel = group_norm._group_norm_backward_kernel
                cases.append(Case(kernel, given, sizes, compiled, warps, aligned, counts, aligned))
                if dtype == "bf16" and weight is not None:  # dtypes may be mixed
                    mixed = given | {"p_mean": "fp64", "p_rstd": "bf16", "p_weight": "fp32"}
                    cases.append(cases[-1]._replace(pointers=mixed))
    return cases


def norm_rows_cases() -> list[Case]:
    """Tokens of a transformer into shares and into the result, short rows, the longest, a width of no multiple."""
    cases = []
    for dtype, accumulate in DTYPES.items():
        longest = settings.MAX_NORM_BYTES // (8 if dtype == "fp64" else 4)
        for rows, size in ((16384, 384), (4096, 1024), (40, 64), (4096, longest), (100, 77)):
            chosen = settings.norm_rows_settings(5, rows, size, 8 if dtype == "fp64" else 4)
            for moved, weighted, add in ((True, True, False), (True, False, False), (False, True, True)):
                sums = SUM[dtype] if chosen.shares > 1 else dtype
                pointers = {
                    "p_grad": dtype,
                    "p_x": dtype,
                    "p_rstd": "fp32",
                    "p_offset": "i64",
                    "p_by_x": dtype,
                }
                pointers |= {"p_mean": "fp32"} if moved else {}
                pointers |= {"p_weight": dtype, "p_by_weight": sums} if weighted else {}
                pointers |= {"p_by_bias": sums} if weighted and moved else {}
                optional = ("p_mean", "p_weight", "p_by_weight", "p_by_bias")
                constants = {name: None for name in optional if name not in pointers}
                constants |= {"ADD_WEIGHT": add, "ADD_BIAS": False, "ACCUMULATE": accumulate}
                constants |= {"ROWS": chosen.rows, "BLOCK": chosen.block}
                aligned = size % 16 == 0
                strides = ("stride_weight", "stride_bias", "stride_share")
                integers = ("size", *strides) if aligned else ()
                counts = ("num_rows",) if aligned else ("num_rows", "size", *strides)
                kernel = norm_rows._norm_rows_backward_kernel
                streams = aligned and size >= 384
                cases.append(
                    Case(kernel, pointers, integers, constants, chosen.num_warps, streams, counts, streams)
                )
    return cases


def small_cases() -> list[Case]:
    cases = []
    for dtype in ("fp32", "fp64"):
        for k in (1, 5, 64):
            pairs, block, warps = settings.sum_settings(k)
            constants = {"K": k, "PAIRS": pairs, "BLOCK": block}
            pointers = {"p_partial": dtype, "p_sum": dtype}
            cases.append(Case(parts._sum_kernel, pointers, (), constants, warps, False, ("programs",)))
        pointers = {"p_partial": dtype, "p_weight": dtype, "p_loss": dtype}
        integers = ("batch", "chunks", "size")
        for weighted in (False, True):
            constants = {"WEIGHTED": weighted, "BLOCK": 128}
            cases.append(Case(losses._sample_mean_kernel, pointers, integers, constants))
        pointers = {"p_value": dtype, "p_cluster": "i64", "p_mean": dtype, "p_count": "i64"}
        cases.append(Case(losses._cluster_mean_kernel, pointers, ("batch",), {"BLOCK": 1024}))
        pointers = {
            "p_mean": dtype,
            "p_count": "i64",
            "p_log_var": "fp32",
            "p_cluster": "i64",
            "p_weight": dtype,
        }
        pointers |= {"p_loss": dtype, "p_slope": dtype, "p_log_var_grad": "fp32"}
        for weighted in (False, True):
            constants = {"WEIGHTED": weighted, "TILE": 8, "BLOCK": 1024}
            cases.append(Case(losses._uncertainty_kernel, pointers, ("batch", "k"), constants))
        for k in (1, 5, 64 if dtype == "fp32" else settings.MAX_FLOAT64_NASH_CLUSTERS):
            tile, warps = settings.weight_settings(k)
            nash_warps = settings.weight_settings(k, settings.NASH_WARPS).num_warps
            size = {"K": k, "TILE": tile}
            pointers = {"p_gram": dtype, "p_order": "i64", "p_present": "i1", "p_weight": dtype}
            cases.append(Case(weights._pcgrad_kernel, pointers, (), size, warps))
            pointers = {"p_gram": dtype, "p_present": "i1", "p_weight": dtype}
            steps = {"NEWTON_STEPS": 32, "LINE_SEARCH_STEPS": 6, "DELTA": 3e-4, "CONVERGED": 1e-6}
            cases.append(Case(weights._nash_kernel, pointers, (), {**size, **steps}, nash_warps))
    for k in (1, 5, 20, 64):
        tile, warps = settings.weight_settings(k, tiles=2)
        constants = {"K": k, "TILE": tile, "SWEEPS": 16, "CONVERGED": 2.0**-52}
        pointers = {"p_matrix": "fp64", "p_value": "fp64", "p_vector": "fp64"}
        cases.append(Case(eigh._eigh_kernel, pointers, (), constants, warps))
    return cases


def compile_case(case: Case, target: GPUTarget) -> triton.compiler.CompiledKernel:
    names = case.kernel.arg_names
    signature, attributes = {}, {}
    for position, name in enumerate(names):
        if name in case.pointers:
            signature[name] = "*" + case.pointers[name]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in case.integers:
            signature[name] = "i32"
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in case.counts:
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
    missing = [n for n in names if n not in {*case.pointers, *case.integers, *case.counts, *case.constants}]
    assert not missing, (case.kernel.__name__, missing)
    source = ASTSource(case.kernel, signature, case.constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": case.num_warps})


def faults(case: Case, target: GPUTarget) -> list[str]:
    assembly = compile_case(case, target).asm
    if target.backend != "cuda":
        return [] if assembly.get("hsaco") else ["no code object"]
    found = [] if assembly.get("cubin") else ["no cubin"]
    if local_bytes(assembly["cubin"]) > ONE_REGISTER:
        found.append("registers spilled to local memory")
    if case.streams and not re.search(SIXTEEN_BYTES, assembly["ptx"]):
        found.append("no 16-byte loads")
    if case.writes and not re.search(r"st\.global\S*\.(v4\.b32|v2\.b64)", assembly["ptx"]):
        found.append("no 16-byte stores")
    return found


def local_bytes(cubin: bytes) -> int:
    """Return the local memory of a kernel, stack included, as the disassembler reports it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", report)
    assert usage, report
    return int(usage[1]) + int(usage[2])


def all_cases() -> list[Case]:
    sums = wgrad_cases() + cluster_sum_cases() + group_norm_cases() + norm_rows_cases()
    return streaming_cases() + combine_cases() + gram_cases() + sums + small_cases()


def main() -> int:
    failed = compiled = 0
    for case in all_cases():
        for target in TARGETS:
            compiled += 1
            for fault in faults(case, target):
                failed += 1
                kinds = ",".join(case.pointers.values())
                print(f"{case.kernel.__name__}[{kinds}] {case.constants} on {target.arch}: {fault}")
    print(f"{compiled} kernel builds for {', '.join(str(t.arch) for t in TARGETS)}: {failed} faults")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
