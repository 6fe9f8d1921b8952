"""The ahead-of-time builds leave out no kernel."""

import inspect
import re

from diffmtl_fast.ops import _cuda, _launches
from tests.kernels import aot


def test_every_launched_kernel_is_built_ahead_of_time():
    source = inspect.getsource(_cuda) + inspect.getsource(_launches)
    launched = set(re.findall(r"\b\w+_kernels\.(_\w+_kernel)\[", source))
    built = {case.kernel.__name__ for case in aot.all_cases()}
    assert launched == built
