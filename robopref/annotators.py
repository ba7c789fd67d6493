"""Annotators who disagree: groups of them, each with reward weights of its own, found by expectation-maximisation.

After Chakraborty et al. 2024, "MaxMin-RLHF: Alignment with Diverse Human Preferences" (arXiv:2402.08925), who learn a
mixture of reward models from labels of people whose groups nobody knows. With x the features of a query's second
segment, summed over its steps, minus those of its first:

    P(second preferred | group g) = sigmoid(x @ w_g),    P(annotator h belongs to group g) = pi_g

and all labels of one annotator share the group. A label y between 0 and 1 has the likelihood p^y (1 - p)^(1 - y).
Each round computes the probability that each annotator belongs to each group (the responsibilities, kept soft here),
then the w_g that are best under them, by Newton's method, and the pi_g. It climbs the log-likelihood of all labels
minus ridge / 2 * sum_g |w_g|^2, and never falls. Without the ridge no best weights would exist where labels are
noiseless: a reward that separates them could always be larger.

`maximin_policy` in robopref/mdp.py then serves the groups' rewards as evenly as can be.

Axes: N labels, F reward features, H annotators, G groups, R restarts. All numbers are float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike
from scipy.special import expit

from robopref.evaluation import Comparison, Interval, compare, log_likelihoods, return_interval
from robopref.types import Key

_GAIN, _NEWTON_GAIN = 1e-10, 1e-12
"""What a round and a Newton step must gain, relative to what is climbed, to be followed by another."""

_NEWTON_STEPS, _HALVINGS = 50, 30
"""At most; a handful and none are needed, and only rounding could ask for so many."""


@dataclass(frozen=True)
class GroupConfig:
    """How groups are fitted.

    Attributes:
        groups: how many.
        ridge: weight of the penalty ridge / 2 * |w_g|^2; above 0. It is that of a Gaussian prior with variance
            1 / ridge, in the unit of the features.
        restarts: fits that begin differently, of which the best is kept. Each begins with the weights of one annotator
            per group, drawn at random.
        iterations: rounds at most; a fit that climbs no further ends before.

    Raises:
        ValueError: a count is below 1, or the ridge is not above 0.
    """

    groups: int
    ridge: float = 0.1
    restarts: int = 8
    iterations: int = 200

    def __post_init__(self) -> None:
        for name in ("groups", "restarts", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 to fit groups of annotators, not {getattr(self, name)}.")
        if not 0 < self.ridge < np.inf:
            raise ValueError(f"the ridge must be above 0, not {self.ridge}: noiseless labels have no best weights.")


@dataclass(frozen=True, eq=False)
class Groups:
    """A mixture of reward weights, the largest group first.

    Attributes:
        weights: of the reward features, for each group.
        prior: share of annotators in each group.
        responsibilities: probability that each annotator belongs to each group, given the annotator's labels.
        log_likelihood: of all labels together, without the penalty.
        objective: log-likelihood minus penalty, at the start and after each round.
    """

    weights: Float[np.ndarray, "G F"]
    prior: Float[np.ndarray, " G"]
    responsibilities: Float[np.ndarray, "H G"]
    log_likelihood: float
    objective: Float[np.ndarray, " rounds+1"]

    def probabilities(
        self, features: Float[np.ndarray, "N F"], annotators: Int[np.ndarray, " N"]
    ) -> Float[np.ndarray, " N"]:
        """P(second preferred) by these annotators, mean over the groups that they may belong to."""
        by_group = expit(np.asarray(features, np.float64) @ self.weights.T)
        return np.asarray(np.sum(self.responsibilities[annotators] * by_group, axis=1))


@dataclass(frozen=True)
class HeldOut:
    """How well so many groups foretell labels that they were not fitted to. `n` of the intervals counts annotators.

    Attributes:
        groups: how many.
        log_likelihood: per held-out label, mean over annotators of each annotator's own mean.
        gain: this minus that of one group fewer, annotator by annotator; None for a single group.
    """

    groups: int
    log_likelihood: Interval
    gain: Comparison | None


def fit_groups(
    config: GroupConfig,
    features: Float[np.ndarray, "N F"],
    labels: Float[np.ndarray, " N"],
    annotators: Int[np.ndarray, " N"],
    key: Key,
) -> Groups:
    """The groups under which labels of annotators who may disagree are likeliest, less the penalty.

    Args:
        config: how.
        features: sums of the reward features over the second segment minus those over the first.
        labels: P(the second is preferred), from 0 to 1.
        annotators: who gave each label; numbered 0, 1, ... H - 1 without gaps.
        key: decides at which annotators the restarts begin.

    Raises:
        ValueError: the arrays do not fit together, a number is out of range, or there are more groups than annotators.
    """
    data = _checked(config, features, labels, annotators)
    return _fit(config, data, np.full(len(data.labels), True), key)


def held_out_log_likelihood(
    config: GroupConfig,
    features: Float[np.ndarray, "N F"],
    labels: Float[np.ndarray, " N"],
    annotators: Int[np.ndarray, " N"],
    key: Key,
    *,
    folds: int = 5,
) -> tuple[HeldOut, ...]:
    """How well 1, 2, ... `config.groups` groups foretell labels of annotators of whom other labels were seen.

    The labels of each annotator are dealt out to the folds at random. The groups are fitted to all folds but one, which
    also says how likely each annotator belongs to each group; that fold's labels are then foretold. The intervals are
    over annotators (see `robopref.evaluation`). They take annotators as independent, though all are judged by the same
    fits. `robopref.evaluation.claim_verdict(gain, "above")` says whether one group more is better.

    Args:
        config: how; its `groups` are the most that are tried.
        features: sums of the reward features over the second segment minus those over the first.
        labels: P(the second is preferred), from 0 to 1.
        annotators: who gave each label; numbered 0, 1, ... H - 1 without gaps.
        key: deals out the labels, decides where fits begin, and resamples.
        folds: at least 2.

    Raises:
        ValueError: as `fit_groups`, or there are too few folds, or an annotator has a single label.
    """
    data = _checked(config, features, labels, annotators)
    counts = np.bincount(data.annotators)
    if folds < 2:
        raise ValueError(f"labels can be held out with 2 folds or more, not {folds}.")
    if counts.min() < 2:
        raise ValueError(
            f"annotator {counts.argmin()} gave a single label; with it held out none is left to tell the group by. "
            "Leave out annotators with fewer than 2 labels."
        )
    rng = np.random.default_rng(np.ravel(jax.random.key_data(key)))
    fold_of = _deal(data.annotators, folds, rng)
    results: list[HeldOut] = []
    fewer: np.ndarray | None = None
    for groups in range(1, config.groups + 1):
        foretold = np.empty(len(data.labels))
        for fold, fold_key in enumerate(jax.random.split(jax.random.fold_in(key, groups), folds)):
            held = fold_of == fold
            fitted = _fit(replace(config, groups=groups), data, ~held, fold_key)
            foretold[held] = fitted.probabilities(data.features[held], data.annotators[held])
        scores = np.bincount(data.annotators, weights=log_likelihoods(foretold, data.labels)) / counts
        gain = None if fewer is None else compare(scores, fewer, rng)
        results.append(HeldOut(groups, return_interval(scores, rng), gain))
        fewer = scores
    return tuple(results)


class _Labelled(NamedTuple):
    """Who preferred what; `annotators` has every number up to the largest."""

    features: Float[np.ndarray, "N F"]
    labels: Float[np.ndarray, " N"]
    annotators: Int[np.ndarray, " N"]


class _State(NamedTuple):
    """Of a fit under way. `gained` is what the last round added; the last objective fills the rounds to come."""

    rounds: Int[Array, ""]
    weights: Float[Array, "G F"]
    log_prior: Float[Array, " G"]
    responsibilities: Float[Array, "H G"]
    log_likelihood: Float[Array, ""]
    gained: Float[Array, ""]
    objective: Float[Array, " iterations+1"]


def _checked(config: GroupConfig, features: ArrayLike, labels: ArrayLike, annotators: ArrayLike) -> _Labelled:
    data = _Labelled(np.asarray(features, np.float64), np.asarray(labels, np.float64), np.asarray(annotators))
    count = data.labels.shape
    if data.labels.ndim != 1 or not data.labels.size or data.features.ndim != 2:
        raise ValueError(f"features [N, F] and labels [N] are needed, not {data.features.shape} and {count}.")
    if data.features.shape[:1] != count or data.annotators.shape != count:
        raise ValueError(
            f"{len(data.labels)} labels need as many rows of features and as many annotators, not features "
            f"{data.features.shape} and annotators {data.annotators.shape}."
        )
    if not np.isfinite(data.features).all():
        raise ValueError(f"the features of query {np.argwhere(~np.isfinite(data.features))[0, 0]} are not finite.")
    wrong = ~((data.labels >= 0) & (data.labels <= 1))
    if wrong.any():
        raise ValueError(f"label {wrong.argmax()} is {data.labels[wrong][0]}; labels lie between 0 and 1.")
    if data.annotators.dtype.kind not in "iu" or data.annotators.min() < 0:
        raise ValueError("annotators must be whole numbers from 0: their places in a list of all annotators.")
    counts = np.bincount(data.annotators)
    if not counts.all():
        raise ValueError(f"annotator {counts.argmin()} gave no label; number those who did 0, 1, ... without gaps.")
    if len(counts) < config.groups:
        raise ValueError(f"{len(counts)} annotators cannot make {config.groups} groups; ask for fewer groups.")
    return data


def _deal(annotators: Int[np.ndarray, " N"], folds: int, rng: np.random.Generator) -> Int[np.ndarray, " N"]:
    """The fold of each label: those of one annotator are spread as evenly as can be, from a random fold on."""
    fold_of = np.empty(len(annotators), np.int64)
    for annotator in range(annotators.max() + 1):
        own = rng.permutation(np.flatnonzero(annotators == annotator))
        fold_of[own] = (rng.integers(folds) + np.arange(len(own))) % folds
    return fold_of


def _fit(config: GroupConfig, data: _Labelled, seen: Bool[np.ndarray, " N"], key: Key) -> Groups:
    """The best of all restarts, fitted to the labels that are seen; every annotator has one of these."""
    count = int(data.annotators.max()) + 1
    with jax.enable_x64(True):
        keys = jax.random.split(key, config.restarts)
        first = jax.vmap(lambda key: jax.random.choice(key, count, (config.groups,), replace=False))(keys)
        ends = _climb(*data, seen.astype(np.float64), first, config.ridge, count, config.iterations)
        best: _State = jax.tree.map(lambda leaf: leaf[jnp.argmax(ends.objective[:, -1])], ends)
    log_prior = np.asarray(best.log_prior)
    order = np.argsort(-log_prior, kind="stable")
    return Groups(
        weights=np.asarray(best.weights)[order],
        prior=np.exp(log_prior[order]),
        responsibilities=np.asarray(best.responsibilities)[:, order],
        log_likelihood=float(best.log_likelihood),
        objective=np.asarray(best.objective)[: int(best.rounds) + 1],
    )


@partial(jax.jit, static_argnames=("count", "iterations"))
def _climb(
    features: Float[Array, "N F"],
    labels: Float[Array, " N"],
    annotators: Int[Array, " N"],
    seen: Float[Array, " N"],
    first: Int[Array, "R G"],
    ridge: float | Float[Array, ""],
    count: int,
    iterations: int,
) -> _State:
    """Fits from each restart, whose groups begin with the labels of the annotators `first`."""
    groups = first.shape[1]

    def maximise(weights: Array, responsibilities: Array) -> Array:
        shares = seen[:, None] * responsibilities[annotators]
        climb = partial(_logistic_regression, features, labels, ridge=ridge)
        best: Array = jax.vmap(climb, in_axes=(1, 0))(shares, weights)
        return best

    def expect(weights: Array, log_prior: Array) -> tuple[Array, Array, Array]:
        terms = seen[:, None] * _log_likelihood(features @ weights.T, labels[:, None])
        joint = log_prior + jax.ops.segment_sum(terms, annotators, count)
        each = jax.scipy.special.logsumexp(joint, axis=1, keepdims=True)
        log_likelihood = jnp.sum(each)
        penalty = 0.5 * ridge * jnp.sum(jnp.square(weights))
        return jnp.exp(joint - each), log_likelihood, log_likelihood - penalty

    def start(chosen: Array) -> _State:
        weights = maximise(jnp.zeros((groups, features.shape[1])), jax.nn.one_hot(chosen, count, axis=0))
        log_prior = jnp.full(groups, -jnp.log(groups))
        responsibilities, log_likelihood, objective = expect(weights, log_prior)
        history = jnp.full(iterations + 1, objective)
        zero = jnp.zeros((), jnp.int32)
        return _State(zero, weights, log_prior, responsibilities, log_likelihood, jnp.full((), jnp.inf), history)

    def advance(state: _State) -> _State:
        rounds = state.rounds + 1
        weights = maximise(state.weights, state.responsibilities)
        log_prior = jnp.log(jnp.mean(state.responsibilities, axis=0))
        responsibilities, log_likelihood, objective = expect(weights, log_prior)
        gained = objective - state.objective[-1]
        history = jnp.where(jnp.arange(iterations + 1) < rounds, state.objective, objective)
        return _State(rounds, weights, log_prior, responsibilities, log_likelihood, gained, history)

    def unfinished(state: _State) -> Array:
        return (state.gained > _GAIN * (1.0 + jnp.abs(state.objective[-1]))) & (state.rounds < iterations)

    return jax.vmap(lambda chosen: jax.lax.while_loop(unfinished, advance, start(chosen)))(first)


def _logistic_regression(
    features: Float[Array, "N F"],
    labels: Float[Array, " N"],
    shares: Float[Array, " N"],
    weights: Float[Array, " F"],
    ridge: float | Float[Array, ""],
) -> Float[Array, " F"]:
    """Weights with the greatest sum of shares * log-likelihood, less the penalty, by Newton's method from `weights`.

    A step that would lead down is halved until it does not.
    """

    def objective(weights: Array) -> Array:
        terms = shares * _log_likelihood(features @ weights, labels)
        return jnp.sum(terms) - 0.5 * ridge * jnp.sum(jnp.square(weights))

    def advance(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        steps, weights, _ = carry
        probabilities = jax.nn.sigmoid(features @ weights)
        gradient = features.T @ (shares * (labels - probabilities)) - ridge * weights
        curvature = (features.T * (shares * probabilities * (1.0 - probabilities))) @ features
        direction = jnp.linalg.solve(curvature + ridge * jnp.eye(len(weights)), gradient)
        here = objective(weights)

        def down(carry: tuple[Array, Array]) -> Array:
            halvings, length = carry
            return (objective(weights + length * direction) < here) & (halvings < _HALVINGS)

        halvings, length = jax.lax.while_loop(
            down, lambda carry: (carry[0] + 1, carry[1] / 2), (jnp.zeros((), jnp.int32), jnp.ones(()))
        )
        promised = 0.5 * gradient @ direction / (1.0 + jnp.abs(here))
        return steps + 1, jnp.where(halvings < _HALVINGS, weights + length * direction, weights), promised

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        return (carry[2] > _NEWTON_GAIN) & (carry[0] < _NEWTON_STEPS)

    first = (jnp.zeros((), jnp.int32), weights, jnp.full((), jnp.inf))
    best: Array = jax.lax.while_loop(unfinished, advance, first)[1]
    return best


def _log_likelihood(logits: Float[Array, "*B"], labels: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """labels * log p + (1 - labels) * log(1 - p), with p = sigmoid(logits)."""
    return labels * logits - jax.nn.softplus(logits)
