from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

from robopref import checkpoints
from robopref.checkpoints import read_checkpoint_metadata, restore_checkpoint, save_checkpoint
from robopref.networks import Normalizer

METADATA = {"step": 7, "run": "abc", "nested": {"widths": [8, 8], "note": "größer"}}


def make_tree() -> dict[str, Any]:
    return {
        "params": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.array([1.5, -2.0, np.pi])},
        "opt_state": (jnp.array(3, jnp.int32), [jnp.array([True, False])]),
        "normalizer": Normalizer(mean=jnp.array([0.1]), std=jnp.array([2.0])),
        "reference": None,
    }


LEAVES = {
    "normalizer/mean",
    "normalizer/std",
    "opt_state/0",
    "opt_state/1/0",
    "params/bias",
    "params/kernel",
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run" / "checkpoint.safetensors"
    save_checkpoint(path, make_tree(), METADATA)
    return path


def blank(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def assert_identical(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def refusal(path: Any, template: Any) -> str:
    with pytest.raises(ValueError, match=r"\S") as error:
        restore_checkpoint(path, template)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


def test_what_was_saved_comes_back_bit_for_bit(path):
    tree = make_tree()
    restored = restore_checkpoint(path, blank(tree))
    assert_identical(restored, tree)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert isinstance(restored["normalizer"], Normalizer)


arrays = st.sampled_from([np.float32, np.float16, np.int32, np.uint8, np.bool_]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text("abc_", min_size=1, max_size=4), st.tuples(arrays, arrays), max_size=3))
def test_any_array_comes_back(tmp_path, tree):
    """NaN, infinity, negative zero, scalars and empty arrays among them."""
    tree = jax.tree.map(jnp.asarray, tree)
    save_checkpoint(tmp_path / "any.safetensors", tree, {})
    assert_identical(restore_checkpoint(tmp_path / "any.safetensors", blank(tree)), tree)


def test_arrays_that_lie_in_memory_otherwise_are_saved_as_they_read(tmp_path):
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    tree = {"transposed": rows.T, "strided": rows[:, ::2], "reversed": rows[::-1]}
    save_checkpoint(tmp_path / "views.safetensors", tree, {})
    restored = restore_checkpoint(tmp_path / "views.safetensors", jax.tree.map(jnp.zeros_like, tree))
    for name, array in tree.items():
        np.testing.assert_array_equal(restored[name], array)


def test_any_reader_of_safetensors_finds_the_arrays_by_their_paths(path):
    arrays = load_file(path)
    assert arrays.keys() == LEAVES
    np.testing.assert_array_equal(arrays["params/kernel"], np.arange(6.0).reshape(2, 3))


def test_metadata_comes_back(path):
    assert read_checkpoint_metadata(path) == METADATA


@pytest.mark.parametrize("kept", [0, 4, 60, 0.5, 0.99, -1])
def test_a_truncated_file_is_refused(path, kept):
    content = path.read_bytes()
    size = int(kept * len(content)) if isinstance(kept, float) else kept
    path.write_bytes(content[:size])
    assert "may be truncated" in refusal(path, make_tree())
    with pytest.raises(ValueError, match="may be truncated"):
        read_checkpoint_metadata(path)


@pytest.mark.parametrize(
    "content", [b"step,policy/loss\n1,0.5\n" * 9, b"\x80\x04\x95" + bytes(99), b"PK\x03\x04" + bytes(200), bytes(500)]
)
def test_a_foreign_file_is_refused(path, content):
    path.write_bytes(content)
    assert "cannot be read as a checkpoint" in refusal(path, make_tree())


def test_a_foreign_safetensors_file_is_refused(path):
    save_file({"weight": np.zeros(3)}, path)
    assert "does not fit this agent and configuration" in refusal(path, make_tree())
    with pytest.raises(ValueError, match="is a safetensors file, but not a robopref checkpoint") as error:
        read_checkpoint_metadata(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    for read in (lambda path: restore_checkpoint(path, make_tree()), read_checkpoint_metadata):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.safetensors"):
            read(tmp_path / "absent.safetensors")
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            read(tmp_path)


def test_a_leaf_of_another_shape_is_named_with_both_shapes(path):
    template = make_tree()
    template["params"]["bias"] = jnp.zeros(5)
    assert refusal(path, template).endswith("params/bias is float32[3] in the file and float32[5] here")


def test_a_scalar_is_not_taken_for_an_array_of_one(path):
    template = make_tree()
    template["normalizer"] = Normalizer(mean=jnp.zeros(()), std=jnp.ones(1))
    assert "normalizer/mean is float32[1] in the file and float32[] here" in refusal(path, template)


def test_a_leaf_of_another_type_is_named_with_both_types(path):
    template = make_tree()
    template["params"]["kernel"] = jnp.zeros((2, 3), jnp.int32)
    assert "params/kernel is float32[2, 3] in the file and int32[2, 3] here" in refusal(path, template)


def test_a_leaf_that_the_file_lacks_is_named(path):
    template = make_tree()
    template["params"]["scale"] = jnp.zeros(1)
    assert refusal(path, template).endswith("the file lacks params/scale")


def test_an_additional_leaf_is_named(path):
    template = make_tree()
    del template["params"]["bias"]
    assert refusal(path, template).endswith("the file has an additional params/bias")


def entries(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_write_that_fails_half_way_leaves_the_old_checkpoint(path, monkeypatch):
    before = path.read_bytes()

    def fail(arrays, target, metadata):
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, blank(make_tree()), METADATA)
    assert path.read_bytes() == before
    assert entries(path.parent) == [path.name]


def test_metadata_without_a_json_form_leaves_the_old_checkpoint(path):
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        save_checkpoint(path, make_tree(), {"config": object()})
    assert path.read_bytes() == before
    assert entries(path.parent) == [path.name]


def test_a_new_checkpoint_replaces_the_old_one_as_a_whole(path):
    tree = {"only": jnp.ones(2)}
    save_checkpoint(path, tree, {"step": 8})
    assert_identical(restore_checkpoint(path, blank(tree)), tree)
    assert read_checkpoint_metadata(path) == {"step": 8}
    assert entries(path.parent) == [path.name]


def test_the_same_tree_gives_the_same_file(path, tmp_path):
    again = tmp_path / "again.safetensors"
    save_checkpoint(again, make_tree(), json.loads(json.dumps(METADATA)))
    assert again.read_bytes() == path.read_bytes()
