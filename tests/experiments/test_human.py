"""The cross-validation of human labels, on archives made here: what is learnable is learned, and nothing leaks."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import human
from experiments.experiment import rebuild_report
from experiments.grid import JobContext
from experiments.human import AGREEMENT, ENTROPY, FITTED, MAJORITY, PRESETS, PUBLISHED, TIES, Fitting, Fold, main
from robopref.datasets import PreferenceDataset
from robopref.types import Preferences, Segments
from tests.experiments.runs import Run, run_to_the_end

STEPS, OBSERVATIONS, ACTIONS = 6, 3, 2
REPEATED = 4


def random_pairs(count: int, seed: int = 0, *, shared: bool = False) -> Preferences:
    """Pairs in which the segment that has more of the first observation was preferred, and every fourth is a tie.

    Where segments are `shared`, they come from a pool of as many as there are pairs.
    """
    rng = np.random.default_rng(seed)
    pool = rng.normal(size=(count, STEPS, OBSERVATIONS)), rng.uniform(-1, 1, (count, STEPS, ACTIONS))
    fresh = rng.normal(size=(count, 2, STEPS, OBSERVATIONS)), rng.uniform(-1, 1, (count, 2, STEPS, ACTIONS))
    chosen = np.stack([np.arange(count), (np.arange(count) + 1) % count], axis=1)
    observations, actions = (part[chosen] for part in pool) if shared else fresh
    sums = observations[..., 0].sum(axis=-1)
    labels = np.where(np.arange(count) % 4 == 0, 0.5, sums[:, 1] > sums[:, 0])
    return Preferences(Segments(observations, actions), labels)


def write(folder: Path, task: str, preferences: Preferences) -> str:
    """The archives of a task, in which the last pairs appear once more for evaluation; returns their stem."""
    stem = folder / human.DATASETS[task]
    stem.parent.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", slice(None)), ("eval", slice(-REPEATED, None))):
        content = {"label": preferences.labels[rows]}
        for name, array in (("obs", preferences.segments.observations), ("action", preferences.segments.actions)):
            content |= {f"{name}_{side + 1}": array[rows, side] for side in (0, 1)}
        np.savez(stem.with_name(f"{stem.name}_{part}.npz"), **content)
    return str(stem)


# Pairs, overlaps and folds


def test_evaluation_pairs_that_are_training_pairs_count_once(tmp_path: Path) -> None:
    pairs = human.read_pairs(Path(write(tmp_path, "can", random_pairs(10))))
    assert pairs.preferences.labels.shape == (10 + REPEATED,)
    np.testing.assert_array_equal(pairs.train, np.arange(10))
    np.testing.assert_array_equal(pairs.evaluation, np.arange(10, 10 + REPEATED))
    np.testing.assert_array_equal(pairs.distinct, np.arange(10))


def test_pairs_overlap_that_share_a_single_step() -> None:
    segments = random_pairs(4).segments
    segments.observations[2, 1, -1], segments.actions[2, 1, -1] = (
        segments.observations[0, 0, 3],
        segments.actions[0, 0, 3],
    )
    # The same observation with another action is another step.
    segments.observations[3, 0, 0] = segments.observations[1, 1, 2]
    expected = np.eye(4, dtype=bool)
    expected[0, 2] = expected[2, 0] = True
    np.testing.assert_array_equal(human.overlapping(segments), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_folds_share_no_step_with_what_is_held_out(tmp_path: Path, shared: bool) -> None:
    pairs = human.read_pairs(Path(write(tmp_path, "can", random_pairs(24, shared=shared))))
    labels = np.asarray(pairs.preferences.labels)
    folds = human.make_folds(pairs, labels, 4, 0.7, 3, np.random.default_rng(0))
    assert sorted(np.concatenate([fold.held_out for fold in folds])) == pairs.distinct.tolist()
    assert (len(folds) > 4) == shared
    for fold in folds:
        assert not pairs.overlaps[np.ix_(fold.train, fold.held_out)].any()
        rest = np.setdiff1d(pairs.distinct, fold.held_out)
        assert len(fold.train) >= 0.7 * len(rest) or len(fold.held_out) == 1
        np.testing.assert_array_equal(fold.train, [row for row in rest if not pairs.overlaps[row, fold.held_out].any()])
        assert len(fold.left_out) == 3
        assert set(np.concatenate(fold.left_out)) <= set(fold.train)
        if not shared:
            assert len(fold.held_out) == 6
            assert sorted(np.concatenate(fold.left_out)) == sorted(fold.train)


def test_folds_have_the_same_mix_of_labels() -> None:
    labels = np.repeat([0.0, 0.5, 1.0], [10, 5, 20])
    folds = human.purged_folds(np.arange(35), labels, np.eye(35, dtype=bool), 5, 0.5, np.random.default_rng(0))
    assert [[(labels[fold] == label).sum() for label in (0.0, 0.5, 1.0)] for fold in folds] == [[2, 1, 4]] * 5


def test_segments_are_thinned_up_to_their_last_step() -> None:
    pairs = random_pairs(3)
    thinned = human.thin(pairs, 3)
    np.testing.assert_array_equal(thinned.segments.observations, pairs.segments.observations[:, :, [0, 2, 5]])
    np.testing.assert_array_equal(thinned.segments.actions, pairs.segments.actions[:, :, [0, 2, 5]])
    np.testing.assert_array_equal(human.thin(pairs, 100).segments.actions, pairs.segments.actions)


# Learning


LINEAR = Fitting(human.LINEAR, updates=60, batch_size=8, checkpoints=3)


def cross_validate(stem: str, fitting: Fitting[Any] | None, **changes: Any) -> dict[str, Any]:
    context = JobContext(Path(), {}, {}, lambda completed, total: None)
    arguments = {"folds": 4, "keep": 0.5, "committee": 3, "frames": STEPS, "seed": (0, 0), **changes}
    return human.cross_validate(context, stem=stem, fitting=fitting, **arguments)


def test_what_can_be_learned_is_learned_and_noise_is_not(tmp_path: Path) -> None:
    pairs, rng = random_pairs(60), np.random.default_rng(1)
    noise = pairs.replace(labels=rng.integers(0, 2, 60).astype(float))
    found = {}
    for name, data in (("rule", pairs), ("noise", noise)):
        value = cross_validate(write(tmp_path / name, "can", data), LINEAR)
        outcomes = human._outcomes([value], data.labels)
        found[name] = {metric: float(scores.mean()) for metric, scores in outcomes.items()}
        assert value["train"] == [45] * 4
        assert set(value["updates"]) <= {20, 40, 60}
        assert np.shape(value["curve"]) == (4, 3)
    assert found["rule"][AGREEMENT] > 0.75
    assert found["rule"][ENTROPY] < 0.6
    assert abs(found["noise"][AGREEMENT] - 0.5) < 0.25
    assert found["noise"][ENTROPY] > 0.65


@pytest.mark.parametrize("task", ["can", "lift"])
def test_the_labels_that_people_gave_of_robots_train_a_reward_model(
    task: str, human_archive: Callable[[str], Path]
) -> None:
    """Pairs that it was taught come out as labelled, and of Can those that it was not; of Lift, no method's do."""
    archive = human_archive(f"{human.DATASETS[task]}_train.npz")
    stem = str(archive.with_name(archive.name.removesuffix("_train.npz")))
    fitting = Fitting(human.MLP, updates=200, batch_size=16)
    value = cross_validate(stem, fitting, frames=10)
    labels = human.read_pairs(Path(stem)).preferences.labels[:100]
    outcomes = human._outcomes([value], labels)
    assert np.mean(value["fitted"]) > 0.7
    if task == "can":
        assert outcomes[AGREEMENT].mean() > 0.55


