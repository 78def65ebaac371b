"""Generation against transformers' and against the decomposition without caches."""

import copy
import dataclasses
import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from common_jax.errors import InputError
from common_jax.journal import Journal
from common_jax.mesh import make_mesh
from tests.tuco import random_models
from tests.tuco.interrupted import check_it_goes_on
from tests.tuco.random_models import adapter_pair, different_configs, full_pair
from tests.tuco.tiny import FAMILIES, VOCAB, save_tiny
from tests.tuco.tiny_tokenizer import bos_tokenizer
from tuco_jax.core import walk
from tuco_jax.core.decompose import decompose
from tuco_jax.generation.generate import Answered, end_tokens, generate, generate_tokens
from tuco_jax.models.pair import Pair, single
from tuco_jax.models.sharding import place
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import (
    as_prompts,
)
from tuco_jax.weights.hf.model import load

NEW = 20

PROMPTS = [np.random.default_rng(n).integers(0, 61, n) for n in (3, 13, 1, 8, 5)]


def lists(rows):
    return [np.asarray(row).tolist() for row in rows]


@jax.jit
def next_tokens(pair, tokens, mask, alpha):
    """The likeliest token after each row, all layers run anew."""
    out = decompose(pair, tokens, mask, alpha, logits=True).logits
    assert out is not None
    last = mask.sum(axis=1) - 1
    return jnp.argmax(out[jnp.arange(len(tokens)), last], axis=-1)


def uncached(pair, prompts, alpha: Any = 1.0, new=NEW):
    """Greedy tokens without a cache, [N, new]."""
    columns = max(len(p) for p in prompts) + new
    lengths = np.asarray([len(p) for p in prompts])
    tokens = np.zeros((len(prompts), columns), int)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    alpha = jnp.broadcast_to(
        jnp.asarray(alpha, jnp.float32), (pair.tuned_config.depth, len(prompts))
    )
    rows = np.arange(len(prompts))
    for _ in range(new):
        mask = np.arange(columns) < lengths[:, None]
        tokens[rows, lengths] = next_tokens(pair, jnp.asarray(tokens), jnp.asarray(mask), alpha)
        lengths += 1
    return [row[n - new : n].tolist() for row, n in zip(tokens, lengths, strict=True)]


def reference_tokens(model: Any, prompt, **options):
    """Greedy tokens of transformers' own generation, [at most NEW]."""
    ids = torch.as_tensor(prompt)[None]
    options = dict(do_sample=False, max_new_tokens=NEW) | options
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


def both_ways(monkeypatch):
    """By layer, as one CPU does it, and by the compiled loop that GPUs, TPUs and meshes run."""
    yield "by layer"
    with monkeypatch.context() as patch:
        patch.setattr(walk.Split, "fits", staticmethod(lambda _: False))
        yield "compiled loop"


def with_layers_of(tuned: Any, base: Any) -> Any:
    """The base's blocks between the tuned model's embedding, final norm and head."""
    blocks = base.state_dict()
    mixed = {
        name: blocks[name] if re.search(r"\.(layers|h)\.\d", name) else tensor
        for name, tensor in tuned.state_dict().items()
    }
    model = copy.deepcopy(tuned)
    model.load_state_dict(mixed)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_0_and_1_are_models_that_transformers_runs(family, tmp_path, monkeypatch):
    """Each alone, and both at once, a row each, where both models run."""
    references, models = [], []
    for seed, name in ((4, "base"), (3, "tuned")):
        references.append(save_tiny(tmp_path / name, family, seed, tokenizer=False)[0])
        models.append(load(str(tmp_path / name), tokenizer=False))
    base, tuned = models
    pair = Pair(base.params, tuned.params, {}, base.config, tuned.config)
    prompts = [np.random.default_rng(n).integers(0, VOCAB, n) for n in (3, 12, 7)]

    def wanted(model, prompt):
        tokens = reference_tokens(model, prompt)
        return tokens[: tokens.index(257)] if 257 in tokens else tokens

    mixed = with_layers_of(references[1], references[0])
    want = {1: [wanted(references[1], p) for p in prompts], 0: [wanted(mixed, p) for p in prompts]}
    assert want[0] != want[1]
    for alpha, expected in want.items():
        got = generate_tokens(pair, prompts, alpha, max_new_tokens=NEW, eos=(257,))
        assert lists(got) == expected
    for _ in both_ways(monkeypatch):
        got = generate_tokens(pair, prompts, [0, 1, 1], max_new_tokens=NEW, eos=(257,))
        assert lists(got) == [want[0][0], want[1][1], want[1][2]]


