from __future__ import annotations

import itertools
from collections import Counter

import gymnasium
import numpy as np
import pytest

from robopref.episodes import load_episodes, write_episodes
from robopref.queries import (
    Labels,
    Queries,
    check_answers,
    draw_queries,
    draw_segments,
    label_statistics,
    pair_segments,
    split,
    split_indices,
    utc_now,
)
from robopref.types import Episode

LENGTHS = [6, 3, 10, 4]


def rng(seed=0):
    return np.random.default_rng(seed)


def make_episode(index, length):
    """Every number tells where it stands: observation 100 * episode + step, action its negative, state ten times it."""
    steps = 100.0 * index + np.arange(length + 1)
    return Episode(
        observations=steps[:, None],
        actions=-steps[:-1, None],
        rewards=steps[:-1] / 7,
        terminated=False,
        truncated=True,
        states=np.stack([10 * steps, steps], axis=1),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("queries") / "store"
    box = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    episodes = [make_episode(index, length) for index, length in enumerate(LENGTHS)]
    write_episodes(path, episodes, observation_space=box, action_space=box, env={})
    return load_episodes(path)


@pytest.fixture(scope="module")
def queries(dataset):
    return Queries(dataset, np.array([[0, 2], [1, 1], [3, 0]]), np.array([[3, 7], [0, 0], [1, 0]]), 3)


def labels(values=None, orders=None, **changes):
    if values is not None:
        values = np.array(values, float)
        answered = ~np.isnan(values)
    else:
        orders = np.array(orders)
        answered = (orders >= 0).all(axis=1)
    return Labels(**{"values": values, "orders": orders, "answered": answered, "labeler": "oracle", **changes})


def windows(length, episodes=range(4)):
    return [(episode, start) for episode in episodes for start in range(LENGTHS[episode] - length + 1)]


def test_gathers(queries):
    first = np.array([[3, 207], [100, 100], [301, 0]], float)
    steps = first[..., None] + np.arange(3)
    assert (len(queries), queries.candidates) == (3, 2)
    np.testing.assert_array_equal(queries.observations, steps[..., None])
    np.testing.assert_array_equal(queries.actions, -steps[..., None])
    np.testing.assert_array_equal(queries.rewards, steps / 7)
    np.testing.assert_allclose(queries.partial_returns, steps.sum(-1) / 7)
    np.testing.assert_array_equal(queries.last_observations, (first + 3)[..., None])
    np.testing.assert_array_equal(queries.first_states, np.stack([10 * first, first], -1))
    np.testing.assert_array_equal(queries.last_states, np.stack([10 * (first + 3), first + 3], -1))


def test_take(queries):
    assert queries.take(np.array([2, 0])).starts.tolist() == [[1, 0], [3, 7]]
    assert queries.take(np.array([False, True, False])).episodes.tolist() == [[1, 1]]
    assert len(queries.take(np.array([], int))) == 0


@pytest.mark.parametrize(
    ("episodes", "starts", "length", "message"),
    [
        (
            [[0, 0], [0, 4]],
            [[0, 0], [0, 0]],
            3,
            r"query 1 cannot be shown: there is no episode 4 among the 4 of .*store",
        ),
        ([[0, -1]], [[0, 0]], 3, "query 0 .* no episode -1"),
        (
            [[0, 0], [2, 0]],
            [[0, 3], [8, 0]],
            3,
            r"query 1 .* steps 8 to 11 do not lie within episode 2 .* has 10 steps",
        ),
        ([[0, 0]], [[0, -1]], 3, "query 0 .* steps -1 to 2"),
        ([[0, 1]], [[0, 0]], 4, "query 0 .* steps 0 to 4 do not lie within episode 1 .* has 3 steps"),
        ([[0]], [[0]], 3, "at least 2 candidates, not 1"),
        ([[0, 1]], [[0, 0, 0]], 3, r"episodes \[1, 2\] and starts \[1, 3\]"),
        ([0, 1], [0, 0], 3, r"must both be \[N, K\]"),
        ([[0, 1]], [[0.5, 0]], 3, "must be integers, not float64"),
        ([[0, 1]], [[0, 0]], 0, "at least 1 step, not 0"),
    ],
)
def test_queries_that_make_no_sense(dataset, episodes, starts, length, message):
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*\.$"):
        Queries(dataset, np.array(episodes), np.array(starts), length)


def test_windows_are_drawn_uniformly(dataset):
    """Chi-squared over all 15 windows of 3 steps; 36.1 is the 0.1% point at 14 degrees of freedom."""
    drawn = draw_queries(dataset, rng(), count=15_000, length=3)
    seen = Counter(zip(drawn.episodes.ravel().tolist(), drawn.starts.ravel().tolist(), strict=True))
    everything = windows(3)
    assert set(seen) == set(everything)
    assert len(everything) == 15
    expected = 30_000 / len(everything)
    assert sum((seen[window] - expected) ** 2 / expected for window in everything) < 36.1


def test_candidates_are_distinct_and_every_order_is_as_likely(dataset):
    """Three windows exist, so three candidates are one of 6 orders; 20.5 is the 0.1% point at 5 degrees of freedom."""
    drawn = draw_queries(dataset, rng(), count=6_000, length=8, candidates=3)
    seen = Counter(map(tuple, drawn.starts.tolist()))
    assert set(seen) == set(itertools.permutations(range(3)))
    assert sum((count - 1_000) ** 2 / 1_000 for count in seen.values()) < 20.5


def test_pairs_of_distinct_windows_are_uniform(dataset):
    """12 ordered pairs of the 4 windows of episode 0; 31.3 is the 0.1% point at 11 degrees of freedom."""
    drawn = draw_queries(dataset, rng(), count=12_000, length=3, episodes=np.array([0]))
    seen = Counter(map(tuple, drawn.starts.tolist()))
    assert set(seen) == set(itertools.permutations(range(4), 2))
    assert sum((count - 1_000) ** 2 / 1_000 for count in seen.values()) < 31.3


def test_drawing_depends_on_the_generator_alone(dataset):
    first, again, other = (draw_queries(dataset, rng(seed), count=20, length=2) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.starts, again.starts)
    np.testing.assert_array_equal(first.episodes, again.episodes)
    assert (first.starts != other.starts).any()


def test_drawing_from_some_episodes(dataset):
    drawn = draw_queries(dataset, rng(), count=200, length=3, episodes=np.array([3, 1, 3]))
    assert set(np.unique(drawn.episodes)) == {1, 3}
    assert set(zip(drawn.episodes.ravel(), drawn.starts.ravel(), strict=True)) == set(windows(3, [1, 3]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"length": 11},
            r"0 windows of 11 steps, too few for 2 candidates .* longest episode to draw from is 2 with 10 steps",
        ),
        ({"length": 10}, "1 windows of 10 steps"),
        ({"length": 4, "episodes": np.array([0, 1]), "candidates": 4}, r"3 windows of 4 steps.* is 0 with 6 steps"),
        ({"length": 0}, "at least 1 step"),
        ({"episodes": np.array([4])}, "there is no episode 4 among the 4"),
        ({"episodes": np.array([], int)}, "no episodes to draw from"),
        ({"candidates": 1}, "at least 2 candidates"),
        ({"count": 0}, "at least 1 of the queries"),
    ],
)
def test_queries_that_cannot_be_drawn(dataset, changes, message):
    with pytest.raises(ValueError, match=message):
        draw_queries(dataset, rng(), **{"count": 5, "length": 3, **changes})


