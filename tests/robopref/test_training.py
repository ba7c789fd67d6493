from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Array, Int

from agents.bc import BCAgent, BCConfig
from agents.cpl import CPLAgent, CPLConfig
from robopref import training
from robopref.agent import create_seeds, select_seed
from robopref.datasets import PreferenceDataset, SegmentTable, TransitionDataset
from robopref.training import checkpoints, fit, read_metrics, write_metrics
from robopref.types import Key, Metrics

UPDATES, LOG_EVERY, CHECKPOINT_EVERY = 40, 2, 4
EVERY_CHECKPOINT = list(range(CHECKPOINT_EVERY, UPDATES + 1, CHECKPOINT_EVERY))


def some_transitions() -> TransitionDataset:
    rng = np.random.default_rng(1)
    return TransitionDataset(
        observations=jnp.asarray(rng.normal(size=(41, 3)), jnp.float32),
        actions=jnp.asarray(rng.uniform(-1, 1, size=(41, 2)), jnp.float32),
        rewards=jnp.zeros(41),
        terminated=jnp.zeros(41, bool),
        rows=jnp.arange(40),
    )


def some_preferences() -> PreferenceDataset:
    steps = some_transitions()
    rng = np.random.default_rng(2)
    rows = jnp.asarray(rng.integers(0, 36, size=(20, 2)), jnp.int32)
    table = SegmentTable(steps.observations, steps.actions, rows, length=5)
    return PreferenceDataset(table, labels=jnp.asarray(rng.integers(0, 2, size=20), jnp.float32))


def train(kind: str, folder: Path | None, *, seed: int = 0, **options: Any) -> Any:
    """A small training run: `bc`, or `cpl` with two seeds that train as one program."""
    key = jax.random.key(seed)
    options = {"num_updates": UPDATES, "log_every": LOG_EVERY, "checkpoint_every": CHECKPOINT_EVERY} | options
    if kind == "bc":
        steps = some_transitions()
        config = BCConfig(hidden_dims=(8,), dropout=0.1, decay_updates=UPDATES)
        bc = BCAgent.create(config, steps.take(jnp.arange(2)), key)
        return fit(bc, steps, jax.random.fold_in(key, 1), batch_size=4, folder=folder, **options)
    pairs = some_preferences()
    config = CPLConfig(hidden_dims=(8,), dropout=0.1, pretrain_updates=13, warmup_updates=3)
    cpl = create_seeds(CPLAgent, config, pairs.take(jnp.arange(2)), jax.random.split(key))
    return fit(cpl, pairs, jax.random.split(jax.random.fold_in(key, 1)), batch_size=4, folder=folder, **options)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(kind: str, folder: Path, moment: str, step: int) -> None:
    """Trains in a process of its own, which is killed at the given moment of the given update."""

    def die_at_the_step(reached: int, _: int) -> None:
        if reached == step:
            die()

    name = f"checkpoint_{step:09d}.safetensors"
    replace = os.replace

    def die_instead_of_replacing(source: Path, target: Path) -> None:
        if Path(target).name == name:
            die()
        replace(source, target)

    save = training.save_checkpoint

    def die_instead_of_saving(path: Path, *rest: Any) -> None:
        if path.name == name:
            die()
        save(path, *rest)

    if moment == "between two checkpoints":
        train(kind, folder, progress=die_at_the_step)
    elif moment == "after the metrics, before the checkpoint":
        training.save_checkpoint = die_instead_of_saving
        train(kind, folder)
    elif moment == "in the middle of writing the checkpoint":
        os.replace = die_instead_of_replacing
        train(kind, folder)


def train_slowly(kind: str, folder: Path) -> None:
    train(kind, folder, progress=lambda *_: time.sleep(0.1))


@contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[BaseProcess]:
    child = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join()


