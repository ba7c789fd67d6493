"""The simulated teacher against worked figures, and its imperfections against their own parameters."""

from __future__ import annotations

import itertools
import math
from datetime import datetime, timedelta
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest

from labelers.teachers import PRESETS, Teacher, benchmark_threshold, preset, relative_threshold
from robopref.episodes import EpisodeDataset
from robopref.queries import Labeler, Labels, Queries

FIRST, SECOND = [1.0, 0.0, 0.0], [0.0, 0.0, 0.9]


def make_queries(segments: np.ndarray, indices: np.ndarray, length: int | None = None) -> Queries:
    """Queries [N, K] into episodes whose rewards are the rows of `segments`."""
    rewards = np.asarray(segments, float)
    count, steps = rewards.shape
    box = gymnasium.spaces.Box(-1.0, 1.0, (1,))
    rows = count * (steps + 1)
    dataset = EpisodeDataset(
        path=Path("made-up"),
        hash="0" * 64,
        env={},
        description="",
        keys={"observation": 1},
        splits={},
        observation_space=box,
        action_space=box,
        observations=np.zeros((rows, 1)),
        actions=np.zeros((rows, 1)),
        rewards=np.concatenate([rewards, np.zeros((count, 1))], axis=1).ravel(),
        offsets=np.arange(count + 1) * (steps + 1),
        lengths=np.full(count, steps),
        terminated=np.full(count, False),
        truncated=np.full(count, True),
        successes=np.full(count, False),
        returns=rewards.sum(axis=1),
        seeds=np.arange(count),
        origins=({},) * count,
        state_size=0,
    )
    return Queries(dataset, np.asarray(indices), np.zeros_like(indices), length or steps)


def random_queries(count: int, candidates: int = 2, seed: int = 0) -> Queries:
    rng = np.random.default_rng(seed)
    segments = rng.normal(size=(40, 6))
    indices = np.stack([rng.choice(40, candidates, replace=False) for _ in range(count)])
    return make_queries(segments, indices)


def swapped(queries: Queries) -> Queries:
    return Queries(queries.dataset, queries.episodes[:, ::-1], queries.starts[:, ::-1], queries.length)


def one_label(teacher: Teacher, first: list[float], second: list[float]) -> Labels:
    return teacher.label(make_queries(np.array([first, second]), np.array([[0, 1]])), jax.random.key(0))


def margin(probability: float, count: int) -> float:
    """Five standard deviations of a share of `count` independent draws: exceeded once in some 10^6 trials."""
    return 5 * math.sqrt(probability * (1 - probability) / count)


@pytest.mark.parametrize(
    ("teacher", "probability"),
    [
        (Teacher(), 0.0),
        (Teacher(discount=0.9), 1.0),
        (Teacher(temperature=1.0), 0.475021),
        (Teacher(temperature=1.0, discount=0.9), 0.522485),
        (Teacher(mistake=0.1), 0.1),
        (Teacher(temperature=1.0, mistake=0.1), 0.480017),
        (Teacher(tie_threshold=0.2), 0.5),
        (Teacher(tie_threshold=0.2, mistake=0.1, discount=0.9), 0.5),
        (Teacher(skip_threshold=0.99), 0.0),
    ],
)
def test_published_probabilities(teacher: Teacher, probability: float):
    soft = Teacher(**{**teacher.parameters, "soft": True})
    np.testing.assert_allclose(one_label(soft, FIRST, SECOND).values, probability, atol=1e-6)


@pytest.mark.parametrize(("mistake", "published"), [(0.0, 0.731059), (0.1, 0.684847)])
def test_noise_acts_on_sums_unless_it_is_asked_to_act_on_means(mistake: float, published: float):
    first, second = [0.25] * 4, [0.5] * 4
    on_sum = one_label(Teacher(temperature=1.0, mistake=mistake, soft=True), first, second)
    expected = (1 - 2 * mistake) / (1 + math.exp(-1.0)) + mistake
    np.testing.assert_allclose(on_sum.values, expected, rtol=1e-12)
    np.testing.assert_allclose(on_sum.values, published, atol=1e-6)
    on_mean = one_label(Teacher(temperature=0.25, mistake=mistake, temperature_on="mean", soft=True), first, second)
    np.testing.assert_allclose(on_mean.values, expected, rtol=1e-12)


