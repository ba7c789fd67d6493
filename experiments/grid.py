"""A grid of resumable jobs: processes on this machine or tasks on a Ray cluster, under one progress display.

A job is a function with JSON-able arguments that runs in another process, in a folder of its own, and returns a
JSON-able value. Its `result.json` is the mark that it is done: running the same grid again runs only what is missing. A
job that fails or is killed is reported; jobs that do not need it go on.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console

from robopref.configs import digest, to_json
from robopref.files import read_json, write_json
from robopref.processes import end_with_parent
from robopref.progress import ProgressCallback, progress_columns

LauncherName = Literal["local", "ray"]

# One core per job: two one-core JAX processes do 40% more than one on two cores, and the arithmetic (so the bits of the
# result) is then the same under every launcher.
JOB_ENVIRONMENT = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


JOBS_PER_PROCESS = 16
"""A process keeps every program that XLA compiled in it, and what its heap once needed: 70 jobs can take 12 GB."""


@dataclass(frozen=True)
class JobContext:
    """What a running job is given: its folder, the values and folders of the jobs it needs, and its progress."""

    folder: Path
    values: Mapping[str, Any]
    folders: Mapping[str, Path]
    progress: ProgressCallback


@dataclass(frozen=True)
class Job:
    """One cell of the grid.

    Attributes:
        name: unique; also its folder below the run folder, such as `train/cpl/door-open-v3/0`.
        function: defined at a module's top level, so that another process can find it; called as
            `function(context, **arguments)`.
        arguments: JSON-able by `robopref.configs.to_json`; a job runs again if they change.
        needs: names of the jobs that must be done before.
        cores: processor cores that it keeps busy; taken as all there are, if it asks for more.
    """

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    cores: int = 1


@dataclass(frozen=True)
class GridOutcome:
    """The value of every job that is done, and for the others one sentence on what went wrong.

    `seconds` is what all the jobs that are done took together, whenever they ran.
    """

    values: dict[str, Any]
    failures: dict[str, str]
    seconds: float


def run_grid(
    jobs: Sequence[Job],
    folder: Path,
    *,
    launcher: LauncherName = "local",
    cores: int | None = None,
    console: Console | None = None,
) -> GridOutcome:
    """Runs every job that is not done yet, with one progress display over all of them.

    Args:
        jobs: in an order in which none needs a later one.
        folder: the run folder; it is made if it is not there.
        launcher: processes on this machine, one per core, or tasks on a Ray cluster (the one at RAY_ADDRESS, or a local
            one) that sees this folder under the same path.
        cores: how many to use; all that this process may run on, or that the cluster has, by default.
    """
    console = console or Console(stderr=True)
    folder.mkdir(parents=True, exist_ok=True)
    prints = _fingerprints(jobs)
    values = finished_values(jobs, folder)
    if values:
        console.print(f"{len(values)} of {len(jobs)} jobs were done before; the others follow")
    failures: dict[str, str] = {}
    waiting = {job.name: job for job in jobs if job.name not in values}
    running: dict[str, Job] = {}
    with _launcher(launcher, cores) as pool, _Display(len(jobs), len(values), folder, console) as display:
        while waiting or running:
            for job in list(waiting.values()):
                lost = next((need for need in job.needs if need in failures), None)
                if lost is not None:
                    failures[job.name] = f"needs {lost}, which failed"
                    del waiting[job.name]
                elif all(need in values for need in job.needs):
                    busy = sum(min(other.cores, pool.cores) for other in running.values())
                    if busy + min(job.cores, pool.cores) <= pool.cores:
                        running[job.name] = waiting.pop(job.name)
                        _prepare(folder / job.name, prints[job.name])
                        known = {need: values[need] for need in job.needs}
                        pool.start(job, _Task(job, folder, known, prints[job.name]))
                        display.start(job.name)
            for name, error in pool.finished(0.2):
                job = running.pop(name)
                if error is None:
                    values[name] = _done(job, folder, prints[name])
                else:
                    failures[name] = f"{error} (its output is in {folder / name / 'log.txt'})"
                display.finish(name, failures.get(name))
            display.refresh()
    seconds = sum(read_json(folder / name / "result.json")["seconds"] for name in values)
    return GridOutcome(values, failures, seconds)


def finished_values(jobs: Sequence[Job], folder: Path) -> dict[str, Any]:
    """The values of those jobs that are done in a run folder, with just these arguments."""
    prints = _fingerprints(jobs)
    return {job.name: value for job in jobs if (value := _done(job, folder, prints[job.name])) is not None}


def report_failures(outcome: GridOutcome, console: Console) -> None:
    """Says which jobs failed and how to run them again."""
    for name, reason in outcome.failures.items():
        console.print(f"[bold red]failed[/] {name}: {reason}", highlight=False, soft_wrap=True)
    if outcome.failures:
        total = len(outcome.failures) + len(outcome.values)
        console.print(f"{len(outcome.failures)} of {total} jobs are missing; the same command runs just those again")


@dataclass(frozen=True)
class _Task:
    """Everything that another process needs to run a job."""

    job: Job
    run_folder: Path
    values: dict[str, Any]
    fingerprint: str

    def __call__(self) -> None:
        folder = self.run_folder / self.job.name
        context = JobContext(
            folder=folder,
            values=self.values,
            folders={need: self.run_folder / need for need in self.job.needs},
            progress=_ProgressFile(folder / "progress.json"),
        )
        with _output_to(folder / "log.txt"):
            started = time.monotonic()
            try:
                value = self.job.function(context, **self.job.arguments)
            except BaseException:
                traceback.print_exc()
                raise
            seconds = round(time.monotonic() - started, 2)
        write_json(
            folder / "result.json", {"fingerprint": self.fingerprint, "seconds": seconds, "value": to_json(value)}
        )


class _ProgressFile:
    """Progress of a job, left in a file for whoever shows it; written a few times a second at most."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = 0.0

    def __call__(self, completed: int, total: int) -> None:
        if completed >= total or time.monotonic() - self._written > 0.25:
            write_json(self._path, {"completed": completed, "total": total})
            self._written = time.monotonic()


