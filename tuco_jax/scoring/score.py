"""Prompts in, TuCo out: tokenise, batch by length, score, check.

Legend: N prompts, L layers, B rows of a batch, T its length.

The device is kept busy: while it computes one batch the host pads the next, and results are
fetched one batch late.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from common_jax import mesh as mesh_module
from common_jax.errors import InputError
from tuco_jax.core.by_layer import ByLayer, Result
from tuco_jax.core.decompose import last_token
from tuco_jax.models import sharding
from tuco_jax.models.pair import Pair
from tuco_jax.prompts import batching
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import (
    Message,
    Prompt,
    as_prompts,
)
from tuco_jax.scoring.output import Entry, Journal

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedTokenizerBase

__all__ = ["Scores", "check_options", "default_budget", "score", "score_tokens"]

Parallel = Literal["jit", "pmap"]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of N prompts, in the order in which they were given. Floats are float32.

    ids: the prompts' names. tuco [N] in [0, 1] (Definition 4.3 of arXiv 2506.23423). layers
    [N, L]: the last token's beta_1 .. beta_L, of the sums up to each layer; the last one is tuco.
    tokens [N]: lengths. telescoping [N]: max |x_L - x_0 - PTC - FTC| / max |x_L|, rounding error
    of the decomposition. seconds: "compile" (tracing, compiling, or reading the cache), "run", and
    "first", from the start to the first score. shapes: the (B, T) compiled. padding: share of the
    computed tokens that was padding. resumed: how many scores came from a journal.
    """

    ids: list[str | int]
    tuco: np.ndarray
    layers: np.ndarray
    tokens: np.ndarray
    telescoping: np.ndarray
    seconds: dict[str, float]
    shapes: list[tuple[int, int]]
    padding: float
    resumed: int = 0

    @property
    def preco(self) -> np.ndarray:
        """1 - tuco, [N]: the pre-training's share."""
        return 1 - self.tuco


def score(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Iterable[str | Sequence[Message] | Prompt],
    *,
    norm: Literal[1, 2] = 1,
    mesh: Mesh | None = None,
    token_budget: int | None = None,
    progress: bool = False,
    truncate: bool = False,
    parallel: Parallel = "jit",
) -> Scores:
    """TuCo of each prompt's last token.

    Args:
        pair: the two models, anywhere: with a mesh they are moved to their shards first (nothing
            moves if `load_pair` has put them there).
        tokenizer: the tuned model's.
        prompts: texts (tokenised with the tokenizer's default special tokens), conversations
            (lists of {"role", "content"}, through the chat template) or `Prompt`s.
        norm: 1, the paper's, or 2.
        mesh: devices to run on, by default those that the pair lies on; the batch is cut over
            data and fsdp.
        token_budget: at most this many tokens a batch, padding included, or one row a device; by
            default what suits the backend (`default_budget`).
        progress: show a progress bar on stderr, if that is a terminal.
        truncate: keep the last tokens of prompts beyond the model's context; an error otherwise.
        parallel: "jit" over the mesh, or "pmap" over its data axis.

    Scores do not depend on batches, order or devices (1e-5). Raises InputError naming the prompt,
    also where a score is not finite.
    """
    prompts = as_prompts(prompts)
    tokens = encode(
        tokenizer,
        prompts,
        max_tokens=pair.context,
        vocab_size=pair.tuned_config.vocab_size,
        truncate=truncate,
    )
    return score_tokens(
        pair,
        tokens,
        prompts,
        norm=norm,
        mesh=mesh,
        token_budget=token_budget,
        progress=progress,
        parallel=parallel,
    )


def default_budget() -> int:
    """Tokens of a batch, padding included, where the caller does not say.

    A CPU is at its rate of products from some hundred tokens on, and with more than a thousand
    what passes between products no longer fits its caches.
    """
    return 1024 if jax.default_backend() == "cpu" else 4096


def check_options(norm: int, mesh: Mesh | None, token_budget: int | None, parallel: str) -> None:
    """InputError for options that `score` cannot run with."""
    if norm not in (1, 2):
        raise InputError(f"norm must be 1 or 2, not {norm!r}")
    if token_budget is not None and token_budget < 1:
        raise InputError(f"token_budget must be positive, not {token_budget}")
    if parallel not in ("jit", "pmap"):
        raise InputError(f"parallel must be jit or pmap, not {parallel!r}")
    if parallel == "pmap" and mesh is not None and mesh.shape["data"] != mesh.size:
        raise InputError("pmap is for data alone: set mesh.fsdp and mesh.tensor to 1, or use jit")


