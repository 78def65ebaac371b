"""Checksums: equal for what is equal, in any process; different for what gives another result."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from common_jax.checksum import checksum, program_checksum
from common_jax.errors import InputError
from common_jax.mesh import make_mesh
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.sharding import in_use, place

TREE = {"a": np.arange(6.0).reshape(2, 3), "b": (np.ones(2, np.float32), 3)}
X = np.ones(3, np.float32)


def test_arrays_count_by_their_bits():
    same = {"a": np.arange(6.0).reshape(2, 3).T.copy().T, "b": (jnp.ones(2), 3)}
    assert checksum(TREE) == checksum(same)
    others: list[Any] = [
        TREE | {"a": TREE["a"].reshape(3, 2)},
        TREE | {"a": TREE["a"].astype(np.float32)},
        TREE | {"a": np.nextafter(TREE["a"], 9)},
        TREE | {"b": (np.ones(2, np.float32), 4)},
        TREE | {"b": [np.ones(2, np.float32), 3]},
        TREE | {"b": (np.ones(2, np.float32), (3,))},
        TREE | {"b": (np.ones(2, np.float32), "3")},
        {"a": TREE["a"], "c": TREE["b"]},
        {"a": TREE["b"], "b": TREE["a"]},
    ]
    assert len({checksum(TREE), *map(checksum, others)}) == 1 + len(others)
    assert checksum(jax.random.key(0)) != checksum(jax.random.key(1))
    assert checksum({"x", "y", "z"}) == checksum({"z", "y", "x"}) != checksum({"x", "y"})
    mixed = [np.array(x, object) for x in (["a", 1], ["a", 1], ["a", 2])]
    assert checksum(mixed[0]) == checksum(mixed[1]) != checksum(mixed[2])
    assert checksum(np.float32(3)) and checksum(np.zeros((0, 2))) != checksum(np.zeros((2, 0)))


def test_modules_count_by_their_fields():
    one, same, other = WindowMLP(2, (8,)), WindowMLP(2, (8,)), WindowMLP(2, (9,))
    assert checksum(one) == checksum(same) != checksum(other)


def in_jit(by):
    return jax.jit(lambda x: x * by)


def in_scan(by):
    return lambda x: jax.lax.scan(lambda c, _: (c * by, None), x, None, length=2)[0]


def in_cond(by):
    return lambda x: jax.lax.cond(x.sum() > 0, jax.jit(lambda x: x * by), lambda x: x, x)


def in_custom_jvp(by):
    @jax.custom_jvp
    def scaled(x):
        return jax.jit(lambda x: x * by)(x)

    scaled.defjvp(lambda x, v: (scaled(*x), v[0]))
    return scaled


def in_custom_derivative(by):
    """Only the rule has it."""

    @jax.custom_vjp
    def same(x):
        return x

    same.defvjp(lambda x: (x, None), lambda _, g: (jax.jit(lambda g: g * by)(g),))
    return jax.grad(lambda x: jnp.sum(same(x)))


def in_partial(by):
    return jax.tree_util.Partial(lambda by, x: x * by, by)


def in_partial_of_a_lambda(by):
    return jax.tree_util.Partial(lambda x: x * by)


class Plain:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return jax.jit(lambda x: x * self.by)(x)


class Module(nn.Module):
    act: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x):
        return self.act(x)


def in_a_module(by):
    return lambda x: Module(lambda x: x * by).apply({}, x)


@struct.dataclass
class Node:
    w: Any
    act: Any = struct.field(pytree_node=False)

    def __call__(self, x):
        return self.act(x * self.w)


def in_a_static_field(by):
    return Node(jnp.ones(3), lambda x: x * by)


def in_remat(by):
    return jax.checkpoint(lambda x: jax.jit(lambda x: x * by)(x))


MAKERS = [
    *(in_jit, in_scan, in_cond, in_custom_jvp, in_custom_derivative, in_partial),
    *(in_partial_of_a_lambda, Plain, in_a_module, in_a_static_field, in_remat),
]
TABLE = jnp.arange(3.0)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("one", "other"), [(TABLE, TABLE + 1), (X, X + 1), (2.0, 2.5)])
def test_a_function_counts_by_its_program(make, one, other):
    """Several had one checksum whatever array they closed over."""
    assert (
        program_checksum(make(one), X)
        == program_checksum(make(one), X + 1)
        != program_checksum(make(other), X)
    )


def test_where_a_program_runs_does_not_count():
    """Nor does a mesh that it takes from its parameters, so that a run goes on over another."""

    @jax.jit
    def product(params, x):
        return x @ in_use(params)["first"]["kernel"]

    tree, x = {"first": {"kernel": np.ones((4, 8), np.float32)}}, np.ones((2, 4), np.float32)
    alone = program_checksum(product, place(tree, None), x)
    for layout in ((2, 2, 2), (1, 2, 4)):
        placed = place(tree, make_mesh(*layout))
        assert "sharding_constraint" in str(jax.make_jaxpr(product)(placed, x))
        assert program_checksum(product, placed, x) == alone
    assert alone != program_checksum(lambda params, x: 2 * product(params, x), tree, x)


def test_shapes_and_types_count():
    found = [program_checksum(jnp.sin, x) for x in (X, X[:2], X.astype(np.float16), np.float32(1))]
    found += [program_checksum(in_jit(by), X) for by in (jnp.ones(1), jnp.ones(3), 1.0)]
    found += [program_checksum(lambda x: (x, x * 2), X), program_checksum(lambda x: (x * 2, x), X)]
    assert len(set(found)) == len(found)


def test_an_optimizer_counts_by_what_it_does():
    tree = {"w": jnp.ones(3)}
    programs = []
    for rate in (1e-3, 1e-3, 2e-3, optax.cosine_decay_schedule(1e-3, 10)):
        adam = optax.adam(rate)
        programs.append(program_checksum(adam.update, tree, adam.init(tree), tree))
    assert programs[0] == programs[1] and len(set(programs)) == 3


def host(x):
    return x


def other_host(x):
    return x + 1


def asked(callback):
    return lambda x: jax.pure_callback(callback, jax.ShapeDtypeStruct((3,), jnp.float32), x)


def test_what_only_an_address_tells_apart_is_refused():
    for value in (
        object(),
        [Plain(2)],
        {"a": lambda x: x},
        Node(1.0, lambda x: x),
        Module(Plain(1)),
    ):
        with pytest.raises(InputError, match="checkpoints: nothing but its address tells <.*give"):
            checksum(value)
    with pytest.raises(InputError, match="nothing but its address tells"):
        program_checksum(asked(lambda x: x), X)
    assert program_checksum(asked(host), X) != program_checksum(asked(other_host), X)
    assert checksum(host) != checksum(other_host) and checksum(Plain) != checksum(Node)
    # What only prints, and how to differentiate what is not differentiated, changes no result.
    printed = lambda x: (jax.debug.callback(lambda x: None, x), nn.relu(x))[1]  # noqa: E731
    assert program_checksum(printed, X)


def everything() -> list[str]:
    """Checksums of one thing of each kind, for other processes to compare."""
    from tests.common import test_checksum as own

    made = [program_checksum(make(own.TABLE), X) for make in own.MAKERS]
    noise = program_checksum(lambda x: x + jax.random.normal(jax.random.key(0), x.shape), X)
    acts = program_checksum(lambda x: nn.gelu(nn.relu(jax.nn.silu(x))), X)
    adam = optax.adam(optax.cosine_decay_schedule(1e-3, 10))
    moments = adam.init({"w": jnp.ones(3)})
    update = program_checksum(adam.update, {"w": jnp.ones(3)}, moments)
    held = [
        own.TREE,
        WindowMLP(2),
        {"x", "y", "z"},
        own.host,
        moments,
        nn.Dense,
        jax.random.key(1),
    ]
    return [*made, noise, acts, update, program_checksum(asked(own.host), X), *map(checksum, held)]


def test_a_product_is_precise_where_nothing_else_is_said():
    """So that runs go on that began before precisions were stated."""

    def products(precision):
        return lambda x: jax.lax.dot(x[None], x[:, None], precision=precision)

    found = {p: program_checksum(products(p), X) for p in (None, "highest", "high", "default")}
    assert found[None] == found["highest"] and len(set(found.values())) == 3


def test_another_process_finds_the_same():
    code = "from tests.common.test_checksum import everything; print(everything())"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert other.strip() == str(everything())


def test_dataclasses_count_by_their_class_and_fields():
    @dataclasses.dataclass
    class One:
        a: int

    @dataclasses.dataclass
    class Two:
        a: int

    assert checksum(One(1)) == checksum(One(1))
    assert len({checksum(x) for x in (One(1), One(2), Two(1), {"a": 1})}) == 4
