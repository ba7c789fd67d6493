"""What a run found, as one self-contained HTML page with the files behind it, and as a table for the terminal.

The page needs no network and no scripts: pictures and the film are inside it. Beside it lie `table.csv`,
`results.json`, `curves.png`, `scatters.png`, `labels.png` and `film.mp4`, as far as the report has them. Every method
keeps its colour through all plots and tables, and no estimate appears without its interval, its episodes and its seeds.
The rank correlation of a scatter plot describes the dots that are drawn and estimates nothing beyond them.
"""

from __future__ import annotations

import base64
import csv
import functools
import io
import json
import math
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import jinja2
import numpy as np
from jaxtyping import Float, Shaped
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import stats

from robopref.evaluation import Comparison, Interval
from robopref.files import atomic_write, write_json

Curve: TypeAlias = tuple[Shaped[np.ndarray, " P"], Float[np.ndarray, "seeds P"] | Sequence[Interval]]
"""Steps, and what was measured there: one row per training seed, or one interval per step."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Okabe and Ito's colours, without the two that vanish on a white or on a dark page."""

_GROUP_COLOURS = ("#3D4F66", "#C2A14D", "#8FA3B8", "#7A5C61")
_QUIET = "#4A525C"
_MARK_SHAPES = "*DXP^vs"
_MARK_COLOURS = ("#C8102E", "#16191D")
_ROW_KEYS = ("method", "task", "metric", "n", "seeds", "mean", "low", "high")
_CLAIM_KEYS = ("id", "claim", "paper", "ours", "low", "high", "verdict")
_SHARE_WORDS = frozenset({"success", "successes", "accuracy", "agreement", "share", "fraction", "probability"})
_VERDICT_STYLES = {"holds": "good", "better": "good", "fails": "bad", "worse": "bad", "undecided": "open"}
_VERDICT_MARKS = {"good": "✓", "bad": "✗", "open": "?"}
_TERMINAL_STYLES = {"good": "green", "bad": "red", "open": "yellow"}
_UNKNOWN = "–"


@dataclass(frozen=True)
class MethodComparison:
    """Who was compared with whom, on what, and how it came out; `unit` is what the comparison counts."""

    ours: str
    theirs: str
    metric: str
    result: Comparison
    task: str = ""
    unit: str = "episode"


@dataclass(frozen=True)
class Histogram:
    """Values of several groups of labels, such as the difference in partial return by which segment was preferred."""

    title: str
    x_label: str
    groups: Mapping[str, Shaped[np.ndarray, " N"]]


@dataclass(frozen=True)
class Scatter:
    """A dot for each of N measurements, such as the return of policies against their distance from the best one.

    Attributes:
        title: what the dots are.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.
        x: places of the dots along the horizontal axis.
        y: places along the vertical axis.
        values: colour the dots. The axes then only place them, as those of an embedding do; without values, the plot
            is about y against x, and Spearman's rank correlation of the two is given.
        values_label: name of what the colours show.
        marks: points drawn over the dots, by the name that they have in the legend.
    """

    title: str
    x_label: str
    y_label: str
    x: Shaped[np.ndarray, " N"]
    y: Shaped[np.ndarray, " N"]
    values: Shaped[np.ndarray, " N"] | None = None
    values_label: str = ""
    marks: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelStatistics:
    """What is known about the labels: facts by name, and histograms."""

    facts: Mapping[str, str | float | Interval]
    histograms: Sequence[Histogram] = ()


@dataclass(frozen=True)
class Report:
    """Everything that a report shows. What is empty is left out of the page, but a missing film is explained.

    Attributes:
        title: heading of the page.
        summary: what was found, in a few sentences; a blank line begins a new paragraph.
        results: `{"manifest": {...}, "rows": [...], "claims": [...]}` as under `experiments/results/`. A row's `n`
            counts episodes, or what its `unit` says, in the singular.
        comparisons: between methods, in the order to show them.
        curves: `(method, metric)` to a learning curve; one plot per metric.
        curve_axis: what the curves are over; all but steps are drawn on a logarithmic axis.
        scatters: scatter plots of what was learned, in the order to show them.
        labels: statistics of the labels, if any were given.
        behaviours: name of a behaviour in the data to the success rate of its episodes.
        film: an MP4 file, or None.
        film_note: what the film shows, or why there is none.
    """

    title: str
    summary: str
    results: Mapping[str, Any]
    comparisons: Sequence[MethodComparison] = ()
    curves: Mapping[tuple[str, str], Curve] = field(default_factory=dict)
    curve_axis: str = "steps"
    scatters: Sequence[Scatter] = ()
    labels: LabelStatistics | None = None
    behaviours: Mapping[str, Interval] = field(default_factory=dict)
    film: Path | None = None
    film_note: str = "No film was made."


