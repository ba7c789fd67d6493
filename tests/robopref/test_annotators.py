"""Groups of annotators against regressions by SciPy, loops in NumPy, and labels whose groups are known."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment, minimize
from scipy.special import expit

from robopref.annotators import GroupConfig, Groups, HeldOut, fit_groups, held_out_log_likelihood
from robopref.evaluation import claim_verdict

WEIGHTS = np.array([[2.0, -1.0, 0.5], [-1.5, 1.0, 1.5]])
ANNOTATORS, EACH = 20, 30
RIDGE = 0.3


def draw(seed: int, members: np.ndarray, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and annotators; annotator h belongs to group members[h] and answers `EACH` queries."""
    rng = np.random.default_rng(seed)
    annotators = rng.permutation(np.repeat(np.arange(len(members)), EACH))
    features = rng.normal(size=(len(annotators), 3))
    logits = np.sum(features * WEIGHTS[members[annotators]], axis=1)
    labels = rng.random(len(logits)) < expit(logits / temperature) if temperature else logits > 0
    return features, labels.astype(float), annotators


TWO_GROUPS = np.arange(ANNOTATORS) % 2
ONE_GROUP = np.zeros(ANNOTATORS, int)


def fit(data: tuple[np.ndarray, np.ndarray, np.ndarray], groups: int, seed: int = 0, **changes: Any) -> Groups:
    return fit_groups(GroupConfig(groups, **{"ridge": RIDGE, "restarts": 4, **changes}), *data, jax.random.key(seed))


def held_out(data: tuple[np.ndarray, np.ndarray, np.ndarray], groups: int, seed: int = 0) -> tuple[HeldOut, ...]:
    return held_out_log_likelihood(GroupConfig(groups, restarts=4), *data, jax.random.key(seed))


