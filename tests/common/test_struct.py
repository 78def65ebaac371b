"""Classes are told apart in the structures of trees, by which compiled programs are known."""

import dataclasses
import pathlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from common_jax import struct

structure = jax.tree.structure


def two(by: Any) -> list[Any]:
    """Two classes of the same fields."""

    def one(sign: int) -> Any:
        @by.dataclass
        class Scaled:
            factor: Any
            times: int = by.field(pytree_node=False, default=1)

            def __call__(self, x):
                return sign * self.times * self.factor * x

        return Scaled

    return [one(1), one(-1)]


def test_a_class_is_a_pytree_of_its_arrays():
    cls, _ = two(struct)
    value = cls({"a": 1.5}, times=3)
    assert (
        jax.tree.map(lambda x: 2 * x, value)
        == cls({"a": 3.0}, 3)
        == value.replace(factor={"a": 3.0})
    )
    ((path, leaf),) = jax.tree_util.tree_flatten_with_path(value)[0]
    assert (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) == ("factor/a", 1.5)
    assert structure(value) == structure(value.replace(factor={"a": 7.0}))
    assert structure(value) != structure(value.replace(times=4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.times = 2


def test_classes_of_the_same_fields_are_told_apart():
    one, other = two(struct)
    assert structure(one(1.0)) != structure(other(1.0))
    assert structure([one(one(1.0))]) != structure([one(other(1.0))])


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (3, two(struct)[0](x))], ids=["bare", "within"]
)
def test_classes_of_others_are_told_apart_once_they_are_wrapped(wrap):
    one, other = two(flax.struct)
    trees = [
        wrap(value) for value in (one(one(1.0)), one(other(1.0)), other(one(1.0)), other(1.0))
    ]
    found = [structure(struct.apart(tree)) for tree in trees]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    assert found[0] == structure(struct.apart(trees[0]))


def test_what_is_wrapped_acts_as_what_it_wraps():
    given = [cls(jnp.asarray(2.5), times=2) for cls in two(flax.struct)]
    wrapped = struct.apart(given)
    assert [float(jax.jit(lambda f: f(jnp.asarray(3.0)))(f)) for f in wrapped] == [15.0, -15.0]
    assert [f.times for f in wrapped] == [2, 2]
    with pytest.raises(AttributeError, match="Scaled.* no attribute 'factors'"):
        wrapped[0].factors  # noqa: B018
    np.testing.assert_array_equal(jax.tree.leaves(wrapped), [2.5, 2.5])


def test_nothing_else_is_wrapped():
    @dataclasses.dataclass
    class Plain:
        size: int

    ours = two(struct)[0](np.ones(2))
    for tree in (ours, Plain(3), nn.Dense(3), {"a": (np.ones(2), None)}, nn.relu):
        assert struct.apart(tree) is tree


def test_the_packages_have_no_other_classes():
    root = pathlib.Path(__file__).parents[2]
    for package in ("common_jax", "reward_jax", "tuco_jax", "benchmarks", "examples"):
        for path in (root / package).rglob("*.py"):
            text = path.read_text()
            for other in ("flax import struct", "flax.struct.", "register_dataclass("):
                assert other not in text, path
