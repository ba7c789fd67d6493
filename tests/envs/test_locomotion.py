from __future__ import annotations

import json
import multiprocessing
from typing import Any

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt
import pytest

import envs
from envs.env import LARGEST_SEED
from envs.locomotion import (
    ALIVE_REWARD,
    ATTRIBUTES,
    HEIGHT_WEIGHT,
    SPEED_WEIGHT,
    LocomotionEnv,
    append_command,
    tasks,
    window_attributes,
)
from robopref.rendering import no_backend_message, use_rendering_backend
from robopref.rollouts import EpisodeRecorder

TASKS = tasks()
COMMANDS = {"speed": [0.0, 3.0], "height": [0.9, 1.3]}
OBSERVED = {"Hopper": 11, "Walker2d": 17, "HalfCheetah": 17, "Ant": 27, "Humanoid": 45}
FEET = {
    "Hopper": {"foot": "foot_geom"},
    "Walker2d": {"left": "foot_left_geom", "right": "foot_geom"},
    "HalfCheetah": {"back": "bfoot", "front": "ffoot"},
    "Ant": {},
    "Humanoid": {"left": "left_foot", "right": "right_foot"},
}


def random_actions(env: Any, count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (count, *env.action_space.shape)).astype(np.float32)


def play(env: LocomotionEnv, actions: npt.NDArray[np.float32]) -> list[tuple[Any, ...]]:
    return [(observation.tolist(), *rest) for observation, *rest in map(env.step, actions)]


def played_elsewhere(config: dict[str, Any], state: npt.NDArray[np.float64], count: int) -> list[tuple[Any, ...]]:
    env = LocomotionEnv(config["name"].split("/")[1], commands=config.get("commands"))
    env.set_state(state)
    return play(env, random_actions(env, count, seed=1))


def commands_of(task: str) -> dict[str, list[float]]:
    return {"speed": [-1.0, 2.0]} if task == "HalfCheetah" else {"speed": [-1.0, 2.0], "height": [0.5, 1.5]}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("commanded", [False, True])
def test_dynamics_and_rewards_are_gymnasiums_to_the_bit(task: str, commanded: bool) -> None:
    env = LocomotionEnv(task, commands=commands_of(task) if commanded else None)
    forgiving = {} if task == "HalfCheetah" else {"terminate_when_unhealthy": False}
    theirs = gymnasium.make(f"{task}-v5", **forgiving).unwrapped
    size = OBSERVED[task]
    observation, info = env.reset(seed=5)
    np.testing.assert_array_equal(observation[:size], theirs.reset(seed=5)[0][:size])
    bounds = theirs.action_space.high
    unhealthy = 0
    for action in random_actions(env, 150):
        observation, reward, terminated, _, info = env.step(action)
        expected, expected_reward, _, _, terms = theirs.step(action * bounds)
        np.testing.assert_array_equal(observation[:size], expected[:size])
        np.testing.assert_array_equal(env._data.qpos, theirs.data.qpos)
        np.testing.assert_array_equal(env._data.qvel, theirs.data.qvel)
        assert info["task_reward"] == expected_reward
        assert info["control_cost"] == -terms["reward_ctrl"]
        assert info["healthy"] is bool(terms.get("reward_survive", 1) > 0)
        assert commanded or reward == expected_reward
        assert type(reward) is float
        assert not terminated
        unhealthy += not info["healthy"]
    assert (len(observation) - size) == (len(commands_of(task)) if commanded else 0)
    assert unhealthy > 0 or task in ("HalfCheetah", "Ant")


