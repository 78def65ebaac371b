"""Folders of several adapters, and what a configuration says of its modules."""

import math
from typing import Any

import numpy as np
import peft
import pytest

from common_jax.errors import InputError
from tests.tuco.tiny import tiny_hf, tiny_tokenizer
from tests.tuco.weights.peft import test_read as shared
from tuco_jax.scoring.options import ScoreFileOptions
from tuco_jax.scoring.score_file import score_file
from tuco_jax.weights.load import load_pair
from tuco_jax.weights.peft.config import AdapterConfig, adapters, is_adapter


def config(**fields):
    return AdapterConfig({"peft_type": "LORA", "r": 4, "lora_alpha": 6} | fields, "a.json")


def test_ranks_and_scales():
    plain = config(rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*v_proj": 9})
    assert plain.rank("model.layers.0.self_attn.q_proj") == 2
    assert plain.rank("model.layers.0.self_attn.k_proj") == 4
    assert plain.scale("model.layers.1.self_attn.v_proj", 4) == 9 / 4
    assert config(use_rslora=True).scale("x", 4) == 6 / math.sqrt(4)
    ada = AdapterConfig({"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 6}, "a.json")
    assert ada.scale("x", 1) == 6 / (4 + 1e-5) and ada.rank("x") is None
    loha = AdapterConfig({"peft_type": "LOHA", "r": 4, "alpha": 6}, "a.json")
    assert loha.scale("x", 999) == 6 / 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "VERA"}, "adapters of type VERA are not supported, only LORA, ADALORA"),
        ({"peft_type": None}, "adapters of type None are not supported"),
        (
            {"peft_type": "PROMPT_TUNING"},
            "an adapter of type PROMPT_TUNING adds virtual tokens and",
        ),
        (
            {"peft_type": "P_TUNING"},
            ".* changes no weight of the base, .*; give a tuning that cha",
        ),
        ({"peft_type": "XLORA"}, "an adapter of type XLORA changes weights anew for each input"),
        ({"r": 0}, "r: must be a number above 0, not 0"),
        ({"lora_alpha": math.inf}, "lora_alpha: must be a number above 0, not inf"),
        ({"rank_pattern": {"q": True}}, "rank_pattern: q: must be a number, not True"),
    ],
)
def test_what_is_not_offered_is_named(fields, message):
    with pytest.raises(InputError, match=f"a.json: {message}"):
        config(**fields)


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A base, a folder with two named adapters, and one with its own and a named one."""
    where = tmp_path_factory.mktemp("named")
    model, _ = tiny_hf("llama")
    model.save_pretrained(where / "base")
    tiny_tokenizer().save_pretrained(where / "base")
    options: dict[str, Any] = dict(r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], **options), adapter_name="polite"
    )
    wrapped.add_adapter("terse", peft.LoraConfig(target_modules=["v_proj"], **options))
    shared.randomise(wrapped).save_pretrained(where / "two")
    wrapped.add_adapter("default", peft.LoraConfig(target_modules=["k_proj"], **options))
    wrapped.save_pretrained(where / "own", selected_adapters=["default", "terse"])
    return where, wrapped.eval()


def test_named_adapters(named):
    where, wrapped = named
    base, two, own = (str(where / name) for name in ("base", "two", "own"))
    assert set(adapters(two)) == {"polite", "terse"} and is_adapter(two)
    assert set(adapters(own)) == {"default", "terse"}
    tokens, mask = shared.batch()
    for folder, adapter, active in (
        (two, "polite", "polite"),
        (two, "terse", "terse"),
        (own, None, "default"),
        (own, "default", "default"),
        (own, "terse", "terse"),
    ):
        pair, _ = load_pair(base, folder, adapter=adapter)
        wrapped.set_adapter(active)
        expected = shared.torch_logits(wrapped, tokens, mask)
        ours = shared.our_logits(pair, tokens, mask)
        np.testing.assert_allclose(ours[mask], expected[mask], atol=1e-4)


def test_a_name_is_asked_for_where_there_are_several(named):
    where, _ = named
    base, two = str(where / "base"), str(where / "two")
    with pytest.raises(
        InputError, match="holds several adapters: it has polite, terse; .*--adapt"
    ):
        load_pair(base, two)
    with pytest.raises(InputError, match="holds no adapter 'rude': it has polite, terse; name"):
        load_pair(base, two, adapter="rude")
    with pytest.raises(InputError, match="is a whole model; --adapter names one of an adapter's"):
        load_pair(base, base, adapter="polite")


def test_commands_take_a_name(named, tmp_path):
    where, _ = named
    (tmp_path / "prompts.txt").write_text("one\nand another\n")
    means = []
    for adapter in ("polite", "terse"):
        out = tmp_path / f"{adapter}.jsonl"
        options = ScoreFileOptions(
            base=str(where / "base"),
            tuned=str(where / "two"),
            adapter=adapter,
            prompts=str(tmp_path / "prompts.txt"),
            out=str(out),
        )
        meta = score_file(options)
        assert meta["adapter"] == adapter
        means.append(meta["mean_tuco"])
    assert means[0] != means[1]


def test_a_model_whose_training_left_adapters_below_is_a_model(named, tmp_path):
    where, _ = named
    (tmp_path / "model").mkdir()
    for path in (where / "base").iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    (tmp_path / "model" / "checkpoint-1").symlink_to(where / "two" / "polite")
    assert not is_adapter(tmp_path / "model")
    pair, _ = load_pair(str(where / "base"), str(tmp_path / "model"))
    assert pair.lora == {}
