"""Bad input: exit code 2, one line that names the place and the mend, output untouched."""

import errno
import json
import os
import pathlib
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file, save_file

from tests.tuco.cli_pair import run_in_process, save_pair, start, write_jsonl
from tests.tuco.tiny import save_tiny
from tests.tuco.tiny_tokenizer import bos_tokenizer

GOOD = [{"prompt": "a"}]
BEFORE = '{"id": 1, "tuco": 0.5, "of": "an earlier run"}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def pair(folder):
    return save_pair(folder)


@pytest.fixture
def fails(pair, folder, tmp_path, monkeypatch, capsys):
    """Run `score` with these options changed; check what every failure shares; give its line."""
    out = tmp_path / "out" / "scores.jsonl"
    out.parent.mkdir()
    out.write_text(BEFORE)
    made = out.with_name("scores.jsonl.meta.json")
    made.write_text('{"settings": {}}')  # of an earlier start of whatever is run
    prompts = write_jsonl(tmp_path / "good.jsonl", GOOD)

    def run(*more, command="score", **changes):
        options = {"base": pair[0], "tuned": pair[1], "prompts": prompts, "out": out} | changes
        argv = [command] if command else []
        for name, value in options.items() if command == "score" else ():
            argv += [f"--{name}", str(value)] if value is not None else []
        capsys.readouterr()
        code = run_in_process(monkeypatch, folder / "cache", [*argv, *map(str, more)])
        printed = capsys.readouterr()
        assert code == 2, printed
        assert printed.out == ""
        assert printed.err.startswith("tuco-jax: error: ")
        assert printed.err.count("\n") == 1 and "Traceback" not in printed.err, printed.err
        assert out.read_text() == BEFORE
        assert {p.name for p in out.parent.iterdir()} == {out.name, made.name}
        return printed.err

    return run


def has(line, *parts):
    for part in parts:
        assert str(part) in line, f"{part!r} is not in {line!r}"


