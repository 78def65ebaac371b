"""Tasks by name, and by what others call their worlds; nobody else names one."""

import ast
import pathlib
import re
from typing import get_args

import numpy as np
import pytest

import common_jax
import reward_jax
from common_jax.errors import InputError
from reward_jax.data import hdf5
from reward_jax.models.stable_diffusion.safety import Strength
from reward_jax.tasks.find import TASKS, find, read, task_of
from tests.reward.cli_runs import episodes

PACKAGES = [pathlib.Path(p.__path__[0]) for p in (reward_jax, common_jax)]
PLAIN = {"open", "medium", "large", "images"}  # names of tasks that are words of their own
KINDS = {"images"}  # and of a kind of samples, too
WORLDS = re.compile(
    r"maze|hopper|cheetah|walker|\bwalks?\b|simulator|"
    + "|".join(
        rf"\b{re.escape(name)}\b"
        for name in {*TASKS, *(find(n).environment for n in TASKS)} - PLAIN - {""}
    ),
    re.IGNORECASE,
)


def test_nothing_outside_tasks_and_their_studies_names_a_world():
    """In code, comments, docstrings, names of files, and the page."""
    rooms = {"tasks", "studies"}
    paths = [
        (folder, p)
        for folder in PACKAGES
        for p in folder.rglob("*")
        if not rooms & set(p.relative_to(folder).parts) and "__pycache__" not in p.parts
    ]
    sources = [p for _, p in paths if p.suffix in (".py", ".html")]
    assert len(sources) > 60
    for folder, path in paths:
        assert not WORLDS.search(str(path.relative_to(folder))), path
    for path in sources:
        text = path.read_text("utf-8")
        assert not (found := WORLDS.findall(text)), f"{path}: {found}"
        if path.suffix == ".py":
            texts = {n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)}
            strengths = set(get_args(Strength)) if "stable_diffusion" in path.parts else set()
            assert not (named := texts & set(TASKS) - strengths - KINDS), f"{path}: {named}"


@pytest.mark.parametrize("word", ["UMaze", "umaze", "PointMaze_Large-v3", "a Hopper", "discs"])
def test_a_world_is_noticed(word):
    assert WORLDS.search(f"of {word}.") and not WORLDS.search("an open, large, discrete one")


def test_names():
    for name in TASKS:
        task = find(name)
        assert (task.name, find(name)) == (name, task)
        assert task_of({"task": name}) is task
        assert task.measures and len({m.name for m in task.measures}) == len(task.measures)
    with pytest.raises(InputError, match=r"'Umaze' is unknown \(did you mean 'umaze'\?\): choose"):
        find("Umaze")
    for about in ({}, {"task": None}, {"environment": "Ant-v5"}, {"environment": None}):
        with pytest.raises(InputError, match="came from no task of ours"):
            task_of(about)


def test_worlds_are_known_by_what_others_call_them(tmp_path):
    assert task_of({"environment": "PointMaze_UMazeDense-v1"}).name == "umaze"
    made = episodes(count=1, steps=5)
    for about, name in (({"environment": "PointMaze_Open-v3"}, "open"), ({"goal": None}, None)):
        made.about.clear()
        made.about.update(about)
        hdf5.write(tmp_path / "d.hdf5", made)
        found = read(tmp_path / "d.hdf5")
        assert found.about == about | ({"task": name} if name else {})
        np.testing.assert_array_equal(found.observations, made.observations)
