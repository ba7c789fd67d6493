from __future__ import annotations

import functools
import importlib.util
import pickle
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import envs
from envs.behaviours import Mixture
from envs.robosuite_behaviours import CAN_KEYS, LIFT_KEYS, CanExpert, LiftExpert
from robopref.rollouts import RolloutWorkers
from robopref.types import Policy

ROBOSUITE = importlib.util.find_spec("robosuite") is not None
MISSING = "robosuite is not installed: `make robomimic` installs it and runs these tests."


def with_robosuite(test: Any) -> Any:
    return pytest.mark.robomimic(pytest.mark.skipif(not ROBOSUITE, reason=MISSING)(test))


OPEN, NARROW, CAN_WIDE = 0.04, 0.021, 0.0265
"""Distance of one finger from the middle: open, at a cube, at a can."""


def lift_observation(hand: tuple[float, ...], cube: tuple[float, ...], finger: float) -> npt.NDArray[np.float64]:
    offset = np.subtract(cube, hand)
    return np.array([*hand, 1, 0, 0, 0, finger, -finger, *cube, 0, 0, 0, 1, *offset])


def can_observation(hand: tuple[float, ...], can: tuple[float, ...], finger: float) -> npt.NDArray[np.float64]:
    return np.array([*hand, 1, 0, 0, 0, finger, -finger, *np.subtract(can, hand), 0, 0, 0, 1, *can, 0, 0, 0, 1])


def act(policy: Policy, observation: npt.NDArray[np.float64], seed: int = 0) -> npt.NDArray[np.float32]:
    return np.asarray(policy.step(policy.start(np.array([seed])), observation[None])[0][0])


@pytest.mark.parametrize(
    ("hand", "cube", "finger", "expected"),
    [
        # Far aside: towards a place 6 cm above the cube, 10 per metre, and no faster than 1.
        ((0.0, 0.05, 0.9), (0.02, 0.0, 0.82), NARROW, (0.2, -0.5, -0.2, -1)),
        ((0.0, 0.0, 1.1), (0.2, -0.3, 0.82), OPEN, (1, -1, -1, -1)),
        # Above it: down to it, open.
        ((0.02, 0.0, 0.86), (0.02, 0.005, 0.82), OPEN, (0, 0.05, -0.4, -1)),
        # At it: close; between the fingers: up, slowly as long as they still close.
        ((0.02, 0.0, 0.83), (0.02, 0.005, 0.82), OPEN, (0, 0.05, -0.1, 1)),
        ((0.02, 0.0, 0.83), (0.02, 0.005, 0.82), 0.03, (0, 0, 0.3, 1)),
        ((0.02, 0.0, 0.83), (0.02, 0.005, 0.82), NARROW, (0, 0, 1, 1)),
        # Missed: closed upon nothing, or fallen out of the hand; once more, from above.
        ((0.02, 0.0, 0.85), (0.02, 0.0, 0.82), 0.001, (0, 0, -0.3, -1)),
        ((0.02, 0.0, 0.95), (0.07, 0.1, 0.82), 0.001, (0.5, 1, -0.7, -1)),
    ],
)
def test_the_expert_for_lift(
    hand: tuple[float, ...], cube: tuple[float, ...], finger: float, expected: tuple[float, ...]
) -> None:
    action = act(LiftExpert(), lift_observation(hand, cube, finger))
    np.testing.assert_allclose(action, [*expected[:3], 0, 0, 0, expected[3]], atol=1e-6)


@pytest.mark.parametrize(
    ("hand", "can", "finger", "expected"),
    [
        ((0.1, -0.2, 0.95), (0.1, -0.28, 0.86), OPEN, (0, -0.8, 0.3, -1)),
        ((0.1, -0.2, 0.9), (0.1, -0.205, 0.86), OPEN, (0, -0.05, -0.4, -1)),
        ((0.1, -0.2, 0.87), (0.1, -0.205, 0.86), OPEN, (0, -0.05, -0.1, 1)),
        # Held: up over the walls, then across, then down into the middle of its compartment.
        ((0.1, -0.2, 0.87), (0.1, -0.2, 0.86), CAN_WIDE, (0, 0, 1, 1)),
        ((0.1, -0.2, 1.07), (0.1, -0.2, 1.06), CAN_WIDE, (0.975, 1, 0.4, 1)),
        ((0.1975, 0.4, 1.07), (0.1975, 0.4, 1.06), CAN_WIDE, (0, 0.025, -1, 1)),
        # Low enough: let it go, and leave it.
        ((0.1975, 0.4, 0.9), (0.1975, 0.4, 0.89), CAN_WIDE, (0, 0, -0.1, -1)),
        ((0.1975, 0.4, 0.9), (0.1975, 0.4, 0.87), OPEN, (0, 0, 1, -1)),
    ],
)
def test_the_expert_for_cans(
    hand: tuple[float, ...], can: tuple[float, ...], finger: float, expected: tuple[float, ...]
) -> None:
    action = act(CanExpert(), can_observation(hand, can, finger))
    np.testing.assert_allclose(action, [*expected[:3], 0, 0, 0, expected[3]], atol=1e-6)


