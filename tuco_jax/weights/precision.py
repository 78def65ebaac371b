"""Which products a pair gets: what "auto" stands for here, and what cannot be asked for."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax

from common_jax.distributed import anywhere
from common_jax.errors import InputError
from tuco_jax.models.config import Precision
from tuco_jax.weights.assemble import PUBLISHED
from tuco_jax.weights.options import AskedPrecision, check_precision

__all__ = ["Wanted", "three_parts_pay"]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """dtype and precision as `load_pair` takes them; InputError where they exclude each other.

    Several processes ask it the same: what "auto" stands for is for all of their devices.
    spread: the pair goes over a mesh. pays: whether three parts take less time than float32; by
    default, on the devices here.
    """

    dtype: str
    precision: AskedPrecision
    spread: bool = False
    pays: bool | None = None

    def __post_init__(self) -> None:
        check_precision(self.dtype, self.precision)

    @functools.cached_property  # asked of other processes once
    def _precision(self) -> Precision:
        """As asked; "auto": three parts where they pay, which lose nothing that float32 keeps."""
        if self.precision != "auto":
            return self.precision
        if self.dtype == "float16":
            return "float32"
        pays = three_parts_pay(self.spread) if self.pays is None else self.pays
        return "bfloat16x3" if pays else "float32"

    @property
    def held(self) -> str:
        """The dtype to read weights in: parts of float32 weights take those stored in bfloat16."""
        parts = self.dtype == "float32" and self._precision != "float32"
        return PUBLISHED if parts else self.dtype

    def settled(self, stored: Mapping[str, frozenset[str]]) -> Precision:
        """The precision of weights that are stored in such types, of each model by its name.

        Raises InputError where parts are asked for of weights that would be rounded for them.
        """
        wide = {name: kinds for name, kinds in stored.items() if "bfloat16" not in kinds}
        if self.held != PUBLISHED or not wide:
            return self._precision
        if self.precision == "auto":
            return "float32" if len(wide) == len(stored) else self._precision
        name, kinds = next(iter(wide.items()))
        raise InputError(
            f"{name}: its weights are stored in {', '.join(sorted(kinds))}, and --precision "
            f"{self.precision} multiplies bfloat16: give --dtype bfloat16, too, which rounds "
            "them, or --precision float32"
        )


def three_parts_pay(spread: bool = False) -> bool:
    """Whether three products in bfloat16 take less time than one in float32, on all devices.

    Of several processes all ask at the same point of the program. On TPUs float32 is six passes in
    bfloat16; CUDA GPUs have tensor cores for it from compute capability 8 on. On CPUs it takes
    AMX: measured, in float32's rate, one part is 4.7 and three 1.5 (Intel, AMX), and 1.9 and 0.6
    (Zen 4, AVX512_BF16, whose peak is but twice float32's). spread: over a mesh layers are stacked
    in one program, in which three parts of a CPU with AMX have .92 of float32's speed.
    """
    pay = functools.partial(_three_parts_pay, spread)
    return not anywhere(not all(map(pay, jax.local_devices())))


def _three_parts_pay(spread: bool, device: Any) -> bool:
    if device.platform == "gpu":
        capability = str(getattr(device, "compute_capability", ""))
        return bool(re.fullmatch(r"\d+(\.\d+)?", capability)) and float(capability) >= 8
    if device.platform == "cpu":
        info = pathlib.Path("/proc/cpuinfo")
        return not spread and info.exists() and " amx_bf16" in info.read_text()
    return device.platform == "tpu"
