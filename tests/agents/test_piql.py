"""P-IQL against the two learners that it is made of, the published sizes of its networks, and a task that it solves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.bc import BCAgent, BCConfig
from agents.cpl import CPLAgent, CPLConfig
from agents.iql import IQLConfig
from agents.piql import PIXELS, STATE, PIQLAgent, PIQLConfig
from agents.reward_model import RewardModelConfig
from robopref.agent import num_parameters, update_many
from robopref.datasets import PreferenceDataset, fit_normalizer
from robopref.episodes import EpisodeDataset
from robopref.images import random_shift
from robopref.networks import Pixels
from robopref.queries import Labels, draw_queries
from robopref.types import Preferences, Segments

ACTIONS, STEPS = 2, 5
LABELS = np.array([0.0, 1.0, 0.5, 0.2], np.float32)
SMALL_PIXELS = Pixels(filters=4, strides=(2,), features=5, shift=2)


def random_pairs(*shape: int) -> Preferences:
    """Of observations of this shape."""
    rng, batch = np.random.default_rng(0), (len(LABELS), 2, STEPS)
    observations = rng.uniform(0, 255, (*batch, *shape)) if len(shape) > 1 else rng.normal(size=(*batch, *shape))
    segments = Segments(
        jnp.asarray(observations, jnp.float32), jnp.asarray(rng.uniform(-1, 1, (*batch, ACTIONS)), jnp.float32)
    )
    return Preferences(segments, jnp.asarray(LABELS))


def create(example: Preferences, pixels: Pixels | None = None, **changes: Any) -> PIQLAgent:
    config = PIQLConfig(
        reward=RewardModelConfig(hidden_dims=(8,), ensemble=2, learning_rate=1e-3, pixels=pixels),
        iql=IQLConfig(hidden_dims=(8,), dropout=0.2, learning_rate=1e-3, pixels=pixels),
        **changes,
    )
    return PIQLAgent.create(config, example, jax.random.key(0))


@jax.jit
def update(agent: PIQLAgent, batch: Preferences, key: jax.Array) -> Any:
    return agent.update(batch, key)


def assert_close(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * np.abs(other).max() + 1e-9)


def test_the_networks_have_the_published_sizes():
    """From images of 64 by 64, with an action of 4 numbers; targets do not count."""
    images, actions = (jax.ShapeDtypeStruct((1, 2, 3, *shape), jnp.float32) for shape in ((64, 64, 3), (4,)))
    example = Preferences(Segments(images, actions), jax.ShapeDtypeStruct((1,), jnp.float32))
    piql = jax.eval_shape(lambda key: PIQLAgent.create(PIXELS, example, key), jax.random.key(0))
    assert num_parameters(piql.params) == 9_587_488
    parts = piql.iql.params
    assert num_parameters({part: parts[part] for part in ("encoder", "policy")}) == 2_134_714
    config = CPLConfig(hidden_dims=(1024, 1024), pixels=Pixels())
    cpl = jax.eval_shape(lambda key: CPLAgent.create(config, example, key), jax.random.key(0))
    assert num_parameters(cpl.params) == 2_134_714


def test_the_published_configurations():
    for config in (STATE, PIXELS):
        assert (config.reward.ensemble, config.reward.reduction, config.reward_updates) == (1, "sum", 50_000)
        iql = config.iql
        assert (iql.critics, iql.expectile, iql.temperature, iql.max_weight) == (2, 0.7, 0.3333, 100)
        assert (iql.discount, iql.target_update_rate) == (0.99, 0.005)
    assert (STATE.iql.hidden_dims, STATE.reward.hidden_dims, STATE.iql.dropout) == ((512, 512), (512, 512), 0.25)
    assert STATE.iql.learning_rate == STATE.reward.learning_rate == 3e-4
    assert PIXELS.iql.pixels == PIXELS.reward.pixels == Pixels()
    assert (PIXELS.iql.dropout, PIXELS.iql.learning_rate) == (0.5, 1e-4)


@pytest.mark.parametrize("shape", [(3,), (7, 7, 3)], ids=["vectors", "images"])
def test_an_update_is_one_of_each_learner_with_the_rewards_before_it(shape: tuple[int, ...]):
    """As long as the reward model learns; then it stays as it is, and the policy goes on."""
    batch, pixels, key = random_pairs(*shape), SMALL_PIXELS if len(shape) > 1 else None, jax.random.key(1)
    agent = create(batch, pixels, reward_updates=3)

    @jax.jit
    def apart(agent: PIQLAgent, batch: Preferences) -> Any:
        shift_key, reward_key, iql_key = jax.random.split(key, 3)
        segments = batch.segments
        if pixels is not None:
            segments = segments.replace(observations=random_shift(segments.observations, shift_key, pixels.shift))
        reward_model, metrics = agent.reward_model.update(Preferences(segments, batch.labels), reward_key)
        iql, more = agent.iql.update_on_segments(segments, agent.reward_model.rewards(segments), iql_key)
        return reward_model, iql, {**metrics, **more}

    for step in range(5):
        after, metrics = update(agent, batch, key)
        reward_model, iql, expected = apart(agent, batch)
        assert_close(after.reward_model.opt_state, (reward_model if step < 3 else agent.reward_model).opt_state)
        assert_close(after.iql.opt_state, iql.opt_state)
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6)
        for part, moves in (("reward_model", step < 3), ("iql", True)):
            same = jax.tree.map(np.array_equal, agent.params[part], after.params[part])
            assert jax.tree.all(same) != moves
        agent = after
    assert (int(agent.step), int(agent.iql.step), int(agent.reward_model.step)) == (5, 5, 3)


def test_what_scores_and_acts_is_the_part_that_learned_it():
    batch = random_pairs(3)
    agent = create(batch)
    np.testing.assert_array_equal(
        agent.segment_scores(batch.segments), agent.reward_model.segment_scores(batch.segments)
    )
    np.testing.assert_array_equal(agent.policy_segment_scores(batch.segments), agent.iql.segment_scores(batch.segments))
    np.testing.assert_array_equal(agent.act(batch.segments.observations), agent.iql.act(batch.segments.observations))


def test_both_learners_must_see_the_same():
    with pytest.raises(ValueError, match=r"reward\.pixels.*iql\.pixels"):
        PIQLConfig(iql=IQLConfig(pixels=Pixels()))


def test_it_acts_better_than_the_data_on_the_point_task(dataset: EpisodeDataset, point: Any):
    """Half the data are careless. Labels are noiseless, by the partial return, which is dense in this task."""
    queries = draw_queries(dataset, np.random.default_rng(0), count=500, length=4)
    labels = Labels(
        values=(np.diff(queries.partial_returns, axis=1)[:, 0] > 0).astype(float),
        answered=np.full(500, True),
        labeler="test",
    )
    data, normalizer = PreferenceDataset.create(queries, labels), fit_normalizer(dataset)
    example = data.take(jnp.arange(2))
    observations = np.asarray(dataset.observations)
    wanted, _ = point.expert.step(None, observations)

    def distance(agent: Any) -> float:
        """Mean squared distance from the expert's actions, at all observations."""
        return float(np.square(agent.act(jnp.asarray(observations, jnp.float32)) - wanted).sum(axis=-1).mean())

    def train(agent: Any, data: PreferenceDataset) -> Any:
        return update_many(agent, data, jax.random.key(1), num_updates=400, batch_size=32)[0]

    def piql(data: PreferenceDataset) -> PIQLAgent:
        config = PIQLConfig(
            reward=RewardModelConfig(hidden_dims=(32,), ensemble=1, learning_rate=1e-2),
            iql=IQLConfig(
                hidden_dims=(32,), discount=0.9, learning_rate=3e-3, target_update_rate=0.05, decay_updates=400
            ),
            reward_updates=150,
        )
        return train(PIQLAgent.create(config, example, jax.random.key(0), normalizer=normalizer), data)

    config = BCConfig(hidden_dims=(32,), learning_rate=3e-3, decay_updates=400, pretrain_updates=400)
    cloned = train(BCAgent.create(config, example, jax.random.key(0), normalizer=normalizer), data)
    learned, misled = piql(data), piql(data.replace(labels=1 - data.labels))
    assert distance(learned) < 0.7 * distance(cloned)
    assert distance(misled) > distance(cloned)
