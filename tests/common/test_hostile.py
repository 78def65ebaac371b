"""The guard over hostile files: what it lets pass, and what it does not."""

import numpy as np
import pytest

from common_jax.errors import InputError
from tests.hostile import BYTES, bounded


def take(count):
    try:
        np.empty(count, np.uint8)
    except MemoryError:
        raise InputError("too large") from None


def test_a_refusal_of_one_line_passes():
    with bounded():
        raise InputError("m.bin: is broken")
    with bounded():
        take(1000)


def test_more_memory_than_is_allowed_fails_though_it_is_refused():
    with pytest.raises(AssertionError, match="asked for too much memory"), bounded():
        take(2 * BYTES)
    with pytest.raises(MemoryError), bounded():
        np.empty(2 * BYTES, np.uint8)
    np.empty(2 * BYTES, np.uint8)  # the limit is gone


def test_two_lines_and_other_errors_fail():
    with pytest.raises(AssertionError), bounded():
        raise InputError("a\nb")
    with pytest.raises(KeyError), bounded():
        raise KeyError("a")


def test_work_without_end_fails(monkeypatch):
    monkeypatch.setattr("tests.hostile.SECONDS", 0)
    with pytest.raises(AssertionError), bounded():
        sum(range(10**5))
