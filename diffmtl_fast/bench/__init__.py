"""What benchmarks found: read, tabulated, drawn, compared. The benchmarks are in benchmarks/ of a checkout."""

from .compare import Change, changes
from .results import Comparison, Results, Spread, Way

__all__ = ["Change", "Comparison", "Results", "Spread", "Way", "changes"]
