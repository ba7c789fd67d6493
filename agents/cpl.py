"""Contrastive preference learning (CPL): a policy straight from preferences, without a reward model.

Hejna et al. 2023, "Contrastive Preference Learning: Learning from Human Feedback without RL" (arXiv:2310.13639).
People are taken to prefer the segment with less regret; with the maximum-entropy bijection A* = alpha log pi, the score
of a segment is

    a(segment) = sum_t discount^t alpha log pi(a_t | s_t)

and the loss on a pair is -log [exp a+ / (exp a+ + exp(lambda a-))], lambda being the conservative weight. log pi is
-||a - mu||^2 as in the authors' code: a Gaussian with variance 1/2 whose constant is left out, which matters as soon as
lambda is not 1.

Training begins with behaviour cloning of all segments; then Adam starts afresh and the learning rate warms up. The
variants are configurations (`CPL`, `CPL_BC`, `CPL_KL`); CPL(K) is CPL given `Rankings` in place of `Preferences`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from robopref.losses import contrastive_preference_loss, plackett_luce_loss, squared_error_log_probability
from robopref.networks import DeterministicPolicy, Normalizer, apply, explore, init
from robopref.preferences import advantage_sum
from robopref.types import Key, Metrics, Preferences, PyTree, Rankings


@dataclass(frozen=True)
class CPLConfig:
    """CPL's hyperparameters.

    Attributes:
        hidden_dims: widths of the policy's hidden layers.
        dropout: in the policy, while training.
        temperature: alpha of A* = alpha log pi.
        discount: of the sum over a segment; 1 in the authors' code.
        conservative_weight: lambda in (0, 1]; below 1, the dispreferred segment counts for less, which keeps the policy
            near the data.
        bc_weight: beta of beta * mean(-log pi) over all segments, added to the contrastive loss (CPL-BC).
        reference: score segments by log(pi / pi_ref), pi_ref being the policy at the end of pretraining (CPL-KL).
        learning_rate: Adam's, after pretraining.
        warmup_updates: over which that learning rate rises from 0.
        decay_updates: the update (counted from the first one) at which the learning rate, falling along a cosine since
            the end of pretraining, reaches 0; None keeps it constant, as in the authors' code.
        pretrain_updates: behaviour cloning of all segments, before anything is contrasted.
        pretrain_learning_rate: Adam's, while pretraining.
        action_noise: standard deviation of the Gaussian noise of `sample_actions`.
    """

    hidden_dims: tuple[int, ...] = (256, 256)
    dropout: float = 0.0
    temperature: float = 0.1
    discount: float = 1.0
    conservative_weight: float = 0.5
    bc_weight: float = 0.0
    reference: bool = False
    learning_rate: float = 3e-4
    warmup_updates: int = 100
    decay_updates: int | None = None
    pretrain_updates: int = 1000
    pretrain_learning_rate: float = 3e-4
    action_noise: float = 0.1


CPL = CPLConfig()
CPL_BC = CPLConfig(conservative_weight=1.0, bc_weight=1.0)
CPL_KL = CPLConfig(temperature=0.2, conservative_weight=0.75, reference=True, learning_rate=3e-5)


class CPLAgent(struct.PyTreeNode):
    """A policy learned by CPL. `reference_params` is None unless the configuration asks for a reference policy."""

    params: PyTree
    reference_params: PyTree | None
    opt_state: optax.OptState
    normalizer: Normalizer
    step: Int[Array, ""]
    config: CPLConfig = struct.field(pytree_node=False)
    action_dim: int = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls, config: CPLConfig, example: Preferences | Rankings, key: Key, *, normalizer: Normalizer | None = None
    ) -> Self:
        observation_dim, action_dim = example.segments.observations.shape[-1], example.segments.actions.shape[-1]
        module = DeterministicPolicy(config.hidden_dims, action_dim, config.dropout)
        params = init(module, key, jnp.zeros(observation_dim))
        return cls(
            params=params,
            reference_params=jax.tree.map(jnp.copy, params) if config.reference else None,
            opt_state=optax.scale_by_adam().init(params),
            normalizer=normalizer or Normalizer.identity(observation_dim),
            step=jnp.zeros((), jnp.int32),
            config=config,
            action_dim=action_dim,
        )

    @property
    def policy(self) -> DeterministicPolicy:
        return DeterministicPolicy(self.config.hidden_dims, self.action_dim, self.config.dropout)

    def loss(self, params: PyTree, batch: Preferences | Rankings, key: Key) -> tuple[Array, Metrics]:
        """Behaviour cloning while pretraining, the contrastive loss afterwards; both need the same forward pass."""
        observations = self.normalizer(batch.segments.observations)
        means = apply(self.policy, params, observations, dropout_key=key)
        log_probs = squared_error_log_probability(batch.segments.actions, means)
        cloning = -jnp.mean(log_probs)
        contrastive, accuracy = self._contrast(batch, self._scores(log_probs, observations, batch))
        # A select, not a branch: under vmap over seeds a branch would run both sides anyway.
        loss = jnp.where(self.pretraining, cloning, contrastive + self.config.bc_weight * cloning)
        return loss, {
            "policy/loss": loss,
            "policy/cloning_loss": cloning,
            "policy/contrastive_loss": contrastive,
            "policy/ranking_accuracy": accuracy,
        }

    def update(self, batch: Preferences | Rankings, key: Key) -> tuple[Self, Metrics]:
        agent = self._begin_contrast()
        gradients, metrics = jax.grad(agent.loss, has_aux=True)(agent.params, batch, key)
        updates, opt_state = optax.scale_by_adam().update(gradients, agent.opt_state)
        params = jax.tree.map(lambda leaf, update: leaf - agent.learning_rate * update, agent.params, updates)
        return agent.replace(params=params, opt_state=opt_state, step=agent.step + 1), metrics

    def sample_actions(self, observations: Float[Array, "*B O"], key: Key) -> Float[Array, "*B A"]:
        return explore(self.act(observations), self.config.action_noise, key)

    def act(self, observations: Float[Array, "*B O"]) -> Float[Array, "*B A"]:
        return apply(self.policy, self.params, self.normalizer(observations))

    @property
    def pretraining(self) -> Array:
        return self.step < self.config.pretrain_updates

    @property
    def learning_rate(self) -> Array:
        """Of the update to come."""
        config, since = self.config, self.step - self.config.pretrain_updates
        rate = config.learning_rate * jnp.minimum((since + 1) / max(config.warmup_updates, 1), 1.0)
        if config.decay_updates is not None:
            rate *= optax.cosine_decay_schedule(1.0, config.decay_updates - config.pretrain_updates)(since)
        return jnp.where(self.pretraining, config.pretrain_learning_rate, rate)

    def _begin_contrast(self) -> Self:
        """At the first update after pretraining: a fresh Adam, and the policy so far as the reference."""
        begins = self.step == self.config.pretrain_updates
        fresh = optax.scale_by_adam().init(self.params)
        opt_state = jax.tree.map(lambda new, old: jnp.where(begins, new, old), fresh, self.opt_state)
        if self.reference_params is None:
            return self.replace(opt_state=opt_state)
        reference = jax.tree.map(lambda new, old: jnp.where(begins, new, old), self.params, self.reference_params)
        return self.replace(opt_state=opt_state, reference_params=reference)

    def _scores(
        self,
        log_probs: Float[Array, "*B K T"],
        observations: Float[Array, "*B K T O"],
        batch: Preferences | Rankings,
    ) -> Float[Array, "*B K"]:
        """The advantage sums of the segments, relative to the reference policy, if any."""
        if self.reference_params is not None:
            means = apply(self.policy, self.reference_params, observations)
            log_probs = log_probs - squared_error_log_probability(batch.segments.actions, means)
        return advantage_sum(self.config.temperature * log_probs, self.config.discount)

    def _contrast(self, batch: Preferences | Rankings, scores: Float[Array, "*B K"]) -> tuple[Array, Array]:
        """The contrastive loss, and the share of decided pairs (for rankings: of best segments) that come out right."""
        weight = self.config.conservative_weight
        if isinstance(batch, Rankings):
            accuracy = jnp.mean(jnp.argmax(scores, axis=-1) == 0)
            return jnp.mean(plackett_luce_loss(scores, weight)), accuracy
        loss = contrastive_preference_loss(scores[..., 0], scores[..., 1], batch.labels, weight)
        decided = batch.labels != 0.5
        right = (scores[..., 1] > scores[..., 0]) == (batch.labels > 0.5)
        return jnp.mean(loss), jnp.sum(right & decided) / jnp.maximum(jnp.sum(decided), 1)
