"""Which models a command reads, and how it holds them; imports little, so that --help is quick."""

import dataclasses
from typing import Literal

from common_jax.cli.options import MeshOptions

__all__ = ["PairOptions", "WeightOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """How weights are held.

    Args:
        dtype: what weights are held in; sums are float32.
        mesh: devices along each axis; rows of a batch are split over data and fsdp.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions(WeightOptions):
    """A base and what tuning made of it.

    Args:
        base: the pre-trained model: a Hugging Face directory, a hub id, a .gguf file or a store.
        tuned: the tuned model, likewise; or the directory of a PEFT adapter over the base.
    """

    base: str
    tuned: str
