import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from common_jax.mesh import batch_sharding, make_mesh
from tests.tuco import random_models
from tests.tuco.finetune.test_batches import examples
from tests.tuco.tiny import save_tiny
from tuco_jax.finetune.batches import Batch, Plan, bucket, pack
from tuco_jax.finetune.conversations import Example
from tuco_jax.finetune.step import Method, OptimizerOptions, make_eval, make_step, start
from tuco_jax.models import sharding
from tuco_jax.weights.hf import model as huggingface

STEPS = 5
OPTIONS = OptimizerOptions(learning_rate=0.02, warmup=2, final=0.1, weight_decay=0.1, clip=0.5)
MODULES = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


def data(vocab, count=24):
    made = examples(np.random.default_rng(5).integers(6, 20, count), seed=6)
    return [Example(e.tokens % vocab, e.answer) for e in made]


def one(batch):
    return Batch(*(jnp.asarray(a)[None] for a in batch))


def torch_adapter(model, factors, alpha, rank):
    """The model with PEFT's adapter around it, of the same factors."""
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for path, value in flatten_dict(factors["layers"], sep="/").items():
            ours, kind = path.rsplit("/", 1)
            for layer, part in enumerate(np.asarray(value)):
                stem = f"base_model.model.model.layers.{layer}.{MODULES[ours]}"
                name = f"{stem}.lora_{kind.upper()}.default.weight"
                wrapped.get_parameter(name).copy_(torch.from_numpy(part.T.copy()))
    return wrapped


