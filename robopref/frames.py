"""Images of stored episodes, rendered once and kept in files: what agents that learn from pixels see.

An episode store keeps vectors and simulator states, not images. A `FrameCache` puts a simulator into the stored states
and keeps what it then shows, for the rows that somebody asks for; nothing else takes up space on the disk. The
simulator is made as for evaluation, with images as observations, so that agents are tried on what they learned from.

In its folder:

* `frames.json`: what the frames are of: the dataset's hash, the environment's configuration, their shape;
* `frames.u8`: a sparse array [R, H, W, 3] with a place for each row of the dataset;
* `present.u8`: 1 for each row whose frame is there, [R].

A frame is on the disk before it is marked as present: a process that is killed loses only what it was rendering, and
the next one goes on from there.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from robopref.episodes import EpisodeDataset
from robopref.files import Closing, atomic_folder, read_json, write_json
from robopref.processes import end_with_parent
from robopref.progress import ProgressCallback
from robopref.rollouts import MakeEnv

SCHEMA_VERSION = 1

_DESCRIPTION, _FRAMES, _PRESENT, _LOCK = "frames.json", "frames.u8", "present.u8", "lock"
_CHUNK = 64
"""Frames that are rendered, written and marked together."""


class FrameCache(Closing):
    """The frames of a dataset, as one environment shows its states.

    Several processes may use one cache at once; while one of them renders, others that miss a frame wait for their
    turn. Use it as a context manager, or call `close`.

    Args:
        path: the cache's folder; made if it does not exist.
        dataset: the episodes, with simulator states kept.
        make_env: makes an environment with `config`, `set_state`, and images [H, W, 3] as observations; picklable if
            there are processes.
        processes: that render; 0 renders in this process.
        progress: called with the frames rendered and their number, whenever some have to be.

    Raises:
        ValueError: the dataset keeps no states, the environment shows no images, or is one of another task, or the
            folder holds frames of another dataset, or of another view of it.
        OSError: the folder cannot be read or written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dataset: EpisodeDataset,
        make_env: MakeEnv,
        *,
        processes: int = 0,
        progress: ProgressCallback | None = None,
    ) -> None:
        if processes < 0:
            raise ValueError(f"processes must be at least 0, not {processes}.")
        if not dataset.state_size:
            raise ValueError(
                f"{dataset.path} keeps no simulator states to render; collect the episodes again with states kept."
            )
        self.path = Path(path)
        self.dataset = dataset
        self._make_env = make_env
        self._processes = processes
        self._progress = progress
        self._painter = _Painter(make_env, self.path)
        try:
            description = _describe(dataset, self._painter.env)
            self.shape: tuple[int, int, int] = tuple(description["shape"])
            self._open(description)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the environment; frames that are there can still be read."""
        self._painter.close()

    def frames(self, rows: Int[np.ndarray, "*M"]) -> UInt8[np.ndarray, "*M H W 3"]:
        """The frames of these rows of the dataset, rendered now if they are not there.

        Args:
            rows: where the flat arrays of the dataset have these states: `dataset.offsets[episode] + step`.

        Raises:
            IndexError: the dataset has no such row.
            OSError: the disk is full, or the files cannot be read.
            RuntimeError: this machine cannot draw, or a process that renders died.
        """
        rows = self._checked(rows)
        if not self.present(rows).all():
            self._render(np.unique(rows))
        stored = np.memmap(self.path / _FRAMES, np.uint8, "r", shape=(self._num_rows, *self.shape))
        return np.array(stored[rows])

    def present(self, rows: Int[np.ndarray, "*M"]) -> Bool[np.ndarray, "*M"]:
        """Which of these rows have their frame already."""
        marks = np.fromfile(self.path / _PRESENT, np.uint8)
        return np.asarray(marks[self._checked(rows)] == 1)

    @property
    def _num_rows(self) -> int:
        return int(self.dataset.offsets[-1])

    def _checked(self, rows: Int[np.ndarray, "*M"]) -> Int[np.ndarray, "*M"]:
        rows = np.asarray(rows)
        wrong = rows[(rows < 0) | (rows >= self._num_rows)]
        if wrong.size:
            raise IndexError(f"{self.dataset.path} has rows 0 to {self._num_rows - 1}, so there is no row {wrong[0]}.")
        return rows

    def _open(self, description: Mapping[str, Any]) -> None:
        """Makes the files, or checks that those that are there are the right ones."""
        if not self.path.exists():
            self._make(description)
        found = read_json(self.path / _DESCRIPTION)
        if not isinstance(found, dict) or found.keys() != description.keys():
            raise ValueError(f"{self.path / _DESCRIPTION} does not describe frames; choose another folder for them.")
        if (found["dataset"], found["rows"]) != (description["dataset"], description["rows"]):
            raise ValueError(
                f"{self.path} holds frames of another dataset ({str(found['dataset'])[:12]}) than {self.dataset.path} "
                f"({self.dataset.hash[:12]}); choose another folder for its frames."
            )
        if found != description:
            differing = " and ".join(name for name in description if found[name] != description[name])
            raise ValueError(
                f"{self.path} holds frames of {found['env']}, not of {description['env']} ({differing} differ); "
                "choose another folder for this view."
            )
        sizes = {_FRAMES: self._num_rows * int(np.prod(self.shape)), _PRESENT: self._num_rows}
        for name, size in sizes.items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != size:
                raise ValueError(f"{file} is damaged: it should have {size} bytes; remove {self.path} to render anew.")

    def _make(self, description: Mapping[str, Any]) -> None:
        try:
            with atomic_folder(self.path) as folder:
                for name, size in {_FRAMES: int(np.prod(self.shape)), _PRESENT: 1}.items():
                    with open(folder / name, "wb") as file:
                        file.truncate(self._num_rows * size)
                (folder / _LOCK).touch()
                write_json(folder / _DESCRIPTION, description)
        except OSError:
            # Another process may have made the same folder meanwhile.
            if not (self.path / _DESCRIPTION).exists():
                raise

    def _render(self, rows: Int[np.ndarray, " n"]) -> None:
        """Renders those of these rows, each given once and in order, that are missing."""
        with self._turn():
            missing = rows[~self.present(rows)]
            chunks = [missing[begin : begin + _CHUNK] for begin in range(0, len(missing), _CHUNK)]
            painted = self._paint_here(chunks) if self._processes == 0 else self._paint_in_processes(chunks)
            finished = 0
            for count in painted:
                finished += count
                if self._progress is not None:
                    self._progress(finished, len(missing))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One process renders at a time, so that nothing is rendered twice; the lock of one that dies is free."""
        with open(self.path / _LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _states(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n S"]:
        episodes = np.searchsorted(self.dataset.offsets, rows, side="right") - 1
        return self.dataset.states_at(episodes, rows - self.dataset.offsets[episodes])

    def _paint_here(self, chunks: list[Int[np.ndarray, " n"]]) -> Iterator[int]:
        for chunk in chunks:
            yield self._painter.paint(chunk, self._states(chunk))

    def _paint_in_processes(self, chunks: list[Int[np.ndarray, " n"]]) -> Iterator[int]:
        if not chunks:
            return
        # Spawned, not forked: a forked copy of a process in which JAX has started its threads can deadlock.
        pool = ProcessPoolExecutor(
            min(self._processes, len(chunks)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self._make_env, self.path),
        )
        try:
            with pool:
                waiting: set[Future[int]] = set()
                for chunk in chunks:
                    if len(waiting) >= 2 * self._processes:
                        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                        yield from (future.result() for future in done)
                    waiting.add(pool.submit(_paint_in_worker, chunk, self._states(chunk)))
                yield from (future.result() for future in waiting)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that renders frames died (killed, or out of memory); run the same command again, with fewer "
                "processes if memory was short: it goes on from what is there"
            ) from error


class _Painter:
    """An environment, and the files that its images are written to."""

    def __init__(self, make_env: MakeEnv, path: Path) -> None:
        self.env = make_env()
        self._path = path

    def close(self) -> None:
        self.env.close()

    def paint(self, rows: Int[np.ndarray, " n"], states: Float[np.ndarray, "n S"]) -> int:
        """Renders and keeps the frames of these rows; returns how many."""
        images = [np.ascontiguousarray(self.env.set_state(state)) for state in states]  # type: ignore[attr-defined]
        # Written, not assigned to a memory map: a full disk then is an error and not the end of the process.
        with open(self._path / _FRAMES, "r+b") as file:
            for row, image in zip(rows, images, strict=True):
                _write_at(file.fileno(), image.data.cast("B"), int(row) * image.nbytes)
            os.fsync(file.fileno())
        with open(self._path / _PRESENT, "r+b") as file:
            for row in rows:
                _write_at(file.fileno(), memoryview(b"\x01"), int(row))
        return len(rows)


def _write_at(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


def _describe(dataset: EpisodeDataset, env: Any) -> dict[str, Any]:
    """What frames of this dataset in this environment are known by."""
    shape, dtype = env.observation_space.shape, env.observation_space.dtype
    if len(shape) != 3 or dtype != np.uint8:
        raise ValueError(
            f"frames are images, but the environment observes {dtype} {list(shape)}; make it observe pixels."
        )
    # The time limit does not show: one cache serves evaluations of any length.
    config = {name: value for name, value in env.config.items() if name != "horizon"}
    if dataset.env and dataset.env.get("name") != config.get("name"):
        raise ValueError(
            f"{dataset.path} has states of {dataset.env.get('name')}, which {config.get('name')} cannot show."
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset": dataset.hash,
        "rows": int(dataset.offsets[-1]),
        "env": config,
        "shape": list(shape),
    }


# A worker process keeps its environment here between tasks: an executor gives its initializer no other place.
_worker: _Painter | None = None


def _start_worker(make_env: MakeEnv, path: Path) -> None:
    global _worker
    end_with_parent()
    _worker = _Painter(make_env, path)


def _paint_in_worker(rows: Int[np.ndarray, " n"], states: Float[np.ndarray, "n S"]) -> int:
    if _worker is None:
        raise RuntimeError("this process was not started to render frames")
    return _worker.paint(rows, states)
