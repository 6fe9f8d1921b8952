"""The names that stored results are read by: groups, ways of doing the work, and what some cases are about.

The suite measures under these names, and goals, tables and pictures look figures up by them. A name that both
sides need is defined here and nowhere else: were a copy of it to change alone, its figures would read as not
measured.
"""

from __future__ import annotations

from enum import StrEnum


class Group(StrEnum):
    """The groups in the order in which they are measured, by the titles under which their results are stored."""

    CLUSTERING = "interval clustering"
    OPS = "fused ops"
    WEIGHTS = "Nash/PCGrad weights"
    GRADIENTS = "per-cluster gradients"
    STEP = "full training step"
    COMPILED = "compiled training step"
    DISTRIBUTED = "training step of two processes"
    AFFINITY = "task affinity"
    TRAINING = "end-to-end training to a fixed loss"

    @property
    def key(self) -> str:
        """The group's name on the command line."""
        return self.name.lower()


TYPICAL_K = 5  # clusters, as in the published experiments
MANY_K = 20

OURS = "diffmtl_fast"
DDP_STEP = "step of DistributedDataParallel"
REPLICATED_PCGRAD = f"{OURS}, all clusters in every process, PCGrad"
PARALLEL_PCGRAD = f"{OURS}, cluster-parallel, PCGrad"
PUBLISHED = "published"

# Clustering.
SQUARED = f"{OURS}, squared"
KMEANS1D = "kmeans1d"

# Weights, and the cases that they belong to.
LOOP = "published loop over vectors"
REBUILT, COMPILED_ONCE = "cvxpy + ECOS, as published", "cvxpy + ECOS, compiled once"
PCGRAD_GIVEN_J, NASH_WEIGHTS, GRAMIAN_WEIGHTS = "PCGrad given J", "Nash weights", "weights from the Gramian"
TORCHJD = "TorchJD"

# Ops.
GRAM = "gram"

# Training steps.
PLAIN_STEP = "plain step"
K_BACKWARDS_PCGRAD = "K backwards, PCGrad"
SLICES_PCGRAD = "slices by hand, PCGrad"
AUTOJAC_PCGRAD = "TorchJD autojac, PCGrad"
UNCERTAINTY, CURRICULUM = f"{OURS}, UncertaintyWeighting", f"{OURS}, DifficultyCurriculum"


def engine_step(engine: str, weighting: str) -> str:
    """Return the name of our step with one of the engines; "lean" is the grouped one with ``memory="lean"``."""
    return f"{OURS} {engine}, {weighting}"


# Compiled steps.
COMPILED_PLAIN = f"{PLAIN_STEP}, torch.compile"
COMPILED_PCGRAD = engine_step("compiled", "PCGrad")

# Task affinity, and the models that it is measured on.
SCALED = f"{PUBLISHED}, scaled from a part"
POINTS, STUDY_UNET, DIGITS_DIT = "MLP of points in the plane", "the study's UNet", "DiT of the digits"
