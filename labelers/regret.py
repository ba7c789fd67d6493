"""Teachers that prefer the segment with the smaller regret: what it lost against behaviour that is as good as can be.

`RegretTeacher` takes the values that regret is measured against from functions that it is given.
`SimulatedRegretTeacher` measures them, by putting the simulator into the states of the segment and letting an expert
act from there. The model is that of Knox et al., "Models of human preference for learning reward functions"
(arXiv 2206.02231). `LogisticTeacher` is their more general one, which weighs the parts of regret each for itself.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robopref.preferences import (
    bradley_terry,
    deterministic_regret,
    full_regret,
    sample_preference,
    sample_ranking,
)
from robopref.processes import end_with_parent
from robopref.progress import ProgressCallback
from robopref.queries import Labels, Queries
from robopref.types import Key, Policy, Simulator

Values: TypeAlias = Callable[[Float[np.ndarray, "B O"]], Any]
"""From observations [B, O] to values [B], as a NumPy or JAX array."""

QValues: TypeAlias = Callable[[Float[np.ndarray, "B O"], Float[np.ndarray, "B A"]], Any]
"""From observations [B, O] and actions [B, A] to values [B]."""

_ROWS_AT_ONCE = 65536


@dataclass(frozen=True)
class RegretTeacher:
    """Labels queries by regret under given value functions.

    Kinds:

    * `deterministic`: V(s_0) - [sum_t discount^t r_t + discount^T V(s_T)]; right under deterministic transitions only.
    * `full`: sum_t discount^t [V(s_t) - Q(s_t, a_t)], right under any dynamics. At discount 1 it is minus the
      undiscounted sum of advantages, whatever discount the values were computed under.
    * `cpl_release`: -[sum_{t<T-1} r_t + V(s_{T-1}) - V(s_0)], undiscounted, over T - 1 transitions: what the released
      code of contrastive preference learning labels with. Where V is discounted this is *not* a regret: it favours
      segments among states of high value, even between two that are optimal.

    Attributes:
        values: V. A terminal state is worth 0, whatever this says about it.
        discount: of the regret; for `deterministic`, the one under which V was computed.
        kind: how regret is computed.
        q_values: Q, which `full` needs.
        temperature: of the noise, in the unit of the regret; 0 is noiseless.
        tie_threshold: a pair whose regrets differ by less than this is a tie.
        soft: answer with the probability itself rather than with a draw from it.
        source: where the values came from, recorded with the labels.
        name: what the labels say who gave them.
    """

    values: Values
    discount: float
    kind: Literal["deterministic", "full", "cpl_release"] = "deterministic"
    q_values: QValues | None = None
    temperature: float = 0.0
    tie_threshold: float = 0.0
    soft: bool = False
    source: str = ""
    name: str = "regret"

    def __post_init__(self) -> None:
        if self.kind not in ("deterministic", "full", "cpl_release"):
            raise ValueError(f"there is no regret {self.kind!r}; choose deterministic, full or cpl_release.")
        if self.kind == "full" and self.q_values is None:
            raise ValueError("the full regret needs q_values beside values.")
        _check(self.discount, self.temperature, self.tie_threshold)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What `Labels.parameters` records."""
        return {
            "kind": self.kind,
            "discount": self.discount,
            "temperature": self.temperature,
            "tie_threshold": self.tie_threshold,
            "soft": self.soft,
            "source": self.source,
        }

    def label(self, queries: Queries, key: Key) -> Labels:
        """Answers every query: pairs with values, K > 2 segments with orders.

        Raises:
            ValueError: the value functions give no finite numbers, or soft answers are asked for K > 2 segments.
        """
        regrets = self.segment_regrets(queries)
        return _labels(regrets, key, self.temperature, self.tie_threshold, self.soft, self.name, self.parameters)

    def segment_regrets(self, queries: Queries) -> Float[np.ndarray, "N K"]:
        """The regret of every segment, in the unit of the reward; for `cpl_release`, what stands in for it."""
        windows = _Windows.of(queries)
        if self.kind == "full" and self.q_values is not None:
            return np.take(self._full(queries, windows, self.q_values), windows.which)
        return np.take(self._telescoped(queries, windows), windows.which)

    def _full(self, queries: Queries, windows: _Windows, q_function: QValues) -> Float[np.ndarray, " U"]:
        dataset = queries.dataset
        rows = windows.rows[:, None] + np.arange(queries.length)
        values = _evaluate("values", self.values, rows, dataset.observations)
        q_values = _evaluate("q_values", q_function, rows, dataset.observations, dataset.actions)
        with jax.enable_x64(True):
            return np.asarray(full_regret(jnp.asarray(values), jnp.asarray(q_values), self.discount))

    def _telescoped(self, queries: Queries, windows: _Windows) -> Float[np.ndarray, " U"]:
        released = self.kind == "cpl_release"
        steps, discount = (queries.length - 1, 1.0) if released else (queries.length, self.discount)
        ends = np.stack([windows.rows, windows.rows + steps])
        first_values, last_values = _evaluate("values", self.values, ends, queries.dataset.observations)
        if not released:
            last_values = np.where(windows.reach_terminal, 0.0, last_values)
        return _regrets(first_values, last_values, windows.rewards(queries, steps), discount)