def write_report(folder: str | os.PathLike[str], report: Report) -> Path:
    """Writes the page and the files behind it into `folder`, and returns the path of the page, `report.html`.

    Raises:
        ValueError: the results lack a part, an unknown verdict is among them, or a curve or a scatter plot cannot be
            drawn from its numbers.
        FileNotFoundError: the film is not there.
    """
    check_results(report.results)
    report = replace(report, results=_plain_json(report.results))
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    plots = {"curves": _curve_panels(report), "scatters": _scatter_panels(report), "labels": _label_panels(report)}
    film = None
    if report.film is not None:
        film = place / "film.mp4"
        _copy(report.film, film)
    write_json(place / "results.json", report.results)
    with atomic_write(place / "table.csv") as temporary:
        temporary.write_text(_table_csv(report.results["rows"]), encoding="utf-8")
    for name, panels in plots.items():
        if panels:
            with atomic_write(place / f"{name}.png") as temporary:
                temporary.write_bytes(_sheet(panels))
    page = _template().render(
        report=report,
        paragraphs=[part for part in report.summary.split("\n\n") if part.strip()],
        tallies=_tallies(report),
        claims=[_claim(claim) for claim in report.results["claims"]],
        from_paper=any(claim["paper"] is not None for claim in report.results["claims"]),
        results=_result_blocks(report),
        comparisons=_comparison_blocks(report),
        single_seed=any(row["seeds"] == 1 for row in report.results["rows"]),
        film=None if film is None else _data_uri("video/mp4", film.read_bytes()),
        **{name: _pictures(panels) for name, panels in plots.items()},
        facts=_facts(report.labels),
        behaviours=_behaviour_block(report),
        manifest=_manifest(report.results["manifest"]),
    )
    target = place / "report.html"
    with atomic_write(target) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return target


def print_table(results: Mapping[str, Any], console: Console, comparisons: Sequence[MethodComparison] = ()) -> None:
    """Prints the results, the comparisons and the claims, each with its interval and what follows from it."""
    check_results(results)
    results = _plain_json(results)
    console.print(_result_table(results["rows"]))
    for comparison in comparisons:
        view = _comparison_line(comparison, _Axis(0, 1, ()), PALETTE[0])
        about = f"{comparison.metric} on {comparison.task}" if comparison.task else comparison.metric
        note = f"; {view.note}" if view.note else ""
        _print_verdict(
            console,
            comparison.result.verdict,
            f"{comparison.ours} against {comparison.theirs}, {about}: {view.value}"
            f" ({view.interval}; {', '.join(view.count)}){note}",
        )
    for claim in results["claims"]:
        told = _claim(claim)
        paper = "" if claim["paper"] is None else f" Paper: {told.paper}."
        _print_verdict(console, claim["verdict"], f"{told.text}.{paper} Ours: {told.ours} ({told.interval}).")


