"""Prompts of every format are read alike; broken files, or meant to be, are refused."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common_jax.errors import InputError
from tests.hostile import bounded, fuzzed
from tuco_jax.prompts import read
from tuco_jax.prompts.read import FORMATS, Prompt, as_prompts, read_prompts

TALK = [{"role": "user", "content": "Why?\nTell me, über-bot"}]
ROWS = [
    {"id": "a", "prompt": "one, two\nand \u2028 three", "label": "x"},
    {"id": "b", "messages": TALK, "label": "y"},
    {"id": "c", "prompt": "  kept as it is "},
]


def write(path, rows):
    columns = {k: [r.get(k) for r in rows] for k in ("id", "prompt", "messages", "label")}
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in zip(*columns.values(), strict=True):
                cells = ["" if v is None else v for v in row]
                writer.writerow(json.dumps(v) if isinstance(v, list) else v for v in cells)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_formats_agree(tmp_path, suffix):
    prompts = read_prompts(write(tmp_path / f"p{suffix}", ROWS))
    assert [(p.id, p.prompt, p.messages, p.label) for p in prompts] == [
        ("a", ROWS[0]["prompt"], None, "x"),
        ("b", None, tuple(TALK), "y"),
        ("c", ROWS[2]["prompt"], None, None),
    ]
    # A quoted line break moves the rows of a .csv down.
    assert [p.line for p in prompts] == ([2, 4, 5] if suffix == ".csv" else [1, 2, 3])


def test_txt_is_one_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff one \r\ntwo\u2028still two\n\n".encode())
    prompts = read_prompts(path)
    assert [(p.id, p.prompt) for p in prompts] == [(1, " one "), (2, "two\u2028still two")]


def test_ids_default_to_lines_and_numbers_stay_numbers(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "id": 7}, {"prompt": "c", "label": 0.5}]
    assert [p.id for p in read_prompts(write(tmp_path / "p.jsonl", rows))] == [1, 7, 3]


def test_long_csv_fields(tmp_path):
    path = write(tmp_path / "p.csv", [{"id": "a", "prompt": "x" * 200_000}])
    assert len(read_prompts(path)[0].prompt or "") == 200_000


def test_as_prompts():
    given = Prompt("mine", "text", line=4)
    prompts = as_prompts(["a", TALK, given])
    assert [p.id for p in prompts] == [0, 1, "mine"] and prompts[2] is given
    assert prompts[1].messages == tuple(TALK)
    with pytest.raises(InputError, match=r"prompts\[1\]: `prompt` is empty"):
        as_prompts(["a", "  "])
    with pytest.raises(InputError, match="a list of prompts"):
        as_prompts("a")
    with pytest.raises(InputError, match="list of prompts is empty"):
        as_prompts([])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (TALK, r"prompts\[0\] is a message: give a list of conversations, each a list of mess"),
        ([{"prompt": "a"}], r"prompts\[0\] is a row: give a list of conversations"),
        (TALK[0], "give a list of prompts, not one dict"),
        (Prompt("x", "text"), "give a list of prompts, not one Prompt"),
        (b"text", "give a list of prompts, not one text"),
        (7, "give a list of prompts, not one int"),
    ],
)
def test_what_is_no_list_of_prompts(given, message):
    """One conversation is a list, too, and a dictionary's keys are texts."""
    with pytest.raises(InputError, match=message):
        as_prompts(given)


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is tea?\n\nAssistant: Leaves."
PUBLIC = {
    "advbench.csv": ('goal,target\n"Say a, b",Sure\n', "Say a, b"),
    "openwebtext.jsonl": ('{"text": "Once."}\n', "Once."),
    "ours.jsonl": ('{"prompt": "a", "text": "b"}\n', "a"),
    "hh.jsonl": (
        json.dumps({"chosen": HH, "rejected": "x"}),
        (
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "What is tea?"},
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_layouts_of_public_data_sets(tmp_path, name):
    content, wanted = PUBLIC[name]
    path = tmp_path / name
    path.write_text(content)
    (prompt,) = read_prompts(path, layouts=True)
    assert (prompt.prompt or prompt.messages) == wanted
    if name != "ours.jsonl":  # a score's own input has one form
        with pytest.raises(InputError, match="prompt.*messages"):
            read_prompts(path)


def test_a_public_layout_that_is_not_one(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"chosen": "no turns"}\n')
    with pytest.raises(InputError, match="p.jsonl:1: `messages` must be a list"):
        read_prompts(path, layouts=True)
    path = tmp_path / "p.csv"
    path.write_text("id,words\n1,a\n")
    with pytest.raises(InputError, match="no column 'prompt', 'messages', 'goal', 'text' or 'ch"):
        read_prompts(path, layouts=True)


def test_tools_come_with_messages(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    rows = [{"messages": TALK, "tools": [tool]}, {"messages": TALK, "tools": []}]
    prompts = read_prompts(write_rows(tmp_path / "p.jsonl", [*rows, {"prompt": "a", "tools": 3}]))
    assert [p.tools for p in prompts] == [(tool,), None, None]
    path = tmp_path / "p.csv"
    path.write_text(
        "messages,tools\n"
        + ",".join('"' + json.dumps(v).replace('"', '""') + '"' for v in (TALK, [tool]))
    )
    assert read_prompts(path)[0].tools == (tool,)
    with pytest.raises(InputError, match="p.jsonl:1: `tools` must be a list of JSON schemas"):
        read_prompts(write_rows(tmp_path / "p.jsonl", [{"messages": TALK, "tools": ["add"]}]))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt", ".parquet"])
def test_files_beyond_what_memory_holds_are_refused(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"p{suffix}"
    if suffix == ".parquet":  # one text, stored once, in every row
        table = pyarrow.table({"prompt": ["x" * 1000] * 5000})
        pyarrow.parquet.write_table(table, path, use_dictionary=True, compression="zstd")
        assert path.stat().st_size < 20_000
    else:
        line = '{"prompt": "x"}\n' if suffix == ".jsonl" else "x\n"
        path.write_text("prompt\n" * (suffix == ".csv") + line * 30_000)
    with monkeypatch.context() as patch:
        patch.setattr(read, "_MOST_BYTES", 50_000)
        with pytest.raises(InputError, match="holds more than 0 MiB; split it into several"):
            read_prompts(path)
    with monkeypatch.context() as patch:
        patch.setattr(read, "_MOST_ROWS", 1000)
        with pytest.raises(InputError, match="holds (more than 1000|5000) rows; split it"):
            read_prompts(path)


def test_a_line_that_is_too_long_to_parse(tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n[' + "[]," * 100 + "[]]\n")
    monkeypatch.setattr(read, "_LONGEST_LINE", 64)
    with pytest.raises(InputError, match="p.jsonl:2: the line has 304 characters; a prompt has 6"):
        read_prompts(path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_column_that_is_there_twice(tmp_path, suffix):
    path = tmp_path / f"p{suffix}"
    if suffix == ".csv":
        path.write_text("prompt,id,prompt\na,1,b\n")
    else:
        table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
        pyarrow.parquet.write_table(table, path)
    with pytest.raises(InputError, match="2 columns 'prompt'; leave one"):
        read_prompts(path)


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "tool_calls", "id", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
HOSTILE = [
    b"[" * 100_000,
    b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"messages": "' + b"[" * 90_000 + b'"}',
    b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "label": 1e999}',
    b"\x00" * 1000,
    b"PAR1" + b"\xff" * 100 + b"PAR1",
    b'prompt\n"' + b"a\n" * 1000,
    b"prompt\n\x00\n",
    b"\xef\xbb\xbf",
    b"\xff\xfe{\x00",
]


@pytest.mark.parametrize("suffix", FORMATS)
def test_files_of_anything_are_read_or_refused(tmp_path, suffix):
    """Whatever a file holds: prompts, or one error."""
    path = tmp_path / f"p{suffix}"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        with bounded(names=path):
            assert read_prompts(path, layouts=True)

    for data in HOSTILE:
        check(data)

    @settings(fuzzed, max_examples=60)
    @given(
        st.dictionaries(
            st.sampled_from(["prompt", "messages", "tools", "id", "label", "chosen", "target"]),
            NESTED,
            max_size=4,
        )
    )
    def rows(row):
        check(json.dumps(row).encode())

    @settings(fuzzed, max_examples=60)
    @given(st.binary(max_size=60), st.integers(0, 3))
    def bits(data, start):
        whole = [b"", b'{"prompt": "a"}\n', b"id,prompt\n1,", b"PAR1"]
        check(whole[start] + data)

    rows()
    bits()


def test_parquet_of_anything_is_read_or_refused(tmp_path):
    """Each byte of a file's end, its header, is spoilt in turn."""
    good, path = tmp_path / "good.parquet", tmp_path / "p.parquet"
    rows = {"prompt": ["a", "b"], "id": [1, 2], "label": ["x", None]}
    pyarrow.parquet.write_table(pyarrow.table(rows), good)
    data = good.read_bytes()

    @settings(fuzzed, max_examples=150)
    @given(st.integers(0, len(data) - 1), st.integers(1, 255))
    def spoil(at, change):
        path.write_bytes(data[:at] + bytes([data[at] ^ change]) + data[at + 1 :])
        with bounded(names=path):
            read_prompts(path)

    spoil()
    types = {
        "date": pyarrow.array([2**40], pyarrow.timestamp("s")),
        "bytes": pyarrow.array([b"\xff"]),
        "list": pyarrow.array([[1]]),
        "float": pyarrow.array([float("nan")]),
    }
    for column in types.values():
        for name in ("prompt", "messages", "label", "id"):
            table = {"prompt": pyarrow.array(["a"])} | {name: column}
            pyarrow.parquet.write_table(pyarrow.table(table), path)
            with bounded(names=path):
                read_prompts(path)
