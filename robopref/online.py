"""`fit_online`: an agent that gathers its own experience, with exact resume.

Environments are stepped in lock-step, in this process or in several; between two steps the agent makes a fixed number
of updates as one jitted scan. Updates and steps overlap: while the environments take the actions that they were given,
the updates run on all transitions gathered before, so that on a machine with a GPU and many cores neither waits for
the sum of both.

A run that is killed and started again ends, on a CPU, with the same bits as one that was not. A checkpoint holds the
agent and its replay buffer, all randomness comes from the run's key and the step, and the environments, whose states
are not saved, begin new episodes at every checkpoint. The number of processes does not change the results either.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from robopref.agent import Agent, update_many
from robopref.checkpoints import fingerprint, read_checkpoint_metadata, restore_checkpoint, save_checkpoint
from robopref.datasets import TransitionDataset
from robopref.processes import end_with_parent
from robopref.progress import ProgressCallback
from robopref.replay import ReplayBuffer, RewardFunction, TrainingBatches
from robopref.rollouts import EpisodeRecorder, MakeEnv
from robopref.training import checkpoints, read_metrics, write_metrics
from robopref.types import Episode, Key, Metrics, Transitions

A = TypeVar("A", bound=Agent)


@dataclass(frozen=True)
class OnlineConfig:
    """How experience is gathered and learned from.

    Attributes:
        lanes: environments that are stepped side by side. More of them make fewer, longer scans of updates.
        random_steps: environment steps with uniformly random actions, before the first update.
        batch_size: transitions per update.
        updates_per_step: updates per environment step; times `lanes`, a whole number.
        prior_share: of each batch that is drawn from prior data, where there are any.
        reward_scale: factor on all rewards that the agent learns from. Logged returns are unscaled.
    """

    lanes: int = 8
    random_steps: int = 1000
    batch_size: int = 256
    updates_per_step: float = 1.0
    prior_share: float = 0.5
    reward_scale: float = 1.0


class OnlineState(struct.PyTreeNode, Generic[A]):
    """All that a run goes on from: the agent, what it has lived through, and environment steps made so far."""

    agent: A
    replay: ReplayBuffer
    env_steps: Int[Array, ""]

    @classmethod
    def create(cls, agent: A, replay: ReplayBuffer) -> Self:
        """Before the first step; the buffer may already hold other experience."""
        return cls(agent=agent, replay=replay, env_steps=jnp.zeros((), jnp.int32))


def fit_online(
    state: OnlineState[A],
    make_env: MakeEnv,
    key: Key,
    *,
    config: OnlineConfig,
    num_steps: int,
    prior: TransitionDataset | None = None,
    reward_function: RewardFunction | None = None,
    folder: Path | None = None,
    processes: int = 0,
    log_every: int = 1000,
    checkpoint_every: int | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    on_checkpoint: Callable[[OnlineState[A], int], None] | None = None,
    progress: ProgressCallback | None = None,
) -> OnlineState[A]:
    """Acts and learns until `num_steps` environment steps have been made in all, over all lanes together.

    Preference-based methods call it once per round of questions: episodes come from `on_episode`, the rewards of what
    is gathered from `reward_function`, and those of what was gathered before from `ReplayBuffer.relabel`.

    Args:
        state: agent and replay buffer; what the buffer holds is learned from until it is overwritten.
        make_env: makes one environment with a time limit of its own, whose actions lie in [-1, 1]; picklable if there
            are processes.
        prior: data of which `config.prior_share` of every batch is drawn.
        reward_function: a pytree that gives the rewards of new transitions in place of the environment's.
        folder: where `metrics.csv`, `checkpoint_*.safetensors` (the agent, by environment steps) and the buffer of the
            last one go. If a checkpoint of this same run is there, the run goes on from it. None keeps nothing.
        processes: worker processes among which the lanes are divided; 0 steps them all in this one.
        log_every: environment steps between two rows of metrics. Those of updates are means over the updates, those of
            episodes means over the episodes that ended by themselves; NaN where there were none.
        checkpoint_every: environment steps between checkpoints, at each of which all lanes begin new episodes; None
            saves at the end alone.
        on_episode: called with every episode, in the order of their ends; not called again for those before a
            checkpoint that a run was resumed from.
        on_checkpoint: called with the state and its environment steps after each checkpoint.
        progress: called with environment steps made and `num_steps`.

    Raises:
        ValueError: for counts that do not fit together, an environment whose spaces do not fit, a run folder that
            belongs to another run, or a metric of an update that is not finite.
        RuntimeError: a worker process died.
    """
    checkpoint_every = num_steps if checkpoint_every is None else checkpoint_every
    _check(config, prior, num_steps=num_steps, log_every=log_every, checkpoint_every=checkpoint_every)
    act_key, update_key = jax.random.split(key)
    replay = state.replay
    content = (state.agent, replay.stored(), replay.size, replay.position, state.env_steps, prior, reward_function)
    run = fingerprint((content, jax.random.key_data(key)), replay.capacity, config, checkpoint_every)
    rows: list[dict[str, float]] = []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        state = _resume(state, folder, run)
    steps = int(state.env_steps)
    if steps > num_steps:
        raise ValueError(f"{folder or 'the state'} has made {steps} steps, more than the {num_steps} asked for.")
    if steps == num_steps:
        return state
    if folder is not None:
        rows = [row for row in read_metrics(folder / "metrics.csv") if row["step"] <= steps]
    log = _Log(_metric_names(state, prior, config, key))
    agent, replay = state.agent, jax.tree.map(jnp.copy, state.replay)
    filled = int(replay.size) > 0
    num_updates = round(config.lanes * config.updates_per_step)
    with _Lanes(make_env, config.lanes, processes, np.ravel(jax.random.key_data(key)).tolist()) as lanes:
        observations = _fitting(lanes.reset(steps), replay)
        while steps < num_steps:
            actions = np.asarray(
                _choose(agent, observations, act_key, np.int32(steps), randomly=steps < config.random_steps)
            )
            lanes.send(actions, steps)
            if filled and steps >= config.random_steps:
                batches = TrainingBatches(replay, prior, config.prior_share, config.reward_scale)
                agent, metrics = update_many(
                    agent, batches, update_key, num_updates=num_updates, batch_size=config.batch_size
                )
                log.updates.append(metrics)
            outcome = lanes.receive()
            block = Transitions(
                observations=jnp.asarray(observations),
                actions=jnp.asarray(actions),
                rewards=jnp.asarray(outcome.rewards),
                next_observations=jnp.asarray(outcome.next_observations),
                terminated=jnp.asarray(outcome.terminated),
            )
            replay = _add(replay, block, reward_function)
            filled = True
            observations = outcome.observations
            steps += config.lanes
            log.episodes += outcome.episodes
            _tell(outcome.episodes, on_episode)
            if steps % log_every == 0 or steps == num_steps:
                rows.append(log.row(steps, int(agent.step), folder))
                if progress is not None:
                    progress(steps, num_steps)
            if steps % checkpoint_every == 0:
                state = OnlineState(agent=agent, replay=replay, env_steps=jnp.asarray(steps, jnp.int32))
                if folder is not None:
                    write_metrics(folder / "metrics.csv", rows)
                    _save(state, folder, run)
                if on_checkpoint is not None:
                    on_checkpoint(state, steps)
                _tell(lanes.cut(), on_episode)
                if steps < num_steps:
                    # The state that was given out keeps its buffer: the run goes on with one that it may overwrite.
                    replay = jax.tree.map(jnp.copy, replay) if on_checkpoint is not None else replay
                    observations = lanes.reset(steps)
    return state


@partial(jax.jit, static_argnames="randomly")
def _choose(agent: Agent, observations: Float[Array, "L O"], key: Key, steps: Int[Array, ""], randomly: bool) -> Array:
    key = jax.random.fold_in(key, steps)
    if not randomly:
        return agent.sample_actions(observations, key)
    actions = jax.eval_shape(agent.act, observations)
    return jax.random.uniform(key, actions.shape, minval=-1.0, maxval=1.0)


@partial(jax.jit, donate_argnums=0)
def _add(replay: ReplayBuffer, block: Transitions, reward_function: RewardFunction | None) -> ReplayBuffer:
    if reward_function is not None:
        block = block.replace(rewards=reward_function(block))
    return replay.add(block)


class _Outcome(NamedTuple):
    """One step of L lanes; `next_observations` are those of the states reached, `observations` those to act on now."""

    rewards: Float[np.ndarray, " L"]
    next_observations: Float[np.ndarray, "L O"]
    terminated: Bool[np.ndarray, " L"]
    observations: Float[np.ndarray, "L O"]
    episodes: list[Episode]


class _Group(Protocol):
    """Some of the lanes: answers come in the order of the requests."""

    def request(self, command: str, *arguments: Any) -> None: ...
    def answer(self) -> Any: ...
    def close(self) -> None: ...


class _Lanes:
    """All lanes, divided evenly among groups, each in a process of its own unless there are no processes."""

    def __init__(self, make_env: MakeEnv, count: int, processes: int, entropy: Sequence[int]) -> None:
        shares = np.array_split(np.arange(count), max(1, min(processes, count)))
        self._ends = np.cumsum([len(share) for share in shares])[:-1]
        with ExitStack() as opened:
            self._groups: list[_Group] = []
            for share in shares:
                group = (
                    _LocalGroup(make_env, share.tolist(), entropy)
                    if processes == 0
                    else _RemoteGroup(make_env, share.tolist(), entropy)
                )
                opened.callback(group.close)
                self._groups.append(group)
            self._close = opened.pop_all().close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def reset(self, steps: int) -> Float[np.ndarray, "L O"]:
        """Begins new episodes, whose seeds follow from the steps made so far."""
        return np.concatenate(self._ask("reset", steps))

    def send(self, actions: Float[np.ndarray, "L A"], steps: int) -> None:
        for group, part in zip(self._groups, np.split(actions, self._ends), strict=True):
            group.request("step", part, steps)

    def receive(self) -> _Outcome:
        parts: list[_Outcome] = [group.answer() for group in self._groups]
        return _Outcome(
            rewards=np.concatenate([part.rewards for part in parts]),
            next_observations=np.concatenate([part.next_observations for part in parts]),
            terminated=np.concatenate([part.terminated for part in parts]),
            observations=np.concatenate([part.observations for part in parts]),
            episodes=[episode for part in parts for episode in part.episodes],
        )

    def cut(self) -> list[Episode]:
        """The episodes that are under way, as far as they got."""
        return [episode for part in self._ask("cut") for episode in part]

    def _ask(self, command: str, *arguments: Any) -> list[Any]:
        for group in self._groups:
            group.request(command, *arguments)
        return [group.answer() for group in self._groups]


class _LocalGroup:
    """Lanes in this process. They step when the answer is asked for, while updates may be running."""

    def __init__(self, make_env: MakeEnv, numbers: Sequence[int], entropy: Sequence[int]) -> None:
        self._lanes = [_Lane(make_env(), number, entropy) for number in numbers]
        self._request: tuple[Any, ...] = ()

    def request(self, command: str, *arguments: Any) -> None:
        self._request = (command, *arguments)

    def answer(self) -> Any:
        command, *arguments = self._request
        return getattr(self, f"_{command}")(*arguments)

    def close(self) -> None:
        for lane in self._lanes:
            lane.env.close()

    def _reset(self, steps: int) -> Float[np.ndarray, "L O"]:
        return np.stack([lane.reset(steps) for lane in self._lanes])

    def _step(self, actions: Float[np.ndarray, "L A"], steps: int) -> _Outcome:
        results = [lane.step(action, steps) for lane, action in zip(self._lanes, actions, strict=True)]
        rewards, next_observations, terminated, observations, episodes = zip(*results, strict=True)
        return _Outcome(
            rewards=np.asarray(rewards, np.float32),
            next_observations=np.stack(next_observations),
            terminated=np.asarray(terminated),
            observations=np.stack(observations),
            episodes=[episode for episode in episodes if episode is not None],
        )

    def _cut(self) -> list[Episode]:
        return [replace(lane.episode(), truncated=True) for lane in self._lanes if lane.acted]


class _RemoteGroup:
    """Lanes in a process of their own."""

    def __init__(self, make_env: MakeEnv, numbers: Sequence[int], entropy: Sequence[int]) -> None:
        # Spawned, not forked: a forked copy of a process in which JAX has started its threads can deadlock.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_serve, args=(theirs, make_env, numbers, entropy), daemon=True
        )
        self._process.start()
        theirs.close()

    def request(self, command: str, *arguments: Any) -> None:
        try:
            self._pipe.send((command, *arguments))
        except OSError as error:
            raise RuntimeError(_DIED) from error

    def answer(self) -> Any:
        try:
            result = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(_DIED) from error
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


_DIED = (
    "a process that steps environments died (killed, or out of memory); run the same command again, with fewer"
    " processes if memory was short"
)


def _serve(pipe: Connection, make_env: MakeEnv, numbers: Sequence[int], entropy: Sequence[int]) -> None:
    """A worker process: answers requests until the other end of the pipe is closed."""
    end_with_parent()
    group: _LocalGroup | None = None
    try:
        while True:
            request = pipe.recv()
            try:
                group = group or _LocalGroup(make_env, numbers, entropy)
                group.request(*request)
                answer = group.answer()
            except ValueError as error:
                answer = ValueError(str(error))
            except Exception as error:
                # As text: not every exception can be sent to another process.
                answer = RuntimeError(f"an environment failed: {error!r}.")
            pipe.send(answer)
    except (EOFError, OSError):
        if group is not None:
            group.close()


_ORIGIN = {"behaviour": "online"}


class _Lane:
    """One environment, and its episode as it grows."""

    def __init__(self, env: gymnasium.Env[Any, Any], number: int, entropy: Sequence[int]) -> None:
        space = env.action_space
        if not isinstance(space, gymnasium.spaces.Box) or np.any(space.low != -1) or np.any(space.high != 1):
            raise ValueError(
                f"agents act in [-1, 1], but the environment's action space is {space}; rescale its actions first."
            )
        self.env = env
        self._number = number
        self._entropy = entropy

    @property
    def acted(self) -> bool:
        return self._recorder.steps > 0

    def reset(self, steps: int) -> Float[np.ndarray, " O"]:
        seed = int(np.random.SeedSequence([*self._entropy, self._number, steps]).generate_state(1)[0])
        self._recorder = EpisodeRecorder(self.env, seed)
        return np.asarray(self._recorder.observation, np.float32)

    def step(
        self, action: Float[np.ndarray, " A"], steps: int
    ) -> tuple[float, Float[np.ndarray, " O"], bool, Float[np.ndarray, " O"], Episode | None]:
        """What `_Outcome` holds, of one lane; an episode that ends is followed by the next one at once."""
        recorder = self._recorder
        reward = recorder.step(action)
        reached = np.asarray(recorder.observation, np.float32)
        if recorder.running:
            return reward, reached, False, reached, None
        return reward, reached, recorder.terminated, self.reset(steps + 1), recorder.episode(_ORIGIN)

    def episode(self) -> Episode:
        return self._recorder.episode(_ORIGIN)


class _Log:
    """What has happened since the last row of metrics."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.updates: list[Metrics] = []
        self.episodes: list[Episode] = []

    def row(self, steps: int, updates: int, folder: Path | None) -> dict[str, float]:
        """The row, after which the log begins anew."""
        means = {name: _mean([float(metrics[name]) for metrics in self.updates]) for name in self._names}
        bad = [name for name, value in means.items() if self.updates and not math.isfinite(value)]
        if bad:
            raise ValueError(
                f"{bad[0]} is no longer a finite number at step {steps}"
                + (f" of {folder}" if folder else "")
                + "; look for NaN in the data or the rewards, or lower the learning rate"
            )
        row = {
            "step": float(steps),
            "updates": float(updates),
            "episodes": float(len(self.episodes)),
            "episode/return": _mean([float(episode.rewards.sum()) for episode in self.episodes]),
            "episode/length": _mean([len(episode) for episode in self.episodes]),
            "episode/success": _mean([episode.succeeded for episode in self.episodes]),
        }
        self.updates, self.episodes = [], []
        return row | means


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _tell(episodes: Sequence[Episode], on_episode: Callable[[Episode], None] | None) -> None:
    if on_episode is not None:
        for episode in episodes:
            on_episode(episode)


