"""Web-chat, conjugate, many-shot, broken and output-co, from files to reports, on a tiny pair."""

import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

import tuco_jax
from common_jax.errors import InputError
from common_jax.report.findings import Findings
from tests.tuco.tiny import save_tiny, tiny_tokenizer
from tests.tuco.tiny_tokenizer import BOS, bos_tokenizer
from tuco_jax.attacks.conjugate import read_languages
from tuco_jax.attacks.many_shot import Demonstration, matched, prompt_of, read_demonstrations
from tuco_jax.attacks.templates import read_templates
from tuco_jax.datasets import chat_data, prompt_sources, refusal_data
from tuco_jax.datasets import requests as sets
from tuco_jax.evaluation.judges import Judge
from tuco_jax.prompts.encode import encode
from tuco_jax.studies import broken, broken_report, conjugate, many_shot, output_co, web_chat
from tuco_jax.weights.load import load_pair

RNG = np.random.default_rng(0)
WORDS = "tea cup sun map rope bird chair moon lamp stone river glass".split()


def sentence(words: int) -> str:
    return " ".join(RNG.choice(WORDS, words))


def jsonl(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("tuned", 1)):
        save_tiny(folder / name, "llama", seed, max_position_embeddings=512)
    return {"base": str(folder / "base"), "tuned": str(folder / "tuned")}


@pytest.fixture
def requests(tmp_path) -> str:
    return jsonl(tmp_path / "requests.jsonl", [{"prompt": sentence(4)} for _ in range(6)])


def results(out: pathlib.Path) -> dict:
    assert {"report.html", "report.md"} <= {p.name for p in out.iterdir()}
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("make, before", [(tiny_tokenizer, []), (bos_tokenizer, [BOS])])
def test_windows_are_pieces_of_the_texts(make, before):
    texts = [sentence(n) for n in (30, 2, 40, 50)]
    pieces = web_chat.windows(make(), texts, 60, most=9, seed=1)
    assert len(pieces) == 3
    for piece, text in zip(pieces, [t for t in texts if len(t) >= 60], strict=True):
        assert piece[: len(before)].tolist() == before and len(piece) == 60 + len(before)
        own = make().decode(piece[len(before) :].tolist())
        assert own in text and len(own) == 60
    again = web_chat.windows(make(), texts, 60, most=9, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(pieces, again, strict=True))
    with pytest.raises(InputError, match="window is 999, but 0 of 4 texts have so many tokens; "):
        web_chat.windows(make(), texts, 999, most=9)


def test_web_chat_scores_the_windows_themselves(models, requests, tmp_path):
    web = jsonl(tmp_path / "web.jsonl", [{"prompt": sentence(30)} for _ in range(5)])
    config = web_chat.Config(
        out=tmp_path / "out", web=web, chat=requests, window=40, prompts=5, **models
    )
    found = web_chat.STUDY.run(config)
    data = results(config.out)
    assert set(data["tuco"]) == {"chat", "chat as plain text", "web text as a turn", "web text"}
    assert data["tokens"]["web text"] == [40] * 5
    for claim, (first, second) in zip(
        found.claims,
        (
            ("chat", "web text"),
            ("chat as plain text", "web text"),
            ("chat", "web text as a turn"),
        ),
        strict=True,
    ):
        pairs = [(a, b) for a in data["tuco"][first] for b in data["tuco"][second]]
        wins = np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])
        assert claim.measured.startswith(f"AUC {wins:.3f} [")
        assert claim.measured in (config.out / "report.md").read_text()
    pair, tokenizer = load_pair(models["base"], models["tuned"])
    texts = [json.loads(line)["prompt"] for line in pathlib.Path(web).read_text().splitlines()]
    pieces = web_chat.windows(tokenizer, texts, 40, most=5)
    whole = [str(tokenizer.decode(p.tolist())) for p in pieces]
    want = tuco_jax.score(pair, tokenizer, whole).tuco
    np.testing.assert_allclose(data["tuco"]["web text"], want, atol=1e-5)
    turned = [[{"role": "user", "content": text}] for text in whole]
    want = tuco_jax.score(pair, tokenizer, turned).tuco
    np.testing.assert_allclose(data["tuco"]["web text as a turn"], want, atol=1e-5)