def _result_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a table; what is the same in all of them stands in its title."""
    constant = {key: rows[0][key] for key in ("task", "metric") if rows and len({row[key] for row in rows}) == 1}
    title = ", ".join((*map(str, constant.values()), "95% intervals"))
    table = Table(title=Text(title), title_justify="left")
    naming = [key for key in ("task", "method", "metric") if key not in constant]
    for heading in naming:
        table.add_column(heading)
    units = {_unit(row) for row in rows}
    for heading in ("mean", "interval", f"{units.pop()}s" if len(units) == 1 else "n", "seeds"):
        table.add_column(heading, justify="right")
    for row in rows:
        share = _is_share(row["metric"], (row["mean"], row["low"], row["high"]))
        numbers = (_number(row["mean"], share), _range(row["low"], row["high"], share), row["n"], row["seeds"])
        table.add_row(*(Text(str(cell)) for cell in (*(row[key] for key in naming), *numbers)))
    return table


def _print_verdict(console: Console, verdict: str, text: str) -> None:
    console.print(Text("  ").append_text(_terminal_badge(verdict)).append(f"  {text}"), soft_wrap=True)


def check_results(results: Mapping[str, Any]) -> None:
    """Refuses results that lack a part.

    Raises:
        ValueError: says which part is missing, and where.
    """
    for part in ("manifest", "rows", "claims"):
        if part not in results:
            raise ValueError(f"the results have no {part!r}")
    for part, keys in (("rows", _ROW_KEYS), ("claims", _CLAIM_KEYS)):
        for index, entry in enumerate(results[part]):
            if missing := [key for key in keys if key not in entry]:
                raise ValueError(f"entry {index} of the results' {part} has no {missing[0]!r}")
    for index, claim in enumerate(results["claims"]):
        if claim["verdict"] not in ("holds", "fails", "undecided"):
            raise ValueError(f"claim {index} has the verdict {claim['verdict']!r}, not holds, fails or undecided")


@dataclass(frozen=True)
class _Axis:
    """The common axis of the bars of a table; positions on it are percent of its width."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def position(self, value: float) -> float:
        return 4 + 92 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class _Line:
    """One line of a table of estimates, as the page shows it. Positions are None where there is nothing to draw."""

    name: str
    colour: str
    value: str
    interval: str
    count: tuple[str, ...]
    dot: float | None
    whisker: tuple[float, float] | None
    verdict: str = ""
    style: str = ""
    mark: str = ""
    note: str = ""


@dataclass(frozen=True)
class _Block:
    """Lines on one axis under one heading."""

    heading: str
    ticks: tuple[tuple[float, str], ...]
    zero: float | None
    lines: tuple[_Line, ...]


@dataclass(frozen=True)
class _Claim:
    text: str
    paper: str
    ours: str
    interval: str
    verdict: str
    style: str
    mark: str


@dataclass(frozen=True)
class _Panel:
    """One plot, and what it shows in words."""

    draw: Callable[[Axes], None]
    description: str


def _methods(report: Report) -> list[str]:
    """All methods, in the order in which they first appear."""
    names = [row["method"] for row in report.results["rows"]]
    names += [name for comparison in report.comparisons for name in (comparison.ours, comparison.theirs)]
    names += [method for method, _ in report.curves]
    return list(dict.fromkeys(map(str, names)))


def _colours(report: Report) -> dict[str, str]:
    return {method: PALETTE[index % len(PALETTE)] for index, method in enumerate(_methods(report))}


def _is_share(metric: str, values: Iterable[float | None]) -> bool:
    """Whether the metric is a share of a whole, to be shown in percent."""
    named = not _SHARE_WORDS.isdisjoint(re.findall("[a-z]+", metric.lower()))
    return named and all(-1 <= value <= 1 for value in values if _known(value))


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _number(value: float | None, share: bool, signed: bool = False) -> str:
    if not _known(value):
        return _UNKNOWN
    plus = "+" if signed else ""
    if share:
        text = format(100 * value, f"{plus}.1f") + ("" if signed else "%")
    elif abs(value) >= 1000:
        text = format(value, f"{plus},.0f")
    else:
        text = format(value, f"{plus}.3g")
    return text.replace("-", "−")


def _range(low: float | None, high: float | None, share: bool, signed: bool = False) -> str:
    if not _known(low) and not _known(high):
        return "spread not known"
    return f"{_number(low, share, signed)} to {_number(high, share, signed)}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _axis(values: Iterable[float | None], share: bool) -> _Axis:
    """An axis for estimates: 0 to 100% for shares, otherwise as wide as the values and a little more."""
    if share:
        return _ticked(0.0, 1.0, lambda tick: f"{100 * tick:.4g}%")
    return _fitted(values, lambda tick: f"{tick:,.6g}")


