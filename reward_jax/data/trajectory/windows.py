"""The windows of episodes that a trajectory model is trained on.

Legend: M time steps of all episodes, N windows, H horizon, D width of a transition.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from common_jax.errors import InputError
from reward_jax.data.episodes import Episodes, transitions
from reward_jax.data.hdf5 import EpisodeEnds

if TYPE_CHECKING:
    from reward_jax.data.trajectory.normalisers import Normaliser

__all__ = ["CutOptions", "Padding", "Windows", "windows"]

Padding = Literal["none", "repeat", "zeros"]


@dataclasses.dataclass(frozen=True)
class CutOptions:
    """How episodes are cut out of a file, and windows out of episodes.

    Args:
        ends: where episodes of an HDF5 file end: at its marks, where the goal changes, nowhere
            (none: D4RL's Maze2D is one stream), or auto.
        padding: none: windows start where they fit; else at every row of an episode, and what is
            beyond its end is its last row again (repeat), or zeros, as in Diffuser.
    """

    ends: EpisodeEnds = "auto"
    padding: Padding = "none"


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
    padding: Padding = "none",
) -> Windows:
    """Windows of `horizon` rows, every `stride`-th, cut at every offset of every episode.

    Where episodes know their arrivals, windows start during the walk: at offsets 0 to
    `until * arrival` (1.0: up to the arrival itself; None: at every offset that leaves room), so
    that they hold a part of the walk and then the stay, and are not mostly a pure stay. All such
    offsets must leave room for a window, or long walks would be cut out of the data and bias it:
    InputError otherwise. Elsewhere (D4RL, Minari) a window starts wherever it fits, and episodes
    that are too short are left out; InputError where all are.
    padding: "none" as above. Else episodes go on beyond their end, room is not asked for, none is
    too short, and a window starts at every offset up to the arrival, or up to the last row. Beyond
    the end stands the last row again ("repeat": who has arrived stays), or zeros in the world's
    own units ("zeros": Diffuser's `use_padding`, which fills a buffer of zeros and then
    normalises; it starts no window at the last row, nor pads episodes that fill its buffer).
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
    if padding == "none":
        last = _last_that_fit(episodes, lengths, span, size, until)
        first = episodes.starts
    else:
        last = lengths - 1
        if until is not None and episodes.arrivals is not None:
            last = np.minimum(np.floor(until * np.asarray(episodes.arrivals)).astype(int), last)
        rows, first = _padded(rows, episodes, span - 1, padding)
    counts = np.maximum(last + 1, 0)
    # Every offset 0 .. last of every episode, without a loop over episodes.
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(first, counts) + offsets
    flat = np.asarray(normaliser.normalise(rows), np.float32)
    return Windows(flat, starts.astype(np.int32), horizon, stride)


def _last_that_fit(
    episodes: Episodes, lengths: np.ndarray, span: int, size: str, until: float | None
) -> np.ndarray:
    """Last offset at which a window starts in each episode, [E]; below 0 where it is too short."""
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
        return wanted
    return last


def _padded(
    rows: np.ndarray, episodes: Episodes, extra: int, padding: Padding
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [M + E * extra, D] of episodes that go on for `extra`; the first of each, [E]."""
    lengths = np.asarray(episodes.lengths)
    first = episodes.starts + extra * np.arange(len(lengths))
    offsets = np.arange(len(rows) + extra * len(lengths)) - np.repeat(first, lengths + extra)
    last = np.repeat(lengths - 1, lengths + extra)
    rows = rows[np.repeat(episodes.starts, lengths + extra) + np.minimum(offsets, last)]
    if padding == "zeros":
        rows[offsets > last] = 0
    return rows, first
