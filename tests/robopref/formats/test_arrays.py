"""Arrays of strangers: what NumPy and Python write is read, and nothing that a file asks for is run or believed."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from robopref.formats.arrays import read_array, read_npz

NUMBERS = st.sampled_from(["<i4", "<i8", ">i4", "|u1", "<f4", "<f8", ">f8", "|b1"]).flatmap(
    lambda dtype: of_numpy.arrays(
        dtype,
        of_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False} if "f" in dtype else None,
    )
)


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def packed(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, a=array, b=np.zeros(2))
    return stream.getvalue()


def single(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=50, deadline=None)
@given(array=NUMBERS, protocol=st.integers(2, 4), fortran=st.booleans())
def test_arrays_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, protocol: int, fortran: bool
) -> None:
    folder = tmp_path_factory.mktemp("arrays")
    array = np.asarray(array, order="F" if fortran else "C")
    arrays, names = read_npz(put(folder, "a.npz", packed(array)), ["a", "c"])
    assert_same(arrays["a"], array)
    assert (list(arrays), names) == (["a"], ["a", "b"])
    assert_same(read_array(put(folder, "a.npy", single(array))), array)
    if protocol > 2:
        # Protocol 2 has no bytes: Python has it encode text instead, which takes another name.
        assert_same(read_array(put(folder, "a.pkl", pickle.dumps(array, protocol))), array)
    values: list[float] = array.astype(float).ravel().tolist()
    assert read_array(put(folder, "list.pkl", pickle.dumps(values, protocol))).tolist() == values


def test_lists_of_whole_numbers_stay_whole(tmp_path: Path) -> None:
    found = read_array(put(tmp_path, "labels", pickle.dumps([0, 1, -1, 300, 2**40])))
    assert_same(found, np.array([0, 1, -1, 300, 2**40]))


# What files of NumPy's older and newer releases call by name.
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_pickles_of_all_releases_of_numpy_are_read(tmp_path: Path, module: str) -> None:
    data = pickle.dumps(np.arange(3), 3).replace(b"numpy._core.multiarray", module.encode())
    assert module.encode() in data
    assert_same(read_array(put(tmp_path, "a.pkl", data)), np.arange(3))


class Calls:
    """What pickles into a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda call: call, lambda call: [1, call], lambda call: (call, np.zeros(2))])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, wrap: Any, protocol: int) -> None:
    trace = tmp_path / "trace"
    calls = [
        Calls(os.mkdir, str(trace)),
        Calls(builtins.exec, f"import os; os.mkdir({str(trace)!r})"),
        Calls(builtins.eval, f"__import__('os').mkdir({str(trace)!r})"),
    ]
    for call in calls:
        data = pickle.dumps(wrap(call), protocol)
        path = put(tmp_path, "labels.pkl", data)
        with pytest.raises(ValueError, match=r"labels\.pkl holds no single array of numbers: it "):
            read_array(path)
        assert not trace.exists()
        pickle.loads(data)
        assert trace.exists(), "the pickle is not malicious, so that the test shows nothing"
        trace.rmdir()


def test_names_are_not_even_imported(tmp_path: Path) -> None:
    path = put(tmp_path, "a.pkl", b"\x80\x03cantigravity\nfly\n.")
    with pytest.raises(ValueError, match=r"it asks for antigravity\.fly, which no array needs"):
        read_array(path)


def state(shape: Any = (2,), code: Any = "i8", order: Any = "<", data: Any = bytes(16)) -> bytes:
    """A pickle of an array, with parts of its state made up."""

    class Made:
        def __reduce__(self) -> Any:
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, shape, Kind(), False, data)

    class Kind:
        def __reduce__(self) -> Any:
            return np.dtype, (code, False, True), (3, order, None, None, None, -1, -1, 0)

    return pickle.dumps(Made(), 4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (state(shape=(3,)), r"an array of shape \[3\] and type int64 cannot be made of 16 bytes"),
        (state(shape=(2**60, 2**60)), "cannot be made of 16 bytes"),
        (state(shape=(-1, -2)), "cannot be made of 16 bytes"),
        (state(shape=(2.0,)), "no shape"),
        (state(shape=2), "does not hold numbers"),
        (state(code="O8"), r"O8 is not a type of numbers"),
        (state(code="V16"), "not a type of numbers"),
        (state(code="i8,i8"), "not a type of numbers"),
        (state(order="+"), "not a type of numbers"),
        (state(data=[1, 2]), "does not hold numbers"),
        (pickle.dumps(np.array([1.0, np.nan])), "it does not hold finite numbers alone"),
        (pickle.dumps(np.array(["a", "b"])), "U1 is not a type of numbers"),
        (pickle.dumps(np.array([{}, None])), "EMPTY_DICT"),
        (pickle.dumps({"labels": [0, 1]}), "EMPTY_DICT"),
        (pickle.dumps([[0, 1], [1, 0]]), "it holds a list, not"),
        (pickle.dumps((0, 1)), "it holds a tuple, not"),
        (pickle.dumps(7), "it holds a int, not"),
        (pickle.dumps(np.zeros(3), 5), "BYTEARRAY8|_frombuffer"),
        (b"", "begins neither"),
        (b"\x80\x04", "pickle exhausted before seeing STOP"),
        (b"labels", "begins neither"),
        (single(np.array([None])), "pickled objects"),
        (single(np.zeros(3))[:-1], r"cannot be made of 23 bytes"),
        (single(np.array(["a"])), "finite numbers"),
        (packed(np.zeros(2)), "begins neither"),
    ],
)
def test_what_is_no_array_of_numbers_is_said(tmp_path: Path, data: bytes, reason: str) -> None:
    path = put(tmp_path, "labels.pkl", data)
    with pytest.raises(ValueError, match=rf"labels\.pkl holds no single array of numbers: .*{reason}") as error:
        read_array(path)
    assert "numpy.save" in str(error.value)
    assert "\n" not in str(error.value)


