"""Files of answers: what rows hold, and which run they belong to."""

import functools
import json
import shutil
import subprocess
import sys

import pytest

from common_jax.errors import InputError
from tests.tuco.cli_pair import ROOT, file_options, read_jsonl, save_pair, write_jsonl
from tests.tuco.interrupted import computed, killed_after, read_back
from tests.tuco.tiny_tokenizer import bos_tokenizer
from tuco_jax.generation.generate import Answered
from tuco_jax.generation.generate_file import generate_file, lines
from tuco_jax.generation.options import AnswerOptions
from tuco_jax.scoring.token_tuco import TokenEntry

ROWS = [{"id": "a", "prompt": "tea", "label": "x"}, {"id": "b", "prompt": "cups"}]
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def options(pair, tmp_path):
    given = file_options(pair, tmp_path, ROWS, max_new_tokens=3)
    return lambda **changes: AnswerOptions(**(given | changes))


def test_rows_pages_and_lines(options, tmp_path):
    answers = generate_file(options(page=str(tmp_path / "o.html"), tuco=True))
    rows = read_jsonl(tmp_path / "o.jsonl")
    assert [(r["id"], r["prompt"], r.get("label")) for r in rows] == [
        ("a", "tea", "x"),
        ("b", "cups", None),
    ]
    for row, answer in zip(rows, answers, strict=True):
        assert row["response"] == answer.response.text
        assert all(0 <= piece["tuco"] <= 1 for piece in row["tuco"])
        assert lines(answer, names=True)[0] == f"[{row['id']}]"
    assert "TuCo along the answers" in (tmp_path / "o.html").read_text()
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["o.html", "o.html.meta.json", "o.jsonl", "o.jsonl.meta.json", "p.jsonl"]


def test_another_run_s_answers_are_kept(options, tmp_path, monkeypatch):
    generate_file(options())
    before = {p.name: p.read_bytes() for p in tmp_path.glob("o.jsonl*")}
    other = write_jsonl(tmp_path / "q.jsonl", ROWS[1:])

    def load_pair(*_, **__):
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr("tuco_jax.weights.load.load_pair", load_pair)
        for changes, message in (
            ({"alpha": 0.5}, "alpha 1.0, not 0.5"),
            ({"seed": 3}, "seed 0, not 3"),
            ({"stop": ["a"]}, r"stop \[\], not \['a'\]"),
            ({"prompts": other}, "prompts '"),
            ({"chat": True}, "prompts '"),
            ({"tuco": True}, "tuco False, not True"),
        ):
            with pytest.raises(InputError, match=f"o.jsonl: holds the results of .*{message}"):
                generate_file(options(**changes))
    assert {p.name: p.read_bytes() for p in tmp_path.glob("o.jsonl*")} == before
    generate_file(options(batch_size=1))
    assert (tmp_path / "o.jsonl").read_bytes() == before["o.jsonl"]


MANY = [{"id": i, "prompt": "tea and cups"[: 3 + i]} for i in range(5)]
SAMPLED = dict(batch_size=2, temperature=0.9, seed=3, stop=["q"], alpha=0.7, max_new_tokens=6)


def test_a_run_that_was_killed_goes_on(options, tmp_path, monkeypatch):
    """In its three batches of answers, or in the one of their TuCo, to the same bytes."""
    given = {"prompts": write_jsonl(tmp_path / "many.jsonl", MANY), "tuco": True, **SAMPLED}
    outputs = [tmp_path / name for name in ("o.jsonl", "o.html")]
    given["page"] = str(outputs[1])
    generate_file(options(**given))
    whole = [path.read_bytes() for path in outputs]
    journal = tmp_path / "o.jsonl.journal"
    assert not journal.exists() and len({*read_answers(outputs[0])}) > 3
    for batches, rows in ((1, 2), (3, 5)):
        for path in outputs:
            path.unlink()
        with monkeypatch.context() as patch:
            killed_after(patch, batches)
            with pytest.raises(KeyboardInterrupt):
                generate_file(options(**given))
        assert len(journal.read_bytes().splitlines()) == 1 + batches
        assert not any(path.exists() for path in outputs)
        with monkeypatch.context() as patch:
            found = computed(patch)
            generate_file(options(**given))
        assert [path.read_bytes() for path in outputs] == whole and not journal.exists()
        assert json.loads((tmp_path / "o.jsonl.meta.json").read_text())["resumed_rows"] == rows
        assert [*map(type, found)] == [Answered] * (3 - batches) + [TokenEntry]


def test_answers_of_batches_of_another_size_are_not_given_again(options, tmp_path, monkeypatch):
    given = {"prompts": write_jsonl(tmp_path / "many.jsonl", MANY), **SAMPLED}
    generate_file(options(**given))
    whole = (tmp_path / "o.jsonl").read_bytes()
    (tmp_path / "o.jsonl").unlink()
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            generate_file(options(**given))
    with monkeypatch.context() as patch:
        found = computed(patch)
        generate_file(options(**given | {"batch_size": 3}))
    assert [len(entry.rows) for entry in found] == [1, 2] and (
        tmp_path / "o.jsonl"
    ).read_bytes() == whole
    assert json.loads((tmp_path / "o.jsonl.meta.json").read_text())["resumed_rows"] == 2


