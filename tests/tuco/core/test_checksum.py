"""A checksum of weights changes with every one of them, by its place, and with the configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.tuco import random_models as rm
from tuco_jax.core import checksum
from tuco_jax.core.checksum import weights_checksum
from tuco_jax.models.pair import single

CONFIG = rm.config(vocab_size=272, max_positions=64)


def test_every_weight_counts_by_its_place():
    pair = rm.full_pair(base=CONFIG)
    key = weights_checksum(pair)
    assert key == weights_checksum(rm.full_pair(base=CONFIG)) and len(key) == 16
    kernel = pair.tuned["layers"]["mlp"]["up"]["kernel"]
    swapped = jnp.asarray(kernel).at[0, 0, :2].set(kernel[0, 0, 1::-1])
    layers = {**pair.tuned["layers"], "mlp": {**pair.tuned["layers"]["mlp"]}}
    layers["mlp"]["up"] = {**layers["mlp"]["up"], "kernel": swapped}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair.tuned)
    others = [
        dataclasses.replace(pair, tuned={**pair.tuned, "layers": layers}),
        dataclasses.replace(pair, tuned=half),
        dataclasses.replace(pair, base=pair.tuned, tuned=pair.base),
        dataclasses.replace(pair, base_config=dataclasses.replace(CONFIG, norm_eps=1e-5)),
        single(CONFIG, pair.base),
    ]
    assert len({key, *map(weights_checksum, others)}) == 1 + len(others)


def test_a_checksum_in_blocks_is_that_of_the_whole(monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(13, 4, 5)), jnp.bfloat16)
    for value in (x, x[:, 0], x.astype(jnp.float32)):
        whole = checksum._whole_checksum(value)
        assert whole == checksum._checksum(value)
        for block in (1, 40, 64):
            monkeypatch.setattr(checksum, "_BLOCK", block)
            assert checksum._whole_checksum(value) == whole
        monkeypatch.undo()