def assert_same_bits(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize(
    ("kind", "moment"), [("bc", "between two checkpoints"), ("cpl", "in the middle of writing the checkpoint")]
)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(kind: str, moment: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = train(kind, whole)
    assert list(checkpoints(whole)) == EVERY_CHECKPOINT

    with process(train_slowly, kind, broken) as child:
        while not checkpoints(broken):
            assert child.is_alive()
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.3))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    reached = max(checkpoints(broken))
    assert reached < 20
    with process(train_and_die, kind, broken, moment, 26 if kind == "bc" else 28) as child:
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert max(checkpoints(broken)) == 24
    made: list[int] = []
    resumed = train(kind, broken, progress=lambda done, _: made.append(done))
    assert made == list(range(24 + LOG_EVERY, UPDATES + 1, LOG_EVERY))
    assert_same_bits(resumed, expected)
    assert contents(broken) == contents(whole)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    expected = train("bc", tmp_path / "whole")
    with process(
        train_and_die, "bc", tmp_path / "broken", moment := "after the metrics, before the checkpoint", 4
    ) as c:
        c.join()
        assert c.exitcode == -signal.SIGKILL, moment
    assert not checkpoints(tmp_path / "broken")
    assert len(read_metrics(tmp_path / "broken" / "metrics.csv")) == 2
    assert_same_bits(train("bc", tmp_path / "broken"), expected)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_a_finished_run_is_read_and_not_made_again(tmp_path: Path) -> None:
    first = train("cpl", tmp_path)
    before = contents(tmp_path)
    never = pytest.fail
    again = train("cpl", tmp_path, progress=lambda *_: never("made an update"), on_checkpoint=lambda *_: never("saved"))
    assert_same_bits(again, first)
    assert contents(tmp_path) == before


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    expected = train("bc", tmp_path / "at once")
    train("bc", tmp_path / "twice", num_updates=16)
    assert_same_bits(train("bc", tmp_path / "twice"), expected)
    assert contents(tmp_path / "twice") == contents(tmp_path / "at once")


def test_without_a_folder_the_same_is_learned_and_nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_same_bits(train("bc", None), train("bc", tmp_path / "kept"))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_seeds_that_train_together_differ(tmp_path: Path) -> None:
    agents = train("cpl", tmp_path)
    assert agents.step.tolist() == [UPDATES, UPDATES]
    rows = read_metrics(tmp_path / "metrics.csv")
    assert all(row["policy/loss/0"] != row["policy/loss/1"] for row in rows)
    first, second = (jax.tree.leaves(select_seed(agents, index).params) for index in range(2))
    assert not any(np.array_equal(one, other) for one, other in zip(first, second, strict=True) if one.ndim == 2)


class Counter(struct.PyTreeNode):
    """An agent whose loss is the number of updates before this one, until it breaks."""

    total: Array
    step: Int[Array, ""]
    breaks_at: int = struct.field(pytree_node=False, default=10**6)

    @classmethod
    def start(cls, breaks_at: int = 10**6) -> Self:
        return cls(total=jnp.zeros(()), step=jnp.zeros((), jnp.int32), breaks_at=breaks_at)

    def update(self, batch: Array, key: Key) -> tuple[Self, Metrics]:
        loss = jnp.where(self.step >= self.breaks_at, jnp.nan, self.step.astype(jnp.float32))
        return self.replace(total=self.total + batch.sum(), step=self.step + 1), {"policy/loss": loss}


class Ones(struct.PyTreeNode):
    ones: Array

    def sample(self, key: Key, batch_size: int) -> Array:
        return self.ones[jax.random.randint(key, (batch_size,), 0, self.ones.shape[0])]


def count(folder: Path | None = None, *, breaks_at: int = 10**6, ones: int = 5, seed: int = 0, **options: Any) -> Any:
    defaults: dict[str, Any] = {"num_updates": 10, "batch_size": 3, "log_every": 2, "checkpoint_every": 4}
    agent: Any = Counter.start(breaks_at)
    return fit(agent, Ones(jnp.ones(ones)), jax.random.key(seed), folder=folder, **defaults | options)


