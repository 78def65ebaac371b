"""The command line from recording to a report; kills and interrupts; quick answers; configs."""

import base64
import dataclasses
import fcntl
import functools
import html.parser
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, cast

import h5py
import numpy as np
import pytest
import yaml

from common_jax import resume
from common_jax.cli import command_line
from common_jax.cli.commands import Command
from common_jax.run import Run
from reward_jax import cli
from reward_jax.commands import demo, study
from reward_jax.data import hdf5
from reward_jax.data.checkpoint import load_guide, load_model, save_model
from reward_jax.data.files import read_episodes
from reward_jax.data.trajectory.convert import expert_in_base_coordinates
from reward_jax.data.trajectory.normalisers import Normaliser
from reward_jax.data.trajectory.space import TrajectoryModel, TrajectorySpace
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.schedule import make_schedule
from reward_jax.models.reward_nets import HalfUnet, WindowMLP
from reward_jax.models.temporal.unet import TemporalUnet
from reward_jax.planning import steer
from reward_jax.planning.extract import Matching, hold_out
from reward_jax.planning.train_run import TrainOptions, check_taken_over
from reward_jax.report import measure, page, write
from reward_jax.report.write import ReportOptions, write_report
from reward_jax.reward import guide
from reward_jax.studies.maze.settings import Config as StudyConfig
from reward_jax.tasks.maze.mazes import goals, maze
from tests.reward.cli_runs import (
    MATCHING,
    ROOT,
    SMALL,
    STEPS,
    printed_by,
    read_jsonl,
    run,
    space,
    start,
)

