"""The page is parsed again: what it says, that it needs nothing from outside, and that no text becomes markup."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from rich.console import Console

from robopref.evaluation import Comparison, Interval
from robopref.reports import (
    PALETTE,
    Histogram,
    LabelStatistics,
    MethodComparison,
    Report,
    Scatter,
    print_table,
    write_report,
)

HOSTILE = "<script>alert('x')</script>\"&' {{ 7 * 7 }} $\\foo$ [bold]b[/bold] \x00\n=cmd()"
VOID = {"meta", "img", "line", "circle", "br", "link", "input"}


class Page(HTMLParser):
    """Elements with their attributes, the text under each heading, and a check that every element is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def _results(method: str = "cpl") -> dict[str, Any]:
    def row(name: str, task: str, metric: str, mean: float, low: float, high: float, seeds: int = 4) -> dict[str, Any]:
        return dict(method=name, task=task, metric=metric, n=50 * seeds, seeds=seeds, mean=mean, low=low, high=high)

    def claim(text: str, paper: Any, ours: Any, low: Any, high: Any, verdict: str) -> dict[str, Any]:
        return dict(id=text[:3], claim=text, paper=paper, ours=ours, low=low, high=high, verdict=verdict)

    return {
        "manifest": {
            "command": "python -m experiments.cpl --preset smoke",
            "config": {"batch": 96},
            "seeds": [0, 1, 2, 3],
            "versions": {"jax": "0.10.2"},
            "data": "door-open",
            "device": "2 CPU cores",
            "wall_seconds": 4331.2,
            "commit": "3f9c2d1",
        },
        "rows": [
            row(method, "door-open", "success", 0.83, 0.77, 0.875),
            row("p-iql", "door-open", "success", 0.6, 0.53, 0.67),
            row(method, "door-open", "return", 1234.5, 1100.0, 1350.0),
            row("p-iql", "door-open", "return", -12.25, -20.0, -5.5),
            row("expert", "door-open", "return", 1400.0, -math.inf, math.inf, seeds=1),
        ],
        "claims": [
            dict(
                id="a", claim="CPL beats P-IQL in success", paper="yes", ours=0.23, low=0.1, high=0.4, verdict="holds"
            ),
            dict(id="b", claim="it is 1.6 times as fast", paper=1.62, ours=1.2, low=1.1, high=1.3, verdict="fails"),
            dict(
                id="c", claim="it needs fewer labels", paper=None, ours=None, low=None, high=None, verdict="undecided"
            ),
        ],
    }


def _report(method: str = "cpl", **changes: Any) -> Report:
    rng = np.random.default_rng(0)
    steps = np.arange(5) * 1000
    report = Report(
        title="Preferences on two tasks",
        summary="First paragraph.\n\nSecond paragraph.",
        results=_results(method),
        comparisons=[
            MethodComparison(method, "p-iql", "success", Comparison(0.23, 0.11, 0.35, 200, 4, "better"), "door-open"),
            MethodComparison(method, "p-iql", "return", Comparison(-3.0, -9.0, 4.0, 200, 4, "undecided", 1240)),
            MethodComparison("p-iql", method, "return", Comparison(-30.0, -39.0, -4.0, 200, 4, "worse")),
        ],
        curves={
            (method, "success"): (steps, rng.random((4, 5))),
            ("p-iql", "success"): (steps, rng.random((1, 5))),
            (method, "return"): (steps, [Interval(k, k - 1, k + 1, 20, 4) for k in range(5)]),
        },
        labels=LabelStatistics(
            {"queries": 2500, "labeler": "teacher", "agreement": Interval(0.85, 0.83, 0.87, 2000, 1)},
            [Histogram("partial return", "difference", {"first": rng.normal(size=80), "second": rng.normal(size=90)})],
        ),
        behaviours={"expert": Interval(0.99, 0.96, 1.0, 200, 1), "uniform": Interval(0.0, 0.0, 0.04, 1, 1)},
    )
    return dataclasses.replace(report, **changes)


