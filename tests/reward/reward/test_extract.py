"""The extraction loop: what it is fed, what it shares, parity with PyTorch, exact resume."""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import struct

import reward_jax.reward.extract
import reward_jax.reward.targets
from common_jax.errors import InputError
from common_jax.mesh import batch_sharding, make_mesh, pmap
from common_jax.partition import shardings
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.process import FirstState, q_sample
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.sources import Rows
from reward_jax.diffusion.train import init_state
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.models.temporal.unet import TemporalUnet
from reward_jax.reward.extract import extract_reward, init_params
from reward_jax.reward.relative import RelativeReward, reward_gradient
from reward_jax.reward.targets import ExtractionOptions, draw_targets, unit
from reward_jax.sharding import RULES, in_use, place
from tests.reward import torch_reference as ref

H, D, A, T, B = 4, 3, 1, 10, 16
SCHEDULE = cosine_schedule(T)
NET = WindowMLP(2, (8, 8), embedding=8)
ADAM = optax.adam(1e-2)  # one for all: a new one is a new program
DATA = jax.random.normal(jax.random.key(0), (64, H, D))
KEY = jax.random.key(1)


class Linear:
    """A denoiser, x_0 = tanh(x M), that counts how often it is traced."""

    def __init__(self) -> None:
        self.traces = 0

    def apply(self, variables, x, t):
        self.traces += 1
        return jnp.tanh(x @ variables["params"])


LINEAR = Linear()
MATRICES = jax.random.normal(jax.random.key(2), (4, D, D))
BASE, EXPERT = (score_from(LINEAR, m, "x0", SCHEDULE, clip=0.8) for m in MATRICES[:2])


def with_options(function):
    """The function with each of its options as a keyword, B rows a batch."""
    names = [f.name for f in dataclasses.fields(ExtractionOptions)]

    @functools.wraps(function)
    def call(*args, **given):
        own: Any = {"batch_size": B} | {n: given.pop(n) for n in names if n in given}
        return function(*args, options=ExtractionOptions(**own), **given)

    return call


match, draw_from = with_options(extract_reward), with_options(draw_targets)
extract = functools.partial(match, BASE, EXPERT, NET, schedule=SCHEDULE, optimizer=ADAM, key=KEY)


@functools.cache
def fresh(seed=3, seeds=None):
    init = jax.jit(functools.partial(init_params, NET, seeds=seeds))
    return init(jax.random.key(seed), DATA[:2])


