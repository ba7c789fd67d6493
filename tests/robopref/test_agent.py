"""The loop and the policy that all agents share, shown with an agent that writes down what it was given."""

from __future__ import annotations

from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from robopref.agent import AgentPolicy, create_seeds, num_parameters, select_seed, update_many

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
