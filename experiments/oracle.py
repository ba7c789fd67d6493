"""Oracles for regret labels: soft actor-critic on Meta-World, trained on the rollouts it is to judge, and examined.

Contrastive preference learning was published with labels from the Q-function of a SAC agent whose replay buffer began
with the very rollouts that were labelled (Hejna et al. 2023, arXiv:2310.13639), which keeps its Bellman error low where
it is asked. Here such an oracle is trained per task and then has to pass an examination before it may label:

* its policy succeeds;
* Q(s, a) / reward scale agrees with the discounted return of taking a in s and then following its policy, measured by
  putting the simulator into states of rollouts that were kept from it;
* regret as a sum of advantages, sum_t discount^t [V(s_t) - Q(s_t, a_t)], and in the telescoped form,
  V(s_0) - [sum_t discount^t r_t + discount^T V(s_T)], orders held-out pairs of segments alike;
* both order them as the simulator does, when the oracle's own policy is the expert whose returns are measured exactly.

How the labels compare with those of the simulator under the scripted expert, and what the partial return and the
released undiscounted form would have said, is reported beside it. `load_oracle` refuses an oracle that has not passed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.console import Console

import envs
from agents import sac
from agents.sac import SACAgent, SACConfig
from envs.behaviours import Expert
from envs.env import Env
from experiments.demo import behaviours
from experiments.experiment import (
    Evaluation,
    RunArgs,
    check_args,
    claim_row,
    collect,
    evaluate_policy,
    first_seed,
    result_row,
    run_experiment,
    run_main,
)
from experiments.grid import Job, JobContext
from labelers.regret import RegretTeacher, SimulatedRegretTeacher
from robopref.agent import AgentPolicy
from robopref.checkpoints import restore_checkpoint, save_checkpoint
from robopref.configs import from_json, to_json
from robopref.datasets import TransitionDataset, fit_normalizer
from robopref.episodes import EpisodeDataset, load_episodes
from robopref.evaluation import Interval, compare, ranking_scores, return_interval, success_interval
from robopref.files import read_json, write_json
from robopref.online import OnlineConfig, OnlineState, fit_online
from robopref.progress import ProgressCallback
from robopref.queries import Queries, draw_queries
from robopref.replay import ReplayBuffer
from robopref.reports import MethodComparison, Report
from robopref.rollouts import RolloutWorkers
from robopref.training import checkpoints
from robopref.types import Policy, Transitions

SUCCESS, WEIGHTS, RECORD = "success rate", "oracle.safetensors", "oracle.json"
LABELINGS = ("direct", "telescoped", "released", "partial return")
REFERENCES = {"own": "simulator, oracle as expert", "scripted": "simulator, scripted expert"}
_RESAMPLES = 2000


@dataclass(frozen=True)
class OracleTraining:
    """How an oracle is trained.

    Attributes:
        agent: SAC's hyperparameters.
        online: how it gathers experience. The reward scale is undone in the values that it gives.
        env_steps: to gather.
        capacity: of the replay buffer.
        seeding: where the given rollouts go: into the replay buffer at the start, as published, or beside it, so that
            `online.prior_share` of each batch is always theirs.
        checkpoints: evenly spaced; each gives a point of the learning curve.
        horizon: steps of its own episodes; None takes that of the rollouts. Values look further ahead than an episode
            of the rollouts lasts: what comes after its end has to be lived through, or is made up.
        starts: share of its own episodes that begin in a state of the rollouts, so that its values are about what it
            would really do from there.
        processes: that step environments; 0 steps them in the job's own.
    """

    agent: SACConfig
    online: OnlineConfig
    env_steps: int
    capacity: int
    seeding: Literal["replay", "prior"]
    checkpoints: int = 6
    horizon: int | None = None
    starts: float = 0.0
    processes: int = 0


@dataclass(frozen=True)
class Examination:
    """How an oracle is examined.

    Attributes:
        episodes: for the success rate.
        curve_episodes: for each point of the learning curve.
        own_episodes: rollouts of the oracle's policy, from whose states Q is compared with returns.
        points: held-out states and actions, from which Q is compared with returns.
        tail: steps over which the returns are summed.
        pairs: of held-out segments.
        expert_horizon: steps that an expert acts beyond a segment.
    """

    episodes: int = 50
    curve_episodes: int = 10
    own_episodes: int = 10
    points: int = 150
    tail: int = 400
    pairs: int = 150
    expert_horizon: int = 200


@dataclass(frozen=True)
class Gate:
    """What an oracle must reach, as measured, to be let through.

    Attributes:
        success: rate, over the episodes of the examination.
        correlation: of Q with the returns from held-out states and actions.
        agreement: of the two forms of regret with each other, and of each with the simulator under the oracle's policy.
    """

    success: float = 0.9
    correlation: float = 0.9
    agreement: float = 0.8


SMALL = OracleTraining(
    agent=SACConfig(layer_norm=True, target_update_rate=0.01),
    online=OnlineConfig(lanes=8, random_steps=800, updates_per_step=0.5, reward_scale=0.1),
    env_steps=64_000,
    capacity=64_000,
    seeding="prior",
    checkpoints=4,
    horizon=250,
    starts=0.5,
)
PAPER = OracleTraining(
    agent=sac.ORACLE,
    online=OnlineConfig(lanes=16, random_steps=25_000, batch_size=512, reward_scale=0.1),
    env_steps=1_000_000,
    capacity=1_625_000,
    seeding="replay",
    checkpoints=10,
    processes=16,
)


@dataclass(frozen=True)
class Args(RunArgs):
    """Oracles for regret labels on one or more Meta-World tasks.

    Attributes:
        tasks: names of Meta-World tasks.
        horizon: steps of an episode.
        episodes: rollouts that the oracle is trained on beside its own.
        held_out_episodes: rollouts that it is examined on.
        length: steps of a segment.
        training: of the oracle.
        examination: of the oracle.
        gate: what it must reach.
    """

    tasks: tuple[str, ...] = ("door-open-v3",)
    horizon: int = 120
    episodes: int = 600
    held_out_episodes: int = 100
    length: int = 64
    training: OracleTraining = SMALL
    examination: Examination = Examination()
    gate: Gate = Gate()


DEFAULT = Args()
PRESETS = {
    "small": DEFAULT,
    "paper": replace(
        DEFAULT,
        preset="paper",
        tasks=(
            "bin-picking-v3",
            "button-press-v3",
            "door-open-v3",
            "drawer-open-v3",
            "plate-slide-v3",
            "sweep-into-v3",
        ),
        horizon=250,
        episodes=2500,
        training=PAPER,
    ),
    "smoke": replace(
        DEFAULT,
        preset="smoke",
        horizon=20,
        episodes=4,
        held_out_episodes=4,
        length=6,
        training=OracleTraining(
            agent=SACConfig(hidden_dims=(8,), layer_norm=True),
            online=OnlineConfig(lanes=2, random_steps=20, batch_size=8, reward_scale=0.1),
            env_steps=80,
            capacity=60,
            seeding="prior",
            checkpoints=2,
            horizon=25,
            starts=0.5,
        ),
        examination=Examination(
            episodes=4, curve_episodes=2, own_episodes=2, points=6, tail=8, pairs=6, expert_horizon=6
        ),
    ),
}


@dataclass(frozen=True)
class Oracle:
    """An agent that passed its examination, with its values in the unit of the environment's reward.

    Attributes:
        agent: its policy and critics.
        env: the environment that it is about.
        reward_scale: what the rewards were multiplied with in training.
        source: where it came from, for the labels to record.
        samples: actions of the policy over which `values` averages.
    """

    agent: SACAgent
    env: Mapping[str, Any]
    reward_scale: float
    source: str
    samples: int = 64

    @property
    def discount(self) -> float:
        return self.agent.config.discount

    @property
    def policy(self) -> AgentPolicy:
        """Without randomness."""
        return AgentPolicy(self.agent)

    def q_values(
        self, observations: Float[np.ndarray, "B O"], actions: Float[np.ndarray, "B A"]
    ) -> Float[np.ndarray, " B"]:
        """Q, the mean of the critics."""
        found = _q_values(self.agent, _float32(observations), _float32(actions))
        return np.asarray(found, np.float64) / self.reward_scale

    def values(self, observations: Float[np.ndarray, "B O"]) -> Float[np.ndarray, " B"]:
        """V, the mean of Q over actions of the policy, whose noise is the same for every state and call."""
        found = _values(self.agent, _float32(observations), self.samples)
        return np.asarray(found, np.float64) / self.reward_scale

    def teacher(
        self, kind: Literal["deterministic", "full", "cpl_release"] = "full", **noise: float | bool
    ) -> RegretTeacher:
        """A teacher by this oracle's regret; `noise` are further arguments of `RegretTeacher`."""
        return RegretTeacher(self.values, self.discount, kind=kind, q_values=self.q_values, source=self.source, **noise)  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnums=2)
