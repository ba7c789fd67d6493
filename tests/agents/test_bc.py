"""Behaviour cloning against its formula, and against problems whose right policy is known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from agents.bc import BCAgent, BCConfig
from robopref.agent import update_many
from robopref.datasets import TransitionDataset, best_episodes, fit_normalizer
from robopref.networks import Normalizer
from robopref.types import Preferences, Segments, Transitions

OBSERVATIONS, ACTIONS = 3, 2
LABELS = np.array([0.0, 1.0, 0.5, 0.2, 0.9], np.float32)
KEPT = np.array([[1, 0], [0, 1], [1, 1], [1, 0], [0, 1]], np.float32)
"""Which segments of each pair are cloned: the preferred one, and both in a tie."""


class Rows(struct.PyTreeNode):
    """A dataset that draws from the rows of one large batch."""

    batch: Any

    def sample(self, key: jax.Array, batch_size: int) -> Any:
        count = jax.tree.leaves(self.batch)[0].shape[0]
        return jax.tree.map(lambda leaf: leaf[jax.random.randint(key, (batch_size,), 0, count)], self.batch)


def transitions(observations: Any, actions: Any) -> Transitions:
    observations, actions = jnp.asarray(observations, jnp.float32), jnp.asarray(actions, jnp.float32)
    zeros = jnp.zeros(observations.shape[:-1])
    return Transitions(observations, actions, zeros, observations, zeros.astype(bool))


def pairs(labels: np.ndarray, seed: int = 0, steps: int = 4) -> Preferences:
    rng = np.random.default_rng(seed)
    segments = Segments(
        observations=jnp.asarray(rng.normal(size=(len(labels), 2, steps, OBSERVATIONS)), jnp.float32),
        actions=jnp.asarray(rng.uniform(-1, 1, (len(labels), 2, steps, ACTIONS)), jnp.float32),
    )
    return Preferences(segments, jnp.asarray(labels, jnp.float32))


def create(example: Any, seed: int = 0, normalizer: Normalizer | None = None, **changes: Any) -> BCAgent:
    config = BCConfig(**{"hidden_dims": (16,), **changes})
    return BCAgent.create(config, example, jax.random.key(seed), normalizer=normalizer)


def at(agent: BCAgent, step: int) -> BCAgent:
    return agent.replace(step=jnp.asarray(step, jnp.int32))


def loss(agent: BCAgent, batch: Any) -> float:
    return float(agent.loss(agent.params, batch, jax.random.key(0))[0])


def squared_errors(agent: BCAgent, steps: Transitions | Segments) -> np.ndarray:
    """||a - mu(s)||^2 of every step, from the policy's own means."""
    return np.square(np.asarray(steps.actions) - np.asarray(agent.act(steps.observations))).sum(axis=-1)


def test_the_loss_on_transitions_is_the_mean_squared_error_summed_over_action_dimensions():
    rng = np.random.default_rng(0)
    batch = transitions(rng.normal(size=(9, OBSERVATIONS)), rng.uniform(-1, 1, (9, ACTIONS)))
    agent = create(batch)
    np.testing.assert_allclose(loss(agent, batch), squared_errors(agent, batch).mean(), rtol=1e-5)
    assert agent.act(batch.observations).shape == (9, ACTIONS)


@pytest.mark.parametrize(("step", "pretraining"), [(0, True), (4, True), (5, False), (99, False)])
def test_sft_clones_everything_first_and_then_what_was_preferred(step: int, pretraining: bool):
    batch = pairs(LABELS)
    agent = at(create(batch, pretrain_updates=5), step)
    weights = np.ones_like(KEPT) if pretraining else KEPT
    errors = squared_errors(agent, batch.segments)
    expected = (weights[..., None] * errors).sum() / (weights.sum() * errors.shape[-1])
    np.testing.assert_allclose(loss(agent, batch), expected, rtol=1e-5)


def test_sft_without_pretraining_clones_the_preferred_from_the_start():
    batch = pairs(np.array([0.0, 1.0]))
    agent = create(batch)
    errors = squared_errors(agent, batch.segments)
    np.testing.assert_allclose(loss(agent, batch), (errors[0, 0].mean() + errors[1, 1].mean()) / 2, rtol=1e-5)


def test_what_was_not_preferred_has_no_influence():
    batch = pairs(LABELS)
    agent = create(batch)
    other = pairs(LABELS, seed=1).segments
    kept = jnp.asarray(KEPT, bool)[..., None, None]
    mixed = jax.tree.map(lambda mine, others: jnp.where(kept, mine, others), batch.segments, other)
    gradients = [
        jax.grad(agent.loss, has_aux=True)(agent.params, each, jax.random.key(0))[0]
        for each in (batch, batch.replace(segments=mixed))
    ]
    assert jax.tree.all(jax.tree.map(lambda one, two: np.allclose(one, two, atol=1e-7), *gradients))


def test_the_policy_sees_normalised_observations():
    batch = transitions(np.full((1, OBSERVATIONS), 5.0), np.zeros((1, ACTIONS)))
    normalizer = Normalizer(mean=jnp.full(OBSERVATIONS, 3.0), std=jnp.full(OBSERVATIONS, 4.0))
    plain = create(batch)
    normalised = create(batch, normalizer=normalizer)
    observations = jnp.asarray(np.random.default_rng(0).normal(size=(6, OBSERVATIONS)), jnp.float32)
    np.testing.assert_allclose(normalised.act(observations), plain.act((observations - 3) / 4), atol=1e-6)
    rows = transitions(observations, np.zeros((6, ACTIONS)))
    scaled = transitions((observations - 3) / 4, np.zeros((6, ACTIONS)))
    np.testing.assert_allclose(loss(normalised, rows), loss(plain, scaled), rtol=1e-5)


