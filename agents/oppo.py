"""Offline preference-guided policy optimisation (OPPO): a policy that follows a latent, and the preferred latent.

Kang et al. 2023, "Beyond Reward: Offline Preference-guided Policy Optimization" (arXiv:2305.16217). An encoder maps a
window of K steps to a latent z, and a policy pi(a_t | z, s_<=t, a_<t) makes the window's actions from it again. With z+
and z- the latents of the preferred window and of the other, and z* a vector that is learned as well,

    L_HIM = mean over steps and action dimensions of (a_t - pi)^2
    L_PM  = mean over decided pairs of max(0, ||z* - z+|| - ||z* - z-|| + margin)
    L_N   = mean (||z_1|| - 1)^2 + mean (||z_2|| - 1)^2

Each update makes two steps. Step A moves encoder and policy down L_HIM(first) + L_HIM(second) + alpha L_PM + beta L_N,
where z* is held. Step B encodes the same windows anew and moves z* alone, down L_PM. Nothing else holds z*: it tends to
end further out than any window's latent, and what the policy makes of it then lies outside the data.
`project_latent` acts on z* scaled to the mean norm of what was preferred.

`HUMAN` is the variant that was published for labels of people: see the options of the configuration.

What is not as in the authors' code:

* padding is neither attended to nor pooled, so that nothing depends on what it holds; there, it enters z;
* the encoder's last layer begins small, so that ||z|| is near 1 from the first update on;
* step B encodes without dropout, as the policy will be asked;
* given unlabelled windows, L_HIM is on these: twice the mean over them, so that alpha weighs what it weighs without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from robopref.agent import TrainState, first_windows
from robopref.losses import distances, ranking_accuracy, triplet_loss
from robopref.networks import Normalizer, Transformer, apply, explore, init, interleave
from robopref.types import Key, Metrics, PyTree, WindowPreferences, Windows

NORM_RATE = 0.01
"""How fast the mean norm of preferred latents follows the encoder, once it is a mean over 1 / NORM_RATE updates."""


@dataclass(frozen=True)
class OPPOConfig:
    """OPPO's hyperparameters.

    Attributes:
        length: K, the steps of a window, at most; the policy acts on as many.
        latent_dim: dimensions of z.
        width: of the tokens in encoder and policy.
        layers: of each.
        encoder_heads: of the encoder's attention.
        policy_heads: of the policy's attention.
        dropout: in both, while training.
        episode_steps: how many steps of an episode are told apart; all later ones are taken for the last of these.
        alpha: weight of L_PM.
        beta: weight of L_N.
        margin: of L_PM.
        learning_rate: AdamW's, of encoder and policy.
        weight_decay: AdamW's, of encoder, policy and z*.
        warmup_updates: over which the policy's learning rate, and only that, rises linearly.
        clip: of the norm of the gradients, of encoder and policy apart.
        latent_learning_rate: AdamW's, of z*.
        latent_scale: standard deviation of the first z*.
        learn_latent: whether z* is learned; it stays where it began otherwise, and the encoder may still align to it.
        project_latent: act on z* scaled to the mean norm of the preferred windows' latents.
        alternate: unlabelled windows train encoder and policy at every second update, in a step of their own; at every
            update, the labelled ones train the encoder alone, through the policy as it is.
        rank_ties: ties count in L_PM, with margin 0 and their first window as z+, and L_PM is the mean over all pairs.
        one_sided_norm: L_N only keeps ||z|| from exceeding 1.
        reconstruct_states: L_HIM is also about the normalised observations, each made at its action's token.
        observation_noise: standard deviation of the noise on normalised observations that the policy is trained with.
        timed_latent: whether the policy's tokens of z tell the step that they precede, as those of states and actions.
        action_noise: standard deviation of the Gaussian noise of `sample_actions`.

    Raises:
        ValueError: the heads do not divide the width.
    """

    length: int = 20
    latent_dim: int = 8
    width: int = 128
    layers: int = 3
    encoder_heads: int = 2
    policy_heads: int = 1
    dropout: float = 0.1
    episode_steps: int = 1000
    alpha: float = 0.1
    beta: float = 0.1
    margin: float = 1.0
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    warmup_updates: int = 10_000
    clip: float = 0.25
    latent_learning_rate: float = 1e-3
    latent_scale: float = 2.0
    learn_latent: bool = True
    project_latent: bool = False
    alternate: bool = False
    rank_ties: bool = False
    one_sided_norm: bool = False
    reconstruct_states: bool = False
    observation_noise: float = 0.0
    timed_latent: bool = True
    action_noise: float = 0.1

    def __post_init__(self) -> None:
        for name in ("encoder_heads", "policy_heads"):
            if self.width % getattr(self, name):
                raise ValueError(
                    f"the width of tokens, {self.width}, is not a multiple of {name}={getattr(self, name)}."
                )


HUMAN = OPPOConfig(
    length=100,
    latent_dim=16,
    policy_heads=2,
    alpha=10.0,
    latent_learning_rate=1e-2,
    latent_scale=1.0,
    alternate=True,
    rank_ties=True,
    one_sided_norm=True,
    reconstruct_states=True,
    observation_noise=0.1,
    timed_latent=False,
)


class OPPOAgent(TrainState):
    """A policy that follows a latent.

    `params` has the parts `encoder`, `policy` and `latent`, which is z*, and `opt_state` one state for each.
    `latent_norm` is the mean norm of the preferred windows' latents: over all updates at first, then over recent ones,
    of which the last counts for `NORM_RATE`. An update without a decided pair leaves it as it is.
    """

    config: OPPOConfig = struct.field(pytree_node=False)
    latent_norm: Float[Array, ""]

    @classmethod
    def create(
        cls, config: OPPOConfig, example: WindowPreferences, key: Key, *, normalizer: Normalizer | None = None
    ) -> Self:
        """
        Raises:
            ValueError: the example's windows are longer than the configuration's.
        """
        _check_length(config, example.windows)
        observation_dim, action_dim = example.windows.observations.shape[-1], example.windows.actions.shape[-1]
        encoder_key, policy_key, latent_key = jax.random.split(key, 3)
        window = (
            jnp.zeros((config.length, observation_dim)),
            jnp.zeros((config.length, action_dim)),
            jnp.zeros(config.length, jnp.int32),
            jnp.ones(config.length, bool),
        )
        latent = jnp.zeros(config.latent_dim)
        params = {
            "encoder": init(_encoder(config), encoder_key, *window),
            "policy": init(_policy(config, action_dim), policy_key, latent, *window),
            "latent": config.latent_scale * jax.random.normal(latent_key, latent.shape),
        }
        opt_state = {name: _optimizer(config, name, 0.0).init(part) for name, part in params.items()}
        return cls.begin(
            config, params, opt_state, (observation_dim,), action_dim, normalizer, latent_norm=jnp.ones(())
        )

    @property
    def context(self) -> int:
        return self.config.length

    @property
    def latent(self) -> Float[Array, " Z"]:
        """What the policy follows when it acts: z*, projected if the configuration says so."""
        latent: Array = self.params["latent"]
        if not self.config.project_latent:
            return latent
        return latent * self.latent_norm / jnp.maximum(_norms(latent), 1e-6)

    def loss(self, params: PyTree, batch: WindowPreferences, key: Key) -> tuple[Array, Metrics]:
        """L_HIM(first) + L_HIM(second) + alpha L_PM + beta L_N, that of step A; z* gets no gradient.

        With `alternate` the policy gets none either: L_HIM is then on the labelled windows in any case.
        """
        config = self.config
        encoder_key, policy_key = jax.random.split(key)
        labelled = _flatten(batch.windows)
        pairs = len(labelled.mask) // 2
        if config.alternate or batch.unlabelled is None:
            latents = self._encode(params["encoder"], labelled, encoder_key)
            policy = jax.lax.stop_gradient(params["policy"]) if config.alternate else params["policy"]
            noise = 0.0 if config.alternate else config.observation_noise
            errors = self._errors(policy, latents, labelled, policy_key, noise).reshape(pairs, 2, -1)
            mask = labelled.mask.reshape(errors.shape)
            him_loss = jnp.sum(jnp.mean(errors, axis=(0, 2), where=mask))
        else:
            # One batch: the encoder runs once over both.
            unlabelled = _flatten(batch.unlabelled)
            every = jax.tree.map(lambda one, other: jnp.concatenate([one, other]), labelled, unlabelled)
            latents, others = jnp.split(self._encode(params["encoder"], every, encoder_key), [2 * pairs])
            him_loss = 2.0 * self._reconstruction(params["policy"], others, unlabelled, policy_key)
        latents = latents.reshape(pairs, 2, -1)
        labels = batch.labels.reshape(pairs)
        ranking_loss = self._ranking_loss(jax.lax.stop_gradient(params["latent"]), latents, labels)
        norms = norm_loss(latents, one_sided=config.one_sided_norm)
        total_norm_loss = jnp.sum(jnp.mean(norms, axis=0))
        loss = him_loss + config.alpha * ranking_loss + config.beta * total_norm_loss
        return loss, {
            "policy/loss": loss,
            "policy/him_loss": him_loss,
            "latent/triplet_loss": ranking_loss,
            "latent/norm_loss": total_norm_loss,
        }

    def update(self, batch: WindowPreferences, key: Key) -> tuple[Self, Metrics]:
        """Step A, then step B; with `alternate`, the step on unlabelled windows before them.

        That step is on the labelled windows where there are no others.
        """
        _check_length(self.config, batch.windows)
        windows_key, pairs_key = jax.random.split(key)
        agent = self
        if self.config.alternate:
            windows = _flatten(batch.windows if batch.unlabelled is None else batch.unlabelled)
            # A branch, not a select: it saves half of the work that this step is.
            agent = jax.lax.cond(
                self.step % 2 == 0,
                lambda agent: agent._learn_to_reconstruct(windows, windows_key),
                lambda agent: agent,
                self,
            )
        gradients, metrics = jax.grad(agent.loss, has_aux=True)(agent.params, batch, pairs_key)
        agent = agent._apply(gradients, ("encoder",) if self.config.alternate else ("encoder", "policy"))
        agent, moved = agent._learn_latent(batch)
        return agent.replace(step=self.step + 1), metrics | moved

    def act_in_context(self, windows: Windows) -> Float[Array, "*B A"]:
        """Actions at the last step of windows; what they hold as its action is not looked at.

        Raises:
            ValueError: the windows are longer than the configuration's.
        """
        _check_length(self.config, windows)
        windows = windows.replace(actions=windows.actions.at[..., -1, :].set(0.0))
        latents = jnp.broadcast_to(self.latent, (*windows.mask.shape[:-1], self.config.latent_dim))
        return self._predict(self.params["policy"], latents, windows)[..., -1, : self.action_dim]

    def act(self, observations: Float[Array, "*B O"]) -> Float[Array, "*B A"]:
        """Actions at the first step of an episode: `act_in_context` without a past."""
        return self.act_in_context(first_windows(observations, 1, self.action_dim))

    def sample_actions(self, observations: Float[Array, "*B O"], key: Key) -> Float[Array, "*B A"]:
        return explore(self.act(observations), self.config.action_noise, key)

    def encode(self, windows: Windows) -> Float[Array, "*B Z"]:
        """The latents of windows.

        Raises:
            ValueError: the windows are longer than the configuration's.
        """
        _check_length(self.config, windows)
        return self._encode(self.params["encoder"], windows)

    def window_scores(self, windows: Windows) -> Float[Array, "*B"]:
        """-||z* - z||: by what windows are ranked, the preferred ones highest."""
        return -distances(self.params["latent"], self.encode(windows))

    def _encode(self, params: PyTree, windows: Windows, dropout_key: Key | None = None) -> Float[Array, "*B Z"]:
        return apply(_encoder(self.config), params, *self._inputs(windows), dropout_key=dropout_key)

    def _predict(
        self,
        params: PyTree,
        latents: Float[Array, "*B Z"],
        windows: Windows,
        key: Key | None = None,
        noise: float = 0.0,
    ) -> Float[Array, "*B T P"]:
        """The policy's actions at every step, and behind them, where it makes them, its observations."""
        observations, *others = self._inputs(windows)
        if key is not None and noise:
            key, noise_key = jax.random.split(key)
            observations += noise * jax.random.normal(noise_key, observations.shape)
        policy = _policy(self.config, self.action_dim)
        return apply(policy, params, latents, observations, *others, dropout_key=key)

    def _errors(
        self, params: PyTree, latents: Float[Array, "*B Z"], windows: Windows, key: Key, noise: float
    ) -> Float[Array, "*B T"]:
        """The squared error of each step, mean over dimensions; of actions, and of observations on top."""
        actions, observations = jnp.split(
            self._predict(params, latents, windows, key, noise), [self.action_dim], axis=-1
        )
        true_observations, true_actions, *_ = self._inputs(windows)
        errors = jnp.mean(jnp.square(true_actions - actions), axis=-1)
        if self.config.reconstruct_states:
            errors += jnp.mean(jnp.square(true_observations - observations), axis=-1)
        return errors

    def _reconstruction(self, params: PyTree, latents: Float[Array, "B Z"], windows: Windows, key: Key) -> Array:
        """L_HIM over all steps of these windows."""
        errors = self._errors(params, latents, windows, key, self.config.observation_noise)
        return jnp.mean(errors, where=windows.mask)

    def _inputs(
        self, windows: Windows
    ) -> tuple[Float[Array, "*B T O"], Float[Array, "*B T A"], Int[Array, "*B T"], Bool[Array, "*B T"]]:
        """What the networks see of windows: nothing of what padding holds, be it NaN."""
        steps = jnp.where(windows.mask, windows.steps, 0)
        mask = windows.mask[..., None]
        return (
            jnp.where(mask, self.normalizer(windows.observations), 0.0),
            jnp.where(mask, windows.actions, 0.0),
            jnp.clip(steps, 0, self.config.episode_steps - 1),
            windows.mask,
        )

    def _ranking_loss(
        self, latent: Float[Array, " Z"], latents: Float[Array, "B 2 Z"], labels: Float[Array, " B"]
    ) -> Float[Array, ""]:
        """L_PM: the mean over decided pairs, 0 if there is none, or over all with ties of margin 0."""
        preferred, other = _by_preference(latents, labels)
        decided = labels != 0.5
        if self.config.rank_ties:
            margins = jnp.where(decided, self.config.margin, 0.0)
            return jnp.mean(triplet_loss(latent, preferred, other, margins))
        losses = triplet_loss(latent, preferred, other, self.config.margin)
        return jnp.sum(losses * decided) / jnp.maximum(jnp.sum(decided), 1)

    def _learn_to_reconstruct(self, windows: Windows, key: Key) -> Self:
        """A step of encoder and policy down L_HIM of windows."""
        encoder_key, policy_key = jax.random.split(key)

        def loss(params: PyTree) -> Array:
            latents = self._encode(params["encoder"], windows, encoder_key)
            return self._reconstruction(params["policy"], latents, windows, policy_key)

        return self._apply(jax.grad(loss)(self.params), ("encoder", "policy"))

    def _learn_latent(self, batch: WindowPreferences) -> tuple[Self, Metrics]:
        """Step B, and what it saw on the way."""
        latents = self.encode(_flatten(batch.windows)).reshape(-1, 2, self.config.latent_dim)
        labels, latent = batch.labels.reshape(-1), self.params["latent"]
        apart = distances(latent, latents)
        decided = labels != 0.5
        norm = jnp.sum(_norms(_by_preference(latents, labels)[0]) * decided) / jnp.maximum(jnp.sum(decided), 1)
        rate = jnp.where(jnp.any(decided), jnp.maximum(1.0 / (self.step + 1), NORM_RATE), 0.0)
        agent = self.replace(latent_norm=self.latent_norm + rate * (norm - self.latent_norm))
        if self.config.learn_latent:
            agent = agent._apply({"latent": jax.grad(self._ranking_loss)(latent, latents, labels)}, ("latent",))
        return agent, {
            "latent/ranking_accuracy": ranking_accuracy(apart[:, 0] - apart[:, 1], labels),
            "latent/norm": _norms(agent.params["latent"]),
            "latent/preferred_norm": agent.latent_norm,
        }

    def _apply(self, gradients: PyTree, names: tuple[str, ...]) -> Self:
        """One step of the optimisers of these parts of the parameters."""
        params, opt_state = dict(self.params), dict(self.opt_state)
        warmup = jnp.minimum((self.step + 1) / max(self.config.warmup_updates, 1), 1.0)
        for name in names:
            optimizer = _optimizer(self.config, name, warmup)
            updates, opt_state[name] = optimizer.update(gradients[name], opt_state[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
        return self.replace(params=params, opt_state=opt_state)


def norm_loss(latents: Float[Array, "*B Z"], *, one_sided: bool) -> Float[Array, "*B"]:
    """(||z|| - 1)^2, or max(0, ||z|| - 1), that of the variant for labels of people."""
    excess = _norms(latents) - 1.0
    return jax.nn.relu(excess) if one_sided else jnp.square(excess)


def _norms(latents: Float[Array, "*B Z"]) -> Float[Array, "*B"]:
    """Euclidean, with gradient 0 at 0."""
    squares = jnp.sum(jnp.square(latents), axis=-1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _by_preference(
    latents: Float[Array, "B 2 Z"], labels: Float[Array, " B"]
) -> tuple[Float[Array, "B Z"], Float[Array, "B Z"]]:
    """The latents that are preferred, by however little, and the others; in a tie the first stands for preferred."""
    second = labels[:, None] > 0.5
    first_latents, second_latents = latents[:, 0], latents[:, 1]
    return jnp.where(second, second_latents, first_latents), jnp.where(second, first_latents, second_latents)


def _flatten(windows: Windows) -> Windows:
    """With one axis before that of time."""
    axes = windows.mask.ndim - 1
    flat: Windows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[axes:]), windows)
    return flat


def _check_length(config: OPPOConfig, windows: Windows) -> None:
    length = windows.mask.shape[-1]
    if length > config.length:
        raise ValueError(
            f"windows of {length} steps are longer than the {config.length} that OPPO is configured for; cut shorter"
            " windows, or set length in its configuration."
        )


class _Encoder(nn.Module):
    """Windows to latents: attention among states and actions in both directions, and a map of the sum of all tokens."""

    config: OPPOConfig

    @nn.compact
    def __call__(
        self,
        observations: Float[Array, "*B T O"],
        actions: Float[Array, "*B T A"],
        steps: Int[Array, "*B T"],
        mask: Bool[Array, "*B T"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*B Z"]:
        config = self.config
        times = nn.Embed(config.episode_steps, config.width)(steps)
        tokens = [nn.Dense(config.width)(observations) + times, nn.Dense(config.width)(actions) + times]
        valid = jnp.repeat(mask, 2, axis=-1)
        seen = jnp.broadcast_to(valid[..., None, :], (*valid.shape, valid.shape[-1]))
        transformer = Transformer(
            config.layers, config.encoder_heads, config.dropout, post_norm=True, activation=nn.relu
        )
        hidden = transformer(interleave(tokens), seen, deterministic=deterministic)
        pooled = jnp.sum(jnp.where(valid[..., None], hidden, 0.0), axis=-2)
        # Each of up to 2 K tokens has norm sqrt(width): with these weights, the latent's norm is at most about 1.
        scale = 1.0 / (4 * config.length**2 * config.latent_dim)
        latents: Array = nn.Dense(
            config.latent_dim, kernel_init=nn.initializers.variance_scaling(scale, "fan_in", "normal")
        )(pooled)
        return latents


class _Policy(nn.Module):
    """Latents and windows to actions at every step, each from the token of its state, which sees nothing later.

    With `reconstruct_states`, the observations that the tokens of the actions make come behind the actions.
    """

    config: OPPOConfig
    action_dim: int

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "*B Z"],
        observations: Float[Array, "*B T O"],
        actions: Float[Array, "*B T A"],
        steps: Int[Array, "*B T"],
        mask: Bool[Array, "*B T"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*B T P"]:
        config = self.config
        times = nn.Embed(config.episode_steps, config.width)(steps)
        latent = nn.Dense(config.width)(latents)[..., None, :]
        tokens = [
            latent + times if config.timed_latent else jnp.broadcast_to(latent, times.shape),
            nn.Dense(config.width)(observations) + times,
            nn.Dense(config.width)(actions) + times,
        ]
        valid = jnp.repeat(mask, 3, axis=-1)
        causal = jnp.tril(jnp.ones((valid.shape[-1],) * 2, bool))
        transformer = Transformer(config.layers, config.policy_heads, config.dropout, activation=nn.relu)
        normalized = nn.LayerNorm()(interleave(tokens))
        # Nobody reads the tokens of z, nor those of actions unless they make observations.
        read = slice(None) if config.reconstruct_states else slice(1, None, 3)
        hidden = transformer(normalized, causal & valid[..., None, :], read=read, deterministic=deterministic)
        if not config.reconstruct_states:
            return jnp.tanh(nn.Dense(self.action_dim)(hidden))
        hidden = hidden.reshape(*times.shape[:-1], 3, config.width)
        predicted = jnp.tanh(nn.Dense(self.action_dim)(hidden[..., 1, :]))
        made = nn.Dense(observations.shape[-1])(hidden[..., 2, :])
        return jnp.concatenate([predicted, made], axis=-1)


def _encoder(config: OPPOConfig) -> _Encoder:
    return _Encoder(config)


def _policy(config: OPPOConfig, action_dim: int) -> _Policy:
    return _Policy(config, action_dim)


def _optimizer(config: OPPOConfig, name: str, warmup: float | Array) -> optax.GradientTransformation:
    """AdamW for one part of the parameters, at its learning rate of the update to come."""
    if name == "latent":
        return optax.adamw(config.latent_learning_rate, weight_decay=config.weight_decay)
    rate = config.learning_rate * (warmup if name == "policy" else 1.0)
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adamw(rate, weight_decay=config.weight_decay))
