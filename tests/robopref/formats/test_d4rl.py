"""D4RL's files: made here by hand as its scripts lay them out, written and read back, and hostile ones."""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robopref.formats.d4rl import read_d4rl, write_d4rl
from robopref.types import Episode

OBSERVATIONS, ACTIONS = 4, 2
SPACES = {
    "observation_space": gymnasium.spaces.Box(-np.inf, np.inf, (OBSERVATIONS,), dtype=np.float32),
    "action_space": gymnasium.spaces.Box(-1, 1, (ACTIONS,), dtype=np.float32),
}
Ends = Sequence[tuple[int, bool, bool]]
"""Of each episode, the steps, and whether it was terminated and timed out."""
ENDS: Ends = ((3, True, False), (1, False, True), (4, True, True), (2, False, True))


def foreign_arrays(ends: Ends, unfinished: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of D4RL's second version, whose rows count steps: what is in row 7 of `rewards` is 7."""
    rng = np.random.default_rng(seed)
    steps = sum(length for length, _, _ in ends) + unfinished
    last = np.cumsum([length for length, _, _ in ends], dtype=int) - 1
    flags = {name: np.zeros(steps, bool) for name in ("terminals", "timeouts")}
    for row, (_, terminated, timed_out) in zip(last, ends, strict=True):
        flags["terminals"][row], flags["timeouts"][row] = terminated, timed_out
    return flags | {
        "observations": rng.normal(size=(steps, OBSERVATIONS)).astype("f4"),
        "next_observations": rng.normal(size=(steps, OBSERVATIONS)).astype("f4"),
        "actions": rng.uniform(-1, 1, (steps, ACTIONS)).astype("f4"),
        "rewards": np.arange(steps, dtype="f4"),
        "infos/qpos": rng.normal(size=(steps, 3)),
        "infos/qvel": rng.normal(size=(steps, 2)),
        "infos/goal": rng.normal(size=(steps, 2)).astype("f4"),
        "infos/action_log_probs": rng.normal(size=steps).astype("f4"),
    }


def foreign_file(path: Path, arrays: Mapping[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values, compression="gzip" if np.ndim(values) else None)
    return path


def random_episodes(ends: Ends = ENDS, seed: int = 0, *, states: bool = True, dtype: str = "f4") -> list[Episode]:
    rng = np.random.default_rng(seed)
    return [
        Episode(
            observations=rng.normal(size=(length + 1, OBSERVATIONS)).astype(dtype),
            actions=rng.uniform(-1, 1, (length, ACTIONS)).astype(dtype),
            rewards=rng.normal(size=length).astype(dtype),
            terminated=terminated,
            truncated=truncated,
            infos={
                "success": np.arange(length + 1) > 2,
                "qpos": rng.normal(size=(length + 1, 3, 1)),
                "qvel": rng.normal(size=(length + 1, 2)),
            },
            states=rng.normal(size=(length + 1, 6)) if states else None,
            seed=None if length % 2 else length,
            origin={"behaviour": "scripted", "noise": 0.1} if length % 2 else {},
        )
        for length, terminated, truncated in ends
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
            continue
        for one, other in pairs:
            np.testing.assert_array_equal(one, other, strict=True, err_msg=field.name)


# Files of others


def test_flat_arrays_are_cut_into_episodes(tmp_path: Path) -> None:
    arrays = foreign_arrays(ENDS)
    metadata = {"metadata/algorithm": np.bytes_("SAC"), "metadata/iteration": 1000, "metadata/policy/fc0": np.zeros(9)}
    with read_d4rl(foreign_file(tmp_path / "a.hdf5", arrays | metadata)) as source:
        assert len(source) == len(ENDS)
        assert source.keys == {"observations": OBSERVATIONS}
        assert (source.env, source.description, source.splits, source.cameras) == ({}, "", {}, {})
        assert (source.observation_space, source.action_space) == (*SPACES.values(),)
        begin = 0
        for index, (length, terminated, timed_out) in enumerate(ENDS):
            episode, rows = source.episode(index), slice(begin, begin + length)
            begin += length
            for name in ("actions", "rewards"):
                np.testing.assert_array_equal(getattr(episode, name), arrays[name][rows], strict=True)
            final = arrays["next_observations"][begin - 1 : begin]
            expected = np.concatenate([arrays["observations"][rows], final])
            np.testing.assert_array_equal(episode.observations, expected, strict=True)
            assert (episode.terminated, episode.truncated) == (terminated, timed_out)
            assert episode.seed is None
            assert episode.origin == {"algorithm": "SAC", "iteration": 1000, "final_infos": "repeated"}
            assert episode.infos.keys() == {"qpos", "qvel", "goal", "action_log_probs"}
            for name, info in episode.infos.items():
                stored = arrays[f"infos/{name}"][rows]
                np.testing.assert_array_equal(info, np.concatenate([stored, stored[-1:]]), strict=True)
            assert episode.states is not None
            np.testing.assert_array_equal(episode.states[:, :3], episode.infos["qpos"])
            np.testing.assert_array_equal(episode.states[:, 3:], episode.infos["qvel"])


def test_a_file_with_the_least_that_one_may_have(tmp_path: Path) -> None:
    """No next observations, no infos; rewards and terminals with an axis too many, and of types of old files."""
    arrays = foreign_arrays(ENDS)
    least = {name: arrays[name] for name in ("observations", "actions", "timeouts")}
    least |= {
        "rewards": arrays["rewards"][:, None].astype("f8"),
        "terminals": arrays["terminals"][:, None].astype("f4"),
    }
    with read_d4rl(foreign_file(tmp_path / "a.hdf5", least)) as source:
        assert [len(source.episode(index)) for index in range(len(source))] == [length for length, _, _ in ENDS]
        episode = source.episode(2)
        np.testing.assert_array_equal(episode.observations, least["observations"][[4, 5, 6, 7, 7]])
        np.testing.assert_array_equal(episode.rewards, [4.0, 5.0, 6.0, 7.0])
        assert (episode.terminated, episode.truncated) == (True, True)
        assert episode.origin == {"final_observation": "repeated"}
        assert (episode.states, dict(episode.infos)) == (None, {})


def test_what_comes_after_the_last_end_is_an_episode_that_was_cut(tmp_path: Path) -> None:
    with read_d4rl(foreign_file(tmp_path / "a.hdf5", foreign_arrays(ENDS[:2], unfinished=3))) as source:
        assert len(source) == 3
        episode = source.episode(2)
        np.testing.assert_array_equal(episode.rewards, [4.0, 5.0, 6.0])
        assert (episode.terminated, episode.truncated) == (False, True)
        assert episode.origin["ending"] == "end of file"
        assert "ending" not in source.episode(1).origin
    with read_d4rl(foreign_file(tmp_path / "b.hdf5", foreign_arrays((), unfinished=5))) as source:
        assert [len(source.episode(index)) for index in range(len(source))] == [5]


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=6),
    horizon=st.integers(1, 5),
)
def test_files_without_timeouts_are_cut_at_the_horizon(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, bool]], horizon: int
) -> None:
    """Against going through the steps one by one, as one would in the environment."""
    terminals = np.concatenate([np.append(np.zeros(length - 1, bool), ended) for length, ended in pieces])
    lengths, ends, count = [], [], 0
    for row, terminal in enumerate(terminals):
        count += 1
        if terminal or count == horizon or row == len(terminals) - 1:
            lengths.append(count)
            ends.append((bool(terminal), not terminal))
            count = 0
    steps = len(terminals)
    arrays = {"observations": np.zeros((steps, 1)), "actions": np.zeros((steps, 1)), "rewards": np.arange(steps)}
    path = foreign_file(tmp_path_factory.mktemp("horizon") / "a.hdf5", arrays | {"terminals": terminals})
    with read_d4rl(path, horizon=horizon) as source:
        episodes = [source.episode(index) for index in range(len(source))]
    assert [len(episode) for episode in episodes] == lengths
    assert [(episode.terminated, episode.truncated) for episode in episodes] == ends
    np.testing.assert_array_equal(np.concatenate([episode.rewards for episode in episodes]), np.arange(steps))
    finished = terminals[-1] or lengths[-1] == horizon
    assert [("ending" in episode.origin) for episode in episodes] == [False] * (len(lengths) - 1) + [not finished]


