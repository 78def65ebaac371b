"""Both forms against Algorithm 1 in PyTorch (forward hooks), for every family."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.tuco.tiny import FAMILIES, VOCAB, save_tiny
from tests.tuco.torch_reference import blocks, reference
from tuco_jax.core.decompose import decompose
from tuco_jax.core.last_token import last_token, tuco
from tuco_jax.core.places import last_column
from tuco_jax.core.residual import share
from tuco_jax.models.decoder import embed
from tuco_jax.models.pair import Pair
from tuco_jax.models.positions import Positions
from tuco_jax.weights.hf.model import load

ATOL = 1e-5
LENGTH = 13  # beyond every window (4 or 5)

# What PT and FT do not share, beside their weights: each block must use its own.
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        dict(rope_theta=100.0, rms_norm_eps=1e-5),
        dict(rope_theta=9000.0, rms_norm_eps=0.3),
    ),
    "mistral": (dict(sliding_window=4, rope_theta=50.0), dict(sliding_window=9, rms_norm_eps=0.1)),
    "phi3": (dict(rms_norm_eps=0.2, sliding_window=3), dict(rope_theta=77.0)),
    "gpt_neox": (dict(layer_norm_eps=0.2), dict(rotary_emb_base=55, rotary_pct=1.0)),
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    f: (f, {}, {}) for f in FAMILIES
} | {f"{f}, configs differ": (f, *changes) for f, changes in DIFFERENT.items()}


def inputs(side: str):
    rng = np.random.default_rng(3)
    lengths = np.array([LENGTH, 6, 1])
    columns = np.arange(LENGTH)[None]
    right = columns < lengths[:, None]
    mask = right if side == "right" else right[:, ::-1].copy()
    return jnp.asarray(rng.integers(0, VOCAB, mask.shape)), jnp.asarray(mask)


decompose = jax.jit(decompose, static_argnames=("layers", "parts"))
last_token = jax.jit(last_token, static_argnames="norm")


@jax.jit
def slope(pair, x, mask):
    return jax.grad(lambda x: tuco(pair, None, mask, embeddings=x).sum())(x)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    family, base_changes, tuned_changes = CASES[request.param]
    directory = tmp_path_factory.mktemp("pair")
    base, _ = save_tiny(directory / "base", family, 0, tokenizer=False, **base_changes)
    tuned, _ = save_tiny(directory / "tuned", family, 1, tokenizer=False, **tuned_changes)
    ours = [load(str(directory / name), tokenizer=False) for name in ("base", "tuned")]
    pair = Pair(ours[0].params, ours[1].params, {}, ours[0].config, ours[1].config)
    return base, tuned, pair


@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_and_components_equal_algorithm_1(case, side):
    base, tuned, pair = case
    tokens, mask = inputs(side)
    expected = reference(base, tuned, np.array(tokens), np.array(mask))
    out = decompose(pair, tokens, mask, layers=True)
    scale = np.abs(expected.ftc.numpy()).max()
    for got, want in ((out.ptc, expected.ptc), (out.ftc, expected.ftc)):
        np.testing.assert_allclose(
            np.asarray(got)[:, mask], want.numpy()[:, mask], atol=1e-5 * max(1, scale)
        )
    rows = np.arange(len(tokens))
    ptc, ftc = (x[:, rows, last_column(mask)].cumsum(0) for x in (out.ptc, out.ftc))
    full = share(ptc, ftc)
    scored = last_token(pair, tokens, mask)
    for got in (full, scored.layers):
        np.testing.assert_allclose(got, expected.layers, atol=ATOL)
    np.testing.assert_allclose(scored.tuco, expected.tuco, atol=ATOL)
    np.testing.assert_allclose(scored.tuco, full[-1], atol=ATOL)
    assert 0.05 < float(scored.tuco.min()) and float(scored.tuco.max()) < 0.95


@pytest.mark.slow
def test_the_scaled_stream_and_norm_2_equal_algorithm_1(case):
    base, tuned, pair = case
    tokens, mask = inputs("right")
    expected = reference(base, tuned, np.array(tokens), np.array(mask), alpha=0.6, norm=2)
    got = decompose(pair, tokens, mask, 0.6, layers=True)
    want = expected.hidden.numpy()[mask]
    np.testing.assert_allclose(
        np.asarray(got.hidden)[mask], want, atol=1e-5 * max(1, np.abs(want).max())
    )
    plain = reference(base, tuned, np.array(tokens), np.array(mask), norm=2)
    np.testing.assert_allclose(
        last_token(pair, tokens, mask, norm=2).layers, plain.layers, atol=ATOL
    )


# One of each form of block: what families do differently beside it their scores' tests cover.
FORMS = ["llama", "gemma2", "gpt2", "gpt_neox, configs differ", "mixtral"]


@pytest.mark.slow
@pytest.mark.parametrize("case", FORMS, indirect=True)
def test_the_slope_of_tuco_by_the_embeddings_is_autograd_s(case):
    base, tuned, pair = case
    tokens, mask = inputs("left")
    expected = reference(base, tuned, np.array(tokens), np.array(mask), slope=True)
    assert expected.slope is not None
    x = embed(pair.tuned_config, pair.tuned_params, tokens, Positions.of(pair.tuned_config, mask))
    got = np.asarray(slope(pair, x, mask))
    want = expected.slope.numpy()
    real = np.asarray(mask)
    np.testing.assert_allclose(got[real], want[real], atol=1e-4 * np.abs(want[real]).max())
    assert not got[~real].any()


# Whose output is what attention adds to the stream.
ATTENTION = {
    "llama": "self_attn",
    "gemma2": "post_attention_layernorm",
    "gpt2": "attn",
    "gpt_neox": "attention",
}


@pytest.mark.parametrize("case", ATTENTION, indirect=True)
def test_attention_s_part_of_ftc_is_what_hooks_on_attention_see(case, request):
    base, tuned, pair = case
    name = ATTENTION[request.node.callspec.params["case"]]
    seen: dict[tuple[int, int], torch.Tensor] = {}
    for model, where in enumerate((base, tuned)):
        for layer, block in enumerate(blocks(where)):

            def hook(module, args, output, at=(model, layer)):
                # Of the base, the last call counts: the one on the tuned model's stream.
                seen[at] = output[0] if isinstance(output, tuple) else output

            getattr(block, name).register_forward_hook(hook)
    tokens, mask = inputs("right")
    reference(base, tuned, np.array(tokens), np.array(mask))
    depth = len(blocks(base))
    want = np.stack([(seen[1, i] - seen[0, i]).detach().numpy() for i in range(depth)])
    out = decompose(pair, tokens, mask, layers=True, parts=True)
    for got, expected in ((out.ftc_attention, want), (out.ftc_mlp, np.asarray(out.ftc) - want)):
        np.testing.assert_allclose(
            np.asarray(got)[:, mask], expected[:, mask], atol=1e-5 * max(1, np.abs(want).max())
        )
    assert np.abs(want).max() > 0.01
