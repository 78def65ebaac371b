"""How prompts are scored; light, so that --help comes at once."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from common_jax.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

__all__ = ["Parallel", "ScoringOptions"]

Parallel = Literal["jit", "pmap"]


@dataclasses.dataclass(frozen=True)
class ScoringOptions:
    """How prompts are scored.

    Args:
        norm: 1, the paper's, or 2.
        token_budget: tokens of a batch, padding included; by default what suits the backend.
        parallel: jit over the mesh, or pmap over its data axis.
        truncate: keep the last tokens of prompts beyond the model's context; else an error.
    """

    norm: Literal[1, 2] = 1
    token_budget: int | None = None
    parallel: Parallel = "jit"
    truncate: bool = False

    def check(self, mesh: "Mesh | None") -> None:
        """InputError for options that cannot be run with, on this mesh."""
        if self.norm not in (1, 2):
            raise InputError(f"norm must be 1 or 2, not {self.norm!r}")
        if self.token_budget is not None and self.token_budget < 1:
            raise InputError(f"token_budget must be positive, not {self.token_budget}")
        if self.parallel not in ("jit", "pmap"):
            raise InputError(f"parallel must be jit or pmap, not {self.parallel!r}")
        if self.parallel == "pmap" and mesh is not None and mesh.shape["data"] != mesh.size:
            raise InputError(
                "pmap is for data alone: set mesh.fsdp and mesh.tensor to 1, or use jit"
            )