def _difference_axis(values: Iterable[float | None], share: bool) -> _Axis:
    """An axis for differences, with zero on it."""
    return _fitted((*values, 0.0), lambda tick: f"{100 * tick if share else tick:+,.6g}" if tick else "0")


def _fitted(values: Iterable[float | None], label: Callable[[float], str]) -> _Axis:
    known = [float(value) for value in values if _known(value)] or [0.0]
    low, high = min(known), max(known)
    margin = 0.06 * (high - low) or 0.5
    return _ticked(low - margin, high + margin, label)


def _ticked(low: float, high: float, label: Callable[[float], str]) -> _Axis:
    ticks = [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    bare = _Axis(low, high, ())
    return _Axis(low, high, tuple((bare.position(tick), label(tick).replace("-", "−")) for tick in ticks))


def _line(name: str, colour: str, estimate: Interval, axis: _Axis, share: bool, count: tuple[str, ...]) -> _Line:
    ends = (estimate.low, estimate.high)
    return _Line(
        name=name,
        colour=colour,
        value=_number(estimate.mean, share),
        interval=_range(*ends, share),
        count=count,
        dot=axis.position(estimate.mean) if _known(estimate.mean) else None,
        whisker=(axis.position(ends[0]), axis.position(ends[1])) if all(map(_known, ends)) else None,
    )


def _interval(row: Mapping[str, Any]) -> Interval:
    mean, low, high = (math.nan if row[key] is None else float(row[key]) for key in ("mean", "low", "high"))
    return Interval(mean, low, high, row["n"], row["seeds"])


def _result_blocks(report: Report) -> list[_Block]:
    """One block per metric and task, in the order of the rows."""
    colours = _colours(report)
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in report.results["rows"]:
        groups.setdefault((str(row["metric"]), str(row["task"])), []).append(row)
    blocks = []
    for (metric, task), rows in groups.items():
        values = [row[key] for row in rows for key in ("mean", "low", "high")]
        share = _is_share(metric, values)
        axis = _axis(values, share)
        lines = tuple(
            _line(
                str(row["method"]),
                colours[str(row["method"])],
                _interval(row),
                axis,
                share,
                (_count(row["n"], _unit(row)), _count(row["seeds"], "seed")),
            )
            for row in rows
        )
        blocks.append(_Block(f"{metric} · {task}" if task else metric, axis.ticks, None, lines))
    return blocks


def _comparison_blocks(report: Report) -> list[_Block]:
    """One block per metric and task; differences of shares have the same axis for all tasks."""
    colours = _colours(report)
    groups: dict[tuple[str, str], list[MethodComparison]] = {}
    for comparison in report.comparisons:
        groups.setdefault((comparison.metric, comparison.task), []).append(comparison)
    blocks = []
    for (metric, task), members in groups.items():
        alike = [each.result for each in report.comparisons if each.metric == metric]
        share = _is_share(metric, [value for result in alike for value in _numbers(result)])
        shown = alike if share else [member.result for member in members]
        axis = _difference_axis([value for result in shown for value in _numbers(result)], share)
        lines = tuple(_comparison_line(member, axis, colours[member.ours]) for member in members)
        heading = f"{metric} · {task}" if task else metric
        blocks.append(_Block(f"difference in {heading}", axis.ticks, axis.position(0.0), lines))
    return blocks


def _numbers(result: Comparison) -> tuple[float, float, float]:
    return result.difference, result.low, result.high


def _comparison_line(comparison: MethodComparison, axis: _Axis, colour: str) -> _Line:
    result = comparison.result
    share = _is_share(comparison.metric, _numbers(result))
    known = _known(result.low) and _known(result.high)
    style = _VERDICT_STYLES[result.verdict]
    return _Line(
        name=f"{comparison.ours} − {comparison.theirs}",
        colour=colour,
        value=_number(result.difference, share, signed=True) + (" points" if share else ""),
        interval=_range(result.low, result.high, share, signed=True),
        count=(_count(result.n, "pair"), _count(result.seeds, "seed")),
        dot=axis.position(result.difference),
        whisker=(axis.position(result.low), axis.position(result.high)) if known else None,
        verdict=result.verdict,
        style=style,
        mark=_VERDICT_MARKS[style],
        note=_what_would_decide(result, comparison.unit),
    )


def _what_would_decide(result: Comparison, unit: str) -> str:
    if result.verdict != "undecided":
        return ""
    if result.episodes_needed:
        return f"about {result.episodes_needed:,} more {unit}s would decide, if this difference is real"
    if result.difference == 0:
        return "no difference was seen"
    return f"more {unit}s would not decide, only more seeds" if result.seeds > 1 else ""


def _unit(row: Mapping[str, Any]) -> str:
    """What `n` of a row counts."""
    return str(row.get("unit", "episode"))


def _claim(claim: Mapping[str, Any]) -> _Claim:
    numbers = [claim[key] for key in ("ours", "low", "high")]
    numeric = [value for value in numbers if isinstance(value, int | float)]
    share = _is_share(claim["claim"], numeric)
    ours = claim["ours"]
    style = _VERDICT_STYLES[claim["verdict"]]
    return _Claim(
        text=str(claim["claim"]),
        paper=_UNKNOWN if claim["paper"] is None else _fact(claim["paper"], share),
        ours=_number(ours, share) if ours is None or isinstance(ours, int | float) else str(ours),
        interval=_range(claim["low"], claim["high"], share),
        verdict=str(claim["verdict"]),
        style=style,
        mark=_VERDICT_MARKS[style],
    )


def _tallies(report: Report) -> list[tuple[str, str, str]]:
    """How many claims came out how: style, mark and text."""
    verdicts = [claim["verdict"] for claim in report.results["claims"]]
    words = {"holds": "holds|hold", "fails": "fails|fail", "undecided": "undecided|undecided"}
    tallies = []
    for verdict, forms in words.items():
        if number := verdicts.count(verdict):
            style = _VERDICT_STYLES[verdict]
            tallies.append((style, _VERDICT_MARKS[style], f"{number} {forms.split('|')[number > 1]}"))
    return tallies


def _behaviour_block(report: Report) -> _Block | None:
    if not report.behaviours:
        return None
    axis = _axis((), share=True)
    lines = tuple(
        _line(name, "", rate, axis, True, (_count(rate.n, "episode"),)) for name, rate in report.behaviours.items()
    )
    return _Block("success rate", axis.ticks, None, lines)


def _facts(labels: LabelStatistics | None) -> list[tuple[str, str, str]]:
    """Name, value and interval (or nothing) of each fact about the labels."""
    facts = []
    for name, value in ({} if labels is None else labels.facts).items():
        if isinstance(value, Interval):
            share = _is_share(name, (value.mean, value.low, value.high))
            facts.append((name, _number(value.mean, share), f"{_range(value.low, value.high, share)}, n = {value.n:,}"))
        else:
            facts.append((name, _fact(value, isinstance(value, float) and _is_share(name, (value,))), ""))
    return facts


def _fact(value: object, share: bool = False) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) and not share else _number(value, share)


