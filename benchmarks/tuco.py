"""Speed of TuCo: against PyTorch hooks, one forward pass, and the machine's matmul rate.

    python -m benchmarks.tuco [--rounds 7] [--out benchmarks/results] [--precisions]

One run, everything interleaved, medians; see README.md beside this file for what is measured and
what came out. Prints a table and keeps a JSON of it. With --precisions: the batch's score at each
precision alone, into another.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import machine
from benchmarks.torch_tuco import TorchTuco
from tuco_jax.core.decompose import decompose
from tuco_jax.core.last_token import last_token
from tuco_jax.core.walk import Split
from tuco_jax.finetune.lora import LoraOptions, init
from tuco_jax.models import decoder
from tuco_jax.models.config import Precision
from tuco_jax.models.layers import whole_block
from tuco_jax.models.pair import Pair
from tuco_jax.models.positions import Positions
from tuco_jax.prompts.read import Prompt
from tuco_jax.scoring.score import score_tokens
from tuco_jax.weights import int8
from tuco_jax.weights.hf.model import load

CONFIG: dict[str, Any] = dict(
    vocab_size=4096,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=512,
)
BATCH, LENGTH, PROMPTS = 8, 128, 400
HERE = pathlib.Path(__file__).parent


def models(folder: pathlib.Path) -> tuple[TorchTuco, Pair]:
    """The same two random models on both sides, by way of a checkpoint."""
    made, ours = [], []
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
        model.save_pretrained(folder / name)
        made.append(model)
        ours.append(load(str(folder / name), tokenizer=False))
    base, tuned = ours
    return TorchTuco(*made), Pair(base.params, tuned.params, {}, base.config, tuned.config)


def flops(lengths: list[int], pair: Pair) -> tuple[float, float]:
    """Floating-point operations of the products: (one forward pass, blocks only; the score).

    The score leaves the last layer out but for its keys and values, and adds the base's keys and
    values; what both models do at the last token alone is not counted.
    """
    c = pair.tuned_config
    heads, key_value = c.heads * c.head_dim, 2 * c.kv_heads * c.head_dim * c.width
    linear = 2 * heads * c.width + key_value + 3 * c.width * c.mlp_width
    layer = sum(n * linear + 2 * n * n * heads for n in lengths)
    forward = c.depth * layer
    score = forward - layer + (c.depth + 1) * sum(lengths) * key_value
    return 2 * forward, 2 * score


def interleave(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each case, each warm already: every round runs all of them once.

    processor: the median of what all cores together took, which other work beside hardly moves.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    used: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            start, began = time.perf_counter(), time.process_time()
            jax.block_until_ready(case())
            times[name].append(time.perf_counter() - start)
            used[name].append(time.process_time() - began)
    return {
        name: {
            "median": statistics.median(t),
            "min": min(t),
            "max": max(t),
            "processor": statistics.median(used[name]),
        }
        for name, t in times.items()
    }


def first_run(name: str, case: Callable[[], Any]) -> Any:
    """Run once, print the seconds that it took (compilation, for JAX), return the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(case())
    print(f"first run of {name}: {time.perf_counter() - start:.1f} s", flush=True)
    return result


def forward_of(
    pair: Pair, source: Split, tokens: jax.Array, mask: jax.Array
) -> Callable[[], jax.Array]:
    """One pass of the tuned model, a layer at a time, as the score on a CPU."""
    config = pair.tuned_config
    layers = [one.tuned for one in source.layers(0, config.depth)]
    ends = {name: value for name, value in pair.tuned_params.items() if name != "layers"}

    @jax.jit
    def begin(params, tokens, mask):
        at = Positions.of(config, mask)
        return decoder.embed(config, params, tokens, at), at

    @jax.jit
    def layer(x, at, weights, info):
        return x + whole_block(config, weights, x, at, info).total

    def forward() -> jax.Array:
        x, at = begin(ends, tokens, mask)
        for one in layers:
            x = layer(x, at, one.weights, one.info)
        return x

    return forward


def adapted(pair: Pair, rank: int = 16) -> Pair:
    """The base and random factors of all its linear layers."""
    factors = init(pair.base_config, LoraOptions(rank=rank), jax.random.key(0))
    flat: dict[str, jax.Array] = flatten_dict(factors, sep="/")  # pyright: ignore[reportAssignmentType]
    keys = jax.random.split(jax.random.key(1), len(flat))
    for key, path in zip(keys, flat, strict=True):
        if path.endswith("/b"):
            flat[path] = 0.01 * jax.random.normal(key, flat[path].shape)
    return Pair(pair.base, {}, unflatten_dict(flat, sep="/"), pair.base_config, pair.base_config)


