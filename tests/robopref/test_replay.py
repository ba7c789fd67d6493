"""The ring buffer against a list of the last transitions, and the mixing of batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robopref.datasets import TransitionDataset
from robopref.episodes import EpisodeDataset
from robopref.replay import ReplayBuffer, TrainingBatches
from robopref.types import Transitions


def block(*numbers: float) -> Transitions:
    """Transitions that can be told apart: number n has n in all its fields."""
    values = jnp.asarray(numbers, jnp.float32)
    return Transitions(
        observations=values[:, None] + jnp.zeros(3),
        actions=-values[:, None] + jnp.zeros(2),
        rewards=10 * values,
        next_observations=values[:, None] + 0.5 + jnp.zeros(3),
        terminated=values.astype(jnp.int32) % 2 == 1,
    )


def assert_same(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def numbers_in(buffer: ReplayBuffer) -> list[float]:
    return np.asarray(buffer.stored().observations[:, 0]).tolist()


def test_a_buffer_of_four_holds_four() -> None:
    buffer = ReplayBuffer.create(4, block(0.0))
    assert buffer.capacity == 4
    for number in range(1, 5):
        buffer = buffer.add(block(number))
        assert int(buffer.size) == number
    assert numbers_in(buffer) == [1, 2, 3, 4]
    assert_same(buffer.take(jnp.arange(4)), block(1, 2, 3, 4))
    buffer = buffer.add(block(5))
    assert sorted(numbers_in(buffer)) == [2, 3, 4, 5]
    assert int(buffer.size) == 4


@settings(max_examples=25, deadline=None)
@given(capacity=st.sampled_from((1, 3, 4)), lengths=st.lists(st.sampled_from((1, 2, 3, 7)), min_size=1, max_size=5))
def test_the_last_transitions_are_kept_whole(capacity: int, lengths: list[int]) -> None:
    buffer, added = ReplayBuffer.create(capacity, block(0.0)), []
    for length in lengths:
        numbers = [float(len(added) + i + 1) for i in range(length)]
        buffer, added = buffer.add(block(*numbers)), added + numbers
    kept = added[-capacity:]
    order = np.argsort(numbers_in(buffer))
    assert_same(jax.tree.map(lambda leaf: leaf[order], buffer.stored()), jax.tree.map(np.asarray, block(*kept)))
    assert int(buffer.position) == len(added) % capacity


def test_a_batch_is_drawn_from_what_was_added_alone() -> None:
    buffer = ReplayBuffer.create(1000, block(0.0)).add(block(7, 8, 9))
    batch = jax.jit(ReplayBuffer.sample, static_argnums=2)(buffer, jax.random.key(0), 3000)
    found, counts = np.unique(batch.observations[:, 0], return_counts=True)
    assert found.tolist() == [7, 8, 9]
    # 1000 of each are expected, with a standard deviation of 26.
    assert (np.abs(counts - 1000) < 130).all()
    rows = np.asarray(batch.observations[:, 0])
    np.testing.assert_array_equal(batch.rewards, 10 * rows)
    np.testing.assert_array_equal(batch.terminated, rows % 2 == 1)
    again = buffer.sample(jax.random.key(0), 3000)
    assert_same(batch, again)


def test_a_donated_buffer_is_written_in_its_place() -> None:
    add = jax.jit(ReplayBuffer.add, donate_argnums=0)
    buffer = add(ReplayBuffer.create(1024, block(0.0)), block(1, 2))
    where = buffer.transitions.observations.unsafe_buffer_pointer()
    donated = buffer
    for number in range(5):
        buffer = add(buffer, block(number, number))
    assert buffer.transitions.observations.unsafe_buffer_pointer() == where
    assert donated.transitions.observations.is_deleted()


def test_episodes_fill_a_buffer_with_all_their_steps(dataset: EpisodeDataset) -> None:
    buffer = ReplayBuffer.from_episodes(dataset.total_steps + 3, dataset)
    steps = TransitionDataset.create(dataset)
    assert int(buffer.size) == dataset.total_steps
    assert_same(buffer.take(jnp.arange(dataset.total_steps)), steps.take(jnp.arange(dataset.total_steps)))
    assert int(buffer.stored().terminated.sum()) == int(dataset.terminated.sum()) > 0
    exact = ReplayBuffer.from_episodes(dataset.total_steps, steps)
    assert int(exact.size) == exact.capacity == dataset.total_steps
    with pytest.raises(ValueError, match=r"steps do not fit into a replay buffer of 10; give it a greater capacity"):
        ReplayBuffer.from_episodes(10, dataset)


def test_a_buffer_needs_room() -> None:
    with pytest.raises(ValueError, match="its capacity was given as 0"):
        ReplayBuffer.create(0, block(1.0))


def test_relabelling_replaces_the_rewards_alone() -> None:
    buffer = ReplayBuffer.create(5, block(0.0)).add(block(1, 2, 3))
    relabelled = buffer.relabel(lambda steps: steps.observations[..., 0] - steps.actions[..., 1])
    assert relabelled.stored().rewards.tolist() == [2, 4, 6]
    assert_same(
        relabelled.replace(transitions=relabelled.transitions.replace(rewards=buffer.transitions.rewards)), buffer
    )


def prior_steps() -> TransitionDataset:
    """Transitions whose observations are negative."""
    observations = -jnp.arange(1.0, 6.0)[:, None] + jnp.zeros(3)
    return TransitionDataset(
        observations=observations,
        actions=jnp.zeros((5, 2)),
        rewards=jnp.full(5, -1.0),
        terminated=jnp.zeros(5, bool),
        rows=jnp.arange(4),
    )


@pytest.mark.parametrize(("share", "size", "expected"), [(0.5, 8, 4), (0.25, 8, 2), (0.5, 5, 2), (0.9, 10, 9)])
def test_a_share_of_every_batch_is_prior_data(share: float, size: int, expected: int) -> None:
    replay = ReplayBuffer.create(10, block(0.0)).add(block(1, 2, 3))
    batches = TrainingBatches(replay, prior_steps(), share, 1.0)
    sample = jax.jit(partial(TrainingBatches.sample, batch_size=size))
    for seed in range(3):
        batch = sample(batches, jax.random.key(seed))
        assert int((batch.observations[:, 0] < 0).sum()) == expected
        assert int((batch.rewards == -1).sum()) == expected
        assert batch.rewards.shape == (size,)


def test_without_prior_data_batches_are_those_of_the_buffer_with_scaled_rewards() -> None:
    replay = ReplayBuffer.create(10, block(0.0)).add(block(1, 2, 3))
    batch = TrainingBatches(replay, None, 0.5, 0.1).sample(jax.random.key(3), 6)
    expected = replay.sample(jax.random.key(3), 6)
    np.testing.assert_allclose(batch.rewards, 0.1 * expected.rewards)
    assert_same(batch.replace(rewards=expected.rewards), expected)
