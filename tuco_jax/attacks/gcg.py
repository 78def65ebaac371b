"""Greedy Coordinate Gradient: search for a string that makes a model begin with a given answer.

"Universal and Transferable Adversarial Attacks on Aligned Language Models", Zou et al. 2023, arXiv
2307.15043, Algorithms 1 and 2. A step takes the gradient of the target's loss with respect to the
string's one-hot tokens, draws candidates that replace one token by one of the `topk` most
promising at its position, and moves to the candidate of the lowest loss. Over several prompts,
gradients of unit norm and losses are summed; the next prompt is added once the string succeeds on
those before it.

The purpose here is to measure what an attack does to TuCo (section 5.3 of arXiv 2506.23423). No
request is answered here.

Legend: A tokens of the string, N candidates, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from common_jax import resume
from common_jax.cli.ranges import NonNegativeInt, PositiveInt, Seed, check_ranges
from common_jax.distributed import by_first
from common_jax.errors import InputError
from common_jax.io.files import read_json, write_json
from common_jax.mesh import fetch
from common_jax.progress import bar
from tuco_jax.attacks.layout import (
    Goal,
    Layout,
    PlacementOption,
    allowed_tokens,
    lay_out,
    surviving,
)
from tuco_jax.attacks.target_loss import (
    CachedPrompt,
    cached_prompts,
    candidate_losses,
    token_gradient,
)
from tuco_jax.core.budget import default_budget
from tuco_jax.core.checksum import weights_checksum
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import mesh_of, put_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Attack", "Options", "SearchOptions", "attack"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions(PlacementOption):
    """How widely to search; the defaults are the authors' (arXiv 2307.15043).

    Args:
        steps: of a search, at most.
        candidates: drawn in each step.
        topk: tokens to choose from at each position of a string.
        chunk: candidates in one batch; by default as many as fit the token budget of the backend
            (`core/budget.py`).
    """

    steps: PositiveInt = 500
    candidates: PositiveInt = 512
    topk: PositiveInt = 256
    chunk: PositiveInt | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SearchOptions):
    """How to search; the defaults are the authors', for many requests at once.

    start: the initial string; its number of tokens stays. non_ascii: allow tokens that are not
    printable ASCII. refilter: drop candidates whose text does not tokenize to the same tokens.
    progressive: begin with the first prompt and add one whenever the string succeeds on all so
    far. match: how many first tokens of the target must be the greedy ones for a success; 0 for
    all. stop: end when the string succeeds on all prompts.
    """

    start: str = " ".join("!" * 20)
    non_ascii: bool = False
    refilter: bool = True
    progressive: bool = True
    match: NonNegativeInt = 0
    stop: bool = True
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.start.strip() or self.start != self.start.strip():
            raise InputError("start must be a text without blanks at its ends")


@dataclasses.dataclass(frozen=True)
class Attack:
    """The string that was found: the one with the most prompts and, among those, the lowest loss.

    loss: of that string, in nats a token of the target, the mean over the prompts it was searched
    on. losses, prompts: the loss and the number of prompts of each step. succeeded: whether on all
    prompts. seconds: what the steps took, over all starts of a resumed search.
    """

    text: str
    tokens: list[int]
    loss: float
    losses: list[float]
    prompts: list[int]
    succeeded: bool
    seconds: float = dataclasses.field(default=0.0, compare=False)


@functools.partial(jax.jit, static_argnames=("topk", "count"))
def _sample(
    key: jax.Array,
    gradient: jax.Array,
    tokens: jax.Array,
    allowed: jax.Array,
    *,
    topk: int,
    count: int,
) -> jax.Array:
    """Candidates [N, A] that replace one token of `tokens` [A], each position equally often."""
    scores = jnp.where(allowed[None], -gradient, -jnp.inf)
    best = jax.lax.top_k(scores, topk)[1]
    places = jnp.arange(count) * tokens.size // count
    chosen = best[places, jax.random.randint(key, (count,), 0, topk)]
    return jnp.tile(tokens, (count, 1)).at[jnp.arange(count), places].set(chosen)


def _unit(gradient: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(gradient, axis=-1, keepdims=True)
    return gradient / jnp.where(norm == 0, 1, norm)


def _batch(options: SearchOptions, cached: CachedPrompt) -> int:
    """Candidates in one batch; by default those of a step in few equal batches of the budget."""
    if options.chunk is not None:
        return options.chunk
    most = max(1, default_budget() // cached.tokens.size)
    return math.ceil(options.candidates / math.ceil(options.candidates / most))


def _all_losses(
    pair: Pair, cached: CachedPrompt, candidates: np.ndarray, chunk: int, match: int
) -> tuple[np.ndarray, np.ndarray]:
    """Losses [N] and successes [N], in batches of `chunk`; the last one is padded."""
    losses, hits = [], []
    mesh = mesh_of(pair)
    for first in range(0, len(candidates), chunk):
        rows = candidates[first : first + chunk]
        filled = np.concatenate([rows, np.repeat(rows[:1], chunk - len(rows), axis=0)])
        loss, greedy = fetch(
            candidate_losses(pair, cached, put_rows(jnp.asarray(filled), mesh), mesh=mesh)
        )
        losses.append(loss[: len(rows)])
        hits.append(greedy[: len(rows), : match or None].all(axis=1))
    return np.concatenate(losses), np.concatenate(hits)


@dataclasses.dataclass
class _State:
    """The state of a search, as its checkpoint holds it; random keys follow from seed and step."""

    tokens: list[int]
    active: int
    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    prompts: list[int] = dataclasses.field(default_factory=list)
    best: list[int] = dataclasses.field(default_factory=list)
    best_rank: tuple[int, float] = (0, 0.0)
    succeeded: bool = False
    seconds: float = 0.0


_FREE = ("steps", "chunk")  # may change when an attack goes on
_STATE = "search.json"


def _settings(pair: Pair, layouts: Sequence[Layout], options: Options) -> dict[str, Any]:
    """All that a search's result follows from."""
    prompts = json.dumps([piece.tolist() for own in layouts for piece in own.pieces])
    return dataclasses.asdict(options) | {
        # Under "weights" older runs have a checksum of another kind.
        "both models' weights (their checksum)": weights_checksum(pair),
        "prompts (their checksum)": hashlib.sha256(prompts.encode()).hexdigest(),
    }


