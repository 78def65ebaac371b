"""Whether two models' weights are those of one model before and after tuning.

Nothing in files says that two models of one shape are related. Tuning leaves a matrix close to
what it was: its correlation with the base's matrix is near 1 (above .99 for the usual fine-tune).
Those of two models that were trained from two initialisations are uncorrelated. So are matrices
whose rows or columns are in another order, as when one of two files has queries and keys permuted
for another kind of RoPE.

TuCo of two strangers means nothing. Where their blocks add vectors of one size, |FT - PT| is about
sqrt(2) |PT|, and TuCo sqrt(2) / (1 + sqrt(2)) = .59.

Legend: L layers.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tuco_jax.models.decoder import Params

__all__ = ["matrices", "notes"]

_UNRELATED = 0.1  # correlation; far above that of strangers, far below that of any tuning
# A matrix's name, and it in the base and in the tuned model, [..., O, I]; all experts' is one.
Matrices = Iterable[tuple[str, Any, Any]]


def matrices(base: Params, tuned: Params) -> Matrices:
    """The matrices of one layer of both models, or of all layers stacked on axis 0."""
    changed = dict(jax.tree_util.tree_leaves_with_path(tuned))
    for path, old in jax.tree_util.tree_leaves_with_path(base):
        if path[-1].key not in ("bias", "scale") and path in changed:
            yield ".".join(key.key for key in path[:-1]), old, changed[path]


def notes(layer: Callable[[int], Matrices], depth: int, *, stacked: bool = False) -> list[str]:
    """A note on two models that seem to be no pair, or to be one and the same.

    layer: gives the `matrices` of the layer of an index; with `stacked`, those of all layers. The
    first, middle and last layer are compared.
    """
    looked_at = sorted({0, depth // 2, depth - 1})
    sums: dict[str, np.ndarray] = {}
    for index in looked_at:
        for name, old, new in layer(index):
            # Stacked layers are not cut apart, which would hold each of them twice.
            at = index if stacked else None
            found = jax.device_get(_sums(old, new, at))
            size = old.size // (len(old) if stacked else 1)
            sums[name] = sums.get(name, 0) + np.asarray([*found, size], np.float64)
    where = f"in layers {', '.join(str(i) for i in looked_at)}"
    total = sum(sums.values(), np.zeros(5))
    if total[3] == total[4]:
        return [f"all matrices {where} are equal: tuning did not change them, or both are one"]
    correlations = {name: _correlation(found) for name, found in sums.items()}
    odd = {name: value for name, value in correlations.items() if value < _UNRELATED}
    if not odd:
        return []
    if len(odd) == len(sums):
        return [
            f"the two models seem unrelated: {where} their matrices correlate by "
            f"{_correlation(total):.2f} (a fine-tune's by nearly 1) and {total[3] / total[4]:.1%} "
            "of their weights are equal; TuCo is near .59 for any two such models and says "
            "nothing of tuning: look whether the base is the one that was tuned"
        ]
    named = ", ".join(f"{name} ({value:.2f})" for name, value in sorted(odd.items()))
    return [
        f"some matrices seem unrelated to the base's {where}, by their correlation: {named}; "
        "they were replaced, or stand in another order in one of the two files"
    ]


def _correlation(sums: np.ndarray) -> float:
    """Of a matrix with another: means are left where they are, near 0."""
    product, old, new = sums[:3]
    size = float(np.sqrt(old * new))
    return float(product) / size if size else float(old == new)


@jax.jit
def _sums(old: Any, new: Any, index: Any) -> tuple[Any, ...]:
    """Sums of a b, a^2 and b^2, and how many weights are equal."""
    if index is not None:
        old, new = (jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in (old, new))
    a, b = old.astype(jnp.float32), new.astype(jnp.float32)
    return (a * b).sum(), (a * a).sum(), (b * b).sum(), (a == b).sum()
