"""robomimic's files: made here by hand, written and read back, hostile ones, and against robomimic's own code."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import gymnasium
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from robopref.episodes import load_episodes, write_episodes
from robopref.formats.robomimic import read_robomimic, write_robomimic
from robopref.types import Episode

SIZES = {"object": 3, "robot0_eef_pos": 2}
OBSERVATIONS, ACTIONS, STATES = 5, 2, 4
IMAGE = (4, 6, 3)
ENV = {"env_name": "Lift", "type": 1, "env_version": "1.5.1", "env_kwargs": {"robots": ["Panda"], "control_freq": 20}}
SPACES = {
    "observation_space": gymnasium.spaces.Box(-np.inf, np.inf, (OBSERVATIONS,), dtype=np.float64),
    "action_space": gymnasium.spaces.Box(-1, 1, (ACTIONS,), dtype=np.float64),
}


def foreign_demo(length: int, seed: int, *, images: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a demonstration as robomimic lays them out."""
    rng = np.random.default_rng(seed)
    every = {key: rng.normal(size=(length + 1, size)) for key, size in SIZES.items()}
    if images:
        every["agentview_image"] = rng.integers(0, 256, (length + 1, *IMAGE), np.uint8)
    demo = {f"obs/{key}": values[:-1] for key, values in every.items()}
    demo |= {f"next_obs/{key}": values[1:] for key, values in every.items()}
    demo |= {"actions": rng.uniform(-1, 1, (length, ACTIONS)), "rewards": rng.normal(size=length)}
    dones = np.append(np.zeros(length - 1, np.int64), 1)
    return demo | {"dones": dones, "states": rng.normal(size=(length, STATES))}


