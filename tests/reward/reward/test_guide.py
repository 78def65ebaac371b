"""Steered sampling, with each sampler: Diffuser's step in PyTorch, and known distributions."""

import functools
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import struct

from common_jax.errors import InputError
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.process import Pinned, first_state, q_sample
from reward_jax.diffusion.samplers import DDIM, Ancestral
from reward_jax.diffusion.schedule import cosine_schedule, linear_schedule
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.reward.extract import init_params
from reward_jax.reward.gradients import ScoreDifference, ValueGuide, gradient_of
from reward_jax.reward.guide import GuidanceOptions, guided_sample, sweep
from reward_jax.reward.relative import RelativeReward
from tests.compiled import compilations
from tests.reward import torch_reference as ref
from tests.reward.closed_forms import LogRatio, Mixture, mixture

H, D, A, T = 4, 5, 2, 10
SCHEDULE = cosine_schedule(T)
SHAPE = (6, H, D)
NET = WindowMLP(None, (16,))
SAMPLERS: dict[str, dict[str, Any]] = {
    "ancestral": {},
    "ddim": {"sampler": "ddim"},
    "ddim of 4": {"sampler": "ddim", "sampling_steps": 4, "eta": 0.7},
}
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


class Linear:
    """A denoiser that both sides can have without weights to carry over: x_0 = tanh(x M)."""

    def apply(self, variables, x, t):
        return jnp.tanh(x @ variables["params"])


LINEAR = Linear()  # one for all tests: static arguments are told apart by identity


@pytest.fixture(scope="module")
def base():
    matrix = jax.random.normal(jax.random.key(0), (D, D))
    return score_from(LINEAR, matrix, "x0", SCHEDULE, clip=0.9)


@pytest.fixture(scope="module")
def reward():
    params = jax.jit(functools.partial(init_params, NET))(jax.random.key(1), jnp.zeros(SHAPE))
    return RelativeReward(params, SCHEDULE, NET)


