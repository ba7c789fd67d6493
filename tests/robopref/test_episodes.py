from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from robopref.episodes import NO_SEED, load_episodes, write_episodes
from robopref.types import Episode

OBSERVATIONS, ACTIONS, STATE = 3, 2, 5
SPACES = {
    "observation_space": gymnasium.spaces.Box(-np.inf, np.inf, (OBSERVATIONS,), np.float64),
    "action_space": gymnasium.spaces.Box(-1, 1, (ACTIONS,), np.float32),
}
ENV = {"name": "delivery", "horizon": 30}


def make_episode(length, seed=0, states=True, **changes):
    rng = np.random.default_rng(seed)
    fields = {
        "observations": rng.normal(size=(length + 1, OBSERVATIONS)),
        "actions": rng.uniform(-1, 1, size=(length, ACTIONS)).astype(np.float32),
        "rewards": rng.normal(size=length),
        "terminated": bool(seed % 2),
        "truncated": not seed % 2,
        "infos": {"success": np.arange(length + 1) >= length - seed, "grip": rng.normal(size=(length + 1, 2))},
        "states": rng.normal(size=(length + 1, STATE)) if states else None,
        "seed": seed,
        "origin": {"behaviour": "noise", "scale": 0.5, "index": seed},
    }
    return Episode(**{**fields, **changes})


EPISODES = [make_episode(length, seed) for seed, length in enumerate([7, 1, 60])]


def write(path, episodes=EPISODES, **changes):
    write_episodes(path, episodes, **{**SPACES, "env": ENV, "description": "three", **changes})
    return path


@pytest.fixture
def store(tmp_path):
    return write(tmp_path / "store")


def assert_same_episode(found, expected):
    for name in ("observations", "actions", "rewards", "states"):
        left, right = getattr(found, name), getattr(expected, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    assert found.infos.keys() == expected.infos.keys()
    for name, value in expected.infos.items():
        assert found.infos[name].dtype == value.dtype
        np.testing.assert_array_equal(found.infos[name], value)
    assert (found.terminated, found.truncated) == (expected.terminated, expected.truncated)
    assert (found.seed, found.origin) == (expected.seed, expected.origin)
    assert found.succeeded == expected.succeeded


def test_every_episode_comes_back_exactly(store):
    dataset = load_episodes(store)
    assert len(dataset) == 3
    assert dataset.total_steps == 68
    assert (dataset.env, dataset.description, dataset.state_size) == (ENV, "three", STATE)
    assert (dataset.observation_space, dataset.action_space) == tuple(SPACES.values())
    for index, episode in enumerate(EPISODES):
        assert_same_episode(dataset.episode(index), episode)


def test_flat_arrays_have_one_row_per_state(store):
    dataset = load_episodes(store)
    assert dataset.offsets.tolist() == [0, 8, 10, 71]
    assert dataset.lengths.tolist() == [7, 1, 60]
    assert dataset.observations.shape == (71, OBSERVATIONS)
    for index, episode in enumerate(EPISODES):
        begin, end = dataset.offsets[index], dataset.offsets[index + 1]
        np.testing.assert_array_equal(dataset.observations[begin:end], episode.observations)
        np.testing.assert_array_equal(dataset.actions[begin : end - 1], episode.actions)
        np.testing.assert_array_equal(dataset.rewards[begin : end - 1], episode.rewards)
        assert not dataset.actions[end - 1].any()
        assert dataset.rewards[end - 1] == 0
        assert dataset.returns[index] == pytest.approx(sum(episode.rewards.tolist()))
    assert dataset.terminated.tolist() == [False, True, False]
    assert dataset.truncated.tolist() == [True, False, True]
    assert dataset.seeds.tolist() == [0, 1, 2]
    assert dataset.successes.tolist() == [True, True, True]
    assert dataset.origins[2] == {"behaviour": "noise", "scale": 0.5, "index": 2}


def test_one_info_is_read_alone(tmp_path, monkeypatch):
    episodes = [make_episode(3), make_episode(2, 1, infos={}), make_episode(4, 2)]
    dataset = load_episodes(write(tmp_path / "store", episodes))
    with h5py.File(tmp_path / "store" / "main_data.hdf5", "r+") as file:
        # As others may leave an info: without a row for each observation, or with infos in groups.
        del file["episode_2/infos/grip"]
        file["episode_2/infos/grip"] = np.zeros((4, 2))
        file["episode_1/infos/arm/force"] = np.arange(3)
    read, get = [], h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda node, rows: read.append(node.name) or get(node, rows))
    found = dataset.info("grip")
    assert read == ["/episode_0/infos/grip"]
    assert list(found) == [0]
    np.testing.assert_array_equal(found[0], episodes[0].infos["grip"], strict=True)
    assert list(dataset.info("success")) == [0, 2]
    for name in ("grip", "success", "arm/force", "arm", "state", "nothing"):
        expected = {index: dataset.episode(index).infos.get(name) for index in range(3)}
        expected = {index: info for index, info in expected.items() if info is not None}
        found = dataset.info(name)
        assert found.keys() == expected.keys()
        for index, info in expected.items():
            np.testing.assert_array_equal(found[index], info, strict=True)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(FileNotFoundError):
        dataset.info("grip")


