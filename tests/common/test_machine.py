import pathlib
import platform

import pytest

from common_jax import machine
from common_jax.machine import processor

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Processor
cpu family\t: 6
model\t\t: 167
flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize(
    "info, wanted",
    [
        (XEON, "Processor (family 6, model 167, avx2, avx512f, avx512_bf16, amx_tile)"),
        (XEON.replace("amx_tile", "sse"), "(family 6, model 167, avx2, avx512f, avx512_bf16)"),
        ("CPU implementer\t: 0x41\n", platform.processor()),
        (None, platform.processor()),
    ],
)
def test_a_processor_is_told_by_more_than_its_name(info, wanted, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if info is not None:
        path.write_text(info)
    monkeypatch.setattr(machine.pathlib, "Path", lambda _: pathlib.PosixPath(path))
    assert processor().endswith(wanted)
