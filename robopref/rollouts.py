"""Episodes from simulators: parallel processes, each stepping a few environments at once with batched inference.

Collection and evaluation both come here. An episode depends on its seed, its policy and its environment alone, not on
the number of processes or on which other episodes happened to run beside it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Float

from robopref.files import Closing
from robopref.processes import end_with_parent
from robopref.progress import ProgressCallback
from robopref.types import Episode, Policy

MakeEnv = Callable[[], gymnasium.Env[Any, Any]]


class RolloutWorkers(Closing):
    """Environments that stay open between calls of `run`, in this process or in several.

    Use it as a context manager:

        with RolloutWorkers(make_env, processes=2, lanes=8) as workers:
            episodes = workers.run(policy, seeds=range(100))

    Args:
        make_env: makes one environment with a time limit of its own; picklable if there are processes.
        processes: worker processes; 0 steps everything in this process.
        lanes: environments stepped side by side in each process, with one call of the policy for all of them.
    """

    def __init__(self, make_env: MakeEnv, *, processes: int = 0, lanes: int = 8) -> None:
        if processes < 0 or lanes < 1:
            raise ValueError(f"processes must be at least 0 and lanes at least 1, not {processes} and {lanes}")
        self._make_env = make_env
        self._processes = processes
        self._lanes = lanes
        self._local: _Lanes | None = None
        self._pool: ProcessPoolExecutor | None = None

    def close(self) -> None:
        """Ends the processes and closes the environments of this one."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        if self._local is not None:
            self._local.close()
            self._local = None

    def run(
        self,
        policy: Policy,
        seeds: Sequence[int],
        *,
        keep_states: bool = False,
        stop_on_success: bool = False,
        progress: ProgressCallback | None = None,
    ) -> list[Episode]:
        """One episode for each seed, in their order.

        Args:
            policy: picklable if there are worker processes.
            seeds: what the environments are reset with, and what the policy's own randomness starts from.
            keep_states: also keep the full simulator state at every step (the environment must have `get_state`).
            stop_on_success: cut an episode off (truncated) at its first success, which is enough to count successes.
            progress: called with the episodes finished and their number.

        Raises:
            RuntimeError: if a worker process died.
        """
        chunks = [list(seeds[i : i + self._lanes]) for i in range(0, len(seeds), self._lanes)]
        options = {"keep_states": keep_states, "stop_on_success": stop_on_success}
        finished = 0
        results: dict[int, list[Episode]] = {}

        def finish(index: int, episodes: list[Episode]) -> None:
            nonlocal finished
            results[index] = episodes
            finished += len(episodes)
            if progress is not None:
                progress(finished, len(seeds))

        if self._processes == 0:
            if self._local is None:
                self._local = _Lanes(self._make_env, self._lanes)
            for index, chunk in enumerate(chunks):
                finish(index, self._local.run(policy, chunk, **options))
        else:
            pool = self._open_pool()
            try:
                # A pool whose process died between two runs says so only now.
                futures = {pool.submit(_run_in_worker, policy, chunk, options): i for i, chunk in enumerate(chunks)}
                for future in as_completed(futures):
                    finish(futures[future], future.result())
            except BrokenProcessPool as error:
                self._pool = None
                raise RuntimeError(
                    "a process that steps environments died (killed, or out of memory); run the same command again,"
                    " with fewer processes if memory was short"
                ) from error
        return [episode for index in range(len(chunks)) for episode in results[index]]

    def _open_pool(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Spawned, not forked: a forked copy of a process in which JAX has started its threads can deadlock.
            self._pool = ProcessPoolExecutor(
                self._processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(self._make_env, self._lanes),
            )
        return self._pool


class _Lanes:
    """A few environments stepped in lock-step with one call of the policy per time step."""

    def __init__(self, make_env: MakeEnv, count: int) -> None:
        self._make_env = make_env
        self._count = count
        self._envs: list[gymnasium.Env[Any, Any]] = []

    def close(self) -> None:
        for env in self._envs:
            env.close()

    def run(self, policy: Policy, seeds: Sequence[int], *, keep_states: bool, stop_on_success: bool) -> list[Episode]:
        while len(self._envs) < len(seeds):
            self._envs.append(self._make_env())
        recorders = [
            EpisodeRecorder(env, seed, keep_states=keep_states) for env, seed in zip(self._envs, seeds, strict=False)
        ]
        # Unused lanes repeat the last one, so that the policy always sees one batch size: one compilation, and an
        # episode's actions that do not depend on how many others run beside it.
        padding = self._count - len(seeds)
        carry = policy.start(np.asarray([*seeds, *[seeds[-1]] * padding]))
        while any(recorder.running for recorder in recorders):
            observations = np.stack([recorder.observation for recorder in recorders])
            observations = np.concatenate([observations, np.repeat(observations[-1:], padding, axis=0)])
            actions, carry = policy.step(carry, observations)
            rewards = np.zeros(self._count)
            for lane, (recorder, action) in enumerate(zip(recorders, actions, strict=False)):
                if recorder.running:
                    rewards[lane] = recorder.step(action, stop_on_success=stop_on_success)
            carry = tell(policy, carry, rewards)
        return [recorder.episode(policy.describe(seed)) for recorder, seed in zip(recorders, seeds, strict=True)]


def tell(policy: Policy, carry: Any, rewards: Float[np.ndarray, " B"]) -> Any:
    """The carry of a policy after a step of B environments; a `RewardedPolicy` is told the rewards."""
    # By name: at every step, asking whether it keeps the whole protocol would cost as much as a step of a small robot.
    receive = getattr(policy, "receive", None)
    return carry if receive is None else receive(carry, rewards)


class EpisodeRecorder:
    """One episode of one environment as it grows.

    Args:
        env: reset at once, with this seed.
        keep_states: also keep the full simulator state at every step (the environment must have `get_state`).
    """

    def __init__(self, env: gymnasium.Env[Any, Any], seed: int, *, keep_states: bool = False) -> None:
        self._env = env
        self._seed = int(seed)
        self._keep_states = keep_states
        observation, info = env.reset(seed=self._seed)
        self._observations = [observation]
        self._infos = [_scalars(info)]
        self._states = [env.unwrapped.get_state()] if keep_states else []  # type: ignore[attr-defined]
        self._actions: list[np.ndarray] = []
        self._rewards: list[float] = []
        self.terminated = self._truncated = False

    @property
    def running(self) -> bool:
        return not (self.terminated or self._truncated)

    @property
    def steps(self) -> int:
        return len(self._actions)

    @property
    def observation(self) -> np.ndarray:
        """The present one."""
        observation: np.ndarray = self._observations[-1]
        return observation

    def step(self, action: np.ndarray, *, stop_on_success: bool = False) -> float:
        """Acts and returns the reward; `stop_on_success` cuts the episode off (truncated) at its first success."""
        # A copy: `actions` of a policy may be a view into a buffer that it fills again at the next step.
        action = np.array(action, dtype=self._env.action_space.dtype)
        observation, reward, terminated, truncated, info = self._env.step(action)
        self._actions.append(action)
        self._rewards.append(float(reward))
        self._observations.append(observation)
        self._infos.append(_scalars(info))
        if self._keep_states:
            self._states.append(self._env.unwrapped.get_state())  # type: ignore[attr-defined]
        self.terminated = bool(terminated)
        cut = stop_on_success and bool(info.get("success", False)) and not self.terminated
        self._truncated = bool(truncated) or cut
        return float(reward)

    def episode(self, origin: Mapping[str, str | float]) -> Episode:
        """The episode so far."""
        # An environment need not report on reset what it reports on steps; a quantity counts as zero there.
        names = sorted(set().union(*self._infos))
        return Episode(
            observations=np.stack(self._observations),
            actions=np.stack(self._actions),
            rewards=np.asarray(self._rewards),
            terminated=self.terminated,
            truncated=self._truncated,
            infos={name: np.asarray([info.get(name, 0) for info in self._infos]) for name in names},
            states=np.stack(self._states) if self._keep_states else None,
            seed=self._seed,
            origin=origin,
        )


def _scalars(info: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in info.items() if np.isscalar(value) and not isinstance(value, str)}


# A worker process keeps its environments here between tasks: an executor gives its initializer no other place.
_worker: _Lanes | None = None


def _start_worker(make_env: MakeEnv, lanes: int) -> None:
    global _worker
    end_with_parent()
    _worker = _Lanes(make_env, lanes)


def _run_in_worker(policy: Policy, seeds: Sequence[int], options: dict[str, bool]) -> list[Episode]:
    if _worker is None:
        raise RuntimeError("this process was not started as a rollout worker")
    return _worker.run(policy, seeds, **options)


def film_episode(
    env: gymnasium.Env[Any, Any], policy: Policy, seed: int, *, every: int = 2, hold: int = 0
) -> tuple[list[np.ndarray], list[bool]]:
    """Renders one episode.

    Args:
        env: one whose `render` gives uint8 [H, W, 3].
        every: steps between two frames.
        hold: steps for which the film goes on after the first success, before it ends early.

    Returns:
        The frames, and for each whether the task had been solved by then.
    """
    observation, _ = env.reset(seed=seed)
    carry = policy.start(np.asarray([seed]))
    frames, solved_by = [_frame(env)], [False]
    step, solved_at, over = 0, None, False
    while not over:
        actions, carry = policy.step(carry, np.asarray(observation)[None])
        observation, reward, terminated, truncated, info = env.step(np.array(actions[0], env.action_space.dtype))
        carry = tell(policy, carry, np.asarray([reward], float))
        step += 1
        if solved_at is None and info.get("success", False):
            solved_at = step
        over = bool(terminated or truncated) or (solved_at is not None and step >= solved_at + hold)
        if step % every == 0 or over:
            frames.append(_frame(env))
            solved_by.append(solved_at is not None)
    return frames, solved_by


def _frame(env: gymnasium.Env[Any, Any]) -> np.ndarray:
    return np.asarray(env.render())
