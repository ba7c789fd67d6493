"""Labels carried from task to task: cross-task preference alignment of PEARL (Liu et al., ICML 2024).

Segments of a labelled source task and of an unlabelled target task are paired by a Gromov-Wasserstein coupling T of
the distances within each, so that the two need not share a state space. A pair (j, j') of target segments is then
labelled by the source pairs (i, i') that its segments are paired with, weighed by T[i, j] T[i', j'].

The published label is that weighted sum. It is small because the weights are (1/9 instead of 1 for three segments
paired perfectly), and a reward model would learn from it that the second segment always loses. Here it is divided by
the weight of the pairs that were labelled at all, M being their mask, closed under swapping and without the diagonal:

    Z_target = T' (Z * M) T / T' M T,    0.5 where the denominator vanishes

so that labels of a pair and of the swapped pair sum to 1. The *confidence* of a label z is |2 z - 1|.

Distances say nothing of which end is the good one: where a task looks like its mirror image, all labels may come out
inverted at once. Two remedies: a feature that both tasks share (`shared`), and a few labels of target pairs
(`anchors`), by which inversion is found and repaired. One coupling decides over all labels, so that the worst seed is
what to look at, not the mean alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.cluster.vq import kmeans2

from robopref.queries import Labels, Queries, check_answers
from robopref.transport import Coupling, GromovConfig, gromov_cost, gromov_starts, warn_if_uninformative
from robopref.types import Key

Shared: TypeAlias = Callable[[Queries], Any]
"""From queries to features [N, K, F] that mean the same in both tasks, such as whether a segment ends in success."""

_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class PearlConfig:
    """How segments of two tasks are paired.

    Attributes:
        match: `gromov` is the method. The others are what it has to beat: `nearest` and `nearest_cosine` give each
            target segment the most similar source segment, for which both tasks need features of one size, `random`
            gives it any, and `identity` pairs segments in their order, of which there must be equally many.
        gromov: of the solver.
        parts: names of parts of the observation that count; all unless given.
        use_actions: whether actions count.
        summary: whether a segment is all of its steps, one after the other, or their mean.
        standardize: features have mean 0 and variance 1 over the task's segments, each by itself (`each`), or with one
            factor for all observations and one for all actions (`jointly`), which keeps the shape of a space whose axes
            are alike.
        n_clusters: segments of each task are put into so many clusters, by K-means, and these are paired;
            quicker above some 500 segments, at the price of accuracy. None pairs the segments themselves.
        repair: with anchors, what is chosen among: the couplings of all `starts`, the best coupling and its
            `inversion`, or `both`.
    """

    match: Literal["gromov", "nearest", "nearest_cosine", "random", "identity"] = "gromov"
    gromov: GromovConfig = field(default_factory=GromovConfig)
    parts: tuple[str, ...] | None = None
    use_actions: bool = True
    summary: Literal["whole", "mean"] = "whole"
    standardize: Literal["each", "jointly"] = "each"
    n_clusters: int | None = None
    repair: Literal["starts", "inversion", "both"] = "both"

    def __post_init__(self) -> None:
        allowed = {
            "match": ("gromov", "nearest", "nearest_cosine", "random", "identity"),
            "summary": ("whole", "mean"),
            "standardize": ("each", "jointly"),
            "repair": ("starts", "inversion", "both"),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} of PEARL is one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        if self.n_clusters is not None and self.n_clusters < 2:
            raise ValueError(f"n_clusters of PEARL must be at least 2, not {self.n_clusters}.")
        if not (self.use_actions or self.parts is None or self.parts):
            raise ValueError("PEARL needs actions or a part of the observation to compare segments by.")


@dataclass(frozen=True)
class Anchoring:
    """What a few labels of target pairs said.

    Attributes:
        n: how many there were.
        agreement: of the chosen labels with them, mean of 1 - |label - anchor|.
        unanchored_agreement: of the labels that would have been given without them.
        inverted: whether the labels of a coupling were inverted.
        start: which coupling, by ascending cost.
    """

    n: int
    agreement: float
    unanchored_agreement: float
    inverted: bool
    start: int

    @property
    def repaired(self) -> bool:
        """Whether other labels were chosen than without anchors."""
        return self.inverted or self.start > 0


@dataclass(frozen=True, eq=False)
class PearlTeacher:
    """Labels of target segments that `transfer` found; any pairing of these segments is then free.

    Attributes:
        dataset_hash: of the target episodes.
        length: of the segments.
        segments: episode and start of each target segment, ascending.
        source_segments: of the source task.
        preferences: P(the second is preferred), from the first segment (rows) to the second; 0.5 on the diagonal.
        coupling: of source segments (rows) and target segments.
        anchoring: what the anchors said; None without them.
        source: how the labels were found, recorded with them.
        min_confidence: queries with less are skipped. At 0 all are answered, those that nothing is known of by 0.5.
        name: what the labels say who gave them.
    """

    dataset_hash: str
    length: int
    segments: Int[np.ndarray, "m 2"]
    source_segments: Int[np.ndarray, "n 2"]
    preferences: Float[np.ndarray, "m m"]
    coupling: Coupling
    anchoring: Anchoring | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    min_confidence: float = 0.0
    name: str = "pearl"

    def __post_init__(self) -> None:
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence must lie between 0 and 1, not {self.min_confidence}.")

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What `Labels.parameters` records."""
        return {**self.source, "min_confidence": self.min_confidence}

    def label(self, queries: Queries, key: Key) -> Labels:
        """Soft labels of pairs; those below `min_confidence` are skipped. Nothing is drawn, whatever the key.

        Raises:
            ValueError: as `values`.
        """
        values = self.values(queries)
        answered = confidences(values) >= self.min_confidence
        return Labels(
            values=np.where(answered, values, np.nan), answered=answered, labeler=self.name, parameters=self.parameters
        )

    def values(self, queries: Queries) -> Float[np.ndarray, " N"]:
        """P(the second is preferred), of every pair.

        Raises:
            ValueError: the queries are no pairs, are about other episodes, or show a segment that was not paired.
        """
        if queries.candidates != 2:
            raise ValueError(f"PEARL labels pairs, not queries of {queries.candidates} segments.")
        if (queries.dataset.hash, queries.length) != (self.dataset_hash, self.length):
            raise ValueError(
                f"labels were carried over to segments of {self.length} steps of another dataset than"
                f" {queries.dataset.path}, or of another length than {queries.length}; transfer them anew."
            )
        found: np.ndarray = self.preferences[tuple(_places(self.segments, queries).T)]
        return found


