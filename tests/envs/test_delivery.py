"""The delivery domain against its rules written down once more, and against the figures of the published board."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs
import robopref.mdp
from envs.delivery import (
    BOARDS,
    CORRIDOR,
    FEATURES,
    MOVES,
    SPARSE,
    WEIGHTS,
    Board,
    DeliveryEnv,
    actions_of,
    draw_board,
    moves_of,
    random_board,
    random_risky_board,
    to_mdp,
)
from robopref.mdp import (
    TabularMDP,
    greedy_policy,
    mean_return,
    optimal_values,
    policy_values,
    q_values,
    scaled_return,
    uniform_policy,
)

UP, DOWN, LEFT, RIGHT = range(4)
RISKY = Board.read("..s/.g./s.c".replace("/", "\n"), (-1.0, 50.0, -10.0, 11.0, 0.0, 0.0), win_probability=0.5)

# 0 nothing, 1 goal, 2 house, 3 sheep, 4 coin, 5 roadblock, and 6 more for the same on brick.
PUBLISHED = """
    0 0 5 0 0 0 0 0 0 0
    0 0 0 0 4 0 0 0 0 6
    0 0 3 0 0 0 0 6 6 6
    4 0 5 0 2 3 3 6 6 0
    6 6 0 0 0 0 0 0 0 0
    6 0 4 0 0 0 0 0 0 0
    6 2 0 3 5 2 0 0 0 0
    0 4 0 0 0 0 0 10 6 6
    0 0 5 0 0 0 0 6 6 7
    0 0 0 0 0 0 5 0 0 4
