"""The locomotion data from end to end at their smallest: what is told, what is kept, and that it can be made again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import envs
from experiments import locomotion
from experiments.experiment import rebuild_report
from experiments.locomotion import (
    COMMANDS,
    PRESETS,
    SETS,
    CommandedPolicy,
    Commander,
    dataset_of,
    main,
    medium_step,
    scores,
    training_env,
)
from robopref.episodes import EpisodeDataset
from robopref.rollouts import RolloutWorkers
from robopref.training import checkpoints
from tests.experiments.runs import Run, run_to_the_end

TASK = "Hopper"


def make(folder: Path) -> Run:
    return run_to_the_end(main, replace(PRESETS["smoke"], folder=folder))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(tmp_path_factory.mktemp("locomotion") / "run")


def data(run: Run, kind: str) -> EpisodeDataset:
    return dataset_of(run.folder, TASK, kind)


def test_it_runs_from_end_to_end(run: Run) -> None:
    assert run.status == 0
    assert list(checkpoints(run.folder / "train" / TASK)) == [40, 80]
    manifest = run.results["manifest"]
    assert manifest["data"] == {f"data/{TASK}/{kind}": data(run, kind).hash for kind in SETS}
    assert (run.folder / "report" / "scatters.png").is_file()


def test_the_data_are_made_again_to_the_same_bits(run: Run, tmp_path: Path) -> None:
    again = make(tmp_path / "again")
    assert again.results["manifest"]["data"] == run.results["manifest"]["data"]
    for kind in SETS:
        np.testing.assert_array_equal(data(again, kind).episode(1).states, data(run, kind).episode(1).states)


def test_each_dataset_has_the_skills_that_it_is_named_after(run: Run) -> None:
    medium = run.value(f"judge/{TASK}")["medium"]
    skills = {kind: run.value(f"data/{TASK}/{kind}")["skills"] for kind in SETS}
    until = [step for step in (40, 80) if step <= medium]
    assert skills["medium"] == {f"{medium} steps": 6}
    assert list(skills["medium-replay"]) == ["random", *(f"{step} steps" for step in until)]
    expert = {f"{medium} steps": 3}
    expert["80 steps"] = expert.get("80 steps", 0) + 3
    assert skills["medium-expert"] == expert


def test_episodes_say_what_was_told_and_keep_what_was_done(run: Run) -> None:
    dataset = data(run, "medium-expert")
    told = {name: [] for name in COMMANDS[TASK]}
    for index in range(len(dataset)):
        episode = dataset.episode(index)
        assert len(episode) == 30
        assert episode.states is not None
        for name, (low, high) in COMMANDS[TASK].items():
            assert low <= episode.origin[name] <= high
            told[name].append(episode.origin[name])
        # The plain task's reward, and nothing of the command in what is seen.
        np.testing.assert_array_equal(episode.rewards, episode.infos["task_reward"][1:])
        assert "command_speed" not in episode.infos
    assert dataset.observations.shape[1] == 11
    assert all(len(set(each)) == len(dataset) for each in told.values())
    followed = run.value(f"data/{TASK}/medium-expert")["followed"]
    assert {name: each["told"] for name, each in followed.items()} == told
    half = [dataset.episode(index).infos["x_velocity"][16:].mean() for index in range(len(dataset))]
    np.testing.assert_allclose(followed["speed"]["did"], half)


def test_seeds_of_the_datasets_differ(run: Run) -> None:
    seeds = np.concatenate([data(run, kind).seeds for kind in SETS])
    assert len(np.unique(seeds)) == len(seeds)


def test_a_commanded_policy_acts_in_the_plain_task_as_in_the_one_it_was_trained_in(run: Run) -> None:
    training = run.args.training
    commander = Commander(TASK, training, checkpoints(run.folder / "train" / TASK))
    with envs.make(training_env(TASK, training)) as env:
        seen, info = env.reset(seed=5)
        told = [info[f"command_{name}"] for name in env.command_names]
        plain = np.asarray(seen)[: -len(told)]
    policy = commander.policy(80, told=told, stochastic=False)
    agent = policy.policy.agent
    actions, _ = policy.step(policy.start(np.array([5, 6])), np.stack([plain, plain]))
    np.testing.assert_allclose(actions[0], agent.act(jnp.asarray(seen, jnp.float32)), rtol=1e-5, atol=1e-6)
    assert policy.describe(5) == {
        "behaviour": "commanded, 80 steps",
        "skill": "80 steps",
        "speed": told[0],
        "height": told[1],
    }


def test_commands_follow_from_seeds_and_fill_their_ranges() -> None:
    ranges = np.array([[0.0, 2.0], [1.0, 1.5]])
    policy = CommandedPolicy(None, ranges, None, ("speed", "height"), "any")
    told = np.array([[policy.describe(seed)[name] for name in ("speed", "height")] for seed in range(400)])
    again = np.array([[policy.describe(seed)[name] for name in ("speed", "height")] for seed in range(400)])
    np.testing.assert_array_equal(told, again)
    assert (told >= ranges[:, 0]).all()
    assert (told <= ranges[:, 1]).all()
    np.testing.assert_allclose(told.mean(axis=0), ranges.mean(axis=1), atol=0.1)


def test_medium_is_the_first_checkpoint_a_third_of_the_way() -> None:
    random = [0.0, 20.0]
    assert medium_step({1: [10, 20], 2: [39, 41], 3: [60, 80], 4: [90, 110]}, random) == 2
    assert medium_step({1: [10, 20], 2: [38, 41], 3: [60, 80], 4: [90, 110]}, random) == 3
    # One that lost what it had learned has the first checkpoint that is no worse.
    assert medium_step({1: [15.0], 2: [5.0], 3: [1.0]}, random) == 1


def test_scores_lie_between_random_actions_and_the_last_checkpoint() -> None:
    judged = {"random": [5.0, 15.0], "expert": [100.0, 120.0]}
    np.testing.assert_allclose(scores([10.0, 110.0, 60.0], judged), [0.0, 100.0, 50.0])


def test_random_actions_follow_from_seeds_and_lanes_do_not_matter(run: Run) -> None:
    env = locomotion.plain_env(run.args, TASK)
    policy = locomotion.RandomPolicy(3)
    found = []
    for lanes in (1, 3):
        with RolloutWorkers(lambda: envs.make(env), lanes=lanes) as workers:
            found.append(workers.run(policy, [3, 4, 5]))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
    assert not np.array_equal(found[0][0].actions, found[0][1].actions)


def test_a_report_is_rebuilt_to_the_same_results(run: Run) -> None:
    before = run.results
    rebuild_report(run.folder)
    assert run.results == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("Hoper",)}, "no task 'Hoper'; did you mean Hopper"),
        ({"episodes": 0}, "--episodes must be at least 1"),
        (
            {"training": replace(PRESETS["smoke"].training, env_steps=82)},
            r"must be a multiple of checkpoints times lanes",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main(replace(PRESETS["smoke"], folder=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_every_robot_can_be_told_what_it_is_told() -> None:
    for task in COMMANDS:
        with envs.make(training_env(task, PRESETS["small"].training)) as env:
            assert env.command_names == tuple(COMMANDS[task])
            _, info = env.reset(seed=0)
            assert all(low <= info[f"command_{name}"] <= high for name, (low, high) in COMMANDS[task].items())
