"""Preference IQL (P-IQL): a reward model from preferences, and implicit Q-learning with it, at the same time.

The baseline of Hejna et al. 2023, "Contrastive Preference Learning" (arXiv:2310.13639), after Kostrikov et al. 2021,
"Offline Reinforcement Learning with Implicit Q-Learning" (arXiv:2110.06169). Each update takes pairs of segments twice:

* for the first `reward_updates`, the reward model learns from their labels, by cross-entropy of the summed rewards;
* from the first update on, IQL learns from their steps, with the rewards that the model gives at that moment, into
  which no gradient flows. The last step of a segment is left out, because its successor is not known, and no step is
  terminal.

From images, the reward model has an encoder of its own; both learn from the same randomly shifted images.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Self

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from agents.iql import IQLAgent, IQLConfig
from agents.reward_model import RewardModelAgent, RewardModelConfig
from robopref.images import augment
from robopref.networks import Normalizer, Pixels
from robopref.types import Key, Metrics, Preferences, PyTree, Segments


@dataclass(frozen=True)
class PIQLConfig:
    """P-IQL's hyperparameters.

    Attributes:
        reward: of the reward model; one member, as published.
        iql: of everything else. Its `pixels` and those of `reward` are the same.
        reward_updates: after how many updates the reward model stays as it is.

    Raises:
        ValueError: reward model and IQL see different things.
    """

    reward: RewardModelConfig = field(default_factory=lambda: RewardModelConfig(ensemble=1))
    iql: IQLConfig = field(default_factory=IQLConfig)
    reward_updates: int = 50_000

    def __post_init__(self) -> None:
        if self.reward.pixels != self.iql.pixels:
            raise ValueError(
                f"the reward model and IQL look at the same observations: set reward.pixels ({self.reward.pixels}) and"
                f" iql.pixels ({self.iql.pixels}) to the same."
            )


# Hejna et al.'s released configurations, with batches of 96 pairs from states and of 32 from images.
STATE = PIQLConfig(
    reward=RewardModelConfig(hidden_dims=(512, 512), ensemble=1),
    iql=IQLConfig(hidden_dims=(512, 512), dropout=0.25, decay_updates=500_000),
)
PIXELS = PIQLConfig(
    reward=RewardModelConfig(hidden_dims=(1024, 1024), ensemble=1, learning_rate=1e-4, pixels=Pixels()),
    iql=IQLConfig(hidden_dims=(1024, 1024), dropout=0.5, learning_rate=1e-4, pixels=Pixels()),
)


class PIQLAgent(struct.PyTreeNode):
    """A policy learned by P-IQL, with the reward model that taught it."""

    reward_model: RewardModelAgent
    iql: IQLAgent
    step: Int[Array, ""]
    config: PIQLConfig = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls, config: PIQLConfig, example: Preferences, key: Key, *, normalizer: Normalizer | None = None
    ) -> Self:
        reward_key, iql_key = jax.random.split(key)
        # Images are shifted once for both, so neither of the two shifts them again.
        still = None if config.iql.pixels is None else dataclasses.replace(config.iql.pixels, shift=0)
        reward_config = dataclasses.replace(config.reward, pixels=still)
        iql_config = dataclasses.replace(config.iql, pixels=still)
        return cls(
            reward_model=RewardModelAgent.create(reward_config, example, reward_key, normalizer=normalizer),
            iql=IQLAgent.create(iql_config, example.segments, iql_key, normalizer=normalizer),
            step=jnp.zeros((), jnp.int32),
            config=config,
        )

    @property
    def params(self) -> PyTree:
        """Of all networks, without the target critics."""
        return {"reward_model": self.reward_model.params, "iql": self.iql.params}

    def update(self, batch: Preferences, key: Key) -> tuple[Self, Metrics]:
        shift_key, reward_key, iql_key = jax.random.split(key, 3)
        observations = augment(batch.segments.observations, shift_key, self.config.iql.pixels)
        segments = batch.segments.replace(observations=observations)
        pairs = batch.replace(segments=segments)

        # IQL's rewards are those before the update, as in the authors' code. Within a branch they cost nothing: the
        # compiler sees that they are what the loss computes as well. What the branch saves is the backward pass.
        def learn(model: RewardModelAgent) -> tuple[RewardModelAgent, Metrics, Array]:
            learned, metrics = model.update(pairs, reward_key)
            return learned, metrics, model.rewards(segments)

        def keep(model: RewardModelAgent) -> tuple[RewardModelAgent, Metrics, Array]:
            _, metrics = model.loss(model.params, pairs, reward_key)
            return model, metrics, model.rewards(segments)

        learning = self.step < self.config.reward_updates
        reward_model, reward_metrics, rewards = jax.lax.cond(learning, learn, keep, self.reward_model)
        iql, iql_metrics = self.iql.update_on_segments(segments, rewards, iql_key)
        metrics = {**reward_metrics, "reward/mean": jnp.mean(rewards), **iql_metrics}
        return self.replace(reward_model=reward_model, iql=iql, step=self.step + 1), metrics

    def sample_actions(self, observations: Float[Array, "*B *O"], key: Key) -> Float[Array, "*B A"]:
        return self.iql.sample_actions(observations, key)

    def act(self, observations: Float[Array, "*B *O"]) -> Float[Array, "*B A"]:
        return self.iql.act(observations)

    def segment_scores(self, segments: Segments) -> Float[Array, "*B"]:
        """What the reward model compares: the learned reward of each segment."""
        return self.reward_model.segment_scores(segments)

    def policy_segment_scores(self, segments: Segments) -> Float[Array, "*B"]:
        """Sum of log pi over each segment: how well the policy explains it."""
        return self.iql.segment_scores(segments)
