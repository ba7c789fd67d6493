"""Implicit Q-learning against its formulas, and against values and best actions that are known."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from agents.iql import IQLAgent, IQLConfig
from robopref.agent import update_many
from robopref.networks import Normalizer, Pixels
from robopref.types import Segments, Transitions

OBSERVATIONS, ACTIONS, COUNT = 3, 2, 7
PARTS = ("critics", "encoder", "policy", "value")
NORMALIZER = Normalizer(mean=jnp.array([0.5, -1.0, 0.0]), std=jnp.array([2.0, 1.0, 0.5]))
PIXELS = Pixels(filters=4, strides=(2,), features=5, shift=1)


def random_transitions(*shape: int, seed: int = 0) -> Transitions:
    """Of observations of this shape."""
    rng = np.random.default_rng(seed)
    before, after = rng.uniform(0, 255, (2, COUNT, *shape)) if len(shape) > 1 else rng.normal(size=(2, COUNT, *shape))
    return Transitions(
        observations=jnp.asarray(before, jnp.float32),
        actions=jnp.asarray(rng.uniform(-1, 1, (COUNT, ACTIONS)), jnp.float32),
        rewards=jnp.asarray(rng.normal(size=COUNT), jnp.float32),
        next_observations=jnp.asarray(after, jnp.float32),
        terminated=jnp.asarray(rng.integers(0, 2, COUNT), bool),
    )


def create(example: Any, seed: int = 0, normalizer: Normalizer | None = None, **changes: Any) -> IQLAgent:
    config = IQLConfig(**{"hidden_dims": (16,), **changes})
    return IQLAgent.create(config, example, jax.random.key(seed), normalizer=normalizer)


@jax.jit
def evaluate(agent: IQLAgent, batch: Transitions, key: jax.Array) -> Any:
    return agent.loss(agent.params, batch, key)


def loss(agent: IQLAgent, batch: Transitions, seed: int = 0) -> tuple[float, dict[str, float]]:
    value, metrics = evaluate(agent, batch, jax.random.key(seed))
    return float(value), {name: float(metric) for name, metric in metrics.items()}


@jax.jit
def update(agent: IQLAgent, batch: Transitions) -> tuple[IQLAgent, Any]:
    return agent.update(batch, jax.random.key(0))


def network(params: Any, inputs: np.ndarray) -> np.ndarray:
    """One hidden layer, in float64."""
    first, second = (
        {name: np.asarray(leaf, np.float64) for name, leaf in params[layer].items()} for layer in ("Dense_0", "Dense_1")
    )
    hidden = np.maximum(inputs @ first["kernel"] + first["bias"], 0)
    return hidden @ second["kernel"] + second["bias"]


def least_q(params: Any, inputs: np.ndarray, members: int) -> tuple[np.ndarray, np.ndarray]:
    """Of all members, and the least."""
    (ensemble,) = params.values()
    every = [network(jax.tree.map(lambda leaf, i=i: leaf[i], ensemble), inputs)[:, 0] for i in range(members)]
    return np.stack(every), np.min(every, axis=0)


@pytest.mark.parametrize(
    ("members", "expectile", "temperature", "max_weight"), [(2, 0.7, 0.3333, 100.0), (3, 0.9, 2.0, 0.8)]
)
def test_the_losses_are_the_formulas(members: int, expectile: float, temperature: float, max_weight: float):
    batch = random_transitions(OBSERVATIONS)
    changes = {"critics": members, "expectile": expectile, "temperature": temperature, "max_weight": max_weight}
    agent = create(batch, normalizer=NORMALIZER, discount=0.8, action_limit=0.5, **changes)
    agent = agent.replace(target_params=create(batch, seed=1, **changes).target_params)

    now, following = (
        (np.asarray(o) - NORMALIZER.mean) / NORMALIZER.std for o in (batch.observations, batch.next_observations)
    )
    actions, steps = np.asarray(batch.actions), np.concatenate([now, batch.actions], axis=-1)
    values, next_values = (network(agent.params["value"]["MLP_0"], o)[:, 0] for o in (now, following))
    advantages = least_q(agent.target_params, steps, members)[1] - values
    value_loss = np.mean(np.abs(expectile - (advantages < 0)) * advantages**2)
    targets = np.asarray(batch.rewards) + 0.8 * np.where(batch.terminated, 0, next_values)
    critic_loss = np.square(least_q(agent.params["critics"], steps, members)[0] - targets).mean(axis=1).sum()
    means = np.tanh(network(agent.params["policy"]["MLP_0"], now))
    errors = np.square(np.clip(actions, -0.5, 0.5) - means).sum(axis=-1)
    weights = np.minimum(np.exp(advantages / temperature), max_weight)
    assert (weights == max_weight).any() == (max_weight < 1)

    total, metrics = loss(agent, batch)
    np.testing.assert_allclose(metrics["value/loss"], value_loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["critic/loss"], critic_loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["policy/loss"], np.mean(weights * errors), rtol=1e-4)
    np.testing.assert_allclose(total, value_loss + critic_loss + np.mean(weights * errors), rtol=1e-4)
    np.testing.assert_allclose(agent.act(batch.observations), means, rtol=1e-4, atol=1e-6)
    q_values = least_q(agent.params["critics"], steps, members)[1]
    np.testing.assert_allclose(agent.q_values(batch.observations, batch.actions), q_values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(agent.values(batch.observations), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(OBSERVATIONS,), (9, 9, 3)], ids=["vectors", "images"])
def test_each_loss_changes_its_own_part_and_the_encoder_is_the_policys(shape: tuple[int, ...]):
    batch = random_transitions(*shape)
    agent = create(batch, pixels=PIXELS if len(shape) > 1 else None)

    @jax.jit
    @jax.grad
    def gradient(params: Any, weights: jax.Array) -> jax.Array:
        _, metrics = agent.loss(params, batch, jax.random.key(0))
        return weights @ jnp.stack([metrics[f"{name}/loss"] for name in ("critic", "value", "policy")])

    moved = []
    for weights in jnp.eye(3):
        gradients = gradient(agent.params, weights)
        moved.append({part for part in PARTS if any(np.any(leaf) for leaf in jax.tree.leaves(gradients[part]))})
    assert moved == [{"critics"}, {"value"}, {"policy", "encoder"} if len(shape) > 1 else {"policy"}]


def test_the_targets_follow_the_critics_slowly():
    batch = random_transitions(OBSERVATIONS)
    agent = create(batch, target_update_rate=0.1, learning_rate=1e-2)
    for _ in range(2):
        after, _ = update(agent, batch)
        expected = jax.tree.map(lambda old, new: old + 0.1 * (new - old), agent.target_params, after.params["critics"])
        for leaf, wanted in zip(jax.tree.leaves(after.target_params), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-7)
        agent = after


def test_only_the_policys_learning_rate_falls():
    batch = random_transitions(OBSERVATIONS)
    agent = create(batch, decay_updates=10)
    sizes = []
    for step in (0, 5, 10, 11):
        after, _ = update(agent.replace(step=jnp.asarray(step, jnp.int32)), batch)
        moved = jax.tree.map(lambda old, new: np.abs(new - old).max(), agent.params, after.params)
        sizes.append([max(jax.tree.leaves(moved[part])) for part in ("policy", "critics", "value")])
    # Adam's first step is the learning rate along every axis.
    expected = [[rate, 3e-4, 3e-4] for rate in (3e-4, 1.5e-4, 0, 0)]
    np.testing.assert_allclose(sizes, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("shape", [(OBSERVATIONS,), (9, 9, 3)], ids=["vectors", "images"])
def test_an_update_on_segments_is_one_on_their_steps(shape: tuple[int, ...]):
    rng = np.random.default_rng(0)
    observations = jnp.asarray(255 * rng.uniform(size=(2, 2, 5, *shape)), jnp.float32)
    segments = Segments(observations, jnp.asarray(rng.uniform(-1, 1, (2, 2, 5, ACTIONS)), jnp.float32))
    rewards = jnp.asarray(rng.normal(size=(2, 2, 5)), jnp.float32)
    flat = Transitions(
        observations=observations[:, :, :-1].reshape(16, *shape),
        actions=segments.actions[:, :, :-1].reshape(16, ACTIONS),
        rewards=rewards[:, :, :-1].reshape(16),
        next_observations=observations[:, :, 1:].reshape(16, *shape),
        terminated=jnp.zeros(16, bool),
    )
    agent = create(flat, pixels=Pixels(4, (2,), 5, shift=0) if len(shape) > 1 else None)
    key = jax.random.key(0)
    one, metrics = jax.jit(lambda agent: agent.update_on_segments(segments, rewards, key))(agent)
    other, expected = update(agent, flat)
    for name in ("critic/loss", "value/loss", "policy/loss"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4)
    for leaf, wanted in zip(jax.tree.leaves(one.opt_state.mu), jax.tree.leaves(other.opt_state.mu), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max() + 1e-9)


def test_an_image_and_its_successor_are_shifted_alike():
    """With one transition and shifts by at most 1, the loss is that of one of the 9 shifts of both."""
    batch = jax.tree.map(lambda leaf: leaf[:1], random_transitions(9, 9, 3)).replace(terminated=jnp.zeros(1, bool))
    agent, still = (create(batch, pixels=Pixels(4, (2,), 5, shift)) for shift in (1, 0))

    def shifted(images: jax.Array, y: int, x: int) -> np.ndarray:
        return np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")[:, y : y + 9, x : x + 9]

    def losses(first: tuple[int, int], second: tuple[int, int]) -> float:
        moved = batch.replace(
            observations=shifted(batch.observations, *first),
            next_observations=shifted(batch.next_observations, *second),
        )
        return loss(still, moved)[1]["critic/loss"]

    every = list(itertools.product(range(3), repeat=2))
    alike = np.array([losses(shift, shift) for shift in every])
    apart = np.array([losses((1, 1), shift) for shift in every if shift != (1, 1)])
    found = np.array([loss(agent, batch, seed)[1]["critic/loss"] for seed in range(20)])
    nearest = np.abs(found[:, None] - alike).argmin(axis=1)
    np.testing.assert_allclose(found, alike[nearest], rtol=1e-5)
    assert len(set(nearest)) > 4
    assert np.abs(apart[:, None] / alike - 1).min() > 1e-4


def test_dropout_is_the_policys_alone_and_acts_in_training_only():
    batch = random_transitions(OBSERVATIONS)
    agent = create(batch, dropout=0.5)
    first, second = (loss(agent, batch, seed)[1] for seed in (0, 1))
    assert first["policy/loss"] != second["policy/loss"]
    assert (first["critic/loss"], first["value/loss"]) == (second["critic/loss"], second["value/loss"])
    np.testing.assert_array_equal(agent.act(batch.observations), create(batch).act(batch.observations))


def test_a_segments_score_is_its_log_likelihood():
    rng = np.random.default_rng(0)
    observations = jnp.asarray(rng.normal(size=(4, 2, 5, OBSERVATIONS)), jnp.float32)
    segments = Segments(observations, jnp.asarray(rng.uniform(-1, 1, (4, 2, 5, ACTIONS)), jnp.float32))
    agent = create(random_transitions(OBSERVATIONS))
    expected = -np.square(np.asarray(segments.actions) - agent.act(observations)).sum(axis=(-2, -1))
    np.testing.assert_allclose(agent.segment_scores(segments), expected, rtol=1e-5)


# A corridor of three states, each with two actions: on, and stay. Going on from the last state pays 1 and ends the
# episode. The data have each action as often in each state.

STATES, DISCOUNT, SIZE = 3, 0.8, 0.7


class Corridor(struct.PyTreeNode):
    """A dataset of all transitions of the corridor; `sample` draws them with equal probability."""

    def sample(self, key: jax.Array, batch_size: int) -> Transitions:
        state, on = jax.random.randint(key, (2, batch_size), 0, jnp.array([[STATES], [2]]))
        ends = (on == 1) & (state == STATES - 1)
        return Transitions(
            observations=jax.nn.one_hot(state, STATES),
            actions=jnp.where(on == 1, SIZE, -SIZE)[:, None],
            rewards=ends.astype(jnp.float32),
            next_observations=jax.nn.one_hot(jnp.minimum(state + on, STATES - 1), STATES),
            terminated=ends,
        )


def corridor_values(expectile: float) -> tuple[np.ndarray, np.ndarray]:
    """V [S] and Q [S, (stay, on)] of IQL's fixed point, by iteration: V is the expectile of the two actions' Q."""
    values = np.zeros(STATES)
    for _ in range(1000):
        on = np.append(DISCOUNT * values[1:], 1.0)
        q_values = np.stack([DISCOUNT * values, on], axis=1)
        # The expectile of two equally frequent numbers weighs the greater by itself.
        values = expectile * q_values.max(axis=1) + (1 - expectile) * q_values.min(axis=1)
    return values, q_values


def trained(expectile: float, **changes: Any) -> IQLAgent:
    example = Corridor().sample(jax.random.key(0), 2)
    rates = {"learning_rate": 3e-3, "target_update_rate": 0.05}
    agent = create(example, hidden_dims=(32,), expectile=expectile, discount=DISCOUNT, **rates, **changes)
    agent, _ = update_many(agent, Corridor(), jax.random.key(1), num_updates=1500, batch_size=64)
    return agent


def learned(agent: IQLAgent) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """V [S], Q [S, (stay, on)] and the policy's actions [S]."""
    states = jnp.eye(STATES)
    q_values = [agent.q_values(states, jnp.full((STATES, 1), action)) for action in (-SIZE, SIZE)]
    return np.asarray(agent.values(states)), np.stack(q_values, axis=1), np.asarray(agent.act(states))[:, 0]


