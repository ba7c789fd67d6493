"""Teachers fitted to labels by maximum likelihood, with intervals, and compared by what they predict of other labels.

A *family* says how P(the second is preferred) depends on two segments, up to a few parameters. With d for the second
less the first, the families are special cases of

    P = (1 - lapse) sigmoid(d score / temperature) + lapse / 2

| family | score | parameters |
| --- | --- | --- |
| coin | none: P = 1/2 | none |
| partial return | sum_t r_t | temperature, lapse |
| myopic partial return | sum_t past_discount^(T - 1 - t) r_t | temperature, past_discount, lapse |
| regret | sum_t discount^t r_t - V(s_0) + discount^T V(s_T) | temperature, lapse |
| start, end and partial return | the same three parts, each with a weight (temperature 1) | three weights, lapse |

Regret and the weighing of its parts are the models of people of Knox et al., "Models of human preference for learning
reward functions" (arXiv 2206.02231), the myopic teacher is that of Lee et al., "B-Pref" (arXiv 2111.03026).

**Likelihood.** A label y counts y log P + (1 - y) log(1 - P), ties and soft labels too; queries without an answer do
not count. Intervals are those of the profile likelihood: what the data reject at 95% lies outside. They hold close to a
limit of a parameter, such as lapse 0, where the curvature at the maximum says nothing. An end at such a limit is
*open*: the data do not bound the parameter on that side. Without noise the likeliest weights are infinite; those that
are given instead are so large that larger ones are hardly likelier. A tie varies less than the two answers that the
likelihood takes it for, so that intervals are somewhat too wide where many labels are ties.

**Held out.** Each family predicts every label after it was fitted to the other folds. Queries that share a segment are
in one fold, unless so many are linked that they would not fit into one; those are dealt out one by one. In a prediction
a share 1 / (n + 2) of the answers is left to chance, n being the fitted queries (the rule of succession), so that a
single mistake does not ruin a fit without noise.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import optimize, sparse, stats

from labelers.regret import LogisticTeacher, Values, segment_statistics
from labelers.teachers import Teacher
from robopref.episodes import EpisodeDataset
from robopref.files import read_json, write_json
from robopref.queries import Labels, Queries, check_answers

SCHEMA_VERSION = 1
CONFIDENCE = 0.95

FamilyName: TypeAlias = Literal[
    "coin", "partial return", "myopic partial return", "regret", "start, end and partial return"
]

RowValues: TypeAlias = Float[np.ndarray, " R"]
"""V of every row of a dataset's observations."""

_WEIGHTS = ("partial_return_weight", "start_value_weight", "end_value_weight")
_NEGLIGIBLE = 1e-6
"""Log-likelihoods that differ by less are equal: fits end about as far from their maxima."""


@dataclass(frozen=True)
class _Kind:
    """A kind of parameter, and the unconstrained number in its place during a fit.

    Attributes:
        limits: of the parameter.
        room: what a fit may use of the unconstrained number; beyond lies nothing that labels could tell from a limit.
        searched: what an interval uses of it.
        begins: where a search may begin.
        starts: where a fit looks for its first points.
    """

    limits: tuple[float, float]
    room: tuple[float, float]
    searched: tuple[float, float]
    begins: tuple[float, float]
    starts: tuple[float, ...]


# Temperatures and weights are fitted in units of how much the statistics differ, the former by their logarithm.
_WIDE = math.log(1e6)
_TEMPERATURE = _Kind((0.0, math.inf), (-_WIDE, _WIDE), (-_WIDE, _WIDE), (-8.0, 8.0), (-3.0, -1.5, 0.0, 1.5))
_WEIGHT = _Kind((-math.inf, math.inf), (-1e6, 1e6), (-1e3, 1e3), (-1e6, 1e6), (-2.0, 0.0, 2.0))
_LAPSE = _Kind((0.0, 1.0), (-25.0, 25.0), (-25.0, 25.0), (-6.0, 6.0), (-4.0, -1.0))
_DISCOUNT = _Kind((0.0, 1.0), (-25.0, 25.0), (-25.0, 25.0), (-6.0, 6.0), (-1.0, 1.0, 2.5, 5.0))
_KINDS = {
    "temperature": _TEMPERATURE,
    "past_discount": _DISCOUNT,
    "lapse": _LAPSE,
    **{name: _WEIGHT for name in _WEIGHTS},
}


