"""Augmentation of images, while agents learn from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from robopref.networks import Pixels
from robopref.types import Key


def random_shift(images: Shaped[Array, "B *S H W C"], key: Key, pad: int) -> Shaped[Array, "B *S H W C"]:
    """Shifts images by up to `pad` pixels along both axes, repeating their borders (DrQ, arXiv:2004.13649).

    Each element of the first axis draws one shift, which all images in it share: those of both segments of a pair, at
    all times. Segments that are compared must not differ by augmentation.
    """
    if pad == 0:
        return images
    groups = images.reshape(images.shape[0], -1, *images.shape[-3:])
    padded = jnp.pad(groups, ((0, 0), (0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (len(groups), 2), 0, 2 * pad + 1)

    def crop(group: Array, offset: Array) -> Array:
        return jax.lax.dynamic_slice(group, (0, *offset, 0), groups.shape[1:])

    return jax.vmap(crop)(padded, offsets).reshape(images.shape)


def augment(observations: Shaped[Array, B * S * O], key: Key, pixels: Pixels | None) -> Shaped[Array, B * S * O]:
    """Observations as an agent learns from them: images shifted at random, vectors as they are."""
    return observations if pixels is None else random_shift(observations, key, pixels.shift)
