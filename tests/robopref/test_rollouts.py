from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import pytest

from robopref.rollouts import RolloutWorkers, film_episode, tell
from robopref.types import Episode, Policy


class Walk(gymnasium.Env[Any, Any]):
    """A point [2] that drifts as its seed says and moves as it is told; episodes end in all of the possible ways.

    It is solved beyond `goal` along the first axis, and terminates beyond `edge` along the second.
    """

    def __init__(self, horizon: int = 12, goal: float = 100.0, edge: float = 100.0, lethal_seed: int = -1) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._horizon, self._goal, self._edge, self._lethal_seed = horizon, goal, edge, lethal_seed
        self._state = np.zeros(5)
        self.closed = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed == self._lethal_seed:
            os.kill(os.getpid(), signal.SIGKILL)
        # Position, drift and time.
        self._state = np.concatenate([self.np_random.normal(size=2), 0.1 * self.np_random.normal(size=2), [0.0]])
        return self._state[:2].copy(), {"success": False, "note": "text is not kept", "pid": os.getpid()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action.dtype == np.float32
        self._state[:2] += action + self._state[2:4]
        self._state[4] += 1
        position = self._state[:2].copy()
        info = {
            "success": bool(position[0] > self._goal),
            "distance": float(np.abs(position).sum()),
            "pid": os.getpid(),
        }
        terminated, truncated = bool(position[1] > self._edge), bool(self._state[4] >= self._horizon)
        return position, float(position.sum()), terminated, truncated, info

    def get_state(self) -> np.ndarray:
        return self._state.copy()

    def set_state(self, state: np.ndarray) -> np.ndarray:
        self._state = state.copy()
        return self._state[:2].copy()

    def render(self) -> Any:
        return np.full((4, 6, 3), int(self._state[4]), np.uint8)

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class Push:
    """Acts by what it sees and by noise that follows from the seed; gives out the same buffer at every step."""

    push: tuple[float, float] = (0.0, 0.0)
    noise: float = 0.5

    def start(self, seeds: np.ndarray) -> Any:
        return [np.random.default_rng(int(seed)) for seed in seeds], np.empty((len(seeds), 2), np.float64)

    def step(self, carry: Any, observations: np.ndarray) -> tuple[np.ndarray, Any]:
        generators, buffer = carry
        noise = np.array([generator.normal(size=2) for generator in generators])
        buffer[:] = np.clip(self.push + self.noise * noise - 0.01 * observations, -1, 1)
        return buffer, carry

    def describe(self, seed: int) -> Mapping[str, str | float]:
        return {"behaviour": "push", "seed": float(seed)}


def by_hand(env: Walk, policy: Push, seed: int) -> Episode:
    """The episode of one seed, written out."""
    observation, info = env.reset(seed=seed)
    observations, actions, rewards, infos, states = [observation], [], [], [info], [env.get_state()]
    carry = policy.start(np.array([seed]))
    terminated = truncated = False
    while not terminated and not truncated:
        action, carry = policy.step(carry, observation[None])
        actions.append(action[0].astype(np.float32))
        observation, reward, terminated, truncated, info = env.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
        infos.append(info)
        states.append(env.get_state())
    return Episode(
        observations=np.array(observations),
        actions=np.array(actions),
        rewards=np.array(rewards),
        terminated=terminated,
        truncated=truncated,
        infos={name: np.array([each.get(name, 0) for each in infos]) for name in ("success", "distance")},
        states=np.array(states),
        seed=seed,
        origin={"behaviour": "push", "seed": float(seed)},
    )


def assert_same(first: Episode, second: Episode) -> None:
    for name in ("observations", "actions", "rewards"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    for name in ("terminated", "truncated", "seed", "origin"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("success", "distance"):
        np.testing.assert_array_equal(first.infos[name], second.infos[name])
    assert (first.states is None) == (second.states is None)
    if first.states is not None:
        np.testing.assert_array_equal(first.states, second.states)


def run(
    seeds: Sequence[int],
    *,
    processes: int = 0,
    lanes: int = 4,
    policy: Policy | None = None,
    make_env: Any = Walk,
    **options: Any,
) -> list[Episode]:
    with RolloutWorkers(make_env, processes=processes, lanes=lanes) as workers:
        return workers.run(policy or Push(), seeds, **options)


# With these edges and goals some episodes of the first ten seeds end in each way, and at different times.
MIXED = functools.partial(Walk, goal=2.0, edge=3.0)
DRIFTING = Push(push=(0.3, 0.3))


@pytest.mark.parametrize("lanes", [1, 3, 4, 16])
def test_episodes_are_as_written_out_by_hand(lanes: int) -> None:
    episodes = run(range(10), lanes=lanes, make_env=MIXED, policy=DRIFTING, keep_states=True)
    assert [episode.seed for episode in episodes] == list(range(10))
    for seed, episode in enumerate(episodes):
        assert_same(episode, by_hand(MIXED(), DRIFTING, seed))
        assert sorted(episode.infos) == ["distance", "pid", "success"]
    assert len({len(episode) for episode in episodes}) > 2
    assert {episode.terminated for episode in episodes} == {True, False}
    assert all(episode.truncated or episode.terminated for episode in episodes)


def test_an_episode_does_not_depend_on_what_runs_beside_it_or_before() -> None:
    together = run(range(10), make_env=MIXED, policy=DRIFTING)
    with RolloutWorkers(MIXED, lanes=4) as workers:
        for seed in (7, 2):
            assert_same(workers.run(DRIFTING, [seed])[0], together[seed])
        for found, expected in zip(workers.run(DRIFTING, [9, 8, 7, 6, 5, 4]), together[:3:-1], strict=True):
            assert_same(found, expected)
        assert workers.run(DRIFTING, []) == []
        twice = workers.run(DRIFTING, [3, 3])
        assert_same(twice[0], together[3])
        assert_same(twice[1], together[3])


def test_processes_give_the_same_episodes_and_progress() -> None:
    seen: list[tuple[int, int]] = []
    with RolloutWorkers(MIXED, processes=2, lanes=3) as workers:
        found = workers.run(
            DRIFTING, range(10), keep_states=True, progress=lambda done, total: seen.append((done, total))
        )
        again = workers.run(DRIFTING, [4], stop_on_success=True)
    assert os.getpid() not in np.concatenate([episode.infos["pid"] for episode in found])
    for episode, expected in zip(found, run(range(10), make_env=MIXED, policy=DRIFTING, keep_states=True), strict=True):
        assert_same(episode, expected)
    assert_same(again[0], run([4], make_env=MIXED, policy=DRIFTING, stop_on_success=True)[0])
    # Chunks of 3, 3, 3 and 1 seeds, whose order is not known.
    assert [total for _, total in seen] == [10] * 4
    assert sorted(np.diff([0, *(done for done, _ in seen)])) == [1, 3, 3, 3]


def test_progress_in_this_process() -> None:
    seen: list[tuple[int, int]] = []
    run(range(10), progress=lambda *args: seen.append(args))
    assert seen == [(4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize("stochastic", [False, True])
def test_an_agents_episode_does_not_depend_on_others_beside_it(stochastic: bool) -> None:
    import jax
    import jax.numpy as jnp

    from agents.bc import BCAgent, BCConfig
    from robopref.agent import AgentPolicy
    from robopref.types import Transitions

    example = Transitions(jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.zeros(2), jnp.zeros((2, 2)), jnp.zeros(2, bool))
    agent = BCAgent.create(BCConfig(hidden_dims=(64, 64)), example, jax.random.key(0))
    policy = AgentPolicy(agent, stochastic=stochastic)
    together = run(range(6), policy=policy)
    for seeds in ([0], [2, 0], [5, 4, 3, 2, 1]):
        for seed, episode in zip(seeds, run(seeds, policy=policy), strict=True):
            assert_same(episode, together[seed])


def test_states_can_be_put_back() -> None:
    episode = run([5], keep_states=True)[0]
    assert episode.states is not None
    assert episode.states.shape == (len(episode) + 1, 5)
    env = Walk()
    env.reset(seed=0)
    for step in (0, 4, len(episode)):
        np.testing.assert_array_equal(env.set_state(episode.states[step]), episode.observations[step])
    env.set_state(episode.states[4])
    for step in range(4, len(episode)):
        observation, reward, *_ = env.step(episode.actions[step])
        np.testing.assert_array_equal(observation, episode.observations[step + 1])
        assert reward == episode.rewards[step]
    assert run([5])[0].states is None


def test_the_first_success_ends_an_episode_if_asked() -> None:
    make_env, policy = functools.partial(Walk, goal=1.0), Push(push=(0.5, 0.0), noise=0.1)
    whole, cut = (run(range(5), make_env=make_env, policy=policy, stop_on_success=stop) for stop in (False, True))
    assert all(episode.succeeded for episode in whole)
    for long, short in zip(whole, cut, strict=True):
        first = int(np.flatnonzero(long.infos["success"])[0])
        assert len(long) == 12
        assert len(short) == max(first, 1)
        assert (short.terminated, short.truncated) == (False, True)
        np.testing.assert_array_equal(short.observations, long.observations[: len(short) + 1])
        np.testing.assert_array_equal(short.actions, long.actions[: len(short)])
    assert len({len(short) for short in cut}) > 1


def test_a_success_that_ends_the_task_is_not_called_a_cut() -> None:
    make_env = functools.partial(Walk, goal=-100.0, edge=-100.0)
    for stop in (False, True):
        episode = run([0], make_env=make_env, stop_on_success=stop)[0]
        assert (len(episode), episode.terminated, episode.truncated) == (1, True, False)


def test_actions_are_not_the_policys_buffer() -> None:
    episode = run([0])[0]
    assert len(np.unique(episode.actions, axis=0)) == len(episode) == 12


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_process_that_dies_while_it_steps_is_explained_and_replaced() -> None:
    with RolloutWorkers(functools.partial(Walk, lethal_seed=3), processes=1, lanes=2) as workers:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"a process that steps environments died .*; run the same command"):
                workers.run(Push(), range(6))
        assert_same(workers.run(Push(), [2])[0], run([2])[0])


def test_a_process_that_dies_between_two_runs_is_explained_and_replaced() -> None:
    with RolloutWorkers(Walk, processes=1, lanes=2) as workers:
        pid = int(workers.run(Push(), [0])[0].infos["pid"][0])
        os.kill(pid, signal.SIGKILL)
        while alive(pid):
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match="a process that steps environments died"):
            workers.run(Push(), [1])
        assert_same(workers.run(Push(), [1])[0], run([1])[0])


def test_processes_and_environments_are_gone_afterwards() -> None:
    made: list[Walk] = []

    def make_env() -> Walk:
        made.append(Walk())
        return made[-1]

    run(range(5), make_env=make_env, lanes=3)
    assert len(made) == 3
    assert all(env.closed for env in made)
    pids = {int(episode.infos["pid"][0]) for episode in run(range(2), processes=1, lanes=1)}
    assert not any(alive(pid) for pid in pids)


def test_counts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="processes must be at least 0 and lanes at least 1, not -1 and 8"):
        RolloutWorkers(Walk, processes=-1)
    with pytest.raises(ValueError, match="not 0 and 0"):
        RolloutWorkers(Walk, lanes=0)


def make_door() -> Any:
    import envs

    return envs.make({"name": "metaworld/door-open-v3", "horizon": 12})


def test_a_real_simulator_gives_the_same_in_another_process_and_continues_from_its_states() -> None:
    from envs.behaviours import Expert

    policy = Expert("door-open-v3", noise=0.3)
    here = run([5, 6, 7], make_env=make_door, policy=policy, lanes=2, keep_states=True)
    there = run([7, 5], make_env=make_door, policy=policy, lanes=1, processes=1, keep_states=True)
    for episode, expected in zip(there, (here[2], here[0]), strict=True):
        for name in ("observations", "actions", "rewards", "states"):
            np.testing.assert_array_equal(getattr(episode, name), getattr(expected, name))
        for name, values in expected.infos.items():
            np.testing.assert_array_equal(episode.infos[name], values)
        assert episode.origin == expected.origin
    env = make_door()
    env.reset(seed=0)
    assert here[1].states is not None
    assert len(here[1].states) == len(here[1]) + 1 == 13
    for step in (0, 9):
        np.testing.assert_array_equal(env.set_state(here[1].states[step]), here[1].observations[step])
    for step in range(9, 12):
        observation, reward, *_ = env.step(here[1].actions[step])
        np.testing.assert_array_equal(observation, here[1].observations[step + 1])
        assert reward == here[1].rewards[step]


QUIET = Push(push=(1.0, 0.0), noise=0.0)


@pytest.mark.parametrize(("horizon", "every", "times"), [(5, 2, [0, 2, 4, 5]), (6, 3, [0, 3, 6]), (1, 5, [0, 1])])
def test_a_film_has_the_first_and_last_moment_and_every_nth_between(horizon: int, every: int, times: list[int]) -> None:
    frames, solved = film_episode(Walk(horizon=horizon), QUIET, 0, every=every)
    assert [int(frame[0, 0, 0]) for frame in frames] == times
    assert {(frame.shape, frame.dtype) for frame in frames} == {((4, 6, 3), np.dtype(np.uint8))}
    assert solved == [False] * len(times)


def test_a_film_ends_some_time_after_the_first_success() -> None:
    first = int(np.flatnonzero(by_hand(Walk(goal=4.0), QUIET, 0).infos["success"])[0])
    assert 2 < first < 9
    for hold in (0, 2):
        frames, solved = film_episode(Walk(goal=4.0), QUIET, 0, every=1, hold=hold)
        assert [int(frame[0, 0, 0]) for frame in frames] == list(range(first + hold + 1))
        assert solved == [time >= first for time in range(first + hold + 1)]
    frames, solved = film_episode(Walk(goal=4.0), QUIET, 0, every=1, hold=50)
    assert len(frames) == 13
    assert film_episode(Walk(edge=-100.0), QUIET, 0, every=4)[1] == [False, False]


@dataclass(frozen=True)
class Accountant(Push):
    """Acts by how much its lane has earned so far."""

    def start(self, seeds: np.ndarray) -> Any:
        return np.zeros(len(seeds))

    def step(self, carry: Any, observations: np.ndarray) -> tuple[np.ndarray, Any]:
        return np.tanh(np.stack([0.1 * carry, -0.1 * carry], axis=1)), carry

    def receive(self, carry: Any, rewards: np.ndarray) -> Any:
        assert rewards.shape == carry.shape
        return carry + rewards


def test_a_policy_that_wants_to_know_is_told_what_it_earned() -> None:
    carry, rewards = np.array([1.0, 2.0]), np.array([0.5, -3.0])
    np.testing.assert_array_equal(tell(Accountant(), carry, rewards), [1.5, -1.0])
    assert tell(Push(), carry, rewards) is carry


def test_each_lane_is_told_its_own_rewards() -> None:
    """Episodes end at different times, and some lanes only fill up the last call: none of this may mix them up."""
    make_env = functools.partial(Walk, edge=1.0)
    for lanes in (1, 3, 8):
        episodes = run(range(7), lanes=lanes, make_env=make_env, policy=Accountant())
        assert len({len(episode) for episode in episodes}) > 2
        for episode in episodes:
            earned = np.concatenate([[0.0], np.cumsum(episode.rewards)[:-1]])
            expected = np.tanh(np.stack([0.1 * earned, -0.1 * earned], axis=1))
            np.testing.assert_allclose(episode.actions, expected, rtol=1e-5, atol=1e-6)


def test_a_film_tells_its_policy_too() -> None:
    told: list[float] = []

    class Listener(Accountant):
        def receive(self, carry: Any, rewards: np.ndarray) -> Any:
            told.extend(rewards)
            return super().receive(carry, rewards)

    film_episode(Walk(horizon=5), Listener(), 2)
    np.testing.assert_allclose(
        told, run([2], make_env=functools.partial(Walk, horizon=5), policy=Accountant())[0].rewards
    )