@dataclass(frozen=True)
class Family:
    """A kind of teacher.

    Attributes:
        name: a key of `FAMILIES`.
        parameters: what is fitted.
        needs_values: whether it looks at the values of states.
    """

    name: FamilyName
    parameters: tuple[str, ...]
    needs_values: bool = False

    def differences(
        self, queries: Queries, values: Values | RowValues | None, discount: float
    ) -> Float[np.ndarray, "N F"]:
        """Second less first of the F statistics that this family weighs; rewards are in order from the last step."""
        if self.needs_values:
            parts = _second_less_first(segment_statistics(queries, _given(self.name, values), discount))
            return parts if self.name == "start, end and partial return" else parts @ np.array([[1.0], [-1.0], [1.0]])
        if self.name == "coin":
            return np.zeros((len(queries), 0))
        rewards = _second_less_first(queries.rewards.astype(np.float64))[:, ::-1]
        return rewards if self.name == "myopic partial return" else rewards.sum(axis=-1, keepdims=True)


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("coin", ()),
        Family("partial return", ("temperature", "lapse")),
        Family("myopic partial return", ("temperature", "past_discount", "lapse")),
        Family("regret", ("temperature", "lapse"), needs_values=True),
        Family("start, end and partial return", (*_WEIGHTS, "lapse"), needs_values=True),
    )
}
"""All families by name, the simplest first."""


@dataclass(frozen=True)
class Estimate:
    """A fitted parameter and its 95% interval. An end at one of the parameter's limits is open: no data bound it."""

    value: float
    low: float
    high: float
    open_low: bool
    open_high: bool

    def __str__(self) -> str:
        bounds = {
            (False, False): f"{self.low:.3g} to {self.high:.3g}",
            (True, False): f"at most {self.high:.3g}",
            (False, True): f"at least {self.low:.3g}",
            (True, True): "any",
        }
        return f"{self.value:.3g} ({bounds[self.open_low, self.open_high]})"


@dataclass(frozen=True)
class FittedTeacher:
    """What the labels of somebody say about the parameters of one family.

    Attributes:
        family: its name.
        parameters: every one of the family.
        discount: the one under which the values were computed; 1 where the family looks at none.
        n: queries that were answered.
        log_likelihood: of all answers together at the maximum, in nats.
        held_out: log-likelihood per query of held-out answers, in nats; None where none were held out.
        dataset_hash: of the episodes that the queries were about.
        labeler: whose labels they were.
    """

    family: FamilyName
    parameters: Mapping[str, Estimate]
    discount: float
    n: int
    log_likelihood: float
    held_out: float | None
    dataset_hash: str
    labeler: str

    @property
    def needs_values(self) -> bool:
        """Whether the family looks at the values of states."""
        return FAMILIES[self.family].needs_values

    def teacher(self, values: Values | RowValues | None = None, *, soft: bool = False) -> Teacher | LogisticTeacher:
        """A simulated teacher that answers with the fitted probabilities, and may label any dataset.

        Args:
            values: for families that need them: V as a function of observations, or as one number for each row of the
                observations of the dataset that is to be labelled.
            soft: answer with the probability itself rather than with a draw from it.

        Raises:
            ValueError: the family needs values.
        """
        found = {name: estimate.value for name, estimate in self.parameters.items()}
        lapse, temperature, name = found.get("lapse", 0.0), found.get("temperature", 1.0), f"fitted {self.family}"
        if self.family == "coin" or math.isinf(temperature):
            # A temperature without end has no JSON form, and a coin has the same probabilities.
            lapse, temperature = 1.0, 1.0
        if not self.needs_values:
            past = found.get("past_discount", 1.0)
            return Teacher(temperature=temperature, discount=past, mistake=lapse / 2.0, soft=soft, name=name)
        weights = {weight: found[weight] for weight in _WEIGHTS if weight in found}
        return LogisticTeacher(
            _given(self.family, values),
            self.discount,
            temperature=temperature,
            lapse=lapse,
            soft=soft,
            source=f"fitted to {self.n} labels of {self.labeler}",
            name=name,
            **weights,
        )

    def probabilities(self, queries: Queries, values: Values | RowValues | None = None) -> Float[np.ndarray, " N"]:
        """P(the second is preferred) of every pair."""
        return np.asarray(self.teacher(values, soft=True).label(queries, jax.random.key(0)).values)


