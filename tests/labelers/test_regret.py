"""Regret teachers on a corridor whose optimal values are known in closed form."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import pytest

import envs
from envs.behaviours import Expert, Offset
from labelers import regret
from labelers.regret import (
    LogisticTeacher,
    MeasuredRegretTeacher,
    RegretTeacher,
    SimulatedRegretTeacher,
    segment_statistics,
)
from robopref.episodes import EpisodeDataset, load_episodes, write_episodes
from robopref.queries import Labeler, Queries
from robopref.rollouts import RolloutWorkers
from robopref.types import Episode

GOAL = 5
DISCOUNT = 0.9
LENGTH = 3


class Corridor:
    """Cells 0 to GOAL; a positive action moves right, another left; every move costs 1, and the goal ends or absorbs.

    With `absorbing` the goal costs nothing and never ends; otherwise it is terminal, and going on from it is worth 100,
    which nobody should ever see. `limit` is a time limit that is only reported; beyond `breaks_after` steps from a
    reset or `set_state` the simulator raises.
    """

    def __init__(self, *, absorbing: bool = True, limit: int = 2, breaks_after: int = 10**6) -> None:
        self._absorbing, self._limit, self._breaks_after = absorbing, limit, breaks_after
        self._cell, self._steps = 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self._cell, self._steps = int(np.random.default_rng(seed).integers(GOAL)), 0
        return self._observation(), {}

    def step(self, action: np.ndarray):
        if self._steps >= self._breaks_after:
            raise RuntimeError("the episode is over; call reset")
        self._steps += 1
        if self._cell == GOAL:
            return self._observation(), 0.0 if self._absorbing else 100.0, False, self._steps >= self._limit, {}
        self._cell = self._cell + 1 if action[0] > 0 else max(self._cell - 1, 0)
        terminated = self._cell == GOAL and not self._absorbing
        return self._observation(), -1.0, terminated, self._steps >= self._limit, {}

    def get_state(self) -> np.ndarray:
        return np.array([self._cell], float)

    def set_state(self, state: np.ndarray) -> np.ndarray:
        self._cell, self._steps = int(state[0]), 0
        return self._observation()

    def _observation(self) -> np.ndarray:
        return np.array([self._cell / GOAL])


class Rightwards:
    """The optimal policy: always to the right."""

    def start(self, seeds: np.ndarray) -> None:
        return None

    def step(self, carry: Any, observations: np.ndarray) -> tuple[np.ndarray, Any]:
        return np.ones((len(observations), 1)), carry

    def describe(self, seed: int) -> Mapping[str, str | float]:
        return {"behaviour": "rightwards"}


class Drunk(Rightwards):
    """Goes right with probability 0.7; what it does in an episode comes from the episode's seed alone."""

    def start(self, seeds: np.ndarray) -> Any:
        return [np.random.default_rng(seed) for seed in seeds]

    def step(self, carry: Any, observations: np.ndarray) -> tuple[np.ndarray, Any]:
        return np.array([[1.0 if rng.random() < 0.7 else -1.0] for rng in carry]), carry


def value(cell: np.ndarray, discount: float = DISCOUNT) -> np.ndarray:
    """V*: every move to the goal costs 1, so -(1 + discount + ... ) over the moves that are left."""
    return -(1 - discount ** (GOAL - np.asarray(cell))) / (1 - discount)


def q_value(cell: np.ndarray, action: np.ndarray) -> np.ndarray:
    cell = np.asarray(cell)
    after = np.where(action > 0, cell + 1, np.maximum(cell - 1, 0))
    return np.where(cell == GOAL, 0.0, -1.0 + DISCOUNT * value(np.minimum(after, GOAL)))


def cells(observations: np.ndarray) -> np.ndarray:
    return np.rint(np.asarray(observations)[..., 0] * GOAL).astype(int)


def values_of(observations: np.ndarray) -> np.ndarray:
    return value(cells(observations))


