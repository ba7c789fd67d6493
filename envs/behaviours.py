"""Behaviours that are wrong in ways of their own, for collecting Meta-World data of mixed quality.

Gaussian noise around an expert is no bad demonstration: averaged over a data set it disappears, and behaviour cloning
recovers the expert. What is collected here errs systematically: it aims beside the object, pursues another task, stops,
overshoots, or leans to one side for a whole episode.

Every behaviour is a `robopref.types.Policy` for B episodes at once. All that is random in an episode follows from the
episode's seed, and is the same whatever other episodes are in the batch. `describe(seed)` names the behaviour and what
was drawn for that episode.
"""

from __future__ import annotations

import abc
import dataclasses
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from envs.metaworld import check_task, scripted_policy

if TYPE_CHECKING:
    from robopref.types import Policy

Actor: TypeAlias = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
"""One episode's behaviour: from an observation [O] to an action [A], which may lie beyond [-1, 1]."""

Drawn: TypeAlias = dict[str, float]

_HAND = slice(0, 3)
_GOAL = slice(36, 39)
_OBJECTS = (slice(4, 11), slice(22, 29), slice(11, 18), slice(29, 36))
"""Pose of the first object now and before, and of the second, which is all zeros where there is none."""


@dataclass(frozen=True)
class Behaviour(abc.ABC):
    """What all behaviours share: one actor per episode, begun from the episode's seed."""

    def start(self, seeds: npt.NDArray[np.integer[Any]]) -> list[Actor]:
        """The actors of B episodes."""
        actors = []
        for seed in seeds:
            random = random_stream(type(self).__name__, int(seed))
            actors.append(self.actor(self.draw(random), random))
        return actors

    def step(
        self, carry: list[Actor], observations: npt.NDArray[np.floating[Any]]
    ) -> tuple[npt.NDArray[np.float32], list[Actor]]:
        """Actions [B, A] in [-1, 1] for observations [B, O]."""
        with warnings.catch_warnings():
            # The scripted policies ask for more than the action space holds as a matter of course, and warn about it.
            warnings.simplefilter("ignore")
            wanted = [actor(np.array(row, np.float64)) for actor, row in zip(carry, observations, strict=True)]
        return np.clip(np.stack(wanted), -1.0, 1.0).astype(np.float32), carry

    def describe(self, seed: int) -> Mapping[str, str | float]:
        """The behaviour's name, its settings that are single values, and what is drawn for the episode of this seed."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        single = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
        drawn = self.draw(random_stream(type(self).__name__, seed))
        return {"behaviour": type(self).__name__.lower(), **single, **drawn}

    def draw(self, random: np.random.Generator) -> Drawn:
        """What is fixed for one episode by its seed, by name."""
        return {}

    @abc.abstractmethod
    def actor(self, drawn: Drawn, random: np.random.Generator) -> Actor:
        """The behaviour of one episode, for which `drawn` was drawn from `random`."""


@dataclass(frozen=True)
class Expert(Behaviour):
    """Meta-World's scripted policy, with Gaussian noise on its actions.

    Args:
        task: whose expert.
        noise: standard deviation, in action units (the action space is [-1, 1]).
    """

    task: str
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_task(self.task)

    def actor(self, drawn: Drawn, random: np.random.Generator) -> Actor:
        return noisy(_scripted(self.task), self.noise, random)


@dataclass(frozen=True)
class Offset(Behaviour):
    """The expert with a wrong idea of where things are, all of them displaced to the same side, and slow.

    Args:
        task: whose expert.
        offset: displacement of the perceived objects and goal in x, y, z, in metres.
        low: least factor on `offset`; one factor, `scale`, is drawn per episode, uniformly.
        high: greatest factor.
        speed: factor on the motion of the hand.
        noise: standard deviation of the noise, in action units.
    """

    task: str
    offset: tuple[float, float, float] = (0.08, 0.08, 0.04)
    low: float = 0.5
    high: float = 1.5
    speed: float = 0.6
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_task(self.task)
        _check_range("Offset", "low", self.low, "high", self.high)

    def draw(self, random: np.random.Generator) -> Drawn:
        return {"scale": float(random.uniform(self.low, self.high))}

    def actor(self, drawn: Drawn, random: np.random.Generator) -> Actor:
        expert = _scripted(self.task)
        shift = drawn["scale"] * np.asarray(self.offset)

        def act(observation: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            action = expert(displace(observation, objects=shift, goal=shift))
            action[_HAND] *= self.speed
            return action

        return noisy(act, self.noise, random)


@dataclass(frozen=True)
class WrongGoal(Behaviour):
    """The expert aiming at a place beside the goal.

    Tasks whose expert does not look at the goal (doors, drawers, buttons, ...) are done as by the expert.

    Args:
        task: whose expert.
        low: least horizontal distance of the pursued goal from the true one, in metres; drawn per episode, with its
            direction, uniformly.
        high: greatest distance, in metres.
        noise: standard deviation of the noise, in action units.
    """

    task: str
    low: float = 0.15
    high: float = 0.3
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_task(self.task)
        _check_range("WrongGoal", "low", self.low, "high", self.high)

    def draw(self, random: np.random.Generator) -> Drawn:
        return {
            "distance": float(random.uniform(self.low, self.high)),
            "direction": float(random.uniform(-np.pi, np.pi)),
        }

    def actor(self, drawn: Drawn, random: np.random.Generator) -> Actor:
        expert = _scripted(self.task)
        shift = drawn["distance"] * np.array([np.cos(drawn["direction"]), np.sin(drawn["direction"]), 0.0])
        nowhere = np.zeros(3)
        return noisy(lambda seen: expert(displace(seen, objects=nowhere, goal=shift)), self.noise, random)


@dataclass(frozen=True)
class OtherTask(Behaviour):
    """The expert of another task.

    Args:
        other: the task that it is an expert of.
        noise: standard deviation of the noise, in action units.
    """

    other: str
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_task(self.other)

    def actor(self, drawn: Drawn, random: np.random.Generator) -> Actor:
        return noisy(_scripted(self.other), self.noise, random)


@dataclass(frozen=True)
class Stalling(Behaviour):
    """The expert with pauses, in which the hand stands still and the gripper keeps its last effort.

    Args:
        task: whose expert.
        rate: probability per moving step that a pause begins.
        shortest: least length of a pause, in steps; drawn per pause, uniformly.
        longest: greatest length of a pause, in steps.
        noise: standard deviation of the noise while moving, in action units.
    """

    task: str
    rate: float = 0.05
    shortest: int = 20
    longest: int = 60
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_task(self.task)
        _check_range("Stalling", "shortest", self.shortest, "longest", self.longest)

    def actor(self, drawn: Drawn, random: np.random.Generator) -> Actor:
        expert = noisy(_scripted(self.task), self.noise, random)
        pause = 0
        effort = 0.0

        def act(observation: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            nonlocal pause, effort
            if pause == 0 and random.random() < self.rate:
                pause = int(random.integers(self.shortest, self.longest + 1))
            if pause > 0:
                pause -= 1
                return np.array([0.0, 0.0, 0.0, effort])
            action = expert(observation)
            effort = float(action[3])
            return action

        return act


@dataclass(frozen=True)
class Overshooting(Behaviour):
    """The expert with too high a gain, acting on what it saw some time ago, so that it stops late and swings about.

    Args:
        task: whose expert.
        low: least factor on the motion of the hand, before it is clipped; one, `gain`, is drawn per episode, uniformly.
        high: greatest factor.
        delay: age of the observation acted on, in steps.
        noise: standard deviation of the noise, in action units.
    """

    task: str
    low: float = 2.0
    high: float = 4.0
    delay: int = 8
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_task(self.task)
        _check_range("Overshooting", "low", self.low, "high", self.high)
        if self.delay < 0:
            raise ValueError(f"Overshooting.delay is {self.delay}; it must not be negative.")

    def draw(self, random: np.random.Generator) -> Drawn:
        return {"gain": float(random.uniform(self.low, self.high))}

    def actor(self, drawn: Drawn, random: np.random.Generator) -> Actor:
        expert = _scripted(self.task)
        seen: deque[npt.NDArray[np.float64]] = deque(maxlen=self.delay + 1)

        def act(observation: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            seen.append(observation)
            action = expert(seen[0].copy())
            action[_HAND] *= drawn["gain"]
            return action

        return noisy(act, self.noise, random)


@dataclass(frozen=True)
class HeldBias(Behaviour):
    """The expert leaning to one side: a constant is added to the motion of the hand for the whole episode.

    Args:
        task: whose expert.
        low: least length of the constant, in action units; length and direction are drawn per episode, uniformly.
        high: greatest length, in action units.
        noise: standard deviation of the noise, in action units.
    """

    task: str
    low: float = 0.5
    high: float = 1.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_task(self.task)
        _check_range("HeldBias", "low", self.low, "high", self.high)

    def draw(self, random: np.random.Generator) -> Drawn:
        direction = random.normal(size=3)
        bias = random.uniform(self.low, self.high) * direction / np.linalg.norm(direction)
        return {f"bias_{axis}": float(value) for axis, value in zip("xyz", bias, strict=True)}

    def actor(self, drawn: Drawn, random: np.random.Generator) -> Actor:
        expert = _scripted(self.task)
        bias = np.array([drawn["bias_x"], drawn["bias_y"], drawn["bias_z"], 0.0])
        return noisy(lambda observation: np.clip(expert(observation), -1.0, 1.0) + bias, self.noise, random)


@dataclass(frozen=True)
class Random(Behaviour):
    """Actions drawn uniformly from the action space.

    Args:
        hold: steps for which each of them is kept.
    """

    hold: int = 1

    def __post_init__(self) -> None:
        if self.hold < 1:
            raise ValueError(f"Random.hold is {self.hold}; it must be at least 1 step.")

    def actor(self, drawn: Drawn, random: np.random.Generator) -> Actor:
        age = 0
        action = np.zeros(4)

        def act(observation: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            nonlocal age, action
            if age % self.hold == 0:
                action = random.uniform(-1.0, 1.0, 4)
            age += 1
            return action

        return act


@dataclass(frozen=True)
class Mixture:
    """One of several policies per episode, drawn by the episode's seed.

    Args:
        parts: weight and policy of each; the weights need not sum to one.
    """

    parts: tuple[tuple[float, Policy], ...]

    def __post_init__(self) -> None:
        weights = [weight for weight, _ in self.parts]
        if not weights or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"the weights of a Mixture are {weights}; they must be non-negative, and not all be zero.")

    def chosen(self, seed: int) -> int:
        """The index of the part that acts in the episode with this seed."""
        weights = np.array([weight for weight, _ in self.parts], np.float64)
        random = random_stream(f"Mixture {weights.tolist()}", seed)
        return int(random.choice(len(weights), p=weights / weights.sum()))

    def start(self, seeds: npt.NDArray[np.integer[Any]]) -> list[tuple[int, npt.NDArray[np.intp], Any]]:
        """For each part that acts: its index, which episodes of the batch are its own, and its carry."""
        choices = np.array([self.chosen(int(seed)) for seed in seeds], np.intp)
        groups = [(int(part), np.flatnonzero(choices == part)) for part in np.unique(choices)]
        return [(part, rows, self.parts[part][1].start(np.asarray(seeds)[rows])) for part, rows in groups]

    def step(
        self, carry: Sequence[tuple[int, npt.NDArray[np.intp], Any]], observations: npt.NDArray[np.floating[Any]]
    ) -> tuple[npt.NDArray[np.float32], list[tuple[int, npt.NDArray[np.intp], Any]]]:
        following, order, parts = [], [], []
        for part, rows, inner in carry:
            actions, after = self.parts[part][1].step(inner, observations[rows])
            following.append((part, rows, after))
            order.append(rows)
            parts.append(actions)
        return np.concatenate(parts)[np.argsort(np.concatenate(order))].astype(np.float32), following

    def describe(self, seed: int) -> Mapping[str, str | float]:
        """What the part that acts in this episode says of itself."""
        return self.parts[self.chosen(seed)][1].describe(seed)


@dataclass(frozen=True)
class Switching:
    """One policy to begin with and another from a random step on.

    Both follow the episode from its first step, whichever of them acts.

    Args:
        first: acts before the switch.
        second: acts from the switch on.
        earliest: least step at which the second begins; drawn per episode, uniformly.
        latest: greatest step at which the second begins.
    """

    first: Policy
    second: Policy
    earliest: int
    latest: int

    def __post_init__(self) -> None:
        _check_range("Switching", "earliest", self.earliest, "latest", self.latest)

    def switch(self, seed: int) -> int:
        """The step from which the second policy acts in the episode with this seed."""
        return int(random_stream("Switching", seed).integers(self.earliest, self.latest + 1))

    def start(self, seeds: npt.NDArray[np.integer[Any]]) -> tuple[int, npt.NDArray[np.intp], Any, Any]:
        """Steps taken, the episodes' switches, and both carries."""
        switches = np.array([self.switch(int(seed)) for seed in seeds], np.intp)
        return 0, switches, self.first.start(seeds), self.second.start(seeds)

    def step(
        self, carry: tuple[int, npt.NDArray[np.intp], Any, Any], observations: npt.NDArray[np.floating[Any]]
    ) -> tuple[npt.NDArray[np.float32], tuple[int, npt.NDArray[np.intp], Any, Any]]:
        taken, switches, first, second = carry
        before, first = self.first.step(first, observations)
        after, second = self.second.step(second, observations)
        actions = np.where((taken < switches)[:, None], before, after).astype(np.float32)
        return actions, (taken + 1, switches, first, second)

    def describe(self, seed: int) -> Mapping[str, str | float]:
        """The step of the switch, and under `first/` and `second/` what the two say of themselves."""
        parts = {"first": self.first.describe(seed), "second": self.second.describe(seed)}
        inner = {f"{part}/{name}": value for part, said in parts.items() for name, value in said.items()}
        return {"behaviour": "switching", "switch": float(self.switch(seed)), **inner}


