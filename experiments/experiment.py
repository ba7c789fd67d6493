"""What all experiments share: presets on the command line, jobs that collect, train and evaluate, and reports."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

import envs
from agents.bc import BCAgent, BCConfig
from agents.cpl import CPLAgent, CPLConfig
from agents.piql import PIQLAgent, PIQLConfig
from experiments.grid import Job, JobContext, LauncherName, finished_values, report_failures, run_grid
from robopref.agent import AgentPolicy
from robopref.checkpoints import restore_checkpoint
from robopref.compilation import keep_compiled_programs
from robopref.configs import from_json, to_json
from robopref.datasets import PreferenceDataset, RankingDataset, TransitionDataset, best_episodes, fit_normalizer
from robopref.episodes import EpisodeDataset, load_episodes, write_episodes
from robopref.evaluation import Comparison, Interval, claim_verdict, ranking_scores
from robopref.files import read_json, write_json
from robopref.frames import FrameCache
from robopref.progress import ProgressCallback
from robopref.queries import Labels, Queries
from robopref.records import read_records
from robopref.reports import Report, print_table, write_report
from robopref.rollouts import RolloutWorkers, film_episode
from robopref.training import checkpoints, fit, read_metrics
from robopref.types import Episode, Policy, Preferences, Segments
from robopref.video import side_by_side, write_video

Args = TypeVar("Args")
Run = TypeVar("Run", bound="RunArgs")
Config = TypeVar("Config")

AGENTS: dict[type, Any] = {BCConfig: BCAgent, CPLConfig: CPLAgent, PIQLConfig: PIQLAgent}
"""The agent that each configuration configures."""

RESULTS = Path(__file__).parent / "results"
"""Where published results lie, as `<experiment>-<preset>.json`."""


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """What every experiment's `Args` begin with.

    Attributes:
        seed: of everything: data, labels, training and initial states.
        folder: of the run; runs/<experiment>-<preset>-<seed> by default.
        preset: what the folder and published results are called by.
        launcher: processes on this machine, or Ray.
        cores: to use; all there are by default.
        publish: also write the results to experiments/results/<experiment>-<preset>.json.
    """

    seed: int = 0
    folder: Path | None = None
    preset: str = "small"
    launcher: LauncherName = "local"
    cores: int | None = None
    publish: bool = False


@dataclass(frozen=True)
class Training(Generic[Config]):
    """How one method of a comparison is trained.

    Attributes:
        config: the agent's configuration, which also says which agent it is (`AGENTS`).
        data: all steps of the episodes, the labelled pairs, the pairs with their labels shuffled, or ranked sets.
        updates: gradient steps.
        batch_size: steps or pairs per update.
        checkpoints: how many, evenly spaced; each gives a point of the learning curve.
        best: of the episodes, the share with the highest true return; the others are left out (%BC).
    """

    config: Config
    data: Literal["episodes", "preferences", "shuffled", "rankings"]
    updates: int
    batch_size: int
    checkpoints: int = 6
    best: float = 1.0


@dataclass(frozen=True)
class Evaluation:
    """From which initial states policies are evaluated.

    Attributes:
        env: configuration of the environment.
        episodes: of the last checkpoint, from the states of seeds `first_seed`, `first_seed` + 1, ...
        first_seed: all methods that are to be compared use the same.
        curve_episodes: for each point of the learning curve, from states of their own.
    """

    env: Mapping[str, Any]
    episodes: int
    first_seed: int
    curve_episodes: int = 0
    curve_first_seed: int = 0


def collect(
    context: JobContext, *, env: Mapping[str, Any], policy: Policy, episodes: int, first_seed: int
) -> dict[str, Any]:
    """Job: rolls a policy out and stores the episodes, with simulator states, under `episodes/`."""
    path = context.folder / "episodes"
    # A store appears whole or not at all: one that is there was written just before this job was killed.
    if not path.exists():
        make_env = functools.partial(envs.make, env)
        cores = len(os.sched_getaffinity(0))
        with RolloutWorkers(make_env, processes=cores if cores > 1 else 0, lanes=1) as workers:
            collected = workers.run(
                policy, range(first_seed, first_seed + episodes), keep_states=True, progress=context.progress
            )
        store(path, collected, env, f"{episodes} episodes of behaviours of mixed quality")
    dataset = load_episodes(path)
    behaviours: dict[str, list[bool]] = {}
    for origin, success in zip(dataset.origins, dataset.successes, strict=True):
        behaviours.setdefault(str(origin["behaviour"]), []).append(bool(success))
    return {"hash": dataset.hash, "steps": dataset.total_steps, "behaviours": behaviours}


def store(path: Path, episodes: Sequence[Episode], env: Mapping[str, Any], description: str) -> None:
    """Writes the episodes of an environment of this configuration."""
    with envs.make(env) as sample:
        write_episodes(
            path,
            episodes,
            observation_space=sample.observation_space,
            action_space=sample.action_space,
            env=dict(env),
            description=description,
        )


def train(
    context: JobContext,
    *,
    training: Training[Any],
    evaluation: Evaluation,
    episodes: str,
    labels: str,
    seed: tuple[int, int],
    held_out: tuple[str, str] | None = None,
    view: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Job: trains one agent with one seed, then evaluates its checkpoints.

    Args:
        episodes: name of the job that stored the episodes.
        labels: name of the job that stored the labels of queries about them.
        seed: seed of the experiment and of the training run.
        held_out: names of the jobs that stored episodes and labels which the agent is only to rank.
        view: configuration of an environment that observes images, for an agent that learns from them: they are
            rendered from the stored states, into a cache beside the episodes, as they are needed.

    Returns:
        `successes` of the last checkpoint, `curve` of successes by step, `metrics`, `seconds_per_update` (compilation
        included; None if nothing was left to train), and, for held-out pairs, `rankings`: by scorer, for each decided
        pair whether the last checkpoint ranks it as labelled.
    """
    dataset = load_episodes(context.folders[episodes] / "episodes")
    with _frames(context.folders[episodes], dataset, view, context.progress) as frames:
        data = _training_data(training, dataset, context.folders[labels], seed, frames)
    create_key, fit_key = jax.random.split(jax.random.fold_in(jax.random.key(seed[0]), seed[1]))
    agent = AGENTS[type(training.config)].create(
        training.config,
        data.take(jnp.arange(2)),
        create_key,
        normalizer=fit_normalizer(dataset) if view is None else None,
    )
    interval = max(1, training.updates // training.checkpoints)
    left = training.updates - max(checkpoints(context.folder), default=0)
    began = time.monotonic()
    agent = fit(
        agent,
        data,
        fit_key,
        num_updates=training.updates,
        batch_size=training.batch_size,
        folder=context.folder,
        log_every=interval // 10 if interval % 10 == 0 else interval,
        checkpoint_every=interval,
        progress=context.progress,
    )
    seconds_per_update = (time.monotonic() - began) / left if left else None
    with _open_workers(evaluation) as workers:
        curve = {
            step: _successes(
                workers,
                AgentPolicy(restore_checkpoint(path, agent)),
                evaluation.curve_first_seed,
                evaluation.curve_episodes,
            )
            for step, path in checkpoints(context.folder).items()
        }
        final = _successes(workers, AgentPolicy(agent), evaluation.first_seed, evaluation.episodes)
    found: dict[str, Any] = {
        "successes": final,
        "curve": {str(step): successes for step, successes in curve.items()},
        "metrics": read_metrics(context.folder / "metrics.csv"),
        "seconds_per_update": seconds_per_update,
    }
    if held_out is not None:
        queries, answers = _read_labels(context.folders[held_out[0]], context.folders[held_out[1]])
        with _frames(context.folders[held_out[0]], queries.dataset, view, context.progress) as frames:
            found["rankings"] = _rank(agent, PreferenceDataset.create(queries, answers, frames))
    return found


@contextlib.contextmanager
def _frames(
    folder: Path, dataset: EpisodeDataset, view: Mapping[str, Any] | None, progress: ProgressCallback
) -> Iterator[FrameCache | None]:
    if view is None:
        yield None
        return
    with FrameCache(folder / "frames", dataset, functools.partial(envs.make, view), progress=progress) as frames:
        yield frames


def _training_data(
    training: Training[Any],
    dataset: EpisodeDataset,
    labels: Path,
    seed: tuple[int, int],
    frames: FrameCache | None,
) -> TransitionDataset | PreferenceDataset | RankingDataset:
    if training.data == "episodes":
        chosen = None if training.best == 1.0 else best_episodes(dataset, training.best).tolist()
        return TransitionDataset.create(dataset, chosen, frames)
    queries, answers = read_records(labels / "labels.parquet", dataset)
    if training.data == "rankings":
        return RankingDataset.create(queries, answers, frames)
    if training.data == "shuffled":
        answers = shuffle_labels(answers, np.random.default_rng(seed))
    return PreferenceDataset.create(queries, answers, frames)


def _read_labels(episodes: Path, labels: Path) -> tuple[Queries, Labels]:
    return read_records(labels / "labels.parquet", load_episodes(episodes / "episodes"))


def _rank(agent: Any, pairs: PreferenceDataset, chunk: int = 64) -> dict[str, list[float]]:
    """For every way in which the agent scores segments: which of the decided pairs it ranks as they were labelled."""
    chunks = [jnp.arange(i, min(i + chunk, len(pairs.labels))) for i in range(0, len(pairs.labels), chunk)]
    found = {}
    for name in ("segment_scores", "policy_segment_scores"):
        if hasattr(agent, name):
            score = jax.jit(getattr(type(agent), name))
            scores = np.concatenate([np.asarray(score(agent, pairs.pairs.take(indices))) for indices in chunks])
            found[name] = ranking_scores(scores, np.asarray(pairs.labels)).tolist()
    return found


def evaluate_policy(context: JobContext, *, policy: Policy, evaluation: Evaluation) -> dict[str, Any]:
    """Job: evaluates a policy that needs no training, such as a scripted expert."""
    with _open_workers(evaluation) as workers:
        return {"successes": _successes(workers, policy, evaluation.first_seed, evaluation.episodes)}


def shuffle_labels(labels: Labels, rng: np.random.Generator) -> Labels:
    """The same answers, given to the answered queries in random order: what is left when preferences say nothing."""
    if labels.values is None:
        raise ValueError("only labels of pairs can be shuffled, not orders.")
    values = labels.values.copy()
    values[labels.answered] = rng.permutation(values[labels.answered])
    return replace(labels, values=values, labeler=f"{labels.labeler} (shuffled)")


def film(
    context: JobContext,
    *,
    env: Mapping[str, Any],
    trainings: Mapping[str, Training[Any]],
    cells: Mapping[str, str],
    expert: Policy,
    seed: int,
) -> dict[str, Any]:
    """Job: films the policies side by side from one initial state, if this machine can draw."""
    camera = envs.make({**env, "image_size": 240})
    observation_dim, action_dim = camera.observation_space.shape[0], camera.action_space.shape[0]
    policies: dict[str, Policy] = {
        method: AgentPolicy(load_agent(context.folders[cells[method]], training, observation_dim, action_dim))
        for method, training in trainings.items()
    }
    films, captions = {}, {}
    for done, (name, policy) in enumerate({**policies, "expert": expert}.items()):
        context.progress(done, len(policies) + 1)
        try:
            films[name], solved = film_episode(camera, policy, seed, hold=20)
        except RuntimeError as error:
            return {"film": None, "note": f"There is no film: {error}"}
        captions[name] = ["success" if by_now else "" for by_now in solved]
    camera.close()
    write_video(context.folder / "film.mp4", side_by_side(films, captions, columns=4), fps=20)
    note = "The policies of the first seed, from the same initial state, at half speed."
    return {"film": "film.mp4", "note": note}


def load_agent(folder: Path, training: Training[Any], observation_dim: int, action_dim: int) -> Any:
    """The agent of the last checkpoint that a `train` job left in `folder`."""
    observations, actions = jnp.zeros((2, 2, 1, observation_dim)), jnp.zeros((2, 2, 1, action_dim))
    example = Preferences(Segments(observations, actions), labels=jnp.zeros(2))
    template = AGENTS[type(training.config)].create(training.config, example, jax.random.key(0))
    saved = checkpoints(folder)
    if not saved:
        raise FileNotFoundError(f"there is no checkpoint in {folder}.")
    return restore_checkpoint(saved[max(saved)], template)


def first_seed(seed: int, purpose: int) -> int:
    """Where the seeds of initial states begin: 0 collects, 1 evaluates, 2 is for curves, 3 held out."""
    return 10_000_000 * seed + 1_000_000 * purpose


def check_args(
    args: RunArgs, *, chosen: Mapping[str, tuple[str, ...] | None], counts: Mapping[str, int] = MappingProxyType({})
) -> None:
    """Refuses what no experiment can work with.

    Args:
        args: of the experiment.
        chosen: arguments that name one thing or more, none twice, with what there is to choose from, if that is known.
        counts: what must be at least 1.

    Raises:
        ValueError: an argument is none of that, or a seed is negative.
    """
    for name, known in chosen.items():
        values = getattr(args, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"--{name} must name at least one, and none twice.")
        for value in values:
            if known is not None and value not in known:
                raise ValueError(f"there is no {name.removesuffix('s')} {value!r}{envs.suggestion(value, known)}")
    cores = {} if args.cores is None else {"cores": args.cores}
    for name, value in {**counts, **cores}.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
    if min([args.seed, *getattr(args, "seeds", ())]) < 0:
        raise ValueError("seeds must not be negative.")


def save_run(folder: Path, module: str, args: Any) -> None:
    """Notes in a run folder which experiment it belongs to, and refuses a folder that belongs to another one."""
    path = folder / "run.json"
    run = {"module": module, "args": to_json(args)}
    if path.exists() and read_json(path)["module"] != module:
        raise ValueError(f"{folder} holds a run of {read_json(path)['module']}; choose another --folder.")
    if not path.exists() and folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run; choose another --folder.")
    write_json(path, run)


def run_experiment(
    name: str,
    args: Run,
    jobs: Callable[[Run], Sequence[Job]],
    report: Callable[[Run, Mapping[str, Any], Mapping[str, Any], Path], Report],
    *,
    seeds: Sequence[int],
    console: Console | None = None,
    shown: Callable[[Mapping[str, Any]], bool] = lambda row: True,
    unpublished: Sequence[str] = (),
) -> Mapping[str, Any] | None:
    """Runs what is missing of an experiment's grid, then writes, prints and, if asked to, publishes its report.

    Args:
        name: of the experiment's module.
        args: of the experiment.
        jobs: makes the grid. Jobs that store data give their hash as `hash`, which the manifest keeps.
        report: makes the report of the values of the jobs, the manifest and the folder of the run.
        seeds: of the training runs, for the manifest.
        console: where to print.
        shown: which rows to print; the page has them all.
        unpublished: arguments that mean something on this machine only, and are left out of the manifest.

    Returns:
        the values of the jobs, or None if some failed, which has been said then.
    """
    console = console or Console()
    started = time.monotonic()
    folder = args.folder or Path("runs") / f"{name}-{args.preset}-{args.seed}"
    grid = jobs(args)
    save_run(folder, f"experiments.{name}", args)
    outcome = run_grid(grid, folder, launcher=args.launcher, cores=args.cores)
    if outcome.failures:
        report_failures(outcome, console)
        return None
    run = manifest(
        args,
        seeds=seeds,
        data={name: value["hash"] for name, value in outcome.values.items() if "hash" in value},
        wall_seconds=time.monotonic() - started,
        job_seconds=outcome.seconds,
    )
    run["config"] |= dict.fromkeys(unpublished)
    found = report(args, outcome.values, run, folder)
    publish = RESULTS / f"{name}-{args.preset}.json" if args.publish else None
    page = finish_run(folder, found, publish=publish)
    print_table({**found.results, "rows": [*filter(shown, found.results["rows"])]}, console, found.comparisons)
    console.print(f"\nThe report is {page.resolve()}", soft_wrap=True, highlight=False)
    return outcome.values


def result_row(method: str, task: str, metric: str, estimate: Interval, unit: str | None = None) -> dict[str, Any]:
    """A row of the results; `unit` says what its `n` counts, if not episodes."""
    counted = {} if unit is None else {"unit": unit}
    return {"method": method, "task": task, "metric": metric, **counted, **vars(estimate)}


def claim_row(
    name: str,
    claim: str,
    estimate: Interval | Comparison,
    direction: Literal["above", "below"] = "above",
    threshold: float = 0.0,
    *,
    paper: float | None = None,
) -> dict[str, Any]:
    """A claim of the results: that what was estimated is above, or below, a threshold."""
    return {
        "id": name,
        "claim": claim,
        "paper": paper,
        "ours": estimate.mean if isinstance(estimate, Interval) else estimate.difference,
        "low": estimate.low,
        "high": estimate.high,
        "verdict": claim_verdict(estimate, direction, threshold),
    }


def tally(claims: Sequence[Mapping[str, Any]]) -> str:
    """How many claims hold, in a sentence."""
    holds, undecided, fails = (
        sum(claim["verdict"] == verdict for claim in claims) for verdict in ("holds", "undecided", "fails")
    )
    return f"Of the claims, {holds} hold, {undecided} are undecided and {fails} fail."


def finish_run(folder: Path, report: Report, *, publish: Path | None) -> Path:
    """Writes the report of a run, and its results once more under experiments/results/ if they are to be published."""
    page = write_report(folder / "report", report)
    if publish is not None:
        write_json(publish, read_json(folder / "report" / "results.json"))
    return page


def rebuild_report(run_folder: Path) -> Path:
    """Writes the report of a finished run anew, from what its jobs left, and returns the page's path.

    Raises:
        FileNotFoundError: the folder holds no run, or jobs of it are missing.
        ValueError: it was made by another version.
    """
    run = read_json(run_folder / "run.json")
    module = importlib.import_module(run["module"])
    args = from_json(module.Args, run["args"])
    jobs = module.jobs(args)
    values = finished_values(jobs, run_folder)
    for job in jobs:
        if job.name not in values:
            raise FileNotFoundError(f"{run_folder} is not finished: {job.name} has no result; run its command again.")
    results = read_json(run_folder / "report" / "results.json")
    return finish_run(run_folder, module.report(args, values, results["manifest"], run_folder), publish=None)


def _open_workers(evaluation: Evaluation) -> RolloutWorkers:
    lanes = min(10, max(evaluation.episodes, 1))
    return RolloutWorkers(functools.partial(envs.make, evaluation.env), lanes=lanes)


def _successes(workers: RolloutWorkers, policy: Policy, first_seed: int, episodes: int) -> list[bool]:
    seeds = range(first_seed, first_seed + episodes)
    return [episode.succeeded for episode in workers.run(policy, seeds, stop_on_success=True)]


def parse_args(presets: Mapping[str, Args], argv: Sequence[str] | None = None, *, description: str = "") -> Args:
    """The experiment's `Args`: those of `--preset` (the first one by default), changed by the other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=next(iter(presets)))
    known, rest = parser.parse_known_args(argv)
    if known.preset not in presets:
        near = difflib.get_close_matches(known.preset, presets, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no preset {known.preset!r}, only {', '.join(presets)}{hint}")
    default = presets[known.preset]
    text = f"{description} Presets: --preset {{{','.join(presets)}}}; the values below are those of {known.preset!r}."
    program = f"python -m {_module_and_arguments()[0]}"
    return tyro.cli(type(default), default=default, args=rest, description=text, prog=program)


def run_main(main: Callable[[Args], int], presets: Mapping[str, Args], description: str) -> None:
    """The command line of an experiment: errors in the input are one sentence and exit status 2."""
    keep_compiled_programs()
    try:
        status = main(parse_args(presets, description=description))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on from here", file=sys.stderr)
        status = 130
    sys.exit(status)


def manifest(
    args: Any, *, seeds: Sequence[int], data: Mapping[str, str], wall_seconds: float, job_seconds: float
) -> dict[str, Any]:
    """How a result was made: command, configuration, seeds, versions, data hashes, device, time and commit.

    `wall_seconds` is the time of this command, `job_seconds` that of all jobs together, run now or before.
    """
    packages = ("jax", "flax", "optax", "numpy", "mujoco", "metaworld", "gymnasium")
    return {
        "command": shlex.join(["python", "-m", *_module_and_arguments()]),
        "config": to_json(args),
        "seeds": list(seeds),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "data": dict(data),
        "device": _device(),
        "wall_seconds": round(wall_seconds, 1),
        "job_seconds": round(job_seconds, 1),
        "commit": _commit(),
    }


def _module_and_arguments() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name if spec else Path(sys.argv[0]).stem, *sys.argv[1:]]


def _device() -> str:
    # In a process of its own: asking JAX starts its back end, which the parent of job processes has no use for.
    code = "import jax, json; print(json.dumps([str(d.device_kind) for d in jax.devices()]))"
    try:
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
        kinds = json.loads(answer.stdout.splitlines()[-1])
    except subprocess.SubprocessError:
        kinds = ["unknown"]
    return f"{', '.join(kinds)}; {os.cpu_count()} cores, {platform.machine()}"


def _commit() -> str:
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    answer = subprocess.run(command, capture_output=True, text=True) if shutil.which("git") else None
    return answer.stdout.strip() if answer and answer.returncode == 0 else "not a git checkout"
