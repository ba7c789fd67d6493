"""The experiment of contrastive preference learning: its data, claims and presets, and that it goes on when killed."""

from __future__ import annotations

import io
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from agents.piql import PIQLConfig
from experiments import cpl
from experiments.cpl import CLAIMS, METHODS, PRESETS, PUBLISHED, Args, jobs, main
from experiments.experiment import rebuild_report
from robopref.episodes import load_episodes
from robopref.queries import Labels, Queries
from robopref.records import read_records
from robopref.training import checkpoints
from tests.experiments.runs import Run, run_to_the_end

ROOT = Path(__file__).resolve().parents[2]
TASK = "drawer-open-v3"
SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_to_the_end(main, replace(SMOKE, folder=tmp_path_factory.mktemp("cpl") / "run"))


def records(folder: Path, pairing: str, seed: int = 0) -> tuple[Queries, Labels]:
    dataset = load_episodes(folder / "episodes" / TASK / "episodes")
    return read_records(folder / "labels" / pairing / TASK / str(seed) / "labels.parquet", dataset)


def test_every_method_has_success_smoothed_success_and_ranking_accuracy(run: Run) -> None:
    assert run.status == 0
    found = {(row["method"], row["metric"]) for row in run.results["rows"]}
    for method in METHODS:
        assert {(method, metric) for metric in (cpl.SUCCESS, cpl.SMOOTHED, cpl.RANKING)} <= found
    assert {("piql (policy)", cpl.RANKING), ("best attainable", cpl.RANKING), ("expert", cpl.SUCCESS)} <= found
    assert (run.folder / "report" / "report.html").exists()


def test_every_claim_is_there_with_the_verdict_of_its_interval(run: Run) -> None:
    claims = run.results["claims"]
    assert [claim["id"] for claim in claims] == ["a", "a", "b", "c", "c", "d", "e", "f"]
    for claim in claims:
        assert claim["claim"].startswith(f"{TASK}: ")
        assert claim["low"] <= claim["ours"] <= claim["high"]
        nothing = 1 if claim["id"] == "f" else 0
        above, below = claim["low"] > nothing, claim["high"] < nothing
        if claim["id"] in "ef":
            above, below = below, above
        assert claim["verdict"] == ("holds" if above else "fails" if below else "undecided")


def test_a_claim_is_the_difference_of_the_success_rates_in_the_table(run: Run) -> None:
    found = run.results
    rates = {row["method"]: row["mean"] for row in found["rows"] if row["metric"] == cpl.SUCCESS}
    differences = [claim["ours"] for claim in found["claims"] if claim["id"] != "f"]
    expected = [sum(weight * rates[method] for weight, method in claim.terms) for claim in CLAIMS]
    np.testing.assert_allclose(differences, expected, atol=1e-12)


def test_the_claim_about_time_is_the_ratio_of_times(run: Run) -> None:
    seconds = {
        method: [run.value(f"train/{method}/{TASK}/{seed}")["seconds_per_update"] * 6 for seed in run.args.seeds]
        for method in ("cpl", "piql")
    }
    ratio = math.exp(np.mean(np.log(seconds["cpl"])) - np.mean(np.log(seconds["piql"])))
    claim = next(claim for claim in run.results["claims"] if claim["id"] == "f")
    assert claim["ours"] == pytest.approx(ratio)


def test_dense_pairs_are_all_pairs_and_sparse_ones_use_each_segment_once(run: Run) -> None:
    dense, _ = records(run.folder, "dense")
    sparse, _ = records(run.folder, "sparse")
    ranked, _ = records(run.folder, "ranked")

    def segments(queries: Queries) -> set[tuple[int, int]]:
        return set(zip(queries.episodes.ravel().tolist(), queries.starts.ravel().tolist(), strict=True))

    assert len(segments(dense)) == SMOKE.dense_segments
    assert len(dense) == SMOKE.dense_segments * (SMOKE.dense_segments - 1) // 2
    assert len(segments(sparse)) == SMOKE.sparse_segments == 2 * len(sparse)
    assert (len(ranked), ranked.candidates) == (SMOKE.ranked_sets, SMOKE.candidates)
    assert all(len(segments(ranked.take(np.array([i])))) == SMOKE.candidates for i in range(len(ranked)))
    assert segments(ranked) <= segments(dense)


def test_labels_prefer_the_smaller_measured_regret(run: Run) -> None:
    with np.load(run.folder / "segments" / TASK / "segments.npz") as pool:
        regrets = dict(zip(zip(pool["episodes"], pool["starts"], strict=True), pool["shortfalls"], strict=True))
    for pairing in ("dense", "sparse"):
        queries, labels = records(run.folder, pairing)
        for episodes, starts, answer in zip(queries.episodes, queries.starts, labels.values, strict=True):
            first, second = (regrets[segment] for segment in zip(episodes, starts, strict=True))
            assert answer == (0.5 if abs(first - second) < 1e-9 else float(second < first))
    queries, labels = records(run.folder, "ranked")
    for episodes, starts, order in zip(queries.episodes, queries.starts, labels.orders, strict=True):
        ordered = [regrets[segment] for segment in zip(episodes[order], starts[order], strict=True)]
        assert ordered == sorted(ordered)