def test_the_horizon_is_asked_for_where_it_is_needed_and_only_there(tmp_path: Path) -> None:
    arrays = foreign_arrays(ENDS)
    path = foreign_file(tmp_path / "a.hdf5", arrays)
    with pytest.raises(ValueError, match="has timeouts, which say where episodes were cut off; leave horizon away"):
        read_d4rl(path, horizon=3)
    del arrays["timeouts"]
    path = foreign_file(tmp_path / "b.hdf5", arrays)
    with pytest.raises(ValueError, match=r"has no timeouts, .*; say with horizon after how many steps .*\(1000 in"):
        read_d4rl(path)
    with pytest.raises(ValueError, match="horizon must be at least 1, not 0"):
        read_d4rl(path, horizon=0)


def test_there_are_no_other_episodes_and_no_images(tmp_path: Path) -> None:
    with read_d4rl(foreign_file(tmp_path / "a.hdf5", foreign_arrays(ENDS))) as source:
        for index in (-1, 4):
            for use in (source.episode, lambda index: source.frames(index, "front")):
                with pytest.raises(IndexError, match=f"episodes 0 to 3, so there is no episode {index}"):
                    use(index)
        with pytest.raises(ValueError, match="has no camera 'front': D4RL's files keep no images"):
            source.frames(0, "front")


