"""A checkpoint of arrays at hand: names, sizes and numbers are checked, blocks change nothing."""

from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from common_jax.errors import InputError
from tests.tuco import random_models as rm
from tuco_jax.weights import assemble
from tuco_jax.weights.assemble import Checkpoint, Key

CONFIG = rm.config()
PARAMS = rm.params(CONFIG, 0)
FLAT: dict[str, Any] = flatten_dict(PARAMS, sep="/")  # pyright: ignore[reportAssignmentType]


class Source:
    """Parameters as tensors of their own, matrices transposed, one a layer."""

    name = "source"

    def __init__(self, **changes):
        self.tensors = {}
        for path, value in FLAT.items():
            layers = enumerate(value) if path.startswith("layers/") else [("", value)]
            for layer, x in layers:
                self.tensors[f"{path}{layer}"] = np.asarray(x).T.copy()
        for name, change in changes.items():
            key = next(k for k in self.tensors if k.endswith(name))
            self.tensors[key] = change(self.tensors[key])

    def shapes(self):
        return {name: value.shape for name, value in self.tensors.items()}

    def file(self, tensor):
        return "a.file"

    def read(self, tensor, rows=slice(None)):
        return self.tensors[tensor][rows]


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
