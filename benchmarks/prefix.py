"""Prompts that begin alike: what sharing gains in the score, over alphas, in attacks and prefills.

    python -m benchmarks.prefix [--rounds 3] [--tokens 200] [--prompts 200] [--depth 2]

All cases stand in one process and take turns; the figure is the ratio of medians of the
processor's seconds, which other programs on the machine change less than the clock's. Nine
tenths of each prompt are common to all (a few-shot header, say). The floor of tokens is what the
ratio would be if time were tokens computed, padding included. An attack's candidates are those of
one step of `attacks/gcg.py` on one request: strings behind the common part, before the same words
and the same target. Two more sets are scored: requests that each follow 0, 1, 2 ... examples (many
shots), and two system prompts, each before three sets of examples (heads). A prefill answers the
prompts by one token each; apart are prompts of the same lengths that share nothing. Prints a table
and keeps a JSON.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import machine
from benchmarks.tuco import first_run
from tuco_jax.attacks.target_loss import Pieces, cached_prompts, candidate_losses
from tuco_jax.core.budget import default_budget
from tuco_jax.evaluation.option_scores import option_scores
from tuco_jax.generation.generate import generate_tokens
from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig, Rope
from tuco_jax.models.pair import Pair
from tuco_jax.prompts.packing import Packed, pack
from tuco_jax.prompts.prefixes import pack_shared
from tuco_jax.prompts.read import Prompt
from tuco_jax.scoring.score import score_tokens

HERE = pathlib.Path(__file__).parent
ALPHAS = (0.9, 1.0, 1.1)
KINDS = "score", "alphas", "attack", "many shots", "heads", "prefill"
SHOTS = 0, 1, 2, 4, 8, 16


def random_pair(depth: int, width: int) -> Pair:
    """Two random models with a Llama's block."""
    dim = 64
    frequencies = tuple((1e4 ** (-np.arange(0, dim, 2) / dim)).tolist())
    config = ModelConfig(
        family="llama",
        vocab_size=4096,
        width=width,
        depth=depth,
        heads=width // dim,
        kv_heads=width // dim // 2,
        head_dim=dim,
        mlp_width=3 * width,
        max_positions=8192,
        ropes=(Rope(frequencies),),
    )
    rng = np.random.default_rng(0)

    def leaf(shape: tuple[int, ...]) -> Any:
        made = rng.normal(size=shape).astype(np.float32) / np.float32(shape[-1] ** 0.5)
        return jnp.asarray(made)

    shapes = decoder.param_shapes(config)
    base, tuned = (jax.tree.map(lambda s: leaf(s.shape), shapes) for _ in range(2))
    return Pair(base, tuned, {}, config, config)


