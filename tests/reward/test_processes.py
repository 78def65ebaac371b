"""Training, extraction and guided sampling over two processes give what one process gives."""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from reward_jax.data.checkpoint import load_guide, load_model
from reward_jax.data.trajectory.space import TrajectorySpace
from tests.processes import together
from tests.reward.cli_runs import MATCHING, SMALL, run, save_all

STEPS = ["--training.steps", 50, "--save_every", 20]
MATCHED = ["--matching.steps", 50, "--save_every", 20]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("made"))


def both(folder: pathlib.Path, command: str, *argv: object) -> list[pathlib.Path]:
    """The command in this process, and in two; the folders of their results."""
    assert run(command, *argv, "--out", folder / "one") == 0
    together("reward_jax.cli", [command, *argv, "--out", folder / "two"])
    names = [{p.name for p in (folder / n).iterdir()} - {"tensorboard"} for n in ("one", "two")]
    assert names[0] - {"tensorboard"} == names[1]
    return [folder / "one", folder / "two"]


def weights(path: pathlib.Path) -> dict:
    """Without biases in front of a norm, which takes them away: Adam makes steps of rounding."""
    params: Any = flatten_dict(load_model(path, TrajectorySpace).denoiser.params, sep="/")
    return {name: x for name, x in params.items() if not name.endswith("conv/bias")}


def close(one: object, two: object) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), two, one)


def test_train_extract_and_resume_on_more_and_on_fewer_processes(made, tmp_path):
    """In one start: both commands, and what one process began of each."""
    data = made / "data.hdf5"
    models = ["--base", made / "base.safetensors", "--expert", made / "expert.safetensors"]
    argvs = {
        "train": ["--data", data, *SMALL, *STEPS],
        "extract": [*models, "--data", data, "--expert_data", data, *MATCHING, *MATCHED],
    }
    runs = []
    for name, argv in argvs.items():
        assert run(name, *argv, "--out", tmp_path / f"one {name}") == 0
        shutil.copytree(tmp_path / f"one {name}", tmp_path / f"begun {name}")
        cut_back(tmp_path / f"begun {name}")
        runs.append([name, *argv, "--out", tmp_path / f"two {name}"])
        runs.append([name, *argv, "--out", tmp_path / f"begun {name}", "--resume"])
    (tmp_path / "runs.json").write_text(json.dumps(runs, default=str))
    together("tests.several", ["reward-jax", tmp_path / "runs.json"])
    for name, argv in argvs.items():
        folders = [tmp_path / f"{how} {name}" for how in ("one", "two", "begun")]
        found = [{p.name for p in folder.iterdir()} for folder in folders]
        assert found[0] == found[1] == found[2]
        read = weights if name == "train" else learned
        one, two, begun = map(read, folders)
        close(one, two)
        close(one, begun)
        cut_back(folders[1])
        assert run(name, *argv, "--out", folders[1], "--resume") == 0
        close(one, read(folders[1]))
        for folder in folders:
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == [10, 20, 30, 40, 50]


def cut_back(run: pathlib.Path) -> None:
    """To what a run has that is killed between step 40 and the end."""
    shutil.rmtree(run / "checkpoints" / "50")
    for path in run.glob("*.safetensors"):
        path.unlink()


def learned(path: pathlib.Path) -> Any:
    return load_guide(path, TrajectorySpace).guide.params  # pyright: ignore[reportAttributeAccessIssue]


STUDY = """
robots:
  hopper:
    horizon: 4
    diffusion_steps: 6
    network: {kind: mlp, width: 16, blocks: 1}
    base_training: {steps: 20, batch_size: 8, prediction: x0, ema: {begin: 0, every: 1}}
    expert_training: {steps: 20, batch_size: 8, prediction: x0, ema: {begin: 0, every: 1}}
    reward: {widths: [8]}
    matching: {steps: 10, batch_size: 8, draws: 64, path_draws: 48, seeds: 2}
unseen_data: null
base_episodes: 8
expert_episodes: 8
environments: 4
validation: 2
scales: [0.5]
temperatures: []
rollout: {steps: 6}
"""


def test_a_study(made, tmp_path):
    """Models are trained, and plans made, over both; what each acts out is what one does."""
    (tmp_path / "study.yaml").write_text(STUDY)
    found = both(tmp_path, "study", "locomotion", "--config", tmp_path / "study.yaml")
    one, two = (json.loads((path / "results.json").read_text()) for path in found)
    for arm, result in one["environments"]["Hopper-v5"].items():
        other = two["environments"]["Hopper-v5"][arm]
        np.testing.assert_allclose(other["returns"], result["returns"], atol=2e-3)
    pages = [(path / "report" / "report.md").read_text() for path in found]
    assert all("| Hopper-v5 | reward | " in page for page in pages)


def test_steer_sweep_and_heatmap(made, tmp_path):
    """In one start."""
    guide = ["--reward", made / "reward.safetensors"]
    steered = ["--base", made / "base.safetensors", *guide, "--plans", 4]
    windows = ["--data", made / "data.hdf5", "--windows", 64, "--bins", 2]
    commands = {
        "steer": steered,
        "sweep": [*steered, "--scales", "[0,2]", "--t_stopgrads", "[0,4]"],
        "heatmap": [*guide, *windows],
    }
    runs = {
        n: [[*map(str, [c, *argv, "--out", tmp_path / n / c])] for c, argv in commands.items()]
        for n in ("one", "two")
    }
    assert [run(*argv) for argv in runs["one"]] == [0, 0, 0]
    (tmp_path / "runs.json").write_text(json.dumps(runs["two"]))
    found = together("tests.several", ["reward-jax", tmp_path / "runs.json"])
    assert "heat map: " in found[0].out and not found[1].out
    folders = [tmp_path / n for n in ("one", "two")]
    names = [{str(p.relative_to(folder)) for p in folder.rglob("*")} for folder in folders]
    assert names[0] == names[1]
    for file in ("steer/plans.npz", "heatmap/heatmap.npz"):
        close(*[dict(np.load(folder / file)) for folder in folders])
    for file in ("sweep/sweep.json", "heatmap/heatmap.json"):
        close(*[json.loads((folder / file).read_text()) for folder in folders])
