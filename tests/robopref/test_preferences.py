"""Segment statistics and preference probabilities against a chain that is solved here, and small closed forms."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robopref.preferences import (
    advantage_sum,
    bradley_terry,
    deterministic_regret,
    full_regret,
    partial_return,
    plackett_luce_log_probability,
    preference_as_episode_rewards,
    preference_as_reward,
    preference_strength,
    sample_preference,
    sample_ranking,
    vote_on_labels,
)

LEFT, RIGHT = 0, 1
ABSORBING = 3

finite = st.floats(-50, 50, width=32)
scores_lists = st.lists(finite, min_size=2, max_size=5)


def chain_step(state: int, action: int) -> tuple[int, float]:
    """States 0 to 3, of which 3 absorbs at reward 0; every move costs 1, and the left wall holds."""
    if state == ABSORBING:
        return ABSORBING, 0.0
    return (state + 1 if action == RIGHT else max(state - 1, 0)), -1.0


def solve_chain(discount: float) -> tuple[np.ndarray, np.ndarray]:
    """V [4] and Q [4, 2] by value iteration."""
    values = np.zeros(4)
    for _ in range(50):
        outcomes = [[chain_step(state, action) for action in (LEFT, RIGHT)] for state in range(4)]
        q_values = np.array([[reward + discount * values[after] for after, reward in row] for row in outcomes])
        values = q_values.max(axis=1)
    return values, q_values


def walk(state: int, actions: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """States [T+1] and rewards [T] of a segment."""
    states, rewards = [state], []
    for action in actions:
        after, reward = chain_step(states[-1], action)
        states.append(after)
        rewards.append(reward)
    return np.array(states), np.array(rewards)


def chain_regrets(actions: list[int], discount: float) -> tuple[float, float]:
    """Deterministic and full regret of a segment that begins in state 1."""
    values, q_values = solve_chain(discount)
    states, rewards = walk(1, actions)
    deterministic = deterministic_regret(
        jnp.asarray(values[states[0]]), jnp.asarray(values[states[-1]]), jnp.asarray(rewards), discount
    )
    full = full_regret(jnp.asarray(values[states[:-1]]), jnp.asarray(q_values[states[:-1], actions]), discount)
    return float(deterministic), float(full)


def test_the_chain_is_the_published_one():
    values, q_values = solve_chain(0.9)
    np.testing.assert_allclose(values, [-2.71, -1.9, -1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose((q_values[:, LEFT] - values)[:3], [-0.729, -1.539, -1.71], atol=1e-12)


@pytest.mark.parametrize(
    ("actions", "discount", "expected"),
    [
        ([RIGHT, RIGHT], 0.9, 0.0),
        ([LEFT, RIGHT], 0.9, 1.539),
        ([RIGHT, LEFT], 0.9, 1.539),
        ([RIGHT, RIGHT], 1.0, 0.0),
        ([LEFT, RIGHT], 1.0, 2.0),
    ],
)
def test_both_regrets_of_a_deterministic_chain(actions: list[int], discount: float, expected: float):
    deterministic, full = chain_regrets(actions, discount)
    assert deterministic == pytest.approx(expected, abs=1e-5)
    assert full == pytest.approx(expected, abs=1e-5)


def test_the_sum_of_advantages_is_minus_the_regret_and_discounts():
    values, q_values = solve_chain(0.9)
    states, _ = walk(1, [RIGHT, LEFT])
    advantages = jnp.asarray(q_values[states[:-1], [RIGHT, LEFT]] - values[states[:-1]])
    assert float(advantage_sum(advantages, 0.9)) == pytest.approx(-1.539, abs=1e-5)
    assert float(advantage_sum(advantages)) == pytest.approx(-1.71, abs=1e-5)


def test_regret_tells_apart_what_partial_return_does_not():
    best, worse = [RIGHT, RIGHT], [LEFT, RIGHT]
    returns = [partial_return(jnp.asarray(walk(1, actions)[1]), 0.9) for actions in (worse, best)]
    np.testing.assert_allclose(returns, [-1.9, -1.9], atol=1e-6)
    assert float(bradley_terry(*returns, 1.0)) == 0.5
    regrets = [chain_regrets(actions, 0.9)[0] for actions in (worse, best)]
    probability = float(bradley_terry(jnp.asarray(-regrets[0]), jnp.asarray(-regrets[1]), 1.0))
    assert probability == pytest.approx(1 / (1 + math.exp(-1.539)), abs=1e-6)
    assert probability == pytest.approx(0.82332, abs=5e-6)


@pytest.mark.parametrize(("win", "regrets"), [(1.0, (0.0, 4.5)), (11.0, (0.5, 0.0))])
def test_under_chance_only_the_full_regret_knows_the_better_action(win: float, regrets: tuple[float, float]):
    outcomes = np.array([win, -10.0])
    q_values = np.array([0.0, outcomes.mean()])
    value = q_values.max()
    full = full_regret(jnp.full((2, 1), value), jnp.asarray(q_values)[:, None])
    np.testing.assert_allclose(full, regrets, atol=1e-6)

    safe, won, lost = (float(partial_return(jnp.array([reward]))) for reward in (0.0, win, -10.0))
    assert won > safe > lost

    deterministic = deterministic_regret(jnp.full(2, value), jnp.zeros(2), jnp.asarray(outcomes)[:, None])
    np.testing.assert_allclose(deterministic, value - outcomes, atol=1e-6)
    if win == 11.0:
        assert float(deterministic[0]) == pytest.approx(-10.5)


def test_statistics_keep_any_batch_axes_and_take_the_extreme_discounts():
    rewards = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_allclose(partial_return(jnp.asarray(rewards)), rewards.sum(-1))
    np.testing.assert_allclose(partial_return(jnp.asarray(rewards), 0.0), rewards[..., 0])
    weights = np.array([1, 0.5, 0.25, 0.125])
    np.testing.assert_allclose(partial_return(jnp.asarray(rewards), 0.5), rewards @ weights)
    np.testing.assert_allclose(partial_return(jnp.asarray(rewards, jnp.int32), 0.5), rewards @ weights)


@settings(deadline=None, max_examples=30)
@given(finite, finite, finite, st.sampled_from([0.0, 0.1, 1.0, 7.0]))
def test_bradley_terry_is_complementary_and_sees_differences_only(first, second, shift, temperature):
    first, second, shift = jnp.float32(first), jnp.float32(second), jnp.float32(round(shift))
    probability = bradley_terry(first, second, temperature)
    np.testing.assert_allclose(probability + bradley_terry(second, first, temperature), 1.0, atol=1e-6)
    if temperature >= 1:
        np.testing.assert_allclose(bradley_terry(first + shift, second + shift, temperature), probability, atol=1e-5)


def test_temperature_scales_and_its_limit_is_noiseless():
    first, second = jnp.array([1.0, 1.0, 1.0]), jnp.array([3.0, 1.0, 0.999])
    np.testing.assert_allclose(bradley_terry(first, second, 2.0)[0], 1 / (1 + math.exp(-1.0)), rtol=1e-6)
    np.testing.assert_array_equal(bradley_terry(first, second, 0.0), [1.0, 0.5, 0.0])
    np.testing.assert_allclose(bradley_terry(first, second, 1e-6), [1.0, 0.5, 0.0], atol=1e-6)
    under_jit = jax.jit(bradley_terry)(first, second, 0.0)
    np.testing.assert_array_equal(under_jit, [1.0, 0.5, 0.0])


def test_scores_closer_than_the_threshold_are_a_tie():
    first, second = jnp.zeros(3), jnp.array([0.25, 0.5, -0.25])
    np.testing.assert_array_equal(bradley_terry(first, second, 0.0, threshold=0.5), [0.5, 1.0, 0.5])
    assert float(bradley_terry(first, second, 1.0, threshold=0.5)[1]) == pytest.approx(1 / (1 + math.exp(-0.5)))


@settings(deadline=None, max_examples=20)
@given(scores_lists, st.sampled_from([0.5, 1.0, 3.0]))
def test_plackett_luce_is_a_distribution_over_orders(scores, temperature):
    orders = jnp.asarray(list(itertools.permutations(scores)), jnp.float32)
    logs = plackett_luce_log_probability(orders, temperature)
    np.testing.assert_allclose(jnp.sum(jnp.exp(logs)), 1.0, rtol=1e-4)


def test_plackett_luce_by_its_definition_and_for_two():
    scores, temperature = np.array([0.3, -1.0, 2.0, 0.1]), 0.7
    strengths = np.exp(scores / temperature)
    expected = sum(math.log(strengths[k] / strengths[k:].sum()) for k in range(4))
    np.testing.assert_allclose(plackett_luce_log_probability(jnp.asarray(scores), temperature), expected, rtol=1e-5)
    pair = jnp.array([0.3, -1.0])
    np.testing.assert_allclose(
        jnp.exp(plackett_luce_log_probability(pair, temperature)),
        bradley_terry(pair[1], pair[0], temperature),
        rtol=1e-5,
    )


def test_noiseless_plackett_luce_shares_ties_and_forbids_the_rest():
    scores = [2.0, 1.0, 1.0, 1.0]
    orders = sorted(set(itertools.permutations(range(4))))
    probabilities = jnp.exp(plackett_luce_log_probability(jnp.asarray([[scores[i] for i in o] for o in orders]), 0.0))
    np.testing.assert_allclose(probabilities, [1 / 6 if order[0] == 0 else 0.0 for order in orders], rtol=1e-5)


def test_sampled_preferences_follow_their_probability_and_leave_ties_alone():
    count = 4000
    scores_1, scores_2 = jnp.zeros((3, count)), jnp.broadcast_to(jnp.array([[1.0], [0.4], [0.0]]), (3, count))
    drawn = sample_preference(scores_1, scores_2, jax.random.key(0), 2.0, threshold=0.1)
    for row, gap in zip(np.asarray(drawn[:2]), (1.0, 0.4), strict=True):
        probability = 1 / (1 + math.exp(-gap / 2.0))
        assert set(np.unique(row)) == {0.0, 1.0}
        assert abs(row.mean() - probability) < 5 * math.sqrt(probability * (1 - probability) / count)
    np.testing.assert_array_equal(drawn[2], 0.5)
    noiseless = sample_preference(scores_1, scores_2, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(noiseless[:, 0], [1.0, 1.0, 0.5])


@pytest.mark.parametrize(("scores", "temperature"), [([0.0, 1.0, 0.5], 0.8), ([2.0, 1.0, 1.0], 0.0)])
def test_sampled_rankings_follow_plackett_luce(scores, temperature):
    count = 6000
    orders = np.asarray(sample_ranking(jnp.tile(jnp.array(scores), (count, 1)), jax.random.key(1), temperature))
    for order in itertools.permutations(range(3)):
        arranged = jnp.array([scores[i] for i in order])
        probability = float(jnp.exp(plackett_luce_log_probability(arranged, temperature)))
        share = np.mean((orders == order).all(axis=1))
        assert abs(share - probability) <= 5 * math.sqrt(probability * (1 - probability) / count)


def test_preference_strength_is_towards_the_label():
    logits = np.array([[2.0, -1.0, 3.0, 0.5], [4.0, -2.0, 1.0, 0.1]])
    labels = np.array([1.0, 0.0, 0.2, 0.5])
    mean, std = preference_strength(jnp.asarray(logits), jnp.asarray(labels))
    towards = logits * np.array([1, -1, -1, 0])
    np.testing.assert_allclose(mean, towards.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(std, towards.std(axis=0), rtol=1e-6)


def test_the_vote_flips_what_it_doubts_most_and_softens_what_it_cannot_tell():
    strengths = np.array([-5.0, -3.0, -1.0, 0.2, 2.0, 4.0, 5.0, 6.0, 7.0, 0.0])
    labels = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.3, 1.0, 0.0, 0.5])
    logits = np.sign(labels - 0.5) * strengths + np.array([[-0.5], [0.5]]) * (labels != 0.5)
    expected = labels.copy()
    # Of ten pairs, two tenths are flipped: the third is doubted as well, and keeps its label.
    expected[[0, 1]] = 1 - labels[[0, 1]]
    expected[3] = (1 / (1 + np.exp(-logits[:, 3]))).mean()
    voted = vote_on_labels(jnp.asarray(logits), jnp.asarray(labels), flip_share=0.2)
    np.testing.assert_allclose(voted, expected, rtol=1e-6)
    swapped = vote_on_labels(-jnp.asarray(logits), 1 - jnp.asarray(labels), flip_share=0.2)
    np.testing.assert_allclose(swapped, 1 - expected, rtol=1e-6)


def test_a_vote_that_doubts_nothing_changes_nothing():
    labels = np.array([1.0, 0.0, 0.8, 0.5])
    logits = 3 * np.sign(labels - 0.5) * np.array([[1.0], [1.5]])
    voted = vote_on_labels(jnp.asarray(logits), jnp.asarray(labels), flip_share=1.0)
    np.testing.assert_allclose(voted, labels, rtol=1e-6)


def test_a_vote_rights_most_wrong_labels():
    """Members are the truth and noise of their own; 20 % of labels are wrong."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 3, 1000)
    right = (truth > 0).astype(float)
    wrong = rng.permutation(1000) < 200
    labels = np.where(wrong, 1 - right, right)
    voted = np.asarray(vote_on_labels(jnp.asarray(truth + rng.normal(0, 1, (5, 1000))), jnp.asarray(labels)))
    assert np.mean((voted > 0.5) != right) < 0.25 * 0.2
    assert np.abs(voted - right).mean() < 0.6 * np.abs(labels - right).mean()


