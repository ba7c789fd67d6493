"""Robust reward learning against its formulas, its invariances, and labels of which some are wrong."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.reward_model import RewardModelAgent, RewardModelConfig
from agents.robust_reward import (
    RobustRewardAgent,
    RobustRewardConfig,
    sampled_preference_loss,
    step_noise,
    stopping_update,
)
from robopref.agent import update_many
from robopref.datasets import PreferenceDataset
from robopref.networks import Normalizer
from robopref.types import Preferences, Segments

OBSERVATIONS, ACTIONS, STEPS, MEMBERS = 3, 2, 5, 2
LABELS = np.array([0.0, 1.0, 0.5, 0.2, 0.9, 1.0], np.float32)
NETWORKS = ("mlp", "transformer")
SMALL = {"hidden_dims": (16,), "embed_dim": 8, "heads": 2, "max_length": 8, "ensemble": MEMBERS}


def random_pairs(labels: np.ndarray = LABELS, seed: int = 0, length: int = STEPS) -> Preferences:
    rng = np.random.default_rng(seed)
    shape = (len(labels), 2, length)
    return Preferences(
        Segments(
            jnp.asarray(rng.normal(size=(*shape, OBSERVATIONS)), jnp.float32),
            jnp.asarray(rng.uniform(-1, 1, (*shape, ACTIONS)), jnp.float32),
        ),
        jnp.asarray(labels, jnp.float32),
    )


def create(example: Preferences, seed: int = 0, normalizer: Normalizer | None = None, **changes: Any) -> Any:
    config = RobustRewardConfig(**{**SMALL, **changes})
    return RobustRewardAgent.create(config, example, jax.random.key(seed), normalizer=normalizer)


@jax.jit
def evaluate(agent: RobustRewardAgent, batch: Preferences, key: jax.Array) -> Any:
    return agent.loss(agent.params, batch, key)


@jax.jit
def gradient(agent: RobustRewardAgent, batch: Preferences) -> Any:
    return jax.grad(lambda params: agent.loss(params, batch, jax.random.key(0))[0])(agent.params)


@jax.jit
def update(agent: Any, batch: Any, key: Any) -> Any:
    return agent.update(batch, key)


def heads(agent: RobustRewardAgent, segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    """mu and sigma of each step and member, by the MLP's formula."""
    steps = np.concatenate([agent.normalizer(segments.observations), segments.actions], axis=-1).astype(np.float64)
    means, stds = [], []
    for member in range(MEMBERS):
        layers = jax.tree.map(lambda leaf, member=member: np.asarray(leaf[member], np.float64), agent.params["MLP_0"])
        hidden = np.maximum(steps @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"], 0)
        outputs = hidden @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]
        means.append(outputs[..., 0])
        length = steps.shape[-2]
        floor = agent.config.logit_noise * (
            np.sqrt(length / 2) if agent.config.reduction == "mean" else 1 / np.sqrt(2 * length)
        )
        stds.append(floor * np.exp(1 - np.log(1 + (np.e - 1) * np.exp(-outputs[..., 1]))))
    return np.stack(means), np.stack(stds)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


NORMALIZER = Normalizer(mean=jnp.array([0.5, -1.0, 0.0]), std=jnp.array([2.0, 1.0, 0.5]))


