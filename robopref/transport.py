"""Couplings of two sets of points: Sinkhorn across one cost, Gromov-Wasserstein across two that share no space.

A *coupling* is a matrix of non-negative masses whose rows sum to the weights of the first set, and whose columns to
those of the second. Gromov-Wasserstein seeks the one that keeps distances: it lowers

    sum_{i i' j j'} (costs_x[i, i'] - costs_y[j, j'])^2 T[i, j] T[i', j'] + fused_penalty sum_{i j} linear[i, j] T[i, j]

(Peyré et al., "Gromov-Wasserstein averaging of kernel and distance matrices", ICML 2016, eq. 5-9; the second term is
that of Vayer et al., arXiv 1805.09114). The problem is not convex, has mirror images among its optima, and the product
of the weights is a point at which a solver may rest while it says that it converged. Hence costs are divided by their
means, the regularisation is lowered in stages, several starts are made, the objective is computed anew in double
precision, and a warning says when the best coupling says nothing.

The solvers are those of OTT-JAX, in single precision, on sizes padded by points without mass, so that few programs are
compiled. OTT linearises half of the quadratic term, and its own `fused_penalty` is therefore half of this one; the
regularisation of POT's `entropic_gromov_wasserstein` is twice `epsilon`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float
from ott.geometry.geometry import Geometry
from ott.initializers.quadratic.initializers import QuadraticInitializer
from ott.problems.linear.linear_problem import LinearProblem
from ott.problems.quadratic.quadratic_problem import QuadraticProblem
from ott.solvers.linear.sinkhorn import Sinkhorn
from ott.solvers.quadratic.gromov_wasserstein import GromovWasserstein
from scipy import optimize, sparse

from robopref.types import Key

Costs: TypeAlias = Float[np.ndarray, "n n"]

BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Sizes to which sets of points are padded; larger ones to multiples of the last."""

_GREATEST_MARGINAL_ERROR = 1e-3
_DESCENT_STEPS = 1000
_UNINFORMATIVE_COST, _UNINFORMATIVE_ENTROPY = 0.95, 0.98


class Coupling(struct.PyTreeNode):
    """Masses between two sets of points, and how good they are.

    Attributes:
        matrix: the masses; its sums are the weights.
        cost: the objective without regularisation, at this matrix.
        product_cost: the objective at the product of the weights, which pairs everything with everything.
        entropy_ratio: entropy of the matrix by that of the product: 1 for the product, 1/2 for a one-to-one coupling of
            uniform weights.
        converged: whether the solver came to rest, and kept the sums meanwhile.
    """

    matrix: Float[Any, "*B n m"]
    cost: Float[Any, "*B"]
    product_cost: Float[Any, "*B"]
    entropy_ratio: Float[Any, "*B"]
    converged: Bool[Any, "*B"]

    @property
    def cost_ratio(self) -> Float[Any, "*B"]:
        """Cost by product cost: near 1 the coupling says nothing. 1 where the product costs nothing either."""
        nothing = self.product_cost == 0
        return self.cost / (self.product_cost + nothing) + nothing

    @property
    def informative(self) -> Bool[Any, "*B"]:
        """Whether it differs from the product, in cost and in entropy, by more than a few percent."""
        return (self.cost_ratio < _UNINFORMATIVE_COST) & (self.entropy_ratio < _UNINFORMATIVE_ENTROPY)


