"""The preference record: labels on disk as a Parquet table, one row per query, that anybody can open with pandas.

| column         | type                 | meaning                                                              |
| -------------- | -------------------- | -------------------------------------------------------------------- |
| schema_version | int32                | 1                                                                    |
| dataset        | string               | hash of the episode dataset that the segments lie in                 |
| episodes       | list<int32>          | episode of each of the K candidate segments                          |
| starts         | list<int32>          | first step of each                                                   |
| length         | int32                | steps of a segment                                                   |
| label          | double               | P(second segment preferred); null if skipped or K-wise               |
| order          | list<int32>          | candidate indices, best first; null if skipped or answered by label  |
| labeler        | string               | who answered                                                         |
| parameters     | string               | of the labeler, as JSON                                              |
| created        | timestamp[us, UTC]   | when                                                                 |

A file is about one dataset, one segment length and one K. It may hold the labels of several labelers, each with one set
of parameters. Other columns are kept and ignored. Rows are counted from 0, as pandas does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from robopref.episodes import EpisodeDataset
from robopref.files import atomic_write
from robopref.queries import Labels, Queries, check_answers, misplaced_segment

SCHEMA_VERSION = 1

SCHEMA = pa.schema(
    [
        pa.field("schema_version", pa.int32()),
        pa.field("dataset", pa.string()),
        pa.field("episodes", pa.list_(pa.int32())),
        pa.field("starts", pa.list_(pa.int32())),
        pa.field("length", pa.int32()),
        pa.field("label", pa.float64()),
        pa.field("order", pa.list_(pa.int32())),
        pa.field("labeler", pa.string()),
        pa.field("parameters", pa.string()),
        pa.field("created", pa.timestamp("us", tz="UTC")),
    ]
)

_MAY_BE_NULL = ("label", "order")


def write_records(path: str | os.PathLike[str], queries: Queries, labels: Labels) -> None:
    """Writes the labels of one labeler, atomically, in place of any file at `path`.

    Raises:
        ValueError: there are no labels, or they cannot be the answers to these queries.
        OSError: the folder cannot be written to.
    """
    _write(path, _table(path, queries, labels))


def append_records(path: str | os.PathLike[str], queries: Queries, labels: Labels) -> None:
    """Adds labels after those in the file, or begins one; the file is replaced atomically.

    One process at a time may append to a file.

    Raises:
        ValueError: the file is no preference record or is about another dataset, length or K; or the labeler is in it
            with other parameters.
        OSError: the file cannot be read or the folder cannot be written to.
    """
    added = _table(path, queries, labels)
    if not Path(path).exists():
        _write(path, added)
        return
    present = _read(path)
    _check_rows(path, present, queries.dataset)
    here = (queries.length, queries.candidates)
    there = (present["length"][0].as_py(), len(present["episodes"][0]))
    if here != there:
        raise ValueError(
            f"{path} holds queries of {there[1]} segments of {there[0]} steps; queries of {here[1]} segments of "
            f"{here[0]} steps belong into another file."
        )
    mine = present.filter(pc.equal(present["labeler"], labels.labeler))
    if mine.num_rows and json.loads(mine["parameters"][0].as_py()) != labels.parameters:
        raise ValueError(
            f"{path} holds labels of {labels.labeler!r} with the parameters {mine['parameters'][0].as_py()}; with "
            "others it needs another name or another file."
        )
    _are_orders(path, pa.concat_tables([mine.select(SCHEMA.names), added]))
    _write(path, pa.concat_tables([present, added], promote_options="default"))


def read_records(
    path: str | os.PathLike[str], dataset: EpisodeDataset, labeler: str | None = None
) -> tuple[Queries, Labels]:
    """The queries that one labeler was shown, and its labels, in the order of the file.

    `Labels.created` is the time of the latest row. Pairs that were all skipped come back with values.

    Args:
        dataset: the one that the record is about.
        labeler: whose labels; may be left out where the file holds those of one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or foreign, a row is wrong (the message names it), or the labeler is not in it
            or must be chosen.
        OSError: the file cannot be read.
    """
    table = _read(path)
    _check_rows(path, table, dataset)
    names = table["labeler"].unique().to_pylist()
    if labeler is None and len(names) > 1:
        raise ValueError(f"{path} holds labels of {_listing(names)}; choose one of these labelers.")
    if labeler is not None and labeler not in names:
        raise ValueError(f"{path} holds no labels of {labeler!r}, only of {_listing(names)}.")
    chosen = table.filter(pc.equal(table["labeler"], names[0] if labeler is None else labeler))
    candidates = len(chosen["episodes"][0])
    episodes, starts = _matrix(chosen["episodes"], candidates), _matrix(chosen["starts"], candidates)
    queries = Queries(dataset, episodes, starts, chosen["length"][0].as_py())
    orders_given = _are_orders(path, chosen)
    shared: Mapping[str, Any] = {
        "labeler": chosen["labeler"][0].as_py(),
        "parameters": json.loads(chosen["parameters"][0].as_py()),
        "created": pc.max(chosen["created"]).as_py().isoformat(),
    }
    if orders_given or candidates > 2:
        ranked = _not_null(chosen["order"])
        orders = np.full(episodes.shape, -1)
        orders[ranked] = _matrix(chosen["order"].drop_null(), candidates)
        return queries, Labels(orders=orders, answered=ranked, **shared)
    return queries, Labels(values=_floats(chosen["label"]), answered=_not_null(chosen["label"]), **shared)


def _are_orders(path: str | os.PathLike[str], answers: pa.Table) -> bool:
    """Whether a labeler answered by orders; raises `ValueError` if by labels as well."""
    labelled, ranked = (bool(_not_null(answers[name]).any()) for name in ("label", "order"))
    if labelled and ranked:
        name = answers["labeler"][0].as_py()
        raise ValueError(f"{path} cannot hold both labels and orders of {name!r}; keep them in two files.")
    return ranked


def _table(path: str | os.PathLike[str], queries: Queries, labels: Labels) -> pa.Table:
    check_answers(queries, labels)
    count = len(queries)
    if not count:
        raise ValueError(f"cannot write {path}: there are no labels to write.")
    skipped = ~labels.answered
    value = np.full(count, np.nan) if labels.values is None else labels.values
    order = np.zeros((count, 0), dtype=np.int64) if labels.orders is None else labels.orders
    no_order = np.ones(count, dtype=bool) if labels.orders is None else skipped
    constants = {
        "schema_version": SCHEMA_VERSION,
        "dataset": queries.dataset.hash,
        "length": queries.length,
        "labeler": labels.labeler,
        "parameters": json.dumps(labels.parameters),
        "created": datetime.fromisoformat(labels.created),
    }
    columns = {
        "episodes": _lists(queries.episodes),
        "starts": _lists(queries.starts),
        "label": pa.array(value, mask=skipped if labels.orders is None else np.ones(count, dtype=bool)),
        "order": _lists(order, no_order),
    }
    for name, constant in constants.items():
        columns[name] = pa.repeat(pa.scalar(constant, SCHEMA.field(name).type), count)
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _write(path: str | os.PathLike[str], table: pa.Table) -> None:
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def _read(path: str | os.PathLike[str]) -> pa.Table:
    """The table with every column of the schema in its type, and at least one row."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with pq.ParquetFile(Path(path), page_checksum_verification=True) as file:
            table = file.read()
        table.validate(full=True)
        present = table.column_names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or not a Parquet file: {_first_line(error)}.") from error
    missing = [name for name in SCHEMA.names if name not in present]
    if missing:
        raise ValueError(f"{path} is not a preference record: it has no column {_listing(missing)}.")
    for field in SCHEMA:
        position = table.column_names.index(field.name)
        try:
            table = table.set_column(position, field, table.column(position).cast(field.type))
        except pa.ArrowException as error:
            raise ValueError(
                f"{path} is not a preference record: column {field.name!r} is not {field.type} ({_first_line(error)})."
            ) from error
    if not table.num_rows:
        raise ValueError(f"{path} holds no labels.")
    return table


