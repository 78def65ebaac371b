"""A pair shares what its models share, and its notes never recompile."""

import dataclasses

import jax
import jax.numpy as jnp

from tests.tuco import random_models as rm
from tuco_jax.models.pair import Notes, Pair, single


def test_the_tuned_model_shares_what_it_does_not_replace():
    pair = rm.adapter_pair()
    replaced = dict(final_norm={"scale": jnp.ones(24)})
    params = dataclasses.replace(pair, tuned=replaced).tuned_params
    assert params["final_norm"]["scale"] is replaced["final_norm"]["scale"]
    assert params["embed"]["table"] is pair.base["embed"]["table"]


def test_a_head_that_only_the_base_has_is_not_the_tuned_models():
    base, tuned = rm.config(), rm.config(tied_head=True)
    pair = Pair(rm.params(base, 0), rm.params(tuned, 1), {}, base, tuned)
    assert "head" not in pair.tuned_params and "head" in pair.base


def test_context_is_that_of_both():
    short = rm.config(max_positions=32)
    assert rm.full_pair(tuned=short).context == 32
    assert single(short, rm.params(short, 0)).context == 32


def test_notes_do_not_recompile():
    count = 0

    @jax.jit
    def read(pair):
        nonlocal count
        count += 1
        return pair.base["final_norm"]["scale"]

    pair = rm.adapter_pair()
    read(pair)
    read(dataclasses.replace(pair, notes=Notes(["another"])))
    assert count == 1
