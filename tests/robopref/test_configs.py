from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, Optional, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robopref.configs import digest, from_json, to_json

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Layer:
    width: int
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Schedule:
    kind: Literal["constant", "cosine"]
    first: Layer | None


@dataclass(frozen=True)
class Settings:
    name: str
    folder: Path
    layers: tuple[Layer, ...]
    mixed: tuple[int, str, Layer]
    nested: tuple[tuple[int, ...], ...]
    schedule: Schedule
    limit: int | None
    widths: Optional[tuple[int, ...]]  # noqa: UP045
    last_folder: Path | None
    number: int | float
    scalar: bool | int | float | str | None
    shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    several: int | tuple[int, ...]
    either: Layer | Schedule


Part = TypeVar("Part")


@dataclass(frozen=True)
class Holder(Generic[Part]):
    part: Part
    count: int


@dataclass(frozen=True)
class Job:
    holder: Holder[Layer]


numbers = st.floats(allow_nan=False, allow_infinity=False)
integers = st.integers(-(2**70), 2**70)
folders = st.lists(st.text("ab.ü ", min_size=1, max_size=3), min_size=1, max_size=3).map(lambda parts: Path(*parts))
layers = st.builds(Layer, integers, st.lists(numbers, max_size=3).map(tuple))
schedules = st.builds(Schedule, st.sampled_from(["constant", "cosine"]), st.none() | layers)
settings = st.builds(
    Settings,
    name=st.text(max_size=5),
    folder=folders,
    layers=st.lists(layers, max_size=3).map(tuple),
    mixed=st.tuples(integers, st.text(max_size=3), layers),
    nested=st.lists(st.lists(integers, max_size=2).map(tuple), max_size=2).map(tuple),
    schedule=schedules,
    limit=st.none() | integers,
    widths=st.none() | st.lists(integers, max_size=2).map(tuple),
    last_folder=st.none() | folders,
    number=integers | numbers,
    scalar=st.none() | st.booleans() | integers | numbers | st.text(max_size=3),
    shares=st.dictionaries(st.text(max_size=3), numbers, max_size=3),
)

EXAMPLE = Settings(
    name="small",
    folder=Path("runs/small"),
    layers=(Layer(8, (0.5,)), Layer(4)),
    mixed=(1, "two", Layer(3)),
    nested=((1, 2), ()),
    schedule=Schedule("cosine", Layer(2)),
    limit=None,
    widths=(16, 16),
    last_folder=None,
    number=0.1,
    scalar="text",
    shares={"b": 0.25, "a": 0.75},
)


@given(settings)
def test_a_configuration_comes_back_equal_through_json_text(config):
    restored = from_json(Settings, json.loads(json.dumps(to_json(config), allow_nan=False)))
    assert restored == config
    assert hash(restored.layers) == hash(config.layers)


@pytest.mark.parametrize("several", [3, (3,), ()])
@pytest.mark.parametrize("either", [Layer(2, (0.5,)), Schedule("cosine", Layer(3)), Schedule("constant", None)])
def test_a_union_keeps_which_of_its_types_it_was(several, either):
    choice = Choice(several, either)
    assert from_json(Choice, to_json(choice)) == choice


@pytest.mark.parametrize("part", [Layer(2, (0.5,)), Schedule("cosine", Layer(3))])
def test_a_generic_dataclass_comes_back_with_the_type_of_its_parts(part):
    holder = Holder(part, 2)
    assert from_json(Holder[type(part)], to_json(holder)) == holder


def test_a_generic_dataclass_comes_back_as_a_field():
    job = Job(Holder(Layer(2, (0.5,)), 3))
    assert from_json(Job, to_json(job)) == job


def test_the_json_form_is_plain():
    assert to_json(Schedule("cosine", Layer(2, (0.5, 1.0)))) == {
        "kind": "cosine",
        "first": {"width": 2, "rates": [0.5, 1.0]},
    }
    assert to_json({"path": Path("a/b"), "many": [1, (None, True)]}) == {"path": "a/b", "many": [1, [None, True]]}


def test_every_field_is_written_defaults_included():
    assert to_json(Layer(2)) == {"width": 2, "rates": []}


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j, Layer])
def test_what_has_no_json_form_is_refused(value):
    with pytest.raises(TypeError, match="has no JSON form"):
        to_json({"deep": [value]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("limit"), "Settings.limit is missing"),
        (lambda values: values.update(extra=1), "Settings.extra is unknown"),
        (lambda values: values["schedule"].pop("kind"), "Schedule.kind is missing"),
        (lambda values: values["schedule"]["first"].update(depth=1), "Layer.depth is unknown"),
        (lambda values: values["layers"][1].pop("rates"), "Layer.rates is missing"),
        (lambda values: values["mixed"][2].update(depth=1), "Layer.depth is unknown"),
    ],
)
def test_a_field_too_few_or_too_many_is_named_with_its_class(change, message):
    values = to_json(EXAMPLE)
    change(values)
    with pytest.raises(ValueError, match=f"^{message}: this was written by another version") as error:
        from_json(Settings, values)
    assert "\n" not in str(error.value)


def test_digests_tell_any_change():
    changes = {
        "name": "large",
        "folder": Path("runs/large"),
        "layers": (Layer(8, (0.5,)), Layer(5)),
        "mixed": (1, "two", Layer(3, (1.0,))),
        "nested": ((1,), (2,)),
        "schedule": Schedule("constant", Layer(2)),
        "limit": 0,
        "widths": None,
        "last_folder": Path("old"),
        "number": 0.2,
        "scalar": None,
        "shares": {"b": 0.75, "a": 0.25},
    }
    assert changes.keys() == {each.name for each in dataclasses.fields(Settings)}
    digests = {digest(dataclasses.replace(EXAMPLE, **{name: value})) for name, value in changes.items()}
    assert len(digests | {digest(EXAMPLE)}) == len(changes) + 1


@given(st.dictionaries(st.text(max_size=3), integers | numbers | st.text(max_size=3), max_size=5), st.randoms())
def test_digests_know_no_order(values, random):
    shuffled = list(values.items())
    random.shuffle(shuffled)
    assert digest(dict(shuffled)) == digest(values)


def test_digests_tell_classes_of_equal_fields():
    twin = dataclasses.make_dataclass("Twin", ["width", "rates"], frozen=True)
    assert to_json(twin(2, (0.5,))) == to_json(Layer(2, (0.5,)))
    assert digest(twin(2, (0.5,))) != digest(Layer(2, (0.5,)))


ELSEWHERE = """
from dataclasses import dataclass
from robopref.configs import digest

@dataclass(frozen=True)
class Part:
    width: int
    shares: dict

names = {"one", "two", "three", "four"}
found = digest(Part(8, {name: [len(name), 0.1, None] for name in names}))
"""


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_digests_are_the_same_in_every_process(hash_seed):
    here: dict[str, str] = {}
    exec(ELSEWHERE, here)
    elsewhere = subprocess.run(
        [sys.executable, "-c", ELSEWHERE + "print(found)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.strip() == here["found"]


def test_a_digest_is_short_and_can_name_a_file():
    assert len(digest(EXAMPLE)) == 16
    assert set(digest(EXAMPLE)) <= set("0123456789abcdef")
