"""Reads LeRobot datasets, versions 2.0, 2.1 and 3.0, an episode at a time."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from robopref.formats.lerobot import layout
from robopref.formats.lerobot.aside import Aside, row
from robopref.formats.lerobot.index import (
    endless,
    read_fps,
    read_index,
    read_splits,
    read_tasks,
    read_version,
    stats_bounds,
)
from robopref.formats.lerobot.layout import Feature
from robopref.formats.lerobot.parquet import ParquetTable, column, to_numpy
from robopref.formats.lerobot.video import read_frames
from robopref.types import Episode, EpisodeSource

MAX_BYTES = 2**32
"""The most memory that one array may take, unless the caller allows for more."""

STATE = "robopref.state"
"""The feature in which our writer keeps simulator states."""

_ENDS = ("next.reward", "next.done", "next.truncated", "next.terminated")
_PICTURES = ("PNG", "JPEG")


class LeRobotSource(EpisodeSource):
    """Episodes of a LeRobot dataset; see `robopref.types.EpisodeSource`, whose contract this keeps.

    What becomes of the features: `action` is the action, in the rig's own units; vectors among `observation.*` are the
    observation; `next.reward` is the reward, 0 where there is none. Other `next.*`, such as `next.success`, are infos
    of the state that the step led to, 0 on reset; all other features of numbers are infos of the state in which the
    step was taken, the last row repeated, except that `timestamp` goes on by a period. Text is left out, but the task
    of an episode is `origin["task"]`; several are joined by " / ", and `infos["task_of_frame"]` says which was when.

    An episode ended in a state of its own if `next.terminated` says so in its last frame, or where that is missing, if
    `next.done` does and `next.truncated` does not. What says nothing of its end was cut off.

    Bounds of actions are those of the dataset's statistics, infinite where it has none.

    Attributes:
        path: the dataset's folder.
        version: "v2.0", "v2.1" or "v3.0".
        fps: frames per second.
        robot_type: as the dataset names it, empty if it does not.
        lengths: the steps T of each episode.
        tasks: text by `task_index`.
    """

    def __init__(self, path: str | os.PathLike[str], *, keys: Sequence[str] | None, max_bytes: int) -> None:
        self.path = Path(path)
        self._max_bytes = max_bytes
        place = self.path / layout.INFO
        if not place.is_file():
            raise FileNotFoundError(f"there is no LeRobot dataset at {self.path}: {place} does not exist.")
        info = layout.load_json(layout.inside(self.path, layout.INFO))
        self.version = read_version(info, place)
        self.fps = read_fps(info, place)
        self.robot_type = str(info.get("robot_type") or "")
        self._features = layout.parse_features(info, place)
        self._index = read_index(self.path, info, self._features)
        self.lengths = self._index.lengths
        self.tasks = read_tasks(self.path, self.version)
        aside = Aside(self.path, len(self)) if os.path.lexists(self.path / layout.OURS) else None
        self._aside = aside
        self.env = aside.env if aside else {}
        self.description = aside.description if aside else ""
        self.splits = aside.splits if aside and aside.splits else read_splits(info, len(self), place)
        self.cameras = {
            each.name: (each.shape[0], each.shape[1], 3) for each in self._features.values() if each.is_camera
        }
        self.keys = self._choose_keys(keys, place)
        self.observation_space, self.action_space = self._spaces(place)
        self._infos = self._choose_infos()
        self._columns = self._choose_columns(place)
        self._file: tuple[Path, ParquetTable] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def close(self) -> None:
        """Closes the file that was read last; the source can still be used."""
        if self._file is not None:
            self._file[1].close()
            self._file = None

    def episode(self, index: int) -> Episode:
        """Episode `index`, without images.

        Raises:
            IndexError: there is no such episode.
            ValueError: the dataset is damaged there; the message names file and episode.
        """
        self.check_index(index)
        with _naming(index):
            frames = self._frames_table(index, self._columns)
            own = self._aside.episode(index, len(frames["action"])) if self._aside else None
            return self._assemble(frames, own)

    def frames(self, index: int, camera: str) -> UInt8[np.ndarray, "T+1 H W 3"]:
        """What a camera saw during an episode, in RGB; the last frame is repeated like the last observation.

        A video is decoded between the first and the last frame of the episode only.

        Raises:
            IndexError: there is no such episode.
            ValueError: there is no such camera, or the dataset is damaged there.
        """
        self.check_index(index)
        if camera not in self.cameras:
            known = ", ".join(self.cameras) or "none at all"
            raise ValueError(f"{self.path} has no camera {camera!r}; its cameras are: {known}.")
        feature, length = self._features[camera], int(self.lengths[index])
        with _naming(index):
            taken = (length + 1) * math.prod(self.cameras[camera])
            if taken > self._max_bytes:
                raise ValueError(
                    f"{length} frames of {camera!r} would take {taken} bytes, and no more than {self._max_bytes} are "
                    "allowed; raise max_bytes if the dataset is to be trusted."
                )
            return self._video(index, feature) if feature.dtype == "video" else self._images(index, feature)

    def _choose_keys(self, keys: Sequence[str] | None, place: Path) -> dict[str, int]:
        vectors = [
            each.name
            for each in self._features.values()
            if re.match(r"observation(\.|$)", each.name) and each.is_numeric and len(each.shape) == 1
        ]
        if keys is None:
            keys = list(self._aside.bounds) if self._aside else vectors
        wrong = [key for key in keys if key not in vectors]
        if wrong or not keys or len(set(keys)) < len(keys):
            fault = f"{wrong[0]!r} is none of them" if wrong else "each can be chosen once"
            raise ValueError(
                f"{place} has these observation vectors: {', '.join(vectors) or 'none'}; "
                f"{fault if keys else 'at least one is needed'}."
            )
        return {key: self._features[key].size for key in keys}

    def _spaces(self, place: Path) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Box]:
        action = self._features.get("action")
        if action is None or not action.is_numeric or len(action.shape) != 1:
            raise ValueError(f"{place} has no feature 'action' that is a vector of numbers.")
        types = [np.dtype(self._features[key].dtype) for key in self.keys]
        aside = self._aside
        if aside:
            chosen = [aside.bounds[key] if key in aside.bounds else endless(size) for key, size in self.keys.items()]
            sizes = [each.shape[1] for each in (*chosen, aside.action_bounds)]
            if sizes != [*self.keys.values(), action.size]:
                raise ValueError(f"{self.path / layout.OURS} gives bounds of other sizes than the dataset's vectors.")
            observation_bounds, action_bounds = np.concatenate(chosen, axis=1), aside.action_bounds
        else:
            observation_bounds = np.concatenate([endless(size) for size in self.keys.values()], axis=1)
            action_bounds = stats_bounds(self.path, self.version, action.size)
        return _box(observation_bounds, _float_type(*types), place), _box(
            action_bounds, _float_type(np.dtype(action.dtype)), place
        )

    def _choose_infos(self) -> dict[str, str]:
        """Name of an info to its feature."""
        passed_over = {*layout.BOOKKEEPING, *self.keys, *_ENDS, "action", STATE} - {"timestamp"}
        numeric = [each.name for each in self._features.values() if each.is_numeric and each.name not in passed_over]
        named = {}
        for name in numeric:
            short = name.removeprefix("next.")
            named[name if short in self._features or not short else short] = name
        return named

    def _choose_columns(self, place: Path) -> list[str]:
        bookkeeping = [name for name in layout.BOOKKEEPING if name not in ("timestamp", "frame_index", "index")]
        for name in (*bookkeeping, "timestamp"):
            if name not in self._features or self._features[name].shape != (1,) or not self._features[name].is_numeric:
                raise ValueError(f"{place} lacks the feature {name!r}, which every LeRobot dataset has.")
        for name in _ENDS:
            if name in self._features and (self._features[name].size, self._features[name].is_numeric) != (1, True):
                raise ValueError(f"{place}: the feature {name!r} is not one number per frame.")
        optional = [name for name in (*_ENDS, STATE) if name in self._features and self._features[name].is_numeric]
        return [*bookkeeping, *self.keys, "action", *optional, *self._infos.values()]

    def _open(self, path: Path) -> ParquetTable:
        if self._file is None or self._file[0] != path:
            self.close()
            self._file = path, ParquetTable(path)
        return self._file[1]

    def _frames_table(self, index: int, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of the frames of an episode, [T, *shape]."""
        rows = self._index.rows(index)
        features = [self._features[name] for name in columns]
        taken = int(self.lengths[index]) * sum(each.size * np.dtype(each.dtype).itemsize for each in features)
        if taken > self._max_bytes:
            raise ValueError(
                f"{rows.path}: {self.lengths[index]} steps would take {taken} bytes, and no more than "
                f"{self._max_bytes} are allowed; raise max_bytes if the dataset is to be trusted."
            )
        file = self._open(rows.path)
        sizes = {each.name: each.size for each in features}
        parts: dict[str, list[np.ndarray]] = {name: [] for name in columns}
        for batch in file.batches(rows, columns, sizes):
            for each in features:
                parts[each.name].append(to_numpy(column(batch, each.name), each, rows.path))
        table = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        if (table.get("episode_index", np.array(index)) != index).any():
            raise ValueError(f"{rows.path} has frames of another episode in its place; restore the dataset's files.")
        return table

    def _assemble(self, frames: Mapping[str, np.ndarray], own: Mapping[str, Any] | None) -> Episode:
        final, initial = (own["final"], own["initial"]) if own else ({}, {})

        def closed(name: str) -> np.ndarray:
            """Rows of a feature with one more: what our own writer put aside, or the last again."""
            rows = frames[name]
            last = row(final[name], self._features[name]) if name in final else rows[-1:]
            return np.concatenate([rows, last])

        observations = np.concatenate([closed(key) for key in self.keys], axis=1)
        infos = {}
        for info, name in self._infos.items():
            rows = frames[name]
            feature = self._features[name]
            if name.startswith("next."):
                first = row(initial[info], feature) if info in initial else np.zeros_like(rows[:1])
                values = np.concatenate([first, rows])
            else:
                values = closed(name)
            if name == "timestamp" and name not in final:
                values[-1] = values[-2] + 1 / self.fps
            infos[info] = self._shaped(info, values)
        tasks = frames["task_index"].ravel()
        task, several = self._task(tasks)
        if several:
            infos["task_of_frame"] = np.append(tasks, tasks[-1])
        action_type = _float_type(frames["action"].dtype)
        rewards = frames["next.reward"].ravel() if "next.reward" in frames else np.zeros(len(tasks), np.float32)
        ends = {name: bool(frames[name].ravel()[-1]) for name in _ENDS[1:] if name in frames}
        truncated = ends.get("next.truncated")
        terminated = ends.get("next.terminated", ends.get("next.done", False) and not truncated)
        origin: dict[str, str | float] = {"task": task}
        origin |= own["origin"] if own else {"final_observation": "repeated"}
        return Episode(
            observations=observations.astype(_float_type(observations.dtype), copy=False),
            actions=frames["action"].astype(action_type, copy=False),
            rewards=rewards.astype(_float_type(rewards.dtype), copy=False),
            terminated=terminated,
            truncated=not terminated if truncated is None else truncated,
            infos=infos,
            states=closed(STATE) if STATE in frames else None,
            seed=own["seed"] if own else None,
            origin=origin,
        )

    def _shaped(self, info: str, values: np.ndarray) -> np.ndarray:
        """An info in the shape that it had before it was written, scalars without an axis of their own."""
        shape = self._aside.shapes.get(info) if self._aside else None
        if shape is None:
            shape = [] if values.shape[1:] == (1,) else list(values.shape[1:])
        if int(np.prod(shape)) * len(values) != values.size:
            raise ValueError(f"{self.path / layout.OURS} gives the info {info!r} the shape {shape}, which is wrong.")
        return values.reshape(len(values), *shape)

    def _task(self, indices: Int[np.ndarray, " T"]) -> tuple[str, bool]:
        used = list(dict.fromkeys(indices.tolist()))
        unknown = [each for each in used if each not in self.tasks]
        if unknown:
            raise ValueError(f"{self.path} has frames of task {unknown[0]}, which its list of tasks lacks.")
        return " / ".join(self.tasks[each] for each in used), len(used) > 1

    def _video(self, index: int, feature: Feature) -> UInt8[np.ndarray, "T+1 H W 3"]:
        table = self._frames_table(index, ["episode_index", "timestamp"])
        path, offset = self._index.video(index, feature.name)
        times = offset + table["timestamp"].ravel().astype(np.float64)
        if not np.isfinite(times).all():
            raise ValueError(f"{path} cannot be read: the frames' timestamps are not all finite.")
        return read_frames(path, np.append(times, times[-1]), feature.shape, tolerance=0.5 / self.fps)

    def _images(self, index: int, feature: Feature) -> UInt8[np.ndarray, "T+1 H W 3"]:
        rows = self._index.rows(index)
        images = np.empty((int(self.lengths[index]) + 1, *self.cameras[feature.name]), np.uint8)
        # One row at a time: nothing says how large an image is before it is there.
        batches = self._open(rows.path).batches(rows, [feature.name], {}, batch_size=1)
        for step, batch in enumerate(batches):
            images[step] = _decode_image(column(batch, feature.name)[0].as_py(), feature, rows.path)
        images[-1] = images[-2]
        return images


