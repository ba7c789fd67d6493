"""Simulated teachers that see the true reward and are as imperfect as people are.

The imperfections, and the order in which they act, are those of Lee et al., "B-Pref: Benchmarking preference-based
reinforcement learning" (arXiv 2111.03026): a teacher skips queries in which nothing worth judging happens, calls close
ones a tie, weighs the latest steps most, answers noisily, and presses the wrong button now and then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from robopref.preferences import bradley_terry, partial_return, sample_preference, sample_ranking
from robopref.queries import Labels, Queries
from robopref.types import Key

PRESETS = ("oracle", "mistake", "noisy", "skip", "equal", "myopic")
"""The names that `preset` knows."""

THRESHOLD_PRESETS = ("skip", "equal")
"""Those of them that need a threshold."""


@dataclass(frozen=True)
class Teacher:
    """Labels queries by the rewards stored with them. The defaults make an oracle.

    Pairs get values. Queries of K > 2 segments get orders, drawn from Plackett-Luce over the same scores.

    Attributes:
        temperature: of the noise, in the unit of the scores; 0 is noiseless (B-Pref's beta is 1 / temperature).
        discount: of the past: step t of T counts discount^(T - 1 - t), so that below 1 the teacher is myopic.
        mistake: probability with which an answer is turned round.
        skip_threshold: a query is skipped if no segment's undiscounted partial return exceeds this; None never skips.
        tie_threshold: a pair whose undiscounted partial returns differ by less than this is a tie, whatever follows.
        temperature_on: whether the score is the weighted sum of rewards or their weighted mean.
        soft: answer with the probability itself, mistakes included, rather than with a draw from it.
        name: what the labels say who gave them.
    """

    temperature: float = 0.0
    discount: float = 1.0
    mistake: float = 0.0
    skip_threshold: float | None = None
    tie_threshold: float = 0.0
    temperature_on: Literal["sum", "mean"] = "sum"
    soft: bool = False
    name: str = "teacher"

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"the teacher's temperature must be at least 0, not {self.temperature}.")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"the teacher's discount must lie in [0, 1], not {self.discount}.")
        if not 0 <= self.mistake <= 1:
            raise ValueError(f"the teacher's mistake is a probability, not {self.mistake}.")
        if not self.tie_threshold >= 0:
            raise ValueError(f"the teacher's tie_threshold must be at least 0, not {self.tie_threshold}.")
        if self.temperature_on not in ("sum", "mean"):
            raise ValueError(f"the teacher's temperature is on 'sum' or 'mean', not {self.temperature_on!r}.")

    @property
    def parameters(self) -> Mapping[str, str | float | bool | None]:
        """What `Labels.parameters` records."""
        return {
            "temperature": self.temperature,
            "discount": self.discount,
            "mistake": self.mistake,
            "skip_threshold": self.skip_threshold,
            "tie_threshold": self.tie_threshold,
            "temperature_on": self.temperature_on,
            "soft": self.soft,
        }

    def label(self, queries: Queries, key: Key) -> Labels:
        """Answers every query, or skips it.

        Raises:
            ValueError: the queries have K > 2 segments and the teacher has an imperfection that no order can express.
        """
        pairs = queries.candidates == 2
        if not pairs and (self.tie_threshold > 0 or self.mistake > 0 or self.soft):
            raise ValueError(
                f"queries of {queries.candidates} segments are answered by an order, which knows no ties,"
                " mistakes or soft labels; set tie_threshold and mistake to 0 and soft to False, or draw pairs."
            )
        # Double precision: which of two close returns is larger must not depend on rounding.
        with jax.enable_x64(True):
            rewards, index = _distinct_rewards(queries)
            returns, scores = partial_return(rewards)[index], self._scores(rewards)[index]
            answers = self._values(returns, scores, key) if pairs else sample_ranking(scores, key, self.temperature)
            best = np.asarray(jnp.max(returns, axis=-1))
            answered = np.full(len(best), True) if self.skip_threshold is None else best > self.skip_threshold
            values = np.where(answered, np.asarray(answers), np.nan) if pairs else None
            orders = None if pairs else np.where(answered[:, None], np.asarray(answers), -1)
        return Labels(
            values=values,
            orders=orders,
            answered=answered,
            labeler=self.name,
            parameters=self.parameters,
        )

    def _scores(self, rewards: Float[Array, "U T"]) -> Float[Array, " U"]:
        weighted = partial_return(rewards[..., ::-1], self.discount)
        if self.temperature_on == "sum":
            return weighted
        return weighted / partial_return(jnp.ones(rewards.shape[-1]), self.discount)

    def _values(self, returns: Float[Array, "N 2"], scores: Float[Array, "N 2"], key: Key) -> Float[Array, " N"]:
        answer_key, mistake_key = jax.random.split(key)
        if self.soft:
            values = bradley_terry(scores[:, 0], scores[:, 1], self.temperature)
            values = (1.0 - self.mistake) * values + self.mistake * (1.0 - values)
        else:
            values = sample_preference(scores[:, 0], scores[:, 1], answer_key, self.temperature)
            mistaken = jax.random.bernoulli(mistake_key, self.mistake, values.shape)
            values = jnp.where(mistaken, 1.0 - values, values)
        tied = jnp.abs(returns[:, 1] - returns[:, 0]) < self.tie_threshold
        return jnp.where(tied, 0.5, values)


def _distinct_rewards(queries: Queries) -> tuple[Float[Array, "U T"], Int[np.ndarray, "N K"]]:
    """Rewards of the U distinct segments, and which of them each candidate is; in dense pairings each occurs often."""
    first = queries.dataset.offsets[queries.episodes] + queries.starts
    rows, index = np.unique(first, return_inverse=True)
    rewards = queries.dataset.rewards[rows[:, None] + np.arange(queries.length)]
    return jnp.asarray(rewards, jnp.float64), index.reshape(first.shape)


def relative_threshold(fraction: float, mean_return: float, length: int, horizon: float) -> float:
    """A skip or tie threshold: the given fraction of what an average segment earns.

    Args:
        fraction: such as 0.1.
        mean_return: mean return of the episodes that the queries are drawn from; positive.
        length: steps of a segment.
        horizon: steps of an episode, on average.

    Raises:
        ValueError: a return that is not positive has no such fraction.
    """
    if not mean_return > 0:
        raise ValueError(
            f"a threshold relative to the mean return needs a positive one, not {mean_return:g}; give an absolute one."
        )
    # The authors' released code multiplies by the fraction twice from the second query on; once is what the paper says.
    return fraction * mean_return * length / horizon


def benchmark_threshold(queries: Queries) -> float:
    """The benchmark's skip or tie threshold for these queries: a tenth of what an average segment earns.

    Raises:
        ValueError: the mean return of the episodes is not positive.
    """
    dataset = queries.dataset
    return relative_threshold(0.1, float(dataset.returns.mean()), queries.length, float(dataset.lengths.mean()))


def preset(name: str, *, threshold: float | None = None) -> Teacher:
    """One of the six teachers of B-Pref, each with a single imperfection, or none.

    Args:
        name: one of `PRESETS`.
        threshold: for "skip" and "equal", which need one; see `benchmark_threshold`.

    Raises:
        ValueError: there is no such preset, or it needs a threshold.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no teacher {name!r}; choose one of {', '.join(PRESETS)}.")
    if threshold is None and name in THRESHOLD_PRESETS:
        raise ValueError(f"the teacher {name!r} needs a threshold, in the unit of a segment's partial return.")
    return {
        "oracle": Teacher(name=name),
        "mistake": Teacher(name=name, mistake=0.1),
        "noisy": Teacher(name=name, temperature=1.0),
        "skip": Teacher(name=name, skip_threshold=threshold),
        "equal": Teacher(name=name, tie_threshold=threshold or 0.0),
        "myopic": Teacher(name=name, discount=0.9),
    }[name]
