"""Offline preference-guided policy optimization (OPPO) and its rivals, on locomotion data of mixed skill.

Kang et al. 2023 (arXiv:2305.16217) learn a policy that imitates whatever segment an encoder has seen, and a point z*
among the encoder's outputs that lies near preferred segments and far from the others; acting on z* is to act well. The
data are those of `experiments.locomotion`, and the labels a script's: of two segments, the one is preferred that earns
more in the steps from its first on. The paper's code draws labels anew for every update, millions in all. Here their
number is an axis:

* `oppo-few`, `oppo-many`, `oppo-endless`: OPPO from a few labelled pairs, from many, and as published;
* `oppo-ablated`: OPPO without the labels' part, alpha = 0 and z* left where it began. (Only leaving z* is no ablation:
  the encoder then moves preferred segments towards it.)
* `bc`, `percent-bc`: behaviour cloning of all episodes, and of those with the highest true return;
* `dt`: a decision transformer with true returns, asked for the highest of the data;
* `dt-learned`: the same with returns of a reward model learned from the many pairs, in training and in acting;
* `piql`: implicit Q-learning on rewards of the same model.

OPPO is evaluated twice from the same training: with z* as it is, as published, and with z* rescaled to the mean norm of
what preferred segments are encoded to ("projected"), because nothing else keeps its length near theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console
from scipy import stats

import envs
from agents.bc import BCAgent, BCConfig
from agents.decision_transformer import DecisionTransformerAgent, DecisionTransformerConfig
from agents.iql import IQLAgent, IQLConfig
from agents.oppo import OPPOAgent, OPPOConfig
from agents.reward_model import RewardModelAgent, RewardModelConfig
from experiments import locomotion
from experiments.experiment import (
    RunArgs,
    check_args,
    claim_row,
    first_seed,
    result_row,
    run_experiment,
    run_main,
    tally,
)
from experiments.grid import Job, JobContext
from labelers.teachers import Teacher
from robopref.agent import AgentPolicy, ContextPolicy
from robopref.datasets import (
    EndlessPreferences,
    PreferenceDataset,
    TransitionDataset,
    WindowDataset,
    WindowPreferenceDataset,
    best_episodes,
    fit_normalizer,
    sums_ahead,
)
from robopref.episodes import EpisodeDataset
from robopref.evaluation import compare, return_interval
from robopref.files import read_json
from robopref.queries import draw_queries, label_statistics
from robopref.records import read_records, write_records
from robopref.reports import LabelStatistics, MethodComparison, Report, Scatter
from robopref.rollouts import RolloutWorkers
from robopref.training import fit
from robopref.types import Policy, Segments

Config = TypeVar("Config")
Labelling: TypeAlias = Literal["few", "many", "endless"]

METHODS = (
    "bc",
    "percent-bc",
    "dt",
    "dt-learned",
    "piql",
    "oppo-few",
    "oppo-many",
    "oppo-endless",
    "oppo-ablated",
)
PROJECTED = ", projected"
SCORE, NEARNESS = "score", "Spearman of nearness to z* and partial return"
SHOWN = 600
"""Windows that the plots show."""


@dataclass(frozen=True)
class Fitting(Generic[Config]):
    """How an agent is trained.

    Attributes:
        config: its hyperparameters.
        updates: gradient steps.
        batch_size: pairs, windows or steps per update.
    """

    config: Config
    updates: int
    batch_size: int


OPPO = Fitting(
    OPPOConfig(width=64, layers=1, learning_rate=1e-3, warmup_updates=200, latent_learning_rate=3e-3), 3000, 16
)
DT = Fitting(DecisionTransformerConfig(width=64, layers=1, learning_rate=1e-3, warmup_updates=200), 3000, 32)
REWARD = Fitting(RewardModelConfig(hidden_dims=(128, 128), reduction="mean", learning_rate=1e-3), 1000, 16)
BC = Fitting(BCConfig(learning_rate=1e-3, decay_updates=10_000), 10_000, 256)
IQL = Fitting(IQLConfig(decay_updates=10_000), 10_000, 256)


@dataclass(frozen=True)
class Args(RunArgs):
    """OPPO and its rivals, on locomotion data of mixed skill.

    Attributes:
        data: folder of a run of `experiments.locomotion`; that of the same preset and seed by default, which is made if
            it is not there.
        tasks: datasets, as <robot>/<kind>.
        methods: which to train; all by default.
        seeds: each draws labels and networks of its own.
        few: labelled pairs of `oppo-few`.
        many: labelled pairs of `oppo-many`, `dt-learned` and `piql`; the few are among them.
        horizon: steps whose rewards a label compares.
        oppo: OPPO.
        dt: the decision transformers; their `return_scale` is taken from the data.
        reward: the reward model.
        bc: behaviour cloning.
        best: share of the episodes that %BC clones.
        iql: implicit Q-learning.
        evaluation_episodes: per method and seed, from the last update.
    """

    data: Path | None = None
    tasks: tuple[str, ...] = ("Hopper/medium-expert", "Walker2d/medium-expert")
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    few: int = 100
    many: int = 1000
    horizon: int = 200
    oppo: Fitting[OPPOConfig] = OPPO
    dt: Fitting[DecisionTransformerConfig] = DT
    reward: Fitting[RewardModelConfig] = REWARD
    bc: Fitting[BCConfig] = BC
    best: float = 0.1
    iql: Fitting[IQLConfig] = IQL
    evaluation_episodes: int = 10


DEFAULT = Args()
PRESETS = {
    "small": DEFAULT,
    "paper": replace(
        DEFAULT,
        preset="paper",
        tasks=tuple(f"{robot}/{kind}" for robot in ("HalfCheetah", "Hopper", "Walker2d") for kind in locomotion.SETS),
        oppo=Fitting(OPPOConfig(), 100_000, 64),
        dt=Fitting(DecisionTransformerConfig(), 100_000, 64),
        reward=Fitting(RewardModelConfig(reduction="mean"), 10_000, 64),
        bc=Fitting(BCConfig(decay_updates=500_000), 500_000, 256),
        iql=Fitting(IQLConfig(decay_updates=1_000_000), 1_000_000, 256),
        evaluation_episodes=50,
    ),
    "smoke": replace(
        DEFAULT,
        preset="smoke",
        tasks=("Hopper/medium-expert",),
        seeds=(0,),
        few=4,
        many=8,
        horizon=10,
        oppo=Fitting(OPPOConfig(length=4, width=8, layers=1, warmup_updates=2), 4, 4),
        dt=Fitting(DecisionTransformerConfig(length=4, width=8, layers=1, warmup_updates=2), 4, 4),
        reward=Fitting(RewardModelConfig(hidden_dims=(8,), reduction="mean"), 4, 4),
        bc=Fitting(BCConfig(hidden_dims=(8,), decay_updates=4), 4, 8),
        best=0.5,
        iql=Fitting(IQLConfig(hidden_dims=(8,), decay_updates=4), 4, 8),
        evaluation_episodes=2,
    ),
}


@dataclass(frozen=True)
class Claim:
    """That the score of `ours` is above that of `theirs` less `margin`, in points."""

    name: str
    text: str
    ours: str
    theirs: str
    margin: float = 0.0


CLAIMS = (
    Claim("a", "OPPO scores higher than behaviour cloning", "oppo-endless", "bc"),
    Claim("a", "OPPO scores higher than behaviour cloning from many labels", "oppo-many", "bc"),
    Claim("a", "OPPO scores higher than behaviour cloning from few labels", "oppo-few", "bc"),
    Claim("b", "OPPO is not 10 points below a decision transformer with true returns", "oppo-endless", "dt", 10.0),
    Claim("c", "OPPO is not 10 points below one with learned ones, from many labels", "oppo-many", "dt-learned", 10.0),
    Claim("e", "OPPO scores higher than without the labels' part", "oppo-endless", "oppo-ablated"),
    Claim("f", "more labels help: many score higher than few", "oppo-many", "oppo-few"),
)


@dataclass(frozen=True)
class Place:
    """Which data a job works on.

    Attributes:
        data: folder of the run of `experiments.locomotion`.
        task: dataset, as <robot>/<kind>.
    """

    data: str
    task: str

    def load(self) -> EpisodeDataset:
        robot, kind = self.task.split("/")
        return locomotion.dataset_of(Path(self.data), robot, kind)


@dataclass(frozen=True)
class Evaluation:
    """From which initial states policies are evaluated: those of seeds `first_seed`, `first_seed` + 1, ..."""

    episodes: int
    first_seed: int


def jobs(args: Args) -> list[Job]:
    """The grid: per dataset what is known of it, labels per seed, and every method and seed."""
    every = []
    for task in args.tasks:
        place, known = Place(str(data_folder(args)), task), f"episodes/{task}"
        every.append(Job(known, describe, {"place": place}))
        for seed in args.seeds:
            labels = f"labels/{task}/{seed}"
            shared = {"place": place, "seed": (args.seed, seed)}
            asked = {**shared, "count": args.many, "horizon": args.horizon}
            every.append(Job(labels, label, asked, needs=(known,)))
            evaluation = Evaluation(args.evaluation_episodes, first_seed(args.seed, 1) + 10_000 * seed)
            for method in args.methods:
                function, arguments = _training(args, method)
                arguments |= {**shared, "evaluation": evaluation, "labels": labels}
                every.append(Job(_cell(method, task, seed), function, arguments, needs=(known, labels)))
    return every


def _training(args: Args, method: str) -> tuple[Any, dict[str, Any]]:
    oppo = {"fitting": args.oppo, "few": args.few, "horizon": args.horizon}
    unguided = replace(args.oppo.config, alpha=0.0, learn_latent=False)
    made: dict[str, tuple[Any, dict[str, Any]]] = {
        "bc": (clone, {"fitting": args.bc, "best": 1.0}),
        "percent-bc": (clone, {"fitting": args.bc, "best": args.best}),
        "dt": (train_dt, {"fitting": args.dt, "reward": None}),
        "dt-learned": (train_dt, {"fitting": args.dt, "reward": args.reward}),
        "piql": (train_iql, {"fitting": args.iql, "reward": args.reward}),
        "oppo-few": (train_oppo, {**oppo, "labelling": "few"}),
        "oppo-many": (train_oppo, {**oppo, "labelling": "many"}),
        "oppo-endless": (train_oppo, {**oppo, "labelling": "endless"}),
        "oppo-ablated": (train_oppo, {**oppo, "fitting": replace(args.oppo, config=unguided), "labelling": "endless"}),
    }
    return made[method]


def data_folder(args: Args) -> Path:
    """The run of `experiments.locomotion` that the data come from."""
    return args.data or Path("runs") / f"locomotion-{args.preset}-{args.seed}"


def describe(context: JobContext, *, place: Place) -> dict[str, Any]:
    """Job: what is known of a dataset: its hash, its episodes' returns, and the references of scores."""
    dataset = place.load()
    judged = read_json(Path(place.data) / "judge" / place.task.split("/")[0] / "result.json")["value"]
    return {
        "hash": dataset.hash,
        "returns": dataset.returns.tolist(),
        "random": judged["random"],
        "expert": judged["expert"],
    }


