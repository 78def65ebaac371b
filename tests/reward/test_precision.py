"""Every product of training, extraction and sampling is in float32 on a GPU and a TPU.

TF32 and bfloat16 keep three digits, and a reward is learned from the difference of two scores.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.train import TrainingOptions, init_state, train_denoiser
from reward_jax.reward.diagnostics import explained_fraction
from reward_jax.reward.discriminator import train_discriminator
from reward_jax.reward.extract import ExtractionOptions, extract_reward, init_params
from reward_jax.reward.guide import GuidanceOptions, guided_sample
from reward_jax.reward.relative import RelativeReward

SCHEDULE, KEY, ADAM = cosine_schedule(4), jax.random.key(0), optax.adam(1e-3)
DATA = jax.random.normal(jax.random.key(1), (8, 4, 3))


class Own(nn.Module):
    """A user's network, which knows nothing of precisions; of a reward, one number a row."""

    reward: bool = False

    @nn.compact
    def __call__(self, x, t):
        y = nn.Conv(8, (3,))(x) + nn.Dense(8)(t.astype(jnp.float32)[:, None, None])
        y = nn.Dense(3)(nn.silu(y))
        return nn.Dense(1)(nn.silu(y).reshape(len(x), -1))[:, 0] if self.reward else y


@functools.cache
def models():
    """Base, expert and parameters of a reward."""
    base, expert, learned = (
        init_params(net, jax.random.key(seed), DATA)
        for seed, net in enumerate((Own(), Own(), Own(True)))
    )
    scores = (score_from(Own(), params, "v", SCHEDULE) for params in (base, expert))
    return (*scores, learned)


def train(steps=2):
    state = init_state(Own(), ADAM, DATA, KEY, params=models()[0].params)
    options = TrainingOptions(4, 1)
    return train_denoiser(
        Own(), state, DATA, SCHEDULE, ADAM, steps=steps, key=KEY, options=options
    )[0]


def extract(plain=False):
    base, expert, params = models()
    if plain:  # a score that is no pytree of ours
        base, expert = (functools.partial(_score, model=model) for model in (base, expert))
    options = ExtractionOptions(4, 1)
    given: Any = base, expert, Own(True), params, DATA, SCHEDULE, ADAM
    return extract_reward(*given, steps=2, key=KEY, options=options)[0]


def _score(x, t, *, model):
    return Own().apply({"params": model.params}, x, t)


def discriminate():
    given = Own(True), models()[2], DATA, DATA + 1, SCHEDULE, ADAM
    return train_discriminator(*given, steps=2, key=KEY, options=ExtractionOptions(4, 1))[0]


def sample(x=DATA, sampler: Any = "ancestral"):
    base, _, params = models()
    reward = RelativeReward(params, SCHEDULE, Own(True))
    options = GuidanceOptions(sampler=sampler)
    return guided_sample(base, SCHEDULE, x.shape, key=KEY, guide=reward, options=options)


def evaluate(x=DATA):
    """As users call them, outside of any program of ours."""
    base, _, params = models()
    reward = RelativeReward(params, SCHEDULE, Own(True))
    t = jnp.arange(8) % 4
    return base(x, t), reward(x, t), reward.gradient(x, t)


def diagnose(x=DATA):
    base, expert, params = models()
    reward = RelativeReward(params, SCHEDULE, Own(True))
    return explained_fraction(reward, base, expert, x, SCHEDULE, key=KEY)


LOOPS = {"train": train, "extract": extract, "plain scores": functools.partial(extract, True)}
LOOPS |= {"discriminate": discriminate}
OTHERS = {"sample": sample, "ddim": functools.partial(sample, sampler="ddim")}
OTHERS |= {"evaluate": evaluate, "diagnose": diagnose}
RUNS = LOOPS | OTHERS


def products(name):
    """The products of all that a run computes, as lines of StableHLO for accelerators.

    Nothing is run: of a loop its first call is taken, and its state returned as it was.
    """
    found = []

    def run_loop(call, state, **_):
        found.append(lowered(lambda s: call(s, 0, 1), state))
        return state, {}

    with pytest.MonkeyPatch.context() as patch:
        for module in ("diffusion.train", "reward.extract", "reward.discriminator"):
            patch.setattr(f"reward_jax.{module}.run_loop", run_loop)
        if name in LOOPS:
            LOOPS[name]()
        else:
            found.append(lowered(OTHERS[name], DATA))
    (text,) = found
    lines = text.splitlines()
    return [x for x in lines if re.search(r"stablehlo\.(dot_general|convolution)\b", x)]


def lowered(function, given):
    traced = jax.jit(function).trace(given)
    return traced.lower(lowering_platforms=("tpu", "cuda")).as_text()


@pytest.mark.parametrize("name", RUNS)
def test_every_product_is_in_float32_on_accelerators(name):
    models()
    found = products(name)
    assert len(found) >= 4
    assert not [line for line in found if line.count("HIGHEST") != 2]


@pytest.mark.parametrize("name", ["train", "extract", "sample"])
def test_what_a_user_has_set_wins(name):
    models()
    with jax.default_matmul_precision("tensorfloat32"):
        found = products(name)
    assert len(found) >= 4
    assert not [line for line in found if line.count("HIGH") != 2 or "HIGHEST" in line]


@pytest.mark.parametrize("name", ["train", "extract", "sample"])
def test_a_cpu_gives_the_same_bits_at_any(name):
    ours = RUNS[name]()
    with jax.default_matmul_precision("default"):
        theirs = RUNS[name]()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
