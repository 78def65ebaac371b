"""The locomotion study's report, of made up results: the paper's figures beside ours."""

from types import SimpleNamespace
from typing import Any

import pytest

from reward_jax.studies.locomotion import claims, report
from reward_jax.tasks.locomotion.robots import ROBOTS

ERRORS = ("normalized_standard_error", "normalized_seed_standard_error")


def arms(level, seeds=None):
    found = dict.fromkeys(("unsteered", "discriminator", "reward"), None)
    values = {"normalized": level, ERRORS[0]: 3.0, ERRORS[1]: None}
    every = {name: dict(values) for name in found}
    every["reward"][ERRORS[1]] = seeds
    return every


def table(count, own=True):
    ids = [robot.environment for robot in ROBOTS.values()][:count]
    measured = {i: arms(10.0 * (n + 1), seeds=6.0) for n, i in enumerate(ids)}
    found = report._against_paper(measured, measured, own=own)
    return {row[:3]: row[3:] for row in found.rows}, found.note


def test_each_arm_stands_beside_the_paper_s_with_its_own_error():
    rows, note = table(3)
    assert len(rows) == 3 * 3 + 3 * 2 + 3 + 2
    for identifier, arm, wanted in (
        ("HalfCheetah-v5", "unsteered", "30.38 +- 0.38"),
        ("HalfCheetah-v5", "reward", "31.65 +- 0.32"),
        ("Hopper-v5", "discriminator", "25.12 +- 0.95"),
        ("Hopper-v5", "reward", "27.04 +- 0.90"),
        ("Walker2d-v5", "discriminator", "27.98 +- 0.99"),
        ("Walker2d-v5", "reward", "38.40 +- 1.02"),
    ):
        assert rows[identifier, "the reward's own", arm][1] == wanted
    assert rows["Walker2d-v5", "unseen", "reward"][1] == "102.05"
    assert "sizes" in note and "versions" in table(3, own=False)[1]


@pytest.mark.parametrize(
    ("base", "arm", "paper"),
    [
        ("the reward's own", "unsteered", "27.75"),
        ("the reward's own", "discriminator", "27.84"),
        ("the reward's own", "reward", "32.36"),
        ("unseen", "unsteered", "71.44"),
        ("unseen", "reward", "78.78"),
    ],
)
def test_the_mean_of_the_three_is_that_of_the_paper_s_table(base, arm, paper):
    rows, _ = table(3)
    here = "20.00 +- 1.73" + (" (seeds +- 3.46)" if arm == "reward" else "")
    assert rows["mean", base, arm] == (here, paper)
    assert not [key for key in table(2)[0] if key[0] == "mean"]


def test_the_gain_that_is_claimed_is_that_of_the_means():
    of = [[arms[name][0] for arms in claims.PAPER.values()] for name in ("unsteered", "reward")]
    assert sum(of[1]) / sum(of[0]) - 1 == pytest.approx(claims.PAPER_GAIN, abs=5e-4)


def tried(*pairs):
    rows = [{"scale": scale, "t_stopgrad": stop, "return": 1.0} for scale, stop in pairs]
    return lambda scale, stop: {
        "settings": {"scale": scale, "t_stopgrad": stop},
        "validation": rows,
    }


@pytest.mark.parametrize(
    "scale, stop, wanted",
    [
        (0.5, 3, ("0.5 (the smallest tried)", "3")),
        (1.0, 0, ("1", "0")),
        (2.0, 6, ("2 (the largest tried)", "6 (the largest tried)")),
    ],
)
def test_what_was_chosen_at_an_edge_is_marked(scale, stop, wanted):
    arm = tried((0.5, 0), (1.0, 0), (2.0, 0), (2.0, 3), (2.0, 6))(scale, stop)
    assert tuple(report._chosen(arm, name) for name in ("scale", "t_stopgrad")) == wanted
    only = tried((scale, stop))(scale, stop)
    assert report._chosen(only, "t_stopgrad") == str(stop)


def test_guidance_that_nobody_chose_is_told_as_such():
    one: Any = SimpleNamespace(scales=[1.5], t_stopgrads=[3])
    assert "scale 1.5 and t_stopgrad 3, given and not chosen" in report._guidance(one)
    for more in ({"scales": [1.0, 2.0]}, {"t_stopgrads": [0, 3]}):
        several: Any = SimpleNamespace(**vars(one) | more)
        assert "on validation seeds" in report._guidance(several)


def test_the_best_temperature_is_shown_or_why_there_is_none():
    def best(settings, *names):
        own = {"mean": 3.0, "standard_error": 1.0, "seed_standard_error": None}
        one = own | {"settings": settings}
        return report._best_temperature(dict.fromkeys(("unsteered", *names), one))

    ddim, ancestral = {"sampler": "ddim", "eta": 0.0}, {"sampler": "ancestral", "eta": 0.0}
    assert best(ddim) == "none: no noise is drawn" and best(ancestral) == ""
    assert best(ancestral, "temperature 0.5") == best(ddim | {"eta": 1.0}, "temperature 0")
    assert best(ancestral, "temperature 0.5") == "3 +- 1"