def foreign_file(
    path: Path, demos: Mapping[str, Mapping[str, Any]], masks: Mapping[str, Sequence[str]] | None = None
) -> Path:
    """A file as robomimic's scripts write it."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for name, demo in demos.items():
            group = data.create_group(name)
            for place, values in demo.items():
                group[place] = values
            group.attrs["num_samples"] = len(demo["actions"])
            group.attrs["model_file"] = f"<mujoco model='{name}'/>"
        data.attrs["total"] = sum(len(demo["actions"]) for demo in demos.values())
        data.attrs["env_args"] = json.dumps(ENV, indent=4)
        for name, members in (masks or {}).items():
            file[f"mask/{name}"] = np.array(members, dtype="S")
    return path


def change(path: Path, edit: Callable[[h5py.File], Any]) -> Path:
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def random_episodes(count: int, seed: int = 0, *, states: bool = True, dtype: str = "f8") -> list[Episode]:
    """Of 1, 2, ... steps, with everything that an episode can have."""
    rng = np.random.default_rng(seed)
    return [
        Episode(
            observations=rng.normal(size=(length + 1, OBSERVATIONS)).astype(dtype),
            actions=rng.uniform(-1, 1, (length, ACTIONS)).astype(dtype),
            rewards=rng.normal(size=length).astype(dtype),
            terminated=bool(length % 2),
            truncated=bool(length % 3),
            infos={"success": np.arange(length + 1) > 1, "force": rng.normal(size=(length + 1, 2, 2)).astype("f4")},
            states=rng.normal(size=(length + 1, STATES)) if states else None,
            seed=None if length % 2 else 2**40 + length,
            origin={"behaviour": "scripted", "noise": 0.1 * length} if length % 2 else {},
        )
        for length in range(1, count + 1)
    ]


def assert_same(found: Episode, expected: Episode) -> None:
    """Equal in everything, dtypes included."""
    for field in dataclasses.fields(Episode):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "infos":
            assert ours.keys() == theirs.keys()
            pairs = [(ours[name], theirs[name]) for name in theirs]
        elif isinstance(theirs, np.ndarray):
            pairs = [(ours, theirs)]
        else:
            assert ours == theirs, field.name
            assert type(ours) is type(theirs), field.name
            continue
        for one, other in pairs:
            np.testing.assert_array_equal(one, other, strict=True, err_msg=field.name)


# Files of others


def test_a_file_as_robomimic_writes_it_becomes_episodes(tmp_path: Path) -> None:
    demos = {f"demo_{number}": foreign_demo(3 + number, number) for number in range(3)}
    with read_robomimic(foreign_file(tmp_path / "a.hdf5", demos)) as source:
        assert len(source) == 3
        assert source.keys == SIZES
        assert source.env == ENV
        assert (source.description, source.splits, source.cameras) == ("", {}, {})
        assert source.observation_space == SPACES["observation_space"]
        assert source.action_space == SPACES["action_space"]
        for index, (name, demo) in enumerate(demos.items()):
            episode = source.episode(index)
            for group, rows in (("obs", slice(-1)), ("next_obs", slice(1, None))):
                joined = np.concatenate([demo[f"{group}/object"], demo[f"{group}/robot0_eef_pos"]], axis=1)
                np.testing.assert_array_equal(episode.observations[rows], joined)
            np.testing.assert_array_equal(episode.actions, demo["actions"])
            np.testing.assert_array_equal(episode.rewards, demo["rewards"])
            np.testing.assert_array_equal(episode.states, demo["states"][[*range(3 + index), -1]])
            assert (episode.terminated, episode.truncated) == (True, False)
            assert episode.origin == {"demo": name, "final_state": "repeated"}
            assert (episode.seed, dict(episode.infos)) == (None, {})
            assert source.model(index) == f"<mujoco model='{name}'/>"


def test_episodes_are_in_the_natural_order_of_their_names_and_masks_follow_it(tmp_path: Path) -> None:
    demos = {f"demo_{number}": foreign_demo(2, number) for number in (10, 2, 9, 1)}
    masks = {"train": ["demo_10", "demo_1", "demo_77"], "valid": ["demo_9"], "20_percent": []}
    with read_robomimic(foreign_file(tmp_path / "a.hdf5", demos, masks)) as source:
        assert source.demonstrations == ("demo_1", "demo_2", "demo_9", "demo_10")
        assert {name: list(split) for name, split in source.splits.items()} == {
            **{"train": [0, 3], "valid": [2]},
            "20_percent": [],
        }
        np.testing.assert_array_equal(source.episode(3).actions, demos["demo_10"]["actions"])


def test_keys_choose_parts_and_their_order(tmp_path: Path) -> None:
    demo = foreign_demo(4, 0)
    path = foreign_file(tmp_path / "a.hdf5", {"demo_0": demo})
    with read_robomimic(path, keys=["robot0_eef_pos", "object"]) as source:
        assert list(source.keys.items()) == [("robot0_eef_pos", 2), ("object", 3)]
        np.testing.assert_array_equal(source.episode(0).observations[:-1, :2], demo["obs/robot0_eef_pos"])
        np.testing.assert_array_equal(source.episode(0).observations[:-1, 2:], demo["obs/object"])
    with read_robomimic(path, keys=["object"]) as source:
        assert source.observation_space.shape == (3,)
        np.testing.assert_array_equal(source.episode(0).observations[1:], demo["next_obs/object"])
    for keys, message in (
        (["objects"], "has no observation 'objects' of numbers; it has 'object', 'robot0_eef_pos'"),
        (["../actions"], "has no observation '../actions'"),
        (["object", "object"], "name each once"),
        ([], "name each once"),
    ):
        with pytest.raises(ValueError, match=message):
            read_robomimic(path, keys=keys)


def test_what_a_file_lacks_is_said_and_not_made_up(tmp_path: Path) -> None:
    demo = {name: values for name, values in foreign_demo(4, 0, images=True).items() if not name.startswith("next_obs")}
    del demo["rewards"], demo["dones"], demo["states"]
    with read_robomimic(foreign_file(tmp_path / "a.hdf5", {"demo_0": demo})) as source:
        episode = source.episode(0)
        assert episode.origin == {"demo": "demo_0", "final_observation": "repeated", "rewards": "missing"}
        np.testing.assert_array_equal(episode.observations[-1], episode.observations[-2])
        np.testing.assert_array_equal(episode.rewards, np.zeros(4))
        assert episode.states is None
        assert (episode.terminated, episode.truncated) == (False, True)
        frames = source.frames(0, "agentview_image")
        np.testing.assert_array_equal(frames, demo["obs/agentview_image"][[0, 1, 2, 3, 3]])


@pytest.mark.parametrize(
    ("dones", "terminated", "kept"),
    [
        ([0, 0, 0], False, None),
        ([0, 0, 1], True, None),
        ([0, 1, 1], True, [0, 0, 1, 1]),
        ([1, 0, 0], False, [0, 1, 0, 0]),
    ],
)
def test_the_last_done_says_how_an_episode_ended(
    tmp_path: Path, dones: list[int], terminated: bool, kept: list[int] | None
) -> None:
    demo = foreign_demo(3, 0) | {"dones": np.array(dones)}
    with read_robomimic(foreign_file(tmp_path / "a.hdf5", {"demo_0": demo})) as source:
        episode = source.episode(0)
        assert (episode.terminated, episode.truncated) == (terminated, not terminated)
        assert {name: list(info) for name, info in episode.infos.items()} == ({} if kept is None else {"dones": kept})


def test_kinds_of_observations(tmp_path: Path) -> None:
    """Numbers per step are parts; bytes of four axes are cameras; all else is left out."""
    demo = foreign_demo(3, 0, images=True)
    for group in ("obs", "next_obs"):
        demo[f"{group}/gripper"] = np.arange(3, dtype=np.float32)
        demo[f"{group}/contact"] = np.eye(3, dtype=bool)
        demo[f"{group}/depth"] = np.zeros((3, 4, 6, 1), np.float32)
        demo[f"{group}/instruction"] = np.array([b"lift"] * 3)
        demo[f"{group}/nested/part"] = np.zeros((3, 1))
    with read_robomimic(foreign_file(tmp_path / "a.hdf5", {"demo_0": demo})) as source:
        assert list(source.keys.items()) == [("contact", 3), ("gripper", 1), *SIZES.items()]
        assert source.cameras == {"agentview_image": IMAGE}
        observations = source.episode(0).observations
        assert observations.dtype == np.float64
        np.testing.assert_array_equal(observations[:-1, :4], np.column_stack([np.eye(3), [0, 1, 2]]))
        frames = np.concatenate([demo["obs/agentview_image"], demo["next_obs/agentview_image"][-1:]])
        np.testing.assert_array_equal(source.frames(0, "agentview_image"), frames, strict=True)
        with pytest.raises(ValueError, match="has no camera 'wrist'; it has 'agentview_image'"):
            source.frames(0, "wrist")
    with read_robomimic(tmp_path / "a.hdf5", keys=["contact"]) as source:
        assert source.episode(0).observations.dtype == source.observation_space.dtype == np.float64
    with read_robomimic(tmp_path / "a.hdf5", keys=["gripper"]) as source:
        assert source.episode(0).observations.dtype == source.observation_space.dtype == np.float32


def test_there_are_no_episodes_beyond_the_last(tmp_path: Path) -> None:
    with read_robomimic(foreign_file(tmp_path / "a.hdf5", {"demo_0": foreign_demo(2, 0, images=True)})) as source:
        for index in (-1, 1):
            for use in (source.episode, source.model, lambda index: source.frames(index, "agentview_image")):
                with pytest.raises(IndexError, match=f"episodes 0 to 0, so there is no episode {index}"):
                    use(index)


def test_a_recording_of_robosuites_collector_says_what_to_do(tmp_path: Path) -> None:
    demo = foreign_demo(4, 0)
    raw = {name: demo[name] for name in ("actions", "states")}
    path = foreign_file(tmp_path / "demo.hdf5", {"demo_1": raw})
    change(path, lambda file: [file["data"].attrs.pop("env_args"), file["data/demo_1"].attrs.pop("num_samples")])
    with pytest.raises(
        ValueError, match=r"a raw recording, with states and actions only; play it back .*states_to_obs"
    ):
        read_robomimic(path)


# Written and read back


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("states", [True, False])
def test_nothing_is_lost_on_the_way(tmp_path: Path, dtype: str, states: bool) -> None:
    episodes = random_episodes(12, states=states, dtype=dtype)
    rng = np.random.default_rng(1)
    images = {
        name: [rng.integers(0, 256, (len(each) + 1, *IMAGE), np.uint8) for each in episodes] for name in ("c", "b")
    }
    space = gymnasium.spaces.Box(np.array([-np.inf, -1, 0, 0.1, -3]), np.arange(5.0) + 1, dtype=np.float64)
    write_robomimic(
        tmp_path / "a.hdf5",
        iter(episodes),
        observation_space=space,
        action_space=SPACES["action_space"],
        env=ENV,
        keys={"z": 1, "a": 3, "m": 1},
        splits={"train": [11, 0, 10], "none": []},
        frames={name: frames.__getitem__ for name, frames in images.items()},
        models=lambda index, _: "m" * 100_000 if index == 3 else None,
        description="a test",
    )
    with read_robomimic(tmp_path / "a.hdf5") as source:
        assert list(source.keys.items()) == [("z", 1), ("a", 3), ("m", 1)]
        assert (source.env, source.description, source.cameras) == (ENV, "a test", dict.fromkeys(("b", "c"), IMAGE))
        assert (source.observation_space, source.action_space) == (space, SPACES["action_space"])
        assert {name: list(split) for name, split in source.splits.items()} == {"none": [], "train": [0, 10, 11]}
        assert [source.model(index) for index in (2, 3)] == [None, "m" * 100_000]
        assert len(source) == len(episodes)
        for index, episode in enumerate(episodes):
            assert_same(source.episode(index), episode)
            for name, frames in images.items():
                np.testing.assert_array_equal(source.frames(index, name), frames[index], strict=True)
    with read_robomimic(tmp_path / "a.hdf5", keys=["a", "z"]) as source:
        np.testing.assert_array_equal(source.observation_space.low, space.low[[1, 2, 3, 0]], strict=True)
        np.testing.assert_array_equal(source.observation_space.high, space.high[[1, 2, 3, 0]], strict=True)
        np.testing.assert_array_equal(source.episode(4).observations, episodes[4].observations[:, [1, 2, 3, 0]])


def test_a_foreign_file_written_again_is_the_same(tmp_path: Path) -> None:
    demos = {f"demo_{number}": foreign_demo(3 + number, number, images=True) for number in range(3)}
    demos["demo_1"]["dones"] = np.array([0, 1, 1, 1])
    with read_robomimic(foreign_file(tmp_path / "a.hdf5", demos, {"train": ["demo_0", "demo_2"]})) as source:
        write_robomimic(
            tmp_path / "b.hdf5",
            (source.episode(index) for index in range(len(source))),
            observation_space=source.observation_space,
            action_space=source.action_space,
            env=source.env,
            keys=source.keys,
            splits=source.splits,
            frames={camera: lambda index, camera=camera: source.frames(index, camera) for camera in source.cameras},
            models=lambda index, _: source.model(index),
        )
        with read_robomimic(tmp_path / "b.hdf5") as again:
            for index in range(3):
                assert_same(again.episode(index), source.episode(index))
    with h5py.File(tmp_path / "a.hdf5") as old, h5py.File(tmp_path / "b.hdf5") as new:
        assert json.loads(new["data"].attrs["env_args"]) == json.loads(old["data"].attrs["env_args"])
        assert new["data"].attrs["total"] == old["data"].attrs["total"] == 12
        np.testing.assert_array_equal(new["mask/train"][()], old["mask/train"][()], strict=True)
        for name, demo in demos.items():
            assert new[f"data/{name}"].attrs["num_samples"] == len(demo["actions"])
            assert new[f"data/{name}"].attrs["model_file"] == old[f"data/{name}"].attrs["model_file"]
            for place, values in demo.items():
                np.testing.assert_array_equal(new[f"data/{name}/{place}"][()], values, strict=True, err_msg=place)


def test_the_way_through_the_episode_store(tmp_path: Path) -> None:
    demos = {f"demo_{number}": foreign_demo(3 + number, number) for number in range(3)}
    with read_robomimic(foreign_file(tmp_path / "a.hdf5", demos)) as source:
        episodes = [source.episode(index) for index in range(len(source))]
        spaces = {"observation_space": source.observation_space, "action_space": source.action_space}
        write_episodes(tmp_path / "store", episodes, **spaces, env=source.env)
    dataset = load_episodes(tmp_path / "store")
    stored = [dataset.episode(index) for index in range(3)]
    write_robomimic(tmp_path / "b.hdf5", stored, **spaces, env=dataset.env, keys=SIZES)
    with read_robomimic(tmp_path / "b.hdf5") as source:
        for index, episode in enumerate(episodes):
            assert_same(source.episode(index), episode)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_numbers_survive(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([32, 64]))
    numbers = st.floats(width=width, allow_nan=False, allow_infinity=False)
    length = data.draw(st.integers(1, 4))
    names = data.draw(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1), max_size=3))
    keys = {name: 1 for name in names if name != "."} | {"last": 2}
    size, dtype = sum(keys.values()), f"f{width // 8}"
    episode = Episode(
        observations=data.draw(arrays(dtype, (length + 1, size), elements=numbers)),
        actions=data.draw(arrays(dtype, (length, 1), elements=numbers)),
        rewards=data.draw(arrays(dtype, (length,), elements=numbers)),
        terminated=data.draw(st.booleans()),
        truncated=data.draw(st.booleans()),
        states=data.draw(arrays("f8", (length + 1, 2), elements=st.floats(allow_nan=False, allow_infinity=False))),
        origin=data.draw(st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))),
    )
    path = tmp_path_factory.mktemp("any") / "a.hdf5"
    space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), dtype=dtype)
    write_robomimic(
        path, [episode], observation_space=space, action_space=gymnasium.spaces.Box(-1, 1, (1,)), env={}, keys=keys
    )
    with read_robomimic(path) as source:
        assert source.keys == keys
        assert_same(source.episode(0), episode)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    first, second = random_episodes(2)
    few = dataclasses.replace(second, actions=second.actions[:1])
    image = np.zeros((2, *IMAGE), np.uint8)
    cases: list[tuple[list[Episode], dict[str, Any], str]] = [
        ([], {}, "there are no episodes"),
        ([first, few], {}, r"episode 1 has observations of shape \[3, 5\] where \[2, 5\] is needed"),
        ([first, dataclasses.replace(second, states=None)], {}, "episode 1 has no states but episode 0 does"),
        ([first], {"keys": {"a": 2}}, r"keys \{'a': 2\} must split the 5 numbers"),
        ([first], {"keys": {"a": 6, "b": -1}}, "must split the 5 numbers"),
        ([first], {"keys": {"a/b": 5}}, "'a/b' cannot be a name"),
        (
            [first],
            {"keys": {"a": 5}, "frames": {"a": lambda _: image}},
            "'a' is both a part of the observation and a camera",
        ),
        ([first], {"splits": {"../x": [0]}}, "cannot be a name"),
        ([first], {"splits": {"train": [0, 1]}}, "the split 'train' has episode 1, but there are 1"),
        ([first], {"frames": {"cam": lambda _: image[:1]}}, r"episode 0 has frames of 'cam' .* 2 images of bytes"),
        ([first], {"frames": {"cam": lambda _: image / 255}}, "of type float64"),
        ([first], {"env": {"a": np.nan}}, "env has no JSON form"),
        ([first], {"observation_space": gymnasium.spaces.Discrete(3)}, "must be a flat Box"),
    ]
    for episodes, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            write_robomimic(tmp_path / "a.hdf5", episodes, **{**SPACES, "env": ENV, **changes})
        assert list(tmp_path.iterdir()) == []
    write_robomimic(tmp_path / "a.hdf5", [first], **SPACES, env=ENV)
    with pytest.raises(FileExistsError, match="it already exists"):
        write_robomimic(tmp_path / "a.hdf5", [second], **SPACES, env=ENV)


def test_one_episode_at_a_time_is_held(tmp_path: Path) -> None:
    """When an episode is asked for, only the one before it may still be there."""
    alive: list[Any] = []

    class Held(np.ndarray):
        pass

    def stream() -> Iterator[Episode]:
        for episode in random_episodes(5):
            observations = episode.observations.view(Held)
            assert sum(each() is not None for each in alive) <= 1
            alive.append(weakref.ref(observations))
            yield dataclasses.replace(episode, observations=observations)
            del observations

    write_robomimic(tmp_path / "a.hdf5", stream(), **SPACES, env=ENV)
    assert len(alive) == 5


# Damaged and hostile files


def refusal(path: Path) -> str:
    """The one sentence with which a file is refused, at opening or at reading."""

    def read_all() -> None:
        with read_robomimic(path) as source:
            for index in range(len(source)):
                source.episode(index)
                for camera in source.cameras:
                    source.frames(index, camera)

    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_all()
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def replace(place: str, value: Any) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        del file[place]
        if value is not None:
            file[place] = value

    return edit


DEMO = "data/demo_1"
DAMAGES: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "no data": (
        lambda file: file.move("data", "episodes"),
        "is not a robomimic file: it has no group data, but 'episodes'",
    ),
    "no demonstrations": (
        lambda file: [file["data"].pop(name) for name in list(file["data"])],
        "has no demonstrations",
    ),
    "env_args are no JSON": (lambda file: file["data"].attrs.update(env_args="{"), "env_args that is not JSON"),
    "env_args are a list": (
        lambda file: file["data"].attrs.update(env_args="[]"),
        "env_args that is not a JSON object",
    ),
    "no actions": (replace(f"{DEMO}/actions", None), "has no /data/demo_1/actions"),
    "flat actions": (replace("data/demo_0/actions", np.zeros(3)), r"has actions \[3\] in data/demo_0"),
    "a number for actions": (replace(f"{DEMO}/actions", 1.0), "has 0 actions in data/demo_1"),
    "fewer actions": (
        replace(f"{DEMO}/actions", np.zeros((2, 2))),
        "has 2 actions in data/demo_1, where num_samples is 4",
    ),
    "wider actions": (
        replace(f"{DEMO}/actions", np.zeros((4, 3))),
        r"\[4, 3\] numbers in data/demo_1/actions.*\[4, 2\]",
    ),
    "a longer observation": (
        replace(f"{DEMO}/obs/object", np.zeros((5, 3))),
        r"\[5, 3\] numbers .*\[4, 3\] are needed",
    ),
    "a missing observation": (replace(f"{DEMO}/obs/object", None), "has no /data/demo_1/obs/object"),
    "a missing next observation": (replace(f"{DEMO}/next_obs/object", None), "has no /data/demo_1/next_obs/object"),
    "texts as observations": (replace(f"{DEMO}/obs/object", ["a"] * 4), "not numbers"),
    "texts as rewards": (replace(f"{DEMO}/rewards", ["a"] * 4), "not numbers"),
    "a group as dones": (replace(f"{DEMO}/dones/x", None), "is not an array"),
    "other images": (
        replace(f"{DEMO}/obs/agentview_image", np.zeros((4, 8, 6, 3), "u1")),
        r"\[4, 4, 6, 3\] are needed",
    ),
    "a mask of numbers": (lambda file: file.update({"mask/train": np.zeros(3)}), "is not a list of texts"),
    "a mask that is a link": (
        lambda file: file.update({"mask/train": h5py.ExternalLink("/etc/passwd", "x")}),
        "a link that leads elsewhere",
    ),
    "observations behind a link": (
        replace(f"{DEMO}/obs", h5py.SoftLink("/data/demo_0/obs")),
        "a link that leads elsewhere",
    ),
    "notes of another version": (lambda file: file["data"].attrs.update(robopref='{"schema_version": 2}'), "version 2"),
    "notes of other keys": (
        lambda file: file["data"].attrs.update(robopref='{"schema_version": 1, "keys": {"object": 2}}'),
        "was changed after robopref wrote it",
    ),
    "notes without spaces": (
        lambda file: file["data"].attrs.update(robopref='{"schema_version": 1}'),
        "has notes of a space that cannot be read",
    ),
    "notes of an episode": (
        lambda file: file[DEMO].attrs.update(robopref='{"schema_version": 1, "seed": "1", "origin": []}'),
        "has notes of data/demo_1 that are damaged",
    ),
    "an absurd shape": (
        lambda file: [file.pop(f"{DEMO}/obs/object"), file[f"{DEMO}/obs"].create_dataset("object", (2**60, 3), "f4")],
        "cannot be all of it",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_hostile_file_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    edit, message = DAMAGES[name]
    demos = {f"demo_{number}": foreign_demo(3 + number, number, images=True) for number in range(2)}
    path = foreign_file(tmp_path / "a.hdf5", demos)
    if name == "a group as dones":
        change(path, lambda file: [file.pop(f"{DEMO}/dones"), file.create_group(f"{DEMO}/dones/x")])
    text = refusal(change(path, edit))
    assert re.search(message, text), text


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = foreign_file(tmp_path / "a.hdf5", {"demo_0": foreign_demo(3, 0)}).read_bytes()
    path = tmp_path / "cut.hdf5"
    for length in np.linspace(0, len(whole) - 1, 25).astype(int):
        path.write_bytes(whole[:length])
        refusal(path)


# Against robomimic's own code


@pytest.fixture
def robomimic(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of robomimic, or skips the test."""
    pytest.importorskip("robomimic", reason="robomimic is not installed; requirements-robomimic.txt brings it")
    # Its file utilities import torchvision, whose builds often do not load beside a CPU's torch, for networks only.
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    obs_utils = importlib.import_module("robomimic.utils.obs_utils")
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": list(SIZES), "rgb": ["agentview_image"]}})
    return importlib.import_module