def _values(agent: SACAgent, observations: jax.Array, samples: int) -> jax.Array:
    # The same draws for every observation: the value of a state does not depend on which others are asked about.
    return jax.vmap(lambda one: agent.values(one, jax.random.key(0), samples))(observations)


@jax.jit
def _q_values(agent: SACAgent, observations: jax.Array, actions: jax.Array) -> jax.Array:
    return agent.q_values(observations, actions)


def _float32(array: Float[np.ndarray, "B D"]) -> jax.Array:
    return jnp.asarray(array, jnp.float32)


def load_oracle(folder: Path) -> Oracle:
    """The oracle in the folder of an `oracle/<task>` job, if it passed its examination.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it did not pass; says where it fell short.
    """
    record = read_json(folder / RECORD)
    if record["shortcomings"]:
        raise ValueError(
            f"the oracle in {folder} must not give labels, it did not pass its examination:"
            f" {'; '.join(record['shortcomings'])}. Train it longer or on better rollouts."
        )
    agent = restore_checkpoint(
        folder / WEIGHTS, _blank(from_json(SACConfig, record["agent"]), record["observations"], record["actions"])
    )
    return Oracle(agent, record["env"], record["reward_scale"], source=f"SAC oracle {record['env']['name']}")


def jobs(args: Args) -> list[Job]:
    """The grid: per task the rollouts, those that are held out, the oracle's training, and its examination."""
    every = []
    for task in args.tasks:
        env = {"name": f"metaworld/{task}", "horizon": args.horizon}
        episodes, held_out, training = f"episodes/{task}", f"held-out/{task}", f"train/{task}"
        cores = max(1, (args.cores or os.cpu_count() or 1) // len(args.tasks))
        for name, count, purpose in ((episodes, args.episodes, 0), (held_out, args.held_out_episodes, 3)):
            rollouts = {
                "env": env,
                "policy": behaviours(task),
                "episodes": count,
                "first_seed": first_seed(args.seed, purpose),
            }
            every.append(Job(name, collect, rollouts, cores=cores))
        shared = {"env": env, "training": args.training, "examination": args.examination, "seed": args.seed}
        every.append(
            Job(
                training,
                train_oracle,
                {**shared, "episodes": episodes},
                needs=(episodes,),
                cores=max(1, args.training.processes),
            )
        )
        every.append(
            Job(
                f"oracle/{task}",
                examine,
                {
                    **shared,
                    "gate": args.gate,
                    "length": args.length,
                    "expert": Expert(task),
                    "trained": training,
                    "held_out": held_out,
                },
                needs=(training, held_out),
            )
        )
    return every


def train_oracle(
    context: JobContext,
    *,
    env: Mapping[str, Any],
    training: OracleTraining,
    examination: Examination,
    episodes: str,
    seed: int,
) -> dict[str, Any]:
    """Job: trains SAC online, with the rollouts that the job `episodes` stored; resumes where it was killed."""
    dataset = load_episodes(context.folders[episodes] / "episodes")
    steps = TransitionDataset.create(dataset)
    example = steps.take(jnp.arange(2))
    create_key, fit_key = jax.random.split(jax.random.key(seed))
    agent = SACAgent.create(training.agent, example, create_key, normalizer=fit_normalizer(dataset))
    seeded = training.seeding == "replay"
    if seeded:
        replay = ReplayBuffer.from_episodes(training.capacity, steps)
    else:
        replay = ReplayBuffer.create(training.capacity, example)
    interval = training.env_steps // training.checkpoints
    fit_online(
        OnlineState.create(agent, replay),
        functools.partial(_make_training_env, env, training, dataset),
        fit_key,
        config=training.online,
        num_steps=training.env_steps,
        prior=None if seeded else steps,
        folder=context.folder,
        processes=training.processes,
        log_every=interval // 10 if interval % (10 * training.online.lanes) == 0 else interval,
        checkpoint_every=interval,
        progress=context.progress,
    )
    evaluation = Evaluation(env, examination.curve_episodes, first_seed(seed, 2))
    curve = {}
    for step, path in checkpoints(context.folder).items():
        policy = AgentPolicy(restore_checkpoint(path, agent))
        curve[str(step)] = evaluate_policy(context, policy=policy, evaluation=evaluation)["successes"]
    return {"curve": curve}


class RolloutStarts(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment of which a share of the episodes begin in a state of given rollouts, drawn uniformly."""

    def __init__(self, env: Env, rollouts: EpisodeDataset, share: float) -> None:
        super().__init__(env)
        self._simulator = env
        self._rollouts = rollouts
        self._share = share

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, " O"], dict[str, Any]]:
        observation, info = self._simulator.reset(seed=seed, options=options)
        rng = np.random.default_rng(seed)
        if rng.random() < self._share:
            episode = int(rng.integers(len(self._rollouts)))
            step = int(rng.integers(self._rollouts.lengths[episode]))
            observation = self._simulator.set_state(self._rollouts.states(episode, step))
        return observation, info


def _make_training_env(env: Mapping[str, Any], training: OracleTraining, rollouts: EpisodeDataset) -> RolloutStarts:
    horizon = env["horizon"] if training.horizon is None else training.horizon
    return RolloutStarts(envs.make({**env, "horizon": horizon}), rollouts, training.starts)


def examine(
    context: JobContext,
    *,
    env: Mapping[str, Any],
    training: OracleTraining,
    examination: Examination,
    gate: Gate,
    length: int,
    expert: Policy,
    trained: str,
    held_out: str,
    seed: int,
) -> dict[str, Any]:
    """Job: examines the oracle that the job `trained` left, and stores it with the outcome.

    Returns:
        `successes`; `own` and `held_out`: Q beside the measured return, by point, and the episode that each point is
        from; `agreements`: by reference and labeling, for each decided pair whether it is ordered alike, and `clear`:
        by reference, which of these pairs are in the half with the larger gaps; `shortcomings`.
    """
    dataset = load_episodes(context.folders[held_out] / "episodes")
    saved = checkpoints(context.folders[trained])
    observation_dim, action_dim = dataset.observations.shape[-1], dataset.actions.shape[-1]
    agent = restore_checkpoint(saved[max(saved)], _blank(training.agent, observation_dim, action_dim))
    oracle = Oracle(agent, env, training.online.reward_scale, source="under examination")
    queries = draw_queries(dataset, np.random.default_rng([seed, 1]), count=examination.pairs, length=length)
    evaluation = Evaluation(env, examination.episodes, first_seed(seed, 1))
    successes = evaluate_policy(context, policy=oracle.policy, evaluation=evaluation)["successes"]
    found: dict[str, Any] = {
        "successes": successes,
        "own": _own_returns(oracle, examination, first_seed(seed, 4)),
        "held_out": _held_out_returns(oracle, dataset, examination, seed),
        **_agreements(context, oracle, queries, expert, examination, seed),
    }
    found["shortcomings"] = shortcomings(gate, found)
    save_checkpoint(context.folder / WEIGHTS, agent, {"env": dict(env)})
    record = {
        "env": dict(env),
        "agent": to_json(training.agent),
        "reward_scale": training.online.reward_scale,
        "observations": observation_dim,
        "actions": action_dim,
        "gate": to_json(gate),
        "reached": reached(found),
        "shortcomings": found["shortcomings"],
    }
    write_json(context.folder / RECORD, record)
    return found


def reached(found: Mapping[str, Any]) -> dict[str, float]:
    """The figures on which the gate decides, from what `examine` found."""
    told = {
        "success": float(np.mean(found["successes"])),
        "correlation": _correlation(found["held_out"]["q_values"], found["held_out"]["returns"]),
        "agreement of direct with telescoped": float(np.mean(found["agreements"]["telescoped"]["direct"])),
    }
    for labeling in ("direct", "telescoped"):
        told[f"agreement of {labeling} with the simulator"] = float(np.mean(found["agreements"]["own"][labeling]))
    return told


def shortcomings(gate: Gate, found: Mapping[str, Any]) -> list[str]:
    """Where an oracle stays below the gate; empty if it passes."""
    return [
        f"{name} {value:.3f} is below {getattr(gate, name.split()[0])}"
        for name, value in reached(found).items()
        # Written so that a correlation that is not a number does not pass.
        if not value >= getattr(gate, name.split()[0])
    ]


def _own_returns(oracle: Oracle, examination: Examination, first: int) -> dict[str, list[float]]:
    """Q along rollouts of the policy itself, with its own randomness, and the returns that followed."""
    horizon = int(oracle.env["horizon"])
    longer = {**oracle.env, "horizon": horizon + examination.tail}
    policy = AgentPolicy(oracle.agent, stochastic=True)
    count = examination.own_episodes
    with RolloutWorkers(functools.partial(envs.make, longer), lanes=min(10, count)) as workers:
        episodes = workers.run(policy, range(first, first + count))
    points: dict[str, list[float]] = {"q_values": [], "returns": [], "episodes": []}
    weights = oracle.discount ** np.arange(examination.tail)
    for number, episode in enumerate(episodes):
        chosen = np.arange(0, horizon, 5)
        points["q_values"] += oracle.q_values(episode.observations[chosen], episode.actions[chosen]).tolist()
        points["returns"] += [float(episode.rewards[step : step + examination.tail] @ weights) for step in chosen]
        points["episodes"] += [number] * len(chosen)
    return points


def _held_out_returns(
    oracle: Oracle, dataset: EpisodeDataset, examination: Examination, seed: int
) -> dict[str, list[float]]:
    """Q of states and actions of other policies, and the return of taking the action and then following the oracle."""
    rng = np.random.default_rng([seed, 2])
    chosen = np.sort(rng.choice(dataset.total_steps, min(examination.points, dataset.total_steps), replace=False))
    starts = np.concatenate([[0], np.cumsum(dataset.lengths)])
    episodes = np.searchsorted(starts, chosen, side="right") - 1
    steps = chosen - starts[episodes]
    rows = dataset.offsets[episodes] + steps
    returns = returns_from(
        oracle, dataset.states_at(episodes, steps), dataset.actions[rows], tail=examination.tail, first=seed
    )
    return {
        "q_values": oracle.q_values(dataset.observations[rows], dataset.actions[rows]).tolist(),
        "returns": returns.tolist(),
        "episodes": episodes.tolist(),
    }


def returns_from(
    oracle: Oracle,
    states: Float[np.ndarray, "N S"],
    actions: Float[np.ndarray, "N A"],
    *,
    tail: int,
    first: int,
    lanes: int = 10,
) -> Float[np.ndarray, " N"]:
    """Discounted return over `tail` steps of taking the action in the state and then following the oracle's policy.

    The policy acts with its own randomness, of which `first` is the seed: Q is about that policy.
    """
    # Whatever step of its episode a state is from, there is time enough after it.
    longer = {**oracle.env, "horizon": int(oracle.env["horizon"]) + tail}
    simulators = [envs.make(longer) for _ in range(min(lanes, len(states)))]
    for simulator in simulators:
        simulator.reset(seed=0)
    policy = AgentPolicy(oracle.agent, stochastic=True)
    returns = np.zeros(len(states))
    for begin in range(0, len(states), len(simulators)):
        chunk = np.arange(begin, min(begin + len(simulators), len(states)))
        busy = simulators[: len(chunk)]
        for simulator, index in zip(busy, chunk, strict=True):
            simulator.set_state(states[index])
        acting, weight = np.asarray(actions[chunk]), 1.0
        carry = policy.start(np.arange(len(simulators)) + first + begin)
        for _ in range(tail):
            results = [env.step(np.array(action)) for env, action in zip(busy, acting, strict=False)]
            returns[chunk] += weight * np.array([result[1] for result in results])
            weight *= oracle.discount
            # Unused lanes repeat the last one, so that the policy always sees one batch size.
            observations = [result[0] for result in results]
            observations += observations[-1:] * (len(simulators) - len(chunk))
            acting, carry = policy.step(carry, np.stack(observations))
    for simulator in simulators:
        simulator.close()
    return returns


def _agreements(
    context: JobContext, oracle: Oracle, queries: Queries, expert: Policy, examination: Examination, seed: int
) -> dict[str, Any]:
    """In which pairs each way of labeling puts the same segment first as the simulator does, and as telescoped."""
    scores = {
        "direct": -oracle.teacher("full").segment_regrets(queries),
        "telescoped": -oracle.teacher("deterministic").segment_regrets(queries),
        "released": -oracle.teacher("cpl_release").segment_regrets(queries),
        "partial return": queries.partial_returns,
    }
    longer = {
        **oracle.env,
        "horizon": int(oracle.env["horizon"]) + queries.length + examination.expert_horizon,
    }
    key = jax.random.key(seed)
    regrets = {"telescoped": -scores["telescoped"]}
    labels = {"telescoped": oracle.teacher("deterministic").label(queries, key).values}
    for number, (name, policy) in enumerate({"own": oracle.policy, "scripted": expert}.items()):
        teacher = SimulatedRegretTeacher(
            functools.partial(envs.make, longer),
            policy,
            examination.expert_horizon,
            oracle.discount,
            on_segment=functools.partial(_half, context.progress, number),
        )
        regrets[name] = teacher.segment_regrets(queries, key)
        labels[name] = teacher.label(queries, key).values
    agreements, clear = {}, {}
    for reference, answers in labels.items():
        assert answers is not None
        decided = answers != 0.5
        gaps = np.abs(np.subtract(*regrets[reference].T))[decided]
        clear[reference] = (gaps >= np.median(gaps)).tolist()
        agreements[reference] = {
            labeling: ranking_scores(each, answers).tolist()
            for labeling, each in scores.items()
            if labeling != reference
        }
    return {"agreements": agreements, "clear": clear}


def _half(progress: ProgressCallback, number: int, done: int, total: int) -> None:
    """Progress of the first or second of two equal parts."""
    progress(number * total + done, 2 * total)


def report(args: Args, values: Mapping[str, Any], run: Mapping[str, Any], folder: Path) -> Report:
    """Everything that the run found; `values` are those of its jobs, `run` is the manifest."""
    rng = np.random.default_rng(args.seed)
    rows: list[dict[str, Any]] = []
    claims: list[dict[str, Any]] = []
    comparisons, curves, told = [], {}, []
    rates: dict[str, Interval] = {}
    for task in args.tasks:
        found = values[f"oracle/{task}"]
        row = functools.partial(_row, rows, task)
        claim = functools.partial(_claim, claims, task)
        success = row("oracle", SUCCESS, success_interval(found["successes"]))
        claim(
            "success",
            f"the policy succeeds in more than {args.gate.success:.0%} of episodes",
            success,
            args.gate.success,
        )
        for place, words in (("own", "its own states"), ("held_out", "held-out states and actions")):
            points = found[place]
            fit = row("oracle", f"correlation of Q with return, {words}", _correlation_interval(points, rng))
            row("oracle", f"Q over return, {words}", _ratio_interval(points, rng))
        claim(
            "q-values",
            f"Q correlates above {args.gate.correlation} with returns from {words}",
            fit,
            args.gate.correlation,
        )
        agreements = {
            (reference, labeling): np.array(scores)
            for reference, every in found["agreements"].items()
            for labeling, scores in every.items()
        }
        consistent = row("direct", "agreement with telescoped", _mean_interval(agreements["telescoped", "direct"], rng))
        claim(
            "consistent",
            f"the two forms of regret agree on more than {args.gate.agreement:.0%} of held-out pairs",
            consistent,
            args.gate.agreement,
        )
        for reference, words in REFERENCES.items():
            clear = np.array(found["clear"][reference])
            for labeling in LABELINGS:
                scores = agreements[reference, labeling]
                interval = row(labeling, f"agreement with {words}", _mean_interval(scores, rng))
                row(labeling, f"agreement with {words}, clearer half of pairs", _mean_interval(scores[clear], rng))
                if labeling in ("direct", "telescoped"):
                    claim(
                        f"{labeling}-{reference}",
                        f"{labeling} regret labels agree with {words} on more than {args.gate.agreement:.0%} of pairs",
                        interval,
                        args.gate.agreement,
                    )
            outcome = compare(agreements[reference, "telescoped"], agreements[reference, "partial return"], rng)
            metric = f"agreement with {words}"
            comparisons.append(MethodComparison("telescoped", "partial return", metric, outcome, task))
            text = f"{task}: telescoped regret agrees with {words} more often than the partial return does"
            claims.append(claim_row(f"partial-{reference}", text, outcome))
        curve = values[f"train/{task}"]["curve"]
        curves[f"oracle, {task}", SUCCESS] = (
            np.array([int(step) for step in curve]),
            [success_interval(each) for each in curve.values()],
        )
        gathered = values[f"episodes/{task}"]["behaviours"]
        rates |= {f"{name}, {task}": success_interval(successes) for name, successes in gathered.items()}
        told.append(_verdict(task, found["shortcomings"]))
    return Report(
        title="Oracles for regret labels",
        summary="\n\n".join(told),
        results={"manifest": run, "rows": rows, "claims": claims},
        comparisons=comparisons,
        curves=curves,
        behaviours=rates,
        film_note="An oracle is not filmed.",
    )


def main(args: Args, console: Console | None = None) -> int:
    """Runs what is missing of the grid, then writes and prints the report. Returns the exit status."""
    _check(args)
    console = console or Console()
    values = run_experiment("oracle", args, jobs, report, seeds=(args.seed,), console=console)
    if values is None:
        return 1
    for task in args.tasks:
        verdict = _verdict(task, values[f"oracle/{task}"]["shortcomings"])
        console.print(f"\n{verdict} It is in the run's folder, under oracle/{task}.", soft_wrap=True, highlight=False)
    return 0


def _verdict(task: str, shortcomings: Sequence[str]) -> str:
    if shortcomings:
        return f"The oracle of {task} did not pass and is refused for labeling: {'; '.join(shortcomings)}."
    return f"The oracle of {task} passed its examination and may label."


def _row(rows: list[dict[str, Any]], task: str, method: str, metric: str, estimate: Interval) -> Interval:
    rows.append(result_row(method, task, metric, estimate))
    return estimate


def _claim(claims: list[dict[str, Any]], task: str, name: str, claim: str, estimate: Interval, least: float) -> None:
    claims.append(claim_row(name, f"{task}: {claim}", estimate, threshold=least))


def _mean_interval(scores: Float[np.ndarray, " N"], rng: np.random.Generator) -> Interval:
    """Of an agreement; some scores may be 0.5."""
    if np.isin(scores, (0.0, 1.0)).all():
        return success_interval(scores)
    estimate = return_interval(scores, rng)
    return replace(estimate, low=max(estimate.low, 0.0), high=min(estimate.high, 1.0))


def _correlation(q_values: Sequence[float], returns: Sequence[float]) -> float:
    """Pearson's; not a number where either is constant."""
    first, second = np.asarray(q_values) - np.mean(q_values), np.asarray(returns) - np.mean(returns)
    spread = float(np.sqrt(np.sum(first**2) * np.sum(second**2)))
    return float(np.clip(np.sum(first * second) / spread, -1, 1)) if spread > 0 else float("nan")


def _correlation_interval(points: Mapping[str, Any], rng: np.random.Generator) -> Interval:
    return _bootstrap(points, rng, _correlation)


def _ratio_interval(points: Mapping[str, Any], rng: np.random.Generator) -> Interval:
    return _bootstrap(points, rng, lambda q_values, returns: float(np.sum(q_values) / np.sum(returns)))


def _bootstrap(points: Mapping[str, Any], rng: np.random.Generator, statistic: Any) -> Interval:
    """Percentile bootstrap over whole episodes, since points of one episode say much the same."""
    q_values, returns, episodes = (np.asarray(points[name]) for name in ("q_values", "returns", "episodes"))
    members = [np.flatnonzero(episodes == each) for each in np.unique(episodes)]
    resampled = []
    for _ in range(_RESAMPLES):
        drawn = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        resampled.append(statistic(q_values[drawn], returns[drawn]))
    low, high = np.nanpercentile(resampled, (2.5, 97.5))
    return Interval(statistic(q_values, returns), float(low), float(high), len(q_values), 1)


def _blank(config: SACConfig, observation_dim: int, action_dim: int) -> SACAgent:
    """An agent of the right shapes, to be filled from a file."""
    observations, zeros = jnp.zeros((1, observation_dim)), jnp.zeros(1)
    example = Transitions(observations, jnp.zeros((1, action_dim)), zeros, observations, zeros.astype(bool))
    return SACAgent.create(config, example, jax.random.key(0))


def _check(args: Args) -> None:
    counts = {name: getattr(args, name) for name in ("episodes", "held_out_episodes", "length")}
    counts |= {f"examination.{name}": value for name, value in vars(args.examination).items()}
    counts |= {f"training.{name}": getattr(args.training, name) for name in ("env_steps", "capacity", "checkpoints")}
    check_args(args, chosen={"tasks": None}, counts=counts)
    if args.training.env_steps % (args.training.checkpoints * args.training.online.lanes):
        raise ValueError(
            f"--training.env-steps ({args.training.env_steps}) must be a multiple of checkpoints times lanes"
            f" ({args.training.checkpoints} times {args.training.online.lanes})."
        )
    if args.training.horizon is not None and args.training.horizon < args.horizon:
        raise ValueError(
            f"--training.horizon ({args.training.horizon}) must not be below --horizon ({args.horizon}): the oracle's"
            " episodes begin in any state of the rollouts."
        )
    if not 0 <= args.training.starts <= 1:
        raise ValueError(f"--training.starts must lie in [0, 1], not {args.training.starts}.")
    for task in args.tasks:
        envs.make({"name": f"metaworld/{task}", "horizon": args.horizon}).close()
    if args.length > args.horizon:
        raise ValueError(f"segments of {args.length} steps do not fit into episodes of {args.horizon}.")


if __name__ == "__main__":
    run_main(main, PRESETS, "Oracles for regret labels, examined before they label.")
