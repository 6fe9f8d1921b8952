"""``python -m benchmarks report | compare``, from the repository root."""

import sys

from benchmarks.report.command import main

sys.exit(main())
