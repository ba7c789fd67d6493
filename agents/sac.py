"""Soft actor-critic (SAC): reinforcement learning from transitions, and the values that regret labels are made from.

Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications" (arXiv:1812.05905). A tanh-Gaussian policy pi, an
ensemble of critics Q_i with slowly following targets Q'_i, and a temperature alpha are trained at once:

    y         = r + discount (1 - terminated) [min_i Q'_i(s', a') - alpha log pi(a'|s')],  a' ~ pi(s')    (eqs. 3 and 5)
    J(Q)      = sum_i mean (Q_i(s, a) - y)^2                                                              (eq. 5)
    J(pi)     = mean [alpha log pi(a|s) - min_i Q_i(s, a)],  a ~ pi(s)                                    (eq. 7)
    J(alpha)  = -alpha mean [log pi(a|s) + target entropy]                                                (eq. 18)

`terminated` stops the bootstrapping; a time limit does not. Layer normalisation in the critics is what keeps them from
extrapolating where much of the data is another policy's (Ball et al. 2023, "Efficient Online Reinforcement Learning
with Offline Data", arXiv:2302.02948).

As an oracle, SAC answers with `q_values`, the mean of the critics, and `values`, their mean over actions of the policy
without an entropy term: what contrastive preference learning labels with (Hejna et al. 2023, arXiv:2310.13639).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

from robopref.agent import TrainState, adam
from robopref.networks import MLP, Normalizer, apply, init
from robopref.types import Key, Metrics, PyTree, Transitions


@dataclass(frozen=True)
class SACConfig:
    """SAC's hyperparameters. `ORACLE` has those with which the oracles of contrastive preference learning were trained.

    Attributes:
        hidden_dims: widths of the hidden layers of policy and critics.
        layer_norm: normalise the hidden layers of the critics.
        learning_rate: Adam's, for policy, critics and log-temperature.
        discount: per step.
        target_update_rate: tau, how far the target critics move towards the critics at a time.
        target_update_every: updates between two such moves.
        critics: in the ensemble.
        initial_temperature: alpha at the start.
        target_entropy: towards which alpha drives the policy's; None is minus the number of action dimensions.
        entropy_in_target: let the critics count the entropy that is to come, as above. Without it, they estimate the
            discounted sum of rewards alone.
        log_std_bounds: between which a tanh holds the logarithm of the policy's standard deviation.
    """

    hidden_dims: tuple[int, ...] = (256, 256)
    layer_norm: bool = False
    learning_rate: float = 3e-4
    discount: float = 0.99
    target_update_rate: float = 0.005
    target_update_every: int = 1
    critics: int = 2
    initial_temperature: float = 0.1
    target_entropy: float | None = None
    entropy_in_target: bool = True
    log_std_bounds: tuple[float, float] = (-5.0, 2.0)


# Hejna et al.'s released configuration; with it go batches of 512, 25k random steps and 1M steps with an update each.
ORACLE = SACConfig(hidden_dims=(256, 256, 256), target_update_every=2)


class SACAgent(TrainState):
    """A policy and its critics. `params` has the parts `policy`, `critics` (leading axis E) and `log_temperature`."""

    config: SACConfig = struct.field(pytree_node=False)
    target_params: PyTree

    @classmethod
    def create(cls, config: SACConfig, example: Transitions, key: Key, *, normalizer: Normalizer | None = None) -> Self:
        observation_dim, action_dim = example.observations.shape[-1], example.actions.shape[-1]
        policy_key, critic_key = jax.random.split(key)
        observation, action = jnp.zeros(observation_dim), jnp.zeros(action_dim)
        params = {
            "policy": init(_policy(config, action_dim), policy_key, observation),
            "critics": _init_critics(config, critic_key, observation, action),
            "log_temperature": jnp.log(jnp.asarray(config.initial_temperature, jnp.float32)),
        }
        opt_state, target_params = adam(config.learning_rate).init(params), jax.tree.map(jnp.copy, params["critics"])
        shape = (observation_dim,)
        return cls.begin(config, params, opt_state, shape, action_dim, normalizer, target_params=target_params)

    @property
    def temperature(self) -> Float[Array, ""]:
        """The present alpha."""
        return jnp.exp(self.params["log_temperature"])

    @property
    def target_entropy(self) -> float:
        return -float(self.action_dim) if self.config.target_entropy is None else self.config.target_entropy

    def loss(self, params: PyTree, batch: Transitions, key: Key) -> tuple[Array, Metrics]:
        """J(Q) + J(pi) + J(alpha); each part of `params` has the gradient of its own loss alone."""
        target_key, policy_key = jax.random.split(key)
        observations = self.normalizer(batch.observations)
        targets = self.targets(batch, target_key)
        q_values = _apply_critics(self.config, params["critics"], observations, batch.actions)
        critic_loss = jnp.sum(jnp.mean(jnp.square(q_values - targets), axis=tuple(range(1, q_values.ndim))))

        actions, log_probs = self._sample(params["policy"], observations, policy_key)
        fixed = jax.lax.stop_gradient(params["critics"])
        own_q = jnp.min(_apply_critics(self.config, fixed, observations, actions), axis=0)
        temperature = jnp.exp(params["log_temperature"])
        policy_loss = jnp.mean(jax.lax.stop_gradient(temperature) * log_probs - own_q)

        entropy = -jnp.mean(log_probs)
        temperature_loss = temperature * jax.lax.stop_gradient(entropy - self.target_entropy)
        return critic_loss + policy_loss + temperature_loss, {
            "critic/loss": critic_loss,
            "critic/q_value": jnp.mean(q_values),
            "critic/target": jnp.mean(targets),
            "policy/loss": policy_loss,
            "policy/entropy": entropy,
            "policy/temperature": temperature,
        }

    def update(self, batch: Transitions, key: Key) -> tuple[Self, Metrics]:
        agent, metrics = self.descend(self.loss, adam(self.config.learning_rate), batch, key)
        rate = jnp.where(agent.step % self.config.target_update_every == 0, self.config.target_update_rate, 0.0)
        target_params = optax.incremental_update(agent.params["critics"], self.target_params, rate)
        return agent.replace(target_params=target_params), metrics

    def targets(self, batch: Transitions, key: Key) -> Float[Array, "*B"]:
        """What the critics are to say: reward, and the discounted value of the next state."""
        next_observations = self.normalizer(batch.next_observations)
        actions, log_probs = self._sample(self.params["policy"], next_observations, key)
        next_values = jnp.min(_apply_critics(self.config, self.target_params, next_observations, actions), axis=0)
        if self.config.entropy_in_target:
            next_values = next_values - self.temperature * log_probs
        return batch.rewards + self.config.discount * jnp.where(batch.terminated, 0.0, next_values)

    def sample_actions(self, observations: Float[Array, "*B O"], key: Key) -> Float[Array, "*B A"]:
        return self._sample(self.params["policy"], self.normalizer(observations), key)[0]

    def act(self, observations: Float[Array, "*B O"]) -> Float[Array, "*B A"]:
        """tanh of the Gaussian's mean."""
        means, _ = self._distribution(self.params["policy"], self.normalizer(observations))
        return jnp.tanh(means)

    def q_values(self, observations: Float[Array, "*B O"], actions: Float[Array, "*B A"]) -> Float[Array, "*B"]:
        """Mean of the critics, in the unit of the rewards of the batches."""
        every = _apply_critics(self.config, self.params["critics"], self.normalizer(observations), actions)
        return jnp.mean(every, axis=0)

    def values(self, observations: Float[Array, "*B O"], key: Key, samples: int = 64) -> Float[Array, "*B"]:
        """Mean of `q_values` over actions that the policy draws, without an entropy term.

        The draws are made one after the other, so that many observations at a time fit into memory.
        """

        def add(total: Array, sample_key: Key) -> tuple[Array, None]:
            return total + self.q_values(observations, self.sample_actions(observations, sample_key)), None

        zeros = jnp.zeros(observations.shape[:-1], jnp.float32)
        total, _ = jax.lax.scan(add, zeros, jax.random.split(key, samples))
        return total / samples

    def _distribution(self, policy: PyTree, observations: Float[Array, "*B O"]) -> tuple[Array, Array]:
        """Mean and log standard deviation of the Gaussian before the tanh."""
        outputs = apply(_policy(self.config, self.action_dim), policy, observations)
        means, raw = jnp.split(outputs, 2, axis=-1)
        low, high = self.config.log_std_bounds
        return means, low + 0.5 * (high - low) * (jnp.tanh(raw) + 1.0)

    def _sample(self, policy: PyTree, observations: Float[Array, "*B O"], key: Key) -> tuple[Array, Array]:
        """Actions of normalised observations, and their log-probabilities."""
        means, log_stds = self._distribution(policy, observations)
        before_tanh = means + jnp.exp(log_stds) * jax.random.normal(key, means.shape)
        return jnp.tanh(before_tanh), tanh_gaussian_log_probability(before_tanh, means, log_stds)