def _page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_shows_every_estimate_with_interval_episodes_and_seeds(tmp_path: Path) -> None:
    page = _page(write_report(tmp_path, _report()))

    for text in (
        "83.0% 77.0% to 87.5% 200 episodes, 4 seeds",
        "1,234 1,100 to 1,350 200 episodes, 4 seeds",
        "−12.2 −20 to −5.5",
        "1,400 spread not known 50 episodes, 1 seed",
        "99.0% 96.0% to 100.0% 200 episodes",
        "85.0% 83.0% to 87.0%, n = 2,000",
    ):
        assert text in page.text


def test_the_page_shows_verdicts_in_words_and_what_would_decide(tmp_path: Path) -> None:
    page = _page(write_report(tmp_path, _report()))

    assert "cpl − p-iql +23.0 points +11.0 to +35.0 ✓ better 200 pairs, 4 seeds" in page.text
    assert "−3 −9 to +4 ? undecided about 1,240 more episodes would decide" in page.text
    assert "−30 −39 to −4 ✗ worse" in page.text
    assert "CPL beats P-IQL in success yes 23.0% 10.0% to 40.0% ✓ holds" in page.text
    assert "1.62 1.2 1.1 to 1.3 ✗ fails" in page.text
    assert "it needs fewer labels – – spread not known ? undecided" in page.text
    assert "✓ 1 holds ✗ 1 fails ? 1 undecided" in page.text


@pytest.mark.parametrize(
    ("comparison", "note"),
    [
        (Comparison(0.0, -0.1, 0.1, 200, 4, "undecided"), "no difference was seen"),
        (Comparison(0.2, -0.1, 0.5, 200, 4, "undecided"), "more episodes would not decide, only more seeds"),
    ],
)
def test_an_undecided_comparison_says_why(tmp_path: Path, comparison: Comparison, note: str) -> None:
    report = _report(comparisons=[MethodComparison("cpl", "p-iql", "success", comparison)])

    assert note in _page(write_report(tmp_path, report)).text


def test_counts_are_named_by_their_unit(tmp_path: Path) -> None:
    """A ranking accuracy is over pairs, a time over runs: neither counts episodes."""
    results = _results()
    results["rows"][0]["unit"] = "pair"
    undecided = Comparison(0.2, -0.1, 0.5, 200, 4, "undecided")
    comparison = MethodComparison("cpl", "p-iql", "success", undecided, unit="pair")
    report = _report(results=results, comparisons=[comparison])

    text = _page(write_report(tmp_path, report)).text

    assert "200 pairs" in text
    assert "more pairs would not decide, only more seeds" in text
    for units, heading in (((None, "pair"), "n"), (("pair", "pair"), "pairs"), ((None, None), "episodes")):
        rows = [
            {**row, **({} if unit is None else {"unit": unit})}
            for row, unit in zip(_results()["rows"], units, strict=False)
        ]
        console = Console(file=io.StringIO(), width=200)
        print_table({**_results(), "rows": rows}, console)
        header = console.file.getvalue().splitlines()[2]  # type: ignore[attr-defined]
        assert [cell.strip() for cell in header.strip("┃│ ").split("┃")][-2] == heading


def test_the_page_says_how_it_was_made(tmp_path: Path) -> None:
    page = _page(write_report(tmp_path, _report()))

    made = page.text[page.text.index("Enough to make it again") :]
    for text in (
        "command python -m experiments.cpl --preset smoke",
        "seeds 0, 1, 2, 3",
        "wall time 1 h 12 min",
        "commit 3f9c2d1",
        "device 2 CPU cores",
        '"jax": "0.10.2"',
        '"batch": 96',
    ):
        assert text in made


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    film = tmp_path / "source.mp4"
    film.write_bytes(b"not really a film")

    path = write_report(tmp_path / "report", _report(film=film))

    page, source = _page(path), path.read_text(encoding="utf-8")
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object"})
    assert re.search(r"url\(|@import|https?:|//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", source)) is None
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        if "src" in attributes:
            assert attributes["src"].startswith("data:")
        if "href" in attributes:
            assert attributes["href"].startswith("#")
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")
    (video,) = page.all("video")
    assert base64.b64decode(video["src"].partition("base64,")[2]) == b"not really a film"
    assert (tmp_path / "report" / "film.mp4").read_bytes() == b"not really a film"


