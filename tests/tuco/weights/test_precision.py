"""How products take activations is chosen from the weights and the device, or refused."""

import types

import jax
import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco.tiny import save_tiny
from tuco_jax.core.streamed import stream_pair
from tuco_jax.weights import precision as module
from tuco_jax.weights.load import load_model, load_pair
from tuco_jax.weights.orbax import store
from tuco_jax.weights.precision import Wanted, three_parts_pay

BOTH, ONE = {"a": frozenset({"bfloat16"})}, {"a": frozenset({"bfloat16"}), "b": frozenset({"Q4"})}
NONE = {"a": frozenset({"float32"})}


@pytest.fixture(params=[False, True], ids=["slow", "quick"])
def pays(request, monkeypatch):
    monkeypatch.setattr(module, "three_parts_pay", lambda spread: request.param)
    return request.param


def test_auto_is_as_exact_as_float32_and_as_quick_as_the_device_allows(pays):
    quick = "bfloat16x3" if pays else "float32"
    for dtype, stored, chosen in (
        ("float32", BOTH, quick),
        ("float32", ONE, quick),  # of the other model products are in float32
        ("float32", NONE, "float32"),
        ("bfloat16", NONE, quick),
        ("float16", BOTH, "float32"),
    ):
        assert Wanted(dtype, "auto").settled(stored) == chosen


@pytest.mark.parametrize("asked", ["float32", "bfloat16x3", "bfloat16x2", "bfloat16"])
def test_what_is_asked_for_is_what_is_done(pays, asked):
    assert Wanted("float32", asked).settled(BOTH) == asked
    assert Wanted("bfloat16", asked).settled(NONE) == asked
    if asked != "float32":
        with pytest.raises(InputError, match=f"^b: .* in Q4, and --precision {asked} .* --dtype"):
            Wanted("float32", asked).settled(ONE)
        with pytest.raises(InputError, match="not weights of --dtype float16: give --dtype bfl"):
            Wanted("float16", asked)


def test_a_precision_that_there_is_not():
    with pytest.raises(InputError, match="precision 'tf32' is not one of auto, float32, bfloat"):
        Wanted("float32", "tf32")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("device", "pays"),
    [
        ({"platform": "tpu"}, True),
        ({"platform": "gpu", "compute_capability": "9.0"}, True),
        ({"platform": "gpu", "compute_capability": "7.5"}, False),
        ({"platform": "gpu", "compute_capability": "gfx90a"}, False),
        ({"platform": "other"}, False),
    ],
)
def test_devices(device, pays, monkeypatch):
    best = types.SimpleNamespace(platform="tpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [best, types.SimpleNamespace(**device)])
    assert three_parts_pay() is pays


@pytest.mark.parametrize("amx", [False, True])
def test_on_a_cpu_parts_pay_with_amx_where_layers_are_programs_of_their_own(amx, monkeypatch):
    flags = "flags : avx512f" + " amx_bf16 amx_tile" * amx
    monkeypatch.setattr(module.pathlib.Path, "read_text", lambda path: flags)
    assert three_parts_pay() is amx and three_parts_pay(spread=True) is False


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "tuned")):
        save_tiny(folder / name, "llama", seed, dtype="bfloat16")
    save_tiny(folder / "wide", "llama", 1)
    return folder


def kinds(*trees):
    return {str(x.dtype) for x in jax.tree.leaves(trees)}


def test_weights_stay_as_published_where_products_take_them_so(where, pays, tmp_path):
    """Of safetensors, a store of a model and of a pair, in memory and streamed."""
    base, tuned, wide = (str(where / name) for name in ("base", "tuned", "wide"))
    held = {"bfloat16"} if pays else {"float32"}
    pair, tokenizer = load_pair(base, tuned)
    assert kinds(pair.base, pair.tuned) == held
    assert pair.precision == ("bfloat16x3" if pays else "float32")
    assert pair.base_config == pair.tuned_config
    source, _ = stream_pair(base, tuned)
    assert kinds(source.ends.base, next(source.layers(1, 2)).changed) == held
    plain, _ = load_pair(base, tuned, precision="float32")
    assert kinds(plain.base, plain.tuned) == {"float32"} and plain.precision == "float32"
    jax.tree.map(np.testing.assert_array_equal, plain.tuned, pair.tuned)
    mixed, _ = load_pair(base, wide)
    assert kinds(mixed.base) == held and kinds(mixed.tuned) == {"float32"}
    with pytest.raises(InputError, match=f"^{wide}: its weights are stored in float32, and"):
        load_pair(base, wide, precision="bfloat16x2")
    rounded, _ = load_pair(base, wide, dtype="bfloat16", precision="bfloat16x2")
    assert kinds(rounded.tuned) == {"bfloat16"} and rounded.precision == "bfloat16x2"
    if pays:
        store.save_pair(tmp_path / "pair", pair, tokenizer)
        again, _ = load_pair(*(str(tmp_path / "pair"),) * 2)
        assert kinds(again.base) == held and again.tuned_config == pair.tuned_config
        store.save(tmp_path / "model", load_model(base, dtype="bfloat16"))
        again, _ = load_pair(str(tmp_path / "model"), tuned)
        assert kinds(again.base) == held
        assert load_model(str(tmp_path / "model")).config.precision == "float32"
