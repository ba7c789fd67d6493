"""Tabular processes against loops in NumPy, a chain solved by hand, and the identities between the functions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from envs.delivery import CORRIDOR, Board, to_mdp
from robopref.mdp import (
    TabularMDP,
    advantages,
    greedy_policy,
    maximin_policy,
    mean_return,
    optimal_values,
    policy_values,
    q_values,
    scaled_return,
    softmax_value,
    stack,
    successor_features,
    successor_q_features,
    uniform_policy,
)

LEFT, RIGHT = 0, 1


@pytest.fixture
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


pytestmark = pytest.mark.usefixtures("double_precision")


def random_mdp(seed: int, num_states: int = 7, discount: float = 0.95) -> TabularMDP:
    """Dense and stochastic; the last two states are terminal, with rows that mean nothing."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_states, 3, 4))
    start = np.append(rng.dirichlet(np.ones(num_states - 2)), [0.0, 0.0])
    return TabularMDP(
        transitions=rng.dirichlet(np.full(num_states, 0.3), size=(num_states, 3)),
        rewards=features @ np.array([1.0, -2.0, 0.5, 3.0]),
        start=start,
        terminal=np.arange(num_states) >= num_states - 2,
        discount=np.asarray(discount),
        features=features,
    )


def random_policy(seed: int, num_states: int = 7) -> np.ndarray:
    return np.random.default_rng(1000 + seed).dirichlet(np.ones(3), size=num_states)


def chain(discount: float) -> TabularMDP:
    """States 0 to 3, of which 3 is terminal; every move costs 1, and the left wall holds."""
    transitions, rewards = np.zeros((4, 2, 4)), np.full((4, 2), -1.0)
    for state in range(4):
        transitions[state, LEFT, max(state - 1, 0)] = transitions[state, RIGHT, min(state + 1, 3)] = 1.0
    return TabularMDP(transitions, rewards, np.full(4, 0.25), np.arange(4) == 3, np.asarray(discount))


def iterate(mdp: TabularMDP, policy: np.ndarray | None) -> np.ndarray:
    """Values by a loop over states and actions until nothing changes; of the best policy if none is given."""
    values = np.zeros(len(mdp.terminal))
    for _ in range(2000):
        before = values.copy()
        for state in np.flatnonzero(~mdp.terminal):
            worth = [
                mdp.rewards[state, action] + mdp.discount * mdp.transitions[state, action] @ before
                for action in range(mdp.rewards.shape[1])
            ]
            values[state] = max(worth) if policy is None else policy[state] @ worth
        if np.abs(values - before).max() < 1e-13:
            break
    return values


