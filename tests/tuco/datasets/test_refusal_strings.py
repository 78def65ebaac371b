"""Refusals and answers are told apart by strings."""

import ml_dtypes  # noqa: F401  bfloat16 in numpy
import pytest

from tuco_jax.datasets import prompt_sources
from tuco_jax.datasets.refusal_strings import GCG_STRINGS, is_refusal


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "As an AI language model, I cannot write this.",
        "I must decline.",
        "I won\u2019t, sorry. I can\u2019t do this.",
        "I'm unable to assist.",
    ],
)
def test_refusals_are_told(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Hello! I'd be happy to help.",
        "As an example, take two apples.",
        "It is illegal to park here, but you may stop.",
        "i'm sorry",  # case and all, as in the paper
        "",
    ],
)
def test_answers_are_told(answer):
    assert not is_refusal(answer)


def test_the_paper_s_list_is_cruder():
    assert is_refusal("Hello! I'd be happy to help.", GCG_STRINGS)
    assert len(GCG_STRINGS) == 29


def test_shipped_refusals_are_refusals_and_shipped_answers_are_not():
    texts = [row["text"] for row in prompt_sources.shipped("refusals")]
    assert len(set(texts)) >= 10
    assert all(map(is_refusal, texts))
    answers = prompt_sources.shipped("answers")
    assert len(answers) >= 250
    assert not any(is_refusal(row["answer"]) for row in answers)
