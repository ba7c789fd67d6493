from __future__ import annotations

import dataclasses
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from robopref import doctor
from robopref.doctor import Check, ProbeError
from robopref.episodes import EpisodeDataset

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
    checks = doctor.dataset_checks(a_dataset(), length=4)
    assert [check.name for check in checks if not check.ok] == []
    assert len({check.name for check in checks}) == len(checks) == 8


@pytest.mark.parametrize("name", ["observations", "actions", "rewards"])
def test_not_a_number_is_fatal_and_located(name: str) -> None:
    # Episode 1 begins at row 5, so row 8 is its step 3.
    checks = doctor.dataset_checks(changed(name, 8, np.nan), length=4)
    assert checks[0].fatal
    assert name in checks[0].message
    assert "episode 1, step 3" in checks[0].message


def test_an_action_outside_its_space_is_fatal_and_measured() -> None:
    check = doctor.check_action_bounds(changed("actions", 6, -1.25))
    assert check.fatal
    assert "1 of 15 actions (6.7%)" in check.message
    assert "by up to 0.25" in check.message
    assert "episode 1, step 1" in check.message


def test_the_row_after_the_last_action_is_no_action() -> None:
    assert doctor.check_action_bounds(changed("actions", 4, 9.0)).ok
    assert not doctor.check_action_bounds(changed("actions", 3, 9.0)).ok


@pytest.mark.parametrize(("count", "ok"), [(3, True), (4, False)])
def test_more_than_a_fifth_of_actions_on_a_bound_is_worth_knowing(count: int, ok: bool) -> None:
    # A fifth of 15 steps is 3; rows 5 to 10 are steps of episode 1.
    check = doctor.check_saturation(changed("actions", slice(5, 5 + count), 1.0))
    assert check.ok == ok
    assert not check.fatal


def test_constant_dimensions_are_named_and_harmless_unless_all_are() -> None:
    one = doctor.check_constant_dimensions(changed("observations", (slice(None), 1), 3.0))
    assert not one.ok
    assert not one.fatal
    assert "1 of 2 observation dimensions never change: 1." in one.message
    assert doctor.check_constant_dimensions(changed("observations", slice(None), 3.0)).fatal


def test_variation_lost_in_float32_is_fatal() -> None:
    noise = a_dataset().observations[:, 0]
    lost = a_dataset()
    lost.observations[:, 0] = 1000.0 + 1e-5 * noise
    assert doctor.check_normalisation(lost).fatal
    kept = a_dataset()
    kept.observations[:, 0] = 1000.0 + 1e-1 * noise
    assert doctor.check_normalisation(kept).ok


def test_a_reading_far_from_all_others_is_worth_knowing() -> None:
    # The deviation of n equal numbers and one outlier puts it sqrt(n) deviations away: 60 for 3600.
    rows = 3601
    observations = np.zeros((rows, 1))
    observations[7] = 5.0
    dataset = a_dataset(observations=observations, offsets=np.array([0, rows]), lengths=np.array([rows - 1]))
    check = doctor.check_normalisation(dataset)
    assert not check.ok
    assert not check.fatal
    assert "reach 60 deviations" in check.message
    assert doctor.check_normalisation(dataclasses.replace(dataset, observations=observations[:1601])).ok


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
    check = doctor.check_ends(dataset)
    assert check.fatal == fatal
    assert says in check.message


def test_a_time_limit_stored_as_termination_is_fatal() -> None:
    ends = {"terminated": np.ones(3, bool), "truncated": np.zeros(3, bool)}
    same = a_dataset(lengths=np.array([5, 5, 5]), offsets=np.array([0, 6, 12, 18]), **ends)
    check = doctor.check_ends(same)
    assert check.fatal
    assert "3 of 3 terminated episodes have exactly 5 steps" in check.message
    assert doctor.check_ends(dataclasses.replace(same, env={"horizon": 500})).ok


@pytest.mark.parametrize(
    ("length", "ok", "fatal"), [(4, True, False), (5, False, False), (6, False, False), (7, False, True)]
)
def test_episodes_too_short_for_a_segment(length: int, ok: bool, fatal: bool) -> None:
    check = doctor.check_lengths(a_dataset(), length)
    assert (check.ok, check.fatal) == (ok, fatal)


