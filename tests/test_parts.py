"""What a written part holds: read in place, through pyarrow and through DuckDB, and when it is damaged."""

import errno
import json
import os
import subprocess

import duckdb
import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_archive import new_writer, random_rows, video_id_of, write_part

from storage.errors import ArchiveError
from storage.files import to_uri
from storage.parts.layout import BINARY
from storage.parts.read import (
    has_column,
    read_cells,
    read_compressor_out,
    read_keys,
    read_patches,
    read_thumbnails,
    read_tokens,
)
from storage.parts.write import PartWriter
from storage.records import FrameRef

VIDEO = video_id_of(7)


def refs_to(part, rows, number=3):
    return [FrameRef(VIDEO, number, 25 * row, 10 * row, float(row), 1.0, part.path, row) for row in rows]


def write(folder, rows, **options):
    return write_part(to_uri(str(folder)), rows, video_id=VIDEO, number=3, **options)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 40),
    token_shape=st.tuples(st.integers(1, 4), st.integers(1, 50)),
    width=st.integers(1, 20),
    key_width=st.none() | st.integers(1, 20),
    patches=st.none() | st.tuples(st.integers(1, 5), st.integers(1, 9)),
    group_rows=st.integers(1, 50),
    batch=st.integers(1, 17),
    picks=st.data(),
)
def test_what_is_written_is_read_by_every_reader(
    tmp_path_factory, count, token_shape, width, key_width, patches, group_rows, batch, picks
):
    folder = tmp_path_factory.mktemp("frames")
    rows = random_rows(count, 1, token_shape, width, key_width, patches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.parts.layout.ROW_GROUP_ROWS", group_rows)
        part = write(folder, rows, batch=batch)
    chosen = picks.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20))
    refs, uri = refs_to(part, chosen), to_uri(str(folder))

    assert np.array_equal(read_tokens(uri, refs, token_shape), rows.tokens.token[chosen])
    assert np.array_equal(read_compressor_out(uri, refs), rows.tokens.compressor_out[chosen])
    assert read_thumbnails(uri, refs) == [rows.thumbnails[row] for row in chosen]
    assert has_column(uri, "search_key", refs) == (key_width is not None)
    assert has_column(uri, "patches", refs) == (patches is not None)
    if key_width is not None:
        assert np.array_equal(read_keys(uri, refs), rows.tokens.search_key[chosen])
    if patches is not None:
        found = read_patches(uri, refs)
        for name in ("values", "scales", "positions"):
            assert np.array_equal(getattr(found, name), getattr(rows.tokens.patches, name)[chosen])

    path = str(folder / part.path)
    table = pq.read_table(path, page_checksum_verification=True)
    assert table.column("token").to_pylist() == [token.tobytes() for token in rows.tokens.token]
    assert table.column("thumbnail").to_pylist() == rows.thumbnails
    assert table.column("ticks").to_pylist() == rows.columns.ticks.tolist()
    assert table.column("row").to_pylist() == list(range(count))
    assert ("patches" in table.column_names) == (patches is not None)
    seen = duckdb.execute("SELECT token, time_seconds, checksums FROM read_parquet($1) ORDER BY row", [path]).fetchall()
    assert [row[0] for row in seen] == [token.tobytes() for token in rows.tokens.token]
    assert [row[1] for row in seen] == rows.columns.time_seconds.tolist()
    assert [row[2] for row in seen] == table.column("checksums").to_pylist()


def test_the_checksums_are_crc32c_of_the_cells(tmp_path):
    part = write(tmp_path, random_rows(4, patches=(2, 3)))
    table = pq.read_table(tmp_path / part.path)
    for row in table.to_pylist():
        cells_of_row = [row[name] for name in BINARY if name != "checksums"]
        assert row["checksum"] == google_crc32c.value(b"".join(cells_of_row))
        each = np.frombuffer(row["checksums"], "<u4").tolist()
        assert each == [google_crc32c.value(cell) for cell in cells_of_row]