def _check_rows(path: str | os.PathLike[str], table: pa.Table, dataset: EpisodeDataset) -> None:
    """Raises `ValueError` for the first row that is no answer to a query about `dataset`."""

    def require(right: Bool[np.ndarray, " N"], name: str, rule: str) -> None:
        if not right.all():
            row = int(np.argmin(right))
            raise ValueError(f"{path}: row {row} has {name} {_shown(table[name][row].as_py())}, but {rule}.")

    for name in SCHEMA.names:
        if name not in _MAY_BE_NULL:
            require(_not_null(table[name]), name, "a value is needed")
    version = _integers(table["schema_version"])
    require(version == SCHEMA_VERSION, "schema_version", f"this robopref reads version {SCHEMA_VERSION}")
    same = _booleans(pc.equal(table["dataset"], dataset.hash))
    require(same, "dataset", f"the dataset {dataset.path} has the hash {_shown(dataset.hash)}")
    require(_booleans(pc.not_equal(table["labeler"], "")), "labeler", "a labeler has a name")
    length = _integers(table["length"])
    require(length >= 1, "length", "a segment has at least 1 step")
    require(length == length[0], "length", f"row 0 has {length[0]}, and a record is about one length")
    candidates = len(table["episodes"][0])
    require(_sizes(table["episodes"]) >= 2, "episodes", "a query has at least 2 candidates")
    for name in ("episodes", "starts"):
        require(_whole(table[name]), name, "a value is needed for each candidate")
        require(_sizes(table[name]) == candidates, name, f"the queries of this record have {candidates} candidates")
    episodes, starts = _matrix(table["episodes"], candidates), _matrix(table["starts"], candidates)
    problem = misplaced_segment(dataset, episodes, starts, int(length[0]))
    if problem:
        raise ValueError(f"{path}: row {problem[0]} is wrong: {problem[1]}.")
    label, labelled, ranked = _floats(table["label"]), _not_null(table["label"]), _not_null(table["order"])
    require(~labelled | ((label >= 0) & (label <= 1)), "label", "a label lies between 0 and 1")
    require(~labelled | (candidates == 2), "label", f"queries of {candidates} candidates are answered by an order")
    require(~(labelled & ranked), "order", "the row has a label too, and an answer is one of the two")
    require(
        _permutations(table["order"], candidates) | ~ranked, "order", f"an order ranks 0 to {candidates - 1} once each"
    )
    _check_parameters(path, table)


