"""Models of a study go from their files to the devices of its mesh, each its own share."""

import math
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding

from common_jax.mesh import fetch, make_mesh
from reward_jax.data import checkpoint
from reward_jax.data.images.pixels import ImageModel, ImageSpace
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.sources import Rows
from reward_jax.models.unet2d.unet import UNet2D
from reward_jax.planning.extract import Matching, RewardOptions
from reward_jax.planning.maps import each_seed
from reward_jax.planning.plan import score_windows
from reward_jax.reward import measure
from reward_jax.sharding import placement
from reward_jax.studies.workshop import Workshop
from tests.reward.cli_runs import model, parameters, reward

LAYOUT = 2, 2, 2


@pytest.fixture
def asked(monkeypatch):
    """How many numbers each read had, by the parameter's name."""
    found, read = {}, checkpoint._part

    def counted(opened: Any, name: str, cut: bool, place: Any) -> Any:
        part = read(opened, name, cut, place)
        found.setdefault(name.removeprefix("params/"), []).append(part.size)
        return part

    monkeypatch.setattr(checkpoint, "_part", counted)
    return found


def check_shares(params: Any, alone: Any, asked: dict[str, list[int]]) -> None:
    """Each device's share was read once, and lies where training has it."""
    where = placement(make_mesh(*LAYOUT))
    flat, wanted = flatten_dict(params, sep="/"), flatten_dict(alone, sep="/")
    assert flat.keys() == wanted.keys() == asked.keys()
    for name, value in flat.items():
        x: Any = value
        assert x.sharding == where(name, x.shape)
        np.testing.assert_array_equal(x, wanted[name], err_msg=name)
        share = math.prod(x.sharding.shard_shape(x.shape))
        assert asked[name] == [share] * (x.size // share), name
    assert any(len(sizes) > 1 for sizes in asked.values())


def shop(folder: Any, kind: Any) -> Workshop[Any]:
    return Workshop(folder, "part", kind, save_every=5, mesh=make_mesh(*LAYOUT))


def test_denoisers_and_rewards_are_read_to_their_shards(tmp_path, asked):
    made = shop(tmp_path, TrajectorySpace)
    denoiser = made.model("base", 10, lambda _: model(3)).denoiser
    check_shares(denoiser.params, model(3).denoiser.params, asked)
    asked.clear()
    guide = made.guide("reward", 10, lambda _: reward(1, 2))
    check_shares(guide.guide.params, reward(1, 2).guide.params, asked)
    # What studies ask of them.
    rows = np.random.default_rng(0).normal(size=(6, 8, 4)).astype(np.float32)
    one, alone = (each_seed(made)[1].guide for made in (guide, reward(1, 2)))
    found = score_windows(one, rows, mesh=make_mesh(*LAYOUT))
    np.testing.assert_allclose(found, score_windows(alone, rows), rtol=0, atol=1e-5)


def test_a_discriminator_is_read_to_its_shards(tmp_path, asked):
    rows = Rows(jax.random.normal(jax.random.key(0), (16, 8, 4)))
    how = Matching(steps=2, batch_size=8, steps_per_call=2)
    options = RewardOptions(widths=(8,))
    made = shop(tmp_path, TrajectorySpace)
    given = reward(), (rows, rows), options, how
    guide: Any = made.discriminator("judge", *given, seed=0).guide
    alone = checkpoint.load_guide(tmp_path / "part" / "judge.safetensors", TrajectorySpace)
    asked_on_a_mesh = {name: sizes[:-1] for name, sizes in asked.items()}  # the last is `alone`'s
    check_shares(guide.params, alone.guide.params, asked_on_a_mesh)


def test_images_are_judged_by_models_on_a_mesh(tmp_path):
    """What comes of them is what one device gives, and can be brought to every process."""
    schedule, network = cosine_schedule(5), UNet2D(1, 8, (1, 1), groups=4)
    params = parameters(network, (8, 8, 1), 0)
    alone = score_from(network, params, "v", schedule, clip=1.0)
    own = ImageSpace(8, 8, 1, {})
    found = shop(tmp_path, ImageSpace).model("base", 1, lambda _: ImageModel(alone, own)).denoiser
    x_0 = np.random.default_rng(1).normal(size=(3, 8, 8, 1)).astype(np.float32)
    looks = measure.Looks(schedule, np.array([1, 4]), jax.random.key(2))
    both = [measure.estimates(one, x_0, looks) for one in (found, alone)]
    np.testing.assert_allclose(*both, rtol=0, atol=1e-5)
    estimate = measure._estimate(found, schedule, x_0, looks.t, looks.key)
    assert isinstance(estimate.sharding, NamedSharding)
    assert fetch(estimate).shape == (2, 3, 8, 8, 1)
