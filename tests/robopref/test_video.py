"""Films are checked by decoding them again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from robopref.video import ENDED_BRIGHTNESS, side_by_side, write_video


def _read(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _colours(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A film of which every frame has another colour on the left, and the opposite one on the right."""
    values = np.linspace(20, 230, frames).astype(np.uint8)
    film = np.empty((frames, height, width, 3), np.uint8)
    film[:, :, : width // 2] = np.stack([values, values[::-1], np.full(frames, 90, np.uint8)], axis=1)[:, None, None]
    film[:, :, width // 2 :] = 255 - film[:, :, : width // 2]
    return film


def test_a_film_comes_back_as_it_was(tmp_path: Path) -> None:
    film = _colours(12)

    write_video(tmp_path / "film.mp4", film, fps=20)

    decoded = _read(tmp_path / "film.mp4")
    assert decoded.shape == film.shape
    away_from_edges = np.r_[8:40, 56:88]
    error = np.abs(decoded.astype(int) - film)[:, :, away_from_edges]
    assert error.max() <= 8
    assert error.mean() <= 3


def test_a_film_is_h264_with_the_rate_and_colours_that_browsers_expect(tmp_path: Path) -> None:
    write_video(tmp_path / "film.mp4", _colours(5), fps=12.5)

    with av.open(str(tmp_path / "film.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == pytest.approx(12.5)
        assert stream.frames == 5
        assert int(stream.codec_context.colorspace) == 1  # BT.709
    content = (tmp_path / "film.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "the index must come first, for players that stream"


@pytest.mark.parametrize(("height", "width"), [(63, 96), (64, 95), (1, 1)])
def test_odd_sizes_grow_by_a_repeated_edge(tmp_path: Path, height: int, width: int) -> None:
    film = np.full((3, height, width, 3), (200, 40, 90), np.uint8)

    write_video(tmp_path / "film.mp4", film, fps=10)

    decoded = _read(tmp_path / "film.mp4")
    assert decoded.shape == (3, height + height % 2, width + width % 2, 3)
    assert np.abs(decoded.astype(int) - (200, 40, 90)).max() <= 8


def test_frames_may_be_made_one_at_a_time(tmp_path: Path) -> None:
    def frames() -> Iterator[np.ndarray]:
        yield from _colours(7)

    write_video(tmp_path / "film.mp4", frames(), fps=10)

    assert len(_read(tmp_path / "film.mp4")) == 7


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "no frames"),
        ([np.zeros((4, 4, 3))], "frame 0 is float64"),
        ([np.zeros((4, 4), np.uint8)], r"frame 0 is uint8 \(4, 4\)"),
        ([np.zeros((4, 4, 4), np.uint8)], r"must be uint8 \[H, W, 3\]"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)], "frame 1 has shape"),
    ],
)
def test_what_is_no_film_is_refused_and_leaves_nothing(tmp_path: Path, frames: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "film.mp4", frames, fps=10)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0, -5, float("nan")])
def test_a_rate_that_is_none_is_refused(tmp_path: Path, fps: float) -> None:
    with pytest.raises(ValueError, match="fps"):
        write_video(tmp_path / "film.mp4", _colours(2), fps=fps)


def test_a_film_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    write_video(tmp_path / "film.mp4", _colours(3), fps=10)
    before = (tmp_path / "film.mp4").read_bytes()

    def breaks() -> Iterator[np.ndarray]:
        yield from _colours(2)
        raise RuntimeError("the simulator died")

    with pytest.raises(RuntimeError, match="the simulator died"):
        write_video(tmp_path / "film.mp4", breaks(), fps=10)

    assert (tmp_path / "film.mp4").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def _parts(grid: np.ndarray, panels: int, width: int, height: int) -> list[np.ndarray]:
    """The pictures below the titles of a grid that is one row."""
    gap = (grid.shape[1] - panels * width) // max(panels - 1, 1)
    return [grid[-height:, k * (width + gap) : k * (width + gap) + width] for k in range(panels)]


