"""Shards of pairs: written whole, read in parts, refused by name."""

import errno
import os
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from common_jax.errors import InputError
from reward_jax.studies.i2p import store as module
from reward_jax.studies.i2p.pairs import Pairs
from reward_jax.studies.i2p.store import PairStore

S, h, w, C = 3, 2, 4, 4
TEXTS = ["a cat", "a  dog\nsits", "red"]


def pairs(rows: int, seed: int = 0, t=(40, 20, 1)) -> Pairs:
    rng = np.random.default_rng(seed)
    three = [rng.normal(size=(2, rows, S, h, w, C)).astype(np.float32) for _ in range(3)]
    last = rng.normal(size=(2, rows, h, w, C)).astype(np.float32)
    return Pairs(three[0], three[1], three[2], last, np.array(t))


def filled(folder, dtype: Any = "float16", rows=5, t=(40, 20, 1)):
    """A store of five rows in shards of three, and what is in it."""
    store = PairStore(folder, rows, 3, dtype)
    whole = [pairs(len(store.rows_of(i)), i, t) for i in range(store.shards)]
    for i, one in enumerate(whole):
        store.write(i, one, [f"text {r}" for r in store.rows_of(i)])
    return store, whole


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_rows_come_back_in_any_order(tmp_path, dtype, error):
    store, (first, second) = filled(tmp_path, dtype)
    assert store.shards == 2 and store.missing() == []
    store.check()
    for name in ("x_t", "base", "safe"):
        whole = np.concatenate([getattr(first, name), getattr(second, name)], 1)
        for chain, row in [(1, 4), (0, 2), (1, 0)]:
            found = store.read(name, chain, row)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, whole[chain, row], atol=error)
            np.testing.assert_array_equal(store.read(name, chain, row, 1), found[1])
    np.testing.assert_allclose(store.read("last", 1, 3), second.last[1, 0], atol=error)
    np.testing.assert_array_equal(store.steps(), [40, 20, 1])
    with safe_open(store.path(1), "numpy") as file:
        header = file.metadata()
        assert header["dtype"] == dtype and header["prompts"] == '["text 3", "text 4"]'
    sizes = store.sizes([3])
    wanted = np.sqrt(np.mean((second.safe - second.base)[:, :1] ** 2, (3, 4, 5)))
    np.testing.assert_allclose(sizes, wanted, rtol=10 * error)


SPOILT = {
    "NaN": ("safe", np.nan, "safe of its safe chain holds NaN or infinity: leave the prompt out"),
    "infinity": ("last", np.inf, "last of its safe chain holds NaN or infinity"),
    "too large": ("x_t", 1e5, "x_t of its safe chain is too large for float16: set store.dtype"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_cannot_be_kept_is_refused_by_the_prompt_s_name(tmp_path, case):
    name, value, said = SPOILT[case]
    store, found = PairStore(tmp_path, 3, 3), pairs(3)
    getattr(found, name)[1, 1, 0, 0, 0] = value
    with pytest.raises(InputError) as error:
        store.write(0, found, TEXTS)
    assert str(error.value).startswith(f"prompt 'a dog sits': {said}")
    assert not list(tmp_path.iterdir()) and store.missing() == [0]
    if case == "too large":
        PairStore(tmp_path, 3, 3, "bfloat16").write(0, found, TEXTS)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "save_file", full)
    store = PairStore(tmp_path, 3, 3)
    with pytest.raises(InputError, match="cannot be written: No space left on device; make room"):
        store.write(0, pairs(3), TEXTS)
    assert store.missing() == [0] and not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_damaged_shard_is_named(tmp_path):
    store, _ = filled(tmp_path)
    data = store.path(1).read_bytes()
    store.path(1).write_bytes(data[: len(data) // 2])
    module._open.cache_clear()
    for call in (store.check, lambda: store.read("x_t", 0, 4)):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value).startswith(f"{store.path(1)}: is missing or damaged (")
        assert str(error.value).endswith("delete it, and it is made again")
    store.path(1).unlink()
    assert store.missing() == [1]
    store.write(1, pairs(3), TEXTS)  # a row too many
    with pytest.raises(InputError, match="shapes are others than those of shard 0"):
        store.check()
