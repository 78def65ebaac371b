"""Verdicts of the GCG study follow from its numbers."""

import dataclasses

import numpy as np
import pytest

from tuco_jax.studies.gcg_report import Form, findings


def form(name: str, values, refused=None) -> Form:
    values = np.asarray(values, np.float32)
    return Form(name, values, np.full(len(values), 9), refused)


@pytest.mark.slow
def test_verdicts_follow_from_the_numbers():
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=(5, 40))
    yes = np.arange(40) % 2 == 0
    groups = [
        form("plain", 0.3 + noise[0], yes),
        form("attack 1", 0.2 + noise[1] + 0.03 * yes, yes),
        form("attack 2", 0.1 + noise[2] + 0.03 * yes, yes),
        form("random 1", 0.29 + noise[3], yes),
        form("random 2", 0.28 + noise[4], yes),
    ]
    found = findings(groups, [], method=[], facts={})
    assert [c.verdict for c in found.claims] == ["reproduced"] * 4
    flat = [dataclasses.replace(m, tuco=0.3 + noise[i]) for i, m in enumerate(groups)]
    found = findings(flat, [], method=[], facts={})
    assert found.claims[0].verdict == "not clear"
    upside_down = [dataclasses.replace(m, tuco=1 - m.tuco) for m in groups]
    found = findings(upside_down, [], method=[], facts={})
    no = "not reproduced"
    assert [c.verdict for c in found.claims] == [no] * 4
    blind = [dataclasses.replace(m, refused=None) for m in groups]
    assert findings(blind, [], method=[], facts={}).claims[3].verdict == "not testable here"
    held = [dataclasses.replace(m, refused=np.ones(40, bool)) for m in groups]
    assert findings(held, [], method=[], facts={}).claims[3].verdict == "not testable here"