def read_lerobot(
    path: str | os.PathLike[str], *, keys: Sequence[str] | None = None, max_bytes: int = MAX_BYTES
) -> LeRobotSource:
    """Opens a LeRobot dataset.

    Args:
        path: its folder.
        keys: the features that are joined to the observation, in this order; all vectors among `observation.*` in the
            order of `info.json` unless given, or as they were joined if robopref wrote the dataset. Those left out are
            infos.
        max_bytes: the most memory that the vectors of an episode, or the frames of a camera in it, may take.

    Raises:
        FileNotFoundError: there is no such folder, or no dataset in it.
        ValueError: the dataset is of another version or damaged, or there is no such key.
    """
    return LeRobotSource(path, keys=keys, max_bytes=max_bytes)


def _box(bounds: Float[np.ndarray, "2 n"], dtype: np.dtype[Any], place: Path) -> gymnasium.spaces.Box:
    low, high = bounds.astype(dtype)
    if not (low <= high).all():
        raise ValueError(f"{place.parent} has bounds of which the lower is above the upper.")
    return gymnasium.spaces.Box(low, high, dtype=dtype.type)


def _float_type(*types: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which numbers of these types are joined: floating, as all that is learned from."""
    joined = np.result_type(*types)
    return joined if joined.kind == "f" else np.result_type(joined, np.float32)


def _decode_image(value: Any, feature: Feature, path: Path) -> UInt8[np.ndarray, "H W 3"]:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError(f"{path}: the column {feature.name!r} does not hold images themselves; embed them.")
    try:
        with Image.open(io.BytesIO(data), formats=_PICTURES) as image:
            if image.size != (feature.shape[1], feature.shape[0]):
                raise ValueError(
                    f"it shows {image.size[1]}x{image.size[0]} pixels where the dataset says "
                    f"{feature.shape[0]}x{feature.shape[1]}"
                )
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: an image of {feature.name!r} cannot be used ({error}).") from error


@contextmanager
def _naming(index: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"episode {index} cannot be read: {error}") from error