def _manifest(manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, text and kind (`code`, `details` or `text`) of every entry, the command first."""
    durations = {"wall_seconds": "wall time", "job_seconds": "time of all jobs"}
    entries = []
    for key in sorted(manifest, key=lambda key: key != "command"):
        value = manifest[key]
        if key in durations and isinstance(value, int | float):
            text, kind = _duration(value), "text"
        elif isinstance(value, Mapping):
            text, kind = json.dumps(value, indent=2, ensure_ascii=False), "details"
        elif isinstance(value, list | tuple):
            text, kind = (" " if key == "command" else ", ").join(map(str, value)), "text"
        else:
            text, kind = str(value), "text"
        entries.append((durations.get(key, key), text, "code" if key in ("command", "commit") else kind))
    return entries


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _terminal_badge(verdict: str) -> Text:
    style = _VERDICT_STYLES[verdict]
    return Text(f"{_VERDICT_MARKS[style]} {verdict:<9}", style=_TERMINAL_STYLES[style])


def _curve_panels(report: Report) -> list[_Panel]:
    colours = _colours(report)
    metrics: dict[str, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]] = {}
    for (method, metric), (steps, values) in report.curves.items():
        metrics.setdefault(metric, {})[method] = (np.asarray(steps), *_band(values, f"{method}, {metric}", len(steps)))
    panels = []
    for metric, lines in metrics.items():
        share = _is_share(metric, (float(mean) for _, means, _, _ in lines.values() for mean in means))
        ends = "; ".join(
            f"{method} ends at {_number(mean[-1], share)} ({_range(low[-1], high[-1], share)})"
            for method, (_, mean, low, high) in lines.items()
        )
        draw = functools.partial(
            _draw_curves, metric=metric, lines=lines, colours=colours, share=share, x_label=report.curve_axis
        )
        panels.append(_Panel(draw, f"Curves of {metric} over {report.curve_axis} with 95% bands: {ends}."))
    return panels


def _band(
    values: Float[np.ndarray, "seeds P"] | Sequence[Interval], name: str, points: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and both ends of Student's 95% interval over seeds at each step; one seed has no band."""
    if len(values) and isinstance(values[0], Interval):
        mean, low, high = np.array([(point.mean, point.low, point.high) for point in values], dtype=float).T
    else:
        table = np.atleast_2d(np.asarray(values, dtype=float))
        mean, seeds = table.mean(axis=0), len(table)
        half = np.full_like(mean, np.nan)
        if seeds > 1:
            half = stats.t.ppf(0.975, seeds - 1) * table.std(axis=0, ddof=1) / math.sqrt(seeds)
        low, high = mean - half, mean + half
    if len(mean) != points or points == 0:
        raise ValueError(f"the curve of {name} has {points} steps but {len(mean)} values")
    return mean, low, high


def _draw_curves(
    axes: Axes,
    *,
    metric: str,
    lines: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    colours: Mapping[str, str],
    share: bool,
    x_label: str,
) -> None:
    for method, (steps, mean, low, high) in lines.items():
        if share:
            low, high = np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0)
        axes.fill_between(steps, low, high, color=colours[method], alpha=0.16, linewidth=0)
        axes.plot(steps, mean, color=colours[method], linewidth=2, solid_capstyle="round")
        if len(steps) == 1:
            axes.plot(steps, mean, "o", color=colours[method])
    if share:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if x_label == "steps":
        axes.xaxis.set_major_locator(MaxNLocator(5))
    else:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(x_label)
    axes.grid(axis="y", color="#E3E6EA", linewidth=0.8)
    # Labels stand beside the last points, and the highest of them reaches above the axes.
    axes.set_title(textwrap.fill(_plain(metric), 52), loc="left", pad=10)
    bottom, top = axes.get_ylim()
    finals = {method: (line[1][-1] - bottom) / (top - bottom) for method, line in lines.items()}
    names = {method: textwrap.fill(_plain(method, 46), 24) for method in lines}
    gap = 0.15 if any("\n" in name for name in names.values()) else 0.085
    for method, height in _spread_apart({m: h for m, h in finals.items() if math.isfinite(h)}, gap).items():
        axes.text(
            1.02,
            height,
            names[method],
            color=colours[method],
            transform=axes.transAxes,
            va="center",
            fontweight="bold",
        )