def test_segments_are_distinct_windows(dataset):
    episodes, starts = draw_segments(dataset, rng(), count=15, length=3)
    drawn = list(zip(episodes.tolist(), starts.tolist(), strict=True))
    assert sorted(drawn) == windows(3)
    assert drawn != windows(3)
    with pytest.raises(ValueError, match="15 windows of 3 steps, too few for 16 distinct segments"):
        draw_segments(dataset, rng(), count=16, length=3)


def test_sparse_pairs_use_each_segment_once(dataset):
    episodes, starts = draw_segments(dataset, rng(), count=8, length=3)
    pairs = pair_segments(dataset, episodes, starts, length=3, pairing="sparse")
    assert len(pairs) == 4
    np.testing.assert_array_equal(pairs.episodes.ravel(), episodes)
    np.testing.assert_array_equal(pairs.starts.ravel(), starts)


def test_dense_pairs_are_all_pairs(dataset):
    episodes, starts = draw_segments(dataset, rng(), count=5, length=3)
    pairs = pair_segments(dataset, episodes, starts, length=3, pairing="dense")
    segments = list(zip(episodes.tolist(), starts.tolist(), strict=True))
    found = [
        tuple(zip(*pair, strict=True)) for pair in zip(pairs.episodes.tolist(), pairs.starts.tolist(), strict=True)
    ]
    assert found == list(itertools.combinations(segments, 2))


