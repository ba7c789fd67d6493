"""The reader of indices and labels: files laid out as published, over datasets as D4RL and robomimic make them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robopref.conversion import convert
from robopref.episodes import EpisodeDataset, load_episodes
from robopref.formats import preference_transformer
from robopref.formats.d4rl import read_d4rl
from robopref.formats.robomimic import read_robomimic
from robopref.formats.unirlhf import IndexedLabels, read_labels
from robopref.queries import label_statistics

OBSERVATIONS, ACTIONS, LENGTH = 3, 2, 4
Ends = Sequence[tuple[int, bool, bool]]
ENDS: Ends = (
    (6, False, True),
    (5, True, False),
    (7, True, True),
    (1, False, True),
    (9, False, True),
    (6, False, False),
)
"""Of each episode, the steps, and whether it was terminated and timed out; the last, by the end of the file."""

NAMES = {
    "human": ("human_label{}.pkl", "indices_1{}.pkl", "indices_2{}.pkl", "_domain_mujoco_env_x-v2_num_3_len_4_0f3a"),
    "script": ("fake_label{}.pkl", "indices_1{}.pkl", "indices_2{}.pkl", "_domain_mujoco_env_x-v2_num_3_len_4_0f3a"),
    "preference transformer": ("label_human", "indices{}", "indices_2{}", "_num3_q4"),
}


def folder_of(place: Path, answers: Any, first: Any, second: Any, names: str = "human") -> Path:
    """The three pickles; indices as NumPy arrays of 32 bits, as they are in both repositories."""
    folder = place / "x-v2_labels"
    folder.mkdir()
    *files, ending = NAMES[names]
    for name, content in zip(files, (answers, np.array(first, "i4"), np.array(second, "i4")), strict=True):
        (folder / name.format(ending)).write_bytes(pickle.dumps(content, 4))
    return folder


def d4rl_file(path: Path, ends: Ends = ENDS) -> tuple[Path, dict[str, np.ndarray]]:
    """A file of D4RL's second version, and its arrays; rewards grow with the row."""
    rng = np.random.default_rng(0)
    last = np.cumsum([steps for steps, _, _ in ends]) - 1
    rows = int(last[-1]) + 1
    arrays = {
        "observations": rng.normal(size=(rows, OBSERVATIONS)).astype("f4"),
        "actions": rng.uniform(-1, 1, (rows, ACTIONS)).astype("f4"),
        "rewards": np.arange(rows, dtype="f4"),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.zeros(rows, bool),
    }
    for row, (_, terminated, timed_out) in zip(last, ends, strict=True):
        arrays["terminals"][row], arrays["timeouts"][row] = terminated, timed_out
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path, arrays


