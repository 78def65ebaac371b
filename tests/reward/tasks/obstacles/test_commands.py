"""Every command on a world of another kind: other widths, no simulator, no maze."""

import json
from typing import Any

import numpy as np
import pytest

from reward_jax.data.checkpoint import load_guide, load_model
from reward_jax.data.files import read_episodes
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.planning import steer
from reward_jax.report.write import ReportOptions, write_report
from reward_jax.tasks.base import Measure
from reward_jax.tasks.find import find
from tests.reward.cli_runs import MATCHING, STEPS, printed_by, run

SMALL = ["--network.dim", 8, "--network.multipliers", "[1]", "--diffusion_steps", 8]
SMALL += ["--horizon", 8, "--stride", 4, *STEPS, "--actions", "true"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, printed = tmp_path_factory.mktemp("obstacles"), {}

    def go(name, *argv):
        printed[name] = printed_by(*argv).splitlines()

    base, expert, reward = (folder / name for name in ("base", "expert", "reward"))
    data = [folder / "base.hdf5", folder / "expert.hdf5"]
    walks = ["data", "--env", "disc", "--episodes", 20, "--horizon", 8, "--stride", 4]
    go("data", *walks, "--out", data[0])
    go("expert data", *walks, "--out", data[1], "--goal", 3, "--seed", 1)
    go("train", "train", "--data", data[0], "--out", base, *SMALL)
    go("expert", "train", "--data", data[1], "--out", expert, "--init", base, *STEPS)
    both = ["--data", data[0], "--expert_data", data[1]]
    go("extract", "extract", "--base", base, "--expert", expert, *both, "--out", reward, *MATCHING)
    shown = ["--windows", 200, "--bins", 4]
    go("heatmap", "heatmap", "--reward", reward, *both[:2], "--out", folder / "map", *shown)
    steered = ["--base", base, "--reward", reward, "--plans", 4]
    go("steer", "steer", *steered, "--out", folder / "steer")
    grid = ["--scales", "[0, 2]", "--t_stopgrads", "[0, 4]", "--execute"]
    go("sweep", "sweep", *steered, "--out", folder / "sweep", *grid)
    models = ["--base", base, "--expert", expert, "--reward", reward, *both[:2]]
    go("report", "report", *models, "--out", folder / "report", "--plans", 4, *shown)
    return folder, printed


@pytest.mark.slow
def test_data_and_models(made):
    folder, printed = made
    expert = read_episodes(folder / "expert.hdf5")
    assert expert.about["task"] == "disc" and expert.about["goal"] == [1.7, 1.7]
    assert printed["data"][0].startswith("20 ways to random goals, ")
    assert printed["expert data"][0].startswith("20 ways to the goal (1.7, 1.7), ")
    base = load_model(folder / "base", TrajectorySpace).space
    assert (base.shape, base.actions, base.about["task"]) == ((8, 4), 2, "disc")
    assert load_guide(folder / "reward", TrajectorySpace).space.about["goal"] == [1.7, 1.7]


def test_maps_and_plans(made):
    folder, printed = made
    found = json.loads((folder / "map" / "heatmap.json").read_text())
    distance = np.linalg.norm(np.subtract(found["peak"], [1.7, 1.7]))
    assert found["distance"] == pytest.approx(distance)
    assert found["at_goal"] == bool(distance < 0.4)
    assert "goal at (1.70, 1.70)" in printed["heatmap"][0]
    with np.load(folder / "map" / "heatmap.npz") as arrays:
        assert arrays["values"].shape == (16, 16) and arrays["counts"].sum() == 200 * 8
    found = json.loads((folder / "steer" / "steer.json").read_text())
    assert set(found["steered"]) == {"planned", "reached", "clear"}
    with np.load(folder / "steer" / "plans.npz") as arrays:
        assert arrays["plans"].shape == (4, 8, 2) and arrays["starts"].shape == (4, 2)
        np.testing.assert_allclose(arrays["plans"][:, 0], arrays["starts"], atol=1e-5)
    text = (folder / "report" / "report.html").read_text("utf-8")
    assert "Ways to random goals" in text and "two diffusion models, disc" in text
    assert "maze" not in text and "positions off the discs" in text
    for row in ("base, unsteered", "base, steered by the reward", "expert"):
        assert any(line.startswith(f"{row}: ") for line in printed["report"])


def test_a_sweep_of_a_task_that_asks_again_is_the_same(made, monkeypatch, capsys):
    """Planned as it goes, where plans of one call cannot be: the same planner, the same key."""
    folder, _ = made
    monkeypatch.setattr(find("disc"), "replans", True)
    monkeypatch.setattr(steer, "plan_sweep", None)
    argv = ["--base", folder / "base", "--reward", folder / "reward", "--plans", 4]
    argv += ["--scales", "[0, 2]", "--t_stopgrads", "[0, 4]", "--execute"]
    assert run("sweep", *argv, "--out", folder / "again") == 0
    rows = [json.loads((folder / d / "sweep.json").read_text()) for d in ("sweep", "again")]
    for one, other in zip(*rows, strict=True):
        errors = [row.pop("standard_errors") for row in (one, other)]
        assert errors[0] == pytest.approx(errors[1], abs=1e-4)
        del one["seconds"], other["seconds"]  # of plans made at once nothing is told
        assert one == pytest.approx(other, abs=1e-4)
    assert "share of walks that end at the goal" in capsys.readouterr().out


@pytest.mark.slow
def test_the_raw_difference_steers_without_a_reward(made, capsys):
    """At scale 1 as far as the expert would go: the plans are not the base's."""
    folder, _ = made
    argv = ["steer", "--base", folder / "base", "--expert", folder / "expert", "--plans", 4]
    ddim = ["--guidance.sampler", "ddim", "--guidance.sampling_steps", 4]
    assert run(*argv, "--out", folder / "raw", "--guidance.scale", 1, *ddim) == 0
    with np.load(folder / "raw" / "plans.npz") as arrays:
        assert np.abs(arrays["plans"] - arrays["unsteered"]).max() > 1e-3
    assert json.loads((folder / "raw" / "steer.json").read_text())["goal"] == [1.7, 1.7]
    for more in ([], ["--reward", folder / "reward"]):
        argv = ["steer", "--base", folder / "base", *more, "--out", folder / "none"]
        argv += ["--expert", folder / "expert"] if more else []
        assert run(*argv) == 2
        assert "give --reward, or --expert for the raw" in capsys.readouterr().err


def test_a_world_without_a_plane(made, monkeypatch, capsys):
    """As locomotion will be: no map, no panels, and a measure that asks for execution alone."""
    folder, _ = made
    task = find("disc")
    monkeypatch.setattr(task, "plane", None)
    walk = Measure("reached", "return", "return", executed=True)
    monkeypatch.setattr(type(task), "measures", (walk,))
    reward = ["--reward", folder / "reward"]
    argv = ["heatmap", *reward, "--data", folder / "base.hdf5", "--out", folder / "none"]
    assert run(*argv) == 2
    assert "disc has no plane in which a map could be drawn" in capsys.readouterr().err
    argv = ["sweep", *reward, "--base", folder / "base", "--out", folder / "none"]
    assert run(*argv) == 2
    assert "plans of disc alone tell nothing: give --execute" in capsys.readouterr().err
    monkeypatch.setattr(type(task), "draw", lambda self, axes, shown, **_: axes.plot(shown[0]))
    models: dict[str, Any] = {k: str(folder / k) for k in ("base", "expert", "reward")}
    files: dict[str, Any] = dict(data=str(folder / "base.hdf5"), out=folder / "bare")
    text = write_report(ReportOptions(**models, **files, plans=4, windows=200)).path.read_text()
    assert "The learned reward" not in text and "takes shape" not in text
    assert ">return<" in text and "Steering the base" in text
