"""robosuite's manipulation tasks (Zhu et al., arXiv:2009.12293), in which robomimic's datasets were recorded.

An environment is made by name, `{"name": "robosuite/Lift"}`, or as the one that made a robomimic file, from the
`env_args` which that file carries (`from_env_args`). Its observation is the named parts that the caller chooses, joined
in the caller's order. By default these are the parts, and the order, that robomimic learns from: position and
quaternion of the hand, positions of the fingers, and "object", which robosuite itself calls "object-state".

Nothing is drawn on a display, and nothing but `reset` draws random numbers. Departures from the package, so that
episodes follow from their seeds and observations from states:

* A reset takes all that is random from its seed, for which robosuite reads NumPy's and Python's global streams; they
  are put back.
* The model is built once, which spares most of a second per reset. In a few tasks it is random itself: the cube of
  Lift is 4.0 to 4.4 cm wide. With the argument `hard_reset: True`, which is what robosuite and robomimic's files mean
  where they say nothing, it is drawn anew at every reset in these tasks.
* Observations, rewards and success are all about the state just reached. The package's own step reports what its
  sensors saw some milliseconds before, and of objects in the frame of the hand, where they were an observation earlier.
  What robomimic's files hold is read off the states too.

Steps move robot and objects as the package does, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import logging
import math
import os
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from envs import suggestion
from envs.env import Action, Env, Observation, State, check_action
from robopref.rendering import VARIABLE, FlatRenderer

ROBOSUITE_TYPE = 1
"""What `env_args` of a robomimic file have as `type` where the environment is one of robosuite."""

_OURS = frozenset(
    (
        *("camera_depths", "camera_heights", "camera_names", "camera_segmentations", "camera_widths"),
        *("has_offscreen_renderer", "has_renderer", "horizon", "ignore_done", "render_camera", "render_collision_mesh"),
        *("render_gpu_device_id", "render_visual_mesh", "renderer", "renderer_config", "seed", "use_camera_obs"),
    )
)
"""Arguments of robosuite that are about drawing and the ends of episodes, of which the environment here takes care."""

_HEADLESS = {
    "has_renderer": False,
    "has_offscreen_renderer": False,
    "use_camera_obs": False,
    "ignore_done": True,
    "renderer": "mujoco",
}

_NOT_HERE = {"Wipe": "it keeps what has been wiped outside of the simulator's state, which could not be put back"}

_ROBOT_PARTS = ("eef_pos", "eef_quat", "gripper_qpos")
_OBJECT = ("object", "object-state")

_PHYSICS = int(
    mujoco.mjtState.mjSTATE_FULLPHYSICS
    | mujoco.mjtState.mjSTATE_WARMSTART
    | mujoco.mjtState.mjSTATE_CTRL
    | mujoco.mjtState.mjSTATE_QFRC_APPLIED
    | mujoco.mjtState.mjSTATE_EQ_ACTIVE
    | mujoco.mjtState.mjSTATE_MOCAP_POS
    | mujoco.mjtState.mjSTATE_MOCAP_QUAT
)
_HEADER = 3
_COLLISION_GEOMETRY = 0

_RECOMPUTED = frozenset(
    (
        *("J_full", "J_ori", "J_pos", "initial_ref_ori_mat", "initial_ref_pos", "joint_pos", "joint_vel"),
        *("mass_matrix", "ref_ori_mat", "ref_ori_vel", "ref_pos", "ref_pos_vel", "torques", "vels"),
    )
)
"""What controllers read off the physics, or hand to it, anew in every physics step; two of them are others' arrays."""

_HELPERS = ("robosuite.utils.buffers", "robosuite.utils.traj_utils")
"""Modules of what controllers filter and interpolate with."""

_GRIPPER = "/gripper"

_SINGLE_THINGS = {
    "NutAssemblyRound": "RoundNut",
    "NutAssemblySquare": "SquareNut",
    "PickPlaceBread": "Bread",
    "PickPlaceCan": "Can",
    "PickPlaceCereal": "Cereal",
    "PickPlaceMilk": "Milk",
}
"""What "object" is about in tasks where robosuite 1.5 changed the order of its parts."""