@dataclass(frozen=True, eq=False)
class MeasuredRegretTeacher:
    """Answers by regrets that were measured before, such as by `SimulatedRegretTeacher` for a pool of segments.

    Measuring is what costs; any pairing of the measured segments, and any noise, is then free.

    Attributes:
        dataset_hash: of the episodes that the segments come from.
        length: of the segments.
        episodes: of each measured segment.
        starts: of each measured segment.
        regrets: of each measured segment, in the unit of the reward.
        temperature: of the noise, in that unit; 0 is noiseless.
        tie_threshold: a pair whose regrets differ by less than this is a tie.
        soft: answer with the probability itself rather than with a draw from it.
        source: how the regrets were measured, recorded with the labels.
        name: what the labels say who gave them.
    """

    dataset_hash: str
    length: int
    episodes: Int[np.ndarray, " U"]
    starts: Int[np.ndarray, " U"]
    regrets: Float[np.ndarray, " U"]
    temperature: float = 0.0
    tie_threshold: float = 1e-9
    soft: bool = False
    source: Mapping[str, Any] = field(default_factory=dict)
    name: str = "simulated_regret"

    def __post_init__(self) -> None:
        _check(1.0, self.temperature, self.tie_threshold)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What `Labels.parameters` records."""
        noise = {"temperature": self.temperature, "tie_threshold": self.tie_threshold, "soft": self.soft}
        return {**self.source, **noise}

    def label(self, queries: Queries, key: Key) -> Labels:
        """Answers every query: pairs with values, K > 2 segments with orders.

        Raises:
            ValueError: as `segment_regrets`.
        """
        regrets = self.segment_regrets(queries)
        return _labels(regrets, key, self.temperature, self.tie_threshold, self.soft, self.name, self.parameters)

    def segment_regrets(self, queries: Queries) -> Float[np.ndarray, "N K"]:
        """The regret of every segment, as it was measured.

        Raises:
            ValueError: the queries are about other episodes, or a segment was not measured.
        """
        if (queries.dataset.hash, queries.length) != (self.dataset_hash, self.length):
            raise ValueError(
                f"regrets were measured for segments of {self.length} steps of another dataset than"
                f" {queries.dataset.path}, or of another length than {queries.length}; measure them anew."
            )
        order = np.lexsort((self.starts, self.episodes))
        # One number per segment, in the order of (episode, start), so that a search finds it.
        span = max(int(queries.dataset.lengths.max()), int(self.starts.max())) + 1
        known = (self.episodes * span + self.starts)[order]
        wanted = queries.episodes * span + queries.starts
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        if not np.array_equal(known[place], wanted):
            query, candidate = np.argwhere(known[place] != wanted)[0]
            raise ValueError(
                f"query {query} shows step {queries.starts[query, candidate]} of episode"
                f" {queries.episodes[query, candidate]}, whose regret was not measured."
            )
        found: np.ndarray = self.regrets[order][place]
        return found


@dataclass(frozen=True, eq=False)
class LogisticTeacher:
    """Labels queries by a weighted sum of what a segment earned and of the values of the states at its ends.

    P(the second is preferred) = (1 - lapse) sigmoid((score_2 - score_1) / temperature) + lapse / 2, where a score is
    w_r PR + w_0 V(s_0) + w_T discount^T V(s_T), and PR = sum_t discount^t r_t (Knox et al., the logistic model of
    people). The default weights (1, -1, 1) make the score minus the deterministic regret; (1, 0, 0) make it the partial
    return.

    Attributes:
        values: V, as a function of observations, or as one number for each row of the dataset's observations. A
            terminal state is worth 0, whatever this says about it.
        discount: the one under which V was computed.
        partial_return_weight: w_r.
        start_value_weight: w_0.
        end_value_weight: w_T.
        temperature: of the noise, in the unit of the score; 0 is noiseless.
        lapse: share of the answers that a fair coin gives.
        soft: answer with the probability itself, lapses included, rather than with a draw from it.
        source: where the values came from, recorded with the labels.
        name: what the labels say who gave them.
    """

    values: Values | Float[np.ndarray, " R"]
    discount: float
    partial_return_weight: float = 1.0
    start_value_weight: float = -1.0
    end_value_weight: float = 1.0
    temperature: float = 1.0
    lapse: float = 0.0
    soft: bool = False
    source: str = ""
    name: str = "logistic"

    def __post_init__(self) -> None:
        for part in ("partial_return", "start_value", "end_value"):
            weight = getattr(self, f"{part}_weight")
            if not np.isfinite(weight):
                raise ValueError(f"the teacher's {part}_weight must be finite, not {weight}.")
        if not 0 <= self.lapse <= 1:
            raise ValueError(f"the teacher's lapse is a probability, not {self.lapse}.")
        _check(self.discount, self.temperature, 0.0)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What `Labels.parameters` records."""
        return {
            "discount": self.discount,
            "partial_return_weight": self.partial_return_weight,
            "start_value_weight": self.start_value_weight,
            "end_value_weight": self.end_value_weight,
            "temperature": self.temperature,
            "lapse": self.lapse,
            "soft": self.soft,
            "source": self.source,
        }

    def label(self, queries: Queries, key: Key) -> Labels:
        """Answers every query: pairs with values, K > 2 segments with orders from Plackett-Luce over the scores.

        Raises:
            ValueError: the values are no finite numbers, one for each observation; or there are K > 2 segments, and the
                teacher lapses or answers softly.
        """
        pairs = queries.candidates == 2
        if not pairs and (self.lapse > 0 or self.soft):
            raise ValueError(
                f"queries of {queries.candidates} segments are answered by an order, which knows no lapses or soft"
                " labels; set lapse to 0 and soft to False, or draw pairs."
            )
        with jax.enable_x64(True):
            scores = jnp.asarray(self.segment_scores(queries))
            answers = self._values(scores, key) if pairs else sample_ranking(scores, key, self.temperature)
        return Labels(
            values=np.asarray(answers) if pairs else None,
            orders=None if pairs else np.asarray(answers),
            answered=np.full(len(queries), True),
            labeler=self.name,
            parameters=self.parameters,
        )

    def segment_scores(self, queries: Queries) -> Float[np.ndarray, "N K"]:
        """The weighted sum of every segment.

        Raises:
            ValueError: as `segment_statistics`.
        """
        weights = (self.partial_return_weight, self.start_value_weight, self.end_value_weight)
        return np.asarray(segment_statistics(queries, self.values, self.discount) @ np.array(weights))

    def _values(self, scores: Float[Array, "N 2"], key: Key) -> Float[Array, " N"]:
        first, second = scores[:, 0], scores[:, 1]
        if self.soft:
            return (1.0 - self.lapse) * bradley_terry(first, second, self.temperature) + self.lapse / 2.0
        answer_key, lapse_key, coin_key = jax.random.split(key, 3)
        attentive = sample_preference(first, second, answer_key, self.temperature)
        lapsed = jax.random.bernoulli(lapse_key, self.lapse, attentive.shape)
        coin = jax.random.bernoulli(coin_key, 0.5, attentive.shape).astype(attentive.dtype)
        return jnp.where(lapsed, coin, attentive)