def test_loaded_arrays_cannot_be_changed(store):
    dataset = load_episodes(store)
    for field in dataclasses.fields(dataset):
        value = getattr(dataset, field.name)
        if isinstance(value, np.ndarray):
            assert not value.flags.writeable, field.name


def test_the_hash_is_that_of_the_content(store):
    """Recomputed here from the documented parts, independently of the store's own code."""
    digest = hashlib.sha256(b"robopref episodes 1")
    rewards, actions = [], []
    for episode in EPISODES:
        actions += [episode.actions, np.zeros((1, ACTIONS), np.float32)]
        rewards += [episode.rewards, np.zeros(1)]
    parts = {
        "lengths": np.array([7, 1, 60], "<i8"),
        "observations": np.concatenate([episode.observations for episode in EPISODES]).astype("<f8"),
        "actions": np.concatenate(actions).astype("<f4"),
        "rewards": np.concatenate(rewards).astype("<f8"),
        "terminated": np.array([episode.terminated for episode in EPISODES]),
        "truncated": np.array([episode.truncated for episode in EPISODES]),
    }
    for name, array in parts.items():
        digest.update(f"{name} {array.dtype.str} {list(array.shape)}".encode() + array.tobytes())
    assert load_episodes(store).hash == digest.hexdigest()
    assert json.loads((store / "metadata.json").read_text())["robopref"]["hash"] == digest.hexdigest()


@pytest.mark.parametrize("field", ["observations", "actions", "rewards", "terminated", "truncated"])
def test_the_hash_sees_every_part(tmp_path, store, field):
    value = getattr(EPISODES[0], field)
    changed = (not value) if isinstance(value, bool) else value + np.asarray(1e-3, value.dtype)
    episodes = [dataclasses.replace(EPISODES[0], **{field: changed}), *EPISODES[1:]]
    assert load_episodes(write(tmp_path / "other", episodes)).hash != load_episodes(store).hash


def test_the_hash_is_that_of_content_alone(tmp_path, store):
    episodes = [dataclasses.replace(episode, origin={}, seed=None, states=None, infos={}) for episode in EPISODES]
    assert load_episodes(write(tmp_path / "other", episodes, env={}, description="")).hash == load_episodes(store).hash


def test_minari_opens_the_store(store):
    dataset = minari.MinariDataset(store)
    assert dataset.id == "store-v0"
    assert (dataset.total_episodes, dataset.total_steps) == (3, 68)
    assert (dataset.observation_space, dataset.action_space) == tuple(SPACES.values())
    assert dataset.spec.total_steps == 68
    assert dataset.storage.metadata["description"] == "three"
    metadata = list(dataset.storage.get_episode_metadata(range(3)))
    for index, episode in enumerate(EPISODES):
        found = dataset[index]
        np.testing.assert_array_equal(found.observations, episode.observations)
        np.testing.assert_array_equal(found.actions, episode.actions)
        np.testing.assert_array_equal(found.rewards, episode.rewards)
        np.testing.assert_array_equal(found.infos["state"], episode.states)
        np.testing.assert_array_equal(found.infos["success"], episode.infos["success"])
        assert found.terminations.tolist() == [False] * (len(episode) - 1) + [episode.terminated]
        assert found.truncations.tolist() == [False] * (len(episode) - 1) + [episode.truncated]
        assert metadata[index]["seed"] == episode.seed
        assert json.loads(metadata[index]["options"]["origin"]) == episode.origin


@pytest.mark.parametrize(("name", "expected"), [("door-v3", "door-v3"), ("my data!", "my-data--v0"), ("v2", "v2-v0")])
def test_any_folder_name_gives_a_dataset_id_that_minari_accepts(tmp_path, name, expected):
    assert minari.MinariDataset(write(tmp_path / name)).spec.dataset_id == expected


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("here")
    assert len(load_episodes("here")) == 3


