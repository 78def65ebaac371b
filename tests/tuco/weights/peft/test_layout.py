"""Which outputs of a fused module feed which parameter, and which way round weights are stored."""

import numpy as np
import pytest

from tests.tuco.tiny import tiny_config
from tuco_jax.models.families import from_huggingface
from tuco_jax.weights.keys import FAMILIES
from tuco_jax.weights.peft.layout import fed_rows, is_conv1d


@pytest.mark.parametrize(
    ("family", "tensor", "conv1d"),
    [
        ("gpt2", "attn.c_attn.weight", True),
        ("phi3", "qkv_proj.weight", False),
        ("gpt_neox", "query_key_value.weight", False),
        ("llama", "q_proj.weight", False),
    ],
)
def test_every_output_feeds_one_parameter(family, tensor, conv1d):
    config = from_huggingface(tiny_config(family))
    row = next(row for row in FAMILIES[family].rows if row.tensor.endswith(tensor))
    heads = {1: config.heads, 3: config.heads + 2 * config.kv_heads}[len(row.paths)]
    outputs = heads * config.head_dim
    assert is_conv1d(row, config, config.width, outputs) is conv1d
    rows = fed_rows(row, config, config.width, outputs)
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(outputs))
