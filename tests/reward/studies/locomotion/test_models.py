"""The models of a robot and of its ablations: what is shared, what is noised, what is kept."""

import types
from typing import Any

import numpy as np
import pytest

from common_jax.errors import InputError
from common_jax.io.files import write_arrays
from reward_jax.data.trajectory.normalisers import Normaliser
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.studies.locomotion.models import Models
from reward_jax.studies.locomotion.settings import Ablation, Config
from tests.reward.studies.locomotion.small import OWN


def of_hopper(tmp_path, **ablations):
    return Models(Config(out=tmp_path, robots={"hopper": OWN}, ablations=ablations), "hopper")


EVERY = {"base", "expert", "reward", "judge"}


@pytest.mark.parametrize(
    ("change", "own"),
    [
        ({"seed": 1}, EVERY),
        ({"base_episodes": 50}, EVERY),
        ({"expert_episodes": 50}, EVERY),
        ({"steps": 7}, {"reward"}),
        ({"widths": (5,)}, {"reward"}),
        ({"met": True}, {"reward"}),
        ({"execute": 2}, set()),
        ({"scales": (0.5,)}, set()),
        ({"sampling_steps": 3, "skip": 1}, set()),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else "",
)
def test_an_ablation_takes_what_it_does_not_touch_from_its_robot(
    tmp_path, monkeypatch, change, own
):
    whole = of_hopper(tmp_path, x=Ablation(robot="hopper", **change))
    ablation = whole.ablation("x")
    assert ablation.untouched == EVERY - own and whole.untouched == frozenset()
    vars(whole).update({name: f"{name} of the robot" for name in EVERY})
    monkeypatch.setattr(ablation.shop, "model", lambda name, *_: f"{name} of its own")
    for name in EVERY - own:
        assert getattr(ablation, name) == f"{name} of the robot"
    for name in {"base", "expert"} & own:
        assert getattr(ablation, name) == f"{name} of its own"
    assert ablation.shop.folder == tmp_path / "ablations" / "x"


def test_an_ablation_acts_from_its_robot_s_starts_whatever_its_seed(tmp_path):
    whole = of_hopper(tmp_path, x=Ablation(robot="hopper", seed=1))
    ablation = whole.ablation("x")
    for purpose in ("test", "validation", "where paths begin"):
        assert ablation.world(purpose).seed == whole.world(purpose).seed
        assert ablation.seed(purpose) != whole.seed(purpose)
    seeds = {whole.seed(purpose) for purpose in ("base", "expert", "reward 0", "reward 1")}
    assert len(seeds) == 4


def test_whose_data_are_noised(tmp_path, monkeypatch):
    """x_t of the settings: both data sets in equal parts, or one of them alone."""
    models = of_hopper(tmp_path)
    vars(models).update(base_data="base", expert_data="expert")
    monkeypatch.setattr(models, "windows", lambda episodes: episodes)
    assert models.noised("mixed").sources == ("base", "expert")
    assert models.noised("base").sources == ("base",)
    assert models.noised("expert").sources == ("expert",)


def test_states_that_were_met_are_kept_and_a_damaged_file_of_them_is_one_line(tmp_path):
    models = of_hopper(tmp_path)
    normaliser = Normaliser(np.zeros(14, np.float32), np.ones(14, np.float32), "gaussian")
    space = TrajectorySpace(4, 1, 3, normaliser, {})
    vars(models).update(base=types.SimpleNamespace(space=space))
    path = tmp_path / "hopper" / "reward_1.met.npz"
    path.parent.mkdir()
    met = np.random.default_rng(0).normal(size=(5, 11)).astype(np.float32)
    write_arrays(path, observations=met)
    by: Any = None
    np.testing.assert_allclose(models._met("reward_1", by, OWN).rows[:, 0, 3:], met, rtol=1e-6)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        InputError, match="reward_1.met.npz: is missing or damaged; delete it, and"
    ):
        models._met("reward_1", by, OWN)