def transfer(
    source: Queries,
    source_labels: Labels,
    target: Queries,
    key: Key,
    config: PearlConfig = PearlConfig(),
    *,
    anchors: tuple[Queries, Labels] | None = None,
    shared: Shared | None = None,
    min_confidence: float = 0.0,
) -> PearlTeacher:
    """Carries labels over to the segments of `target`, and of the anchors; warns where the coupling says nothing.

    Args:
        source: labelled pairs.
        source_labels: the answers to them; those that were skipped do not count.
        target: pairs that show the segments to be labelled; how they are paired does not matter.
        key: of random starts, of K-means and of `match="random"`.
        config: how segments are paired.
        anchors: pairs of target segments with labels, by which inversion is repaired.
        shared: features with one meaning in both tasks; makes the coupling fused.
        min_confidence: of the labels that are given.

    Raises:
        ValueError: the labels are not those of the pairs, none is answered, or the features do not suit the matching.
    """
    for queries, labels in [(source, source_labels), *([anchors] if anchors else [])]:
        if queries.candidates != 2 or labels.values is None:
            raise ValueError("PEARL carries over labels of pairs, not of larger queries.")
        check_answers(queries, labels)
        if not labels.answered.any():
            raise ValueError("none of the labels is an answer, so there is nothing to carry over.")
    if anchors and (anchors[0].dataset.hash, anchors[0].length) != (target.dataset.hash, target.length):
        raise ValueError("anchors must show segments of the target's dataset, of the target's length.")
    source_segments = _distinct([source])
    segments = _distinct([target, *([anchors[0]] if anchors else [])])
    sides = (_shown(source, source_segments), _shown(target, segments))
    found = _couplings(*sides, key, config, shared)
    tables = _label_tables(_places(source_segments, source), source_labels, len(source_segments))
    candidates = [carry_over(each.matrix, *tables) for each in found]
    chosen, inverted, anchoring = 0, False, None
    if anchors:
        places = _places(segments, anchors[0].take(anchors[1].answered))
        answers = np.asarray(anchors[1].take(anchors[1].answered).values)
        anchoring = _anchored([each[tuple(places.T)] for each in candidates], answers, config.repair)
        chosen, inverted = anchoring.start, anchoring.inverted
    if config.match == "gromov":
        warn_if_uninformative(found[chosen])
    preferences = 1.0 - candidates[chosen] if inverted else candidates[chosen]
    return PearlTeacher(
        dataset_hash=target.dataset.hash,
        length=target.length,
        segments=segments,
        source_segments=source_segments,
        preferences=preferences,
        coupling=found[chosen],
        anchoring=anchoring,
        source=_record(config, source, source_labels, shared, found[chosen], anchoring),
        min_confidence=min_confidence,
    )


