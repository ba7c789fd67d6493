"""What a hundred human labels can show: reward models and CPL on the published human preferences, cross-validated.

People (and, for Lift, once a script) compared a hundred pairs of segments of each of four robot tasks for Kim et al.
2023, "Preference Transformer" (arXiv:2303.00957). No rewards are there to compare with: what can be asked is whether a
model that learned from some of the labels agrees with the others. Compared are:

* `majority`: whichever side, first or second, was preferred more often in the training pairs, whatever was shown; what
  it says of people's habits is beyond any model that scores one segment at a time;
* `linear`: Bradley-Terry on a linear reward;
* `mlp`: Bradley-Terry on the reward of an MLP;
* `transformer`: the Preference Transformer;
* `cpl`: contrastive preference learning, which scores a segment by the policy's likelihood of its actions.

The ten evaluation pairs that were published beside the training pairs are copies of ten of these, so the pairs are
cross-validated. Segments repeat and overlap between pairs: a training set leaves out every pair that shares a step of
experience with a held-out one, and folds are small enough to leave most of the pairs. In each fold a method is a
committee of models, each trained without some of the training pairs; on these left-out pairs all members together are
scored after every so many updates, and the number of updates and the temperature with the least cross-entropy are
taken. The held-out pairs decide nothing. A committee's score of a segment is the mean of its members' (Parmanto et al.
1996). Sizes and learning rates were chosen by the left-out pairs of the scripted labels, and by no human label.

A pair is held out once in every repetition; its outcomes are averaged over the repetitions, and intervals come from
resampling pairs: n pairs are n observations, however often they are held out.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int
from rich.console import Console

from agents.cpl import CPLAgent, CPLConfig
from agents.reward_model import RewardModelAgent, RewardModelConfig
from experiments.experiment import RunArgs, check_args, claim_row, result_row, run_experiment, run_main
from experiments.grid import Job, JobContext
from robopref.agent import update_many
from robopref.datasets import PreferenceDataset
from robopref.evaluation import (
    Interval,
    compare,
    probability_of_improvement,
    ranking_scores,
    return_interval,
)
from robopref.formats.preference_transformer import read_preferences, repeated_pairs
from robopref.networks import Normalizer
from robopref.reports import Histogram, LabelStatistics, MethodComparison, Report
from robopref.types import Key, Preferences, Segments

Config = TypeVar("Config")

DATASETS = {
    "can": "Can/num100_q50_human",
    "lift": "Lift/num100_q50_human",
    "lift-script": "Lift/num100_q50_script",
    "hopper": "hopper-medium-expert-v2/num100_human",
    "walker2d": "walker2d-medium-expert-v2/num100_human",
}
"""Where the archives of each dataset lie, less `_train.npz` and `_eval.npz`."""

MAJORITY, METHODS = "majority", ("linear", "mlp", "transformer", "cpl")
AGENTS: dict[type, Any] = {RewardModelConfig: RewardModelAgent, CPLConfig: CPLAgent}

TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""By which scores may be divided; the left-out pairs choose, and the order of the scores stays."""

AGREEMENT, ENTROPY = "agreement, held out", "cross-entropy, held out"
FITTED, PUBLISHED = "agreement, training", "agreement, published evaluation"
METRICS = (AGREEMENT, ENTROPY, FITTED, PUBLISHED)
TIES = "probability that a tie's scores lie closer"
TIES_CLAIM = "the MLP's scores of decided pairs lie further apart than those of ties"
SOURCE = (
    "the archives are in datasets/preference_transformer of the inverse-preference-learning repository (MIT licence)"
)

CLAIMS = (
    ("a", "a linear reward", "linear", MAJORITY),
    ("b", "an MLP's reward", "mlp", MAJORITY),
    ("c", "the transformer", "transformer", MAJORITY),
    ("d", "CPL", "cpl", MAJORITY),
    ("e", "the transformer", "transformer", "mlp"),
)
"""Who agrees with held-out labels more often than whom."""