def losses(pair: Pair, pieces: Pieces, strings: np.ndarray) -> np.ndarray:
    """Of every string, in equal batches of the budget; what stands before it is run here, too."""
    (cached,) = cached_prompts(pair, [pieces])
    batches = -(-len(strings) * cached.tokens.size // default_budget())
    parts = np.array_split(strings, batches)
    size = max(map(len, parts))
    filled = [np.concatenate([part, part[: size - len(part)]]) for part in parts]
    found = [candidate_losses(pair, cached, jnp.asarray(part))[0] for part in filled]
    return np.concatenate([loss[: len(part)] for loss, part in zip(found, parts, strict=True)])


def whole(pieces: Pieces) -> Pieces:
    """The same, nothing of which stands before the string."""
    attack = np.concatenate([pieces.before, pieces.attack])
    return pieces._replace(before=attack[:0], attack=attack)


def with_head(head: np.ndarray, strings: np.ndarray) -> np.ndarray:
    before = np.broadcast_to(head, (len(strings), head.size))
    return np.concatenate([before, strings], axis=1)


def many_shots(rng: np.random.Generator, requests: int = 40) -> list[np.ndarray]:
    """Each request behind one template and 0 to 16 examples of about 20 tokens."""
    template, rows = rng.integers(0, 4096, 12), []
    for _ in range(requests):
        examples = [rng.integers(0, 4096, rng.integers(15, 26)) for _ in range(SHOTS[-1])]
        question = rng.integers(0, 4096, rng.integers(10, 25))
        rows += [np.concatenate([template, *examples[:n], question]) for n in SHOTS]
    return [row.astype(np.int32) for row in rows]


def heads_in_heads(rng: np.random.Generator) -> list[np.ndarray]:
    """Questions behind two system prompts, each alone or before one of three sets of examples."""
    rows = []
    for system in (rng.integers(0, 4096, 60) for _ in range(2)):
        for count in (0, 100, 150, 200):
            examples = rng.integers(0, 4096, count)
            rows += [
                np.concatenate([system, examples, rng.integers(0, 4096, rng.integers(10, 25))])
                for _ in range(20)
            ]
    return [row.astype(np.int32) for row in rows]


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference, beside the largest value where that is beyond 1."""
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))


def scored(pair: Pair, rows: list[np.ndarray], **options: Any) -> np.ndarray:
    names = [Prompt(id=i, prompt="", messages=None, label=None, line=i) for i in range(len(rows))]
    return score_tokens(pair, rows, names, **options).tuco


def plans(rows: list[np.ndarray]) -> tuple[list[Packed], list[Packed]]:
    """Batches of each prompt by itself, and of what they share."""
    budget = default_budget()
    return pack([row.size for row in rows], budget), pack_shared(rows, budget)


def main() -> None:
    parser = argparse.ArgumentParser(description="What sharing the beginning of prompts gains.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    args = parser.parse_args()

    pair = random_pair(args.depth, args.width)
    rng = np.random.default_rng(0)
    head = np.asarray(rng.integers(0, 4096, round(0.9 * args.tokens)), np.int32)
    rows = [
        np.concatenate([head, rng.integers(0, 4096, args.tokens - head.size)]).astype(np.int32)
        for _ in range(args.prompts)
    ]
    shots, heads = many_shots(rng), heads_in_heads(rng)
    strangers = [rng.integers(0, 4096, row.size).astype(np.int32) for row in rows]
    options = np.asarray([5, 6], np.int32)
    rest = args.tokens - head.size
    pieces = Pieces(
        *np.split(rows[0], [head.size, head.size + rest // 2, head.size + rest * 3 // 4])
    )
    strings = np.stack([row[head.size :][: rest // 2] for row in rows])
    cases: dict[str, Callable[[], Any]] = {
        "score": lambda: scored(pair, rows),
        "score, apart": lambda: scored(pair, rows, share_prefixes=False),
        "alphas": lambda: option_scores(pair, rows, options, ALPHAS),
        "alphas, apart": lambda: option_scores(pair, rows, options, ALPHAS, share=False),
        "attack": lambda: losses(pair, pieces, strings),
        "attack, apart": lambda: losses(pair, whole(pieces), with_head(head, strings)),
        "many shots": lambda: scored(pair, shots),
        "many shots, apart": lambda: scored(pair, shots, share_prefixes=False),
        "heads": lambda: scored(pair, heads),
        "heads, apart": lambda: scored(pair, heads, share_prefixes=False),
        "prefill": lambda: generate_tokens(pair, rows, 0.9, max_new_tokens=1),
        "prefill, apart": lambda: generate_tokens(pair, strangers, 0.9, max_new_tokens=1),
    }
    results = {name: first_run(name, case) for name, case in cases.items()}
    gaps = {name: relative(results[name], results[f"{name}, apart"]) for name in KINDS[:-1]}
    print("largest differences:", ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items()))
    assert max(gaps.values()) < 1e-5
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, case in cases.items():
            start = time.process_time()
            case()
            taken[name].append(time.process_time() - start)
    times = {name: statistics.median(seconds) for name, seconds in taken.items()}
    figures = {f"{name}: apart / shared": times[f"{name}, apart"] / times[name] for name in KINDS}
    for name, some in (("score", rows), ("many shots", shots), ("heads", heads)):
        apart, shared = (sum(b.computed for b in plan) for plan in plans(some))
        figures[f"{name}: tokens apart / shared"] = apart / shared
        figures[f"{name}: tokens, shared"] = shared
        figures[f"{name}: shapes"] = len({b.shape for b in plans(some)[1]})
    figures |= {f"{name}: largest difference (asked: 1e-5)": gap for name, gap in gaps.items()}
    for name, value in figures.items():
        print(f"{value:8.2g}  {name}" if value < 0.01 else f"{value:8.2f}  {name}")
    args.out.mkdir(exist_ok=True)
    found = {"machine": machine(), "arguments": [args.prompts, args.tokens], "seconds": taken}
    with (args.out / "prefix.json").open("w") as file:
        json.dump(found | {"figures": figures}, file, indent=1)


if __name__ == "__main__":
    main()
