from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.bc import BCConfig
from agents.cpl import CPLConfig
from envs.behaviours import Random
from experiments.experiment import (
    AGENTS,
    Training,
    collect,
    load_agent,
    manifest,
    parse_args,
    run_main,
    save_run,
    shuffle_labels,
)
from experiments.grid import JobContext
from robopref.queries import Labels
from robopref.training import fit
from robopref.types import Preferences, Segments

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Args:
    """Arguments of an experiment that does not exist.

    Attributes:
        seeds: of training.
        updates: how many.
        folder: of the run.
        preset: what it is called by.
    """

    seeds: tuple[int, ...] = (0, 1)
    updates: int = 9000
    folder: Path | None = None
    preset: str = "small"


PRESETS = {"small": Args(), "smoke": Args(seeds=(0,), updates=6, preset="smoke")}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], PRESETS["small"]),
        (["--preset", "smoke"], PRESETS["smoke"]),
        (["--preset=smoke", "--updates", "7"], replace(PRESETS["smoke"], updates=7)),
        (["--seeds", "4", "5", "6", "--preset", "smoke"], replace(PRESETS["smoke"], seeds=(4, 5, 6))),
        (["--folder", "runs/x"], replace(PRESETS["small"], folder=Path("runs/x"))),
    ],
)
def test_flags_change_the_values_of_the_preset(given: list[str], expected: Args) -> None:
    assert parse_args(PRESETS, given) == expected


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"there is no preset 'smoek', only small, smoke; did you mean smoke\?"):
        parse_args(PRESETS, ["--preset", "smoek"])
    with pytest.raises(ValueError, match=r"there is no preset 'xyz', only small, smoke$"):
        parse_args(PRESETS, ["--preset", "xyz"])


def test_an_unknown_flag_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_args(PRESETS, ["--udpates", "7"])
    assert raised.value.code == 2
    assert "udpates" in capsys.readouterr().err


def test_help_names_the_presets_and_shows_the_values_of_the_chosen_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_args(PRESETS, ["--preset", "smoke", "--help"], description="Something to try.")
    assert raised.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Something to try." in said
    assert "small,smoke" in said
    assert "default: 6" in said


