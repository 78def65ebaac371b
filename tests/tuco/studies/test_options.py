"""Options of studies, of the demo and of the data for both are stated once."""

import collections
import re

import pytest

from common_jax.errors import InputError
from tuco_jax.commands import demo
from tuco_jax.datasets import chat_data, refusal_data
from tuco_jax.studies.catalog import STUDIES, load_study
from tuco_jax.studies.options import check_shots

CONFIGS = {name: load_study(name).config for name in STUDIES} | {
    "demo": demo.Config,
    "refusal data": refusal_data.RefusalDataConfig,
    "chat data": chat_data.ChatDataConfig,
}
# One name for different things, each explained by itself.
MEANINGS = {
    "attacks": 2,  # templates or strings; strings in place of a search
    "base": 2,  # any model; one that may be left out
    "tuned": 2,
    "chat": 3,  # a template for questions; for requests; a file
    "count": 2,  # requests; requests of each kind
    "data": 3,  # of either kind of questions; of languages
    "harmful": 2,  # how many; which
    "out": 2,  # a study's results; sets
    "prompts": 3,  # requests; how many in a group; how many of a kind
    "shots": 2,  # how many; at which numbers
}


def stated(options_class: type) -> list[str]:
    """Options that a class's own docstring explains."""
    _, _, lines = (options_class.__dict__.get("__doc__") or "").partition("Args:\n")
    return re.findall(r"^ {8}(\w+): ", lines, re.MULTILINE)


def test_no_option_is_stated_twice():
    classes = {c for config in CONFIGS.values() for c in config.__mro__}
    found = collections.Counter(name for c in classes for name in stated(c))
    assert {name: n for name, n in found.items() if n != MEANINGS.get(name, 1)} == {}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_is_explained(name):
    known = {option for c in CONFIGS[name].__mro__ for option in stated(c)}
    assert CONFIGS[name].__dataclass_fields__.keys() <= known


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
