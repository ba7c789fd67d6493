"""The oracle's experiment, from end to end at its smallest, and the gate that stands before labeling."""

from __future__ import annotations

import functools
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import envs
from agents.sac import SACAgent
from experiments import experiment
from experiments.experiment import rebuild_report
from experiments.oracle import (
    LABELINGS,
    PRESETS,
    RECORD,
    REFERENCES,
    Args,
    Gate,
    Oracle,
    RolloutStarts,
    jobs,
    load_oracle,
    main,
    reached,
    returns_from,
    shortcomings,
)
from robopref.configs import from_json, to_json
from robopref.episodes import EpisodeDataset, load_episodes
from robopref.queries import draw_queries
from robopref.training import checkpoints
from tests.experiments.runs import Run, run_to_the_end

TASK = "door-open-v3"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_to_the_end(main, replace(PRESETS["smoke"], folder=tmp_path_factory.mktemp("oracle") / "run"))


@pytest.fixture
def passed(run: Run, tmp_path: Path) -> Path:
    """The folder of the oracle, as if it had passed its examination."""
    folder = Path(shutil.copytree(run.folder / "oracle" / TASK, tmp_path / "oracle"))
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | {"shortcomings": []}))
    return folder


@pytest.fixture(scope="module")
def held_out(run: Run) -> EpisodeDataset:
    return load_episodes(run.folder / "held-out" / TASK / "episodes")


def test_it_runs_from_end_to_end(run: Run) -> None:
    assert run.status == 0
    assert "did not pass and is refused for labeling" in run.said
    assert f"The report is {(run.folder / 'report' / 'report.html').resolve()}\n" in run.said
    assert list(checkpoints(run.folder / "train" / TASK)) == [40, 80]
    assert list(run.value(f"train/{TASK}")["curve"]) == ["40", "80"]


def test_every_figure_has_its_interval(run: Run) -> None:
    rows = {(row["method"], row["metric"]): row for row in run.results["rows"]}
    for (_, metric), row in rows.items():
        assert row["task"] == TASK
        if "Q over" not in metric:
            assert -1 <= row["low"] <= row["mean"] <= row["high"] <= 1
    assert rows["oracle", "success rate"]["n"] == 4
    for words in REFERENCES.values():
        for labeling in LABELINGS:
            assert rows[labeling, f"agreement with {words}"]["n"] <= 6
    agreements = run.value(f"oracle/{TASK}")["agreements"]
    own = rows["direct", f"agreement with {REFERENCES['own']}"]
    assert own["mean"] == pytest.approx(np.mean(agreements["own"]["direct"]))
    points = run.value(f"oracle/{TASK}")["held_out"]
    expected = np.corrcoef(points["q_values"], points["returns"])[0, 1]
    assert rows["oracle", "correlation of Q with return, held-out states and actions"]["mean"] == pytest.approx(
        expected
    )


def test_claims_follow_from_their_intervals(run: Run) -> None:
    claims = run.results["claims"]
    thresholds = {"success": 0.9, "q-values": 0.9}
    assert len({claim["id"] for claim in claims}) == len(claims) == 9
    for claim in claims:
        least = 0.0 if claim["id"].startswith("partial-") else thresholds.get(claim["id"], 0.8)
        verdict = "holds" if claim["low"] > least else "fails" if claim["high"] < least else "undecided"
        assert claim["verdict"] == verdict


def test_the_report_is_rebuilt_from_what_the_jobs_left(run: Run) -> None:
    before = run.results
    rebuild_report(run.folder)
    assert run.results == before


def test_arguments_survive_their_json_form() -> None:
    for args in PRESETS.values():
        assert from_json(Args, json.loads(json.dumps(to_json(args)))) == args


def test_an_oracle_that_did_not_pass_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must not give labels, it did not pass its examination: success 0.000 is b"):
        load_oracle(run.folder / "oracle" / TASK)
    with pytest.raises(FileNotFoundError):
        load_oracle(tmp_path)


