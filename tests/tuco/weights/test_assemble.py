"""A checkpoint of arrays at hand: names, sizes and numbers are checked, blocks change nothing."""

from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from common_jax.errors import InputError
from common_jax.mesh import make_mesh
from tests.tuco import random_models as rm
from tuco_jax.models.sharding import placement, shardings
from tuco_jax.weights import arrays, assemble
from tuco_jax.weights.assemble import Checkpoint, Key

CONFIG = rm.config()
PARAMS = rm.params(CONFIG, 0)
FLAT: dict[str, Any] = flatten_dict(PARAMS, sep="/")  # pyright: ignore[reportAssignmentType]


class Source:
    """Parameters as tensors of their own, matrices transposed, one a layer."""

    name = "source"

    def __init__(self, **changes):
        self.tensors, self.reads = {}, 0
        for path, value in FLAT.items():
            layers = enumerate(value) if path.startswith("layers/") else [("", value)]
            for layer, x in layers:
                self.tensors[f"{path}{layer}"] = np.asarray(x).T.copy()
        for name, change in changes.items():
            key = next(k for k in self.tensors if k.endswith(name))
            self.tensors[key] = change(self.tensors[key])

    def shapes(self):
        return {name: value.shape for name, value in self.tensors.items()}

    def stored(self, tensor):
        return "float32"

    def file(self, tensor):
        return "a.file"

    def read(self, tensor, rows=slice(None), columns=slice(None)):
        value = self.tensors[tensor][rows]
        value = value if columns == slice(None) else value[:, columns]
        self.reads += value.size
        return value


def table():
    keys = {}
    for path, value in FLAT.items():
        layered = path.startswith("layers/")
        rows = 1 if value.ndim - layered == 2 else 0
        keys[path] = Key(path + "{l}" * layered, lambda x, _: x.T, rows)
    return keys


@pytest.mark.parametrize("block", [7, 1 << 22])
def test_whole_and_by_layers(block, monkeypatch):
    monkeypatch.setattr(assemble, "_BLOCK", block)
    checkpoint = Checkpoint(CONFIG, Source(), table(), dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, checkpoint.read(), PARAMS)
    one = jax.tree.map(lambda x: x[2], PARAMS["layers"])
    jax.tree.map(np.testing.assert_array_equal, checkpoint.layer(2), one)


SIZE = sum(x.size for x in FLAT.values())


LAYOUTS = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


@pytest.mark.parametrize("layout, sent", [*((x, False) for x in LAYOUTS), (LAYOUTS[3], True)])
def test_shards_are_parts_of_the_whole(layout, sent, monkeypatch):
    """Whatever memory devices have; and each number is read once for all of them."""
    monkeypatch.setattr(assemble, "_BLOCK", 100)
    if sent:
        monkeypatch.setattr(arrays, "_adopted", arrays._sent)
    mesh, source = make_mesh(*layout), Source()
    found = Checkpoint(CONFIG, source, table(), dtype="float32").read(placement(mesh))
    jax.tree.map(np.testing.assert_array_equal, found, PARAMS)
    assert jax.tree.map(lambda x: x.sharding, found) == shardings(PARAMS, mesh)
    assert source.reads == SIZE


@pytest.mark.parametrize(("axes", "part"), [(("fsdp", None), 2), ((None, "tensor"), 4)])
def test_nothing_is_read_for_devices_of_others(axes, part):
    """As one of several processes: rows, or columns, of the tensors that its devices hold."""
    mesh, source = make_mesh(1, 2, 4), Source()
    checkpoint = Checkpoint(CONFIG, source, table(), dtype="float32")
    where = NamedSharding(mesh, PartitionSpec(None, *axes))
    mine = where.devices_indices_map((3, 24, 40))[mesh.devices.flat[0]]
    bounds = [(s.start or 0, s.stop or n) for s, n in zip(mine[1:], (24, 40), strict=True)]
    shape = [stop - start for start, stop in bounds]
    target = np.empty(shape, np.float32)
    checkpoint._fill("layers/mlp/up/kernel", 1, [(tuple(bounds), target)])
    np.testing.assert_array_equal(target, FLAT["layers/mlp/up/kernel"][1][mine[1:]])
    assert source.reads == 24 * 40 // part


def test_a_layers_axis_may_be_cut():
    where = NamedSharding(make_mesh(1, 3), PartitionSpec("fsdp"))
    checkpoint = Checkpoint(CONFIG, Source(), table(), dtype="float32")
    found = checkpoint.read(lambda path, _: where if path.startswith("layers/") else None)
    jax.tree.map(np.testing.assert_array_equal, found, PARAMS)


def test_sizes_are_checked_before_anything_is_read():
    with pytest.raises(
        InputError, match=r"a.file: tensor embed/table has shape \[24, 60\], which"
    ):
        Checkpoint(CONFIG, Source(table=lambda x: x[:, :-1]), table(), dtype="float32")
    turned = Checkpoint(CONFIG, Source(table=lambda x: x.T), table(), dtype="float32")
    with pytest.raises(InputError, match=r"embed/table has shape \[61, 24\], which does not give"):
        turned.read()


def test_numbers_are_checked_as_they_are_read():
    def spoil(x):
        x[1, 2] = np.nan
        return x

    checkpoint = Checkpoint(CONFIG, Source(**{"up/kernel2": spoil}), table(), dtype="float32")
    checkpoint.layer(1)
    with pytest.raises(InputError, match="tensor layers/mlp/up/kernel2 holds NaN or infinity"):
        checkpoint.layer(2)
