"""int8 weights beside float32: memory of the layers, TuCo of real prompts, time.

    python -m benchmarks.int8 [--prompts 80] [--gemma ADAPTER] [--out benchmarks/results]

SmolLM2 and the adapter that the package ships, as it is and then merged: two whole models.
gemma-3-270m and an adapter: the one that `make gemma-pair` trains or, where there is none, one of
random factors whose norms, beside the matrices', are those of SmolLM2's. Prompts are the demo's,
outside templates. Both GGUF files are quantised already (Q4_1, Q4_K_M): int8 rounds once more.
Some ten minutes on two quiet cores.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy.stats import spearmanr

from benchmarks.machine import machine
from tuco_jax.datasets.assets import fetch
from tuco_jax.datasets.prompt_groups import prompt_groups
from tuco_jax.models.pair import Pair
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import Prompt
from tuco_jax.scoring.score import score_tokens
from tuco_jax.studies.floors import merged_layers
from tuco_jax.weights import int8
from tuco_jax.weights.load import load_model, load_pair

HERE = pathlib.Path(__file__).parent
ADAPTER = HERE.parent / "tuco_jax" / "data" / "smollm2-refusal"
DTYPES = "float32", "int8"


def gguf(asset: str) -> str:
    return str(next(fetch(asset).glob("*.gguf")))


def merged(pair: Pair) -> Pair:
    """The pair as two whole models, in float32."""
    layers = {"layers": merged_layers(pair)}
    return Pair(pair.base, layers, {}, pair.base_config, pair.base_config)


def flat_of(params: Any) -> dict[str, Any]:
    found: Any = flatten_dict(params, sep="/")
    return found


def held(params: Any, dtype: str) -> Any:
    """Float32 parameters as a load in that dtype holds them."""
    flat = flat_of(params)
    for path, x in list(flat.items()) if dtype == "int8" else ():
        if int8.holds(path):
            flat[path], flat[int8.scale_of(path)] = map(jnp.asarray, int8.rounded(np.asarray(x)))
    return unflatten_dict(flat, sep="/")


def ratios(pair: Pair) -> dict[str, float]:
    """Of each matrix, the norm of its low-rank change beside its own, over all layers."""
    old, new = map(flat_of, (pair.base["layers"], merged_layers(pair)))
    return {
        path.removesuffix("/kernel"): float(jnp.linalg.norm(new[path] - x) / jnp.linalg.norm(x))
        for path, x in old.items()
        if path.endswith("/kernel")
    }


def random_factors(layers: Any, norms: dict[str, float], rank: int = 8) -> Any:
    """Low-rank factors whose products have these norms beside the matrices'."""
    rng, out = np.random.default_rng(0), {}
    for path, x in flat_of(layers).items():
        name = path.removesuffix("/kernel")
        if name == path or not norms.get(name):
            continue
        depth, rows, columns = x.shape
        a, b = (
            rng.standard_normal(s, np.float32)
            for s in ((depth, rows, rank), (depth, rank, columns))
        )
        own = np.linalg.norm(np.asarray(x, np.float32), axis=(1, 2)) * norms[name]
        b *= (own / np.linalg.norm(a @ b, axis=(1, 2)))[:, None, None]
        out[f"layers/{name}/a"], out[f"layers/{name}/b"] = jnp.asarray(a), jnp.asarray(b)
    return unflatten_dict(out, sep="/")


def cases(gemma: pathlib.Path) -> Iterator[tuple[str, dict[str, Pair], Any]]:
    """Name, the pair in each dtype, and the tokenizer."""
    base, found = gguf("smollm2"), {}
    for dtype in DTYPES:
        found[dtype], tokenizer = load_pair(base, str(ADAPTER), dtype=dtype, precision="float32")
    yield "SmolLM2, adapter", found, tokenizer
    norms = ratios(found["float32"])
    whole = merged(found["float32"])
    found, name = {}, "gemma-3-270m, chat adapter"
    for dtype in DTYPES:
        if gemma.is_dir():
            found[dtype], other = load_pair(gguf("gemma3"), str(gemma), dtype=dtype)
            continue
        name = "gemma-3-270m, random adapter"
        model = load_model(gguf("gemma3"), dtype=dtype)
        if dtype == "float32":
            factors = random_factors(model.params["layers"], norms)
        found[dtype] = Pair(model.params, {}, factors, model.config, model.config)
        other = model.tokenizer
    yield name, found, other
    for dtype in DTYPES:
        found[dtype] = dataclasses.replace(
            whole, base=held(whole.base, dtype), tuned=held(whole.tuned, dtype)
        )
    yield "SmolLM2, two whole models", found, tokenizer


def measured(pairs: dict[str, Pair], tokenizer: Any, count: int) -> dict[str, Any]:
    """Bytes, TuCo beside float32's, and seconds of scoring, in each dtype."""
    first = pairs["float32"]
    groups = prompt_groups(count)[:3]  # the others are these in templates
    prompts = [p for group in groups for p in group.prompts()]
    if tokenizer.chat_template is None:
        texts = [text for group in groups for text in group.texts]
        prompts = [Prompt(str(i), text, None, None, i) for i, text in enumerate(texts)]
    tokens = encode(
        tokenizer, prompts, max_tokens=first.context, vocab_size=first.tuned_config.vocab_size
    )
    out: dict[str, Any] = {"prompts": len(prompts), "tokens": sum(t.size for t in tokens)}
    print(f"{out}", flush=True)
    expected: Any = None
    correlation: Any = spearmanr
    for dtype, pair in pairs.items():
        used = time.process_time()
        scores = score_tokens(pair, tokens, prompts)
        used = time.process_time() - used
        tuco = scores.tuco.astype(np.float64)
        expected = tuco if expected is None else expected
        error = tuco / expected - 1
        layers = [tree.get("layers", {}) for tree in (pair.base, pair.tuned)]
        out[dtype] = {
            "bytes of layers": sum(x.nbytes for x in jax.tree.leaves(layers)),
            "mean TuCo": tuco.mean(),
            "spread of TuCo": tuco.std(),
            "Spearman": float(correlation(tuco, expected).statistic),
            "relative error, median": float(np.median(abs(error))),
            "relative error, largest": abs(error).max(),
            "relative error, mean": error.mean(),
            "seconds": scores.seconds["run"],
            "processor seconds, compilation among them": used,
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="int8 weights beside float32.")
    parser.add_argument("--prompts", type=int, default=80, help="of each of three groups")
    parser.add_argument(
        "--gemma", type=pathlib.Path, default=pathlib.Path("runs/gemma-chat/adapter")
    )
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    args = parser.parse_args()
    found = {}
    for name, pairs, tokenizer in cases(args.gemma):
        found[name] = measured(pairs, tokenizer, args.prompts)
        print(name, json.dumps(found[name], indent=2), flush=True)
        report = {"pairs": found, **machine()}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "int8.json").write_text(json.dumps(report, indent=2) + "\n")
    for name, one in found.items():
        assert one["int8"]["Spearman"] >= 0.99, name


if __name__ == "__main__":
    main()
