"""Makes the helper beside these tests importable: the suite runs without packages (import-mode importlib)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