def label(context: JobContext, *, place: Place, count: int, horizon: int, seed: tuple[int, int]) -> dict[str, Any]:
    """Job: a script compares pairs of segments of `horizon` steps by their rewards, without noise."""
    queries = draw_queries(place.load(), np.random.default_rng([*seed, 3]), count=count, length=horizon)
    labels = Teacher(name="script").label(queries, jax.random.fold_in(jax.random.key(seed[0]), seed[1]))
    write_records(context.folder / "labels.parquet", queries, labels)
    return {name: value if np.isfinite(value) else None for name, value in label_statistics(queries, labels).items()}


def clone(
    context: JobContext,
    *,
    place: Place,
    seed: tuple[int, int],
    evaluation: Evaluation,
    labels: str,
    fitting: Fitting[BCConfig],
    best: float,
) -> dict[str, Any]:
    """Job: behaviour cloning of the best episodes, or of all."""
    dataset = place.load()
    chosen = None if best == 1.0 else best_episodes(dataset, best).tolist()
    agent = _fit(context, BCAgent, TransitionDataset.create(dataset, chosen), dataset, fitting, seed)
    return {"returns": _evaluate(AgentPolicy(agent), dataset, evaluation)}


def train_dt(
    context: JobContext,
    *,
    place: Place,
    seed: tuple[int, int],
    evaluation: Evaluation,
    labels: str,
    fitting: Fitting[DecisionTransformerConfig],
    reward: Fitting[RewardModelConfig] | None,
) -> dict[str, Any]:
    """Job: a decision transformer, asked for the highest return of the data, true or learned."""
    dataset = place.load()
    model = None if reward is None else _learn_reward(context, dataset, labels, reward, seed)
    rewards = None if model is None else model.relabel(dataset)
    returns = sums_ahead(dataset, None, rewards)[dataset.offsets[:-1]]
    # So that what the network sees of returns is of order 1, as published for each robot.
    config = replace(fitting.config, return_scale=float(np.abs(returns).max()))
    windows = WindowDataset.create(dataset, config.length, rewards=rewards)
    fitting = replace(fitting, config=config)
    agent = _fit(context, DecisionTransformerAgent, windows, dataset, fitting, seed)
    policy = ContextPolicy(agent, target_return=float(returns.max()), reward_function=model)
    return {"returns": _evaluate(policy, dataset, evaluation), "target_return": float(returns.max())}


