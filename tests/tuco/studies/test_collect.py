"""Reports of several pairs on one page."""

import pytest

from common_jax.errors import InputError
from common_jax.report.figures import draw
from common_jax.report.findings import Claim, Figure, Findings, write
from tests.hostile import check_json
from tuco_jax.studies.collect import CollectConfig, run


def findings(measured, verdict, figures=()):
    claims = [Claim("TuCo rises | with shots", "rises", measured, verdict)]
    facts = {"base": "b", "tuned": "t", "weights": "float32", "device": "cpu"}
    return Findings("Shots", ["So."], claims, [], figures, ["How."], [], facts, {"tuco": [0.25]})


def test_claims_stand_side_by_side(tmp_path):
    figure = Figure("curves", draw(lambda axes: axes.plot([1, 2]), width=3, height=2), "a line")
    write(tmp_path / "one" / "output-co", findings("0.1", "reproduced", [figure]), 0.0, "run 1")
    write(tmp_path / "two" / "output-co", findings("-0.1", "not reproduced"), 0.0, "run 2")
    write(tmp_path / "two" / "web-chat", findings("0.9", "not clear"), 0.0, "run 3")
    write(tmp_path / "two" / "output-co-more", findings("0.2", "not clear"), 0.0, "run 4")
    (tmp_path / "two" / "web-chat" / "search.jsonl").write_text("work in progress")
    out = tmp_path / "docs"
    page = run(CollectConfig((tmp_path / "one", tmp_path / "two"), out)).read_text()
    assert (
        "| TuCo rises \\| with shots | rises | 0.1: **reproduced** | -0.1: **not reproduced** |"
        in page
    )
    # Each pair's own command, in the paper's order of studies.
    assert page.index("    run 3\n") < page.index("    run 1\n    run 2\n")
    # Another run of a study has a heading of its own, after the first.
    assert page.index("## Shots\n\n[one]") < page.index("## Shots (output-co-more)\n\n[two]")
    assert "[one](one/output-co/report.md), [two](two/output-co/report.md)" in page
    assert "**two**: base b; tuned t; float32 on cpu. Run times: web-chat" in page
    copied = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert copied == [
        "README.md",
        "one/output-co/curves.svg",
        "one/output-co/report.md",
        "one/output-co/results.json",
        "two/output-co-more/report.md",
        "two/output-co-more/results.json",
        "two/output-co/report.md",
        "two/output-co/results.json",
        "two/web-chat/report.md",
        "two/web-chat/results.json",
    ]


def test_results_that_are_damaged(tmp_path):
    """Whatever stands in place of any part: a page, or one line that names the file."""
    write(tmp_path / "one" / "web-chat", findings("0.1", "not clear"), 0.0, "run")
    path = tmp_path / "one/web-chat/results.json"
    check_json(path, lambda: run(CollectConfig((tmp_path / "one",), tmp_path / "docs")))
    path.write_text("{")
    with pytest.raises(InputError, match=r"web-chat/results.json: is damaged or cut short; run"):
        run(CollectConfig((tmp_path / "one",), tmp_path / "docs"))


def test_two_pairs_of_one_name_are_refused(tmp_path):
    for place in ("a", "b"):
        write(tmp_path / place / "x" / "web-chat", findings("0.1", "not clear"), 0.0, "run")
    with pytest.raises(InputError, match="two pairs are called x: their reports would be one"):
        run(CollectConfig((tmp_path / "a/x", tmp_path / "b/x"), tmp_path / "docs"))
    assert not (tmp_path / "docs").exists()


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no results; run `tuco-jax study NAME"):
        run(CollectConfig((tmp_path,), tmp_path / "docs"))