def test_the_page_is_accessible(tmp_path: Path) -> None:
    path = write_report(tmp_path, _report())
    page, source = _page(path), path.read_text(encoding="utf-8")

    assert source.lstrip().startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert all(len(image["alt"]) > 20 for image in page.all("img"))
    assert len(page.all("img")) == 3
    assert all(picture.get("aria-hidden") == "true" for picture in page.all("svg"))
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    identities = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    links = {link["href"][1:] for link in page.all("a")}
    assert links == {section["id"] for section in page.all("section")}
    assert "prefers-color-scheme: dark" in source
    assert 'name="viewport"' in source


def test_a_picture_says_in_words_what_it_shows(tmp_path: Path) -> None:
    curves = {("cpl", "success"): (np.array([0, 10]), [Interval(0.1, 0, 0.2, 9, 3), Interval(0.5, 0.4, 0.6, 9, 3)])}

    page = _page(write_report(tmp_path, _report(curves=curves, labels=None)))

    (picture,) = page.all("img")
    assert "success" in picture["alt"]
    assert "cpl ends at 50.0% (40.0% to 60.0%)" in picture["alt"]


def test_curves_over_anything_but_steps_are_drawn_over_its_logarithm(tmp_path: Path) -> None:
    curves = {("cpl", "success"): (np.array([3, 300]), np.array([[0.1, 0.9], [0.2, 0.8]]))}

    pages = [
        _page(write_report(tmp_path / axis, _report(curves=curves, labels=None, curve_axis=axis)))
        for axis in ("steps", "preferences")
    ]

    steps, preferences = (page.all("img")[0] for page in pages)
    assert "over steps" in steps["alt"]
    assert "over preferences" in preferences["alt"]
    assert steps["src"] != preferences["src"]


def _scatter(**changes: Any) -> Scatter:
    scatter = Scatter("five policies", "distance", "return", np.arange(1, 6), np.array([2.0, 1.0, 4.0, 3.0, 5.0]))
    return dataclasses.replace(scatter, **changes)


def _with_scatters(*scatters: Scatter) -> Report:
    return _report(comparisons=[], curves={}, labels=None, behaviours={}, scatters=scatters)


def test_scatter_plots_follow_the_curves_and_have_their_own_file(tmp_path: Path) -> None:
    curves = {("cpl", "success"): (np.arange(2), np.ones((1, 2)))}
    report = dataclasses.replace(_with_scatters(_scatter(), _scatter(title="again")), curves=curves)

    page = _page(write_report(tmp_path, report))

    sections = [section["id"] for section in page.all("section")]
    assert sections == ["claims", "results", "film", "curves", "scatters", "made"]
    assert [link["href"][1:] for link in page.all("a")] == sections
    assert [image["alt"].partition(":")[0] for image in page.all("img")[1:]] == [
        "Scatter plot of return against distance, five policies",
        "Scatter plot of return against distance, again",
    ]
    with Image.open(tmp_path / "scatters.png") as picture:
        assert picture.width >= 2000


def test_a_scatter_plot_says_how_well_the_ranks_agree(tmp_path: Path) -> None:
    # The ranks differ by 1 in four of the five points: 1 - 6 * 4 / (5 * (5^2 - 1)).
    page = _page(write_report(tmp_path, _with_scatters(_scatter())))

    assert page.all("img")[0]["alt"].endswith(": n = 5, rank correlation +0.8.")
    assert "The rank correlation is Spearman's" in page.text


@pytest.mark.parametrize(
    "scatter",
    [_scatter(y=np.full(5, 7.0)), _scatter(x=np.ones(5)), _scatter(x=np.array([0.0, 1.0]), y=np.array([0.0, 1.0]))],
)
@pytest.mark.filterwarnings("error")
def test_ranks_that_say_nothing_are_not_correlated(tmp_path: Path, scatter: Scatter) -> None:
    page = _page(write_report(tmp_path, _with_scatters(scatter)))

    assert page.all("img")[0]["alt"].endswith(f": n = {len(scatter.x)}.")


