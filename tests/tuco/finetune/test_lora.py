import math
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from common_jax.errors import InputError
from tests.tuco import random_models
from tuco_jax.finetune.lora import LoraOptions, fold_scale, init, targets

CONFIG = random_models.config()


def test_all_linear_layers_by_default():
    paths = targets(CONFIG, "all")
    assert sorted(p.split("/")[-1] for p in paths) == sorted(
        ["q", "k", "v", "o", "gate", "up", "down"]
    )
    ungated = random_models.config(gated=False)
    assert "layers/mlp/gate" not in targets(ungated, "all")


def test_chosen_layers():
    assert targets(CONFIG, ["v", "q"]) == ["layers/attention/q", "layers/attention/v"]
    with pytest.raises(
        InputError, match="no linear layer 'q_proj'; it has k, o, q, v, down, gate, up"
    ):
        targets(CONFIG, ["q_proj"])
    with pytest.raises(InputError, match="lora.targets is empty"):
        targets(CONFIG, [])


def test_factors_start_as_in_peft():
    factors: dict[str, Any] = flatten_dict(
        init(CONFIG, LoraOptions(rank=5), jax.random.key(0)), sep="/"
    )
    a, b = factors["layers/mlp/down/a"], factors["layers/mlp/down/b"]
    assert a.shape == (3, 40, 5) and b.shape == (3, 5, 24)
    assert not np.any(b)
    bound = 1 / math.sqrt(40)
    assert 0.95 * bound < np.abs(a).max() <= bound
    assert abs(float(a.std()) - bound / math.sqrt(3)) < 0.05 * bound
    assert not np.array_equal(a[0], a[1])


def test_scale():
    assert LoraOptions(rank=16, alpha=8).scale == 0.5
    assert LoraOptions(rank=16, alpha=8, rslora=True).scale == 2
    factors = random_models.lora(CONFIG, 0)
    folded: dict[Any, Any] = flatten_dict(fold_scale(factors, 3.0))
    plain: dict[Any, Any] = flatten_dict(factors)
    for path, value in folded.items():
        np.testing.assert_array_equal(value, plain[path] * (3 if path[-1] == "b" else 1))
