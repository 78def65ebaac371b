"""Runs that are killed after some batches, and what the next start computes and reads."""

import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import pytest

from common_jax.journal import Journal, Section

__all__ = ["check_it_goes_on", "computed", "killed_after", "read_back"]


def killed_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Batches, of whatever computation, that are kept before the run is interrupted."""
    append, count = Section.append, itertools.count()

    def some(section: Section, entry: Any) -> None:
        if next(count) == batches:
            raise KeyboardInterrupt
        append(section, entry)

    monkeypatch.setattr(Section, "append", some)


def computed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches that are computed from here on."""
    found, append = [], Section.append

    def noted(section: Section, entry: Any) -> None:
        found.append(entry)
        append(section, entry)

    monkeypatch.setattr(Section, "append", noted)
    return found


def read_back(path: pathlib.Path, read: Callable[[Any], Any], records: Iterable[Any]) -> list[Any]:
    """The batches that a journal gives back of those records which are any."""
    with Journal(path) as journal:
        journal.begin("key")
        section: Section[Any] = journal.section("batches", "key", read)
        for record in records:
            section.append(record)
    with Journal(path) as journal:
        journal.begin("key")
        return journal.section("batches", "key", read).entries


def check_it_goes_on(
    path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[Journal | None], Any],
    unlike: Iterable[Callable[[Journal], Any]] = (),
    otherwise: Callable[[Journal], Any] | None = None,
) -> None:
    """Check that a run killed after two batches computes the rest alone, to the same numbers.

    run: computes arrays in three batches or more. unlike: runs that share none of its batches.
    otherwise: the same run in other batches, as on other devices, which computes nothing again.
    """
    with monkeypatch.context() as patch:
        every = computed(patch)
        whole = run(None)
    assert len(every) > 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(patch, 2)
        with Journal(path) as journal:
            journal.begin("key")
            run(journal)
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines(keepends=True)[1][:-9])
    with monkeypatch.context() as patch, Journal(path) as journal:
        rest = computed(patch)
        journal.begin("key")
        again = run(journal)
        assert journal.resumed.total() == len({row for e in every[:2] for row in e.rows})
    assert [e.rows for e in rest] == [e.rows for e in every[2:]]
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    for other in unlike:
        with monkeypatch.context() as patch, Journal(path) as journal:
            killed_after(patch, 0)
            journal.begin("key")
            with pytest.raises(KeyboardInterrupt):
                other(journal)
            assert not journal.resumed
    if otherwise is None:
        return
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    with monkeypatch.context() as patch, Journal(path) as journal:
        rest = computed(patch)
        journal.begin("key")
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5), otherwise(journal), whole
        )
    rows = [{row for e in some for row in e.rows} for some in (every[:2], rest, every)]
    assert not rows[0] & rows[1] and rows[0] | rows[1] == rows[2]
    assert [e.rows for e in rest] != [e.rows for e in every[2:]]
