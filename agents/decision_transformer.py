"""Decision Transformer: actions by a causal transformer that is asked for a return.

Chen et al. 2021, "Decision Transformer: Reinforcement Learning via Sequence Modeling" (arXiv:2106.01345). The last T
steps of an episode are a sequence of tokens

    R_1, s_1, a_1, R_2, s_2, a_2, …, R_T, s_T, a_T

R_t being the return to go, the rewards from step t to the end of the episode. Each token is a linear map of its
quantity plus a learned embedding of the step t within the episode, the same for all three. The action of step t is read
at s_t, which has seen R_1 … R_t, s_1 … s_t and a_1 … a_(t-1), and training regresses it on the data:

    L = mean (a_t - tanh f(R_<=t, s_<=t, a_<t))^2        over the steps of the windows and the dimensions of an action

To act, R_1 is the return that is wished for, and what was earned on the way is taken off it: see
`robopref.agent.ContextPolicy`. Without any past, `act` asks for the return that the agent holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import flax.linen as nn
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from robopref.agent import TrainState, first_windows
from robopref.networks import Normalizer, Transformer, apply, explore, init, interleave
from robopref.types import Key, Metrics, PyTree, Windows


@dataclass(frozen=True)
class DecisionTransformerConfig:
    """Decision Transformer's hyperparameters; the defaults are those of the authors' code for locomotion.

    Attributes:
        length: steps that it sees, the present one included.
        width: of the transformer.
        layers: of the transformer.
        heads: of the attention.
        dropout: in the transformer, while training.
        learning_rate: AdamW's.
        weight_decay: AdamW's.
        warmup_updates: over which the learning rate rises from 0.
        decay_updates: the update (counted from the first one) at which the learning rate, falling along a cosine since
            the end of the warm-up, reaches 0; None keeps it constant, as in the authors' code.
        clip: gradients with a larger norm, of all parameters together, are scaled down to it.
        return_scale: returns to go are divided by this.
        episode_steps: steps of an episode that have an embedding of their own; later ones share the last.
        action_noise: standard deviation of the Gaussian noise of `sample_actions`.

    Raises:
        ValueError: there is no step to see, or the heads do not divide the width.
    """

    length: int = 20
    width: int = 128
    layers: int = 3
    heads: int = 1
    dropout: float = 0.1
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    warmup_updates: int = 10_000
    decay_updates: int | None = None
    clip: float = 0.25
    return_scale: float = 1000.0
    episode_steps: int = 1000
    action_noise: float = 0.1

    def __post_init__(self) -> None:
        if self.length < 1 or self.episode_steps < 1:
            raise ValueError(f"length ({self.length}) and episode_steps ({self.episode_steps}) must be at least 1.")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads}).")


class DecisionTransformer(nn.Module):
    """Windows of scaled returns to go and normalised observations to an action for each step."""

    width: int
    layers: int
    heads: int
    dropout: float
    episode_steps: int
    action_dim: int

    @nn.compact
    def __call__(
        self,
        returns_to_go: Float[Array, "*B T"],
        observations: Float[Array, "*B T O"],
        actions: Float[Array, "*B T A"],
        steps: Int[Array, "*B T"],
        mask: Bool[Array, "*B T"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*B T A"]:
        time = mask.shape[-1]
        place = nn.Embed(self.episode_steps, self.width, name="step")(jnp.minimum(steps, self.episode_steps - 1))
        parts = {"return": returns_to_go[..., None], "observation": observations, "action": actions}
        tokens = interleave([nn.Dense(self.width, name=name)(part) + place for name, part in parts.items()])
        tokens = nn.LayerNorm()(tokens)
        seen = jnp.tril(jnp.ones((3 * time, 3 * time), bool)) & jnp.repeat(mask, 3, axis=-1)[..., None, :]
        transformer = Transformer(self.layers, self.heads, self.dropout, activation=nn.relu)
        hidden = transformer(tokens, seen, read=slice(1, None, 3), deterministic=deterministic)
        return jnp.tanh(nn.Dense(self.action_dim, name="head")(hidden))


class DecisionTransformerAgent(TrainState):
    """A Decision Transformer; `target_return` is what `act` and `sample_actions` ask for."""

    config: DecisionTransformerConfig = struct.field(pytree_node=False)
    target_return: Float[Array, ""]

    @classmethod
    def create(
        cls,
        config: DecisionTransformerConfig,
        example: Windows,
        key: Key,
        *,
        normalizer: Normalizer | None = None,
        target_return: float = 0.0,
    ) -> Self:
        shape, action_dim = example.observations.shape[-1:], example.actions.shape[-1]
        first = first_windows(jnp.zeros(shape), 1, action_dim)
        params = init(_network(config, action_dim), key, *_inputs(first, config))
        return cls.begin(
            config,
            params,
            _optimizer(config).init(params),
            shape,
            action_dim,
            normalizer,
            target_return=jnp.asarray(target_return, jnp.float32),
        )

    @property
    def network(self) -> DecisionTransformer:
        return _network(self.config, self.action_dim)

    @property
    def context(self) -> int:
        return self.config.length

    def loss(self, params: PyTree, batch: Windows, key: Key) -> tuple[Array, Metrics]:
        """Mean squared error over the steps of the windows and the dimensions of an action."""
        errors = jnp.mean(jnp.square(self._actions(params, batch, key) - batch.actions), axis=-1)
        loss = jnp.mean(errors, where=batch.mask)
        return loss, {"policy/loss": loss}

    def update(self, batch: Windows, key: Key) -> tuple[Self, Metrics]:
        return self.descend(self.loss, _optimizer(self.config), batch, key)

    def sample_actions(self, observations: Float[Array, "*B O"], key: Key) -> Float[Array, "*B A"]:
        return explore(self.act(observations), self.config.action_noise, key)

    def act(self, observations: Float[Array, "*B O"]) -> Float[Array, "*B A"]:
        """Actions at the first step of an episode that is to earn `target_return`."""
        # Steps that never were change nothing, so there is no need to make up any.
        return self.act_in_context(first_windows(observations, 1, self.action_dim, self.target_return))

    def act_in_context(self, windows: Windows) -> Float[Array, "*B A"]:
        return self._actions(self.params, windows)[..., -1, :]

    def _actions(self, params: PyTree, windows: Windows, dropout_key: Key | None = None) -> Float[Array, "*B T A"]:
        windows = windows.replace(observations=self.normalizer(windows.observations))
        return apply(self.network, params, *_inputs(windows, self.config), dropout_key=dropout_key)


def _network(config: DecisionTransformerConfig, action_dim: int) -> DecisionTransformer:
    return DecisionTransformer(
        config.width, config.layers, config.heads, config.dropout, config.episode_steps, action_dim
    )


def _inputs(windows: Windows, config: DecisionTransformerConfig) -> tuple[Array, ...]:
    """What the network is given of windows with normalised observations."""
    returns_to_go = windows.returns_to_go / config.return_scale
    return returns_to_go, windows.observations, windows.actions, windows.steps, windows.mask


def _optimizer(config: DecisionTransformerConfig) -> optax.GradientTransformation:
    def rate(count: Array) -> Array:
        warm = config.learning_rate * jnp.minimum((count + 1) / max(config.warmup_updates, 1), 1.0)
        if config.decay_updates is None:
            return warm
        left = max(config.decay_updates - config.warmup_updates, 1)
        decayed: Array = warm * optax.cosine_decay_schedule(1.0, left)(jnp.maximum(count - config.warmup_updates, 0))
        return decayed

    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adamw(rate, weight_decay=config.weight_decay))
