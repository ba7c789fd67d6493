"""What is gathered on the device, against slices of the episodes that the dataset was written from."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robopref.datasets import (
    PreferenceDataset,
    RankingDataset,
    SegmentTable,
    TransitionDataset,
    answered_queries,
    best_episodes,
    check_actions,
)
from robopref.queries import Labels, Queries, draw_queries
from robopref.types import Preferences, Segments

LENGTH = 4


def draw(dataset, count=12, candidates=2) -> Queries:
    return draw_queries(dataset, np.random.default_rng(0), count=count, length=LENGTH, candidates=candidates)


def pair_labels(values) -> Labels:
    values = np.asarray(values, float)
    return Labels(values=values, answered=~np.isnan(values), labeler="tester")


def slices(queries, episodes, name) -> np.ndarray:
    """Observations or actions of every segment, [N, K, T, ...], cut from the episodes one by one."""
    rows = [
        [getattr(episodes[index], name)[start : start + LENGTH] for index, start in zip(*places, strict=True)]
        for places in zip(queries.episodes, queries.starts, strict=True)
    ]
    return np.asarray(rows, np.float32)


def one_sentence(error: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(error.value) and ". " not in str(error.value)


@pytest.mark.parametrize("candidates", [2, 3])
def test_segments_are_slices_of_their_episodes(dataset, episodes, candidates):
    queries = draw(dataset, candidates=candidates)
    table = SegmentTable.create(queries)
    segments = table.take(jnp.arange(len(table)))
    assert len(table) == 12
    np.testing.assert_array_equal(segments.observations, slices(queries, episodes, "observations"))
    np.testing.assert_array_equal(segments.actions, slices(queries, episodes, "actions"))


def test_segments_reach_the_last_step_of_the_last_episode(dataset, episodes):
    last = len(episodes) - 1
    start = len(episodes[last]) - LENGTH
    queries = Queries(dataset, np.array([[last, 0]]), np.array([[start, 0]]), LENGTH)
    segment = SegmentTable.create(queries).take(jnp.array(0))
    np.testing.assert_array_equal(segment.actions[0], episodes[last].actions[-LENGTH:])
    np.testing.assert_array_equal(segment.observations[0], episodes[last].observations[-LENGTH - 1 : -1].astype("f4"))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_indices_give_the_batch_axes(dataset, batch):
    indices = jnp.zeros(batch, int)
    pairs = PreferenceDataset.create(draw(dataset), pair_labels(np.zeros(12))).take(indices)
    assert pairs.labels.shape == batch
    assert pairs.segments.observations.shape == (*batch, 2, LENGTH, 5)
    assert pairs.segments.actions.shape == (*batch, 2, LENGTH, 2)
    assert TransitionDataset.create(dataset).take(indices).observations.shape == (*batch, 5)


def test_skipped_queries_are_left_out_and_the_others_keep_their_labels(dataset, episodes):
    values = np.array([0, np.nan, 1, 0.5, np.nan, 0.25, 1, 0, np.nan, 1, 0, 0.75])
    queries = draw(dataset)
    preferences = PreferenceDataset.create(queries, pair_labels(values))
    batch = preferences.take(jnp.arange(9))
    kept = ~np.isnan(values)
    np.testing.assert_array_equal(batch.labels, values[kept].astype("f4"))
    np.testing.assert_array_equal(batch.segments.actions, slices(queries, episodes, "actions")[kept])
    drawn = preferences.sample(jax.random.key(0), 500)
    assert set(np.unique(drawn.labels)) == {0, 0.25, 0.5, 0.75, 1}


def test_pairs_without_episodes_are_the_pairs_that_were_given():
    rng = np.random.default_rng(0)
    observations, actions = rng.normal(size=(6, 2, LENGTH, 3)), rng.uniform(-1, 1, (6, 2, LENGTH, 2))
    labels = np.array([0.0, 1.0, 0.5, 0.3, 1.0, 0.0])
    pairs = PreferenceDataset.from_preferences(Preferences(Segments(observations, actions), labels))
    batch = pairs.take(jnp.array([4, 0, 3]))
    np.testing.assert_array_equal(batch.segments.observations, observations[[4, 0, 3]].astype(np.float32))
    np.testing.assert_array_equal(batch.segments.actions, actions[[4, 0, 3]].astype(np.float32))
    np.testing.assert_array_equal(batch.labels, labels[[4, 0, 3]].astype(np.float32))
    assert pairs.sample(jax.random.key(0), 5).labels.shape == (5,)

    images = rng.integers(0, 256, (6, 2, LENGTH, 4, 4, 3), np.uint8)
    seen = PreferenceDataset.from_preferences(Preferences(Segments(images, actions), labels)).take(jnp.array([2]))
    assert seen.segments.observations.dtype == jnp.uint8
    np.testing.assert_array_equal(seen.segments.observations, images[[2]])


def test_pairs_of_another_shape_are_refused():
    observations, actions, labels = np.zeros((6, 2, LENGTH, 3)), np.zeros((6, 2, LENGTH, 2)), np.zeros(6)
    for shown, answers in ((actions[:, :1], labels), (actions[:, 0], labels), (actions, labels[:5])):
        with pytest.raises(ValueError, match="pairs to learn from need") as error:
            PreferenceDataset.from_preferences(Preferences(Segments(observations, shown), answers))
        assert one_sentence(error)


def test_rankings_come_best_first_without_the_skipped(dataset, episodes):
    queries = draw(dataset, candidates=3)
    rng = np.random.default_rng(1)
    orders = np.stack([rng.permutation(3) for _ in range(12)])
    answered = np.full(12, True)
    answered[[0, 7]], orders[[0, 7]] = False, -1
    labels = Labels(orders=orders, answered=answered, labeler="tester")
    rankings = RankingDataset.create(queries, labels).take(jnp.arange(10))
    for name in ("observations", "actions"):
        cut = slices(queries, episodes, name)
        expected = np.stack([cut[n][orders[n]] for n in np.flatnonzero(answered)])
        np.testing.assert_array_equal(getattr(rankings.segments, name), expected)
    assert RankingDataset.create(queries, labels).sample(jax.random.key(0), 6).segments.actions.shape == (6, 3, 4, 2)


def test_sampling_is_uniform_over_the_queries(dataset):
    values = np.arange(12) / 11
    preferences = PreferenceDataset.create(draw(dataset), pair_labels(values))
    drawn = np.asarray(preferences.sample(jax.random.key(0), 12_000).labels)
    counts = np.bincount(np.rint(drawn * 11).astype(int), minlength=12)
    # Binomial with mean 1000 and standard deviation 30.
    assert (np.abs(counts - 1000) < 5 * 30.3).all()
    again = preferences.sample(jax.random.key(0), 12_000).labels
    np.testing.assert_array_equal(again, drawn)
    assert not np.array_equal(preferences.sample(jax.random.key(1), 12_000).labels, drawn)


def all_transitions(chosen):
    return [(episode, step) for episode in chosen for step in range(len(episode))]


def test_transitions_are_the_steps_of_the_episodes_and_never_cross_an_end(dataset, episodes):
    transitions = TransitionDataset.create(dataset)
    expected = all_transitions(episodes)
    assert len(transitions.rows) == len(expected) == dataset.total_steps
    batch = transitions.take(jnp.arange(len(expected)))
    for name, rows in {
        "observations": [episode.observations[step] for episode, step in expected],
        "actions": [episode.actions[step] for episode, step in expected],
        "rewards": [episode.rewards[step] for episode, step in expected],
        "next_observations": [episode.observations[step + 1] for episode, step in expected],
    }.items():
        np.testing.assert_array_equal(getattr(batch, name), np.asarray(rows, np.float32), err_msg=name)
    # The task itself: a step moves the point as far as the action says.
    moved = np.asarray(batch.next_observations - batch.observations)
    np.testing.assert_allclose(moved[:, :2], 0.15 * np.asarray(batch.actions), atol=1e-6)
    np.testing.assert_allclose(moved[:, 2:], 0, atol=1e-7)


def test_only_the_last_step_of_a_terminated_episode_is_terminated(dataset, episodes):
    ends = [episode.terminated for episode in episodes]
    assert True in ends
    assert False in ends
    batch = TransitionDataset.create(dataset).take(jnp.arange(dataset.total_steps))
    expected = [episode.terminated and step == len(episode) - 1 for episode, step in all_transitions(episodes)]
    np.testing.assert_array_equal(batch.terminated, expected)


def test_transitions_of_chosen_episodes(dataset, episodes):
    transitions = TransitionDataset.create(dataset, [5, 1])
    wanted = all_transitions([episodes[5], episodes[1]])
    batch = transitions.take(jnp.arange(len(wanted)))
    np.testing.assert_array_equal(batch.actions, [episode.actions[step] for episode, step in wanted])
    drawn = transitions.sample(jax.random.key(0), 1000)
    seen = {tuple(row) for row in np.asarray(drawn.observations).tolist()}
    assert seen == {tuple(episode.observations[step].astype("f4").tolist()) for episode, step in wanted}


def test_no_episode_at_all_is_refused(dataset):
    with pytest.raises(ValueError, match=r"no episodes of .*point were chosen") as error:
        TransitionDataset.create(dataset, [])
    assert one_sentence(error)


@pytest.mark.parametrize("episode", [-1, 16, 1000])
def test_an_episode_that_does_not_exist_is_refused(dataset, episode):
    with pytest.raises(ValueError, match=rf"no episode {episode} .*16") as error:
        TransitionDataset.create(dataset, [0, episode])
    assert one_sentence(error)


@pytest.mark.parametrize("value", [1.5, -2.0, np.nan, np.inf])
def test_actions_that_no_agent_can_choose_are_refused(dataset, value):
    actions = dataset.actions.copy()
    actions[3, 1] = value
    wrong = dataclasses.replace(dataset, actions=actions)
    for create in (
        TransitionDataset.create,
        lambda dataset: SegmentTable.create(draw(dataset)),
        check_actions,
    ):
        with pytest.raises(ValueError, match=rf"point reach {abs(value):.4g}, but agents act in \[-1, 1\]") as error:
            create(wrong)
        assert one_sentence(error)


def test_actions_at_the_bounds_are_accepted(dataset):
    actions = dataset.actions.copy()
    actions[0] = [1, -1]
    check_actions(dataclasses.replace(dataset, actions=actions))


def test_labels_of_the_wrong_kind_or_number_are_refused(dataset):
    orders = Labels(orders=np.tile([1, 0], (12, 1)), answered=np.full(12, True), labeler="tester")
    with pytest.raises(ValueError, match=r"'tester' are orders.*RankingDataset"):
        PreferenceDataset.create(draw(dataset), orders)
    with pytest.raises(ValueError, match=r"'tester' are of pairs.*PreferenceDataset"):
        RankingDataset.create(draw(dataset), pair_labels(np.zeros(12)))
    with pytest.raises(ValueError, match="11 labels cannot answer 12 queries"):
        PreferenceDataset.create(draw(dataset), pair_labels(np.zeros(11)))


def test_labels_that_skip_everything_are_refused(dataset):
    with pytest.raises(ValueError, match="'tester' skipped all 12 queries") as error:
        PreferenceDataset.create(draw(dataset), pair_labels(np.full(12, np.nan)))
    assert "\n" not in str(error.value)
    queries = draw(dataset)
    assert len(answered_queries(queries, pair_labels([0, np.nan] * 6))) == 6


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 16), (0.5, 8), (0.25, 4), (0.01, 1)])
def test_the_best_episodes_are_those_of_the_highest_return(dataset, episodes, fraction, count):
    returns = [episode.rewards.sum() for episode in episodes]
    best = best_episodes(dataset, fraction)
    assert len(set(best.tolist())) == len(best) == count
    assert best.tolist() == sorted(best.tolist())
    others = set(range(16)) - set(best.tolist())
    assert not others or min(returns[i] for i in best) >= max(returns[i] for i in others)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, np.nan])
def test_a_fraction_that_is_none_is_refused(dataset, fraction):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        best_episodes(dataset, fraction)


def test_pairs_cost_two_rows_each_and_not_two_segments(dataset):
    few, many = (PreferenceDataset.create(draw(dataset, count), pair_labels(np.zeros(count))) for count in (10, 1010))
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(preferences)) for preferences in (few, many)]
    assert sizes[1] - sizes[0] == 1000 * (2 * 4 + 4)
