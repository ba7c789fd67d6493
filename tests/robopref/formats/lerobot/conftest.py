"""Small datasets: of our own making, and as lerobot itself recorded them.

`recorded.zip` holds one dataset from lerobot 0.3.3 (`v2.1/`) and one from lerobot 0.4.4 (`v3.0/`), both recorded with
`LeRobotDataset.create`, `add_frame` and `save_episode` from the same made-up numbers. In episode e, of 3 + e steps at
10 frames per second, with task "task e", at step t:

    observation.state = [0, 1, 2] + 10 e + t    observation.environment_state = [t / 2]    action = [t / 4, -t / 4]
    next.reward = t + e    next.done = t is the last    next.success = t is the last and e is 1
    observation.images.top (video, 64 x 96) all [40 + 40 t, 200 - 60 e, 90]
    observation.images.wrist (image, 8 x 10) all 10 t + e
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from robopref.formats.lerobot import write_lerobot
from robopref.types import Episode

SIZE, ACTIONS = 5, 2


def film(steps: int, height: int = 48, width: int = 64, shift: int = 0) -> np.ndarray:
    """Frames that move, without fine detail: uint8 [steps, height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    waves = [
        np.stack([np.sin((x + 3 * t + shift) / 17), np.cos((y + 2 * t) / 23), np.sin((x + y) / 31)], axis=-1)
        for t in range(steps)
    ]
    return np.round(128 + 100 * np.array(waves)).astype(np.uint8)


def make_episode(index: int, steps: int) -> Episode:
    rng = np.random.default_rng(index)
    return Episode(
        observations=rng.normal(size=(steps + 1, SIZE)),
        actions=rng.normal(size=(steps, ACTIONS)).astype(np.float32),
        rewards=rng.normal(size=steps),
        terminated=index % 2 == 0,
        truncated=index % 3 == 0,
        infos={
            "success": np.arange(steps + 1) >= steps - index % 2,
            "force": rng.normal(size=(steps + 1, 2, 3)).astype(np.float32),
            "grip": rng.integers(-(2**62), 2**62, (steps + 1, 1)),
            "distance": np.append(rng.normal(size=steps), np.nan),
        },
        states=rng.normal(size=(steps + 1, 4)),
        seed=index if index else None,
        origin={"behaviour": "reach", "scale": 0.1 * index, "task": f"task {index % 2}"},
    )


@pytest.fixture
def episodes() -> list[Episode]:
    return [make_episode(index, steps) for index, steps in enumerate((5, 1, 8, 3))]


@pytest.fixture
def films(episodes: list[Episode]) -> dict[str, list[np.ndarray]]:
    """What two cameras saw; the last frame repeats the one before, as it does when it is read again."""
    cameras = {"front": (48, 64), "observation.wrist": (32, 36)}
    seen = {
        name: [film(len(episode) + 1, *size, shift=30 * index) for index, episode in enumerate(episodes)]
        for name, size in cameras.items()
    }
    for each in seen.values():
        for frames in each:
            frames[-1] = frames[-2]
    return seen


@pytest.fixture
def write(tmp_path: Path, episodes: list[Episode]) -> Callable[..., Path]:
    """Writes the episodes with some arguments changed; returns the folder."""

    def write_changed(name: str = "dataset", **changes: Any) -> Path:
        path = tmp_path / name
        arguments: dict[str, Any] = {
            "episodes": iter(episodes),
            "fps": 10,
            "observation_space": gymnasium.spaces.Box(-np.inf, np.inf, (SIZE,), np.float64),
            "action_space": gymnasium.spaces.Box(-1, 1, (ACTIONS,), np.float32),
            "env": {"name": "toy", "horizon": 9},
            "keys": {"state": 3, "environment_state": 2},
        }
        write_lerobot(path, **arguments | changes)
        return path

    return write_changed


@pytest.fixture
def readers(films: dict[str, list[np.ndarray]]) -> dict[str, Callable[[int], np.ndarray]]:
    """The films as the writer takes them."""
    return {name: seen.__getitem__ for name, seen in films.items()}


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[str], Path]:
    """Unpacks what lerobot recorded, by its version."""

    def unpack(version: str) -> Path:
        with zipfile.ZipFile(Path(__file__).with_name("recorded.zip")) as archive:
            archive.extractall(tmp_path / "recorded", [name for name in archive.namelist() if name.startswith(version)])
        return tmp_path / "recorded" / version

    return unpack
