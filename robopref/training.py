"""`fit`: updates in a jitted scan between log points, metrics, atomic checkpoints, and exact resume.

A run that is killed at any moment and started again ends, on a CPU, with the same bits as one that was not: every
update's randomness comes from the run's key and the step, and a checkpoint holds the whole agent.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from robopref.agent import Dataset, Learner, update_many
from robopref.checkpoints import fingerprint, read_checkpoint_metadata, restore_checkpoint, save_checkpoint
from robopref.files import atomic_write
from robopref.progress import ProgressCallback
from robopref.types import Key, Metrics

A = TypeVar("A", bound=Learner)


def fit(
    agent: A,
    dataset: Dataset,
    key: Key,
    *,
    num_updates: int,
    batch_size: int,
    folder: Path | None = None,
    log_every: int = 500,
    checkpoint_every: int | None = None,
    on_checkpoint: Callable[[A, int], None] | None = None,
    progress: ProgressCallback | None = None,
) -> A:
    """Trains until the agent has made `num_updates` updates in all, and returns it.

    Args:
        agent: one agent, or several seeds of it (`create_seeds`) with `key` an array [seeds].
        dataset: where minibatches are drawn from.
        folder: where `metrics.csv` and `checkpoint_*.safetensors` go. If a checkpoint of this same run is there,
            training goes on from it. None keeps nothing.
        log_every: updates between two rows of metrics, each the mean over those updates, with a column per seed.
        checkpoint_every: updates between checkpoints, a multiple of `log_every`; None saves at the end alone.
        on_checkpoint: called with the agent and its step after each checkpoint; not made up for if the run is killed
            between the two.
        progress: called with updates made and `num_updates`.

    Raises:
        ValueError: for counts that do not fit together, a run folder that belongs to another run, or a loss that is
            not finite (with the step up to which the run was good).
    """
    checkpoint_every = num_updates if checkpoint_every is None else checkpoint_every
    _check_counts(
        num_updates=num_updates, batch_size=batch_size, log_every=log_every, checkpoint_every=checkpoint_every
    )
    run = fingerprint((agent, dataset, jax.random.key_data(key)), batch_size)
    rows: list[dict[str, float]] = []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        agent = _resume(agent, folder, run)
    step = _step(agent)
    if step > num_updates:
        raise ValueError(f"{folder or 'the agent'} has made {step} updates, more than the {num_updates} asked for")
    if folder is not None:
        rows = [row for row in read_metrics(folder / "metrics.csv") if row["step"] <= step]
    while step < num_updates:
        count = min(log_every - step % log_every, num_updates - step)
        agent, metrics = update_many(agent, dataset, key, num_updates=count, batch_size=batch_size)
        step += count
        row = {"step": float(step)} | _named_scalars(metrics)
        _check_finite(row, folder)
        rows.append(row)
        if progress is not None:
            progress(step, num_updates)
        if step % checkpoint_every == 0 or step == num_updates:
            if folder is not None:
                # Metrics first: after a crash between the two, the rows past the checkpoint are dropped and made again.
                write_metrics(folder / "metrics.csv", rows)
                save_checkpoint(folder / f"checkpoint_{step:09d}.safetensors", agent, {"step": step, "run": run})
            if on_checkpoint is not None:
                on_checkpoint(agent, step)
    return agent


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run folder by step, earliest first."""
    found = (re.fullmatch(r"checkpoint_(\d+)\.safetensors", path.name) for path in folder.glob("checkpoint_*"))
    steps = sorted(int(match[1]) for match in found if match)
    return {step: folder / f"checkpoint_{step:09d}.safetensors" for step in steps}


def write_metrics(path: Path, rows: list[dict[str, float]]) -> None:
    """Writes one line per row as CSV, atomically."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file; none if there is no such file yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _named_scalars(metrics: Metrics) -> dict[str, float]:
    """One number per metric, or per metric and seed, such as `policy/loss/3`."""
    scalars = {}
    for name, value in metrics.items():
        values = np.asarray(value)
        if values.ndim == 0:
            scalars[name] = float(values)
        else:
            scalars |= {f"{name}/{seed}": float(each) for seed, each in enumerate(values)}
    return scalars


def _step(agent: Learner) -> int:
    return int(np.max(np.asarray(agent.step)))


def _resume(agent: A, folder: Path, run: str) -> A:
    for unfinished in folder.glob(".checkpoint_*"):
        unfinished.unlink()
    saved = checkpoints(folder)
    if not saved:
        return agent
    path = saved[max(saved)]
    if read_checkpoint_metadata(path)["run"] != run:
        raise ValueError(
            f"{folder} holds a run with another configuration, dataset or seed; choose another folder or remove it"
        )
    return restore_checkpoint(path, agent)


def _check_finite(row: Mapping[str, float], folder: Path | None) -> None:
    bad = [name for name, value in row.items() if not np.isfinite(value)]
    if bad:
        raise ValueError(
            f"{bad[0]} is no longer a finite number at update {row['step']:.0f}"
            + (f" of {folder}" if folder else "")
            + "; look for NaN in the data, or lower the learning rate"
        )


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if counts["checkpoint_every"] % counts["log_every"] and counts["checkpoint_every"] != counts["num_updates"]:
        raise ValueError(
            f"checkpoint_every ({counts['checkpoint_every']}) must be a multiple of log_every ({counts['log_every']})"
        )