# Few bytes that ask Python's own unpickler for gigabytes: for notes, for bytes, and for a frame.
BOMBS = {
    "notes": b"\x80\x04]r" + struct.pack("<I", 2**32 - 2) + b".",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**36) + b".",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b".",
    "text": b"\x80\x04X" + struct.pack("<I", 2**32 - 1) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"].",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_ask_for_gigabytes_get_none(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, "a.pkl", BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="holds no single array"):
            read_array(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_files_are_measured_before_they_are_read(tmp_path: Path) -> None:
    path = put(tmp_path, "a.pkl", pickle.dumps(np.arange(1000)))
    with pytest.raises(ValueError, match=r"more than the 100 allowed"):
        read_array(path, max_bytes=100)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.pkl"):
        read_array(tmp_path / "none.pkl")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.npz"):
        read_npz(tmp_path / "none.npz", [])


def test_archives_that_inflate_are_not_unpacked(tmp_path: Path) -> None:
    path = put(tmp_path, "a.npz", packed(np.zeros(2**22)))
    assert path.stat().st_size < 2**17
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"a\.npy takes 33554560 bytes, more than the 1048576 allowed"):
            read_npz(path, ["a"], max_bytes=2**20)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_arrays_that_are_not_as_large_as_they_say_are_refused(tmp_path: Path) -> None:
    data = single(np.zeros((3, 2))).replace(b"(3, 2), }" + 9 * b" ", b"(300000000, 20), }")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", data)
    with pytest.raises(ValueError, match=r"an array of shape \[300000000, 20\] .* cannot be made of 48 bytes"):
        read_npz(tmp_path / "a.npz", ["a"])


def test_an_archive_whose_parts_would_lie_before_its_begin_is_refused(tmp_path: Path) -> None:
    data = bytearray(packed(np.arange(50.0)))
    # The last but six bytes say where the list of parts begins; the places of the parts are counted from there.
    data[-6:-2] = (int.from_bytes(data[-6:-2], "little") + 100).to_bytes(4, "little")
    with pytest.raises(ValueError, match=r"a\.npz is not an archive \(\.npz\) of NumPy arrays"):
        read_npz(put(tmp_path, "a.npz", bytes(data)), ["a"])


def test_damaged_archives_are_refused_in_one_sentence(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, whole = tmp_path_factory.mktemp("damaged"), packed(np.arange(50.0))

    @settings(max_examples=200, deadline=None)
    @given(
        changes=st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4),
        kept=st.integers(0, len(whole)),
    )
    def damage(changes: list[tuple[int, int]], kept: int) -> None:
        data = bytearray(whole)
        for place, value in changes:
            data[place] = value
        try:
            arrays, _ = read_npz(put(folder, "a.npz", bytes(data[:kept])), ["a"], max_bytes=2**20)
        except ValueError as error:
            assert str(error).startswith(str(folder)) or str(error).startswith("a in ")  # noqa: PT017
        else:
            assert all(array.nbytes <= 2**20 for array in arrays.values())

    damage()


@settings(max_examples=300, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255)), min_size=1, max_size=6),
    start=st.sampled_from([pickle.dumps(np.arange(4), 4), pickle.dumps([0, 1, -1], 4), single(np.arange(4))]),
)
def test_damaged_pickles_give_numbers_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], start: bytes
) -> None:
    data = bytearray(start)
    for place, value in changes:
        data[place % len(data)] = value
    path = put(tmp_path_factory.mktemp("damaged"), "a.pkl", bytes(data))
    try:
        found = read_array(path)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert found.dtype.kind in "biuf"
        assert found.nbytes <= 8 * len(data)
