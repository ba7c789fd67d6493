"""Ensembles of reward networks; what the networks compute is tested with the reward model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robopref.networks import Normalizer, apply
from robopref.reward_networks import MLPReward, PreferenceTransformer, check_length, init_members, member_rewards
from robopref.types import Segments

MEMBERS, STEPS = 3, 5
NETWORKS = {
    "mlp": MLPReward((16,), dropout=0.5),
    "transformer": PreferenceTransformer(embed_dim=8, layers=1, heads=2, max_length=STEPS, dropout=0.5),
}
NORMALIZER = Normalizer(mean=jnp.array([0.5, -1.0, 0.0]), std=jnp.array([2.0, 1.0, 0.5]))


def random_segments(*batch: int, length: int = STEPS) -> Segments:
    rng = np.random.default_rng(0)
    return Segments(
        jnp.asarray(rng.normal(size=(*batch, length, 3)), jnp.float32),
        jnp.asarray(rng.uniform(-1, 1, (*batch, length, 2)), jnp.float32),
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_each_member_has_a_network_and_a_dropout_of_its_own(name: str):
    network, segments = NETWORKS[name], random_segments(4, 2)
    params = init_members(network, jax.random.key(0), MEMBERS, segments)
    for key in (None, jax.random.key(1)):
        together = member_rewards(network, params, NORMALIZER, segments, key)
        assert together.shape == (MEMBERS, 4, 2, STEPS)
        own_keys = [None] * MEMBERS if key is None else jax.random.split(key, MEMBERS)
        for member, own_key in enumerate(own_keys):
            own = jax.tree.map(lambda leaf, member=member: leaf[member], params)
            normalized = (segments.observations - NORMALIZER.mean) / NORMALIZER.std
            alone = apply(network, own, normalized, segments.actions, dropout_key=own_key)
            np.testing.assert_allclose(together[member], alone, rtol=1e-4, atol=1e-5)
        assert np.abs(together[0] - together[1]).max() > 1e-2


def test_only_the_transformer_has_a_longest_segment():
    longer = random_segments(2, length=STEPS + 1)
    check_length(NETWORKS["mlp"], longer)
    check_length(NETWORKS["transformer"], random_segments(2))
    with pytest.raises(ValueError, match=rf"{STEPS + 1} steps long.*positions for {STEPS}.*max_length={STEPS + 1}"):
        init_members(NETWORKS["transformer"], jax.random.key(0), MEMBERS, longer)
