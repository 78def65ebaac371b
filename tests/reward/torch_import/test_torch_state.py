"""States as trainers and wrappers save them: they load, or what they are is said."""

import re
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common_jax.errors import InputError
from reward_jax.torch_import.torch_state import open_state, sort
from tests.reward import torch_reference as reference

D, T = 3, 6


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = reference.TemporalUnet(D, 8, (1, 2))
    return dict(reference.GaussianDiffusion(net, 8, D, 1, T).state_dict())


@pytest.fixture(scope="module")
def plain():
    return state()


def prefixed(prefix: str, tensors: Any) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def inside(word: str, tensors: Any) -> dict[str, torch.Tensor]:
    """As when the network alone is wrapped: model.WORD.downs..."""
    return {n.replace("model.", f"model.{word}.", 1): tensor for n, tensor in tensors.items()}


WAYS: dict[str, Any] = {
    "lightning": lambda s: {
        "epoch": 3,
        "global_step": 70,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": s,
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-3, "params": [0]}]}],
        "callbacks": {},
        "hyper_parameters": {"dim": 8},
    },
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "data parallel": lambda s: prefixed("module.", s),
    "compiled inside": lambda s: inside("_orig_mod", s),
    "data parallel inside": lambda s: inside("module", s),
    "both": lambda s: {"model": prefixed("module._orig_mod.", inside("module", s)), "step": 5},
    "ema alone": lambda s: {"step": 5, "ema": s},
    "model alone": lambda s: {"step": 5, "model": s},
}


@pytest.mark.parametrize("way", WAYS)
def test_wrapped_states_are_the_state(tmp_path, plain, way):
    path = tmp_path / "a.pt"
    torch.save(WAYS[way](plain), path)
    which = "model" if way in ("both", "model alone") else "ema"
    tensors, found, step = open_state(path, cast(Any, which))
    file, wanted = sort(path, tensors), sort(path, {n: _Read(t) for n, t in plain.items()})
    assert (
        file.network.keys() == wanted.network.keys() and file.tables.keys() == wanted.tables.keys()
    )
    for group in ("network", "tables"):
        for name, tensor in getattr(file, group).items():
            np.testing.assert_array_equal(tensor.read(), getattr(wanted, group)[name].read())
    assert step == {"lightning": 70, "both": 5, "ema alone": 5, "model alone": 5}.get(way)
    assert found == (which if way in ("both", "ema alone", "model alone") else None)


class _Read:
    def __init__(self, tensor):
        self._tensor, self.shape = tensor, tuple(tensor.shape)
        self.dtype = np.dtype(np.float32)

    def read(self, place=()):
        return self._tensor.numpy()[place or ...]


@pytest.mark.parametrize(
    ("content", "which", "said"),
    [
        (
            {"step": 5, "ema": {"a": torch.ones(2)}},
            "model",
            "holds no 'model'; ask for which='ema'",
        ),
        (
            {"step": 5, "model": {"a": torch.ones(2)}},
            "ema",
            "holds no 'ema'; ask for which='model'",
        ),
        (
            {"step": 1, "net": {"a": torch.ones(2)}, "opt": {}},
            "ema",
            "'step' is no tensor; save a state_dict() alone, or one under 'state_dict' (what it "
            "holds: net, opt)",
        ),
        ({"lr": 1.0}, "ema", "'lr' is no tensor; save a state_dict()"),
        ([torch.ones(2)], "ema", "holds no dictionary of tensors; save a state_dict()"),
    ],
)
def test_what_holds_no_state_says_what_it_holds(tmp_path, content, which, said):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=re.escape(said)):
        open_state(tmp_path / "a.pt", cast(Any, which))


def test_two_names_of_one_tensor(tmp_path, plain):
    first = next(n for n in plain if n.startswith("model."))
    twice = {**plain, f"module.{first}": plain[first]}
    torch.save(twice, tmp_path / "a.pt")
    with pytest.raises(InputError, match="are one tensor, doubled"):
        sort(tmp_path / "a.pt", open_state(tmp_path / "a.pt", "ema")[0])
    parts = {"diffusion.a": torch.ones(2), "module.diffusion.a": torch.ones(2)}
    torch.save(parts, tmp_path / "b.pt")
    with pytest.raises(InputError, match="diffusion.a is there twice"):
        sort(tmp_path / "b.pt", open_state(tmp_path / "b.pt", "ema")[0])


def test_safetensors_of_two_states(tmp_path):
    both = {"ema.a": torch.ones(2), "model.a": torch.zeros(2)}
    save_file(both, tmp_path / "a.safetensors")
    for which, value in (("ema", 1), ("model", 0)):
        tensors, found, _ = open_state(tmp_path / "a.safetensors", cast(Any, which))
        assert found == which and tensors["a"].read().tolist() == [value] * 2
