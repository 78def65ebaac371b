"""An expert in the base's coordinates; what fits what."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from common_jax.errors import InputError
from reward_jax.data.trajectory.convert import Converted, expert_in_base_coordinates
from reward_jax.data.trajectory.normalisers import Normaliser
from reward_jax.data.trajectory.space import TrajectoryModel
from reward_jax.diffusion.denoiser import Denoiser
from reward_jax.diffusion.process import q_sample
from reward_jax.diffusion.schedule import Schedule, make_schedule
from tests.reward.cli_runs import model, space

X = jax.random.normal(jax.random.key(7), (5, 8, 4))
T = jnp.array([0, 1, 3, 6, 7])


def test_the_same_coordinates_take_the_expert_as_it_is():
    expert = model(1)
    score, notes = expert_in_base_coordinates(model(), expert)
    assert score is expert.denoiser and notes == []


WIDE = Normaliser(np.zeros(5, np.float32), np.ones(5, np.float32))
DIFFERENT = {
    "horizon": (dict(horizon=16), "horizon: 8 and 16"),
    "transition width": (dict(normaliser=WIDE), "transition width: 4 and 5"),
    "actions": (dict(actions=2), "actions: 0 and 2"),
    "stride": (dict(stride=5), "stride: 10 and 5"),
    "diffusion steps": (dict(steps=12), "diffusion steps: 8 and 12"),
    "schedule": (dict(schedule="linear"), "schedule: cosine and linear (abar by up to 0."),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_differences_are_named(case):
    changes, message = DIFFERENT[case]
    with pytest.raises(InputError) as error:
        expert_in_base_coordinates(model(), model(1, **changes))
    assert f"base and expert differ in {message}" in str(error.value)
    assert "alike" in str(error.value)


def shifted(offset: float, factor: float) -> Normaliser:
    n = space().normaliser
    return Normaliser(n.offset + np.float32(offset), n.scale * np.float32(factor), n.kind)


@struct.dataclass
class Gaussian:
    """The score of rows N(mean, deviation^2) in metres, in a normaliser's coordinates; exact."""

    mean: Any  # [D]
    deviation: Any  # [D]
    schedule: Schedule

    def log_density(self, x, t):
        keep = self.schedule.at(self.schedule.alphas_cumprod, t, x)
        mean, deviation = (jnp.asarray(v)[None, None] for v in (self.mean, self.deviation))
        away = x - jnp.sqrt(keep) * mean
        variance = keep * jnp.square(deviation) + 1 - keep
        return -0.5 * jnp.sum(jnp.square(away) / variance)

    def __call__(self, x, t, cond=None):
        return jax.grad(self.log_density)(x, t)


def gaussian(normaliser: Normaliser, mean: Any, deviation: Any, steps: int = 8) -> TrajectoryModel:
    n, schedule = normaliser, make_schedule("cosine", steps)
    score = Gaussian((mean - n.offset) / n.scale, deviation / n.scale, schedule)
    return TrajectoryModel(cast(Denoiser, score), space(normaliser=n))


@pytest.mark.parametrize("factor", [1.0, 1.2, 0.4])
def test_normalisers_that_differ_are_converted_and_it_is_said(factor):
    ours, theirs = space().normaliser, shifted(0.2, factor)
    mean, deviation = np.arange(4.0), np.full(4, 0.5)
    base, expert = gaussian(ours, mean, deviation), gaussian(theirs, mean, deviation)
    score, notes = expert_in_base_coordinates(base, expert, pin=False)
    assert isinstance(score, Converted) and len(notes) == 1
    assert f"(scales by a factor of up to {max(factor, 1 / factor):.3g})" in notes[0]
    assert notes[0].endswith("the expert's score is converted to the base's")
    if factor == 1.0:  # one distribution, in two coordinates
        np.testing.assert_allclose(score(X, T), base.denoiser(X, T), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "factor", "most"),
    [(20, 1.03, 0.01), (20, 1.1, 0.04), (50, 1.1, 0.01), (50, 1.5, 0.06), (50, 0.7, 0.05)],
)
def test_what_is_left_of_a_conversion_is_little_beside_the_target(steps, factor, most):
    """At the paper's numbers of steps, at every t: error against s_expert - s_base, in its unit.

    Two experts whose plans differ by .2 m from the base's, in another scale and offset.
    """
    rng = np.random.default_rng(6)
    mean, deviation = rng.normal(size=4), rng.uniform(0.3, 1.5, 4)
    ours, theirs = space().normaliser, shifted(0.1, factor)
    base, exact = (gaussian(ours, mean + d, deviation, steps) for d in (0.0, 0.2))
    score, _ = expert_in_base_coordinates(
        base, gaussian(theirs, mean + 0.2, deviation, steps), pin=False
    )
    schedule, error, size = base.denoiser.schedule, 0.0, 0.0
    for level in range(steps):
        t, key = jnp.full(64, level), jax.random.key(level)
        rows = jax.random.normal(key, (64, 8, 4)) * deviation[None, None] + mean[None, None]
        noise = jax.random.normal(jax.random.fold_in(key, 1), rows.shape)
        x = q_sample(schedule, jnp.asarray(ours.normalise(rows)), t, noise)
        weight = float(1 - schedule.alphas_cumprod[level])
        error += weight * float(jnp.sum(jnp.square(score(x, t) - exact.denoiser(x, t))))
        size += weight * float(jnp.sum(jnp.square(exact.denoiser(x, t) - base.denoiser(x, t))))
    assert error / size < most, error / size


def test_a_pinned_first_state_is_given_clean():
    """The expert is asked from the start that was given, in its own coordinates, at every step."""
    seen = []

    def spied(x, t, cond=None):
        seen.append(x)
        return -x

    ours, theirs = space().normaliser, shifted(0.3, 1.25)
    base = gaussian(ours, np.zeros(4), np.ones(4), 50)
    expert = dataclasses.replace(base, space=space(normaliser=theirs))
    expert = dataclasses.replace(expert, denoiser=cast(Any, Spied(spied, base.denoiser.schedule)))
    score, _ = expert_in_base_coordinates(base, expert)
    start = jnp.array([1.0, -1.0, 0.5, 0.0])  # metres and metres a second
    for level in (0, 25, 40, 49):
        x = jax.random.normal(jax.random.key(level), (1, 8, 4))
        x = x.at[:, 0].set(jnp.asarray(ours.normalise(start)))
        seen.clear()
        score(x, jnp.array([level]))
        assert len(seen) == 2
        for own in seen:
            np.testing.assert_allclose(theirs.restore(own[0, 0]), start, atol=1e-5)
            assert float(jnp.abs(own[0, 1:] - theirs.normalise(ours.restore(x[0, 1:]))).max()) > 0


@struct.dataclass
class Spied:
    function: Any = struct.field(pytree_node=False)
    schedule: Schedule

    def __call__(self, x, t, cond=None):
        return self.function(x, t)


def test_scales_that_differ_by_dimension():
    n = space().normaliser

    def converted(factors: list[float]):
        scale = n.scale * np.asarray(factors, np.float32)
        return expert_in_base_coordinates(
            model(), model(1, normaliser=Normaliser(n.offset, scale, n.kind))
        )

    ((note,),) = converted([1.2, 1.2, 1.1, 1.1])[1:]
    assert "by a factor of up to 1.2)" in note and "(it is up to 1.04 from its mean)" in note
    with pytest.raises(InputError, match=r"differs by dimension \(up to 2\.28 .* \(--init\)"):
        converted([3, 1, 1, 1])
