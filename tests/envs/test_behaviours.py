from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from envs.behaviours import (
    Expert,
    HeldBias,
    Mixture,
    Offset,
    OtherTask,
    Overshooting,
    Random,
    Stalling,
    Switching,
    WrongGoal,
    displace,
)
from envs.metaworld import MetaWorldEnv, scripted_policy
from robopref.types import Policy

pytestmark = pytest.mark.filterwarnings("ignore:Constant")

DOOR = "door-open-v3"
ALL: dict[str, Policy] = {
    "expert": Expert(DOOR, noise=0.3),
    "offset": Offset(DOOR, noise=0.1),
    "wrong goal": WrongGoal("reach-v3", noise=0.1),
    "other task": OtherTask("drawer-open-v3", noise=0.1),
    "stalling": Stalling(DOOR, noise=0.1),
    "overshooting": Overshooting(DOOR, noise=0.1),
    "held bias": HeldBias(DOOR, noise=0.1),
    "random": Random(hold=3),
    "mixture": Mixture(((1.0, Expert(DOOR, 0.2)), (2.0, Random()), (1.0, HeldBias(DOOR)))),
    "switching": Switching(Random(), Expert(DOOR, 0.1), 2, 9),
}


@pytest.fixture(scope="module")
def observations() -> npt.NDArray[np.float64]:
    """Observations [12 steps, 4 episodes, 39] of random motion."""
    env = MetaWorldEnv(DOOR)
    random = np.random.default_rng(0)
    rows = []
    for seed in range(4):
        row = [env.reset(seed=seed)[0]]
        row += [env.step(random.uniform(-1, 1, 4).astype(np.float32))[0] for _ in range(11)]
        rows.append(row)
    return np.array(rows).swapaxes(0, 1)