def test_web_chat_s_bad_input(tmp_path, requests):
    turns = jsonl(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "x"}]}] * 2)
    with pytest.raises(InputError, match=r"t.jsonl:1: web text is `prompt`, not `messages`"):
        web_chat.STUDY.run(web_chat.Config(out=tmp_path / "out", web=turns, chat=requests))
    with pytest.raises(InputError, match="window must be 1 or more, prompts 2 or more"):
        web_chat.STUDY.run(web_chat.Config(out=tmp_path / "out", window=0))
    one = jsonl(tmp_path / "one.jsonl", [{"prompt": "x"}])
    with pytest.raises(InputError, match="one.jsonl: one chat prompt; give 2 or more"):
        web_chat.STUDY.run(web_chat.Config(out=tmp_path / "out", web=requests, chat=one))
    assert not (tmp_path / "out").exists()


def test_conjugate_compares_languages(models, tmp_path):
    folder = tmp_path / "languages"
    folder.mkdir()
    for name, words in (("English", 3), ("sw", 6), ("Malayalam", 6), ("Klingon", 4)):
        jsonl(folder / f"{name}.jsonl", [{"prompt": sentence(words)} for _ in range(6)])
    config = conjugate.Config(out=tmp_path / "out", data=str(folder), **models)
    found = conjugate.STUDY.run(config)
    data = results(config.out)
    assert set(data["tuco"]) == {"English", "Swahili", "Malayalam", "Klingon"}
    assert len(data["contrasts"]) == 6 and list(data["against"]) == ["English"]
    low = data["tuco"]["Malayalam"] + data["tuco"]["Swahili"]
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in data["tuco"]["English"] for b in low])
    assert data["against"]["English"]["contrast"]["auc"][0] == pytest.approx(wins)
    assert [c.verdict for c in found.claims][1:] == ["not testable here"] * 2
    rows = next(t for t in found.tables if "simpler" in t.title).rows
    assert [row[1] for row in rows[:2]] == ["TuCo", "prompt length"]
    assert rows[0][2].startswith(f"{wins:.3f}")
    assert rows[1][2].startswith("0.000")  # three words are shorter than six
    assert f" --data {folder}" in found_command(config.out)


def found_command(out: pathlib.Path) -> str:
    """What repeats a run, as its report has it."""
    return results(out)["facts"]["command"]


def test_two_names_of_one_language_are_refused(tmp_path):
    for name in ("English", "en"):
        jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "a"}])
    with pytest.raises(InputError, match="English and en are both English; keep one"):
        conjugate.STUDY.run(conjugate.Config(out=tmp_path / "out", data=str(tmp_path)))
    assert not (tmp_path / "out").exists()


def test_conjugate_without_data_says_so(tmp_path):
    found = conjugate.STUDY.run(conjugate.Config(out=tmp_path / "out"))
    assert {c.verdict for c in found.claims} == {"not testable here"}
    assert "Nothing was measured" in (tmp_path / "out" / "report.md").read_text()


def test_languages_must_ask_the_same(tmp_path):
    with pytest.raises(InputError, match="nowhere: is no folder; give one with a prompts file"):
        read_languages(tmp_path / "nowhere")
    jsonl(tmp_path / "a.jsonl", [{"id": "x", "prompt": "1"}, {"id": "y", "prompt": "2"}])
    with pytest.raises(InputError, match="1 prompts files .* give one a language, 2 or more"):
        read_languages(tmp_path)
    other = tmp_path / "b.jsonl"
    jsonl(other, [{"prompt": "1"}])
    with pytest.raises(InputError, match="b.jsonl: 1 rows, but a.jsonl has 2; give the same"):
        read_languages(tmp_path)
    jsonl(other, [{"id": "y", "prompt": "2"}, {"id": "x", "prompt": "1"}])
    with pytest.raises(InputError, match="b.jsonl:1: id 'y', but a.jsonl has 'x' there"):
        read_languages(tmp_path)
    jsonl(other, [{"prompt": "1"}, {"prompt": "2"}])
    assert [language.name for language in read_languages(tmp_path)] == ["a", "b"]
    (tmp_path / "b.txt").write_text("1\n2\n")
    with pytest.raises(InputError, match="b.txt: 'b' is already another file's name; remove one"):
        read_languages(tmp_path)


