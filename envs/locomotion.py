"""Gymnasium's MuJoCo robots that are to move forward (v5), plain or with a command for how to move.

Hopper, Walker2d, HalfCheetah, Ant and Humanoid, with Gymnasium's own dynamics and rewards, to the bit. An observation
is the positions of root and joints, without how far the robot has come (the root's x, in Ant and Humanoid x and y),
then their velocities, which Hopper and Walker2d cut off at 10. It is a function of the state: Ant and Humanoid leave
out what Gymnasium adds by default of forces and inertias, and have 27 and 45 numbers in place of 105 and 348. Actions
lie in [-1, 1] in every task and are scaled to the bounds of the actuators, which are 0.4 in Humanoid and 1 elsewhere.

With commands, such as `{"speed": [0.0, 3.0], "height": [0.9, 1.3]}`, every episode draws one value of each, the
observation ends with them (`append_command`), and the reward is

    alive - |v_x - speed| - 5 |z - height| - the task's own cost of control,

where alive is 5 while the robot is healthy in the sense of the task, v_x the mean velocity of the step and z the height
of the torso. One such policy, told many commands, gives behaviour of known and varied kind: the data that learners of
attributes need (AlignDiff; Dong et al., arXiv 2310.02054). `window_attributes` measures what became of it.

`info` has, of the state just reached and the step that led there:

| name | what | where |
| --- | --- | --- |
| x_velocity | displacement of the torso in the step, by its duration, in m/s; 0 after a reset | all |
| torso_height | of the torso's origin above the ground, in m | all but HalfCheetah |
| foot_separation | x of the right foot's centre less that of the left (HalfCheetah: front less back), in m | two feet |
| left_contact, right_contact | 1 if the foot is in contact with the ground, else 0 | Walker2d, Humanoid |
| back_contact, front_contact | the same | HalfCheetah |
| foot_contact | the same | Hopper |
| healthy | whether the task calls the robot healthy; always true in HalfCheetah, which does not ask | all |
| task_reward | Gymnasium's own reward of the step; 0 after a reset | all |
| control_cost | what it took off for the action; 0 after a reset | all |
| command_speed, command_height | what was commanded, in m/s and m | with commands |

The Ant stands on four feet, of which nothing is reported.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv, mass_center
from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv
from jaxtyping import Float, Int, Shaped

from envs import suggestion
from envs.env import Action, Env, Observation, State, check_action
from robopref.rendering import FlatRenderer

COMMANDS = ("speed", "height")
"""What can be commanded, in the order in which observations have it: JSON objects have no order of their own."""

ALIVE_REWARD = 5.0
"""More than the errors of a robot that merely stands: no early end is worth having."""

SPEED_WEIGHT = 1.0

HEIGHT_WEIGHT = 5.0
"""Per m, and 1 per m/s: heights differ by tenths of a metre where speeds differ by metres, so 0.2 m off cost as much as
1 m/s off."""

STRIDE_PERCENTILE = 95.0

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "Hopper": ("speed", "height"),
    "Walker2d": ("speed", "height", "stride", "leg_preference"),
    "HalfCheetah": ("speed", "stride", "leg_preference"),
    "Ant": ("speed", "height"),
    "Humanoid": ("speed", "height", "stride", "leg_preference"),
}
"""What `window_attributes` measures in each task."""

_FEET_IN_CONTACT = (("left_contact", "right_contact"), ("back_contact", "front_contact"))
_PHYSICS = int(mujoco.mjtState.mjSTATE_FULLPHYSICS | mujoco.mjtState.mjSTATE_WARMSTART)
_HEADER = 3
_CAMERA = "track"


@dataclass(frozen=True)
class _Task:
    """What tells one of Gymnasium's tasks from the others.

    Attributes:
        make: Gymnasium's class.
        mark: the x by which Gymnasium measures progress. In Ant and Humanoid it is of where the integrator looked last,
            just before the state that it reached, and so not a function of that state.
        height: index of the torso's height among the positions, or None where it is none.
        feet: geoms by the names of the feet; of two, the separation is the second's x less the first's.
        omitted: parts of Gymnasium's observation that are no function of the state, or redundant.
        pays_for_contact: whether the reward has a cost of contact forces, which are computed for it alone.
    """

    make: Callable[..., Any]
    mark: Callable[[mujoco.MjModel, mujoco.MjData], np.float64]
    height: int | None
    feet: Mapping[str, str]
    omitted: tuple[str, ...] = ()
    pays_for_contact: bool = False


def _root(model: mujoco.MjModel, data: mujoco.MjData) -> np.float64:
    x: np.float64 = data.qpos[0]
    return x


def _torso(model: mujoco.MjModel, data: mujoco.MjData) -> np.float64:
    x: np.float64 = data.xpos[1, 0]
    return x


_mass_center: Callable[..., Any] = mass_center
"""Gymnasium's, which has no types of its own."""