def batch_cases(theirs: TorchTuco, pair: Pair) -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG["vocab_size"], (BATCH, LENGTH), dtype=np.int32)
    mask = np.ones_like(tokens, bool)
    torch_inputs = torch.from_numpy(tokens).long(), torch.from_numpy(mask).long()
    ours = jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)
    source, adapter = Split(pair), Split(adapted(pair))
    full = jax.jit(decompose)

    # The rate of a product of the block's own shape (tokens x width x MLP width), and larger.
    a = jnp.asarray(rng.normal(size=(BATCH * LENGTH, 2048)), jnp.float32)
    b = jnp.asarray(rng.normal(size=(2048, 2048)), jnp.float32)
    matmul = jax.jit(functools.partial(jnp.matmul, precision="highest"))

    def many() -> Any:
        out = [matmul(a, b) for _ in range(10)]
        return out[-1]

    cases = {
        "torch hooks": lambda: theirs.batch(*torch_inputs),
        "score": lambda: last_token(source, *ours).tuco,
        "forward": forward_of(pair, source, *ours),
        "score, adapter": lambda: last_token(adapter, *ours).tuco,
        "forward, adapter": forward_of(adapted(pair), adapter, *ours),
        "full decomposition": lambda: full(pair, *ours).ftc,
        "matmul": many,
    }
    results = {name: first_run(name, case) for name, case in cases.items()}
    check_agreement(results)
    return cases


def check_agreement(results: dict[str, Any]) -> None:
    """What is timed against each other computes the same scores."""
    gap = np.abs(np.asarray(results["torch hooks"]) - np.asarray(results["score"])).max()
    print(f"PyTorch and JAX agree on TuCo within {gap:.1e}")
    assert gap < 1e-5


def precision_cases(pair: Pair) -> dict[str, Callable[[], Any]]:
    """The batch's score at each precision, of bfloat16 weights where it takes them; of int8."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, CONFIG["vocab_size"], (BATCH, LENGTH), dtype=np.int32))
    mask = jnp.ones(tokens.shape, bool)
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), stored)  # the same numbers
    names: tuple[Precision, ...] = "float32", "bfloat16x3", "bfloat16x2", "bfloat16"
    pairs = {name: (wide if name == "float32" else stored).at(name) for name in names}
    pairs |= {f"int8, {name}": rounded(wide).at(name) for name in ("float32", "bfloat16x3")}
    sources = {name: Split(one) for name, one in pairs.items()}
    return {n: lambda s=s: last_token(s, tokens, mask).tuco for n, s in sources.items()}


def rounded(pair: Pair) -> Pair:
    """The pair as --dtype int8 holds it."""

    def tree(params: Any) -> Any:
        flat: dict[str, Any] = flatten_dict(params, sep="/")  # pyright: ignore[reportAssignmentType]
        for path in [path for path in flat if int8.holds(path)]:
            both = int8.rounded(np.asarray(flat[path]))
            flat[path], flat[int8.scale_of(path)] = map(jnp.asarray, both)
        return unflatten_dict(flat, sep="/")

    return dataclasses.replace(pair, base=tree(pair.base), tuned=tree(pair.tuned))


def precisions(pair: Pair, rounds: int) -> dict[str, Any]:
    """Seconds of each case, and its TuCo, beside float32's."""
    cases = precision_cases(pair)
    tuco = {name: np.asarray(first_run(name, case)) for name, case in cases.items()}
    seconds = interleave(cases, rounds)
    wide = tuco["float32"]

    def quicker(by: str) -> dict[str, float]:
        return {name: seconds["float32"][by] / t[by] for name, t in seconds.items()}

    return {
        "seconds": seconds,
        "float32 / this, by the clock": quicker("median"),
        "float32 / this, by processor time": quicker("processor"),
        "largest relative difference from float32": {
            n: float(np.abs(x / wide - 1).max()) for n, x in tuco.items()
        },
        "rounds": rounds,
        **machine(),
    }