def test_side_by_side_shows_every_film_under_its_title() -> None:
    left, right = _colours(4), _colours(4)[::-1]

    grids = list(side_by_side({"ours": left, "theirs": right}))

    assert len(grids) == 4
    for grid, ours, theirs in zip(grids, left, right, strict=True):
        shown = _parts(grid, 2, 96, 64)
        np.testing.assert_array_equal(shown[0], ours)
        np.testing.assert_array_equal(shown[1], theirs)
        titles = grid[:-64]
        assert titles[:, :96].max() > 200, "the left title is missing"
        assert titles[:, -96:].max() > 200, "the right title is missing"
    same_title = next(side_by_side({"ours": left, "ours ": right}))
    np.testing.assert_array_equal(same_title[:-64, :96], same_title[:-64, -96:])
    assert not np.array_equal(grids[0][:-64, :96], grids[0][:-64, -96:])


def test_a_shorter_film_holds_its_last_frame_dimmed() -> None:
    short, long = _colours(2), _colours(5)

    grids = list(side_by_side({"short": short, "long": long}))

    assert len(grids) == 5
    np.testing.assert_array_equal(_parts(grids[1], 2, 96, 64)[0], short[1])
    for grid, running in zip(grids[2:], long[2:], strict=True):
        held, shown = _parts(grid, 2, 96, 64)
        np.testing.assert_allclose(held, ENDED_BRIGHTNESS * short[1], atol=1)
        np.testing.assert_array_equal(shown, running)
    assert 0.4 < ENDED_BRIGHTNESS < 0.9, "dark enough to notice, bright enough to see"


def test_a_caption_is_drawn_on_its_frame_alone() -> None:
    film = np.full((3, 120, 160, 3), 128, np.uint8)

    grids = list(side_by_side({"ours": film}, {"ours": ["", "success", ""]}))

    np.testing.assert_array_equal(grids[0], grids[2])
    changed = np.argwhere((grids[1] != grids[0]).any(axis=2))
    header = len(grids[0]) - 120
    assert len(changed) > 100
    assert changed[:, 0].min() >= header + 60, "the caption belongs to the lower half"
    assert changed[:, 1].max() < 110, "the caption belongs to the left"
    assert grids[1][header:].max() > 240, "the text is white"


def test_a_caption_that_is_too_long_is_cut_off() -> None:
    film = np.full((1, 120, 160, 3), 128, np.uint8)

    (grid,) = side_by_side({"ours": film}, {"ours": ["success " * 50]})

    assert (grid[-120:, -4:] == 128).all()


def test_films_of_different_sizes_are_centred() -> None:
    small, large = np.full((1, 10, 20, 3), 250, np.uint8), np.full((1, 30, 60, 3), 250, np.uint8)

    (grid,) = side_by_side({"small": small, "large": large})

    left, right = _parts(grid, 2, 60, 30)
    assert (right == 250).all()
    assert (left[10:20, 20:40] == 250).all()
    assert (left == 250).all(axis=2).sum() == 200


@pytest.mark.parametrize(("films", "columns", "rows"), [(3, 2, 2), (4, 2, 2), (5, 2, 3), (3, 4, 1)])
def test_films_wrap_into_rows(films: int, columns: int, rows: int) -> None:
    (one,) = side_by_side({"0": _colours(1)})

    (grid,) = side_by_side({str(k): _colours(1) for k in range(films)}, columns=columns)

    across = min(films, columns)
    assert grid.shape == (rows * (len(one) + 4) - 4, across * (96 + 4) - 4, 3)


@pytest.mark.parametrize("title", ["", "a very long title " * 20, "<b>&\"'\n\x00", "機器人 🤖"])
def test_any_title_fits_its_panel(title: str) -> None:
    (grid,) = side_by_side({title: np.zeros((1, 50, 80, 3), np.uint8)})

    assert grid.shape[1] == 80
    assert (grid[:-50, -4:] == grid[0, -1]).all(), "the title must end before its panel does"


@pytest.mark.parametrize(
    ("films", "captions", "message"),
    [
        ({}, None, "no films"),
        ({"a": np.zeros((0, 4, 4, 3), np.uint8)}, None, "'a' has no frames"),
        ({"a": np.zeros((2, 4, 4, 3), np.uint8)}, {"a": ["one"]}, "2 frames but 1 captions"),
        ({"a": np.zeros((2, 4, 4, 3), np.uint8)}, {"b": ["", ""]}, "captions for 'b'"),
    ],
)
def test_films_that_do_not_fit_together_are_refused(
    films: dict[str, np.ndarray], captions: dict[str, list[str]] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        side_by_side(films, captions)


def test_a_bad_frame_is_named_by_its_film() -> None:
    with pytest.raises(ValueError, match="film 'ours': frame 0 is float64"):
        next(side_by_side({"ours": [np.zeros((4, 4, 3))]}))
