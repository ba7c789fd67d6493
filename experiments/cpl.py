"""Contrastive preference learning and its rivals (Hejna et al. 2023, arXiv:2310.13639), on simulated preferences.

In each Meta-World task, episodes of mixed quality are collected and cut into segments; a simulated teacher prefers the
segment with the smaller regret; policies are learned from those preferences and evaluated from their last checkpoint.
Two kinds of comparisons are made from one pool of segments, as in the paper:

* dense: all pairs among few segments;
* sparse: many segments, each in a single pair.

The methods:

* `bc`, `percent-bc`: behaviour cloning of all episodes, and of those with the highest true return;
* `sft`: behaviour cloning of all segments, then of the preferred ones alone;
* `piql`: implicit Q-learning on rewards that are learned from the preferences at the same time;
* `cpl`: contrastive preference learning with conservative weight lambda = 0.5; `cpl-lambda-1` without it; `cpl-bc` with
  behaviour cloning in its place; `cpl-kl` with a reference policy; `cpl-k` from ranked sets;
* `cpl-shuffled`: CPL from the same labels in random order, which must not help;
* `sft-sparse`, `piql-sparse`, `cpl-sparse`: from sparse comparisons; all others are from dense ones;
* `expert`: the scripted policy against which regret is measured.

Every method of a seed has the same segments and labels and is evaluated on the same initial states. Beside success, the
share of held-out pairs that each policy and reward model ranks as they were labelled is reported, with the highest
share that the teacher's noise allows.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from jaxtyping import Float
from rich.console import Console

import envs
from agents.bc import BCConfig
from agents.cpl import CPLConfig
from agents.iql import IQLConfig
from agents.piql import PIQLConfig
from agents.reward_model import RewardModelConfig
from envs.behaviours import Expert
from envs.metaworld import CPL_VIEW
from experiments.demo import behaviours
from experiments.experiment import (
    Evaluation,
    RunArgs,
    Training,
    check_args,
    claim_row,
    collect,
    evaluate_policy,
    film,
    first_seed,
    result_row,
    run_experiment,
    run_main,
    tally,
    train,
)
from experiments.grid import Job, JobContext
from experiments.oracle import load_oracle
from labelers.regret import MeasuredRegretTeacher, RegretTeacher, SimulatedRegretTeacher
from robopref.episodes import EpisodeDataset, load_episodes
from robopref.evaluation import (
    attainable_accuracy,
    claim_verdict,
    compare,
    return_interval,
    success_interval,
)
from robopref.files import atomic_write
from robopref.networks import Pixels
from robopref.queries import Queries, draw_segments, label_statistics, pair_segments
from robopref.records import write_records
from robopref.reports import LabelStatistics, MethodComparison, Report

Pairing: TypeAlias = Literal["dense", "sparse", "ranked"]
TeacherName: TypeAlias = Literal["regret", "oracle_regret", "oracle_cpl_release", "partial_return"]

METHODS = (
    "bc",
    "percent-bc",
    "sft",
    "piql",
    "cpl",
    "cpl-lambda-1",
    "cpl-bc",
    "cpl-kl",
    "cpl-k",
    "cpl-shuffled",
    "sft-sparse",
    "piql-sparse",
    "cpl-sparse",
)
SUCCESS = "success rate"
SMOOTHED = "success rate, best smoothed checkpoint"
RANKING = "ranking accuracy, held-out pairs"

_TEACHERS: Mapping[TeacherName, str] = {
    "regret": "the smaller regret against the scripted expert",
    "oracle_regret": "the smaller regret by a SAC oracle",
    "oracle_cpl_release": "the authors' stand-in for regret, by a SAC oracle",
    "partial_return": "the greater partial return",
}

PUBLISHED: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "bin-picking-v3": {"dense": (66.9, 70.6, 80.0), "sparse": (67.0, 75.0, 83.2)},
    "button-press-v3": {"dense": (21.6, 16.2, 24.5), "sparse": (21.4, 19.5, 29.8)},
    "door-open-v3": {"dense": (63.3, 69.0, 80.0), "sparse": (63.6, 79.0, 77.9)},
    "drawer-open-v3": {"dense": (62.6, 71.1, 83.6), "sparse": (63.5, 76.2, 79.1)},
    "plate-slide-v3": {"dense": (41.6, 49.6, 61.1), "sparse": (41.9, 55.5, 56.4)},
    "sweep-into-v3": {"dense": (51.9, 60.6, 70.4), "sparse": (50.9, 73.4, 81.2)},
}
"""Success in per cent of SFT, P-IQL and CPL from states, in the paper's Table 1 (with version 2 of the tasks)."""