def test_equal_rewards_leave_a_teacher_nothing_to_judge() -> None:
    equal = np.full(18, 2.0)
    equal[[4, 11, 17]] = 0.0  # the rows after the last action, where nothing is rewarded
    assert not doctor.check_rewards(a_dataset(rewards=equal)).ok
    assert doctor.check_rewards(a_dataset()).ok


def test_a_segment_needs_a_step() -> None:
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        doctor.dataset_checks(a_dataset(), length=0)


def test_a_probe_gives_what_its_process_printed_last() -> None:
    assert doctor.run_probe("print('noise'); print('{\"answer\": 42}')") == {"answer": 42}


def test_a_probe_that_fails_says_why() -> None:
    with pytest.raises(ProbeError, match=r"^ValueError: no such luck$"):
        doctor.run_probe("raise ValueError('no such luck.')")


def test_a_probe_that_dies_without_a_word_says_its_status() -> None:
    with pytest.raises(ProbeError, match="status -9"):
        doctor.run_probe("import os; os.kill(os.getpid(), 9)")


def test_a_probe_that_hangs_is_given_up() -> None:
    with pytest.raises(ProbeError, match="no answer within 0 s"):
        doctor.run_probe("import time; time.sleep(600)", seconds=0.2)


def test_a_check_that_raises_is_reported_and_the_others_go_on() -> None:
    def broken() -> Check:
        raise KeyError("gone")

    found = list(doctor.run_checks({"first": broken, "second": lambda: Check("second", True, "Fine.")}))
    assert [check.name for check in found] == ["first", "second"]
    assert not found[0].ok
    assert not found[0].fatal
    assert "KeyError: 'gone'" in found[0].message
    assert found[1].ok


def test_checks_come_in_their_order_whatever_they_take() -> None:
    def slow() -> Check:
        time.sleep(0.2)
        return Check("slow", True, "")

    checks: dict[str, Callable[[], Check]] = {"slow": slow, "quick": lambda: Check("quick", True, "")}
    assert [check.name for check in doctor.run_checks(checks)] == ["slow", "quick"]


CHECKS = (
    Check("good", True, "All is well [really]."),
    Check("optional", False, "Missing.", "pip install it", required=False),
)
BAD = Check("bad", False, "Broken.", "Repair it.")


@pytest.mark.parametrize(("checks", "good"), [(CHECKS, True), ((*CHECKS, BAD), False)])
def test_only_what_is_required_makes_the_whole_fail(checks: tuple[Check, ...], good: bool) -> None:
    assert doctor.show_checks(checks, io.StringIO()) == good
    assert json.loads(doctor.checks_as_json(checks))["ok"] == good


def test_the_list_has_a_mark_a_sentence_and_what_to_do() -> None:
    out = io.StringIO()
    doctor.show_checks((*CHECKS, BAD), out)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines == [
        ["✓", "good", "All", "is", "well", "[really]."],
        ["–", "optional", "Missing."],
        ["→", "pip", "install", "it"],
        ["✗", "bad", "Broken."],
        ["→", "Repair", "it."],
    ]


def test_a_command_to_copy_stays_on_one_line() -> None:
    out = io.StringIO()
    doctor.show_checks([Check("long", False, "m" * 300, "r" * 300)], out)
    assert len(out.getvalue().splitlines()) == 2


def test_json_holds_every_field() -> None:
    assert json.loads(doctor.checks_as_json([BAD])) == {"ok": False, "checks": [dataclasses.asdict(BAD)]}


