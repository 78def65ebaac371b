"""Every study of the catalogue is there under its name, and every module of one is in it."""

import pathlib

import pytest

import tuco_jax.studies
from tuco_jax.studies.catalog import STUDIES, load_study


@pytest.mark.parametrize("name", STUDIES)
def test_a_name_is_its_module_s(name):
    study = load_study(name)
    assert study.name == name and study.config.__module__ == study.prepare.__module__


def test_no_study_is_left_out():
    folder = pathlib.Path(tuco_jax.studies.__path__[0])
    found = {
        path.stem.replace("_", "-")
        for path in folder.glob("*.py")
        if "STUDY = " in path.read_text("utf-8")
    }
    assert found == set(STUDIES)