def test_the_majority_is_the_side_that_training_pairs_prefer(tmp_path: Path) -> None:
    pairs = random_pairs(20)
    labels = np.repeat([0.0, 1.0, 0.5], [12, 4, 4])
    value = cross_validate(write(tmp_path, "can", pairs.replace(labels=labels)), None)
    # Every fold trains on 9 first, 3 second and 3 ties.
    share = (3 + 1.5 + 1) / (15 + 2)
    np.testing.assert_allclose(value["logits"], math.log(share / (1 - share)))
    outcomes = human._outcomes([value], labels)
    assert outcomes[AGREEMENT].mean() == 12 / 16
    np.testing.assert_allclose(
        outcomes[ENTROPY].mean(), -np.mean(labels * np.log(share) + (1 - labels) * np.log(1 - share))
    )


def fit(pairs: Preferences, fold: Fold) -> np.ndarray:
    data = PreferenceDataset.from_preferences(pairs)
    return human._fit_fold(LINEAR, pairs, data, np.eye(len(pairs.labels), dtype=bool), fold, jax.random.key(0))[0]


FOLD = Fold(np.arange(20), (np.arange(10), np.arange(10, 20)), np.arange(20, 30))


def test_labels_of_held_out_pairs_decide_nothing() -> None:
    pairs = random_pairs(30)
    others = pairs.replace(labels=np.where(np.arange(30) < 20, pairs.labels, 1 - pairs.labels))
    np.testing.assert_array_equal(fit(pairs, FOLD), fit(others, FOLD))
    taught = pairs.replace(labels=np.where(np.arange(30) < 20, 1 - pairs.labels, pairs.labels))
    assert np.abs(fit(pairs, FOLD) - fit(taught, FOLD)).max() > 0.1


