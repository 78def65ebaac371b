"""Steering and sweeping from Python, without files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.checkpoint import save_guide, save_model
from reward_jax.data.trajectory.space import TrajectoryGuide
from reward_jax.planning.steer import SweepOptions, both_outcomes, steer_by, sweep_outcomes
from reward_jax.reward import guide as guide_module
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.reward.gradients import ScoreDifference
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.reward.relative import RelativeReward, SeedBlocks
from reward_jax.tasks.find import find
from tests.reward.cli_runs import model, reward, run

ABOUT = {"task": "disc", "goal": [1.7, 1.7]}
KEY = jax.random.key(0)


def made(seed=0):
    return model(seed, about=ABOUT, actions=2), reward(seed, about=ABOUT, actions=2)


def test_a_sweep_has_what_each_setting_gives_by_itself(monkeypatch):
    base, guide = made()
    steering = steer_by(base, guide, options=GuidanceOptions(temperature=0.5))
    starts = steering.task.starts(3, 0)
    options = SweepOptions(scales=(0.0, 4.0), t_stopgrads=(0, 5), execute=True)
    rows = list(sweep_outcomes(steering, starts, options, key=KEY))
    settings = [[(one.scale, one.t_stopgrad) for one in row] for row in rows]
    assert settings == [[(0.0, 0), (0.0, 5)], [(4.0, 0), (4.0, 5)]]
    both = both_outcomes(
        steer_by(base, guide, options=GuidanceOptions(temperature=0.5, scale=4.0)), starts, key=KEY
    )
    for name, one in (("unsteered", rows[0][0]), ("steered", rows[1][0])):
        np.testing.assert_allclose(one.outcome.shown, both[name].shown, atol=1e-4)
        assert one.outcome.means()["reached"] is not None
    assert np.abs(both["steered"].shown - both["unsteered"].shown).max() > 1e-3
    # Where the task asks again on the way, it plans as it goes.
    monkeypatch.setattr(steering.task, "replans", True)
    planned = SweepOptions(scales=(0.0, 4.0), t_stopgrads=(0, 5))
    again = list(sweep_outcomes(steering, starts, planned, key=KEY))
    for one, other in zip(sum(rows, []), sum(again, []), strict=True):
        np.testing.assert_allclose(one.outcome.shown, other.outcome.shown, atol=1e-4)
        assert other.outcome.means()["reached"] is None


def test_what_steers():
    base, guide = made()
    assert steer_by(base, guide).guide is guide.guide
    assert steer_by(base, guide).goal == [1.7, 1.7] and steer_by(base, guide).notes == ()
    assert steer_by(base, guide, goal="0").goal == [-1.7, -1.7]
    raw = steer_by(base, made(1)[0]).guide
    assert isinstance(raw, ScoreDifference) and raw.base is base.denoiser
    judge = TrajectoryGuide(DiscriminatorGuide({}, None), guide.space, guide.schedule)
    found = steer_by(base, judge, output="sigmoid").guide
    assert isinstance(found, DiscriminatorGuide) and found.output == "sigmoid"
    assert steer_by(base, guide).task is find("disc")


@pytest.mark.parametrize("replans", [False, True])
def test_each_seed_steers_plans_of_its_own(monkeypatch, replans):
    """Blocks of rows, as each seed by itself steers them from the same noise."""
    base, guide = made()
    still = GuidanceOptions(scale=4.0, temperature=0.0)
    steering = steer_by(base, guide, options=still, by_seed=True)
    assert isinstance(steering.guide, SeedBlocks) and steering.seeds == 2
    starts = steering.task.starts(3, 0)
    noise = jax.random.normal(KEY, (3, *base.space.shape))
    # Every block from the same noise, so that a seed alone gives the same plans.
    monkeypatch.setattr(
        guide_module, "draw_noise", lambda key, shape: jnp.tile(noise, (shape[0] // 3, 1, 1))
    )
    both = both_outcomes(steering, starts, key=KEY)
    assert both["unsteered"].seeds == 1 and len(both["unsteered"].shown) == 3
    assert both["steered"].seeds == 2 and len(both["steered"].shown) == 6
    reward = guide.guide
    assert isinstance(reward, RelativeReward)
    for index in (0, 1):
        alone = dataclasses.replace(guide, guide=reward.seed(index))
        one = both_outcomes(steer_by(base, alone, options=still), starts, key=KEY)["steered"]
        block = both["steered"].shown[3 * index : 3 * index + 3]
        np.testing.assert_allclose(block, one.shown, atol=1e-4)
    first, second = np.split(both["steered"].shown, 2)
    assert np.abs(first - second).max() > 1e-3
    monkeypatch.setattr(steering.task, "replans", replans)
    ((swept,),) = sweep_outcomes(
        steering, starts, SweepOptions(scales=(4.0,), t_stopgrads=(0,)), key=KEY
    )
    assert swept.outcome.seeds == 2
    np.testing.assert_allclose(swept.outcome.shown, both["steered"].shown, atol=1e-4)


def test_commands_tell_errors_over_seeds_apart(tmp_path, capsys):
    base, guide = made()
    save_model(tmp_path / "base.safetensors", base)
    save_guide(tmp_path / "reward.safetensors", guide)
    models = ["--base", tmp_path / "base.safetensors", "--reward", tmp_path / "reward.safetensors"]
    given = [*models, "--plans", 4, "--by_seed"]
    assert run("steer", *given, "--out", tmp_path / "steer") == 0
    found = json.loads((tmp_path / "steer" / "steer.json").read_text())
    for name in ("planned", "reached", "clear"):
        means = found["seed_means"][name]
        assert np.mean(means) == pytest.approx(found["steered"][name])
        assert found["seed_standard_errors"][name] == pytest.approx(np.std(means))  # of two
    with np.load(tmp_path / "steer" / "plans.npz") as arrays:
        assert [len(arrays[n]) for n in ("plans", "unsteered", "starts")] == [8, 4, 4]
    error, apart = (found[k] for k in ("standard_errors", "seed_standard_errors"))
    over = f"executed: standard error {error['steered']['reached']:.2f} over 4 starts"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" over 4 starts") and lines[0].startswith("unsteered: ")
    assert lines[1].endswith(f"; {over}, {apart['reached']:.2f} over 2 reward seeds")
    grid = ["--scales", "[2]", "--t_stopgrads", "[0, 5]"]
    assert run("sweep", *given, *grid, "--out", tmp_path / "sweep") == 0
    row, _ = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert row["seed_standard_errors"]["planned"] == pytest.approx(
        np.std(row["seed_means"]["planned"])
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" (its standard errors over starts; over 2 reward seeds)")
    both = (row[k]["planned"] for k in ("standard_errors", "seed_standard_errors"))
    shown = "; ".join(f"{error:.2f}" for error in both)
    assert lines[2].startswith(f"{2:18g}") and f" {row['planned']:.2f} ({shown})" in lines[2]


def test_by_seed_needs_seeds(tmp_path):
    base, guide = made()
    one = reward(0, None, about=ABOUT, actions=2)
    judge = TrajectoryGuide(DiscriminatorGuide({}, None), guide.space, guide.schedule)
    for by, has in ((one, "this reward has one"), (made(1)[0], "has none"), (judge, "has none")):
        with pytest.raises(InputError, match=f"by_seed is of a reward of .* {has}: leave it out"):
            steer_by(base, by, by_seed=True)


def test_what_cannot_be_steered_is_refused():
    base, guide = made()
    with pytest.raises(InputError, match="base and reward differ in horizon: 16 and 8"):
        steer_by(model(0, about=ABOUT, actions=2, horizon=16), guide)
    with pytest.raises(InputError, match="had no goal; give one"):
        steer_by(base, reward(about=ABOUT | {"goal": None}, actions=2))
    for options in (SweepOptions(scales=()), SweepOptions(t_stopgrads=())):
        with pytest.raises(InputError, match="scales and t_stopgrads need a number each"):
            sweep_outcomes(steer_by(base, guide), np.zeros((1, 2)), options, key=KEY)
