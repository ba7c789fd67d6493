"""OPPO against worked numbers, a re-implementation of its encoder, and a toy whose best action is known."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from agents.oppo import HUMAN, NORM_RATE, OPPOAgent, OPPOConfig, norm_loss
from robopref.agent import ContextPolicy, first_windows, update_many
from robopref.networks import Normalizer
from robopref.types import WindowPreferences, Windows

OBSERVATIONS, ACTIONS, LENGTH, PAIRS = 3, 2, 5, 6
TINY = OPPOConfig(
    length=LENGTH,
    latent_dim=3,
    width=8,
    layers=1,
    encoder_heads=2,
    episode_steps=8,
    learning_rate=1e-2,
    warmup_updates=10,
)
TINY_HUMAN = dataclasses.replace(
    HUMAN, **{name: getattr(TINY, name) for name in ("length", "latent_dim", "width", "layers", "episode_steps")}
)
PARTS = ("encoder", "policy", "latent")
NORMALIZER = Normalizer(mean=jnp.array([0.5, -1.0, 0.0]), std=jnp.array([2.0, 1.0, 0.5]))


def random_windows(*batch: int, seed: int = 0, padded: bool = True) -> Windows:
    """Of episodes' first steps and of later ones, up to more than `episode_steps`; some are short."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LENGTH + 1, batch) if padded else np.full(batch, LENGTH)
    mask = np.arange(LENGTH) >= LENGTH - lengths[..., None]
    steps = rng.integers(0, 12, (*batch, 1)) + np.arange(LENGTH)
    return Windows(
        observations=jnp.asarray(rng.normal(size=(*batch, LENGTH, OBSERVATIONS)), jnp.float32),
        actions=jnp.asarray(rng.uniform(-1, 1, (*batch, LENGTH, ACTIONS)), jnp.float32),
        returns_to_go=jnp.asarray(rng.normal(size=(*batch, LENGTH)), jnp.float32),
        steps=jnp.asarray(steps, jnp.int32),
        mask=jnp.asarray(mask),
    )


def random_pairs(labels: Any = (0, 1, 1, 0, 1, 0), *, unlabelled: bool = False, **kwargs: Any) -> WindowPreferences:
    others = random_windows(2 * PAIRS, seed=9) if unlabelled else None
    windows = random_windows(len(labels), 2, **kwargs)
    return WindowPreferences(windows=windows, labels=jnp.asarray(labels, jnp.float32), unlabelled=others)


def create(config: OPPOConfig = TINY, seed: int = 0, **changes: Any) -> OPPOAgent:
    config = dataclasses.replace(config, **changes)
    return OPPOAgent.create(config, random_pairs(), jax.random.key(seed), normalizer=NORMALIZER)


@jax.jit
def update(agent: OPPOAgent, batch: WindowPreferences, seed: int = 0) -> tuple[OPPOAgent, Any]:
    return agent.update(batch, jax.random.key(seed))


@jax.jit
def encode(agent: OPPOAgent, windows: Windows) -> Any:
    return agent.encode(windows)


@jax.jit
def act(agent: OPPOAgent, windows: Windows) -> Any:
    return agent.act_in_context(windows)


@jax.jit
def predict(agent: OPPOAgent, latents: Any, windows: Windows) -> Any:
    return agent._predict(agent.params["policy"], latents, windows)


@jax.jit
def loss(agent: OPPOAgent, batch: WindowPreferences, seed: int = 0) -> Any:
    return agent.loss(agent.params, batch, jax.random.key(seed))


@jax.jit
def gradients(agent: OPPOAgent, batch: WindowPreferences) -> Any:
    return jax.grad(agent.loss, has_aux=True)(agent.params, batch, jax.random.key(0))


def equal(first: Any, second: Any) -> bool:
    return bool(jax.tree.all(jax.tree.map(np.array_equal, first, second)))


def changed(before: OPPOAgent, after: OPPOAgent) -> set[str]:
    return {part for part in PARTS if not equal(before.params[part], after.params[part])}


class Fixed(OPPOAgent):
    """Every window's latent is its first action."""

    def _encode(self, params: Any, windows: Windows, dropout_key: Any = None) -> Any:
        return windows.actions[..., 0, :]


def fixed_latents(**changes: Any) -> OPPOAgent:
    """With z* = (1, 0)."""
    agent = create(latent_dim=2, dropout=0.0, **changes)
    values = {name: getattr(agent, name) for name in agent.__dataclass_fields__}
    values["params"] = {**agent.params, "latent": jnp.array([1.0, 0.0])}
    return Fixed(**values)


