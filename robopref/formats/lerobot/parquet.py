"""Rows of Parquet files that strangers wrote, a few at a time, and no more of them than there is memory for.

How much a column unpacks to is read from the file's footer before anything is decoded: a few bytes can stand for
billions of numbers. Arrow knows the footer too, but the process ends where it does not like what it finds there, so
the four numbers that are needed are read here: see the Apache Parquet format, `parquet.thrift`, and Thrift's compact
protocol, in which it is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from robopref.formats.lerobot.layout import Feature

MAX_UNPACKED = 2**31
"""Bytes to which one column of a row group may unpack."""

_MAX_FOOTER = 2**26
_MAX_DEPTH = 16
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


class Rows(NamedTuple):
    """Where the frames of an episode lie: rows [begin, end) of a Parquet file, or all that it has."""

    path: Path
    begin: int
    end: int
    all: bool = False


class Chunk(NamedTuple):
    """One column of a row group."""

    values: int
    unpacked: int


class RowGroup(NamedTuple):
    """Rows that are stored together."""

    rows: int
    chunks: tuple[Chunk, ...]


class ParquetTable:
    """A Parquet file of which only the footer was read.

    Raises:
        ValueError: it is damaged or no Parquet file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.groups = read_footer(path)
        with _reading(path):
            self._file = pq.ParquetFile(pa.OSFile(str(path), "rb"), page_checksum_verification=True)
            # Names are decoded when they are asked for.
            fields = [field for field in self._file.schema_arrow if isinstance(field.name, str)]
        self.fields: list[pa.Field] = fields
        leaves = [_num_leaves(field.type) for field in fields]
        if any(len(group.chunks) != sum(leaves) for group in self.groups):
            raise ValueError(f"{path} is damaged: its footer lists other columns than its schema.")
        self._first_leaves = np.cumsum([0, *leaves]).tolist()

    @property
    def num_rows(self) -> int:
        """Rows of all row groups."""
        return sum(group.rows for group in self.groups)

    def close(self) -> None:
        """Closes the file."""
        self._file.close(force=True)

    def batches(
        self,
        rows: Rows,
        columns: Sequence[str],
        sizes: Mapping[str, int],
        *,
        batch_size: int = 4096,
        most: int = MAX_UNPACKED,
    ) -> Iterator[pa.RecordBatch]:
        """The columns of some rows, a batch at a time; only the row groups that hold such rows are read.

        Args:
            sizes: the numbers in one row of a column, where it is known; checked before the column is decoded.
            most: bytes to which a column of one row group may unpack.

        Raises:
            ValueError: the file is damaged, lacks rows or columns, or a column takes too much memory.
        """
        count = self.num_rows
        if not 0 <= rows.begin < rows.end <= count or (rows.all and rows.end < count):
            raise ValueError(
                f"{self.path} has {count} rows where the rows {rows.begin} to {rows.end - 1} are needed; restore the "
                "dataset's files from the same place."
            )
        ends = np.cumsum([0, *(group.rows for group in self.groups)])
        first = int(np.searchsorted(ends, rows.begin, side="right")) - 1
        wanted = [number for number in range(first, len(self.groups)) if ends[number] < rows.end]
        for number in wanted:
            self._check(self.groups[number], columns, sizes, most)
        begin = int(ends[first])
        with _reading(self.path):
            for batch in self._file.iter_batches(
                batch_size, row_groups=wanted, columns=list(columns), use_threads=False
            ):
                low, high = max(rows.begin - begin, 0), min(rows.end - begin, len(batch))
                if low < high:
                    yield batch.slice(low, high - low)
                begin += len(batch)
                if begin >= rows.end:
                    return
        raise ValueError(f"{self.path} is damaged: it ends before row {rows.end - 1}.")

    def _check(self, group: RowGroup, columns: Sequence[str], sizes: Mapping[str, int], most: int) -> None:
        names = [field.name for field in self.fields]
        for name in columns:
            if names.count(name) != 1:
                raise ValueError(f"{self.path} {'lacks' if name not in names else 'repeats'} the column {name!r}.")
        # Arrow takes the name of a column for a path, and reads what lies below it too.
        prefixes = tuple(f"{name}." for name in columns)
        for place, name in enumerate(names):
            if not f"{name}.".startswith(prefixes):
                continue
            for chunk in group.chunks[self._first_leaves[place] : self._first_leaves[place + 1]]:
                if chunk.unpacked > most:
                    raise ValueError(
                        f"{self.path}: the column {name!r} unpacks to {chunk.unpacked} bytes in one row group, which "
                        "is too much to be read."
                    )
                if name in sizes and chunk.values != group.rows * sizes[name]:
                    raise ValueError(
                        f"{self.path}: the column {name!r} has {chunk.values} values in {group.rows} rows, where "
                        f"{group.rows * sizes[name]} are needed."
                    )


