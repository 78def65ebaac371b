"""Options that studies share are stated once."""

import collections
import re

import pytest

from common_jax.errors import InputError
from tuco_jax.studies.catalog import STUDIES, load_study
from tuco_jax.studies.options import check_shots


def stated(options_class: type) -> list[tuple[str, str]]:
    """(option, what it is) of a class's own docstring."""
    _, _, lines = (options_class.__doc__ or "").partition("Args:\n")
    return re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", lines, re.MULTILINE)


def test_no_option_is_stated_twice():
    classes = {c for name in STUDIES for c in load_study(name).config.__mro__}
    count = collections.Counter(option for c in classes for option in stated(c))
    assert (
        "seed",
        "of every random choice: prompts, samples, folds, strings, the bootstrap.",
    ) in (count)
    assert not [option for option, times in count.items() if times > 1]


@pytest.mark.parametrize("name", STUDIES)
def test_every_option_is_explained(name):
    options_class = load_study(name).config
    known = {option for c in options_class.__mro__ for option, _ in stated(c)}
    assert options_class.__dataclass_fields__.keys() <= known


def test_numbers_of_shots():
    assert check_shots((1, 2)) == (1, 2)
    for shots, least, first, message in (
        ((4, 2), 2, None, r"shots is \[4, 2\]: give 2 or more numbers that rise$"),
        ((3,), 2, None, "give 2 or more numbers that rise$"),
        ((), 2, None, "give 2 or more numbers that rise$"),
        ((0, 2), 3, 0, "give 3 or more numbers that rise from 0$"),
        ((1, 2, 3), 3, 0, "give 3 or more numbers that rise from 0$"),
    ):
        with pytest.raises(InputError, match=message):
            check_shots(shots, least=least, first=first)
