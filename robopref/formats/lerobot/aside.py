"""What our own writer puts aside because LeRobot has no place for it, and how it is found again.

Two files, which LeRobot passes over: `meta/robopref.json` about the dataset and `meta/robopref_episodes.jsonl` with a
line for each episode. A dataset to which LeRobot has added episodes since has no lines for these; one from which it
took some no longer fits, which is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Float, Int

from robopref.files import write_json
from robopref.formats.lerobot import layout
from robopref.formats.lerobot.layout import Feature
from robopref.types import Episode

SCHEMA_VERSION = 1


class Aside:
    """What was put aside of a dataset.

    Attributes:
        bounds: of each part of an observation, [low, high], in the order of the parts.
        shapes: of each info, without the time axis.
        splits: as the writer was given them; empty if it was not.

    Raises:
        ValueError: the files are damaged, or of another dataset.
    """

    def __init__(self, root: Path, count: int) -> None:
        place = layout.inside(root, layout.OURS)
        value = layout.load_json(place)
        if value.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{place} has schema version {str(value.get('schema_version'))[:40]}; this robopref reads version "
                f"{SCHEMA_VERSION}."
            )
        try:
            self.env: dict[str, Any] = dict(value["env"])
            self.description = str(value["description"])
            self.bounds = {str(key): _bounds(pair) for key, pair in value["observation_bounds"].items()}
            self.action_bounds = _bounds(value["action_bounds"])
            self.shapes = {str(name): [int(side) for side in shape] for name, shape in value["infos"].items()}
            self.splits = {str(name): np.array(part, np.int64).reshape(-1) for name, part in value["splits"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"{place} is damaged ({error!r}); remove it to read the dataset without it.") from error
        if any(((part < 0) | (part >= count)).any() for part in self.splits.values()):
            raise ValueError(f"{place} splits off episodes that the dataset lacks; remove it to read without it.")
        self._path = layout.inside(root, layout.OURS_EPISODES)
        self._begins = [begin for begin, _ in layout.json_lines(self._path)]

    def episode(self, index: int, length: int) -> Mapping[str, Any] | None:
        """Seed, origin and rows of an episode; None of one that was added later.

        Raises:
            ValueError: the line is damaged, or of another episode.
        """
        if index >= len(self._begins):
            return None
        with open(self._path, "rb") as file:
            file.seek(self._begins[index])
            line = layout.parse_json(file.readline(layout.MAX_LINE), f"{self._path}, episode {index}")
        seed = line.get("seed")
        usable = all(isinstance(line.get(name), dict) for name in ("final", "initial", "origin"))
        if not usable or not (seed is None or type(seed) is int) or line.get("episode_index") != index:
            raise ValueError(f"{self._path} is damaged at episode {index}; remove {layout.OURS} to read without it.")
        if line.get("length") != length:
            raise ValueError(
                f"{self._path} is of another dataset: its episode {index} has {str(line.get('length'))[:40]} steps "
                f"instead of {length}; remove {layout.OURS} to read the dataset without it."
            )
        return line


def row(values: Any, feature: Feature) -> np.ndarray:
    """A row [1, *shape] that was put aside.

    Raises:
        ValueError: it is no such row.
    """
    try:
        kind = float if np.dtype(feature.dtype).kind == "f" else int
        return np.array([kind(value) for value in values], feature.dtype).reshape(1, *feature.shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{layout.OURS_EPISODES} has no usable row of {feature.name!r} ({error}).") from error


def write_aside(
    folder: Path,
    *,
    env: Mapping[str, Any],
    description: str,
    keys: Mapping[str, int],
    observation_space: gymnasium.spaces.Box,
    action_space: gymnasium.spaces.Box,
    shapes: Mapping[str, list[int]],
    splits: Mapping[str, Sequence[int] | Int[np.ndarray, " n"]],
) -> None:
    """Writes what is to be put aside of a dataset.

    Raises:
        ValueError: `env` has no JSON form.
    """
    low, high = observation_space.low, observation_space.high
    bounds = {key: [_numbers(low[part]), _numbers(high[part])] for key, part in slices(keys).items()}
    value = {
        "schema_version": SCHEMA_VERSION,
        "env": dict(env),
        "description": description,
        "observation_bounds": bounds,
        "action_bounds": [_numbers(action_space.low), _numbers(action_space.high)],
        "infos": dict(shapes),
        "splits": {name: np.asarray(indices).tolist() for name, indices in splits.items()},
    }
    write_json(folder / layout.OURS, value)


def line(index: int, episode: Episode, final: Mapping[str, np.ndarray], initial: Mapping[str, np.ndarray]) -> str:
    """What is to be put aside of an episode, as a line of JSON.

    Args:
        final: by feature, the row of the final observation.
        initial: by info, the row of the reset.

    Raises:
        ValueError: the episode's origin or seed has no JSON form.
    """
    value = {
        "episode_index": index,
        "length": len(episode),
        "seed": None if episode.seed is None else int(episode.seed),
        "origin": dict(episode.origin),
        "final": {name: _numbers(values) for name, values in final.items()},
        "initial": {name: _numbers(values) for name, values in initial.items()},
    }
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its origin has no JSON form ({error})") from error


def slices(keys: Mapping[str, int]) -> dict[str, slice]:
    """Where each part of an observation lies in it."""
    ends = np.cumsum([*keys.values()]).tolist()
    return {key: slice(end - size, end) for (key, size), end in zip(keys.items(), ends, strict=True)}


def _numbers(values: np.ndarray) -> list[float | str]:
    """Numbers for JSON, to the last bit; what has no JSON form is text."""
    return [
        str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for value in values.ravel().tolist()
    ]


def _bounds(pair: Any) -> Float[np.ndarray, "2 n"]:
    low, high = ([float(value) for value in side] for side in pair)
    return np.array([low, high])