def _centre_of_mass(model: mujoco.MjModel, data: mujoco.MjData) -> np.float64:
    x: np.float64 = _mass_center(model, data)[0]
    return x


_OMITTED = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
_TASKS: Mapping[str, _Task] = {
    "Hopper": _Task(HopperEnv, _root, 1, {"foot": "foot_geom"}),
    "Walker2d": _Task(Walker2dEnv, _root, 1, {"left": "foot_left_geom", "right": "foot_geom"}),
    # Its torso lies rather than stands, and its height says how it is pitched more than how it moves.
    "HalfCheetah": _Task(HalfCheetahEnv, _root, None, {"back": "bfoot", "front": "ffoot"}),
    "Ant": _Task(AntEnv, _torso, 2, {}, _OMITTED[-1:], pays_for_contact=True),
    "Humanoid": _Task(
        HumanoidEnv, _centre_of_mass, 2, {"left": "left_foot", "right": "right_foot"}, _OMITTED, pays_for_contact=True
    ),
}


def tasks() -> tuple[str, ...]:
    """The names of all tasks, such as "Walker2d"."""
    return tuple(_TASKS)


def append_command(
    observations: Float[np.ndarray, "*B O"], command: Float[np.ndarray, "*#B K"], ranges: Float[np.ndarray, "K 2"]
) -> Float[np.ndarray, "*B O+K"]:
    """What a policy sees of plain observations under a command: each value is scaled from its range to [-1, 1].

    Args:
        observations: of the task without commands.
        command: a value for each name of `LocomotionEnv.command_names`, in their units; one for all or one for each.
        ranges: `LocomotionEnv.command_ranges` of the environment in which the policy was trained. Values outside of
            them are scaled beyond [-1, 1].

    Raises:
        ValueError: there are not as many values as ranges.
    """
    if command.shape[-1] != len(ranges):
        raise ValueError(f"a command of {command.shape[-1]} values was given where {len(ranges)} have ranges.")
    low, high = ranges.T
    scaled = (2.0 * (command - low) / (high - low) - 1.0).astype(observations.dtype)
    return np.concatenate((observations, np.broadcast_to(scaled, (*observations.shape[:-1], len(ranges)))), axis=-1)