class Bin(NamedTuple):
    """Queries to which similar probabilities were given.

    Attributes:
        predicted: mean of P(the second is preferred).
        labelled: mean of the labels.
        n: how many queries.
    """

    predicted: float
    labelled: float
    n: int


@dataclass(frozen=True, eq=False)
class Candidate:
    """A family in a comparison.

    Attributes:
        fitted: to all labels; its `held_out` is known.
        probabilities: P(the second is preferred) of every answered query while it was held out.
        difference: held-out log-likelihood per query less that of the best family, in nats.
        low: lower end of its 95% interval, from the differences of single queries.
        high: upper end.
    """

    fitted: FittedTeacher
    probabilities: Float[np.ndarray, " n"]
    difference: float
    low: float
    high: float

    @property
    def supported(self) -> bool:
        """Whether the data allow that this family is no worse than the best one."""
        return self.high >= -_NEGLIGIBLE


@dataclass(frozen=True, eq=False)
class TeacherComparison:
    """Families side by side.

    Attributes:
        candidates: by held-out log-likelihood, the best one first.
        labels: of the answered queries.
        left_out: families that need values, where none were given.
        split_up: share of the queries that are linked by segments to more queries than a fold takes, and were dealt
            out one by one.
    """

    candidates: tuple[Candidate, ...]
    labels: Float[np.ndarray, " n"]
    left_out: tuple[str, ...]
    split_up: float

    @property
    def best(self) -> Candidate:
        """The family that predicts held-out labels best; of several that do so, the simplest."""
        return self.candidates[0]

    @property
    def conclusion(self) -> str:
        """Which teachers the labels support, in a sentence."""
        supported = [each.fitted.family for each in self.candidates if each.supported]
        others = [each.fitted.family for each in self.candidates if not each.supported]
        if len(supported) == 1:
            return f"The labels support {_quoted(supported)}, which predicts them better than {_quoted(others)}."
        against = f", but they speak against {_quoted(others)}" if others else ""
        more = "; more labels are needed, as mere chance would explain these as well" if "coin" in supported else ""
        return f"The labels do not tell {_quoted(supported)} apart{against}{more}."


def fit_teacher(
    queries: Queries,
    labels: Labels,
    family: str,
    *,
    values: Values | RowValues | None = None,
    discount: float = 1.0,
) -> FittedTeacher:
    """The likeliest teacher of a family, and an interval for each of its parameters.

    Args:
        queries: pairs.
        labels: the answers to them.
        family: a key of `FAMILIES`.
        values: for families that need them: V as a function of observations, or as one number for each row of the
            dataset's observations. A terminal state is worth 0, whatever this says about it.
        discount: the one under which V was computed.

    Raises:
        ValueError: there is no such family, it needs values, these are no finite numbers, one for each observation, or
            the labels are not those of pairs.
    """
    data = _Data.of(queries, labels, _family(family), values, discount)
    with jax.enable_x64(True):
        return _fitted(data, _maximum(data, data.everything))


