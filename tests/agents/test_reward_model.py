"""The reward model against its formulas, its invariances, and rankings whose truth is known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.reward_model import RewardModelAgent, RewardModelConfig
from robopref.agent import update_many
from robopref.datasets import PreferenceDataset, fit_normalizer
from robopref.episodes import EpisodeDataset
from robopref.networks import Normalizer
from robopref.queries import Labels, draw_queries
from robopref.types import Preferences, Segments

OBSERVATIONS, ACTIONS, STEPS, MEMBERS = 3, 2, 5, 3
LABELS = np.array([0.0, 1.0, 0.5, 0.2, 0.9, 1.0], np.float32)
NETWORKS = ("mlp", "transformer")
SMALL = {"hidden_dims": (16,), "embed_dim": 8, "heads": 2, "max_length": 8, "ensemble": MEMBERS}


def random_segments(seed: int, *batch: int, length: int = STEPS) -> Segments:
    rng = np.random.default_rng(seed)
    return Segments(
        observations=jnp.asarray(rng.normal(size=(*batch, length, OBSERVATIONS)), jnp.float32),
        actions=jnp.asarray(rng.uniform(-1, 1, (*batch, length, ACTIONS)), jnp.float32),
    )


def random_pairs(labels: np.ndarray = LABELS, seed: int = 0) -> Preferences:
    return Preferences(random_segments(seed, len(labels), 2), jnp.asarray(labels, jnp.float32))


def create(example: Preferences, seed: int = 0, normalizer: Normalizer | None = None, **changes: Any) -> Any:
    config = RewardModelConfig(**{**SMALL, **changes})
    return RewardModelAgent.create(config, example, jax.random.key(seed), normalizer=normalizer)


@jax.jit
def rewards_of(agent: RewardModelAgent, segments: Segments) -> jax.Array:
    return agent.rewards(segments)


@jax.jit
def scores_of(agent: RewardModelAgent, segments: Segments) -> tuple[jax.Array, jax.Array]:
    """Of the ensemble, and of its members."""
    return agent.segment_scores(segments), agent.member_scores(segments)


@jax.jit
def evaluate(agent: RewardModelAgent, batch: Preferences, key: jax.Array) -> Any:
    return agent.loss(agent.params, batch, key)


def loss(agent: RewardModelAgent, batch: Preferences, seed: int = 0) -> tuple[float, dict[str, float]]:
    value, metrics = evaluate(agent, batch, jax.random.key(seed))
    return float(value), {name: float(metric) for name, metric in metrics.items()}


@jax.jit
def gradient(agent: RewardModelAgent, batch: Preferences) -> Any:
    return jax.grad(lambda params: agent.loss(params, batch, jax.random.key(0))[0])(agent.params)


def assert_close(first: Any, second: Any, **tolerance: float) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(one, other, **{"rtol": 1e-4, "atol": 1e-6, **tolerance})


def layer_norm(x: np.ndarray, weights: Any) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * weights["scale"] + weights["bias"]


def dense(x: np.ndarray, weights: Any) -> np.ndarray:
    return x @ weights["kernel"] + weights["bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def mlp_rewards(params: Any, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    layers = params["MLP_0"]
    hidden = np.maximum(dense(np.concatenate([observations, actions], axis=-1), layers["Dense_0"]), 0)
    return dense(hidden, layers["Dense_1"])[..., 0]


def transformer_rewards(params: Any, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """One segment, one layer, in loops: a state's and an action's token per step, and each sees what came before."""
    tokens = []
    for t in range(len(actions)):
        position = params["position"]["embedding"][t]
        tokens += [dense(observations[t], params["state"]) + position, dense(actions[t], params["action"]) + position]
    hidden = layer_norm(np.stack(tokens), params["LayerNorm_0"])
    block = params["Transformer_0"]
    attention, normed = block["Attention_0"], layer_norm(hidden, block["ColumnNorm_0"])
    query, key, value = (
        dense(normed, attention["query"]),
        normed @ attention["key"]["kernel"],
        dense(normed, attention["value"]),
    )
    attended = np.zeros_like(hidden)
    size = SMALL["embed_dim"] // SMALL["heads"]
    for head in range(SMALL["heads"]):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(hidden)):
            weights = softmax(key[: i + 1, part] @ query[i, part] / np.sqrt(size))
            attended[i, part] = weights @ value[: i + 1, part]
    hidden = hidden + dense(attended, attention["out"])
    inner = dense(layer_norm(hidden, block["ColumnNorm_1"]), block["Dense_0"])
    inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    hidden = layer_norm(hidden + dense(inner, block["Dense_1"]), block["ColumnNorm_2"])[1::2]
    rewards, query = (dense(hidden, params[name]) for name in ("reward", "query"))
    key = hidden @ params["key"]["kernel"]
    weights = np.mean([softmax(key @ one / np.sqrt(SMALL["embed_dim"])) for one in query], axis=0)
    return len(actions) * weights * rewards[:, 0]


def expected_rewards(agent: RewardModelAgent, segments: Segments) -> np.ndarray:
    """[E, *B, T], by the formulas of the networks, with the agent's parameters."""
    observations = (np.asarray(segments.observations, np.float64) - agent.normalizer.mean) / agent.normalizer.std
    actions, batch = np.asarray(segments.actions, np.float64), segments.actions.shape[:-2]
    members = []
    for member in range(agent.config.ensemble):
        params = jax.tree.map(lambda leaf, member=member: np.asarray(leaf[member], np.float64), agent.params)
        if agent.config.network == "mlp":
            members.append(mlp_rewards(params, observations, actions))
        else:
            each = [transformer_rewards(params, observations[i], actions[i]) for i in np.ndindex(*batch)]
            members.append(np.reshape(each, actions.shape[:-1]))
    return np.stack(members)


