"""From a scripted robot to a robomimic file to a policy, in the environment that the file says it was recorded in."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from agents.bc import BCAgent, BCConfig
from robopref import cli
from robopref.agent import AgentPolicy
from robopref.conversion import open_episodes
from robopref.datasets import TransitionDataset, fit_normalizer
from robopref.episodes import load_episodes
from robopref.evaluation import success_interval
from robopref.rollouts import RolloutWorkers
from robopref.training import fit

pytestmark = [
    pytest.mark.robomimic,
    pytest.mark.skipif(
        importlib.util.find_spec("robosuite") is None,
        reason="robosuite is not installed: `make robomimic` installs it and runs these tests.",
    ),
]

EPISODES, UPDATES, TRIALS = 200, 3000, 50


def robopref(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


def test_behaviour_cloning_of_a_robomimic_file_lifts_the_cube(tmp_path: Path) -> None:
    """At least 90% of 50 trials succeed, from initial states that the file does not have."""
    collected, file, back = tmp_path / "collected", tmp_path / "lift.hdf5", tmp_path / "back"
    lift = ("robosuite/Lift", collected, "--episodes", EPISODES, "--noise", 0.1, "--horizon", 60, "--keep-states")
    robopref("data", "collect", *lift, "--seed", 1000)
    robopref("data", "convert", collected, file, "--to", "robomimic")
    robopref("data", "convert", file, back)

    with open_episodes(file) as source:
        env_args = source.env
        assert list(source.keys) == ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object"]
    assert (env_args["env_name"], env_args["type"]) == ("Lift", 1)
    dataset = load_episodes(back)
    assert dataset.hash == load_episodes(collected).hash
    assert dataset.successes.mean() >= 0.95
    robosuite = envs.make(env_args).unwrapped
    for index in (0, 7):
        states = load_episodes(collected).episode(index).states
        np.testing.assert_array_equal(dataset.episode(index).states, states)
        with h5py.File(file) as written:
            demo = written[f"data/demo_{index}"]
            # What robomimic's own tools put back: time, positions and velocities.
            np.testing.assert_array_equal(demo["states"], robosuite.flat_states(states)[:-1])
            assert "<mujoco" in demo.attrs["model_file"]

    data = TransitionDataset.create(dataset)
    agent = BCAgent.create(
        BCConfig(decay_updates=UPDATES),
        data.take(jnp.arange(2)),
        jax.random.key(0),
        normalizer=fit_normalizer(dataset),
    )
    agent = fit(agent, data, jax.random.key(1), num_updates=UPDATES, batch_size=256)
    with RolloutWorkers(partial(envs.make, env_args), lanes=1) as workers:
        trials = workers.run(AgentPolicy(agent), range(TRIALS), stop_on_success=True)
    found = success_interval([trial.succeeded for trial in trials])
    assert found.mean >= 0.9, found
