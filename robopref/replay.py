"""Experience that grows: a ring buffer of transitions on the device, and batches drawn partly from prior data.

Both have `sample`, so that `robopref.agent.update_many` draws its minibatches from them inside the jitted loop. Adding
is functional; where the old buffer is donated to the jitted function that adds (`robopref.online` does), the new one is
written in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from robopref.datasets import TransitionDataset
from robopref.episodes import EpisodeDataset
from robopref.types import Key, Transitions

RewardFunction: TypeAlias = Callable[[Transitions], Float[Array, "*B"]]
"""What takes the place of the environment's reward: of transitions [*B]. In a jitted function, a pytree."""

_ROWS_AT_ONCE = 8192


class ReplayBuffer(struct.PyTreeNode):
    """The last C transitions that were added, in storage of constant shape.

    Attributes:
        transitions: C rows, of which the first `size` count.
        size: how many transitions it holds.
        position: the row that the next one goes to; in a full buffer, that of the oldest.
    """

    transitions: Transitions
    size: Int[Array, ""]
    position: Int[Array, ""]

    @classmethod
    def create(cls, capacity: int, example: Transitions) -> ReplayBuffer:
        """An empty buffer for transitions such as `example`, a batch [B, ...] of any length."""
        if capacity < 1:
            raise ValueError(f"a replay buffer holds at least 1 transition; its capacity was given as {capacity}.")
        return cls(
            transitions=jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype), example),
            size=jnp.zeros((), jnp.int32),
            position=jnp.zeros((), jnp.int32),
        )

    @classmethod
    def from_episodes(cls, capacity: int, dataset: EpisodeDataset | TransitionDataset) -> ReplayBuffer:
        """A buffer that holds every step of the dataset.

        Raises:
            ValueError: it has more steps than the capacity, or actions beyond [-1, 1].
        """
        steps = TransitionDataset.create(dataset) if isinstance(dataset, EpisodeDataset) else dataset
        count = steps.rows.shape[0]
        if count > capacity:
            raise ValueError(
                f"{count} steps do not fit into a replay buffer of {capacity}; give it a greater capacity, or fewer"
                " episodes."
            )
        block = steps.take(jnp.arange(count))
        return cls.create(capacity, block).add(block)

    @property
    def capacity(self) -> int:
        return self.transitions.rewards.shape[0]

    def add(self, block: Transitions) -> ReplayBuffer:
        """With a block [n, ...] of transitions, oldest first; what no longer fits replaces the oldest."""
        capacity, count = self.capacity, block.rewards.shape[0]
        # Of a block longer than the buffer, the beginning would be overwritten by the end: it is left out, because the
        # order in which a scatter writes the same row twice is not defined.
        kept = min(count, capacity)
        rows = (self.position + (count - kept) + jnp.arange(kept)) % capacity
        return self.replace(
            transitions=jax.tree.map(
                lambda stored, new: stored.at[rows].set(new[count - kept :].astype(stored.dtype)),
                self.transitions,
                block,
            ),
            size=jnp.minimum(self.size + count, capacity),
            position=(self.position + count) % capacity,
        )

    def take(self, indices: Int[Array, "*B"]) -> Transitions:
        rows: Transitions = jax.tree.map(lambda leaf: leaf[indices], self.transitions)
        return rows

    def sample(self, key: Key, batch_size: int) -> Transitions:
        """A batch drawn with replacement. The buffer must not be empty, which jitted code cannot check."""
        return self.take(jax.random.randint(key, (batch_size,), 0, self.size))

    def relabel(self, reward_function: RewardFunction) -> ReplayBuffer:
        """With rewards from `reward_function`, such as a reward model that has learned something new."""
        rewards = jax.lax.map(reward_function, self.transitions, batch_size=_ROWS_AT_ONCE)
        return self.replace(transitions=self.transitions.replace(rewards=rewards.astype(jnp.float32)))

    def stored(self) -> Transitions:
        """The rows that count, as NumPy arrays [size, ...]; not for jitted code."""
        size = int(self.size)
        rows: Transitions = jax.tree.map(lambda leaf: np.asarray(leaf[:size]), self.transitions)
        return rows


class TrainingBatches(struct.PyTreeNode):
    """Batches from a replay buffer, a share of each from prior data, with rewards scaled.

    Half of each batch from prior data is the symmetric sampling of Ball et al. 2023, "Efficient Online Reinforcement
    Learning with Offline Data" (arXiv:2302.02948, section 4.1).

    Attributes:
        replay: must not be empty.
        prior: None takes everything from `replay`.
        prior_share: of each batch, rounded to whole transitions.
        reward_scale: factor on all rewards.
    """

    replay: ReplayBuffer
    prior: TransitionDataset | None
    prior_share: float = struct.field(pytree_node=False)
    reward_scale: float = struct.field(pytree_node=False)

    def sample(self, key: Key, batch_size: int) -> Transitions:
        if self.prior is None:
            batch = self.replay.sample(key, batch_size)
        else:
            own_key, prior_key = jax.random.split(key)
            count = round(self.prior_share * batch_size)
            own, prior = self.replay.sample(own_key, batch_size - count), self.prior.sample(prior_key, count)
            batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), own, prior)
        return batch.replace(rewards=self.reward_scale * batch.rewards)
