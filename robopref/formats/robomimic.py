"""robomimic's HDF5 files, read and written with h5py alone.

Mandlekar et al. 2021, "What Matters in Learning from Offline Human Demonstrations for Robot Manipulation"
(arXiv:2108.03298), publish demonstrations of robosuite's tasks in this layout, which robomimic's documentation
describes under "Dataset Structure":

    /data                 attributes: total (steps), env_args (JSON: env_name, type, env_version, env_kwargs)
    /data/demo_7          attributes: num_samples (N), model_file (the task's MJCF, where robosuite made it)
        actions [N, A], rewards [N], dones [N], states [N, S], obs/<key> [N, ...], next_obs/<key> [N, ...] (optional)
    /mask/<name>          names of demonstrations: a named subset, which robomimic calls a filter key

What becomes of it, where that is not plain:

* **Observations.** Keys with numbers [N, D] or [N] are joined into one vector, in alphabetical order unless `keys`
  gives another. Keys with bytes [N, H, W, C] are cameras. Others, such as depth images, are left out.
* **The final observation** is the last row of next_obs. A file without next_obs has none: that of the last step is
  repeated, and the origin says `final_observation: "repeated"`.
* **The final state.** `states` has the simulator's state before each action, so none after the last. robopref's own
  files keep it beside, and where its states hold more than robomimic's own tools expect there, all of them. In all
  others the last state is repeated, and the origin says `final_state: "repeated"`: the
  last two rows of `Episode.states` are then equal, and nothing should be measured from the last one.
* **Ends.** An episode is terminated if `dones` is not 0 at its last step, and truncated otherwise. Whoever made the
  file chose what `dones` says: success, or merely the end of each demonstration, or both. robomimic's own human
  datasets have both, so that all their demonstrations are terminated; they end in success. Where some `dones` before
  the last step are not 0, they are kept as `infos["dones"]`, one row later than in the file; the writer puts them back.
* **Rewards** may be missing; they are then 0, and the origin says `rewards: "missing"`.
* **Masks** name episodes by their place in the natural order of names (demo_10 after demo_9). Names that the file does
  not have are left out: robomimic's own scripts copy masks whole beside fewer demonstrations.

What an `Episode` has beyond this layout (its seed, origin, infos, final state and exact end, and the bounds of the
spaces) the writer keeps in attributes and groups called `robopref`, which robomimic's readers do not look at, so that
what is written is read back without loss.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gymnasium
import h5py
import numpy as np
from jaxtyping import Float, Int, Real, UInt8

from robopref.episodes import checked_episodes, flat_box, json_problem
from robopref.files import atomic_write
from robopref.formats.hdf5 import (
    MAX_BYTES,
    ForeignArray,
    ForeignHDF5,
    floating,
    space_notes,
    space_of_notes,
    write_notes,
)
from robopref.types import Episode, EpisodeSource

_DATA, _MASK, _NOTES = "data", "mask", "robopref"


class RobomimicSource(EpisodeSource):
    """The demonstrations of a robomimic file, one episode each; see `robopref.types.EpisodeSource`.

    Attributes:
        demonstrations: the name of each in the file, in the order of the episodes.
    """

    demonstrations: tuple[str, ...]

    def __init__(self, path: str | os.PathLike[str], *, keys: Sequence[str] | None, max_bytes: int) -> None:
        self._file = ForeignHDF5(path, max_bytes=max_bytes)
        self.path = self._file.path
        try:
            self._open(keys)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.demonstrations)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def episode(self, index: int) -> Episode:
        """Demonstration `index`, without images.

        Raises:
            IndexError: there is no such episode.
            ValueError: the file is damaged there; the message names it and the demonstration.
        """
        demo = self._place(index)
        length = self._length(demo)
        noted = self._noted(demo)
        origin = dict(noted["origin"]) if noted else {"demo": self.demonstrations[index]}
        observations, repeated = self._observations(demo, length)
        if repeated:
            origin["final_observation"] = "repeated"
        states, repeated = self._states(demo, length)
        if repeated:
            origin["final_state"] = "repeated"
        rewards = self._numbers(f"{demo}/rewards", (length,)) if self._file.has(f"{demo}/rewards") else None
        if rewards is None:
            origin["rewards"] = "missing"
        infos, ended = self._infos(demo, length, own=bool(noted))
        return Episode(
            observations=observations,
            actions=self._numbers(f"{demo}/actions", (length, *self.action_space.shape)),
            rewards=np.zeros(length) if rewards is None else rewards,
            terminated=noted.get("terminated", ended),
            truncated=noted.get("truncated", not ended),
            infos=infos,
            states=states,
            seed=noted.get("seed"),
            origin=origin,
        )

    def frames(self, index: int, camera: str) -> UInt8[np.ndarray, "T+1 H W C"]:
        """What a camera saw; the last frame is of next_obs, or repeated where there is none.

        Raises:
            IndexError: there is no such episode.
            ValueError: there is no such camera, or the file is damaged there.
        """
        demo = self._place(index)
        if camera not in self.cameras:
            raise ValueError(f"{self._file.path} has no camera {camera!r}; it has {_listed(self.cameras)}.")
        length = self._length(demo)
        final = f"{demo}/next_obs/{camera}"
        last = (final if self._file.has(final) else f"{demo}/obs/{camera}", length - 1)
        return np.concatenate(
            [
                self._read(place, length, self.cameras[camera], begin)
                for place, begin in ((f"{demo}/obs/{camera}", 0), last)
            ]
        )

    def model(self, index: int) -> str | None:
        """The MJCF model of the task as it was in demonstration `index`, if the file keeps it: states belong to it.

        Raises:
            IndexError: there is no such episode.
            ValueError: the file is damaged there.
        """
        model = self._file.attribute(self._place(index), "model_file")
        return None if model is None else str(model)

    def flat_states(self, index: int) -> Real[np.ndarray, "T F"] | None:
        """What robomimic's own tools take for the states of demonstration `index`, if the whole ones are kept beside.

        Raises:
            IndexError: there is no such episode.
            ValueError: the file is damaged there.
        """
        demo = self._place(index)
        if not self._file.has(f"{demo}/states") or not self._file.has(f"{demo}/{_NOTES}/states"):
            return None
        return self._read(f"{demo}/states", self._length(demo), self._file.array(f"{demo}/states").shape[1:])

    def _open(self, keys: Sequence[str] | None) -> None:
        file = self._file
        if not file.is_group(_DATA):
            raise ValueError(
                f"{file.path} is not a robomimic file: it has no group data, but {_listed(file.names(''))}."
            )
        self.demonstrations = tuple(name for name in file.names(_DATA) if file.is_group(f"{_DATA}/{name}"))
        if not self.demonstrations:
            raise ValueError(f"{file.path} has no demonstrations in its group data.")
        first = f"{_DATA}/{self.demonstrations[0]}"
        if not file.names(f"{first}/obs"):
            raise ValueError(
                f"{file.path} has no observations in {first}: it is a raw recording, with states and actions only; play"
                " it back in its environment to add them, as robomimic's script dataset_states_to_obs.py does."
            )
        noted = file.notes(_DATA)
        self.env = file.json(_DATA, "env_args")
        self.description = str(noted.get("description", ""))
        self.splits = self._read_splits()
        parts, self.cameras = self._read_parts(first)
        stored = self._stored_order(noted, parts)
        chosen = list(stored) if keys is None else list(keys)
        unknown = [key for key in chosen if key not in parts]
        if unknown:
            raise ValueError(f"{file.path} has no observation {unknown[0]!r} of numbers; it has {_listed(parts)}.")
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"the observations of {file.path} are to be joined from {chosen}: name each once.")
        self.keys = {key: parts[key] for key in chosen}
        self._make_spaces(noted, stored, first)

    def _read_parts(self, demo: str) -> tuple[dict[str, int], dict[str, tuple[int, int, int]]]:
        """Sizes of keys with numbers, in alphabetical order, and shapes of cameras."""
        parts: dict[str, int] = {}
        cameras: dict[str, tuple[int, int, int]] = {}
        for key in sorted(self._file.names(f"{demo}/obs")):
            if not self._file.has_numbers(f"{demo}/obs/{key}"):
                continue
            array = self._file.array(f"{demo}/obs/{key}")
            if array.ndim == 4 and array.dtype == np.uint8:
                height, width, channels = array.shape[1:]
                cameras[key] = (height, width, channels)
            elif array.ndim in (1, 2):
                parts[key] = array.shape[1] if array.ndim == 2 else 1
        if not parts:
            raise ValueError(f"{self._file.path} has no observations of numbers in {demo}, which robopref needs.")
        return parts, cameras

    def _stored_order(self, noted: Mapping[str, Any], parts: Mapping[str, int]) -> dict[str, int]:
        """All parts, in the order in which they were joined when robopref wrote them, and else as they are."""
        keys = noted.get("keys", dict(parts))
        if not isinstance(keys, dict) or keys != parts:
            raise ValueError(
                f"{self._file.path} was changed after robopref wrote it: its notes are not of {_listed(parts)}; remove"
                " the attribute robopref of data and of every demonstration to read it as any other file."
            )
        return keys

    def _make_spaces(self, noted: Mapping[str, Any], stored: Mapping[str, int], demo: str) -> None:
        path, actions = str(self._file.path), self._file.array(f"{demo}/actions")
        if actions.ndim != 2:
            raise ValueError(f"{path} has actions {list(actions.shape)} in {demo}, not [steps, dimensions].")
        if noted:
            self.action_space = space_of_notes(noted.get("action_space"), actions.shape[1], path)
            whole = space_of_notes(noted.get("observation_space"), sum(stored.values()), path)
            places = dict(
                zip(stored, np.split(np.arange(sum(stored.values())), np.cumsum([*stored.values()])), strict=False)
            )
            rows = np.concatenate([places[key] for key in self.keys])
            self.observation_space = gymnasium.spaces.Box(whole.low[rows], whole.high[rows], dtype=whole.dtype.type)
            return
        dtypes = [self._file.array(f"{demo}/obs/{key}").dtype for key in self.keys]
        self.observation_space = _unbounded(sum(self.keys.values()), np.inf, dtypes)
        self.action_space = _unbounded(actions.shape[1], 1.0, [actions.dtype])

    def _read_splits(self) -> dict[str, Int[np.ndarray, " n"]]:
        places = {name: index for index, name in enumerate(self.demonstrations)}
        named = {name: self._file.texts(f"{_MASK}/{name}") for name in self._file.names(_MASK)}
        return {
            name: np.array(sorted({places[each] for each in texts if each in places}), np.int64)
            for name, texts in named.items()
        }

    def _noted(self, demo: str) -> dict[str, Any]:
        """What robopref noted about an episode; empty if somebody else wrote it."""
        noted = self._file.notes(demo)
        kinds = {"origin": dict, "terminated": bool, "truncated": bool, "seed": int | None}
        if noted and not all(isinstance(noted.get(name, ...), kind) for name, kind in kinds.items()):
            raise ValueError(f"{self._file.path} has notes of {demo} that are damaged: {_listed(noted)}.")
        return noted

    def _place(self, index: int) -> str:
        self.check_index(index)
        return f"{_DATA}/{self.demonstrations[index]}"

    def _length(self, demo: str) -> int:
        actions = self._file.array(f"{demo}/actions")
        length = actions.shape[0] if actions.ndim else 0
        noted = self._file.attribute(demo, "num_samples")
        if not length or noted not in (None, length):
            raise ValueError(f"{self._file.path} has {length} actions in {demo}, where num_samples is {noted}.")
        return int(length)

    def _read(self, place: str, length: int, shape: tuple[int, ...], begin: int = 0) -> np.ndarray:
        """Rows from `begin` of an array [length, *shape], in which an axis of size 1 may be missing or too many."""
        array = self._file.array(place)
        if array.shape[:1] != (length,) or _squeezed(array.shape[1:]) != _squeezed(shape):
            raise ValueError(
                f"{self._file.path} has {list(array.shape)} numbers in {place}, where {[length, *shape]} are needed."
            )
        return self._file.rows(array, begin).reshape(length - begin, *shape)

    def _numbers(self, place: str, shape: tuple[int, ...]) -> Float[np.ndarray, " *shape"]:
        return floating(self._read(place, shape[0], shape[1:]))

    def _observations(self, demo: str, length: int) -> tuple[Float[np.ndarray, "T+1 O"], bool]:
        """The observations, and whether the last one is a repetition."""

        def joined(group: str, begin: int) -> Float[np.ndarray, "n O"]:
            parts = [self._read(f"{demo}/{group}/{key}", length, (size,), begin) for key, size in self.keys.items()]
            return floating(np.concatenate(parts, axis=1))

        repeated = not self._file.has(f"{demo}/next_obs")
        return np.concatenate([joined("obs", 0), joined("obs" if repeated else "next_obs", length - 1)]), repeated

    def _states(self, demo: str, length: int) -> tuple[Float[np.ndarray, "T+1 S"] | None, bool]:
        """The states, None if there are none, and whether the last one is a repetition."""
        array = self._file.array(f"{demo}/states") if self._file.has(f"{demo}/states") else None
        if array is None or 0 in array.shape:
            return None, False
        whole = f"{demo}/{_NOTES}/states"
        if self._file.has(whole):
            kept = self._file.array(whole)
            return self._numbers(whole, (length + 1, *kept.shape[1:])), False
        size = array.shape[1] if array.ndim == 2 else 1
        states, final = self._numbers(f"{demo}/states", (length, size)), f"{demo}/{_NOTES}/final_state"
        repeated = not self._file.has(final)
        return np.concatenate([states, states[-1:] if repeated else self._numbers(final, (1, size))]), repeated

    def _infos(self, demo: str, length: int, *, own: bool) -> tuple[dict[str, np.ndarray], bool]:
        """The infos, and whether `dones` says that the episode ended by itself."""
        place = f"{demo}/dones"
        dones = self._read(place, length, ()) if self._file.has(place) else np.zeros(length, bool)
        if own:
            names = self._file.names(f"{demo}/{_NOTES}/infos")
            infos = {name: self._file.rows(self._info(demo, name, length)) for name in names}
        else:
            infos = {"dones": np.concatenate([np.zeros_like(dones[:1]), dones])} if np.any(dones[:-1]) else {}
        return infos, bool(dones[-1])

    def _info(self, demo: str, name: str, length: int) -> ForeignArray:
        array = self._file.array(f"{demo}/{_NOTES}/infos/{name}")
        if array.shape[:1] != (length + 1,):
            raise ValueError(f"{self._file.path} has no {length + 1} rows of the info {name!r} in {demo}.")
        return array


def read_robomimic(
    path: str | os.PathLike[str], *, keys: Sequence[str] | None = None, max_bytes: int = MAX_BYTES
) -> RobomimicSource:
    """Opens a robomimic file; it is a context manager.

    Args:
        path: the HDF5 file.
        keys: the observations to join, in this order; by default all that are numbers, in alphabetical order, or in the
            order in which they were joined if robopref wrote the file.
        max_bytes: the most memory that one array may take.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, is damaged, has no observations, or not those that `keys` names.
        OSError: it may not be read.
    """
    return RobomimicSource(path, keys=keys, max_bytes=max_bytes)


def write_robomimic(
    path: str | os.PathLike[str],
    episodes: Iterable[Episode],
    *,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    env: Mapping[str, Any],
    keys: Mapping[str, int] | None = None,
    splits: Mapping[str, Sequence[int] | Int[np.ndarray, " n"]] | None = None,
    frames: Mapping[str, Callable[[int], UInt8[np.ndarray, "T+1 H W C"]]] | None = None,
    models: Callable[[int, Episode], str | None] | None = None,
    flat_states: Callable[[int, Episode], Real[np.ndarray, "T F"] | None] | None = None,
    description: str = "",
) -> None:
    """Writes a file that robomimic reads, atomically, one episode at a time.

    Args:
        path: a file that does not exist yet.
        episodes: at least one, each of at least one step.
        observation_space: a flat Box.
        action_space: a flat Box; robomimic expects actions in [-1, 1].
        env: what becomes `env_args`; robomimic makes environments from its `env_name`, `type` and `env_kwargs`.
        keys: names and sizes of the parts into which observations are split, in their order; the one part "flat" by
            default, which is robomimic's name for observations without parts.
        splits: named subsets, as indices of episodes; they become masks.
        frames: for each camera, what gives the frames of the episode with an index.
        models: gives the MJCF model of an episode, of which it is told the index too, or None where it has none.
        flat_states: gives what robomimic's own tools take for the states of an episode before each action (time,
            positions and velocities of MuJoCo), if that is not all of them; the whole ones are kept beside. None says
            that it is all of them. Episodes without states are not asked about.
        description: free text.

    Raises:
        ValueError: the spaces, an episode, its frames, flat states or model, a split, `keys` or `env` do not fit; the
            message says which.
        FileExistsError: `path` exists.
        OSError: the folder cannot be written to.
    """
    observation_box = flat_box(observation_space, "observation", str(path))
    action_box = flat_box(action_space, "action", str(path))
    keys = {"flat": observation_box.shape[0]} if keys is None else keys
    problem = _request_problem(observation_box, keys, frames or {}, splits or {}, env)
    if problem:
        raise ValueError(f"cannot write {path}: {problem}.")
    if os.path.lexists(path):
        raise FileExistsError(f"cannot write {path}: it already exists; choose another path or remove it first.")
    total, count = 0, 0
    with atomic_write(path) as temporary, h5py.File(temporary, "w") as file:
        data = file.create_group(_DATA)
        for index, episode in enumerate(checked_episodes(path, episodes, observation_box, action_box)):
            demo, failure = data.create_group(f"demo_{index}"), f"cannot write {path}: episode {index}"
            _write_demo(demo, episode, keys)
            if episode.states is not None:
                flat = flat_states(index, episode) if flat_states else None
                _write_states(demo, np.asarray(episode.states), flat, failure)
            for camera, give in (frames or {}).items():
                _write_frames(demo, camera, give(index), failure)
            model = models(index, episode) if models else None
            if model is not None:
                _write_model(demo, model, failure)
            total, count = total + len(episode), index + 1
        data.attrs["total"] = total
        data.attrs["env_args"] = json.dumps(dict(env), indent=4)
        spaces = {"observation_space": space_notes(observation_box), "action_space": space_notes(action_box)}
        write_notes(data, {"description": description, "keys": dict(keys), **spaces})
        _write_masks(file, splits or {}, count, path)


def _write_demo(demo: h5py.Group, episode: Episode, keys: Mapping[str, int]) -> None:
    length = len(episode)
    demo.attrs["num_samples"] = length
    demo["actions"] = episode.actions
    demo["rewards"] = episode.rewards
    dones = np.asarray(episode.infos.get("dones", ()))
    known = dones.shape == (length + 1,)
    demo["dones"] = dones[1:] if known else np.append(np.zeros(length - 1, np.int64), int(episode.terminated))
    observations = np.asarray(episode.observations)
    for key, part in zip(keys, np.split(observations, np.cumsum([*keys.values()])[:-1], axis=1), strict=True):
        demo[f"obs/{key}"], demo[f"next_obs/{key}"] = part[:-1], part[1:]
    for name, info in episode.infos.items():
        demo[f"{_NOTES}/infos/{name}"] = np.asarray(info)
    write_notes(
        demo,
        {
            "seed": None if episode.seed is None else int(episode.seed),
            "origin": dict(episode.origin),
            "terminated": bool(episode.terminated),
            "truncated": bool(episode.truncated),
        },
    )


def _write_states(
    demo: h5py.Group, states: Float[np.ndarray, "T+1 S"], flat: Real[np.ndarray, "T F"] | None, failure: str
) -> None:
    if flat is None:
        demo["states"], demo[f"{_NOTES}/final_state"] = states[:-1], states[-1:]
        return
    if flat.ndim != 2 or len(flat) != len(states) - 1:
        raise ValueError(
            f"{failure} has flat states of shape {list(flat.shape)} where {len(states) - 1} rows are needed, one for"
            " each action."
        )
    demo["states"], demo[f"{_NOTES}/states"] = flat, states


def _write_frames(demo: h5py.Group, camera: str, frames: UInt8[np.ndarray, "T+1 H W C"], failure: str) -> None:
    frames, rows = np.asarray(frames), demo.attrs["num_samples"] + 1
    if frames.dtype != np.uint8 or frames.ndim != 4 or len(frames) != rows:
        raise ValueError(
            f"{failure} has frames of {camera!r} of type {frames.dtype} and shape {list(frames.shape)}; {rows} images"
            " of bytes [height, width, channels] are needed."
        )
    demo[f"obs/{camera}"], demo[f"next_obs/{camera}"] = frames[:-1], frames[1:]


def _write_model(demo: h5py.Group, model: str, failure: str) -> None:
    if "\0" in model:
        raise ValueError(f"{failure} has a model with a zero byte in it, so it is no MJCF.")
    # h5py reads bytes that are no UTF-8 as such surrogates, but does not write them.
    demo.attrs.create("model_file", model.encode(errors="surrogateescape"), dtype=h5py.string_dtype())


def _write_masks(
    file: h5py.File,
    splits: Mapping[str, Sequence[int] | Int[np.ndarray, " n"]],
    count: int,
    path: str | os.PathLike[str],
) -> None:
    for name, indices in splits.items():
        wrong = [int(index) for index in indices if not 0 <= index < count]
        if wrong:
            raise ValueError(f"cannot write {path}: the split {name!r} has episode {wrong[0]}, but there are {count}.")
        file[f"{_MASK}/{name}"] = np.array([f"demo_{index}" for index in sorted(int(each) for each in indices)], "S")


def _request_problem(
    observation_box: gymnasium.spaces.Box,
    keys: Mapping[str, int],
    frames: Mapping[str, object],
    splits: Mapping[str, object],
    env: Mapping[str, Any],
) -> str | None:
    size = observation_box.shape[0]
    if min(keys.values(), default=-1) < 0 or sum(keys.values()) != size:
        return f"keys {dict(keys)} must split the {size} numbers of an observation among them"
    for name in (*keys, *frames, *splits):
        if not name or "/" in name or name == "." or "\0" in name:
            return f"{name!r} cannot be a name in the file; it must not be empty nor contain a slash"
    both = sorted(keys.keys() & frames.keys())
    if both:
        return f"{both[0]!r} is both a part of the observation and a camera"
    problem = json_problem(env)
    return f"env has no JSON form ({problem})" if problem else None


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _unbounded(size: int, limit: float, dtypes: Sequence[np.dtype[Any]]) -> gymnasium.spaces.Box:
    dtype = floating(np.zeros(0, np.result_type(*dtypes))).dtype
    return gymnasium.spaces.Box(-limit, limit, (size,), dtype=dtype.type)


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name) if len(name) <= 60 else f"{name[:57]!r}..." for name in names]
    return ", ".join([*shown[:12], "..."] if len(shown) > 12 else shown) or "nothing"
