"""Pairs whose models read prompts otherwise: each score is of its own model's texts."""

import json
import shutil
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import struct

from common_jax.errors import InputError
from common_jax.mesh import make_mesh
from reward_jax import (
    ExtractionOptions,
    draw_targets,
    extract_reward,
    guided_sample,
    load_expert,
    load_stable_diffusion,
    pair_scores,
    pair_texts,
)
from reward_jax.torch_import.lora import OwnTexts
from tests.compiled import compilations
from tests.reward.stable_diffusion_reference import UNET, pipeline, restate

PROMPTS = ["a red cat", "dog", "an image", "sits"]
LATENTS = jax.random.normal(jax.random.key(0), (4, 8, 8, 4))
KEY = jax.random.key(1)
UNET_PART = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 8
TEXT_PART = "text_encoder.text_model.encoder.layers.0.self_attn.v_proj", 12


def write_lora(path, *parts):
    draw = np.random.default_rng(0).normal
    factors = {}
    for module, width in parts:
        for end, shape in (("lora_A", (2, width)), ("lora_B", (width, 2))):
            factors[f"{module}.{end}.weight"] = draw(size=shape).astype(np.float32)
    safetensors.numpy.save_file(factors, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd") / "base"
    pipeline(6, UNET | dict(sample_size=8)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pair(folder):
    """A base, and its expert by a LoRA of both networks."""
    base = load_stable_diffusion(folder)
    path = write_lora(folder.parent / "both.safetensors", UNET_PART, TEXT_PART)
    with pytest.warns(OwnTexts, match="reads prompts otherwise .* by pair_scores and pair_texts"):
        return base, load_expert(base, path)


@struct.dataclass
class InOrder:
    """A source of the same rows each time."""

    rows: Any

    def sample(self, key, count):
        return jax.tree.map(lambda x: x[:count], self.rows)


class _Linear:
    """A reward whose gradient is a parameter, at 0 first."""

    def apply(self, variables, x, t):
        return jnp.sum(x * variables["params"]["w"][None], axis=(1, 2, 3))


def test_a_reward_is_matched_to_scores_of_each_models_own_texts(pair):
    base, expert = pair
    scores, texts = pair_scores(base, expert, 3.0), pair_texts(base, expert, PROMPTS)
    given: Any = dict(key=KEY, options=ExtractionOptions(batch_size=4))
    rows = InOrder((LATENTS, texts))
    with compilations() as found:
        targets = draw_targets(*scores, rows, base.schedule, count=4, **given)
    assert sum("_evaluate" in name for name in found) == 1  # of both models

    def guided(unet, reader):
        one, none = (reader.encode_text(x) for x in (PROMPTS, [""] * 4))
        one, none = (unet.epsilon(targets.x, targets.t, text) for text in (one, none))
        return none + 3 * (one - none)

    wanted = guided(base, base) - guided(expert, expert)
    np.testing.assert_allclose(targets.value, wanted, atol=1e-4)
    half = guided(base, base) - guided(expert, base)
    assert np.abs(wanted - half).max(axis=(1, 2, 3)).min() > 0.01
    params = {"w": jnp.zeros(LATENTS.shape[1:])}
    _, history = extract_reward(
        *scores, _Linear(), params, rows, base.schedule, optax.sgd(0.1), steps=1, **given
    )
    np.testing.assert_allclose(history.loss, np.square(wanted).mean(), rtol=1e-4)


def test_a_pair_over_a_mesh_is_the_same(pair):
    base, expert = pair
    scores, texts = pair_scores(base, expert, 3.0), pair_texts(base, expert, PROMPTS)
    given: Any = dict(count=4, key=KEY, options=ExtractionOptions(batch_size=4))
    found, wanted = (
        draw_targets(*scores, (LATENTS, texts), base.schedule, mesh=mesh, **given)
        for mesh in (make_mesh(2, 2, 2), None)
    )
    np.testing.assert_allclose(found.value, wanted.value, rtol=1e-5, atol=1e-5)


def test_what_reads_prompts_as_the_base_does_is_not_warned_of(pair, folder, tmp_path):
    base, _ = pair
    alone = write_lora(tmp_path / "unet.safetensors", UNET_PART)
    other = tmp_path / "other"  # the same tokenizer, as older folders have it
    shutil.copytree(folder, other)
    whole = other / "tokenizer" / "tokenizer.json"
    model = json.loads(whole.read_text())["model"]
    whole.unlink()
    (other / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (other / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", OwnTexts)
        load_expert(base, alone)
        assert load_expert(base, other).tokens != base.tokens
        narrow = load_stable_diffusion(folder, "bfloat16")
        load_expert(narrow, folder)  # in float32: the same texts, as far as bfloat16 holds them
    (other / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges[:4]]))
    with pytest.warns(OwnTexts):
        load_expert(base, other)


def test_bad_input_of_pairs(pair, folder, tmp_path):
    base, expert = pair
    score, _ = pair_scores(base, expert)
    t, text = jnp.zeros(4, jnp.int32), base.encode_text(PROMPTS)
    with pytest.raises(
        InputError, match=r"cond is \[4, 77, 12\], where .* \[4, 2, tokens, .* give"
    ):
        score(LATENTS, t, text)
    given: Any = dict(key=KEY)
    with pytest.raises(InputError, match="cond is none, where the texts of both models"):
        guided_sample(score, base.schedule, LATENTS.shape, **given)
    shutil.copytree(folder, tmp_path / "short")
    restate(tmp_path / "short" / "tokenizer", "tokenizer_config.json", model_max_length=20)
    with pytest.warns(OwnTexts):
        short = load_expert(base, tmp_path / "short")
    with pytest.raises(InputError, match="base and expert read 77 and 20 tokens: give both"):
        pair_texts(base, short, PROMPTS)
