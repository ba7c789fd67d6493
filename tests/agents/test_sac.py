"""Soft actor-critic against a re-computation in NumPy, and on problems whose values are known."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from agents.sac import SACAgent, SACConfig, tanh_gaussian_log_probability
from robopref.agent import update_many
from robopref.networks import Normalizer
from robopref.types import Transitions

OBSERVATIONS, ACTIONS, BATCH = 3, 2, 6
NORMALIZER = Normalizer(mean=jnp.asarray([0.5, -1.0, 0.0]), std=jnp.asarray([2.0, 0.5, 1.0]))


class Rows(struct.PyTreeNode):
    """A dataset that draws from the rows of one large batch."""

    batch: Any

    def sample(self, key: jax.Array, batch_size: int) -> Any:
        count = jax.tree.leaves(self.batch)[0].shape[0]
        return jax.tree.map(lambda leaf: leaf[jax.random.randint(key, (batch_size,), 0, count)], self.batch)


def some_batch(seed: int = 0, batch: int = BATCH) -> Transitions:
    rng = np.random.default_rng(seed)
    return Transitions(
        observations=jnp.asarray(rng.normal(size=(batch, OBSERVATIONS)), jnp.float32),
        actions=jnp.asarray(rng.uniform(-1, 1, (batch, ACTIONS)), jnp.float32),
        rewards=jnp.asarray(rng.normal(size=batch), jnp.float32),
        next_observations=jnp.asarray(rng.normal(size=(batch, OBSERVATIONS)), jnp.float32),
        terminated=jnp.asarray(np.arange(batch) % 3 == 0),
    )


def create(seed: int = 0, normalizer: Normalizer | None = None, **changes: Any) -> SACAgent:
    config = SACConfig(**{"hidden_dims": (8, 7), **changes})
    return SACAgent.create(config, some_batch(), jax.random.key(seed), normalizer=normalizer)


@functools.cache
def trained(layer_norm: bool = False) -> SACAgent:
    """Some updates on, so that the targets differ from the critics; with layer normalisation, of three critics."""
    shape = {"layer_norm": layer_norm, "critics": 3 if layer_norm else 2}
    agent = create(normalizer=NORMALIZER, target_update_rate=0.2, learning_rate=1e-2, **shape)
    return update_many(agent, Rows(some_batch(1, 20)), jax.random.key(2), num_updates=10, batch_size=5)[0]


def configured(agent: SACAgent, **changes: Any) -> SACAgent:
    """The same numbers under another configuration."""
    return agent.replace(config=dataclasses.replace(agent.config, **changes))


@jax.jit
def update(agent: SACAgent, batch: Transitions, key: jax.Array) -> tuple[SACAgent, Any]:
    return agent.update(batch, key)


# The same in NumPy.


def dense(params: Any, inputs: np.ndarray) -> np.ndarray:
    return inputs @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


def norm(params: Any, inputs: np.ndarray) -> np.ndarray:
    centred = inputs - inputs.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-6)
    return scaled * np.asarray(params["scale"], np.float64) + np.asarray(params["bias"], np.float64)


def network(params: Any, inputs: np.ndarray) -> np.ndarray:
    hidden = dense(params["Dense_0"], inputs)
    for layer in (0, 1):
        if f"LayerNorm_{layer}" in params:
            hidden = norm(params[f"LayerNorm_{layer}"], hidden)
        hidden = dense(params[f"Dense_{layer + 1}"], np.maximum(hidden, 0))
    return hidden


def normalized(observations: Any) -> np.ndarray:
    return (np.asarray(observations, np.float64) - np.asarray(NORMALIZER.mean)) / np.asarray(NORMALIZER.std)


def critics(params: Any, observations: Any, actions: Any) -> np.ndarray:
    """[E, B]."""
    inputs = np.concatenate([normalized(observations), np.asarray(actions, np.float64)], axis=-1)
    count = jax.tree.leaves(params)[0].shape[0]
    return np.stack([network(jax.tree.map(lambda x, i=i: x[i], params), inputs)[..., 0] for i in range(count)])


def gaussian(agent: SACAgent, observations: Any) -> tuple[np.ndarray, np.ndarray]:
    means, raw = np.split(network(agent.params["policy"], normalized(observations)), 2, axis=-1)
    low, high = agent.config.log_std_bounds
    return means, np.exp(low + (high - low) * (np.tanh(raw) + 1) / 2)


def sample(agent: SACAgent, observations: Any, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Actions with the agent's own noise, and their log-probabilities by the change of variables."""
    means, stds = gaussian(agent, observations)
    noise = np.asarray(jax.random.normal(key, means.shape), np.float64)
    actions = np.tanh(means + stds * noise)
    normal = -0.5 * noise**2 - np.log(stds) - 0.5 * np.log(2 * np.pi)
    return actions, np.sum(normal - np.log(1 - actions**2), axis=-1)


