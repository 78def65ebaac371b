"""The shipped settings of the locomotion study at the paper's sizes, beside its commands' own."""

import pathlib

import pytest

from common_jax.cli import command_line
from reward_jax.planning.train_run import TrainOptions
from reward_jax.studies.locomotion.settings import Config
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
