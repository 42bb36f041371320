"""Tables of rows: what is read of them, what a change writes again, and how rows are found."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.archive import delta, row_table
from storage.archive.column_index import ColumnIndex
from storage.archive.row_table import NONE, Check, Rows, RowTable
from storage.checks import InvalidValue
from storage.errors import ArchiveError, DamagedError
from storage.files import local_path, to_uri

SCHEMA = pa.schema([pa.field("name", pa.string()), pa.field("size", pa.int64())])


def rows_named(*names):
    return pa.table({"name": names, "size": [len(name) for name in names]}, SCHEMA)


@pytest.fixture
def table(tmp_path):
    """A table of no rows."""
    os.makedirs(tmp_path / "table")
    delta.create_table(to_uri(tmp_path / "table"), SCHEMA)
    return RowTable(to_uri(tmp_path / "table"), SCHEMA)


def add(table, *names):
    table.change(lambda rows: (NONE, rows_named(*names)))


def files_in(table):
    """The files of a table's folder."""
    return {*os.listdir(local_path(table.uri))}


def files_of(table):
    return set(delta.live_files(delta.open_table(table.uri)).column("path").to_pylist())


@given(
    st.lists(st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=20))),
    st.lists(st.text(max_size=3), max_size=5),
)
def test_rows_are_found_by_their_texts(texts, others):
    rows = Rows.of(pa.table({"text": pa.array(texts, pa.string())}))
    others = [text for text in others if text.isascii()]
    wanted = {*texts[::2], *others}
    expected = [place for place, text in enumerate(texts) if text is not None and text in wanted]
    assert rows.find("text", wanted).tolist() == expected


@given(st.lists(st.one_of(st.none(), st.integers(-(2**31), 2**31 - 1))), st.integers(-5, 5))
def test_rows_are_found_by_their_numbers(numbers, other):
    rows = Rows.of(pa.table({"number": pa.array(numbers, pa.int32())}))
    wanted = {*numbers[::3], other}
    expected = [place for place, number in enumerate(numbers) if number is not None and number in wanted]
    assert rows.find("number", wanted).tolist() == expected


@pytest.mark.parametrize("number", [2**31, 2**40, -(2**70)])
def test_a_number_that_no_row_can_have_is_in_none(number):
    rows = Rows.of(pa.table({"number": pa.array([1, 2], pa.int32())}))
    assert rows.find("number", [number, 2]).tolist() == [1]


def test_threads_read_the_columns_of_one_table(table):
    add(table, *(f"row {number}" for number in range(20_000)))

    def read(place):
        if place % 2:
            return shared.column("size").to_pylist()[-1]
        return shared.find("name", [f"row {place}"]).tolist()

    for _ in range(20):
        shared = RowTable(table.uri, SCHEMA).rows()
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(read, range(4), timeout=300)) == [[0], 9, [2], 9]


def test_a_change_that_cannot_be_written_leaves_no_file(table, monkeypatch):
    monkeypatch.setattr(row_table, "MOST_ROWS", 2)
    add(table, "one")
    before, write, written = files_in(table), row_table.write_bytes, []

    def fail_at_third(uri, data):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(uri)
        write(uri, data)

    monkeypatch.setattr(row_table, "write_bytes", fail_at_third)
    with pytest.raises(ArchiveError, match="No space"):
        add(table, *(f"row {number}" for number in range(7)))
    assert len(written) == 2
    assert files_in(table) == before


def test_texts_that_differ_in_one_place_alone_have_other_hashes():
    texts = pa.array([f"file:///{'x' * length}{digit}/clip.mp4" for length in range(40) for digit in range(10)])
    index = ColumnIndex(pa.chunked_array([texts[:7], texts[7:]]))
    for place in range(0, len(texts), 13):
        assert index.candidates(texts.slice(place, 1)).tolist() == [place]


def test_rows_are_taken_from_the_files_that_hold_them(table, monkeypatch):
    monkeypatch.setattr(row_table, "MOST_ROWS", 3)
    for start in range(0, 9, 3):
        add(table, *(f"row {number}" for number in range(start, start + 3)))
    rows = table.rows()
    names = rows.column("name").to_pylist()
    places = rows.find("name", ["row 1", "row 8", "row 3", "none"])
    assert sorted(names[place] for place in places) == ["row 1", "row 3", "row 8"]
    assert rows.take(places).column("name").to_pylist() == [names[place] for place in places]
    assert rows.take(places, ["size"]).column("size").to_pylist() == [5, 5, 5]


def test_a_change_of_one_row_leaves_the_full_files_of_the_others_alone(table, monkeypatch):
    monkeypatch.setattr(row_table, "MOST_ROWS", 4)
    for start in range(0, 16, 4):
        add(table, *(f"row {number}" for number in range(start, start + 4)))
    before = files_of(table)
    assert len(before) == 4
    table.change(lambda rows: (rows.find("name", ["row 5"]), rows_named("row five")))
    assert len(before & files_of(table)) == 3
    assert sorted(table.rows().column("name").to_pylist()) == sorted(
        [*(f"row {number}" for number in range(16) if number != 5), "row five"]
    )


def test_more_rows_than_a_file_takes_are_written_to_several(table, monkeypatch):
    monkeypatch.setattr(row_table, "MOST_ROWS", 4)
    add(table, *(f"row {number}" for number in range(10)))
    assert len(files_of(table)) == 3
    assert len(table.rows()) == 10


def test_a_version_can_be_read_after_its_files_were_removed(table):
    add(table, "first")
    reader = RowTable(table.uri, SCHEMA)
    rows = reader.rows()
    table.change(lambda there: (np.arange(len(there)), rows_named("second")))
    for path in Path(table.uri.removeprefix("file://")).glob("*.parquet"):
        path.unlink()
    assert rows.column("name").to_pylist() == ["first"]


def test_a_check_runs_once_all_its_columns_are_read(table):
    add(table, "long", "short")

    def fits(rows):
        if [len(name) for name in rows.column("name").to_pylist()] != [2, 2]:
            raise InvalidValue("a name does not fit")

    other = RowTable(table.uri, SCHEMA, [Check(("name", "size"), fits)])
    assert other.rows().column("size").to_pylist() == [4, 5]
    with pytest.raises(DamagedError, match="a name does not fit"):
        other.rows().column("name")