def test_preference_as_reward_is_bounded_centred_and_steepest_at_the_reference():
    references = jnp.array([0.0, 1.0, 2.0])
    rewards = preference_as_reward(jnp.array([1.0, 3.0, -1e3, 1e3]), references)
    at_3 = np.mean([1 / (1 + math.exp(-each)) for each in (3, 2, 1)])
    np.testing.assert_allclose(rewards, [0.5, at_3, 0, 1], atol=1e-6)
    assert abs(at_3 - 0.85481) < 1e-5
    assert abs(at_3 - 1 / (1 + math.exp(-2))) > 0.02
    grid = jnp.linspace(-4, 6, 101)
    values = np.asarray(preference_as_reward(grid, references))
    assert (np.diff(values) > 0).all()
    assert abs(float(grid[np.argmax(np.diff(values))]) - 1) < 0.11
    np.testing.assert_allclose(
        preference_as_reward(grid, references, 0.5), preference_as_reward(0.5 * grid, 0.5 * references), rtol=1e-6
    )


def test_preference_as_reward_is_given_once_at_the_end_of_an_episode():
    rewards = jnp.array([[1.0, 2.0, 3.0, 99.0], [0.5, 0.5, 0.5, 0.5]])
    mask = jnp.array([[True, True, True, False], [True, True, True, True]])
    references = jnp.array([[6.0], [1.0]])
    shaped = preference_as_episode_rewards(rewards, mask, references)
    np.testing.assert_allclose(shaped, [[0, 0, 0, 0], [0, 0, 0, 1 / (1 + math.exp(-1)) - 0.5]], atol=1e-6)
    longer = preference_as_episode_rewards(jnp.zeros((2, 7)), jnp.ones((2, 7), bool), jnp.zeros(1))
    np.testing.assert_array_equal(longer, 0)