def actions_of(policy: Policy, seeds: list[int], observations: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    carry = policy.start(np.array(seeds))
    actions = []
    for batch in observations:
        action, carry = policy.step(carry, batch)
        actions.append(action)
    return np.array(actions)


@pytest.fixture(scope="module")
def successes() -> Callable[[Policy, str], int]:
    """How many of 6 episodes of 150 steps succeed at some step."""

    def count(policy: Policy, task: str = DOOR) -> int:
        env = MetaWorldEnv(task, horizon=150)
        seeds = np.arange(100, 106)
        total = 0
        for seed in seeds:
            observation, _ = env.reset(seed=int(seed))
            carry = policy.start(np.array([seed]))
            truncated = solved = False
            while not truncated and not solved:
                action, carry = policy.step(carry, observation[None])
                observation, _, _, truncated, info = env.step(action[0])
                solved = info["success"]
            total += solved
        return total

    return count


@pytest.mark.parametrize("name", ALL)
def test_an_episodes_actions_follow_from_its_seed_alone(name: str, observations: npt.NDArray[np.float64]) -> None:
    policy = ALL[name]
    together = actions_of(policy, [5, 6, 7, 8], observations)
    assert together.shape == (12, 4, 4)
    assert together.dtype == np.float32
    assert (np.abs(together) <= 1).all()
    np.testing.assert_array_equal(together, actions_of(pickle.loads(pickle.dumps(policy)), [5, 6, 7, 8], observations))
    for column, seed in enumerate([5, 6, 7, 8]):
        alone = actions_of(policy, [seed], observations[:, [column]])
        np.testing.assert_array_equal(alone[:, 0], together[:, column])
    reversed_batch = actions_of(policy, [8, 7, 6, 5], observations[:, ::-1])
    np.testing.assert_array_equal(reversed_batch[:, ::-1], together)
    assert not np.array_equal(together, actions_of(policy, [15, 16, 17, 18], observations))


@pytest.mark.parametrize("name", ALL)
def test_observations_are_left_as_they_are(name: str, observations: npt.NDArray[np.float64]) -> None:
    seen = observations.copy()
    actions_of(ALL[name], [5, 6, 7, 8], seen)
    np.testing.assert_array_equal(seen, observations)


@pytest.mark.parametrize("name", ALL)
def test_descriptions_are_plain_and_repeatable(name: str) -> None:
    said = ALL[name].describe(3)
    assert isinstance(said["behaviour"], str)
    assert all(type(value) in (str, int, float) for value in said.values())
    assert said == ALL[name].describe(3)


def test_the_expert_is_the_scripted_policy(observations: npt.NDArray[np.float64]) -> None:
    script = scripted_policy(DOOR)
    expected = [[np.clip(script.get_action(row.copy()), -1, 1) for row in batch] for batch in observations]
    np.testing.assert_array_equal(actions_of(Expert(DOOR), [0, 1, 2, 3], observations), np.array(expected))


def test_noise_has_the_stated_deviation() -> None:
    observation = np.zeros((1, 39))
    quiet = OtherTask("reach-v3")
    loud = OtherTask("reach-v3", noise=0.05)
    batch = np.repeat(observation, 2000, axis=0)
    difference = actions_of(loud, list(range(2000)), batch[None])[0] - actions_of(quiet, [0], observation[None])[0]
    inside = np.abs(actions_of(quiet, [0], observation[None])[0, 0]) < 0.5
    assert inside.any()
    # The standard error of a deviation from 2000 draws is 1.6 %.
    np.testing.assert_allclose(difference[:, inside].std(axis=0), 0.05, rtol=0.08)


def test_displacement_moves_both_frames_and_the_goal_but_no_absent_object() -> None:
    observation = np.arange(39, dtype=np.float64)
    observation[11:18] = 0
    observation[29:36] = 0
    moved = displace(observation, objects=np.array([1.0, 2.0, 3.0]), goal=np.array([4.0, 5.0, 6.0]))
    expected = observation.copy()
    expected[4:7] += [1, 2, 3]
    expected[22:25] += [1, 2, 3]
    expected[36:39] += [4, 5, 6]
    np.testing.assert_array_equal(moved, expected)
    both = np.arange(39, dtype=np.float64)
    moved = displace(both, objects=np.ones(3), goal=np.zeros(3))
    np.testing.assert_array_equal(np.flatnonzero(moved - both), [4, 5, 6, 11, 12, 13, 22, 23, 24, 29, 30, 31])


def test_offset_aims_beside_the_object_by_what_it_says(observations: npt.NDArray[np.float64]) -> None:
    policy = Offset(DOOR, offset=(0.02, -0.01, 0.03), low=0.5, high=1.5, speed=0.25)
    row = observations[3, 0]
    scale = policy.describe(9)["scale"]
    assert isinstance(scale, float)
    seen = displace(row, objects=scale * np.array([0.02, -0.01, 0.03]), goal=scale * np.array([0.02, -0.01, 0.03]))
    script = np.array(scripted_policy(DOOR).get_action(seen), np.float64)
    script[:3] *= 0.25
    np.testing.assert_array_equal(
        actions_of(policy, [9], row[None, None])[0, 0], np.clip(script, -1, 1).astype(np.float32)
    )
    scales = [policy.describe(seed)["scale"] for seed in range(200)]
    assert 0.5 <= min(scales) < 0.55
    assert 1.45 < max(scales) <= 1.5


def test_what_is_drawn_has_nothing_to_do_with_where_the_object_is() -> None:
    env = MetaWorldEnv(DOOR)
    places = [env.reset(seed=seed)[0][4] for seed in range(60)]
    scales = [Offset(DOOR).describe(seed)["scale"] for seed in range(60)]
    assert abs(np.corrcoef(places, np.array(scales, np.float64))[0, 1]) < 0.4


def test_a_wrong_goal_lies_at_the_stated_distance(observations: npt.NDArray[np.float64]) -> None:
    policy = WrongGoal("reach-v3", low=0.2, high=0.21)
    said = policy.describe(4)
    distance, direction = said["distance"], said["direction"]
    assert isinstance(distance, float)
    assert isinstance(direction, float)
    assert 0.2 <= distance <= 0.21
    row = observations[3, 0]
    seen = row.copy()
    seen[36:38] += distance * np.array([np.cos(direction), np.sin(direction)])
    expected = np.clip(scripted_policy("reach-v3").get_action(seen), -1, 1)
    np.testing.assert_array_equal(actions_of(policy, [4], row[None, None])[0, 0], expected)


def test_stalling_stops_for_as_long_as_it_says() -> None:
    row = np.tile(MetaWorldEnv(DOOR).reset(seed=0)[0], (400, 1, 1))
    moving = np.abs(actions_of(Stalling(DOOR, rate=0.1, shortest=4, longest=7), [0], row)[:, 0, :3]).any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([True], moving, [True])).astype(int)))
    spans = np.diff(edges)[::2]
    assert len(spans) > 10
    assert spans[:-1].min() >= 4
    # A pause may follow another at once, with probability 0.1.
    assert np.median(spans) <= 7
    always = actions_of(Stalling(DOOR, rate=0.0), [0], row)
    np.testing.assert_array_equal(always, actions_of(Expert(DOOR), [0], row))