def pair_of(first: Any, second: Any, label: float) -> WindowPreferences:
    """With these latents, for `fixed_latents`."""
    batch = random_pairs((label,), padded=False)
    actions = batch.windows.actions.at[0, :, 0].set(jnp.array([first, second]))
    return batch.replace(windows=batch.windows.replace(actions=actions))


@pytest.mark.parametrize("label", [0.0, 1.0, 0.2, 0.8])
def test_the_worked_example(label: float):
    """z* = (1, 0), z+ = (.6, .8), z- = (0, 1): distances .894427 and 1.414214."""
    preferred, other = (0.6, 0.8), (0.0, 1.0)
    batch = pair_of(*((other, preferred) if label > 0.5 else (preferred, other)), label)
    agent = fixed_latents()
    moved, metrics = update(agent, batch)
    assert metrics["latent/triplet_loss"] == pytest.approx(0.480214, abs=1e-5)
    assert metrics["latent/ranking_accuracy"] == 1
    latents = jnp.array([[(0.6, 0.8), (0.0, 1.0)]])
    gradient = jax.grad(agent._ranking_loss)(jnp.array([1.0, 0.0]), latents, jnp.zeros(1))
    np.testing.assert_allclose(gradient, [-0.259893, -0.187320], atol=1e-5)
    # Adam's first step is as long as the learning rate along each axis, and weight decay takes 1e-7 off.
    np.testing.assert_allclose(moved.params["latent"], [1.0010, 0.0010], atol=1e-6)
    assert metrics["latent/norm"] == pytest.approx(np.hypot(1.001, 0.001), abs=1e-5)


def test_norm_losses_of_the_worked_example():
    latents = jnp.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    np.testing.assert_allclose(norm_loss(latents, one_sided=False), [16, 0.25, 1], rtol=1e-6)
    np.testing.assert_allclose(norm_loss(latents, one_sided=True), [4, 0, 0], rtol=1e-6)
    for one_sided in (False, True):
        gradient = jax.grad(lambda latents, one_sided=one_sided: norm_loss(latents, one_sided=one_sided).sum())(latents)
        direction = np.array([0.6, 0.8])
        expected = (
            [direction, 0 * direction, 0 * direction] if one_sided else [8 * direction, -direction, 0 * direction]
        )
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_the_losses_of_a_batch_are_their_formulas():
    """From latents and actions of the agent's own, which other tests are about."""
    batch = random_pairs((0, 1, 0.5, 0.7, 0, 1))
    agent = create(dropout=0.0, alpha=0.7, beta=0.3, margin=1.5)
    value, metrics = loss(agent, batch)
    z, latent = np.asarray(encode(agent, batch.windows), np.float64), np.asarray(agent.params["latent"], np.float64)
    losses = []
    for (first, second), label in zip(z, batch.labels, strict=True):
        preferred, other = (second, first) if label > 0.5 else (first, second)
        if label != 0.5:
            gap = np.linalg.norm(latent - preferred) - np.linalg.norm(latent - other)
            losses.append(max(0.0, gap + 1.5))
    norms = np.linalg.norm(z, axis=-1)
    made = np.asarray(predict(agent, jnp.asarray(z, jnp.float32), batch.windows))
    squares, mask = np.square(made - np.asarray(batch.windows.actions)).mean(-1), np.asarray(batch.windows.mask)
    him = sum(squares[:, side][mask[:, side]].mean() for side in (0, 1))
    norm = ((norms - 1) ** 2).mean(0).sum()
    assert len(losses) == 5
    assert metrics["policy/him_loss"] == pytest.approx(him, rel=1e-5)
    assert metrics["latent/triplet_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert metrics["latent/norm_loss"] == pytest.approx(norm, rel=1e-4)
    assert value == pytest.approx(him + 0.7 * np.mean(losses) + 0.3 * norm, rel=1e-5)


def test_reconstruction_is_of_unlabelled_windows_where_there_are_any():
    batch = random_pairs(unlabelled=True)
    agent = create(dropout=0.0)
    _, metrics = loss(agent, batch)
    _, without = loss(agent, batch.replace(unlabelled=None))
    others = batch.unlabelled
    made = np.asarray(predict(agent, encode(agent, others), others))
    squares = np.square(made - np.asarray(others.actions)).mean(-1)[np.asarray(others.mask)]
    assert metrics["policy/him_loss"] == pytest.approx(2 * squares.mean(), rel=1e-5)
    assert metrics["policy/him_loss"] != pytest.approx(float(without["policy/him_loss"]), rel=1e-3)
    for name in ("latent/triplet_loss", "latent/norm_loss"):
        assert metrics[name] == pytest.approx(float(without[name]), rel=1e-5)


def normalized(values: np.ndarray, params: Any) -> np.ndarray:
    centred = values - values.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)
    return scaled * np.asarray(params["scale"]) + np.asarray(params["bias"])


