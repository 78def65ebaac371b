"""The windows of episodes that a trajectory model is trained on.

Legend: M time steps of all episodes, N windows, H horizon, D width of a transition.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from common_jax.errors import InputError
from reward_jax.data.episodes import Episodes, transitions

if TYPE_CHECKING:
    from reward_jax.data.trajectory.normalisers import Normaliser

__all__ = ["Windows", "windows"]


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """An index into a series: flat [M, D] float32 (normalised), starts [N] int32.

    Window n is `flat[starts[n] + stride * arange(horizon)]`.
    """

    flat: np.ndarray
    starts: np.ndarray
    horizon: int
    stride: int = 1

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, indices: Any) -> np.ndarray:
        """The windows of these numbers, [n] -> [n, H, D]."""
        first = self.starts[np.asarray(indices)]
        return self.flat[first[..., None] + self.stride * np.arange(self.horizon)]


def windows(
    episodes: Episodes,
    normaliser: "Normaliser",
    *,
    horizon: int,
    stride: int = 1,
    actions: bool = True,
    until: float | None = 1.0,
) -> Windows:
    """Windows of `horizon` rows, every `stride`-th, cut at every offset of every episode.

    Where episodes know their arrivals, windows start during the walk: at offsets 0 to
    `until * arrival` (1.0: up to the arrival itself; None: at every offset that leaves room), so
    that they hold a part of the walk and then the stay, and are not mostly a pure stay. All such
    offsets must leave room for a window, or long walks would be cut out of the data and bias it:
    InputError otherwise. Elsewhere (D4RL, Minari) a window starts wherever it fits, and episodes
    that are too short are left out; InputError where all are.
    actions: False for observations alone, with a normaliser of as many dimensions.
    """
    if horizon < 1 or stride < 1:
        raise InputError(f"horizon and stride must be 1 or more, not {horizon} and {stride}")
    rows = transitions(episodes, actions=actions)
    if np.shape(normaliser.offset) != rows.shape[1:]:
        raise InputError(
            f"the normaliser has {np.size(normaliser.offset)} dimensions, the data "
            f"{rows.shape[1]}: fit it to `transitions` with the same `actions`"
        )
    span = (horizon - 1) * stride + 1
    lengths = np.asarray(episodes.lengths)
    size = f"windows of {horizon} rows, stride {stride}, take {span} steps"
    if lengths.max() < span:
        raise InputError(
            f"{size}, but the episodes have {lengths.min()} to {lengths.max()}: lower the horizon "
            "or the stride, or record longer ones"
        )
    last = lengths - span
    if until is not None and episodes.arrivals is not None:
        wanted = np.floor(until * np.asarray(episodes.arrivals)).astype(int)
        if (short := np.flatnonzero(wanted > last)).size:
            worst = short[np.argmax((wanted - last)[short])]
            raise InputError(
                f"{size}, but episode {worst} has {lengths[worst]} and walks for "
                f"{episodes.arrivals[worst]}: record {wanted[worst] + span} steps or more, so "
                "that long walks are not left out (or lower the horizon or the stride)"
            )
        last = wanted
    counts = np.maximum(last + 1, 0)
    # Every offset 0 .. last of every episode, without a loop over episodes.
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(episodes.starts, counts) + offsets
    flat = np.asarray(normaliser.normalise(rows), np.float32)
    return Windows(flat, starts.astype(np.int32), horizon, stride)
