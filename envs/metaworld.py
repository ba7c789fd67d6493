"""The 50 manipulation tasks of Meta-World v3 (Yu et al., 2019), with seeds that are honoured and exact states.

A Sawyer arm with a gripper; the action is the displacement of the hand (three numbers) and the gripper's effort. The
observation is, in metres and unit quaternions:

| index | what |
| --- | --- |
| 0-2 | hand position |
| 3 | opening of the gripper, 0 to 1 |
| 4-6, 7-10 | position and quaternion of the object |
| 11-13, 14-17 | position and quaternion of a second object, or zeros |
| 18-35 | the same 18 numbers one step earlier |
| 36-38 | goal position |

Resets depart from the package's own environments, so that an episode follows from its seed alone: they begin from the
scene as it was loaded, not from the one that the last episode left; they run the task's reset once, not twice; the way
of the arm to its starting pose, the same in every episode, is simulated once per environment; and the first observation
shows the objects where they have been put, where some tasks report where they were before. Steps give the package's
observations, rewards and infos bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP
from metaworld.policies.policy import Policy as ScriptedPolicy
from metaworld.sawyer_xyz_env import SawyerXYZEnv

from envs import suggestion
from envs.env import Action, Env, Observation, State, check_action
from robopref.rendering import FlatRenderer

CPL_VIEW: Mapping[str, Any] = {
    "camera": "corner2",
    "camera_position": [1.5, -0.35, 1.1],
    "camera_fovy": 20.0,
    "image_size": 64,
}
"""The part of a configuration by which images are those of CPL's experiments (Hejna et al., arXiv 2310.13639)."""

_PHYSICS = int(
    mujoco.mjtState.mjSTATE_FULLPHYSICS
    | mujoco.mjtState.mjSTATE_WARMSTART
    | mujoco.mjtState.mjSTATE_CTRL
    | mujoco.mjtState.mjSTATE_EQ_ACTIVE
    | mujoco.mjtState.mjSTATE_MOCAP_POS
    | mujoco.mjtState.mjSTATE_MOCAP_QUAT
)
_HEADER = 4
_FRAME = slice(_HEADER, _HEADER + 18)

_UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")
"""Cameras that hang upside down in the scene; their images are turned by half a turn."""

_NO_MEMORY = -1.0
"""What a state holds where the task remembers nothing; a distance is never negative."""

_MEMORY = "_target_to_obj_init"
"""The one attribute of a task (bin picking) that changes in a step: the first step's distance to the goal, or None."""


def tasks() -> tuple[str, ...]:
    """The names of all tasks, such as "door-open-v3"."""
    return tuple(ALL_V3_ENVIRONMENTS)


def scripted_policy(task: str) -> ScriptedPolicy:
    """A new instance of the package's own expert for `task`.

    Its `get_action` writes into the observation that it is given: hand it a copy.
    """
    policy: ScriptedPolicy = ENV_POLICY_MAP[check_task(task)]()  # type: ignore[abstract]
    return policy


def bare_env(task: str) -> SawyerXYZEnv:
    """The package's environment for `task`: goal observable, and drawn from its own generator at every reset."""
    bare = ALL_V3_ENVIRONMENTS[task]()
    bare._partially_observable = False
    bare._freeze_rand_vec = False
    bare.seeded_rand_vec = True
    bare._set_task_called = True
    # The space was cached by the constructor, for a hidden goal.
    del bare.sawyer_observation_space
    return bare


def check_task(task: str) -> str:
    """`task`, if there is such a task.

    Raises:
        ValueError: there is none.
    """
    if task not in ALL_V3_ENVIRONMENTS:
        raise ValueError(f"Meta-World has no task {task!r}{suggestion(task, tasks())}")
    return task