@pytest.mark.parametrize("task", TASKS)
def test_actions_are_scaled_to_the_actuators(task: str) -> None:
    env = LocomotionEnv(task)
    env.reset(seed=0)
    assert env.action_space == gymnasium.spaces.Box(-1.0, 1.0, env.action_space.shape, np.float32)
    low, high = env._model.actuator_ctrlrange.T
    np.testing.assert_array_equal(low, -high)
    for fraction in (1.0, -1.0, 0.25, 7.0):
        env.step(np.full(env.action_space.shape, fraction, np.float32))
        np.testing.assert_allclose(env._data.ctrl, np.clip(fraction, -1, 1) * high, rtol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_infos_are_about_the_state_just_reached(task: str) -> None:
    """Against MuJoCo's own account of that state, in which nothing lags behind."""
    env = LocomotionEnv(task)
    model, fresh = env._model, mujoco.MjData(env._model)
    _, info = env.reset(seed=2)
    names = info.keys()
    assert (info["x_velocity"], info["task_reward"], info["control_cost"]) == (0.0, 0.0, 0.0)
    touched: set[tuple[str, float]] = set()
    # First in free fall and at rest, then thrashing about.
    scales = np.r_[np.zeros(60), np.ones(140)][:, None]
    for action in (scales * random_actions(env, 200)).astype(np.float32):
        x = env._data.qpos[0]
        info = env.step(action)[-1]
        assert info.keys() == names
        assert {type(value) for value in info.values()} <= {float, bool}
        fresh.qpos[:], fresh.qvel[:] = env._data.qpos, env._data.qvel
        mujoco.mj_forward(model, fresh)
        torso = fresh.body("torso").xpos
        assert info["x_velocity"] == (env._data.qpos[0] - x) / env._bare.dt
        if task == "HalfCheetah":
            assert "torso_height" not in info
        else:
            assert info["torso_height"] == pytest.approx(torso[2], abs=1e-12)
        pairs = {tuple(sorted(contact.geom.tolist())) for contact in fresh.contact}
        floor = model.geom("floor").id
        for foot, geom in FEET[task].items():
            expected = float(tuple(sorted((floor, model.geom(geom).id))) in pairs)
            assert info[f"{foot}_contact"] == expected
            touched.add((foot, expected))
        if len(FEET[task]) == 2:
            first, second = (fresh.geom(geom).xpos[0] for geom in FEET[task].values())
            assert info["foot_separation"] == pytest.approx(second - first, abs=1e-12)
        else:
            assert "foot_separation" not in info
    assert touched == {(foot, value) for foot in FEET[task] for value in (0.0, 1.0)}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("commanded", [False, True])
def test_a_state_is_continued_bit_for_bit_in_another_instance(task: str, commanded: bool) -> None:
    commands = commands_of(task) if commanded else None
    env, other = LocomotionEnv(task, commands=commands), LocomotionEnv(task, commands=commands)
    env.reset(seed=3)
    other.reset(seed=9)
    play(other, random_actions(other, 25, seed=2))
    begin = env.get_state()
    lead = play(env, random_actions(env, 40))
    state = env.get_state()
    tail = play(env, random_actions(env, 40, seed=1))
    np.testing.assert_array_equal(other.set_state(state), lead[-1][0])
    np.testing.assert_array_equal(other.get_state(), state)
    assert play(other, random_actions(env, 40, seed=1)) == tail
    other.set_state(begin)
    assert play(other, random_actions(env, 40)) == lead


def test_states_hold_in_another_process() -> None:
    cases = []
    for task in ("Walker2d", "Humanoid"):
        env = LocomotionEnv(task, commands=COMMANDS)
        env.reset(seed=LARGEST_SEED)
        play(env, random_actions(env, 30))
        state = env.get_state()
        cases.append(((dict(env.config), state, 10), play(env, random_actions(env, 10, seed=1))))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for arguments, expected in cases:
            assert pool.apply(played_elsewhere, arguments) == expected


def test_resets_without_a_seed_follow_the_environments_own_stream_alone() -> None:
    env, twin = LocomotionEnv("Hopper", commands=COMMANDS), LocomotionEnv("Hopper", commands=COMMANDS)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    env.reset(seed=5)
    twin.reset(seed=5)
    twin.step(np.ones(3, np.float32))
    first = env.reset()[0]
    np.testing.assert_array_equal(first, twin.reset()[0])
    assert not np.array_equal(first, env.reset()[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_a_command_is_drawn_uniformly_by_the_seed() -> None:
    env, plain = LocomotionEnv("Walker2d", commands=COMMANDS), LocomotionEnv("Walker2d")
    assert env.command_names == ("speed", "height")
    np.testing.assert_array_equal(env.command_ranges, [[0.0, 3.0], [0.9, 1.3]])
    drawn, seen = [], []
    for seed in range(300):
        observation, info = env.reset(seed=seed)
        np.testing.assert_array_equal(observation[:-2], plain.reset(seed=seed)[0])
        drawn.append([info["command_speed"], info["command_height"]])
        seen.append(observation[-2:])
    low, high = env.command_ranges.T
    units = (np.array(drawn) - low) / (high - low)
    np.testing.assert_allclose(seen, 2 * units - 1, atol=1e-12)
    assert units.min() >= 0
    assert units.max() <= 1
    # Mean and variance of a uniform variable, four standard errors wide: sqrt(1 / 12 / 300) and sqrt(1 / 180 / 300).
    np.testing.assert_allclose(units.mean(axis=0), 1 / 2, atol=4 * np.sqrt(1 / 12 / 300))
    np.testing.assert_allclose(units.var(axis=0), 1 / 12, atol=4 * np.sqrt(1 / 180 / 300))
    assert abs(np.corrcoef(units.T)[0, 1]) < 4 / np.sqrt(300)
    again, info = env.reset(seed=7)
    np.testing.assert_array_equal(again[-2:], seen[7])
    for action in random_actions(env, 5):
        observation, *_, after = env.step(action)
        np.testing.assert_array_equal(observation[-2:], seen[7])
        assert after.keys() == info.keys()
        assert (after["command_speed"], after["command_height"]) == (info["command_speed"], info["command_height"])
        assert env.observation_space.contains(observation)


def test_commands_are_in_one_order_however_they_are_written() -> None:
    """A configuration that was written with sorted keys makes the same environment."""
    turned = LocomotionEnv("Walker2d", commands=dict(reversed(COMMANDS.items())))
    env = LocomotionEnv("Walker2d", commands=COMMANDS)
    assert turned.command_names == env.command_names
    np.testing.assert_array_equal(turned.reset(seed=1)[0], env.reset(seed=1)[0])
    np.testing.assert_array_equal(turned.set_state(env.get_state()), env.reset(seed=1)[0])


@pytest.mark.parametrize(
    ("task", "names"),
    [("Walker2d", "speed height"), ("Walker2d", "height"), ("HalfCheetah", "speed"), ("Humanoid", "speed height")],
)
def test_the_commanded_reward(task: str, names: str) -> None:
    env = LocomotionEnv(task, commands={name: COMMANDS[name] for name in names.split()})
    rewards, expected = [], []
    _, info = env.reset(seed=4)
    speed, height = info.get("command_speed"), info.get("command_height")
    for action in random_actions(env, 60):
        x = env._data.qpos[0]
        _, reward, _, _, info = env.step(action)
        wanted = 5.0 if info["healthy"] else 0.0
        wanted -= float(env._bare.control_cost(action * env._bare.action_space.high))
        if speed is not None:
            wanted -= abs((env._data.qpos[0] - x) / env._bare.dt - speed)
        if height is not None:
            wanted -= 5.0 * abs(info["torso_height"] - height)
        rewards.append(reward)
        expected.append(wanted)
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    assert np.std(rewards) > 0.01


def test_a_height_off_by_a_fifth_of_a_metre_matters_as_much_as_a_metre_per_second() -> None:
    assert pytest.approx(SPEED_WEIGHT * 1.0) == HEIGHT_WEIGHT * 0.2


def test_a_robot_that_stands_is_better_off_alive() -> None:
    """Whatever it is told within reason: 3 m/s where it has none, and its torso 0.3 m off."""
    assert ALIVE_REWARD > SPEED_WEIGHT * 3.0 + HEIGHT_WEIGHT * 0.3


def test_a_command_is_appended_scaled_to_its_range() -> None:
    ranges = np.array([[0.0, 4.0], [-1.0, 1.0]])
    observations = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    appended = append_command(observations, np.array([1.0, 1.0]), ranges)
    assert appended.dtype == np.float32
    np.testing.assert_array_equal(appended[..., :2], observations)
    np.testing.assert_array_equal(appended[..., 2:], np.broadcast_to([-0.5, 1.0], (2, 3, 2)))
    own = append_command(observations[:, 0], np.array([[0.0, 0.0], [4.0, -3.0]]), ranges)
    np.testing.assert_array_equal(own[:, 2:], [[-1.0, 0.0], [1.0, -3.0]])
    with pytest.raises(ValueError, match="1 values was given where 2 have ranges"):
        append_command(observations, np.array([1.0]), ranges)


def test_plain_observations_with_the_command_are_those_of_the_commanded_task() -> None:
    env, plain = LocomotionEnv("Hopper", commands=COMMANDS), LocomotionEnv("Hopper")
    observation, info = env.reset(seed=0)
    command = np.array([info["command_speed"], info["command_height"]])
    bare, _ = plain.reset(seed=0)
    np.testing.assert_array_equal(append_command(bare, command, env.command_ranges), observation)
    for action in random_actions(env, 10):
        observation, bare = env.step(action)[0], plain.step(action)[0]
        np.testing.assert_array_equal(append_command(bare, command, env.command_ranges), observation)


# Attributes of windows


def test_attributes_in_closed_form() -> None:
    steps, length = 40, 21
    rows = np.arange(steps + 1)
    infos = {
        "x_velocity": rows.astype(float),
        "torso_height": 1.0 + 0.5 * (rows % 2),
        # Of the distances 0, 1, …, 20, the 95th percentile is 19, whatever the signs.
        "foot_separation": ((rows - 1) % 21) * (-1.0) ** rows,
        "left_contact": (rows <= 10).astype(float),
        "right_contact": ((rows > 5) & (rows <= 10)).astype(float),
        "healthy": np.ones(steps + 1, bool),
    }
    measured = window_attributes(infos, np.array([0, 1, 19]), length)
    assert tuple(measured) == ATTRIBUTES["Walker2d"]
    # Rows s + 1 to s + 21: their middle is s + 11.
    np.testing.assert_allclose(measured["speed"], [11, 12, 30])
    # Of 21 rows from an odd one, 11 are odd and 10 even.
    np.testing.assert_allclose(measured["height"], [1 + 0.5 * 11 / 21, 1 + 0.5 * 10 / 21, 1 + 0.5 * 10 / 21])
    np.testing.assert_allclose(measured["stride"], [19, 19, 19])
    # Left on rows 1 to 10, right on rows 6 to 10; the second window misses row 1, the last one both.
    np.testing.assert_allclose(measured["leg_preference"], [(10 - 5) / 15, (9 - 5) / 14, 0.0])


def test_a_window_of_one_step_is_the_state_that_it_reaches() -> None:
    infos = {"x_velocity": np.array([0.0, 3.0, 5.0]), "back_contact": np.eye(3)[1], "front_contact": np.eye(3)[2]}
    measured = window_attributes(infos, np.arange(2), 1)
    np.testing.assert_array_equal(measured["speed"], [3, 5])
    np.testing.assert_array_equal(measured["leg_preference"], [1, -1])
    assert measured.keys() == {"speed", "leg_preference"}


@pytest.mark.parametrize("task", TASKS)
def test_attributes_of_recorded_episodes(task: str) -> None:
    env = LocomotionEnv(task, horizon=30)
    recorder = EpisodeRecorder(env, seed=1)
    begin = env._data.qpos[0]
    for action in random_actions(env, 30):
        recorder.step(action)
    infos = recorder.episode({}).infos
    starts = np.arange(21)
    measured = window_attributes(infos, starts, 10)
    assert tuple(measured) == ATTRIBUTES[task]
    assert {values.shape for values in measured.values()} == {(21,)}
    whole = window_attributes(infos, np.array([0]), 30)
    np.testing.assert_allclose(whole["speed"], (env._data.qpos[0] - begin) / (30 * env._bare.dt))
    for name, values in measured.items():
        alone = [window_attributes(infos, starts[i : i + 1], 10)[name][0] for i in range(21)]
        np.testing.assert_array_equal(values, alone)


@pytest.mark.parametrize(("starts", "length"), [([0], 0), ([0], 6), ([-1], 2), ([4], 2), ([], 6)])
def test_windows_beyond_the_episode_are_refused(starts: list[int], length: int) -> None:
    with pytest.raises(ValueError, match="not inside of an episode of 5"):
        window_attributes({"x_velocity": np.zeros(6)}, np.array(starts, int), length)


def test_infos_of_other_tasks_have_no_attributes() -> None:
    with pytest.raises(ValueError, match="x_velocity"):
        window_attributes({"success": np.zeros(6)}, np.array([0]), 2)
    assert ATTRIBUTES.keys() == set(TASKS)


# Ends


def test_falling_ends_an_episode_only_where_that_was_asked_for() -> None:
    env, patient = LocomotionEnv("Hopper", terminate_when_unhealthy=True), LocomotionEnv("Hopper")
    actions = random_actions(env, 200)
    env.reset(seed=0)
    patient.reset(seed=0)
    steps = 0
    terminated = False
    while not terminated:
        before = env.get_state()
        observation, reward, terminated, truncated, info = env.step(actions[steps])
        assert terminated is not info["healthy"]
        assert not truncated
        other = patient.step(actions[steps])
        np.testing.assert_array_equal(other[0], observation)
        assert other[1:] == (reward, False, False, info)
        steps += 1
    fallen = env.get_state()
    with pytest.raises(RuntimeError, match="reset"):
        env.step(actions[0])
    env.set_state(before)
    assert env.step(actions[steps - 1])[2]
    again = LocomotionEnv("Hopper", terminate_when_unhealthy=True)
    again.set_state(fallen)
    with pytest.raises(RuntimeError, match="reset"):
        again.step(actions[0])
    patient.step(actions[0])
    env.reset(seed=1)
    assert not env.step(actions[0])[2]


def test_the_horizon_is_counted_by_states() -> None:
    env = LocomotionEnv("HalfCheetah", horizon=5)
    env.reset(seed=0)
    action = np.zeros(6, np.float32)
    ends = [env.step(action)[3] for _ in range(4)]
    state = env.get_state()
    assert [*ends, env.step(action)[3]] == [False] * 4 + [True]
    with pytest.raises(RuntimeError, match="reset"):
        env.step(action)
    env.set_state(state)
    assert env.step(action)[3]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "locomotion/Walker"}, r"no locomotion task 'Walker'; did you mean Walker2d\?"),
        ({"name": "locomotion"}, "task"),
        ({"horizon": 0}, "horizon of 0 steps"),
        ({"image_size": 0}, "images of 0 pixels"),
        ({"commands": {"sped": [0, 1]}}, r"Walker2d cannot be commanded a 'sped'; did you mean speed\?"),
        ({"commands": {"speed": [3, 0]}}, r"the range of the command 'speed' is \[3, 0\]"),
        ({"commands": {"speed": [1, 1]}}, "low < high"),
        ({"commands": {"speed": [0, 1, 2]}}, r"must be \[low, high\]"),
        ({"commands": {"height": [0, float("inf")]}}, "the range of the command 'height'"),
        ({"commands": {"speed": 3.0}}, "cannot be made"),
        ({"commands": ["speed"]}, "ranges by name"),
        ({"name": "locomotion/HalfCheetah", "commands": {"height": [0, 1]}}, "HalfCheetah cannot be commanded"),
        ({"name": "locomotion/HalfCheetah", "terminate_when_unhealthy": True}, "HalfCheetah knows no unhealthy state"),
    ],
)
def test_configurations_that_make_nothing_say_why(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        envs.make({"name": "locomotion/Walker2d", **arguments})


def test_config_rebuilds_the_environment() -> None:
    env = LocomotionEnv("Ant", horizon=9, terminate_when_unhealthy=True, commands={"speed": [0, 1]}, image_size=32)
    copy = envs.make(json.loads(json.dumps(env.config, sort_keys=True)))
    assert copy.config == env.config
    assert LocomotionEnv("Ant", commands={}).config == LocomotionEnv("Ant").config
    np.testing.assert_array_equal(copy.set_state(_state(env)), env.reset(seed=1)[0])


def _state(env: LocomotionEnv) -> npt.NDArray[np.float64]:
    env.reset(seed=1)
    return env.get_state()


def test_states_of_another_task_or_command_are_refused() -> None:
    env = LocomotionEnv("Walker2d", commands=COMMANDS)
    own = _state(env)
    others = [
        LocomotionEnv("Hopper", commands=COMMANDS),
        LocomotionEnv("Walker2d"),
        LocomotionEnv("Walker2d", commands={**COMMANDS, "speed": [0.0, 2.0]}),
    ]
    broken = own.copy()
    broken[-1] = np.nan
    for state in (*map(_state, others), own[:-1], broken):
        with pytest.raises(ValueError, match="not a state of locomotion/Walker2d"):
            env.set_state(state)
    np.testing.assert_array_equal(env.get_state(), own)


def test_nothing_works_before_the_first_reset() -> None:
    env = LocomotionEnv("Hopper")
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(3, np.float32))
    with pytest.raises(RuntimeError, match="reset"):
        env.get_state()


