"""What a check found, and how it is shown; only the standard library is imported with this module."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TextIO


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: what was looked at.
        ok: nothing is wrong or missing.
        message: one sentence about what was found.
        remedy: what to do about it; empty where nothing need be done.
        required: a failure makes the whole fail; otherwise it is only worth knowing.
    """

    name: str
    ok: bool
    message: str
    remedy: str = ""
    required: bool = True

    @property
    def fatal(self) -> bool:
        """Whether the whole fails because of this."""
        return self.required and not self.ok


def show_checks(checks: Iterable[Check], out: TextIO) -> bool:
    """Lists checks as they come in, for people to read; returns whether none is fatal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=out, highlight=False)
    good = True
    for check in checks:
        mark, style = ("✓", "green") if check.ok else ("✗", "bold red") if check.required else ("–", "yellow")
        # Left to the terminal to wrap, so that a command can be copied from the list in one piece.
        console.print(Text.assemble((mark, style), " ", (f"{check.name:<22}", "bold"), check.message), soft_wrap=True)
        if check.remedy:
            console.print(Text(f"  → {check.remedy}", style="cyan"), soft_wrap=True)
        good &= not check.fatal
    return good


def checks_as_json(checks: Iterable[Check]) -> str:
    """The same as JSON: `{"ok": bool, "checks": [...]}`."""
    found = list(checks)
    everything = {"ok": not any(check.fatal for check in found), "checks": [asdict(check) for check in found]}
    return json.dumps(everything, indent=2, ensure_ascii=False)