def compare_teachers(
    queries: Queries,
    labels: Labels,
    *,
    values: Values | RowValues | None = None,
    discount: float = 1.0,
    families: Iterable[str] = tuple(FAMILIES),
    folds: int = 5,
    seed: int = 0,
) -> TeacherComparison:
    """Fits families, and compares what they predict of labels that they were not fitted to.

    Args:
        queries: pairs.
        labels: the answers to them.
        values: as in `fit_teacher`; without them, the families that need them are left out.
        discount: the one under which they were computed.
        families: which to compare, the simplest first.
        folds: parts of the labels that are held out in turn.
        seed: of the folds.

    Raises:
        ValueError: there are too few answers for so many folds, or as in `fit_teacher`.
    """
    chosen = [_family(name) for name in families]
    left_out = tuple(family.name for family in chosen if family.needs_values and values is None)
    chosen = [family for family in chosen if family.name not in left_out]
    if not chosen:
        raise ValueError("there is no family to compare; those that need values need them given.")
    every = [_Data.of(queries, labels, family, values, discount) for family in chosen]
    dealt, split_up = fold_indices(every[0].queries, folds, np.random.default_rng(seed))
    with jax.enable_x64(True):
        found = [_held_out(data, dealt) for data in every]
    answers = np.asarray(every[0].labels)
    scores = [answers * np.log(p) + (1.0 - answers) * np.log1p(-p) for _, p in found]
    most = max(score.mean() for score in scores) - _NEGLIGIBLE
    best = next(score for score in scores if score.mean() >= most)
    candidates = [
        Candidate(dataclasses.replace(fitted, held_out=float(score.mean())), p, *_paired_interval(score - best))
        for (fitted, p), score in zip(found, scores, strict=True)
    ]
    candidates.sort(key=lambda each: max(-each.difference, 0.0))
    return TeacherComparison(tuple(candidates), answers, left_out, split_up)


def fold_indices(queries: Queries, folds: int, rng: np.random.Generator) -> tuple[Int[np.ndarray, " N"], float]:
    """The fold of every query, such that queries that share a segment are in one fold where this is possible.

    Queries that are linked by segments, be it over several others, stay together, unless they are more than a fold's
    share of all; such ones are dealt out one by one.

    Returns:
        folds: of each query, from 0 on; none is empty.
        split_up: share of the queries that were dealt out one by one although they are linked.

    Raises:
        ValueError: there are fewer than 2 folds, or fewer queries than folds.
    """
    count = len(queries)
    if folds < 2:
        raise ValueError(f"holding labels out in turn needs at least 2 folds, not {folds}.")
    if count < folds:
        raise ValueError(f"{folds} folds need at least as many answered queries, not {count}.")
    windows = queries.dataset.offsets[queries.episodes] + queries.starts
    _, segments = np.unique(windows, return_inverse=True)
    segments = segments.reshape(windows.shape)
    shows = sparse.coo_array(
        (np.ones(segments.size), (np.repeat(np.arange(count), queries.candidates), segments.ravel() + count)),
        shape=(count + int(segments.max()) + 1,) * 2,
    )
    _, component = sparse.csgraph.connected_components(shows, directed=False)
    _, group = np.unique(component[:count], return_inverse=True)
    too_large = np.bincount(group)[group] > count // folds
    group = np.where(too_large, group.max() + 1 + np.arange(count), group)
    _, group, sizes = np.unique(group, return_inverse=True, return_counts=True)
    order = rng.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    filled, fold_of_group = np.zeros(folds, int), np.zeros(len(sizes), int)
    for each in order:
        fold_of_group[each] = np.argmin(filled)
        filled[fold_of_group[each]] += sizes[each]
    return fold_of_group[group], float(too_large.mean())


def calibration_bins(
    probabilities: Float[np.ndarray, " N"], labels: Float[np.ndarray, " N"], bins: int = 5
) -> list[Bin]:
    """What was predicted beside what was answered, in equal parts of [0, 1]; parts without a query are left out."""
    place = np.minimum((np.asarray(probabilities) * bins).astype(int), bins - 1)
    chosen = [place == part for part in np.unique(place)]
    return [Bin(float(probabilities[each].mean()), float(labels[each].mean()), int(each.sum())) for each in chosen]


