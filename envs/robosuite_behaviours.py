"""Scripted experts for robosuite's Lift and PickPlaceCan, for data that needs no download.

Each is a function of the observation alone, but for its noise, so that a policy without memory can learn it; and each
recovers: one that has missed or dropped its object opens the hand and begins anew. Actions are those of the Panda's
default controller: displacement of the hand along x, y and z (1 stands for 5 cm), its rotation, and the fingers (-1
opens, 1 closes). The hand keeps the orientation in which it begins, fingers down.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from envs import suggestion
from envs.behaviours import Actor, Behaviour, Drawn, noisy

Keys = tuple[tuple[str, int], ...]
"""The parts of an observation with the size of each, in their order, as in `RobosuiteEnv.keys`."""

_ROBOT_KEYS: Keys = (("robot0_eef_pos", 3), ("robot0_eef_quat", 4), ("robot0_gripper_qpos", 2))

LIFT_KEYS: Keys = (*_ROBOT_KEYS, ("object", 10))
"""What is observed in Lift by default."""

CAN_KEYS: Keys = (*_ROBOT_KEYS, ("object", 14))
"""What is observed in PickPlaceCan by default."""

_Vector = npt.NDArray[np.float64]

_OPEN, _CLOSE = -1.0, 1.0
_GAIN = 10.0
"""Action per metre that the hand is away from where it should be."""

_BIN = np.array([0.1975, 0.4025])
"""Middle of the compartment that the can belongs to, in metres."""

_CARRY, _RELEASE = 1.1, 0.9
"""Heights at which a can is carried over the bins' walls, and down to which it is brought before it is let go."""


@dataclass(frozen=True)
class _PickExpert(Behaviour):
    """What experts share who take an object from above.

    Args:
        keys: the parts of an observation: among them robot0_eef_pos, robot0_gripper_qpos, and "object" or the position
            of the object.
        noise: standard deviation, in action units (the action space is [-1, 1]).
    """

    keys: Keys
    noise: float = 0.0

    position: ClassVar[str]
    """The part that is the object's position alone."""

    place: ClassVar[int]
    """Where in "object" that position begins."""

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"{type(self).__name__}.noise is {self.noise}; it must not be negative.")
        _find(self.keys, "robot0_eef_pos")
        _find(self.keys, "robot0_gripper_qpos")
        self._object()

    def actor(self, drawn: Drawn, random: np.random.Generator) -> Actor:
        hand, fingers = (_find(self.keys, key) for key in ("robot0_eef_pos", "robot0_gripper_qpos"))
        thing = self._object()

        def act(observation: _Vector) -> _Vector:
            opening = float(abs(observation[fingers][0]) + abs(observation[fingers][-1]))
            toward, grip = self.decide(observation[hand], observation[thing], opening)
            return np.array([*np.clip(_GAIN * toward, -1.0, 1.0), 0.0, 0.0, 0.0, grip])

        return noisy(act, self.noise, random)

    @abc.abstractmethod
    def decide(self, hand: _Vector, thing: _Vector, opening: float) -> tuple[_Vector, float]:
        """Where to move from here, and whether to open or to close.

        Args:
            hand: position of the point between the fingertips, in metres.
            thing: position of the object, in metres.
            opening: distance of the fingers, in metres.

        Returns:
            The wanted displacement of the hand, in metres, and the action of the fingers.
        """

    def _object(self) -> slice:
        if "object" in dict(self.keys):
            start = _find(self.keys, "object").start + self.place
            return slice(start, start + 3)
        return _find(self.keys, self.position)


@dataclass(frozen=True)
class LiftExpert(_PickExpert):
    """Takes the cube of Lift and lifts it."""

    keys: Keys = LIFT_KEYS

    position = "cube_pos"
    place = 0

    def decide(self, hand: _Vector, thing: _Vector, opening: float) -> tuple[_Vector, float]:
        # From side to side the cube is 4.0 to 4.4 cm wide, and 6.2 cm across.
        if _holds(hand, thing, opening, narrowest=0.037, widest=0.065):
            return np.array([0.0, 0.0, 0.1 if opening < 0.047 else 0.03]), _CLOSE
        return _take(hand, thing, above=0.06, depth=0.012, beside=0.015, slope=0.5)


@dataclass(frozen=True)
class CanExpert(_PickExpert):
    """Takes the can of PickPlaceCan, carries it over its compartment and lets it go."""

    keys: Keys = CAN_KEYS

    position = "Can_pos"
    place = 7

    def decide(self, hand: _Vector, thing: _Vector, opening: float) -> tuple[_Vector, float]:
        away = np.array([*(_BIN - thing[:2]), 0.0])
        over = float(np.linalg.norm(away)) < 0.05
        if over and thing[2] < _RELEASE:
            return np.array([0.0, 0.0, 0.1 if opening > 0.06 else -0.01]), _OPEN
        if not _holds(hand, thing, opening, narrowest=0.04, widest=0.056):
            return _take(hand, thing, above=0.12, depth=0.02, beside=0.015, slope=0.1)
        if over:
            return away + np.array([0.0, 0.0, -0.1]), _CLOSE
        height = np.array([0.0, 0.0, _CARRY - thing[2]])
        return height + (away if height[2] < 0.05 else 0.0), _CLOSE


EXPERTS: Mapping[str, type[LiftExpert] | type[CanExpert]] = {"Lift": LiftExpert, "PickPlaceCan": CanExpert}
"""By the name of the task."""


def _holds(hand: _Vector, thing: _Vector, opening: float, *, narrowest: float, widest: float) -> bool:
    """Whether the object, of a known width, is between the fingers."""
    offset = thing - hand
    near = float(np.linalg.norm(offset[:2])) < 0.03 and abs(float(offset[2])) < 0.035
    return near and narrowest < opening < widest


def _take(
    hand: _Vector, thing: _Vector, *, above: float, depth: float, beside: float, slope: float
) -> tuple[_Vector, float]:
    """Comes to the object from above, with open fingers, and then closes them.

    Args:
        hand: its position, in metres.
        thing: position of the object, in metres.
        above: height over the object at which the hand approaches, in metres.
        depth: height over the object at which the hand is low enough, in metres.
        beside: how far aside it may be for that, in metres.
        slope: how much further aside it may be, per metre that it is higher.
    """
    offset = thing - hand
    aside, height = float(np.linalg.norm(offset[:2])), float(-offset[2])
    if aside > beside + slope * max(height - depth, 0.0):
        return offset + np.array([0.0, 0.0, above]), _OPEN
    return offset, _OPEN if height > depth else _CLOSE


def _find(keys: Keys, key: str) -> slice:
    """Where in an observation a part is."""
    names = [name for name, _ in keys]
    if key not in names:
        raise ValueError(f"the expert must see {key!r}{suggestion(key, tuple(names))}")
    ends = list(accumulate(size for _, size in keys))
    return slice(ends[names.index(key)] - dict(keys)[key], ends[names.index(key)])
