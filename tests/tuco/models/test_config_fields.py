"""Every field of every family: what transformers ignores does not act, what fails is refused.

transformers is the reference, on tiny models of one seed: a field is set to another value, and its
logits stay or move, or it fails. That the fields which act mean here what they mean there is for
`test_parity.py`.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from common_jax.errors import InputError
from tests.tuco.tiny import FAMILIES, tiny_config, tiny_hf
from tuco_jax.models.families import from_huggingface

# A value of each field that is unlike tests/tuco/tiny.py's.
VALUES = dict(
    vocab_size=300,
    hidden_size=48,
    n_embd=48,
    intermediate_size=40,
    n_inner=40,
    num_hidden_layers=2,
    n_layer=2,
    num_attention_heads=8,
    n_head=8,
    num_key_value_heads=1,
    head_dim=8,
    hidden_act="gelu",
    hidden_activation="silu",
    activation_function="gelu",
    max_position_embeddings=32,
    n_positions=32,
    original_max_position_embeddings=16,
    initializer_range=0.5,
    rms_norm_eps=0.3,
    layer_norm_eps=0.3,
    layer_norm_epsilon=0.3,
    use_cache=False,
    pad_token_id=7,
    bos_token_id=8,
    eos_token_id=9,
    pretraining_tp=2,
    tie_word_embeddings=True,
    rope_parameters=dict(rope_type="linear", rope_theta=50.0, factor=2.0),
    rope_theta=77.0,
    partial_rotary_factor=0.25,
    rotary_pct=0.25,
    attention_bias=True,
    attention_dropout=0.4,
    attn_pdrop=0.4,
    resid_pdrop=0.4,
    embd_pdrop=0.4,
    hidden_dropout=0.4,
    classifier_dropout=0.4,
    mlp_bias=True,
    sliding_window=3,
    use_sliding_window=False,
    max_window_layers=2,
    layer_types=["full_attention", "sliding_attention", "full_attention"],
    query_pre_attn_scalar=5,
    final_logit_softcapping=0.5,
    attn_logit_softcapping=0.3,
    use_bidirectional_attention=True,
    summary_type="last",
    summary_use_proj=False,
    summary_activation="tanh",
    summary_proj_to_labels=False,
    summary_first_dropout=0.4,
    scale_attn_weights=False,
    scale_attn_by_inverse_layer_idx=True,
    reorder_and_upcast_attn=True,
    add_cross_attention=True,
    use_parallel_residual=False,
    num_experts=5,
    num_local_experts=4,
    num_experts_per_tok=1,
    moe_intermediate_size=12,
    norm_topk_prob=True,
    decoder_sparse_step=2,
    mlp_only_layers=[1],
    output_router_logits=True,
    router_aux_loss_coef=0.5,
    router_jitter_noise=0.5,
    is_decoder=True,
    is_causal=False,
    # Of families that are not here, so that nobody reads them.
    clip_qkv=0.1,
    logit_scale=0.1,
    embedding_multiplier=7.0,
    residual_multiplier=7.0,
    no_rope_layers=[0, 0, 0],
)
LIMIT = "max_position_embeddings"  # also the longest row that is read here
# Read by transformers where they stand in a config, though the families do not declare them.
UNDECLARED = {
    "head_dim",
    "is_causal",
    "num_local_experts",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rotary_pct",
}


def declared(family):
    """Fields that the family's own class adds to those of every config."""
    common = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    own = {f.name for f in dataclasses.fields(type(tiny_config(family)))} - common
    return sorted(own | {"tie_word_embeddings"})


def foreign(family):
    """Fields that the family does not have, under no name."""
    kind = type(tiny_config(family))
    return set(VALUES) - set(declared(family)) - set(kind.attribute_map) - {"rope_parameters"}


def other_value(family, field):
    old = getattr(tiny_config(family), field)
    return not old if isinstance(old, bool) else VALUES[field]


def logits(family, changes) -> Any:
    """transformers' logits, or None where it fails."""
    tokens = np.random.default_rng(0).integers(10, 250, (2, 9))
    try:
        model, _ = tiny_hf(family, seed=4, **changes)
        with torch.no_grad():
            return model(torch.tensor(tokens), use_cache=False).logits.numpy()
    except Exception:  # whatever it raises: it does not run such a model
        return None


plain = functools.cache(lambda family: logits(family, {}))


def ours(family, changes):
    """Our config, or None where it is refused, by transformers' class or here."""
    try:
        config = tiny_config(family, **changes)
    except Exception:
        return None
    try:
        return from_huggingface(config)
    except InputError:
        return None


def check(family, changes):
    theirs, here = logits(family, changes), ours(family, changes)
    name = f"{family}: {changes}"
    if theirs is None:
        assert here is None, f"{name} fails in transformers and is taken here"
        return
    same = theirs.shape == plain(family).shape and np.allclose(theirs, plain(family), atol=1e-5)
    if not same:
        assert here is None or here != ours(family, {}), f"{name} acts in transformers only"
    else:
        assert here is not None, f"{name} is ignored by transformers and refused here"
        if LIMIT in changes:
            here = dataclasses.replace(here, max_positions=64)
        assert here == ours(family, {}), f"{name} is ignored by transformers and acts here"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_field_of_the_family_acts_as_it_does_in_transformers(family):
    for field in declared(family):
        assert field in VALUES, f"{family} has a field that this test does not know: {field}"
        if field != "use_bidirectional_attention":  # acts, but not with eager attention: refused
            check(family, {field: other_value(family, field)})


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_of_other_families_do_nothing(family):
    """All at once, but for those that transformers reads without declaring them."""
    for field in UNDECLARED & foreign(family):
        check(family, {field: VALUES[field]})
    check(family, {field: VALUES[field] for field in foreign(family) - UNDECLARED})