# Written and read back


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("states", [True, False])
def test_nothing_is_lost_on_the_way(tmp_path: Path, dtype: str, states: bool) -> None:
    episodes = random_episodes((*ENDS, (2, False, False)), states=states, dtype=dtype)
    spaces = {
        "observation_space": gymnasium.spaces.Box(
            np.array([-np.inf, -1, 0, 0.1]), np.arange(4.0) + 1, dtype=np.float64
        ),
        "action_space": gymnasium.spaces.Box(-1 / 3, 0.1, (ACTIONS,), dtype=np.float32),
    }
    env = {"name": "locomotion/hopper", "horizon": 1000}
    write_d4rl(tmp_path / "a.hdf5", iter(episodes), **spaces, env=env, description="a test")
    with read_d4rl(tmp_path / "a.hdf5") as source:
        assert (source.env, source.description) == (env, "a test")
        assert {name: getattr(source, name) for name in spaces} == spaces
        assert len(source) == len(episodes)
        for index, episode in enumerate(episodes):
            assert_same(source.episode(index), episode)


def test_what_is_written_is_what_d4rls_own_functions_expect(tmp_path: Path) -> None:
    """Flat arrays of one length, whatever their name; transitions lead from one row to the next within an episode."""
    episodes = random_episodes()
    write_d4rl(tmp_path / "a.hdf5", episodes, **SPACES, env={})
    arrays: dict[str, np.ndarray] = {}
    with h5py.File(tmp_path / "a.hdf5") as file:
        file.visititems(lambda name, node: arrays.update({name: node[()]}) if isinstance(node, h5py.Dataset) else None)
    steps = sum(len(episode) for episode in episodes)
    assert {len(values) for values in arrays.values()} == {steps}
    assert {"observations", "next_observations", "actions", "rewards", "terminals", "timeouts"} <= arrays.keys()
    np.testing.assert_array_equal(arrays["rewards"], np.concatenate([episode.rewards for episode in episodes]))
    last = np.cumsum([len(episode) for episode in episodes]) - 1
    ended = arrays["terminals"] | arrays["timeouts"]
    np.testing.assert_array_equal(np.flatnonzero(ended), last)
    np.testing.assert_array_equal(arrays["terminals"][last], [episode.terminated for episode in episodes])
    within = ~ended[:-1]
    np.testing.assert_array_equal(arrays["next_observations"][:-1][within], arrays["observations"][1:][within])