def test_many_shot_prompts_hold_the_exchanges_in_order():
    prompt = prompt_of("p", [Demonstration("q1", "a1"), Demonstration("q2", "a2")], "last")
    assert [(m["role"], m["content"]) for m in prompt.messages or ()] == [
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "last"),
    ]


def test_matched_demonstrations_follow_the_targets_at_every_number_of_shots():
    targets = RNG.integers(20, 40, 30)
    questions = ["q" * int(n) for n in RNG.integers(5, 15, 30)]
    answers = ["a" * n for n in (8, 11, 15, 22, 30)]
    found = matched(targets.tolist(), questions, [answers], len)
    assert [d.question for d in found] == questions
    have = np.cumsum([len(d.question) + len(d.answer) for d in found])
    assert np.abs(have - np.cumsum(targets)).max() <= 8
    own = [["a", "aa"] if i % 2 else ["b" * 40, "b" * 20] for i in range(30)]
    for i, d in enumerate(matched(targets.tolist(), questions, own, len)):
        assert d.answer in own[i]


def test_default_answers_can_be_matched_by_refusals():
    def words(text: str) -> int:
        """About as many as tokens."""
        return len(re.findall(r"\w+|[^\w\s]", text))

    answers = prompt_sources.labelled_refusals()
    refusals = [words(text) for text in answers]
    agreeing = [words(text) for text in many_shot.OPENINGS]
    assert min(refusals) <= min(agreeing) and max(agreeing) <= max(refusals)
    targets = [agreeing[i % len(agreeing)] for i in range(128)]
    found = matched(targets, [""] * 128, [answers], words)
    have = np.cumsum([words(d.answer) for d in found])
    assert np.abs(have - np.cumsum(targets)).max() <= 4 < many_shot.SLACK


def test_no_default_control_was_trained_on():
    exchanges = prompt_sources.exchanges()
    assert len(exchanges) >= 128 and len({question for question, _ in exchanges}) == len(exchanges)
    refusals = prompt_sources.labelled_refusals()
    assert len(refusals) >= 20 and len(set(refusals)) == len(refusals)
    rows = refusal_data.training_rows(refusal_data.RefusalDataConfig())
    rows += chat_data.training_rows(refusal_data.RefusalDataConfig())
    trained = {plain(message["content"]) for row in rows for message in row["messages"]}
    texts = [text for exchange in exchanges for text in exchange] + refusals
    assert not trained & set(map(plain, texts))
    # Nor a part of what was, but for two words that any refusal holds.
    whole = [plain(text) for text in texts if text not in ("I can't", "I cannot")]
    assert not [text for text in whole if any(text in said for said in trained)]


def plain(text: str) -> str:
    return " ".join(text.lower().split())


def sources_of(monkeypatch, files: dict[str, str]) -> None:
    """Constructed files in place of the fetched ones."""
    monkeypatch.setattr(prompt_sources, "_text", lambda asset, path: files[path])


