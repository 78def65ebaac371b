import json

import pytest

from tests.tuco.datasets.test_refusal_data import CORPUS
from tuco_jax.datasets import chat_data, prompt_sources
from tuco_jax.datasets.chat_data import ChatDataConfig, small_talk, whole_sentences
from tuco_jax.finetune.conversations import read_conversations
from tuco_jax.prompts.read import read_prompts

TALK = {
    "greetings": [["hello", "Hi!"], ["Hello!", "hey"], ["hello", "Good day."], ["hello"]],
    "ai": [
        ["Can you eat?", "I can't, sorry."],
        ["Can you fly", "I am not able to."],
        ["What is AI?", "a field of science"],
        ["What is AI?", "a field of science"],
        ["Tell me all", "word " * 70],
        ["How are you?", "Well.", "Me too.", "Good.", "Yes."],
        ["Say nothing", ""],
    ],
}


@pytest.fixture
def talk(monkeypatch):
    """Constructed texts in place of the fetched ones."""
    monkeypatch.setattr(prompt_sources, "conversations", lambda: TALK)
    monkeypatch.setattr(prompt_sources, "advbench", lambda: CORPUS)
    monkeypatch.setattr(prompt_sources, "strongreject", lambda: ["Where do thieves fence ore?"])
    monkeypatch.setattr(prompt_sources, "trivia", lambda: ["Who wrote Faust?", "What is amber?"])


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("It rains. It pours. The old", "It rains. It pours."),
        ('She said "Stop!" and then', 'She said "Stop!"'),
        ("Here are two:\n\n1. Milk\n2. But", ""),
        ("Mix well.\n\n1. Milk\n2. But", "Mix well."),
        ("It is 3.5 inches long and", ""),
        ("All of it is whole.", "All of it is whole."),
        ("(It is so.) But", "(It is so.)"),
        ("", ""),
    ],
)
def test_text_ends_with_its_last_whole_sentence(text, whole):
    assert whole_sentences(text) == whole


def test_small_talk_refuses_nothing_and_repeats_nothing(talk):
    said = [[m["content"] for m in row["messages"]] for row in small_talk()]
    assert said == [
        ["Hello", "Hi!"],
        ["Hello!", "Hey"],
        ["What is AI?", "A field of science"],
        ["How are you?", "Well.", "Me too.", "Good."],
    ]
    assert [m["role"] for m in small_talk()[-1]["messages"]] == ["user", "assistant"] * 2


def test_chatterbot_topics_are_read_as_dialogues_or_first_answers(monkeypatch):
    text = "conversations:\n- - 7\n  - 'It  is\n    so.'\n  - Or so.\n"
    monkeypatch.setattr(prompt_sources, "_text", lambda asset, path: text)
    topics = prompt_sources.conversations()
    assert topics["ai"] == [["7", "It is so."]]
    assert topics["conversations"] == [["7", "It is so.", "Or so."]]
    # What the refusal rates are measured on is none of them.
    assert not {"trivia", "coding", "computers"} & topics.keys()


def test_files_are_as_finetune_reads_them(tmp_path, talk):
    config = ChatDataConfig(out=tmp_path / "data", harmful=24, evaluation=10)
    chat_data.run(config)
    rows = [json.loads(line) for line in (config.out / "train.jsonl").open()]
    labels = [row["label"] for row in rows]
    assert labels.count("talk") == len(small_talk())
    assert labels.count("harmful") == 24 + len(prompt_sources.shipped("harmful"))
    answers = {row["id"]: row for row in prompt_sources.shipped("answers")}
    assert labels.count("harmless") == len(answers)
    assert len(read_conversations(config.out / "train.jsonl")) == len(rows)
    for row in (row for row in rows if row["label"] == "harmless"):
        answer, old = row["messages"][1]["content"], answers[row["id"]]
        assert old["answer"].startswith(answer) and answer
        if not row["truncated"] and old["truncated"]:
            assert answer.rstrip("\"')")[-1] in ".!?"
    ended = [not row["truncated"] for row in rows if row["label"] == "harmless"]
    assert sum(ended) > 0.8 * len(ended)
    trained = {row["messages"][0]["content"] for row in rows}
    for name in ("advbench", "strongreject", "harmless", "trivia", "sounds_harmful", "watch"):
        prompts = read_prompts(config.out / f"{name}.jsonl")
        assert not trained & {p.messages[0]["content"] for p in prompts if p.messages}