def test_an_encoder_without_layers_is_the_sum_of_its_valid_tokens():
    agent, windows = create(layers=0), random_windows(4)
    assert not windows.mask.all()
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), agent.params["encoder"])
    observations = (np.asarray(windows.observations) - np.asarray(NORMALIZER.mean)) / np.asarray(NORMALIZER.std)
    times = params["Embed_0"]["embedding"][np.minimum(windows.steps, TINY.episode_steps - 1)]
    total = 0.0
    for layer, values in (("Dense_0", observations), ("Dense_1", np.asarray(windows.actions))):
        tokens = values @ params[layer]["kernel"] + params[layer]["bias"] + times
        hidden = normalized(tokens, params["Transformer_0"]["ColumnNorm_0"])
        total = total + (hidden * np.asarray(windows.mask)[..., None]).sum(1)
    expected = total @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]
    np.testing.assert_allclose(encode(agent, windows), expected, rtol=1e-4, atol=1e-5)


def repadded(windows: Windows, filling: float) -> Windows:
    """The same steps, with padding that holds something else."""
    mask = windows.mask
    fill = {
        "observations": jnp.where(mask[..., None], windows.observations, filling),
        "actions": jnp.where(mask[..., None], windows.actions, filling),
        "returns_to_go": jnp.where(mask, windows.returns_to_go, filling),
        "steps": jnp.where(mask, windows.steps, 7),
    }
    return windows.replace(**fill)


@pytest.mark.parametrize("config", [TINY, TINY_HUMAN], ids=["scripted", "human"])
@pytest.mark.parametrize("filling", [1e3, float("nan")])
def test_nothing_depends_on_what_padding_holds(config: OPPOConfig, filling: float):
    agent, batch = create(config), random_pairs(unlabelled=True)
    other = batch.replace(windows=repadded(batch.windows, filling), unlabelled=repadded(batch.unlabelled, filling))
    assert not batch.windows.mask.all()
    assert not batch.unlabelled.mask.all()
    assert equal(encode(agent, batch.windows), encode(agent, other.windows))
    assert equal(act(agent, batch.windows), act(agent, other.windows))
    assert equal(update(agent, batch), update(agent, other))