class _Leaf(NamedTuple):
    """A number or an array that an object remembers: which object, which attribute, and of what shape and type."""

    holder: str
    name: str
    shape: tuple[int, ...]
    kind: Any

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def tasks() -> tuple[str, ...]:
    """The names of all tasks, such as "PickPlaceCan".

    Raises:
        ModuleNotFoundError: robosuite is not installed.
    """
    return tuple(sorted(set(_package().environments.ALL_ENVIRONMENTS) - _NOT_HERE.keys()))


def from_env_args(
    env_args: Mapping[str, Any], *, keys: Sequence[str] | None = None, horizon: int | None = None, **others: Any
) -> dict[str, Any]:
    """The configuration, for `envs.make`, of the environment that a robomimic file says it was recorded in.

    Files older than robosuite 1.5 are met halfway: actions move the hand along the axes of the world, physics is
    stepped as it was then, and "object" has its parts in the order that it had for single objects and nuts.

    Args:
        env_args: the file's `env_args`: `env_name`, `type`, `env_kwargs` and mostly `env_version`.
        keys: parts of an observation in their order, such as `tuple(source.keys)` of the file's reader.
        horizon: steps after which an episode is truncated; by default the file's, or else 400.
        others: more of `RobosuiteEnv`'s arguments.

    Raises:
        ValueError: these are no such arguments, or not those of robosuite.
    """
    task, arguments = env_args.get("env_name"), env_args.get("env_kwargs", {})
    if not isinstance(task, str) or not isinstance(arguments, Mapping):
        raise ValueError(
            f"env_args of a robomimic file have a name, env_name, and arguments, env_kwargs; not {dict(env_args)}."
        )
    if env_args.get("type", ROBOSUITE_TYPE) != ROBOSUITE_TYPE:
        raise ValueError(
            f"the environment {task!r} has type {env_args['type']!r} in env_args, and only {ROBOSUITE_TYPE},"
            " robosuite's, can be made here."
        )
    config: dict[str, Any] = {"name": f"robosuite/{task}", **others}
    kept = {"hard_reset": True} | {name: value for name, value in arguments.items() if name not in _OURS}
    if _older_than_1_5(env_args):
        # In 1.5, lite_physics spares a computation, and with it the last bits of what older versions did.
        kept.setdefault("lite_physics", False)
        keys = _older_keys(task, keys)
    if horizon is None:
        horizon = arguments.get("horizon")
    chosen = {"horizon": horizon, "keys": None if keys is None else list(keys), "arguments": kept}
    return config | {name: value for name, value in chosen.items() if value is not None}


