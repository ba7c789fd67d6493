"""Episodes in one film, found again by their times."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from robopref.formats.lerobot.video import CODECS, VideoFile, read_frames

HEIGHT, WIDTH, FPS = 32, 48, 10


def flat(values: list[int]) -> np.ndarray:
    """Frames of one grey each."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), HEIGHT, WIDTH, 3))


def make(path: Path, *films: np.ndarray, codec: str = "libsvtav1") -> Path:
    video = VideoFile(path, films[0].shape[1:], FPS, codec)
    for film in films:
        video.add(film)
    video.close()
    return path


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return make(tmp_path / "film.mp4", flat([20, 40, 60]), flat([100, 130, 160, 190]))


def greys(path: Path, times: list[float], tolerance: float = 0.05) -> list[int]:
    frames = read_frames(path, np.array(times), (HEIGHT, WIDTH, 3), tolerance)
    assert (frames.dtype, frames.shape) == (np.uint8, (len(times), HEIGHT, WIDTH, 3))
    return [round(float(frame.mean())) for frame in frames]


@pytest.mark.parametrize("codec", CODECS)
def test_films_are_what_lerobot_writes(tmp_path: Path, codec: str) -> None:
    path = make(tmp_path / "film.mp4", flat([20, 40, 60]), flat([100, 130]), codec=codec)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec.canonical_name == CODECS[codec][0]
        assert stream.pix_fmt == "yuv420p"
        assert (stream.frames, stream.average_rate, float(stream.duration * stream.time_base)) == (5, FPS, 0.5)
        times = [(frame.time, frame.key_frame) for frame in container.decode(stream)]
    assert [time for time, _ in times] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert times[0][1]
    assert times[2][1]
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "the index must come first, for players that stream"


def test_frames_are_found_by_their_times_in_any_order(film: Path) -> None:
    np.testing.assert_allclose(greys(film, [0.3, 0.4, 0.5, 0.6]), [100, 130, 160, 190], atol=2)
    np.testing.assert_allclose(greys(film, [0.0, 0.1, 0.2]), [20, 40, 60], atol=2)
    np.testing.assert_allclose(greys(film, [0.6, 0.0, 0.32, 0.28, 0.6]), [190, 20, 100, 100, 190], atol=2)


@pytest.mark.parametrize("times", [[0.0, 0.15], [0.7], [0.0, 9.0], [-0.2]])
def test_times_without_a_frame_are_told(film: Path, times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"film\.mp4 has no frame at .* s; restore it, or the tables"):
        greys(film, times, tolerance=0.02)


@pytest.mark.parametrize("steps", [(0, 3), (3, 6)])
def test_only_the_frames_between_are_decoded(tmp_path: Path, steps: tuple[int, int]) -> None:
    path = make(tmp_path / "film.mp4", flat([20, 40, 60, 80, 100, 120, 140, 160]))
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    # What lies before the key frame of the first and after the last: destroyed.
    for step, (place, size) in enumerate(packets):
        if not steps[0] - steps[0] % 2 <= step < steps[1]:
            content[place : place + size] = bytes(size)
    path.write_bytes(content)
    wanted = range(*steps)
    np.testing.assert_allclose(
        greys(path, [step / FPS for step in wanted]), [20 + 20 * step for step in wanted], atol=2
    )
    with pytest.raises(ValueError, match=r"is damaged or not an MP4 file|has no frame"):
        greys(path, [step / FPS for step in range(8)])


def test_a_film_of_another_size_is_not_decoded(film: Path) -> None:
    with pytest.raises(ValueError, match="shows 32x48 pixels where the dataset says 48x32"):
        read_frames(film, np.zeros(1), (WIDTH, HEIGHT, 3), 0.05)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a film",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/x.mp4\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    ],
)
def test_what_is_no_film_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "film.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"film\.mp4 is damaged or not an MP4 file \("):
        greys(tmp_path / "film.mp4", [0.0])


def test_sound_is_no_film(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="has no pictures"):
        greys(path, [0.0])


def test_odd_sizes_are_for_av1_alone(tmp_path: Path) -> None:
    odd = np.full((3, 33, 47, 3), 90, np.uint8)
    read = read_frames(make(tmp_path / "odd.mp4", odd), np.arange(3) / FPS, (33, 47, 3), 0.05)
    assert np.abs(read.astype(int) - odd).max() <= 4
    with pytest.raises(ValueError, match="h264 cannot encode frames of 33x47 pixels"):
        make(tmp_path / "other.mp4", odd, codec="h264")


def test_the_encoder_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "film.mp4", flat([20, 40]))
    video = VideoFile(tmp_path / "abandoned.mp4", (HEIGHT, WIDTH, 3), FPS, "libsvtav1")
    video.add(flat([20]))
    video.abandon()
    assert capfd.readouterr() == ("", "")
