"""Both packages on one GPU: scores of a 1B and a 7B pair, rewards of robots and of images.

    python -m benchmarks.gpu [--size full] [--parts scores rewards images stable_diffusion]
        [--rounds 5] [--out FOLDER]

Parts for short loans of a device, 110 GB of one H200's memory (a guess: no GPU was at hand); where
a loan ends sooner, one command a part. Each takes turns with eager PyTorch; medians.

    scores            `score_tokens` of random pairs of Llama's shapes, made there in bfloat16, at
                      each precision, and hooks over the same weights, as the paper's code has it
    rewards           extraction, training and guided sampling at Hopper's size (`reward.py`)
    images            the same of images, at two sizes (`images.py`)
    stable_diffusion  one evaluation of 1.x's U-Net (`stable_diffusion.py`)

A share of the peak is the least time of the products, by their precision and the maker's rates,
over the time that was measured. Each part has its file, kept after each of its sizes, so that a
run that is broken off leaves what it has. `--size tiny` goes the same way on a CPU, in seconds.
"""

import argparse
import dataclasses
import functools
import gc
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import images, reward, stable_diffusion
from benchmarks.machine import machine
from benchmarks.torch_reward import Size
from benchmarks.torch_tuco import TorchTuco
from benchmarks.tuco import first_run, flops, interleave, keep
from common_jax.plan import DEVICES, Device
from reward_jax.models.unet2d.half_unet import HalfUNet2D
from reward_jax.models.unet2d.unet import UNet2D
from reward_jax.planning.chain_cost import STATED
from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig, Precision
from tuco_jax.models.decoder import Params
from tuco_jax.models.families import from_huggingface
from tuco_jax.models.pair import Pair
from tuco_jax.prompts.read import Prompt
from tuco_jax.scoring.score import score_tokens
from tuco_jax.weights.keys import FAMILIES

PARTS: dict[Precision, int] = {"float32": 0, "bfloat16x3": 3, "bfloat16x2": 2, "bfloat16": 1}
HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is run: pairs by name, prompts of so many tokens, a world of rewards, and images.

    batch: prompts of a batch of PyTorch's. side: of the matrices that tell the device's rate.
    unet: of Stable Diffusion, as its config states it; rows: that it is asked at once.
    """

    pairs: Mapping[str, Mapping[str, Any]]
    prompts: int
    tokens: int
    batch: int
    side: int
    world: Size
    trajectories: int
    steps: int
    images: Mapping[str, images.Size]
    unet: Mapping[str, Any]
    rows: int


def llama(vocab: int, width: int, mlp: int, depth: int, heads: int, shared: int) -> dict[str, Any]:
    """Fields of transformers' config."""
    return dict(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=4096,
    )


SIZES = {
    "full": Sizes(
        {  # of Llama 3.2 1B and Llama 2 7B
            "1B": llama(128_256, 2048, 8192, 16, 32, 8),
            "7B": llama(32_000, 4096, 11_008, 32, 32, 32),
        },
        prompts=16,
        tokens=1024,
        batch=4,
        side=8192,
        world=reward.SIZES["hopper"],
        trajectories=512,
        steps=20,
        images={name: images.SIZES[name] for name in ("pixels", "paper")},
        unet=STATED,
        rows=2,
    ),
    "tiny": Sizes(
        {"tiny": llama(64, 32, 48, 2, 4, 2)},
        prompts=4,
        tokens=16,
        batch=2,
        side=64,
        world=Size("tiny world", 5, 2, 4, (1, 2), False, 0.2, 2, 4, 4, (2, 2), 8, 4),
        trajectories=4,
        steps=1,
        images={
            "tiny images": images.Size(
                UNet2D(1, 8, groups=4), HalfUNet2D(1, 8, (1,), groups=4), 4, 2
            )
        },
        unet=dict(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=12,
            norm_num_groups=4,
        ),
        rows=2,
    ),
}


