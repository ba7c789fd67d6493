"""Arrays in the files of strangers: archives (.npz), single arrays (.npy) and pickles, of which nothing is run.

NumPy's own reader trusts what an archive says of its size, and Python's `pickle` runs what a file asks for. Published
preferences are both: archives that anybody may have made, and pickles of labels and indices. So here

* an array is measured before it is unpacked: its shape must account for its bytes, and these for no more than allowed;
* a pickle may hold one array of numbers, or one list of them, which is what is published. Its instructions are looked
  through first, and must be among the few that such a pickle needs. What it calls by name is then not NumPy's code but
  stand-ins that note shape, type and bytes; every other name is refused, before anything is looked up or imported.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

MAX_BYTES = 2**31
"""The most bytes of one array in an archive, unless a caller allows more."""

MAX_PICKLE_BYTES = 2**22
"""The most bytes of a pickle or of a single array: those of labels and indices have thousands."""

_MAGIC = b"\x93NUMPY"
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BROKEN = (
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What the standard library raises of damaged archives, arrays and pickles."""

_INSTRUCTIONS = re.compile(
    "PROTO|FRAME|STOP|MARK|MEMOIZE|(LONG_)?BIN(PUT|GET)|NONE|NEW(TRUE|FALSE)|BININT[12]?|LONG1|BINFLOAT"
    "|(SHORT_)?BIN(UNICODE|BYTES)|EMPTY_(TUPLE|LIST)|TUPLE[123]?|APPENDS?|(STACK_)?GLOBAL|REDUCE|BUILD"
)
"""Names of all instructions that a pickle of an array or of a list of numbers may have."""


def read_npz(
    path: str | os.PathLike[str], wanted: Sequence[str], *, max_bytes: int = MAX_BYTES
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Those of the wanted arrays that an archive has, and the names of all that it has.

    Args:
        path: the archive.
        wanted: the only names that are unpacked.
        max_bytes: the most that one of them may take.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no archive of arrays, is damaged, or a wanted array is too large or does not hold finite
            numbers.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    arrays: dict[str, np.ndarray] = {}
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
                for name in wanted:
                    if name in members:
                        arrays[name] = _unpacked(archive, members[name], max_bytes)
        except (*_BROKEN, OSError) as error:
            # An OSError, because damage may lead to a place before the file's begin.
            raise ValueError(f"{path} is not an archive (.npz) of NumPy arrays: {_said(error)}") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
            raise ValueError(f"{name} in {path} does not hold finite numbers alone.")
    return arrays, list(members)


def read_array(path: str | os.PathLike[str], *, max_bytes: int = MAX_PICKLE_BYTES) -> np.ndarray:
    """The one array of numbers in a file: one of NumPy's own (.npy), or a pickle of an array or of a list of numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the {max_bytes} allowed.")
    data = path.read_bytes()
    try:
        single = data.startswith(_MAGIC)
        array = _array(io.BytesIO(data), len(data)) if single else _unpickled(data)
        if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
            raise ValueError("it does not hold finite numbers alone.")
    except _BROKEN as error:
        raise ValueError(
            f"{path} holds no single array of numbers: {_said(error)} Nothing that a pickle asks for is run here; if"
            " you trust the file, load it yourself and save the array with numpy.save under the same name."
        ) from error
    return array


def check_actions(actions: np.ndarray, what: str) -> None:
    """Raises a ValueError that begins with `what` if an action lies outside [-1, 1]."""
    largest = np.max(np.abs(actions))
    if not largest <= 1 + 1e-6:
        raise ValueError(f"{what} reach {largest:.4g}, but agents act in [-1, 1]; rescale the actions.")


def _said(error: BaseException) -> str:
    """What an error says, as a sentence on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo, max_bytes: int) -> np.ndarray:
    if member.file_size > max_bytes:
        raise ValueError(f"{member.filename} takes {member.file_size} bytes, more than the {max_bytes} allowed")
    if member.compress_type not in _PACKED:
        raise ValueError(f"{member.filename} is packed in a way that NumPy does not use")
    with archive.open(member) as stream:
        return _array(stream, member.file_size)


def _array(stream: IO[bytes], size: int) -> np.ndarray:
    """The array in a stream that has `size` bytes."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of NumPy's format is not that of an array of numbers")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject:
        raise ValueError("an array of it holds pickled objects, which are not loaded")
    return _filled(shape, dtype, fortran, stream.read(_needed(shape, dtype, size - stream.tell())))


def _needed(shape: Sequence[int], dtype: np.dtype[Any], available: int) -> int:
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != available:
        raise ValueError(f"an array of shape {list(shape)} and type {dtype} cannot be made of {available} bytes")
    return available


def _filled(shape: Sequence[int], dtype: np.dtype[Any], fortran: bool, data: bytes) -> np.ndarray:
    _needed(shape, dtype, len(data))
    return np.ndarray(tuple(shape), dtype, buffer=data, order="F" if fortran else "C")


class _PickledType:
    """Stands in for a NumPy type that is being unpickled."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])

    def dtype(self) -> np.dtype[Any]:
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", self.code) or self.order not in ("<", ">", "|", "="):
            raise ValueError(f"{self.order}{self.code} is not a type of numbers")
        return np.dtype(self.order + self.code)


class _PickledArray:
    """Stands in for an array that is being unpickled; empty until its state comes."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _PickledType) or not isinstance(data, bytes) or not isinstance(shape, tuple):
            raise ValueError("an array of it does not hold numbers")
        if not all(type(length) is int for length in shape):
            raise ValueError("an array of it has no shape")
        self.array = _filled(shape, kind.dtype(), bool(fortran), data)


def _new_array(*_: Any) -> _PickledArray:
    return _PickledArray()


def _new_type(code: Any, *_: Any) -> _PickledType:
    return _PickledType(str(code))


_STAND_INS: dict[tuple[str, str], Callable[..., Any] | str] = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _new_type,
}


class _NumbersUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise ValueError(f"it asks for {module}.{name}, which no array needs")
        return _STAND_INS[module, name]


def _unpickled(data: bytes) -> np.ndarray:
    if not data.startswith(pickle.PROTO):
        raise ValueError("it begins neither like an array of NumPy's own nor like a pickle since Python 2.3")
    for instruction, argument, _ in pickletools.genops(data):
        if not _INSTRUCTIONS.fullmatch(instruction.name):
            raise ValueError(f"it has the instruction {instruction.name}, which no array or list of numbers needs")
        # Python makes room for as many notes as the highest number of one: a few bytes could ask for gigabytes.
        if instruction.name.endswith("BINPUT") and int(argument or 0) > len(data):
            raise ValueError(f"it makes note {argument} in {len(data)} bytes")
    found = _NumbersUnpickler(io.BytesIO(data)).load()
    if isinstance(found, _PickledArray) and found.array is not None:
        return found.array
    if isinstance(found, list) and all(type(value) in (bool, int, float) for value in found):
        return np.array(found, np.float64 if any(type(value) is float for value in found) else np.int64)
    raise ValueError(f"it holds a {type(found).__name__.removeprefix('_')}, not an array or a list of numbers")