def window_attributes(
    infos: Mapping[str, Shaped[np.ndarray, " T+1"]], starts: Int[np.ndarray, " N"], length: int
) -> dict[str, Float[np.ndarray, " N"]]:
    """How the robot moved in windows of one episode: the attributes of its task (`ATTRIBUTES`), in physical units.

    A window that starts at s is the `length` steps from state s on; measured are the states that they reach, which are
    the rows s + 1 to s + `length` of the infos.

    * speed: mean velocity in x, in m/s.
    * height: mean height of the torso, in m.
    * stride: 95th percentile of the distance between the feet along x, in m.
    * leg_preference: (contact of the left foot - contact of the right) / (contact of both), counted in steps, from -1
      to 1; 0 where neither touches the ground. In HalfCheetah the back foot stands for the left one.

    Args:
        infos: `Episode.infos` of an episode of `LocomotionEnv`.
        starts: of the windows, in steps.
        length: of all windows, in steps.

    Raises:
        ValueError: a window is empty or reaches beyond the episode, or the infos are of another environment.
    """
    if "x_velocity" not in infos:
        raise ValueError("these infos have no x_velocity: attributes are measured in episodes of locomotion tasks.")
    starts, steps = np.asarray(starts), len(infos["x_velocity"]) - 1
    if not 1 <= length <= steps or (starts < 0).any() or (starts + length > steps).any():
        raise ValueError(f"windows of {length} steps, from {starts.tolist()}, are not inside of an episode of {steps}.")

    def windows(name: str) -> Float[np.ndarray, "N L"]:
        rows = np.asarray(infos[name], np.float64)[1:]
        chosen: Float[np.ndarray, "N L"] = np.lib.stride_tricks.sliding_window_view(rows, length)[starts]
        return chosen

    measured = {"speed": windows("x_velocity").mean(axis=1)}
    if "torso_height" in infos:
        measured["height"] = windows("torso_height").mean(axis=1)
    if "foot_separation" in infos:
        measured["stride"] = np.percentile(np.abs(windows("foot_separation")), STRIDE_PERCENTILE, axis=1)
    for first, second in _FEET_IN_CONTACT:
        if first in infos:
            one, other = windows(first).sum(axis=1), windows(second).sum(axis=1)
            measured["leg_preference"] = (one - other) / np.maximum(one + other, 1.0)
    return measured


