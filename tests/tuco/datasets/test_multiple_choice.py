"""Reading of questions, their prompts and option tokens, and scores with a shared prefix."""

import csv
import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from common_jax.errors import InputError
from tuco_jax.datasets.multiple_choice import (
    Question,
    Task,
    read_behaviours,
    read_social_iqa,
    read_tasks,
    select_tasks,
)
from tuco_jax.evaluation.option_scores import (
    behaviour_prompts,
)

ROWS = [
    ["Which is a fruit, an\napple?", "apple", "iron, cast", "oak", "sand", "A"],
    ["Two and two?", "1", "2", "3", "4", "D"],
]


def write_csv(folder, part, name, rows):
    (folder / part).mkdir(parents=True, exist_ok=True)
    with (folder / part / f"{name}_{part}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def plain(tasks):
    """Without places."""
    strip = lambda qs: [(q.text, q.choices, q.answer) for q in qs]  # noqa: E731
    return [(t.name, strip(t.examples), strip(t.questions)) for t in tasks]


def test_three_layouts_read_alike(tmp_path):
    write_csv(tmp_path / "csv", "dev", "virology", ROWS[1:])
    write_csv(tmp_path / "csv", "test", "virology", ROWS)
    hub = tmp_path / "hub" / "virology"
    hub.mkdir(parents=True)
    for part, rows in (("dev", ROWS[1:]), ("test", ROWS)):
        columns = {
            "question": [r[0] for r in rows],
            "subject": ["virology"] * len(rows),
            "choices": [r[1:5] for r in rows],
            "answer": ["ABCD".index(r[5]) for r in rows],
        }
        path = hub / f"{part}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    (tmp_path / "both").mkdir()
    for name in ("all", "virology"):
        shutil.copytree(hub, tmp_path / "both" / name)
    shutil.copytree(hub, tmp_path / "whole" / "all")
    lines = [
        dict(task="virology", split=part, question=r[0], choices=r[1:5], answer=r[5])
        for part, rows in (("dev", ROWS[1:]), ("test", ROWS))
        for r in rows
    ]
    file = write_jsonl(tmp_path / "plain.jsonl", lines)
    folders = [tmp_path / name for name in ("csv", "hub", "both", "whole")]
    found = [plain(read_tasks(p)) for p in (*folders, file)]
    question = (ROWS[0][0], tuple(ROWS[0][1:5]), 0)
    other = (ROWS[1][0], tuple(ROWS[1][1:5]), 3)
    assert found[0] == [("virology", [other], [question, other])]
    assert found == [found[0]] * 5


def test_social_iqa(tmp_path):
    text = "Kim ran. Why: it rained? A: to win; B: for fun; C: to be home."
    row = {"input": [{"role": "user", "content": text}], "ideal": "C"}
    task = read_social_iqa(write_jsonl(tmp_path / "s.jsonl", [row, row, row]), 1)
    assert len(task.examples) == 1
    assert len(task.questions) == 2
    assert task.questions[0].text == "Kim ran. Why: it rained?"
    assert task.questions[0].choices == ("to win", "for fun", "to be home")
    assert task.questions[0].answer == 2


BEHAVIOUR = dict(
    question="Is this something you would say?",
    statement="I like rain",
    label_confidence=0.9,
    answer_matching_behavior=" No",
    answer_not_matching_behavior=" Yes",
)


def test_behaviours(tmp_path):
    write_jsonl(tmp_path / "agreeableness.jsonl", [BEHAVIOUR])
    (task,) = read_behaviours(tmp_path)
    assert task.name == "agreeableness"
    assert task.questions[0].answer == 1
    lettered = {
        "question": "Which?\n\nChoices:\n (A) this\n (B) that",
        "answer_matching_behavior": " (B)",
        "answer_not_matching_behavior": " (A)",
    }
    (task,) = read_behaviours(write_jsonl(tmp_path / "survival.jsonl", [lettered]))
    assert task.questions[0].answer == 1
    assert behaviour_prompts(task)[1] == [" (A)", " (B)"]
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [BEHAVIOUR, lettered])
    with pytest.raises(InputError, match=r"mixed.jsonl:2: answers \(A\) or \(B\) where the first"):
        read_behaviours(mixed)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0][:5]], r"a_test.csv:2: 5 columns; MMLU has question, A, B, C, D, answer"),
        ([[*ROWS[1][:5], "E"]], r"a_test.csv:1: the answer 'E' is none of the options; give a "),
        ([[" ", *ROWS[1][1:]]], r"a_test.csv:1: the question is no text, or empty"),
        ([], r"a_test.csv: is empty; give it rows or remove it"),
    ],
)
def test_bad_csv(tmp_path, rows, message):
    write_csv(tmp_path, "test", "a", rows)
    with pytest.raises(InputError, match=message):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": None}, r"q.jsonl:1: no `choices` \(fields: question"),
        ({"choices": ["a", " "]}, "q.jsonl:1: option 2 is empty; give it a text"),
        ({"choices": [None, "a"]}, "q.jsonl:1: option 1 is empty; give it a text"),
        ({"choices": ["a"]}, "`choices` must be a list of 2 to 10 options"),
        ({"answer": 2}, "the answer 2 is none of the options; give a letter of AB"),
        ({"split": "training"}, "`split` is 'training'; splits are dev, val, test"),
        ({"split": "val"}, "holds no questions of the split 'test'"),
    ],
)
def test_bad_jsonl(tmp_path, change, message):
    row = dict(question="q", choices=["a", "b"], answer=0) | change
    file = write_jsonl(tmp_path / "q.jsonl", [row])
    with pytest.raises(InputError, match=message):
        read_tasks(file)


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="does not exist; give MMLU's folder"):
        read_tasks(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no .csv files in dev, val or test"):
        read_tasks(tmp_path)
    (tmp_path / "q.jsonl").write_text("")
    with pytest.raises(InputError, match="q.jsonl: is empty"):
        read_tasks(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text("{")
    with pytest.raises(InputError, match="q.jsonl:1: not JSON"):
        read_tasks(tmp_path / "q.jsonl")
    rows = [dict(question="q", choices=["a", "b", "c"][:n], answer=0) for n in (2, 3)]
    with pytest.raises(InputError, match="q.jsonl:2: 3 options where .*q.jsonl:1 has 2"):
        read_tasks(write_jsonl(tmp_path / "q.jsonl", rows))
    with pytest.raises(InputError, match="no .jsonl of Model-Written-Evals there"):
        read_behaviours(tmp_path / "nowhere")
    bad = BEHAVIOUR | {"answer_matching_behavior": " Maybe"}
    with pytest.raises(InputError, match="b.jsonl:1: the answers are ' Maybe' and ' Yes'"):
        read_behaviours(write_jsonl(tmp_path / "b.jsonl", [bad]))
    with pytest.raises(InputError, match="b.jsonl:1: no `answer_matching_behavior`"):
        read_behaviours(write_jsonl(tmp_path / "b.jsonl", [{"question": "q"}]))
    with pytest.raises(InputError, match="b.jsonl:1: `input` must be a list of turns"):
        read_social_iqa(write_jsonl(tmp_path / "b.jsonl", [{"input": "Why?", "ideal": "A"}]), 0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test-0.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"test-0.parquet: not a readable Parquet file"):
        read_tasks(tmp_path / "data")
    bare = {"input": [{"role": "user", "content": "Why?"}], "ideal": "A"}
    with pytest.raises(InputError, match="b.jsonl:1: no options 'A: ...; B: ...; C: ...'"):
        read_social_iqa(write_jsonl(tmp_path / "b.jsonl", [bare]), 0)


def task(count=3):
    questions = [Question(f"q{i}", ("x", "y"), i % 2, f"f:{i}") for i in range(count)]
    return Task("world_religions", (Question("e", ("u", "v"), 1, "f:9"),), tuple(questions))


def test_unknown_task():
    with pytest.raises(InputError, match="task 'alchemy' is not in the data; there are world_rel"):
        select_tasks([task()], ["alchemy"])
    assert select_tasks([task()], []) == [task()]
