"""Random shifts against padding and cropping in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robopref.images import augment, random_shift
from robopref.networks import Pixels

PAD, HEIGHT, WIDTH = 2, 5, 7
PLACES = [(down, right) for down in range(2 * PAD + 1) for right in range(2 * PAD + 1)]


def random_images(*batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*batch, HEIGHT, WIDTH, 3), dtype=np.uint8)


def crops(image: np.ndarray) -> list[np.ndarray]:
    """What each of `PLACES` makes of an image: its borders repeated all around, and a window cut out."""
    padded = np.pad(image, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="edge")
    return [padded[down : down + HEIGHT, right : right + WIDTH] for down, right in PLACES]


def place(image: np.ndarray, shifted: np.ndarray) -> int:
    """Which of `PLACES` has made `shifted` of `image`."""
    (found,) = [index for index, crop in enumerate(crops(image)) if np.array_equal(crop, shifted)]
    return found


def test_an_image_is_padded_with_its_border_and_cropped() -> None:
    images = random_images(40)
    shifted = np.asarray(random_shift(jnp.asarray(images), jax.random.key(0), PAD))
    assert shifted.shape == images.shape
    found = [place(image, each) for image, each in zip(images, shifted, strict=True)]
    assert len(set(found)) > 12


def test_every_place_is_as_likely() -> None:
    count = 10_000
    # One bright pixel in the middle says where an image went.
    images = np.zeros((count, 5, 5, 1), np.uint8)
    images[:, 2, 2] = 255
    shifted = np.asarray(random_shift(jnp.asarray(images), jax.random.key(1), PAD))
    counts = (shifted > 0).sum(axis=(0, 3))
    assert counts.sum() == count
    # Binomial with mean 400 and standard deviation 19.6.
    assert (np.abs(counts - 400) < 5 * 19.6).all()


def test_all_images_of_an_element_share_its_shift_and_elements_differ() -> None:
    images = random_images(12, 2, 3)
    shifted = np.asarray(random_shift(jnp.asarray(images), jax.random.key(2), PAD))
    found = np.array([place(image, each) for image, each in zip(*map(flat, (images, shifted)), strict=True)])
    found = found.reshape(12, 6)
    assert (found == found[:, :1]).all()
    assert len(set(found[:, 0].tolist())) > 4


def flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(-1, HEIGHT, WIDTH, 3)


def test_the_key_decides() -> None:
    images = jnp.asarray(random_images(12))
    first, again, other = (np.asarray(random_shift(images, jax.random.key(seed), PAD)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32])
@pytest.mark.parametrize("pad", [0, PAD])
def test_the_type_of_number_is_kept(dtype: jnp.dtype, pad: int) -> None:
    assert random_shift(jnp.zeros((2, 4, HEIGHT, WIDTH, 1), dtype), jax.random.key(0), pad).dtype == dtype


def test_a_shift_by_nothing_changes_nothing() -> None:
    images = random_images(3, 2)
    np.testing.assert_array_equal(random_shift(jnp.asarray(images), jax.random.key(0), 0), images)


def test_images_are_augmented_and_vectors_are_not() -> None:
    vectors = jnp.arange(6.0).reshape(2, 3)
    assert augment(vectors, jax.random.key(0), None) is vectors
    images = jnp.arange(2.0 * HEIGHT * WIDTH).reshape(2, HEIGHT, WIDTH, 1)
    key = jax.random.key(5)
    np.testing.assert_array_equal(augment(images, key, Pixels(shift=2)), random_shift(images, key, 2))
