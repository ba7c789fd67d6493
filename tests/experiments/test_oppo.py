"""The OPPO experiment from end to end at its smallest, data included, and the parts of which its figures are made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments import oppo
from experiments.experiment import rebuild_report
from experiments.grid import JobContext
from experiments.locomotion import dataset_of
from experiments.oppo import CLAIMS, METHODS, NEARNESS, PRESETS, PROJECTED, SCORE, Args, Place, main
from robopref.configs import from_json, to_json
from robopref.datasets import sums_ahead
from robopref.episodes import EpisodeDataset
from robopref.records import read_records
from tests.experiments.runs import Run, run_to_the_end

TASK = "Hopper/medium-expert"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """In a folder without data, which are therefore made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("oppo"))
        yield run_to_the_end(main, replace(PRESETS["smoke"], folder=Path("run").absolute()))


@pytest.fixture(scope="module")
def dataset(run: Run) -> EpisodeDataset:
    return dataset_of(run.folder.parent / "runs" / "locomotion-smoke-0", *TASK.split("/"))


def rows(run: Run, metric: str) -> dict[str, Any]:
    return {row["method"]: row for row in run.results["rows"] if row["metric"] == metric}


def test_it_runs_from_end_to_end_and_makes_its_data(run: Run, dataset: EpisodeDataset) -> None:
    assert run.status == 0
    assert run.results["manifest"]["data"] == {f"episodes/{TASK}": dataset.hash}
    assert run.results["manifest"]["config"]["data"] is None
    assert (run.folder / "report" / "scatters.png").is_file()


def test_every_method_has_a_score_and_oppo_two(run: Run) -> None:
    found = rows(run, SCORE)
    guided = [method for method in METHODS if method.startswith("oppo")]
    assert set(found) == {"the data", *METHODS, *(method + PROJECTED for method in guided)}
    assert set(rows(run, NEARNESS)) == set(guided)
    known = run.value(f"episodes/{TASK}")
    floor, ceiling = np.mean(known["random"]), np.mean(known["expert"])
    for method in METHODS:
        returns = np.array(run.value(f"train/{method}/{TASK}/0")["returns"])
        assert returns.shape == (2,)
        assert found[method]["mean"] == pytest.approx(100 * (returns.mean() - floor) / (ceiling - floor))
        assert (found[method]["n"], found[method]["seeds"]) == (2, 1)


def test_claims_are_about_the_differences_that_they_name(run: Run) -> None:
    scores, claims = rows(run, SCORE), run.results["claims"]
    assert len(claims) == len(CLAIMS) + 1
    for claim in CLAIMS:
        told = next(each for each in claims if each["claim"] == f"{TASK}: {claim.text}")
        assert told["ours"] == pytest.approx(scores[claim.ours]["mean"] - scores[claim.theirs]["mean"])
        verdict = "holds" if told["low"] > -claim.margin else "fails" if told["high"] < -claim.margin else "undecided"
        assert told["verdict"] == verdict


def test_labels_compare_what_is_earned_over_the_horizon(run: Run, dataset: EpisodeDataset) -> None:
    queries, labels = read_records(run.folder / f"labels/{TASK}/0/labels.parquet", dataset)
    assert (len(queries), queries.length) == (8, 10)
    ahead = sums_ahead(dataset, 10)[dataset.offsets[queries.episodes] + queries.starts]
    np.testing.assert_array_equal(labels.values, ahead[:, 1] > ahead[:, 0])


def context(run: Run, folder: Path) -> JobContext:
    labels = f"labels/{TASK}/0"
    return JobContext(folder, {}, {labels: run.folder / labels}, lambda done, total: None)


def place(run: Run) -> Place:
    return Place(str(run.folder.parent / "runs" / "locomotion-smoke-0"), TASK)


def test_few_labels_are_the_first_of_the_many(
    run: Run, dataset: EpisodeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    create = oppo.WindowPreferenceDataset.create
    monkeypatch.setattr(
        oppo.WindowPreferenceDataset, "create", lambda *arguments: seen.append(arguments) or create(*arguments)
    )
    function, arguments = oppo._training(run.args, "oppo-few")
    shared = {"place": place(run), "seed": (0, 0), "labels": f"labels/{TASK}/0"}
    function(context(run, tmp_path), **arguments, **shared, evaluation=oppo.Evaluation(2, 0))
    [(_, queries, labels)] = seen
    every, answers = read_records(run.folder / f"labels/{TASK}/0/labels.parquet", dataset)
    np.testing.assert_array_equal(queries.starts, every.starts[:4])
    np.testing.assert_array_equal(labels.values, answers.values[:4])


def test_learned_rewards_begin_at_zero_and_keep_the_model_s_order(
    run: Run, dataset: EpisodeDataset, tmp_path: Path
) -> None:
    model = oppo._learn_reward(context(run, tmp_path), dataset, f"labels/{TASK}/0", run.args.reward, (0, 0))
    rewards = model.relabel(dataset)
    assert rewards.shape == dataset.rewards.shape
    assert rewards.min() == pytest.approx(0.0, abs=1e-5)
    assert rewards.std() == pytest.approx(1.0, rel=1e-3)
    raw = model.agent.rewards(oppo.Segments(dataset.observations[:, None], dataset.actions[:, None]))[:, 0]
    assert stats.spearmanr(raw, rewards).statistic > 0.999


def test_the_plots_show_distances_to_the_point_that_is_acted_on(run: Run) -> None:
    found = run.value(f"train/oppo-endless/{TASK}/0")
    latents = found["latents"]
    count = len(latents["earned"])
    assert count == len(latents["places"]) == len(latents["distances"])
    flat = np.linalg.norm(np.array(latents["places"]) - latents["target"], axis=1)
    # Two components of the difference are no longer than the whole of it.
    assert (flat <= np.array(latents["distances"]) + 1e-3).all()
    expected = stats.spearmanr(-np.array(latents["distances"]), latents["earned"]).statistic
    assert found["nearness"] == pytest.approx(expected, abs=0.02)


def test_a_report_is_rebuilt_to_the_same_results(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.folder.parent)
    before = run.results
    rebuild_report(run.folder)
    assert run.results == before


def test_arguments_survive_their_json_form() -> None:
    for args in PRESETS.values():
        assert from_json(Args, json.loads(json.dumps(to_json(args)))) == args


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("Hopper",)}, "no task 'Hopper'; did you mean Hopper/medium"),
        ({"methods": ("opo-few",)}, "no method 'opo-few'; did you mean oppo-few"),
        ({"few": 9}, r"--few \(9\) are the first of --many \(8\)"),
        ({"data": Path("nowhere")}, "--data nowhere is no folder; leave it out, and the data are made"),
        ({"horizon": 0}, "--horizon must be at least 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main(replace(PRESETS["smoke"], folder=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
