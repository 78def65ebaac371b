"""A file of scores belongs to one run: another is refused, a broken one goes on."""

import json
import pathlib
import subprocess
import sys
import textwrap

import pytest

from common_jax.errors import InputError
from tests.tuco.cli_pair import (
    ROOT,
    file_options,
    read_jsonl,
    run_in_process,
    save_pair,
    write_jsonl,
)
from tuco_jax.scoring import score as score_module
from tuco_jax.scoring.options import ScoreFileOptions
from tuco_jax.scoring.score_file import score_file

ROWS = [{"id": i, "prompt": "x" * (1 + i % 5)} for i in range(40)]
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def options(pair, tmp_path):
    given = file_options(pair, tmp_path, ROWS, token_budget=8)
    return lambda **changes: ScoreFileOptions(**(given | changes))


def no_models(monkeypatch):
    def load_pair(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tuco_jax.weights.load.load_pair", load_pair)


OTHERS = {
    "norm": ({"norm": 2}, "norm 1, not 2"),
    "dtype": ({"dtype": "bfloat16"}, "dtype 'float32', not 'bfloat16'"),
    "truncate": ({"truncate": True}, "truncate False, not True"),
    "continue_final": ({"continue_final": True}, "continue_final False, not True"),
    "prompts": ({"prompts": None}, "prompts '"),
}


def killed_after(monkeypatch, batches):
    """Batches that are scored before the run is interrupted."""
    entries = score_module._entries

    def some(*args):
        for count, entry in enumerate(entries(*args)):
            if count == batches:
                raise KeyboardInterrupt
            yield entry

    monkeypatch.setattr(score_module, "_entries", some)


def test_another_run_s_output_is_kept(options, tmp_path, monkeypatch):
    assert score_file(options())["precision"] == "float32"
    out = tmp_path / "o.jsonl"
    before = {p.name: p.read_bytes() for p in tmp_path.glob("o.jsonl*")}
    other = write_jsonl(tmp_path / "q.jsonl", ROWS[1:])
    with monkeypatch.context() as patch:
        no_models(patch)
        for changes, message in (*OTHERS.values(), ({"layers": True}, "layers False, not True")):
            changes = {k: other if v is None else v for k, v in changes.items()}
            with pytest.raises(
                InputError, match=f"{out}: holds the results of another .*{message}"
            ):
                score_file(options(**changes))
    with pytest.raises(InputError, match="it has other weights, tokens or precision, or is of an"):
        score_file(options(tuned=options().base))
    settings = json.loads((tmp_path / "o.jsonl.meta.json").read_text())["settings"]
    assert settings["precision"] == "float32"
    with pytest.raises(InputError, match="weights are stored in float32, and --precision bf"):
        score_file(options(precision="bfloat16x2"))
    assert {p.name: p.read_bytes() for p in tmp_path.glob("o.jsonl*")} == before
    # What scores do not depend on may change: they are made again.
    score_file(options(token_budget=64))
    assert [r["id"] for r in read_jsonl(out)] == [r["id"] for r in ROWS]
    out.unlink()
    score_file(options(norm=2))  # what is not there cannot be lost


def test_another_run_s_journal_is_kept_and_its_own_goes_on(options, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            score_file(options())
    journal = tmp_path / "o.jsonl.journal"
    before = journal.read_bytes()
    assert before.count(b"\n") == 4
    other = write_jsonl(tmp_path / "q.jsonl", ROWS[1:])
    with monkeypatch.context() as patch:
        no_models(patch)
        for changes, message in OTHERS.values():
            changes = {k: other if v is None else v for k, v in changes.items()}
            with pytest.raises(InputError, match=f"{journal}: holds the work of .*{message}"):
                score_file(options(**changes))
    with pytest.raises(InputError, match="it has other weights"):
        score_file(options(base=options().tuned))
    assert journal.read_bytes() == before
    meta = score_file(options(layers=True))
    assert meta["resumed_rows"] > 0 and "layers" in read_jsonl(tmp_path / "o.jsonl")[0]
    assert not journal.exists()


def test_two_runs_of_one_output(options, tmp_path, monkeypatch):
    """The second ends before its models are loaded, and the first is not disturbed."""
    load = __import__("tuco_jax.weights.load", fromlist=["load"]).load_pair
    tries = []

    def load_pair(*args, **kwargs):
        with pytest.raises(InputError, match="o.jsonl.journal: another run is writing this outp"):
            score_file(options())
        tries.append(1)
        return load(*args, **kwargs)

    monkeypatch.setattr("tuco_jax.weights.load.load_pair", load_pair)
    score_file(options())
    assert tries == [1] and len(read_jsonl(tmp_path / "o.jsonl")) == len(ROWS)


def test_a_disk_that_fills_up_and_is_emptied(options, pair, tmp_path):
    """In a process that may write few bytes: one line, and the next start goes on."""
    given = options()
    argv = ["score", "--base", pair[0], "--tuned", pair[1], "--prompts", given.prompts]
    argv += ["--out", given.out, "--token_budget", "8"]
    code = f"""
        import resource, sys
        import jax
        jax.config.update("jax_enable_compilation_cache", False)
        from tuco_jax.cli import main
        from common_jax.journal import Journal
        begin = Journal.begin

        def limited(*args):
            begin(*args)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

        Journal.begin = limited
        sys.exit(main({argv!r}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True
    )
    journal = pathlib.Path(f"{given.out}.journal")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"tuco-jax: error: {journal}: cannot be written: File too large")
    assert done.stderr.count("\n") == 1, done.stderr
    assert journal.read_bytes().count(b"\n") > 1 and not pathlib.Path(given.out).exists()
    meta = score_file(given)
    assert 0 < meta["resumed_rows"] < len(ROWS)


def test_a_closed_answer_is_told(options, tmp_path, monkeypatch, capsys):
    prompts = write_jsonl(tmp_path / "t.jsonl", [{"messages": TALK}, {"prompt": "a"}])
    given = options(prompts=prompts)
    note = "1 of 2 prompts end with an assistant's turn, which the chat template closes; continue"
    assert any(n.startswith(note) for n in score_file(given)["notes"])
    tokens = read_jsonl(given.out)[0]["tokens"]
    argv = ["score", "--base", given.base, "--tuned", given.tuned, "--prompts", prompts]
    argv += ["--out", str(tmp_path / "open.jsonl"), "--continue_final"]
    assert run_in_process(monkeypatch, tmp_path / "cache", argv) == 0
    assert "note: 1 of 2" not in capsys.readouterr().out
    assert read_jsonl(tmp_path / "open.jsonl")[0]["tokens"] == tokens - 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts", "absent.jsonl"], "absent.jsonl: the prompts file does not exist"),
        (["--out", "absent/o.jsonl"], "absent does not exist; make it first"),
        (["--base", "/absent/model"], "/absent/model: no such directory, nor is it a hub id"),
        (["--tuned", "absent.gguf"], "absent.gguf: no such file; name a .gguf file that is there"),
    ],
)
def test_input_is_checked_before_models_are_thought_of(options, tmp_path, more, message):
    """A refusal does not wait for what loads models, which takes seconds to import."""
    given = options()
    argv = ["score", "--base", given.base, "--tuned", given.tuned, "--prompts", given.prompts]
    code = f"""
import sys
from tuco_jax.cli import main
code = main({[*argv, "--out", given.out, *more]!r})
print(code, [m for m in ("transformers", "flax", "orbax", "optax") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 []\n" and message in done.stderr and done.stderr.count("\n") == 1
    assert json.loads(pathlib.Path(given.prompts).read_text().splitlines()[0])["id"] == 0