def test_values_and_policy_of_a_corridor_are_right():
    values, q_values, actions = learned(trained(0.9, temperature=0.05))
    expected_values, expected_q = corridor_values(0.9)
    np.testing.assert_allclose(values, expected_values, atol=0.05)
    np.testing.assert_allclose(q_values, expected_q, atol=0.05)
    # Q* itself: 0.8 per step that is left.
    best = DISCOUNT ** np.arange(STATES)[::-1]
    np.testing.assert_allclose(q_values[:, 1], best, atol=0.15)
    # The mean of the data's two actions, by their weights.
    odds = np.exp((expected_q[:, 1] - expected_q[:, 0]) / 0.05)
    np.testing.assert_allclose(actions, SIZE * (odds - 1) / (odds + 1), atol=0.25)
    assert (actions > 0.5 * SIZE).all()


def test_at_an_expectile_of_one_half_the_values_are_those_of_the_data():
    """Of the policy that made them, by its Bellman equation, and far below those of the best policy."""
    transitions = np.zeros((STATES, STATES))
    for state in range(STATES):
        transitions[state, state] = 0.5
        if state + 1 < STATES:
            transitions[state, state + 1] = 0.5
    rewards = np.array([0.0] * (STATES - 1) + [0.5])
    expected = np.linalg.solve(np.eye(STATES) - DISCOUNT * transitions, rewards)
    np.testing.assert_allclose(corridor_values(0.5)[0], expected, rtol=1e-6)
    values, _, _ = learned(trained(0.5))
    np.testing.assert_allclose(values, expected, atol=0.05)
    assert (values < DISCOUNT ** np.arange(STATES)[::-1] - 0.1).all()


def test_a_hot_policy_is_a_clone_of_the_data():
    """At a high temperature all weights are 1, and the mean of the two actions is 0."""
    np.testing.assert_allclose(learned(trained(0.9, temperature=1e3))[2], 0, atol=0.1)