def carry_over(
    coupling: Float[np.ndarray, "n m"], preferences: Float[np.ndarray, "n n"], labelled: Bool[np.ndarray, "n n"]
) -> Float[np.ndarray, "m m"]:
    """Target labels from source labels: the normalised sum of the module's docstring.

    Args:
        coupling: of source (rows) and target segments.
        preferences: P(the second is preferred) from the first (rows) to the second; counts where labelled.
        labelled: which ordered pairs were; symmetric, and False on the diagonal.
    """
    mask = labelled.astype(np.float64)
    weights = coupling.T @ mask @ coupling
    sums = coupling.T @ np.where(labelled, preferences, 0.0) @ coupling
    known = weights >= _NEGLIGIBLE
    found = np.where(known, sums / np.where(known, weights, 1.0), 0.5)
    # Both are sums of the same terms in another order: rounding must not make a label impossible, or lopsided.
    found = np.clip((found + 1.0 - found.T) / 2.0, 0.0, 1.0)
    np.fill_diagonal(found, 0.5)
    return found


def confidences(values: Float[np.ndarray, "*B"]) -> Float[np.ndarray, "*B"]:
    """How far labels are from a tie: |2 z - 1|."""
    found: np.ndarray = np.abs(2.0 * values - 1.0)
    return found


def segment_features(queries: Queries, config: PearlConfig = PearlConfig()) -> Float[np.ndarray, "N K F"]:
    """What segments are compared by: standardised observations and actions, flattened over time or averaged.

    Raises:
        ValueError: the dataset has no such part of the observation; names those that it has.
    """
    groups = []
    observations, actions = (np.asarray(each, np.float64) for each in (queries.observations, queries.actions))
    if config.parts is None:
        groups.append(observations)
    else:
        sizes = dict(queries.dataset.keys)
        missing = [name for name in config.parts if name not in sizes]
        if missing:
            raise ValueError(
                f"{queries.dataset.path} has no part {missing[0]!r} in its observations; there are {', '.join(sizes)}."
            )
        ends = dict(zip(sizes, np.cumsum(list(sizes.values())), strict=True))
        chosen = [observations[..., ends[name] - sizes[name] : ends[name]] for name in config.parts]
        groups += [np.concatenate(chosen, axis=-1)] if chosen else []
    groups += [actions] if config.use_actions else []
    scaled = np.concatenate([_standardized(each, config.standardize) for each in groups], axis=-1)
    if config.summary == "mean":
        return np.asarray(scaled.mean(axis=2))
    return scaled.reshape(*scaled.shape[:2], -1)


def _standardized(values: Float[np.ndarray, "N K T F"], how: str) -> Float[np.ndarray, "N K T F"]:
    centred = values - values.mean(axis=(0, 1, 2))
    spread = np.sqrt(np.square(centred).mean(axis=(0, 1, 2)))
    # What never changes says nothing, and its rounding must not be blown up.
    constant = spread <= 1e-9 * np.abs(values).max(axis=(0, 1, 2), initial=1e-300)
    if how == "jointly":
        spread = np.full_like(spread, np.sqrt(np.square(spread).sum() / max((~constant).sum(), 1)))
    scaled: np.ndarray = np.where(constant, 0.0, centred / np.where(spread > 0, spread, 1.0))
    return scaled


