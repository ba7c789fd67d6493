"""The files of a LeRobot dataset that is being written, in the layout of version 2.1 and in that of version 3.0."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8
from PIL import Image

from robopref.formats.lerobot import layout
from robopref.formats.lerobot.stats import Stats, merged
from robopref.formats.lerobot.video import VideoFile

DATA_MEGABYTES, VIDEO_MEGABYTES = 100, 200
"""Sizes at which version 3 begins another file, as LeRobot has them."""

_MEGABYTE = 2**20
_LISTED_AT_ONCE = 100
_PANDAS = "2.3.3"
"""The version of pandas whose description of an index is followed."""
_IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class EpisodeRows:
    """An episode as LeRobot keeps it.

    Attributes:
        columns: of all features but cameras, [T, *shape], in the order of the table.
        films: what each camera saw; of which some become videos and the others images in the table.
        stats: of all features.
    """

    index: int
    task: str
    columns: Mapping[str, np.ndarray]
    films: Mapping[str, UInt8[np.ndarray, "T H W 3"]]
    stats: Mapping[str, Stats]

    def __len__(self) -> int:
        return len(self.columns["index"])


class Sink(Protocol):
    """Takes one episode after another, as a context manager, and knows what to write when there are no more."""

    def __init__(self, folder: Path, videos: Sequence[str], fps: int, codec: str) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def add(self, rows: EpisodeRows) -> None: ...
    def finish(self, tasks: Mapping[str, int]) -> dict[str, Any]:
        """Writes what is known at the end; returns what `info.json` says of this version alone."""
        ...


class Sink2:
    """Version 2.1: a file per episode, and lists of JSON lines."""

    def __init__(self, folder: Path, videos: Sequence[str], fps: int, codec: str) -> None:
        self._folder, self._videos, self._fps, self._codec = folder, videos, fps, codec
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is open between two episodes."""

    def add(self, rows: EpisodeRows) -> None:
        """Writes the files of an episode, and its lines."""
        place = {"episode_chunk": rows.index // layout.CHUNK_SIZE, "episode_index": rows.index}
        path = self._folder / layout.DATA_2.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_table(rows, self._videos, "frame_{:06d}.png"), path, write_page_checksum=True)
        for camera in self._videos:
            path = self._folder / layout.VIDEO_2.format(**place, video_key=camera)
            path.parent.mkdir(parents=True, exist_ok=True)
            film = rows.films[camera]
            video = VideoFile(path, film.shape[1:], self._fps, self._codec)
            try:
                video.add(film)
            except BaseException:
                video.abandon()
                raise
            video.close()
        own = {"episode_index": rows.index}
        self._append(layout.EPISODES_2, own | {"tasks": [rows.task], "length": len(rows)})
        self._append(layout.EPISODES_STATS_2, own | {"stats": _as_lists(rows.stats)})
        self._count += 1

    def finish(self, tasks: Mapping[str, int]) -> dict[str, Any]:
        """Writes the list of tasks."""
        for task, index in tasks.items():
            self._append(layout.TASKS_2, {"task_index": index, "task": task})
        return {
            "total_videos": self._count * len(self._videos),
            "total_chunks": -(-self._count // layout.CHUNK_SIZE),
            "data_path": layout.DATA_2,
            "video_path": layout.VIDEO_2 if self._videos else None,
        }

    def _append(self, path: str, value: Mapping[str, Any]) -> None:
        with open(self._folder / path, "a", encoding="utf-8") as file:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")


class Sink3:
    """Version 3.0: episodes after one another in files of limited size, and tables of where each is."""

    def __init__(self, folder: Path, videos: Sequence[str], fps: int, codec: str) -> None:
        self._folder, self._videos, self._fps, self._codec = folder, videos, fps, codec
        self._data: _Shards[_Table] = _Shards(DATA_MEGABYTES)
        self._films: dict[str, _Shards[VideoFile]] = {camera: _Shards(VIDEO_MEGABYTES) for camera in videos}
        self._lists: _Shards[_Table] = _Shards(DATA_MEGABYTES)
        self._waiting: list[dict[str, Any]] = []
        self._totals: dict[str, Stats] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.abandon()
        self._lists.abandon()
        for shards in self._films.values():
            shards.abandon()

    def add(self, rows: EpisodeRows) -> None:
        """Writes an episode into the files that are open, and puts it on the list."""
        table = _table(rows, self._videos, "frame-{:06d}.png")
        data = self._data.with_room(len(rows), lambda place: _Table(self._path(layout.DATA_3, place), table.schema))
        data.add(table)
        first = int(rows.columns["index"][0])
        listed = {
            "episode_index": rows.index,
            "tasks": [rows.task],
            "length": len(rows),
            **self._data.listed("data"),
            "dataset_from_index": first,
            "dataset_to_index": first + len(rows),
        }
        for camera in self._videos:
            listed |= self._add_film(camera, rows.films[camera])
        for name, stats in _as_lists(rows.stats).items():
            listed |= {f"stats/{name}/{statistic}": value for statistic, value in stats.items()}
        self._waiting.append(listed)
        if len(self._waiting) == _LISTED_AT_ONCE:
            self._list()
        self._totals = {
            name: merged(self._totals[name], stats) if self._totals else stats for name, stats in rows.stats.items()
        }

    def finish(self, tasks: Mapping[str, int]) -> dict[str, Any]:
        """Completes the files, and writes the lists of episodes and tasks and the statistics of all."""
        self._list()
        self._data.close()
        self._lists.close()
        for shards in self._films.values():
            shards.close()
        pq.write_table(_task_table(tasks), self._folder / layout.TASKS_3, write_page_checksum=True)
        path = self._folder / layout.STATS
        path.write_text(json.dumps(_as_lists(self._totals), indent=4, ensure_ascii=False), encoding="utf-8")
        return {
            "data_files_size_in_mb": DATA_MEGABYTES,
            "video_files_size_in_mb": VIDEO_MEGABYTES,
            "data_path": layout.DATA_3,
            "video_path": layout.VIDEO_3 if self._videos else None,
        }

    def _path(self, template: str, place: Mapping[str, int | str]) -> Path:
        path = self._folder / template.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _add_film(self, camera: str, film: UInt8[np.ndarray, "T H W 3"]) -> dict[str, Any]:
        """Writes the frames of a camera; returns what the list of episodes says of them."""
        shards = self._films[camera]

        def begin(place: Mapping[str, int]) -> VideoFile:
            path = self._path(layout.VIDEO_3, {**place, "video_key": camera})
            return VideoFile(path, film.shape[1:], self._fps, self._codec)

        video = shards.with_room(len(film), begin)
        first = video.frames
        video.add(film)
        kind = f"videos/{camera}"
        return {
            **shards.listed(kind),
            f"{kind}/from_timestamp": first / self._fps,
            f"{kind}/to_timestamp": video.frames / self._fps,
        }

    def _list(self) -> None:
        """Writes the episodes that wait into the tables of episodes."""
        if not self._waiting:
            return
        # Each row says in which file it is: that is settled before the rows are made.
        lists = self._lists.with_room(len(self._waiting), lambda place: _Table(self._path(layout.EPISODES_3, place)))
        lists.add(pa.Table.from_pylist([row | self._lists.listed("meta/episodes") for row in self._waiting]))
        self._waiting = []


class _File(Protocol):
    @property
    def size(self) -> int: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...


_AnyFile = TypeVar("_AnyFile", bound=_File)


class _Shards(Generic[_AnyFile]):
    """Files of limited size, of which one is open."""

    def __init__(self, megabytes: int) -> None:
        self._limit = megabytes * _MEGABYTE
        self._number = -1
        self._frames = 0
        self._file: _AnyFile | None = None

    def with_room(self, frames: int, begin: Callable[[Mapping[str, int]], _AnyFile]) -> _AnyFile:
        """The file that these many frames go to: a new one if, by the size of those before, they would not fit."""
        if self._file is not None and self._file.size * (1 + frames / self._frames) >= self._limit:
            self.close()
        if self._file is None:
            self._number, self._frames = self._number + 1, 0
            self._file = begin(self._place)
        self._frames += frames
        return self._file

    def listed(self, kind: str) -> dict[str, Any]:
        """Where the frames are, as the list of episodes says it."""
        return {f"{kind}/{name}": value for name, value in self._place.items()}

    def close(self) -> None:
        """Completes the file that is open."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def abandon(self) -> None:
        """Closes the file that is open, if there is one, as it is."""
        if self._file is not None:
            file, self._file = self._file, None
            file.abandon()

    @property
    def _place(self) -> dict[str, int]:
        chunk, file = divmod(self._number, layout.CHUNK_SIZE)
        return {"chunk_index": chunk, "file_index": file}


class _Table:
    """A Parquet file with a row group for each table that it is given; the first one's columns and types hold."""

    def __init__(self, path: Path, schema: pa.Schema | None = None) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = (
            pq.ParquetWriter(self._sink, schema, compression="snappy", write_page_checksum=True)
            if schema is not None
            else None
        )

    @property
    def size(self) -> int:
        return int(self._sink.tell())

    def add(self, table: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._sink, table.schema, compression="snappy", write_page_checksum=True)
        self._writer.write_table(table.cast(self._writer.schema))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._sink.close()

    def abandon(self) -> None:
        self.close()


def _table(rows: EpisodeRows, videos: Sequence[str], name: str) -> pa.Table:
    """The frames of an episode, with what the datasets package needs to know of their types."""
    arrays = {column: _vectors(values) for column, values in rows.columns.items()}
    types: dict[str, Any] = {column: _hub_type(values) for column, values in rows.columns.items()}
    for camera in sorted(rows.films.keys() - set(videos)):
        images = [{"bytes": _png(image), "path": name.format(index)} for index, image in enumerate(rows.films[camera])]
        arrays[camera] = pa.array(images, _IMAGE_TYPE)
        types[camera] = {"_type": "Image"}
    table = pa.table(arrays)
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": types}})})


def _vectors(values: np.ndarray) -> pa.Array:
    """A column of numbers, or of lists of one length."""
    flat, size = pa.array(np.ascontiguousarray(values).reshape(-1)), int(np.prod(values.shape[1:]))
    return flat if size == 1 else pa.FixedSizeListArray.from_arrays(flat, size)


def _hub_type(values: np.ndarray) -> dict[str, Any]:
    number, size = {"dtype": str(values.dtype), "_type": "Value"}, int(np.prod(values.shape[1:]))
    return number if size == 1 else {"feature": number, "length": size, "_type": "Sequence"}


def _png(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _as_lists(stats: Mapping[str, Stats]) -> dict[str, dict[str, Any]]:
    return {name: {statistic: value.tolist() for statistic, value in each.items()} for name, each in stats.items()}


def _task_table(tasks: Mapping[str, int]) -> pa.Table:
    """What pandas makes of a table `task_index` with the tasks as its index, which is how LeRobot looks them up."""
    index = "__index_level_0__"
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), index: pa.array(tasks, pa.string())})
    text = {"pandas_type": "unicode", "numpy_type": "object"}
    number = {"pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    described = {
        "index_columns": [index],
        "column_indexes": [{"name": None, "field_name": None, **text, "metadata": {"encoding": "UTF-8"}}],
        "columns": [
            {"name": "task_index", "field_name": "task_index", **number},
            {"name": None, "field_name": index, **text, "metadata": None},
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": _PANDAS,
    }
    return table.replace_schema_metadata({"pandas": json.dumps(described)})