def test_the_chain_is_solved_as_by_hand() -> None:
    mdp = chain(0.9)
    values = optimal_values(mdp)
    np.testing.assert_allclose(values, [-2.71, -1.9, -1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(advantages(mdp, values)[:, LEFT], [-0.729, -1.539, -1.71, 0.0], atol=1e-12)
    np.testing.assert_allclose(advantages(mdp, values)[:, RIGHT], 0.0, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_optimal_values_are_those_of_value_iteration(seed: int) -> None:
    mdp = random_mdp(seed)
    np.testing.assert_allclose(optimal_values(mdp), iterate(mdp, None), atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_optimal_values_are_those_of_their_greedy_policy(seed: int) -> None:
    mdp = random_mdp(seed)
    values = optimal_values(mdp)
    greedy = greedy_policy(q_values(mdp, values))
    np.testing.assert_allclose(policy_values(mdp, greedy), values, atol=1e-10)
    assert (np.asarray(values) >= np.asarray(policy_values(mdp, random_policy(seed))) - 1e-10).all()


@pytest.mark.parametrize("seed", range(4))
def test_policy_values_are_those_of_a_loop(seed: int) -> None:
    mdp, policy = random_mdp(seed), random_policy(seed)
    np.testing.assert_allclose(policy_values(mdp, policy), iterate(mdp, policy), atol=1e-10)
    uniform = np.full((7, 3), 1 / 3)
    np.testing.assert_allclose(uniform_policy(mdp), uniform)
    np.testing.assert_allclose(policy_values(mdp, uniform_policy(mdp)), iterate(mdp, uniform), atol=1e-10)


def test_where_the_best_policy_goes_round_for_ever_its_values_are_a_geometric_sum() -> None:
    """Nothing but staying pays, 1 each time, and the rest of the ring has to get there first."""
    transitions = np.zeros((5, 2, 5))
    for state in range(5):
        transitions[state, 0, state] = transitions[state, 1, (state + 1) % 5] = 1.0
    rewards = np.zeros((5, 2))
    rewards[2, 0] = 1.0
    mdp = TabularMDP(transitions, rewards, np.full(5, 0.2), np.zeros(5, bool), np.asarray(0.999))
    distance = np.array([2, 1, 0, 4, 3])
    np.testing.assert_allclose(optimal_values(mdp), 1000 * 0.999**distance, rtol=1e-12)


def test_what_a_terminal_state_says_does_not_count() -> None:
    mdp = random_mdp(0)
    other = random_mdp(1)
    junk = mdp.replace(
        rewards=np.where(mdp.terminal[:, None], 1e6, mdp.rewards),
        transitions=np.where(mdp.terminal[:, None, None], other.transitions, mdp.transitions),
    )
    values = optimal_values(mdp)
    np.testing.assert_array_equal(optimal_values(junk), values)
    np.testing.assert_array_equal(values[-2:], 0.0)
    np.testing.assert_array_equal(q_values(junk, values), q_values(mdp, values))
    np.testing.assert_array_equal(q_values(mdp, values)[-2:], 0.0)
    # Nor does what is claimed to come after them.
    np.testing.assert_array_equal(q_values(mdp, values.at[-1].set(9.0)), q_values(mdp, values))
    np.testing.assert_array_equal(advantages(mdp, values.at[-1].set(9.0)), advantages(mdp, values))


def test_advantages_of_the_best_policy_are_at_most_zero_and_of_any_policy_average_to_zero() -> None:
    mdp, policy = random_mdp(2), random_policy(2)
    best = np.asarray(advantages(mdp, optimal_values(mdp)))
    np.testing.assert_allclose(best.max(axis=1), 0.0, atol=1e-10)
    assert (best.min(axis=1)[:-2] < -0.01).all()
    own = np.asarray(advantages(mdp, policy_values(mdp, policy)))
    np.testing.assert_allclose((policy * own).sum(axis=1), 0.0, atol=1e-10)
    assert np.abs(own).max() > 0.1


def test_successor_features_times_weights_are_values() -> None:
    mdp, policy = random_mdp(3), random_policy(3)
    successors = successor_features(mdp, policy)
    successors_of_actions = successor_q_features(mdp, successors)
    for weights in np.random.default_rng(0).normal(size=(3, 4)):
        weighted = mdp.reweighted(weights)
        values = policy_values(weighted, policy)
        np.testing.assert_allclose(successors @ weights, values, atol=1e-10)
        np.testing.assert_allclose(successors_of_actions @ weights, q_values(weighted, values), atol=1e-10)
    np.testing.assert_array_equal(successors[-2:], 0.0)


def test_reweighting_changes_the_rewards_and_nothing_else() -> None:
    mdp = random_mdp(0)
    other = mdp.reweighted(np.array([0.0, 1.0, 0.0, 0.0]))
    np.testing.assert_array_equal(other.rewards, mdp.features[..., 1])
    assert other.replace(rewards=None) == mdp.replace(rewards=None)


def test_greedy_policies_share_between_ties() -> None:
    q = np.array([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0], [5.0, 5.0 - 1e-9, 4.9], [-1.0, -2.0, -3.0]])
    expected = [[0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0], [1, 0, 0]]
    np.testing.assert_allclose(greedy_policy(q), expected)
    np.testing.assert_allclose(greedy_policy(q, tolerance=0.0)[2], [1, 0, 0])
    np.testing.assert_allclose(greedy_policy(q, tolerance=0.2)[2], [1 / 3, 1 / 3, 1 / 3])
    np.testing.assert_allclose(greedy_policy(np.stack([q, q + 7])), [expected, expected])


def test_the_mean_return_is_over_first_states() -> None:
    mdp, policy = random_mdp(1), random_policy(1)
    assert float(mean_return(mdp, policy)) == pytest.approx(mdp.start @ iterate(mdp, policy), abs=1e-10)
    first = mdp.replace(start=np.eye(7)[2])
    assert float(mean_return(first, policy)) == pytest.approx(iterate(mdp, policy)[2], abs=1e-10)


def test_scaled_returns_are_one_for_the_best_and_zero_for_the_uniform_policy() -> None:
    mdp = random_mdp(4)
    best = greedy_policy(q_values(mdp, optimal_values(mdp)))
    worst = greedy_policy(-q_values(mdp, policy_values(mdp, uniform_policy(mdp))))
    assert float(scaled_return(mdp, best)) == pytest.approx(1.0, abs=1e-10)
    assert float(scaled_return(mdp, uniform_policy(mdp))) == 0.0
    assert float(scaled_return(mdp, worst)) < -0.1

    policy = random_policy(4)
    returns = [mdp.start @ iterate(mdp, each) for each in (policy, np.full((7, 3), 1 / 3), None)]
    expected = (returns[0] - returns[1]) / (returns[2] - returns[1])
    assert float(scaled_return(mdp, policy)) == pytest.approx(expected, abs=1e-9)
    richer = mdp.replace(rewards=7.0 * mdp.rewards)
    assert float(scaled_return(richer, policy)) == pytest.approx(expected, abs=1e-9)


def summary(mdp: TabularMDP) -> dict[str, jax.Array]:
    values, uniform = optimal_values(mdp), uniform_policy(mdp)
    greedy = greedy_policy(q_values(mdp, values))
    return {
        "values": values,
        "greedy": greedy,
        "advantages": advantages(mdp, values),
        "successors": successor_features(mdp, greedy),
        "return": mean_return(mdp, uniform),
        "scaled": scaled_return(mdp, 0.5 * greedy + 0.5 * uniform),
    }


def test_many_processes_at_once_are_solved_like_one_after_the_other() -> None:
    mdps = [random_mdp(seed, size, discount) for seed, size, discount in ((0, 5, 0.9), (1, 7, 0.99), (2, 5, 0.95))]
    many = stack(mdps)
    assert many.transitions.shape == (3, 7, 3, 7)
    np.testing.assert_array_equal(many.terminal.sum(axis=1), [2 + 2, 2, 2 + 2])
    np.testing.assert_array_equal(many.discount, [0.9, 0.99, 0.95])
    np.testing.assert_allclose(many.start.sum(axis=1), 1.0)
    together, alone = jax.jit(jax.vmap(summary))(many), jax.jit(summary)
    for index, mdp in enumerate(mdps):
        size = len(mdp.terminal)
        for name, expected in alone(mdp).items():
            found = together[name][index]
            np.testing.assert_allclose(found[:size] if found.ndim else found, expected, atol=1e-11)
        np.testing.assert_array_equal(together["values"][index, size:], 0.0)
        np.testing.assert_array_equal(together["successors"][index, size:], 0.0)


def test_processes_without_features_are_stacked_too() -> None:
    many = stack([chain(0.9), chain(0.5)])
    assert many.features is None
    np.testing.assert_allclose(jax.vmap(optimal_values)(many)[:, 0], [-2.71, -1.75], atol=1e-12)


@pytest.mark.parametrize("use", [successor_features, successor_q_features])
def test_without_features_there_are_no_successor_features(use: object) -> None:
    with pytest.raises(ValueError, match="no reward features"):
        use(chain(0.9), np.zeros((4, 2)))  # type: ignore[operator]
    with pytest.raises(ValueError, match="no reward features"):
        chain(0.9).reweighted(np.ones(6))


def test_single_precision_is_refused() -> None:
    mdp = chain(0.9)
    message = r"tabular values need float64: .* under `with jax.enable_x64\(True\):`\."
    with pytest.raises(ValueError, match=message):
        optimal_values(mdp.replace(rewards=mdp.rewards.astype(np.float32)))
    with pytest.raises(ValueError, match=message):
        policy_values(mdp.replace(discount=np.float32(0.9)), uniform_policy(mdp))
    with jax.enable_x64(False):
        for attempt, given in (
            (optimal_values, mdp),
            (jax.jit(optimal_values), mdp),
            (jax.vmap(optimal_values), stack([mdp])),
        ):
            with pytest.raises(ValueError, match=message):
                attempt(given)
        with pytest.raises(ValueError, match=message):
            q_values(mdp, np.zeros(4))


# The value by softmax


def softmax_value_in_numpy(values: np.ndarray, temperature: float) -> float:
    weights = np.exp((values - values.max()) / temperature)
    return float(weights @ values / weights.sum())


@pytest.mark.parametrize(("temperature", "published"), [(1.0, -1.127812), (0.1, -1.000990), (0.001, -1.000238)])
def test_softmax_values_are_the_published_ones(temperature: float, published: float) -> None:
    values = np.array([-3.0, -1.0, -1.002])
    expected = softmax_value_in_numpy(values, temperature)
    assert expected == pytest.approx(published, abs=5e-7)
    assert float(softmax_value(jnp.asarray(values), temperature)) == pytest.approx(expected, abs=1e-12)
    with jax.enable_x64(False):
        single = softmax_value(jnp.asarray(values, jnp.float32), temperature)
        assert single.dtype == jnp.float32
        assert float(single) == pytest.approx(expected, abs=1e-6)


def test_softmax_values_keep_batch_axes_and_reach_from_the_mean_to_the_maximum() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 5))
    expected = [[softmax_value_in_numpy(row, 0.7) for row in rows] for rows in values]
    np.testing.assert_allclose(softmax_value(jnp.asarray(values), 0.7), expected, atol=1e-12)
    across = softmax_value(jnp.moveaxis(jnp.asarray(values), -1, 0), 0.7, axis=0)
    np.testing.assert_allclose(across, expected, atol=1e-12)
    np.testing.assert_allclose(softmax_value(jnp.asarray(values), 1e6), values.mean(axis=-1), atol=1e-5)
    np.testing.assert_allclose(softmax_value(jnp.asarray(values), 1e-6), values.max(axis=-1), atol=1e-6)
    np.testing.assert_allclose(softmax_value(jnp.asarray(values) + 8.0, 0.7), np.add(expected, 8.0), atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_gradients_of_softmax_values_pass_through_both_factors(temperature: float) -> None:
    values = np.array([-3.0, -1.0, -1.3, 0.2])
    weights = np.exp((values - values.max()) / temperature)
    weights /= weights.sum()
    # Of sum_k p_k v_k: p_k from the values, and p_k (v_k - sum) / temperature from the weights.
    expected = weights * (1.0 + (values - weights @ values) / temperature)
    gradient = jax.grad(softmax_value)(jnp.asarray(values), temperature)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)
    assert np.abs(gradient - weights).max() > 1e-5
    steps = 1e-6 * np.eye(4)
    slopes = [
        (softmax_value_in_numpy(values + step, temperature) - softmax_value_in_numpy(values - step, temperature)) / 2e-6
        for step in steps
    ]
    np.testing.assert_allclose(gradient, slopes, atol=1e-7)


def test_candidates_that_do_not_count_change_nothing() -> None:
    values = np.array([[1.0, 2.0, np.inf, 1e9], [np.nan, -1.0, 0.5, 0.4]])
    where = np.array([[True, True, False, False], [False, True, True, False]])
    expected = [softmax_value_in_numpy(np.array(row), 0.3) for row in ([1.0, 2.0], [-1.0, 0.5])]
    found, pull = jax.vjp(lambda each: softmax_value(each, 0.3, jnp.asarray(where)), jnp.asarray(values))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    gradients = np.asarray(pull(jnp.ones(2))[0])
    np.testing.assert_array_equal(gradients[~where], 0.0)
    assert np.isfinite(gradients).all()
    assert (gradients[where] != 0).all()


def test_the_largest_value_is_subtracted_before_the_division() -> None:
    """At 1e4 neighbours in float32 are 1e-3 apart; of their quotients by 1e-3, float32 keeps whole numbers only."""
    values = (10_000.0 + np.arange(6) * 2.0**-10).astype(np.float32)
    temperature = np.float32(1.37e-3)
    gains = values.astype(np.float64) - 1e4
    weights = np.exp((gains - gains.max()) / temperature)
    weights /= weights.sum()
    expected = weights * (1.0 + (gains - weights @ gains) / temperature)

    def divided_first(each: jax.Array) -> jax.Array:
        return jnp.sum(jax.nn.softmax(each / temperature) * each)

    with jax.enable_x64(False):
        value, gradient = jax.value_and_grad(softmax_value)(jnp.asarray(values), temperature)
        np.testing.assert_allclose(gradient, expected, atol=1e-4)
        assert float(value) - 1e4 == pytest.approx(weights @ gains, abs=2.0**-10)
        assert np.abs(jax.grad(divided_first)(jnp.asarray(values)) - expected).max() > 0.01
        huge, slope = jax.value_and_grad(softmax_value)(jnp.asarray([-5e4, 5e4, 4.9e4], jnp.float32), temperature)
    assert float(huge) == 5e4
    np.testing.assert_array_equal(slope, [0.0, 1.0, 0.0])


# The policy for several groups

TASTES = np.array([[1.0, -2.0, 0.5, 3.0], [-1.0, 0.5, 2.0, -1.0], [0.0, 1.0, -1.0, 0.5]])
TOWN = Board.read("""
    c..s
    .h.:
    g.Cr
""")
TOWN_TASTES = np.array([[-1.0, 50.0, -50.0, 1.0, -1.0, -2.0], [-1.0, 5.0, -50.0, 4.0, -1.0, 1.0]])


def scaled_returns(mdp: TabularMDP, weights: np.ndarray, policy: np.ndarray) -> list[float]:
    """Of each group, by the other functions."""
    return [float(scaled_return(mdp.reweighted(each), jnp.asarray(policy))) for each in weights]


def best_of(mdp: TabularMDP, weights: np.ndarray) -> np.ndarray:
    weighted = mdp.reweighted(weights)
    return np.asarray(greedy_policy(q_values(weighted, optimal_values(weighted))))


def best_of_a_mixture(mdp: TabularMDP, weights: np.ndarray, shares: np.ndarray) -> float:
    """The greatest sum of shares * scaled returns: what any policy's least scaled return stays below."""
    uniform = uniform_policy(mdp)
    groups = [mdp.reweighted(each) for each in weights]
    worst = np.array([mean_return(group, uniform) for group in groups])
    gaps = np.array([mdp.start @ np.asarray(optimal_values(group)) for group in groups]) - worst
    mixture = mdp.reweighted((shares / gaps) @ weights)
    return float(mdp.start @ np.asarray(optimal_values(mixture)) - shares @ (worst / gaps))


def mixture_of_two(mdp: TabularMDP, weights: np.ndarray, share: float) -> float:
    return best_of_a_mixture(mdp, weights, np.array([share, 1 - share]))


def test_one_group_is_served_by_an_optimal_policy() -> None:
    for mdp, weights in ((random_mdp(0), TASTES[0]), (to_mdp(TOWN, 0.999), TOWN_TASTES[0])):
        found = maximin_policy(mdp, weights[None])
        weighted = mdp.reweighted(weights)
        best = mdp.start @ np.asarray(optimal_values(weighted))
        assert float(mean_return(weighted, found.policy)) == pytest.approx(best, abs=1e-7)
        np.testing.assert_allclose(found.scaled_returns, [1.0], atol=1e-8)
        np.testing.assert_allclose(found.policy.sum(axis=1), 1.0)


@pytest.mark.parametrize("discount", [0.9, 0.999])
def test_no_policy_serves_the_least_served_of_two_groups_better(discount: float) -> None:
    for mdp, weights in ((random_mdp(1, discount=discount), TASTES[:2]), (to_mdp(TOWN, discount), TOWN_TASTES)):
        policy, returns = maximin_policy(mdp, weights)
        np.testing.assert_allclose(returns, scaled_returns(mdp, weights, policy), atol=1e-9)
        for other in (*weights, weights.mean(axis=0)):
            assert returns.min() >= min(scaled_returns(mdp, weights, best_of(mdp, other))) - 1e-7
        # No mixture of the groups' rewards can be worth less, and by strong duality one is worth just as much.
        worth = partial(mixture_of_two, mdp, weights)
        assert min(map(worth, np.linspace(0, 1, 9))) >= returns.min() - 1e-7
        least = minimize_scalar(worth, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-7}).fun
        assert least == pytest.approx(returns.min(), abs=1e-4)


