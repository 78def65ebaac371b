"""Scores of a pair that streams past equal those of the pair in memory."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from common_jax.cli.options import MeshOptions
from common_jax.errors import InputError
from common_jax.journal import Journal
from tests.tuco import random_models as rm
from tests.tuco.tiny import save_tiny, tiny_hf, tiny_tokenizer
from tests.tuco.weights.gguf import writer as gguf_writer
from tests.tuco.weights.peft import test_read as test_peft
from tuco_jax.core.streamed import Streamed, stream_pair
from tuco_jax.core.walk import Split
from tuco_jax.prompts.packing import pack
from tuco_jax.prompts.read import as_prompts
from tuco_jax.scoring.fingerprint import scores_fingerprint
from tuco_jax.scoring.options import PassOptions, ScoreFileOptions
from tuco_jax.scoring.score import score, score_tokens
from tuco_jax.scoring.score_file import score_file
from tuco_jax.scoring.streamed import passes_of
from tuco_jax.weights.load import load_model, load_pair
from tuco_jax.weights.orbax import store

TEXTS = ["a", "tea and biscuits", "why is the sky", "b" * 40, "and so on, and", "it is late"] * 3


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """One pair, and an adapter, as directories, GGUF files and stores."""
    folder = tmp_path_factory.mktemp("pair")
    options = dict(target_modules=["q_proj"], modules_to_save=["v_proj", "layers.1.mlp.up_proj"])
    test_peft.write(folder, "llama", options)
    tiny_tokenizer().save_pretrained(folder / "base")
    save_tiny(folder / "tuned", "llama", seed=1, max_shard_size="20KB", rms_norm_eps=1e-5)
    for name, seed in (("base", 0), ("tuned", 1)):
        gguf_writer.write(folder / f"{name}.gguf", *tiny_hf("llama", seed), kinds={"ffn": "F16"})
    for name in ("tuned", "adapter"):
        pair, tokenizer = load_pair(str(folder / "base"), str(folder / name))
        store.save_pair(folder / f"{name}.store", pair, tokenizer)
    store.save(folder / "base.store", load_model(str(folder / "base")))
    return folder


def equal(got, want):
    assert got.ids == want.ids
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.tuco, want.tuco, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.layers, want.layers, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        ("base", "tuned"),
        ("base", "adapter"),
        ("base.store", "tuned"),
        ("base.store", "adapter"),
        ("tuned.store", "tuned.store"),
        ("adapter.store", "adapter.store"),
    ],
)
def test_every_source(where, base, tuned):
    names = str(where / base), str(where / tuned)
    pair, tokenizer = load_pair(*names)
    streamed, again = stream_pair(*names)
    assert list(streamed.ends.notes) == list(pair.notes)
    want = score(pair, tokenizer, TEXTS)
    equal(score(streamed, again, TEXTS), want)
    options = PassOptions(memory=0, tokens=50)  # many passes, every stream on disk
    equal(score(streamed, again, TEXTS, passes=options, token_budget=40), want)


def test_prompts_that_begin_alike(where):
    names = str(where / "base"), str(where / "adapter")
    pair, tokenizer = load_pair(*names)
    streamed, _ = stream_pair(*names)
    texts = [*("a header that many share: " + text[:9] for text in TEXTS * 6), "of its own"]
    want = score(pair, tokenizer, texts, share_prefixes=False)
    got = score(streamed, tokenizer, texts, passes=PassOptions(memory=0))
    assert got.shared > 0.5
    equal(got, want)


def test_gguf(where):
    names = str(where / "base.gguf"), str(where / "tuned.gguf")
    tokens = [np.arange(3, 3 + n, dtype=np.int32) for n in (4, 9, 1)]
    prompts = as_prompts(["a", "b", "c"])
    pair = load_pair_without_words(*names)
    streamed = stream_without_words(*names)
    equal(score_tokens(streamed, tokens, prompts), score_tokens(pair, tokens, prompts))


def load_pair_without_words(base, tuned):
    from tuco_jax.models.pair import Pair

    base, tuned = (load_model(m, tokenizer=False) for m in (base, tuned))
    return Pair(base.params, tuned.params, {}, base.config, tuned.config)


def stream_without_words(base, tuned):
    from tuco_jax.core.walk import ends_of
    from tuco_jax.weights.load import open_model

    one, other = (open_model(m, tokenizer=False).weights for m in (base, tuned))
    ends = ends_of(load_pair_without_words(base, tuned))
    return Streamed(ends, lambda i: (one.layer(i), other.layer(i), {}))


def test_a_pair_in_host_memory_and_of_one_layer(where):
    tokenizer = tiny_tokenizer()
    one = rm.config(depth=1, rope_index=(0,), windows=(0,), vocab_size=272)
    for pair in (
        load_pair(str(where / "base"), str(where / "adapter"))[0],
        rm.full_pair(base=one),
    ):
        equal(score(Streamed.of(pair), tokenizer, TEXTS[:4]), score(pair, tokenizer, TEXTS[:4]))


def test_weights_are_read_once_a_pass(where):
    streamed, tokenizer = stream_pair(str(where / "base"), str(where / "tuned"))
    read, original = [], streamed._read

    def counted(index):
        read.append(index)
        return original(index)

    streamed._read = counted
    score(streamed, tokenizer, TEXTS, token_budget=40)
    assert read == [0, 1, 2]
    read.clear()
    score(streamed, tokenizer, TEXTS, token_budget=40, passes=PassOptions(tokens=100))
    assert read == [0, 1, 2] * (len(read) // 3) and len(read) > 3


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_the_fingerprint_is_that_of_the_pair_in_memory(where, tuned):
    names = str(where / "base"), str(where / tuned)
    tokens = [np.arange(5, dtype=np.int32)]
    pair = load_pair(*names)[0]
    key = scores_fingerprint(pair, tokens, 1)
    assert scores_fingerprint(Split(pair), tokens, 1) == key
    streamed = stream_pair(*names)[0]
    assert (
        scores_fingerprint(streamed, tokens, 1) == key != scores_fingerprint(streamed, tokens, 2)
    )
    other = stream_pair(*names, dtype="bfloat16")[0]
    assert scores_fingerprint(other, tokens, 1) != key


def test_passes_hold_what_they_may(tmp_path):
    batches = pack([30] * 40, 64)
    tokens = {b.size * b.length for b in batches}
    assert len(tokens) == 1
    (each,) = tokens
    options = PassOptions(tokens=3 * each + 1, folder=str(tmp_path))
    some = list(passes_of(batches, 32, options))
    assert [b for part in some for b in part] == batches
    assert {len(part) for part in some[:-1]} == {3} and 1 <= len(some[-1]) <= 3
    options = PassOptions(tokens=1, folder=str(tmp_path))
    assert [len(part) for part in passes_of(batches, 32, options)] == [1] * len(batches)
    assert len(list(passes_of(batches, 32, PassOptions(folder=str(tmp_path))))) == 1


def test_little_room_on_disk_is_more_passes(tmp_path, monkeypatch):
    batches = pack([30] * 40, 64)
    bytes_each = 4 * 32 * batches[0].size * batches[0].length
    free = type("Usage", (), {"free": 4 * bytes_each})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    options = PassOptions(memory=0, folder=str(tmp_path))
    assert {len(part) for part in list(passes_of(batches, 32, options))[:-1]} == {2}


def test_a_killed_run_goes_on_with_the_pass_it_was_in(where, tmp_path):
    """Scores of whole passes are in the journal; no stream stays behind on disk."""
    streamed, tokenizer = stream_pair(str(where / "base"), str(where / "tuned"))
    prompts = as_prompts(TEXTS)
    tokens = [np.asarray(tokenizer(t)["input_ids"], np.int32) for t in TEXTS]
    options: Any = dict(
        token_budget=40, passes=PassOptions(memory=0, tokens=100, folder=str(tmp_path))
    )
    whole = score_tokens(streamed, tokens, prompts, **options)
    original, calls = streamed._read, []

    def killed(index):
        calls.append(index)
        if len(calls) > 5:  # in the second pass
            raise KeyboardInterrupt
        return original(index)

    streamed._read = killed
    key = scores_fingerprint(stream_pair(str(where / "base"), str(where / "tuned"))[0], tokens, 1)
    journal = Journal(tmp_path / "journal")
    journal.begin(key)
    with pytest.raises(KeyboardInterrupt):
        score_tokens(streamed, tokens, prompts, journal=journal, **options)
    journal.close()
    streamed._read = original
    journal = Journal(tmp_path / "journal")
    journal.begin(key)
    scores = score_tokens(streamed, tokens, prompts, journal=journal, **options)
    assert 0 < scores.resumed < len(TEXTS)
    np.testing.assert_array_equal(scores.tuco, whole.tuco)
    np.testing.assert_array_equal(scores.layers, whole.layers)
    journal.remove()
    assert not list(tmp_path.iterdir())


def write_prompts(path, texts):
    path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    return str(path)


def file_options(base, tuned, prompts, out, **more):
    return ScoreFileOptions(base=base, tuned=tuned, prompts=prompts, out=out, **more)


def test_score_file(where, tmp_path):
    """The same table, the same notes; metadata say how it streamed."""
    prompts = write_prompts(tmp_path / "p.jsonl", TEXTS)
    names = str(where / "base"), str(where / "tuned"), prompts
    meta = {}
    for stream in (False, True):
        out = tmp_path / f"{stream}.jsonl"
        options = file_options(*names, str(out), stream=stream, layers=True)
        meta[stream] = score_file(options, progress=False)
    rows = [
        [json.loads(line) for line in (tmp_path / f"{s}.jsonl").read_text().splitlines()]
        for s in (False, True)
    ]
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys() and one["id"] == other["id"]
        np.testing.assert_allclose(one["layers"], other["layers"], rtol=0, atol=1e-5)
        assert abs(one["tuco"] - other["tuco"]) < 1e-5
    assert meta[True]["notes"] == meta[False]["notes"]
    assert meta[True]["stream"]["folder"] == str(tmp_path) and meta[False]["stream"] is None
    assert meta[True]["seconds"]["compile"] > 0


def test_bad_input(where, tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", ["a"])
    names = str(where / "base"), str(where / "tuned"), prompts, str(tmp_path / "o.jsonl")
    with pytest.raises(InputError, match="runs on one device: leave out mesh and parallel"):
        score_file(file_options(*names, stream=True, mesh=MeshOptions(data=2)))
    with pytest.raises(InputError, match="runs on one device: leave out mesh and parallel"):
        score_file(file_options(*names, stream=True, parallel="pmap"))
    for options, message in (
        (PassOptions(memory=-1), "passes.memory must be 0 or more, not -1"),
        (PassOptions(tokens=0), "passes.tokens must be 1 or more, not 0"),
        (PassOptions(folder=str(tmp_path / "absent")), "absent: no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            score_file(file_options(*names, stream=True, passes=options))
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_spoilt_layer_is_named_before_any_score(where, tmp_path):
    from safetensors.numpy import load_file, save_file

    save_tiny(tmp_path / "tuned", "llama", seed=1)
    path = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = np.inf
    save_file(tensors, path)
    prompts = write_prompts(tmp_path / "p.jsonl", ["a"])
    out = tmp_path / "o.jsonl"
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN or inf"):
        names = str(where / "base"), str(tmp_path / "tuned"), prompts, str(out)
        score_file(file_options(*names, stream=True))
    assert not out.exists()


def test_programs_are_two_a_shape(where):
    """A middle layer's and the last one's, whatever the number of batches, passes and layers."""
    from tuco_jax.core.walk import program

    streamed, tokenizer = stream_pair(str(where / "base"), str(where / "tuned"))
    jax.clear_caches()
    scores = score(streamed, tokenizer, TEXTS, token_budget=40, passes=PassOptions(tokens=90))
    function = program(next(iter(streamed.layers(0, 1))))
    assert function._cache_size() == 2 * len(scores.shapes)