def end_of(main: Callable[[Args], int], monkeypatch: pytest.MonkeyPatch, *flags: str) -> object:
    """The exit status of an experiment's command line."""
    monkeypatch.setattr(sys, "argv", ["experiments/moon.py", *flags])
    with pytest.raises(SystemExit) as raised:
        run_main(main, PRESETS, "An experiment.")
    return raised.value.code


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("the moon is full."), 2, "moon: the moon is full.\n"),
        (FileNotFoundError("there is no moon."), 2, "moon: there is no moon.\n"),
        (RuntimeError("the moon has set."), 2, "moon: the moon has set.\n"),
        (KeyboardInterrupt(), 130, "stopped; run the same command again to go on from here\n"),
    ],
    ids=["value", "file", "runtime", "interrupt"],
)
def test_errors_are_one_line_and_an_exit_status(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(args: Args) -> int:
        raise error

    assert end_of(main, monkeypatch) == status
    assert capsys.readouterr() == ("", said)


def test_the_status_is_that_of_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert end_of(lambda args: args.updates, monkeypatch, "--preset", "smoke", "--updates", "7") == 7


def test_a_mistake_in_the_code_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["moon.py"])
    with pytest.raises(ZeroDivisionError):
        run_main(lambda args: args.updates // 0, PRESETS, "An experiment.")


def test_an_unknown_preset_is_one_line_in_a_process_of_its_own() -> None:
    code = (
        "from experiments.experiment import run_main\n"
        "from tests.experiments.test_experiment import PRESETS\n"
        "run_main(lambda args: 0, PRESETS, 'An experiment.')\n"
    )
    command = [sys.executable, "-c", code, "--preset", "smok"]
    result = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=300
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "-c: there is no preset 'smok', only small, smoke; did you mean smoke?\n"


def test_a_run_folder_is_noted_and_kept_for_its_experiment(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    save_run(folder, "experiments.demo", Args(folder=folder))
    expected = {"seeds": [0, 1], "updates": 9000, "folder": str(folder), "preset": "small"}
    assert json.loads((folder / "run.json").read_text()) == {"module": "experiments.demo", "args": expected}
    save_run(folder, "experiments.demo", Args(updates=5))
    before = (folder / "run.json").read_bytes()
    assert json.loads(before)["args"]["updates"] == 5
    with pytest.raises(ValueError, match=r"holds a run of experiments\.demo; choose another --folder"):
        save_run(folder, "experiments.other", Args())
    assert (folder / "run.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "episodes" / "door-open-v3" / "main_data.hdf5"
    precious.parent.mkdir(parents=True)
    precious.write_text("collected over months")
    with pytest.raises(ValueError, match=r"choose another --folder"):
        save_run(tmp_path, "experiments.demo", Args())
    assert [path.name for path in tmp_path.iterdir()] == ["episodes"]
    (tmp_path / "empty").mkdir()
    save_run(tmp_path / "empty", "experiments.demo", Args())


def some_labels() -> Labels:
    rng = np.random.default_rng(0)
    answered = rng.random(200) < 0.8
    values = np.where(answered, rng.choice([0.0, 0.5, 1.0], size=200, p=[0.6, 0.1, 0.3]), np.nan)
    return Labels(values=values, answered=answered, labeler="oracle", parameters={"temperature": 0.0})


def test_shuffled_labels_are_the_same_answers_elsewhere() -> None:
    labels = some_labels()
    assert labels.values is not None
    before = labels.values.copy()
    shuffled = shuffle_labels(labels, np.random.default_rng(1))
    assert shuffled.values is not None
    np.testing.assert_array_equal(shuffled.answered, labels.answered)
    np.testing.assert_array_equal(np.isnan(shuffled.values), ~labels.answered)
    answered = labels.answered
    np.testing.assert_array_equal(np.sort(shuffled.values[answered]), np.sort(labels.values[answered]))
    assert not np.array_equal(shuffled.values[answered], labels.values[answered])
    np.testing.assert_array_equal(labels.values, before)
    assert shuffled.labeler == "oracle (shuffled)"
    assert (shuffled.parameters, shuffled.created) == (labels.parameters, labels.created)
    again = shuffle_labels(labels, np.random.default_rng(1))
    np.testing.assert_array_equal(again.values, shuffled.values)
    other = shuffle_labels(labels, np.random.default_rng(2))
    assert other.values is not None
    assert not np.array_equal(other.values[answered], shuffled.values[answered])


def test_orders_cannot_be_shuffled() -> None:
    orders = Labels(orders=np.array([[0, 1, 2]]), answered=np.array([True]), labeler="oracle")
    with pytest.raises(ValueError, match="only labels of pairs can be shuffled"):
        shuffle_labels(orders, np.random.default_rng(0))


def test_the_manifest_says_how_a_result_was_made() -> None:
    found = manifest(Args(), seeds=(3, 4), data={"door": "abc"}, wall_seconds=12.345, job_seconds=67.891)
    assert {"command", "config", "seeds", "versions", "data", "device", "wall_seconds", "commit"} <= found.keys()
    assert found["command"].startswith("python -m ")
    assert found["config"] == {"seeds": [0, 1], "updates": 9000, "folder": None, "preset": "small"}
    assert found["seeds"] == [3, 4]
    assert found["data"] == {"door": "abc"}
    assert (found["wall_seconds"], found["job_seconds"]) == (12.3, 67.9)
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert jax.devices()[0].device_kind in found["device"]
    assert found["commit"]
    assert json.loads(json.dumps(found)) == found


class Pairs(Preferences):
    """The same batch for ever."""

    def sample(self, key: Any, batch_size: int) -> Preferences:
        return Preferences(self.segments, self.labels)


TRAININGS = {
    "bc": Training(BCConfig(hidden_dims=(8,)), "episodes", updates=4, batch_size=3),
    "cpl": Training(CPLConfig(hidden_dims=(8,), reference=True), "preferences", updates=4, batch_size=3),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_trained_agent_is_loaded_from_its_last_checkpoint(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    segments = Segments(jnp.asarray(rng.normal(size=(3, 2, 5, 6))), jnp.asarray(rng.uniform(-1, 1, size=(3, 2, 5, 2))))
    pairs = Pairs(segments, labels=jnp.asarray([0.0, 1.0, 0.5]))
    training = TRAININGS[name]
    agent = AGENTS[type(training.config)].create(training.config, pairs, jax.random.key(5))
    agent = agent.replace(normalizer=agent.normalizer.replace(mean=jnp.arange(6.0)))
    key = jax.random.key(6)
    trained = fit(agent, pairs, key, num_updates=4, batch_size=3, folder=tmp_path, log_every=2, checkpoint_every=2)
    loaded = load_agent(tmp_path, training, observation_dim=6, action_dim=2)
    assert int(loaded.step) == 4
    observations = rng.normal(size=(7, 6))
    np.testing.assert_array_equal(loaded.act(observations), trained.act(observations))
    assert not np.array_equal(loaded.act(observations), agent.act(observations))
    with pytest.raises(ValueError, match="does not fit this agent and configuration"):
        load_agent(tmp_path, training, observation_dim=5, action_dim=2)


def test_a_folder_without_checkpoints_holds_no_agent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        load_agent(tmp_path, TRAININGS["bc"], observation_dim=6, action_dim=2)


def test_collecting_again_keeps_a_store_that_was_finished_just_before_a_crash(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    context = JobContext(tmp_path, values={}, folders={}, progress=lambda done, total: told.append((done, total)))
    env = {"name": "metaworld/door-open-v3", "horizon": 10}
    arguments = {"env": env, "policy": Random(), "episodes": 2, "first_seed": 5}

    first = collect(context, **arguments)
    again = collect(context, **arguments)

    assert again == first
    assert told == [(1, 2), (2, 2)]  # nothing was rolled out the second time