def q_values_of(observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    return q_value(cells(observations), actions[..., 0])


def walk(seed: int, *, absorbing: bool, steps: int = 8) -> Episode:
    rng, env = np.random.default_rng(seed), Corridor(absorbing=absorbing)
    observations, states = [env.reset(seed=seed)[0]], [env.get_state()]
    actions, rewards, terminated = [], [], False
    while len(actions) < steps and not terminated:
        actions.append(np.array([1.0 if rng.random() < 0.6 else -1.0]))
        observation, reward, terminated, _, _ = env.step(actions[-1])
        observations.append(observation)
        states.append(env.get_state())
        rewards.append(reward)
    return Episode(
        observations=np.stack(observations),
        actions=np.stack(actions),
        rewards=np.array(rewards),
        terminated=terminated,
        truncated=not terminated,
        states=np.stack(states),
        seed=seed,
    )


def make_dataset(path: Path, *, absorbing: bool) -> EpisodeDataset:
    episodes = [walk(seed, absorbing=absorbing) for seed in range(30)]
    write_episodes(
        path,
        [episode for episode in episodes if len(episode) >= LENGTH],
        observation_space=gymnasium.spaces.Box(0.0, 1.0, (1,), np.float64),
        action_space=gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float64),
        env={"name": "corridor"},
    )
    return load_episodes(path)


@pytest.fixture(scope="module")
def absorbing(tmp_path_factory: pytest.TempPathFactory) -> EpisodeDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "absorbing", absorbing=True)


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> EpisodeDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "terminal", absorbing=False)


def all_segments(dataset: EpisodeDataset, candidates: int = 2) -> Queries:
    """Queries over every window of the dataset; the first windows fill up the last query."""
    windows = [(i, start) for i in range(len(dataset)) for start in range(int(dataset.lengths[i]) - LENGTH + 1)]
    windows += windows[: -len(windows) % candidates]
    episodes, starts = np.array(windows).reshape(-1, candidates, 2).transpose(2, 0, 1)
    return Queries(dataset, episodes, starts, LENGTH)


def closed_form(queries: Queries) -> np.ndarray:
    """-sum_t discount^t A*(s_t, a_t) of every segment, from the closed forms of V* and Q*."""
    here = cells(queries.observations)
    lost = value(here) - q_value(here, queries.actions[..., 0])
    return lost @ DISCOUNT ** np.arange(LENGTH)


def simulated(**changes: Any) -> SimulatedRegretTeacher:
    arguments = {"make_env": Corridor, "expert": Rightwards(), "expert_horizon": GOAL, "discount": DISCOUNT}
    return SimulatedRegretTeacher(**{**arguments, **changes})


def test_the_corridor_and_its_values_agree(absorbing: EpisodeDataset):
    np.testing.assert_allclose(value(np.arange(GOAL + 1))[-4:], [-2.71, -1.9, -1.0, 0.0])
    states = np.arange(GOAL + 1)
    best = np.maximum(q_value(states, np.array(1.0)), q_value(states, np.array(-1.0)))
    np.testing.assert_allclose(best, value(states), atol=1e-12)
    assert np.ptp(closed_form(all_segments(absorbing))) > 1


@pytest.mark.parametrize("kind", ["deterministic", "full"])
def test_regret_under_given_values_is_the_closed_form(absorbing: EpisodeDataset, kind: Any):
    queries = all_segments(absorbing)
    teacher = RegretTeacher(values_of, DISCOUNT, kind=kind, q_values=q_values_of)
    np.testing.assert_allclose(teacher.segment_regrets(queries), closed_form(queries), atol=1e-12)


def test_a_terminal_state_is_worth_nothing_whatever_the_values_say(terminal: EpisodeDataset):
    queries = all_segments(terminal)
    assert terminal.terminated.any()
    assert not terminal.terminated.all()

    def wrong_at_the_goal(observations: np.ndarray) -> np.ndarray:
        return np.where(cells(observations) == GOAL, -100.0, values_of(observations))

    regrets = RegretTeacher(wrong_at_the_goal, DISCOUNT).segment_regrets(queries)
    np.testing.assert_allclose(regrets, closed_form(queries), atol=1e-12)


def test_the_released_formula_is_not_a_regret_of_discounted_values(absorbing: EpisodeDataset):
    queries = all_segments(absorbing)
    here, rewards = cells(queries.observations), queries.rewards
    score = rewards[..., :-1].sum(-1) + value(here[..., -1]) - value(here[..., 0])
    ours = RegretTeacher(values_of, DISCOUNT, kind="cpl_release").segment_regrets(queries)
    np.testing.assert_allclose(ours, -score, atol=1e-12)

    advantages = q_value(here, queries.actions[..., 0]) - value(here)
    excess = (1 - DISCOUNT) * value(here[..., 1:]).sum(-1)
    np.testing.assert_allclose(score, advantages[..., :-1].sum(-1) + excess, atol=1e-12)

    optimal = closed_form(queries) < 1e-12
    assert np.ptp(score[optimal]) > 0.1


