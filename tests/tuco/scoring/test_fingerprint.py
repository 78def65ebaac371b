"""The fingerprint of a run changes with whatever its scores depend on, and with nothing else."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tests.tuco import random_models as rm
from tests.tuco.tiny_tokenizer import bos_tokenizer
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import as_prompts
from tuco_jax.scoring.fingerprint import fingerprint

CONFIG = rm.config(vocab_size=272, max_positions=64)


def test_fingerprint_sees_what_scores_depend_on():
    pair, tokenizer = rm.full_pair(base=CONFIG), bos_tokenizer()
    tokens = encode(tokenizer, as_prompts(["abc", "de"]))
    key = fingerprint(pair, tokens, 1)
    assert key == fingerprint(rm.full_pair(base=CONFIG), [t.copy() for t in tokens], 1)
    kernel = pair.tuned["layers"]["mlp"]["up"]["kernel"]
    swapped = jnp.asarray(kernel).at[0, 0, :2].set(kernel[0, 0, 1::-1])
    layers = {**pair.tuned["layers"], "mlp": {**pair.tuned["layers"]["mlp"]}}
    layers["mlp"]["up"] = {**layers["mlp"]["up"], "kernel": swapped}
    changed = dataclasses.replace(pair, tuned={**pair.tuned, "layers": layers})
    eps = dataclasses.replace(pair, base_config=dataclasses.replace(CONFIG, norm_eps=1e-5))
    others = [
        fingerprint(pair, tokens, 2),
        fingerprint(pair, tokens[::-1], 1),
        fingerprint(pair, [np.concatenate(tokens)], 1),
        fingerprint(changed, tokens, 1),
        fingerprint(eps, tokens, 1),
    ]
    assert len({key, *others}) == 6
