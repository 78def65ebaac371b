"""Log-probabilities of multiple-choice options under a grid of alphas.

Legend: A alphas, N questions, O options, T tokens of a question.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from common_jax.errors import InputError
from common_jax.mesh import fetch
from tuco_jax.core.alpha_grid import Prefix, grid_logits, prefix_caches
from tuco_jax.core.budget import default_budget
from tuco_jax.datasets.multiple_choice import LETTERS, Question, Task
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import batch_width, mesh_of, put_rows
from tuco_jax.prompts import batching
from tuco_jax.prompts.render import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["behaviour_prompts", "option_scores", "quiz_prompts", "tokenize"]

# Shared prefixes are cut to multiples of this, so that tasks share compiled shapes.
GRAIN = 32


def _shown(question: Question) -> str:
    lines = [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(question.choices)]
    return "\n".join([question.text, *lines, "Answer:"])


def quiz_prompts(task: Task, shots: int) -> tuple[list[str], list[str]]:
    """(prompts, options): questions after a task's examples, in MMLU's form, and the letters."""
    subject = task.name.replace("_", " ")
    opening = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    for example in task.examples[:shots]:
        opening += f"{_shown(example)} {LETTERS[example.answer]}\n\n"
    options = [f" {letter}" for letter in LETTERS[: len(task.questions[0].choices)]]
    return [opening + _shown(q) for q in task.questions], options


def behaviour_prompts(task: Task) -> tuple[list[str], list[str]]:
    """(prompts, options): a behaviour's statements, and its two answers, such as " Yes", " No"."""
    prompts = [f"{q.text}\nAnswer:" for q in task.questions]
    return prompts, [f" {choice}" for choice in task.questions[0].choices]


def tokenize(
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    prompts: Sequence[str],
    options: Sequence[str],
    *,
    chat: bool = False,
    context: int | None = None,
) -> tuple[list[Int[np.ndarray, " T"]], Int[np.ndarray, " O"]]:
    """Token ids of each prompt, and the token of each option that follows it.

    chat: put prompts through the chat template as a user's turn; options then lose their leading
    blank. Tokens that all options begin with go into the prompt. Raises InputError, naming the
    options, where two of them still begin with the same token, where their tokens depend on the
    prompt, and for prompts beyond the context.
    """
    if chat:
        if not tokenizer.chat_template:
            raise InputError("--chat needs a chat template, and the tokenizer has none; leave it")
        prompts = [
            render(tokenizer, [{"role": "user", "content": text}], opened=True, whole=False)
            for text in prompts
        ]
        options = [o.strip() for o in options]

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=not chat, verbose=False)["input_ids"]

    rows: list[np.ndarray] = []
    found: tuple[int, ...] | None = None
    whole = ids([text + option for text in prompts for option in options])
    for i, question in enumerate(task.questions):
        continued = whole[i * len(options) : (i + 1) * len(options)]
        shared = _shared(continued)
        _check_distinct(continued, shared, options, question)
        tokens = tuple(row[shared] for row in continued)
        if found is not None and tokens != found:
            raise InputError(
                f"{question.where}: the options' tokens {list(tokens)} are not those of the "
                f"task's first question, {list(found)}; the prompt's end merges with them"
            )
        found = tokens
        if context is not None and shared > context:
            raise InputError(
                f"{question.where}: {shared} tokens with its examples, but the model's context "
                f"holds {context}; lower --shots, or remove the question"
            )
        rows.append(np.asarray(continued[0][:shared], np.int32))
    return rows, np.asarray(found, np.int32)


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    count = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _check_distinct(
    rows: Sequence[Sequence[int]], at: int, options: Sequence[str], question: Question
) -> None:
    seen: dict[int, str] = {}
    for row, option in zip(rows, options, strict=True):
        if at == 0 or at >= len(row):
            raise InputError(f"{question.where}: option {option!r} has no token of its own")
        if row[at] in seen:
            raise InputError(
                f"{question.where}: options {seen[row[at]]!r} and {option!r} begin with one token "
                f"({row[at]}), which cannot tell them apart; use other options or tokenizer"
            )
        seen[row[at]] = option


@functools.partial(jax.jit, static_argnames="mesh")
def _scores(
    pair: Pair,
    tokens: jax.Array,
    mask: jax.Array,
    alphas: jax.Array | None,
    prefix: Prefix | None,
    options: jax.Array,
    mesh: Mesh | None,
) -> jax.Array:
    logits = grid_logits(pair, tokens, mask, alphas, prefix=prefix, mesh=mesh)
    return jax.nn.log_softmax(logits, axis=-1)[:, :, options]


def option_scores(
    pair: Pair,
    rows: Sequence[Int[np.ndarray, " T"]],
    options: Int[np.ndarray, " O"],
    alphas: Sequence[float],
    *,
    share: bool = True,
    grain: int = GRAIN,
    token_budget: int | None = None,
) -> Float[np.ndarray, "A N O"]:
    """Log-probability of each option's token after each prompt, at each alpha.

    rows: token ids of the prompts. A prefix that all share is run once an alpha, unless `share` is
    off or a rotary table depends on the prompt's length. grain: prefixes are multiples of it.
    """
    grid = jnp.asarray(alphas, jnp.float32)
    common = min(_shared([row.tolist() for row in rows]), min(map(len, rows)) - 1)
    if not share or any(map(_changes, (pair.tuned_config, pair.base_config))):
        common = 0
    common -= common % grain
    mesh = mesh_of(pair)
    shared = jnp.asarray(rows[0][:common])
    prefix = prefix_caches(pair, shared, grid, mesh=mesh) if common else None
    rest = [row[common:] for row in rows]
    most = token_budget or default_budget()
    found = np.empty((len(alphas), len(rows), len(options)), np.float32)
    alone = None if prefix else grid
    for batch in batching.by_length([len(row) for row in rest], most, batch_width(mesh)):
        tokens, mask = put_rows(batching.pad(rest, batch), mesh)
        scores = _scores(pair, tokens, mask, alone, prefix, jnp.asarray(options), mesh)
        found[:, list(batch.rows)] = fetch(scores)[:, : len(batch.rows)]
    return found


def _changes(config: ModelConfig) -> bool:
    """Whether a rotary table depends on a row's length, so that no prefix can be shared."""
    return any(r.long_frequencies or r.dynamic_factor for r in config.ropes)
