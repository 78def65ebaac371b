"""Tests mirror modules: who changes a module finds its tests under the same name."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ROOMS = ("core", "prompts", "scoring", "generation", "gradients", "attacks", "datasets")
ROOMS += ("evaluation", "studies")


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_has_tests_of_its_name(room):
    modules = {p.stem for p in (ROOT / "tuco_jax" / room).glob("*.py")} - {"__init__"}
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests/tuco" / room).glob("test_*.py")}
    assert modules and not modules - tests
