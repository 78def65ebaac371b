"""The loop: what a resumed run must share with the one that began, and what it saves."""

import json
import os
import re
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from common_jax.errors import InputError
from common_jax.termination import Terminated
from reward_jax.diffusion.denoiser import Denoiser
from reward_jax.diffusion.loop import LoopOptions, begin, check_seeds, run_loop, steps_done
from reward_jax.diffusion.process import FirstState, Pinned
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.sources import Rows
from reward_jax.diffusion.train import TrainingOptions, init_state, train_denoiser
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.reward.discriminator import train_discriminator
from reward_jax.reward.extract import ExtractionOptions, extract_reward, init_params

KEY = jax.random.key(0)


def count_down(state, first, count):
    (value,) = state
    return (value - count,), {"loss": jnp.full(count, value)}


def test_checkpoints_are_those_that_are_due(tmp_path):
    seen = []
    state, metrics = run_loop(
        count_down,
        (jnp.float32(10),),
        steps=7,
        per_call=2,
        on_step=lambda done, _: seen.append(done),
        directory=tmp_path / "c",
        save_every=3,
    )
    assert seen == [2, 4, 6, 7] and float(state[0]) == 3
    assert metrics["loss"].tolist() == [10, 10, 8, 8, 6, 6, 4]
    assert steps_done(tmp_path / "c") == 7 and steps_done(tmp_path / "none") == 0
    assert sorted(p.name for p in (tmp_path / "c").glob("[0-9]*")) == ["4", "7"]


def test_a_run_that_is_told_to_end_saves_first(tmp_path):
    """And goes on from there, whatever `save_every` is."""

    def run(on_step=None):
        how: dict[str, Any] = dict(steps=8, per_call=2, on_step=on_step)
        return run_loop(count_down, (jnp.float32(10),), directory=tmp_path / "c", **how)

    def tell(done, _):
        if done == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated, match="step 6 of 8 is saved, from which the run goes on"):
        run(tell)
    assert steps_done(tmp_path / "c") == 6
    state, metrics = run()
    assert float(state[0]) == 2 and metrics["loss"].tolist() == [4, 4]


def test_a_run_that_has_gone_further_is_refused(tmp_path):
    """What it gave had more steps than were asked for."""

    def run(steps):
        return run_loop(
            count_down, (jnp.float32(9),), steps=steps, per_call=2, directory=tmp_path / "c"
        )

    run(6)
    with pytest.raises(
        InputError, match="c: the run there has done 6 steps, more than 4; ask for"
    ):
        run(4)
    assert run(6)[1] == {}


def test_a_run_of_another_precision_is_refused(tmp_path):
    """One that began before precisions were stated goes on."""

    def run(steps):
        how: dict[str, Any] = dict(steps=steps, per_call=2)
        return run_loop(count_down, (jnp.float32(10),), directory=tmp_path / "c", **how)

    run(2)
    said = "c: the run there has precision 'float32', not 'bfloat16'; give the same settings"
    with jax.default_matmul_precision("bfloat16"), pytest.raises(InputError, match=said):
        run(4)
    path = tmp_path / "c" / "settings.json"
    path.write_text(json.dumps({"another": 1}))
    assert float(run(4)[0][0]) == 6
    assert json.loads(path.read_text()) == {"another": 1, "precision": "float32"}


def test_seeds_need_an_axis_of_their_own():
    check_seeds({"w": np.zeros((2, 3))}, 2)
    check_seeds({"w": np.zeros(3)}, None)
    with pytest.raises(InputError, match=r"params: a/w has shape \[3\]; with seeds=2 every"):
        check_seeds({"a": {"w": np.zeros(3)}}, 2)
    net, x = WindowMLP(1, (4,), embedding=4), jnp.zeros((4, 2, 2))
    params, schedule, adam = init_params(net, KEY, x), cosine_schedule(4), optax.adam(1e-3)
    said = re.escape("with seeds=2 every parameter has a leading axis of 2")
    with pytest.raises(InputError, match=said):
        extract_reward(_own, _own, net, params, x, schedule, adam, steps=1, key=KEY, seeds=2)
    state = init_state(_Same(), adam, x, KEY)
    with pytest.raises(InputError, match=said):
        train_denoiser(_Same(), state, x, schedule, adam, steps=1, key=KEY, seeds=2)


