"""A study's findings as JSON, a page and Markdown, with the same figures in all three."""

import json

import pytest

from common_jax.report.figures import draw
from common_jax.report.findings import Claim, Figure, Findings, Table, markdown_table, write


@pytest.fixture
def findings():
    return Findings(
        title="What <it> found",
        summary=["One sentence."],
        claims=[Claim("it holds", "78%", "80%", "reproduced")],
        tables=[Table("Peaks", ("maze", "share"), [("u|maze", 0.12345), ("large", 3)], "a note")],
        figures=[Figure("maps", draw(lambda axis: axis.plot([0, 1])), "maps of\nall")],
        method=["As written."],
        caveats=["few seeds"],
        facts={"device": "cpu"},
        data={"share": 0.8},
    )


def test_all_three_files_tell_the_same(tmp_path, findings):
    page = write(tmp_path / "report", findings, started=0.0, command="study --seed 1")
    assert page == tmp_path / "report" / "report.html"
    names = sorted(p.name for p in page.parent.iterdir())
    assert names == ["maps.svg", "report.html", "report.md", "results.json"]
    found = json.loads((page.parent / "results.json").read_text())
    assert found["share"] == 0.8 and found["claims"][0]["verdict"] == "reproduced"
    assert found["facts"]["command"] == "study --seed 1" and found["facts"]["run time"][-1] == "s"
    html, text = page.read_text(), (page.parent / "report.md").read_text()
    assert "What &lt;it&gt; found" in html and "<it>" not in html
    for part in ("0.123", "80%", "few seeds", "a note"):
        assert part in html and part in text
    assert "![maps of all](maps.svg)" in text and "<svg" in (page.parent / "maps.svg").read_text()


def test_a_cell_of_a_table_stays_in_its_cell():
    assert markdown_table(("a",), [("x|y\nz",)]) == "| a |\n|---|\n| x\\|y z |"