def test_labels_prefer_the_smaller_regret(absorbing: EpisodeDataset):
    queries, key = all_segments(absorbing), jax.random.key(0)
    gap = np.subtract(*closed_form(queries).T)
    noiseless = RegretTeacher(values_of, DISCOUNT, tie_threshold=1e-9).label(queries, key)
    np.testing.assert_array_equal(noiseless.values, np.where(np.abs(gap) < 1e-9, 0.5, gap > 0))
    assert {0.0, 0.5, 1.0} == set(noiseless.values)
    soft = RegretTeacher(values_of, DISCOUNT, temperature=2.0, soft=True).label(queries, key)
    np.testing.assert_allclose(soft.values, 1 / (1 + np.exp(-gap / 2.0)), rtol=1e-9)


def test_noisy_labels_come_up_with_the_soft_ones_probability(absorbing: EpisodeDataset):
    queries = all_segments(absorbing)
    pair = int(np.argmax(np.abs(np.subtract(*closed_form(queries).T))))
    repeated = queries.take(np.full(3000, pair))
    probability = (
        RegretTeacher(values_of, DISCOUNT, temperature=2.0, soft=True).label(repeated, jax.random.key(1)).values[0]
    )
    drawn = RegretTeacher(values_of, DISCOUNT, temperature=2.0).label(repeated, jax.random.key(1)).values
    assert set(drawn) == {0.0, 1.0}
    assert abs(drawn.mean() - probability) < 5 * math.sqrt(probability * (1 - probability) / 3000)


def test_orders_begin_with_the_smallest_regret(absorbing: EpisodeDataset):
    queries = all_segments(absorbing, candidates=3)
    regrets = closed_form(queries).round(9)
    labels = RegretTeacher(lambda o: values_of(o).round(12), DISCOUNT).label(queries, jax.random.key(0))
    assert labels.values is None
    assert (np.diff(np.take_along_axis(regrets, labels.orders, axis=1), axis=1) >= 0).all()
    with pytest.raises(ValueError, match="never soft"):
        RegretTeacher(values_of, DISCOUNT, soft=True).label(queries, jax.random.key(0))


def test_value_functions_are_asked_once_for_a_row_and_a_limited_number_at_a_time(
    absorbing: EpisodeDataset, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(regret, "_ROWS_AT_ONCE", 16)
    sizes = []

    def counting(observations: np.ndarray) -> np.ndarray:
        sizes.append(len(observations))
        return values_of(observations)

    queries = all_segments(absorbing)
    regrets = RegretTeacher(counting, DISCOUNT).segment_regrets(queries)
    np.testing.assert_allclose(regrets, closed_form(queries), atol=1e-12)
    assert max(sizes) == 16
    assert sum(sizes) <= len(absorbing.observations)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda o: np.zeros((len(o), 1)), "one number per observation"),
        (lambda o: np.full(len(o), np.nan), "not finite"),
    ],
)
def test_value_functions_that_give_no_usable_numbers_are_refused(absorbing: EpisodeDataset, values: Any, message: str):
    with pytest.raises(ValueError, match=message):
        RegretTeacher(values, DISCOUNT).segment_regrets(all_segments(absorbing))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "rough"}, "no regret 'rough'"),
        ({"kind": "full"}, "q_values"),
        ({"discount": 1.1}, "discount"),
        ({"temperature": -1.0}, "temperature"),
        ({"tie_threshold": -1.0}, "tie_threshold"),
    ],
)
def test_regret_teachers_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RegretTeacher(**{"values": values_of, "discount": DISCOUNT, **wrong})


@pytest.mark.parametrize("given", ["a function", "rows"])
def test_segment_statistics_are_what_was_earned_and_what_the_ends_are_worth(terminal: EpisodeDataset, given: str):
    queries = all_segments(terminal)
    last = cells(queries.last_observations)
    earned = queries.rewards @ DISCOUNT ** np.arange(LENGTH)
    ended = np.where(last == GOAL, 0.0, DISCOUNT**LENGTH * value(last))
    expected = np.stack([earned, value(cells(queries.observations)[..., 0]), ended], axis=-1)

    def wrong_at_the_goal(observations: np.ndarray) -> np.ndarray:
        return np.where(cells(observations) == GOAL, -100.0, values_of(observations))

    values = wrong_at_the_goal if given == "a function" else wrong_at_the_goal(terminal.observations)
    found = segment_statistics(queries, values, DISCOUNT)
    assert (last == GOAL).any()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    # The default weights make the score minus the regret.
    scores = LogisticTeacher(values, DISCOUNT).segment_scores(queries)
    np.testing.assert_allclose(scores, -closed_form(queries), atol=1e-12)


