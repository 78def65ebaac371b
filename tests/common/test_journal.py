"""A journal goes on with its own run alone, and what others have left is kept."""

import errno
import os
from typing import Any, NamedTuple

import numpy as np
import pytest

from common_jax.errors import InputError
from common_jax.journal import Journal


class Entry(NamedTuple):
    """Numbers of some rows."""

    rows: list[int]
    values: np.ndarray


def read(record):
    rows, values = record
    found = Entry(rows, np.asarray(values, np.float32))
    return found if found.values.shape == (len(rows),) else None


def entry(*rows):
    return Entry(list(rows), np.float32(1 / 3) + np.asarray(rows, np.float32))


def write_journal(path, settings=None, key="key"):
    with Journal(path, settings) as journal:
        journal.begin(key, read)
        journal.append(entry(0, 2))
        journal.append(entry(1))
    return path.read_bytes()


SETTINGS = {"prompts": "abc", "norm": 1}


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        (SETTINGS | {"norm": 2}, "key", "it has norm 1, not 2"),
        (SETTINGS | {"prompts": "abd"}, "key", "it has prompts 'abc', not 'abd'"),
        (SETTINGS, "other", "it has other weights or tokens, or is of another version"),
    ],
)
def test_the_journal_of_another_run_is_refused_and_kept(tmp_path, settings, key, message):
    path = tmp_path / "out.journal"
    before = write_journal(path, SETTINGS)
    with pytest.raises(InputError, match=f"{path}: holds the work of another run, .*{message}; "):
        with Journal(path, settings) as journal:
            journal.begin(key, read)
    assert path.read_bytes() == before
    with Journal(path, SETTINGS) as journal:
        journal.begin("key", read)
        assert [e.rows for e in journal.entries] == [[0, 2], [1]]
        for found, rows in zip(journal.entries, ((0, 2), (1,)), strict=True):
            np.testing.assert_array_equal(found.values, entry(*rows).values)
        with pytest.raises(InputError, match="another run is writing this output"):
            Journal(path, SETTINGS)


def test_one_that_holds_no_batch_is_nobodys(tmp_path):
    path = tmp_path / "out.journal"
    Journal(path, SETTINGS).close()
    assert not path.exists()
    path.write_bytes(write_journal(path, SETTINGS).splitlines(keepends=True)[0])
    with Journal(path, {"norm": 2}) as journal:
        journal.begin("other", read)
        journal.append(entry(0))
    assert b'"norm": 2' in path.read_bytes()


@pytest.mark.parametrize(
    "line", [b"[[0], [0.5, 0.5]]", b"[" * 5000, b"{}", b"7", b"\xff\xfe", b"[[0], [0.5]", b"[[0]]"]
)
def test_a_damaged_line_ends_what_is_kept(tmp_path, line):
    path = tmp_path / "out.journal"
    before = write_journal(path, SETTINGS)
    path.write_bytes(before + line + b"\n" + before.splitlines(keepends=True)[2])
    with Journal(path, SETTINGS) as journal:
        journal.begin("key", read)
        assert len(journal.entries) == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "data", [b"notes\n", b'{"fingerprint": "\n\n', b'{"fingerprint": "a"]\nx']
)
def test_what_is_no_journal_is_left_alone(tmp_path, data):
    path = tmp_path / "out.journal"
    path.write_bytes(data)
    with pytest.raises(InputError, match="is (not a journal of ours|damaged); name another"):
        Journal(path, SETTINGS)
    assert path.read_bytes() == data


def test_a_full_disk_is_told_once_and_keeps_what_was_written(tmp_path):
    path = tmp_path / "out.journal"

    class Full:
        """A file whose disk fills up: what its buffer holds fails again when it is closed."""

        def __init__(self, file):
            self.file, self.closed = file, False

        def write(self, data):
            return len(data)

        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            self.closed = True
            self.file.close()
            self.flush()

    with pytest.raises(InputError, match=f"^{path}: cannot be written: No space left .*is kept"):
        with Journal(path, SETTINGS) as journal:
            journal.begin("key", read)
            journal.append(entry(0))
            full: Any = Full(journal._file)
            journal._file = full
            journal.append(entry(1))
    with Journal(path, SETTINGS) as journal:
        journal.begin("key", read)
        assert [e.rows for e in journal.entries] == [[0]]
