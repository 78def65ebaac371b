"""Tasks by name, and by what others call their worlds; nobody else names one."""

import ast
import pathlib
import re

import numpy as np
import pytest

import reward_jax
from common_jax.errors import InputError
from reward_jax.data import hdf5
from reward_jax.tasks.find import TASKS, find, read, task_of
from tests.reward.cli_runs import episodes

PACKAGE = pathlib.Path(reward_jax.__path__[0])
WORLDS = re.compile("maze|hopper|cheetah|walker", re.IGNORECASE)


def code_of(path: pathlib.Path) -> ast.Module:
    """A module's statements without comments and docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant):
                body[0] = ast.Pass()
    return tree


def test_nothing_outside_tasks_and_their_studies_names_a_world():
    """In code. (Docstrings may speak of published data sets and of what was measured.)"""
    rooms = ("tasks", "studies", "shipped")
    sources = [p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] not in rooms]
    assert len(sources) > 30
    for path in sources:
        tree = code_of(path)
        assert not (found := WORLDS.findall(ast.unparse(tree))), f"{path}: {found}"
        texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert not (texts & set(TASKS)), f"{path}: {texts & set(TASKS)}"
    page = (PACKAGE / "commands" / "report.html").read_text("utf-8")
    assert not re.search("maze|walk|simulator", page)


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
