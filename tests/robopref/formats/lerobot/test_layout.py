"""Paths, features and JSON of strangers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robopref.formats.lerobot import layout
from robopref.formats.lerobot.layout import Feature

PLACE = Path("info.json")


def test_templates_are_filled_in_as_lerobot_does() -> None:
    values: dict[str, int | str] = {"episode_chunk": 1, "episode_index": 1234, "video_key": "observation.images.top"}
    for template in (layout.DATA_2, layout.VIDEO_2, "{episode_index}/{video_key}", "plain"):
        assert layout.expand(template, values, PLACE) == template.format(**values)
    values = {"chunk_index": 0, "file_index": 1000, "video_key": "k"}
    for template in (layout.DATA_3, layout.VIDEO_3, layout.EPISODES_3):
        assert layout.expand(template, values, PLACE) == template.format(**values)


@pytest.mark.parametrize(
    "template",
    ["{a.b}", "{a[0]}", "{a!r}", "{a:>9999999999}", "{a:0999d}", "{b}", "{", "}", "{{a}}", "{}", 3, "x" * 600],
)
def test_other_templates_are_refused(template: Any) -> None:
    with pytest.raises(ValueError, match=r"info\.json has the path"):
        layout.expand(template, {"a": 1}, PLACE)


@given(st.text("{}a.:0d/\\x\0", max_size=30), st.text("./\\a\0", max_size=8))
def test_no_template_leads_out(template: str, name: str) -> None:
    root = Path(__file__).parent
    try:
        path = layout.inside(root, layout.expand(template, {"a": 5, "x": name}, PLACE))
    except ValueError:
        return
    assert path.resolve().is_relative_to(root)


def test_files_inside_are_found_through_links_inside(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert layout.inside(tmp_path, "link") == tmp_path / "link"
    (tmp_path / "loop").symlink_to("loop")
    for name in ("loop", "missing", "."):
        with pytest.raises(ValueError, match=r"loop|does not exist"):
            layout.inside(tmp_path, name)


def hub_cache(root: Path) -> Path:
    """A revision in a cache of the Hugging Face Hub, with a file of it, and files that are none of its own."""
    snapshot = root / "datasets--some--set" / "snapshots" / "1a2b"
    snapshot.mkdir(parents=True)
    for name in (
        "outside",
        "blobs/outside",
        "datasets--other--set/blobs/5c",
        "datasets--some--set/refs/main",
        "datasets--some--set/blobs-of-others/5c",
        "datasets--some--set/snapshots/9f/x",
        "datasets--some--set/snapshots/blobs/x",
        "datasets--some--set/blobs/5c",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return snapshot


@pytest.mark.parametrize("linked", [False, True])
def test_in_the_cache_of_the_hub_links_lead_to_its_blobs(tmp_path: Path, linked: bool) -> None:
    snapshot = hub_cache(tmp_path)
    (snapshot / "meta").mkdir()
    (snapshot / "meta" / "x").symlink_to("../../../blobs/5c")
    (snapshot / "y").symlink_to("meta/x")
    if linked:
        (tmp_path / "named").symlink_to(snapshot)
        snapshot = tmp_path / "named"
    for name in ("meta/x", "y"):
        assert layout.inside(snapshot, name).read_text() == "datasets--some--set/blobs/5c"


@pytest.mark.parametrize(
    "target",
    [
        "outside",
        "blobs/outside",
        "datasets--other--set/blobs/5c",
        "datasets--some--set/refs/main",
        "datasets--some--set/blobs-of-others/5c",
        "datasets--some--set/snapshots/9f/x",
        "datasets--some--set/snapshots/blobs/x",
    ],
)
def test_in_the_cache_of_the_hub_links_lead_nowhere_else(tmp_path: Path, target: str) -> None:
    snapshot = hub_cache(tmp_path)
    (snapshot / "x").symlink_to(tmp_path / target)
    # Nor over a blob that is itself a link.
    (snapshot.parents[1] / "blobs" / "6d").symlink_to(tmp_path / target)
    (snapshot / "y").symlink_to("../../blobs/6d")
    for name in ("x", "y"):
        with pytest.raises(ValueError, match="is a link to a file outside of"):
            layout.inside(snapshot, name)


def test_links_to_blobs_are_of_the_cache_of_the_hub_alone(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    repository = snapshot.parents[1]
    # A folder called blobs that is a link leads elsewhere, whatever it is called.
    (repository / "blobs" / "5c").rename(tmp_path / "5c")
    (repository / "blobs").rmdir()
    (repository / "blobs").symlink_to(tmp_path)
    (snapshot / "x").symlink_to("../../blobs/5c")
    # And a dataset that is no revision in a cache has no blobs, wherever they lie.
    plain = tmp_path / "revisions" / "1a2b"
    plain.mkdir(parents=True)
    (plain / "x").symlink_to(tmp_path / "blobs" / "outside")
    for root in (snapshot, plain):
        with pytest.raises(ValueError, match="is a link to a file outside of"):
            layout.inside(root, "x")


@pytest.mark.parametrize(
    ("entry", "shape"),
    [
        ({"dtype": "video", "shape": [48, 64, 3], "names": ["height", "width", "channel"]}, (48, 64, 3)),
        ({"dtype": "video", "shape": [3, 48, 64], "names": ["channels", "height", "width"]}, (48, 64, 3)),
        ({"dtype": "image", "shape": [3, 48, 64]}, (48, 64, 3)),
        ({"dtype": "image", "shape": [3, 4, 3]}, (3, 4, 3)),
        ({"dtype": "float32", "shape": []}, (1,)),
        ({"dtype": "float32", "shape": [2, 3], "names": None}, (2, 3)),
    ],
)
def test_shapes_of_features(entry: dict[str, Any], shape: tuple[int, ...]) -> None:
    assert layout.parse_features({"features": {"x": entry}}, PLACE) == {"x": Feature("x", entry["dtype"], shape)}


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"dtype": "float32", "shape": [0]},
        {"dtype": "float32", "shape": [1.5]},
        {"dtype": "float32", "shape": [True]},
        {"dtype": "float32", "shape": [1] * 6},
        {"dtype": "float32", "shape": [2**16, 2**16]},
        {"dtype": "video", "shape": [4, 5]},
        {"dtype": "video", "shape": [5, 5, 6]},
        {"dtype": "video", "shape": [2**15, 5, 3]},
    ],
)
def test_impossible_features_are_refused(entry: Any) -> None:
    with pytest.raises(ValueError, match=r"info\.json gives the (feature|camera) 'x'"):
        layout.parse_features({"features": {"x": entry}}, PLACE)


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff", b'{"a":' * 100_000, b'{"a": 1' + b"0" * 5000 + b"}"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x").write_bytes(text)
    with pytest.raises(ValueError, match=r"x is not (valid JSON|a JSON object)") as caught:
        layout.load_json(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_sizes_of_json_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_text(json.dumps({"a": "b" * 100}) + "\n")
    monkeypatch.setattr(layout, "MAX_JSON", 50)
    with pytest.raises(ValueError, match="which is too much for such a file"):
        layout.load_json(tmp_path / "x")
    monkeypatch.setattr(layout, "MAX_LINE", 50)
    with pytest.raises(ValueError, match="line 1 is too long"):
        list(layout.json_lines(tmp_path / "x"))


def test_lines_are_found_again(tmp_path: Path) -> None:
    lines = [{"a": 1}, {"b": "é"}, {}]
    content = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "x").write_text(content, encoding="utf-8")
    found = list(layout.json_lines(tmp_path / "x"))
    assert [line for _, line in found] == lines
    for begin, line in found:
        assert json.loads(content.encode()[begin:].splitlines()[0]) == line
