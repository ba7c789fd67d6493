from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import random
import sys
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt
import pytest

import envs
from envs.env import LARGEST_SEED
from envs.robosuite import _PHYSICS, RobosuiteEnv, _drawing_from, from_env_args, tasks, to_env_args
from robopref.rendering import no_backend_message, use_rendering_backend

ROBOSUITE = importlib.util.find_spec("robosuite") is not None
MISSING = "robosuite is not installed: `make robomimic` installs it and runs these tests."


def with_robosuite(test: Any) -> Any:
    return pytest.mark.robomimic(pytest.mark.skipif(not ROBOSUITE, reason=MISSING)(test))


ARM = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
    "damping_limits": [0, 10],
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "control_delta": True,
    "interpolation": None,
    "ramp_ratio": 0.2,
}
"""How files older than robosuite 1.5 describe the controller of an arm."""

OLD_ARGS = {
    "env_name": "PickPlaceCan",
    "env_version": "1.4.1",
    "type": 1,
    "env_kwargs": {
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "ignore_done": True,
        "use_object_obs": True,
        "use_camera_obs": False,
        "control_freq": 20,
        "controller_configs": ARM,
        "robots": ["Panda"],
        "camera_depths": False,
        "camera_heights": 84,
        "camera_widths": 84,
        "camera_names": ["agentview"],
        "reward_shaping": False,
        "render_gpu_device_id": 0,
    },
}
JOINT_VELOCITY = {**ARM, "type": "JOINT_VELOCITY", "output_max": 0.5, "output_min": -0.5, "kp": 3.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Lift": ("Lift", {}),
    "PickPlaceCan": ("PickPlaceCan", {}),
    "NutAssemblySquare": ("NutAssemblySquare", {}),
    "two arms": ("TwoArmTransport", {}),
    "one of several things": ("PickPlaceSingle", {}),
    "drawn anew": ("Lift", {"hard_reset": True}),
    "shaped rewards": ("Door", {"reward_shaping": True}),
    "older physics": ("Lift", {"lite_physics": False}),
    "interpolation": ("Lift", {"controller_configs": {**ARM, "interpolation": "linear"}}),
    "velocities": ("Lift", {"controller_configs": JOINT_VELOCITY}),
    "mobile robot": ("Lift", {"robots": "Tiago"}),
}

Step = tuple[list[float], float, bool, bool, dict[str, Any]]


def actions_for(env: RobosuiteEnv, count: int) -> npt.NDArray[np.float32]:
    low, high = env.action_space.low, env.action_space.high
    return np.random.default_rng(0).uniform(low, high, (count, *low.shape)).astype(np.float32)


def play(env: RobosuiteEnv, actions: npt.NDArray[np.float32]) -> list[Step]:
    steps = [env.step(action) for action in actions]
    return [(observation.tolist(), *rest) for observation, *rest in steps]


def elsewhere(task: str, seed: int, actions: npt.NDArray[np.float32], state: npt.NDArray[np.float64]) -> list[Any]:
    env = RobosuiteEnv(task)
    first = env.reset(seed=seed)[0].tolist()
    played = play(env, actions)
    return [first, played, env.set_state(state).tolist(), play(env, actions)]


@pytest.fixture(scope="module")
def lift() -> RobosuiteEnv:
    return RobosuiteEnv("Lift", horizon=30)


@pytest.fixture(scope="module")
def can() -> RobosuiteEnv:
    return RobosuiteEnv("PickPlaceCan")


