"""An engine's phases: in order, none of them empty, many carries as each alone."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from tests.tuco import random_models as rm
from tuco_jax.core.carry_store import CarryStore
from tuco_jax.core.engine import Phase, run, run_each
from tuco_jax.core.walk import Split, Stacked

CONFIG = rm.config()
PAIR = rm.full_pair(base=CONFIG)


@struct.dataclass
class Visit:
    """The step: add to the carry, and say which layer's it was by a norm's scale."""

    amount: int = struct.field(pytree_node=False)

    def __call__(self, carry, layer, _):
        return carry + self.amount, layer.params["attention_norm"]["scale"][0]


@struct.dataclass
class Sum:
    start: jnp.ndarray

    def state(self, ends):
        return jnp.int32(ends.base_config.depth)

    def begin(self, ends, state):
        return self.start + state

    def phases(self, state, depth):
        return [Phase(Visit(1), 0, depth - 1), Phase(Visit(10), depth - 1, depth)]

    def finish(self, ends, carry, outs):
        return carry, jnp.concatenate(outs)


@pytest.mark.parametrize("source", [Split, Stacked.of])
def test_phases_follow_one_another(source):
    total, scales = run(Sum(jnp.int32(100)), source(PAIR))
    assert int(total) == 100 + 3 + 1 + 1 + 10
    np.testing.assert_array_equal(scales, PAIR.base["layers"]["attention_norm"]["scale"][:, 0])


def test_many_are_as_each_alone(tmp_path):
    seen = []
    with contextlib.closing(CarryStore(3, 1 << 20, str(tmp_path))) as carries:
        engines = [Sum(jnp.int32(i)) for i in range(3)]
        found = list(run_each(engines, Split(PAIR), carries, lambda *a: seen.append(a[:2])))
    for i, (total, scales) in enumerate(found):
        alone = run(engines[i], Split(PAIR))
        assert int(total) == int(alone[0])
        np.testing.assert_array_equal(scales, alone[1])
    # Layer by layer; the last one has a phase of its own.
    assert seen == [(0, i) for _ in range(2) for i in range(3)] + [(1, i) for i in range(3)]