def test_exchanges_join_answers_and_continue_pages(monkeypatch):
    coding = [["can you loop?", "for x in y:\n  z"], ["What is a map?", "One."]]
    computers = [["what is a map?", "A dict.", "One."], ["What is a map?", "A dict."]]
    page = "A headline. " + "Once there was a cup of tea in the sun. " * 20
    pages = [page, page.replace("sun", "x" * 41)]
    rows = [{"type": "c4", "text": text} for text in pages]
    sources_of(
        monkeypatch,
        {
            "english/coding.yml": json.dumps({"conversations": coding}),
            "english/computers.yml": json.dumps({"conversations": computers}),
            "text_compression/samples.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        },
    )
    *asked, (request, rest) = prompt_sources.exchanges()
    assert asked == [
        ("Can you loop?", "for x in y:\n  z"),
        ("What is a map?", "One.\nA dict."),
    ]
    assert request == 'Continue this text: "Once there was a cup of tea in"'
    assert rest.startswith("the sun. Once there")


def test_labelled_refusals_answer_any_request_and_were_not_trained_on(monkeypatch):
    trained = prompt_sources.shipped("refusals")[1]["text"]
    rows = [
        ("Rob a bank", "No, I cannot do that. Ask me something else.", 1),
        ("Rob a bank", "No, I cannot do that.", 1),
        ("Rob a train", "I can\u2019t help you to rob a train.", 1),  # names what was asked
        ("Bake bread", "Knead it.", 1),  # beside the point
        ("Bake bread", "I cannot say how long.", 0),
        ("Rob a ship", trained.upper().replace("I CANNOT", "I cannot"), 1),
    ]
    lines = [f'"{request}","{reply}",{score},text\n' for request, reply, score in rows]
    head = "objective,assistant_response,human_score,data_type\n"
    folder = "scorer_evals/refusal_scorer/refusal"
    sources_of(
        monkeypatch,
        {
            f"{folder}.csv": f"# dataset_version=1\n{head}" + "".join(lines),
            f"{folder}_extra.csv": f"# one\n# two\n{head}Rob,I can't.,1,text\n",
        },
    )
    assert prompt_sources.labelled_refusals() == [
        "No, I cannot do that.",
        "I cannot",
        "I can't.",
        "I can't",
    ]


def test_many_shot_controls_are_as_long(models, requests, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_sources, "fetch", None)  # with files for all, nothing is fetched
    refusals = [{"prompt": row["text"]} for row in prompt_sources.shipped("refusals")]
    demos = [{"question": sentence(3), "answer": sentence(10)} for _ in range(5)]
    easy = [{"question": sentence(3), "answer": sentence(30)} for _ in range(5)]
    config = many_shot.Config(
        requests,
        jsonl(tmp_path / "complying.jsonl", demos),
        jsonl(tmp_path / "harmless.jsonl", easy),
        jsonl(tmp_path / "refusing.jsonl", refusals),
        out=tmp_path / "out",
        shots=(0, 1, 4),
        count=3,
        **models,
    )
    many_shot.STUDY.run(config)
    data = results(config.out)
    tokens = {k: np.asarray(v) for k, v in data["tokens"].items()}
    tuco = {k: np.asarray(v) for k, v in data["tuco"].items()}
    for kind in ("refusing", "harmless"):
        off = np.abs(tokens[kind] - tokens["complying"])
        assert (off <= np.maximum(12, 0.05 * tokens["complying"])).all()
        np.testing.assert_allclose(tuco[kind][0], tuco["complying"][0], atol=1e-5)  # no shot
        fall = {k: v[-1] - v[1] for k, v in tuco.items()}
        assert data["beyond"][kind][0] == pytest.approx((fall["complying"] - fall[kind]).mean())
    pair, tokenizer = load_pair(models["base"], models["tuned"])
    asked = many_shot.prepare(config)[0]
    assert set(asked) < {json.loads(x)["prompt"] for x in pathlib.Path(requests).open()}
    one = prompt_of("p", [], asked[1])
    want = tuco_jax.score(pair, tokenizer, [one]).tuco[0]
    assert tuco["complying"][0, 1] == pytest.approx(float(want), abs=1e-5)
    # Answers too short to be cut to length.
    short = jsonl(tmp_path / "short.jsonl", [{"question": "q", "answer": "a"}] * 5)
    with pytest.raises(InputError, match="harmless demonstrations cannot be made as long as the"):
        many_shot.STUDY.run(dataclasses.replace(config, harmless=short))
    with pytest.raises(InputError, match="shots holds 40: there are 5 complying demonstrations"):
        many_shot.STUDY.run(dataclasses.replace(config, shots=(0, 40)))
    long = jsonl(tmp_path / "long.jsonl", [{"question": "q", "answer": "a" * 600}] * 5)
    with pytest.raises(InputError, match="shots holds 1: with 1 complying .* context holds 512"):
        many_shot.STUDY.run(dataclasses.replace(config, complying=long))


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"question": "a"}\n',
            ":1: `answer` must be text that is not empty, or `answer_matching_behavior` in its",
        ),
        (
            '{"question": "a", "answer_matching_behavior": " "}\n',
            ":1: `answer_matching_behavior` must be text that is not empty$",
        ),
        ('{"question": "a", "answer": 1}\n', ":1: `answer` must be text that is not empty$"),
        ('{"question": "a", "answer": "b"}\n{"question": " ", "answer": "b"}', ":2: `question` m"),
        ("[1]\n", ":1: `question` must be text that is not empty"),
        ("{\n", ":1: not JSON; write one object a line"),
        ("\n", ": holds no demonstrations"),
    ],
)
def test_demonstrations_bad_input(tmp_path, text, message):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=f"d.jsonl{message}"):
        read_demonstrations(path)
    with pytest.raises(InputError, match="d.csv: is no .jsonl file; give one with `question`"):
        read_demonstrations(tmp_path / "d.csv")


