"""The datasets of Contrastive Preference Learning: segments with scores, from which preferences are made.

Hejna et al. 2023, "Contrastive Preference Learning" (arXiv:2310.13639), publish archives (.npz) of segments of
MetaWorld's tasks, with what a converged SAC agent thinks of each (their `scripts/add_pref_labels.py`):

    obs [N, T, O], action [N, T, A], reward [N, T]
    rl_sum [N]      sum of all rewards but the last, plus V(last state) - V(first state); what their results are for
    rl_dir [N]      sum of Q(s, a) - V(s); rl_dis_dir with discounts
    rl_dis_sum [N]  rl_sum with discounts, whose rewards however are summed over a whole batch
    rl_l2 [N]       squared distance from the agent's actions

There are no labels in them: `research/datasets/feedback_buffer.py` compares the scores of two segments while it loads
them. Its label is 1 where that of the first is less than that of the second, 0.5 where both are equal, and 0 otherwise:
**the greater score is preferred**, whichever score it is, and 1 stands for the second, as in robopref. (So rl_l2 would
prefer what the agent would *not* do. rl_sum mixes a discounted V with undiscounted rewards, and is no regret.)

Which segments are compared there: in its mode `comparison` (the sparse data), segment i with segment i + n of the first
2 n; in the modes `rank` and `score` (the dense data), any of the first n with any other. `read_preferences` gives the
former, and `ScoredSegments.compare` any pairs.

The same loader takes archives of labelled pairs (obs_1, obs_2, action_1, action_2, label), which it turns into scores
1 - label and label, so that a label of 1 prefers the second there as well. `read_preferences` reads them too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from robopref.formats import preference_transformer
from robopref.formats.arrays import MAX_BYTES, check_actions, read_npz
from robopref.formats.hdf5 import floating
from robopref.types import Preferences, Segments

_KEYS = ("obs", "action", "reward")
_PAIRED = "action_1"


@dataclass(frozen=True, eq=False)
class ScoredSegments:
    """N segments of T steps, with the score of each.

    Attributes:
        segments: host arrays, observations [N, T, O] and actions [N, T, A].
        rewards: of their steps, in the unit of the file.
        scores: the greater is preferred.
    """

    segments: Segments
    rewards: Float[np.ndarray, "N T"]
    scores: Float[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.scores)

    def compare(self, pairs: Int[np.ndarray, "M 2"]) -> Preferences:
        """What the scores say of pairs of segments; each pair takes the memory of two segments.

        Raises:
            ValueError: they are no pairs of segments; names the first by its index.
        """
        pairs = np.asarray(pairs)
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
            raise ValueError(f"pairs of segments must be integers [M, 2], not {pairs.dtype} {list(pairs.shape)}.")
        outside = np.flatnonzero(((pairs < 0) | (pairs >= len(self))).any(axis=1))
        if outside.size:
            index = int(outside[0])
            raise ValueError(f"pair {index}, {pairs[index].tolist()}, is not of segments 0 to {len(self) - 1}.")
        first, second = self.scores[pairs].T
        segments = Segments(self.segments.observations[pairs], self.segments.actions[pairs])
        labels: Any = np.where(first == second, 0.5, first < second)
        return Preferences(segments, labels)


def read_segments(path: str | os.PathLike[str], *, score: str = "rl_sum", max_bytes: int = MAX_BYTES) -> ScoredSegments:
    """The segments of an archive, with one of its scores.

    Args:
        path: the archive.
        score: the name of the score.
        max_bytes: the most that one array may take.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such archive, is damaged, has no such score, or what it holds cannot be scored segments.
    """
    arrays, names = read_npz(path, [*_KEYS, score], max_bytes=max_bytes)
    missing = [key for key in (*_KEYS, score) if key not in arrays]
    if missing:
        advice = ""
        if _PAIRED in names:
            advice = " It has pairs, not segments: read it with read_preferences."
        elif missing == [score]:
            advice = " Scores are added by add_pref_labels.py of the repository cpl."
        raise ValueError(f"{path} lacks {', '.join(missing)}; it has {', '.join(names) or 'no arrays'}.{advice}")
    observations, actions, rewards, scores = (arrays[key] for key in (*_KEYS, score))
    if observations.ndim > 3:
        raise ValueError(f"obs in {path} are images, {list(observations.shape)}; only vectors [N, T, O] are read.")
    steps = actions.shape[:2]
    fits = observations.ndim == actions.ndim == 3 and observations.shape[:2] == rewards.shape == steps
    if not fits or scores.shape != steps[:1] or not actions.size:
        raise ValueError(
            f"the arrays in {path} disagree on segments or steps: obs {list(observations.shape)}, action"
            f" {list(actions.shape)}, reward {list(rewards.shape)} and {score} {list(scores.shape)}, which should be"
            " [N, T, O], [N, T, A], [N, T] and [N]."
        )
    check_actions(actions, f"actions in {path}")
    return ScoredSegments(Segments(floating(observations), floating(actions)), floating(rewards), floating(scores))  # type: ignore[arg-type]


def read_preferences(
    path: str | os.PathLike[str], *, score: str = "rl_sum", count: int | None = None, max_bytes: int = MAX_BYTES
) -> Preferences:
    """The sparse comparisons of an archive as host arrays: observations [N, 2, T, O], actions [N, 2, T, A], labels [N].

    Args:
        path: the archive, of scored segments or of labelled pairs.
        score: what segments are compared by; archives of pairs have labels instead.
        count: how many pairs N: of the first 2 N segments, i is compared with i + N. All by default.
        max_bytes: the most that one array may take.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as of `read_segments`, or there are fewer pairs.
    """
    _, names = read_npz(path, [])
    if _PAIRED in names:
        pairs = preference_transformer.read_preferences(path)
        number = _number(path, len(pairs.labels), count)
        segments = Segments(pairs.segments.observations[:number], pairs.segments.actions[:number])
        return Preferences(segments, pairs.labels[:number])
    scored = read_segments(path, score=score, max_bytes=max_bytes)
    number = _number(path, len(scored) // 2, count)
    return scored.compare(np.arange(2 * number).reshape(2, number).T)


def _number(path: str | os.PathLike[str], available: int, count: int | None) -> int:
    number = available if count is None else count
    if not 1 <= number <= available:
        raise ValueError(f"{path} has {available} pairs to compare, so there are no {number}; choose from 1.")
    return number