WHOLE = 200  # steps of the base, whose training is killed below
STEERED = ["--plans", 4]
MAP = ["--windows", 200, "--bins", 4]
NOTED = ["config.yaml", "environment.json", "settings.json"]  # what a command ran with


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every command once; the folder, and what each one printed."""
    folder, printed = tmp_path_factory.mktemp("made"), {}

    def go(name, *argv):
        printed[name] = printed_by(*argv)

    base, expert, reward = (folder / name for name in ("base", "expert", "reward"))
    data = [folder / "base.hdf5", folder / "expert.hdf5"]
    walks = ["data", "--env", "umaze", "--episodes", 6, "--horizon", 8]
    go("data", *walks, "--out", data[0])
    go("expert data", *walks, "--out", data[1], "--goal", 0, "--seed", 1)
    go("train", "train", "--data", data[0], "--out", base, *SMALL, "--training.steps", WHOLE)
    go("expert", "train", "--data", data[1], "--out", expert, "--init", base, *STEPS)
    both = ["--data", data[0], "--expert_data", data[1]]
    go("extract", "extract", "--base", base, "--expert", expert, *both, "--out", reward, *MATCHING)
    go("heatmap", "heatmap", "--reward", reward, "--data", data[0], "--out", folder / "map", *MAP)
    steered = ["--base", base, "--reward", reward, *STEERED]
    go("steer", "steer", *steered, "--out", folder / "steer")
    grid = ["--scales", "[0, 2]", "--t_stopgrads", "[0, 4, 8]"]
    go("sweep", "sweep", *steered, "--out", folder / "sweep", *grid)
    models = ["--base", base, "--expert", expert, "--reward", reward, "--data", data[0]]
    go("report", "report", *models, "--out", folder / "report", *STEERED, *MAP)
    return folder, printed


def names(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


RUN = ["checkpoints", "config.yaml", "environment.json", "metrics.jsonl", "settings.json"]
RUN += ["tensorboard"]


def test_data(made):
    folder, printed = made
    base, expert = (read_episodes(folder / f"{name}.hdf5") for name in ("base", "expert"))
    assert len(base.lengths) == len(expert.lengths) == 6
    assert base.about["task"] == "umaze" and base.about["goal"] is None
    assert expert.about["goal"] == [-1.2, 1.2]
    assert "6 walks to random goals" in printed["data"]
    assert "6 walks to the goal (-1.2, 1.2)" in printed["expert data"]
    with h5py.File(folder / "expert.hdf5") as file:
        stored = json.loads(cast(Any, file["metadata/run"])[()])
    assert stored["config"]["goal"] == "0" and stored["config"]["env"] == "umaze"
    assert stored["versions"]["jax"] and stored["command"] and "revision" in stored


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("base", ["denoiser.safetensors"]),
        ("expert", ["denoiser.safetensors"]),
        ("reward", ["diagnostics.json", "reward.safetensors"]),
    ],
)
def test_a_run_keeps_all_that_it_takes_to_know_it(made, name, more):
    folder, _ = made
    assert names(folder / name) == sorted(RUN + more)
    (begun,) = json.loads((folder / name / "environment.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}\+?", begun["revision"] or "0" * 40)
    assert begun["versions"]["jax"] and begun["devices"] and begun["time"] and begun["command"]
    rows = read_jsonl(folder / name / "metrics.jsonl")
    last = WHOLE if name == "base" else 20
    assert [row["step"] for row in rows] == list(range(10, last + 1, 10))
    assert all(np.isfinite(row["loss"]) for row in rows) and rows[1]["steps_per_second"] > 0
    assert names(folder / name / "checkpoints") == [str(last), "settings.json"]
    command = "extract" if name == "reward" else "train"
    options, _ = cli.COMMANDS[command].load()
    path = folder / name / "config.yaml"
    again = command_line.parse("reward-jax", "", options, ["--config", str(path)])
    assert again.out == str(folder / name) and again.resume is False


def test_what_the_models_know(made):
    folder, printed = made
    base, expert = (load_model(folder / n, TrajectorySpace) for n in ("base", "expert"))
    assert base.space.shape == expert.space.shape == (8, 4)
    assert base.denoiser.schedule.steps == 8 and base.denoiser.model.multipliers == (1,)
    np.testing.assert_array_equal(base.space.normaliser.scale, expert.space.normaliser.scale)
    assert base.space.about["goal"] is None and expert.space.about["goal"] == [-1.2, 1.2]
    assert printed["train"] == f"denoiser: {folder / 'base' / 'denoiser.safetensors'}"

    reward = load_guide(folder / "reward", TrajectorySpace)
    assert reward.space.about["goal"] == [-1.2, 1.2]
    found = json.loads((folder / "reward" / "diagnostics.json").read_text())
    assert set(found) == {"explained", "antisymmetric", "seed_agreement", "notes"}
    assert [len(found[k]) for k in ("explained", "antisymmetric", "seed_agreement")] == [8] * 3
    assert found["notes"] == []
    middle = (
        f"explained fraction of the target, median over t: {np.median(found['explained']):.2f}"
    )
    assert middle in printed["extract"] and "reward.safetensors" in printed["extract"]


def test_one_stream_of_walks_is_one_episode_where_the_user_says_so(made, tmp_path, capsys):
    """As in D4RL's Maze2D: each walk is shorter than a window, the stream is long enough."""
    folder, _ = made
    walks = read_episodes(folder / "base.hdf5")
    short = dataclasses.replace(
        walks, lengths=np.full(len(walks.observations) // 40, 40), arrivals=None, goals=None,
        observations=walks.observations[: len(walks.observations) // 40 * 40],
        actions=walks.actions[: len(walks.observations) // 40 * 40],
        rewards=None, terminations=None, truncations=None,
    )  # fmt: skip
    hdf5.write(tmp_path / "stream.hdf5", short)
    data = ["--data", tmp_path / "stream.hdf5"]
    argv = ["train", *data, *SMALL, "--training.steps", 10, "--out", tmp_path / "base"]
    assert run(*argv) == 2
    assert "take 71 steps, but the episodes have 40 to 40" in capsys.readouterr().err
    assert run(*argv, "--cut.ends", "none") == 0
    # Every command that reads episodes takes it, a map and a page, too.
    models = ["--base", folder / "base", "--expert", folder / "expert"]
    argv = ["extract", *models, *data, "--matching.x_t", "base", *MATCHING]
    assert run(*argv, "--out", tmp_path / "reward", "--cut.ends", "none") == 0
    notes = json.loads((tmp_path / "reward" / "diagnostics.json").read_text())["notes"]
    assert notes == ["too few episodes to hold some out: diagnostics are of those trained on"]
    # Or each walk begins windows that go on beyond its end.
    padded = ["--cut.padding", "repeat"]
    argv = ["extract", *models, *data, "--matching.x_t", "base", *MATCHING, *padded]
    assert run(*argv, "--out", tmp_path / "padded") == 0
    notes = json.loads((tmp_path / "padded" / "diagnostics.json").read_text())["notes"]
    assert notes == []  # some are held out, though none holds a whole window
    reward = ["--reward", folder / "reward", *data, "--cut.ends", "none"]
    assert run("heatmap", *reward, "--out", tmp_path / "map", *MAP) == 0
    assert run("report", *models, *reward, "--out", tmp_path / "page", *STEERED, *MAP) == 0


def test_data_of_another_maze_are_refused(made, tmp_path, capsys):
    folder, _ = made
    argv = ["data", "--env", "open", "--episodes", 4, "--horizon", 8, "--stride", 10]
    assert run(*argv, "--out", tmp_path / "open.hdf5") == 0
    capsys.readouterr()
    data = ["--data", tmp_path / "open.hdf5"]
    models = ["--base", folder / "base", "--expert", folder / "expert"]
    for argv in (
        ["extract", *models, *data, "--matching.x_t", "base", *MATCHING],
        ["heatmap", "--reward", folder / "reward", *data, *MAP],
        ["report", *models, "--reward", folder / "reward", *data, *STEERED, *MAP],
    ):
        assert run(*argv, "--out", tmp_path / "out") == 2
        assert "the data are of open, the model is of umaze" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_what_is_held_out_is_not_trained_on(made):
    folder, _ = made
    walks = read_episodes(folder / "base.hdf5")
    space = load_model(folder / "base", TrajectorySpace).space
    trained, apart = hold_out(walks, 1 / 3, space)
    assert (len(trained.lengths), len(apart.lengths)) == (4, 2)
    rows = np.concatenate([trained.observations, apart.observations])
    assert {tuple(r) for r in rows.tolist()} == {tuple(r) for r in walks.observations.tolist()}
    second = slice(walks.starts[2], walks.ends[2])
    np.testing.assert_array_equal(
        apart.observations[: walks.lengths[2]], walks.observations[second]
    )
    assert walks.arrivals is not None and apart.arrivals is not None and walks.goals is not None
    np.testing.assert_array_equal(apart.arrivals, walks.arrivals[[2, 5]])
    np.testing.assert_array_equal(cast(Any, apart.goals), walks.goals[[2, 5]])
    for share in (0.0, 0.05):  # none, and too few of them
        assert hold_out(walks, share, space) == (walks, walks)


def test_heatmap(made):
    folder, printed = made
    assert names(folder / "map") == sorted([*NOTED, "heatmap.json", "heatmap.npz", "heatmap.png"])
    found = json.loads((folder / "map" / "heatmap.json").read_text())
    away = np.linalg.norm(np.subtract(found["peak"], found["goal"]))
    assert found["distance"] == pytest.approx(away) and found["goal"] == [-1.2, 1.2]
    where = "the same cell" if found["at_goal"] else "another cell"
    assert f"goal at (-1.20, 1.20): {away:.2f} m apart, {where}" in printed["heatmap"]
    with np.load(folder / "map" / "heatmap.npz") as arrays:
        assert arrays["values"].shape == arrays["counts"].shape == (20, 20)
        assert arrays["counts"].sum() == 200 * 8


def test_the_settings_of_a_training_run_are_not_lost(made, capsys):
    folder, _ = made
    stored = (folder / "reward" / "config.yaml").read_bytes()
    argv = [
        "--reward",
        folder / "reward",
        "--data",
        folder / "base.hdf5",
        "--out",
        folder / "reward",
    ]
    assert run("heatmap", *argv, *MAP) == 2
    assert "reward: holds a training run; name another directory" in capsys.readouterr().err
    assert (folder / "reward" / "config.yaml").read_bytes() == stored


@pytest.mark.parametrize(
    ("name", "folder"),
    [("heatmap", "map"), ("steer", "steer"), ("sweep", "sweep"), ("report", "report")],
)
def test_results_are_of_one_run_with_one_set_of_settings(made, capsys, name, folder):
    """Another run meanwhile is refused, and one of other settings, before any work."""
    out = made[0] / folder
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    given = ["--config", out / "config.yaml"]
    assert run(name, *given, "--seed", 77) == 2
    error = capsys.readouterr().err
    assert f"{out}: the run there has seed " in error and "not 77; give the same" in error
    with resume.alone(out):
        assert run(name, *given) == 2
    assert f"{out}: another run is writing there" in capsys.readouterr().err
    other = "sweep" if name == "steer" else "steer"
    models = ["--base", made[0] / "base", "--reward", made[0] / "reward"]
    assert run(other, *models, "--out", out) == 2
    assert f"the run there has command '{name}', not '{other}'" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_steer_and_sweep(made):
    folder, printed = made
    assert names(folder / "steer") == sorted([*NOTED, "plans.npz", "steer.json", "steer.png"])
    found = json.loads((folder / "steer" / "steer.json").read_text())
    assert found["goal"] == [-1.2, 1.2] and found["scale"] == 2.0
    for name in ("unsteered", "steered"):
        assert all(0 <= share <= 1 for share in found[name].values())
        assert f"{name}: {found[name]['planned']:.2f} of plans end at" in printed["steer"]
        errors = found["standard_errors"][name]
        assert set(errors) == set(found[name])
        share, error = found[name]["planned"], errors["planned"]
        assert error == pytest.approx((share * (1 - share) / 3) ** 0.5)  # of four plans
    with np.load(folder / "steer" / "plans.npz") as arrays:
        plans, unsteered, starts = (arrays[k] for k in ("plans", "unsteered", "starts"))
    assert plans.shape == unsteered.shape == (4, 8, 2)
    for each in (plans, unsteered):  # the first state is the given one
        np.testing.assert_allclose(each[:, 0], starts[:, :2], atol=1e-5)
    assert np.abs(plans - unsteered).max() > 1e-4

    assert names(folder / "sweep") == sorted([*NOTED, "sweep.json"])
    rows = json.loads((folder / "sweep" / "sweep.json").read_text())
    assert [(r["scale"], r["t_stopgrad"]) for r in rows] == [
        (s, t) for s in (0, 2) for t in (0, 4, 8)
    ]
    table = printed["sweep"].splitlines()
    assert table[1].split()[-3:] == ["0", "4", "8"]
    for scale, line in zip((0, 2), table[2:4], strict=True):
        shares = [r["planned"] for r in rows if r["scale"] == scale]
        assert line.split() == [f"{scale:g}", *(f"{share:.2f}" for share in shares)]


def test_maps_and_plans_over_a_mesh(made, tmp_path, monkeypatch):
    """Eight devices: models and rows are cut over them, and what one device gave."""
    from reward_jax.planning import plan as planning

    folder, _ = made
    mesh = ["--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2]
    swept, asked = [], []

    def keep(*args, **options):
        asked.append(options)
        swept.append(guide.sweep(*args, **options))
        return swept[-1]

    monkeypatch.setattr(planning, "sweep", keep)
    models = ["--base", folder / "base", "--reward", folder / "reward", *STEERED, *mesh]
    assert run("steer", *models, "--out", tmp_path / "steer") == 0
    grid = ["--scales", "[0, 2]", "--t_stopgrads", "[0, 4, 8]"]
    assert run("sweep", *models, "--out", tmp_path / "sweep", *grid) == 0
    argv = ["--reward", folder / "reward", "--data", folder / "base.hdf5", *MAP, *mesh]
    assert run("heatmap", *argv, "--out", tmp_path / "map") == 0
    for file in ("steer/plans.npz", "map/heatmap.npz"):
        with np.load(folder / file) as one, np.load(tmp_path / file) as many:
            assert set(one) == set(many)
            for name in one:
                np.testing.assert_allclose(many[name], one[name], atol=1e-4, err_msg=name)
    with np.load(folder / "steer" / "plans.npz") as one:
        spaces = load_model(folder / "base", TrajectorySpace).space
        for x, name in ((swept[0][1, 0], "plans"), (swept[0][0, 0], "unsteered")):
            positions = spaces.plans(x).observations[..., :2]
            np.testing.assert_allclose(positions, one[name], atol=1e-4)
    rows = [json.loads((d / "sweep" / "sweep.json").read_text()) for d in (folder, tmp_path)]
    assert rows[0] == rows[1]
    assert not swept[0].sharding.is_fully_replicated and asked[0]["options"].temperature == 1.0

    cold = [*models, "--guidance.temperature", 0.25, "--scales", "[0]", "--t_stopgrads", "[0]"]
    monkeypatch.setattr(steer, "plan_sweep", lambda *_, **o: asked.append(o) or swept[0][:1, :1])
    assert run("sweep", *cold, "--out", tmp_path / "cold") == 0
    assert asked[-1]["options"].temperature == 0.25


class Page(html.parser.HTMLParser):
    """Tags and where they point."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.alts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        self.sources += [found[k] for k in ("src", "href") if found.get(k)]
        if tag == "img":
            self.alts.append(found.get("alt"))


def test_report(made):
    folder, printed = made
    assert names(folder / "report") == sorted([*NOTED, "report.html"])
    text = (folder / "report" / "report.html").read_text("utf-8")
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags
    assert "http://" not in text and "https://" not in text
    assert "default-src 'none'" in text
    pictures = [s for s in page.sources if s.startswith("data:image/svg+xml;base64,")]
    assert pictures == page.sources
    # map, base, expert, unsteered, steered, 6 panels, loss, diagnostics
    assert len(pictures) == 13 and all(page.alts)
    for picture in pictures:
        assert b"</svg>" in base64.b64decode(picture.partition(",")[2])[-20:]
    for label in (
        "heat map",
        "walks that the base learned",
        "plans of the expert",
        "steered plans",
    ):
        assert any(label in alt for alt in page.alts), label
    for row in ("base, unsteered", "base, steered by the reward", "expert"):
        assert row in text and f"{row}: " in printed["report"]
    assert "m apart" in printed["report"] and str(folder / "report") in printed["report"]


def test_values_in_the_report_are_escaped_and_guidance_is_the_user_s(made, monkeypatch):
    folder, _ = made
    drawn = dict.fromkeys(KINDS, ("data:,", "<b>"))
    monkeypatch.setattr(page, "page_figures", lambda measured: drawn)
    monkeypatch.setattr(page, "panels", lambda measured: [("<i>t", "data:,")])
    ddim = guide.GuidanceOptions(scale=0.5, sampler="ddim", sampling_steps=3)
    models: dict[str, Any] = {k: str(folder / k) for k in ("base", "expert", "reward")}
    out = folder / "escaped"
    options = ReportOptions(
        **models, data=str(folder / "base.hdf5"), out=out, guidance=ddim, plans=4, windows=200,
        bins=4,
    )  # fmt: skip
    written = write_report(options)
    text = written.path.read_text("utf-8")
    assert "&lt;i&gt;t" in text and "&lt;b&gt;" in text
    assert "<i>" not in text and '"<b>"' not in text
    assert "scale 0.5 (1 moves as far" in text and "sampler ddim, sampling_steps 3" in text
    maps = written.measured.maps
    assert maps  # the sampler's own steps
    assert maps.left.tolist() == [8, 5, 3, 0] and len(maps.chain) == 4


KINDS = ("base", "expert", "heat", "unsteered", "steered", "loss", "explained")


def test_the_expert_s_plans_are_restored_by_its_own_normaliser(made, tmp_path):
    """An expert of another normaliser: what the page shows is in the world's own units."""
    from reward_jax.planning import plan as planning

    folder, _ = made
    expert = load_model(folder / "expert", TrajectorySpace)
    n = expert.space.normaliser
    other = Normaliser(n.offset + np.float32(0.25), n.scale)
    space = dataclasses.replace(expert.space, normaliser=other)
    save_model(tmp_path / "expert.safetensors", dataclasses.replace(expert, space=space))
    shown = {}

    def render(measured):
        shown.update({name: outcome.shown for name, outcome in measured.outcomes.items()})
        return ""

    with pytest.MonkeyPatch.context() as patch:
        zeros = lambda model, starts, **_: np.zeros((len(starts), 8, 4))  # noqa: E731
        patch.setattr(planning, "plan", zeros)
        patch.setattr(measure, "plan", lambda *_, **__: np.zeros((9, 1, 8, 4)))
        patch.setattr(write, "render", render)
        models: dict[str, Any] = {k: str(folder / k) for k in ("base", "reward")}
        models |= {"expert": str(tmp_path / "expert.safetensors"), "data": folder / "base.hdf5"}
        write_report(ReportOptions(**models, out=tmp_path, plans=2))
    for name, offset in zip(shown, (n.offset, n.offset, other.offset), strict=True):
        np.testing.assert_allclose(shown[name], np.broadcast_to(offset[:2], (2, 8, 2)), atol=1e-6)


@pytest.mark.slow
def test_killed_and_resumed(made, tmp_path):
    """SIGKILL in the middle: --resume goes on from a checkpoint to the same bytes."""
    folder, _ = made
    whole, killed = folder / "base", tmp_path / "killed"
    argv = ["train", "--data", folder / "base.hdf5", *SMALL, "--training.steps", WHOLE]
    argv += ["--save_every", 20, "--out", killed]
    process = start(*argv)
    checkpoints, metrics = killed / "checkpoints", killed / "metrics.jsonl"
    while not list(checkpoints.glob("[0-9]*")) or len(read_jsonl(metrics)) < 6:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "denoiser.safetensors").exists()
    began = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
    assert 20 <= began < WHOLE

    assert run(*argv) == 2  # without --resume it is left alone
    assert run(*argv, "--resume") == 0
    written = [(d / "denoiser.safetensors").read_bytes() for d in (whole, killed)]
    assert written[0] == written[1]
    rows = [read_jsonl(d / "metrics.jsonl") for d in (whole, killed)]
    assert [r["step"] for r in rows[1]] == list(range(10, WHOLE + 1, 10))
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]
    assert len(json.loads((killed / "environment.json").read_text())) == 2


def test_a_refused_resume_loses_nothing(made, tmp_path, capsys):
    """The rows of the file are others, which only the loop finds, and not the settings."""
    folder, _ = made
    data, out = tmp_path / "data.hdf5", tmp_path / "run"
    shutil.copy(folder / "base.hdf5", data)
    argv = ["train", "--data", data, *SMALL, "--out", out]
    assert run(*argv) == 0
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss": 1.0}\n')  # after the last checkpoint
    shutil.copy(folder / "expert.hdf5", data)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(*argv, "--resume", "--save_every", 5) == 2
    assert f"{out}/checkpoints: the run there has " in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("keep", [0, 7])
def test_a_checkpoint_cut_short_is_named(made, tmp_path, capsys, keep):
    folder, _ = made
    shutil.copytree(folder / "base", tmp_path / "run")
    argv = ["train", "--data", folder / "base.hdf5", *SMALL, "--training.steps", WHOLE]
    argv += ["--save_every", 20, "--out", tmp_path / "run", "--resume"]
    checkpoints = (tmp_path / "run" / "checkpoints").glob("[0-9]*")
    newest = max(checkpoints, key=lambda path: int(path.name))
    held = [p for p in newest.rglob("d/*") if p.is_file()]
    assert held
    for path in held:
        path.write_bytes(path.read_bytes()[:keep])
    assert run(*argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"reward-jax: error: {newest}: the checkpoint is corrupt"), said
    assert said.count("\n") == 1


def test_an_interrupted_extraction_goes_on(made, tmp_path, monkeypatch, capsys):
    folder, _ = made
    both = ["--data", folder / "base.hdf5", "--expert_data", folder / "expert.hdf5"]
    argv = ["extract", "--base", folder / "base", "--expert", folder / "expert", *both, *MATCHING]
    argv += ["--save_every", 10, "--out", tmp_path / "reward"]
    log = Run.log

    def interrupt(self, step, metrics):
        log(self, step, metrics)
        if step == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupt)
        assert run(*argv) == 130
    assert capsys.readouterr().err == "reward-jax: interrupted\n"
    assert names(tmp_path / "reward" / "checkpoints") == ["10", "settings.json"]
    assert not (tmp_path / "reward" / "reward.safetensors").exists()

    assert run(*argv, "--resume") == 0
    for name in ("reward.safetensors", "diagnostics.json"):
        assert (tmp_path / "reward" / name).read_bytes() == (folder / "reward" / name).read_bytes()
    assert [r["step"] for r in read_jsonl(tmp_path / "reward" / "metrics.jsonl")] == [10, 20]


def test_flags_go_on_top_of_the_config(tmp_path):
    config, out = tmp_path / "c.yaml", tmp_path / "walks.hdf5"
    config.write_text(f"env: medium\nout: {out}\nepisodes: 5\nhorizon: 4\n")
    assert run("data", "--episodes", 2, "--config", config, "--env=umaze", "--goal", "1,1") == 0
    with h5py.File(out) as file:
        stored: Any = file["metadata/about"]
        about = json.loads(stored[()])
    assert about["task"] == "umaze" and about["goal"] == [1, 1]
    assert len(read_episodes(out).lengths) == 2


def test_help_and_option_errors_load_no_jax():
    code = """
import sys
from reward_jax.cli import main
codes = [main(["--help"]), main(["--version"]), main(["heatmpa"]), main([])]
print(codes, [m for m in ("jax", "numpy", "gymnasium", "matplotlib") if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 2, 2] []"
    for command in ("data", "train", "extract", "heatmap", "steer", "sweep", "report", "demo"):
        assert re.search(rf"^  {command} ", done.stdout, re.M), command
    first, second = done.stderr.splitlines()
    assert first.startswith("reward-jax: error: unknown command heatmpa; did you mean heatmap?")
    assert second.startswith("reward-jax: error: a command is missing (commands: data, train,")


LEAVES = {name: c for name, c in cli.COMMANDS.items() if isinstance(c, Command)}
LEAVES |= {f"study {name}": command for name, command in study.COMMANDS.items()}


@pytest.mark.parametrize("command", LEAVES)
def test_every_command_has_help_and_knows_its_options(command, capsys):
    assert run(*command.split(), "--help") == 0
    assert "--config" in capsys.readouterr().out
    assert run(*command.split(), "--sede", 1) == 2
    assert "unknown option --sede; did you mean --seed?" in capsys.readouterr().err


CONFIGS = sorted((ROOT / "configs" / "reward").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_read(path, tmp_path, capsys):
    text = path.read_text("utf-8")
    named = re.search(r"command:\s+reward-jax (\w+(?: \w+)?) --config (\S+)", text)
    assert named and named[2] == str(path.relative_to(ROOT))
    for part in ("hardware:", "run time:", "expected:"):
        assert part in text, part
    options, _ = LEAVES[named[1]].load()
    found = command_line.parse("reward-jax", "", options, ["--config", str(path)])
    if named[1] in ("train", "extract"):  # its settings pass: it asks for its files
        files = {"base", "expert", "data", "expert_data"} & set(yaml.safe_load(text))
        argv = [x for name in files for x in (f"--{name}", tmp_path / "no.h5")]
        assert run(named[1], "--config", path, *argv, "--out", tmp_path / "out") == 2
        assert "no such file" in capsys.readouterr().err
    if robot := re.match(r"paper_(halfcheetah|hopper|walker2d)_", path.stem):
        # D4RL's files do not say what they are of; nor do plans go on beyond a fall without this.
        assert (found.env, found.cut.padding) == (robot[1], "terminal")
    if path.stem == "study_maze_cpu":
        assert found == StudyConfig()
        keys = set(yaml.safe_load(text))
        assert keys == set(StudyConfig.__dataclass_fields__)


def read_config(path):
    return command_line.parse("reward-jax train", "", TrainOptions, ["--config", str(path)])


INITS = [path for path in CONFIGS if "\ninit: " in path.read_text("utf-8")]


@pytest.mark.parametrize("path", INITS, ids=lambda path: path.stem)
def test_a_shipped_expert_asks_for_nothing_but_what_its_base_has(path):
    """As `train --init` holds it to; the base as the config that makes it says."""
    expert = read_config(path)
    (base,) = [
        b
        for p in CONFIGS
        if "_train_" in f"_{p.stem}" and (b := read_config(p)).out == expert.init
    ]
    n = base.network
    normaliser = Normaliser(np.zeros(4), np.ones(4), base.normaliser)
    made = score_from(
        TemporalUnet(4, n.dim, tuple(n.multipliers), n.attention), {}, "v",
        make_schedule(base.schedule, base.diffusion_steps), clip=base.clip_x0 or None,
    )  # fmt: skip
    about = TrajectorySpace(base.horizon, base.stride, int(base.actions), normaliser, {})
    check_taken_over(expert, TrajectoryModel(made, about))


AUTHORS = {
    "paper_hopper_extract": HalfUnet(4, (16, 16, 32, 32), "leaky_relu", None, use_bias=False),
    "paper_halfcheetah_extract": HalfUnet(4, (16, 16, 32, 32), "leaky_relu", None, use_bias=False),
    "paper_maze_extract": WindowMLP(
        64, (32, 16, 8), 32, "leaky_relu", "strided", "mean", "activated"
    ),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_the_paper_s_configs_make_the_networks_of_its_checkpoints(name):
    """As `load_torch` builds them from the authors' files."""
    path = ROOT / "configs" / "reward" / f"{name}.yaml"
    options_class, _ = cli.COMMANDS["extract"].load()
    options = command_line.parse("reward-jax extract", "", options_class, ["--config", str(path)])
    assert options.reward.make(space(horizon=256 if "maze" in name else 32)) == AUTHORS[name]


def test_there_are_configs():
    assert len(CONFIGS) >= 20 and len(INITS) >= 4


def test_demo(made, tmp_path, capsys, monkeypatch):
    """On tiny models in place of the shipped ones."""
    folder, _ = made
    for name in ("base", "expert"):
        shutil.copy(folder / name / "denoiser.safetensors", tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(demo, "PAIR", tmp_path)
    asked = []

    def extract(extraction, options):  # tested above; what it leaves is taken from there
        asked.append(options)
        shutil.copytree(folder / "reward", options.out)
        return "explained"

    monkeypatch.setattr(demo, "run_extraction", extract)
    monkeypatch.setattr(demo, "ReportOptions", functools.partial(ReportOptions, windows=200))
    out = tmp_path / "demo"
    (out / "reward").mkdir(parents=True)
    (out / "reward" / "config.yaml").write_text("of: an earlier run\n")
    argv = ["demo", "--out", out, "--episodes", 6, "--matching.steps", 100, "--matching.seeds", 2]
    assert run(*argv, "--plans", 4) == 2
    assert f"{out}: holds files that are no demo's" in capsys.readouterr().err
    assert names(out) == ["reward"] and names(out / "reward") == ["config.yaml"]
    (out / "demo.txt").write_text("an earlier demo's\n")
    (out / "settings.json").write_text('{"command": "report", "seed": 8}')
    with (out / ".demo.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run(*argv, "--plans", 4) == 2
    assert f"{out}: another run is writing there" in capsys.readouterr().err
    assert run(*argv, "--plans", 4) == 0
    (config,) = asked
    assert config.matching == Matching(steps=100, seeds=2) and config.seed == 0
    assert len(read_episodes(config.data).lengths) == 6
    assert read_episodes(config.expert_data).about["goal"] == [-1.2, 1.2]
    printed = capsys.readouterr().out
    for part in ("6 walks to random", "2 walks to the goal", "explained", "m apart", "in all"):
        assert part in printed
    assert "report.html" in printed
    assert len(Page((out / "report.html").read_text("utf-8")).alts) == 13


@pytest.mark.slow
def test_the_shipped_pair_s_reward_peaks_at_the_expert_s_goal(tmp_path, monkeypatch, capsys):
    """What `make demo-reward` shows, on a sixth of the walks and a fifth of the steps."""
    monkeypatch.setattr(demo, "write_report", lambda options: tmp_path / "report.html")
    argv = ["--out", tmp_path, "--episodes", 150, "--matching.steps", 300, "--matching.seeds", 1]
    assert run("demo", *argv) == 0
    argv = ["--reward", tmp_path / "reward", "--data", tmp_path / "base.hdf5"]
    assert run("heatmap", *argv, "--out", tmp_path / "map") == 0
    assert "m apart, the same cell" in capsys.readouterr().out


def test_the_shipped_models_fit_each_other():
    base, expert = (
        load_model(demo.PAIR / f"{k}.safetensors", TrajectorySpace) for k in ("base", "expert")
    )
    score, notes = expert_in_base_coordinates(base, expert)
    assert score is expert.denoiser and not notes
    assert base.space.about["goal"] is None and base.space.about["task"] == "umaze"
    assert expert.space.about["goal"] in goals(maze("umaze")).tolist()