def train_iql(
    context: JobContext,
    *,
    place: Place,
    seed: tuple[int, int],
    evaluation: Evaluation,
    labels: str,
    fitting: Fitting[IQLConfig],
    reward: Fitting[RewardModelConfig],
) -> dict[str, Any]:
    """Job: implicit Q-learning on all steps, with learned rewards."""
    dataset = place.load()
    rewards = _learn_reward(context, dataset, labels, reward, seed).relabel(dataset)
    steps = TransitionDataset.create(dataset).replace(rewards=jnp.asarray(rewards, jnp.float32))
    agent = _fit(context, IQLAgent, steps, dataset, fitting, seed)
    return {"returns": _evaluate(AgentPolicy(agent), dataset, evaluation)}


def train_oppo(
    context: JobContext,
    *,
    place: Place,
    seed: tuple[int, int],
    evaluation: Evaluation,
    labels: str,
    fitting: Fitting[OPPOConfig],
    few: int,
    horizon: int,
    labelling: Labelling,
) -> dict[str, Any]:
    """Job: OPPO, evaluated with z* as it is and projected.

    Returns:
        `returns` and `projected`, returns; `nearness`, Spearman's rank correlation of -||z - z*|| and the partial
        return over windows of the data; `latents`, what plots show of these windows.
    """
    dataset = place.load()
    windows = WindowDataset.create(dataset, fitting.config.length)
    if labelling == "endless":
        data: Any = EndlessPreferences.create(windows, dataset, horizon)
    else:
        queries, answers = read_records(context.folders[labels] / "labels.parquet", dataset)
        chosen = np.arange(few if labelling == "few" else len(queries))
        data = WindowPreferenceDataset.create(windows, queries.take(chosen), answers.take(chosen))
    agent = _fit(context, OPPOAgent, data, dataset, fitting, seed)
    projected = agent.replace(config=replace(fitting.config, project_latent=True))
    return {
        "returns": _evaluate(ContextPolicy(agent), dataset, evaluation),
        "projected": _evaluate(ContextPolicy(projected), dataset, evaluation),
        **_latents(agent, dataset, windows, horizon, np.random.default_rng([*seed, 5])),
    }


