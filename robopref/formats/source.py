"""What readers of foreign episodes have in common: they give them one at a time, so a file may be larger than memory."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import gymnasium
import numpy as np
from jaxtyping import Int, UInt8

from robopref.types import Episode


class EpisodeSource(Protocol):
    """Episodes of a foreign dataset. It holds files open: use it as a context manager.

    Where a format keeps no observation after the last action, that of the last step stands in for it, and the
    episode's origin says `final_observation: "repeated"`.

    Attributes:
        observation_space: a flat Box: the vectors of the dataset, joined in the order of `keys`.
        action_space: a flat Box.
        keys: names of the parts of an observation, with the size of each, in their order.
        env: how the environment was made, as the file says it; empty if it does not.
        description: free text.
        splits: named subsets, as indices of episodes in ascending order.
        cameras: names of images, with their [height, width, channels].
    """

    observation_space: gymnasium.spaces.Box
    action_space: gymnasium.spaces.Box
    keys: Mapping[str, int]
    env: Mapping[str, Any]
    description: str
    splits: Mapping[str, Int[np.ndarray, " n"]]
    cameras: Mapping[str, tuple[int, int, int]]

    def __len__(self) -> int: ...

    def episode(self, index: int) -> Episode:
        """Episode `index`, without images.

        Raises:
            IndexError: there is no such episode.
            ValueError: the file is damaged there; the message names file and episode.
        """
        ...

    def frames(self, index: int, camera: str) -> UInt8[np.ndarray, "T+1 H W C"]:
        """What a camera saw during an episode; the last frame is repeated like the last observation.

        Raises:
            IndexError: there is no such episode.
            ValueError: there is no such camera, or the file is damaged there.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
