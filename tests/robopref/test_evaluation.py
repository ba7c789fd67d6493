"""Intervals and verdicts: against closed forms, an independent implementation, and their own promise of coverage."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rliable import library, metrics
from scipy import stats

from robopref.evaluation import (
    Comparison,
    Interval,
    aggregate_interval,
    attainable_accuracy,
    claim_verdict,
    compare,
    episodes_needed,
    interquartile_mean,
    intransitivity,
    log_likelihoods,
    probability_of_improvement,
    ranking_scores,
    return_interval,
    success_interval,
)

Z = 1.959963984540054


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (10, 10), (7, 20), (1, 1), (199, 400)])
def test_success_interval_is_wilsons_closed_form(wins: int, n: int) -> None:
    share = wins / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))

    interval = success_interval(np.arange(n) < wins)

    assert interval.mean == pytest.approx(share)
    assert interval.low == pytest.approx(centre - half, abs=1e-9)
    assert interval.high == pytest.approx(centre + half, abs=1e-9)
    assert (interval.n, interval.seeds) == (n, 1)


def test_success_interval_pools_seeds_and_says_how_many() -> None:
    successes = _rng().random((4, 25)) < 0.6

    pooled = success_interval(successes)

    assert (pooled.n, pooled.seeds) == (100, 4)
    assert dataclasses.replace(pooled, seeds=1) == success_interval(successes.ravel())


def test_success_interval_narrows_with_less_confidence() -> None:
    successes = np.array([1, 0, 1, 1, 0])

    assert success_interval(successes, confidence=0.5).low > success_interval(successes).low


@pytest.mark.parametrize("scores", [[0.0, 0.5], [2.0], [-1.0, 1.0]])
def test_success_interval_refuses_what_is_no_success(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="0 or 1"):
        success_interval(np.array(scores))


def test_return_interval_meets_normal_theory_on_one_large_sample() -> None:
    scores = _rng(1).normal(3.0, 2.0, size=4000)

    interval = return_interval(scores, _rng(2))

    half = Z * scores.std(ddof=1) / math.sqrt(len(scores))
    assert interval.mean == pytest.approx(scores.mean())
    assert interval.low == pytest.approx(scores.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(scores.mean() + half, abs=0.05 * half)


def test_return_interval_meets_students_t_where_seeds_are_all_that_varies() -> None:
    runs = _rng(3).normal(size=8)
    scores = np.repeat(runs[:, None], 5, axis=1)

    interval = return_interval(scores, _rng(4), resamples=40_000)

    half = stats.t.ppf(0.975, 7) * runs.std(ddof=1) / math.sqrt(8)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.04)
    assert (interval.n, interval.seeds) == (40, 8)


@pytest.mark.parametrize(
    ("between", "state", "noise"),
    [(1.0, 0.0, 0.1), (1.0, 0.0, 1.0), (0.3, 1.0, 0.3), (0.5, 1.0, 1.0)],
    ids=["seeds differ", "seeds and episodes differ", "shared states differ", "all differ"],
)
@pytest.mark.parametrize("seeds", [4, 10])
def test_return_interval_covers_what_it_promises(seeds: int, between: float, state: float, noise: float) -> None:
    """300 trials at 95%: the standard deviation of the coverage is 1.3%, so 0.91 to 0.99 is three of them."""
    rng, episodes, trials, covered = _rng(5), 20, 300, 0
    for _ in range(trials):
        shared = state * rng.normal(size=(1, episodes))
        scores = between * rng.normal(size=(seeds, 1)) + shared + noise * rng.normal(size=(seeds, episodes))
        interval = return_interval(scores, rng, resamples=500)
        covered += interval.low <= 0.0 <= interval.high

    assert 0.91 <= covered / trials <= 0.99


def test_plain_percentiles_would_not_cover() -> None:
    """The reason for the rescaling: with five seeds that differ, the plain percentile bootstrap covers about 85%."""
    rng, trials, covered = _rng(6), 300, 0
    for _ in range(trials):
        runs = rng.normal(size=5)
        low, high = np.quantile(runs[rng.integers(5, size=(500, 5))].mean(axis=1), (0.025, 0.975))
        covered += low <= 0.0 <= high

    assert covered / trials < 0.90


def test_return_interval_of_one_episode_knows_nothing_of_the_spread() -> None:
    assert return_interval([7.0], _rng()) == Interval(7.0, -math.inf, math.inf, 1, 1)


@pytest.mark.parametrize("n", [1, 3, 6, 50])
def test_all_successes_are_not_certainty(n: int) -> None:
    interval = return_interval(np.ones(n), _rng())

    assert interval.high == 1.0
    assert interval.low == pytest.approx(stats.beta.ppf(0.025, n, 1))


def test_return_interval_does_not_depend_on_the_units() -> None:
    scores = _rng(7).gamma(2.0, size=(5, 12))

    plain, scaled = return_interval(scores, _rng(8)), return_interval(10 * scores - 3, _rng(8))

    assert (scaled.low, scaled.high) == pytest.approx((10 * plain.low - 3, 10 * plain.high - 3))


def test_success_scores_stay_between_zero_and_one() -> None:
    interval = return_interval(np.array([[1, 1, 1, 1], [1, 1, 0, 1]]), _rng())

    assert 0.0 <= interval.low < interval.mean < interval.high <= 1.0


def test_rows_and_columns_that_cancel_still_vary() -> None:
    interval = return_interval([[1.0, -1.0], [-1.0, 1.0]], _rng())

    assert interval.low < -1.0
    assert interval.high > 1.0


def test_the_same_generator_gives_the_same_interval() -> None:
    scores = _rng(9).normal(size=(3, 10))

    assert return_interval(scores, _rng(1)) == return_interval(scores, _rng(1))
    assert return_interval(scores, _rng(1)) != return_interval(scores, _rng(2))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1, 2, 3)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[seeds, episodes\]"):
        return_interval(np.ones(shape), _rng())


def test_a_missing_score_is_named() -> None:
    scores = np.zeros((3, 4))
    scores[1, 2] = np.nan

    with pytest.raises(ValueError, match="nan at seed 1, episode 2"):
        return_interval(scores, _rng())


def test_interquartile_mean_drops_a_quarter_at_either_end() -> None:
    assert interquartile_mean([1000.0, 3.0, 1.0, -1000.0, 4.0, 2.0, 5.0, 6.0]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert interquartile_mean([[1.0, 2.0], [3.0, 100.0]]) == pytest.approx(2.5)


def _aggregate_by_loops(
    tasks: dict[str, np.ndarray], rng: np.random.Generator, resamples: int, trim: float
) -> tuple[float, float, float]:
    """The stratified percentile bootstrap of Agarwal et al., written without any of the library's helpers."""

    def statistic(scores: list[float]) -> float:
        kept = sorted(scores)
        cut = int(trim * len(kept))
        return sum(kept[cut : len(kept) - cut]) / (len(kept) - 2 * cut)

    runs = [[float(np.mean(row)) for row in table] for table in tasks.values()]
    drawn = [
        statistic([run[i] for run in runs for i in rng.integers(len(run), size=len(run))]) for _ in range(resamples)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return statistic([score for run in runs for score in run]), float(low), float(high)


@pytest.mark.parametrize(("name", "trim"), [("mean", 0.0), ("iqm", 0.25)])
def test_aggregate_interval_is_the_stratified_bootstrap_widened_for_few_seeds(name: str, trim: float) -> None:
    rng = _rng(10)
    tasks = {f"task {k}": rng.normal(3 * k, 1 + k, size=(6, 4)) for k in range(4)}

    ours = aggregate_interval(tasks, _rng(11), statistic=name)  # type: ignore[arg-type]
    estimate, low, high = _aggregate_by_loops(tasks, _rng(12), 4000, trim)

    widening = math.sqrt(6 / 5) * stats.t.ppf(0.975, 4 * 5) / Z
    assert ours.mean == pytest.approx(estimate)
    assert ours.mean - ours.low == pytest.approx(widening * (estimate - low), rel=0.06)
    assert ours.high - ours.mean == pytest.approx(widening * (high - estimate), rel=0.06)
    assert (ours.n, ours.seeds) == (4 * 6 * 4, 6)


@pytest.mark.parametrize("name", ["mean", "iqm"])
def test_aggregate_interval_agrees_with_rliable(name: str) -> None:
    runs = _rng(13).normal(size=(60, 5))
    aggregate = {"mean": metrics.aggregate_mean, "iqm": metrics.aggregate_iqm}[name]

    np.random.seed(14)  # rliable draws from NumPy's global generator, whatever it is given
    points, intervals = library.get_interval_estimates(
        {"ours": runs}, lambda scores: np.array([aggregate(scores)]), reps=5000
    )
    ours = aggregate_interval({str(k): runs[:, k, None] for k in range(5)}, _rng(15), statistic=name)  # type: ignore[arg-type]

    width = intervals["ours"][1, 0] - intervals["ours"][0, 0]
    assert ours.mean == pytest.approx(points["ours"][0])
    assert ours.low == pytest.approx(intervals["ours"][0, 0], abs=0.05 * width)
    assert ours.high == pytest.approx(intervals["ours"][1, 0], abs=0.05 * width)


def test_probability_of_improvement_agrees_with_rliable() -> None:
    rng = _rng(16)
    ours, theirs = rng.integers(6, size=30).astype(float), rng.integers(5, size=20).astype(float)

    expected = metrics.probability_of_improvement(ours[:, None], theirs[:, None])

    assert probability_of_improvement(ours, theirs, rng).mean == pytest.approx(expected)


def test_aggregate_interval_of_single_seeds_knows_nothing_of_training() -> None:
    interval = aggregate_interval({"a": np.ones((3, 5)), "b": [[0.2, 0.4]]}, _rng())

    assert interval.mean == pytest.approx((1 + 1 + 1 + 0.3) / 4)
    assert (interval.low, interval.high, interval.seeds) == (-math.inf, math.inf, 1)


def test_aggregate_interval_of_equal_successes_is_not_certainty() -> None:
    interval = aggregate_interval({"a": np.ones((3, 5)), "b": np.ones((4, 5))}, _rng(), statistic="iqm")

    assert (interval.mean, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(0.025 ** (1 / 7))


def test_aggregate_interval_needs_a_task() -> None:
    with pytest.raises(ValueError, match="no tasks"):
        aggregate_interval({}, _rng())


def test_aggregate_interval_names_the_task_that_is_wrong() -> None:
    with pytest.raises(ValueError, match="'door'"):
        aggregate_interval({"reach": np.ones((2, 2)), "door": np.ones((2, 0))}, _rng())


def test_probability_of_improvement_is_the_share_of_pairs_won() -> None:
    ours, theirs = np.array([1.0, 2.0, 5.0]), np.array([1.0, 3.0])

    interval = probability_of_improvement(ours, theirs, _rng())

    assert interval.mean == pytest.approx((0.5 + 0 + 1 + 0 + 1 + 1) / 6)
    assert 0.0 <= interval.low <= interval.mean <= interval.high <= 1.0
    assert (interval.n, interval.seeds) == (5, 2)


def test_probability_of_improvement_covers_what_it_promises() -> None:
    """200 trials at 95%, of a difference of one standard deviation; three standard deviations are 4.6%."""
    rng, truth, trials, covered = _rng(17), float(stats.norm.cdf(1 / math.sqrt(2))), 200, 0
    for _ in range(trials):
        interval = probability_of_improvement(rng.normal(1, 1, 10), rng.normal(0, 1, 10), rng, resamples=500)
        covered += interval.low <= truth <= interval.high

    assert covered / trials >= 0.90


def test_winning_every_pair_of_few_seeds_is_not_certainty() -> None:
    interval = probability_of_improvement([3.0, 4.0, 5.0], [0.0, 1.0, 2.0], _rng())

    assert (interval.mean, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(0.025 ** (1 / 3))


def test_probability_of_improvement_of_one_seed_is_open() -> None:
    assert probability_of_improvement([[1.0, 2.0]], [0.0, 0.0], _rng()) == Interval(1.0, 0.0, 1.0, 4, 1)


def test_compare_sees_through_hard_initial_states_by_pairing() -> None:
    rng = _rng(18)
    difficulty = 50 * rng.normal(size=(1, 40))
    ours = difficulty + 1.0 + rng.normal(size=(4, 40))
    theirs = difficulty + rng.normal(size=(4, 40))

    comparison = compare(ours, theirs, _rng(19))

    assert comparison.verdict == "better"
    assert comparison.difference == pytest.approx((ours - theirs).mean())
    assert comparison.low <= 1.0 <= comparison.high
    assert (comparison.n, comparison.seeds, comparison.episodes_needed) == (160, 4, None)


def test_compare_the_other_way_round_is_the_opposite() -> None:
    rng = _rng(20)
    ours, theirs = rng.normal(1, 1, size=(5, 30)), rng.normal(0, 1, size=(5, 30))

    there, back = compare(ours, theirs, _rng(21)), compare(theirs, ours, _rng(21))

    assert (there.verdict, back.verdict) == ("better", "worse")
    assert (back.difference, back.low, back.high) == pytest.approx((-there.difference, -there.high, -there.low))


def test_compare_with_itself_is_undecided() -> None:
    scores = _rng(22).random((3, 50)) < 0.7

    comparison = compare(scores, scores, _rng())

    assert comparison.verdict == "undecided"
    assert comparison.low < 0.0 < comparison.high
    assert comparison.episodes_needed is None


def test_equal_returns_are_no_difference() -> None:
    scores = _rng(22).normal(size=(2, 10))

    comparison = compare(scores, scores, _rng())

    assert (comparison.low, comparison.high, comparison.verdict) == (0.0, 0.0, "undecided")


def test_compare_rarely_sees_a_difference_where_there_is_none() -> None:
    """Equal methods, seeds that differ: at 95% a verdict in 5% of 300 trials; 9% is three standard deviations more."""
    rng, trials, wrong = _rng(23), 300, 0
    for _ in range(trials):
        ours, theirs = (rng.random((5, 20)) < rng.uniform(0.2, 0.9, size=(5, 1)) for _ in range(2))
        wrong += compare(ours, theirs, rng, resamples=500).verdict != "undecided"

    assert wrong / trials <= 0.09


def test_compare_with_one_expert_on_the_same_states() -> None:
    rng = _rng(24)
    ours, expert = rng.normal(0, 1, size=(6, 30)), rng.normal(2, 1, size=30)

    comparison = compare(ours, expert, _rng(25))

    assert comparison.verdict == "worse"
    assert comparison.seeds == 6
    assert comparison == compare(ours, np.tile(expert, (6, 1)), _rng(25))
    assert compare(expert, ours, _rng(25)).verdict == "better"


def test_the_luck_of_a_shared_expert_does_not_average_out_over_seeds() -> None:
    """Ten identical seeds against one expert on 30 states are 30 comparisons, not 300."""
    expert = _rng(26).normal(size=30)

    comparison = compare(np.zeros((10, 30)), expert, _rng(27))

    half = stats.t.ppf(0.975, 29) * expert.std(ddof=1) / math.sqrt(30)
    assert comparison.high - comparison.low == pytest.approx(2 * half, rel=0.1)


@pytest.mark.parametrize(("pairs", "verdict"), [(1, "undecided"), (5, "undecided"), (6, "better"), (50, "better")])
def test_equal_pairs_decide_once_a_sign_test_would(pairs: int, verdict: str) -> None:
    assert (2 * 0.5**pairs < 0.05) == (verdict == "better")
    assert compare(np.ones(pairs), np.zeros(pairs), _rng()).verdict == verdict
    assert compare(np.full(pairs, 9.5), np.full(pairs, 2.0), _rng()).verdict == verdict


@pytest.mark.parametrize(("ours", "theirs"), [((3, 10), (3, 9)), ((3, 10), (2, 10)), ((10,), (9,)), ((3, 10), (10, 3))])
def test_scores_that_cannot_be_paired_are_refused(ours: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot pair scores of shape"):
        compare(np.ones(ours), np.zeros(theirs), _rng())


def test_episodes_needed_inverts_the_standard_error() -> None:
    """With one seed the interval is d -+ t s / sqrt(E), which excludes 0 from E = (t s / d)^2 on."""
    differences = _rng(28).normal(0.1, 1.0, size=50)
    t = stats.t.ppf(0.975, 49)

    expected = math.ceil((t * differences.std(ddof=1) / differences.mean()) ** 2) - 50

    assert episodes_needed(differences, np.zeros(50)) == expected > 0
    assert compare(differences, np.zeros(50), _rng()).episodes_needed == expected


def test_episodes_needed_is_enough_when_they_come() -> None:
    pattern = np.tile([1.0, -0.8], (3, 10))
    more = episodes_needed(pattern, np.zeros((3, 20)))
    assert more is not None
    assert more % 3 == 0
    repeats = math.ceil((20 + more / 3) / 20)

    assert compare(np.tile(pattern, repeats), np.zeros((3, 20 * repeats)), _rng(29)).verdict == "better"
    assert compare(pattern, np.zeros((3, 20)), _rng(29)).verdict == "undecided"


def test_episodes_needed_is_none_where_only_seeds_help() -> None:
    seeds_that_disagree = np.repeat([[3.0], [-2.0]], 20, axis=1) + 0.1 * _rng(30).normal(size=(2, 20))

    assert episodes_needed(seeds_that_disagree, np.zeros((2, 20))) is None


def test_episodes_needed_is_zero_once_decided() -> None:
    assert episodes_needed(_rng(31).normal(5, 1, size=(3, 20)), np.zeros((3, 20))) == 0


@pytest.mark.parametrize(
    ("low", "high", "direction", "threshold", "verdict"),
    [
        (0.1, 0.3, "above", 0.0, "holds"),
        (-0.3, -0.1, "above", 0.0, "fails"),
        (-0.1, 0.3, "above", 0.0, "undecided"),
        (0.0, 0.3, "above", 0.0, "undecided"),
        (0.1, 0.3, "below", 0.0, "fails"),
        (0.1, 0.3, "below", 0.5, "holds"),
        (0.1, 0.5, "below", 0.5, "undecided"),
        (-math.inf, math.inf, "above", 0.0, "undecided"),
    ],
)
def test_claim_verdict(low: float, high: float, direction: str, threshold: float, verdict: str) -> None:
    middle = 0.2
    assert claim_verdict(Interval(middle, low, high, 10, 1), direction, threshold) == verdict  # type: ignore[arg-type]
    comparison = Comparison(middle, low, high, 10, 1, "undecided")
    assert claim_verdict(comparison, direction, threshold) == verdict  # type: ignore[arg-type]


@given(
    st.integers(1, 5).flatmap(
        lambda width: st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * width), min_size=1, max_size=4)
    )
)
def test_any_scores_give_an_interval_that_is_in_order(scores: list[tuple[float, ...]]) -> None:
    interval = return_interval(scores, _rng(), resamples=100)

    assert not any(math.isnan(value) for value in (interval.mean, interval.low, interval.high))
    assert interval.low <= interval.high


def test_ranking_scores_of_pairs_by_hand() -> None:
    scores = [(1, 2), (1, 2), (2, 1), (3, 3), (5, 0), (0, 1)]
    labels = [1.0, 0.0, 0.2, 1.0, 0.5, 0.51]
    np.testing.assert_array_equal(ranking_scores(scores, labels), [1, 0, 1, 0.5, 1])


@given(st.integers(0, 2**31))
def test_ranking_scores_do_not_care_which_segment_comes_first(seed: int) -> None:
    rng = _rng(seed)
    scores, labels = rng.integers(0, 3, (20, 2)), rng.choice([0, 0.3, 0.5, 1], 20)
    once, swapped = ranking_scores(scores, labels), ranking_scores(scores[:, ::-1], 1 - labels)
    np.testing.assert_array_equal(once, swapped)
    np.testing.assert_array_equal(once + ranking_scores(-scores, labels), np.ones(len(once)))


def test_ranking_scores_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores \[N, 2\] and labels \[N\] are needed"):
        ranking_scores([[1, 2, 3]], [1])


def test_nothing_ranks_drawn_labels_better_than_their_probabilities() -> None:
    """The mean of max(p, 1 - p); who knows p reaches it, and who ranks some pair otherwise stays below."""
    probabilities = np.array([0.9, 0.2, 0.6, 0.5])
    assert attainable_accuracy(probabilities) == pytest.approx((0.9 + 0.8 + 0.6) / 3)
    drawn = (_rng().random((20_000, 3)) < probabilities[:3]).astype(float)
    for order, expected in (([1, -1, 1], (0.9 + 0.8 + 0.6) / 3), ([1, 1, 1], (0.9 + 0.2 + 0.6) / 3)):
        scores = np.stack([np.zeros(3), order], axis=1)
        reached = np.mean([ranking_scores(scores, labels) for labels in drawn])
        assert reached == pytest.approx(expected, abs=0.01)
        assert reached <= attainable_accuracy(probabilities) + 0.01


def test_log_likelihoods_by_hand() -> None:
    found = log_likelihoods([[0.9, 0.9, 0.3, 1.0], [0.5, 0.5, 0.5, 0.5]], [1.0, 0.0, 0.25, 1.0])
    mixed = 0.25 * math.log(0.3) + 0.75 * math.log(0.7)
    np.testing.assert_allclose(found, [[math.log(0.9), math.log(0.1), mixed, 0.0], [-math.log(2)] * 4])


@given(st.floats(0.01, 0.99), st.floats(0, 1))
def test_no_probability_makes_a_label_likelier_than_itself(probability: float, label: float) -> None:
    found = log_likelihoods([probability], [label])
    np.testing.assert_allclose(found, log_likelihoods([1 - probability], [1 - label]), atol=1e-12)
    assert found[0] <= log_likelihoods([label], [label])[0] + 1e-12


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([0.5, 0.5], [1.0], "labels \\[N\\] are needed"),
        ([1.2], [1.0], "probabilities must lie"),
        ([math.nan], [1.0], "probabilities must lie"),
        ([0.5], [-0.1], "labels must lie"),
        ([[0.5, 1.0]], [1.0, 0.0], "label 1, 0.0, is exactly 0 or 1 and rules it out"),
        ([0.0, 1.0], [0.5, 1.0], "label 0, 0.5"),
    ],
)
def test_likelihoods_that_make_no_sense_are_refused(probabilities: object, labels: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_likelihoods(probabilities, labels)  # type: ignore[arg-type]


def test_intransitivity_is_the_paired_difference_of_log_likelihoods() -> None:
    """Of labels that go in circles, who knows that against who can only say one half."""
    labels = (_rng().random(300) < 0.9).astype(float)
    found = intransitivity(np.full(300, 0.9), np.full(300, 0.5), labels, _rng())
    share = labels.mean()
    expected = share * math.log(0.9) + (1 - share) * math.log(0.1) + math.log(2)
    assert found.difference == pytest.approx(expected)
    assert (found.verdict, found.n, found.seeds) == ("better", 300, 1)
    swapped = intransitivity(np.full(300, 0.5), np.full((2, 300), 0.9), labels, _rng())
    assert swapped.difference == pytest.approx(-expected)
    assert (swapped.verdict, swapped.n, swapped.seeds) == ("worse", 600, 2)
