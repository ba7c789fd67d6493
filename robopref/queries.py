"""Segments and queries drawn from an episode store, and the labels that answer them.

A *segment* is a window of an episode. A *query* shows K >= 2 segments of one length. Queries are references into an
`EpisodeDataset`; observations, actions, rewards and simulator states are gathered when asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from robopref.episodes import EpisodeDataset
from robopref.types import Key


@dataclass(frozen=True, eq=False)
class Queries:
    """N queries of K candidate segments each; candidate k of query n begins at step `starts[n, k]` of `episodes[n, k]`.

    Raises:
        ValueError: the shapes make no queries, or a segment does not lie within its episode; names the query by its
            index.
    """

    dataset: EpisodeDataset
    episodes: Int[np.ndarray, "N K"]
    starts: Int[np.ndarray, "N K"]
    length: int

    def __post_init__(self) -> None:
        for name in ("episodes", "starts"):
            array = np.asarray(getattr(self, name))
            if array.dtype.kind not in "iu":
                raise ValueError(f"{name} of queries must be integers, not {array.dtype}.")
            object.__setattr__(self, name, array.astype(np.int64))
        if self.episodes.ndim != 2 or self.episodes.shape != self.starts.shape:
            raise ValueError(
                f"episodes {list(self.episodes.shape)} and starts {list(self.starts.shape)} of queries must both be "
                "[N, K]."
            )
        if self.candidates < 2:
            raise ValueError(f"a query needs at least 2 candidates, not {self.candidates}.")
        if self.length < 1:
            raise ValueError(f"a segment has at least 1 step, not {self.length}.")
        problem = misplaced_segment(self.dataset, self.episodes, self.starts, self.length)
        if problem:
            raise ValueError(f"query {problem[0]} cannot be shown: {problem[1]}.")

    def __len__(self) -> int:
        return len(self.episodes)

    @property
    def candidates(self) -> int:
        """K, the segments in each query."""
        return int(self.episodes.shape[1])

    @property
    def observations(self) -> Float[np.ndarray, "N K T O"]:
        """What was seen before each action; gathered anew at each access."""
        return np.take(self.dataset.observations, self._rows(), axis=0)

    @property
    def actions(self) -> Float[np.ndarray, "N K T A"]:
        """Gathered anew at each access."""
        return np.take(self.dataset.actions, self._rows(), axis=0)

    @property
    def rewards(self) -> Float[np.ndarray, "N K T"]:
        """Gathered anew at each access."""
        return np.take(self.dataset.rewards, self._rows(), axis=0)

    @property
    def partial_returns(self) -> Float[np.ndarray, "N K"]:
        """Sum of rewards of each segment."""
        return np.asarray(self.rewards.sum(axis=-1, dtype=np.float64))

    @property
    def last_observations(self) -> Float[np.ndarray, "N K O"]:
        """What was seen after the last action of each segment."""
        rows: np.ndarray = self.dataset.offsets[self.episodes] + self.starts + self.length
        return np.take(self.dataset.observations, rows, axis=0)

    @property
    def first_states(self) -> Float[np.ndarray, "N K S"]:
        """Simulator state before the first action of each segment, read from the file."""
        return self.dataset.states_at(self.episodes, self.starts)

    @property
    def last_states(self) -> Float[np.ndarray, "N K S"]:
        """Simulator state after the last action of each segment, read from the file."""
        return self.dataset.states_at(self.episodes, self.starts + self.length)

    def take(self, indices: Int[np.ndarray, " M"] | Bool[np.ndarray, " N"]) -> Queries:
        """The queries at `indices` (or where a mask is true), in that order."""
        return Queries(self.dataset, self.episodes[indices], self.starts[indices], self.length)

    def _rows(self) -> Int[np.ndarray, "N K T"]:
        first = self.dataset.offsets[self.episodes] + self.starts
        rows: np.ndarray = first[..., None] + np.arange(self.length)
        return rows


def utc_now() -> str:
    """The present moment as `Labels.created` has it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


