"""What the doctor looks at: whether this installation works, and whether a dataset is fit for training.

Each check is a small function. Those of the installation run everything that may crash or hang (a broken GPU driver, a
simulator) in a process of its own with a time limit. Only the standard library is imported with this module.
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import numpy as np

    from robopref.episodes import EpisodeDataset

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


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: what was looked at.
        ok: nothing is wrong or missing.
        message: one sentence about what was found.
        remedy: what to do about it; empty where nothing need be done.
        required: a failure makes the whole fail; otherwise it is only worth knowing.
    """

    name: str
    ok: bool
    message: str
    remedy: str = ""
    required: bool = True

    @property
    def fatal(self) -> bool:
        """Whether the whole fails because of this."""
        return self.required and not self.ok


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


def dataset_checks(dataset: EpisodeDataset, length: int) -> list[Check]:
    """What in a dataset would spoil training on segments of `length` steps."""
    if length < 1:
        raise ValueError(f"a segment has at least 1 step, not {length}.")
    finite = check_finite(dataset)
    if not finite.ok:
        return [finite, check_ends(dataset), check_lengths(dataset, length)]
    return [
        finite,
        check_action_bounds(dataset),
        check_saturation(dataset),
        check_constant_dimensions(dataset),
        check_normalisation(dataset),
        check_ends(dataset),
        check_lengths(dataset, length),
        check_rewards(dataset),
    ]


def check_finite(dataset: EpisodeDataset) -> Check:
    """Whether every number is finite."""
    import numpy as np

    for name in ("observations", "actions", "rewards"):
        array = getattr(dataset, name)
        wrong = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if wrong.any():
            return Check(
                "finite numbers",
                ok=False,
                message=f"{wrong.sum()} rows of {name} hold NaN or infinity, the first in {_place(dataset, wrong)}.",
                remedy="Leave these episodes out, or collect them again.",
            )
    return Check("finite numbers", True, "No NaN and no infinity.")


def check_action_bounds(dataset: EpisodeDataset) -> Check:
    """Whether all actions lie inside the action space."""
    import numpy as np

    space = dataset.action_space
    outside = _acted(dataset) & ((dataset.actions < space.low) | (dataset.actions > space.high)).any(axis=1)
    if outside.any():
        excess = np.maximum(space.low - dataset.actions, dataset.actions - space.high)[outside].max()
        return Check(
            "action bounds",
            ok=False,
            message=f"{_share(outside, dataset.total_steps)} lie outside the action space, by up to {excess:.3g},"
            f" the first in {_place(dataset, outside)}.",
            remedy="Store actions as the robot executes them: clipped, and in the units of the action space.",
        )
    return Check("action bounds", True, "All actions lie inside the action space.")


def check_saturation(dataset: EpisodeDataset) -> Check:
    """How many actions lie exactly on a bound, where a squashed policy has no finite log-probability."""
    space = dataset.action_space
    at_bound = _acted(dataset) & ((dataset.actions == space.low) | (dataset.actions == space.high)).any(axis=1)
    if at_bound.sum() > 0.2 * dataset.total_steps:
        return Check(
            "saturation",
            ok=False,
            message=f"{_share(at_bound, dataset.total_steps)} have a component exactly on a bound.",
            remedy="A policy squashed by tanh cannot reach a bound: clip actions a little inside, or do not squash.",
            required=False,
        )
    return Check("saturation", True, f"{_share(at_bound, dataset.total_steps)} lie on a bound.", required=False)


def check_constant_dimensions(dataset: EpisodeDataset) -> Check:
    """Which observation dimensions never change."""
    import numpy as np

    constant = np.flatnonzero(np.ptp(dataset.observations, axis=0) == 0)
    total = dataset.observations.shape[1]
    if constant.size == total:
        return Check("constant dimensions", False, "Every observation is the same.", "Record the observations again.")
    if constant.size:
        return Check(
            "constant dimensions",
            ok=False,
            message=f"{constant.size} of {total} observation dimensions never change: {_listed(constant)}.",
            remedy="Harmless if the task has them so; otherwise a sensor was not recorded.",
            required=False,
        )
    return Check("constant dimensions", True, f"All {total} observation dimensions vary.", required=False)


def check_normalisation(dataset: EpisodeDataset) -> Check:
    """Whether subtracting the mean and dividing by the deviation gives useful numbers in float32."""
    import numpy as np

    observations = dataset.observations.astype(np.float64)
    mean, deviation = observations.mean(axis=0), observations.std(axis=0)
    varies = np.ptp(dataset.observations, axis=0) > 0
    # float32 resolves about 1e-7 of a number; below ten times that, what is left after the mean is rounding.
    lost = varies & (deviation < 1e-6 * np.abs(mean))
    if lost.any():
        return Check(
            "normalisation",
            ok=False,
            message=f"Observation dimensions {_listed(np.flatnonzero(lost))} vary less than float32 can resolve.",
            remedy="Subtract the offset before storing them, or leave them out.",
        )
    largest = np.abs(observations - mean).max(axis=0) / np.where(varies, deviation, np.inf)
    far = largest > 50
    if far.any():
        return Check(
            "normalisation",
            ok=False,
            message=f"Observation dimensions {_listed(np.flatnonzero(far))} reach {largest.max():.0f} deviations.",
            remedy="Look for faulty readings, or clip these dimensions: after normalising they dwarf all others.",
            required=False,
        )
    return Check("normalisation", True, f"No observation is further than {largest.max():.0f} deviations from the mean.")


