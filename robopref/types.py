"""The data that flows through robopref: episodes, queries, labels, and the batches that agents learn from.

Two families live here. *Host* types (`Episode`, `Policy`, `Simulator`) hold NumPy arrays and meet simulators and files.
*Device* types (`Segments`, `Transitions`, `Windows`, `Preferences`, `Rankings`, ...) are pytrees of JAX arrays and meet
agents.

**The label convention, everywhere in robopref:** a label is P(the second segment is preferred). 0 means that the first
was preferred, 1 the second, 0.5 a tie; any value between is a soft label. Readers of foreign files convert to it.

Axes in array annotations: B batch, T time, O observation, A action, K candidates, S simulator state.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, SupportsFloat, TypeAlias, runtime_checkable

import gymnasium
import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from robopref.files import Closing

Key: TypeAlias = jax.Array
"""A typed PRNG key from `jax.random.key`."""

Metrics: TypeAlias = dict[str, Array]
"""Scalars of one update, by slash-separated name, such as `policy/loss`."""

PyTree: TypeAlias = Any


@dataclass(frozen=True)
class Episode:
    """One episode as it happened, T steps long.

    Attributes:
        observations: what the agent saw, one row more than there are actions.
        actions: in the environment's own units.
        rewards: the environment's reward for each step.
        terminated: the task ended in a state of its own (never a time limit).
        truncated: the episode was cut off, by a time limit or by the caller.
        infos: one array per name with T + 1 rows; row t is what the simulator reported on reaching state t
            (row 0 on reset). Success, where the task has one, is `infos["success"]`.
        states: full simulator states for `Simulator.set_state`, or None where the environment has none to give.
        seed: what the environment was reset with.
        origin: who acted and how, such as `{"behaviour": "offset", "scale": 0.8}`.
    """

    observations: Float[np.ndarray, "T+1 O"]
    actions: Float[np.ndarray, "T A"]
    rewards: Float[np.ndarray, " T"]
    terminated: bool
    truncated: bool
    infos: Mapping[str, np.ndarray] = field(default_factory=dict)
    states: Float[np.ndarray, "T+1 S"] | None = None
    seed: int | None = None
    origin: Mapping[str, str | float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def succeeded(self) -> bool:
        """Whether success was reported at any step; False where the environment reports none."""
        return bool(np.any(self.infos.get("success", False)))


class Simulator(Protocol):
    """An environment that can be put back exactly where it was, with the Gymnasium API.

    `set_state(get_state())` followed by the same actions must give bit-equal observations and rewards.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]: ...
    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]: ...
    def get_state(self) -> Float[np.ndarray, " S"]: ...
    def set_state(self, state: Float[np.ndarray, " S"]) -> Float[np.ndarray, " O"]:
        """Puts the simulator into `state` and returns the observation of that state."""
        ...


class EpisodeSource(Closing, abc.ABC):
    """Episodes of a foreign dataset, as readers in formats/ give them: one at a time, as it may not fit into memory.

    It holds files open: use it as a context manager.

    Where a format keeps no observation after the last action, that of the last step stands in for it, and the
    episode's origin says `final_observation: "repeated"`.

    Attributes:
        path: where it is.
        observation_space: a flat Box: the vectors of the dataset, joined in the order of `keys`.
        action_space: a flat Box.
        keys: names of the parts of an observation, with the size of each, in their order.
        env: how the environment was made, as the file says it; empty if it does not.
        description: free text.
        splits: named subsets, as indices of episodes in ascending order.
        cameras: names of images, with their [height, width, channels].
    """

    path: Path
    observation_space: gymnasium.spaces.Box
    action_space: gymnasium.spaces.Box
    keys: Mapping[str, int]
    env: Mapping[str, Any]
    description: str
    splits: Mapping[str, Int[np.ndarray, " n"]]
    cameras: Mapping[str, tuple[int, int, int]]

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def episode(self, index: int) -> Episode:
        """Episode `index`, without images.

        Raises:
            IndexError: there is no such episode.
            ValueError: the file is damaged there; the message names file and episode.
        """

    @abc.abstractmethod
    def frames(self, index: int, camera: str) -> UInt8[np.ndarray, "T+1 H W C"]:
        """What a camera saw during an episode; the last frame is repeated like the last observation.

        Raises:
            IndexError: there is no such episode.
            ValueError: there is no such camera, or the file is damaged there.
        """

    def check_index(self, index: int) -> None:
        """Raises an IndexError unless there is such an episode."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has episodes 0 to {len(self) - 1}, so there is no episode {index}.")


class Policy(Protocol):
    """Anything that acts in B environments at once: an agent, a scripted behaviour, a remote server.

    What a policy remembers within an episode is its carry, so that one policy object serves any number of batches.
    """

    def start(self, seeds: Int[np.ndarray, " B"]) -> Any:
        """The carry at the first step of B episodes; all randomness of an episode comes from its seed."""
        ...

    def step(self, carry: Any, observations: Float[np.ndarray, "B O"]) -> tuple[Float[np.ndarray, "B A"], Any]:
        """Actions for B environments, and the next carry."""
        ...

    def describe(self, seed: int) -> Mapping[str, str | float]:
        """What `Episode.origin` records about the episode with this seed."""
        ...


@runtime_checkable
class RewardedPolicy(Policy, Protocol):
    """A policy that is also told what its actions earned, such as one that is asked for a certain return."""

    def receive(self, carry: Any, rewards: Float[np.ndarray, " B"]) -> Any:
        """The next carry, after each step of B environments."""
        ...


class Segments(struct.PyTreeNode):
    """Stretches of T steps of experience, without rewards: what a labeler is shown and an agent may learn from."""

    observations: Float[Array, "*B T O"]
    actions: Float[Array, "*B T A"]


class Transitions(struct.PyTreeNode):
    """Single steps, for behaviour cloning and temporal-difference learning."""

    observations: Float[Array, "*B O"]
    actions: Float[Array, "*B A"]
    rewards: Float[Array, "*B"]
    next_observations: Float[Array, "*B O"]
    terminated: Bool[Array, "*B"]


class Preferences(struct.PyTreeNode):
    """Labelled pairs. The segments' axes are [*B, 2, T, ...]; a label is P(the second segment is preferred)."""

    segments: Segments
    labels: Float[Array, "*B"]


class Windows(struct.PyTreeNode):
    """Up to T successive steps of an episode, the last at the end: what a policy with a memory learns from and acts on.

    Where `mask` is False there was no step: the window begins later. Nothing may depend on what is held there.

    Attributes:
        returns_to_go: rewards from each step to the end of its episode, summed.
        steps: made before each step, since its episode began.
        mask: which of them are steps.
    """

    observations: Float[Array, "*B T O"]
    actions: Float[Array, "*B T A"]
    returns_to_go: Float[Array, "*B T"]
    steps: Int[Array, "*B T"]
    mask: Bool[Array, "*B T"]


class WindowPreferences(struct.PyTreeNode):
    """Labelled pairs of windows, with axes [*B, 2, T, ...], and windows that nobody labelled, if there are any."""

    windows: Windows
    labels: Float[Array, "*B"]
    unlabelled: Windows | None = None


class Rankings(struct.PyTreeNode):
    """Ranked sets of K segments, best first. The segments' axes are [*B, K, T, ...]."""

    segments: Segments
