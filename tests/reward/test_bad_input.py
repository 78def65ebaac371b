"""Bad input: exit code 2, one line that names the place and the mend, nothing written."""

import json
import shutil
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from reward_jax.data import hdf5
from reward_jax.data.checkpoint import save_guide, save_model
from reward_jax.data.trajectory.normalisers import Normaliser
from tests.reward.cli_runs import (
    MATCHING,
    SMALL,
    episodes,
    model,
    read_jsonl,
    reward,
    run,
    save_all,
    space,
)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Sound files: base, expert, reward (.safetensors) and data.hdf5."""
    return save_all(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def fails(there, tmp_path, capsys):
    """Run a command with these options changed; check what every failure shares; give its line."""
    sound = {name: there / f"{name}.safetensors" for name in ("base", "expert", "reward")}
    sound["data"] = there / "data.hdf5"
    needs = {
        "data": {"env": "umaze", "episodes": 2, "horizon": 4},
        "train": {"data": sound["data"]},
        "extract": {
            **{k: sound[k] for k in ("base", "expert", "data")},
            "expert_data": sound["data"],
        },
        "heatmap": {"reward": sound["reward"], "data": sound["data"]},
        "steer": {"base": sound["base"], "reward": sound["reward"], "plans": 2},
        "sweep": {"base": sound["base"], "reward": sound["reward"], "plans": 2},
        "report": {**sound, "plans": 2},
        "study": {"goals": 1},
    }
    more = {"train": SMALL, "extract": MATCHING, "study": ["maze"]}

    def go(command, *flags, **changes):
        out = tmp_path / ("out.hdf5" if command == "data" else "out")
        argv = [command, *more.get(command, [])]
        for name, value in (needs[command] | {"out": out} | changes).items():
            argv += [] if value is None else [f"--{name.replace('__', '.')}", value]
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        code = run(*argv, *flags)
        printed = capsys.readouterr()
        assert code == 2, printed
        assert printed.err.startswith("reward-jax: error: "), printed.err
        assert printed.err.count("\n") == 1 and "Traceback" not in printed.err, printed.err
        assert sorted(tmp_path.rglob("*")) == before
        return printed.err

    return go


def has(line, *parts):
    for part in parts:
        assert str(part) in line, f"{part!r} is not in {line!r}"


USERS_OF_DATA = ["train", "extract", "heatmap", "report"]


@pytest.mark.parametrize("command", USERS_OF_DATA)
def test_data_missing(fails, tmp_path, command):
    has(fails(command, data=tmp_path / "no.hdf5"), "no.hdf5: no such file; give")


@pytest.mark.parametrize("command", USERS_OF_DATA)
def test_data_corrupt(fails, there, tmp_path, command):
    path = tmp_path / "d.hdf5"
    path.write_bytes((there / "data.hdf5").read_bytes()[:900])
    has(fails(command, data=path), "d.hdf5: cannot be read as HDF5", "fetch or write it anew")


def test_data_of_another_kind(fails, tmp_path):
    (tmp_path / "d.csv").write_text("1,2\n")
    has(fails("train", data=tmp_path / "d.csv"), "d.csv: is of no known kind; give a .hdf5")
    (tmp_path / "folder").mkdir()
    has(fails("train", data=tmp_path / "folder"), "folder: has no data/metadata.json")
    has(fails("train", data="minari:D4RL/none/such-v0"), "D4RL/none/such-v0", "minari download")
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["observations"] = np.zeros((4, 2))
    has(fails("train", data=tmp_path / "d.h5"), "d.h5: has no 'actions'")


@pytest.mark.parametrize("name", ["observations", "actions"])
def test_data_not_finite(fails, there, tmp_path, name):
    path = tmp_path / "d.hdf5"
    path.write_bytes((there / "data.hdf5").read_bytes())
    with h5py.File(path, "r+") as file:
        file[name][17, 1] = np.nan  # pyright: ignore[reportIndexIssue]
    has(fails("train", data=path), f"d.hdf5: {name} row 17, column 1 (from 0) is nan", "mend")


@pytest.mark.parametrize("command", USERS_OF_DATA)
def test_trajectories_too_short(fails, tmp_path, command):
    hdf5.write(tmp_path / "d.hdf5", episodes(steps=70))
    line = fails(command, data=tmp_path / "d.hdf5")
    has(line, "windows of 8 rows, stride 10, take 71 steps, but the episodes have 70 to 70")


def test_data_of_another_width(fails, tmp_path):
    hdf5.write(tmp_path / "d.hdf5", episodes(width=6))
    line = fails("extract", expert_data=tmp_path / "d.hdf5")
    has(line, "4 dimensions, the data 6")


MODELS = [
    ("train", "init", "denoiser"),
    ("extract", "base", "denoiser"),
    ("extract", "expert", "denoiser"),
    ("heatmap", "reward", "reward"),
    ("steer", "base", "denoiser"),
    ("sweep", "reward", "reward"),
    ("report", "expert", "denoiser"),
    ("report", "reward", "reward"),
]


@pytest.mark.parametrize(("command", "option", "kind"), MODELS)
def test_checkpoint_missing_corrupt_or_another(fails, there, tmp_path, command, option, kind):
    path = tmp_path / "m.safetensors"
    line = fails(command, **{option: path})
    has(line, f"m.safetensors: there is no such file; a {kind}")
    path.write_bytes((there / "base.safetensors").read_bytes()[:-40])
    has(fails(command, **{option: path}), "m.safetensors: corrupt", "copy or train it again")
    wrong = "reward" if kind == "denoiser" else "base"
    has(fails(command, **{option: there / f"{wrong}.safetensors"}), f"where a {kind}")
    (tmp_path / "run").mkdir()
    line = fails(command, **{option: tmp_path / "run"})
    has(line, f"run/{kind}.safetensors: there is no such file")


def test_checkpoint_not_finite(fails, there, tmp_path):
    from safetensors import safe_open

    path, params = there / "base.safetensors", load_file(there / "base.safetensors")
    with safe_open(path, "numpy") as file:
        header = file.metadata()
    params["params/out/kernel"][..., 0] = np.nan
    save_file(params, tmp_path / "m.safetensors", header)
    has(fails("extract", base=tmp_path / "m.safetensors"), "m.safetensors: parameter out/kernel")


WIDE = Normaliser(np.zeros(6, np.float32), np.ones(6, np.float32))
STRETCHED = Normaliser(np.zeros(4, np.float32), np.full(4, 2.6, np.float32))
UNLIKE = {
    "horizon": (dict(horizon=16), "horizon: 8 and 16"),
    "transition": (dict(normaliser=WIDE), "transition width: 4 and 6"),
    "stride": (dict(stride=2), "stride: 10 and 2"),
    "steps": (dict(steps=20), "diffusion steps: 8 and 20"),
    "schedule": (dict(schedule="linear"), "schedule: cosine and linear"),
    "task": (dict(about={"task": "large", "goal": None}), "task: umaze and large"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_base_and_expert_that_differ(fails, tmp_path, case):
    changes, *parts = UNLIKE[case]
    save_model(tmp_path / "other.safetensors", model(1, **changes))
    has(
        fails("extract", expert=tmp_path / "other.safetensors"),
        "base and expert differ in",
        *parts,
    )


@pytest.mark.parametrize("command", ["steer", "sweep", "report"])
@pytest.mark.parametrize("case", [*UNLIKE, "normaliser"])
def test_a_base_that_the_reward_cannot_steer(fails, tmp_path, command, case):
    changes: Any = UNLIKE[case][0] if case in UNLIKE else dict(normaliser=STRETCHED)
    save_model(tmp_path / "other.safetensors", model(1, **changes))
    line = fails(command, base=tmp_path / "other.safetensors")
    has(line, "base and reward differ in", "train")


def test_normalisers_too_unlike_to_convert(fails, tmp_path):
    n = space().normaliser
    other = Normaliser(n.offset, n.scale * np.array([2, 2, 0.5, 0.5], np.float32))
    save_model(tmp_path / "other.safetensors", model(1, normaliser=other))
    line = fails("extract", expert=tmp_path / "other.safetensors")
    has(line, "by a factor that differs by dimension (up to 2.00 from its mean)", "--init")


def test_a_base_that_is_its_own_expert(there, tmp_path, capsys):
    argv = [
        "extract",
        "--base",
        there / "base.safetensors",
        "--expert",
        there / "base.safetensors",
    ]
    argv += ["--data", there / "data.hdf5", "--matching.x_t", "base", *MATCHING]
    assert run(*argv, "--out", tmp_path / "run") == 2
    has(capsys.readouterr().err, "base and expert have one and the same score", "two different")


@pytest.mark.slow
@pytest.mark.parametrize(
    "x_t, file, factors, said",
    [
        (
            "base",
            "data",
            np.full(4, 2.0),
            "(scales by a factor of up to 2): the expert's score is",
        ),
        (
            "expert",
            "expert_data",
            np.array([1.2, 1.2, 1, 1]),
            "(it is up to 1.1 from its mean); to",
        ),
    ],
)
def test_normalisers_that_differ_are_converted_and_it_is_said(
    there, tmp_path, capsys, x_t, file, factors, said
):
    """With the data of one model alone, which is all that x_t of one asks for."""
    n = space().normaliser
    other = Normaliser(n.offset + np.float32(0.1), n.scale * factors.astype(np.float32))
    save_model(tmp_path / "expert.safetensors", model(1, normaliser=other))
    argv = ["extract", "--base", there / "base.safetensors", f"--{file}", there / "data.hdf5"]
    argv += ["--expert", tmp_path / "expert.safetensors", "--matching.x_t", x_t, *MATCHING]
    assert run(*argv, "--out", tmp_path / "run") == 0
    printed = capsys.readouterr().out
    has(printed, said)
    notes = json.loads((tmp_path / "run" / "diagnostics.json").read_text())["notes"]
    assert all(f"note: {note}\n" in printed for note in notes)
    assert said in notes[0]


def test_a_goal_inside_a_wall(fails):
    has(
        fails("data", goal="0,0"), "goal (0, 0) lies in a wall of the maze 'umaze'", "nearest free"
    )
    has(fails("data", goal="9,0"), "goal (9, 0) lies outside the maze", "nearest free cell")
    has(fails("data", goal="8"), "goal '8': give 0 to 7, or x,y in metres")
    has(fails("data", goal="north"), "goal 'north': give 0 to 7, or x,y in metres")
    for command in ("heatmap", "steer", "sweep"):
        has(fails(command, goal="[0, 0]"), "goal (0, 0) lies in a wall", "nearest free cell")


def test_a_goal_that_is_not_known(fails, tmp_path):
    path = tmp_path / "r.safetensors"
    save_guide(path, reward(about={"task": "umaze", "goal": None}))
    for command in ("heatmap", "steer", "sweep"):
        has(fails(command, reward=path), "had no goal; give one with --goal [x, y]")
    has(fails("report", reward=path), "had no goal")
    save_guide(path, reward(about={"environment": "Ant-v5"}))
    for command in ("heatmap", "steer", "sweep", "report"):
        has(fails(command, reward=path), "came from no task of ours")


def test_unknown_environment(fails):
    has(fails("data", env="umase"), "environment 'umase' is unknown (did you mean 'umaze'?)")
    has(fails("data", env="x"), ": choose from ", "open, umaze, medium, large")
    line = fails("study", mazes="[mediun]")
    has(line, "environment 'mediun' is unknown (did you mean 'medium'?)")


def test_a_loss_that_diverges(there, tmp_path, capsys):
    """The step is named, the last good checkpoint kept, no model written."""
    argv = ["train", "--data", there / "data.hdf5", *SMALL, "--training.steps_per_call", 1]
    argv += ["--save_every", 1, "--training.learning_rate", 1e30, "--out", tmp_path / "run"]
    assert run(*argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    has(printed.err, "is not finite at step 2; the checkpoint of step 1 is kept", "learning rate")
    folder = tmp_path / "run"
    assert [p.name for p in (folder / "checkpoints").glob("[0-9]*")] == ["1"]
    assert not (folder / "denoiser.safetensors").exists()
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1]

    argv = ["extract", "--base", there / "base.safetensors", "--data", there / "data.hdf5"]
    argv += ["--expert", there / "expert.safetensors", "--matching.x_t", "base", *MATCHING]
    argv += ["--matching.learning_rate", 1e38, "--out", tmp_path / "reward"]
    assert run(*argv) == 2
    has(capsys.readouterr().err, "not finite", "step ", "lower the learning rate")
    assert not (tmp_path / "reward" / "reward.safetensors").exists()


SETTINGS = {
    ("data", "episodes", 0): "episodes must be 1 or more, not 0",
    ("data", "horizon", 0): "horizon must be 1 or more, not 0",
    ("data", "stride", -1): "stride must be 1 or more, not -1",
    ("data", "seed", -1): "seed must be 0 to 4294967295, not -1",
    ("data", "out", "no/such/folder/x.hdf5"): "does not exist; make it first",
    ("data", "out", "x.csv"): "x.csv: output comes as .hdf5, .h5, not '.csv'",
    ("train", "training.steps", 0): "training.steps must be 1 or more, not 0",
    ("train", "training.batch_size", 0): "training.batch_size must be 1 or more",
    ("train", "training.learning_rate", 0): "training.learning_rate must be above 0",
    ("train", "training.clip", -1): "training.clip must be 0 or more, not -1",
    ("train", "training.ema.decay", 1): "training.ema.decay must be 0 or more and below 1",
    ("train", "training.prediction", "x1"): "--training.prediction",
    ("train", "horizon", 0): "horizon must be 1 or more, not 0",
    ("train", "diffusion_steps", 0): "diffusion_steps must be 1 or more, not 0",
    ("train", "schedule", "cosin"): "--schedule",
    ("train", "clip_x0", -1): "clip_x0 must be 0 or more, not -1",
    ("train", "network.dim", 12): "network.dim must be a multiple of 8, not 12",
    ("train", "network.multipliers", "[]"): "network.multipliers must be",
    ("train", "network.multipliers", "[1, 1, 1, 1, 1]"): "horizon must be a multiple of 16 for",
    ("train", "seed", 2**32): "seed must be 0 to 4294967295, not 4294967296",
    ("extract", "seed", 2**64): "seed must be 0 to 4294967295, not 18446744073709551616",
    ("heatmap", "seed", -1): "seed must be 0 to 4294967295, not -1",
    ("train", "save_every", 0): "save_every must be 1 or more, not 0",
    ("train", "mesh.data", 64): "wants 64 devices",
    ("extract", "matching.steps", 0): "matching.steps must be 1 or more, not 0",
    ("extract", "matching.draws", -1): "matching.draws must be 0 or more, not -1",
    ("extract", "matching.seeds", 0): "matching.seeds must be 1 or more, not 0",
    ("extract", "matching.learning_rate", -1): "matching.learning_rate must be above 0",
    ("extract", "matching.target", "mean"): "--matching.target",
    ("extract", "data", None): "matching.x_t mixed needs data; give it, or x_t expert",
    ("extract", "expert_data", None): "matching.x_t mixed needs expert_data; give it, or x_t base",
    ("extract", "matching.x_t", "base"): "expert_data is not read with matching.x_t base: leave",
    ("extract", "matching.x_t", "expert"): "data is not read with matching.x_t expert: leave it",
    ("extract", "reward.window", 3): "reward.window 3 does not divide the horizon 8",
    ("extract", "reward.widths", "[0]"): "reward.widths must be 1 or more, not 0",
    ("heatmap", "windows", 0): "windows must be 1 or more, not 0",
    ("heatmap", "t", 8): "t is 8: give 0 to 7",
    ("heatmap", "mesh.data", 64): "wants 64 devices",
    ("steer", "plans", 0): "plans must be 1 or more, not 0",
    ("steer", "guidance.n_guide_steps", 0): "guidance.n_guide_steps must be 1 or more, not 0",
    ("steer", "seed", -1): "seed must be 0 to 4294967295, not -1",
    ("steer", "guidance.step", "leap"): "--guidance.step",
    ("steer", "guidance.temperature", -0.1): "guidance.temperature must be 0 or more, not -0.1",
    ("steer", "mesh.data", 64): "wants 64 devices",
    ("sweep", "guidance.temperature", -0.1): "guidance.temperature must be 0 or more, not -0.1",
    ("sweep", "mesh.fsdp", 64): "wants 64 devices",
    ("sweep", "guidance.scale", 2): "guidance.scale is swept: give scales, and leave it out",
    ("steer", "guidance.sampler", "euler"): "--guidance.sampler",
    ("steer", "guidance.sampling_steps", 5): "leave the sampling steps out, or choose ddim",
    ("sweep", "scales", "[]"): "scales and t_stopgrads need a number each",
    ("report", "bins", 0): "bins must be 1 or more, not 0",
    ("report", "seed", -1): "seed must be 0 to 4294967295, not -1",
}


@pytest.mark.parametrize("case", SETTINGS, ids=lambda case: " ".join(map(str, case)))
def test_settings(fails, case):
    command, name, value = case
    if value is None or name in ("out", "episodes"):
        has(fails(command, **{name: value}), SETTINGS[case])
    else:
        has(fails(command, f"--{name}", value), SETTINGS[case])


def test_a_half_unet_that_cannot_be(fails):
    line = fails("extract", "--reward.kind=half_unet", "--reward.multipliers=[2, 4]")
    has(line, "multiples of 8, the last of 32; not [8, 16]")


def test_a_prediction_other_than_the_init(fails, there):
    line = fails("train", "--training.prediction=x0", init=there / "base.safetensors")
    has(line, "training.prediction is x0", "predicts v: give that")


TAKEN_OVER = {
    ("horizon", 16): "horizon is 16, but the denoiser to begin with (init) has 8",
    ("stride", 2): "stride is 2, but the denoiser to begin with (init) has 10",
    ("actions", "true"): "actions is True, but the denoiser to begin with (init) has False",
    (
        "normaliser",
        "gaussian",
    ): "normaliser is gaussian, but the denoiser to begin with (init) has",
    ("schedule", "linear"): "schedule is linear, but the denoiser to begin with (init) has cosine",
    ("diffusion_steps", 20): "diffusion_steps is 20, but the denoiser to begin with (init) has 8",
    ("clip_x0", 0): "clip_x0 is 0.0, but the denoiser to begin with (init) has 1.2",
    ("network.dim", 24): "network.dim is 24, but the denoiser to begin with (init) has 8",
    ("network.multipliers", "[1, 1]"): "network.multipliers is (1, 1), but",
    ("network.attention", "true"): "network.attention is True, but",
}


@pytest.mark.parametrize("case", TAKEN_OVER, ids=lambda case: case[0])
def test_a_setting_that_init_would_overrule(fails, there, case):
    """Neither the default nor the base's own."""
    name, value = case
    line = fails("train", f"--{name}", value, init=there / "base.safetensors")
    has(line, TAKEN_OVER[case], "which is taken over: leave it out, or give that")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"explained": [0.5', "is damaged or cut short"),
        ('{"explained": [0.5]}', "is damaged, it has no antisymmetric"),
        ('{"explained": 0.5, "antisymmetric": []}', "is damaged, it has no list explained"),
    ],
)
def test_damaged_diagnostics(fails, there, tmp_path, text, said):
    (tmp_path / "run").mkdir()
    shutil.copy(there / "reward.safetensors", tmp_path / "run")
    (tmp_path / "run" / "diagnostics.json").write_text(text)
    line = fails("report", reward=tmp_path / "run")
    has(line, f"diagnostics.json: {said}; delete it, and it is made again by `reward-jax extract")