def to_env_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a robomimic file says of the environment of this configuration, so that robomimic can make it too.

    Raises:
        ValueError: it is not an environment of robosuite.
        ModuleNotFoundError: robosuite is not installed.
    """
    family, _, task = str(config.get("name", "")).partition("/")
    if family != "robosuite" or not task:
        raise ValueError(f"{config.get('name')!r} is not an environment of robosuite; those are called robosuite/...")
    defaults = {"robots": _default_robots(task), "control_freq": 20, "hard_reset": False}
    return {
        "env_name": task,
        "env_version": str(_package().__version__),
        "type": ROBOSUITE_TYPE,
        "env_kwargs": {
            "has_renderer": False,
            "has_offscreen_renderer": False,
            "ignore_done": True,
            "use_object_obs": True,
            "use_camera_obs": False,
            **({"horizon": config["horizon"]} if "horizon" in config else {}),
            **defaults,
            **config.get("arguments", {}),
        },
    }


class RobosuiteEnv(Env):
    """One robosuite task; what is random is drawn anew at every reset.

    `info["success"]` tells whether the task is solved in the state just reached, which does not end an episode.

    A state is [a checksum of task and arguments, seed, steps taken, physics, what sensors of force read, what
    controllers and grippers remember]. The seed stands for all that a reset draws, so putting back a state of another
    episode, or the first one, costs a reset; a state does not hold the horizon. The numbers that robomimic's files call
    states are a part of it (`flat_states`).

    Args:
        task: one of `tasks()`.
        horizon: steps after which an episode is truncated; robomimic's for Lift, Can and Square by default.
        keys: the parts of an observation, in their order; by default "robot0_eef_pos", "robot0_eef_quat" and
            "robot0_gripper_qpos" (of all robots and arms, where there are more) and "object". Two names for the same
            part are "object" and "object-state".
        camera: what `render` looks through: "agentview", "frontview", "birdview", "sideview", "robot0_robotview" or
            "robot0_eye_in_hand".
        image_size: height and width of the images, in pixels.
        arguments: the task's own, by their names in robosuite, such as robots ("Panda" by default), controller_configs,
            control_freq or reward_shaping; as JSON values. Controllers may be described as before robosuite 1.5.

    Attributes:
        keys: the parts of an observation, with the size of each.

    Raises:
        ModuleNotFoundError: robosuite is not installed.
        ValueError: there is no such task, part or camera, a number is below 1, or robosuite refuses the arguments.
    """

    keys: Mapping[str, int]

    def __init__(
        self,
        task: str,
        horizon: int = 400,
        keys: Sequence[str] | None = None,
        camera: str = "agentview",
        image_size: int = 256,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        if horizon < 1 or image_size < 1:
            raise ValueError(
                f"a horizon of {horizon} steps and images of {image_size} pixels: both must be at least 1."
            )
        if task in _NOT_HERE:
            raise ValueError(f"robosuite's {task} is not among the tasks here: {_NOT_HERE[task]}.")
        if task not in tasks():
            raise ValueError(f"robosuite has no task {task!r}{suggestion(task, tasks())}")
        given = json.loads(json.dumps(dict(arguments or {})))
        self._bare = bare = _build(task, given)
        self._checksum = float(zlib.crc32(json.dumps([task, given], sort_keys=True).encode()))
        self._horizon = horizon
        self._camera = camera
        self._image_size = image_size
        self._renderer: FlatRenderer | None = None
        self._episode: int | None = None
        self._steps = 0
        self._substeps = int(bare.control_timestep / bare.model_timestep)
        bare.hard_reset = bare.hard_reset and _is_redrawn(bare)
        with _drawing_from(0):
            bare.reset()
        parts = _parts(bare)
        chosen = _default_keys(parts) if keys is None else tuple(keys)
        _check_keys(task, chosen, parts)
        self._sources = tuple(_OBJECT[1] if key in _OBJECT else key for key in chosen)
        self.keys = {key: parts[source].size for key, source in zip(chosen, self._sources, strict=True)}
        low, high = (np.asarray(bound, np.float32) for bound in bare.action_spec)
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (sum(self.keys.values()),), np.float64)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(bare.control_freq)}
        self.image_shape = (image_size, image_size, 3)
        self.config = {
            "name": f"robosuite/{task}",
            "horizon": horizon,
            "keys": list(chosen),
            "camera": camera,
            "image_size": image_size,
            "arguments": given,
        }
        cameras = tuple(self._model.camera(index).name for index in range(self._model.ncam))
        if camera not in cameras:
            raise ValueError(f"robosuite's {task} has no camera {camera!r}{suggestion(camera, cameras)}")
        # Some of what controllers keep comes into being in the first step.
        self._simulate(np.asarray((low + high) / 2, np.float32))
        self._leaves = _find_leaves(bare)
        self._physics_size = int(mujoco.mj_stateSize(self._model, _PHYSICS))
        self._memory_size = sum(leaf.size for leaf in self._leaves)
        self._state_size = _HEADER + self._physics_size + self._model.nsensordata + self._memory_size

    @property
    def model_xml(self) -> str:
        """The present episode's model, as robomimic's files keep it (`model_file`)."""
        return str(self._bare.sim.model.get_xml())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode; without a seed, one is drawn from the environment's own random stream.

        Raises:
            ValueError: the seed is negative or above `LARGEST_SEED`.
        """
        self._begin(self.draw_seed(seed))
        return self._observe(), self._info()

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Lets the robot act for a control period (50 ms, unless `control_freq` says otherwise).

        An action beyond the action space is clipped to it.

        Raises:
            ValueError: the action is not finite or has another shape than the action space.
            RuntimeError: the episode is over, or none was begun.
        """
        if self._episode is None or self._steps >= self._horizon:
            raise RuntimeError("there is no episode to continue: call reset before step.")
        self._simulate(check_action(action, self.action_space))
        self._steps += 1
        # The package's own verdict, in which the time limit has no part (`ignore_done`).
        reward, terminated, _ = self._bare._post_action(action)
        return self._observe(), float(reward), bool(terminated), self._steps >= self._horizon, self._info()

    def get_state(self) -> State:
        if self._episode is None:
            raise RuntimeError("there is no state to get: call reset first.")
        return self._state(self._episode)

    def set_state(self, state: State) -> Observation:
        if state.shape != (self._state_size,) or state[0] != self._checksum:
            raise ValueError(
                f"this is not a state of {self.config['name']} with these arguments: those have {self._state_size}"
                " numbers."
            )
        episode, steps = int(state[1]), int(state[2])
        # In an episode's first step, controllers act upon what they saw amid the reset.
        if steps == 0 or episode != self._episode:
            self._begin(episode)
        if steps > 0:
            self._steps = self._bare.timestep = steps
            physics, readings, memory = np.split(
                state[_HEADER:], np.cumsum([self._physics_size, self._model.nsensordata])
            )
            mujoco.mj_setState(self._model, self._data, physics, _PHYSICS)
            _write_leaves(self._bare, self._leaves, memory)
            # Not mj_forward, which would replace the solver's warm start, and with it the last bits of what follows.
            mujoco.mj_fwdPosition(self._model, self._data)
            self._data.sensordata[:] = readings
        return self._observe()

    def flat_states(self, states: Float[np.ndarray, "*B S"]) -> Float[np.ndarray, "*B F"]:
        """Of states, the part that robomimic's files keep: time, positions and velocities of all joints."""
        return states[..., _HEADER : _HEADER + 1 + self._model.nq + self._model.nv].copy()

    def set_flat_state(self, flat: Float[np.ndarray, " F"]) -> Observation:
        """Shows a state of a robomimic file, of which controllers and grippers know nothing; returns its observation.

        The model is that of the last reset. An episode cannot go on from here: reset, or put back a whole state.

        Raises:
            ValueError: `flat` is not a state of such a model.
        """
        model, data = self._model, self._data
        if flat.shape != (1 + model.nq + model.nv,):
            raise ValueError(
                f"a flat state of {self.config['name']} has {1 + model.nq + model.nv} numbers, not {flat.shape}."
            )
        self._episode = None
        data.time = flat[0]
        data.qpos[:], data.qvel[:] = flat[1 : 1 + model.nq], flat[1 + model.nq :]
        mujoco.mj_forward(model, data)
        return self._observe()

    def render(self) -> npt.NDArray[np.uint8]:
        """The scene through the environment's camera, [H, W, 3].

        Raises:
            RuntimeError: this machine has no OpenGL library that can draw.
        """
        if self._renderer is None:
            size = self._image_size
            self._renderer = FlatRenderer(self._model, size, size, hidden_groups=(_COLLISION_GEOMETRY,))
        return self._renderer.render(self._data, self._camera)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    @property
    def _model(self) -> mujoco.MjModel:
        return self._bare.sim.model._model

    @property
    def _data(self) -> mujoco.MjData:
        return self._bare.sim.data._data

    def _begin(self, seed: int) -> None:
        """Puts the scene where the episode of this seed begins."""
        if self._bare.hard_reset:
            # The model that it draws is about to be replaced.
            self.close()
        with _drawing_from(seed):
            self._bare.reset()
        self._episode = seed
        self._steps = 0

    def _simulate(self, action: Action) -> None:
        """One control period, to the same bits as the package's own step, but for its sensors."""
        bare, sim = self._bare, self._bare.sim
        wanted = np.asarray(action, np.float64)
        bare.timestep += 1
        for index in range(self._substeps):
            if bare.lite_physics:
                sim.step1()
            else:
                sim.forward()
            bare._pre_action(wanted, index == 0)
            if bare.lite_physics:
                sim.step2()
            else:
                sim.step()
        bare.cur_time += bare.control_timestep
        mujoco.mj_fwdPosition(self._model, self._data)

    def _observe(self) -> Observation:
        parts = _parts(self._bare)
        return np.concatenate([parts[source].ravel() for source in self._sources], dtype=np.float64)

    def _info(self) -> dict[str, Any]:
        return {"success": bool(self._bare._check_success())}

    def _state(self, episode: int) -> State:
        physics = np.empty(self._physics_size)
        mujoco.mj_getState(self._model, self._data, physics, _PHYSICS)
        # Of what robosuite's objects remember, nothing is needed where an episode begins, and some is not there yet.
        memory = _read_leaves(self._bare, self._leaves) if self._steps else np.zeros(self._memory_size)
        return np.concatenate(
            [[self._checksum, episode, self._steps], physics, self._data.sensordata, memory], dtype=np.float64
        )


