import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco import random_models
from tests.tuco.tiny import save_tiny
from tuco_jax.core.last_token import tuco
from tuco_jax.datasets.prompt_groups import PromptGroup
from tuco_jax.models import decoder
from tuco_jax.models.positions import Positions
from tuco_jax.studies import floors

PAIRS = {"full": random_models.full_pair, "adapter": random_models.adapter_pair}


@pytest.mark.parametrize("kind", PAIRS)
def test_merged_layers_are_the_tuned_model(kind):
    pair = PAIRS[kind]()
    tokens, mask = random_models.batch()
    at = Positions.of(pair.tuned_config, mask)
    x = decoder.embed(pair.tuned_config, pair.tuned_params, tokens, at)
    forward = jax.jit(decoder.forward, static_argnums=0)
    want, _ = forward(pair.tuned_config, pair.tuned_params, x, at, pair.lora)
    plain = pair.tuned_params | {"layers": floors.merged_layers(pair)}
    got, _ = forward(pair.tuned_config, plain, x, at)
    real = np.asarray(mask)
    np.testing.assert_allclose(
        np.asarray(got)[real], np.asarray(want)[real], rtol=1e-4, atol=1e-4 * np.abs(want).max()
    )


@pytest.mark.parametrize("kind", PAIRS)
def test_a_random_change_has_tuning_s_norm_in_every_tensor(kind):
    pair = PAIRS[kind]()
    other = floors.random_change(pair, seed=3)
    old, tuned, noisy = (
        jax.tree.leaves(x)
        for x in (pair.base["layers"], floors.merged_layers(pair), other.tuned["layers"])
    )
    for a, b, c in zip(old, tuned, noisy, strict=True):
        for layer in range(len(a)):
            want, got = np.linalg.norm(b[layer] - a[layer]), np.linalg.norm(c[layer] - a[layer])
            assert got == pytest.approx(float(want), rel=1e-3, abs=1e-5)
            if want > 1e-3:
                cosine = np.vdot(b[layer] - a[layer], c[layer] - a[layer]) / want / got
                assert abs(cosine) < 0.9  # another direction
    again = floors.random_change(pair, seed=3).tuned["layers"]
    assert all(map(np.array_equal, jax.tree.leaves(again), noisy))
    third = floors.random_change(pair, seed=4).tuned["layers"]
    assert not all(map(np.array_equal, jax.tree.leaves(third), noisy))


def test_floors_rise_from_nothing_to_rounding_to_noise():
    pair = random_models.adapter_pair()
    tokens, mask = random_models.batch()
    made = floors.same_twice(pair), floors.rounded(pair), floors.random_change(pair)
    same, rounded, noise = (np.asarray(jax.jit(tuco)(p, tokens, mask)) for p in made)
    assert (same < 1e-6).all()
    assert ((1e-5 < rounded) & (rounded < 0.02)).all()
    assert (noise > 3 * rounded).all()
    leaves = jax.tree.leaves(made[1].tuned["layers"])
    assert all(np.array_equal(x, x.astype(jnp.bfloat16).astype(x.dtype)) for x in leaves)


@pytest.mark.slow
def test_the_study_holds_tuco_against_simpler_scores(tmp_path, monkeypatch):
    texts = ["a cup", "of tea", "and the sun", "on a map"]
    names = ["x", "x", "y", "y"]
    groups = [
        PromptGroup("chat", "Chat.", texts, True),
        PromptGroup("plain text", "Plain.", [f"{t} {t}" for t in texts], False),
        PromptGroup("harmful", "Harm.", [f"{t}!" for t in texts], True),
        PromptGroup("jailbreak", "Attack.", [f"do {t}" for t in texts], True, names),
    ]
    monkeypatch.setattr(floors, "prompt_groups", lambda count, seed: groups)
    for name, seed in (("base", 0), ("tuned", 1)):
        save_tiny(tmp_path / name, "llama", seed)
    models: dict[str, Any] = {"base": str(tmp_path / "base"), "tuned": str(tmp_path / "tuned")}
    config = floors.Config(out=tmp_path / "out", prompts=4, floors=2, **models)
    found = floors.STUDY.run(config)
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert data["groups"] == {"chat": 4, "plain text": 4, "harmful": 4, "jailbreak": 4}
    tuco_values = np.asarray(data["scores"]["TuCo"])
    np.testing.assert_array_equal(
        data["floors"]["this pair"], tuco_values[[0, 1, 4, 5, 8, 9, 12, 13]]
    )
    assert (tmp_path / "out" / "floors.svg").is_file()
    # With four prompts a group no AUC is put into words, be it TuCo's or another score's.
    for table in found.tables[:2]:
        assert {row[-1 if table is found.tables[0] else -2] for row in table.rows} == {
            "fewer than 5 of a kind: too few to say"
        }
    rows = {(c["first"], c["second"], c["score"]): c for c in data["contrasts"]}
    assert len(rows) == 3 * 5
    # Every chat prompt is longer or shorter than every plain one, or the AUC says how often.
    length = np.asarray(data["scores"]["prompt length"])
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in length[:4] for b in length[4:8]])
    row = rows["chat", "plain text", "prompt length"]
    assert row["contrast"]["auc"][0] == pytest.approx(wins)
    strength = abs(rows["chat", "plain text", "TuCo"]["contrast"]["auc"][0] - 0.5)
    assert row["gap"][0] == pytest.approx(strength - abs(wins - 0.5))
    # The same requests bare and wrapped: with pairs of one template alone, too.
    bare, wrapped = np.asarray(data["scores"]["TuCo"])[8:].reshape(2, 2, 2)
    wins = np.mean([a > b for i in (0, 1) for a in bare[i] for b in wrapped[i]])
    assert rows["harmful", "jailbreak", "TuCo"]["within"][0] == pytest.approx(wins)
    assert rows["chat", "plain text", "TuCo"]["within"] is None
    # The claim is held against the best of the simpler scores.
    gaps = [r["gap"][0] for r in rows.values() if r["first"] == "chat" and r["gap"]]
    assert found.claims[1].measured.startswith(f"{min(gaps):.3f} [")
    with pytest.raises(InputError, match="floors must be 1 or more, not 0"):
        floors.Config(out=tmp_path / "out", floors=0)
    with pytest.raises(InputError, match="prompts must be 2 or more, not 1"):
        floors.Config(out=tmp_path / "out", prompts=1)
    with pytest.raises(InputError, match="floors is 9: give 1 to 4 prompts a group"):
        floors.STUDY.run(floors.Config(out=tmp_path / "other", prompts=4, floors=9, **models))
