"""Options of an answer: ranges, stop texts, and answers that were begun."""

import pytest

from common_jax.errors import InputError
from tuco_jax.generation.options import GenerationOptions, check_turns
from tuco_jax.prompts.read import as_prompts


def test_stops_are_a_list():
    assert GenerationOptions(stop="end").stops == ["end"]
    assert GenerationOptions(stop=("a", "b")).stops == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, not -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, not 0"),
        ({"seed": -1}, "seed must be 0 to 4294967295, not -1"),
        ({"stop": ["a", ""]}, "stop holds an empty text: remove it"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        GenerationOptions(**fields)


def test_answers_that_were_begun():
    question = [{"role": "user", "content": "a"}]
    answered = [*question, {"role": "assistant", "content": "b"}]
    check_turns(as_prompts(["text", question]), False)
    check_turns(as_prompts([answered]), True)
    with pytest.raises(InputError, match="prompt 1: ends with an assistant's turn: go on with it"):
        check_turns(as_prompts([question, answered]), False)
