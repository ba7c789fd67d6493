"""The cache of images against what the simulator shows, through kills, full disks and company."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robopref.datasets import PreferenceDataset, RankingDataset, SegmentTable, TransitionDataset
from robopref.episodes import EpisodeDataset, load_episodes, write_episodes
from robopref.frames import FrameCache
from robopref.queries import Labels, Queries, draw_queries
from robopref.rendering import no_backend_message, use_rendering_backend
from robopref.rollouts import RolloutWorkers
from robopref.types import Episode

CHUNK = 64
LENGTH = 4


def picture(state: np.ndarray, size: int) -> np.ndarray:
    """Noise that is the same for equal states only."""
    rng = np.random.default_rng(np.ascontiguousarray(state).view(np.uint64))
    return rng.integers(0, 256, (size, size + 1, 3), dtype=np.uint8)


class Camera(gymnasium.Env[Any, Any]):
    """Shows states of the point's task; notes each picture in a file, and kills its process at a given state."""

    def __init__(
        self,
        size: int = 5,
        name: str = "point",
        horizon: int = 9,
        log: Path | None = None,
        lethal: float | None = None,
        dtype: Any = np.uint8,
    ) -> None:
        self.config = {"name": name, "size": size, "horizon": horizon}
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size + 1, 3), dtype)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._size, self._log, self._lethal = size, log, lethal

    def set_state(self, state: np.ndarray) -> np.ndarray:
        if state[0] == self._lethal:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(f"{state[0].hex()}\n")
        return picture(state, self._size)


@pytest.fixture(scope="module")
def states(episodes: list[Episode]) -> np.ndarray:
    """Of all rows of the dataset."""
    return np.concatenate([episode.states for episode in episodes if episode.states is not None])


def expected(states: np.ndarray, rows: np.ndarray, size: int = 5) -> np.ndarray:
    flat = np.stack([picture(states[row], size) for row in np.ravel(rows)])
    return flat.reshape(*np.shape(rows), *flat.shape[1:])