def counted_by_authors(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The rows of the file that d4rl.qlearning_dataset keeps: all but the last that did not time out."""
    return np.flatnonzero(~arrays["timeouts"][:-1])


def converted(path: Path) -> EpisodeDataset:
    with read_d4rl(path) as source:
        convert(source, path.parent / "converted", "robopref")
    return load_episodes(path.parent / "converted")


# Labels


def test_the_right_video_is_the_second_segment(tmp_path: Path) -> None:
    """label_program.ipynb: keys 1 (left), 2 (right) and 3 (equal) are kept as 0, 1 and -1; left comes first."""
    kept_for_key = {"left": 0, "right": 1, "equal": -1}
    answers = [kept_for_key[key] for key in ("right", "left", "equal")]
    read = read_labels(folder_of(tmp_path, answers, [5, 6, 7], [8, 9, 10], "preference transformer"))
    np.testing.assert_array_equal(read.labels, [1.0, 0.0, 0.5])
    np.testing.assert_array_equal(read.starts, [[5, 8], [6, 9], [7, 10]])
    assert (len(read), read.length, read.labeler, read.source) == (3, 4, "human", "x-v2_labels")


def test_crowds_answer_like_people(tmp_path: Path) -> None:
    read = read_labels(folder_of(tmp_path, np.array([1, 0, -1]), [5, 6, 7], [8, 9, 10]))
    np.testing.assert_array_equal(read.labels, [1.0, 0.0, 0.5])
    assert (read.length, read.labeler) == (4, "human")


def test_the_script_prefers_the_greater_return(tmp_path: Path) -> None:
    """generate_d4rl_fake_labels.py: where the first sum is less, column 1 of two is 1; equal sums are (0.5, 0.5)."""
    path, arrays = d4rl_file(tmp_path / "x-v2.hdf5")
    counted = counted_by_authors(arrays)
    starts = np.array([[0, 16], [17, 1], [5, 5]])
    sums = arrays["rewards"][counted[starts[..., None] + np.arange(LENGTH)]].sum(axis=-1)
    answers = np.zeros((3, 2))
    answers[np.arange(3), (sums[:, 0] < sums[:, 1]).astype(int)] = 1
    answers[sums[:, 0] == sums[:, 1]] = 0.5
    labels = read_labels(folder_of(tmp_path, answers, *starts.T, "script"))
    np.testing.assert_array_equal(labels.labels, [1.0, 0.0, 0.5])
    assert labels.labeler == "script"
    queries, given_labels = labels.queries(converted(path))
    np.testing.assert_array_equal(queries.partial_returns, sums)
    assert label_statistics(queries, given_labels)["partial_return_agreement"] == 1.0


# What people answered about a hundred pairs of each dataset: < for the first segment, > for the second, = for neither;
# from human_label/<dataset>/label_human of Preference Transformer's repository.
ANSWERS = {
    "walker2d-medium-expert-v2": (
        "==>>>>><>>>><<==><>>=><>><<<<><=>><<>>><<<<=<<<<=>><<=>=>=<>>>>=>>>>>>>>>>=<>===><>><<=><=<==<==>=>="
    ),
    "hopper-medium-expert-v2": (
        "=<>==>>><=<=>==>=<<<<<>>>=<>=>>==>>>><<=<<=<=<=<<=<<<====>=<=>>><>><<=>>>>>>>=<=>><=><>>><<><<<>>>>="
    ),
}


@pytest.mark.parametrize("dataset", ANSWERS)
def test_the_pickles_agree_with_the_archives_of_the_same_labels(
    tmp_path: Path, dataset: str, human_archive: Callable[[str], Path]
) -> None:
    """Where the archives are, whose direction the speed of the walkers confirms, these labels are the same."""
    answers = [{"<": 0, ">": 1, "=": -1}[each] for each in ANSWERS[dataset]]
    read = read_labels(folder_of(tmp_path, answers, range(500), range(500), "preference transformer"))
    archive = human_archive(f"{dataset}/num100_human_train.npz")
    np.testing.assert_array_equal(read.labels, preference_transformer.read_preferences(archive).labels)


def test_indices_beyond_the_labels_are_left(tmp_path: Path) -> None:
    read = read_labels(folder_of(tmp_path, [1, 0], range(10), range(20, 30), "preference transformer"))
    np.testing.assert_array_equal(read.starts, [[0, 20], [1, 21]])


def test_the_length_is_said_by_names_or_by_the_caller(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [1, 0, 1], [1, 2, 3], [4, 5, 6], "preference transformer")
    for name in ("indices", "indices_2"):
        (folder / f"{name}_num3_q4").rename(folder / f"{name}_num3")
    with pytest.raises(ValueError, match="do not say how long segments are; say it with length, which is 100"):
        read_labels(folder)
    assert read_labels(folder, length=100).length == 100


def test_arrays_of_numpy_may_take_the_place_of_pickles(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [1, 0, 1], [1, 2, 3], [4, 5, 6])
    expected = read_labels(folder)
    for path in sorted(folder.iterdir()):
        np.save(path.with_suffix(".npy"), pickle.loads(path.read_bytes()))
        path.unlink()
    np.testing.assert_array_equal(read_labels(folder).starts, expected.starts)
    np.testing.assert_array_equal(read_labels(folder).labels, expected.labels)


class Calls:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("which", range(3))
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, which: int) -> None:
    folder = folder_of(tmp_path, [1, 0, 1], [1, 2, 3], [4, 5, 6])
    path, trace = sorted(folder.iterdir())[which], tmp_path / "trace"
    path.write_bytes(pickle.dumps([1, Calls(trace)]))
    with pytest.raises(ValueError, match=r"it asks for posix\.mkdir, which no array needs.* save the array with numpy"):
        read_labels(folder)
    assert not trace.exists()


def rename(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name.startswith(old):
                path.rename(folder / path.name.replace(old, new))

    return change


def put(start: str, content: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name.startswith(start):
                path.write_bytes(pickle.dumps(content, 4))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename("human_label", "label"), "must have one file of labels, not 0; it has indices_1"),
        (rename("indices_1", "indices_2_num_3"), "must have one file of the first indices, not 0"),
        (lambda folder: (folder / "fake_label.pkl").touch(), "must have one file of labels, not 2"),
        (rename("indices_2_domain", "indices_2_field"), "do not belong together"),
        (put("human", [0, 1, 2]), r"label 2 in .* is 2, not 0 for the first segment, 1 for the second or -1"),
        (put("human", [0, 0.5, 1]), r"label 1 in .* is 0\.5"),
        (put("human", np.array([[0.5, 0.6]])), r"label 0 in .*, \[0\.5, 0\.6\], is no pair of probabilities"),
        (put("human", np.array([[-1.0, 2.0]])), "is no pair of probabilities"),
        (put("human", np.zeros((3, 3))), r"must be \[N\] or \[N, 2\], not \[3, 3\]"),
        (put("human", []), r"must be \[N\] or \[N, 2\], not \[0\]"),
        (put("indices_1", np.arange(2)), r"one for each of 3 labels, not int64 \[2\] and int32 \[3\]"),
        (put("indices_1", np.arange(3.0)), "must be integers"),
        (put("indices_2", np.array([3, -1, 0])), "must not be negative"),
        (put("indices_2", {"a": 1}), "EMPTY_DICT"),
    ],
)
def test_folders_that_are_not_such_are_refused(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    folder = folder_of(tmp_path, [1, 0, 1], [1, 2, 3], [4, 5, 6])
    change(folder)
    with pytest.raises(ValueError, match=message) as error:
        read_labels(folder)
    assert str(folder) in str(error.value)


def test_a_length_that_contradicts_the_names_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [1, 0, 1], [1, 2, 3], [4, 5, 6])
    assert read_labels(folder, length=4).length == 4
    with pytest.raises(ValueError, match="have 4 steps, as the names of its files say, not 5"):
        read_labels(folder, length=5)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_labels(tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"starts": np.zeros((3, 2), int)}, r"indices \[3, 2\] and labels \[2\]"),
        ({"starts": np.zeros((2, 2))}, "must be integers from 0"),
        ({"starts": np.array([[0, 1], [-1, 0]])}, "must be integers from 0"),
        ({"labels": np.array([0.0, 1.5])}, r"must lie in \[0, 1\]"),
        ({"labels": np.array([0.0, np.nan])}, r"must lie in \[0, 1\]"),
        ({"length": 0}, "at least 1 step, not 0"),
    ],
)
def test_labels_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    made: dict[str, Any] = {"starts": np.array([[0, 1], [2, 3]]), "labels": np.array([0.0, 1.0]), "length": 4}
    with pytest.raises(ValueError, match=message):
        IndexedLabels(**{**made, **changes})


# Segments


@settings(max_examples=25, deadline=None)
@given(
    ends=st.lists(st.tuples(st.integers(1, 8), st.booleans(), st.booleans()), min_size=1, max_size=7).map(
        # Only the end of the file ends an episode that neither ended nor was cut off.
        lambda ends: [(steps, over or not out, out) for steps, over, out in ends[:-1]] + ends[-1:]
    ),
    length=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_rows_are_those_that_the_authors_count(
    tmp_path_factory: pytest.TempPathFactory, ends: Ends, length: int, seed: int
) -> None:
    """Whatever the ends of the episodes, segments are the rows of qlearning_dataset, jumps and all."""
    path, arrays = d4rl_file(tmp_path_factory.mktemp("rows") / "x-v2.hdf5", ends)
    counted = counted_by_authors(arrays)
    highest = len(counted) - length
    if highest < 0:
        return
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, highest + 1, (6, 2))
    labels = IndexedLabels(starts, rng.choice([0.0, 0.5, 1.0], 6), length)
    with read_d4rl(path) as episodes:
        kept = labels.preferences(episodes, spanning="keep")
        rows = counted[starts[..., None] + np.arange(length)]
        np.testing.assert_array_equal(kept.segments.observations, arrays["observations"][rows])
        np.testing.assert_array_equal(kept.segments.actions, arrays["actions"][rows])
        np.testing.assert_array_equal(kept.labels, labels.labels)
        assert kept.segments.observations.dtype == np.float32
        over = np.cumsum([steps for steps, _, _ in ends])
        owner = np.searchsorted(over, rows, side="right")
        whole = (owner[..., 0] == owner[..., -1]).all(axis=1)
        if not whole.any():
            with pytest.raises(ValueError, match="each of the 6 pairs of the labels has a segment that spans"):
                labels.preferences(episodes, spanning="drop")
            return
        dropped = labels.preferences(episodes, spanning="drop")
        np.testing.assert_array_equal(dropped.segments.actions, arrays["actions"][rows[whole]])
        np.testing.assert_array_equal(dropped.labels, labels.labels[whole])


def test_queries_are_of_the_same_segments(tmp_path: Path) -> None:
    path, arrays = d4rl_file(tmp_path / "x-v2.hdf5")
    counted = counted_by_authors(arrays)
    starts = np.stack(np.meshgrid(np.arange(len(counted) - LENGTH + 1), [0, 5, 16]), axis=-1).reshape(-1, 2)
    labels = IndexedLabels(starts, np.arange(len(starts)) % 2 * 1.0, LENGTH, "human", "x-v2_labels")
    dataset = converted(path)
    queries, answers = labels.queries(dataset, spanning="drop")
    with read_d4rl(path) as episodes:
        loose = labels.preferences(episodes, spanning="drop")
    assert 0 < len(queries) < len(starts)
    np.testing.assert_array_equal(queries.observations, loose.segments.observations)
    np.testing.assert_array_equal(queries.actions, loose.segments.actions)
    np.testing.assert_array_equal(np.asarray(answers.values), loose.labels)
    assert queries.dataset is dataset
    assert (answers.labeler, dict(answers.parameters)) == ("human", {"source": "x-v2_labels", "spanning": "drop"})
    assert answers.answered.all()


def test_segments_that_span_two_episodes_are_refused_at_first(tmp_path: Path) -> None:
    """The first episode has six steps, of which five are counted: four from row 1, but none from row 2."""
    path, _ = d4rl_file(tmp_path / "x-v2.hdf5")
    fine = IndexedLabels(np.array([[1, 5]]), np.ones(1), LENGTH)
    spans = IndexedLabels(np.array([[1, 5], [2, 5]]), np.ones(2), LENGTH)
    with read_d4rl(path) as episodes:
        assert len(fine.preferences(episodes).labels) == 1
        with pytest.raises(ValueError, match=r"1 of 2 pairs of the labels, such as pair 1, have a segment that spans"):
            spans.preferences(episodes)
        unknown: Any = "ignore"
        with pytest.raises(ValueError, match="spanning is either"):
            fine.preferences(episodes, spanning=unknown)
        with pytest.raises(ValueError, match="counting is either"):
            fine.preferences(episodes, counting=unknown)
    with pytest.raises(ValueError, match="such as pair 1"):
        spans.queries(converted(path))


@pytest.mark.parametrize("spanning", ["refuse", "drop", "keep"])
def test_a_dataset_that_is_too_small_is_refused(tmp_path: Path, spanning: Literal["refuse", "drop", "keep"]) -> None:
    path, arrays = d4rl_file(tmp_path / "x-v2.hdf5")
    rows = len(counted_by_authors(arrays))
    labels = IndexedLabels(np.array([[0, 1], [0, rows - LENGTH + 1]]), np.ones(2), LENGTH, source="x-v2_labels")
    message = rf"pair 1 of x-v2_labels begins at rows \[0, {rows - 3}\], but there are {rows} rows, too few for 4 steps"
    with read_d4rl(path) as episodes, pytest.raises(ValueError, match=message):
        labels.preferences(episodes, spanning=spanning)


def test_actions_beyond_one_are_refused(tmp_path: Path) -> None:
    path, _ = d4rl_file(tmp_path / "x-v2.hdf5")
    with h5py.File(path, "r+") as file:
        file["actions"][7, 1] = -1.5
    with read_d4rl(path) as episodes, pytest.raises(ValueError, match=r"actions of the segments reach 1\.5"):
        IndexedLabels(np.array([[0, 5]]), np.ones(1), LENGTH).preferences(episodes)


def test_demonstrations_are_counted_in_alphabetical_order_without_their_last_steps(tmp_path: Path) -> None:
    """qlearning_robosuite_dataset goes through the names as HDF5 lists them, demo_10 before demo_2."""
    rng, names = np.random.default_rng(0), [f"demo_{index}" for index in range(12)]
    parts: dict[str, np.ndarray] = {}
    with h5py.File(tmp_path / "low_dim.hdf5", "w") as file:
        for index, name in enumerate(names):
            steps = 5 + index
            group = file.create_group(f"data/{name}")
            group.attrs["num_samples"] = steps
            group["obs/object"] = parts[name] = rng.normal(size=(steps, OBSERVATIONS))
            group["actions"], group["rewards"] = rng.uniform(-1, 1, (steps, ACTIONS)), np.zeros(steps)
            group["dones"] = np.eye(1, steps, steps - 1)[0]
        file["data"].attrs["env_args"] = "{}"
    with h5py.File(tmp_path / "low_dim.hdf5") as file:
        listed = list(file["data"])
    assert listed.index("demo_10") < listed.index("demo_2")
    rows = np.concatenate([parts[name][:-1] for name in listed])
    begins = dict(zip(listed, np.cumsum([0, *(len(parts[name]) - 1 for name in listed)])[:-1], strict=True))
    starts = np.array([[begins["demo_2"], begins["demo_10"] + 3], [begins["demo_11"], begins["demo_9"] + 1]])
    labels = IndexedLabels(starts, np.array([0.0, 1.0]), LENGTH)
    with read_robomimic(tmp_path / "low_dim.hdf5") as episodes:
        read = labels.preferences(episodes, counting="robomimic")
        convert(episodes, tmp_path / "converted", "robopref")
    np.testing.assert_array_equal(read.segments.observations, rows[starts[..., None] + np.arange(LENGTH)])
    np.testing.assert_array_equal(read.segments.observations[0, 0], parts["demo_2"][:LENGTH])
    queries, _ = labels.queries(load_episodes(tmp_path / "converted"), counting="robomimic")
    np.testing.assert_array_equal(queries.observations, read.segments.observations)
    assert queries.episodes.tolist() == [[2, 10], [11, 9]]


def test_episodes_that_were_no_demonstrations_cannot_be_counted_as_such(tmp_path: Path) -> None:
    path, _ = d4rl_file(tmp_path / "x-v2.hdf5")
    with read_d4rl(path) as episodes, pytest.raises(ValueError, match=r"episode 0 does not say .*\(demo\)"):
        IndexedLabels(np.array([[0, 5]]), np.ones(1), LENGTH).preferences(episodes, counting="robomimic")
