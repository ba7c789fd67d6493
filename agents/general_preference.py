"""A general preference model: embeddings of segments whose preferences may go in circles.

Zhang et al. 2024, "Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment"
(arXiv:2410.02197). Each segment has an embedding v of 2k numbers, and

    P(second preferred) = sigmoid(v_2^T R v_1 / temperature),    v = sum_t f(s_t, a_t)

where R is skew-symmetric: k blocks [[0, -1], [1, 0]] along its diagonal. So P(i over j) + P(j over i) = 1 whatever the
parameters. Each block adds the sine of the angle from v_1 to v_2 in a plane of its own, times their lengths there: if
rock, paper and scissors lie a third of a turn apart, each is beaten by the next. Bradley-Terry, with one score per
segment, cannot say that; it is the case in which one number of a block is the score and the other the same for all.

With `normalized`, embeddings have length 1, as published (with a temperature of 0.1 in the authors' code). Then no
preference can be surer than sigmoid(1 / temperature), and Bradley-Terry is contained up to the curvature of a circle
alone.

There is no reward to train a policy with; what it is here for is to test whether labels go in circles, against a reward
model that was trained alike (`robopref.evaluation.intransitivity`).
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
from robopref.losses import preference_loss, ranking_accuracy
from robopref.networks import MLP, Normalizer, apply, init, observation_shape
from robopref.types import Key, Metrics, Preferences, PyTree, Segments


@dataclass(frozen=True)
class GeneralPreferenceConfig:
    """The general preference model's hyperparameters.

    Attributes:
        hidden_dims: widths of the MLP's hidden layers.
        planes: k, half the numbers in an embedding; one suffices for a single cycle.
        temperature: by which scores are divided.
        normalized: embeddings have length 1.
        dropout: in the network, while training.
        learning_rate: AdamW's.
        decay_updates: the update at which the learning rate, falling along a cosine, reaches 0; None keeps it constant.
        weight_decay: AdamW's; 0 makes it Adam.

    Raises:
        ValueError: there is no plane, or the temperature is not above 0.
    """

    hidden_dims: tuple[int, ...] = (256, 256)
    planes: int = 4
    temperature: float = 1.0
    normalized: bool = False
    dropout: float = 0.0
    learning_rate: float = 3e-4
    decay_updates: int | None = None
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.planes < 1:
            raise ValueError(f"embeddings need at least one plane, not planes={self.planes}.")
        if not self.temperature > 0:
            raise ValueError(f"the temperature must be above 0, not {self.temperature}.")


class SegmentEmbedding(nn.Module):
    """The sum over a segment's steps of what an MLP makes of each step's observation and action."""

    hidden_dims: tuple[int, ...]
    size: int
    normalized: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, observations: Float[Array, "*B T O"], actions: Float[Array, "*B T A"], *, deterministic: bool = True
    ) -> Float[Array, "*B size"]:
        steps = jnp.concatenate([observations, actions], axis=-1)
        network = MLP(self.hidden_dims, self.size, self.dropout)
        embeddings = jnp.sum(network(steps, deterministic=deterministic), axis=-2)
        if not self.normalized:
            return embeddings
        # The length of 0 has no gradient.
        squares = jnp.sum(jnp.square(embeddings), axis=-1, keepdims=True)
        return embeddings * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


class GeneralPreferenceAgent(TrainState):
    """A general preference model: a learner without a policy."""

    config: GeneralPreferenceConfig = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls, config: GeneralPreferenceConfig, example: Preferences, key: Key, *, normalizer: Normalizer | None = None
    ) -> Self:
        segments = example.segments
        shape, action_dim = observation_shape(segments.observations, None), segments.actions.shape[-1]
        params = init(_network(config), key, jnp.zeros((1, *shape)), jnp.zeros((1, action_dim)))
        return cls.begin(config, params, _optimizer(config).init(params), shape, action_dim, normalizer)

    @property
    def network(self) -> SegmentEmbedding:
        return _network(self.config)

    def loss(self, params: PyTree, batch: Preferences, key: Key) -> tuple[Array, Metrics]:
        """Mean cross-entropy over pairs, with dropout.

        The metrics are that loss, and the share of decided pairs whose likelier answer is the label.
        """
        logits = self._logits(params, batch.segments, dropout_key=key)
        loss = jnp.mean(preference_loss(logits, batch.labels))
        return loss, {"preference/loss": loss, "preference/accuracy": ranking_accuracy(logits, batch.labels)}

    def update(self, batch: Preferences, key: Key) -> tuple[Self, Metrics]:
        return self.descend(self.loss, _optimizer(self.config), batch, key)

    def embeddings(self, segments: Segments) -> Float[Array, "*B 2k"]:
        """v of each segment: what is to be computed once for it, however many others it is compared with."""
        return self._embed(self.params, segments)

    def preference_logits(self, segments: Segments) -> Float[Array, "*B"]:
        """Of pairs [*B, 2, T, ...]: sigmoid(logit) is P(the second is preferred)."""
        return self._logits(self.params, segments)

    def _logits(self, params: PyTree, segments: Segments, *, dropout_key: Key | None = None) -> Float[Array, "*B"]:
        embeddings = self._embed(params, segments, dropout_key=dropout_key)
        planes = embeddings.reshape(*embeddings.shape[:-1], self.config.planes, 2)
        first, second = planes[..., 0, :, :], planes[..., 1, :, :]
        scores = jnp.sum(second[..., 1] * first[..., 0] - second[..., 0] * first[..., 1], axis=-1)
        return scores / self.config.temperature

    def _embed(self, params: PyTree, segments: Segments, *, dropout_key: Key | None = None) -> Float[Array, "*B 2k"]:
        observations = self.normalizer(segments.observations)
        return apply(self.network, params, observations, segments.actions, dropout_key=dropout_key)


def _network(config: GeneralPreferenceConfig) -> SegmentEmbedding:
    return SegmentEmbedding(config.hidden_dims, 2 * config.planes, config.normalized, config.dropout)


def _optimizer(config: GeneralPreferenceConfig) -> optax.GradientTransformation:
    return adam(config.learning_rate, config.decay_updates, config.weight_decay)
