"""Parquet files: their footers, ranges of their rows, and what must not be unpacked."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robopref.formats.lerobot.layout import Feature
from robopref.formats.lerobot.parquet import ParquetTable, Rows, column, read_footer, to_numpy

TABLE = pa.table(
    {
        "number": np.arange(10, dtype=np.int64),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(30, dtype=np.float32)), 3),
        "vector.of": pa.array([[1.0]] * 10),
        "picture": pa.array([{"bytes": b"x", "path": None}] * 10),
        "text": ["a"] * 10,
        "nested": pa.array([[[1, 2], [3, 4]]] * 10),
    }
)


@pytest.mark.parametrize("options", [{}, {"row_group_size": 4}, {"compression": "zstd", "write_page_index": True}])
def test_footers_are_read_as_arrow_reads_them(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(TABLE, path, **options)
    metadata = pq.read_metadata(path)
    groups = read_footer(path)
    assert len(groups) == metadata.num_row_groups
    for number, group in enumerate(groups):
        expected = metadata.row_group(number)
        assert group.rows == expected.num_rows
        chunks = [expected.column(index) for index in range(expected.num_columns)]
        assert [tuple(chunk) for chunk in group.chunks] == [
            (chunk.num_values, chunk.total_uncompressed_size) for chunk in chunks
        ]


@settings(max_examples=200)
@given(st.binary(max_size=60), st.booleans())
def test_footers_of_noise_are_refused(noise: bytes, whole: bool) -> None:
    end = noise + len(noise).to_bytes(4, "little") + b"PAR1" if whole else noise
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"PAR1" + end)
        file.flush()
        try:
            groups = read_footer(Path(file.name))
        except ValueError as error:
            problem = str(error)
            groups = []
        else:
            problem = None
    assert problem is None or "is damaged" in problem
    assert all(group.rows >= 0 for group in groups)


def test_lists_without_end_are_not_believed(tmp_path: Path) -> None:
    # A list of 2**60 structs, in field 4: the first of which never ends.
    footer = bytes([0x49, 0xFC, *[0xFF] * 8, 0x0F])
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ValueError, match="its footer cannot be read"):
        read_footer(path)
    # Structs within structs, deeper than any footer has.
    footer = bytes([0x1C] * 5000)
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ValueError, match="its footer cannot be read"):
        read_footer(path)


@pytest.mark.parametrize("group", [1, 3, 100])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_any_range_of_rows_is_read(tmp_path: Path, group: int, batch: int) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(TABLE, path, row_group_size=group)
    table = ParquetTable(path)
    assert table.num_rows == 10
    feature = Feature("vector", "float32", (3,))
    for begin, end in [(0, 10), (0, 1), (9, 10), (2, 7), (3, 6)]:
        batches = table.batches(Rows(path, begin, end), ["vector", "number"], {"vector": 3}, batch_size=batch)
        parts = [
            (column(each, "number").to_numpy(), to_numpy(column(each, "vector"), feature, path)) for each in batches
        ]
        np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), np.arange(begin, end))
        vectors = np.arange(30, dtype=np.float32).reshape(10, 3)[begin:end]
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), vectors, strict=True)
    table.close()


@pytest.mark.parametrize("rows", [(0, 11), (5, 5), (-1, 3), (10, 11)])
def test_rows_that_are_not_there(tmp_path: Path, rows: tuple[int, int]) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(TABLE, path)
    with pytest.raises(ValueError, match=r"x\.parquet has 10 rows where the rows"):
        list(ParquetTable(path).batches(Rows(path, *rows), ["number"], {}))
    with pytest.raises(ValueError, match=r"x\.parquet has 10 rows where the rows 0 to 8"):
        list(ParquetTable(path).batches(Rows(path, 0, 9, all=True), ["number"], {}))


def test_a_few_bytes_that_stand_for_many_numbers_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"vector": pa.array([np.zeros(3_000_000), np.zeros(3)])}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match="'vector' has 3000003 values in 2 rows, where 6 are needed"):
        list(ParquetTable(path).batches(Rows(path, 0, 1), ["vector"], {"vector": 3}))
    table = pa.table({"picture": pa.array([{"bytes": bytes(5_000_000), "path": ""}])})
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"'picture' unpacks to 50000.. bytes in one row group, which is too much"):
        list(ParquetTable(path).batches(Rows(path, 0, 1), ["picture"], {}, most=1_000_000))
    # What Arrow would read beside a column of a shorter name counts too.
    table = pa.table({"a": [1], "a.b": pa.array([bytes(5_000_000)])})
    pq.write_table(table, path, compression="zstd")
    with pytest.raises(ValueError, match=r"'a\.b' unpacks to 50000.. bytes"):
        list(ParquetTable(path).batches(Rows(path, 0, 1), ["a"], {}, most=1_000_000))


def test_pages_that_changed_are_found_by_their_checksums(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(TABLE.select(["number"]), path, write_page_checksum=True, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    place = content.index((5).to_bytes(8, "little"))
    content[place] = 7
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.parquet is damaged .*(CRC|corrupt)"):
        list(ParquetTable(path).batches(Rows(path, 0, 10), ["number"], {}))


@pytest.mark.parametrize(
    ("values", "feature", "message"),
    [
        (pa.array([1, None]), Feature("x", "int64", (1,)), "has gaps"),
        (pa.array([[1], [1, 2]]), Feature("x", "int64", (1,)), "differ in length"),
        (pa.array([[1, None]]), Feature("x", "int64", (2,)), "has gaps"),
        (pa.array(["a"]), Feature("x", "int64", (1,)), "has 1 values of type string in 1 rows"),
        (pa.array([[1, 2]]), Feature("x", "int64", (3,)), r"has 2 values of type int64 in 1 rows, where int64 \[3\]"),
    ],
)
def test_columns_of_other_kinds(values: pa.Array, feature: Feature, message: str) -> None:
    with pytest.raises(ValueError, match=rf"y: .*{message}"):
        to_numpy(values, feature, Path("y"))


def test_columns_take_the_declared_type_and_shape() -> None:
    array = to_numpy(pa.array([[[1, 2], [3, 4]]]), Feature("x", "float32", (2, 2)), Path("y"))
    np.testing.assert_array_equal(array, np.array([[[1, 2], [3, 4]]], np.float32), strict=True)
    array = to_numpy(pa.array([True, False]), Feature("x", "bool", (1,)), Path("y"))
    np.testing.assert_array_equal(array, [[True], [False]], strict=True)