def write_for_robomimic(path: Path) -> tuple[list[Episode], list[np.ndarray]]:
    episodes = random_episodes(12)
    rng = np.random.default_rng(2)
    images = [rng.integers(0, 256, (len(each) + 1, *IMAGE), np.uint8) for each in episodes]
    write_robomimic(
        path,
        episodes,
        **SPACES,
        env=ENV,
        keys=SIZES,
        splits={"train": [10, 1, 2]},
        frames={"agentview_image": images.__getitem__},
        models=lambda index, _: f"<mujoco model='{index}'/>",
    )
    return episodes, images


@pytest.mark.parametrize("cache", [None, "low_dim", "all"])
@pytest.mark.parametrize("split", [None, "train"])
def test_robomimics_dataset_reads_what_was_written(
    tmp_path: Path, robomimic: Callable[[str], Any], cache: str | None, split: str | None
) -> None:
    episodes, images = write_for_robomimic(tmp_path / "a.hdf5")
    dataset = robomimic("robomimic.utils.dataset").SequenceDataset(
        str(tmp_path / "a.hdf5"),
        obs_keys=(*SIZES, "agentview_image"),
        dataset_keys=("actions", "rewards", "dones", "states"),
        hdf5_cache_mode=cache,
        filter_by_attribute=split,
    )
    chosen = range(12) if split is None else (1, 2, 10)
    rows = [(index, step) for index in chosen for step in range(len(episodes[index]))]
    assert len(dataset) == len(rows)
    for (index, step), item in zip(rows, (dataset[place] for place in range(len(dataset))), strict=True):
        episode = episodes[index]
        np.testing.assert_allclose(item["actions"][0], episode.actions[step], rtol=1e-6)
        np.testing.assert_allclose(item["rewards"][0], episode.rewards[step], rtol=1e-6)
        np.testing.assert_allclose(item["states"][0], episode.states[step], rtol=1e-6)
        assert item["dones"][0] == (episode.terminated and step == len(episode) - 1)
        for group, row in (("obs", step), ("next_obs", step + 1)):
            joined = np.concatenate([item[group][key][0] for key in SIZES])
            np.testing.assert_array_equal(joined, episode.observations[row])
            np.testing.assert_array_equal(item[group]["agentview_image"][0], images[index][row])