def shown(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def names(states: np.ndarray, rows: Any) -> list[str]:
    """What the log says of these rows."""
    return [float(states[row, 0]).hex() for row in rows]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_frames_are_what_the_simulator_shows(
    dataset: EpisodeDataset, states: np.ndarray, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    rows = np.random.default_rng(0).integers(0, len(states), shape)
    with FrameCache(tmp_path / "cache", dataset, Camera) as cache:
        frames = cache.frames(rows)
        assert cache.shape == (5, 6, 3)
        assert frames.dtype == np.uint8
        assert frames.shape == (*shape, 5, 6, 3)
        if rows.size:
            np.testing.assert_array_equal(frames, expected(states, rows))
        assert cache.present(rows).all()
        assert cache.present(np.arange(len(states))).sum() == len(np.unique(rows))


def test_a_frame_is_rendered_once_and_stays(dataset: EpisodeDataset, states: np.ndarray, tmp_path: Path) -> None:
    log, rows = tmp_path / "log", np.array([3, 7, 7, 3, 20])
    calls: list[tuple[int, int]] = []
    # Opened anew each time, as by another run, which may have another time limit.
    for horizon, more, rendered in ((9, rows, [3, 7, 20]), (10, np.array([7, 8]), [8]), (11, rows, [])):
        log.unlink(missing_ok=True)
        calls.clear()
        make = functools.partial(Camera, log=log, horizon=horizon)
        with FrameCache(tmp_path / "cache", dataset, make, progress=lambda *call: calls.append(call)) as cache:
            np.testing.assert_array_equal(cache.frames(more), expected(states, more))
        assert shown(log) == names(states, rendered)
        assert calls == ([(len(rendered), len(rendered))] if rendered else [])


def test_frames_that_nobody_asked_for_take_no_space(
    dataset: EpisodeDataset, states: np.ndarray, tmp_path: Path
) -> None:
    with FrameCache(tmp_path / "cache", dataset, functools.partial(Camera, size=64)) as cache:
        cache.frames(np.array([1, 60, 100]))
    file = (tmp_path / "cache" / "frames.u8").stat()
    frame = 64 * 65 * 3
    assert file.st_size == len(states) * frame
    assert file.st_blocks * 512 < 10 * frame < file.st_size


def test_several_processes_render_the_same(dataset: EpisodeDataset, states: np.ndarray, tmp_path: Path) -> None:
    rows, log = np.arange(len(states)), tmp_path / "log"
    calls: list[tuple[int, int]] = []
    make = functools.partial(Camera, log=log)
    with FrameCache(tmp_path / "cache", dataset, make, processes=2, progress=lambda *call: calls.append(call)) as cache:
        np.testing.assert_array_equal(cache.frames(rows), expected(states, rows))
    assert sorted(shown(log)) == sorted(names(states, rows))
    assert len(calls) == -(-len(rows) // CHUNK) > 1
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (len(rows), len(rows))


def test_a_worker_that_is_killed_loses_only_its_chunk(
    dataset: EpisodeDataset, states: np.ndarray, tmp_path: Path
) -> None:
    rows, log = np.arange(len(states)), tmp_path / "log"
    lethal = float(states[CHUNK + 5, 0])
    with (
        FrameCache(tmp_path / "cache", dataset, functools.partial(Camera, lethal=lethal), processes=1) as cache,
        pytest.raises(RuntimeError, match=r"a process that renders frames died .*; run the same command again"),
    ):
        cache.frames(rows)
    with FrameCache(tmp_path / "cache", dataset, functools.partial(Camera, log=log)) as cache:
        assert np.flatnonzero(cache.present(rows)).tolist() == list(range(CHUNK))
        np.testing.assert_array_equal(cache.frames(rows), expected(states, rows))
    assert shown(log) == names(states, rows[CHUNK:])


def render_until_killed(cache: Path, episodes: Path, lethal: float) -> None:
    with FrameCache(cache, load_episodes(episodes), functools.partial(Camera, lethal=lethal)) as frames:
        frames.frames(np.arange(frames.dataset.offsets[-1]))


def test_the_next_run_goes_on_where_one_was_killed(dataset: EpisodeDataset, states: np.ndarray, tmp_path: Path) -> None:
    rows, log = np.arange(len(states)), tmp_path / "log"
    process = multiprocessing.get_context("spawn").Process(
        target=render_until_killed, args=(tmp_path / "cache", dataset.path, float(states[CHUNK + 5, 0]))
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with FrameCache(tmp_path / "cache", dataset, functools.partial(Camera, log=log)) as cache:
        np.testing.assert_array_equal(cache.frames(rows), expected(states, rows))
    assert shown(log) == names(states, rows[CHUNK:])


def test_nothing_is_marked_before_it_is_on_the_disk(
    dataset: EpisodeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.arange(10)
    with FrameCache(tmp_path / "cache", dataset, Camera) as cache:

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("robopref.frames.os.fsync", full)
            with pytest.raises(OSError, match="No space left"):
                cache.frames(rows)
        assert not cache.present(rows).any()
        cache.frames(rows)
        assert cache.present(rows).all()


def test_two_who_want_the_same_frames_share_the_work(
    dataset: EpisodeDataset, states: np.ndarray, tmp_path: Path
) -> None:
    rows, log = np.arange(len(states)), tmp_path / "log"
    results: list[np.ndarray] = []
    together = threading.Barrier(4)

    def want() -> None:
        together.wait()
        with FrameCache(tmp_path / "cache", dataset, functools.partial(Camera, log=log)) as cache:
            results.append(cache.frames(rows))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for frames in results:
        np.testing.assert_array_equal(frames, expected(states, rows))
    assert sorted(shown(log)) == sorted(names(states, rows))


@pytest.mark.parametrize("row", [-1, 100_000])
def test_rows_that_do_not_exist_are_refused(dataset: EpisodeDataset, tmp_path: Path, row: int) -> None:
    with (
        FrameCache(tmp_path / "cache", dataset, Camera) as cache,
        pytest.raises(IndexError, match=f"so there is no row {row}"),
    ):
        cache.frames(np.array([0, row]))


def store(path: Path, episodes: list[Episode]) -> EpisodeDataset:
    write_episodes(
        path,
        episodes,
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (5,), np.float64),
        action_space=gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32),
        env={"name": "point"},
    )
    return load_episodes(path)


def one_sentence(error: pytest.ExceptionInfo[Any]) -> bool:
    return "\n" not in str(error.value) and ". " not in str(error.value)


def test_a_cache_of_something_else_is_refused(dataset: EpisodeDataset, episodes: list[Episode], tmp_path: Path) -> None:
    path = tmp_path / "cache"
    FrameCache(path, dataset, Camera).close()
    other = store(tmp_path / "other", episodes[:3])
    with pytest.raises(ValueError, match=rf"holds frames of another dataset \({dataset.hash[:12]}\)") as error:
        FrameCache(path, other, Camera)
    assert one_sentence(error)
    with pytest.raises(ValueError, match=r"'size': 5.*not of .*'size': 6.*\(env and shape differ\)") as error:
        FrameCache(path, dataset, functools.partial(Camera, size=6))
    assert one_sentence(error)
    with pytest.raises(ValueError, match=r"has states of point, which maze cannot show") as error:
        FrameCache(tmp_path / "new", dataset, functools.partial(Camera, name="maze"))
    assert one_sentence(error)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_rendered_is_refused(dataset: EpisodeDataset, episodes: list[Episode], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"observes float32 \[5, 6, 3\]; make it observe pixels"):
        FrameCache(tmp_path / "cache", dataset, functools.partial(Camera, dtype=np.float32))
    stateless = store(tmp_path / "stateless", [dataclasses.replace(each, states=None) for each in episodes[:2]])
    with pytest.raises(ValueError, match="keeps no simulator states to render"):
        FrameCache(tmp_path / "cache", stateless, Camera)
    with pytest.raises(ValueError, match="processes must be at least 0, not -1"):
        FrameCache(tmp_path / "cache", dataset, Camera, processes=-1)


@pytest.mark.parametrize("name", ["frames.u8", "present.u8"])
def test_a_damaged_cache_is_refused(dataset: EpisodeDataset, tmp_path: Path, name: str) -> None:
    path = tmp_path / "cache"
    FrameCache(path, dataset, Camera).close()
    with open(path / name, "r+b") as file:
        file.truncate(10)
    with pytest.raises(ValueError, match=rf"{name} is damaged: it should have \d+ bytes"):
        FrameCache(path, dataset, Camera)
    (path / "frames.json").write_text(json.dumps({"something": "else"}))
    with pytest.raises(ValueError, match=r"frames\.json does not describe frames"):
        FrameCache(path, dataset, Camera)


@pytest.fixture(scope="module")
def cache(dataset: EpisodeDataset, tmp_path_factory: pytest.TempPathFactory) -> FrameCache:
    return FrameCache(tmp_path_factory.mktemp("frames") / "cache", dataset, Camera)


def draw(dataset: EpisodeDataset, candidates: int = 2) -> Queries:
    # Of a few episodes, so that others are never touched.
    chosen = np.array([1, 4, 6])
    rng = np.random.default_rng(0)
    return draw_queries(dataset, rng, count=9, length=LENGTH, candidates=candidates, episodes=chosen)


def steps(queries: Queries) -> np.ndarray:
    first = queries.dataset.offsets[queries.episodes] + queries.starts
    return np.asarray(first[..., None] + np.arange(LENGTH))


@pytest.mark.parametrize("candidates", [2, 3])
def test_segments_of_images(dataset: EpisodeDataset, states: np.ndarray, cache: FrameCache, candidates: int) -> None:
    queries = draw(dataset, candidates)
    table = SegmentTable.create(queries, cache)
    segments = table.take(jnp.arange(9))
    assert segments.observations.dtype == jnp.uint8
    np.testing.assert_array_equal(segments.observations, expected(states, steps(queries)))
    np.testing.assert_array_equal(segments.actions, queries.actions.astype(np.float32))
    assert len(table.observations) == len(table.actions) == len(np.unique(steps(queries))) < len(states)


def test_only_the_frames_that_are_touched_are_rendered(dataset: EpisodeDataset, tmp_path: Path) -> None:
    queries, answered = draw(dataset), np.arange(9) < 5
    labels = Labels(values=np.where(answered, 0.0, np.nan), answered=answered, labeler="test")
    with FrameCache(tmp_path / "cache", dataset, Camera) as cache:
        PreferenceDataset.create(queries, labels, cache)
        present = cache.present(np.arange(dataset.offsets[-1]))
    assert np.flatnonzero(present).tolist() == np.unique(steps(queries)[:5]).tolist()


def test_preferences_and_rankings_of_images(dataset: EpisodeDataset, states: np.ndarray, cache: FrameCache) -> None:
    queries, answered = draw(dataset, 3), np.full(9, True)
    orders = np.stack([np.random.default_rng(seed).permutation(3) for seed in range(9)])
    rankings = RankingDataset.create(queries, Labels(orders=orders, answered=answered, labeler="test"), cache)
    ranked = np.take_along_axis(steps(queries), orders[..., None], axis=1)
    np.testing.assert_array_equal(rankings.take(jnp.arange(9)).segments.observations, expected(states, ranked))
    pairs = draw(dataset)
    preferences = PreferenceDataset.create(pairs, Labels(values=np.ones(9), answered=answered, labeler="test"), cache)
    batch = preferences.sample(jax.random.key(0), 20)
    assert batch.segments.observations.shape == (20, 2, LENGTH, 5, 6, 3)
    assert batch.segments.observations.dtype == jnp.uint8


def test_transitions_of_images(dataset: EpisodeDataset, states: np.ndarray, cache: FrameCache) -> None:
    chosen = [5, 2]
    transitions = TransitionDataset.create(dataset, chosen, cache)
    vectors = TransitionDataset.create(dataset, chosen)
    rows = np.concatenate([dataset.offsets[index] + np.arange(dataset.lengths[index]) for index in chosen])
    assert len(transitions.observations) == len(rows) + 2
    batch, others = (each.take(jnp.arange(len(rows))) for each in (transitions, vectors))
    np.testing.assert_array_equal(batch.observations, expected(states, rows))
    np.testing.assert_array_equal(batch.next_observations, expected(states, rows + 1))
    for name in ("actions", "rewards", "terminated"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(others, name))


def test_frames_of_other_episodes_are_refused(cache: FrameCache, episodes: list[Episode], tmp_path: Path) -> None:
    other = store(tmp_path / "other", episodes[:3])
    for create in (
        lambda: TransitionDataset.create(other, None, cache),
        lambda: SegmentTable.create(Queries(other, np.array([[0, 1]]), np.array([[0, 0]]), LENGTH), cache),
    ):
        with pytest.raises(ValueError, match=r"the frames at .*cache are of .*point, not of .*other") as error:
            create()
        assert one_sentence(error)


def make_door(observe: str | None = None) -> Any:
    import envs
    from envs.metaworld import CPL_VIEW

    seen = {} if observe is None else {"observe": observe}
    return envs.make({"name": "metaworld/door-open-v3", "horizon": 30, **CPL_VIEW, "image_size": 24, **seen})


def test_frames_of_a_real_simulator_are_those_that_a_policy_sees(tmp_path: Path) -> None:
    if use_rendering_backend() is None:
        pytest.skip(no_backend_message())
    from envs.behaviours import Expert

    plain, policy = make_door(), Expert("door-open-v3", noise=0.3)
    with RolloutWorkers(make_door, lanes=1) as workers:
        collected = workers.run(policy, [3, 4], keep_states=True)
    path = tmp_path / "door"
    write_episodes(
        path,
        collected,
        observation_space=plain.observation_space,
        action_space=plain.action_space,
        env=plain.config,
    )
    seeing = make_door("pixels")
    live = []
    for episode in collected:
        live.append(seeing.reset(seed=episode.seed)[0])
        live += [seeing.step(action)[0] for action in episode.actions]
    seeing.close()
    dataset = load_episodes(path)
    rows = np.arange(dataset.offsets[-1])[::-1]
    with FrameCache(tmp_path / "cache", dataset, functools.partial(make_door, "pixels"), processes=1) as cache:
        np.testing.assert_array_equal(cache.frames(rows), np.stack(live)[rows])
