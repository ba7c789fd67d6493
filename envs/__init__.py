"""Environments: one file per simulator or task family, each keeping the contract of env.py.

Here belong simulated tasks, and the scripted behaviours that act in them. Who learns from them is none of their
business: they import nothing but robopref/ and one another.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from envs.env import Env

CONSTRUCTORS = {
    "delivery": "envs.delivery:DeliveryEnv",
    "locomotion": "envs.locomotion:LocomotionEnv",
    "metaworld": "envs.metaworld:MetaWorldEnv",
    "robosuite": "envs.robosuite:RobosuiteEnv",
}
"""From the part of an environment's name before the slash to its class, which takes the part after it as `task`."""


def make(config: Mapping[str, Any]) -> Env:
    """Builds the environment that `config` describes, such as `{"name": "metaworld/door-open-v3", "horizon": 200}`.

    With `"observe": "pixels"`, which every environment takes, its images are the observations (pixels.py). What a
    robomimic file says of its environment (`env_args`, with an `env_name`) is a description too, if it is robosuite's.

    Raises:
        ValueError: there is no environment of that name, or it takes no such argument.
    """
    if "env_name" in config:
        from envs.robosuite import from_env_args

        config = from_env_args(config)
    arguments = dict(config)
    name = str(arguments.pop("name", ""))
    observe = arguments.pop("observe", None)
    if observe not in (None, "pixels"):
        raise ValueError(f'an environment cannot observe {observe!r}; say "pixels", or nothing for its own vectors.')
    family, _, task = name.partition("/")
    if family not in CONSTRUCTORS:
        raise ValueError(f"there is no environment {name!r}{suggestion(family, tuple(CONSTRUCTORS))}")
    module, _, constructor = CONSTRUCTORS[family].partition(":")
    if task:
        arguments["task"] = task
    build = getattr(importlib.import_module(module), constructor)
    try:
        env: Env = build(**arguments)
    except TypeError as error:
        raise ValueError(f"the environment {name!r} cannot be made from {dict(config)}: {error}.") from error
    if observe == "pixels":
        from envs.pixels import PixelEnv

        return PixelEnv(env)
    return env


def suggestion(name: str, known: tuple[str, ...]) -> str:
    """The end of a sentence about an unknown name: the known names nearest to it, or all where none is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known are {', '.join(sorted(known))}."