def test_longrope_is_read_again_where_it_switches(tmp_path):
    """A row that grows past the switch gets long frequencies everywhere, its old keys too."""
    changes: dict[str, Any] = dict(
        partial_rotary_factor=1.0,
        original_max_position_embeddings=10,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.5, 1.2, 2.0],
            "long_factor": [4.0, 3.0, 5.0, 9.0],
            "original_max_position_embeddings": 10,
        },
    )
    reference, _ = save_tiny(tmp_path, "phi3", seed=1, tokenizer=False, **changes)
    model = load(str(tmp_path), tokenizer=False)
    assert model.config.ropes[0].switch == 10
    pair = single(model.config, model.params)
    prompts = [np.random.default_rng(n).integers(0, VOCAB, n) for n in (3, 12, 10, 11)]
    with Journal(tmp_path / "journal") as journal:
        journal.begin("key")
        got = lists(generate_tokens(pair, prompts, max_new_tokens=NEW, journal=journal))
    assert got == uncached(pair, prompts)
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    first, *others = (Answered(*json.loads(line)[1]) for line in lines[1:])
    assert sorted(first.rows) == [0, 1, 2, 3] and [e.rows for e in others] == [[2, 0]]
    (tmp_path / "journal").write_bytes(b"".join(lines[:2]))
    with Journal(tmp_path / "journal") as journal:
        journal.begin("key")
        again = lists(generate_tokens(pair, prompts, max_new_tokens=NEW, journal=journal))
    assert again == got and (tmp_path / "journal").read_bytes().splitlines(keepends=True) == lines
    for prompt, tokens in zip(prompts, got, strict=True):
        assert tokens == reference_tokens(reference, prompt, eos_token_id=VOCAB)


def test_answers_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    """Samples, too: what a row draws depends on its number, not on the batch or the start."""
    pair = full_pair(1)
    prompts = [np.random.default_rng(n).integers(0, 61, 3 + n) for n in range(7)]
    options: dict[str, Any] = dict(max_new_tokens=4, batch_size=2, temperature=0.9, seed=3)

    def run(journal, prompts=prompts, alpha=0.7, eos=(5,), **changes):
        given = {**options, **changes, "journal": journal}
        return generate_tokens(pair, prompts, alpha, eos=eos, **given)

    changes: list[Any] = [
        {"prompts": prompts[::-1]},
        {"alpha": 0.6},
        {"eos": (5, 6)},
        {"seed": 4},
        {"temperature": 0.8},
        {"top_k": 9},
        {"top_p": 0.9},
        {"max_new_tokens": 3},
        {"stop": ["a"]},
    ]
    unlike = [functools.partial(run, **change) for change in changes]
    check_it_goes_on(tmp_path / "journal", monkeypatch, run, unlike)


def learned_positions():
    return full_pair(
        5, random_models.config(ropes=(), rope_index=(), norm="layer", gated=False, parallel=True)
    )


def saved_modules():
    """An adapter that also replaces the final norm, the head and one layer's norms."""
    pair = adapter_pair(6)
    other = random_models.params(pair.base_config, 60)
    tuned = {
        "final_norm": other["final_norm"],
        "head": other["head"],
        "layers": {"mlp_norm": other["layers"]["mlp_norm"]},
    }
    return dataclasses.replace(pair, tuned=tuned)


PAIRS = {
    "full": full_pair,
    "adapter": adapter_pair,
    "configs": different_configs,
    "positions": learned_positions,
    "modules": saved_modules,
}


@pytest.mark.parametrize("kind", PAIRS)
def test_alpha_is_that_of_the_decomposition(kind, monkeypatch):
    pair = PAIRS[kind]()
    per_prompt = np.linspace(-0.5, 1.5, len(PROMPTS))  # 0 and 1 among them
    per_layer = np.array([[0.7], [1.0], [1.3]])
    for alpha in (per_prompt, per_layer, per_prompt + per_layer - 1):
        expected = uncached(pair, PROMPTS, alpha)
        for _ in both_ways(monkeypatch):
            got = lists(generate_tokens(pair, PROMPTS, alpha, max_new_tokens=NEW))
            assert got == expected


