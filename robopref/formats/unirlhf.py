"""Human and scripted labels of D4RL's and robomimic's datasets, published as rows of these datasets with labels.

Yuan et al. 2024, "Uni-RLHF" (arXiv:2402.02423), publish labels in their repository Clean-Offline-RLHF, and Kim et al.
2023, "Preference Transformer" (arXiv:2303.00957), in theirs, in the same layout: a folder for each dataset, with three
pickles and no observations.

    crowdsource_human_labels/<dataset>_human_labels, generated_fake_labels/<dataset>_fake_labels     Uni-RLHF
        human_label_... or fake_label_..., indices_1_..., indices_2_..._num_2000_len_200_<number>.pkl
    human_label/<dataset>                                                                Preference Transformer
        label_human, indices_num100, indices_2_num100 (or ..._num100_q50)

* **Labels** of people are 0, 1 and -1, [N]. `load_queries_with_indices`, in `rlhf/train_reward_model.py` of the one and
  `JaxPref/reward_transform.py` of the other, turns them into (1, 0), (0, 1) and (0.5, 0.5): the probabilities that the
  first and the second segment is preferred. People pressed 1 for the video on the left, which is the first segment, 2
  for the right and 3 for neither, stored as 0, 1 and -1 (`human_label/label_program.ipynb`). Labels of a script are
  such pairs themselves, [N, 2], with the second at 1 where its sum of rewards is greater
  (`fast_track/generate_d4rl_fake_labels.py`). robopref keeps the second of the two: 0, 1, and 0.5 for a tie.
* **Indices** are the rows at which segments begin, **not in the file, but in what `qlearning_dataset` makes of it**: it
  leaves out the last step of every episode that was cut off by time, and the last of the file. Taken as rows of the
  file, they would be one step further off with every such episode: in halfcheetah-medium-v2, whose episodes all have
  1000 steps, 19% of the segments would span two episodes, where none does if they are counted rightly. Of robomimic's
  files the last step of *every* demonstration is left out, and demonstrations are counted in alphabetical order
  (demo_10 before demo_2). The labels belong to D4RL's datasets v2 (Adroit's v1), whose files have timeouts.
* There may be more indices than labels; label i is of the indices i.
* **Lengths** of segments are in the names of most files; elsewhere they are 100.

Some pairs may span two episodes nevertheless, where the authors' idea of an episode's end was another. They are refused
unless the caller says what becomes of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from robopref.episodes import EpisodeDataset
from robopref.formats.arrays import check_actions, read_array
from robopref.queries import Labels, Queries
from robopref.types import EpisodeSource, Preferences, Segments

Counting: TypeAlias = Literal["d4rl", "robomimic"]
"""Which steps the indices count: those of a D4RL file, or of a robomimic file."""

Spanning: TypeAlias = Literal["refuse", "drop", "keep"]
"""What becomes of pairs with a segment that spans two episodes."""

_NAMES = {
    "labels": re.compile(r"(human_label|fake_label|label_human)(_.*)?"),
    "the first indices": re.compile(r"(indices|indices_1)(_(?![12](?:_|$)).*)?"),
    "the second indices": re.compile(r"(indices_2)(_.*)?"),
}
_PEOPLE = {0: 0.0, 1: 1.0, -1: 0.5}


@dataclass(frozen=True, eq=False)
class IndexedLabels:
    """N labelled pairs of segments, given by where these begin in a dataset.

    Attributes:
        starts: the rows at which the first and the second segment of each pair begin, as the authors count them.
        labels: P(the second segment is preferred).
        length: the steps of a segment.
        labeler: who answered: `human` or `script`.
        source: the name of the folder.

    Raises:
        ValueError: the shapes disagree, or a number makes no sense.
    """

    starts: Int[np.ndarray, "N 2"]
    labels: Float[np.ndarray, " N"]
    length: int
    labeler: str = "human"
    source: str = ""

    def __post_init__(self) -> None:
        if self.starts.shape != (len(self.labels), 2) or self.labels.ndim != 1 or not self.labels.size:
            raise ValueError(
                f"indices {list(self.starts.shape)} and labels {list(self.labels.shape)} must be [N, 2] and [N]."
            )
        if self.starts.dtype.kind not in "iu" or (self.starts < 0).any():
            raise ValueError("the rows at which segments begin must be integers from 0.")
        if not ((self.labels >= 0) & (self.labels <= 1)).all():
            raise ValueError("labels must lie in [0, 1]: 1 prefers the second segment, 0 the first, 0.5 neither.")
        if self.length < 1:
            raise ValueError(f"a segment has at least 1 step, not {self.length}.")

    def __len__(self) -> int:
        return len(self.labels)

    def preferences(
        self,
        episodes: EpisodeSource,
        *,
        counting: Counting = "d4rl",
        spanning: Spanning = "refuse",
    ) -> Preferences:
        """The pairs as host arrays: observations [N, 2, T, O], actions [N, 2, T, A], labels [N].

        The dataset is gone through twice, an episode at a time.

        Args:
            episodes: the whole dataset that was labelled, such as `read_d4rl` gives it.
            counting: which of its steps the indices count.
            spanning: what becomes of pairs with a segment that spans two episodes: an error, fewer pairs, or segments
                with a jump in their midst, as the authors learned from them.

        Raises:
            ValueError: it cannot be the dataset that was labelled, pairs span two episodes, or actions leave [-1, 1].
        """
        read = (episodes.episode(index) for index in range(len(episodes)))
        rows = _Rows.of([_End(len(each), each.terminated, each.truncated, each.origin) for each in read], counting)
        chosen = self._chosen(rows, spanning)
        starts, (observations, actions) = self.starts[chosen], self._empty(episodes, len(chosen))
        for episode, begin, end in zip(rows.episodes.tolist(), rows.begins, rows.begins + rows.counts, strict=True):
            shown = np.argwhere((starts < end) & (starts + self.length > begin))
            found = episodes.episode(episode) if shown.size else None
            for pair, side in shown:
                start = starts[pair, side]
                low, high = max(start, begin), min(start + self.length, end)
                into, of = slice(low - start, high - start), slice(low - begin, high - begin)
                assert found is not None
                observations[pair, side, into], actions[pair, side, into] = found.observations[of], found.actions[of]
        check_actions(actions, "actions of the segments")
        labels: Any = self.labels[chosen]
        return Preferences(Segments(observations, actions), labels)

    def queries(
        self,
        dataset: EpisodeDataset,
        *,
        counting: Counting = "d4rl",
        spanning: Literal["refuse", "drop"] = "refuse",
    ) -> tuple[Queries, Labels]:
        """The pairs as queries of a dataset of robopref's own, and their labels, which say where they come from.

        Args:
            dataset: the whole dataset that was labelled, converted.
            counting: which of its steps the indices count.
            spanning: what becomes of pairs with a segment that spans two episodes: an error, or fewer pairs.

        Raises:
            ValueError: it cannot be the dataset that was labelled, or pairs span two episodes.
        """
        ends = zip(dataset.lengths, dataset.terminated, dataset.truncated, dataset.origins, strict=True)
        rows = _Rows.of([_End(int(a), bool(b), bool(c), origin) for a, b, c, origin in ends], counting)
        chosen = self._chosen(rows, spanning)
        places, steps = rows.find(self.starts[chosen])
        labels = Labels(
            values=self.labels[chosen],
            answered=np.ones(len(chosen), bool),
            labeler=self.labeler,
            parameters={"source": self.source, "spanning": spanning},
        )
        return Queries(dataset, rows.episodes[places], steps, self.length), labels

    def _empty(self, episodes: EpisodeSource, count: int) -> tuple[Any, Any]:
        spaces = episodes.observation_space, episodes.action_space
        first, second = (np.empty((count, 2, self.length, *space.shape), space.dtype) for space in spaces)
        return first, second

    def _chosen(self, rows: _Rows, spanning: Spanning) -> Int[np.ndarray, " n"]:
        """The pairs to give; all segments of theirs lie in the dataset."""
        name = self.source or "the labels"
        if spanning not in ("refuse", "drop", "keep"):
            raise ValueError(f"spanning is either 'refuse', 'drop' or 'keep', not {spanning!r}.")
        beyond = np.flatnonzero((self.starts + self.length > rows.total).any(axis=1))
        if beyond.size:
            raise ValueError(
                f"pair {beyond[0]} of {name} begins at rows {self.starts[beyond[0]].tolist()}, but there are"
                f" {rows.total} rows, too few for {self.length} steps from there: this is not the whole dataset that"
                " was labelled."
            )
        if spanning == "keep":
            return np.arange(len(self))
        places, steps = rows.find(self.starts)
        within = (steps + self.length <= rows.counts[places]).all(axis=1)
        if spanning == "refuse" and not within.all():
            raise ValueError(
                f"{np.sum(~within)} of {len(self)} pairs of {name}, such as pair {np.argmin(within)}, have a segment"
                " that spans two episodes; if this is the whole dataset that was labelled, choose with spanning what"
                " becomes of them."
            )
        if not within.any():
            raise ValueError(f"each of the {len(self)} pairs of {name} has a segment that spans two episodes.")
        return np.flatnonzero(within)


def read_labels(folder: str | os.PathLike[str], *, length: int | None = None) -> IndexedLabels:
    """The labels in a folder of either repository; nothing that the pickles in it ask for is run.

    Args:
        folder: with one file of labels and two of indices.
        length: the steps of a segment, where the names of the files do not say it (100 in these).

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it does not have these three files, they do not belong together, or one is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; a folder of labels has one of them and two of indices.")
    (labels, label_name), (first, one), (second, two) = (_find(folder, what) for what in _NAMES)
    if one != two or label_name not in ("", one):
        raise ValueError(
            f"{labels.name}, {first.name} and {second.name} in {folder} do not belong together: their names end"
            " differently."
        )
    said = re.search(r"_(?:len_|q)(\d{1,6})(?!\d)", one)
    if said is None and length is None:
        raise ValueError(
            f"the names of the files in {folder} do not say how long segments are; say it with length, which is 100 for"
            " all such files of Preference Transformer."
        )
    if said is not None and length not in (None, int(said[1])):
        raise ValueError(f"segments of {folder} have {said[1]} steps, as the names of its files say, not {length}.")
    values = _probabilities(labels)
    rows = [read_array(path) for path in (first, second)]
    if any(each.ndim != 1 or each.dtype.kind not in "iu" or len(each) < len(values) for each in rows):
        raise ValueError(
            f"the indices in {folder} must be integers, one for each of {len(values)} labels, not"
            f" {' and '.join(f'{each.dtype} {list(each.shape)}' for each in rows)}."
        )
    starts = np.stack([each[: len(values)].astype(np.int64) for each in rows], axis=1)
    if (starts < 0).any():
        raise ValueError(f"the indices in {folder} must not be negative.")
    who = "script" if labels.name.startswith("fake") else "human"
    return IndexedLabels(starts, values, int(said[1]) if said else int(length or 0), who, folder.name)