"""


def rule(board: Board, cell: tuple[int, int], move: int) -> tuple[tuple[int, int], dict[str, float]]:
    """Where a move leads and what it earns, read off the drawing; a sheep is a sheep."""
    row = cell[0] + {UP: -1, DOWN: 1}.get(move, 0)
    column = cell[1] + {LEFT: -1, RIGHT: 1}.get(move, 0)
    height, width = len(board.rows), len(board.rows[0])
    if not (0 <= row < height and 0 <= column < width) or board.rows[row][column] in "hH":
        return cell, {"brick" if board.rows[cell[0]][cell[1]] in ":CR" else "gas": 1.0}
    entered = board.rows[row][column]
    if entered in "gG":
        return (row, column), {"goal": 1.0}
    if entered in "sS":
        return (row, column), {"sheep": 1.0}
    earned = {"brick" if entered in ":CR" else "gas": 1.0}
    if entered in "cC":
        earned["coin"] = 1.0
    if entered in "rR":
        earned["roadblock"] = 1.0
    return (row, column), earned


def cells(board: Board, characters: str) -> list[tuple[int, int]]:
    return [
        (row, column) for row, line in enumerate(board.rows) for column, each in enumerate(line) if each in characters
    ]


def table_by_rule(board: Board) -> tuple[np.ndarray, np.ndarray]:
    """Next cell and reward of each move in each cell, by number; cells in which nobody moves stay, at 0."""
    width = len(board.rows[0])
    count = len(board.rows) * width
    following, rewards = np.repeat(np.arange(count)[:, None], 4, axis=1), np.zeros((count, 4))
    weights = dict(zip(FEATURES, board.weights, strict=True))
    for cell in cells(board, ".:cCrR"):
        for move in range(4):
            (row, column), earned = rule(board, cell, move)
            following[cell[0] * width + cell[1], move] = row * width + column
            rewards[cell[0] * width + cell[1], move] = sum(weights[name] * value for name, value in earned.items())
    return following, rewards


def one_hot(following: np.ndarray) -> np.ndarray:
    return np.eye(len(following))[following]


def walk(env: DeliveryEnv, seed: int, steps: int) -> list[tuple[int, int, float, bool, dict[str, Any], int]]:
    """Random steps: (cell, move, reward, terminated, info, next cell), from one episode to the next."""
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    taken, over = [], False
    while len(taken) < steps:
        if over:
            observation, _ = env.reset()
        cell, action = int(np.argmax(observation)), rng.uniform(-1, 1, 4).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        taken.append((cell, int(np.argmax(action)), reward, terminated, info, int(np.argmax(observation))))
        over = terminated or truncated
    return taken


# The published board


def test_the_published_board_is_the_one_of_the_release() -> None:
    codes = [[int(code) for code in line.split()] for line in PUBLISHED.strip().splitlines()]
    assert SPARSE.rows == tuple("".join(".ghscr:GHSCR"[code] for code in row) for row in codes)
    assert SPARSE.starts.sum() == 92
    assert SPARSE.weights == (-1, 50, -50, 1, -1, -2)


def test_the_published_board_gives_the_published_figures() -> None:
    mdp = to_mdp(SPARSE, 0.999)
    with jax.enable_x64(True):
        values = optimal_values(mdp)
        optimal, uniform = mdp.start @ values, mean_return(mdp, uniform_policy(mdp))
        greedy = greedy_policy(q_values(mdp, values))
        assert float(optimal) == pytest.approx(41.207948, abs=5e-7)
        assert float(uniform) == pytest.approx(-71.257383, abs=5e-7)
        assert float(values[0]) == pytest.approx(33.336319, abs=5e-7)
        assert float(-uniform / (optimal - uniform)) == pytest.approx(0.633594, abs=5e-7)
        assert float(scaled_return(mdp, greedy)) == pytest.approx(1.0, abs=1e-10)
        np.testing.assert_allclose(policy_values(mdp, greedy), values, atol=1e-10)


def test_a_loop_over_the_rules_gives_the_same_values() -> None:
    following, rewards = table_by_rule(SPARSE)
    values = np.zeros(100)
    for _ in range(500):
        values = (rewards + 0.999 * values[following]).max(axis=1)
    with jax.enable_x64(True):
        np.testing.assert_allclose(optimal_values(to_mdp(SPARSE, 0.999)), values, atol=1e-10)


def test_single_precision_would_miss_the_published_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    mdp = to_mdp(SPARSE, 0.999)
    monkeypatch.setattr(robopref.mdp, "_check", lambda mdp: None)
    single = TabularMDP(*(None if leaf is None else jax.numpy.asarray(leaf) for leaf in vars(mdp).values()))
    found = mean_return(single, uniform_policy(single))
    assert found.dtype == np.float32
    assert 1e-5 < abs(float(found) + 71.257383) < 1e-2


def test_the_step_into_the_goal_counts() -> None:
    with jax.enable_x64(True):
        values = optimal_values(to_mdp(CORRIDOR, 0.999))
    np.testing.assert_allclose(values, [0.999 * 48.95 - 1, 48.95, 50.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(values[:3], [47.901, 48.95, 50.0], atol=1e-4)


# Rules


@pytest.mark.parametrize(
    ("drawing", "cell", "move", "to", "reward"),
    [
        ("..", 0, RIGHT, 1, -1),
        ("..", 0, LEFT, 0, -1),
        ("..", 0, UP, 0, -1),
        ("..", 0, DOWN, 0, -1),
        (".h", 0, RIGHT, 0, -1),
        (":h", 0, RIGHT, 0, -2),
        (".H", 0, RIGHT, 0, -1),
        (":.", 0, LEFT, 0, -2),
        (":.", 0, RIGHT, 1, -1),
        (".:", 0, RIGHT, 1, -2),
        (".c", 0, RIGHT, 1, 0),
        (".C", 0, RIGHT, 1, -1),
        (".r", 0, RIGHT, 1, -2),
        (".R", 0, RIGHT, 1, -3),
        ("c.", 0, LEFT, 0, -1),
        ("r.", 0, LEFT, 0, -1),
        ("C.", 0, LEFT, 0, -2),
        ("R.", 0, LEFT, 0, -2),
        (".g", 0, RIGHT, 1, 50),
        (":G", 0, RIGHT, 1, 50),
        (".s", 0, RIGHT, 1, -50),
        (":S", 0, RIGHT, 1, -50),
        ("g.", 0, RIGHT, 0, 0),
        ("s.", 0, RIGHT, 0, 0),
        ("h.", 0, RIGHT, 0, 0),
    ],
)
def test_each_rule_alone(drawing: str, cell: int, move: int, to: int, reward: float) -> None:
    mdp = to_mdp(Board.read(drawing), 0.9)
    assert mdp.rewards[cell, move] == reward
    np.testing.assert_array_equal(mdp.transitions[cell, move], np.eye(2)[to])


@pytest.mark.parametrize("board", [SPARSE, CORRIDOR, *(random_board(np.random.default_rng(seed)) for seed in range(5))])
def test_tables_follow_the_rules(board: Board) -> None:
    mdp = to_mdp(board, 0.9)
    following, rewards = table_by_rule(board)
    np.testing.assert_array_equal(mdp.transitions, one_hot(following))
    np.testing.assert_array_equal(mdp.rewards, rewards)
    np.testing.assert_allclose(mdp.features @ np.asarray(board.weights), rewards)
    starts = np.zeros(len(rewards))
    for row, column in cells(board, ".:cCrR"):
        starts[row * len(board.rows[0]) + column] = 1.0
    np.testing.assert_allclose(mdp.start, starts / starts.sum())
    np.testing.assert_array_equal(mdp.terminal, starts == 0)
    assert all(leaf.dtype == np.float64 for leaf in (mdp.transitions, mdp.rewards, mdp.start, mdp.discount))


@pytest.mark.parametrize("board", [SPARSE, CORRIDOR, *(random_board(np.random.default_rng(seed)) for seed in range(5))])
def test_steps_of_the_environment_are_rows_of_the_table(board: Board) -> None:
    mdp, env = to_mdp(board, 0.9), DeliveryEnv.of(board, horizon=40)
    for cell, move, reward, terminated, info, following in walk(env, 3, 400):
        assert reward == mdp.rewards[cell, move]
        assert mdp.transitions[cell, move, following] == 1.0
        assert terminated == mdp.terminal[following]
        features = [info[name] for name in FEATURES]
        np.testing.assert_array_equal(features, mdp.features[cell, move])
        assert reward == np.dot(features, board.weights)
        row, column = divmod(following, len(board.rows[0]))
        assert info["success"] == (board.rows[row][column] in "gG")
        assert info.keys() == {"success", *FEATURES}


def test_coins_and_roadblocks_are_not_used_up() -> None:
    env = DeliveryEnv.of(Board.read(".c"))
    env.reset(seed=0)
    env.set_state(np.append(env.get_state()[0], [0.0, 0.0, 0.0]))
    rewards = [env.step(actions_of(move))[1] for move in (RIGHT, LEFT, RIGHT, RIGHT, LEFT, RIGHT)]
    assert rewards == [0.0, -1.0, 0.0, -1.0, -1.0, 0.0]


# Chance


def test_a_risky_board_mixes_sheep_and_win_in_its_table() -> None:
    mdp = to_mdp(RISKY, 0.9)
    assert mdp.rewards[1, RIGHT] == 0.5 * -10 + 0.5 * 11
    np.testing.assert_array_equal(mdp.features[1, RIGHT], [0, 0, 0.5, 0.5, 0, 0])
    np.testing.assert_array_equal(mdp.transitions[1, RIGHT], np.eye(9)[2])
    assert mdp.terminal[2]
    safe = Board(RISKY.rows, RISKY.weights)
    entered = mdp.transitions[..., [2, 6]].sum(axis=-1) > 0
    np.testing.assert_array_equal(mdp.rewards[~entered], to_mdp(safe, 0.9).rewards[~entered])
    np.testing.assert_array_equal(mdp.transitions, to_mdp(safe, 0.9).transitions)


def test_a_risky_board_decides_by_chance_as_often_as_it_should() -> None:
    env = DeliveryEnv.of(RISKY, horizon=40)
    mdp = to_mdp(RISKY, 0.9)
    met = [step for step in walk(env, 0, 6000) if RISKY.things[step[-1]] == "s"]
    assert {(reward, info["sheep"], info["coin"]) for _, _, reward, _, info, _ in met} == {(-10, 1, 0), (11, 0, 1)}
    assert all(terminated and not info["success"] for _, _, _, terminated, info, _ in met)
    share = np.mean([reward > 0 for _, _, reward, _, _, _ in met])
    assert len(met) > 400
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(len(met))
    expected = {mdp.rewards[cell, move] for cell, move, *_ in met}
    assert expected == {0.5}


@pytest.mark.parametrize(("probability", "reward"), [(0.0, -10.0), (1.0, 11.0)])
def test_certain_outcomes_are_certain(probability: float, reward: float) -> None:
    board = Board(RISKY.rows, RISKY.weights, probability)
    met = [step for step in walk(DeliveryEnv.of(board), 0, 600) if board.things[step[-1]] == "s"]
    assert {each[2] for each in met} == {reward}
    assert to_mdp(board, 0.9).rewards[1, RIGHT] == reward


def test_what_chance_brings_is_part_of_the_state() -> None:
    env, other = DeliveryEnv.of(RISKY), DeliveryEnv.of(RISKY)
    rewards = []
    for seed in range(40):
        env.reset(seed=seed)
        state = env.get_state()
        state[1] = 1
        outcomes = []
        for simulator in (env, other, env):
            np.testing.assert_array_equal(simulator.set_state(state), np.eye(9)[1])
            np.testing.assert_array_equal(simulator.get_state(), state)
            outcomes.append(simulator.step(actions_of(RIGHT))[1])
        assert len(set(outcomes)) == 1
        rewards.append(outcomes[0])
    assert Counter(rewards).keys() == {-10.0, 11.0}


def test_chance_decides_anew_at_every_step() -> None:
    env = DeliveryEnv.of(RISKY)
    env.reset(seed=0)
    checksum, _, _, episode = env.get_state()
    rewards = set()
    for steps in range(20):
        env.set_state(np.array([checksum, 1, steps, episode]))
        rewards.add(env.step(actions_of(RIGHT))[1])
    assert rewards == {-10.0, 11.0}


# Random boards


def test_random_boards_stay_inside_the_family_and_fill_it() -> None:
    rng = np.random.default_rng(0)
    boards = [random_board(rng) for _ in range(400)]
    shapes, weights, shares = set(), [set[float]() for _ in FEATURES], set()
    for board in boards:
        height, width = board.shape
        shapes.add(board.shape)
        count = Counter("".join(board.rows))
        assert set(count) <= set(".gscr")
        assert count["g"] == 1
        # The goal may have taken the place of one of them.
        allowed = [
            (sheep, bad, good)
            for sheep in (0, 1, 3)
            for bad in (0, 1, 5, 8)
            for good in (0, 1, 2)
            if sheep + bad + good < 10
            and sum(
                missing := [
                    tenths * height * width // 10 - count[thing]
                    for tenths, thing in zip((sheep, bad, good), "src", strict=True)
                ]
            )
            in (0, 1)
            and min(missing) >= 0
        ]
        assert allowed
        if len(allowed) == 1:
            shares.add(allowed[0])
        for seen, weight in zip(weights, board.weights, strict=True):
            seen.add(weight)
        assert board.win_probability == 0.0
    assert shapes == {(height, width) for height in (3, 6, 10, 15) for width in (5, 6, 10)}
    assert weights[:5] == [{-1}, {0, 1, 5, 10, 50}, {-5, -10, -50, -100}, {1}, {-2, -5, -10}]
    assert {0, 1, 3} == {sheep for sheep, _, _ in shares}
    assert {0, 1, 5, 8} == {bad for _, bad, _ in shares}
    assert {0, 1, 2} == {good for _, _, good in shares}


def test_random_risky_boards_stay_inside_their_family_and_fill_it() -> None:
    rng = np.random.default_rng(0)
    sheep = Counter()
    for _ in range(200):
        board = random_risky_board(rng, 11.0)
        assert board.shape == (5, 5)
        assert board.weights == (-1.0, 50.0, -50.0, 11.0, 0.0, 0.0)
        assert board.win_probability == 0.5
        count = Counter("".join(board.rows))
        assert count["g"] == 1
        assert set(count) <= set(".gs")
        sheep[count["s"]] += 1
    assert sheep.keys() == {0, 1, 2, 6, 7}
    assert min(sheep[each] for each in (1, 2, 7)) > 30


def test_random_boards_follow_from_their_generator() -> None:
    first, again = (np.random.default_rng(7) for _ in range(2))
    boards = [random_board(first) for _ in range(5)]
    assert boards == [random_board(again) for _ in range(5)]
    assert len(set(boards)) == 5
    assert random_risky_board(first, 1.0) == random_risky_board(again, 1.0)


# The environment


def test_actions_and_moves() -> None:
    for move in range(len(MOVES)):
        assert moves_of(actions_of(move)) == move
        np.testing.assert_array_equal(actions_of(move), np.eye(4)[move])
    moves = np.array([[UP, RIGHT], [LEFT, DOWN]])
    assert actions_of(moves).shape == (2, 2, 4)
    assert actions_of(moves).dtype == np.float32
    np.testing.assert_array_equal(moves_of(actions_of(moves)), moves)
    mean = actions_of(np.array([LEFT, UP, RIGHT, LEFT, DOWN])).mean(axis=0)
    assert moves_of(mean) == LEFT
    assert moves_of([0.5, 0.5, -1.0, 0.5]) == UP
    env = DeliveryEnv("sparse")
    assert env.action_space.contains(actions_of(RIGHT))


def test_observations_look_values_up() -> None:
    env = DeliveryEnv("sparse")
    values = np.random.default_rng(0).normal(size=100)
    for seed in range(5):
        observation, _ = env.reset(seed=seed)
        assert env.observation_space.contains(observation)
        assert observation @ values == values[int(env.get_state()[1])]


def test_episodes_start_everywhere_they_may() -> None:
    env = DeliveryEnv("sparse")
    env.reset(seed=0)
    seen = Counter(int(np.argmax(env.reset()[0])) for _ in range(3000))
    assert seen.keys() == set(np.flatnonzero(SPARSE.starts).tolist())
    assert max(seen.values()) < 70


def test_the_seed_decides_chance_too() -> None:
    env, other = DeliveryEnv.of(RISKY), DeliveryEnv.of(RISKY)
    assert walk(env, 5, 200) == walk(other, 5, 200) == walk(env, 5, 200)
    assert walk(env, 5, 200) != walk(env, 6, 200)


def test_an_episode_ends_in_the_goal_or_at_the_time_limit() -> None:
    env = DeliveryEnv("corridor", horizon=2)
    env.reset(seed=0)
    checksum = env.get_state()[0]
    env.set_state(np.array([checksum, 1, 0, 9]))
    assert env.step(actions_of(RIGHT))[2:4] == (False, False)
    assert env.step(actions_of(RIGHT))[1:4] == (50.0, True, True)
    with pytest.raises(RuntimeError, match="call reset before step"):
        env.step(actions_of(LEFT))
    env.set_state(np.array([checksum, 1, 1, 9]))
    assert env.step(actions_of(LEFT))[1:4] == (-1.0, False, True)
    with pytest.raises(RuntimeError, match="call reset before step"):
        env.step(actions_of(LEFT))
    for attempt in (lambda: DeliveryEnv("corridor").step(actions_of(LEFT)), DeliveryEnv("corridor").get_state):
        with pytest.raises(RuntimeError, match="call reset"):
            attempt()


def test_a_board_without_a_name_travels_in_its_configuration() -> None:
    env = DeliveryEnv.of(RISKY, horizon=30, cell_size=10)
    written = json.loads(json.dumps(env.config))
    assert written == env.config
    again = envs.make(written)
    assert isinstance(again, DeliveryEnv)
    assert again.board == RISKY
    assert again.config == env.config
    assert walk(again, 1, 50) == walk(env, 1, 50)
    assert again.render().shape == again.image_shape == (30, 30, 3)


@pytest.mark.parametrize("env", [*(DeliveryEnv(name) for name in BOARDS), DeliveryEnv.of(RISKY)])
def test_gymnasiums_own_checker_has_no_objection(env: DeliveryEnv) -> None:
    check_env(env, skip_render_check=True)


@pytest.mark.parametrize("name", BOARDS)
def test_every_board_can_be_made_by_its_name(name: str) -> None:
    env = envs.make({"name": f"delivery/{name}"})
    assert isinstance(env, DeliveryEnv)
    assert env.board == BOARDS[name]
    assert env.config == {"name": f"delivery/{name}", "horizon": 100, "cell_size": 24}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([0.0, 1, 0, 0], "not a state of this delivery board"),
        ([None, 1, 0], "not a state of this delivery board"),
        ([None, np.nan, 0, 0], "not a state of this delivery board"),
        ([None, 100, 0, 0], "the van cannot be in cell 100"),
        ([None, -1, 0, 0], "the van cannot be in cell -1"),
        ([None, 1.5, 0, 0], r"the van cannot be in cell 1\.5"),
        ([None, 34, 0, 0], "the van cannot be in cell 34"),
        ([None, 1, -1, 0], "after -1"),
        ([None, 1, 0, -3], "of episode -3"),
    ],
)
def test_what_is_no_state_is_refused(state: list[float | None], message: str) -> None:
    env = DeliveryEnv("sparse")
    env.reset(seed=0)
    before = env.get_state()
    given = np.array([before[0] if each is None else each for each in state])
    with pytest.raises(ValueError, match=message):
        env.set_state(given)
    np.testing.assert_array_equal(env.get_state(), before)
    with pytest.raises(ValueError, match="not a state of this delivery board"):
        DeliveryEnv("corridor").set_state(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "sprse"}, r"no board 'sprse'; did you mean sparse\?"),
        ({}, "no board None"),
        ({"task": "sparse", "rows": ["..g"]}, "either the task 'sparse' or drawn by rows"),
        ({"task": "sparse", "win_probability": 0.5}, "its own weights and chances"),
        ({"task": "sparse", "weights": [0] * 6}, "its own weights and chances"),
        ({"task": "sparse", "horizon": 0}, "a horizon of 0 steps"),
        ({"task": "sparse", "cell_size": 0}, "cells of 0 pixels"),
        ({"rows": ["..g", ".."]}, r"rows of one length, not \[3, 2\]"),
        ({"rows": []}, "rows of one length"),
        ({"rows": [""]}, "rows of one length"),
        ({"rows": ["..x"]}, "has no 'x'"),
        ({"rows": ["ghs"]}, "cannot start on this board"),
        ({"rows": ["..g"], "weights": [1.0]}, "needs 6 finite weights"),
        ({"rows": ["..g"], "weights": [1.0] * 5 + [np.nan]}, "needs 6 finite weights"),
        ({"rows": ["..g"], "win_probability": 1.5}, r"must lie in \[0, 1\], not 1\.5"),
    ],
)
def test_what_is_no_board_is_explained(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeliveryEnv(**arguments)


# Pictures


def block(image: np.ndarray, cell: int, width: int, size: int) -> np.ndarray:
    row, column = divmod(cell, width)
    return image[row * size : (row + 1) * size, column * size : (column + 1) * size]


def test_pictures_show_the_van_where_it_is_and_the_rest_unchanged() -> None:
    env = DeliveryEnv("sparse", cell_size=16)
    env.reset(seed=3)
    bare = np.asarray(draw_board(SPARSE, 16))
    assert bare.shape == (160, 160, 3)
    for cell in (0, 9, 57, 90):
        env.set_state(np.array([env.get_state()[0], cell, 0, 0]))
        image = env.render()
        assert (image.shape, image.dtype) == (bare.shape, np.uint8)
        changed = [each for each in range(100) if (block(image, each, 10, 16) != block(bare, each, 10, 16)).any()]
        assert changed == [cell]
        # Upright: wheels below, the van's blue above them.
        van = block(image, cell, 10, 16).astype(int)
        blue = (van[..., 2] - van[..., 0] > 100).sum(axis=1)
        assert blue[:12].sum() > 20
        assert blue[12:].sum() < blue[:12].sum() / 4


def test_everything_on_a_board_looks_different() -> None:
    board = Board.read(".:gGhHsScCrR")
    picture = np.asarray(draw_board(board, 24)).astype(float)
    looks = [block(picture, cell, 12, 24) for cell in range(12)]
    for first in range(12):
        for second in range(first):
            assert np.abs(looks[first] - looks[second]).mean() > 4
    wide = np.asarray(draw_board(Board.read("..g"), 8))
    assert wide.shape == (8, 24, 3)


def test_a_picture_belongs_to_the_caller() -> None:
    env = DeliveryEnv("corridor")
    env.reset(seed=0)
    first = env.render()
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(env.render(), kept)


def test_the_default_weights_are_the_papers() -> None:
    assert dict(zip(FEATURES, WEIGHTS, strict=True)) == {
        "gas": -1,
        "goal": 50,
        "sheep": -50,
        "coin": 1,
        "roadblock": -1,
        "brick": -2,
    }