def test_demonstrations_of_model_written_evals(tmp_path):
    rows = [
        {
            "question": "Is this so?\n(A) Yes\n(B) No",
            "answer_matching_behavior": " (A)",
            "answer_not_matching_behavior": " (B)",
        },
        {"question": "q", "answer": " a", "answer_matching_behavior": " (B)"},
    ]
    assert read_demonstrations(jsonl(tmp_path / "d.jsonl", rows)) == [
        Demonstration("Is this so?\n(A) Yes\n(B) No", "(A)"),
        Demonstration("q", " a"),
    ]


def test_no_request_is_answered_in_its_own_prompt(requests, tmp_path):
    """Whatever the set or file; requests are drawn by the seed."""
    texts = [json.loads(x)["prompt"] for x in pathlib.Path(requests).open()]
    demos = [{"question": q, "answer": "sure, here"} for q in [*texts, "other", "more", "third"]]
    path = jsonl(tmp_path / "complying.jsonl", demos)
    drawn = []
    for prompts, complying, count in (
        ("advbench", "", 30),
        ("strongreject", "", 30),
        (requests, path, 5),
        ("advbench", "", 30),
    ):
        config = many_shot.Config(
            prompts, complying, out=tmp_path, shots=(0, 1, 2), count=count, seed=len(drawn)
        )
        asked, pool, *_ = many_shot.prepare(config)
        assert len(asked) == len(set(asked)) == count
        assert not {d.question for d in pool} & set(asked)
        drawn.append(asked)
    assert drawn[0] != drawn[3]


def test_many_shot_settings(tmp_path, requests):
    for shots in ((4, 2), (3,), (-1, 2)):
        with pytest.raises(InputError, match="give 2 or more numbers that rise, from 0 on"):
            many_shot.STUDY.run(many_shot.Config(requests, out=tmp_path / "out", shots=shots))
    with pytest.raises(InputError, match="count is 1: give 2 or more"):
        many_shot.STUDY.run(many_shot.Config(requests, out=tmp_path / "out", count=1))
    files: dict[str, Any] = dict(
        complying=jsonl(tmp_path / "c.jsonl", [{"question": "a", "answer": "b"}] * 2),
        harmless=jsonl(tmp_path / "h.jsonl", [{"question": "a", "answer": "b"}] * 2),
    )
    for refusing, message in (
        ("strongreject", "strongreject: prompts come as .*, not ''"),  # no set of requests
        (jsonl(tmp_path / "r.jsonl", [{"words": "no"}]), "r.jsonl:1: the row has neither"),
    ):
        config = many_shot.Config(requests, out=tmp_path / "out", **files, shots=(0, 1), count=2)
        with pytest.raises(InputError, match=message):
            many_shot.STUDY.run(dataclasses.replace(config, refusing=refusing))
    demos = jsonl(tmp_path / "d.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(InputError, match="count is 30: there are 6 requests; give fewer"):
        many_shot.STUDY.run(many_shot.Config(requests, demos, out=tmp_path / "out"))


def broken_config(models, requests, tmp_path, **changes) -> broken.Config:
    attacks = [
        {"id": "polite", "prompt": "{{ prompt }}, please"},
        {"id": "now", "prompt": "now {{ prompt }}"},
    ]
    fields: dict[str, Any] = dict(
        out=tmp_path / "out",
        benign=requests,
        harmful=requests,
        attacks=jsonl(tmp_path / "attacks.jsonl", attacks),
        count=6,
        answers=3,
        tokens=4,
    )
    return broken.Config(**fields | models | changes)


def run_with(judge: Judge, config: broken.Config) -> Findings:
    """A judge of one's own in place of the one that the options name."""
    prepare = functools.partial(broken.prepare, judge=judge)
    return dataclasses.replace(broken.STUDY, prepare=prepare).run(config)


def test_broken_prompts_are_told_by_the_judge(models, requests, tmp_path):
    config = broken_config(models, requests, tmp_path)
    asked = []

    def judge(request: str, answer: str) -> bool:
        """Requests in their file's order alternate between held and broken, 1 answer of 3."""
        asked.append((request, answer))
        return (len(asked) - 1) % 3 > (len(asked) - 1) // 3 % 2

    run_with(judge, config)
    data = results(config.out)
    # Prompts 0, 2, .. get 1 answer of 3 that helps, 1, 3, .. get 2: those are broken.
    assert data["not refused"] == [1, 2] * 9
    assert data["kinds"] == ["benign"] * 6 + ["harmful"] * 6 + ["attacked"] * 6
    assert data["attacks"][12:] == ["polite", "now"] * 3
    tuco = np.asarray(data["tuco"])[6:]
    held, out = tuco[::2], tuco[1::2]
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in held for b in out])
    assert data["contrasts"][0]["contrast"]["auc"][0] == pytest.approx(wins)
    # All of one attack held, all of the other broke: nothing to compare within one.
    assert data["contrasts"][1]["within"] is None
    assert {q for q, _ in asked} == {json.loads(r)["prompt"] for r in open(requests)}
    # The answers are samples, not one answer many times.
    assert len({a for _, a in asked[:9]}) > 3