@dataclass(frozen=True)
class Claim:
    """That one weighted sum of methods' success rates is above, or below, 0."""

    name: str
    text: str
    terms: tuple[tuple[float, str], ...]
    direction: Literal["above", "below"] = "above"


CLAIMS = (
    Claim("a", "CPL succeeds more often than SFT, from dense comparisons", ((1, "cpl"), (-1, "sft"))),
    Claim("a", "CPL succeeds more often than SFT, from sparse comparisons", ((1, "cpl-sparse"), (-1, "sft-sparse"))),
    Claim("b", "CPL succeeds more often than P-IQL, from dense comparisons", ((1, "cpl"), (-1, "piql"))),
    Claim("c", "lambda = 0.5 succeeds more often than lambda = 1", ((1, "cpl"), (-1, "cpl-lambda-1"))),
    Claim("c", "behaviour cloning makes up for lambda = 1 (CPL-BC)", ((1, "cpl-bc"), (-1, "cpl-lambda-1"))),
    Claim(
        "d",
        "P-IQL gains more than CPL from sparse comparisons of more segments",
        ((1, "piql-sparse"), (-1, "piql"), (-1, "cpl-sparse"), (1, "cpl")),
    ),
    Claim("e", "CPL with shuffled labels succeeds less often than SFT", ((1, "cpl-shuffled"), (-1, "sft")), "below"),
)


BC = Training(BCConfig(decay_updates=4000), "episodes", updates=4000, batch_size=512)
SFT = Training(
    BCConfig(learning_rate=1e-3, pretrain_updates=360, decay_updates=1200),
    "preferences",
    updates=1200,
    batch_size=20,
    checkpoints=8,
)
PIQL = Training(
    PIQLConfig(
        reward=RewardModelConfig(ensemble=1, learning_rate=1e-3),
        iql=IQLConfig(learning_rate=1e-3, decay_updates=1200),
        reward_updates=600,
    ),
    "preferences",
    updates=1200,
    batch_size=20,
    checkpoints=8,
)
CPL = Training(
    CPLConfig(learning_rate=5e-4, pretrain_learning_rate=1e-3, pretrain_updates=360, decay_updates=1200),
    "preferences",
    updates=1200,
    batch_size=20,
    checkpoints=8,
)


@dataclass(frozen=True)
class Args(RunArgs):
    """Contrastive preference learning and its rivals, on simulated preferences.

    Attributes:
        tasks: names of Meta-World tasks.
        methods: which to train; all by default.
        seeds: each draws segments, labels and networks of its own, and initial states for evaluation.
        horizon: steps in which the task must be done.
        episodes: to collect.
        held_out_episodes: more of them, for pairs that no method trains on.
        pool: segments to measure, from which every seed draws its own.
        held_out_pool: segments to measure in the held-out episodes; an even number.
        length: steps of a segment.
        dense_segments: how many of the pool are compared all with all.
        sparse_segments: how many are compared in one pair each; an even number.
        candidates: segments in a ranked set of CPL(K).
        ranked_sets: of CPL(K), drawn among the dense segments.
        teacher: prefers the smaller regret against the scripted expert, exactly, by the simulator (`regret`); by the
            values of a SAC oracle (`oracle_regret`); what the authors' code takes for it (`oracle_cpl_release`, see
            labelers/regret.py); or the greater partial return.
        oracles: folder of a finished run of `experiments.oracle`, for the teachers that need one.
        discount: of the regret.
        expert_horizon: steps that the expert goes on for beyond a segment.
        temperature: of the teacher's noise, in the unit of the reward; 0 is noiseless, as published.
        observe: vectors or images; images are rendered from stored states, as in the paper but without effects.
        image_size: height and width of the images, in pixels.
        bc: behaviour cloning of all episodes.
        best: share of the episodes that %BC clones.
        sft: behaviour cloning of all segments, then of the preferred ones.
        piql: implicit Q-learning on learned rewards.
        cpl: contrastive preference learning.
        bc_weight: of CPL-BC.
        kl_temperature: alpha of CPL-KL.
        kl_conservative_weight: lambda of CPL-KL.
        kl_learning_rate_factor: by which CPL-KL's learning rate is smaller.
        evaluation_episodes: per method and seed, from the last checkpoint.
        curve_episodes: per method, seed and point of the learning curve.
        smoothing: checkpoints over which the learning curve is averaged before its best point is taken.
    """

    tasks: tuple[str, ...] = ("door-open-v3", "plate-slide-v3")
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    horizon: int = 120
    episodes: int = 600
    held_out_episodes: int = 100
    pool: int = 2000
    held_out_pool: int = 400
    length: int = 64
    dense_segments: int = 500
    sparse_segments: int = 2000
    candidates: int = 4
    ranked_sets: int = 2000
    teacher: TeacherName = "regret"
    oracles: Path | None = None
    discount: float = 0.99
    expert_horizon: int = 80
    temperature: float = 0.0
    observe: Literal["state", "pixels"] = "state"
    image_size: int = 64
    bc: Training[BCConfig] = BC
    best: float = 0.1
    sft: Training[BCConfig] = SFT
    piql: Training[PIQLConfig] = PIQL
    cpl: Training[CPLConfig] = CPL
    bc_weight: float = 1.0
    kl_temperature: float = 0.2
    kl_conservative_weight: float = 0.75
    kl_learning_rate_factor: float = 0.1
    evaluation_episodes: int = 50
    curve_episodes: int = 10
    smoothing: int = 3


