"""Texts of public packages, from constructed files in their place."""

import json

from tuco_jax.datasets import prompt_sources


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