def random_pair(config: ModelConfig) -> Pair:
    """Two random models in bfloat16, made on the device; norms at one."""
    shapes = decoder.param_shapes(config)

    def model(seed: int) -> Params:
        paths = jax.tree_util.tree_leaves_with_path(shapes)
        keys = jax.random.split(jax.random.key(seed), len(paths))
        leaves = [_leaf(key, path, x.shape) for key, (path, x) in zip(keys, paths, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return jax.block_until_ready(Pair(model(0), model(1), {}, config, config))


def _leaf(key: jax.Array, path: Any, shape: tuple[int, ...]) -> jax.Array:
    name = path[-1].key
    if name == "scale":
        return jnp.ones(shape, jnp.bfloat16)
    return _normal(key, shape, shape[-1 if name == "table" else -2])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
    drawn = jax.random.normal(key, shape, jnp.bfloat16)
    return drawn * jnp.asarray(inputs**-0.5, jnp.bfloat16)


def hooked(pair: Pair, fields: Mapping[str, Any], device: str) -> TorchTuco:
    """The same pair in PyTorch, on the same device."""
    models = []
    for params in (pair.base, pair.tuned):
        with torch.device(device):
            config = LlamaConfig(**fields)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        fill(model, pair.base_config, params)
        models.append(model)
    return TorchTuco(*models)


@torch.no_grad()
def fill(model: Any, config: ModelConfig, params: Params) -> None:
    """Copy parameters into PyTorch's model; nothing goes over the host."""
    state, flat = model.state_dict(), flatten_dict(params, sep="/")
    for row in FAMILIES[config.family].rows:
        if row.paths[0] not in flat:
            continue
        own: Any = flat[row.paths[0]]
        for name, at in row.names(config):
            value = torch.from_dlpack(jax.block_until_ready(own[at] if at else own))
            state[name].copy_(value.T if row.layout.rows == 1 else value)
            if value.is_cuda:
                torch.cuda.synchronize()  # JAX may write there as soon as it is let go of


def products(pair: Pair, prompts: int, tokens: int) -> tuple[float, float]:
    """Floating-point operations of a score: (products with weights, those of attention)."""
    c = pair.tuned_config
    attention = 4.0 * (c.depth - 1) * prompts * tokens**2 * c.heads * c.head_dim
    return flops([tokens] * prompts, pair)[1] - attention, attention


def least(precision: Precision, work: tuple[float, float], device: Device) -> float:
    """Seconds of a score's products at the maker's rates."""
    (weights, attention), parts, rates = work, PARTS[precision], device.rates
    if not parts:
        return (weights + attention) / rates["float32"]
    own = "bfloat16" if parts == 1 else "float32"  # what keys are held in
    return parts * weights / rates["bfloat16"] + attention / rates[own]


def maker() -> Device | None:
    """Rates of the device at hand, where they are known; an H200 multiplies as an H100 does."""
    kind = jax.devices()[0].device_kind
    return DEVICES["h100"] if "H100" in kind or "H200" in kind else None


def scores(sizes: Sizes, fields: Mapping[str, Any], rounds: int, device: str) -> dict[str, Any]:
    """One pair at each precision, and by hooks."""
    pair = random_pair(from_huggingface(LlamaConfig(**fields)))
    config, rng = pair.tuned_config, np.random.default_rng(0)
    shape = sizes.prompts, sizes.tokens
    rows = [*rng.integers(0, config.vocab_size, shape).astype(np.int32)]
    names = [Prompt(i, "") for i in range(sizes.prompts)]
    theirs = hooked(pair, fields, device)
    a = _normal(jax.random.key(2), (sizes.side, sizes.side), sizes.side)
    matmul = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    cases: dict[str, Callable[[], Any]] = {
        name: functools.partial(scored, pair.at(name), rows, names) for name in PARTS
    }
    cases["torch hooks"] = lambda: theirs.prompts(rows, sizes.batch)
    cases["matmul"] = lambda: matmul(a, a)
    found = {name: first_run(name, case) for name, case in cases.items()}
    gap = float(np.abs(found["torch hooks"] - found["bfloat16"]).max())
    print(f"PyTorch and JAX agree on TuCo within {gap:.1e}, in bfloat16", flush=True)
    assert gap < 0.02
    seconds = interleave(cases, rounds)
    median = {name: t["median"] for name, t in seconds.items()}
    count, work, rates = sizes.prompts * sizes.tokens, products(pair, *shape), maker()
    wide = np.asarray(found["float32"])
    return {
        "tokens_a_second": {n: count / t for n, t in median.items() if n != "matmul"},
        "share_of_peak (asked of bfloat16: 0.5)": rates
        and {name: least(name, work, rates) / median[name] for name in PARTS},
        "matmul_tflops": 2e-12 * sizes.side**3 / median["matmul"],
        "torch hooks / bfloat16": median["torch hooks"] / median["bfloat16"],
        "largest relative difference from float32": {
            name: float(np.abs(found[name] / wide - 1).max()) for name in PARTS
        },
        "largest difference from torch hooks": gap,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "teraflop": [1e-12 * part for part in work],
        "seconds": seconds,
    }


def scored(pair: Pair, rows: list[np.ndarray], names: list[Prompt]) -> np.ndarray:
    return score_tokens(pair, rows, names).tuco


def each_pair(sizes: Sizes, rounds: int, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, fields in sizes.pairs.items():
        yield name, scores(sizes, fields, rounds, device)


def each_world(sizes: Sizes, rounds: int, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    world = sizes.world
    yield world.name, reward.measure(world, rounds, sizes.steps, sizes.trajectories, device)


def each_image(sizes: Sizes, rounds: int, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, size in sizes.images.items():
        yield name, images.measure(size, rounds, sizes.steps, None, device)


def each_unet(sizes: Sizes, rounds: int, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    known = maker()
    rates = None if known is None else known.rates
    yield "unet", stable_diffusion.measure(sizes.unet, sizes.rows, rounds, device, rates)


MEASURED = {
    "scores": each_pair,
    "rewards": each_world,
    "images": each_image,
    "stable_diffusion": each_unet,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores and rewards on one GPU.")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    args = parser.parse_args()
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True  # rewards': as XLA does, and cuDNN
    for part in args.parts:
        report: dict[str, Any] = {"rounds": args.rounds, "size": args.size, **machine()}
        for name, found in MEASURED[part](SIZES[args.size], args.rounds, device):
            report[name] = found
            keep(args.out / f"gpu_{part}.json", report)
            gc.collect()  # what the next has no room beside
            torch.cuda.empty_cache()


if __name__ == "__main__":
    # PyTorch needs its part of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main()
