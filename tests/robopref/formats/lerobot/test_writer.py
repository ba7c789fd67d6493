"""What is written is read again bit for bit, and laid out as lerobot lays it out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from robopref.episodes import load_episodes, write_episodes
from robopref.formats.lerobot import read_lerobot, sinks, write_lerobot
from robopref.types import Episode

VERSIONS = ("v2.1", "v3.0")
Write = Callable[..., Path]


def assert_same(read: Episode, written: Episode) -> None:
    for name in ("observations", "actions", "rewards", "states"):
        assert_bits(getattr(read, name), getattr(written, name))
    assert read.infos.keys() - {"timestamp"} == written.infos.keys() - {"timestamp"}
    for name, values in written.infos.items():
        assert_bits(read.infos[name], values)
    ends = ("terminated", "truncated", "seed", "origin")
    assert [getattr(read, name) for name in ends] == [getattr(written, name) for name in ends]


def assert_bits(read: np.ndarray | None, written: np.ndarray | None) -> None:
    if written is None or read is None:
        assert read is None
        assert written is None
        return
    assert (read.dtype, read.shape) == (written.dtype, written.shape)
    assert read.tobytes() == written.tobytes()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_dataset_comes_back_as_it_was(write: Write, episodes: list[Episode], version: str) -> None:
    path = write(version=version, description="of a toy", robot_type="arm", splits={"train": [0, 1], "odd": [1, 3]})

    with read_lerobot(path) as source:
        assert (source.version, source.fps, source.robot_type) == (version, 10, "arm")
        assert (source.env, source.description) == ({"name": "toy", "horizon": 9}, "of a toy")
        assert list(source.keys.items()) == [("observation.state", 3), ("observation.environment_state", 2)]
        assert source.observation_space == gymnasium.spaces.Box(-np.inf, np.inf, (5,), np.float64)
        assert source.action_space == gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        assert {name: part.tolist() for name, part in source.splits.items()} == {"train": [0, 1], "odd": [1, 3]}
        assert len(source) == len(episodes)
        for index, episode in enumerate(episodes):
            assert_same(source.episode(index), episode)


@pytest.mark.parametrize("version", VERSIONS)
def test_images_come_back_as_they_were(
    write: Write, films: Mapping[str, list[np.ndarray]], readers: Mapping[str, Any], version: str
) -> None:
    with read_lerobot(write(version=version, frames=readers, images=True)) as source:
        assert source.cameras == {"observation.images.front": (48, 64, 3), "observation.wrist": (32, 36, 3)}
        for camera, seen in zip(source.cameras, films.values(), strict=True):
            for index, frames in enumerate(seen):
                assert_bits(source.frames(index, camera), frames)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("codec", ["libsvtav1", "h264"])
def test_videos_come_back_much_as_they_were(
    write: Write, films: Mapping[str, list[np.ndarray]], readers: Mapping[str, Any], version: str, codec: str
) -> None:
    with read_lerobot(write(version=version, frames=readers, codec=codec)) as source:
        for camera, seen in zip(source.cameras, films.values(), strict=True):
            for index in (2, 0, 3, 1):
                read, frames = source.frames(index, camera), seen[index]
                assert (read.dtype, read.shape) == (frames.dtype, frames.shape)
                error = np.abs(read.astype(int) - frames)
                assert error.mean() < 4
                assert np.quantile(error, 0.99) <= 16
                # Neighbouring frames are further apart than that: each is in its place.
                if len(frames) > 4:
                    others = [np.abs(read[2].astype(int) - frames[step]).mean() for step in range(5)]
                    assert int(np.argmin(others)) == 2


def test_a_store_keeps_its_hash_on_the_way_there_and_back(tmp_path: Path, episodes: list[Episode]) -> None:
    spaces: dict[str, Any] = {
        "observation_space": gymnasium.spaces.Box(-9, 9, (5,), np.float64),
        "action_space": gymnasium.spaces.Box(-1, 1, (2,), np.float32),
        "env": {},
    }
    write_episodes(tmp_path / "store", episodes, **spaces)
    store = load_episodes(tmp_path / "store")
    write_lerobot(tmp_path / "lerobot", (store.episode(i) for i in range(len(store))), fps=20, **spaces)
    with read_lerobot(tmp_path / "lerobot") as source:
        assert (source.observation_space, source.action_space) == (store.observation_space, store.action_space)
        write_episodes(tmp_path / "back", [source.episode(i) for i in range(len(source))], **spaces)
    assert load_episodes(tmp_path / "back").hash == store.hash


numbers = st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_, np.float16])


@st.composite
def any_episodes(draw: st.DrawFn) -> list[Episode]:
    floating = draw(st.sampled_from([np.float32, np.float64]))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    infos = draw(
        st.dictionaries(
            st.text("abcxyz_. é", min_size=1, max_size=6).filter(lambda name: not name.startswith("next.")),
            st.tuples(numbers, hnp.array_shapes(min_dims=0, max_dims=2, max_side=3)),
            max_size=3,
        )
    )
    made = []
    for _ in range(draw(st.integers(1, 3))):
        steps = draw(st.integers(1, 4))
        made.append(
            Episode(
                observations=draw(hnp.arrays(floating, (steps + 1, 2), elements=finite)),
                actions=draw(hnp.arrays(np.float32, (steps, 1), elements=finite)),
                rewards=draw(hnp.arrays(floating, (steps,), elements=finite)),
                terminated=draw(st.booleans()),
                truncated=draw(st.booleans()),
                infos={name: draw(hnp.arrays(kind, (steps + 1, *shape))) for name, (kind, shape) in infos.items()},
                seed=draw(st.none() | st.integers(0, 2**63 - 1)),
                origin={"task": draw(st.text(st.characters(codec="utf-8"), min_size=1, max_size=9))},
            )
        )
    return made


@settings(max_examples=40, deadline=None)
@given(any_episodes(), st.sampled_from(VERSIONS))
def test_whatever_is_written_comes_back(episodes: list[Episode], version: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "dataset")
        box = gymnasium.spaces.Box(-np.inf, np.inf, (2,), episodes[0].observations.dtype.type)
        action_box = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        write_lerobot(path, episodes, fps=7, observation_space=box, action_space=action_box, env={}, version=version)
        with read_lerobot(path) as source:
            for index, episode in enumerate(episodes):
                read = source.episode(index)
                # Bits of NaN apart, which JSON does not keep.
                for name, values in episode.infos.items():
                    assert (read.infos[name].dtype, read.infos[name].shape) == (values.dtype, values.shape)
                    np.testing.assert_array_equal(read.infos[name], values)
                assert_same(replace(read, infos={}), replace(episode, infos={}))


@pytest.mark.parametrize("version", VERSIONS)
def test_without_what_was_put_aside_the_last_observation_is_repeated(
    write: Write, episodes: list[Episode], version: str
) -> None:
    path = write(version=version)
    (path / "meta/robopref.json").unlink()

    with read_lerobot(path) as source:
        assert (source.env, source.description) == ({}, "")
        assert source.splits["train"].tolist() == [0, 1, 2, 3]
        assert np.isinf(source.observation_space.low).all()
        actions = np.concatenate([episode.actions for episode in episodes])
        np.testing.assert_array_equal(source.action_space.low, actions.min(axis=0))
        np.testing.assert_array_equal(source.action_space.high, actions.max(axis=0))
        for index, episode in enumerate(episodes):
            read = source.episode(index)
            assert read.origin == {"task": episode.origin["task"], "final_observation": "repeated"}
            assert read.seed is None
            assert_bits(read.actions, episode.actions)
            assert_bits(read.observations[:-1], episode.observations[:-1])
            assert_bits(read.observations[-1], episode.observations[-2])
            assert_bits(read.infos["success"][1:], episode.infos["success"][1:])
            assert not read.infos["success"][0]
            assert_bits(read.infos["grip"], episode.infos["grip"][[*range(len(episode)), -2], 0])
            assert (read.terminated, read.truncated) == (episode.terminated, episode.truncated)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_layout_is_that_of_lerobot(recorded: Callable[[str], Path], tmp_path: Path, version: Any) -> None:
    theirs = recorded(version)
    ours = tmp_path / "ours"
    with read_lerobot(theirs) as source:
        write_lerobot(
            ours,
            (source.episode(index) for index in range(len(source))),
            fps=10,
            observation_space=source.observation_space,
            action_space=source.action_space,
            env={},
            keys=source.keys,
            frames={"observation.images.top": lambda index: source.frames(index, "observation.images.top")},
            version=version,
            robot_type="toy",
        )
    info, expected = (json.loads((path / "meta/info.json").read_text()) for path in (ours, theirs))
    # What lerobot has no name for, and the camera that it kept as images.
    for extra in ("next.truncated", "next.terminated"):
        assert info["features"].pop(extra) == {"dtype": "bool", "shape": [1], "names": None}
    del expected["features"]["observation.images.wrist"]
    for features in (info["features"], expected["features"]):
        for name in ("action", "observation.state", "observation.environment_state"):
            del features[name]["names"]
    assert info == expected

    own_files, their_files = (
        {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} for path in (ours, theirs)
    )
    assert own_files - their_files == {"meta/robopref.json", "meta/robopref_episodes.jsonl"}
    assert their_files <= own_files
    for name in sorted(each for each in their_files if each.endswith(".parquet") and "tasks" not in each):
        own, their = (pq.read_schema(path / name) for path in (ours, theirs))
        types = {field.name: field.type for field in own}
        compared = [field for field in their if "wrist" not in field.name]
        assert {field.name: types[field.name] for field in compared} == {field.name: field.type for field in compared}
        if "data/" in name:
            own_hub, their_hub = (
                json.loads(each.metadata[b"huggingface"])["info"]["features"] for each in (own, their)
            )
            # What later versions of datasets call a list, earlier ones know as a sequence; all read that.
            their_hub = json.loads(json.dumps(their_hub).replace('"List"', '"Sequence"'))
            del their_hub["observation.images.wrist"]
            assert {column: own_hub[column] for column in their_hub} == their_hub
    if version == "v3.0":
        assert pd.read_parquet(ours / "meta/tasks.parquet").equals(pd.read_parquet(theirs / "meta/tasks.parquet"))
        stats, expected_stats = (json.loads((path / "meta/stats.json").read_text()) for path in (ours, theirs))
        compare_stats(stats, expected_stats)
    else:
        for name in ("episodes.jsonl", "tasks.jsonl"):
            own_lines, their_lines = ((path / "meta" / name).read_text().splitlines() for path in (ours, theirs))
            assert list(map(json.loads, own_lines)) == list(map(json.loads, their_lines))
        own_lines, their_lines = (
            (path / "meta/episodes_stats.jsonl").read_text().splitlines() for path in (ours, theirs)
        )
        for own_line, their_line in zip(own_lines, their_lines, strict=True):
            compare_stats(json.loads(own_line)["stats"], json.loads(their_line)["stats"])


def compare_stats(stats: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name in expected.keys() - {"observation.images.wrist"}:
        assert stats[name].keys() == expected[name].keys()
        for statistic, value in expected[name].items():
            own, their = np.array(stats[name][statistic], float), np.array(value, float)
            assert own.shape == their.shape
            # lerobot takes quantiles from histograms, and squares the bytes of images, which do not hold the squares.
            if not statistic.startswith("q") and not ("images" in name and statistic == "std"):
                np.testing.assert_allclose(own, their, atol=0.01)


@pytest.mark.parametrize("version", VERSIONS)
def test_pictures_are_where_lerobot_looks_for_them(write: Write, readers: Mapping[str, Any], version: str) -> None:
    path = write(version=version, frames=readers, images=True)
    features = json.loads((path / "meta/info.json").read_text())["features"]
    camera = {"dtype": "image", "shape": [48, 64, 3], "names": ["height", "width", "channels"]}
    assert features["observation.images.front"] == camera
    table = pq.read_table(sorted(path.glob("data/*/*.parquet"))[0])
    assert json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["observation.wrist"] == {
        "_type": "Image"
    }
    first = table["observation.images.front"][0].as_py()
    assert first["path"] == ("frame-000000.png" if version == "v3.0" else "frame_000000.png")
    assert first["bytes"].startswith(b"\x89PNG")


def test_files_of_version_3_are_begun_anew_when_they_are_full(
    write: Write, episodes: list[Episode], readers: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "_MEGABYTE", 0)
    path = write(frames=readers)

    for pattern in ("data/*/*.parquet", "videos/observation.images.front/*/*.mp4", "videos/observation.wrist/*/*.mp4"):
        files = sorted(path.glob(pattern))
        assert [file.stem for file in files] == ["file-000", "file-001", "file-002", "file-003"]
    with read_lerobot(path) as source:
        for index in (3, 0, 2, 1):
            assert_same(source.episode(index), episodes[index])
        small = [source.frames(index, "observation.images.front") for index in range(4)]
    monkeypatch.undo()
    with read_lerobot(write("whole", frames=readers)) as source:
        for index in range(4):
            error = np.abs(source.frames(index, "observation.images.front").astype(int) - small[index])
            assert error.mean() < 4


def test_timestamps_of_ones_own_are_kept(write: Write, episodes: list[Episode]) -> None:
    rng = np.random.default_rng(0)
    own = [
        (np.arange(len(each) + 1) / 10 + rng.uniform(0, 5e-5, len(each) + 1)).astype(np.float32) for each in episodes
    ]
    timed = [replace(each, infos={"timestamp": times}) for each, times in zip(episodes, own, strict=True)]
    with read_lerobot(write(episodes=timed)) as source:
        for index, times in enumerate(own):
            assert_bits(source.episode(index).infos["timestamp"], times)


def test_timestamps_that_jump_are_refused(write: Write, episodes: list[Episode]) -> None:
    times = np.array([0, 0.1, 0.2, 7, 7.1, 7.2], np.float32)
    episodes[0] = replace(episodes[0], infos={"timestamp": times})
    with pytest.raises(ValueError, match=r"episode 0: its timestamp 7 at step 3 should be 0\.3 at 10 frames"):
        write(episodes=episodes)


def test_splits_with_gaps_are_kept_from_lerobot_only(write: Write) -> None:
    path = write(splits={"train": [0, 1, 2], "odd": [1, 3], "none": []})
    assert json.loads((path / "meta/info.json").read_text())["splits"] == {"train": "0:3"}
    with read_lerobot(path) as source:
        assert {name: part.tolist() for name, part in source.splits.items()} == {
            "train": [0, 1, 2],
            "odd": [1, 3],
            "none": [],
        }


def changed(**changes: Any) -> Callable[[Episode], Episode]:
    return lambda episode: replace(episode, **changes)


def with_info(name: str, make: Callable[[int], np.ndarray]) -> Callable[[Episode], Episode]:
    return lambda episode: replace(episode, infos={**episode.infos, name: make(len(episode) + 1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(actions=np.zeros((0, 2), np.float32)), "it has no steps"),
        (changed(actions=np.zeros((8, 3), np.float32)), r"actions of shape \[8, 3\] where \[8, 2\] is needed"),
        (changed(actions=np.zeros((8, 2), np.int64)), "actions of type int64 where floating numbers are needed"),
        (changed(rewards=np.full(8, np.nan)), "NaN or infinite rewards"),
        (changed(observations=np.zeros((8, 5))), r"observations of shape \[8, 5\] where \[9, 5\] is needed"),
        (changed(origin={"behaviour": "x"}), "nothing says what the robot is to do; put it as 'task' in its origin"),
        (changed(origin={"task": "x", "by": object()}), "its origin has no JSON form"),
        (changed(infos={}), "it lacks 'distance', unlike the episodes before it"),
        (changed(states=None), "it lacks 'robopref.state', unlike the episodes before it"),
        (with_info("new", np.zeros), "it has 'new', unlike the episodes before it"),
        (with_info("grip", lambda n: np.zeros((n, 1), np.int32)), r"'grip' of int32 \[1\], unlike int64 \[1\]"),
        (with_info("grip", lambda n: np.zeros(n, np.int64)), "it has infos of the shapes"),
        (with_info("a/b", np.zeros), "must not be empty nor contain a slash"),
        (with_info("image_quality", np.zeros), "LeRobot takes all with 'image' in it for images"),
        (with_info("index", np.zeros), "an info called 'index', a name that LeRobot needs for itself"),
        (with_info("next.x", np.zeros), "an info called 'next.x', a name that LeRobot needs for itself"),
        (with_info("name", lambda n: np.full(n, "x")), "'name' of type <U1; only numbers and booleans"),
        (with_info("short", lambda n: np.zeros(n - 1)), r"'short' of shape \[8\], without a row for each observation"),
        (with_info("timestamp", lambda n: np.arange(n) / 10), "timestamps of type float64"),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_what_cannot_be_stored_is_refused_and_leaves_nothing(
    write: Write,
    tmp_path: Path,
    episodes: list[Episode],
    change: Callable[[Episode], Episode],
    message: str,
    version: str,
) -> None:
    episodes[2] = change(episodes[2])
    with pytest.raises(ValueError, match=rf"cannot write .*dataset: episode 2: .*{message}") as caught:
        write(episodes=episodes, version=version)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": []}, "there are no episodes to store"),
        ({"version": "v2.0"}, "'v2.0' is no version that is written; choose v2.1 or v3.0"),
        ({"fps": 12.5}, "fps is 12.5, and must be a whole number from 1 to 1000"),
        ({"codec": "mjpeg"}, "'mjpeg' is no codec that is written; choose libsvtav1 or h264"),
        ({"keys": {"state": 4}}, "do not make up an observation of 5 numbers"),
        ({"keys": {"state": 5, "x": 0}}, "do not make up an observation of 5 numbers"),
        ({"keys": {"state": 3, "observation.state": 2}}, "two features would have the same name"),
        ({"keys": {"a/b": 5}}, "must not be empty nor contain a slash"),
        ({"keys": {"image": 5}}, "LeRobot takes all with 'image' in it for images"),
        ({"observation_space": gymnasium.spaces.Discrete(3)}, "the observation space must be a flat Box"),
        ({"env": {"made": object()}}, "has no JSON form"),
        ({"splits": {"odd": [3, 1]}}, "the split 'odd' does not name some of the 4 episodes in ascending order"),
        ({"splits": {"odd": [3, 4]}}, "the split 'odd' does not name some of the 4 episodes in ascending order"),
        ({"frames": {"x": lambda index: np.zeros((2, 8, 8, 3), np.uint8)}}, r"frames of 'observation.images.x' are"),
        ({"frames": {"x": lambda index: np.zeros((6, 8, 8, 3))}}, r"are float64 \[6, 8, 8, 3\] where uint8"),
        (
            {"frames": {"x": lambda index: np.zeros((6, 9, 9, 3), np.uint8)}, "codec": "h264"},
            "h264 cannot encode frames of 9x9 pixels .*; choose libsvtav1, or keep the cameras as images",
        ),
    ],
)
def test_wrong_arguments_are_refused_and_leave_nothing(
    write: Write, tmp_path: Path, changes: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"cannot write .*{message}") as caught:
        write(**changes)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(write: Write, tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    with pytest.raises(FileExistsError, match="already exists"):
        write()


def test_one_task_serves_all_that_name_none(write: Write, episodes: list[Episode]) -> None:
    episodes[1:] = [replace(episode, origin={}) for episode in episodes[1:]]
    with read_lerobot(write(task="lift")) as source:
        assert source.tasks == {0: "task 0", 1: "lift"}
        assert [source.episode(index).origin["task"] for index in range(4)] == ["task 0", "lift", "lift", "lift"]
