"""Where each episode of a LeRobot dataset lies, and what its lists say: tasks, splits, bounds of the actions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from robopref.formats.lerobot import layout
from robopref.formats.lerobot.layout import Feature
from robopref.formats.lerobot.parquet import ParquetTable, Rows, column, first_text, to_numpy


class EpisodeIndex(Protocol):
    """Where each episode lies."""

    lengths: Int[np.ndarray, " N"]

    def __init__(self, root: Path, info: Mapping[str, Any], features: Mapping[str, Feature]) -> None: ...
    def rows(self, index: int) -> Rows: ...
    def video(self, index: int, camera: str) -> tuple[Path, float]:
        """The file, and the time at which the episode begins in it."""
        ...


class Index2:
    """Versions 2.0 and 2.1: a file per episode."""

    def __init__(self, root: Path, info: Mapping[str, Any], features: Mapping[str, Feature]) -> None:
        self._root, self._info, self._place = root, info, root / layout.INFO
        self._chunk = _whole(info.get("chunks_size"), 1, "chunks_size", self._place)
        path = layout.inside(root, layout.EPISODES_2)
        lengths: dict[int, int] = {}
        for _, entry in layout.json_lines(path):
            index = _whole(entry.get("episode_index"), 0, "episode_index", path)
            lengths[index] = _whole(entry.get("length"), 1, f"length of episode {index}", path)
            if len(lengths) > layout.MAX_EPISODES:
                raise ValueError(f"{path} lists more than {layout.MAX_EPISODES} episodes.")
        _check_count(info, len(lengths), path)
        if max(lengths) >= len(lengths):
            raise ValueError(f"{path} lists {len(lengths)} episodes and episode {max(lengths)}, so some are missing.")
        self.lengths = np.array([lengths[index] for index in range(len(lengths))], np.int64)

    def rows(self, index: int) -> Rows:
        path = layout.inside(self._root, layout.expand(self._info.get("data_path"), self._values(index), self._place))
        return Rows(path, 0, int(self.lengths[index]), all=True)

    def video(self, index: int, camera: str) -> tuple[Path, float]:
        values = {**self._values(index), "video_key": camera}
        return layout.inside(self._root, layout.expand(self._info.get("video_path"), values, self._place)), 0.0

    def _values(self, index: int) -> dict[str, int | str]:
        return {"episode_chunk": index // self._chunk, "episode_index": index}


class Index3:
    """Version 3.0: many episodes in a file; `meta/episodes` says which and where."""

    def __init__(self, root: Path, info: Mapping[str, Any], features: Mapping[str, Feature]) -> None:
        self._root, self._info, self._place = root, info, root / layout.INFO
        videos = [each.name for each in features.values() if each.dtype == "video"]
        whole = ["episode_index", "data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index"]
        whole += [f"videos/{name}/{part}" for name in videos for part in ("chunk_index", "file_index")]
        types = {name: "int64" for name in whole} | {f"videos/{name}/from_timestamp": "float64" for name in videos}
        table = _read_table(root, "meta/episodes", types)
        _check_count(info, len(table["episode_index"]), root / "meta/episodes")
        order = np.argsort(table["episode_index"], kind="stable")
        self._table = {name: column[order] for name, column in table.items()}
        begins, ends = self._table["dataset_from_index"], self._table["dataset_to_index"]
        self.lengths = ends - begins
        counted = np.array_equal(self._table["episode_index"], np.arange(len(begins)))
        if not counted or (self.lengths < 1).any() or begins.min() < 0:
            raise ValueError(f"{root / 'meta/episodes'} does not list each episode once, with its first and last row.")
        files = np.stack([self._table["data/chunk_index"], self._table["data/file_index"]], axis=1)
        _, inverse = np.unique(files, axis=0, return_inverse=True)
        firsts = np.full(inverse.max() + 1, np.iinfo(np.int64).max)
        np.minimum.at(firsts, inverse.ravel(), begins)
        self._begins = begins - firsts[inverse.ravel()]

    def rows(self, index: int) -> Rows:
        values = self._values(index, "data")
        path = layout.inside(self._root, layout.expand(self._info.get("data_path"), values, self._place))
        begin = int(self._begins[index])
        return Rows(path, begin, begin + int(self.lengths[index]))

    def video(self, index: int, camera: str) -> tuple[Path, float]:
        values = {**self._values(index, f"videos/{camera}"), "video_key": camera}
        path = layout.inside(self._root, layout.expand(self._info.get("video_path"), values, self._place))
        return path, float(self._table[f"videos/{camera}/from_timestamp"][index])

    def _values(self, index: int, kind: str) -> dict[str, int | str]:
        return {name: int(self._table[f"{kind}/{name}"][index]) for name in ("chunk_index", "file_index")}


def read_index(root: Path, info: Mapping[str, Any], features: Mapping[str, Feature]) -> EpisodeIndex:
    """Where each episode lies, by the lists of the dataset's version.

    Raises:
        ValueError: the lists are damaged, or do not fit one another.
    """
    return (Index3 if info["codebase_version"] == layout.V30 else Index2)(root, info, features)


def read_version(info: Mapping[str, Any], place: Path) -> str:
    known = (layout.V20, layout.V21, layout.V30)
    found = info.get("codebase_version")
    if found not in known:
        raise ValueError(f"{place} is of version {str(found)[:40]!r}; this robopref reads {', '.join(known)}.")
    return str(found)


def read_fps(info: Mapping[str, Any], place: Path) -> float:
    fps = info.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 1e6:
        raise ValueError(f"{place} has {str(fps)[:40]!r} frames per second, which is no rate.")
    return fps


def read_splits(info: Mapping[str, Any], count: int, place: Path) -> dict[str, Int[np.ndarray, " n"]]:
    listed = info.get("splits") or {}
    splits = {}
    for name, text in listed.items() if isinstance(listed, dict) else [("", listed)]:
        ends = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text) if isinstance(text, str) else None
        if ends is None or not int(ends[1]) <= int(ends[2]) <= count:
            raise ValueError(f"{place} has the split {name[:80]!r}: {str(text)[:80]!r}, not episodes as 'first:end'.")
        splits[name] = np.arange(int(ends[1]), int(ends[2]))
    return splits


def read_tasks(root: Path, version: str) -> dict[int, str]:
    """The text of each task.

    Raises:
        ValueError: the list is damaged.
    """
    return _read_tasks_3(root) if version == layout.V30 else _read_tasks_2(root)


def stats_bounds(root: Path, version: str, size: int) -> Float[np.ndarray, "2 A"]:
    """Least and greatest actions that the statistics know of."""
    place = root / (layout.EPISODES_STATS_2 if version == layout.V21 else layout.STATS)
    if not place.exists():
        return endless(size)
    path = layout.inside(root, str(place.relative_to(root)))
    whole = version != layout.V21
    bounds = np.array([[np.inf], [-np.inf]]).repeat(size, axis=1)
    for stats in [layout.load_json(path)] if whole else (entry.get("stats") for _, entry in layout.json_lines(path)):
        try:
            action: Any = stats["action"] if stats else {}
            low, high = (np.array(action[name], np.float64).reshape(size) for name in ("min", "max"))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} has no usable min and max of the action ({error!r}).") from error
        bounds = np.stack([np.fmin(bounds[0], low), np.fmax(bounds[1], high)])
    # What no episode bounds is unbounded.
    unknown = ~(bounds[0] <= bounds[1])
    bounds[:, unknown] = endless(size)[:, unknown]
    return bounds


def endless(size: int) -> Float[np.ndarray, "2 n"]:
    return np.array([[-np.inf], [np.inf]]).repeat(size, axis=1)


def _read_tasks_2(root: Path) -> dict[int, str]:
    path = layout.inside(root, layout.TASKS_2)
    tasks = {}
    for _, entry in layout.json_lines(path):
        text = entry.get("task")
        if not isinstance(text, str):
            raise ValueError(f"{path} has a task that is not text: {str(text)[:80]!r}.")
        tasks[_whole(entry.get("task_index"), 0, "task_index", path)] = text
    return tasks


def _read_tasks_3(root: Path) -> dict[int, str]:
    path = layout.inside(root, layout.TASKS_3)
    file = ParquetTable(path)
    texts = [field.name for field in file.fields if _is_text(field.type)]
    if len(texts) != 1 or not 1 <= file.num_rows <= layout.MAX_EPISODES:
        raise ValueError(f"{path} is no list of tasks, with one column of text beside 'task_index'.")
    tasks: dict[int, str] = {}
    length = 0
    rows = Rows(path, 0, file.num_rows)
    index = Feature("task_index", "int64", (1,))
    # Pandas keeps the text as the index of its table, under a name of its own making. A row at a time, as a file can
    # repeat one long text without growing.
    columns = ["task_index", texts[0]]
    for batch in file.batches(rows, columns, {"task_index": 1}, batch_size=1, most=layout.MAX_JSON):
        text = first_text(batch, texts[0], path)
        number = int(to_numpy(column(batch, "task_index"), index, path)[0, 0])
        length += len(text or "")
        if text is None or length > layout.MAX_JSON:
            raise ValueError(f"{path} has a task without text." if text is None else f"{path} has too much text.")
        tasks[_whole(number, 0, "task_index", path)] = text
    return tasks


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _read_table(root: Path, folder: str, types: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Columns of numbers from all Parquet files of a folder, in the order of their names."""
    paths = sorted((root / folder).glob("*/*.parquet"))
    if not paths:
        raise ValueError(f"{root / folder} has no Parquet files; the dataset is incomplete: fetch it again.")
    parts: dict[str, list[np.ndarray]] = {name: [np.zeros(0, dtype)] for name, dtype in types.items()}
    count = 0
    for path in paths:
        path = layout.inside(root, str(path.relative_to(root)))
        file = ParquetTable(path)
        count += file.num_rows
        if count > layout.MAX_EPISODES:
            raise ValueError(f"{path} brings the number of episodes to {count}, which is too many.")
        rows = Rows(path, 0, file.num_rows)
        for batch in file.batches(rows, list(types), dict.fromkeys(types, 1)) if file.num_rows else ():
            for name, dtype in types.items():
                values = to_numpy(column(batch, name), Feature(name, dtype, (1,)), path)
                parts[name].append(values.ravel())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _whole(value: Any, least: int, name: str, place: Path) -> int:
    if type(value) is not int or not least <= value < 2**48:
        raise ValueError(f"{place}: {name} is {str(value)[:40]!r}, and must be a whole number of at least {least}.")
    return value


def _check_count(info: Mapping[str, Any], found: int, place: Path) -> None:
    if not found or info.get("total_episodes", found) != found:
        raise ValueError(
            f"{place} lists {found} episodes where {layout.INFO} counts {str(info.get('total_episodes'))[:40]}; "
            "restore both from the same place."
        )
