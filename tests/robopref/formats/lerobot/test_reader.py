"""Datasets recorded by lerobot, changed by hand and damaged."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from robopref.formats.lerobot import read_lerobot

Recorded = Callable[[str], Path]
Write = Callable[..., Path]


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_table(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def set_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    column = values if isinstance(values, pa.Array) else pa.array(values)
    index = table.schema.get_field_index(name)
    return table.append_column(name, column) if index < 0 else table.set_column(index, name, column)


def feature(info: dict[str, Any], name: str, dtype: str, shape: list[int]) -> None:
    info["features"][name] = {"dtype": dtype, "shape": shape, "names": None}


def first_table(path: Path) -> Path:
    return path / "data/chunk-000/episode_000000.parquet"


def as_version_20(path: Path) -> Path:
    """The dataset as version 2.0 has it: with statistics of the whole instead of each episode."""
    lines = (path / "meta/episodes_stats.jsonl").read_text().splitlines()
    stats = [json.loads(line)["stats"]["action"] for line in lines]
    low, high = np.min([each["min"] for each in stats], axis=0), np.max([each["max"] for each in stats], axis=0)
    (path / "meta/stats.json").write_text(json.dumps({"action": {"min": low.tolist(), "max": high.tolist()}}))
    (path / "meta/episodes_stats.jsonl").unlink()
    edit_json(path / "meta/info.json", lambda info: info.update(codebase_version="v2.0"))
    return path


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_what_lerobot_recorded_is_read(recorded: Recorded, version: str) -> None:
    path = as_version_20(recorded("v2.1")) if version == "v2.0" else recorded(version)

    with read_lerobot(path) as source:
        assert (source.version, source.fps, source.robot_type, source.env) == (version, 10, "toy", {})
        assert source.keys == {"observation.state": 3, "observation.environment_state": 1}
        assert source.cameras == {"observation.images.top": (64, 96, 3), "observation.images.wrist": (8, 10, 3)}
        assert {name: part.tolist() for name, part in source.splits.items()} == {"train": [0, 1]}
        assert source.tasks == {0: "task 0", 1: "task 1"}
        assert source.lengths.tolist() == [3, 4]
        np.testing.assert_array_equal(source.action_space.low, np.array([0, -0.75], np.float32))
        np.testing.assert_array_equal(source.action_space.high, np.array([0.75, 0], np.float32))
        for index, steps in enumerate((3, 4)):
            episode = source.episode(index)
            time = np.arange(steps)
            last = np.minimum(np.arange(steps + 1), steps - 1)
            state = np.arange(3) + 10 * index + last[:, None]
            expected = np.concatenate([state, last[:, None] / 2], axis=1).astype(np.float32)
            np.testing.assert_array_equal(episode.observations, expected, strict=True)
            np.testing.assert_array_equal(episode.actions, np.stack([time, -time], 1).astype("f4") / 4, strict=True)
            np.testing.assert_array_equal(episode.rewards, (time + index).astype(np.float32), strict=True)
            success = (np.arange(steps + 1) == steps) & (index == 1)
            np.testing.assert_array_equal(episode.infos["success"], success, strict=True)
            times = (np.arange(steps + 1) / 10).astype(np.float32)
            np.testing.assert_allclose(episode.infos["timestamp"], times, rtol=1e-6)
            assert (episode.terminated, episode.truncated, episode.states, episode.seed) == (True, False, None, None)
            assert episode.origin == {"task": f"task {index}", "final_observation": "repeated"}

            wrist = np.broadcast_to((10 * last + index)[:, None, None, None], (steps + 1, 8, 10, 3))
            np.testing.assert_array_equal(
                source.frames(index, "observation.images.wrist"), wrist.astype("u1"), strict=True
            )
            top = source.frames(index, "observation.images.top")
            colours = np.stack([40 + 40 * last, 0 * last + 200 - 60 * index, 0 * last + 90], axis=1)
            assert (top.dtype, top.shape) == (np.uint8, (steps + 1, 64, 96, 3))
            assert np.abs(top.astype(int) - colours[:, None, None]).max() <= 6


@pytest.mark.parametrize("keys", [["observation.environment_state", "observation.state"], ["observation.state"]])
def test_the_caller_chooses_what_is_observed(recorded: Recorded, keys: list[str]) -> None:
    sizes = {"observation.state": 3, "observation.environment_state": 1}
    with read_lerobot(recorded("v3.0")) as source:
        whole = source.episode(1)
    parts = {"observation.state": whole.observations[:, :3], "observation.environment_state": whole.observations[:, 3:]}
    with read_lerobot(recorded("v3.0"), keys=keys) as source:
        assert list(source.keys.items()) == [(key, sizes[key]) for key in keys]
        episode = source.episode(1)
    np.testing.assert_array_equal(episode.observations, np.concatenate([parts[key] for key in keys], axis=1))
    for left_out in parts.keys() - set(keys):
        np.testing.assert_array_equal(episode.infos[left_out], parts[left_out].squeeze(1))


@pytest.mark.parametrize("keys", [["state"], ["observation.images.top"], [], ["observation.state"] * 2])
def test_only_what_is_there_can_be_chosen(recorded: Recorded, keys: list[str]) -> None:
    with pytest.raises(ValueError, match=r"has these observation vectors: observation\.state, observation\.env"):
        read_lerobot(recorded("v2.1"), keys=keys)


@pytest.mark.parametrize(
    ("columns", "terminated", "truncated"),
    [
        ({}, False, True),
        ({"done": [False, False, True]}, True, False),
        ({"done": [True, True, False]}, False, True),
        ({"done": [False, False, True], "truncated": [False, False, True]}, False, True),
        ({"done": [False, False, True], "truncated": [False, False, False]}, True, False),
        ({"done": [False, False, False], "truncated": [False, False, False]}, False, False),
        ({"done": [False] * 3, "terminated": [False, False, True], "truncated": [False, False, True]}, True, True),
    ],
)
def test_how_an_episode_ended(
    recorded: Recorded, columns: Mapping[str, list[bool]], terminated: bool, truncated: bool
) -> None:
    path = recorded("v2.1")
    edit_table(first_table(path), lambda table: table.drop_columns(["next.done"]))
    edit_json(path / "meta/info.json", lambda info: info["features"].pop("next.done"))
    for name, values in columns.items():
        edit_json(path / "meta/info.json", lambda info, name=name: feature(info, f"next.{name}", "bool", [1]))
        edit_table(first_table(path), lambda table, n=name, v=values: set_column(table, f"next.{n}", v))
    with read_lerobot(path) as source:
        episode = source.episode(0)
    assert (episode.terminated, episode.truncated) == (terminated, truncated)


def test_other_numbers_are_infos_and_text_is_left_out(recorded: Recorded) -> None:
    path = recorded("v2.1")

    def add(table: pa.Table) -> pa.Table:
        grid = np.arange(3 * 4, dtype=np.float32).reshape(3, 2, 2)
        table = set_column(table, "observation.grid", grid.tolist())
        table = set_column(table, "next.contact", pa.array([5, 6, 7]))
        table = set_column(table, "battery", pa.array([0.5, 0.25, 0.125]))
        return set_column(table, "note", pa.array(["a", "b", "c"])).drop_columns(["next.reward"])

    def list_them(info: dict[str, Any]) -> None:
        feature(info, "observation.grid", "float32", [2, 2])
        feature(info, "next.contact", "int64", [1])
        feature(info, "battery", "float32", [1])
        feature(info, "note", "string", [1])
        del info["features"]["next.reward"]

    edit_table(first_table(path), add)
    edit_json(path / "meta/info.json", list_them)
    with read_lerobot(path) as source:
        assert source.keys == {"observation.state": 3, "observation.environment_state": 1}
        episode = source.episode(0)
    infos = episode.infos
    assert set(infos) == {"success", "timestamp", "observation.grid", "contact", "battery"}
    last = [0, 1, 2, 2]
    np.testing.assert_array_equal(infos["observation.grid"], np.arange(12).reshape(3, 2, 2)[last])
    np.testing.assert_array_equal(infos["contact"], [0, 5, 6, 7])
    np.testing.assert_array_equal(infos["battery"], np.array([0.5, 0.25, 0.125], np.float32)[last], strict=True)
    np.testing.assert_array_equal(episode.rewards, np.zeros(3, np.float32), strict=True)


def test_an_episode_of_several_tasks_says_which_was_when(recorded: Recorded) -> None:
    path = recorded("v2.1")
    edit_table(first_table(path), lambda table: set_column(table, "task_index", [1, 1, 0]))
    with read_lerobot(path) as source:
        episode = source.episode(0)
    assert episode.origin["task"] == "task 1 / task 0"
    assert episode.infos["task_of_frame"].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("lists", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 3)])
def test_lists_of_any_kind_are_vectors_of_the_declared_type(recorded: Recorded, lists: pa.DataType) -> None:
    path = recorded("v2.1")
    values = [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    edit_table(first_table(path), lambda table: set_column(table, "observation.state", pa.array(values, lists)))
    with read_lerobot(path) as source:
        state = source.episode(0).observations[:3, :3]
    np.testing.assert_array_equal(state, np.array(values, np.float32), strict=True)


def test_episodes_that_lerobot_added_later_are_read_as_lerobots(write: Write) -> None:
    path = write(version="v2.1")
    last = path / "data/chunk-000/episode_000003.parquet"
    shutil.copy(last, path / "data/chunk-000/episode_000004.parquet")
    edit_table(
        path / "data/chunk-000/episode_000004.parquet", lambda table: set_column(table, "episode_index", [4, 4, 4])
    )
    with open(path / "meta/episodes.jsonl", "a") as file:
        file.write(json.dumps({"episode_index": 4, "tasks": ["task 1"], "length": 3}) + "\n")
    edit_json(path / "meta/info.json", lambda info: info.update(total_episodes=5, splits={"train": "0:5"}))
    with read_lerobot(path) as source:
        assert "final_observation" not in source.episode(3).origin
        assert source.episode(4).origin == {"task": "task 1", "final_observation": "repeated"}
        np.testing.assert_array_equal(source.episode(4).actions, source.episode(3).actions)
        assert source.splits["train"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("bounds", "low", "high"), [(None, -np.inf, np.inf), ([[np.nan] * 2] * 2, -np.inf, np.inf)])
def test_actions_without_statistics_are_unbounded(recorded: Recorded, bounds: Any, low: float, high: float) -> None:
    path = recorded("v3.0")
    if bounds is None:
        (path / "meta/stats.json").unlink()
    else:
        edit_json(path / "meta/stats.json", lambda stats: stats["action"].update(min=bounds[0], max=bounds[1]))
    with read_lerobot(path) as source:
        assert source.action_space.low.tolist() == [low, low]
        assert source.action_space.high.tolist() == [high, high]


def test_wrong_indices_and_names(recorded: Recorded) -> None:
    with read_lerobot(recorded("v3.0")) as source:
        for index in (-1, 2):
            with pytest.raises(IndexError, match=f"has episodes 0 to 1, so there is no episode {index}"):
                source.episode(index)
            with pytest.raises(IndexError, match=f"has episodes 0 to 1, so there is no episode {index}"):
                source.frames(index, "observation.images.top")
        with pytest.raises(ValueError, match=r"has no camera 'top'; its cameras are: observation\.images\.top, obs"):
            source.frames(0, "top")


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no LeRobot dataset at .*info.json does not exist"):
        read_lerobot(tmp_path)


def test_no_more_memory_is_taken_than_allowed(recorded: Recorded) -> None:
    with read_lerobot(recorded("v2.1"), max_bytes=4 * 64 * 96 * 3) as source:
        assert source.frames(0, "observation.images.top").nbytes == 4 * 64 * 96 * 3
        with pytest.raises(ValueError, match=r"episode 1 cannot be read: 4 frames of .* would take 92160 bytes"):
            source.frames(1, "observation.images.top")
    with (
        read_lerobot(recorded("v2.1"), max_bytes=100) as source,
        pytest.raises(ValueError, match=r"3 steps would take .* bytes, and no more than 100 are allowed"),
    ):
        source.episode(0)


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"bytes": png(5000, 5000), "path": None}, "it shows 5000x5000 pixels where the dataset says 8x10"),
        ({"bytes": png(8, 10)[:45], "path": None}, "an image of 'observation.images.wrist' cannot be used"),
        ({"bytes": b"GIF89a" + bytes(50), "path": None}, "cannot identify image file"),
        ({"bytes": None, "path": "/etc/passwd"}, "does not hold images themselves; embed them"),
    ],
)
def test_images_that_are_none(recorded: Recorded, image: Mapping[str, Any], message: str) -> None:
    path = recorded("v2.1")
    edit_table(first_table(path), lambda table: set_column(table, "observation.images.wrist", [image] * 3))
    with read_lerobot(path) as source, pytest.raises(ValueError, match=rf"episode 0 cannot be read: .*{message}"):
        source.frames(0, "observation.images.wrist")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda info: info.update(codebase_version="v1.6"),
            "is of version 'v1.6'; this robopref reads v2.0, v2.1, v3.0",
        ),
        (lambda info: info.update(codebase_version="v3.1"), "is of version 'v3.1'"),
        (lambda info: info.update(fps=0), "has '0' frames per second, which is no rate"),
        (lambda info: info.update(features={}), "lists no features"),
        (lambda info: info["features"].pop("action"), "has no feature 'action' that is a vector of numbers"),
        (lambda info: info["features"].pop("timestamp"), "lacks the feature 'timestamp'"),
        (lambda info: info["features"]["next.reward"].update(shape=[2]), "'next.reward' is not one number per frame"),
        (lambda info: info["features"]["action"].update(shape=[2**40]), "which is too large to be true"),
        (lambda info: info["features"]["action"].update(shape=[-1]), "no usable dtype and shape"),
        (lambda info: info["features"]["observation.images.top"].update(shape=[2**20, 9, 3]), "not an image's"),
        (lambda info: info["features"].update({"a/b": {}}), "a name must not be empty nor contain a slash"),
        (lambda info: info.update(total_episodes=3), "lists 2 episodes where meta/info.json counts 3"),
        (lambda info: info.update(splits={"train": "0:99999999999"}), "not episodes as 'first:end'"),
        (lambda info: info.update(splits=[1]), "not episodes as 'first:end'"),
    ],
)
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_descriptions_that_cannot_be(
    recorded: Recorded, change: Callable[[dict[str, Any]], Any], message: str, version: str
) -> None:
    path = recorded(version)
    edit_json(path / "meta/info.json", change)
    with pytest.raises(ValueError, match=message) as caught:
        read_lerobot(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "template", "message"),
    [
        ("data_path", "../{episode_index}.parquet", "would lie outside"),
        ("data_path", "/etc/passwd", "would lie outside"),
        ("data_path", "{episode_index.__class__}", "is not a template"),
        ("data_path", "data/{episode_index:099d}", "is not a template"),
        ("data_path", "data/{video_key}/x", "is not among episode_chunk, episode_index there"),
        ("data_path", None, "is not a template"),
        ("data_path", "meta", "does not exist"),
        ("video_path", "{video_key}/../../../x.mp4", "would lie outside"),
        ("video_path", None, "is not a template"),
    ],
)
def test_paths_that_lead_out_are_not_followed(recorded: Recorded, entry: str, template: Any, message: str) -> None:
    path = recorded("v2.1")
    edit_json(path / "meta/info.json", lambda info: info.update({entry: template}))
    with read_lerobot(path) as source, pytest.raises(ValueError, match=message):
        source.frames(0, "observation.images.top")


@pytest.mark.parametrize("name", ["meta/info.json", "meta/tasks.jsonl", "data/chunk-000/episode_000000.parquet"])
def test_links_that_lead_out_are_not_followed(recorded: Recorded, tmp_path: Path, name: str) -> None:
    path = recorded("v2.1")
    (path / name).rename(tmp_path / "outside")
    (path / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="is a link to a file outside of"), read_lerobot(path) as source:
        source.episode(0)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_the_cache_of_the_hub_is_read(recorded: Recorded, tmp_path: Path, version: str) -> None:
    """It keeps files by their hash, in a folder beside the one with links of their names."""
    path = recorded(version)
    repository = tmp_path / "datasets--somebody--something"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(each for each in path.rglob("*") if each.is_file())):
        link = snapshot / file.relative_to(path)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, repository / "blobs" / f"{number:040x}")
        link.symlink_to(os.path.relpath(repository / "blobs" / f"{number:040x}", link.parent))
    with read_lerobot(path) as plain, read_lerobot(snapshot) as cached:
        assert len(cached) == len(plain) > 0
        for index in range(len(plain)):
            np.testing.assert_array_equal(cached.episode(index).observations, plain.episode(index).observations)
            np.testing.assert_array_equal(cached.episode(index).actions, plain.episode(index).actions)
            for camera in plain.cameras:
                np.testing.assert_array_equal(cached.frames(index, camera), plain.frames(index, camera))


def test_pipes_are_not_waited_for(recorded: Recorded) -> None:
    path = recorded("v2.1")
    first_table(path).unlink()
    os.mkfifo(first_table(path))
    with read_lerobot(path) as source, pytest.raises(ValueError, match="does not exist"):
        source.episode(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(0, 2), "has 2 rows where the rows 0 to 2 are needed"),
        (lambda table: pa.concat_tables([table, table]), "has 6 rows where the rows 0 to 2 are needed"),
        (lambda table: set_column(table, "episode_index", [0, 0, 1]), "has frames of another episode"),
        (lambda table: set_column(table, "task_index", [0, 0, 7]), "has frames of task 7, which its list"),
        (lambda table: table.drop_columns(["action"]), "lacks the column 'action'"),
        (lambda table: set_column(table, "action", [[1.0], [1.0, 2, 3], [1.0, 2]]), "'action' differ in length"),
        (lambda table: set_column(table, "action", [[1.0], [1.0], [1.0]]), "'action' has 3 values in 3 rows, where 6"),
        (lambda table: set_column(table, "action", ["a", "b", "c"]), "'action' has 3 values"),
        (lambda table: set_column(table, "timestamp", ["a", "b", "c"]), "'timestamp' has 3 values of type string"),
        (lambda table: set_column(table, "timestamp", [0.0, None, 0.2]), "'timestamp' has gaps"),
        (lambda table: table.append_column("action", table["action"]), "repeats the column 'action'"),
    ],
)
def test_tables_that_do_not_fit(recorded: Recorded, change: Callable[[pa.Table], pa.Table], message: str) -> None:
    path = recorded("v2.1")
    table = change(pq.read_table(first_table(path)))
    pq.write_table(table, first_table(path))
    with read_lerobot(path) as source, pytest.raises(ValueError, match=rf"episode 0 cannot be read: .*{message}"):
        source.episode(0)


def test_a_list_of_other_files_is_found_out(recorded: Recorded) -> None:
    path = recorded("v3.0")
    table = path / "meta/episodes/chunk-000/file-000.parquet"
    edit_table(table, lambda rows: set_column(rows, "dataset_from_index", [0, 2]))
    with read_lerobot(path) as source:
        assert source.episode(0).observations.shape == (4, 4)
        with pytest.raises(ValueError, match=r"episode 1 cannot be read: .* has frames of another episode"):
            source.episode(1)
    edit_table(table, lambda rows: set_column(rows, "episode_index", [0, 0]))
    with pytest.raises(ValueError, match="does not list each episode once"):
        read_lerobot(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), version=st.sampled_from(["v2.1", "v3.0"]))
def test_damage_is_told_in_one_sentence(recorded: Recorded, data: st.DataObject, version: str) -> None:
    original = recorded(version)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(original, Path(folder, "dataset")))
        files = sorted(file for file in path.rglob("*") if file.is_file())
        file = data.draw(st.sampled_from(files))
        content = bytearray(file.read_bytes())
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        else:
            for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
                content[place] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        problem = None
        try:
            with read_lerobot(path) as source:
                for index in range(len(source)):
                    source.episode(index)
                    for camera in source.cameras:
                        source.frames(index, camera)
        except ValueError as error:
            problem = str(error)
        # Damage may go unseen, as in numbers and pixels of files without checksums.
        assert problem is None or ("\n" not in problem and str(path) in problem)


def test_texts_that_are_none_are_damage(recorded: Recorded, tmp_path: Path) -> None:
    path = Path(shutil.copytree(recorded("v3.0"), tmp_path / "dataset"))
    file = path / "meta" / "tasks.parquet"
    table = pq.read_table(file)
    (name,) = (field.name for field in table.schema if field.name != "task_index")
    content = bytearray(file.read_bytes())
    for text in (table[name][0].as_py(), name):
        damaged = bytearray(content)
        for place in (match.start() for match in re.finditer(re.escape(text.encode()), bytes(content))):
            damaged[place] = 0x80
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tasks\.parquet is damaged or not a Parquet file|has a task|is no list"):
            read_lerobot(path)
