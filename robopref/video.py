"""Films: H.264 files that every browser plays, and several films side by side in one picture.

A frame is `uint8 [H, W, 3]` in sRGB; a film is any iterable of frames of one size, such as an array `[T, H, W, 3]`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import av
import matplotlib
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from robopref.files import atomic_write

Frame: TypeAlias = UInt8[np.ndarray, "H W 3"]

BACKGROUND = (17, 19, 24)
GAP = 4
ENDED_BRIGHTNESS = 0.65


def write_video(path: str | os.PathLike[str], frames: Iterable[Frame], fps: float) -> None:
    """Writes a film as MP4 (H.264, yuv420p, BT.709); the file appears only once it is complete.

    The codec needs even sizes: an odd height or width grows by one pixel that repeats the edge.
    """
    target = Path(path)
    if not fps > 0:
        raise ValueError(f"cannot write {target}: fps is {fps}, and must be more than 0")
    film = _checked(frames, str(target))
    first = next(film, None)
    if first is None:
        raise ValueError(f"cannot write {target}: there are no frames")
    with atomic_write(target) as temporary:
        _encode(temporary, first, film, Fraction(fps).limit_denominator(1001))


def side_by_side(
    films: Mapping[str, Sequence[Frame] | UInt8[np.ndarray, "T H W 3"]],
    captions: Mapping[str, Sequence[str]] | None = None,
    *,
    columns: int = 4,
) -> Iterator[Frame]:
    """Frames that show all films at once, each in a panel under its title, at most `columns` in a row.

    The result is as long as the longest film. A shorter film holds its last frame, dimmed, so that one sees that it
    has ended. Films of different sizes are centred in panels of the largest size.

    Args:
        films: title to film.
        captions: title to one text per frame, drawn in the lower left of the panel; an empty text draws nothing.
            Films without captions may be left out.
        columns: panels in a row.
    """
    if not films:
        raise ValueError("there are no films to put side by side")
    captions = captions or {}
    for title, film in films.items():
        if len(film) == 0:
            raise ValueError(f"the film {title!r} has no frames")
        if title in captions and len(captions[title]) != len(film):
            raise ValueError(f"the film {title!r} has {len(film)} frames but {len(captions[title])} captions")
    if unknown := sorted(set(captions) - set(films)):
        raise ValueError(f"there are captions for {unknown[0]!r}, but no such film")
    sizes = [np.shape(film[0])[:2] for film in films.values()]
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    panels = [_panels(title, film, captions.get(title), (height, width)) for title, film in films.items()]
    return _grids(panels, max(map(len, films.values())), columns)


def _checked(frames: Iterable[Frame], name: str) -> Iterator[Frame]:
    """The frames as contiguous arrays, all of the first one's shape."""
    shape: tuple[int, ...] | None = None
    for index, frame in enumerate(frames):
        frame = np.asarray(frame)
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise ValueError(f"{name}: frame {index} is {frame.dtype} {frame.shape}, and must be uint8 [H, W, 3]")
        if shape is not None and frame.shape != shape:
            raise ValueError(f"{name}: frame {index} has shape {frame.shape}, but the first has {shape}")
        shape = frame.shape
        yield np.ascontiguousarray(frame)


def _encode(path: Path, first: Frame, rest: Iterator[Frame], rate: Fraction) -> None:
    height, width = first.shape[:2]
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "medium"})
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        container.start_encoding()
        frame: Frame | None = first
        while frame is not None:
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            picture = av.VideoFrame.from_ndarray(even, format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
            frame = next(rest, None)
        container.mux(stream.encode(None))


def _panels(
    title: str, film: Iterable[Frame], captions: Sequence[str] | None, size: tuple[int, int]
) -> Iterator[Frame]:
    """The film's panels, then its last panel, dimmed, for as long as anybody asks."""
    height, width = size
    header = _header(title, width)
    panel = np.empty((0, 0, 3), np.uint8)
    for index, frame in enumerate(_checked(film, f"film {title!r}")):
        panel = np.full((len(header) + height, width, 3), BACKGROUND, np.uint8)
        panel[: len(header)] = header
        top, left = len(header) + (height - frame.shape[0]) // 2, (width - frame.shape[1]) // 2
        panel[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
        if captions is not None and captions[index]:
            panel[len(header) :] = _captioned(panel[len(header) :], captions[index])
        yield panel
    ended = panel.copy()
    ended[len(header) :] = (panel[len(header) :] * ENDED_BRIGHTNESS).astype(np.uint8)
    while True:
        yield ended


def _grids(panels: Sequence[Iterator[Frame]], length: int, columns: int) -> Iterator[Frame]:
    """One picture per time step: the panels in rows of `columns`, with gaps between them."""
    rows = math.ceil(len(panels) / columns)
    columns = min(columns, len(panels))
    for _ in range(length):
        pictures = [next(panel) for panel in panels]
        height, width = pictures[0].shape[:2]
        grid = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), BACKGROUND, np.uint8)
        for index, picture in enumerate(pictures):
            top, left = index // columns * (height + GAP), index % columns * (width + GAP)
            grid[top : top + height, left : left + width] = picture
        yield grid


def _header(title: str, width: int) -> Frame:
    """A strip with the title, shortened to what fits."""
    font = _font(width)
    strip = Image.new("RGB", (width, round(1.9 * font.size)), BACKGROUND)
    margin = round(0.5 * font.size)
    text = _shortened(title, font, width - 2 * margin)
    ImageDraw.Draw(strip).text((margin, strip.height / 2), text, fill=(255, 255, 255), font=font, anchor="lm")
    return np.asarray(strip)


def _captioned(picture: Frame, text: str) -> Frame:
    """The picture with the text on a dark plate in its lower left."""
    image = Image.fromarray(picture)
    font = _font(image.width)
    margin = round(0.5 * font.size)
    text = _shortened(text, font, image.width - 4 * margin)
    draw = ImageDraw.Draw(image, "RGBA")
    plate = draw.textbbox((2 * margin, image.height - 2 * margin), text, font=font, anchor="ls")
    box = (plate[0] - margin, plate[1] - margin, plate[2] + margin, plate[3] + margin)
    draw.rounded_rectangle(box, radius=margin, fill=(*BACKGROUND, 200))
    draw.text((2 * margin, image.height - 2 * margin), text, fill=(255, 255, 255), font=font, anchor="ls")
    return np.asarray(image)


def _shortened(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """The text on one line, cut off with an ellipsis where it needs more room."""
    text = " ".join(text.split())
    while text and font.getlength(text) > room:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    return text


@functools.cache
def _font(width: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings, in a size that suits a panel of this width."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), max(10, width // 20))
