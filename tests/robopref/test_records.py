from __future__ import annotations

from datetime import UTC, datetime

import gymnasium
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robopref.episodes import load_episodes, write_episodes
from robopref.queries import Labels, Queries, draw_queries
from robopref.records import SCHEMA, append_records, read_records, write_records
from robopref.types import Episode

LENGTHS = [6, 3, 10]
CREATED = "2024-05-01T12:00:00.000001+00:00"


def make_dataset(path, scale=1.0):
    box = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    episodes = [Episode(scale * np.ones((n + 1, 1)), np.ones((n, 1)), np.ones(n), False, True) for n in LENGTHS]
    write_episodes(path, episodes, observation_space=box, action_space=box, env={})
    return load_episodes(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("records") / "store")


@pytest.fixture(scope="module")
def queries(dataset):
    return Queries(dataset, np.array([[0, 2], [1, 1], [2, 0], [2, 2]]), np.array([[3, 7], [0, 0], [1, 0], [0, 1]]), 3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.parquet"


def labels(values=(0, 1, np.nan, 0.25), **changes):
    values = np.array(values, float)
    fields = {"values": values, "answered": ~np.isnan(values), "labeler": "teacher", "created": CREATED}
    return Labels(**{**fields, **changes})


def assert_same(found, expected):
    (found_queries, found_labels), (queries, labels) = found, expected
    np.testing.assert_array_equal(found_queries.episodes, queries.episodes)
    np.testing.assert_array_equal(found_queries.starts, queries.starts)
    assert found_queries.length == queries.length
    for name in ("values", "orders", "answered"):
        left, right = getattr(found_labels, name), getattr(labels, name)
        assert (left is None) == (right is None), name
        if right is not None:
            np.testing.assert_array_equal(left, right)
    for name in ("labeler", "parameters", "created"):
        assert getattr(found_labels, name) == getattr(labels, name)


@st.composite
def answered_queries(draw, dataset):
    """Queries with K from 2 to 4 and answers of either kind, some of them skipped."""
    count, candidates = draw(st.integers(1, 6)), draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    queries = draw_queries(dataset, rng, count=count, length=draw(st.integers(1, 7)), candidates=candidates)
    answered = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    values = orders = None
    if candidates == 2 and (not answered.any() or draw(st.booleans())):
        probabilities = draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
        values = np.where(answered, probabilities, np.nan)
    else:
        ranked = draw(st.lists(st.permutations(range(candidates)), min_size=count, max_size=count))
        orders = np.where(answered[:, None], ranked, -1)
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    return queries, Labels(
        values=values,
        orders=orders,
        answered=answered,
        labeler=draw(st.text(min_size=1)),
        parameters=draw(st.dictionaries(st.text(), scalars | st.lists(scalars, max_size=3), max_size=4)),
        created=draw(st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))).isoformat(),
    )


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_round_trip_is_exact(dataset, path, data):
    expected = data.draw(answered_queries(dataset))
    write_records(path, *expected)
    assert_same(read_records(path, dataset), expected)


def test_the_table_is_what_pandas_users_expect(dataset, queries, path):
    write_records(path, queries, labels(parameters={"temperature": 0.5}))
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    assert table.to_pylist()[0] == {
        "schema_version": 1,
        "dataset": dataset.hash,
        "episodes": [0, 2],
        "starts": [3, 7],
        "length": 3,
        "label": 0.0,
        "order": None,
        "labeler": "teacher",
        "parameters": '{"temperature": 0.5}',
        "created": datetime.fromisoformat(CREATED),
    }
    assert table["label"].to_pylist() == [0, 1, None, 0.25]


def test_orders_are_null_where_skipped(dataset, path):
    queries = draw_queries(dataset, np.random.default_rng(0), count=2, length=2, candidates=3)
    answers = Labels(orders=np.array([[-1] * 3, [2, 0, 1]]), answered=np.array([False, True]), labeler="person")
    write_records(path, queries, answers)
    table = pq.read_table(path)
    assert table["order"].to_pylist() == [None, [2, 0, 1]]
    assert table["label"].null_count == 2
    assert_same(read_records(path, dataset), (queries, answers))


def test_queries_of_three_that_were_all_skipped(dataset, path):
    queries = draw_queries(dataset, np.random.default_rng(0), count=2, length=2, candidates=3)
    answers = Labels(orders=np.full((2, 3), -1), answered=np.zeros(2, bool), labeler="person", created=CREATED)
    write_records(path, queries, answers)
    assert_same(read_records(path, dataset), (queries, answers))


def test_writing_replaces_and_appending_adds(dataset, queries, path):
    first, second = np.array([0, 1]), np.array([2, 3])
    later = "2024-05-02T12:00:00.000000+00:00"
    append_records(path, queries.take(first), labels().take(first))
    append_records(path, queries.take(second), labels(created=later).take(second))
    assert_same(read_records(path, dataset), (queries, labels(created=later)))
    assert pq.read_table(path)["created"].to_pylist()[0] == datetime.fromisoformat(CREATED)
    write_records(path, queries.take(first), labels().take(first))
    assert_same(read_records(path, dataset), (queries.take(first), labels().take(first)))


