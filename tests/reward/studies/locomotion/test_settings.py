"""The shipped settings of the locomotion study at the paper's sizes, beside its commands' own."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from common_jax.cli import command_line
from reward_jax.data.trajectory.normalisers import Normaliser
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.models.reward_nets import HalfUnet
from reward_jax.planning.train_run import TrainOptions
from reward_jax.studies.locomotion.settings import Ablation, Config, RobotSettings, ablated, check
from reward_jax.tasks.locomotion.robots import ROBOTS

CONFIGS = pathlib.Path(__file__).parents[4] / "configs" / "reward"


def read(options, name):
    return command_line.parse("reward-jax", "", options, ["--config", str(CONFIGS / name)])


@pytest.mark.parametrize("robot", ROBOTS)
@pytest.mark.parametrize("which", ["base", "expert"])
def test_the_paper_s_models_are_trained_as_its_commands_train_them(robot, which):
    own = read(Config, "study_locomotion_paper.yaml").robots[robot]
    command = read(TrainOptions, f"paper_{robot}_train_{which}.yaml")
    assert getattr(own, f"{which}_training") == command.training
    assert (own.horizon, own.diffusion_steps) == (command.horizon, command.diffusion_steps)
    assert own.network == command.network


def test_the_half_u_net_of_the_ablations_is_the_paper_s_and_takes_windows_of_4():
    config = read(Config, "study_locomotion_ablations.yaml")
    check(config)
    own = ablated(config, "half u-net").robots["halfcheetah"]
    normaliser = Normaliser(np.zeros(23, np.float32), np.ones(23, np.float32), "gaussian")
    network = own.reward.make(TrajectorySpace(own.horizon, 1, 6, normaliser, {}))
    paper = read(Config, "study_locomotion_paper.yaml").robots["halfcheetah"]
    assert network == paper.reward.make(TrajectorySpace(paper.horizon, 1, 6, normaliser, {}))
    assert isinstance(network, HalfUnet) and len(network.multipliers) == 4

    def gradient(key, x, t):
        params = network.init(key, x, t)["params"]
        return jax.grad(lambda x: network.apply({"params": params}, x, t).sum())(x)  # pyright: ignore

    x, t = jnp.zeros((2, 4, 23)), jnp.zeros(2, jnp.int32)
    assert jax.eval_shape(gradient, jax.random.key(0), x, t).shape == x.shape


def test_paths_of_the_ablations_begin_in_the_world():
    config = read(Config, "study_locomotion_ablations.yaml")
    assert ablated(config, "met in the world").robots["halfcheetah"].met
    assert not config.robots["halfcheetah"].met


OTHERS: dict[str, Any] = {"pin": False, "met": True, "kind": "half_unet", "x_t": "base"}
OTHERS |= {"target": "score", "gradient_at": "posterior_mean"}
OTHERS |= {"t_weights": (0.5,), "widths": (3,), "scales": (0.25,)}


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(Ablation)][1:])
def test_each_option_of_an_ablation_changes_what_bears_its_name_and_nothing_else(option):
    given: Any = OTHERS.get(option, 7)
    ablation = Ablation(robot="hopper", **{option: given})
    config = Config(robots={"hopper": RobotSettings()}, ablations={"x": ablation})
    before, after = (
        traverse_util.flatten_dict(dataclasses.asdict(one), sep="/")
        for one in (dataclasses.replace(config, ablations={}), ablated(config, "x"))
    )
    own = "robots/hopper/"
    where = {"execute": "rollout/", "kind": f"{own}reward/", "widths": f"{own}reward/"}
    where |= dict.fromkeys(("rounds", "met"), own)
    where |= dict.fromkeys(("base_episodes", "expert_episodes", "seed", "scales"), "")
    wanted = {where.get(option, f"{own}matching/") + option: given}
    if option in ("sampling_steps", "skip"):  # of guidance, which is no part of settings
        wanted = {"rollout/warm_start": True} if option == "skip" else {}
    assert {name: x for name, x in after.items() if x != before[name]} == wanted
    assert set(after) == set(before)
