"""The episode store: a Minari dataset folder whose content is known by its hash.

On disk it is what `minari.MinariDataset(path)` opens (HDF5 storage). What Minari has no field for is kept so:

* simulator states in `infos["state"]`, one row per observation;
* the origin of an episode, as JSON, in its option `origin`; its seed where Minari keeps seeds;
* in `metadata.json` under `robopref`: the schema version, the content hash, how the environment was made, the size of
  a simulator state, the named parts of an observation and named subsets of the episodes.

The hash covers lengths, observations, actions, rewards, terminated and truncated, and is verified at every load, so
that a label which names a dataset by its hash can only ever be read against the very same numbers.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import h5py
import minari
import numpy as np
from jaxtyping import Bool, Float, Int
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import METADATA_FILE_NAME, MinariStorage

from robopref.files import atomic_folder, read_json
from robopref.types import Episode

SCHEMA_VERSION = 1
NO_SEED = -1
"""What `EpisodeDataset.seeds` holds for an episode without a known seed."""

_DATA_FILE = "main_data.hdf5"
_OBSERVATION = "observation"
_STATE = "state"
_SUCCESS = "success"


@dataclass(frozen=True, eq=False)
class EpisodeDataset:
    """N episodes of a store. Arrays are read-only; simulator states and other infos are read when they are asked for.

    Episode i of T steps takes T + 1 rows, from `offsets[i]`. Its last row has the final observation, and zeros for
    action and reward.

    Attributes:
        path: the folder.
        hash: SHA-256 of the content, in hexadecimal.
        env: how the environment was made, such as `{"name": "metaworld/door-open-v3", "horizon": 200}`; empty if not
            known.
        description: free text.
        keys: names of the parts of an observation, with the size of each, in their order; one part if nothing is known.
        splits: named subsets, as indices of episodes in ascending order.
        observations: one row per state, [R, O] with R = total_steps + N.
        actions: in the environment's own units, [R, A].
        rewards: the environment's reward, [R].
        offsets: the row at which each episode begins, and R at the end, [N + 1].
        lengths: the steps T of each episode.
        terminated: whether each episode ended in a state of its own.
        truncated: whether each episode was cut off.
        successes: whether success was reported at any step; False where the environment reports none.
        returns: sum of rewards of each episode.
        seeds: what the environment was reset with, `NO_SEED` if unknown.
        origins: who acted in each episode, and how.
        state_size: numbers in one simulator state, 0 if none were kept.
    """

    path: Path
    hash: str
    env: Mapping[str, Any]
    description: str
    keys: Mapping[str, int]
    splits: Mapping[str, Int[np.ndarray, " n"]]
    observation_space: gymnasium.spaces.Box
    action_space: gymnasium.spaces.Box
    observations: Float[np.ndarray, "R O"]
    actions: Float[np.ndarray, "R A"]
    rewards: Float[np.ndarray, " R"]
    offsets: Int[np.ndarray, " N+1"]
    lengths: Int[np.ndarray, " N"]
    terminated: Bool[np.ndarray, " N"]
    truncated: Bool[np.ndarray, " N"]
    successes: Bool[np.ndarray, " N"]
    returns: Float[np.ndarray, " N"]
    seeds: Int[np.ndarray, " N"]
    origins: tuple[Mapping[str, str | float], ...]
    state_size: int

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total_steps(self) -> int:
        """Steps of all episodes together."""
        return int(self.lengths.sum())

    def episode(self, index: int) -> Episode:
        """Episode `index`, with its states and infos read from the file.

        Infos that do not have one row per observation, as other writers may leave them, are left out.

        Raises:
            IndexError: there is no such episode.
            OSError: the file has gone or cannot be read.
        """
        self._check_episode(index)
        begin, length = int(self.offsets[index]), int(self.lengths[index])
        with _open(self.path) as file:
            infos = _read_infos(file[f"episode_{index}"], length + 1)
        if self.state_size and _STATE not in infos:
            raise ValueError(f"{self.path / _DATA_FILE} is damaged: episode {index} has lost its simulator states.")
        states = infos.pop(_STATE) if self.state_size else None
        seed = int(self.seeds[index])
        return Episode(
            observations=self.observations[begin : begin + length + 1],
            actions=self.actions[begin : begin + length],
            rewards=self.rewards[begin : begin + length],
            terminated=bool(self.terminated[index]),
            truncated=bool(self.truncated[index]),
            infos=infos,
            states=states,
            seed=None if seed == NO_SEED else seed,
            origin=self.origins[index],
        )

    def info(self, name: str) -> dict[int, np.ndarray]:
        """The info `name` of every episode that has it, by the episode's index; nothing else is read from the file.

        As in `episode`, there is none where it does not have one row per observation, and simulator states are no info.

        Raises:
            OSError: the file has gone or cannot be read.
        """
        found: dict[int, np.ndarray] = {}
        if self.state_size and name == _STATE:
            return found
        with _open(self.path) as file:
            for index, length in enumerate(self.lengths.tolist()):
                node = file[f"episode_{index}"].get(f"infos/{name}")
                if isinstance(node, h5py.Dataset) and node.shape[:1] == (length + 1,):
                    found[index] = node[()]
        return found

    def states(self, episode: int, step: int) -> Float[np.ndarray, " S"]:
        """The simulator state before the action of `step`; step T is the state after the last action.

        Raises:
            ValueError: the dataset keeps no states.
            IndexError: there is no such episode or step.
        """
        return self.states_at(np.asarray(episode), np.asarray(step))

    def states_at(self, episodes: Int[np.ndarray, "*M"], steps: Int[np.ndarray, "*M"]) -> Float[np.ndarray, "*M S"]:
        """Simulator states of many (episode, step) pairs; each episode is read once.

        Raises:
            ValueError: the dataset keeps no states, or the two arrays differ in shape.
            IndexError: there is no such episode or step.
        """
        if not self.state_size:
            raise ValueError(f"{self.path} keeps no simulator states; collect the episodes again with states kept.")
        episodes, steps = np.asarray(episodes), np.asarray(steps)
        if episodes.shape != steps.shape:
            raise ValueError(f"episodes {list(episodes.shape)} and steps {list(steps.shape)} differ in shape.")
        flat_episodes, flat_steps = episodes.ravel(), steps.ravel()
        for episode in flat_episodes[(flat_episodes < 0) | (flat_episodes >= len(self))]:
            self._check_episode(int(episode))
        for wrong in np.flatnonzero((flat_steps < 0) | (flat_steps > self.lengths[flat_episodes])):
            episode, step = int(flat_episodes[wrong]), int(flat_steps[wrong])
            raise IndexError(
                f"episode {episode} of {self.path} has states 0 to {self.lengths[episode]}, so there is no state {step}"
            )
        states = np.empty((flat_episodes.size, self.state_size))
        order = np.argsort(flat_episodes, kind="stable")
        boundaries = np.flatnonzero(np.diff(flat_episodes[order])) + 1
        with _open(self.path) as file:
            for group in np.split(order, boundaries) if order.size else []:
                wanted = flat_steps[group]
                first = int(wanted.min())
                stored = file[f"episode_{flat_episodes[group[0]]}/infos/{_STATE}"]
                states[group] = stored[first : int(wanted.max()) + 1][wanted - first]
        shaped: np.ndarray = states.reshape(*episodes.shape, self.state_size)
        return shaped

    def valid_starts(self, length: int) -> Int[np.ndarray, " N"]:
        """How many windows of `length` steps each episode holds: T - length + 1, or 0 if it is too short."""
        if length < 1:
            raise ValueError(f"a segment has at least 1 step, not {length}.")
        starts: np.ndarray = np.maximum(self.lengths - length + 1, 0)
        return starts

    def _check_episode(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has episodes 0 to {len(self) - 1}, so there is no episode {index}.")


def write_episodes(
    path: str | os.PathLike[str],
    episodes: Sequence[Episode],
    *,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    env: Mapping[str, Any],
    description: str = "",
    keys: Mapping[str, int] | None = None,
    splits: Mapping[str, Sequence[int] | Int[np.ndarray, " n"]] | None = None,
) -> None:
    """Writes a new store, atomically: after an error there is nothing at `path`.

    Numbers are stored exactly as given; where episodes differ in float type, all take the widest.

    Args:
        path: a folder that does not exist yet.
        episodes: at least one, each of at least one step.
        observation_space: a flat Box.
        action_space: a flat Box; actions must have its shape and kind of number, and may exceed its bounds.
        env: how the environment was made; must have a JSON form.
        description: free text.
        keys: names and sizes of the parts of an observation, in their order; one part by default.
        splits: named subsets, as indices of episodes.

    Raises:
        ValueError: the spaces, an episode, `env`, `keys` or `splits` cannot be stored; the message names the episode by
            its index.
        FileExistsError: `path` exists.
        OSError: the parent folder cannot be written to.
    """
    observation_box = flat_box(observation_space, "observation", str(path))
    action_box = flat_box(action_space, "action", str(path))
    episodes = list(checked_episodes(path, episodes, observation_box, action_box))
    state_size = 0 if episodes[0].states is None else int(np.shape(episodes[0].states)[-1])
    env_problem = json_problem(env)
    if env_problem:
        raise ValueError(f"cannot write {path}: env has no JSON form ({env_problem}).")
    keys = dict(keys or {_OBSERVATION: observation_box.shape[0]})
    parts = {name: sorted(int(index) for index in members) for name, members in (splits or {}).items()}
    named_problem = _named_problem(keys, parts, observation_box.shape[0], len(episodes))
    if named_problem:
        raise ValueError(f"cannot write {path}: {named_problem}.")

    content = _Content.of(
        observations=[np.asarray(episode.observations) for episode in episodes],
        actions=[np.asarray(episode.actions) for episode in episodes],
        rewards=[np.asarray(episode.rewards) for episode in episodes],
        terminated=[episode.terminated for episode in episodes],
        truncated=[episode.truncated for episode in episodes],
    )
    with atomic_folder(path) as folder:
        # Minari measures its folder with paths that are only right when the folder's path is absolute.
        storage = MinariStorage.new(
            folder.resolve(), observation_space=observation_box, action_space=action_box, jpeg_encoding=False
        )
        storage.update_episodes(_buffer(index, episode, content) for index, episode in enumerate(episodes))
        storage.update_metadata(
            {
                "dataset_id": _dataset_id(Path(path).name),
                "minari_version": minari.__version__,
                "description": description,
                "robopref": {
                    "schema_version": SCHEMA_VERSION,
                    "hash": content.hash(),
                    "env": dict(env),
                    "state_size": state_size,
                    "keys": keys,
                    "splits": parts,
                },
            }
        )


def load_episodes(path: str | os.PathLike[str]) -> EpisodeDataset:
    """Loads a store, or a Minari dataset from elsewhere (HDF5, flat Box spaces), whose hash is then computed.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: a file is damaged, foreign, or does not hold what its hash says; the message names it.
        OSError: a file cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there are no episodes at {folder}: no such folder.")
    metadata_path = folder / "data" / METADATA_FILE_NAME
    if metadata_path.is_file() and not (folder / METADATA_FILE_NAME).exists():
        # Minari's own downloads keep the two files one level further down.
        folder = folder / "data"
    metadata_path = folder / METADATA_FILE_NAME
    metadata = read_json(metadata_path)
    count, ours = _check_metadata(metadata, metadata_path)
    if not (folder / _DATA_FILE).exists():
        raise FileNotFoundError(f"{folder / _DATA_FILE} does not exist.")
    try:
        storage = MinariStorage.read(folder)
    except Exception as error:
        raise ValueError(f"{metadata_path} does not describe usable spaces: {error!r}.") from error
    observation_space = flat_box(storage.observation_space, "observation", str(metadata_path))
    action_space = flat_box(storage.action_space, "action", str(metadata_path))

    stored = _read(folder, count, observation_space, action_space)
    content = stored.content
    content_hash = content.hash()
    if ours and ours["hash"] != content_hash:
        raise ValueError(
            f"{folder / _DATA_FILE} does not hold the episodes that {METADATA_FILE_NAME} beside it describes: their "
            f"hash is {content_hash[:12]}, not {ours['hash'][:12]}; restore both files from the same place."
        )
    # Stores of earlier versions have neither.
    keys = (ours or {}).get("keys", {_OBSERVATION: observation_space.shape[0]})
    parts = (ours or {}).get("splits", {})
    named_problem = _named_problem(keys, parts, observation_space.shape[0], count)
    if named_problem:
        raise ValueError(f"{metadata_path} was changed after it was written: {named_problem}.")
    offsets = np.concatenate([[0], np.cumsum(content.lengths + 1)])
    returns = np.add.reduceat(content.rewards.astype(np.float64), offsets[:-1])
    successes, seeds = np.array(stored.successes), np.array(stored.seeds)
    for array in (*content, offsets, returns, successes, seeds):
        array.setflags(write=False)
    return EpisodeDataset(
        path=folder,
        hash=content_hash,
        env=ours["env"] if ours else {},
        description=str(metadata.get("description", "")),
        keys=keys,
        splits={name: np.array(members, np.int64) for name, members in parts.items()},
        observation_space=observation_space,
        action_space=action_space,
        observations=content.observations,
        actions=content.actions,
        rewards=content.rewards,
        offsets=offsets,
        lengths=content.lengths,
        terminated=content.terminated,
        truncated=content.truncated,
        successes=successes,
        returns=returns,
        seeds=seeds,
        origins=tuple(stored.origins),
        state_size=ours["state_size"] if ours else 0,
    )


