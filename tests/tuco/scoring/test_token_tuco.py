"""TuCo along a response, and the command that shows it."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

import tuco_jax
from common_jax.cli import command_line
from common_jax.cli.command_line import one_line
from common_jax.errors import InputError
from tests.tuco.cli_pair import ROOT, read_jsonl, run_in_process, save_pair, write_jsonl
from tests.tuco.interrupted import check_it_goes_on, read_back
from tests.tuco.random_models import adapter_pair
from tests.tuco.tiny_tokenizer import bos_tokenizer
from tuco_jax.commands import generate as command
from tuco_jax.core.decompose import decompose
from tuco_jax.core.last_token import tuco
from tuco_jax.core.residual import share
from tuco_jax.generation.generate import generate, respond
from tuco_jax.scoring.token_tuco import TokenEntry, pieces, response_tuco, token_tuco

ROWS = [np.random.default_rng(n).integers(0, 61, n) for n in (3, 13, 1, 8)]


def test_every_token_s_share_is_the_tuco_of_the_text_up_to_it():
    pair = adapter_pair(3)
    got = token_tuco(pair, ROWS, token_budget=16)
    assert [len(g) for g in got] == [3, 13, 1, 8]
    for row, values in ((0, got[0]), (1, got[1])):
        tokens = np.broadcast_to(ROWS[row], (len(ROWS[row]),) * 2)
        mask = np.tril(np.ones(tokens.shape, bool))
        want = tuco(pair, jnp.asarray(tokens), jnp.asarray(mask))
        np.testing.assert_allclose(values, want, rtol=1e-4)
    for one, other in zip(got, token_tuco(pair, ROWS), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_generated_tokens_have_the_share_that_they_were_chosen_from():
    pair = adapter_pair(3)
    responses = [np.arange(4), np.arange(2), np.empty(0, int), np.arange(6)]
    alphas = np.asarray([0.3, 1.0, 0.7, 1.2])
    got = response_tuco(pair, ROWS, responses, alphas)
    assert [len(g) for g in got] == [4, 2, 0, 6]
    for values, prompt, response, alpha in zip(got, ROWS, responses, alphas, strict=True):
        whole = jnp.asarray(np.concatenate([prompt, response]))[None]
        out = decompose(pair, whole, alpha=alpha)
        want = share(out.ptc, out.ftc)[0, len(prompt) - 1 : whole.shape[1] - 1]
        np.testing.assert_allclose(values, want, rtol=1e-4)


def test_texts_that_are_done_are_not_computed_again(tmp_path, monkeypatch):
    pair, rows = adapter_pair(3), 2 * ROWS

    def run(journal, rows=rows, alpha=0.5):
        return token_tuco(pair, rows, alpha, token_budget=16, journal=journal)

    unlike = functools.partial(run, rows=rows[::-1]), functools.partial(run, alpha=0.25)
    check_it_goes_on(tmp_path / "journal", monkeypatch, run, unlike)


@pytest.mark.parametrize(
    "record",
    [
        [[2], [[0.5, 0.5]]],  # no such text
        [[0], [[0.5]]],  # another length
        [[1, 0], [[0.5]]],
        [[1], [[[0.5]]]],
        [[1], [[float("inf")]]],
        [[True], [[0.5]]],
        [[1], "a"],
        {},
        7,
    ],
)
def test_what_is_no_batch_is_computed_again(tmp_path, record):
    read = functools.partial(TokenEntry.read, sizes=[2, 1])
    good = [[1, 0], [[0.1], [0.2, 0.3]]]
    (found,) = read_back(tmp_path / "journal", read, (good, record))
    assert found.rows == [1, 0]
    for got, want in zip(found.tuco, good[1], strict=True):
        np.testing.assert_array_equal(got, np.asarray(want, np.float32))


def test_rows_that_cannot_be_read():
    pair = adapter_pair(3)
    assert token_tuco(pair, []) == []
    with pytest.raises(InputError, match=r"rows\[1\]: 65 tokens; give 1 to 64"):
        token_tuco(pair, [ROWS[0], np.zeros(65, int)])
    with pytest.raises(InputError, match=r"rows\[0\]: 0 tokens"):
        token_tuco(pair, [np.zeros(0, int)])


def test_bytes_of_one_character_are_one_piece():
    ids = np.asarray(bos_tokenizer()("a\u00fcb", add_special_tokens=False)["input_ids"])
    found = pieces(bos_tokenizer(), ids, np.asarray([0.1, 0.2, 0.3, 0.4], np.float32))
    assert [(p.text, p.position) for p in found] == [("a", 0), ("\u00fc", 2), ("b", 3)]
    assert found[1].tuco == pytest.approx(0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def saved(folder):
    return save_pair(folder)


@pytest.fixture
def run(monkeypatch, folder, saved):
    flags = ["generate", "--base", saved[0], "--tuned", saved[1], "--max_new_tokens", "8"]
    return lambda *argv: run_in_process(monkeypatch, folder / "cache", [*flags, *map(str, argv)])


PROMPTS = [
    {"id": "greeting", "prompt": "Good morning", "label": "plain"},
    {"id": 2, "messages": [{"role": "user", "content": "Why?"}]},
]


def test_a_file_of_prompts_with_tuco_out_and_page(run, saved, tmp_path, capsys):
    prompts = write_jsonl(tmp_path / "p.jsonl", PROMPTS)
    out, page = tmp_path / "o.jsonl", tmp_path / "o.html"
    options = ("--prompts", prompts, "--alpha", 0.5, "--tuco", "--out", out, "--page", page)
    assert run(*options) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = read_jsonl(out)
    assert [r["id"] for r in rows] == ["greeting", 2]
    assert rows[0]["label"] == "plain" and rows[0]["prompt"] == "Good morning"
    assert rows[1]["messages"] == PROMPTS[1]["messages"]

    pair, tokenizer = tuco_jax.load_pair(*saved)
    given = ["Good morning", PROMPTS[1]["messages"]]
    want = respond(pair, tokenizer, given, 0.5, max_new_tokens=8)
    assert [r["response"] for r in rows] == [r.text for r in want]
    assert [r["tokens"] for r in rows] == [len(r.tokens) for r in want]
    values = response_tuco(pair, [r.prompt for r in want], [r.tokens for r in want], 0.5)
    expected = []
    for row, response, shares in zip(rows, want, values, strict=True):
        found = pieces(tokenizer, response.tokens, shares)
        assert [t["text"] for t in row["tuco"]] == [p.text for p in found]
        np.testing.assert_allclose(
            [t["tuco"] for t in row["tuco"]], [p.tuco for p in found], rtol=1e-4
        )
        expected.append(f"[{row['id']}]")
        expected += [f"{t['tuco']:.4f}  {t['text']!r}" for t in row["tuco"]]
    assert printed[: len(expected)] == expected
    meta = json.loads((tmp_path / "o.jsonl.meta.json").read_text())
    assert (meta["base"], meta["tuned"], meta["alpha"]) == (*saved, 0.5)
    assert meta["notes"] == list(pair.notes) and meta["mesh"] is None and meta["versions"]["jax"]
    assert printed[len(expected) :] == [f"2 answers: {out}", f"2 answers: {page}"]
    text = page.read_text("utf-8")
    assert text.count('title="0.') == sum(len(r["tuco"]) for r in rows)
    assert "Good morning" in text and "alpha" in text and "<script" not in text


def test_findings_are_told_and_a_mesh_changes_nothing(run, saved, folder, tmp_path, capsys):
    prompts = write_jsonl(tmp_path / "p.jsonl", PROMPTS)
    out = tmp_path / "o.jsonl"
    assert run("--prompts", prompts, "--out", out) == 0
    pair, _ = tuco_jax.load_pair(*saved)
    assert pair.notes
    printed = capsys.readouterr().err.splitlines()
    assert [f"note: {one_line(note)}" for note in pair.notes] == printed[: len(pair.notes)]
    alone = read_jsonl(out)
    assert run("--prompts", prompts, "--out", out, "--mesh.data", 2, "--mesh.fsdp", 2) == 0
    assert read_jsonl(out) == alone
    assert json.loads((tmp_path / "o.jsonl.meta.json").read_text())["mesh"]["fsdp"] == 2


def test_one_prompt_is_printed_alone(run, saved, capsys):
    assert run("--prompt", "Why?", "--chat") == 0
    pair, tokenizer = tuco_jax.load_pair(*saved)
    chat = [[{"role": "user", "content": "Why?"}]]
    want = generate(pair, tokenizer, chat, max_new_tokens=8)[0]
    assert capsys.readouterr().out == want + "\n"
    for text in ("# 1", "null", "{a: b}"):  # which YAML would take for something else
        assert run("--prompt", text) == 0
        assert (
            capsys.readouterr().out
            == generate(pair, tokenizer, [text], max_new_tokens=8)[0] + "\n"
        )
    sample = ("--prompt", "Why?", "--temperature", 1.5, "--top_k", 40, "--top_p", 0.9)
    assert run(*sample, "--seed", 3) == 0
    first = capsys.readouterr().out
    assert run(*sample, "--seed", 3) == 0
    assert capsys.readouterr().out == first
    assert run(*sample, "--seed", 4) == 0
    assert capsys.readouterr().out != first


def test_stop_texts_end_answers_and_their_tokens(saved):
    pair, tokenizer = tuco_jax.load_pair(*saved)
    free = respond(pair, tokenizer, ["Why?"], max_new_tokens=16)[0]
    stop = free.text[3:5]
    short = respond(pair, tokenizer, ["Why?"], max_new_tokens=16, stop=stop)[0]
    assert short.text == free.text.partition(stop)[0] != free.text
    assert len(short.tokens) < len(free.tokens)
    np.testing.assert_array_equal(short.tokens, free.tokens[: len(short.tokens)])
    decoded = str(tokenizer.decode(short.tokens.tolist(), skip_special_tokens=True))
    assert decoded.startswith(short.text)


BAD = {
    "neither": ([], "give --prompt TEXT or --prompts FILE, one of the two"),
    "both": (["--prompt", "a", "--prompts", "p.jsonl"], "one of the two"),
    "empty": (["--prompt", " "], "--prompt is empty: give a text"),
    "not UTF-8": (["--prompt", "a\udcff"], "--prompt is not UTF-8: give it as text"),
    "missing": (["--prompts", "absent.jsonl"], "absent.jsonl: the prompts file does not exist"),
    "out": (["--prompt", "a", "--out", "o.csv"], "o.csv: output comes as .jsonl, not '.csv'"),
    "page": (["--prompt", "a", "--page", "o.txt"], "o.txt: output comes as .html, not '.txt'"),
    "alpha": (["--prompt", "a", "--alpha", "nan"], "option --alpha: Expected a float"),
    "tokens": (
        ["--prompt", "a", "--max_new_tokens", "0"],
        "option --max_new_tokens must be 1 or more, not 0",
    ),
    "temperature": (
        ["--prompt", "a", "--temperature=-1"],
        "option --temperature must be 0 or more, not -1",
    ),
    "top_p": (
        ["--prompt", "a", "--top_p", "0"],
        "option --top_p must be above 0 and at most 1, not 0",
    ),
    "top_k": (["--prompt", "a", "--top_k=-1"], "option --top_k must be 0 or more, not -1"),
    "seed": (["--prompt", "a", "--seed=-1"], "option --seed must be 0 to 4294967295, not -1"),
    "stop": (["--prompt", "a", "--stop", '[""]'], "stop holds an empty text: remove it"),
    "long": (["--prompt", "a" * 70], "prompt 1: "),
    "model": (["--prompt", "a", "--tuned", "no/such/folder"], "no/such/folder"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input(run, tmp_path, monkeypatch, capsys, kind):
    argv, message = BAD[kind]
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("tuco-jax: error: ") and printed.err.count("\n") == 1
    assert message in printed.err and printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_prompts_file_is_not_overwritten(run, tmp_path, capsys):
    prompts = write_jsonl(tmp_path / "p.jsonl", PROMPTS)
    assert run("--prompts", prompts, "--out", prompts) == 2
    assert "p.jsonl: is the prompts file itself" in capsys.readouterr().err
    assert [json.loads(line)["id"] for line in open(prompts)] == ["greeting", 2]


def test_the_shipped_config_is_read():
    path = ROOT / "configs" / "tuco" / "generate.yaml"
    argv = ["--config", str(path), "--prompt", "a"]
    options = command_line.parse("tuco-jax generate", "", command.Config, argv)
    assert options.alpha == 0.9 and options.chat and options.tuco and options.prompt == "a"