def _own(x, t, cond=None):
    return -x


class _Same:
    """A denoiser of one parameter."""

    def init(self, key, x, t):
        return {"params": {"w": jnp.ones(())}}

    def apply(self, variables, x, t):
        return variables["params"]["w"] * x


DATA = jax.random.normal(KEY, (12, 2, 2))
NET = WindowMLP(1, (4,), embedding=4)
SCHEDULE = cosine_schedule(4)


def scaled(by):
    return Denoiser({"w": jnp.float32(by)}, SCHEDULE, _Same(), "x0")


def closure(by) -> Any:
    return lambda x, t: by * x


def match(folder, **changes):
    given = {
        **{"base": scaled(0.5), "expert": scaled(0.25), "batches": DATA, "network": NET},
        **{"optimizer": optax.adam(1e-2), "schedule": SCHEDULE, "pin": None, "params": None},
    } | changes
    network = given["network"]
    params = given["params"] or init_params(network, KEY, DATA[:2])
    return extract_reward(
        given["base"],
        given["expert"],
        network,
        params,
        given["batches"],
        given["schedule"],
        given["optimizer"],
        steps=1,
        key=KEY,
        pin=given["pin"],
        checkpoints=folder,
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer": optax.adam(2e-2)}, "optimizer"),
        ({"optimizer": optax.adam(optax.cosine_decay_schedule(1e-2, 9))}, "optimizer"),
        ({"expert": scaled(0.75)}, "expert_score"),
        ({"base": scaled(0.75)}, "base_score"),
        ({"expert": closure(0.5)}, "expert_score"),
        ({"batches": DATA + 1e-3}, "data"),
        ({"batches": DATA[:-1]}, "data"),
        ({"network": WindowMLP(1, (4,), embedding=4, act="relu")}, "reward"),
        ({"params": init_params(NET, jax.random.key(1), DATA[:2])}, "params"),
        ({"pin": FirstState(0)}, "pin"),
    ],
)
def test_an_extraction_of_something_else_is_refused(tmp_path, changes, named):
    """It returned the reward that lay there."""
    match(tmp_path / "c")
    match(tmp_path / "c", expert=scaled(0.25), optimizer=optax.adam(1e-2))  # equal, and others
    with pytest.raises(InputError, match=f"the run there has {named} ('|None)"):
        match(tmp_path / "c", **changes)


def test_functions_and_callables_are_told_apart(tmp_path):
    given: Any = dict(base=closure(-0.5), expert=closure(-1.0), batches=lambda step: DATA[:4])
    match(tmp_path / "c", **given)
    match(tmp_path / "c", **given | dict(base=closure(-0.5), batches=lambda step: DATA[:4]))
    for name, other in (("expert", closure(-1.5)), ("batches", lambda step: DATA[4:8])):
        with pytest.raises(InputError, match="the run there has (expert_score|data) '"):
            match(tmp_path / "c", **given | {name: other})


class Bent:
    """A reward network without a `__repr__`, with an array inside a compiled function."""

    def __init__(self, by):
        self.by = by

    def init(self, key, x, t):
        return {"params": {"w": jnp.ones(())}}

    def apply(self, variables, x, t):
        bend = jax.jit(lambda x: jnp.sin(x * self.by))
        return variables["params"]["w"] * bend(x).sum((1, 2))


def in_jit(by):
    return jax.jit(lambda x, t: x * by)


def in_partial(by):
    return jax.tree_util.Partial(lambda w, x, t: w * x * by, jnp.ones(()))


def in_model(by):
    class Scaled(_Same):
        def apply(self, variables, x, t):
            return jax.jit(lambda x: x * by)(x)

    return Denoiser({}, SCHEDULE, Scaled(), "x0")


def pinned(by):
    mask = np.zeros((2, 2), bool)
    mask[0] = True
    return lambda x_0: Pinned(jnp.asarray(mask), x_0 * by)


def drawn(by):
    @struct.dataclass
    class Drawn:
        rows: Any
        change: Any = struct.field(pytree_node=False)

        def sample(self, key, count):
            return self.change(Rows(self.rows).sample(key, count))

    return Drawn(DATA, jax.jit(lambda x: x * by))