def test_several_labelers(dataset, queries, path):
    person = labels([1, np.nan], labeler="person", parameters={"name": "A"})
    write_records(path, queries, labels())
    append_records(path, queries.take(np.array([3, 0])), person)
    assert_same(read_records(path, dataset, "teacher"), (queries, labels()))
    assert_same(read_records(path, dataset, labeler="person"), (queries.take(np.array([3, 0])), person))
    with pytest.raises(ValueError, match="holds labels of 'teacher', 'person'; choose one"):
        read_records(path, dataset)
    with pytest.raises(ValueError, match="no labels of 'model', only of 'teacher', 'person'"):
        read_records(path, dataset, "model")


def test_other_columns_are_kept(dataset, queries, path):
    write_records(path, queries, labels())
    table = pq.read_table(path)
    pq.write_table(table.add_column(0, "remark", pa.array(["a", "b", "c", "d"])), path)
    append_records(path, queries, labels())
    assert pq.read_table(path)["remark"].to_pylist() == ["a", "b", "c", "d", None, None, None, None]
    assert len(read_records(path, dataset)[1]) == 8


def test_wider_types_of_other_writers_are_read(dataset, queries, path):
    write_records(path, queries, labels())
    table = pq.read_table(path)
    wide = {"episodes": pa.list_(pa.int64()), "length": pa.int64(), "created": pa.timestamp("ns", "UTC")}
    for name, kind in wide.items():
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    pq.write_table(table, path)
    assert_same(read_records(path, dataset), (queries, labels()))


@pytest.mark.parametrize(
    ("length", "changes", "message"),
    [
        (3, {"parameters": {"x": 1}}, "holds labels of 'teacher' with the parameters {}"),
        (2, {}, r"holds queries of 2 segments of 3 steps; queries of 2 segments of 2 steps belong"),
        (3, {"values": None, "orders": np.array([[0, 1]] * 4)}, "cannot hold both labels and orders of 'teacher'"),
    ],
)
def test_appending_what_does_not_belong(queries, path, length, changes, message):
    write_records(path, queries, labels())
    before = path.read_bytes()
    if "orders" in changes:
        changes = {**changes, "answered": np.ones(4, bool)}
    shown = Queries(queries.dataset, queries.episodes, queries.starts, length)
    with pytest.raises(ValueError, match=message):
        append_records(path, shown, Labels(**{**vars(labels()), **changes}))
    assert path.read_bytes() == before


def test_appending_to_the_record_of_another_dataset(tmp_path, queries, path):
    other = make_dataset(tmp_path / "other", scale=2)
    write_records(path, Queries(other, queries.episodes, queries.starts, 3), labels())
    with pytest.raises(ValueError, match=r"row 0 has dataset .*, but the dataset .* has the hash"):
        append_records(path, queries, labels())


def test_nothing_is_written_without_labels_or_with_wrong_ones(queries, path):
    nothing = np.array([], int)
    with pytest.raises(ValueError, match="no labels to write"):
        write_records(path, queries.take(nothing), labels().take(nothing))
    with pytest.raises(ValueError, match="2 labels cannot answer 4 queries"):
        write_records(path, queries, labels([0, 1]))
    assert not path.exists()


