"""What one of several processes does beyond commands: functions of the package itself."""

import dataclasses

import numpy as np

from common_jax.distributed import is_first
from common_jax.mesh import fetch, mesh_for
from tests.tuco import random_models as rm
from tuco_jax.core.decompose import decompose
from tuco_jax.models.sharding import place, put_rows


def decomposed(path: str, sizes: str) -> None:
    """Decompositions of a mixture of experts and of a dense pair, in one file."""
    mesh = mesh_for({axis: int(n) for axis, n in zip(("data", "fsdp"), sizes, strict=True)})
    dense = rm.config(width=32, heads=4, kv_heads=2, head_dim=8, mlp_width=48)
    sparse = dataclasses.replace(dense, mlp_bias=False, experts=4, experts_used=2)
    found = {}
    for name, config in (("dense", dense), ("sparse", sparse)):
        pair = rm.full_pair(base=config)
        if mesh is not None:
            pair = place(pair, mesh)
        tokens, mask = put_rows(rm.batch(rows=4), mesh)
        out = fetch(decompose(pair, tokens, mask, 0.7, layers=True, logits=True, mesh=mesh))
        real = np.asarray(rm.batch(rows=4)[1])
        found |= {f"{name} {k}": getattr(out, k)[..., real, :] for k in ("ptc", "ftc", "logits")}
    if is_first():
        np.savez(path, **found)
