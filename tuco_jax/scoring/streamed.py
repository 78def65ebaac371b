"""Scores of a streamed pair: many batches go through each layer before the next one is read.

A pass takes enough batches for computing to take longer than reading the weights; its scores come
at its end, so that a resumed run repeats the pass in which it was killed.

Legend: B rows of a batch, T its length, C prompts of a row, D residual width, L layers, n tokens
of a prompt.
"""

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from tuco_jax.core.budget import pass_budget
from tuco_jax.core.carry_store import CarryStore
from tuco_jax.core.engine import run_each
from tuco_jax.core.last_token import LastTokens
from tuco_jax.core.walk import Source
from tuco_jax.prompts.packing import Packed
from tuco_jax.scoring.engine import engine_of
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
    memory, folder = _memory(options.passes), _folder(options.passes)
    for some in passes_of(batches, config.width, options.passes):
        make = functools.partial(LastTokens, norm=options.norm)
        engines = [engine_of(batch.arrays(tokens), make) for batch in some]

        def on_step(phase: int, index: int, took: float, some: list[Packed] = some) -> None:
            batch = some[index]
            watch.called((phase, *batch.shape), took)
            watch.advance(batch, 1 / config.depth)

        with contextlib.closing(CarryStore(len(some), memory, folder)) as carries:
            results = run_each(engines, source, carries, on_step)
            for batch, out in zip(some, results, strict=True):
                layers = np.moveaxis(np.asarray(out.layers), 0, -1)
                yield Entry.of(batch, out.tuco, layers, out.telescoping)


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
        tokens = batch.computed
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