class MetaWorldEnv(Env):
    """One Meta-World task with the goal in the observation; object and goal are drawn anew at every reset.

    An episode never terminates; `info["success"]` tells whether the task is solved in the state just reached.

    A state is [task, seed, steps taken, the task's memory or -1, the previous frame (18), the physics (about 60)]. The
    seed stands for all that a reset draws, so putting back a state of another episode costs a reset; a state does not
    hold the horizon.

    Args:
        task: one of `tasks()`.
        horizon: steps after which an episode is truncated.
        camera: what `render` looks through: "corner4" shows arm and table from the front right, "corner2" from further
            away; "corner", "corner3", "topview", "behindGripper" and "gripperPOV" are there too.
        image_size: height and width of the images, in pixels.
        camera_position: where to put the camera, in metres in the frame of what it is fixed to (the scene, but for the
            two of the gripper); it keeps its orientation. None leaves it where it is.
        camera_fovy: the camera's vertical field of view, in degrees; None leaves it as it is.

    Raises:
        ValueError: there is no such task or camera, the horizon is below 1, or a number about the camera is none.
    """

    def __init__(
        self,
        task: str,
        horizon: int = 500,
        camera: str = "corner4",
        image_size: int = 256,
        camera_position: Sequence[float] | None = None,
        camera_fovy: float | None = None,
    ) -> None:
        if horizon < 1:
            raise ValueError(f"a horizon of {horizon} steps was asked for; it must be at least 1.")
        if image_size < 1:
            raise ValueError(f"images of {image_size} pixels were asked for; they need at least 1.")
        self._task_index = tasks().index(check_task(task))
        self.config = {
            "name": f"metaworld/{task}",
            "horizon": horizon,
            "camera": camera,
            "image_size": image_size,
            **({} if camera_position is None else {"camera_position": [float(each) for each in camera_position]}),
            **({} if camera_fovy is None else {"camera_fovy": float(camera_fovy)}),
        }
        self.image_shape = (image_size, image_size, 3)
        self._horizon = horizon
        self._camera = camera
        self._image_size = image_size
        self._bare = bare = bare_env(task)
        self._model, self._data = bare.model, bare.data
        cameras = tuple(bare.model.camera(index).name for index in range(bare.model.ncam))
        if camera not in cameras:
            raise ValueError(f"Meta-World has no camera {camera!r}{suggestion(camera, cameras)}")
        _place_camera(bare.model, cameras.index(camera), camera_position, camera_fovy)
        self._hand = bare.data.body("hand").xpos
        self._right_claw = bare.data.body("rightclaw").xpos
        self._left_claw = bare.data.body("leftclaw").xpos
        self._start = _Start(bare)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.observation_space = bare.sawyer_observation_space
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 80}
        self._state_size = _FRAME.stop + int(mujoco.mj_stateSize(self._model, _PHYSICS))
        self._episode: int | None = None
        self._steps = 0
        self._previous = self._current = np.zeros(18)
        self._renderer: FlatRenderer | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode; without a seed, one is drawn from the environment's own random stream.

        Raises:
            ValueError: the seed is negative or above `LARGEST_SEED`.
        """
        self._begin(self.draw_seed(seed))
        observation = self._observe()
        memory = getattr(self._bare, _MEMORY, None)
        _, info = self._bare.evaluate_state(observation.copy(), np.zeros(4, np.float32))
        self._remember(memory)
        return observation, _plain(info)

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Moves the arm for 12.5 ms; an action beyond the action space is clipped to it.

        Raises:
            ValueError: the action is not finite or has another shape than (4,).
            RuntimeError: the episode is over, or none was begun.
        """
        if self._episode is None or self._steps >= self._horizon:
            raise RuntimeError("there is no episode to continue: call reset before step.")
        action = check_action(action, self.action_space)
        self._simulate(action)
        self._steps += 1
        self._previous, self._current = self._current, self._frame()
        observation = self._observe()
        reward, info = self._bare.evaluate_state(observation.copy(), action)
        return observation, float(reward), False, self._steps >= self._horizon, _plain(info)

    def get_state(self) -> State:
        if self._episode is None:
            raise RuntimeError("there is no state to get: call reset first.")
        state = np.empty(self._state_size)
        memory = getattr(self._bare, _MEMORY, None)
        state[:_HEADER] = self._task_index, self._episode, self._steps, _NO_MEMORY if memory is None else memory
        state[_FRAME] = self._previous
        mujoco.mj_getState(self._model, self._data, state[_FRAME.stop :], _PHYSICS)
        return state

    def set_state(self, state: State) -> Observation:
        if state.shape != (self._state_size,) or state[0] != self._task_index:
            raise ValueError(f"this is not a state of {self.config['name']}: those have {self._state_size} numbers.")
        episode, steps, memory = int(state[1]), int(state[2]), float(state[3])
        if episode != self._episode:
            self._begin(episode)
        self._steps = steps
        self._remember(None if memory == _NO_MEMORY else memory)
        mujoco.mj_setState(self._model, self._data, state[_FRAME.stop :], _PHYSICS)
        # Not mj_forward, which would replace the solver's warm start, and with it the last bits of what follows.
        mujoco.mj_fwdPosition(self._model, self._data)
        self._previous, self._current = state[_FRAME].copy(), self._frame()
        return self._observe()

    def render(self) -> npt.NDArray[np.uint8]:
        """The scene through the environment's camera, [H, W, 3].

        Raises:
            RuntimeError: this machine has no OpenGL library that can draw.
        """
        if self._renderer is None:
            self._renderer = FlatRenderer(self._model, self._image_size, self._image_size)
        image = self._renderer.render(self._data, self._camera)
        return np.ascontiguousarray(image[::-1, ::-1]) if self._camera in _UPSIDE_DOWN else image

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _begin(self, seed: int) -> None:
        """Puts the scene where the episode of this seed begins."""
        self._start.restore()
        self._bare.np_random = np.random.default_rng(seed)
        self._bare.reset_model()
        mujoco.mj_fwdPosition(self._model, self._data)
        self._previous = self._current = self._frame()
        self._episode = seed
        self._steps = 0

    def _simulate(self, action: Action) -> None:
        """Drags the hand and drives the gripper, to the same bits as the package's own step."""
        bare, data = self._bare, self._data
        target = data.mocap_pos[0] + action[:3] * bare.action_scale
        data.mocap_pos[0] = np.minimum(np.maximum(target, bare.mocap_low), bare.mocap_high)
        data.mocap_quat[0] = 1, 0, 1, 0
        data.ctrl[:] = action[3], -action[3]
        mujoco.mj_step(self._model, data, nstep=bare.frame_skip)
        mujoco.mj_forward(self._model, data)

    def _frame(self) -> Observation:
        """Hand, gripper and objects as they are now, [18]."""
        frame = np.zeros(18)
        frame[:3] = self._hand
        frame[3] = min(float(np.linalg.norm(self._right_claw - self._left_claw)) / 0.1, 1.0)
        positions = self._bare._get_pos_objects()
        quaternions = self._bare._get_quat_objects()
        for index in range(len(positions) // 3):
            at = 4 + 7 * index
            frame[at : at + 3] = positions[3 * index : 3 * index + 3]
            frame[at + 3 : at + 7] = quaternions[4 * index : 4 * index + 4]
        return frame

    def _observe(self) -> Observation:
        """The observation of the present and the previous frame, [39]."""
        observation = np.concatenate((self._current, self._previous, self._bare._get_pos_goal()))
        inside: Observation = np.minimum(
            np.maximum(observation, self.observation_space.low), self.observation_space.high
        )
        return inside

    def _remember(self, memory: float | None) -> None:
        if hasattr(self._bare, _MEMORY):
            setattr(self._bare, _MEMORY, memory)


class _Start:
    """What every episode of a task starts from: the scene as loaded, with the arm in its starting pose.

    Taken once from a new `bare` environment, whose own way of moving the arm there it then replaces.
    """

    def __init__(self, bare: SawyerXYZEnv) -> None:
        self._bare = bare
        self._attributes = {name: value for name, value in vars(bare).items() if _is_own_value(value)}
        self._body_positions = bare.model.body_pos.copy()
        self._site_positions = bare.model.site_pos.copy()
        mujoco.mj_resetData(bare.model, bare.data)
        bare._reset_hand()
        self._physics = np.empty(mujoco.mj_stateSize(bare.model, _PHYSICS))
        mujoco.mj_getState(bare.model, bare.data, self._physics, _PHYSICS)
        vars(bare)["_reset_hand"] = self._place_hand

    def restore(self) -> None:
        """Undoes what an episode has changed in the model and in the task's attributes."""
        for name, value in self._attributes.items():
            setattr(self._bare, name, value.copy() if isinstance(value, np.ndarray) else value)
        self._bare.model.body_pos[:] = self._body_positions
        self._bare.model.site_pos[:] = self._site_positions

    def _place_hand(self) -> None:
        bare = self._bare
        mujoco.mj_setState(bare.model, bare.data, self._physics, _PHYSICS)
        mujoco.mj_forward(bare.model, bare.data)
        bare.init_tcp = bare.tcp_center


def _place_camera(model: mujoco.MjModel, index: int, position: Sequence[float] | None, fovy: float | None) -> None:
    if position is not None:
        if len(position) != 3 or not np.isfinite(position).all():
            raise ValueError(f"a camera's position is three finite numbers, not {list(position)}.")
        model.cam_pos[index] = position
    if fovy is not None:
        if not 0 < fovy < 180:
            raise ValueError(f"a camera's field of view lies between 0 and 180 degrees, not {fovy}.")
        model.cam_fovy[index] = fovy


def _is_own_value(value: object) -> bool:
    """Whether `value` is a number, None, or an array that is not a window into the simulator's memory."""
    if isinstance(value, np.ndarray):
        return value.base is None
    return value is None or isinstance(value, bool | int | float)


def _plain(info: dict[str, Any]) -> dict[str, Any]:
    """`info` with plain floats, and success as a bool."""
    plain: dict[str, Any] = {name: float(value) for name, value in info.items()}
    plain["success"] = bool(info["success"])
    return plain
