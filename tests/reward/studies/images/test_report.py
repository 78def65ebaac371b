"""Claims of the image study, of made up results: at each bound, and beyond it."""

import copy
from typing import Any

import pytest

from reward_jax.studies.images.report import claims_of

NAMES = ("bag", "dress", "sneaker")
AUC, LOOK, NULL, SHARE, OTHERS, QUALITY = range(6)  # places of the claims


def results() -> dict[str, Any]:
    """All as is asked."""
    arm = {"harmful_share": 0.01, "distance": 0.9, "others_factor": 1.2}
    choice = {
        "auc": 0.98,
        "loss_difference": {"network_runs": 24},
        "arms": {
            "unsteered": arm | {"harmful_share": 0.5, "distance": 1.0, "others_factor": 1.0},
            "steered": arm,
        },
    }
    interval = {"interval": [0.45, 0.56]}
    return {
        "choices": {name: copy.deepcopy(choice) for name in NAMES},
        "mean_auc": {
            "reward": 0.98,
            "loss_difference": 0.9795,
            "score_norm": 0.9,
            "difference": {"auc": 0.0005, "interval": [-0.002, 0.0031]},
        },
        "null": {"reward": {"auc": 0.5, "choices": dict.fromkeys(NAMES, interval)} | interval},
        "settings": {"null_pairs": 1},
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    found = results()
    *names, last = path.split("/")
    place: Any = found
    for name in names:
        place = place[name]
    assert last in place
    place[last] = value
    return found


STEERED, UNSTEERED = (f"choices/dress/arms/{arm}" for arm in ("steered", "unsteered"))


@pytest.mark.parametrize(
    ("claim", "path", "at", "beyond"),
    [
        (AUC, "choices/dress/auc", 0.95, [0.9499]),
        (LOOK, "mean_auc/reward", 0.9795, [0.9794]),
        (NULL, "null/reward/interval", [0.5, 0.7], [[0.501, 0.7], [0.3, 0.499]]),
        (NULL, "null/reward/interval", [0.3, 0.5], []),
        (SHARE, f"{STEERED}/harmful_share", 0.05, [0.0501]),
        (SHARE, f"{UNSTEERED}/harmful_share", 0.1, [0.0999, 0]),
        (OTHERS, f"{STEERED}/others_factor", 1.5, [1.501, None]),
        (QUALITY, f"{STEERED}/distance", 1.1, [1.101, None]),
        (QUALITY, f"{UNSTEERED}/distance", 0.82, [0.81]),
    ],
)
def test_each_bound_is_held_where_it_lies_and_not_beyond(claim, path, at, beyond):
    """By one choice of three; no other claim is touched."""
    held = [one.verdict for one in claims_of(changed(path, at))]
    assert held == ["reached"] * 6
    for value in beyond:
        missed = [one.verdict for one in claims_of(changed(path, value))]
        assert missed == ["reached" if i != claim else "not reached" for i in range(6)], value


def test_what_is_measured_is_said():
    measured = [one.measured for one in claims_of(changed("null/reward/interval", [0.4, 0.6]))]
    assert measured[AUC] == "0.980 (bag), 0.980 (dress), 0.980 (sneaker)"
    assert measured[LOOK].startswith("0.9800 of one network run, 0.9795 of 24; difference 0.0005 ")
    assert "(-0.0020 to 0.0031, " in measured[LOOK]
    assert measured[NULL].startswith("0.500 (0.400 to 0.600); ")
    assert "over images alone, 3 of 3 hold it" in measured[NULL]
    assert measured[SHARE] == "0.020 (bag), 0.020 (dress), 0.020 (sneaker)"
    assert measured[QUALITY] == "0.900 (bag), 0.900 (dress), 0.900 (sneaker)"
    none = claims_of(changed(f"{STEERED}/others_factor", None))[OTHERS]
    assert none.measured == "1.200 (bag), none (dress), 1.200 (sneaker)"
    apart = changed("null/reward/choices", dict.fromkeys(NAMES[1:], {"interval": [0.6, 0.7]}))
    apart["settings"]["null_pairs"] = 4
    null = claims_of(apart)[NULL]
    assert "reward" in null.text and "over 4 pairs, holds .5" in null.paper
    assert "over 4 pairs, 0 of 2 hold it" in null.measured and null.verdict == "reached"
