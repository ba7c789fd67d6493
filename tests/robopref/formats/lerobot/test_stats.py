"""Statistics against NumPy's own, over all frames at once."""

from __future__ import annotations

import numpy as np
import pytest

from robopref.formats.lerobot.stats import QUANTILES, image_stats, merged, vector_stats


def parts(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(index, 1 + index, (steps, 3)).astype(np.float32) for index, steps in enumerate((4, 1, 9))]


def test_of_vectors() -> None:
    values = parts()[2]
    stats = vector_stats(values, quantiles=True)
    assert list(stats) == ["min", "max", "mean", "std", *QUANTILES, "count"]
    np.testing.assert_array_equal(stats["min"], np.min(values, axis=0), strict=True)
    np.testing.assert_array_equal(stats["max"], np.max(values, axis=0), strict=True)
    np.testing.assert_allclose(stats["mean"], np.mean(values, axis=0), rtol=1e-6)
    np.testing.assert_allclose(stats["std"], np.std(values, axis=0), rtol=1e-6)
    np.testing.assert_allclose(stats["q50"], np.median(values, axis=0), rtol=1e-6)
    assert stats["count"].tolist() == [9]
    assert QUANTILES.keys().isdisjoint(vector_stats(values, quantiles=False))


def test_of_single_numbers_and_truth_values() -> None:
    stats = vector_stats(np.array([True, False, False, True]), quantiles=True)
    assert {name: value.shape for name, value in stats.items()} == dict.fromkeys(stats, (1,))
    assert (stats["min"].dtype, stats["min"].item(), stats["max"].item()) == (np.bool_, False, True)
    assert (stats["mean"].item(), stats["std"].item()) == (0.5, 0.5)


def test_of_many_episodes_together() -> None:
    total = vector_stats(parts()[0], quantiles=True)
    for part in parts()[1:]:
        total = merged(total, vector_stats(part, quantiles=True))
    whole = vector_stats(np.concatenate(parts()), quantiles=True)
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(total[name], whole[name], rtol=1e-6)
    counts = [len(part) for part in parts()]
    medians = [np.median(part.astype(np.float64), axis=0) for part in parts()]
    np.testing.assert_allclose(total["q50"], np.average(medians, axis=0, weights=counts), rtol=1e-6)


def test_of_infinite_numbers_without_warnings() -> None:
    stats = vector_stats(np.array([np.inf, 1.0, -np.inf]), quantiles=True)
    total = merged(stats, stats)
    assert (total["min"].item(), total["max"].item()) == (-np.inf, np.inf)
    assert np.isnan(total["mean"].item())


def test_of_images() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3)).astype(np.uint8)
    stats = image_stats(frames, quantiles=True)
    assert {name: value.shape for name, value in stats.items() if name != "count"} == dict.fromkeys(
        ["min", "max", "mean", "std", *QUANTILES], (3, 1, 1)
    )
    pixels = frames.reshape(-1, 3) / 255
    for name, expected in {
        "min": pixels.min(0),
        "max": pixels.max(0),
        "mean": pixels.mean(0),
        "std": pixels.std(0),
    }.items():
        np.testing.assert_allclose(stats[name].ravel(), expected)
    assert stats["count"].tolist() == [5]


@pytest.mark.parametrize(("length", "count"), [(1, 1), (100, 100), (400, 100), (1000, 177), (2000, 299)])
def test_long_episodes_are_sampled_from_end_to_end(length: int, count: int) -> None:
    frames = np.zeros((length, 2, 2, 3), np.uint8)
    frames[0], frames[-1] = 1, 255
    stats = image_stats(frames, quantiles=False)
    assert stats["count"].tolist() == [count]
    assert stats["max"].ravel().tolist() == [1, 1, 1]


def test_large_images_are_thinned_in_place() -> None:
    frames = np.zeros((1, 320, 300, 3), np.uint8)
    frames[:, ::2, ::2] = 255
    assert image_stats(frames, quantiles=False)["min"].ravel().tolist() == [1, 1, 1]
    small = frames[:, :299, :299]
    assert image_stats(small, quantiles=False)["min"].ravel().tolist() == [0, 0, 0]
