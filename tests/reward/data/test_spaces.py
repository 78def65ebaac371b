"""A space of another world, and its network, are stored, trained and matched: a line each."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from common_jax.errors import InputError
from reward_jax.data import spaces
from reward_jax.data.checkpoint import load_guide, load_model, save_guide, save_model
from reward_jax.data.model import SpaceGuide, SpaceModel
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.diffusion.denoiser import ClassifierFree, score_from
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.sources import Rows
from reward_jax.models import catalog
from reward_jax.planning.extract import Matching, diagnose, fit_reward
from reward_jax.planning.fit import Training, Untrained, fit
from reward_jax.reward.relative import RelativeReward
from tests.reward.cli_runs import model as trajectory_model

SCHEDULE = cosine_schedule(6)


@dataclasses.dataclass(frozen=True)
class Images:
    """Images [H, W, C] with values in a range, as a task of images would have them."""

    shape: tuple[int, int, int]
    values: tuple[float, float]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    pin = None  # nothing of an image is given

    def describe(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def make(cls, described):
        shape, (low, high) = tuple(described["shape"]), described["values"]
        if len(shape) != 3 or min(shape) < 1 or not low < high:
            raise ValueError(f"images of shape {shape} and values {low} to {high}")
        return cls(shape, (low, high), described["about"])


class Convolutions(nn.Module):
    """A denoiser [B, H, W, C] of them; `scalar`: their mean, a reward [B]."""

    width: int = 4
    scalar: bool = False

    @nn.compact
    def __call__(self, x, t, cond=None):
        level = (t / 6).reshape(-1, 1, 1, 1).astype(x.dtype)
        if cond is not None:
            level = level + cond.reshape(-1, 1, 1, 1)
        hidden = nn.gelu(nn.Conv(self.width, (3, 3))(x) + nn.Dense(self.width)(level))
        out = nn.Conv(x.shape[-1], (3, 3))(hidden)
        return out.mean((1, 2, 3)) if self.scalar else out


@dataclasses.dataclass(frozen=True)
class ConvolutionOptions:
    width: int = 4
    scalar: bool = False

    def make(self, space: Images) -> Convolutions:
        return Convolutions(self.width, self.scalar)


SPACE = Images((5, 4, 3), (-1.0, 1.0), {"task": "faces", "goal": "smiles"})
X = jax.random.uniform(jax.random.key(1), (3, *SPACE.shape), minval=-1)
T = jnp.array([0, 2, 5])


@pytest.fixture(autouse=True)
def catalogues(monkeypatch):
    """What an image task adds to both, and nothing else."""
    monkeypatch.setattr(spaces, "SPACES", {**spaces.SPACES, "images": Images})
    networks = {**catalog.CATALOG, "convolutions": catalog.Entry(Convolutions)}
    monkeypatch.setattr(catalog, "CATALOG", networks)


def params_of(network: Convolutions, *cond: Any) -> Any:
    return jax.jit(network.init)(jax.random.key(3), X, T, *cond)["params"]


def test_a_denoiser_of_images_comes_back(tmp_path):
    """With the condition that stands for none: guided as before."""
    network, cond, null = Convolutions(), jnp.arange(3.0), jnp.asarray(-1.0)
    score = score_from(network, params_of(network, cond), "v", SCHEDULE, clip=1.0)
    save_model(tmp_path / "m.safetensors", SpaceModel(score, SPACE, null))
    found = load_model(tmp_path / "m.safetensors", Images)
    assert found.space == SPACE and isinstance(found.space.shape, tuple)
    assert found.denoiser.model == network
    scores = [ClassifierFree(d, n, 2.0) for d, n in ((score, null), (found.denoiser, found.null))]
    np.testing.assert_array_equal(*jax.jit(lambda s: [each(X, T, cond) for each in s])(scores))


def test_a_reward_of_images_comes_back(tmp_path):
    network = Convolutions(scalar=True)
    reward = RelativeReward(params_of(network), SCHEDULE, network, "epsilon")
    save_guide(tmp_path / "r.safetensors", SpaceGuide(reward, SPACE, SCHEDULE))
    found = load_guide(tmp_path / "r.safetensors", Images)
    assert found.space == SPACE
    np.testing.assert_array_equal(*jax.jit(lambda *g: [x(X, T) for x in g])(found.guide, reward))


def test_a_model_of_another_space_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(path, trajectory_model())
    with pytest.raises(InputError, match="is a model of trajectories, where one of images is wan"):
        load_model(path, Images)
    score = score_from(Convolutions(), {"w": jnp.ones(2)}, "v", SCHEDULE)
    save_model(path, SpaceModel(score, SPACE))
    with pytest.raises(InputError, match="is a model of images, where one of trajectories is wan"):
        load_model(path, TrajectorySpace)


def test_a_space_that_is_not_in_the_catalogue(tmp_path):
    class Sounds(Images):
        """May be anything."""

    score = score_from(Convolutions(), {"w": jnp.ones(2)}, "v", SCHEDULE)
    with pytest.raises(InputError, match="a model of Sounds cannot be written to a file, or read"):
        save_model(tmp_path / "m.safetensors", SpaceModel(score, Sounds((1, 1, 1), (0, 1))))
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        InputError, match="latents: add a line for it to reward_jax/data/spaces.py"
    ):
        spaces.make({"kind": "sounds"}, Sounds, "f")


def test_images_are_fitted_and_matched_by_the_functions_of_trajectories():
    """`fit` and `fit_reward` take a source of any space, and the options of its networks."""
    rows = Rows(jax.random.uniform(jax.random.key(5), (32, *SPACE.shape), minval=-1))
    training = Training(steps=4, batch_size=4, steps_per_call=2)
    options: Any = ConvolutionOptions()
    base = fit(rows, SPACE, Untrained(SCHEDULE, options), training, seed=0)
    expert = fit(Rows(rows.rows * 0.5), SPACE, base, training, seed=1)
    matching = Matching(steps=4, batch_size=4, steps_per_call=2, draws=0, seeds=2)
    found = fit_reward(
        base, expert.denoiser, rows, SPACE, ConvolutionOptions(scalar=True), matching, seed=2
    )
    assert found.space == SPACE and found.guide(X, T).shape == (3,)
    measured = diagnose(found, base.denoiser, expert.denoiser, X, matching=matching)
    assert all(np.isfinite(v).all() and len(v) == 6 for v in measured.values())