ROWS = {
    "not JSON": ('{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: not JSON"),
    "blank line": ('{"prompt": "a"}\n\n{"prompt": "b"}\n', "p.jsonl:2: not JSON"),
    "no object": ('{"prompt": "a"}\n["b"]\n', "p.jsonl:2: a row must be an object"),
    "neither": ('{"id": 3}\n', "p.jsonl:1: the row has neither `prompt` nor `messages`"),
    "both": (
        '{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}\n',
        "p.jsonl:1: the row has both `prompt` and `messages`",
    ),
    "empty prompt": ('{"prompt": "a"}\n{"prompt": "  "}\n', "p.jsonl:2: `prompt` is empty"),
    "prompt of another type": ('{"prompt": 3}\n', "p.jsonl:1: `prompt` must be text, not int"),
    "half a character": ('{"prompt": "a\\ud800"}\n', "p.jsonl:1: `prompt` holds half a surrogate"),
    "doubled id": (
        '{"id": "x", "prompt": "a"}\n{"id": "y", "prompt": "a"}\n{"id": "x", "prompt": "b"}\n',
        "p.jsonl:3: id 'x' is already that of line 1",
    ),
    "doubled default id": (
        '{"id": 2, "prompt": "a"}\n{"prompt": "a"}\n',
        "p.jsonl:2: id 2 is already that of line 1",
    ),
    "id of another type": ('{"prompt": "a", "id": [1]}\n', "p.jsonl:1: `id` must be"),
    "label of another type": ('{"prompt": "a", "label": {}}\n', "p.jsonl:1: `label` must be"),
    "label of half a character": (
        '{"prompt": "a", "label": "\\ud800"}\n',
        "p.jsonl:1: `label` holds half a surrogate",
    ),
    "label not finite": ('{"prompt": "a", "label": NaN}\n', "p.jsonl:1: `label` must be"),
    "labels of two kinds": (
        '{"prompt": "a", "label": "x"}\n{"prompt": "a", "label": 1}\n',
        "p.jsonl:2: `label` is a number where an earlier one is a text",
    ),
    "empty file": ("", "p.jsonl: holds no prompts"),
    "blank file": ("\n\n", "p.jsonl: holds no prompts"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(fails, tmp_path, case):
    text, message = ROWS[case]
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    has(fails(prompts=path), message)


MESSAGES = {
    "not a list": ("hi", "`messages` is text that is not JSON"),
    "empty": ([], "`messages` must be a list"),
    "an object": ({"role": "user"}, "`messages` must be a list"),
    "a text in the list": (["hi"], "`messages[0]` must be an object"),
    "unknown role": (
        [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}],
        "`messages[1].role` is 'robot'; roles are system, developer, user, assistant, tool",
    ),
    "no role": ([{"content": "a"}], "`messages[0].role` is None"),
    "no content": ([{"role": "user"}], "`messages[0].content` must be text"),
    "blank content": ([{"role": "user", "content": " "}], "`messages[0].content` is empty"),
    "content in parts": (
        [{"role": "user", "content": [{"type": "image", "url": "a"}]}],
        "`messages[0].content[0]` is a part of type 'image'; parts are",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(fails, tmp_path, case):
    messages, message = MESSAGES[case]
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"messages": messages}])
    has(fails(prompts=path), "p.jsonl:2: ", message)


FILES = {
    "not UTF-8": ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', ["p.jsonl:2: byte 28 "]),
    "text not UTF-8": ("p.txt", b"a\nb\nc\xe9\n", ["p.txt:3: byte 5 ", "UTF-8"]),
    "blank line of text": ("p.txt", b"a\n \nc\n", ["p.txt:2: `prompt` is empty"]),
    "ending": ("p.json", b"[]", ["p.json: prompts come as .jsonl, .csv, .parquet, .txt"]),
    "csv without the column": (
        "p.csv",
        b"id,text\n1,a\n",
        ["p.csv: no column 'prompt' or 'messages' (columns: 'id', 'text')"],
    ),
    "csv, ragged": ("p.csv", b"id,prompt\n1,a\n2,b,c\n", ["p.csv:3: 3 fields where the header"]),
    "csv, quote": ("p.csv", b'prompt\n"a" b\n', ["p.csv:2: not CSV"]),
    "csv, empty prompt": ("p.csv", b"id,prompt\n1,a\n2,\n", ["p.csv:3: the row has neither"]),
    "csv of a header": ("p.csv", b"prompt\n", ["p.csv: holds no prompts"]),
    "csv, doubled id": ("p.csv", b"id,prompt\n1,a\n1,b\n", ["p.csv:3: id '1' is already that"]),
    "parquet, broken": ("p.parquet", b"PAR1 no more", ["p.parquet: not a readable Parquet file"]),
}


@pytest.mark.parametrize("case", FILES)
def test_files(fails, tmp_path, case):
    name, data, parts = FILES[case]
    (tmp_path / name).write_bytes(data)
    has(fails(prompts=tmp_path / name), *parts)


def test_parquet_cut_short_or_without_the_column(fails, tmp_path):
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    has(fails(prompts=path), "p.parquet: no column 'prompt' or 'messages'")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    has(fails(prompts=path), "p.parquet: not a readable Parquet file")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", None]}), path)
    has(fails(prompts=path), "p.parquet:2: the row has neither")


def test_prompts_missing_or_a_folder(fails, tmp_path):
    has(fails(prompts=tmp_path / "no.jsonl"), "no.jsonl: the prompts file does not exist")
    (tmp_path / "d.jsonl").mkdir()
    has(fails(prompts=tmp_path / "d.jsonl"), "is a folder, not a file")


def test_prompt_beyond_the_context(fails, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"id": "long", "prompt": "b" * 64}])
    line = fails(prompts=path)
    has(line, "prompt 'long' (line 2): 65 tokens", "context holds 64", "--truncate")


def test_output_that_cannot_be_written(fails, tmp_path):
    has(fails(out=tmp_path / "no" / "o.csv"), "o.csv: the folder", "does not exist; make it first")
    has(fails(out=tmp_path / "o.txt"), "o.txt: output comes as .jsonl, .csv, .parquet")
    (tmp_path / "d.csv").mkdir()
    has(fails(out=tmp_path / "d.csv"), "d.csv: is a folder")
    has(fails(out="/proc/o.csv"), "/proc/o.csv: cannot write into /proc: ")


def test_output_is_looked_at_before_anything_else(fails, tmp_path):
    line = fails(base="no/model", prompts="no.jsonl", out=tmp_path / "no" / "o.csv")
    has(line, "does not exist; make it first")


