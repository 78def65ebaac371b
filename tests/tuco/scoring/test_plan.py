"""A planned pair against the pair itself: bytes, exchanges, FLOPs; and what is refused."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.cli.options import MeshOptions
from common_jax.errors import InputError
from common_jax.mesh import batch_sharding, make_mesh
from tests.tuco.tiny import tiny_config
from tuco_jax.cli import main
from tuco_jax.core.last_token import last_token
from tuco_jax.models import decoder
from tuco_jax.models.decoder import param_shapes
from tuco_jax.models.families import from_huggingface
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import place
from tuco_jax.scoring.plan import PlanOptions, plan_score

SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=8)
SIZES |= dict(head_dim=8, num_hidden_layers=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with config.json, and nothing else; it says nothing of a type."""
    found = tmp_path_factory.mktemp("model")
    tiny_config("llama", **SIZES).save_pretrained(found)
    return str(found)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The same of weights that are stored in bfloat16."""
    found = tmp_path_factory.mktemp("published")
    tiny_config("llama", **SIZES, dtype="bfloat16").save_pretrained(found)
    return str(found)


@pytest.mark.parametrize(
    ("stored", "precision"),
    [("folder", "float32"), ("published", "bfloat16x3"), ("published", "bfloat16")],
)
def test_a_plan_is_what_the_pair_takes(stored, precision, request):
    found, _ = plan_score(
        PlanOptions(
            base=request.getfixturevalue(stored),
            precision=precision,
            mesh=MeshOptions(2, 2, 2),
            batch=8,
            tokens=32,
            device="h100",
        )
    )
    config, mesh = from_huggingface(tiny_config("llama", **SIZES)), make_mesh(2, 2, 2)
    config = dataclasses.replace(config, precision=precision)
    dtype = jnp.float32 if stored == "folder" else jnp.bfloat16
    params = jax.tree.map(lambda x: x.astype(dtype), decoder.init(config, jax.random.key(0)))
    pair = place(Pair(params, params, {}, config, config), mesh)
    given = jax.device_put(
        (np.ones((8, 32), np.int32), np.ones((8, 32), bool)), batch_sharding(mesh, 8)
    )

    def score(pair, tokens, mask):
        out = last_token(pair, tokens, mask, mesh=mesh)
        return out.tuco, out.layers, out.telescoping

    # What a score does not read, such as heads, is held all the same. A CPU would cast all layers'
    # bfloat16 weights ahead of the loop, where an accelerator casts none.
    as_others: dict[str, str | bool] = {
        "xla_disable_hlo_passes": "while-loop-invariant-code-motion"
    }
    options = as_others if dtype == jnp.bfloat16 else None
    compiled = jax.jit(score, keep_unused=True).lower(pair, *given).compile(options)
    measured: Any = compiled.memory_analysis()
    for name in ("base", "tuned"):
        held = sum(
            x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(getattr(pair, name))
        )
        assert found.bytes[name] == held
    whole = sum(found.bytes[name] for name in ("base", "tuned", "lora", "inputs"))
    assert whole == pytest.approx(measured.argument_size_in_bytes, rel=0.01)
    assert found.bytes["output"] == pytest.approx(measured.output_size_in_bytes, rel=0.1)
    total = measured.argument_size_in_bytes + measured.output_size_in_bytes
    assert found.held == pytest.approx(total + measured.temp_size_in_bytes, rel=0.1)
    live = jax.tree.leaves((pair, given, compiled(pair, *given)))  # what a run leaves
    arrays = sum(x.addressable_shards[0].data.nbytes for x in live)
    assert found.held == pytest.approx(arrays + measured.temp_size_in_bytes, rel=0.1)
    assert found.kinds()["all-gather"]["count"] >= 4 and found.sent > 0
    # One model's products at every token but the last layer's, keys and values of both.
    matrices = sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim == 3)
    products = (3 if precision == "bfloat16x3" else 1) * 2 * 8 * 32 * matrices
    assert 0.75 * products < found.flops < 2 * products


@pytest.mark.parametrize(
    ("dtype", "stored", "asked", "held", "precision"),
    [  # what `score` would take on a TPU or an H100 (tests/tuco/weights/test_precision.py)
        ("float32", "published", "auto", "bfloat16", "bfloat16x3"),
        ("float32", "folder", "auto", "float32", "float32"),
        ("bfloat16", "folder", "auto", "bfloat16", "bfloat16x3"),
        ("bfloat16", "folder", "bfloat16", "bfloat16", "bfloat16"),
        ("float32", "published", "float32", "float32", "float32"),
        ("float16", "published", "auto", "float16", "float32"),
        ("int8", "published", "auto", "int8", "bfloat16x3"),
    ],
)
def test_products_are_those_of_a_score(request, dtype, stored, asked, held, precision):
    where, batch, tokens = request.getfixturevalue(stored), 8, 32
    found, device = plan_score(
        PlanOptions(base=where, dtype=dtype, precision=asked, batch=batch, tokens=tokens)
    )
    assert (found.dtype, found.precision) == (held, precision)
    assert found.on(device)["precision"] == precision
    assert found.lines(device)[0].endswith(f"{held} weights, products in {precision}")
    params = param_shapes(from_huggingface(tiny_config("llama", **SIZES)))
    matrices = sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim == 3)
    parts = {"float32": 0, "bfloat16": 1, "bfloat16x3": 3}[precision]
    taken = found.products["bfloat16" if parts else "float32"]
    passes = max(parts, 1) * 2 * batch * tokens * matrices
    assert 0.75 * passes < taken < 2 * passes  # two models, each pruned in its last layer
    rates = {"bfloat16": 197e12, "float32": 197e12 / 6}
    seconds = sum(flops / rates[kind] for kind, flops in found.products.items())
    assert found.seconds(device)["compute"] == pytest.approx(seconds)
    size = {"int8": 1, "bfloat16": 2, "float16": 2, "float32": 4}[held]
    assert found.traffic > 2 * max(parts, 1) * matrices * size


def test_int8_weights_are_planned_as_they_are_held(published):
    found, device = plan_score(
        PlanOptions(base=published, dtype="int8", rank=2, mesh=MeshOptions(1, 2, 1), tokens=16)
    )
    params = param_shapes(from_huggingface(tiny_config("llama", **SIZES)))
    matrices = [x.size for x in jax.tree.leaves(params["layers"]) if x.ndim == 3]
    rest = sum(x.size for x in jax.tree.leaves(params)) - sum(matrices)
    assert sum(matrices) / 2 < found.bytes["base"] < (1.3 * sum(matrices) + 2 * rest) / 2
    assert found.bytes["tuned"] == 0 and found.on(device)["dtype"] == "int8"


def test_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "plan.json"
    argv = ["plan", "--base", folder, "--rank", "2", "--tokens", "16", "--out", str(out)]
    assert main([*argv, "--mesh.data", "2", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "2 x TPU v5e" in said and "what binds: " in said and "lora" in said
    figures = json.loads(out.read_text())
    kinds = figures["bytes_a_device"]
    assert kinds["tuned"] == 0 < kinds["lora"] < kinds["base"] and figures["dtype"] == "bfloat16"
    assert "products in bfloat16x3" in said and figures["precision"] == "bfloat16x3"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": "no/such/place/at/all"}, "no such directory"),
        ({"rank": 2, "tuned": "same"}, "rank is of an adapter in place of a tuned model"),
        ({"mesh": MeshOptions(-1)}, "a plan wants each size"),
        ({"mesh": MeshOptions(2000)}, "at most 1024 are planned for"),
        ({"tokens": 65}, "tokens is 65, but the models' context is 64"),
        ({"batch": 0}, "batch must be 1 or more"),
        ({"dtype": "float16", "precision": "bfloat16"}, "not weights of --dtype float16"),
        ({"precision": "bfloat16x2"}, "its weights are stored in float32, and --precision bfl"),
        ({"topology": "v5e:2x4", "device": "h100"}, "topology v5e:2x4 is of TPUs: give device"),
        ({"batch": 10**15}, "batch must be at most 2147483647 to be planned"),
        ({"batch": 2 * 10**9}, "batch 2000000000 of 16 tokens are 3.2e.10, and a compiler counts"),
        ({"rank": 10**18}, "rank must be at most 2147483647 to be planned"),
    ],
)
def test_what_cannot_be_planned_is_refused(folder, changes, said):
    given = {"base": folder, "tokens": 16} | {
        k: folder if v == "same" else v for k, v in changes.items()
    }
    with pytest.raises(InputError, match=said):
        plan_score(PlanOptions(**given))


def test_a_config_that_is_missing_and_a_device_that_is_unknown(tmp_path, folder, capsys):
    assert main(["plan", "--base", str(tmp_path)]) == 2
    assert "config.json: no such file" in capsys.readouterr().err
    assert main(["plan", "--base", folder, "--device", "abacus"]) == 2
    assert "device" in capsys.readouterr().err
