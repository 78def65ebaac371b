"""The baseline: its logit is the log ratio of the two densities, and what is climbed is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from common_jax.errors import InputError
from reward_jax.diffusion.loop import LoopOptions
from reward_jax.diffusion.process import FirstState
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.sources import Rows
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.reward.discriminator import DiscriminatorGuide, train_discriminator
from reward_jax.reward.extract import init_params
from reward_jax.reward.guide import GuidanceOptions, guided_sample
from tests.reward import torch_reference as ref
from tests.reward.closed_forms import LogRatio, at_level, both, mixture

SCHEDULE = cosine_schedule(10)
NET = WindowMLP(None, (24, 24), embedding=8)


@pytest.mark.slow
def test_learns_a_known_log_ratio():
    base, expert = (mixture(s, SCHEDULE, dimensions=1, components=1) for s in (0, 5))
    data = base.draw(jax.random.key(0), 10000), expert.draw(jax.random.key(1), 10000)
    held_out = both(base, expert, jax.random.key(2), 600)
    start = jax.jit(functools.partial(init_params, NET))(jax.random.key(3), held_out[:2])
    steps = 500
    params, metrics = train_discriminator(
        NET,
        start,
        *data,
        SCHEDULE,
        optax.adam(optax.cosine_decay_schedule(1e-2, steps)),
        steps=steps,
        key=jax.random.key(4),
        options=LoopOptions(512, 250),
    )
    assert metrics["loss"].shape == metrics["accuracy"].shape == (steps,)
    guide = DiscriminatorGuide(params, NET)
    for t in (0, 3, 5):  # beyond, the two are nearly one
        x, level = at_level(SCHEDULE, held_out, t, jax.random.key(t))
        wanted, got = LogRatio(base, expert)(x, level), guide(x, level)
        # The discriminator sees log p without the constant that the log ratio here leaves out.
        off = (got - got.mean()) - (wanted - wanted.mean())
        assert np.corrcoef(wanted, got)[0, 1] > 0.95, t
        assert np.sqrt(np.mean(off**2)) < 0.35 * np.std(wanted), t
    assert 0.53 < metrics["accuracy"][-50:].mean() < 1
    assert metrics["loss"][-50:].mean() < metrics["loss"][:5].mean()


@pytest.mark.parametrize("size", [1, 7])
def test_half_a_batch_is_of_each_data_set(size):
    x = jnp.zeros((4, 1))
    with pytest.raises(InputError, match=f"batch_size is {size}: give an even number"):
        train_discriminator(
            NET, {}, x, x, SCHEDULE, optax.adam(1e-2), steps=1, key=jax.random.key(0),
            options=LoopOptions(size, 1),
        )  # fmt: skip


class Plane:
    """x . w as a logit."""

    def apply(self, variables, x, t):
        return jnp.einsum("bhd,hd->b", x, variables["params"]["w"])


PLANE = Plane()


def test_the_logit_does_not_saturate_and_the_sigmoid_does():
    x, w = (jax.random.normal(jax.random.key(i), (5, 3, 2)) for i in (0, 1))
    w, t = w[0], jnp.zeros(5, jnp.int32)
    logit, sigmoid = (DiscriminatorGuide({"w": w}, PLANE, kind) for kind in ("logit", "sigmoid"))
    by_logit, by_sigmoid = (jax.grad(lambda x, g=g: g(x, t).sum())(x) for g in (logit, sigmoid))
    np.testing.assert_allclose(by_logit, jnp.broadcast_to(w, x.shape), rtol=1e-6)
    p = sigmoid(x, t)
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-np.asarray(logit(x, t)))), rtol=1e-5)
    slope = (p * (1 - p))[:, None, None] * w[None]
    np.testing.assert_allclose(by_sigmoid, slope, rtol=1e-4, atol=1e-7)
    far = 200 * jnp.broadcast_to(w, x.shape)
    assert np.abs(jax.grad(lambda x: sigmoid(x, t).sum())(far)).max() == 0
    np.testing.assert_array_equal(logit.gradient(x, t, "ignored"), by_logit)
    assert not hasattr(logit, "learned_gradient")  # no unit of its own to undo


def test_as_a_guide_it_is_the_authors():
    """guided_p_sample with the sigmoid of a logit, at the first step down."""

    class TorchPlane(torch.nn.Module):
        def __init__(self, w):
            super().__init__()
            self.w = torch.from_numpy(np.array(w))

        def forward(self, x, cond, t):
            return (x * self.w).sum((1, 2))[:, None]

    class Zero(torch.nn.Module):
        def forward(self, x, cond, t):
            return 0 * x

    def flat(x, t, cond=None):  # the score of a model that says 0 for x_0
        return -x / (1 - SCHEDULE.at(SCHEDULE.alphas_cumprod, t, x))

    w = jax.random.normal(jax.random.key(2), (3, 2)) / 4
    key = jax.random.key(3)
    chain = guided_sample(
        flat,
        SCHEDULE,
        (5, 3, 2),
        key=key,
        guide=DiscriminatorGuide({"w": w}, PLANE, "sigmoid"),
        options=GuidanceOptions(scale=2.0, step="learned"),
        chain=True,
    )
    diffusion = ref.GaussianDiffusion(Zero(), 3, 2, 0, 10)
    noise = jax.random.normal(jax.random.split(jax.random.split(key)[1], 10)[0], (5, 3, 2))
    wanted = ref.guided_p_sample(
        diffusion,
        ref.Discriminator(TorchPlane(w), diffusion),
        torch.from_numpy(np.array(chain[0])),
        {},
        torch.full((5,), 9),
        torch.from_numpy(np.array(noise)),
        scale=2.0,
    )
    np.testing.assert_allclose(chain[1], wanted, atol=1e-5)


def test_a_condition_reaches_the_model_and_the_guide():
    """Data whose condition alone tells them apart: what is learned is its weight."""

    class Look:
        def apply(self, variables, x, t, cond):
            by, rows = variables["params"]["w"] * cond["kind"], cond["rows"]
            return by + jnp.einsum("bhd,bhd->b", x, rows)

    rows = jnp.zeros((40, 3, 2))
    one, other = ((rows, {"kind": jnp.full(40, k), "rows": rows}) for k in (-1.0, 1.0))
    look = Look()
    params, metrics = train_discriminator(
        look,
        {"w": jnp.float32(0)},
        one,
        other,
        SCHEDULE,
        optax.sgd(1.0),
        steps=50,
        key=jax.random.key(0),
        options=LoopOptions(8),
    )
    assert params["w"] > 2 and metrics["accuracy"][-1] == 1
    cond = {"kind": jnp.ones(5), "rows": jax.random.normal(jax.random.key(1), (5, 3, 2))}
    conditional = DiscriminatorGuide(params, look, conditional=True)
    x, t = jnp.ones((5, 3, 2)), jnp.zeros(5, jnp.int32)
    np.testing.assert_allclose(conditional.gradient(x, t, cond), cond["rows"], rtol=1e-6)
    samples = guided_sample(
        lambda x, t, cond=None: -x,
        SCHEDULE,
        x.shape,
        key=jax.random.key(2),
        guide=conditional,
        cond=cond,
    )
    assert np.isfinite(samples).all()


def test_the_first_step_has_the_references_loss_and_pins():
    """At a logit of 0 the loss is log 2; the pinned state stays as clean as it came."""
    seen = []

    class Look:
        def apply(self, variables, x, t):
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
            return variables["params"]["b"] * jnp.ones(len(x))

    low, high = (Rows(jnp.full((4, 3, 2), v)) for v in (-1.0, 1.0))
    look = Look()
    params, metrics = train_discriminator(
        look,
        {"b": jnp.float32(0)},
        low,
        high,
        SCHEDULE,
        optax.sgd(1.0),
        steps=1,
        key=jax.random.key(0),
        options=LoopOptions(8),
        pin=FirstState(1),
    )
    jax.effects_barrier()
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
    assert float(params["b"]) == 0  # as many of each
    labels = np.repeat([-1.0, 1.0], 4)
    np.testing.assert_array_equal(seen[0][:, 0, 1], labels)  # base first, expert second
    assert len(np.unique(seen[0][:, 0, 0])) == 8  # the action is noised