def save_teacher(path: str | os.PathLike[str], fitted: FittedTeacher) -> None:
    """Writes a fitted teacher as JSON, atomically, in place of any file at `path`; infinity becomes null.

    Raises:
        OSError: the folder cannot be written to.
    """
    parameters = {
        name: {part: _or_none(getattr(estimate, part)) for part in ("value", "low", "high")}
        for name, estimate in fitted.parameters.items()
    }
    fields = {each.name: getattr(fitted, each.name) for each in dataclasses.fields(fitted)}
    write_json(path, {"schema_version": SCHEMA_VERSION, **fields, "parameters": parameters})


def load_teacher(path: str | os.PathLike[str]) -> FittedTeacher:
    """Reads what `save_teacher` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no fitted teacher; says what is wrong with it.
        OSError: the file cannot be read.
    """
    content = read_json(path)

    def require(right: bool, rule: str) -> None:
        if not right:
            raise ValueError(f"{path} is not a fitted teacher: {rule}.")

    require(isinstance(content, dict), "it holds no JSON object")
    version = content.get("schema_version")
    require(_is_number(version) and version == SCHEMA_VERSION, f"this robopref reads schema_version {SCHEMA_VERSION}")
    name = content.get("family")
    require(isinstance(name, str) and name in FAMILIES, f"family is one of {_quoted(FAMILIES)}")
    family, written = FAMILIES[name], content.get("parameters")
    require(
        isinstance(written, dict) and set(written) == set(family.parameters),
        f"the parameters of {name!r} are {_quoted(family.parameters) or 'none'}",
    )
    parameters = {}
    for parameter in family.parameters:
        estimate = _read_estimate(written[parameter], _KINDS[parameter])
        require(estimate is not None, f"{parameter} needs value, low and high in their order and within its limits")
        parameters[parameter] = estimate
    discount, n = content.get("discount"), content.get("n")
    require(_is_number(discount) and 0 <= discount <= 1, "discount lies between 0 and 1")
    require(isinstance(n, int) and not isinstance(n, bool) and n > 0, "n counts at least 1 query")
    for key in ("log_likelihood", "held_out"):
        likelihood = content.get(key)
        absent = key == "held_out" and likelihood is None
        require(absent or (_is_number(likelihood) and likelihood <= 0), f"{key} is a number of at most 0")
    for key in ("dataset_hash", "labeler"):
        require(isinstance(content.get(key), str), f"{key} is a text")
    names = [each.name for each in dataclasses.fields(FittedTeacher)]
    return FittedTeacher(**{**{each: content.get(each) for each in names}, "parameters": parameters})