def _couplings(
    source: Queries, target: Queries, key: Key, config: PearlConfig, shared: Shared | None
) -> list[Coupling]:
    """Of the segments that are shown first in the queries: of all starts, by ascending cost."""
    first, second = (segment_features(each, config)[:, 0] for each in (source, target))
    if not all(np.isfinite(each).all() for each in (first, second)):
        raise ValueError("observations and actions must be finite numbers for PEARL to compare segments by them.")
    match_key, cluster_key = jax.random.split(key)
    if config.match != "gromov":
        matrix = _matched(first, second, match_key, config.match)
        return [_judged(matrix, _distances(first), _distances(second))]
    linear = None
    if shared is not None:
        features = [np.asarray(shared(each), np.float64)[:, 0].reshape(len(each), -1) for each in (source, target)]
        both = np.concatenate(features)
        spread = both.std(axis=0)
        scaled = (both - both.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
        linear = np.linalg.norm(scaled[: len(source), None] - scaled[len(source) :], axis=-1)
    if config.n_clusters is None:
        return gromov_starts(_distances(first), _distances(second), match_key, config.gromov, linear_costs=linear)
    rng = _generator(cluster_key)
    centres, members = zip(*(_clusters(each, config.n_clusters, rng) for each in (first, second)), strict=True)
    masses = [each.mean(axis=0) for each in members]
    # The mean over members of two clusters of what lies between them.
    shares = [each / each.sum(axis=0) for each in members]
    found = gromov_starts(
        _distances(centres[0]),
        _distances(centres[1]),
        match_key,
        config.gromov,
        weights_x=masses[0],
        weights_y=masses[1],
        linear_costs=None if linear is None else shares[0].T @ linear @ shares[1],
    )
    return [dataclasses.replace(each, matrix=shares[0] @ each.matrix @ shares[1].T) for each in found]


def _matched(
    first: Float[np.ndarray, "n F"], second: Float[np.ndarray, "m G"], key: Key, match: str
) -> Float[np.ndarray, "n m"]:
    """One source segment for each target segment."""
    if match == "random":
        chosen = _generator(key).integers(len(first), size=len(second))
    elif match == "identity":
        if len(first) != len(second):
            raise ValueError(
                f"identity needs as many source as target segments, and not {len(first)} and {len(second)}."
            )
        chosen = np.arange(len(first))
    else:
        if first.shape[1] != second.shape[1]:
            raise ValueError(
                f"the nearest source segment needs features of one size in both tasks, and not {first.shape[1]} and"
                f" {second.shape[1]}; choose parts that they share, or match='gromov'."
            )
        if match == "nearest_cosine":
            first, second = (
                each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), _NEGLIGIBLE) for each in (first, second)
            )
        chosen = _between(first, second).argmin(axis=0)
    matrix = np.zeros((len(first), len(second)))
    matrix[chosen, np.arange(len(second))] = 1.0 / len(second)
    return matrix


def _judged(
    matrix: Float[np.ndarray, "n m"], costs_x: Float[np.ndarray, "n n"], costs_y: Float[np.ndarray, "m m"]
) -> Coupling:
    """A matching as a coupling of the weights that it happens to have."""
    costs_x, costs_y = (costs / max(costs.mean(), _NEGLIGIBLE) for costs in (costs_x, costs_y))
    rows, columns = matrix.sum(axis=1), matrix.sum(axis=0)
    entropies = [float(-(each[each > 0] * np.log(each[each > 0])).sum()) for each in (matrix, rows, columns)]
    return Coupling(
        matrix=matrix,
        cost=np.float64(gromov_cost(costs_x, costs_y, matrix)),
        product_cost=np.float64(gromov_cost(costs_x, costs_y, np.outer(rows, columns))),
        entropy_ratio=np.float64(entropies[0] / max(entropies[1] + entropies[2], _NEGLIGIBLE)),
        converged=np.bool_(True),
    )


def _clusters(
    features: Float[np.ndarray, "n F"], count: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "k F"], Bool[np.ndarray, "n k"]]:
    """Centres, and which segment is in which cluster; none is empty."""
    if count >= len(features):
        return features, np.eye(len(features), dtype=bool)
    _, chosen = kmeans2(features, count, minit="++", rng=rng)
    _, chosen = np.unique(chosen, return_inverse=True)
    members = chosen[:, None] == np.arange(chosen.max() + 1)
    return np.asarray(members.T @ features / members.sum(axis=0)[:, None]), members


def _distances(features: Float[np.ndarray, "n F"]) -> Float[np.ndarray, "n n"]:
    found = _between(features, features)
    np.fill_diagonal(found, 0.0)
    return np.asarray((found + found.T) / 2.0)