def test_output_over_the_prompts(fails, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", GOOD)
    has(fails(prompts=path, out=path), "is the prompts file itself")
    assert pathlib.Path(path).read_text() == json.dumps(GOOD[0]) + "\n"


OPTIONS = {
    "unknown option": (["--lables"], ["unknown option --lables; did you mean --layers?"]),
    "unknown nested option": (["--mesh.dta=2"], ["--mesh.dta=2; did you mean --mesh.data?"]),
    "option of another command": (
        ["--batch_size", "4"],
        ["unknown option --batch_size; did you mean --token_budget?"],
    ),
    "abbreviation": (["--trunc"], ["unknown option --trunc; did you mean --truncate?"]),
    "dtype": (["--dtype", "float3"], ["--dtype", "'float32', 'bfloat16', 'float16'", "float3"]),
    "precision": (["--precision", "tf32"], ["--precision", "'bfloat16x3', 'bfloat16x2'", "tf32"]),
    "precision of float16": (
        ["--precision", "bfloat16x2", "--dtype", "float16"],
        ["--precision bfloat16x2", "--dtype float16", "give --dtype bfloat16, or"],
    ),
    "norm": (["--norm", "3"], ["--norm", "3"]),
    "no number": (["--token_budget", "many"], ["--token_budget must be 1 or more, not many"]),
    "no value": (["--dtype"], ["--dtype", "expected one argument"]),
    "stray word": (["extra"], ["unrecognized arguments: extra"]),
    "budget": (["--token_budget", "0"], ["--token_budget must be 1 or more, not 0"]),
    "too many devices": (["--mesh.data", "512"], ["wants 512 devices", "choose smaller sizes"]),
    "no devices": (["--mesh.tensor", "0"], ["--mesh.tensor must be 1 or more, or -1 for all"]),
    "pmap over tensor": (["--mesh.tensor=2", "--parallel=pmap"], ["pmap is for data alone"]),
    "stream over a mesh": (["--stream", "--mesh.data=2"], ["streams runs on one device", "mesh"]),
    "stream with pmap": (["--stream", "--parallel=pmap"], ["streams runs on one device"]),
    "less than no memory": (
        ["--stream", "--passes.memory=-1"],
        ["--passes.memory must be 0 or more"],
    ),
    "no folder": (["--stream", "--passes.folder=absent"], ["passes.folder: absent: no such"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(fails, case):
    more, parts = OPTIONS[case]
    has(fails(*more), *parts)


def test_options_missing(fails):
    has(fails(out=None, tuned=None), "missing --tuned, --out", "tuco-jax score --help")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["scroe"], "unknown command scroe; did you mean score?"),
        ([], "is missing (commands: score, generate, import, finetune, plan, demo, study)"),
        (["import", "--modle=x"], "unknown option --modle=x; did you mean --model?"),
        (["demo", "--scale", "1"], "unknown option --scale; the options are --config, --out, --"),
        (["generate", "--data=2"], "unknown option --data=2; did you mean --mesh.data?"),
    ],
)
def test_commands(fails, argv, part):
    has(fails(*argv, command=None), part)


CONFIGS = {
    "unknown key": ("lables: true\n", ["c.yaml: unknown key 'lables'; did you mean layers?"]),
    "unknown nested key": ("mesh:\n  dta: 1\n", ["c.yaml: unknown key 'mesh.dta'; did you mean"]),
    "a group as a number": (
        "mesh: 2\n",
        ["c.yaml: mesh is a group of options, not 2; write each on a line below it, such as"],
    ),
    "a group as nothing": ("mesh:\n", ["c.yaml: mesh is a group of options, not None"]),
    "not YAML": ("base: [x\n", ["c.yaml: not YAML"]),
    "not a mapping": ("- base\n", ["c.yaml: a config is a mapping of options"]),
    "value": ("norm: 7\n", ["norm", "7"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(fails, tmp_path, case):
    text, parts = CONFIGS[case]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    has(fails("--config", path), *parts)


def test_config_missing(fails, tmp_path):
    has(
        fails("--config", tmp_path / "no.yaml"), "no.yaml: the config cannot be read: No such file"
    )


# Whole, or a layer at a time: the same flaws of weights.
WAYS = ((), ("--stream",))


@pytest.fixture
def copy(pair, tmp_path):
    """A copy of the tuned model that may be spoilt."""
    return pathlib.Path(shutil.copytree(pair[1], tmp_path / "copy"))


@pytest.mark.parametrize("more", WAYS)
@pytest.mark.parametrize("share", [0.7, 0.001])
def test_weights_cut_short(fails, copy, share, more):
    path = copy / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    has(fails(*more, tuned=copy), "model.safetensors")


def test_weights_corrupt(fails, copy):
    path = copy / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])
    has(fails(tuned=copy), "model.safetensors")


@pytest.mark.parametrize("more", WAYS)
def test_weights_not_finite(fails, copy, more):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, path, metadata={"format": "pt"})
    has(fails(*more, tuned=copy), "model.layers.1.mlp.up_proj.weight", "NaN")


def test_weights_missing_or_unknown(fails, copy):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    moved = {k.replace("layers.2.mlp", "layers.2.moe"): v for k, v in tensors.items()}
    save_file(moved, path, metadata={"format": "pt"})
    has(fails(tuned=copy), "model.layers.2.m", "tensor")


def test_family_not_supported(fails, copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (copy / "config.json").write_text(json.dumps(config))
    has(fails(tuned=copy), copy, "mamba")


@pytest.mark.parametrize("field", ["num_attention_heads", "num_hidden_layers", "vocab_size"])
def test_sizes_of_zero(fails, copy, field):
    config = json.loads((copy / "config.json").read_text()) | {field: 0}
    (copy / "config.json").write_text(json.dumps(config))
    has(fails(tuned=copy), copy, "mend")


def test_no_pair(fails, tmp_path):
    save_tiny(tmp_path / "deeper", "llama", num_hidden_layers=4)
    has(fails(tuned=tmp_path / "deeper"), "depth is 4, but 3 in", "not one model before and after")


def test_no_model_there(fails, tmp_path):
    has(fails(base=tmp_path / "nowhere"), tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    has(fails(base=tmp_path / "empty"), tmp_path / "empty")


def test_gguf_corrupt(fails, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(20))
    has(fails(base=path), path)


def test_no_chat_template(fails, copy, tmp_path):
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = None
    for path in copy.glob("*template*"):
        path.unlink()
    tokenizer.save_pretrained(copy)
    talk = {"id": "t", "messages": [{"role": "user", "content": "a"}]}
    path = write_jsonl(tmp_path / "p.jsonl", [*GOOD, talk])
    line = fails(prompts=path, tuned=copy)
    has(line, "prompt 't' (line 2): `messages` need a chat template", "give `prompt` instead")


def test_store_that_exists(fails, pair, tmp_path):
    (tmp_path / "store").mkdir()
    line = fails("--model", pair[0], "--out", tmp_path / "store", command="import")
    has(line, tmp_path / "store", "exists")


@pytest.mark.parametrize("more", WAYS)
def test_not_finite_keeps_the_output(fails, copy, more):
    """Finite weights may overflow: found with the scores, and the output is still untouched."""
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"][:] = 3e38
    save_file(tensors, path, metadata={"format": "pt"})
    has(fails(*more, tuned=copy), "prompt 1 (line 1): its score is not finite", "weights")


def test_a_disk_too_full_for_streams(fails, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    line = fails("--stream", "--passes.memory", 0)
    has(line, "out: residual streams cannot be kept there (No space left on device)", "memory")


@pytest.mark.parametrize("bad", ["prompts", "weights"])
def test_in_a_process_of_its_own(pair, copy, tmp_path, bad):
    prompts = write_jsonl(tmp_path / "p.jsonl", GOOD)
    if bad == "prompts":
        pathlib.Path(prompts).write_text("{\n")
    else:
        (copy / "model.safetensors").write_bytes(b"12345678{}")
    out = tmp_path / "o.csv"
    argv = ["score", "--base", pair[0], "--tuned", str(copy), "--prompts", prompts]
    process = start([*argv, "--out", str(out)], tmp_path / "cache")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and printed == ""
    assert errors.startswith("tuco-jax: error: ") and errors.count("\n") == 1, errors
    assert ("p.jsonl:1: not JSON" if bad == "prompts" else "model.safetensors") in errors
    assert not out.exists()
