"""Finite Markov decision processes, solved exactly: values, advantages, successor features and scaled returns.

Values come from the linear system v = r + discount P v of a policy, and optimal ones from policy iteration: some ten
such systems, where value iteration at a discount of 0.999 needs 25,000 sweeps as soon as the best policy goes round for
ever. The scaled return, the value by softmax over policies and the use of successor features are those of Knox et al.,
"Models of human preference for learning reward functions" (arXiv 2206.02231). The policy that serves several groups of
people is that of Chakraborty et al., "MaxMin-RLHF" (arXiv 2402.08925), found here by a linear program.

All but `softmax_value` and `maximin_policy` insist on float64, which JAX has only under `with jax.enable_x64(True):`.
At a discount of 0.999 the system magnifies rounding a thousandfold: in float32 the returns of the delivery board come
out wrong by 5e-5, and values of a few thousand by 1e-2, so that actions of equal worth no longer tie. The functions
take one process; `jax.vmap`, inside that context, makes all but `maximin_policy` take many of one shape (see `stack`).

Axes: *B any batch axes, S states, A actions, F reward features, K candidates, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float
from scipy import optimize

from robopref.types import PyTree

Numbers: TypeAlias = Array | np.ndarray

_MAX_ROUNDS = 1000
"""Of policy iteration; some ten are needed, and only rounding could ask for so many."""

_GAIN = 1e-12
"""What another action must promise, relative to the largest value, to be more than rounding."""

_VISITED = 1e-9
"""Visits of a state, relative to those of all, below which the linear program cannot tell whether there are any."""


class TabularMDP(struct.PyTreeNode):
    """A Markov decision process with S states and A actions, as NumPy or JAX arrays in float64.

    Attributes:
        transitions: probability of each next state.
        rewards: expected reward of each action; that of a terminal state does not count.
        start: probability of each first state.
        terminal: where an episode is over; such a state is worth 0, whatever its rows say.
        discount: below 1.
        features: expected reward features, of which the rewards are a weighted sum; or None.
    """

    transitions: Float[Numbers, "*B S A S"]
    rewards: Float[Numbers, "*B S A"]
    start: Float[Numbers, "*B S"]
    terminal: Bool[Numbers, "*B S"]
    discount: Float[Numbers, "*B"]
    features: Float[Numbers, "*B S A F"] | None = None

    def reweighted(self, weights: Float[Numbers, " F"]) -> Self:
        """The process that pays features @ weights.

        Raises:
            ValueError: it has no features.
        """
        return self.replace(rewards=_features(self) @ weights)


def stack(mdps: Sequence[TabularMDP]) -> TabularMDP:
    """Processes [B] of one shape, for `jax.vmap`: smaller ones get more states, terminal and never reached.

    Args:
        mdps: at least one; of NumPy arrays, and alike in all but their number of states.
    """
    size = max(mdp.terminal.shape[0] for mdp in mdps)
    padded = [_pad(mdp, size - mdp.terminal.shape[0]) for mdp in mdps]
    stacked: TabularMDP = jax.tree.map(lambda *leaves: np.stack(leaves), *padded)
    return stacked


def uniform_policy(mdp: TabularMDP) -> Float[Array, "S A"]:
    """The policy that takes every action with the same probability."""
    return jnp.full(mdp.rewards.shape, 1.0 / mdp.rewards.shape[-1])


def greedy_policy(q_values: Float[Array, "*B S A"], tolerance: float = 1e-6) -> Float[Array, "*B S A"]:
    """The policy that takes one of the best actions of each state, all of them with the same probability.

    Args:
        q_values: value of each action.
        tolerance: how far below the best an action may be and still count as tied, in the unit of the values.
    """
    best = q_values >= jnp.max(q_values, axis=-1, keepdims=True) - tolerance
    return best / jnp.sum(best, axis=-1, keepdims=True)


def policy_values(mdp: TabularMDP, policy: Float[Array, "S A"]) -> Float[Array, " S"]:
    """The discounted return to expect from each state under a policy, given by its action probabilities."""
    _check(mdp)
    values: Array = _evaluate(mdp, policy, mdp.rewards[..., None])[..., 0]
    return values


def successor_features(mdp: TabularMDP, policy: Float[Array, "S A"]) -> Float[Array, "S F"]:
    """Discounted sums of reward features to expect from each state; times weights, the values of the policy.

    Raises:
        ValueError: the process has no features.
    """
    _check(mdp)
    successors: Array = _evaluate(mdp, policy, _features(mdp))
    return successors


def successor_q_features(mdp: TabularMDP, successors: Float[Array, "S F"]) -> Float[Array, "S A F"]:
    """The same for each action first, then the policy: its features + discount E[successor features after it].

    Raises:
        ValueError: the process has no features.
    """
    _check(mdp)
    ahead: Array = _look_ahead(mdp, _features(mdp), successors)
    return ahead


def q_values(mdp: TabularMDP, values: Float[Array, " S"]) -> Float[Array, "S A"]:
    """The value of each action, given the values of the states that it leads to; 0 in terminal states."""
    _check(mdp)
    ahead: Array = _look_ahead(mdp, mdp.rewards[..., None], values[..., None])[..., 0]
    return ahead


def advantages(mdp: TabularMDP, values: Float[Array, " S"]) -> Float[Array, "S A"]:
    """Q(s, a) - V(s): at most 0 for optimal values, and minus what the action gives away; 0 in terminal states."""
    return jnp.where(mdp.terminal[:, None], 0.0, q_values(mdp, values) - values[:, None])


def optimal_values(mdp: TabularMDP) -> Float[Array, " S"]:
    """The values of the best policy, by policy iteration: the fixed point of value iteration, up to rounding."""
    _check(mdp)
    values: Array = _optimal_values(mdp)
    return values


def mean_return(mdp: TabularMDP, policy: Float[Array, "S A"]) -> Float[Array, ""]:
    """The discounted return to expect from the first state of an episode."""
    return jnp.sum(mdp.start * policy_values(mdp, policy), axis=-1)


def scaled_return(mdp: TabularMDP, policy: Float[Array, "S A"]) -> Float[Array, ""]:
    """(J - J_uniform) / (J* - J_uniform): 1 for an optimal policy, 0 for one like the uniform policy (Knox et al.).

    It is not a number where all policies are equally good.
    """
    worst = mean_return(mdp, uniform_policy(mdp))
    best = jnp.sum(mdp.start * optimal_values(mdp), axis=-1)
    return (mean_return(mdp, policy) - worst) / (best - worst)


class MaximinPolicy(NamedTuple):
    """A policy for several groups, and what each of them has of it.

    Attributes:
        policy: action probabilities.
        scaled_returns: for each group, 1 where the policy is optimal for it, 0 where it is like the baseline.
    """

    policy: Float[np.ndarray, "S A"]
    scaled_returns: Float[np.ndarray, " G"]


def maximin_policy(
    mdp: TabularMDP, weights: Float[Numbers, "G F"], baseline: Float[Numbers, "S A"] | None = None
) -> MaximinPolicy:
    """The policy whose least-served group is served best (the objective of Chakraborty et al.).

    Group g is paid features @ weights_g. Over all policies, which may be stochastic, it maximises the minimum over
    groups of the scaled return (J_g - J_g,baseline) / (J_g* - J_g,baseline). That is a linear program over how often,
    discounted, each action is taken in each state: what flows into a state flows out of it. It takes and gives NumPy
    arrays, and needs no `jax.enable_x64`.

    Args:
        mdp: with features; its own rewards do not count.
        weights: of the features, for each group.
        baseline: the policy that counts as 0 for every group; the uniform one by default.

    Returns:
        The policy, uniform in states that it never visits, and the scaled return of each group.

    Raises:
        ValueError: the process has no features, a group has no policy better than the baseline, or the program was not
            solved.
    """
    with jax.enable_x64(True):
        groups = [mdp.reweighted(each) for each in np.asarray(weights, np.float64)]
        reference = uniform_policy(mdp) if baseline is None else jnp.asarray(baseline)
        worst = np.array([mean_return(group, reference) for group in groups])
        best = np.array([np.sum(mdp.start * np.asarray(optimal_values(group))) for group in groups])
        for index in np.flatnonzero(best - worst <= _GAIN * (1.0 + np.abs(best))):
            raise ValueError(f"no policy serves group {index} better than the baseline; leave that group out.")
        gains = np.stack([np.asarray(group.rewards) / gap for group, gap in zip(groups, best - worst, strict=True)])
        visits = _maximin_visits(mdp, gains, worst / (best - worst))
        often = visits.sum(axis=1, keepdims=True)
        seen = often > _VISITED * often.sum()
        policy = np.where(seen, visits / np.where(seen, often, 1.0), 1.0 / visits.shape[1])
        returns = np.array([mean_return(group, jnp.asarray(policy)) for group in groups])
    return MaximinPolicy(policy, (returns - worst) / (best - worst))


def softmax_value(
    values: Float[Array, "*B"],
    temperature: float | Float[Array, ""],
    where: Bool[Array, "*B"] | None = None,
    *,
    axis: int = -1,
) -> Float[Array, "*C"]:
    """Sum over candidates of softmax(values / temperature) values: a maximum that every candidate has a gradient of.

    With the values of several policies in a state it stands for the optimal value of that state while rewards are
    learned (Knox et al.); gradients pass through both factors. The largest value is subtracted before the division:
    at a temperature of 1e-3 and values of 1e4, quotients of 1e7 would have lost what tells candidates apart. It works
    in the dtype that it is given.

    Args:
        values: of the candidates.
        temperature: above 0, in the unit of the values.
        where: which candidates count; at least one along the axis. None counts all.
        axis: that of the candidates, which the result lacks.
    """
    counts = jnp.ones(values.shape, bool) if where is None else where
    # Shifting all values shifts the result by as much, so that the largest one may be held constant.
    largest = jax.lax.stop_gradient(jnp.max(values, axis=axis, keepdims=True, initial=-jnp.inf, where=counts))
    below = jnp.where(counts, values - largest, 0.0)
    weights = jnp.where(counts, jnp.exp(below / temperature), 0.0)
    mean = jnp.sum(weights * below, axis=axis) / jnp.sum(weights, axis=axis)
    return jnp.squeeze(largest, axis) + mean


def _maximin_visits(
    mdp: TabularMDP, rewards: Float[np.ndarray, "G S A"], offsets: Float[np.ndarray, " G"]
) -> Float[np.ndarray, "S A"]:
    """Discounted visits with the greatest minimum over groups of visits @ rewards - offset; 0 in terminal states."""
    alive = ~np.asarray(mdp.terminal)
    count, num_actions = int(alive.sum()), rewards.shape[-1]
    inside = np.asarray(mdp.transitions)[alive][..., alive].reshape(-1, count)
    leaving = np.repeat(np.eye(count), num_actions, axis=0)
    # The last variable is the minimum over groups.
    flow = np.column_stack([(leaving - mdp.discount * inside).T, np.zeros(count)])
    earned = np.column_stack([-rewards[:, alive].reshape(len(rewards), -1), np.ones(len(rewards))])
    solution = optimize.linprog(
        -np.eye(count * num_actions + 1)[-1],
        A_ub=earned,
        b_ub=-offsets,
        A_eq=flow,
        b_eq=np.asarray(mdp.start)[alive],
        bounds=[(0.0, None)] * (count * num_actions) + [(None, None)],
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if solution.x is None:
        raise ValueError(f"the linear program for the groups' policy was not solved: {solution.message}")
    visits = np.zeros(rewards.shape[1:])
    visits[alive] = np.maximum(solution.x[:-1].reshape(count, num_actions), 0.0)
    return visits


@jax.jit
def _optimal_values(mdp: TabularMDP) -> Float[Array, " S"]:
    num_actions = mdp.rewards.shape[-1]

    def values_of(actions: Array) -> Array:
        return policy_values(mdp, jax.nn.one_hot(actions, num_actions, dtype=mdp.rewards.dtype))

    def improve(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        rounds, actions, values, _ = carry
        worth = q_values(mdp, values)
        own = jnp.take_along_axis(worth, actions[:, None], axis=-1)[:, 0]
        better = jnp.max(worth, axis=-1) - own > _GAIN * (1.0 + jnp.max(jnp.abs(values)))
        actions = jnp.where(better, jnp.argmax(worth, axis=-1), actions)
        return rounds + 1, actions, values_of(actions), jnp.any(better)

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        return carry[3] & (carry[0] < _MAX_ROUNDS)

    # What is best if all goes on at random already points to the goal, which saves rounds.
    actions = jnp.argmax(q_values(mdp, policy_values(mdp, uniform_policy(mdp))), axis=-1)
    first = (jnp.zeros((), jnp.int32), actions, values_of(actions), jnp.ones((), bool))
    values: Array = jax.lax.while_loop(unfinished, improve, first)[2]
    return values


@jax.jit
def _evaluate(mdp: TabularMDP, policy: Float[Array, "S A"], earned: Float[Numbers, "S A F"]) -> Float[Array, "S F"]:
    """Solves x = policy (earned + discount P x) in the states that are not terminal, and x = 0 in the others."""
    acting = jnp.where(mdp.terminal[:, None], 0.0, policy)
    steps = jnp.einsum("sa,sat->st", acting, mdp.transitions)
    system = jnp.eye(len(steps), dtype=steps.dtype) - mdp.discount * steps
    solution: Array = jnp.linalg.solve(system, jnp.einsum("sa,saf->sf", acting, earned))
    return solution


@jax.jit
def _look_ahead(mdp: TabularMDP, earned: Float[Numbers, "S A F"], ahead: Float[Array, "S F"]) -> Float[Array, "S A F"]:
    later = jnp.einsum("sat,tf->saf", mdp.transitions, jnp.where(mdp.terminal[:, None], 0.0, ahead))
    return jnp.where(mdp.terminal[:, None, None], 0.0, earned + mdp.discount * later)


def _features(mdp: TabularMDP) -> Float[Numbers, "S A F"]:
    if mdp.features is None:
        raise ValueError("this process has no reward features: give it some, [states, actions, features].")
    return mdp.features


def _check(mdp: TabularMDP) -> None:
    """Raises ValueError unless all numbers of the process are float64 and stay so in JAX."""
    leaves: PyTree = jax.tree.leaves(mdp.replace(terminal=None))
    if any(jnp.result_type(leaf) != jnp.float64 for leaf in leaves):
        raise ValueError("tabular values need float64: give such arrays, under `with jax.enable_x64(True):`.")


def _pad(mdp: TabularMDP, count: int) -> TabularMDP:
    def grown(array: PyTree, *axes: int) -> PyTree:
        return np.pad(array, [(0, count if axis in axes else 0) for axis in range(np.ndim(array))])

    return mdp.replace(
        transitions=grown(mdp.transitions, 0, 2),
        rewards=grown(mdp.rewards, 0),
        start=grown(mdp.start, 0),
        terminal=np.pad(mdp.terminal, (0, count), constant_values=True),
        features=None if mdp.features is None else grown(mdp.features, 0),
    )