def _spread_apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """The heights, moved up as little as needed to lie `gap` apart, then down again if that leaves the axes."""
    placed: dict[str, float] = {}
    lowest = -math.inf
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        lowest = placed[name] = max(height, lowest + gap)
    ceiling = max(1.0, gap * (len(placed) - 1))
    for name in reversed(list(placed)):
        placed[name] = min(placed[name], ceiling)
        ceiling = placed[name] - gap
    return placed


def _scatter_panels(report: Report) -> list[_Panel]:
    panels = []
    for scatter in report.scatters:
        scatter = _checked(scatter)
        told = f"n = {len(scatter.x):,}"
        if scatter.values is None and (correlation := _rank_correlation(scatter.x, scatter.y)) is not None:
            told += f", rank correlation {_number(correlation, False, signed=True)}"
        description = f"Scatter plot of {scatter.y_label} against {scatter.x_label}, {scatter.title}: {told}."
        if scatter.values is not None:
            ends = _range(float(scatter.values.min()), float(scatter.values.max()), False)
            description += f" Coloured by {scatter.values_label}, {ends}."
        for name, place in scatter.marks.items():
            description += f" {name} is at ({', '.join(_number(value, False) for value in place)})."
        panels.append(_Panel(functools.partial(_draw_scatter, scatter=scatter, told=told), description))
    return panels


