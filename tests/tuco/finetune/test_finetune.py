import dataclasses
import json
import os
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import yaml
from flax.traverse_util import flatten_dict
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from common_jax.cli.options import MeshOptions
from common_jax.errors import InputError
from common_jax.run import Run
from common_jax.termination import Terminated
from tests.tuco.tiny import save_tiny, tiny_tokenizer
from tests.tuco.weights.gguf import writer as gguf_writer
from tuco_jax.finetune import finetune
from tuco_jax.finetune.finetune import run_finetune
from tuco_jax.finetune.lora import LoraOptions
from tuco_jax.finetune.options import FinetuneConfig
from tuco_jax.finetune.step import OptimizerOptions
from tuco_jax.generation.generate import end_tokens
from tuco_jax.models import decoder
from tuco_jax.models.positions import Positions
from tuco_jax.prompts.read import read_prompts
from tuco_jax.scoring.score import score
from tuco_jax.weights.load import load_model, load_pair
from tuco_jax.weights.orbax import store

WORDS = "red blue green seven eight nine cat dog bird".split()


@pytest.fixture(autouse=True, scope="module")
def _compile_once(tmp_path_factory):
    """Runs of one test module share their compiled programs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    old = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield
    for name, value in old.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def conversation(rng):
    question, answer = (" ".join(rng.choice(WORDS, n)) for n in (2, 2))
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny base, rows to train on, and prompts to watch."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "base", "llama", 5)
    rng = np.random.default_rng(0)
    rows = [json.dumps(conversation(rng)) for _ in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    watched = [
        {"id": i, "label": "ab"[i % 2], "messages": conversation(rng)["messages"][:1]}
        for i in range(4)
    ]
    (folder / "watched.jsonl").write_text("\n".join(map(json.dumps, watched)) + "\n")
    return folder


def settings(files, out, **changes):
    fields: dict[str, Any] = dict(
        base=str(files / "base"),
        data=str(files / "rows.jsonl"),
        out=str(out),
        lora=LoraOptions(rank=4, alpha=8),
        optimizer=OptimizerOptions(learning_rate=0.01, warmup=2),
        steps=6,
        batch=2,
        length=64,
        eval_fraction=0.2,
        watch=str(files / "watched.jsonl"),
        eval_every=3,
        watch_every=3,
        save_every=2,
    )
    return FinetuneConfig(**(fields | changes))


@pytest.fixture(scope="module")
def adapter(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "lora"
    return run_finetune(settings(files, out))


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything(files, adapter):
    out = adapter.parent
    assert adapter == out / "adapter"
    rows = metrics(out)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    held_out = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert list(held_out) == [0, 3, 6] and held_out[6] < held_out[0]
    assert {"grad_norm", "learning_rate", "tokens", "tokens_per_second"} <= rows[1].keys()
    config = yaml.safe_load((out / "config.yaml").read_text())
    again = FinetuneConfig(
        **config
        | {
            "lora": LoraOptions(**config["lora"]),
            "optimizer": OptimizerOptions(**config["optimizer"]),
            "mesh": MeshOptions(**config["mesh"]),
        }
    )
    assert again == settings(files, out)
    assert list((out / "tensorboard").glob("events*"))


def test_tuco_is_watched_while_it_grows(files, adapter):
    rows = {row["step"]: row for row in metrics(adapter.parent) if "tuco/mean" in row}
    assert list(rows) == [0, 3, 6]
    assert rows[0]["tuco/mean"] < 1e-6  # B is zero, the tuned model is the base, up to rounding
    assert 0 < rows[3]["tuco/mean"] < rows[6]["tuco/mean"]
    assert all(0 < row["tuco/telescoping"] < 1e-4 for row in rows.values())
    # What was watched is what `score` finds for the exported adapter.
    pair, tokenizer = load_pair(str(files / "base"), str(adapter))
    tuco = score(pair, tokenizer, read_prompts(files / "watched.jsonl")).tuco
    np.testing.assert_allclose(tuco.mean(), rows[6]["tuco/mean"], atol=1e-6)
    np.testing.assert_allclose(tuco[::2].mean(), rows[6]["tuco/a"], atol=1e-6)
    np.testing.assert_allclose(tuco[1::2].mean(), rows[6]["tuco/b"], atol=1e-6)


def our_logits(config, params, lora, tokens):
    positions = Positions.of(config, jnp.ones(tokens.shape))
    x = decoder.embed(config, params, tokens, positions)
    x, _ = decoder.forward(config, params, x, positions, lora)
    return decoder.logits(config, params, x, lora)


def test_peft_loads_the_adapter_with_equal_logits(files, adapter):
    base = AutoModelForCausalLM.from_pretrained(files / "base")
    tuned = peft.PeftModel.from_pretrained(base, adapter)
    tokens = np.random.default_rng(1).integers(0, 256, (2, 12))
    with torch.no_grad():
        expected = tuned(torch.from_numpy(tokens)).logits
        plain = base.eval()
    pair, _ = load_pair(str(files / "base"), str(adapter))
    logits = our_logits(pair.tuned_config, pair.base, pair.lora, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    with tuned.disable_adapter(), torch.no_grad():
        assert (plain(torch.from_numpy(tokens)).logits - expected).abs().max() > 0.1


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """A fully tuned model."""
    out = tmp_path_factory.mktemp("runs") / "full"
    return run_finetune(settings(files, out, method="full"))


@pytest.mark.slow
def test_a_run_that_is_told_to_end_saves_first(files, tmp_path, monkeypatch):
    log = Run.log

    def stopping(self, step, values):
        log(self, step, values)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", stopping)
    with pytest.raises(Terminated, match="step 1 of .* is saved, from which the run goes on"):
        run_finetune(settings(files, tmp_path / "run", method="lora"))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*")] == ["1"]


@pytest.mark.slow
@pytest.mark.parametrize("method, kill_at", [("lora", 1), ("lora", 5), ("full", 5)])
def test_kill_and_resume_changes_nothing(files, request, tmp_path, monkeypatch, method, kill_at):
    uninterrupted = request.getfixturevalue({"lora": "adapter", "full": "whole"}[method])
    out = tmp_path / "run"
    log = Run.log

    def killed(self, step, values):
        log(self, step, values)
        if step == kill_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        run_finetune(settings(files, out, method=method))
    monkeypatch.undo()
    assert metrics(out)[-1]["step"] == kill_at and not (out / uninterrupted.name).exists()
    run_finetune(settings(files, out, method=method, resume=True))

    def timeless(rows):
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]

    assert timeless(metrics(out)) == timeless(metrics(uninterrupted.parent))
    for one in uninterrupted.glob("*.safetensors"):
        assert one.read_bytes() == (out / uninterrupted.name / one.name).read_bytes()
    assert list(uninterrupted.glob("*.safetensors"))
    assert len(json.loads((out / "environment.json").read_text())) == 2


def test_a_store_is_a_base_like_any_other(files, adapter, tmp_path):
    """Of what is trained over a store, the same adapter comes, and the same whole model."""
    base = tmp_path / "store"
    store.save(base, load_model(str(files / "base")))
    found = run_finetune(settings(files, tmp_path / "lora", base=str(base)))
    one, other = (a / "adapter_model.safetensors" for a in (adapter, found))
    assert one.read_bytes() == other.read_bytes()
    config = settings(files, tmp_path / "full", base=str(base), method="full", steps=2)
    directory = run_finetune(config)
    config = dataclasses.replace(config, base=str(files / "base"), out=str(tmp_path / "again"))
    again = run_finetune(config)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (directory / name).read_bytes() == (again / name).read_bytes(), name


def test_full_tuning_of_a_gguf_exports_a_model_that_transformers_loads(
    files, tmp_path, monkeypatch
):
    hf = AutoModelForCausalLM.from_pretrained(files / "base")
    base = str(tmp_path / "base.gguf")
    gguf_writer.write(tmp_path / "base.gguf", hf, hf.config)
    found = load_model(base)._replace(tokenizer=tiny_tokenizer())
    monkeypatch.setattr(finetune, "load_model", lambda *a, **b: found)
    config = settings(files, tmp_path / "full", base=base, method="full", steps=2)
    directory = run_finetune(config)
    monkeypatch.undo()
    again = dataclasses.replace(config, base=str(files / "base"), out=str(tmp_path / "again"))
    want = load_file(run_finetune(again) / "model.safetensors")
    got = load_file(directory / "model.safetensors")
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)
    tokens = torch.arange(12)[None] * 7
    ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    assert ends == list(end_tokens(tiny_tokenizer()))
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(d)(tokens).logits
            for d in (directory, tmp_path / "again" / "model")
        )
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_full_tuning_of_what_no_huggingface_config_says_exports_a_store(
    files, tmp_path, monkeypatch
):
    found = load_model(str(files / "base"))._replace(hf_config=None)
    monkeypatch.setattr(finetune, "load_model", lambda *a, **b: found)
    directory = run_finetune(settings(files, tmp_path / "full", method="full", steps=1))
    assert store.is_store(str(directory))
    assert load_model(str(directory)).config == found.config


def test_full_tuning_exports_a_model_that_transformers_loads(files, whole):
    directory = whole
    assert directory == whole.parent / "model"
    hf = AutoModelForCausalLM.from_pretrained(directory)
    ours = load_model(str(directory))
    tokens = np.random.default_rng(1).integers(0, 256, (2, 12))
    with torch.no_grad():
        expected = hf(torch.from_numpy(tokens)).logits
    logits = our_logits(ours.config, ours.params, {}, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    base: dict[str, Any] = flatten_dict(load_model(str(files / "base")).params, sep="/")
    for path, value in flatten_dict(ours.params, sep="/").items():
        assert np.abs(value - base[path]).max() > 1e-3, path
    rows = [row for row in metrics(whole.parent) if "tuco/mean" in row]
    assert rows[0]["tuco/mean"] < 1e-6 < rows[-1]["tuco/mean"]


def test_a_mesh_and_accumulation_train_alike(files, adapter, tmp_path):
    config = settings(
        files,
        tmp_path / "run",
        batch=2,
        mesh=MeshOptions(data=2, fsdp=1, tensor=2),
        steps=2,
        optimizer=OptimizerOptions(learning_rate=0.01, warmup=20),
    )
    run_finetune(config)
    alone = dataclasses.replace(
        config, out=str(tmp_path / "alone"), mesh=MeshOptions(), batch=1, accumulate=2
    )
    run_finetune(alone)
    for a, b in zip(metrics(tmp_path / "run"), metrics(tmp_path / "alone"), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"tokens_per_second"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert any("tuco/mean" in row for row in metrics(tmp_path / "run"))


def test_divergence_stops_and_names_the_step(files, tmp_path, monkeypatch):
    make_step = finetune.make_step

    def poisoned(*args, **options):
        step = make_step(*args, **options)

        def run(state, base, batch):
            if state.step == 3:
                state = jax.tree.map(lambda x: x * np.nan if x.ndim else x, state)
            return step(state, base, batch)

        return run

    monkeypatch.setattr(finetune, "make_step", poisoned)
    out = tmp_path / "run"
    with pytest.raises(InputError, match=rf"step 4: loss nan.*checkpoint is {out}/checkpoints/2"):
        run_finetune(settings(files, out, log_every=5, packing=False, watch=None))
    assert (out / "checkpoints" / "2").is_dir() and not (out / "checkpoints" / "4").exists()
    assert not (out / "adapter").exists()


@pytest.mark.parametrize("steps", [1, 4])
def test_an_update_that_ruins_the_weights_is_neither_saved_nor_exported(
    files, tmp_path, monkeypatch, steps
):
    """Its own step's loss is finite: it is of the weights before."""
    make_step = finetune.make_step

    def ruined(*args, **options):
        step = make_step(*args, **options)

        def run(state, base, batch):
            state, metrics = step(state, base, batch)
            if int(state.step) == steps:
                trained = jax.tree.map(lambda x: x * np.inf, state.trained)
                state = state._replace(trained=trained)
            return state, metrics

        return run

    monkeypatch.setattr(finetune, "make_step", ruined)
    out = tmp_path / "run"
    checkpoint = (
        "there is no checkpoint yet" if steps == 1 else f"checkpoint is {out}/checkpoints/2"
    )
    with pytest.raises(InputError, match=rf"step {steps}: its update made weights .*{checkpoint}"):
        run_finetune(settings(files, out, steps=steps, watch=None))
    assert not (out / "adapter").exists()
    assert not (out / "checkpoints" / str(steps)).exists()


