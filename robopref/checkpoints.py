"""Checkpoints: one safetensors file holds every array of a pytree by its path, with JSON metadata in the header.

No pickled classes: a file can be opened by anything that reads safetensors, and restoring needs a template of the same
structure (a freshly created agent), against which every name, shape and type is checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from robopref.files import atomic_write

Tree = TypeVar("Tree")


def save_checkpoint(path: Path, tree: Any, metadata: Mapping[str, Any]) -> None:
    """Writes the arrays of `tree` and the JSON-able `metadata` to one file, atomically."""
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _named_leaves(tree).items()}
    with atomic_write(path) as temporary:
        save_file(arrays, temporary, metadata={"robopref": json.dumps(dict(metadata), sort_keys=True)})


def restore_checkpoint(path: Path, template: Tree) -> Tree:
    """The tree saved at `path`, as arrays in the structure of `template`.

    Raises:
        ValueError: if the file is no checkpoint, or holds other arrays than the template, with the first difference.
    """
    expected = _named_leaves(template)
    with _open(path) as file:
        found = set(file.keys())
        for name in sorted(expected.keys() ^ found):
            where = "the file lacks" if name in expected else "the file has an additional"
            raise ValueError(f"{path} does not fit this agent and configuration: {where} {name}")
        leaves = []
        for name, leaf in expected.items():
            array = file.get_tensor(name)
            if array.shape != leaf.shape or array.dtype != leaf.dtype:
                raise ValueError(
                    f"{path} does not fit this agent and configuration: {name} is {array.dtype}{list(array.shape)}"
                    f" in the file and {leaf.dtype}{list(leaf.shape)} here"
                )
            leaves.append(array)
    restored: Tree = jax.tree.unflatten(jax.tree.structure(template), [jnp.asarray(leaf) for leaf in leaves])
    return restored


def read_checkpoint_metadata(path: Path) -> dict[str, Any]:
    """The metadata that was saved with a checkpoint."""
    with _open(path) as file:
        header = file.metadata() or {}
    if "robopref" not in header:
        raise ValueError(f"{path} is a safetensors file, but not a robopref checkpoint")
    metadata: dict[str, Any] = json.loads(header["robopref"])
    return metadata


def fingerprint(tree: Any, *settings: object) -> str:
    """A hash of arrays and their structure and of settings: what must be equal for a checkpoint to belong to a run."""
    content = hashlib.sha256(f"{jax.tree.structure(tree)} {settings}".encode())
    for leaf in jax.tree.leaves(tree):
        content.update(np.ascontiguousarray(leaf).tobytes())
    return content.hexdigest()


def _open(path: Path) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint, it may be truncated: {error}") from error


def _named_leaves(tree: Any) -> dict[str, Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