def test_a_myopic_mean_weighs_the_latest_steps_most_and_is_a_mean():
    rewards, discount, temperature = np.array([[1.0, 2.0, 4.0], [3.0, 3.0, 0.5]]), 0.5, 2.0
    means = rewards @ np.array([0.25, 0.5, 1.0]) / 1.75
    teacher = Teacher(temperature=temperature, discount=discount, temperature_on="mean", soft=True)
    expected = 1 / (1 + math.exp(-(means[1] - means[0]) / temperature))
    np.testing.assert_allclose(one_label(teacher, *rewards.tolist()).values, expected, rtol=1e-12)


@pytest.mark.parametrize(("threshold", "answered"), [(1.0, False), (0.99, True), (None, True)])
def test_skips_where_nothing_exceeds_the_threshold(threshold: float | None, answered: bool):
    labels = one_label(Teacher(skip_threshold=threshold), FIRST, SECOND)
    assert labels.answered.tolist() == [answered]
    assert np.isnan(labels.values).tolist() == [not answered]


def test_ties_are_called_on_undiscounted_returns():
    teacher = Teacher(tie_threshold=0.2, discount=0.5)
    labels = one_label(teacher, [1.0, 0.0, 0.0], [0.0, 0.0, 1.0])
    assert labels.values.tolist() == [0.5]
    assert one_label(teacher, [1.0, 0.0, 0.0], [0.0, 0.0, 1.25]).values.tolist() == [1.0]


def test_a_noiseless_teacher_takes_no_side_between_equals():
    assert one_label(Teacher(), [1.0, 0.0], [0.0, 1.0]).values.tolist() == [0.5]


def test_the_threshold_is_a_fraction_of_what_an_average_segment_earns():
    assert relative_threshold(0.1, 2000.0, 50, 500) == pytest.approx(20.0)
    with pytest.raises(ValueError, match="positive"):
        relative_threshold(0.1, -3.0, 50, 500)


def test_the_benchmark_takes_a_tenth_of_an_average_segment_of_the_dataset():
    # Two episodes of four steps earn 8 and 12: 2.5 a step, so 5 in a segment of two steps.
    queries = make_queries([[1.0, 2.0, 2.0, 3.0], [0.0, 0.0, 6.0, 6.0]], np.array([[0, 1]]), length=2)
    assert benchmark_threshold(queries) == pytest.approx(0.5)


def test_an_oracle_never_errs():
    queries = random_queries(500)
    returns = queries.rewards.sum(axis=-1)
    labels = preset("oracle").label(queries, jax.random.key(1))
    assert labels.answered.all()
    np.testing.assert_array_equal(labels.values, (returns[:, 1] > returns[:, 0]).astype(float))


def test_returns_are_compared_in_double_precision():
    labels = one_label(Teacher(), [1e4, 0.0], [1e4, 1e-6])
    assert labels.values.tolist() == [1.0]


def test_mistakes_happen_as_often_as_they_should():
    queries = random_queries(4000)
    right = preset("oracle").label(queries, jax.random.key(2)).values
    wrong = preset("mistake").label(queries, jax.random.key(2)).values != right
    assert abs(wrong.mean() - 0.1) < margin(0.1, len(queries))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_noise_happens_as_often_as_it_should(temperature: float):
    gap, count = 1.0, 4000
    queries = make_queries(np.array([[0.0, 0.0], [gap, 0.0]]), np.tile([[0, 1]], (count, 1)))
    values = Teacher(temperature=temperature).label(queries, jax.random.key(3)).values
    probability = 1 / (1 + math.exp(-gap / temperature))
    assert set(values) == {0.0, 1.0}
    assert abs(values.mean() - probability) < margin(probability, count)