def torch_losses(model, rows, weight_decay):
    """Losses of a PyTorch loop over the same batches."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=weight_decay)
    losses = []
    for step, batch in enumerate(rows):
        optimizer.param_groups[0]["lr"] = OPTIONS.learning_rate * (
            (step + 1) / OPTIONS.warmup
            if step < OPTIONS.warmup
            else OPTIONS.final
            + (1 - OPTIONS.final)
            * 0.5
            * (1 + np.cos(np.pi * (step - OPTIONS.warmup) / (STEPS - OPTIONS.warmup)))
        )
        tokens = torch.from_numpy(np.asarray(batch.tokens)).long()
        labels = torch.full_like(tokens, -100)
        for r, c in zip(*np.nonzero(batch.weights), strict=True):
            labels[r, batch.columns[r, c] + 1] = int(batch.targets[r, c])
        mask = torch.from_numpy(np.asarray(batch.mask)).long()
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, OPTIONS.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_lora_training_equals_peft(tmp_path):
    hf, _ = save_tiny(tmp_path / "base", "llama", 3)
    model = huggingface.load(str(tmp_path / "base"))
    plan = Plan([bucket(data(model.config.vocab_size, 32))[-1]], 4, seed=0)
    rows = [plan.batch(i) for i in range(STEPS)]
    factors = random_models.lora(model.config, 7, rank=4, scale=0.2)
    expected = torch_losses(torch_adapter(hf, factors, 6, 4), rows, OPTIONS.weight_decay)

    optimizer = OPTIONS.make(STEPS)
    step = make_step(model.config, Method(1.5, "float32"), optimizer)
    state = start(factors, optimizer)
    losses = []
    for batch in rows:
        state, metrics = step(state, model.params, one(batch))
        losses.append(float(metrics["loss"]))
        assert metrics["grad_norm"] > OPTIONS.clip
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    assert np.ptp(losses) > 0.1


@pytest.mark.parametrize("layout", [None, (2, 2, 2)], ids=str)
def test_full_tuning_of_a_mixture_of_experts_equals_pytorch(layout, tmp_path):
    """Routers, too; over a mesh each device learns from its own rows."""
    hf, _ = save_tiny(tmp_path / "base", "mixtral", 3)
    model = huggingface.load(str(tmp_path / "base"))
    plan = Plan([bucket(data(model.config.vocab_size, 32))[-1]], 4, seed=0)
    rows = [plan.batch(i) for i in range(3)]
    expected = torch_losses(hf, rows, 0.0)

    mesh = layout and make_mesh(*layout)
    optimizer = dataclasses.replace(OPTIONS, weight_decay=0.0).make(STEPS)
    step = make_step(model.config, Method(None, "float32"), optimizer, mesh=mesh)
    state, losses = start(copied(model.params), optimizer), []
    if mesh:
        state = sharding.place(state, mesh)
        rows = [jax.device_put(batch, batch_sharding(mesh, 4)) for batch in rows]
    for batch in rows:
        state, metrics = step(state, {}, one(batch))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    moved = state.trained["layers"]["mlp"]["router"]["kernel"]
    assert np.abs(moved - model.params["layers"]["mlp"]["router"]["kernel"]).max() > 1e-3


@pytest.fixture(scope="module")
def small():
    """A model, factors, and a step of eight rows, with what it should give."""
    config = random_models.config(heads=4, kv_heads=2, width=32, mlp_width=48, head_dim=8)
    params, lora = random_models.params(config, 1), random_models.lora(config, 2, rank=4)
    batch = Plan([pack(data(config.vocab_size), 20)], 8, seed=0).batch(0)
    assert batch.mask.all(axis=1).sum() < 8 <= batch.tokens.shape[0]
    optimizer = OPTIONS.make(10)
    step = make_step(config, Method(0.5, "float32"), optimizer)
    state, metrics = step(start(copied(lora), optimizer), params, one(batch))
    return config, params, lora, batch, optimizer, state.trained, metrics


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def assert_close(tree, expected, atol):
    flat: dict[str, Any] = flatten_dict(tree, sep="/")
    wanted: dict[str, Any] = flatten_dict(expected, sep="/")
    assert flat.keys() == wanted.keys()
    for path, value in flat.items():
        np.testing.assert_allclose(value, wanted[path], rtol=0, atol=atol, err_msg=path)


@pytest.mark.slow
def test_accumulation_equals_one_large_batch(small):
    config, params, lora, batch, optimizer, expected, metrics = small
    step = make_step(config, Method(0.5, "float32"), optimizer)
    parts = Batch(*(a.reshape(4, 2, *a.shape[1:]) for a in batch))
    assert len(set(parts.weights.sum(axis=(1, 2)).tolist())) > 1
    state, found = step(start(copied(lora), optimizer), params, parts)
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(found["grad_norm"], metrics["grad_norm"], rtol=1e-5)
    assert_close(state.trained, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_no_exchange_is_a_reduce_scatter(small, method):
    """To which, on CPUs, Gloo lets no process come 30 s after another (jax issue 40831)."""
    config, params, lora, batch, optimizer, *_ = small
    mesh, full = make_mesh(data=2, fsdp=2, tensor=2), method == "full"
    step = make_step(config, Method(None if full else 0.5, "float32"), optimizer, mesh=mesh)
    state = sharding.place(start(copied(params if full else lora), optimizer), mesh)
    rows = jax.device_put(one(batch), jax.NamedSharding(mesh, jax.P(None, ("data", "fsdp"))))
    base = {} if full else sharding.place(params, mesh)
    text = str(step.lower(state, base, rows).compile().as_text())
    assert "all-reduce" in text and "reduce-scatter" not in text


@pytest.mark.slow
def test_a_mesh_changes_nothing(small, caplog):
    config, params, lora, batch, optimizer, expected, metrics = small
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    step = make_step(config, Method(0.5, "float32"), optimizer, mesh=mesh)
    state = sharding.place(start(copied(lora), optimizer), mesh)
    where = jax.tree.map(lambda x: x.sharding, state)
    assert not state.trained["layers"]["mlp"]["up"]["b"].sharding.is_fully_replicated
    rows = jax.sharding.NamedSharding(mesh, jax.P(None, ("data", "fsdp")))
    placed = sharding.place(params, mesh)
    state, found = step(state, placed, jax.device_put(one(batch), rows))
    for x, there in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert x.sharding.is_equivalent_to(there, x.ndim)
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-6)
    assert_close(state.trained, expected, 1e-5)
    caplog.clear()
    with jax.log_compiles():
        step(state, placed, jax.device_put(one(batch), rows))
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]


@pytest.mark.slow
def test_full_tuning_in_bfloat16_holds_float32(small):
    config, params, _, batch, _, _, _ = small
    optimizer = OptimizerOptions(learning_rate=1e-5, warmup=0).make(10)
    step = make_step(config, Method(None, "bfloat16"), optimizer)
    state, metrics = step(start(copied(params), optimizer), {}, one(batch))
    loss, count = make_eval(config, Method(None, "float32"))(params, {}, batch)
    np.testing.assert_allclose(metrics["loss"], loss / count, rtol=0.02)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(state.trained), strict=True):
        assert new.dtype == jnp.float32
        # Adam's first step moves each weight by the learning rate: bfloat16 would lose it.
        assert 0 < float(jnp.abs(new - old).max()) < 2.1e-5


def test_schedule():
    rates = [np.asarray(OPTIONS.schedule(12)(i)).item() for i in range(12)]
    np.testing.assert_allclose(rates[:3], [0.01, 0.02, 0.02], rtol=1e-6)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    np.testing.assert_allclose(OPTIONS.schedule(12)(12), 0.002, rtol=1e-6)
    np.testing.assert_allclose(OptimizerOptions(warmup=0).schedule(5)(0), 2e-4, rtol=1e-6)


@pytest.mark.slow
def test_weight_decay_spares_norms_and_biases():
    params = {
        "layers/mlp/up/kernel": jnp.ones((2, 3, 4)),
        "layers/mlp/up/bias": jnp.ones((2, 4)),
        "layers/mlp_norm/scale": jnp.ones((2, 3)),
        "embed/table": jnp.ones((5, 3)),
    }
    tree = unflatten_dict(params, sep="/")
    optimizer = OptimizerOptions(learning_rate=0.1, warmup=0, weight_decay=0.5).make(4)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    updates, _ = optimizer.update(zeros, optimizer.init(tree), tree)
    flat: dict[str, Any] = flatten_dict(updates, sep="/")
    moved = {path for path, update in flat.items() if np.any(update)}
    assert moved == {"layers/mlp/up/kernel", "embed/table"}
