import html.parser
import re

import numpy as np
import pytest

from tuco_jax.evaluation.contrasts import Contrast
from tuco_jax.evaluation.statistics import Estimate, bootstrap_auc, bootstrap_mean
from tuco_jax.studies.demo_report import Group, Report, Token, TokenMap, render, write

EVIL = '<script>alert("x")</script><img src=http://evil.example/a.png onerror=alert(1)> & \u2028'


def group(name: str, mean: float, seed: int) -> Group:
    rng = np.random.default_rng(seed)
    layers = np.sort(rng.uniform(0, mean, (12, 5)), axis=1)
    tuco = layers[:, -1]
    texts = [f"{EVIL} {name} {i}" for i in range(12)]
    lengths = rng.integers(5, 50, 12)
    return Group(name, EVIL, texts, tuco, layers, lengths, bootstrap_mean(tuco))


@pytest.fixture(scope="module")
def report() -> Report:
    groups = [group("calm", 0.3, 1), group("<b>loud</b>", 0.8, 2)]
    auc = bootstrap_auc(groups[1].tuco, groups[0].tuco)
    tokens = [
        Token("<|im_start|>", 0.9, True),
        Token("<script>", 0.2, False),
        Token("a", 0.5, False),
    ]
    return Report(
        title=EVIL,
        summary=[EVIL],
        groups=groups,
        contrasts=[Contrast("<b>loud</b>", "calm", auc, EVIL)],
        maps=[TokenMap("calm", 0.31, tokens)],
        method=[EVIL],
        caveats=[EVIL],
        facts={EVIL: EVIL},
    )


class Page(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)


@pytest.fixture(scope="module")
def page(report) -> tuple[str, Page]:
    text = render(report)
    return text, Page(text)


def test_texts_are_escaped(page):
    text, parsed = page
    assert "<script" not in text and "<b>" not in text
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in text
    assert not {"script", "b", "iframe", "object", "embed", "link"} & {t for t, _ in parsed.tags}
    assert all(not name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert not parsed.unbalanced and not parsed.open


def test_nothing_is_loaded(page):
    text, parsed = page
    for tag, attrs in parsed.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            if name in attrs:
                assert tag == "img" and (attrs[name] or "").startswith("data:image/")
    styles = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert len(styles) == 1
    assert not re.search(r"url\(|@import", styles[0])
    policy = [a["content"] for t, a in parsed.tags if t == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_every_figure_has_words_with_its_numbers(page, report):
    _, parsed = page
    figures = [attrs for tag, attrs in parsed.tags if tag == "img"]
    assert len(figures) == 3
    alternatives = " ".join(a["alt"] or "" for a in figures)
    assert all(f"{g.mean.value:.3f}" in alternatives for g in report.groups)
    assert f"{report.contrasts[0].auc.value:.2f}" in alternatives


def test_tables_extremes_and_tokens_are_shown(page, report):
    text, parsed = page
    for g in report.groups:
        assert f"{g.mean.value:.4f}" in text
        order = np.argsort(-g.tuco)
        for i in (*order[:5], *order[-5:]):
            assert (
                f"{g.name} {i}</span>".replace("<b>", "&lt;b&gt;").replace("</b>", "&lt;/b&gt;")
                in text
            )
    assert f"{report.contrasts[0].auc.value:.3f}" in text
    titles = [a["title"] for t, a in parsed.tags if t == "span" and "title" in a]
    assert titles == ["0.9000", "0.2000", "0.5000"]


def test_verdicts_follow_the_interval():
    def verdict(low: float, high: float) -> str:
        return Contrast("a", "b", Estimate((low + high) / 2, low, high), "a is higher").verdict

    assert verdict(0.6, 0.9) == "yes"
    assert verdict(0.1, 0.4) == "the reverse"
    assert verdict(0.4, 0.9) == "not clear"


def test_the_same_report_gives_the_same_bytes(tmp_path, report):
    write(tmp_path / "a.html", report)
    write(tmp_path / "b.html", report)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