def test_a_foreign_file_written_again_is_the_same(tmp_path: Path) -> None:
    arrays = foreign_arrays(ENDS)
    # As real ones do, the next observation of a step is the observation of the next, except at an end.
    within = ~(arrays["terminals"] | arrays["timeouts"])[:-1]
    arrays["next_observations"][:-1][within] = arrays["observations"][1:][within]
    with read_d4rl(foreign_file(tmp_path / "a.hdf5", arrays)) as source:
        episodes = (source.episode(index) for index in range(len(source)))
        spaces = {"observation_space": source.observation_space, "action_space": source.action_space}
        write_d4rl(tmp_path / "b.hdf5", episodes, **spaces, env=source.env)
        with read_d4rl(tmp_path / "b.hdf5") as again:
            for index in range(len(source)):
                assert_same(again.episode(index), source.episode(index))
    with h5py.File(tmp_path / "b.hdf5") as file:
        for name, values in arrays.items():
            np.testing.assert_array_equal(file[name][()], values, strict=True, err_msg=name)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    first, second, *_ = random_episodes()
    cases: list[tuple[list[Episode], dict[str, Any], str]] = [
        ([], {}, "there are no episodes"),
        ([first, dataclasses.replace(second, actions=second.actions[:, :1])], {}, "episode 1 has actions of shape"),
        ([first, dataclasses.replace(second, states=None)], {}, "episode 1 has no states but episode 0 does"),
        ([first, dataclasses.replace(second, infos={})], {}, "episode 1 and episode 0 do not both have infos/success"),
        (
            [first, dataclasses.replace(second, rewards=second.rewards.astype("f8"))],
            {},
            r"episode 1 has rewards of type float64 and shape \[\] where episode 0 has float32",
        ),
        ([first], {"env": {"a": np.nan}}, "env has no JSON form"),
        ([first], {"action_space": gymnasium.spaces.Discrete(3)}, "must be a flat Box"),
    ]
    for episodes, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            write_d4rl(tmp_path / "a.hdf5", episodes, **{**SPACES, "env": {}, **changes})
        assert list(tmp_path.iterdir()) == []
    write_d4rl(tmp_path / "a.hdf5", [first], **SPACES, env={})
    with pytest.raises(FileExistsError, match="it already exists"):
        write_d4rl(tmp_path / "a.hdf5", [second], **SPACES, env={})


def test_one_episode_at_a_time_is_held(tmp_path: Path) -> None:
    """When an episode is asked for, only the one before it may still be there."""
    given_out: list[Any] = []

    class Held(np.ndarray):
        pass

    def stream() -> Iterator[Episode]:
        for episode in random_episodes():
            observations = episode.observations.view(Held)
            assert sum(each() is not None for each in given_out) <= 1
            given_out.append(weakref.ref(observations))
            yield dataclasses.replace(episode, observations=observations)
            del observations

    write_d4rl(tmp_path / "a.hdf5", stream(), **SPACES, env={})
    assert len(given_out) == len(ENDS)


# Damaged and hostile files


def refusal(path: Path) -> str:
    """The one sentence with which a file is refused, at opening or at reading."""

    def read_all() -> None:
        with read_d4rl(path) as source:
            for index in range(len(source)):
                source.episode(index)

    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_all()
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def replace(name: str, values: Any, **storage: Any) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, data=values, **storage)

    return edit