def test_robomimics_metadata_are_what_was_written(tmp_path: Path, robomimic: Callable[[str], Any]) -> None:
    path = str(tmp_path / "a.hdf5")
    write_for_robomimic(tmp_path / "a.hdf5")
    file_utils = robomimic("robomimic.utils.file_utils")
    assert file_utils.get_env_metadata_from_dataset(path) == ENV
    assert file_utils.get_demos_for_filter_key(path, "train") == ["demo_1", "demo_2", "demo_10"]
    shapes = file_utils.get_shape_metadata_from_dataset(path)
    assert shapes["ac_dim"] == ACTIONS
    assert shapes["all_shapes"] == {"object": [3], "robot0_eef_pos": [2], "agentview_image": [3, 4, 6]}


def test_a_file_that_robomimics_own_code_wrote_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, robomimic: Callable[[str], Any]
) -> None:
    """Its script plays states back in an environment: here one that shows its state, which an action adds to."""
    place = np.zeros(2)

    def reset_to(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
        place[:] = state["states"]
        return observe()

    def observe() -> dict[str, np.ndarray]:
        return {"object": np.append(place, 1.0), "robot0_eef_pos": -place}

    def step(action: np.ndarray) -> tuple[Any, ...]:
        place[:] += action
        return observe(), 0.0, False, {}

    env = MagicMock(spec=robomimic("robomimic.envs.env_base").EnvBase)
    env.reset_to, env.step = reset_to, step
    env.get_reward = lambda: float(place.sum())
    env.is_success = lambda: {"task": bool(place[0] > 0)}
    env.serialize = lambda: ENV
    script = robomimic("robomimic.scripts.dataset_states_to_obs")
    monkeypatch.setattr(script.EnvUtils, "create_env_for_data_processing", lambda **_: env)

    rng = np.random.default_rng(3)
    lengths = dict.fromkeys(("demo_2", "demo_10"), 5) | {"demo_9": 3}
    states = {name: rng.normal(size=(length + 1, 2)) for name, length in lengths.items()}
    raw = {name: {"states": path[:-1], "actions": np.diff(path, axis=0)} for name, path in states.items()}
    foreign_file(tmp_path / "raw.hdf5", raw)
    options = {"n": None, "shaped": False, "camera_names": [], "camera_height": 84, "camera_width": 84, "done_mode": 2}
    options |= {"copy_rewards": False, "copy_dones": False, "compress": True, "exclude_next_obs": False}
    script.dataset_states_to_obs(
        argparse.Namespace(dataset=str(tmp_path / "raw.hdf5"), output_name="made.hdf5", **options)
    )
    file_utils = robomimic("robomimic.utils.file_utils")
    file_utils.create_hdf5_filter_key(str(tmp_path / "made.hdf5"), ["demo_10", "demo_2"], "half")

    with read_robomimic(tmp_path / "made.hdf5") as source:
        assert source.demonstrations == ("demo_2", "demo_9", "demo_10")
        assert {name: list(split) for name, split in source.splits.items()} == {"half": [0, 2]}
        assert source.env == ENV
        for index, name in enumerate(source.demonstrations):
            episode, path = source.episode(index), states[name]
            expected = np.column_stack([path, np.ones(len(path)), -path])
            np.testing.assert_allclose(episode.observations, expected, atol=1e-12)
            np.testing.assert_array_equal(episode.actions, raw[name]["actions"])
            np.testing.assert_array_equal(episode.states, path[[*range(len(path) - 1), -2]])
            np.testing.assert_allclose(episode.rewards, path[1:].sum(axis=1), atol=1e-12)
            assert episode.terminated
            assert source.model(index) == f"<mujoco model='{name}'/>"
            succeeded = np.append(0, path[1:, 0] > 0)
            if succeeded[:-1].any():
                np.testing.assert_array_equal(episode.infos["dones"][:-1], succeeded[:-1])


def test_states_that_hold_more_than_robomimic_expects_are_kept_beside(tmp_path: Path) -> None:
    path, episodes = tmp_path / "flat.hdf5", random_episodes(4)

    def flat_states(index: int, episode: Episode) -> np.ndarray | None:
        # It is told of the very episode that is being written; the states of one are the whole.
        assert episode is episodes[index]
        return None if index == 2 else episode.states[:-1, 1:3].astype("f4")

    write_robomimic(path, episodes, **SPACES, env={}, flat_states=flat_states)
    with h5py.File(path) as file:
        for index, episode in enumerate(episodes):
            expected = episode.states[:-1] if index == 2 else episode.states[:-1, 1:3].astype("f4")
            np.testing.assert_array_equal(file[f"data/demo_{index}/states"][()], expected, strict=True)
    with read_robomimic(path) as source:
        for index, episode in enumerate(episodes):
            assert_same(source.episode(index), episode)
            flat = source.flat_states(index)
            if index == 2:
                assert flat is None
            else:
                np.testing.assert_array_equal(flat, episode.states[:-1, 1:3].astype("f4"), strict=True)
        with pytest.raises(IndexError, match="there is no episode 4"):
            source.flat_states(4)


def test_episodes_without_states_are_not_asked_for_flat_ones(tmp_path: Path) -> None:
    episodes = random_episodes(2, states=False)
    write_robomimic(tmp_path / "a.hdf5", episodes, **SPACES, env={}, flat_states=lambda *_: pytest.fail("asked"))
    with read_robomimic(tmp_path / "a.hdf5") as source:
        assert [source.flat_states(index) for index in range(2)] == [None, None]
        assert [source.episode(index).states for index in range(2)] == [None, None]


@pytest.mark.parametrize("shape", [(4, 2), (2, 2), (3,)])
def test_flat_states_have_a_row_for_each_action(tmp_path: Path, shape: tuple[int, ...]) -> None:
    episodes = random_episodes(3)[2:]
    with pytest.raises(ValueError, match=r"episode 0 has flat states of shape .* where 3 rows are needed"):
        write_robomimic(tmp_path / "a.hdf5", episodes, **SPACES, env={}, flat_states=lambda *_: np.zeros(shape))
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_a_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="episode 0 has a model with a zero byte in it"):
        write_robomimic(tmp_path / "a.hdf5", random_episodes(1), **SPACES, env=ENV, models=lambda *_: "a\0b")
    write_robomimic(tmp_path / "a.hdf5", random_episodes(1), **SPACES, env=ENV, models=lambda *_: "")
    with read_robomimic(tmp_path / "a.hdf5") as source:
        assert source.model(0) == ""


def test_damaged_flat_states_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    write_robomimic(path, random_episodes(3), **SPACES, env={}, flat_states=lambda _, episode: episode.states[:-1, :1])

    def shorten(file: h5py.File) -> None:
        del file["data/demo_2/states"]
        file["data/demo_2/states"] = np.zeros((2, 1))

    with read_robomimic(change(path, shorten)) as source:
        assert source.flat_states(1).shape == (2, 1)
        with pytest.raises(ValueError, match=r"\[2, 1\] numbers in data/demo_2/states, where \[3, 1\] are needed"):
            source.flat_states(2)