def _between(first: Float[np.ndarray, "n F"], second: Float[np.ndarray, "m F"]) -> Float[np.ndarray, "n m"]:
    squares = np.square(first).sum(axis=1)[:, None] + np.square(second).sum(axis=1) - 2.0 * first @ second.T
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def _generator(key: Key) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.bits(key, (4,), jnp.uint32)))


def _distinct(every: list[Queries]) -> Int[np.ndarray, "n 2"]:
    pairs = [np.stack([each.episodes.ravel(), each.starts.ravel()], axis=1) for each in every]
    return np.unique(np.concatenate(pairs), axis=0)


def _shown(queries: Queries, segments: Int[np.ndarray, "n 2"]) -> Queries:
    """Each segment next to itself, as a query that features can be taken of."""
    episodes, starts = (np.repeat(column[:, None], 2, axis=1) for column in segments.T)
    return Queries(queries.dataset, episodes, starts, queries.length)


def _places(segments: Int[np.ndarray, "n 2"], queries: Queries) -> Int[np.ndarray, "N K"]:
    """Which of the segments, in ascending order, each candidate is."""
    span = max(int(segments[:, 1].max()), int(queries.starts.max())) + 1
    known, wanted = segments @ [span, 1], queries.episodes * span + queries.starts
    place: np.ndarray = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    if not np.array_equal(known[place], wanted):
        query, candidate = np.argwhere(known[place] != wanted)[0]
        raise ValueError(
            f"query {query} shows step {queries.starts[query, candidate]} of episode"
            f" {queries.episodes[query, candidate]}, to which no labels were carried over."
        )
    return place


def _label_tables(
    places: Int[np.ndarray, "N 2"], labels: Labels, count: int
) -> tuple[Float[np.ndarray, "n n"], Bool[np.ndarray, "n n"]]:
    """P(the second is preferred) of ordered pairs, the mean where a pair has several labels, and which have any."""
    sums, times = np.zeros((count, count)), np.zeros((count, count))
    first, second = places[labels.answered].T
    values = np.asarray(labels.values)[labels.answered]
    np.add.at(sums, (first, second), values)
    np.add.at(sums, (second, first), 1.0 - values)
    np.add.at(times, (first, second), 1.0)
    np.add.at(times, (second, first), 1.0)
    np.fill_diagonal(times, 0.0)
    labelled = times > 0
    if not labelled.any():
        raise ValueError("all labelled pairs show one segment twice, so there is nothing to carry over.")
    return sums / np.where(labelled, times, 1.0), labelled


def _anchored(candidates: list[Float[np.ndarray, " k"]], answers: Float[np.ndarray, " k"], repair: str) -> Anchoring:
    """Whichever labels agree best with the anchors; of equals, the cheaper and not inverted ones."""
    agreements = [float(1.0 - np.abs(each - answers).mean()) for each in candidates]
    inversions = [float(1.0 - np.abs(1.0 - each - answers).mean()) for each in candidates]
    options = [(agreements[0], 0, False)]
    if repair in ("starts", "both"):
        options += [(each, index, False) for index, each in enumerate(agreements) if index]
    if repair in ("inversion", "both"):
        considered = inversions if repair == "both" else inversions[:1]
        options += [(each, index, True) for index, each in enumerate(considered)]
    agreement, start, inverted = max(options, key=lambda option: option[0])
    return Anchoring(len(answers), agreement, agreements[0], inverted, start)


def _record(
    config: PearlConfig,
    source: Queries,
    labels: Labels,
    shared: Shared | None,
    coupling: Coupling,
    anchoring: Anchoring | None,
) -> dict[str, Any]:
    return {
        **dataclasses.asdict(config),
        "parts": None if config.parts is None else list(config.parts),
        "shared": None if shared is None else getattr(shared, "__name__", type(shared).__name__),
        "source_dataset": source.dataset.hash,
        "source_labeler": labels.labeler,
        "source_labels": int(labels.answered.sum()),
        "cost_ratio": float(coupling.cost_ratio),
        "entropy_ratio": float(coupling.entropy_ratio),
        "converged": bool(coupling.converged),
        "anchoring": None if anchoring is None else {**dataclasses.asdict(anchoring), "repaired": anchoring.repaired},
    }