def test_a_plain_minari_dataset(tmp_path):
    storage = MinariStorage.new(tmp_path / "plain", **SPACES)
    buffers = [
        EpisodeBuffer(
            observations=episode.observations,
            actions=episode.actions,
            rewards=episode.rewards,
            terminations=np.arange(len(episode)) == (len(episode) - 1 if episode.terminated else -1),
            truncations=np.arange(len(episode)) == (len(episode) - 1 if episode.truncated else -1),
            infos={"success": episode.infos["success"], "nested": {"grip": episode.infos["grip"]}, "short": [1.0]},
        )
        for episode in EPISODES
    ]
    storage.update_episodes(buffers)
    storage.update_metadata({"dataset_id": "plain-v0", "minari_version": minari.__version__})
    dataset = load_episodes(tmp_path / "plain")
    assert dataset.hash == load_episodes(write(tmp_path / "ours")).hash
    assert (dataset.env, dataset.state_size, dataset.origins) == ({}, 0, ({}, {}, {}))
    assert dataset.seeds.tolist() == [NO_SEED] * 3
    assert dataset.successes.all()
    episode = dataset.episode(2)
    assert (episode.seed, episode.states) == (None, None)
    assert set(episode.infos) == {"success", "nested/grip"}
    np.testing.assert_array_equal(episode.infos["nested/grip"], EPISODES[2].infos["grip"])
    with pytest.raises(ValueError, match="keeps no simulator states"):
        dataset.states(0, 0)


def test_a_downloaded_minari_dataset_has_its_files_one_level_down(tmp_path, store):
    (tmp_path / "download").mkdir()
    shutil.move(store, tmp_path / "download" / "data")
    assert load_episodes(tmp_path / "download").path == tmp_path / "download" / "data"


def test_states_of_many_steps(store):
    dataset = load_episodes(store)
    rng = np.random.default_rng(0)
    episodes = rng.integers(3, size=(40, 2))
    steps = rng.integers(dataset.lengths[episodes] + 1)
    found = dataset.states_at(episodes, steps)
    assert found.shape == (40, 2, STATE)
    for index in np.ndindex(40, 2):
        np.testing.assert_array_equal(found[index], EPISODES[episodes[index]].states[steps[index]])
    np.testing.assert_array_equal(dataset.states(0, 7), EPISODES[0].states[7])
    assert dataset.states_at(np.zeros(0, int), np.zeros(0, int)).shape == (0, STATE)


@pytest.mark.parametrize(
    ("episodes", "steps", "message"),
    [([0, 3], [0, 0], "no episode 3"), ([-1], [0], "no episode -1"), ([0], [8], "no state 8"), ([0], [-1], "state -1")],
)
def test_states_outside_the_dataset(store, episodes, steps, message):
    with pytest.raises(IndexError, match=message):
        load_episodes(store).states_at(np.array(episodes), np.array(steps))


def test_episodes_outside_the_dataset(store):
    dataset = load_episodes(store)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"no episode {index}"):
            dataset.episode(index)


def test_valid_starts(store):
    dataset = load_episodes(store)
    for length in (1, 2, 7, 8, 61):
        by_hand = [sum(start + length <= steps for start in range(steps)) for steps in (7, 1, 60)]
        assert dataset.valid_starts(length).tolist() == by_hand
    with pytest.raises(ValueError, match="at least 1 step"):
        dataset.valid_starts(0)


def test_mixed_float_types_take_the_widest(tmp_path):
    narrow = make_episode(4, 5)
    narrow = dataclasses.replace(narrow, observations=narrow.observations.astype(np.float32), rewards=np.arange(4))
    dataset = load_episodes(write(tmp_path / "mixed", [EPISODES[0], narrow]))
    assert dataset.observations.dtype == dataset.rewards.dtype == np.float64
    np.testing.assert_array_equal(dataset.episode(1).observations, narrow.observations)
    np.testing.assert_array_equal(dataset.episode(1).rewards, [0, 1, 2, 3])


