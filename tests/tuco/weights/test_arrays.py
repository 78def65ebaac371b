"""Trees through orbax: round trips, casts, shards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from common_jax.mesh import make_mesh
from tuco_jax.weights import arrays


@pytest.fixture(scope="module")
def tree():
    """A stacked parameter, and one of half the width."""
    kernel, half = (
        jax.random.normal(jax.random.key(n), s) for n, s in ((0, (3, 8, 4)), (1, (5,)))
    )
    return {"layers": {"kernel": kernel}, "half": half.astype(jnp.bfloat16)}


def test_round_trip(tree, tmp_path):
    arrays.save(tmp_path / "tree", tree)
    again = arrays.Stored(tmp_path / "tree").read()
    chex.assert_trees_all_equal(again, tree)
    chex.assert_trees_all_equal_dtypes(again, tree)


def test_placement_and_dtype_are_applied_on_the_way(tree, tmp_path):
    arrays.save(tmp_path / "tree", tree)
    mesh = make_mesh(1, 2, 4)
    seen = {}

    def placement(path, shape):
        seen[path] = shape
        if path == "layers/kernel":
            return NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
        return None

    again = arrays.Stored(tmp_path / "tree", dtype=lambda *_: "float32").read(placement)
    assert seen == {"layers/kernel": (3, 8, 4), "half": (5,)}
    assert again["layers"]["kernel"].addressable_shards[0].data.shape == (3, 4, 1)
    assert again["half"].dtype == jnp.float32
    np.testing.assert_array_equal(again["half"], tree["half"].astype(jnp.float32))
    np.testing.assert_array_equal(again["layers"]["kernel"], tree["layers"]["kernel"])


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 2, 4), (2, 4, 1)], ids=str)
def test_shards_across_chunks(tmp_path, sizes):
    """Of an array in many chunks, wherever a shard begins; each chunk is shown once a part."""
    array = jax.random.normal(jax.random.key(1), (3, 696, 504))
    arrays.save(tmp_path / "tree", {"a": array})
    cut = NamedSharding(make_mesh(*sizes), PartitionSpec(None, ("fsdp", "data"), "tensor"))
    shown = []
    stored = arrays.Stored(
        tmp_path / "tree", check=lambda path, part: shown.append((path, part.size))
    )
    again = stored.read(lambda *_: cut)["a"]
    assert again.sharding == cut
    np.testing.assert_array_equal(again, array)
    assert {path for path, _ in shown} == {"a"} and len(shown) > 8
    assert sum(size for _, size in shown) == array.size


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="_METADATA is missing or empty"):
        arrays.Stored(tmp_path)


def test_a_layer_is_read_without_the_others(tmp_path):
    """Large arrays and small ones, under any branch; the rest by itself."""
    kernel, scale = np.random.default_rng(0).normal(size=(3, 600, 700)), np.arange(15.0)
    tree = {"layers": {"kernel": kernel.astype(np.float32), "scale": scale.reshape(3, 5)}}
    tree = {"base": tree | {"table": scale}, "lora": {"layers": {"a": kernel[:, :4]}}}
    arrays.save(tmp_path / "tree", tree)
    shown = []
    stored = arrays.Stored(tmp_path / "tree", check=lambda path, part: shown.append(part.size))
    layer = stored.layer(1)
    expected = {"base": {"kernel": tree["base"]["layers"]["kernel"][1]}}
    expected["base"]["scale"] = tree["base"]["layers"]["scale"][1]
    expected["lora"] = {"a": kernel[1, :4]}
    chex.assert_trees_all_equal(layer, expected)
    assert sum(shown) == 600 * 700 + 5 + 4 * 700
    chex.assert_trees_all_equal(stored.read(layers=False), {"base": {"table": scale}})
