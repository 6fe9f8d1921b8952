"""What might read a tensor on the host, found in the source: each place is known, and why no step waits there.

`tests/train/test_synchronisation.py` runs steps and finds what waits in them; this finds what they do not reach.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffmtl_fast

PACKAGE = Path(diffmtl_fast.__file__).parent
SEARCHED = ["gradients", "ops/cuda", "weighting", "curriculum", "distributed", "train/loop.py"]
SEARCHED += ["train/history.py", "train/ema.py"]

READS = {"item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "unique", "unique_consecutive", "bincount"}
READS |= {"histc", "masked_select", "multinomial", "synchronize", "is_nonzero"}
CONDITIONS = {"any", "all", "equal", "isfinite", "isnan"}

#: Functions by why they may read. Of what is gone a line must go here, too.
KNOWN = {
    "clusters that the host does not know, the one wait of a step": {"gradients/batch.py _sort"},
    "an overflow, which a GradScaler's step reads right after": {
        "gradients/clustered.py ClusteredMTL._weigh",
        "gradients/clustered.py ClusteredMTL._undone_where_skipped",
    },
    "checks of the first steps, and again where the model has changed": {
        "gradients/compiled/compiled_engine.py CompiledEngine._refuse_overwritten",
        "gradients/fully_sharded.py FullyShardedEngine._revealed",
        "gradients/grouped/module_slices.py ModuleSlices._probe",
        "gradients/independence.py _leaks_anywhere",
        "gradients/independence.py agree",
        "gradients/independence.py leaks",
        "gradients/independence.py revealing",
        "gradients/loss_check.py LossCheck.__call__",
        "gradients/model_check.py _near",
        "gradients/model_state.py _differ",
        "gradients/model_state.py _same",
    },
    "forwards that were given clusters of their own, compared where they are other tensors": {
        "gradients/clustered.py ClusteredMTL._end_step",
        "gradients/step.py Step.refuse_other_clusters",
    },
    "read where the host holds the tensor alone (on_host)": {
        "weighting/_losses.py log_losses",
        "weighting/_nonnegative.py NonnegativeQuadratic._exchange",
        "weighting/fairgrad.py _newton",
    },
    "numbers of the host": {
        "curriculum/_levels.py boundary_indices",
        "curriculum/_levels.py merge",
        "curriculum/_levels.py probability_below",
        "curriculum/difficulty_curriculum.py DifficultyCurriculum.update",
        "curriculum/difficulty_curriculum.py _check_pacing",
        "curriculum/difficulty_curriculum.py _noisiest",
        "curriculum/named.py all_densities",
        "curriculum/named.py interval_sampler",
        "curriculum/range_sampler.py RangeSampler.__init__",
        "curriculum/range_sampler.py RangeSampler.phase",
        "curriculum/samplers.py UniformSampler.density",
        "curriculum/samplers.py _log_snr_edges",
        "curriculum/speed_sampler.py SpeeDSampler.__init__",
        "curriculum/timestep_sampler.py _common_generator",
        "distributed/launched.py waiting",
        "train/ema.py exponent",
        "train/loop.py Trainer.fit",
        "weighting/constant.py Constant.__init__",
    },
    "states that are saved and loaded": {
        "curriculum/difficulty_curriculum.py DifficultyCurriculum.get_extra_state",
        "curriculum/difficulty_curriculum.py DifficultyCurriculum.set_extra_state",
        "curriculum/range_sampler.py RangeSampler.set_extra_state",
        "curriculum/timestep_sampler.py TimestepSampler.set_extra_state",
        "train/loop.py Trainer._refuse_other_run",
        "weighting/_generator.py DrawsNumbers.set_extra_state",
        "weighting/nash.py NashMTL.set_extra_state",
    },
    "what several processes have exchanged": {
        "curriculum/timestep_sampler.py TimestepSampler.gather",
        "distributed/fully_sharded.py FullySharded.__init__",
        "distributed/fully_sharded.py FullySharded.adding_up",
        "distributed/fully_sharded.py FullySharded.meet",
        "distributed/fully_sharded.py FullySharded.sum_of_replicas",
        "distributed/fully_sharded.py ShardReader.gramian",
        "distributed/ranks.py Ranks._share",
        "distributed/ranks.py Ranks.add_with_flags",
        "distributed/replicas.py Replicas._refuse_differences",
        "distributed/replicas.py Replicas.losses",
        "gradients/fully_sharded.py FullyShardedEngine._plan",
    },
    "a line of the log, every so many steps": {
        "train/history.py History.check",
        "train/history.py History.flush",
        "train/history.py _plain",
    },
}


def called(node: ast.AST) -> str | None:
    """Return the name of a method that a node calls."""
    return node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None


def may_read(node: ast.AST) -> bool:
    """Whether a node may make a number of the host's out of a tensor, or a tensor out of such numbers."""
    if called(node) in READS:
        return True
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"bool", "int", "float"}
    ):
        computed = (ast.Call, ast.Subscript, ast.Compare)
        return any(isinstance(inner, computed) for given in node.args for inner in ast.walk(given))
    if called(node) in {"tensor", "as_tensor"} and isinstance(node, ast.Call):
        return any(keyword.arg == "device" for keyword in node.keywords)
    if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
        return any(called(inner) in CONDITIONS for inner in ast.walk(node.test))
    return False


def reading(node: ast.AST, name: str = "", in_function: bool = False) -> Iterator[str]:
    """Yield the outermost functions that may read, methods with their class."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef) and not in_function:
        name = f"{name}.{node.name}" if name else node.name
        in_function = isinstance(node, ast.FunctionDef)
    if may_read(node):
        yield name
    for child in ast.iter_child_nodes(node):
        yield from reading(child, name, in_function)


def found() -> set[str]:
    """Return all of the package that may read, as in KNOWN."""
    files = [
        file
        for name in SEARCHED
        for file in ([PACKAGE / name] if name.endswith(".py") else (PACKAGE / name).rglob("*.py"))
    ]
    assert len(files) > 60
    return {
        f"{file.relative_to(PACKAGE)} {name}"
        for file in files
        for name in reading(ast.parse(file.read_text()))
    }


def test_every_place_that_may_read_a_tensor_is_known():
    known = {place for places in KNOWN.values() for place in places}
    assert found() == known


@pytest.mark.parametrize(
    "line",
    [
        *("x.item()", "x.tolist()", "x.sum().cpu()", "bool(x.any())", "float(x[0])", "int(x > 0)"),
        *("torch.tensor([1.0], device=device)", "x.nonzero()", "torch.cuda.synchronize()"),
        *("if x.isfinite().all(): pass", "while not torch.equal(x, y): pass", "y = 1 if x.any() else 2"),
    ],
)
def test_reads_are_found(line):
    assert list(reading(ast.parse(f"class C:\n  def f(self):\n    def g():\n      {line}")))[:1] == ["C.f"]


def test_what_reads_nothing_is_not_found():
    harmless = "x.to(device)\ny = torch.where(x > 0, x, 0)\nif x.numel(): pass\nn = int(k)\nz = x.any()"
    assert list(reading(ast.parse(harmless))) == []
