"""The regret preference model's experiment, from end to end at its smallest, and what its boards are."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from envs.delivery import random_risky_board, to_mdp
from experiments.experiment import rebuild_report
from experiments.regret import CASES, PRESETS, draw_queries, jobs, main
from robopref.mdp import advantages, optimal_values, q_values
from robopref.reward_inference import best_policy, segment_scores
from tests.experiments.runs import Run, run_to_the_end

SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_to_the_end(main, replace(SMOKE, folder=tmp_path_factory.mktemp("regret") / "run"))


def test_the_smallest_run_ends_with_claims_and_a_page(run: Run) -> None:
    assert run.status == 0
    claims = run.results["claims"]
    # Per kind of board and noise three of (a), one of (b), one of (d); and per case two of (c).
    assert sorted({claim["id"] for claim in claims}) == ["a", "b", "c", "d"]
    assert len(claims) == 2 * 2 * 5 + 2 * 2
    assert all(claim["verdict"] in ("holds", "fails", "undecided") for claim in claims)
    rows = run.results["rows"]
    assert len(rows) == 2 * 2 * 6 * 2 + 2 * 2 * 2
    assert {row["n"] for row in rows} == {SMOKE.boards, SMOKE.repeats}
    page = (run.folder / "report" / "report.html").read_text()
    assert "share of boards solved" in page
    assert "preferences" in run.said


def test_the_report_can_be_rebuilt(run: Run) -> None:
    before = run.results
    rebuild_report(run.folder)
    assert run.results == before


def test_every_job_solves_the_same_boards(run: Run) -> None:
    boards = run.value("boards/deterministic")["boards"]
    assert len(boards) == SMOKE.boards
    for job in jobs(run.args):
        if job.name.startswith("solve/"):
            value = run.value(job.name)
            for returns in value["returns"].values():
                assert np.shape(returns) == (SMOKE.boards, len(SMOKE.preferences))
                assert np.max(returns) <= 1 + 1e-9


@pytest.mark.parametrize("case", CASES)
def test_the_boards_of_a_case_want_opposite_things_and_look_alike(case: str) -> None:
    length, unfinished = (1, False) if case == "a risk" else (3, True)
    queries = draw_queries(CASES[case][0], np.random.default_rng(0), count=200, length=length, unfinished=unfinished)
    preferred, returned, lost = [], [], []
    with jax.enable_x64(True):
        for board in CASES[case]:
            mdp, weights = to_mdp(board, 0.999), np.array(board.weights)
            preferred.append(np.asarray(best_policy(mdp, weights))[~mdp.terminal])
            values = optimal_values(mdp)
            rewards = queries.features @ weights
            for found, score in ((returned, "partial return"), (lost, "full regret")):
                scores = segment_scores(score, queries, rewards, values, q_values(mdp, values), 0.999)  # type: ignore[arg-type]
                found.append(np.sign(np.round(np.asarray(scores[:, 1] - scores[:, 0]), 9)))
    assert not (preferred[0] * preferred[1]).sum(axis=1).all()
    np.testing.assert_array_equal(*returned)
    assert np.abs(returned[0]).max() == 1
    assert (lost[0] != lost[1]).any()


def test_drawn_segments_follow_the_board() -> None:
    board = random_risky_board(np.random.default_rng(3), 50.0)
    queries = draw_queries(board, np.random.default_rng(1), count=5000, length=2)
    mdp = to_mdp(board, 0.9)
    states, actions = np.asarray(queries.states), np.asarray(queries.actions)
    assert not mdp.terminal[states[..., 0]].any()
    assert (mdp.transitions[states[..., :-1], actions, states[..., 1:]] > 0).all()
    # What a segment earns is, on average, what its actions were to be expected to.
    before = states[..., :-1]
    expected = np.where(mdp.terminal[before][..., None], 0.0, np.asarray(mdp.features)[before, actions])
    gap = (np.asarray(queries.features) - expected).reshape(-1, 6)
    assert (np.abs(gap.mean(axis=0)) <= 4 * gap.std(axis=0) / np.sqrt(len(gap)) + 1e-12).all()
    assert gap.std(axis=0).max() > 0


def test_unfinished_segments_never_end_an_episode() -> None:
    board = CASES["a constant"][0]
    queries = draw_queries(board, np.random.default_rng(1), count=300, length=3, unfinished=True)
    assert np.shape(queries.states) == (300, 2, 4)
    assert not board.terminal[np.asarray(queries.states)].any()


def test_regret_is_minus_the_advantages_on_a_deterministic_board_too() -> None:
    board = CASES["a constant"][1]
    queries = draw_queries(board, np.random.default_rng(2), count=50, length=3)
    with jax.enable_x64(True):
        mdp = to_mdp(board, 0.999)
        values = optimal_values(mdp)
        rewards, q = np.asarray(queries.features) @ np.array(board.weights), q_values(mdp, values)
        deterministic = segment_scores("deterministic regret", queries, rewards, values, q, 0.999)
        states, actions = np.asarray(queries.states), np.asarray(queries.actions)
        gained = np.asarray(advantages(mdp, values))[states[..., :-1], actions]
    np.testing.assert_allclose(deterministic, np.sum(0.999 ** np.arange(3) * gained, axis=-1), atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preferences": (30, 3)}, "--preferences must be positive and ascending"),
        ({"case_preferences": ()}, "--case-preferences must be positive and ascending"),
        ({"dynamics": ("chaotic",)}, "--dynamics takes some of deterministic, risky"),
        ({"cases": ()}, "--cases takes some of"),
        ({"boards": 0}, "--boards must be at least 1"),
        ({"noises": (-1.0,)}, "--noises are temperatures"),
        ({"discount": 1.0}, "--discount must lie in"),
        ({"seed": -1}, "seeds must not be negative"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        main(replace(SMOKE, folder=tmp_path / "run", **changes), Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()