class ModelReward(NamedTuple):
    """A reward model's word on single steps, centred and scaled to the data's."""

    agent: RewardModelAgent
    mean: Float[Array, ""]
    scale: Float[Array, ""]

    def __call__(self, observations: Float[Array, "*B O"], actions: Float[Array, "*B A"]) -> Float[Array, "*B"]:
        steps = Segments(observations[..., None, :], actions[..., None, :])
        return (self.agent.rewards(steps)[..., 0] - self.mean) / self.scale

    def relabel(self, dataset: EpisodeDataset) -> Float[np.ndarray, " R"]:
        """The rewards of every row of a dataset; those of final observations mean nothing."""
        return np.asarray(self(*_steps(dataset)), np.float64)


def _steps(dataset: EpisodeDataset) -> tuple[Array, Array]:
    return jnp.asarray(dataset.observations, jnp.float32), jnp.asarray(dataset.actions, jnp.float32)


def _learn_reward(
    context: JobContext,
    dataset: EpisodeDataset,
    labels: str,
    fitting: Fitting[RewardModelConfig],
    seed: tuple[int, int],
) -> ModelReward:
    queries, answers = read_records(context.folders[labels] / "labels.parquet", dataset)
    pairs = PreferenceDataset.create(queries, answers)
    reward_context = replace(context, folder=context.folder / "reward")
    agent = _fit(reward_context, RewardModelAgent, pairs, dataset, fitting, (*seed, 1))
    blank = ModelReward(agent, jnp.zeros(()), jnp.ones(()))
    # A constant added to a reward changes nothing in what was compared, and much in returns to go.
    rewards = blank(*_steps(dataset))
    return ModelReward(agent, jnp.min(rewards), jnp.std(rewards))


