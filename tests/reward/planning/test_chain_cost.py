"""Planned chains of Stable Diffusion: their bytes and FLOPs, at a size that compiles quickly."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from common_jax.cli.options import MeshOptions
from common_jax.cost import products
from common_jax.errors import InputError
from reward_jax.models.stable_diffusion.config import UNetConfig
from reward_jax.models.stable_diffusion.unet import UNet
from reward_jax.planning import chain_cost
from reward_jax.planning.chain_cost import ChainPlanOptions, plan_chains
from tests.reward.cli_runs import run

TINY: dict[str, Any] = {
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


@pytest.fixture(autouse=True, scope="module")
def _all_devices():
    """In use before a plan is made, which else settles for this process how many there are."""
    jax.devices()


def test_chains(monkeypatch):
    """Each row is asked three times at each of PNDM's evaluations, of which there is one more."""
    monkeypatch.setattr(chain_cost, "STATED", TINY)
    small: dict[str, Any] = dict(size=32, dtype="float32", mesh=MeshOptions(data=2))
    found, device = plan_chains(ChainPlanOptions(rows=4, steps=3, **small))
    assert found.size == 2 and found.dtype == "float32"
    latents = 4 * 4 * 4 * 4  # of each of 4 evaluations x_t and three epsilons, and the last ones
    assert found.bytes["latents"] == 2 * latents
    # What the folder of 1.5 has beside the U-Net, in float32 here.
    assert found.bytes["autoencoder"] == 4 * 83_653_863
    assert found.bytes["text encoder"] == 4 * 123_060_480
    assert found.bytes["output"] >= 2 * latents * (4 * 4 + 1)
    model, of = UNet(UNetConfig.of(TINY, "here")), jax.ShapeDtypeStruct
    given = of((12, 4, 4, 4), jnp.float32), of((12,), jnp.int32), of((12, 77, 12), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *given)["params"]
    program = jax.make_jaxpr(lambda p, *given: model.apply({"params": p}, *given))(shapes, *given)
    assert found.flops == pytest.approx(4 * products(program).flops, rel=0.01)
    assert found.binds(device) in ("memory bandwidth", "compute")


def test_weights_are_planned_on_their_shards(monkeypatch):
    """By the rules that a folder is read by: half of each kernel, embeddings whole."""
    monkeypatch.setattr(chain_cost, "STATED", TINY)
    small: dict[str, Any] = dict(rows=4, size=32, steps=1, dtype="float32")
    whole, _ = plan_chains(ChainPlanOptions(**small))
    for axis in ("fsdp", "tensor"):
        cut, _ = plan_chains(ChainPlanOptions(**small, mesh=MeshOptions(**{axis: 2})))
        assert cut.size == 2
        for kind, most in (("unet", 0.55), ("autoencoder", 0.55), ("text encoder", 0.66)):
            assert 0.5 <= cut.bytes[kind] / whole.bytes[kind] < most, (axis, kind)
        assert sum(kind["count"] for kind in cut.kinds().values()) > 0  # they are exchanged


def test_what_cannot_be_planned():
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(rows=3, mesh=MeshOptions(data=2)), "multiple of mesh.data x mesh.fsdp, 2; not 3"),
        (dict(size=100), "size must be a multiple of 8; not 100"),
        (dict(mesh=MeshOptions(data=-1)), "a plan wants each size"),
        (dict(topology="v5e:2x4"), "topology v5e:2x4 is of TPUs: give device tpu-v5e"),
    ]
    for changes, said in cases:
        with pytest.raises(InputError, match=said):
            plan_chains(ChainPlanOptions(**changes))


@pytest.mark.parametrize("option", [("--size", 8 * 10**12), ("--size", 10**6), ("--rows", 10**18)])
def test_sizes_beyond_counting_are_refused_in_one_line(option, capsys):
    assert run("plan", "chains", *option) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "positions of the U-Net, and a compiler counts 2.1e+09: give fewer rows" in line