def test_damaged_metrics(fails, there, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(there / "reward.safetensors", tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"loss"\n')
    has(fails("report", reward=tmp_path / "run"), "metrics.jsonl:2: not a line of metrics; remove")


@pytest.mark.parametrize("command", ["train", "extract", "heatmap", "steer", "report"])
def test_output_where_a_file_is(fails, tmp_path, command):
    (tmp_path / "file").write_text("")
    has(fails(command, out=tmp_path / "file"), tmp_path / "file", "name a")


@pytest.mark.parametrize("command", ["train", "extract"])
def test_a_run_is_never_overwritten(fails, tmp_path, command):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    has(fails(command), "is not empty and holds no run; name a new directory")
    (folder / "config.yaml").write_text("seed: 0\n")
    has(fails(command), "holds a run already; go on with it by --resume, or name a new")


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--training.learning_rate", 0.5, "training.learning_rate 0.001, not 0.5"),
        ("--training.steps", 30, "training.steps 20, not 30"),
        ("--seed", 4, "seed 0, not 4"),
        ("--data", None, "data "),
    ],
)
def test_resume_with_other_settings(fails, there, tmp_path, flag, value, said):
    """The settings that are there are untouched, since the refused start wrote nothing."""
    out = tmp_path / "out"
    config = SETTINGS_OF_A_RUN | {"data": str(there / "data.hdf5"), "out": str(out)}
    out.mkdir()
    text = json.dumps(config)
    (out / "config.yaml").write_text("seed: 0\n")
    (out / "settings.json").write_text(text)
    copy = tmp_path / "copy.hdf5"
    copy.write_bytes((there / "data.hdf5").read_bytes())
    line = fails("train", "--resume", flag, copy if value is None else value)
    has(
        line, f"{out}: the run there has {said}", "give the same settings, or name a new directory"
    )
    assert (out / "settings.json").read_text() == text
    assert (out / "config.yaml").read_text() == "seed: 0\n"
    for damaged in ("{", "", text[:-9], "[]"):
        (out / "settings.json").write_text(damaged)
        line = fails("train", "--resume")
        has(line, "settings.json: cannot be read, or is damaged; put the run's settings back")


