"""Every format is recognised, and episodes survive the way through all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from robopref.conversion import FORMATS, WITH_IMAGES, Format, StoredEpisodes, convert, open_episodes, recognise
from robopref.episodes import EpisodeDataset, load_episodes, write_episodes
from robopref.formats.robomimic import RobomimicSource, write_robomimic
from robopref.types import Episode, EpisodeSource

KEYS = {"place": 2, "goal": 2, "one": 1}
SPLITS = {"train": [0, 2, 3], "odd": [1, 3]}


def fps_of(format: Format) -> int | None:
    return 10 if format == "lerobot" else None


def out_of(folder: Path, format: Format) -> Path:
    return folder / (f"{format}.hdf5" if format in ("robomimic", "d4rl") else format)


@pytest.fixture(scope="module")
def store(dataset: EpisodeDataset, tmp_path_factory: pytest.TempPathFactory) -> EpisodeDataset:
    """The first four episodes, with an observation in parts, and splits."""
    path = tmp_path_factory.mktemp("stores") / "store"
    episodes = [
        replace(dataset.episode(index), infos={"success": np.arange(len(dataset.episode(index)) + 1) > 3})
        for index in range(4)
    ]
    write_episodes(
        path,
        episodes,
        observation_space=dataset.observation_space,
        action_space=dataset.action_space,
        env={"name": "point", "speed": 0.15},
        description="a point",
        keys=KEYS,
        splits=SPLITS,
    )
    return load_episodes(path)


def assert_same(found: Episode, expected: Episode) -> None:
    for name in ("observations", "actions", "rewards", "states"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    # A format may say more than it was told, such as the time of each frame.
    assert expected.infos.keys() <= found.infos.keys()
    for name, info in expected.infos.items():
        np.testing.assert_array_equal(found.infos[name], info)
    assert (found.terminated, found.truncated, found.seed) == (expected.terminated, expected.truncated, expected.seed)
    assert found.origin["behaviour"] == expected.origin["behaviour"]
    assert found.succeeded == expected.succeeded


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_written_is_recognised_and_read_back(format: Format, store: EpisodeDataset, tmp_path: Path) -> None:
    path, told = out_of(tmp_path, format), []
    convert(
        StoredEpisodes(store), path, format, fps=fps_of(format), progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert recognise(path) == format
    with open_episodes(path) as source:
        assert len(source) == 4
        for index in range(4):
            assert_same(source.episode(index), store.episode(index))
        assert source.env == store.env
        assert source.description == store.description
        assert (source.observation_space, source.action_space) == (store.observation_space, store.action_space)
        if format != "d4rl":
            assert [name.rpartition(".")[2] for name in source.keys] == list(KEYS)
            assert list(source.keys.values()) == list(KEYS.values())
            assert {name: members.tolist() for name, members in source.splits.items()} == SPLITS


def test_the_way_through_all_formats_changes_nothing(store: EpisodeDataset, tmp_path: Path) -> None:
    source: EpisodeSource = StoredEpisodes(store)
    for place, format in enumerate((*FORMATS[::-1], *FORMATS)):
        path = out_of(tmp_path / str(place), format)
        path.parent.mkdir()
        with source:
            convert(source, path, format, fps=fps_of(format))
        source = open_episodes(path)
    with source:
        back = tmp_path / "back"
        convert(source, back, "robopref")
    # The hash covers all numbers, their types and the ends of episodes.
    assert load_episodes(back).hash == store.hash


def test_a_part_keeps_its_order_and_its_share_of_the_splits(store: EpisodeDataset, tmp_path: Path) -> None:
    convert(StoredEpisodes(store), tmp_path / "part", "robopref", indices=np.array([3, 0]))
    part = load_episodes(tmp_path / "part")
    assert len(part) == 2
    for index, old in enumerate((3, 0)):
        assert_same(part.episode(index), store.episode(old))
    assert {name: members.tolist() for name, members in part.splits.items()} == {"train": [0, 1], "odd": [0]}


def with_images(store: EpisodeDataset, path: Path) -> None:
    def seen(index: int) -> np.ndarray:
        length = int(store.lengths[index])
        return np.random.default_rng(index).integers(0, 255, (length + 1, 16, 16, 3), np.uint8)

    episodes = (store.episode(index) for index in range(len(store)))
    spaces: Any = {"observation_space": store.observation_space, "action_space": store.action_space}
    write_robomimic(path, episodes, env={}, keys=KEYS, frames={"front": seen}, **spaces)


def test_images_go_along_or_are_left_out_but_never_lost_in_silence(store: EpisodeDataset, tmp_path: Path) -> None:
    path = tmp_path / "seen.hdf5"
    with_images(store, path)
    with open_episodes(path) as source:
        for format in FORMATS:
            if format in WITH_IMAGES:
                continue
            with pytest.raises(ValueError, match=f"the format {format} has no place for what front saw"):
                convert(source, tmp_path / format, format)
            assert not (tmp_path / format).exists()
            convert(source, out_of(tmp_path, format), format, images=False)
        convert(source, tmp_path / "again.hdf5", "robomimic", indices=[2, 1])
        with open_episodes(tmp_path / "again.hdf5") as again:
            for index, old in enumerate((2, 1)):
                np.testing.assert_array_equal(again.frames(index, "front"), source.frames(old, "front"))
        convert(source, tmp_path / "film", "lerobot", fps=20, indices=[2], task="look")
        with open_episodes(tmp_path / "film") as film:
            (camera,) = film.cameras
            assert film.frames(0, camera).shape == source.frames(2, "front").shape


def by_somebody_else(store: EpisodeDataset, path: Path) -> dict[int, str]:
    """A robomimic file as robomimic's own scripts write it, and the models in it."""
    models = {0: "<mujoco model='null'/>", 2: "<mujoco model='Käse'/>\n" * 10_000, 3: "\udcff and no UTF-8"}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = '{"env_name": "Lift", "type": 1, "env_kwargs": {}}'
        for index in range(len(store)):
            episode, demo = store.episode(index), data.create_group(f"demo_{index}")
            demo["obs/object"], demo["next_obs/object"] = episode.observations[:-1], episode.observations[1:]
            demo["actions"], demo["rewards"] = episode.actions, episode.rewards
            demo["states"] = episode.states[:-1]
            demo["dones"] = np.arange(len(episode)) == len(episode) - 1
            if index in models:
                text = models[index].encode(errors="surrogateescape")
                demo.attrs.create("model_file", text, dtype=h5py.string_dtype())
    return models


