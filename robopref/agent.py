"""What an agent is, and the one loop in which every agent trains.

An agent (or a `Learner` that does not act, such as a reward model) is a frozen pytree, a `TrainState` or several of
them: parameters, optimiser state and step are leaves; its configuration and shapes are the only static fields. Modules
and optimisers are built from those, so that agents which differ in their numbers alone share one compiled program.

Agents see and choose actions in [-1, 1] along every axis; environments rescale to their own units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from robopref.networks import Normalizer
from robopref.types import Key, Metrics, PyTree, Windows


class Learner(Protocol):
    """The contract that every file in agents/ keeps; tests/test_contracts.py runs all of them through it."""

    @property
    def step(self) -> Int[Array, ""]:
        """Updates made so far."""
        ...

    @classmethod
    def create(cls, config: Any, example: Any, key: Key) -> Self:
        """A fresh agent for data of the shapes in `example`, a batch such as `update` will get."""
        ...

    def update(self, batch: Any, key: Key) -> tuple[Self, Metrics]:
        """One gradient step."""
        ...


class Agent(Learner, Protocol):
    """A learner that acts."""

    def sample_actions(self, observations: Float[Array, "*B O"], key: Key) -> Float[Array, "*B A"]:
        """Actions with the policy's own randomness."""
        ...

    def act(self, observations: Float[Array, "*B O"]) -> Float[Array, "*B A"]:
        """The policy's best actions, without randomness: evaluation and deployment."""
        ...


class Dataset(Protocol):
    """Data on the device from which a jitted loop draws minibatches; see robopref/datasets.py."""

    def sample(self, key: Key, batch_size: int) -> Any: ...


