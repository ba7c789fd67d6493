"""Statistics of evaluations: success rates and returns with intervals, and verdicts between methods.

No number leaves here without its interval, the number of episodes and the number of training seeds behind it.
Scores are arrays `[seeds, episodes]`: row i was scored by the policy of training seed i, column j is its j-th episode.
Where all seeds are evaluated from the same initial states, in the same order, column j is one initial state.

**Means.** `return_interval` and `compare` resample the training seeds and the episodes, both with replacement, and take
percentiles of the resampled means (Owen, "The pigeonhole bootstrap", 2007). Percentiles alone are too narrow with few
seeds: five seeds that differ cover their mean 85% of the time, not 95%. So the distances of both ends from the mean are
rescaled to the standard error of a two-way random-effects model, which is unbiased whether the seeds share their
initial states or not, and to Student's t with Satterthwaite's degrees of freedom.

**Many tasks.** `aggregate_interval` follows Agarwal et al., "Deep reinforcement learning at the edge of the statistical
precipice" (2021): one score per seed, and seeds are resampled inside each task.

**One seed.** The interval of a single training seed speaks of that one policy, not of what training again would give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import special, stats

Scores: TypeAlias = Float[np.ndarray, "seeds episodes"]
Verdict: TypeAlias = Literal["better", "worse", "undecided"]
ClaimVerdict: TypeAlias = Literal["holds", "fails", "undecided"]

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate and where the truth lies with the stated confidence (95% unless asked otherwise).

    `n` counts episodes over all training seeds. The ends are infinite where the data say nothing about the spread.
    """

    mean: float
    low: float
    high: float
    n: int
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """Mean paired difference, ours minus theirs, with its interval and what follows from it.

    `episodes_needed` is `episodes_needed(...)` of the same scores where the verdict is "undecided", otherwise None.
    """

    difference: float
    low: float
    high: float
    n: int
    seeds: int
    verdict: Verdict
    episodes_needed: int | None = None


@dataclass(frozen=True)
class _Spread:
    """How far a mean over seeds and episodes may be from the truth, split by where the variation comes from.

    `between_seeds` is the variance of the mean that further episodes cannot remove, `per_episode` what is divided by
    the number of episodes per seed, `freedom` Satterthwaite's degrees of freedom of the whole.
    """

    variance: float
    between_seeds: float
    per_episode: float
    freedom: float


