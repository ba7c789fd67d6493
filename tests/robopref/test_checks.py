from __future__ import annotations

import dataclasses
import io
import json

import pytest

from robopref import checks
from robopref.checks import Check

CHECKS = (
    Check("good", True, "All is well [really]."),
    Check("optional", False, "Missing.", "pip install it", required=False),
)
BAD = Check("bad", False, "Broken.", "Repair it.")


@pytest.mark.parametrize(("found", "good"), [(CHECKS, True), ((*CHECKS, BAD), False)])
def test_only_what_is_required_makes_the_whole_fail(found: tuple[Check, ...], good: bool) -> None:
    assert checks.show_checks(found, io.StringIO()) == good
    assert json.loads(checks.checks_as_json(found))["ok"] == good


def test_the_list_has_a_mark_a_sentence_and_what_to_do() -> None:
    out = io.StringIO()
    checks.show_checks((*CHECKS, BAD), out)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines == [
        ["✓", "good", "All", "is", "well", "[really]."],
        ["–", "optional", "Missing."],
        ["→", "pip", "install", "it"],
        ["✗", "bad", "Broken."],
        ["→", "Repair", "it."],
    ]


def test_a_command_to_copy_stays_on_one_line() -> None:
    out = io.StringIO()
    checks.show_checks([Check("long", False, "m" * 300, "r" * 300)], out)
    assert len(out.getvalue().splitlines()) == 2


def test_json_holds_every_field() -> None:
    assert json.loads(checks.checks_as_json([BAD])) == {"ok": False, "checks": [dataclasses.asdict(BAD)]}
