"""Statistics of features, as LeRobot keeps them of every episode and of the whole dataset.

Per feature: min, max, mean, standard deviation and count; for version 3 also the quantiles 1, 10, 50, 90 and 99%.
Images are sampled and thinned, scaled to [0, 1], and have theirs per channel, as [3, 1, 1]. Over episodes, means and
quantiles are averaged by count, as LeRobot does: a quantile of the whole dataset is thus an approximation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from jaxtyping import Shaped, UInt8

Stats: TypeAlias = Mapping[str, np.ndarray]
"""Of one feature, by name."""

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

_ALL_FRAMES, _MOST_FRAMES, _SAMPLE_POWER = 100, 10_000, 0.75
_THIN_FROM, _THIN_TO = 300, 150


def vector_stats(values: Shaped[np.ndarray, "T ..."], *, quantiles: bool) -> dict[str, np.ndarray]:
    """Statistics of a feature over the frames of an episode; arrays of the feature's shape."""
    flat = values.reshape(len(values), -1)
    exact = flat.astype(np.float64)
    # Infinite numbers have no mean, which the statistics then say.
    with np.errstate(invalid="ignore", over="ignore"):
        stats = {"min": flat.min(axis=0), "max": flat.max(axis=0), "mean": exact.mean(axis=0), "std": exact.std(axis=0)}
        if quantiles:
            stats |= dict(zip(QUANTILES, np.quantile(exact, list(QUANTILES.values()), axis=0), strict=True))
    return stats | {"count": np.array([len(values)])}


def image_stats(frames: UInt8[np.ndarray, "T H W 3"], *, quantiles: bool) -> dict[str, np.ndarray]:
    """Statistics per channel of some of the frames, [3, 1, 1]; the count is that of the frames used."""
    sampled = frames[_sampled(len(frames))]
    longest = max(frames.shape[1:3])
    step = longest // _THIN_TO if longest >= _THIN_FROM else 1
    pixels = sampled[:, ::step, ::step].reshape(-1, 3)
    stats = vector_stats(pixels, quantiles=quantiles)
    scaled = {name: (value / 255.0).reshape(3, 1, 1) for name, value in stats.items() if name != "count"}
    return scaled | {"count": np.array([len(sampled)])}


def _sampled(length: int) -> np.ndarray:
    """All frames of a short episode, and a share that falls with the length of a longer one, evenly spread."""
    count = max(min(length, _ALL_FRAMES), min(int(length**_SAMPLE_POWER), _MOST_FRAMES))
    indices: np.ndarray = np.round(np.linspace(0, length - 1, count)).astype(np.int64)
    return indices


def merged(first: Stats, second: Stats) -> dict[str, np.ndarray]:
    """Statistics of what two statistics of a feature were taken of, together."""
    counts = first["count"], second["count"]
    total = counts[0] + counts[1]
    shares = [count / total for count in counts]

    def average(name: str) -> np.ndarray:
        value: np.ndarray = first[name] * shares[0] + second[name] * shares[1]
        return value

    with np.errstate(invalid="ignore", over="ignore"):
        mean = average("mean")
        # The variance within plus that between: exact whatever the counts.
        variances = [each["std"] ** 2 + (each["mean"] - mean) ** 2 for each in (first, second)]
    return {
        "min": np.minimum(first["min"], second["min"]),
        "max": np.maximum(first["max"], second["max"]),
        "mean": mean,
        "std": np.sqrt(variances[0] * shares[0] + variances[1] * shares[1]),
        **{name: average(name) for name in QUANTILES if name in first},
        "count": total,
    }
