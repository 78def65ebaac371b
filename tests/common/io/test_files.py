import json

import pytest

from common_jax.errors import InputError
from common_jax.io.files import atomic, check_writable, make_folder, write_json


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"ä": [1, 2.5]})
    assert json.loads(path.read_text("utf-8")) == {"ä": [1, 2.5]}
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert json.loads(path.read_text("utf-8")) == {"ä": [1, 2.5]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


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
