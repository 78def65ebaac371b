import re

import jinja2
import pytest

from common_jax.report.page import render

EVIL = "<script>alert('x')</script>"
FRAME = {"title": EVIL, "summary": [EVIL, "two"], "method": [EVIL], "facts": {EVIL: EVIL}}


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(
        '{% extends "page.html" %}\n'
        "{% block style %}\n.mine { color: red; }\n{% endblock %}\n"
        "{% block content %}\n<section>{{ word }}</section>\n{% endblock %}\n"
    )
    return path


def test_the_frame_holds_what_the_template_adds(template):
    page = render(template, word=f"a {EVIL} & b", **FRAME)
    assert page.startswith("<!doctype html>") and page.endswith("</html>")
    assert "<script" not in page and page.count("&lt;script&gt;") == 2 + 1 + 1 + 2 + 1
    (style,) = re.findall("<style>(.*?)</style>", page, re.S)
    assert "\n.mine { color: red; }\n" in style
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    parts = ("</header>", "<section>a &lt;script", "<h2>Method and versions</h2>")
    places = [page.index(part) for part in parts]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ["word", *FRAME])
def test_a_name_without_a_value_is_an_error(template, name):
    context = {"word": "a", **FRAME}
    del context[name]
    with pytest.raises(jinja2.UndefinedError, match=name):
        render(template, **context)