def segment_statistics(
    queries: Queries, values: Values | Float[np.ndarray, " R"], discount: float
) -> Float[np.ndarray, "N K 3"]:
    """PR = sum_t discount^t r_t, V(s_0) and discount^T V(s_T) of every segment: what people weigh (Knox et al.).

    Minus the deterministic regret is the first, less the second, plus the third.

    Args:
        queries: of segments of T steps.
        values: V, as a function of observations, or as one number for each row of the dataset's observations. A
            terminal state is worth 0, whatever this says about it.
        discount: the one under which V was computed.

    Raises:
        ValueError: the values are no finite numbers, one for each observation.
    """
    windows, observations = _Windows.of(queries), queries.dataset.observations
    ends = np.stack([windows.rows, windows.rows + queries.length])
    if callable(values):
        first_values, last_values = _evaluate("values", values, ends, observations)
    else:
        if np.shape(values) != observations.shape[:1]:
            raise ValueError(
                f"values must be one number per observation: shape {[len(observations)]}, not {list(np.shape(values))}."
            )
        first_values, last_values = _evaluate("values", lambda of_rows: of_rows, ends, np.asarray(values))
    last_values = np.where(windows.reach_terminal, 0.0, last_values)
    # Double precision: labels depend on small differences of large sums.
    earned = windows.rewards(queries, queries.length).astype(np.float64) @ discount ** np.arange(queries.length)
    statistics = np.stack([earned, first_values, discount**queries.length * last_values], axis=-1)
    return np.asarray(statistics[windows.which])


