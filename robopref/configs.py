"""Frozen configuration dataclasses to JSON and back, exactly: what manifests, checkpoints and job results store."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")


def to_json(value: Any) -> Any:
    """Plain JSON values for dataclasses, tuples, mappings, paths and scalars, nested as they come."""
    return _plain(value, with_classes=False)


def from_json(config_class: type[C], values: Any) -> C:
    """The dataclass that `to_json` made `values` from.

    Raises:
        ValueError: if a field is missing from `values` or unknown to the class.
    """
    # A generic dataclass is given as `Training[BCConfig]`, and its fields of type `Config` are then of type `BCConfig`.
    plain = typing.get_origin(config_class) or config_class
    parameters = dict(zip(getattr(plain, "__parameters__", ()), typing.get_args(config_class), strict=False))
    hints = {name: parameters.get(hint, hint) for name, hint in typing.get_type_hints(plain).items()}
    names = {field.name for field in dataclasses.fields(plain)}  # type: ignore[arg-type]
    for name in sorted(names ^ set(values)):
        problem = "is missing" if name in names else "is unknown"
        raise ValueError(f"{plain.__name__}.{name} {problem}: this was written by another version of robopref")
    config: C = plain(**{name: _convert(hints[name], value) for name, value in values.items()})
    return config


def digest(value: Any) -> str:
    """A short hash of a configuration's content and classes, the same in every process."""
    return hashlib.sha256(json.dumps(_plain(value, with_classes=True), sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any, *, with_classes: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        named = {"class": type(value).__qualname__} if with_classes else {}
        return named | {name: _plain(item, with_classes=with_classes) for name, item in fields.items()}
    if isinstance(value, dict):
        return {str(key): _plain(item, with_classes=with_classes) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item, with_classes=with_classes) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} has no JSON form; configurations hold numbers, strings, paths, tuples and dataclasses")


def _convert(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if origin in (typing.Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        return _convert(next((option for option in options if _fits(option, value)), options[0]), value)
    if origin is tuple:
        item = arguments[0] if arguments[-1] is Ellipsis else None
        return tuple(_convert(item or arguments[i], element) for i, element in enumerate(value))
    if dataclasses.is_dataclass(origin or hint):
        return from_json(hint, value)
    if hint is Path:
        return Path(value)
    return value


def _fits(hint: Any, value: Any) -> bool:
    """Whether a JSON value can have come from this type; what tells the types of a union apart."""
    plain = typing.get_origin(hint) or hint
    if dataclasses.is_dataclass(plain):
        return isinstance(value, dict) and value.keys() == {field.name for field in dataclasses.fields(plain)}
    if plain is tuple:
        return isinstance(value, list)
    if plain is Path:
        return isinstance(value, str)
    return type(value) is plain
