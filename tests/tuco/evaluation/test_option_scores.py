"""Prompts, tokens and scores of multiple-choice options."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco.random_models import adapter_pair, config, rope
from tests.tuco.tiny import tiny_tokenizer
from tuco_jax.core.decompose import decompose
from tuco_jax.datasets.multiple_choice import (
    Question,
    Task,
)
from tuco_jax.evaluation import option_scores as scoring
from tuco_jax.evaluation.option_scores import (
    behaviour_prompts,
    option_scores,
    quiz_prompts,
    tokenize,
)


def task(count=3):
    questions = [Question(f"q{i}", ("x", "y"), i % 2, f"f:{i}") for i in range(count)]
    return Task("world_religions", (Question("e", ("u", "v"), 1, "f:9"),), tuple(questions))


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


@pytest.mark.slow
def test_a_shared_prefix_changes_nothing():
    """Against one alpha at a time over whole rows; with a prefix, without, and where it cannot."""
    rng = np.random.default_rng(0)
    opening = rng.integers(0, 61, 7)
    rows = [np.append(opening, rng.integers(0, 61, n)).astype(np.int32) for n in (1, 4, 3)]
    options, alphas = np.asarray([5, 17, 60]), (0.75, 1.0, 1.25)
    dynamic = dataclasses.replace(rope(8), dynamic_factor=2.0, switch=9)
    for pair in (adapter_pair(1), adapter_pair(2, config(ropes=(dynamic,), rope_index=()))):
        want = np.empty((3, 3, 3))
        for a, alpha in enumerate(alphas):
            for n, row in enumerate(rows):
                mask = jnp.ones((1, len(row)), bool)
                out = decompose(pair, jnp.asarray(row)[None], mask, alpha, logits=True)
                logits = np.asarray(out.logits, np.float64)[0, -1]
                want[a, n] = logits[options] - np.log(np.exp(logits).sum())
        got = option_scores(pair, rows, options, alphas, grain=2)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        got = option_scores(pair, rows, options, alphas, share=False, token_budget=16)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_prefix_is_read_once_an_alpha(monkeypatch):
    """By count: the examples' tokens once, and then those of the questions alone."""
    read, asked = [], []
    prefixes, scores = scoring.prefix_caches, scoring._scores

    def counted(pair, tokens, alphas, **rest):
        read.append((tokens.size, len(alphas)))
        return prefixes(pair, tokens, alphas, **rest)

    def counted_scores(pair, tokens, *rest):
        asked.append(tokens.size)
        return scores(pair, tokens, *rest)

    monkeypatch.setattr(scoring, "prefix_caches", counted)
    monkeypatch.setattr(scoring, "_scores", counted_scores)
    rng = np.random.default_rng(0)
    opening = rng.integers(0, 61, 32)
    rows = [np.append(opening, rng.integers(0, 61, 8)).astype(np.int32) for _ in range(6)]
    option_scores(adapter_pair(1), rows, np.asarray([5, 60]), (0.75, 1.0, 1.25), grain=32)
    assert read == [(32, 3)]
    assert sum(asked) == 6 * 8
