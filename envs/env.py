"""What every environment in this folder keeps to.

1. **Gymnasium's API.** `reset` gives `(observation, info)` and `step` gives `(observation, reward, terminated,
   truncated, info)`. Observations are one float64 vector, or one uint8 image [H, W, 3] where the configuration has
   `"observe": "pixels"` (pixels.py), inside `observation_space`; actions are one float32 vector in `action_space`,
   rewards plain floats.
2. **Seeds.** `reset(seed=s)` gives the same first observation, and with the same actions the same trajectory, bit for
   bit: in a new environment, in a used one, and in another process. `reset()` goes on with the environment's own random
   stream. No environment reads or moves a global random stream.
3. **Ends.** `terminated` is a state of the task; the time limit is inside the environment and sets `truncated`.
4. **Infos.** `info` holds plain scalars under the same names after `reset` and after every `step`; where the task has
   success, `info["success"]` is a bool about the state just reached.
5. **States.** `get_state` gives everything that the future depends on as one float64 vector, whose length is constant
   for a configuration; `set_state` continues from it bit for bit, also in another instance and another process.
6. **Images.** `render()` gives uint8 [H, W, 3], upright, of `image_shape`. On one machine, equal states give equal
   images, so rules 2 and 5 hold for images that are observations.
7. **Configuration.** `config` holds the JSON values from which `envs.make` builds an equal environment.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

Observation = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]
Action = npt.NDArray[np.float32]
State = npt.NDArray[np.float64]

LARGEST_SEED = 2**53 - 1
"""Simulators whose states hold a seed keep it as float64."""


class Env(gymnasium.Env[Any, Any], abc.ABC):
    """A simulated task that can be rebuilt from its `config` and put back exactly where it was.

    Attributes:
        config: the environment's `name` and arguments, as JSON values; what `EpisodeDataset.env` keeps.
        image_shape: of what `render` gives, (H, W, 3); known without drawing.
    """

    render_mode = "rgb_array"
    config: Mapping[str, Any]
    image_shape: tuple[int, int, int]
    observation_space: gymnasium.spaces.Box[Any]
    action_space: gymnasium.spaces.Box[Any]

    def draw_seed(self, seed: int | None) -> int:
        """The seed of the episode that `reset` is to begin; without one, drawn from the environment's own stream.

        Raises:
            ValueError: the seed is negative or above `LARGEST_SEED`.
        """
        if seed is None:
            return int(self.np_random.integers(LARGEST_SEED + 1))
        check_seed(seed)
        gymnasium.Env.reset(self, seed=int(seed))
        return int(seed)

    @abc.abstractmethod
    def get_state(self) -> State:
        """All that the future depends on, [S]."""

    @abc.abstractmethod
    def set_state(self, state: State) -> Observation | Image:
        """Puts the environment into `state` and returns the observation there, [O] or [H, W, 3].

        Raises:
            ValueError: `state` is not a state of this environment.
        """


def check_seed(seed: int) -> None:
    """Raises ValueError unless `seed` can be kept in a state."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"the seed {seed} is not between 0 and {LARGEST_SEED}.")


def check_action(action: npt.ArrayLike, space: gymnasium.spaces.Box[Any]) -> Action:
    """`action` as float32, clipped to `space`.

    Raises:
        ValueError: it has another shape than the space, or a value that is not finite.
    """
    checked = np.asarray(action, dtype=np.float32)
    if checked.shape != space.shape:
        raise ValueError(f"an action of shape {checked.shape} was given where {space.shape} is needed.")
    if not np.isfinite(checked).all():
        raise ValueError(f"the action {checked.tolist()} is not finite; check the policy that gave it.")
    clipped: Action = np.minimum(np.maximum(checked, space.low), space.high)
    return clipped