@dataclass(frozen=True)
class GromovConfig:
    """How Gromov-Wasserstein is solved. The library's own defaults would return the product of the weights.

    Attributes:
        solver: `entropic` (OTT-JAX), or `pot`, the conditional gradient with exact inner transport of the POT package,
            which is the quicker one for a single problem on a CPU, and gives sparse couplings.
        epsilon: regularisation at the end, in units of the squared scaled costs. Below 5e-4 single precision shows.
        first_epsilon: regularisation at first, where the search starts from the product.
        stages: from the first to the last, at constant ratios.
        starts: initial couplings: the product, then one by profiles of distances, then random ones. The best is kept.
        exact: whether `entropic` ends with a descent without regularisation, to a sparse coupling.
        fused_penalty: weight of the linear cost, where one is given.
        scaled: divide each cost by its mean (linear ones too), without which `epsilon` has no meaning of its own.
        threshold: relative change of the cost at which a stage ends, and error of its inner solver.
        max_iterations: linearisations in a stage.
        sinkhorn_iterations: in one linearisation, each of which begins where the last one ended.
    """

    solver: Literal["entropic", "pot"] = "entropic"
    epsilon: float = 0.005
    first_epsilon: float = 0.05
    stages: int = 4
    starts: int = 3
    exact: bool = False
    fused_penalty: float = 1.0
    scaled: bool = True
    threshold: float = 1e-6
    max_iterations: int = 300
    sinkhorn_iterations: int = 200

    def __post_init__(self) -> None:
        if self.solver not in ("entropic", "pot"):
            raise ValueError(f"the solver of Gromov-Wasserstein is 'entropic' or 'pot', not {self.solver!r}.")
        for name in ("epsilon", "first_epsilon", "threshold"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of Gromov-Wasserstein must be positive, not {getattr(self, name)}.")
        for name in ("stages", "starts", "max_iterations", "sinkhorn_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of Gromov-Wasserstein must be at least 1, not {getattr(self, name)}.")
        if not self.fused_penalty >= 0:
            raise ValueError(f"fused_penalty of Gromov-Wasserstein must be at least 0, not {self.fused_penalty}.")


def sinkhorn(
    costs: Float[Array, "n m"],
    weights_x: Float[Array, " n"] | None = None,
    weights_y: Float[Array, " m"] | None = None,
    *,
    epsilon: Any = 0.05,
    threshold: float = 1e-3,
    max_iterations: int = 2000,
) -> Coupling:
    """The entropic coupling of least cost (Cuturi 2013): a pure function, for `jax.jit` and `jax.vmap`.

    Args:
        costs: between the points of the two sets, as they are: nothing is scaled.
        weights_x: of the first set, with sum 1; uniform unless given. Points of weight 0 stay without mass.
        weights_y: of the second set.
        epsilon: regularisation, in the unit of the costs.
        threshold: error of the sums at which it ends.
        max_iterations: it ends then at the latest, and `converged` says so.
    """
    rows, columns = costs.shape
    first = jnp.full(rows, 1.0 / rows) if weights_x is None else weights_x
    second = jnp.full(columns, 1.0 / columns) if weights_y is None else weights_y
    problem = LinearProblem(Geometry(cost_matrix=costs, epsilon=epsilon), first, second)
    found = Sinkhorn(threshold=threshold, max_iterations=max_iterations)(problem)
    matrix, product = found.matrix, first[:, None] * second
    return Coupling(
        matrix=matrix,
        cost=jnp.sum(costs * matrix),
        product_cost=jnp.sum(costs * product),
        entropy_ratio=_entropy(matrix) / jnp.maximum(_entropy(product), 1e-12),
        converged=found.converged,
    )


def gromov_cost(costs_x: Any, costs_y: Any, matrix: Any, linear_costs: Any = None) -> Any:
    """The objective of Gromov-Wasserstein at a coupling, as NumPy or JAX arrays are given.

    It is a difference of large sums: use float64 where costs are near 0.

    Args:
        costs_x: [n, n].
        costs_y: [m, m].
        matrix: the coupling, [n, m].
        linear_costs: [n, m], multiplied by their penalty already.
    """
    rows, columns = matrix.sum(axis=1), matrix.sum(axis=0)
    squares = rows @ (costs_x**2) @ rows + columns @ (costs_y**2) @ columns
    cost = squares - 2.0 * ((costs_x @ matrix @ costs_y.T) * matrix).sum()
    return cost if linear_costs is None else cost + (linear_costs * matrix).sum()


def gromov_wasserstein(
    costs_x: Float[Any, "n n"],
    costs_y: Float[Any, "m m"],
    key: Key,
    config: GromovConfig = GromovConfig(),
    *,
    weights_x: Float[Any, " n"] | None = None,
    weights_y: Float[Any, " m"] | None = None,
    linear_costs: Float[Any, "n m"] | None = None,
    initial: Sequence[Float[Any, "n m"]] = (),
) -> Coupling:
    """The best coupling of all starts, in float64; warns where it says nothing.

    Args:
        costs_x: distances within the first set, symmetric.
        costs_y: distances within the second.
        key: of the random starts.
        config: of the solver.
        weights_x: of the first set; uniform unless given. They are divided by their sum.
        weights_y: of the second set.
        linear_costs: between the sets, by features that they share; weighted by `config.fused_penalty`.
        initial: couplings to start from, beside the `config.starts`.

    Raises:
        ValueError: shapes or numbers make no problem; the message says which.
        ImportError: `solver="pot"` without the package.
    """
    best = gromov_starts(
        costs_x,
        costs_y,
        key,
        config,
        weights_x=weights_x,
        weights_y=weights_y,
        linear_costs=linear_costs,
        initial=initial,
    )[0]
    warn_if_uninformative(best)
    return best


def gromov_starts(
    costs_x: Float[Any, "n n"],
    costs_y: Float[Any, "m m"],
    key: Key,
    config: GromovConfig = GromovConfig(),
    *,
    weights_x: Float[Any, " n"] | None = None,
    weights_y: Float[Any, " m"] | None = None,
    linear_costs: Float[Any, "n m"] | None = None,
    initial: Sequence[Float[Any, "n m"]] = (),
) -> list[Coupling]:
    """As `gromov_wasserstein`, but the couplings of all starts, by ascending cost; mirror images may be among them."""
    problem = _Problem.of(costs_x, costs_y, weights_x, weights_y, linear_costs, config)
    solve = _exact_by_pot if config.solver == "pot" else _entropic
    found = [solve(problem, start, wide, config) for start, wide in _starts(problem, key, config, initial)]
    return sorted(found, key=lambda each: float(each.cost))


def gromov_wasserstein_batch(
    costs_x: Float[Any, "B n n"], costs_y: Float[Any, "B m m"], config: GromovConfig = GromovConfig()
) -> Coupling:
    """B problems with uniform weights as one program, each from the product of its weights; fields have an axis B.

    It pays on a GPU. On a CPU the loops of all wait for the slowest, and one after the other is quicker.

    Raises:
        ValueError: as `gromov_wasserstein`, or `config` asks for what one program cannot do.
    """
    if config.solver != "entropic" or config.exact:
        raise ValueError("a batch of Gromov-Wasserstein problems needs solver='entropic' and exact=False.")
    if len(costs_x) != len(costs_y) or not len(costs_x):
        raise ValueError(f"a batch needs as many costs_x as costs_y, and not {len(costs_x)} and {len(costs_y)}.")
    problems = [_Problem.of(*costs, None, None, None, config) for costs in zip(costs_x, costs_y, strict=True)]
    padded = [_padded(problem, problem.product) for problem in problems]
    arrays = [jnp.stack(each) for each in zip(*padded, strict=True)]
    matrices, stopped = _anneal(_stage_batch, arrays, _epsilons(config, wide=True), config)
    couplings = [
        _finished(problem, np.asarray(matrix, np.float64), bool(each))
        for problem, matrix, each in zip(problems, matrices, stopped, strict=True)
    ]
    batch: Coupling = jax.tree.map(lambda *leaves: np.stack(leaves), *couplings)
    return batch


def warn_if_uninformative(coupling: Coupling) -> None:
    """Warns, in one sentence, where a coupling is nearly the product of the weights."""
    if not coupling.informative:
        warnings.warn(
            f"the coupling says nothing: it costs {float(coupling.cost_ratio):.3f} of what pairing everything with"
            f" everything costs, and has {float(coupling.entropy_ratio):.3f} of its entropy; lower epsilon, choose"
            " other features, or do not use it.",
            stacklevel=3,
        )


@dataclass(frozen=True, eq=False)
class _Problem:
    """Costs as they enter the objective, in float64."""

    costs_x: Costs
    costs_y: Costs
    linear_costs: Float[np.ndarray, "n m"]
    weights_x: Float[np.ndarray, " n"]
    weights_y: Float[np.ndarray, " m"]

    @classmethod
    def of(
        cls, costs_x: Any, costs_y: Any, weights_x: Any, weights_y: Any, linear_costs: Any, config: GromovConfig
    ) -> _Problem:
        costs, weights = [], []
        for name, given, masses in (("x", costs_x, weights_x), ("y", costs_y, weights_y)):
            each = _checked(f"costs_{name}", given)
            if each.ndim != 2 or each.shape[0] != each.shape[1] or not len(each):
                raise ValueError(f"costs_{name} must be a square matrix, not {list(each.shape)}.")
            if not np.allclose(each, each.T, rtol=1e-4, atol=1e-6 * np.abs(each).max()):
                raise ValueError(f"costs_{name} must be symmetric, such as distances are.")
            weights.append(_checked_weights(f"weights_{name}", masses, len(each)))
            mean = weights[-1] @ each @ weights[-1]
            if config.scaled and not mean > 0:
                raise ValueError(
                    f"costs_{name} have the mean {mean:g}: all points are equal, and none can be told apart."
                )
            costs.append(each / mean if config.scaled else each)
        linear = np.zeros((len(costs[0]), len(costs[1])))
        if linear_costs is not None:
            linear = _checked("linear_costs", linear_costs)
            if linear.shape != (len(costs[0]), len(costs[1])):
                raise ValueError(f"linear_costs must be {[len(each) for each in costs]}, not {list(linear.shape)}.")
            mean = weights[0] @ np.abs(linear) @ weights[1]
            # Where all features are equal they say nothing, which is no error.
            linear = config.fused_penalty * (linear / mean if config.scaled and mean > 0 else linear)
        return cls(costs[0], costs[1], linear, weights[0], weights[1])

    @property
    def product(self) -> Float[np.ndarray, "n m"]:
        return np.outer(self.weights_x, self.weights_y)

    def cost(self, matrix: Float[np.ndarray, "n m"]) -> float:
        return float(gromov_cost(self.costs_x, self.costs_y, matrix, self.linear_costs))

    def gradient(self, matrix: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n m"]:
        rows, columns = (self.costs_x**2) @ self.weights_x, (self.costs_y**2) @ self.weights_y
        bent = 2.0 * (rows[:, None] + columns - 2.0 * self.costs_x @ matrix @ self.costs_y)
        return np.asarray(bent + self.linear_costs)


def _checked(name: str, given: Any) -> np.ndarray:
    array = np.asarray(given, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers.")
    return array


def _checked_weights(name: str, given: Any, size: int) -> Float[np.ndarray, " n"]:
    if given is None:
        return np.full(size, 1.0 / size)
    weights = _checked(name, given)
    if weights.shape != (size,) or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"{name} must be {size} masses of at least 0, not all of them 0.")
    return np.asarray(weights / weights.sum())


def _starts(
    problem: _Problem, key: Key, config: GromovConfig, initial: Sequence[Any]
) -> list[tuple[Float[np.ndarray, "n m"], bool]]:
    """Initial couplings, and whether the regularisation begins wide, which would forget where a search began."""
    starts = [(problem.product, True)]
    if config.starts > 1:
        starts.append((_by_profiles(problem), False))
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,), jnp.uint32)))
    starts += [(_random_start(problem, rng), False) for _ in range(config.starts - 2)]
    for each in initial:
        matrix = _checked("initial", each)
        if matrix.shape != problem.product.shape or (matrix < 0).any():
            raise ValueError(
                f"an initial coupling must be masses {list(problem.product.shape)}, not {list(matrix.shape)}."
            )
        starts.append((_rounded(matrix, problem.weights_x, problem.weights_y), False))
    return starts