def test_no_mixture_of_three_groups_is_worth_less_than_the_least_served() -> None:
    mdp = random_mdp(2)
    policy, returns = maximin_policy(mdp, TASTES)
    np.testing.assert_allclose(returns, scaled_returns(mdp, TASTES, policy), atol=1e-9)
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 20)
    assert min(best_of_a_mixture(mdp, TASTES, each) for each in shares) >= returns.min() - 1e-7
    assert returns.min() > min(scaled_returns(mdp, TASTES, best_of(mdp, TASTES.mean(axis=0)))) + 0.01


def opposite_tastes() -> TabularMDP:
    """One state for ever and two actions, each with a feature of its own."""
    return TabularMDP(
        transitions=np.ones((1, 2, 1)),
        rewards=np.zeros((1, 2)),
        start=np.ones(1),
        terminal=np.zeros(1, bool),
        discount=np.asarray(0.9),
        features=np.eye(2)[None],
    )


def test_opposite_tastes_are_each_served_half_the_time() -> None:
    """Whatever the scales of their rewards. What one gains the other loses, so any baseline is its own best."""
    mdp = opposite_tastes()
    found = maximin_policy(mdp, np.array([[1.0, 0.0], [0.0, 100.0]]))
    np.testing.assert_allclose(found.policy, [[0.5, 0.5]], atol=1e-9)
    np.testing.assert_allclose(found.scaled_returns, [0.0, 0.0], atol=1e-9)
    baseline = np.array([[0.25, 0.75]])
    policy, returns = maximin_policy(mdp, np.array([[1.0, 0.0], [0.0, 1.0]]), baseline)
    np.testing.assert_allclose(policy, baseline, atol=1e-9)
    np.testing.assert_allclose(returns, [0.0, 0.0], atol=1e-9)


