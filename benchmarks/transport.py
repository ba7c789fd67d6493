"""Gromov-Wasserstein couplings against POT's exact solver in the same run: what they cost, and how long they take.

    pip install -r requirements-test.txt
    python -m benchmarks.transport [--sizes 16 50 100 250 500] [--batch 16] [--json FILE]

The problems are distances in two independent Gaussian clouds, in three and four dimensions, for which a solver has no
structure to go by. "pot" is its conditional gradient from the product of the weights, the default of its users, and
"pot, restarts" the best of eight starts. "entropic" is ours from the product alone, "exact" the same followed by the
descent without regularisation, "three starts" what a caller of `gromov_wasserstein` gets with `exact=True`. Costs are
those of the objective, by that of POT's restarts: below 1 is better. Programs are compiled before anything is timed,
all run in turn, and times are medians, by that of "pot": above 1 is slower. The last table is a batch of equal sizes as
one program, against the same problems one after the other, ours and POT's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from robopref.transport import GromovConfig, gromov_starts, gromov_wasserstein_batch

CONFIGS = {
    "pot": GromovConfig(solver="pot", starts=1),
    "pot, restarts": GromovConfig(solver="pot", starts=8),
    "entropic": GromovConfig(starts=1),
    "exact": GromovConfig(starts=1, exact=True),
    "three starts": GromovConfig(starts=3, exact=True),
}


def make_problem(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    clouds = rng.normal(size=(size, 3)), rng.normal(size=(size, 4))
    first, second = (np.linalg.norm(points[:, None] - points, axis=-1) for points in clouds)
    return first, second


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def compare(size: int, problems: int) -> dict[str, Any]:
    """Costs by POT's best, and seconds, of every solver; means and medians over problems."""
    key = jax.random.key(0)
    for config in CONFIGS.values():
        gromov_starts(*make_problem(size, 0), key, config)
    costs: dict[str, list[float]] = {name: [] for name in CONFIGS}
    times: dict[str, list[float]] = {name: [] for name in CONFIGS}
    for seed in range(problems):
        problem = make_problem(size, seed)
        for name, config in CONFIGS.items():
            taken, found = seconds(lambda problem=problem, config=config: gromov_starts(*problem, key, config)[0])
            times[name].append(taken)
            costs[name].append(float(found.cost))
    best = np.array(costs["pot, restarts"])
    return {
        "size": size,
        "problems": problems,
        "seconds": {name: float(np.median(each)) for name, each in times.items()},
        "cost": {name: float((np.array(each) / best).mean()) for name, each in costs.items()},
        "highest_cost": {name: float((np.array(each) / best).max()) for name, each in costs.items()},
    }


def compare_batch(size: int, count: int, windows: int) -> dict[str, Any]:
    """Seconds of a batch as one program, of its problems one by one, and of POT's solver one by one."""
    problems = [make_problem(size, seed) for seed in range(count)]
    first, second = (np.stack(each) for each in zip(*problems, strict=True))
    key, config = jax.random.key(0), CONFIGS["entropic"]
    runs: dict[str, Callable[[], Any]] = {
        "batch": lambda: gromov_wasserstein_batch(first, second, config),
        "one by one": lambda: [gromov_starts(*problem, key, config) for problem in problems],
        "pot": lambda: [gromov_starts(*problem, key, CONFIGS["pot"]) for problem in problems],
    }
    for run in runs.values():
        run()
    turns = [{name: seconds(run)[0] for name, run in runs.items()} for _ in range(windows)]
    return {"size": size, "count": count, **{name: float(np.median([turn[name] for turn in turns])) for name in runs}}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 50, 100, 250, 500], help="of single problems")
    parser.add_argument("--problems", type=int, default=5, help="of each size (5)")
    parser.add_argument("--batch", type=int, default=16, help="problems in a batch; 0 measures none (16)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64], help="of the problems in a batch")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if importlib.util.find_spec("ot") is None:
        raise SystemExit("POT is what this compares with: pip install -r requirements-test.txt")
    for name in ("PYTORCH", "CUPY", "TENSORFLOW", "JAX"):
        # It would import every array library that it finds, which takes longer than what is measured here.
        os.environ.setdefault(f"POT_BACKEND_DISABLE_{name}", "1")
    device = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else f"{len(os.sched_getaffinity(0))} cores"
    versions = {"jax": jax.__version__, "pot": importlib.metadata.version("POT"), "python": platform.python_version()}
    print(f"{device}; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"\n{'':>6}{'pot':>12}" + "".join(f"{name:>24}" for name in list(CONFIGS)[1:]))
    print(f"{'size':>6}{'seconds':>12}" + f"{'time, cost (highest)':>24}" * (len(CONFIGS) - 1))
    rows = []
    for size in arguments.sizes:
        row = compare(size, arguments.problems)
        rows.append(row)
        cells = ""
        for name in list(CONFIGS)[1:]:
            ratio, highest = row["seconds"][name] / row["seconds"]["pot"], f"({row['highest_cost'][name]:.3f})"
            cells += f"{ratio:>8.1f}{row['cost'][name]:>8.3f}{highest:>8}"
        print(f"{size:>6}{row['seconds']['pot']:>12.4f}{cells}", flush=True)
    batches = []
    if arguments.batch:
        print(f"\n{arguments.batch} problems: seconds as one program, and in times of it one by one and with POT")
        for size in arguments.batch_sizes:
            batch = compare_batch(size, arguments.batch, 3)
            batches.append(batch)
            alone, theirs = batch["one by one"] / batch["batch"], batch["pot"] / batch["batch"]
            print(f"{size:>6}{batch['batch']:>12.4f}{alone:>10.2f}{theirs:>10.3f}", flush=True)
    if arguments.json:
        report = {"device": device, "versions": versions, "rows": rows, "batches": batches}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
