"""The general preference model against its formula, its symmetry, and teachers with and without circles."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from agents.general_preference import GeneralPreferenceAgent, GeneralPreferenceConfig
from agents.reward_model import RewardModelAgent, RewardModelConfig
from robopref.agent import update_many
from robopref.datasets import PreferenceDataset
from robopref.evaluation import attainable_accuracy, intransitivity
from robopref.networks import Normalizer
from robopref.types import Preferences, Segments

OBSERVATIONS, ACTIONS, STEPS, PLANES = 3, 2, 4, 2
LABELS = np.array([0.0, 1.0, 0.5, 0.2, 0.9, 1.0], np.float32)
NORMALIZER = Normalizer(mean=jnp.array([0.5, -1.0, 0.0]), std=jnp.array([2.0, 1.0, 0.5]))


def random_pairs(seed: int = 0) -> Preferences:
    rng = np.random.default_rng(seed)
    segments = Segments(
        observations=jnp.asarray(rng.normal(size=(len(LABELS), 2, STEPS, OBSERVATIONS)), jnp.float32),
        actions=jnp.asarray(rng.uniform(-1, 1, (len(LABELS), 2, STEPS, ACTIONS)), jnp.float32),
    )
    return Preferences(segments, jnp.asarray(LABELS))


def create(seed: int = 0, normalizer: Normalizer | None = NORMALIZER, **changes: Any) -> GeneralPreferenceAgent:
    config = GeneralPreferenceConfig(**{"hidden_dims": (16,), "planes": PLANES, **changes})
    return GeneralPreferenceAgent.create(config, random_pairs(), jax.random.key(seed), normalizer=normalizer)


def expected_logits(agent: GeneralPreferenceAgent, segments: Segments) -> np.ndarray:
    """v_2^T R v_1 / temperature with the whole matrix R, in double precision."""
    observations = (np.asarray(segments.observations, np.float64) - agent.normalizer.mean) / agent.normalizer.std
    layers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), agent.params["MLP_0"])
    steps = np.concatenate([observations, np.asarray(segments.actions)], axis=-1)
    hidden = np.maximum(steps @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"], 0)
    outputs = hidden @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]
    vectors = outputs.sum(axis=-2)
    if agent.config.normalized:
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    matrix = np.kron(np.eye(agent.config.planes), [[0, -1], [1, 0]])
    return np.einsum("ni,ij,nj->n", vectors[:, 1], matrix, vectors[:, 0]) / agent.config.temperature


@pytest.mark.parametrize(("normalized", "temperature"), [(False, 1.0), (True, 0.1)])
def test_logits_and_loss_are_the_formula(normalized: bool, temperature: float) -> None:
    batch, agent = random_pairs(), create(normalized=normalized, temperature=temperature)
    logits = expected_logits(agent, batch.segments)
    np.testing.assert_allclose(agent.preference_logits(batch.segments), logits, rtol=1e-4, atol=1e-4)
    value, metrics = agent.loss(agent.params, batch, jax.random.key(0))
    expected = np.mean(LABELS * np.logaddexp(0, -logits) + (1 - LABELS) * np.logaddexp(0, logits))
    assert float(value) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["preference/loss"]) == float(value)
    decided = LABELS != 0.5
    right = ((logits > 0) == (LABELS > 0.5))[decided]
    assert float(metrics["preference/accuracy"]) == pytest.approx(right.mean(), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("changes", [{}, {"planes": 1}, {"normalized": True, "temperature": 0.1}])
def test_both_orders_of_a_pair_share_one_probability(seed: int, changes: dict[str, Any]) -> None:
    agent, segments = create(seed, **changes), random_pairs(seed).segments
    agent = agent.replace(params=jax.tree.map(lambda leaf: 3.0 * leaf + 0.1, agent.params))
    logits = np.asarray(agent.preference_logits(segments), np.float64)
    swapped = np.asarray(agent.preference_logits(jax.tree.map(lambda leaf: leaf[:, ::-1], segments)), np.float64)
    np.testing.assert_allclose(expit(logits) + expit(swapped), 1.0, atol=1e-6)
    assert np.abs(logits).min() > 1e-3
    same = jax.tree.map(lambda leaf: leaf[:, [0, 0]], segments)
    np.testing.assert_allclose(agent.preference_logits(same), 0.0, atol=1e-4)


def test_a_constant_beside_the_score_makes_it_bradley_terry() -> None:
    agent, segments = create(planes=1), random_pairs().segments
    last = agent.params["MLP_0"]["Dense_1"]
    constant = {"kernel": last["kernel"].at[:, 1].set(0.0), "bias": last["bias"].at[1].set(-1.0 / STEPS)}
    agent = agent.replace(params={"MLP_0": {**agent.params["MLP_0"], "Dense_1": constant}})
    scores = np.asarray(agent.embeddings(segments))[..., 0]
    np.testing.assert_allclose(agent.preference_logits(segments), scores[:, 1] - scores[:, 0], rtol=1e-4, atol=1e-5)
    assert np.abs(np.diff(scores)).min() > 1e-3


def test_normalized_embeddings_have_length_1_and_a_gradient_even_at_0() -> None:
    agent, batch = create(normalized=True), random_pairs()
    np.testing.assert_allclose(np.linalg.norm(agent.embeddings(batch.segments), axis=-1), 1.0, rtol=1e-5)
    zero = jax.tree.map(jnp.zeros_like, agent.params)
    gradient = jax.grad(lambda params: agent.loss(params, batch, jax.random.key(0))[0])(zero)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_dropout_acts_in_training_only() -> None:
    batch, agent, plain = random_pairs(), create(dropout=0.5), create()
    losses = [float(agent.loss(agent.params, batch, jax.random.key(seed))[0]) for seed in range(2)]
    assert losses[0] != losses[1]
    np.testing.assert_array_equal(agent.preference_logits(batch.segments), plain.preference_logits(batch.segments))


def test_the_learning_rate_falls_to_nothing() -> None:
    agent, batch = create(decay_updates=2), random_pairs()
    for _ in range(2):
        agent, _ = agent.update(batch, jax.random.key(0))
    stopped, _ = agent.update(batch, jax.random.key(0))
    assert int(stopped.step) == 3
    for one, other in zip(jax.tree.leaves(stopped.params), jax.tree.leaves(agent.params), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("changes", [{"planes": 0}, {"temperature": 0.0}])
def test_what_cannot_work_is_said(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes)).removesuffix("s")):
        create(**changes)


# Teachers whose preferences go in circles, or do not

COUNT = 1200


def drawn_pairs(seed: int, circles: bool) -> tuple[Preferences, np.ndarray]:
    """Segments of three kinds, with noise, and P(the second is preferred); no two of a pair are of one kind.

    In circles, each kind beats the next with probability 0.95. Otherwise the kinds are worth 0, 1 and 2.
    """
    rng = np.random.default_rng(seed)
    # Every kind meets every other as often, as first and as second.
    kinds = np.resize([[0, 1], [1, 2], [2, 0], [1, 0], [2, 1], [0, 2]], (COUNT, 2))
    observations = np.eye(3)[kinds][:, :, None] + rng.normal(scale=0.3, size=(COUNT, 2, 3, 3))
    segments = Segments(
        observations=jnp.asarray(observations, jnp.float32),
        actions=jnp.asarray(rng.uniform(-1, 1, (COUNT, 2, 3, 1)), jnp.float32),
    )
    first, second = kinds.T
    beaten_by_second = (second + 1) % 3 == first
    probabilities = np.where(beaten_by_second, 0.95, 0.05) if circles else expit(1.0 * (second - first))
    labels = (rng.random(COUNT) < probabilities).astype(np.float32)
    return Preferences(segments, jnp.asarray(labels)), probabilities


def trained_logits(circles: bool, seed: int) -> tuple[np.ndarray, np.ndarray, Preferences, np.ndarray]:
    """Of the general model and of Bradley-Terry, on held-out pairs; both are trained alike."""
    train = PreferenceDataset.from_preferences(drawn_pairs(2 * seed, circles)[0])
    held_out, probabilities = drawn_pairs(2 * seed + 1, circles)
    shared = {"hidden_dims": (32,), "learning_rate": 3e-3, "decay_updates": 300}
    general = GeneralPreferenceAgent.create(GeneralPreferenceConfig(**shared, planes=1), held_out, jax.random.key(seed))
    scalar = RewardModelAgent.create(RewardModelConfig(**shared, ensemble=1), held_out, jax.random.key(seed))
    general, _ = update_many(general, train, jax.random.key(1), num_updates=300, batch_size=64)
    scalar, _ = update_many(scalar, train, jax.random.key(1), num_updates=300, batch_size=64)
    scores = np.asarray(scalar.segment_scores(held_out.segments), np.float64)
    logits = np.asarray(general.preference_logits(held_out.segments), np.float64)
    return logits, scores[:, 1] - scores[:, 0], held_out, probabilities


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean((logits > 0) == (labels > 0.5)))


@pytest.mark.parametrize("seed", range(2))
def test_circles_are_learned_where_bradley_terry_stays_near_one_half(seed: int) -> None:
    general, scalar, held_out, probabilities = trained_logits(circles=True, seed=seed)
    labels = np.asarray(held_out.labels, np.float64)
    assert attainable_accuracy(probabilities) == pytest.approx(0.95)
    assert accuracy(general, labels) > 0.9
    assert accuracy(scalar, labels) <= 0.62
    found = intransitivity(expit(general), expit(scalar), labels, np.random.default_rng(0))
    assert found.verdict == "better"
    assert found.difference > 0.3


@pytest.mark.parametrize("seed", range(2))
def test_without_circles_the_general_model_is_not_better(seed: int) -> None:
    general, scalar, held_out, probabilities = trained_logits(circles=False, seed=seed)
    labels = np.asarray(held_out.labels, np.float64)
    found = intransitivity(expit(general), expit(scalar), labels, np.random.default_rng(0))
    assert found.verdict != "better"
    # Both have learned what there is.
    for logits in (general, scalar):
        assert accuracy(logits, labels) > attainable_accuracy(probabilities) - 0.05