def _find(folder: Path, what: str) -> tuple[Path, str]:
    """The one file in a folder that is named like labels or indices, and how its name goes on."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    found = [(folder / name, match) for name in names if (match := _NAMES[what].fullmatch(_stem(name)))]
    if len(found) != 1:
        raise ValueError(
            f"{folder} must have one file of {what}, not {len(found)}; it has {', '.join(names) or 'no files'}."
        )
    return found[0][0], found[0][1][2] or ""


def _stem(name: str) -> str:
    return name.removesuffix(".pkl").removesuffix(".npy")


def _probabilities(path: Path) -> Float[np.ndarray, " N"]:
    """P(the second segment is preferred), from what people or a script answered."""
    answers = read_array(path)
    if answers.ndim == 2 and answers.shape[1] == 2 and len(answers):
        wrong = np.flatnonzero((answers < 0).any(axis=1) | (np.abs(answers.sum(axis=1) - 1) > 1e-6))
        if not wrong.size:
            return answers[:, 1].astype(np.float64)
        raise ValueError(f"label {wrong[0]} in {path}, {answers[wrong[0]].tolist()}, is no pair of probabilities.")
    if answers.ndim != 1 or not len(answers):
        raise ValueError(f"labels in {path} must be [N] or [N, 2], not {list(answers.shape)}.")
    unknown = np.flatnonzero(~np.isin(answers, list(_PEOPLE)))
    if unknown.size:
        raise ValueError(
            f"label {unknown[0]} in {path} is {answers[unknown[0]]:g}, not 0 for the first segment, 1 for the second or"
            " -1 for neither."
        )
    return np.array([_PEOPLE[int(answer)] for answer in answers])


class _End(NamedTuple):
    """How an episode ended, which decides which of its steps are counted."""

    steps: int
    terminated: bool
    truncated: bool
    origin: Mapping[str, str | float]


class _Rows(NamedTuple):
    """The rows that indices count: `counts` of each of the `episodes` one after another, from `begins`."""

    episodes: Int[np.ndarray, " E"]
    begins: Int[np.ndarray, " E"]
    counts: Int[np.ndarray, " E"]

    @classmethod
    def of(cls, ends: Sequence[_End], counting: Counting) -> _Rows:
        if counting == "robomimic":
            nameless = [index for index, end in enumerate(ends) if "demo" not in end.origin]
            if nameless:
                raise ValueError(
                    f"episode {nameless[0]} does not say with its origin which demonstration (demo) of a robomimic file"
                    " it was, so indices cannot be counted as in one."
                )
            order = sorted(range(len(ends)), key=lambda index: str(ends[index].origin["demo"]))
            left_out = np.ones(len(ends), bool)
        elif counting == "d4rl":
            order = list(range(len(ends)))
            left_out = np.array([end.truncated or not end.terminated for end in ends], bool)
            left_out[-1:] = True
        else:
            raise ValueError(f"counting is either 'd4rl' or 'robomimic', not {counting!r}.")
        counts = (np.array([end.steps for end in ends], np.int64) - left_out)[order]
        return cls(np.array(order, np.int64), np.cumsum(counts) - counts, counts)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def find(self, rows: Int[np.ndarray, " *N"]) -> tuple[Int[np.ndarray, " *N"], Int[np.ndarray, " *N"]]:
        """For each row, the place of its episode in `episodes`, and the step of that episode."""
        places = np.searchsorted(np.cumsum(self.counts), rows, side="right")
        return places, rows - self.begins[places]
