"""The suspicious reader of HDF5: what it reads, and hostile files of every kind."""

from __future__ import annotations

import json
import math
import re
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robopref.formats.hdf5 import ForeignHDF5, floating, space_notes, space_of_notes, write_notes

Fill = Callable[[h5py.File], Any]


def made(path: Path, fill: Fill) -> Path:
    with h5py.File(path, "w") as file:
        fill(file)
    return path


def refusal(path: Path, use: Callable[[ForeignHDF5], Any], max_bytes: int = 2**24) -> str:
    """The one sentence with which a file is refused."""
    with (
        pytest.raises(ValueError, match=re.escape(str(path))) as caught,
        ForeignHDF5(path, max_bytes=max_bytes) as file,
    ):
        use(file)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert text.endswith(".")
    assert "\n" not in text
    return text


def read_x(file: ForeignHDF5) -> np.ndarray:
    return file.rows(file.array("x"))


# What is read


@pytest.mark.parametrize("dtype", ["?", "u1", "<i4", ">i8", "<f2", ">f4", "<f8"])
@pytest.mark.parametrize(
    "storage", [{}, {"chunks": (3, 2)}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"}]
)
def test_rows_are_read_as_they_were_written(tmp_path: Path, dtype: str, storage: dict[str, Any]) -> None:
    values = np.random.default_rng(0).integers(0, 100, (7, 4)).astype(dtype)
    with ForeignHDF5(made(tmp_path / "a.h5", lambda file: file.create_dataset("x", data=values, **storage))) as file:
        array = file.array("x")
        for begin, end in ((0, None), (2, 5), (6, 7), (3, 3)):
            found = file.rows(array, begin, end)
            np.testing.assert_array_equal(found, values[begin:end])
            assert found.dtype == values.dtype.newbyteorder("=")
            assert found.dtype.isnative


def test_names_are_in_natural_order(tmp_path: Path) -> None:
    huge = "demo_" + "9" * 5000
    names = ["demo_10", "demo_9", "demo_1", "demo_01b", "demo", huge, "a2b10", "a2b9"]
    path = made(tmp_path / "a.h5", lambda file: [file.create_group(f"g/{name}") for name in names])
    with ForeignHDF5(path) as file:
        assert file.names("g") == ["a2b9", "a2b10", "demo", "demo_1", "demo_01b", "demo_9", "demo_10", huge]
        assert file.names("nothing") == []
        assert file.is_group("g/demo")
        assert not file.is_group("g/demos")


def test_attributes_texts_and_scalars(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        file.attrs.update({"text": "é", "bytes": np.bytes_("b"), "number": 3, "many": [1, 2], "void": h5py.Empty("f8")})
        file["names"], file["fixed"] = ["demo_1", "é"], np.array([b"a", b"bc"])
        file["text"], file["number"], file["array"] = "SAC", 2.5, np.zeros(2)

    with ForeignHDF5(made(tmp_path / "a.h5", fill)) as file:
        assert [file.attribute("", name) for name in ("text", "bytes", "number", "many", "void", "no")] == [
            *("é", "b", 3),
            *(None, None, None),
        ]
        assert file.texts("names") == ["demo_1", "é"]
        assert file.texts("fixed") == ["a", "bc"]
        assert [file.scalar(name) for name in ("text", "number", "array")] == ["SAC", 2.5, None]


def test_notes_come_back_and_other_versions_are_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "a.h5", lambda file: write_notes(file, {"seed": 3, "long": "x" * 100_000}))
    with ForeignHDF5(path) as file:
        assert file.notes("") == {"schema_version": 1, "seed": 3, "long": "x" * 100_000}
    path = made(tmp_path / "b.h5", lambda file: file.attrs.update(robopref=json.dumps({"schema_version": 9})))
    assert "has notes of version 9; this robopref reads version 1" in refusal(path, lambda file: file.notes(""))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[" * 10**5, "not JSON"), ("[1]", "not a JSON object")]
)
def test_an_attribute_that_is_no_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = made(tmp_path / "a.h5", lambda file: file.attrs.update(notes=text))
    assert message in refusal(path, lambda file: file.json("", "notes"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_space_comes_back_bit_for_bit_and_is_strict_json(dtype: Any) -> None:
    low = np.array([-np.inf, -1 / 3, 0, -1e30], dtype)
    space = gymnasium.spaces.Box(low, np.array([0, 0.1, np.inf, 1e30], dtype), dtype=dtype)
    text = json.dumps(space_notes(space), allow_nan=False)
    found = space_of_notes(json.loads(text), 4, "here")
    assert found.dtype == space.dtype
    np.testing.assert_array_equal([found.low, found.high], [space.low, space.high])


@pytest.mark.parametrize(
    "notes",
    [
        None,
        {"low": [0], "high": [1]},
        {"low": [0], "high": [1], "dtype": "object"},
        {"low": [0], "high": ["a"], "dtype": "float32"},
        {"low": [1], "high": [0], "dtype": "nonsense"},
        {"low": [0, 0], "high": [1, 1], "dtype": "float32"},
        {"low": 0, "high": 1, "dtype": "float32"},
        {"low": [None], "high": [1], "dtype": "int8"},
    ],
)
def test_damaged_notes_of_a_space_are_refused(notes: Any) -> None:
    with pytest.raises(ValueError, match="here has notes of a space that cannot be read"):
        space_of_notes(notes, 1, "here")


def test_only_what_is_not_floating_becomes_so() -> None:
    assert [floating(np.zeros(1, dtype)).dtype.name for dtype in ("f2", "f4", "i4", "?")] == [
        *("float16", "float32"),
        *("float64", "float64"),
    ]


# What is refused


def test_a_missing_file_a_folder_and_other_files(tmp_path: Path) -> None:
    for path in (tmp_path / "none.h5", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            ForeignHDF5(path)
    (tmp_path / "text.h5").write_text("actions")
    (tmp_path / "empty.h5").touch()
    for name in ("text.h5", "empty.h5"):
        assert "is not an HDF5 file" in refusal(tmp_path / name, read_x)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = made(tmp_path / "a.h5", lambda file: file.create_dataset("x", data=np.arange(1000.0))).read_bytes()
    for length in np.linspace(8, len(whole) - 1, 40).astype(int):
        path = tmp_path / "cut.h5"
        path.write_bytes(whole[:length])
        assert "copy it again" in refusal(path, read_x)


def test_nothing_outside_the_file_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.arange(4.0).tobytes())
    made(tmp_path / "other.h5", lambda file: file.create_dataset("x", data=np.arange(4.0)))
    layout = h5py.VirtualLayout((4,), "f8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (4,))
    external = [(str(secret), 0, 32)]
    links: dict[str, Fill] = {
        "soft": lambda file: file.update(x=h5py.SoftLink("/y"), y=np.zeros(4)),
        "external": lambda file: file.update(x=h5py.ExternalLink(str(tmp_path / "other.h5"), "x")),
        "dangling": lambda file: file.update(x=h5py.SoftLink("/nothing")),
        "storage": lambda file: file.create_dataset("x", (4,), "f8", external=external),
        "virtual": lambda file: file.create_virtual_dataset("x", layout),
    }
    for name, fill in links.items():
        text = refusal(made(tmp_path / f"{name}.h5", fill), read_x)
        assert ("a link that leads elsewhere" in text) or ("lies in another file" in text), name
    path = made(tmp_path / "group.h5", lambda file: file.update(g=h5py.SoftLink("/")))
    assert "a link that leads elsewhere" in refusal(path, lambda file: file.array("g/g/x"))


def test_a_group_within_itself_ends(tmp_path: Path) -> None:
    def fill(file: h5py.File) -> None:
        file["loop"] = file["/"]

    with ForeignHDF5(made(tmp_path / "a.h5", fill)) as file:
        assert file.names("loop/loop/loop") == ["loop"]


@pytest.mark.parametrize("place", ["", ".", "./x", "../x", "g/../x", "/x", "x/", "x/y", "g//x", "y", "x\0"])
def test_places_are_names_and_nothing_else(tmp_path: Path, place: str) -> None:
    path = made(tmp_path / "a.h5", lambda file: file.update({"x": np.zeros(2), "g/x": np.zeros(2)}))
    refusal(path, lambda file: file.array(place))


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(2, "c16"),
        np.zeros(2, [("a", "f8")]),
        np.array([b"a"]),
        np.zeros(2, "V8"),
        np.zeros(2, np.longdouble),
        np.array([np.zeros(2), np.zeros(3)], object),
        h5py.Empty("f8"),
    ],
    ids=lambda value: str(value.dtype),
)
def test_arrays_of_other_things_than_numbers_are_refused(tmp_path: Path, value: Any) -> None:
    def fill(file: h5py.File) -> None:
        ragged = isinstance(value, np.ndarray) and value.dtype == object
        file.create_dataset("x", data=value, dtype=h5py.vlen_dtype(np.float64) if ragged else None)

    refusal(made(tmp_path / "a.h5", fill), read_x)


def bomb(file: h5py.File, declared: int, inflated: int) -> None:
    """A chunk that declares so many bytes, and inflates to so many."""
    array = file.create_dataset("x", (declared,), "u1", chunks=(declared,), compression="gzip")
    array.id.write_direct_chunk((0,), zlib.compress(bytes(inflated), 9))


SIZE = 2**26
BOMBS: dict[str, tuple[Fill, str]] = {
    "never written": (lambda file: file.create_dataset("x", (2**50, 8), "f8", chunks=(1, 8)), "has only 0 stored"),
    "contiguous, never written": (lambda file: file.create_dataset("x", (2**40,), "f8"), "has only 0 stored"),
    "more axes than bytes": (
        lambda file: file.create_dataset("x", (2**20,) * 3, "f8", chunks=(1,) * 3),
        "only 0 stored",
    ),
    "inflates a thousandfold": (
        lambda file: file.create_dataset("x", data=np.zeros(SIZE, "u1"), chunks=(2**16,), compression="gzip"),
        rf"would take {SIZE + 2**16} bytes of memory for {SIZE} rows, but at most {2**24} are allowed",
    ),
    "a huge chunk of nothing": (
        lambda file: file.create_dataset("x", (8,), "u1", chunks=(2**23,), maxshape=(None,), compression="gzip"),
        f"declares {2**23} bytes but has only 0 stored",
    ),
    "one huge chunk": (
        lambda file: file.create_dataset("x", data=np.zeros(SIZE, "u1"), chunks=(SIZE,), compression="gzip"),
        f"comes in pieces of {SIZE} bytes",
    ),
    "more than declared": (
        lambda file: bomb(file, 2**14, SIZE),
        f"inflates to more than the {2**14} bytes it declares",
    ),
    "gzip twice": (
        lambda file: file.create_dataset("x", (8,), "u1", chunks=(8,), dcpl=twice(), compression="gzip"),
        "one of them alone",
    ),
}


def twice() -> Any:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((8,))
    properties.set_deflate(9)
    return properties


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_takes_memory(tmp_path: Path, name: str) -> None:
    fill, message = BOMBS[name]
    path = made(tmp_path / "a.h5", fill)
    tracemalloc.start()
    assert message in refusal(path, read_x)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_the_memory_allowed_is_what_is_read_at_once(tmp_path: Path) -> None:
    path = made(tmp_path / "a.h5", lambda file: file.create_dataset("x", data=np.arange(1000.0)))
    with ForeignHDF5(path, max_bytes=800) as file:
        np.testing.assert_array_equal(file.rows(file.array("x"), 100, 200), np.arange(100.0, 200.0))
        with pytest.raises(ValueError, match="would take 808 bytes of memory for 101 rows, but at most 800"):
            file.rows(file.array("x"), 100, 201)


def test_large_compressed_chunks_of_honest_files_are_read(tmp_path: Path) -> None:
    """Noise hardly shrinks, so these chunks might inflate beyond the bound; they are looked into, and do not."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 2**12), np.uint8)
    for storage in ({}, {"shuffle": True}, {"fletcher32": True}):
        path = tmp_path / f"{'-'.join(storage)}.h5"
        made(path, lambda file, storage=storage: file.create_dataset("x", data=noise, compression="gzip", **storage))
        with ForeignHDF5(path, max_bytes=2 * noise.nbytes) as file:
            array = file.array("x")
            assert array.expansion * array.stored > 2 * noise.nbytes
            np.testing.assert_array_equal(file.rows(array, 5, 64), noise[5:])


def test_long_texts_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = made(tmp_path / "a.h5", lambda file: file.update(names=["x" * 1001] * 3))
    assert "has a text of more than 1000 characters" in refusal(path, lambda file: file.texts("names"))


def test_compression_by_other_filters_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "a.h5", lambda file: file.create_dataset("x", data=np.arange(99), scaleoffset=0))
    assert "only gzip and LZF are read" in refusal(path, read_x)


def test_a_long_or_strange_name_stays_one_short_line(tmp_path: Path) -> None:
    for name in ("x" * 5000, "a\nb\x1b[2J"):
        path = made(tmp_path / "a.h5", lambda file, name=name: file.create_group(name))
        text = refusal(path, lambda file, name=name: file.array(name))
        assert len(text) < len(str(path)) + 200
        assert text.isprintable()


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 2**40), min_size=1, max_size=4), chunk=st.integers(1, 2**12))
def test_no_declared_shape_makes_it_read_more_than_it_may(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], chunk: int
) -> None:
    chunks = tuple(max(1, min(chunk, size)) if axis == 0 else 1 for axis, size in enumerate(shape))
    path = tmp_path_factory.mktemp("shapes") / "a.h5"
    made(path, lambda file: file.create_dataset("x", tuple(shape), "f8", chunks=chunks, maxshape=(None,) * len(shape)))
    fits = 8 * (math.prod(shape) + math.prod(chunks)) <= 2**20
    with ForeignHDF5(path, max_bytes=2**20) as file:
        if fits:
            assert file.rows(file.array("x")).shape == tuple(shape)
        elif 8 * math.prod(shape) > 2**20:
            with pytest.raises(ValueError, match=r"cannot be all of it|comes in pieces"):
                file.array("x")