def test_overshooting_acts_late_and_with_its_gain(observations: npt.NDArray[np.float64]) -> None:
    policy = Overshooting(DOOR, low=0.03, high=0.03, delay=5)
    column = observations[:, :1]
    script = scripted_policy(DOOR)
    expected = []
    for step in range(len(column)):
        action = np.array(script.get_action(column[max(step - 5, 0), 0].copy()), np.float64)
        action[:3] *= 0.03
        expected.append(np.clip(action, -1, 1).astype(np.float32))
    np.testing.assert_array_equal(actions_of(policy, [0], column)[:, 0], np.array(expected))


def test_a_held_bias_is_constant_and_of_the_stated_length() -> None:
    policy = HeldBias("reach-v3", low=0.3, high=0.4)
    bias = np.array([policy.describe(2)[f"bias_{axis}"] for axis in "xyz"], np.float64)
    assert 0.3 <= np.linalg.norm(bias) <= 0.4
    row = np.zeros((1, 1, 39))
    quiet = actions_of(Expert("reach-v3"), [0], row)[0, 0]
    np.testing.assert_allclose(actions_of(policy, [2], row)[0, 0, :3], np.clip(quiet[:3] + bias, -1, 1), atol=1e-6)


def test_random_actions_are_held() -> None:
    actions = actions_of(Random(hold=4), [1], np.zeros((12, 1, 39)))[:, 0]
    blocks = actions.reshape(3, 4, 4)
    np.testing.assert_array_equal(blocks, np.repeat(blocks[:, :1], 4, axis=1))
    assert len(np.unique(actions, axis=0)) == 3


def test_a_mixture_draws_its_parts_by_weight() -> None:
    mixture = Mixture(((3.0, Expert(DOOR)), (1.0, Random()), (0.0, Offset(DOOR))))
    names = [mixture.describe(seed)["behaviour"] for seed in range(1000)]
    assert set(names) == {"expert", "random"}
    # Three standard deviations of a share of 3/4 among 1000.
    assert abs(names.count("expert") / 1000 - 0.75) < 3 * np.sqrt(0.75 * 0.25 / 1000)


def test_a_mixture_does_what_it_says(observations: npt.NDArray[np.float64]) -> None:
    parts = (Expert(DOOR), Random())
    mixture = Mixture(tuple((1.0, part) for part in parts))
    for seed in range(8):
        acting = parts[mixture.chosen(seed)]
        assert mixture.describe(seed) == acting.describe(seed)
        np.testing.assert_array_equal(
            actions_of(mixture, [seed], observations[:, :1]), actions_of(acting, [seed], observations[:, :1])
        )


def test_switching_hands_over_at_the_step_it_says(observations: npt.NDArray[np.float64]) -> None:
    first, second = Random(), Expert(DOOR)
    switching = Switching(first, second, 2, 9)
    steps = set()
    for seed in range(40):
        said = switching.describe(seed)
        step = int(said["switch"])
        steps.add(step)
        assert said["first/behaviour"] == "random"
        assert said["second/task"] == DOOR
        column = observations[:, :1]
        before, after = actions_of(first, [seed], column), actions_of(second, [seed], column)
        np.testing.assert_array_equal(
            actions_of(switching, [seed], column), np.concatenate((before[:step], after[step:]))
        )
    assert steps == set(range(2, 10))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Expert("door-opn-v3"), "door-open-v3"),
        (lambda: Offset(DOOR, low=2.0, high=1.0), "low <= high"),
        (lambda: Stalling(DOOR, shortest=9, longest=3), "shortest <= longest"),
        (lambda: Overshooting(DOOR, delay=-1), "delay"),
        (lambda: Random(hold=0), "hold"),
        (lambda: Mixture(()), "weights"),
        (lambda: Mixture(((-1.0, Random()), (2.0, Random()))), "weights"),
        (lambda: Switching(Random(), Random(), 5, 4), "earliest <= latest"),
    ],
)
def test_settings_that_make_no_sense_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_experts_succeed_and_the_others_fail_as_intended(successes: Callable[..., int]) -> None:
    expert = successes(Expert(DOOR))
    assert expert >= 5
    assert successes(Expert(DOOR, noise=0.5)) >= 4
    assert successes(Offset(DOOR)) <= 2
    assert successes(Overshooting(DOOR)) < expert
    assert successes(HeldBias(DOOR)) < expert
    assert successes(Stalling(DOOR)) < expert
    assert successes(Random()) == 0
    assert successes(Expert("reach-v3"), "reach-v3") == 6
    assert successes(WrongGoal("reach-v3"), "reach-v3") <= 1
