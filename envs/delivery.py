"""The delivery domain: a van in a small grid of streets, exact as a table, playable as an environment, and drawn.

Knox et al., "Models of human preference for learning reward functions" (arXiv 2206.02231). The van moves up, down, left
or right; a move into a house or over the edge leaves it where it is. Every step earns a weighted sum of six features:

| feature | counted | weight |
| --- | --- | --- |
| gas | per step on a street, unless it ends the episode | -1 |
| goal | on delivery, which ends the episode | 50 |
| sheep | on hitting one, which ends the episode | -50 |
| coin | per step onto one, which stays there | 1 |
| roadblock | per step onto one, which stays there | -1 |
| brick | instead of gas, per step that ends on brick | -2 |

Boards are drawings, one character per cell; a capital is the same thing on brick:

    .  street    g  goal    h  house    s  sheep    c  coin    r  roadblock
    :  brick     G          H           S           C          R

Some boards are risky: a sheep cell then holds, with some probability, a win in place of the sheep. It ends the episode
too, and counts as a coin alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self, TypeAlias

import gymnasium
import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int, Shaped
from PIL import Image, ImageDraw

from envs import suggestion
from envs.env import Action, Env, Observation, State, check_action
from robopref.mdp import TabularMDP

MOVES = ("up", "down", "left", "right")
FEATURES = ("gas", "goal", "sheep", "coin", "roadblock", "brick")
WEIGHTS = (-1.0, 50.0, -50.0, 1.0, -1.0, -2.0)

_OFFSETS = ((-1, 0), (1, 0), (0, -1), (0, 1))
_GAS, _GOAL, _SHEEP, _COIN, _ROADBLOCK, _BRICK = range(6)
_CHARACTERS = ".ghscr:GHSCR"
_LARGEST_EPISODE = 2**53 - 1
"""Episode numbers are kept in states, as float64."""


class Outcomes(NamedTuple):
    """All that can follow from each move in each cell: K possibilities, of which some may have probability 0.

    Attributes:
        cells: the next cell of each.
        probabilities: of each; they sum to 1 over K.
        features: what each earns, in the order of `FEATURES`.
    """

    cells: Int[np.ndarray, "N 4 K"]
    probabilities: Float[np.ndarray, "N 4 K"]
    features: Float[np.ndarray, "N 4 K 6"]


@dataclass(frozen=True)
class Board:
    """A grid of N cells, numbered row by row from the top left, and what things on it are worth.

    Attributes:
        rows: the drawing, a string for each row.
        weights: of the features, in the order of `FEATURES`.
        win_probability: that a sheep cell turns out to be a win.

    Raises:
        ValueError: the drawing is not a board on which an episode can start, or a number is out of range.
    """

    rows: tuple[str, ...]
    weights: tuple[float, ...] = WEIGHTS
    win_probability: float = 0.0

    def __post_init__(self) -> None:
        if not self.rows or not self.rows[0] or any(len(row) != len(self.rows[0]) for row in self.rows):
            raise ValueError(f"a board needs rows of one length, not {[len(row) for row in self.rows]}.")
        unknown = sorted(set("".join(self.rows)) - set(_CHARACTERS))
        if unknown:
            raise ValueError(f"a board has no {unknown[0]!r}; it is drawn with the characters {_CHARACTERS}")
        if not self.starts.any():
            raise ValueError("an episode cannot start on this board: all of its cells are houses, goals or sheep.")
        if len(self.weights) != len(FEATURES) or not np.isfinite(self.weights).all():
            raise ValueError(f"a board needs {len(FEATURES)} finite weights ({', '.join(FEATURES)}): {self.weights}.")
        if not 0 <= self.win_probability <= 1:
            raise ValueError(f"the probability of a win must lie in [0, 1], not {self.win_probability}.")

    @classmethod
    def read(cls, drawing: str, weights: Sequence[float] = WEIGHTS, win_probability: float = 0.0) -> Self:
        """A board from a text with a line for each row; space around the lines does not count."""
        return cls(tuple(drawing.split()), tuple(map(float, weights)), win_probability)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width, in cells."""
        return len(self.rows), len(self.rows[0])

    @cached_property
    def things(self) -> Shaped[np.ndarray, " N"]:
        """What is in each cell, whatever its ground, by its small letter; "." for nothing."""
        return np.array([each.lower().replace(":", ".") for each in "".join(self.rows)])

    @cached_property
    def bricks(self) -> Bool[np.ndarray, " N"]:
        """Which cells are brick."""
        return np.array([each.isupper() or each == ":" for each in "".join(self.rows)])

    @property
    def goals(self) -> Bool[np.ndarray, " N"]:
        """Where the goals are."""
        return np.isin(self.things, ["g"])

    @property
    def houses(self) -> Bool[np.ndarray, " N"]:
        """Which cells cannot be entered."""
        return np.isin(self.things, ["h"])

    @property
    def terminal(self) -> Bool[np.ndarray, " N"]:
        """Which cells end an episode."""
        return np.isin(self.things, ["g", "s"])

    @property
    def starts(self) -> Bool[np.ndarray, " N"]:
        """Where an episode may start: all cells but houses and those that end it."""
        return ~np.isin(self.things, ["g", "s", "h"])

    @cached_property
    def outcomes(self) -> Outcomes:
        """What follows from each move in each cell; in houses and cells that end an episode, nothing does."""
        height, width = self.shape
        count, possibilities = height * width, 2 if self.win_probability > 0 else 1
        cells = np.repeat(np.arange(count), 4 * possibilities).reshape(count, 4, possibilities)
        probabilities = np.zeros((count, 4, possibilities))
        probabilities[..., 0] = 1.0
        features = np.zeros((count, 4, possibilities, len(FEATURES)))
        for cell in np.flatnonzero(self.starts).tolist():
            for move, (down, right) in enumerate(_OFFSETS):
                row, column = cell // width + down, cell % width + right
                inside = 0 <= row < height and 0 <= column < width
                entered = inside and self.things[row * width + column] != "h"
                following = row * width + column if entered else cell
                cells[cell, move] = following
                features[cell, move, :] = self._earned(following, stayed=not entered)
                if possibilities == 2 and self.things[following] == "s":
                    probabilities[cell, move] = 1.0 - self.win_probability, self.win_probability
                    features[cell, move, 1] = np.eye(len(FEATURES))[_COIN]
        return Outcomes(cells, probabilities, features)

    def _earned(self, cell: int, *, stayed: bool) -> Float[np.ndarray, " 6"]:
        """The features of a step that ends in a cell; one who stayed pays for the ground, and meets nothing anew."""
        earned = np.zeros(len(FEATURES))
        thing = str(self.things[cell])
        if thing in "gs":
            earned[_GOAL if thing == "g" else _SHEEP] = 1.0
            return earned
        earned[_BRICK if self.bricks[cell] else _GAS] = 1.0
        if thing in "cr" and not stayed:
            earned[_COIN if thing == "c" else _ROADBLOCK] = 1.0
        return earned