def test_the_logistic_teacher_answers_with_its_probability(absorbing: EpisodeDataset):
    queries, weights, temperature, lapse = all_segments(absorbing), np.array([0.8, -0.2, 0.5]), 0.7, 0.2
    score = segment_statistics(queries, values_of, DISCOUNT) @ weights
    attentive = 1 / (1 + np.exp(-(score[:, 1] - score[:, 0]) / temperature))
    probability = (1 - lapse) * attentive + lapse / 2
    teacher = functools.partial(LogisticTeacher, values_of, DISCOUNT, *weights, temperature=temperature, lapse=lapse)
    soft = teacher(soft=True).label(queries, jax.random.key(0))
    np.testing.assert_allclose(soft.values, probability, rtol=1e-9)

    pair = int(np.argmax(probability))
    drawn = teacher().label(queries.take(np.full(3000, pair)), jax.random.key(1)).values
    assert set(drawn) == {0.0, 1.0}
    assert probability[pair] > 0.6
    assert abs(drawn.mean() - probability[pair]) < 5 * math.sqrt(probability[pair] * (1 - probability[pair]) / 3000)


def test_a_logistic_teacher_without_noise_errs_in_half_of_its_lapses(absorbing: EpisodeDataset):
    queries, lapse = all_segments(absorbing), 0.3
    gap = np.subtract(*closed_form(queries).T)
    pair = int(np.argmax(gap))
    teacher = LogisticTeacher(lambda o: values_of(o).round(12), DISCOUNT, temperature=0.0, lapse=lapse)
    drawn = teacher.label(queries.take(np.full(3000, pair)), jax.random.key(2)).values
    assert abs(drawn.mean() - (1 - lapse / 2)) < 5 * math.sqrt(lapse / 2 * (1 - lapse / 2) / 3000)


def test_logistic_orders_are_those_of_plackett_luce_and_know_no_lapses(absorbing: EpisodeDataset):
    queries = all_segments(absorbing, candidates=3)
    strengths = np.exp(-closed_form(queries))
    place = int(np.argmax(strengths[:, 0] / strengths.sum(axis=1)))
    first = LogisticTeacher(values_of, DISCOUNT).label(queries.take(np.full(3000, place)), jax.random.key(3)).orders
    probability = strengths[place, 0] / strengths[place].sum()
    assert probability > 0.5
    share = (first[:, 0] == 0).mean()
    assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / 3000)
    for wrong in ({"lapse": 0.1}, {"soft": True}):
        with pytest.raises(ValueError, match="no lapses or soft labels"):
            LogisticTeacher(values_of, DISCOUNT, **wrong).label(queries, jax.random.key(0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"discount": 1.1}, "discount"),
        ({"temperature": -1.0}, "temperature"),
        ({"lapse": 1.1}, "lapse"),
        ({"start_value_weight": math.inf}, "start_value_weight must be finite"),
    ],
)
def test_logistic_teachers_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LogisticTeacher(**{"values": values_of, "discount": DISCOUNT, **wrong})


def test_values_in_rows_are_those_of_the_dataset(absorbing: EpisodeDataset):
    queries, rows = all_segments(absorbing), len(absorbing.observations)
    with pytest.raises(ValueError, match=rf"shape \[{rows}\], not \[{rows - 1}\]"):
        LogisticTeacher(np.zeros(rows - 1), DISCOUNT).segment_scores(queries)
    with pytest.raises(ValueError, match="not finite at row 0"):
        LogisticTeacher(np.full(rows, np.nan), DISCOUNT).segment_scores(queries)


@pytest.mark.parametrize("processes", [0, 2])
def test_simulated_regret_is_the_closed_form_in_any_number_of_processes(absorbing: EpisodeDataset, processes: int):
    queries = all_segments(absorbing).take(np.arange(20))
    regrets = simulated(processes=processes).segment_regrets(queries, jax.random.key(0))
    np.testing.assert_allclose(regrets, closed_form(queries), atol=1e-12)


def test_simulated_regret_ends_where_the_task_ends(terminal: EpisodeDataset):
    queries = all_segments(terminal)
    teacher = simulated(make_env=functools.partial(Corridor, absorbing=False))
    np.testing.assert_allclose(teacher.segment_regrets(queries, jax.random.key(0)), closed_form(queries), atol=1e-12)