def _fit(
    context: JobContext,
    agent_class: Any,
    data: Any,
    dataset: EpisodeDataset,
    fitting: Fitting[Any],
    seed: Sequence[int],
) -> Any:
    key = functools.reduce(jax.random.fold_in, seed, jax.random.key(0))
    create_key, fit_key = jax.random.split(key)
    example = data.sample(create_key, 2)
    agent = agent_class.create(fitting.config, example, create_key, normalizer=fit_normalizer(dataset))
    interval = max(1, fitting.updates // 10)
    return fit(
        agent,
        data,
        fit_key,
        num_updates=fitting.updates,
        batch_size=fitting.batch_size,
        folder=context.folder,
        log_every=interval,
        checkpoint_every=fitting.updates,
        progress=context.progress,
    )


def _evaluate(policy: Policy, dataset: EpisodeDataset, evaluation: Evaluation) -> list[float]:
    seeds = range(evaluation.first_seed, evaluation.first_seed + evaluation.episodes)
    with RolloutWorkers(functools.partial(envs.make, dataset.env), lanes=min(10, evaluation.episodes)) as workers:
        return [float(episode.rewards.sum()) for episode in workers.run(policy, seeds)]


def _latents(
    agent: OPPOAgent, dataset: EpisodeDataset, windows: WindowDataset, horizon: int, rng: np.random.Generator
) -> dict[str, Any]:
    """z of windows beside what their first steps on earn; in two dimensions by their principal components."""
    rows = np.sort(rng.choice(np.asarray(windows.rows), min(SHOWN, len(windows.rows)), replace=False))
    latents = np.asarray(jax.jit(OPPOAgent.encode)(agent, windows.at(jnp.asarray(rows))), float)
    target, earned = np.asarray(agent.latent, float), sums_ahead(dataset, horizon)[rows]
    distances = np.linalg.norm(latents - target, axis=1)
    centre = latents.mean(axis=0)
    _, _, axes = np.linalg.svd(latents - centre, full_matrices=False)
    flat = (np.concatenate([latents, target[None]]) - centre) @ axes[:2].T
    correlation = stats.spearmanr(-distances, earned).statistic
    return {
        "nearness": float(correlation) if np.isfinite(correlation) else 0.0,
        "latents": {
            "places": flat[:-1].round(4).tolist(),
            "target": flat[-1].round(4).tolist(),
            "distances": distances.round(4).tolist(),
            "earned": earned.round(3).tolist(),
        },
    }


def report(args: Args, values: Mapping[str, Any], run: Mapping[str, Any], folder: Path) -> Report:
    """Everything that the run found; `values` are those of its jobs, `run` is the manifest."""
    rng = np.random.default_rng(args.seed)
    rows: list[dict[str, Any]] = []
    claims: list[dict[str, Any]] = []
    comparisons, scatters = [], []
    for task in args.tasks:
        known = values[f"episodes/{task}"]
        stored = return_interval(locomotion.scores(known["returns"], known), rng)
        rows.append(result_row("the data", task, SCORE, stored))
        scores = _scores(args, task, values)
        for method, each in scores.items():
            rows.append(result_row(method, task, SCORE, return_interval(each, rng)))
        for claim in CLAIMS:
            if scores.keys() >= {claim.ours, claim.theirs}:
                outcome = compare(scores[claim.ours], scores[claim.theirs], rng)
                claims.append(claim_row(claim.name, f"{task}: {claim.text}", outcome, threshold=-claim.margin))
                comparisons.append(MethodComparison(claim.ours, claim.theirs, SCORE, outcome, task))
        for method in (name for name in args.methods if name.startswith("oppo")):
            cells = [values[_cell(method, task, seed)] for seed in args.seeds]
            nearness = return_interval(np.array([[cell["nearness"]] for cell in cells]), rng)
            rows.append(result_row(method, task, NEARNESS, nearness, "run"))
            if method == "oppo-endless":
                text = f"{task}: nearness to z* ranks windows by partial return (Spearman above 0.5)"
                claims.append(claim_row("d", text, nearness, threshold=0.5))
                scatters += _pictures(task, cells[0]["latents"])
    return Report(
        title="OPPO and its rivals on locomotion data",
        summary=_summary(args, claims),
        results={"manifest": run, "rows": rows, "claims": sorted(claims, key=lambda claim: claim["id"])},
        comparisons=comparisons,
        scatters=scatters,
        labels=_label_facts(args, values),
    )


def main(args: Args, console: Console | None = None) -> int:
    """Runs what is missing of the grid, then writes and prints the report. Returns the exit status."""
    _check(args)
    if args.data is None:
        robots = tuple(dict.fromkeys(task.split("/")[0] for task in args.tasks))
        data = replace(locomotion.PRESETS[args.preset], tasks=robots, seed=args.seed, cores=args.cores)
        status = locomotion.main(replace(data, folder=data_folder(args), launcher=args.launcher), console)
        if status:
            return status
    values = run_experiment("oppo", args, jobs, report, seeds=args.seeds, console=console, unpublished=("data",))
    return 1 if values is None else 0


def _cell(method: str, task: str, seed: int) -> str:
    return f"train/{method}/{task}/{seed}"


def _scores(args: Args, task: str, values: Mapping[str, Any]) -> dict[str, Float[np.ndarray, "S E"]]:
    """Of every method, and of OPPO with z* projected."""
    known = values[f"episodes/{task}"]
    found = {}
    for method in args.methods:
        cells = [values[_cell(method, task, seed)] for seed in args.seeds]
        for key, name in (("returns", method), ("projected", method + PROJECTED)):
            if key in cells[0]:
                found[name] = locomotion.scores([cell[key] for cell in cells], known)
    return found


def _pictures(task: str, latents: Mapping[str, Any]) -> list[Scatter]:
    places, earned = np.array(latents["places"]), np.array(latents["earned"])
    first, second = latents["target"]
    return [
        Scatter(
            title=f"{task}: z of windows, and z*",
            x_label="first principal component",
            y_label="second",
            x=places[:, 0],
            y=places[:, 1],
            values=earned,
            values_label="partial return",
            marks={"z*": (first, second)},
        ),
        Scatter(
            title=f"{task}: partial return by distance to z*",
            x_label="distance of z to z*",
            y_label="partial return",
            x=np.array(latents["distances"]),
            y=earned,
        ),
    ]


def _label_facts(args: Args, values: Mapping[str, Any]) -> LabelStatistics:
    told = values[f"labels/{args.tasks[0]}/{args.seeds[0]}"]
    facts: dict[str, str | float] = {
        "teacher": f"a script: the greater sum of rewards over {args.horizon} steps",
        "few": f"{args.few} pairs",
        "many": f"{args.many} pairs",
        "endless": f"{args.oppo.updates * args.oppo.batch_size} pairs, each seen once",
    }
    return LabelStatistics(facts=facts | {"ties": told["ties"]} if "ties" in told else facts)


def _summary(args: Args, claims: Sequence[Mapping[str, Any]]) -> str:
    return (
        f"Scores from 0, random actions, to 100, the last commanded policy at its best speed. {len(args.seeds)} seeds,"
        f" {args.evaluation_episodes} episodes each, from the last update.\n\n" + tally(claims)
    )


def _check(args: Args) -> None:
    known = tuple(f"{robot}/{kind}" for robot in locomotion.COMMANDS for kind in locomotion.SETS)
    counts = {name: getattr(args, name) for name in ("few", "many", "horizon", "evaluation_episodes")}
    check_args(args, chosen={"tasks": known, "methods": METHODS, "seeds": None}, counts=counts)
    if args.few > args.many:
        raise ValueError(f"--few ({args.few}) are the first of --many ({args.many}), and cannot be more.")
    if args.data is not None and not args.data.is_dir():
        raise ValueError(f"--data {args.data} is no folder; leave it out, and the data are made.")


if __name__ == "__main__":
    run_main(main, PRESETS, "OPPO and its rivals, on locomotion data of mixed skill.")
