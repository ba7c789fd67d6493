"""Writes LeRobot datasets, versions 2.1 and 3.0, an episode at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import gymnasium
import numpy as np
from jaxtyping import Int, UInt8

from robopref.episodes import flat_box
from robopref.files import atomic_folder, write_json
from robopref.formats.lerobot import layout
from robopref.formats.lerobot.aside import line, slices, write_aside
from robopref.formats.lerobot.layout import Feature
from robopref.formats.lerobot.reader import STATE
from robopref.formats.lerobot.sinks import EpisodeRows, Sink, Sink2, Sink3
from robopref.formats.lerobot.stats import image_stats, vector_stats
from robopref.formats.lerobot.video import CODECS, PIXEL_FORMAT
from robopref.types import Episode

FrameReader: TypeAlias = Callable[[int], UInt8[np.ndarray, "T+1 H W 3"]]
"""Gives what a camera saw during an episode."""

_TOLERANCE = 1e-4
"""Seconds by which LeRobot lets a timestamp be off."""


def write_lerobot(
    path: str | os.PathLike[str],
    episodes: Iterable[Episode],
    *,
    fps: int,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    env: Mapping[str, Any],
    keys: Mapping[str, int] | None = None,
    splits: Mapping[str, Sequence[int] | Int[np.ndarray, " n"]] | None = None,
    frames: Mapping[str, FrameReader] | None = None,
    description: str = "",
    version: Literal["v2.1", "v3.0"] = "v3.0",
    task: str | None = None,
    robot_type: str | None = None,
    images: bool = False,
    codec: str = "libsvtav1",
) -> None:
    """Writes a new dataset, atomically: after an error there is nothing at `path`. Holds one episode at a time.

    Numbers keep their types and bits, but videos are lossy. All episodes must have the same infos, of the same types:
    the first one's hold. `infos["success"]` becomes the feature `next.success`, simulator states `robopref.state`,
    other infos features of their names. The last frame of a camera, of the final observation, is not stored.

    Args:
        path: a folder that does not exist yet.
        episodes: at least one, each of at least one step.
        fps: frames per second: how often the environment or the rig acts.
        observation_space: a flat Box.
        action_space: a flat Box; actions may exceed its bounds.
        env: how the environment was made; must have a JSON form.
        keys: names of the parts of an observation, with the size of each, in their order; `observation.` is put before
            those that lack it. One part, `observation.state`, unless given.
        splits: named subsets, as indices of episodes in ascending order. LeRobot sees those without gaps.
        frames: by camera, what gives its frames during an episode, by index. `observation.images.` is put before
            names that do not begin with `observation.`.
        description: free text.
        version: of the format.
        task: what the robot is to do, for episodes whose origin does not say so as "task".
        robot_type: the robot's name, as LeRobot knows it.
        images: keep the frames as PNG images, without loss, instead of as videos.
        codec: of videos: "libsvtav1", which is LeRobot's own choice, or "h264".

    Raises:
        ValueError: an argument or an episode cannot be stored; the message names the episode by its index.
        FileExistsError: `path` exists.
        OSError: the parent folder cannot be written to.
    """
    place = f"cannot write {path}"
    boxes = flat_box(observation_space, "observation", place), flat_box(action_space, "action", place)
    try:
        plan = _plan(version, fps, boxes, keys, frames or {}, images, codec)
        with atomic_folder(path) as folder:
            (folder / "meta").mkdir()
            content = _write_episodes(folder, episodes, plan, task)
            parts = _split_ranges(splits or {}, content.episodes)
            info = {
                "codebase_version": version,
                "robot_type": robot_type,
                "total_episodes": content.episodes,
                "total_frames": content.rows,
                "total_tasks": content.tasks,
                "chunks_size": layout.CHUNK_SIZE,
                "fps": fps,
                "splits": parts or {"train": f"0:{content.episodes}"},
                **content.info,
                "features": _listed(content.features, plan),
            }
            write_json(folder / layout.INFO, info)
            write_aside(
                folder,
                env=env,
                description=description,
                keys=plan.keys,
                observation_space=boxes[0],
                action_space=boxes[1],
                shapes=content.shapes,
                splits=splits or {},
            )
    except ValueError as error:
        raise ValueError(f"{place}: {str(error).rstrip('.')}.") from error


@dataclass(frozen=True)
class _Plan:
    """What is fixed before the first episode."""

    version: str
    fps: int
    keys: Mapping[str, int]
    action_size: int
    frames: Mapping[str, FrameReader]
    images: bool
    codec: str


class _Content(NamedTuple):
    """What is known after the last episode."""

    episodes: int
    rows: int
    tasks: int
    features: Mapping[str, Feature]
    shapes: Mapping[str, list[int]]
    info: Mapping[str, Any]


class _Columns(NamedTuple):
    """An episode as columns [T, *shape], and the rows that LeRobot has no place for."""

    columns: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    initial: dict[str, np.ndarray]
    shapes: dict[str, list[int]]


def _plan(
    version: str,
    fps: int,
    boxes: tuple[gymnasium.spaces.Box, gymnasium.spaces.Box],
    keys: Mapping[str, int] | None,
    frames: Mapping[str, FrameReader],
    images: bool,
    codec: str,
) -> _Plan:
    if version not in (layout.V21, layout.V30):
        raise ValueError(f"{version!r} is no version that is written; choose {layout.V21} or {layout.V30}")
    if type(fps) is not int or not 1 <= fps <= 1000:
        raise ValueError(f"fps is {fps!r}, and must be a whole number from 1 to 1000, as LeRobot has it")
    if codec not in CODECS:
        raise ValueError(f"{codec!r} is no codec that is written; choose {' or '.join(CODECS)}")
    observed, acted = (box.shape[0] for box in boxes)
    sizes = {"state": observed} if keys is None else keys
    if min(sizes.values(), default=0) < 1 or sum(sizes.values()) != observed:
        raise ValueError(f"the parts {dict(sizes)} do not make up an observation of {observed} numbers")
    named = {_prefixed(name, "observation."): size for name, size in sizes.items()}
    cameras = {_prefixed(name, "observation.images."): frame for name, frame in frames.items()}
    for name in (*named, *cameras):
        _check_name(name, is_camera=name in cameras)
    if len({*named, *cameras}) < len(sizes) + len(frames):
        raise ValueError(f"two features would have the same name, among {', '.join((*sizes, *frames))}")
    return _Plan(version, fps, named, acted, cameras, images, codec)


def _prefixed(name: str, prefix: str) -> str:
    return name if name.startswith("observation.") else prefix + name


def _check_name(name: str, *, is_camera: bool = False) -> None:
    if not name or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is no name of a feature: it must not be empty nor contain a slash")
    if "image" in name and not is_camera:
        raise ValueError(
            f"{name!r} is no name of a vector, as LeRobot takes all with 'image' in it for images; rename it"
        )


def _write_episodes(folder: Path, episodes: Iterable[Episode], plan: _Plan, task: str | None) -> _Content:
    """Writes everything but what describes the whole dataset."""
    tasks: dict[str, int] = {}
    features: dict[str, Feature] = {}
    shapes: dict[str, list[int]] = {}
    count = rows = 0
    is_new = plan.version == layout.V30
    make: type[Sink] = Sink3 if is_new else Sink2
    sink = make(folder, () if plan.images else tuple(plan.frames), plan.fps, plan.codec)
    with sink, open(folder / layout.OURS_EPISODES, "w", encoding="utf-8") as aside:
        for episode in episodes:
            try:
                parts = _columns(episode, plan)
                films = {name: _film(name, frames(count), len(episode)) for name, frames in plan.frames.items()}
                found = _features(parts.columns, films, plan)
                if not count:
                    features, shapes = found, parts.shapes
                elif (found, parts.shapes) != (features, shapes):
                    raise ValueError(_difference(found, features, parts.shapes, shapes))
                text = _task(episode, task)
                columns = parts.columns | {
                    "timestamp": _timestamps(parts.columns.get("timestamp"), plan.fps, len(episode)),
                    "frame_index": np.arange(len(episode)),
                    "episode_index": np.full(len(episode), count),
                    "index": np.arange(rows, rows + len(episode)),
                    "task_index": np.full(len(episode), tasks.setdefault(text, len(tasks))),
                }
                stats = {name: vector_stats(values, quantiles=is_new) for name, values in columns.items()}
                stats |= {name: image_stats(film, quantiles=is_new) for name, film in films.items()}
                sink.add(EpisodeRows(count, text, columns, films, stats))
                aside.write(line(count, episode, parts.final, parts.initial) + "\n")
            except ValueError as error:
                raise ValueError(f"episode {count}: {error}") from error
            count, rows = count + 1, rows + len(episode)
        if not count:
            raise ValueError("there are no episodes to store")
        info = sink.finish(tasks)
    return _Content(count, rows, len(tasks), features, shapes, info)


def _columns(episode: Episode, plan: _Plan) -> _Columns:
    length = len(episode.actions)
    if not length:
        raise ValueError("it has no steps")
    observations = _array("observations", episode.observations, (length + 1, sum(plan.keys.values())))
    actions = _array("actions", episode.actions, (length, plan.action_size))
    rewards = _array("rewards", episode.rewards, (length,))
    result = _Columns({}, {}, {}, {})

    def keep(name: str, values: np.ndarray) -> None:
        result.columns[name], result.final[name] = values[:-1], values[-1:]

    for key, part in slices(plan.keys).items():
        keep(key, observations[:, part])
    result.columns["action"] = actions
    last = np.arange(length) == length - 1
    ended = episode.terminated or episode.truncated
    result.columns["next.reward"] = rewards
    # LeRobot's recorder knows one end only; terminated and truncated together could not be told from it.
    for name, value in (("done", ended), ("truncated", episode.truncated), ("terminated", episode.terminated)):
        result.columns[f"next.{name}"] = last & value
    if episode.states is not None:
        keep(STATE, np.asarray(episode.states))
    for info, values in episode.infos.items():
        array = np.asarray(values)
        _check_info(info, array, length, {*result.columns, *plan.frames})
        result.shapes[info] = list(array.shape[1:])
        if info == "success":
            result.columns["next.success"], result.initial[info] = array.reshape(length + 1, -1)[1:], array[:1]
        else:
            keep(info, array.reshape(length + 1, -1))
    return result


def _array(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(value)
    if array.shape != shape:
        raise ValueError(f"it has {name} of shape {list(array.shape)} where {list(shape)} is needed")
    if array.dtype.kind != "f":
        raise ValueError(f"it has {name} of type {array.dtype} where floating numbers are needed")
    if not np.isfinite(array).all():
        raise ValueError(f"it has NaN or infinite {name}")
    return array


def _check_info(name: str, array: np.ndarray, length: int, taken: set[str]) -> None:
    if name in taken or name.startswith("next.") or name in {*layout.BOOKKEEPING} - {"timestamp"}:
        raise ValueError(f"it has an info called {name!r}, a name that LeRobot needs for itself; give it another")
    _check_name(name)
    if array.shape[:1] != (length + 1,) or not array.size:
        raise ValueError(f"it has the info {name!r} of shape {list(array.shape)}, without a row for each observation")
    if array.dtype.name not in layout.NUMBERS:
        raise ValueError(f"it has the info {name!r} of type {array.dtype}; only numbers and booleans can be stored")
    if name == "timestamp" and (array.ndim > 1 or array.dtype != np.float32):
        raise ValueError(
            f"it has timestamps of type {array.dtype} {list(array.shape[1:])} where LeRobot has one float32; convert "
            "them"
        )


def _features(columns: Mapping[str, np.ndarray], films: Mapping[str, np.ndarray], plan: _Plan) -> dict[str, Feature]:
    kind = "image" if plan.images else "video"
    found = {name: Feature(name, values.dtype.name, (_width(values),)) for name, values in columns.items()}
    return found | {name: Feature(name, kind, film.shape[1:]) for name, film in films.items()}


def _width(values: np.ndarray) -> int:
    return math.prod(values.shape[1:])


def _difference(
    found: Mapping[str, Feature],
    first: Mapping[str, Feature],
    shapes: Mapping[str, list[int]],
    first_shapes: Mapping[str, list[int]],
) -> str:
    """What sets an episode apart from the first, whose features hold for all."""
    for name in sorted({*found, *first}):
        here, there = found.get(name), first.get(name)
        if here is None or there is None:
            return f"it {'lacks' if here is None else 'has'} {name!r}, unlike the episodes before it"
        if here != there:
            return (
                f"it has {name!r} of {here.dtype} {list(here.shape)}, unlike {there.dtype} {list(there.shape)} in the "
                "episodes before it"
            )
    return f"it has infos of the shapes {shapes}, unlike {first_shapes} in the episodes before it"


def _task(episode: Episode, task: str | None) -> str:
    own = episode.origin.get("task", task)
    if not isinstance(own, str) or not own:
        raise ValueError("nothing says what the robot is to do; put it as 'task' in its origin, or give `task`")
    return own


def _timestamps(timestamps: np.ndarray | None, fps: int, length: int) -> np.ndarray:
    """Those of the episode, which must be such as LeRobot counts, or counted ones."""
    counted = np.arange(length) / fps
    if timestamps is None:
        return counted.astype(np.float32)
    times = timestamps.ravel()
    off = np.flatnonzero(~(np.abs(times - counted) <= _TOLERANCE + np.spacing(np.abs(times))))
    if off.size:
        raise ValueError(
            f"its timestamp {times[off[0]]:g} at step {off[0]} should be {counted[off[0]]:g} at {fps} frames per "
            "second, or LeRobot would not read it; leave out infos['timestamp'] to have frames counted"
        )
    return times


def _film(name: str, frames: np.ndarray, length: int) -> UInt8[np.ndarray, "T H W 3"]:
    film = np.asarray(frames)
    usable = film.dtype == np.uint8 and film.ndim == 4 and film.shape[3] == 3 and 0 not in film.shape
    if not usable or len(film) != length + 1 or max(film.shape[1:3]) > layout.MAX_SIDE:
        raise ValueError(
            f"its frames of {name!r} are {film.dtype} {list(film.shape)} where uint8 [{length + 1}, height, width, 3] "
            "is needed"
        )
    return film[:-1]


def _split_ranges(splits: Mapping[str, Sequence[int] | Int[np.ndarray, " n"]], count: int) -> dict[str, str]:
    """The splits that LeRobot can express, those without gaps."""
    ranges = {}
    for name, indices in splits.items():
        listed = [int(index) for index in np.asarray(indices)]
        if listed != sorted(set(listed)) or (listed and not 0 <= listed[0] <= listed[-1] < count):
            raise ValueError(f"the split {name!r} does not name some of the {count} episodes in ascending order")
        if listed and listed[-1] - listed[0] == len(listed) - 1:
            ranges[name] = f"{listed[0]}:{listed[-1] + 1}"
    return ranges


def _listed(features: Mapping[str, Feature], plan: _Plan) -> dict[str, Any]:
    """The features as `info.json` lists them."""
    listed: dict[str, Any] = {}
    for name, feature in features.items():
        entry: dict[str, Any] = {"dtype": feature.dtype, "shape": list(feature.shape), "names": None}
        if feature.is_camera:
            entry["names"] = ["height", "width", "channels"]
        elif feature.size > 1:
            entry["names"] = [f"{name.rpartition('.')[2]}_{index}" for index in range(feature.size)]
        if feature.dtype == "video":
            entry["info"] = {
                "video.height": feature.shape[0],
                "video.width": feature.shape[1],
                "video.codec": CODECS[plan.codec][0],
                "video.pix_fmt": PIXEL_FORMAT,
                "video.is_depth_map": False,
                "video.fps": plan.fps,
                "video.channels": 3,
                "has_audio": False,
            }
        listed[name] = entry
    return {name: entry for name, entry in listed.items() if name != "timestamp"} | layout.BOOKKEEPING
