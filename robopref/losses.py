"""Losses over preferences, one value per example, for the caller to weigh and average.

The preference loss is the cross-entropy of a Bradley-Terry model, as every method that learns a reward uses it. The
contrastive loss, its conservative form and its form for rankings are those of Hejna et al., "Contrastive preference
learning" (arXiv 2310.13639). All are written in softplus and logsumexp, so that large scores give finite losses and
gradients. The triplet loss compares places in a space instead of scores.

Axes: *B any batch axes, A action, K candidates. A label is P(the second segment is preferred).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def preference_loss(logits: Float[Array, "*B"], labels: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Cross-entropy of soft labels against sigmoid(logits), where a logit is score of the second minus the first."""
    return labels * jax.nn.softplus(-logits) + (1.0 - labels) * jax.nn.softplus(logits)


def smoothed(labels: Float[Array, "*B"], smoothing: float) -> Float[Array, "*B"]:
    """(1 - smoothing) labels + smoothing / 2: as if so large a share had been answered at random."""
    return (1.0 - smoothing) * labels + smoothing / 2


def ranking_accuracy(logits: Float[Array, "*E B"], labels: Float[Array, " B"]) -> Float[Array, ""]:
    """The share of decided pairs whose likelier answer is the label, mean over leading axes; 0 if none is decided."""
    decided = labels != 0.5
    right = jnp.mean((logits > 0) == (labels > 0.5), axis=tuple(range(logits.ndim - 1)))
    return jnp.sum(right * decided) / jnp.maximum(jnp.sum(decided), 1)


def contrastive_preference_loss(
    advantages_1: Float[Array, "*B"],
    advantages_2: Float[Array, "*B"],
    labels: Float[Array, "*B"],
    conservative_weight: float = 1.0,
) -> Float[Array, "*B"]:
    """softplus(-(a_plus - conservative_weight * a_minus)), a_plus being the preferred segment's advantage sum.

    A label strictly between 0 and 1 weighs the losses of the two directions: 0.5 is their mean.

    Args:
        advantages_1: sum over the first segment of temperature * log policy, discounted where the caller discounts.
        advantages_2: the same over the second.
        labels: P(the second is preferred).
        conservative_weight: in (0, 1]. Below 1, raising the likelihood of the preferred segment pays more than lowering
            that of the other, which holds the policy to the data. It makes additive constants of the log-likelihood
            count: a Gaussian's normaliser must be left out.
    """
    second_preferred = jax.nn.softplus(conservative_weight * advantages_1 - advantages_2)
    first_preferred = jax.nn.softplus(conservative_weight * advantages_2 - advantages_1)
    return labels * second_preferred + (1.0 - labels) * first_preferred


def plackett_luce_loss(advantages: Float[Array, "*B K"], conservative_weight: float = 1.0) -> Float[Array, "*B"]:
    """Negative log-likelihood of a ranking, given the candidates' advantage sums best first.

    sum_k log[(exp(a_k) + sum_{j>k} exp(conservative_weight * a_j)) / exp(a_k)]: every candidate is the preferred one
    against all that were ranked below it. K = 2 is `contrastive_preference_loss` at every weight; weight 1 is
    Plackett-Luce.
    """
    axis = advantages.ndim - 1
    rivals = jax.lax.cumlogsumexp(conservative_weight * advantages[..., 1:], axis=axis, reverse=True)
    return jnp.sum(jax.nn.softplus(rivals - advantages[..., :-1]), axis=-1)


def all_pairs_loss(advantages: Float[Array, "*B K"], conservative_weight: float = 1.0) -> Float[Array, "*B"]:
    """Mean `contrastive_preference_loss` over all K (K - 1) / 2 pairs of a ranking, given advantage sums best first.

    K segments are scored once for all their pairs; the released code of contrastive preference learning compares the
    segments of a batch in this way where every comparison among them is known.
    """
    count = advantages.shape[-1]
    losses = jax.nn.softplus(conservative_weight * advantages[..., None, :] - advantages[..., :, None])
    # Row i, column j: i was ranked above j.
    return jnp.sum(jnp.triu(losses, k=1), axis=(-2, -1)) / (count * (count - 1) / 2)


def squared_error_log_probability(actions: Float[Array, "*B A"], means: Float[Array, "*B A"]) -> Float[Array, "*B"]:
    """-||actions - means||^2: the log-density of a Gaussian of variance 1/2, without its constant.

    It stands for "log policy" of a deterministic policy in contrastive preference learning. The constant has to be
    absent: with a conservative weight below 1 it would not cancel.
    """
    return -jnp.sum(jnp.square(actions - means), axis=-1)


def expectile_loss(differences: Float[Array, "*B"], expectile: float) -> Float[Array, "*B"]:
    """|expectile - 1[u < 0]| u^2 of u = target - estimate: least, on average, at that expectile of the targets.

    An expectile is to the mean what a quantile is to the median: 0.5 gives half the squared error and so the mean, and
    above 0.5 what lies above the estimate counts for more (Kostrikov et al. 2021, arXiv 2110.06169, equation 5).
    """
    return jnp.where(differences < 0, 1.0 - expectile, expectile) * jnp.square(differences)


def distances(first: Float[Array, "*#B Z"], second: Float[Array, "*#B Z"], epsilon: float = 1e-6) -> Float[Array, "*B"]:
    """||first - second + epsilon||, Euclidean; without epsilon, equal vectors would have no gradient.

    PyTorch adds the same to every coordinate of the difference.
    """
    return jnp.sqrt(jnp.sum(jnp.square(first - second + epsilon), axis=-1))


def triplet_loss(
    anchors: Float[Array, "*#B Z"],
    positives: Float[Array, "*#B Z"],
    negatives: Float[Array, "*#B Z"],
    margin: float | Float[Array, "*#B"] = 1.0,
) -> Float[Array, "*B"]:
    """max(0, ||anchor - positive|| - ||anchor - negative|| + margin): 0 once the positive is nearer by the margin."""
    return jax.nn.relu(distances(anchors, positives) - distances(anchors, negatives) + margin)