def test_export_in_bfloat16_is_half_as_large(files, adapter, tmp_path):
    half = run_finetune(settings(files, tmp_path / "run", export_dtype="bfloat16"))
    sizes = [(a / "adapter_model.safetensors").stat().st_size for a in (adapter, half)]
    assert sizes[1] < 0.7 * sizes[0]
    pair, _ = load_pair(str(files / "base"), str(adapter))
    rounded, _ = load_pair(str(files / "base"), str(half))
    for a, b in zip(jax.tree.leaves(pair.lora), jax.tree.leaves(rounded.lora), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "steps must be 1 or more"),
        (dict(batch=0), "batch must be 1 or more"),
        (dict(lora=LoraOptions(rank=0)), "lora.rank must be 1"),
        (dict(lora=LoraOptions(alpha=0.0)), "lora.alpha must be above 0"),
        (dict(lora=LoraOptions(targets=["w"])), "lora.targets: the model has no linear layer 'w'"),
        (dict(eval_fraction=1.0), "eval_fraction must be 0 or more and below 1, not 1"),
        (dict(eval_fraction=0.99), "eval_fraction leaves no row of 20"),
        (dict(eval_data="x.jsonl"), "eval_data or eval_fraction, not both"),
        (dict(optimizer=OptimizerOptions(learning_rate=0)), "learning_rate must be above 0"),
        (dict(mesh=MeshOptions(data=4)), "batch: 2 rows cannot be sharded over 4 x 1 devices"),
        (dict(data="missing.jsonl"), "missing.jsonl: the prompts file does not exist"),
        (dict(watch="missing.jsonl"), "missing.jsonl: the prompts file does not exist"),
        (dict(length=20), r"rows.jsonl:\d+: \d+ tokens, but `length` is 20"),
        (dict(base="missing/base"), "missing/base: "),
        (dict(chat_template="gema"), "chat_template: 'gema' is neither a name"),
        (dict(chat_template="gemma"), "gemma marks turns with <start_of_turn>, which is no token"),
    ],
)
def test_bad_settings_write_nothing(files, tmp_path, changes, message):
    out = tmp_path / "run"
    with pytest.raises(InputError, match=message):
        run_finetune(settings(files, out, **changes))
    assert not out.exists()


