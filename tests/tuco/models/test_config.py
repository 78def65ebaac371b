"""What no decoder can be is an error that names it."""

import dataclasses

import pytest

from tests.tuco import random_models as rm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocab_size=0), "vocab_size is 0"),
        (dict(width=2.5), "width is 2.5"),
        (dict(depth=10_001), "depth is 10001, more than any model has"),
        (dict(norm_eps=float("nan")), "norm_eps is nan"),
        (dict(head_dim=6), "heads of 6 cannot have"),
        (dict(heads=3), "3 query heads cannot share 2"),
        (dict(windows=(0, 5)), "one entry for each of 3 layers"),
        (dict(rope_index=(0, 1, 2)), "rope_index names others than the 2 rotary tables"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        rm.config(**changes)


def test_defaults_follow_from_the_sizes():
    config = dataclasses.replace(rm.config(), query_scale=0.0, rope_index=(), windows=())
    assert config.query_scale == 8**-0.5
    assert config.rope_index == config.windows == (0, 0, 0)
    assert rm.rope(8).dim == 8
