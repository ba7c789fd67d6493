"""Labels carried over: small problems by hand, a rotated goal, a reflection that inverts, and its two repairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import pytest

from labelers.pearl import PearlConfig, PearlTeacher, carry_over, confidences, segment_features, transfer
from labelers.teachers import Teacher
from robopref.episodes import EpisodeDataset
from robopref.queries import Labels, Queries, draw_queries, pair_segments
from robopref.transport import GromovConfig

KEY = jax.random.key(0)
COUNT, LENGTH = 40, 20


def made_up(
    observations: Any, actions: Any, rewards: Any, name: str, keys: dict[str, int] | None = None
) -> EpisodeDataset:
    """N episodes [N, T + 1, O], [N, T, A], [N, T], whose hash is their name."""
    count, steps, size = len(rewards), rewards.shape[1], observations.shape[-1]
    ended = np.zeros(count, bool)
    return EpisodeDataset(
        path=Path(name),
        hash=name,
        env={},
        description="",
        keys=keys or {"observation": size},
        splits={},
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64),
        action_space=gymnasium.spaces.Box(-1.0, 1.0, (actions.shape[-1],)),
        observations=observations.reshape(-1, size),
        actions=np.concatenate([actions, np.zeros_like(actions[:, :1])], axis=1).reshape(-1, actions.shape[-1]),
        rewards=np.concatenate([rewards, np.zeros((count, 1))], axis=1).ravel(),
        offsets=np.arange(count + 1) * (steps + 1),
        lengths=np.full(count, steps),
        terminated=ended,
        truncated=~ended,
        successes=ended,
        returns=rewards.sum(axis=1),
        seeds=np.arange(count),
        origins=({},) * count,
        state_size=0,
    )


def reaching(seed: int, *, angle: float = 0.0, radius: float = 1.0, worst: float = 0.0) -> EpisodeDataset:
    """A point that goes from the origin towards a goal, each episode with its own skill; below 0, it flees."""
    rng = np.random.default_rng(seed)
    goal = radius * np.array([np.cos(angle), np.sin(angle)])
    count, skills = COUNT, rng.uniform(worst, 1.0, COUNT)
    places, actions = [rng.normal(0.0, 0.1 * radius, (count, 2))], []
    for _ in range(LENGTH):
        wanted = (goal - places[-1]) / np.linalg.norm(goal - places[-1], axis=1, keepdims=True)
        near = np.minimum(np.linalg.norm(goal - places[-1], axis=1, keepdims=True) / (0.2 * radius), 1.0)
        actions.append(np.clip(0.5 * skills[:, None] * near * wanted + rng.normal(0.0, 0.15, (count, 2)), -1, 1))
        places.append(places[-1] + 0.15 * radius * actions[-1])
    observations = np.stack(places, axis=1)
    rewards = -np.linalg.norm(goal - observations[:, 1:], axis=-1)
    return made_up(observations, np.stack(actions, axis=1), rewards, f"reach {seed} {angle:.2f} {radius}")


def line(values: np.ndarray, name: str) -> EpisodeDataset:
    """Segments of one step: a number, which is also what is earned, and an action that says nothing."""
    observations = np.repeat(values[:, None, None], 2, axis=1)
    return made_up(observations, np.zeros((len(values), 1, 1)), values[:, None], name)


def all_pairs(dataset: EpisodeDataset, length: int = LENGTH) -> Queries:
    episodes = np.arange(len(dataset))
    return pair_segments(dataset, episodes, np.zeros_like(episodes), length=length, pairing="dense")


def oracle(queries: Queries) -> Labels:
    return Teacher().label(queries, KEY)


def accuracy(teacher: PearlTeacher, queries: Queries) -> float:
    right = (teacher.values(queries) > 0.5) == (oracle(queries).values == 1)
    return float(right.mean())


JOINTLY = PearlConfig(standardize="jointly")
SOFT = dataclasses.replace(JOINTLY, gromov=GromovConfig(epsilon=0.05))


def succeeds(queries: Queries) -> np.ndarray:
    """What both tasks share: whether much was earned."""
    return queries.rewards.sum(axis=-1, keepdims=True) > 0.5


def lines(seed: int) -> tuple[Queries, Queries]:
    rng = np.random.default_rng(seed)
    return tuple(all_pairs(line(rng.normal(size=32), f"{name} {seed}"), 1) for name in ("source", "target"))


# The labels of three segments, of which the second is the best one, then the third.
ORDER = np.array([[0.5, 0.0, 0.0], [1.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
ALL_PAIRS = ~np.eye(3, dtype=bool)


def test_labels_are_divided_by_the_weight_of_labelled_pairs() -> None:
    coupling = np.eye(3) / 3
    # What is published: a ninth of what was said.
    assert (coupling.T @ np.where(ALL_PAIRS, ORDER, 0.0) @ coupling)[1, 2] == pytest.approx(1 / 9)
    np.testing.assert_allclose(carry_over(coupling, ORDER, ALL_PAIRS), ORDER, atol=1e-12)


def test_labels_follow_their_segments() -> None:
    coupling = np.zeros((3, 3))
    coupling[[2, 0, 1], [0, 1, 2]] = 1 / 3
    expected = np.array([[0.5, 1.0, 0.0], [0.0, 0.5, 0.0], [1.0, 1.0, 0.5]])
    np.testing.assert_allclose(carry_over(coupling, ORDER, ALL_PAIRS), expected, atol=1e-12)


def test_labels_are_the_sum_over_pairs_and_complement_each_other() -> None:
    rng = np.random.default_rng(0)
    coupling, values = rng.random((5, 4)), rng.random((5, 5))
    values = np.triu(values, 1) + np.tril(1 - values.T, -1)
    labelled = np.triu(rng.random((5, 5)) < 0.5, 1)
    labelled |= labelled.T
    expected = np.full((4, 4), 0.5)
    for j, k in np.argwhere(~np.eye(4, dtype=bool)):
        weights = [coupling[a, j] * coupling[b, k] for a, b in np.argwhere(labelled)]
        expected[j, k] = np.dot(weights, [values[a, b] for a, b in np.argwhere(labelled)]) / np.sum(weights)
    found = carry_over(coupling, values, labelled)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found + found.T, 1.0, atol=1e-12)
    # A labelled diagonal would draw labels towards 0.5 wherever a source segment serves two target segments.
    with_diagonal = carry_over(coupling, np.where(np.eye(5), 0.5, values), labelled | np.eye(5, dtype=bool))
    assert np.abs(with_diagonal - found).max() > 0.01


def test_what_no_label_speaks_of_is_a_tie_without_confidence() -> None:
    labelled = np.zeros((3, 3), bool)
    labelled[0, 1] = labelled[1, 0] = True
    found = carry_over(np.eye(3) / 3, ORDER, labelled)
    np.testing.assert_allclose(found, [[0.5, 0.0, 0.5], [1.0, 0.5, 0.5], [0.5, 0.5, 0.5]])
    np.testing.assert_allclose(confidences(found[0]), [0.0, 1.0, 0.0])


@pytest.mark.parametrize("match", ["gromov", "identity"])
def test_carried_to_its_own_task_a_label_stays_what_it_was(match: Any) -> None:
    pairs = draw_queries(reaching(0), np.random.default_rng(0), count=60, length=LENGTH - 5)
    rng = np.random.default_rng(1)
    pairs = pairs.take(np.unique(np.sort(pairs.episodes * 100 + pairs.starts, axis=1), axis=0, return_index=True)[1])
    values = rng.choice([0.0, 0.25, 0.5, 1.0], len(pairs))
    answered = rng.random(len(pairs)) < 0.8
    labels = Labels(values=np.where(answered, values, np.nan), answered=answered, labeler="somebody")
    config = PearlConfig(match=match, gromov=GromovConfig(exact=True, starts=2))
    carried = transfer(pairs, labels, pairs, KEY, config).label(pairs, KEY)
    np.testing.assert_allclose(carried.values[answered], values[answered], atol=1e-12)
    decided = answered & np.isin(values, (0.0, 0.5, 1.0))
    np.testing.assert_array_equal(carried.values[decided], values[decided])


def test_a_rotated_goal_is_no_obstacle_where_the_nearest_segment_misleads() -> None:
    """The least of all seeds counts: one bad coupling turns all labels round."""
    found: dict[str, list[float]] = {"gromov": [], "nearest": [], "nearest_cosine": [], "random": []}
    for seed in range(4):
        source = all_pairs(reaching(seed))
        target = all_pairs(reaching(100 + seed, angle=2 * np.pi / 3, radius=1.5))
        for match, accuracies in found.items():
            config = dataclasses.replace(JOINTLY, match=match, gromov=GromovConfig(starts=2))
            accuracies.append(accuracy(transfer(source, oracle(source), target, jax.random.key(seed), config), target))
    assert min(found["gromov"]) > 0.8
    assert np.mean(found["gromov"]) > 0.87
    assert np.mean(found["nearest"]) < 0.4
    assert np.mean(found["nearest_cosine"]) < 0.4
    assert 0.35 < np.mean(found["random"]) < 0.65


def test_a_softer_coupling_is_less_sure_and_right_where_it_is_sure() -> None:
    source, target = all_pairs(reaching(0)), all_pairs(reaching(100, angle=2 * np.pi / 3, radius=1.5))
    sharp, soft = (transfer(source, oracle(source), target, KEY, config) for config in (JOINTLY, SOFT))
    values = soft.label(target, KEY).values
    assert confidences(values).mean() < confidences(sharp.values(target)).mean() - 0.1
    right = (values > 0.5) == (oracle(target).values == 1)
    sure = confidences(values) > 0.8
    assert 0.2 < sure.mean() < 0.9
    assert right[sure].mean() > right[~sure].mean() + 0.1
    picky = dataclasses.replace(soft, min_confidence=0.8).label(target, KEY)
    np.testing.assert_array_equal(picky.answered, confidences(values) >= 0.8)
    np.testing.assert_array_equal(picky.values[picky.answered], values[picky.answered])


def test_a_soft_coupling_averages_flips_of_source_labels_away() -> None:
    source, target = all_pairs(reaching(0)), all_pairs(reaching(100, angle=2 * np.pi / 3, radius=1.5))
    noisy = Teacher(mistake=0.2).label(source, KEY)
    clean, flipped = (accuracy(transfer(source, each, target, KEY, SOFT), target) for each in (oracle(source), noisy))
    assert clean > 0.85
    assert flipped > clean - 0.05


def test_clusters_carry_labels_too() -> None:
    source, target = all_pairs(reaching(0)), all_pairs(reaching(100, angle=2 * np.pi / 3, radius=1.5))
    teacher = transfer(source, oracle(source), target, KEY, dataclasses.replace(JOINTLY, n_clusters=15))
    assert accuracy(teacher, target) > 0.75
    matrix = np.asarray(teacher.coupling.matrix)
    np.testing.assert_allclose(matrix.sum(axis=0), 1 / COUNT, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=1), 1 / COUNT, atol=1e-12)
    # Members of a cluster share its mass evenly.
    assert len(np.unique(matrix.round(12), axis=0)) <= 15


def test_a_reflection_inverts_all_labels_and_a_shared_feature_or_anchors_prevent_it() -> None:
    plain, fused, anchored, inverted = [], [], [], []
    for seed in range(5):
        source, target = lines(seed)
        said, key = oracle(source), jax.random.key(seed)
        plain.append(accuracy(transfer(source, said, target, key), target))
        fused.append(accuracy(transfer(source, said, target, key, shared=succeeds), target))
        known = target.take(np.random.default_rng(seed).permutation(len(target))[:5])
        teacher = transfer(source, said, target, key, PearlConfig(repair="inversion"), anchors=(known, oracle(known)))
        anchored.append(accuracy(teacher, target))
        assert teacher.anchoring is not None
        inverted.append(teacher.anchoring.inverted)
        assert teacher.anchoring.n == 5
        assert teacher.anchoring.agreement > 0.9
    # Right or wrong throughout, and not always right.
    assert all(each < 0.1 or each > 0.9 for each in plain)
    assert min(plain) < 0.1
    assert min(fused) > 0.9
    assert min(anchored) > 0.9
    assert inverted == [each < 0.1 for each in plain]


def test_anchors_choose_between_starts() -> None:
    # So nearly a mirror image of itself that both ways are optima, which starts near them find.
    rng = np.random.default_rng(3)
    points = np.concatenate([-np.arange(1.0, 9.0), np.arange(1.0, 9.0)]) + rng.normal(0, 0.02, 16)
    source, target = (all_pairs(line(values, str(index)), 1) for index, values in enumerate((points, -points)))
    known = target.take(np.arange(0, len(target), 15))
    config = PearlConfig(gromov=GromovConfig(starts=8), repair="starts")
    for truth in (1.0, -1.0):
        answers = oracle(known).values if truth > 0 else 1 - oracle(known).values
        labels = Labels(values=answers, answered=np.full(len(known), True), labeler="somebody")
        teacher = transfer(source, oracle(source), target, KEY, config, anchors=(known, labels))
        assert teacher.anchoring is not None
        assert not teacher.anchoring.inverted
        right = accuracy(teacher, target)
        assert (right if truth > 0 else 1 - right) > 0.9


def test_labels_do_not_depend_on_the_pairing_or_its_order() -> None:
    source, target = lines(0)
    teacher = transfer(source, oracle(source), target, KEY)
    order = np.random.default_rng(0).permutation(len(target))
    shuffled = target.take(order)
    swapped = Queries(target.dataset, target.episodes[:, ::-1], target.starts[:, ::-1], 1)
    np.testing.assert_array_equal(teacher.label(shuffled, KEY).values, teacher.label(target, KEY).values[order])
    np.testing.assert_allclose(teacher.values(swapped), 1 - teacher.values(target), atol=1e-12)
    again = transfer(source.take(order), oracle(source).take(order), shuffled, KEY)
    np.testing.assert_array_equal(again.preferences, teacher.preferences)


def test_labels_record_how_they_were_found() -> None:
    source, target = lines(0)
    teacher = transfer(source, oracle(source), target, KEY, shared=succeeds, anchors=(target, oracle(target)))
    labels = teacher.label(target, KEY)
    assert labels.labeler == "pearl"
    assert labels.parameters["source_dataset"] == source.dataset.hash
    assert labels.parameters["source_labels"] == len(source)
    assert labels.parameters["shared"] == "succeeds"
    assert labels.parameters["gromov"]["epsilon"] == GromovConfig().epsilon
    assert labels.parameters["cost_ratio"] == float(teacher.coupling.cost_ratio)
    assert labels.parameters["anchoring"]["n"] == len(target)


def test_features_are_standardised_by_task_and_chosen_by_name() -> None:
    rng = np.random.default_rng(0)
    observations = rng.normal(5.0, [1.0, 100.0, 0.0], (6, 5, 3))
    actions = rng.uniform(-1, 1, (6, 4, 2))
    dataset = made_up(observations, actions, np.zeros((6, 4)), "parts", {"arm": 1, "object": 2})
    queries = all_pairs(dataset, 4)
    shown = queries.observations
    parts = np.concatenate([shown, queries.actions], axis=-1)
    spread = parts.std(axis=(0, 1, 2))
    expected = (parts - parts.mean(axis=(0, 1, 2))) / np.where(spread > 1e-9, spread, 1.0)
    np.testing.assert_allclose(segment_features(queries), expected.reshape(15, 2, -1), atol=1e-9)
    mean = segment_features(queries, PearlConfig(summary="mean"))
    np.testing.assert_allclose(mean, expected.mean(axis=2), atol=1e-9)
    arm = segment_features(queries, PearlConfig(parts=("arm",), use_actions=False))
    np.testing.assert_allclose(arm, expected[..., 0], atol=1e-9)
    only_actions = segment_features(queries, PearlConfig(parts=()))
    np.testing.assert_allclose(only_actions, expected[..., 3:].reshape(15, 2, -1), atol=1e-9)
    jointly = segment_features(queries, PearlConfig(parts=("object",), use_actions=False, standardize="jointly"))
    np.testing.assert_allclose(jointly.reshape(15, 2, 4, 2), expected[..., 1:3], atol=1e-9)
    with pytest.raises(ValueError, match="no part 'leg' in its observations; there are arm, object"):
        segment_features(queries, PearlConfig(parts=("leg",)))


def test_what_cannot_be_carried_over_is_refused() -> None:
    source, target = lines(0)
    said = oracle(source)
    skipped = Labels(values=np.full(len(source), np.nan), answered=np.full(len(source), False), labeler="nobody")
    identity = PearlConfig(match="identity")
    with pytest.raises(ValueError, match="nothing to carry over"):
        transfer(source, skipped, target, KEY, identity)
    with pytest.raises(ValueError, match="anchors must show"):
        transfer(source, said, target, KEY, identity, anchors=(source, said))
    with pytest.raises(ValueError, match="not 32 and 40"):
        transfer(source, said, all_pairs(reaching(0)), KEY, identity)
    with pytest.raises(ValueError, match="features of one size"):
        transfer(source, said, all_pairs(reaching(0)), KEY, PearlConfig(match="nearest"))
    teacher = transfer(source, said, target.take(np.arange(3)), KEY, PearlConfig(match="random"))
    with pytest.raises(ValueError, match="another dataset"):
        teacher.label(source, KEY)
    with pytest.raises(ValueError, match="no labels were carried over"):
        teacher.label(target, KEY)
    with pytest.raises(ValueError, match="match of PEARL is one of"):
        PearlConfig(match="hopeful")
    with pytest.raises(ValueError, match="n_clusters"):
        PearlConfig(n_clusters=1)
    with pytest.raises(ValueError, match="min_confidence"):
        dataclasses.replace(teacher, min_confidence=2.0)
