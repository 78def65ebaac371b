"""Claims of the locomotion study, of made up results: their verdicts follow the figures."""

import numpy as np
import pytest

from reward_jax.studies.locomotion import claims
from reward_jax.studies.locomotion.arms import compared, error_of
from reward_jax.tasks.locomotion.robots import ROBOTS

MEANS = {
    "unsteered": 500, "temperature 0": 520, "discriminator": 550, "raw_difference": 1500,
    "reward": 1350, "expert": 1600,
}  # fmt: skip


def arms_of(seed=0, noise=20.0, **changes):
    """Results of 40 environments; the reward's of several seeds, with an error of 5."""
    rng, found = np.random.default_rng(seed), {}
    for name, mean in (MEANS | changes).items():
        returns = mean + noise * rng.standard_normal(40)
        found[name] = {
            "mean": returns.mean(), "normalized": returns.mean() / 40, "returns": returns.tolist(),
            "standard_error": error_of(returns),
            "seed_standard_error": 5.0 if name == "reward" else None,
        }  # fmt: skip
    for one in found.values():
        controls = ("unsteered", "discriminator", "temperature 0")
        one["over"] = {other: compared(one, found[other]) for other in controls}
    return found


def verdicts(environments, beaten=(True, True), whole=True):
    names = list(ROBOTS)[: len(environments)]
    found = {
        "environments": {
            ROBOTS[n].environment: a for n, a in zip(names, environments, strict=True)
        },
        "unseen": {},
        "robots": {
            n: {"gap": {"expert_beats_base": b}} for n, b in zip(names, beaten, strict=True)
        },
    }
    return claims.claims_of(found, whole=whole)


def test_a_share_of_no_gain_is_none_and_has_an_error():
    """A loss over a loss is no share, and a gain over a base below 0 no relative one."""
    assert claims._share(arms_of(raw_difference=100), "reward", "raw_difference") is None
    share, error = claims._share(arms_of(), "reward", "raw_difference") or (0, 0)
    assert share == pytest.approx(0.85, abs=0.02)
    draws = [claims._share(arms_of(seed), "reward", "raw_difference") for seed in range(200)]
    spread = np.std([one[0] for one in draws if one])
    # The reward seeds' own error, 5 of 1000, is in the one and not in the other.
    assert np.hypot(spread, 0.005) == pytest.approx(error, rel=0.25)
    for base, wanted in ((100, 0.5), (0, None), (-50, None)):
        of_base = {"unsteered": {"mean": base}, "x": {"mean": 150}}
        assert claims._gain(of_base, "x", "mean") == wanted


def test_what_holds_is_said_so_of_each_robot_and_on_the_mean():
    found = {one.text: one for one in verdicts([arms_of(0), arms_of(1)])}
    assert {one.verdict for one in found.values()} == {"reproduced", "reached"}
    gain = found["Its mean relative gain is the paper's or more"].measured
    assert gain.startswith("+17") and gain.count("%") == 3
    # One robot's loss to the discriminator is made up for by the other's gain.
    found = {one.text: one for one in verdicts([arms_of(0, discriminator=1400), arms_of(1)])}
    by_mean = found["The reward steers better than a discriminator, on the mean of the robots"]
    assert by_mean.verdict == "reproduced"
    worse = {one.text: one.verdict for one in verdicts([arms_of(0, reward=560), arms_of(1)])}
    assert worse["Steering by the reward raises returns"] == "reproduced"
    assert worse["The reward gains as much as the raw difference of the scores"] == "not reached"


def test_a_robot_without_a_reward_to_learn_is_named_and_left_out():
    found = verdicts([arms_of(0, reward=400), arms_of(1)], (False, True))
    assert {one.verdict for one in found} == {"reproduced", "reached"}
    assert all("; no reward to learn in HalfCheetah-v5" in one.measured for one in found)
    assert {one.verdict for one in verdicts([arms_of(0)], (False,))} == {"not testable here"}