def edited(rows, **columns):
    """The table with some cells of row 2 replaced, and columns in the schema's types."""
    rows = [dict(row) for row in rows]
    rows[2].update(columns)
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version 2, but this robopref reads version 1"),
        ({"dataset": "0" * 64}, r"dataset '0+\.\.\., but the dataset .*store has the hash"),
        ({"dataset": None}, "dataset none, but a value is needed"),
        ({"episodes": [0, 3]}, "is wrong: there is no episode 3 among the 3"),
        ({"episodes": [0]}, r"episodes \[0\], but a query has at least 2 candidates"),
        ({"episodes": [0, 1, 2]}, r"episodes \[0, 1, 2\], but the queries of this record have 2 candidates"),
        ({"episodes": [0, None]}, r"episodes \[0, None\], but a value is needed"),
        ({"starts": None}, "starts none, but a value is needed"),
        ({"starts": [0]}, r"starts \[0\], but the queries"),
        ({"starts": [8, 0]}, "is wrong: steps 8 to 11 do not lie within episode 2"),
        ({"starts": [-1, 0]}, "is wrong: steps -1 to 2"),
        ({"length": 4}, "length 4, but row 0 has 3"),
        ({"length": 0}, "length 0, but a segment has at least 1 step"),
        ({"label": 1.5}, r"label 1\.5, but a label lies between 0 and 1"),
        ({"label": -0.5}, r"label -0\.5"),
        ({"label": float("nan")}, "label nan, but a label lies"),
        ({"label": 1.0, "order": [0, 1]}, r"order \[0, 1\], but the row has a label too"),
        ({"order": [1, 1]}, r"order \[1, 1\], but an order ranks 0 to 1 once each"),
        ({"order": [0, None]}, r"order \[0, None\], but an order ranks"),
        ({"order": []}, r"order \[\], but an order ranks"),
        ({"labeler": None}, "labeler none, but a value is needed"),
        ({"labeler": ""}, "labeler '', but a labeler has a name"),
        ({"parameters": "[1]"}, r"parameters '\[1\]', but they are a JSON object"),
        ({"parameters": "{"}, "parameters '{', but they are a JSON object"),
        ({"parameters": '{"a": NaN}'}, "parameters .* but they are a JSON object"),
        ({"parameters": '{"a": 1}'}, "other parameters than row 0, though 'teacher' gave both"),
        ({"created": None}, "created none, but a value is needed"),
    ],
)
def test_a_wrong_row_is_named(dataset, queries, path, change, message):
    write_records(path, queries, labels())
    pq.write_table(edited(pq.read_table(path).to_pylist(), **change), path)
    with pytest.raises(ValueError, match=rf"^[^\n]*labels\.parquet: row 2 (has )?{message}[^\n]*\.$"):
        read_records(path, dataset)


def test_labels_of_queries_of_three(dataset, path):
    queries = draw_queries(dataset, np.random.default_rng(0), count=3, length=2, candidates=3)
    write_records(path, queries, Labels(orders=np.array([[2, 0, 1]] * 3), answered=np.ones(3, bool), labeler="teacher"))
    pq.write_table(edited(pq.read_table(path).to_pylist(), label=0.5, order=None), path)
    with pytest.raises(ValueError, match=r"row 2 has label 0\.5, but queries of 3 candidates are answered by an order"):
        read_records(path, dataset)


def test_labels_and_orders_of_one_labeler(dataset, queries, path):
    write_records(path, queries, labels())
    pq.write_table(edited(pq.read_table(path).to_pylist(), order=[1, 0]), path)
    with pytest.raises(ValueError, match="cannot hold both labels and orders of 'teacher'"):
        read_records(path, dataset)


def test_another_dataset(tmp_path, queries, path):
    write_records(path, queries, labels())
    with pytest.raises(ValueError, match=r"labels\.parquet: row 0 has dataset .* has the hash"):
        read_records(path, make_dataset(tmp_path / "other", scale=2))


def test_a_missing_file(dataset, path):
    with pytest.raises(FileNotFoundError, match=r"labels\.parquet does not exist\.$"):
        read_records(path, dataset)


@pytest.mark.parametrize("kept", [0, 3, 0.5, 0.99])
def test_a_truncated_file(dataset, queries, path, kept):
    write_records(path, queries, labels())
    data = path.read_bytes()
    path.write_bytes(data[: kept if kept > 1 else int(kept * len(data))])
    with pytest.raises(ValueError, match=r"^[^\n]*labels\.parquet is damaged or not a Parquet file: [^\n]+\.$"):
        read_records(path, dataset)


def test_a_renamed_csv(dataset, path):
    path.write_text("episodes,starts,label\n0,0,1\n" * 10)
    with pytest.raises(ValueError, match=r"labels\.parquet is damaged or not a Parquet file"):
        read_records(path, dataset)


@pytest.mark.parametrize("name", SCHEMA.names)
def test_a_missing_column(dataset, queries, path, name):
    write_records(path, queries, labels())
    pq.write_table(pq.read_table(path).drop_columns(name), path)
    with pytest.raises(ValueError, match=f"is not a preference record: it has no column '{name}'"):
        read_records(path, dataset)


def test_a_foreign_schema(dataset, queries, path):
    pq.write_table(pa.table({"prompt": ["a"], "chosen": ["b"]}), path)
    with pytest.raises(ValueError, match="is not a preference record: it has no column 'schema_version', 'dataset'"):
        read_records(path, dataset)
    write_records(path, queries, labels())
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "episodes", pa.array(["0 and 2"] * 4)), path)
    with pytest.raises(ValueError, match=r"column 'episodes' is not list<.*int32>"):
        read_records(path, dataset)
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(ValueError, match=r"labels\.parquet holds no labels"):
        read_records(path, dataset)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_changed_byte_never_gives_other_answers(dataset, queries, path, position, mask):
    write_records(path, queries, labels(parameters={"temperature": 0.5}))
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= mask
    path.write_bytes(data)
    try:
        found = read_records(path, dataset)
    except ValueError as error:
        message = str(error)
    else:
        assert_same(found, (queries, labels(parameters={"temperature": 0.5})))
        return
    assert message.startswith(str(path))
    assert "\n" not in message
