"""Implicit Q-learning (IQL): offline reinforcement learning that never asks for the value of an action not in the data.

Kostrikov et al. 2021, "Offline Reinforcement Learning with Implicit Q-Learning" (arXiv:2110.06169). A value V, an
ensemble of critics Q_i with slowly following targets Q'_i, and a policy mu are trained at once:

    L(V)  = mean |expectile - 1[u < 0]| u^2,  u = min_i Q'_i(s, a) - V(s)              (equation 5)
    L(Q)  = sum_i mean (Q_i(s, a) - [r + discount (1 - terminated) V(s')])^2           (equation 6)
    L(mu) = mean w ||a - mu(s)||^2,  w = min(exp(A / temperature), max_weight)         (equation 7)
    A     = min_i Q'_i(s, a) - V(s)

Three things are not as in that paper. `temperature` is 1 / beta, and the policy is deterministic with the squared error
as -log pi, both as in the P-IQL of Hejna et al. 2023 (arXiv:2310.13639). And all three losses are taken at the same
parameters, those before the update, where the authors' code lets the policy and the critics see the value of after it:
the whole update is then one gradient.

From images (Yarats et al. 2021, arXiv:2107.09645) policy, critics and value see the output of the same convolutions,
which only the policy's loss changes, each through a trunk of its own; the critics share theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from robopref.agent import TrainState, adam_at
from robopref.images import augment
from robopref.losses import expectile_loss, squared_error_log_probability
from robopref.networks import MLP, Convolutions, Normalizer, Pixels, Trunk, apply, explore, init, observation_shape
from robopref.types import Key, Metrics, PyTree, Segments, Transitions


@dataclass(frozen=True)
class IQLConfig:
    """IQL's hyperparameters.

    Attributes:
        hidden_dims: widths of the hidden layers of policy, critics and value.
        dropout: in the policy, while training.
        critics: in the ensemble.
        expectile: of the values of the data's actions that V estimates; 0.5 is their mean, towards 1 their maximum.
        temperature: of the weights of the cloned actions; 1 / beta, of which the paper has 3 for locomotion.
        max_weight: at which those weights are cut off.
        discount: per step.
        target_update_rate: tau, how far the target critics move towards the critics at each update.
        learning_rate: Adam's.
        decay_updates: the update at which the policy's learning rate, falling along a cosine, reaches 0; None keeps it
            constant. That of critics and value is constant always.
        action_noise: standard deviation of the Gaussian noise of `sample_actions`.
        action_limit: actions of the data are clipped to this distance from 0.
        pixels: how images are seen, where observations are images.
    """

    hidden_dims: tuple[int, ...] = (256, 256)
    dropout: float = 0.0
    critics: int = 2
    expectile: float = 0.7
    temperature: float = 0.3333
    max_weight: float = 100.0
    discount: float = 0.99
    target_update_rate: float = 0.005
    learning_rate: float = 3e-4
    decay_updates: int | None = None
    action_noise: float = 0.1
    action_limit: float = 1.0
    pixels: Pixels | None = None


class IQLAgent(TrainState):
    """A policy with its critics and value.

    `params` has the parts `encoder` (empty, unless observations are images), `policy`, `critics` and `value`;
    `target_params` are those of the target critics.
    """

    config: IQLConfig = struct.field(pytree_node=False)
    target_params: PyTree

    @classmethod
    def create(
        cls,
        config: IQLConfig,
        example: Transitions | Segments,
        key: Key,
        *,
        normalizer: Normalizer | None = None,
    ) -> Self:
        shape, action_dim = observation_shape(example.observations, config.pixels), example.actions.shape[-1]
        encoder_key, *keys = jax.random.split(key, 4)
        encoder, encoded = {}, jnp.zeros(shape)
        if config.pixels is not None:
            encoder = init(Convolutions(config.pixels), encoder_key, encoded)
            encoded = _convolve(config.pixels, encoder, encoded)
        params = {
            "encoder": encoder,
            "policy": init(_policy(config, action_dim), keys[0], encoded),
            "critics": init(_critics(config), keys[1], encoded, jnp.zeros(action_dim)),
            "value": init(_value(config), keys[2], encoded),
        }
        opt_state, target_params = adam_at(0.0).init(params), jax.tree.map(jnp.copy, params["critics"])
        return cls.begin(config, params, opt_state, shape, action_dim, normalizer, target_params=target_params)

    @property
    def policy(self) -> _Policy:
        return _policy(self.config, self.action_dim)

    def loss(self, params: PyTree, batch: Transitions, key: Key) -> tuple[Array, Metrics]:
        """L(V) + L(Q) + L(mu); each part of `params` has the gradient of its own loss alone, the encoder L(mu)'s."""
        return self._loss(params, _as_steps(batch, self.config.pixels), key)

    def update(self, batch: Transitions, key: Key) -> tuple[Self, Metrics]:
        return self._update(_as_steps(batch, self.config.pixels), key)

    def update_on_segments(self, segments: Segments, rewards: Float[Array, "*B T"], key: Key) -> tuple[Self, Metrics]:
        """An update on all steps of `segments` but the last, whose successor is not known; none of them is terminal.

        Each observation passes through each network once, though most are both a successor and a beginning.
        """
        return self._update(_all_but_last(segments, rewards), key)

    def sample_actions(self, observations: Float[Array, "*B *O"], key: Key) -> Float[Array, "*B A"]:
        return explore(self.act(observations), self.config.action_noise, key)

    def act(self, observations: Float[Array, "*B *O"]) -> Float[Array, "*B A"]:
        return apply(self.policy, self.params["policy"], self._encode(self.params, self.normalizer(observations)))

    def q_values(self, observations: Float[Array, "*B *O"], actions: Float[Array, "*B A"]) -> Float[Array, "*B"]:
        """The least of the critics."""
        encoded = self._encode(self.params, self.normalizer(observations))
        return jnp.min(apply(_critics(self.config), self.params["critics"], encoded, actions), axis=0)

    def values(self, observations: Float[Array, "*B *O"]) -> Float[Array, "*B"]:
        """V of each observation."""
        encoded = self._encode(self.params, self.normalizer(observations))
        return apply(_value(self.config), self.params["value"], encoded)

    def segment_scores(self, segments: Segments) -> Float[Array, "*B"]:
        """Sum of log pi over each segment: how well the policy explains it."""
        return jnp.sum(squared_error_log_probability(segments.actions, self.act(segments.observations)), axis=-1)

    def _loss(self, params: PyTree, steps: _Steps, key: Key) -> tuple[Array, Metrics]:
        config = self.config
        shift_key, dropout_key = jax.random.split(key)
        observations = augment(steps.observations, shift_key, config.pixels)
        before, last = _split_last(self.normalizer(observations), _time_axis(config.pixels))
        encoded = self._encode(params, before)
        fixed = jax.lax.stop_gradient(encoded)

        values = apply(_value(config), params["value"], fixed)
        target_q = jnp.min(apply(_critics(config), self.target_params, fixed, steps.actions), axis=0)
        advantages = target_q - values
        value_loss = jnp.mean(expectile_loss(advantages, config.expectile))

        # Only the last successor's value is not at hand already.
        held = jax.lax.stop_gradient(params)
        last_value = apply(_value(config), held["value"], self._encode(held, last))
        next_values = jnp.concatenate([jax.lax.stop_gradient(values[..., 1:]), last_value], axis=-1)
        targets = steps.rewards + config.discount * jnp.where(steps.terminated, 0.0, next_values)
        q_values = apply(_critics(config), params["critics"], fixed, steps.actions)
        critic_loss = jnp.mean(jnp.sum(jnp.square(q_values - targets), axis=0))

        weights = jnp.minimum(jnp.exp(jax.lax.stop_gradient(advantages) / config.temperature), config.max_weight)
        means = apply(self.policy, params["policy"], encoded, dropout_key=dropout_key)
        actions = jnp.clip(steps.actions, -config.action_limit, config.action_limit)
        errors = -squared_error_log_probability(actions, means)
        policy_loss = jnp.mean(weights * errors)

        return value_loss + critic_loss + policy_loss, {
            "critic/loss": critic_loss,
            "critic/q_value": jnp.mean(q_values),
            "value/loss": value_loss,
            "value/value": jnp.mean(values),
            "value/advantage": jnp.mean(advantages),
            "policy/loss": policy_loss,
            "policy/error": jnp.mean(errors),
            "policy/weight": jnp.mean(weights),
        }

    def _update(self, steps: _Steps, key: Key) -> tuple[Self, Metrics]:
        rate, policy_rate = self.config.learning_rate, _policy_schedule(self.config)(self.step)
        rates = {"encoder": policy_rate, "policy": policy_rate, "critics": rate, "value": rate}
        agent, metrics = self.descend(self._loss, adam_at(rates), steps, key)
        tau = self.config.target_update_rate
        target_params = optax.incremental_update(agent.params["critics"], self.target_params, tau)
        return agent.replace(target_params=target_params), metrics

    def _encode(self, params: PyTree, observations: Float[Array, "*B *O"]) -> Float[Array, "*B F"]:
        """What the networks see of normalised observations."""
        if self.config.pixels is None:
            return observations
        return _convolve(self.config.pixels, params["encoder"], observations)


