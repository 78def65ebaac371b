"""What is concluded of prompts that held and that broke."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from tuco_jax.studies import broken_report

RNG = np.random.default_rng(0)


def test_auc_of_an_attack_with_both_outcomes():
    tuco = np.concatenate([np.linspace(0.3, 0.2, 6), np.linspace(0.2, 0.3, 6)])
    outcome = broken_report.Outcome(
        ["q"] * 12,
        np.repeat(["attacked"], 12),
        np.repeat(["x", "y"], 6),
        tuco,
        np.full(12, 9),
        np.asarray([0] * 6 + [2] * 6),
        [["a"]] * 12,
    )
    assert [row[-1] for row in broken_report._by_attack(outcome, 2, 0).rows] == ["-", "-"]
    both = dataclasses.replace(
        outcome, clusters=np.repeat(["x"], 12), tuco=np.r_[0.4, tuco[1:6], tuco[6:11], 0.1]
    )
    (row,) = broken_report._by_attack(both, 2, 0).rows
    held, out = both.tuco[:6], both.tuco[6:]
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in held for b in out])
    assert row[:4] == ["attacked", "x", 12, 6] and row[-1].startswith(f"{wins:.3f}")


def test_two_prompts_that_held_prove_nothing():
    outcome = broken_report.Outcome(
        ["q"] * 12,
        np.repeat(["harmful", "attacked"], 6),
        np.repeat(["bare", "x"], 6),
        np.linspace(0.1, 0.3, 12),
        np.full(12, 9),
        np.asarray([2] * 10 + [0] * 2),
        [["a"]] * 12,
    )
    settings: dict[str, Any] = dict(least=2, seed=0, method=["m"])
    found = broken_report.findings(outcome, {}, **settings)
    assert {c.verdict for c in found.claims} == {"not testable here"}
    assert found.claims[0].measured.endswith("2 held and 10 broken")
    helped = np.asarray([2] * 7 + [0] * 5)
    more = dataclasses.replace(outcome, complied=helped)
    found = broken_report.findings(more, {}, **settings)
    assert found.claims[0].verdict == "reproduced"

    # Told by its high score or by its low one: one AUC and one interval, mirrored.
    tuco = outcome.tuco[RNG.permutation(12)]
    mixed = dataclasses.replace(more, tuco=tuco, clusters=np.repeat(list("abcd"), 3))
    found = broken_report.findings(mixed, {}, **settings)
    there, back = (found.data["contrasts"][i]["contrast"]["auc"] for i in (0, -1))
    value, low, high = there
    assert back == pytest.approx([1 - value, 1 - high, 1 - low], abs=1e-6)