def test_neither_padding_nor_its_length_is_in_a_latent_or_an_action():
    agent, windows = create(), random_windows(4, padded=False)
    kept = jax.tree.map(lambda leaf: leaf[:, 2:], windows)
    padded = windows.replace(mask=windows.mask.at[:, :2].set(False))
    np.testing.assert_allclose(encode(agent, padded), encode(agent, kept), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(act(agent, padded), act(agent, kept), rtol=1e-5, atol=1e-6)
    assert not np.allclose(encode(agent, windows), encode(agent, kept), atol=1e-3)
    assert not np.allclose(act(agent, windows), act(agent, kept), atol=1e-4)


def test_the_policy_sees_the_latent_the_past_and_the_present_state():
    agent, windows = create(), random_windows(1, padded=False)
    latents = jnp.zeros((1, TINY.latent_dim))
    before = np.asarray(predict(agent, latents, windows))

    def moved(latents: Any = latents, **changes: Any) -> list[bool]:
        after = np.asarray(predict(agent, latents, windows.replace(**changes)))
        return (np.abs(after - before).max(axis=(0, 2)) > 1e-6).tolist()

    assert moved(actions=windows.actions.at[:, 2].add(1.0)) == [False] * 3 + [True] * 2
    assert moved(observations=windows.observations.at[:, 2].add(1.0)) == [False] * 2 + [True] * 3
    assert moved(returns_to_go=windows.returns_to_go + 1) == [False] * 5
    assert moved(latents + 1.0) == [True] * 5


def test_acting_does_not_look_at_the_present_action():
    agent, windows = create(), random_windows(3)
    actions = act(agent, windows)
    for value in (0.7, float("nan")):
        other = windows.replace(actions=windows.actions.at[:, -1].set(value))
        assert equal(act(agent, other), actions)


def test_acting_at_the_first_step_is_acting_without_a_past():
    agent = create()
    observations = random_windows(4).observations[:, 0]
    first = first_windows(observations, TINY.length, ACTIONS)
    actions = np.asarray(agent.act(observations))
    np.testing.assert_allclose(act(agent, first), actions, rtol=1e-5, atol=1e-6)
    policy = ContextPolicy(agent)
    stepped, carry = policy.step(policy.start(np.arange(4)), np.asarray(observations))
    np.testing.assert_allclose(stepped, actions, rtol=1e-5, atol=1e-6)
    later, _ = policy.step(carry, np.asarray(observations))
    assert not np.allclose(later, actions, atol=1e-5)


def test_step_a_moves_encoder_and_policy_and_step_b_the_latent():
    agent, batch = create(), random_pairs()
    after, _ = update(agent, batch)
    assert changed(agent, after) == set(PARTS)
    assert not np.any(gradients(agent, batch)[0]["latent"])
    held, _ = update(create(learn_latent=False), batch)
    assert changed(agent, held) == {"encoder", "policy"}
    assert equal(held.params["encoder"], after.params["encoder"])
    moved, _ = jax.jit(lambda agent: agent._learn_latent(batch))(held.replace(config=agent.config))
    assert changed(held, moved) == {"latent"}
    # The windows are encoded anew: by the encoder as it is after step A.
    np.testing.assert_allclose(moved.params["latent"], after.params["latent"], rtol=1e-6)


def test_without_alpha_and_with_a_fixed_latent_labels_say_nothing():
    batch = random_pairs()
    flipped = batch.replace(labels=1.0 - batch.labels)

    def apart(**changes: Any) -> set[str]:
        agent = create(**changes)
        return changed(*(update(agent, each)[0] for each in (batch, flipped)))

    assert apart(alpha=0.0, learn_latent=False) == set()
    assert apart(alpha=0.0) == {"latent"}
    assert apart(learn_latent=False) == {"encoder"}
    assert apart() == {"encoder", "latent"}


@pytest.mark.parametrize("config", [TINY, TINY_HUMAN], ids=["scripted", "human"])
def test_a_batch_of_ties_alone(config: OPPOConfig):
    agent = create(config)
    after, metrics = update(agent, random_pairs((0.5,) * PAIRS, unlabelled=True))
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves((after.params, metrics)))
    assert after.latent_norm == agent.latent_norm == 1
    assert (metrics["latent/triplet_loss"] == 0) is not config.rank_ties


def test_ties_that_are_ranked_have_no_margin():
    latents = jnp.array([[[0.6, 0.8], [0.0, 1.0]], [[0.0, 1.0], [0.6, 0.8]], [[0.6, 0.8], [0.0, 1.0]]])
    labels, agent = jnp.array([0.5, 0.5, 0.0]), create(latent_dim=2, rank_ties=True)
    losses = [0.0, 1.414214 - 0.894427, 0.480214]
    assert agent._ranking_loss(jnp.array([1.0, 0.0]), latents, labels) == pytest.approx(np.mean(losses), abs=1e-5)
    unranked = agent.replace(config=dataclasses.replace(agent.config, rank_ties=False))
    assert unranked._ranking_loss(jnp.array([1.0, 0.0]), latents, labels) == pytest.approx(losses[2], abs=1e-5)


def test_people_s_labels_train_the_encoder_alone_and_windows_every_second_time():
    first = create(TINY_HUMAN, learn_latent=False)
    batch = random_pairs(unlabelled=True)
    second, _ = update(first, batch)
    third, _ = update(second, batch)
    fourth, _ = update(third, batch)
    assert changed(first, second) == changed(third, fourth) == {"encoder", "policy"}
    assert changed(second, third) == {"encoder"}
    assert [int(agent.opt_state["policy"][1][0].count) for agent in (first, second, third, fourth)] == [0, 1, 1, 2]
    assert [int(agent.opt_state["encoder"][1][0].count) for agent in (first, second, third, fourth)] == [0, 2, 3, 5]
    assert not np.any(jax.tree.leaves(gradients(first, batch)[0]["policy"])[0])
    # Where there is nothing unlabelled, the labelled windows stand in.
    alone, _ = update(first, batch.replace(unlabelled=None))
    assert changed(first, alone) == {"encoder", "policy"}