def _package() -> Any:
    """robosuite, imported without the notices that it prints."""
    logging.getLogger("robosuite_logs").addFilter(_is_serious)
    chosen = os.environ.get(VARIABLE)
    try:
        return importlib.import_module("robosuite")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"robosuite cannot be imported ({error}); install it with `pip install -r requirements-robomimic.txt`."
        ) from error
    except ImportError as error:
        raise ImportError(
            f"robosuite is installed and cannot be imported ({error}); where OpenCV lacks a library, on Debian and"
            " Ubuntu: apt-get install libgl1 libglib2.0-0"
        ) from error
    finally:
        # It decides by which library MuJoCo is to draw, without looking whether the machine has it.
        os.environ.pop(VARIABLE, None)
        if chosen is not None:
            os.environ[VARIABLE] = chosen


def _is_serious(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _build(task: str, arguments: Mapping[str, Any]) -> Any:
    """The package's own environment."""
    reserved = sorted(_OURS & arguments.keys())
    if reserved:
        raise ValueError(f"robosuite's argument {reserved[0]!r} cannot be chosen here; see those of RobosuiteEnv.")
    robots = arguments.get("robots", _default_robots(task))
    wanted = {"hard_reset": False, **copy.deepcopy(dict(arguments)), "robots": robots, **_HEADLESS}
    try:
        if wanted.get("controller_configs") is not None:
            wanted["controller_configs"] = _composite_controllers(wanted["controller_configs"], robots)
        with _drawing_from(0):
            return _package().make(task, **wanted)
    except (
        AssertionError,
        AttributeError,
        IndexError,
        LookupError,
        NotImplementedError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"robosuite cannot make {task} with the arguments {dict(arguments)}: {type(error).__name__}: {error}."
        ) from error


def _default_robots(task: str) -> str | list[str]:
    return ["Panda", "Panda"] if task.startswith("TwoArm") else "Panda"


def _composite_controllers(configs: Any, robots: str | Sequence[str]) -> list[Any]:
    """For each robot, its controllers as robosuite 1.5 describes them; before, there was one, of the arm."""
    factory = importlib.import_module("robosuite.controllers.composite.composite_controller_factory")
    registered = importlib.import_module("robosuite.models.robots.robot_model").REGISTERED_ROBOTS
    names = [robots] if isinstance(robots, str) else list(robots)
    given = configs if isinstance(configs, list) else [configs] * len(names)
    return [
        factory.refactor_composite_controller_config(_arm_controller(config), name, registered[name].arms)
        for config, name in zip(given, names, strict=True)
    ]


def _arm_controller(config: Mapping[str, Any]) -> dict[str, Any]:
    """A controller of an arm, whose older description took axes and kind of its input for granted."""
    if "body_parts" in config:
        return dict(config)
    kind = "delta" if config.get("control_delta", True) else "absolute"
    return {"input_ref_frame": "world", "input_type": kind, **config}


def _older_than_1_5(env_args: Mapping[str, Any]) -> bool:
    version = re.match(r"(\d+)\.(\d+)", str(env_args.get("env_version", "")))
    if version is not None:
        return (int(version[1]), int(version[2])) < (1, 5)
    controllers = env_args.get("env_kwargs", {}).get("controller_configs")
    return isinstance(controllers, Mapping) and "body_parts" not in controllers


def _older_keys(task: str, keys: Sequence[str] | None) -> Sequence[str] | None:
    """The same parts, but "object" in the order of its own parts that it had before robosuite 1.5."""
    thing = _SINGLE_THINGS.get(task)
    if thing is None:
        return keys
    wanted = [*(f"robot0_{part}" for part in _ROBOT_PARTS), "object"] if keys is None else keys
    parts = [f"{thing}_pos", f"{thing}_quat", f"{thing}_to_robot0_eef_pos", f"{thing}_to_robot0_eef_quat"]
    return [part for key in wanted for part in (parts if key in _OBJECT else [key])]


@contextlib.contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Lets everything that is drawn from global random streams follow from `seed`, and leaves them as they were."""
    numpy_state, python_state, choice = np.random.get_state(), random.getstate(), random.choice
    np.random.seed(np.random.SeedSequence(seed).generate_state(8))
    random.seed(seed)
    # robosuite chooses from sets of names, whose order is another one in every process.
    vars(random)["choice"] = lambda names: choice(sorted(names))
    try:
        yield
    finally:
        vars(random)["choice"] = choice
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _is_redrawn(bare: Any) -> bool:
    """Whether the model itself is random; `bare` is reset in finding out."""
    built = bare.model.get_xml()
    with _drawing_from(1):
        bare.reset()
    return bool(built != bare.model.get_xml())


def _parts(bare: Any) -> dict[str, npt.NDArray[Any]]:
    """All that can be observed of the present state, by robosuite's names."""
    # Twice, because some sensors read what others measure that come after them.
    bare._update_observables(force=True)
    observed = bare._get_observations(force_update=True)
    return {name: np.asarray(value) for name, value in observed.items()}


def _default_keys(parts: Mapping[str, Any]) -> tuple[str, ...]:
    robots = (name for name in parts if name.startswith("robot") and name.endswith(_ROBOT_PARTS))
    return (*robots, *(("object",) if "object-state" in parts else ()))


def _check_keys(task: str, keys: Sequence[str], parts: Mapping[str, Any]) -> None:
    known = (*parts, *(("object",) if "object-state" in parts else ()))
    for key in keys:
        if key not in known:
            raise ValueError(f"an observation of robosuite's {task} has no part {key!r}{suggestion(key, known)}")
    if not keys or len(set(keys)) < len(keys):
        raise ValueError(f"an observation is made of different parts, and of one at least; not of {list(keys)}.")


def _holders(bare: Any) -> dict[str, Any]:
    """The objects outside of MuJoCo's state that remember something from one step to the next, by name."""
    found = {}
    for index, robot in enumerate(bare.robots):
        for part, controller in robot.part_controllers.items():
            name = f"{index}/{part}"
            found[name] = controller
            helpers = {key: value for key, value in vars(controller).items() if type(value).__module__ in _HELPERS}
            found |= {f"{name}/{key}": helpers[key] for key in sorted(helpers)}
        found |= {f"{index}/{arm}{_GRIPPER}": gripper for arm, gripper in robot.gripper.items()}
    return found


def _find_leaves(bare: Any) -> tuple[_Leaf, ...]:
    """All numbers and arrays that the holders have."""
    leaves = []
    for holder, kept in _holders(bare).items():
        names = ["current_action"] if holder.endswith(_GRIPPER) else sorted(vars(kept).keys() - _RECOMPUTED)
        for name in names:
            value = getattr(kept, name)
            if (
                isinstance(value, bool | int | float | np.generic | np.ndarray)
                and np.asarray(value).dtype.kind in "biuf"
            ):
                kind = value.dtype if isinstance(value, np.ndarray) else type(value)
                leaves.append(_Leaf(holder, name, np.shape(value), kind))
    return tuple(leaves)


def _read_leaves(bare: Any, leaves: Sequence[_Leaf]) -> State:
    holders = _holders(bare)
    values = (np.ravel(getattr(holders[leaf.holder], leaf.name)) for leaf in leaves)
    return np.concatenate([np.empty(0), *values], dtype=np.float64)


def _write_leaves(bare: Any, leaves: Sequence[_Leaf], numbers: State) -> None:
    holders, read = _holders(bare), 0
    for leaf in leaves:
        own = numbers[read : read + leaf.size]
        read += leaf.size
        array = own.reshape(leaf.shape).astype(leaf.kind) if isinstance(leaf.kind, np.dtype) else None
        setattr(holders[leaf.holder], leaf.name, leaf.kind(own[0]) if array is None else array)
