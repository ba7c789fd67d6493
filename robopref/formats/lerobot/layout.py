"""Where a LeRobot dataset keeps what, and how its files are opened: within its folder, within limits, or not at all.

A dataset comes from strangers. Whatever is wrong with it is a `ValueError` in one sentence, before much memory is
taken: paths are expanded and followed only inside the folder, and sizes are taken from the headers of files and
compared with what the dataset says of itself before anything is decoded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

V20, V21, V30 = "v2.0", "v2.1", "v3.0"

INFO = "meta/info.json"
STATS = "meta/stats.json"
EPISODES_2, EPISODES_STATS_2, TASKS_2 = "meta/episodes.jsonl", "meta/episodes_stats.jsonl", "meta/tasks.jsonl"
TASKS_3 = "meta/tasks.parquet"
FOLDER_3 = "chunk-{chunk_index:03d}/file-{file_index:03d}"
EPISODES_3 = f"meta/episodes/{FOLDER_3}.parquet"
DATA_2 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
DATA_3 = f"data/{FOLDER_3}.parquet"
VIDEO_2 = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
VIDEO_3 = f"videos/{{video_key}}/{FOLDER_3}.mp4"
OURS, OURS_EPISODES = "meta/robopref.json", "meta/robopref_episodes.jsonl"

CHUNK_SIZE = 1000
"""Files (version 3) or episodes (version 2) in a folder."""

BOOKKEEPING = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
"""The features that every dataset has, as `info.json` lists them."""

MAX_JSON = 64 * 2**20
MAX_LINE = 16 * 2**20
MAX_EPISODES = 2**22
MAX_ROWS_BYTES = 2**31
"""Bytes to which one column of a row group may unpack."""
MAX_SIDE = 2**14

_TEMPLATE = re.compile(r"(?:[^{}]|\{\w+(?::0\dd)?\})*")
_FIELD = re.compile(r"\{(\w+)(?::0(\d)d)?\}")


@dataclass(frozen=True)
class Feature:
    """One column of a dataset, or one camera.

    Attributes:
        dtype: "image", "video", "string", or the name of a NumPy type.
        shape: of one frame; [height, width, channels] of a camera.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_camera(self) -> bool:
        return self.dtype in ("image", "video")

    @property
    def is_numeric(self) -> bool:
        return self.dtype in NUMBERS

    @property
    def size(self) -> int:
        """Numbers in one frame."""
        return math.prod(self.shape)


NUMBERS = {
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *(f"float{bits}" for bits in (16, 32, 64)),
}


class Rows(NamedTuple):
    """Where the frames of an episode lie: rows [begin, end) of a Parquet file, or all that it has."""

    path: Path
    begin: int
    end: int
    all: bool = False


def parse_features(info: Mapping[str, Any], place: Path) -> dict[str, Feature]:
    """The features that `info.json` lists, in its order.

    Raises:
        ValueError: the list is no such list, or a name or shape in it is impossible.
    """
    listed = info.get("features")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{place} lists no features.")
    return {name: _parse_feature(name, entry, place) for name, entry in listed.items()}


def _parse_feature(name: str, entry: Any, place: Path) -> Feature:
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise ValueError(f"{place} has a feature called {name[:80]!r}; a name must not be empty nor contain a slash.")
    dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    whole = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
    if not isinstance(dtype, str) or not isinstance(shape, list) or not whole or len(shape) > 5:
        raise ValueError(f"{place} gives the feature {name!r} no usable dtype and shape, but {str(entry)[:80]}.")
    feature = Feature(name, dtype, tuple(shape) or (1,))
    if feature.is_camera:
        return _parse_camera(feature, entry.get("names"), place)
    if feature.size > MAX_ROWS_BYTES:
        raise ValueError(f"{place} gives the feature {name!r} the shape {shape}, which is too large to be true.")
    return feature


