"""`tuco-jax score --stream` of a pair four times as large as the memory that the process may use.

    python -m benchmarks.stream [--out benchmarks/results]

A random pair is written to disk and scored twice, each time in a new process: in memory, and
streamed under a limit that the kernel keeps (RLIMIT_DATA: all that a process may write to, its
libraries' own data included). Scores must be equal. Four minutes on two quiet cores, 5 GB of disk.
"""

import argparse
import json
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

LIMIT = 1 << 30  # bytes that the streaming process may hold
WIDTH, HIDDEN, DEPTH, WORDS = 768, 2048, 76, 4096
BATCHES, TOKENS = 6, 1024  # about; of a batch
HERE = pathlib.Path(__file__).parent


def shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a layer, as a Hugging Face checkpoint holds it."""
    square = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    mlp = {f"mlp.{name}_proj": (hidden, width) for name in ("gate", "up")}
    norms = {name: (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    return square | mlp | {"mlp.down_proj": (width, hidden)} | norms


def write_model(
    folder: pathlib.Path,
    rng: np.random.Generator,
    depth: int = DEPTH,
    *,
    width: int = WIDTH,
    hidden: int = HIDDEN,
) -> int:
    """A random model in float32, a shard a layer; returns its bytes."""
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0").save_pretrained(folder)
    ends = {"model.embed_tokens.weight": (WORDS, width), "model.norm.weight": (width,)}
    parts = [
        {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in shapes(width, hidden).items()
        }
        for layer in range(depth)
    ]
    index, total = {}, 0
    for number, part in enumerate([ends, *parts]):
        tensors = {
            name: np.ones(shape, np.float32)
            if len(shape) == 1
            else rng.standard_normal(shape, np.float32) * np.float32(0.7 * shape[1] ** -0.5)
            for name, shape in part.items()
        }
        file = f"model-{number + 1:05d}-of-{depth + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(x.nbytes for x in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return total


def write_prompts(path: pathlib.Path, rng: np.random.Generator) -> None:
    """Prompts of 8 to 248 tokens."""
    left = BATCHES * TOKENS * 0.97
    with path.open("w") as file:
        while (size := int(rng.integers(8, 249))) < left:
            text = " ".join(f"w{i}" for i in rng.integers(0, WORDS, size))
            file.write(json.dumps({"prompt": text}) + "\n")
            left -= size


def score(folder: pathlib.Path, stream: bool) -> None:
    """What a process of its own does: score, and tell how much memory that took."""
    if stream:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    from tuco_jax.scoring.options import PassOptions, ScoreFileOptions
    from tuco_jax.scoring.score_file import score_file

    options = ScoreFileOptions(
        base=str(folder / "base"),
        tuned=str(folder / "tuned"),
        prompts=str(folder / "prompts.jsonl"),
        out=str(folder / f"{stream}.jsonl"),
        layers=True,
        stream=stream,
        passes=PassOptions(memory=4 / 1024),  # 4 MiB: nearly all streams on disk
    )
    meta = score_file(options, progress=False)
    status = pathlib.Path("/proc/self/status").read_text()
    found = re.findall(r"^(VmHWM):\s*(\d+) kB", status, re.MULTILINE)
    used = resource.getrusage(resource.RUSAGE_SELF)
    measured = {name: 1024 * int(value) for name, value in found}
    measured |= {"meta": meta, "processor": used.ru_utime + used.ru_stime}
    (folder / f"{stream}.run.json").write_text(json.dumps(measured))


def where(stream: bool) -> str:
    """What a run is called in the report."""
    return "streamed" if stream else "in memory"


def read_scores(path: pathlib.Path) -> np.ndarray:
    """Every prompt's beta of each layer, [N, L]; the last is its TuCo."""
    return np.asarray([json.loads(line)["layers"] for line in path.open()])


def main() -> None:
    parser = argparse.ArgumentParser(description="A pair that memory does not hold.")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--folder", type=pathlib.Path, help="of one run, in its own process")
    parser.add_argument("--stream", action="store_true")
    args = parser.parse_args()
    if args.folder is not None:
        score(args.folder, args.stream)
        return

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        rng = np.random.default_rng(0)
        held = sum(write_model(folder / half, rng) for half in ("base", "tuned"))
        write_prompts(folder / "prompts.jsonl", rng)
        runs: dict[bool, dict[str, Any]] = {}
        for stream in (False, True):
            command = [sys.executable, "-m", "benchmarks.stream", "--folder", name]
            subprocess.run([*command, *["--stream"] * stream], check=True)
            runs[stream] = json.loads((folder / f"{stream}.run.json").read_text())
        one, other = (read_scores(folder / f"{stream}.jsonl") for stream in (False, True))
        gap = float(np.abs(one - other).max())

    # Compiling included: in memory the first batch's computing is part of what is called so.
    parts = {stream: run["meta"]["seconds"] for stream, run in runs.items()}
    seconds = {stream: (s["compile"] + s["run"]) / BATCHES for stream, s in parts.items()}
    report = {
        "figures": {
            "the pair / the limit (asked: at least 4)": held / LIMIT,
            "largest difference of a score (asked: 1e-5)": gap,
            "a batch streamed / in memory (asked: at most 1.3)": seconds[True] / seconds[False],
        },
        "bytes": {
            "pair": held,
            "limit": LIMIT,
            "peak resident, streamed": runs[True]["VmHWM"],
            "peak resident, in memory": runs[False]["VmHWM"],
        },
        "batch_seconds": {"in memory": seconds[False], "streamed": seconds[True]},
        "seconds": {where(stream): part for stream, part in parts.items()},
        "processor_seconds": {where(stream): run["processor"] for stream, run in runs.items()},
        "prompts": len(one),
        "shapes": runs[True]["meta"]["shapes"],
        "padding": runs[True]["meta"]["padding"],
    }
    from benchmarks.machine import machine

    report |= machine()
    print(json.dumps(report, indent=2))
    assert held >= 4 * LIMIT and gap < 1e-5
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "stream.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
