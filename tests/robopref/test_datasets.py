"""What is gathered on the device, against slices of the episodes that the dataset was written from."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robopref.datasets import (
    EndlessPreferences,
    PreferenceDataset,
    RankingDataset,
    SegmentTable,
    TransitionDataset,
    WindowDataset,
    WindowPreferenceDataset,
    answered_queries,
    best_episodes,
    check_actions,
    sums_ahead,
)
from robopref.queries import Labels, Queries, draw_queries
from robopref.types import Preferences, Segments, Windows

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
        lambda dataset: WindowDataset.create(dataset, LENGTH),
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


# Windows


def expected_windows(episodes, places, length, rewards=None) -> dict[str, np.ndarray]:
    """The windows that begin at these places, (episode, step), filled in step by step from behind."""
    count = len(places)
    held = {
        "observations": np.zeros((count, length, 5), np.float32),
        "actions": np.zeros((count, length, 2), np.float32),
        "returns_to_go": np.zeros((count, length)),
        "steps": np.zeros((count, length), int),
        "mask": np.zeros((count, length), bool),
    }
    for row, (index, start) in enumerate(places):
        episode = episodes[index]
        earned = episode.rewards if rewards is None else rewards[index]
        last = min(start + length, len(episode)) - 1
        for back, step in enumerate(range(last, start - 1, -1)):
            place = length - 1 - back
            held["observations"][row, place] = episode.observations[step]
            held["actions"][row, place] = episode.actions[step]
            held["returns_to_go"][row, place] = sum(earned[step:])
            held["steps"][row, place] = step
            held["mask"][row, place] = True
    return held


def assert_windows(windows: Windows, expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        np.testing.assert_allclose(getattr(windows, name), array, rtol=1e-5, atol=1e-5, err_msg=name)


def places_of(chosen, episodes) -> list[tuple[int, int]]:
    return [(index, step) for index in chosen for step in range(len(episodes[index]))]


@pytest.mark.parametrize("length", [1, 4, 100])
def test_windows_begin_at_every_step_and_end_with_their_episode(dataset, episodes, length):
    windows = WindowDataset.create(dataset, length)
    places = places_of(range(len(episodes)), episodes)
    assert len(windows.rows) == len(places)
    taken = windows.take(jnp.arange(len(places)))
    assert_windows(taken, expected_windows(episodes, places, length))
    # The last place is always a step: padding is in front alone.
    assert np.asarray(taken.mask)[:, -1].all()
    assert (np.diff(np.asarray(taken.mask).astype(int), axis=1) >= 0).all()


def test_windows_of_chosen_episodes_and_of_other_rewards(dataset, episodes):
    rng = np.random.default_rng(4)
    other = [rng.normal(size=len(episode)) for episode in episodes]
    rows = np.concatenate([np.append(each, 0.0) for each in other])
    windows = WindowDataset.create(dataset, LENGTH, episodes=[7, 2, 7], rewards=rows)
    places = places_of([2, 7], episodes)
    taken = windows.take(jnp.arange(len(places)))
    assert_windows(taken, expected_windows(episodes, places, LENGTH, other))
    drawn = windows.sample(jax.random.key(0), 2000)
    seen = {tuple(row) for row in np.asarray(drawn.observations[:, -1]).tolist()}
    assert seen == {tuple(row) for row in np.asarray(taken.observations[:, -1]).tolist()}


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_windows_have_the_batch_axes_of_their_indices(dataset, batch):
    windows = WindowDataset.create(dataset, LENGTH).take(jnp.zeros(batch, int))
    assert windows.observations.shape == (*batch, LENGTH, 5)
    assert windows.actions.shape == (*batch, LENGTH, 2)
    assert windows.returns_to_go.shape == windows.steps.shape == windows.mask.shape == (*batch, LENGTH)


def test_windows_that_cannot_be_are_refused(dataset):
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        WindowDataset.create(dataset, 0)
    for episodes in ([], [0, 16], [-1]):
        with pytest.raises(ValueError, match="has episodes 0 to 15; choose at least one"):
            WindowDataset.create(dataset, LENGTH, episodes=episodes)
    with pytest.raises(ValueError, match=r"rewards where .* has \(\d+,\) rows"):
        WindowDataset.create(dataset, LENGTH, rewards=np.zeros(3))


@pytest.mark.parametrize("horizon", [None, 1, 3, 1000])
def test_sums_ahead_are_of_the_next_steps_of_the_same_episode(dataset, episodes, horizon):
    expected = []
    for episode in episodes:
        for step in range(len(episode)):
            expected.append(sum(episode.rewards[step : None if horizon is None else step + horizon]))
        expected.append(0.0)
    np.testing.assert_allclose(sums_ahead(dataset, horizon), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sums_ahead(dataset, horizon, 2 * dataset.rewards), 2 * np.array(expected), atol=1e-9)


@pytest.mark.parametrize("with_unlabelled", [True, False])
@pytest.mark.parametrize("length", [LENGTH, 2])
def test_pairs_of_windows_are_the_first_steps_of_what_was_labelled(dataset, episodes, length, with_unlabelled):
    values = np.where(np.arange(12) % 4 == 1, np.nan, np.arange(12) / 11)
    queries = draw(dataset)
    windows = WindowDataset.create(dataset, length, episodes=[3])
    data = WindowPreferenceDataset.create(windows, queries, pair_labels(values), with_unlabelled=with_unlabelled)
    kept = ~np.isnan(values)
    pairs = data.take(jnp.arange(kept.sum()))
    np.testing.assert_array_equal(pairs.labels, values[kept].astype("f4"))
    for side in range(2):
        places = list(zip(queries.episodes[kept, side], queries.starts[kept, side], strict=True))
        one = jax.tree.map(lambda leaf, side=side: leaf[:, side], pairs.windows)
        assert_windows(one, expected_windows(episodes, places, length))
    assert pairs.unlabelled is None

    batch = data.sample(jax.random.key(0), 200)
    assert batch.labels.shape == (200,)
    by_label = {float(label): row for row, label in enumerate(np.asarray(pairs.labels))}
    rows = [by_label[float(label)] for label in np.asarray(batch.labels)]
    np.testing.assert_array_equal(batch.windows.actions, np.asarray(pairs.windows.actions)[rows])
    assert set(rows) == set(range(int(kept.sum())))
    if not with_unlabelled:
        assert batch.unlabelled is None
        return
    assert batch.unlabelled.mask.shape == (400, length)
    # Of the windows that there are: those of episode 3, beginning at any of its steps.
    first = np.asarray(batch.unlabelled.mask).argmax(axis=1)
    starts = np.asarray(batch.unlabelled.steps)[np.arange(400), first]
    assert set(starts) == set(range(len(episodes[3])))
    assert_windows(batch.unlabelled, expected_windows(episodes, [(3, start) for start in starts], length))


def test_pairs_of_windows_need_labels_of_pairs_in_the_windows_dataset(dataset):
    windows = WindowDataset.create(dataset, LENGTH)
    orders = Labels(orders=np.tile([1, 0], (12, 1)), answered=np.full(12, True), labeler="tester")
    with pytest.raises(ValueError, match="'tester' are orders of K segments"):
        WindowPreferenceDataset.create(windows, draw(dataset), orders)
    other = windows.replace(left=windows.left[:-1])
    with pytest.raises(ValueError, match=r"not of .*point, which the labels are about"):
        WindowPreferenceDataset.create(other, draw(dataset), pair_labels(np.zeros(12)))
    with pytest.raises(ValueError, match=r"not of .*point"):
        EndlessPreferences.create(other, dataset, 3)


@pytest.mark.parametrize("horizon", [1, 3, 1000])
def test_endless_labels_say_which_window_is_followed_by_more(dataset, episodes, horizon):
    chosen = [1, 4, 9]
    data = EndlessPreferences.create(WindowDataset.create(dataset, LENGTH, episodes=chosen), dataset, horizon)
    batch = data.sample(jax.random.key(0), 300)
    places = {tuple(episodes[i].observations[t].astype("f4")): (i, t) for i, t in places_of(chosen, episodes)}
    first = np.asarray(batch.windows.mask).argmax(axis=2)
    seen = np.take_along_axis(np.asarray(batch.windows.observations), first[..., None, None], axis=2)[:, :, 0]
    begins = [[places[tuple(one)] for one in pair] for pair in seen]
    sums = np.array([[sum(episodes[i].rewards[t : t + horizon]) for i, t in pair] for pair in begins])
    expected = np.where(sums[:, 0] == sums[:, 1], 0.5, sums[:, 1] > sums[:, 0])
    np.testing.assert_array_equal(batch.labels, expected)
    assert {0.0, 0.5, 1.0} == set(np.asarray(batch.labels).tolist())
    for side in range(2):
        one = jax.tree.map(lambda leaf, side=side: leaf[:, side], batch.windows)
        assert_windows(one, expected_windows(episodes, [pair[side] for pair in begins], LENGTH))
    assert batch.unlabelled is None
