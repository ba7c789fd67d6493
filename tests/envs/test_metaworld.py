from __future__ import annotations

import json
import multiprocessing
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from envs import make
from envs.env import LARGEST_SEED
from envs.metaworld import CPL_VIEW, MetaWorldEnv, scripted_policy, tasks
from robopref.rendering import no_backend_message, use_rendering_backend

TASKS = tasks()
pytestmark = pytest.mark.filterwarnings("ignore:Constant")

ACROSS_PROCESSES = ("door-open-v3", "bin-picking-v3", "basketball-v3", "stick-pull-v3")

Step = tuple[npt.NDArray[np.float64], float, bool, bool, dict[str, Any]]


def follow_script(env: MetaWorldEnv, observation: npt.NDArray[np.float64], steps: int) -> list[Step]:
    policy = scripted_policy(env.config["name"].removeprefix("metaworld/"))
    taken: list[Step] = []
    for _ in range(steps):
        step = env.step(np.clip(policy.get_action(observation.copy()), -1, 1))
        observation = step[0]
        taken.append(step)
    return taken


def replay(env: MetaWorldEnv, actions: npt.NDArray[np.float32]) -> list[Step]:
    return [env.step(action) for action in actions]


def assert_same(first: list[Step], second: list[Step]) -> None:
    assert len(first) == len(second)
    for (observation, *rest), (other, *others) in zip(first, second, strict=True):
        np.testing.assert_array_equal(observation, other)
        assert rest == others


def trajectory_elsewhere(task: str, seed: int, steps: int, state: npt.NDArray[np.float64] | None) -> list[Step]:
    env = MetaWorldEnv(task)
    observation = env.reset(seed=seed)[0] if state is None else env.set_state(state)
    return follow_script(env, observation, steps)


@pytest.fixture(scope="module")
def elsewhere() -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield lambda *arguments: pool.apply(trajectory_elsewhere, arguments)


@pytest.fixture(scope="module")
def door() -> MetaWorldEnv:
    return MetaWorldEnv("door-open-v3", horizon=40)


def test_there_are_fifty_tasks() -> None:
    assert len(TASKS) == len(set(TASKS)) == 50
    assert "door-open-v3" in TASKS


@pytest.mark.parametrize("task", TASKS)
def test_contract(task: str) -> None:
    """Seeds, spaces, infos and states, with the expert acting so that there are contacts."""
    env, used = MetaWorldEnv(task), MetaWorldEnv(task)
    follow_script(used, used.reset(seed=8)[0], 15)

    first, info = env.reset(seed=3)
    other, other_info = used.reset(seed=3)
    np.testing.assert_array_equal(first, other)
    assert info == other_info
    begin = env.get_state()
    lead = follow_script(env, first, 30)
    assert_same(lead, follow_script(used, other, 30))

    for observation, reward, terminated, truncated, after in lead:
        assert observation.shape == (39,)
        assert env.observation_space.contains(observation)
        assert type(reward) is float
        assert not terminated
        assert not truncated
        assert after.keys() == info.keys()
        assert type(after["success"]) is bool
    assert env.observation_space.contains(first)
    np.testing.assert_array_equal(lead[0][0][18:36], first[:18])
    np.testing.assert_array_equal(first[18:36], first[:18])

    state = env.get_state()
    assert state.dtype == np.float64
    assert state.shape == begin.shape
    assert len(state) <= 100
    tail = follow_script(env, lead[-1][0], 20)
    used.reset(seed=9)
    np.testing.assert_array_equal(used.set_state(state), lead[-1][0])
    np.testing.assert_array_equal(used.get_state(), state)
    assert_same(tail, follow_script(used, lead[-1][0], 20))
    np.testing.assert_array_equal(env.set_state(begin), first)
    assert_same(lead, follow_script(env, first, 30))

    assert not np.array_equal(env.reset(seed=4)[0], first)
    np.testing.assert_array_equal(env.reset(seed=np.int64(3))[0], first)


@pytest.mark.parametrize("task", TASKS)
def test_steps_equal_those_of_the_package(task: str) -> None:
    env, twin = MetaWorldEnv(task), MetaWorldEnv(task)
    observation, _ = env.reset(seed=0)
    twin.reset(seed=0)
    bare = twin._bare
    bare._prev_obs = observation[:18]
    policy = scripted_policy(task)
    for _ in range(40):
        action = np.clip(policy.get_action(observation.copy()), -1, 1)
        observation, reward, _, _, info = env.step(action)
        expected, expected_reward, _, _, expected_info = bare.step(action)
        np.testing.assert_array_equal(observation, expected)
        assert reward == expected_reward
        assert info == expected_info


