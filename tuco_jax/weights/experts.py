"""Experts that a checkpoint holds in one tensor, as transformers 5 does in memory, one by one.

    model.layers.0.mlp.experts.gate_up_proj [E, 2F, D]
        -> model.layers.0.mlp.experts.{e}.gate_proj.weight, ....up_proj.weight [F, D], e < E
    model.layers.0.mlp.experts.down_proj [E, D, F]
        -> model.layers.0.mlp.experts.{e}.down_proj.weight [D, F]

Published checkpoints hold them one by one, and so does what transformers writes by default.

Legend: E experts, D residual width, F width of an expert.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from common_jax.errors import InputError
from common_jax.io.wrapped_names import unwrapped
from tuco_jax.models.config import ModelConfig
from tuco_jax.weights.assemble import TensorSource

__all__ = ["one_by_one"]

_FUSED = re.compile(r"(.*\.)mlp\.experts\.(gate_up_proj|down_proj)")
_ROUTER = re.compile(r"(.*\.)mlp\.gate\.weight")
# What transformers 5 renamed: module, gate, up, down.
_MIXTRAL = ("block_sparse_moe", "w1", "w3", "w2")
_OTHERS = ("mlp", "gate_proj", "up_proj", "down_proj")


def one_by_one(source: TensorSource, config: ModelConfig) -> TensorSource:
    """The same tensors, fused experts under the names that they have by themselves.

    Raises InputError where a fused tensor has another shape than `config` calls for.
    """
    if not any(_FUSED.fullmatch(unwrapped(name)) for name in source.shapes()):
        return source
    return _OneByOne(source, config)


class _OneByOne:
    """A `TensorSource` of another's tensors."""

    def __init__(self, source: TensorSource, config: ModelConfig) -> None:
        self.name, self._source = source.name, source
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[str, int | None, slice]] = {}  # tensor, expert, its rows
        self._held: tuple[Any, Any] = None, None  # a tensor and expert, and its rows
        width, inner = config.width, config.mlp_width
        module, gate, up, down = _MIXTRAL if config.family == "mixtral" else _OTHERS
        for stored, shape in source.shapes().items():
            name = unwrapped(stored)
            if match := _ROUTER.fullmatch(name):
                self._add(f"{match[1]}{module}.gate.weight", shape, stored)
            elif not (match := _FUSED.fullmatch(name)):
                self._add(stored, shape, stored)
            else:
                parts = {down: (0, width)}
                if match[2] == "gate_up_proj":
                    parts = {gate: (0, inner), up: (inner, 2 * inner)}
                fits = (config.experts, max(stop for _, stop in parts.values()))
                fits += (width if len(parts) > 1 else inner,)
                if shape != fits:
                    raise InputError(
                        f"{source.file(stored)}: tensor {stored} has shape {list(shape)}, but the "
                        f"config calls for {list(fits)}; one of them is of another model"
                    )
                for kind, (start, stop) in parts.items():
                    for expert in range(config.experts):
                        self._add(
                            f"{match[1]}{module}.experts.{expert}.{kind}.weight",
                            (stop - start, shape[2]),
                            stored,
                            expert,
                            slice(start, stop),
                        )

    def _add(
        self,
        name: str,
        shape: tuple[int, ...],
        stored: str,
        expert: int | None = None,
        rows: slice = slice(None),
    ) -> None:
        if name in self._places:
            raise InputError(
                f"{self._source.file(stored)}: tensor {name} is doubled: {stored} and "
                f"{self._places[name][0]} hold it; remove one"
            )
        self._shapes[name], self._places[name] = shape, (stored, expert, rows)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def file(self, tensor: str) -> str:
        return self._source.file(self._places[tensor][0])

    def stored(self, tensor: str) -> str:
        return self._source.stored(self._places[tensor][0])

    def read(
        self, tensor: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> Float[np.ndarray, "..."]:
        stored, expert, own = self._places[tensor]
        if expert is None:
            return self._source.read(stored, rows, columns)
        if self._held[0] != (stored, expert):  # read once for all blocks of its rows
            self._held = None, None
            whole = self._source.read(stored, slice(expert, expert + 1))[0]
            self._held = (stored, expert), whole
        value = self._held[1][own][rows]
        return value if columns == slice(None) else value[:, columns]