class LocomotionEnv(Env):
    """One of Gymnasium's robots; where the episode of a seed begins is where Gymnasium's own of that seed does.

    A state is [a checksum of task and commands, steps taken, the mark from which Gymnasium measures the next step, the
    command (K), the physics]; it does not hold the horizon, nor whether falling ends an episode.

    Args:
        task: one of `tasks()`.
        horizon: steps after which an episode is truncated.
        terminate_when_unhealthy: whether an episode terminates once the robot is unhealthy, as Gymnasium's do.
        commands: the range, [low, high], of each attribute of `COMMANDS` that is commanded, in m/s and m.
        image_size: height and width of the images, in pixels.

    Attributes:
        command_names: the attributes that are commanded, in the order of `COMMANDS`.
        command_ranges: their ranges, for `append_command`.

    Raises:
        ValueError: there is no such task; it has no such command or no health; a range is none; or the horizon or image
            size is below 1.
    """

    def __init__(
        self,
        task: str,
        horizon: int = 1000,
        terminate_when_unhealthy: bool = False,
        commands: Mapping[str, Sequence[float]] | None = None,
        image_size: int = 256,
    ) -> None:
        if task not in _TASKS:
            raise ValueError(f"there is no locomotion task {task!r}{suggestion(task, tasks())}")
        if horizon < 1 or image_size < 1:
            raise ValueError(
                f"a horizon of {horizon} steps and images of {image_size} pixels: both must be at least 1."
            )
        self._task = described = _TASKS[task]
        self._bare = bare = described.make(**{f"include_{name}_in_observation": False for name in described.omitted})
        self._asks_for_health = hasattr(bare, "is_healthy")
        if terminate_when_unhealthy and not self._asks_for_health:
            raise ValueError(f"{task} knows no unhealthy state that could terminate an episode.")
        ranges = _check_commands(task, commands or {})
        self.command_names = tuple(ranges)
        self.command_ranges: Float[np.ndarray, "K 2"] = np.array(list(ranges.values()), np.float64).reshape(-1, 2)
        self.config = {
            "name": f"locomotion/{task}",
            "horizon": horizon,
            "terminate_when_unhealthy": bool(terminate_when_unhealthy),
            "image_size": image_size,
            **({"commands": ranges} if ranges else {}),
        }
        self.image_shape = (image_size, image_size, 3)
        self._horizon = horizon
        self._terminates = bool(terminate_when_unhealthy)
        self._model, self._data = bare.model, bare.data
        self._duration: float = bare.dt
        self._feet = [_Foot(self._model, self._data, f"{name}_contact", geom) for name, geom in described.feet.items()]
        self._checksum = float(zlib.crc32(json.dumps([task, list(ranges.items())]).encode()))
        self._scale = bare.action_space.high
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, self._scale.shape, np.float32)
        plain, given = bare.observation_space.shape[0], np.ones(len(ranges))
        high = np.concatenate((np.full(plain, np.inf), given))
        self.observation_space = gymnasium.spaces.Box(-high, high, dtype=np.float64)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(1.0 / self._duration)}
        self._physics_at = _HEADER + len(ranges)
        self._state_size = self._physics_at + int(mujoco.mj_stateSize(self._model, _PHYSICS))
        self._begun = self._terminated = False
        self._steps = 0
        self._mark = np.float64(0.0)
        self._give(np.zeros(len(ranges)))
        self._renderer: FlatRenderer | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode; without a seed, one is drawn from the environment's own random stream.

        Raises:
            ValueError: the seed is negative or above `LARGEST_SEED`.
        """
        random = np.random.default_rng(self.draw_seed(seed))
        bare = self._bare
        bare.np_random = random
        mujoco.mj_resetData(self._model, self._data)
        bare.reset_model()
        self._mark = self._task.mark(self._model, self._data)
        # After the start, which is thereby the same with commands and without.
        low, high = self.command_ranges.T
        self._give(random.uniform(low, high))
        self._steps, self._begun, self._terminated = 0, True, False
        return self._observe(), self._info(0.0, self._is_healthy(), 0.0, 0.0)

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Applies one action for 8 to 50 ms, as the task has it; beyond the action space it is clipped to it.

        Raises:
            ValueError: the action is not finite or has another shape than the action space.
            RuntimeError: the episode is over, or none was begun.
        """
        if not self._begun or self._terminated or self._steps >= self._horizon:
            raise RuntimeError("there is no episode to continue: call reset before step.")
        applied = check_action(action, self.action_space) * self._scale
        bare, model, data = self._bare, self._model, self._data
        x = data.qpos[0]
        data.ctrl[:] = applied
        mujoco.mj_step(model, data, nstep=bare.frame_skip)
        if self._task.pays_for_contact:
            mujoco.mj_rnePostConstraint(model, data)
        # Before anything else of this state is computed, which would move what Gymnasium's rewards are read off.
        mark = self._task.mark(model, data)
        gained, terms = bare._get_rew((mark - self._mark) / self._duration, applied)
        self._mark = mark
        self._steps += 1
        healthy = bool(terms.get("reward_survive", True))
        self._terminated = self._terminates and not healthy
        x_velocity = float(data.qpos[0] - x) / self._duration
        info = self._info(x_velocity, healthy, float(gained), -float(terms["reward_ctrl"]))
        reward = self._commanded_reward(info) if self._commanded else info["task_reward"]
        return self._observe(), reward, self._terminated, self._steps >= self._horizon, info

    def get_state(self) -> State:
        if not self._begun:
            raise RuntimeError("there is no state to get: call reset first.")
        state = np.empty(self._state_size)
        state[:_HEADER] = self._checksum, self._steps, self._mark
        state[_HEADER : self._physics_at] = self._command
        mujoco.mj_getState(self._model, self._data, state[self._physics_at :], _PHYSICS)
        return state

    def set_state(self, state: State) -> Observation:
        if state.shape != (self._state_size,) or state[0] != self._checksum or not np.isfinite(state).all():
            raise ValueError(
                f"this is not a state of {self.config['name']} with its commands: those are {self._state_size} finite "
                "numbers, the first a checksum of both."
            )
        self._steps, self._mark = int(state[1]), np.float64(state[2])
        self._give(state[_HEADER : self._physics_at].copy())
        mujoco.mj_setState(self._model, self._data, state[self._physics_at :], _PHYSICS)
        self._begun, self._terminated = True, self._terminates and not self._is_healthy()
        return self._observe()

    def render(self) -> npt.NDArray[np.uint8]:
        """The robot from its right side, through a camera that moves along with it, [H, W, 3].

        Raises:
            RuntimeError: this machine has no OpenGL library that can draw.
        """
        if self._renderer is None:
            size = self.image_shape[0]
            self._renderer = FlatRenderer(self._model, size, size)
        # Not mj_forward, which would replace the solver's warm start, and with it the last bits of what follows.
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)
        return self._renderer.render(self._data, _CAMERA)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _give(self, command: Float[np.ndarray, " K"]) -> None:
        self._command = command
        self._commanded: dict[str, float] = dict(zip(self.command_names, command.tolist(), strict=True))
        # Scaled once per episode: appended to nothing.
        self._appended = append_command(np.empty(0), command, self.command_ranges)

    def _is_healthy(self) -> bool:
        return not self._asks_for_health or bool(self._bare.is_healthy)

    def _observe(self) -> Observation:
        plain: Observation = self._bare._get_obs()
        return np.concatenate((plain, self._appended)) if self._commanded else plain

    def _info(self, x_velocity: float, healthy: bool, task_reward: float, control_cost: float) -> dict[str, Any]:
        info: dict[str, Any] = {"x_velocity": x_velocity}
        if self._task.height is not None:
            info["torso_height"] = float(self._data.qpos[self._task.height])
        if self._feet:
            # A step leaves the places of bodies where the integrator looked last; this moves them to where they are.
            mujoco.mj_kinematics(self._model, self._data)
            for foot in self._feet:
                info[foot.name] = foot.contact()
            if len(self._feet) == 2:
                info["foot_separation"] = self._feet[1].x() - self._feet[0].x()
        info["healthy"], info["task_reward"], info["control_cost"] = healthy, task_reward, control_cost
        for name, value in self._commanded.items():
            info[f"command_{name}"] = value
        return info

    def _commanded_reward(self, info: Mapping[str, Any]) -> float:
        reward = ALIVE_REWARD * info["healthy"] - info["control_cost"]
        if "speed" in self._commanded:
            reward -= SPEED_WEIGHT * abs(info["x_velocity"] - self._commanded["speed"])
        if "height" in self._commanded:
            reward -= HEIGHT_WEIGHT * abs(info["torso_height"] - self._commanded["height"])
        return float(reward)


