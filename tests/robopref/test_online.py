"""Online training: what is learned, what is stored, and that nothing shows where a run was interrupted."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from agents.sac import SACAgent, SACConfig
from robopref import online
from robopref.agent import AgentPolicy
from robopref.datasets import TransitionDataset
from robopref.online import OnlineConfig, OnlineState, fit_online
from robopref.replay import ReplayBuffer
from robopref.rollouts import RolloutWorkers
from robopref.training import checkpoints, read_metrics
from robopref.types import Episode, Key, Metrics, Transitions

HORIZON = 15
REACH = 0.2
CONFIG = OnlineConfig(lanes=2, random_steps=8, batch_size=4)


class PointEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A point on a line that is to go to 0 and stay there; a reward is minus the distance. Below -1.5 it is lost."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        self._place, self._steps = float(np.random.default_rng(seed).uniform(-1, 1)), 0
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._place += REACH * float(action[0])
        self._steps += 1
        observation, info = self._observe()
        return observation, -abs(self._place), self._place < -1.5, self._steps >= HORIZON, info

    def _observe(self) -> tuple[np.ndarray, dict[str, Any]]:
        return np.array([self._place]), {"success": abs(self._place) < 0.1, "name": "point"}


class FragileEnv(PointEnv):
    """Fails at its third step."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self._steps == 2:
            raise RuntimeError("the motor came off")
        return super().step(action)