@dataclass(frozen=True)
class _Windows:
    """The U distinct segments of some queries: in pairings of all with all, each occurs many times.

    Attributes:
        segments: (episode, start) of each.
        rows: the row of the dataset in which each begins.
        reach_terminal: whether its last action led to a terminal state.
        which: of them each candidate of each query is.
    """

    segments: list[tuple[int, int]]
    rows: Int[np.ndarray, " U"]
    reach_terminal: Bool[np.ndarray, " U"]
    which: Int[np.ndarray, "N K"]

    @classmethod
    def of(cls, queries: Queries) -> _Windows:
        dataset = queries.dataset
        rows, chosen, which = np.unique(
            dataset.offsets[queries.episodes] + queries.starts, return_index=True, return_inverse=True
        )
        episodes, starts = queries.episodes.ravel()[chosen], queries.starts.ravel()[chosen]
        return cls(
            segments=list(zip(episodes.tolist(), starts.tolist(), strict=True)),
            rows=rows,
            reach_terminal=dataset.terminated[episodes] & (starts + queries.length == dataset.lengths[episodes]),
            which=which.reshape(queries.episodes.shape),
        )

    def rewards(self, queries: Queries, steps: int) -> Float[np.ndarray, "U steps"]:
        """Of the first steps of each segment."""
        return np.take(queries.dataset.rewards, self.rows[:, None] + np.arange(steps))


class _Span(NamedTuple):
    """A distinct segment, given by (episode, start), with the simulator states at its ends.

    The last state is the one that its last action led to, or None where that one is terminal.
    """

    segment: tuple[int, int]
    length: int
    first_state: Float[np.ndarray, " S"]
    last_state: Float[np.ndarray, " S"] | None
    seed: int


class _Expert(NamedTuple):
    """What a process needs to roll out an expert."""

    make_env: Callable[[], Simulator]
    policy: Policy
    horizon: int
    discount: float