@with_robosuite
@pytest.mark.parametrize("case", CASES)
def test_seeds_and_states(case: str) -> None:
    task, arguments = CASES[case]
    env, used = RobosuiteEnv(task, arguments=arguments), RobosuiteEnv(task, arguments=arguments)
    actions = actions_for(env, 14)
    used.reset(seed=8)
    play(used, actions[:3])

    first, info = env.reset(seed=3)
    other, other_info = used.reset(seed=3)
    np.testing.assert_array_equal(first, other)
    assert info == other_info
    begin = env.get_state()
    lead = play(env, actions[:7])
    assert lead == play(used, actions[:7])
    for observation, reward, terminated, truncated, after in lead:
        assert env.observation_space.contains(np.array(observation))
        assert len(observation) == sum(env.keys.values())
        assert type(reward) is float
        assert (terminated, truncated) == (False, False)
        assert {name: type(value) for name, value in after.items()} == {"success": bool}

    state = env.get_state()
    assert (state.dtype, state.shape) == (np.float64, begin.shape)
    assert np.isfinite(state).all()
    tail = play(env, actions[7:])
    end = env.get_state()
    used.reset(seed=9)
    play(used, actions[:2])
    assert used.set_state(state).tolist() == lead[-1][0]
    np.testing.assert_array_equal(used.get_state(), state)
    assert play(used, actions[7:]) == tail
    np.testing.assert_array_equal(used.get_state(), end)
    np.testing.assert_array_equal(env.set_state(begin), first)
    np.testing.assert_array_equal(env.get_state(), begin)
    assert play(env, actions[:7]) == lead
    np.testing.assert_array_equal(env.get_state(), state)
    assert not np.array_equal(env.reset(seed=4)[0], first)
    np.testing.assert_array_equal(env.reset(seed=np.int64(3))[0], first)