class _Content(NamedTuple):
    """What the hash covers, flat over all episodes with T + 1 rows each."""

    lengths: Int[np.ndarray, " N"]
    observations: Float[np.ndarray, "R O"]
    actions: Float[np.ndarray, "R A"]
    rewards: Float[np.ndarray, " R"]
    terminated: Bool[np.ndarray, " N"]
    truncated: Bool[np.ndarray, " N"]

    @classmethod
    def of(
        cls,
        *,
        observations: Sequence[np.ndarray],
        actions: Sequence[np.ndarray],
        rewards: Sequence[np.ndarray],
        terminated: Sequence[bool],
        truncated: Sequence[bool],
    ) -> _Content:
        lengths = np.array([len(each) for each in actions], dtype=np.int64)
        rows = int(lengths.sum()) + len(lengths)
        acted = np.ones(rows, dtype=bool)
        acted[np.cumsum(lengths + 1) - 1] = False

        def padded(parts: Sequence[np.ndarray], *least: type) -> np.ndarray:
            flat = np.zeros((rows, *parts[0].shape[1:]), dtype=np.result_type(*{part.dtype for part in parts}, *least))
            flat[acted] = np.concatenate(parts)
            return flat

        return cls(
            lengths=lengths,
            observations=np.concatenate(observations),
            actions=padded(actions),
            rewards=padded(rewards, np.float32),
            terminated=np.array(terminated, dtype=bool),
            truncated=np.array(truncated, dtype=bool),
        )

    def hash(self) -> str:
        digest = hashlib.sha256(b"robopref episodes 1")
        for name, array in self._asdict().items():
            little_endian = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            digest.update(f"{name} {little_endian.dtype.str} {list(array.shape)}".encode())
            digest.update(little_endian.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


class _Stored(NamedTuple):
    content: _Content
    successes: list[bool]
    seeds: list[int]
    origins: list[dict[str, str | float]]


def flat_box(space: gymnasium.Space[Any], name: str, place: str) -> gymnasium.spaces.Box:
    """`space`, which is the `name` space of what is at `place`.

    Raises:
        ValueError: it is no Box, or has another number of axes than one.
    """
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"{place}: the {name} space must be a flat Box (one axis), not {space}.")
    return space