def _parse_camera(feature: Feature, names: Any, place: Path) -> Feature:
    """The camera with its shape as [height, width, channels], whichever way the dataset puts it."""
    shape = feature.shape
    if len(shape) == 3:
        first = isinstance(names, list) and len(names) == 3 and str(names[0]).startswith("channel")
        if first or (shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4)):
            shape = (*shape[1:], shape[0])
    if len(shape) != 3 or shape[2] not in (1, 3, 4) or max(shape) > MAX_SIDE:
        raise ValueError(f"{place} gives the camera {feature.name!r} the shape {list(feature.shape)}, not an image's.")
    return Feature(feature.name, feature.dtype, shape)


def expand(template: Any, values: Mapping[str, int | str], place: Path) -> str:
    """A path from its template, such as `data/chunk-{episode_chunk:03d}/...`.

    Python's own `str.format` would follow attributes and pad to any width that a template asks for.

    Raises:
        ValueError: the template has another form, or names something that `values` lacks.
    """
    if not isinstance(template, str) or len(template) > 512 or not _TEMPLATE.fullmatch(template):
        raise ValueError(f"{place} has the path {str(template)[:80]!r}, which is not a template of LeRobot's.")

    def fill(match: re.Match[str]) -> str:
        name, width = match.groups()
        value = values.get(name)
        if value is None or (width is not None and not isinstance(value, int)):
            raise ValueError(
                f"{place} has the path {template!r}, but {match.group()} is not among {', '.join(values)} there."
            )
        return str(value) if width is None else f"{value:0{int(width)}d}"

    return _FIELD.sub(fill, template)


def inside(root: Path, relative: str) -> Path:
    """The regular file at a path that must lie in the folder `root`, links followed.

    Raises:
        ValueError: the path leads elsewhere, or there is no such file.
    """
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts or "\0" in relative or "\\" in relative:
        raise ValueError(f"{root} names the file {relative[:120]!r}, which would lie outside of it; it is not opened.")
    path = root / relative
    try:
        found = path.is_file()
        leaves = found and not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be opened ({error}).") from error
    if leaves:
        raise ValueError(f"{path} is a link to a file outside of {root}; it is not opened: copy the file to its place.")
    if not found:
        raise ValueError(f"{path} does not exist; the dataset is incomplete: fetch it again.")
    return path