@pytest.mark.parametrize(
    ("name", "make", "named"),
    [
        ("network", Bent, "reward"),
        ("base", in_jit, "base_score"),
        ("expert", in_partial, "expert_score"),
        ("expert", in_model, "expert_score"),
        ("pin", pinned, "pin"),
        ("batches", drawn, "data"),
    ],
)
def test_what_functions_close_over_is_told_apart(tmp_path, name, make, named):
    """All of these had one checksum, or one of each process."""
    one, same, other = (jnp.full(2, by)[None, None] for by in (0.4, 0.4, 0.75))
    match(tmp_path, **{name: make(one)})
    match(tmp_path, **{name: make(same)})
    with pytest.raises(InputError, match=f"the run there has {named} '"):
        match(tmp_path, **{name: make(other)})


def test_a_score_that_only_its_address_tells_apart_is_refused(tmp_path):
    def asked(x, t):
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(InputError, match="nothing but its address tells"):
        match(tmp_path, expert=asked)


def counting():
    """A callable of batches, and the steps for which it was called."""
    asked = []

    def batches(step):
        asked.append(step)
        return DATA[:4]

    return batches, asked


def test_a_callable_is_asked_once_a_step(tmp_path):
    """It was asked twice more for step 0: what an rng in it gave then was lost."""
    for folder, weighting in (
        (None, None),
        (tmp_path / "c", None),
        (tmp_path / "d", "standardise"),
    ):
        batches, asked = counting()
        params = init_params(NET, KEY, DATA[:2])
        given: Any = dict(steps=5, key=KEY, checkpoints=folder, weighting=weighting)
        options = ExtractionOptions(steps_per_call=2)
        extract_reward(
            closure(-0.5), closure(-1.0), NET, params, batches, SCHEDULE, optax.adam(1e-2),
            options=options, **given,
        )  # fmt: skip
        assert asked == [0, 1, 2, 3, 4]


def test_a_resumed_callable_is_asked_for_its_first_batch_and_what_is_left(tmp_path):
    def run(batches, steps):
        return extract_reward(
            closure(-0.5), closure(-1.0), NET, init_params(NET, KEY, DATA[:2]), batches, SCHEDULE,
            optax.adam(1e-2), steps=steps, key=KEY, checkpoints=tmp_path,
        )  # fmt: skip

    rng = np.random.default_rng
    for steps, wanted in ((2, [0, 1]), (4, [0, 2, 3])):
        asked = []

        def batches(step, asked=asked, draws=rng(0)):  # noqa: B008 (one for each run)
            asked.append(step)
            return draws.normal(size=(4, 2, 2)).astype(np.float32)

        run(batches, steps)
        assert asked == wanted