def read_values(path: str | os.PathLike[str], dataset: EpisodeDataset) -> RowValues:
    """V of every row of the dataset's observations, from a file that `numpy.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something other than one finite number per row.
        OSError: the file cannot be read.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a file of numbers that numpy.save wrote.") from error
    rows = len(dataset.observations)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds no array of real numbers.")
    if values.shape != (rows,):
        raise ValueError(
            f"{path} has the shape {list(values.shape)}, but {dataset.path} needs [{rows}]: one value for each row of"
            " its observations, the last one of each episode included."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{path} is not finite at row {np.flatnonzero(~np.isfinite(values))[0]}.")
    return values.astype(np.float64)


@dataclass(frozen=True, eq=False)
class _Data:
    """What a fit looks at: the answered queries, and of them the differences of statistics in units of their scale.

    `everything` is a weight of 1 for each query.
    """

    family: Family
    queries: Queries
    labels: Float[Array, " n"]
    differences: Float[Array, "n F"]
    everything: Float[Array, " n"]
    scale: Float[np.ndarray, " F"]
    discount: float
    labeler: str

    @classmethod
    def of(
        cls, queries: Queries, labels: Labels, family: Family, values: Values | RowValues | None, discount: float
    ) -> _Data:
        check_answers(queries, labels)
        if labels.values is None:
            raise ValueError(
                f"teachers are fitted to labels of pairs, and these are orders of {queries.candidates} segments."
            )
        if not labels.answered.any():
            raise ValueError(f"none of the {len(queries)} queries is answered; there is nothing to fit a teacher to.")
        if not 0 <= discount <= 1:
            raise ValueError(f"the discount of the values must lie in [0, 1], not {discount}.")
        answered = queries.take(labels.answered)
        differences = family.differences(answered, values, discount)
        if not np.isfinite(differences).all():
            index = int(np.flatnonzero(labels.answered)[np.argwhere(~np.isfinite(differences))[0, 0]])
            raise ValueError(f"a reward in query {index} is not finite, so that no teacher can be fitted.")
        squares = np.mean(differences**2, axis=0)
        own = family.parameters[:1] == _WEIGHTS[:1]
        size = np.sqrt(squares if own else np.full(len(squares), squares.sum()))
        scale = np.where(size > 0, size, 1.0)
        with jax.enable_x64(True):
            return cls(
                family=family,
                queries=answered,
                labels=jnp.asarray(labels.values[labels.answered]),
                differences=jnp.asarray(differences / scale),
                everything=jnp.ones(len(answered)),
                scale=scale,
                discount=discount if family.needs_values else 1.0,
                labeler=labels.labeler,
            )

    def natural(self, name: str, number: float) -> float:
        """The parameter that an unconstrained number stands for; its limit where the number has no more room."""
        kind = _KINDS[name]
        if name not in _WEIGHTS and number in kind.room:
            return kind.limits[kind.room.index(number)]
        if name == "temperature":
            return float(self.scale[0]) * math.exp(number)
        if name in _WEIGHTS:
            return number / float(self.scale[_WEIGHTS.index(name)])
        return 1.0 / (1.0 + math.exp(-number))


class _Point(NamedTuple):
    """Unconstrained parameters, and the log-likelihood there, in nats."""

    numbers: Float[np.ndarray, " P"]
    log_likelihood: float


def _fitted(data: _Data, maximum: _Point) -> FittedTeacher:
    parameters = {}
    for index, name in enumerate(data.family.parameters):
        low, high = _end(data, maximum, index, 0), _end(data, maximum, index, 1)
        estimate = data.natural(name, float(maximum.numbers[index]))
        parameters[name] = _estimate(estimate, low, high, _KINDS[name])
    return FittedTeacher(
        family=data.family.name,
        parameters=parameters,
        discount=data.discount,
        n=len(data.labels),
        log_likelihood=min(maximum.log_likelihood, 0.0),
        held_out=None,
        dataset_hash=data.queries.dataset.hash,
        labeler=data.labeler,
    )


def _held_out(data: _Data, folds: Int[np.ndarray, " n"]) -> tuple[FittedTeacher, Float[np.ndarray, " n"]]:
    """The family fitted to all labels, and P of each query from a fit to the other folds."""
    whole = _maximum(data, data.everything)
    probabilities = np.empty(len(data.labels))
    for fold in np.unique(folds):
        out = folds == fold
        there = _maximum(data, jnp.asarray((~out).astype(np.float64)), [whole.numbers])
        log_second, _ = _log_probabilities(data.family.parameters, there.numbers, data.differences)
        chance = 1.0 / ((~out).sum() + 2.0)
        probabilities[out] = (1.0 - chance) * np.exp(np.asarray(log_second)[out]) + chance / 2.0
    return _fitted(data, whole), probabilities


def _maximum(data: _Data, weights: Float[Array, " n"], starts: Sequence[Float[np.ndarray, " P"]] = ()) -> _Point:
    """The likeliest parameters; where a limit is as likely, that one."""
    found = _ascend(data, weights, _promising(data, weights, starts, count=3))
    for index, name in enumerate(data.family.parameters):
        # First no noise, no lapses and nothing forgotten.
        limits = sorted(_KINDS[name].room, reverse=name == "past_discount")
        for limit in limits if name not in _WEIGHTS else ():
            moved = found.numbers.copy()
            moved[index] = limit
            likelihood = _log_likelihood(data, weights, moved)
            if likelihood >= found.log_likelihood - _NEGLIGIBLE:
                found = _Point(moved, likelihood)
                break
    return found


def _end(data: _Data, maximum: _Point, index: int, side: Literal[0, 1]) -> float:
    """Where the profile likelihood of a parameter falls below what the confidence allows, or the limit on that side."""
    name = data.family.parameters[index]
    kind, direction = _KINDS[name], 2 * side - 1
    edge, best = kind.searched[side], float(maximum.numbers[index])
    if (edge - best) * direction <= 0:
        return kind.limits[side]
    allowed = math.sqrt(stats.chi2.ppf(CONFIDENCE, 1) / 2.0)
    seen, path = {best: -allowed}, [maximum.numbers]

    def excess(number: float) -> float:
        """Root of the fall of the profile likelihood, less what is allowed: close to a straight line."""
        if number not in seen:
            # The last point as it is too: where noise is small, far less likely ones may be next to it.
            last = path[-1].copy()
            last[index] = number
            starts = _promising(data, data.everything, path[-1:], count=1, fixed={index: number})
            point = _ascend(data, data.everything, [last, *starts], fixed={index: number})
            path.append(point.numbers)
            seen[number] = math.sqrt(max(maximum.log_likelihood - point.log_likelihood, 0.0)) - allowed
        return seen[number]

    if name in _WEIGHTS and best:
        # Without noise all weights grow together.
        path.append(maximum.numbers * abs(edge / best))
    if excess(edge) <= 0:
        return kind.limits[side]
    path[:] = [maximum.numbers]
    inside, outside, step = best, best, 0.25
    while excess(outside) <= 0:
        if outside != best:
            fall = excess(outside) + allowed
            step *= float(np.clip(1.1 * allowed / max(fall, 1e-9), 1.5, 8.0))
        inside, outside = outside, best + direction * step
        outside = edge if (edge - outside) * direction <= 0 else outside
    return data.natural(name, float(optimize.brentq(excess, inside, outside, xtol=1e-4, rtol=1e-4)))


def _promising(
    data: _Data,
    weights: Float[Array, " n"],
    others: Sequence[Float[np.ndarray, " P"]],
    *,
    count: int,
    fixed: Mapping[int, float] | None = None,
) -> list[Float[np.ndarray, " P"]]:
    """The likeliest ones among some points and those of a coarse grid."""
    kinds = [_KINDS[name] for name in data.family.parameters]
    if not kinds:
        return [np.zeros(0)]
    grid = np.stack(np.meshgrid(*(kind.starts for kind in kinds), indexing="ij"), axis=-1).reshape(-1, len(kinds))
    points = np.concatenate([grid, *(other[None] for other in others)])
    # Too close to a limit, the likelihood is flat.
    points = np.clip(points, *np.array([kind.begins for kind in kinds]).T)
    for index, number in (fixed or {}).items():
        points[:, index] = number
    losses = np.asarray(_losses(data.family.parameters, points, data.differences, data.labels, weights))
    _, first = np.unique(points, axis=0, return_index=True)
    return list(points[first[np.argsort(losses[first], kind="stable")[:count]]])


def _ascend(
    data: _Data,
    weights: Float[Array, " n"],
    starts: Sequence[Float[np.ndarray, " P"]],
    *,
    fixed: Mapping[int, float] | None = None,
) -> _Point:
    """The best of the maxima that are reached from some starts, with some numbers left as they are there."""
    rooms = [_KINDS[name].room for name in data.family.parameters]
    free = np.array([index for index in range(len(rooms)) if index not in (fixed or {})], int)
    points = []
    for start in starts:
        numbers = start.copy()

        def loss_and_slope(moved: Float[np.ndarray, " M"], numbers: np.ndarray = numbers) -> tuple[float, np.ndarray]:
            numbers[free] = moved
            loss, slope = _loss_and_slope(data.family.parameters, numbers, data.differences, data.labels, weights)
            return float(loss), np.asarray(slope)[free]

        if len(free):
            result = optimize.minimize(
                loss_and_slope,
                numbers[free],
                jac=True,
                method="L-BFGS-B",
                bounds=[rooms[index] for index in free],
                options={"ftol": 1e-12, "gtol": 1e-7, "maxcor": 20, "maxiter": 500},
            )
            numbers[free] = result.x
        points.append(_Point(numbers, _log_likelihood(data, weights, numbers)))
    return max(points, key=lambda point: point.log_likelihood)


def _log_likelihood(data: _Data, weights: Float[Array, " n"], numbers: Float[np.ndarray, " P"]) -> float:
    loss, _ = _loss_and_slope(data.family.parameters, numbers, data.differences, data.labels, weights)
    return -float(loss) * float(weights.sum())


@partial(jax.jit, static_argnums=0)
def _log_probabilities(
    parameters: tuple[str, ...], numbers: Float[Array, " P"], differences: Float[Array, "n F"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """log P and log(1 - P) of a family with these parameters."""
    named = dict(zip(parameters, numbers, strict=True))
    if "past_discount" in named:
        factors = jnp.exp(jnp.arange(differences.shape[-1]) * jax.nn.log_sigmoid(named["past_discount"]))
    elif _WEIGHTS[0] in named:
        factors = jnp.stack([named[name] for name in _WEIGHTS])
    else:
        factors = jnp.ones(differences.shape[-1], differences.dtype)
    odds = differences @ factors * jnp.exp(-named.get("temperature", jnp.zeros(())))
    if "lapse" not in named:
        return jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds)
    attentive = jax.nn.log_sigmoid(-named["lapse"])
    lapsed = jax.nn.log_sigmoid(named["lapse"]) - math.log(2.0)
    second = jnp.logaddexp(attentive + jax.nn.log_sigmoid(odds), lapsed)
    return second, jnp.logaddexp(attentive + jax.nn.log_sigmoid(-odds), lapsed)


def _loss(
    parameters: tuple[str, ...],
    numbers: Float[Array, " P"],
    differences: Float[Array, "n F"],
    labels: Float[Array, " n"],
    weights: Float[Array, " n"],
) -> Float[Array, ""]:
    """Minus the log-likelihood per query."""
    second, first = _log_probabilities(parameters, numbers, differences)
    return -jnp.sum(weights * (labels * second + (1.0 - labels) * first)) / jnp.sum(weights)


_loss_and_slope = jax.jit(jax.value_and_grad(_loss, argnums=1), static_argnums=0)
_losses = jax.jit(jax.vmap(_loss, in_axes=(None, 0, None, None, None)), static_argnums=0)


def _paired_interval(differences: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """Mean and Student's 95% interval."""
    mean, count = float(differences.mean()), len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    width = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return mean, mean - width, mean + width


