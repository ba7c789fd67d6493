"""Environments seen through their camera: the observation is the image, everything else stays as it is.

`envs.make` wraps an environment in a `PixelEnv` where its configuration has `"observe": "pixels"`; what the images show
is a matter of the other arguments, such as the camera. The goal of a task is in the image only if it is drawn.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from envs.env import Action, Env, Image, State


class PixelEnv(Env):
    """`env` with its images in place of its observations, uint8 [H, W, 3]; states are those of `env`.

    Nothing is drawn before the first reset, which fails where the machine has no OpenGL library that `env` needs.
    """

    def __init__(self, env: Env) -> None:
        self._env = env
        self.config = {**env.config, "observe": "pixels"}
        self.image_shape = env.image_shape
        self.action_space = env.action_space
        self.observation_space = gymnasium.spaces.Box(0, 255, env.image_shape, np.uint8)
        self.metadata = env.metadata

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Image, dict[str, Any]]:
        """Starts an episode of `env`.

        Raises:
            ValueError: `env` cannot take the seed.
            RuntimeError: this machine cannot draw.
        """
        _, info = self._env.reset(seed=seed, options=options)
        # What is drawn at random is drawn by `env`; Gymnasium expects to find its stream here.
        self._np_random, self._np_random_seed = self._env.np_random, self._env.np_random_seed
        return self.render(), info

    def step(self, action: Action) -> tuple[Image, float, bool, bool, dict[str, Any]]:
        _, reward, terminated, truncated, info = self._env.step(action)
        return self.render(), float(reward), terminated, truncated, info

    def get_state(self) -> State:
        return self._env.get_state()

    def set_state(self, state: State) -> Image:
        self._env.set_state(state)
        return self.render()

    def render(self) -> Image:
        return np.asarray(self._env.render(), np.uint8)

    def close(self) -> None:
        self._env.close()
