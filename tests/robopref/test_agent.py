"""The loop and the policy that all agents share, shown with an agent that writes down what it was given."""

from __future__ import annotations

from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from robopref.agent import (
    AgentPolicy,
    ContextPolicy,
    create_seeds,
    first_windows,
    num_parameters,
    select_seed,
    update_many,
)
from robopref.types import RewardedPolicy, Windows

ROWS, DRAWN = 10, 4
EXAMPLE = np.zeros(DRAWN, np.int32)


class Numbers(struct.PyTreeNode):
    """A dataset of the numbers 0 to ROWS - 1."""

    values: jax.Array

    def sample(self, key: jax.Array, batch_size: int) -> jax.Array:
        return self.values[jax.random.randint(key, (batch_size,), 0, ROWS)]


class Keys(struct.PyTreeNode):
    """A dataset whose batches are the keys that they are drawn with."""

    def sample(self, key: jax.Array, batch_size: int) -> jax.Array:
        return jax.random.key_data(key)


class Diary(struct.PyTreeNode):
    """An agent whose parameters are the batches and the keys of its first 32 updates."""

    batches: jax.Array
    keys: jax.Array
    step: jax.Array
    scale: float = struct.field(pytree_node=False)

    @classmethod
    def create(cls, scale: float, example: jax.Array, key: jax.Array) -> Self:
        return cls(
            batches=jnp.full((32, len(example)), ROWS, example.dtype),
            keys=jnp.tile(jax.random.key_data(key), (32, 1)),
            step=jnp.zeros((), jnp.int32),
            scale=scale,
        )

    def update(self, batch: jax.Array, key: jax.Array) -> tuple[Self, dict[str, jax.Array]]:
        batches = self.batches.at[self.step].set(batch)
        keys = self.keys.at[self.step].set(jax.random.key_data(key))
        metrics = {"diary/step": self.step, "diary/batch": jnp.mean(batch.astype(float))}
        return self.replace(batches=batches, keys=keys, step=self.step + 1), metrics

    def sample_actions(self, observations: jax.Array, key: jax.Array) -> jax.Array:
        return self.act(observations) + jax.random.normal(key, observations.shape)

    def act(self, observations: jax.Array) -> jax.Array:
        return self.scale * observations


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    return Numbers(jnp.arange(ROWS))


def diary() -> Diary:
    return Diary.create(2.0, EXAMPLE, jax.random.key(0))


def test_every_update_draws_a_batch_and_a_key_of_its_own(numbers):
    written, _ = update_many(diary(), numbers, jax.random.key(1), num_updates=12, batch_size=DRAWN)
    assert int(written.step) == 12
    batches, keys = np.asarray(written.batches), np.asarray(written.keys)
    assert (batches[12:] == ROWS).all()
    assert ((batches[:12] >= 0) & (batches[:12] < ROWS)).all()
    assert len(np.unique(batches[:12], axis=0)) > 8
    assert len(np.unique(keys[:12], axis=0)) == 12


def test_a_batch_is_drawn_with_another_key_than_the_update_gets():
    """Else what an update draws would follow from which rows it was given."""
    begin = Diary.create(2.0, np.zeros(2, np.uint32), jax.random.key(0))
    written, _ = update_many(begin, Keys(), jax.random.key(1), num_updates=8, batch_size=1)
    assert len(np.unique(np.concatenate([written.batches[:8], written.keys[:8]]), axis=0)) == 16


@pytest.mark.parametrize("parts", [(3, 4), (1, 6), (2, 2, 3)])
def test_it_does_not_matter_where_calls_split_a_run(numbers, parts):
    train = partial(update_many, dataset=numbers, key=jax.random.key(1), batch_size=DRAWN)
    whole, _ = train(diary(), num_updates=7)
    split = diary()
    for part in parts:
        split, _ = train(split, num_updates=part)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, split))


def test_another_key_gives_other_batches(numbers):
    first, second = (
        update_many(diary(), numbers, jax.random.key(seed), num_updates=5, batch_size=DRAWN)[0] for seed in (1, 2)
    )
    assert not np.array_equal(first.batches, second.batches)
    assert not np.array_equal(first.keys, second.keys)


def test_metrics_are_means_over_the_updates_of_the_call(numbers):
    train = partial(update_many, dataset=numbers, key=jax.random.key(1), batch_size=DRAWN)
    written, _ = train(diary(), num_updates=3)
    written, metrics = train(written, num_updates=4)
    np.testing.assert_allclose(metrics["diary/step"], np.mean([3, 4, 5, 6]))
    np.testing.assert_allclose(metrics["diary/batch"], np.asarray(written.batches[3:7]).mean(), rtol=1e-6)


