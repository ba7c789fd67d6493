"""Datasets of episodes in any format that robopref knows: recognised, opened, converted, in whole or in part.

What a format keeps and what it leaves out is said in its own module under formats/. Here a conversion refuses to drop
images silently: only robomimic's and LeRobot's files have a place for them. From one robomimic file to another, each
episode keeps its MJCF model and what robomimic's own tools take for states; no other format has a place for these.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float, Int, Real, UInt8

from robopref.episodes import EpisodeDataset, load_episodes, write_episodes
from robopref.formats.d4rl import read_d4rl, write_d4rl
from robopref.formats.hdf5 import ForeignHDF5
from robopref.formats.lerobot import read_lerobot, write_lerobot
from robopref.formats.robomimic import RobomimicSource, read_robomimic, write_robomimic
from robopref.progress import ProgressCallback
from robopref.types import Episode, EpisodeSource

Format: TypeAlias = Literal["robopref", "robomimic", "d4rl", "lerobot"]
FORMATS: tuple[Format, ...] = get_args(Format)
"""robopref's own is Minari's."""

WITH_IMAGES: tuple[Format, ...] = ("robomimic", "lerobot")


class StoredEpisodes(EpisodeSource):
    """A dataset of robopref's own, as an `EpisodeSource`; it has no cameras, because its images are rendered."""

    def __init__(self, dataset: EpisodeDataset) -> None:
        self.dataset = dataset
        self.path = dataset.path
        self.observation_space = dataset.observation_space
        self.action_space = dataset.action_space
        self.keys = dataset.keys
        self.env = dataset.env
        self.description = dataset.description
        self.splits = dataset.splits
        self.cameras = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def episode(self, index: int) -> Episode:
        """Episode `index`, with its states and infos."""
        return self.dataset.episode(index)

    def frames(self, index: int, camera: str) -> UInt8[np.ndarray, "T+1 H W C"]:
        """There are none.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.dataset.path} has no camera {camera!r}: its images are rendered from its states.")


def recognise(path: str | os.PathLike[str]) -> Format:
    """The format of what is at `path`.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is of none of the formats.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"there is nothing at {place}.")
    if place.is_dir():
        if (place / "meta" / "info.json").is_file():
            return "lerobot"
        if any((folder / "metadata.json").is_file() for folder in (place, place / "data")):
            return "robopref"
        raise ValueError(
            f"the folder {place} holds no episodes: it has neither meta/info.json, as LeRobot's have, nor"
            " metadata.json, as robopref's and Minari's have."
        )
    with ForeignHDF5(place) as file:
        if file.is_group("data"):
            return "robomimic"
        if file.has_numbers("observations") and file.has_numbers("actions"):
            return "d4rl"
    raise ValueError(
        f"{place} holds no episodes: it has neither a group data, as robomimic's files have, nor arrays observations"
        " and actions, as D4RL's have."
    )


def open_episodes(
    path: str | os.PathLike[str],
    format: Format | None = None,
    *,
    keys: Sequence[str] | None = None,
    horizon: int | None = None,
) -> EpisodeSource:
    """Opens a dataset of episodes; it is a context manager.

    Args:
        path: a folder or a file.
        format: which it is; None recognises it.
        keys: which parts of an observation to join, in this order, where the format has parts.
        horizon: after how many steps episodes were cut off, which a D4RL file may not say.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is damaged, of another format, or has no such parts; the message names the place.
        OSError: it may not be read.
    """
    found = format or recognise(path)
    if keys is not None and found not in ("robomimic", "lerobot"):
        raise ValueError(f"{path} is of the format {found}, whose observations have no parts to choose by keys.")
    if horizon is not None and found != "d4rl":
        raise ValueError(f"{path} is of the format {found}, which says itself where its episodes end; give no horizon.")
    if found == "robomimic":
        return read_robomimic(path, keys=keys)
    if found == "lerobot":
        return read_lerobot(path, keys=keys)
    if found == "d4rl":
        return read_d4rl(path, horizon=horizon)
    return StoredEpisodes(load_episodes(path))