def test_both_rollouts_end_at_the_same_step(absorbing: EpisodeDataset):
    """An expert that stops short of the goal is compared over the same steps: an optimal segment still has regret 0."""
    queries = all_segments(absorbing)
    regrets = simulated(expert_horizon=1).segment_regrets(queries, jax.random.key(0))
    np.testing.assert_allclose(regrets[closed_form(queries) < 1e-12], 0.0, atol=1e-12)

    first, last = cells(queries.observations)[..., 0], cells(queries.last_observations)

    def rolled(cell: np.ndarray, steps: int) -> np.ndarray:
        return -(1 - DISCOUNT ** np.minimum(GOAL - cell, steps)) / (1 - DISCOUNT)

    earned = queries.rewards @ DISCOUNT ** np.arange(LENGTH)
    expected = rolled(first, LENGTH + 1) - earned - DISCOUNT**LENGTH * rolled(last, 1)
    np.testing.assert_allclose(regrets, expected, atol=1e-12)


def test_a_random_expert_depends_on_the_key_alone(absorbing: EpisodeDataset):
    queries = all_segments(absorbing).take(np.arange(10))
    one, two, again, other = (
        simulated(expert=Drunk(), processes=processes).segment_regrets(queries.take(order), jax.random.key(seed))
        for processes, order, seed in [
            (0, np.arange(10), 0),
            (2, np.arange(10), 0),
            (0, np.arange(10)[::-1], 0),
            (0, np.arange(10), 1),
        ]
    )
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, again[::-1])
    assert (one != other).any()
    teacher = simulated(expert=Drunk())
    np.testing.assert_array_equal(teacher.segment_regrets(queries, jax.random.key(0)), one)
    np.testing.assert_array_equal(teacher.segment_regrets(queries, jax.random.key(1)), other)


def test_simulated_labels_are_those_of_the_reported_regrets(absorbing: EpisodeDataset):
    queries, key = all_segments(absorbing).take(np.arange(20)), jax.random.key(3)
    teacher = simulated(expert=Drunk())
    labels = teacher.label(queries, key)
    gap = np.subtract(*teacher.segment_regrets(queries, key).T)
    np.testing.assert_array_equal(labels.values, np.where(np.abs(gap) < 1e-9, 0.5, gap > 0))


def test_a_segment_is_measured_once(absorbing: EpisodeDataset):
    made = []

    def make_env() -> Corridor:
        made.append(1)
        return Corridor()

    reports: list[tuple[int, int]] = []
    teacher = simulated(make_env=make_env, on_segment=lambda done, total: reports.append((done, total)))
    queries = all_segments(absorbing).take(np.array([0, 1, 0, 1]))
    distinct = len({*zip(queries.episodes.ravel().tolist(), queries.starts.ravel().tolist(), strict=True)})
    assert distinct == 4
    first = teacher.segment_regrets(queries, jax.random.key(0))
    assert reports == [(done, distinct) for done in range(1, distinct + 1)]

    np.testing.assert_array_equal(teacher.segment_regrets(queries, jax.random.key(0)), first)
    assert len(made) == 1
    assert len(reports) == distinct
    teacher.segment_regrets(all_segments(absorbing).take(np.arange(3)), jax.random.key(0))
    assert reports[distinct:] == [(5, 6), (6, 6)]


@pytest.mark.parametrize("processes", [0, 1])
def test_a_simulator_that_gives_up_is_one_clear_error(absorbing: EpisodeDataset, processes: int):
    queries = all_segments(absorbing).take(np.arange(2))
    teacher = simulated(make_env=functools.partial(Corridor, breaks_after=4), processes=processes)
    with pytest.raises(
        ValueError, match=r"step 4 of the expert's roll-out .* episode 0, step 0 .*call reset.*time limit"
    ):
        teacher.segment_regrets(queries, jax.random.key(0))


def die() -> Corridor:
    os._exit(1)


def test_a_dead_process_is_one_clear_error(absorbing: EpisodeDataset):
    teacher = simulated(make_env=die, processes=1)
    with pytest.raises(RuntimeError, match="fewer processes"):
        teacher.segment_regrets(all_segments(absorbing).take(np.arange(1)), jax.random.key(0))


