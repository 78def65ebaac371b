"""The fingerprint of a run changes with whatever its scores depend on, and with nothing else."""

import dataclasses

import numpy as np

from tests.tuco import random_models as rm
from tests.tuco.tiny_tokenizer import bos_tokenizer
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import as_prompts
from tuco_jax.scoring.fingerprint import scores_fingerprint

CONFIG = rm.config(vocab_size=272, max_positions=64)


def test_fingerprint_sees_what_scores_depend_on():
    pair, tokenizer = rm.full_pair(base=CONFIG), bos_tokenizer()
    tokens = encode(tokenizer, as_prompts(["abc", "de"]))
    key = scores_fingerprint(pair, tokens, 1)
    assert key == scores_fingerprint(rm.full_pair(base=CONFIG), [t.copy() for t in tokens], 1)
    changed = dataclasses.replace(pair, tuned=pair.base)
    eps = dataclasses.replace(pair, base_config=dataclasses.replace(CONFIG, norm_eps=1e-5))
    others = [
        scores_fingerprint(pair, tokens, 2),
        scores_fingerprint(pair, tokens[::-1], 1),
        scores_fingerprint(pair, [np.concatenate(tokens)], 1),
        scores_fingerprint(changed, tokens, 1),
        scores_fingerprint(eps, tokens, 1),
    ]
    assert len({key, *others}) == 6