class _Foot:
    """A sphere or capsule that may touch the ground, which is the plane z = 0 in all models."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, name: str, geom: str) -> None:
        self.name = name
        index, floor = model.geom(geom).id, model.geom("floor").id
        self._position, self._axis = data.geom_xpos[index], data.geom_xmat[index]
        radius, half_length, _ = model.geom_size[index].tolist()
        self._half_length = half_length
        # MuJoCo's contacts begin at the greater margin of the two.
        self._reach = radius + max(model.geom_margin[index].item(), model.geom_margin[floor].item())

    def x(self) -> float:
        return float(self._position[0])

    def contact(self) -> float:
        """1.0 if its lowest point is on the ground or below, else 0.0."""
        lowest = self._position[2] - self._half_length * abs(self._axis[8])
        return float(lowest <= self._reach)


def _check_commands(task: str, commands: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The ranges in the order of `COMMANDS`, as JSON values."""
    if not isinstance(commands, Mapping):
        raise ValueError(f'commands are ranges by name, such as {{"speed": [0.0, 3.0]}}, not {commands!r}.')
    known = COMMANDS if _TASKS[task].height is not None else COMMANDS[:1]
    for name, given in commands.items():
        if name not in known:
            raise ValueError(f"{task} cannot be commanded a {name!r}{suggestion(name, known)}")
        if len(given) != 2 or not all(math.isfinite(each) for each in given) or not given[0] < given[1]:
            raise ValueError(f"the range of the command {name!r} is {list(given)}; it must be [low, high], low < high.")
    return {name: [float(each) for each in commands[name]] for name in COMMANDS if name in commands}