@with_robosuite
@pytest.mark.parametrize("task", ["Lift", "PickPlaceSingle"])
def test_seeds_and_states_hold_in_another_process(task: str) -> None:
    env = RobosuiteEnv(task)
    actions = actions_for(env, 5)
    first = env.reset(seed=LARGEST_SEED)[0].tolist()
    played = play(env, actions)
    state = env.get_state()
    here = [first, played, env.set_state(state).tolist(), play(env, actions)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(elsewhere, (task, LARGEST_SEED, actions, state)) == here


@with_robosuite
@pytest.mark.parametrize("case", ["Lift", "PickPlaceCan", "older physics", "interpolation", "two arms"])
def test_physics_and_controllers_are_stepped_as_the_package_does(case: str) -> None:
    task, arguments = CASES[case]
    env, twin = RobosuiteEnv(task, arguments=arguments), RobosuiteEnv(task, arguments=arguments)
    env.reset(seed=0)
    twin.reset(seed=0)
    for action in actions_for(env, 6):
        env.step(action)
        twin._bare.step(action.astype(np.float64))
        ours, theirs = np.empty((2, env._physics_size))
        for each, numbers in ((env, ours), (twin, theirs)):
            mujoco.mj_getState(each._model, each._data, numbers, _PHYSICS)
        np.testing.assert_array_equal(ours, theirs)


@with_robosuite
def test_parts_are_joined_in_the_order_asked_for(can: RobosuiteEnv) -> None:
    names = ["object", "robot0_gripper_qpos", "Can_pos", "robot0_joint_vel", "robot0_eef_pos"]
    env = RobosuiteEnv("PickPlaceCan", keys=names)
    assert list(env.keys.items()) == list(zip(names, [14, 2, 3, 7, 3], strict=True))
    assert list(can.keys) == ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object"]
    assert can.observation_space.shape == (23,)
    first, other = env.reset(seed=1)[0], can.reset(seed=1)[0]
    np.testing.assert_array_equal(first[:14], other[9:])
    np.testing.assert_array_equal(first[14:16], other[7:9])
    np.testing.assert_array_equal(first[26:], other[:3])
    data = env._data
    np.testing.assert_array_equal(first[16:19], data.body("Can_main").xpos)
    np.testing.assert_array_equal(first[26:], data.site("gripper0_right_grip_site").xpos)
    again = RobosuiteEnv("PickPlaceCan", keys=["object-state", *names[1:]])
    np.testing.assert_array_equal(again.reset(seed=1)[0], first)


@with_robosuite
def test_all_parts_are_of_the_same_moment(can: RobosuiteEnv) -> None:
    """The can in the frame of the hand, computed from the positions of both."""
    keys = ["Can_to_robot0_eef_pos", "Can_pos", "robot0_eef_pos", "robot0_eef_quat"]
    env = RobosuiteEnv("PickPlaceCan", keys=keys)
    observations = [env.reset(seed=5)[0], *(env.step(action)[0] for action in actions_for(env, 4))]
    for observation in observations:
        relative, place, hand, quaternion = np.split(observation, [3, 6, 9])
        rotation = np.empty(9)
        mujoco.mju_quat2Mat(rotation, quaternion[[3, 0, 1, 2]])
        np.testing.assert_allclose(relative, rotation.reshape(3, 3).T @ (place - hand), atol=1e-7)


@with_robosuite
def test_success_and_reward_are_of_the_state_reached(lift: RobosuiteEnv) -> None:
    observation, info = lift.reset(seed=0)
    assert not info["success"]
    cube = int(np.flatnonzero(lift._data.qpos == observation[9])[0])
    outcomes = []
    # In 50 ms the cube falls by 1.2 cm, so that some of these end on either side of 4 cm over the table.
    for height in np.arange(0.845, 0.86, 0.001):
        lift._data.qpos[cube + 2] = height
        lift._data.qvel[:] = 0
        _, reward, terminated, _, info = lift.step(np.zeros(7, np.float32))
        solved = bool(lift._data.qpos[cube + 2] > 0.84)
        assert (reward, terminated, info["success"]) == (float(solved), False, solved)
        outcomes.append(solved)
    assert set(outcomes) == {False, True}


@with_robosuite
def test_a_model_is_drawn_anew_only_where_asked_for() -> None:
    def sizes(env: RobosuiteEnv) -> list[float]:
        found = []
        for seed in (0, 1, 0):
            env.reset(seed=seed)
            found.append(float(env._model.geom("cube_g0").size[0]))
        return found

    fixed, drawn = RobosuiteEnv("Lift"), RobosuiteEnv("Lift", arguments={"hard_reset": True})
    assert len(set(sizes(fixed))) == 1
    first, second, again = sizes(drawn)
    assert first == again != second
    assert all(0.02 <= size <= 0.022 for size in (first, second))
    assert "cube_g0" in drawn.model_xml
    assert not RobosuiteEnv("PickPlaceCan", arguments={"hard_reset": True})._bare.hard_reset


@with_robosuite
def test_global_streams_and_variables_are_left_alone(lift: RobosuiteEnv) -> None:
    np.random.seed(0)
    random.seed(0)
    before = np.random.get_state()[1].tolist(), random.getstate(), random.choice, dict(os.environ)
    env = RobosuiteEnv("Lift")
    env.reset(seed=1)
    env.reset()
    env.step(np.zeros(7, np.float32))
    assert (np.random.get_state()[1].tolist(), random.getstate(), random.choice, dict(os.environ)) == before


@with_robosuite
def test_resets_without_a_seed_follow_the_environments_own_stream(lift: RobosuiteEnv) -> None:
    twin = RobosuiteEnv("Lift")
    lift.reset(seed=5)
    twin.reset(seed=5)
    first, _ = lift.reset()
    np.random.seed(0)
    np.testing.assert_array_equal(first, twin.reset()[0])
    assert not np.array_equal(first, lift.reset()[0])


@with_robosuite
def test_flat_states_are_those_of_robomimic(lift: RobosuiteEnv) -> None:
    lift.reset(seed=2)
    states, observations = [], []
    for action in actions_for(lift, 3):
        observations.append(lift.step(action)[0])
        states.append(lift.get_state())
        flat = lift.flat_states(states[-1])
        np.testing.assert_array_equal(flat, np.array(lift._bare.sim.get_state().flatten()))
    many = lift.flat_states(np.stack(states))
    assert many.shape == (3, 32)
    lift.reset(seed=9)
    for flat, observation in zip(many, observations, strict=True):
        np.testing.assert_array_equal(lift.set_flat_state(flat), observation)
    with pytest.raises(RuntimeError, match="reset"):
        lift.step(np.zeros(7, np.float32))
    with pytest.raises(ValueError, match="32 numbers"):
        lift.set_flat_state(np.zeros(31))
    np.testing.assert_array_equal(lift.set_state(states[1]), observations[1])


@with_robosuite
def test_the_environment_of_a_file_is_made_again() -> None:
    config = {
        "name": "robosuite/Lift",
        "horizon": 9,
        "keys": ["object", "robot0_eef_pos"],
        "arguments": {"robots": "UR5e", "reward_shaping": True},
    }
    env_args = json.loads(json.dumps(to_env_args(config)))
    assert (env_args["env_name"], env_args["type"]) == ("Lift", 1)
    assert env_args["env_version"].startswith("1.5")
    env, again = envs.make(config), envs.make(from_env_args(env_args, keys=config["keys"]))
    np.testing.assert_array_equal(env.reset(seed=1)[0], again.reset(seed=1)[0])
    actions = actions_for(env, 9)
    assert play(env, actions) == play(again, actions)
    with pytest.raises(ValueError, match="delivery"):
        to_env_args({"name": "delivery/sparse"})


@with_robosuite
def test_older_files_have_the_can_first_and_the_worlds_axes(can: RobosuiteEnv) -> None:
    config = from_env_args(OLD_ARGS)
    env = envs.make(config)
    assert not env._bare.lite_physics
    old, new = env.reset(seed=4)[0], can.reset(seed=4)[0]
    np.testing.assert_allclose(old, new[[*range(9), *range(16, 23), *range(9, 16)]], atol=1e-9)
    for action in actions_for(env, 5):
        np.testing.assert_allclose(env.step(action)[0][:7], can.step(action)[0][:7], atol=1e-3)
    controller = env._bare.robots[0].part_controllers["right"]
    assert (controller.input_ref_frame, controller.input_type) == ("world", "delta")


@with_robosuite
def test_the_horizon_truncates_and_states_keep_the_step(lift: RobosuiteEnv) -> None:
    lift.reset(seed=0)
    action = np.zeros(7, np.float32)
    assert not any(lift.step(action)[3] for _ in range(29))
    state = lift.get_state()
    assert lift.step(action)[3]
    with pytest.raises(RuntimeError, match="reset"):
        lift.step(action)
    lift.set_state(state)
    assert lift.step(action)[3]


@with_robosuite
def test_actions_beyond_the_space_are_clipped_and_bad_ones_refused(lift: RobosuiteEnv) -> None:
    lift.reset(seed=0)
    state = lift.get_state()
    far = lift.step(np.array([5, -3, 2, 0, 0, 0, 9], np.float32))[0]
    lift.set_state(state)
    np.testing.assert_array_equal(lift.step(np.array([1, -1, 1, 0, 0, 0, 1], np.float32))[0], far)
    state = lift.get_state()
    for action, message in (([np.nan] * 7, "not finite"), ([0.0] * 6, "shape")):
        with pytest.raises(ValueError, match=message):
            lift.step(np.array(action, np.float32))
    np.testing.assert_array_equal(lift.get_state(), state)


@with_robosuite
def test_what_a_caller_writes_into_an_observation_changes_nothing(lift: RobosuiteEnv) -> None:
    observation, _ = lift.reset(seed=2)
    state = lift.get_state()
    expected = lift.step(np.full(7, 0.3, np.float32))[0].copy()
    lift.set_state(state)[:] = 7.0
    observation[:] = 7.0
    np.testing.assert_array_equal(lift.step(np.full(7, 0.3, np.float32))[0], expected)


@with_robosuite
def test_foreign_states_and_seeds_are_refused(lift: RobosuiteEnv, can: RobosuiteEnv) -> None:
    can.reset(seed=0)
    with pytest.raises(ValueError, match="Lift"):
        lift.set_state(can.get_state())
    other = RobosuiteEnv("Lift", arguments={"control_freq": 10})
    other.reset(seed=0)
    with pytest.raises(ValueError, match="these arguments"):
        lift.set_state(other.get_state())
    for seed in (-1, LARGEST_SEED + 1):
        with pytest.raises(ValueError, match="seed"):
            lift.reset(seed=seed)
    with pytest.raises(RuntimeError, match="reset"):
        RobosuiteEnv("Lift").get_state()


@with_robosuite
def test_tasks_are_those_of_the_package() -> None:
    assert {"Lift", "PickPlaceCan", "NutAssemblySquare", "ToolHang", "TwoArmTransport"} < set(tasks())
    assert "Wipe" not in tasks()


@with_robosuite
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "robosuite/Lyft"}, "did you mean Lift"),
        ({"name": "robosuite/Wipe"}, "wiped"),
        ({"name": "robosuite"}, "task"),
        ({"name": "robosuite/Lift", "colour": "red"}, "colour"),
        ({"name": "robosuite/Lift", "horizon": 0}, "horizon"),
        ({"name": "robosuite/Lift", "image_size": 0}, "images of 0 pixels"),
        ({"name": "robosuite/Lift", "camera": "agentvew"}, "did you mean agentview"),
        ({"name": "robosuite/Lift", "keys": ["robot0_eef_position"]}, "robot0_eef_pos"),
        ({"name": "robosuite/Lift", "keys": ["object", "object"]}, "different parts"),
        ({"name": "robosuite/Lift", "keys": []}, "one at least"),
        (
            {"name": "robosuite/Lift", "arguments": {"use_object_obs": False}, "keys": ["object"]},
            "no part 'object'",
        ),
        ({"name": "robosuite/Lift", "arguments": {"colour": "red"}}, "colour"),
        ({"name": "robosuite/Lift", "arguments": {"robots": "Pandora"}}, "Pandora"),
        ({"name": "robosuite/Lift", "arguments": {"horizon": 3}}, "cannot be chosen here"),
        ({"name": "robosuite/Lift", "arguments": {"controller_configs": {"type": "MAGIC"}}}, "cannot make Lift"),
    ],
)
def test_configurations_that_make_nothing_say_why(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        envs.make(config)


@with_robosuite
def test_images_are_upright_and_follow_the_scene() -> None:
    if use_rendering_backend() is None:
        pytest.skip(no_backend_message())
    env = RobosuiteEnv("Lift", image_size=64, camera="frontview", arguments={"hard_reset": True})
    env.reset(seed=0)
    image = env.render()
    assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
    # The red cube lies on the table, in the lower half; the robot stands behind it, in the middle.
    red = (image[..., 0] > 90) & (image[..., 0] > 2.0 * image[..., 1])
    assert red.any()
    assert np.flatnonzero(red.any(axis=1)).min() > 24
    state = env.get_state()
    for _ in range(5):
        env.step(np.array([0, 0, 1, 0, 0, 0, 0], np.float32))
    assert not np.array_equal(env.render(), image)
    env.set_state(state)
    np.testing.assert_array_equal(env.render(), image)
    env.reset(seed=1)
    assert not np.array_equal(env.render(), image)
    env.close()
    env.close()


def test_without_robosuite_one_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -r requirements-robomimic\.txt"):
        envs.make({"name": "robosuite/Lift"})


def test_draws_follow_from_the_seed_and_not_from_the_order_of_names() -> None:
    def draws(seed: int, names: list[str]) -> tuple[float, float, list[str]]:
        with _drawing_from(seed):
            return float(np.random.uniform()), random.random(), [random.choice(names) for _ in range(20)]

    assert draws(1, ["Milk", "Can", "Bread"]) == draws(1, ["Can", "Bread", "Milk"])
    assert draws(1, ["Milk", "Can"]) != draws(2, ["Milk", "Can"])
    assert draws(1, ["Milk"])[0] != draws(1 + 2**32, ["Milk"])[0]


def test_env_args_become_a_configuration() -> None:
    config = from_env_args(OLD_ARGS, keys=["object", "robot0_eef_pos"], image_size=84)
    parts = ["Can_pos", "Can_quat", "Can_to_robot0_eef_pos", "Can_to_robot0_eef_quat"]
    kept = ("use_object_obs", "control_freq", "controller_configs", "robots", "reward_shaping")
    arguments = {name: OLD_ARGS["env_kwargs"][name] for name in kept}  # type: ignore[index]
    assert config == {
        "name": "robosuite/PickPlaceCan",
        "keys": [*parts, "robot0_eef_pos"],
        "image_size": 84,
        "arguments": {"hard_reset": True, "lite_physics": False, **arguments},
    }
    unversioned = {name: value for name, value in OLD_ARGS.items() if name != "env_version"}
    assert from_env_args(unversioned, keys=["object", "robot0_eef_pos"], image_size=84) == config
    assert from_env_args(OLD_ARGS)["keys"] == ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", *parts]


def test_env_args_of_robosuite_1_5_are_taken_as_they_are() -> None:
    env_args = {"env_name": "PickPlaceCan", "env_version": "1.5.1", "type": 1}
    env_args["env_kwargs"] = {"horizon": 500, "robots": "Panda", "hard_reset": False}
    expected = {"name": "robosuite/PickPlaceCan", "arguments": {"robots": "Panda", "hard_reset": False}}
    assert from_env_args(env_args) == {**expected, "horizon": 500}
    keys = ("object", "robot0_eef_quat")
    assert from_env_args(env_args, keys=keys, horizon=7) == {**expected, "horizon": 7, "keys": list(keys)}


@pytest.mark.parametrize(
    ("env_args", "message"),
    [
        ({}, "env_name"),
        ({"env_name": "Lift", "env_kwargs": []}, "env_kwargs"),
        ({"env_name": "Hopper-v2", "type": 2, "env_kwargs": {}}, "type 2"),
    ],
)
def test_env_args_of_other_kinds_are_refused(env_args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_env_args(env_args)
