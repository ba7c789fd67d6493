from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import gymnasium
import numpy as np
import pytest

import envs
from robopref import cli
from robopref.conversion import FORMATS
from robopref.episodes import load_episodes, write_episodes
from robopref.records import read_records
from robopref.rollouts import RolloutWorkers
from robopref.types import Episode

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 8


def robopref(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a person would run it."""
    return subprocess.run(
        [sys.executable, "-m", "robopref", *arguments],
        cwd=cwd or ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def an_episode(seed: int, *, reward: float, action: float = 0.5) -> Episode:
    rng = np.random.default_rng(seed)
    return Episode(
        observations=rng.normal(size=(LENGTH + 1, 3)),
        actions=np.full((LENGTH, 2), action, np.float32),
        rewards=np.full(LENGTH, reward),
        terminated=False,
        truncated=True,
        infos={"success": np.arange(LENGTH + 1) >= (LENGTH if reward > 2 else LENGTH + 1)},
        seed=seed,
        origin={"behaviour": "good" if reward > 2 else "poor"},
    )


def write(path: Path, episodes: list[Episode]) -> Path:
    write_episodes(
        path,
        episodes,
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64),
        action_space=gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32),
        env={"name": "toy", "horizon": LENGTH},
    )
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Six episodes of constant reward 1 to 6: four succeed (reward 3 to 6), two do not."""
    return write(tmp_path / "episodes", [an_episode(seed, reward=1.0 + seed) for seed in range(6)])


def test_help_needs_the_standard_library_only() -> None:
    code = (
        "import json, sys; before = set(sys.modules)\n"
        "import robopref.cli; robopref.cli._parser().format_help()\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(process.stdout))
    assert "robopref" in loaded
    assert loaded <= {*sys.stdlib_module_names, "robopref"}


def test_help_of_every_command_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("info", "check", "stats", "convert", "split", "film", "collect")
    data = (["data"], *(["data", name] for name in names))
    for command in ([], ["doctor"], *data, ["label"], ["label", "fit"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--help"])
        assert stop.value.code == 0
        assert capsys.readouterr().out.startswith(" ".join(["usage: robopref", *command]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data", "info", "/no/such/folder"], "/no/such/folder"),
        (["report", "/no/such/run"], "/no/such/run"),
        (["label", "/no/such/folder", "/no/such/labels.parquet"], "/no/such/folder"),
        (["docter"], "did you mean doctor?"),
        (["data", "infos"], "did you mean info?"),
        (["data", "convert", "a", "b", "--to", "robomimik"], "did you mean robomimic?"),
        (["data", "convert", "/no/such/file.hdf5", "b"], "/no/such/file.hdf5"),
        ([], "COMMAND"),
        (["data", "check", "somewhere", "--length", "0"], "'0' is not an integer of at least 1"),
        (["data", "check", "somewhere", "--length", "many"], "'many' is not an integer"),
        (["label", "a", "b", "--teacher", "oracel"], "did you mean oracle?"),
        (["label", "a", "b", "--teacher", "no/such/teacher.json"], "no/such/teacher.json does not exist"),
        (["label", "a", "b", "--values", "v.npy"], "does not look at the values"),
        (["label", "fit", "/no/such/folder", "b"], "/no/such/folder"),
        (["label", "fit", "a", "b", "--family", "regrets"], "did you mean regret?"),
        (["label", "fit", "a"], "RECORDS"),
        (["doctor", "--js"], "--js"),
        (["data", "collect", "metaworld/door-opn-v3", "new"], "did you mean door-open-v3"),
        (["data", "collect", "metaworld/reach-v3", "new", "--behaviour", "expert,ofset"], "did you mean offset?"),
    ],
)
def test_a_mistake_is_answered_in_one_line(arguments: list[str], says: str) -> None:
    process = robopref(*arguments)
    assert process.returncode == 2
    assert process.stdout == ""
    lines = process.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("robopref: ")
    assert says in lines[0]


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


class _SubclassError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "robopref: two lines"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), "robopref: x.json: No such file or directory"),
        (PermissionError("not yours"), "robopref: not yours"),
        (RuntimeError("out of disk"), "robopref: out of disk"),
        (ValueError(), "robopref: ValueError"),
    ],
)
def test_errors_meant_for_people_become_one_sentence(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_doctor", raising(error))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err.splitlines() == [line]
    with pytest.raises(type(error)):
        cli.main(["doctor", "--traceback"])


@pytest.mark.parametrize(
    "error", [KeyError("bug"), TypeError("bug"), _SubclassError("bug"), NotImplementedError("bug")]
)
def test_bugs_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_doctor", raising(error))
    with pytest.raises(type(error)):
        cli.main(["doctor"])


def test_an_interrupt_has_its_own_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_doctor", raising(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err.splitlines() == ["robopref: interrupted"]


def test_a_reader_who_has_had_enough_is_no_error(dataset: Path) -> None:
    code = f"import sys; from robopref.cli import main; sys.exit(main(['data', 'info', {str(dataset)!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    complaints = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=300) == 1
    assert complaints == ""


def test_info_says_what_is_in_a_dataset(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "info", str(dataset)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "toy (horizon 8)" in out
    assert "episodes 6, of 8 to 8 steps" in out
    assert "steps 48" in out
    # Returns are 8, 16, ..., 48.
    assert "8 to 48, quartiles 18, 28, 38" in out
    # Wilson: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) for 4 of 6.
    n, p, z = 6, 4 / 6, 1.959964
    middle, scale = p + z**2 / (2 * n), 1 + z**2 / n
    spread = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = (middle - spread) / scale, (middle + spread) / scale
    assert f"66.7% (95% interval {low:.1%} to {high:.1%}, n = 6)" in out
    assert load_episodes(dataset).hash in out
    assert out.index("good") < out.index("poor")
    assert "100.0% (95% interval" in out


def test_check_is_content_with_a_good_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "fine", [an_episode(seed, reward=seed) for seed in range(2)])
    assert cli.main(["data", "check", str(path), "--length", str(LENGTH)]) == 0
    assert "✗" not in capsys.readouterr().out


def test_check_fails_on_what_would_spoil_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "outside", [an_episode(0, reward=1.0), an_episode(1, reward=2.0, action=1.5)])
    assert cli.main(["data", "check", str(path), "--length", str(LENGTH), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert [check["name"] for check in found["checks"] if not check["ok"]] == ["action bounds"]
    assert cli.main(["data", "check", str(path), "--length", str(LENGTH)]) == 1
    assert "✗ action bounds" in capsys.readouterr().out


def test_check_needs_segments_of_the_wanted_length(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(dataset), "--length", str(LENGTH + 1)]) == 1
    assert "shorter than 9 steps" in capsys.readouterr().out


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_the_formats_are_those_that_can_be_converted() -> None:
    assert cli.FORMATS == FORMATS


@pytest.mark.parametrize(
    ("format", "name", "more"),
    [
        ("robomimic", "out.hdf5", ()),
        ("d4rl", "out.hdf5", ()),
        ("lerobot", "out", ("--fps", 10)),
        ("robopref", "out", ()),
    ],
)
def test_a_dataset_is_converted_and_read_in_any_format(
    format: str, name: str, more: tuple[Any, ...], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, back = tmp_path / name, tmp_path / "back"
    assert run("data", "convert", dataset, out, "--to", format, *more) == 0
    assert f"{out}: 6 episodes" in capsys.readouterr().out.replace("\n", "")
    assert run("data", "info", out) == 0
    told = capsys.readouterr().out
    assert "6, of 8 to 8 steps" in told
    assert "toy (horizon 8)" in told
    assert run("data", "check", out, "--length", LENGTH, "--json") in (0, cli.STATUS_BAD)
    capsys.readouterr()
    assert run("data", "convert", out, back) == 0
    assert load_episodes(back).hash == load_episodes(dataset).hash


def test_a_dataset_is_parted_by_episodes(dataset: Path, tmp_path: Path) -> None:
    whole = load_episodes(dataset)
    for seed, name in ((0, "first"), (0, "again"), (1, "other")):
        assert run("data", "split", dataset, tmp_path / name, "--held-out", 0.34, "--seed", seed) == 0
    parts = {name: load_episodes(tmp_path / "first" / name) for name in ("train", "held-out")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 4, "held-out": 2}
    returns = np.concatenate([part.returns for part in parts.values()])
    np.testing.assert_array_equal(np.sort(returns), np.sort(whole.returns))
    hashes = [load_episodes(tmp_path / name / "held-out").hash for name in ("first", "again", "other")]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_split_is_converted_alone(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = load_episodes(dataset)
    named = tmp_path / "named"
    write_episodes(
        named,
        [whole.episode(index) for index in range(6)],
        observation_space=whole.observation_space,
        action_space=whole.action_space,
        env=whole.env,
        splits={"best": [4, 5]},
    )
    assert run("data", "info", named) == 0
    assert "best: 2" in capsys.readouterr().out
    assert run("data", "convert", named, tmp_path / "best", "--split", "best") == 0
    np.testing.assert_array_equal(load_episodes(tmp_path / "best").returns, whole.returns[4:])
    capsys.readouterr()
    assert run("data", "convert", named, tmp_path / "worst", "--split", "worst") == cli.STATUS_ERROR
    assert "no split 'worst'; known are best" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_both_parts_have_episodes(share: float, dataset: Path, tmp_path: Path) -> None:
    assert run("data", "split", dataset, tmp_path / "parts", "--held-out", share) == cli.STATUS_ERROR
    assert not (tmp_path / "parts").exists()


def test_statistics_are_those_of_the_numbers(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "stats", dataset, "--json") == 0
    told = {row["numbers"]: row for row in json.loads(capsys.readouterr().out)}
    found = load_episodes(dataset)
    assert list(told) == [
        *(f"observation[{i}]" for i in range(3)),
        "action[0]",
        "action[1]",
        "reward",
        "return",
        "length",
    ]
    column = found.observations[:, 1]
    expected = {"mean": column.mean(), "std": column.std(), "min": column.min(), "max": column.max()}
    assert {name: told["observation[1]"][name] for name in expected} == pytest.approx(expected)
    # Each episode has the same reward at all of its steps, 1 to 6, and the last row of an episode is no step.
    assert told["reward"]["mean"] == pytest.approx(3.5)
    assert (told["return"]["min"], told["return"]["max"]) == (LENGTH, 6 * LENGTH)
    assert told["action[0]"]["std"] == 0
    assert run("data", "stats", dataset) == 0
    assert "observation[2]" in capsys.readouterr().out


def test_an_episode_is_filmed_as_its_environment_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = envs.make({"name": "delivery", "rows": ["..r:", "c.h.", "...."], "horizon": 6})
    with RolloutWorkers(partial(envs.make, env.config), lanes=1) as workers:
        episodes = workers.run(RandomPolicy(), range(2), keep_states=True)
    spaces: Any = {"observation_space": env.observation_space, "action_space": env.action_space}
    write_episodes(tmp_path / "episodes", episodes, env=env.config, **spaces)
    assert run("data", "film", tmp_path / "episodes", tmp_path / "film.mp4", "--episode", 1, "--fps", 5) == 0
    assert f"{len(episodes[1]) + 1} frames of episode 1" in capsys.readouterr().out.replace("\n", "")
    with av.open(tmp_path / "film.mp4") as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == len(episodes[1]) + 1
    shown = []
    for state in episodes[1].states:
        env.set_state(state)
        shown.append(env.render())
    height, width = shown[0].shape[:2]
    errors = [np.abs(np.asarray(a, float)[:height, :width] - b).mean() for a, b in zip(frames, shown, strict=True)]
    assert max(errors) < 12
    assert run("data", "film", tmp_path / "episodes", tmp_path / "no.mp4", "--episode", 2) == cli.STATUS_ERROR
    assert "there is no episode 2" in capsys.readouterr().err


class RandomPolicy:
    def start(self, seeds: np.ndarray) -> np.random.Generator:
        return np.random.default_rng(seeds.tolist())

    def step(self, carry: np.random.Generator, observations: np.ndarray) -> tuple[np.ndarray, np.random.Generator]:
        return carry.uniform(-1, 1, (len(observations), 4)).astype(np.float32), carry

    def describe(self, seed: int) -> Mapping[str, str | float]:
        return {"behaviour": "random"}


def test_what_has_neither_images_nor_states_cannot_be_filmed(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("data", "film", dataset, tmp_path / "film.mp4") == cli.STATUS_ERROR
    assert "keeps neither images nor simulator states" in capsys.readouterr().err


def test_doctor_prints_the_same_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from robopref import doctor

    bad = doctor.Check("glue", False, "It is dry.", "Buy some.")
    monkeypatch.setattr(doctor, "installation_checks", lambda: {"glue": lambda: bad})
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "It is dry." in text
    assert "Buy some." in text
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["checks"][0]["message"] == "It is dry."


def test_labels_of_the_oracle_follow_the_returns(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = dataset.parent / "labels.parquet"
    command = ["label", str(dataset), str(out), "--queries", "30", "--length", "4", "--seed", "3"]
    assert cli.main(command) == 0
    assert "30 queries, 100% answered" in capsys.readouterr().out
    queries, labels = read_records(out, load_episodes(dataset))
    assert (len(queries), queries.length, labels.labeler) == (30, 4, "oracle")
    # The reward is constant within an episode and grows with its index; segments of one episode are a tie.
    first, second = queries.episodes.T
    expected = np.where(first == second, 0.5, second > first)
    np.testing.assert_array_equal(labels.values, expected)

    again = dataset.parent / "again.parquet"
    assert cli.main([*command[:2], str(again), *command[3:]]) == 0
    same_queries, same_labels = read_records(again, load_episodes(dataset))
    np.testing.assert_array_equal(same_queries.starts, queries.starts)
    np.testing.assert_array_equal(same_labels.values, labels.values)


def test_the_seed_decides_which_answers_are_mistaken(dataset: Path) -> None:
    def mistaken(seed: int) -> list[bool]:
        out = dataset.parent / f"labels-{seed}.parquet"
        flags = ["--teacher", "mistake", "--queries", "100", "--length", "8", "--seed", str(seed)]
        assert cli.main(["label", str(dataset), str(out), *flags]) == 0
        queries, labels = read_records(out, load_episodes(dataset))
        first, second = queries.episodes.T
        wrong: list[bool] = (labels.values != (second > first)).tolist()
        return wrong

    # Segments as long as the episodes make every query one of two different episodes, so that nothing is a tie.
    assert any(mistaken(0))
    assert mistaken(1) != mistaken(2)


@pytest.mark.parametrize(("threshold", "answered"), [([], 1.0), (["--threshold", "1e9"], 0.0)])
def test_the_teacher_who_skips_takes_a_threshold(dataset: Path, threshold: list[str], answered: float) -> None:
    # By default it is a tenth of an average segment, which every segment here exceeds.
    out = dataset.parent / "labels.parquet"
    arguments = ["--teacher", "skip", "--queries", "10", "--length", "4", *threshold]
    assert cli.main(["label", str(dataset), str(out), *arguments]) == 0
    assert read_records(out, load_episodes(dataset))[1].answered.mean() == answered


def test_a_teacher_is_fitted_to_labels_and_labels_in_its_turn(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    folder, records = dataset.parent, str(dataset.parent / "labels.parquet")
    values, teacher, other = (str(folder / name) for name in ("values.npy", "teacher.json", "other.json"))
    loaded = load_episodes(dataset)
    np.save(values, np.random.default_rng(0).normal(size=len(loaded.observations)))
    drawing = ["--queries", "120", "--length", "4"]
    assert cli.main(["label", str(dataset), records, "--teacher", "mistake", *drawing]) == 0

    fit = ["label", "fit", str(dataset), records, "--folds", "2"]
    assert cli.main([*fit, "--out", teacher]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "teachers fitted to 120 labels" in out
    # Rewards are constant within a segment, so that forgetting makes no difference; the simpler one is written.
    assert "do not tell 'partial return' and 'myopic partial return' apart, but they speak against 'coin'" in out
    assert "Left out, as they need --values: 'regret' and 'start, end and partial return'." in out
    written = json.loads(Path(teacher).read_text())
    assert (written["n"], written["labeler"], written["dataset_hash"]) == (120, "mistake", loaded.hash)
    assert written["family"] == "partial return"
    # A tenth of the answers is turned round, and so a fifth is left to chance.
    lapse = written["parameters"]["lapse"]
    assert lapse["low"] < 0.2 < lapse["high"]
    assert f"lapse {lapse['value']:.3g} ({lapse['low']:.3g} to {lapse['high']:.3g})" in out

    assert cli.main([*fit, "--family", "regret"]) == 2
    assert "give --values" in capsys.readouterr().err
    assert cli.main([*fit, "--values", values, "--discount", "0.9", "--family", "regret", "--out", other]) == 0
    assert "Left out" not in capsys.readouterr().out
    assert json.loads(Path(other).read_text())["discount"] == 0.9
    assert cli.main([*fit, "--out", teacher]) == 2
    assert "exists already" in capsys.readouterr().err

    again = str(folder / "again.parquet")
    assert cli.main(["label", str(dataset), again, "--teacher", other, *drawing]) == 2
    assert "judges by the values of states" in capsys.readouterr().err
    assert cli.main(["label", str(dataset), again, "--teacher", teacher, *drawing]) == 0
    labels = read_records(again, loaded)[1]
    assert (len(labels), labels.labeler) == (120, "fitted partial return")
    assert labels.parameters["mistake"] == lapse["value"] / 2
    with_values = ["--teacher", other, "--values", values, *drawing]
    assert cli.main(["label", str(dataset), str(folder / "third.parquet"), *with_values]) == 0
    assert read_records(folder / "third.parquet", loaded)[1].labeler == "fitted regret"


def test_a_dataset_may_be_in_a_folder_called_fit(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset.rename(dataset.parent / "fit")
    monkeypatch.chdir(dataset.parent)
    assert cli.main(["label", "./fit", "labels.parquet", "--queries", "5", "--length", "4"]) == 0
    assert "5 queries, 100% answered" in capsys.readouterr().out


def test_nothing_is_overwritten(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = dataset.parent / "labels.parquet"
    out.write_text("precious")
    assert cli.main(["label", str(dataset), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert cli.main(["label", str(dataset), str(out / "below.parquet")]) == 2
    assert f"{out} is not a folder" in capsys.readouterr().err
    assert cli.main(["data", "collect", "toy", str(dataset)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["data", "collect", "toy", "new"], "envs"),
        (["label", "episodes", "new.parquet"], "labelers"),
        (["label", "fit", "episodes", "labels.parquet"], "labelers"),
        (["report", "."], "experiments"),
    ],
)
def test_without_a_checkout_a_command_says_that_it_needs_one(
    arguments: list[str],
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == folder]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, folder, None)
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert f"needs `{folder}/`" in err
    assert "checkout" in err
    assert len(err.splitlines()) == 1


def test_a_missing_package_is_not_taken_for_a_missing_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "_doctor", lambda _: cli._checkout_module("needs_more"))
    assert cli.main(["doctor"]) == 2
    line = "robopref: no_such_package_at_all is not installed; `robopref doctor` says what is missing and how to get it"
    assert capsys.readouterr().err.splitlines() == [line]


def test_report_prints_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = SimpleNamespace(rebuild_report=lambda folder: folder / "report.html")
    monkeypatch.setitem(sys.modules, "experiments.experiment", experiment)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


class _Countdown(gymnasium.Env[np.ndarray, np.ndarray]):
    """Shows its seed and what was done last; ends after `horizon` steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = {"horizon": 5, **config}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._seed, self._steps = seed or 0, 0
        return np.array([self._seed, 0.0]), {"success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        observation = np.array([self._seed, action[0]])
        return observation, 1.0, False, self._steps == self.config["horizon"], {"success": self._seed == 8}

    def get_state(self) -> np.ndarray:
        return np.array([self._seed, self._steps], float)


class _Still:
    def __init__(self, *, task: str, noise: float) -> None:
        self._about = {"behaviour": "still", "task": task, "noise": noise}

    def start(self, seeds: np.ndarray) -> None:
        return None

    def step(self, carry: None, observations: np.ndarray) -> tuple[np.ndarray, None]:
        return np.zeros((len(observations), 1), np.float32), None

    def describe(self, seed: int) -> dict[str, str | float]:
        return self._about


@pytest.fixture
def toy_envs(monkeypatch: pytest.MonkeyPatch) -> None:
    envs, behaviours = ModuleType("envs"), ModuleType("envs.behaviours")
    envs.make = _Countdown  # type: ignore[attr-defined]
    behaviours.Expert = _Still  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "envs", envs)
    monkeypatch.setitem(sys.modules, "envs.behaviours", behaviours)


@pytest.mark.usefixtures("toy_envs")
@pytest.mark.parametrize(("flags", "state_size"), [([], 0), (["--keep-states"], 2)])
def test_collect_writes_one_episode_per_seed(
    flags: list[str], state_size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    numbers = ["--episodes", "3", "--horizon", "4", "--seed", "7", "--processes", "0"]
    command = ["data", "collect", "metaworld/toy-v3", str(out), *numbers, "--noise", "0.25", *flags]
    assert cli.main(command) == 0
    assert "3 episodes, 12 steps, 1 successes" in capsys.readouterr().out
    dataset = load_episodes(out)
    assert dataset.seeds.tolist() == [7, 8, 9]
    assert dataset.lengths.tolist() == [4, 4, 4]
    assert dataset.successes.tolist() == [False, True, False]
    assert dict(dataset.env) == {"name": "metaworld/toy-v3", "horizon": 4}
    assert dataset.origins[0] == {"behaviour": "still", "task": "toy-v3", "noise": 0.25}
    assert dataset.state_size == state_size
