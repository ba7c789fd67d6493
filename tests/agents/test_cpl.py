"""Contrastive preference learning against its formulas, its published figures, and problems with a known answer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from agents.bc import BCAgent, BCConfig
from agents.cpl import APO, CPL, CPL_BC, CPL_KL, DPO, PRO, RPO, CPLAgent, CPLConfig
from robopref.agent import update_many
from robopref.networks import Normalizer
from robopref.types import Preferences, Rankings, Segments

OBSERVATIONS, ACTIONS, STEPS = 3, 2, 4
LABELS = np.array([0.0, 1.0, 0.5, 0.2, 0.9, 1.0], np.float32)
PRETRAIN = 5


def random_segments(rng: np.random.Generator, *batch: int) -> Segments:
    return Segments(
        observations=jnp.asarray(rng.normal(size=(*batch, STEPS, OBSERVATIONS)), jnp.float32),
        actions=jnp.asarray(rng.uniform(-1, 1, (*batch, STEPS, ACTIONS)), jnp.float32),
    )


def random_pairs(labels: np.ndarray = LABELS, seed: int = 0) -> Preferences:
    return Preferences(random_segments(np.random.default_rng(seed), len(labels), 2), jnp.asarray(labels, jnp.float32))


def create(example: Any, seed: int = 0, **changes: Any) -> CPLAgent:
    config = CPLConfig(**{"hidden_dims": (16,), "pretrain_updates": PRETRAIN, **changes})
    return CPLAgent.create(config, example, jax.random.key(seed))


def at(agent: CPLAgent, step: int) -> CPLAgent:
    return agent.replace(step=jnp.asarray(step, jnp.int32))


def loss(agent: CPLAgent, batch: Any) -> tuple[float, dict[str, float]]:
    value, metrics = agent.loss(agent.params, batch, jax.random.key(0))
    return float(value), {name: float(metric) for name, metric in metrics.items()}


def log_probabilities(agent: CPLAgent, segments: Segments) -> np.ndarray:
    """-||a - mu(s)||^2 of every step, from the policy's own means."""
    means = np.asarray(agent.act(segments.observations), np.float64)
    return -np.square(np.asarray(segments.actions, np.float64) - means).sum(axis=-1)


def softplus(x: Any) -> np.ndarray:
    return np.logaddexp(0, x)


def pair_loss(scores: np.ndarray, labels: np.ndarray, weight: float) -> float:
    """-log [exp a+ / (exp a+ + exp(weight a-))], averaged over pairs; a soft label weighs the two directions."""
    first, second = scores[:, 0], scores[:, 1]
    losses = labels * softplus(weight * first - second) + (1 - labels) * softplus(weight * second - first)
    return float(losses.mean())


def test_the_variants_are_those_of_the_paper():
    assert (CPL.temperature, CPL.conservative_weight, CPL.bc_weight, CPL.reference) == (0.1, 0.5, 0.0, False)
    assert (CPL_BC.temperature, CPL_BC.conservative_weight, CPL_BC.bc_weight) == (0.1, 1.0, 1.0)
    assert (CPL_KL.temperature, CPL_KL.conservative_weight, CPL_KL.bc_weight) == (0.2, 0.75, 0.0)
    assert CPL_KL.reference
    assert math.isclose(CPL_KL.learning_rate, 0.1 * CPL.learning_rate)
    assert {config.discount for config in (CPL, CPL_BC, CPL_KL)} == {1.0}


