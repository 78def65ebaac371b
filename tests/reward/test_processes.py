"""Training, extraction, studies and guided sampling over two and over four processes.

They give what one process gives. All of a group run one after another in one start of its
processes; what one process makes of the same commands is made once, for both groups.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax.traverse_util import flatten_dict, unflatten_dict

from reward_jax.data.checkpoint import load_guide, load_model
from reward_jax.data.images.pixels import ImageSpace
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.diffusion.denoiser import Denoiser
from reward_jax.reward.relative import RelativeReward
from tests.processes import Group, in_one_start
from tests.reward.cli_runs import MATCHING, SMALL, run, save_all
from tests.reward.studies.images.sets import smallest, write_quarters

MESHES: dict[int, list[Any]] = {1: [], 2: [], 4: ["--mesh.data", 2, "--mesh.fsdp", 2]}
STEERING = MESHES | {4: ["--mesh.fsdp", 2, "--mesh.tensor", 2]}
IMAGES = MESHES | {2: ["--mesh.fsdp", 2]}
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


def commands(made: pathlib.Path, out: pathlib.Path, count: int) -> dict[str, list[Any]]:
    """Each by the name of the folder in `out` that it writes."""
    data, base = made / "data.hdf5", ["--base", made / "base.safetensors"]
    training = ["--data", data, *SMALL, "--training.steps", 50, "--save_every", 20]
    models = [*base, "--expert", made / "expert.safetensors"]
    matching = [*models, "--data", data, "--expert_data", data, *MATCHING]
    matching += ["--matching.steps", 50, "--save_every", 20]
    guide = ["--reward", made / "reward.safetensors"]
    steered = [*base, *guide, "--plans", 4]
    windows = ["--data", data, "--windows", 64, "--bins", 2]
    given = {
        "train": ["train", *training],
        "extract": ["extract", *matching],
        "steer": ["steer", *steered],
        "sweep": ["sweep", *steered, "--scales", "[0,2]", "--t_stopgrads", "[0,4]"],
        "heatmap": ["heatmap", *guide, *windows],
    }
    if count < 4:  # the dearest; over four there are the studies of tests/tuco
        given["study"] = ["study", "locomotion", "--config", made / "study.yaml"]
        given["images"] = ["study", "images", "--config", made / "images.yaml"]
    own = {"steer": STEERING[count], "images": IMAGES[count]}
    return {n: [*line, *own.get(n, MESHES[count]), "--out", out / n] for n, line in given.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = save_all(tmp_path_factory.mktemp("made"))
    (folder / "study.yaml").write_text(STUDY)
    config = dataclasses.replace(
        smallest(folder / "out", write_quarters(folder / "data")),
        choices={"left": ("nw", "sw")},
        variants=(),
        paths=None,
    )
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    (folder / "images.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    """What one process makes."""
    out = tmp_path_factory.mktemp("alone")
    assert [run(*line) for line in commands(made, out, 1).values()] == [0] * 7
    return out


@pytest.fixture(scope="module", params=[2, 4])
def group(request, made, alone, tmp_path_factory):
    """Over several processes, with a training and an extraction that one process has begun."""
    out = tmp_path_factory.mktemp(f"of {request.param}")
    given = commands(made, out, request.param)
    runs = [*given.values()]
    for name in ("train", "extract"):
        begun = out / f"begun {name}"
        shutil.copytree(alone / name, begun)
        cut_back(begun)
        runs.append([*given[name][:-1], begun, "--resume"])
    if request.param < 4:
        runs += [[f"tests.reward.member:{name}", out] for name in ("old_news", "one_world")]
    ended = in_one_start("reward-jax", runs, out, request.param)
    return Group(request.param, ended, out, alone)


def cut_back(run: pathlib.Path) -> None:
    """To what a run has that is killed between step 40 and the end."""
    shutil.rmtree(run / "checkpoints" / "50")
    for path in run.glob("*.safetensors"):
        path.unlink()


def close(one: object, two: object) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), two, one)


@pytest.mark.parametrize("name", ["train", "extract"])
def test_train_and_extract(group, made, name):
    """50 steps; what one process began several go on with, and the other way round."""
    check = check_denoiser if name == "train" else check_reward
    folders = [group.alone / name, group.out / name, group.out / f"begun {name}"]
    found = [{p.name for p in folder.iterdir()} for folder in folders]
    assert found[0] == found[1] == found[2]
    for folder in folders[1:]:
        check(folder, folders[0])
    cut_back(folders[1])
    assert run(*commands(made, group.out, 1)[name], "--resume") == 0
    check(folders[1], folders[0])
    rows = [[json.loads(x) for x in (f / "metrics.jsonl").open()] for f in folders]
    for metrics in rows:
        assert [row["step"] for row in metrics] == [10, 20, 30, 40, 50]
        close([row["loss"] for row in rows[0]], [row["loss"] for row in metrics])


def check_denoiser(path: pathlib.Path, other: pathlib.Path) -> None:
    """What it makes of noise, and parameters, but for what takes no part.

    At 8 channels each is a group of its own, and the norm takes away what the convolution in front
    of it adds: such biases have gradients of rounding noise alone, of which Adam, for which every
    gradient is as large as it has been, makes steps of full size. Nothing depends on them.
    """
    found, wanted = (load_model(p, TrajectorySpace).denoiser for p in (path, other))
    x = jax.random.normal(jax.random.key(0), (64, 8, 4))
    t = jnp.arange(64) % 8
    close(wanted.x0(x, t), found.x0(x, t))
    idle = {n for n in flat(found.params) if n.endswith(("first/conv/bias", "second/conv/bias"))}
    idle |= {"final/conv/bias"}
    assert len(idle) == 9
    close(without(idle, wanted).x0(x, t), found.x0(x, t))
    close(*[flat(without(idle, one).params) for one in (wanted, found)])


def flat(params: Any) -> dict[str, Any]:
    return flatten_dict(params, sep="/")


def without(names: set[str], one: Denoiser) -> Denoiser:
    """A model with these parameters at zero."""
    params = {n: 0 * x if n in names else x for n, x in flat(one.params).items()}
    return dataclasses.replace(one, params=unflatten_dict(params, sep="/"))


def check_reward(path: pathlib.Path, other: pathlib.Path) -> None:
    """Parameters, rewards and their gradients."""
    found, wanted = (load_guide(p, TrajectorySpace).guide for p in (path, other))
    assert isinstance(found, RelativeReward) and isinstance(wanted, RelativeReward)
    close(wanted.params, found.params)
    x = jax.random.normal(jax.random.key(0), (64, 8, 4))
    t = jnp.arange(64) % 8
    close(wanted.learned(x, t), found.learned(x, t))
    close(wanted.learned_gradient(x, t), found.learned_gradient(x, t))


@pytest.mark.parametrize("group", [2], indirect=True)
def test_a_disk_that_some_see_late(group):
    """Which `tests.reward.member:old_news` has seen in every process."""
    for one in group.ended:
        assert "several: tests.reward.member:old_news" in one.err


@pytest.mark.parametrize("group", [2], indirect=True)
def test_hosts_whose_physics_round_otherwise(group):
    """Which `tests.reward.member:one_world` has seen in every process."""
    for one in group.ended:
        assert "several: tests.reward.member:one_world" in one.err


@pytest.mark.parametrize("group", [2], indirect=True)
def test_a_study(group):
    """Models are trained, and plans made, over all; what each acts out is what one does."""
    folders = group.alone / "study", group.out / "study"
    assert names(folders[0]) == names(folders[1])
    one, two = (json.loads((path / "results.json").read_text()) for path in folders)
    for arm, result in one["environments"]["Hopper-v5"].items():
        other = two["environments"]["Hopper-v5"][arm]
        np.testing.assert_allclose(other["returns"], result["returns"], rtol=0, atol=1e-5)
    pages = [(path / "report" / "report.md").read_text() for path in folders]
    assert all("| Hopper-v5 | reward | " in page for page in pages)


@pytest.mark.parametrize("group", [2], indirect=True)
def test_a_study_of_images(group):
    """Networks lie in parts over all, which train them and draw; each process judges all."""
    folders = group.alone / "images", group.out / "images"
    assert names(folders[0]) == names(folders[1])
    x = jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
    t = jnp.arange(64) % 6
    for part in ("base/begun", "base/base", "null/expert", "choices/left/expert"):
        files = [folder / f"{part}.safetensors" for folder in folders]
        close(*[load_model(file, ImageSpace).denoiser.x0(x, t) for file in files])
    for part in ("null/reward", "choices/left/reward"):
        guides = [load_guide(f / f"{part}.safetensors", ImageSpace).guide for f in folders]
        close(*[g.learned(x, t) for g in guides if isinstance(g, RelativeReward)])
    drawn = [dict(np.load(folder / "base" / "unsteered_test.npz")) for folder in folders]
    for name in ("x", "features", "labels"):
        close(*[one[name] for one in drawn])
    one, two = (json.loads((f / "results.json").read_text())["choices"]["left"] for f in folders)
    for name in ("auc", "harmful_share"):
        close(one[name], two[name])


def names(folder: pathlib.Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {"tensorboard"}


def test_steer_sweep_and_heatmap(group):
    assert "heat map: " in group.ended[0].out and not any(one.out for one in group.ended[1:])
    for name in ("steer", "sweep", "heatmap"):
        assert names(group.alone / name) == names(group.out / name)
    for file in ("steer/plans.npz", "heatmap/heatmap.npz"):
        close(*[dict(np.load(folder / file)) for folder in (group.alone, group.out)])
    for file in ("sweep/sweep.json", "heatmap/heatmap.json"):
        texts = [(folder / file).read_text() for folder in (group.alone, group.out)]
        close(*map(json.loads, texts))
