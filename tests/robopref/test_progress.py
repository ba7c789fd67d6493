from __future__ import annotations

import io

import pytest
from rich.console import Console

from robopref.progress import progress_bar, progress_columns


def shown(updates: list[tuple[int, int | None]]) -> str:
    """What a terminal shows at the end."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    with progress_columns(console) as bar:
        task = bar.add_task("labelling", total=None)
        for completed, total in updates:
            bar.update(task, completed=completed, total=total)
    return screen.getvalue()


def test_a_bar_shows_what_is_done_how_much_there_is_and_the_time():
    text = shown([(1, 10), (3, 10)])
    assert "labelling" in text
    assert "3/10" in text
    assert "left" in text
    assert text.count("0:00:0") >= 1


def test_a_bar_whose_total_is_not_known_yet_is_shown_as_well():
    assert "0/?" in shown([])


def test_a_bar_goes_to_standard_error_so_that_results_can_be_piped(capsys):
    with progress_bar("training") as report:
        report(2, 8)
        report(8, 8)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "training" in printed.err
    assert "8/8" in printed.err


def test_counts_may_go_back_and_totals_may_grow(capsys):
    with progress_bar("rolling out") as report:
        report(5, 8)
        report(2, 16)
    assert "2/16" in capsys.readouterr().err


def fail_half_way() -> None:
    with progress_bar("training") as report:
        report(2, 8)
        raise RuntimeError("stop")


def test_an_error_passes_through_and_the_bar_stops(capsys):
    with pytest.raises(RuntimeError, match="stop"):
        fail_half_way()
    assert "2/8" in capsys.readouterr().err
    with progress_bar("again") as report:
        report(1, 1)
    assert "1/1" in capsys.readouterr().err