def success_interval(successes: ArrayLike, *, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a success rate over `[seeds, episodes]` or `[n]` successes (0 or 1).

    All episodes count alike, so it speaks of the success rate of *these* policies. For what another training run
    would reach, give the same array to `return_interval`, which resamples the seeds.
    """
    values = _scores(successes, "successes")
    if not _binary(values):
        raise ValueError("successes must be 0 or 1; give other scores to return_interval")
    proportion = stats.binomtest(int(values.sum()), values.size).proportion_ci(confidence, method="wilson")
    return Interval(float(values.mean()), float(proportion.low), float(proportion.high), values.size, len(values))


def return_interval(
    scores: ArrayLike,
    rng: np.random.Generator,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval:
    """Bootstrap interval of the mean of `[seeds, episodes]` scores; `[episodes]` is taken as one seed.

    Seeds and episodes are both resampled; the module docstring says how the width is set.
    """
    values = _scores(scores, "scores")
    low, high = _mean_interval(values, rng, (0.0, 1.0) if _binary(values) else None, confidence, resamples)
    return Interval(float(values.mean()), low, high, values.size, len(values))


def interquartile_mean(scores: ArrayLike) -> float:
    """Mean of the middle half of all scores: a quarter of them is dropped at either end."""
    return float(stats.trim_mean(np.asarray(scores, dtype=float), 0.25, axis=None))


def aggregate_interval(
    scores: Mapping[str, ArrayLike],
    rng: np.random.Generator,
    *,
    statistic: Literal["mean", "iqm"] = "mean",
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval:
    """Mean or interquartile mean over tasks and seeds, tasks being strata: seeds are resampled inside each task.

    Each seed of a task counts with its mean over episodes. The percentile interval is widened for few seeds by
    Student's t and by sqrt(S / (S - 1)), S being the fewest seeds of any task. With one seed in any task the ends are
    infinite: nothing is known about how much training runs differ there.

    Args:
        scores: task name to `[seeds, episodes]`; tasks may differ in both numbers. Scores of different tasks are
            averaged, so they must share a scale, as success rates or normalised returns do.
    """
    if not scores:
        raise ValueError("there are no tasks to aggregate")
    tables = {task: _scores(values, f"scores of task {task!r}") for task, values in scores.items()}
    runs = [table.mean(axis=1) for table in tables.values()]
    pooled = np.concatenate(runs)
    estimate = interquartile_mean(pooled) if statistic == "iqm" else float(pooled.mean())
    fewest = min(len(run) for run in runs)
    n, seeds = sum(table.size for table in tables.values()), fewest
    bounds = (0.0, 1.0) if all(_binary(table) for table in tables.values()) else None
    if fewest == 1:
        return Interval(estimate, -math.inf, math.inf, n, seeds)
    if np.ptp(pooled) == 0.0:
        return Interval(estimate, *_unvaried(estimate, len(pooled), bounds, confidence), n, seeds)
    drawn = np.concatenate([run[rng.integers(len(run), size=(resamples, len(run)))] for run in runs], axis=1)
    resampled = stats.trim_mean(drawn, 0.25, axis=1) if statistic == "iqm" else drawn.mean(axis=1)
    freedom = len(pooled) - len(runs)
    factor = _student(confidence, freedom) * math.sqrt(fewest / (fewest - 1))
    return Interval(estimate, *_percentiles(resampled, estimate, factor, bounds, confidence), n, seeds)


def probability_of_improvement(
    ours: ArrayLike,
    theirs: ArrayLike,
    rng: np.random.Generator,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval:
    """P(a training run of ours scores above one of theirs), a tie counting half.

    Each seed counts with its mean over episodes; `[seeds]` is taken as one score per seed. The two methods' seeds are
    resampled separately, so they need not be equally many. `seeds` is the smaller number; where one method has a
    single seed the ends are 0 and 1.
    """
    first, second = _runs(ours, "our scores"), _runs(theirs, "their scores")
    wins = (first[:, None] > second) + 0.5 * (first[:, None] == second)
    estimate, seeds = float(wins.mean()), min(wins.shape)
    n = int(np.size(ours) + np.size(theirs))
    if seeds == 1:
        return Interval(estimate, 0.0, 1.0, n, seeds)
    if np.ptp(wins) == 0.0:
        return Interval(estimate, *_unvaried(estimate, seeds, (0.0, 1.0), confidence), n, seeds)
    factor = _student(confidence, seeds - 1) * math.sqrt(seeds / (seeds - 1))
    resampled = _resampled_means(wins, rng, resamples)
    return Interval(estimate, *_percentiles(resampled, estimate, factor, (0.0, 1.0), confidence), n, seeds)


def compare(
    ours: ArrayLike,
    theirs: ArrayLike,
    rng: np.random.Generator,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compares two methods episode by episode; the verdict is "undecided" unless the interval excludes 0.

    Entry (i, j) of both must have started from the same initial state. The seeds and episodes of the paired
    differences are resampled as in `return_interval`. Where every pair gave the same difference, the interval is what
    that many equal pairs allow, so that a handful of episodes never decides.

    Args:
        ours: `[seeds, episodes]` scores, returns or successes; `[episodes]` is taken as one seed.
        theirs: the same shape. A method with a single row (an expert, say) is compared with every row of the other.
    """
    differences, bounds = _paired(ours, theirs)
    low, high = _mean_interval(differences, rng, bounds, confidence, resamples)
    verdict: Verdict = "better" if low > 0 else "worse" if high < 0 else "undecided"
    needed = _needed(differences, confidence) if verdict == "undecided" else None
    return Comparison(float(differences.mean()), low, high, differences.size, len(differences), verdict, needed)


def episodes_needed(ours: ArrayLike, theirs: ArrayLike, *, confidence: float = CONFIDENCE) -> int | None:
    """About how many more episodes, over all present seeds, would decide `compare` at this difference and variance.

    0 where the standard error already decides. None where no number of episodes would: the difference is zero, or the
    seeds differ so much that only more seeds help.
    """
    return _needed(_paired(ours, theirs)[0], confidence)


def claim_verdict(
    estimate: Interval | Comparison, direction: Literal["above", "below"], threshold: float = 0.0
) -> ClaimVerdict:
    """Whether the claim "the true value is above (below) the threshold" holds, fails, or is undecided.

    It holds if the whole interval lies strictly on the claimed side, and fails if it lies strictly on the other.
    """
    above, below = estimate.low > threshold, estimate.high < threshold
    if direction == "below":
        above, below = below, above
    return "holds" if above else "fails" if below else "undecided"


def ranking_scores(scores: ArrayLike, labels: ArrayLike) -> Float[np.ndarray, " decided"]:
    """For every decided pair, 1 if its scores are in the order of its label, 0 if not, and 0.5 if they are equal.

    The mean is the ranking accuracy of what gave the scores (Chen et al. 2024, "Preference learning algorithms do not
    learn preference rankings", arXiv:2405.19534).

    Args:
        scores: `[N, 2]`, higher for the segment that is thought better.
        labels: `[N]`, P(the second is preferred); pairs at exactly 0.5 are ties, and left out.
    """
    table, answers = np.asarray(scores, float), np.asarray(labels, float)
    if table.ndim != 2 or table.shape[1:] != (2,) or answers.shape != table.shape[:1]:
        raise ValueError(f"scores [N, 2] and labels [N] are needed, not {table.shape} and {answers.shape}")
    decided = answers != 0.5
    gaps = (table[:, 1] - table[:, 0])[decided] * np.sign(answers[decided] - 0.5)
    return np.where(gaps == 0, 0.5, gaps > 0).astype(float)


def log_likelihoods(probabilities: ArrayLike, labels: ArrayLike) -> Float[np.ndarray, "*B N"]:
    """label * log p + (1 - label) * log(1 - p): how likely each label was thought to be, 0 being the best.

    Args:
        probabilities: `[*B, N]`, P(the second is preferred) as foretold; leading axes may be training seeds. Taken in
            float64, for a sigmoid in float32 is 1 from logits of 17 on.
        labels: `[N]`, from 0 to 1.

    Raises:
        ValueError: a number does not lie in [0, 1], or what happened was said to be impossible.
    """
    values, answers = np.asarray(probabilities, float), np.asarray(labels, float)
    if answers.ndim != 1 or values.shape[-1:] != answers.shape:
        raise ValueError(f"probabilities [..., N] and labels [N] are needed, not {values.shape} and {answers.shape}")
    for name, given in (("probabilities", values), ("labels", answers)):
        if not ((given >= 0) & (given <= 1)).all():
            raise ValueError(f"{name} must lie between 0 and 1")
    likelihoods = special.xlogy(answers, values) + special.xlog1py(1 - answers, -values)
    if not np.isfinite(likelihoods).all():
        index = int(np.argwhere(~np.isfinite(likelihoods))[0, -1])
        raise ValueError(
            f"a probability of label {index}, {answers[index]}, is exactly 0 or 1 and rules it out; compute "
            "probabilities from logits in float64, or keep them away from 0 and 1"
        )
    return np.asarray(likelihoods)


def intransitivity(
    general: ArrayLike, transitive: ArrayLike, labels: ArrayLike, rng: np.random.Generator
) -> Comparison:
    """Whether held-out labels go in circles: log-likelihood of a general model minus that of a transitive one.

    A general model (such as agents/general_preference.py) can say that each of three segments beats the next; one with
    a score per segment, such as Bradley-Terry's, cannot (Zhang et al. 2024, arXiv:2410.02197). "better" says that the
    scores do not explain the labels. Circles are one reason; another may be that the true score is not of the form that
    the transitive model gives it, such as a sum over steps. The other verdicts do not rule circles out: with more
    freedom, a model also learns more of the noise. Both should have been trained alike. Pairs count as independent: no
    segment should be in many of them.

    Args:
        general: P(the second is preferred) by the general model, `[N]` or `[seeds, N]`.
        transitive: the same by the transitive model.
        labels: `[N]`, of pairs that neither was trained on.
        rng: resamples (see `compare`).
    """
    return compare(log_likelihoods(general, labels), log_likelihoods(transitive, labels), rng)


def attainable_accuracy(probabilities: ArrayLike) -> float:
    """The highest ranking accuracy that anything can expect from labels drawn with these P(the second is preferred).

    Whoever knows the probabilities ranks each pair by the likelier answer: mean of max(p, 1 - p) over the pairs where
    p is not 0.5 (which are labelled as ties).
    """
    values = np.asarray(probabilities, float)
    decided = values[values != 0.5]
    return float(np.mean(np.maximum(decided, 1 - decided)))


def _scores(values: ArrayLike, name: str) -> Scores:
    """`values` as a finite, non-empty float table `[seeds, episodes]`."""
    table = np.asarray(values, dtype=float)
    if table.ndim == 1:
        table = table[None]
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"{name} must be [seeds, episodes] with at least one of each, not shape {np.shape(values)}")
    if not np.isfinite(table).all():
        seed, episode = np.argwhere(~np.isfinite(table))[0]
        raise ValueError(f"{name} hold {table[seed, episode]} at seed {seed}, episode {episode}; every score is needed")
    return table