@dataclass(frozen=True, eq=False, kw_only=True)
class Labels:
    """One labeler's answers to N queries: exactly one of `values` and `orders` is given.

    Attributes:
        values: P(the second segment is preferred) for pairs; NaN where the query was skipped.
        orders: candidate indices, best first, for K-wise answers; -1 where the query was skipped.
        answered: False where the labeler skipped the query.
        labeler: who answered.
        parameters: of the labeler; has a JSON form.
        created: when, ISO-8601; kept in UTC with microseconds.

    Raises:
        ValueError: an answer makes no sense; names it by its index.
    """

    values: Float[np.ndarray, " N"] | None = None
    orders: Int[np.ndarray, "N K"] | None = None
    answered: Bool[np.ndarray, " N"]
    labeler: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        answered = np.asarray(self.answered)
        if answered.dtype != np.bool_ or answered.ndim != 1:
            raise ValueError(f"answered must be booleans [N], not {answered.dtype} {list(answered.shape)}.")
        object.__setattr__(self, "answered", answered)
        if (self.values is None) == (self.orders is None):
            raise ValueError(
                "labels need either values (for pairs) or orders (for more candidates), exactly one of them."
            )
        if self.values is not None:
            object.__setattr__(self, "values", _checked_values(self.values, answered))
        if self.orders is not None:
            object.__setattr__(self, "orders", _checked_orders(self.orders, answered))
        if not self.labeler:
            raise ValueError("labels must name their labeler.")
        object.__setattr__(self, "parameters", _json_form(self.parameters))
        object.__setattr__(self, "created", _utc(self.created))

    def __len__(self) -> int:
        return len(self.answered)

    def take(self, indices: Int[np.ndarray, " M"] | Bool[np.ndarray, " N"]) -> Labels:
        """The labels at `indices` (or where a mask is true), in that order."""
        return Labels(
            answered=self.answered[indices],
            labeler=self.labeler,
            values=None if self.values is None else self.values[indices],
            orders=None if self.orders is None else self.orders[indices],
            parameters=self.parameters,
            created=self.created,
        )


class Labeler(Protocol):
    """Anything that answers queries: a simulated teacher, a person, a model."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, Any]: ...

    def label(self, queries: Queries, key: Key) -> Labels:
        """One label per query; all randomness comes from `key`."""
        ...


def check_answers(queries: Queries, labels: Labels) -> None:
    """Raises `ValueError` unless `labels` can be the answers to `queries`."""
    if len(labels) != len(queries):
        raise ValueError(f"{len(labels)} labels cannot answer {len(queries)} queries.")
    if labels.values is not None and queries.candidates != 2:
        raise ValueError(f"values answer queries of 2 candidates, not {queries.candidates}; give orders instead.")
    if labels.orders is not None and labels.orders.shape[1] != queries.candidates:
        raise ValueError(
            f"orders of {labels.orders.shape[1]} candidates cannot answer queries of {queries.candidates}."
        )


def misplaced_segment(
    dataset: EpisodeDataset, episodes: Int[np.ndarray, "N K"], starts: Int[np.ndarray, "N K"], length: int
) -> tuple[int, str] | None:
    """The first query with a segment outside its episode, and what is wrong with it; None if all lie within."""
    known = (episodes >= 0) & (episodes < len(dataset))
    steps = dataset.lengths[np.where(known, episodes, 0)]
    fits = known & (starts >= 0) & (starts <= steps - length)
    if fits.all():
        return None
    query, candidate = (int(index) for index in np.argwhere(~fits)[0])
    episode, start = int(episodes[query, candidate]), int(starts[query, candidate])
    if not known[query, candidate]:
        return query, f"there is no episode {episode} among the {len(dataset)} of {dataset.path}"
    return query, (
        f"steps {start} to {start + length} do not lie within episode {episode} of {dataset.path}, which has "
        f"{dataset.lengths[episode]} steps"
    )


def draw_queries(
    dataset: EpisodeDataset,
    rng: np.random.Generator,
    *,
    count: int,
    length: int,
    candidates: int = 2,
    episodes: Int[np.ndarray, " M"] | None = None,
) -> Queries:
    """Queries whose windows are uniform over all windows of the dataset, so that longer episodes weigh more.

    The candidates of one query are distinct windows (they may overlap); different queries may share windows.

    Args:
        count: N, how many queries.
        length: steps of a segment.
        candidates: K, segments in a query.
        episodes: draw from these episodes only.

    Raises:
        ValueError: too few windows of this length exist; names the longest episode.
    """
    if candidates < 2:
        raise ValueError(f"a query needs at least 2 candidates, not {candidates}.")
    _check_count(count, "queries")
    windows = _Windows(dataset, length, episodes)
    windows.require(candidates, "candidates of a query")
    return Queries(dataset, *windows.locate(_distinct(rng, count, candidates, windows.total)), length)


def draw_segments(
    dataset: EpisodeDataset,
    rng: np.random.Generator,
    *,
    count: int,
    length: int,
    episodes: Int[np.ndarray, " M"] | None = None,
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Episodes and starts of `count` distinct windows, uniform over all windows of the dataset, in random order.

    Raises:
        ValueError: too few windows of this length exist; names the longest episode.
    """
    _check_count(count, "segments")
    windows = _Windows(dataset, length, episodes)
    windows.require(count, "distinct segments")
    return windows.locate(rng.choice(windows.total, size=count, replace=False))


