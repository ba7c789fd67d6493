from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from rich.console import Console

from experiments.grid import GridOutcome, Job, JobContext, report_failures, run_grid
from robopref.rollouts import RolloutWorkers

ROOT = Path(__file__).resolve().parents[2]
CORES = len(os.sched_getaffinity(0))


def note(runs: str, line: str) -> None:
    with open(runs, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def add(context: JobContext, *, runs: str, number: int = 0) -> dict[str, Any]:
    """Adds its number to those of the jobs that it needs; what it was given is in its value too."""
    note(runs, context.folder.name)
    for need, folder in context.folders.items():
        assert json.loads((folder / "sum.json").read_text()) == context.values[need]["sum"]
    total = number + sum(value["sum"] for value in context.values.values())
    (context.folder / "sum.json").write_text(json.dumps(total))
    context.progress(1, 1)
    return {"sum": total, "needs": sorted(context.values)}


def fail_at_first(context: JobContext, *, runs: str) -> str:
    note(runs, context.folder.name)
    if not (context.folder / "again").exists():
        (context.folder / "again").touch()
        raise LookupError("the well is dry\nand this line is for the log")
    return "wet"


def hang_at_first(context: JobContext, *, runs: str, pid: str) -> str:
    """Leaves its process id and hangs, except when it has been here before."""
    note(runs, context.folder.name)
    if not Path(pid).exists():
        leave_pid(pid)
        time.sleep(600)
    return "went on"


def leave_pid(path: str) -> None:
    temporary = Path(f"{path}.new")
    temporary.write_text(str(os.getpid()))
    temporary.rename(path)


class Sleeping(gymnasium.Env[Any, Any]):
    """Leaves the id of its process when it is reset, and hangs."""

    def __init__(self, pid: str) -> None:
        self._pid = pid

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        leave_pid(self._pid)
        time.sleep(600)
        raise AssertionError("nobody interrupted this")


class Still:
    def start(self, seeds: np.ndarray) -> None: ...


def hang_with_a_helper(context: JobContext, *, runs: str, pid: str) -> None:
    """Hangs while a process of its own steps an environment; the id at `pid` is that process's."""
    leave_pid(f"{pid}.job")
    with RolloutWorkers(functools.partial(Sleeping, pid), processes=1, lanes=1) as workers:
        workers.run(Still(), [0])  # type: ignore[arg-type]


def speak(context: JobContext) -> None:
    print("from Python")
    print("from Python, as an error", file=sys.stderr)
    os.system("echo from another program")


def my_cores(context: JobContext) -> list[int]:
    return sorted(os.sched_getaffinity(0))


def meet(context: JobContext, *, other: str) -> bool:
    """Waits until the other job is running too, which can only be if both have a process."""
    (context.folder / "here").touch()
    while not (context.folder.parent / other / "here").exists():
        time.sleep(0.01)
    return True


def stay_alone(context: JobContext, *, place: str) -> bool:
    """Fails if another such job is in the same place at the same time."""
    Path(place).touch(exist_ok=False)
    time.sleep(0.05)
    Path(place).unlink()
    return True


def learn(context: JobContext, *, seed: int) -> str:
    """Trains a small agent, whose checkpoint stays in the folder."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from agents.bc import BCAgent, BCConfig
    from robopref.datasets import TransitionDataset
    from robopref.training import fit

    rng = np.random.default_rng(seed)
    steps = TransitionDataset(
        observations=jnp.asarray(rng.normal(size=(301, 39)), jnp.float32),
        actions=jnp.asarray(rng.uniform(-1, 1, size=(301, 4)), jnp.float32),
        rewards=jnp.zeros(301),
        terminated=jnp.zeros(301, bool),
        rows=jnp.arange(300),
    )
    agent = BCAgent.create(BCConfig(hidden_dims=(64, 64)), steps.take(jnp.arange(2)), jax.random.key(seed))
    fit(agent, steps, jax.random.key(seed + 1), num_updates=30, batch_size=32, log_every=10, folder=context.folder)
    return os.environ["XLA_FLAGS"]


def quietly(jobs: Sequence[Job], folder: Path, **options: Any) -> GridOutcome:
    return run_grid(jobs, folder, console=Console(file=io.StringIO()), **options)


class Grid:
    """A run folder, and a file with one line per time that a job ran."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "run"
        self.pid = place / "pid"
        self._runs = place / "runs.txt"

    def job(self, name: str, needs: tuple[str, ...] = (), function: Callable[..., Any] = add, **more: Any) -> Job:
        return Job(name, function, {"runs": str(self._runs), **more}, needs)

    def run(self, jobs: Sequence[Job], **options: Any) -> tuple[GridOutcome, list[str]]:
        """The outcome, and the names of the jobs that ran, in their order."""
        self._runs.write_text("")
        outcome = quietly(jobs, self.folder, **options)
        return outcome, self._runs.read_text().split()


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return Grid(tmp_path)


@contextlib.contextmanager
def killing(pid: Path, number: signal.Signals = signal.SIGKILL) -> Iterator[None]:
    """Meanwhile, sends a signal to the process that leaves its id at `pid`."""
    stop = threading.Event()

    def kill_it() -> None:
        while not stop.wait(0.01):
            if pid.exists():
                os.kill(int(pid.read_text()), number)
                return

    thread = threading.Thread(target=kill_it)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def four(grid: Grid, b: int = 10) -> list[Job]:
    """`d` needs `b` and `c`, which need `a`; `e` stands alone."""
    return [
        grid.job("a", number=1),
        grid.job("b", ("a",), number=b),
        grid.job("c", ("a",), number=100),
        grid.job("d", ("b", "c"), number=1000),
        grid.job("e", number=5),
    ]


def process_id(context: JobContext) -> int:
    return os.getpid()


def test_a_process_does_so_many_jobs_and_then_makes_room_for_a_new_one(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.grid.JOBS_PER_PROCESS", 2)
    outcome = quietly([Job(f"job/{i}", process_id, {}) for i in range(5)], grid.folder, cores=1)
    assert outcome.failures == {}
    numbers = [outcome.values[f"job/{i}"] for i in range(5)]
    assert numbers[0] == numbers[1] != numbers[2] == numbers[3] != numbers[4]


def test_values_reach_dependants_in_order_and_nothing_runs_twice(grid: Grid) -> None:
    outcome, ran = grid.run(four(grid))
    assert outcome.failures == {}
    assert {name: value["sum"] for name, value in outcome.values.items()} == {
        "a": 1,
        "b": 11,
        "c": 101,
        "d": 1112,
        "e": 5,
    }
    assert outcome.values["d"]["needs"] == ["b", "c"]
    assert sorted(ran) == ["a", "b", "c", "d", "e"]
    assert ran.index("a") < min(ran.index("b"), ran.index("c"))
    assert ran.index("d") > max(ran.index("b"), ran.index("c"))
    took = [json.loads((grid.folder / name / "result.json").read_text())["seconds"] for name in "abcde"]
    assert outcome.seconds == pytest.approx(sum(took))
    again, ran = grid.run(four(grid))
    assert (again.values, again.failures, ran) == (outcome.values, {}, [])
    assert again.seconds == pytest.approx(sum(took))
    assert json.loads((grid.folder / "d" / "progress.json").read_text()) == {"completed": 1, "total": 1}

    changed, ran = grid.run(four(grid, b=20))
    assert sorted(ran) == ["b", "d"]
    assert [changed.values[name]["sum"] for name in "abcde"] == [1, 21, 101, 1122, 5]
    narrowed, ran = grid.run(four(grid, b=20)[:2])
    assert (sorted(narrowed.values), ran) == (["a", "b"], [])
    moved, ran = grid.run([*four(grid, b=20)[:4], grid.job("e", function=fail_at_first)])
    assert (ran, moved.failures.keys()) == (["e"], {"e"})


def test_a_job_that_raises_is_reported_and_only_it_and_its_dependants_are_missing(grid: Grid) -> None:
    jobs = [
        grid.job("bad", function=fail_at_first),
        grid.job("good", number=1),
        Job("child", my_cores, needs=("bad",)),
        Job("grandchild", my_cores, needs=("good", "child")),
        grid.job("sibling", ("good",), number=2),
    ]
    outcome, ran = grid.run(jobs)
    assert sorted(ran) == ["bad", "good", "sibling"]
    assert sorted(outcome.values) == ["good", "sibling"]
    log = grid.folder / "bad" / "log.txt"
    assert outcome.failures["bad"] == f"LookupError: the well is dry (its output is in {log})"
    assert outcome.failures["child"] == "needs bad, which failed"
    assert outcome.failures["grandchild"] == "needs child, which failed"
    assert "Traceback" in log.read_text()
    assert "this line is for the log" in log.read_text()

    said = io.StringIO()
    report_failures(outcome, Console(file=said, width=300))
    assert "failed bad: LookupError: the well is dry" in said.getvalue()
    assert "3 of 5 jobs are missing; the same command runs just those again" in said.getvalue()
    report_failures(GridOutcome({"good": 1}, {}, seconds=0.0), Console(file=(nothing := io.StringIO())))
    assert nothing.getvalue() == ""

    outcome, ran = grid.run(jobs)
    assert ran == ["bad"]
    assert outcome.failures == {}
    assert outcome.values["bad"] == "wet"
    assert sorted(outcome.values) == ["bad", "child", "good", "grandchild", "sibling"]


def test_a_job_killed_by_hand_is_reported_and_the_others_finish(grid: Grid) -> None:
    jobs = [
        grid.job("first", number=1),
        grid.job("victim", function=hang_at_first, pid=str(grid.pid)),
        *(grid.job(f"other{index}", ("first",), number=index) for index in range(4)),
        Job("heir", my_cores, needs=("victim",)),
    ]
    with killing(grid.pid):
        outcome, ran = grid.run(jobs)
    assert sorted(ran) == ["first", "other0", "other1", "other2", "other3", "victim"]
    assert outcome.failures == {
        "victim": f"its process was killed or crashed (its output is in {grid.folder / 'victim' / 'log.txt'})",
        "heir": "needs victim, which failed",
    }
    assert [outcome.values[f"other{index}"]["sum"] for index in range(4)] == [1, 2, 3, 4]
    outcome, ran = grid.run(jobs)
    assert ran == ["victim"]
    assert outcome.failures == {}
    assert outcome.values["victim"] == "went on"
    assert len(outcome.values) == 7


def test_what_a_job_prints_goes_to_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        # A job without a value is done too, and not run again.
        assert quietly([Job("train/speaker", speak)], tmp_path).values == {"train/speaker": {}}
    lines = (tmp_path / "train/speaker" / "log.txt").read_text().splitlines()
    assert sorted(lines) == ["from Python", "from Python, as an error", "from another program"]
    printed = capfd.readouterr()
    assert "from" not in printed.out + printed.err


def test_a_job_that_asks_for_too_many_cores_gets_all(tmp_path: Path) -> None:
    jobs = [Job("all", my_cores, cores=CORES + 97), Job("one", my_cores)]
    outcome = quietly(jobs, tmp_path)
    assert outcome.values["all"] == sorted(os.sched_getaffinity(0))
    assert len(outcome.values["one"]) == 1


def test_no_more_cores_are_used_than_were_allowed(tmp_path: Path) -> None:
    jobs = [Job(f"job{index}", stay_alone, {"place": str(tmp_path / "place")}) for index in range(4)]
    assert quietly([*jobs, Job("greedy", my_cores, cores=9)], tmp_path / "run", cores=1).failures == {}
    greedy = quietly([Job("greedy", my_cores, cores=9)], tmp_path / "run", cores=1).values["greedy"]
    assert greedy == sorted(os.sched_getaffinity(0))[:1]


@pytest.mark.skipif(CORES < 2, reason="this machine has a single core")
def test_jobs_run_at_the_same_time_on_different_cores(tmp_path: Path) -> None:
    jobs = [Job("one", meet, {"other": "two"}), Job("two", meet, {"other": "one"})]
    assert quietly(jobs, tmp_path / "met").values == {"one": True, "two": True}


def test_more_cores_than_this_machine_has_are_taken_as_all(tmp_path: Path) -> None:
    jobs = [Job(f"job{index}", my_cores) for index in range(CORES + 3)]
    outcome = quietly(jobs, tmp_path, cores=CORES + 2)
    assert outcome.failures == {}
    assert all(len(pinned) == 1 for pinned in outcome.values.values())


def test_two_jobs_of_one_name_are_refused(grid: Grid) -> None:
    with pytest.raises(ValueError, match="two jobs are called a"):
        grid.run([grid.job("a"), grid.job("a")])


def test_a_job_that_needs_an_unknown_or_a_later_one_is_refused(grid: Grid) -> None:
    with pytest.raises(ValueError, match=r"a needs b"):
        grid.run([grid.job("a", ("b",)), grid.job("b")])


def test_the_environment_of_jobs_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
    quietly([Job("job", my_cores)], tmp_path)
    assert "OMP_NUM_THREADS" not in os.environ
    assert os.environ["XLA_FLAGS"] == ""


def jobs_of_a_run_to_interrupt(place: Path, function: Callable[..., Any] = hang_at_first) -> list[Job]:
    grid = Grid(place)
    hanging = grid.job("hanging", ("quick",), function=function, pid=str(grid.pid))
    return [grid.job("quick", number=3), hanging, Job("last", my_cores, needs=("hanging",))]


@contextlib.contextmanager
def grid_in_another_process(place: Path, function: Callable[..., Any]) -> Iterator[subprocess.Popen[str]]:
    """Runs the grid in a session of its own, and gives it once its job hangs. Whatever is left is killed at the end."""
    # Whoever starts the tests in the background of a script has interrupts ignored, by them and all that they start.
    code = (
        "import signal\n"
        "from pathlib import Path\n"
        "from experiments.grid import run_grid\n"
        "from tests.experiments import test_grid\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"    function = getattr(test_grid, {function.__name__!r})\n"
        f"    place = Path({str(place)!r})\n"
        "    run_grid(test_grid.jobs_of_a_run_to_interrupt(place, function), place / 'run')\n"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        while not (place / "pid").exists():
            assert program.poll() is None, program.communicate()[0]
            time.sleep(0.01)
        yield program
    finally:
        for pid in processes_of_session(program.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        program.communicate()


def processes_of_session(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


def wait_until_gone(session: int) -> None:
    """Far longer than it takes, so that only processes that would stay for ever are still there at the end."""
    for _ in range(150):
        if not processes_of_session(session):
            return
        time.sleep(0.1)
    pytest.fail(f"processes are still there: {processes_of_session(session)}")


@pytest.mark.parametrize("whom", ["everybody, as a terminal does", "the grid alone"])
def test_after_an_interrupt_nothing_is_left_but_the_finished_jobs(whom: str, tmp_path: Path) -> None:
    send = os.kill if whom == "the grid alone" else os.killpg
    with grid_in_another_process(tmp_path, hang_at_first) as program:
        send(program.pid, signal.SIGINT)
        # The job would hang for ten minutes.
        said, _ = program.communicate(timeout=60)
        assert program.returncode != 0
        assert "KeyboardInterrupt" in said
        wait_until_gone(program.pid)
    outcome, ran = Grid(tmp_path).run(jobs_of_a_run_to_interrupt(tmp_path))
    assert outcome.failures == {}
    assert ran == ["hanging"]
    assert outcome.values["quick"]["sum"] == 3
    assert outcome.values["hanging"] == "went on"


def test_what_a_program_did_is_done_for_those_who_import_it(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "from pathlib import Path\n"
        "from experiments.grid import Job, run_grid\n"
        "def work(context):\n"
        "    with Path('done.txt').open('a') as file:\n"
        "        file.write('once')\n"
        "    return 1\n"
        "def main():\n"
        "    run_grid([Job('work', work, {})], Path('run'))\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    for arguments in (["-m", "program"], ["-c", "import program\nif __name__ == '__main__':\n    program.main()"]):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
        subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "done.txt").read_text() == "once"


def test_jobs_end_with_a_grid_that_is_killed(tmp_path: Path) -> None:
    with grid_in_another_process(tmp_path, hang_at_first) as program:
        program.kill()
        wait_until_gone(program.pid)


def test_the_helpers_of_a_job_end_with_it(tmp_path: Path) -> None:
    with grid_in_another_process(tmp_path, hang_with_a_helper) as program:
        os.kill(int((tmp_path / "pid.job").read_text()), signal.SIGKILL)
        program.wait(timeout=60)
        wait_until_gone(program.pid)


def test_ray_gives_the_same_bits_as_this_machine_and_reports_a_killed_job(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    learning = [Job(f"learn/{seed}", learn, {"seed": seed}) for seed in range(2)]
    jobs = [
        *learning,
        grid.job("victim", function=hang_at_first, pid=str(grid.pid)),
        grid.job("bad", function=fail_at_first),
        grid.job("first", number=1),
        grid.job("second", ("first",), number=2),
        Job("heir", my_cores, needs=("victim",)),
        Job("all", my_cores, cores=99),
    ]
    with killing(grid.pid):
        outcome, ran = grid.run(jobs, launcher="ray", cores=2)
    assert not ray.is_initialized()
    assert sorted(ran) == ["bad", "first", "second", "victim"]
    assert sorted(outcome.values) == ["all", "first", "learn/0", "learn/1", "second"]
    assert outcome.values["second"]["sum"] == 3
    assert outcome.failures == {
        "victim": f"its process was killed or crashed (its output is in {grid.folder / 'victim' / 'log.txt'})",
        "bad": f"LookupError: the well is dry (its output is in {grid.folder / 'bad' / 'log.txt'})",
        "heir": "needs victim, which failed",
    }
    here = quietly(learning, tmp_path / "here")
    assert here.values == {name: outcome.values[name] for name in ("learn/0", "learn/1")}
    for job in learning:
        for name in ("checkpoint_000000030.safetensors", "metrics.csv"):
            there = (grid.folder / job.name / name).read_bytes()
            assert there == (tmp_path / "here" / job.name / name).read_bytes()
    # What is missing can be run by the other launcher.
    outcome, ran = grid.run(jobs)
    assert sorted(ran) == ["bad", "victim"]
    assert outcome.failures == {}


def test_without_ray_its_launcher_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with pytest.raises(RuntimeError, match=r"pip install -r requirements-ray\.txt, or use --launcher local"):
        quietly([Job("job", my_cores)], tmp_path, launcher="ray")
    assert "OMP_NUM_THREADS" not in os.environ
