"""float32 means float32: every product of our programs asks accelerators for it.

TF32 and bfloat16 keep three digits, and FTC is a difference of two models.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from tests.tuco import random_models as rm
from tuco_jax.core.decompose import decompose
from tuco_jax.core.last_token import last_token
from tuco_jax.core.walk import Stacked
from tuco_jax.finetune.batches import Batch
from tuco_jax.finetune.step import Method, OptimizerOptions, make_step, start
from tuco_jax.generation import decoding
from tuco_jax.generation.sampling import Sampling, row_keys

PLATFORMS = ("tpu", "cuda")


def score(pair):
    return jax.jit(last_token).trace(pair, *rm.batch())


def components(pair):
    def run(pair, tokens, mask):
        return decompose(pair, tokens, mask, 0.5, logits=True)

    return jax.jit(run).trace(pair, *rm.batch())


def decode(pair):
    """The prompts, and the tokens after them."""
    request = decoding.Request(
        alpha=jnp.full((3, 2), 0.5),
        limits=jnp.full(2, 8),
        before=jnp.zeros(2, jnp.int32),
        keys=row_keys(0, jnp.arange(2)),
        eos=jnp.asarray([1]),
        sampling=Sampling.of(temperature=1.0, top_k=5, top_p=0.9),
    )

    def run(source, request, tokens, mask):
        progress = decoding.begin(source, request, tokens, mask, room=16)
        return decoding.resume(source, request, progress, 4)

    return jax.jit(run).trace(Stacked.of(pair), request, *rm.batch(2))


def finetune(pair):
    """A step of an adapter, with its derivatives."""
    optimizer = OptimizerOptions().make(10)
    tokens, mask = rm.batch()
    columns = jnp.zeros((4, 8), jnp.int32)
    batch = Batch(tokens, mask, mask.astype(int), columns, columns, jnp.ones((4, 8)))
    step = make_step(pair.base_config, Method(0.5, "float32"), optimizer)
    given = start(rm.lora(pair.base_config, 2), optimizer), pair.base
    return step.trace(*given, Batch(*(a[None] for a in batch)))


def of_experts(program):
    config = rm.config(mlp_bias=False, experts=5, experts_used=2)
    return lambda _: program(rm.adapter_pair(base=config))


PROGRAMS = {"score": score, "decompose": components, "decode": decode, "finetune": finetune}
PROGRAMS |= {"score, experts": of_experts(score), "finetune, experts": of_experts(finetune)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_product_of_float32_is_of_the_highest_precision(name):
    text = PROGRAMS[name](rm.adapter_pair()).lower(lowering_platforms=PLATFORMS).as_text()
    found = re.findall(r".*(?:stablehlo\.dot_general|chlo\.ragged_dot)\b.*", text)
    assert len(found) >= 14  # of a layer: each model's seven by weights
    assert all("f32" in line for line in found)
    assert not [line for line in found if line.count("HIGHEST") != 2]