def checked_episodes(
    path: str | os.PathLike[str],
    episodes: Iterable[Episode],
    observation_box: gymnasium.spaces.Box,
    action_box: gymnasium.spaces.Box,
) -> Iterator[Episode]:
    """Episodes that are to be written to `path`, one after another; all keep states like the first.

    Raises:
        ValueError: there are none, or one cannot be stored; the message names it by its index.
    """
    count = state_size = 0
    for episode in episodes:
        if not count and episode.states is not None:
            state_size = int(np.shape(episode.states)[-1])
        problem = _episode_problem(episode, observation_box, action_box, state_size)
        if problem:
            raise ValueError(f"cannot write {path}: episode {count} {problem}.")
        count += 1
        yield episode
    if not count:
        raise ValueError(f"cannot write {path}: there are no episodes to store.")


def _episode_problem(
    episode: Episode, observation_box: gymnasium.spaces.Box, action_box: gymnasium.spaces.Box, state_size: int
) -> str | None:
    """What keeps an episode from being stored, as the rest of a sentence about it; None if nothing does."""
    length = len(episode.actions)
    if length == 0:
        return "has no steps"
    arrays = {
        "observations": (episode.observations, (length + 1, *observation_box.shape), observation_box.dtype),
        "actions": (episode.actions, (length, *action_box.shape), action_box.dtype),
        "rewards": (episode.rewards, (length,), np.dtype(np.float64)),
    }
    if (episode.states is not None) != bool(state_size):
        return "has simulator states but episode 0 has none" if not state_size else "has no states but episode 0 does"
    if episode.states is not None:
        arrays["states"] = (episode.states, (length + 1, state_size), np.dtype(np.float64))
    for name, (value, shape, dtype) in arrays.items():
        problem = _array_problem(name, np.asarray(value), shape, dtype)
        if problem:
            return problem
    return _infos_problem(episode.infos, length + 1) or _provenance_problem(episode)