class DyingEnv(PointEnv):
    """Takes its process with it at its third step."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self._steps == 2:
            os._exit(1)
        return super().step(action)


class WideEnv(PointEnv):
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)


class OtherEnv(PointEnv):
    def _observe(self) -> tuple[np.ndarray, dict[str, Any]]:
        return np.array([self._place, 0.0]), {}


def example() -> Transitions:
    return Transitions(jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.zeros(1), jnp.zeros((1, 1)), jnp.zeros(1, bool))


class Recorder(struct.PyTreeNode):
    """An agent that learns nothing: it goes to the left, and keeps the sum of the rewards of its batches."""

    step: jax.Array
    total: jax.Array
    negative: jax.Array

    @classmethod
    def fresh(cls) -> Recorder:
        return cls(step=jnp.zeros((), jnp.int32), total=jnp.zeros(()), negative=jnp.zeros((), jnp.int32))

    def update(self, batch: Transitions, key: Key) -> tuple[Recorder, Metrics]:
        after = self.replace(
            step=self.step + 1,
            total=self.total + jnp.sum(batch.rewards),
            negative=self.negative + jnp.sum(batch.observations < -50),
        )
        return after, {"recorder/largest": jnp.max(batch.rewards)}

    def sample_actions(self, observations: jax.Array, key: Key) -> jax.Array:
        return jnp.full((*observations.shape[:-1], 1), -1.0)

    def act(self, observations: jax.Array) -> jax.Array:
        return jnp.full((*observations.shape[:-1], 1), -1.0)


def record(
    num_steps: int, config: OnlineConfig = CONFIG, *, capacity: int = 1000, replay: Any = None, **options: Any
) -> OnlineState[Any]:
    state = OnlineState.create(Recorder.fresh(), replay or ReplayBuffer.create(capacity, example()))
    make_env = options.pop("make_env", PointEnv)
    options = {"log_every": num_steps, **options}
    return fit_online(state, make_env, jax.random.key(3), config=config, num_steps=num_steps, **options)


def test_transitions_are_those_of_the_episodes() -> None:
    episodes: list[Episode] = []
    state = record(200, on_episode=episodes.append)
    assert int(state.env_steps) == 200
    assert int(state.replay.size) == 200
    assert sum(map(len, episodes)) == 200
    assert len({episode.seed for episode in episodes}) == len(episodes)
    stored = state.replay.stored()
    kept = {
        tuple(np.concatenate(row).tolist())
        for row in zip(
            stored.observations,
            stored.actions,
            stored.rewards[:, None],
            stored.next_observations,
            stored.terminated[:, None],
            strict=True,
        )
    }
    lived = set()
    for episode in episodes:
        env = PointEnv()
        observation, _ = env.reset(seed=episode.seed)
        for step, action in enumerate(episode.actions):
            reached, reward, terminated, truncated, info = env.step(action)
            assert reward == episode.rewards[step]
            np.testing.assert_array_equal(reached, episode.observations[step + 1])
            assert info["success"] == episode.infos["success"][step + 1]
            row = np.concatenate([observation, action, [reward], reached, [terminated]]).astype(np.float32)
            lived.add(tuple(row.tolist()))
            observation = reached
        assert (terminated, truncated) == (episode.terminated, len(episode) == HORIZON)
    assert kept == lived
    # Going left, some are lost; the run's end cuts off what is under way.
    assert any(episode.terminated for episode in episodes)
    assert all(episode.terminated or episode.truncated for episode in episodes)


def test_it_acts_at_random_first_and_makes_its_updates_after() -> None:
    state = record(40, replace(CONFIG, updates_per_step=1.5))
    actions = state.replay.stored().actions[:, 0]
    assert (actions[:8] != -1).all()
    assert len(np.unique(actions[:8])) == 8
    assert (np.abs(actions[:8]) <= 1).all()
    assert (actions[8:] == -1).all()
    # Three for each of the 16 steps of two lanes that follow the random ones.
    assert int(state.agent.step) == 3 * 16
    assert int(record(40, replace(CONFIG, random_steps=0)).agent.step) == 2 * 19


def test_rewards_are_scaled_for_the_agent_and_not_in_the_log(tmp_path: Path) -> None:
    episodes: list[Episode] = []
    plain = record(64, folder=tmp_path / "plain", on_episode=episodes.append)
    scaled = record(64, replace(CONFIG, reward_scale=0.25), folder=tmp_path / "scaled")
    assert float(plain.agent.total) < 0
    assert float(scaled.agent.total) == pytest.approx(0.25 * float(plain.agent.total), rel=1e-5)
    first, second = (read_metrics(tmp_path / name / "metrics.csv") for name in ("plain", "scaled"))
    whole = [episode for episode in episodes if episode.terminated or len(episode) == HORIZON]
    assert len(whole) >= 2
    for (row,) in (first, second):
        assert (row["step"], row["updates"], row["episodes"]) == (64, 56, len(whole))
        assert row["episode/return"] == pytest.approx(np.mean([episode.rewards.sum() for episode in whole]))
        assert row["episode/length"] == pytest.approx(np.mean([len(episode) for episode in whole]))
        assert row["episode/success"] == pytest.approx(np.mean([episode.succeeded for episode in whole]))
    assert second[0]["recorder/largest"] == pytest.approx(0.25 * first[0]["recorder/largest"], rel=1e-5)


def test_rows_of_metrics_are_not_numbers_where_nothing_happened(tmp_path: Path) -> None:
    record(40, folder=tmp_path, log_every=4)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(4, 41, 4))
    assert [row["updates"] for row in rows] == [0, 0, *range(4, 33, 4)]
    assert np.isnan([row["recorder/largest"] for row in rows[:2]]).all()
    assert np.isfinite([row["recorder/largest"] for row in rows[2:]]).all()
    for row in rows:
        assert np.isnan(row["episode/return"]) == (row["episodes"] == 0)
    assert {row["episodes"] > 0 for row in rows} == {True, False}


class Constant(struct.PyTreeNode):
    """A reward function that says the same of everything."""

    reward: jax.Array

    def __call__(self, steps: Transitions) -> jax.Array:
        return jnp.broadcast_to(self.reward, steps.rewards.shape)


def test_a_reward_function_takes_the_place_of_the_rewards_of_what_is_new() -> None:
    first = record(20, reward_function=Constant(jnp.asarray(3.0)))
    assert (first.replay.stored().rewards == 3).all()
    assert float(first.agent.total) == 3 * CONFIG.batch_size * 12
    second = fit_online(
        first,
        PointEnv,
        jax.random.key(4),
        config=CONFIG,
        num_steps=30,
        log_every=10,
        reward_function=Constant(jnp.asarray(-1.0)),
    )
    assert second.replay.stored().rewards.tolist() == [3] * 20 + [-1] * 10
    # What was given is as it was, although the run overwrites its own buffer.
    assert first.replay.stored().rewards.tolist() == [3] * 20


def far_away(count: int) -> Transitions:
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), example()).replace(
        observations=jnp.full((count, 1), -100.0)
    )


def test_a_seeded_buffer_is_learned_from_at_once() -> None:
    replay = ReplayBuffer.create(100, example()).add(far_away(50))
    config = replace(CONFIG, random_steps=0)
    state = record(10, config, replay=replay)
    # All but what was gathered in the at most four rounds before.
    assert int(state.agent.step) == 10
    assert int(state.agent.negative) > 0.75 * 10 * CONFIG.batch_size
    assert int(state.replay.size) == 60
    assert int(record(10, config).agent.negative) == 0
    full = record(10, config, replay=ReplayBuffer.create(50, example()).add(far_away(50)))
    assert int((full.replay.stored().observations == -100).sum()) == 40


def test_a_share_of_every_batch_is_prior_data() -> None:
    steps = far_away(5)
    prior = TransitionDataset(steps.observations, steps.actions, steps.rewards, steps.terminated, jnp.arange(4))
    state = record(40, replace(CONFIG, prior_share=0.25), prior=prior)
    assert int(state.agent.negative) == int(state.agent.step) == 32


SAC = SACConfig(hidden_dims=(8,))
COUNTS = {"num_steps": 48, "log_every": 8, "checkpoint_every": 16}


def train(folder: Path | None, *, seed: int = 0, **options: Any) -> OnlineState[SACAgent]:
    agent = SACAgent.create(SAC, example(), jax.random.key(seed))
    state = OnlineState.create(agent, ReplayBuffer.create(30, example()))
    options = COUNTS | {"make_env": PointEnv, "config": replace(CONFIG, lanes=4)} | options
    make_env = options.pop("make_env")
    return fit_online(state, make_env, jax.random.key(seed), folder=folder, **options)


def assert_same_bits(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OnlineState[SACAgent]]:
    """A run that was not interrupted."""
    folder = tmp_path_factory.mktemp("online") / "whole"
    return folder, train(folder)


class Interruption(Exception):
    """What these tests stop a run with."""


def stop_at(step: int, reached: int, _: int) -> None:
    if reached == step:
        raise Interruption


def test_an_interrupted_run_ends_with_the_same_bits(
    whole: tuple[Path, OnlineState[SACAgent]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = whole
    assert list(checkpoints(folder)) == [16, 32, 48]
    assert sorted(path.name for path in folder.glob("replay_*")) == ["replay_000000048.safetensors"]
    with pytest.raises(Interruption):
        train(tmp_path, progress=partial(stop_at, 24))
    assert list(checkpoints(tmp_path)) == [16]
    # The second time it is killed when it has written the buffer of a checkpoint, and not yet the agent.
    save = online.save_checkpoint

    def die_before_the_agent(path: Path, *rest: Any) -> None:
        if path.name == "checkpoint_000000032.safetensors":
            raise Interruption
        save(path, *rest)

    monkeypatch.setattr(online, "save_checkpoint", die_before_the_agent)
    with pytest.raises(Interruption):
        train(tmp_path)
    monkeypatch.undo()
    assert list(checkpoints(tmp_path)) == [16]
    made: list[int] = []
    resumed = train(tmp_path, progress=lambda done, _: made.append(done))
    assert made == [24, 32, 40, 48]
    assert_same_bits(resumed, expected)
    assert contents(tmp_path) == contents(folder)


def test_a_finished_run_is_read_and_can_be_made_longer(
    whole: tuple[Path, OnlineState[SACAgent]], tmp_path: Path
) -> None:
    folder, expected = whole
    train(tmp_path, num_steps=32)
    assert_same_bits(train(tmp_path), expected)
    before = contents(tmp_path)
    assert before == contents(folder)
    again = train(tmp_path, progress=lambda *_: pytest.fail("made a step"))
    assert_same_bits(again, expected)
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="has made 48 steps, more than the 32 asked for"):
        train(tmp_path, num_steps=32)


def test_how_often_is_logged_and_who_listens_changes_nothing(whole: tuple[Path, OnlineState[SACAgent]]) -> None:
    seen: list[OnlineState[SACAgent]] = []
    found = train(None, log_every=16, on_checkpoint=lambda state, _: seen.append(state), on_episode=lambda _: None)
    assert_same_bits(found, whole[1])
    assert [int(state.env_steps) for state in seen] == [16, 32, 48]
    # The states that were given out are not overwritten.
    assert [int(state.replay.size) for state in seen] == [16, 30, 30]
    assert np.isfinite(seen[0].replay.stored().rewards).all()


def test_processes_change_nothing(whole: tuple[Path, OnlineState[SACAgent]]) -> None:
    assert_same_bits(train(None, processes=3), whole[1])


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"config": replace(CONFIG, lanes=4, reward_scale=0.5)}, {"checkpoint_every": 24}],
    ids=["seed", "config", "checkpoints"],
)
def test_a_folder_of_another_run_is_refused(changes: dict[str, Any], whole: tuple[Path, OnlineState[SACAgent]]) -> None:
    with pytest.raises(ValueError, match="holds a run with another configuration, data or seed"):
        train(whole[0], **changes)


@pytest.mark.parametrize(
    ("make_env", "processes", "error", "said"),
    [
        (WideEnv, 0, ValueError, r"agents act in \[-1, 1\], but the environment's action space is Box\(-2.0"),
        (WideEnv, 1, ValueError, r"agents act in \[-1, 1\]"),
        (OtherEnv, 0, ValueError, r"observations have shape \[2\], but the agent's and the replay buffer's \[1\]"),
        (FragileEnv, 0, RuntimeError, "the motor came off"),
        (FragileEnv, 1, RuntimeError, "an environment failed: .*the motor came off"),
        (DyingEnv, 1, RuntimeError, "a process that steps environments died"),
    ],
)
def test_what_is_wrong_with_an_environment_is_said(
    make_env: Any, processes: int, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        record(20, make_env=make_env, processes=processes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"config": replace(CONFIG, lanes=0)}, "lanes must be at least 1"),
        ({"config": replace(CONFIG, batch_size=0)}, "batch_size must be at least 1"),
        ({"num_steps": 47}, r"num_steps \(47\) must be a multiple of the number of lanes \(2\)"),
        ({"log_every": 3}, r"log_every \(3\) must be a multiple of the number of lanes"),
        ({"checkpoint_every": 12}, r"checkpoint_every \(12\) must be a multiple of log_every \(8\)"),
        ({"num_steps": 40}, r"num_steps \(40\) must be a multiple of checkpoint_every \(16\)"),
        ({"config": replace(CONFIG, updates_per_step=0.75)}, "must be a whole number of at least 1, not 1.5"),
        ({"config": replace(CONFIG, updates_per_step=0.0)}, "must be a whole number of at least 1, not 0.0"),
    ],
)
def test_counts_that_do_not_fit_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        train(tmp_path / "run", **({"config": CONFIG} | changes))
    assert not (tmp_path / "run").exists()


def test_prior_data_and_buffer_both_get_a_part_of_a_batch() -> None:
    steps = far_away(5)
    prior = TransitionDataset(steps.observations, steps.actions, steps.rewards, steps.terminated, jnp.arange(4))
    for share in (0.0, 0.1, 1.0):
        with pytest.raises(ValueError, match="leaves nothing of a batch of 4 to one of the two sources"):
            record(20, replace(CONFIG, prior_share=share), prior=prior)


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    with pytest.raises(ValueError, match="recorder/largest is no longer a finite number at step 20"):
        record(20, reward_function=Constant(jnp.asarray(jnp.nan)))


def test_the_point_is_learned_to_go_to_its_goal() -> None:
    config = SACConfig(
        hidden_dims=(32, 32), learning_rate=3e-3, discount=0.9, target_update_rate=0.05, initial_temperature=0.05
    )
    state = OnlineState.create(
        SACAgent.create(config, example(), jax.random.key(0)), ReplayBuffer.create(2000, example())
    )
    trained = fit_online(
        state,
        PointEnv,
        jax.random.key(1),
        config=OnlineConfig(lanes=4, random_steps=200, batch_size=64),
        num_steps=1200,
        log_every=1200,
    ).agent
    with RolloutWorkers(PointEnv, lanes=8) as workers:
        returns = [
            [episode.rewards.sum() for episode in workers.run(AgentPolicy(agent), range(100, 124))]
            for agent in (state.agent, trained)
        ]
    places = [abs(PointEnv().reset(seed=seed)[0][0]) for seed in range(100, 124)]
    best = [-sum(max(place - REACH * step, 0) for step in range(1, HORIZON + 1)) for place in places]
    # Within 0.1 per step of the best that can be done, on average, from where it began far from it.
    assert np.mean(best) - np.mean(returns[1]) < 0.1 * HORIZON < np.mean(best) - np.mean(returns[0])