SETTINGS_OF_A_RUN = {
    "cut": {"ends": "auto", "padding": "none"},
    "init": None,
    "horizon": 8,
    "stride": 10,
    "actions": False,
    "normaliser": "limits",
    "schedule": "cosine",
    "diffusion_steps": 8,
    "clip_x0": 1.2,
    "network": {"dim": 8, "multipliers": [1], "attention": False},
    "training": {
        **{"steps": 20, "batch_size": 8, "learning_rate": 1e-3, "decay": True, "clip": 1.0},
        **{"prediction": "v", "action_weight": 1.0, "steps_per_call": 10},
        "ema": {"decay": 0.995, "every": 10, "begin": 500},
    },
    "seed": 0,
}


CONFIGS = {
    "unknown key": ("horizn: 8\n", "c.yaml: unknown key 'horizn'; did you mean horizon?"),
    "nested": ("training:\n  stps: 8\n", "'training.stps'; did you mean training.steps?"),
    "not YAML": ("data: [x\n", "c.yaml: not YAML"),
    "value": ("horizon: long\n", "horizon"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(fails, tmp_path, case):
    text, part = CONFIGS[case]
    (tmp_path / "c.yaml").write_text(text)
    has(fails("train", "--config", tmp_path / "c.yaml", "--stride", 10), part)


def test_options(fails):
    has(fails("train", "--horizn", 8), "unknown option --horizn; did you mean --horizon?")
    has(fails("extract", base=None, out=None), "missing --", "--base", "--out")
