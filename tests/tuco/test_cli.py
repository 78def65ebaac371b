"""The command line: files in and out, configs under flags, a kill in the middle, quick answers."""

import csv
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import yaml

import tuco_jax
from common_jax.cli import command_line
from common_jax.cli.commands import Command
from common_jax.errors import InputError
from tests.tuco.cli_pair import ROOT, read_jsonl, run_in_process, save_pair, start, write_jsonl
from tests.tuco.tiny import save_tiny
from tests.tuco.tiny_tokenizer import bos_tokenizer
from tuco_jax import cli
from tuco_jax.commands import score as score_command
from tuco_jax.commands import study as studies
from tuco_jax.scoring.score import score
from tuco_jax.studies import base as studied
from tuco_jax.studies.catalog import STUDIES, load_study

ROWS = [
    {"id": "greeting", "prompt": "Good morning", "label": "plain"},
    {"id": 2, "messages": [{"role": "user", "content": "Why, über-bot?"}], "label": "chat"},
    {"prompt": "x"},
    {"id": "last", "prompt": "Good morning to all of you", "label": "plain"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def pair(folder):
    return save_pair(folder)


@pytest.fixture
def run(monkeypatch, folder):
    return lambda *argv: run_in_process(monkeypatch, folder / "cache", [str(a) for a in argv])


@pytest.fixture
def flags(pair, tmp_path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    return ["score", "--base", pair[0], "--tuned", pair[1], "--prompts", prompts]


def test_rows_in_order_and_metadata_beside(pair, run, flags, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    assert run(*flags, "--out", out, "--layers") == 0
    printed = capsys.readouterr().out
    rows = read_jsonl(out)
    assert [r["id"] for r in rows] == ["greeting", 2, 3, "last"]
    assert [r["label"] for r in rows] == ["plain", "chat", None, "plain"]
    assert list(rows[0]) == ["id", "tuco", "preco", "tokens", "label", "layers"]

    models, tokenizer = tuco_jax.load_pair(*pair)
    expected = score(models, tokenizer, [r.get("prompt") or r["messages"] for r in ROWS])
    for name in ("tuco", "preco", "layers"):
        got = np.array([r[name] for r in rows], np.float32)
        np.testing.assert_array_equal(got, getattr(expected, name))
    assert [r["tokens"] for r in rows] == expected.tokens.tolist()

    meta = json.loads((tmp_path / "scores.jsonl.meta.json").read_text())
    assert (meta["base"], meta["tuned"]) == pair
    assert meta["rows"] == 4 and meta["resumed_rows"] == 0 and meta["dtype"] == "float32"
    assert 0 <= meta["telescoping_error"] < 1e-5
    assert meta["notes"] == list(models.notes)
    assert meta["versions"]["jax"] and meta["device"]["platform"] == "cpu"
    parts = ("imports", "prompts", "load", "tokenize", "fingerprint", "compile", "run")
    assert all(meta["seconds"][part] >= 0 for part in parts)
    assert meta["seconds"]["first"] <= meta["seconds"]["total"]
    assert "telescoping error" in printed and "compile" in printed and str(out) in printed
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["prompts.jsonl", "scores.jsonl", "scores.jsonl.meta.json"]


def test_formats_agree(run, flags, tmp_path):
    outs = [tmp_path / f"scores{suffix}" for suffix in (".jsonl", ".csv", ".parquet")]
    for out in outs:
        assert run(*flags, "--out", out, "--layers") == 0
    rows = read_jsonl(outs[0])
    with outs[1].open(newline="") as file:
        table = list(csv.DictReader(file))
    columns = pyarrow.parquet.read_table(outs[2]).to_pydict()
    assert [str(r["id"]) for r in rows] == [r["id"] for r in table] == columns["id"]
    assert [r["label"] or "" for r in rows] == [r["label"] for r in table]
    assert [r["label"] for r in rows] == columns["label"]
    for name in ("tuco", "preco", "tokens"):
        want = np.array([r[name] for r in rows], np.float32)
        np.testing.assert_array_equal(want, np.array([r[name] for r in table], np.float32))
        np.testing.assert_array_equal(want, np.array(columns[name], np.float32))
    want = np.array([r["layers"] for r in rows], np.float32)
    cells = [json.loads(r["layers"]) for r in table]
    np.testing.assert_array_equal(want, np.array(cells, np.float32))
    np.testing.assert_array_equal(want, np.array(columns["layers"], np.float32))


def test_flags_go_on_top_of_the_config_wherever_it_stands(run, flags, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("out: elsewhere.jsonl\nnorm: 2\nlayers: true\nmesh:\n  data: 2\n")
    out = tmp_path / "scores.jsonl"
    assert run(*flags, "--out", out, "--config", config, "--token-budget", "512") == 0
    meta = json.loads((tmp_path / "scores.jsonl.meta.json").read_text())
    assert (meta["norm"], meta["token_budget"]) == (2, 512)
    assert meta["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert "layers" in read_jsonl(out)[0]
    out = tmp_path / "others.jsonl"
    assert run(*flags, f"--config={config}", "--norm=1", f"--out={out}", "--layers", "false") == 0
    assert "layers" not in read_jsonl(out)[0]


def test_devices_and_dtype(run, flags, tmp_path):
    outs = [tmp_path / f"{i}.jsonl" for i in range(4)]
    assert run(*flags, "--out", outs[0]) == 0
    assert run(*flags, "--out", outs[1], "--mesh.data=2", "--parallel=pmap") == 0
    meta = json.loads(outs[1].with_name("1.jsonl.meta.json").read_text())
    assert meta["mesh"]["data"] == 2
    assert run(*flags, "--out", outs[2], "--parallel=pmap") == 0  # one device, as the mesh says
    meta = json.loads(outs[2].with_name("2.jsonl.meta.json").read_text())
    assert meta["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert run(*flags, "--out", outs[3], "--dtype", "bfloat16") == 0
    plain, pmapped, _, half = ([r["tuco"] for r in read_jsonl(out)] for out in outs)
    np.testing.assert_allclose(plain, pmapped, rtol=0, atol=1e-5)
    assert 1e-5 < np.abs(np.subtract(plain, half)).max() < 0.05


@pytest.fixture(scope="module")
def divisible(folder):
    """A pair on disk, all sizes of which divide by 8: no layout leaves a weight whole."""
    sizes: Any = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    for seed, name in enumerate(("base", "tuned")):
        to = folder / f"divisible_{name}"
        save_tiny(to, "llama", seed, max_shard_size="20KB", **sizes)
        bos_tokenizer().save_pretrained(to)
    return ["--base", folder / "divisible_base", "--tuned", folder / "divisible_tuned"]


@pytest.mark.slow
def test_layouts_score_as_one_device_does(run, flags, divisible, tmp_path):
    """Weights go from safetensors straight to their shards."""
    given = [flags[0], *divisible, *flags[5:], "--layers", "true"]
    alone = tmp_path / "alone.jsonl"
    assert run(*given, "--out", alone) == 0
    want = read_jsonl(alone)
    for layout in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)):
        out = tmp_path / f"{layout}.jsonl"
        axes = zip(("data", "fsdp", "tensor"), layout, strict=True)
        assert run(*given, "--out", out, *(f"--mesh.{a}={n}" for a, n in axes)) == 0
        for got, row in zip(read_jsonl(out), want, strict=True):
            assert (got["id"], got["tokens"]) == (row["id"], row["tokens"])
            np.testing.assert_allclose(got["tuco"], row["tuco"], rtol=0, atol=1e-5)
            np.testing.assert_allclose(got["layers"], row["layers"], rtol=0, atol=1e-5)


def test_stream(run, flags, tmp_path):
    """Layers one after another, streams on disk, many passes: the same scores, nothing left."""
    outs = [tmp_path / "whole.jsonl", tmp_path / "streamed.jsonl"]
    assert run(*flags, "--out", outs[0], "--layers") == 0
    passes = ["--passes.memory", 0, "--passes.tokens", 30, "--token_budget", 30]
    assert run(*flags, "--out", outs[1], "--layers", "--stream", *passes) == 0
    for one, other in zip(*map(read_jsonl, outs), strict=True):
        assert (one["id"], one["tokens"]) == (other["id"], other["tokens"])
        np.testing.assert_allclose(one["layers"], other["layers"], rtol=0, atol=1e-5)
    meta = json.loads((tmp_path / "streamed.jsonl.meta.json").read_text())
    assert meta["stream"] == {"memory": 0.0, "tokens": 30, "folder": str(tmp_path)}
    assert len(list(tmp_path.iterdir())) == 5


def test_truncate(run, pair, tmp_path):
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a" * 90}, {"prompt": "a" * 64}])
    out = tmp_path / "scores.csv"
    argv = ["score", "--base", pair[0], "--tuned", pair[1], "--prompts", prompts, "--out", out]
    assert run(*argv, "--truncate") == 0
    with out.open() as file:
        first, second = csv.DictReader(file)
    assert first["tokens"] == "64" and first["tuco"] == second["tuco"]
    assert json.loads((tmp_path / "scores.csv.meta.json").read_text())["truncated_ids"] == [1, 2]


@pytest.mark.parametrize(
    "mesh", [[], ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]]
)
@pytest.mark.parametrize("tuned", [False, True])
def test_import_makes_a_store_that_scores_alike(run, pair, flags, tmp_path, tuned, mesh):
    store, outs = tmp_path / "store", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    more = [*(["--tuned", pair[1]] if tuned else []), *mesh]
    assert run("import", "--model", pair[0], *more, "--out", store) == 0
    assert run(*flags, "--out", outs[0]) == 0
    again = ["--base", store, *(["--tuned", store] if tuned else [])]
    assert run(*flags, *again, "--out", outs[1]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.ocdbt", "_METADATA"])
def test_a_spoilt_store_is_one_line_and_no_more(run, pair, tmp_path, name):
    """In a process of its own: what threads write to stderr counts, too."""
    assert run("import", "--model", pair[0], "--out", tmp_path / "store") == 0
    path = tmp_path / "store" / "params" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    argv = ["score", "--base", str(tmp_path / "store"), "--tuned", pair[1], "--prompts", prompts]
    process = start([*argv, "--out", str(tmp_path / "out.jsonl")], tmp_path / "cache")
    _, error = process.communicate(timeout=300)
    error = error if isinstance(error, str) else error.decode()
    assert process.returncode == 2
    assert re.fullmatch(
        r"tuco-jax: error: .*params: incomplete or corrupt .*; import it.*\n", error
    )


def test_generate_takes_a_store(run, pair, tmp_path, capsys):
    store = tmp_path / "store"
    assert run("import", "--model", pair[0], "--tuned", pair[1], "--out", store) == 0
    notes = [f"note: {note}" for note in tuco_jax.load_pair(*pair)[0].notes]
    assert notes and all(note in capsys.readouterr().out for note in notes[:1])
    texts = []
    for models in (pair, (store, store)):
        options = ["--prompt", "tea", "--max_new_tokens", 4, "--alpha", 0.5]
        assert run("generate", "--base", models[0], "--tuned", models[1], *options) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


@pytest.mark.slow
def test_killed_and_started_again(pair, tmp_path):
    """SIGKILL in the middle: nothing at OUT; the second start goes on and gives the same file."""
    rows = [{"id": f"p{i}", "prompt": f"{i:05d}"} for i in range(2500)]
    prompts = write_jsonl(tmp_path / "p.jsonl", rows)
    cache, out, whole = tmp_path / "cache", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    argv = ["score", "--base", pair[0], "--tuned", pair[1], "--prompts", prompts]
    argv += ["--token_budget", "1", "--layers", "--out"]

    process = start([*argv, str(whole)], cache)
    assert process.wait(timeout=300) == 0, process.communicate()
    programs = sorted(p.name for p in cache.iterdir() if p.name.endswith("-cache"))
    assert programs

    process = start([*argv, str(out)], cache)
    journal = tmp_path / "out.jsonl.journal"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 200:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert journal.exists() and not out.exists()

    process = start([*argv, str(out)], cache)
    assert process.wait(timeout=300) == 0, process.communicate()
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert 199 <= meta["resumed_rows"] < 2500
    assert out.read_bytes() == whole.read_bytes()
    assert not journal.exists()
    assert sorted(p.name for p in cache.iterdir() if p.name.endswith("-cache")) == programs


def test_progress_only_on_a_terminal(run, flags, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert run(*flags, "--out", tmp_path / "o.jsonl") == 0
        total = sum(r["tokens"] for r in read_jsonl(tmp_path / "o.jsonl"))
        assert (f"{total}/{total} tokens" in stream.getvalue()) == shown
        assert bool(re.search(r"\d tokens/s", stream.getvalue())) == shown
        assert bool(re.search(r"\d:\d\d:\d\d", stream.getvalue())) == shown  # time left
        assert shown or not stream.getvalue()


def test_help_and_option_errors_load_no_jax():
    code = """
import sys
from tuco_jax.cli import main
codes = [main(a.split()) for a in ("--help", "--version", "score --help", "import --help")]
codes += [main(a.split()) for a in ("generate --help", "study --help", "study floats")]
codes += [main(a.split()) for a in ("scroe", "score --lables", "score --dtype f33", "")]
print(codes, [m for m in ("jax", "transformers", "numpy") if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2] []"
    for text in ("usage: tuco-jax COMMAND", "score a file", "--token_budget", "--mesh.fsdp"):
        assert text in done.stdout
    assert [line.startswith("tuco-jax: error: ") for line in done.stderr.splitlines()] == [
        True
    ] * 5


@pytest.mark.parametrize("command", ["finetune", "demo"])
def test_other_commands_are_wired(run, command, capsys):
    assert run(command, "--help") == 0
    assert "--config" in capsys.readouterr().out
    assert run(command, "--nothing-such") == 2
    options, function = cli.COMMANDS[command].load()
    assert options.__name__.endswith("Config") and callable(function)


@pytest.mark.parametrize("command", ["score", "import", "finetune"])
def test_a_command_without_options_names_one_that_it_needs(run, command, capsys):
    assert run(command) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"tuco-jax: error: .*--\w+.*\n", error), error


def test_the_demo_needs_no_options(run, monkeypatch):
    seen = []
    monkeypatch.setattr("tuco_jax.commands.demo.run", lambda options: seen.append(options))
    assert run("demo") == 0
    assert seen[0].prompts == 32


CONFIGS = sorted((ROOT / "configs" / "tuco").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_says_what_it_is(path):
    header = path.read_text("utf-8").partition("\n\n")[0]
    for part in ("command", "hardware", "run time", "expected"):
        assert re.search(rf"# {part}:[ ]+[^ \n]", header, re.IGNORECASE), part


# What a header's command leaves to another program: `make gemma-pair` runs `tuco-jax finetune`.
RUN_BY_MAKE = {"make gemma-pair": "tuco-jax finetune --config configs/tuco/{}.yaml"}


def config_commands(path):
    """The command lines of a header that name this file: what follows `tuco-jax`, as words."""
    header = path.read_text("utf-8").partition("\n\n")[0]
    for target, line in RUN_BY_MAKE.items():
        if re.search(rf"# command:[ ]+{target}\b", header):
            makefile = (ROOT / "Makefile").read_text("utf-8")
            assert line.format(path.stem) in makefile
            header = line.format(path.stem)
    found = re.findall(rf"tuco-jax (.*--config configs/tuco/{path.stem}\.yaml.*)", header)
    return [shlex.split(re.sub(r" {2,}\(.*", "", line)) for line in found]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_read_by_the_command_of_its_header(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = config_commands(path)
    assert commands
    for name, *argv in commands:
        command = cli.COMMANDS[name]
        if name == "study":
            command = studies.COMMANDS[argv.pop(0)]
        assert isinstance(command, Command)
        options = command_line.parse(f"tuco-jax {name}", "", command.load()[0], argv)
        given = yaml.safe_load(path.read_text("utf-8"))
        for key in given.keys() & {"dtype", "seed", "steps", "alpha", "count", "maps"}:
            assert getattr(options, key) == given[key], key


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_a_config_that_it_reads(name):
    options_class, function = studies.COMMANDS[name].load()
    path = ROOT / "configs" / "tuco" / f"study_{name.replace('-', '_')}.yaml"
    needed = ["--data", "d"] if name == "alpha-mwe" else []
    argv = ["--config", str(path), "--seed", "7", "--mesh.fsdp", "2", *needed]
    options = command_line.parse(f"tuco-jax study {name}", "", options_class, argv)
    assert options.seed == 7 and str(options.out).startswith("runs/") and callable(function)
    # What a report says repeats the run does.
    command = shlex.split(studied.command(load_study(name).name, options))
    assert command[:3] == ["tuco-jax", "study", name]
    again = command_line.parse("", "", options_class, [*command[3:], "--out", str(options.out)])
    assert again == options


BAD_STUDIES = {
    "alpha-mmlu": (["--data", "rows.jsonl"], "rows.jsonl:1: no `question`, `choices`, `answer`"),
    "alpha-mwe": (["--data", "rows.jsonl"], "rows.jsonl:1: no `question`, `answer_matching"),
    "web-chat": (["--chat", "rows.jsonl"], "rows.jsonl:1: the row has neither `prompt` nor"),
    "gcg": (["--prompts", "rows.jsonl"], "rows.jsonl:1: the row has neither `prompt` nor"),
    "conjugate": (["--data", "absent"], "absent: is no folder"),
    "many-shot": (["--prompts", "rows.jsonl"], "rows.jsonl:1: the row has neither `prompt` nor"),
    "broken": (["--harmful", "rows.jsonl"], "rows.jsonl:1: the row has neither `prompt` nor"),
    "output-co": (["--prompts", "absent.txt"], "absent.txt: the prompts file does not exist"),
    "floors": (["--prompts", "0"], "prompts"),
}


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("seed", ["-1", "99999999999999999999"])
def test_a_seed_that_is_none_is_one_line_for_every_study(run, name, seed, tmp_path, capsys):
    data = ["--data", "d"] if name == "alpha-mwe" else []
    assert run("study", name, *data, "--seed", seed, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    line = f"option --seed must be 0 to 4294967295, not {seed} (see tuco-jax study {name} --help)"
    assert error == f"tuco-jax: error: {line}\n"
    options, _ = studies.COMMANDS[name].load()
    needed = {"data": tmp_path} if name == "alpha-mwe" else {}
    with pytest.raises(InputError, match="seed must be 0 to 4294967295, not"):
        options(out=tmp_path / "out", seed=int(seed), **needed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", STUDIES)
def test_bad_input_of_a_study_is_one_line(run, name, tmp_path, monkeypatch, capsys):
    """Before a model is loaded, and with nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"words": "a"}\n')
    flags, message = BAD_STUDIES[name]
    assert run("study", name, *flags, "--out", tmp_path / "out") == 2
    out, error = capsys.readouterr()
    # A data set of the study's own may be fetched before the file is read: that is told as well.
    assert re.fullmatch(r"(Fetching .*\n)*tuco-jax.*: error: .*\n", error) and not out
    assert message in error
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    assert run("study", name, "--out", tmp_path / "out", "--nothing-such", "1") == 2


def test_a_study_from_the_command_line(run, pair, tmp_path):
    folder = tmp_path / "languages"
    folder.mkdir()
    for name in ("English", "sw"):
        (folder / f"{name}.jsonl").write_text('{"prompt": "a b"}\n{"prompt": "c d"}\n')
    flags = ["--data", folder, "--chat", "false", "--base", pair[0], "--tuned", pair[1]]
    assert run("study", "conjugate", *flags, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert set(found["tuco"]) == {"English", "Swahili"}


def test_the_shipped_config_is_read():
    path = ROOT / "configs" / "tuco" / "score.yaml"
    argv = ["--config", str(path), "--prompts", "p.txt", "--out", "o.csv"]
    options = command_line.parse("tuco-jax score", "", score_command.Config, argv)
    given = dict(base=options.base, tuned=options.tuned, prompts="p.txt", out="o.csv")
    assert options == score_command.Config(**given)
    assert options.base.startswith("meta-llama/")


def test_interrupt_is_clean(run, flags, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tuco_jax.scoring.score.score_tokens", interrupt)
    assert run(*flags, "--out", tmp_path / "o.jsonl") == 130
    assert capsys.readouterr().err == "tuco-jax: interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--out", tmp_path / "o.jsonl", "--debug")
