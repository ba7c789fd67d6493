"""Couplings against closed forms, plain NumPy, POT's exact solver, and what must not change them."""

from __future__ import annotations

import builtins
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from robopref import transport
from robopref.transport import (
    Coupling,
    GromovConfig,
    gromov_cost,
    gromov_starts,
    gromov_wasserstein,
    gromov_wasserstein_batch,
    sinkhorn,
)

KEY = jax.random.key(0)
# Two points, 1 apart, and two that are 3 apart.
NEAR, FAR = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[0.0, 3.0], [3.0, 0.0]])


@pytest.fixture(autouse=True)
def light_pot(monkeypatch: pytest.MonkeyPatch) -> None:
    """POT would import every array library that is there."""
    for name in ("PYTORCH", "JAX", "CUPY", "TENSORFLOW"):
        monkeypatch.setenv(f"POT_BACKEND_DISABLE_{name}", "1")


def distances(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - points, axis=-1)


def isometry(count: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances in a cloud, and in its rotated, moved and permuted copy; and the permutation."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(count, 3))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    order = rng.permutation(count)
    return distances(points), distances((points @ rotation + 5.0)[order]), order


def random_problem(seed: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return distances(rng.normal(size=(rows, 3))), distances(rng.normal(size=(columns, 4)))


def plain_cost(costs_x: np.ndarray, costs_y: np.ndarray, matrix: np.ndarray) -> float:
    """The sum over four indices, as it is defined."""
    gaps = costs_x[:, None, :, None] - costs_y[None, :, None, :]
    return float(np.einsum("ijkl,ij,kl->", gaps**2, matrix, matrix))


def keeps_sums(coupling: Coupling, weights_x: np.ndarray, weights_y: np.ndarray) -> None:
    assert (coupling.matrix >= 0).all()
    np.testing.assert_allclose(coupling.matrix.sum(axis=1), weights_x, atol=1e-12)
    np.testing.assert_allclose(coupling.matrix.sum(axis=0), weights_y, atol=1e-12)


def test_the_cost_is_the_sum_over_four_indices() -> None:
    rng = np.random.default_rng(0)
    costs_x, costs_y = random_problem(0, 5, 7)
    matrix, linear = rng.random((5, 7)), rng.random((5, 7))
    expected = plain_cost(costs_x, costs_y, matrix)
    assert gromov_cost(costs_x, costs_y, matrix) == pytest.approx(expected, rel=1e-12)
    assert gromov_cost(costs_x, costs_y, matrix, linear) == pytest.approx(expected + (linear * matrix).sum(), rel=1e-12)
    on_device = jax.jit(gromov_cost)(jnp.asarray(costs_x), jnp.asarray(costs_y), jnp.asarray(matrix))
    assert float(on_device) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mass", [0.0, 0.1, 0.25, 0.5])
def test_two_points_cost_what_the_closed_form_says(mass: float) -> None:
    matrix = np.array([[mass, 0.5 - mass], [0.5 - mass, mass]])
    assert gromov_cost(NEAR, FAR, matrix) == pytest.approx(5 - 12 * (mass**2 + (0.5 - mass) ** 2))


def test_starts_leave_the_product_which_is_a_resting_point() -> None:
    config = GromovConfig(scaled=False)
    with pytest.warns(UserWarning, match="says nothing"):
        alone = gromov_wasserstein(NEAR, FAR, KEY, GromovConfig(scaled=False, starts=1))
    assert alone.converged
    assert (float(alone.cost), float(alone.entropy_ratio)) == (pytest.approx(3.5), pytest.approx(1.0))
    found = gromov_wasserstein(NEAR, FAR, KEY, config)
    assert (float(found.cost), float(found.product_cost)) == (pytest.approx(2.0, abs=1e-6), pytest.approx(3.5))
    assert float(found.cost_ratio) == pytest.approx(2.0 / 3.5, abs=1e-6)
    given = gromov_starts(
        NEAR, FAR, KEY, GromovConfig(scaled=False, starts=1), initial=[np.array([[0.3, 0.2], [0.2, 0.3]])]
    )
    assert [float(each.cost) for each in given] == [pytest.approx(2.0, abs=1e-6), pytest.approx(3.5)]
    np.testing.assert_allclose(given[0].matrix, np.eye(2) / 2, atol=1e-6)


def test_an_isometry_is_found_again() -> None:
    costs_x, costs_y, order = isometry()
    found = {
        epsilon: gromov_wasserstein(costs_x, costs_y, KEY, GromovConfig(epsilon=epsilon)) for epsilon in (0.05, 0.005)
    }
    assert float(found[0.05].cost) == pytest.approx(0.04036, rel=0.02)
    assert float(found[0.005].cost) == pytest.approx(0.00028, rel=0.02)
    for each in found.values():
        np.testing.assert_array_equal(each.matrix.argmax(axis=0), order)
        assert float(each.product_cost) == pytest.approx(0.6624, abs=1e-4)
        assert each.converged
        keeps_sums(each, np.full(12, 1 / 12), np.full(12, 1 / 12))
    # One to one: half of the product's entropy.
    assert 0.5 < float(found[0.005].entropy_ratio) < 0.52 < float(found[0.05].entropy_ratio)


def test_the_exact_descent_ends_at_the_permutation_itself() -> None:
    costs_x, costs_y, order = isometry()
    found = gromov_wasserstein(costs_x, costs_y, KEY, GromovConfig(exact=True))
    expected = np.zeros((12, 12))
    expected[order, np.arange(12)] = 1 / 12
    np.testing.assert_array_equal(found.matrix, expected)
    assert abs(float(found.cost)) < 1e-12
    assert float(found.entropy_ratio) == pytest.approx(0.5)


def test_a_coupling_that_says_nothing_is_reported() -> None:
    costs_x, costs_y, order = isometry()
    # The settings of the library that is underneath.
    config = GromovConfig(epsilon=1.0, first_epsilon=1.0, stages=1, starts=1)
    with pytest.warns(UserWarning, match=r"costs 0\.9\d+ of what .* lower epsilon"):
        found = gromov_wasserstein(costs_x, costs_y, KEY, config)
    assert found.converged
    assert not found.informative
    assert (found.matrix.argmax(axis=0) == order).sum() < 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gromov_wasserstein(costs_x, costs_y, KEY).informative


def test_permuting_or_scaling_either_cost_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    points = rng.normal(size=(14, 3))
    costs_x, costs_y = distances(points), distances(points[:11] + rng.normal(0, 0.05, (11, 3)))
    found = gromov_wasserstein(costs_x, costs_y, KEY)
    scaled = gromov_wasserstein(1000.0 * costs_x, 0.01 * costs_y, KEY)
    np.testing.assert_allclose(scaled.matrix, found.matrix, atol=1e-5)
    assert float(scaled.cost) == pytest.approx(float(found.cost), rel=1e-4)
    rows, columns = rng.permutation(14), rng.permutation(11)
    permuted = gromov_wasserstein(costs_x[np.ix_(rows, rows)], costs_y[np.ix_(columns, columns)], KEY)
    np.testing.assert_allclose(permuted.matrix, found.matrix[np.ix_(rows, columns)], atol=1e-4)
    assert float(permuted.cost) == pytest.approx(float(found.cost), rel=1e-3)


def test_points_without_mass_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    costs_x, costs_y, _ = isometry()
    config = GromovConfig(starts=1)
    found = gromov_wasserstein(costs_x, costs_y, KEY, config)
    # The same, by points that the caller gives no mass; 12 and 15 points are padded to 16.
    wider = np.pad(costs_x, (0, 3), constant_values=7.0)
    given = gromov_wasserstein(wider, costs_y, KEY, config, weights_x=np.repeat([1.0, 0.0], [12, 3]))
    np.testing.assert_allclose(given.matrix[:12], found.matrix, atol=1e-6)
    assert (given.matrix[12:] == 0).all()
    monkeypatch.setattr(transport, "BUCKETS", (12,))
    exactly = gromov_wasserstein(costs_x, costs_y, KEY, config)
    assert found.matrix.shape == exactly.matrix.shape == (12, 12)
    np.testing.assert_allclose(found.matrix, exactly.matrix, atol=1e-6)


def test_weights_are_kept() -> None:
    costs_x, costs_y = random_problem(3, 9, 13)
    rng = np.random.default_rng(0)
    weights_x, weights_y = rng.dirichlet(np.ones(9)), rng.dirichlet(np.ones(13))
    for config in (GromovConfig(), GromovConfig(exact=True), GromovConfig(solver="pot")):
        found = gromov_wasserstein(costs_x, costs_y, KEY, config, weights_x=weights_x, weights_y=5 * weights_y)
        keeps_sums(found, weights_x, weights_y)
        scales = [weights @ costs @ weights for weights, costs in ((weights_x, costs_x), (weights_y, costs_y))]
        assert float(found.cost) == pytest.approx(
            plain_cost(costs_x / scales[0], costs_y / scales[1], np.asarray(found.matrix)), rel=1e-9
        )


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (50, 50), (20, 17), (128, 128), (500, 500)])
def test_the_cost_agrees_with_an_exact_solver(rows: int, columns: int) -> None:
    """POT, from eight starts, finds nothing that is better by 1%, and from our coupling it ends at our cost."""
    costs_x, costs_y = random_problem(rows, rows, columns)
    # One start and few iterations for the large one, which is to take seconds.
    quick: dict[str, Any] = {"starts": 1, "max_iterations": 5, "sinkhorn_iterations": 20} if rows > 200 else {}
    ours = gromov_wasserstein(costs_x, costs_y, KEY, GromovConfig(exact=True, **quick))
    theirs = gromov_starts(costs_x, costs_y, KEY, GromovConfig(solver="pot", starts=8 if rows < 200 else 1))
    assert float(ours.cost) <= 1.01 * float(theirs[0].cost)
    from_ours = gromov_starts(
        costs_x, costs_y, KEY, GromovConfig(solver="pot", starts=1), initial=[np.asarray(ours.matrix)]
    )[0]
    assert float(from_ours.cost) == pytest.approx(float(ours.cost), rel=0.01)
    assert ours.converged


