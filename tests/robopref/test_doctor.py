from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robopref import doctor
from robopref.doctor import Check, ProbeError


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