def _metric_names(
    state: OnlineState[Any], prior: TransitionDataset | None, config: OnlineConfig, key: Key
) -> list[str]:
    def update(agent: Any, batches: TrainingBatches) -> Metrics:
        metrics: Metrics = agent.update(batches.sample(key, config.batch_size), key)[1]
        return metrics

    batches = TrainingBatches(state.replay, prior, config.prior_share, config.reward_scale)
    return sorted(jax.eval_shape(update, state.agent, batches))


def _save(state: OnlineState[Any], folder: Path, run: str) -> None:
    steps, replay = int(state.env_steps), state.replay
    # The buffer first, and the one before removed last: whatever a crash leaves, the last checkpoint has its buffer.
    place = {"size": int(replay.size), "position": int(replay.position)}
    save_checkpoint(_replay_path(folder, steps), replay.stored(), place)
    save_checkpoint(folder / f"checkpoint_{steps:09d}.safetensors", state.agent, {"step": steps, "run": run})
    for path in folder.glob("replay_*.safetensors"):
        if path != _replay_path(folder, steps):
            path.unlink()


def _resume(state: OnlineState[A], folder: Path, run: str) -> OnlineState[A]:
    for unfinished in (*folder.glob(".checkpoint_*"), *folder.glob(".replay_*")):
        unfinished.unlink()
    saved = checkpoints(folder)
    if not saved:
        return state
    steps = max(saved)
    if read_checkpoint_metadata(saved[steps])["run"] != run:
        raise ValueError(
            f"{folder} holds a run with another configuration, data or seed; choose another folder or remove it."
        )
    place = read_checkpoint_metadata(_replay_path(folder, steps))
    size = place["size"]
    rows = jax.tree.map(lambda leaf: np.zeros((size, *leaf.shape[1:]), leaf.dtype), state.replay.transitions)
    rows = restore_checkpoint(_replay_path(folder, steps), rows)
    replay = state.replay.replace(
        transitions=jax.tree.map(lambda stored, row: stored.at[:size].set(row), state.replay.transitions, rows),
        size=jnp.asarray(size, jnp.int32),
        position=jnp.asarray(place["position"], jnp.int32),
    )
    agent = restore_checkpoint(saved[steps], state.agent)
    return OnlineState(agent=agent, replay=replay, env_steps=jnp.asarray(steps, jnp.int32))


