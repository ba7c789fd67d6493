"""Fitted teachers against the teachers that gave the labels, plain NumPy, brute force and their own files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from labelers.calibration import (
    FAMILIES,
    TeacherComparison,
    calibration_bins,
    compare_teachers,
    fit_teacher,
    fold_indices,
    load_teacher,
    read_values,
    save_teacher,
)
from labelers.regret import LogisticTeacher
from labelers.teachers import Teacher
from robopref.episodes import EpisodeDataset
from robopref.queries import Labels, Queries, draw_queries, pair_segments

LENGTH, DISCOUNT = 6, 0.9


@cache
def made_up() -> EpisodeDataset:
    """Forty episodes of 9 to 14 steps with random rewards; the observation is the value of the state."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(9, 15, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    rewards = rng.normal(size=offsets[-1])
    rewards[offsets[1:] - 1] = 0.0
    terminated = rng.random(len(lengths)) < 0.5
    box = gymnasium.spaces.Box(-1.0, 1.0, (1,))
    return EpisodeDataset(
        path=Path("made-up"),
        hash="0123456789abcdef" * 4,
        env={},
        description="",
        keys={"observation": 1},
        splits={},
        observation_space=box,
        action_space=box,
        observations=rng.normal(scale=2.0, size=(offsets[-1], 1)),
        actions=np.zeros((offsets[-1], 1)),
        rewards=rewards,
        offsets=offsets,
        lengths=lengths,
        terminated=terminated,
        truncated=~terminated,
        successes=terminated,
        returns=np.add.reduceat(rewards, offsets[:-1]),
        seeds=np.arange(len(lengths)),
        origins=({},) * len(lengths),
        state_size=0,
    )


def values_of(observations: np.ndarray) -> np.ndarray:
    return observations[:, 0]


VALUES = made_up().observations[:, 0]

TRUTH: dict[str, dict[str, float]] = {
    "coin": {},
    "partial return": {"temperature": 1.5, "lapse": 0.1},
    "myopic partial return": {"temperature": 0.8, "past_discount": 0.6, "lapse": 0.1},
    "regret": {"temperature": 2.0, "lapse": 0.1},
    "start, end and partial return": {
        "partial_return_weight": 0.8,
        "start_value_weight": -0.3,
        "end_value_weight": 0.9,
        "lapse": 0.1,
    },
}


def true_teacher(family: str, *, soft: bool = False) -> Teacher | LogisticTeacher:
    return {
        "coin": Teacher(temperature=1.0, mistake=0.5, soft=soft),
        "partial return": Teacher(temperature=1.5, mistake=0.05, soft=soft),
        "myopic partial return": Teacher(temperature=0.8, discount=0.6, mistake=0.05, soft=soft),
        "regret": LogisticTeacher(values_of, DISCOUNT, temperature=2.0, lapse=0.1, soft=soft),
        "start, end and partial return": LogisticTeacher(values_of, DISCOUNT, 0.8, -0.3, 0.9, lapse=0.1, soft=soft),
    }[family]


def pairs(count: int, seed: int = 0) -> Queries:
    return draw_queries(made_up(), np.random.default_rng(seed), count=count, length=LENGTH)


def labels_of(values: Any, answered: Any = None) -> Labels:
    values = np.asarray(values, float)
    answered = np.full(len(values), True) if answered is None else np.asarray(answered)
    return Labels(values=np.where(answered, values, np.nan), answered=answered, labeler="somebody")


def plain_probabilities(family: str, parameters: Mapping[str, float], queries: Queries) -> np.ndarray:
    """P(the second is preferred), query by query and step by step."""
    dataset, found = queries.dataset, []
    for episodes, starts in zip(queries.episodes, queries.starts, strict=True):
        scores = []
        for episode, start in zip(episodes, starts, strict=True):
            row, length = dataset.offsets[episode] + start, queries.length
            rewards = dataset.rewards[row : row + length]
            at_end = start + length == dataset.lengths[episode]
            end_value = 0.0 if at_end and dataset.terminated[episode] else dataset.observations[row + length, 0]
            earned = sum(DISCOUNT**t * rewards[t] for t in range(length))
            parts = np.array([earned, dataset.observations[row, 0], DISCOUNT**length * end_value])
            if family == "coin":
                scores.append(0.0)
            elif family == "partial return":
                scores.append(sum(rewards))
            elif family == "myopic partial return":
                past = parameters["past_discount"]
                scores.append(sum(past ** (length - 1 - t) * rewards[t] for t in range(length)))
            elif family == "regret":
                scores.append(parts @ [1.0, -1.0, 1.0])
            else:
                names = ("partial_return_weight", "start_value_weight", "end_value_weight")
                scores.append(parts @ [parameters[name] for name in names])
        odds = (scores[1] - scores[0]) / parameters.get("temperature", 1.0)
        lapse = parameters.get("lapse", 0.0)
        found.append((1 - lapse) / (1 + math.exp(-odds)) + lapse / 2)
    return np.array(found)