NAN_OBSERVATIONS = EPISODES[0].observations.copy()
NAN_OBSERVATIONS[5, 1] = np.nan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": NAN_OBSERVATIONS}, "NaN or infinite observations at step 5"),
        ({"actions": np.full((7, ACTIONS), np.inf)}, "NaN or infinite actions at step 0"),
        ({"rewards": np.full(7, np.nan)}, "NaN or infinite rewards at step 0"),
        ({"states": np.full((8, STATE), np.nan)}, "NaN or infinite states at step 0"),
        ({"observations": np.zeros((7, OBSERVATIONS))}, r"observations of shape \[7, 3\] where \[8, 3\]"),
        ({"actions": np.zeros((7, 3))}, r"actions of shape \[7, 3\] where \[7, 2\]"),
        ({"actions": np.zeros((7, ACTIONS), complex)}, "actions of type complex128 where float32"),
        ({"rewards": np.zeros(8)}, r"rewards of shape \[8\] where \[7\]"),
        ({"states": None}, "has no states but episode 0 does"),
        ({"states": np.zeros((8, 4))}, r"states of shape \[8, 4\] where \[8, 5\]"),
        ({"actions": np.zeros((0, ACTIONS))}, "has no steps"),
        ({"infos": {"success": np.zeros(7)}}, "info 'success' of shape .* 8 rows"),
        ({"infos": {"state": np.zeros(8)}}, "info called 'state'"),
        ({"infos": {"a/b": np.zeros(8)}}, "info called 'a/b'"),
        ({"infos": {"word": np.array(["x"] * 8)}}, "only numbers and booleans"),
        ({"seed": -3}, "the seed -3"),
        ({"seed": 1.5}, r"the seed 1\.5"),
        ({"origin": {"policy": object()}}, "origin without JSON form"),
    ],
)
def test_an_episode_that_cannot_be_stored(tmp_path, changes, message):
    wrong = dataclasses.replace(EPISODES[0], **changes)
    with pytest.raises(ValueError, match=rf"^cannot write .*store: episode 2 .*{message}[^\n]*\.$"):
        write(tmp_path / "store", [EPISODES[0], EPISODES[1], wrong])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": []}, "there are no episodes"),
        (
            {"observation_space": gymnasium.spaces.Dict(a=SPACES["action_space"])},
            "observation space must be a flat Box",
        ),
        ({"action_space": gymnasium.spaces.Discrete(2)}, "action space must be a flat Box"),
        ({"env": {"call": object()}}, "env has no JSON form"),
    ],
)
def test_a_store_that_cannot_be_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "store", **changes)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_store_is_not_overwritten(store):
    before = load_episodes(store).hash
    with pytest.raises(FileExistsError, match="already exists"):
        write(store, EPISODES[:1])
    assert load_episodes(store).hash == before


def test_a_writer_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minari.dataset._storages.hdf5_storage.HDF5Storage.update_episodes", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def edit_metadata(store, change):
    metadata = json.loads((store / "metadata.json").read_text())
    change(metadata)
    (store / "metadata.json").write_text(json.dumps(metadata))


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there are no episodes at .*none: no such folder"):
        load_episodes(tmp_path / "none")


@pytest.mark.parametrize("name", ["metadata.json", "main_data.hdf5"])
def test_a_missing_file(store, name):
    (store / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{store / name} does not exist.")):
        load_episodes(store)


@pytest.mark.parametrize("kept", [0, 0.01, 0.5, 0.99])
def test_a_truncated_data_file(store, kept):
    path = store / "main_data.hdf5"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged or not an HDF5 file: ")):
        load_episodes(store)


def test_a_garbage_data_file(store):
    (store / "main_data.hdf5").write_bytes(np.random.default_rng(0).bytes(4096))
    with pytest.raises(ValueError, match=r"main_data\.hdf5 is damaged or not an HDF5 file"):
        load_episodes(store)


def test_bytes_changed_anywhere_never_give_other_numbers(store):
    """Wherever a byte is flipped, the store loads with the same content or says that it is damaged."""
    path, expected = store / "main_data.hdf5", load_episodes(store).hash
    data = path.read_bytes()
    messages = []
    for position in np.random.default_rng(1).integers(len(data), size=60):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x5A]) + data[position + 1 :])
        try:
            found = load_episodes(store).hash
        except ValueError as error:
            messages.append(str(error))
        else:
            assert found == expected
    assert messages
    assert all(str(path) in message for message in messages)


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminations", "truncations"])
def test_an_edited_array(store, name):
    with h5py.File(store / "main_data.hdf5", "a") as file:
        array = file[f"episode_0/{name}"]
        array[-1] = ~array[-1] if array.dtype == bool else array[-1] + 1e-3
    with pytest.raises(ValueError, match=r"main_data\.hdf5 does not hold the episodes that metadata\.json"):
        load_episodes(store)


