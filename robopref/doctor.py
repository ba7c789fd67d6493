"""What the doctor looks at: whether this installation works.

Each check is a small function. Whatever may crash or hang (a broken GPU driver, a simulator) runs in a process of its
own with a time limit. Only the standard library is imported with this module.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from robopref.checks import Check

OLDEST_PYTHON = (3, 11)
FIRST_PYTHON_TOO_NEW = (3, 14)
SMALL_MEMORY_GIB = 4.0
SMALL_DISK_GIB = 3.0
PROBE_SECONDS = 120.0
REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"
"""Only a checkout has it; the wheel holds the library alone."""

EXTRAS = {
    "ray": "sweeps over many machines; pip install -r requirements-ray.txt",
}
"""Optional packages: what each is for, and how to get it."""

_JAX_PROBE = """
import json, jax
print(json.dumps({"version": jax.__version__, "platform": jax.default_backend(),
                  "kinds": [device.device_kind for device in jax.devices()],
                  "sum": float(jax.jit(lambda x: (x * x).sum())(jax.numpy.arange(4.0)))}))
"""

_META_WORLD_PROBE = """
import json, numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as tasks
env = tasks["reach-v3-goal-observable"](seed=0)
env.reset()
observation, reward, *_ = env.step(np.zeros(4, np.float32))
print(json.dumps({"finite": bool(np.isfinite(observation).all() and np.isfinite(reward))}))
"""

_ENCODER_PROBE = """
import json, av
print(json.dumps({"version": av.__version__, "h264": "libx264" in av.codecs_available}))
"""


class ProbeError(Exception):
    """A process that was started to try something failed; says why, as the rest of a sentence."""


def installation_checks() -> dict[str, Callable[[], Check]]:
    """The checks of an installation by name, in the order in which they are shown."""
    extras = {name: _bound_extra(name) for name in EXTRAS}
    return {
        "Python": check_python,
        "packages": check_packages,
        "simulator versions": check_simulator_versions,
        "JAX": check_jax,
        "Meta-World": check_meta_world,
        "rendering": check_rendering,
        "video": check_video,
        "processor and memory": check_memory,
        "disk": check_disk,
        **extras,
    }


def run_checks(checks: dict[str, Callable[[], Check]]) -> Iterator[Check]:
    """What each check found, in order; one that raises is reported as failed, and the others go on."""
    with ThreadPoolExecutor(max_workers=2) as threads:
        yield from threads.map(_guarded, checks.keys(), checks.values())


def check_python() -> Check:
    """Whether the pinned packages exist for this Python."""
    version = sys.version.split()[0]
    if OLDEST_PYTHON <= sys.version_info[:2] < FIRST_PYTHON_TOO_NEW:
        return Check("Python", True, f"Python {version} at {sys.executable}.")
    return Check(
        "Python",
        False,
        f"Python {version} is not one that the packages are made for.",
        "Use Python 3.11, 3.12 or 3.13.",
    )


def check_packages() -> Check:
    """Whether what is installed is what requirements.txt pins."""
    if not _is_checkout():
        return _check_declared()
    pins = read_pins(REQUIREMENTS)
    found = {name: _installed_version(name) for name in pins}
    wrong = [f"{name} is {found[name] or 'missing'}, not {pin}" for name, pin in pins.items() if found[name] != pin]
    if wrong:
        return Check(
            "packages",
            ok=False,
            message=f"{len(wrong)} of {len(pins)} differ from requirements.txt: {'; '.join(wrong)}.",
            remedy="pip install -r requirements.txt -c constraints.txt",
            required=any(version is None for version in found.values()),
        )
    return Check("packages", True, f"All {len(pins)} packages are exactly those of requirements.txt.")


def check_simulator_versions() -> Check:
    """Whether the installed metaworld and mujoco are a pair that works."""
    name = "simulator versions"
    fix = "make clean install" if _is_checkout() else "in a new environment, pip install metaworld==3.1.1 mujoco==3.3.0"
    metaworld, mujoco = _installed_version("metaworld"), _installed_version("mujoco")
    if mujoco is None or metaworld is None:
        missing = " and ".join(each for each in ("mujoco", "metaworld") if _installed_version(each) is None)
        return Check(name, False, f"{missing} not installed; Meta-World tasks need both.", fix, required=_is_checkout())
    if metaworld == "3.0.0" and _release(mujoco) >= (3, 17):
        return Check(name, False, f"With mujoco {mujoco}, no task of metaworld 3.0.0 can be made.", fix)
    if mujoco != "3.3.0":
        return Check(
            name,
            ok=False,
            message=f"mujoco is {mujoco}: contact-rich episodes differ from those on 3.3.0, which is pinned.",
            remedy=fix,
            required=False,
        )
    if metaworld != "3.1.1":
        return Check(
            name,
            False,
            f"metaworld is {metaworld}; some of its rewards differ from those of 3.1.1.",
            fix,
            required=False,
        )
    return Check(name, True, f"metaworld {metaworld} with mujoco {mujoco}, the pair that is known to work.")


def check_jax() -> Check:
    """Which devices JAX computes on, and whether it uses the GPU if there is one."""
    if _installed_version("jax") is None:
        return Check("JAX", False, "JAX is not installed.", "See the packages above.")
    try:
        found = run_probe(_JAX_PROBE)
    except ProbeError as error:
        return Check(
            "JAX",
            ok=False,
            message=f"JAX cannot compute: {error}.",
            remedy="Try JAX_PLATFORMS=cpu; if that works, the GPU driver or the CUDA packages of JAX are at fault.",
        )
    kinds = found["kinds"]
    devices = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    message = f"JAX {found['version']} computes on {devices} ({found['platform']})."
    if found["platform"] == "cpu" and Path("/proc/driver/nvidia/version").exists():
        return Check(
            "JAX",
            ok=False,
            message=f"{message[:-1]}, although this machine has an NVIDIA GPU.",
            remedy=f'pip install "jax[cuda12]=={found["version"]}"',
            required=False,
        )
    return Check("JAX", found["sum"] == 14.0, message)


def check_meta_world() -> Check:
    """Whether a Meta-World task can really be made and stepped."""
    try:
        found = run_probe(_META_WORLD_PROBE)
    except ProbeError as error:
        remedy = "See the simulator versions above."
        return Check("Meta-World", False, f"A step of reach-v3 fails: {error}.", remedy, required=_is_checkout())
    if not found["finite"]:
        return Check("Meta-World", False, "A step of reach-v3 gives NaN.", "make clean install")
    return Check("Meta-World", True, "A task was made and stepped.")


def check_rendering() -> Check:
    """Whether images can be drawn without a display."""
    from robopref.rendering import VARIABLE, no_backend_message, rendering_backend

    backend = rendering_backend()
    if backend is not None:
        return Check("rendering", True, f"Images can be drawn without a display, through {backend.upper()}.")
    forced = os.environ.get(VARIABLE)
    return Check(
        "rendering",
        ok=False,
        message=f"{VARIABLE}={forced} cannot draw." if forced else "Nothing can be drawn, so there will be no videos.",
        remedy=f"Unset {VARIABLE}." if forced else no_backend_message(),
        required=False,
    )


def check_video() -> Check:
    """Whether videos that browsers play can be written."""
    try:
        found = run_probe(_ENCODER_PROBE)
    except ProbeError as error:
        return Check("video", False, f"PyAV cannot be used: {error}.", "pip install av", required=False)
    if found["h264"]:
        return Check("video", True, f"Videos can be written as H.264 (PyAV {found['version']}).")
    return Check(
        "video",
        ok=False,
        message=f"PyAV {found['version']} was built without the H.264 encoder libx264.",
        remedy="pip install --force-reinstall --only-binary av av",
        required=False,
    )


def check_memory() -> Check:
    """How many cores and how much memory this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gibibytes = memory_bytes() / 2**30
    message = f"{cores} core{'s' * (cores != 1)} and {gibibytes:.1f} GiB of memory."
    remedy = "Use fewer processes (--processes 1) and smaller batches."
    enough = gibibytes >= SMALL_MEMORY_GIB
    return Check("processor and memory", enough, message, "" if enough else remedy, required=False)


