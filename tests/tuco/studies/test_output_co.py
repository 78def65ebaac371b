"""TuCo against OutputCo, from files to a report, on a tiny pair."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import tuco_jax
from common_jax.errors import InputError
from tests.tuco.studies.made_up import results
from tuco_jax.prompts.encode import encode
from tuco_jax.studies import output_co
from tuco_jax.weights.load import load_pair


def test_output_co_is_that_of_the_library(models, requests, tmp_path):
    config = output_co.Config(
        prompts=requests,
        out=tmp_path / "out",
        refusal="no",
        shots=(0, 1, 3),
        count=4,
        **models,
    )
    found = output_co.STUDY.run(config)
    data = results(config.out)
    pair, tokenizer = load_pair(models["base"], models["tuned"])
    texts = output_co.prepare(config)
    messages = [{"role": "user", "content": texts[2]}, {"role": "assistant", "content": "no"}]
    turns = [*messages * 3, messages[0]]
    (ids,) = encode(tokenizer, [tuco_jax.Prompt("p", None, tuple(turns))])
    want = jax.jit(tuco_jax.output_co)(pair, ids[None], np.ones((1, len(ids)), bool))[0]
    assert data["output_co"][2][2] == pytest.approx(float(want), abs=1e-5)
    want = tuco_jax.score(pair, tokenizer, [turns]).tuco[0]
    assert data["tuco"][2][2] == pytest.approx(float(want), abs=1e-5)
    change = np.mean(np.subtract(data["output_co"][1], data["output_co"][0]))
    assert found.claims[1].measured.startswith(f"{change:.3f} [")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"shots": (1, 2, 3)}, "give 3 or more numbers that rise from 0"),
        ({"count": 1}, "count must be 2 or more, not 1"),
        ({"count": 9}, "count is 9: there are 6 requests; give fewer"),
        ({"refusal": " "}, "refusal is empty; give the text that answers every shot"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message):
            output_co.STUDY.run(dataclasses.replace(config, out=tmp_path / "other", **changes))
