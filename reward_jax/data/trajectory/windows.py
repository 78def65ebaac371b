"""The windows of episodes that a trajectory model is trained on.

Legend: M time steps of all episodes, E episodes, N windows, H horizon, D width of a transition.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from common_jax.cli.ranges import PositiveInt
from common_jax.errors import InputError
from reward_jax.data.episodes import Episodes, transitions
from reward_jax.data.hdf5 import EpisodeEnds

if TYPE_CHECKING:
    from reward_jax.data.trajectory.normalisers import Normaliser

__all__ = [
    "CutOptions",
    "HorizonOption",
    "Padding",
    "WindowSize",
    "Windows",
    "begins",
    "windows",
]

Padding = Literal["none", "repeat", "zeros", "terminal"]


@dataclasses.dataclass(frozen=True)
class CutOptions:
    """How a file is divided into episodes, and episodes into windows.

    Args:
        ends: where episodes of an HDF5 file end: at its marks, where the goal changes, nowhere
            (none: the file is one stream, as some of D4RL's are), or auto.
        padding: none: windows start where they fit; else at every row of an episode, and beyond
            its end stands its last row again (repeat), or zeros, as in Diffuser; terminal: the
            last row again beyond terminal states, such as a fall, and none beyond other ends.
    """

    ends: EpisodeEnds = "auto"
    padding: Padding = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HorizonOption:
    """The length of a window.

    Args:
        horizon: rows of a trajectory.
    """

    horizon: PositiveInt = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowSize(HorizonOption):
    """The rows of a window.

    Args:
        stride: environment steps between rows.
    """

    stride: PositiveInt = 10

    @property
    def span(self) -> int:
        """Environment steps of a window, from its first row to its last."""
        return (self.horizon - 1) * self.stride + 1


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Windows as an index into all rows (normalised, float32).

    Window n is `flat[starts[n] + stride * arange(horizon)]`.
    """

    flat: Float[np.ndarray, "M D"]
    starts: Int[np.ndarray, " N"]
    horizon: int
    stride: int = 1

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, indices: Sequence[int] | Int[np.ndarray, " n"]) -> Float[np.ndarray, "n H D"]:
        """The windows of these numbers."""
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
    """Windows of `horizon` rows, every `stride`-th, at every offset of every episode.

    Where the arrivals of episodes are known, windows start on the way, at offsets 0 to
    `until` times the arrival (1.0: up to the arrival; None: at every offset at which a window
    fits), so that few of them are spent at rest at the goal. A window must fit at all such
    offsets, or long ways would be missing from the data: InputError otherwise. Elsewhere (D4RL,
    Minari) a window starts wherever it fits, and episodes that are too short are left out;
    InputError where all are.

    padding: "none" as above. Else rows are added beyond the end of each episode, none is too
    short, and a window starts at every offset up to the arrival, or up to the last row. The added
    rows are the last row again ("repeat": all stands still), or zeros in the world's own units
    ("zeros": Diffuser's `use_padding`, which fills a buffer of zeros and then normalises; it
    starts no window at the last row, nor pads episodes that fill its buffer). "terminal" is
    "repeat" for episodes that end in a terminal state, and lets windows of others end with them:
    how an episode goes on that was cut is not known. InputError where the data do not say which
    states are terminal.

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
        if padding == "terminal":
            last = np.where(_ends_terminal(episodes), last, np.minimum(last, lengths - span))
            if last.max() < 0:
                raise InputError(f"{size}, but no episode has as many: lower horizon or stride")
        rows, first = _padded(rows, episodes, span - 1, padding)
    counts = np.maximum(last + 1, 0)
    # Every offset 0 .. last of every episode, without a loop over episodes.
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(first, counts) + offsets
    flat = np.asarray(normaliser.normalise(rows), np.float32)
    return Windows(flat, starts.astype(np.int32), horizon, stride)


def begins(episodes: Episodes, span: int, padding: Padding) -> Bool[np.ndarray, " E"]:
    """Whether a window of `span` environment steps begins in each episode; raises as `windows`."""
    fits = np.asarray(episodes.lengths) >= span
    if padding == "terminal":
        return fits | _ends_terminal(episodes)
    return fits if padding == "none" else np.ones_like(fits)


def _ends_terminal(episodes: Episodes) -> Bool[np.ndarray, " E"]:
    """Whether each episode ends in a terminal state; InputError where that is not known."""
    if episodes.terminations is None:
        raise InputError(
            "cut.padding is terminal, but the data have no flags of terminal states: give data "
            "with `terminals`, name their world by --env where it has none, or give another "
            "padding"
        )
    return np.asarray(episodes.terminations)[episodes.ends - 1]


def _last_that_fit(
    episodes: Episodes, lengths: Int[np.ndarray, " E"], span: int, size: str, until: float | None
) -> Int[np.ndarray, " E"]:
    """Last offset at which a window starts in each episode; below 0 where it is too short."""
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
                f"{size}, but episode {worst} has {lengths[worst]} and arrives after "
                f"{episodes.arrivals[worst]}: record {wanted[worst] + span} steps or more, so "
                "that long ways are not left out (or lower the horizon or the stride)"
            )
        return wanted
    return last


def _padded(
    rows: Float[np.ndarray, "M D"], episodes: Episodes, extra: int, padding: Padding
) -> tuple[Float[np.ndarray, "M+E*extra D"], Int[np.ndarray, " E"]]:
    """Rows of episodes with `extra` rows added to each, and the first row of each episode."""
    lengths = np.asarray(episodes.lengths)
    first = episodes.starts + extra * np.arange(len(lengths))
    offsets = np.arange(len(rows) + extra * len(lengths)) - np.repeat(first, lengths + extra)
    last = np.repeat(lengths - 1, lengths + extra)
    rows = rows[np.repeat(episodes.starts, lengths + extra) + np.minimum(offsets, last)]
    if padding == "zeros":
        rows[offsets > last] = 0
    return rows, first
