"""Contrastive preference learning (CPL): a policy straight from preferences, without a reward model.

Hejna et al. 2023, "Contrastive Preference Learning: Learning from Human Feedback without RL" (arXiv:2310.13639).
People are taken to prefer the segment with less regret; with the maximum-entropy bijection A* = alpha log pi, the score
of a segment is

    a(segment) = sum_t discount^t alpha log pi(a_t | s_t)

and the loss on a pair is -log [exp a+ / (exp a+ + exp(lambda a-))], lambda being the conservative weight. log pi is
-||a - mu||^2 as in the authors' code: a Gaussian with variance 1/2 whose constant is left out, which matters as soon as
lambda is not 1.

Training begins with behaviour cloning of all segments; then Adam starts afresh and the learning rate warms up. The
variants are configurations:

* `CPL`, `CPL_BC`, `CPL_KL`: those of the paper; CPL(K) is CPL given `Rankings` in place of `Preferences`;
* `DPO`: CPL with a reference policy and lambda = 1 (Rafailov et al. 2023, arXiv:2305.18290);
* `RPO`: DPO and the cloning of what was preferred (Liu et al. 2024, arXiv:2405.16436);
* `PRO`: rankings and the cloning of the best (Song et al. 2023, arXiv:2306.17492), given `Rankings`;
* `APO`: DPO in iterations, each of which takes the policy so far as its reference and begins from an extrapolation of
  the last two, theta + extrapolation * (theta - theta_before) (He et al. 2024, arXiv:2410.06293).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

from robopref.agent import TrainState, adam_at
from robopref.images import augment
from robopref.losses import (
    all_pairs_loss,
    contrastive_preference_loss,
    plackett_luce_loss,
    ranking_accuracy,
    smoothed,
    squared_error_log_probability,
)
from robopref.networks import DeterministicPolicy, Normalizer, Pixels, apply, explore, init, observation_shape
from robopref.preferences import advantage_sum
from robopref.types import Key, Metrics, Preferences, PyTree, Rankings, Segments


@dataclass(frozen=True)
class CPLConfig:
    """CPL's hyperparameters.

    Attributes:
        hidden_dims: widths of the policy's hidden layers.
        dropout: in the policy, while training.
        temperature: alpha of A* = alpha log pi.
        discount: of the sum over a segment; 1 in the authors' code.
        reduction: whether a segment's score is the sum over its steps, or their mean.
        conservative_weight: lambda in (0, 1]; below 1, the dispreferred segment counts for less, which keeps the policy
            near the data.
        bc_weight: beta of beta * mean(-log pi) over all segments, added to the contrastive loss (CPL-BC).
        preferred_weight: of mean(-log pi) over the preferred segments, or the best of a ranking, added likewise.
        ranking_loss: of `Rankings`: Plackett-Luce, as CPL(K), or the mean over all pairs in a ranking.
        reference: score segments by log(pi / pi_ref), pi_ref being the policy at the end of pretraining (CPL-KL).
        iteration_updates: the updates after which the policy so far becomes the reference, again and again; None keeps
            the first one. Needs `reference`.
        extrapolation: how far an iteration begins beyond the policy so far, in multiples of the last iteration's move.
        label_smoothing: epsilon; a label y counts as (1 - epsilon) y + epsilon / 2, as if so many were random.
        learning_rate: Adam's, after pretraining.
        warmup_updates: over which that learning rate rises from 0.
        decay_updates: the update (counted from the first one) at which the learning rate, falling along a cosine since
            the end of pretraining, reaches 0; None keeps it constant, as in the authors' code.
        pretrain_updates: behaviour cloning of all segments, before anything is contrasted.
        pretrain_learning_rate: Adam's, while pretraining.
        action_noise: standard deviation of the Gaussian noise of `sample_actions`.
        action_limit: actions of the data are clipped to this distance from 0; 1 - 1e-5 in the authors' code.
        pixels: how images are seen, where observations are images.

    Raises:
        ValueError: a reference is to be renewed, but there is none.
    """

    hidden_dims: tuple[int, ...] = (256, 256)
    dropout: float = 0.0
    temperature: float = 0.1
    discount: float = 1.0
    reduction: Literal["sum", "mean"] = "sum"
    conservative_weight: float = 0.5
    bc_weight: float = 0.0
    preferred_weight: float = 0.0
    ranking_loss: Literal["plackett_luce", "all_pairs"] = "plackett_luce"
    reference: bool = False
    iteration_updates: int | None = None
    extrapolation: float = 0.0
    label_smoothing: float = 0.0
    learning_rate: float = 3e-4
    warmup_updates: int = 100
    decay_updates: int | None = None
    pretrain_updates: int = 1000
    pretrain_learning_rate: float = 3e-4
    action_noise: float = 0.1
    action_limit: float = 1.0
    pixels: Pixels | None = None

    def __post_init__(self) -> None:
        if self.iteration_updates is not None and not (self.reference and self.iteration_updates >= 1):
            raise ValueError("iteration_updates renews the reference policy: set reference, and at least 1 update.")
        if self.extrapolation and self.iteration_updates is None:
            raise ValueError("extrapolation is of one iteration to the next: set iteration_updates as well.")


CPL = CPLConfig()
CPL_BC = CPLConfig(conservative_weight=1.0, bc_weight=1.0)
CPL_KL = CPLConfig(temperature=0.2, conservative_weight=0.75, reference=True, learning_rate=3e-5)
DPO = CPLConfig(conservative_weight=1.0, reference=True, learning_rate=3e-5)
RPO = CPLConfig(conservative_weight=1.0, reference=True, learning_rate=3e-5, preferred_weight=1.0)
PRO = CPLConfig(conservative_weight=1.0, preferred_weight=1.0)
APO = CPLConfig(conservative_weight=1.0, reference=True, learning_rate=3e-5, iteration_updates=1000, extrapolation=0.3)


class CPLAgent(TrainState):
    """A policy learned by CPL.

    `reference_params` is None unless the configuration asks for a reference policy, and `iterate_params`, the policy at
    the end of the last iteration, unless it asks for extrapolation.
    """

    config: CPLConfig = struct.field(pytree_node=False)
    reference_params: PyTree | None
    iterate_params: PyTree | None

    @classmethod
    def create(
        cls, config: CPLConfig, example: Preferences | Rankings, key: Key, *, normalizer: Normalizer | None = None
    ) -> Self:
        segments = example.segments
        shape, action_dim = observation_shape(segments.observations, config.pixels), segments.actions.shape[-1]
        params = init(_policy(config, action_dim), key, jnp.zeros(shape))
        return cls.begin(
            config,
            params,
            adam_at(0.0).init(params),
            shape,
            action_dim,
            normalizer,
            reference_params=jax.tree.map(jnp.copy, params) if config.reference else None,
            iterate_params=jax.tree.map(jnp.copy, params) if config.extrapolation else None,
        )

    @property
    def policy(self) -> DeterministicPolicy:
        return _policy(self.config, self.action_dim)

    def loss(self, params: PyTree, batch: Preferences | Rankings, key: Key) -> tuple[Array, Metrics]:
        """Behaviour cloning while pretraining, the contrastive loss afterwards; both need the same forward pass."""
        shift_key, dropout_key = jax.random.split(key)
        observations = augment(batch.segments.observations, shift_key, self.config.pixels)
        segments = batch.segments.replace(observations=self.normalizer(observations))
        log_probs = self._log_probs(params, segments, dropout_key)
        cloning = -jnp.mean(log_probs)
        contrastive, accuracy = self._contrast(batch, self._scores(log_probs, segments))
        total = contrastive + self.config.bc_weight * cloning
        if self.config.preferred_weight:
            total += self.config.preferred_weight * _preferred_cloning(batch, log_probs)
        # A select, not a branch: under vmap over seeds a branch would run both sides anyway.
        loss = jnp.where(self.pretraining, cloning, total)
        return loss, {
            "policy/loss": loss,
            "policy/cloning_loss": cloning,
            "policy/contrastive_loss": contrastive,
            "policy/ranking_accuracy": accuracy,
        }

    def update(self, batch: Preferences | Rankings, key: Key) -> tuple[Self, Metrics]:
        agent = self._begin_iteration()
        return agent.descend(agent.loss, adam_at(agent.learning_rate), batch, key)

    def sample_actions(self, observations: Float[Array, "*B *O"], key: Key) -> Float[Array, "*B A"]:
        return explore(self.act(observations), self.config.action_noise, key)

    def act(self, observations: Float[Array, "*B *O"]) -> Float[Array, "*B A"]:
        return apply(self.policy, self.params, self.normalizer(observations))

    def segment_scores(self, segments: Segments) -> Float[Array, "*B"]:
        """What the loss contrasts: the advantage sum of each segment, relative to the reference policy, if any."""
        segments = segments.replace(observations=self.normalizer(segments.observations))
        return self._scores(self._log_probs(self.params, segments, None), segments)

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

    def _begin_iteration(self) -> Self:
        """At the first update after pretraining, and of every further iteration: a fresh Adam and a new reference."""
        since = self.step - self.config.pretrain_updates
        first, renewed = since == 0, jnp.zeros((), bool)
        if self.config.iteration_updates is not None:
            renewed = (since > 0) & (since % self.config.iteration_updates == 0)
        begins = first | renewed
        params, iterate = self.params, self.iterate_params
        if iterate is not None:
            reach = jnp.where(renewed, self.config.extrapolation, 0.0)
            params = jax.tree.map(lambda now, before: now + reach * (now - before), params, iterate)
            iterate = _select(begins, self.params, iterate)
        reference = self.reference_params
        return self.replace(
            params=params,
            iterate_params=iterate,
            reference_params=None if reference is None else _select(begins, params, reference),
            opt_state=_select(begins, adam_at(0.0).init(params), self.opt_state),
        )

    def _log_probs(self, params: PyTree, segments: Segments, dropout_key: Key | None) -> Float[Array, "*B T"]:
        means = apply(self.policy, params, segments.observations, dropout_key=dropout_key)
        limit = self.config.action_limit
        return squared_error_log_probability(jnp.clip(segments.actions, -limit, limit), means)

    def _scores(self, log_probs: Float[Array, "*B T"], segments: Segments) -> Float[Array, "*B"]:
        """The advantage sums of segments with normalised observations, given the policy's log-probabilities."""
        if self.reference_params is not None:
            log_probs = log_probs - self._log_probs(self.reference_params, segments, None)
        scale = self.config.temperature / (log_probs.shape[-1] if self.config.reduction == "mean" else 1)
        return advantage_sum(scale * log_probs, self.config.discount)

    def _contrast(self, batch: Preferences | Rankings, scores: Float[Array, "*B K"]) -> tuple[Array, Array]:
        """The contrastive loss, and the share of decided pairs (for rankings: of best segments) that come out right."""
        weight = self.config.conservative_weight
        if isinstance(batch, Rankings):
            accuracy = jnp.mean(jnp.argmax(scores, axis=-1) == 0)
            loss = plackett_luce_loss if self.config.ranking_loss == "plackett_luce" else all_pairs_loss
            return jnp.mean(loss(scores, weight)), accuracy
        labels = smoothed(batch.labels, self.config.label_smoothing)
        losses = contrastive_preference_loss(scores[..., 0], scores[..., 1], labels, weight)
        return jnp.mean(losses), ranking_accuracy(scores[..., 1] - scores[..., 0], batch.labels)


def _policy(config: CPLConfig, action_dim: int) -> DeterministicPolicy:
    return DeterministicPolicy(config.hidden_dims, action_dim, config.dropout, config.pixels)


def _preferred_cloning(batch: Preferences | Rankings, log_probs: Float[Array, "*B K T"]) -> Array:
    """Mean -log pi over the preferred segments (both, in a tie), or over the best of each ranking."""
    if isinstance(batch, Rankings):
        return -jnp.mean(log_probs[..., 0, :])
    preferred = jnp.stack([batch.labels <= 0.5, batch.labels >= 0.5], axis=-1)
    return -jnp.mean(log_probs, where=preferred[..., None])


def _select(condition: Array, chosen: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(lambda one, two: jnp.where(condition, one, two), chosen, other)