def tanh_gaussian_log_probability(
    before_tanh: Float[Array, "*B A"], means: Float[Array, "*B A"], log_stds: Float[Array, "*B A"]
) -> Float[Array, "*B"]:
    """Log-density of tanh(u) at u = `before_tanh`, u being Gaussian with independent dimensions.

    log N(u) - sum log(1 - tanh(u)^2), the last term in the form 2 (log 2 - u - softplus(-2 u)), which does not lose its
    digits where tanh saturates.
    """
    gaussian = jax.scipy.stats.norm.logpdf(before_tanh, means, jnp.exp(log_stds))
    squashing = 2.0 * (jnp.log(2.0) - before_tanh - jax.nn.softplus(-2.0 * before_tanh))
    return jnp.sum(gaussian - squashing, axis=-1)


class _Critic(nn.Module):
    """A network from an observation and an action to one number."""

    hidden_dims: tuple[int, ...]
    layer_norm: bool

    @nn.compact
    def __call__(
        self, observations: Float[Array, "*B O"], actions: Float[Array, "*B A"], *, deterministic: bool = True
    ) -> Float[Array, "*B"]:
        hidden = jnp.concatenate([observations, actions], axis=-1)
        for width in self.hidden_dims:
            hidden = nn.Dense(width, kernel_init=nn.initializers.orthogonal(jnp.sqrt(2.0)))(hidden)
            hidden = nn.relu(nn.LayerNorm()(hidden) if self.layer_norm else hidden)
        return nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0))(hidden)[..., 0]


def _critic(config: SACConfig) -> _Critic:
    return _Critic(config.hidden_dims, config.layer_norm)


def _init_critics(config: SACConfig, key: Key, observation: Array, action: Array) -> PyTree:
    """Parameters of the ensemble, with a leading axis E."""
    return jax.vmap(lambda one: init(_critic(config), one, observation, action))(jax.random.split(key, config.critics))


def _apply_critics(
    config: SACConfig, params: PyTree, observations: Float[Array, "*B O"], actions: Float[Array, "*B A"]
) -> Array:
    """[E, *B]."""
    every: Array = jax.vmap(lambda one: apply(_critic(config), one, observations, actions))(params)
    return every


def _policy(config: SACConfig, action_dim: int) -> MLP:
    return MLP(config.hidden_dims, 2 * action_dim)