def test_states_are_reconstructed_at_the_tokens_of_actions():
    agent, batch = create(reconstruct_states=True, dropout=0.0), random_pairs(padded=False)
    plain = agent.replace(config=dataclasses.replace(agent.config, reconstruct_states=False))
    latents = encode(agent, batch.windows)
    made = predict(agent, latents, batch.windows)
    assert made.shape == (PAIRS, 2, LENGTH, ACTIONS + OBSERVATIONS)
    true = agent.normalizer(batch.windows.observations)
    expected = np.square(made[..., ACTIONS:] - true).mean(axis=(0, 2, 3)).sum()
    with_states, without = (float(loss(each, batch)[1]["policy/him_loss"]) for each in (agent, plain))
    assert with_states - without == pytest.approx(float(expected), rel=1e-4)
    # A state is made where its own action is already known.
    nudged = batch.windows.replace(actions=batch.windows.actions.at[..., 2, :].add(1.0))
    moved = np.abs(predict(agent, latents, nudged) - made).max(axis=(0, 1, 3))
    assert (moved > 1e-6).tolist() == [False, False, True, True, True]


def test_noise_is_on_what_the_policy_sees_while_training():
    batch = random_pairs()
    quiet, noisy = create(dropout=0.0), create(dropout=0.0, observation_noise=0.5)

    def him(agent: OPPOAgent, seed: int) -> float:
        return float(loss(agent, batch, seed)[1]["policy/him_loss"])

    assert him(quiet, 0) == him(quiet, 1) != him(noisy, 0) != him(noisy, 1)
    assert equal(encode(quiet, batch.windows), encode(noisy, batch.windows))
    assert equal(act(quiet, batch.windows), act(noisy, batch.windows))


def test_a_latent_without_time_is_the_same_at_every_step():
    """The tokens of z are the first of each step: what is read at the first state's hears of time by two tokens."""
    windows, latents = random_windows(1, padded=False), jnp.ones((1, 3))
    timed, untimed = create(timed_latent=True), create(timed_latent=False)
    assert equal(timed.params, untimed.params)
    assert not np.allclose(predict(timed, latents, windows), predict(untimed, latents, windows), atol=1e-4)
    # Where time has no embedding, there is nothing to tell.
    table = jax.tree.map(jnp.zeros_like, timed.params["policy"]["Embed_0"])
    params = {**timed.params, "policy": {**timed.params["policy"], "Embed_0": table}}
    timed, untimed = (agent.replace(params=params) for agent in (timed, untimed))
    np.testing.assert_allclose(predict(timed, latents, windows), predict(untimed, latents, windows), atol=1e-6)


def test_the_gradients_of_each_network_are_clipped_apart():
    """Adam's first moment after one update is a tenth of the gradient, which is as long as the limit says at most."""
    batch = random_pairs()

    def lengths(**changes: Any) -> list[float]:
        state = update(create(**changes), batch)[0].opt_state
        moments = [state[part][1][0].mu for part in ("encoder", "policy")]
        return [10 * float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(each)))) for each in moments]

    free = lengths(clip=1e6, beta=3.0)
    assert all(length > 1e-2 for length in free)
    np.testing.assert_allclose(lengths(clip=1e-2, beta=3.0), [1e-2, 1e-2], rtol=1e-4)


def test_only_the_policy_is_warmed_up():
    batch = random_pairs()
    agent = create(dropout=0.0, weight_decay=0.0)
    at_once, _ = update(create(dropout=0.0, weight_decay=0.0, warmup_updates=0), batch)
    slowly, _ = update(agent, batch)
    assert equal(at_once.params["encoder"], slowly.params["encoder"])
    for start, fast, slow in zip(
        *(jax.tree.leaves(each.params["policy"]) for each in (agent, at_once, slowly)), strict=True
    ):
        np.testing.assert_allclose(slow - start, (fast - start) / TINY.warmup_updates, rtol=1e-2, atol=1e-7)