SPARSE = Board.read("""
    ..r.......
    ....c....:
    ..s....:::
    c.r.hss::.
    ::........
    :.c.......
    :h.srh....
    .c.....C::
    ..r....::G
    ......r..c
""")
"""The board on which people were asked: "2021-07-29_sparseboard2-notrap" of the authors' release, in our characters."""

CORRIDOR = Board.read("...g")
"""Three steps to a goal: the smallest board on which the last one, into the goal, must not be forgotten."""

BOARDS = {"sparse": SPARSE, "corridor": CORRIDOR}


def to_mdp(board: Board, discount: float) -> TabularMDP:
    """The board as a table, in NumPy's float64: a state for each cell, an action for each move, and the six features.

    Episodes start in any of `board.starts` with the same probability. Nobody is ever in a house, whose state is
    terminal.
    """
    cells, probabilities, features = board.outcomes
    transitions = np.sum(probabilities[..., None] * (cells[..., None] == np.arange(len(cells))), axis=2)
    expected = np.sum(probabilities[..., None] * features, axis=2)
    return TabularMDP(
        transitions=transitions,
        rewards=expected @ np.asarray(board.weights),
        start=board.starts / board.starts.sum(),
        terminal=~board.starts,
        discount=np.asarray(discount, np.float64),
        features=expected,
    )