@pytest.mark.parametrize(("reduction", "aggregate"), [("sum", "probability"), ("mean", "loss")])
def test_the_loss_is_that_of_rewards_drawn_step_by_step_and_the_floor(reduction: str, aggregate: str):
    """Here every step's reward is drawn, and eta and h_t are entropies; many draws make both losses expectations."""
    batch, weight, eta_noise, smoothing = random_pairs(), 0.7, 2.0, 0.2
    changes = {"logit_noise": eta_noise, "floor_weight": weight, "label_smoothing": smoothing}
    agent = create(batch, normalizer=NORMALIZER, reduction=reduction, aggregate=aggregate, samples=20_000, **changes)
    means, stds = heads(agent, batch.segments)
    draws = np.random.default_rng(1).normal(size=(20_000, *means.shape))
    scores = (means + stds * draws).sum(axis=-1) / (1 if reduction == "sum" else STEPS)
    logits = scores[..., 1] - scores[..., 0]
    labels = (1 - smoothing) * LABELS + smoothing / 2
    if aggregate == "probability":
        second = sigmoid(logits).mean(axis=0)
        losses = -labels * np.log(second) - (1 - labels) * np.log(1 - second)
    else:
        losses = (labels * np.logaddexp(0, -logits) + (1 - labels) * np.logaddexp(0, logits)).mean(axis=0)
    floor = eta_noise / np.sqrt(2 * STEPS) if reduction == "sum" else eta_noise * np.sqrt(STEPS / 2)
    entropy, eta = (0.5 * np.log(2 * np.pi * np.e * std**2) for std in (stds, floor))
    below = np.maximum(0, eta - entropy).mean()
    value, metrics = evaluate(agent, batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["reward/loss"], losses.mean(), rtol=0.02)
    np.testing.assert_allclose(metrics["reward/below_floor"], below, rtol=1e-4)
    np.testing.assert_allclose(value, metrics["reward/loss"] + weight * below, rtol=1e-5)
    # Over draws, the spread of a pair's logit; over pairs and members, the mean of these.
    np.testing.assert_allclose(metrics["reward/logit_noise"], logits.std(axis=0).mean(), rtol=0.02)
    np.testing.assert_allclose(agent.rewards(batch.segments), means.mean(axis=0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(agent.reward_stds(batch.segments), stds.mean(axis=0), rtol=1e-3)


@pytest.mark.parametrize("length", [10, 50])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_floor_is_the_same_noise_on_a_logit_at_any_length(reduction: str, length: int):
    sigma, rng = step_noise(3.0, length, reduction), np.random.default_rng(0)
    scores = getattr(rng.normal(0, sigma, (40_000, 2, length)), reduction)(axis=-1)
    np.testing.assert_allclose((scores[:, 1] - scores[:, 0]).std(), 3.0, rtol=0.02)


def test_a_sigma_of_20_under_a_mean_over_10_steps_is_near_the_default():
    assert math.isclose(step_noise(20 * math.sqrt(2 / 10), 10, "mean"), 20)
    assert abs(RobustRewardConfig().logit_noise - 20 * math.sqrt(2 / 10)) < 0.1
    assert 0.5 * math.log(2 * math.pi * math.e * 20**2) == pytest.approx(4.4, abs=0.02)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_floor_acts_the_same_at_10_and_at_50_steps(network: str, reduction: str):
    """From the same parameters, one update at a time: what is below the floor, and the noise of logits."""
    seen = []
    for length in (10, 50):
        # Every step is the same, so that longer segments are no other ones.
        one = random_pairs(length=1)
        segments = jax.tree.map(lambda leaf, length=length: jnp.repeat(leaf, length, axis=2), one.segments)
        changes = {"network": network, "reduction": reduction, "max_length": 50, "noise": "learned"}
        agent = create(one, **changes)
        if network == "transformer":
            # A transformer knows the position: without, all steps are the same to it as well.
            position = jnp.zeros_like(agent.params["position"]["embedding"])
            agent = agent.replace(params={**agent.params, "position": {"embedding": position}})
        _, metrics = evaluate(agent, Preferences(segments, one.labels), jax.random.key(0))
        seen.append((metrics["reward/below_floor"], metrics["reward/logit_noise"]))
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-4)


@pytest.mark.parametrize("aggregate", ["probability", "loss"])
def test_losses_and_gradients_are_finite_for_any_logit_and_label(aggregate: str):
    logits = jnp.asarray([[-1e4, -50.0, 0.0, 50.0, 1e4, 0.0], [-1e4, -60.0, 1.0, 40.0, 1e4, 1e4]])
    for label in (0.0, 0.3, 0.5, 1.0):
        total = partial(lambda x, y: sampled_preference_loss(x, jnp.full(6, y), aggregate).sum(), y=label)
        value, slope = jax.value_and_grad(total)(logits)
        assert np.isfinite(value)
        assert np.isfinite(slope).all()
        small = np.asarray(logits[:, 2:3], np.float64)
        second = sigmoid(small).mean(axis=0)
        expected = -label * np.log(second) - (1 - label) * np.log(1 - second)
        if aggregate == "loss":
            expected = (label * np.logaddexp(0, -small) + (1 - label) * np.logaddexp(0, small)).mean(axis=0)
        np.testing.assert_allclose(
            sampled_preference_loss(logits[:, 2:3], jnp.full(1, label), aggregate), expected, rtol=1e-5
        )


def test_the_mean_probability_explains_a_label_better_than_the_mean_of_losses():
    """-log is convex: by Jensen's inequality, whatever the draws and hard or soft labels."""
    logits = 9 * jax.random.normal(jax.random.key(0), (16, 200))
    labels = jax.random.uniform(jax.random.key(1), (200,)).round(1)
    together, apart = (sampled_preference_loss(logits, labels, each) for each in ("probability", "loss"))
    assert (together < apart).all()
    same = jnp.repeat(logits[:1], 16, axis=0)
    together, apart = (sampled_preference_loss(same, labels, each) for each in ("probability", "loss"))
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_are_finite_however_certain_or_uncertain(network: str):
    batch = random_pairs()
    for shift in (-80.0, 0.0, 8.0):
        agent = create(batch, network=network)
        params = dict(agent.params)
        if network == "mlp":
            layers = params["MLP_0"]
            bias = layers["Dense_1"]["bias"].at[..., 1].add(shift)
            params["MLP_0"] = {**layers, "Dense_1": {**layers["Dense_1"], "bias": bias}}
        else:
            params["uncertainty"] = {**params["uncertainty"], "bias": params["uncertainty"]["bias"] + shift}
        slopes = gradient(agent.replace(params=params), batch)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize("network", NETWORKS)
def test_sigma_begins_at_the_floor_and_never_rises_far_above_it(network: str):
    batch = random_pairs()
    agent = create(batch, network=network, reduction="mean")
    floor = step_noise(agent.config.logit_noise, STEPS, "mean")
    stds = {}
    for shift in (0.0, 50.0):
        params = jax.tree.map(jnp.zeros_like, agent.params)
        if network == "mlp":
            layers = params["MLP_0"]
            params = {"MLP_0": {**layers, "Dense_1": {**layers["Dense_1"], "bias": jnp.full((MEMBERS, 2), shift)}}}
        else:
            params["uncertainty"] = {**params["uncertainty"], "bias": jnp.full((MEMBERS, 1), shift)}
        stds[shift] = agent.replace(params=params).reward_stds(batch.segments)
        alone = agent.replace(params=params, config=RobustRewardConfig(**SMALL, network=network, floor_weight=0.0))
        if shift == 0:
            np.testing.assert_allclose(alone.reward_stds(batch.segments), 1 / math.sqrt(2 * STEPS), rtol=1e-5)
    np.testing.assert_allclose(stds[0.0], floor, rtol=1e-5)
    np.testing.assert_allclose(stds[50.0], math.e * floor, rtol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_without_noise_it_is_the_reward_model(network: str):
    batch = random_pairs()
    agent = create(batch, network=network, noise="none", label_smoothing=0.1)
    plain = RewardModelAgent.create(
        RewardModelConfig(**SMALL, network=network, label_smoothing=0.1), batch, jax.random.key(0)
    )
    for step in range(3):
        agent, metrics = update(agent, batch, jax.random.key(step))
        plain, expected = update(plain, batch, jax.random.key(step))
        for name, value in metrics.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(agent.rewards(batch.segments), plain.rewards(batch.segments), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(agent.reward_stds(batch.segments), 0)


@pytest.mark.parametrize(("network", "reduction"), [("mlp", "mean"), ("transformer", "sum")])
def test_a_score_is_the_reduction_of_the_rewards_and_the_mean_over_members(network: str, reduction: str):
    segments = random_pairs().segments
    agent = create(random_pairs(), network=network, reduction=reduction)
    rewards, scores, members = (call(segments) for call in (agent.rewards, agent.segment_scores, agent.member_scores))
    assert rewards.shape == (6, 2, STEPS)
    assert members.shape == (MEMBERS, 6, 2)
    np.testing.assert_allclose(getattr(np, reduction)(rewards, axis=-1), scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(members.mean(axis=0), scores, rtol=1e-4, atol=1e-5)


def test_swapping_the_segments_and_the_labels_changes_nothing():
    """In expectation, as the draws are not swapped."""
    batch = random_pairs()
    swapped = Preferences(jax.tree.map(lambda leaf: leaf[:, ::-1], batch.segments), 1 - batch.labels)
    agent = create(batch)
    np.testing.assert_allclose(agent.held_out_loss(swapped), agent.held_out_loss(batch), rtol=1e-5)


@pytest.mark.parametrize("noise", ["learned", "fixed", "none"])
def test_the_held_out_loss_is_an_expectation_over_the_noise(noise: str):
    batch = random_pairs()
    agent = create(batch, noise=noise, logit_noise=2.0, samples=50_000)
    expected = evaluate(agent, batch, jax.random.key(0))[1]["reward/loss"]
    np.testing.assert_allclose(agent.held_out_loss(batch), expected, rtol=0.01)


def test_fixed_noise_is_that_of_the_floor_and_has_no_head():
    batch = random_pairs()
    agent = create(batch, noise="fixed", logit_noise=2.0)
    assert agent.params["MLP_0"]["Dense_1"]["bias"].shape == (MEMBERS, 1)
    np.testing.assert_allclose(evaluate(agent, batch, jax.random.key(0))[1]["reward/logit_noise"], 2.0, rtol=1e-5)
    np.testing.assert_allclose(agent.reward_stds(batch.segments), 2.0 / math.sqrt(2 * STEPS), rtol=1e-5)


def test_parameters_stay_as_they_are_after_the_stop():
    batch = random_pairs()
    free, stopped = (create(batch, frozen_after=frozen) for frozen in (None, 3))
    for step in range(6):
        before = stopped
        free, _ = update(free, batch, jax.random.key(step))
        stopped, metrics = update(stopped, batch, jax.random.key(step))
        assert int(stopped.step) == step + 1
        reference, frozen = (free, stopped) if step < 3 else (before, stopped)
        for kind in ("params", "opt_state"):
            one, other = jax.tree.leaves(getattr(reference, kind)), jax.tree.leaves(getattr(frozen, kind))
            for first, second in zip(one, other, strict=True):
                np.testing.assert_allclose(first, second, rtol=1e-6 if step < 3 else 0, atol=1e-7 if step < 3 else 0)
    assert np.isfinite(metrics["reward/loss"])


def test_the_stop_is_where_held_out_pairs_are_explained_best():
    updates = np.array([100, 200, 300, 400])
    assert stopping_update(updates, np.array([0.7, 0.5, 0.5, 0.9])) == 200
    by_seed = np.array([[0.6, 0.9], [0.7, 0.5], [0.65, 0.5], [0.4, 0.9]])
    assert stopping_update(updates, by_seed) == int(updates[by_seed.mean(axis=1).argmin()]) == 300
    with pytest.raises(ValueError, match="3 losses were given for 4 updates"):
        stopping_update(updates, np.zeros(3))
    with pytest.raises(ValueError, match="not a finite number"):
        stopping_update(updates, np.array([0.7, np.nan, 0.5, 0.9]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_noise": 0.0}, "logit_noise must be above 0"),
        ({"floor_weight": -1.0}, "floor_weight"),
        ({"samples": 0}, "at least one sample"),
        ({"frozen_after": 0}, "frozen_after"),
        ({"ensemble": 0}, "at least one member"),
        ({"network": "transformer", "max_length": 4}, "positions for 4"),
    ],
)
def test_what_cannot_work_is_said(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        create(random_pairs(), **changes)


def labelled_pairs(seed: int, count: int, wrong: float) -> Preferences:
    """Pairs of segments of 10 steps, ranked by a sum of rewards that bends; a share of the labels is wrong."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(count, 2, 10, 6)) + rng.normal(size=(count, 2, 1, 6))
    weights, bends, phases = np.random.default_rng(0).normal(size=(3, 6))
    rewards = steps @ weights + np.sin(2 * steps + phases) @ bends
    better = (np.diff(rewards.sum(axis=-1), axis=1)[:, 0] > 0).astype(float)
    labels = np.where(rng.permutation(count) < round(wrong * count), 1 - better, better)
    split = jnp.asarray(steps, jnp.float32)
    return Preferences(Segments(split[..., :4], split[..., 4:]), jnp.asarray(labels, jnp.float32))


def train(config: RobustRewardConfig, pairs: Preferences, seed: int, num_updates: int) -> tuple[Any, Any]:
    agent = RobustRewardAgent.create(config, jax.tree.map(lambda leaf: leaf[:2], pairs), jax.random.key(seed))
    data = PreferenceDataset.from_preferences(pairs)
    return update_many(agent, data, jax.random.key(seed + 1), num_updates=num_updates, batch_size=32)


@jax.jit
def accuracy(agent: RobustRewardAgent, pairs: Preferences) -> jax.Array:
    scores = agent.segment_scores(pairs.segments)
    return jnp.mean((scores[:, 1] > scores[:, 0]) == (pairs.labels > 0.5))


NOISY = {"hidden_dims": (64, 64), "ensemble": 1, "learning_rate": 2e-3, "reduction": "mean"}


def test_the_floor_holds_and_without_it_the_noise_dies_away():
    pairs = labelled_pairs(seed=1, count=100, wrong=0.0)
    held, dying = (
        train(RobustRewardConfig(**NOISY, logit_noise=4.0, floor_weight=weight), pairs, 0, 400) for weight in (1.0, 0.0)
    )
    stds, unit = np.asarray(held[0].reward_stds(pairs.segments)), step_noise(1.0, 10, "mean")
    assert np.quantile(stds / unit, 0.01) > 0.8 * 4.0
    assert held[1]["reward/below_floor"] < 1.0
    assert np.median(dying[0].reward_stds(pairs.segments)) / unit < 0.5
    assert float(held[0].held_out_loss(pairs)) > float(dying[0].held_out_loss(pairs))


def test_with_wrong_labels_the_floor_helps_and_two_heads_alone_do_not():
    """30 % of the labels that are learned from are wrong; accuracy is on right ones of other pairs."""
    configs = {
        "floor": RobustRewardConfig(**NOISY),
        "no floor": RobustRewardConfig(**NOISY, floor_weight=0.0),
        "bradley-terry": RobustRewardConfig(**NOISY, noise="none"),
    }
    found = {name: [] for name in configs}
    for seed in range(4):
        pairs, unseen = labelled_pairs(seed, 200, wrong=0.3), labelled_pairs(seed + 100, 500, wrong=0.0)
        for name, config in configs.items():
            found[name].append(float(accuracy(train(config, pairs, seed, 500)[0], unseen)))
    means = {name: np.mean(each) for name, each in found.items()}
    assert means["floor"] > means["bradley-terry"] + 0.04
    assert abs(means["no floor"] - means["bradley-terry"]) < 0.03