def test_a_third_way_that_both_like_well_enough_is_taken() -> None:
    """Actions earn (1, 0), (0, 1) and (0.8, 0.8); chance earns 0.6 of either, so the third scales to 1/2."""
    mdp = opposite_tastes().replace(
        transitions=np.ones((1, 3, 1)), rewards=np.zeros((1, 3)), features=np.array([[[1, 0], [0, 1], [0.8, 0.8]]])
    )
    policy, returns = maximin_policy(mdp, np.array([[1.0, 0.0], [0.0, 5.0]]))
    np.testing.assert_allclose(policy, [[0.0, 0.0, 1.0]], atol=1e-9)
    np.testing.assert_allclose(returns, [0.5, 0.5], atol=1e-9)


def test_states_that_are_never_visited_are_left_to_chance() -> None:
    """Only the last cell before the goal is where episodes start."""
    board = to_mdp(CORRIDOR, 0.9)
    mdp = board.replace(start=np.array([0.0, 0.0, 1.0, 0.0]))
    policy, returns = maximin_policy(mdp, TOWN_TASTES[:1])
    np.testing.assert_allclose(policy, [[0.25] * 4, [0.25] * 4, [0, 0, 0, 1], [0.25] * 4], atol=1e-9)
    np.testing.assert_allclose(returns, [1.0], atol=1e-9)


