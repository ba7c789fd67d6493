from __future__ import annotations

import importlib
import json
import pickle
import re

import gymnasium
import numpy as np
import pytest

import envs
from envs.env import Env, check_action


def test_every_family_can_be_imported() -> None:
    for place in envs.CONSTRUCTORS.values():
        module, _, name = place.partition(":")
        assert issubclass(getattr(importlib.import_module(module), name), Env)


def test_an_environment_is_made_from_its_configuration() -> None:
    env = envs.make({"name": "metaworld/door-open-v3", "horizon": 3})
    assert env.config["name"] == "metaworld/door-open-v3"
    assert env.config["horizon"] == 3
    again = envs.make(json.loads(json.dumps(env.config)))
    assert again.config == env.config
    first, second = (each.reset(seed=4)[0] for each in (env, again))
    np.testing.assert_array_equal(first, second)


def test_a_configuration_is_left_as_it_is() -> None:
    config = {"name": "metaworld/door-open-v3", "horizon": 3}
    envs.make(config)
    assert config == {"name": "metaworld/door-open-v3", "horizon": 3}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "metawrld/door-open-v3"}, r"no environment 'metawrld/door-open-v3'; did you mean metaworld\?"),
        ({"name": "qqq"}, r"no environment 'qqq'; known are delivery, locomotion, metaworld, robosuite\."),
        ({}, r"no environment ''; known are delivery, locomotion, metaworld, robosuite\."),
        ({"name": "metaworld/door-opn-v3"}, r"no task 'door-opn-v3'; did you mean .*door-open-v3.*\?"),
        ({"name": "metaworld/door-open-v3", "horizn": 9}, r"'metaworld/door-open-v3' cannot be made from .*horizn"),
        ({"name": "metaworld"}, r"'metaworld' cannot be made from .*task"),
        ({"env_name": "Can", "type": 2}, r"the environment 'Can' has type 2 in env_args, and only 1, robosuite's"),
        ({"name": "metaworld/door-open-v3", "horizon": 0}, r"a horizon of 0 steps .* at least 1"),
    ],
)
def test_what_cannot_be_made_is_explained_in_one_sentence(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        envs.make(config)
    assert "\n" not in str(raised.value)
    assert re.search(r"[.?]$", str(raised.value))


def test_suggestions_are_the_nearest_names_or_all() -> None:
    known = ("door-open", "door-close", "drawer-open", "reach", "shelf")
    assert envs.suggestion("dor-open", known).startswith("; did you mean door-open or ")
    assert "shelf" not in envs.suggestion("dor-open", known)
    assert envs.suggestion("12345", known) == "; known are door-close, door-open, drawer-open, reach, shelf."


SPACE = gymnasium.spaces.Box(np.array([-1, -2], np.float32), np.array([1, 3], np.float32))


@pytest.mark.parametrize(
    ("given", "expected"),
    [([0.5, -1.5], [0.5, -1.5]), ([-7, 7], [-1, 3]), ([7, -7], [1, -2]), (np.array([1, 3], np.float64), [1, 3])],
)
def test_actions_are_clipped_to_the_space(given: object, expected: list[float]) -> None:
    action = check_action(given, SPACE)  # type: ignore[arg-type]
    assert action.dtype == np.float32
    np.testing.assert_array_equal(action, np.float32(expected))


def test_a_checked_action_is_not_the_callers_array() -> None:
    given = np.array([-7, 7], np.float32)
    check_action(given, SPACE)[:] = 0
    np.testing.assert_array_equal(given, [-7, 7])


@pytest.mark.parametrize("given", [[0.0], [[0.0, 0.0]], 0.0, [0.0, 0.0, 0.0]])
def test_actions_of_another_shape_are_refused(given: object) -> None:
    with pytest.raises(ValueError, match=r"an action of shape \(.*\) was given where \(2,\) is needed"):
        check_action(given, SPACE)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_actions_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="is not finite; check the policy"):
        check_action([0.0, value], SPACE)


def test_configurations_travel_to_other_processes() -> None:
    config = envs.make({"name": "metaworld/door-open-v3", "horizon": 3}).config
    assert pickle.loads(pickle.dumps(config)) == config