def check_ends(dataset: EpisodeDataset) -> Check:
    """Whether `terminated` and `truncated` say plausible things."""
    import numpy as np

    name = "ends of episodes"
    open_ended = np.flatnonzero(~dataset.terminated & ~dataset.truncated)
    if open_ended.size:
        return Check(
            name,
            ok=False,
            message=f"{open_ended.size} episodes neither terminate nor are truncated: {_listed(open_ended)}.",
            remedy="Set truncated where a recording was stopped, terminated where the task ended by itself.",
        )
    limit = int(dataset.env.get("horizon") or dataset.lengths.max())
    at_limit = dataset.terminated & ~dataset.truncated & (dataset.lengths == limit)
    if at_limit.sum() > 1 and at_limit.sum() > 0.5 * dataset.terminated.sum():
        return Check(
            name,
            ok=False,
            message=f"{at_limit.sum()} of {dataset.terminated.sum()} terminated episodes have exactly {limit} steps,"
            " so a time limit was probably stored as termination.",
            remedy="Store time limits as truncated: values are learned wrongly when a cut-off counts as the end.",
        )
    return Check(name, True, f"{dataset.terminated.sum()} terminated, {dataset.truncated.sum()} truncated.")


def check_lengths(dataset: EpisodeDataset, length: int) -> Check:
    """Whether episodes are long enough for segments of `length` steps."""
    import numpy as np

    short = np.flatnonzero(dataset.lengths < length)
    if short.size == len(dataset):
        return Check(
            "episode lengths",
            ok=False,
            message=f"Every episode is shorter than {length} steps; the longest has {dataset.lengths.max()}.",
            remedy=f"Use segments of at most {dataset.lengths.max()} steps (--length).",
        )
    if short.size:
        return Check(
            "episode lengths",
            ok=False,
            message=f"{short.size} of {len(dataset)} episodes are shorter than {length} steps: {_listed(short)}.",
            remedy="No segment can be drawn from them; shorter segments (--length) would use them too.",
            required=False,
        )
    return Check("episode lengths", True, f"Every episode holds a segment of {length} steps.")


def check_rewards(dataset: EpisodeDataset) -> Check:
    """Whether rewards differ at all, which simulated teachers rely on."""
    import numpy as np

    if np.ptp(dataset.rewards[_acted(dataset)]) == 0:
        return Check(
            "rewards",
            ok=False,
            message="The reward is the same at every step, so a simulated teacher would call every query a tie.",
            remedy="Have people label the queries, or collect with a reward.",
            required=False,
        )
    return Check("rewards", True, "Rewards vary.", required=False)


def show_checks(checks: Iterable[Check], out: TextIO) -> bool:
    """Lists checks as they come in, for people to read; returns whether none is fatal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=out, highlight=False)
    good = True
    for check in checks:
        mark, style = ("✓", "green") if check.ok else ("✗", "bold red") if check.required else ("–", "yellow")
        # Left to the terminal to wrap, so that a command can be copied from the list in one piece.
        console.print(Text.assemble((mark, style), " ", (f"{check.name:<22}", "bold"), check.message), soft_wrap=True)
        if check.remedy:
            console.print(Text(f"  → {check.remedy}", style="cyan"), soft_wrap=True)
        good &= not check.fatal
    return good


def checks_as_json(checks: Iterable[Check]) -> str:
    """The same as JSON: `{"ok": bool, "checks": [...]}`."""
    found = list(checks)
    everything = {"ok": not any(check.fatal for check in found), "checks": [asdict(check) for check in found]}
    return json.dumps(everything, indent=2, ensure_ascii=False)


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


def _acted(dataset: EpisodeDataset) -> np.ndarray:
    """Which rows have an action: all but the last of each episode, [R]."""
    import numpy as np

    acted = np.ones(len(dataset.actions), dtype=bool)
    acted[dataset.offsets[1:] - 1] = False
    return acted


def _place(dataset: EpisodeDataset, rows: np.ndarray) -> str:
    row = int(rows.argmax())
    episode = int(dataset.offsets.searchsorted(row, side="right")) - 1
    return f"episode {episode}, step {row - int(dataset.offsets[episode])}"


def _share(steps: np.ndarray, total: int) -> str:
    return f"{int(steps.sum())} of {total} actions ({steps.sum() / total:.1%})"


def _listed(numbers: np.ndarray, most: int = 8) -> str:
    text = ", ".join(str(number) for number in numbers[:most].tolist())
    return text if len(numbers) <= most else f"{text}, …"