def _array_problem(name: str, array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype[Any] | None) -> str | None:
    if array.shape != shape:
        return f"has {name} of shape {list(array.shape)} where {list(shape)} is needed"
    if dtype is not None and not np.can_cast(array.dtype, dtype, "same_kind"):
        return f"has {name} of type {array.dtype} where {dtype} is needed"
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if not finite.all():
        return f"has NaN or infinite {name} at step {int(np.argmin(finite))}"
    return None


def _infos_problem(infos: Mapping[str, np.ndarray], rows: int) -> str | None:
    for name, value in infos.items():
        array = np.asarray(value)
        if name == _STATE:
            return f"has an info called {_STATE!r}, which is where simulator states are kept; give it another name"
        if not name or "/" in name or name == ".":
            return f"has an info called {name!r}; a name must not be empty nor contain a slash"
        if array.shape[:1] != (rows,):
            return f"has info {name!r} of shape {list(array.shape)} where {rows} rows are needed, one per observation"
        if array.dtype.kind not in "biuf":
            return f"has info {name!r} of type {array.dtype}; only numbers and booleans can be stored"
    return None


def _provenance_problem(episode: Episode) -> str | None:
    if episode.seed is not None:
        try:
            known = 0 <= operator.index(episode.seed) < 2**63
        except TypeError:
            known = False
        if not known:
            return f"has the seed {episode.seed!r}; a seed is an integer from 0 to 2**63 - 1, or None"
    problem = json_problem(episode.origin)
    return f"has an origin without JSON form ({problem})" if problem else None


