"""Weightings: cluster losses → one scalar, or the Gramian of the cluster gradients → weights.

Each weighting is a module of this folder and is found by being there: its class becomes a name of this package and
of `diffmtl_fast`, and what it registers is read by the command line, the trainer, the study and the documentation.
`ContinuousUncertainty`, which weighs samples and not clusters, stands outside the registry.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from ._continuous import ContinuousUncertainty as ContinuousUncertainty
from ._interface import GramianWeighting as GramianWeighting
from ._interface import LossWeighting as LossWeighting
from ._param_groups import param_groups as param_groups
from ._registry import Method as Method
from ._registry import Option as Option
from ._registry import methods

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

METHODS = methods()

if TYPE_CHECKING:  # for editors and type checkers alone: a class that is not here works all the same
    from .aligned import AlignedMTL as AlignedMTL
    from .cagrad import CAGrad as CAGrad
    from .constant import Constant as Constant
    from .db_mtl import DBMTL as DBMTL
    from .dualproj import DualProj as DualProj
    from .dwa import DWA as DWA
    from .equal import Equal as Equal
    from .fairgrad import FairGrad as FairGrad
    from .famo import FAMO as FAMO
    from .gls import GLS as GLS
    from .gradvac import GradVac as GradVac
    from .imtl import IMTLG as IMTLG
    from .imtl_l import IMTLL as IMTLL
    from .mgda import MGDA as MGDA
    from .nash import NashMTL as NashMTL
    from .pcgrad import PCGrad as PCGrad
    from .rlw import RLW as RLW
    from .si import ScaleInvariant as ScaleInvariant
    from .stch import STCH as STCH
    from .uncertainty import UncertaintyWeighting as UncertaintyWeighting
    from .upgrad import UPGrad as UPGrad
else:
    _classes = {method.cls.__name__: method.cls for method in METHODS.values()}
    globals().update(_classes)
    __all__ = ["ContinuousUncertainty", "GramianWeighting", "LossWeighting", "param_groups", *_classes]
