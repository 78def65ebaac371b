"""Modules that are run by `python -m` read their command line as every command does."""

import pathlib
import runpy
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "tuco_jax").rglob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text("utf-8") and path.name != "cli.py"
}


def test_there_are_some():
    assert "tuco_jax.datasets.refusal_data" in PROGRAMS


@pytest.mark.parametrize("module", PROGRAMS)
def test_bad_input_is_one_line(module, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "argv", [module, "--nothing-such", "1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    line = f"python -m {module}: error: unknown option --nothing-such; the options are --config, "
    assert printed.err.startswith(line) and printed.err.count("\n") == 1


@pytest.mark.parametrize("module", PROGRAMS)
def test_its_docstring_says_how_it_is_run(module):
    docstring = PROGRAMS[module].read_text("utf-8").split('"""')[1]
    assert f"    python -m {module} --" in docstring
