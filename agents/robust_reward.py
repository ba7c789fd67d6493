"""Robust reward learning: rewards with an uncertainty of their own, learned from labels some of which are wrong.

Liu et al. 2024, "PEARL: Zero-shot Cross-task Preference Alignment and Robust Reward Learning for Robotic Manipulation"
(ICML 2024). The reward of a step is Gaussian, N(mu_t, sigma_t^2), with two heads on the MLP or on the Preference
Transformer (`agents/reward_model.py`). Scores of segments are drawn by reparameterisation, K times, and the labels,
soft ones as they are, are explained by the mean of the K probabilities (or by each of them: the mean of the losses).
What keeps sigma from vanishing is a floor under the differential entropy of every step,

    weight * max(0, eta - h_t),    h_t = 1/2 ln(2 pi e sigma_t^2)

without which the two heads are Bradley-Terry after all. The reward that is handed on is mu.

The floor is not set by eta here, but by the standard deviation of the noise that it puts on the logit of a pair. A
logit adds the noise of the 2 T steps of its segments, so that the same eta is little noise in a mean over long segments
and much in a sum: sigma sqrt(2 T) under a sum, sigma sqrt(2 / T) under a mean. What the second head gives is therefore
the logarithm of the logit noise that a pair has if all of its steps are as uncertain as this one; `step_noise` turns it
into sigma. All that training does with it is then the same for segments of any length. Two more things are our choice:
sigma belongs to the reward as it is handed on, the Preference Transformer's weight included, so that attention cannot
make the noise smaller or larger; and as only the sum of a pair's noise matters, it is drawn as one number per pair
(the local reparameterisation of Kingma et al. 2015, arXiv:1506.02557), which is the same distribution with less
variance in the gradient of sigma.

Sigma begins about where the floor is, and cannot rise to more than e times that: where noise is so large that every
draw decides the label, there is no gradient that would bring it back, and hardly one to learn from. With a weight of 0
it begins at a logit noise of 1, which is all but Bradley-Terry.

Wrong labels are learned last, so that stopping early is robust too, and every comparison needs it as a control:
`noise="none"` is Bradley-Terry, `frozen_after` stops it, and `stopping_update` chooses where from held-out pairs.
Labels may also be corrected before learning, by the vote of an ensemble (`robopref.preferences.vote_on_labels`), and
rewards bounded before reinforcement learning (`robopref.preferences.preference_as_reward`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from agents.reward_model import RewardModelConfig
from robopref.agent import TrainState, adam
from robopref.images import augment
from robopref.losses import preference_loss, ranking_accuracy, smoothed
from robopref.networks import Normalizer, observation_shape
from robopref.reward_networks import MLPReward, PreferenceTransformer, init_members, member_rewards
from robopref.types import Key, Metrics, Preferences, PyTree, Segments


@dataclass(frozen=True)
class RobustRewardConfig(RewardModelConfig):
    """The hyperparameters of robust reward learning, besides those of a reward model.

    Attributes:
        noise: `learned` has the head for sigma, `fixed` the noise of the floor everywhere, `none` is Bradley-Terry.
        logit_noise: standard deviation of a pair's logit at the floor. The default is sigma = 20 under a mean over
            10 steps, rounded.
        floor_weight: of the floor, which holds if this is above the pull of the labels: up to 0.4 logit_noise for
            the mean of losses, less for the mean probability. 0 lets sigma vanish.
        aggregate: over draws: the loss of their mean probability, or the mean of their losses.
        samples: K, draws per pair, member and update.
        frozen_after: updates after which parameters stay as they are; None is never.

    Raises:
        ValueError: noise that is not above 0, a negative weight, no draws, or no update at all.
    """

    noise: Literal["learned", "fixed", "none"] = "learned"
    logit_noise: float = 9.0
    floor_weight: float = 10.0
    aggregate: Literal["probability", "loss"] = "probability"
    samples: int = 16
    frozen_after: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.logit_noise > 0:
            raise ValueError(f"logit_noise must be above 0, not {self.logit_noise}; noise='none' has none.")
        if self.floor_weight < 0:
            raise ValueError(f"floor_weight must be 0 or more, not {self.floor_weight}.")
        if self.samples < 1:
            raise ValueError(f"at least one sample is drawn per pair, not samples={self.samples}.")
        if self.frozen_after is not None and self.frozen_after < 1:
            raise ValueError(f"frozen_after must leave at least 1 update, not {self.frozen_after}.")


def step_noise(logit_noise: float, length: int, reduction: Literal["sum", "mean"]) -> float:
    """The sigma of every step's reward that gives the logit of a pair this standard deviation.

    Args:
        logit_noise: of the difference between the scores of two segments.
        length: T, the steps of each.
        reduction: of rewards to a score. A sum of 2 T noises is sigma sqrt(2 T), a difference of means sigma sqrt(2/T).
    """
    return logit_noise / math.sqrt(2 * length) if reduction == "sum" else logit_noise * math.sqrt(length / 2)


def sampled_preference_loss(
    logits: Float[Array, " K *B"], labels: Float[Array, "*#B"], aggregate: Literal["probability", "loss"]
) -> Float[Array, "*B"]:
    """Cross-entropy of soft labels against K sampled logits: of the mean of their probabilities, or the mean of theirs.

    The mean probability is taken in log space, so that logits of any size have a finite loss and gradient.
    """
    if aggregate == "loss":
        return jnp.mean(preference_loss(logits, labels), axis=0)
    second, first = (jax.nn.logsumexp(jax.nn.log_sigmoid(sign * logits), axis=0) for sign in (1.0, -1.0))
    return math.log(logits.shape[0]) - labels * second - (1.0 - labels) * first


def stopping_update(updates: Int[np.ndarray, " C"], held_out_losses: Float[np.ndarray, " C *S"]) -> int:
    """After how many updates to stop, for `frozen_after`: where the loss on held-out pairs is least.

    Labels of the held-out pairs may be as wrong as the others, if they are so at random.

    Args:
        updates: at which the losses were measured, ascending.
        held_out_losses: such as `RobustRewardAgent.held_out_loss`; over further axes, such as seeds, the mean is taken.

    Raises:
        ValueError: the counts do not fit, or a loss is not a finite number.
    """
    updates, losses = np.asarray(updates), np.asarray(held_out_losses, np.float64)
    if not len(updates) or losses.shape[:1] != updates.shape:
        raise ValueError(f"{losses.shape[0] if losses.ndim else 0} losses were given for {len(updates)} updates.")
    if not np.isfinite(losses).all():
        raise ValueError("a held-out loss is not a finite number; look for NaN in the held-out pairs.")
    return int(updates[np.argmin(losses.reshape(len(updates), -1).mean(axis=1))])


class RobustRewardAgent(TrainState):
    """An ensemble of Gaussian reward models: a learner without a policy. Leaves of `params` have an axis of members."""

    config: RobustRewardConfig = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls, config: RobustRewardConfig, example: Preferences, key: Key, *, normalizer: Normalizer | None = None
    ) -> Self:
        """A ValueError if the transformer has too few positions for the segments of `example`."""
        segments = example.segments
        params = init_members(_network(config), key, config.ensemble, segments)
        shape, action_dim = observation_shape(segments.observations, config.pixels), segments.actions.shape[-1]
        return cls.begin(config, params, _optimizer(config).init(params), shape, action_dim, normalizer)

    @property
    def network(self) -> MLPReward | PreferenceTransformer:
        return _network(self.config)

    def loss(self, params: PyTree, batch: Preferences, key: Key) -> tuple[Array, Metrics]:
        """Mean cross-entropy over pairs and members, with dropout and, from images, random shifts, plus the floor.

        The metrics are the cross-entropy, the share of decided pairs that the members' mu rank as labelled, the mean
        |score difference| of a pair and how far members' score differences spread around their mean; with noise, also
        the mean standard deviation of a logit, and with a head for it, by how much ln sigma is below the floor.
        """
        config = self.config
        shift_key, dropout_key, noise_key = jax.random.split(key, 3)
        observations = augment(batch.segments.observations, shift_key, config.pixels)
        means, log_noises = self._gaussians(params, batch.segments.replace(observations=observations), dropout_key)
        logits = self._logits(means)
        labels = smoothed(batch.labels, config.label_smoothing)
        metrics = {
            "reward/ranking_accuracy": ranking_accuracy(logits, batch.labels),
            "reward/margin": jnp.mean(jnp.abs(logits)),
            "reward/disagreement": jnp.mean(jnp.std(logits, axis=0)),
        }
        if config.noise == "none":
            loss = jnp.mean(preference_loss(logits, labels))
            return loss, {"reward/loss": loss, **metrics}
        noise = self._logit_noise(log_noises)
        draws = jax.random.normal(noise_key, (config.samples, *logits.shape))
        loss = jnp.mean(sampled_preference_loss(logits + noise * draws, labels, config.aggregate))
        metrics |= {"reward/loss": loss, "reward/logit_noise": jnp.mean(noise)}
        if config.noise == "fixed":
            return loss, metrics
        # eta - h_t: what else is in the entropies is the same in both.
        below = jnp.mean(jax.nn.relu(math.log(config.logit_noise) - log_noises))
        return loss + config.floor_weight * below, {**metrics, "reward/below_floor": below}

    def update(self, batch: Preferences, key: Key) -> tuple[Self, Metrics]:
        after, metrics = self.descend(self.loss, _optimizer(self.config), batch, key)
        if self.config.frozen_after is None:
            return after, metrics
        learning = self.step < self.config.frozen_after
        kept = {"params": self.params, "opt_state": self.opt_state}
        new = {"params": after.params, "opt_state": after.opt_state}
        return after.replace(**jax.tree.map(lambda old, new: jnp.where(learning, new, old), kept, new)), metrics

    def rewards(self, segments: Segments) -> Float[Array, "*B T"]:
        """mu of each step, mean over members: what is handed on.

        Its sum over a segment (its mean, where the configuration says so) is the segment's score.
        """
        return jnp.mean(self._gaussians(self.params, segments)[0], axis=0)

    def reward_stds(self, segments: Segments) -> Float[Array, "*B T"]:
        """sigma of each step, mean over members, in the unit of `rewards`; 0 without noise."""
        log_noises = self._gaussians(self.params, segments)[1]
        unit = 0.0 if self.config.noise == "none" else step_noise(1.0, log_noises.shape[-1], self.config.reduction)
        return unit * jnp.mean(jnp.exp(log_noises), axis=0)

    def segment_scores(self, segments: Segments) -> Float[Array, "*B"]:
        """What the model compares, mean over members. P(the second is preferred) also depends on the noise."""
        return jnp.mean(self.member_scores(segments), axis=0)

    def member_scores(self, segments: Segments) -> Float[Array, " E *B"]:
        """The score that each member gives each segment; where members disagree, a label is worth asking for."""
        return self._reduce(self._gaussians(self.params, segments)[0])

    def held_out_loss(self, pairs: Preferences) -> Float[Array, ""]:
        """Mean cross-entropy over pairs and members, without dropout and without chance.

        With noise, a pair's probability is the mean of sigmoid(logit + noise) over 256 equally likely noises.
        """
        means, log_noises = self._gaussians(self.params, pairs.segments)
        logits = self._logits(means)
        if self.config.noise == "none":
            return jnp.mean(preference_loss(logits, pairs.labels))
        quantiles = jax.scipy.special.ndtri((jnp.arange(256) + 0.5) / 256).reshape(-1, *[1] * logits.ndim)
        noisy = logits + quantiles * self._logit_noise(log_noises)
        return jnp.mean(sampled_preference_loss(noisy, pairs.labels, "probability"))

    def _gaussians(
        self, params: PyTree, segments: Segments, dropout_key: Key | None = None
    ) -> tuple[Float[Array, "E *B T"], Float[Array, "E *B T"]]:
        """mu, and the logarithm of the logit noise that the uncertainty of each step stands for."""
        config = self.config
        outputs = member_rewards(self.network, params, self.normalizer, segments, dropout_key)
        if config.noise != "learned":
            return outputs, jnp.full_like(outputs, math.log(config.logit_noise))
        # An output of 0 is the floor, or little noise where there is none; the logarithm ends 1 above the floor.
        first = config.logit_noise if config.floor_weight > 0 else min(1.0, config.logit_noise)
        below = jax.nn.softplus(math.log(math.e * config.logit_noise / first - 1) - outputs[..., 1])
        return outputs[..., 0], math.log(config.logit_noise) + 1.0 - below

    def _logits(self, means: Float[Array, "*B 2 T"]) -> Float[Array, "*B"]:
        scores = self._reduce(means)
        return scores[..., 1] - scores[..., 0]

    def _logit_noise(self, log_noises: Float[Array, "*B 2 T"]) -> Float[Array, "*B"]:
        """The standard deviation of each pair's logit: the root mean square over the steps of both segments.

        In log space it has a gradient even where the squares of all steps are too small for a number.
        """
        steps = log_noises.shape[-2] * log_noises.shape[-1]
        return jnp.exp(0.5 * (jax.nn.logsumexp(2.0 * log_noises, axis=(-2, -1)) - math.log(steps)))

    def _reduce(self, rewards: Float[Array, "*B T"]) -> Float[Array, "*B"]:
        return jnp.sum(rewards, axis=-1) if self.config.reduction == "sum" else jnp.mean(rewards, axis=-1)


def _network(config: RobustRewardConfig) -> MLPReward | PreferenceTransformer:
    return config.build_network(uncertain=config.noise == "learned")


def _optimizer(config: RobustRewardConfig) -> optax.GradientTransformation:
    return adam(config.learning_rate, config.decay_updates, config.weight_decay)