def test_both_orders_of_a_pair_say_the_same() -> None:
    pairs = random_pairs(30)
    mixed = np.random.default_rng(0).integers(0, 2, 30).astype(bool)
    segments = jax.tree.map(lambda leaf: np.where(mixed[:, None, None, None], leaf[:, ::-1], leaf), pairs.segments)
    swapped = Preferences(segments, np.where(mixed, 1 - pairs.labels, pairs.labels))
    np.testing.assert_allclose(fit(swapped, FOLD), np.where(mixed, -1, 1) * fit(pairs, FOLD), rtol=1e-3, atol=1e-4)


# The experiment


TASKS, METHODS, SEEDS = ("lift", "lift-script"), ("mlp", "cpl"), (0, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """People and the script agree about all pairs but the first three that both decide."""
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("human") / "run"
    pairs = random_pairs(24, shared=True)
    labels = pairs.labels.copy()
    labels[1:4] = 1 - labels[1:4]
    write(data / "human_preferences", "lift", pairs)
    write(data / "human_preferences", "lift-script", pairs.replace(labels=labels))
    args = replace(PRESETS["smoke"], data=data, tasks=TASKS, methods=METHODS, seeds=SEEDS, folder=folder, cores=1)
    return run_to_the_end(main, args)


def test_the_experiment_runs_from_end_to_end(run: Run) -> None:
    assert run.status == 0
    page = run.folder / "report" / "report.html"
    assert run.said.rstrip().endswith(f"The report is {page.resolve()}")
    for said in (*TASKS, *METHODS, MAJORITY):
        assert said in run.said
    text = page.read_text(encoding="utf-8")
    assert f"{2 * REPEATED} of the {2 * REPEATED} published evaluation pairs are copies of training pairs" in text
    assert "the same label for 15 of the 18 pairs that both decide" in text


def right(logits: Any, labels: np.ndarray) -> np.ndarray:
    """Of the decided pairs: 1 where the likelier answer is the label, and one half where both are as likely."""
    answers = np.sign(np.array(logits)) / 2 + 0.5
    return 1 - np.abs(answers - labels)[labels != 0.5]


def test_rows_are_means_over_pairs_and_repetitions(run: Run) -> None:
    rows = {(row["method"], row["task"], row["metric"]): row for row in run.results["rows"]}
    for task in TASKS:
        labels = np.array(run.value(f"describe/{task}")["labels"])
        for method in (MAJORITY, *METHODS):
            values = [run.value(f"{method}/{task}/{seed}") for seed in SEEDS]
            probabilities = [1 / (1 + np.exp(-np.array(value["logits"]))) for value in values]
            published = np.array(values[0]["published_labels"])
            np.testing.assert_array_equal(published, labels[-REPEATED:])
            expected = {
                AGREEMENT: (np.mean([right(value["logits"], labels) for value in values]), 18),
                ENTROPY: (np.mean([-labels * np.log(p) - (1 - labels) * np.log(1 - p) for p in probabilities]), 24),
                FITTED: (np.mean([value["fitted"] for value in values]), 18),
                PUBLISHED: (np.mean([right(value["published"], published) for value in values]), 3),
            }
            for metric, (mean, n) in expected.items():
                row = rows.pop((method, task, metric))
                np.testing.assert_allclose(row["mean"], mean, rtol=1e-9)
                assert (row["n"], row["seeds"]) == (n, len(SEEDS))
                assert row["low"] <= row["mean"] <= row["high"]
                assert metric == ENTROPY or 0 <= row["low"] <= row["high"] <= 1
            if method == MAJORITY:
                continue
            gaps = np.abs([value["logits"] for value in values]).mean(axis=0)
            decided, ties = gaps[labels != 0.5], gaps[labels == 0.5]
            apart = (decided[:, None] > ties) + 0.5 * (decided[:, None] == ties)
            np.testing.assert_allclose(rows.pop((method, task, TIES))["mean"], apart.mean(), rtol=1e-9)
    assert not rows


def test_claims_have_verdicts_that_follow_from_their_intervals(run: Run) -> None:
    rows = {(row["method"], row["task"], row["metric"]): row["mean"] for row in run.results["rows"]}
    claims = run.results["claims"]
    # Claims a, c and e are about methods that were not asked for.
    assert [claim["id"] for claim in claims] == [name for name in "bdfg" for _ in TASKS]
    for claim in claims:
        task = claim["claim"].partition(":")[0]
        ours = {"b": "mlp", "d": "cpl"}.get(claim["id"])
        if ours:
            difference = rows[ours, task, AGREEMENT] - rows[MAJORITY, task, AGREEMENT]
            np.testing.assert_allclose(claim["ours"], difference, atol=1e-9)
        low, high = claim["low"], claim["high"]
        if claim["id"] == "f":
            np.testing.assert_allclose(claim["ours"], rows["mlp", task, ENTROPY] - math.log(2), atol=1e-9)
            low, high = -high, -low
        if claim["id"] == "g":
            assert claim["ours"] == rows["mlp", task, TIES]
            low, high = low - 0.5, high - 0.5
        assert claim["verdict"] == ("holds" if low > 0 else "fails" if high < 0 else "undecided")


def test_the_data_are_known_by_their_hash_and_not_by_their_place(run: Run) -> None:
    manifest = run.results["manifest"]
    assert manifest["data"].keys() == {f"describe/{task}" for task in TASKS}
    assert len(set(manifest["data"].values())) == 2
    assert manifest["config"]["data"] is None
    assert str(run.args.data) not in json.dumps(run.results)


def test_a_report_is_rebuilt_to_the_same_bytes(run: Run) -> None:
    files = {path.name: path.read_bytes() for path in (run.folder / "report").iterdir()}
    assert rebuild_report(run.folder) == run.folder / "report" / "report.html"
    assert {path.name: path.read_bytes() for path in (run.folder / "report").iterdir()} == files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("cann",)}, "there is no task 'cann'.*can"),
        ({"tasks": ("can", "can")}, "--tasks must name at least one, and none twice"),
        ({"methods": ()}, "--methods must name at least one"),
        ({"methods": ("mpl",)}, "there is no method 'mpl'"),
        ({"seeds": (-1,)}, "seeds must not be negative"),
        ({"folds": 1}, "--folds must be at least 2, not 1"),
        ({"committee": 1}, "--committee must be at least 2, not 1"),
        ({"keep": 1.0}, "--keep must lie between 0 and 1"),
        ({"frames": 0}, "--frames must be at least 1, not 0"),
        ({"cpl": Fitting(human.CPL, updates=4, batch_size=4)}, "--cpl needs a batch .* checkpoints as updates"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_make_no_sense_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        main(replace(PRESETS["smoke"], data=tmp_path, folder=folder, **changes), Console(file=io.StringIO()))
    assert not folder.exists()


def test_it_says_where_to_get_the_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBOPREF_DATA", raising=False)
    args = replace(PRESETS["smoke"], folder=tmp_path / "run")
    with pytest.raises(ValueError, match=r"--data must name .* or ROBOPREF_DATA; .*inverse-preference-learning"):
        main(args)
    monkeypatch.setenv("ROBOPREF_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"num100_q50_human_train\.npz; .*inverse-preference-learning"):
        main(args)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_configurations_that_can_be_created(preset: str) -> None:
    args, pairs = PRESETS[preset], random_pairs(2)
    for method in human.METHODS:
        config = getattr(args, method).config
        agent = jax.eval_shape(
            lambda key, config=config: human.AGENTS[type(config)].create(config, pairs, key), jax.random.key(0)
        )
        scores = jax.eval_shape(type(agent).segment_scores, agent, pairs.segments)
        assert scores.shape == (2, 2)
