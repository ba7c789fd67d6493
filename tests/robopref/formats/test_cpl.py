"""The reader of Contrastive Preference Learning's datasets, from archives laid out as its scripts write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robopref.formats.cpl import read_preferences, read_segments

SEGMENTS, STEPS, OBSERVATIONS, ACTIONS = 7, 3, 5, 2
SCORES = np.array([1.0, 4.0, 2.0, 4.0, 3.0, 0.0, 9.0], "f4")


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    """What create_comparison_dataset.py and add_pref_labels.py leave, all in single precision."""
    rng = np.random.default_rng(0)
    made = {
        "obs": rng.normal(size=(SEGMENTS, STEPS, OBSERVATIONS)).astype("f4"),
        "action": rng.uniform(-1, 1, (SEGMENTS, STEPS, ACTIONS)).astype("f4"),
        "reward": rng.normal(size=(SEGMENTS, STEPS)).astype("f4"),
        "state": rng.normal(size=(SEGMENTS, STEPS, 4)).astype("f4"),
        "rl_sum": SCORES,
        "rl_dir": -SCORES,
        "rl_lp": rng.normal(size=(SEGMENTS, STEPS)).astype("f4"),
    }
    return {**made, **changes}


def write(path: Path, content: Mapping[str, np.ndarray]) -> Path:
    np.savez_compressed(path, **content)
    return path


def test_segments_are_read_with_a_score(tmp_path: Path) -> None:
    content = arrays()
    read = read_segments(write(tmp_path / "mw.npz", content), score="rl_dir")
    assert len(read) == SEGMENTS
    for found, name in (
        (read.segments.observations, "obs"),
        (read.segments.actions, "action"),
        (read.rewards, "reward"),
        (read.scores, "rl_dir"),
    ):
        np.testing.assert_array_equal(found, content[name])
        assert found.dtype == np.float32


def authors_label(first: float, second: float) -> float:
    """The rule of research/datasets/feedback_buffer.py in words: 1 where the first scores less, 0.5 where equal."""
    return {True: 1.0, False: 0.0}[first < second] if first != second else 0.5


def test_the_greater_score_is_preferred(tmp_path: Path) -> None:
    """In the sparse comparisons of seven segments, 0 meets 3, 1 meets 4, and 2 meets 5; the last meets none."""
    content = arrays()
    read = read_preferences(write(tmp_path / "mw.npz", content))
    np.testing.assert_array_equal(read.labels, [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(read.labels, [authors_label(SCORES[i], SCORES[i + 3]) for i in range(3)])
    for side, members in enumerate(([0, 1, 2], [3, 4, 5])):
        np.testing.assert_array_equal(read.segments.observations[:, side], content["obs"][members])
        np.testing.assert_array_equal(read.segments.actions[:, side], content["action"][members])


def test_fewer_pairs_are_of_the_first_segments(tmp_path: Path) -> None:
    """Their capacity of two pairs keeps the first four segments: 0 meets 2, and 1 meets 3, which is a tie."""
    content = arrays()
    read = read_preferences(write(tmp_path / "mw.npz", content), count=2)
    np.testing.assert_array_equal(read.labels, [1.0, 0.5])
    np.testing.assert_array_equal(read.segments.observations, content["obs"][[[0, 2], [1, 3]]])


def test_any_segments_can_be_compared(tmp_path: Path) -> None:
    content = arrays()
    scored = read_segments(write(tmp_path / "mw.npz", content))
    pairs = np.stack(np.triu_indices(SEGMENTS, k=1), axis=-1)
    dense = scored.compare(pairs)
    np.testing.assert_array_equal(dense.labels, [authors_label(*SCORES[pair]) for pair in pairs])
    np.testing.assert_array_equal(scored.compare(pairs[:, ::-1]).labels, 1 - dense.labels)
    np.testing.assert_array_equal(dense.segments.actions, content["action"][pairs])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (np.array([[0, 1], [2, 7]]), r"pair 1, \[2, 7\], is not of segments 0 to 6"),
        (np.array([[-1, 1]]), r"pair 0, \[-1, 1\]"),
        (np.array([0, 1]), r"\[M, 2\], not int64 \[2\]"),
        (np.array([[0.0, 1.0]]), "float64"),
    ],
)
def test_what_is_no_pair_is_said(tmp_path: Path, pairs: np.ndarray, message: str) -> None:
    scored = read_segments(write(tmp_path / "mw.npz", arrays()))
    with pytest.raises(ValueError, match=message):
        scored.compare(pairs)


def test_labelled_pairs_prefer_the_second_at_one(tmp_path: Path) -> None:
    """feedback_buffer.py gives first segments the score 1 - label and second ones label, and compares as above."""
    content = arrays()
    labels = np.array([0.0, 1.0, 0.5])
    pairs = {
        f"{name}_{side + 1}": content[name][3 * side : 3 * side + 3] for name in ("obs", "action") for side in (0, 1)
    }
    path = write(tmp_path / "pairs.npz", {**pairs, "label": labels})
    read = read_preferences(path)
    np.testing.assert_array_equal(read.labels, [authors_label(1 - label, label) for label in labels])
    np.testing.assert_array_equal(read.segments.observations[:, 1], content["obs"][3:6])
    fewer = read_preferences(path, count=2)
    np.testing.assert_array_equal(fewer.labels, read.labels[:2])
    np.testing.assert_array_equal(fewer.segments.actions, read.segments.actions[:2])
    with pytest.raises(ValueError, match="has 3 pairs to compare, so there are no 4"):
        read_preferences(path, count=4)
    with pytest.raises(ValueError, match=r"lacks obs, action, reward, rl_sum; .* read it with read_preferences"):
        read_segments(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs": np.zeros((SEGMENTS, STEPS, 8, 8, 3), "u1")}, r"obs in .* are images, \[7, 3, 8, 8, 3\]"),
        ({"obs": np.zeros((SEGMENTS, STEPS + 1, OBSERVATIONS))}, r"disagree on segments or steps: obs \[7, 4, 5\]"),
        ({"reward": np.zeros(SEGMENTS)}, r"reward \[7\]"),
        ({"rl_sum": np.zeros((SEGMENTS, STEPS))}, r"rl_sum \[7, 3\], which should be"),
        ({"rl_sum": np.full(SEGMENTS, np.nan)}, "rl_sum in .* does not hold finite numbers alone"),
        ({"action": np.full((SEGMENTS, STEPS, ACTIONS), 1.5)}, r"actions in .* reach 1\.5, but agents act"),
        (
            {
                "obs": np.zeros((0, STEPS, OBSERVATIONS)),
                "action": np.zeros((0, STEPS, ACTIONS)),
                "reward": np.zeros((0, STEPS)),
                "rl_sum": np.zeros(0),
            },
            r"obs \[0, 3, 5\]",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_what_cannot_be_scored_segments_is_said(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    path = write(tmp_path / "mw.npz", arrays(**changes))
    for read in (read_segments, read_preferences):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)


def test_missing_scores_are_named_with_what_there_is(tmp_path: Path) -> None:
    path = write(tmp_path / "mw.npz", arrays())
    with pytest.raises(ValueError, match=r"lacks rl_regret; it has obs, action, .*rl_sum, rl_dir, rl_lp\. Scores are"):
        read_segments(path, score="rl_regret")
    with pytest.raises(ValueError, match="has 3 pairs to compare, so there are no 0"):
        read_preferences(path, count=0)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_segments(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("rl_sum")
    with pytest.raises(ValueError, match=r"text\.npz is not an archive"):
        read_preferences(tmp_path / "text.npz")
    path = write(tmp_path / "mw.npz", arrays())
    with pytest.raises(ValueError, match=r"obs\.npy takes .* bytes, more than the 100 allowed"):
        read_segments(path, max_bytes=100)


def test_whole_numbers_become_floating(tmp_path: Path) -> None:
    changes = {"reward": np.zeros((SEGMENTS, STEPS), int), "rl_sum": SCORES.astype(int)}
    read = read_segments(write(tmp_path / "mw.npz", arrays(**changes)))
    assert read.rewards.dtype == read.scores.dtype == np.float64
    np.testing.assert_array_equal(read.scores, SCORES)
