"""A finished run of an experiment, for the tests of all of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from robopref.files import read_json


class Run(NamedTuple):
    """What a run was asked for, where it is, its exit status and what it printed."""

    args: Any
    folder: Path
    status: int
    said: str

    @property
    def results(self) -> Any:
        return json.loads((self.folder / "report" / "results.json").read_text())

    def value(self, job: str) -> Any:
        return read_json(self.folder / job / "result.json")["value"]


def run_to_the_end(main: Callable[..., int], args: Any) -> Run:
    said = io.StringIO()
    status = main(args, Console(file=said, width=250))
    return Run(args, args.folder, status, said.getvalue())
