"""What is put aside, and files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robopref.formats.lerobot import layout, read_lerobot
from robopref.formats.lerobot.aside import Aside, line, row, slices
from robopref.formats.lerobot.layout import Feature
from robopref.types import Episode

Write = Callable[..., Path]


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "values",
    [
        np.array([0.1, -0.0, np.inf, -np.inf, 5e-324, 1.7976931348623157e308]),
        np.array([0.1, 3.4028235e38, 1e-45, np.inf], np.float32),
        np.array([-(2**63), 2**63 - 1]),
        np.array([2**64 - 1], np.uint64),
        np.array([True, False]),
    ],
)
def test_rows_come_back_bit_for_bit(episodes: list[Episode], values: np.ndarray) -> None:
    stored = json.loads(line(0, episodes[0], {"x": values[None]}, {}))["final"]["x"]
    read = row(stored, Feature("x", values.dtype.name, values.shape))
    assert read.dtype == values.dtype
    assert read.shape == (1, *values.shape)
    assert read.tobytes() == values.tobytes()


@pytest.mark.parametrize("values", [None, 3, [1], [1, "x"], [1, None], [1, [2]], [1, 10**30]])
def test_rows_that_are_none(values: Any) -> None:
    with pytest.raises(ValueError, match="has no usable row of 'x'"):
        row(values, Feature("x", "int64", (2,)))


def test_origins_without_json_form_are_refused(episodes: list[Episode]) -> None:
    with pytest.raises(ValueError, match="its origin has no JSON form"):
        line(0, replace(episodes[0], origin={"scale": float("nan")}), {}, {})


def test_parts_lie_side_by_side() -> None:
    assert slices({"a": 2, "b": 1, "c": 3}) == {"a": slice(0, 2), "b": slice(2, 3), "c": slice(3, 6)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(schema_version=2), "has schema version 2; this robopref reads version 1"),
        (lambda value: value.pop("env"), "is damaged .*; remove it to read the dataset without it"),
        (lambda value: value.update(infos=[1]), "is damaged"),
        (lambda value: value.update(action_bounds=[[1], [2], [3]]), "is damaged"),
        (lambda value: value.update(splits={"x": [9]}), "splits off episodes that the dataset lacks"),
        (lambda value: value.update(action_bounds=[[1], [2]]), "bounds of other sizes than the dataset's vectors"),
        (lambda value: value.update(action_bounds=[[1, 1], [0, 2]]), "bounds of which the lower is above the upper"),
        (lambda value: value["observation_bounds"].pop("observation.state"), None),
        (lambda value: value.update(observation_bounds={"x": [[0], [1]]}), "'x' is none of them"),
        (lambda value: value["infos"].update(grip=[7]), "gives the info 'grip' the shape"),
        (lambda value: value["infos"].update(grip=[-1, -1]), "cannot be read"),
    ],
)
def test_a_description_that_does_not_fit(write: Write, change: Callable[[Any], None], message: str | None) -> None:
    path = write()
    edit(path / layout.OURS, change)
    if message is None:
        with read_lerobot(path) as source:
            assert source.keys == {"observation.environment_state": 2}
            assert source.episode(0).infos["observation.state"].shape == (6, 3)
        return
    with pytest.raises(ValueError, match=message), read_lerobot(path) as source:
        source.episode(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(length=4), "is of another dataset: its episode 0 has 4 steps instead of 5"),
        (lambda value: value.update(episode_index=1), "is damaged at episode 0"),
        (lambda value: value.update(seed="x"), "is damaged at episode 0"),
        (lambda value: value.pop("final"), "is damaged at episode 0"),
        (lambda value: value["final"].update({"grip": ["x"]}), "has no usable row of 'grip'"),
    ],
)
def test_a_line_that_does_not_fit(write: Write, change: Callable[[Any], None], message: str) -> None:
    path = write()
    lines = (path / layout.OURS_EPISODES).read_text().splitlines()
    first = json.loads(lines[0])
    change(first)
    (path / layout.OURS_EPISODES).write_text("\n".join([json.dumps(first), *lines[1:]]))
    with read_lerobot(path) as source:
        with pytest.raises(ValueError, match=message):
            source.episode(0)
        assert len(source.episode(1)) == 1


def test_episodes_added_later_have_nothing_put_aside(write: Write) -> None:
    aside = Aside(write(), 9)
    assert aside.episode(3, 3) is not None
    assert aside.episode(4, 3) is None
