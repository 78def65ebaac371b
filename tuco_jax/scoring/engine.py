"""How rows of token ids are computed: in batches that share what they begin with, by an engine.

Legend: N prompts, n tokens of one.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from tuco_jax.core.engine import Engine
from tuco_jax.core.shared_prefix import Rows, SharedPrefixes
from tuco_jax.models.pair import Pair
from tuco_jax.prompts.packing import Packed, pack, segments_of
from tuco_jax.prompts.prefixes import pack_shared

__all__ = ["as_begun", "engine_of", "planned"]


def planned(
    tokens: Sequence[Int[np.ndarray, " n"]], ends: Pair, budget: int, multiple: int, *, share: bool
) -> list[Packed]:
    """Batches of all prompts, as `pack`; with `share` some behind what their prompts share.

    Only prompts of the same rotary frequencies share: some kinds depend on a prompt's length.
    """
    if not share:
        return pack([row.size for row in tokens], budget, multiple)
    ropes = ends.base_config.ropes + ends.tuned_config.ropes
    kinds = [tuple(rope.kind(row.size) for rope in ropes) for row in tokens]
    return pack_shared(tokens, budget, multiple, kinds=kinds)


def as_begun(
    plan: Callable[[list[Int[np.ndarray, " n"]]], list[Packed]],
    tokens: Sequence[Int[np.ndarray, " n"]],
    begun: Collection[Sequence[int]],
) -> list[Packed]:
    """Batches in which a run goes on.

    plan: the batches of some rows. begun: prompts of each batch that an earlier start computed.
    Where these are batches of this plan, the plan, so that all is as of a run that nobody ended.
    Where they are not, as on another number of devices, batches of what is left alone: none is
    computed again because it would share a batch with one that is not done.
    """
    batches = plan([*tokens])
    done = {i for prompts in begun for i in prompts}
    left = [i for i in range(len(tokens)) if i not in done]
    if not left or {tuple(batch.prompts) for batch in batches}.issuperset(map(tuple, begun)):
        return batches
    return [batch.among(left) for batch in plan([tokens[i] for i in left])]


def engine_of(
    batch: Mapping[str, Any], make: Callable[..., Rows], *, whole: bool = False
) -> Engine:
    """The engine of a batch's arrays, those of `Packed` or of `Behind` (rows behind prefixes).

    make: the engine of rows, such as `LastTokens`, from tokens, mask, columns and segments.
    whole: as of `SharedPrefixes`.
    """
    rows = {name: batch[name] for name in ("tokens", "mask", "columns")}
    if "prefixes" not in batch:
        return make(**rows, segments=segments_of(batch))
    ahead = {name: batch[name] for name in ("prefixes", "real", "totals", "follows", "starts")}
    return SharedPrefixes(make(**rows, segments=batch["segments"]), **ahead, whole=whole)