@dataclass(frozen=True)
class Fitting(Generic[Config]):
    """How one method learns from the pairs of a fold.

    Attributes:
        config: the agent's configuration, which also says which agent it is.
        updates: gradient steps at most.
        batch_size: pairs per update, drawn with replacement.
        checkpoints: how many, evenly spaced, among which the best number of updates is chosen.
    """

    config: Config
    updates: int
    batch_size: int
    checkpoints: int = 10


LINEAR = RewardModelConfig(hidden_dims=(), ensemble=1, reduction="mean", learning_rate=3e-2, weight_decay=0.1)
MLP = RewardModelConfig(hidden_dims=(32, 32), ensemble=1, reduction="mean", learning_rate=3e-3, weight_decay=0.1)
TRANSFORMER = RewardModelConfig(
    network="transformer",
    ensemble=1,
    embed_dim=16,
    heads=2,
    reduction="mean",
    learning_rate=1e-3,
    weight_decay=0.1,
)
CPL = CPLConfig(
    hidden_dims=(32, 32),
    temperature=1.0,
    reduction="mean",
    learning_rate=1e-3,
    warmup_updates=10,
    pretrain_updates=50,
    pretrain_learning_rate=1e-3,
)


@dataclass(frozen=True)
class Args(RunArgs):
    """Reward models and CPL on published human preferences.

    Attributes:
        data: the folder with the archives: `datasets/preference_transformer` of the inverse-preference-learning
            repository (MIT licence); the environment variable ROBOPREF_DATA by default.
        tasks: which of can, lift, lift-script, hopper and walker2d.
        methods: which of linear, mlp, transformer and cpl to train.
        seeds: repetitions of the cross-validation, with other folds and other initial parameters.
        folds: of the cross-validation; more where overlapping segments would leave too few pairs to train on.
        keep: the share of the other pairs that a fold must leave to train on, once those that overlap are left out.
        committee: members of each method in each fold.
        frames: steps that are kept of each segment, evenly spaced up to the last one.
        linear: the linear reward.
        mlp: the reward of an MLP.
        transformer: the Preference Transformer.
        cpl: contrastive preference learning.
    """

    data: Path | None = None
    tasks: tuple[str, ...] = tuple(DATASETS)
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1)
    folds: int = 10
    keep: float = 0.5
    committee: int = 5
    frames: int = 20
    linear: Fitting[RewardModelConfig] = Fitting(LINEAR, updates=200, batch_size=16)
    mlp: Fitting[RewardModelConfig] = Fitting(MLP, updates=300, batch_size=16)
    transformer: Fitting[RewardModelConfig] = Fitting(TRANSFORMER, updates=100, batch_size=8, checkpoints=5)
    cpl: Fitting[CPLConfig] = Fitting(CPL, updates=250, batch_size=16)


def _smoke(fitting: Fitting[Any], **config: Any) -> Fitting[Any]:
    return Fitting(replace(fitting.config, **config), updates=4, batch_size=4, checkpoints=2)


DEFAULT = Args()
PAPER_MLP = replace(MLP, hidden_dims=(256, 256, 256), learning_rate=3e-4)
PAPER_TRANSFORMER = replace(TRANSFORMER, embed_dim=256, heads=4, dropout=0.1, learning_rate=1e-4)
PAPER_CPL = replace(CPL, hidden_dims=(256, 256), dropout=0.25, learning_rate=1e-4, pretrain_learning_rate=1e-4)
PRESETS = {
    "small": DEFAULT,
    "smoke": replace(
        DEFAULT,
        preset="smoke",
        folds=3,
        committee=2,
        frames=4,
        linear=_smoke(DEFAULT.linear),
        mlp=_smoke(DEFAULT.mlp, hidden_dims=(8,)),
        transformer=_smoke(DEFAULT.transformer, embed_dim=8, heads=2),
        cpl=_smoke(DEFAULT.cpl, hidden_dims=(8,), pretrain_updates=2),
    ),
    "paper": replace(
        DEFAULT,
        preset="paper",
        seeds=tuple(range(5)),
        frames=100,
        linear=Fitting(LINEAR, updates=2000, batch_size=64, checkpoints=20),
        mlp=Fitting(PAPER_MLP, updates=10_000, batch_size=64, checkpoints=50),
        transformer=Fitting(PAPER_TRANSFORMER, updates=10_000, batch_size=64, checkpoints=50),
        cpl=Fitting(replace(PAPER_CPL, pretrain_updates=1000), updates=10_000, batch_size=64, checkpoints=50),
    ),
}


