"""Memory that loading a random Stable Diffusion takes, beyond its arrays, over 8 devices.

    python -m benchmarks.load_images [--out benchmarks/results] [--width 320]

As `load.py` measures it, of folders that diffusers writes: a U-Net of 1.5's first two levels with
a small autoencoder and text encoder, after tiny ones have been loaded. 500 MB of disk.
"""

import argparse
import json
import pathlib
import tempfile
from typing import Any

from benchmarks.load import LAYOUTS, answer, start, taken
from benchmarks.stream import HERE

WIDTH = 320  # channels of the U-Net's first level


def write(folder: pathlib.Path, width: int) -> None:
    """A tiny model, and one of that width."""
    from tests.reward.stable_diffusion_reference import UNET, pipeline

    levels: dict[str, Any] = dict(block_out_channels=(width, 2 * width), layers_per_block=2)
    levels |= dict(cross_attention_dim=768, attention_head_dim=8, norm_num_groups=32)
    pipeline().save_pretrained(folder / "small")
    pipeline(unet=UNET | levels).save_pretrained(folder / "large")


def load(folder: pathlib.Path, layout: tuple[int, int, int]) -> dict[str, Any]:
    """What a process of its own does: load, and tell how much memory that took."""
    import jax

    from common_jax.mesh import make_mesh
    from reward_jax import load_stable_diffusion

    mesh = make_mesh(*layout)

    def arrays(size: str) -> Any:
        sd = load_stable_diffusion(folder / size, mesh=mesh)
        return jax.block_until_ready((sd.unet, sd.encoder, sd.decoder, sd.text))

    found = taken(arrays)
    sizes = [x.nbytes for x in jax.tree.leaves(arrays("large"))]
    return {"layout": "x".join(map(str, layout))} | found | {"largest": max(sizes)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory that loading Stable Diffusion takes.")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--width", type=int, default=WIDTH, help="channels of the first level")
    layouts = ["x".join(map(str, layout)) for layout in LAYOUTS]
    parser.add_argument("--layouts", nargs="+", choices=layouts, default=layouts)
    parser.add_argument("--folder", type=pathlib.Path, help="of one load, in its own process")
    args = parser.parse_args()
    if args.folder is not None:
        data, fsdp, tensor = map(int, args.layouts[0].split("x"))
        print(json.dumps(load(args.folder, (data, fsdp, tensor))))
        return

    with tempfile.TemporaryDirectory() as name:
        write(pathlib.Path(name), args.width)
        module = "benchmarks.load_images"
        runs = [answer(start(name, "--layouts", one, module=module)) for one in args.layouts]
    for run in runs:
        print(
            f"{run['layout']}: arrays {run['arrays'] / 1e6:.0f} MB, a device's share "
            f"{run['share'] / 1e6:.0f}, the largest parameter {run['largest'] / 1e6:.1f}, beyond "
            f"the arrays {run['beyond'] / 1e6:.1f} (asked: at most {run['allowed'] / 1e6:.0f})"
        )
    from benchmarks.machine import machine

    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"runs": runs} | machine(), indent=2)
    (args.out / "load_images.json").write_text(text + "\n")
    assert all(run["beyond"] <= run["allowed"] for run in runs)


if __name__ == "__main__":
    main()