def _by_profiles(problem: _Problem) -> Float[np.ndarray, "n m"]:
    """Pairs points whose distances to all others are distributed alike (Mémoli's third lower bound, smoothed)."""
    levels = (np.arange(32) + 0.5) / 32
    profiles = [
        np.stack([_quantiles(row, weights, levels) for row in costs])
        for costs, weights in ((problem.costs_x, problem.weights_x), (problem.costs_y, problem.weights_y))
    ]
    apart = np.square(profiles[0][:, None] - profiles[1]).mean(axis=-1)
    mean = problem.weights_x @ apart @ problem.weights_y
    return _scaled_to(np.exp(-apart / (0.1 * mean if mean > 0 else 1.0)), problem)


def _quantiles(
    values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], levels: Float[np.ndarray, " q"]
) -> Float[np.ndarray, " q"]:
    order = np.argsort(values)
    below = np.cumsum(weights[order])
    found: np.ndarray = values[order][np.minimum(np.searchsorted(below, levels), len(values) - 1)]
    return found


def _random_start(problem: _Problem, rng: np.random.Generator) -> Float[np.ndarray, "n m"]:
    return _scaled_to(np.exp(3.0 * rng.standard_normal(problem.product.shape)), problem)


def _scaled_to(kernel: Float[np.ndarray, "n m"], problem: _Problem) -> Float[np.ndarray, "n m"]:
    """A coupling near a positive kernel: a few Sinkhorn steps, then rounding."""
    matrix = kernel * problem.product
    for _ in range(50):
        matrix *= _fraction(problem.weights_x, matrix.sum(axis=1))[:, None]
        matrix *= _fraction(problem.weights_y, matrix.sum(axis=0))
    return _rounded(matrix, problem.weights_x, problem.weights_y)


