"""Parameters that are replaced, edited, or both; and the ends, tied until they differ."""

from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from common_jax.errors import InputError
from tests.tuco import random_models as rm
from tuco_jax.weights.peft.places import Places
from tuco_jax.weights.peft.tuned import Tuned

NORM, UP = "model.layers.{}.input_layernorm.weight", "model.layers.{}.mlp.up_proj.weight"


class Source:
    name = "a.file"

    def __init__(self, **tensors):
        self.tensors = tensors

    def shapes(self):
        return {name: x.shape for name, x in self.tensors.items()}

    def stored(self, tensor):
        return "float32"

    def file(self, tensor):
        return self.name

    def read(self, tensor, rows=slice(None), columns=slice(None)):
        value = self.tensors[tensor][rows]
        return value if columns == slice(None) else value[:, columns]


def made(config, *, keeps_ties=False, **tensors) -> tuple[Tuned, Any]:
    places = Places(config)
    return Tuned(Source(**tensors), places, keeps_ties=keeps_ties), places.find


def base(config):
    return {path: np.asarray(x) for path, x in flatten_dict(rm.params(config, 0), sep="/").items()}


def test_a_layer_is_replaced_and_another_edited():
    config = rm.config()
    held = base(config)
    tuned, find = made(config, new=np.full(24, 2.0, np.float32))
    tuned.add_whole(find(NORM.format(0)), "new", saved=False)
    tuned.add_edit(find(NORM.format(0)), lambda x: x + 1)
    tuned.add_edit(find(UP.format(2)), lambda x: 3 * x)
    paths = [("layers/attention_norm/scale",), ("layers/mlp/up/kernel",)]
    assert tuned.stacked == paths and tuned.outside(held, np.float32) == {}
    scale, kernel = (
        np.stack([tuned.at(p, i, lambda p, i=i: held[p][i], np.float32)[p[0]] for i in range(3)])
        for p in paths
    )
    np.testing.assert_array_equal(scale[0], 3.0)
    np.testing.assert_array_equal(scale[1:], held["layers/attention_norm/scale"][1:])
    np.testing.assert_array_equal(kernel[2], 3 * held["layers/mlp/up/kernel"][2])
    for index in range(3):
        layer = {p.removeprefix("layers/"): x[index] for p, x in held.items() if "layers/" in p}
        one = tuned.layer(layer, index, np.float32)
        np.testing.assert_array_equal(one["mlp/up/kernel"], kernel[index])
        np.testing.assert_array_equal(one["attention_norm/scale"], scale[index])


@pytest.mark.parametrize("keeps_ties", [False, True])
def test_a_tied_head_follows_what_both_ends_share(keeps_ties):
    config = rm.config(tied_head=True)
    held = base(config)
    tuned, find = made(config, keeps_ties=keeps_ties)
    tuned.add_edit(find("model.embed_tokens.weight"), lambda x: 2 * x)
    out = tuned.outside(held, np.float32)
    np.testing.assert_array_equal(out["embed/table"], 2 * held["embed/table"])
    assert ("head/kernel" in out) is not keeps_ties
    shared, find = made(config)
    shared.add_edit(find("model.embed_tokens.weight"), lambda x: 2 * x, both_ends=True)
    assert shared.outside(held, np.float32).keys() == {"embed/table"}


def test_what_does_not_fit_is_named():
    config = rm.config()
    held = base(config)
    for edit, message in (
        (lambda x: x[:-1], "a.file: what it holds for model.layers.0.mlp.up_proj.weight does not"),
        (lambda x: x / np.zeros((1, 1), np.float32), "a.file: put into .*, it gives NaN"),
    ):
        tuned, find = made(config)
        tuned.add_edit(find(UP.format(0)), edit)
        with pytest.raises(InputError, match=message), np.errstate(all="ignore"):
            tuned.at(("layers/mlp/up/kernel",), 0, lambda path: held[path][0], np.float32)
