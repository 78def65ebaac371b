"""An evaluation of Stable Diffusion's U-Net against diffusers', eager; `gpu.py` runs it.

The same random weights on both sides, in float32 (on neither side by TF32) and in bfloat16.
PyTorch runs with both formats of memory.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import diffusers as untyped
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.images import FORMS
from benchmarks.tuco import first_run, interleave
from common_jax.cost import products
from reward_jax.models.stable_diffusion.config import UNetConfig
from reward_jax.models.stable_diffusion.unet import UNet
from reward_jax.torch_import.stable_diffusion import Axes, theirs

__all__ = ["measure"]

diffusers: Any = untyped  # its lazy names are unknown to a type checker

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ASKED, CLOSE = 1.5, {"float32": 1e-3, "bfloat16": 0.05}
TOKENS, STEPS = 77, 1000


def measure(
    stated: Mapping[str, Any],
    rows: int,
    rounds: int,
    device: str,
    rates: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Medians of one evaluation of so many rows.

    stated: of unet/config.json. device: PyTorch's. rates: FLOP/s of the device by dtype.
    """
    net = UNet(UNetConfig.of(stated, "the benchmark's U-Net"))
    made = reference(stated, device)
    inputs = given(net.config, rows)
    params = ours_of(made, net, inputs)
    cases: dict[str, Callable[[], Any]] = {}
    for dtype in DTYPES:
        cases[f"jax, {dtype}"] = ours(net, params, inputs, dtype)
        for name, form in FORMS.items():
            cases[f"torch, {dtype}, {name}"] = torchs(made, inputs, dtype, form, device)
    found = {name: first_run(name, case) for name, case in cases.items()}
    gaps = {dtype: gap(found, dtype) for dtype in DTYPES}
    print(f"PyTorch and JAX agree within, of the largest value: {gaps}", flush=True)
    assert all(gaps[dtype] < CLOSE[dtype] for dtype in DTYPES), gaps
    seconds = interleave(cases, rounds)
    median = {name: t["median"] for name, t in seconds.items()}
    work = products(jax.make_jaxpr(net.apply)({"params": params}, *inputs)).flops
    return {
        "torch_over_jax": {
            dtype: min(median[f"torch, {dtype}, {form}"] for form in FORMS)
            / median[f"jax, {dtype}"]
            for dtype in DTYPES
        }
        | {"asked": ASKED},
        "teraflops a second": {name: 1e-12 * work / t for name, t in median.items()},
        "share_of_peak": rates and {d: work / rates[d] / median[f"jax, {d}"] for d in DTYPES},
        "teraflop": 1e-12 * work,
        "rows": rows,
        "largest difference from torch, of the largest value": gaps,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "seconds": seconds,
    }


def reference(stated: Mapping[str, Any], device: str) -> Any:
    """Diffusers' U-Net with weights of its own drawing."""
    torch.manual_seed(0)
    with torch.device(device):
        return diffusers.UNet2DConditionModel(**stated).eval()


def given(config: UNetConfig, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Latents, diffusion steps and texts."""
    keys = jax.random.split(jax.random.key(0))
    x_t = jax.random.normal(keys[0], (rows, *config.sample_size, config.in_channels))
    text = jax.random.normal(keys[1], (rows, TOKENS, config.text_width))
    return x_t, jnp.arange(rows) * STEPS // rows, text


def ours_of(made: Any, net: UNet, inputs: Any) -> Any:
    """The same weights in our tree."""
    state = made.state_dict()
    tree = jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]
    shapes: dict[str, Any] = flatten_dict(tree, sep="/")  # pyright: ignore[reportAssignmentType]
    found = {}
    for path, like in shapes.items():
        tensor = state[theirs(path)].cpu().numpy()
        axes = Axes.of(path, tensor.shape, like.shape)
        assert axes is not None, path
        found[path] = jnp.asarray(axes.ours(tensor))
    return unflatten_dict(found, sep="/")


def ours(net: UNet, params: Any, inputs: Any, dtype: str) -> Callable[[], Any]:
    """An evaluation of ours, with weights and text in that dtype."""
    cast = jax.tree.map(lambda x: x.astype(dtype), params)
    x_t, t, text = inputs
    run = jax.jit(net.apply)
    return lambda: run({"params": cast}, x_t, t, text.astype(dtype))


def torchs(
    made: Any, inputs: Any, dtype: str, form: torch.memory_format, device: str
) -> Callable[[], Any]:
    """An evaluation of diffusers', waited for."""
    kind = DTYPES[dtype]
    module = copy.deepcopy(made).to(kind, memory_format=form)
    x_t, t, text = (torch.from_numpy(np.array(x)).to(device) for x in inputs)
    x_t = x_t.movedim(-1, 1).to(kind).contiguous(memory_format=form)
    text = text.to(kind)

    def run() -> torch.Tensor:
        with torch.no_grad(), exact():
            found = module(x_t, t, text).sample
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    return run


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """PyTorch's float32 products are in float32 on a GPU, as ours are."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


def gap(found: Mapping[str, Any], dtype: str) -> float:
    """The largest difference of an evaluation from PyTorch's, of the largest value."""
    wanted = found[f"torch, {dtype}, NCHW"].float().movedim(1, -1).cpu().numpy()
    got = np.asarray(found[f"jax, {dtype}"], np.float32)
    return float(np.abs(wanted - got).max() / np.abs(wanted).max())
