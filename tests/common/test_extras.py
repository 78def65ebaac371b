"""A module that no plain install brings is asked for by the name of its extra."""

import importlib.metadata
import re
import sys
import tomllib

import pytest

from common_jax import extras
from common_jax.errors import InputError
from reward_jax import cli as reward_jax
from reward_jax.data import hdf5, minari
from reward_jax.tasks.find import find
from reward_jax.tasks.locomotion import robots
from reward_jax.tasks.maze import mazes
from tests.common.test_imports import ALL, IMPORTS, PACKAGES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINE = r"{} is not installed: install tuco-reward-jax\[rewards\]"
NAMES = {"PIL": "pillow", "sklearn": "scikit_learn", "yaml": "pyyaml", "orbax": "orbax_checkpoint"}


def declared(requirements: list[str]) -> set[str]:
    names = (re.findall(r"^[\w.-]+", r)[0] for r in requirements)
    return {name.lower().replace("-", "_") for name in names}


def imported(packages: tuple[str, ...]) -> set[str]:
    """What modules outside of Python's own library and of ours are imported, by distribution."""
    tops: set[str] = set()
    for module, names in IMPORTS.items():
        if module.split(".")[0] in packages:
            tops |= {name.split(".")[0] for name in names}
    tops -= set(sys.stdlib_module_names) | set(PACKAGES)
    return {NAMES.get(t, t).lower() for t in tops}


def test_what_is_imported_is_declared_and_what_is_declared_imported():
    core = declared(PROJECT["dependencies"])
    rewards = declared(PROJECT["optional-dependencies"]["rewards"])
    assert imported(("common_jax", "tuco_jax")) | imported(("reward_jax",)) - rewards == (
        # jsonargparse reads docstrings with it; mujoco is imported by its name as a text
        core - {"docstring_parser"}
    )
    assert rewards - {"mujoco"} <= imported(("reward_jax",))
    assert not rewards & imported(("common_jax", "tuco_jax"))
    assert "reward_jax.tasks.maze.mazes" in ALL


@pytest.fixture
def hide(monkeypatch):
    """Make modules as if they were not installed."""

    def hide(*names: str) -> None:
        for loaded in list(sys.modules):
            if loaded.split(".")[0] in names:
                monkeypatch.delitem(sys.modules, loaded)
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)
        forget()

    def forget() -> None:
        for made in (mazes.maze, robots.environment, find):
            made.cache_clear()

    yield hide
    forget()


@pytest.mark.parametrize(
    ("env", "module"),
    [
        *(("umaze", name) for name in ("gymnasium", "gymnasium_robotics", "mujoco")),
        *(("halfcheetah", name) for name in ("gymnasium", "mujoco")),
    ],
)
def test_a_command_names_the_extra_in_one_line(env, module, hide, capsys, tmp_path):
    hide(module)
    argv = ["data", "--env", env, "--out", str(tmp_path / "walks.hdf5")]
    assert reward_jax.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.match(f"reward-jax: error: {LINE.format(module)}", error)


def test_functions_name_the_extra(hide, tmp_path):
    hide("h5py", "minari", "gymnasium")
    (tmp_path / "walks.hdf5").touch()
    with pytest.raises(InputError, match=LINE.format("h5py")):
        hdf5.read(tmp_path / "walks.hdf5")
    with pytest.raises(InputError, match=LINE.format("minari")):
        minari.read("D4RL/pointmaze/umaze-v2")
    for make in (lambda: mazes.maze("umaze"), lambda: robots.environment("halfcheetah")):
        with pytest.raises(InputError, match=LINE.format("gymnasium")):
            make()


def test_other_modules_are_no_concern_of_extras(monkeypatch):
    with pytest.raises(ModuleNotFoundError), extras.named():
        import nothing_of_this_name  # pyright: ignore[reportMissingImports]  # noqa: F401

    def missing(_: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert extras.reason(ModuleNotFoundError(name="mujoco")) is None