def test_metadata_of_another_dataset(tmp_path, store):
    other = write(tmp_path / "other", [make_episode(9, 9), *EPISODES[1:]])
    shutil.copy(other / "metadata.json", store)
    with pytest.raises(ValueError, match=r"main_data\.hdf5 does not hold .* restore both files"):
        load_episodes(store)
    fewer = write(tmp_path / "fewer", EPISODES[:2])
    shutil.copy(fewer / "metadata.json", store)
    with pytest.raises(ValueError, match=r"holds 3 episodes but .* counts 2"):
        load_episodes(store)


def test_spaces_of_another_dataset(store):
    space = json.dumps({"type": "Box", "dtype": "float64", "shape": [2], "low": [0, 0], "high": [1, 1]})
    edit_metadata(store, lambda metadata: metadata.update(observation_space=space))
    with pytest.raises(ValueError, match=r"episode 0 cannot be read \(its arrays do not fit .*observations .*8, 3"):
        load_episodes(store)


@pytest.mark.parametrize("remove", ["observations", "rewards", ""])
def test_a_missing_array_or_episode(store, remove):
    with h5py.File(store / "main_data.hdf5", "a") as file:
        del file[f"episode_1/{remove}"]
        if not remove:
            file.create_group("episode_9")
    with pytest.raises(ValueError, match=r"main_data\.hdf5: episode 1 cannot be read \(.+\)\.$"):
        load_episodes(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["robopref"].update(schema_version=2), "schema version 2; this robopref reads version 1"),
        (lambda m: m["robopref"].pop("hash"), "no valid robopref entry 'hash'"),
        (lambda m: m.update(robopref=[1]), "schema version None"),
        (lambda m: m.update(data_format="arrow"), "only datasets stored as hdf5 .* not 'arrow'"),
        (lambda m: m.update(total_episodes=0), "counts 0 episodes"),
        (lambda m: m.pop("total_episodes"), "is not the metadata of a Minari dataset"),
        (lambda m: m.pop("observation_space"), "does not describe usable spaces"),
        (lambda m: m.update(action_space="{}"), "does not describe usable spaces"),
        (
            lambda m: m.update(action_space='{"type": "Discrete", "n": 2, "start": 0}'),
            "action space must be a flat Box",
        ),
    ],
)
def test_wrong_metadata(store, change, message):
    edit_metadata(store, change)
    with pytest.raises(ValueError, match=rf"metadata\.json.*{message}"):
        load_episodes(store)


@pytest.mark.parametrize("content", ["", "[]", "not json"])
def test_foreign_metadata(store, content):
    (store / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match=r"metadata\.json is not "):
        load_episodes(store)


def test_states_that_went_missing_after_loading(store):
    dataset = load_episodes(store)
    with h5py.File(store / "main_data.hdf5", "a") as file:
        del file["episode_0/infos/state"]
    with pytest.raises(ValueError, match=r"main_data\.hdf5 is damaged"):
        dataset.states(0, 0)
    (store / "main_data.hdf5").unlink()
    with pytest.raises(FileNotFoundError, match=r"main_data\.hdf5 does not exist"):
        dataset.episode(1)


def test_parts_of_an_observation_and_splits_come_back(tmp_path):
    keys, splits = {"hand": 1, "object": 2}, {"train": np.array([0, 2]), "none": []}
    dataset = load_episodes(write(tmp_path / "named", keys=keys, splits=splits))
    assert list(dataset.keys.items()) == list(keys.items())
    assert {name: members.tolist() for name, members in dataset.splits.items()} == {"train": [0, 2], "none": []}
    plain = load_episodes(write(tmp_path / "plain"))
    assert (plain.keys, plain.splits) == ({"observation": OBSERVATIONS}, {})
    assert plain.hash == dataset.hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": {"hand": 2}}, r"keys \{'hand': 2\} must split the 3 numbers"),
        ({"keys": {"hand": 4, "object": -1}}, "must split the 3 numbers"),
        ({"splits": {"train": [0, 3]}}, "the split 'train' must be a list of some of the 3 episodes"),
        ({"splits": {"train": [1, 1]}}, "the split 'train' must have each episode once"),
    ],
)
def test_parts_and_splits_that_do_not_fit_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "store", **changes)
    assert not (tmp_path / "store").exists()


def test_parts_that_were_changed_on_the_disk_are_refused(store):
    path = store / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["robopref"]["keys"] = {"hand": 7}
    path.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"metadata\.json was changed after it was written: keys"):
        load_episodes(store)