NOTED = '{"schema_version": 1, "observation_space": {"low": [0, 0, 0, 0], "high": [1, 1, 1, 1], "dtype": "float32"}, '
NOTED += '"action_space": {"low": [0, 0], "high": [1, 1], "dtype": "float32"}, "episodes": '
DAMAGES: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "no rewards": (lambda file: file.pop("rewards"), "is not a D4RL file: it has no rewards"),
    "no arrays": (lambda file: file.clear(), "it has no observations, actions, rewards, terminals"),
    "fewer rewards": (replace("rewards", np.zeros(9)), r"do not fit one another: rewards \[9\], actions \[10, 2\]"),
    "a number for rewards": (replace("rewards", 1.0), r"do not fit one another: rewards \[\]"),
    "wide terminals": (replace("terminals", np.zeros((10, 2))), r"do not fit one another: terminals \[10, 2\]"),
    "images": (replace("observations", np.zeros((10, 4, 4))), r"observations \[10, 4, 4\]"),
    "other next observations": (replace("next_observations", np.zeros((10, 3))), r"next_observations \[10, 3\]"),
    "more infos": (replace("infos/goal", np.zeros((11, 2))), r"infos/goal \[11, 2\]"),
    "texts as actions": (replace("actions", ["a"] * 10), "not numbers"),
    "complex rewards": (replace("rewards", np.zeros(10, complex)), "not numbers"),
    "a group as terminals": (
        lambda file: [file.pop("terminals"), file.create_group("terminals")],
        "terminals is not an array",
    ),
    "infos behind a link": (
        lambda file: file.update({"infos/goals": h5py.ExternalLink("/etc/passwd", "x")}),
        "a link that leads elsewhere",
    ),
    "metadata behind a link": (
        lambda file: file.update({"metadata/algorithm": h5py.SoftLink("/actions")}),
        "a link that leads elsewhere",
    ),
    "an absurd shape": (
        lambda file: [file.pop("actions"), file.create_dataset("actions", (2**60, 2), "f4", chunks=(2, 2))],
        "cannot be all of it",
    ),
    "notes of another version": (lambda file: file.attrs.update(robopref='{"schema_version": 2}'), "version 2"),
    "notes without spaces": (lambda file: file.attrs.update(robopref='{"schema_version": 1}'), "notes of a space"),
    "notes of other episodes": (
        lambda file: file.attrs.update(robopref=NOTED + "[]}"),
        "its notes are not of 4 episodes",
    ),
    "notes of another kind": (
        lambda file: file.attrs.update(robopref=NOTED + '[{"seed": 1, "truncated": 0}, 2, 3, 4]}'),
        "its notes are not of 4 episodes",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_hostile_file_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    edit, message = DAMAGES[name]
    path = foreign_file(tmp_path / "a.hdf5", foreign_arrays(ENDS))
    with h5py.File(path, "r+") as file:
        edit(file)
    text = refusal(path)
    assert re.search(message, text), text


def test_many_steps_in_few_bytes_are_refused(tmp_path: Path) -> None:
    """Ones, which gzip shrinks a thousandfold: an index of so many episodes of one step is more than is allowed."""
    steps = 2**18
    arrays = {"observations": np.zeros((steps, 1)), "actions": np.zeros((steps, 1)), "rewards": np.zeros(steps)}
    path = foreign_file(tmp_path / "a.hdf5", arrays | dict.fromkeys(("terminals", "timeouts"), np.ones(steps, bool)))
    assert path.stat().st_size < 2**16
    with pytest.raises(ValueError, match=rf"has {steps} steps, too many for the {2**20} bytes allowed"):
        read_d4rl(path, max_bytes=2**20)
    with read_d4rl(path, max_bytes=2**21) as source:
        assert len(source) == steps


def test_an_episode_larger_than_memory_is_refused_and_others_are_read(tmp_path: Path) -> None:
    path = foreign_file(tmp_path / "a.hdf5", foreign_arrays(((5000, True, False), (3, True, False))))
    with read_d4rl(path, max_bytes=2**16) as source:
        assert len(source.episode(1)) == 3
        with pytest.raises(ValueError, match=r"/\w+ would take \d+ bytes of memory for 5000 rows, but at most 65536"):
            source.episode(0)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = foreign_file(tmp_path / "a.hdf5", foreign_arrays(ENDS)).read_bytes()
    path = tmp_path / "cut.hdf5"
    for length in np.linspace(0, len(whole) - 1, 25).astype(int):
        path.write_bytes(whole[:length])
        refusal(path)