@pytest.mark.parametrize("task", ACROSS_PROCESSES)
def test_seeds_and_states_hold_in_another_process(task: str, elsewhere: Any) -> None:
    env = MetaWorldEnv(task)
    lead = follow_script(env, env.reset(seed=11)[0], 60)
    state = env.get_state()
    assert_same(lead, elsewhere(task, 11, 60, None))
    assert_same(follow_script(env, lead[-1][0], 20), elsewhere(task, 0, 20, state))


def test_resets_without_a_seed_follow_the_environments_own_stream() -> None:
    env, twin = MetaWorldEnv("reach-v3"), MetaWorldEnv("reach-v3")
    env.reset(seed=5)
    twin.reset(seed=5)
    first, _ = env.reset()
    np.random.seed(0)
    twin.step(np.zeros(4, np.float32))
    np.testing.assert_array_equal(first, twin.reset()[0])
    assert not np.array_equal(first, env.reset()[0])


def test_the_global_random_stream_is_left_alone() -> None:
    np.random.seed(0)
    before = np.random.get_state()
    env = MetaWorldEnv("pick-place-v3")
    env.reset(seed=1)
    env.reset()
    for old, new in zip(before, np.random.get_state(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_object_and_goal_are_drawn_anew(door: MetaWorldEnv) -> None:
    observations = np.stack([door.reset(seed=seed)[0] for seed in range(10)])
    assert (observations[:, 4:7].std(axis=0)[:2] > 0.01).all()
    assert (observations[:, 36:38].std(axis=0) > 0.01).all()


def test_what_a_caller_writes_into_an_observation_changes_nothing(door: MetaWorldEnv) -> None:
    observation, _ = door.reset(seed=2)
    state = door.get_state()
    action = np.array([0.3, 0.2, -0.1, 1.0], np.float32)
    expected = door.step(action)[0].copy()
    door.set_state(state)[:] = 7.0
    observation[:] = 7.0
    np.testing.assert_array_equal(door.step(action)[0], expected)


def test_the_horizon_truncates_and_states_keep_the_step(door: MetaWorldEnv) -> None:
    door.reset(seed=0)
    action = np.zeros(4, np.float32)
    ends = [door.step(action)[3] for _ in range(39)]
    state = door.get_state()
    assert not any(ends)
    assert door.step(action)[3]
    with pytest.raises(RuntimeError, match="reset"):
        door.step(action)
    door.set_state(state)
    assert door.step(action)[3]


def test_actions_beyond_the_space_are_clipped(door: MetaWorldEnv) -> None:
    door.reset(seed=0)
    state = door.get_state()
    far = door.step(np.array([5, -3, 2, 9], np.float32))
    door.set_state(state)
    assert_same([far], [door.step(np.array([1, -1, 1, 1], np.float32))])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([np.nan, 0, 0, 0], "not finite"),
        ([0, np.inf, 0, 0], "not finite"),
        ([0, 0, 0], "shape"),
        ([[0, 0, 0, 0]], "shape"),
    ],
)
def test_bad_actions_are_refused_before_anything_moves(door: MetaWorldEnv, action: Any, message: str) -> None:
    door.reset(seed=0)
    state = door.get_state()
    with pytest.raises(ValueError, match=message):
        door.step(np.array(action, np.float32))
    np.testing.assert_array_equal(door.get_state(), state)


@pytest.mark.parametrize("seed", [-1, LARGEST_SEED + 1])
def test_seeds_that_a_state_cannot_hold_are_refused(door: MetaWorldEnv, seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        door.reset(seed=seed)


def test_the_largest_seed_survives_a_state() -> None:
    env, other = MetaWorldEnv("reach-v3"), MetaWorldEnv("reach-v3")
    first, _ = env.reset(seed=LARGEST_SEED)
    np.testing.assert_array_equal(other.set_state(env.get_state()), first)


def test_states_of_another_task_are_refused(door: MetaWorldEnv) -> None:
    other = MetaWorldEnv("drawer-open-v3")
    other.reset(seed=0)
    with pytest.raises(ValueError, match="door-open-v3"):
        door.set_state(other.get_state())
    with pytest.raises(ValueError, match="numbers"):
        door.set_state(np.zeros(5))


def test_nothing_works_before_the_first_reset() -> None:
    env = MetaWorldEnv("reach-v3")
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(4, np.float32))
    with pytest.raises(RuntimeError, match="reset"):
        env.get_state()