def test_the_neighbours_differ_from_cpl_in_what_defines_them():
    for config in (DPO, RPO, APO):
        assert config.reference
        assert config.conservative_weight == 1.0
    assert (DPO.preferred_weight, PRO.reference, PRO.conservative_weight) == (0.0, False, 1.0)
    assert RPO.preferred_weight > 0
    assert PRO.preferred_weight > 0
    assert APO.iteration_updates
    assert APO.extrapolation > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iteration_updates": 10}, "set reference"),
        ({"reference": True, "iteration_updates": 0}, "at least 1 update"),
        ({"reference": True, "extrapolation": 0.5}, "set iteration_updates as well"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        CPLConfig(**changes)


@pytest.mark.parametrize("discount", [1.0, 0.8])
@pytest.mark.parametrize(("temperature", "weight", "bc_weight"), [(0.1, 0.5, 0.0), (1.0, 1.0, 1.0), (2.0, 0.3, 0.5)])
def test_the_loss_is_the_formula(temperature: float, discount: float, weight: float, bc_weight: float):
    batch = random_pairs()
    agent = create(batch, temperature=temperature, discount=discount, conservative_weight=weight, bc_weight=bc_weight)
    log_probs = log_probabilities(agent, batch.segments)
    scores = temperature * (discount ** np.arange(STEPS) * log_probs).sum(axis=-1)
    contrastive = pair_loss(scores, LABELS, weight)
    value, metrics = loss(at(agent, PRETRAIN), batch)
    np.testing.assert_allclose(value, contrastive - bc_weight * log_probs.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/contrastive_loss"], contrastive, rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/cloning_loss"], -log_probs.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/loss"], value, rtol=1e-6)


@pytest.mark.parametrize(
    ("temperature", "discount", "weight", "label", "published"),
    [
        (1.0, 1.0, 1.0, 0.0, 0.152978),
        (0.1, 1.0, 1.0, 0.0, 0.607192),
        (1.0, 1.0, 0.5, 0.0, 0.693147),
        (1.0, 0.9, 1.0, 0.0, 0.203061),
        (1.0, 0.9, 0.5, 0.0, 0.724370),
        (1.0, 0.9, 0.5, 0.5, 1.559049),
        (1.0, 0.9, 0.5, 1.0, 2.393728),
    ],
)
def test_the_loss_of_the_worked_example(
    temperature: float, discount: float, weight: float, label: float, published: float
):
    """A policy whose means are 0 makes -||a||^2 the log-probability; four dimensions keep actions in [-1, 1]."""
    log_probs = np.array([[-0.3, -1.1, -0.4], [-0.9, -0.2, -2.5]])
    actions = np.sqrt(-log_probs / 4)[None, :, :, None] * np.ones(4)
    segments = Segments(jnp.zeros((1, 2, 3, OBSERVATIONS)), jnp.asarray(actions, jnp.float32))
    batch = Preferences(segments, jnp.array([label]))
    agent = create(batch, temperature=temperature, discount=discount, conservative_weight=weight)
    agent = agent.replace(params=jax.tree.map(jnp.zeros_like, agent.params))
    np.testing.assert_allclose(loss(at(agent, PRETRAIN), batch)[0], published, atol=2e-6)


def test_pretraining_is_behaviour_cloning_of_all_segments():
    batch = random_pairs()
    agent = create(batch, bc_weight=3.0)
    for step in (0, PRETRAIN - 1):
        expected = -log_probabilities(agent, batch.segments).mean()
        np.testing.assert_allclose(loss(at(agent, step), batch)[0], expected, rtol=1e-5)

    config = BCConfig(hidden_dims=(16,), learning_rate=3e-4, pretrain_updates=PRETRAIN)
    cloning = BCAgent.create(config, batch, jax.random.key(0))
    for _ in range(PRETRAIN):
        agent, _ = update(agent, batch)
        cloning, _ = update(cloning, batch)
    assert_close(agent.params, cloning.params)


@jax.jit
def update(agent: Any, batch: Any) -> Any:
    return agent.update(batch, jax.random.key(0))


def assert_close(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def after_pretraining(agent: CPLAgent, batch: Any) -> CPLAgent:
    for _ in range(PRETRAIN):
        agent, _ = update(agent, batch)
    return agent


def test_pretraining_knows_no_labels():
    first, second = (after_pretraining(create(random_pairs()), random_pairs(labels)) for labels in (LABELS, 1 - LABELS))
    assert_close(first.params, second.params)
    first, second = (update(first, random_pairs(labels))[0] for labels in (LABELS, 1 - LABELS))
    with pytest.raises(AssertionError):
        assert_close(first.params, second.params)


def test_adam_starts_afresh_after_pretraining():
    """The first contrastive step is Adam's first: learning rate * g / (|g| + eps), whatever came before."""
    batch = random_pairs()
    agent = after_pretraining(create(batch, learning_rate=1e-2, warmup_updates=4), batch)
    assert int(agent.opt_state.count) == PRETRAIN
    gradient = jax.grad(lambda params: agent.loss(params, batch, jax.random.key(0))[0])(agent.params)
    after, _ = update(agent, batch)
    assert int(after.opt_state.count) == 1
    expected = jax.tree.map(lambda p, g: p - 1e-2 / 4 * g / (jnp.abs(g) + 1e-8), agent.params, gradient)
    assert_close(after.params, expected)
    assert_close(after.opt_state.mu, jax.tree.map(lambda g: 0.1 * g, gradient))
    again, _ = update(after, batch)
    assert int(again.opt_state.count) == 2


def test_two_contrastive_steps_are_adams():
    """Adam as its paper has it, in NumPy, from the gradients of the loss."""
    batch = random_pairs()
    agent = after_pretraining(create(batch, learning_rate=1e-2, warmup_updates=4), batch)
    leaves, structure = jax.tree.flatten(agent.params)
    params = [np.asarray(leaf, np.float64) for leaf in leaves]
    first, second = ([np.zeros_like(leaf) for leaf in params] for _ in range(2))
    for step in (1, 2):
        gradient = jax.grad(lambda params, agent: agent.loss(params, batch, jax.random.key(0))[0])(agent.params, agent)
        for i, g in enumerate(np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradient)):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            unbiased = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
            params[i] = params[i] - 1e-2 * step / 4 * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        agent, _ = update(agent, batch)
    for leaf, expected in zip(jax.tree.leaves(agent.params), params, strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6)
    assert jax.tree.structure(agent.params) == structure


def rates(agent: CPLAgent, steps: range) -> list[float]:
    return [float(at(agent, step).learning_rate) for step in steps]


def test_the_learning_rate_is_that_of_its_phase_and_warms_up():
    agent = create(random_pairs(), pretrain_learning_rate=5e-3, learning_rate=1e-3, warmup_updates=4)
    expected = [5e-3] * 5 + [0.25e-3, 0.5e-3, 0.75e-3] + [1e-3] * 4
    np.testing.assert_allclose(rates(agent, range(12)), expected, rtol=1e-6)


def test_the_learning_rate_falls_along_a_cosine_to_zero():
    agent = create(random_pairs(), pretrain_learning_rate=5e-3, learning_rate=1e-3, warmup_updates=2, decay_updates=15)
    since = np.arange(10)
    cosine = 1e-3 * (1 + np.cos(np.pi * since / 10)) / 2
    cosine[0] /= 2
    np.testing.assert_allclose(rates(agent, range(18)), [*[5e-3] * 5, *cosine, 0, 0, 0], rtol=1e-5, atol=1e-9)
    batch = random_pairs()
    for step, still in [(14, False), (15, True), (16, True)]:
        after, _ = update(at(agent, step), batch)
        same = jax.tree.map(np.array_equal, agent.params, after.params)
        assert jax.tree.all(same) == still


@pytest.mark.parametrize("warmup", [0, 1])
def test_without_warm_up_the_learning_rate_is_whole_at_once(warmup: int):
    agent = create(random_pairs(), learning_rate=1e-3, warmup_updates=warmup)
    np.testing.assert_allclose(rates(agent, range(5, 8)), 1e-3, rtol=1e-6)


@pytest.mark.parametrize("pretrain", [0, PRETRAIN])
def test_the_reference_is_the_policy_at_the_end_of_pretraining(pretrain: int):
    batch = random_pairs()
    agent = create(batch, reference=True, pretrain_updates=pretrain, learning_rate=1e-2, warmup_updates=0)
    begin = agent.params
    for _ in range(pretrain):
        agent, _ = update(agent, batch)
    at_the_end = agent.params
    for _ in range(3):
        agent, _ = update(agent, batch)
        assert jax.tree.all(jax.tree.map(np.array_equal, agent.reference_params, at_the_end))
    assert not np.array_equal(jax.tree.leaves(agent.params)[-1], jax.tree.leaves(at_the_end)[-1])
    assert jax.tree.all(jax.tree.map(np.array_equal, begin, at_the_end)) == (pretrain == 0)


def test_a_policy_that_is_its_own_reference_loses_log_2():
    """At the first contrastive update all scores are 0, whatever the labels and the weight."""
    pretrained = after_pretraining(create(random_pairs(), reference=True), random_pairs())
    for weight in (1.0, 0.75, 0.3):
        agent = pretrained.replace(config=dataclasses.replace(pretrained.config, conservative_weight=weight))
        for labels in (LABELS, 1 - LABELS, np.full(6, 0.5, np.float32)):
            _, metrics = agent.update(random_pairs(labels), jax.random.key(0))
            np.testing.assert_allclose(metrics["policy/loss"], math.log(2), rtol=1e-6)


def test_with_a_reference_scores_are_ratios():
    batch = random_pairs()
    agent = create(batch, reference=True, temperature=0.7, discount=0.9, conservative_weight=0.75)
    reference = create(batch, seed=1)
    agent = agent.replace(reference_params=reference.params)
    ratios = log_probabilities(agent, batch.segments) - log_probabilities(reference, batch.segments)
    scores = 0.7 * (0.9 ** np.arange(STEPS) * ratios).sum(axis=-1)
    np.testing.assert_allclose(loss(at(agent, PRETRAIN), batch)[0], pair_loss(scores, LABELS, 0.75), rtol=1e-5)


def test_no_gradient_flows_into_the_reference():
    batch = random_pairs()
    agent = at(create(batch, reference=True), PRETRAIN)
    other = agent.replace(reference_params=create(batch, seed=1).params)
    after, _ = update(other, batch)
    assert jax.tree.all(jax.tree.map(np.array_equal, after.reference_params, other.params))
    assert create(batch).reference_params is None


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_rankings_of_two_are_pairs_of_which_the_first_is_preferred(weight: float):
    pairs = random_pairs(np.zeros(6, np.float32))
    rankings = Rankings(pairs.segments)
    agent = at(create(pairs, conservative_weight=weight, bc_weight=0.3), PRETRAIN)
    one, other = loss(agent, pairs), loss(agent, rankings)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
    np.testing.assert_allclose(one[1]["policy/ranking_accuracy"], other[1]["policy/ranking_accuracy"])
    after = [update(agent, batch)[0].params for batch in (pairs, rankings)]
    assert_close(*after)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_rankings_of_four_set_every_segment_against_all_below_it(weight: float):
    rankings = Rankings(random_segments(np.random.default_rng(0), 7, 4))
    agent = at(create(rankings, temperature=0.5, discount=0.9, conservative_weight=weight), PRETRAIN)
    scores = 0.5 * (0.9 ** np.arange(STEPS) * log_probabilities(agent, rankings.segments)).sum(axis=-1)
    losses = [sum(np.log1p(np.exp(weight * row[k + 1 :]).sum() / np.exp(row[k])) for k in range(3)) for row in scores]
    value, metrics = loss(agent, rankings)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/ranking_accuracy"], np.mean(scores.argmax(axis=1) == 0))


def with_a_reference(**changes: Any) -> tuple[CPLAgent, Preferences]:
    """An agent whose reference is another policy, contrasting, and the pairs to contrast."""
    batch = random_pairs()
    agent = at(create(batch, reference=True, **changes), PRETRAIN + 1)
    return agent.replace(reference_params=create(batch, seed=1).params), batch


def test_dpo_is_the_logistic_loss_of_the_difference_of_log_ratios():
    """-log sigmoid(beta [log pi/pi_ref of the preferred - of the other]), written out for decided labels."""
    agent, batch = with_a_reference(conservative_weight=1.0, temperature=0.3)
    batch = batch.replace(labels=jnp.asarray([0.0, 1, 1, 0, 1, 0]))
    ratios = log_probabilities(agent, batch.segments) - log_probabilities(
        agent.replace(params=agent.reference_params), batch.segments
    )
    sums = 0.3 * ratios.sum(axis=-1)
    margins = np.where(batch.labels > 0.5, sums[:, 1] - sums[:, 0], sums[:, 0] - sums[:, 1])
    np.testing.assert_allclose(loss(agent, batch)[0], -np.log(1 / (1 + np.exp(-margins))).mean(), rtol=1e-5)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_rpo_adds_the_cloning_of_what_was_preferred(weight: float):
    agent, batch = with_a_reference(conservative_weight=1.0)
    both = [0, 1]
    preferred = {0.0: [0], 1.0: [1], 0.5: both, 0.2: [0], 0.9: [1]}
    log_probs = log_probabilities(agent, batch.segments)
    cloned = [
        log_probs[i, k] for i, label in enumerate(np.round(LABELS, 3).tolist()) for k in preferred[round(label, 3)]
    ]
    with_term, _ = with_a_reference(conservative_weight=1.0, preferred_weight=weight)
    added = loss(with_term, batch)[0] - loss(agent, batch)[0]
    np.testing.assert_allclose(added, -weight * np.mean(cloned), rtol=1e-4)


def test_all_pairs_of_rankings_of_two_are_pairs():
    batch = random_pairs(np.zeros(4))
    pairs, rankings = (at(create(batch, ranking_loss="all_pairs"), PRETRAIN) for _ in range(2))
    np.testing.assert_allclose(loss(pairs, batch)[0], loss(rankings, Rankings(batch.segments))[0], rtol=1e-6)


def test_all_pairs_of_a_ranking_are_contrasted_one_by_one():
    rankings = Rankings(random_segments(np.random.default_rng(3), 2, 4))
    agent = at(create(rankings, ranking_loss="all_pairs", conservative_weight=0.5), PRETRAIN)
    scores = np.asarray(agent.segment_scores(rankings.segments), np.float64)
    pairs = [scores[:, [i, j]] for i in range(4) for j in range(i + 1, 4)]
    expected = np.mean([pair_loss(pair, np.zeros(2), 0.5) for pair in pairs])
    np.testing.assert_allclose(loss(agent, rankings)[0], expected, rtol=1e-5)


def test_pro_adds_the_cloning_of_the_best():
    rankings = Rankings(random_segments(np.random.default_rng(3), 5, 4))
    plain, pro = (at(create(rankings, preferred_weight=weight), PRETRAIN) for weight in (0.0, 1.5))
    added = loss(pro, rankings)[0] - loss(plain, rankings)[0]
    best = log_probabilities(plain, rankings.segments)[:, 0]
    np.testing.assert_allclose(added, -1.5 * best.mean(), rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_is_training_on_smoothed_labels(smoothing: float):
    batch = random_pairs()
    smoothed = batch.replace(labels=(1 - smoothing) * batch.labels + smoothing / 2)
    one, other = at(create(batch, label_smoothing=smoothing), PRETRAIN), at(create(batch), PRETRAIN)
    np.testing.assert_allclose(loss(one, batch)[0], loss(other, smoothed)[0], rtol=1e-6)
    accuracies = [loss(agent, batch)[1]["policy/ranking_accuracy"] for agent in (one, other)]
    assert accuracies[0] == accuracies[1]


def test_the_mean_of_a_segment_is_its_sum_at_a_lower_temperature():
    batch = random_pairs()
    mean = create(batch, reduction="mean", temperature=0.4)
    total = create(batch, temperature=0.4 / STEPS)
    np.testing.assert_allclose(loss(at(mean, PRETRAIN), batch)[0], loss(at(total, PRETRAIN), batch)[0], rtol=1e-6)


def test_actions_beyond_the_limit_count_as_the_limit():
    batch = random_pairs()
    clipped = batch.replace(segments=batch.segments.replace(actions=jnp.clip(batch.segments.actions, -0.4, 0.4)))
    limited = at(create(batch, action_limit=0.4), PRETRAIN)
    np.testing.assert_allclose(loss(limited, batch)[0], loss(at(create(batch), PRETRAIN), clipped)[0], rtol=1e-6)


def test_segment_scores_are_what_the_loss_contrasts():
    agent, batch = with_a_reference(conservative_weight=0.5, temperature=0.3)
    scores = np.asarray(agent.segment_scores(batch.segments), np.float64)
    assert scores.shape == (len(LABELS), 2)
    np.testing.assert_allclose(loss(agent, batch)[0], pair_loss(scores, LABELS, 0.5), rtol=1e-5)


def run(agent: CPLAgent, batch: Any, updates: int) -> CPLAgent:
    for _ in range(updates):
        agent, _ = update(agent, batch)
    return agent


def test_apo_renews_its_reference_after_every_iteration():
    batch = random_pairs()
    agent = run(create(batch, reference=True, iteration_updates=3), batch, PRETRAIN)
    for _ in range(3):
        before = agent.params
        agent = run(agent, batch, 1)
        assert_close(agent.reference_params, before)
        assert int(agent.opt_state.count) == 1
        agent = run(agent, batch, 2)
        assert_close(agent.reference_params, before)


def test_apo_begins_an_iteration_beyond_the_policy_so_far():
    """theta_2 = theta_1 + x (theta_1 - theta_0): Nesterov's extrapolation of the iterates."""
    batch, reach = random_pairs(), 0.7
    agent = run(create(batch, reference=True, iteration_updates=2, extrapolation=reach), batch, PRETRAIN)
    first = agent.params
    agent = run(agent, batch, 1)
    assert_close(agent.reference_params, first)
    second = run(agent, batch, 1)
    third = run(second, batch, 2)
    extrapolated = jax.tree.map(lambda new, old: new + reach * (new - old), second.params, first)
    assert_close(third.reference_params, extrapolated)
    assert_close(third.iterate_params, second.params)
    fourth = run(third, batch, 1)
    assert_close(
        fourth.reference_params,
        jax.tree.map(lambda new, old: new + reach * (new - old), third.params, second.params),
    )


def test_a_tie_is_the_mean_of_both_directions():
    agent = at(create(random_pairs()), PRETRAIN)
    tie, first, second = (loss(agent, random_pairs(np.full(6, label)))[0] for label in (0.5, 0.0, 1.0))
    np.testing.assert_allclose(tie, (first + second) / 2, rtol=1e-6)
    assert first != second


def test_swapping_segments_and_labels_changes_nothing():
    batch = random_pairs()
    swapped = Preferences(jax.tree.map(lambda leaf: leaf[:, ::-1], batch.segments), 1 - batch.labels)
    agent = at(create(batch), PRETRAIN)
    one, other = loss(agent, batch), loss(agent, swapped)
    for name in one[1]:
        np.testing.assert_allclose(one[1][name], other[1][name], rtol=1e-6)


def test_ranking_accuracy_is_the_share_of_decided_pairs():
    batch = random_pairs()
    agent = create(batch)
    scores = log_probabilities(agent, batch.segments).sum(axis=-1)
    decided = LABELS != 0.5
    right = (scores[:, 1] > scores[:, 0]) == (LABELS > 0.5)
    np.testing.assert_allclose(loss(agent, batch)[1]["policy/ranking_accuracy"], right[decided].mean(), rtol=1e-6)
    tied = loss(agent, random_pairs(np.full(6, 0.5)))[1]["policy/ranking_accuracy"]
    assert tied == 0.0


def test_the_policy_sees_normalised_observations():
    batch = random_pairs()
    normalizer = Normalizer(mean=jnp.full(OBSERVATIONS, 3.0), std=jnp.full(OBSERVATIONS, 4.0))
    shifted = Preferences(batch.segments.replace(observations=batch.segments.observations * 4 + 3), batch.labels)
    for reference in (False, True):
        plain = at(create(batch, reference=reference), PRETRAIN)
        if reference:
            plain = plain.replace(reference_params=create(batch, seed=1).params)
        normalised = plain.replace(normalizer=normalizer)
        np.testing.assert_allclose(loss(normalised, shifted)[0], loss(plain, batch)[0], rtol=1e-5)
    observations = batch.segments.observations
    np.testing.assert_allclose(normalised.act(observations * 4 + 3), plain.act(observations), atol=1e-5)


# A small problem: the right action is of one size and to the upper right or the lower left, by the sign of the first
# observation. All actions in the data are of that size, so that a policy which acts 0 everywhere knows nothing.

SIZE = 0.8
CLONED = SIZE**2
"""The squared distance of a policy that acts 0, which is what cloning leads to, from the right one."""


class Rows(struct.PyTreeNode):
    """A dataset that draws from the rows of one large batch."""

    batch: Any

    def sample(self, key: jax.Array, batch_size: int) -> Any:
        count = jax.tree.leaves(self.batch)[0].shape[0]
        return jax.tree.map(lambda leaf: leaf[jax.random.randint(key, (batch_size,), 0, count)], self.batch)


def right_actions(observations: Any) -> np.ndarray:
    return SIZE * np.sign(np.asarray(observations)[..., :1]) * np.full(ACTIONS, np.sqrt(0.5))


def problem(seed: int, count: int, candidates: int = 2) -> tuple[Segments, np.ndarray]:
    """Segments, and their scores under the right policy."""
    rng = np.random.default_rng(seed)
    observations = rng.normal(size=(count, candidates, STEPS, OBSERVATIONS))
    # A gap between the two sides: how steep a small network can be is not the question.
    observations[..., 0] += 0.4 * np.sign(observations[..., 0])
    angles = rng.uniform(-np.pi, np.pi, (count, candidates, STEPS))
    actions = SIZE * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    scores = -np.square(actions - right_actions(observations)).sum(axis=(-2, -1))
    return Segments(jnp.asarray(observations, jnp.float32), jnp.asarray(actions, jnp.float32)), scores


def noiseless_pairs(seed: int, count: int) -> Preferences:
    segments, scores = problem(seed, count)
    return Preferences(segments, jnp.asarray(scores[:, 1] > scores[:, 0], jnp.float32))


def train(data: Any, rounds: int = 2, **changes: Any) -> tuple[CPLAgent, CPLAgent]:
    """The policies after 200 updates of pretraining, and after `rounds` times 200 more."""
    rates = {"pretrain_learning_rate": 3e-3, "learning_rate": 3e-3, "decay_updates": 200 * (rounds + 1)}
    agent = create(data, hidden_dims=(32,), pretrain_updates=200, warmup_updates=20, **rates, **changes)
    run = {"dataset": Rows(data), "key": jax.random.key(1), "num_updates": 200, "batch_size": 64}
    pretrained, _ = update_many(agent, **run)
    agent = pretrained
    for _ in range(rounds):
        agent, _ = update_many(agent, **run)
    return pretrained, agent


UNSEEN = noiseless_pairs(1, 400)


def accuracy(agent: CPLAgent) -> float:
    """On 400 pairs that were not trained on; chance is 0.5 with a standard deviation of 0.025."""
    return loss(agent, UNSEEN)[1]["policy/ranking_accuracy"]


def distance(agent: CPLAgent) -> float:
    """Mean ||mu(s) - right action||^2 at places that were not trained on."""
    observations = UNSEEN.segments.observations
    return float(np.square(np.asarray(agent.act(observations)) - right_actions(observations)).sum(axis=-1).mean())


@pytest.mark.parametrize(
    "changes",
    [{}, {"conservative_weight": 1.0, "bc_weight": 0.02}, {"reference": True, "conservative_weight": 0.75}],
    ids=["cpl", "cpl_bc", "cpl_kl"],
)
def test_the_policy_moves_to_what_is_preferred(changes: dict[str, Any]):
    pretrained, trained = train(noiseless_pairs(0, 1000), **changes)
    np.testing.assert_allclose(distance(pretrained), CLONED, atol=0.1)
    assert abs(accuracy(pretrained) - 0.5) < 0.15
    assert accuracy(trained) > 0.75
    assert distance(trained) < 0.5 * CLONED


def test_shuffled_labels_teach_nothing():
    data = noiseless_pairs(0, 1000)
    _, trained = train(data.replace(labels=jax.random.permutation(jax.random.key(0), data.labels)))
    assert abs(accuracy(trained) - 0.5) < 0.15
    assert distance(trained) > 0.8 * CLONED


def test_rankings_teach_as_well():
    segments, scores = problem(0, 500, candidates=3)
    order = np.argsort(-scores, axis=1)[..., None, None]
    _, trained = train(Rankings(jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, order, axis=1), segments)))
    assert accuracy(trained) > 0.75
    assert distance(trained) < 0.5 * CLONED


def test_with_the_probabilities_of_a_policy_it_recovers_that_policy():
    """At weight 1 the expected loss is a cross-entropy, least where the policy's own probabilities are the labels."""
    segments, scores = problem(0, 3000)
    labels = 1 / (1 + np.exp(scores[:, 0] - scores[:, 1]))
    data = Preferences(segments, jnp.asarray(labels, jnp.float32))
    _, trained = train(data, rounds=8, temperature=1.0, conservative_weight=1.0)
    assert distance(trained) < 0.01 * CLONED