@pytest.mark.parametrize(
    "teacher",
    [
        Teacher(),
        Teacher(discount=0.7, mistake=0.2),
        Teacher(tie_threshold=0.5),
        Teacher(skip_threshold=0.3),
        Teacher(temperature=0.8, mistake=0.2, soft=True),
    ],
)
def test_swapping_the_segments_turns_the_label_round(teacher: Teacher):
    queries = random_queries(200)
    there = teacher.label(queries, jax.random.key(4))
    back = teacher.label(swapped(queries), jax.random.key(4))
    np.testing.assert_array_equal(there.answered, back.answered)
    np.testing.assert_allclose(there.values + back.values, np.where(there.answered, 1.0, np.nan), atol=1e-12)


def test_the_key_decides_the_draw():
    queries, teacher = random_queries(100), Teacher(temperature=5.0)
    first, again, other = (teacher.label(queries, jax.random.key(seed)).values for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_no_queries_have_no_labels():
    assert len(Teacher().label(random_queries(1).take(np.arange(0)), jax.random.key(0))) == 0


def test_presets_have_one_imperfection_each():
    oracle = Teacher().parameters
    different = {}
    for name in PRESETS:
        teacher = preset(name, threshold=3.0)
        assert teacher.name == name
        different[name] = {key: value for key, value in teacher.parameters.items() if value != oracle[key]}
    assert different == {
        "oracle": {},
        "mistake": {"mistake": 0.1},
        "noisy": {"temperature": 1.0},
        "skip": {"skip_threshold": 3.0},
        "equal": {"tie_threshold": 3.0},
        "myopic": {"discount": 0.9},
    }
    with pytest.raises(ValueError, match="needs a threshold"):
        preset("skip")
    with pytest.raises(ValueError, match="choose one of oracle"):
        preset("angry")


def test_orders_are_best_first_and_skipped_together():
    queries = random_queries(50, candidates=4)
    returns = queries.rewards.sum(axis=-1)
    labels = Teacher(skip_threshold=1.0).label(queries, jax.random.key(5))
    answered = returns.max(axis=1) > 1.0
    assert 0 < answered.sum() < len(answered)
    np.testing.assert_array_equal(labels.answered, answered)
    np.testing.assert_array_equal(labels.orders, np.where(answered[:, None], np.argsort(-returns, axis=1), -1))
    assert labels.values is None


def test_noisy_orders_follow_plackett_luce():
    scores, temperature, count = np.array([0.0, 1.0, 0.4]), 0.7, 5000
    queries = make_queries(scores[:, None], np.tile([[0, 1, 2]], (count, 1)))
    orders = Teacher(temperature=temperature).label(queries, jax.random.key(6)).orders
    strengths = np.exp(scores / temperature)
    for order in itertools.permutations(range(3)):
        probability = math.prod(strengths[order[k]] / strengths[list(order[k:])].sum() for k in range(3))
        share = (orders == order).all(axis=1).mean()
        assert abs(share - probability) < margin(probability, count)


@pytest.mark.parametrize("teacher", [Teacher(mistake=0.1), Teacher(tie_threshold=0.1), Teacher(soft=True)])
def test_what_an_order_cannot_express_is_refused(teacher: Teacher):
    with pytest.raises(ValueError, match="draw pairs"):
        teacher.label(random_queries(2, candidates=3), jax.random.key(0))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"discount": 1.5}, {"mistake": 2.0}, {"tie_threshold": -1.0}, {"temperature_on": "max"}],
)
def test_parameters_out_of_range_are_named(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_on")[0]):
        Teacher(**wrong)


def test_labels_say_who_gave_them_and_when():
    teacher: Labeler = preset("noisy")
    labels = teacher.label(random_queries(3), jax.random.key(0))
    assert labels.labeler == "noisy"
    assert labels.parameters == teacher.parameters
    assert datetime.fromisoformat(labels.created).utcoffset() == timedelta(0)