def test_parts_are_found_wherever_they_are() -> None:
    seen = can_observation((0.1, -0.2, 0.9), (0.1, -0.22, 0.86), OPEN)
    expected = act(CanExpert(), seen)
    hand, quaternion, fingers, thing = np.split(seen, [3, 7, 9])
    other = CanExpert((("object", 14), ("robot0_gripper_qpos", 2), ("robot0_eef_pos", 3)))
    np.testing.assert_array_equal(act(other, np.concatenate([thing, fingers, hand])), expected)
    alone = CanExpert((("robot0_gripper_qpos", 2), ("robot0_eef_quat", 4), ("robot0_eef_pos", 3), ("Can_pos", 3)))
    np.testing.assert_array_equal(act(alone, np.concatenate([fingers, quaternion, hand, thing[7:10]])), expected)


def test_noise_has_the_stated_deviation_and_follows_from_the_seed() -> None:
    seen = lift_observation((0.02, 0.0, 0.84), (0.02, 0.005, 0.82), OPEN)
    loud, seeds = LiftExpert(noise=0.05), np.arange(2000)
    batch = np.repeat(seen[None], 2000, axis=0)
    difference = (loud.step(loud.start(seeds), batch)[0] - act(LiftExpert(), seen))[:, :6]
    # The standard error of a deviation from 2000 draws is 1.6 %.
    np.testing.assert_allclose(difference.std(axis=0), 0.05, rtol=0.08)
    again = pickle.loads(pickle.dumps(loud))
    np.testing.assert_array_equal(act(again, seen, seed=7), act(loud, seen, seed=7))
    assert not np.array_equal(act(loud, seen, seed=8), act(loud, seen, seed=7))


def test_experts_can_be_mixed() -> None:
    parts = (LiftExpert(), LiftExpert(noise=0.5))
    mixture, seeds = Mixture(tuple((1.0, part) for part in parts)), np.arange(6)
    batch = np.repeat(lift_observation((0.02, 0.0, 0.84), (0.02, 0.005, 0.82), OPEN)[None], 6, axis=0)
    actions, _ = mixture.step(mixture.start(seeds), batch)
    chosen = [mixture.chosen(int(seed)) for seed in seeds]
    assert set(chosen) == {0, 1}
    for seed, part, action in zip(seeds, chosen, actions, strict=True):
        np.testing.assert_array_equal(action, act(parts[part], batch[0], int(seed)))
    assert mixture.describe(chosen.index(1)) == {"behaviour": "liftexpert", "noise": 0.5}


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        LiftExpert(noise=-0.1)
    with pytest.raises(ValueError, match="robot0_gripper_qpos"):
        LiftExpert((("robot0_eef_pos", 3), ("object", 10)))
    with pytest.raises(ValueError, match="Can_pos"):
        CanExpert((("robot0_eef_pos", 3), ("robot0_gripper_qpos", 2)))


@with_robosuite
@pytest.mark.parametrize(
    ("task", "expert", "horizon"),
    [
        ("Lift", LiftExpert(), 50),
        ("Lift", LiftExpert(noise=0.1), 100),
        ("PickPlaceCan", CanExpert(), 200),
    ],
)
def test_experts_succeed(task: str, expert: Policy, horizon: int) -> None:
    with RolloutWorkers(
        functools.partial(envs.make, {"name": f"robosuite/{task}", "horizon": horizon}), lanes=1
    ) as all:
        episodes = all.run(expert, range(4), stop_on_success=True)
    assert [episode.succeeded for episode in episodes] == [True] * 4


@with_robosuite
def test_the_parts_are_those_that_are_observed_by_default() -> None:
    assert tuple(envs.make({"name": "robosuite/Lift"}).keys.items()) == LIFT_KEYS
    assert tuple(envs.make({"name": "robosuite/PickPlaceCan"}).keys.items()) == CAN_KEYS