def column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column by its name, whatever Arrow read beside it."""
    return batch.column(batch.schema.get_field_index(name))


def first_text(batch: pa.RecordBatch, name: str, path: Path) -> str | None:
    """The first text of a column, None where there is a gap.

    Raises:
        ValueError: it is not text in UTF-8.
    """
    with _reading(path):
        text: str | None = column(batch, name)[0].as_py()
    return text


def to_numpy(values: pa.Array, feature: Feature, path: Path) -> np.ndarray:
    """A column as an array [rows, *shape] of the feature's type.

    Raises:
        ValueError: it has gaps, rows of different lengths, or no numbers.
    """
    rows = len(values)
    with _reading(path):
        values = _flat(values, feature, path)
        kind = values.type
        numbers = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not numbers or len(values) != rows * feature.size:
            raise ValueError(
                f"{path}: the column {feature.name!r} has {len(values)} values of type {kind} in {rows} rows, where "
                f"{feature.dtype} {list(feature.shape)} is needed in each."
            )
        # What info.json says of a column holds: other writers leave the types of columns to chance.
        array: np.ndarray = values.to_numpy(zero_copy_only=False).astype(feature.dtype, copy=False)
        return array.reshape(rows, *feature.shape)


def read_footer(path: Path) -> list[RowGroup]:
    """The sizes of the row groups and their columns.

    Raises:
        ValueError: the file is damaged or no Parquet file.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - 8, 0))
            end = file.read(8)
            length = int.from_bytes(end[:4], "little")
            if size < 12 or end[4:] != b"PAR1" or not 0 < length <= min(size - 12, _MAX_FOOTER):
                raise ValueError(f"{path} is damaged or not a Parquet file (it does not end like one).")
            file.seek(size - 8 - length)
            groups = _Compact(file.read(length)).file_metadata()
    except (IndexError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is damaged: its footer cannot be read.") from error
    if any(group.rows < 0 or any(min(chunk) < 0 for chunk in group.chunks) for group in groups):
        raise ValueError(f"{path} is damaged: its footer counts less than nothing.")
    return groups


class _Compact:
    """Thrift's compact protocol, as far as the footer of a Parquet file needs it; IndexError at the end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def file_metadata(self) -> list[RowGroup]:
        groups: list[RowGroup] = []
        for number, kind in self._fields():
            if (number, kind) == (4, _LIST):
                groups = [self._row_group() for _ in range(self._list_of_structs())]
            else:
                self._skip(kind)
        return groups

    def _row_group(self) -> RowGroup:
        rows = -1
        chunks: tuple[Chunk, ...] = ()
        for number, kind in self._fields():
            if (number, kind) == (1, _LIST):
                chunks = tuple(self._chunk() for _ in range(self._list_of_structs()))
            elif (number, kind) == (3, _I64):
                rows = self._number()
            else:
                self._skip(kind)
        return RowGroup(rows, chunks)

    def _chunk(self) -> Chunk:
        found = Chunk(-1, -1)
        for number, kind in self._fields():
            if (number, kind) == (3, _STRUCT):
                found = self._chunk_metadata()
            else:
                self._skip(kind)
        return found

    def _chunk_metadata(self) -> Chunk:
        values = unpacked = -1
        for number, kind in self._fields():
            if (number, kind) == (5, _I64):
                values = self._number()
            elif (number, kind) == (6, _I64):
                unpacked = self._number()
            else:
                self._skip(kind)
        return Chunk(values, unpacked)

    def _fields(self) -> Iterator[tuple[int, int]]:
        """Number and type of the fields of a struct, each of which the caller reads before the next."""
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._number()
            yield number, head & 15

    def _byte(self) -> int:
        value = self._data[self._at]
        self._at += 1
        return value

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise IndexError

    def _number(self) -> int:
        value = self._unsigned()
        return value >> 1 if not value & 1 else -(value >> 1) - 1

    def _list(self) -> tuple[int, int]:
        head = self._byte()
        return (head >> 4 if head >> 4 < 15 else self._unsigned()), head & 15

    def _list_of_structs(self) -> int:
        size, kind = self._list()
        if kind != _STRUCT:
            raise IndexError
        return size

    def _skip(self, kind: int, depth: int = 0) -> None:
        if depth > _MAX_DEPTH:
            raise IndexError
        if kind in (_I16, _I32, _I64):
            self._unsigned()
        elif kind in (_BYTE, _DOUBLE):
            self._at += 8 if kind == _DOUBLE else 1
        elif kind == _BINARY:
            length = self._unsigned()
            self._at += length
        elif kind in (_LIST, _SET):
            size, element = self._list()
            for _ in range(size):
                # Truth values take a byte in a list, and none in a struct.
                self._skip(_BYTE if element in (_TRUE, _FALSE) else element, depth + 1)
        elif kind == _STRUCT:
            for _, field in self._fields():
                self._skip(field, depth + 1)
        elif kind not in (_TRUE, _FALSE):
            raise IndexError
        if self._at > len(self._data):
            raise IndexError


def _num_leaves(kind: pa.DataType) -> int:
    """Columns that a type takes in Parquet."""
    if isinstance(kind, pa.BaseExtensionType):
        return _num_leaves(kind.storage_type)
    return sum(_num_leaves(kind.field(index).type) for index in range(kind.num_fields)) if kind.num_fields else 1


def _flat(values: pa.Array, feature: Feature, path: Path) -> pa.Array:
    """The numbers in lists of lists, all of one length."""
    while True:
        values = values.storage if isinstance(values, pa.ExtensionArray) else values
        if values.null_count:
            raise ValueError(f"{path}: the column {feature.name!r} has gaps.")
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            lengths = pc.min_max(pc.list_value_length(values)).as_py()
            if lengths["min"] != lengths["max"]:
                raise ValueError(f"{path}: the rows of the column {feature.name!r} differ in length.")
        elif not pa.types.is_fixed_size_list(values.type):
            return values
        values = values.flatten()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns whatever Arrow says of a damaged file into one sentence."""
    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, KeyError, OverflowError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"{path} is damaged or not a Parquet file ({reason}).") from error
