"""Speed of steering: a grid of alphas against forward passes, decoding against PyTorch's.

    python -m benchmarks.steer      # about 3 minutes on two cores; `make bench` runs it, too

One process and the same random weights on both sides (`tuco.py` gives the configuration, float32),
which are checked to give the same tokens before anything is timed. Prints a JSON and keeps it.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import machine
from benchmarks.torch_steer import TorchSteer
from benchmarks.tuco import BATCH, CONFIG, HERE, LENGTH, first_run, interleave
from tuco_jax.core.alpha_grid import PAPER_GRID, grid_logits
from tuco_jax.core.decompose import decompose
from tuco_jax.generation.generate import generate_tokens
from tuco_jax.models import decoder
from tuco_jax.models.pair import Pair
from tuco_jax.models.positions import Positions
from tuco_jax.weights.hf.model import load

ALPHA, PROMPT, NEW = 0.9, 32, 64


def models(folder: pathlib.Path) -> tuple[TorchSteer, Pair]:
    """The same two random models on both sides, by way of a checkpoint."""
    made, ours = [], []
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG, eos_token_id=None)).eval()
        model.save_pretrained(folder / name)
        made.append(model)
        ours.append(load(str(folder / name), tokenizer=False))
    base, tuned = ours
    pair = Pair(base.params, tuned.params, {}, base.config, tuned.config)
    return TorchSteer(*made, alpha=ALPHA), pair


def grid_cases(pair: Pair) -> dict[str, Callable[[], Any]]:
    """One forward pass of the tuned model's blocks, and last-token logits of the grid."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, CONFIG["vocab_size"], (BATCH, LENGTH)), jnp.int32)
    mask, alphas = jnp.ones_like(tokens, bool), jnp.asarray(PAPER_GRID)
    config = pair.tuned_config

    @jax.jit
    def forward(params, tokens, mask):
        at = Positions.of(config, mask)
        x = decoder.embed(config, params, tokens, at)
        return decoder.forward(config, params, x, at)[0]

    cases = {
        "forward": lambda: forward(pair.tuned, tokens, mask),
        "grid": lambda: grid_logits(pair, tokens, mask, alphas),
        "grid, all alphas folded": lambda: grid_logits(
            pair, tokens, mask, alphas, chunk=len(PAPER_GRID)
        ),
    }
    results = {name: first_run(name, case) for name, case in cases.items()}
    one: Any = jax.jit(lambda *args: jnp.asarray(decompose(*args, logits=True).logits)[:, -1])
    want = np.stack([one(pair, tokens, mask, alpha) for alpha in PAPER_GRID[::3]])
    gap = np.abs(np.asarray(results["grid"])[::3] - want).max()
    print(f"the grid and one alpha at a time agree on logits within {gap:.1e}")
    assert gap < 1e-4
    return cases


def decoding_cases(theirs: TorchSteer, pair: Pair) -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG["vocab_size"], (BATCH, PROMPT), dtype=np.int32)
    torch_tokens = torch.from_numpy(tokens).long()

    def ours(alpha: float, new: int = NEW) -> np.ndarray:
        return np.stack(generate_tokens(pair, list(tokens), alpha, max_new_tokens=new))

    cases = {
        "torch hooks": lambda: theirs.generate(torch_tokens, NEW).numpy(),
        "steered": lambda: ours(ALPHA),
        "generate, tuned alone": lambda: theirs.tuned_alone(torch_tokens, NEW).numpy(),
        "tuned alone": lambda: ours(1.0),
    }
    results = {name: first_run(name, case) for name, case in cases.items()}
    for one, other in (("torch hooks", "steered"), ("generate, tuned alone", "tuned alone")):
        share = (results[one] == results[other]).mean()
        print(f"{one} and {other}: {share:.1%} of tokens agree")
        assert share == 1
    assert (results["steered"] != results["tuned alone"]).any()
    return cases


def bandwidth() -> float:
    """Bytes a second that both cores read from memory, the best of several."""
    numbers = torch.ones(1 << 27)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return numbers.numel() * 4 / best


def weight_bytes(pair: Pair) -> dict[str, int]:
    """Bytes of weights that one step of decoding reads."""

    def size(tree: Any) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    tuned = size(pair.tuned["layers"]) + size(pair.tuned["head"])
    return {"tuned alone": tuned, "steered": tuned + size(pair.base["layers"])}


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of steering.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)

    with tempfile.TemporaryDirectory() as name:
        theirs, pair = models(pathlib.Path(name))
    decoding = interleave(decoding_cases(theirs, pair), args.rounds)
    grid = interleave(grid_cases(pair), max(3, args.rounds // 2))
    rate = bandwidth()

    seconds = {name: times["median"] for name, times in (decoding | grid).items()}
    floors = {name: NEW * size / rate for name, size in weight_bytes(pair).items()}
    figures = {
        "grid of 7 alphas / forward (asked: at most 14)": seconds["grid"] / seconds["forward"],
        "decoding: steered / torch hooks, tokens a second (asked: 1.5)": seconds["torch hooks"]
        / seconds["steered"],
        "decoding: steered / generate of the tuned alone (asked: 0.6)": seconds[
            "generate, tuned alone"
        ]
        / seconds["steered"],
        "decoding: tuned alone / generate of the tuned alone": seconds["generate, tuned alone"]
        / seconds["tuned alone"],
        "decoding: steered, time / floor of reading its weights": seconds["steered"]
        / floors["steered"],
    }
    report = {
        "figures": figures,
        "tokens_per_second": {n: BATCH * NEW / t["median"] for n, t in decoding.items()},
        "decoding_seconds": decoding,
        "grid_seconds": grid,
        "bandwidth_gigabytes": rate / 1e9,
        "floor_seconds": floors,
        "rounds": args.rounds,
        **machine(),
    }
    print(json.dumps(report, indent=2))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "steer.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