def displace(
    observation: npt.NDArray[np.float64], *, objects: npt.NDArray[np.float64], goal: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """`observation` [39] with every object, now and in the previous frame, and the goal moved, in metres.

    An object that is not there (a pose of zeros) stays away.
    """
    moved = observation.copy()
    for pose in _OBJECTS:
        if observation[pose].any():
            moved[pose.start : pose.start + 3] += objects
    moved[_GOAL] += goal
    return moved


def random_stream(purpose: str, seed: int) -> np.random.Generator:
    """A random stream for one purpose in one episode, unrelated to the stream by which the environment resets."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def _scripted(task: str) -> Actor:
    """A new instance of the task's scripted policy; it is given copies, since it writes into what it sees."""
    policy = scripted_policy(task)
    return lambda observation: np.array(policy.get_action(observation.copy()), np.float64)


def noisy(actor: Actor, noise: float, random: np.random.Generator) -> Actor:
    """`actor` with Gaussian noise of this standard deviation on its actions."""

    def act(observation: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        action = actor(observation)
        return action + noise * random.normal(size=len(action))

    return act


def _check_range(behaviour: str, low_name: str, low: float, high_name: str, high: float) -> None:
    if not 0 <= low <= high:
        raise ValueError(f"{behaviour} needs 0 <= {low_name} <= {high_name}, but they are {low} and {high}.")
