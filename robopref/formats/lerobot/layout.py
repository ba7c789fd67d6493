"""Where a LeRobot dataset keeps what, and how its files are opened: within its folder, within limits, or not at all.

A dataset comes from strangers. Whatever is wrong with it is a `ValueError` in one sentence, before much memory is
taken: paths are expanded and followed only inside the folder, and JSON is read within limits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

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
MAX_SIDE = 2**14
MAX_SIZE = 2**31
"""Numbers in one frame of a feature."""

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
    if not name or "/" in name or "\0" in name:
        raise ValueError(f"{place} has a feature called {name[:80]!r}; a name must not be empty nor contain a slash.")
    dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    whole = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
    if not isinstance(dtype, str) or not isinstance(shape, list) or not whole or len(shape) > 5:
        raise ValueError(f"{place} gives the feature {name!r} no usable dtype and shape, but {str(entry)[:80]}.")
    feature = Feature(name, dtype, tuple(shape) or (1,))
    if feature.is_camera:
        return _parse_camera(feature, entry.get("names"), place)
    if feature.size > MAX_SIZE:
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

    In the cache of the Hugging Face Hub, the files of a dataset in `snapshots/<revision>` are links into the folder
    `blobs` beside `snapshots`; a link there may lead into that folder too.

    Raises:
        ValueError: the path leads elsewhere, or there is no such file.
    """
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts or "\0" in relative or "\\" in relative:
        raise ValueError(f"{root} names the file {relative[:120]!r}, which would lie outside of it; it is not opened.")
    path = root / relative
    try:
        found = path.is_file()
        leaves = found and not any(path.resolve().is_relative_to(folder) for folder in _homes(root.resolve()))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be opened ({error}).") from error
    if leaves:
        raise ValueError(f"{path} is a link to a file outside of {root}; it is not opened: copy the file to its place.")
    if not found:
        raise ValueError(f"{path} does not exist; the dataset is incomplete: fetch it again.")
    return path


def _homes(root: Path) -> list[Path]:
    """The folders in which the files of a dataset may lie, whose folder `root` is given without links."""
    return [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]


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
