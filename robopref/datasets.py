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
from robopref.types import Key, Preferences, Rankings, Segments, Transitions, WindowPreferences, Windows


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


class WindowDataset(struct.PyTreeNode):
    """Steps of episodes, each with those that follow; `sample` gives `Windows`.

    A window begins at any step, so that long episodes are drawn more often, and ends after `length` steps or with its
    episode.
    """

    observations: Float[Array, "R O"]
    actions: Float[Array, "R A"]
    returns_to_go: Float[Array, " R"]
    steps: Int[Array, " R"]
    left: Int[Array, " R"]
    rows: Int[Array, " N"]
    length: int = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls,
        dataset: EpisodeDataset,
        length: int,
        *,
        episodes: Sequence[int] | None = None,
        rewards: Float[np.ndarray, " R"] | None = None,
    ) -> WindowDataset:
        """Windows of the chosen episodes, or of all of them; with `rewards`, returns are of these."""
        if length < 1:
            raise ValueError(f"a window has at least 1 step, not {length}.")
        check_actions(dataset)
        every = np.arange(len(dataset))
        chosen = every if episodes is None else np.unique(episodes)
        if not len(chosen) or np.any(~np.isin(chosen, every)):
            raise ValueError(f"{dataset.path} has episodes 0 to {len(dataset) - 1}; choose at least one of these.")
        offsets, lengths = dataset.offsets[:-1], dataset.lengths
        steps = np.arange(len(dataset.rewards)) - np.repeat(offsets, lengths + 1)
        left = np.repeat(lengths, lengths + 1) - steps
        return cls(
            observations=jnp.asarray(dataset.observations, jnp.float32),
            actions=jnp.asarray(dataset.actions, jnp.float32),
            returns_to_go=jnp.asarray(sums_ahead(dataset, None, rewards), jnp.float32),
            steps=jnp.asarray(steps, jnp.int32),
            left=jnp.asarray(left, jnp.int32),
            rows=jnp.asarray(np.concatenate([offsets[i] + np.arange(lengths[i]) for i in chosen]), jnp.int32),
            length=length,
        )

    def take(self, indices: Int[Array, "*B"]) -> Windows:
        return self.at(self.rows[indices])

    def at(self, rows: Int[Array, "*B"]) -> Windows:
        """The windows that begin at these rows of the dataset."""
        before = jnp.maximum(self.length - self.left[rows], 0)
        places = jnp.arange(self.length) - before[..., None]
        mask = places >= 0
        every = rows[..., None] + jnp.maximum(places, 0)
        return Windows(
            observations=jnp.where(mask[..., None], self.observations[every], 0.0),
            actions=jnp.where(mask[..., None], self.actions[every], 0.0),
            returns_to_go=jnp.where(mask, self.returns_to_go[every], 0.0),
            steps=jnp.where(mask, self.steps[every], 0),
            mask=mask,
        )

    def sample(self, key: Key, batch_size: int) -> Windows:
        return self.take(jax.random.randint(key, (batch_size,), 0, self.rows.shape[0]))


class WindowPreferenceDataset(struct.PyTreeNode):
    """Labelled pairs as windows; `sample` gives `WindowPreferences`. Skipped queries are left out.

    Labels may be about longer segments than the windows, which then are the first steps of these. With
    `with_unlabelled`, a batch also has as many windows from anywhere as it has pairs, twice.
    """

    windows: WindowDataset
    pairs: Int[Array, "N 2"]
    labels: Float[Array, " N"]
    with_unlabelled: bool = struct.field(pytree_node=False, default=True)

    @classmethod
    def create(
        cls, windows: WindowDataset, queries: Queries, labels: Labels, *, with_unlabelled: bool = True
    ) -> WindowPreferenceDataset:
        """`windows` are of the dataset that the queries are about."""
        if labels.values is None:
            raise ValueError(f"the labels of {labels.labeler!r} are orders of K segments, not of pairs.")
        answered = answered_queries(queries, labels)
        _check_windows(windows, queries.dataset)
        return cls(
            windows=windows,
            pairs=jnp.asarray(queries.dataset.offsets[answered.episodes] + answered.starts, jnp.int32),
            labels=jnp.asarray(labels.values[labels.answered], jnp.float32),
            with_unlabelled=with_unlabelled,
        )

    def take(self, indices: Int[Array, "*B"]) -> WindowPreferences:
        return WindowPreferences(windows=self.windows.at(self.pairs[indices]), labels=self.labels[indices])

    def sample(self, key: Key, batch_size: int) -> WindowPreferences:
        pair_key, window_key = jax.random.split(key)
        labelled = self.take(jax.random.randint(pair_key, (batch_size,), 0, self.labels.shape[0]))
        if not self.with_unlabelled:
            return labelled
        return labelled.replace(unlabelled=self.windows.sample(window_key, 2 * batch_size))


class EndlessPreferences(struct.PyTreeNode):
    """Pairs drawn anew for every batch, labelled by which earns more; `sample` gives `WindowPreferences`.

    What OPPO was published with (Kang et al. 2023, arXiv:2305.16217): as many labels as there are updates times pairs.
    """

    windows: WindowDataset
    sums: Float[Array, " R"]

    @classmethod
    def create(cls, windows: WindowDataset, dataset: EpisodeDataset, horizon: int) -> EndlessPreferences:
        """Labels compare the rewards of `horizon` steps from a window's first on, or up to its episode's end."""
        _check_windows(windows, dataset)
        return cls(windows=windows, sums=jnp.asarray(sums_ahead(dataset, horizon), jnp.float32))

    def sample(self, key: Key, batch_size: int) -> WindowPreferences:
        rows = self.windows.rows[jax.random.randint(key, (batch_size, 2), 0, self.windows.rows.shape[0])]
        first, second = self.sums[rows[:, 0]], self.sums[rows[:, 1]]
        return WindowPreferences(windows=self.windows.at(rows), labels=0.5 + 0.5 * jnp.sign(second - first))


def _check_windows(windows: WindowDataset, dataset: EpisodeDataset) -> None:
    if windows.left.shape[0] != len(dataset.rewards):
        raise ValueError(f"the windows are not of {dataset.path}, which the labels are about.")


def sums_ahead(
    dataset: EpisodeDataset, horizon: int | None, rewards: Float[np.ndarray, " R"] | None = None
) -> Float[np.ndarray, " R"]:
    """The rewards of the next `horizon` steps of the same episode, or of all that are left, summed, for every row."""
    rewards = np.asarray(dataset.rewards if rewards is None else rewards, np.float64)
    if rewards.shape != dataset.rewards.shape:
        raise ValueError(f"there are {rewards.shape} rewards where {dataset.path} has {dataset.rewards.shape} rows.")
    ahead = np.zeros_like(rewards)
    for begin, length in zip(dataset.offsets[:-1], dataset.lengths, strict=True):
        total = np.concatenate([[0.0], np.cumsum(rewards[begin : begin + length])])
        steps = np.arange(length)
        ends = length if horizon is None else np.minimum(steps + horizon, length)
        ahead[begin : begin + length] = total[ends] - total[steps]
    return ahead


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
