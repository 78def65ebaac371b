"""Nothing is chosen by what it is judged by: looks by validation, scales by trial noise."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from reward_jax.data.images.pixels import Images
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.reward.measure import auc
from reward_jax.studies.images import work
from reward_jax.studies.images.arms import Drawn, Yardstick
from tests.reward.studies.images.sets import CLASSES, quarters, smallest

LOOKS = (0, 2, 4)
BEST = {"validation": 2, "test": 1}  # the look that tells apart best
HARMFUL = ("se",)


@pytest.fixture
def study(tmp_path):
    """The smallest study without models: of 40 images of validation, and 24 of the test."""
    made = work.Work(smallest(tmp_path / "out", tmp_path / "data"))
    sets = [Images(*quarters(count, count), CLASSES, "made up") for count in (8, 40, 24)]
    made.models.__dict__ |= {
        "sets": sets,
        "validation": sets[1].pixels.astype(np.float32),
        "test": sets[2].pixels.astype(np.float32),
        "base": SimpleNamespace(denoiser=SimpleNamespace(schedule=cosine_schedule(6))),
    }
    return made


def bad(study):
    return {
        purpose: np.isin(images.known_labels(), images.numbers(HARMFUL))
        for purpose, images in zip(("validation", "test"), study.models.sets[1:], strict=True)
    }


def judged_best_at(harmful, best, seed=0):
    """Judgements at three looks [L, N]; at one of them an AUC of 1."""
    found = np.random.default_rng(seed).normal(size=(len(LOOKS), len(harmful)))
    found[best] -= 100 * harmful
    return found


def test_the_look_of_a_reward_is_that_of_validation(study, monkeypatch):
    harmful = bad(study)
    by_rows = {len(harmful[k]): judged_best_at(harmful[k], best) for k, best in BEST.items()}
    monkeypatch.setattr(work.measure, "scores", lambda reward, x_0, looks: by_rows[len(x_0)])
    found, own = study._judged(None, harmful)
    look = BEST["validation"]
    tested = by_rows[len(harmful["test"])]
    assert found["t"] == LOOKS[look] and found["auc"] == auc(tested[look], harmful["test"]) < 1
    assert found["by_look"]["2"] == 1  # which nobody looked at
    np.testing.assert_array_equal(own["reward"], tested[look])


def test_the_look_of_the_norm_is_that_of_validation(study, monkeypatch):
    harmful = bad(study)
    norms = {k: judged_best_at(harmful[k], best) for k, best in BEST.items()}

    def pair(_, expert, purpose):
        return SimpleNamespace(norms=norms[purpose], losses=norms[purpose], seconds=0.0)

    monkeypatch.setattr(work, "_Pair", pair)
    own: dict[str, Any] = {}
    found = study._untrained(None, harmful, own)["score_norm"]
    look = BEST["validation"]
    assert found["t"] == LOOKS[look]
    assert found["auc"] == auc(norms["test"][look], harmful["test"]) < 1
    np.testing.assert_array_equal(own["score_norm"], norms["test"][look])


def drawn(counts, offset=0.5):
    """So many samples of each of four classes, the last of them harmful."""
    labels = np.repeat(np.arange(4), counts)
    features = FEATURES[: len(labels)] + offset
    return Drawn(np.zeros((len(labels), 1, 1, 1)), labels, features, 0.5, 25.0)


FEATURES = np.random.default_rng(1).normal(size=(200, 3))
BEFORE, GOOD, WORSE = (
    drawn(counts) for counts in ([30, 30, 30, 30], [40, 40, 40, 1], [60, 40, 20, 9])
)


def test_the_scale_is_chosen_by_the_trial_noise(study, monkeypatch):
    """At 1 trial samples are best, at 2 those of the test: 1 is taken, and judged by the test."""
    noises, calls = study._noises, []
    made = {
        ("trial", 1.0): GOOD,
        ("trial", 2.0): WORSE,
        ("trial", 0.5): WORSE,
        ("test", 1.0): WORSE,
        ("test", 2.0): GOOD,
    }

    def draw(noise, options, **guidance):
        name = next(name for name, own in noises.items() if own is noise)
        calls.append((name, options.scale))
        return made[calls[-1]]

    monkeypatch.setattr(study, "_draw", draw)
    sticks = {name: Yardstick(CLASSES, (3,), FEATURES, BEFORE) for name in noises}
    found, _ = study._arm("corner", "steered", None, 1, (1.0, 2.0), sticks)
    assert found["scale"] == 1.0
    assert found["harmful_share"] == sticks["test"].of(WORSE)["harmful_share"]
    assert [name for name, _ in calls].count("test") == 1 and calls[-1] == ("test", 1.0)
    assert {row["scale"] for row in found["validation"]} == {0.5, 1.0, 2.0}


def test_what_a_scale_is_chosen_by_is_held_against_validation_images(study):
    """Not against those of the test, which judge it."""
    study.models.__dict__["judge"] = SimpleNamespace(
        judge=lambda x: (np.zeros(len(x), int), x.reshape(len(x), -1)[:, :3])
    )
    study.__dict__["unsteered"] = {"trial": BEFORE, "test": GOOD}
    sticks = study._yardsticks(HARMFUL)
    for name, purpose in (("trial", "validation"), ("test", "test")):
        x = getattr(study.models, purpose)[~bad(study)[purpose]]
        np.testing.assert_array_equal(sticks[name].held_out, x.reshape(len(x), -1)[:, :3])
        assert sticks[name].harmful == (3,)
    assert len(sticks["trial"].held_out) == 30 and len(sticks["test"].held_out) == 18
