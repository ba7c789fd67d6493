from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import pytest
from rich.console import Console

from experiments import experiment
from experiments.demo import METHODS, PRESETS, Args, jobs, main
from experiments.experiment import Evaluation, rebuild_report, save_run
from robopref.rendering import rendering_backend
from tests.experiments.runs import Run, run_to_the_end

ROOT = Path(__file__).resolve().parents[2]
TASK = "door-open-v3"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_to_the_end(main, replace(PRESETS["smoke"], folder=tmp_path_factory.mktemp("demo") / "run"))


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Path:
    """The finished run in a folder that a test may spoil."""
    return Path(shutil.copytree(run.folder, tmp_path / "copy"))


class References(HTMLParser):
    """What a page loads or links to, and what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: defaultdict[str, int] = defaultdict(int)
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(folder: Path) -> References:
    references = References()
    references.feed((folder / "report" / "report.html").read_text(encoding="utf-8"))
    return references


def test_the_demo_runs_from_end_to_end(run: Run) -> None:
    assert run.status == 0
    page = run.folder / "report" / "report.html"
    assert run.said.rstrip().endswith(f"The report is {page.resolve()}")
    for method in (*METHODS, "expert"):
        assert method in run.said


def test_the_page_needs_nothing_beside_itself(run: Run) -> None:
    page = read_page(run.folder)
    assert page.tags["img"] >= 2
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    assert {reference.partition(":")[0] if reference[0] != "#" else "#" for reference in page.loaded} <= {"data", "#"}
    source = (run.folder / "report" / "report.html").read_text(encoding="utf-8")
    assert "url(" not in source
    assert "@import" not in source
    for method in (*METHODS, "expert"):
        assert method in page.text


def wilson(successes: int, n: int) -> tuple[float, float]:
    z = 1.959963984540054
    rate, weight = successes / n, 1 + z**2 / n
    middle = (rate + z**2 / (2 * n)) / weight
    half = z / weight * (rate * (1 - rate) / n + z**2 / (4 * n**2)) ** 0.5
    return middle - half, middle + half


def test_results_have_every_method_with_its_interval(run: Run) -> None:
    results = run.results
    assert [row["method"] for row in results["rows"]] == [*METHODS, "expert"]
    for row in results["rows"]:
        assert (row["task"], row["metric"], row["n"], row["seeds"]) == (TASK, "success rate", 6, 2)
        successes = 0
        for seed in (0, 1):
            cell = run.folder / "train" / row["method"] / TASK / str(seed) / "result.json"
            answers = json.loads(cell.read_text())["value"]["successes"]
            assert len(answers) == 3
            successes += sum(answers)
        assert row["mean"] == pytest.approx(successes / 6)
        assert (row["low"], row["high"]) == pytest.approx(wilson(successes, 6), abs=1e-9)


def test_claims_have_verdicts_that_follow_from_their_intervals(run: Run) -> None:
    claims = run.results["claims"]
    assert [claim["id"] for claim in claims] == ["a", "b", "c", "d"]
    for claim in claims:
        assert TASK in claim["claim"]
        assert claim["low"] <= claim["ours"] <= claim["high"]
        below = claim["id"] == "a"
        holds = claim["high"] < 0 if below else claim["low"] > 0
        fails = claim["low"] > 0 if below else claim["high"] < 0
        assert claim["verdict"] == ("holds" if holds else "fails" if fails else "undecided")


def test_the_manifest_names_the_data_and_the_configuration(run: Run) -> None:
    found = run.results["manifest"]
    episodes = run.value(f"episodes/{TASK}")
    assert found["data"] == {f"episodes/{TASK}": episodes["hash"]}
    assert episodes["steps"] == 8 * 40
    assert sum(map(len, episodes["behaviours"].values())) == 8
    assert found["seeds"] == [0, 1]
    assert found["config"] == json.loads((run.folder / "run.json").read_text())["args"]
    assert found["config"]["cpl"]["updates"] == 6


def test_learning_curves_have_the_checkpoints_that_were_asked_for(run: Run) -> None:
    for method in METHODS:
        value = run.value(f"train/{method}/{TASK}/1")
        assert list(value["curve"]) == ["3", "6"]
        assert all(len(successes) == 2 for successes in value["curve"].values())
        assert [row["step"] for row in value["metrics"]] == [3, 6]


def test_there_is_a_film_or_the_reason_why_not(run: Run) -> None:
    page, film = read_page(run.folder), run.folder / "report" / "film.mp4"
    if rendering_backend() is None:
        assert not film.exists()
        assert page.tags["video"] == 0
        assert "No OpenGL library for drawing without a display was found" in page.text
        return
    assert sum(reference.startswith("data:video/mp4") for reference in page.loaded) == 1
    with av.open(film) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) > 10
    assert any((first != last).any() for first, last in zip(frames[:1], frames[-1:], strict=True))
    assert frames[0].std() > 10


def job_files(folder: Path) -> dict[str, int]:
    parts = ("episodes", "labels", "train", "film")
    found = (path for part in parts for path in (folder / part).rglob("*") if path.is_file())
    return {str(path): path.stat().st_mtime_ns for path in found}


def test_the_same_command_runs_no_job_again(run: Run) -> None:
    before = job_files(run.folder)
    assert len([path for path in before if path.endswith("result.json")]) == 1 + 1 + 5 * 2 + 1
    results = run.results
    assert run_to_the_end(main, run.args).status == 0
    assert job_files(run.folder) == before
    again = run.results
    assert (again["rows"], again["claims"]) == (results["rows"], results["claims"])


def test_a_report_is_rebuilt_to_the_same_bytes(copy: Path) -> None:
    files = {path.name: path.read_bytes() for path in (copy / "report").iterdir()}
    for name in files.keys() - {"results.json"}:
        (copy / "report" / name).unlink()
    assert rebuild_report(copy) == copy / "report" / "report.html"
    assert {path.name: path.read_bytes() for path in (copy / "report").iterdir()} == files


def test_an_unfinished_run_has_no_report(copy: Path, tmp_path: Path) -> None:
    (copy / "train" / "cpl" / TASK / "1" / "result.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"is not finished: train/cpl/{TASK}/1 has no result; run its command"):
        rebuild_report(copy)
    with pytest.raises(FileNotFoundError):
        rebuild_report(tmp_path / "nowhere")


def test_results_of_other_arguments_are_not_reported_as_those_of_the_run(run: Run, copy: Path) -> None:
    # What is left of a run that was begun anew with other arguments, and stopped before its first job.
    save_run(copy, "experiments.demo", replace(run.args, folder=copy, queries=21))
    with pytest.raises(FileNotFoundError, match="is not finished"):
        rebuild_report(copy)


def test_methods_can_be_narrowed(run: Run, copy: Path) -> None:
    before = job_files(copy)
    narrowed = run_to_the_end(main, replace(run.args, folder=copy, methods=("bc", "cpl"), seeds=(1,)))
    assert narrowed.status == 0
    results = narrowed.results
    assert [(row["method"], row["n"], row["seeds"]) for row in results["rows"]] == [
        ("bc", 3, 1),
        ("cpl", 3, 1),
        ("expert", 3, 1),
    ]
    assert [claim["id"] for claim in results["claims"]] == ["a", "b"]
    # The film shows other policies now; all else was there.
    changed = {path for path, when in job_files(copy).items() if before.get(path) != when}
    assert changed
    assert all(Path(path).is_relative_to(copy / "film") for path in changed)


def initial_states(args: Args) -> tuple[set[int], dict[str, set[int]], set[int]]:
    """Seeds of the initial states for collecting, for evaluating each cell, and for learning curves."""
    collecting: set[int] = set()
    evaluating: dict[str, set[int]] = {}
    curves: set[int] = set()
    for job in jobs(args):
        if job.name.startswith("episodes/"):
            first = job.arguments["first_seed"]
            collecting |= set(range(first, first + job.arguments["episodes"]))
        elif job.name.startswith("train/"):
            cell: Evaluation = job.arguments["evaluation"]
            evaluating[job.name] = set(range(cell.first_seed, cell.first_seed + cell.episodes))
            curves |= set(range(cell.curve_first_seed, cell.curve_first_seed + cell.curve_episodes))
    return collecting, evaluating, curves


def test_methods_meet_the_same_initial_states_and_never_those_of_the_data() -> None:
    args = replace(PRESETS["small"], seeds=tuple(range(10)))
    collecting, evaluating, curves = initial_states(args)
    for seed in args.seeds:
        cells = [evaluating[f"train/{method}/{TASK}/{seed}"] for method in (*METHODS, "expert")]
        assert all(cell == cells[0] for cell in cells)
        assert len(cells[0]) == args.evaluation_episodes
    union = set().union(*evaluating.values())
    assert len(union) == len(args.seeds) * args.evaluation_episodes
    assert not union & collecting
    assert not union & curves
    assert not curves & collecting
    other_collecting, other_evaluating, _ = initial_states(replace(args, seed=1))
    assert not other_collecting & (collecting | union)
    assert not set().union(*other_evaluating.values()) & (union | collecting)


def test_tasks_have_jobs_of_their_own() -> None:
    two = jobs(replace(PRESETS["smoke"], tasks=(TASK, "drawer-open-v3")))
    one = jobs(PRESETS["smoke"])
    assert len(two) == 2 * len(one)
    assert [job.name for job in one] == [job.name for job in two][: len(one)]
    assert len({job.name for job in two}) == len(two)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--tasks", "door-opn-v3"], "no task 'door-opn-v3'; did you mean"),
        (["--methods", "bc", "cpll"], "there is no method 'cpll'; did you mean cpl"),
        (["--teacher", "oracl"], "there is no teacher 'oracl'"),
        (["--length", "41"], "segments of 41 steps do not fit into episodes of 40"),
        (["--folder", "file/run"], "file"),
    ],
    ids=["task", "method", "teacher", "length", "folder"],
)
def test_bad_input_is_one_line_and_writes_nothing(given: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    result = subprocess.run(
        [sys.executable, "-m", "experiments.demo", "--preset", "smoke", *given],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("demo: ")
    assert said in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": ()},
        {"seeds": ()},
        {"seeds": (0, 0)},
        {"tasks": (TASK, TASK)},
        {"methods": ("bc", "bc")},
        {"seeds": (-1,)},
        {"seed": -1},
        {"horizon": 0},
        {"episodes": 0},
        {"queries": 0},
        {"length": 0},
        {"evaluation_episodes": 0},
        {"cores": -1},
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_grid(*_: object, **__: object) -> None:
        raise AssertionError("the jobs were started")

    monkeypatch.setattr(experiment, "run_grid", run_grid)
    with pytest.raises(ValueError, match=r"\w") as raised:
        main(replace(PRESETS["smoke"], folder=tmp_path / "run", **changes), Console(file=io.StringIO()))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