def _named_problem(keys: Any, splits: Any, size: int, count: int) -> str | None:
    """What is wrong with the named parts of an observation or the named subsets of the episodes; None if nothing is."""
    whole = isinstance(keys, dict) and all(isinstance(each, int) and each >= 0 for each in keys.values())
    if not whole or sum(keys.values()) != size:
        return f"keys {keys!r} must split the {size} numbers of an observation among them"
    for name, members in splits.items() if isinstance(splits, dict) else (("splits", splits),):
        if not isinstance(members, list) or not all(isinstance(each, int) and 0 <= each < count for each in members):
            return f"the split {name!r} must be a list of some of the {count} episodes, by index"
        if sorted(set(members)) != members:
            return f"the split {name!r} must have each episode once, in ascending order"
    return None


def json_problem(value: Mapping[str, Any]) -> str | None:
    """Why a mapping has no JSON form; None if it has one."""
    try:
        json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _buffer(index: int, episode: Episode, content: _Content) -> EpisodeBuffer:
    ends = np.zeros((2, len(episode)), dtype=bool)
    ends[:, -1] = episode.terminated, episode.truncated
    infos = {name: np.asarray(value) for name, value in episode.infos.items()}
    if episode.states is not None:
        infos[_STATE] = np.asarray(episode.states, dtype=np.float64)
    return EpisodeBuffer(
        id=index,
        seed=None if episode.seed is None else operator.index(episode.seed),
        options={"origin": json.dumps(dict(episode.origin))},
        observations=np.asarray(episode.observations, dtype=content.observations.dtype),
        actions=np.asarray(episode.actions, dtype=content.actions.dtype),
        rewards=np.asarray(episode.rewards, dtype=content.rewards.dtype),
        terminations=ends[0],
        truncations=ends[1],
        infos=infos,
    )


def _dataset_id(name: str) -> str:
    """The name under which Minari knows the dataset; it insists on a version at the end."""
    safe = re.sub(r"[^-\w]", "-", name) or "episodes"
    return safe if re.fullmatch(r".+-v\d+", safe) else f"{safe}-v0"