def _smoke(training: Training[Any], config: Any) -> Training[Any]:
    return replace(training, config=config, updates=6, batch_size=4, checkpoints=2)


def _paper_pixels(*, updates: int, pretrain_updates: int, pairs: int, methods: tuple[str, ...]) -> Args:
    """The published experiments from images; a checkpoint every 2,500 updates."""
    paper = PRESETS["paper"]
    seen: dict[str, Any] = {"hidden_dims": (1024, 1024), "dropout": 0.5, "pixels": Pixels(), "learning_rate": 1e-4}
    dense = "cpl" in methods
    size: dict[str, Any] = {"updates": updates, "batch_size": pairs, "checkpoints": updates // 2500}
    # From dense comparisons, all pairs among the 64 segments of a batch are contrasted.
    contrasted = {"data": "rankings", "batch_size": 1} if dense else {}
    return replace(
        paper,
        preset="paper-pixels" if dense else "paper-pixels-sparse",
        methods=methods,
        seeds=(0, 1, 2),
        observe="pixels",
        candidates=64,
        bc_weight=1.5,
        bc=replace(paper.bc, config=replace(paper.bc.config, **seen)),
        sft=replace(paper.sft, config=replace(paper.sft.config, **seen, pretrain_updates=pretrain_updates), **size),
        piql=replace(
            paper.piql,
            config=PIQLConfig(
                reward=RewardModelConfig(
                    hidden_dims=(1024, 1024), ensemble=1, learning_rate=1e-4, pixels=seen["pixels"]
                ),
                iql=replace(paper.piql.config.iql, **seen, decay_updates=updates),
                reward_updates=paper.piql.config.reward_updates,
            ),
            **size,
        ),
        cpl=replace(
            paper.cpl,
            config=replace(
                paper.cpl.config,
                **seen,
                pretrain_updates=pretrain_updates,
                ranking_loss="all_pairs" if dense else "plackett_luce",
            ),
            **{**size, **contrasted},
        ),
    )


DEFAULT = Args()
_TINY: dict[str, Any] = {"hidden_dims": (16,), "decay_updates": 6}
PRESETS = {
    "small": DEFAULT,
    "smoke": replace(
        DEFAULT,
        preset="smoke",
        tasks=("drawer-open-v3",),
        seeds=(0, 1),
        horizon=30,
        episodes=6,
        held_out_episodes=3,
        pool=20,
        held_out_pool=10,
        length=8,
        dense_segments=8,
        sparse_segments=20,
        candidates=3,
        ranked_sets=10,
        expert_horizon=5,
        bc=_smoke(DEFAULT.bc, replace(DEFAULT.bc.config, **_TINY)),
        sft=_smoke(DEFAULT.sft, replace(DEFAULT.sft.config, **_TINY, pretrain_updates=2)),
        piql=_smoke(
            DEFAULT.piql,
            PIQLConfig(
                reward=RewardModelConfig(hidden_dims=(16,), ensemble=1), iql=IQLConfig(**_TINY), reward_updates=3
            ),
        ),
        cpl=_smoke(DEFAULT.cpl, replace(DEFAULT.cpl.config, **_TINY, pretrain_updates=2)),
        evaluation_episodes=3,
        curve_episodes=2,
        smoothing=2,
    ),
    "paper": replace(
        DEFAULT,
        preset="paper",
        tasks=tuple(PUBLISHED),
        seeds=(0, 1, 2, 3),
        horizon=250,
        episodes=2500,
        held_out_episodes=250,
        pool=20_000,
        held_out_pool=2000,
        dense_segments=2500,
        sparse_segments=20_000,
        ranked_sets=10_000,
        expert_horizon=250,
        bc=Training(BCConfig((512, 512), 0.25, 1e-4, action_limit=1 - 1e-5), "episodes", 500_000, 1024, 100),
        sft=Training(
            BCConfig((512, 512), 0.25, 1e-4, pretrain_updates=200_000, action_limit=1 - 1e-5),
            "preferences",
            updates=500_000,
            batch_size=96,
            checkpoints=100,
        ),
        piql=Training(
            PIQLConfig(
                reward=RewardModelConfig(hidden_dims=(512, 512), ensemble=1, learning_rate=3e-4),
                iql=IQLConfig(
                    hidden_dims=(512, 512),
                    dropout=0.25,
                    learning_rate=3e-4,
                    decay_updates=500_000,
                    action_limit=1 - 1e-5,
                ),
                reward_updates=50_000,
            ),
            "preferences",
            updates=500_000,
            batch_size=96,
            checkpoints=100,
        ),
        cpl=Training(
            CPLConfig(
                hidden_dims=(512, 512),
                dropout=0.25,
                learning_rate=1e-4,
                warmup_updates=10_000,
                pretrain_updates=200_000,
                pretrain_learning_rate=1e-4,
                action_limit=1 - 1e-5,
            ),
            "preferences",
            updates=500_000,
            batch_size=96,
            checkpoints=100,
        ),
        evaluation_episodes=100,
        curve_episodes=25,
        smoothing=8,
    ),
}
PRESETS["paper-pixels"] = _paper_pixels(
    updates=120_000, pretrain_updates=40_000, pairs=32, methods=("sft", "piql", "cpl", "cpl-bc", "cpl-kl")
)
PRESETS["paper-pixels-sparse"] = _paper_pixels(
    updates=200_000, pretrain_updates=80_000, pairs=48, methods=("sft-sparse", "piql-sparse", "cpl-sparse")
)


def jobs(args: Args) -> list[Job]:
    """The grid: per task the episodes, the measured segments, labels per seed, and every method and seed."""
    every = []
    for task in args.tasks:
        env = {"name": f"metaworld/{task}", "horizon": args.horizon}
        cores = max(1, (args.cores or os.cpu_count() or 1) // len(args.tasks))
        for name, count, purpose in (("episodes", args.episodes, 0), ("held-out", args.held_out_episodes, 3)):
            arguments = {"env": env, "policy": behaviours(task), "episodes": count}
            arguments["first_seed"] = first_seed(args.seed, purpose)
            every.append(Job(f"{name}/{task}", collect, arguments, cores=cores))
        for name, source, count in (
            ("segments", "episodes", args.pool),
            ("held-out-segments", "held-out", args.held_out_pool),
        ):
            every.append(_measure_job(args, task, name, f"{source}/{task}", count))
        asked = {"seed": (args.seed, -1), "temperature": args.temperature, "candidates": args.candidates}
        every.append(
            Job(
                f"labels/held-out/{task}",
                label,
                {
                    **asked,
                    "episodes": f"held-out/{task}",
                    "segments": f"held-out-segments/{task}",
                    "pairing": "sparse",
                    "count": args.held_out_pool,
                    "sets": 0,
                },
                needs=(f"held-out/{task}", f"held-out-segments/{task}"),
            )
        )
        for seed in args.seeds:
            every += _seed_jobs(args, task, seed, env, asked)
        if args.observe == "state":
            every.append(_film_job(args, task, env))
    return every


def _view(env: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """The environment as the paper's agents see it."""
    return {**env, **CPL_VIEW, "image_size": image_size, "observe": "pixels"}


def _measure_job(args: Args, task: str, name: str, episodes: str, count: int) -> Job:
    arguments = {
        "episodes": episodes,
        "count": count,
        "length": args.length,
        "teacher": args.teacher,
        "oracle": None if args.oracles is None else str(args.oracles / "oracle" / task),
        "expert": Expert(task),
        "discount": args.discount,
        "expert_horizon": args.expert_horizon,
        "seed": args.seed,
    }
    return Job(f"{name}/{task}", measure, arguments, needs=(episodes,))


def _seed_jobs(args: Args, task: str, seed: int, env: Mapping[str, Any], asked: Mapping[str, Any]) -> list[Job]:
    view = None if args.observe == "state" else _view(env, args.image_size)
    evaluation = Evaluation(
        view or env,
        episodes=args.evaluation_episodes,
        first_seed=first_seed(args.seed, 1) + 10_000 * seed,
        curve_episodes=args.curve_episodes,
        curve_first_seed=first_seed(args.seed, 2),
    )
    scripted = {"policy": Expert(task), "evaluation": replace(evaluation, env=env)}
    every = [Job(_cell("expert", task, seed), evaluate_policy, scripted)]
    episodes, segments = f"episodes/{task}", f"segments/{task}"
    for pairing in sorted({_pairing(args, method) for method in args.methods}):
        count = args.sparse_segments if pairing == "sparse" else args.dense_segments
        arguments = {
            **asked,
            "seed": (args.seed, seed),
            "episodes": episodes,
            "segments": segments,
            "pairing": pairing,
            "count": count,
            "sets": args.ranked_sets,
        }
        every.append(Job(_labels(pairing, task, seed), label, arguments, needs=(episodes, segments)))
    held_out = (f"held-out/{task}", f"labels/held-out/{task}")
    for method in args.methods:
        labels = _labels(_pairing(args, method), task, seed)
        arguments = {
            "training": _training(args, method),
            "evaluation": evaluation,
            "seed": (args.seed, seed),
            "episodes": episodes,
            "labels": labels,
            "held_out": held_out,
            "view": view,
        }
        every.append(Job(_cell(method, task, seed), train, arguments, needs=(episodes, labels, *held_out)))
    return every


def _film_job(args: Args, task: str, env: Mapping[str, Any]) -> Job:
    shown = [method for method in ("sft", "piql", "cpl") if method in args.methods]
    cells = {method: _cell(method, task, args.seeds[0]) for method in shown}
    arguments = {
        "env": env,
        "trainings": {method: _training(args, method) for method in shown},
        "cells": cells,
        "expert": Expert(task),
        "seed": first_seed(args.seed, 1) + 10_000 * args.seeds[0],
    }
    return Job(f"film/{task}", film, arguments, needs=tuple(cells.values()))


def measure(
    context: JobContext,
    *,
    episodes: str,
    count: int,
    length: int,
    teacher: TeacherName,
    oracle: str | None,
    expert: Expert,
    discount: float,
    expert_horizon: int,
    seed: int,
) -> dict[str, Any]:
    """Job: draws segments from the episodes, and measures by how much each falls short.

    By regret, it is what the expert would have earned more. By partial return, it is minus the partial return.

    Raises:
        ValueError: the oracle is of another task, or did not pass its examination.
    """
    dataset = load_episodes(context.folders[episodes] / "episodes")
    drawn, starts = draw_segments(dataset, np.random.default_rng(seed), count=count, length=length)
    pairs = pair_segments(dataset, drawn, starts, length=length, pairing="sparse")
    source: dict[str, Any] = {"measured": teacher}
    if teacher == "partial_return":
        shortfalls = -pairs.partial_returns
    elif teacher == "regret":
        horizon = int(dataset.lengths.max()) + length + expert_horizon
        simulated = SimulatedRegretTeacher(
            functools.partial(envs.make, {**dataset.env, "horizon": horizon}),
            expert,
            expert_horizon=expert_horizon,
            discount=discount,
            on_segment=context.progress,
        )
        shortfalls = simulated.segment_regrets(pairs, jax.random.key(seed))
        source |= {"expert": dict(expert.describe(0)), "expert_horizon": expert_horizon, "discount": discount}
    else:
        judge = _load_judge(teacher, oracle, dataset)
        shortfalls = judge.segment_regrets(pairs)
        source |= judge.parameters
    with atomic_write(context.folder / "segments.npz") as path, path.open("wb") as file:
        np.savez(file, episodes=drawn, starts=starts, shortfalls=shortfalls.ravel())
    return {"length": length, "source": source, "mean_shortfall": float(shortfalls.mean())}


def _load_judge(teacher: TeacherName, oracle: str | None, dataset: EpisodeDataset) -> RegretTeacher:
    assert oracle is not None
    found = load_oracle(Path(oracle))
    if found.env["name"] != dataset.env["name"]:
        raise ValueError(
            f"the oracle in {oracle} is of {found.env['name']}, but the episodes of {dataset.env['name']}."
        )
    return found.teacher("cpl_release" if teacher == "oracle_cpl_release" else "deterministic")


def label(
    context: JobContext,
    *,
    episodes: str,
    segments: str,
    pairing: Pairing,
    count: int,
    sets: int,
    candidates: int,
    temperature: float,
    seed: tuple[int, int],
) -> dict[str, Any]:
    """Job: draws from the measured segments, makes queries of them, and has the teacher answer.

    Returns:
        statistics of the labels of pairs, and `attainable`, the highest ranking accuracy that they allow.
    """
    dataset = load_episodes(context.folders[episodes] / "episodes")
    measured = context.values[segments]
    with np.load(context.folders[segments] / "segments.npz") as pool:
        teacher = MeasuredRegretTeacher(
            dataset_hash=dataset.hash,
            length=measured["length"],
            episodes=pool["episodes"],
            starts=pool["starts"],
            regrets=pool["shortfalls"],
            temperature=temperature,
            source=measured["source"],
            name=measured["source"]["measured"],
        )
    rng = np.random.default_rng([seed[0], seed[1] + 1, 7])
    chosen = rng.choice(len(teacher.episodes), size=count, replace=False)
    queries = _make_queries(dataset, teacher, chosen, pairing, sets, candidates, rng)
    key = jax.random.fold_in(jax.random.key(seed[0]), seed[1] + 1)
    labels = teacher.label(queries, key)
    write_records(context.folder / "labels.parquet", queries, labels)
    if labels.values is None:
        return {}
    statistics = label_statistics(queries, labels)
    found = {name: value if np.isfinite(value) else None for name, value in statistics.items()}
    probabilities = replace(teacher, soft=True).label(queries, key).values
    assert probabilities is not None
    return {**found, "attainable": attainable_accuracy(probabilities)}


def _make_queries(
    dataset: EpisodeDataset,
    teacher: MeasuredRegretTeacher,
    chosen: np.ndarray,
    pairing: Pairing,
    sets: int,
    candidates: int,
    rng: np.random.Generator,
) -> Queries:
    episodes, starts = teacher.episodes[chosen], teacher.starts[chosen]
    if pairing != "ranked":
        return pair_segments(dataset, episodes, starts, length=teacher.length, pairing=pairing)
    members = rng.permuted(np.tile(np.arange(len(chosen)), (sets, 1)), axis=1)[:, :candidates]
    return Queries(dataset, episodes[members], starts[members], teacher.length)


def report(args: Args, values: Mapping[str, Any], run: Mapping[str, Any], folder: Path) -> Report:
    """Everything that the run found; `values` are those of its jobs, `run` is the manifest."""
    rng = np.random.default_rng(args.seed)
    rows: list[dict[str, Any]] = []
    comparisons, claims, curves = [], [], {}
    for task in args.tasks:
        scores = {
            method: np.array([values[_cell(method, task, seed)]["successes"] for seed in args.seeds], float)
            for method in (*args.methods, "expert")
        }
        for method, successes in scores.items():
            rows.append(result_row(method, task, SUCCESS, success_interval(successes)))
        for claim in CLAIMS:
            if not scores.keys() >= {method for _, method in claim.terms}:
                continue
            ours = sum((weight * scores[method] for weight, method in claim.terms if weight > 0), np.zeros(()))
            theirs = sum((-weight * scores[method] for weight, method in claim.terms if weight < 0), np.zeros(()))
            outcome = compare(ours, theirs, rng)
            text, paper = f"{task}: {claim.text}", _published(claim, task)
            claims.append(claim_row(claim.name, text, outcome, claim.direction, paper=paper))
            if len(claim.terms) == 2:
                comparisons.append(MethodComparison(claim.terms[0][1], claim.terms[1][1], SUCCESS, outcome, task))
        prefix = f"{task} " if len(args.tasks) > 1 else ""
        for method in args.methods:
            cells = [values[_cell(method, task, seed)] for seed in args.seeds]
            steps = np.array([int(step) for step in cells[0]["curve"]])
            curve = np.array([list(cell["curve"].values()) for cell in cells], float)
            curves[f"{prefix}{method}", SUCCESS] = (steps, curve.mean(axis=-1))
            rows.append(_smoothed_row(method, task, curve, args.smoothing))
            rows += _ranking_rows(method, task, cells, rng)
        attainable = values[f"labels/held-out/{task}"]["attainable"]
        n = int(values[f"labels/held-out/{task}"]["n"])
        estimate = {"n": n, "seeds": 1, "mean": attainable, "low": attainable, "high": attainable}
        rows.append({"method": "best attainable", "task": task, "metric": RANKING, "unit": "pair", **estimate})
        times = _training_times(args, task, values)
        rows += _speed_rows(times, task, rng)
        claims += _speed_claim(times, task, rng)
    made_film = values.get(f"film/{args.tasks[0]}", {"film": None, "note": "Policies that see images are not filmed."})
    return Report(
        title="Contrastive preference learning and its rivals",
        summary=_summary(args, claims),
        results={"manifest": run, "rows": rows, "claims": sorted(claims, key=lambda claim: claim["id"])},
        comparisons=comparisons,
        curves=curves,
        labels=_label_facts(args, values),
        behaviours={
            name: success_interval(successes)
            for name, successes in values[f"episodes/{args.tasks[0]}"]["behaviours"].items()
        },
        film=folder / f"film/{args.tasks[0]}" / made_film["film"] if made_film["film"] else None,
        film_note=made_film["note"],
    )


def main(args: Args, console: Console | None = None) -> int:
    """Runs what is missing of the grid, then writes and prints the report. Returns the exit status."""
    _check(args)
    values = run_experiment("cpl", args, jobs, report, seeds=args.seeds, console=console)
    return 1 if values is None else 0


def _training(args: Args, method: str) -> Training[Any]:
    cpl = args.cpl.config
    base = method.removesuffix("-sparse")
    made: dict[str, Training[Any]] = {
        "bc": args.bc,
        "percent-bc": replace(args.bc, best=args.best),
        "sft": args.sft,
        "piql": args.piql,
        "cpl": args.cpl,
        "cpl-lambda-1": replace(args.cpl, config=replace(cpl, conservative_weight=1.0)),
        "cpl-bc": replace(args.cpl, config=replace(cpl, conservative_weight=1.0, bc_weight=args.bc_weight)),
        "cpl-kl": replace(
            args.cpl,
            config=replace(
                cpl,
                reference=True,
                temperature=args.kl_temperature,
                conservative_weight=args.kl_conservative_weight,
                learning_rate=args.kl_learning_rate_factor * cpl.learning_rate,
            ),
        ),
        # As many segments per update as in pairs.
        "cpl-k": replace(args.cpl, data="rankings", batch_size=max(1, 2 * args.cpl.batch_size // args.candidates)),
        "cpl-shuffled": replace(args.cpl, data="shuffled"),
    }
    return made[base]


def _pairing(args: Args, method: str) -> Pairing:
    if method.endswith("-sparse"):
        return "sparse"
    return "ranked" if _training(args, method).data == "rankings" else "dense"


def _cell(method: str, task: str, seed: int) -> str:
    return f"train/{method}/{task}/{seed}"


def _labels(pairing: Pairing, task: str, seed: int) -> str:
    return f"labels/{pairing}/{task}/{seed}"


def _published(claim: Claim, task: str) -> float | None:
    """The paper's figure for the same difference, where its Table 1 has all that is needed."""
    columns = {"sft": 0, "piql": 1, "cpl": 2}
    total = 0.0
    for weight, method in claim.terms:
        column = columns.get(method.removesuffix("-sparse"))
        if column is None or task not in PUBLISHED:
            return None
        total += weight * PUBLISHED[task]["sparse" if method.endswith("-sparse") else "dense"][column] / 100
    return round(total, 3)


def _smoothed_row(method: str, task: str, curve: Float[np.ndarray, "S P E"], window: int) -> dict[str, Any]:
    """The paper's own statistic: the best point of the smoothed curve. It flatters, since the best is picked."""
    width = min(window, curve.shape[1])
    smoothed = np.convolve(curve.mean(axis=(0, 2)), np.full(width, 1 / width), mode="valid")
    best = int(np.argmax(smoothed))
    estimate = success_interval(curve[:, best : best + width].reshape(len(curve), -1))
    return result_row(method, task, SMOOTHED, estimate)


def _ranking_rows(
    method: str, task: str, cells: Sequence[Mapping[str, Any]], rng: np.random.Generator
) -> list[dict[str, Any]]:
    rows = []
    for scorer in cells[0]["rankings"]:
        # Where a method has two scorers, the segments are compared by its reward model, and by its policy as well.
        name = f"{method} (policy)" if scorer == "policy_segment_scores" else method
        estimate = return_interval([cell["rankings"][scorer] for cell in cells], rng)
        rows.append(result_row(name, task, RANKING, estimate, "pair"))
    return rows


def _training_times(args: Args, task: str, values: Mapping[str, Any]) -> dict[str, Float[np.ndarray, " seeds"]]:
    """Logarithm of the seconds that each run takes, for the methods whose speed is a claim.

    A run that was killed between its training and its evaluation has no time; its seed is left out of both.
    """
    methods = [method for method in ("cpl", "piql") if method in args.methods]
    seconds = np.array(
        [[values[_cell(method, task, seed)]["seconds_per_update"] for seed in args.seeds] for method in methods],
        dtype=float,
    ).reshape(len(methods), len(args.seeds))
    known = np.isfinite(seconds).all(axis=0)
    if not known.any():
        return {}
    return {
        method: np.log(row[known] * _training(args, method).updates)
        for method, row in zip(methods, seconds, strict=True)
    }


def _speed_rows(
    times: Mapping[str, Float[np.ndarray, " seeds"]], task: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Geometric means: times are positive, and what is claimed is a ratio."""
    rows = []
    for method, logarithms in times.items():
        estimate = return_interval(logarithms[:, None], rng)
        ends = {name: math.exp(getattr(estimate, name)) for name in ("mean", "low", "high")}
        counts = {"n": estimate.n, "seeds": estimate.seeds}
        rows.append({"method": method, "task": task, "metric": "training time (s)", "unit": "run", **counts, **ends})
    return rows


def _speed_claim(
    times: Mapping[str, Float[np.ndarray, " seeds"]], task: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    if len(times) < 2:
        return []
    outcome = compare(times["cpl"][:, None], times["piql"][:, None], rng)
    numbers = {
        "ours": math.exp(outcome.difference),
        "low": math.exp(outcome.low),
        "high": math.exp(outcome.high),
        "verdict": claim_verdict(outcome, "below"),
    }
    claim = f"{task}: CPL trains in less time than P-IQL (ratio of times below 1)"
    # 10.2 hours against 16.5 on one GPU, from images.
    return [{"id": "f", "claim": claim, "paper": 0.618, **numbers}]


def _label_facts(args: Args, values: Mapping[str, Any]) -> LabelStatistics:
    told = values[_labels(_pairing(args, args.methods[0]), args.tasks[0], args.seeds[0])]
    pairs = args.dense_segments * (args.dense_segments - 1) // 2
    facts: dict[str, str | float] = {
        "teacher": _TEACHERS[args.teacher],
        "dense": f"{pairs} pairs of {args.dense_segments} segments of {args.length} steps",
        "sparse": f"{args.sparse_segments // 2} pairs of {args.sparse_segments} segments",
        "noise": f"temperature {args.temperature:g}",
    }
    if told.get("partial_return_agreement") is not None:
        facts["greater partial return preferred"] = f"{told['partial_return_agreement']:.1%}"
    return LabelStatistics(facts=facts)


def _summary(args: Args, claims: Sequence[Mapping[str, Any]]) -> str:
    return (
        f"{args.episodes} episodes of mixed quality per task; segments of {args.length} steps, compared by a simulated"
        f" teacher: {args.dense_segments} of them all with all (dense), and {args.sparse_segments} in one pair each"
        f" (sparse). {len(args.seeds)} seeds, each with segments, labels and initial states of its own;"
        f" {args.evaluation_episodes} episodes per seed, from the last checkpoint.\n\n" + tally(claims)
    )


def _check(args: Args) -> None:
    check_args(args, chosen={"tasks": None, "methods": METHODS, "seeds": None})
    for task in args.tasks:
        envs.make({"name": f"metaworld/{task}", "horizon": args.horizon}).close()
    if args.length > args.horizon:
        raise ValueError(f"segments of {args.length} steps do not fit into episodes of {args.horizon}.")
    for name in ("sparse_segments", "held_out_pool", "pool"):
        if getattr(args, name) < 2 or getattr(args, name) % 2:
            raise ValueError(f"--{name.replace('_', '-')} must be an even number, not {getattr(args, name)}.")
    largest = max(args.sparse_segments, args.dense_segments)
    if largest > args.pool:
        raise ValueError(f"{largest} segments cannot be drawn from a --pool of {args.pool}.")
    if not 2 <= args.candidates <= args.dense_segments:
        raise ValueError(f"--candidates must lie between 2 and {args.dense_segments}, not {args.candidates}.")
    if args.teacher.startswith("oracle") and args.oracles is None:
        raise ValueError(
            f"--teacher {args.teacher} needs --oracles, the folder of a finished run of experiments.oracle."
        )
    if not (0 <= args.discount <= 1 and args.temperature >= 0 and math.isfinite(args.temperature)):
        raise ValueError("the discount must lie in [0, 1], and the temperature must not be negative.")


if __name__ == "__main__":
    run_main(main, PRESETS, "Contrastive preference learning and its rivals, on simulated preferences.")