def test_a_source_is_drawn_from_once_a_step(tmp_path):
    """Of an example only the shape is wanted: nothing is drawn for it."""
    drawn = []

    @struct.dataclass
    class Counted:
        rows: Any

        def sample(self, key, count):
            rows = Rows(self.rows).sample(key, count)
            jax.debug.callback(lambda x: drawn.append(len(x)), rows)
            return rows

    model, adam, folders = _Same(), optax.adam(1e-2), iter("abc")
    options = TrainingOptions(batch_size=4)

    def given(batch) -> Any:
        return dict(steps=3, key=KEY, checkpoints=tmp_path / next(folders), options=batch)

    train_denoiser(
        model, init_state(model, adam, DATA, KEY), Counted(DATA), SCHEDULE, adam, **given(options)
    )
    jax.effects_barrier()
    assert drawn == [4] * 3
    drawn.clear()
    net, params = NET, init_params(NET, KEY, DATA[:2])
    train_discriminator(
        net, params, Counted(DATA), Counted(DATA), SCHEDULE, adam, **given(LoopOptions(4))
    )
    jax.effects_barrier()
    assert drawn == [2] * 6
    drawn.clear()
    extract_reward(
        closure(-0.5), closure(-1.0), net, params, Counted(DATA), SCHEDULE, adam,
        **given(ExtractionOptions(4)),
    )  # fmt: skip
    jax.effects_barrier()
    assert drawn == [4] * 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": None}, "optimizer is a NoneType: give one of optax"),
        ({"optimizer": 1e-3}, "optimizer is a float: give one of optax"),
        ({"steps": 0}, "steps must be a whole number, 1 or more, not 0"),
        ({"steps": 2.5}, "steps must be a whole number, 1 or more, not 2.5"),
        ({"key": 0}, "key is 0: give one key, such as jax.random.key(0)"),
        ({"key": None}, "key is None: give one key"),
        ({"key": jax.random.split(KEY, 2)}, "give one key"),
        ({"schedule": 4}, "schedule is a int: give one, such as cosine_schedule(20)"),
        ({"schedule": None}, "schedule is a NoneType: give one"),
        ({"network": None}, "the network is a NoneType: give a module with init and apply"),
        ({"network": _own}, "the network is a function: give a module with init and apply"),
        ({"pin": Pinned(DATA > 0, DATA)}, "pin is a Pinned: give a function x_0 -> Pinned"),
    ],
)
def test_what_a_run_cannot_be_made_of(changes, said):
    given = {"optimizer": optax.adam(1e-2), "steps": 1, "key": KEY, "schedule": SCHEDULE} | changes
    optimizer, schedule, rest = given.pop("optimizer"), given.pop("schedule"), given
    net, same = (given.get("network", made) for made in (NET, _Same()))
    rest.pop("network", None)
    params, state = (
        init_params(NET, KEY, DATA[:2]),
        init_state(_Same(), optax.adam(1e-2), DATA, KEY),
    )
    for run in (
        lambda: extract_reward(_own, _own, net, params, DATA, schedule, optimizer, **rest),
        lambda: train_denoiser(same, state, DATA, schedule, optimizer, **rest),
        lambda: train_discriminator(net, params, DATA, DATA, schedule, optimizer, **rest),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            run()


def test_keys_of_the_old_kind_are_keys(tmp_path):
    old = jax.random.PRNGKey(3)
    params = init_params(NET, KEY, DATA[:2])
    found = [
        extract_reward(
            _own, closure(-0.5), NET, params, DATA, SCHEDULE, optax.adam(1e-2), steps=2, key=key,
            checkpoints=tmp_path / name,
        )[1].loss
        for name, key in (("old", old), ("new", jax.random.key(3)))
    ]  # fmt: skip
    np.testing.assert_array_equal(found[0], found[1])


def test_trainings_of_something_else_are_refused(tmp_path):
    def train(**changes):
        given = {
            "model": _Same(),
            "data": DATA,
            "adam": optax.adam(1e-2),
            **{"weights": 1.0, "pin": None, "key": KEY},
        } | changes
        state = init_state(given["model"], given["adam"], DATA, given["key"])
        options = TrainingOptions(batch_size=4)
        args = given["model"], state, given["data"], SCHEDULE, given["adam"]
        train_denoiser(
            *args,
            steps=1,
            key=KEY,
            options=options,
            weights=given["weights"],
            pin=given["pin"],
            checkpoints=tmp_path / "d",
        )

    def judge(**changes):
        given = {"base": DATA, "expert": DATA + 1, "adam": optax.adam(1e-2)} | changes
        params = init_params(NET, KEY, DATA[:2])
        sides = given["base"], given["expert"]
        train_discriminator(
            NET, params, *sides, SCHEDULE, given["adam"], steps=1, key=KEY,
            checkpoints=tmp_path / "j",
        )  # fmt: skip

    for run, cases in (
        (
            train,
            [
                *(("data", DATA * 2), ("adam", optax.adam(1e-3)), ("weights", 2.0)),
                *(("model", in_model(2.0).model), ("pin", FirstState()), ("pin", pinned(2.0))),
            ],
        ),
        (judge, [("base", DATA * 2), ("expert", DATA), ("adam", optax.sgd(1e-3))]),
    ):
        run()
        run()
        for name, other in cases:
            with pytest.raises(InputError, match="the run there has .*give the same settings"):
                run(**{name: other})


def test_a_state_begins_by_one_program():
    params = {"a": jnp.ones((2, 3)), "b": jnp.zeros((2,))}
    moments = begin(params, optimizer=optax.adam(1e-3), seeds=True)
    assert moments[0].count.shape == (2,) and moments[0].mu["a"].shape == (2, 3)  # pyright: ignore
