"""Every example runs on a random model, in this process."""

import pathlib
import re
import runpy
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *options: str) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, "--tiny", *options])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.slow
def test_attribution(monkeypatch, tmp_path, capsys):
    out = tmp_path / "a.html"
    run(monkeypatch, "attribution", "--out", str(out), "--points", "2")
    printed = capsys.readouterr().out
    assert printed.count("lower: ") == printed.count("raise: ") == 4
    page = out.read_text()
    assert page.count("<h3>") == 4 and page.count("<span style") > 200


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--maximise", "--max_norm", "2")])
def test_soft_prompt(monkeypatch, capsys, options):
    run(monkeypatch, "soft_prompt", "--steps", "6", *options)
    printed = capsys.readouterr().out
    line = next(x for x in printed.splitlines() if x.startswith("mean TuCo by step:"))
    history = [float(x) for x in line.split(":")[1].split()]
    assert len(history) == 6
    assert (history[-1] > history[0]) == bool(options)
    assert "held out: TuCo " in printed


def test_layer_alpha(monkeypatch, capsys):
    run(monkeypatch, "layer_alpha", "--steps", "3", "--folds", "2")
    printed = capsys.readouterr().out
    assert "12 questions, 2 folds" in printed
    for name in ("alpha 1", "best of the grid", "learned by layer"):
        assert f"{name}: loss " in printed
    assert re.search(r"by -?0\.\d{4} nats a question, 95% interval -?0\.\d{4} to", printed)
    alphas = printed.rstrip().splitlines()[-1].split()
    assert len(alphas) == 3 and {float(a) for a in alphas} != {1.0}
