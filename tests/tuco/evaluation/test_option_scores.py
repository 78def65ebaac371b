"""Prompts, tokens and scores of multiple-choice options."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco.datasets.test_multiple_choice import task
from tests.tuco.interrupted import check_it_goes_on, read_back
from tests.tuco.random_models import adapter_pair, config, full_pair, rope
from tests.tuco.tiny import tiny_tokenizer
from tuco_jax.core.decompose import decompose
from tuco_jax.evaluation import option_scores as scoring
from tuco_jax.evaluation.option_scores import (
    OptionEntry,
    behaviour_prompts,
    option_scores,
    quiz_prompts,
    tokenize,
)
from tuco_jax.prompts import batching
from tuco_jax.prompts.prefixes import Behind
from tuco_jax.scoring.engine import planned


def test_prompts():
    prompts, options = quiz_prompts(task(), 1)
    assert options == [" A", " B"]
    assert prompts[0] == (
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        "e\nA. u\nB. v\nAnswer: B\n\nq0\nA. x\nB. y\nAnswer:"
    )
    assert behaviour_prompts(task())[1] == [" x", " y"]


def test_tokens_that_options_share_go_into_the_prompt():
    """A token a byte: " A" and " B" begin alike."""
    rows, options = tokenize(tiny_tokenizer(), task(), ["Q:", "R:", "S:"], [" A", " B"])
    letters = tiny_tokenizer()(["A", "B"])["input_ids"]
    assert options.tolist() == [ids[0] for ids in letters]
    assert tiny_tokenizer().decode(rows[1].tolist()) == "R: "


def test_chat():
    rows, options = tokenize(tiny_tokenizer(), task(1), ["Q"], [" A", " B"], chat=True)
    assert tiny_tokenizer().decode(rows[0].tolist()) == "<s><|user|>Q</s><|assistant|>"
    assert len(options) == 2
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(InputError, match="--chat needs a chat template"):
        tokenize(bare, task(1), ["Q"], [" A", " B"], chat=True)


def test_options_that_cannot_be_told_apart():
    with pytest.raises(InputError, match=r"f:0: options ' Ab' and ' Ac' begin with one token"):
        tokenize(tiny_tokenizer(), task(1), ["Q:"], [" Ab", " Ac", " B"])
    with pytest.raises(InputError, match="option ' A' has no token of its own"):
        tokenize(tiny_tokenizer(), task(1), ["Q:"], [" A", " Ab"])
    with pytest.raises(InputError, match=r"f:0: 3 tokens with its examples, .* holds 2; lower"):
        tokenize(tiny_tokenizer(), task(1), ["Q:"], [" A", " B"], context=2)


def asked(rng):
    """Prompts behind one of two openings, and one by itself."""
    openings = [rng.integers(0, 61, n) for n in (40, 25)]
    sizes = rng.permutation(np.arange(120) % 9 + 1)
    rows = [np.append(openings[i % 2], rng.integers(0, 61, n)) for i, n in enumerate(sizes)]
    return [row.astype(np.int32) for row in [*rows, rng.integers(0, 61, 5)]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "adapter, dynamic NTK"])
def test_what_prompts_share_is_computed_once_an_alpha(kind):
    """Against one alpha at a time over whole rows; with shared prefixes, and without."""
    dynamic = dataclasses.replace(rope(8), dynamic_factor=2.0, switch=43)
    pair = {
        "full": full_pair(1),
        "adapter, dynamic NTK": adapter_pair(2, config(ropes=(dynamic,), rope_index=())),
    }[kind]
    rows = asked(np.random.default_rng(0))
    options, alphas = np.asarray([5, 17, 60]), (0.75, 1.0, 1.25)
    want = np.empty((3, len(rows), 3))
    whole = jax.jit(lambda *given: decompose(*given, logits=True).logits)
    tokens, mask = batching.pad(rows, batching.Batch(tuple(range(len(rows))), len(rows), 56))
    for a, alpha in enumerate(alphas):
        found = np.asarray(whole(pair, tokens, mask, jnp.float32(alpha)), np.float64)
        logits = found[np.arange(len(rows)), [len(row) - 1 for row in rows]]
        want[a] = logits[:, options] - np.log(np.exp(logits).sum(axis=1))[:, None]
    given: list[dict[str, Any]] = [{}, {"token_budget": 300}, {"share": False}]
    for more in given:
        got = option_scores(pair, rows, options, alphas, **more)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    batches = planned(rows, pair, 1024, 1, share=True)
    assert any(isinstance(batch, Behind) for batch in batches)


def test_tasks_of_the_same_options_are_one_call(monkeypatch):
    calls = []

    def made(pair, rows, options, alphas, *, share, journal):
        calls.append([len(rows), options.tolist(), share])
        return np.asarray([[[r[0] == o for o in options] for r in rows] for _ in alphas], float)

    monkeypatch.setattr(scoring, "option_scores", made)
    letters, answers = np.asarray([5, 6]), np.asarray([7, 8])
    tasks: Any = {
        "a": ([[6], [5]], letters),
        "b": ([[8]], answers),
        "c": ([[5], [6], [6]], letters),
    }
    found = scoring.picks(adapter_pair(1), tasks, (0.9, 1.0), share=False)
    assert calls == [[5, [5, 6], False], [1, [7, 8], False]]
    assert list(found) == ["a", "b", "c"]
    want = {"a": [1, 0], "b": [1], "c": [0, 1, 1]}
    assert {name: rows.tolist() for name, rows in found.items()} == {
        name: [row] * 2 for name, row in want.items()
    }


def test_questions_that_are_done_are_not_computed_again(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    rows = [*rng.integers(0, 61, (4, 9), np.int32)]
    pair = adapter_pair(1)

    def run(journal, rows=rows, options=(5, 17), alphas=(0.75, 1.0), budget=16):
        given = rows, np.asarray(options), alphas
        return option_scores(pair, *given, token_budget=budget, journal=journal)

    changes: list[Any] = [{"rows": rows[::-1]}, {"options": (5, 18)}, {"alphas": (0.75, 1.5)}]
    unlike = [functools.partial(run, **change) for change in changes]
    otherwise = functools.partial(run, budget=32)
    check_it_goes_on(tmp_path / "journal", monkeypatch, run, unlike, otherwise)


@pytest.mark.parametrize(
    "record",
    [
        [[2], [[[0.5, 0.5]]]],  # no such question
        [[0], [[[0.5]]]],  # other options
        [[0], [[[0.5, 0.5]] * 2]],  # other alphas
        [[0, 1], [[[0.5, 0.5]]]],
        [["0"], [[[0.5, 0.5]]]],
        [[0], "a"],
        [[0]],
        {},
        7,
    ],
)
def test_what_is_no_batch_is_computed_again(tmp_path, record):
    read = functools.partial(OptionEntry.read, shape=(2, 1, 2))
    (found,) = read_back(tmp_path / "journal", read, ([[1], [[[-0.1, -7.3]]]], record))
    assert found.rows == [1]
    np.testing.assert_array_equal(found.scores, np.asarray([[[-0.1, -7.3]]], np.float32))