def test_seeds_draw_segments_of_their_own(run: Run) -> None:
    first, second = (records(run.folder, "dense", seed)[0] for seed in run.args.seeds)
    assert not np.array_equal(np.stack([first.episodes, first.starts]), np.stack([second.episodes, second.starts]))


def test_held_out_pairs_are_of_episodes_that_nobody_trained_on(run: Run) -> None:
    trained, held_out = (load_episodes(run.folder / name / TASK / "episodes") for name in ("episodes", "held-out"))
    assert not set(trained.seeds.tolist()) & set(held_out.seeds.tolist())
    queries, labels = read_records(run.folder / "labels" / "held-out" / TASK / "labels.parquet", held_out)
    assert len(queries) == SMOKE.held_out_pool // 2
    assert labels.values is not None
    decided = int((labels.values != 0.5).sum())
    for method in METHODS:
        rankings = run.value(f"train/{method}/{TASK}/0")["rankings"]
        assert {len(scores) for scores in rankings.values()} == {decided}
        assert set(np.concatenate(list(rankings.values()))) <= {0.0, 0.5, 1.0}


def test_a_report_is_rebuilt_to_the_same_bytes(run: Run) -> None:
    page = run.folder / "report" / "report.html"
    before = page.read_bytes()
    rebuild_report(run.folder)
    assert page.read_bytes() == before


def test_a_noisy_teacher_bounds_what_can_be_attained(tmp_path: Path) -> None:
    """The best ranking accuracy is the mean of max(p, 1 - p) of the teacher's own probabilities."""
    noise = 30.0
    narrow = replace(SMOKE, seeds=(0,), methods=("sft",), temperature=noise, teacher="partial_return")
    args = replace(narrow, folder=tmp_path / "run")
    run = run_to_the_end(main, args)
    assert run.status == 0
    dataset = load_episodes(args.folder / "held-out" / TASK / "episodes")
    queries, labels = read_records(args.folder / "labels" / "held-out" / TASK / "labels.parquet", dataset)
    gaps = np.subtract(*queries.partial_returns.T[::-1])
    probabilities = 1 / (1 + np.exp(-gaps / noise))
    expected = np.maximum(probabilities, 1 - probabilities).mean()
    row = next(row for row in run.results["rows"] if row["method"] == "best attainable")
    assert row["mean"] == pytest.approx(expected, rel=1e-6)
    assert 0.5 < row["mean"] < 1
    assert labels.labeler == "partial_return"


def test_the_published_table_has_the_published_means() -> None:
    """The paper gives a mean over its six tasks beside each row."""
    for pairing, means in {"dense": (51.3, 56.2, 66.6), "sparse": (51.4, 63.1, 67.9)}.items():
        rows = np.array([task[pairing] for task in PUBLISHED.values()])
        np.testing.assert_allclose(rows.mean(axis=0), means, atol=0.06)


def test_published_differences_are_taken_from_the_same_cells() -> None:
    by_name = {(claim.name, claim.terms[0][1]): cpl._published(claim, TASK) for claim in CLAIMS}
    assert by_name["a", "cpl"] == pytest.approx(0.836 - 0.626)
    assert by_name["a", "cpl-sparse"] == pytest.approx(0.791 - 0.635)
    assert by_name["b", "cpl"] == pytest.approx(0.836 - 0.711)
    assert by_name["d", "piql-sparse"] == pytest.approx((0.762 - 0.711) - (0.791 - 0.836))
    assert by_name["c", "cpl"] is None
    assert cpl._published(CLAIMS[0], "reach-v3") is None


def test_the_smoothed_maximum_is_the_best_window_of_the_curve_of_all_seeds() -> None:
    rng = np.random.default_rng(0)
    curve = (rng.random((3, 6, 5)) < np.linspace(0.1, 0.9, 6)[None, :, None]).astype(float)
    windows = [curve[:, start : start + 2].mean() for start in range(5)]
    row = cpl._smoothed_row("cpl", TASK, curve, 2)
    assert row["mean"] == pytest.approx(max(windows))
    assert row["n"] == 3 * 2 * 5
    assert cpl._smoothed_row("cpl", TASK, curve, 100)["mean"] == pytest.approx(curve.mean())


