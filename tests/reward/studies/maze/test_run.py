"""The maze study at its smallest: one goal of UMaze; a second start makes nothing anew."""

import dataclasses
import json
import shlex
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from common_jax.cli import command_line
from common_jax.errors import InputError
from common_jax.run import Run
from reward_jax.data.checkpoint import load_guide, load_model
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.diffusion.train import EMA
from reward_jax.planning.extract import Matching, RewardOptions
from reward_jax.planning.fit import NetworkOptions, Training, window_source
from reward_jax.studies import workshop
from reward_jax.studies.maze import work as study
from reward_jax.studies.maze.report import write_report
from reward_jax.studies.maze.run import STUDY, Config
from reward_jax.tasks.maze.task import MazeTask

TRAINING = Training(steps=10, batch_size=8, ema=EMA(begin=0, every=1), steps_per_call=10)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    config = Config(
        out=tmp_path_factory.mktemp("study"),
        mazes=("umaze",),
        goals=1,
        horizon=8,
        diffusion_steps=8,
        network=NetworkOptions(dim=8, multipliers=(1,)),
        base=dataclasses.replace(TRAINING, steps=1000),
        base_steps={"umaze": 10, "large": 1000},
        expert=TRAINING,
        reward=RewardOptions(widths=(8,)),
        matching=Matching(steps=10, batch_size=8, draws=64, seeds=2, steps_per_call=10),
        base_episodes=6,
        expert_episodes=6,
        map_windows=200,
        bins=4,
        plans=4,
        scales=(1.0, 2.0),
    )
    return config, STUDY.run(config)


