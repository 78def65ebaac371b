"""What is measured of a robot's models: which arms there are, and whether there is a reward."""

import numpy as np
import pytest

from reward_jax.reward.guide import GuidanceOptions
from reward_jax.studies.locomotion import work
from reward_jax.studies.locomotion.models import Models
from reward_jax.studies.locomotion.settings import Ablation, Config
from reward_jax.tasks.base import Outcome
from tests.reward.studies.locomotion.small import OWN


def of_hopper(tmp_path, **ablations):
    config = Config(out=tmp_path, robots={"hopper": OWN}, ablations=ablations)
    return work.Work(Models(config, "hopper"))


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        ({"steps": 7}, False),
        ({"rounds": 1, "path_draws": 0}, False),
        ({"seed": 1}, True),
        ({"execute": 2}, True),
        ({"scales": (0.5,)}, True),
        ({"sampling_steps": 3}, True),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else "",
)
def test_arms_that_a_change_does_not_move_are_the_robot_s(tmp_path, change, moved):
    """The reward's is always the ablation's own, and the expert's the same of any base."""
    whole = of_hopper(tmp_path, x=Ablation(robot="hopper", **change))
    ablation = work.Work(whole.models.ablation("x"))
    own, other = tmp_path / "ablations" / "x", tmp_path / "hopper"
    assert ablation._folder("reward", "arms") == own / "arms"
    for name in ("unsteered", "raw_difference", "expert"):
        assert ablation._folder(name, "arms") == (own if moved else other) / "arms"
    assert whole._folder("reward", "unseen_arms") == other / "unseen_arms"
    assert whole._folder("expert", "unseen_arms") == other / "arms"


def test_where_no_noise_is_drawn_there_are_no_temperatures(tmp_path):
    """Each would be the unsteered base once more."""
    one = of_hopper(tmp_path)
    arms = one._arms()
    temperatures = {"temperature 0", "temperature 0.5", "temperature 0.8"}
    assert temperatures < set(arms)
    one.models.sampling = GuidanceOptions(sampler="ddim", sampling_steps=3)
    assert one._arms() == [name for name in arms if name not in temperatures]
    one.models.sampling = GuidanceOptions(sampler="ddim", eta=0.5)
    assert one._arms() == arms


def test_where_the_expert_is_no_better_there_is_no_reward_to_learn(tmp_path, monkeypatch, capsys):
    """It is said, and noted, that its plans do not beat the base's by two standard errors."""
    one = of_hopper(tmp_path)
    vars(one.models).update(base="base", expert="expert")
    above = {"base": np.zeros(4)}

    def returns(arm, world, count, options):
        shown = {"return": 7.0 + above[arm.model], "steps": np.full(4, 9)}
        return Outcome(shown, np.zeros(0))

    monkeypatch.setattr(work, "returns", returns)
    for more, beats in ((np.array([1.0, 2, 3, 4]), True), (np.array([-1.0, 2, 0, 1]), False)):
        above["expert"] = more
        gap = one._gap()
        assert (gap["mean"], gap["expert_beats_base"]) == (pytest.approx(more.mean()), beats)
        said = "the expert's plans return 0.5 (0.6) more than the base's: there is no reward to"
        assert (said in capsys.readouterr().out) == (not beats)
