"""Files as they are filled, without the reader; what they hold is compared with lerobot's own in test_writer.py."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from robopref.formats.lerobot import layout, sinks
from robopref.formats.lerobot.sinks import EpisodeRows, Sink2, Sink3
from robopref.formats.lerobot.stats import image_stats, vector_stats

CAMERA = "observation.images.top"


def rows(index: int, first: int, steps: int) -> EpisodeRows:
    columns = {
        "action": np.arange(2 * steps, dtype=np.float32).reshape(steps, 2) + index,
        "timestamp": (np.arange(steps) / 10).astype(np.float32),
        "index": np.arange(first, first + steps),
    }
    films = {CAMERA: np.full((steps, 16, 16, 3), 20 * index, np.uint8)}
    stats = {name: vector_stats(values, quantiles=True) for name, values in columns.items()}
    return EpisodeRows(index, "lift", columns, films, stats | {CAMERA: image_stats(films[CAMERA], quantiles=True)})


def test_version_3_lists_where_everything_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "_LISTED_AT_ONCE", 2)
    (tmp_path / "meta").mkdir()
    with Sink3(tmp_path, [CAMERA], 10, "h264") as sink:
        first = 0
        for index, steps in enumerate((3, 1, 4)):
            sink.add(rows(index, first, steps))
            first += steps
        info = sink.finish({"lift": 0, "é": 1})
    assert info["video_path"] == layout.VIDEO_3
    table = pd.read_parquet(tmp_path / "meta/episodes/chunk-000/file-000.parquet")
    assert table["episode_index"].tolist() == [0, 1, 2]
    assert table["length"].tolist() == [3, 1, 4]
    assert [list(tasks) for tasks in table["tasks"]] == [["lift"]] * 3
    assert table["dataset_from_index"].tolist() == [0, 3, 4]
    assert table["dataset_to_index"].tolist() == [3, 4, 8]
    assert table[f"videos/{CAMERA}/from_timestamp"].tolist() == pytest.approx([0, 0.3, 0.4])
    assert table[f"videos/{CAMERA}/to_timestamp"].tolist() == pytest.approx([0.3, 0.4, 0.8])
    for place in ("data", f"videos/{CAMERA}", "meta/episodes"):
        assert table[f"{place}/chunk_index"].tolist() == table[f"{place}/file_index"].tolist() == [0, 0, 0]
    assert [list(value) for value in table["stats/action/max"]] == [[4, 5], [1, 2], [8, 9]]
    assert pd.read_parquet(tmp_path / layout.TASKS_3)["task_index"].to_dict() == {"lift": 0, "é": 1}
    stats = json.loads((tmp_path / layout.STATS).read_text())
    assert (stats["action"]["min"], stats["action"]["max"], stats["action"]["count"]) == ([0, 1], [8, 9], [8])
    data = tmp_path / "data/chunk-000/file-000.parquet"
    assert pq.read_metadata(data).num_row_groups == 3
    assert pq.read_table(data)["index"].to_pylist() == list(range(8))


def test_files_of_version_3_are_numbered_through_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_SIZE", 2)
    monkeypatch.setattr(sinks, "_MEGABYTE", 0)
    (tmp_path / "meta").mkdir()
    with Sink3(tmp_path, [CAMERA], 10, "h264") as sink:
        for index in range(3):
            sink.add(rows(index, index, 1))
        sink.finish({"lift": 0})
    for pattern in ("data/*/*.parquet", f"videos/{CAMERA}/*/*.mp4"):
        files = [f"{file.parent.name}/{file.stem}" for file in sorted(tmp_path.glob(pattern))]
        assert files == ["chunk-000/file-000", "chunk-000/file-001", "chunk-001/file-000"]


def test_version_2_has_a_file_per_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_SIZE", 2)
    (tmp_path / "meta").mkdir()
    with Sink2(tmp_path, [CAMERA], 10, "h264") as sink:
        for index in range(3):
            sink.add(rows(index, index, 1))
        info = sink.finish({"lift": 0})
    assert (info["total_videos"], info["total_chunks"]) == (3, 2)
    names = ["chunk-000/episode_000000", "chunk-000/episode_000001", "chunk-001/episode_000002"]
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.glob("data/*/*")) == [
        f"data/{name}.parquet" for name in names
    ]
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.glob("videos/*/*/*")) == [
        f"videos/{name.replace('/', f'/{CAMERA}/')}.mp4" for name in names
    ]
    lines = (tmp_path / layout.EPISODES_2).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"episode_index": index, "tasks": ["lift"], "length": 1} for index in range(3)
    ]


@pytest.mark.parametrize("make", [Sink2, Sink3])
def test_an_error_closes_what_is_open(tmp_path: Path, make: type[Sink2] | type[Sink3]) -> None:
    (tmp_path / "meta").mkdir()
    sink = make(tmp_path, [CAMERA], 10, "libsvtav1")
    with contextlib.suppress(RuntimeError), sink:
        sink.add(rows(0, 0, 3))
        raise RuntimeError
    open_files = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert [name for name in open_files if name.startswith(str(tmp_path))] == []