def _second_less_first(segments: Float[np.ndarray, "N 2 F"]) -> Float[np.ndarray, "N F"]:
    return np.asarray(segments[:, 1] - segments[:, 0])


def _given(family: str, values: Values | RowValues | None) -> Values | RowValues:
    if values is None:
        raise ValueError(f"the family {family!r} judges by the values of states; give values.")
    return values


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"there is no family {name!r} of teachers; choose one of {_quoted(FAMILIES)}.")
    return FAMILIES[name]


def _estimate(value: float, low: float, high: float, kind: _Kind) -> Estimate:
    return Estimate(value, low, high, low == kind.limits[0], high == kind.limits[1])


def _read_estimate(written: Any, kind: _Kind) -> Estimate | None:
    """None where something is wrong with it."""
    if not isinstance(written, dict) or set(written) != {"value", "low", "high"}:
        return None
    infinite = {"value": math.inf, "low": -math.inf, "high": math.inf}
    numbers = [infinite[part] if written[part] is None else written[part] for part in ("low", "value", "high")]
    least, most = kind.limits
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        return None
    if not least <= numbers[0] <= numbers[1] <= numbers[2] <= most:
        return None
    low, value, high = map(float, numbers)
    return _estimate(value, low, high, kind)


def _or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _quoted(names: Iterable[str]) -> str:
    quoted = [repr(name) for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