class _Steps(NamedTuple):
    """Stretches of T steps, with the observation that the last one led to."""

    observations: Float[Array, "*B T+1 *O"]
    actions: Float[Array, "*B T A"]
    rewards: Float[Array, "*B T"]
    terminated: Bool[Array, "*B T"]


def _as_steps(batch: Transitions, pixels: Pixels | None) -> _Steps:
    """Stretches of one step each."""
    return _Steps(
        observations=jnp.stack([batch.observations, batch.next_observations], axis=_time_axis(pixels)),
        actions=batch.actions[..., None, :],
        rewards=batch.rewards[..., None],
        terminated=batch.terminated[..., None],
    )


def _all_but_last(segments: Segments, rewards: Float[Array, "*B T"]) -> _Steps:
    rewards = rewards[..., :-1]
    return _Steps(segments.observations, segments.actions[..., :-1, :], rewards, jnp.zeros(rewards.shape, bool))


def _split_last(stretches: Array, axis: int) -> tuple[Array, Array]:
    """All but the last along an axis, and the last."""
    return jax.lax.slice_in_dim(stretches, 0, -1, axis=axis), jax.lax.slice_in_dim(stretches, -1, None, axis=axis)


def _time_axis(pixels: Pixels | None) -> int:
    """Of the observations of stretches: before that of a vector, or the three of an image."""
    return -2 if pixels is None else -4


