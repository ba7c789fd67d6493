"""Networks that give each step of a segment a reward, for the learners of rewards.

An MLP, and the Preference Transformer of Kim et al. 2023 (arXiv:2303.00957); which rewards they give is said in
`agents/reward_model.py`. Either may have a second head that says how uncertain each reward is. From images, each
network has an encoder of its own, whose features stand for observations.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robopref.networks import (
    MLP,
    Convolutions,
    Normalizer,
    Pixels,
    Transformer,
    Trunk,
    apply,
    init,
    interleave,
    observation_shape,
)
from robopref.types import Key, PyTree, Segments


class MLPReward(nn.Module):
    """A reward for each step from that step's observation and action alone.

    If `uncertain`, there is an axis of two at the end: the reward, and whatever logarithm its uncertainty is given as.
    """

    hidden_dims: tuple[int, ...]
    dropout: float = 0.0
    bounded: bool = False
    pixels: Pixels | None = None
    uncertain: bool = False

    @nn.compact
    def __call__(
        self, observations: Float[Array, "*B T *O"], actions: Float[Array, "*B T A"], *, deterministic: bool = True
    ) -> Float[Array, "*B T *2"]:
        steps = jnp.concatenate([_see(self.pixels, observations), actions], axis=-1)
        network = MLP(self.hidden_dims, 2 if self.uncertain else 1, self.dropout)
        outputs = network(steps, deterministic=deterministic)
        rewards = jnp.tanh(outputs[..., 0]) if self.bounded else outputs[..., 0]
        return jnp.stack([rewards, outputs[..., 1]], axis=-1) if self.uncertain else rewards


class PreferenceTransformer(nn.Module):
    """Rewards that depend on the past, weighted by how much each step matters in the whole segment.

    Segments may be shorter than `max_length`, never longer. `uncertain` is as in `MLPReward`.
    """

    embed_dim: int
    layers: int
    heads: int
    max_length: int
    dropout: float = 0.0
    bounded: bool = False
    pixels: Pixels | None = None
    uncertain: bool = False

    @nn.compact
    def __call__(
        self, observations: Float[Array, "*B T *O"], actions: Float[Array, "*B T A"], *, deterministic: bool = True
    ) -> Float[Array, "*B T *2"]:
        """T w_t r_t; the parts are kept as intermediates "rewards" (causal r_t) and "weights" (w_t, whose sum is 1)."""
        embeddings = self._trunk(_see(self.pixels, observations), actions, deterministic)
        rewards = nn.Dense(1, name="reward")(embeddings)[..., 0]
        rewards = jnp.tanh(rewards) if self.bounded else rewards
        queries = nn.Dense(self.embed_dim, name="query")(embeddings)
        # Without a bias, which would add the same to all that a step compares, and so change nothing.
        keys = nn.Dense(self.embed_dim, use_bias=False, name="key")(embeddings)
        # The authors' code divides by the square root of the values' dimension, which is 1. At a width of 256 that
        # makes each softmax all but a choice of one step from the start, so this divides by that of the keys.
        logits = queries @ jnp.swapaxes(keys, -1, -2) / jnp.sqrt(self.embed_dim)
        weights = jnp.mean(jax.nn.softmax(logits, axis=-1), axis=-2)
        self.sow("intermediates", "rewards", rewards)
        self.sow("intermediates", "weights", weights)
        weighted = rewards.shape[-1] * weights * rewards
        if not self.uncertain:
            return weighted
        return jnp.stack([weighted, nn.Dense(1, name="uncertainty")(embeddings)[..., 0]], axis=-1)

    def _trunk(
        self, observations: Float[Array, "*B T O"], actions: Float[Array, "*B T A"], deterministic: bool
    ) -> Float[Array, "*B T E"]:
        """The output of the causal transformer at each action, which has seen s_0, a_0, …, s_t, a_t."""
        time = actions.shape[-2]
        positions = nn.Embed(self.max_length, self.embed_dim, name="position")(jnp.arange(time))
        states = nn.Dense(self.embed_dim, name="state")(observations) + positions
        choices = nn.Dense(self.embed_dim, name="action")(actions) + positions
        hidden = interleave([states, choices])
        mask = jnp.tril(jnp.ones((2 * time, 2 * time), bool))
        transformer = Transformer(self.layers, self.heads, self.dropout)
        hidden = transformer(nn.LayerNorm()(hidden), mask, deterministic=deterministic)
        embeddings: Array = hidden[..., 1::2, :]
        return embeddings


def init_members(network: MLPReward | PreferenceTransformer, key: Key, members: int, example: Segments) -> PyTree:
    """Fresh parameters of an ensemble, with a leading axis of members; a ValueError if `check_length` has one."""
    check_length(network, example)
    shape = observation_shape(example.observations, network.pixels)
    steps = jnp.zeros((1, *shape)), jnp.zeros((1, example.actions.shape[-1]))
    return jax.vmap(lambda key: init(network, key, *steps))(jax.random.split(key, members))


def member_rewards(
    network: MLPReward | PreferenceTransformer,
    params: PyTree,
    normalizer: Normalizer,
    segments: Segments,
    dropout_key: Key | None = None,
) -> Float[Array, "E *B T *2"]:
    """What each member of an ensemble, whose parameters have a leading axis of members, gives; see `apply` for the key.

    Raises:
        ValueError: the segments are longer than the network's positions.
    """
    check_length(network, segments)
    steps = normalizer(segments.observations), segments.actions
    if dropout_key is None:
        return jax.vmap(lambda member: apply(network, member, *steps))(params)
    keys = jax.random.split(dropout_key, jax.tree.leaves(params)[0].shape[0])
    return jax.vmap(lambda member, key: apply(network, member, *steps, dropout_key=key))(params, keys)


def check_length(network: MLPReward | PreferenceTransformer, segments: Segments) -> None:
    """Raises a ValueError if a transformer has too few positions for these segments."""
    length = segments.actions.shape[-2]
    if isinstance(network, PreferenceTransformer) and length > network.max_length:
        raise ValueError(
            f"the segments are {length} steps long, but the transformer has positions for {network.max_length}; "
            f"create the reward model with max_length={length} or more, or cut the segments."
        )


def _see(pixels: Pixels | None, observations: Float[Array, "*B *O"]) -> Float[Array, "*B F"]:
    """Vectors as they are; images, within a module, through an encoder of its own."""
    if pixels is None:
        return observations
    features: Array = Trunk(pixels.features)(Convolutions(pixels)(observations))
    return features