def plain_log_likelihood(labels: np.ndarray, probabilities: np.ndarray) -> float:
    return float(np.sum(labels * np.log(probabilities) + (1 - labels) * np.log(1 - probabilities)))


@cache
def comparison(family: str) -> TeacherComparison:
    """Of all families, by 1,000 labels that one of them gave."""
    queries = pairs(1000)
    labels = true_teacher(family).label(queries, jax.random.key(4))
    return compare_teachers(queries, labels, values=VALUES, discount=DISCOUNT, folds=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_likelihood_is_that_of_plain_numpy_and_at_its_maximum(family: str) -> None:
    queries, rng = pairs(1100), np.random.default_rng(1)
    answered = rng.permutation(1100) < 1000
    # Draws, ties, soft labels and queries without an answer.
    values = true_teacher(family).label(queries, jax.random.key(1)).values.copy()
    values[:50], values[50:100] = 0.5, rng.random(50)
    fitted = fit_teacher(queries, labels_of(values, answered), family, values=VALUES, discount=DISCOUNT)
    assert (fitted.n, fitted.labeler, fitted.dataset_hash) == (answered.sum(), "somebody", made_up().hash)
    found = {name: estimate.value for name, estimate in fitted.parameters.items()}
    assert found.keys() == TRUTH[family].keys()

    def likelihood(parameters: dict[str, float]) -> float:
        return plain_log_likelihood(values[answered], plain_probabilities(family, parameters, queries.take(answered)))

    assert fitted.log_likelihood == pytest.approx(likelihood(found), abs=1e-6)
    for name in found:
        for factor in (0.97, 1.03):
            assert likelihood({**found, name: factor * found[name]}) < fitted.log_likelihood
    given = VALUES if FAMILIES[family].needs_values else None
    np.testing.assert_allclose(
        fitted.probabilities(queries, given), plain_probabilities(family, found, queries), atol=1e-12
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_soft_labels_give_their_teacher_back(family: str) -> None:
    queries = pairs(1000)
    labels = true_teacher(family, soft=True).label(queries, jax.random.key(0))
    fitted = fit_teacher(queries, labels, family, values=values_of, discount=DISCOUNT)
    found = {name: estimate.value for name, estimate in fitted.parameters.items()}
    assert found == pytest.approx(TRUTH[family], rel=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_is_recovered_from_its_own_labels(family: str) -> None:
    candidates = {each.fitted.family: each for each in comparison(family).candidates}
    for name, truth in TRUTH[family].items():
        estimate = candidates[family].fitted.parameters[name]
        assert estimate.low <= truth <= estimate.high, name
        assert estimate.low <= estimate.value <= estimate.high
        assert not estimate.open_high
        assert estimate.high - estimate.low < max(truth, 0.5), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_that_gave_the_labels_is_supported(family: str) -> None:
    compared = comparison(family)
    supported = {each.fitted.family for each in compared.candidates if each.supported}
    assert family in supported
    assert compared.left_out == ()
    # None but itself and those that contain it.
    contained = {
        "coin": set(FAMILIES),
        "partial return": {"myopic partial return"},
        "regret": {"start, end and partial return"},
    }
    assert supported <= {family} | contained.get(family, set())
    assert all(f"'{each}'" in compared.conclusion for each in FAMILIES)
    held_out = [each.fitted.held_out for each in compared.candidates]
    assert held_out == sorted(held_out, reverse=True)
    assert compared.best.difference == compared.best.low == compared.best.high == 0


def test_held_out_predictions_come_from_the_other_folds() -> None:
    queries = pairs(1000)
    compared = comparison("partial return")
    folds, _ = fold_indices(queries, 4, np.random.default_rng(0))
    held_in = np.flatnonzero(folds != 2)
    fitted = fit_teacher(queries.take(held_in), labels_of(compared.labels[held_in]), "partial return")
    chance = 1 / (len(held_in) + 2)
    expected = (1 - chance) * fitted.probabilities(queries.take(folds == 2)) + chance / 2
    candidates = {each.fitted.family: each for each in compared.candidates}
    found = candidates["partial return"]
    np.testing.assert_allclose(found.probabilities[folds == 2], expected, atol=1e-5)
    each_query = {
        name: compared.labels * np.log(one.probabilities) + (1 - compared.labels) * np.log(1 - one.probabilities)
        for name, one in candidates.items()
    }
    assert found.fitted.held_out == pytest.approx(each_query["partial return"].mean(), abs=1e-12)
    gaps = each_query["coin"] - each_query[compared.best.fitted.family]
    interval = stats.ttest_1samp(gaps, 0.0).confidence_interval(0.95)
    assert (candidates["coin"].low, candidates["coin"].high) == pytest.approx((interval.low, interval.high))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    queries, trials = pairs(250), 60
    truth = TRUTH["partial return"]
    covered = dict.fromkeys(truth, 0)
    widths = []
    for trial in range(trials):
        labels = true_teacher("partial return").label(queries, jax.random.key(100 + trial))
        found = fit_teacher(queries, labels, "partial return").parameters
        for name, value in truth.items():
            covered[name] += found[name].low <= value <= found[name].high
        widths.append(math.log(found["temperature"].high / max(found["temperature"].low, 1e-9)))
    # Rarer than once in a thousand for an interval that covers with its probability.
    least = stats.binom.ppf(1e-3, trials, 0.95)
    assert min(covered.values()) >= least
    assert np.median(widths) < 1.5


def test_an_interval_is_that_of_a_brute_force_profile() -> None:
    queries = pairs(250)
    labels = true_teacher("partial return").label(queries, jax.random.key(5))
    fitted = fit_teacher(queries, labels, "partial return")
    gap = np.subtract(*queries.partial_returns.T[::-1])
    temperatures, lapses = np.geomspace(0.1, 20.0, 600), np.linspace(0.0, 0.9, 400)
    signed = np.where(labels.values == 1, gap, -gap)
    attentive = 1 / (1 + np.exp(-signed / temperatures[:, None]))
    table = np.stack([np.log((1 - c) * attentive + c / 2).sum(axis=1) for c in lapses], axis=1)
    for name, axis, numbers in (("temperature", 1, temperatures), ("lapse", 0, lapses)):
        profile = table.max(axis=axis)
        inside = numbers[profile > table.max() - stats.chi2.ppf(0.95, 1) / 2]
        estimate = fitted.parameters[name]
        step = inside.max() * (numbers[1] / numbers[0] - 1) if name == "temperature" else numbers[1]
        assert (estimate.low, estimate.high) == pytest.approx((inside.min(), inside.max()), abs=1.5 * step)
    assert fitted.log_likelihood == pytest.approx(table.max(), abs=0.01)


def test_labels_without_noise_have_no_lower_bound_of_temperature() -> None:
    queries = pairs(250)
    oracle = Teacher().label(queries, jax.random.key(0))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        fitted = fit_teacher(queries, oracle, "partial return")
    temperature, lapse = fitted.parameters["temperature"], fitted.parameters["lapse"]
    assert (temperature.value, temperature.low, temperature.open_low, temperature.open_high) == (0.0, 0.0, True, False)
    assert 0 < temperature.high < 1
    assert str(temperature) == f"0 (at most {temperature.high:.3g})"
    # Without a lapse in n answers, the likelihood (1 - c / 2)^n falls to e^-1.92 at c = 2 (1 - e^(-1.92 / n)).
    most = 2 * (1 - math.exp(-stats.chi2.ppf(0.95, 1) / 2 / 250))
    assert (lapse.value, lapse.low, lapse.high) == (0.0, 0.0, pytest.approx(most, rel=1e-3))
    assert fitted.log_likelihood == pytest.approx(0.0, abs=1e-6)
    again = fitted.teacher().label(queries, jax.random.key(1))
    np.testing.assert_array_equal(again.values, oracle.values)


def test_weights_without_noise_are_unbounded() -> None:
    queries = pairs(250)
    labels = LogisticTeacher(VALUES, DISCOUNT, temperature=0.0).label(queries, jax.random.key(0))
    fitted = fit_teacher(queries, labels, "start, end and partial return", values=VALUES, discount=DISCOUNT)
    found = fitted.parameters
    assert found["partial_return_weight"].high == found["end_value_weight"].high == math.inf
    assert found["start_value_weight"].low == -math.inf
    assert 0 < found["partial_return_weight"].low < found["partial_return_weight"].value < math.inf
    assert found["partial_return_weight"].open_high
    assert fitted.log_likelihood == pytest.approx(0.0, abs=1e-3)


def test_labels_against_the_returns_leave_a_coin(tmp_path: Path) -> None:
    queries = pairs(250)
    reversed_labels = labels_of(1 - Teacher().label(queries, jax.random.key(0)).values)
    fitted = fit_teacher(queries, reversed_labels, "partial return")
    assert fitted.parameters["temperature"].value == math.inf
    assert fitted.log_likelihood == pytest.approx(250 * math.log(0.5), abs=1e-3)
    np.testing.assert_allclose(fitted.probabilities(queries), 0.5)
    save_teacher(tmp_path / "coin.json", fitted)
    assert json.loads((tmp_path / "coin.json").read_text())["parameters"]["temperature"]["value"] is None
    assert load_teacher(tmp_path / "coin.json") == fitted


def test_few_labels_say_that_they_are_too_few() -> None:
    queries = pairs(10)
    labels = true_teacher("partial return").label(queries, jax.random.key(0))
    compared = compare_teachers(queries, labels, families=["coin", "partial return", "regret"], folds=5)
    assert compared.left_out == ("regret",)
    assert "do not tell" in compared.conclusion
    assert "more labels are needed" in compared.conclusion


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_teacher_answers_like_the_fitted_one(family: str, tmp_path: Path) -> None:
    fitted = next(each.fitted for each in comparison(family).candidates if each.fitted.family == family)
    save_teacher(tmp_path / "teacher.json", fitted)
    read = load_teacher(tmp_path / "teacher.json")
    assert read == fitted
    queries = pairs(50, seed=1)
    for soft in (True, False):
        ours, theirs = (each.teacher(values_of, soft=soft).label(queries, jax.random.key(2)) for each in (fitted, read))
        np.testing.assert_array_equal(ours.values, theirs.values)
        assert ours.parameters == theirs.parameters
        assert ours.labeler == f"fitted {family}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version 1"),
        ({"family": "astrology"}, "family is one of 'coin', 'partial return'"),
        ({"family": "coin"}, "the parameters of 'coin' are none"),
        ({"family": ["coin"]}, "family is one of"),
        ({"parameters": {"lapse": {"value": 0.1, "low": 0, "high": 0.2}}}, "'temperature' and 'lapse'"),
        ({"discount": 1.5}, "discount lies between"),
        ({"n": 0}, "n counts"),
        ({"n": True}, "n counts"),
        ({"log_likelihood": 1.0}, "log_likelihood"),
        ({"held_out": "much"}, "held_out"),
        ({"dataset_hash": None}, "dataset_hash"),
        ({"labeler": 7}, "labeler"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "teacher.json"
    save_teacher(path, next(e.fitted for e in comparison("coin").candidates if e.fitted.family == "partial return"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=rf"teacher\.json is not a fitted teacher: .*{message}"):
        load_teacher(path)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
numbers = st.sampled_from([None, -1, 0, 0.3, 1, 2.0, "x"])
estimates = st.fixed_dictionaries({"value": numbers, "low": numbers, "high": numbers}) | anything


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=st.fixed_dictionaries({"temperature": estimates, "lapse": estimates}) | anything, n=anything)
def test_whatever_is_read_makes_a_teacher_or_one_clear_error(written: Any, n: Any, tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    known = {"schema_version": 1, "family": "partial return", "discount": 1, "log_likelihood": -1, "held_out": None}
    path.write_text(json.dumps({**known, "dataset_hash": "", "labeler": "", "parameters": written, "n": n}))
    try:
        fitted = load_teacher(path)
    except ValueError as error:
        message = str(error)
    else:
        message = "any.json is not needed"
        for estimate, most in zip(fitted.parameters.values(), (math.inf, 1.0), strict=True):
            assert 0 <= estimate.low <= estimate.value <= estimate.high <= most
        assert fitted.teacher().label(pairs(2), jax.random.key(0)).answered.all()
    assert "any.json is not" in message


def linked(queries: Queries) -> list[tuple[int, int]]:
    shown = [{*zip(e, s, strict=True)} for e, s in zip(queries.episodes.tolist(), queries.starts.tolist(), strict=True)]
    return [(i, j) for i in range(len(shown)) for j in range(i) if shown[i] & shown[j]]


def test_queries_that_share_a_segment_are_in_one_fold() -> None:
    # Chains of three queries: a with b, b with c, c with d.
    segments = np.stack([np.repeat(np.arange(40), 4), np.tile(np.arange(4), 40)])[:, :80].reshape(2, 20, 4)
    chain = [segments[:, :, [k, k + 1]] for k in range(3)]
    queries = Queries(made_up(), *np.concatenate(chain, axis=1), LENGTH)
    folds, split_up = fold_indices(queries, 5, np.random.default_rng(0))
    assert split_up == 0
    assert len(linked(queries)) == 40
    assert all(folds[i] == folds[j] for i, j in linked(queries))
    assert np.bincount(folds).tolist() == [12] * 5
    again, _ = fold_indices(queries, 5, np.random.default_rng(0))
    other, _ = fold_indices(queries, 5, np.random.default_rng(1))
    np.testing.assert_array_equal(folds, again)
    assert (folds != other).any()


def test_queries_that_are_all_linked_are_dealt_out_one_by_one() -> None:
    queries = pair_segments(made_up(), np.arange(8), np.zeros(8, int), length=LENGTH, pairing="dense")
    folds, split_up = fold_indices(queries, 5, np.random.default_rng(0))
    assert split_up == 1
    assert sorted(np.bincount(folds).tolist()) == [5, 5, 6, 6, 6]


def test_bins_say_what_was_predicted_and_what_was_answered() -> None:
    probabilities, labels = np.array([0.05, 0.15, 0.5, 0.9, 1.0]), np.array([0.0, 1.0, 0.5, 1.0, 0.0])
    bins = calibration_bins(probabilities, labels)
    assert [tuple(each) for each in bins] == [
        (pytest.approx(0.1), 0.5, 2),
        (0.5, 0.5, 1),
        (pytest.approx(0.95), 0.5, 2),
    ]


def test_what_cannot_be_fitted_is_said() -> None:
    queries = pairs(20)
    labels = Teacher().label(queries, jax.random.key(0))
    with pytest.raises(ValueError, match="no family 'regrets'"):
        fit_teacher(queries, labels, "regrets")
    with pytest.raises(ValueError, match="'regret' judges by the values of states"):
        fit_teacher(queries, labels, "regret")
    with pytest.raises(ValueError, match="one number per observation"):
        fit_teacher(queries, labels, "regret", values=VALUES[:-1])
    with pytest.raises(ValueError, match="discount"):
        fit_teacher(queries, labels, "coin", discount=1.1)
    with pytest.raises(ValueError, match="none of the 20 queries is answered"):
        fit_teacher(queries, labels_of(np.zeros(20), np.full(20, False)), "coin")
    with pytest.raises(ValueError, match="labels cannot answer"):
        fit_teacher(queries, labels_of(np.zeros(3)), "coin")
    with pytest.raises(ValueError, match="no family to compare"):
        compare_teachers(queries, labels, families=["regret"])
    with pytest.raises(ValueError, match="21 folds need at least as many"):
        compare_teachers(queries, labels, families=["coin"], folds=21)
    with pytest.raises(ValueError, match="at least 2 folds"):
        compare_teachers(queries, labels, families=["coin"], folds=1)
    threes = draw_queries(made_up(), np.random.default_rng(0), count=5, length=LENGTH, candidates=3)
    with pytest.raises(ValueError, match="orders of 3 segments"):
        fit_teacher(threes, Teacher().label(threes, jax.random.key(0)), "coin")


def test_values_are_one_finite_number_for_each_row(tmp_path: Path) -> None:
    path, dataset = tmp_path / "values.npy", made_up()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_values(path, dataset)
    np.save(path, VALUES.astype(np.float32))
    np.testing.assert_array_equal(read_values(path, dataset), VALUES.astype(np.float32))
    rows = len(VALUES)
    for wrong, message in [
        (VALUES[:-1], rf"shape \[{rows - 1}\], but made-up needs \[{rows}\]"),
        (VALUES[:, None], rf"shape \[{rows}, 1\]"),
        (np.where(np.arange(rows) == 7, np.nan, VALUES), "not finite at row 7"),
        (VALUES.astype(str), "no array of real numbers"),
        (VALUES.astype(object), "numpy.save wrote"),
    ]:
        np.save(path, wrong)
        with pytest.raises(ValueError, match=message):
            read_values(path, dataset)
    for text in ("", "1.0 2.0"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"numpy\.save wrote"):
            read_values(path, dataset)
