"""What agents train on: episodes and labelled queries on the device, with minibatches drawn inside the jitted loop.

The flat episode arrays are put on the device once; a batch is gathered from them by row. Pairs therefore cost two
integers each, not two copies of a segment, and all pairs among thousands of segments fit.

Given a `FrameCache`, the observations are images: only the frames that the data touch are rendered and put on the
device, as uint8, and so they are in the batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Real

from robopref.episodes import EpisodeDataset
from robopref.frames import FrameCache
from robopref.networks import Normalizer
from robopref.queries import Labels, Queries, check_answers
from robopref.types import Key, Preferences, Rankings, Segments, Transitions


class TransitionDataset(struct.PyTreeNode):
    """Steps of episodes; `sample` gives `Transitions`."""

    observations: Real[Array, "R ..."]
    actions: Float[Array, "R A"]
    rewards: Float[Array, " R"]
    terminated: Bool[Array, " R"]
    rows: Int[Array, " N"]

    @classmethod
    def create(
        cls, dataset: EpisodeDataset, episodes: Sequence[int] | None = None, frames: FrameCache | None = None
    ) -> TransitionDataset:
        """Every step of the chosen episodes, or of all of them; with `frames`, as images."""
        chosen = range(len(dataset)) if episodes is None else episodes
        if len(chosen) == 0:
            raise ValueError(f"no episodes of {dataset.path} were chosen to train on; choose at least one")
        for episode in chosen:
            if not 0 <= episode < len(dataset):
                raise ValueError(
                    f"there is no episode {episode} to train on; {dataset.path} has {len(dataset)} episodes."
                )
        check_actions(dataset)
        rows = np.concatenate([dataset.offsets[i] + np.arange(dataset.lengths[i]) for i in chosen])
        terminated = np.zeros(len(dataset.rewards), bool)
        terminated[dataset.offsets[:-1] + dataset.lengths - 1] = dataset.terminated
        observations, kept = _observed(dataset, frames, np.union1d(rows, rows + 1))
        return cls(
            observations=observations,
            actions=jnp.asarray(dataset.actions[kept], jnp.float32),
            rewards=jnp.asarray(dataset.rewards[kept], jnp.float32),
            terminated=jnp.asarray(terminated[kept]),
            rows=jnp.asarray(np.searchsorted(kept, rows), jnp.int32),
        )

    def take(self, indices: Int[Array, "*B"]) -> Transitions:
        rows = self.rows[indices]
        return Transitions(
            observations=self.observations[rows],
            actions=self.actions[rows],
            rewards=self.rewards[rows],
            next_observations=self.observations[rows + 1],
            terminated=self.terminated[rows],
        )

    def sample(self, key: Key, batch_size: int) -> Transitions:
        return self.take(jax.random.randint(key, (batch_size,), 0, self.rows.shape[0]))


class SegmentTable(struct.PyTreeNode):
    """Sets of K segments, each held as the row of its first step in the flat episode arrays."""

    observations: Real[Array, "R ..."]
    actions: Float[Array, "R A"]
    rows: Int[Array, "N K"]
    length: int = struct.field(pytree_node=False)

    @classmethod
    def create(cls, queries: Queries, frames: FrameCache | None = None) -> SegmentTable:
        dataset = queries.dataset
        check_actions(dataset)
        first = dataset.offsets[queries.episodes] + queries.starts
        # First rows without repetition first: all pairs among n segments have n of them, but n^2 rows of steps.
        touched = np.unique(np.unique(first)[:, None] + np.arange(queries.length))
        observations, kept = _observed(dataset, frames, touched)
        return cls(
            observations=observations,
            actions=jnp.asarray(dataset.actions[kept], jnp.float32),
            rows=jnp.asarray(np.searchsorted(kept, first), jnp.int32),
            length=queries.length,
        )

    def __len__(self) -> int:
        return self.rows.shape[0]

    def take(self, indices: Int[Array, "*B"]) -> Segments:
        """Segments with axes [*B, K, T, ...]."""
        steps = self.rows[indices][..., None] + jnp.arange(self.length)
        return Segments(observations=self.observations[steps], actions=self.actions[steps])


class PreferenceDataset(struct.PyTreeNode):
    """Labelled pairs; `sample` gives `Preferences`. Skipped queries are left out."""

    pairs: SegmentTable
    labels: Float[Array, " N"]

    @classmethod
    def create(cls, queries: Queries, labels: Labels, frames: FrameCache | None = None) -> PreferenceDataset:
        if labels.values is None:
            raise ValueError(f"the labels of {labels.labeler!r} are orders of K segments; use RankingDataset for them.")
        answered = answered_queries(queries, labels)
        values = jnp.asarray(labels.values[labels.answered], jnp.float32)
        return cls(pairs=SegmentTable.create(answered, frames), labels=values)

    @classmethod
    def from_preferences(cls, preferences: Preferences) -> PreferenceDataset:
        """Pairs that come without episodes, such as published ones: segments [N, 2, T, ...] and labels [N]."""
        actions = np.asarray(preferences.segments.actions)
        labels = np.asarray(preferences.labels)
        if actions.ndim != 4 or actions.shape[1] != 2 or labels.shape != actions.shape[:1] or not len(labels):
            raise ValueError(
                f"pairs to learn from need segments [N, 2, T, ...] and labels [N], not actions {actions.shape} and"
                f" labels {labels.shape}"
            )
        count, _, length, _ = actions.shape
        observations = np.asarray(preferences.segments.observations)
        dtype = jnp.uint8 if observations.dtype == np.uint8 else jnp.float32
        table = SegmentTable(
            observations=jnp.asarray(observations.reshape(-1, *observations.shape[3:]), dtype),
            actions=jnp.asarray(actions.reshape(-1, actions.shape[3]), jnp.float32),
            rows=length * jnp.arange(2 * count, dtype=jnp.int32).reshape(count, 2),
            length=length,
        )
        return cls(pairs=table, labels=jnp.asarray(labels, jnp.float32))

    def take(self, indices: Int[Array, "*B"]) -> Preferences:
        return Preferences(segments=self.pairs.take(indices), labels=self.labels[indices])

    def sample(self, key: Key, batch_size: int) -> Preferences:
        return self.take(jax.random.randint(key, (batch_size,), 0, len(self.pairs)))


class RankingDataset(struct.PyTreeNode):
    """Queries of K segments, answered by an order; `sample` gives `Rankings`, best first. Skipped ones are left out."""

    sets: SegmentTable

    @classmethod
    def create(cls, queries: Queries, labels: Labels, frames: FrameCache | None = None) -> RankingDataset:
        if labels.orders is None:
            raise ValueError(f"the labels of {labels.labeler!r} are of pairs; use PreferenceDataset for them.")
        answered = answered_queries(queries, labels)
        sets = SegmentTable.create(answered, frames)
        order = jnp.asarray(labels.orders[labels.answered])
        return cls(sets=sets.replace(rows=jnp.take_along_axis(sets.rows, order, axis=1)))

    def take(self, indices: Int[Array, "*B"]) -> Rankings:
        return Rankings(segments=self.sets.take(indices))

    def sample(self, key: Key, batch_size: int) -> Rankings:
        return self.take(jax.random.randint(key, (batch_size,), 0, len(self.sets)))


def _observed(
    dataset: EpisodeDataset, frames: FrameCache | None, touched: Int[np.ndarray, " n"]
) -> tuple[Real[Array, "R ..."], Int[np.ndarray, " R"]]:
    """The observations that go to the device, and their rows in the dataset: all vectors, or the touched images.

    Rows that follow each other in the dataset and are touched, as those of a segment, still follow each other.
    """
    if frames is None:
        return jnp.asarray(dataset.observations, jnp.float32), np.arange(len(dataset.observations))
    if frames.dataset.hash != dataset.hash:
        raise ValueError(
            f"the frames at {frames.path} are of {frames.dataset.path}, not of the episodes at {dataset.path} that are"
            " to be learned from; render those"
        )
    return jnp.asarray(frames.frames(touched)), touched


def answered_queries(queries: Queries, labels: Labels) -> Queries:
    """The queries that the labeler did not skip; a ValueError if it skipped all of them."""
    check_answers(queries, labels)
    if not labels.answered.any():
        raise ValueError(f"{labels.labeler!r} skipped all {len(queries)} queries; there is nothing to learn from.")
    return queries.take(labels.answered)


def fit_normalizer(dataset: EpisodeDataset) -> Normalizer:
    """Standardisation by all observations of a dataset."""
    return Normalizer.fit(dataset.observations)


def best_episodes(dataset: EpisodeDataset, fraction: float) -> Int[np.ndarray, " n"]:
    """The `fraction` of episodes with the highest true return, at least one: the data of %BC."""
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of best episodes must lie in (0, 1], not {fraction}")
    count = max(1, round(fraction * len(dataset)))
    return np.sort(np.argsort(-dataset.returns, kind="stable")[:count])


def check_actions(dataset: EpisodeDataset) -> None:
    """Raises a ValueError if an action lies outside [-1, 1], the range in which agents act."""
    largest = float(np.max(np.abs(dataset.actions)))
    if not largest <= 1 + 1e-6:
        raise ValueError(
            f"actions in {dataset.path} reach {largest:.4g}, but agents act in [-1, 1]; rescale the dataset's actions"
        )