class Pairs(NamedTuple):
    """The pairs of a dataset, training pairs first; `distinct` leaves out evaluation pairs that repeat one of them."""

    preferences: Preferences
    train: Int[np.ndarray, " n"]
    evaluation: Int[np.ndarray, " m"]
    distinct: Int[np.ndarray, " k"]
    overlaps: Bool[np.ndarray, "N N"]
    hash: str


class Fold(NamedTuple):
    """Rows of pairs: to learn from, the parts of these that one committee member each leaves out, and to be judged."""

    train: Int[np.ndarray, " n"]
    left_out: tuple[Int[np.ndarray, " l"], ...]
    held_out: Int[np.ndarray, " h"]


class Subset(struct.PyTreeNode):
    """The pairs of a dataset at the first `count` of `rows`: subsets of all sizes share one compiled program."""

    pairs: PreferenceDataset
    rows: Int[Array, " N"]
    count: Int[Array, ""]

    def sample(self, key: Key, batch_size: int) -> Preferences:
        return self.pairs.take(self.rows[jax.random.randint(key, (batch_size,), 0, self.count)])


def read_pairs(stem: Path) -> Pairs:
    """The pairs of `<stem>_train.npz` and `<stem>_eval.npz`, and which of them overlap."""
    files = [stem.with_name(f"{stem.name}_{part}.npz") for part in ("train", "eval")]
    train, evaluation = map(read_preferences, files)
    count = len(train.labels)
    both: Preferences = jax.tree.map(lambda *parts: np.concatenate(parts), train, evaluation)
    rows = np.arange(len(both.labels))
    fresh = np.concatenate([np.full(count, True), ~repeated_pairs(evaluation, train)])
    content = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return Pairs(both, rows[:count], rows[count:], rows[fresh], overlapping(both.segments), content)