def test_a_part_names_its_rows_and_their_bounds(tmp_path):
    part = write(tmp_path, random_rows(30, start=100), key="1000..")
    table = pq.read_table(tmp_path / part.path)
    assert (part.row_count, part.size_bytes) == (30, os.path.getsize(tmp_path / part.path))
    assert set(table.column("segment").to_pylist()) == {"1000.."}
    assert set(table.column("time_base_den").to_pylist()) == {10}
    bounds = json.loads(part.stats_json)
    assert bounds["numRecords"] == 30
    assert bounds["minValues"]["time_seconds"] == 100.0
    assert bounds["maxValues"]["time_seconds"] == 129.0
    assert bounds["minValues"]["video_id"] == bounds["maxValues"]["video_id"] == VIDEO


def test_the_same_rows_give_the_same_bytes_however_they_are_appended(tmp_path):
    rows = random_rows(600, patches=(2, 8))
    files = [(tmp_path / write(tmp_path, rows, batch=batch).path).read_bytes() for batch in (1, 64, 600)]
    assert files[0] == files[1] == files[2]


def test_wide_columns_are_read_in_place(tmp_path):
    part = write(tmp_path, random_rows(600, patches=(2, 8)))
    data, footer = (tmp_path / part.path).read_bytes(), pq.read_metadata(tmp_path / part.path)
    table = pq.read_table(tmp_path / part.path)
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    assert [group.num_rows for group in groups] == [256, 256, 88]
    wide = {"token", "compressor_out", "search_key", "patches", "checksums"}
    for name in wide:
        cells, first = table.column(name).to_pylist(), 0
        stride = len(cells[0]) + 4  # a value follows its length
        for group in groups:
            chunk = next(
                group.column(at) for at in range(footer.num_columns) if group.column(at).path_in_schema == name
            )
            start = chunk.data_page_offset + chunk.total_compressed_size - group.num_rows * stride
            for row in (0, 1, group.num_rows - 1):
                place = start + row * stride + 4
                assert data[place : place + stride - 4] == cells[first + row]
            first += group.num_rows


def test_a_file_laid_out_otherwise_is_read_all_the_same(tmp_path):
    rows = random_rows(50, patches=(2, 8))
    part = write(tmp_path, rows)
    table = pq.read_table(tmp_path / part.path)
    pq.write_table(table, tmp_path / "other.parquet", compression="zstd", row_group_size=20, use_dictionary=True)
    refs = [FrameRef(VIDEO, 3, 0, 0, 0.0, 1.0, "other.parquet", row) for row in (49, 0, 21, 20)]
    uri = to_uri(str(tmp_path))
    assert np.array_equal(read_tokens(uri, refs), rows.tokens.token[[49, 0, 21, 20]])
    assert np.array_equal(read_patches(uri, refs).values, rows.tokens.patches.values[[49, 0, 21, 20]])


def test_frames_of_several_parts_come_in_the_order_asked_for(tmp_path):
    first, second = random_rows(300, 1), random_rows(20, 2)
    parts = [write(tmp_path, first), write(tmp_path, second)]
    refs = [*refs_to(parts[1], [5]), *refs_to(parts[0], [299, 0]), *refs_to(parts[1], [0])]
    wanted = [second.tokens.token[5], first.tokens.token[299], first.tokens.token[0], second.tokens.token[0]]
    assert np.array_equal(read_tokens(to_uri(str(tmp_path)), refs), np.stack(wanted))
    assert read_cells(to_uri(str(tmp_path)), "token", []).shape == (0, 0)


