"""Segment statistics, and the probabilities with which they make one segment preferred to another.

A preference model is a statistic of each segment (its *score*) and a noise model on top. The statistics are the partial
return and the regret of Knox et al., "Models of human preference for learning reward functions" (arXiv 2206.02231), and
the sum of advantages of Hejna et al., "Contrastive preference learning" (arXiv 2310.13639). The noise models are
Bradley-Terry for two segments and Plackett-Luce for an order of K. Regret prefers the smaller, so its score is -regret.

Some functions go the other way. Labels are corrected by what an ensemble that learned from them thinks of them (Wang
et al. 2024, "Secrets of RLHF in large language models part II", arXiv 2401.06080), and a score becomes a bounded reward
by how likely it is preferred to reference scores (Fu et al. 2025, "Reward shaping to mitigate reward hacking in RLHF",
arXiv 2502.18770).

Axes: *B any batch axes, T time, K candidates, E members of an ensemble, M references. The functions are pure and work
in the dtype that they are given.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from robopref.types import Key


def partial_return(rewards: Float[Array, "*B T"], discount: float | Float[Array, ""] = 1.0) -> Float[Array, "*B"]:
    """Sum over the segment of discount^t r_t."""
    return _discounted_sum(rewards, discount)


def advantage_sum(advantages: Float[Array, "*B T"], discount: float | Float[Array, ""] = 1.0) -> Float[Array, "*B"]:
    """Sum over the segment of discount^t A_t: under the optimal advantage, minus the full regret."""
    return _discounted_sum(advantages, discount)


def deterministic_regret(
    first_values: Float[Array, "*B"],
    last_values: Float[Array, "*B"],
    rewards: Float[Array, "*B T"],
    discount: float | Float[Array, ""] = 1.0,
) -> Float[Array, "*B"]:
    """V(s_0) - [sum_t discount^t r_t + discount^T V(s_T)]: what the segment lost against optimal behaviour.

    It equals the full regret where transitions are deterministic, and only there.

    Args:
        first_values: V of the state in which the segment begins.
        last_values: V of the state that its last action led to (0 where that state is terminal).
        rewards: the rewards of its T steps.
        discount: the one under which the values were computed.
    """
    horizon = rewards.shape[-1]
    return first_values - (partial_return(rewards, discount) + discount**horizon * last_values)


def full_regret(
    values: Float[Array, "*B T"], q_values: Float[Array, "*B T"], discount: float | Float[Array, ""] = 1.0
) -> Float[Array, "*B"]:
    """Sum over the segment of discount^t [V(s_t) - Q(s_t, a_t)], which is right under any dynamics."""
    return _discounted_sum(values - q_values, discount)


def bradley_terry(
    scores_1: Float[Array, "*B"],
    scores_2: Float[Array, "*B"],
    temperature: float | Float[Array, ""] = 1.0,
    threshold: float = 0.0,
) -> Float[Array, "*B"]:
    """P(the second segment is preferred) = sigmoid((scores_2 - scores_1) / temperature).

    Args:
        scores_1: score of the first segment, such as its partial return or its negated regret.
        scores_2: score of the second.
        temperature: in the unit of the scores; 0 is the noiseless limit, in which equal scores give 1/2.
        threshold: scores that differ by less than this are a tie, and give 1/2.
    """
    difference = scores_2 - scores_1
    noiseless = (1.0 + jnp.sign(difference)) / 2.0
    noisy = jax.nn.sigmoid(difference / jnp.where(temperature > 0, temperature, 1.0))
    probability = jnp.where(temperature > 0, noisy, noiseless)
    return jnp.where(jnp.abs(difference) < threshold, 0.5, probability)


def sample_preference(
    scores_1: Float[Array, "*B"],
    scores_2: Float[Array, "*B"],
    key: Key,
    temperature: float | Float[Array, ""] = 1.0,
    threshold: float = 0.0,
) -> Float[Array, "*B"]:
    """Labels drawn from `bradley_terry`: 0 or 1, and 0.5 for a tie, which is never settled by a draw.

    Ties are scores that differ by less than the threshold and, at temperature 0, equal scores.
    """
    probability = bradley_terry(scores_1, scores_2, temperature, threshold)
    drawn = jax.random.bernoulli(key, probability).astype(probability.dtype)
    tied = jnp.abs(scores_2 - scores_1) < threshold
    return jnp.where((temperature > 0) & ~tied, drawn, probability)


def plackett_luce_log_probability(
    scores: Float[Array, "*B K"], temperature: float | Float[Array, ""] = 1.0
) -> Float[Array, "*B"]:
    """Log-probability of ranking K segments in the order in which their scores are given, best first.

    Each place is filled from the candidates that are left with probability proportional to exp(score / temperature).
    Temperature 0 is the noiseless limit: -inf for an order that is not descending, and equal candidates in any order.
    """
    scaled = scores / jnp.where(temperature > 0, temperature, 1.0)
    noisy = jnp.sum(scaled - jax.lax.cumlogsumexp(scaled, axis=scaled.ndim - 1, reverse=True), axis=-1)
    descending = jnp.all(scores[..., :-1] >= scores[..., 1:], axis=-1)
    equal = scores[..., :, None] == scores[..., None, :]
    rivals = jnp.sum(jnp.triu(equal), axis=-1)
    noiseless = jnp.where(descending, -jnp.sum(jnp.log(rivals), axis=-1), -jnp.inf)
    return jnp.where(temperature > 0, noisy, noiseless)


def sample_ranking(
    scores: Float[Array, "*B K"], key: Key, temperature: float | Float[Array, ""] = 1.0
) -> Int[Array, "*B K"]:
    """An order drawn from Plackett-Luce: candidate indices, best first. Temperature 0 sorts, ties in random order."""
    noise = jax.random.gumbel(key, scores.shape, jnp.result_type(scores, float))
    # Sorting scores with Gumbel noise on them draws from Plackett-Luce; the second sort key only matters among equals.
    return jnp.lexsort((noise, scores + temperature * noise), axis=-1)[..., ::-1]


def preference_strength(
    logits: Float[Array, "E B"], labels: Float[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Mean and standard deviation over members of how far they prefer the segment that the label prefers.

    Below 0, the members doubt the label. A tie prefers neither: its strength is 0.

    Args:
        logits: of each member, its score of the second segment minus that of the first.
        labels: P(the second is preferred).
    """
    strengths = jnp.sign(labels - 0.5) * logits
    return jnp.mean(strengths, axis=0), jnp.std(strengths, axis=0)