def assert_equal(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def assert_close(got, wanted, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, wanted)


def away(a, b):
    return max(
        float(jnp.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def six():
    return extract(fresh(), DATA, steps=6)


# What is matched


def drawn(step):
    """What step number `step` draws, as the documents say: (x_0, t, noise)."""
    for_rows, for_x_t = jax.random.split(jax.random.fold_in(KEY, step))
    for_t, for_noise = jax.random.split(for_x_t)
    x_0 = Rows(DATA).sample(for_rows, B)
    t = jax.random.randint(for_t, (B,), 0, T)
    return x_0, t, jax.random.normal(for_noise, x_0.shape)


class TorchLinear(torch.nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.matrix = torch.from_numpy(np.array(matrix))

    def forward(self, x, cond, t):
        return torch.tanh(x @ self.matrix)


def test_loss_and_gradient_are_the_authors():
    """Their loss: difference of posterior means, gradient at the base's. Their network, too."""
    x_0, t, noise = drawn(0)
    reference: Any = ref.SingleStepRewardMLP(
        D, dim=2, mults=(4, 2), embed_dim=8, horizon=2, act="mish"
    )
    ref.randomise(reference, 0)
    net = WindowMLP(2, (8, 4, 1), 8, "mish", "strided", "mean", "linear")
    linears: list[Any] = [m for m in reference.modules() if isinstance(m, torch.nn.Linear)]
    names = ["time/first", "time/second", "layer_0", "layer_1", "layer_2", "head"]
    params: Any = {"time": {}}
    for name, linear in zip(names, linears, strict=True):
        *above, last = name.split("/")
        (params["time"] if above else params)[last] = {
            "kernel": jnp.asarray(linear.weight.detach().numpy().T),
            "bias": jnp.asarray(linear.bias.detach().numpy()),
        }
    teachers = [ref.GaussianDiffusion(TorchLinear(m), H, D, A, T, clip=True) for m in MATRICES[:2]]
    base, expert = (score_from(LINEAR, m, "x0", SCHEDULE, clip=1.0) for m in MATRICES[:2])
    theirs = ref.Reward(reference, teachers[1], teachers[0])
    wanted = theirs.loss(*(torch.from_numpy(np.array(v)) for v in (x_0,)), {}, *(  # pyright: ignore
        torch.from_numpy(np.array(v)).long() if v.dtype == jnp.int32
        else torch.from_numpy(np.array(v)) for v in (t, noise)
    ))  # fmt: skip
    wanted.backward()
    rate = 0.5
    trained, history = match(
        base,
        expert,
        net,
        params,
        DATA,
        SCHEDULE,
        optax.sgd(rate),
        steps=1,
        key=KEY,
        target="posterior_mean",
        gradient_at="posterior_mean",
        batch_size=B,
    )
    np.testing.assert_allclose(history.loss[0], wanted.item(), rtol=1e-4)
    gradient = jax.tree.map(lambda a, b: (a - b) / rate, params, trained)
    for name, linear in zip(names, linears, strict=True):
        *above, last = name.split("/")
        got = (gradient["time"] if above else gradient)[last]
        size = float(linear.weight.grad.abs().max())
        np.testing.assert_allclose(got["kernel"], linear.weight.grad.T, atol=1e-3 * size + 1e-6)
    # And the reward itself, and its gradient in x.
    x_t = q_sample(SCHEDULE, x_0, t, noise)
    x, level = torch.from_numpy(np.array(x_t)), torch.from_numpy(np.array(t)).long()
    got: Any = net.apply({"params": params}, x_t, t)
    np.testing.assert_allclose(got, theirs(x, {}, level)[:, 0].detach(), atol=1e-5)
    np.testing.assert_allclose(
        reward_gradient(net, params, x_t, t), theirs.gradient(x, {}, level), atol=1e-5
    )


@pytest.mark.parametrize("gradient_at", ["x_t", "posterior_mean"])
@pytest.mark.parametrize("target", ["score", "epsilon", "posterior_mean"])
def test_the_loss_is_what_is_written(target, gradient_at):
    """w(t) |grad r - u(t) (s_expert - s_base)|^2 by hand, for the first step, pinned."""
    x_0, t, noise = drawn(0)
    pin = FirstState(A)
    weights = np.random.default_rng(0).uniform(0.5, 2, T)
    x_t = pin(x_0)(q_sample(SCHEDULE, x_0, t, noise))
    u = {
        "score": np.ones(T),
        "epsilon": np.asarray(SCHEDULE.sqrt_one_minus_alphas_cumprod),
        "posterior_mean": np.asarray(SCHEDULE.betas / jnp.sqrt(1 - SCHEDULE.betas)),
    }[target]
    np.testing.assert_allclose(unit(SCHEDULE, target), u, rtol=1e-5)
    value = u[t][:, None, None] * (EXPERT(x_t, t) - BASE(x_t, t))
    at = x_t
    if gradient_at == "posterior_mean":
        coefficients = [
            np.asarray(c)[t][:, None, None] for c in (SCHEDULE.posterior_x0, SCHEDULE.posterior_xt)
        ]
        at = coefficients[0] * BASE.x0(x_t, t) + coefficients[1] * x_t
    error = np.array(reward_gradient(NET, fresh(), at, t) - value)
    value = np.array(value)
    for array in (error, value):
        array[:, 0, A:] = 0
    wanted = (weights[t] * (error**2).mean((1, 2))).mean()
    _, history = extract(
        fresh(),
        DATA,
        steps=1,
        target=target,
        gradient_at=gradient_at,
        weighting=weights,
        pin=pin,
    )
    np.testing.assert_allclose(history.loss[0], wanted, rtol=1e-4)
    explained = 1 - (error**2).sum() / (value**2).sum()
    np.testing.assert_allclose(history.explained[0], explained, rtol=1e-3, atol=1e-4)
    assert history.target == target


def test_weightings():
    values = jnp.linspace(0.5, 2, T)
    by_array, one = extract(fresh(), DATA, steps=2, weighting=values)
    by_function, two = extract(fresh(), DATA, steps=2, weighting=lambda t: 0.5 + t / 6)
    assert_close(by_array, by_function, 1e-5)
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-5)
    targets = draw_from(BASE, EXPERT, DATA, SCHEDULE, count=20000, key=KEY, batch_size=500)
    square = np.mean(np.square(targets.value), axis=(1, 2))
    size = np.array([square[targets.t == t].mean() for t in range(T)])
    zero = jax.tree.map(jnp.zeros_like, fresh())  # r = 0: its loss is the standardised square
    _, history = extract(zero, DATA, steps=40, weighting="standardise", batch_size=200)
    np.testing.assert_allclose(history.loss[0], 1, rtol=0.1)
    _, standard = extract(zero, targets, steps=1, weighting="standardise", batch_size=2000)
    size = np.maximum(size, square.mean() / 1000)
    _, by_hand = extract(zero, targets, steps=1, weighting=1 / size, batch_size=2000)
    np.testing.assert_allclose(standard.loss, by_hand.loss, rtol=1e-2)
    _, by_call = extract(zero, lambda step: DATA, steps=1, weighting="standardise")
    np.testing.assert_allclose(by_call.loss[0], 1, rtol=0.3)
    for weighting, said in [
        (
            jnp.ones(T - 1),
            rf"weighting has the shape \(9,\), or is negative or not finite; give {T} numbers",
        ),
        (jnp.full(T, jnp.nan), "or not finite"),
        ("normalise", "weighting 'normalise' is unknown; give values, or standardise"),
        (-np.ones(SCHEDULE.steps), "is negative or not finite"),
    ]:
        with pytest.raises(InputError, match=said):
            extract(fresh(), DATA, steps=1, weighting=weighting)
    with pytest.raises(InputError, match="standardise needs an array, a source or a callable"):
        extract(fresh(), iter([DATA]), steps=1, weighting="standardise")


def test_entries_are_weighted():
    """Ones change nothing; else the loss is the weighted error, by hand."""
    weights = np.ones((H, D), np.float32)
    plain, _ = extract(fresh(), DATA, steps=3)
    same, _ = extract(fresh(), DATA, steps=3, entries=weights)
    assert_close(plain, same, 1e-6)
    weights[0, 0] = 10
    weights[2] = 0
    start = fresh()
    targets = draw_from(BASE, EXPERT, DATA, SCHEDULE, count=B, key=KEY, batch_size=B)
    _, by_hand = extract(start, iter([targets]), steps=1, entries=weights)
    gradient = reward_gradient(NET, start, targets.x, targets.t)
    error = np.square(np.asarray(gradient - targets.value)) * weights
    np.testing.assert_allclose(by_hand.loss[0], error.mean(), rtol=1e-5)
    for bad in (np.ones(D), np.ones((H, D + 1)), -weights, weights * np.nan):
        with pytest.raises(InputError, match="entries are of shape .* give a weight for each"):
            extract(fresh(), DATA, steps=1, entries=bad)


# What it is fed


def test_seeds_are_single_runs_that_share_what_is_drawn():
    start = fresh(4, 3)
    got, history = extract(start, DATA, steps=5, seeds=3)
    assert {x.shape[0] for x in jax.tree.leaves(got)} == {3}
    assert history.loss.shape == history.explained.shape == (5, 3)
    reward = RelativeReward(got, SCHEDULE, NET, seeds=3)
    x, t = DATA[:5], jnp.arange(5)
    each = []
    for seed in range(3):
        alone, single = extract(jax.tree.map(lambda x: x[seed], start), DATA, steps=5)  # noqa: B023
        assert_close(jax.tree.map(lambda x: x[seed], got), alone)  # noqa: B023
        np.testing.assert_allclose(history.loss[:, seed], single.loss, rtol=1e-4)
        each.append(RelativeReward(alone, SCHEDULE, NET)(x, t))
        np.testing.assert_allclose(reward.seed(seed)(x, t), each[-1], atol=1e-4)
    np.testing.assert_allclose(reward(x, t), np.mean(each, 0), atol=1e-4)
    for one, index in ((reward, 9), (reward, -1), (reward.seed(0), 0)):
        with pytest.raises(InputError, match=f"there is no seed {index}"):  # it gave the last one
            one.seed(index)
    assert away(*(jax.tree.map(lambda x, i=i: x[i], got) for i in (0, 1))) > 0.1


def test_seeds_that_begin_alike_are_set_apart_by_their_rows():
    alike = jax.tree.map(lambda x: jnp.stack([x] * 3), fresh())
    one, _ = extract(alike, DATA, steps=4, seeds=3)
    other, history = extract(alike, DATA, steps=4, seeds=3, apart=True)
    assert history.loss.shape == (4, 3)
    for found, least in ((one, 0.0), (other, 1e-3)):
        each = [jax.tree.map(lambda x, i=i: x[i], found) for i in range(3)]
        assert all(away(a, b) >= least for a, b in itertools.combinations(each, 2))
    assert away(*(jax.tree.map(lambda x, i=i: x[i], one) for i in (0, 2))) == 0
    # Together they see the rows of one run of three times the batch.
    _, whole = extract(fresh(), DATA, steps=1, batch_size=3 * B)
    np.testing.assert_allclose(history.loss[0].mean(), whole.loss[0], rtol=1e-5)
    assert np.ptp(history.loss[0]) > 1e-3 * whole.loss[0]
    with pytest.raises(InputError, match="a batch of 16 rows cannot be cut into 3 seeds' own"):
        extract(alike, iter([DATA[:16]] * 4), steps=4, seeds=3, apart=True)


def test_every_form_of_batches_is_the_same_run(six):
    """An array, a source, a callable, an iterable, a list, targets: with the same rows in them."""
    by_source, _ = extract(fresh(), Rows(DATA), steps=6)
    assert_equal(by_source, six[0])
    rows = [drawn(step)[0] for step in range(6)]
    by_call, _ = extract(fresh(), lambda step: rows[step], steps=6, steps_per_call=4)
    by_iterable, _ = extract(fresh(), iter(rows), steps=6, steps_per_call=4)
    by_list, _ = extract(fresh(), [np.asarray(x) for x in rows], steps=6)
    for got in (by_call, by_iterable, by_list):
        assert_close(got, six[0], 1e-5)


def test_an_iterable_that_ends_early_names_the_step():
    with pytest.raises(InputError, match="the iterable ended before step 4; give one that is as"):
        extract(fresh(), iter([DATA[:B]] * 3), steps=6, steps_per_call=2)
    endless = itertools.repeat(DATA[:B])
    extract(fresh(), endless, steps=3)
    for batches, said in [
        (3, "batches: int is no array, source, callable or iterable"),
        ((DATA, DATA[:5]), r"arrays of one data set have \[5, 64\] rows"),
        (DATA[:0], r"have \[0\] rows"),
    ]:
        with pytest.raises(InputError, match=said):
            extract(fresh(), batches, steps=1)


def test_a_condition_reaches_both_scores():
    """Scores that are linear in the condition: the wanted gradient is known, and is learned."""

    def base(x, t, cond: Any = None):
        return -x - cond["other"][0]

    def expert(x, t, cond: Any = None):
        return -x + cond["by"][:, None, None] - cond["other"][0]

    class Slope:
        def apply(self, variables, x, t):
            return variables["params"]["w"] * x.sum((1, 2))

    cond = {"by": jnp.full(64, 0.7), "other": (jnp.ones((64, H, D)),)}
    some = jax.tree.map(lambda x: x[:B], cond)
    for batches in ((DATA, cond), lambda step: (DATA[:B], some), [(DATA, cond)] * 100):
        params, _ = match(
            base,
            expert,
            Slope(),
            {"w": jnp.float32(0)},
            batches,
            SCHEDULE,
            optax.sgd(0.5),
            steps=100,
            key=KEY,
            target="score",
            batch_size=B,
        )
        np.testing.assert_allclose(params["w"], 0.7, rtol=1e-3)


def test_targets_are_drawn_once():
    """Cached targets need no teacher; a plain loop over the same draws is the same run."""
    targets = draw_from(BASE, EXPERT, DATA, SCHEDULE, count=100, key=KEY, batch_size=B)
    assert targets.x.shape == (112, H, D) and targets.t.shape == (112,)
    x_0, t, noise = drawn(0)  # the first batch is that of an extraction's first step
    np.testing.assert_array_equal(targets.t[:B], t)
    np.testing.assert_allclose(targets.x[:B], q_sample(SCHEDULE, x_0, t, noise), atol=1e-6)

    def never(x, t, cond=None):
        raise AssertionError("a teacher was asked")

    batches = [jax.tree.map(lambda v: v[i * B : (i + 1) * B], targets) for i in range(6)]  # noqa: B023
    got, _ = match(
        never, never, NET, fresh(), batches, SCHEDULE, ADAM, steps=6, key=KEY, batch_size=B
    )
    wanted, _ = extract(fresh(), DATA, steps=6)
    assert_close(got, wanted, 1e-5)
    params, history = match(
        never,
        never,
        NET,
        fresh(),
        targets,
        SCHEDULE,
        ADAM,
        steps=5,
        key=KEY,
        pin=FirstState(A),
        weighting="standardise",
    )
    assert np.isfinite(history.loss).all()
    with pytest.raises(InputError, match="list_iterator cannot be drawn from: give an array"):
        draw_from(BASE, EXPERT, iter([DATA]), SCHEDULE, count=10, key=KEY)


def test_pinned_entries_are_clean_and_not_matched():
    targets = draw_from(
        BASE, EXPERT, DATA, SCHEDULE, count=50, key=KEY, batch_size=B, pin=FirstState(A)
    )
    x_0 = jnp.concatenate([drawn(step)[0] for step in range(4)])
    np.testing.assert_array_equal(targets.x[:, 0, A:], x_0[:, 0, A:])
    assert not targets.value[:, 0, A:].any()
    free: Any = (
        np.asarray(targets.value).reshape(-1, H * D) != 0
    )  # zero only where both are clipped
    np.testing.assert_array_equal(free.any(0).reshape(H, D)[0], [True, False, False])
    assert free.any(0)[D:].all()


def test_unknown_choices():
    for option, said in [
        (dict(target="noise"), "target 'noise' is unknown; known are epsilon, score"),
        (dict(gradient_at="x_0"), "gradient_at is x_t or posterior_mean, not 'x_0'"),
        (dict(steps=0), "steps must be a whole number, 1 or more, not 0"),
    ]:
        with pytest.raises(InputError, match=said):
            extract(fresh(), DATA, **({"steps": 1} | option))  # pyright: ignore[reportArgumentType]


# The loop


def test_steps_a_call_and_the_callback(six):
    heard = []
    got, history = extract(
        fresh(), DATA, steps=6, steps_per_call=4, on_step=lambda n, m: heard.append((n, set(m)))
    )
    assert_close(got, six[0], 1e-6)
    np.testing.assert_allclose(history.loss, six[1].loss, rtol=1e-5)
    np.testing.assert_array_equal(history.step, [1, 2, 3, 4, 5, 6])
    assert heard == [(4, {"loss", "explained"}), (6, {"loss", "explained"})]
    assert_equal(fresh(), fresh.__wrapped__())  # what was given is not donated


class Killed(Exception):
    pass


def killed_at(step):
    def kill(done, _):
        if done == step:
            raise Killed

    return kill


@pytest.mark.parametrize("form", ["array", "iterable"])
def test_resume_is_exact(tmp_path, form):
    start = fresh(4, 2)

    def batches():
        return DATA if form == "array" else (drawn(step)[0] for step in range(8))

    options: Any = dict(steps=8, steps_per_call=2, seeds=2)
    whole, history = extract(start, batches(), **options)
    options |= dict(checkpoints=tmp_path / "run", save_every=2)
    with pytest.raises(Killed):
        extract(start, batches(), on_step=killed_at(6), **options)
    with pytest.raises(InputError, match="the run there has params '"):
        extract(fresh(7, 2), batches(), **options)
    got, rest = extract(start, batches(), **options)
    assert_equal(got, whole)
    np.testing.assert_array_equal(rest.loss, history.loss[4:])
    np.testing.assert_array_equal(rest.step, [5, 6, 7, 8])
    with pytest.raises(InputError, match="the run there has target 'epsilon', not 'score'"):
        extract(start, batches(), target="score", **options)


def test_a_diverging_loss_names_its_step_and_the_last_good_checkpoint_is_kept(tmp_path):
    """The step that ruins the parameters has a finite loss: it must not be saved as good."""
    hot = optax.sgd(lambda step: jnp.where(step == 5, jnp.inf, 1e-4))
    options: Any = dict(
        optimizer=hot, steps=10, steps_per_call=2, checkpoints=tmp_path / "run", save_every=2
    )
    with pytest.raises(InputError) as raised:
        extract(fresh(), DATA, **options)
    said = str(raised.value)
    assert said.startswith(
        "the parameters are not finite after step 6; the checkpoint of step 4 is kept; lower the"
    )
    assert "\n" not in said
    with pytest.raises(InputError, match="the loss is not finite at step 7; lower"):
        extract(fresh(), DATA, **(options | dict(steps_per_call=10, checkpoints=None)))
    good, history = extract(fresh(), DATA, **(options | dict(steps=4)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(good))
    assert len(history.loss) == 0
    with pytest.raises(InputError, match="the loss is not finite at step 1;"):
        extract(fresh(), lambda step: DATA * jnp.nan, steps=2)


# Compilation and devices


def test_a_second_goal_does_not_compile_again():
    teacher = Linear()
    base = score_from(teacher, MATRICES[0], "x0", SCHEDULE)
    found = []
    for matrix in MATRICES[1:]:
        expert = score_from(teacher, matrix, "x0", SCHEDULE)
        found.append(
            match(
                base, expert, NET, fresh(), DATA, SCHEDULE, ADAM, steps=2, key=KEY, batch_size=B
            )[0]
        )
        if len(found) == 1:
            traces = teacher.traces
    assert teacher.traces == traces
    assert away(found[0], found[1]) > 1e-3


@pytest.mark.parametrize("gradient_at", ["x_t", "posterior_mean"])
def test_each_teacher_is_asked_once(gradient_at):
    asked = Linear()
    base, expert = (score_from(asked, m, "x0", SCHEDULE, clip=0.8) for m in MATRICES[:2])
    draw: Any = dict(count=4, key=jax.random.key(0), batch_size=4, gradient_at=gradient_at)
    found = draw_from(base, expert, DATA, SCHEDULE, **draw)
    assert asked.traces == 1  # one network, compiled once and called for each
    # A plain score has no estimate of x_0 to give: Tweedie's formula takes its one answer.
    plain = [Linear(), Linear()]
    parts = zip(plain, MATRICES, strict=False)
    models: list[Any] = [score_from(n, m, "x0", SCHEDULE, clip=0.8) for n, m in parts]
    scores = [functools.partial(type(m).__call__, m) for m in models]
    again = draw_from(scores[0], scores[1], DATA, SCHEDULE, **draw)
    assert [n.traces for n in plain] == [1, 1]
    assert_close(found, again)
    other = Linear()  # of another network, as far as can be seen
    mixed = score_from(other, MATRICES[1], "x0", SCHEDULE, clip=0.8)
    assert_close(draw_from(base, mixed, DATA, SCHEDULE, **draw), found)
    assert other.traces == 1


@pytest.mark.parametrize("fed", [False, True])
def test_a_call_in_parts_is_the_same_run(six, monkeypatch, fed):
    """Where the targets of a call would be too large to hold."""
    batches = [drawn(step)[0] for step in range(6)] if fed else DATA
    counts = []
    learn = reward_jax.reward.extract.learn

    def counted(state, weights, by_entry, targets, **options):
        counts.append(len(targets.t))
        return learn(state, weights, by_entry, targets, **options)

    monkeypatch.setattr(reward_jax.reward.extract, "learn", counted)
    of_two = 2 * 2 * 4 * B * (H * D + 1)
    for held, wanted in ((0, [1] * 6), (of_two, [2] * 3), (2**28, [6])):
        monkeypatch.setattr(reward_jax.reward.targets, "_BYTES_AT_ONCE", held + 1)
        counts.clear()
        got, history = extract(fresh(), batches, steps=6)
        assert counts == wanted
        np.testing.assert_allclose(history.loss, six[1].loss, rtol=1e-5)
        assert_close(got, six[0], 1e-6)


def test_another_student_finds_the_teachers_compiled():
    teacher = Linear()
    base, expert = (score_from(teacher, m, "x0", SCHEDULE) for m in MATRICES[:2])
    traces = []
    for rate in (1e-2, 2e-2):
        adam = optax.adam(rate)
        match(base, expert, NET, fresh(), DATA, SCHEDULE, adam, steps=2, key=KEY, batch_size=B)
        traces.append(teacher.traces)
    assert traces == [2, 2]  # once to check that it can be called, once for the program


LAYOUTS = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (2, 2, 2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_eight_devices_give_what_one_does(six, layout):
    """Targets and one reward's scores to rounding; what is trained, to a tenth of Adam's step.

    Its steps are of one size (1e-2), also where a gradient is but rounding.
    """
    mesh = make_mesh(*layout)
    x, t = DATA[:16], jnp.arange(16) % T
    score = jax.jit(lambda params, x, t: NET.apply({"params": in_use(params)}, x, t))
    spread = place(six[0], mesh), *jax.device_put((x, t), batch_sharding(mesh, 16))
    np.testing.assert_allclose(score(*spread), score(six[0], x, t), rtol=1e-5, atol=1e-5)
    base, expert = (score_from(Linear(), m, "x0", SCHEDULE) for m in MATRICES[:2])
    draw: Any = dict(count=3 * B, key=KEY, batch_size=B)
    one, spread = (draw_from(base, expert, DATA, SCHEDULE, mesh=m, **draw) for m in (None, mesh))
    assert len(spread.t.sharding.device_set) == 8
    assert_close(spread, one, 1e-5)
    got, history = extract(fresh(), DATA, steps=6, mesh=mesh)
    where = shardings(got, RULES, mesh)
    same = jax.tree.map(lambda x, to: x.sharding.is_equivalent_to(to, x.ndim), got, where)
    assert all(jax.tree.leaves(same))
    np.testing.assert_allclose(history.loss, six[1].loss, rtol=2e-4)
    assert_close(got, six[0], 1e-3)


def test_eager_is_jit():
    """With a small reward: outside jit every operation of it is compiled by itself."""

    class Bowl:
        def apply(self, variables, x, t):
            return jnp.square(x * variables["params"]["w"][None, None]).sum((1, 2))

    bowl, params, sgd = Bowl(), {"w": jnp.linspace(-1, 1, D)}, optax.sgd(0.1)

    def run():
        return match(
            BASE, EXPERT, bowl, params, DATA, SCHEDULE, sgd, steps=2, key=KEY, batch_size=B
        )

    wanted, history = run()
    with jax.disable_jit():
        got, eager = run()
    np.testing.assert_allclose(eager.loss, history.loss, rtol=1e-4)
    assert_close(got, wanted, 1e-5)
    assert away(wanted, params) > 1e-3


def test_scoring_under_pmap():
    reward = RelativeReward(fresh(4, 2), SCHEDULE, NET, seeds=2)
    x, t = DATA[:21], jnp.arange(21) % T
    scored = pmap(lambda r, x, t: r(x, t))(reward, x, t)
    np.testing.assert_allclose(scored, jax.jit(lambda r: r(x, t))(reward), rtol=1e-5, atol=1e-5)


def test_denoising_under_pmap():
    net, x, t = TemporalUnet(D, 16, (1,)), DATA[:21], jnp.arange(21) % T
    params = init_state(net, ADAM, x[:1], KEY).params
    denoiser = score_from(net, params, "v", SCHEDULE)
    scored = pmap(lambda model, x, t: model(x, t))(denoiser, x, t)
    wanted = jax.jit(lambda model: model(x, t))(denoiser)
    np.testing.assert_allclose(scored, wanted, rtol=0, atol=1e-5 * float(jnp.abs(wanted).max()))


@struct.dataclass
class Odd:
    """A source of rows of another width than the network was made for."""

    def sample(self, key, count):
        return jax.random.normal(key, (count, H, D + 1))


class Plain:
    """A source that is no pytree."""

    def sample(self, key, count):
        return DATA[:count]


def as_integers(params):
    return jax.tree.map(lambda x: x.astype(jnp.int32), params)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(batches=Odd()), "base_score cannot be called with x_t of [2, 4, 4] and t: "),
        (dict(params={}), "the reward cannot be applied to its params and rows of [4, 3]: "),
        (dict(params=None), "the reward cannot be applied to its params and rows of [4, 3]: "),
        (dict(params=as_integers), "params: head/bias is int32, not floating numbers"),
        (dict(pin=lambda x: x), "pin gives a ShapeDtypeStruct: it must give a Pinned"),
        (dict(pin=lambda x: x.nothing), "pin cannot be applied to x_0 of [2, 4, 3]: "),
        (dict(batches=Plain()), "Plain is no pytree of arrays: make the source one"),
        (dict(batches=np.ma.masked_array(DATA, False)), "batches: an array is masked: fill it"),
        (dict(on_step=3), "on_step is a int: give a function"),
        (dict(entries="a"), "entries are 'a': give a weight for each entry"),
        (dict(entries=np.zeros((H, D))), "below 0, all 0 or not finite"),
        (dict(base_score=lambda x: x), "base_score cannot be called with x_t of [2, 4, 3] and t"),
        (dict(options=3), "options are 3: give an object of the class of options"),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(given),
)
def test_what_does_not_fit_is_said_in_our_words(changes, said):
    given: dict[str, Any] = dict(
        base_score=BASE, expert_score=EXPERT, reward=NET, params=fresh(), batches=DATA,
        schedule=SCHEDULE, optimizer=ADAM, steps=1, key=KEY,
    )  # fmt: skip
    if callable(changes.get("params")):
        changes = {"params": changes["params"](fresh())}
    with pytest.raises(InputError, match=re.escape(said)) as raised:
        extract_reward(**(given | changes))
    assert "\n" not in str(raised.value)
