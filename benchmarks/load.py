"""Memory that loading a random 2 GB pair takes, beyond the arrays, over 8 devices and 2 processes.

    python -m benchmarks.load [--out benchmarks/results] [--depth 36] [--sources files ...]
                              [--layouts 1x8x1 ...]

Each load is a process of its own, with 8 fake CPU devices, whose arrays lie in the host's memory:
what is measured is the peak of resident memory, less what was resident before (a small pair has
been loaded by then), less the arrays. Then two processes with one device each, over fsdp. What the
files hold is loaded as int8, too, and by orbax's own layout of safetensors, which leaves matrices
as they are stored, layer by layer: these are then turned and stacked. GGUF files hold the same
numbers in Q8_0, which loading widens to float32. Seven minutes on two quiet cores, 6 GB of disk.

--sources: of files, store, "files as int8", gguf and "files by orbax"; what some of them took goes
into a file of its own, such as load_gguf.json.
"""

import argparse
import gc
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.stream import HERE, write_model
from common_jax.distributed import joined

DEPTH, SMALL = 36, 2  # layers
LAYOUTS = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
ORBAX = "files by orbax"
SOURCES = {
    "files": LAYOUTS,
    "store": LAYOUTS,
    "files as int8": LAYOUTS,
    "gguf": LAYOUTS,
    ORBAX: LAYOUTS[1:3],  # no device with another's parts: XLA, which stacks, would copy them
}
APART = (1, 2, 1)  # of two processes
FLAG = "--xla_force_host_platform_device_count"


def memory(field: str) -> int:
    """A line of this process's status, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s*(\d+) kB", status, re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def load(folder: pathlib.Path, source: str, layout: tuple[int, int, int]) -> dict[str, Any]:
    """What a process of its own does: load, and tell how much memory that took."""
    import jax

    from common_jax.mesh import make_mesh
    from tuco_jax.weights.hf.model import read_tokenizer
    from tuco_jax.weights.load import load_pair

    mesh = make_mesh(*layout)

    def pair(size: str, source: str = source) -> Any:
        if source == ORBAX:
            return [by_orbax(folder / size / name, mesh) for name in ("base", "tuned")]
        names = [str(folder / size / name) for name in ("base", "tuned")]
        if source == "store":
            names = [str(folder / size / "store")] * 2
        tokenizer = read_tokenizer(names[1])
        if source == "gguf":
            names = [f"{name}.gguf" for name in names]
        dtype = "int8" if source.endswith("int8") else "float32"
        given: Any = dict(dtype=dtype, mesh=mesh, tokenizer=tokenizer)
        return jax.block_until_ready(load_pair(*names, **given)[0])

    if source in (ORBAX, "gguf"):
        check_equal(pair("small"), pair("small", "files"), rounded=source == "gguf")
    where = {"layout": "x".join(map(str, layout)), "process": jax.process_index()}
    return {"source": source} | where | taken(pair)


def taken(load: Callable[[str], Any]) -> dict[str, Any]:
    """Memory and time that loading "large" takes; load: the name of a size -> a tree of arrays."""
    import jax

    load("small")  # imports, the backend, compiled programs
    gc.collect()
    before = memory("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began = time.perf_counter()
    leaves = jax.tree.leaves(load("large"))
    seconds = time.perf_counter() - began
    # A part that several devices hold is one piece of the host's memory, or a copy each.
    shards = [s.data for x in leaves for s in x.addressable_shards]
    held = sum({x.unsafe_buffer_pointer(): x.nbytes for x in shards}.values())
    share = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    beyond = memory("VmHWM") - before - held
    allowed = 1.3 * share + 200e6
    return {
        "arrays": held,
        "share": share,
        "beyond": beyond,
        "allowed": allowed,
        "seconds": seconds,
    }


def check_equal(one: Any, other: Any, rounded: bool = False) -> None:
    """Two trees of arrays hold the same numbers at the same places; rounded: to 8 bits."""
    import jax

    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
            a, b = np.asarray(a.data), np.asarray(b.data)
            off = np.abs(b).max() / 127 if rounded else 0.0
            np.testing.assert_allclose(a, b, rtol=0, atol=off)


def by_orbax(folder: pathlib.Path, mesh: Any) -> Any:
    """A model's parameters as ours are, from tensors that orbax has read to their shards."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict, unflatten_dict
    from jax.sharding import NamedSharding, PartitionSpec
    from orbax.checkpoint.experimental import v1 as ocp

    from tuco_jax.models.decoder import param_shapes
    from tuco_jax.models.sharding import placement
    from tuco_jax.weights.assemble import stored_names
    from tuco_jax.weights.keys import FAMILIES
    from tuco_jax.weights.load import model_config

    config = model_config(str(folder))
    table, where = FAMILIES[config.family].table(), placement(mesh)
    wanted: dict[str, jax.ShapeDtypeStruct] = {}
    made: dict[str, Any] = {}
    shapes: dict[str, Any] = flatten_dict(param_shapes(config), sep="/")  # pyright: ignore[reportAssignmentType]
    for path, spec in shapes.items():
        names = [name for name, _ in stored_names(table[path].tensor, path, config)]
        sharding, layered = where(path, spec.shape), path.startswith("layers/")
        axes = (*sharding.spec, *(None,) * (len(spec.shape) - len(sharding.spec)))
        turn = -1 if table[path].rows == 1 else 1  # matrices are stored [out, in]
        axes, shape = axes[layered:][::turn], spec.shape[layered:][::turn]
        cut = NamedSharding(mesh, PartitionSpec(*axes))
        wanted |= dict.fromkeys(names, jax.ShapeDtypeStruct(shape, spec.dtype, sharding=cut))
        made[path] = names, turn, layered, sharding

    context = ocp.Context()
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    context.memory.read_concurrent_bytes = 1 << 26  # in flight, instead of 2 GiB
    with context:
        tensors: Any = ocp.load(str(folder), wanted)
    params = {}
    for path, (names, turn, layered, sharding) in made.items():

        def whole(*parts: jax.Array) -> jax.Array:
            turned = [x if turn == 1 else x.T for x in parts]  # noqa: B023
            return jnp.stack(turned) if layered else turned[0]  # noqa: B023

        parts = [tensors.pop(name) for name in names]
        params[path] = jax.block_until_ready(jax.jit(whole, out_shardings=sharding)(*parts))
        del parts
    return unflatten_dict(params, sep="/")