def vote_on_labels(
    logits: Float[Array, "E B"],
    labels: Float[Array, " B"],
    *,
    flip_share: float = 0.2,
    soft_within: float = 1.0,
) -> Float[Array, " B"]:
    """Labels as an ensemble that learned from them would have them: flipped, softened, or as they were.

    By the mean u and the standard deviation s of the `preference_strength`:

    * |u| <= soft_within s: the members do not agree, and the label becomes the mean of their probabilities;
    * u < -soft_within s, and u among the lowest `flip_share`: the label is likely wrong, and is flipped;
    * otherwise, and for ties, the label stays.

    Members that have learned the wrong labels by heart doubt none of them: stop them early, or ask members that have
    not seen the pairs. A fifth is the share that the paper found to do harm.

    Args:
        logits: as in `preference_strength`.
        labels: P(the second is preferred).
        flip_share: of the pairs, at most, are flipped; rounded to whole pairs.
        soft_within: how many standard deviations from 0 a preference is undecided.
    """
    mean, std = preference_strength(logits, labels)
    undecided = jnp.abs(mean) <= soft_within * std
    lowest = jnp.argsort(jnp.argsort(mean)) < round(flip_share * labels.shape[0])
    corrected = jnp.where(lowest & (mean < 0), 1.0 - labels, labels)
    corrected = jnp.where(undecided, jnp.mean(jax.nn.sigmoid(logits), axis=0), corrected)
    return jnp.where(labels == 0.5, labels, corrected)


def preference_as_reward(
    scores: Float[Array, "*B"], references: Float[Array, "*#B M"], scale: float = 1.0
) -> Float[Array, "*B"]:
    """mean_m sigmoid(scale (score - reference_m)): how likely the score is preferred to those of the references.

    Bounded by 0 and 1 and steepest near the references, so that what a reward model makes of behaviour far from what it
    knows cannot rule reinforcement learning.

    Args:
        scores: such as an episode's return under a reward model.
        references: of M episodes of the initial policy, best from the same first state.
        scale: of the scores, whose unit a model of preferences fixes only where labels are noisy.
    """
    return jnp.mean(jax.nn.sigmoid(scale * (scores[..., None] - references)), axis=-1)


def preference_as_episode_rewards(
    rewards: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    references: Float[Array, "*#B M"],
    scale: float = 1.0,
) -> Float[Array, "*B T"]:
    """Rewards of episodes whose returns are `preference_as_reward` of theirs, minus 1/2: all at the last step.

    At each step it would be a bonus for being alive, as every term is above 0. At the end, and centred, an episode as
    good as the references earns nothing, however long it was.

    Args:
        rewards: of each step, such as a reward model's.
        mask: which steps are the episode's; at least one, with no gaps.
        references: returns, sums of the same rewards over episodes of the initial policy.
        scale: as in `preference_as_reward`.
    """
    compared = preference_as_reward(jnp.sum(jnp.where(mask, rewards, 0.0), axis=-1), references, scale) - 0.5
    following = jnp.concatenate([mask[..., 1:], jnp.zeros_like(mask[..., :1])], axis=-1)
    return jnp.where(mask & ~following, compared[..., None], 0.0)


def _discounted_sum(terms: Float[Array, "*B T"], discount: float | Float[Array, ""]) -> Float[Array, "*B"]:
    weights = jnp.power(jnp.asarray(discount, jnp.result_type(terms, float)), jnp.arange(terms.shape[-1]))
    return jnp.sum(weights * terms, axis=-1)
