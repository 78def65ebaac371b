"""The loop: what a resumed run must share with the one that began, and what it saves."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common_jax.errors import InputError
from reward_jax.diffusion.denoiser import Denoiser
from reward_jax.diffusion.loop import begin, check_seeds, run_loop, steps_done
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.train import TrainingOptions, init_state, train_denoiser
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.reward.discriminator import train_discriminator
from reward_jax.reward.extract import extract_reward, init_params

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


def closure(by):
    return lambda x, t: by * x


def match(folder, **changes):
    given = {
        **{"base": scaled(0.5), "expert": scaled(0.25), "batches": DATA, "network": NET},
        **{"optimizer": optax.adam(1e-2), "schedule": SCHEDULE},
    } | changes
    network = given["network"]
    params = init_params(network, KEY, DATA[:2])
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
    ],
)
def test_an_extraction_of_something_else_is_refused(tmp_path, changes, named):
    """It returned the reward that lay there."""
    match(tmp_path / "c")
    match(tmp_path / "c", expert=scaled(0.25), optimizer=optax.adam(1e-2))  # equal, and others
    with pytest.raises(InputError, match=f"the run there has {named} '"):
        match(tmp_path / "c", **changes)


def test_functions_and_callables_are_told_apart(tmp_path):
    given: Any = dict(base=closure(-0.5), expert=closure(-1.0), batches=lambda step: DATA[:4])
    match(tmp_path / "c", **given)
    match(tmp_path / "c", **given | dict(base=closure(-0.5), batches=lambda step: DATA[:4]))
    for name, other in (("expert", closure(-1.5)), ("batches", lambda step: DATA[4:8])):
        with pytest.raises(InputError, match="the run there has (expert_score|data) '"):
            match(tmp_path / "c", **given | {name: other})


def test_trainings_of_something_else_are_refused(tmp_path):
    def train(**changes):
        given = {
            "model": _Same(),
            "data": DATA,
            "adam": optax.adam(1e-2),
            "weights": 1.0,
        } | changes
        state = init_state(given["model"], given["adam"], DATA, KEY)
        options = TrainingOptions(batch_size=4)
        args = given["model"], state, given["data"], SCHEDULE, given["adam"]
        train_denoiser(
            *args,
            steps=1,
            key=KEY,
            options=options,
            weights=given["weights"],
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
        (train, [("data", DATA * 2), ("adam", optax.adam(1e-3)), ("weights", 2.0)]),
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
