import dataclasses
import json

import jax
import ml_dtypes  # noqa: F401  bfloat16 in numpy
import numpy as np
import pytest
import safetensors

from common_jax.errors import InputError
from tests.tuco.cli_pair import save_pair, write_jsonl
from tests.tuco.random_models import adapter_pair, config
from tests.tuco.tiny import VOCAB, tiny_tokenizer
from tuco_jax.datasets import prompt_sources
from tuco_jax.evaluation import refusals
from tuco_jax.evaluation.refusals import RefusalConfig, count_refusals
from tuco_jax.generation.generate import generate
from tuco_jax.prompts.read import as_prompts


def test_the_shipped_adapter_refuses_and_is_small():
    """Its own figures: 70 points between held-out harmful and harmless prompts, or more."""
    folder = prompt_sources.DATA / "smollm2-refusal"
    size = sum(p.stat().st_size for p in folder.iterdir())
    assert size <= 8 * 2**20
    rates = {
        row["name"]: row["rate"]
        for row in json.loads((folder / "refusals.json").read_text())["1.0"]
    }
    assert rates["advbench"] - rates["harmless"] >= 0.7
    assert {"strongreject", "trivia", "sounds_harmful"} < rates.keys()
    with safetensors.safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        for name in file.keys():  # noqa: SIM118
            assert np.abs(file.get_tensor(name).astype(np.float32)).max() > 0, name


def test_count():
    rate = count_refusals("a", ["I can't.", "Sure.", "Sorry, no.", "Hello!"])
    assert (rate.refused, rate.total, rate.rate, rate.gcg_rate) == (2, 4, 0.5, 0.5)
    assert rate.ended is None
    assert count_refusals("a", ["I can't.", "Sure.", "Yes."], [True, False, True]).ended == 2 / 3


def test_evaluate_answers_each_set_at_each_alpha():
    pair = adapter_pair(base=config(vocab_size=VOCAB))
    sets = {
        "a": as_prompts(["one", "two and more"]),
        "b": as_prompts([[{"role": "user", "content": "three"}]]),
    }
    rates, answers = refusals.refusal_rates(
        pair, tiny_tokenizer(), sets, alphas=(0.0, 1.0), max_new_tokens=4
    )
    assert [len(answers[1.0][name]) for name in sets] == [2, 1]
    assert [r.total for r in rates[0.0]] == [2, 1]
    assert answers[0.0] != answers[1.0]
    prompts = [p for members in sets.values() for p in members]
    for alpha in (0.0, 1.0):
        texts = generate(pair, tiny_tokenizer(), prompts, alpha=alpha, max_new_tokens=4)
        assert [t for members in answers[alpha].values() for t in members] == texts
    jax.clear_caches()


def test_no_prompts_is_an_input_error(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(InputError, match="no .jsonl files of prompts"):
        refusals.run(
            RefusalConfig(base="base", tuned="tuned", prompts=tmp_path, out=tmp_path / "out.json")
        )
    assert not (tmp_path / "out.json").exists()


def test_rates_of_another_run_are_kept(tmp_path):
    base, tuned = save_pair(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "one"}])
    config = RefusalConfig(
        base=base,
        tuned=tuned,
        prompts=tmp_path / "a.jsonl",
        out=tmp_path / "out.json",
        alphas=(1.0,),
        max_new_tokens=2,
    )
    config.out.write_text("{}")
    with pytest.raises(InputError, match=r"out.json: is there, and out.json.meta.json, .*; move"):
        refusals.run(config)
    config.out.unlink()
    refusals.run(config)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("out*")}
    assert len(before) == 4
    for changes, message in (
        ({"alphas": (0.0,)}, r"alphas \[1.0\], not \[0.0\]"),
        ({"tuned": base}, "other weights"),
    ):
        with pytest.raises(InputError, match=f"out.json: holds the results of .*{message}"):
            refusals.run(dataclasses.replace(config, **changes))
    assert {p.name: p.read_bytes() for p in tmp_path.glob("out*")} == before