@struct.dataclass
class Bowl:
    """-|x - centre|^2 / 2, with a unit of its own: a guide whose gradient is known."""

    centre: Any

    def gradient(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        return gradient_of(lambda x: self.learned(x) * (1 + t).astype(x.dtype), x)

    def learned_gradient(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        return gradient_of(self.learned, x)

    def learned(self, x: jax.Array) -> jax.Array:
        return -jnp.square(x - jnp.asarray(self.centre)[None]).reshape(len(x), -1).sum(1) / 2


class TorchBowl(torch.nn.Module):
    def __init__(self, centre: np.ndarray) -> None:
        super().__init__()
        self.centre = torch.from_numpy(np.array(centre))

    def forward(self, x, cond, t):
        return -((x - self.centre) ** 2).flatten(1).sum(1, True) / 2


class TorchLinear(torch.nn.Module):
    def __init__(self, matrix: np.ndarray) -> None:
        super().__init__()
        self.matrix = torch.from_numpy(np.array(matrix))

    def forward(self, x, cond, t):
        return torch.tanh(x @ self.matrix)


def steered(
    base, guide=None, *, key=None, pinned=None, cond=None, chain=False, warm=None, **options
):
    """Samples of SHAPE; options: of `GuidanceOptions`."""
    return guided_sample(
        base,
        SCHEDULE,
        SHAPE,
        key=jax.random.key(2) if key is None else key,
        guide=guide,
        options=GuidanceOptions(**options),
        pinned=pinned,
        cond=cond,
        warm=warm,
        chain=chain,
    )


@each_sampler
def test_scale_zero_is_unguided_to_the_last_bit(base, reward, sampler):
    pinned = first_state(jnp.full((6, D - A), 0.3), H, D)
    run = functools.partial(steered, base, pinned=pinned, **sampler)
    plain = run()
    np.testing.assert_array_equal(plain, run(reward, scale=0.0))
    np.testing.assert_array_equal(plain, run(reward, scale=2.0, t_stopgrad=T))
    some = run(reward, scale=5.0)
    assert np.abs(some - plain).max() > 1e-3
    np.testing.assert_array_equal(some[:, 0, A:], pinned.value[:, 0, A:])


@each_sampler
def test_a_gradient_that_is_not_finite_stays_out_where_there_is_no_guidance(base, sampler):
    bad = Bowl(jnp.full((H, D), jnp.nan))
    scales = jnp.array([0.0, 0, 0, 0, 0, 1])
    for options in (dict(scale=0.0), dict(t_stopgrad=T), dict(scale=scales, t_stopgrad=2)):
        got = steered(base, bad, **options, **sampler)
        assert np.isfinite(got[:5]).all()
    assert not np.isfinite(got[5]).all()


@struct.dataclass
class Counted:
    """A guide that notes the steps at which it is asked."""

    asked: ClassVar[list[int]] = []

    def gradient(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        jax.debug.callback(lambda t: self.asked.append(int(t[0])), t)
        return jnp.ones_like(x)


@each_sampler
def test_no_gradient_is_computed_where_no_row_is_steered(base, sampler):
    levels = [9, 7, 4, 1] if "eta" in sampler else list(range(T - 1, -1, -1))
    rows, stops = jnp.array([0.0, 0, 2, 0, 0, 0]), jnp.array([9, 8, 5, 9, 9, 9])
    for options, lowest in (
        (dict(scale=0.0), T),
        (dict(scale=1.0), 0),
        (dict(scale=1.0, t_stopgrad=T), T),
        (dict(scale=1.0, t_stopgrad=6), 6),
        (dict(scale=rows, t_stopgrad=3), 3),  # one row is enough
        (dict(scale=1.0, t_stopgrad=stops), 5),
        (dict(scale=jnp.zeros(6)), T),
    ):
        Counted.asked.clear()
        steered(base, Counted(), n_guide_steps=2, **options, **sampler)
        jax.effects_barrier()
        wanted = [t for t in levels for _ in range(2) if t >= lowest]
        assert sorted(Counted.asked, reverse=True) == wanted


# What scale 1 samples


FINE = cosine_schedule(150)


@functools.cache
def gaussians(dimensions: int) -> tuple[Mixture, Mixture]:
    made = (mixture(3 + i, FINE, dimensions=dimensions, components=1, apart=1.5) for i in (0, 1))
    return next(made), next(made)


def guides(base: Mixture, expert: Mixture) -> dict[str, Any]:
    """Two that are exact."""
    return {
        "reward": ValueGuide(LogRatio(base, expert)),
        "difference": ScoreDifference(base, expert),
    }


def assert_samples_of(wanted: Mixture, x: jax.Array, mean: float, spread: float) -> None:
    covariance = np.asarray((wanted.axes * wanted.spread[:, None]) @ wanted.axes.mT)[0]
    values = np.asarray(x, np.float64)
    np.testing.assert_allclose(values.mean(0), wanted.means[0], atol=mean)
    np.testing.assert_allclose(np.cov(values.T), covariance, atol=spread)


@pytest.mark.parametrize("kind", ["reward", "difference"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_exact_reward_makes_the_base_sample_the_expert(kind, scale):
    """Scale 1 of the step "posterior_mean": mean and covariance are the expert's."""
    base, expert = gaussians(2)
    x = guided_sample(
        base,
        FINE,
        (8000, 2),
        key=jax.random.key(3),
        guide=guides(base, expert)[kind],
        options=GuidanceOptions(scale),
    )
    # 150 steps, and the expert's mean taken a little off x_t: a few hundredths are lost.
    assert_samples_of(expert if scale else base, x, 0.06, 0.08)


@pytest.mark.parametrize("kind", ["reward", "difference"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [7, 30, None])
def test_under_ddim_every_move_is_the_experts(kind, steps, eta):
    """Whatever the number of steps: what is left is the sampler's error, which the expert has."""
    base, expert = gaussians(2)
    run = functools.partial(guided_sample, schedule=FINE, shape=(4000, 2), key=jax.random.key(4))
    options = GuidanceOptions(sampler="ddim", sampling_steps=steps, eta=eta)
    x = run(base, guide=guides(base, expert)[kind], options=options)
    own = run(expert, options=options)
    # 1 / sqrt(abar) at the first step, 3000, is how much larger rounding of a score becomes.
    np.testing.assert_allclose(x, own, atol=5e-3)
    if steps is None:
        assert_samples_of(expert, x, 0.06, 0.08)
    elif steps == 30:
        assert_samples_of(expert, x, 0.06, 0.15)


def test_the_difference_of_one_model_is_its_own_samples(base):
    """And the difference of two plain functions is a guide, as any two scores are."""
    np.testing.assert_array_equal(steered(base, ScoreDifference(base, base)), steered(base))
    other = score_from(LINEAR, -base.params, "x0", SCHEDULE)
    plain = ScoreDifference(lambda x, t: base(x, t), lambda x, t: other(x, t))
    got = steered(base, plain, sampler="ddim")
    np.testing.assert_allclose(got, steered(base, ScoreDifference(base, other), sampler="ddim"))
    assert np.abs(got - steered(base, sampler="ddim")).max() > 0.1


def test_the_guided_estimate_is_clipped_as_the_bases_is(base):
    """DDIM's last move leads to the estimate itself."""
    far = ScoreDifference(base, lambda x, t: base(x, t) + 50.0)
    x = steered(base, far, sampler="ddim", sampling_steps=3)
    np.testing.assert_allclose(x, 0.9, rtol=1e-6)


# Steps and their units


@pytest.mark.parametrize("by_variance", [False, True])
@pytest.mark.parametrize("guide_steps, t_stopgrad", [(1, 0), (2, 4), (3, 9)])
def test_a_chain_is_the_references_step_by_step(by_variance, guide_steps, t_stopgrad):
    """step="learned" is the authors' guide, which adds the network's own gradient."""
    keys = jax.random.split(jax.random.key(4), 4)
    matrix = jax.random.normal(keys[0], (D, D)) / 2
    centre = jax.random.normal(keys[1], (H, D))
    state = jax.random.normal(keys[2], (6, D - A))
    chain = guided_sample(
        score_from(LINEAR, matrix, "x0", SCHEDULE, clip=1.0),
        SCHEDULE,
        SHAPE,
        key=keys[3],
        guide=Bowl(centre),
        options=GuidanceOptions(
            scale=0.13,
            t_stopgrad=t_stopgrad,
            n_guide_steps=guide_steps,
            step="learned",
            scale_by_variance=by_variance,
        ),
        pinned=first_state(state, H, D),
        chain=True,
    )
    assert chain.shape == (T + 1, *SHAPE)
    theirs = ref.GaussianDiffusion(TorchLinear(matrix), H, D, A, T, clip=True)  # pyright: ignore[reportArgumentType]
    cond = {0: torch.from_numpy(np.array(state))}
    noise = jax.random.split(jax.random.split(keys[3])[1], T)
    for i, level in enumerate(range(T - 1, -1, -1)):
        drawn = jax.random.normal(noise[i], SHAPE)
        x, z = (torch.from_numpy(np.array(v)) for v in (chain[i], drawn))
        wanted = ref.guided_p_sample(
            theirs,
            TorchBowl(centre),  # pyright: ignore[reportArgumentType]
            x,
            cond,
            torch.full((6,), level),
            z,
            scale=0.13,
            t_stopgrad=t_stopgrad,
            guide_steps=guide_steps,
            by_variance=by_variance,
        )
        np.testing.assert_allclose(chain[i + 1], theirs.impose(wanted, cond), atol=2e-5)


@pytest.mark.parametrize("step", ["posterior_mean", "variance", "score", "learned"])
def test_how_far_scale_1_goes(step):
    """On a base of one point, x_{t-1} - x_{t-1 unguided} is the climb times a known factor."""
    base = score_from(LINEAR, jnp.zeros((D, D)), "x0", SCHEDULE)
    run = functools.partial(steered, base, Bowl(jnp.ones((H, D))), chain=True, step=step)
    x, y = run(t_stopgrad=T - 1), run(scale=0.0)
    table = {
        "posterior_mean": SCHEDULE.mean_per_score,
        "variance": SCHEDULE.posterior_variance,
        "score": jnp.ones(T),
        "learned": jnp.ones(T),
    }[step]
    far = table[-1] * (1 if step == "learned" else T) * SCHEDULE.posterior_xt[-1]
    np.testing.assert_allclose(x[1] - y[1], far * (1 - y[0]), rtol=1e-4, atol=1e-5)


@struct.dataclass
class Slope:
    """Everywhere one way, three times as far in a unit of its own."""

    def gradient(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        return jnp.ones_like(x)

    def learned_gradient(self, x: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        return 3 * jnp.ones_like(x)


@pytest.mark.parametrize(
    "step, by_variance",
    [("posterior_mean", False), ("variance", True), ("score", False), ("learned", False)],
)
def test_a_scale_goes_as_far_under_ddim(step, by_variance):
    """With the ancestral noise k(t) a diffusion step, however many a move takes; without half."""
    fine = cosine_schedule(200)
    base = score_from(LINEAR, jnp.zeros((D, D)), "x0", fine)
    k = {
        "posterior_mean": fine.mean_per_score,
        "variance": fine.posterior_variance,
        "score": jnp.ones(200),
        "learned": 3 * jnp.ones(200),
    }[step] * (fine.posterior_variance if by_variance else 1)

    def moved(count: int, eta: float) -> np.ndarray:
        """How far the guide moves x in the move that begins at t = 159."""

        def chain(stop: int) -> np.ndarray:
            options = GuidanceOptions(
                0.5, stop, 1, step, by_variance, sampler="ddim", sampling_steps=count, eta=eta
            )
            x = guided_sample(
                base,
                fine,
                (1, 2, D),
                key=jax.random.key(5),
                guide=Slope(),
                options=options,
                chain=True,
            )
            return np.asarray(x)

        return (chain(159) - chain(160))[40 * count // 200 + 1]

    np.testing.assert_allclose(moved(200, 1.0), 0.5 * k[159], rtol=1e-3)
    np.testing.assert_allclose(moved(200, 0.0), 0.25 * k[159], rtol=0.03)
    np.testing.assert_allclose(moved(20, 1.0), 0.5 * k[150:160].sum(), rtol=0.15)
    np.testing.assert_allclose(moved(20, 0.0), 0.25 * k[150:160].sum(), rtol=0.3)


def test_sweep_is_single_calls(base, reward):
    scales, stops = [0.0, 1.5, 8.0], [0, 5]
    pinned = first_state(jax.random.normal(jax.random.key(6), (6, D - A)), H, D)
    options = GuidanceOptions(n_guide_steps=2)
    with compilations() as compiled:
        got = sweep(
            base,
            SCHEDULE,
            SHAPE,
            key=jax.random.key(2),
            guide=reward,
            scales=scales,
            t_stopgrads=stops,
            options=options,
            pinned=pinned,
        )
    assert [name for name in compiled if "_sample" in name] == ["jit(_sample)"]
    assert got.shape == (3, 2, *SHAPE)
    run = functools.partial(steered, base, reward, pinned=pinned, n_guide_steps=2)
    for i, scale in enumerate(scales):
        for j, stop in enumerate(stops):
            np.testing.assert_allclose(got[i, j], run(scale=scale, t_stopgrad=stop), atol=2e-5)
    np.testing.assert_allclose(got[0, 0], got[0, 1], atol=1e-6)
    assert np.abs(got[2, 0] - got[0, 0]).max() > 1e-3
    np.testing.assert_array_equal(
        got[:, :, :, 0, A:], np.broadcast_to(pinned.value[:, 0, A:], (3, 2, 6, D - A))
    )


def test_other_numbers_compile_nothing_anew(base, reward):
    run = functools.partial(steered, base, reward, sampler="ddim", sampling_steps=3)
    first = run(scale=2.0, t_stopgrad=1, temperature=1.0, eta=0.5)
    with compilations() as compiled:
        for changed in (
            dict(scale=3.0),
            dict(t_stopgrad=8),
            dict(t_startgrad=4),
            dict(temperature=0.1),
            dict(eta=0.0),
            dict(scale=jnp.float32(1.0), eta=jnp.float32(1.0)),
        ):
            numbers: dict[str, Any] = dict(scale=2.0, t_stopgrad=1, temperature=1.0, eta=0.5)
            numbers |= changed
            assert np.abs(run(**numbers) - first).max() > 1e-4, changed
    assert not [name for name in compiled if "_sample" in name]


@each_sampler
def test_a_scale_and_a_t_stopgrad_for_every_row(base, reward, sampler):
    scales = jnp.array([0.0, 1.0, 0.0, 3.0, 10.0, 0.5])
    run = functools.partial(steered, base, reward, **sampler)
    got = run(scale=scales)
    for scale in (0.0, 3.0, 10.0):
        rows = np.asarray(scales) == scale
        np.testing.assert_allclose(got[rows], run(scale=scale)[rows], atol=2e-5)
    stops = jnp.array([0, 5, 0, 5, 10, 10])
    for name in ("t_stopgrad", "t_startgrad"):
        got = run(**{"scale": 4.0, name: stops})
        for stop in (0, 5, 10):
            rows = np.asarray(stops) == stop
            np.testing.assert_allclose(
                got[rows], run(**{"scale": 4.0, name: stop})[rows], atol=2e-5
            )


@each_sampler
def test_guidance_between_two_steps_alone(base, reward, sampler):
    """By a guide that is NaN elsewhere."""

    @struct.dataclass
    class Between:
        def gradient(self, x, t, cond=None):
            inside = ((t >= 2) & (t <= 6))[:, None, None]
            return jnp.where(inside, reward.gradient(x, t), jnp.nan)

    got = steered(base, Between(), scale=4.0, t_stopgrad=2, t_startgrad=6, **sampler)
    assert bool(jnp.isfinite(got).all())
    cut = steered(base, reward, scale=4.0, t_stopgrad=2, t_startgrad=6, **sampler)
    np.testing.assert_allclose(got, cut, atol=1e-6)
    assert np.abs(got - steered(base, reward, scale=4.0, t_stopgrad=2, **sampler)).max() > 1e-3
    all_of_it = steered(base, reward, scale=4.0, **sampler)
    np.testing.assert_array_equal(
        steered(base, reward, scale=4.0, t_startgrad=T - 1, **sampler), all_of_it
    )


@each_sampler
def test_a_warm_start_is_the_rest_of_a_chain(base, reward, sampler):
    """From the noised estimate on, the same moves; with all but one step left out, the model's."""
    warm = jax.random.normal(jax.random.key(9), SHAPE)
    made = GuidanceOptions(**sampler).made_sampler()
    levels = np.asarray(made.timesteps(SCHEDULE))
    skip = len(levels) - 2
    chain = steered(base, reward, warm=warm, skip=skip, chain=True, **sampler)
    assert chain.shape == (3, *SHAPE)
    first, _ = jax.random.split(jax.random.key(2))
    noise = jax.random.normal(first, SHAPE)
    t = jnp.full(SHAPE[:1], levels[skip])
    np.testing.assert_allclose(chain[0], q_sample(SCHEDULE, warm, t, noise), atol=1e-5)
    # Without noise, each move follows from x_t alone: those of a chain that begins there.
    if made.__class__ is DDIM:
        calm = dict(sampler) | {"eta": 0.0}
        got = steered(base, reward, warm=warm, skip=skip, chain=True, **calm)
        again = steered(base, reward, warm=warm, skip=skip + 1, chain=True, **calm)
        assert np.abs(got[-1] - again[-1]).max() > 1e-3
    zero = steered(base, reward, warm=warm, skip=0, scale=0.0, **sampler)
    assert np.abs(zero - steered(base, reward, scale=0.0, **sampler)).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(skip=-3, warm=True), "skip must be 0 or more, not -3"),
        (dict(skip=5), "skip 5 is of a warm start: give warm, or leave skip out"),
        (dict(temperature=-1.0), "temperature must be 0 or more, not -1.0"),
        (dict(scale=float("nan")), "scale must be a finite number, not nan"),
        (dict(scale="a"), "scale must be a finite number, not 'a'"),
        (dict(t_stopgrad=2.7), "t_stopgrad must be 0 or more, not 2.7"),
        (dict(n_guide_steps=1.5), "n_guide_steps must be 1 or more, not 1.5"),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(given),
)
def test_numbers_beyond_their_range(base, options, said):
    warm = jnp.zeros(SHAPE) if options.pop("warm", False) else None
    with pytest.raises(InputError, match=re.escape(said)):
        steered(base, warm=warm, **options)


def test_what_are_no_options_and_no_shape(base):
    key = jax.random.key(0)
    with pytest.raises(InputError, match=r"options are \{\}: give GuidanceOptions"):
        guided_sample(base, SCHEDULE, SHAPE, key=key, options={})  # pyright: ignore
    with pytest.raises(InputError, match="shape is 4: give that of the samples"):
        guided_sample(base, SCHEDULE, 4, key=key)  # pyright: ignore


@each_sampler
def test_warm_starts_that_cannot_be(base, sampler):
    warm = jnp.zeros(SHAPE)
    with pytest.raises(InputError, match="warm is not finite: give estimates of x_0"):
        steered(base, warm=warm * jnp.nan, **sampler)
    with pytest.raises(InputError, match="warm has the shape list, the samples"):
        steered(base, warm=[1.0], **sampler)
    with pytest.raises(InputError, match=r"leaves none of the sampler's \d+ steps: lower it"):
        steered(base, warm=warm, skip=T, **sampler)
    with pytest.raises(InputError, match=r"warm has the shape \(2, 4, 5\), the samples \(6, 4, 5"):
        steered(base, warm=warm[:2], **sampler)


@pytest.mark.parametrize("sampler", [{}, dict(sampler="ddim", eta=1.0)], ids=str)
def test_chain_ends_in_the_samples_and_temperature_scales_the_noise(base, sampler):
    run = functools.partial(steered, base, **sampler)
    chain = run(chain=True)
    np.testing.assert_array_equal(chain[-1], run())
    cold, half = run(temperature=0.0, chain=True), run(temperature=0.5, chain=True)
    np.testing.assert_array_equal(cold[0], chain[0])
    np.testing.assert_allclose(half[1] - cold[1], (chain[1] - cold[1]) / 2, atol=1e-5)
    assert np.abs(chain[1] - cold[1]).max() > 0.1


@each_sampler
def test_a_condition_reaches_the_base_and_the_guide(sampler):
    class Told:
        def apply(self, variables, x, t, cond):
            return jnp.zeros_like(x) + cond["a"][:, None, None] + cond["b"][1]

    @struct.dataclass
    class Toward:
        """A climb that leads nowhere but for a row whose condition says so."""

        def gradient(self, x, t, cond: Any = None):
            return jnp.where(cond["a"] == 5, 1e3, 0.0)[:, None, None] * jnp.ones_like(x)

    rows = jax.random.normal(jax.random.key(1), (6, H, D))
    cond = {"a": jnp.arange(6.0), "b": (jnp.zeros(6), rows)}  # a tree of anything [B, ...]
    base = score_from(Told(), {}, "x0", SCHEDULE)
    wanted = cond["a"][:, None, None] + rows
    np.testing.assert_allclose(steered(base, cond=cond, **sampler), wanted, atol=1e-4)
    x = steered(base, Toward(), cond=cond, step="score", t_stopgrad=3, chain=True, **sampler)
    y = steered(base, Toward(), cond=cond, scale=0.0, chain=True, **sampler)
    moved = np.abs(np.asarray(x - y)).max((0, 2, 3)) > 1
    np.testing.assert_array_equal(moved, [False] * 5 + [True])


# What is refused


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(step="mean"), "step 'mean' is unknown; known are posterior_mean,"),
        (dict(n_guide_steps=0), "n_guide_steps must be 1 or more, not 0"),
        (dict(sampler="pndm"), "sampler 'pndm' is unknown; known are ancestral, ddim"),
        (dict(sampling_steps=5), "the ancestral sampler takes every diffusion step: leave the"),
        (dict(sampler="ddim", sampling_steps=11), "steps must be 1 to 10, .* not 11"),
        (dict(sampler="ddim", sampling_steps=0), "steps must be 1 to 10, .* not 0"),
        (dict(sampler="ddim", eta=1.5), "eta must be 0 to 1, not 1.5"),
        (dict(sampler=DDIM(), sampling_steps=5), "sampling_steps are the named samplers': this"),
    ],
)
def test_bad_options(base, reward, options, said):
    with pytest.raises(InputError, match=said):
        steered(base, reward, **options)


@struct.dataclass
class Narrow:
    """A guide of another shape than x."""

    def gradient(self, x, t, cond=None):
        return x[..., :1]


@pytest.mark.parametrize("sampler", [{}, dict(sampler="ddim")])
def test_what_would_be_broadcast_is_refused(base, sampler):
    """Each went on with numbers of something else, or ended in JAX's insides."""
    guide: Any = Narrow()
    shape, short = list(SHAPE), [*SHAPE[:-1], 1]
    said = re.escape(f"a guide gives {short} for x_t of {shape}: its output must have the shape")
    with pytest.raises(InputError, match=said):
        steered(base, guide, **sampler)
    said = re.escape(f"a score gives {short} for x_t of {shape}")
    with pytest.raises(InputError, match=said):
        steered(lambda x, t: x[..., :1], **sampler)
    with pytest.raises(
        InputError, match=r"scale or t_stopgrad has shape \[3\]: give a number, or"
    ):
        steered(base, guide, scale=jnp.ones(3), **sampler)
    many = Pinned(jnp.ones((3 * SHAPE[0], 1, 1), bool), jnp.zeros(()))
    with pytest.raises(InputError, match="a pin gives"):
        guided_sample(base, SCHEDULE, (1, *SHAPE[1:]), key=jax.random.key(0), pinned=many)
    for bad in ((), (0, H, D), (-1, H, D), (2.0, H, D)):
        said = re.escape(f"shape is {bad}: give that of the samples")
        with pytest.raises(InputError, match=said):
            guided_sample(base, SCHEDULE, bad, key=jax.random.key(0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="base_score is a NoneType: give a callable"):
        steered(None, **sampler)
    for key in (0, None, "a"):
        with pytest.raises(InputError, match=f"key is {key!r}: give one key"):
            guided_sample(base, SCHEDULE, SHAPE, key=key)  # pyright: ignore[reportArgumentType]


def test_what_is_no_guide(base):
    scalar: Any = LogRatio(*gaussians(2))
    with pytest.raises(
        InputError, match="LogRatio is no guide, for it has no gradient.*ValueGuide"
    ):
        steered(base, scalar)


def test_a_sampler_may_be_given_itself(base, reward):
    for named, sampler in (({}, Ancestral()), (SAMPLERS["ddim of 4"], DDIM(4, 0.7))):
        wanted = steered(base, reward, **named)
        np.testing.assert_array_equal(steered(base, reward, sampler=sampler), wanted)


def test_models_of_another_schedule_are_refused(base, reward):
    """A longer schedule read the steps that the model does not have from the last one."""
    longer, other = cosine_schedule(T + 1), linear_schedule(T)
    for schedule in (longer, cosine_schedule(T - 1)):
        said = f"base_score has 10 diffusion steps, the schedule {schedule.steps}; give the"
        with pytest.raises(InputError, match=said):
            guided_sample(base, schedule, SHAPE, key=jax.random.key(0))
    with pytest.raises(InputError, match="guide has 11 diffusion steps, the schedule 10"):
        steered(base, reward.replace(schedule=longer))
    with pytest.raises(InputError, match="guide has 11 diffusion steps, the schedule 10"):
        steered(base, ScoreDifference(base, base.replace(schedule=longer)))
    with pytest.raises(InputError, match="guide was made for another schedule .linear; this is c"):
        steered(base, reward.replace(schedule=other))