def random_board(rng: np.random.Generator) -> Board:
    """A board from the authors' family of random ones: sheep, roadblocks and coins in random cells, and one goal.

    Shares of cells are drawn from those that leave room, and rounded down. The goal is put down last and may replace
    what was in its cell. There is no brick, whose weight means nothing here.
    """
    height, width = int(rng.choice((3, 6, 10, 15))), int(rng.choice((5, 6, 10)))
    # In tenths, because 0.1 + 0.8 + 0.1 in floating point need not be 1.
    sheep = int(rng.choice((0, 1, 3)))
    roadblocks = int(rng.choice([tenths for tenths in (0, 1, 5, 8) if sheep + tenths < 10]))
    coins = int(rng.choice([tenths for tenths in (0, 1, 2) if sheep + roadblocks + tenths < 10]))
    counts = [tenths * height * width // 10 for tenths in (sheep, roadblocks, coins)]
    weights = (-1.0, *(float(rng.choice(of)) for of in ((0, 1, 5, 10, 50), (-5, -10, -50, -100))), 1.0)
    return Board(
        _scatter(rng, height, width, dict(zip("src", counts, strict=True))),
        (*weights, float(rng.choice((-2, -5, -10))), WEIGHTS[_BRICK]),
    )


def random_risky_board(rng: np.random.Generator, win: float) -> Board:
    """A 5x5 board of the authors' stochastic family: one goal, and 1, 2 or 7 sheep that as often are a win.

    Args:
        rng: decides where things are.
        win: what a win is worth, as the weight of the coin feature; the boards have no coins.
    """
    rows = _scatter(rng, 5, 5, {"s": int(rng.choice((1, 2, 7)))})
    return Board(rows, (-1.0, 50.0, -50.0, float(win), 0.0, 0.0), win_probability=0.5)


def _scatter(rng: np.random.Generator, height: int, width: int, counts: dict[str, int]) -> tuple[str, ...]:
    """Rows of a drawing with so many of each thing in different cells, and then a goal in any cell."""
    cells = np.full(height * width, ".")
    free = rng.permutation(height * width)
    for thing, count in counts.items():
        cells[free[:count]] = thing
        free = free[count:]
    cells[rng.integers(height * width)] = "g"
    return tuple("".join(row) for row in cells.reshape(height, width))


def moves_of(actions: npt.ArrayLike) -> Int[np.ndarray, "*B"]:
    """The moves that actions [*B, 4] stand for: the place of the greatest number, the first of them in a tie."""
    return np.asarray(np.argmax(actions, axis=-1))


def actions_of(moves: Int[np.ndarray, "*B"] | int) -> Float[np.ndarray, "*B 4"]:
    """Actions that stand for these moves: 1 at the move, 0 elsewhere."""
    return np.asarray(np.eye(len(MOVES), dtype=np.float32)[moves])


class DeliveryEnv(Env):
    """The delivery domain as an environment whose actions are continuous, as agents here need them.

    An action has a number in [-1, 1] for each of `MOVES`, and the move with the greatest one is made; the mean of many
    such actions then is the move made most often. The observation is 1 for the van's cell and 0 for all others, so that
    `observation @ values` is a table's value. `info` has the features of the step, and `success` in the goal.

    A state is [a checksum of the board, cell, steps taken, number of the episode]; the number decides what chance
    brings. A state does not hold the horizon.

    Args:
        task: a name in `BOARDS`; None where `rows` gives the board.
        horizon: steps after which an episode is truncated.
        rows: a drawing, in place of a task.
        weights: of that board's features.
        win_probability: of that board.
        cell_size: edge of a cell in images, in pixels.

    Raises:
        ValueError: there is no such task or board, not one of task and rows, or a horizon or cell size below 1.
    """

    def __init__(
        self,
        task: str | None = None,
        horizon: int = 100,
        rows: Sequence[str] | None = None,
        weights: Sequence[float] = WEIGHTS,
        win_probability: float = 0.0,
        cell_size: int = 24,
    ) -> None:
        if horizon < 1 or cell_size < 1:
            raise ValueError(f"a horizon of {horizon} steps and cells of {cell_size} pixels: both must be at least 1.")
        sizes = {"horizon": horizon, "cell_size": cell_size}
        if rows is not None:
            if task is not None:
                raise ValueError(f"a delivery board is either the task {task!r} or drawn by rows, not both.")
            self.board = Board(tuple(rows), tuple(map(float, weights)), float(win_probability))
            drawn = {"rows": list(rows), "weights": list(self.board.weights), "win_probability": win_probability}
            self.config = {"name": "delivery", **sizes, **drawn}
        elif task in BOARDS:
            if (tuple(weights), win_probability) != (WEIGHTS, 0.0):
                raise ValueError(f"the board {task!r} has its own weights and chances; give rows to choose them.")
            self.board = BOARDS[task]
            self.config = {"name": f"delivery/{task}", **sizes}
        else:
            raise ValueError(f"the delivery domain has no board {task!r}{suggestion(str(task), tuple(BOARDS))}")
        self._horizon = horizon
        self._pictures: tuple[Image.Image, Image.Image] | None = None
        self._checksum = float(zlib.crc32(repr(self.board).encode()))
        self._goals, self._terminal, self._houses = self.board.goals, self.board.terminal, self.board.houses
        self._starts = np.flatnonzero(self.board.starts)
        self._weights = np.asarray(self.board.weights)
        self._num_cells = len(self._goals)
        height, width = self.board.shape
        self.image_shape = (height * cell_size, width * cell_size, 3)
        self._episode: int | None = None
        self._cell = self._steps = 0
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (len(MOVES),), np.float32)
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (self._num_cells,), np.float64)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    @classmethod
    def of(cls, board: Board, horizon: int = 100, cell_size: int = 24) -> Self:
        """The environment of a board that has no name."""
        return cls(None, horizon, board.rows, board.weights, board.win_probability, cell_size)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode in a random cell; without a seed, the environment's own random stream goes on."""
        super().reset(seed=seed)
        self._episode = int(self.np_random.integers(_LARGEST_EPISODE + 1))
        self._cell = int(self.np_random.choice(self._starts))
        self._steps = 0
        return self._observe(), self._info(np.zeros(len(FEATURES)))

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Makes the move with the greatest number; an action beyond the action space is clipped to it.

        Raises:
            ValueError: the action is not finite or has another shape than (4,).
            RuntimeError: the episode is over, or none was begun.
        """
        if self._episode is None or self._steps >= self._horizon or self._terminal[self._cell]:
            raise RuntimeError("there is no episode to continue: call reset before step.")
        move = int(moves_of(check_action(action, self.action_space)))
        outcomes = self.board.outcomes
        which = _chance(outcomes.probabilities[self._cell, move], self._episode, self._steps)
        features = outcomes.features[self._cell, move, which]
        self._cell = int(outcomes.cells[self._cell, move, which])
        self._steps += 1
        terminated = bool(self._terminal[self._cell])
        reward = float(features @ self._weights)
        return self._observe(), reward, terminated, self._steps >= self._horizon, self._info(features)

    def get_state(self) -> State:
        if self._episode is None:
            raise RuntimeError("there is no state to get: call reset first.")
        return np.array([self._checksum, self._cell, self._steps, self._episode], np.float64)

    def set_state(self, state: State) -> Observation:
        if state.shape != (4,) or state[0] != self._checksum or not np.isfinite(state).all():
            raise ValueError("this is not a state of this delivery board: those are 4 numbers, the first its checksum.")
        cell, steps, episode = (int(each) for each in state[1:])
        valid = 0 <= cell < self._num_cells and steps >= 0 and 0 <= episode <= _LARGEST_EPISODE
        if not valid or self._houses[cell] or (cell, steps, episode) != tuple(state[1:]):
            raise ValueError(f"the van cannot be in cell {state[1]} after {state[2]} steps of episode {state[3]}.")
        self._cell, self._steps, self._episode = cell, steps, episode
        return self._observe()

    def render(self) -> npt.NDArray[np.uint8]:
        """The board from above with the van on it, `image_shape`."""
        size = int(self.config["cell_size"])
        if self._pictures is None:
            self._pictures = draw_board(self.board, size), _draw_van(size)
        picture, van = self._pictures[0].copy(), self._pictures[1]
        row, column = divmod(self._cell, self.board.shape[1])
        picture.paste(van, (column * size, row * size), van)
        return np.array(picture)

    def _observe(self) -> Observation:
        observation = np.zeros(self._num_cells)
        observation[self._cell] = 1.0
        return observation

    def _info(self, features: Float[np.ndarray, " 6"]) -> dict[str, Any]:
        return {"success": bool(self._goals[self._cell]), **dict(zip(FEATURES, features.tolist(), strict=True))}


def draw_board(board: Board, cell_size: int) -> Image.Image:
    """A picture of a board from above, without a van, `cell_size` pixels to a cell."""
    height, width = board.shape
    picture = Image.new("RGB", (width * cell_size, height * cell_size))
    drawers = {"g": _draw_flag, "h": _draw_house, "s": _draw_sheep, "c": _draw_coin, "r": _draw_barrier}
    for cell, (thing, brick) in enumerate(zip(board.things.tolist(), board.bricks, strict=True)):
        brush = _Brush(cell_size, _BRICKS if brick else _STREET)
        if brick:
            _draw_mortar(brush)
        brush.line([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)], _MORTAR if brick else _KERB, 0.04)
        if thing in drawers:
            drawers[thing](brush)
        row, column = divmod(cell, width)
        picture.paste(brush.finished(), (column * cell_size, row * cell_size))
    return picture


def _chance(probabilities: Float[np.ndarray, " K"], episode: int, step: int) -> int:
    """Which of the possibilities comes about at this step of this episode."""
    if probabilities[0] == 1.0:
        return 0
    return int(np.random.default_rng((episode, step)).random() >= probabilities[0])


_SMOOTH = 4
"""Pictures are drawn this many times larger and then reduced, which makes their edges smooth."""

_STREET, _KERB, _BRICKS, _MORTAR = "#E7E4DC", "#F7F5F0", "#C4866A", "#DDB09A"
_INK, _WHITE, _GRASS = "#33373D", "#FFFFFF", "#A9C98A"
_VAN = (0, 114, 178)

_Point: TypeAlias = tuple[float, float]


class _Brush:
    """Draws one cell, whose corners are (0, 0) at the top left and (1, 1) at the bottom right."""

    def __init__(self, cell_size: int, ground: str | tuple[int, ...]) -> None:
        self._size = cell_size
        self._scale = cell_size * _SMOOTH
        self._image = Image.new("RGB" if isinstance(ground, str) else "RGBA", (self._scale, self._scale), ground)
        self._draw = ImageDraw.Draw(self._image)

    def polygon(self, points: Sequence[_Point], colour: str | tuple[int, ...]) -> None:
        self._draw.polygon(self._scaled(points), fill=colour)

    def disc(self, centre: _Point, radius: float, colour: str | tuple[int, ...]) -> None:
        (x, y) = centre
        corners = self._scaled([(x - radius, y - radius), (x + radius, y + radius)])
        self._draw.ellipse(corners, fill=colour)

    def box(self, left_top: _Point, right_bottom: _Point, colour: str | tuple[int, ...], corner: float = 0.0) -> None:
        self._draw.rounded_rectangle(self._scaled([left_top, right_bottom]), corner * self._scale, fill=colour)

    def line(self, points: Sequence[_Point], colour: str, width: float) -> None:
        self._draw.line(self._scaled(points), fill=colour, width=max(1, round(width * self._scale)))

    def finished(self) -> Image.Image:
        """The cell in its final size."""
        return self._image.resize((self._size, self._size), Image.Resampling.BOX)

    def _scaled(self, points: Sequence[_Point]) -> list[_Point]:
        return [(x * self._scale, y * self._scale) for x, y in points]


def _draw_mortar(brush: _Brush) -> None:
    for row in range(4):
        brush.line([(0, row / 4), (1, row / 4)], _MORTAR, 0.03)
        for joint in (0.25, 0.75) if row % 2 else (0.0, 0.5):
            brush.line([(joint, row / 4), (joint, (row + 1) / 4)], _MORTAR, 0.03)


def _draw_flag(brush: _Brush) -> None:
    brush.disc((0.5, 0.5), 0.42, "#7CC08A")
    brush.box((0.33, 0.18), (0.39, 0.84), _INK, 0.02)
    brush.polygon([(0.39, 0.2), (0.78, 0.35), (0.39, 0.5)], _WHITE)


def _draw_house(brush: _Brush) -> None:
    brush.box((0.2, 0.44), (0.8, 0.86), "#F1E3C6")
    brush.polygon([(0.1, 0.48), (0.5, 0.12), (0.9, 0.48)], "#8E3B46")
    brush.box((0.3, 0.56), (0.44, 0.7), "#7FA6C4")
    brush.box((0.56, 0.58), (0.7, 0.86), "#6B4A3A")


def _draw_sheep(brush: _Brush) -> None:
    brush.disc((0.5, 0.5), 0.42, _GRASS)
    for leg in (0.38, 0.56):
        brush.box((leg, 0.6), (leg + 0.06, 0.8), _INK)
    for centre in ((0.36, 0.52), (0.45, 0.42), (0.58, 0.42), (0.64, 0.54), (0.5, 0.58)):
        brush.disc(centre, 0.14, _WHITE)
    brush.disc((0.75, 0.46), 0.1, _INK)


def _draw_coin(brush: _Brush) -> None:
    brush.disc((0.5, 0.5), 0.28, "#B98410")
    brush.disc((0.5, 0.5), 0.23, "#F4C430")
    brush.box((0.46, 0.37), (0.54, 0.63), "#B98410", 0.03)


def _draw_barrier(brush: _Brush) -> None:
    for post in (0.24, 0.68):
        brush.box((post, 0.34), (post + 0.08, 0.78), _INK)
    brush.box((0.12, 0.38), (0.88, 0.58), _WHITE)
    for left in (0.12, 0.36, 0.6):
        brush.polygon([(left + 0.1, 0.38), (left + 0.24, 0.38), (left + 0.14, 0.58), (left, 0.58)], "#E4572E")


def _draw_van(cell_size: int) -> Image.Image:
    brush = _Brush(cell_size, (0, 0, 0, 0))
    brush.box((0.06, 0.26), (0.94, 0.76), _WHITE, 0.1)
    brush.box((0.1, 0.3), (0.9, 0.72), _VAN, 0.08)
    brush.box((0.64, 0.36), (0.84, 0.52), "#D8ECF8", 0.03)
    brush.box((0.18, 0.38), (0.54, 0.46), "#4BA3D9", 0.02)
    for wheel in (0.3, 0.72):
        brush.disc((wheel, 0.74), 0.11, _INK)
        brush.disc((wheel, 0.74), 0.05, _WHITE)
    return brush.finished()