@pytest.mark.parametrize(
    ("count", "pairing", "message"),
    [(3, "sparse", "3 segments cannot"), (1, "dense", "at least 2 segments"), (2, "some", "'sparse' or 'dense'")],
)
def test_segments_that_cannot_be_paired(dataset, count, pairing, message):
    with pytest.raises(ValueError, match=message):
        pair_segments(dataset, np.zeros(count, int), np.arange(count), length=3, pairing=pairing)
    with pytest.raises(ValueError, match="must be of one length"):
        pair_segments(dataset, np.zeros(2, int), np.zeros(3, int), length=3, pairing="sparse")


@pytest.mark.parametrize("held_out", [0.01, 0.25, 0.5, 0.99])
def test_split_shares_no_episode(dataset, held_out):
    everything = draw_queries(dataset, rng(), count=300, length=2)
    train, test = split(everything, rng(3), held_out)
    in_train, in_test = set(np.unique(train.episodes)), set(np.unique(test.episodes))
    assert len(train) > 0
    assert len(test) > 0
    assert not in_train & in_test
    assert len(in_test) == {0.01: 1, 0.25: 1, 0.5: 2, 0.99: 3}[held_out]
    straddling = sum(bool(set(row) & in_test) and not set(row) <= in_test for row in everything.episodes.tolist())
    assert len(train) + len(test) + straddling == 300


def test_split_indices_take_labels_along(dataset):
    everything = draw_queries(dataset, rng(), count=50, length=2)
    train, test = split_indices(everything, rng(3), 0.5)
    np.testing.assert_array_equal(everything.take(train).starts, split(everything, rng(3), 0.5)[0].starts)
    answers = labels(np.arange(50) / 50)
    np.testing.assert_array_equal(answers.take(test).values, test / 50)


@pytest.mark.parametrize("held_out", [0, 1, -0.5, float("nan")])
def test_split_needs_a_share(queries, held_out):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split(queries, rng(), held_out)


def test_split_needs_two_episodes(queries):
    with pytest.raises(ValueError, match="a single episode"):
        split(queries.take(np.array([1])), rng(), 0.5)


def test_labels_are_kept_as_they_would_be_read_back():
    answers = labels([0, 0.5, np.nan], parameters={"range": (1, 2)}, created="2024-05-01T14:00:00+02:00")
    assert answers.parameters == {"range": [1, 2]}
    assert answers.created == "2024-05-01T12:00:00.000000+00:00"
    assert len(answers) == 3
    assert labels([1], created=utc_now()).created.endswith("+00:00")


