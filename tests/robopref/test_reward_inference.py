"""Learned rewards against values solved by hand, an independent optimiser, and what preferences can determine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from robopref.mdp import TabularMDP, greedy_policy, optimal_values, policy_values, q_values, scaled_return
from robopref.reward_inference import (
    CandidatePolicies,
    RewardInferenceConfig,
    TabularQueries,
    best_policy,
    candidate_policies,
    learn,
    segment_scores,
    without_optimal,
)

LEFT, RIGHT = 0, 1
DISCOUNT = 0.9


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def chain(length: int = 4, discount: float = DISCOUNT) -> TabularMDP:
    """States in a row; every move counts feature 0, the move into the last state, a terminal one, feature 1 as well."""
    transitions, features = np.zeros((length, 2, length)), np.zeros((length, 2, 2))
    for state in range(length - 1):
        for action, following in ((LEFT, max(state - 1, 0)), (RIGHT, state + 1)):
            transitions[state, action, following] = 1.0
            features[state, action] = [1.0, float(following == length - 1)]
    transitions[-1, :, -1] = 1.0
    terminal = np.arange(length) == length - 1
    start = np.where(terminal, 0.0, 1.0 / (length - 1))
    return TabularMDP(transitions, features @ np.array([-1.0, 0.0]), start, terminal, np.asarray(discount), features)


def queries_of(mdp: TabularMDP, starts: np.ndarray, actions: np.ndarray) -> TabularQueries:
    """Segments of a deterministic process, by its own tables."""
    states = [starts]
    for step in range(actions.shape[-1]):
        states.append(np.argmax(np.asarray(mdp.transitions)[states[-1], actions[..., step]], axis=-1))
    visited = np.stack(states, axis=-1)
    features = np.asarray(mdp.features)[visited[..., :-1], actions]
    return TabularQueries(visited, actions, np.where(np.asarray(mdp.terminal)[visited[..., :-1], None], 0.0, features))


def random_queries(mdp: TabularMDP, seed: int, count: int, length: int = 3) -> TabularQueries:
    rng = np.random.default_rng(seed)
    free = np.flatnonzero(~np.asarray(mdp.terminal))
    return queries_of(mdp, rng.choice(free, (count, 2)), rng.integers(0, 2, (count, 2, length)))


def candidates(mdp: TabularMDP, weights: np.ndarray) -> CandidatePolicies:
    return candidate_policies(mdp, jax.vmap(best_policy, (None, 0))(mdp, weights))


WEIGHTS = np.array([[-1.0, 0.0], [1.0, 0.0], [-1.0, 5.0], [1.0, -50.0], [0.0, -1.0], [0.0, 0.0]])


def test_scores_of_the_chain_solved_by_hand() -> None:
    mdp = chain()
    right_right, left_right = [RIGHT, RIGHT], [LEFT, RIGHT]
    queries = queries_of(mdp, np.array([[1, 1]]), np.array([[right_right, left_right]]))
    values = optimal_values(mdp)
    np.testing.assert_allclose(values, [-2.71, -1.9, -1.0, 0.0], atol=1e-12)
    rewards = jnp.asarray(queries.features) @ jnp.array([-1.0, 0.0])
    deterministic, full, returned = (
        segment_scores(score, queries, rewards, values, q_values(mdp, values), DISCOUNT)[0]
        for score in ("deterministic regret", "full regret", "partial return")
    )
    # From 1: right, right loses nothing; left, right ends in 1 again, and loses A(1, left) = -1.539 and then nothing.
    np.testing.assert_allclose(deterministic, [0.0, -1.539], atol=1e-12)
    np.testing.assert_allclose(full, deterministic, atol=1e-12)
    np.testing.assert_allclose(returned, [-1.9, -1.9], atol=1e-12)


def test_the_step_into_a_terminal_state_counts_and_staying_there_does_not() -> None:
    mdp = chain()
    weights = jnp.array([-1.0, 50.0])
    values = optimal_values(mdp.reweighted(weights))
    # 50 - 1 on the last step, discounted before it.
    np.testing.assert_allclose(values, [-1.0 - 0.9 + 0.81 * 49, -1.0 + 0.9 * 49, 49.0, 0.0], atol=1e-9)
    queries = queries_of(mdp, np.array([[2, 0]]), np.array([[[RIGHT, LEFT, LEFT], [RIGHT, RIGHT, RIGHT]]]))
    scores = segment_scores(
        "deterministic regret", queries, jnp.asarray(queries.features) @ weights, values, jnp.zeros((4, 2)), DISCOUNT
    )
    np.testing.assert_allclose(scores, [[0.0, 0.0]], atol=1e-9)


def test_candidates_are_distinct_and_their_features_are_those_of_their_policies() -> None:
    mdp = chain()
    found = candidates(mdp, WEIGHTS)
    # Going right at once; going on for ever without arriving; or being indifferent between both in different places.
    policies = [np.asarray(best_policy(mdp, each)) for each in WEIGHTS]
    distinct: list[int] = []
    for index, policy in enumerate(policies):
        reached = [np.asarray(policy_values(mdp.reweighted(w), policy)) for w in np.eye(2)]
        np.testing.assert_allclose(np.asarray(found.successors)[index], np.stack(reached, axis=-1), atol=1e-9)
        if not any(np.allclose(found.successors[index], found.successors[other]) for other in distinct):
            distinct.append(index)
    np.testing.assert_array_equal(np.flatnonzero(found.counts), distinct)
    assert 2 <= len(distinct) < len(WEIGHTS)


def test_optimal_policies_can_be_left_out_but_never_all() -> None:
    mdp, weights = chain(), jnp.array([-1.0, 0.0])
    found = candidates(mdp, WEIGHTS)
    left = without_optimal(found, weights, optimal_values(mdp))
    optimal = np.array([np.allclose(psi @ weights, optimal_values(mdp)) for psi in np.asarray(found.successors)])
    np.testing.assert_array_equal(left.counts, np.asarray(found.counts) & ~optimal)
    assert optimal.any()
    same = without_optimal(candidates(mdp, WEIGHTS[:1]), weights, optimal_values(mdp))
    np.testing.assert_array_equal(same.counts, [True])


def test_the_partial_return_learner_finds_the_minimum_of_its_convex_loss() -> None:
    mdp = chain(6)
    queries = random_queries(mdp, 0, 80)
    sums = np.sum(DISCOUNT ** np.arange(3)[:, None] * np.asarray(queries.features), axis=-2)
    gaps = sums[:, 1] - sums[:, 0]
    rng = np.random.default_rng(1)
    labels = (rng.random(80) < 1 / (1 + np.exp(-gaps @ np.array([-0.5, 1.0])))).astype(float)

    def cross_entropy(weights: np.ndarray) -> float:
        logits = gaps @ weights
        return float(np.mean(labels * np.logaddexp(0, -logits) + (1 - labels) * np.logaddexp(0, logits)))

    best = minimize(cross_entropy, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13})
    config = RewardInferenceConfig("partial return", learning_rate=0.05, updates=4000)
    weights, loss = jax.jit(lambda queries, labels: learn(config, queries, labels, candidates(mdp, WEIGHTS), DISCOUNT))(
        queries, jnp.asarray(labels)
    )
    np.testing.assert_allclose(weights, best.x, atol=1e-3)
    assert float(loss) == pytest.approx(best.fun, abs=1e-9)


@pytest.mark.parametrize("score", ["deterministic regret", "full regret"])
def test_labels_by_regret_teach_the_way_that_partial_returns_hide(score: str) -> None:
    # Each step costs as much as any other: without a segment that ends, partial returns are all the same.
    mdp, weights = chain(6), np.array([-1.0, 0.0])
    queries = random_queries(mdp, 2, 400)
    inside = ~np.asarray(mdp.terminal)[np.asarray(queries.states)].any(axis=(1, 2))
    queries = jax.tree.map(lambda leaf: leaf[inside], queries)
    values = optimal_values(mdp)
    rewards = jnp.asarray(queries.features) @ weights
    regrets, returns = (
        segment_scores(each, queries, rewards, values, q_values(mdp, values), DISCOUNT)
        for each in (score, "partial return")
    )
    assert np.ptp(np.asarray(returns)) < 1e-12
    policies = candidates(mdp, WEIGHTS)
    config = RewardInferenceConfig(score, updates=300)  # type: ignore[arg-type]
    solved = []
    for scores in (regrets, returns):
        labels = 0.5 * (1.0 + jnp.sign(jnp.round(scores[:, 1] - scores[:, 0], 9)))
        learned, _ = jax.jit(lambda labels: learn(config, queries, labels, policies, DISCOUNT))(labels)
        solved.append(float(scaled_return(mdp, best_policy(mdp, learned))))
    assert solved[0] == pytest.approx(1.0)
    assert solved[1] < 0.9


def test_advantages_learned_from_regret_are_to_be_acted_on_greedily() -> None:
    mdp = chain(5)
    queries = random_queries(mdp, 3, 600)
    values = optimal_values(mdp)
    rewards = jnp.asarray(queries.features) @ jnp.array([-1.0, 0.0])
    scores = segment_scores("deterministic regret", queries, rewards, values, q_values(mdp, values), DISCOUNT)
    labels = jax.nn.sigmoid(scores[:, 1] - scores[:, 0])
    config = RewardInferenceConfig("advantage", learning_rate=0.1, updates=2000)
    learned, loss = jax.jit(lambda labels: learn(config, queries, labels, candidates(mdp, WEIGHTS), DISCOUNT))(labels)
    assert learned.shape == (5, 2)
    # Soft labels of the model itself: the loss reaches their entropy, and the table the advantages, up to a constant.
    chances = np.asarray(labels)
    entropy = -np.mean(chances * np.log(chances) + (1 - chances) * np.log(1 - chances))
    assert float(loss) == pytest.approx(entropy, abs=1e-5)
    truth = np.asarray(q_values(mdp, values) - values[:, None])[:-1]
    gaps = np.asarray(learned)[:-1] - truth
    np.testing.assert_allclose(gaps, np.mean(gaps), atol=0.02)
    assert float(scaled_return(mdp, greedy_policy(learned))) == pytest.approx(1.0)


def test_queries_that_were_not_asked_do_not_count_and_boards_learn_side_by_side() -> None:
    mdp = chain(5)
    queries, labels = random_queries(mdp, 4, 40), jnp.asarray(np.random.default_rng(5).integers(0, 2, 40), float)
    policies = candidates(mdp, WEIGHTS)
    config = RewardInferenceConfig("deterministic regret", updates=50)
    first = jax.tree.map(lambda leaf: leaf[:10], queries)
    alone, loss = learn(config, first, labels[:10], policies, DISCOUNT)
    masks = jnp.arange(40) < jnp.array([[10], [40]])
    together, losses = jax.vmap(lambda asked: learn(config, queries, labels, policies, DISCOUNT, asked))(masks)
    np.testing.assert_allclose(together[0], alone, rtol=1e-9)
    np.testing.assert_allclose(losses[0], loss, rtol=1e-9)
    assert not np.allclose(together[1], alone)


def test_the_least_loss_is_kept_or_the_last_parameters() -> None:
    mdp = chain(5)
    queries = random_queries(mdp, 6, 30)
    labels = jnp.asarray(np.random.default_rng(7).integers(0, 2, 30), float)
    # A learning rate at which every other update is for the worse.
    best = RewardInferenceConfig("partial return", learning_rate=20.0, updates=15)
    policies = candidates(mdp, WEIGHTS)
    _, least = learn(best, queries, labels, policies, DISCOUNT)
    losses = [
        float(learn(replace(best, updates=count, keep_best=False), queries, labels, policies, DISCOUNT)[1])
        for count in range(16)
    ]
    assert float(least) == pytest.approx(min(losses), rel=1e-12)
    assert min(losses) < losses[-1]


def test_only_the_direction_of_weights_decides_what_is_best() -> None:
    mdp = chain(5)
    for weights in WEIGHTS[:-1]:
        np.testing.assert_array_equal(best_policy(mdp, weights), best_policy(mdp, 1e7 * weights))
    np.testing.assert_array_equal(best_policy(mdp, WEIGHTS[-1]), np.full((5, 2), 0.5))
