"""Parity with transformers in float32: every family and variant, random weights, mixed padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.tuco.tiny import FAMILIES, VOCAB, save_tiny
from tuco_jax.models import decoder
from tuco_jax.models.positions import Positions
from tuco_jax.weights.hf.model import load

ATOL = 1e-4
LENGTH = 14  # beyond every window (4 or 5)

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0, 1.3],
    long_factor=[2.5, 4.0],
    partial_rotary_factor=0.5,
)

# name: (family, changes to tests/tuco/tiny.py's config of it)
CASES = {family: (family, {}) for family in FAMILIES} | {
    "llama 2": ("llama", dict(head_dim=8, num_key_value_heads=4, attention_bias=False)),
    "llama, no biases": ("llama", dict(attention_bias=False, mlp_bias=False)),
    "llama 3.1": ("llama", dict(rope_parameters=LLAMA3, max_position_embeddings=256)),
    "llama, tied": ("llama", dict(tie_word_embeddings=True)),
    "llama, linear rope": (
        "llama",
        dict(rope_scaling=dict(type="linear", factor=4.0), rope_theta=300.0),
    ),
    "llama, gelu": ("llama", dict(hidden_act="gelu")),
    "llama, other epsilon": ("llama", dict(rms_norm_eps=0.5)),
    "mistral, no window": ("mistral", dict(sliding_window=None)),
    "zephyr-gemma": ("gemma", dict(num_key_value_heads=4, head_dim=12, rms_norm_eps=1e-5)),
    "qwen2, no window": ("qwen2", dict(use_sliding_window=False)),
    "qwen2, layer types": (
        "qwen2",
        dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ),
    "qwen2, yarn": ("qwen2", dict(rope_parameters=YARN)),
    "qwen2, yarn with options": (
        "qwen2",
        dict(
            rope_parameters=YARN
            | dict(beta_fast=2.0, beta_slow=0.5, truncate=False, attention_factor=1.2)
        ),
    ),
    "qwen2, yarn with mscale": (
        "qwen2",
        dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.9)),
    ),
    "qwen3, no biases": ("qwen3", dict(attention_bias=False, tie_word_embeddings=True)),
    "gemma, untied, biases": ("gemma", dict(tie_word_embeddings=False, attention_bias=True)),
    "gemma2, no softcaps": (
        "gemma2",
        dict(attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True),
    ),
    "gemma3, pattern": (
        "gemma3_text",
        dict(layer_types=None, sliding_window_pattern=2, final_logit_softcapping=3.0),
    ),
    "phi3, no window, tied": ("phi3", dict(sliding_window=None, tie_word_embeddings=True)),
    "phi3, whole heads rotated": ("phi3", dict(partial_rotary_factor=1.0)),
    "olmo2, no biases": ("olmo2", dict(attention_bias=False, num_key_value_heads=4)),
    "gpt2, unscaled, exact gelu, untied": (
        "gpt2",
        dict(scale_attn_weights=False, activation_function="gelu", tie_word_embeddings=False),
    ),
    "llama, a partial rotation that is ignored": ("llama", dict(partial_rotary_factor=0.5)),
    "gpt_neox, nothing rotated": ("gpt_neox", dict(rotary_pct=0.0)),
    "gpt_neox, sequential": ("gpt_neox", dict(use_parallel_residual=False)),
    "gpt_neox, no attention biases, tied": (
        "gpt_neox",
        dict(attention_bias=False, tie_word_embeddings=True, hidden_act="gelu_new"),
    ),
}


@jax.jit(static_argnums=0)
def run(config, params, tokens, mask):
    """Ours: the stream after every layer [L, B, T, D] and the logits [B, T, V]."""
    positions = Positions.of(config, mask)
    x = decoder.embed(config, params, tokens, positions)
    x, hidden = decoder.forward(config, params, x, positions, hidden_states=True)
    return hidden, decoder.logits(config, params, x)


def reference(model, tokens, mask):
    """The same by transformers. Hooks, since its last hidden state is after the final norm."""
    layers = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    hidden = []

    def keep(_module, _inputs, output):
        hidden.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(int)),
            position_ids=torch.tensor(positions),
            use_cache=False,
        )
    for hook in hooks:
        hook.remove()
    return torch.stack(hidden).numpy(), out.logits.numpy()


def mixed_rows(seed=0):
    """Rows of 14, 10, 9, 6 and 1 tokens, padded left, right, or on both sides, by random ids."""
    mask = np.zeros((5, LENGTH), bool)
    for row, (start, stop) in enumerate([(0, 14), (4, 14), (0, 9), (3, 9), (0, 1)]):
        mask[row, start:stop] = True
    return np.random.default_rng(seed).integers(0, VOCAB, mask.shape), mask


def assert_close(ours, theirs, mask):
    """Per-layer hidden states and logits agree at every real token."""
    for name, a, b in (
        *((f"layer {i}", a, b) for i, (a, b) in enumerate(zip(ours[0], theirs[0], strict=True))),
        ("logits", ours[1], theirs[1]),
    ):
        real = b[mask]
        assert real.std() > 0.1, f"{name}: a constant reference proves nothing"
        np.testing.assert_allclose(np.asarray(a)[mask], real, atol=ATOL, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_logits(case, tmp_path):
    family, changes = CASES[case]
    model, _ = save_tiny(tmp_path, family, seed=1, tokenizer=False, **changes)
    ours = load(str(tmp_path), tokenizer=False)
    tokens, mask = mixed_rows()
    theirs = reference(model, tokens, mask)
    assert_close(run(ours.config, ours.params, tokens, jnp.asarray(mask)), theirs, mask)


@pytest.mark.parametrize(
    ("family", "changes", "lengths"),
    [
        (
            "phi3",
            dict(rope_parameters=LONGROPE, original_max_position_embeddings=9),
            (3, 9, 10, 14),
        ),
        (
            "phi3",
            dict(
                rope_parameters=LONGROPE | dict(attention_factor=1.4),
                original_max_position_embeddings=9,
            ),
            (9, 10),
        ),
        (
            "llama",
            dict(
                rope_parameters=dict(rope_type="dynamic", rope_theta=200.0, factor=3.0),
                max_position_embeddings=9,
            ),
            (3, 9, 10, 14),
        ),
    ],
    ids=["longrope", "longrope, attention factor", "dynamic"],
)
def test_length_switches_are_made_row_by_row(family, changes, lengths, tmp_path):
    """transformers switches for the whole batch: it gets the rows singly, ours all at once."""
    model, _ = save_tiny(tmp_path, family, seed=2, tokenizer=False, **changes)
    ours = load(str(tmp_path), tokenizer=False)
    tokens = np.random.default_rng(3).integers(0, VOCAB, (len(lengths), LENGTH))
    mask = np.arange(LENGTH) < np.asarray(lengths)[:, None]
    hidden, logits = run(ours.config, ours.params, tokens, jnp.asarray(mask))
    for row, length in enumerate(lengths):  # ascending: dynamic NTK's cache only grows
        one = (slice(row, row + 1), slice(0, length))
        theirs = reference(model, tokens[one], mask[one])
        assert_close((hidden[(slice(None), *one)], logits[one]), theirs, mask[one])
