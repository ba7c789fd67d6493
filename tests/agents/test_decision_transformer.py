"""Decision Transformer against its formulas, what it must not see, and data whose actions depend on the return."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from agents.decision_transformer import DecisionTransformerAgent, DecisionTransformerConfig
from robopref.agent import ContextPolicy, first_windows, update_many
from robopref.networks import Normalizer
from robopref.types import Windows

OBSERVATIONS, ACTIONS, STEPS = 3, 2, 5
SMALL: dict[str, Any] = {
    "length": STEPS,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "warmup_updates": 1,
    "return_scale": 10.0,
    "episode_steps": 12,
}


def random_windows(seed: int = 0, batch: int = 6, empty: tuple[int, ...] = (0, 2, 4, 0, 1, 3)) -> Windows:
    """Windows of which so many steps in front are none, though something is held there."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 4, (batch, 1))
    return Windows(
        observations=jnp.asarray(rng.normal(size=(batch, STEPS, OBSERVATIONS)), jnp.float32),
        actions=jnp.asarray(rng.uniform(-1, 1, (batch, STEPS, ACTIONS)), jnp.float32),
        returns_to_go=jnp.asarray(rng.normal(0, 20, (batch, STEPS)), jnp.float32),
        steps=jnp.asarray(first + np.arange(STEPS), jnp.int32),
        mask=jnp.asarray(np.arange(STEPS) >= np.array(empty)[:, None]),
    )


def create(seed: int = 0, **changes: Any) -> DecisionTransformerAgent:
    """With biases that are not zero and embeddings that matter."""
    arguments = {name: changes.pop(name) for name in ("normalizer", "target_return") if name in changes}
    config = DecisionTransformerConfig(**{**SMALL, **changes})
    agent = DecisionTransformerAgent.create(config, random_windows(), jax.random.key(seed), **arguments)
    leaves, tree = jax.tree.flatten(agent.params)
    rng = np.random.default_rng(seed)
    moved = [leaf + jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32) for leaf in leaves]
    return agent.replace(params=jax.tree.unflatten(tree, moved))


@jax.jit
def act(agent: DecisionTransformerAgent, windows: Windows) -> jax.Array:
    return agent.act_in_context(windows)


@jax.jit
def loss(agent: DecisionTransformerAgent, windows: Windows, key: jax.Array) -> tuple[jax.Array, Any]:
    """The loss and its gradients."""
    (value, _), gradients = jax.value_and_grad(agent.loss, has_aux=True)(agent.params, windows, key)
    return value, gradients


KEY = jax.random.key(0)


def every_action(agent: DecisionTransformerAgent, windows: Windows) -> np.ndarray:
    """The action at each step, as `act_in_context` gives it for the windows that end there."""
    ends = np.arange(1, STEPS + 1)
    # The same windows, moved back until each step is the last one in turn.
    rolled = [jax.tree.map(lambda leaf, end=end: jnp.roll(leaf, STEPS - end, axis=1), windows) for end in ends]
    there = [
        each.replace(mask=each.mask & (np.arange(STEPS) >= STEPS - end)) for each, end in zip(rolled, ends, strict=True)
    ]
    return np.stack([act(agent, each) for each in there], axis=1)


def changed(windows: Windows, where: np.ndarray, **names: bool) -> Windows:
    """With other values at these places of the named quantities, of all unless any are named."""
    other = random_windows(seed=99)
    names = names or dict.fromkeys(("observations", "actions", "returns_to_go", "steps"), True)
    held = {}
    for name in names:
        now, then = getattr(windows, name), getattr(other, name)
        held[name] = jnp.where(where[..., None] if now.ndim == 3 else where, then, now)
    return windows.replace(**held)


def test_the_defaults_are_the_published_ones():
    config = DecisionTransformerConfig()
    assert (config.length, config.width, config.layers, config.heads) == (20, 128, 3, 1)
    assert (config.dropout, config.learning_rate, config.weight_decay) == (0.1, 1e-4, 1e-4)
    assert (config.warmup_updates, config.clip, config.return_scale) == (10_000, 0.25, 1000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"width": 10, "heads": 3}, "multiple of heads"), ({"length": 0}, "length"), ({"episode_steps": 0}, "at least 1")],
)
def test_configurations_that_make_no_sense_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecisionTransformerConfig(**changes)