def _read_state(path: pathlib.Path) -> _State | None:
    lists = ("tokens", "losses", "prompts", "best", "best_rank")
    wanted = {f.name: [None] if f.name in lists else None for f in dataclasses.fields(_State)}
    mend = "delete it, and the search begins anew"
    found = by_first(lambda: read_json(path, wanted, mend) if path.exists() else None)
    if found is None:
        return None
    state = _State(**{name: found[name] for name in wanted})
    state.best_rank = (state.best_rank[0], state.best_rank[1])
    return state


def attack(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    goals: Sequence[Goal],
    options: Options | None = None,
    *,
    checkpoint: pathlib.Path | None = None,
    progress: str = "",
    on_step: Callable[[int, float, int], None] | None = None,
) -> Attack:
    """Search for one string that makes the model begin its answer to every goal with the target.

    Args:
        pair: its tuned model is attacked (`single` makes a pair of one model).
        tokenizer: the model's.
        goals: requests with their targets.
        options: of the search.
        checkpoint: a folder, written to after each step. If it holds this search already, that
            goes on, to the same result as without an interruption.
        progress: name of a progress bar, which is shown on a terminal; empty for none.
        on_step: called with the step, its loss and the number of prompts searched on.

    Raises InputError as `lay_out`, and for a checkpoint of other settings.
    """
    options = options or Options()
    config = pair.tuned_config
    layouts = lay_out(
        tokenizer,
        goals,
        options.start,
        options.placement,
        context=config.max_positions,
        vocab_size=config.vocab_size,
    )
    allowed = allowed_tokens(tokenizer, config.vocab_size, options.non_ascii)
    with contextlib.ExitStack() as stack:
        state = None
        if checkpoint is not None:
            settings = _settings(pair, layouts, options)
            stack.enter_context(resume.hold(checkpoint, settings, free=_FREE))
            state = _read_state(checkpoint / _STATE)
        if state is None:
            active = 1 if options.progressive else len(goals)
            state = _State(layouts[0].pieces.attack.tolist(), active)
        ready = cached_prompts(pair, [own.pieces for own in layouts])
        shown = stack.enter_context(
            bar(progress, options.steps, start=state.step, show=bool(progress))
        )
        while state.step < options.steps and not (state.succeeded and options.stop):
            started = time.perf_counter()
            loss, hits = _step(pair, tokenizer, layouts, ready, allowed, options, state)
            state.seconds += time.perf_counter() - started
            if on_step:
                on_step(state.step, loss, state.active)
            shown.update(state.step + 1, f"loss {loss:.3f} on {state.active} prompts")
            _conclude(state, loss, hits, len(goals))
            if checkpoint is not None:
                write_json(checkpoint / _STATE, dataclasses.asdict(state))
    text = tokenizer.decode(state.best, clean_up_tokenization_spaces=False)
    return Attack(
        str(text),
        state.best,
        -state.best_rank[1],
        state.losses,
        state.prompts,
        state.succeeded,
        state.seconds,
    )


def _conclude(state: _State, loss: float, hits: bool, goals: int) -> None:
    """Count a step of this mean loss; hits: whether its string succeeds on all prompts so far."""
    state.losses.append(loss)
    state.prompts.append(state.active)
    state.step += 1
    rank = (state.active, -loss)
    done = hits and state.active == goals
    # A string that succeeds on all prompts is not replaced by one that only has a lower loss.
    better = not state.best or rank > state.best_rank
    if (done and not state.succeeded) or (better and (done or not state.succeeded)):
        state.best, state.best_rank = state.tokens, rank
    state.succeeded |= done
    if hits and not done:
        state.active += 1


def _step(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    layouts: Sequence[Layout],
    ready: Sequence[CachedPrompt],
    allowed: np.ndarray,
    options: Options,
    state: _State,
) -> tuple[float, bool]:
    """One step: updates state.tokens; returns its mean loss and whether it succeeds everywhere."""
    tokens = jnp.asarray(state.tokens, jnp.int32)
    active = ready[: state.active]
    mesh = mesh_of(pair)
    gradient = sum(_unit(token_gradient(pair, cached, tokens, mesh=mesh)) for cached in active)
    drawn = _sample(
        jax.random.fold_in(jax.random.key(options.seed), state.step),
        jnp.asarray(gradient),
        tokens,
        jnp.asarray(allowed),
        topk=min(options.topk, int(allowed.sum())),
        count=options.candidates,
    )
    candidates = np.unique(np.asarray(drawn), axis=0)
    if options.refilter:
        candidates = candidates[surviving(tokenizer, layouts[: state.active], candidates)]
    if not len(candidates):  # none survives tokenization: stay, and draw again in the next step
        candidates = np.asarray(tokens)[None]
    batch = _batch(options, ready[0])
    found = [_all_losses(pair, s, candidates, batch, options.match) for s in active]
    losses = np.mean([loss for loss, _ in found], axis=0)
    chosen = int(np.argmin(losses))
    state.tokens = candidates[chosen].tolist()
    return float(losses[chosen]), all(bool(hits[chosen]) for _, hits in found)