class _Policy(nn.Module):
    """Deterministic actions."""

    hidden_dims: tuple[int, ...]
    action_dim: int
    dropout: float
    pixels: Pixels | None

    @nn.compact
    def __call__(self, encoded: Float[Array, "*B F"], *, deterministic: bool = True) -> Float[Array, "*B A"]:
        network = MLP(self.hidden_dims, self.action_dim, self.dropout)
        return jnp.tanh(network(_project(self.pixels, encoded), deterministic=deterministic))


class _Critics(nn.Module):
    """E critics, each a matrix product of all at once per layer."""

    hidden_dims: tuple[int, ...]
    critics: int
    pixels: Pixels | None

    @nn.compact
    def __call__(
        self, encoded: Float[Array, "*B F"], actions: Float[Array, "*B A"], *, deterministic: bool = True
    ) -> Float[Array, " E *B"]:
        ensemble = nn.vmap(
            MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=self.critics
        )
        inputs = jnp.concatenate([_project(self.pixels, encoded), actions], axis=-1)
        q_values: Array = ensemble(self.hidden_dims, 1)(inputs)[..., 0]
        return q_values


class _Value(nn.Module):
    """The value of an observation."""

    hidden_dims: tuple[int, ...]
    pixels: Pixels | None

    @nn.compact
    def __call__(self, encoded: Float[Array, "*B F"], *, deterministic: bool = True) -> Float[Array, "*B"]:
        values: Array = MLP(self.hidden_dims, 1)(_project(self.pixels, encoded))[..., 0]
        return values


def _project(pixels: Pixels | None, encoded: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """What a network's MLP sees of what the convolutions gave: within a module, a trunk of its own."""
    if pixels is None:
        return encoded
    projected: Array = Trunk(pixels.features)(encoded)
    return projected


def _policy(config: IQLConfig, action_dim: int) -> _Policy:
    return _Policy(config.hidden_dims, action_dim, config.dropout, config.pixels)


def _critics(config: IQLConfig) -> _Critics:
    return _Critics(config.hidden_dims, config.critics, config.pixels)


def _value(config: IQLConfig) -> _Value:
    return _Value(config.hidden_dims, config.pixels)


def _convolve(pixels: Pixels, params: PyTree, images: Float[Array, "*B H W C"]) -> Float[Array, "*B F"]:
    encoded: Array = Convolutions(pixels).apply({"params": params}, images)  # type: ignore[assignment]
    return encoded


def _policy_schedule(config: IQLConfig) -> optax.Schedule:
    if config.decay_updates is None:
        return optax.constant_schedule(config.learning_rate)
    return optax.cosine_decay_schedule(config.learning_rate, config.decay_updates)