def test_the_loss_is_the_mean_squared_error_of_the_steps_that_were():
    agent, windows = create(dropout=0.0), random_windows()
    errors = np.square(every_action(agent, windows) - np.asarray(windows.actions))
    total = [errors[i, t] for i, t in zip(*np.nonzero(np.asarray(windows.mask)), strict=True)]
    assert len(total) == 30 - 10
    np.testing.assert_allclose(loss(agent, windows, KEY)[0], np.mean(total), rtol=1e-5)


def test_what_padding_holds_changes_nothing():
    agent, windows = create(dropout=0.0), random_windows()
    other = changed(windows, ~np.asarray(windows.mask))
    assert not np.array_equal(windows.observations, other.observations)
    np.testing.assert_allclose(act(agent, windows), act(agent, other), rtol=1e-5, atol=1e-6)
    pulls = [loss(agent, each, KEY) for each in (windows, other)]
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6), *pulls)


def test_padding_of_any_length_is_no_padding():
    agent, windows = create(), random_windows()
    for index, count in enumerate(np.asarray(windows.mask).sum(axis=1)):
        short = jax.tree.map(lambda leaf, index=index, count=count: leaf[index, -count:], windows)
        np.testing.assert_allclose(act(agent, windows)[index], act(agent, short), rtol=1e-5, atol=1e-6)


@jax.jit
def influence(agent: DecisionTransformerAgent, windows: Windows, weights: jax.Array) -> Any:
    """The gradient of the sum of all actions, with steps weighted, with respect to what the windows hold."""

    def total(held: tuple[Any, ...]) -> Any:
        names = ("observations", "actions", "returns_to_go")
        seen = windows.replace(**dict(zip(names, held, strict=True)))
        return jnp.sum(weights[:, None] * agent._actions(agent.params, seen))

    return jax.grad(total)((windows.observations, windows.actions, windows.returns_to_go))


@pytest.mark.parametrize("step", range(STEPS))
def test_an_action_follows_from_the_past_and_the_present_without_itself(step: int):
    agent = create(layers=2)
    windows = random_windows(empty=(0,) * 6)
    weights = jnp.arange(STEPS) == step
    observations, actions, returns = (np.abs(np.asarray(part)) for part in influence(agent, windows, weights))
    assert (observations[:, : step + 1].max(axis=-1) > 0).all()
    assert (returns[:, : step + 1] > 0).all()
    assert (actions[:, :step].max(axis=-1, initial=0) > 0).all()
    assert not observations[:, step + 1 :].any()
    assert not returns[:, step + 1 :].any()
    assert not actions[:, step:].any()


def test_steps_have_embeddings_and_late_ones_share_the_last():
    agent, windows = create(), random_windows()

    def act_from(first: int) -> np.ndarray:
        return np.asarray(act(agent, windows.replace(steps=first + windows.steps - windows.steps[:, :1])))

    assert not np.allclose(act_from(0), act_from(1), atol=1e-4)
    np.testing.assert_array_equal(act_from(11), act_from(500))


def test_returns_are_scaled_and_observations_normalised():
    normalizer = Normalizer(mean=jnp.full(OBSERVATIONS, 3.0), std=jnp.full(OBSERVATIONS, 4.0))
    windows = random_windows()
    shifted = windows.replace(observations=4 * windows.observations + 3, returns_to_go=7 * windows.returns_to_go)
    plain, other = create(), create(normalizer=normalizer, return_scale=70.0)
    np.testing.assert_allclose(act(other, shifted), act(plain, windows), rtol=1e-4, atol=1e-5)


def test_acting_without_a_past_is_the_first_step_of_an_episode_that_is_to_earn_the_target():
    agent, observations = create(target_return=17.0), random_windows().observations[:, 0]
    windows = first_windows(observations, STEPS, ACTIONS, 17.0)
    np.testing.assert_allclose(agent.act(observations), act(agent, windows), rtol=1e-5, atol=1e-6)
    asked_less = agent.replace(target_return=jnp.float32(-17.0)).act(observations)
    assert not np.allclose(agent.act(observations), asked_less, atol=1e-3)
    policy = ContextPolicy(agent, target_return=17.0)
    actions, _ = policy.step(policy.start(np.arange(6)), np.asarray(observations))
    np.testing.assert_allclose(actions, agent.act(observations), rtol=1e-5, atol=1e-6)


