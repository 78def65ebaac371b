"""What comes of samples, and which guidance is chosen."""

from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from flax import struct

from common_jax.errors import InputError
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.reward.guide import GuidanceOptions, guided_sample
from reward_jax.studies.images.arms import (
    Drawn,
    Yardstick,
    accept,
    choose,
    excess,
    network_runs,
    within,
)

RANDOM = np.random.default_rng(0)
HELD_OUT = RANDOM.normal(size=(400, 4))


def drawn(counts, offset=0.5):
    """As many samples of each of three classes, whose features lie so far off."""
    labels = np.repeat(np.arange(3), counts)
    features = HELD_OUT[: len(labels)] + offset
    return Drawn(np.zeros((len(labels), 1, 1, 1)), labels, features, 0.5, 25.0)


def yardstick():
    return Yardstick(("a", "b", "c"), (1,), HELD_OUT, drawn([40, 20, 40]))


def test_figures_of_an_arm():
    stick = yardstick()
    found = stick.of(drawn([60, 10, 30], offset=1.0))
    assert found["harmful_share"] == 0.1 and found["shares"] == {"a": 0.6, "b": 0.1, "c": 0.3}
    assert found["others_factor"] == pytest.approx(0.5 / (30 / 90))
    assert found["others_factor_of_all"] == pytest.approx(0.6 / 0.4)
    assert found["distance"] == pytest.approx(4, rel=0.3)
    assert stick.of(drawn([50, 50, 0]))["others_factor"] is None
    assert stick.of(drawn([0, 50, 1]))["distance"] is None


def test_bounds():
    stick = yardstick()
    before = stick.of(stick.unsteered)
    fine_arm = before | {"harmful_share": 0.02}
    assert all(within(fine_arm, before).values())
    for key, value, bound in (
        ("harmful_share", 0.021, "share"),
        ("others_factor", 1.51, "others"),
        ("others_factor", None, "others"),
        ("distance", 1.2 * before["distance"], "quality"),
    ):
        found = within(fine_arm | {key: value}, before)
        assert [name for name, fine in found.items() if not fine] == [bound]


def test_figures_in_units_of_their_bounds():
    stick = yardstick()
    before = stick.of(stick.unsteered)
    assert excess(before, before) == pytest.approx(
        {"share": 10, "others": 2 / 3, "quality": 1 / 1.1}
    )
    lost = before | {"others_factor": None, "distance": None}
    assert excess(lost, before) == pytest.approx(
        {"share": 10, "others": np.inf, "quality": np.inf}
    )
    assert excess(before, lost)["quality"] == np.inf  # of too few samples
    none = before | {"harmful_share": 0.0}
    assert excess(none, none)["share"] == 0 and excess(before, none)["share"] == np.inf


def test_the_scale_whose_worst_bound_is_kept_best_is_chosen():
    stick = yardstick()
    arms = {
        1.0: drawn([45, 10, 45]),
        2.0: drawn([49, 2, 49]),
        4.0: drawn([50, 0, 50], offset=2.0),  # off
    }
    scale, rows = choose(arms.__getitem__, stick, list(arms))
    assert scale == 2.0 and [row["scale"] for row in rows] == [1.0, 2.0, 4.0]
    assert rows[1]["harmful_share"] == 0.02 and not rows[2]["within"]["quality"]
    assert choose(arms.__getitem__, stick, [4.0, 4.0])[0] == 4.0
    assert choose({}.__getitem__, stick, [4.0]) == (4.0, [])


def test_scales_beyond_an_edge_that_is_best():
    arms = {
        0.5: drawn([40, 20, 40]),
        1.0: drawn([45, 10, 45]),
        2.0: drawn([49, 2, 49]),
        4.0: drawn([20, 0, 80]),
    }
    scale, rows = choose(arms.__getitem__, yardstick(), [0.5, 1.0])
    assert scale == 2.0 and [row["scale"] for row in rows] == [0.5, 1.0, 2.0, 4.0]


def test_one_harmful_sample_or_none_is_not_taken_for_a_share():
    arms = {
        1.0: drawn([41, 1, 39]),  # .012 of them: at .0244 beyond a tenth of .2, at .012 within it
        2.0: drawn([42, 0, 38]),
        4.0: drawn([60, 0, 20]),
    }
    assert choose(arms.__getitem__, yardstick(), list(arms))[0] == 2.0


def test_scales_that_fail():
    def fail(scale):
        if scale > 1:
            raise InputError("not finite")
        return drawn([45, 10, 45])

    scale, rows = choose(fail, yardstick(), [1.0, 8.0])
    assert scale == 1.0 and rows[1] == {"scale": 8.0, "failed": "not finite"}
    with pytest.raises(InputError, match="samples of every scale fail: not finite"):
        choose(fail, yardstick(), [8.0, 9.0])


@struct.dataclass
class Counted:
    """A guide that notes that it is asked."""

    asked: ClassVar[list[None]] = []

    def gradient(self, x, t, cond=None):
        jax.debug.callback(lambda: self.asked.append(None))
        return -x


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, 5),  # at t 19, 15, 11, 7 and 3
        ({"t_startgrad": 11}, 3),
        ({"t_stopgrad": 7, "n_guide_steps": 2}, 8),
        ({"scale": 0.0}, 0),
    ],
)
def test_runs_are_counted_where_a_guide_is_asked(changes, asked):
    Counted.asked.clear()
    schedule = cosine_schedule(20)
    options = GuidanceOptions(sampler="ddim", sampling_steps=5, **changes)
    given: Any = dict(guide=Counted(), options=options, key=jax.random.key(0))
    jax.block_until_ready(guided_sample(lambda x, t, cond=None: -x, schedule, (2, 3), **given))
    jax.effects_barrier()
    assert len(Counted.asked) == asked
    assert network_runs(options, schedule, 2) == 5 + 2 * asked


def test_rejection_keeps_by_the_ratio():
    rho = np.log(np.array([1.0, 0.5, 0.01] * 2000))
    shares = accept(rho, 0.0, np.random.default_rng(0)).reshape(-1, 3).mean(axis=0)
    np.testing.assert_allclose(shares, [1.0, 0.5, 0.01], atol=0.03)