NORMALIZER = Normalizer(mean=jnp.array([0.5, -1.0, 0.0]), std=jnp.array([2.0, 1.0, 0.5]))


@pytest.mark.parametrize(("network", "reduction"), [("mlp", "sum"), ("transformer", "mean")])
def test_the_loss_is_the_formula(network: str, reduction: str):
    batch, smoothing = random_pairs(), 0.2
    agent = create(batch, normalizer=NORMALIZER, network=network, reduction=reduction, label_smoothing=smoothing)
    rewards = expected_rewards(agent, batch.segments)
    scores = rewards.sum(axis=-1) if reduction == "sum" else rewards.mean(axis=-1)
    logits = scores[..., 1] - scores[..., 0]
    labels = (1 - smoothing) * LABELS + smoothing / 2
    expected = np.mean(labels * np.logaddexp(0, -logits) + (1 - labels) * np.logaddexp(0, logits))
    value, metrics = loss(agent, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(rewards_of(agent, batch.segments), rewards.mean(axis=0), rtol=1e-3, atol=1e-5)
    decided = LABELS != 0.5
    right = (logits > 0)[:, decided] == (LABELS > 0.5)[decided]
    np.testing.assert_allclose(metrics["reward/loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/ranking_accuracy"], right.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward/margin"], np.abs(logits).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["reward/disagreement"], logits.std(axis=0).mean(), rtol=1e-4)


@pytest.mark.parametrize(("network", "reduction"), [("mlp", "mean"), ("transformer", "sum")])
def test_a_score_is_the_reduction_of_the_rewards_and_the_mean_over_members(network: str, reduction: str):
    segments = random_segments(0, 4, 2)
    agent = create(random_pairs(), network=network, reduction=reduction)
    rewards, (scores, members) = rewards_of(agent, segments), scores_of(agent, segments)
    assert rewards.shape == (4, 2, STEPS)
    assert scores.shape == (4, 2)
    assert members.shape == (MEMBERS, 4, 2)
    np.testing.assert_allclose(getattr(np, reduction)(rewards, axis=-1), scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(members.mean(axis=0), scores, rtol=1e-4, atol=1e-5)
    single = jax.tree.map(lambda leaf: leaf[1, 0], segments)
    np.testing.assert_allclose(scores_of(agent, single)[0], scores[1, 0], rtol=1e-4, atol=1e-5)


def test_members_differ_and_each_learns_what_it_would_alone():
    batch = random_pairs()
    agent = create(batch)
    members = np.asarray(scores_of(agent, batch.segments)[1])
    assert all(np.abs(members[i] - members[j]).max() > 1e-2 for i in range(MEMBERS) for j in range(i))

    alone = create(batch, ensemble=1)
    alone = alone.replace(params=jax.tree.map(lambda leaf: leaf[1:2], agent.params))
    for _ in range(5):
        agent, _ = update(agent, batch)
        alone, _ = update(alone, batch)
    np.testing.assert_allclose(gaps(agent, batch)[1], gaps(alone, batch)[0], rtol=1e-3, atol=1e-4)


def gaps(agent: RewardModelAgent, batch: Preferences) -> np.ndarray:
    """Score of the second minus the first, [E, B]: all that a label teaches. An offset of all rewards has no gradient
    but rounding errors, which Adam makes as large as any other, so parameters themselves are not comparable."""
    return np.diff(np.asarray(scores_of(agent, batch.segments)[1]), axis=-1)[..., 0]


@jax.jit
def update(agent: Any, batch: Any) -> Any:
    return agent.update(batch, jax.random.key(0))


def test_rewards_of_the_mlp_know_no_time():
    segments = random_segments(0, 4)
    agent = create(random_pairs())
    order = np.array([3, 0, 4, 1, 2])
    shuffled = jax.tree.map(lambda leaf: leaf[:, order], segments)
    np.testing.assert_allclose(rewards_of(agent, shuffled), rewards_of(agent, segments)[:, order], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scores_of(agent, shuffled)[0], scores_of(agent, segments)[0], rtol=1e-4, atol=1e-5)


def parts(agent: RewardModelAgent, segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """r_t and w_t of the first member."""
    params = jax.tree.map(lambda leaf: leaf[0], agent.params)
    steps = agent.normalizer(segments.observations), segments.actions
    _, kept = agent.network.apply({"params": params}, *steps, mutable="intermediates")
    return np.asarray(kept["intermediates"]["rewards"][0]), np.asarray(kept["intermediates"]["weights"][0])


@pytest.mark.parametrize(("changed", "layers"), [("observations", 1), ("actions", 2)])
def test_the_transformer_sees_the_past_and_weighs_the_whole(changed: str, layers: int):
    segments, time = random_segments(0, 4), 2
    agent = create(random_pairs(), network="transformer", layers=layers)
    other = segments.replace(**{changed: getattr(segments, changed).at[:, time].add(0.7)})
    (rewards, weights), (new_rewards, new_weights) = parts(agent, segments), parts(agent, other)
    np.testing.assert_allclose(new_rewards[:, :time], rewards[:, :time], atol=1e-6)
    assert (np.abs(new_rewards - rewards)[:, time:].max(axis=0) > 1e-3).all()
    assert (np.abs(new_weights - weights).max(axis=0) > 1e-5).all()
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    assert (weights > 0).all()


def test_the_transformer_knows_the_order_of_steps():
    segments = random_segments(0, 4)
    agent = create(random_pairs(), network="transformer")
    shuffled = jax.tree.map(lambda leaf: leaf[:, ::-1], segments)
    assert np.abs(scores_of(agent, shuffled)[0] - scores_of(agent, segments)[0]).min() > 1e-3


def test_the_transformer_takes_segments_as_long_as_it_has_positions():
    agent = create(random_pairs(), network="transformer", max_length=STEPS)
    assert agent.rewards(random_segments(0, 2, length=STEPS - 2)).shape == (2, STEPS - 2)
    longer = random_segments(0, 2, length=STEPS + 1)
    for call in (agent.rewards, agent.segment_scores, agent.member_scores):
        with pytest.raises(ValueError, match=rf"{STEPS + 1} steps long.*positions for {STEPS}.*max_length={STEPS + 1}"):
            call(longer)
    with pytest.raises(ValueError, match="positions for 4"):
        create(random_pairs(), network="transformer", max_length=4)
    assert create(random_pairs(), max_length=STEPS).rewards(longer).shape == (2, STEPS + 1)


def test_swapping_the_segments_and_the_labels_changes_nothing():
    batch = random_pairs()
    swapped = Preferences(jax.tree.map(lambda leaf: leaf[:, ::-1], batch.segments), 1 - batch.labels)
    agent = create(batch, label_smoothing=0.1)
    np.testing.assert_allclose(loss(agent, swapped)[0], loss(agent, batch)[0], rtol=1e-5)
    assert_close(gradient(agent, swapped), gradient(agent, batch))


def test_label_smoothing_is_training_on_smoothed_labels():
    batch = random_pairs()
    smoothed = batch.replace(labels=0.7 * batch.labels + 0.15)
    first = create(batch, label_smoothing=0.3)
    second = create(batch)
    for _ in range(3):
        first, _ = update(first, batch)
        second, _ = update(second, smoothed)
    np.testing.assert_allclose(gaps(first, batch), gaps(second, batch), rtol=1e-3, atol=1e-4)


def test_ties_pull_scores_together():
    batch = random_pairs(np.full(6, 0.5))
    agent = create(batch, learning_rate=1e-2)
    before = loss(agent, batch)[1]["reward/margin"]
    for _ in range(100):
        agent, metrics = update(agent, batch)
    assert metrics["reward/margin"] < 0.2 * before
    np.testing.assert_allclose(metrics["reward/loss"], np.log(2), atol=0.01)


@pytest.mark.parametrize("network", NETWORKS)
def test_bounded_rewards(network: str):
    segments = random_segments(0, 8)
    agents = [create(random_pairs(), network=network, bounded=bounded) for bounded in (False, True)]
    free, bound = (agent.replace(params=jax.tree.map(lambda leaf: 2 * leaf, agent.params)) for agent in agents)
    if network == "mlp":
        free_rewards, bound_rewards = (expected_rewards(agent, segments) for agent in (free, bound))
        np.testing.assert_allclose(
            rewards_of(bound, segments), np.tanh(bound_rewards).mean(axis=0), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(rewards_of(free, segments), free_rewards.mean(axis=0), rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_allclose(parts(bound, segments)[0], np.tanh(parts(free, segments)[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_dropout_acts_in_training_only(network: str):
    batch = random_pairs()
    agent = create(batch, network=network, dropout=0.5)
    plain = create(batch, network=network)
    assert loss(agent, batch, seed=0)[0] != loss(agent, batch, seed=1)[0]
    np.testing.assert_array_equal(agent.rewards(batch.segments), plain.rewards(batch.segments))


def test_the_learning_rate_falls_to_nothing():
    batch = random_pairs()
    agent = create(batch, decay_updates=4)
    for _ in range(4):
        agent, _ = update(agent, batch)
    stopped, _ = update(agent, batch)
    assert int(stopped.step) == 5
    assert_close(stopped.params, agent.params, rtol=0, atol=0)


def test_weight_decay_shrinks_what_the_labels_do_not_hold():
    """Where both segments are the same the loss has no gradient; what moves a weight is the decay alone."""
    segments = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, :1], 2, axis=1), random_segments(0, 4, 2))
    batch = Preferences(segments, jnp.full(4, 0.5))
    agent = create(batch, learning_rate=0.1, weight_decay=0.5)
    shrunk, _ = update(agent, batch)
    assert_close(shrunk.params, jax.tree.map(lambda leaf: (1 - 0.1 * 0.5) * leaf, agent.params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ensemble": 0}, "at least one member"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"network": "transformer", "embed_dim": 10, "heads": 4}, "multiple of heads"),
    ],
)
def test_what_cannot_work_is_said(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        create(random_pairs(), **changes)


@pytest.mark.parametrize("network", NETWORKS)
def test_it_learns_what_is_preferred_on_the_point_task(dataset: EpisodeDataset, network: str):
    """Held-out pairs of the partial return; a pair decided by less than 0.5 is a tie, as it would be to a person."""
    queries = draw_queries(dataset, np.random.default_rng(0), count=600, length=4)
    gap = np.subtract(*queries.partial_returns.T[::-1])
    labels = Labels(
        values=np.where(np.abs(gap) < 0.5, 0.5, (gap > 0).astype(float)), answered=np.full(600, True), labeler="test"
    )
    data = PreferenceDataset.create(queries, labels)
    train, held_out = (
        data.replace(pairs=data.pairs.replace(rows=data.pairs.rows[rows]), labels=data.labels[rows])
        for rows in (slice(0, 400), slice(400, 600))
    )
    unseen = held_out.take(jnp.arange(200))
    changes = {"learning_rate": 1e-2, "decay_updates": 100, "ensemble": 1}
    agent = create(unseen, normalizer=fit_normalizer(dataset), network=network, **changes)
    untrained = loss(agent, unseen)[0]
    agent, _ = update_many(agent, train, jax.random.key(1), num_updates=100, batch_size=32)
    value, metrics = loss(agent, unseen)
    assert metrics["reward/ranking_accuracy"] > 0.9
    assert value < min(untrained, np.log(2))