@pytest.mark.parametrize(("layer_norm", "entropy_in_target"), [(False, True), (True, True), (True, False)])
def test_the_targets_are_those_of_the_paper(layer_norm: bool, entropy_in_target: bool) -> None:
    agent = configured(trained(layer_norm), entropy_in_target=entropy_in_target, discount=0.8)
    batch, key = some_batch(), jax.random.key(5)
    actions, log_probs = sample(agent, batch.next_observations, key)
    values = critics(agent.target_params, batch.next_observations, actions).min(axis=0)
    if entropy_in_target:
        values = values - float(agent.temperature) * log_probs
    expected = np.asarray(batch.rewards) + 0.8 * values * ~np.asarray(batch.terminated)
    np.testing.assert_allclose(jax.jit(SACAgent.targets)(agent, batch, key), expected, rtol=1e-4, atol=1e-5)
    online = critics(agent.params["critics"], batch.next_observations, actions).min(axis=0)
    assert not np.allclose(online, critics(agent.target_params, batch.next_observations, actions).min(axis=0))


def test_the_losses_are_those_of_the_paper() -> None:
    agent, batch, key = configured(trained(), target_entropy=-1.3), some_batch(), jax.random.key(6)
    total, metrics = jax.jit(agent.loss)(agent.params, batch, key)
    target_key, policy_key = jax.random.split(key)
    targets = np.asarray(jax.jit(SACAgent.targets)(agent, batch, target_key))
    errors = critics(agent.params["critics"], batch.observations, batch.actions) - targets
    actions, log_probs = sample(agent, batch.observations, policy_key)
    alpha = float(agent.temperature)
    own_q = critics(agent.params["critics"], batch.observations, actions).min(axis=0)
    parts = {
        "critic/loss": np.sum(np.mean(errors**2, axis=1)),
        "policy/loss": np.mean(alpha * log_probs - own_q),
        "policy/entropy": -np.mean(log_probs),
        "policy/temperature": alpha,
    }
    for name, expected in parts.items():
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    temperature_loss = -alpha * np.mean(log_probs + -1.3)
    expected = parts["critic/loss"] + parts["policy/loss"] + temperature_loss
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-5)


def test_each_part_has_the_gradient_of_its_own_loss_alone() -> None:
    agent, batch, key = trained(), some_batch(), jax.random.key(6)

    def losses(params: Any) -> dict[str, jax.Array]:
        total, metrics = agent.loss(params, batch, key)
        return {"total": total, "critics": metrics["critic/loss"], "policy": metrics["policy/loss"]}

    gradients = jax.jit(jax.jacrev(losses))(agent.params)
    for name in ("critics", "policy"):
        found, expected = (jax.tree.leaves(gradients[loss][name]) for loss in ("total", name))
        for leaf, own in zip(found, expected, strict=True):
            np.testing.assert_allclose(leaf, own, rtol=1e-4, atol=1e-6)
            assert np.any(leaf != 0)
    _, log_probs = sample(agent, batch.observations, jax.random.split(key)[1])
    expected = -float(agent.temperature) * np.mean(log_probs - ACTIONS)
    np.testing.assert_allclose(gradients["total"]["log_temperature"], expected, rtol=1e-4)


def test_the_target_entropy_is_minus_the_action_dimensions_unless_given() -> None:
    assert create().target_entropy == -ACTIONS
    assert create(target_entropy=0.7).target_entropy == 0.7


def test_the_density_of_a_squashed_gaussian_integrates_to_one_and_has_its_mean() -> None:
    means, log_stds = jnp.asarray([0.4]), jnp.asarray([-0.7])
    actions = np.linspace(-1 + 1e-5, 1 - 1e-5, 200_001)
    before = jnp.asarray(np.arctanh(actions)[:, None], jnp.float32)
    density = np.exp(np.asarray(tanh_gaussian_log_probability(before, means, log_stds), np.float64))
    width = actions[1] - actions[0]
    assert density.sum() * width == pytest.approx(1, abs=1e-3)
    draws = np.tanh(0.4 + np.exp(-0.7) * np.random.default_rng(0).normal(size=1_000_000))
    assert (density * actions).sum() * width == pytest.approx(draws.mean(), abs=3e-3)


def test_the_log_density_stays_finite_where_tanh_saturates() -> None:
    before = jnp.asarray([[-40.0], [40.0]])
    found = tanh_gaussian_log_probability(before, before, jnp.zeros((2, 1)))
    # log(1 - tanh(u)^2) is log 4 - 2 |u| there.
    np.testing.assert_allclose(found, -0.5 * np.log(2 * np.pi) - (np.log(4) - 80), rtol=1e-6)
    assert np.isfinite(
        jax.grad(lambda u: tanh_gaussian_log_probability(u, before, jnp.zeros((2, 1))).sum())(before)
    ).all()


def test_targets_move_at_the_given_rate_every_few_updates() -> None:
    agent = create(target_update_rate=0.25, target_update_every=3)
    for step in range(1, 7):
        before = agent
        agent, _ = update(agent, some_batch(step), jax.random.key(step))
        rate = 0.25 if step % 3 == 0 else 0.0
        for old, critic, new in zip(
            jax.tree.leaves(before.target_params),
            jax.tree.leaves(agent.params["critics"]),
            jax.tree.leaves(agent.target_params),
            strict=True,
        ):
            np.testing.assert_allclose(new, (1 - rate) * old + rate * critic, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("target_entropy", "up"), [(5.0, True), (-50.0, False)])
