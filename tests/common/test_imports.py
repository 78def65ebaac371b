"""Arrows run one way. The folders say which are allowed: between any two, in one direction only.

The two packages know `common_jax`, never one another; `common_jax` knows neither. Nothing imports
a command line, and references for tests stay in tests.
"""

import ast
import graphlib
import importlib
import importlib.util
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("common_jax", "tuco_jax", "reward_jax")
REFERENCES = {"torch", "peft", "diffusers", "pytest", "hypothesis", "tests"}


def modules() -> Iterator[tuple[str, pathlib.Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: pathlib.Path) -> set[str]:
    """Every module named by an import statement, at whatever depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


ALL = dict(modules())
IMPORTS = {module: imports(path) for module, path in ALL.items()}


def room(module: str, folder: str) -> str | None:
    """What of `folder` a module stands in: a folder or a module of it, or None."""
    if not module.startswith(f"{folder}."):
        return None
    return module.removeprefix(f"{folder}.").split(".")[0]


def folders() -> Iterator[str]:
    for module, path in ALL.items():
        if path.name == "__init__.py":
            yield module


@pytest.mark.parametrize("folder", list(folders()))
def test_arrows_run_one_way(folder):
    """Between the rooms of a folder, and between the modules of a room, there is no way back."""
    graph: dict[str, set[str]] = {}
    for module, names in IMPORTS.items():
        mine = room(module, folder)
        if mine is None:
            continue
        theirs = {room(n, folder) for n in names if n in ALL}
        graph.setdefault(mine, set()).update(t for t in theirs if t and t != mine)
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"in {folder}, arrows run in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", [m for m in ALL if m not in PACKAGES])
def test_packages_do_not_know_one_another(module):
    package = module.split(".")[0]
    for name in IMPORTS[module]:
        top = name.split(".")[0]
        assert top not in REFERENCES, f"{module} imports {name}, a reference for tests only"
        if top in PACKAGES:
            assert top in ("common_jax", package), f"{module} imports {name}"


@pytest.mark.parametrize("package", ["tuco_jax", "reward_jax"])
def test_no_public_name_is_a_module(package):
    """`import tuco_jax.score as s` fails: a name is a function or a module, never both."""
    names = importlib.import_module(package).__all__
    assert names
    assert not [name for name in names if importlib.util.find_spec(f"{package}.{name}")]


@pytest.mark.parametrize("package", ["tuco_jax", "reward_jax"])
def test_no_command_imports_another(package):
    """What two of them need stands in a room that a Python user can enter, too."""
    for module, names in IMPORTS.items():
        if mine := room(module, f"{package}.commands"):
            others = {room(name, f"{package}.commands") for name in names} - {mine, None}
            assert not others, f"{module} imports {', '.join(map(str, others))}"


def test_nothing_imports_a_cli():
    clis = {f"{package}.cli" for package in PACKAGES if package != "common_jax"}
    for module, names in IMPORTS.items():
        assert not names & clis, f"{module} imports {names & clis}"


def test_attacks_know_no_data_set():
    """Sets of prompts are read further down: datasets know attacks, not attacks datasets."""
    for module in ALL:
        if module.startswith("tuco_jax.attacks."):
            found = [n for n in IMPORTS[module] if n.startswith("tuco_jax.datasets")]
            assert not found, f"{module} imports {found}"
