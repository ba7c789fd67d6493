"""HDF5 files that others wrote, read with suspicion; and what robopref notes in those that it writes itself.

HDF5 is a whole file system in a file: an array may lie in another file, be computed from others, or declare a size that
its few stored bytes inflate to. `ForeignHDF5` gives only what lies in the file itself, and no more at once than a bound
on memory allows; whatever else a file holds ends in a ValueError of one sentence that names file and place. The
structure of a file is read by the HDF5 library, in this process: a file made to exploit a fault of that library is
beyond this, and for a text whose length is damaged the library sets aside up to 4 GiB for a moment before it refuses.

Foreign formats have no place for the bounds of spaces and other things that an `Episode` has. What robopref writes
keeps them as JSON in an attribute, `NOTES`, which other readers of these formats do not look at.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
from jaxtyping import Float

from robopref.files import Closing

MAX_BYTES = 2**31
"""The most memory that one array of a foreign file may take, unless the caller says otherwise."""
NOTES = "robopref"
"""The attribute with what robopref notes beyond the format."""
NOTES_VERSION = 1

_SMALL = 2**20
"""Bytes below which an array may be as empty as it likes."""
_CACHE = 2**24
"""Bytes of inflated chunks that are kept for each open array: a row is often in a chunk with thousands of others."""
_EXPANSION = {1: 1032, 32000: 264}
"""How many times its size a compressed chunk can inflate to at most, by HDF5's number of the filter: gzip and LZF."""
_HARMLESS_FILTERS = {2, 3}
"""Shuffle and Fletcher-32, which leave the size as it is."""
_LONGEST_NAME = 1000


@dataclass(frozen=True)
class ForeignArray:
    """An array of numbers or booleans that was checked for what it declares, and is read by rows.

    Attributes:
        place: where it is in its file.
        filters: HDF5's numbers of the filters that its chunks went through, in their order.
        chunk_bytes: the size of a chunk when it is read, 0 if it has none.
        stored: how many bytes of the file are its own.
    """

    place: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    filters: tuple[int, ...]
    chunk_bytes: int
    stored: int
    dataset: h5py.Dataset = field(repr=False)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def expansion(self) -> int:
        """How many times its size what is stored can grow to at most."""
        return max((_EXPANSION.get(each, 1) for each in self.filters), default=1)


