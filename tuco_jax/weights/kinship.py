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

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tuco_jax.models.decoder import Params
from tuco_jax.models.pair import Pair

__all__ = ["layers_of", "notes"]

_UNRELATED = 0.1  # correlation; far above that of strangers, far below that of any tuning
Layer = tuple[Params, Params]  # of the base and of the tuned model, without an axis of layers


def layers_of(pair: Pair) -> Callable[[int], Layer]:
    """The layers of a pair whose tuned model is whole, on the devices where it is."""

    def layer(index: int) -> Layer:
        trees = (pair.base["layers"], pair.tuned["layers"])
        base, tuned = jax.tree.map(lambda x: x[index], trees)
        return base, tuned

    return layer


def notes(layer: Callable[[int], Layer], depth: int) -> list[str]:
    """A note on two models that seem to be no pair, or to be one and the same.

    layer: gives the layers of both by index. Their first, middle and last layers are compared,
    matrix by matrix.
    """
    looked_at = sorted({0, depth // 2, depth - 1})
    sums: dict[str, np.ndarray] = {}
    for name, found in _compared(map(layer, looked_at)):
        sums[name] = sums.get(name, 0) + found
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


def _compared(layers: Iterable[Layer]) -> Iterator[tuple[str, np.ndarray]]:
    """A matrix's name; sums of a b, a^2 and b^2, how many weights are equal, and how many are."""
    for base, tuned in layers:
        changed = dict(jax.tree_util.tree_leaves_with_path(tuned))
        for path, old in jax.tree_util.tree_leaves_with_path(base):
            if old.ndim < 2 or path not in changed:
                continue
            *names, _ = (key.key for key in path)
            sums = jax.device_get(_sums(old, changed[path]))
            yield ".".join(names), np.asarray([*sums, old.size], np.float64)


@jax.jit
def _sums(old: Any, new: Any) -> tuple[Any, ...]:
    a, b = old.astype(jnp.float32), new.astype(jnp.float32)
    return (a * b).sum(), (a * a).sum(), (b * b).sum(), (old == new).sum()
