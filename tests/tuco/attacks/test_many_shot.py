"""Demonstrations as earlier turns, and controls of the same length."""

import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco.cli_pair import write_jsonl
from tuco_jax.attacks.many_shot import Demonstration, matched, prompt_of, read_demonstrations

RNG = np.random.default_rng(0)


def test_many_shot_prompts_hold_the_exchanges_in_order():
    prompt = prompt_of("p", [Demonstration("q1", "a1"), Demonstration("q2", "a2")], "last")
    assert [(m["role"], m["content"]) for m in prompt.messages or ()] == [
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "last"),
    ]


def test_matched_demonstrations_follow_the_targets_at_every_number_of_shots():
    targets = RNG.integers(20, 40, 30)
    questions = ["q" * int(n) for n in RNG.integers(5, 15, 30)]
    answers = ["a" * n for n in (8, 11, 15, 22, 30)]
    found = matched(targets.tolist(), questions, [answers], len)
    assert [d.question for d in found] == questions
    have = np.cumsum([len(d.question) + len(d.answer) for d in found])
    assert np.abs(have - np.cumsum(targets)).max() <= 8
    own = [["a", "aa"] if i % 2 else ["b" * 40, "b" * 20] for i in range(30)]
    for i, d in enumerate(matched(targets.tolist(), questions, own, len)):
        assert d.answer in own[i]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"question": "a"}\n',
            ":1: `answer` must be text that is not empty, or `answer_matching_behavior` in its",
        ),
        (
            '{"question": "a", "answer_matching_behavior": " "}\n',
            ":1: `answer_matching_behavior` must be text that is not empty$",
        ),
        ('{"question": "a", "answer": 1}\n', ":1: `answer` must be text that is not empty$"),
        ('{"question": "a", "answer": "b"}\n{"question": " ", "answer": "b"}', ":2: `question` m"),
        ("[1]\n", ":1: `question` must be text that is not empty"),
        ("{\n", ":1: not JSON; write one object a line"),
        ("\n", ": holds no demonstrations"),
    ],
)
def test_demonstrations_bad_input(tmp_path, text, message):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=f"d.jsonl{message}"):
        read_demonstrations(path)
    with pytest.raises(InputError, match="d.csv: is no .jsonl file; give one with `question`"):
        read_demonstrations(tmp_path / "d.csv")


def test_demonstrations_of_model_written_evals(tmp_path):
    rows = [
        {
            "question": "Is this so?\n(A) Yes\n(B) No",
            "answer_matching_behavior": " (A)",
            "answer_not_matching_behavior": " (B)",
        },
        {"question": "q", "answer": " a", "answer_matching_behavior": " (B)"},
    ]
    assert read_demonstrations(write_jsonl(tmp_path / "d.jsonl", rows)) == [
        Demonstration("Is this so?\n(A) Yes\n(B) No", "(A)"),
        Demonstration("q", " a"),
    ]