def _replay_path(folder: Path, steps: int) -> Path:
    return folder / f"replay_{steps:09d}.safetensors"


def _fitting(observations: Float[np.ndarray, "L O"], replay: ReplayBuffer) -> Float[np.ndarray, "L O"]:
    expected = replay.transitions.observations.shape[1:]
    if observations.shape[1:] != expected:
        raise ValueError(
            f"the environment's observations have shape {list(observations.shape[1:])}, but the agent's and the replay"
            f" buffer's {list(expected)}; give an environment like the one that they were made for."
        )
    return observations


def _check(config: OnlineConfig, prior: TransitionDataset | None, **counts: int) -> None:
    for name, value in (counts | {"lanes": config.lanes, "batch_size": config.batch_size}).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}.")
    for name, value in counts.items():
        if value % config.lanes:
            raise ValueError(f"{name} ({value}) must be a multiple of the number of lanes ({config.lanes}).")
    if counts["checkpoint_every"] % counts["log_every"] and counts["checkpoint_every"] != counts["num_steps"]:
        raise ValueError(
            f"checkpoint_every ({counts['checkpoint_every']}) must be a multiple of log_every ({counts['log_every']})."
        )
    if counts["num_steps"] % counts["checkpoint_every"]:
        raise ValueError(
            f"num_steps ({counts['num_steps']}) must be a multiple of checkpoint_every ({counts['checkpoint_every']})."
        )
    updates = config.lanes * config.updates_per_step
    if updates < 1 or not math.isclose(updates, round(updates)):
        raise ValueError(
            f"lanes ({config.lanes}) times updates_per_step ({config.updates_per_step}) must be a whole number of at"
            f" least 1, not {updates}."
        )
    if prior is not None and not 0 < round(config.prior_share * config.batch_size) < config.batch_size:
        raise ValueError(
            f"prior_share ({config.prior_share}) leaves nothing of a batch of {config.batch_size} to one of the two"
            " sources; choose it well between 0 and 1."
        )