class _Launcher(Protocol):
    cores: int

    def start(self, job: Job, task: _Task) -> None: ...
    def finished(self, timeout: float) -> list[tuple[str, str | None]]:
        """Jobs that have ended since the last call, each with what went wrong, if anything did."""
        ...

    def close(self) -> None: ...


class _LocalLauncher:
    """One worker process per core, each pinned to its core and used for one job after another, but not for ever.

    A worker is an executor of its own: if its process is killed, only the job in it is lost.
    """

    def __init__(self, cores: int | None) -> None:
        self._free = sorted(os.sched_getaffinity(0))[:cores]
        self.cores = len(self._free)
        self._executors: dict[int, ProcessPoolExecutor] = {}
        self._jobs_done: dict[int, int] = {}
        self._running: dict[Future[None], tuple[str, list[int]]] = {}

    def start(self, job: Job, task: _Task) -> None:
        count = min(job.cores, len(self._free))
        taken, self._free = self._free[:count], self._free[count:]
        try:
            future = self._worker(taken[0]).submit(_run_pinned, task, taken)
        except BrokenProcessPool:
            # Its process was killed while it had nothing to do: a new one takes its place.
            self._executors.pop(taken[0]).shutdown()
            future = self._worker(taken[0]).submit(_run_pinned, task, taken)
        self._running[future] = (job.name, taken)

    def finished(self, timeout: float) -> list[tuple[str, str | None]]:
        ended = wait(self._running, timeout, FIRST_COMPLETED).done
        outcomes: list[tuple[str, str | None]] = []
        for future in ended:
            name, taken = self._running.pop(future)
            self._free = sorted(self._free + taken)
            error = future.exception()
            self._jobs_done[taken[0]] = self._jobs_done.get(taken[0], 0) + 1
            if isinstance(error, BrokenProcessPool) or self._jobs_done[taken[0]] >= JOBS_PER_PROCESS:
                self._executors.pop(taken[0]).shutdown()
                self._jobs_done[taken[0]] = 0
            if isinstance(error, BrokenProcessPool):
                outcomes.append((name, "its process was killed or crashed"))
            else:
                outcomes.append((name, None if error is None else _sentence(error)))
        return outcomes

    def _worker(self, core: int) -> ProcessPoolExecutor:
        if core not in self._executors:
            self._executors[core] = ProcessPoolExecutor(
                1, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent
            )
        return self._executors[core]

    def close(self) -> None:
        for executor in self._executors.values():
            # Jobs still running were interrupted by the user; they are resumable, so they need not be waited for.
            for process in list((executor._processes or {}).values()) if self._running else []:
                process.terminate()
            executor.shutdown(cancel_futures=True)