def measured(dataset: EpisodeDataset, rng: np.random.Generator, **changes: Any) -> MeasuredRegretTeacher:
    """Of every window of the dataset, in random order."""
    pool = all_segments(dataset)
    episodes, starts, regrets = (
        array.ravel() for array in (pool.episodes, pool.starts, simulated().segment_regrets(pool, jax.random.key(0)))
    )
    order = rng.permutation(len(regrets))
    known = {"episodes": episodes[order], "starts": starts[order], "regrets": regrets[order]}
    return MeasuredRegretTeacher(**{"dataset_hash": dataset.hash, "length": LENGTH, **known, **changes})


@pytest.mark.parametrize("candidates", [2, 3])
def test_measured_regrets_answer_as_measuring_anew_would(absorbing: EpisodeDataset, candidates: int):
    queries, key = all_segments(absorbing, candidates), jax.random.key(0)
    teacher = measured(absorbing, np.random.default_rng(1))
    np.testing.assert_allclose(teacher.segment_regrets(queries), closed_form(queries), atol=1e-9)
    ours, theirs = teacher.label(queries, key), simulated().label(queries, key)
    np.testing.assert_array_equal(*((labels.values if candidates == 2 else labels.orders) for labels in (ours, theirs)))


def test_measured_regrets_speak_of_their_own_segments_only(absorbing: EpisodeDataset, terminal: EpisodeDataset):
    queries = all_segments(absorbing)
    teacher = measured(absorbing, np.random.default_rng(1))
    with pytest.raises(ValueError, match=r"another dataset .*; measure them anew"):
        teacher.label(all_segments(terminal), jax.random.key(0))
    half = len(teacher.starts) // 2
    first = [getattr(teacher, name)[:half] for name in ("episodes", "starts", "regrets")]
    partial = MeasuredRegretTeacher(absorbing.hash, LENGTH, *first)
    with pytest.raises(ValueError, match=r"query \d+ shows step \d+ of episode \d+, whose regret was not measured"):
        partial.label(queries, jax.random.key(0))


def test_no_queries_have_no_labels(absorbing: EpisodeDataset):
    queries = all_segments(absorbing).take(np.arange(0))
    for teacher in (RegretTeacher(values_of, DISCOUNT), LogisticTeacher(values_of, DISCOUNT), simulated()):
        assert len(teacher.label(queries, jax.random.key(0))) == 0


def test_simulated_teachers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="expert_horizon"):
        simulated(expert_horizon=0)
    with pytest.raises(ValueError, match="discount"):
        simulated(discount=-0.1)


def test_labels_say_who_gave_them(absorbing: EpisodeDataset):
    queries = all_segments(absorbing).take(np.arange(2))
    teachers: list[Labeler] = [RegretTeacher(values_of, DISCOUNT, source="closed form"), simulated(name="measured")]
    for teacher, expected in zip(
        teachers, [{"source": "closed form"}, {"expert": {"behaviour": "rightwards"}}], strict=True
    ):
        labels = teacher.label(queries, jax.random.key(0))
        assert labels.labeler == teacher.name
        assert labels.parameters == teacher.parameters
        assert expected.items() <= labels.parameters.items()


def test_in_meta_world_an_expert_regrets_nothing_and_an_error_costs(tmp_path: Path) -> None:
    task, horizon = "door-open-v3", 60
    expert = Expert(task)
    with RolloutWorkers(functools.partial(envs.make, {"name": f"metaworld/{task}", "horizon": horizon})) as workers:
        episodes = [workers.run(policy, [3], keep_states=True)[0] for policy in (expert, Offset(task))]
    env = envs.make({"name": f"metaworld/{task}", "horizon": horizon})
    write_episodes(
        tmp_path / "episodes",
        episodes,
        observation_space=env.observation_space,
        action_space=env.action_space,
        env=env.config,
    )
    # Segments 10 to 40 of the expert's episode and of the other one.
    queries = Queries(load_episodes(tmp_path / "episodes"), np.array([[0, 1]]), np.array([[10, 10]]), length=30)
    teacher = SimulatedRegretTeacher(
        functools.partial(envs.make, {"name": f"metaworld/{task}", "horizon": 1000}),
        expert,
        expert_horizon=60,
        discount=1.0,
    )

    ((by_expert, beside),) = teacher.segment_regrets(queries, jax.random.key(0))

    # The simulator is exact and the expert has no randomness: what it does from the first state is the segment itself.
    assert by_expert == pytest.approx(0.0, abs=1e-9)
    assert beside > 1.0
    assert teacher.label(queries, jax.random.key(0)).values == [0.0]
