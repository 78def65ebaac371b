"""Streams that wait in memory and on disk."""

import errno
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from tuco_jax.core.carry_store import CarryStore


def test_streams_of_other_types_come_back_from_disk(tmp_path):
    trees = [{"a": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "b": jnp.asarray(7)}] * 3
    store = CarryStore(3, 0, tmp_path)
    for i, tree in enumerate(trees):
        store[i] = tree
    for _ in range(2):
        for i in (2, 0, 1):
            chex.assert_trees_all_equal(store[i], jax.tree.map(np.asarray, trees[i]))
            chex.assert_trees_all_equal_dtypes(store[i], trees[i])
    store.close()


def test_a_folder_that_cannot_be_written_to(tmp_path):
    store = CarryStore(1, 0, tmp_path / "absent")
    store[0] = np.zeros(3)
    with pytest.raises(InputError, match="absent: residual streams cannot be kept there"):
        store.settle()


def test_an_item_that_is_replaced_is_not_the_one_that_was_brought_ahead(tmp_path):
    store = CarryStore(2, 0, tmp_path)
    for index in (0, 1):
        store[index] = np.full(3, index)
    np.testing.assert_array_equal(store[0], np.full(3, 0))
    store[1] = np.full(3, 7)
    np.testing.assert_array_equal(store[1], np.full(3, 7))
    store.close()


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    store = CarryStore(2, 0, tmp_path)
    store[0] = np.zeros(3)
    message = "cannot be kept there .No space left on device.; free"
    with pytest.raises(InputError, match=message):
        store.settle()
    with pytest.raises(InputError, match=message):  # nor is there anything to read
        _ = store[0]
    store.close()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_cut_short(tmp_path):
    store = CarryStore(1, 0, tmp_path)
    store[0] = np.zeros(3)
    store.settle()
    store._file.truncate(8)
    with pytest.raises(InputError, match="cannot be kept there .the file was cut short."):
        _ = store[0]
    store.close()
