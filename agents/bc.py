"""Behaviour cloning: on all data (BC), on the best episodes (%BC), and on preferred segments (SFT).

The policy is a deterministic tanh MLP and the loss the squared error -log pi(a|s) = ||a - mu(s)||^2, summed over
action dimensions: the same policy and likelihood as in CPL (Hejna et al. 2023, arXiv:2310.13639), whose baselines BC,
%BC and SFT are. What is cloned is a matter of the data:

* BC: `Transitions` of all episodes;
* %BC: `Transitions` of the best episodes (`robopref.datasets.best_episodes`);
* SFT: `Preferences`; all segments for `pretrain_updates`, then only those that were preferred (both, in a tie).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

from robopref.agent import TrainState, adam
from robopref.images import augment
from robopref.losses import squared_error_log_probability
from robopref.networks import DeterministicPolicy, Normalizer, Pixels, apply, explore, init, observation_shape
from robopref.types import Key, Metrics, Preferences, PyTree, Segments, Transitions


@dataclass(frozen=True)
class BCConfig:
    """Behaviour cloning's hyperparameters.

    Attributes:
        hidden_dims: widths of the policy's hidden layers.
        dropout: in the policy, while training.
        learning_rate: Adam's.
        decay_updates: the update at which the learning rate, falling along a cosine, reaches 0, so that the last policy
            is not a random one of those that the last updates jitter between; None keeps it constant.
        pretrain_updates: with `Preferences`, for how many updates to clone both segments before only the preferred.
        action_noise: standard deviation of the Gaussian noise of `sample_actions`.
        action_limit: actions of the data are clipped to this distance from 0 before they are cloned.
        pixels: how images are seen, where observations are images.
    """

    hidden_dims: tuple[int, ...] = (256, 256)
    dropout: float = 0.0
    learning_rate: float = 3e-4
    decay_updates: int | None = None
    pretrain_updates: int = 0
    action_noise: float = 0.1
    action_limit: float = 1.0
    pixels: Pixels | None = None


class BCAgent(TrainState):
    """A behaviour-cloned policy."""

    config: BCConfig = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls, config: BCConfig, example: Transitions | Preferences, key: Key, *, normalizer: Normalizer | None = None
    ) -> Self:
        steps = _steps(example)
        shape, action_dim = observation_shape(steps.observations, config.pixels), steps.actions.shape[-1]
        params = init(_policy(config, action_dim), key, jnp.zeros(shape))
        return cls.begin(config, params, _optimizer(config).init(params), shape, action_dim, normalizer)

    @property
    def policy(self) -> DeterministicPolicy:
        return _policy(self.config, self.action_dim)

    def loss(self, params: PyTree, batch: Transitions | Preferences, key: Key) -> tuple[Array, Metrics]:
        """Mean -log pi over the steps that count."""
        steps = _steps(batch)
        shift_key, dropout_key = jax.random.split(key)
        observations = augment(steps.observations, shift_key, self.config.pixels)
        means = apply(self.policy, params, self.normalizer(observations), dropout_key=dropout_key)
        actions = jnp.clip(steps.actions, -self.config.action_limit, self.config.action_limit)
        errors = -squared_error_log_probability(actions, means)
        weights = self._weights(batch, errors)
        loss = jnp.sum(weights * errors) / jnp.maximum(jnp.sum(weights), 1.0)
        return loss, {"policy/loss": loss, "policy/error": jnp.mean(errors)}

    def update(self, batch: Transitions | Preferences, key: Key) -> tuple[Self, Metrics]:
        return self.descend(self.loss, _optimizer(self.config), batch, key)

    def sample_actions(self, observations: Float[Array, "*B *O"], key: Key) -> Float[Array, "*B A"]:
        return explore(self.act(observations), self.config.action_noise, key)

    def act(self, observations: Float[Array, "*B *O"]) -> Float[Array, "*B A"]:
        return apply(self.policy, self.params, self.normalizer(observations))

    def segment_scores(self, segments: Segments) -> Float[Array, "*B"]:
        """Sum of log pi over each segment: how well the policy's own behaviour explains it."""
        return jnp.sum(squared_error_log_probability(segments.actions, self.act(segments.observations)), axis=-1)

    def _weights(self, batch: Transitions | Preferences, errors: Float[Array, "*S"]) -> Float[Array, "*S"]:
        """1 for every step that is cloned, 0 for the others."""
        if isinstance(batch, Transitions):
            return jnp.ones_like(errors)
        preferred = jnp.stack([batch.labels <= 0.5, batch.labels >= 0.5], axis=-1)
        chosen = preferred | (self.step < self.config.pretrain_updates)
        return jnp.broadcast_to(chosen[..., None], errors.shape).astype(errors.dtype)


def _policy(config: BCConfig, action_dim: int) -> DeterministicPolicy:
    return DeterministicPolicy(config.hidden_dims, action_dim, config.dropout, config.pixels)


def _optimizer(config: BCConfig) -> optax.GradientTransformation:
    return adam(config.learning_rate, config.decay_updates)


def _steps(batch: Transitions | Preferences) -> Transitions | Segments:
    return batch.segments if isinstance(batch, Preferences) else batch
