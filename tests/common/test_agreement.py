"""What one of several processes was given otherwise than process 0 is named, in one line."""

import pathlib

import pytest

from common_jax import agreement
from common_jax.agreement import agree
from common_jax.errors import InputError

FACTS = {
    "norm": 1,
    "base": pathlib.Path("models/base"),
    "adapter": None,
    "scales": (0.5, float("nan")),
    "mesh": {"data": -1, "fsdp": 1},
}


@pytest.fixture
def process_1(monkeypatch):
    """This process is the second of two, whose first was given FACTS."""
    first = agreement.flat(agreement.plain(FACTS))
    monkeypatch.setattr(agreement, "count", lambda: 2)
    monkeypatch.setattr(agreement, "by_first", lambda act: first)
    monkeypatch.setattr(agreement, "heard", lambda what: [(1, what)] if what else [])


def test_the_same_is_the_same(process_1):
    agree(FACTS)
    agree(dict(reversed(FACTS.items())) | {"scales": [0.5, float("nan")]})


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"norm": 2}, "with norm 2, process 0 with norm 1"),
        ({"norm": "1"}, "with norm 1, process 0 with norm 1"),
        ({"norm": True}, "with norm true, process 0 with norm 1"),
        ({"base": "models/\u00e9"}, "with base models/\u00e9, process 0 with base models/base"),
        ({"adapter": "a"}, "with adapter a, process 0 without adapter"),
        ({"scales": [1.5]}, "with scales [1.5], process 0 with scales [0.5, NaN]"),
        ({"mesh": {"data": 2, "fsdp": 1}}, "with mesh.data 2, process 0 with mesh.data -1"),
        ({"mesh": {"data": -1}}, "without mesh.fsdp, process 0 with mesh.fsdp 1"),
        ({"base": 500 * "b"}, f"with base {200 * 'b'}, process 0 with base models/base"),
    ],
)
def test_what_is_not_the_same_is_named(process_1, other, said):
    with pytest.raises(InputError) as raised:
        agree(FACTS | other)
    given = "give all the same options and files"
    assert str(raised.value) == f"process 1 was started {said}: {given}"
    with pytest.raises(InputError, match=": install the same$"):
        agree(FACTS | other, "install the same")


def test_one_process_agrees_with_itself():
    agree({"norm": 1})
