"""Digests: equal for what is equal, in any process; different for what gives another result."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common_jax.digest import Static, digest, program
from reward_jax.models.reward_nets import WindowMLP

TREE = {"a": np.arange(6.0).reshape(2, 3), "b": (np.ones(2, np.float32), 3)}


def test_arrays_count_by_their_bits():
    same = {"a": np.arange(6.0).reshape(2, 3).T.copy().T, "b": (jnp.ones(2), 3)}
    assert digest(TREE) == digest(same)
    others: list[Any] = [
        TREE | {"a": TREE["a"].reshape(3, 2)},
        TREE | {"a": TREE["a"].astype(np.float32)},
        TREE | {"a": np.nextafter(TREE["a"], 9)},
        TREE | {"b": (np.ones(2, np.float32), 4)},
        TREE | {"b": [np.ones(2, np.float32), 3]},
        {"a": TREE["a"], "c": TREE["b"]},
    ]
    assert len({digest(TREE), *map(digest, others)}) == 1 + len(others)
    keys = jax.random.key(0), jax.random.key(1)
    assert digest(keys[0]) != digest(keys[1])


def test_modules_count_by_their_fields():
    one, same, other = WindowMLP(2, (8,)), WindowMLP(2, (8,)), WindowMLP(2, (9,))
    assert digest(Static(one)) == digest(Static(same)) != digest(Static(other))


def test_functions_count_by_their_program():
    def scaled(by):
        return lambda x: jnp.sin(x) * by

    x, table = np.ones(3, np.float32), jnp.arange(3.0)
    assert program(scaled(2.0), x) == program(scaled(2.0), x + 1) != program(scaled(2.5), x)
    assert program(scaled(table), x) != program(scaled(table + 1), x)
    tree = {"w": jnp.ones(3)}
    programs = []
    for rate in (1e-3, 1e-3, 2e-3, optax.cosine_decay_schedule(1e-3, 10)):
        adam = optax.adam(rate)
        programs.append(program(adam.update, tree, adam.init(tree), tree))
    assert programs[0] == programs[1] and len(set(programs)) == 3


def test_another_process_finds_the_same():
    code = """
import jax, numpy as np, flax.linen as nn
from common_jax.digest import Static, digest, program
print(digest({"a": np.arange(3), "m": Static(nn.Dense(3))}))
print(program(lambda x: nn.gelu(nn.relu(jax.nn.silu(x))), np.ones(3, np.float32)))
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(said) == 1