class TrainState(struct.PyTreeNode):
    """What a learner with one optimiser holds; subclasses in agents/ add leaves of their own.

    Attributes:
        params: of all networks that are trained.
        opt_state: the optimiser's.
        normalizer: of observations.
        step: updates made so far.
        config: the learner's configuration, hashable.
        action_dim: dimensions of an action.
    """

    params: PyTree
    opt_state: optax.OptState
    normalizer: Normalizer
    step: Int[Array, ""]
    config: Any = struct.field(pytree_node=False)
    action_dim: int = struct.field(pytree_node=False)

    @classmethod
    def begin(
        cls,
        config: Any,
        params: PyTree,
        opt_state: optax.OptState,
        observation_shape: Sequence[int],
        action_dim: int,
        normalizer: Normalizer | None,
        **own: Any,
    ) -> Self:
        """The state before the first update.

        Args:
            config: see the attributes, as for the others.
            params: fresh ones.
            opt_state: the optimiser's first.
            observation_shape: of one observation.
            action_dim: dimensions of an action.
            normalizer: None leaves observations as they are.
            own: the leaves that the subclass adds.
        """
        normalizer = normalizer or Normalizer.identity(observation_shape)
        return cls(params, opt_state, normalizer, jnp.zeros((), jnp.int32), config, action_dim, **own)

    def descend(
        self,
        loss: Callable[[PyTree, Any, Key], tuple[Array, Metrics]],
        optimizer: optax.GradientTransformation,
        batch: Any,
        key: Key,
    ) -> tuple[Self, Metrics]:
        """One step of the optimiser down the gradient of loss(params, batch, key), and that loss's metrics."""
        gradients, metrics = jax.grad(loss, has_aux=True)(self.params, batch, key)
        updates, opt_state = optimizer.update(gradients, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        return self.replace(params=params, opt_state=opt_state, step=self.step + 1), metrics


def adam(
    learning_rate: float, decay_updates: int | None = None, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Adam, or AdamW with weight decay; its learning rate falls to 0 along a cosine over so many updates, or stays."""
    rate = learning_rate if decay_updates is None else optax.cosine_decay_schedule(learning_rate, decay_updates)
    return optax.adamw(rate, weight_decay=weight_decay) if weight_decay else optax.adam(rate)


def adam_at(rates: PyTree) -> optax.GradientTransformation:
    """Adam at learning rates that are computed for each update: one, or one for each part of the parameters."""
    adam = optax.scale_by_adam()

    def update(gradients: PyTree, state: optax.OptState, params: PyTree = None) -> tuple[PyTree, optax.OptState]:
        directions, state = adam.update(gradients, state)
        return jax.tree.map(lambda rate, part: jax.tree.map(lambda leaf: -rate * leaf, part), rates, directions), state

    return optax.GradientTransformation(adam.init, update)


A = TypeVar("A", bound=Learner)


def _update_many(agent: A, dataset: Dataset, key: Key, num_updates: int, batch_size: int) -> tuple[A, Metrics]:
    def one_update(agent: A, _: None) -> tuple[A, Metrics]:
        # The randomness of an update depends on the run's key and the step alone, never on where a call or a crash
        # happened to split the run: this is what makes resuming exact.
        sample_key, update_key = jax.random.split(jax.random.fold_in(key, agent.step))
        return agent.update(dataset.sample(sample_key, batch_size), update_key)

    agent, metrics = jax.lax.scan(one_update, agent, length=num_updates)
    return agent, jax.tree.map(partial(jnp.mean, axis=0), metrics)


@partial(jax.jit, static_argnames=("num_updates", "batch_size"))
def update_many(agent: A, dataset: Dataset, key: Key, *, num_updates: int, batch_size: int) -> tuple[A, Metrics]:
    """Makes `num_updates` updates as one scan, drawing each minibatch on the device.

    With an array of keys [seeds] the leaves of `agent` have a leading axis of seeds, and all seeds train at once as one
    program (see `create_seeds`).

    Returns:
        The agent after the updates, and the mean of each metric over them (with a leading axis of seeds, if there is
        one).
    """
    if key.ndim == 0:
        return _update_many(agent, dataset, key, num_updates, batch_size)
    train = partial(_update_many, num_updates=num_updates, batch_size=batch_size)
    return jax.vmap(train, in_axes=(0, None, 0))(agent, dataset, key)


def create_seeds(agent_class: type[A], config: Any, example: Any, keys: Key, **kwargs: Any) -> A:
    """Agents of several seeds as one pytree with a leading axis of seeds on every leaf; `keys` is an array [seeds]."""
    agents: A = jax.vmap(lambda key: agent_class.create(config, example, key, **kwargs))(keys)
    return agents


def select_seed(agents: A, index: int) -> A:
    """The agent of one seed out of several trained together."""
    agent: A = jax.tree.map(lambda leaf: leaf[index], agents)
    return agent


def num_parameters(params: PyTree) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@jax.jit
def _act(agent: Agent, observations: Float[Array, "B O"]) -> Float[Array, "B A"]:
    return agent.act(observations)


@jax.jit
def _sample_actions(agent: Agent, observations: Float[Array, "B O"], keys: Key) -> Float[Array, "B A"]:
    return jax.vmap(agent.sample_actions)(observations, keys)


class AgentPolicy(struct.PyTreeNode):
    """An agent without memory as a `Policy`: what evaluation, collection and the server step."""

    agent: Any
    stochastic: bool = struct.field(pytree_node=False, default=False)

    def start(self, seeds: Int[np.ndarray, " B"]) -> tuple[Key, int]:
        return jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32)), 0

    def step(
        self, carry: tuple[Key, int], observations: Float[np.ndarray, "B O"]
    ) -> tuple[Float[np.ndarray, "B A"], tuple[Key, int]]:
        keys, time = carry
        observations = np.asarray(observations, np.float32)
        if self.stochastic:
            actions = _sample_actions(self.agent, observations, jax.vmap(jax.random.fold_in, (0, None))(keys, time))
        else:
            actions = _act(self.agent, observations)
        return np.asarray(actions), (keys, time + 1)

    def describe(self, seed: int) -> Mapping[str, str | float]:
        return {"behaviour": type(self.agent).__name__, "updates": float(self.agent.step)}


def first_windows(
    observations: Float[Array, "*B O"], length: int, action_dim: int, returns_to_go: float | Float[Array, "*B"] = 0.0
) -> Windows:
    """Windows at the first step of an episode, all before it empty."""
    batch = observations.shape[:-1]
    last = jnp.arange(length) == length - 1
    return Windows(
        observations=jnp.where(last[:, None], observations[..., None, :], 0.0),
        actions=jnp.zeros((*batch, length, action_dim)),
        returns_to_go=jnp.where(last, jnp.broadcast_to(jnp.asarray(returns_to_go), batch)[..., None], 0.0),
        steps=jnp.zeros((*batch, length), jnp.int32),
        mask=jnp.broadcast_to(last, (*batch, length)),
    )


class ContextAgent(Agent, Protocol):
    """An agent that acts on the last steps of its episode."""

    @property
    def context(self) -> int:
        """How many steps, the present one included."""
        ...

    @property
    def action_dim(self) -> int: ...

    def act_in_context(self, windows: Windows) -> Float[Array, "*B A"]:
        """Actions at the last step of windows of `context` steps; what they hold as its action is not looked at."""
        ...


class ContextPolicy(struct.PyTreeNode):
    """An agent with a memory as a `Policy`.

    Attributes:
        agent: a `ContextAgent`.
        target_return: what an agent that is conditioned on returns is asked for, of which what it earns is taken off.
        reward_function: a pytree that says what (observations, actions) earn; None takes the environment's word.
    """

    agent: Any
    target_return: float = 0.0
    reward_function: Any = None

    def start(self, seeds: Int[np.ndarray, " B"]) -> _Memory | None:
        return None

    def step(
        self, carry: _Memory | None, observations: Float[np.ndarray, "B O"]
    ) -> tuple[Float[np.ndarray, "B A"], _Memory]:
        actions, carry = _act_in_context(self, carry, jnp.asarray(observations, jnp.float32))
        return np.asarray(actions), carry

    def receive(self, carry: _Memory, rewards: Float[np.ndarray, " B"]) -> _Memory:
        return carry if self.reward_function is not None else _earn(carry, jnp.asarray(rewards, jnp.float32))

    def describe(self, seed: int) -> Mapping[str, str | float]:
        return {"behaviour": type(self.agent).__name__, "updates": float(self.agent.step)}


class _Memory(struct.PyTreeNode):
    """The steps up to the last one, and what is still to be earned after it."""

    windows: Windows
    to_go: Float[Array, " B"]


@jax.jit
def _act_in_context(
    policy: ContextPolicy, memory: _Memory | None, observations: Float[Array, "B O"]
) -> tuple[Float[Array, "B A"], _Memory]:
    agent = policy.agent
    if memory is None:
        to_go = jnp.full(len(observations), policy.target_return, jnp.float32)
        windows = first_windows(observations, agent.context, agent.action_dim, to_go)
    else:
        to_go = memory.to_go
        moved: Windows = jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=1), memory.windows)
        windows = moved.replace(
            observations=moved.observations.at[:, -1].set(observations),
            actions=moved.actions.at[:, -1].set(0.0),
            returns_to_go=moved.returns_to_go.at[:, -1].set(to_go),
            steps=moved.steps.at[:, -1].set(memory.windows.steps[:, -1] + 1),
            mask=moved.mask.at[:, -1].set(True),
        )
    actions = agent.act_in_context(windows)
    if policy.reward_function is not None:
        to_go = to_go - policy.reward_function(observations, actions)
    return actions, _Memory(windows.replace(actions=windows.actions.at[:, -1].set(actions)), to_go)


@jax.jit
def _earn(memory: _Memory, rewards: Float[Array, " B"]) -> _Memory:
    return memory.replace(to_go=memory.to_go - rewards)