def pair_segments(
    dataset: EpisodeDataset,
    episodes: Int[np.ndarray, " n"],
    starts: Int[np.ndarray, " n"],
    *,
    length: int,
    pairing: Literal["sparse", "dense"],
) -> Queries:
    """Pairs among n segments.

    Args:
        pairing: `sparse` puts each segment into exactly one pair, first with second, third with fourth; `dense` gives
            all n (n - 1) / 2 pairs (i, j) with i < j.

    Raises:
        ValueError: fewer than two segments, or an odd number for `sparse`.
    """
    episodes, starts = np.asarray(episodes), np.asarray(starts)
    count = len(episodes)
    if episodes.ndim != 1 or episodes.shape != starts.shape:
        raise ValueError(f"episodes {list(episodes.shape)} and starts {list(starts.shape)} must be of one length.")
    if count < 2:
        raise ValueError(f"pairs need at least 2 segments, not {count}.")
    if pairing == "sparse":
        if count % 2:
            raise ValueError(f"{count} segments cannot each be in exactly one pair; draw an even number.")
        pairs = np.arange(count).reshape(-1, 2)
    elif pairing == "dense":
        pairs = np.stack(np.triu_indices(count, k=1), axis=-1)
    else:
        raise ValueError(f"pairing is either 'sparse' or 'dense', not {pairing!r}.")
    return Queries(dataset, episodes[pairs], starts[pairs], length)


def split(queries: Queries, rng: np.random.Generator, held_out: float) -> tuple[Queries, Queries]:
    """Training and held-out queries that share no episode; queries with episodes of both kinds are dropped.

    With pairs drawn at random, about 2 * held_out * (1 - held_out) of the queries are dropped.

    Args:
        held_out: share of the episodes to hold out, in (0, 1).

    Raises:
        ValueError: `held_out` is no share, or the queries show fewer than two episodes.
    """
    train, test = split_indices(queries, rng, held_out)
    return queries.take(train), queries.take(test)