def _fraction(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.asarray(np.divide(above, below, out=np.zeros_like(above), where=below > 0))


def _rounded(
    matrix: Float[np.ndarray, "n m"], weights_x: Float[np.ndarray, " n"], weights_y: Float[np.ndarray, " m"]
) -> Float[np.ndarray, "n m"]:
    """The matrix, with sums that are the weights (Altschuler et al., arXiv 1705.09634, algorithm 2)."""
    matrix = matrix * np.minimum(_fraction(weights_x, matrix.sum(axis=1)), 1.0)[:, None]
    matrix = matrix * np.minimum(_fraction(weights_y, matrix.sum(axis=0)), 1.0)
    rows = np.maximum(weights_x - matrix.sum(axis=1), 0.0)
    columns = np.maximum(weights_y - matrix.sum(axis=0), 0.0)
    left = rows.sum()
    return np.asarray(matrix + np.outer(rows, columns) / left if left > 1e-15 else matrix)


def _entropy(masses: Any) -> Any:
    return -jax.scipy.special.xlogy(masses, masses).sum()


def _finished(problem: _Problem, matrix: Float[np.ndarray, "n m"], stopped: bool) -> Coupling:
    """The coupling of a solver's matrix, which may be padded and not keep the sums."""
    matrix = np.maximum(matrix[: len(problem.weights_x), : len(problem.weights_y)], 0.0)
    missed = np.abs(matrix.sum(axis=1) - problem.weights_x).sum() + np.abs(matrix.sum(axis=0) - problem.weights_y).sum()
    matrix = _rounded(matrix, problem.weights_x, problem.weights_y)

    def entropy(masses: np.ndarray) -> float:
        positive = masses[masses > 0]
        return float(-(positive * np.log(positive)).sum())

    product = entropy(problem.product)
    return Coupling(
        matrix=matrix,
        cost=np.float64(problem.cost(matrix)),
        product_cost=np.float64(problem.cost(problem.product)),
        entropy_ratio=np.float64(entropy(matrix) / product if product > 0 else 1.0),
        converged=np.bool_(stopped and missed < _GREATEST_MARGINAL_ERROR),
    )


# The entropic solver.


def _entropic(problem: _Problem, start: Float[np.ndarray, "n m"], wide: bool, config: GromovConfig) -> Coupling:
    padded = _padded(problem, start)
    matrix, stopped = _anneal(_stage, padded, _epsilons(config, wide), config)
    found = _finished(problem, np.asarray(matrix, np.float64), bool(stopped))
    return _descended(problem, found.matrix) if config.exact else found


def _epsilons(config: GromovConfig, wide: bool) -> list[float]:
    first = config.first_epsilon if wide else min(config.first_epsilon, 2.0 * config.epsilon)
    count = config.stages if wide else min(config.stages, 2)
    return [float(each) for each in np.geomspace(config.epsilon, max(first, config.epsilon), count)[::-1]]


def _anneal(
    stage: Any, padded: Sequence[Array], epsilons: Sequence[float], config: GromovConfig
) -> tuple[Array, Array]:
    """Stages of falling regularisation, each from where the last one came to rest."""
    *fixed, matrix = padded
    stopped = jnp.asarray(True)
    for epsilon in epsilons:
        matrix, stopped = stage(
            *fixed,
            matrix,
            jnp.asarray(epsilon, jnp.float32),
            threshold=config.threshold,
            max_iterations=config.max_iterations,
            sinkhorn_iterations=config.sinkhorn_iterations,
        )
    return matrix, stopped


def _solve_stage(
    costs_x: Float[Array, "n n"],
    costs_y: Float[Array, "m m"],
    linear_costs: Float[Array, "n m"],
    weights_x: Float[Array, " n"],
    weights_y: Float[Array, " m"],
    start: Float[Array, "n m"],
    epsilon: Any,
    *,
    threshold: float,
    max_iterations: int,
    sinkhorn_iterations: int,
) -> tuple[Float[Array, "n m"], Bool[Array, ""]]:
    """OTT's solver, from a coupling, at one regularisation; and whether it ended by itself."""
    problem = QuadraticProblem(
        Geometry(cost_matrix=costs_x),
        Geometry(cost_matrix=costs_y),
        # Its linearisation is half of the gradient of the quadratic term.
        geom_xy=Geometry(cost_matrix=0.5 * linear_costs),
        fused_penalty=1.0,
        a=weights_x,
        b=weights_y,
    )
    solver = GromovWasserstein(
        Sinkhorn(threshold=threshold, max_iterations=sinkhorn_iterations),
        epsilon=epsilon,
        threshold=threshold,
        max_iterations=max_iterations,
        warm_start=True,
        initializer=QuadraticInitializer(start),
    )
    found = solver(problem)
    return found.matrix, jnp.sum(found.costs != -1) < max_iterations


_STATIC = ("threshold", "max_iterations", "sinkhorn_iterations")
_stage = jax.jit(_solve_stage, static_argnames=_STATIC)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _stage_batch(
    costs_x: Float[Array, "B n n"],
    costs_y: Float[Array, "B m m"],
    linear_costs: Float[Array, "B n m"],
    weights_x: Float[Array, "B n"],
    weights_y: Float[Array, "B m"],
    start: Float[Array, "B n m"],
    epsilon: Float[Array, ""],
    **settings: Any,
) -> tuple[Float[Array, "B n m"], Bool[Array, " B"]]:
    one: Callable[..., Any] = functools.partial(_solve_stage, **settings)
    found: tuple[Array, Array] = jax.vmap(one, in_axes=(0, 0, 0, 0, 0, 0, None))(
        costs_x, costs_y, linear_costs, weights_x, weights_y, start, epsilon
    )
    return found


def _padded(problem: _Problem, start: Float[np.ndarray, "n m"]) -> list[Array]:
    """The problem and a start, with points without mass up to the next bucket."""
    rows, columns = (_bucket(size) for size in start.shape)
    arrays = (
        (problem.costs_x, (rows, rows)),
        (problem.costs_y, (columns, columns)),
        (problem.linear_costs, (rows, columns)),
        (problem.weights_x, (rows,)),
        (problem.weights_y, (columns,)),
        (start, (rows, columns)),
    )
    padded = []
    for array, shape in arrays:
        room = [(0, wanted - size) for wanted, size in zip(shape, array.shape, strict=True)]
        padded.append(jnp.asarray(np.pad(array, room), jnp.float32))
    return padded


def _bucket(size: int) -> int:
    return next((bucket for bucket in BUCKETS if bucket >= size), -(-size // BUCKETS[-1]) * BUCKETS[-1])


# Exact solvers.


def _descended(problem: _Problem, matrix: Float[np.ndarray, "n m"]) -> Coupling:
    """Conditional gradient with exact steps, without regularisation, from a coupling to a local optimum."""
    stopped = False
    for _ in range(_DESCENT_STEPS):
        gradient = problem.gradient(matrix)
        towards = _cheapest(gradient, problem.weights_x, problem.weights_y) - matrix
        slope = float((gradient * towards).sum())
        if slope > -1e-10:
            stopped = True
            break
        bend = -2.0 * float(((problem.costs_x @ towards @ problem.costs_y) * towards).sum())
        # Along the way the cost is a parabola: to its lowest point, or to the end where it opens downwards.
        step = min(1.0, -slope / (2.0 * bend)) if bend > 0 else 1.0
        matrix = matrix + step * towards
    return _finished(problem, matrix, stopped)


def _cheapest(
    costs: Float[np.ndarray, "n m"], weights_x: Float[np.ndarray, " n"], weights_y: Float[np.ndarray, " m"]
) -> Float[np.ndarray, "n m"]:
    """The coupling of least cost: an assignment where all weights are equal, else a linear program."""
    rows, columns = costs.shape
    matrix = np.zeros_like(costs)
    if rows == columns and np.ptp(weights_x) == np.ptp(weights_y) == 0:
        matrix[optimize.linear_sum_assignment(costs)] = 1.0 / rows
        return matrix
    sums = sparse.vstack(
        [
            sparse.kron(sparse.eye_array(rows), np.ones((1, columns))),
            sparse.kron(np.ones((1, rows)), sparse.eye_array(columns)),
        ]
    ).tocsr()
    found = optimize.linprog(costs.ravel(), A_eq=sums[:-1], b_eq=np.concatenate([weights_x, weights_y])[:-1])
    if found.x is None:
        raise ValueError(f"the exact transport of {rows} to {columns} points was not found: {found.message}")
    matrix[:] = found.x.reshape(rows, columns)
    return matrix


def _exact_by_pot(problem: _Problem, start: Float[np.ndarray, "n m"], wide: bool, config: GromovConfig) -> Coupling:
    try:
        from ot import gromov
    except ImportError as error:
        raise ImportError("solver='pot' needs the package POT: pip install POT, or use solver='entropic'.") from error
    given = {
        "p": problem.weights_x,
        "q": problem.weights_y,
        "G0": start,
        "max_iter": config.max_iterations,
        "log": True,
    }
    if problem.linear_costs.any():
        # It weighs the two terms by 1 - alpha and alpha; equal weights keep their proportion.
        matrix, log = gromov.fused_gromov_wasserstein(
            problem.linear_costs, problem.costs_x, problem.costs_y, alpha=0.5, **given
        )
    else:
        matrix, log = gromov.gromov_wasserstein(problem.costs_x, problem.costs_y, **given)
    return _finished(problem, np.asarray(matrix, np.float64), len(log["loss"]) <= config.max_iterations)