def _checked(scatter: Scatter) -> Scatter:
    """The scatter plot with its numbers as floats, or an error that says why it cannot be drawn."""
    plot = f"the scatter plot {scatter.title!r}"
    arrays = {"x": np.asarray(scatter.x, dtype=float), "y": np.asarray(scatter.y, dtype=float)}
    if scatter.values is not None:
        if not scatter.values_label:
            raise ValueError(f"{plot} has values, but no values_label to say what they are")
        arrays["values"] = np.asarray(scatter.values, dtype=float)
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or len(shapes["x"]) != 1:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{plot} needs arrays [N] of one length, but their shapes are {told}")
    if not arrays["x"].size:
        raise ValueError(f"{plot} has no points")
    for name, array in arrays.items():
        if len(bad := np.flatnonzero(~np.isfinite(array))):
            raise ValueError(f"{plot} has {_count(len(bad), 'number')} in {name} not finite, the first at {bad[0]}")
    for name, place in scatter.marks.items():
        if not all(map(math.isfinite, place)):
            raise ValueError(f"{plot} has a mark {name!r} at {tuple(map(float, place))}, which is not finite")
    return replace(scatter, x=arrays["x"], y=arrays["y"], values=arrays.get("values"))


def _rank_correlation(x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]) -> float | None:
    """Spearman's, or None where two points or an axis on which nothing varies would make it say nothing."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(stats.spearmanr(x, y).statistic)


def _draw_scatter(axes: Axes, *, scatter: Scatter, told: str) -> None:
    # Many dots are smaller, and fainter where no colour has to be read, so that a cloud shows where it is densest.
    crowd = min(1.0, math.sqrt(100 / len(scatter.x)))
    size = 5 + 21 * crowd
    if scatter.values is None:
        alpha = 0.25 + 0.55 * crowd
        axes.scatter(scatter.x, scatter.y, s=size, color=_GROUP_COLOURS[0], alpha=alpha, linewidths=0)
    else:
        # Without its last tenth, a yellow that vanishes on white.
        colours = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.9, 256)))
        rim: dict[str, Any] = {"edgecolors": "white", "linewidths": 0.6 * crowd}
        dots = axes.scatter(scatter.x, scatter.y, s=size, c=scatter.values, cmap=colours, **rim)
        assert axes.figure is not None
        bar = axes.figure.colorbar(dots, ax=axes, ticks=_tick_locator(), format=_tick_formatter(), aspect=26)
        bar.set_label(textwrap.fill(_plain(scatter.values_label, 60), 32))
    # What is said of the dots and the names of the marks stand above the axes, where they hide no dots.
    row = 14
    above = row * _draw_marks(axes, scatter.marks)
    axes.annotate(
        told, (0, 1), xytext=(0, above + 6), xycoords="axes fraction", textcoords="offset points", color=_QUIET
    )
    axes.set_title(textwrap.fill(_plain(scatter.title, 84), 44), loc="left", pad=above + row + 10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(_tick_locator())
        axis.set_major_formatter(_tick_formatter())
    axes.set_xlabel(textwrap.fill(_plain(scatter.x_label, 80), 44))
    axes.set_ylabel(textwrap.fill(_plain(scatter.y_label, 60), 32))
    axes.grid(color="#E3E6EA", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_marks(axes: Axes, marks: Mapping[str, tuple[float, float]]) -> int:
    """Draws the marks over the dots, and their names in rows above the axes; returns the number of rows."""
    if not marks:
        return 0
    handles = []
    for index, place in enumerate(marks.values()):
        shape = _MARK_SHAPES[index % len(_MARK_SHAPES)]
        colour = _MARK_COLOURS[index // len(_MARK_SHAPES) % len(_MARK_COLOURS)]
        look: dict[str, Any] = {"marker": shape, "color": colour, "linewidth": 0, "markeredgecolor": "white"}
        axes.plot(*place, markersize=14 if shape == "*" else 9, markeredgewidth=1.1, zorder=3, **look)
        handles.append(Line2D([], [], markersize=10 if shape == "*" else 7, markeredgewidth=0.5, **look))
    names = [_plain(name, 20) for name in marks]
    columns = _legend_columns(names, 54)
    axes.legend(
        handles,
        names,
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderpad=0.0,
        borderaxespad=0.35,
        labelspacing=0.3,
        handlelength=1.0,
        handletextpad=0.5,
        columnspacing=1.4,
        frameon=False,
        labelcolor=_QUIET,
    )
    return math.ceil(len(names) / columns)


def _legend_columns(names: Sequence[str], width: int) -> int:
    """The most columns that fit into `width` letters; a column has 6 for its symbol and the gap after it."""
    for columns in range(len(names), 1, -1):
        if sum(max(map(len, column)) + 6 for column in np.array_split(names, columns)) <= width:
            return columns
    return 1


def _tick_locator() -> MaxNLocator:
    return MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])


def _tick_formatter() -> FuncFormatter:
    """Numbers as the tables have them, without a power of ten aside."""
    return FuncFormatter(lambda value, _: f"{value:,.6g}".replace("-", "−"))


def _label_panels(report: Report) -> list[_Panel]:
    panels = []
    for histogram in () if report.labels is None else report.labels.histograms:
        medians = "; ".join(
            f"{name}: n = {len(values):,}, median {_number(float(np.median(values)) if len(values) else None, False)}"
            for name, values in histogram.groups.items()
        )
        description = f"Histogram of {histogram.x_label}, {histogram.title}. {medians}."
        panels.append(_Panel(functools.partial(_draw_histogram, histogram=histogram), description))
    return panels


def _draw_histogram(axes: Axes, *, histogram: Histogram) -> None:
    everything = np.concatenate([np.asarray(values, dtype=float) for values in histogram.groups.values()])
    edges = np.histogram_bin_edges(everything, bins=min(40, max(10, round(math.sqrt(len(everything))))))
    for index, (name, values) in enumerate(histogram.groups.items()):
        colour = _GROUP_COLOURS[index % len(_GROUP_COLOURS)]
        axes.hist(values, bins=list(edges), color=colour, alpha=0.55, label=_plain(name, 32))
        axes.hist(values, bins=list(edges), color=colour, histtype="step", linewidth=1.4)
    axes.legend(frameon=False, loc="upper left", borderaxespad=0.2, handlelength=1.0)
    axes.margins(y=0.25)
    axes.set_xlabel(_plain(histogram.x_label))
    axes.set_ylabel("labels")
    axes.set_title(_plain(histogram.title), loc="left")


def _plain(text: str, limit: int = 70) -> str:
    """The text on one line, without what cannot be drawn, and not longer than fits."""
    kept = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"


def _sheet(panels: Sequence[_Panel]) -> bytes:
    """The panels as one PNG, at most two in a row."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    style: dict[Any, Any] = {
        "text.parse_math": False,
        "font.size": 9.5,
        "axes.titleweight": "bold",
        "axes.titlesize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#8A929C",
        "axes.labelcolor": _QUIET,
        "xtick.color": _QUIET,
        "ytick.color": _QUIET,
    }
    with rc_context(style):
        figure = Figure(figsize=(5.2 * columns, 3.3 * rows), dpi=200, facecolor="white")
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            panel.draw(axes)
        for axes in grid[len(panels) :]:
            axes.remove()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _pictures(panels: Sequence[_Panel]) -> list[tuple[str, str]]:
    """Each panel as a picture for the page, and what it shows."""
    return [(_data_uri("image/png", _sheet([panel])), panel.description) for panel in panels]


def _table_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_ROW_KEYS)
    writer.writerows([row[key] for key in _ROW_KEYS] for row in rows)
    return text.getvalue()


def _plain_json(value: Any) -> Any:
    """The value with plain containers and numbers; what is not finite becomes None, as JSON has no word for it."""
    if isinstance(value, Mapping):
        return {str(key): _plain_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise FileNotFoundError(f"the film {source} of the report is not there")
    if target.exists() and source.samefile(target):
        return
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("robopref", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")