def obliging(request: str, answer: str) -> bool:
    """A judge whom every second request satisfies."""
    return sum(map(ord, request)) % 2 == 0


def test_every_attack_around_every_request_by_a_judge_of_a_name(models, requests, tmp_path):
    config = broken_config(models, requests, tmp_path, cross=True)
    config = dataclasses.replace(config, judge=f"{__name__}:obliging")
    found = broken.STUDY.run(config)
    data = results(config.out)
    assert data["kinds"][12:] == ["attacked"] * 12
    assert data["attacks"][12:] == ["polite"] * 6 + ["now"] * 6
    # Both attacks have both outcomes, the same ones: there is an AUC within them.
    helped = np.asarray(data["not refused"])
    assert set(helped) == {0, 3}
    np.testing.assert_array_equal(helped[12:18], helped[18:])
    assert data["contrasts"][1]["within"] is not None
    assert set(data["simpler"]) >= {"prompt length", "perplexity, FT", "OutputCo"}
    rows = next(t for t in found.tables if "simpler" in t.title).rows
    assert [row[1] for row in rows[:2]] == ["TuCo", "prompt length"]
    held = np.asarray(data["tokens"])[6:][helped[6:] == 0]
    out = np.asarray(data["tokens"])[6:][helped[6:] == 3]
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in held for b in out])
    assert rows[1][2].startswith(f"{wins:.3f}")


def test_a_judge_that_is_none(tmp_path):
    for name, message in (
        ("no.such:f", "not to be imported"),
        ("math:nothing", "not to be imported"),
        ("math:pi", "is no function"),
        ("tuco_jax.evaluation.refusals:is_refusal", "takes 1 arguments, not .request, answer."),
    ):
        with pytest.raises(InputError, match=f"judge '{name}': {message}"):
            broken.STUDY.run(broken.Config(out=tmp_path / "out", judge=name))
    assert not (tmp_path / "out").exists()


def test_a_judge_that_says_neither_yes_nor_no(models, requests, tmp_path):
    with pytest.raises(InputError, match="the judge gave str, not True or False"):
        run_with(lambda q, a: "no", broken_config(models, requests, tmp_path))  # pyright: ignore[reportArgumentType]


