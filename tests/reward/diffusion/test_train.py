"""Training a denoiser: the average, the loop, seeds, devices, and that it learns what is known."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from common_jax.errors import InputError
from common_jax.mesh import batch_sharding, make_mesh
from common_jax.partition import shardings
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.process import FirstState
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.sources import Rows, Strided
from reward_jax.diffusion.train import EMA, TrainingOptions, init_state, train_denoiser
from reward_jax.models.temporal.layers import TimeEmbedding
from reward_jax.sharding import RULES, in_use, place
from tests.reward.closed_forms import at_level, mixture

SCHEDULE = cosine_schedule(10)


class Mlp(nn.Module):
    """A denoiser of anything, by v."""

    width: int = 16

    @nn.compact
    def __call__(self, x, t):
        time = TimeEmbedding(8, "silu", name="time")(t)
        y = jnp.concatenate([x.reshape(len(x), -1), time], -1)
        y = nn.silu(nn.Dense(self.width)(y))
        y = nn.silu(nn.Dense(self.width)(y))
        return nn.Dense(x[0].size)(y).reshape(x.shape)


MODEL = Mlp()
KEY = jax.random.key(11)
ADAM = optax.adam(1e-2)  # one for all: a new one is a new program
DATA = Rows(jax.random.normal(jax.random.key(0), (200, 4, 3)))


def train(*, state, steps, batches: Any = DATA, optimizer=ADAM, key=None, **given):
    """`train_denoiser`, with each of its options as a keyword."""
    names = [f.name for f in dataclasses.fields(TrainingOptions)]
    own: Any = dict(batch_size=16, ema=EMA(0.9, 2, 4))
    own |= {n: given.pop(n) for n in names if n in given}
    return train_denoiser(
        MODEL,
        state,
        batches,
        SCHEDULE,
        optimizer,
        steps=steps,
        key=jax.random.key(1) if key is None else key,
        options=TrainingOptions(**own),
        **given,
    )


def fresh(seed=2, **options):
    return init_state(MODEL, ADAM, jnp.zeros((2, 4, 3)), jax.random.key(seed), **options)


def assert_equal(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def assert_close(got, wanted, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, wanted)


def away(a, b):
    return max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b))))  # noqa: B905


@pytest.fixture(scope="module")
def ten():
    return train(state=fresh(), steps=10)


def test_the_average_is_the_authors(ten):
    """Every 2nd step, counted from 0: a copy before step 4, then .9 of the old."""
    states = []
    state = fresh()
    average = state.params
    for step in range(10):
        # Any number of steps draws the same for each: the state after n steps is a run of n.
        states.append(train(state=fresh(), steps=step + 1, steps_per_call=1)[0])
    for step, state in enumerate(states):
        if step % 2 == 0:
            keep = 0.0 if step < 4 else 0.9
            average = jax.tree.map(lambda a, p, k=keep: k * a + (1 - k) * p, average, state.params)
        assert_close(state.average, average, 1e-6)
    assert_close(states[-1], ten[0], 1e-6)  # one step a call, and ten
    assert away(states[-1].average, states[-1].params) > 1e-3


def test_steps_a_call_change_nothing_and_the_callback_hears(ten):
    heard = []
    state, metrics = train(
        state=fresh(), steps=10, steps_per_call=4, on_step=lambda n, m: heard.append((n, m))
    )
    assert_close(state, ten[0], 1e-6)
    np.testing.assert_allclose(metrics["loss"], ten[1]["loss"], rtol=1e-5)
    assert metrics["loss"].shape == (10,)
    assert [n for n, _ in heard] == [4, 8, 10]
    assert [len(m["loss"]) for _, m in heard] == [4, 4, 2]


def test_resume_is_exact(tmp_path, ten):
    """Killed after 6 of 10 steps, gone on with from the checkpoint of step 4."""
    whole, _ = train(state=fresh(), steps=10, steps_per_call=2)
    folder = tmp_path / "run"

    class Killed(Exception):
        pass

    def kill(done, _):
        if done == 6:
            raise Killed

    options: Any = dict(steps=10, steps_per_call=2, checkpoints=folder, save_every=2)
    with pytest.raises(Killed):
        train(state=fresh(), on_step=kill, **options)
    with pytest.raises(InputError, match="the run there has params '"):
        train(state=fresh(seed=9), **options)
    state, metrics = train(state=fresh(), **options)
    assert_equal(state, whole)
    assert metrics["loss"].shape == (6,)  # from step 4: the one of step 6 was not yet written
    again, metrics = train(state=fresh(), **options)  # nothing is left to do
    assert_equal(again, whole)
    assert metrics == {}
    with pytest.raises(InputError, match="the run there has batch_size 16, not 8; give the same"):
        train(state=fresh(), batch_size=8, **options)


def test_a_diverging_loss_names_its_step_and_keeps_the_checkpoint(tmp_path):
    hot = optax.sgd(lambda step: jnp.where(jnp.asarray(step) < 5, 1e-3, jnp.inf))
    state = init_state(MODEL, hot, jnp.zeros((2, 4, 3)), jax.random.key(2))
    options: Any = dict(optimizer=hot, steps=12, steps_per_call=2, save_every=2)
    with pytest.raises(InputError) as raised:
        train(state=state, checkpoints=tmp_path / "run", **options)
    said = str(raised.value)
    assert said.startswith(
        "the parameters are not finite after step 6; the checkpoint of step 4 is kept; lower"
    )
    assert "\n" not in said
    good, _ = train(
        state=init_state(MODEL, hot, jnp.zeros((2, 4, 3)), jax.random.key(2)),
        **(options | dict(steps=4, checkpoints=tmp_path / "run")),
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(good))


def test_seeds_are_separate_runs():
    """Each seed has its own parameters and draws: as a single run with its key would."""
    state = fresh(seeds=3)
    got, metrics = train(state=state, steps=5, seeds=3)
    assert metrics["loss"].shape == (5, 3)
    keys = jax.random.split(jax.random.key(1), 3)
    for seed in range(3):
        one = fresh(params=jax.tree.map(lambda x: x[seed], fresh(seeds=3).params))  # noqa: B023
        alone, single = train(state=one, steps=5, key=keys[seed])
        assert_close(jax.tree.map(lambda x: x[seed], got), alone)  # noqa: B023
        np.testing.assert_allclose(metrics["loss"][:, seed], single["loss"], rtol=1e-4)


def test_experts_are_separate_runs_on_data_of_their_own():
    """Strided sources, as the maze study has them."""
    flat = jax.random.normal(jax.random.key(3), (2, 50, 3))
    starts = jnp.arange(2 * 20).reshape(2, 20)[:, ::-1] % 40
    sources = Strided(flat, starts, horizon=4, stride=2)
    got, _ = train(state=fresh(seeds=2), batches=sources, steps=5, seeds=2, per_expert=True)
    keys = jax.random.split(jax.random.key(1), 2)
    for i in range(2):
        source = Strided(flat[i], starts[i], horizon=4, stride=2)
        one = fresh(params=jax.tree.map(lambda x: x[i], fresh(seeds=2).params))  # noqa: B023
        alone, _ = train(state=one, batches=source, steps=5, key=keys[i])
        assert_close(jax.tree.map(lambda x: x[i], got), alone)  # noqa: B023


def test_fine_tuning_begins_from_given_parameters():
    params = fresh(5).params
    state = fresh(6, params=params)
    assert_equal((state.params, state.average), (params, params))
    trained, _ = train(state=state, steps=1)
    assert away(trained.params, params) < 0.02  # the given ones are still there: not donated


def lies(x, where) -> bool:
    return x.sharding.is_equivalent_to(where, x.ndim)


LAYOUTS = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (2, 2, 2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_eight_devices_give_what_one_does(ten, layout):
    """One model's output to rounding. What is trained, to a tenth of a step.

    Adam's steps are of one size (1e-2) however small a gradient is: where that is close to 0,
    rounding, which depends on the order of sums, says by how much of a step a parameter moves.
    """
    mesh = make_mesh(*layout)
    x, t = DATA.rows[:16], jnp.arange(16) % 10
    score = jax.jit(lambda params, x, t: MODEL.apply({"params": in_use(params)}, x, t))
    spread = place(ten[0].params, mesh), *jax.device_put((x, t), batch_sharding(mesh, 16))
    np.testing.assert_allclose(score(*spread), score(ten[0].params, x, t), rtol=1e-5, atol=1e-5)
    state, metrics = train(state=fresh(), steps=10, mesh=mesh)
    where = shardings(state, RULES, mesh)
    assert all(jax.tree.leaves(jax.tree.map(lies, state, where)))
    np.testing.assert_allclose(metrics["loss"], ten[1]["loss"], rtol=2e-4)
    assert_close(state.params, ten[0].params, 1e-3)


def test_eager_is_jit():
    """With a small model: outside jit every operation of it is compiled by itself."""

    class Linear:
        def apply(self, variables, x, t):
            return jnp.tanh(x @ variables["params"]["w"])

    model, sgd = Linear(), optax.sgd(0.1)
    params = {"w": jax.random.normal(jax.random.key(4), (3, 3))}

    def run():
        state = init_state(model, sgd, DATA.rows, jax.random.key(0), params=params)
        return train_denoiser(
            model, state, DATA, SCHEDULE, sgd, steps=2, key=jax.random.key(1),
            options=TrainingOptions(8, prediction="x0"), pin=FirstState(1),
        )  # fmt: skip

    wanted, metrics = run()
    with jax.disable_jit():
        got, eager = run()
    np.testing.assert_allclose(eager["loss"], metrics["loss"], rtol=1e-4)
    assert_close(got, wanted)


def test_the_given_state_is_clean_in_the_input_and_not_in_the_loss():
    class Look:
        def apply(self, variables, x, t):
            # All error at the first state, and a parameter that counts the noise found there.
            return variables["params"]["b"] * jnp.ones_like(x)

    data = Rows(jnp.zeros((4, 2, 3)).at[:, 0, 1:].set(100.0))
    params = {"b": jnp.float32(0)}
    look, sgd = Look(), optax.sgd(0.0)
    state = init_state(look, sgd, data.rows, jax.random.key(0), params=params)
    run = functools.partial(
        train_denoiser, look, batches=data, schedule=SCHEDULE, optimizer=sgd, steps=1,
        key=jax.random.key(0), options=TrainingOptions(prediction="x0"),
    )  # fmt: skip
    _, pinned = run(state=state, pin=FirstState(1))
    assert pinned["loss"] == 0
    state = init_state(look, sgd, data.rows, jax.random.key(0), params=params)
    _, free = run(state=state)
    np.testing.assert_allclose(free["loss"], 100**2 / 3, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
def test_a_gaussians_exact_denoiser_is_learned(prediction):
    exact = mixture(4, SCHEDULE, dimensions=2, components=1)
    data = exact.draw(jax.random.key(0), 20000)
    model, steps = Mlp(32), 500
    adam = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    state = init_state(model, adam, data[:2], jax.random.key(1))
    state, metrics = train_denoiser(
        model,
        state,
        data,
        SCHEDULE,
        adam,
        steps=steps,
        key=jax.random.key(2),
        options=TrainingOptions(256, 250, prediction=prediction, ema=EMA(0.95, 5, 100)),
    )
    assert metrics["loss"][-20:].mean() < metrics["loss"][:20].mean()
    held_out = exact.draw(jax.random.key(3), 500)
    learned = score_from(model, state.average, prediction, SCHEDULE)
    # x_0 where nothing of it is seen, or the noise where there is none, cannot be judged.
    for t in (3, 5, 7):
        x, level = at_level(SCHEDULE, held_out, t, jax.random.key(t))
        wanted = exact(x, level)
        error = jnp.linalg.norm(learned(x, level) - wanted) / jnp.linalg.norm(wanted)
        assert error < 0.1, (t, error)


class Conditional(nn.Module):
    """A denoiser that is given a tree: rows to be added, and a label that says whether."""

    @nn.compact
    def __call__(self, x, t, cond):
        w = self.param("w", nn.initializers.zeros, ())
        return w * jnp.where((cond["label"] == 1)[:, None, None], cond["rows"], 0)


ROWS = jax.random.normal(jax.random.key(7), (200, 4, 3))
COND = {"rows": ROWS, "label": jnp.ones(200, jnp.int32)}  # the condition is the answer
NULL = {"rows": jnp.zeros(()), "label": jnp.int32(0)}


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_condition_is_a_tree_and_is_dropped_for_that_share_of_rows(share):
    """Where it is dropped the answer is 0, and the loss of those rows is what is left."""
    network, sgd = Conditional(), optax.sgd(0.5)
    options = TrainingOptions(200, 100, prediction="x0")
    state = init_state(network, sgd, (ROWS[:2], jax.tree.map(lambda x: x[:2], COND)), KEY)
    state, metrics = train_denoiser(
        network, state, (ROWS, COND), SCHEDULE, sgd, steps=200, key=KEY, options=options,
        drop_condition=share, null=NULL,
    )  # fmt: skip
    assert abs(float(state.params["w"]) - (share < 1)) < 1e-3
    all_of_it = float(jnp.mean(jnp.square(ROWS)))
    np.testing.assert_allclose(metrics["loss"][100:].mean(), share * all_of_it, rtol=0.05)


def test_no_condition_is_dropped_without_being_asked_to(ten):
    """The draws of a run that drops nothing are what they were; a tree of one array is one."""

    class Ignores(Mlp):
        @nn.compact
        def __call__(self, x, t, cond):
            return Mlp.__call__(self, x, t)

    model = Ignores()
    state, _ = train_denoiser(
        model,
        init_state(model, ADAM, (jnp.zeros((2, 4, 3)), ROWS[:2]), jax.random.key(2)),
        (DATA.rows, ROWS),
        SCHEDULE,
        ADAM,
        steps=10,
        key=jax.random.key(1),
        options=TrainingOptions(16, ema=EMA(0.9, 2, 4)),
    )
    assert_close(state, ten[0], 1e-6)


def test_arrays_are_data(ten):
    for batches in (DATA.rows, np.asarray(DATA.rows)):
        assert_equal(train(state=fresh(), steps=10, batches=batches)[0], ten[0])


@pytest.mark.parametrize(
    "given, said",
    [
        (
            dict(batches=[DATA.rows]),
            "list cannot be drawn from: give an array x_0, (x_0, cond)",
        ),
        (dict(batches=(ROWS, ROWS[:5])), "arrays of one data set have [5, 200] rows"),
        (dict(batches=ROWS[:0]), "arrays of one data set have [0] rows"),
        (dict(drop_condition=0.1), "drop_condition needs null, the condition that a dropped one"),
        (dict(drop_condition=1.1), "drop_condition must be 0 to 1, not 1.1"),
        (dict(drop_condition=0.1, null=NULL), "drop_condition: the batches have no condition"),
        (dict(batch_size=0), "batch_size must be 1 or more, not 0"),
        (dict(steps_per_call=0), "steps_per_call must be 1 or more, not 0"),
        (dict(save_every=0), "save_every must be 1 or more, not 0"),
        (dict(per_expert=True), "per_expert needs seeds: as many as there are data sets"),
        (dict(optimizer=optax.sgd(1e-3, momentum=0.9)), "state was made with another optimizer"),
        (dict(weights=np.ones(5)), "weights have shape [5], which does not fit x_0 of"),
        (dict(weights=np.ones((3, 1, 1, 1))), "weights have shape [3, 1, 1, 1], which does not"),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(given),  # no addresses
)
def test_bad_input(given, said):
    with pytest.raises(InputError, match=re.escape(said)):
        train(state=fresh(), steps=1, **given)


def test_a_state_may_be_trained_from_twice():
    """It is not used up: training donates a copy."""
    state = fresh()
    one, two = (train(state=state, steps=3)[0] for _ in range(2))
    assert_equal(one, two)
    jax.block_until_ready(jax.tree.map(lambda x: x + 0, state.params))


def test_models_states_and_data_that_do_not_fit():
    wide = jnp.zeros((8, *DATA.rows.shape[1:-1], DATA.rows.shape[-1] + 1))
    cases: Any = (
        (dict(batches=wide), "the model cannot be applied to the state's params and rows of ["),
        (dict(pin=lambda x: x), "pin gives a ShapeDtypeStruct: it must give a Pinned"),
    )
    for given, said in cases:
        with pytest.raises(InputError, match=re.escape(said)):
            train(state=fresh(), steps=1, **given)
    with pytest.raises(InputError, match="state is a NoneType: give one of init_state"):
        train(state=None, steps=1)
