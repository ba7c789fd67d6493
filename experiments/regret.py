"""What do people's preferences measure? The regret preference model (Knox et al. 2022, arXiv:2206.02231), in tables.

Simulated people compare short segments of random delivery boards, by regret or by partial return, with or without
noise. Rewards are learned from their answers by either model, and the policy that is best under them is judged by the
true rewards: a board is solved if its scaled return is at least 0.9. Everything is exact but the learning.

* On deterministic boards and on risky ones: from so many preferences, how many boards does each pairing of labels and
  learner solve? A third learner takes labels by regret for sums of advantages, learns a table of these, and acts
  greedily on it, or mistakes it for a reward (Knox et al. 2023, arXiv:2310.02456).
* Two pairs of boards that want opposite behaviour and give the same answers by partial return: one differs in what a
  risk is worth, one in a constant added to each step, with no segment that reaches the end of an episode. No number of
  such answers tells the boards of a pair apart; answers by regret do.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.console import Console

from envs.delivery import Board, random_board, random_risky_board, to_mdp
from experiments.experiment import RunArgs, check_args, claim_row, result_row, run_experiment, run_main, tally
from experiments.grid import Job, JobContext
from robopref.evaluation import compare, success_interval
from robopref.files import atomic_write
from robopref.mdp import TabularMDP, greedy_policy, optimal_values, q_values, scaled_return, stack
from robopref.preferences import bradley_terry
from robopref.reports import LabelStatistics, Report
from robopref.reward_inference import (
    CandidatePolicies,
    RewardInferenceConfig,
    Score,
    TabularQueries,
    best_policy,
    candidate_policies,
    learn,
    segment_scores,
    without_optimal,
)
from robopref.types import PyTree

Dynamics: TypeAlias = Literal["deterministic", "risky"]
Labels: TypeAlias = Literal["regret", "return"]
Learner: TypeAlias = Literal["regret", "return", "advantage"]

SOLVED = "share of boards solved"
IDENTIFIED = "share of pairs identified"
GREEDY, MISTAKEN = "advantage, greedily", "advantage as reward"
NEAR_OPTIMAL = 0.9
"""Scaled return from which on a board counts as solved, as in the paper."""

CASES: Mapping[str, tuple[Board, Board]] = {
    "a risk": (
        Board(("s.g",), (-1.0, 0.0, -10.0, 1.0, 0.0, 0.0), win_probability=0.5),
        Board(("s.g",), (-1.0, 0.0, -10.0, 11.0, 0.0, 0.0), win_probability=0.5),
    ),
    "a constant": (
        Board(("c...g",), (-1.0, 0.0, 0.0, 0.5, 0.0, 0.0)),
        Board(("c...g",), (1.0, 0.0, 0.0, 0.5, 0.0, 0.0)),
    ),
}
"""Pairs of boards with opposite best behaviour that partial returns cannot tell apart."""

_WEIGHTS = (50.0, -50.0, 1.0, -1.0, -2.0, 0.0, -10.0, 10.0, 5.0)
"""Of which the authors draw those of the policies that values are made of."""

_TIED = 1e-6
"""Scores that differ by less are equal: what is left is rounding."""


REGRET = RewardInferenceConfig("deterministic regret", updates=2000)
PARTIAL_RETURN = RewardInferenceConfig("partial return", learning_rate=2.0, updates=5000, keep_best=False)
ADVANTAGE = RewardInferenceConfig("advantage", updates=1000)


@dataclass(frozen=True)
class Args(RunArgs):
    """What do people's preferences measure? Rewards of tabular processes, learned from regret or partial return.

    Attributes:
        dynamics: of the boards: deterministic, or risky.
        noises: temperatures of the labels; 0 is noiseless.
        boards: of each kind.
        preferences: how many are learned from; ascending.
        length: steps of a segment.
        discount: of the boards.
        policies: from how many random weights candidate policies are made.
        regret: how rewards are learned by the regret model.
        partial_return: how they are learned by the partial-return model.
        advantage: how tables of advantages are learned.
        repeats: of drawing preferences, in each case of identifiability.
        cases: which of them.
        case_preferences: how many are learned from there; ascending.
        win: what a win on a risky board is worth.
    """

    dynamics: tuple[Dynamics, ...] = ("deterministic", "risky")
    noises: tuple[float, ...] = (0.0, 1.0)
    boards: int = 100
    preferences: tuple[int, ...] = (3, 10, 30, 100, 300, 1000)
    length: int = 3
    discount: float = 0.999
    policies: int = 50
    regret: RewardInferenceConfig = REGRET
    partial_return: RewardInferenceConfig = PARTIAL_RETURN
    advantage: RewardInferenceConfig = ADVANTAGE
    repeats: int = 50
    cases: tuple[str, ...] = tuple(CASES)
    case_preferences: tuple[int, ...] = (3, 10, 30, 100, 300)
    win: float = 50.0


DEFAULT = Args()
PRESETS = {
    "small": DEFAULT,
    "smoke": replace(
        DEFAULT,
        preset="smoke",
        boards=4,
        preferences=(3, 30),
        policies=6,
        regret=replace(DEFAULT.regret, updates=60),
        partial_return=replace(DEFAULT.partial_return, updates=60),
        advantage=replace(DEFAULT.advantage, updates=60),
        repeats=4,
        case_preferences=(3, 30),
    ),
    "paper": replace(
        DEFAULT,
        preset="paper",
        preferences=(3, 10, 30, 100, 300, 1000, 3000),
        policies=100,
        regret=replace(DEFAULT.regret, updates=5000),
        partial_return=replace(DEFAULT.partial_return, updates=30_000),
    ),
}


def jobs(args: Args) -> list[Job]:
    """The grid: per kind of board its boards and policies, then each pairing of labels and learner; and the cases."""
    every = []
    shared = {"seed": args.seed, "discount": args.discount}
    for dynamics in args.dynamics:
        boards = f"boards/{dynamics}"
        drawn = {"dynamics": dynamics, "count": args.boards, "win": args.win}
        every.append(Job(boards, make_boards, {**shared, **drawn, "policies": args.policies}))
        for noise in args.noises:
            for labels, learner in _PAIRINGS:
                arguments = {
                    **shared,
                    "boards": boards,
                    "temperature": noise,
                    "labels": labels,
                    "config": _config(args, learner, dynamics),
                    "preferences": args.preferences,
                    "length": args.length,
                }
                every.append(Job(_cell(dynamics, noise, labels, learner), solve, arguments, needs=(boards,)))
    for case in args.cases:
        for model in ("regret", "return"):
            config = _config(args, model, "risky" if case == "a risk" else "deterministic")
            sizes = {"preferences": args.case_preferences, "repeats": args.repeats, "policies": args.policies}
            every.append(Job(_case(case, model), identify, {**shared, "case": case, "config": config, **sizes}))
    return every


def make_boards(
    context: JobContext, *, dynamics: Dynamics, count: int, win: float, policies: int, discount: float, seed: int
) -> dict[str, Any]:
    """Job: draws boards on which behaviour matters, and finds policies that are best under random weights."""
    rng = np.random.default_rng([seed, 0])
    drawn = [
        random_board(rng) if dynamics == "deterministic" else random_risky_board(rng, win) for _ in range(2 * count)
    ]
    with jax.enable_x64(True):
        mdps = stack([to_mdp(board, discount) for board in drawn])
        # Where all policies are equally good, a scaled return means nothing.
        matters = np.isfinite(np.asarray(_uniform_gain(mdps)))
        boards = [board for board, counts in zip(drawn, matters, strict=True) if counts][:count]
        mdp = stack([to_mdp(board, discount) for board in boards])
        weights = np.random.default_rng([seed, 1]).choice(_WEIGHTS, (policies, len(boards[0].weights)))
        best = np.asarray(_best_policies(mdp, weights)) > 0
    # Random weights often have the same best policy. Boards with fewer different ones get copies, which do not count.
    distinct = [np.unique(each, axis=0) for each in best]
    most = max(len(each) for each in distinct)
    with atomic_write(context.folder / "policies.npz") as path, path.open("wb") as file:
        np.savez_compressed(file, best=np.stack([np.resize(each, (most, *each.shape[1:])) for each in distinct]))
    return {
        "boards": [{"rows": board.rows, "weights": board.weights, "win": board.win_probability} for board in boards]
    }


def solve(
    context: JobContext,
    *,
    boards: str,
    temperature: float,
    labels: Labels,
    config: RewardInferenceConfig,
    preferences: Sequence[int],
    length: int,
    discount: float,
    seed: int,
) -> dict[str, Any]:
    """Job: learns from the first so many preferences on every board, as one program, and judges what was learned.

    Returns:
        `returns`: by what is done with what was learned, the scaled return [boards, preferences]; `boards_per_second`,
        each with all numbers of preferences, without compilation.
    """
    drawn = [
        Board(tuple(each["rows"]), tuple(each["weights"]), each["win"]) for each in context.values[boards]["boards"]
    ]
    with np.load(context.folders[boards] / "policies.npz") as saved:
        best = saved["best"]
    queries = [
        draw_queries(board, np.random.default_rng([seed, 2, index]), count=max(preferences), length=length)
        for index, board in enumerate(drawn)
    ]
    with jax.enable_x64(True):
        mdps = stack([to_mdp(board, discount) for board in drawn])
        weights = jnp.asarray([board.weights for board in drawn])
        pairs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *queries)
        score = _score_of_labels(labels, risky=drawn[0].win_probability > 0)
        answers = jax.vmap(functools.partial(_answers, score, temperature, discount))(
            mdps, weights, pairs, jax.random.split(jax.random.key(seed), len(drawn))
        )
        program = jax.jit(functools.partial(_learn_and_judge, config, discount, tuple(preferences)))
        policies = best / best.sum(axis=-1, keepdims=True)
        compiled = program.lower(mdps, weights, policies, pairs, answers).compile()
        started = time.monotonic()
        returns = {
            name: np.asarray(found).tolist()
            for name, found in compiled(mdps, weights, policies, pairs, answers).items()
        }
        seconds = time.monotonic() - started
    return {"returns": returns, "boards_per_second": len(drawn) / seconds}


def identify(
    context: JobContext,
    *,
    case: str,
    config: RewardInferenceConfig,
    preferences: Sequence[int],
    repeats: int,
    policies: int,
    discount: float,
    seed: int,
) -> dict[str, Any]:
    """Job: learns both boards of a case from noiseless answers by the learner's own model.

    Returns:
        `identified` [repeats, preferences]: whether what was learned is optimal on both boards; `same_answers`: the
        share of queries that are answered alike on both.
    """
    pair = CASES[case]
    # A segment of a constant's case that reached the goal would have told how many steps the way there took.
    length, unfinished = (1, False) if case == "a risk" else (3, True)
    queries = [
        draw_queries(
            pair[0],
            np.random.default_rng([seed, 3, index]),
            count=max(preferences),
            length=length,
            unfinished=unfinished,
        )
        for index in range(repeats)
    ]
    with jax.enable_x64(True):
        pairs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *queries)
        returns, answers = [], []
        for board in pair:
            mdp, weights = to_mdp(board, discount), jnp.asarray(board.weights)
            drawn = np.random.default_rng([seed, 4]).choice(_WEIGHTS, (policies, len(board.weights)))
            candidates = jax.vmap(best_policy, in_axes=(None, 0))(mdp, drawn)
            answer = functools.partial(_answers, config.score, 0.0, discount, mdp, weights)
            answers.append(jax.vmap(lambda queries, answer=answer: answer(queries, jax.random.key(0)))(pairs))
            repeated = jax.tree.map(
                lambda leaf: jnp.broadcast_to(leaf, (repeats, *np.shape(leaf))), (mdp, weights, candidates)
            )
            judge = jax.jit(
                functools.partial(_learn_and_judge, config, discount, tuple(preferences), keep_optimal=True)
            )
            returns.append(np.asarray(judge(*repeated, pairs, answers[-1])[config.score]))
        same = float(jnp.mean(jnp.abs(answers[0] - answers[1]) < _TIED))
    return {"identified": (np.minimum(*returns) > 1 - _TIED).tolist(), "same_answers": same}


def draw_queries(
    board: Board, rng: np.random.Generator, *, count: int, length: int, unfinished: bool = False
) -> TabularQueries:
    """Pairs of segments that begin anywhere and act at random; if asked to, only such as do not end an episode."""
    outcomes, terminal = board.outcomes, board.terminal
    starts, size = np.flatnonzero(board.starts), 2 * count * (20 if unfinished else 1)
    states, actions = np.zeros((size, length + 1), int), rng.integers(0, 4, (size, length))
    features = np.zeros((size, length, outcomes.features.shape[-1]))
    states[:, 0] = rng.choice(starts, size)
    for step in range(length):
        at = states[:, step], actions[:, step]
        # The last possibility takes what rounding leaves of the sum of the others.
        reached = np.cumsum(outcomes.probabilities[at], axis=-1)[:, :-1]
        happens = np.sum(rng.random((size, 1)) >= reached, axis=-1)
        states[:, step + 1] = outcomes.cells[(*at, happens)]
        features[:, step] = outcomes.features[(*at, happens)]
    if unfinished:
        kept = np.flatnonzero(~terminal[states].any(axis=1))[: 2 * count]
        states, actions, features = states[kept], actions[kept], features[kept]
    return jax.tree.map(
        lambda array: array.reshape(count, 2, *array.shape[1:]), TabularQueries(states, actions, features)
    )


def report(args: Args, values: Mapping[str, Any], run: Mapping[str, Any], folder: Path) -> Report:
    """Everything that the run found; `values` are those of its jobs, `run` is the manifest."""
    rng = np.random.default_rng(args.seed)
    rows: list[dict[str, Any]] = []
    claims: list[dict[str, Any]] = []
    curves: dict[tuple[str, str], Any] = {}
    for dynamics in args.dynamics:
        for noise in args.noises:
            solved = _solved(args, values, dynamics, noise)
            setting = f"{dynamics} boards, {_noise(noise)} labels"
            for method, boards in solved.items():
                shares = [success_interval(boards[:, i]) for i in range(len(args.preferences))]
                curves[method, f"{SOLVED}, {setting}"] = (np.array(args.preferences), shares)
                rows += [
                    result_row(method, f"{setting}, {count} preferences", SOLVED, share, "board")
                    for count, share in zip(args.preferences, shares, strict=True)
                ]
            claims += _claims_about(args, solved, setting, rng)
    for case in args.cases:
        for model in ("regret", "return"):
            identified = np.array(values[_case(case, model)]["identified"], float)
            shares = [success_interval(identified[:, i]) for i in range(len(args.case_preferences))]
            curves[f"{model} → {model}", f"{IDENTIFIED}, {case}"] = (np.array(args.case_preferences), shares)
            rows += [
                result_row(f"{model} → {model}", f"{case}, {count} preferences", IDENTIFIED, share, "draw")
                for count, share in zip(args.case_preferences, shares, strict=True)
            ]
            claims.append(_claim_about_case(case, model, identified))
    facts = {
        f"answered alike on both boards of {case}, by {model}": f"{values[_case(case, model)]['same_answers']:.0%}"
        for case in args.cases
        for model in ("regret", "return")
    }
    speeds = [value["boards_per_second"] for value in values.values() if "boards_per_second" in value]
    each = f"each with all {len(args.preferences)} numbers of preferences"
    facts["boards per second"] = f"{min(speeds):.2g} to {max(speeds):.2g} on one core, {each}"
    return Report(
        title="What do people's preferences measure?",
        summary=_summary(args, claims),
        results={"manifest": run, "rows": rows, "claims": sorted(claims, key=lambda claim: claim["id"])},
        curves=curves,
        curve_axis="preferences",
        labels=LabelStatistics(facts=facts),
        film_note="Nothing moves here.",
    )


def main(args: Args, console: Console | None = None) -> int:
    """Runs what is missing of the grid, then writes and prints the report. Returns the exit status."""
    _check(args)
    told = tuple(f" {count} preferences" for count in (_few(args), args.preferences[-1], args.case_preferences[-1]))
    values = run_experiment(
        "regret",
        args,
        jobs,
        report,
        seeds=(args.seed,),
        console=console,
        shown=lambda row: row["task"].endswith(told),
    )
    return 1 if values is None else 0


def _learn_and_judge(
    config: RewardInferenceConfig,
    discount: float,
    preferences: Sequence[int],
    mdps: TabularMDP,
    weights: Float[Any, "M F"],
    policies: Float[Any, "M P S A"],
    queries: TabularQueries,
    labels: Float[Any, "M N"],
    *,
    keep_optimal: bool = False,
) -> dict[str, jax.Array]:
    """Scaled returns [M, sizes] of what is learned on each of M boards from the first so many of its N labels."""
    asked = jnp.arange(max(preferences)) < jnp.asarray(preferences)[:, None]

    def on_board(mdp: TabularMDP, weights: PyTree, policies: PyTree, queries: PyTree, labels: PyTree) -> PyTree:
        candidates: CandidatePolicies = candidate_policies(mdp, policies)
        if not keep_optimal:
            candidates = without_optimal(candidates, weights, optimal_values(mdp))

        def from_asked(asked: jax.Array) -> dict[str, jax.Array]:
            learned, _ = learn(config, queries, labels, candidates, discount, asked)
            return {name: scaled_return(mdp, policy) for name, policy in _uses(config.score, mdp, learned).items()}

        return jax.vmap(from_asked)(asked)

    judged: dict[str, jax.Array] = jax.vmap(on_board)(mdps, weights, policies, queries, labels)
    return judged


def _uses(score: Score, mdp: TabularMDP, learned: jax.Array) -> dict[str, jax.Array]:
    """The policies that follow from what was learned."""
    if score != "advantage":
        return {score: best_policy(mdp, learned)}
    scaled = learned / jnp.maximum(jnp.max(jnp.abs(learned)), 1e-300)
    mistaken = mdp.replace(rewards=scaled)
    return {GREEDY: greedy_policy(scaled), MISTAKEN: greedy_policy(q_values(mistaken, optimal_values(mistaken)))}


def _answers(
    score: Score,
    temperature: float,
    discount: float,
    mdp: TabularMDP,
    weights: Float[Any, " F"],
    queries: TabularQueries,
    key: jax.Array,
) -> jax.Array:
    """What people who look at this score answer; noiseless ones call equal segments a tie."""
    values = optimal_values(mdp)
    scores = segment_scores(score, queries, queries.features @ weights, values, q_values(mdp, values), discount)
    chances = bradley_terry(scores[:, 0], scores[:, 1], temperature, _TIED)
    return chances if temperature == 0 else jax.random.bernoulli(key, chances).astype(chances.dtype)


@jax.jit
def _best_policies(mdps: TabularMDP, weights: Float[Any, "P F"]) -> jax.Array:
    found: jax.Array = jax.vmap(lambda mdp: jax.lax.map(lambda each: best_policy(mdp, each), weights))(mdps)
    return found


@jax.jit
def _uniform_gain(mdps: TabularMDP) -> jax.Array:
    """The scaled return of the best policy of each: 1, or not a number where behaviour does not matter."""
    gains: jax.Array = jax.vmap(lambda mdp: scaled_return(mdp, greedy_policy(q_values(mdp, optimal_values(mdp)))))(mdps)
    return gains


def _solved(args: Args, values: Mapping[str, Any], dynamics: Dynamics, noise: float) -> dict[str, np.ndarray]:
    """Which boards each method solves [boards, preferences]."""
    found = {}
    for labels, learner in _PAIRINGS:
        for use, returns in values[_cell(dynamics, noise, labels, learner)]["returns"].items():
            name = f"{labels} → {use if learner == 'advantage' else learner}"
            found[name] = np.array(returns, float) >= NEAR_OPTIMAL
    return found


def _claims_about(
    args: Args, solved: Mapping[str, np.ndarray], setting: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    averages = {method: boards.mean(axis=1)[None] for method, boards in solved.items()}
    claims = []
    for other in ("return → return", "regret → return", "return → regret"):
        outcome = compare(averages["regret → regret"], averages[other], rng)
        text = f"{setting}: regret → regret solves more boards than {other}, over all numbers of preferences"
        claims.append(claim_row("a", text, outcome, "above"))
    few = args.preferences.index(_few(args))
    mismatched = solved["return → regret"].astype(float)
    outcome = compare(mismatched[:, -1][None], mismatched[:, few][None], rng)
    text = (
        f"{setting}: from {_few(args)} to {args.preferences[-1]} preferences, return → regret gains less than 5 points"
    )
    claims.append(claim_row("b", text, outcome, "below", 0.05))
    outcome = compare(averages[f"regret → {GREEDY}"], averages[f"regret → {MISTAKEN}"], rng)
    text = f"{setting}: advantages learned from regret solve more boards if acted on greedily than if taken for rewards"
    claims.append(claim_row("d", text, outcome, "above"))
    return claims


def _claim_about_case(case: str, model: Labels, identified: np.ndarray) -> dict[str, Any]:
    if model == "return":
        share = success_interval(identified.ravel())
        text = f"{case}: no number of answers by partial return identifies both boards (share below 5%)"
        return claim_row("c", text, share, "below", 0.05)
    share = success_interval(identified[:, -1])
    text = f"{case}: answers by regret identify both boards (share above 90%)"
    return claim_row("c", text, share, "above", 0.9)


def _summary(args: Args, claims: Sequence[Mapping[str, Any]]) -> str:
    return (
        f"{args.boards} random boards of each kind; simulated people compare pairs of segments of {args.length} steps,"
        " and rewards are learned from their answers. “regret → return” means labels by regret, learned from as if they"
        " were by partial return. A board is solved if the policy that is best under the learned reward has a scaled"
        f" return of at least {NEAR_OPTIMAL:g} under the true one.\n\n" + tally(claims)
    )


_PAIRINGS: tuple[tuple[Labels, Learner], ...] = (
    ("regret", "regret"),
    ("return", "return"),
    ("regret", "return"),
    ("return", "regret"),
    ("regret", "advantage"),
)


def _config(args: Args, learner: Learner | str, dynamics: Dynamics) -> RewardInferenceConfig:
    if learner == "regret":
        return replace(args.regret, score=_score_of_labels("regret", risky=dynamics == "risky"))
    return args.partial_return if learner == "return" else args.advantage


def _score_of_labels(labels: Labels, *, risky: bool) -> Score:
    """Where chance decides, regret is what was to be expected of the actions, not what came of them."""
    if labels == "return":
        return "partial return"
    return "full regret" if risky else "deterministic regret"


def _few(args: Args) -> int:
    return max((count for count in args.preferences if count <= 30), default=args.preferences[0])


def _noise(temperature: float) -> str:
    return f"noisy ({temperature:g})" if temperature else "noiseless"


def _cell(dynamics: str, noise: float, labels: str, learner: str) -> str:
    return f"solve/{dynamics}/{noise:g}/{labels}-{learner}"


def _case(case: str, model: str) -> str:
    return f"identify/{case.replace(' ', '-')}/{model}"


def _check(args: Args) -> None:
    for name in ("preferences", "case_preferences"):
        counts = getattr(args, name)
        if not counts or min(counts) < 1 or list(counts) != sorted(set(counts)):
            raise ValueError(f"--{name.replace('_', '-')} must be positive and ascending, not {counts}.")
    for name, known in (("dynamics", ("deterministic", "risky")), ("cases", tuple(CASES))):
        chosen = getattr(args, name)
        unknown = sorted(set(chosen) - set(known))
        if unknown or not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"--{name} takes some of {', '.join(known)}, none twice, not {', '.join(chosen) or 'nothing'}."
            )
    counts = {name: getattr(args, name) for name in ("boards", "repeats", "policies", "length")}
    check_args(args, chosen={}, counts=counts)
    if not args.noises or min(args.noises) < 0 or len(set(args.noises)) < len(args.noises):
        raise ValueError(f"--noises are temperatures, none below 0 and none twice, not {args.noises}.")
    if not 0 <= args.discount < 1:
        raise ValueError(f"--discount must lie in [0, 1), not {args.discount}.")


if __name__ == "__main__":
    run_main(main, PRESETS, "What do people's preferences measure? Rewards learned from regret or partial return.")