def _check_metadata(metadata: Any, path: Path) -> tuple[int, dict[str, Any] | None]:
    """The number of episodes, and what only robopref's own stores have (None elsewhere)."""
    if not isinstance(metadata, dict) or not {"data_format", "total_episodes"} <= metadata.keys():
        raise ValueError(f"{path} is not the metadata of a Minari dataset: it names no data format or episode count.")
    if metadata["data_format"] != "hdf5":
        raise ValueError(f"{path}: only datasets stored as hdf5 can be opened, not {metadata['data_format']!r}.")
    count = metadata["total_episodes"]
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{path} counts {count!r} episodes; at least one is needed.")
    ours = metadata.get("robopref")
    if ours is None:
        return count, None
    if not isinstance(ours, dict) or ours.get("schema_version") != SCHEMA_VERSION:
        found = ours.get("schema_version") if isinstance(ours, dict) else None
        raise ValueError(f"{path} has schema version {found!r}; this robopref reads version {SCHEMA_VERSION}.")
    kinds = {"hash": str, "env": dict, "state_size": int}
    for name, kind in kinds.items():
        if not isinstance(ours.get(name), kind):
            raise ValueError(f"{path} has no valid robopref entry {name!r}; it was changed after it was written.")
    return count, ours


@contextmanager
def _open(folder: Path) -> Iterator[h5py.File]:
    path = folder / _DATA_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is damaged or not an HDF5 file: {error}.") from error
    with file:
        try:
            yield file
        except (KeyError, OSError, RuntimeError) as error:
            reason = str(error).strip("'\"")
            raise ValueError(f"{path} is damaged: {reason}.") from error


def _read(
    folder: Path, count: int, observation_space: gymnasium.spaces.Box, action_space: gymnasium.spaces.Box
) -> _Stored:
    path = folder / _DATA_FILE
    arrays: dict[str, list[np.ndarray]] = {
        name: [] for name in ("observations", "actions", "rewards", "terminations", "truncations")
    }
    successes: list[bool] = []
    seeds: list[int] = []
    origins: list[dict[str, str | float]] = []
    with _open(folder) as file:
        if len(file) != count:
            raise ValueError(
                f"{path} holds {len(file)} episodes but {METADATA_FILE_NAME} beside it counts {count}; restore both "
                "files from the same place."
            )
        for index in range(count):
            try:
                group = file[f"episode_{index}"]
                shapes = [group[name].shape for name in arrays]
                length = shapes[1][0]
                expected = [(length + 1, *observation_space.shape), (length, *action_space.shape), *[(length,)] * 3]
                if length == 0 or shapes != expected:
                    found = ", ".join(f"{name} {list(shape)}" for name, shape in zip(arrays, shapes, strict=True))
                    raise ValueError(f"its arrays do not fit each other or the spaces: {found}")
                for name, parts in arrays.items():
                    parts.append(group[name][()])
                success = group.get(f"infos/{_SUCCESS}")
                reported = isinstance(success, h5py.Dataset) and success.shape[:1] == (length + 1,)
                successes.append(reported and bool(np.any(success[()])))
                seed = group.attrs.get("seed")
                seeds.append(NO_SEED if seed is None else int(seed))
                origins.append(_read_origin(group.attrs.get("options/origin")))
            except (OSError, KeyError, IndexError, RuntimeError, AttributeError, TypeError, ValueError) as error:
                reason = str(error).strip("'\"")
                raise ValueError(f"{path}: episode {index} cannot be read ({reason}).") from error
    content = _Content.of(
        observations=arrays["observations"],
        actions=arrays["actions"],
        rewards=arrays["rewards"],
        terminated=[bool(each[-1]) for each in arrays["terminations"]],
        truncated=[bool(each[-1]) for each in arrays["truncations"]],
    )
    return _Stored(content, successes, seeds, origins)


def _read_origin(text: Any) -> dict[str, str | float]:
    origin = json.loads(text) if isinstance(text, str) else {}
    return origin if isinstance(origin, dict) else {}


def _read_infos(group: h5py.Group, rows: int) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}

    def keep(name: str, node: h5py.Group | h5py.Dataset) -> None:
        if isinstance(node, h5py.Dataset) and node.shape[:1] == (rows,):
            found[name] = node[()]

    if "infos" in group:
        group["infos"].visititems(keep)
    return found