PARTIAL = dict(partial_rotary_factor=0.5)
LINEAR = dict(rope_type="linear", rope_theta=100.0, factor=2.0)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16)
MORE = [
    ("llama", PARTIAL),
    ("llama", dict(rope_parameters=LINEAR | PARTIAL)),
    ("llama", dict(rope_parameters=LINEAR, partial_rotary_factor=0.5)),
    ("llama", dict(rope_parameters=dict(full_attention=LINEAR, sliding_attention=LINEAR))),
    ("llama", dict(rope_parameters=YARN, original_max_position_embeddings=32)),
    ("llama", dict(rope_parameters={k: v for k, v in YARN.items() if k != "factor"})),
    ("llama", dict(num_key_value_heads=0)),
    ("llama", dict(pad_token_id=272)),
    ("llama", dict(pad_token_id=-1)),
    ("llama", dict(head_dim=7)),
    ("mistral", dict(attention_bias=True, mlp_bias=True, layer_types=["full_attention"] * 3)),
    ("qwen2", dict(attention_bias=False)),
    ("qwen2", dict(head_dim=16)),
    ("qwen2", dict(use_sliding_window=False, layer_types=["sliding_attention"] * 3)),
    ("qwen2", dict(rope_parameters=dict(full_attention=LINEAR, sliding_attention=LINEAR))),
    ("gemma2", dict(use_bidirectional_attention=False)),
    ("gemma3_text", dict(rope_parameters=LINEAR)),
    ("gemma3_text", PARTIAL),
    ("gpt_neox", dict(rotary_pct=0.0)),
    ("gpt_neox", dict(rotary_pct=2.0)),
    ("gpt_neox", dict(head_dim=16)),
    ("gpt2", dict(n_inner=0)),
]


@pytest.mark.parametrize("case", MORE, ids=lambda case: f"{case[0]} {' '.join(case[1])}")
def test_values_that_once_differed(case):
    check(*case)


REFUSED = [
    ("mistral", dict(sliding_window=0), "sliding_window is 0"),
    ("gemma2", dict(sliding_window=-3), "sliding_window is -3"),
    ("gemma2", dict(attn_logit_softcapping=0.0), "attn_logit_softcapping is 0"),
    ("gemma2", dict(query_pre_attn_scalar=-4), "query_pre_attn_scalar is -4"),
    ("llama", dict(rope_parameters=LINEAR | PARTIAL), "would rotate 8 features of heads of 16"),
    ("qwen2", dict(is_causal=False), "is_causal: only causal"),
    ("qwen3_moe", dict(mlp_only_layers=[1]), r"mlp_only_layers is \[1\]: layers without experts"),
    ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step is 2: layers without experts"),
    ("qwen3_moe", dict(num_experts=0), "num_experts is 0; qwen3_moe has 1 or more"),
    ("mixtral", dict(num_experts_per_tok=6), "6 of 5 experts cannot be used; mend the config"),
    ("mixtral", dict(num_experts_per_tok=0), "0 of 5 experts cannot be used"),
    ("mixtral", dict(num_local_experts=10**9), "experts is 1000000000, more than any model has"),
    (
        "qwen3",
        dict(per_layer_config={"1": {"intermediate_size": 40}}),
        "per_layer_config: layers of different shapes",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[0]} {' '.join(case[1])}")
def test_what_cannot_be_meant_is_refused_by_name(case):
    family, changes, message = case
    with pytest.raises(InputError, match=message) as caught:
        from_huggingface(tiny_config(family, **changes))
    assert "\n" not in str(caught.value)


def test_fields_that_are_null_in_a_config():
    """tiny_config leaves out what is None, so that these are made by transformers itself."""
    fields = dict(hidden_size=32, num_attention_heads=4, vocab_size=99, pad_token_id=0)
    with pytest.raises(InputError, match="head_dim is null"):
        from_huggingface(AutoConfig.for_model("qwen2", head_dim=None, **fields))
    with pytest.raises(InputError, match="sliding_window is None"):
        from_huggingface(AutoConfig.for_model("gemma2", sliding_window=None, **fields))
    with pytest.raises(InputError, match="n_embd 32 is not a multiple of n_head 5"):
        from_huggingface(AutoConfig.for_model("gpt2", n_embd=32, n_head=5))


def test_a_multimodal_model_ties_its_head_by_its_own_field():
    text = dict(hidden_size=32, num_attention_heads=4, vocab_size=99, final_logit_softcapping=2.0)

    def config(**fields):
        return from_huggingface(AutoConfig.for_model("gemma3", text_config=text, **fields))

    assert config(tie_word_embeddings=True).tied_head
    assert not config(tie_word_embeddings=False).tied_head
    assert config().logit_softcap == 0  # which the whole model never applies
    with pytest.raises(InputError, match="quantization_config"):
        config(quantization_config=dict(quant_method="gptq", bits=4))
