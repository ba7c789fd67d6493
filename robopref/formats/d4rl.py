"""D4RL's HDF5 files, read and written with h5py alone.

Fu et al. 2020, "D4RL: Datasets for Deep Data-Driven Reinforcement Learning" (arXiv:2004.07219), publish steps of many
episodes one after another, in flat arrays of N rows:

    observations [N, O], actions [N, A], rewards [N], terminals [N], timeouts [N], next_observations [N, O] (optional)
    infos/<name> [N, ...]     what the simulator reported, such as qpos, qvel, goal and action_log_probs
    metadata/<name>           who acted, such as algorithm and iteration

What becomes of it, where that is not plain:

* **Episodes** end where `terminals` (terminated) or `timeouts` (truncated) are not 0. Files of D4RL's first version
  have no `timeouts`: say with `horizon` after how many steps episodes were cut off. What comes after the last end is
  an episode of its own, truncated, and its origin says `ending: "end of file"`.
* **The final observation** is the last row of next_observations. In files without them, that of the last step is
  repeated, and the origin says `final_observation: "repeated"`.
* **Infos** have one row per step, which is taken as what was reported with the observation of that row. Nothing was
  reported after the last step: its row is repeated, and the origin says `final_infos: "repeated"`. (The script that
  made the AntMaze files noted qpos and qvel after the step, so there they are one row late.)
* **States** are infos/state, or else infos/qpos and infos/qvel side by side, where both are there. These are not all
  that a simulator keeps, such as its time, and their last row is repeated like that of the infos.
* **Origins** have the texts and numbers directly in metadata; the weights of policies in it are not read.

The writer adds what D4RL has no place for in D4RL's own manner: what was reported after each step as next_infos/<name>
[N, ...], states as infos/state, and seeds, origins, the environment and the bounds of the spaces as JSON in an
attribute called `robopref`. What it writes is so read back without loss.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import gymnasium
import h5py
import numpy as np
from jaxtyping import Int, UInt8

from robopref.episodes import checked_episodes, flat_box, json_problem
from robopref.files import atomic_write
from robopref.formats.hdf5 import MAX_BYTES, ForeignHDF5, floating, space_notes, space_of_notes, write_notes
from robopref.types import Episode, EpisodeSource

_OBSERVATIONS, _NEXT, _STATE = "observations", "next_observations", "state"
_REQUIRED = (_OBSERVATIONS, "actions", "rewards", "terminals")
_FINAL_INFOS = "next_infos"
_ROWS = 2**20
"""Rows of `terminals` that are looked at together."""
_CHUNK_BYTES = 2**16


class D4RLSource(EpisodeSource):
    """The episodes of a D4RL file; see `robopref.types.EpisodeSource`. There are no splits and no cameras."""

    def __init__(self, path: str | os.PathLike[str], *, horizon: int | None, max_bytes: int) -> None:
        self._file = ForeignHDF5(path, max_bytes=max_bytes)
        self.path = self._file.path
        try:
            self._open(horizon)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._ends)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def episode(self, index: int) -> Episode:
        """Episode `index`.

        Raises:
            IndexError: there is no such episode.
            ValueError: the file is damaged there; the message names it and the array.
        """
        self.check_index(index)
        begin, end = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        noted = self._noted[index] if self._noted else None
        origin = dict(noted["origin"] if noted else self._metadata)
        infos = {name: self._with_final(f"infos/{name}", begin, end) for name in self._infos}
        if infos and not self._final_infos:
            origin["final_infos"] = "repeated"
        if _NEXT not in self._arrays:
            origin["final_observation"] = "repeated"
        if self._unfinished and index == len(self) - 1:
            origin["ending"] = "end of file"
        states = infos.pop(_STATE, None)
        if states is not None:
            states = floating(states.reshape(len(states), -1))
        elif noted is None and {"qpos", "qvel"} <= infos.keys():
            states = np.concatenate([each.reshape(len(each), -1) for each in (infos["qpos"], infos["qvel"])], axis=1)
        terminated = bool(self._terminated[index])
        return Episode(
            observations=floating(self._with_final(_OBSERVATIONS, begin, end)),
            actions=floating(self._rows("actions", begin, end)),
            rewards=floating(self._rows("rewards", begin, end)).reshape(-1),
            terminated=terminated,
            truncated=noted["truncated"] if noted else bool(self._timed_out[index]),
            infos=infos,
            states=states,
            seed=noted["seed"] if noted else None,
            origin=origin,
        )

    def frames(self, index: int, camera: str) -> UInt8[np.ndarray, "T+1 H W C"]:
        """Nothing: D4RL's files have no images.

        Raises:
            IndexError: there is no such episode.
            ValueError: there is such an episode.
        """
        self.check_index(index)
        raise ValueError(f"{self._file.path} has no camera {camera!r}: D4RL's files keep no images.")

    def _open(self, horizon: int | None) -> None:
        file = self._file
        missing = [name for name in _REQUIRED if not file.has(name)]
        if missing:
            raise ValueError(f"{file.path} is not a D4RL file: it has no {', '.join(missing)}.")
        self._infos = [name for name in file.names("infos") if file.has_numbers(f"infos/{name}")]
        self._final_infos = file.has(_FINAL_INFOS)
        names = [*_REQUIRED, *(name for name in ("timeouts", _NEXT) if file.has(name))]
        names += [f"infos/{name}" for name in self._infos]
        if self._final_infos:
            names += [f"{_FINAL_INFOS}/{name}" for name in self._infos]
        self._arrays = {name: file.array(name) for name in names}
        self._check_shapes()
        noted = file.notes("")
        self.env, self.description = noted.get("env", {}), str(noted.get("description", ""))
        self.splits, self.cameras = {}, {}
        self._metadata = {
            name: value
            for name in file.names("metadata")
            if not file.is_group(f"metadata/{name}")
            if (value := file.scalar(f"metadata/{name}")) is not None
        }
        self._make_spaces(noted)
        self._cut(horizon)
        self._noted: list[dict[str, Any]] = self._checked_notes(noted)

    def _check_shapes(self) -> None:
        shapes = {name: array.shape for name, array in self._arrays.items()}
        steps = shapes["actions"][:1]
        wrong = [name for name, shape in shapes.items() if shape[:1] != steps or not steps or not steps[0]]
        wrong += [name for name in (_OBSERVATIONS, "actions") if len(shapes[name]) != 2]
        wrong += [
            name
            for name in ("rewards", "terminals", "timeouts")
            if name in shapes and shapes[name][1:] not in ((), (1,))
        ]
        wrong += [name for name in shapes if name == _NEXT and shapes[name] != shapes[_OBSERVATIONS]]
        if wrong:
            found = ", ".join(f"{name} {list(shapes[name])}" for name in dict.fromkeys([*wrong[:3], "actions"]))
            raise ValueError(f"{self._file.path} has arrays that do not fit one another: {found}.")
        if 8 * steps[0] > self._file.max_bytes:
            raise ValueError(
                f"{self._file.path} has {steps[0]} steps, too many for the {self._file.max_bytes} bytes allowed."
            )

    def _make_spaces(self, noted: Mapping[str, Any]) -> None:
        path, sizes = str(self._file.path), {name: self._arrays[name].shape[1] for name in (_OBSERVATIONS, "actions")}
        self.keys = {_OBSERVATIONS: sizes[_OBSERVATIONS]}
        if noted:
            self.observation_space = space_of_notes(noted.get("observation_space"), sizes[_OBSERVATIONS], path)
            self.action_space = space_of_notes(noted.get("action_space"), sizes["actions"], path)
            return
        # D4RL's tasks act in [-1, 1]; the files do not say so.
        self.observation_space, self.action_space = (
            gymnasium.spaces.Box(
                -limit, limit, (sizes[name],), dtype=floating(np.zeros(0, self._arrays[name].dtype)).dtype.type
            )
            for name, limit in ((_OBSERVATIONS, np.inf), ("actions", 1.0))
        )

    def _cut(self, horizon: int | None) -> None:
        """Finds the row after each episode's last, and how it ended."""
        steps, timed = self._arrays["actions"].shape[0], "timeouts" in self._arrays
        if timed == (horizon is not None):
            advice = (
                "has timeouts, which say where episodes were cut off; leave horizon away"
                if timed
                else "has no timeouts, like D4RL's first files; say with horizon after how many steps episodes were cut"
                " off (1000 in its MuJoCo tasks)"
            )
            raise ValueError(f"{self._file.path} {advice}.")
        if horizon is not None and horizon < 1:
            raise ValueError(f"horizon must be at least 1, not {horizon}.")
        terminals = self._where("terminals")
        if horizon is None:
            timeouts = self._where("timeouts")
        else:
            bounds = [-1, *terminals, steps]
            pieces = [np.arange(a + horizon, b, horizon) for a, b in itertools.pairwise(bounds)]
            timeouts = np.concatenate(pieces)
        last = np.union1d(terminals, timeouts).astype(np.int64)
        self._unfinished = last.size == 0 or last[-1] != steps - 1
        if self._unfinished:
            last = np.append(last, steps - 1)
        self._ends = last + 1
        self._terminated = np.isin(last, terminals)
        self._timed_out = np.isin(last, timeouts)
        self._timed_out[-1] |= self._unfinished

    def _where(self, name: str) -> Int[np.ndarray, " n"]:
        """The rows in which an array is not 0."""
        steps = self._arrays[name].shape[0]
        return np.concatenate(
            [
                begin + np.flatnonzero(self._rows(name, begin, min(begin + _ROWS, steps)))
                for begin in range(0, steps, _ROWS)
            ]
        )

    def _checked_notes(self, noted: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What robopref noted about each episode; empty if somebody else wrote the file."""
        if not noted:
            return []
        kinds = {"origin": dict, "truncated": bool, "seed": int | None}
        episodes = noted.get("episodes")
        if (
            not isinstance(episodes, list)
            or len(episodes) != len(self)
            or not isinstance(self.env, dict)
            or not all(isinstance(each, dict) for each in episodes)
            or not all(isinstance(each.get(name, ...), kind) for each in episodes for name, kind in kinds.items())
        ):
            raise ValueError(
                f"{self._file.path} was changed after robopref wrote it: its notes are not of {len(self)} episodes;"
                " remove its attribute robopref to read it as any other file."
            )
        return episodes

    def _rows(self, name: str, begin: int, end: int) -> np.ndarray:
        return self._file.rows(self._arrays[name], begin, end)

    def _with_final(self, name: str, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`, and what there was after the last: that of the next array, or a repetition."""
        rows, following = self._rows(name, begin, end), f"next_{name}"
        final = self._rows(following, end - 1, end) if following in self._arrays else rows[-1:]
        return np.concatenate([rows, final])


def read_d4rl(path: str | os.PathLike[str], *, horizon: int | None = None, max_bytes: int = MAX_BYTES) -> D4RLSource:
    """Opens a D4RL file; it is a context manager.

    Args:
        path: the HDF5 file.
        horizon: after how many steps episodes were cut off; for files without `timeouts`, and only for these.
        max_bytes: the most memory that one array may take, of one episode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, is damaged, or does not say where its episodes end.
        OSError: it may not be read.
    """
    return D4RLSource(path, horizon=horizon, max_bytes=max_bytes)


def write_d4rl(
    path: str | os.PathLike[str],
    episodes: Iterable[Episode],
    *,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    env: Mapping[str, Any],
    description: str = "",
) -> None:
    """Writes a file in D4RL's layout, compressed as its files are, atomically, one episode at a time.

    An episode that was neither terminated nor truncated has a timeout at its end nevertheless, which in this layout is
    all that keeps it apart from the next.

    Args:
        path: a file that does not exist yet.
        episodes: at least one, each of at least one step, all with the same infos and types of numbers.
        observation_space: a flat Box.
        action_space: a flat Box; D4RL's tasks act in [-1, 1].
        env: how the environment was made; must have a JSON form.
        description: free text.

    Raises:
        ValueError: the spaces, an episode or `env` do not fit; the message names the episode by its index.
        FileExistsError: `path` exists.
        OSError: the folder cannot be written to.
    """
    observation_box = flat_box(observation_space, "observation", str(path))
    action_box = flat_box(action_space, "action", str(path))
    problem = json_problem(env)
    if problem:
        raise ValueError(f"cannot write {path}: env has no JSON form ({problem}).")
    if os.path.lexists(path):
        raise FileExistsError(f"cannot write {path}: it already exists; choose another path or remove it first.")
    noted: list[dict[str, Any]] = []
    with atomic_write(path) as temporary, h5py.File(temporary, "w") as file:
        tables: dict[str, _Table] = {}
        for index, episode in enumerate(checked_episodes(path, episodes, observation_box, action_box)):
            arrays = dict(_arrays(episode))
            if index == 0:
                tables = {name: _Table.make(file, name, rows) for name, rows in arrays.items()}
            problem = _misfit(arrays, tables)
            if problem:
                raise ValueError(f"cannot write {path}: episode {index} {problem}.")
            for name, rows in arrays.items():
                tables[name].append(rows)
            seed = None if episode.seed is None else int(episode.seed)
            noted.append({"seed": seed, "origin": dict(episode.origin), "truncated": bool(episode.truncated)})
        spaces = {"observation_space": space_notes(observation_box), "action_space": space_notes(action_box)}
        write_notes(file, {"description": description, "env": dict(env), "episodes": noted, **spaces})


class _Table(NamedTuple):
    """An array that grows by rows."""

    array: h5py.Dataset

    @classmethod
    def make(cls, file: h5py.File, name: str, like: np.ndarray) -> _Table:
        row = like[:1].nbytes
        chunk = (max(1, _CHUNK_BYTES // max(1, row)), *(max(1, size) for size in like.shape[1:]))
        shape, most = (0, *like.shape[1:]), (None, *like.shape[1:])
        return cls(file.create_dataset(name, shape, like.dtype, maxshape=most, chunks=chunk, compression="gzip"))

    def append(self, rows: np.ndarray) -> None:
        begin = len(self.array)
        self.array.resize(begin + len(rows), axis=0)
        self.array[begin:] = rows


def _arrays(episode: Episode) -> Iterator[tuple[str, np.ndarray]]:
    """The rows of an episode by the names of their arrays."""
    last = np.append(np.zeros(len(episode) - 1, bool), True)
    observations = np.asarray(episode.observations)
    yield _OBSERVATIONS, observations[:-1]
    yield _NEXT, observations[1:]
    yield "actions", np.asarray(episode.actions)
    yield "rewards", np.asarray(episode.rewards)
    yield "terminals", last & episode.terminated
    yield "timeouts", last & (episode.truncated or not episode.terminated)
    infos = dict(episode.infos)
    if episode.states is not None:
        infos[_STATE] = np.asarray(episode.states)
    for name, info in infos.items():
        rows = np.asarray(info)
        yield f"infos/{name}", rows[:-1]
        yield f"{_FINAL_INFOS}/{name}", rows[1:]


def _misfit(arrays: Mapping[str, np.ndarray], tables: Mapping[str, _Table]) -> str | None:
    """Why the rows of an episode cannot follow those of the first, as the rest of a sentence about it."""
    for name in [*arrays, *tables]:
        if name not in arrays or name not in tables:
            return f"and episode 0 do not both have {name}"
        found, first = arrays[name], tables[name].array
        if (found.dtype, found.shape[1:]) != (first.dtype, first.shape[1:]):
            return (
                f"has {name} of type {found.dtype} and shape {list(found.shape[1:])} where episode 0 has {first.dtype}"
                f" and {list(first.shape[1:])}"
            )
    return None