def test_what_a_terminal_state_says_does_not_count_for_groups_either() -> None:
    mdp, other = random_mdp(0), random_mdp(1)
    junk = mdp.replace(
        features=np.where(mdp.terminal[:, None, None], 1e6, mdp.features),
        transitions=np.where(mdp.terminal[:, None, None], other.transitions, mdp.transitions),
    )
    expected, found = maximin_policy(mdp, TASTES[:2]), maximin_policy(junk, TASTES[:2])
    np.testing.assert_allclose(found.scaled_returns, expected.scaled_returns, atol=1e-9)


def test_the_policy_for_groups_needs_no_double_precision_around_it() -> None:
    expected = maximin_policy(random_mdp(0), TASTES[:2])
    with jax.enable_x64(False):
        found = maximin_policy(random_mdp(0), TASTES[:2])
    assert isinstance(found.policy, np.ndarray)
    assert found.policy.dtype == found.scaled_returns.dtype == np.float64
    np.testing.assert_array_equal(found.policy, expected.policy)


def test_a_group_that_nothing_pleases_is_named() -> None:
    with pytest.raises(ValueError, match="no policy serves group 1 better than the baseline"):
        maximin_policy(random_mdp(0), np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="no reward features"):
        maximin_policy(chain(0.9), np.ones((1, 4)))