def log_likelihood(weights: np.ndarray, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each label."""
    logits = features @ weights
    return -labels * np.logaddexp(0, -logits) - (1 - labels) * np.logaddexp(0, logits)


def regression(features: np.ndarray, labels: np.ndarray, shares: np.ndarray, ridge: float) -> np.ndarray:
    """Penalised weights by SciPy."""

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value = 0.5 * ridge * weights @ weights - shares @ log_likelihood(weights, features, labels)
        slope = ridge * weights - features.T @ (shares * (labels - expit(features @ weights)))
        return value, slope

    options = {"gtol": 1e-10, "ftol": 1e-15, "maxiter": 1000}
    return np.asarray(minimize(loss, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B", options=options).x)


def joint(groups: Groups, data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """Likelihood of all labels of each annotator together with each group, [H, G], in a loop."""
    features, labels, annotators = data
    table = np.tile(np.log(groups.prior), (annotators.max() + 1, 1))
    for x, label, annotator in zip(features, labels, annotators, strict=True):
        for group, weights in enumerate(groups.weights):
            table[annotator, group] += log_likelihood(weights, x[None], np.array([label]))[0]
    return np.exp(table)


@pytest.mark.parametrize("soft", [False, True])
def test_one_group_is_logistic_regression(soft: bool) -> None:
    features, labels, annotators = draw(0, TWO_GROUPS)
    if soft:
        labels = np.random.default_rng(1).choice([0.0, 0.2, 0.5, 0.9, 1.0], len(labels))
    groups = fit((features, labels, annotators), 1)
    expected = regression(features, labels, np.ones(len(labels)), RIDGE)
    np.testing.assert_allclose(groups.weights[0], expected, atol=1e-6)
    assert groups.log_likelihood == pytest.approx(log_likelihood(groups.weights[0], features, labels).sum(), abs=1e-9)
    np.testing.assert_array_equal(groups.prior, [1.0])
    np.testing.assert_array_equal(groups.responsibilities, np.ones((ANNOTATORS, 1)))


@pytest.mark.parametrize("temperature", [3.0, 1.0, 0.0])
def test_the_penalised_likelihood_never_falls(temperature: float) -> None:
    """With labels that hardly tell groups apart, with clear ones, and with some that weights can separate."""
    data = draw(2, TWO_GROUPS, temperature)
    for seed in range(3):
        # Not the best of many starts, which may be a short climb.
        fitted = fit(data, 3, seed, restarts=1)
        steps = np.diff(fitted.objective)
        assert steps.min() >= -1e-9 * abs(fitted.objective[-1])
        assert fitted.objective[-1] > fitted.objective[0] + 1.0
        penalty = RIDGE / 2 * np.sum(fitted.weights**2)
        likelihood = np.log(joint(fitted, data).sum(axis=1)).sum()
        assert fitted.log_likelihood == pytest.approx(likelihood, rel=1e-9)
        assert fitted.objective[-1] == pytest.approx(likelihood - penalty, rel=1e-9)


def test_a_fit_is_a_fixed_point_of_both_steps() -> None:
    """Responsibilities by Bayes' rule, and each group's weights by a regression under them."""
    features, labels, annotators = data = draw(2, TWO_GROUPS, temperature=3.0)
    fitted = fit(data, 2)
    likelihoods = joint(fitted, data)
    np.testing.assert_allclose(fitted.responsibilities, likelihoods / likelihoods.sum(axis=1, keepdims=True), atol=1e-9)
    assert ((fitted.responsibilities > 0.02) & (fitted.responsibilities < 0.98)).any()
    np.testing.assert_allclose(fitted.prior, fitted.responsibilities.mean(axis=0), atol=1e-4)
    for group in range(2):
        expected = regression(features, labels, fitted.responsibilities[annotators, group], RIDGE)
        np.testing.assert_allclose(fitted.weights[group], expected, atol=1e-3)


def test_more_restarts_are_never_worse_and_the_best_is_kept() -> None:
    """On answers by coin flips, which have many ways to be grouped that no small change improves."""
    data = draw(2, TWO_GROUPS, temperature=1e6)
    alone = [fit(data, 3, seed, restarts=1).objective[-1] for seed in range(4)]
    together = [fit(data, 3, seed).objective[-1] for seed in range(2)]
    assert np.ptp(alone) > 0.1
    assert min(together) > np.median(alone)


def test_two_groups_are_found() -> None:
    data = draw(0, TWO_GROUPS)
    fitted = fit(data, 2)
    distances = np.linalg.norm(fitted.weights[:, None] - WEIGHTS, axis=-1)
    found, true = linear_sum_assignment(distances)
    assert distances[found, true].max() < 0.7
    assert distances[found, true[::-1]].min() > 2.0
    np.testing.assert_array_equal(true[fitted.responsibilities.argmax(axis=1)], TWO_GROUPS)
    np.testing.assert_allclose(fitted.prior, 0.5, atol=0.01)

    one, two, three = held_out(data, 3)
    assert [each.groups for each in (one, two, three)] == [1, 2, 3]
    assert one.gain is None
    assert two.gain is not None
    assert three.gain is not None
    assert (two.log_likelihood.n, two.gain.n) == (ANNOTATORS, ANNOTATORS)
    assert two.gain.difference == pytest.approx(two.log_likelihood.mean - one.log_likelihood.mean)
    assert claim_verdict(two.gain, "above") == "holds"
    assert three.gain.verdict != "better"
    # No model can expect more than the one that made the labels.
    features, labels, annotators = data
    truth = [log_likelihood(WEIGHTS[group], features, labels) for group in range(2)]
    best = np.where(TWO_GROUPS[annotators] == 0, *truth).mean()
    assert two.log_likelihood.mean == pytest.approx(best, abs=0.05)


@pytest.mark.parametrize("seed", range(2))
def test_annotators_who_agree_are_not_better_explained_by_two_groups(seed: int) -> None:
    _, two = held_out(draw(10 + seed, ONE_GROUP), 2)
    assert two.gain is not None
    assert two.gain.verdict != "better"
    assert two.gain.difference < 0.01


def test_the_largest_group_comes_first() -> None:
    members = np.where(np.arange(ANNOTATORS) < 14, 1, 0)
    fitted = fit(draw(3, members), 2)
    np.testing.assert_allclose(fitted.prior, [0.7, 0.3], atol=0.01)
    assert np.linalg.norm(fitted.weights - WEIGHTS[::-1]) < 1.0


def test_labels_without_noise_have_finite_weights_that_grow_as_the_ridge_falls() -> None:
    data = draw(4, ONE_GROUP, temperature=0.0)
    lengths = [np.linalg.norm(fit(data, 1, ridge=ridge).weights) for ridge in (1.0, 0.01, 0.0001)]
    assert lengths == sorted(lengths)
    assert 3 * lengths[0] < lengths[2] < np.inf


def test_a_fit_follows_from_its_key_and_not_from_the_order_of_labels() -> None:
    data = draw(0, TWO_GROUPS)
    first, again = fit(data, 2), fit(data, 2)
    np.testing.assert_array_equal(first.weights, again.weights)
    order = np.random.default_rng(0).permutation(len(data[1]))
    shuffled = fit(tuple(each[order] for each in data), 2)  # type: ignore[arg-type]
    np.testing.assert_allclose(shuffled.weights, first.weights, atol=1e-6)


def test_probabilities_are_the_mean_over_groups() -> None:
    groups = Groups(
        weights=np.array([[1.0, 0.0], [0.0, -2.0]]),
        prior=np.array([0.5, 0.5]),
        responsibilities=np.array([[1.0, 0.0], [0.25, 0.75]]),
        log_likelihood=0.0,
        objective=np.zeros(1),
    )
    features = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 3.0]])
    expected = [expit(1), 0.25 * expit(1) + 0.75 * expit(-2), 0.5]
    np.testing.assert_allclose(groups.probabilities(features, np.array([0, 1, 0])), expected)


def test_held_out_labels_are_foretold_from_the_others_alone() -> None:
    """With one annotator and as many folds as labels, this is leaving out one label after the other."""
    rng = np.random.default_rng(5)
    features, labels = rng.normal(size=(6, 2)), np.array([0.0, 1.0, 1.0, 0.0, 0.3, 1.0])
    config = GroupConfig(1, ridge=0.5)
    found = held_out_log_likelihood(config, features, labels, np.zeros(6, int), jax.random.key(0), folds=6)
    expected = []
    for index in range(6):
        weights = regression(features, labels, (np.arange(6) != index).astype(float), 0.5)
        expected.append(log_likelihood(weights, features[[index]], labels[[index]])[0])
    assert found[0].log_likelihood.mean == pytest.approx(np.mean(expected), abs=1e-6)


GOOD = {"features": np.eye(4), "labels": np.array([0.0, 1.0, 0.5, 1.0]), "annotators": np.array([0, 0, 1, 1])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0.0, 1.0, 1.5, 1.0])}, "label 2 is 1.5"),
        ({"labels": np.array([0.0, np.nan, 0.5, 1.0])}, "label 1 is nan"),
        ({"labels": np.ones(3)}, "3 labels need as many rows of features"),
        ({"features": np.ones(4)}, r"features \[N, F\] and labels \[N\]"),
        ({"features": np.diag([1.0, 1.0, np.inf, 1.0])}, "query 2 are not finite"),
        ({"annotators": np.array([0, 0, 2, 2])}, "annotator 1 gave no label"),
        ({"annotators": np.array([0.0, 0, 1, 1])}, "whole numbers from 0"),
        ({"annotators": np.array([-1, 0, 1, 1])}, "whole numbers from 0"),
        ({"annotators": np.zeros(4, int)}, "1 annotators cannot make 2 groups"),
    ],
)
def test_what_cannot_be_fitted_is_said(changes: dict[str, Any], message: str) -> None:
    given = {**GOOD, **changes}
    for function in (fit_groups, held_out_log_likelihood):
        with pytest.raises(ValueError, match=message):
            function(GroupConfig(2), **given, key=jax.random.key(0))


def test_what_cannot_be_held_out_is_said() -> None:
    with pytest.raises(ValueError, match="annotator 1 gave a single label"):
        held_out_log_likelihood(GroupConfig(1), np.eye(3), np.ones(3), np.array([0, 0, 1]), jax.random.key(0))
    with pytest.raises(ValueError, match="2 folds or more, not 1"):
        held_out_log_likelihood(GroupConfig(1), **GOOD, key=jax.random.key(0), folds=1)


@pytest.mark.parametrize("changes", [{"groups": 0}, {"ridge": 0.0}, {"restarts": 0}, {"iterations": 0}])
def test_what_makes_no_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        GroupConfig(**{"groups": 2, **changes})