def test_a_coloured_scatter_plot_names_its_values_and_marks(tmp_path: Path) -> None:
    scatter = _scatter(
        values=np.array([3, 1, -2, 5, 4]), values_label="margin", marks={"z*": (0.5, -1), "mean": (3, 3)}
    )

    page = _page(write_report(tmp_path, _with_scatters(scatter)))

    assert page.all("img")[0]["alt"].endswith(
        ": n = 5. Coloured by margin, −2 to 5. z* is at (0.5, −1). mean is at (3, 3)."
    )
    assert "rank correlation" not in page.text


def _drawn(picture: Image.Image) -> dict[Any, int]:
    """Every colour of the picture, and how many pixels have it."""
    return {colour: count for count, colour in picture.convert("RGB").getcolors(1 << 24) or ()}


@pytest.mark.parametrize("swapped", [False, True])
def test_dots_take_the_colours_of_their_values(tmp_path: Path, swapped: bool) -> None:
    ends = np.array([0.0, 1.0])
    values = ends[::-1] if swapped else ends
    write_report(tmp_path, _with_scatters(_scatter(x=ends, y=ends, values=values, values_label="return")))

    with Image.open(tmp_path / "scatters.png") as picture:
        left = _drawn(picture.crop((0, 0, picture.width // 3, picture.height)))
    low, high = (tuple(round(255 * part) for part in colormaps["viridis"](end)[:3]) for end in (0.0, 0.9))
    assert (low in left, high in left) == (not swapped, swapped)


def test_marks_are_drawn_over_the_dots(tmp_path: Path) -> None:
    """As many pixels have the colour of the mark over a thousand dots as over one."""
    counts = []
    for number in (1, 1000):
        scatter = _scatter(x=np.zeros(number), y=np.zeros(number), marks={"z*": (0.0, 0.0)})
        write_report(tmp_path, _with_scatters(scatter))
        with Image.open(tmp_path / "scatters.png") as picture:
            counts.append(_drawn(picture)[0xC8, 0x10, 0x2E])

    assert counts[0] == counts[1] > 100


def test_many_dots_stay_small(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 10_000))

    write_report(tmp_path, _with_scatters(_scatter(x=x, y=y, values=x, values_label="x")))

    assert (tmp_path / "scatters.png").stat().st_size < 400_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=np.arange(4)), "needs arrays [N] of one length, but their shapes are x (4,), y (5,)"),
        (dict(values=np.arange(6), values_label="v"), "shapes are x (5,), y (5,), values (6,)"),
        (dict(x=np.ones((5, 1)), y=np.ones((5, 1))), "shapes are x (5, 1), y (5, 1)"),
        (dict(x=np.zeros(0), y=np.zeros(0)), "has no points"),
        (dict(x=np.array([0, 1, np.nan, 3, np.inf])), "has 2 numbers in x not finite, the first at 2"),
        (dict(y=np.array([0, 1, 2, 3, -np.inf])), "has 1 number in y not finite, the first at 4"),
        (dict(values=np.full(5, np.nan), values_label="v"), "has 5 numbers in values not finite, the first at 0"),
        (dict(values=np.arange(5)), "has values, but no values_label"),
        (dict(marks={"z*": (0.0, math.nan)}), "has a mark 'z*' at (0.0, nan), which is not finite"),
    ],
)
def test_a_scatter_plot_that_cannot_be_drawn_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape("the scatter plot 'five policies' ") + ".*" + re.escape(message)):
        write_report(tmp_path, _with_scatters(_scatter(), _scatter(**changes)))
    assert not list(tmp_path.iterdir())


def test_the_files_behind_the_page_hold_the_same_numbers(tmp_path: Path) -> None:
    write_report(tmp_path, _report())

    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["method", "task", "metric", "n", "seeds", "mean", "low", "high"]
    assert len(table) == 5
    assert table[0] == dict(
        method="cpl", task="door-open", metric="success", n="200", seeds="4", mean="0.83", low="0.77", high="0.875"
    )
    assert (table[4]["low"], table[4]["high"]) == ("", "")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert results["rows"][:4] == _results()["rows"][:4]
    assert results["rows"][4]["low"] is None
    assert results["claims"] == _results()["claims"]
    for name in ("curves.png", "labels.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width >= 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.png",
        "labels.png",
        "report.html",
        "results.json",
        "table.csv",
    ]