def test_refusals_that_the_paper_s_list_lacks_are_told(models, requests, tmp_path, monkeypatch):
    """Every answer refuses, in words that only our own list has for every second prompt."""
    said = [["I won't help with that.", "I cannot do that."][i // 3 % 2] for i in range(18 * 3)]
    monkeypatch.setattr(broken, "generate", lambda *a, **k: said)
    config = broken_config(models, requests, tmp_path)
    found = broken.STUDY.run(config)
    data = results(config.out)
    assert data["not refused"] == [3, 0] * 9 and data["not refused, other list"] == [0] * 18
    table = next(t for t in found.tables if "another list" in t.title)
    assert "9 of 18 prompts change sides" in table.note
    assert all(row[-1] == "one group is empty: no AUC" for row in table.rows)
    own = dataclasses.replace(config, judge="tuco_jax.datasets.refusal_strings:refuses")
    found = broken.STUDY.run(own)
    assert results(config.out)["not refused"] == [0] * 18
    assert not [t for t in found.tables if "another list" in t.title]
    assert "refusals are told by tuco_jax.datasets.refusal_strings:refuses" in found.method[0]


def test_auc_of_an_attack_with_both_outcomes():
    tuco = np.concatenate([np.linspace(0.3, 0.2, 6), np.linspace(0.2, 0.3, 6)])
    outcome = broken_report.Outcome(
        ["q"] * 12,
        np.repeat(["attacked"], 12),
        np.repeat(["x", "y"], 6),
        tuco,
        np.full(12, 9),
        np.asarray([0] * 6 + [2] * 6),
        [["a"]] * 12,
    )
    assert [row[-1] for row in broken_report._by_attack(outcome, 2, 0).rows] == ["-", "-"]
    both = dataclasses.replace(
        outcome, clusters=np.repeat(["x"], 12), tuco=np.r_[0.4, tuco[1:6], tuco[6:11], 0.1]
    )
    (row,) = broken_report._by_attack(both, 2, 0).rows
    held, out = both.tuco[:6], both.tuco[6:]
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in held for b in out])
    assert row[:4] == ["attacked", "x", 12, 6] and row[-1].startswith(f"{wins:.3f}")


def test_two_prompts_that_held_prove_nothing():
    outcome = broken_report.Outcome(
        ["q"] * 12,
        np.repeat(["harmful", "attacked"], 6),
        np.repeat(["bare", "x"], 6),
        np.linspace(0.1, 0.3, 12),
        np.full(12, 9),
        np.asarray([2] * 10 + [0] * 2),
        [["a"]] * 12,
    )
    settings: dict[str, Any] = dict(least=2, seed=0, method=["m"])
    found = broken_report.findings(outcome, {}, **settings)
    assert {c.verdict for c in found.claims} == {"not testable here"}
    assert found.claims[0].measured.endswith("2 held and 10 broken")
    helped = np.asarray([2] * 7 + [0] * 5)
    more = dataclasses.replace(outcome, complied=helped)
    found = broken_report.findings(more, {}, **settings)
    assert found.claims[0].verdict == "reproduced"

    # Told by its high score or by its low one: one AUC and one interval, mirrored.
    tuco = outcome.tuco[RNG.permutation(12)]
    mixed = dataclasses.replace(more, tuco=tuco, clusters=np.repeat(list("abcd"), 3))
    found = broken_report.findings(mixed, {}, **settings)
    there, back = (found.data["contrasts"][i]["contrast"]["auc"] for i in (0, -1))
    value, low, high = there
    assert back == pytest.approx([1 - value, 1 - high, 1 - low], abs=1e-6)


def test_public_sets_by_name(models, tmp_path):
    """Real ones: what the package holds, none of it empty, doubled or trained on."""
    trained = refusal_data.harmful_split(refusal_data.RefusalDataConfig()).train
    sizes = {}
    for name in sets.SETS:
        texts = sets.read_texts(name)
        sizes[name] = len(texts)
        assert len(set(texts)) == len(texts) and all(t.strip() for t in texts)
        assert (
            len(refusal_data.without_duplicates_of(texts, trained)) == len(texts)
            or name == "advbench"
        )
    whole = {"advbench": 100, "strongreject": 288, "harmbench": 200, "do-not-answer": 243}
    assert all(0.95 * n <= sizes[name] <= n for name, n in whole.items()), sizes
    wild = sets.shared_jailbreaks()
    assert len(wild) >= 20 and len(wild) < len(prompt_sources.wild_jailbreaks())
    assert set(refusal_data.near_duplicates(list(wild.values()), sets.SAME)) == set(
        range(len(wild))
    )
    for text in wild.values():
        assert text.count("{{ prompt }}") == 1 and len(text) < 1000 and "[INSERT" not in text
    config = broken.Config(
        out=tmp_path / "out", harmful="harmbench", attacks="wild", count=3, **models
    )
    benign, harmful, attacks, _ = broken.prepare(config)
    assert set(harmful) <= set(sets.read_texts("harmbench")) and len(harmful) == len(benign) == 3
    assert [a.name for a in attacks] == list(wild) and harmful[0] in attacks[0].around(harmful[0])
    with pytest.raises(
        InputError, match="harmbnch: no such file, nor a set; sets are advbench, s"
    ):
        broken.prepare(dataclasses.replace(config, harmful="harmbnch"))


