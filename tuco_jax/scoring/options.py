"""How prompts are scored; imports little, so that --help is quick."""

import dataclasses
import os
from typing import TYPE_CHECKING, Literal

from common_jax.cli.ranges import NonNegativeFloat, PositiveInt, check_ranges
from common_jax.distributed import count
from common_jax.errors import InputError
from tuco_jax.weights.options import PairOptions

if TYPE_CHECKING:
    from jax.sharding import Mesh

__all__ = ["Parallel", "PassOptions", "ScoreFileOptions", "ScoringOptions"]

Parallel = Literal["jit", "pmap"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassOptions:
    """How batches pass through a streamed pair, layer after layer.

    Args:
        memory: GiB of host memory for residual streams between layers; the rest goes to disk.
        tokens: of one pass, for which each layer is read once, and which a resumed run repeats; by
            default enough for computing to take longer than reading.
        folder: of residual streams on disk; by default the output's, or that of temporary files.
    """

    memory: NonNegativeFloat = 2.0
    tokens: PositiveInt | None = None
    folder: str | None = None

    def check(self) -> None:
        """Raise InputError for a folder that is not there."""
        if self.folder is not None and not os.path.isdir(self.folder):
            raise InputError(f"passes.folder: {self.folder}: no such folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How prompts are scored.

    Args:
        norm: 1, the paper's, or 2.
        token_budget: tokens of a batch, padding included; by default as the backend asks
            (`core/budget.py`).
        parallel: jit over the mesh, or pmap over its data axis.
        truncate: keep the last tokens of prompts beyond the model's context; else an error.
        continue_final: leave an assistant's turn at a conversation's end open, as one that is
            being written; else the template closes it.
        share_prefixes: compute what prompts begin with in common (a system prompt, examples, a
            template) once, where that pays; pmap does not.
        passes: of a streamed pair.
    """

    norm: Literal[1, 2] = 1
    token_budget: PositiveInt | None = None
    parallel: Parallel = "jit"
    truncate: bool = False
    continue_final: bool = False
    share_prefixes: bool = True
    passes: PassOptions = dataclasses.field(default_factory=PassOptions)

    def check(self, mesh: "Mesh | None", streams: bool = False) -> None:
        """Raise InputError for options beyond their ranges, or that do not fit one another."""
        check_ranges(self)
        if self.parallel == "pmap" and mesh is not None and mesh.shape["data"] != mesh.size:
            raise InputError(
                "pmap is for data alone: set mesh.fsdp and mesh.tensor to 1, or use jit"
            )
        if count() > 1 and (streams or self.parallel == "pmap"):
            raise InputError(
                "a pair that streams, and pmap, have the devices of one process: leave out "
                "stream and parallel, or give one process"
            )
        if streams and (mesh is not None or self.parallel != "jit"):
            raise InputError("a pair that streams runs on one device: leave out mesh and parallel")
        self.passes.check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreFileOptions(ScoringOptions, PairOptions):
    """Score a file of prompts.

    Args:
        prompts: .jsonl, .csv, .parquet or .txt; rows have prompt or messages, may have id, label.
        out: .jsonl, .csv or .parquet: id, tuco, preco, tokens. Metadata goes to OUT.meta.json.
        layers: also write the last token's beta_1 .. beta_L.
        stream: read each layer while others compute, for a pair that does not fit in memory.
    """

    prompts: str
    out: str
    layers: bool = False
    stream: bool = False

    @property
    def scoring(self) -> dict[str, object]:
        """The fields of `ScoringOptions`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(ScoringOptions)}