@pytest.mark.parametrize("kind", ["full", "modules"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_one_model_is_run_where_one_is_enough(kind, alpha):
    pair = PAIRS[kind]()
    got = lists(generate_tokens(pair, PROMPTS, alpha, max_new_tokens=NEW))
    assert got == uncached(pair, PROMPTS, alpha)
    assert got != uncached(pair, PROMPTS, 1 - alpha)


def test_batches_change_nothing():
    pair, alpha = adapter_pair(2), 0.8
    options: dict[str, Any] = dict(max_new_tokens=NEW, seed=7, eos=(3, 5))
    options |= dict(temperature=0.8, top_k=30, top_p=0.9)
    together = lists(generate_tokens(pair, PROMPTS, alpha, **options))
    assert together == lists(generate_tokens(pair, PROMPTS, alpha, **options))
    assert together == lists(generate_tokens(pair, PROMPTS, alpha, batch_size=2, **options))
    assert together == lists(generate_tokens(pair, PROMPTS, alpha, batch_size=1, **options))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = place(pair, mesh)
    assert together == lists(generate_tokens(placed, PROMPTS, alpha, mesh=mesh, **options))
    assert together == lists(generate_tokens(placed, PROMPTS, alpha, **options))
    options["seed"] = 8
    assert together != lists(generate_tokens(pair, PROMPTS, alpha, **options))


def test_a_long_prompt_alone_is_answered_as_in_company():
    """One row is no shared prefix; its keys are more than one chunk of attention."""
    pair = full_pair(base=random_models.config(max_positions=700))
    prompt = np.random.default_rng(0).integers(0, 61, 600)
    alone = generate_tokens(pair, [prompt], 0.5, max_new_tokens=4)
    beside = generate_tokens(pair, [prompt, prompt[:500]], 0.5, max_new_tokens=4)
    assert lists(alone) == lists(beside[:1]) == lists(uncached(pair, [prompt], 0.5, new=4))


def test_rows_end_where_they_should():
    pair = full_pair(1)
    free = lists(generate_tokens(pair, PROMPTS, max_new_tokens=NEW))
    eos = free[1][4]  # ends row 1 after four tokens or fewer, whatever it does to the others
    ended = lists(generate_tokens(pair, PROMPTS, max_new_tokens=NEW, eos=(eos, 60)))
    for short, full in zip(ended, free, strict=True):
        cut = min((full.index(e) for e in (eos, 60) if e in full), default=NEW)
        assert short == full[:cut]
    assert len(ended[1]) <= 4

    context = pair.tuned_config.max_positions
    long = np.arange(context - 3) % 61
    assert [len(t) for t in generate_tokens(pair, [long, PROMPTS[0]], max_new_tokens=9)] == [3, 9]
    with pytest.raises(InputError, match=r"prompts\[1\]: 64 tokens.*context of 64"):
        generate_tokens(pair, [PROMPTS[0], np.arange(context) % 61])

    asked = []

    def finished(tokens):
        asked.append(len(tokens))
        return len(tokens) >= 8 and tokens[0] == free[0][0]

    got = lists(generate_tokens(pair, PROMPTS, max_new_tokens=NEW, finished=finished))
    assert got[0] == free[0][: len(got[0])] and 8 <= len(got[0]) < NEW
    assert max(asked) <= NEW


def test_limits_of_sampling_are_greedy():
    pair = full_pair(2)
    greedy = lists(generate_tokens(pair, PROMPTS, max_new_tokens=NEW))
    settings: list[dict[str, Any]] = [dict(temperature=1e-4), dict(temperature=5.0, top_k=1)]
    for sampling in settings:
        assert greedy == lists(generate_tokens(pair, PROMPTS, max_new_tokens=NEW, **sampling))


@pytest.fixture(scope="module")
def pair_and_tokenizer():
    """A pair over the tiny tokenizer's vocabulary, and that tokenizer."""
    return full_pair(3, random_models.config(vocab_size=VOCAB)), bos_tokenizer()


def test_generate_takes_texts_and_conversations(pair_and_tokenizer):
    pair, tokenizer = pair_and_tokenizer
    chat = [{"role": "user", "content": "hi"}]
    prompts = ["once", chat, chat + [{"role": "assistant", "content": "Sure"}]]
    ids = encode(tokenizer, as_prompts(prompts), continue_final=True)
    assert [int((row == 256).sum()) for row in ids] == [1, 1, 1]
    with pytest.raises(InputError, match="prompt 2: ends with an assistant's turn"):
        generate(pair, tokenizer, prompts)
    for alpha in (1.0, 0.4):
        tokens = generate_tokens(pair, ids, alpha, max_new_tokens=NEW, eos=(257,))
        want = [tokenizer.decode(t.tolist(), skip_special_tokens=True) for t in tokens]
        options = dict(max_new_tokens=NEW, continue_final=True)
        assert generate(pair, tokenizer, prompts, alpha, **options) == want


def test_generate_with_the_base_alone(pair_and_tokenizer, tmp_path):
    pair, tokenizer = pair_and_tokenizer
    alone = single(pair.base_config, pair.base)
    want = generate(alone, tokenizer, ["once", "upon a"], max_new_tokens=NEW)
    got = generate(pair, tokenizer, ["once", "upon a"], max_new_tokens=NEW, model="base")
    assert got == want
    assert got != generate(pair, tokenizer, ["once", "upon a"], max_new_tokens=NEW)
    with pytest.raises(InputError, match="model='base' has no tuning to scale"):
        generate(pair, tokenizer, ["once"], 0.5, model="base")
    for model, want, resumed in (("tuned", None, 0), ("base", got, 0), ("base", got, 2)):
        with Journal(tmp_path / "journal") as journal:
            journal.begin("key")
            options: dict[str, Any] = dict(max_new_tokens=NEW, model=model, journal=journal)
            found = generate(pair, tokenizer, ["once", "upon a"], **options)
            assert journal.resumed["answers"] == resumed and want in (None, found)


def test_generate_stops_at_texts(pair_and_tokenizer):
    pair, tokenizer = pair_and_tokenizer
    prompts = ["once", "upon a time", "there"]
    free = generate(pair, tokenizer, prompts, max_new_tokens=NEW)
    stops = [free[0][3:5], free[1][6]]
    cut = [min((t.find(s) for s in stops if s in t), default=len(t)) for t in free]
    want = [t[:n] for t, n in zip(free, cut, strict=True)]
    assert want != free
    assert generate(pair, tokenizer, prompts, max_new_tokens=NEW, stop=stops) == want
    only = [t.partition(stops[0])[0] for t in free]
    assert generate(pair, tokenizer, prompts, max_new_tokens=NEW, stop=stops[0]) == only


def test_end_tokens_come_from_the_template_too():
    tokenizer = bos_tokenizer()
    assert end_tokens(tokenizer) == (257,)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    end = tokenizer.convert_tokens_to_ids("<end>")
    tokenizer.chat_template = str(tokenizer.chat_template).replace("eos_token", "'<end>\n'")
    assert end_tokens(tokenizer) == (257, end)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert end_tokens(tokenizer) == (257,)
    tokenizer.chat_template = None
    assert end_tokens(tokenizer) == (257,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=[0.1, 0.2]), r"alpha has shape \[2\].*\[3, 1\] \(one a layer\)"),
        (dict(alpha=float("nan")), "alpha holds NaN"),
        (dict(temperature=-1.0), "temperature must be 0 or more, not -1"),
        (dict(top_k=-2), "top_k must be 0 or more, not -2"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1, not 0"),
        (dict(max_new_tokens=0), "max_new_tokens must be 1 or more, not 0"),
        (dict(stop=["a", ""]), "stop holds an empty text"),
        (dict(model="both"), "model is 'both'"),
    ],
)
def test_bad_settings(pair_and_tokenizer, options, message):
    pair, tokenizer = pair_and_tokenizer
    with pytest.raises(InputError, match=message):
        generate(pair, tokenizer, ["one", "two", "three", "four"], **options)