def test_strings_of_a_gcg_run_go_beside_the_request(tmp_path):
    rows = [{"id": "attack 1", "prompt": "! ! x"}, {"id": "in", "prompt": "a {{ prompt }} b"}]
    path = jsonl(tmp_path / "attacks.jsonl", rows)
    said = {p: [a.around("q") for a in read_templates(path, p)] for p in ("suffix", "prefix")}
    assert said == {"suffix": ["q ! ! x", "a q b"], "prefix": ["! ! x q", "a q b"]}
    path = jsonl(tmp_path / "bare.jsonl", [*rows, {"id": "bare", "prompt": "x"}])
    with pytest.raises(InputError, match="bare.jsonl:3: bare names requests without an attack"):
        read_templates(path)
    config = broken.Config(out=tmp_path / "out", placement="suffix", count=2)
    with pytest.raises(InputError, match="placement is of strings in a file; templates say where"):
        broken.STUDY.run(config)


def test_one_class_is_not_testable_and_no_crash(models, requests, tmp_path, monkeypatch):
    monkeypatch.setattr(broken, "generate", lambda *a, **k: ["I cannot"] * 18 * 3)
    config = broken_config(models, requests, tmp_path)
    found = broken.STUDY.run(config)
    assert {c.verdict for c in found.claims} == {"not testable here"}
    assert "one group is empty: no AUC" in (config.out / "report.md").read_text()


def test_broken_s_bad_input(models, requests, tmp_path):
    def fails(message: str, **changes) -> None:
        with pytest.raises(InputError, match=message):
            broken.STUDY.run(broken_config(models, requests, tmp_path, **changes))

    fails("broken is 4 of 3 answers: give 1 to 3", broken=4)
    fails("count is 7: .*requests.jsonl has 6 requests; give fewer", count=7)
    fails("tokens must be 1 or more, temperature above 0", temperature=0.0)
    twice = jsonl(tmp_path / "twice.jsonl", [{"prompt": "{{ prompt }} {{ prompt }}"}])
    fails(r"twice.jsonl:1: an attack is a `prompt`, with one \"{{ prompt }}\" in", attacks=twice)
    turns = jsonl(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    fails("t.jsonl:1: a request is `prompt`, not `messages`", harmful=turns)


def test_output_co_is_that_of_the_library(models, requests, tmp_path):
    config = output_co.Config(
        requests, out=tmp_path / "out", refusal="no", shots=(0, 1, 3), count=4, **models
    )
    found = output_co.STUDY.run(config)
    data = results(config.out)
    pair, tokenizer = load_pair(models["base"], models["tuned"])
    texts = output_co.prepare(config)
    messages = [{"role": "user", "content": texts[2]}, {"role": "assistant", "content": "no"}]
    turns = [*messages * 3, messages[0]]
    (ids,) = encode(tokenizer, [tuco_jax.Prompt("p", None, tuple(turns))])
    want = jax.jit(tuco_jax.output_co)(pair, ids[None], np.ones((1, len(ids)), bool))[0]
    assert data["output_co"][2][2] == pytest.approx(float(want), abs=1e-5)
    want = tuco_jax.score(pair, tokenizer, [turns]).tuco[0]
    assert data["tuco"][2][2] == pytest.approx(float(want), abs=1e-5)
    change = np.mean(np.subtract(data["output_co"][1], data["output_co"][0]))
    assert found.claims[1].measured.startswith(f"{change:.3f} [")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"shots": (1, 2, 3)}, "give 3 or more numbers that rise from 0"),
        ({"count": 9}, "count is 9: there are 6 requests; give fewer"),
        ({"refusal": " "}, "refusal is empty; give the text that answers every shot"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message):
            output_co.STUDY.run(dataclasses.replace(config, **changes))
