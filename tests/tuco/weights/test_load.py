"""Models and pairs from whatever a user names."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects

from common_jax.errors import InputError
from common_jax.mesh import make_mesh
from tests.tuco.tiny import save_tiny, tiny_hf, tiny_tokenizer
from tests.tuco.weights.gguf import writer as gguf_writer
from tests.tuco.weights.peft import test_read as test_peft
from tuco_jax.weights.hf import model as huggingface
from tuco_jax.weights.load import load_model, load_pair, model_config
from tuco_jax.weights.orbax import store
from tuco_jax.weights.peft import read as peft
from tuco_jax.weights.peft.layout import WEIGHTS


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A base, a full fine-tune of it, and an adapter over it, on disk."""
    directory = tmp_path_factory.mktemp("models")
    test_peft.write(directory, "llama", dict(target_modules=["q_proj", "down_proj"]))
    tiny_tokenizer().save_pretrained(directory / "base")
    save_tiny(directory / "tuned", "llama", seed=1, rms_norm_eps=1e-3)
    return directory


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def test_full_pair(where):
    pair, tokenizer = load_pair(str(where / "base"), str(where / "tuned"))
    base, tuned = (huggingface.load(str(where / name)) for name in ("base", "tuned"))
    jax.tree.map(np.testing.assert_array_equal, pair.base, base.params)
    jax.tree.map(np.testing.assert_array_equal, pair.tuned_params, tuned.params)
    assert (pair.base_config, pair.tuned_config) == (base.config, tuned.config)
    assert pair.lora == {}
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    notes = " | ".join(pair.notes)
    assert re.search(r"norm_eps differs: 1e-06 in the base, 0.001 tuned", notes)
    assert re.search(r"embeddings moved by 1\.\d+e\+00 .*272 shared rows", notes)


@pytest.mark.parametrize("adapter", [None, "last"])
def test_of_a_hubs_adapters_one_is_downloaded(where, tmp_path, monkeypatch, adapter):
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    for folder in ("", "first", "last"):
        shutil.copytree(where / "adapter", hub / folder, dirs_exist_ok=True)
        (hub / folder / "chat_template.jinja").write_text(f"{folder}: {{{{ messages }}}}")

    def download(source, *, allow_patterns):
        assert source == "some/adapters"
        names = [str(p.relative_to(hub)) for p in hub.rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface, "snapshot_download", download)
    pair, tokenizer = load_pair(str(where / "base"), "some/adapters", adapter=adapter)
    assert pair.lora and str(tokenizer.chat_template).startswith(f"{adapter or ''}: ")
    weights = [str(p.relative_to(cache)) for p in cache.rglob("adapter_model.safetensors")]
    assert weights == [f"{adapter}/adapter_model.safetensors" if adapter else WEIGHTS]


def test_adapter_pair_holds_the_base_once(where):
    pair, tokenizer = load_pair(str(where / "base"), str(where / "adapter"))
    assert pair.tuned == {} and pair.tuned_params is pair.base
    assert set(pair.lora["layers"]) == {"attention", "mlp"}
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_an_adapters_own_tokenizer_is_used(where, tmp_path):
    for path in (where / "adapter").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    own = tiny_tokenizer()
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(tmp_path)
    pair, tokenizer = load_pair(str(where / "base"), str(tmp_path))
    assert tokenizer.chat_template == own.chat_template
    assert any("chat template differs" in note for note in pair.notes)


def test_an_adapters_own_template_is_used(where, tmp_path):
    for path in (where / "adapter").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    own = "{{ messages[0]['content'] }} \u2192"
    (tmp_path / "chat_template.jinja").write_text(own, encoding="utf-8")
    pair, tokenizer = load_pair(str(where / "base"), str(tmp_path))
    assert tokenizer.chat_template == own
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert any("chat template differs" in note for note in pair.notes)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xe4")
    with pytest.raises(InputError, match="chat_template.jinja: the chat template cannot be read"):
        load_pair(str(where / "base"), str(tmp_path))


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_a_store_serves_as_either_half_and_as_the_pair(where, tmp_path, tuned):
    base = str(where / "base")
    pair, tokenizer = load_pair(base, str(where / tuned))
    store.save(tmp_path / "base", load_model(base))
    store.save_pair(tmp_path / "pair", pair, tokenizer)
    for names in ((tmp_path / "base", where / tuned), (tmp_path / "pair",) * 2):
        again, other = load_pair(*map(str, names))
        assert jax.tree.structure(again) == jax.tree.structure(pair)
        jax.tree.map(np.testing.assert_array_equal, again, pair)
        assert other.get_vocab() == tokenizer.get_vocab()
        assert list(again.notes) == list(pair.notes)


def test_an_adapter_over_a_gguf_file(where, tmp_path):
    """Hugging Face's names and order of rows, whatever the file calls them."""
    model, hf_config = tiny_hf("llama")
    gguf_writer.write(tmp_path / "base.gguf", model, hf_config)
    bases = [
        load_model(str(path), tokenizer=False) for path in (tmp_path / "base.gguf", where / "base")
    ]
    (lora, _), (expected, _) = (peft.load(where / "adapter", base) for base in bases)
    jax.tree.map(np.testing.assert_array_equal, lora, expected)
    jax.tree.map(np.testing.assert_array_equal, bases[0].params, bases[1].params)
    assert model_config(str(tmp_path / "base.gguf")) == bases[0].config


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_pairs_go_straight_to_their_shards(where, tuned):
    mesh = make_mesh(2, 2, 2)
    pair, _ = load_pair(str(where / "base"), str(where / tuned), dtype="bfloat16", mesh=mesh)
    leaves = jax.tree.leaves(pair)
    assert {x.dtype for x in leaves} == {jnp.dtype("bfloat16")}
    assert all(x.sharding.mesh == mesh for x in leaves)
    table = pair.base["embed"]["table"]
    assert table.addressable_shards[0].data.shape == (272 // 2, 32 // 2)


def test_config_without_weights(where):
    assert model_config(str(where / "base")) == load_model(str(where / "base")).config


@pytest.mark.parametrize("call", [load_model, model_config, lambda x: load_pair(x, x)])
@pytest.mark.parametrize("name", ["nothing/here/at/all", "model.gguf", "no-such-owner/no-model"])
def test_unknown_sources_are_one_clear_line(call, name):
    with pytest.raises(InputError, match=f"^{name}: .*[Nn]o such") as caught:
        call(name)
    assert "\n" not in str(caught.value)


def test_a_model_without_any_tokenizer(where, tmp_path):
    save_tiny(tmp_path / "a", "llama", tokenizer=False)
    with pytest.raises(InputError, match="neither it nor its base has a tokenizer"):
        load_pair(str(tmp_path / "a"), str(tmp_path / "a"))


def test_stores_in_the_wrong_place(where, tmp_path):
    base, whole = str(where / "base"), str(tmp_path / "pair")
    store.save_pair(whole, *load_pair(base, str(where / "adapter")))
    with pytest.raises(InputError, match="holds a whole pair; give it as the base, too"):
        load_pair(base, whole)
    with pytest.raises(InputError, match="holds a pair, not one model"):
        load_model(whole)
    with pytest.raises(InputError, match="holds a pair, not one model"):
        load_pair(whole, base)