def test_metrics_are_means_between_log_points(tmp_path: Path) -> None:
    agent = count(tmp_path)
    assert (int(agent.step), float(agent.total)) == (10, 30.0)
    # The mean of 0 and 1, of 2 and 3, and so on.
    expected = [{"step": step, "policy/loss": step - 1.5} for step in (2.0, 4.0, 6.0, 8.0, 10.0)]
    assert read_metrics(tmp_path / "metrics.csv") == expected
    count(tmp_path / "odd", num_updates=7, log_every=3, checkpoint_every=6)
    expected = [{"step": 3.0, "policy/loss": 1.0}, {"step": 6.0, "policy/loss": 4.0}, {"step": 7.0, "policy/loss": 6.0}]
    assert read_metrics(tmp_path / "odd" / "metrics.csv") == expected
    assert list(checkpoints(tmp_path / "odd")) == [6, 7]


def test_callbacks(tmp_path: Path) -> None:
    saved: list[tuple[int, int, bool]] = []
    made: list[tuple[int, int]] = []

    def on_checkpoint(agent: Counter, step: int) -> None:
        saved.append((int(agent.step), step, step in checkpoints(tmp_path)))

    count(tmp_path, on_checkpoint=on_checkpoint, progress=lambda *args: made.append(args))
    assert saved == [(4, 4, True), (8, 8, True), (10, 10, True)]
    assert made == [(2, 10), (4, 10), (6, 10), (8, 10), (10, 10)]
    saved.clear()
    count(None, on_checkpoint=lambda agent, step: saved.append((int(agent.step), step, False)))
    assert saved == [(4, 4, False), (8, 8, False), (10, 10, False)]


def test_by_default_only_the_end_is_saved(tmp_path: Path) -> None:
    count(tmp_path, checkpoint_every=None, log_every=3)
    assert list(checkpoints(tmp_path)) == [10]
    assert checkpoints(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"ones": 6}, {"batch_size": 4}, {"breaks_at": 99}],
    ids=["seed", "data", "batch size", "configuration"],
)
def test_a_folder_of_another_run_is_refused_and_left_alone(changed: dict[str, int], tmp_path: Path) -> None:
    count(tmp_path, num_updates=4)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with another configuration, dataset or seed; choose") as raised:
        count(tmp_path, **changed)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert contents(tmp_path) == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_good(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"policy/loss is no longer a finite number at update 8 of .*; look"
        ) as raised:
            count(tmp_path, breaks_at=6)
        assert "\n" not in str(raised.value)
        assert list(checkpoints(tmp_path)) == [4]
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [2, 4]


def test_nan_in_the_data_is_reported(tmp_path: Path) -> None:
    steps = some_transitions()
    steps = steps.replace(observations=steps.observations.at[:, 1].set(jnp.nan))
    agent = BCAgent.create(BCConfig(hidden_dims=(8,)), steps.take(jnp.arange(2)), jax.random.key(0))
    with pytest.raises(ValueError, match="is no longer a finite number at update 2; look for NaN in the data"):
        fit(agent, steps, jax.random.key(1), num_updates=4, batch_size=4, log_every=2)


@pytest.mark.parametrize("name", ["num_updates", "batch_size", "log_every", "checkpoint_every"])
@pytest.mark.parametrize("value", [0, -2])
def test_counts_below_one_are_refused(name: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not {value}"):
        count(tmp_path / "run", **{name: value})
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_do_not_fit_the_log_points_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint_every \(5\) must be a multiple of log_every \(2\)"):
        count(tmp_path / "run", checkpoint_every=5)
    assert not (tmp_path / "run").exists()


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(finite, min_size=n, max_size=n), min_size=1, max_size=5)))
def test_metrics_survive_the_file(tmp_path_factory: pytest.TempPathFactory, values: list[list[float]]) -> None:
    names = ["step", "policy/loss", 'a "name", with commas', "value"]
    rows = [dict(zip(names, row, strict=False)) for row in values]
    path = tmp_path_factory.mktemp("metrics") / "metrics.csv"
    write_metrics(path, rows)
    assert read_metrics(path) == rows


def test_a_metrics_file_that_is_not_there_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.csv") == []