def _runs(values: ArrayLike, name: str) -> Float[np.ndarray, " seeds"]:
    """One score per seed; a one-dimensional array already is that."""
    table = _scores(np.asarray(values, dtype=float)[:, None] if np.ndim(values) == 1 else values, name)
    return np.asarray(table.mean(axis=1))


def _binary(values: Scores) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _paired(ours: ArrayLike, theirs: ArrayLike) -> tuple[Scores, tuple[float, float] | None]:
    """Paired differences and, for successes, the range that they can take."""
    first, second = _scores(ours, "our scores"), _scores(theirs, "their scores")
    if first.shape[1] != second.shape[1] or (len(first) != len(second) and 1 not in (len(first), len(second))):
        raise ValueError(
            f"cannot pair scores of shape {first.shape} with scores of shape {second.shape}: both need the same "
            "number of episodes per seed, and the same number of seeds unless one of them has a single row"
        )
    return first - second, (-1.0, 1.0) if _binary(first) and _binary(second) else None


def _mean_interval(
    values: Scores,
    rng: np.random.Generator,
    bounds: tuple[float, float] | None,
    confidence: float,
    resamples: int,
) -> tuple[float, float]:
    estimate = float(values.mean())
    if np.ptp(values) == 0.0:
        return _unvaried(estimate, values.size, bounds, confidence)
    spread = _spread(values)
    resampled = _resampled_means(values, rng, resamples)
    factor = _student(confidence, spread.freedom) * math.sqrt(spread.variance) / float(resampled.std())
    return _percentiles(resampled, estimate, factor, bounds, confidence)


