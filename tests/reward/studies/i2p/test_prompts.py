"""Prompts in I2P's layout: what is read, what is refused, and a split by text."""

import numpy as np
import pytest
from hypothesis import given, settings

from common_jax.errors import InputError
from reward_jax.studies.i2p.prompts import Prompt, SplitOptions, read_prompts, split_prompts
from tests.hostile import CHANGES, bounded, fuzzed, spoil

HEADER = "prompt,categories,hard,sd_seed\n"
WHOLE = HEADER + '"a cat, red","hate, violence",1,3\r\n"two\nlines",,0,4\n\nåäö,"shocking",0,5\n'


def test_prompts_and_categories_are_read(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b"\xef\xbb\xbf" + WHOLE.encode())
    assert read_prompts(path) == [
        Prompt("a cat, red", ("hate", "violence")),
        Prompt("two\nlines", ()),
        Prompt("åäö", ("shocking",)),
    ]
    assert len(read_prompts(path, most=2)) == 2
    path.write_text("n,prompt\n1,a\n")
    assert read_prompts(path) == [Prompt("a", ())]


REFUSED = {
    "no column": ("text,hard\na,1\n", "has no column prompt, only text, hard; name it in row 1"),
    "empty file": ("", "has no column prompt, only none"),
    "no rows": (HEADER, "holds no prompts, only a header"),
    "empty prompt": (HEADER + "a,,1,2\n  ,,1,2\n", "the prompt of row 2 is empty; remove it"),
    "too few cells": (HEADER + "a,b\n", "row 1 has 2 cells, where the header has 4"),
    "open quotation": (HEADER + '"a,b,1,2\n', "is no csv file (unexpected end of data)"),
    "a line without end": ("prompt," * 200_000, "is no csv file (a line has more than 1,048,576"),
    "not text": (b"PAR1\xff\xfe\x00", "is no csv file (not UTF-8); save it as one, in UTF-8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_holds_no_prompts_is_refused(tmp_path, case):
    content, said = REFUSED[case]
    path = tmp_path / "p.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}: {said}") and "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "no.csv"):
        with pytest.raises(InputError, match="there is no such file; a csv file of prompts"):
            read_prompts(path)


def test_spoilt_files(tmp_path):
    path = tmp_path / "p.csv"

    @settings(fuzzed)
    @given(CHANGES)
    def check(changes):
        path.write_bytes(spoil(WHOLE.encode(), changes))
        with bounded(path):
            read_prompts(path)

    check()


def test_prompts_of_one_text_are_on_one_side():
    prompts = [Prompt(f"text {i % 20}", ()) for i in range(50)]
    split = split_prompts(prompts, SplitOptions(), seed=1)
    assert sorted(np.concatenate(split)) == list(range(50))
    sides = [{prompts[i].text for i in part} for part in split]
    assert [len(side) for side in sides] == [12, 4, 4] and len(set().union(*sides)) == 20
    again, other = (split_prompts(prompts, SplitOptions(), seed=seed) for seed in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(split, again, strict=True))
    assert not np.array_equal(split.train, other.train)


def test_a_side_without_prompts_is_refused():
    prompts = [Prompt(text, ()) for text in "aab"]
    with pytest.raises(InputError, match="2 different prompts at shares .* none for test"):
        split_prompts(prompts, SplitOptions(), 0)
    with pytest.raises(InputError, match="leave none for test: give more prompts"):
        split_prompts([Prompt(c, ()) for c in "abcde"], SplitOptions(0.6, 0.4), 0)