@pytest.mark.parametrize("column", ["token", "compressor_out", "search_key", "patches", "thumbnail"])
def test_one_wrong_bit_is_found_and_named(tmp_path, column):
    rows = random_rows(300, token_shape=(1, 64), patches=(2, 8))
    part = write(tmp_path, rows)
    table = pq.read_table(tmp_path / part.path)
    needle = table.column(column)[270].as_py()
    data = bytearray((tmp_path / part.path).read_bytes())
    data[data.index(needle) + len(needle) // 2] ^= 0x10
    (tmp_path / "bad.parquet").write_bytes(data)
    uri = to_uri(str(tmp_path))
    read = read_thumbnails if column == "thumbnail" else lambda uri, refs: read_cells(uri, column, refs)
    bad, good = (FrameRef(VIDEO, 3, 0, 0, 0.0, 1.0, "bad.parquet", row) for row in (270, 10))
    assert len(read(uri, [good])) == 1
    with pytest.raises(ArchiveError, match=r"bad\.parquet: damaged") as error:
        read(uri, [good, bad])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all" * 99])
def test_a_garbled_part_is_named(tmp_path, content):
    (tmp_path / "bad.parquet").write_bytes(content)
    ref = FrameRef(VIDEO, 3, 0, 0, 0.0, 1.0, "bad.parquet", 0)
    with pytest.raises(ArchiveError, match=r"bad\.parquet: damaged or unreadable"):
        read_tokens(to_uri(str(tmp_path)), [ref])


def test_a_missing_part_and_a_missing_row_are_named(tmp_path):
    part = write(tmp_path, random_rows(3))
    uri = to_uri(str(tmp_path))
    with pytest.raises(ArchiveError, match=r"gone\.parquet: missing"):
        read_tokens(uri, [FrameRef(VIDEO, 3, 0, 0, 0.0, 1.0, "gone.parquet", 0)])
    with pytest.raises(ArchiveError, match=r"row 3 of 3 is asked for"):
        read_tokens(uri, refs_to(part, [3]))
    with pytest.raises(ArchiveError, match=r"has no patches"):
        read_cells(uri, "patches", refs_to(part, [0]))
    with pytest.raises(ArchiveError, match=r"token of shape \(1, 24\)"):
        read_tokens(uri, refs_to(part, [0]), (4, 24))


def test_nothing_appended_leaves_no_file(tmp_path):
    writer = new_writer(to_uri(str(tmp_path)), video_id=VIDEO, number=3)
    assert writer.close() is None
    assert os.listdir(tmp_path) == []


def test_an_aborted_or_discarded_part_leaves_no_file(tmp_path):
    rows = random_rows(600)
    writer = new_writer(to_uri(str(tmp_path)), video_id=VIDEO, number=3)
    writer.append(rows.columns, rows.tokens, rows.thumbnails)
    assert all(name.endswith(".tmp") for name in os.listdir(tmp_path))
    assert len(os.listdir(tmp_path)) == 1
    writer.abort()
    assert os.listdir(tmp_path) == []
    PartWriter.discard(to_uri(str(tmp_path)), write(tmp_path, rows))
    assert os.listdir(tmp_path) == []


def test_frames_of_another_shape_do_not_fit_a_part(tmp_path):
    writer = new_writer(to_uri(str(tmp_path)), video_id=VIDEO, number=3)
    for rows, fits in ((random_rows(2), True), (random_rows(2, key_width=8), False)):
        if fits:
            writer.append(rows.columns, rows.tokens, rows.thumbnails)
        else:
            with pytest.raises(ValueError, match="shapes"):
                writer.append(rows.columns, rows.tokens, rows.thumbnails)
    writer.abort()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 256 kB."""
    place = tmp_path / "tiny"
    place.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tiny_disk):
    rows = random_rows(3000, token_shape=(1, 64))
    writer = new_writer(to_uri(str(tiny_disk)), video_id=VIDEO, number=3)
    with pytest.raises(ArchiveError, match=os.strerror(errno.ENOSPC)) as error:
        writer.append(rows.columns, rows.tokens, rows.thumbnails)
    assert str(tiny_disk) in str(error.value)
    assert "\n" not in str(error.value)
    writer.abort()
    assert os.listdir(tiny_disk) == []
