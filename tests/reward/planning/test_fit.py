"""What a fit is made of: spaces, windows, optimizers, networks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common_jax.errors import InputError
from reward_jax.data.episodes import transitions
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.train import EMA
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.models.temporal.mlp import ResidualMLP
from reward_jax.models.temporal.unet import TemporalUnet
from reward_jax.planning.fit import (
    AdamOptions,
    NetworkOptions,
    Training,
    Untrained,
    fit,
    optimizer,
    space_of,
    window_source,
)
from tests.compiled import compilations
from tests.reward.cli_runs import episodes, space

TINY = NetworkOptions(kind="mlp", width=8, blocks=1)


@pytest.mark.parametrize("actions", [False, True])
@pytest.mark.parametrize("normaliser", ["limits", "gaussian"])
def test_a_space_is_of_its_data(actions, normaliser):
    data = episodes(steps=40)
    made = space_of(data, horizon=4, stride=3, actions=actions, normaliser=normaliser)
    rows = transitions(data, actions=actions)
    assert (made.shape, made.actions) == ((4, rows.shape[1]), 2 if actions else 0)
    assert made.about == data.about and made.normaliser.kind == normaliser
    source = window_source(data, made)
    assert len(source.starts) == 3 * (40 - 9)
    drawn = np.asarray(source.sample(jax.random.key(0), 5))
    known = {tuple(row) for row in made.normaliser.normalise(rows).astype(np.float32).tolist()}
    assert {tuple(row) for row in drawn.reshape(-1, rows.shape[1]).tolist()} <= known


def test_data_of_another_task_are_refused():
    with pytest.raises(InputError, match="the data are of umaze, the model is of large: give its"):
        window_source(episodes(), space(about={"task": "large"}))


@pytest.mark.parametrize(("decay", "shrink"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_adam_decays_and_clips_as_said(decay, shrink):
    options = AdamOptions(steps=10, learning_rate=0.5, decay=decay, weight_decay=shrink)
    assert optimizer(options, clip=1.0) is optimizer(options, clip=1.0)  # compiled steps are kept
    rate = optax.cosine_decay_schedule(0.5, 10, 0.02) if decay else 0.5
    reference = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=shrink))
    params = {"w": jnp.array([3.0, -4.0])}
    ours, theirs = (o.init(params) for o in (optimizer(options, clip=1.0), reference))
    for _ in range(3):
        a, ours = optimizer(options, clip=1.0).update(params, ours, params)
        b, theirs = reference.update(params, theirs, params)
        np.testing.assert_allclose(a["w"], b["w"], rtol=1e-6)  # pyright: ignore


def test_other_steps_and_rates_compile_nothing_anew():
    data = episodes(steps=40)
    made = space_of(data, horizon=8, stride=3, actions=False)
    source, begin = window_source(data, made), Untrained(cosine_schedule(4), TINY)

    def train(**changes):
        given: dict[str, Any] = dict(steps=4, steps_per_call=2, batch_size=4, ema=EMA(0.5, 1, 0))
        training = Training(**(given | changes))
        return fit(source, made, begin, training, seed=0).denoiser.params

    first = train()
    with compilations() as compiled:
        more, other, still = train(steps=6), train(learning_rate=1e-2), train(decay=False)
    assert set(compiled) <= {"jit(begin)"}  # the optimizer's own state, zeros
    for changed in (more, other, still):
        gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), first, changed)
        assert max(jax.tree.leaves(gap)) > 1e-5


def test_networks_and_what_they_cannot_be():
    options = NetworkOptions(dim=16, multipliers=(1, 2), attention=True)
    assert options.make(space()) == TemporalUnet(4, 16, (1, 2), True)
    options.check(6)
    for bad, horizon, said in (
        (NetworkOptions(dim=12), None, "network.dim must be a multiple of 8, not 12"),
        (
            NetworkOptions(dim=8, multipliers=()),
            None,
            "network.multipliers must be one number or more",
        ),
        (options, 5, "horizon must be a multiple of 2 for the 2 levels"),
    ):
        with pytest.raises(InputError, match=said):
            bad.check(horizon)
    wide = NetworkOptions(kind="mlp", width=20, blocks=1, dim=12)
    wide.check(5)
    assert wide.make(space()) == ResidualMLP(20, 1)
    for one in (options, wide):
        taken = NetworkOptions.of(one.make(space()))
        assert NetworkOptions(**taken).make(space()) == one.make(space())
    assert NetworkOptions.of(WindowMLP()) == {}
