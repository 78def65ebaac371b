"""The engine that scores a batch of packed prompts, whichever form the batch has."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from tuco_jax.core.engine import Engine
from tuco_jax.core.last_token import LastTokens
from tuco_jax.core.shared_prefix import SharedPrefixes
from tuco_jax.prompts.packing import segments_of

__all__ = ["engine_of"]


def engine_of(rows: Mapping[str, Any], norm: int, mesh: Mesh | None = None) -> Engine:
    """Scores of a batch's arrays, those of `Packed` or of `Behind` (rows behind prefixes)."""
    own = dict(rows) | {"segments": segments_of(rows)}
    if "prefixes" in own:
        return SharedPrefixes(**own, norm=norm, mesh=mesh)
    return LastTokens(**own, norm=norm, mesh=mesh)