def store(folder: pathlib.Path) -> None:
    """The pairs of both sizes as stores."""
    from tuco_jax.weights.load import load_pair
    from tuco_jax.weights.orbax.store import save_pair

    for size in ("small", "large"):
        where = folder / size
        save_pair(where / "store", *load_pair(str(where / "base"), str(where / "tuned")))


def gguf(folder: pathlib.Path) -> None:
    """The models of both sizes as GGUF files, in Q8_0 but for norms."""
    from transformers import AutoModelForCausalLM

    from tests.tuco.weights.gguf.writer import write

    for size in ("small", "large"):
        for name in ("base", "tuned"):
            model = AutoModelForCausalLM.from_pretrained(folder / size / name)
            write(folder / size / f"{name}.gguf", model, model.config, kinds={"": "Q8_0"})


MADE = {"store": store, "gguf": gguf}  # from the files, in a process of its own


def start(
    folder: str, *argv: str, devices: int = 8, module: str = "benchmarks.load"
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, "--folder", folder, *argv]
    env = os.environ | {"XLA_FLAGS": f"{FLAG}={devices}"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory that loading takes.")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--depth", type=int, default=DEPTH, help="layers of the large pair")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    layouts = ["x".join(map(str, layout)) for layout in (*LAYOUTS, APART)]
    parser.add_argument("--layouts", nargs="+", choices=layouts, default=layouts)
    parser.add_argument("--folder", type=pathlib.Path, help="of one load, in its own process")
    parser.add_argument("--source", choices=SOURCES)
    parser.add_argument("--layout", type=lambda x: tuple(map(int, x.split("x"))))
    parser.add_argument("--process", type=int)
    parser.add_argument("--coordinator")
    args = parser.parse_args()
    if args.folder is not None and args.source is None:
        MADE[args.sources[0]](args.folder)
        return
    if args.folder is not None:
        several: dict[str, Any] = {}
        if args.coordinator:
            several = {"coordinator": args.coordinator, "processes": 2, "process": args.process}
        with joined("load", **several):
            found = load(args.folder, args.source, args.layout)
        print(json.dumps(found))
        return

    with tempfile.TemporaryDirectory() as name:
        rng = np.random.default_rng(0)
        for size, depth in (("small", SMALL), ("large", args.depth)):
            (pathlib.Path(name) / size).mkdir()
            for half in ("base", "tuned"):
                write_model(pathlib.Path(name) / size / half, rng, depth)
        for source in args.sources:
            if source in MADE and start(name, "--sources", source).wait():
                raise SystemExit(f"{source}: could not be made")
        runs = []
        for source in args.sources:
            for layout in ("x".join(map(str, one)) for one in SOURCES[source]):
                if layout in args.layouts:
                    runs.append(answer(start(name, "--source", source, "--layout", layout)))
        apart = "x".join(map(str, APART))
        for source in args.sources if apart in args.layouts else ():
            argv = ["--source", source, "--layout", apart, "--coordinator", "localhost:35911"]
            both = [start(name, *argv, "--process", str(i), devices=1) for i in range(2)]
            runs += [answer(process) for process in both]
    for run in runs:
        print(
            f"{run['source']} {run['layout']} process {run['process']}: arrays "
            f"{run['arrays'] / 1e6:.0f} MB, beyond them {run['beyond'] / 1e6:.0f} MB (asked: at "
            f"most {run['allowed'] / 1e6:.0f}), {run['seconds']:.1f} s"
        )
    from benchmarks.machine import machine

    args.out.mkdir(parents=True, exist_ok=True)
    some = "" if args.sources == list(SOURCES) else "_".join(["", *args.sources]).replace(" ", "-")
    (args.out / f"load{some}.json").write_text(
        json.dumps({"runs": runs} | machine(), indent=2) + "\n"
    )
    assert all(run["beyond"] <= run["allowed"] for run in runs if run["source"] != ORBAX)


if __name__ == "__main__":
    main()
