"""Every study of the catalogue loads, and is a study."""

import dataclasses

import pytest

from reward_jax.studies.base import Study
from reward_jax.studies.catalog import STUDIES, load_study


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_loads(name):
    study = load_study(name)
    assert isinstance(study, Study) and STUDIES[name]
    fields = {f.name for f in dataclasses.fields(study.config)}
    assert {"out", "seed"} <= fields and set(study.free) <= fields
