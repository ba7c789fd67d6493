"""Environments seen through their camera, against the environments themselves; drawing needs no library here."""

from __future__ import annotations

import json
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from agents.bc import BCAgent, BCConfig
from envs.env import Env
from envs.pixels import PixelEnv
from robopref.agent import AgentPolicy
from robopref.networks import Pixels
from robopref.rendering import no_backend_message, use_rendering_backend
from robopref.rollouts import RolloutWorkers
from robopref.types import Transitions

SIZE = 9


class Dot(Env):
    """A bright pixel that moves along both axes and is drawn; solved in the last row."""

    def __init__(self, horizon: int = 6) -> None:
        self.config = {"name": "dot", "horizon": horizon}
        self.image_shape = (SIZE, SIZE + 2, 3)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = gymnasium.spaces.Box(0.0, SIZE, (2,), np.float64)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
        self._horizon, self._place, self._steps = horizon, np.zeros(2), 0
        self.closed = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._place, self._steps = self.np_random.integers(0, SIZE, 2).astype(float), 0
        return self._place.copy(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._place = np.clip(self._place + np.sign(action), 0, SIZE - 1)
        self._steps += 1
        return self._place.copy(), float(self._place.sum()), False, self._steps >= self._horizon, self._info()

    def get_state(self) -> Any:
        return np.append(self._place, float(self._steps))

    def set_state(self, state: Any) -> Any:
        self._place, self._steps = state[:2].copy(), int(state[2])
        return self._place.copy()

    def render(self) -> Any:
        image = np.zeros(self.image_shape, np.uint8)
        image[int(self._place[0]), int(self._place[1])] = 255
        return image

    def close(self) -> None:
        self.closed = True

    def _info(self) -> dict[str, Any]:
        return {"success": bool(self._place[0] == SIZE - 1)}


def make_dot() -> PixelEnv:
    return PixelEnv(Dot())


def random_actions(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, 2)).astype(np.float32)


def test_all_but_the_observations_is_as_before() -> None:
    plain, seen = Dot(), make_dot()
    (_, info), (image, seen_info) = (env.reset(seed=3) for env in (plain, seen))
    assert info == seen_info
    np.testing.assert_array_equal(image, plain.render())
    for action in random_actions(6):
        (_, *rest), (image, *seen_rest) = plain.step(action), seen.step(action)
        assert rest == seen_rest
        np.testing.assert_array_equal(image, plain.render())
        np.testing.assert_array_equal(seen.render(), image)
        np.testing.assert_array_equal(seen.get_state(), plain.get_state())
        assert seen.observation_space.contains(image)
    assert seen.observation_space.shape == seen.image_shape == image.shape == (SIZE, SIZE + 2, 3)
    assert seen.observation_space.dtype == np.uint8
    assert seen.action_space == plain.action_space


def test_a_state_shows_its_image() -> None:
    seen, other = make_dot(), make_dot()
    seen.reset(seed=1)
    image = seen.step(random_actions(1)[0])[0]
    other.reset(seed=2)
    np.testing.assert_array_equal(other.set_state(seen.get_state()), image)
    np.testing.assert_array_equal(other.get_state(), seen.get_state())


def test_resets_without_a_seed_follow_the_environments_own_stream() -> None:
    plain, seen = Dot(), make_dot()
    for seed in (4, None, None):
        plain.reset(seed=seed)
        np.testing.assert_array_equal(seen.reset(seed=seed)[0], plain.render())


def test_closing_closes_what_is_inside() -> None:
    inside = Dot()
    PixelEnv(inside).close()
    assert inside.closed


def agent() -> BCAgent:
    images = jnp.zeros((2, SIZE, SIZE + 2, 3))
    example = Transitions(images, jnp.zeros((2, 2)), jnp.zeros(2), images, jnp.zeros(2, bool))
    config = BCConfig(hidden_dims=(8,), pixels=Pixels(filters=2, strides=(2,), features=4))
    return BCAgent.create(config, example, jax.random.key(0))


def test_an_agent_acts_on_what_it_sees() -> None:
    policy = AgentPolicy(agent())
    with RolloutWorkers(make_dot, lanes=2) as workers:
        episodes = workers.run(policy, range(3), keep_states=True)
    for seed, episode in enumerate(episodes):
        assert episode.observations.shape == (7, SIZE, SIZE + 2, 3)
        assert episode.observations.dtype == np.uint8
        np.testing.assert_array_equal(episode.observations[0], make_dot().reset(seed=seed)[0])
        actions = policy.agent.act(jnp.asarray(episode.observations[:-1]))
        np.testing.assert_allclose(episode.actions, actions, rtol=1e-4, atol=1e-5)
        assert episode.states is not None
        for state, image in zip(episode.states, episode.observations, strict=True):
            np.testing.assert_array_equal(make_dot().set_state(state), image)
    assert len({episode.actions.tobytes() for episode in episodes}) > 1


def test_a_configuration_asks_for_pixels() -> None:
    from envs.metaworld import CPL_VIEW

    config = {"name": "metaworld/door-open-v3", "horizon": 9, "observe": "pixels", **CPL_VIEW}
    env = envs.make(config)
    assert isinstance(env, PixelEnv)
    assert env.config == config == json.loads(json.dumps(env.config))
    assert envs.make(env.config).config == config
    assert env.observation_space == gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)


@pytest.mark.parametrize("observe", ["pixel", "vector", True])
def test_what_cannot_be_observed_is_named(observe: Any) -> None:
    with pytest.raises(ValueError, match=rf"cannot observe {observe!r}; say \"pixels\", or nothing"):
        envs.make({"name": "metaworld/door-open-v3", "observe": observe})


def make_door() -> Env:
    return envs.make({"name": "metaworld/door-open-v3", "horizon": 3, "image_size": 16, "observe": "pixels"})


def test_rollouts_see_the_same_in_another_process() -> None:
    if use_rendering_backend() is None:
        pytest.skip(no_backend_message())
    from envs.behaviours import Random

    episodes = []
    for processes in (0, 1):
        with RolloutWorkers(make_door, processes=processes, lanes=2) as workers:
            episodes.append(workers.run(Random(), [7], keep_states=True)[0])
    here, there = episodes
    assert here.observations.shape == (4, 16, 16, 3)
    assert not np.array_equal(here.observations[0], here.observations[-1])
    np.testing.assert_array_equal(here.observations, there.observations)
    np.testing.assert_array_equal(here.states, there.states)