def split_indices(
    queries: Queries, rng: np.random.Generator, held_out: float
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """As `split`, but the indices of the queries, with which labels can be taken as well."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, not {held_out}.")
    shown = np.unique(queries.episodes)
    if len(shown) < 2:
        raise ValueError("queries that show a single episode cannot be split by episode.")
    size = int(np.clip(round(held_out * len(shown)), 1, len(shown) - 1))
    held = np.isin(queries.episodes, rng.choice(shown, size=size, replace=False))
    return np.flatnonzero(~held.any(axis=1)), np.flatnonzero(held.all(axis=1))


def label_statistics(queries: Queries, labels: Labels) -> dict[str, float]:
    """What a set of labels looks like; a K-wise answer counts as its K (K - 1) / 2 implied pairs (i, j) with i < j.

    Returns:
        `n`: queries. `answered`: share of queries that were answered. `ties`: share of answered pairs at exactly 0.5.
        `second`: share of decided (answered and not tied) pairs in which the second is preferred.
        `partial_return_gap`: mean absolute difference of partial return among decided pairs.
        `partial_return_agreement`: share of decided pairs of different partial return in which the greater one is
        preferred. A share of nothing is NaN.

    Raises:
        ValueError: the labels cannot be the answers to the queries.
    """
    check_answers(queries, labels)
    gaps, values = _implied_pairs(queries.partial_returns[labels.answered], labels.take(labels.answered))
    decided = values != 0.5
    telling = decided & (gaps != 0)
    return {
        "n": float(len(queries)),
        "answered": _mean(labels.answered),
        "ties": _mean(~decided),
        "second": _mean(values[decided] > 0.5),
        "partial_return_gap": _mean(np.abs(gaps[decided])),
        "partial_return_agreement": _mean((values[telling] > 0.5) == (gaps[telling] > 0)),
    }


def _implied_pairs(partial_returns: np.ndarray, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Partial return of the second less the first, and P(second preferred), of every pair in every query."""
    first, second = np.triu_indices(partial_returns.shape[1], k=1)
    gaps = partial_returns[:, second] - partial_returns[:, first]
    if labels.orders is None:
        values = np.asarray(labels.values)[:, None]
    else:
        ranks = np.argsort(labels.orders, axis=1)
        values = (ranks[:, second] < ranks[:, first]).astype(np.float64)
    return gaps.ravel(), values.ravel()


def _mean(array: np.ndarray) -> float:
    return float(array.mean()) if array.size else float("nan")


class _Windows:
    """All windows of one length in some episodes, numbered from 0."""

    def __init__(self, dataset: EpisodeDataset, length: int, episodes: np.ndarray | None) -> None:
        self._dataset = dataset
        self._length = length
        self._episodes = (
            np.arange(len(dataset)) if episodes is None else np.unique(np.asarray(episodes, dtype=np.int64))
        )
        outside = self._episodes[(self._episodes < 0) | (self._episodes >= len(dataset))]
        if outside.size:
            raise ValueError(f"there is no episode {outside[0]} among the {len(dataset)} of {dataset.path}.")
        self._ends = np.cumsum(dataset.valid_starts(length)[self._episodes])
        self.total = int(self._ends[-1]) if self._ends.size else 0

    def require(self, count: int, what: str) -> None:
        if self.total >= count:
            return
        if not self._episodes.size:
            raise ValueError("there are no episodes to draw from.")
        lengths = self._dataset.lengths[self._episodes]
        longest = int(self._episodes[np.argmax(lengths)])
        raise ValueError(
            f"{self._dataset.path} has {self.total} windows of {self._length} steps, too few for {count} {what}; the "
            f"longest episode to draw from is {longest} with {lengths.max()} steps."
        )

    def locate(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Episodes and starts of windows, in the shape of `windows`."""
        position = np.searchsorted(self._ends, windows, side="right")
        begins = np.concatenate([[0], self._ends[:-1]])
        return self._episodes[position], windows - begins[position]


def _distinct(rng: np.random.Generator, count: int, candidates: int, total: int) -> np.ndarray:
    """Rows of distinct numbers below `total`, [count, candidates], uniform over all ordered choices."""
    drawn = np.empty((count, candidates), dtype=np.int64)
    for column in range(candidates):
        # Numbers among those not yet drawn in the row, moved past each smaller one that was.
        fresh = rng.integers(total - column, size=count)
        for taken in np.sort(drawn[:, :column], axis=1).T:
            fresh += fresh >= taken
        drawn[:, column] = fresh
    return drawn


def _check_count(count: int, what: str) -> None:
    if count < 1:
        raise ValueError(f"at least 1 of the {what} must be drawn, not {count}.")


def _checked_values(values: np.ndarray, answered: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.shape != answered.shape:
        raise ValueError(f"values {list(values.shape)} and answered {list(answered.shape)} must be of one length.")
    wrong = np.flatnonzero(np.where(answered, ~((values >= 0) & (values <= 1)), ~np.isnan(values)))
    if wrong.size:
        index = int(wrong[0])
        rule = "an answer lies between 0 and 1" if answered[index] else "a skipped query has NaN"
        raise ValueError(f"label {index} is {values[index]}, but {rule}.")
    return values


def _checked_orders(orders: np.ndarray, answered: np.ndarray) -> np.ndarray:
    orders = np.asarray(orders)
    if orders.dtype.kind not in "iu" or orders.ndim != 2 or len(orders) != len(answered):
        raise ValueError(
            f"orders must be integers [N, K] with N = {len(answered)}, not {orders.dtype} {list(orders.shape)}."
        )
    orders = orders.astype(np.int64)
    permutation = (np.sort(orders, axis=1) == np.arange(orders.shape[1])).all(axis=1)
    wrong = np.flatnonzero(np.where(answered, ~permutation, (orders != -1).any(axis=1)))
    if wrong.size:
        index = int(wrong[0])
        rule = (
            f"an answer ranks each of the candidates 0 to {orders.shape[1] - 1} once"
            if answered[index]
            else "a skipped query has -1 throughout"
        )
        raise ValueError(f"label {index} is {orders[index].tolist()}, but {rule}.")
    return orders


def _json_form(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as they would be read back, so that labels equal their record."""
    try:
        form: dict[str, Any] = json.loads(json.dumps(dict(parameters), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the labeler's parameters have no JSON form: {error}.") from error
    return form


def _utc(moment: str) -> str:
    try:
        parsed = datetime.fromisoformat(moment)
    except (TypeError, ValueError) as error:
        raise ValueError(f"created must be a moment in ISO-8601, not {moment!r}.") from error
    if parsed.tzinfo is None:
        raise ValueError(f"created must say its time zone, such as '+00:00' at the end, unlike {moment!r}.")
    return parsed.astimezone(UTC).isoformat(timespec="microseconds")
