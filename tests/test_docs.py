"""The documentation tells the truth: its Python runs, and its tables are those of the published results."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # A real module, because a class looks up the one that it was defined in.
    module = types.ModuleType("__docs__")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for snippet in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(snippet, str(page), "exec", dont_inherit=True), module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_into_the_repository_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_table_of_the_readme_is_that_of_the_published_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    path, table = re.search(r"<!-- results: (\S+) -->\n(.*?)<!-- end of results -->", text, re.DOTALL).groups()  # type: ignore[union-attr]
    told = {
        cells[0]: cells[-1]
        for cells in ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:])
    }
    rows = json.loads((ROOT / path).read_text(encoding="utf-8"))["rows"]
    found = {
        f"`{row['method']}`": f"{row['mean']:.0%} ({row['low']:.0%} to {row['high']:.0%}, n = {row['n']})"
        for row in rows
    }
    assert told == found


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("**/*.md")), ids=lambda page: page.stem)
def test_the_tables_of_the_guide_are_those_of_the_published_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for kind, make in (("results", success_table), ("claims", claims_table)):
        for path, table in re.findall(rf"<!-- {kind}: (\S+) -->\n(.*?)<!-- end of {kind} -->", text, re.DOTALL):
            assert cells_of(table) == make(json.loads((ROOT / path).read_text(encoding="utf-8")))


def cells_of(table: str) -> list[list[str]]:
    """The cells of a table, without its rule below the heading."""
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    return [rows[0], *rows[2:]]


def success_table(results: dict[str, Any]) -> list[list[str]]:
    """A row for each method, a column for each task: success rates, or scores where there are none."""
    metrics = {row["metric"] for row in results["rows"]}
    metric, form = ("success rate", "{:.0%}") if "success rate" in metrics else ("score", "{:.0f}")
    rows = {(row["method"], row["task"]): row for row in results["rows"] if row["metric"] == metric}
    methods, tasks = (list(dict.fromkeys(key[place] for key in rows)) for place in (0, 1))
    return [
        ["method", *tasks],
        *(
            [
                f"`{method}`",
                *(
                    f"{form.format(row['mean'])} ({form.format(row['low'])} to {form.format(row['high'])})"
                    for row in (rows[method, t] for t in tasks)
                ),
            ]
            for method in methods
        ),
    ]


def claims_table(results: dict[str, Any]) -> list[list[str]]:
    """A row for each claim, with the figure's 95% interval."""
    return [
        ["", "claim", "paper", "ours", "verdict"],
        *(
            [
                claim["id"],
                claim["claim"],
                "" if claim["paper"] is None else f"{claim['paper']:.3g}",
                f"{claim['ours']:.2f} ({claim['low']:.2f} to {claim['high']:.2f})",
                claim["verdict"],
            ]
            for claim in results["claims"]
        ),
    ]
