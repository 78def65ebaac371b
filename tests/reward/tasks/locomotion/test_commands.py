"""Every command on a robot: data in both formats, models with actions, plans made on the way."""

import dataclasses
import json
import re

import h5py
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.checkpoint import load_guide, load_model, save_guide, save_model
from reward_jax.data.episodes import Episodes
from reward_jax.data.files import read_episodes, write_episodes
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.data.trajectory.windows import begins
from reward_jax.reward.relative import RelativeReward
from reward_jax.tasks import find
from reward_jax.tasks.locomotion import policies
from tests.reward.cli_runs import MATCHING, STEPS, printed_by, run
from tests.reward.tasks.locomotion.conftest import random_policy

SMALL = ["--network.dim", 8, "--network.multipliers", "[1]", "--diffusion_steps", 8, *STEPS]
SMALL += ["--horizon", 4, "--stride", 1, "--actions", "true", "--normaliser", "gaussian"]
SMALL += ["--clip_x0", 0, "--cut.padding", "repeat", "--training.action_weight", 10]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, printed = tmp_path_factory.mktemp("locomotion"), {}

    def go(name, *argv):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policies, "POLICIES", folder)
            printed[name] = printed_by(*argv).splitlines()

    stages = {s: random_policy("hopper", i) for i, s in enumerate(["early", "late", "medium"])}
    policies.write_policies(
        folder / "hopper.safetensors", stages | {"expert": random_policy("hopper", 5)}
    )
    policies.policies.cache_clear()
    base, expert, reward = (folder / name for name in ("base", "expert", "reward"))
    data = [folder / "base.hdf5", folder / "expert-v0"]
    record = ["data", "--env", "hopper", "--episodes", 20]
    go("data", *record, "--out", data[0])
    go("expert data", *record, "--out", data[1], "--goal", "expert", "--seed", 1)
    policies.policies.cache_clear()
    go("train", "train", "--data", data[0], "--out", base, *SMALL)
    more = ["--cut.padding", "repeat", "--training.action_weight", 10]
    go("expert", "train", "--data", data[1], "--out", expert, "--init", base, *STEPS, *more)
    both = ["--data", data[0], "--expert_data", data[1], "--cut.padding", "repeat"]
    go("extract", "extract", "--base", base, "--expert", expert, *both, "--out", reward, *MATCHING)
    models = ["extract", "--base", base, "--expert", expert, *both]
    small = [m for m in MATCHING if m not in ("--reward.widths", "[8]")]
    onward = ["--init", reward, "--matching.path_draws", 60, "--matching.action_weight", 10]
    go("again", *models, "--out", folder / "again", *small, *onward)
    acts = ["--plans", 3, "--rollout.steps", 12]
    steered = ["--base", base, "--reward", reward, *acts]
    go("steer", "steer", *steered, "--out", folder / "steer", "--rollout.execute", 2)
    raw = ["steer", "--base", base, "--expert", expert, *acts, "--out", folder / "raw"]
    go("raw", *raw, "--guidance.sampler", "ddim", "--guidance.sampling_steps", 3)
    grid = ["--scales", "[0, 2]", "--t_stopgrads", "[0]", "--execute"]
    go("sweep", "sweep", *steered, "--out", folder / "sweep", *grid)
    models = ["--base", base, "--expert", expert, "--reward", reward, "--data", data[0]]
    go("report", "report", *models, "--out", folder / "report", *acts, "--windows", 40)
    return folder, printed


@pytest.mark.slow
def test_data_and_models(made):
    folder, printed = made
    base, expert = (read_episodes(folder / d) for d in ("base.hdf5", "expert-v0"))
    assert (base.about["goal"], expert.about["goal"]) == ("medium-replay", "expert")
    assert base.terminations is not None and base.terminations.any()
    assert printed["data"][0].startswith("20 episodes of Hopper-v5, medium-replay, ")
    space = load_model(folder / "expert", TrajectorySpace).space
    assert (space.shape, space.actions, space.stride) == ((4, 14), 3, 1)
    assert space.about["goal"] == "expert" and space.normaliser.kind == "gaussian"