def test_the_noise_of_sampled_actions_has_the_stated_size():
    batch = transitions(np.zeros((1, OBSERVATIONS)), np.zeros((1, ACTIONS)))
    agent = create(batch, action_noise=0.2)
    agent = agent.replace(params=jax.tree.map(jnp.zeros_like, agent.params))
    actions = np.asarray(agent.sample_actions(jnp.zeros((20_000, OBSERVATIONS)), jax.random.key(0)))
    # The standard deviation of 40,000 draws is known to about 0.35%; nothing within 5 of them is clipped.
    np.testing.assert_allclose(actions.std(), 0.2, rtol=0.02)
    np.testing.assert_allclose(actions.mean(), 0, atol=5e-3)


def linear_problem(seed: int, count: int) -> Transitions:
    rng = np.random.default_rng(seed)
    observations = rng.uniform(-1, 1, (count, OBSERVATIONS))
    gain = np.array([[0.3, -0.2], [0.1, 0.4], [-0.4, 0.2]])
    return transitions(observations, observations @ gain + 0.05)


def test_a_linear_policy_is_learned_and_holds_where_it_was_not_shown():
    data, unseen = linear_problem(0, 500), linear_problem(1, 200)
    agent = create(data, hidden_dims=(32,), learning_rate=3e-3, decay_updates=600)
    before = squared_errors(agent, unseen).mean()
    agent, _ = update_many(agent, Rows(data), jax.random.key(0), num_updates=600, batch_size=64)
    after = squared_errors(agent, unseen).mean()
    assert before > 0.1
    assert after < 1e-3


def test_sft_moves_from_the_mean_of_all_actions_to_the_preferred_one():
    """In every pair one segment acts 0.6 throughout and the other -0.2: their mean is 0.2."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200).astype(np.float32)
    preferred = np.stack([labels == 0, labels == 1], axis=1)
    actions = np.where(preferred[..., None, None], 0.6, -0.2) * np.ones((200, 2, 4, ACTIONS))
    observations = rng.normal(size=(200, 2, 4, OBSERVATIONS))
    data = Preferences(
        Segments(jnp.asarray(observations, jnp.float32), jnp.asarray(actions, jnp.float32)), jnp.asarray(labels)
    )
    agent = create(data, learning_rate=5e-3, pretrain_updates=300)
    places = jnp.asarray(rng.normal(size=(50, OBSERVATIONS)), jnp.float32)
    for expected in (0.2, 0.6):
        agent, _ = update_many(agent, Rows(data), jax.random.key(0), num_updates=300, batch_size=64)
        np.testing.assert_allclose(np.asarray(agent.act(places)).mean(), expected, atol=0.05)


def test_cloning_the_best_episodes_gives_a_better_policy_than_cloning_all(dataset, episodes, point):
    """The skilled episodes of the point's task are the better half, and act nearly as its expert does."""
    assert {dataset.origins[i]["behaviour"] for i in best_episodes(dataset, 0.25)} == {"skilled"}
    observations = np.concatenate([episode.observations[:-1] for episode in episodes])
    wanted = point.expert.step(None, observations)[0]
    errors = {}
    for name, chosen in {"all": None, "best": best_episodes(dataset, 0.5)}.items():
        data = TransitionDataset.create(dataset, chosen)
        agent = create(data.take(jnp.arange(2)), normalizer=fit_normalizer(dataset), learning_rate=3e-3)
        agent, _ = update_many(agent, data, jax.random.key(0), num_updates=400, batch_size=32)
        acted = np.asarray(agent.act(jnp.asarray(observations, jnp.float32)))
        errors[name] = np.square(acted - wanted).sum(axis=-1).mean()
    assert errors["best"] < 0.6 * errors["all"]


@jax.jit
def update(agent: BCAgent, batch: Any) -> BCAgent:
    return agent.update(batch, jax.random.key(0))[0]


def moved(agent: BCAgent, batch: Any) -> tuple[BCAgent, float]:
    """The agent after an update, and the largest change of a parameter."""
    after = update(agent, batch)
    changes = jax.tree.map(lambda old, new: np.abs(np.asarray(new) - old).max(), agent.params, after.params)
    return after, max(jax.tree.leaves(changes))


def test_the_learning_rate_falls_along_a_cosine_to_zero():
    """Adam's first steps along a gradient that does not change are as long as the learning rate."""
    batch = transitions(np.ones((4, OBSERVATIONS)), np.ones((4, ACTIONS)))
    agent, steps = create(batch, learning_rate=1e-4, decay_updates=8), []
    for _ in range(10):
        agent, step = moved(agent, batch)
        steps.append(step)
    expected = 1e-4 * (1 + np.cos(np.pi * np.arange(8) / 8)) / 2
    np.testing.assert_allclose(steps[:8], expected, rtol=0.02, atol=1e-7)
    assert steps[8:] == [0, 0]


def test_without_decay_the_learning_rate_stays():
    batch = transitions(np.ones((4, OBSERVATIONS)), np.ones((4, ACTIONS)))
    agent, steps = create(batch, learning_rate=1e-4), []
    for _ in range(10):
        agent, step = moved(agent, batch)
        steps.append(step)
    np.testing.assert_allclose(steps, 1e-4, rtol=0.02)


def test_dropout_is_active_in_updates_and_absent_in_actions():
    batch = pairs(LABELS)
    agent = create(batch, dropout=0.5)
    first, second = (float(agent.loss(agent.params, batch, jax.random.key(seed))[0]) for seed in (0, 1))
    assert first != second
    np.testing.assert_array_equal(
        agent.act(batch.segments.observations), create(batch).act(batch.segments.observations)
    )