def _circles(page: Page) -> list[tuple[float, str]]:
    return [(float(circle["cx"].rstrip("%")), circle["fill"]) for circle in page.all("circle")]


def test_bars_stand_where_the_numbers_are(tmp_path: Path) -> None:
    report = _report(comparisons=[], behaviours={}, curves={}, labels=None)

    page = _page(write_report(tmp_path, report))

    marks = {text.strip(): float(mark["x"].rstrip("%")) for mark, text in _marks(page)}
    (cpl, _), (piql, _) = _circles(page)[:2]
    scale = marks["100%"] - marks["0%"]
    assert cpl == pytest.approx(marks["0%"] + 0.83 * scale)
    assert piql == pytest.approx(marks["0%"] + 0.6 * scale)
    whisker = next(line for line in page.all("line") if line["class"] == "whisker")
    assert float(whisker["x1"].rstrip("%")) == pytest.approx(marks["0%"] + 0.77 * scale)
    assert float(whisker["x2"].rstrip("%")) == pytest.approx(marks["0%"] + 0.875 * scale)
    assert len([line for line in page.all("line") if line["class"] == "whisker"]) == 4, (
        "none where the spread is unknown"
    )


def _marks(page: Page) -> list[tuple[dict[str, str], str]]:
    """The labels of the first axis: position and text."""
    marks = page.all("text")[:5]
    start = next(index for index, text in enumerate(page.texts) if text.strip() == "0%")
    return list(zip(marks, [text for text in page.texts[start:] if text.strip()][:5], strict=True))


def test_a_method_keeps_its_colour_through_tables_and_plots(tmp_path: Path) -> None:
    steps = np.arange(20)
    # A line without a band, so that its own colour is in the picture.
    curves = {("p-iql", "loss"): (steps, np.linspace(0, 1, 20)[None])}

    page = _page(write_report(tmp_path, _report(curves=curves, labels=None, behaviours={})))

    colours = [colour for _, colour in _circles(page)]
    assert colours == [PALETTE[0], PALETTE[1], PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[0], PALETTE[0], PALETTE[1]]
    with Image.open(tmp_path / "curves.png") as picture:
        drawn = {colour[:3] for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert tuple(bytes.fromhex(PALETTE[1][1:])) in drawn
    assert tuple(bytes.fromhex(PALETTE[0][1:])) not in drawn


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    results = _results(HOSTILE)
    results["manifest"] = {key: HOSTILE for key in (*results["manifest"], HOSTILE)} | {"config": {HOSTILE: HOSTILE}}
    for row in results["rows"]:
        row["task"] = row["metric"] = HOSTILE
    for claim in results["claims"]:
        claim["claim"] = claim["paper"] = HOSTILE
    hostile = _report(
        HOSTILE,
        title=HOSTILE,
        summary=HOSTILE,
        results=results,
        film_note=HOSTILE,
        curves={(HOSTILE, HOSTILE): (np.arange(3), np.ones((2, 3)))},
        labels=LabelStatistics({HOSTILE: HOSTILE}, [Histogram(HOSTILE, HOSTILE, {HOSTILE: np.arange(9.0)})]),
        scatters=[
            _scatter(
                title=HOSTILE,
                x_label=HOSTILE,
                y_label=HOSTILE,
                values=np.arange(5),
                values_label=HOSTILE,
                marks={HOSTILE: (1.0, 1.0)},
            )
        ],
        behaviours={HOSTILE: Interval(0.5, 0.2, 0.8, 9, 1)},
    )

    path = write_report(tmp_path, hostile)

    page, tame = _page(path), _page(write_report(tmp_path / "tame", _report()))
    assert "script" not in {tag for tag, _ in page.elements}
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in tame.elements}
    assert page.text.count("<script>alert('x')</script>\"&' {{ 7 * 7 }}") > 10
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["method"] == HOSTILE


def test_numbers_may_be_numpys(tmp_path: Path) -> None:
    plain, results = _results(), _results()
    for entry in (*results["rows"], *results["claims"]):
        entry.update({key: np.float64(value) for key, value in entry.items() if isinstance(value, float)})
        entry.update({key: np.int64(value) for key, value in entry.items() if type(value) is int})
    results["manifest"]["config"] = {"batch": np.int32(96)}

    ours = write_report(tmp_path / "numpy", _report(results=results)).read_bytes()

    assert ours == write_report(tmp_path / "plain", _report(results=plain)).read_bytes()