def convert(
    source: EpisodeSource,
    path: str | os.PathLike[str],
    format: Format,
    *,
    indices: Sequence[int] | Int[np.ndarray, " n"] | None = None,
    images: bool = True,
    fps: int | None = None,
    task: str | None = None,
    env: Mapping[str, Any] | None = None,
    flat_states: Callable[[Float[np.ndarray, "T S"]], Float[np.ndarray, "T F"]] | None = None,
    models: Callable[[Float[np.ndarray, " S"]], str] | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Writes episodes of a source in a format, atomically.

    All formats but robopref's own hold one episode at a time in memory; robopref's own holds all vectors, no images.

    Args:
        source: where they come from.
        path: what is written, which must not exist yet.
        format: as which.
        indices: of the episodes, in their new order; None takes all.
        images: whether what cameras saw goes along.
        fps: frames per second, which LeRobot's format needs, and only that.
        task: what the robot is to do, in words, which LeRobot's format needs where an episode's origin does not say it;
            the description or the environment's name by default.
        env: how the environment was made, in the form that the format's other readers expect; as the source has it by
            default.
        flat_states: of states, what robomimic's own tools expect; for that format alone, and for episodes of which the
            source does not keep it itself.
        models: the MJCF model to which a state belongs; likewise.
        progress: called with the episodes written and their number.

    Raises:
        ValueError: there are images and the format has no place for them, or an episode does not fit.
        FileExistsError: `path` exists.
        OSError: it may not be written.
    """
    chosen = [int(index) for index in (range(len(source)) if indices is None else indices)]
    cameras = tuple(source.cameras) if images else ()
    if cameras and format not in WITH_IMAGES:
        raise ValueError(
            f"the format {format} has no place for what {', '.join(cameras)} saw; leave the images out, or choose"
            f" {' or '.join(WITH_IMAGES)}."
        )
    if (fps is None) == (format == "lerobot"):
        raise ValueError("fps, the frames per second, must be given for the format lerobot, and only for that.")
    places = {old: new for new, old in enumerate(chosen)}
    splits = {
        name: sorted(places[index] for index in members.tolist() if index in places)
        for name, members in source.splits.items()
    }
    frames: dict[str, Callable[[int], UInt8[np.ndarray, "T+1 H W C"]]] = {
        camera: partial(_frames_of, source, chosen, camera) for camera in cameras
    }
    common: dict[str, Any] = {
        "observation_space": source.observation_space,
        "action_space": source.action_space,
        "env": source.env if env is None else env,
        "description": source.description,
    }
    episodes = _read(source, chosen, progress)
    if format == "robomimic":
        write_robomimic(
            path,
            episodes,
            keys=source.keys,
            splits=splits,
            frames=frames,
            models=partial(_model_of, source, chosen, models),
            flat_states=partial(_flat_states_of, source, chosen, flat_states),
            **common,
        )
    elif format == "lerobot":
        assert fps is not None
        task = task or source.description or source.env.get("name") or source.env.get("env_name")
        write_lerobot(path, episodes, fps=fps, task=task, keys=source.keys, splits=splits, frames=frames, **common)
    elif format == "d4rl":
        write_d4rl(path, episodes, **common)
    else:
        write_episodes(path, list(episodes), keys=source.keys, splits=splits, **common)


def _frames_of(source: EpisodeSource, chosen: Sequence[int], camera: str, place: int) -> UInt8[np.ndarray, "T+1 H W C"]:
    return source.frames(chosen[place], camera)


def _model_of(
    source: EpisodeSource,
    chosen: Sequence[int],
    models: Callable[[Float[np.ndarray, " S"]], str] | None,
    place: int,
    episode: Episode,
) -> str | None:
    own = source.model(chosen[place]) if isinstance(source, RobomimicSource) else None
    if own is not None or models is None or episode.states is None:
        return own
    return models(episode.states[0])


def _flat_states_of(
    source: EpisodeSource,
    chosen: Sequence[int],
    flat_states: Callable[[Float[np.ndarray, "T S"]], Float[np.ndarray, "T F"]] | None,
    place: int,
    episode: Episode,
) -> Real[np.ndarray, "T F"] | None:
    own = source.flat_states(chosen[place]) if isinstance(source, RobomimicSource) else None
    if own is not None or flat_states is None or episode.states is None:
        return own
    return flat_states(episode.states[:-1])


def _read(source: EpisodeSource, chosen: Sequence[int], progress: ProgressCallback | None) -> Iterator[Episode]:
    for done, index in enumerate(chosen):
        yield source.episode(index)
        if progress is not None:
            progress(done + 1, len(chosen))
