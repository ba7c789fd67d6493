"""Locomotion data with known skills: one commanded policy per robot, and the episodes of its life, medium to expert.

OPPO and AlignDiff were published on data that cannot be made again: D4RL's policies are not public, and AlignDiff's are
not described. Here they have stand-ins, rebuilt by one command to the same bits for a seed on the same machine. For
each robot, soft actor-critic learns to move as it is told: at which speed and, where that makes sense, with its torso
at which height. Its checkpoints, told a new command in every episode, then give three datasets with the reward of the
plain task, and with simulator states:

* `medium`: episodes of the first checkpoint that is a third of the way from random actions to the last checkpoint;
* `medium-replay`: of all checkpoints up to that one, beginning with random actions;
* `medium-expert`: half of that checkpoint, half of the last one.

Skill and command of every episode are in its origin, and what the robot really did is in its infos, from which
`envs.locomotion.window_attributes` measures speed, height, stride and leg preference. Returns are given as scores from
0, random actions, to 100, the last checkpoint told the speed at which it earns most. They cannot be compared with
scores of D4RL, whose references are others.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Int
from rich.console import Console
from scipy import stats

import envs
from agents.sac import SACAgent, SACConfig
from envs.locomotion import ATTRIBUTES, LocomotionEnv, append_command, window_attributes
from experiments.experiment import (
    RunArgs,
    check_args,
    claim_row,
    first_seed,
    result_row,
    run_experiment,
    run_main,
    store,
)
from experiments.grid import Job, JobContext
from robopref.agent import AgentPolicy
from robopref.checkpoints import restore_checkpoint
from robopref.episodes import EpisodeDataset, load_episodes
from robopref.evaluation import Interval, return_interval
from robopref.online import OnlineConfig, OnlineState, fit_online
from robopref.progress import ProgressCallback
from robopref.replay import ReplayBuffer
from robopref.reports import Report, Scatter
from robopref.rollouts import RolloutWorkers
from robopref.training import checkpoints
from robopref.types import Episode, Policy, Transitions

SETS = ("medium", "medium-replay", "medium-expert")
COMMANDS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "Hopper": {"speed": (0.0, 2.5), "height": (1.0, 1.4)},
    "Walker2d": {"speed": (0.0, 3.0), "height": (1.0, 1.3)},
    "HalfCheetah": {"speed": (0.0, 6.0)},
    "Ant": {"speed": (0.0, 3.0), "height": (0.4, 0.7)},
    "Humanoid": {"speed": (0.0, 3.0), "height": (1.1, 1.4)},
}
"""What each robot is told, in m/s and m."""

RETURN, SCORE = "return", "score"
MEDIUM = 1 / 3
"""How far from random actions to the last checkpoint the medium one is."""

SPEEDS = 6
"""At which the last checkpoint is tried, before it is called expert."""


AGENT = SACConfig(hidden_dims=(128, 128), layer_norm=True)
ONLINE = OnlineConfig(lanes=16, random_steps=4000)


@dataclass(frozen=True)
class CommandTraining:
    """How a policy learns to follow commands.

    Attributes:
        agent: SAC's hyperparameters.
        online: how it gathers experience.
        env_steps: to gather; all are kept.
        horizon: steps of an episode, which a fall ends earlier.
        checkpoints: evenly spaced, from which the data are made.
    """

    agent: SACConfig = AGENT
    online: OnlineConfig = ONLINE
    env_steps: int = 320_000
    horizon: int = 500
    checkpoints: int = 10


@dataclass(frozen=True)
class Args(RunArgs):
    """Locomotion data with known skills.

    Attributes:
        tasks: names of Gymnasium's robots.
        horizon: steps of an episode of the data; a fall does not end it.
        episodes: in each dataset.
        curve_episodes: by which each checkpoint is judged, before it is called medium.
        reference_episodes: of random actions and of the last checkpoint, between which scores are measured.
        training: of the commanded policy.
    """

    tasks: tuple[str, ...] = ("Hopper", "Walker2d")
    horizon: int = 1000
    episodes: int = 200
    curve_episodes: int = 10
    reference_episodes: int = 20
    training: CommandTraining = CommandTraining()


DEFAULT = Args()
PRESETS = {
    "small": DEFAULT,
    "paper": replace(
        DEFAULT,
        preset="paper",
        tasks=("Hopper", "Walker2d", "HalfCheetah", "Ant", "Humanoid"),
        episodes=1000,
        reference_episodes=100,
        training=CommandTraining(
            online=OnlineConfig(lanes=16, random_steps=10_000), env_steps=2_000_000, checkpoints=20
        ),
    ),
    "smoke": replace(
        DEFAULT,
        preset="smoke",
        tasks=("Hopper",),
        horizon=30,
        episodes=6,
        curve_episodes=2,
        reference_episodes=2,
        training=CommandTraining(
            agent=SACConfig(hidden_dims=(8,), layer_norm=True),
            online=OnlineConfig(lanes=2, random_steps=20, batch_size=8),
            env_steps=80,
            horizon=20,
            checkpoints=2,
        ),
    ),
}


class CommandedPolicy(struct.PyTreeNode):
    """A policy of a commanded environment that acts in the plain one: told another command in every episode.

    Attributes:
        policy: what acts on observations that end with a command.
        ranges: low and high of each command, as in the environment in which the policy was trained.
        told: the command of every episode; None draws one from its seed.
        names: of the commands.
        skill: how good the policy is, for the origin of episodes.
    """

    policy: Any
    ranges: Float[np.ndarray, "K 2"]
    told: Float[np.ndarray, " K"] | None = None
    names: tuple[str, ...] = struct.field(pytree_node=False, default=())
    skill: str = struct.field(pytree_node=False, default="")

    def start(self, seeds: Int[np.ndarray, " B"]) -> tuple[Any, Float[np.ndarray, "B K"]]:
        return self.policy.start(seeds), np.stack([self._command(int(seed)) for seed in seeds])

    def step(
        self, carry: tuple[Any, Float[np.ndarray, "B K"]], observations: Float[np.ndarray, "B O"]
    ) -> tuple[Float[np.ndarray, "B A"], tuple[Any, Float[np.ndarray, "B K"]]]:
        state, commands = carry
        actions, state = self.policy.step(state, append_command(observations, commands, self.ranges))
        return actions, (state, commands)

    def describe(self, seed: int) -> Mapping[str, str | float]:
        told = dict(zip(self.names, self._command(seed).tolist(), strict=True))
        return {"behaviour": f"commanded, {self.skill}", "skill": self.skill, **told}

    def _command(self, seed: int) -> Float[np.ndarray, " K"]:
        if self.told is not None:
            return np.asarray(self.told)
        low, high = np.asarray(self.ranges).T
        # Apart from the stream with which the environment draws the first state from the same seed.
        return np.random.default_rng([seed, 1]).uniform(low, high)


class RandomPolicy(struct.PyTreeNode):
    """Uniformly random actions."""

    action_dim: int = struct.field(pytree_node=False)

    def start(self, seeds: Int[np.ndarray, " B"]) -> list[np.random.Generator]:
        return [np.random.default_rng([int(seed), 2]) for seed in seeds]

    def step(
        self, carry: list[np.random.Generator], observations: Float[np.ndarray, "B O"]
    ) -> tuple[Float[np.ndarray, "B A"], list[np.random.Generator]]:
        return np.stack([rng.uniform(-1, 1, self.action_dim) for rng in carry]), carry

    def describe(self, seed: int) -> Mapping[str, str | float]:
        return {"behaviour": "random", "skill": "random"}


class Commander(NamedTuple):
    """What became of the training of one robot: its checkpoints by step, and how to make policies of them."""

    task: str
    training: CommandTraining
    saved: Mapping[int, Path]

    def policy(self, step: int, *, told: Sequence[float] | None = None, stochastic: bool = True) -> CommandedPolicy:
        """The policy of a checkpoint."""
        env = envs.make(training_env(self.task, self.training))
        assert isinstance(env, LocomotionEnv)
        agent = restore_checkpoint(self.saved[step], _blank(self.training.agent, env))
        return CommandedPolicy(
            AgentPolicy(agent, stochastic),
            env.command_ranges,
            None if told is None else np.asarray(told, float),
            env.command_names,
            f"{step} steps",
        )


def plain_env(args: Args, task: str) -> dict[str, Any]:
    """Configuration of the environment of the data."""
    return {"name": f"locomotion/{task}", "horizon": args.horizon}


def training_env(task: str, training: CommandTraining) -> dict[str, Any]:
    """Configuration of the environment in which commands are learned."""
    falls = {} if task == "HalfCheetah" else {"terminate_when_unhealthy": True}
    commands = {name: list(ends) for name, ends in COMMANDS[task].items()}
    return {"name": f"locomotion/{task}", "horizon": training.horizon, "commands": commands, **falls}


def jobs(args: Args) -> list[Job]:
    """The grid: per task the training, what is known of its checkpoints, and the datasets."""
    every = []
    for task in args.tasks:
        trained, judged = f"train/{task}", f"judge/{task}"
        shared = {"task": task, "training": args.training, "env": plain_env(args, task), "trained": trained}
        every.append(Job(trained, train, {"task": task, "training": args.training, "seed": args.seed}))
        asked = {
            **shared,
            "curve_episodes": args.curve_episodes,
            "reference_episodes": args.reference_episodes,
            "seed": args.seed,
        }
        every.append(Job(judged, judge, asked, needs=(trained,)))
        for number, name in enumerate(SETS):
            arguments = {
                **shared,
                "judged": judged,
                "kind": name,
                "episodes": args.episodes,
                "first_seed": first_seed(args.seed, number + 4),
            }
            every.append(Job(f"data/{task}/{name}", collect, arguments, needs=(trained, judged)))
    return every


def train(context: JobContext, *, task: str, training: CommandTraining, seed: int) -> dict[str, Any]:
    """Job: SAC learns to follow commands; goes on where it was killed."""
    config = training_env(task, training)
    with envs.make(config) as env:
        agent = _blank(training.agent, env, seed)
        example = _example(env)
    interval = training.env_steps // training.checkpoints
    fit_online(
        OnlineState.create(agent, ReplayBuffer.create(training.env_steps, example)),
        functools.partial(envs.make, config),
        jax.random.fold_in(jax.random.key(seed), 1),
        config=training.online,
        num_steps=training.env_steps,
        folder=context.folder,
        log_every=interval // 10 if interval % (10 * training.online.lanes) == 0 else interval,
        checkpoint_every=interval,
        progress=context.progress,
    )
    return {}


def judge(
    context: JobContext,
    *,
    task: str,
    training: CommandTraining,
    env: Mapping[str, Any],
    trained: str,
    curve_episodes: int,
    reference_episodes: int,
    seed: int,
) -> dict[str, Any]:
    """Job: what random actions, every checkpoint and the last one at its best speed earn, and which one is medium.

    Returns:
        `random` and `expert`, returns, and `told`, the expert's command; `curve`, returns by step, under random
        commands; `medium`, a step; `last`; `followed`, for each command, what the last checkpoint was told and did.
    """
    commander = Commander(task, training, checkpoints(context.folders[trained]))
    steps = sorted(commander.saved)
    reference, trial = (
        range(first_seed(seed, purpose), first_seed(seed, purpose) + count)
        for purpose, count in ((1, reference_episodes), (2, curve_episodes))
    )
    with _workers(env) as workers:
        curve, last = {}, []
        for done, step in enumerate(steps):
            context.progress(done, len(steps) + SPEEDS + 2)
            last = workers.run(commander.policy(step), trial)
            curve[step] = _returns(last)
        earned = {}
        for done, told in enumerate(_tempos(task)):
            context.progress(len(steps) + done, len(steps) + SPEEDS + 2)
            earned[told] = np.mean(_returns(workers.run(commander.policy(steps[-1], told=told), trial)))
        best = max(earned, key=lambda told: earned[told])
        # Told what earned most in other episodes, so that no luck is in what it is said to earn.
        expert = workers.run(commander.policy(steps[-1], told=best, stochastic=False), reference)
        random = workers.run(_random(env), reference)
    return {
        "random": _returns(random),
        "expert": _returns(expert),
        "told": list(best),
        "curve": {str(step): returns for step, returns in curve.items()},
        "medium": medium_step(curve, _returns(random)),
        "last": steps[-1],
        "followed": followed(task, last),
    }


def _tempos(task: str) -> list[tuple[float, ...]]:
    """Commands from the slowest to the fastest, all else in the middle."""
    low, high = COMMANDS[task]["speed"]
    others = [sum(ends) / 2 for name, ends in COMMANDS[task].items() if name != "speed"]
    return [(float(speed), *others) for speed in np.linspace(low, high, SPEEDS)]


def medium_step(curve: Mapping[int, Sequence[float]], random: Sequence[float]) -> int:
    """The first checkpoint that is `MEDIUM` of the way from random actions to the last one, by mean return."""
    floor, last = np.mean(random), max(curve)
    least = floor + MEDIUM * (np.mean(curve[last]) - floor)
    return min((step for step, returns in curve.items() if np.mean(returns) >= least), default=last)


def collect(
    context: JobContext,
    *,
    task: str,
    training: CommandTraining,
    env: Mapping[str, Any],
    trained: str,
    judged: str,
    kind: str,
    episodes: int,
    first_seed: int,
) -> dict[str, Any]:
    """Job: one dataset, stored with simulator states under `episodes/`.

    Returns:
        `hash`, `steps`, `skills` (how many episodes of each), `returns`, and `followed`, as `judge` does.
    """
    path = context.folder / "episodes"
    if not path.exists():
        commander = Commander(task, training, checkpoints(context.folders[trained]))
        medium, last = context.values[judged]["medium"], context.values[judged]["last"]
        steps = {
            "medium": [medium],
            "medium-replay": [step for step in sorted(commander.saved) if step <= medium],
            "medium-expert": [medium, last],
        }[kind]
        policies: list[Policy] = [commander.policy(step) for step in steps]
        if kind == "medium-replay":
            policies.insert(0, _random(env))
        shares = [len(part) for part in np.array_split(np.arange(episodes), len(policies))]
        gathered: list[Episode] = []
        with _workers(env) as workers:
            for policy, share in zip(policies, shares, strict=True):
                seeds = range(first_seed + len(gathered), first_seed + len(gathered) + share)
                progress = functools.partial(_further, context.progress, len(gathered), episodes)
                gathered += workers.run(policy, seeds, keep_states=True, progress=progress)
        store(path, gathered, env, f"{task}, {kind}: {episodes} episodes of commanded policies")
    dataset = load_episodes(path)
    skills = [str(origin["skill"]) for origin in dataset.origins]
    return {
        "hash": dataset.hash,
        "steps": dataset.total_steps,
        "skills": {skill: skills.count(skill) for skill in dict.fromkeys(skills)},
        "returns": dataset.returns.tolist(),
        "followed": followed(task, [dataset.episode(index) for index in range(len(dataset))]),
    }


def followed(task: str, episodes: Sequence[Episode]) -> dict[str, dict[str, list[float]]]:
    """For each command, what was told in every commanded episode, and what the robot did in its second half."""
    commanded = [episode for episode in episodes if COMMANDS[task].keys() <= episode.origin.keys()]
    found: dict[str, dict[str, list[float]]] = {}
    for name in COMMANDS[task]:
        assert name in ATTRIBUTES[task]
        half = [(episode, len(episode) // 2) for episode in commanded]
        measured = [
            window_attributes(episode.infos, np.array([begin]), len(episode) - begin)[name] for episode, begin in half
        ]
        found[name] = {
            "told": [float(episode.origin[name]) for episode in commanded],
            "did": [float(value[0]) for value in measured],
        }
    return found


def scores(returns: Sequence[float] | np.ndarray, judged: Mapping[str, Any]) -> np.ndarray:
    """Returns between those of random actions, 0, and of the last checkpoint at its best speed, 100."""
    floor, ceiling = np.mean(judged["random"]), np.mean(judged["expert"])
    return 100.0 * (np.asarray(returns, float) - floor) / (ceiling - floor)


def dataset_of(folder: Path, task: str, kind: str) -> EpisodeDataset:
    """A dataset of a finished run in `folder`."""
    return load_episodes(folder / "data" / task / kind / "episodes")


def report(args: Args, values: Mapping[str, Any], run: Mapping[str, Any], folder: Path) -> Report:
    """Everything that the run found; `values` are those of its jobs, `run` is the manifest."""
    rng = np.random.default_rng(args.seed)
    rows: list[dict[str, Any]] = []
    claims, curves, scatters = [], {}, []
    for task in args.tasks:
        judged = values[f"judge/{task}"]
        for name in ("random", "expert"):
            rows.append(result_row(name, task, RETURN, return_interval(judged[name], rng)))
        for kind in SETS:
            earned = scores(values[_data(task, kind)]["returns"], judged)
            rows.append(result_row(kind, task, SCORE, return_interval(earned, rng)))
        steps = np.array([int(step) for step in judged["curve"]])
        curves[task, SCORE] = (steps, [return_interval(scores(each, judged), rng) for each in judged["curve"].values()])
        shown = values[_data(task, "medium-expert")]["followed"]
        for name, pairs in judged["followed"].items():
            estimate = _rank_correlation(pairs["told"], pairs["did"])
            rows.append(result_row("last checkpoint", task, f"Spearman of {name}, told and done", estimate))
            text = f"{task}: the last checkpoint moves at the {name} that it is told (Spearman above 0.8)"
            claims.append(claim_row(f"{task}-{name}", text, estimate, threshold=0.8))
            unit = "m/s" if name == "speed" else "m"
            scatters.append(
                Scatter(
                    title=f"{task}, medium-expert: {name}, told and done",
                    x_label=f"told ({unit})",
                    y_label=f"done ({unit})",
                    x=np.array(shown[name]["told"]),
                    y=np.array(shown[name]["did"]),
                )
            )
    sizes = ", ".join(
        f"{task} {kind}: {values[_data(task, kind)]['steps']} steps" for task in args.tasks for kind in SETS
    )
    return Report(
        title="Locomotion data with known skills",
        summary=f"Commanded policies, learned by SAC in {args.training.env_steps} steps per robot. {sizes}.",
        results={"manifest": run, "rows": rows, "claims": claims},
        curves=curves,
        scatters=scatters,
    )


def main(args: Args, console: Console | None = None) -> int:
    """Runs what is missing of the grid, then writes and prints the report. Returns the exit status."""
    _check(args)
    values = run_experiment("locomotion", args, jobs, report, seeds=(args.seed,), console=console)
    return 1 if values is None else 0


def _data(task: str, kind: str) -> str:
    return f"data/{task}/{kind}"


def _rank_correlation(told: Sequence[float], did: Sequence[float]) -> Interval:
    """Spearman's, with Fisher's interval (Bonett and Wright 2000)."""
    correlation = float(stats.spearmanr(told, did).statistic) if np.ptp(told) > 0 and np.ptp(did) > 0 else 0.0
    count = len(told)
    if count < 4:
        return Interval(correlation, -1.0, 1.0, count, 1)
    centre = np.arctanh(np.clip(correlation, -1 + 1e-9, 1 - 1e-9))
    half = 1.96 * np.sqrt((1 + correlation**2 / 2) / (count - 3))
    return Interval(correlation, float(np.tanh(centre - half)), float(np.tanh(centre + half)), count, 1)


def _returns(episodes: Sequence[Episode]) -> list[float]:
    return [float(episode.rewards.sum()) for episode in episodes]


def _workers(env: Mapping[str, Any]) -> RolloutWorkers:
    return RolloutWorkers(functools.partial(envs.make, env), lanes=10)


def _random(env: Mapping[str, Any]) -> RandomPolicy:
    with contextlib.closing(envs.make(env)) as sample:
        return RandomPolicy(sample.action_space.shape[0])


def _further(progress: ProgressCallback, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _example(env: gymnasium.Env[Any, Any]) -> Transitions:
    observations = jnp.zeros((2, *env.observation_space.shape))  # type: ignore[misc]
    actions = jnp.zeros((2, *env.action_space.shape))  # type: ignore[misc]
    return Transitions(observations, actions, jnp.zeros(2), observations, jnp.zeros(2, bool))


def _blank(config: SACConfig, env: gymnasium.Env[Any, Any], seed: int = 0) -> SACAgent:
    return SACAgent.create(config, _example(env), jax.random.key(seed))


def _check(args: Args) -> None:
    counts = {name: getattr(args, name) for name in ("horizon", "episodes", "curve_episodes", "reference_episodes")}
    counts |= {f"training.{name}": getattr(args.training, name) for name in ("env_steps", "horizon", "checkpoints")}
    check_args(args, chosen={"tasks": tuple(COMMANDS)}, counts=counts)
    spacing = args.training.checkpoints * args.training.online.lanes
    if args.training.env_steps % spacing:
        raise ValueError(
            f"--training.env-steps ({args.training.env_steps}) must be a multiple of checkpoints times lanes"
            f" ({args.training.checkpoints} times {args.training.online.lanes})."
        )


if __name__ == "__main__":
    run_main(main, PRESETS, "Locomotion data with known skills, from commanded policies.")
