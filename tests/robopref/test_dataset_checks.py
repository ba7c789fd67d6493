from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest

from robopref import dataset_checks
from robopref.episodes import EpisodeDataset, load_episodes, write_episodes
from robopref.types import Episode

STEPS = (4, 6, 5)


def a_dataset(**changes: Any) -> EpisodeDataset:
    """Three truncated episodes of 4, 6 and 5 steps with two varied observation dimensions and nothing wrong."""
    rng = np.random.default_rng(0)
    rows = sum(STEPS) + len(STEPS)
    fields: dict[str, Any] = {
        "path": Path("here"),
        "hash": "0" * 64,
        "env": {},
        "description": "",
        "keys": {"observation": 2},
        "splits": {},
        "observation_space": gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64),
        "action_space": gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32),
        "observations": rng.normal(size=(rows, 2)),
        "actions": rng.uniform(-0.9, 0.9, size=(rows, 1)).astype(np.float32),
        "rewards": rng.normal(size=rows),
        "offsets": np.array([0, 5, 12, 18]),
        "lengths": np.array(STEPS),
        "terminated": np.zeros(3, bool),
        "truncated": np.ones(3, bool),
        "successes": np.zeros(3, bool),
        "returns": np.zeros(3),
        "seeds": np.arange(3),
        "origins": ({}, {}, {}),
        "state_size": 0,
    }
    return EpisodeDataset(**{**fields, **changes})


def changed(name: str, index: Any, value: float) -> EpisodeDataset:
    dataset = a_dataset()
    array = getattr(dataset, name).copy()
    array[index] = value
    return dataclasses.replace(dataset, **{name: array})


def test_nothing_is_wrong_with_a_good_dataset() -> None:
    checks = dataset_checks.dataset_checks(a_dataset(), length=4)
    assert [check.name for check in checks if not check.ok] == []
    assert len({check.name for check in checks}) == len(checks) == 8


@pytest.mark.parametrize("name", ["observations", "actions", "rewards"])
def test_not_a_number_is_fatal_and_located(name: str) -> None:
    # Episode 1 begins at row 5, so row 8 is its step 3.
    checks = dataset_checks.dataset_checks(changed(name, 8, np.nan), length=4)
    assert checks[0].fatal
    assert name in checks[0].message
    assert "episode 1, step 3" in checks[0].message


def test_an_action_outside_its_space_is_fatal_and_measured() -> None:
    check = dataset_checks.check_action_bounds(changed("actions", 6, -1.25))
    assert check.fatal
    assert "1 of 15 actions (6.7%)" in check.message
    assert "by up to 0.25" in check.message
    assert "episode 1, step 1" in check.message


def test_the_row_after_the_last_action_is_no_action() -> None:
    assert dataset_checks.check_action_bounds(changed("actions", 4, 9.0)).ok
    assert not dataset_checks.check_action_bounds(changed("actions", 3, 9.0)).ok


@pytest.mark.parametrize(("count", "ok"), [(3, True), (4, False)])
def test_more_than_a_fifth_of_actions_on_a_bound_is_worth_knowing(count: int, ok: bool) -> None:
    # A fifth of 15 steps is 3; rows 5 to 10 are steps of episode 1.
    check = dataset_checks.check_saturation(changed("actions", slice(5, 5 + count), 1.0))
    assert check.ok == ok
    assert not check.fatal


def test_constant_dimensions_are_named_and_harmless_unless_all_are() -> None:
    one = dataset_checks.check_constant_dimensions(changed("observations", (slice(None), 1), 3.0))
    assert not one.ok
    assert not one.fatal
    assert "1 of 2 observation dimensions never change: 1." in one.message
    assert dataset_checks.check_constant_dimensions(changed("observations", slice(None), 3.0)).fatal


def test_variation_lost_in_float32_is_fatal() -> None:
    noise = a_dataset().observations[:, 0]
    lost = a_dataset()
    lost.observations[:, 0] = 1000.0 + 1e-5 * noise
    assert dataset_checks.check_normalisation(lost).fatal
    kept = a_dataset()
    kept.observations[:, 0] = 1000.0 + 1e-1 * noise
    assert dataset_checks.check_normalisation(kept).ok


def test_a_reading_far_from_all_others_is_worth_knowing() -> None:
    # The deviation of n equal numbers and one outlier puts it sqrt(n) deviations away: 60 for 3600.
    rows = 3601
    observations = np.zeros((rows, 1))
    observations[7] = 5.0
    dataset = a_dataset(observations=observations, offsets=np.array([0, rows]), lengths=np.array([rows - 1]))
    check = dataset_checks.check_normalisation(dataset)
    assert not check.ok
    assert not check.fatal
    assert "reach 60 deviations" in check.message
    assert dataset_checks.check_normalisation(dataclasses.replace(dataset, observations=observations[:1601])).ok