def test_labels_can_be_taken():
    answers = labels(orders=[[0, 2, 1], [-1, -1, -1], [2, 1, 0]], parameters={"a": 1})
    taken = answers.take(np.array([2, 1]))
    assert taken.orders.tolist() == [[2, 1, 0], [-1, -1, -1]]
    assert taken.answered.tolist() == [True, False]
    assert (taken.values, taken.labeler, taken.parameters, taken.created) == (None, "oracle", {"a": 1}, answers.created)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.array([0.5, 1.1])}, r"label 1 is 1\.1, but an answer lies between 0 and 1"),
        ({"values": np.array([-0.1, 1])}, r"label 0 is -0\.1"),
        ({"values": np.array([0.1, np.nan])}, "label 1 is nan, but an answer"),
        (
            {"values": np.array([0.1, 0.5]), "answered": np.array([True, False])},
            r"label 1 is 0\.5, but a skipped query",
        ),
        ({"values": np.zeros(3)}, r"values \[3\] and answered \[2\]"),
        ({"values": None}, "exactly one of them"),
        ({"orders": np.array([[0, 1], [1, 0]])}, "exactly one of them"),
        ({"values": None, "orders": np.array([[0, 1], [1, 1]])}, r"label 1 is \[1, 1\], but an answer ranks"),
        ({"values": None, "orders": np.array([[0, 2], [1, 0]])}, r"label 0 is \[0, 2\]"),
        ({"values": None, "orders": np.array([[0, 1]] * 2), "answered": np.array([True, False])}, "label 1 .* has -1"),
        ({"values": None, "orders": np.array([[0.0, 1.0]] * 2)}, "orders must be integers"),
        ({"values": None, "orders": np.array([[0, 1]])}, "with N = 2"),
        ({"answered": np.array([1, 1])}, "answered must be booleans"),
        ({"labeler": ""}, "must name their labeler"),
        ({"parameters": {"call": object()}}, "parameters have no JSON form"),
        ({"parameters": {"temperature": float("inf")}}, "parameters have no JSON form"),
        ({"created": "yesterday"}, "ISO-8601, not 'yesterday'"),
        ({"created": "2024-05-01T14:00:00"}, "time zone"),
    ],
)
def test_labels_that_make_no_sense(changes, message):
    fields = {"values": np.array([0.0, 1.0]), "answered": np.array([True, True]), "labeler": "oracle"}
    with pytest.raises(ValueError, match=message):
        Labels(**{**fields, **changes})


def test_answers_must_fit_the_queries(dataset, queries):
    check_answers(queries, labels([0, 1, 1]))
    with pytest.raises(ValueError, match="2 labels cannot answer 3 queries"):
        check_answers(queries, labels([0, 1]))
    with pytest.raises(ValueError, match="orders of 3 candidates cannot answer queries of 2"):
        check_answers(queries, labels(orders=[[0, 1, 2]] * 3))
    triples = draw_queries(dataset, rng(), count=2, length=2, candidates=3)
    with pytest.raises(ValueError, match="values answer queries of 2 candidates, not 3"):
        check_answers(triples, labels([0, 1]))


def test_label_statistics_of_pairs(dataset):
    """Partial returns of single steps are step / 7: gaps 1/7, 2/7, -3/7, 0, 4/7, and one skipped."""
    starts = np.array([[0, 1], [1, 3], [3, 0], [2, 2], [0, 4], [0, 5]])
    asked = Queries(dataset, np.zeros((6, 2), int), starts, 1)
    found = label_statistics(asked, labels([1, 0.2, 0, 0.9, 0.5, np.nan]))
    assert found == pytest.approx(
        {
            "n": 6,
            "answered": 5 / 6,
            "ties": 1 / 5,
            "second": 2 / 4,
            "partial_return_gap": (1 + 2 + 3 + 0) / 7 / 4,
            "partial_return_agreement": 2 / 3,
        }
    )


def test_label_statistics_of_orders_count_implied_pairs(dataset):
    """Order 2 > 0 > 1 of steps 0, 3, 1: it agrees that step 1 beats step 0, and errs on the pairs with step 3."""
    asked = Queries(dataset, np.zeros((2, 3), int), np.array([[0, 3, 1], [0, 1, 2]]), 1)
    found = label_statistics(asked, labels(orders=[[2, 0, 1], [-1, -1, -1]]))
    assert found == pytest.approx(
        {
            "n": 2,
            "answered": 1 / 2,
            "ties": 0,
            "second": 2 / 3,
            "partial_return_gap": (3 + 1 + 2) / 7 / 3,
            "partial_return_agreement": 1 / 3,
        }
    )


def test_label_statistics_of_nothing_are_nan(queries):
    found = label_statistics(queries, labels([np.nan] * 3))
    assert (found["n"], found["answered"]) == (3, 0)
    assert all(np.isnan(found[name]) for name in found if name not in ("n", "answered"))
