"""One contract for all agents, one for all labelers, one for all environments: a new one is a new line in a table."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs
from agents.bc import BCAgent, BCConfig
from agents.cpl import CPLAgent, CPLConfig
from agents.decision_transformer import DecisionTransformerAgent, DecisionTransformerConfig
from agents.general_preference import GeneralPreferenceAgent, GeneralPreferenceConfig
from agents.iql import IQLAgent, IQLConfig
from agents.oppo import OPPOAgent, OPPOConfig
from agents.piql import PIQLAgent, PIQLConfig
from agents.reward_model import RewardModelAgent, RewardModelConfig
from agents.robust_reward import RobustRewardAgent, RobustRewardConfig
from agents.sac import SACAgent, SACConfig
from envs.metaworld import CPL_VIEW
from labelers.pearl import PearlConfig, PearlTeacher, transfer
from labelers.regret import LogisticTeacher, MeasuredRegretTeacher, RegretTeacher, SimulatedRegretTeacher
from labelers.teachers import Teacher
from robopref.agent import Agent, create_seeds, select_seed, update_many
from robopref.checkpoints import restore_checkpoint, save_checkpoint
from robopref.datasets import (
    PreferenceDataset,
    RankingDataset,
    TransitionDataset,
    WindowDataset,
    WindowPreferenceDataset,
    fit_normalizer,
)
from robopref.episodes import EpisodeDataset
from robopref.networks import Pixels
from robopref.queries import Labeler, Labels, Queries, draw_queries, pair_segments
from robopref.rendering import no_backend_message, use_rendering_backend
from robopref.types import Metrics

ROOT = Path(__file__).resolve().parent.parent
BATCH, LENGTH, WINDOW, SEEDS = 8, 4, 6, 8


def modules(package: str) -> set[str]:
    return {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}


# Agents


class AgentCase(NamedTuple):
    agent_class: type[Any]
    config: Any
    make_data: Callable[[EpisodeDataset], Any]
    from_images: bool = False


def transitions(dataset: EpisodeDataset) -> TransitionDataset:
    return TransitionDataset.create(dataset)


def labelled(dataset: EpisodeDataset) -> tuple[Queries, Labels]:
    """Pairs whose second segment earned more (1), or less (0), or about as much (0.5)."""
    queries = draw_queries(dataset, np.random.default_rng(0), count=40, length=LENGTH)
    gap = np.subtract(*queries.partial_returns.T[::-1])
    values = np.where(np.abs(gap) < 0.5, 0.5, gap > 0)
    return queries, Labels(values=values, answered=np.full(40, True), labeler="test")


def preferences(dataset: EpisodeDataset) -> PreferenceDataset:
    return PreferenceDataset.create(*labelled(dataset))


def window_preferences(dataset: EpisodeDataset) -> WindowPreferenceDataset:
    """Windows of more steps than the segments, so that those near the end of an episode are padded."""
    windows = WindowDataset.create(dataset, WINDOW)
    return WindowPreferenceDataset.create(windows, *labelled(dataset))


def rankings(dataset: EpisodeDataset) -> RankingDataset:
    queries = draw_queries(dataset, np.random.default_rng(0), count=40, length=LENGTH, candidates=3)
    orders = np.argsort(-queries.partial_returns, axis=1)
    return RankingDataset.create(queries, Labels(orders=orders, answered=np.full(40, True), labeler="test"))


def windows(dataset: EpisodeDataset) -> WindowDataset:
    return WindowDataset.create(dataset, LENGTH)


def images(dataset: EpisodeDataset) -> np.ndarray:
    """Of all rows, [R, 12, 12, 1]: four squares, whose brightness says where the point and its goal are."""
    brightness = np.clip(128 + 60 * dataset.observations[:, :4], 0, 255).reshape(-1, 2, 2)
    return np.kron(brightness, np.ones((6, 6)))[..., None].astype(np.uint8)


def image_transitions(dataset: EpisodeDataset) -> TransitionDataset:
    return transitions(dataset).replace(observations=jnp.asarray(images(dataset)))


def image_preferences(dataset: EpisodeDataset) -> PreferenceDataset:
    data = preferences(dataset)
    return data.replace(pairs=data.pairs.replace(observations=jnp.asarray(images(dataset))))


# With dropout, so that updates use their keys, and with boundaries between phases where the runs below are split.
BC_CONFIG = BCConfig(hidden_dims=(16,), dropout=0.1, learning_rate=1e-3)
SFT_CONFIG = BCConfig(hidden_dims=(16,), learning_rate=1e-3, decay_updates=30, pretrain_updates=3)
CPL_CONFIG = CPLConfig(
    hidden_dims=(16,),
    dropout=0.1,
    discount=0.95,
    learning_rate=1e-3,
    pretrain_learning_rate=1e-3,
    warmup_updates=4,
    decay_updates=30,
    pretrain_updates=3,
)
KL_CONFIG = CPLConfig(hidden_dims=(16,), bc_weight=0.5, reference=True, warmup_updates=4, pretrain_updates=3)
RANKINGS_CONFIG = CPLConfig(hidden_dims=(16,), warmup_updates=4, pretrain_updates=3)
IQL_CONFIG = IQLConfig(hidden_dims=(16,), dropout=0.1, learning_rate=1e-3, decay_updates=30)
# Bounded, so that an offset of all rewards matters: without, its gradient is a rounding error, which Adam magnifies.
REWARD_CONFIG = RewardModelConfig(hidden_dims=(16,), ensemble=2, dropout=0.1, bounded=True, learning_rate=1e-3)
ROBUST_CONFIG = RobustRewardConfig(
    network="transformer",
    embed_dim=8,
    heads=2,
    max_length=LENGTH,
    ensemble=1,
    bounded=True,
    learning_rate=1e-3,
    logit_noise=2.0,
    frozen_after=5,
)
GENERAL_CONFIG = GeneralPreferenceConfig(hidden_dims=(16,), planes=2, dropout=0.1, learning_rate=1e-3)
PIQL_CONFIG = PIQLConfig(reward=REWARD_CONFIG, iql=IQL_CONFIG, reward_updates=3)
SAC_CONFIG = SACConfig(hidden_dims=(16,), layer_norm=True, learning_rate=1e-3, target_update_every=2)
OPPO_CONFIG = OPPOConfig(
    length=WINDOW, latent_dim=3, width=8, layers=1, episode_steps=16, learning_rate=1e-3, warmup_updates=4
)
DECISION_CONFIG = DecisionTransformerConfig(
    length=LENGTH,
    width=16,
    layers=1,
    heads=2,
    learning_rate=1e-3,
    warmup_updates=4,
    return_scale=10.0,
    episode_steps=16,
)
PIXELS = Pixels(filters=4, strides=(2, 1), features=8, shift=2)

AGENTS = {
    "bc": AgentCase(BCAgent, BC_CONFIG, transitions),
    "bc_pixels": AgentCase(BCAgent, dataclasses.replace(BC_CONFIG, pixels=PIXELS), image_transitions, True),
    "sft": AgentCase(BCAgent, SFT_CONFIG, preferences),
    "cpl": AgentCase(CPLAgent, CPL_CONFIG, preferences),
    "cpl_kl": AgentCase(CPLAgent, KL_CONFIG, preferences),
    "cpl_pixels": AgentCase(CPLAgent, dataclasses.replace(CPL_CONFIG, pixels=PIXELS), image_preferences, True),
    "cpl_rankings": AgentCase(CPLAgent, RANKINGS_CONFIG, rankings),
    "decision_transformer": AgentCase(DecisionTransformerAgent, DECISION_CONFIG, windows),
    "general_preference": AgentCase(GeneralPreferenceAgent, GENERAL_CONFIG, preferences),
    "iql": AgentCase(IQLAgent, IQL_CONFIG, transitions),
    "oppo": AgentCase(OPPOAgent, OPPO_CONFIG, window_preferences),
    "piql": AgentCase(PIQLAgent, PIQL_CONFIG, preferences),
    "reward_model": AgentCase(RewardModelAgent, REWARD_CONFIG, preferences),
    "robust_reward": AgentCase(RobustRewardAgent, ROBUST_CONFIG, preferences),
    "sac": AgentCase(SACAgent, SAC_CONFIG, transitions),
}
ACTING = [name for name, case in AGENTS.items() if hasattr(case.agent_class, "act")]
acts = pytest.mark.parametrize("trial", ACTING, indirect=True, scope="module")
"""A test of what only agents that act can do."""


class Trial:
    """One agent of the table, with its data."""

    def __init__(self, case: AgentCase, dataset: EpisodeDataset) -> None:
        self.agent_class, self.config = case.agent_class, case.config
        self.data = case.make_data(dataset)
        self.batch = self.data.sample(jax.random.key(0), BATCH)
        self.normalizer = None if case.from_images else fit_normalizer(dataset)
        seen = images(dataset) if case.from_images else dataset.observations
        self.observations = jnp.asarray(seen[:24], jnp.float32)
        self.train = partial(update_many, dataset=self.data, batch_size=BATCH)
        self.updates_traced = 0
        self.update = jax.jit(self._update)

    def create(self, seed: int = 0) -> Any:
        return self.agent_class.create(self.config, self.batch, jax.random.key(seed), normalizer=self.normalizer)

    def _update(self, agent: Agent, batch: Any, key: jax.Array) -> tuple[Agent, Metrics]:
        self.updates_traced += 1
        return agent.update(batch, key)


@pytest.fixture(scope="module", params=AGENTS)
def trial(request: pytest.FixtureRequest, dataset: EpisodeDataset) -> Trial:
    return Trial(AGENTS[request.param], dataset)


@pytest.fixture(scope="module")
def trained(trial: Trial) -> Any:
    """After 7 updates."""
    return trial.train(trial.create(), key=jax.random.key(1), num_updates=7)[0]


def assert_identical(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for (path, one), other in zip(jax.tree.leaves_with_path(first), jax.tree.leaves(second), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), path


def test_every_agent_is_in_the_table() -> None:
    assert {inspect.getmodule(case.agent_class).__name__ for case in AGENTS.values()} == {
        f"agents.{name}" for name in modules("agents")
    }


def test_an_agent_is_a_frozen_pytree_that_begins_at_step_0(trial: Trial) -> None:
    agent = trial.create()
    assert agent.step.dtype == jnp.int32
    assert agent.step.shape == ()
    assert int(agent.step) == 0
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(agent))
    hash(jax.tree.structure(agent))
    with pytest.raises(AttributeError):
        agent.step = jnp.ones((), jnp.int32)


def test_create_follows_from_its_key_alone(trial: Trial) -> None:
    assert_identical(trial.create(3), trial.create(3))
    first, second = (jax.tree.leaves(trial.create(seed).params) for seed in (3, 4))
    assert any(not np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_an_update_changes_every_parameter_and_the_step(trial: Trial) -> None:
    agent = trial.create()
    before = jax.tree.map(np.array, agent)
    after, metrics = trial.update(agent, trial.batch, jax.random.key(2))
    assert int(after.step) == 1
    assert jax.tree.all(jax.tree.map(lambda old, new: not np.array_equal(old, new), agent.params, after.params))
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(np.isfinite(leaf).all()), after.params))
    assert_identical(agent, before)
    assert metrics
    for name, value in metrics.items():
        assert "/" in name
        assert value.shape == ()
        assert np.isfinite(value)


def test_an_update_gives_back_the_same_shapes_and_types(trial: Trial) -> None:
    """Weak types included: with another one, a second call would be compiled again."""
    agent = jax.eval_shape(lambda: trial.create())
    after, _ = jax.eval_shape(lambda agent: agent.update(trial.batch, jax.random.key(0)), agent)
    assert jax.tree.structure(agent) == jax.tree.structure(after)
    for (path, one), other in zip(jax.tree.leaves_with_path(agent), jax.tree.leaves(after), strict=True):
        assert (one.shape, one.dtype, one.weak_type) == (other.shape, other.dtype, other.weak_type), path


def test_an_update_follows_from_batch_and_key_alone(trial: Trial) -> None:
    agent = trial.create()
    once, again = (trial.update(agent, trial.batch, jax.random.key(5)) for _ in range(2))
    assert_identical(once, again)


@acts
def test_act_is_deterministic_and_bounded(trial: Trial, trained: Any) -> None:
    first, second = (trained.act(trial.observations) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    for scale in (1, 1e6):
        actions = np.asarray(trained.act(scale * trial.observations))
        assert np.isfinite(actions).all()
        assert (np.abs(actions) <= 1).all()


@acts
@pytest.mark.parametrize("batch", [(), (24,), (2, 3, 4)])
def test_actions_keep_the_batch_axes(trial: Trial, trained: Any, batch: tuple[int, ...]) -> None:
    shaped = jnp.resize(trial.observations, (*batch, *trial.observations.shape[1:]))
    flat = trained.act(trial.observations)[: max(int(np.prod(batch)), 1)]
    assert trained.act(shaped).shape == (*batch, 2)
    # Not bit for bit: a product of other shapes sums in another order.
    np.testing.assert_allclose(trained.act(shaped).reshape(-1, 2), flat, rtol=1e-5, atol=1e-6)
    assert trained.sample_actions(shaped, jax.random.key(0)).shape == (*batch, 2)


@acts
def test_sampled_actions_follow_from_the_key_and_are_bounded(trial: Trial, trained: Any) -> None:
    first, again, other = (np.asarray(trained.sample_actions(trial.observations, jax.random.key(k))) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert (np.abs(first) <= 1).all()
    far = np.asarray(trained.sample_actions(1e6 * trial.observations, jax.random.key(0)))
    assert (np.abs(far) <= 1).all()
    same_place = np.asarray(trained.sample_actions(jnp.zeros((50, *trial.observations.shape[1:])), jax.random.key(0)))
    assert len(np.unique(same_place, axis=0)) > 25


def test_a_checkpoint_holds_all_of_an_agent(trial: Trial, trained: Any, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    save_checkpoint(path, trained, {})
    assert_identical(restore_checkpoint(path, trial.create(9)), trained)


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(
    trial: Trial, trained: Any, tmp_path: Path
) -> None:
    path = tmp_path / "agent.safetensors"
    half, _ = trial.train(trial.create(), key=jax.random.key(1), num_updates=3)
    save_checkpoint(path, half, {})
    resumed, _ = trial.train(restore_checkpoint(path, trial.create(9)), key=jax.random.key(1), num_updates=4)
    assert_identical(resumed, trained)


def test_updates_are_traced_once_for_all_seeds(trial: Trial) -> None:
    for seed in range(5):
        agent = trial.create(seed)
        for _ in range(2):
            agent, _ = trial.update(agent, trial.batch, jax.random.key(seed))
    assert trial.updates_traced == 1


def test_runs_are_compiled_once_for_all_seeds(trial: Trial) -> None:
    compiled = []
    for seed in range(5):
        agent = trial.create(seed)
        for _ in range(2):
            agent, _ = trial.train(agent, key=jax.random.key(seed), num_updates=3)
            compiled.append(update_many._cache_size())
    assert compiled == compiled[:1] * 10


def test_seeds_trained_together_are_those_trained_alone(trial: Trial) -> None:
    init_keys, train_keys = (jax.random.split(jax.random.key(seed), SEEDS) for seed in (3, 4))
    together = create_seeds(trial.agent_class, trial.config, trial.batch, init_keys, normalizer=trial.normalizer)
    alone = [trial.agent_class.create(trial.config, trial.batch, key, normalizer=trial.normalizer) for key in init_keys]
    for _ in range(5):
        together, metrics = trial.train(together, key=train_keys, num_updates=4)
        runs = [trial.train(agent, key=key, num_updates=4) for agent, key in zip(alone, train_keys, strict=True)]
        alone = [agent for agent, _ in runs]
    assert together.step.tolist() == [20] * SEEDS
    for index, (agent, own) in enumerate(runs):
        one = select_seed(together, index)
        assert jax.tree.structure(one) == jax.tree.structure(agent)
        # Not bit for bit: the matrix products of several seeds at once sum in another order, and Adam, which divides by
        # the size of a gradient, makes the most of what that changes. 20 updates move parameters by 5e-3 and more.
        for leaf, expected in zip(jax.tree.leaves(one.params), jax.tree.leaves(agent.params), strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=2e-4, atol=1e-5)
        for name, value in own.items():
            np.testing.assert_allclose(metrics[name][index], value, rtol=1e-4, atol=1e-5)
    first, second = (jax.tree.leaves(select_seed(together, index).params)[-1] for index in (0, 1))
    assert not np.allclose(first, second, atol=1e-3)


# Labelers


class LabelerCase(NamedTuple):
    make: Callable[[Any, EpisodeDataset], Labeler]
    noiseless: bool


def regret_teacher(point: Any, dataset: EpisodeDataset, **arguments: Any) -> RegretTeacher:
    return RegretTeacher(point.values, point.discount, source="closed form", **arguments)


def simulated_regret_teacher(point: Any, dataset: EpisodeDataset, **arguments: Any) -> SimulatedRegretTeacher:
    return SimulatedRegretTeacher(point.make_simulator, point.expert, 25, point.discount, **arguments)


def measured_regret_teacher(point: Any, dataset: EpisodeDataset, **arguments: Any) -> MeasuredRegretTeacher:
    """Of every window of the dataset."""
    starts = [np.arange(count) for count in dataset.valid_starts(LENGTH)]
    episodes = np.repeat(np.arange(len(dataset)), [len(each) for each in starts])
    windows = Queries(dataset, np.stack([episodes] * 2, axis=1), np.stack([np.concatenate(starts)] * 2, axis=1), LENGTH)
    regrets = regret_teacher(point, dataset).segment_regrets(windows)[:, 0]
    return MeasuredRegretTeacher(dataset.hash, LENGTH, episodes, windows.starts[:, 0], regrets, **arguments)


def pearl_teacher(point: Any, dataset: EpisodeDataset) -> PearlTeacher:
    """What an oracle said of every pair of windows, carried over to these same windows."""
    starts = [np.arange(count) for count in dataset.valid_starts(LENGTH)]
    episodes = np.repeat(np.arange(len(dataset)), [len(each) for each in starts])
    source = pair_segments(dataset, episodes, np.concatenate(starts), length=LENGTH, pairing="dense")
    labels = Teacher().label(source, jax.random.key(0))
    return transfer(source, labels, source, jax.random.key(0), PearlConfig(match="identity"))


LABELERS = {
    "oracle": LabelerCase(lambda point, dataset: Teacher(), True),
    "myopic": LabelerCase(lambda point, dataset: Teacher(discount=0.9), True),
    "skipping": LabelerCase(lambda point, dataset: Teacher(skip_threshold=-4.0, tie_threshold=0.3), True),
    "soft": LabelerCase(lambda point, dataset: Teacher(temperature=1.0, soft=True), True),
    "noisy": LabelerCase(lambda point, dataset: Teacher(temperature=3.0, mistake=0.2), False),
    "regret": LabelerCase(regret_teacher, True),
    "noisy_regret": LabelerCase(partial(regret_teacher, temperature=2.0), False),
    "logistic_regret": LabelerCase(lambda point, dataset: LogisticTeacher(point.values, point.discount), False),
    "simulated_regret": LabelerCase(simulated_regret_teacher, True),
    "noisy_simulated_regret": LabelerCase(partial(simulated_regret_teacher, temperature=2.0), False),
    "measured_regret": LabelerCase(measured_regret_teacher, True),
    "noisy_measured_regret": LabelerCase(partial(measured_regret_teacher, temperature=2.0), False),
    "pearl": LabelerCase(pearl_teacher, True),
}
RANKING = {"oracle", "myopic"} | {name for name in LABELERS if name.endswith("regret")}


@pytest.fixture(scope="module", params=LABELERS)
def labeler(request: pytest.FixtureRequest, point: Any, dataset: EpisodeDataset) -> Labeler:
    return LABELERS[request.param].make(point, dataset)


@pytest.fixture(scope="module")
def pairs(dataset: EpisodeDataset) -> Queries:
    return draw_queries(dataset, np.random.default_rng(2), count=60, length=LENGTH)


@pytest.fixture(scope="module")
def telling_pairs(dataset: EpisodeDataset) -> Queries:
    """A careless segment first, a skilled one second, both from the same state."""
    skilled = np.arange(0, len(dataset), 2)
    return Queries(dataset, np.stack([skilled + 1, skilled], axis=1), np.zeros((len(skilled), 2), int), LENGTH)


def swapped(queries: Queries) -> Queries:
    return Queries(queries.dataset, queries.episodes[:, ::-1], queries.starts[:, ::-1], queries.length)


def test_every_labeler_is_in_the_table(point: Any, dataset: EpisodeDataset) -> None:
    tried = {type(case.make(point, dataset)) for case in LABELERS.values()}
    for name in modules("labelers"):
        tree = ast.parse((ROOT / "labelers" / f"{name}.py").read_text(encoding="utf-8"))
        labelers = {
            node.name
            for node in tree.body
            if isinstance(node, ast.ClassDef)
            and any(isinstance(part, ast.FunctionDef) and part.name == "label" for part in node.body)
        }
        assert labelers <= {each.__name__ for each in tried if each.__module__ == f"labelers.{name}"}


def test_labels_answer_or_skip_every_query(labeler: Labeler, pairs: Queries) -> None:
    labels = labeler.label(pairs, jax.random.key(0))
    assert len(labels) == len(pairs)
    assert labels.orders is None
    assert ((labels.values[labels.answered] >= 0) & (labels.values[labels.answered] <= 1)).all()
    assert np.isnan(labels.values[~labels.answered]).all()
    assert len(np.unique(labels.values[labels.answered])) > 1


def test_a_label_is_the_probability_that_the_second_is_preferred(labeler: Labeler, telling_pairs: Queries) -> None:
    labels, other = (labeler.label(queries, jax.random.key(0)) for queries in (telling_pairs, swapped(telling_pairs)))
    assert labels.answered.sum() >= 4
    assert np.nanmean(labels.values) > 0.6
    assert np.nanmean(other.values) < 0.4


def test_the_same_key_gives_the_same_labels(labeler: Labeler, pairs: Queries) -> None:
    first, second = (labeler.label(pairs, jax.random.key(7)) for _ in range(2))
    np.testing.assert_array_equal(first.values, second.values)
    np.testing.assert_array_equal(first.answered, second.answered)


def test_labels_say_who_gave_them_and_how(labeler: Labeler, pairs: Queries) -> None:
    labels = labeler.label(pairs, jax.random.key(0))
    assert labels.labeler == labeler.name != ""
    assert json.loads(json.dumps(labels.parameters, allow_nan=False)) == labels.parameters
    assert labels.parameters == json.loads(json.dumps(dict(labeler.parameters), allow_nan=False))
    assert labels.parameters


@pytest.mark.parametrize("name", [name for name, case in LABELERS.items() if case.noiseless])
def test_without_noise_swapping_the_segments_flips_the_label(
    name: str, pairs: Queries, dataset: EpisodeDataset, point: Any
) -> None:
    labeler = LABELERS[name].make(point, dataset)
    labels, other = (labeler.label(queries, jax.random.key(0)) for queries in (pairs, swapped(pairs)))
    np.testing.assert_array_equal(other.answered, labels.answered)
    np.testing.assert_allclose(other.values, 1 - labels.values, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, case in LABELERS.items() if case.noiseless])
def test_without_noise_the_key_does_not_matter(name: str, pairs: Queries, dataset: EpisodeDataset, point: Any) -> None:
    labeler = LABELERS[name].make(point, dataset)
    first, second = (labeler.label(pairs, jax.random.key(seed)).values for seed in (0, 1))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", [name for name, case in LABELERS.items() if not case.noiseless])
def test_with_noise_the_key_matters(name: str, pairs: Queries, dataset: EpisodeDataset, point: Any) -> None:
    labeler = LABELERS[name].make(point, dataset)
    first, second = (labeler.label(pairs, jax.random.key(seed)).values for seed in (0, 1))
    assert set(np.unique(first)) <= {0.0, 0.5, 1.0}
    assert (first != second).any()


@pytest.mark.parametrize("name", sorted(RANKING))
def test_orders_put_the_best_first(name: str, dataset: EpisodeDataset, point: Any) -> None:
    """A skilled segment among two careless ones, all from one state: the first, from a random place in the query."""
    skilled = np.arange(0, len(dataset), 2)
    place = np.arange(len(skilled)) % 3
    episodes = np.repeat(skilled[:, None] + 1, 3, axis=1)
    episodes[np.arange(len(skilled)), place] = skilled
    labels = (
        LABELERS[name]
        .make(point, dataset)
        .label(Queries(dataset, episodes, np.zeros_like(episodes), LENGTH), jax.random.key(0))
    )
    assert labels.values is None
    np.testing.assert_array_equal(np.sort(labels.orders, axis=1), np.tile(np.arange(3), (len(skilled), 1)))
    hits = np.mean(labels.orders[:, 0] == place)
    assert hits == 1 if LABELERS[name].noiseless else hits > 1 / 3


# Environments

DELIVERY = {"name": "delivery", "rows": ["..r:", "c.h.", "...."], "horizon": 12}
ENVIRONMENTS = {
    "delivery": DELIVERY,
    "delivery_pixels": {**DELIVERY, "observe": "pixels", "cell_size": 8},
    "locomotion": {"name": "locomotion/Walker2d", "horizon": 12},
    "locomotion_commanded": {
        "name": "locomotion/Hopper",
        "horizon": 12,
        "commands": {"speed": [0.0, 3.0], "height": [0.8, 1.4]},
    },
    "locomotion_ant": {"name": "locomotion/Ant", "horizon": 12},
    "locomotion_humanoid": {"name": "locomotion/Humanoid", "horizon": 12, "commands": {"speed": [0.0, 3.0]}},
    "locomotion_pixels": {"name": "locomotion/HalfCheetah", "horizon": 12, "observe": "pixels", "image_size": 32},
    "metaworld": {"name": "metaworld/door-open-v3", "horizon": 12},
    "metaworld_pixels": {"name": "metaworld/door-open-v3", "horizon": 12, "observe": "pixels", **CPL_VIEW},
    "robosuite": {"name": "robosuite/Lift", "horizon": 12},
    "robosuite_pixels": {"name": "robosuite/PickPlaceCan", "horizon": 12, "observe": "pixels", "image_size": 32},
}
"""One of each family, also seen as images; tests/envs has every task of each."""

OPTIONAL = {"robosuite": pytest.mark.robomimic}
"""Families that need more than the base, and the mark by which a target of the Makefile runs them."""


def marked(name: str) -> Any:
    family = ENVIRONMENTS[name]["name"].split("/")[0]
    return pytest.param(name, marks=OPTIONAL[family]) if family in OPTIONAL else name


@pytest.fixture(scope="module", params=[marked(name) for name in ENVIRONMENTS])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    chosen = ENVIRONMENTS[request.param]
    family = chosen["name"].split("/")[0]
    if family in OPTIONAL and importlib.util.find_spec(family) is None:
        pytest.skip(f"{family} is not installed: `make {OPTIONAL[family].name}` installs it and runs these tests.")
    needs_opengl = chosen.get("observe") == "pixels" and family != "delivery"
    if needs_opengl and use_rendering_backend() is None:
        pytest.skip(no_backend_message())
    return chosen


def play(env: Any, actions: np.ndarray) -> list[tuple[Any, ...]]:
    steps = [env.step(action) for action in actions]
    return [(observation.tolist(), *rest) for observation, *rest in steps]


def random_actions(env: Any, count: int) -> np.ndarray:
    low, high = env.action_space.low, env.action_space.high
    return np.random.default_rng(0).uniform(low, high, (count, *low.shape)).astype(np.float32)


def test_every_family_of_environments_is_in_the_table() -> None:
    assert {config["name"].split("/")[0] for config in ENVIRONMENTS.values()} == envs.CONSTRUCTORS.keys()


@pytest.mark.filterwarnings("ignore:.*A Box observation space m(in|ax)imum value is")
def test_gymnasiums_own_checker_has_no_objection(config: dict[str, Any]) -> None:
    check_env(envs.make(config), skip_render_check=True)


def test_an_environment_is_rebuilt_from_its_configuration(config: dict[str, Any]) -> None:
    env = envs.make(config)
    written = json.loads(json.dumps(dict(env.config), allow_nan=False))
    assert written == env.config
    assert config.items() <= written.items()
    again = envs.make(written)
    assert again.config == env.config
    np.testing.assert_array_equal(env.reset(seed=5)[0], again.reset(seed=5)[0])
    actions = random_actions(env, 8)
    assert play(env, actions) == play(again, actions)


def test_observations_are_vectors_or_images(config: dict[str, Any]) -> None:
    env, other = envs.make(config), envs.make(config)
    observation, _ = env.reset(seed=3)
    for action in random_actions(env, 4):
        if config.get("observe") == "pixels":
            assert (observation.dtype, observation.shape) == (np.uint8, env.image_shape)
            np.testing.assert_array_equal(observation, env.render())
        else:
            assert (observation.dtype, observation.ndim) == (np.float64, 1)
        assert env.observation_space.contains(observation)
        np.testing.assert_array_equal(other.set_state(env.get_state()), observation)
        observation = env.step(action)[0]


def test_the_seed_decides_the_episode(config: dict[str, Any]) -> None:
    env = envs.make(config)
    actions = random_actions(env, 6)
    first, info = env.reset(seed=3)
    played = play(env, actions)
    other, _ = env.reset(seed=4)
    assert not np.array_equal(first, other)
    again, info_again = env.reset(seed=3)
    np.testing.assert_array_equal(first, again)
    assert info == info_again
    assert play(env, actions) == played


def test_a_state_is_all_that_the_future_depends_on(config: dict[str, Any]) -> None:
    env, other = envs.make(config), envs.make(config)
    actions = random_actions(env, 10)
    env.reset(seed=3)
    play(env, actions[:5])
    state = env.get_state()
    assert state.dtype == np.float64
    assert state.ndim == 1
    played = play(env, actions[5:])
    other.reset(seed=8)
    for simulator in (env, other):
        simulator.set_state(state)
        np.testing.assert_array_equal(simulator.get_state(), state)
        assert play(simulator, actions[5:]) == played


def test_the_time_limit_truncates(config: dict[str, Any]) -> None:
    env = envs.make(config)
    env.reset(seed=3)
    played = play(env, random_actions(env, config["horizon"]))
    assert [truncated for _, _, _, truncated, _ in played] == [False] * (config["horizon"] - 1) + [True]
    assert not any(terminated for _, _, terminated, _, _ in played)