@pytest.mark.slow
def test_a_reward_is_matched_on_where_it_is(made, capsys):
    folder, printed = made
    assert any(line.startswith("explained fraction of the target") for line in printed["again"])
    one, two = (load_guide(folder / d, TrajectorySpace).guide for d in ("reward", "again"))
    assert isinstance(one, RelativeReward) and isinstance(two, RelativeReward)
    assert (one.reward, one.seeds) == (two.reward, two.seeds)
    models = ["extract", "--base", folder / "base", "--expert", folder / "expert"]
    models += ["--data", folder / "base.hdf5", "--expert_data", folder / "expert-v0"]
    models += ["--init", folder / "reward", "--out", folder / "none"]
    assert run(*models, "--reward.widths", "[9]") == 2
    assert "reward to begin with (init): leave reward out" in capsys.readouterr().err
    assert run(*models, "--matching.draws", 0, "--matching.path_draws", 9) == 2
    assert "matching.path_draws needs matching.draws" in capsys.readouterr().err
    assert not (folder / "none").exists()


@pytest.mark.slow
def test_returns_and_times(made):
    folder, printed = made
    found = json.loads((folder / "steer" / "steer.json").read_text())
    assert set(found["steered"]) == {"return", "normalized", "steps"}
    assert found["goal"] == "expert" and 0 < found["steered"]["steps"] <= 12
    for name in ("unsteered", "steered"):
        assert set(found["seconds"][name]) == {"planning", "stepping"}
        assert any(line.startswith(f"{name}: return ") for line in printed["steer"])
    assert (folder / "steer" / "steer.png").stat().st_size > 1000
    rows = json.loads((folder / "sweep" / "sweep.json").read_text())
    assert [r["scale"] for r in rows] == [0, 2] and rows[0]["return"] != rows[1]["return"]
    assert all(set(r["seconds"]) == {"planning", "stepping"} for r in rows)
    assert all(r["standard_errors"]["return"] > 0 for r in rows)
    raw = json.loads((folder / "raw" / "steer.json").read_text())
    assert raw["unsteered"]["return"] != raw["steered"]["return"]
    text = (folder / "report" / "report.html").read_text("utf-8")
    assert "normalized" in text and "two diffusion models, hopper" in text


@pytest.mark.slow
def test_data_of_another_robot_are_refused(made, capsys):
    folder, _ = made
    argv = ["train", "--data", folder / "base.hdf5", "--out", folder / "none", *SMALL]
    assert run(*argv, "--env", "walker2d") == 2
    assert "is of hopper, not of walker2d: leave --env out, or give" in capsys.readouterr().err
    with h5py.File(folder / "base.hdf5") as file, h5py.File(folder / "d4rl.hdf5", "w") as other:
        for name in ("observations", "actions", "rewards", "terminals", "timeouts"):
            other[name] = file[name][()]  # pyright: ignore[reportIndexIssue]
    argv[2] = folder / "d4rl.hdf5"
    assert run(*argv, "--env", "HalfCheetah-v2") == 2
    said = "has 11 observations and 3 actions, but HalfCheetah-v5 has 17 and 6"
    assert said in capsys.readouterr().err
    assert run(*argv, "--env", "ant") == 2
    assert "environment 'ant' is unknown" in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_d4rl_s_files_by_the_task_that_is_named(tmp_path):
    """One stray terminal, as each of D4RL's files of this robot has."""
    rows = np.random.default_rng(0).normal(size=(40, 23)).astype(np.float32)
    terminals, timeouts = np.zeros(40, bool), np.zeros(40, bool)
    terminals[7] = timeouts[19] = timeouts[39] = True
    with h5py.File(tmp_path / "halfcheetah_medium-v2.hdf5", "w") as file:
        file["observations"], file["actions"] = rows[:, :17], rows[:, 17:]
        file["rewards"] = rows[:, 0]
        file["terminals"], file["timeouts"] = terminals, timeouts
    given = tmp_path / "halfcheetah_medium-v2.hdf5"
    found = find.read(given, env="HalfCheetah-v2")
    assert found.lengths.tolist() == [20, 20] and found.about["task"] == "halfcheetah"
    assert found.terminations is not None and not found.terminations.any()
    assert find.read(given).lengths.tolist() == [8, 12, 20]  # of no task: as it says
    with h5py.File(given, "r+") as file:
        del file["timeouts"]
    with pytest.raises(InputError, match="has neither 'timeouts' nor 'infos/goal'"):
        find.read(given, env="halfcheetah")
    with h5py.File(given, "r+") as file:
        del file["terminals"]
        file["timeouts"] = timeouts
    assert begins(find.read(given, env="halfcheetah"), 20, "terminal").all()  # it has none to say
    with pytest.raises(InputError, match="terminal states: .* name their world by --env where it"):
        begins(find.read(given), 20, "terminal")