def test_the_paper_preset_has_the_published_values() -> None:
    args = PRESETS["paper"]
    assert (args.horizon, args.length, args.episodes) == (250, 64, 2500)
    assert (args.pool, args.dense_segments, args.sparse_segments) == (20_000, 2500, 20_000)
    assert (args.curve_episodes, args.smoothing, len(args.seeds), len(args.tasks)) == (25, 8, 4, 6)
    for training in (args.sft, args.piql, args.cpl):
        assert (training.updates, training.batch_size) == (500_000, 96)
    assert (args.bc.updates, args.bc.batch_size) == (500_000, 1024)
    config = args.cpl.config
    assert (config.hidden_dims, config.dropout, config.learning_rate) == ((512, 512), 0.25, 1e-4)
    assert (config.temperature, config.conservative_weight, config.bc_weight) == (0.1, 0.5, 0.0)
    assert (config.pretrain_updates, config.warmup_updates, config.decay_updates) == (200_000, 10_000, None)
    assert config.action_limit == 1 - 1e-5
    sft = args.sft.config
    assert (sft.hidden_dims, sft.dropout, sft.learning_rate, sft.pretrain_updates) == ((512, 512), 0.25, 1e-4, 200_000)
    piql: PIQLConfig = args.piql.config
    assert (piql.reward_updates, piql.reward.ensemble, piql.reward.learning_rate) == (50_000, 1, 3e-4)
    iql = piql.iql
    assert (iql.expectile, iql.temperature, iql.max_weight, iql.discount) == (0.7, 0.3333, 100.0, 0.99)
    assert (iql.target_update_rate, iql.learning_rate, iql.decay_updates, iql.critics) == (0.005, 3e-4, 500_000, 2)
    kl = cpl._training(args, "cpl-kl").config
    assert (kl.temperature, kl.conservative_weight, kl.reference) == (0.2, 0.75, True)
    assert kl.learning_rate == pytest.approx(1e-5)
    bc = cpl._training(args, "cpl-bc").config
    assert (bc.conservative_weight, bc.bc_weight) == (1.0, 1.0)


def paper_in_little(folder: Path) -> Args:
    """The published networks and batches, for 200 updates of CPL of which 100 contrast, on a little data."""
    args = PRESETS["paper"]
    config = replace(args.cpl.config, pretrain_updates=100)
    return replace(
        args,
        folder=folder,
        tasks=(TASK,),
        methods=("cpl",),
        seeds=(0,),
        horizon=80,
        episodes=8,
        held_out_episodes=2,
        pool=20,
        held_out_pool=6,
        dense_segments=20,
        sparse_segments=20,
        expert_horizon=5,
        cpl=replace(args.cpl, config=config, updates=200, checkpoints=4),
        evaluation_episodes=2,
        curve_episodes=1,
    )


def test_the_paper_preset_runs_is_killed_and_goes_on(tmp_path: Path) -> None:
    args = paper_in_little(tmp_path / "run")
    cell = tmp_path / "run" / "train" / "cpl" / TASK / "0"
    code = "import sys; from tests.experiments.test_cpl import *; main(paper_in_little(Path(sys.argv[1])))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(args.folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 400
        while not (cell.is_dir() and checkpoints(cell)):
            assert process.poll() is None, "the run ended before its first checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (cell / "result.json").exists()
    first = checkpoints(cell)[50]
    before = first.stat().st_mtime_ns
    run = run_to_the_end(main, args)
    assert run.status == 0
    assert first.stat().st_mtime_ns == before
    assert list(checkpoints(cell)) == [50, 100, 150, 200]
    metrics = run.value(f"train/cpl/{TASK}/0")["metrics"]
    # The published warm-up is so long that contrasting moves nothing yet: it is the cloning that shows.
    assert [row["step"] for row in metrics][-1] == 200
    assert metrics[-1]["policy/cloning_loss"] < metrics[0]["policy/cloning_loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("cpll",)}, "there is no method 'cpll'; did you mean cpl"),
        ({"tasks": ("drawr-open-v3",)}, "no task 'drawr-open-v3'; did you mean"),
        ({"seeds": ()}, "--seeds must name at least one"),
        ({"sparse_segments": 7}, "--sparse-segments must be an even number, not 7"),
        ({"dense_segments": 30}, "30 segments cannot be drawn from a --pool of 20"),
        ({"length": 31}, "segments of 31 steps do not fit into episodes of 30"),
        ({"candidates": 9}, "--candidates must lie between 2 and 8, not 9"),
        ({"teacher": "oracle_regret"}, "needs --oracles, the folder of a finished run"),
        ({"temperature": -1.0}, "must not be negative"),
        ({"seed": -1}, "seeds must not be negative"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        main(replace(SMOKE, folder=tmp_path / "run", **changes), Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


def test_jobs_can_be_narrowed_to_one_cell() -> None:
    one = [job.name for job in jobs(replace(SMOKE, methods=("cpl-sparse",), seeds=(1,)))]
    assert [name for name in one if name.startswith("labels/")] == [
        f"labels/held-out/{TASK}",
        f"labels/sparse/{TASK}/1",
    ]
    assert [name for name in one if name.startswith("train/")] == [
        f"train/expert/{TASK}/1",
        f"train/cpl-sparse/{TASK}/1",
    ]
