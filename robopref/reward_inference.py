"""Rewards of a tabular process from preferences between segments of it (Knox et al. 2022, arXiv 2206.02231).

The reward is w @ features, and P(the second segment is preferred) = sigmoid(score_2 - score_1), with a score that says
what people look at:

    partial return       sum_t discount^t w @ phi_t
    deterministic regret sum_t discount^t w @ phi_t + discount^T V(s_T) - V(s_0)       (minus the regret)
    full regret          sum_t discount^t [Q(s_t, a_t) - V(s_t)]                        (the same, in expectation)
    advantage            sum_t discount^t A(s_t, a_t), with a table A in place of w

V and Q depend on w through what is best under it. While w is learned, a few policies stand in for all: with their
successor features psi_k, computed once, V(s) = sum_k softmax_k(psi_k(s) @ w / temperature) psi_k(s) @ w, and Q likewise
from the successor features of each action. A table A learned from labels by regret is not a reward: it is to be acted
on greedily (Knox et al. 2023, "Learning optimal advantage from preferences and mistaking it for reward", arXiv
2310.02456).

Three things are not as in the authors' code. The step into a terminal state has its features, without which
reaching a goal looks like losing it. The regret is discounted as its values are, so that all optimal segments have the
same. And dynamics may be stochastic, by the full regret.

Everything works under `jax.vmap` and in float64 (see `robopref.mdp`). Axes: N queries, T time, S states, A actions, F
features, P policies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from robopref.losses import preference_loss
from robopref.mdp import (
    Numbers,
    TabularMDP,
    greedy_policy,
    optimal_values,
    q_values,
    softmax_value,
    successor_features,
    successor_q_features,
)
from robopref.preferences import deterministic_regret, full_regret, partial_return
from robopref.types import PyTree

Score: TypeAlias = Literal["partial return", "deterministic regret", "full regret", "advantage"]


class TabularQueries(struct.PyTreeNode):
    """Pairs of segments of a tabular process. After a terminal state a segment stays there, without features.

    Attributes:
        states: visited, the one that the last action led to included.
        actions: taken.
        features: earned, as they turned out.
    """

    states: Int[Numbers, "*B 2 T+1"]
    actions: Int[Numbers, "*B 2 T"]
    features: Float[Numbers, "*B 2 T F"]


class CandidatePolicies(struct.PyTreeNode):
    """Policies that stand in for all, by their successor features.

    Attributes:
        successors: discounted sums of features from each state.
        q_successors: the same after each action.
        counts: which of them count; the others are copies.
    """

    successors: Float[Array, "*B P S F"]
    q_successors: Float[Array, "*B P S A F"]
    counts: Bool[Array, "*B P"]


@dataclass(frozen=True)
class RewardInferenceConfig:
    """How rewards are learned.

    Attributes:
        score: what people are taken to look at.
        learning_rate: Adam's; 0.5 for regret and 2 for partial returns in the authors' code.
        updates: on all queries at once; 5,000 for regret and 30,000 for partial returns in the authors' code.
        value_temperature: of the softmax over policies, in the unit of the values.
        keep_best: return the parameters of the least loss, as the authors do for regret, and not the last ones.
    """

    score: Score
    learning_rate: float = 0.5
    updates: int = 5000
    value_temperature: float = 1e-3
    keep_best: bool = True


def candidate_policies(mdp: TabularMDP, policies: Float[Numbers, "P S A"]) -> CandidatePolicies:
    """The successor features of given policies, such as the best ones under random weights (`best_policy`).

    Of policies with the same successor features, only the first counts.
    """

    def successors_of(policy: Float[Array, "S A"]) -> tuple[Array, Array]:
        successors = successor_features(mdp, policy)
        return successors, successor_q_features(mdp, successors)

    successors, q_successors = jax.lax.map(successors_of, policies)
    scale = 1e-9 * (1.0 + jnp.max(jnp.abs(successors)))
    gaps = jax.lax.map(lambda each: jnp.max(jnp.abs(successors - each), axis=(1, 2)), successors)
    copies = jnp.any(jnp.tril(gaps < scale, k=-1), axis=1)
    return CandidatePolicies(successors, q_successors, ~copies)


def without_optimal(
    policies: CandidatePolicies,
    weights: Float[Array, " F"],
    values: Float[Array, " S"],
    tolerance: float = 1e-6,
) -> CandidatePolicies:
    """The policies that fall short of the given optimal values somewhere, under the weights that these belong to.

    The authors leave out the optimal ones, so that what is learned is never the answer that was put in. Where all are
    optimal, the first one stays.
    """
    short = jnp.max(jnp.abs(policies.successors @ weights - values), axis=-1) > tolerance
    left = policies.counts & short
    first = jnp.arange(len(left)) == jnp.argmax(policies.counts)
    return policies.replace(counts=jnp.where(jnp.any(left), left, first))


def segment_scores(
    score: Score,
    queries: TabularQueries,
    rewards: Float[Array, "*B T"],
    values: Float[Array, " S"],
    q_values: Float[Array, "S A"],
    discount: float | Float[Array, ""],
) -> Float[Array, "*B"]:
    """What makes people prefer a segment, given the rewards of its steps and values of states and actions.

    Args:
        score: which of them; "advantage" and "full regret" are the same here, Q - V being the advantage.
        queries: the segments, whose batch axes those of the rewards are.
        rewards: of each step.
        values: of each state; 0 in terminal ones.
        q_values: of each action; 0 in terminal states.
        discount: of the process.
    """
    states = queries.states
    if score == "partial return":
        return partial_return(rewards, discount)
    if score == "deterministic regret":
        return -deterministic_regret(values[states[..., 0]], values[states[..., -1]], rewards, discount)
    before = states[..., :-1]
    return -full_regret(values[before], q_values[before, queries.actions], discount)


def learn(
    config: RewardInferenceConfig,
    queries: TabularQueries,
    labels: Float[Array, " N"],
    policies: CandidatePolicies,
    discount: float | Float[Array, ""],
    asked: Bool[Array, " N"] | None = None,
) -> tuple[Array, Float[Array, ""]]:
    """Reward weights [F], or a table of advantages [S, A], that explain the labels, by gradient descent from 0.

    Args:
        config: how.
        queries: pairs of segments.
        labels: P(the second is preferred).
        policies: what values are made of; the other two scores take no notice of it but for its shape.
        discount: of the process.
        asked: which queries count; None counts all. So that learning from the first 10, 30, … is one program.

    Returns:
        the parameters and their loss.
    """
    counts = jnp.ones(labels.shape, bool) if asked is None else asked
    num_states, num_actions, num_features = policies.q_successors.shape[1:]
    no_values, no_q_values = jnp.zeros(num_states), jnp.zeros((num_states, num_actions))

    def logits_of(rewards: Array, values: Array, q_values: Array) -> Array:
        scores = segment_scores(config.score, queries, rewards, values, q_values, discount)
        return scores[..., 1] - scores[..., 0]

    # Logits are linear in the weights and in the tables. What the features of the steps add is summed once.
    earned = jax.jacfwd(lambda weights: logits_of(queries.features @ weights, no_values, no_q_values))(
        jnp.zeros(num_features)
    )
    no_rewards = jnp.zeros(queries.actions.shape)
    # Features first, policies second: so products and sums over them run along rows, in half the time.
    successors, q_successors = (jnp.moveaxis(each, -1, 0) for each in (policies.successors, policies.q_successors))

    def tables(params: Array) -> tuple[Array, Array]:
        """Values of states and of actions; advantages are values of actions where those of states are 0."""
        if config.score == "advantage":
            return no_values, params
        if config.score == "partial return":
            return no_values, no_q_values
        values = _best_values(successors, policies.counts, params, config.value_temperature)
        if config.score == "deterministic regret":
            return values, no_q_values
        q_values = _best_values(q_successors, policies.counts, params, config.value_temperature)
        return no_values, q_values - values[:, None]

    def loss(params: Array) -> Array:
        logits = logits_of(no_rewards, *tables(params))
        if config.score != "advantage":
            logits += earned @ params
        losses = preference_loss(logits, labels)
        return jnp.sum(jnp.where(counts, losses, 0.0)) / jnp.maximum(jnp.sum(counts), 1)

    shape = (num_states, num_actions) if config.score == "advantage" else (num_features,)
    return _descend(loss, jnp.zeros(shape, jnp.float64), config)


def best_policy(mdp: TabularMDP, weights: Float[Numbers, " F"]) -> Float[Array, "S A"]:
    """The optimal policy for rewards features @ weights; actions that are equally good have the same probability.

    Only the direction of the weights matters: they are scaled to a largest one of 1, so that rounding means the same
    for all. Weights of 0 give the uniform policy.
    """
    largest = jnp.max(jnp.abs(weights))
    scaled = mdp.reweighted(weights / jnp.where(largest > 0, largest, 1.0))
    return greedy_policy(q_values(scaled, optimal_values(scaled)))


def _best_values(
    successors: Float[Array, "F P *X"], counts: Bool[Array, " P"], weights: Float[Array, " F"], temperature: float
) -> Float[Array, "*X"]:
    """Values of the best of the policies under these weights, by softmax."""
    values = jnp.tensordot(weights, successors, axes=1)
    where = counts.reshape(-1, *[1] * (values.ndim - 1))
    return softmax_value(values, temperature, jnp.broadcast_to(where, values.shape), axis=0)


def _descend(
    loss: Callable[[Array], Array], params: Array, config: RewardInferenceConfig
) -> tuple[Array, Float[Array, ""]]:
    optimizer = optax.adam(config.learning_rate)

    def update(carry: tuple[PyTree, ...], _: None) -> tuple[tuple[PyTree, ...], None]:
        params, opt_state, best, least = carry
        value, gradient = jax.value_and_grad(loss)(params)
        best, least = jnp.where(value < least, params, best), jnp.minimum(value, least)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (params + updates, opt_state, best, least), None

    first = (params, optimizer.init(params), params, jnp.asarray(jnp.inf, params.dtype))
    (last, _, best, least), _ = jax.lax.scan(update, first, length=config.updates)
    reached = loss(last)
    if config.keep_best:
        return jnp.where(reached < least, last, best), jnp.minimum(reached, least)
    return last, reached