def times(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


MAKERS = (study, "fit"), (study, "fit_reward"), (workshop, "train_discriminator")
MODELS = ("base", "null_base", "null_reward") + tuple(
    f"goal_0/{name}" for name in ("expert", "reward", "discriminator")
)


def logged(folder):
    """Files of the trainings' own directories."""
    return {p for name in MODELS for p in times(folder / "umaze" / name)}


STEERED = {"unsteered", "expert"} | {
    f"{name} {scale}" for name in ("reward", "logit", "sigmoid") for scale in (1, 2)
}


RESULTS = ("maps.npz", "result.json", "seconds.json")


@pytest.mark.slow
def test_files_and_results(done):
    config, _ = done
    found = {str(p.relative_to(config.out)) for p in times(config.out)}
    assert found == {
        *("results.json", "settings.json", "config.yaml", "environment.json"),
        *(f"report/{name}" for name in ("results.json", "report.html", "report.md")),
        "report/maps_umaze.svg",
        *(f"umaze/{name}.safetensors" for name in MODELS),
        *(f"umaze/{name}" for name in ("null.json", *(f"goal_0/{n}" for n in RESULTS))),
    } | {str(p.relative_to(config.out)) for p in logged(config.out)}
    for name in MODELS:
        (line,) = (config.out / "umaze" / name / "metrics.jsonl").read_text().splitlines()
        assert json.loads(line)["step"] == 10 and json.loads(line)["loss"] > 0
        assert not (config.out / "umaze" / name / "checkpoints").exists()
    folder = config.out / "umaze" / "goal_0"
    result = json.loads((folder / "result.json").read_text())
    assert (result["maze"], result["goal"], result["free_cells"]) == ("umaze", [-1.2, 1.2], 7)
    for peak in (result["peak"], result["discriminator_peak"], *result["seed_peaks"]):
        away = np.linalg.norm(np.subtract(peak["at"], result["goal"]))
        assert peak["metres"] == pytest.approx(away)
        x, y = peak["at"]
        assert peak["in_cell"] == (-1.5 < x < -0.5 and 0.5 < y < 1.5)
    assert len(result["seed_peaks"]) == 2
    assert set(result["steering"]) == STEERED
    for shares in result["steering"].values():
        assert set(shares) == {"planned", "executed", "inside"}
        assert all(0 <= share <= 1 for share in shares.values())
    assert all(len(v) == 8 for v in result["diagnostics"].values())
    laps = {"data", "expert", "reward", "discriminator", "maps", "steering"}
    assert set(result["seconds"]) == laps
    with np.load(folder / "maps.npz") as maps:
        assert maps["reward"].shape == maps["discriminator"].shape == (20, 20)
    expert = load_model(folder / "expert.safetensors", TrajectorySpace)
    assert expert.space.about["goal"] == [-1.2, 1.2]
    with pytest.raises(InputError, match="the run there has horizon 8, not 16; give the same"):
        STUDY.run(dataclasses.replace(config, horizon=16))
    assert load_guide(folder / "reward.safetensors", TrajectorySpace).space.shape == (8, 4)


def test_summary(done):
    config, summary = done
    assert json.loads((config.out / "results.json").read_text()) == summary
    (result,) = summary["results"]
    hit = result["peak"]["in_cell"]
    assert summary["goals"] == 1 and summary["peaks_in_goal_cell"] == int(hit)
    assert summary["share_in_goal_cell"] == float(hit)
    seeds = [p["in_cell"] for p in result["seed_peaks"]]
    assert summary["seed_share_in_goal_cell"] == np.mean(seeds)
    assert summary["median_metres"] == result["peak"]["metres"]
    assert summary["chance_share_in_goal_cell"] == pytest.approx(1 / 7)
    assert summary["steering"] == result["steering"]
    null = summary["null"]["umaze"]
    assert len(null["peaks"]) == 3  # the mean of the seeds, then each
    x, y = null["peaks"][0]
    assert summary["null_share_in_goal_cell"] == float(-1.5 < x < -0.5 and 0.5 < y < 1.5)
    assert summary["seconds"] == pytest.approx(sum(result["seconds"].values()))


def test_steps_that_are_given_no_longer_are_another_setting(done):
    config, _ = done
    with pytest.raises(InputError, match=r"has base_steps\.\w+ \d+, which is not given now"):
        STUDY.run(dataclasses.replace(config, base_steps={}))


def test_a_damaged_map_is_named(done, tmp_path):
    config, summary = done
    (tmp_path / "umaze/goal_0").mkdir(parents=True)
    with pytest.raises(InputError, match=r"goal_0/maps.npz: is missing or damaged; delete .*json"):
        write_report(tmp_path, summary, config.headline_scale)


def test_report(done):
    config, summary = done
    found = json.loads((config.out / "report" / "results.json").read_text())
    hit = summary["share_in_goal_cell"] >= 0.7812
    assert found["claims"][0]["verdict"] == ("reproduced" if hit else "not reproduced")
    text = (config.out / "report" / "report.md").read_text()
    (result,) = summary["results"]
    assert f"| umaze | 1 | {summary['peaks_in_goal_cell']} |" in text
    assert f"| {result['peak']['metres']:.2f} |" in text and "![umaze:" in text
    steered = result["steering"]["reward 2"]
    assert f"| reward 2 | {steered['planned']:.2f} | {steered['executed']:.2f} |" in text
    assert "<svg" in (config.out / "report" / "maps_umaze.svg").read_text()


def test_a_second_start_makes_nothing_anew(done, monkeypatch):
    config, summary = done
    before = times(config.out / "umaze")
    for module, name in MAKERS:
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(MazeTask, "record", None)
    assert STUDY.run(config) == summary
    assert times(config.out / "umaze") == before


def test_a_study_that_was_stopped_goes_on(done, monkeypatch):
    """What is missing is made, of what is there; what a kill left of a training is removed."""
    config, summary = done
    folder = config.out / "umaze"
    before = {p: p.read_bytes() for p in times(folder)}
    (folder / "goal_0" / "result.json").unlink()
    (folder / "null.json").unlink()
    left = [folder / name / "checkpoints" for name in MODELS]
    for path in left:
        (path / "10").mkdir(parents=True)
    diagnose, held = study.diagnose, []
    monkeypatch.setattr(
        study, "diagnose", lambda *a, **o: held.append((a[3], o)) or diagnose(*a, **o)
    )
    for module, name in MAKERS:
        monkeypatch.setattr(module, name, None)
    again = STUDY.run(config)

    def timeless(result):
        return {k: v for k, v in result.items() if k != "seconds"}

    assert timeless(again["results"][0]) == timeless(summary["results"][0])
    assert again["null"] == summary["null"]
    assert not any(path.exists() for path in left)
    # Diagnostics are of walks that no model was trained on, and of the matching that there was.
    rows, options = held[-1]
    space = load_model(folder / "goal_0" / "expert.safetensors", TrajectorySpace).space
    assert options == {"matching": config.matching} and rows.shape == (200 + 256, 8, 4)
    walks = study.MazeWork(config, MazeTask("umaze")).record([-1.2, 1.2], 6, 1000)
    trained = window_source(walks, space)
    every = trained.flat[trained.starts[:, None] + trained.stride * np.arange(8)[None]]
    assert len(every) > 6
    assert not {r.tobytes() for r in np.asarray(rows)} & {r.tobytes() for r in np.asarray(every)}
    sampled = np.asarray(trained.sample(jax.random.key(0), 50))
    assert {r.tobytes() for r in sampled} <= {r.tobytes() for r in np.asarray(every)}
    for path, data in before.items():
        if path.suffix == ".safetensors":
            assert path.read_bytes() == data


DAMAGED = {
    "cut short": ("goal_0/result.json", lambda text: text[:200], "is damaged or cut short"),
    "empty": ("null.json", lambda text: "", "is damaged or cut short"),
    "another file": ("null.json", lambda text: "[]", "is damaged, it has no mapping"),
    "lacks a guide": (
        "goal_0/result.json",
        lambda text: text.replace('"logit 2"', '"logit 3"'),
        "is damaged, it has no steering.logit 2",
    ),
    "lacks a peak": (
        "goal_0/result.json",
        lambda text: text.replace('"in_cell"', '"in"'),
        "is damaged, it has no peak.in_cell",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_result_is_named_before_anything_is_made(done, tmp_path, monkeypatch, case):
    config, _ = done
    name, damage, said = DAMAGED[case]
    for file in ("settings.json", "config.yaml", "umaze/null.json", "umaze/goal_0/result.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(config.out / file, tmp_path / file)
    path = tmp_path / "umaze" / name
    path.write_text(damage(path.read_text()))
    before = times(tmp_path)
    monkeypatch.setattr(MazeTask, "record", None)
    with pytest.raises(InputError) as error:
        STUDY.run(dataclasses.replace(config, out=tmp_path))
    assert str(error.value) == f"{path}: {said}; delete it, and it is made again"
    assert times(tmp_path) == before


@pytest.fixture(scope="module")
def longer(done, tmp_path_factory):
    """The same with trainings of 40 steps, without what comes after them."""
    config = dataclasses.replace(
        done[0],
        out=tmp_path_factory.mktemp("longer"),
        base_steps={"umaze": 40},
        expert=dataclasses.replace(TRAINING, steps=40),
        matching=dataclasses.replace(done[0].matching, steps=40),
        save_every=10,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "steered", lambda *_, **__: {})
        patch.setattr(study, "diagnose", lambda *_, **__: {})
        work = study.MazeWork(config, MazeTask("umaze"))
        work.null()
        work.goal(0)
        yield config


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_training_that_was_killed_goes_on_to_the_same_end(longer, tmp_path, monkeypatch, model):
    config = dataclasses.replace(longer, out=tmp_path)
    shutil.copytree(longer.out, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "umaze" / model
    shutil.rmtree(folder)
    folder.with_suffix(".safetensors").unlink()
    for name in ("null.json", "goal_0/result.json"):
        (tmp_path / "umaze" / name).unlink()
    log = Run.log

    def interrupt(self, step, metrics):
        log(self, step, metrics)
        if step == 30:
            raise KeyboardInterrupt

    def go_on():
        work = study.MazeWork(config, MazeTask("umaze"))
        work.goal(0) if model.startswith("goal") else work.null()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "log", interrupt)
        go_on()
    assert {p.name for p in (folder / "checkpoints").glob("[0-9]*")} >= {"20"}
    assert not folder.with_suffix(".safetensors").exists()
    go_on()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30, 40]
    assert len(json.loads((folder / "environment.json").read_text())) == 2
    assert not (folder / "checkpoints").exists()
    ends = [
        (out / "umaze" / f"{model}.safetensors").read_bytes() for out in (longer.out, tmp_path)
    ]
    assert ends[0] == ends[1]


def test_the_report_s_command_repeats_the_study(done):
    """Parsed, it is the config of the run: out, mazes and goals as well."""
    config, _ = done
    found = json.loads((config.out / "report" / "results.json").read_text())["facts"]
    argv = shlex.split(found["command"])
    assert argv[:3] == ["reward-jax", "study", "maze"]
    again = command_line.parse("reward-jax study maze", "", Config, argv[3:])
    assert again == config


def test_a_folder_of_something_else_is_left_alone(done, tmp_path):
    config, _ = done
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        STUDY.run(dataclasses.replace(config, out=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_bad_settings(tmp_path):
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(goals=9), "goals is 9: give 1 to 8"),
        (dict(base_steps={"small": 5}), "base_steps: 'small' is no maze; there are open, umaze"),
        (dict(headline_scale=3.0), "headline_scale 3.0 is none of the scales"),
        (dict(mazes=("hedge",)), "environment 'hedge' is unknown"),
        (dict(mazes=()), "mazes is empty: give one of open, umaze"),
        (dict(plans=0), "plans must be 1 or more, not 0"),
        (dict(map_windows=0), "map_windows must be 1 or more, not 0"),
        (dict(seed=-1), "seed must be 0 to 4294967295, not -1"),
        (dict(base=Training(steps=0)), "base.steps must be 1 or more, not 0"),
        (dict(expert=Training(batch_size=0)), "expert.batch_size must be 1 or more, not 0"),
        (dict(expert=Training(prediction="x0")), "expert.prediction must be base.prediction"),
        (dict(matching=Matching(seeds=0)), "matching.seeds must be 1 or more, not 0"),
        (dict(matching=Matching(x_t="base")), "matching.x_t is base, but the study matches on"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message):
            STUDY.run(Config(out=tmp_path / "study", **changes))
    assert not list(tmp_path.iterdir())