def _check_parameters(path: str | os.PathLike[str], table: pa.Table) -> None:
    """Raises `ValueError` unless parameters are JSON objects, and the same throughout for each labeler."""
    known: dict[str, tuple[int, Any]] = {}
    parsed: dict[str, Any] = {}
    for row, (labeler, text) in enumerate(
        zip(table["labeler"].to_pylist(), table["parameters"].to_pylist(), strict=True)
    ):
        if text not in parsed:
            try:
                parsed[text] = json.loads(text, parse_constant=_refuse_constant)
            except (ValueError, RecursionError):
                parsed[text] = None
        if not isinstance(parsed[text], dict):
            raise ValueError(f"{path}: row {row} has parameters {_shown(text)}, but they are a JSON object.")
        first, parameters = known.setdefault(labeler, (row, parsed[text]))
        if parameters != parsed[text]:
            raise ValueError(
                f"{path}: row {row} has other parameters than row {first}, though {labeler!r} gave both; a labeler has "
                "one set of parameters in a record."
            )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _lists(rows: Int[np.ndarray, "N K"], null: Bool[np.ndarray, " N"] | None = None) -> pa.ListArray:
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    values = pa.array(rows.astype(np.int32).ravel())
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=None if null is None else pa.array(null))


def _matrix(column: pa.ChunkedArray, size: int) -> Int[np.ndarray, "N K"]:
    """A column of lists of `size` numbers, none of them null."""
    values = np.asarray(pc.list_flatten(column).to_numpy(), dtype=np.int64)
    return values.reshape(-1, size)


def _permutations(column: pa.ChunkedArray, size: int) -> Bool[np.ndarray, " N"]:
    everyone = set(range(size))
    return np.array([each is not None and len(each) == size and set(each) == everyone for each in column.to_pylist()])


def _whole(column: pa.ChunkedArray) -> Bool[np.ndarray, " N"]:
    """Which lists have no null inside."""
    if not pc.list_flatten(column).null_count:
        return np.ones(len(column), dtype=bool)
    return np.array([None not in each for each in column.to_pylist()])


def _sizes(column: pa.ChunkedArray) -> Int[np.ndarray, " N"]:
    return _integers(pc.list_value_length(column))


def _integers(column: pa.ChunkedArray) -> Int[np.ndarray, " N"]:
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """Null becomes NaN."""
    return np.array(column.to_numpy(), dtype=np.float64)


def _booleans(column: pa.ChunkedArray) -> Bool[np.ndarray, " N"]:
    return np.asarray(column.to_numpy(), dtype=bool)


def _not_null(column: pa.ChunkedArray) -> Bool[np.ndarray, " N"]:
    return _booleans(pc.is_valid(column))


def _listing(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _shown(value: Any) -> str:
    text = "none" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
