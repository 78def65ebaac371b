"""Log-probabilities of multiple-choice options under a grid of alphas.

Legend: A alphas, N questions, O options, T tokens of a question, b questions of a batch, B its
rows, C questions of a row, D residual width, L layers, V vocabulary.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from common_jax.errors import InputError
from common_jax.journal import Section, Sections
from common_jax.mesh import fetch
from tuco_jax.core import engine
from tuco_jax.core.alpha_grid import AlphaGrid, each_alpha, layer_alphas
from tuco_jax.core.budget import default_budget
from tuco_jax.core.tokens import check_row
from tuco_jax.core.walk import Source, source_of
from tuco_jax.datasets.multiple_choice import LETTERS, Question, Task
from tuco_jax.models import decoder
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import batch_width, mesh_of, put_rows
from tuco_jax.prompts.packing import Packed
from tuco_jax.prompts.prefixes import SEEN, Behind
from tuco_jax.prompts.render import render
from tuco_jax.scoring.engine import as_begun, engine_of, planned
from tuco_jax.scoring.fingerprint import tokens_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "OptionEntry",
    "behaviour_prompts",
    "option_scores",
    "picks",
    "quiz_prompts",
    "tokenize",
]

_LOGITS = 256  # prompts whose logits are held at once


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


class OptionEntry(NamedTuple):
    """One batch's log-probabilities for questions `rows`, as a journal holds them."""

    rows: list[int]
    scores: Float[np.ndarray, "b A O"]

    @classmethod
    def read(cls, record: Any, shape: tuple[int, int, int]) -> "OptionEntry | None":
        """The entry that a journal holds; None, or an error, where it is none. shape: N, A, O."""
        rows, values = record
        entry = cls(rows, np.asarray(values, np.float32))
        good = all(type(row) is int and 0 <= row < shape[0] for row in rows)
        return entry if good and entry.scores.shape == (len(rows), *shape[1:]) else None


def option_scores(
    pair: Pair,
    rows: Sequence[Int[np.ndarray, " T"]],
    options: Int[np.ndarray, " O"],
    alphas: Sequence[float],
    *,
    share: bool = True,
    token_budget: int | None = None,
    journal: Sections | None = None,
) -> Float[np.ndarray, "A N O"]:
    """Log-probability of each option's token after each prompt, at each alpha.

    rows: token ids of the prompts. What some begin with in common is run once an alpha, where that
    pays, unless `share` is off. journal: of this pair; batches that it holds are not computed
    again, and each new one is added. Raises InputError for tokens outside the vocabulary.
    """
    config = pair.tuned_config
    rows = [check_row(row, config.vocab_size, f"rows[{i}]") for i, row in enumerate(rows)]
    mesh = mesh_of(pair)
    source = source_of(pair, mesh)
    grid, wanted = layer_alphas(alphas, config.depth), jnp.asarray(options)
    budget = token_budget or default_budget()
    run = _jitted if source.one_program else _scores
    found = np.empty((len(rows), len(alphas), len(options)), np.float32)
    section = Section[OptionEntry]()
    if journal:
        read = functools.partial(OptionEntry.read, shape=found.shape)
        key = tokens_fingerprint(rows, np.asarray(options).tolist(), [*map(float, alphas)])
        section = journal.section("questions", key, read)
    done: set[int] = set()
    for entry in section.entries:
        found[entry.rows] = entry.scores
        done.update(entry.rows)
    width = batch_width(mesh)
    plan = functools.partial(planned, ends=source.ends, budget=budget, multiple=width, share=share)
    for batch in as_begun(plan, rows, [entry.rows for entry in section.entries]):
        if done.issuperset(batch.prompts):
            continue
        arrays = put_rows(batch.arrays(rows), mesh)
        scores = fetch(run(_at_once(batch, budget), mesh, source, arrays, grid, wanted))
        entry = OptionEntry(batch.prompts, batch.unpack(scores.transpose(1, 2, 0, 3)))
        section.append(entry)
        found[entry.rows] = entry.scores
    return found.swapaxes(0, 1)


def _at_once(batch: Packed, budget: int) -> int:
    """Alphas of a batch that are run together: as many as fill the budget."""
    tokens = batch.size * batch.length
    if isinstance(batch, Behind):
        rows = batch.size // batch.chunks
        tokens = max(rows * batch.length, rows * batch.width // SEEN, batch.count * batch.width)
    return max(1, budget // tokens)


def _scores(
    chunk: int,
    mesh: Mesh | None,
    source: Source,
    rows: Mapping[str, Any],
    alphas: Float[Array, "L A"],
    options: Int[Array, " O"],
) -> Float[Array, "A B C O"]:
    make = functools.partial(AlphaGrid, alphas=alphas, chunk=chunk, mesh=mesh)
    return _at_options(source.ends, engine.run(engine_of(rows, make), source), options)


_jitted = jax.jit(_scores, static_argnums=(0, 1))


@jax.jit
def _at_options(
    ends: Pair, x: Float[Array, "A B C D"], options: Int[Array, " O"]
) -> Float[Array, "A B C O"]:
    """Log-probabilities of the options; of a few prompts at a time, since logits are [B, V]."""

    def some(x: Float[Array, "B D"]) -> Float[Array, "B O"]:
        logits = decoder.logits(ends.tuned_config, ends.tuned_params, x, ends.lora)
        return jax.nn.log_softmax(logits, axis=-1)[:, options]

    alphas, size, most, width = x.shape
    columns = x.swapaxes(1, 2).reshape(-1, size, width)
    found = each_alpha(some, columns, max(1, _LOGITS // size))
    return found.reshape(alphas, most, size, -1).swapaxes(1, 2)


def picks(
    pair: Pair,
    tasks: Mapping[str, tuple[Sequence[Int[np.ndarray, " T"]], Int[np.ndarray, " O"]]],
    alphas: Sequence[float],
    *,
    share: bool = True,
    journal: Sections | None = None,
) -> dict[str, Int[np.ndarray, "A N"]]:
    """The most probable option of each of N questions at each alpha, by task.

    tasks: rows and options as of `option_scores`, which is called once for all tasks of the same
    options. journal: as there.
    """
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, (_, options) in tasks.items():
        alike.setdefault(tuple(options.tolist()), []).append(name)
    found: dict[str, Int[np.ndarray, "A N"]] = {}
    for options, names in alike.items():
        rows = [row for name in names for row in tasks[name][0]]
        wanted = np.asarray(options, np.int32)
        scores = option_scores(pair, rows, wanted, alphas, share=share, journal=journal)
        ends = np.cumsum([len(tasks[name][0]) for name in names])
        found |= zip(names, np.split(scores.argmax(axis=2), ends[:-1], axis=1), strict=True)
    return {name: found[name] for name in tasks}