def overlapping(segments: Segments) -> Bool[np.ndarray, "N N"]:
    """Which pairs have a step in common: the same observation and action, to the last bit."""
    steps = np.concatenate([np.asarray(segments.observations), np.asarray(segments.actions)], axis=-1)
    count = len(steps)
    steps = np.ascontiguousarray(steps.reshape(-1, steps.shape[-1]))
    _, names = np.unique(steps.view(np.dtype((np.void, steps.strides[0]))).ravel(), return_inverse=True)
    holds = np.zeros((count, names.max() + 1), np.float32)
    holds[np.repeat(np.arange(count), len(names) // count), names] = 1
    return np.asarray(holds @ holds.T > 0)


def purged_folds(
    rows: Int[np.ndarray, " n"],
    labels: Float[np.ndarray, " N"],
    overlaps: Bool[np.ndarray, "N N"],
    folds: int,
    keep: float,
    rng: np.random.Generator,
) -> list[Int[np.ndarray, " h"]]:
    """Splits `rows` into held-out parts that have the same mix of labels.

    A part that would leave fewer than `keep` of the other rows to learn from, once those that overlap with it are left
    out, is split in two until it does not, or holds a single pair.
    """
    shuffled = rng.permutation(rows)
    dealt = shuffled[np.argsort(labels[shuffled], kind="stable")]

    def parts(held_out: Int[np.ndarray, " h"]) -> list[Int[np.ndarray, " h"]]:
        enough = len(remaining(rows, held_out, overlaps)) >= keep * (len(rows) - len(held_out))
        if enough or len(held_out) == 1:
            return [held_out]
        return [*parts(held_out[::2]), *parts(held_out[1::2])]

    return [part for fold in range(folds) if len(dealt[fold::folds]) for part in parts(dealt[fold::folds])]


def remaining(
    rows: Int[np.ndarray, " n"], held_out: Int[np.ndarray, " h"], overlaps: Bool[np.ndarray, "N N"]
) -> Int[np.ndarray, " m"]:
    """Those of the rows that have no step in common with any that is held out."""
    return rows[~overlaps[np.ix_(rows, held_out)].any(axis=1)]


def make_folds(
    pairs: Pairs, labels: Float[np.ndarray, " N"], folds: int, keep: float, committee: int, rng: np.random.Generator
) -> list[Fold]:
    """The folds of a cross-validation of the distinct pairs."""
    made = []
    for held_out in purged_folds(pairs.distinct, labels, pairs.overlaps, folds, keep, rng):
        train = remaining(pairs.distinct, held_out, pairs.overlaps)
        made.append(Fold(train, _left_out(train, labels, pairs.overlaps, committee, keep, rng), held_out))
    return made


def _left_out(
    train: Int[np.ndarray, " n"],
    labels: Float[np.ndarray, " N"],
    overlaps: Bool[np.ndarray, "N N"],
    committee: int,
    keep: float,
    rng: np.random.Generator,
) -> tuple[Int[np.ndarray, " l"], ...]:
    """What each member leaves out: a fold of the training pairs, or what of it leaves enough to learn from."""
    parts = purged_folds(train, labels, overlaps, committee, keep, rng)
    chosen = rng.permutation(len(parts))[:committee] if len(parts) > committee else np.arange(len(parts))
    return tuple(parts[index] for index in sorted(chosen))


@functools.partial(jax.jit, static_argnames=("fitting",))
def train_committee(
    fitting: Fitting[Any],
    pairs: PreferenceDataset,
    rows: Int[Array, "M N"],
    counts: Int[Array, " M"],
    normalizer: Normalizer,
    keys: Key,
) -> Float[Array, "M C N 2"]:
    """Trains M members, each on the first of its rows; the score of every segment at each of C checkpoints."""
    everything = pairs.take(jnp.arange(len(pairs.pairs)))

    def train(rows: Int[Array, " N"], count: Int[Array, ""], key: Key) -> Float[Array, "C N 2"]:
        create_key, run_key = jax.random.split(key)
        agent = AGENTS[type(fitting.config)].create(fitting.config, everything, create_key, normalizer=normalizer)
        subset, interval = Subset(pairs, rows, count), fitting.updates // fitting.checkpoints

        def stage(agent: Any, _: None) -> tuple[Any, Float[Array, "N 2"]]:
            agent, _ = update_many(agent, subset, run_key, num_updates=interval, batch_size=fitting.batch_size)
            return agent, agent.segment_scores(everything.segments)

        scores: Array = jax.lax.scan(stage, agent, length=fitting.checkpoints)[1]
        return scores

    return jax.vmap(train)(rows, counts, keys)


def cross_entropy(logits: Float[np.ndarray, "*B"], labels: Float[np.ndarray, "*B"]) -> Float[np.ndarray, "*B"]:
    """Of soft labels against sigmoid(logits)."""
    return np.asarray(np.logaddexp(0, -logits) * labels + np.logaddexp(0, logits) * (1 - labels))


def agreement(logits: Float[np.ndarray, " N"], labels: Float[np.ndarray, " N"]) -> Float[np.ndarray, " decided"]:
    """For every decided pair, whether the likelier answer is the label."""
    return ranking_scores(np.stack([np.zeros_like(logits), logits], axis=-1), labels)


def cross_validate(
    context: JobContext,
    *,
    stem: str,
    fitting: Fitting[Any] | None,
    folds: int,
    keep: float,
    committee: int,
    frames: int,
    seed: tuple[int, int],
) -> dict[str, Any]:
    """Job: one repetition of the cross-validation of one method on one dataset; without `fitting`, of the majority.

    Returns:
        `logits` of the distinct pairs, each as it was held out; `fitted`, for each of these that is decided, the share
        of the folds which trained on it in which it comes out as labelled; `published`, the logits of the published
        evaluation pairs after training on the published training pairs, and their `published_labels`; and for each
        fold `train`, the number of training pairs, `updates`, how many were chosen, and `curve`, the cross-entropy at
        every checkpoint on the pairs that members left out.
    """
    pairs = read_pairs(Path(stem))
    labels = np.asarray(pairs.preferences.labels, float)
    rng = np.random.default_rng(seed)
    every = make_folds(pairs, labels, folds, keep, committee, rng)
    published = Fold(
        pairs.train, _left_out(pairs.train, labels, pairs.overlaps, committee, keep, rng), pairs.evaluation
    )
    thinned = thin(pairs.preferences, frames)
    device = PreferenceDataset.from_preferences(thinned)
    key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
    logits, right, taught = (np.zeros(len(labels)) for _ in range(3))
    told: dict[str, list[Any]] = {"train": [], "updates": [], "curve": []}
    for index, fold in enumerate([*every, published]):
        context.progress(index, len(every) + 1)
        fold_key = jax.random.fold_in(key, index)
        outcome, updates, curve = (
            _majority(labels, fold)
            if fitting is None
            else _fit_fold(fitting, thinned, device, pairs.overlaps, fold, fold_key)
        )
        if fold is published:
            break
        logits[fold.held_out] = outcome[fold.held_out]
        decided = fold.train[labels[fold.train] != 0.5]
        right[decided] += agreement(outcome[decided], labels[decided])
        taught[decided] += 1
        for name, value in (("train", len(fold.train)), ("updates", updates), ("curve", curve)):
            told[name].append(value)
    decided = pairs.distinct[labels[pairs.distinct] != 0.5]
    return {
        "logits": logits[pairs.distinct].tolist(),
        "fitted": (right[decided] / np.maximum(taught[decided], 1)).tolist(),
        "published": outcome[pairs.evaluation].tolist(),
        "published_labels": labels[pairs.evaluation].tolist(),
        **told,
    }


def _majority(labels: Float[np.ndarray, " N"], fold: Fold) -> tuple[Float[np.ndarray, " N"], int, list[float]]:
    """The same log-odds for all pairs; with one more answer on either side, so that no answer is ever impossible."""
    share = (labels[fold.train].sum() + 1) / (len(fold.train) + 2)
    return np.full(len(labels), math.log(share / (1 - share))), 0, []


def _fit_fold(
    fitting: Fitting[Any],
    thinned: Preferences,
    device: PreferenceDataset,
    overlaps: Bool[np.ndarray, "N N"],
    fold: Fold,
    key: Key,
) -> tuple[Float[np.ndarray, " N"], int, list[float]]:
    """The committee's logits of all pairs, the number of updates that was chosen, and the curve that chose it."""
    labels = np.asarray(thinned.labels, float)
    observations = np.asarray(thinned.segments.observations)[fold.train]
    normalizer = Normalizer.fit(observations.reshape(-1, observations.shape[-1]))
    rows, counts = np.zeros((len(fold.left_out), len(labels)), np.int32), np.zeros(len(fold.left_out), np.int32)
    for member, left_out in enumerate(fold.left_out):
        learned = remaining(fold.train, left_out, overlaps)
        rows[member, : len(learned)], counts[member] = learned, len(learned)
    keys = jax.random.split(key, len(fold.left_out))
    scores = np.asarray(train_committee(fitting, device, rows, counts, normalizer, keys), float)
    logits = scores[..., 1] - scores[..., 0]
    judged = [
        [
            cross_entropy(logits[member][:, left_out] / temperature, labels[left_out])
            for member, left_out in enumerate(fold.left_out)
        ]
        for temperature in TEMPERATURES
    ]
    entropies = np.stack([np.concatenate(each, axis=1).mean(axis=1) for each in judged])
    temperature, best = np.unravel_index(np.argmin(entropies), entropies.shape)
    updates = fitting.updates // fitting.checkpoints * (int(best) + 1)
    return logits[:, best].mean(axis=0) / TEMPERATURES[temperature], updates, entropies.min(axis=0).tolist()


def thin(preferences: Preferences, frames: int) -> Preferences:
    """Segments of `frames` steps, evenly spaced and up to the last one; shorter segments stay as they are."""
    length = preferences.segments.actions.shape[2]
    steps = np.round(np.linspace(0, length - 1, min(frames, length))).astype(int)
    return preferences.replace(segments=jax.tree.map(lambda leaf: leaf[:, :, steps], preferences.segments))


def describe(context: JobContext, *, stem: str, other: str | None) -> dict[str, Any]:
    """Job: what is known about a dataset before anything is learned.

    `agreeing` and `decided_by_both` compare its labels with those of the other dataset, if that has the same pairs.
    """
    pairs = read_pairs(Path(stem))
    labels = np.asarray(pairs.preferences.labels, float)[pairs.distinct]
    found: dict[str, Any] = {
        "hash": pairs.hash,
        "labels": labels.tolist(),
        "evaluation_pairs": len(pairs.evaluation),
        "repeated": len(pairs.train) + len(pairs.evaluation) - len(pairs.distinct),
        "overlapping": int((pairs.overlaps[np.ix_(pairs.distinct, pairs.distinct)].sum(axis=1) > 1).sum()),
    }
    if other is not None:
        theirs = read_pairs(Path(other))
        if len(theirs.distinct) == len(labels) and repeated_pairs(pairs.preferences, theirs.preferences).all():
            answers = np.asarray(theirs.preferences.labels, float)[theirs.distinct]
            both = (labels != 0.5) & (answers != 0.5)
            found |= {"agreeing": int((labels == answers)[both].sum()), "decided_by_both": int(both.sum())}
    return found


def jobs(args: Args) -> list[Job]:
    """The grid: for each dataset what is known of it, and every repetition of every method."""
    every = []
    for task in args.tasks:
        stem = str(_folder(args) / DATASETS[task])
        # People and the script were asked the same.
        compared = task == "lift-script" and "lift" in args.tasks
        other = str(_folder(args) / DATASETS["lift"]) if compared else None
        every.append(Job(f"describe/{task}", describe, {"stem": stem, "other": other}))
        for method in (MAJORITY, *args.methods):
            for seed in args.seeds:
                arguments = {
                    "stem": stem,
                    "fitting": None if method == MAJORITY else getattr(args, method),
                    "folds": args.folds,
                    "keep": args.keep,
                    "committee": args.committee,
                    "frames": args.frames,
                    "seed": (args.seed, seed),
                }
                every.append(Job(_cell(method, task, seed), cross_validate, arguments))
    return every


def report(args: Args, values: Mapping[str, Any], run: Mapping[str, Any], folder: Path) -> Report:
    """Everything that the run found; `values` are those of its jobs, `run` is the manifest."""
    rng = np.random.default_rng(args.seed)
    methods = (MAJORITY, *args.methods)
    rows: list[dict[str, Any]] = []
    comparisons: list[MethodComparison] = []
    claims: list[dict[str, Any]] = []
    curves: dict[tuple[str, str], Any] = {}
    for task in args.tasks:
        cells = {method: [values[_cell(method, task, seed)] for seed in args.seeds] for method in methods}
        labels = np.array(values[f"describe/{task}"]["labels"])
        outcomes: dict[tuple[str, str], Float[np.ndarray, " n"]] = {}
        for method, found in cells.items():
            outcomes |= {(method, metric): scores for metric, scores in _outcomes(found, labels).items()}
            logits = np.array([cell["logits"] for cell in found])
            estimates = {
                metric: _interval(outcomes[method, metric], metric, rng)
                for metric in METRICS
                if len(outcomes[method, metric])
            }
            if method != MAJORITY:
                estimates |= _tie_interval(logits, labels, rng)
            # n are pairs, and seeds the repetitions over which each of them was averaged.
            rows += [
                result_row(method, task, metric, replace(estimate, seeds=len(args.seeds)), "pair")
                for metric, estimate in estimates.items()
            ]
            if method != MAJORITY:
                curve = np.array([np.mean(cell["curve"], axis=0) for cell in found])
                curves[method, f"cross-entropy on left-out pairs, {task}"] = (_steps(getattr(args, method)), curve)
            if method == "mlp" and TIES in estimates:
                claims.append(claim_row("g", f"{task}: {TIES_CLAIM}", estimates[TIES], threshold=0.5))
        for name, subject, ours, theirs in CLAIMS:
            if ours in cells and theirs in cells:
                outcome = compare(outcomes[ours, AGREEMENT], outcomes[theirs, AGREEMENT], rng)
                comparisons.append(MethodComparison(ours, theirs, AGREEMENT, outcome, task, unit="pair"))
                claim = f"{task}: {subject} agrees with held-out labels more often than the {theirs} does"
                claims.append(claim_row(name, claim, outcome))
        if "mlp" in cells:
            told = compare(outcomes["mlp", ENTROPY], np.full(len(labels), math.log(2)), rng)
            claim = f"{task}: the MLP's probabilities say more than those of a coin"
            claims.append(claim_row("f", claim, told, "below"))
    claims.sort(key=lambda claim: str(claim["id"]))
    return Report(
        title="What a hundred human labels can show",
        summary=_summary(args, values, comparisons),
        results={"manifest": run, "rows": rows, "claims": claims},
        comparisons=comparisons,
        curves=curves,
        labels=_label_statistics(args, values),
        film_note="There is no film: these are archives of observations and actions.",
    )


def main(args: Args, console: Console | None = None) -> int:
    """Runs what is missing of the grid, then writes and prints the report. Returns the exit status."""
    _check(args)
    # What is noted with the run is where the archives are, wherever the report is rebuilt from. Their hash says which
    # they were; where this machine keeps them is nobody's concern.
    values = run_experiment(
        "human",
        replace(args, data=_folder(args).resolve()),
        jobs,
        report,
        seeds=args.seeds,
        console=console,
        # The page has all rows; these are what the claims are about.
        shown=lambda row: row["metric"] == AGREEMENT,
        unpublished=("data",),
    )
    return 1 if values is None else 0


def _folder(args: Args) -> Path:
    """Where the archives are, which may also lie in a folder `human_preferences`."""
    given = args.data or os.environ.get("ROBOPREF_DATA")
    if not given:
        raise ValueError(f"--data must name the folder with the archives, or ROBOPREF_DATA; {SOURCE}.")
    below = Path(given) / "human_preferences"
    return below if below.is_dir() else Path(given)


def _check(args: Args) -> None:
    chosen = {"tasks": tuple(DATASETS), "methods": METHODS, "seeds": None}
    check_args(args, chosen=chosen, counts={"frames": args.frames})
    for name in ("folds", "committee"):
        if getattr(args, name) < 2:
            raise ValueError(f"--{name} must be at least 2, not {getattr(args, name)}.")
    if not 0 < args.keep < 1:
        raise ValueError(f"--keep must lie between 0 and 1, not at {args.keep}.")
    for method in args.methods:
        fitting = getattr(args, method)
        if fitting.batch_size < 1 or not 1 <= fitting.checkpoints <= fitting.updates:
            raise ValueError(f"--{method} needs a batch of at least 1, and from 1 to as many checkpoints as updates.")
    folder = _folder(args)
    for task in args.tasks:
        for part in ("train", "eval"):
            path = folder / f"{DATASETS[task]}_{part}.npz"
            if not path.is_file():
                raise FileNotFoundError(f"there is no file {path}; {SOURCE}.")


def _cell(method: str, task: str, seed: int) -> str:
    return f"{method}/{task}/{seed}"


def _steps(fitting: Fitting[Any]) -> Int[np.ndarray, " C"]:
    """The updates after which the left-out pairs are looked at."""
    return fitting.updates // fitting.checkpoints * np.arange(1, fitting.checkpoints + 1)


def _outcomes(
    cells: Sequence[Mapping[str, Any]], labels: Float[np.ndarray, " N"]
) -> dict[str, Float[np.ndarray, " n"]]:
    """By metric, one number per pair: its mean over the repetitions."""
    published = np.array(cells[0]["published_labels"])
    found = {
        AGREEMENT: [agreement(np.array(cell["logits"]), labels) for cell in cells],
        ENTROPY: [cross_entropy(np.array(cell["logits"]), labels) for cell in cells],
        FITTED: [cell["fitted"] for cell in cells],
        PUBLISHED: [agreement(np.array(cell["published"]), published) for cell in cells],
    }
    return {metric: np.mean(scores, axis=0) for metric, scores in found.items()}


def _interval(scores: Float[np.ndarray, " n"], metric: str, rng: np.random.Generator) -> Interval:
    """Of the mean over pairs; an agreement is a share, also where it is a mean over repetitions."""
    found = return_interval(scores, rng)
    if metric == ENTROPY:
        return found
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def _tie_interval(
    logits: Float[np.ndarray, "R N"], labels: Float[np.ndarray, " N"], rng: np.random.Generator
) -> dict[str, Interval]:
    """How often a tie's scores lie closer to each other than those of a decided pair, if there are both."""
    gaps, ties = np.abs(logits).mean(axis=0), labels == 0.5
    if not 0 < ties.sum() < len(ties):
        return {}
    return {TIES: probability_of_improvement(gaps[~ties], gaps[ties], rng)}


def _label_statistics(args: Args, values: Mapping[str, Any]) -> LabelStatistics:
    """Facts about the labels of each dataset, and the scores that the first method gave held-out pairs, by label."""
    facts: dict[str, str] = {}
    histograms = []
    method = "mlp" if "mlp" in args.methods else args.methods[0]
    for task in args.tasks:
        told, cells = values[f"describe/{task}"], [values[_cell(method, task, seed)] for seed in args.seeds]
        labels = np.array(told["labels"])
        decided, second = int((labels != 0.5).sum()), int((labels > 0.5).sum())
        train = round(float(np.mean([size for cell in cells for size in cell["train"]])))
        facts[f"{task}, pairs"] = (
            f"{len(labels)} distinct, {decided} of them decided, {second} for the second;"
            f" {told['overlapping']} overlap with others, which leaves {train} to train on"
        )
        facts[f"{task}, published evaluation pairs"] = (
            f"{told['repeated']} of {told['evaluation_pairs']} are training pairs"
        )
        if "agreeing" in told:
            facts[f"{task} and lift"] = (
                f"the same label for {told['agreeing']} of the {told['decided_by_both']} pairs that both decide"
            )
        gaps = np.mean([cell["logits"] for cell in cells], axis=0)
        groups = {
            "first preferred": gaps[labels < 0.5],
            "tie": gaps[labels == 0.5],
            "second preferred": gaps[labels > 0.5],
        }
        histograms.append(
            Histogram(
                title=f"What {method} says of held-out pairs, {task}",
                x_label="log-odds that the second is preferred",
                groups={name: group for name, group in groups.items() if len(group)},
            )
        )
    return LabelStatistics(facts=facts, histograms=histograms)


def _summary(args: Args, values: Mapping[str, Any], comparisons: Sequence[MethodComparison]) -> str:
    """What was done, how it came out, and how much so few pairs can tell."""
    told = [values[f"describe/{task}"] for task in args.tasks]
    decided = [int((np.array(each["labels"]) != 0.5).sum()) for each in told]
    repeated, evaluation = (sum(each[name] for each in told) for name in ("repeated", "evaluation_pairs"))
    against = [each for each in comparisons if each.theirs == MAJORITY and each.metric == AGREEMENT]
    better = [f"{each.ours} on {each.task}" for each in against if each.result.verdict == "better"]
    fewest, most = min(decided), max(decided)
    needed = math.ceil((1.96 * 0.5 / 0.05) ** 2)
    return (
        f"Published preferences between segments, {fewest} to {most} decided pairs in each of {len(args.tasks)}"
        f" datasets, cross-validated {len(args.seeds)} times. {repeated} of the {evaluation} published evaluation pairs"
        " are copies of training pairs, so that agreement on them is agreement with what was learned.\n\n"
        f"In {len(better)} of {len(against)} comparisons a method agrees with the held-out labels more often than the"
        f" majority of the training labels does{': ' if better else ''}{', '.join(better)}. Labels of lift-script are a"
        " script's, by which sizes and learning rates were chosen: a control, and not a test.\n\n"
        f"What so few labels can show: {most} decided pairs give an agreement near one half to within"
        f" {100 * _half_width(most):.0f} percentage points, {fewest} to within {100 * _half_width(fewest):.0f}, with"
        " 95% confidence. That can be enough to see that a model has learned something of what was preferred. It is not"
        f" enough to tell apart two models that differ by 5 points: to within 5 points it takes about {needed} pairs."
    )


def _half_width(pairs: int) -> float:
    """Of the 95% interval of an agreement near one half."""
    return 1.96 * math.sqrt(0.25 / pairs)


if __name__ == "__main__":
    run_main(main, PRESETS, "What a hundred human labels can show, by cross-validation.")