def test_seeds_trained_together_are_those_trained_alone(numbers):
    init_keys, train_keys = (jax.random.split(jax.random.key(seed), 3) for seed in (5, 6))
    together = create_seeds(Diary, 2.0, EXAMPLE, init_keys)
    together, metrics = update_many(together, numbers, train_keys, num_updates=6, batch_size=DRAWN)
    assert metrics["diary/step"].shape == (3,)
    for index in range(3):
        alone = Diary.create(2.0, EXAMPLE, init_keys[index])
        alone, own = update_many(alone, numbers, train_keys[index], num_updates=6, batch_size=DRAWN)
        assert jax.tree.all(jax.tree.map(np.array_equal, alone, select_seed(together, index)))
        np.testing.assert_allclose(metrics["diary/batch"][index], own["diary/batch"], rtol=1e-6)
    assert not np.array_equal(together.batches[0], together.batches[1])


def test_parameters_are_counted():
    assert num_parameters({"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4), "scale": jnp.zeros(())}) == 17
    assert num_parameters({}) == 0


def test_a_policy_acts_as_its_agent_does():
    policy, observations = AgentPolicy(diary()), np.random.default_rng(0).normal(size=(5, 3))
    actions, carry = policy.step(policy.start(np.arange(5)), observations)
    again, _ = policy.step(carry, observations)
    assert type(actions) is np.ndarray
    np.testing.assert_allclose(actions, 2 * observations, rtol=1e-6)
    np.testing.assert_array_equal(again, actions)


def steps(policy: AgentPolicy, seeds: list[int], count: int = 3) -> np.ndarray:
    """Actions [count, len(seeds), A] at observations that are all zero."""
    carry, taken = policy.start(np.array(seeds)), []
    for _ in range(count):
        actions, carry = policy.step(carry, np.zeros((len(seeds), 2)))
        taken.append(actions)
    return np.stack(taken)


def test_the_noise_of_an_episode_comes_from_its_seed_alone():
    policy = AgentPolicy(diary(), stochastic=True)
    together = steps(policy, [7, 8, 9])
    assert len(np.unique(together)) == together.size
    np.testing.assert_allclose(steps(policy, [8]), together[:, 1:2], rtol=1e-6)
    np.testing.assert_allclose(steps(policy, [9, 7]), together[:, [2, 0]], rtol=1e-6)


def test_a_policy_remembers_nothing_between_batches():
    policy = AgentPolicy(diary(), stochastic=True)
    first = steps(policy, [1, 2])
    steps(policy, [3, 4, 5], count=2)
    np.testing.assert_array_equal(steps(policy, [1, 2]), first)


def test_a_policy_says_who_acted_and_how_far_trained(numbers):
    trained, _ = update_many(diary(), numbers, jax.random.key(1), num_updates=5, batch_size=DRAWN)
    assert AgentPolicy(trained).describe(3) == {"behaviour": "Diary", "updates": 5.0}


# Policies with a memory


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_first_windows_hold_the_present_step_alone(batch):
    observations = np.random.default_rng(0).normal(size=(*batch, 3)).astype(np.float32)
    returns = np.random.default_rng(1).normal(size=batch).astype(np.float32)
    for asked in (2.5, jnp.asarray(returns)):
        windows = first_windows(jnp.asarray(observations), 4, 2, asked)
        assert windows.actions.shape == (*batch, 4, 2)
        assert windows.steps.shape == windows.mask.shape == windows.returns_to_go.shape == (*batch, 4)
        assert not np.any(windows.actions)
        assert not np.any(windows.steps)
        np.testing.assert_array_equal(windows.mask, np.broadcast_to([False, False, False, True], (*batch, 4)))
        np.testing.assert_array_equal(windows.observations[..., 3, :], observations)
        np.testing.assert_array_equal(windows.returns_to_go[..., 3], np.broadcast_to(np.asarray(asked), batch))
        assert not np.any(windows.observations[..., :3, :])
        assert not np.any(windows.returns_to_go[..., :3])


class Recaller(struct.PyTreeNode):
    """An agent whose action is made of all that it is shown: each quantity, weighted by its place in the window."""

    step: jax.Array
    context: int = struct.field(pytree_node=False, default=3)
    action_dim: int = struct.field(pytree_node=False, default=2)

    def act_in_context(self, windows: Windows) -> jax.Array:
        places = jnp.arange(1.0, self.context + 1) * windows.mask
        first = jnp.sum(places[..., None] * (windows.observations + 0.1 * windows.actions), axis=-2)
        second = jnp.sum(places * (windows.returns_to_go + 10.0 * windows.steps), axis=-1)
        return jnp.tanh(0.004 * (first + second[..., None]))


class Cost(struct.PyTreeNode):
    """A learned reward, so to speak."""

    scale: jax.Array

    def __call__(self, observations: jax.Array, actions: jax.Array) -> jax.Array:
        return self.scale * jnp.sum(observations * actions, axis=-1)


TARGET, CONTEXT, LANES, TIME = 7.0, 3, 4, 6
SEEN = np.random.default_rng(2).normal(size=(TIME, LANES, 2))
EARNED = np.random.default_rng(3).normal(size=(TIME, LANES))


def recalled(lane: int, learned: float | None) -> list[np.ndarray]:
    """The actions of one lane, from lists of what has been so far."""
    observations, actions, asked = [], [], []
    to_go = TARGET
    for time in range(TIME):
        observations.append(SEEN[time, lane])
        asked.append(to_go)
        total = np.zeros(2)
        for step in range(max(0, time + 1 - CONTEXT), time + 1):
            place = CONTEXT - (time - step)
            earlier = actions[step] if step < time else np.zeros(2)
            total += place * (observations[step] + 0.1 * earlier + asked[step] + 10.0 * step)
        actions.append(np.tanh(0.004 * total))
        to_go -= EARNED[time, lane] if learned is None else learned * np.sum(observations[-1] * actions[-1])
    return actions


def played(policy: ContextPolicy, lanes: slice = slice(None)) -> np.ndarray:
    """The actions [time, lanes, 2] of a policy that is told what it earns."""
    carry, actions = policy.start(np.arange(LANES)[lanes]), []
    for observations, rewards in zip(SEEN[:, lanes], EARNED[:, lanes], strict=True):
        chosen, carry = policy.step(carry, observations)
        assert type(chosen) is np.ndarray
        actions.append(chosen)
        carry = policy.receive(carry, rewards)
    return np.stack(actions)


@pytest.mark.parametrize("learned", [None, 3.0])
def test_a_policy_with_a_memory_shows_its_agent_the_last_steps_and_what_each_was_asked(learned):
    """What was earned, or what the learned reward says was, is taken off what is asked for from the next step on."""
    reward = None if learned is None else Cost(jnp.float32(learned))
    policy = ContextPolicy(Recaller(jnp.zeros((), jnp.int32)), target_return=TARGET, reward_function=reward)
    expected = np.stack([recalled(lane, learned) for lane in range(LANES)], axis=1)
    assert np.abs(expected).max() < 0.95
    np.testing.assert_allclose(played(policy), expected, rtol=1e-4, atol=1e-5)


def test_lanes_of_a_policy_with_a_memory_know_nothing_of_each_other():
    policy = ContextPolicy(Recaller(jnp.zeros((), jnp.int32)), target_return=TARGET)
    together = played(policy)
    for lane in range(LANES):
        np.testing.assert_allclose(played(policy, slice(lane, lane + 1)), together[:, lane : lane + 1], rtol=1e-5)


def test_the_memory_holds_a_window_of_what_happened():
    policy = ContextPolicy(Recaller(jnp.zeros((), jnp.int32)), target_return=TARGET)
    carry, actions = policy.start(np.arange(LANES)), []
    for time in range(TIME):
        chosen, carry = policy.step(carry, SEEN[time])
        actions.append(chosen)
        carry = policy.receive(carry, EARNED[time])
        length = min(time + 1, CONTEXT)
        past = range(time + 1 - length, time + 1)
        windows = jax.tree.map(np.asarray, carry.windows)
        assert windows.mask.tolist() == [[False] * (CONTEXT - length) + [True] * length] * LANES
        np.testing.assert_array_equal(windows.steps[:, CONTEXT - length :], [list(past)] * LANES)
        asked = np.stack([TARGET - EARNED[:step].sum(axis=0) for step in past], axis=1)
        np.testing.assert_allclose(windows.returns_to_go[:, CONTEXT - length :], asked, rtol=1e-5)
        np.testing.assert_array_equal(windows.actions[:, CONTEXT - length :], np.stack([actions[s] for s in past], 1))
        np.testing.assert_array_equal(windows.observations[:, -1], SEEN[time].astype(np.float32))
        np.testing.assert_allclose(carry.to_go, TARGET - EARNED[: time + 1].sum(axis=0), rtol=1e-4, atol=1e-5)


def test_a_policy_with_a_memory_is_told_rewards_and_says_who_acted():
    policy = ContextPolicy(Recaller(jnp.asarray(4, jnp.int32)))
    assert isinstance(policy, RewardedPolicy)
    assert not isinstance(AgentPolicy(diary()), RewardedPolicy)
    assert policy.describe(3) == {"behaviour": "Recaller", "updates": 4.0}
