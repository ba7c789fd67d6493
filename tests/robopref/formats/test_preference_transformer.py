"""The reader of published human preferences: archives made here, and the real ones where they are present."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robopref.formats.preference_transformer import read_preferences, repeated_pairs
from robopref.types import Preferences

PAIRS, STEPS, OBSERVATIONS, ACTIONS = 4, 3, 5, 2
LABELS = np.array([0.0, 1.0, 0.5, 0.25])


def arrays(seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {f"obs_{side}": rng.normal(size=(PAIRS, STEPS, OBSERVATIONS)) for side in (1, 2)}
    made |= {f"action_{side}": rng.uniform(-1, 1, (PAIRS, STEPS, ACTIONS)) for side in (1, 2)}
    return {**made, "label": LABELS, **changes}


def write(path: Path, content: Mapping[str, np.ndarray]) -> Path:
    np.savez(path, **content)
    return path


def test_an_archive_is_read_as_pairs(tmp_path: Path) -> None:
    content = arrays()
    read = read_preferences(write(tmp_path / "pairs.npz", content))
    assert read.segments.observations.shape == (PAIRS, 2, STEPS, OBSERVATIONS)
    assert read.segments.actions.shape == (PAIRS, 2, STEPS, ACTIONS)
    for side in (0, 1):
        np.testing.assert_array_equal(read.segments.observations[:, side], content[f"obs_{side + 1}"])
        np.testing.assert_array_equal(read.segments.actions[:, side], content[f"action_{side + 1}"])
    np.testing.assert_array_equal(read.labels, LABELS)


def test_whole_numbers_are_labels_too(tmp_path: Path) -> None:
    read = read_preferences(str(write(tmp_path / "pairs.npz", arrays(label=np.array([0, 1, 1, 0])))))
    np.testing.assert_array_equal(read.labels, [0.0, 1.0, 1.0, 0.0])
    assert np.issubdtype(read.labels.dtype, np.floating)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs_2": np.zeros((PAIRS, STEPS + 1, OBSERVATIONS))}, r"obs_1 and obs_2 in .*\(4, 3, 5\) and \(4, 4, 5\)"),
        ({"action_1": np.zeros((PAIRS, STEPS))}, r"action_1 and action_2 in .*\(4, 3\) and \(4, 3, 2\)"),
        (
            {f"action_{side}": np.zeros((PAIRS, STEPS - 1, ACTIONS)) for side in (1, 2)},
            r"disagree on pairs or steps: observations \(4, 3\), actions \(4, 2\) and labels \(4,\)",
        ),
        ({"label": LABELS[:3]}, r"disagree on pairs or steps: .*labels \(3,\)"),
        ({"label": np.eye(2)[[0, 1, 1, 0]]}, r"disagree on pairs or steps: .*labels \(4, 2\)"),
        ({"label": np.array([0.0, 1.0, -1.0, 1.0])}, r"label -1 in .* is not in \[0, 1\]"),
        ({"label": np.array([0.0, 1.0, np.nan, 1.0])}, "label in .* does not hold finite numbers alone"),
        ({"label": np.array(["a", "b", "c", "d"])}, "label in .* does not hold finite numbers alone"),
        (
            {"action_2": np.full((PAIRS, STEPS, ACTIONS), -1.5)},
            r"actions in .* reach 1\.5, but agents act in \[-1, 1\]",
        ),
        ({f"obs_{side}": np.zeros((0, STEPS, OBSERVATIONS)) for side in (1, 2)}, r"\(0, 3, 5\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_what_cannot_be_pairs_is_said(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    path = write(tmp_path / "pairs.npz", arrays(**changes))
    with pytest.raises(ValueError, match=message) as error:
        read_preferences(path)
    assert str(path) in str(error.value)


def test_missing_arrays_are_named(tmp_path: Path) -> None:
    content = arrays()
    del content["obs_2"], content["label"]
    with pytest.raises(ValueError, match="lacks obs_2, label; it has obs_1, action_1, action_2"):
        read_preferences(write(tmp_path / "pairs.npz", content))


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="inverse-preference-learning"):
        read_preferences(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("label")
    np.save(tmp_path / "single.npy", LABELS)
    np.savez(tmp_path / "objects.npz", **arrays(label=np.array([0.0, None, 1.0, 1.0], dtype=object)))
    for name in ("text.npz", "single.npy", "objects.npz"):
        with pytest.raises(ValueError, match=rf"{name} is not an archive"):
            read_preferences(tmp_path / name)


def test_repeated_pairs_are_found_in_either_order(tmp_path: Path) -> None:
    read = read_preferences(write(tmp_path / "pairs.npz", arrays()))
    segments = read.segments.replace(
        observations=read.segments.observations.copy(), actions=read.segments.actions.copy()
    )
    segments.observations[1], segments.actions[1] = segments.observations[1, ::-1], segments.actions[1, ::-1]
    segments.actions[2, 1, -1, 0] *= 0.5
    segments.observations[3, 0], segments.actions[3, 0] = segments.observations[0, 0], segments.actions[0, 0]
    others = Preferences(segments, 1 - read.labels)
    np.testing.assert_array_equal(repeated_pairs(read, others), [True, True, False, False])


# The real files

Find = Callable[[str], Path]


def agreement(statistics: np.ndarray, labels: np.ndarray) -> float:
    """Of the decided pairs, the share in which the segment with the greater statistic was preferred."""
    decided = labels != 0.5
    return float(((statistics[:, 1] > statistics[:, 0]) == (labels > 0.5))[decided].mean())


def test_people_prefer_the_faster_walker(human_archive: Find) -> None:
    """Observation 8 of Walker2d is the velocity along x. Read the wrong way round, 20% would agree."""
    pairs = read_preferences(human_archive("walker2d-medium-expert-v2/num100_human_train.npz"))
    assert pairs.segments.observations.shape == (100, 2, 100, 17)
    assert agreement(pairs.segments.observations[..., 8].mean(axis=-1), pairs.labels) > 0.75


def test_the_script_prefers_the_higher_cube(human_archive: Find) -> None:
    """Observations 0 to 2 of Lift are the cube's place; the script rewards lifting it, and no decided label errs."""
    pairs = read_preferences(human_archive("Lift/num100_q50_script_train.npz"))
    assert agreement(pairs.segments.observations[..., -1, 2], pairs.labels) == 1.0


@pytest.mark.parametrize(
    "stem",
    [
        "Can/num100_q50_human",
        "Lift/num100_q50_human",
        "Lift/num100_q50_script",
        "hopper-medium-expert-v2/num100_human",
        "walker2d-medium-expert-v2/num100_human",
    ],
)
def test_the_published_evaluation_pairs_are_the_last_training_pairs(stem: str, human_archive: Find) -> None:
    train, evaluation = (read_preferences(human_archive(f"{stem}_{part}.npz")) for part in ("train", "eval"))
    assert (len(train.labels), len(evaluation.labels)) == (100, 10)
    assert repeated_pairs(evaluation, train).all()
    np.testing.assert_array_equal(evaluation.labels, train.labels[-10:])
    np.testing.assert_array_equal(evaluation.segments.actions, train.segments.actions[-10:])