def test_a_robot_that_falls_is_none_that_cannot(tmp_path):
    """Two robots have 17 observations and 6 actions: falls tell them apart."""
    given = tmp_path / "walker2d_medium-v2.hdf5"
    rows = np.random.default_rng(0).normal(size=(400, 23)).astype(np.float32)
    terminals = np.zeros(400, bool)
    terminals[19::20] = True
    with h5py.File(given, "w") as file:
        file["observations"], file["actions"] = rows[:, :17], rows[:, 17:]
        file["rewards"] = rows[:, 0]
        file["terminals"], file["timeouts"] = terminals, np.zeros(400, bool)
    said = "has 20 terminal states, but HalfCheetah-v5 has none: give --env walker2d where it is"
    with pytest.raises(InputError, match=said):
        find.read(given, env="halfcheetah")
    assert find.read(given, env="walker2d").lengths.tolist() == [20] * 20


def test_data_that_say_another_robot_name_the_option(tmp_path):
    made = Episodes(
        np.zeros((8, 11), np.float32),
        np.zeros((8, 3), np.float32),
        np.array([8]),
        {"task": "hopper"},
        terminations=np.zeros(8, bool),
    )
    write_episodes(tmp_path / "ho.hdf5", made)
    with pytest.raises(InputError, match="is of hopper, not of halfcheetah: leave --env out, or"):
        find.read(tmp_path / "ho.hdf5", env="halfcheetah")


def test_data_of_a_robot_that_falls_must_say_where(tmp_path):
    """Else windows would go on beyond a fall."""
    given = tmp_path / "hopper.hdf5"
    rows = np.random.default_rng(0).normal(size=(40, 14)).astype(np.float32)
    timeouts = np.zeros(40, bool)
    timeouts[[19, 39]] = True
    with h5py.File(given, "w") as file:
        file["observations"], file["actions"] = rows[:, :11], rows[:, 11:]
        file["rewards"], file["timeouts"] = rows[:, 0], timeouts
    with pytest.raises(InputError, match="no flags of terminal states, which Hopper-v5 has: .*"):
        find.read(given, env="hopper")
    with h5py.File(given, "r+") as file:
        file["terminals"] = np.zeros(40, bool)
    assert find.read(given, env="hopper").lengths.tolist() == [20, 20]


def of_another(made):
    """A model or a reward, said to be of another robot."""
    about = dict(made.space.about) | {"task": "halfcheetah"}
    return dataclasses.replace(made, space=dataclasses.replace(made.space, about=about))


