"""Tables read back as they were, and a journal goes on with its own run alone."""

import csv
import functools
import json

import numpy as np
import pyarrow.parquet
import pytest

from common_jax.errors import InputError
from common_jax.journal import Journal
from tests.tuco import random_models as rm
from tests.tuco.interrupted import read_back
from tests.tuco.tiny_tokenizer import bos_tokenizer
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import Prompt, as_prompts
from tuco_jax.scoring.fingerprint import scores_fingerprint
from tuco_jax.scoring.output import (
    FORMATS,
    Entry,
    check_made,
    prompts_checksum,
    write_table,
)
from tuco_jax.scoring.score import score_tokens

CONFIG = rm.config(vocab_size=272, max_positions=64)
FIELDS = ("tuco", "layers", "telescoping")


@pytest.fixture(scope="module")
def pair():
    return rm.full_pair(base=CONFIG)


@pytest.fixture(scope="module")
def tokenizer():
    return bos_tokenizer()


def some_prompts(count=24):
    """Letters of few lengths, each prompt of its own letter: nothing is shared."""
    lengths = np.random.default_rng(0).choice([1, 3, 6, 20, 60, 63], count)
    return [chr(97 + i) * n for i, n in enumerate(lengths)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_tables(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    columns = {
        "id": ["a", 2, "c"],
        "tuco": np.array([0.1, 1 / 3, 1e-20], np.float32),
        "layers": np.arange(6, dtype=np.float32).reshape(3, 2) / 7,
    }
    write_table(path, columns)
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found = {name: [row[name] for row in rows] for name in columns}
    elif suffix == ".csv":
        with path.open() as file:
            rows = list(csv.DictReader(file))
        found = {name: [row[name] for row in rows] for name in columns}
        found["layers"] = [json.loads(cell) for cell in found["layers"]]
    else:
        found = pyarrow.parquet.read_table(path).to_pydict()
    assert [str(v) for v in found["id"]] == ["a", "2", "c"]
    for name in ("tuco", "layers"):
        np.testing.assert_array_equal(np.array(found[name], np.float32), columns[name])


def test_journal_goes_on_and_changes_nothing(tmp_path, pair, tokenizer):
    prompts = as_prompts(some_prompts())
    tokens = encode(tokenizer, prompts)
    key = scores_fingerprint(pair, tokens, 1)
    path = tmp_path / "out.journal"
    journal = Journal(path)
    journal.begin(key)
    whole = score_tokens(pair, tokens, prompts, token_budget=128, journal=journal)
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) > 4, "several batches"

    path.write_bytes(b"".join(lines[:3]) + lines[3][:-5])  # killed while it wrote a line
    journal = Journal(path)
    journal.begin(key)
    again = score_tokens(pair, tokens, prompts, token_budget=128, journal=journal)
    journal.close()
    done = sum(len(json.loads(line)[1][0]) for line in lines[1:3])
    assert again.resumed == done == journal.resumed["scores"] > 0
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(again, field), getattr(whole, field))
    assert path.read_bytes().splitlines(keepends=True) == lines

    journal = Journal(path)  # complete, and read under another batch size
    journal.begin(key)
    score_of_none = score_tokens(pair, tokens, prompts, token_budget=4096, journal=journal)
    journal.close()
    assert score_of_none.resumed == len(prompts) and score_of_none.shapes == []
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(score_of_none, field), getattr(whole, field))


SETTINGS = {"prompts": "abc", "norm": 1}


GOOD = [[0, 2], [0.5, 0.5], [[0.5, 0.5]] * 2, [0.0, 0.0]]


@pytest.mark.parametrize(
    "record",
    [
        [[9], [0.5], [[0.5, 0.5]], [0.0]],  # no such prompt
        [[0], [0.5, 0.5], [[0.5, 0.5]], [0.0]],
        [[0], [0.5], [[0.5]], [0.0]],  # other layers
        [[0], [float("nan")], [[0.5, 0.5]], [0.0]],
        [["0"], [0.5], [[0.5, 0.5]], [0.0]],
        [[True], [0.5], [[0.5, 0.5]], [0.0]],
        [[0], [0.5], [[0.5, 0.5]]],
        {},
        7,
    ],
)
def test_what_is_no_entry_is_computed_again(tmp_path, record):
    read = functools.partial(Entry.read, shape=(3, 2))
    found = read_back(tmp_path / "journal", read, (GOOD, record))
    assert [e.rows for e in found] == [[0, 2]]


def test_an_output_says_what_made_it(tmp_path):
    path, beside = tmp_path / "o.jsonl", tmp_path / "o.jsonl.meta.json"
    beside.write_text(json.dumps({"settings": SETTINGS | {"fingerprint": "a"}}))
    check_made(path, {"norm": 2})  # it is not there
    path.write_text("")
    check_made(path, {"norm": 2})  # it holds nothing
    path.write_text("{}")
    check_made(path, SETTINGS)
    for settings, message in (
        ({"norm": 2}, "norm 1, not 2"),
        ({"fingerprint": "b"}, "other weigh"),
    ):
        with pytest.raises(InputError, match=f"{path}: holds the results of .*{message}"):
            check_made(path, settings)
    for text in ("", "[]", '{"settings": 3}', '{"rows": 2}', "[" * 5000, None):
        beside.write_text(text) if text is not None else beside.unlink()
        with pytest.raises(InputError, match=f"{path}: is there, and o.jsonl.meta.json, .*; move"):
            check_made(path, {"norm": 1})


def test_a_checksum_knows_every_part_of_a_prompt():
    talk = ({"role": "user", "content": "a"},)
    rows = [Prompt(1, "a"), Prompt(2, "a"), Prompt(1, "b"), Prompt(1, None, talk)]
    rows += [Prompt(1, "a", label="x"), Prompt(1, None, talk, tools=({"name": "f"},))]
    assert len({prompts_checksum([row]) for row in rows}) == len(rows)
    assert prompts_checksum(rows) != prompts_checksum(rows[::-1])
    assert prompts_checksum(rows[:1]) == prompts_checksum([Prompt(1, "a", line=9)])
