"""`tuco-jax score` of 50,000 prompts, killed at random points and started again.

    python -m benchmarks.soak [--prompts 50000] [--kills 20] [--out benchmarks/results]

A small random pair. One process scores all prompts undisturbed, while its resident memory is read
against the rows in its journal; then a run of the same prompts is killed (SIGKILL) again and
again, while it starts, loads, computes and writes. Both tables must be equal to the byte: no row
lost, doubled or changed. Some six minutes on two quiet cores.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

from benchmarks.stream import HERE, WORDS, write_model

PROMPTS, KILLS = 50_000, 20
SETTLED = 0.1  # the share of rows before which memory may grow: the allocator's pools fill
DEPTH, WIDTH, HIDDEN = 2, 128, 256


def write(folder: pathlib.Path, prompts: int, rng: np.random.Generator) -> None:
    """The pair, and prompts of 4 to 48 tokens."""
    for half in ("base", "tuned"):
        write_model(folder / half, rng, DEPTH, width=WIDTH, hidden=HIDDEN)
    with (folder / "prompts.jsonl").open("w") as file:
        for i, size in enumerate(rng.integers(4, 49, prompts)):
            text = " ".join(f"w{word}" for word in rng.integers(0, WORDS, size))
            file.write(json.dumps({"id": f"p{i}", "prompt": text}) + "\n")


def start(folder: pathlib.Path, name: str) -> subprocess.Popen[bytes]:
    """A process that scores the folder's prompts into the file of that name."""
    command = [sys.executable, "-m", "tuco_jax.cli", "score", "--layers"]
    for option in ("base", "tuned"):
        command += [f"--{option}", str(folder / option)]
    command += ["--prompts", str(folder / "prompts.jsonl"), "--out", str(folder / name)]
    env = os.environ | {"XLA_FLAGS": ""}  # one device, as users have it
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)


def resident(process: int) -> int:
    """Bytes that a process holds; 0 for one that has ended."""
    try:
        fields = pathlib.Path(f"/proc/{process}/statm").read_text().split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def undisturbed(folder: pathlib.Path, name: str) -> tuple[list[tuple[int, int]], int]:
    """Score all; returns samples of the journal's bytes and memory, and the most bytes seen."""
    journal, samples = folder / f"{name}.journal", []
    process = start(folder, name)
    while process.poll() is None:
        written, held = size(journal), resident(process.pid)
        if written and held:
            samples.append((written, held))
        time.sleep(0.02)
    assert process.returncode == 0
    return samples, max(written for written, _ in samples)


def slope(samples: Sequence[tuple[int, int]], whole: int, prompts: int) -> float:
    """Megabytes of memory that 1,000 prompts leave behind, from `SETTLED` on.

    The median slope of any two samples: a thread that takes its pool from the system, 8 MB once,
    is no slope. The table is written after the last row: samples of a whole journal are left out.
    """
    rows = np.array([(w / whole * prompts, m) for w, m in samples if SETTLED * whole < w < whole])
    assert len(rows) >= 10, f"{len(rows)} samples: give more prompts"
    rows = rows[:: max(1, len(rows) // 1000)]
    found: Any = scipy.stats.theilslopes(rows[:, 1] / 1e6, rows[:, 0] / 1000)
    return float(found.slope)


def killed(
    folder: pathlib.Path, name: str, kills: int, whole: int, rng: np.random.Generator
) -> list[float]:
    """Score all, killed at random shares of the journal's bytes; returns these shares.

    Every fifth is killed within its first seconds, wherever it is then.
    """
    journal, shares = folder / f"{name}.journal", []
    for number, share in enumerate(sorted(rng.uniform(0.02, 0.98, kills))):
        process = start(folder, name)
        patience = time.monotonic() + (rng.uniform(0.1, 4) if number % 5 == 4 else 600)
        while size(journal) < share * whole and time.monotonic() < patience:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        shares.append(size(journal) / whole)
        assert not (folder / name).exists()
    assert start(folder, name).wait() == 0
    return shares


def soak(folder: pathlib.Path, prompts: int, kills: int, seed: int = 0) -> dict[str, Any]:
    """What the report holds; AssertionError where a row is lost, doubled or changed."""
    rng = np.random.default_rng(seed)
    write(folder, prompts, rng)
    samples, whole = undisturbed(folder, "whole.jsonl")
    shares = killed(folder, "killed.jsonl", kills, whole, rng)
    one, other = ((folder / f"{name}.jsonl").read_bytes() for name in ("whole", "killed"))
    ids = [json.loads(line)["id"] for line in one.splitlines()]
    assert ids == [f"p{i}" for i in range(prompts)], "rows are lost, doubled or out of order"
    assert one == other, "a run that was killed and resumed gave another table"
    assert not (folder / "killed.jsonl.journal").exists()
    return {
        "prompts": prompts,
        "kills": kills,
        "killed_at": [round(share, 4) for share in shares],
        "tables_equal": one == other,
        "megabytes_per_1000_prompts": slope(samples, whole, prompts),
        "resident_megabytes": max(held for _, held in samples) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A long run, killed again and again.")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = soak(pathlib.Path(name), args.prompts, args.kills)
    from benchmarks.machine import machine

    report |= machine()
    print(json.dumps(report, indent=2))
    assert report["megabytes_per_1000_prompts"] < 1
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "soak.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
