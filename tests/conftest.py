"""What several test files share: a tiny task with known values, and a few episodes of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import pytest

from robopref.compilation import keep_compiled_programs
from robopref.episodes import EpisodeDataset, load_episodes, write_episodes
from robopref.types import Episode

# Most of the tests' time goes into compiling: what one process compiled is there for the others, and for the next time.
keep_compiled_programs()

REACH = 0.15
"""How far one action moves the point along each axis."""


SEEDS = (2, 3, 4, 5, 7, 9, 11, 12)
"""Of episodes in which the goal is some way off."""


class PointSimulator:
    """A point in the plane that is to reach a goal; a reward is minus the distance (along both axes) that is left.

    The observation is [x, y, goal x, goal y, 1], the state [x, y, goal x, goal y]. An episode terminates at the goal.
    """

    def __init__(self) -> None:
        self._place = np.zeros(4)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        self._place = np.random.default_rng(seed).uniform(-1, 1, 4)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._place[:2] += REACH * np.clip(action, -1, 1)
        distance = float(np.abs(self._place[2:] - self._place[:2]).sum())
        return self._observation(), -distance, distance < 0.1, False, {}

    def get_state(self) -> np.ndarray:
        return self._place.copy()

    def set_state(self, state: np.ndarray) -> np.ndarray:
        self._place = state.copy()
        return self._observation()

    def _observation(self) -> np.ndarray:
        return np.append(self._place, 1.0)


class PointExpert:
    """The optimal policy: along both axes straight to the goal."""

    def start(self, seeds: np.ndarray) -> None:
        return None

    def step(self, carry: None, observations: np.ndarray) -> tuple[np.ndarray, None]:
        return np.clip((observations[:, 2:4] - observations[:, :2]) / REACH, -1, 1), carry

    def describe(self, seed: int) -> Mapping[str, str | float]:
        return {"behaviour": "expert"}


class PointTask:
    """The simulator, its expert, and the optimal values in closed form."""

    make_simulator = PointSimulator
    expert = PointExpert()
    discount = 0.9

    def values(self, observations: np.ndarray) -> np.ndarray:
        """V*: after k steps of the expert, each axis has REACH * k less to go, down to 0."""
        left = np.abs(observations[..., 2:4] - observations[..., :2])
        steps = np.arange(1, 40)
        rewards = -np.maximum(left[..., None] - REACH * steps, 0).sum(axis=-2)
        return np.asarray(rewards @ self.discount ** (steps - 1.0))


def point_episode(seed: int, *, skilled: bool, limit: int) -> Episode:
    rng, simulator, expert = np.random.default_rng(1000 + seed), PointSimulator(), PointExpert()
    observations, states = [simulator.reset(seed=seed)[0]], [simulator.get_state()]
    actions, rewards, terminated = [], [], False
    while len(actions) < limit and not terminated:
        wanted = expert.step(None, observations[-1][None])[0][0] if skilled else np.zeros(2)
        action = np.clip(wanted + rng.normal(0, 0.2 if skilled else 0.7, 2), -1, 1).astype(np.float32)
        observation, reward, terminated, _, _ = simulator.step(action)
        observations.append(observation)
        states.append(simulator.get_state())
        actions.append(action)
        rewards.append(reward)
    return Episode(
        observations=np.stack(observations),
        actions=np.stack(actions),
        rewards=np.array(rewards),
        terminated=terminated,
        truncated=not terminated,
        states=np.stack(states),
        seed=seed,
        origin={"behaviour": "skilled" if skilled else "careless"},
    )


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """A process keeps every program that it compiled: without this, those of all tests would take 5 GB."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def point() -> PointTask:
    return PointTask()


@pytest.fixture(scope="session")
def episodes() -> list[Episode]:
    """Of different lengths; episode 2 i is a skilled one and 2 i + 1 a careless one from the same first state."""
    return [point_episode(seed, skilled=skilled, limit=6 + seed) for seed in SEEDS for skilled in (True, False)]


@pytest.fixture(scope="session")
def dataset(episodes: list[Episode], tmp_path_factory: pytest.TempPathFactory) -> EpisodeDataset:
    """`episodes`, written and loaded."""
    path: Path = tmp_path_factory.mktemp("episodes") / "point"
    write_episodes(
        path,
        episodes,
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (5,), np.float64),
        action_space=gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32),
        env={"name": "point"},
    )
    return load_episodes(path)


@pytest.fixture
def human_archive() -> Callable[[str], Path]:
    """Finds a file of the published human labels where ROBOPREF_DATA says, or in shared/data in or above the checkout.

    The test is skipped where it is not.
    """

    def find(name: str) -> Path:
        root, given = Path(__file__).resolve().parent.parent, os.environ.get("ROBOPREF_DATA")
        places = [Path(given)] if given else [place / "shared" / "data" for place in (root, *root.parents)]
        for folder in (folder for place in places for folder in (place, place / "human_preferences")):
            if (folder / name).is_file():
                return folder / name
        pytest.skip(
            f"{name} is not here; set ROBOPREF_DATA to a copy of datasets/preference_transformer of the"
            " inverse-preference-learning repository"
        )

    return find