def score_tokens(
    pair: Pair,
    tokens: Sequence[np.ndarray],
    prompts: Sequence[Prompt],
    *,
    norm: Literal[1, 2] = 1,
    mesh: Mesh | None = None,
    token_budget: int | None = None,
    progress: bool = False,
    parallel: Parallel = "jit",
    journal: Journal | None = None,
) -> Scores:
    """`score` of prompts that are tokens already: int32 [n_i] each.

    prompts: their names, for errors and the result. With a journal, scores that it holds are not
    computed again, and each batch is added to it.
    """
    if parallel == "jit":
        mesh = mesh or sharding.mesh_of(pair)
    check_options(norm, mesh, token_budget, parallel)
    started = time.perf_counter()
    lengths = [row.size for row in tokens]
    run, width = _runner(pair, norm, mesh, parallel)
    batches = batching.plan(lengths, token_budget or default_budget(), width)
    waste = batching.padding(batches, lengths)

    count, depth = len(tokens), pair.base_config.depth
    tuco, telescoping = np.empty(count, np.float32), np.empty(count, np.float32)
    layers = np.empty((count, depth), np.float32)
    done: set[int] = set()

    def keep(entry: Entry) -> None:
        tuco[entry.rows], layers[entry.rows] = entry.tuco, entry.layers
        telescoping[entry.rows] = entry.telescoping
        done.update(entry.rows)

    for entry in journal.entries if journal else ():
        keep(entry)
    resumed = len(done)
    batches = _remaining(batches, done)

    seconds = {"compile": 0.0, "run": 0.0, "first": 0.0}
    with _progress_bar(progress) as bar:
        task = bar.add_task("scoring", total=sum(lengths), completed=sum(lengths[i] for i in done))
        for entry in _entries(run, tokens, batches, seconds):
            _check_finite(entry, prompts)
            if journal:
                journal.append(entry)
            keep(entry)
            seconds["first"] = seconds["first"] or time.perf_counter() - started
            bar.advance(task, sum(lengths[i] for i in entry.rows))
    seconds["run"] = time.perf_counter() - started - seconds["compile"]
    return Scores(
        ids=[p.id for p in prompts],
        tuco=tuco,
        layers=layers,
        tokens=np.asarray(lengths, np.int32),
        telescoping=telescoping,
        seconds=seconds,
        shapes=sorted({(b.size, b.length) for b in batches}),
        padding=waste,
        resumed=resumed,
    )


Run = Callable[[np.ndarray, np.ndarray], Result]


def _result(
    norm: int, mesh: Mesh | None, pair: Pair, tokens: jax.Array, mask: jax.Array
) -> Result:
    out = last_token(pair, tokens, mask, norm=norm, mesh=mesh)
    return out.tuco, out.layers.T, out.telescoping


_jitted = jax.jit(_result, static_argnums=(0, 1))


@functools.lru_cache(maxsize=8)
def _pmapped(norm: int, devices: tuple[Any, ...]) -> Callable[..., Result]:
    return mesh_module.pmap(functools.partial(_result, norm, None), devices=devices)


def _runner(pair: Pair, norm: int, mesh: Mesh | None, parallel: Parallel) -> tuple[Run, int]:
    """A function of tokens and mask that returns at once, and what divides its batch size."""
    if parallel == "pmap":
        devices = tuple(mesh.devices.flat) if mesh is not None else tuple(jax.local_devices())
        copies = mesh_module.replicate(pair, devices)
        mapped = _pmapped(norm, devices)
        return lambda tokens, mask: mapped(copies, tokens, mask), len(devices)
    if mesh is None and ByLayer.fits(pair):
        return ByLayer(pair, norm), 1
    if mesh is None:
        return lambda tokens, mask: _jitted(norm, None, pair, tokens, mask), 1
    placed = sharding.place(pair, mesh)

    def run(tokens: np.ndarray, mask: np.ndarray) -> Result:
        return _jitted(norm, mesh, placed, *sharding.put_rows((tokens, mask), mesh))

    return run, sharding.batch_width(mesh)


def _remaining(batches: list[batching.Batch], done: set[int]) -> list[batching.Batch]:
    """Batches without the rows that are done; shapes stay, so that the rest is computed alike."""
    left = []
    for batch in batches:
        rows = tuple(r for r in batch.rows if r not in done)
        if rows:
            left.append(dataclasses.replace(batch, rows=rows))
    return left


def _entries(
    run: Run,
    tokens: Sequence[np.ndarray],
    batches: Sequence[batching.Batch],
    seconds: dict[str, float],
) -> Iterator[Entry]:
    """Results of each batch, one behind what has been sent to the device."""
    sent: tuple[batching.Batch, Result] | None = None
    seen: set[tuple[int, int]] = set()
    for batch in batches:
        padded = batching.pad(tokens, batch)
        start = time.perf_counter()
        result = run(*padded)
        if (batch.size, batch.length) not in seen:  # the call returns once it has compiled
            seconds["compile"] += time.perf_counter() - start
            seen.add((batch.size, batch.length))
        if sent:
            yield _fetch(*sent)
        sent = batch, result
    if sent:
        yield _fetch(*sent)


def _fetch(batch: batching.Batch, result: Result) -> Entry:
    count = len(batch.rows)
    return Entry(list(batch.rows), *(np.asarray(x)[:count] for x in jax.device_get(result)))


def _check_finite(entry: Entry, prompts: Sequence[Prompt]) -> None:
    finite = np.isfinite(np.c_[entry.tuco, entry.layers, entry.telescoping]).all(axis=1)
    if not finite.all():
        prompt = prompts[entry.rows[int(np.argmin(finite))]]
        raise InputError(
            f"{prompt}: its score is not finite; activations overflow or weights are damaged: "
            "try --dtype float32, or another copy of the weights"
        )


def _progress_bar(show: bool) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed  # None until a second batch is done
            if not speed and task.completed and task.elapsed:
                speed = task.completed / task.elapsed
            return Text(f"{speed:,.0f} tokens/s" if speed else "compiling")

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        Speed(),
        TimeRemainingColumn(),
        console=console,
        disable=not (show and console.is_terminal and sys.stderr.isatty()),
    )
