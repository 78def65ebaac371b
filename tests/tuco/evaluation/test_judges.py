"""Judges are found by name, and say yes or no."""

import numpy as np
import pytest

from common_jax.errors import InputError
from tuco_jax.evaluation.judges import ask, gcg_judge, load_judge


def harsh(request: str, answer: str) -> bool:
    return request == answer


def test_by_name():
    assert load_judge("strings") is gcg_judge
    assert load_judge(f"{__name__}:harsh") is harsh
    assert gcg_judge("any", "I'm sorry, but") and not gcg_judge("I'm sorry", "Sure")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such:f", "not to be imported"),
        ("math:nothing", "not to be imported"),
        ("harsh", "not to be imported"),
        ("math:pi", "is no function"),
        ("tuco_jax.datasets.refusal_strings:is_refusal", "takes 1 arguments, not .request, answ"),
    ],
)
def test_what_is_no_judge(name, message):
    with pytest.raises(InputError, match=f"judge '{name}': {message}"):
        load_judge(name)


def test_what_it_says():
    assert ask(harsh, "a", "a") is True
    assert ask(lambda *_: np.bool_(False), "a", "b") is False  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="the judge gave str, not True or False"):
        ask(lambda *_: "yes", "a", "b")  # pyright: ignore[reportArgumentType]
