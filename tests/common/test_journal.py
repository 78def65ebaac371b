"""A journal goes on with its own run alone, and what others have left is kept."""

import errno
import os
from typing import Any, NamedTuple

import numpy as np
import pytest

from common_jax.errors import InputError
from common_jax.journal import Journal, Section


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


def write_journal(path, settings=None, fingerprint="key"):
    with Journal(path, settings) as journal:
        journal.begin(fingerprint)
        done = journal.section("sums", "a", read)
        assert not done.entries
        done.append(entry(0, 2))
        done.append(entry(1))
    return path.read_bytes()


def rows(journal, name="sums", key="a"):
    """Of each batch that is done."""
    return [e.rows for e in journal.section(name, key, read).entries]


SETTINGS = {"prompts": "abc", "norm": 1}


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        (SETTINGS | {"norm": 2}, "key", "it has norm 1, not 2"),
        (SETTINGS | {"prompts": "abd"}, "key", "it has prompts 'abc', not 'abd'"),
        (SETTINGS, "other", "it has other weights, tokens or precision, or is of another version"),
    ],
)
def test_the_journal_of_another_run_is_refused_and_kept(tmp_path, settings, key, message):
    path = tmp_path / "out.journal"
    before = write_journal(path, SETTINGS)
    with pytest.raises(InputError, match=f"{path}: holds the work of another run, .*{message}; "):
        with Journal(path, settings) as journal:
            journal.begin(key)
    assert path.read_bytes() == before
    with Journal(path, SETTINGS) as journal:
        journal.begin("key")
        entries = journal.section("sums", "a", read).entries
        assert [e.rows for e in entries] == [[0, 2], [1]]
        for found, numbers in zip(entries, ((0, 2), (1,)), strict=True):
            np.testing.assert_array_equal(found.values, entry(*numbers).values)
        with pytest.raises(InputError, match="another run is writing this output"):
            Journal(path, SETTINGS)


def test_one_that_holds_no_batch_is_nobodys(tmp_path):
    path = tmp_path / "out.journal"
    Journal(path, SETTINGS).close()
    assert not path.exists()
    path.write_bytes(write_journal(path, SETTINGS).splitlines(keepends=True)[0])
    with Journal(path, {"norm": 2}) as journal:
        journal.begin("other")
        journal.section("sums", "a", read).append(entry(0))
    assert b'"norm": 2' in path.read_bytes()


def test_each_computation_has_batches_of_its_own(tmp_path, capsys):
    """By what it computes, by what of, and by part; none of them takes another's."""
    path = tmp_path / "out.journal"
    with Journal(path) as journal:
        journal.begin("key")
        sections = [
            journal.section("sums", "a", read),
            journal.section("sums", "ab", read),
            journal.section("means", "a", read),
            journal.part("c").section("sums", "a", read),
            journal.part("c").part("d").section("sums", "a", read),
        ]
        for number, section in enumerate(sections):
            section.append(entry(number))
        sections[0].append(entry(9, 0))
        assert not any(section.entries for section in sections) and not journal.resumed
    assert capsys.readouterr().err == ""
    with Journal(path) as journal:
        journal.begin("key")
        assert rows(journal, "means") == [[2]] and rows(journal, key="ab") == [[1]]
        assert rows(journal.part("c")) == [[3]] and rows(journal.part("c").part("d")) == [[4]]
        assert not rows(journal, key="b") and not rows(journal.part("d"))
        said = [f"note: 1 {name} are done: {path}" for name in ("means", "sums", "sums", "sums")]
        assert capsys.readouterr().err.splitlines() == said
        done = journal.section("sums", "a", read)
        assert [e.rows for e in done.entries] == [[0], [9, 0]]
        assert capsys.readouterr().err == f"note: 2 sums are done: {path}\n"
        done.append(entry(5))  # of this start, which knows of it
        assert rows(journal) == [[0], [9, 0]]
    assert path.read_bytes().count(b"\n") == 1 + 7


def test_without_a_journal_nothing_is_kept():
    section = Section[Entry]()
    section.append(entry(0))
    assert section.entries == []


@pytest.mark.parametrize(
    "record",
    [
        b"[[0], [0.5, 0.5]]]",
        b"[" * 5000,
        b"{}]",
        b"7]",
        b"\xff\xfe]",
        b"[[0], [0.5]",
        b"[[0]]]",
        b"",
        b"[[0], [0.5]], 7]",
    ],
)
def test_a_batch_that_is_damaged_is_none(tmp_path, record):
    path = tmp_path / "out.journal"
    header, *lines = write_journal(path, SETTINGS).splitlines(keepends=True)
    path.write_bytes(
        b"".join([header, lines[0], b'["sums a", ' + record + b"\n", b"\n", lines[1]])
    )
    with Journal(path, SETTINGS) as journal:
        journal.begin("key")
        assert rows(journal) == [[0, 2], [1]]


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_last_line_that_was_cut_short_goes(tmp_path, cut):
    path = tmp_path / "out.journal"
    before = write_journal(path, SETTINGS)
    path.write_bytes(before[:-cut])
    with Journal(path, SETTINGS) as journal:
        journal.begin("key")
        done = journal.section("sums", "a", read)
        assert [e.rows for e in done.entries] == [[0, 2]]
        done.append(entry(1))
    assert path.read_bytes() == before


def test_a_disk_that_this_process_sees_late(tmp_path):
    """Process 0 has said how long the file is."""
    path = tmp_path / "out.journal"
    before = write_journal(path)
    with Journal(path) as journal:
        journal.begin("key")
        path.write_bytes(before[:-30])
        with pytest.raises(InputError, match=f"^{path}: is shorter here than for process 0: "):
            rows(journal)


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
            journal.begin("key")
            done = journal.section("sums", "a", read)
            done.append(entry(0))
            full: Any = Full(journal._file)
            journal._file = full
            done.append(entry(1))
    with Journal(path, SETTINGS) as journal:
        journal.begin("key")
        assert rows(journal) == [[0]]