class _RayLauncher:
    """The same jobs as tasks of a Ray cluster."""

    def __init__(self, cores: int | None) -> None:
        try:
            import ray
        except ImportError as error:
            raise RuntimeError(
                "the Ray launcher needs Ray: pip install -r requirements-ray.txt, or use --launcher local"
            ) from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray hides the accelerators of a task that asks for none; jobs here share whatever device the node has.
        variables = JOB_ENVIRONMENT | {
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "MUJOCO_GL": os.environ.get("MUJOCO_GL", ""),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        local: dict[str, Any] = {}
        if "RAY_ADDRESS" not in os.environ:
            local = {"num_cpus": cores or len(os.sched_getaffinity(0)), "include_dashboard": False}
        ray.init(runtime_env={"env_vars": variables}, log_to_driver=False, logging_level=logging.ERROR, **local)
        self._ray = ray
        self.cores = cores or int(ray.cluster_resources()["CPU"])
        self._running: dict[Any, str] = {}

    def start(self, job: Job, task: _Task) -> None:
        remote = self._ray.remote(num_cpus=min(job.cores, self.cores), max_retries=0)(_run)
        self._running[remote.remote(task)] = job.name

    def finished(self, timeout: float) -> list[tuple[str, str | None]]:
        if not self._running:
            return []
        ended, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout)
        outcomes: list[tuple[str, str | None]] = []
        for reference in ended:
            name = self._running.pop(reference)
            try:
                self._ray.get(reference)
                outcomes.append((name, None))
            except self._ray.exceptions.RayTaskError as error:
                outcomes.append((name, _sentence(error.cause)))
            except self._ray.exceptions.RayError:
                outcomes.append((name, "its process was killed or crashed"))
        return outcomes

    def close(self) -> None:
        self._ray.shutdown()


@contextlib.contextmanager
def _launcher(name: LauncherName, cores: int | None) -> Iterator[_Launcher]:
    before = {key: os.environ.get(key) for key in JOB_ENVIRONMENT}
    os.environ.update(JOB_ENVIRONMENT)
    try:
        launcher: _Launcher = _RayLauncher(cores) if name == "ray" else _LocalLauncher(cores)
        try:
            yield launcher
        finally:
            launcher.close()
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


class _Display:
    """One bar for the grid and one for each running job; a line for each job that ends."""

    def __init__(self, total: int, done: int, folder: Path, console: Console) -> None:
        self._bars = progress_columns(console)
        self._grid = self._bars.add_task("all jobs", total=total, completed=done)
        self._folder = folder
        self._tasks: dict[str, Any] = {}
        self._started: dict[str, float] = {}

    def __enter__(self) -> _Display:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, name: str) -> None:
        self._tasks[name] = self._bars.add_task(name, total=None)
        self._started[name] = time.monotonic()

    def refresh(self) -> None:
        for name, task in self._tasks.items():
            # A job may write this file anew while it is read here; the next look will do.
            with contextlib.suppress(OSError, ValueError):
                self._bars.update(task, **read_json(self._folder / name / "progress.json"))

    def finish(self, name: str, failure: str | None) -> None:
        self._bars.remove_task(self._tasks.pop(name))
        seconds = time.monotonic() - self._started.pop(name)
        word = "[red]failed[/]" if failure else "[green]done[/]  "
        self._bars.console.print(f"{word} {name} [dim]{seconds:.0f} s[/]", highlight=False)
        self._bars.advance(self._grid)


def _run(task: _Task) -> None:
    task()


def _run_pinned(task: _Task, cores: list[int]) -> None:
    os.sched_setaffinity(0, cores)
    task()


def _fingerprints(jobs: Sequence[Job]) -> dict[str, str]:
    """What a job's result depends on: its function, its arguments, and the same of all that it needs."""
    prints: dict[str, str] = {}
    for job in jobs:
        if job.name in prints:
            raise ValueError(f"two jobs are called {job.name}")
        function = f"{_module_of(job.function)}.{job.function.__qualname__}"
        for need in job.needs:
            if need not in prints:
                raise ValueError(f"{job.name} needs {need}, which is not among the jobs before it")
        needs = {need: prints[need] for need in job.needs}
        prints[job.name] = digest({"function": function, "arguments": dict(job.arguments), "needs": needs})
    return prints


def _module_of(function: Callable[..., Any]) -> str:
    """The name by which others import the module that is run as a program: what was done as either is done."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if function.__module__ == "__main__" and spec is not None else function.__module__


def _done(job: Job, folder: Path, fingerprint: str) -> Any:
    """The value of a job that is done, or None (a job without a value has an empty one)."""
    path = folder / job.name / "result.json"
    if not path.exists():
        return None
    result = read_json(path)
    if result["fingerprint"] != fingerprint:
        return None
    return {} if result["value"] is None else result["value"]


def _prepare(folder: Path, fingerprint: str) -> None:
    """Empties a job's folder if what is in it was made with other arguments; a resumable job keeps what it has."""
    mark = folder / "job.json"
    if folder.exists() and not (mark.exists() and read_json(mark)["fingerprint"] == fingerprint):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mark, {"fingerprint": fingerprint})


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends what this process prints, by Python or by C, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in enumerate(saved, start=1):
            os.dup2(copy, descriptor)
            os.close(copy)


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