def test_config_rebuilds_the_environment() -> None:
    env = MetaWorldEnv("window-open-v3", horizon=7, camera="topview", image_size=32)
    copy = make(json.loads(json.dumps(env.config)))
    assert copy.config == env.config
    np.testing.assert_array_equal(copy.reset(seed=1)[0], env.reset(seed=1)[0])
    assert [copy.step(np.zeros(4, np.float32))[3] for _ in range(7)] == [False] * 6 + [True]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "metaworld/door-opn-v3"}, "door-open-v3"),
        ({"name": "metawrld/door-open-v3"}, "did you mean metaworld"),
        ({}, "metaworld"),
        ({"name": "metaworld"}, "task"),
        ({"name": "metaworld/reach-v3", "colour": "red"}, "colour"),
        ({"name": "metaworld/reach-v3", "horizon": 0}, "horizon"),
        ({"name": "metaworld/reach-v3", "camera": "corner9"}, "corner"),
        ({"name": "metaworld/reach-v3", "image_size": 0}, "images of 0 pixels"),
        ({"name": "metaworld/reach-v3", "camera_position": [1.0, 2.0]}, "three finite numbers"),
        ({"name": "metaworld/reach-v3", "camera_position": [1.0, 2.0, np.inf]}, "three finite numbers"),
        ({"name": "metaworld/reach-v3", "camera_position": 1.0}, "cannot be made"),
        ({"name": "metaworld/reach-v3", "camera_fovy": 180}, "between 0 and 180 degrees"),
    ],
)
def test_configurations_that_make_nothing_say_why(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(config)


def test_images_are_upright_and_follow_the_scene() -> None:
    if use_rendering_backend() is None:
        pytest.skip(no_backend_message())
    env = MetaWorldEnv("drawer-open-v3", image_size=64)
    env.reset(seed=0)
    image = env.render()
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    # Above the table nothing is drawn; the table's wood, more red than blue, fills the lower edge.
    assert image[:4, 32:].mean() < image[-4:].mean()
    assert image[-8:, 16:48, 0].mean() > image[-8:, 16:48, 2].mean() + 10
    for _ in range(20):
        env.step(np.array([-1, 0, 0, 0], np.float32))
    assert not np.array_equal(env.render(), image)
    env.close()
    env.close()


def test_a_camera_can_be_put_elsewhere_and_changes_nothing_else() -> None:
    env, moved = MetaWorldEnv("drawer-open-v3"), MetaWorldEnv("drawer-open-v3", **CPL_VIEW)
    assert json.loads(json.dumps(moved.config)) == {**env.config, **CPL_VIEW}
    assert make(moved.config).config == moved.config
    assert (env.image_shape, moved.image_shape) == ((256, 256, 3), (64, 64, 3))
    first, other = (follow_script(each, each.reset(seed=3)[0], 20) for each in (env, moved))
    assert_same(first, other)
    np.testing.assert_array_equal(env.get_state(), moved.get_state())
    camera = moved._data.camera("corner2")
    np.testing.assert_array_equal(camera.xpos, [1.5, -0.35, 1.1])
    np.testing.assert_allclose(camera.xmat, env._data.camera("corner2").xmat)
    assert moved._model.camera("corner2").fovy == 20
    assert moved._model.camera("corner").fovy == env._model.camera("corner").fovy


def test_a_narrower_field_of_view_is_the_middle_of_a_wider_one() -> None:
    if use_rendering_backend() is None:
        pytest.skip(no_backend_message())
    size = 96
    half = float(np.rad2deg(2 * np.arctan(np.tan(np.deg2rad(30)) / 2)))
    wide, narrow = (
        MetaWorldEnv("drawer-open-v3", camera="corner2", image_size=edge, camera_fovy=fovy)
        for edge, fovy in ((2 * size, 60.0), (size, half))
    )
    images = []
    for env in (wide, narrow):
        env.reset(seed=0)
        images.append(env.render().astype(float))
        assert images[-1].shape == env.image_shape
        env.close()
    middle = images[0][size // 2 : -size // 2, size // 2 : -size // 2]
    # Equal but for the edges of things, which fall on other pixels, and details of textures.
    assert np.mean(np.abs(middle - images[1])) < 4 < np.mean(np.abs(middle - images[1][::-1]))
