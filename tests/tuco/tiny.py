"""Tiny Hugging Face models of every family, every tensor random, built in memory or saved.

They are references: made by transformers, never by us. Defaults are chosen to be awkward: grouped
heads, head widths unlike width / heads where the family allows it, windows shorter than the test
rows, biases and norms far from zero and one.
"""

import copy
import pathlib
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

__all__ = ["FAMILIES", "VOCAB", "save_tiny", "tiny_config", "tiny_hf", "tiny_tokenizer"]

VOCAB = 272  # 256 bytes, special tokens, and a few ids that no text gives

_SHARED = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=256,
    eos_token_id=257,
    pad_token_id=258,
)
_FIELDS: dict[str, dict[str, Any]] = {
    "llama": dict(head_dim=16, attention_bias=True, mlp_bias=True),
    "mistral": dict(head_dim=16, sliding_window=5),
    "qwen2": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": dict(
        head_dim=16,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma": dict(head_dim=16, num_key_value_heads=1),
    "gemma2": dict(
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3_text": dict(
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
        },
    ),
    "phi3": dict(sliding_window=5, partial_rotary_factor=0.5),
    "olmo2": dict(attention_bias=True),
    "mixtral": dict(head_dim=16, sliding_window=5, num_local_experts=5, num_experts_per_tok=2),
    "qwen3_moe": dict(
        head_dim=16,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=4,
        moe_intermediate_size=20,
        num_experts=7,
        num_experts_per_tok=3,
        norm_topk_prob=False,
    ),
    "gpt2": dict(n_inner=48, num_key_value_heads=None, intermediate_size=None),
    "gpt_neox": dict(partial_rotary_factor=0.5, rotary_pct=0.5, num_key_value_heads=None),
}
FAMILIES = list(_FIELDS)

_CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A config of `family` (a transformers model_type); `changes` overrule its fields."""
    fields = _SHARED | _FIELDS[family] | changes
    fields = {k: copy.deepcopy(v) for k, v in fields.items() if v is not None}
    return AutoConfig.for_model(family, **fields)


def tiny_hf(
    family: str, seed: int = 0, **changes: Any
) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """A float32 model of `family` with eager attention and every tensor random, and its config."""
    config = tiny_config(family, **changes)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    plain_norms = not family.startswith("gemma")  # Gemma's norms hold scale - 1
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() >= 2:
                tensor.copy_(noise * 1.5 / tensor.shape[-1] ** 0.5)
            elif name.endswith(".weight"):
                tensor.copy_(0.3 * noise + (1.0 if plain_norms else 0.0))
            else:
                tensor.copy_(0.3 * noise)
    return model.eval(), config


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte (ids 0 to 255), then <s> 256, </s> 257, <pad> 258; with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def save_tiny(
    directory: str | pathlib.Path,
    family: str,
    seed: int = 0,
    *,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    tokenizer: bool = True,
    **changes: Any,
) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """Save a tiny model of `dtype` with its tokenizer; returns it in float32 as it was saved."""
    model, config = tiny_hf(family, seed, **changes)
    model.to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if tokenizer:
        tiny_tokenizer().save_pretrained(directory)
    return model.float(), config
