"""A reward model learned from preferences: Bradley-Terry over the summed rewards of two segments.

Christiano et al. 2017, "Deep reinforcement learning from human preferences" (arXiv:1706.03741), equation 1:

    P(second preferred) = sigmoid(score_2 - score_1),    score(segment) = sum_t r(s_t, a_t)

fitted by cross-entropy to the labels, soft ones and ties (0.5) as they are. Two networks give the rewards:

* `mlp`: r(s_t, a_t) of each step alone, as in P-IQL.
* `transformer`: Kim et al. 2023, "Preference Transformer" (arXiv:2303.00957). A causal transformer reads states and
  actions; from the output x_t at each action come a reward r_t, which depends on all that went before, and a query and
  a key. A bidirectional attention over the whole segment says how much each step matters: step i looks at step t with
  weight softmax_t(<q_i, k_t>), and w_t is the mean of these over i (equations 6 to 8). The score is sum_t w_t r_t.

To have one scale for both, the reward of a step is T w_t r_t for the transformer, whose weights T w_t are 1 on average,
and r_t for the MLP. The score of a segment is then the sum of these rewards, or their mean: with the mean the
transformer's score is the published one, with the sum the MLP's.

The members of an ensemble differ in their initial parameters (and dropout); all learn from the same batches. From
images, each has an encoder of its own (Yarats et al. 2021, arXiv:2107.09645), whose features stand for observations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

from robopref.agent import TrainState, adam
from robopref.images import augment
from robopref.losses import preference_loss, ranking_accuracy, smoothed
from robopref.networks import Normalizer, Pixels, observation_shape
from robopref.reward_networks import MLPReward, PreferenceTransformer, init_members, member_rewards
from robopref.types import Key, Metrics, Preferences, PyTree, Segments


@dataclass(frozen=True)
class RewardModelConfig:
    """The reward model's hyperparameters.

    Attributes:
        network: what gives the rewards, see the module's docstring.
        hidden_dims: widths of the MLP's hidden layers.
        ensemble: members, initialised apart and trained on the same batches; P-IQL has 1.
        dropout: in the network, while training.
        embed_dim: width of the transformer (256 as published).
        layers: of the causal transformer (1 as published).
        heads: of the causal attention (4 as published); the preference attention has one.
        max_length: the longest segment that the transformer has positions for, in steps.
        reduction: of a segment's rewards to its score. `sum` is P-IQL's, `mean` Preference Transformer's; under the
            mean the same rewards tell short and long segments apart equally well.
        bounded: rewards pass through tanh.
        learning_rate: AdamW's.
        decay_updates: the update at which the learning rate, falling along a cosine, reaches 0; None keeps it constant.
        weight_decay: AdamW's; 0 makes it Adam.
        label_smoothing: e turns a label into (1 - e) label + e / 2, because people err however clear the case.
        pixels: how images are seen, where observations are images.

    Raises:
        ValueError: there is no member, no label is left, or the heads do not divide the transformer's width.
    """

    network: Literal["mlp", "transformer"] = "mlp"
    hidden_dims: tuple[int, ...] = (256, 256)
    ensemble: int = 3
    dropout: float = 0.0
    embed_dim: int = 256
    layers: int = 1
    heads: int = 4
    max_length: int = 100
    reduction: Literal["sum", "mean"] = "sum"
    bounded: bool = False
    learning_rate: float = 3e-4
    decay_updates: int | None = None
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    pixels: Pixels | None = None

    def __post_init__(self) -> None:
        if self.ensemble < 1:
            raise ValueError(f"a reward model needs at least one member, not ensemble={self.ensemble}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must lie in [0, 1), not {self.label_smoothing}: 1 would leave no labels."
            )
        if self.network == "transformer" and self.embed_dim % self.heads:
            raise ValueError(f"embed_dim ({self.embed_dim}) must be a multiple of heads ({self.heads}).")

    def build_network(self, *, uncertain: bool = False) -> MLPReward | PreferenceTransformer:
        """The network of one member, with or without a second head."""
        if self.network == "mlp":
            return MLPReward(self.hidden_dims, self.dropout, self.bounded, self.pixels, uncertain)
        return PreferenceTransformer(
            self.embed_dim,
            self.layers,
            self.heads,
            self.max_length,
            self.dropout,
            self.bounded,
            self.pixels,
            uncertain,
        )


class RewardModelAgent(TrainState):
    """An ensemble of reward models: a learner without a policy. Leaves of `params` have a leading axis of members."""

    config: RewardModelConfig = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls, config: RewardModelConfig, example: Preferences, key: Key, *, normalizer: Normalizer | None = None
    ) -> Self:
        """A ValueError if the transformer has too few positions for the segments of `example`."""
        segments = example.segments
        params = init_members(config.build_network(), key, config.ensemble, segments)
        shape, action_dim = observation_shape(segments.observations, config.pixels), segments.actions.shape[-1]
        return cls.begin(config, params, _optimizer(config).init(params), shape, action_dim, normalizer)

    @property
    def network(self) -> MLPReward | PreferenceTransformer:
        return self.config.build_network()

    def loss(self, params: PyTree, batch: Preferences, key: Key) -> tuple[Array, Metrics]:
        """Mean cross-entropy over pairs and members, with dropout and, from images, with random shifts.

        The metrics are that loss, the share of decided pairs that members rank as labelled (mean over members), the
        mean |score difference| of a pair, and how far members' score differences spread around their mean.
        """
        shift_key, dropout_key = jax.random.split(key)
        observations = augment(batch.segments.observations, shift_key, self.config.pixels)
        segments = batch.segments.replace(observations=observations)
        scores = self._reduce(self._rewards(params, segments, dropout_key=dropout_key))
        logits = scores[..., 1] - scores[..., 0]
        loss = jnp.mean(preference_loss(logits, smoothed(batch.labels, self.config.label_smoothing)))
        return loss, {
            "reward/loss": loss,
            "reward/ranking_accuracy": ranking_accuracy(logits, batch.labels),
            "reward/margin": jnp.mean(jnp.abs(logits)),
            "reward/disagreement": jnp.mean(jnp.std(logits, axis=0)),
        }

    def update(self, batch: Preferences, key: Key) -> tuple[Self, Metrics]:
        return self.descend(self.loss, _optimizer(self.config), batch, key)

    def rewards(self, segments: Segments) -> Float[Array, "*B T"]:
        """The learned reward of each step, mean over members: r_t for the MLP, T w_t r_t for the transformer.

        Their sum over a segment (their mean, where the configuration says so) is its score.
        """
        return jnp.mean(self._rewards(self.params, segments), axis=0)

    def segment_scores(self, segments: Segments) -> Float[Array, "*B"]:
        """What the model compares, mean over members: sigmoid(score_2 - score_1) is P(the second is preferred)."""
        return jnp.mean(self.member_scores(segments), axis=0)

    def member_scores(self, segments: Segments) -> Float[Array, " E *B"]:
        """The score that each member gives each segment; where members disagree, a label is worth asking for."""
        return self._reduce(self._rewards(self.params, segments))

    def _reduce(self, rewards: Float[Array, "*B T"]) -> Float[Array, "*B"]:
        return jnp.sum(rewards, axis=-1) if self.config.reduction == "sum" else jnp.mean(rewards, axis=-1)

    def _rewards(
        self, params: PyTree, segments: Segments, *, dropout_key: Key | None = None
    ) -> Float[Array, " E *B T"]:
        return member_rewards(self.network, params, self.normalizer, segments, dropout_key)


def _optimizer(config: RewardModelConfig) -> optax.GradientTransformation:
    return adam(config.learning_rate, config.decay_updates, config.weight_decay)