def test_the_norm_that_is_projected_to_is_a_running_mean():
    batch = pair_of((3.0, 4.0), (9.0, 9.0), 0.0)
    agent = fixed_latents(learn_latent=False, project_latent=True)
    np.testing.assert_allclose(agent.latent, [1.0, 0.0])
    agent, _ = update(agent, batch)
    np.testing.assert_allclose(agent.latent, [5.0, 0.0], rtol=1e-6)
    assert agent.latent_norm.dtype == jnp.float32
    agent, _ = update(agent, pair_of((9.0, 9.0), (0.6, 0.8), 1.0))
    np.testing.assert_allclose(agent.latent, [3.0, 0.0], rtol=1e-6)
    much_later, _ = update(agent.replace(step=jnp.int32(10_000)), pair_of((0.0, 0.0), (0.0, 0.0), 1.0))
    np.testing.assert_allclose(much_later.latent, [3.0 * (1 - NORM_RATE), 0.0], rtol=1e-6)


def test_windows_are_scored_by_their_distance_to_the_latent():
    agent, windows = create(), random_windows(4)
    expected = -np.linalg.norm(np.asarray(encode(agent, windows)) - np.asarray(agent.params["latent"]), axis=-1)
    np.testing.assert_allclose(agent.window_scores(windows), expected, rtol=1e-4)


def test_longer_windows_and_wrong_heads_are_refused():
    message = "windows of 5 steps are longer than the 4 that OPPO is configured for"
    with pytest.raises(ValueError, match=message):
        create(length=4)
    agent = OPPOAgent.create(
        dataclasses.replace(TINY, length=4),
        jax.tree.map(lambda leaf: leaf[..., :4, :] if leaf.ndim > 3 else leaf[..., :4], random_pairs()),
        jax.random.key(0),
    )
    for refuse in (agent.encode, agent.act_in_context):
        with pytest.raises(ValueError, match=message):
            refuse(random_windows(2))
    with pytest.raises(ValueError, match="the width of tokens, 8, is not a multiple of policy_heads=3"):
        create(policy_heads=3)


# A toy


class Constants(struct.PyTreeNode):
    """Windows in which nothing is seen and all actions are about c, with c between -0.8 and 0.8; more is preferred."""

    length: int = struct.field(pytree_node=False, default=4)

    def windows(self, levels: Any, key: Any) -> Windows:
        shape = (*levels.shape, self.length)
        return Windows(
            observations=jnp.ones((*shape, 1)),
            actions=(levels[..., None] + 0.05 * jax.random.normal(key, shape))[..., None],
            returns_to_go=jnp.zeros(shape),
            steps=jnp.broadcast_to(jnp.arange(self.length), shape),
            mask=jnp.ones(shape, bool),
        )

    def sample(self, key: Any, batch_size: int) -> WindowPreferences:
        level_key, action_key = jax.random.split(key)
        levels = jax.random.uniform(level_key, (batch_size, 2), minval=-0.8, maxval=0.8)
        labels = (levels[:, 1] > levels[:, 0]).astype(jnp.float32)
        return WindowPreferences(windows=self.windows(levels, action_key), labels=labels)


@pytest.fixture(scope="module")
def toy() -> OPPOAgent:
    config = OPPOConfig(
        length=4,
        width=16,
        layers=1,
        encoder_heads=1,
        dropout=0.0,
        episode_steps=4,
        alpha=0.1,
        learning_rate=1e-3,
        warmup_updates=1,
        clip=1.0,
        latent_learning_rate=1e-2,
        action_noise=0.0,
    )
    data = Constants()
    agent = OPPOAgent.create(config, data.sample(jax.random.key(0), 2), jax.random.key(1))
    return update_many(agent, data, jax.random.key(2), num_updates=1500, batch_size=32)[0]


def test_the_preferred_latent_acts_beyond_the_data_and_its_projection_within(toy: OPPOAgent):
    projected = toy.replace(config=dataclasses.replace(toy.config, project_latent=True))
    raw_action, action = (float(agent.act(jnp.ones(1))[0]) for agent in (toy, projected))
    levels = jnp.linspace(-0.8, 0.8, 9)
    windows = Constants().windows(levels, jax.random.key(5))
    made = predict(toy, encode(toy, windows), windows)[:, 0, 0]
    scores = np.asarray(toy.window_scores(windows))
    assert np.abs(made - levels).max() < 0.2
    assert scores.argmax() >= 7
    assert np.corrcoef(scores, levels)[0, 1] > 0.8
    assert raw_action > 0.8
    assert 0.3 < action < 0.8
    assert float(jnp.linalg.norm(toy.latent)) > 1.5 * float(toy.latent_norm)
