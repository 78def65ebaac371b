"""Layers that are read one ahead of the walk, once for all carries."""

import os
import threading
import weakref
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from common_jax.errors import InputError
from tests.tuco import random_models as rm
from tuco_jax.core.carry_store import CarryStore
from tuco_jax.core.engine import Phase, run, run_each
from tuco_jax.core.last_token import last_token
from tuco_jax.core.streamed import Streamed
from tuco_jax.core.walk import Split, Stacked, ends_of

DEPTH = 5
CONFIG = rm.config(depth=DEPTH, rope_index=(0,) * DEPTH, windows=(0,) * DEPTH)


class Reader:
    """A pair's layers, each a copy; which were read, by which thread, how many are alive."""

    def __init__(self, pair):
        self.pair, self.read, self.alive, self.most, self.threads = pair, [], 0, 0, set()

    def __call__(self, index):
        self.read.append(index)
        self.threads.add(threading.current_thread())
        branches = self.pair.base, self.pair.tuned, self.pair.lora
        copies = lambda x: np.array(x[index])  # noqa: E731
        layer: Any = tuple(jax.tree.map(copies, t.get("layers", {})) for t in branches)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(layer[0]["attention"]["q"]["kernel"], self._gone)
        return layer

    def _gone(self):
        self.alive -= 1


@struct.dataclass
class Add:
    """Adds a number, and the sum of a kernel, so that layers and steps count."""

    number: jax.Array

    def __call__(self, carry, layer, _):
        x = carry["x"] * 1.5 + self.number + layer.params["attention"]["q"]["kernel"].sum()
        return carry | {"x": x}, x.sum()


@struct.dataclass
class Adds:
    """An engine of two phases, which add different numbers."""

    carry: Any
    number: jax.Array

    def state(self, ends):
        return self.number * 2

    def begin(self, ends, state):
        return self.carry | {"x": self.carry["x"] + state}

    def phases(self, state, depth):
        return [Phase(Add(state), 0, 2), Phase(Add(state + 1), 2, depth)]

    def finish(self, ends, carry, outs):
        return carry, jnp.concatenate(outs), ends.base["final_norm"]


def carries(count, rng):
    """Of several shapes, with more than one leaf."""
    return [
        {"x": rng.normal(size=(2, 3 + i)).astype(np.float32), "rest": np.arange(i, dtype=np.int32)}
        for i in range(count)
    ]


def test_each_layer_is_read_once_ahead_of_the_walk_by_another_thread():
    pair = rm.full_pair(base=CONFIG)
    reader = Reader(pair)
    source = Streamed(ends_of(pair), reader)
    for _ in range(2):
        last_token(source, *rm.batch())
    assert reader.read == [*range(DEPTH)] * 2
    others = reader.threads - {threading.main_thread()}
    assert len(others) == 2 * (DEPTH - 1)  # each layer but the first of a walk
    for thread in others:  # none is left
        thread.join(10)
        assert not thread.is_alive()
    assert reader.most <= 3  # two, and one of which a program has yet to let go


def test_a_walk_that_ends_elsewhere():
    """What was fetched ahead and is not wanted is let go."""
    reader = Reader(rm.full_pair(base=CONFIG))
    source = Streamed(ends_of(reader.pair), reader)
    for start, stop in ((0, 2), (1, 3), (3, 5), (0, 1)):
        indices = [int(layer.infos[0].window) for layer in source.layers(start, stop)]
        assert len(indices) == stop - start
    assert reader.read[:8] == [0, 1, 2, 1, 2, 3, 4, 0]  # the last, ahead, may yet be to come


def test_an_error_of_a_read_is_the_walks():
    reader = Reader(rm.full_pair(base=CONFIG))

    def broken(index):
        if index == 3:
            raise InputError("part-3: truncated")
        return reader(index)

    with pytest.raises(InputError, match="part-3: truncated"):
        last_token(Streamed(ends_of(reader.pair), broken), *rm.batch())


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("memory", [0, 100, 10**6], ids=["disk", "both", "memory"])
def test_many_carries_walk_as_each_alone(tmp_path, monkeypatch, count, memory):
    written = []
    original = os.pwrite

    def noted(file, data, at):
        written.append(at + len(data))
        return original(file, data, at)

    monkeypatch.setattr(os, "pwrite", noted)
    reader = Reader(rm.full_pair(base=CONFIG))
    source = Streamed(ends_of(reader.pair), reader)
    starts = carries(count, np.random.default_rng(0))
    engines = [Adds(carry, jnp.float32(i)) for i, carry in enumerate(starts)]
    alone = [run(engine, source) for engine in engines]
    reader.read.clear()
    reader.most = reader.alive
    store = CarryStore(count, memory, tmp_path)
    finished = []
    outs = list(run_each(engines, source, store, lambda *step: finished.append(step[:2])))
    assert reader.read == [*range(DEPTH)] and reader.most <= 2 + 1
    assert finished == [(phase, i) for phase in (0, 0, 1, 1, 1) for i in range(count)]
    chex.assert_trees_all_equal(outs, jax.device_get(alone))
    for other in (Split(reader.pair), Stacked.of(reader.pair)):  # which do not stream
        again = list(run_each(engines, other, store))
        chex.assert_trees_all_close(again, outs, rtol=1e-5)
    total = sum(x.nbytes for c in starts for x in c.values())
    expected = {0: total, 100: max(0, total - 100), 10**6: 0}[memory]
    assert expected <= max(written, default=0) <= total  # the size of the file
    assert not list(tmp_path.iterdir())  # the file has no name, so nothing can stay behind
    store.close()