def examined(**changes: Any) -> dict[str, Any]:
    """What `examine` finds about an oracle that just passes."""
    agreements = {
        "telescoped": {"direct": [1, 1, 1, 1, 0]},
        "own": {"direct": [1, 0.5, 1, 1, 0.5], "telescoped": [0, 1, 1, 1, 1]},
    }
    return {
        "successes": [True] * 9 + [False],
        "held_out": {"q_values": [1, 2, 3], "returns": [10, 20, 30], "episodes": [0, 1, 2]},
        "agreements": agreements,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "short"),
    [
        ({}, []),
        ({"successes": [True] * 8 + [False] * 2}, ["success 0.800 is below 0.9"]),
        (
            {"held_out": {"q_values": [1, 2, 3], "returns": [1, 3, 2], "episodes": [0, 1, 2]}},
            ["correlation 0.500 is below 0.9"],
        ),
        (
            {"held_out": {"q_values": [1, 1, 1], "returns": [1, 3, 2], "episodes": [0, 1, 2]}},
            ["correlation nan is below 0.9"],
        ),
        (
            {"agreements": {"telescoped": {"direct": [1, 0]}, "own": {"direct": [1, 1], "telescoped": [0, 1, 1]}}},
            [
                "agreement of direct with telescoped 0.500 is below 0.8",
                "agreement of telescoped with the simulator 0.667 is below 0.8",
            ],
        ),
    ],
)
def test_the_gate_says_where_an_oracle_falls_short(changes: dict[str, Any], short: list[str]) -> None:
    assert shortcomings(Gate(), examined(**changes)) == short
    assert reached(examined())["agreement of direct with the simulator"] == pytest.approx(0.8)


def test_an_oracle_that_passed_answers_in_the_unit_of_the_reward(
    run: Run, passed: Path, held_out: EpisodeDataset
) -> None:
    loaded = load_oracle(passed)
    observations, actions = held_out.observations[:7], held_out.actions[:7]
    # Trained on a tenth of the rewards.
    direct = loaded.agent.q_values(np.float32(observations), np.float32(actions))
    np.testing.assert_allclose(loaded.q_values(observations, actions), np.asarray(direct) / 0.1, rtol=1e-4)
    values = loaded.values(observations)
    np.testing.assert_array_equal(values, loaded.values(observations))
    np.testing.assert_allclose(values[3:5], loaded.values(observations[3:5]), rtol=1e-4)
    many = np.broadcast_to(np.float32(observations), (500, *observations.shape))
    draws = np.asarray(jax.jit(SACAgent.sample_actions)(loaded.agent, many, jax.random.key(1)))
    every = loaded.q_values(many.reshape(-1, many.shape[-1]), draws.reshape(-1, draws.shape[-1])).reshape(500, 7)
    assert (np.abs(values - every.mean(axis=0)) < 5 * every.std(axis=0) / np.sqrt(64)).all()
    assert loaded.discount == run.args.training.agent.discount
    assert loaded.env == {"name": f"metaworld/{TASK}", "horizon": run.args.horizon}


def test_its_teachers_label_by_its_values(passed: Path, held_out: EpisodeDataset) -> None:
    loaded = load_oracle(passed)
    queries = draw_queries(held_out, np.random.default_rng(0), count=5, length=4)
    steps = loaded.discount ** np.arange(4)
    flat = queries.observations.reshape(-1, queries.observations.shape[-1])
    values = loaded.values(flat).reshape(5, 2, 4)
    q_values = loaded.q_values(flat, queries.actions.reshape(len(flat), -1)).reshape(5, 2, 4)
    full = loaded.teacher("full")
    np.testing.assert_allclose(full.segment_regrets(queries), (values - q_values) @ steps, rtol=1e-4, atol=1e-3)
    last = loaded.values(queries.last_observations.reshape(10, -1)).reshape(5, 2)
    earned = queries.rewards @ steps + loaded.discount**4 * last
    telescoped = loaded.teacher("deterministic")
    np.testing.assert_allclose(telescoped.segment_regrets(queries), values[..., 0] - earned, rtol=1e-4, atol=1e-3)
    labels = loaded.teacher("full", temperature=5.0, soft=True).label(queries, jax.random.key(0))
    assert labels.parameters["source"] == f"SAC oracle metaworld/{TASK}"
    assert ((labels.values > 0) & (labels.values < 1)).all()