@pytest.mark.parametrize("action", [[np.nan, 0, 0], [0, 0]])
def test_bad_actions_are_refused_before_anything_moves(action: list[float]) -> None:
    env = LocomotionEnv("Hopper")
    state = _state(env)
    with pytest.raises(ValueError, match="action"):
        env.step(np.array(action, np.float32))
    np.testing.assert_array_equal(env.get_state(), state)


@pytest.mark.parametrize("seed", [-1, LARGEST_SEED + 1])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        LocomotionEnv("Hopper").reset(seed=seed)


# Images


@pytest.fixture(scope="module")
def opengl() -> None:
    if use_rendering_backend() is None:
        pytest.skip(no_backend_message())


@pytest.mark.usefixtures("opengl")
@pytest.mark.parametrize("task", TASKS)
def test_images_are_upright_show_the_robot_and_change_nothing(task: str) -> None:
    env, unseen = LocomotionEnv(task, image_size=64), LocomotionEnv(task)
    env.reset(seed=0)
    unseen.reset(seed=0)
    first = env.render()
    assert (first.dtype, first.shape) == (np.uint8, env.image_shape)
    # The floor below, nothing above.
    assert first[:3].max() < first[-8:].max()
    actions = random_actions(env, 40)
    for index, action in enumerate(actions):
        step, expected = env.step(action), unseen.step(action)
        np.testing.assert_array_equal(step[0], expected[0])
        assert step[1:] == expected[1:]
        if index % 13 == 0:
            image = env.render()
    assert not np.array_equal(image, first)
    other = LocomotionEnv(task, image_size=64)
    other.set_state(env.get_state())
    np.testing.assert_array_equal(other.render(), image)
    env.close()
    env.close()
    other.close()


@pytest.mark.usefixtures("opengl")
def test_the_camera_moves_along_with_the_robot() -> None:
    """The robot, which is the only thing of its colour, stays in the picture however far it gets."""
    env = LocomotionEnv("Walker2d", image_size=64)
    env.reset(seed=0)
    reddish = []
    for x in (0.0, 5.0):
        state = env.get_state()
        # A state ends with positions, velocities and the solver's warm start, of which there are 9 each.
        state[-3 * 9] = x
        env.set_state(state)
        assert env._data.qpos[0] == x
        image = env.render().astype(int)
        reddish.append(int(np.sum(image[..., 0] > image[..., 2] + 20)))
    assert min(reddish) > 50
    assert abs(reddish[0] - reddish[1]) < 0.1 * max(reddish)
    env.close()