def parse_json(text: bytes, place: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the text is anything else.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{place} is not valid JSON: it is nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{place} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} is not a JSON object.")
    return value


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of moderate size.

    Raises:
        ValueError: it holds anything else.
    """
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, which is too much for such a file.")
    return parse_json(path.read_bytes(), str(path))


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects in a file, one per line, each with where its line begins.

    Raises:
        ValueError: a line holds anything else, or is too long.
    """
    with open(path, "rb") as file:
        number, begin = 0, 0
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE:
                raise ValueError(f"{path}, line {number} is too long for such a file.")
            if line.strip():
                yield begin, parse_json(line, f"{path}, line {number}")
            begin += len(line)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever Arrow says of a damaged file into one sentence."""
    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, KeyError, OverflowError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"{path} is damaged or not a Parquet file ({reason}).") from error


def open_parquet(path: Path) -> pq.ParquetFile:
    """The file, of which only the footer is read.

    Raises:
        ValueError: it is damaged or no Parquet file.
    """
    with reading(path):
        return pq.ParquetFile(pa.OSFile(str(path), "rb"))


def read_batches(
    file: pq.ParquetFile,
    rows: Rows,
    columns: Sequence[str],
    sizes: Mapping[str, int],
    *,
    batch_size: int = 4096,
    most: int = MAX_ROWS_BYTES,
) -> Iterator[pa.RecordBatch]:
    """The columns of some rows, a batch at a time; only the row groups that hold such rows are read.

    Args:
        sizes: the numbers in one row of a column, where it is known; checked before the column is decoded.
        most: bytes to which a column of one row group may unpack.

    Raises:
        ValueError: the file is damaged, lacks rows or columns, or a column takes too much memory.
    """
    path, count = rows.path, file.metadata.num_rows
    if rows.begin == rows.end == count:
        return
    if not 0 <= rows.begin < rows.end <= count or (rows.all and rows.end < count):
        raise ValueError(
            f"{path} has {count} rows where the rows {rows.begin} to {rows.end - 1} are needed; restore the dataset's "
            "files from the same place."
        )
    groups: list[int] = []
    first = passed = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if passed + count > rows.begin and passed < rows.end:
            first = first if groups else passed
            groups.append(group)
            _check_group(file, path, group, columns, sizes, most)
        passed += count
    with reading(path):
        begin = first
        for batch in file.iter_batches(batch_size, row_groups=groups, columns=list(columns), use_threads=False):
            low, high = max(rows.begin - begin, 0), min(rows.end - begin, len(batch))
            if low < high:
                yield batch.slice(low, high - low)
            begin += len(batch)
            if begin >= rows.end:
                return
    raise ValueError(f"{path} is damaged: it ends before row {rows.end - 1}.")


def _check_group(
    file: pq.ParquetFile, path: Path, group: int, columns: Sequence[str], sizes: Mapping[str, int], most: int
) -> None:
    metadata, leaf = file.metadata.row_group(group), 0
    fields = list(file.schema_arrow)
    names = [field.name for field in fields]
    for name in columns:
        if names.count(name) != 1:
            raise ValueError(f"{path} {'lacks' if name not in names else 'repeats'} the column {name!r}.")
    # Arrow takes the name of a column for a path, and reads what lies below it too.
    prefixes = tuple(f"{name}." for name in columns)
    for field in fields:
        leaves = _num_leaves(field.type)
        for index in range(leaf, leaf + leaves) if f"{field.name}.".startswith(prefixes) else ():
            column, expected = metadata.column(index), metadata.num_rows * sizes.get(field.name, 0)
            if column.total_uncompressed_size > most:
                raise ValueError(
                    f"{path}: the column {field.name!r} unpacks to {column.total_uncompressed_size} bytes in one row "
                    "group, which is too much to be read."
                )
            if expected and column.num_values != expected:
                raise ValueError(
                    f"{path}: the column {field.name!r} has {column.num_values} values in {metadata.num_rows} rows, "
                    f"where {expected} are needed."
                )
        leaf += leaves


def _num_leaves(kind: pa.DataType) -> int:
    """Columns that a type takes in Parquet."""
    if isinstance(kind, pa.BaseExtensionType):
        return _num_leaves(kind.storage_type)
    return sum(_num_leaves(kind.field(i).type) for i in range(kind.num_fields)) if kind.num_fields else 1


def to_numpy(values: pa.Array, feature: Feature, path: Path) -> np.ndarray:
    """A column as an array [rows, *shape] of the feature's type.

    Raises:
        ValueError: it has gaps, rows of different lengths, or no numbers.
    """
    rows = len(values)
    with reading(path):
        values = _flat(values, feature, path)
        kind = values.type
        numbers = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not numbers or len(values) != rows * feature.size:
            raise ValueError(
                f"{path}: the column {feature.name!r} has {len(values)} values of type {kind} in {rows} rows, where "
                f"{feature.dtype} {list(feature.shape)} is needed in each."
            )
        # What info.json says of a column holds: other writers leave the types of columns to chance.
        array: np.ndarray = values.to_numpy(zero_copy_only=False).astype(feature.dtype, copy=False)
        return array.reshape(rows, *feature.shape)


def _flat(values: pa.Array, feature: Feature, path: Path) -> pa.Array:
    """The numbers in lists of lists, all of one length."""
    while True:
        values = values.storage if isinstance(values, pa.ExtensionArray) else values
        if values.null_count:
            raise ValueError(f"{path}: the column {feature.name!r} has gaps.")
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            lengths = pc.min_max(pc.list_value_length(values)).as_py()
            if lengths["min"] != lengths["max"]:
                raise ValueError(f"{path}: the rows of the column {feature.name!r} differ in length.")
        elif not pa.types.is_fixed_size_list(values.type):
            return values
        values = values.flatten()


def column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column by its name, whatever Arrow read beside it."""
    return batch.column(batch.schema.get_field_index(name))
