"""The lists of a dataset, as lerobot recorded them and with faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robopref.formats.lerobot import layout
from robopref.formats.lerobot.index import read_index, read_tasks, stats_bounds

Recorded = Callable[[str], Path]


def index_of(path: Path) -> Any:
    info = layout.load_json(path / layout.INFO)
    return read_index(path, info, layout.parse_features(info, path / layout.INFO))


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_where_episodes_lie(recorded: Recorded, version: str) -> None:
    path = recorded(version)
    index = index_of(path)
    assert index.lengths.tolist() == [3, 4]
    if version == "v3.0":
        table = path / "data/chunk-000/file-000.parquet"
        film = path / "videos/observation.images.top/chunk-000/file-000.mp4"
        assert [index.rows(i)[:3] for i in range(2)] == [(table, 0, 3), (table, 3, 7)]
        assert [index.video(i, "observation.images.top") for i in range(2)] == [(film, 0), (film, pytest.approx(0.3))]
    else:
        tables = [path / f"data/chunk-000/episode_00000{i}.parquet" for i in range(2)]
        films = [path / f"videos/chunk-000/observation.images.top/episode_00000{i}.mp4" for i in range(2)]
        assert [index.rows(i) for i in range(2)] == [(tables[0], 0, 3, True), (tables[1], 0, 4, True)]
        assert [index.video(i, "observation.images.top") for i in range(2)] == [(films[0], 0), (films[1], 0)]


def test_rows_are_counted_from_the_first_of_their_file(recorded: Recorded) -> None:
    path = recorded("v3.0")
    list_path = path / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(list_path)
    files = table.schema.get_field_index("data/file_index")
    pq.write_table(table.set_column(files, "data/file_index", pa.array([0, 1])), list_path)
    (path / "data/chunk-000/file-001.parquet").touch()
    assert [index_of(path).rows(i)[1:3] for i in range(2)] == [(0, 3), (0, 4)]


def test_lists_in_several_files_and_in_any_order(recorded: Recorded) -> None:
    path = recorded("v3.0")
    list_path = path / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(list_path)
    pq.write_table(table.slice(1, 1), list_path)
    (path / "meta/episodes/chunk-001").mkdir()
    pq.write_table(table.slice(0, 1), path / "meta/episodes/chunk-001/file-000.parquet")
    pq.write_table(table.slice(0, 0), path / "meta/episodes/chunk-001/file-001.parquet")
    assert index_of(path).lengths.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"episode_index": 5, "length": 4}, "lists 2 episodes and episode 5, so some are missing"),
        ({"episode_index": 0, "length": 4}, r"lists 1 episodes where meta/info\.json counts 2"),
        ({"episode_index": 1, "length": 0}, "length of episode 1 is '0', and must be a whole number of at least 1"),
        ({"episode_index": 1, "length": 1e9}, "length of episode 1 is '1000000000.0'"),
        ({"episode_index": -1, "length": 4}, "episode_index is '-1'"),
        ({"length": 4}, "episode_index is 'None'"),
    ],
)
def test_lists_of_version_2_that_cannot_be(recorded: Recorded, line: Any, message: str) -> None:
    path = recorded("v2.1")
    first = (path / "meta/episodes.jsonl").read_text().splitlines()[0]
    (path / "meta/episodes.jsonl").write_text(f"{first}\n{json.dumps(line)}\n")
    with pytest.raises(ValueError, match=message):
        index_of(path)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("dataset_to_index", [3, 3], "does not list each episode once, with its first and last row"),
        ("dataset_from_index", [-9, 3], "does not list each episode once"),
        ("dataset_from_index", [-(2**63), 3], "does not list each episode once"),
        ("episode_index", [1, 2], "does not list each episode once"),
        ("episode_index", [0, None], "has gaps"),
        ("videos/observation.images.top/chunk_index", ["a", "b"], "type string"),
    ],
)
def test_lists_of_version_3_that_cannot_be(recorded: Recorded, name: str, values: list[Any], message: str) -> None:
    path = recorded("v3.0")
    list_path = path / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(list_path)
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, pa.array(values)), list_path)
    with pytest.raises(ValueError, match=message):
        index_of(path)


def test_no_lists_at_all(recorded: Recorded) -> None:
    path = recorded("v3.0")
    (path / "meta/episodes/chunk-000/file-000.parquet").unlink()
    with pytest.raises(ValueError, match="has no Parquet files; the dataset is incomplete"):
        index_of(path)


@pytest.mark.parametrize("text", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("name", ["__index_level_0__", "task"])
def test_tasks_by_the_name_of_either_pandas(recorded: Recorded, text: pa.DataType, name: str) -> None:
    path = recorded("v3.0")
    table = pa.table({"task_index": [1, 0], name: pa.array(["b", "a"], text)})
    pq.write_table(table, path / layout.TASKS_3)
    assert read_tasks(path, layout.V30) == {1: "b", 0: "a"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"task_index": [0]}, "is no list of tasks"),
        ({"task_index": [0], "task": ["a"], "other": ["b"]}, "is no list of tasks"),
        ({"task_index": pa.array([], pa.int64()), "task": pa.array([], pa.string())}, "is no list of tasks"),
        ({"number": [0], "task": ["a"]}, "lacks the column 'task_index'"),
        ({"task_index": [-1], "task": ["a"]}, "task_index is '-1'"),
        ({"task_index": [0], "task": pa.array([None], pa.string())}, "has a task without text"),
    ],
)
def test_tasks_of_version_3_that_are_none(recorded: Recorded, table: Any, message: str) -> None:
    path = recorded("v3.0")
    pq.write_table(pa.table(table), path / layout.TASKS_3)
    with pytest.raises(ValueError, match=message):
        read_tasks(path, layout.V30)


def test_a_task_repeated_without_end_is_not_unpacked(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recorded("v3.0")
    monkeypatch.setattr(layout, "MAX_JSON", 100_000)
    table = pa.table({"task_index": np.arange(1000), "task": ["a" * 1000] * 1000})
    pq.write_table(table, path / layout.TASKS_3)
    assert (path / layout.TASKS_3).stat().st_size < 50_000
    with pytest.raises(ValueError, match="has too much text"):
        read_tasks(path, layout.V30)


@pytest.mark.parametrize("line", ['{"task_index": 0}', '{"task_index": 0, "task": 3}', '{"task": "a"}'])
def test_tasks_of_version_2_that_are_none(recorded: Recorded, line: str) -> None:
    path = recorded("v2.1")
    (path / layout.TASKS_2).write_text(line)
    with pytest.raises(ValueError, match=r"tasks\.jsonl"):
        read_tasks(path, layout.V21)


def test_bounds_are_the_least_and_greatest_of_all_episodes(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    entries = [{"min": [0, 5.0, float("nan")], "max": [1, 6.0, 3]}, {"min": [-1, 5.5, float("nan")], "max": [0, 7, 4]}]
    lines = [json.dumps({"episode_index": i, "stats": {"action": entry}}) for i, entry in enumerate(entries)]
    (tmp_path / layout.EPISODES_STATS_2).write_text("\n".join(lines))
    bounds = stats_bounds(tmp_path, layout.V21, 3)
    np.testing.assert_array_equal(bounds, [[-1, 5, -np.inf], [1, 7, np.inf]])
    for wrong in ('{"stats": {}}', '{"stats": null}', "{}", '{"stats": {"action": {"min": [1], "max": [2]}}}'):
        (tmp_path / layout.EPISODES_STATS_2).write_text(wrong)
        with pytest.raises(ValueError, match="has no usable min and max of the action"):
            stats_bounds(tmp_path, layout.V21, 3)