@pytest.mark.parametrize(
    ("terminated", "truncated", "horizon", "fatal", "says"),
    [
        ([0, 0, 0], [1, 1, 1], None, False, "0 terminated, 3 truncated"),
        ([1, 0, 1], [0, 1, 0], None, False, "2 terminated, 1 truncated"),
        ([1, 0, 1], [0, 0, 0], None, True, "1 episodes neither terminate nor are truncated: 1"),
        # A single end at the limit may be a coincidence.
        ([0, 1, 0], [1, 0, 1], 6, False, "1 terminated"),
    ],
)
def test_ends_of_episodes(
    terminated: list[int], truncated: list[int], horizon: int | None, fatal: bool, says: str
) -> None:
    dataset = a_dataset(
        terminated=np.array(terminated, bool),
        truncated=np.array(truncated, bool),
        env={} if horizon is None else {"horizon": horizon},
    )
    check = dataset_checks.check_ends(dataset)
    assert check.fatal == fatal
    assert says in check.message


def test_a_time_limit_stored_as_termination_is_fatal() -> None:
    ends = {"terminated": np.ones(3, bool), "truncated": np.zeros(3, bool)}
    same = a_dataset(lengths=np.array([5, 5, 5]), offsets=np.array([0, 6, 12, 18]), **ends)
    check = dataset_checks.check_ends(same)
    assert check.fatal
    assert "3 of 3 terminated episodes have exactly 5 steps" in check.message
    assert dataset_checks.check_ends(dataclasses.replace(same, env={"horizon": 500})).ok


@pytest.mark.parametrize(
    ("length", "ok", "fatal"), [(4, True, False), (5, False, False), (6, False, False), (7, False, True)]
)
def test_episodes_too_short_for_a_segment(length: int, ok: bool, fatal: bool) -> None:
    check = dataset_checks.check_lengths(a_dataset(), length)
    assert (check.ok, check.fatal) == (ok, fatal)


def test_equal_rewards_leave_a_teacher_nothing_to_judge() -> None:
    equal = np.full(18, 2.0)
    equal[[4, 11, 17]] = 0.0  # the rows after the last action, where nothing is rewarded
    assert not dataset_checks.check_rewards(a_dataset(rewards=equal)).ok
    assert dataset_checks.check_rewards(a_dataset()).ok


def test_a_segment_needs_a_step() -> None:
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        dataset_checks.dataset_checks(a_dataset(), length=0)


def test_time_goes_on_evenly_or_jumps() -> None:
    even = {0: np.arange(6) / 10, 2: 5.0 + np.arange(4) / 10}
    assert dataset_checks.check_timestamps(even).ok
    # The last row may repeat the one before.
    assert dataset_checks.check_timestamps({0: np.append(np.arange(5) / 10, 0.4)}).ok
    dropped = np.array([0.0, 0.1, 0.2, 0.4, 0.5, 0.6])
    found = dataset_checks.check_timestamps({**even, 3: dropped})
    assert not found.ok
    assert not found.fatal
    assert "1 steps" in found.message
    assert "the first takes 0.2 s, in episode 3 at step 2" in found.message
    backwards = dataset_checks.check_timestamps({0: np.array([0.0, 0.1, 0.05, 0.2, 0.3, 0.4])})
    assert "takes -0.05 s, in episode 0 at step 1" in backwards.message
    # What is no time is a jump, and hides no other.
    lost = dataset_checks.check_timestamps({**even, 1: np.array([0.0, 0.1, np.nan, 0.3, 0.4, 0.8, 0.9])})
    assert "3 steps take more than 1.5 or less than 0.5 times the usual 0.1 s, in 1 episodes" in lost.message
    assert "in episode 1 at step 1" in lost.message
    assert dataset_checks.check_timestamps({0: np.zeros(2), 1: np.ones(2)}).ok
    names = [check.name for check in dataset_checks.dataset_checks(a_dataset(), 3, even)]
    assert names[-1] == "time stamps"
    assert "time stamps" not in [check.name for check in dataset_checks.dataset_checks(a_dataset(), 3)]


def test_of_time_stamps_nothing_else_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def episode(length: int, infos: dict[str, np.ndarray]) -> Episode:
        return Episode(
            observations=np.zeros((length + 1, 2)),
            actions=np.zeros((length, 1), np.float32),
            rewards=np.zeros(length),
            terminated=False,
            truncated=True,
            infos={"force": np.ones((length + 1, 3)), **infos},
            states=np.zeros((length + 1, 7)),
        )

    times = np.arange(5, dtype=np.float32) / 10
    episodes = [episode(3, {}), episode(4, {"timestamp": times[:, None]}), episode(2, {"timestamp": times[:3]})]
    spaces = {name: getattr(a_dataset(), name) for name in ("observation_space", "action_space")}
    write_episodes(tmp_path / "store", episodes, env={}, **spaces)
    dataset = load_episodes(tmp_path / "store")
    read: list[str] = []
    get = h5py.Dataset.__getitem__

    def noted(node: h5py.Dataset, rows: Any) -> Any:
        read.append(node.name)
        return get(node, rows)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", noted)
    found = dataset_checks.read_timestamps(dataset)
    assert read == ["/episode_1/infos/timestamp", "/episode_2/infos/timestamp"]
    assert list(found) == [1, 2]
    np.testing.assert_array_equal(found[1], times.astype(np.float64), strict=True)
    np.testing.assert_array_equal(found[2], times[:3].astype(np.float64), strict=True)