@dataclass(frozen=True, eq=False)
class SimulatedRegretTeacher:
    """Labels queries by regret against an expert, exactly, under a simulator whose state can be set.

    V of the segment's first state and of the state after its last action is what the expert earns from there in one
    roll-out, so that regret is V(s_0) - [sum_t discount^t r_t + discount^T V(s_T)] without any learned value. It is
    exact for a deterministic simulator and expert, and can be negative where a segment did better than the expert.

    The two roll-outs end at the same time step, `expert_horizon` after the segment. A time limit does not end them:
    the environment's `truncated` is ignored. `terminated` ends them, and a terminal state is worth 0.

    The values are remembered by (episode, start) for as long as the teacher lives, so that asking again for the same
    segments under the same key costs nothing.

    Attributes:
        make_env: makes the simulator, with a time limit beyond the roll-outs; picklable if there are processes.
        expert: acts in the roll-outs; picklable if there are processes.
        expert_horizon: steps that the expert acts beyond the segment.
        discount: per step.
        temperature: of the noise, in the unit of the regret; 0 is noiseless.
        tie_threshold: a pair whose regrets differ by less than this is a tie. The default is above the rounding of the
            sums, so that two optimal segments are a tie.
        soft: answer with the probability itself rather than with a draw from it.
        processes: worker processes; 0 rolls out in this process.
        on_segment: called with the distinct segments measured so far and their number.
        name: what the labels say who gave them.
    """

    make_env: Callable[[], Simulator]
    expert: Policy
    expert_horizon: int
    discount: float
    temperature: float = 0.0
    tie_threshold: float = 1e-9
    soft: bool = False
    processes: int = 0
    on_segment: ProgressCallback | None = None
    name: str = "simulated_regret"
    _known: dict[tuple[Any, ...], tuple[float, float]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.expert_horizon < 1 or self.processes < 0:
            raise ValueError(
                f"expert_horizon must be at least 1 and processes at least 0, not {self.expert_horizon} and"
                f" {self.processes}."
            )
        _check(self.discount, self.temperature, self.tie_threshold)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What `Labels.parameters` records."""
        return {
            "expert": dict(self.expert.describe(0)),
            "expert_horizon": self.expert_horizon,
            "discount": self.discount,
            "temperature": self.temperature,
            "tie_threshold": self.tie_threshold,
            "soft": self.soft,
        }

    def label(self, queries: Queries, key: Key) -> Labels:
        """Answers every query: pairs with values, K > 2 segments with orders.

        The regrets behind the answers are `segment_regrets` of the same queries and key.

        Raises:
            ValueError: as `segment_regrets`.
        """
        regrets = self.segment_regrets(queries, key)
        return _labels(regrets, key, self.temperature, self.tie_threshold, self.soft, self.name, self.parameters)

    def segment_regrets(self, queries: Queries, key: Key) -> Float[np.ndarray, "N K"]:
        """The regret of every segment against the expert, in the unit of the reward.

        Args:
            queries: of a dataset that keeps simulator states.
            key: gives each distinct segment the seed with which the expert starts, the same for both of its roll-outs.

        Raises:
            ValueError: the dataset keeps no states, or the simulator failed under the expert.
            RuntimeError: a worker process died.
        """
        entropy = tuple(int(word) for word in np.ravel(jax.random.key_data(key)))
        context = (queries.dataset.hash, queries.length, entropy)
        windows = _Windows.of(queries)
        missing = [i for i, segment in enumerate(windows.segments) if (*context, *segment) not in self._known]
        done = len(windows.segments) - len(missing)
        with closing(self._measure(self._spans(queries, windows, missing, entropy))) as measured:
            for segment, values in measured:
                self._known[*context, *segment] = values
                done += 1
                if self.on_segment is not None:
                    self.on_segment(done, len(windows.segments))
        ends = np.asarray([self._known[*context, *segment] for segment in windows.segments]).reshape(-1, 2)
        regrets = _regrets(ends[:, 0], ends[:, 1], windows.rewards(queries, queries.length), self.discount)
        return np.take(regrets, windows.which)

    def _spans(
        self, queries: Queries, windows: _Windows, chosen: Sequence[int], entropy: tuple[int, ...]
    ) -> list[_Span]:
        if not chosen:
            return []
        segments = [windows.segments[i] for i in chosen]
        episodes, starts = np.asarray(segments).T
        first_states, last_states = queries.dataset.states_at(
            np.stack([episodes, episodes]), np.stack([starts, starts + queries.length])
        )
        return [
            _Span(
                segment=segment,
                length=queries.length,
                first_state=first_state,
                last_state=None if terminal else last_state,
                seed=int(np.random.SeedSequence([*entropy, *segment]).generate_state(1)[0]),
            )
            for segment, first_state, last_state, terminal in zip(
                segments, first_states, last_states, windows.reach_terminal[np.asarray(chosen)], strict=True
            )
        ]

    def _measure(self, spans: Sequence[_Span]) -> Generator[tuple[tuple[int, int], tuple[float, float]], None, None]:
        """Values of the two ends of each span, in the order in which they become known."""
        expert = _Expert(self.make_env, self.expert, self.expert_horizon, self.discount)
        if not spans:
            return
        if self.processes == 0:
            rollouts = _Rollouts(expert)
            try:
                for span in spans:
                    yield span.segment, rollouts.end_values(span)
            finally:
                rollouts.close()
            return
        # Spawned, not forked: a forked copy of a process in which JAX has started its threads can deadlock.
        pool = ProcessPoolExecutor(
            min(self.processes, len(spans)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(expert,),
        )
        try:
            futures = {pool.submit(_run_in_worker, span): span.segment for span in spans}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that rolls out the expert died (killed, out of memory, or unable to make the environment);"
                " run the same command again, with fewer processes if memory was short"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


class _Rollouts:
    """An environment, and the expert that acts in it from given states."""

    def __init__(self, expert: _Expert) -> None:
        self._expert = expert
        self._env = expert.make_env()
        # Some environments can only be put into a state once they have been reset.
        self._env.reset(seed=0)

    def close(self) -> None:
        close = getattr(self._env, "close", None)
        if close is not None:
            close()

    def end_values(self, span: _Span) -> tuple[float, float]:
        """The expert's discounted return from the first state of a segment, and from the state behind it."""
        first = self._value(span, span.first_state, span.length + self._expert.horizon)
        last = 0.0 if span.last_state is None else self._value(span, span.last_state, self._expert.horizon)
        return first, last

    def _value(self, span: _Span, state: Float[np.ndarray, " S"], steps: int) -> float:
        rewards = np.zeros(steps)
        carry = self._expert.policy.start(np.asarray([span.seed]))
        with _explained(span, 0):
            observation = self._env.set_state(state)
        for step in range(steps):
            actions, carry = self._expert.policy.step(carry, np.asarray(observation)[None])
            with _explained(span, step):
                # A copy: a policy's actions may be a view into a buffer that it fills again at the next step.
                observation, reward, terminated, *_ = self._env.step(np.array(actions[0]))
            rewards[step] = float(reward)
            if terminated:
                break
        return float(rewards @ self._expert.discount ** np.arange(steps))


@contextmanager
def _explained(span: _Span, step: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        episode, start = span.segment
        raise ValueError(
            f"the simulator failed at step {step} of the expert's roll-out for the segment at episode {episode}, step"
            f" {start} ({error}); give an environment that takes the dataset's states and has a longer time limit."
        ) from error


# A worker process keeps its environment here between segments: an executor gives its initializer no other place.
_worker: _Rollouts | None = None


def _start_worker(expert: _Expert) -> None:
    global _worker
    end_with_parent()
    _worker = _Rollouts(expert)


def _run_in_worker(span: _Span) -> tuple[float, float]:
    if _worker is None:
        raise RuntimeError("this process was not started to roll out an expert")
    return _worker.end_values(span)


def _check(discount: float, temperature: float, tie_threshold: float) -> None:
    if not 0 <= discount <= 1:
        raise ValueError(f"the teacher's discount must lie in [0, 1], not {discount}.")
    if not temperature >= 0:
        raise ValueError(f"the teacher's temperature must be at least 0, not {temperature}.")
    if not tie_threshold >= 0:
        raise ValueError(f"the teacher's tie_threshold must be at least 0, not {tie_threshold}.")


def _evaluate(
    name: str, function: Callable[..., Any], rows: Int[np.ndarray, "*M"], *columns: Float[np.ndarray, "R D"]
) -> Float[np.ndarray, "*M"]:
    """The function at the given rows of the columns, called once for each distinct row, a limited number at a time."""
    distinct, inverse = np.unique(rows, return_inverse=True)
    chunks = [distinct[i : i + _ROWS_AT_ONCE] for i in range(0, len(distinct), _ROWS_AT_ONCE)]
    parts = [np.asarray(function(*(column[chunk] for column in columns)), np.float64) for chunk in chunks]
    for chunk, part in zip(chunks, parts, strict=True):
        if part.shape != chunk.shape:
            raise ValueError(
                f"{name} must give one number per observation: shape {list(chunk.shape)}, not {list(part.shape)}."
            )
        if not np.isfinite(part).all():
            raise ValueError(f"{name} is not finite at row {chunk[~np.isfinite(part)][0]} of the dataset.")
    return np.concatenate([np.empty(0), *parts])[inverse].reshape(rows.shape)


def _regrets(
    first_values: Float[np.ndarray, " U"],
    last_values: Float[np.ndarray, " U"],
    rewards: Float[np.ndarray, "U T"],
    discount: float,
) -> Float[np.ndarray, " U"]:
    # Double precision: a regret is a small difference of large sums.
    with jax.enable_x64(True):
        first, last, earned = (jnp.asarray(array, jnp.float64) for array in (first_values, last_values, rewards))
        return np.asarray(deterministic_regret(first, last, earned, discount))


def _labels(
    regrets: Float[np.ndarray, "N K"],
    key: Key,
    temperature: float,
    tie_threshold: float,
    soft: bool,
    name: str,
    parameters: Mapping[str, Any],
) -> Labels:
    """Labels by regret, the smaller preferred: values for pairs, orders otherwise."""
    pairs = regrets.shape[1] == 2
    if soft and not pairs:
        raise ValueError(f"queries of {regrets.shape[1]} segments are answered by an order, which is never soft.")
    with jax.enable_x64(True):
        scores = -jnp.asarray(regrets, jnp.float64)
        if not pairs:
            answers = sample_ranking(scores, key, temperature)
        elif soft:
            answers = bradley_terry(scores[:, 0], scores[:, 1], temperature, tie_threshold)
        else:
            answers = sample_preference(scores[:, 0], scores[:, 1], key, temperature, tie_threshold)
    return Labels(
        values=np.asarray(answers) if pairs else None,
        orders=None if pairs else np.asarray(answers),
        answered=np.full(len(regrets), True),
        labeler=name,
        parameters=parameters,
    )