def _resampled_means(values: Scores, rng: np.random.Generator, resamples: int) -> Float[np.ndarray, " resamples"]:
    """Means of `values` with rows and columns drawn anew, with replacement, in each of the resamples."""
    rows, columns = values.shape
    row_counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=resamples)
    column_counts = rng.multinomial(columns, np.full(columns, 1 / columns), size=resamples)
    return np.asarray(np.einsum("re,re->r", row_counts @ values, column_counts) / values.size)


def _spread(values: Scores) -> _Spread:
    """Variance of the mean of a table with random rows and columns (two-way analysis of variance).

    With MS the mean squares of rows, columns and residual, (MS_rows + MS_columns - MS_residual) / cells is unbiased
    both for columns shared by all rows and for columns that mean nothing. It is never taken below any of the three,
    so that a lucky draw cannot make the variance smaller than rows, columns or cells alone show.
    """
    rows, columns = values.shape
    row_means, column_means, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
    row_square = columns * float(np.sum((row_means - mean) ** 2)) / max(rows - 1, 1)
    column_square = rows * float(np.sum((column_means - mean) ** 2)) / max(columns - 1, 1)
    residuals = values - row_means[:, None] - column_means + mean
    freedom = (rows - 1) * (columns - 1)
    residual_square = float(np.sum(residuals**2)) / freedom if freedom else 0.0
    noise = min(row_square, column_square, residual_square)
    total = max(row_square + column_square - noise, residual_square)
    squares = ((row_square, rows - 1), (column_square, columns - 1), (residual_square, freedom))
    uncertainty = sum(square**2 / degrees for square, degrees in squares if degrees)
    return _Spread(
        variance=total / values.size,
        between_seeds=(row_square - noise) / values.size,
        per_episode=column_square / rows,
        freedom=total**2 / uncertainty,
    )


def _student(confidence: float, freedom: float) -> float:
    """By what factor wider Student's t is than the normal distribution at this confidence."""
    tail = (1 + confidence) / 2
    return float(stats.t.ppf(tail, freedom) / stats.norm.ppf(tail))


def _percentiles(
    resampled: Float[np.ndarray, " resamples"],
    estimate: float,
    factor: float,
    bounds: tuple[float, float] | None,
    confidence: float,
) -> tuple[float, float]:
    """Percentile interval with both distances from the estimate multiplied by `factor`, inside the bounds."""
    tail = (1 - confidence) / 2
    ends = estimate + factor * (np.quantile(resampled, (tail, 1 - tail)) - estimate)
    low, high = ends if bounds is None else np.clip(ends, *bounds)
    return float(low), float(high)


def _unvaried(value: float, count: int, bounds: tuple[float, float] | None, confidence: float) -> tuple[float, float]:
    """The interval of a mean when all `count` values were equal.

    At least a share q = ((1 - confidence) / 2)^(1 / count) of all values would be the same (Clopper-Pearson); the
    rest may be anything within the bounds. Without bounds the value itself is given from the count on at which a sign
    test would decide, and infinite ends below it.
    """
    share = ((1 - confidence) / 2) ** (1 / count)
    if bounds is not None:
        return share * value + (1 - share) * bounds[0], share * value + (1 - share) * bounds[1]
    return (value, value) if share > 0.5 else (-math.inf, math.inf)


def _needed(differences: Scores, confidence: float) -> int | None:
    seeds, episodes = differences.shape
    difference = abs(float(differences.mean()))
    if difference == 0.0 or np.ptp(differences) == 0.0:
        return None
    spread = _spread(differences)
    quantile = _student(confidence, spread.freedom) * float(stats.norm.ppf((1 + confidence) / 2))
    room = (difference / quantile) ** 2 - spread.between_seeds
    if room <= 0:
        return None
    return int(seeds * max(math.ceil(spread.per_episode / room) - episodes, 0))