def test_the_temperature_rises_exactly_while_the_entropy_is_too_low(target_entropy: float, up: bool) -> None:
    agent = create(target_entropy=target_entropy)
    after, metrics = update(agent, some_batch(), jax.random.key(0))
    assert (float(metrics["policy/entropy"]) < target_entropy) == up
    assert (float(after.temperature) > float(agent.temperature)) == up


def test_the_ensemble_differs_and_its_mean_is_what_is_answered() -> None:
    agent, batch = trained(layer_norm=True), some_batch()
    every = critics(agent.params["critics"], batch.observations, batch.actions)
    assert len(np.unique(every[:, 0].round(6))) == 3
    found = agent.q_values(batch.observations, batch.actions)
    np.testing.assert_allclose(found, every.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_values_are_the_mean_q_value_of_sampled_actions() -> None:
    agent, batch = trained(), some_batch()
    found = agent.values(batch.observations, jax.random.key(1), samples=4000)
    means, stds = gaussian(agent, batch.observations)
    noise = np.random.default_rng(0).normal(size=(4000, *means.shape))
    every = np.stack(
        [critics(agent.params["critics"], batch.observations, np.tanh(means + stds * one)) for one in noise[:1000]]
    ).mean(axis=(1,))
    spread = every.std(axis=0)
    assert np.all(spread > 0)
    assert np.all(np.abs(np.asarray(found) - every.mean(axis=0)) < 5 * spread / np.sqrt(800))
    shaped = agent.values(batch.observations.reshape(2, 3, OBSERVATIONS), jax.random.key(1), samples=2)
    assert shaped.shape == (2, 3)


def test_act_is_the_squashed_mean() -> None:
    agent, batch = trained(), some_batch()
    means, _ = gaussian(agent, batch.observations)
    np.testing.assert_allclose(agent.act(batch.observations), np.tanh(means), rtol=1e-4, atol=1e-5)


def one_step_problem() -> Transitions:
    """Every action ends the episode; the reward is -(a - x)^2."""
    rng = np.random.default_rng(0)
    places, actions = rng.uniform(-0.7, 0.7, 4000), rng.uniform(-1, 1, 4000)
    observations = jnp.asarray(places[:, None], jnp.float32)
    return Transitions(
        observations=observations,
        actions=jnp.asarray(actions[:, None], jnp.float32),
        rewards=jnp.asarray(-((actions - places) ** 2), jnp.float32),
        next_observations=observations,
        terminated=jnp.ones(4000, bool),
    )


def test_a_one_step_problem_is_solved_and_its_q_values_are_the_rewards() -> None:
    batch = one_step_problem()
    config = SACConfig(hidden_dims=(32, 32), learning_rate=3e-3, initial_temperature=0.01, target_entropy=-4.0)
    agent = SACAgent.create(config, batch, jax.random.key(0))
    agent, _ = update_many(agent, Rows(batch), jax.random.key(1), num_updates=1500, batch_size=64)
    places = jnp.linspace(-0.6, 0.6, 13)[:, None]
    np.testing.assert_allclose(agent.act(places), places, atol=0.12)
    actions = jnp.linspace(-0.9, 0.9, 13)[::-1, None]
    np.testing.assert_allclose(agent.q_values(places, actions), -((actions - places)[:, 0] ** 2), atol=0.1)


def endless_problem(*, ends: bool) -> Transitions:
    """From 0 to 1, whatever is done, with a reward of 1 each time."""
    rng = np.random.default_rng(0)
    observations = jnp.asarray(rng.integers(0, 2, (2000, 1)), jnp.float32)
    return Transitions(
        observations=observations,
        actions=jnp.asarray(rng.uniform(-1, 1, (2000, 1)), jnp.float32),
        rewards=jnp.ones(2000),
        next_observations=1 - observations,
        terminated=jnp.full(2000, ends) & (observations[:, 0] == 1),
    )


@pytest.mark.parametrize(("ends", "expected"), [(False, (2.0, 2.0)), (True, (1.5, 1.0))])
def test_values_count_what_is_to_come_until_the_episode_terminates(ends: bool, expected: tuple[float, float]) -> None:
    batch = endless_problem(ends=ends)
    config = SACConfig(
        hidden_dims=(32, 32), learning_rate=3e-3, discount=0.5, target_update_rate=0.05, entropy_in_target=False
    )
    agent = SACAgent.create(config, batch, jax.random.key(0))
    agent, _ = update_many(agent, Rows(batch), jax.random.key(1), num_updates=600, batch_size=64)
    found = agent.values(jnp.asarray([[0.0], [1.0]]), jax.random.key(2))
    np.testing.assert_allclose(found, expected, atol=0.05)