class ForeignHDF5(Closing):
    """An HDF5 file from elsewhere, open for reading. Use it as a context manager, or call `close`.

    A `place` is a path within the file, such as `"data/demo_0/actions"`; `""` is the file itself.

    Args:
        path: the file.
        max_bytes: the most memory that one array may take.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no HDF5 file, or is damaged or cut short.
        OSError: it may not be read.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> None:
        self.path = Path(path)
        self.max_bytes = max_bytes
        self._way: list[tuple[str, h5py.Group | h5py.Dataset]] = []
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}.")
        with open(self.path, "rb"):
            self._size = self.path.stat().st_size
        if not h5py.is_hdf5(self.path):
            raise ValueError(f"{self.path} is not an HDF5 file: it does not begin like one.")
        try:
            self._file = h5py.File(self.path, "r", rdcc_nbytes=_CACHE)
        except Exception as error:
            raise ValueError(f"{self.path} is damaged or was cut short ({_reason(error)}); copy it again.") from error

    def close(self) -> None:
        """Closes the file; nothing can be read any more."""
        self._file.close()

    def has(self, place: str) -> bool:
        """Whether there is something at `place`.

        Raises:
            ValueError: a link on the way leads elsewhere, or the file is damaged.
        """
        return self._find(place) is not None

    def names(self, place: str) -> list[str]:
        """The names in a group, numbers in them in their natural order: demo_10 after demo_9; none if it is missing.

        Raises:
            ValueError: there is an array at `place`, or the file is damaged.
        """
        node = self._find(place)
        if node is None:
            return []
        if not isinstance(node, h5py.Group):
            raise ValueError(f"{self._named(place)} is an array, not a group.")
        with self._reading(place):
            return sorted(node.keys(), key=_natural)

    def is_group(self, place: str) -> bool:
        """Whether there is a group at `place`; errors as for `has`."""
        return isinstance(self._find(place), h5py.Group)

    def has_numbers(self, place: str) -> bool:
        """Whether there is an array of numbers or booleans at `place`; errors as for `has`."""
        node = self._find(place)
        return isinstance(node, h5py.Dataset) and node.dtype.kind in "biuf"

    def array(self, place: str) -> ForeignArray:
        """The array at `place`, not read yet.

        Raises:
            ValueError: there is none, it holds something else than numbers or numbers of more than 64 bits, it lies in
                another file, or its declared and its stored size cannot both be true.
        """
        array = self._array(place)
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise ValueError(f"{self._named(place)} holds {array.dtype}, not numbers of at most 64 bits.")
        return array

    def rows(self, array: ForeignArray, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Rows `begin` to `end` (not included) of an array of this file, in the byte order of this machine.

        Raises:
            ValueError: they would take more memory than allowed, or the file is damaged there.
        """
        end = array.shape[0] if end is None else end
        needed = (end - begin) * math.prod(array.shape[1:]) * array.dtype.itemsize + array.chunk_bytes
        if needed > self.max_bytes:
            raise ValueError(
                f"{self._named(array.place)} would take {needed} bytes of memory for {end - begin} rows, but at most"
                f" {self.max_bytes} are allowed; raise max_bytes if this file is to be trusted."
            )
        with self._reading(array.place):
            excess = _inflates_beyond(array, begin, end, self.max_bytes)
        if excess:
            raise ValueError(
                f"{self._named(array.place)} inflates to more than the {array.chunk_bytes} bytes it declares."
            )
        with self._reading(array.place):
            found: np.ndarray = array.dataset[begin:end]
        return found.astype(found.dtype.newbyteorder("="), copy=False)

    def scalar(self, place: str) -> str | float | None:
        """The single text or number at `place`; None if there is something else.

        Raises:
            ValueError: there is nothing, or the file is damaged there.
        """
        array = self._array(place)
        if array.shape != () or not _is_plain(array.dtype):
            return None
        with self._reading(place):
            return _plain(array.dataset[()])

    def texts(self, place: str) -> list[str]:
        """The texts in an array with one axis, each at most 1000 characters long.

        Raises:
            ValueError: there is no such array, or the file is damaged there.
        """
        array = self._array(place)
        if h5py.check_string_dtype(array.dtype) is None or array.ndim != 1:
            raise ValueError(f"{self._named(place)} is not a list of texts.")
        # Many rows may point to the same long text: no more of them at once than memory has room for.
        step = max(1, min(1024, self.max_bytes // max(self._size, array.dtype.itemsize)))
        texts: list[str] = []
        for begin in range(0, array.shape[0], step):
            with self._reading(place):
                texts += [str(_plain(value)) for value in array.dataset[begin : begin + step]]
            if any(len(text) > _LONGEST_NAME for text in texts[begin:]):
                raise ValueError(f"{self._named(place)} has a text of more than {_LONGEST_NAME} characters.")
        return texts

    def attribute(self, place: str, name: str) -> str | float | None:
        """The single text or number that the thing at `place` has as an attribute; None without one.

        Raises:
            ValueError: there is nothing at `place`, or the file is damaged there.
        """
        node = self._found(place)
        with self._reading(place):
            if name not in node.attrs:
                return None
            kind = node.attrs.get_id(name)
            return _plain(node.attrs[name]) if kind.shape == () and _is_plain(kind.dtype) else None

    def json(self, place: str, name: str) -> dict[str, Any]:
        """The JSON object that an attribute holds as text; empty without one.

        Raises:
            ValueError: the attribute holds something else, or the file is damaged there.
        """
        text = self.attribute(place, name)
        if text is None:
            return {}
        try:
            value = json.loads(str(text))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._named(place)} has an attribute {name} that is not JSON: {error}.") from error
        if not isinstance(value, dict):
            raise ValueError(f"{self._named(place)} has an attribute {name} that is not a JSON object.")
        return value

    def notes(self, place: str) -> dict[str, Any]:
        """What robopref noted at `place` when it wrote the file; empty if somebody else wrote it.

        Raises:
            ValueError: the notes are damaged, or of a version that this robopref does not read.
        """
        notes = self.json(place, NOTES)
        if notes and notes.get("schema_version") != NOTES_VERSION:
            raise ValueError(
                f"{self._named(place)} has notes of version {_shown(notes.get('schema_version'))}; this robopref reads"
                f" version {NOTES_VERSION}."
            )
        return notes

    def _named(self, place: str) -> str:
        return f"{self.path}: {_shown('/' + place.lstrip('/'))}"

    def _find(self, place: str) -> h5py.Group | h5py.Dataset | None:
        """What is at `place`, over links that stay in the file; None if there is nothing."""
        names = place.split("/") if place else []
        # Most places have the groups on their way in common with the place before: these are not looked up again.
        known = 0
        while known < min(len(self._way), len(names) - 1) and self._way[known][0] == names[known]:
            known += 1
        del self._way[known:]
        node = self._way[-1][1] if self._way else self._file
        for name in names[known:]:
            if not isinstance(node, h5py.Group):
                return None
            with self._reading(place):
                link = None if name in ("", ".") or "\0" in name else node.get(name, getlink=True)
            if link is None:
                return None
            if not isinstance(link, h5py.HardLink):
                raise ValueError(f"{self._named(place)} is a link that leads elsewhere, which is not followed.")
            with self._reading(place):
                node = node[name]
            self._way.append((name, node))
        return node

    def _found(self, place: str) -> h5py.Group | h5py.Dataset:
        node = self._find(place)
        if node is None:
            raise ValueError(f"{self.path} has no {_shown('/' + place)}.")
        return node

    def _array(self, place: str) -> ForeignArray:
        node = self._found(place)
        if not isinstance(node, h5py.Dataset):
            raise ValueError(f"{self._named(place)} is not an array.")
        with self._reading(place):
            elsewhere = node.external is not None or node.is_virtual
            if not elsewhere and node.shape is not None:
                array = ForeignArray(
                    place=place,
                    shape=node.shape,
                    dtype=node.dtype,
                    filters=_filters(node),
                    chunk_bytes=math.prod(node.chunks) * node.dtype.itemsize if node.chunks else 0,
                    stored=node.id.get_storage_size(),
                    dataset=node,
                )
        if elsewhere:
            raise ValueError(f"{self._named(place)} lies in another file, which is not followed.")
        if node.shape is None:
            raise ValueError(f"{self._named(place)} is empty.")
        problem = self._problem(array)
        if problem:
            raise ValueError(f"{self._named(place)} {problem}.")
        return array

    def _problem(self, array: ForeignArray) -> str | None:
        """Why an array is not to be read, as the rest of a sentence about it."""
        compressors = [each for each in array.filters if each not in _HARMLESS_FILTERS]
        if len(compressors) > 1 or not set(compressors) <= _EXPANSION.keys():
            return f"is compressed by HDF5's filters {compressors}; only gzip and LZF are read, and one of them alone"
        if array.stored > self._size:
            return f"claims {array.stored} stored bytes in a file of {self._size}"
        if array.chunk_bytes > self.max_bytes:
            return f"comes in pieces of {array.chunk_bytes} bytes, more than the {self.max_bytes} allowed"
        declared = math.prod(array.shape) * array.dtype.itemsize
        if declared:
            # A chunk is inflated whole, even where the array ends within it.
            declared = max(declared, array.chunk_bytes)
        if declared > max(_SMALL, array.expansion * array.stored):
            return f"declares {declared} bytes but has only {array.stored} stored, which cannot be all of it"
        return None

    @contextmanager
    def _reading(self, place: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # A damaged file makes h5py raise errors of many kinds; all mean the same here.
            raise ValueError(f"{self._named(place)} is damaged ({_reason(error)}).") from error


def floating(array: np.ndarray) -> Float[np.ndarray, " ..."]:
    """`array` as it is if its numbers are floating, and as float64 otherwise."""
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def space_notes(space: gymnasium.spaces.Box) -> dict[str, Any]:
    """A flat Box as JSON, without loss: an infinite bound is null, which has no other form there."""
    bounds = {
        name: [float(each) if np.isfinite(each) else None for each in bound]
        for name, bound in (("low", space.low), ("high", space.high))
    }
    return {**bounds, "dtype": str(space.dtype)}


def space_of_notes(notes: Any, size: int, place: str) -> gymnasium.spaces.Box:
    """The Box that `space_notes` described.

    Raises:
        ValueError: it does not describe one of `size` numbers; the message names `place`.
    """
    try:
        dtype = np.dtype(notes["dtype"])
        low = np.array([-np.inf if each is None else each for each in notes["low"]], dtype)
        high = np.array([np.inf if each is None else each for each in notes["high"]], dtype)
        if dtype.kind == "f" and low.shape == high.shape == (size,):
            return gymnasium.spaces.Box(low, high, dtype=dtype.type)
        problem = f"it has {list(low.shape)} {dtype} bounds for {size} numbers"
    except (AssertionError, KeyError, OverflowError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {_reason(error)}"
    raise ValueError(f"{place} has notes of a space that cannot be read ({problem}).")


def write_notes(node: h5py.Group, notes: Mapping[str, Any]) -> None:
    """Keeps notes for `ForeignHDF5.notes`; they must have a JSON form without NaN and infinity."""
    node.attrs[NOTES] = json.dumps({"schema_version": NOTES_VERSION, **notes}, allow_nan=False)


def _filters(dataset: h5py.Dataset) -> tuple[int, ...]:
    properties = dataset.id.get_create_plist()
    return tuple(properties.get_filter(index)[0] for index in range(properties.get_nfilters()))


def _inflates_beyond(array: ForeignArray, begin: int, end: int, max_bytes: int) -> bool:
    """Whether a chunk with some of these rows holds more than it declares, and more than there is memory for.

    HDF5 inflates a chunk to its end, whatever size it is declared to have, so that must be known before.
    """
    if array.expansion == 1 or array.expansion * array.stored <= max_bytes:
        return False
    chunks, stored_as = array.dataset.chunks, array.dataset.id
    starts = [range(begin // chunks[0] * chunks[0], end, chunks[0])]
    starts += [range(0, size, step) for size, step in zip(array.shape[1:], chunks[1:], strict=True)]
    for offset in itertools.product(*starts):
        chunk = stored_as.get_chunk_info_by_coord(offset)
        if chunk.byte_offset is None or array.expansion * chunk.size <= max_bytes:
            continue
        # Of chunks this large, which no sane writer makes, LZF's are refused unseen and gzip's inflated with a bound.
        if 1 not in array.filters or chunk.size > max_bytes:
            return True
        skipped, content = stored_as.read_direct_chunk(offset)
        if not skipped >> array.filters.index(1) & 1:
            room = array.chunk_bytes + 4 * len(array.filters)
            if len(zlib.decompressobj().decompress(content, room + 1)) > room:
                return True
    return False


def _is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether values are texts or numbers; HDF5 can crash when it converts others from a damaged file."""
    return dtype.kind in "biuf" or h5py.check_string_dtype(dtype) is not None


def _plain(value: Any) -> str | float | None:
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, str | int | float) else None


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts texts by the numbers in them; a number is compared by its digits, however many there are."""
    parts = re.split(r"([0-9]+)", name)
    return [(len(part.lstrip("0")), part.lstrip("0")) if place % 2 else (0, part) for place, part in enumerate(parts)]


def _reason(error: Exception) -> str:
    return " ".join(str(error).strip("'\" .").split())[:300] or type(error).__name__


def _shown(name: object) -> str:
    text = str(name)
    text = text if len(text) <= 120 else f"{text[:117]}..."
    return text if text.isprintable() else repr(text)