def check_disk() -> Check:
    """How much may still be written below the current folder."""
    gibibytes = shutil.disk_usage(Path.cwd()).free / 2**30
    enough = gibibytes >= SMALL_DISK_GIB
    remedy = "" if enough else "Free some space, or work in another folder."
    return Check("disk", enough, f"{gibibytes:.1f} GiB free in {Path.cwd()}.", remedy, required=False)


def check_extra(name: str) -> Check:
    """Whether an optional package is installed."""
    purpose, remedy = EXTRAS[name].split("; ")
    version = _installed_version(name)
    if version is None:
        return Check(name, False, f"Not installed; it is for {purpose}.", remedy, required=False)
    return Check(name, True, f"{name} {version}, for {purpose}.", required=False)


def read_pins(requirements: Path) -> dict[str, str]:
    """Package name to exact version, for the lines of a requirements file that have one."""
    pin = re.compile(r"^\s*([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;#]+)", re.MULTILINE)
    return dict(pin.findall(requirements.read_text(encoding="utf-8")))


def memory_bytes() -> int:
    """What this process may use: the machine's memory, or less where a container allows less."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
            sizes.append(int(text))
    return min(sizes)


def run_probe(code: str, seconds: float = PROBE_SECONDS) -> dict[str, Any]:
    """Runs `code`, which prints one JSON object as its last line, in a process of its own.

    Raises:
        ProbeError: it failed, or was not ready in time.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, complaints = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        # A process stuck inside a broken driver cannot even be killed; waiting for it would hang as well.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=5)
        raise ProbeError(f"no answer within {seconds:.0f} s") from None
    if process.returncode != 0:
        lines = complaints.strip().splitlines()
        raise ProbeError(lines[-1].rstrip(".") if lines else f"its process ended with status {process.returncode}")
    found: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return found


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        return Check(name, False, f"The check itself failed: {type(error).__name__}: {error}.", required=False)


def _bound_extra(name: str) -> Callable[[], Check]:
    return lambda: check_extra(name)


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_checkout() -> bool:
    return REQUIREMENTS.is_file()


def _check_declared() -> Check:
    """Whether what the wheel declares is installed, in whatever version."""
    missing = []
    for requirement in importlib.metadata.requires("robopref") or ():
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name and _installed_version(name.group()) is None:
            missing.append(requirement)
    if missing:
        return Check("packages", False, f"Missing: {', '.join(missing)}.", shlex.join(["pip", "install", *missing]))
    return Check("packages", True, "Everything that the wheel declares is installed.")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