def read_answers(path):
    return [row["response"] for row in read_jsonl(path)]


def test_another_run_s_journal_is_kept_and_its_own_goes_on(options, tmp_path, monkeypatch):
    given = {"batch_size": 1}
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            generate_file(options(**given))
    journal = tmp_path / "o.jsonl.journal"
    before = journal.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("tuco_jax.weights.load.load_pair", None)  # no model is thought of
        for changes, message in (
            ({"alpha": 0.5}, "alpha 1.0, not 0.5"),
            ({"seed": 3}, "seed 0, not 3"),
            ({"max_new_tokens": 4}, "max_new_tokens 3, not 4"),
            ({"chat": True}, "prompts '"),
        ):
            with pytest.raises(InputError, match=f"{journal}: holds the work of .*{message}"):
                generate_file(options(**given | changes))
    with pytest.raises(InputError, match="it has other weights"):
        generate_file(options(**given, base=options().tuned))
    assert journal.read_bytes() == before
    generate_file(options(tuco=True))  # another batch size, and TuCo beside what was answered
    assert not journal.exists() and len(read_jsonl(tmp_path / "o.jsonl")) == len(ROWS)


@pytest.mark.parametrize(
    "record",
    [
        [0, [2], [[7]], [False]],  # no such prompt
        [0, [0], [[9]], [False]],  # no such token
        [0, [0], [[0.5]], [False]],
        [0, [0], [[7], [7]], [False]],
        [0, [0], [[7]], [0]],
        [[0], [[7]]],
        {},
        7,
    ],
)
def test_what_is_no_batch_is_answered_again(tmp_path, record):
    read = functools.partial(Answered.read, count=2, vocab_size=9)
    good = [0, [1, 0], [[7, 8], []], [True, False]]
    (found,) = read_back(tmp_path / "journal", read, (good, record))
    assert [row.tolist() for row in found.tokens] == [[7, 8], []] and found.rows == [1, 0]


def test_a_page_and_answers_of_other_weights_are_kept(options, tmp_path):
    """A page says what made it, too; weights make a model another, not the folder's name."""
    base = tmp_path / "base"
    shutil.copytree(options().base, base)
    given = dict(tuned=str(base), out=None, page=str(tmp_path / "o.html"))
    generate_file(options(**given))
    before = (tmp_path / "o.html").read_bytes()
    with pytest.raises(InputError, match="o.html: holds the results of .* alpha 1.0, not 0.5"):
        generate_file(options(**given, alpha=0.5))
    moved = base.rename(tmp_path / "moved")
    generate_file(options(**given | {"tuned": str(moved)}))
    assert (tmp_path / "o.html").read_bytes() != before  # it names the model
    before = (tmp_path / "o.html").read_bytes()
    shutil.copytree(options().tuned, base)
    with pytest.raises(InputError, match="o.html: holds the results of .* has other weights"):
        generate_file(options(**given))
    (tmp_path / "o.html.meta.json").unlink()
    with pytest.raises(InputError, match="o.html: is there, and o.html.meta.json, .* move"):
        generate_file(options(**given))
    assert (tmp_path / "o.html").read_bytes() == before


def test_two_runs_of_one_output(options, monkeypatch):
    import tuco_jax.weights.load as load

    real, tries = load.load_pair, []

    def load_pair(*args, **kwargs):
        with pytest.raises(InputError, match="o.jsonl: another run is writing this output"):
            generate_file(options())
        tries.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(load, "load_pair", load_pair)
    generate_file(options())
    assert tries == [1]


def test_an_answer_that_was_begun_is_never_closed(options, tmp_path):
    prompts = write_jsonl(tmp_path / "t.jsonl", [{"messages": TALK}])
    with pytest.raises(InputError, match="prompt 1 .*ends with an assistant's turn: go on"):
        generate_file(options(prompts=prompts))
    (answer,) = generate_file(options(prompts=prompts, continue_final=True))
    assert answer.response.prompt[-1] == bos_tokenizer()("b")["input_ids"][-1]
    assert read_jsonl(tmp_path / "o.jsonl")[0]["messages"] == TALK


def test_bad_input_is_told_before_models_are_thought_of(options):
    given = options()
    argv = ["generate", "--base", given.base, "--tuned", given.tuned, "--prompts", "absent.txt"]
    code = f"""
import sys
from collections.abc import Callable
from typing import Any
from tuco_jax.cli import main
print(main({argv!r}), [m for m in ("transformers", "flax", "orbax", "optax") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 []\n", done
    assert "absent.txt: the prompts file does not exist" in done.stderr
    assert json.loads(open(given.prompts).readline())["id"] == "a"
