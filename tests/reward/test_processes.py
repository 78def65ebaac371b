"""Training, extraction and guided sampling over several processes give what one process gives."""

import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from reward_jax.data.checkpoint import load_guide, load_model
from reward_jax.data.trajectory.space import TrajectorySpace
from tests.processes import Ended, in_groups
from tests.reward.cli_runs import MATCHING, SMALL, run, save_all

COUNTS = (2, 4)
LEARNED = ("train", "extract")
OF_FOUR = ("train", "extract", "study", "steer")  # more processes compile more
STUDY = """
robots:
  hopper:
    horizon: 4
    diffusion_steps: 6
    network: {kind: mlp, width: 16, blocks: 1}
    base_training: {steps: 20, batch_size: 8, prediction: x0, ema: {begin: 0, every: 1}}
    expert_training: {steps: 20, batch_size: 8, prediction: x0, ema: {begin: 0, every: 1}}
    reward: {widths: [8]}
    matching: {steps: 10, batch_size: 8, draws: 64, path_draws: 48, seeds: 1}
unseen_data: null
base_episodes: 8
expert_episodes: 8
environments: 4
validation: 4
scales: [0.5]
temperatures: []
rollout: {steps: 6}
"""
several = pytest.mark.parametrize("count", COUNTS)


class Done(NamedTuple):
    """A folder of results for each count of processes, "1", "2" and "4"; what members left."""

    folder: pathlib.Path
    argvs: dict[str, list[str]]
    members: dict[int, list[Ended]]

    def both(self, count: int, name: str) -> list[pathlib.Path]:
        """What one command made in as many processes, and in one."""
        return [self.folder / str(n) / name for n in (count, 1)]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Done:
    """Every command by this process, and by groups that start once for all of them."""
    folder = tmp_path_factory.mktemp("done")
    argvs = commands(save_all(folder))
    for name, argv in argvs.items():
        assert run(*argv, "--out", folder / "1" / name) == 0
    runs = {
        count: [
            [*argv, "--out", folder / str(count) / name]
            for name, argv in argvs.items()
            if count == 2 or name in OF_FOUR
        ]
        for count in COUNTS
    }
    for name in LEARNED:  # what one process began
        begun = folder / "2" / f"{name}, begun"
        shutil.copytree(folder / "1" / name, begun)
        cut_back(begun)
        runs[2].append([*argvs[name], "--out", begun, "--resume"])
    members = in_groups("reward-jax", runs, folder)
    for each in members.values():
        assert not any(code for one in each for code in one.codes), each
    return Done(folder, argvs, members)


def commands(made: pathlib.Path) -> dict[str, list[str]]:
    """By name; each is still to be told its --out."""
    data = made / "data.hdf5"
    (made / "study.yaml").write_text(STUDY)
    models = ["--base", made / "base.safetensors", "--expert", made / "expert.safetensors"]
    guide = ["--reward", made / "reward.safetensors"]
    steered = [*models[:2], *guide, "--plans", 4]
    every = {
        "train": ["train", "--data", data, *SMALL, "--training.steps", 50, "--save_every", 20],
        "extract": [
            *("extract", *models, "--data", data, "--expert_data", data, *MATCHING),
            *("--matching.steps", 50, "--save_every", 20),
        ],
        "study": ["study", "locomotion", "--config", made / "study.yaml"],
        "steer": ["steer", *steered],
        "sweep": ["sweep", *steered, "--scales", "[0,2]", "--t_stopgrads", "[0,4]"],
        "heatmap": ["heatmap", *guide, "--data", data, "--windows", 64, "--bins", 2],
    }
    return {name: [str(x) for x in argv] for name, argv in every.items()}


def cut_back(run: pathlib.Path) -> None:
    """To what a run has that is killed between step 40 and the end."""
    shutil.rmtree(run / "checkpoints" / "50")
    for path in run.glob("*.safetensors"):
        path.unlink()


def names(folder: pathlib.Path) -> set[str]:
    """Of all files, but for logs, whose names hold times."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in found if "tensorboard" not in name}


def close(one: object, two: object) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), two, one)


def weights(path: pathlib.Path) -> dict:
    """Without biases in front of a norm, which takes them away: Adam makes steps of rounding."""
    params: Any = flatten_dict(load_model(path, TrajectorySpace).denoiser.params, sep="/")
    return {name: x for name, x in params.items() if not name.endswith("conv/bias")}


def learned(path: pathlib.Path) -> Any:
    return load_guide(path, TrajectorySpace).guide.params  # pyright: ignore[reportAttributeAccessIssue]


READ = {"train": weights, "extract": learned}


@several
def test_process_0_prints(done, count):
    first, *others = done.members[count]
    assert first.out and not any(one.out for one in others)
    assert ("heat map: " in first.out) == (count == 2)


@several
@pytest.mark.parametrize("name", LEARNED)
def test_train_and_extract(done, count, name):
    """50 steps, from the beginning and, over two, from what one process began."""
    found = done.both(count, name)
    if count == 2:
        found.append(done.folder / "2" / f"{name}, begun")
    for folder in found:
        assert {p.name for p in folder.iterdir()} == {p.name for p in found[1].iterdir()}
        close(READ[name](found[1]), READ[name](folder))
        assert steps(folder) == [10, 20, 30, 40, 50]


@pytest.mark.parametrize("name", LEARNED)
def test_one_process_goes_on(done, tmp_path, name):
    """With what two began."""
    two, one = done.both(2, name)
    begun = tmp_path / name
    shutil.copytree(two, begun)
    cut_back(begun)
    assert run(*done.argvs[name], "--out", begun, "--resume") == 0
    close(READ[name](one), READ[name](begun))
    assert steps(begun) == [10, 20, 30, 40, 50]


def steps(folder: pathlib.Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@several
def test_a_study(done, count):
    """Models are trained, and plans made, over all; what each acts out is what one does."""
    found = done.both(count, "study")
    assert {p.name for p in found[0].iterdir()} == {p.name for p in found[1].iterdir()}
    two, one = (json.loads((path / "results.json").read_text()) for path in found)
    for arm, result in one["environments"]["Hopper-v5"].items():
        other = two["environments"]["Hopper-v5"][arm]
        np.testing.assert_allclose(other["returns"], result["returns"], atol=2e-3)
    pages = [(path / "report" / "report.md").read_text() for path in found]
    assert all("| Hopper-v5 | reward | " in page for page in pages)


@pytest.mark.parametrize(
    "count, name, file",
    [
        *((count, "steer", "plans.npz") for count in COUNTS),
        (2, "sweep", "sweep.json"),
        (2, "heatmap", "heatmap.npz"),
        (2, "heatmap", "heatmap.json"),
    ],
)
def test_steer_sweep_and_heatmap(done, count, name, file):
    found = done.both(count, name)
    assert names(found[0]) == names(found[1])
    two, one = (read(path / file) for path in found)
    close(one, two)


def read(path: pathlib.Path) -> Any:
    return dict(np.load(path)) if path.suffix == ".npz" else json.loads(path.read_text())