def test_pot_and_the_descent_solve_the_same_fused_problem() -> None:
    costs_x, costs_y = random_problem(4, 12, 12)
    linear = np.random.default_rng(4).random((12, 12))
    for penalty in (0.3, 3.0):
        ours, theirs = (
            gromov_starts(costs_x, costs_y, KEY, config, linear_costs=linear)
            for config in (
                GromovConfig(exact=True, fused_penalty=penalty, starts=8),
                GromovConfig(solver="pot", fused_penalty=penalty, starts=8),
            )
        )
        scaled = [each / each.mean() for each in (costs_x, costs_y, linear)]
        for found in (ours[0], theirs[0]):
            expected = plain_cost(*scaled[:2], np.asarray(found.matrix)) + penalty * (scaled[2] * found.matrix).sum()
            assert float(found.cost) == pytest.approx(expected, rel=1e-9)
        assert float(ours[0].cost) <= 1.01 * float(theirs[0].cost)


def test_the_entropic_solver_weighs_the_linear_cost_as_the_objective_does() -> None:
    """Where the linear cost is all that differs between couplings, the solution is that of linear transport."""
    flat = 1.0 - np.eye(10)
    linear = np.random.default_rng(5).random((10, 10))
    config = GromovConfig(fused_penalty=2.0, epsilon=0.002, first_epsilon=0.002, starts=1, scaled=False)
    found = gromov_wasserstein(flat, flat, KEY, config, linear_costs=50 * linear)
    chosen = optimize.linear_sum_assignment(linear)
    np.testing.assert_array_equal(found.matrix.argmax(axis=1), chosen[1])
    # A small problem has its optimum by counting, and the trade-off of both terms decides which it is.
    costs = np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 4.0], [2.0, 4.0, 0.0]])
    reversing = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    price = gromov_cost(costs, costs, np.eye(3)[::-1] / 3)
    for factor in (0.8, 1.25):
        config = GromovConfig(fused_penalty=factor * price / (2 / 3), scaled=False, epsilon=0.01, starts=8)
        both = gromov_starts(costs, costs, KEY, config, linear_costs=reversing)
        diagonal = np.trace(both[0].matrix) > 0.9
        assert diagonal == (factor < 1)


