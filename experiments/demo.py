"""The main job from end to end: a robot's rollouts, a teacher's preferences, CPL, an evaluated and filmed policy.

A Meta-World robot has a door to open before its time is up. Its data are of mixed quality in a way that averaging does
not mend: a quarter of the episodes are an expert's; in the others it reaches slowly for a place beside the handle,
begins well and then goes there, or leans to one side. A simulated teacher compares pairs of segments. Compared are:

* `bc`: behaviour cloning of everything;
* `sft`: behaviour cloning of everything, then of the preferred segments alone;
* `cpl`: contrastive preference learning from the same labels;
* `cpl-shuffled`: CPL from the same labels in random order, which must not help;
* `expert`: the scripted policy that gave the good quarter, without its noise.

Every method is evaluated from its last checkpoint, on initial states that all methods of the same seed share.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

import envs
from agents.bc import BCConfig
from agents.cpl import CPLConfig
from envs.behaviours import Expert, HeldBias, Mixture, Offset, Switching
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
    train,
)
from experiments.grid import Job, JobContext
from labelers.teachers import THRESHOLD_PRESETS, benchmark_threshold, preset
from robopref.episodes import load_episodes
from robopref.evaluation import compare, success_interval
from robopref.queries import draw_queries, label_statistics
from robopref.records import read_records, write_records
from robopref.reports import Histogram, LabelStatistics, MethodComparison, Report

METHODS = ("bc", "sft", "cpl", "cpl-shuffled")
METRIC = "success rate"

COMPARISONS = (("bc", "expert"), ("cpl", "bc"), ("cpl", "sft"), ("cpl", "cpl-shuffled"), ("cpl", "expert"))
CLAIMS: tuple[tuple[str, str, str, str, Literal["above", "below"]], ...] = (
    ("a", "behaviour cloning of everything stays below the expert", "bc", "expert", "below"),
    ("b", "CPL succeeds more often than behaviour cloning of everything", "cpl", "bc", "above"),
    ("c", "CPL succeeds more often than fine-tuning on preferred segments", "cpl", "sft", "above"),
    ("d", "CPL succeeds more often than with shuffled labels", "cpl", "cpl-shuffled", "above"),
)
"""Claim, and the two methods whose difference in success rate it is about."""


BC = Training(BCConfig(decay_updates=9000), "episodes", updates=9000, batch_size=256)
SFT = Training(
    BCConfig(learning_rate=1e-3, pretrain_updates=800, decay_updates=2400),
    "preferences",
    updates=2400,
    batch_size=32,
)
CPL = Training(
    CPLConfig(learning_rate=5e-4, pretrain_learning_rate=1e-3, pretrain_updates=800, decay_updates=2400),
    "preferences",
    updates=2400,
    batch_size=32,
)


@dataclass(frozen=True)
class Args(RunArgs):
    """The main job from end to end, on one or more Meta-World tasks.

    Attributes:
        tasks: names of Meta-World tasks.
        methods: which of bc, sft, cpl and cpl-shuffled to train.
        seeds: training seeds; each is evaluated on initial states of its own, shared by all methods.
        horizon: steps in which the task must be done.
        episodes: to collect.
        queries: pairs of segments to label.
        length: steps of a segment.
        teacher: oracle, mistake, noisy, skip, equal or myopic.
        bc: behaviour cloning of everything.
        sft: behaviour cloning of everything and then of the preferred segments.
        cpl: contrastive preference learning.
        evaluation_episodes: per method and seed, from the last checkpoint.
        curve_episodes: per method, seed and point of the learning curve.
    """

    tasks: tuple[str, ...] = ("door-open-v3",)
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    horizon: int = 120
    episodes: int = 600
    queries: int = 4000
    length: int = 64
    teacher: str = "oracle"
    bc: Training[BCConfig] = BC
    sft: Training[BCConfig] = SFT
    cpl: Training[CPLConfig] = CPL
    evaluation_episodes: int = 50
    curve_episodes: int = 20


def _smoke(training: Training[Any], **config: Any) -> Training[Any]:
    return replace(
        training,
        config=replace(training.config, hidden_dims=(16,), **config),
        updates=6,
        batch_size=4,
        checkpoints=2,
    )


DEFAULT = Args()
PRESETS = {
    "small": DEFAULT,
    "smoke": replace(
        DEFAULT,
        preset="smoke",
        seeds=(0, 1),
        horizon=40,
        episodes=8,
        queries=20,
        length=8,
        bc=_smoke(DEFAULT.bc, decay_updates=6),
        sft=_smoke(DEFAULT.sft, decay_updates=6, pretrain_updates=2),
        cpl=_smoke(DEFAULT.cpl, decay_updates=6, pretrain_updates=2),
        evaluation_episodes=3,
        curve_episodes=2,
    ),
}


def behaviours(task: str) -> Mixture:
    """Who acts in the episodes: an expert in a quarter of them, and three ways of being systematically wrong."""
    beside = Offset(task, speed=0.6, noise=0.1)
    return Mixture(
        (
            (0.25, Expert(task, noise=0.3)),
            (0.5, beside),
            (0.15, Switching(Expert(task, noise=0.1), beside, earliest=10, latest=60)),
            (0.1, HeldBias(task, noise=0.1)),
        )
    )


def jobs(args: Args) -> list[Job]:
    """The grid: per task the episodes, their labels, every method and seed, the expert, and a film."""
    every = []
    for task in args.tasks:
        env = {"name": f"metaworld/{task}", "horizon": args.horizon}
        episodes, labels = f"episodes/{task}", f"labels/{task}"
        cores = max(1, (args.cores or os.cpu_count() or 1) // len(args.tasks))
        every.append(
            Job(
                episodes,
                collect,
                {
                    "env": env,
                    "policy": behaviours(task),
                    "episodes": args.episodes,
                    "first_seed": first_seed(args.seed, 0),
                },
                cores=cores,
            )
        )
        asked = {"queries": args.queries, "length": args.length, "teacher": args.teacher, "seed": args.seed}
        every.append(Job(labels, label, {"episodes": episodes, **asked}, needs=(episodes,)))
        for seed in args.seeds:
            evaluation = Evaluation(
                env,
                episodes=args.evaluation_episodes,
                first_seed=first_seed(args.seed, 1) + 10_000 * seed,
                curve_episodes=args.curve_episodes,
                curve_first_seed=first_seed(args.seed, 2),
            )
            every.append(
                Job(_cell("expert", task, seed), evaluate_policy, {"policy": Expert(task), "evaluation": evaluation})
            )
            for method in args.methods:
                cell = {"training": _training(args, method), "evaluation": evaluation, "seed": (args.seed, seed)}
                every.append(
                    Job(
                        _cell(method, task, seed),
                        train,
                        {**cell, "episodes": episodes, "labels": labels},
                        needs=(episodes, labels),
                    )
                )
        every.append(_film_job(args, task, env))
    return every


def label(context: JobContext, *, episodes: str, queries: int, length: int, teacher: str, seed: int) -> dict[str, Any]:
    """Job: draws queries, has the teacher answer them, and stores the preferences."""
    dataset = load_episodes(context.folders[episodes] / "episodes")
    drawn = draw_queries(dataset, np.random.default_rng(seed), count=queries, length=length)
    threshold = benchmark_threshold(drawn) if teacher in THRESHOLD_PRESETS else None
    labels = preset(teacher, threshold=threshold).label(drawn, jax.random.key(seed))
    write_records(context.folder / "labels.parquet", drawn, labels)
    statistics = label_statistics(drawn, labels)
    return {name: value if np.isfinite(value) else None for name, value in statistics.items()}


def report(args: Args, values: Mapping[str, Any], run: Mapping[str, Any], folder: Path) -> Report:
    """Everything that the run found; `values` are those of its jobs, `run` is the manifest."""
    rng = np.random.default_rng(args.seed)
    rows, comparisons, claims, curves = [], [], [], {}
    for task in args.tasks:
        scores = {
            method: np.array([values[_cell(method, task, seed)]["successes"] for seed in args.seeds], float)
            for method in (*args.methods, "expert")
        }
        for method, successes in scores.items():
            estimate = success_interval(successes)
            rows.append(result_row(method, task, METRIC, estimate))
        compared = {
            pair: compare(scores[pair[0]], scores[pair[1]], rng) for pair in COMPARISONS if scores.keys() >= set(pair)
        }
        comparisons += [MethodComparison(*pair, METRIC, outcome, task) for pair, outcome in compared.items()]
        for name, claim, ours, theirs, direction in CLAIMS:
            outcome = compared.get((ours, theirs))
            if outcome is not None:
                claims.append(claim_row(name, f"{task}: {claim}", outcome, direction))
        for method in args.methods:
            cells = [values[_cell(method, task, seed)] for seed in args.seeds]
            steps = np.array([int(step) for step in cells[0]["curve"]])
            rates = np.array([[np.mean(successes) for successes in cell["curve"].values()] for cell in cells])
            prefix = f"{task} " if len(args.tasks) > 1 else ""
            curves[f"{prefix}{method}", METRIC] = (steps, rates)
            if "policy/ranking_accuracy" in cells[0]["metrics"][0]:
                accuracies = [[row["policy/ranking_accuracy"] for row in cell["metrics"]] for cell in cells]
                logged = np.array([row["step"] for row in cells[0]["metrics"]])
                curves[f"{prefix}{method}", "ranking accuracy, training batches"] = (logged, np.array(accuracies))
    made_film = values[f"film/{args.tasks[0]}"]
    return Report(
        title="robopref demo",
        summary=_summary(args, comparisons),
        results={"manifest": run, "rows": rows, "claims": claims},
        comparisons=comparisons,
        curves=curves,
        labels=_label_statistics(args, values, folder),
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
    values = run_experiment("demo", args, jobs, report, seeds=args.seeds, console=console)
    return 1 if values is None else 0


def _film_job(args: Args, task: str, env: Mapping[str, Any]) -> Job:
    shown = [method for method in ("bc", "sft", "cpl") if method in args.methods]
    cells = {method: _cell(method, task, args.seeds[0]) for method in shown}
    arguments = {
        "env": env,
        "trainings": {method: _training(args, method) for method in shown},
        "cells": cells,
        "expert": Expert(task),
        "seed": first_seed(args.seed, 1) + 10_000 * args.seeds[0],
    }
    return Job(f"film/{task}", film, arguments, needs=tuple(cells.values()))


def _training(args: Args, method: str) -> Training[Any]:
    if method == "cpl-shuffled":
        return replace(args.cpl, data="shuffled")
    training: Training[Any] = getattr(args, method)
    return training


def _cell(method: str, task: str, seed: int) -> str:
    return f"train/{method}/{task}/{seed}"


def _check(args: Args) -> None:
    counts = {name: getattr(args, name) for name in ("episodes", "queries", "length", "evaluation_episodes")}
    check_args(args, chosen={"tasks": None, "methods": METHODS, "seeds": None}, counts=counts)
    for task in args.tasks:
        envs.make({"name": f"metaworld/{task}", "horizon": args.horizon}).close()
    if args.length > args.horizon:
        raise ValueError(f"segments of {args.length} steps do not fit into episodes of {args.horizon}.")
    preset(args.teacher, threshold=0.0)


def _label_statistics(args: Args, values: Mapping[str, Any], folder: Path) -> LabelStatistics:
    task = args.tasks[0]
    dataset = load_episodes(folder / f"episodes/{task}" / "episodes")
    queries, labels = read_records(folder / f"labels/{task}" / "labels.parquet", dataset)
    assert labels.values is not None
    gaps = queries.partial_returns[:, 1] - queries.partial_returns[:, 0]
    groups = {
        "first preferred": gaps[labels.values < 0.5],
        "tie": gaps[labels.values == 0.5],
        "second preferred": gaps[labels.values > 0.5],
    }
    histogram = Histogram(
        title="Answers by difference in partial return",
        x_label="partial return of the second segment minus that of the first",
        groups={name: group for name, group in groups.items() if len(group)},
    )
    told = values[f"labels/{task}"]
    facts: dict[str, str | float] = {"teacher": args.teacher, "queries": f"{args.queries} pairs of {args.length} steps"}
    shares = {
        "answered": "answered",
        "ties": "ties",
        "second": "second preferred",
        "partial_return_agreement": "greater partial return preferred",
    }
    facts |= {words: f"{told[name]:.1%}" for name, words in shares.items() if told[name] is not None}
    return LabelStatistics(facts=facts, histograms=(histogram,))


def _summary(args: Args, comparisons: Sequence[MethodComparison]) -> str:
    told = [
        f"{each.ours} against {each.theirs}: {each.result.verdict}"
        for each in comparisons
        if (each.ours, each.theirs) in (("cpl", "bc"), ("cpl", "cpl-shuffled"))
    ]
    return (
        f"{args.episodes} episodes of mixed quality, {args.queries} pairs of segments labelled by a simulated teacher"
        f" ({args.teacher}), and policies learned from them. Every policy is evaluated from its last checkpoint over"
        f" {len(args.seeds)} training seeds of {args.evaluation_episodes} episodes. {'; '.join(told)}."
    )


if __name__ == "__main__":
    run_main(main, PRESETS, "The main job from end to end, on a simulated robot.")
