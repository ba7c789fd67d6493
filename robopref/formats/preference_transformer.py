"""Human preference labels as published for Preference Transformer and Inverse Preference Learning.

People compared pairs of segments of D4RL and robomimic tasks for Kim et al. 2023, "Preference Transformer"
(arXiv:2303.00957). Hejna and Sadigh 2023, "Inverse Preference Learning" (arXiv:2305.15363), redistribute them as NumPy
archives under `datasets/preference_transformer` of their repository (MIT licence), which is what this reads:

    obs_1, obs_2        [N, T, O]
    action_1, action_2  [N, T, A], in [-1, 1]
    label               [N]: 1 where the second segment was preferred, 0 the first, 0.5 neither

which is robopref's label convention as it stands; the tests confirm it where the right answer is beyond dispute.

In all of these archives, the ten pairs of `*_eval.npz` are the last ten of the hundred in `*_train.npz`, labels
included: a model that learned from the latter has seen the former. `repeated_pairs` finds such pairs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from robopref.formats.arrays import check_actions, read_npz
from robopref.types import Preferences, Segments

_KEYS = ("obs_1", "obs_2", "action_1", "action_2", "label")
_SOURCE = "datasets/preference_transformer of the inverse-preference-learning repository"


def read_preferences(path: str | os.PathLike[str]) -> Preferences:
    """The labelled pairs of an archive as host arrays: observations [N, 2, T, O], actions [N, 2, T, A], labels [N].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such archive, or what it holds cannot be pairs of segments with preferences.
    """
    arrays = _load(Path(path))
    observations, actions = (_pairs(path, arrays, name) for name in ("obs", "action"))
    labels = arrays["label"]
    if actions.shape[:3] != observations.shape[:3] or labels.shape != observations.shape[:1]:
        raise ValueError(
            f"the arrays in {path} disagree on pairs or steps: observations {observations.shape[::2]}, actions"
            f" {actions.shape[::2]} and labels {labels.shape}, as [pairs, steps], [pairs, steps] and [pairs]."
        )
    outside = labels[~((labels >= 0) & (labels <= 1))]
    if len(outside):
        raise ValueError(
            f"label {outside[0]:g} in {path} is not in [0, 1]: 1 says that the second segment was preferred, 0 the"
            " first, 0.5 neither; convert the labels."
        )
    check_actions(actions, f"actions in {path}")
    return Preferences(Segments(observations, actions), labels)


def repeated_pairs(preferences: Preferences, others: Preferences) -> Bool[np.ndarray, " N"]:
    """Which of the pairs are also among the others, in either order, whatever their labels."""
    known = {_content(others, index, order) for index in range(len(others.labels)) for order in (1, -1)}
    return np.array([_content(preferences, index, 1) in known for index in range(len(preferences.labels))], bool)


def _content(preferences: Preferences, index: int, order: int) -> bytes:
    segments = preferences.segments
    return b"".join(np.asarray(part[index, ::order]).tobytes() for part in (segments.observations, segments.actions))


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; such archives are in {_SOURCE}.")
    arrays, names = read_npz(path, _KEYS)
    missing = [key for key in _KEYS if key not in names]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it has {', '.join(names) or 'no arrays'}.")
    return {
        key: array if np.issubdtype(array.dtype, np.floating) else array.astype(float) for key, array in arrays.items()
    }


def _pairs(path: str | os.PathLike[str], arrays: dict[str, Any], name: str) -> Any:
    """[N, 2, T, ...] from the arrays of the first and of the second segments."""
    first, second = arrays[f"{name}_1"], arrays[f"{name}_2"]
    if first.ndim != 3 or first.shape != second.shape or not first.size:
        raise ValueError(
            f"{name}_1 and {name}_2 in {path} must have the same shape, [pairs, steps, dimensions], not {first.shape}"
            f" and {second.shape}."
        )
    return np.stack([first, second], axis=1)