def test_dropout_is_for_training_alone():
    agent, windows = create(dropout=0.3), random_windows()
    values = [float(loss(agent, windows, jax.random.key(seed))[0]) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    np.testing.assert_allclose(act(agent, windows), act(create(dropout=0.0), windows), rtol=1e-6)


@pytest.mark.parametrize("decay", [None, 8])
def test_updates_are_those_of_adamw_at_a_rate_that_warms_up_with_gradients_clipped(decay: int | None):
    """AdamW written out, from the gradients of the loss."""
    agent = create(dropout=0.0, clip=0.05, warmup_updates=3, decay_updates=decay, learning_rate=1e-2, weight_decay=0.1)
    windows = random_windows()
    mean, square = (jax.tree.map(lambda leaf: np.zeros(leaf.shape), agent.params) for _ in range(2))
    update = jax.jit(lambda agent: agent.update(windows, KEY)[0])
    for step in range(5):
        rate = 1e-2 * min((step + 1) / 3, 1)
        if decay is not None:
            rate *= 0.5 * (1 + np.cos(np.pi * max(step - 3, 0) / (decay - 3)))
        gradients = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), loss(agent, windows, KEY)[1])
        norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradients)))
        assert norm > 0.05
        gradients = jax.tree.map(lambda leaf, norm=norm: leaf * 0.05 / norm, gradients)
        mean = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, mean, gradients)
        square = jax.tree.map(lambda old, new: 0.999 * old + 0.001 * new**2, square, gradients)

        def moved(leaf: Any, one: Any, two: Any, rate: float = rate, count: int = step + 1) -> Any:
            direction = one / (1 - 0.9**count) / (np.sqrt(two / (1 - 0.999**count)) + 1e-8)
            return leaf - rate * (direction + 0.1 * leaf)

        params = jax.tree.map(moved, jax.tree.map(np.asarray, agent.params), mean, square)
        agent = update(agent)
        for leaf, expected in zip(jax.tree.leaves(agent.params), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-3, atol=1e-4)


# Data in which what is done says what will be earned: along the first axis one way or the other, whatever is seen.


class Halves(struct.PyTreeNode):
    """Windows of episodes that earn much or little, and act at `SIZE` or -`SIZE` all the time."""

    def sample(self, key: jax.Array, batch_size: int) -> Windows:
        keys = jax.random.split(key, 4)
        high = jax.random.bernoulli(keys[0], shape=(batch_size, 1))
        empty = jax.random.randint(keys[1], (batch_size, 1), 0, STEPS)
        returns = jnp.where(high, 10.0, -10.0) + jax.random.uniform(keys[2], (batch_size, STEPS))
        side = jnp.where(high, SIZE, -SIZE)[..., None] * jnp.asarray([1.0, -0.5])
        return Windows(
            observations=jax.random.normal(keys[3], (batch_size, STEPS, OBSERVATIONS)),
            actions=jnp.broadcast_to(side, (batch_size, STEPS, ACTIONS)),
            returns_to_go=returns,
            steps=jnp.broadcast_to(jnp.arange(STEPS), (batch_size, STEPS)),
            mask=jnp.arange(STEPS) >= empty,
        )


SIZE = 0.6


def test_it_acts_as_those_did_who_earned_what_it_is_asked_for():
    example = Halves().sample(jax.random.key(0), 2)
    config = DecisionTransformerConfig(**{**SMALL, "warmup_updates": 20, "learning_rate": 3e-3})
    agent = DecisionTransformerAgent.create(config, example, jax.random.key(0))
    observations = jax.random.normal(jax.random.key(5), (50, OBSERVATIONS))
    agent, _ = update_many(agent, Halves(), jax.random.key(1), num_updates=300, batch_size=32)
    for asked, side in ((10.0, 1), (-10.0, -1)):
        expected = np.tile([side * SIZE, -0.5 * side * SIZE], (50, 1))
        np.testing.assert_allclose(
            agent.replace(target_return=jnp.float32(asked)).act(observations), expected, atol=0.15
        )
        policy = ContextPolicy(agent, target_return=asked)
        carry = policy.start(np.arange(50))
        for _ in range(STEPS + 1):
            actions, carry = policy.step(carry, np.asarray(observations))
            np.testing.assert_allclose(actions, expected, atol=0.15)
