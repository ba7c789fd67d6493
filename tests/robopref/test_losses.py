"""Losses against plain NumPy formulas, published figures, and optima that are known in closed form."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robopref.losses import (
    all_pairs_loss,
    contrastive_preference_loss,
    distances,
    expectile_loss,
    plackett_luce_loss,
    preference_loss,
    ranking_accuracy,
    smoothed,
    squared_error_log_probability,
    triplet_loss,
)
from robopref.preferences import advantage_sum, plackett_luce_log_probability

extreme = st.floats(-1e4, 1e4, width=32)
moderate = st.floats(-20, 20, width=32)
labels = st.floats(0, 1, width=32)
weights = st.sampled_from([0.25, 0.5, 1.0])
examples = settings(deadline=None, max_examples=40)

PREFERRED = np.array([-0.3, -1.1, -0.4])
OTHER = np.array([-0.9, -0.2, -2.5])


def numpy_contrastive(preferred: float, other: float, weight: float) -> float:
    return -math.log(math.exp(preferred) / (math.exp(preferred) + math.exp(weight * other)))


@pytest.mark.parametrize(
    ("temperature", "discount", "weight", "label", "published"),
    [
        (1.0, 1.0, 1.0, 0.0, 0.152978),
        (0.1, 1.0, 1.0, 0.0, 0.607192),
        (1.0, 1.0, 0.5, 0.0, 0.693147),
        (1.0, 0.9, 1.0, 0.0, 0.203061),
        (1.0, 0.9, 0.5, 0.0, 0.724370),
        (1.0, 0.9, 0.5, 0.5, 1.559049),
        (1.0, 0.9, 0.5, 1.0, 2.393728),
    ],
)
def test_contrastive_loss_of_the_worked_example(temperature, discount, weight, label, published):
    powers = discount ** np.arange(3)
    first, second = temperature * np.sum(powers * PREFERRED), temperature * np.sum(powers * OTHER)
    expected = (1 - label) * numpy_contrastive(first, second, weight) + label * numpy_contrastive(second, first, weight)
    ours = contrastive_preference_loss(
        advantage_sum(jnp.asarray(temperature * PREFERRED), discount),
        advantage_sum(jnp.asarray(temperature * OTHER), discount),
        jnp.float32(label),
        weight,
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    np.testing.assert_allclose(ours, published, atol=1e-6)


def test_the_gaussian_constant_counts_as_soon_as_the_weight_is_below_one():
    steps, dimensions, temperature = 64, 4, 0.1
    first, second = np.zeros((2, steps, dimensions))
    first[0, 0], second[0, 0] = math.sqrt(20.0), math.sqrt(40.0)
    logs = [
        squared_error_log_probability(jnp.asarray(actions), jnp.zeros((steps, dimensions)))
        for actions in (first, second)
    ]
    np.testing.assert_allclose([float(log.sum()) for log in logs], [-20.0, -40.0], rtol=1e-5)

    variance = 0.5
    constant = -0.5 * dimensions * math.log(2 * math.pi * variance)

    def loss(offset: float, weight: float) -> float:
        sums = [advantage_sum(temperature * (log + offset)) for log in logs]
        return float(contrastive_preference_loss(sums[0], sums[1], jnp.float32(0.0), weight))

    assert loss(0.0, 0.5) == pytest.approx(0.693147, abs=1e-5)
    assert loss(constant, 0.5) == pytest.approx(7.326929, abs=1e-4)
    assert loss(0.0, 1.0) == pytest.approx(math.log1p(math.exp(-2.0)), abs=1e-5)
    assert loss(constant, 1.0) == pytest.approx(0.126928, abs=1e-4)


@pytest.mark.parametrize(("weight", "policy"), [(1.0, (0.09003, 0.24473, 0.66524)), (0.5, (0.06887, 0.31301, 0.61812))])
def test_the_optimum_of_a_bandit_with_infinitely_many_soft_labels(weight, policy):
    with jax.enable_x64(True):
        rewards = jnp.array([0.0, 1.0, 2.0])
        first, second = jnp.array([(i, j) for i in range(3) for j in range(3) if i != j]).T
        targets = jax.nn.sigmoid(rewards[second] - rewards[first])

        def loss(logits: jax.Array) -> jax.Array:
            logs = jax.nn.log_softmax(logits)
            return contrastive_preference_loss(logs[first], logs[second], targets, weight).mean()

        @jax.jit
        def solve() -> jax.Array:
            return jax.lax.fori_loop(0, 5000, lambda _, logits: logits - 2.0 * jax.grad(loss)(logits), jnp.zeros(3))

        solution = solve()
        np.testing.assert_allclose(jax.grad(loss)(solution), 0.0, atol=1e-9)
        np.testing.assert_allclose(jax.nn.softmax(solution), policy, atol=6e-6)
        if weight == 1.0:
            np.testing.assert_allclose(jax.nn.softmax(solution), jax.nn.softmax(rewards), atol=1e-6)
            probabilities = np.asarray(targets)
            entropy = -(probabilities * np.log(probabilities) + (1 - probabilities) * np.log(1 - probabilities))
            np.testing.assert_allclose(loss(solution), entropy.mean(), rtol=1e-6)
            # The published floor averages P(i over j) times the loss over ordered pairs: a pair counts twice.
            np.testing.assert_allclose(loss(solution) / 2, 0.254957, atol=1e-6)


@examples
@given(moderate, labels)
def test_preference_loss_is_the_cross_entropy(logit, label):
    probability = 1 / (1 + math.exp(-logit))
    expected = -label * math.log(probability) - (1 - label) * math.log(1 / (1 + math.exp(logit)))
    np.testing.assert_allclose(preference_loss(jnp.float32(logit), jnp.float32(label)), expected, rtol=1e-4, atol=1e-6)


@examples
@given(moderate, moderate, labels)
def test_contrastive_loss_at_weight_one_is_the_preference_loss(first, second, label):
    first, second, label = jnp.float32(first), jnp.float32(second), jnp.float32(label)
    np.testing.assert_allclose(
        contrastive_preference_loss(first, second, label), preference_loss(second - first, label), rtol=1e-4, atol=1e-6
    )


@examples
@given(moderate, moderate, labels, weights)
def test_swapping_the_segments_and_the_label_changes_nothing(first, second, label, weight):
    first, second, label = jnp.float32(first), jnp.float32(second), jnp.float32(label)
    np.testing.assert_allclose(
        contrastive_preference_loss(first, second, label, weight),
        contrastive_preference_loss(second, first, 1 - label, weight),
        rtol=1e-4,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        preference_loss(second - first, label), preference_loss(first - second, 1 - label), rtol=1e-4, atol=1e-6
    )


@examples
@given(moderate, moderate, weights)
def test_a_tie_is_the_mean_of_the_two_directions(first, second, weight):
    first, second = jnp.float32(first), jnp.float32(second)
    both = [contrastive_preference_loss(first, second, jnp.float32(label), weight) for label in (0.0, 1.0)]
    tie = contrastive_preference_loss(first, second, jnp.float32(0.5), weight)
    np.testing.assert_allclose(tie, sum(both) / 2, rtol=1e-5, atol=1e-6)


def test_only_weight_one_is_blind_to_a_common_shift():
    first, second, label = jnp.float32(0.4), jnp.float32(-0.2), jnp.float32(0.3)

    def change(weight: float) -> float:
        shifted = contrastive_preference_loss(first + 5, second + 5, label, weight)
        return float(abs(shifted - contrastive_preference_loss(first, second, label, weight)))

    assert change(1.0) < 1e-6
    assert change(0.5) > 0.1
    ranking = jnp.array([1.0, 0.2, -0.7])
    np.testing.assert_allclose(plackett_luce_loss(ranking + 5), plackett_luce_loss(ranking), rtol=1e-5)


@examples
@given(moderate, moderate, weights)
def test_a_ranking_of_two_is_a_pair(best, worst, weight):
    ranking = plackett_luce_loss(jnp.array([best, worst], jnp.float32), weight)
    pair = contrastive_preference_loss(jnp.float32(best), jnp.float32(worst), jnp.float32(0.0), weight)
    np.testing.assert_allclose(ranking, pair, rtol=1e-4, atol=1e-6)


@examples
@given(st.lists(moderate, min_size=2, max_size=6))
def test_the_ranking_loss_at_weight_one_is_plackett_luce(scores):
    scores = jnp.asarray(scores, jnp.float32)
    np.testing.assert_allclose(plackett_luce_loss(scores), -plackett_luce_log_probability(scores), rtol=1e-4, atol=1e-4)


def test_the_ranking_loss_by_its_formula_keeps_batch_axes():
    scores, weight = np.random.default_rng(0).normal(size=(2, 3, 4)), 0.5
    expected = np.zeros((2, 3))
    for k in range(4):
        rivals = np.exp(weight * scores[..., k + 1 :]).sum(-1)
        expected += np.log((np.exp(scores[..., k]) + rivals) / np.exp(scores[..., k]))
    np.testing.assert_allclose(plackett_luce_loss(jnp.asarray(scores), weight), expected, rtol=1e-4)


@examples
@given(extreme, extreme, labels, weights)
def test_pair_losses_and_gradients_are_finite_at_any_size(first, second, label, weight):
    first, second, label = jnp.float32(first), jnp.float32(second), jnp.float32(label)
    loss, gradients = jax.value_and_grad(contrastive_preference_loss, (0, 1))(first, second, label, weight)
    assert np.isfinite([loss, *gradients]).all()
    assert loss >= 0
    loss, gradient = jax.value_and_grad(preference_loss)(first, label)
    assert np.isfinite([loss, gradient]).all()
    assert abs(gradient) <= 1


@examples
@given(st.lists(extreme, min_size=4, max_size=4), weights)
def test_ranking_losses_and_gradients_are_finite_at_any_size(scores, weight):
    loss, gradients = jax.value_and_grad(plackett_luce_loss)(jnp.asarray(scores, jnp.float32), weight)
    assert np.isfinite(loss)
    assert np.isfinite(gradients).all()
    assert loss >= 0


def test_the_extremes_that_break_a_naive_formula():
    np.testing.assert_allclose(preference_loss(jnp.array([1e4, -1e4]), jnp.array([0.0, 1.0])), [1e4, 1e4])
    np.testing.assert_allclose(preference_loss(jnp.array([1e4, -1e4]), jnp.array([1.0, 0.0])), 0.0)
    ranking = jnp.array([-1e4, 0.0, 1e4])
    loss, gradient = jax.value_and_grad(plackett_luce_loss)(ranking)
    np.testing.assert_allclose(loss, 3e4)
    np.testing.assert_allclose(gradient, [-1.0, -1.0, 2.0])
    np.testing.assert_allclose(plackett_luce_loss(ranking[::-1]), 0.0)


def test_log_probability_sums_over_the_action_axis_only():
    actions, means = np.random.default_rng(1).normal(size=(2, 5, 3, 2))
    expected = -((actions - means) ** 2).sum(-1)
    np.testing.assert_allclose(
        squared_error_log_probability(jnp.asarray(actions), jnp.asarray(means)), expected, rtol=1e-5
    )


@pytest.mark.parametrize(("expectile", "best"), [(0.5, 0.5), (0.7, 0.7), (0.9, 0.9)])
def test_the_expectile_loss_is_least_at_the_expectile(expectile, best):
    """Of 0 and 1, each as often: expectile (1 - v) = (1 - expectile) v, so v is the expectile."""
    targets, estimates = np.array([0.0, 1.0]), np.linspace(0, 1, 101)
    losses = np.asarray(expectile_loss(jnp.asarray(targets[:, None] - estimates), expectile))
    assert estimates[losses.mean(axis=0).argmin()] == pytest.approx(best)


def test_the_expectile_loss_by_its_formula():
    differences = np.random.default_rng(0).normal(size=(4, 3))
    expected = np.abs(0.8 - (differences < 0)) * differences**2
    np.testing.assert_allclose(expectile_loss(jnp.asarray(differences), 0.8), expected, rtol=1e-5)
    half = expectile_loss(jnp.asarray(differences), 0.5)
    np.testing.assert_allclose(half, differences**2 / 2, rtol=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_all_pairs_of_a_ranking_are_pairs_of_which_the_first_is_preferred(weight: float) -> None:
    scores = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    one_by_one = [
        contrastive_preference_loss(scores[..., i], scores[..., j], np.zeros((3, 2)), weight) for i, j in pairs
    ]
    np.testing.assert_allclose(all_pairs_loss(scores, weight), np.mean(one_by_one, axis=0), rtol=1e-5)


def test_all_pairs_losses_and_gradients_are_finite_at_any_size() -> None:
    scores = np.array([1e4, -1e4, 3e3, 0.0], np.float32)
    value, gradient = jax.value_and_grad(all_pairs_loss)(scores)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_ranking_accuracy_counts_decided_pairs_of_every_member() -> None:
    labels = jnp.array([1.0, 0.0, 0.5, 0.8])
    # Of the three decided pairs the first member has two right, the second one.
    logits = jnp.array([[2.0, -0.1, 9.0, -3.0], [-2.0, 0.1, -9.0, 3.0]])
    assert float(ranking_accuracy(logits[0], labels)) == pytest.approx(2 / 3)
    assert float(ranking_accuracy(logits, labels)) == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert float(ranking_accuracy(logits[0, 2:3], labels[2:3])) == 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothed_labels_are_those_of_people_who_answer_at_random_now_and_then(smoothing: float) -> None:
    random_share = smoothing * np.array([0.5, 0.5, 0.5]) + (1 - smoothing) * np.array([0.0, 0.3, 1.0])
    np.testing.assert_allclose(smoothed(jnp.array([0.0, 0.3, 1.0]), smoothing), random_share, atol=1e-7)


def test_triplet_loss_of_the_worked_example():
    anchor, positive, negative = jnp.array([1.0, 0.0]), jnp.array([0.6, 0.8]), jnp.array([0.0, 1.0])
    np.testing.assert_allclose(distances(anchor, jnp.stack([positive, negative])), [0.894427, 1.414214], atol=2e-6)
    loss, gradient = jax.value_and_grad(triplet_loss)(anchor, positive, negative)
    assert loss == pytest.approx(math.sqrt(0.8) - math.sqrt(2) + 1, abs=1e-5)
    assert loss == pytest.approx(0.480214, abs=1e-5)
    np.testing.assert_allclose(gradient, [-0.259893, -0.187320], atol=1e-5)


def test_triplet_loss_is_0_beyond_the_margin_and_broadcasts():
    anchor = jnp.zeros(2)
    positives, negatives = jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.array([[6.0, 8.0], [0.0, 1.5]])
    np.testing.assert_allclose(triplet_loss(anchor, positives, negatives), [0.0, 0.5], atol=1e-5)
    np.testing.assert_allclose(triplet_loss(anchor, positives, negatives, jnp.array([7.0, 0.0])), [2.0, 0.0], atol=1e-5)


def test_equal_vectors_have_a_distance_with_a_gradient():
    place = jnp.array([0.3, -2.0])
    distance, gradient = jax.value_and_grad(distances)(place, place)
    assert 0 < distance < 1e-5
    assert np.isfinite(gradient).all()