def test_a_shared_feature_decides_between_mirror_images() -> None:
    points = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])[:, None]
    costs, flag = distances(points), (points[:, 0] > 1.5).astype(float)
    linear = np.abs(flag[:, None] - flag)
    plain = gromov_starts(costs, costs, KEY, GromovConfig(exact=True, starts=8))
    mirrored = [bool(each.matrix[0, 0] < 0.1) for each in plain if abs(float(each.cost)) < 1e-9]
    assert set(mirrored) == {False, True}
    fused = gromov_wasserstein(costs, costs, KEY, GromovConfig(exact=True, starts=8), linear_costs=linear)
    np.testing.assert_allclose(fused.matrix, np.eye(5) / 5)


def test_all_starts_are_given_by_ascending_cost_and_follow_the_key() -> None:
    costs_x, costs_y = random_problem(6, 10, 10)
    config = GromovConfig(starts=5)
    first, again, other = (gromov_starts(costs_x, costs_y, jax.random.key(seed), config) for seed in (0, 0, 1))
    costs = [float(each.cost) for each in first]
    assert len(costs) == 5
    assert costs == sorted(costs)
    assert costs == [float(each.cost) for each in again]
    assert costs != [float(each.cost) for each in other]


def test_a_batch_is_what_its_problems_are_one_by_one() -> None:
    problems = [random_problem(seed, 16, 13) for seed in range(3)]
    config = GromovConfig(starts=1)
    batch = gromov_wasserstein_batch(*(np.stack(each) for each in zip(*problems, strict=True)), config)
    assert batch.matrix.shape == (3, 16, 13)
    assert batch.cost_ratio.shape == batch.informative.shape == (3,)
    for index, problem in enumerate(problems):
        alone = gromov_wasserstein(*problem, KEY, config)
        assert float(batch.cost[index]) == pytest.approx(float(alone.cost), rel=1e-3)
        # Sums in another order: where two pairings are nearly as good, that shows.
        np.testing.assert_allclose(batch.matrix[index], alone.matrix, atol=1e-3)