@pytest.mark.slow
def test_models_of_another_robot_are_refused(made, capsys):
    """Shapes do not always tell: two robots have 17 observations and 6 actions."""
    folder, _ = made
    base, expert, reward = (folder / f"other_{n}.safetensors" for n in ("b", "e", "r"))
    for name, path in (("base", base), ("expert", expert)):
        save_model(path, of_another(load_model(folder / name, TrajectorySpace)))
    save_guide(reward, of_another(load_guide(folder / "reward", TrajectorySpace)))
    own = {name: ["--" + name, folder / name] for name in ("base", "expert", "reward")}
    data = ["--data", folder / "base.hdf5", "--expert_data", folder / "expert-v0"]
    data += ["--cut.padding", "repeat"]
    out, acts = ["--out", folder / "none"], ["--plans", 2, "--rollout.steps", 2]
    both = ["base and expert", "base and reward"]
    for argv, said in (
        (["extract", "--base", base, *own["expert"], *data], both[0]),
        (["extract", *own["base"], "--expert", expert, *data], both[0]),
        (["steer", "--base", base, *own["reward"], *acts], both[1]),
        (["steer", *own["base"], "--reward", reward, *acts], both[1]),
        (["steer", *own["base"], "--expert", expert, *acts], both[0]),
        (["sweep", "--base", base, *own["reward"], *acts, "--execute"], both[1]),
        (["report", *own["base"], "--expert", expert, *own["reward"], *data[:2]], both[0]),
    ):
        assert run(*argv, *out) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{said} differ in task: " in error
        assert {"hopper", "halfcheetah"} <= set(re.findall(r"\w+", error))
        assert error.endswith("; train both alike\n") and not (folder / "none").exists()


@pytest.mark.slow
def test_more_of_a_plan_than_it_has_is_not_executed(made, capsys):
    folder, _ = made
    own = ["--base", folder / "base", "--reward", folder / "reward", "--out", folder / "none"]
    more = ["--expert", folder / "expert", "--data", folder / "base.hdf5"]
    for argv in (["steer", *own], ["sweep", *own, "--execute"], ["report", *own, *more]):
        assert run(*argv, "--plans", 2, "--rollout.steps", 9, "--rollout.execute", 5) == 2
        said = "rollout.execute is 5, but a plan of hopper has 4 steps (its horizon): give as many"
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert not (folder / "none").exists()


@pytest.mark.slow
def test_a_model_of_another_robot_is_not_trained_further(made, capsys):
    folder, _ = made
    other = of_another(load_model(folder / "base", TrajectorySpace))
    save_model(folder / "other.safetensors", other)
    begin = ["--init", folder / "other.safetensors", "--cut.padding", "repeat", *STEPS]
    assert run("train", "--data", folder / "base.hdf5", "--out", folder / "no", *begin) == 2
    assert "the data are of hopper, the model is of halfcheetah" in capsys.readouterr().err
    assert not (folder / "no").exists()


def test_data_of_policies_of_one_s_own(tmp_path, capsys):
    """A file, or a run; and each file that is none is one line, nothing written."""
    own = {s: random_policy("hopper", 30 + i) for i, s in enumerate(["medium", "expert"])}
    file = tmp_path / policies.FILE
    policies.write_policies(file, own, "hopper")
    record = ["data", "--env", "hopper", "--goal", "medium", "--episodes", 2]
    assert run(*record, "--policies", tmp_path, "--out", tmp_path / "own.hdf5") == 0
    found = read_episodes(tmp_path / "own.hdf5")
    assert found.about["policies"]["medium"]["steps"] == 30
    assert "2 episodes of Hopper-v5, medium, " in capsys.readouterr().out
    out = tmp_path / "none.hdf5"
    (tmp_path / "text").write_text("no tensors")
    for argv, said in (
        ([*record, "--policies", tmp_path / "none"], "no such file; give one that"),
        ([*record, "--policies", tmp_path / "text"], "holds no policies"),
        ([*record[:2], "walker2d", "--policies", file], "are of hopper, not walker2d: give that"),
        ([*record[:3], "--policies", file], "hopper has no policy 'early': it has medium, expert"),
        ([*record[:2], "umaze", "--policies", file], "umaze is recorded without policies: leave"),
    ):
        assert run(*argv, "--out", out) == 2
        assert said in capsys.readouterr().err and not out.exists()
