"""Steps per second of Meta-World through robopref, against the package's own environment in the same run.

    python -m benchmarks.simulation [--steps 5000]

Both get the same random actions in the same process; ours also keeps exact seeds and states. The last line is of whole
episodes, collected with states in one process and in one process per core.
"""

from __future__ import annotations

import argparse
import functools
import os
import time

import numpy as np

import envs
from envs.behaviours import Expert
from envs.metaworld import bare_env
from robopref.rollouts import RolloutWorkers

TASKS = ("door-open-v3", "drawer-open-v3", "pick-place-v3", "reach-v3")
HORIZON = 100


def package_speed(task: str, actions: np.ndarray) -> float:
    """Steps per second of the package's environment, resets included."""
    env = bare_env(task)
    started = time.perf_counter()
    for index, action in enumerate(actions):
        if index % HORIZON == 0:
            env.reset()
        env.step(action)
    return len(actions) / (time.perf_counter() - started)


def our_speed(task: str, actions: np.ndarray) -> float:
    """The same through `envs.make`, with the state read at every step."""
    env = envs.make({"name": f"metaworld/{task}", "horizon": HORIZON})
    started = time.perf_counter()
    for index, action in enumerate(actions):
        if index % HORIZON == 0:
            env.reset(seed=index)
        env.step(action)
        env.get_state()
    return len(actions) / (time.perf_counter() - started)


def collection_speed(processes: int, episodes: int) -> float:
    """Steps per second of collected episodes; the processes have been started before the clock is."""
    make_env = functools.partial(envs.make, {"name": f"metaworld/{TASKS[0]}", "horizon": HORIZON})
    with RolloutWorkers(make_env, processes=processes, lanes=1) as workers:
        workers.run(Expert(TASKS[0]), range(max(1, processes) * 2), keep_states=True)
        started = time.perf_counter()
        workers.run(Expert(TASKS[0]), range(episodes), keep_states=True)
        return episodes * HORIZON / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    steps = parser.parse_args().steps
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, 4)).astype(np.float32)
    print(f"{'steps per second':<20}{'package':>10}{'robopref':>10}{'ratio':>8}")
    for task in TASKS:
        # In turn, twice, and the better of each: what else the machine does then slows neither alone.
        package = max(package_speed(task, actions) for _ in range(2))
        ours = max(our_speed(task, actions) for _ in range(2))
        print(f"{task:<20}{package:>10,.0f}{ours:>10,.0f}{ours / package:>8.2f}")
    cores = len(os.sched_getaffinity(0))
    alone = collection_speed(0, steps // HORIZON)
    together = collection_speed(cores, steps // HORIZON)
    print(
        f"collecting an expert: {alone:,.0f} in this process, {together:,.0f} in {cores} ({together / alone:.2f} times)"
    )


if __name__ == "__main__":
    main()
