"""Guidance scales, tried one by one, and beyond those given while the best is at an edge."""

from collections.abc import Callable, Sequence

__all__ = ["sweep"]

_WIDENED = 4  # times at most that a sweep goes beyond the scales that it was given


def sweep(
    scales: Sequence[float], attempt: Callable[[float], object], best: Callable[[], float | None]
) -> None:
    """Try every scale; then, while the best is the smallest or the largest tried, the next one.

    attempt: tries a scale. best: that of the best try so far, None where all have failed. The next
    scale lies as far beyond the edge, as a ratio, as the edge beyond its neighbour. Of one scale
    there is no next, nor below 0.
    """
    tried = list(map(float, scales))
    for scale in tried:
        attempt(scale)
    for _ in range(_WIDENED):
        scale = _beyond(tried, best())
        if scale is None or scale in tried:
            return
        attempt(scale)
        tried.append(scale)


def _beyond(tried: Sequence[float], best: float | None) -> float | None:
    """The scale next to the best where that is at an edge."""
    scales = sorted(set(tried))
    if best is None or len(scales) < 2 or best not in (scales[0], scales[-1]):
        return None
    return best**2 / (scales[1] if best == scales[0] else scales[-2])