def test_lone_surrogates_do_not_stop_the_page(tmp_path: Path) -> None:
    assert write_report(tmp_path, _report(title="\udce9t\udce9")).is_file()


def test_a_report_of_results_alone_leaves_the_rest_out(tmp_path: Path) -> None:
    results = {"manifest": {}, "rows": [], "claims": []}

    page = _page(write_report(tmp_path, Report("Nothing yet", "", results, film_note="No display was found.")))

    assert [section["id"] for section in page.all("section")] == ["film", "made"]
    assert "No display was found." in page.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json", "table.csv"]


def test_a_film_that_lies_in_the_folder_already_stays(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"film")

    write_report(tmp_path, _report(film=tmp_path / "film.mp4"))

    assert (tmp_path / "film.mp4").read_bytes() == b"film"


def test_a_missing_film_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.mp4"):
        write_report(tmp_path, _report(film=tmp_path / "gone.mp4"))


def test_writing_again_gives_the_same_page(tmp_path: Path) -> None:
    first = write_report(tmp_path, _report()).read_bytes()

    assert write_report(tmp_path, _report()).read_bytes() == first


def _without(results: dict[str, Any], part: str, key: str | None = None) -> Mapping[str, Any]:
    if key is None:
        return {name: value for name, value in results.items() if name != part}
    entries = [dict(entry) for entry in results[part]]
    del entries[1][key]
    return results | {part: entries}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (_without(_results(), "rows"), "no 'rows'"),
        (_without(_results(), "rows", "low"), "entry 1 of the results' rows has no 'low'"),
        (_without(_results(), "claims", "verdict"), "entry 1 of the results' claims has no 'verdict'"),
        (_results() | {"claims": [_results()["claims"][0] | {"verdict": "sure"}]}, "'sure'"),
    ],
)
def test_results_that_lack_a_part_are_refused(tmp_path: Path, results: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(tmp_path, _report(results=results))
    with pytest.raises(ValueError, match=re.escape(message)):
        print_table(results, Console(file=io.StringIO()))


def test_a_curve_with_the_wrong_number_of_values_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="curve of cpl, loss has 3 steps but 2 values"):
        write_report(tmp_path, _report(curves={("cpl", "loss"): (np.arange(3), np.ones((4, 2)))}))


def test_the_band_of_a_curve_is_students_interval_over_seeds(tmp_path: Path) -> None:
    values = np.array([[0.2], [0.4], [0.6]])

    page = _page(write_report(tmp_path, _report(curves={("cpl", "loss"): (np.array([1]), values)}, labels=None)))

    half = 4.302652729911275 * 0.2 / math.sqrt(3)
    low, high = (f"{end:.3g}".replace("-", "−") for end in (0.4 - half, 0.4 + half))
    assert f"cpl ends at 0.4 ({low} to {high})" in page.all("img")[0]["alt"]


def test_the_terminal_shows_the_same_numbers() -> None:
    console = Console(file=io.StringIO(), width=200)

    print_table(_results(), console, _report().comparisons)

    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert lines[0] == "door-open, 95% intervals"
    assert "cpl success 83.0% 77.0% to 87.5% 200 4" in lines
    assert "expert return 1,400 spread not known 50 1" in lines
    assert (
        "✓ better cpl against p-iql, success on door-open: +23.0 points (+11.0 to +35.0; 200 pairs, 4 seeds)" in lines
    )
    assert any(line.startswith("? undecided cpl against p-iql, return: −3") and "1,240" in line for line in lines)
    assert "✗ fails it is 1.6 times as fast. Paper: 1.62. Ours: 1.2 (1.1 to 1.3)." in lines


def test_the_terminal_takes_no_text_for_markup() -> None:
    console = Console(file=io.StringIO(), width=400)

    print_table(_results("[bold]b[/bold] [/]"), console, [])

    assert "[bold]b[/bold] [/]" in console.file.getvalue()  # type: ignore[attr-defined]