def test_a_base_without_a_chat_template(files, tmp_path):
    save_tiny(tmp_path / "base", "llama", tokenizer=False)
    tokenizer = tiny_tokenizer()
    config = settings(files, tmp_path / "run", base=str(tmp_path / "base"))
    with pytest.raises(InputError, match="has no tokenizer"):
        run_finetune(config)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"rows.jsonl:\d+: .*no chat template"):
        run_finetune(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_template_is_trained_in_and_kept(files, tmp_path, method):
    save_tiny(tmp_path / "base", "llama", 5)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    template = "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    config = settings(
        files,
        tmp_path / "run",
        base=str(tmp_path / "base"),
        chat_template=str(tmp_path / "own.jinja"),
        method=method,
        save_every=6,
    )
    result = run_finetune(config)
    assert (result / "chat_template.jinja").read_text() == template
    pair, tokenizer = load_pair(config.base, str(result))
    assert tokenizer.chat_template == template
    assert "the tuned model's chat template is new: the base has none" in pair.notes
    # What was watched is what `score` finds through the template that it finds there.
    tuco = score(pair, tokenizer, read_prompts(files / "watched.jsonl")).tuco
    logged = [row for row in metrics(tmp_path / "run") if "tuco/mean" in row][-1]
    np.testing.assert_allclose(tuco.mean(), logged["tuco/mean"], atol=1e-6)
    (tmp_path / "own.jinja").write_text(template.replace(":", "="))
    with pytest.raises(InputError, match=r"the run there has rows of tokens \(their checksum\) '"):
        run_finetune(dataclasses.replace(config, resume=True))
    (tmp_path / "own.jinja").write_text(template)
    save_tiny(tmp_path / "base", "llama", 6)
    with pytest.raises(InputError, match=r"there has base's weights \(their checksum\) '"):
        run_finetune(dataclasses.replace(config, resume=True))
    other = dataclasses.replace(config, resume=True, chat_template=str(tmp_path / "other.jinja"))
    (tmp_path / "other.jinja").write_text(template)
    with pytest.raises(InputError, match=r"there has chat_template .*own.jinja', not '"):
        run_finetune(other)


def test_a_run_is_not_overwritten(files, adapter):
    out = adapter.parent
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds a run already; go on with it by --resume"):
        run_finetune(settings(files, out))
    other = OptimizerOptions(learning_rate=0.5)
    with pytest.raises(InputError, match=r"there has optimizer.learning_rate 0.\d+, not 0.5;"):
        run_finetune(settings(files, out, resume=True, optimizer=other))
    rng = np.random.default_rng(9)
    rows = [json.dumps(conversation(rng)) for _ in range(20)]
    (files / "other.jsonl").write_text("\n".join(rows))
    with pytest.raises(InputError, match="the run there has rows of tokens"):
        run_finetune(settings(files, out, resume=True, data=str(files / "other.jsonl")))
    assert (out / "metrics.jsonl").read_bytes() == before
