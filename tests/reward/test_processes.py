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


def test_train_and_resume_as_one_process(made, tmp_path):
    """And what two processes began one goes on with."""
    argv = ["train", "--data", made / "data.hdf5", *SMALL, *STEPS]
    found = both(tmp_path, *argv)
    one, two = map(weights, found)
    close(one, two)
    newest = max((found[1] / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    assert newest.name == "50"
    shutil.rmtree(newest)
    (found[1] / "denoiser.safetensors").unlink()
    assert run(*argv, "--out", found[1], "--resume") == 0
    close(one, weights(found[1]))
    lines = (found[1] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30, 40, 50]


def test_extract(made, tmp_path):
    models = ["--base", made / "base.safetensors", "--expert", made / "expert.safetensors"]
    data = ["--data", made / "data.hdf5", "--expert_data", made / "data.hdf5"]
    argv = [*models, *data, *MATCHING, "--matching.steps", 50]
    found = both(tmp_path, "extract", *argv)
    close(*[load_guide(path, TrajectorySpace).guide.params for path in found])  # pyright: ignore[reportAttributeAccessIssue]


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


def test_steer(made, tmp_path):
    argv = ["--base", made / "base.safetensors", "--reward", made / "reward.safetensors"]
    found = both(tmp_path, "steer", *argv, "--plans", 4)
    close(*[dict(np.load(path / "plans.npz")) for path in found])
