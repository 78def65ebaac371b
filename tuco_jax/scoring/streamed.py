"""Scores of a streamed pair: many batches go through each layer before the next one is read.

A pass takes enough batches for computing to take longer than reading the weights; its scores come
at its end, so that a resumed run repeats the pass in which it was killed.

Legend: B rows of a batch, T its length, C prompts of a row, D residual width, L layers, n tokens
of a prompt.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from tuco_jax.core.budget import pass_budget
from tuco_jax.core.carry_store import CarryStore
from tuco_jax.core.last_token import LastToken, LastTokenStep, begin_last, finish_last
from tuco_jax.core.places import Places
from tuco_jax.core.streamed import walk_each
from tuco_jax.core.walk import Source
from tuco_jax.models.pair import Pair
from tuco_jax.prompts.packing import Packed, segments_of
from tuco_jax.scoring.options import PassOptions, ScoringOptions
from tuco_jax.scoring.output import Entry
from tuco_jax.scoring.watch import Watch

__all__ = ["passes_of", "stream_entries"]


def stream_entries(
    source: Source,
    tokens: Sequence[Int[np.ndarray, " n"]],
    batches: Sequence[Packed],
    options: ScoringOptions,
    watch: Watch,
) -> Iterator[Entry]:
    """Results of each batch; those of one pass come together."""
    config = source.ends.base_config
    for some in passes_of(batches, config.width, options.passes):
        rows = [batch.arrays(tokens) for batch in some]

        def on_step(full: bool, index: int, took: float, some: list[Packed] = some) -> None:
            batch = some[index]
            watch.called((full, batch.size, batch.length, batch.most), took)
            watch.advance(batch, 1 / config.depth)

        results = _one_pass(source, rows, options, on_step)
        for batch, out in zip(some, results, strict=True):
            yield Entry.of(
                batch, out.tuco, np.moveaxis(np.asarray(out.layers), 0, -1), out.telescoping
            )


def _one_pass(
    source: Source,
    rows: Sequence[Mapping[str, Any]],
    options: ScoringOptions,
    on_step: Callable[[bool, int, float], None],
) -> Iterator[LastToken]:
    """`last_tokens` of each batch, on the host, after all of them went through the last layer.

    rows: each batch's `Packed.arrays`. on_step: called with `LastTokenStep.full`, the batch's
    index and the seconds of the call.
    """
    depth = source.ends.base_config.depth
    memory, folder = _memory(options.passes), _folder(options.passes)
    with contextlib.closing(CarryStore(len(rows), memory, folder)) as carries:
        for index, batch in enumerate(rows):
            columns, segments = batch["columns"], segments_of(batch)
            carries[index], _ = begin_last(
                source.ends, batch["tokens"], batch["mask"], columns, segments, None
            )
        betas = []
        for full, start, stop in ((True, 0, depth - 1), (False, depth - 1, depth)):
            steps = _Steps(source.ends, rows, full, options.norm)

            def after(index: int, took: float, full: bool = full) -> None:
                on_step(full, index, took)

            betas += walk_each(steps, carries, source, start=start, stop=stop, on_step=after)
        for index in range(len(rows)):
            own = np.stack([layer[index] for layer in betas])
            yield jax.device_get(finish_last(carries[index], [own]))


class _Steps(Sequence[LastTokenStep]):
    """The step of each batch, computed when it is indexed."""

    def __init__(
        self, ends: Pair, rows: Sequence[Mapping[str, Any]], full: bool, norm: int
    ) -> None:
        self._ends, self._rows, self._full, self._norm = ends, rows, full, norm

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        rows = self._rows[index]
        places = _places(self._ends, rows["mask"], rows["columns"], segments_of(rows))
        return LastTokenStep(places, full=self._full, norm=self._norm, mesh=None)


_places = jax.jit(Places.of)


def passes_of(
    batches: Sequence[Packed], width: int, options: PassOptions
) -> Iterator[list[Packed]]:
    """The batches of each pass: as many as fit its tokens, and memory and disk.

    width: D.
    """
    room = _memory(options) + shutil.disk_usage(_folder(options)).free // 2
    most = min(options.tokens or pass_budget(), room // (4 * width))
    some: list[Packed] = []
    held = 0
    for batch in batches:
        tokens = batch.size * batch.length
        if some and held + tokens > most:
            yield some
            some, held = [], 0
        some.append(batch)
        held += tokens
    if some:
        yield some


def _memory(options: PassOptions) -> int:
    return int(options.memory * 2**30)


def _folder(options: PassOptions) -> str:
    return options.folder or tempfile.gettempdir()
