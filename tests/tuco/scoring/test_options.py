"""Options of a score: ranges, and what does not fit together, before any model is read."""

import dataclasses

import pytest

from common_jax.errors import InputError
from common_jax.mesh import make_mesh
from tuco_jax.scoring.options import PassOptions, ScoreFileOptions, ScoringOptions


def test_a_file_s_options_hold_those_of_a_score():
    given = ScoreFileOptions(
        base="b", tuned="t", prompts="p", out="o", norm=2, truncate=True, continue_final=True
    )
    assert ScoringOptions(**given.scoring) == ScoringOptions(  # pyright: ignore[reportArgumentType]
        norm=2, truncate=True, continue_final=True
    )
    assert set(given.scoring) == {f.name for f in dataclasses.fields(ScoringOptions)}


@pytest.mark.parametrize(
    ("fields", "mesh", "streams", "message"),
    [
        ({"norm": 3}, None, False, "norm must be 1 or 2, not 3"),
        ({"token_budget": 0}, None, False, "token_budget must be 1 or more, not 0"),
        ({"parallel": "pmap"}, (1, 2, 1), False, "pmap is for data alone"),
        ({}, (2, 1, 1), True, "streams runs on one device"),
        ({"parallel": "pmap"}, None, True, "streams runs on one device"),
        ({"passes": PassOptions(memory=-1)}, None, True, "passes.memory must be 0 or more"),
        ({"passes": PassOptions(folder="no/such")}, None, True, "no/such: no such folder"),
    ],
)
def test_what_is_refused(fields, mesh, streams, message):
    with pytest.raises(InputError, match=message):
        ScoringOptions(**fields).check(mesh and make_mesh(*mesh), streams)
