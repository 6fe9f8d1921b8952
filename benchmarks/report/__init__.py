"""What benchmarks found: read, tabulated, drawn, compared. The benchmarks are in benchmarks/ of a checkout."""

from .compare import Change, Changes, changes
from .results import Comparison, Machine, Results, Spread, Way, machines

__all__ = ["Change", "Changes", "Comparison", "Machine", "Results", "Spread", "Way", "changes", "machines"]