def mixed_cases(
    theirs: TorchTuco, pair: Pair, rows: list[np.ndarray]
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The cases; how the prompts were packed, and the seconds that compilation took."""
    names = [Prompt(id=i, prompt="", messages=None, label=None, line=i) for i in range(len(rows))]
    first = score_tokens(pair, rows, names)
    packing = {
        "shapes": first.shapes,
        "padding": first.padding,
        "compile_seconds": first.seconds["compile"],
    }
    print(f"score, mixed: {packing}", flush=True)
    cases = {
        "torch hooks": lambda: theirs.prompts(rows),
        "score": lambda: score_tokens(pair, rows, names).tuco,
    }
    check_agreement({f: first_run(f"{f}, mixed", case) for f, case in cases.items()})
    return cases, packing


def start_up(folder: pathlib.Path, count: int = 60) -> dict[str, dict[str, float]]:
    """Seconds of `tuco-jax score` in a new process, first with an empty cache, then with it."""
    rng = np.random.default_rng(1)
    prompts = folder / "prompts.jsonl"
    choices = "what tuning changed in this model is what we ask of every prompt here".split()
    with prompts.open("w") as file:
        for _ in range(count):
            text = " ".join(rng.choice(choices, rng.integers(4, 100)))
            file.write(json.dumps({"prompt": text}) + "\n")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<unk>", *sorted(set(choices))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in ("base", "tuned"):
        PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(
            folder / name
        )
    command = [
        *(sys.executable, "-m", "tuco_jax.cli", "score"),
        *("--base", str(folder / "base"), "--tuned", str(folder / "tuned")),
        *("--prompts", str(prompts), "--out", str(folder / "scores.jsonl")),
    ]
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(folder / "cache"))
    seconds = {}
    for start in ("first start", "second start"):
        subprocess.run(command, env=environment, check=True, capture_output=True)
        seconds[start] = json.loads((folder / "scores.jsonl.meta.json").read_text())["seconds"]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of TuCo.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--precisions", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        theirs, pair = models(folder)
        if args.precisions:
            keep(args.out / "precisions.json", precisions(pair, args.rounds))
            return
        starts = start_up(folder)
        batch = interleave(batch_cases(theirs, pair), args.rounds)
        rng = np.random.default_rng(0)
        lengths = rng.integers(4, 257, PROMPTS).tolist()
        rows = [rng.integers(0, CONFIG["vocab_size"], n).astype(np.int32) for n in lengths]
        cases, packing = mixed_cases(theirs, pair, rows)
        mixed = interleave(cases, max(3, args.rounds // 2))

    median = {k: v["median"] for k, v in batch.items()}
    rate = 10 * 2 * BATCH * LENGTH * 2048 * 2048 / median["matmul"]
    forward_work, score_work = flops([LENGTH] * BATCH, pair)
    mixed_work = flops(lengths, pair)[1]
    figures = {
        "batch: torch hooks / score (asked: 1.9)": median["torch hooks"] / median["score"],
        "batch: score / forward (asked: at most 1.08)": median["score"] / median["forward"],
        "batch, an adapter: score / forward (asked: at most 1.08)": median["score, adapter"]
        / median["forward, adapter"],
        "batch: forward's share of the matmul rate": forward_work / median["forward"] / rate,
        "batch: score's share of the matmul rate (asked: 0.75)": score_work
        / median["score"]
        / rate,
        "batch: torch hooks / full decomposition": median["torch hooks"]
        / median["full decomposition"],
        "mixed: torch hooks / score (asked: 2.2 on Intel, 4 on Zen)": mixed["torch hooks"][
            "median"
        ]
        / mixed["score"]["median"],
        "mixed: padding (asked: under 0.04)": packing["padding"],
        "mixed: compilation, cold, seconds (asked: under 6)": packing["compile_seconds"],
        "mixed: score's share of the matmul rate": mixed_work / mixed["score"]["median"] / rate,
        "second start: compilation / first start's (asked: 0.2)": starts["second start"]["compile"]
        / starts["first start"]["compile"],
    }
    report = {
        "figures": figures,
        "matmul_gflops": rate / 1e9,
        "floor_seconds": {"forward": forward_work / rate, "score": score_work / rate},
        "batch_seconds": batch,
        "mixed_seconds": mixed,
        "mixed_packing": packing,
        "start_seconds": starts,
        "rounds": args.rounds,
        **machine(),
    }
    keep(args.out / "tuco.json", report)


def keep(path: pathlib.Path, report: dict[str, Any]) -> None:
    """Print a report, and write it."""
    print(json.dumps(report, indent=2))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
