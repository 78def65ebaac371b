import contextlib
import json
import pathlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from common_jax import distributed
from common_jax.errors import InputError
from common_jax.io.files import (
    atomic,
    check_writable,
    make_folder,
    parse_json,
    read_arrays,
    read_json,
    write_arrays,
    write_json,
    writing,
)
from tests.hostile import bounded, fuzzed
from tuco_jax.scoring.output import write_table


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"ä": [1, 2.5]})
    assert json.loads(path.read_text("utf-8")) == {"ä": [1, 2.5]}

    def fail(temporary):
        temporary.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        atomic(path, fail)
    assert json.loads(path.read_text("utf-8")) == {"ä": [1, 2.5]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


class Second:
    """Process 1 of two: what process 0 does alone is done."""

    index, alone = 1, False

    def by_first(self, act):
        del act


def test_other_processes_write_nothing_anywhere(tmp_path, monkeypatch):
    """Where files go for a while there may be no room for a table."""
    opened = []
    monkeypatch.setattr(distributed, "_world", Second())
    monkeypatch.setattr(pathlib.Path, "open", lambda path, *_, **__: opened.append(path))
    for name in ("a.jsonl", "a.csv"):
        write_table(tmp_path / name, {"id": [1, 2], "tuco": np.zeros(2, np.float32)})
    write_arrays(tmp_path / "a.npz", x=np.zeros(3))
    write_json(tmp_path / "a.json", [1])
    assert not opened


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "none" / "a.json"
    with pytest.raises(InputError, match=f"{path}: cannot be written: No such file"):
        write_json(path, 1)


def test_writable_is_tried_and_nothing_is_left(tmp_path):
    formats = (".png", ".html")
    assert check_writable(str(tmp_path / "a.png"), formats) == tmp_path / "a.png"
    assert not list(tmp_path.iterdir())
    (tmp_path / "b.png").mkdir()
    for name, message in {
        "a.gif": r"output comes as \.png, \.html, not '\.gif'",
        "b.png": "is a folder; name a file",
        "none/a.png": "the folder .*/none does not exist; make it first",
    }.items():
        with pytest.raises(InputError, match=f"{tmp_path / name}: {message}"):
            check_writable(tmp_path / name, formats)


def test_a_folder_is_made_with_its_parents_or_refused(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/c: no folder that can be written to .*another"):
        make_folder(tmp_path / "file" / "c")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": [{"b": 1}', "is damaged or cut short"),
        (b"\xff", "is damaged or cut short"),
        ("[]", "is damaged, it has no mapping"),
        ('{"c": 1}', "is damaged, it has no a"),
        ('{"a": {}, "c": 1}', "is damaged, it has no list a"),
        ('{"a": [{"b": 1}, {}], "c": 1}', r"is damaged, it has no a\[1\].b"),
    ],
)
def test_a_result_is_read_back_or_what_it_lacks_is_named(tmp_path, text, said):
    path, wanted = tmp_path / "a.json", {"a": [{"b": None}], "c": None}
    write_json(path, whole := {"a": [{"b": 1, "d": 2}], "c": []})
    assert read_json(path, wanted) == whole
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f"^{path}: {said}.*; delete it, and it is made again$"):
        read_json(path, wanted)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_json_is_read_as_python_reads_it(value):
    text = json.dumps(value)
    assert json.dumps(parse_json(text)) == text == json.dumps(parse_json(text.encode()))


@settings(fuzzed, max_examples=60)
@given(st.text('[]{}:,"0e1-.nul \\', max_size=60) | st.binary(max_size=40))
def test_anything_is_json_or_a_value_error(text):
    with bounded(), contextlib.suppress(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    "text", ["[" * 10**6, "[" * 300 + "]" * 300, '{"a":' * 300 + "1" + "}" * 300]
)
def test_what_is_nested_too_deeply_is_refused(text, tmp_path):
    with bounded(), pytest.raises(ValueError, match="nested too deeply"):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match="a.json: is damaged or cut short; delete it, and it is"):
        read_json(tmp_path / "a.json", None)


def test_a_file_that_cannot_be_read_is_not_to_be_deleted(tmp_path):
    with pytest.raises(InputError, match="cannot be read .Is a directory.; make it readable") as e:
        read_json(tmp_path, None)
    assert "delete" not in str(e.value)


def test_arrays_are_written_whole_or_not_at_all(tmp_path):
    values = np.arange(6).reshape(2, 3)
    write_arrays(tmp_path / "a.npz", values=values, names=values[0])
    with np.load(tmp_path / "a.npz") as stored:
        np.testing.assert_array_equal(stored["values"], values)
    with pytest.raises(InputError, match="none/a.npz: cannot be written: No such file"):
        write_arrays(tmp_path / "none" / "a.npz", values=values)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_arrays_are_read_back_or_what_is_wrong_is_said(tmp_path):
    path, values = tmp_path / "a.npz", np.random.default_rng(0).normal(size=(40, 3))
    write_arrays(path, values=values, label=np.array("x"))
    found = read_arrays(path, ["values"])
    assert set(found) == {"values", "label"} and (found["values"] == values).all()
    whole = path.read_bytes()
    with pytest.raises(InputError, match=r"a\.npz: is missing or damaged; delete it, and it is"):
        read_arrays(path, ["values", "more"])
    np.save(tmp_path / "b.npy", values)
    changed = bytearray(whole)
    changed[100] ^= 255
    pickled = tmp_path / "p.npz"
    np.savez(pickled, values=np.array([{}], object))
    for content in (
        whole[:-50],
        bytes(changed),
        b"",
        b"no archive",
        (tmp_path / "b.npy").read_bytes(),
        pickled.read_bytes(),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.npz: is missing or damaged; put it back"):
            read_arrays(path, mend="put it back")
    path.unlink()
    with pytest.raises(InputError, match="is missing or damaged"):
        read_arrays(path)


def test_a_full_disk_is_named_with_the_mend():
    with pytest.raises(
        InputError, match="/dev/full: cannot be written: No space left on device; "
    ):
        with writing(pathlib.Path("/dev/full")), open("/dev/full", "w") as file:
            file.write("x")


class SafetensorError(Exception):
    """As that of safetensors: no OSError."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on"),
        (ValueError("RESOURCE_EXHAUSTED:\n write: Disk quota exceeded"), "Quota exceeded; make"),
        (PermissionError(13, "Permission denied"), "Permission denied$"),
        (SafetensorError("a tensor is not contiguous"), None),  # ours to mend
    ],
)
def test_a_full_disk_is_known_by_what_any_library_says_of_it(tmp_path, error, said):
    path = tmp_path / "a"
    kind = InputError if said else SafetensorError

    def fail(temporary):
        raise error

    with pytest.raises(kind, match=said and f"^{path}: cannot be written: .*{said}"):
        atomic(path, fail)
    assert not list(tmp_path.iterdir())