def test_models_of_others_go_along_between_robomimics_files(store: EpisodeDataset, tmp_path: Path) -> None:
    models = by_somebody_else(store, tmp_path / "theirs.hdf5")
    chosen = [2, 1, 0, 3]
    with open_episodes(tmp_path / "theirs.hdf5") as source:
        convert(source, tmp_path / "a.hdf5", "robomimic", indices=chosen)
        # What the source keeps itself is not asked for, and the rest is, of its first state.
        convert(source, tmp_path / "b.hdf5", "robomimic", indices=chosen, models=lambda state: str(state.tolist()))
    first = store.episode(1).states[0].tolist()
    for name, missing in (("a.hdf5", None), ("b.hdf5", str(first))):
        with h5py.File(tmp_path / name) as file:
            found = [file[f"data/demo_{index}"].attrs.get("model_file") for index in range(4)]
        assert found == [models[2], missing, models[0], models[3]]


def test_whole_and_flat_states_both_stay_as_they_were(store: EpisodeDataset, tmp_path: Path) -> None:
    stored, chosen = StoredEpisodes(store), [3, 1, 0]
    convert(stored, tmp_path / "a.hdf5", "robomimic", flat_states=lambda states: 2 * states[:, 1:3])
    with open_episodes(tmp_path / "a.hdf5") as source:
        convert(source, tmp_path / "b.hdf5", "robomimic", indices=chosen)
        again = {"flat_states": lambda states: states[:, :1]}
        convert(source, tmp_path / "c.hdf5", "robomimic", indices=chosen, **again)
    for name in ("b.hdf5", "c.hdf5"):
        with h5py.File(tmp_path / name) as file, open_episodes(tmp_path / name) as source:
            for index, old in enumerate(chosen):
                states = store.episode(old).states
                demo = file[f"data/demo_{index}"]
                np.testing.assert_array_equal(demo["states"][()], 2 * states[:-1, 1:3], strict=True)
                np.testing.assert_array_equal(demo["robopref/states"][()], states, strict=True)
                assert_same(source.episode(index), store.episode(old))


def test_each_episode_is_read_once(store: EpisodeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_somebody_else(store, tmp_path / "theirs.hdf5")
    asked: dict[str, Any] = {"models": lambda state: "<mujoco/>", "flat_states": lambda states: states[:, :1]}
    for kind, path in ((StoredEpisodes, store.path), (RobomimicSource, tmp_path / "theirs.hdf5")):
        read: list[int] = []
        one = kind.episode

        def counted(source: Any, index: int, one: Any = one, read: list[int] = read) -> Episode:
            read.append(index)
            return one(source, index)

        monkeypatch.setattr(kind, "episode", counted)
        with open_episodes(path) as source:
            convert(source, tmp_path / f"{kind.__name__}.hdf5", "robomimic", **asked)
        assert read == [0, 1, 2, 3]


def test_parts_are_chosen_where_there_are_parts(store: EpisodeDataset, tmp_path: Path) -> None:
    path = tmp_path / "file.hdf5"
    convert(StoredEpisodes(store), path, "robomimic")
    with open_episodes(path, keys=["goal", "place"]) as source:
        order = [2, 3, 0, 1]
        np.testing.assert_array_equal(source.episode(1).observations, store.episode(1).observations[:, order])
    with pytest.raises(ValueError, match="observations have no parts to choose by keys"):
        open_episodes(store.path, keys=["goal"])
    with pytest.raises(ValueError, match="says itself where its episodes end"):
        open_episodes(path, horizon=5)


@pytest.mark.parametrize(("format", "fps"), [("lerobot", None), ("robomimic", 20)])
def test_frames_per_second_are_of_one_format(
    format: Format, fps: int | None, store: EpisodeDataset, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="fps, the frames per second, must be given for the format lerobot"):
        convert(StoredEpisodes(store), tmp_path / "out", format, fps=fps)


def test_what_is_none_of_them_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        recognise(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no episodes: it has neither meta/info\.json"):
        recognise(tmp_path)
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["numbers"] = np.arange(3)
    with pytest.raises(ValueError, match="holds no episodes: it has neither a group data"):
        recognise(tmp_path / "other.hdf5")
    (tmp_path / "text.hdf5").write_text("no")
    with pytest.raises(ValueError, match="is not an HDF5 file"):
        recognise(tmp_path / "text.hdf5")


def test_stored_episodes_have_no_cameras(store: EpisodeDataset) -> None:
    with pytest.raises(ValueError, match="has no camera 'front': its images are rendered"):
        StoredEpisodes(store).frames(0, "front")