def test_sinkhorn_is_that_of_plain_numpy() -> None:
    rng = np.random.default_rng(7)
    costs = rng.random((4, 6))
    weights_x, weights_y = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(6))
    kernel, left, right = np.exp(-costs / 0.1), np.ones(4), np.ones(6)
    for _ in range(5000):
        left = weights_x / (kernel @ right)
        right = weights_y / (kernel.T @ left)
    expected = left[:, None] * kernel * right
    found = sinkhorn(jnp.asarray(costs), jnp.asarray(weights_x), jnp.asarray(weights_y), epsilon=0.1, threshold=1e-5)
    np.testing.assert_allclose(found.matrix, expected, atol=1e-5)
    assert float(found.cost) == pytest.approx((costs * expected).sum(), abs=1e-4)
    assert float(found.product_cost) == pytest.approx(weights_x @ costs @ weights_y, abs=1e-5)
    entropies = [-(each * np.log(each)).sum() for each in (expected, np.outer(weights_x, weights_y))]
    assert float(found.entropy_ratio) == pytest.approx(entropies[0] / entropies[1], abs=1e-4)
    assert bool(found.converged)


def test_sinkhorn_runs_under_jit_and_vmap_and_skips_points_without_mass() -> None:
    costs = jnp.asarray(np.random.default_rng(8).random((3, 5, 5)), jnp.float32)
    weights = jnp.asarray([0.25, 0.25, 0.25, 0.25, 0.0])
    batch = jax.jit(jax.vmap(lambda each: sinkhorn(each, weights, weights, epsilon=0.1)))(costs)
    for index in range(3):
        alone = sinkhorn(costs[index, :4, :4], epsilon=0.1)
        np.testing.assert_allclose(batch.matrix[index, :4, :4], alone.matrix, atol=1e-4)
    assert (np.asarray(batch.matrix)[:, 4] == 0).all()
    assert np.isfinite(batch.entropy_ratio).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"costs_x": np.zeros((2, 3))}, "costs_x must be a square matrix"),
        ({"costs_y": np.array([[0.0, 1.0], [2.0, 0.0]])}, "costs_y must be symmetric"),
        ({"costs_x": np.array([[0.0, np.nan], [np.nan, 0.0]])}, "costs_x must be finite"),
        ({"costs_y": np.zeros((2, 2))}, "all points are equal"),
        ({"weights_x": [1.0, -1.0]}, "weights_x must be 2 masses"),
        ({"weights_y": [1.0]}, "weights_y must be 2 masses"),
        ({"linear_costs": np.zeros((3, 2))}, r"linear_costs must be \[2, 2\]"),
        ({"initial": [np.zeros((3, 2))]}, "an initial coupling must be masses"),
    ],
)
def test_what_makes_no_problem_is_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"costs_x": NEAR, "costs_y": FAR, **arguments}
    with pytest.raises(ValueError, match=message):
        gromov_wasserstein(given.pop("costs_x"), given.pop("costs_y"), KEY, **given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "exact"}, "'entropic' or 'pot'"),
        ({"epsilon": 0.0}, "epsilon of"),
        ({"starts": 0}, "starts of"),
        ({"fused_penalty": -1.0}, "fused_penalty of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GromovConfig(**settings)


def test_a_batch_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="solver='entropic' and exact=False"):
        gromov_wasserstein_batch(NEAR[None], FAR[None], GromovConfig(exact=True))
    with pytest.raises(ValueError, match="as many costs_x as costs_y"):
        gromov_wasserstein_batch(NEAR[None], np.stack([FAR, FAR]))


def test_without_pot_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    there = builtins.__import__

    def missing(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "ot":
            raise ImportError(name)
        return there(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="needs the package POT"):
        gromov_wasserstein(NEAR, FAR, KEY, GromovConfig(solver="pot"))
