"""The ahead-of-time builds leave out no kernel."""

import pathlib
import re

from diffmtl_fast import kernels
from diffmtl_fast.ops import cuda
from tests.kernels import aot, predict


def test_every_launched_kernel_is_built_ahead_of_time():
    source = "".join(path.read_text() for path in pathlib.Path(cuda.__path__[0]).glob("*.py"))
    launched = set(re.findall(r"\b\w+_kernels\.(_\w+_kernel)\[", source))
    built = {case.kernel.__name__ for case in aot.all_cases()}
    assert launched == built


def test_every_kernel_is_in_the_predictions():
    sources = pathlib.Path(kernels.__path__[0]).glob("*.py")
    defined = {
        name for path in sources for name in re.findall(r"^def _(\w+)_kernel\(", path.read_text(), re.M)
    }
    assert set(predict.KERNELS) == defined
    wanted = {f"{row.kernel}, {row.dtype}" for row in predict.rows()}
    assert {name.split(", ")[0] for name in wanted} == defined
    large, mix = predict.OUT.read_text().split("## Instructions")
    for table in (large, mix):
        assert set(re.findall(r"^\| (\w+, \w+) \|", table, re.M)) == wanted
