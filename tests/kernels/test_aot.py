"""The ahead-of-time builds leave out no kernel."""

import pathlib
import re

from diffmtl_fast.ops import cuda
from tests.kernels import aot


def test_every_launched_kernel_is_built_ahead_of_time():
    source = "".join(path.read_text() for path in pathlib.Path(cuda.__path__[0]).glob("*.py"))
    launched = set(re.findall(r"\b\w+_kernels\.(_\w+_kernel)\[", source))
    built = {case.kernel.__name__ for case in aot.all_cases()}
    assert launched == built