def test_returns_are_those_of_the_simulator(passed: Path, held_out: EpisodeDataset) -> None:
    """With a policy whose noise is negligible, stepping one environment by hand gives the same sums."""
    loaded = load_oracle(passed)
    quiet = replace(loaded.agent.config, log_std_bounds=(-30.0, -29.0))
    loaded = Oracle(loaded.agent.replace(config=quiet), loaded.env, loaded.reward_scale, "test")
    episodes, steps = np.array([0, 1, 2]), np.array([0, 19, 7])
    states = held_out.states_at(episodes, steps)
    actions = held_out.actions[held_out.offsets[episodes] + steps]
    found = returns_from(loaded, states, actions, tail=5, first=0, lanes=2)
    env = envs.make({**loaded.env, "horizon": 100})
    env.reset(seed=0)
    for state, action, value in zip(states, actions, found, strict=True):
        env.set_state(state)
        expected = 0.0
        for step in range(5):
            observation, reward, *_ = env.step(action)
            expected += loaded.discount**step * reward
            action = np.asarray(loaded.agent.act(np.float32(observation)))
        assert value == pytest.approx(expected, rel=1e-4)


def test_episodes_begin_in_states_of_the_rollouts(held_out: EpisodeDataset) -> None:
    env = envs.make({"name": f"metaworld/{TASK}", "horizon": 30})
    starts, never = RolloutStarts(env, held_out, 1.0), RolloutStarts(env, held_out, 0.0)
    seen = {tuple(row) for row in held_out.observations}
    first = [starts.reset(seed=seed)[0] for seed in range(8)]
    assert {tuple(observation) for observation in first} <= seen
    assert len({tuple(observation) for observation in first}) > 5
    # What follows is what followed in the rollout.
    rows = [index for index, row in enumerate(held_out.observations) if tuple(row) == tuple(first[-1])]
    reached, *_ = starts.step(held_out.actions[rows[0]])
    np.testing.assert_array_equal(reached, held_out.observations[rows[0] + 1])
    np.testing.assert_array_equal(starts.reset(seed=3)[0], first[3])
    np.testing.assert_array_equal(never.reset(seed=3)[0], env.reset(seed=3)[0])
    half = RolloutStarts(env, held_out, 0.5)
    ordinary = [np.array_equal(half.reset(seed=seed)[0], never.reset(seed=seed)[0]) for seed in range(40)]
    assert 8 <= sum(ordinary) <= 32


def test_rollouts_and_examination_begin_elsewhere() -> None:
    args = replace(PRESETS["small"], tasks=(TASK, "drawer-open-v3"))
    by_name = {job.name: job for job in jobs(args)}
    assert len(by_name) == 8
    trained, held = (by_name[f"{name}/{TASK}"].arguments for name in ("episodes", "held-out"))
    collected = range(trained["first_seed"], trained["first_seed"] + trained["episodes"])
    assert not set(collected) & set(range(held["first_seed"], held["first_seed"] + held["episodes"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": ()},
        {"tasks": (TASK, TASK)},
        {"tasks": ("door-opn-v3",)},
        {"seed": -1},
        {"episodes": 0},
        {"held_out_episodes": 0},
        {"length": 21},
        {"cores": 0},
        {"training": replace(PRESETS["smoke"].training, env_steps=79)},
        {"training": replace(PRESETS["smoke"].training, horizon=19)},
        {"training": replace(PRESETS["smoke"].training, starts=1.5)},
        {"examination": replace(PRESETS["smoke"].examination, pairs=0)},
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "run_grid", functools.partial(pytest.fail, "the jobs were started"))
    with pytest.raises(ValueError, match=r"\w") as raised:
        main(replace(PRESETS["smoke"], folder=tmp_path / "run", **changes), Console(file=io.StringIO()))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