def test_pins_are_read_from_a_requirements_file(tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text("# a==1\njax==0.10.2\ngymnasium[mujoco]==1.4.0  # why\nfree>=2\n-e .\n")
    assert doctor.read_pins(path) == {"jax": "0.10.2", "gymnasium": "1.4.0"}


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What the doctor believes to be installed."""
    installed: dict[str, str | None] = {"metaworld": "3.1.1", "mujoco": "3.3.0"}
    monkeypatch.setattr(doctor, "_installed_version", installed.get)
    return installed


@pytest.mark.parametrize(
    ("metaworld", "mujoco", "ok", "fatal"),
    [
        ("3.1.1", "3.3.0", True, False),
        ("3.0.0", "4.0.0", False, True),
        ("3.0.0", "3.17.0", False, True),
        ("3.0.0", "3.16.0", False, False),
        ("3.0.0", "3.3.0", False, False),
        ("3.1.1", "3.16.0", False, False),
        (None, "3.3.0", False, True),
        ("3.1.1", None, False, True),
    ],
)
def test_pairs_of_simulators(
    versions: dict[str, str | None], metaworld: str | None, mujoco: str | None, ok: bool, fatal: bool
) -> None:
    versions.update(metaworld=metaworld, mujoco=mujoco)
    check = doctor.check_simulator_versions()
    assert (check.ok, check.fatal) == (ok, fatal)
    assert bool(check.remedy) != ok


def test_a_package_of_another_version_is_worth_knowing_and_a_missing_one_fatal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pins = doctor.read_pins(doctor.REQUIREMENTS)
    installed: dict[str, str | None] = dict(pins)
    monkeypatch.setattr(doctor, "_installed_version", installed.get)
    assert doctor.check_packages().ok
    installed["jax"] = "0.0.1"
    check = doctor.check_packages()
    assert (check.ok, check.fatal) == (False, False)
    assert f"jax is 0.0.1, not {pins['jax']}" in check.message
    installed["jax"] = None
    assert doctor.check_packages().fatal


def test_in_a_wheel_what_it_declares_must_be_there_in_any_version(
    tmp_path: Path, versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "REQUIREMENTS", tmp_path / "requirements.txt")
    monkeypatch.setattr("importlib.metadata.requires", lambda _: ["jax>=0.10.2", "minari[hdf5]>=0.5.4"])
    versions.update(jax="99", minari=None, mujoco=None)
    check = doctor.check_packages()
    assert check.fatal
    assert check.message == "Missing: minari[hdf5]>=0.5.4."
    assert check.remedy == "pip install 'minari[hdf5]>=0.5.4'"
    # The simulators are no part of the wheel.
    assert not doctor.check_simulator_versions().fatal
    versions.update(minari="0.1")
    assert doctor.check_packages().ok


@pytest.mark.parametrize(("version", "ok"), [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)])
def test_only_some_pythons_have_the_packages(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], ok: bool
) -> None:
    monkeypatch.setattr(sys, "version_info", (*version, 0))
    assert doctor.check_python().ok == ok


def answering(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any] | ProbeError) -> None:
    def probe(code: str, seconds: float = 0.0) -> dict[str, Any]:
        if isinstance(answer, ProbeError):
            raise answer
        return answer

    monkeypatch.setattr(doctor, "run_probe", probe)


def test_jax_devices_are_counted_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, {"version": "1.2", "platform": "gpu", "kinds": ["X100", "X100"], "sum": 14.0})
    check = doctor.check_jax()
    assert check.ok
    assert check.message == "JAX 1.2 computes on 2 × X100 (gpu)."


def test_jax_that_hangs_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, ProbeError("no answer within 120 s"))
    check = doctor.check_jax()
    assert check.fatal
    assert "no answer within 120 s" in check.message
    assert "JAX_PLATFORMS=cpu" in check.remedy


@pytest.mark.parametrize(("check", "fatal"), [(doctor.check_meta_world, True), (doctor.check_video, False)])
def test_what_cannot_be_tried_is_reported(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[], Check], fatal: bool
) -> None:
    answering(monkeypatch, ProbeError("ImportError: no module"))
    found = check()
    assert (found.ok, found.fatal) == (False, fatal)
    assert "ImportError: no module" in found.message


@pytest.mark.parametrize(
    ("backend", "forced", "ok", "says"),
    [
        ("osmesa", None, True, "OSMESA"),
        (None, None, False, "libegl1"),
        (None, "egl", False, "Unset MUJOCO_GL"),
    ],
)
def test_rendering_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, backend: str | None, forced: str | None, ok: bool, says: str
) -> None:
    monkeypatch.setattr("robopref.rendering.rendering_backend", lambda: backend)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    if forced:
        monkeypatch.setenv("MUJOCO_GL", forced)
    check = doctor.check_rendering()
    assert check.ok == ok
    assert says in check.message + check.remedy
    assert not check.fatal


def test_the_real_probes_answer() -> None:
    assert doctor.check_meta_world().ok
    assert doctor.check_jax().ok
    assert doctor.check_video().ok


def test_memory_is_a_plausible_number() -> None:
    assert 2**28 < doctor.memory_bytes() < 2**50


def test_a_missing_extra_says_how_to_get_it(versions: dict[str, str | None]) -> None:
    missing = doctor.check_extra("ray")
    assert (missing.ok, missing.fatal) == (False, False)
    assert "requirements-ray.txt" in missing.remedy
    versions["ray"] = "2.60.0"
    assert doctor.check_extra("ray").ok
