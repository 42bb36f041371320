"""A contact sheet shows each moment's stored thumbnail with its times, and loads nothing from anywhere."""

import base64
import contextlib
import html.parser
import io
import os
import pty
import re
import termios

import pytest
from conftest import SAMPLES, VIDX, process_of
from PIL import Image
from small_archive import MODEL_ID, add_video

from pipeline.results.contact_sheet import write_contact_sheet
from storage.archive.archive import create_archive, open_archive
from storage.records import Moment
from storage.sql import run_sql


class Page(html.parser.HTMLParser):
    """The pictures, links and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.tags, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])

    def handle_data(self, data):
        self.words.append(data)


def jpeg(colour):
    file = io.BytesIO()
    Image.new("RGB", (160, 90), colour).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def sheet_of(tmp_path, monkeypatch):
    """Writes a sheet of one moment of a video with an ugly name; gives its file."""
    archive = create_archive(str(tmp_path / "archive"), model_id=MODEL_ID, model_name="tiny")
    add_video(archive, 1, uri="file:///clips/%3Cscript%3E%0Aalert%281%29.mp4")
    monkeypatch.setattr(
        "pipeline.results.contact_sheet.read_thumbnails", lambda uri, frames: [jpeg("red") for _ in frames]
    )
    row = archive.videos.all()[0]
    moment = Moment(row.video_id, row.video_number, row.uri, 1.0, 4.0, 2.0, 0.4321)

    def write(name, count=1):
        write_contact_sheet(str(tmp_path / name), '<b>"a dog"</b> & more', archive, [moment] * count)
        return tmp_path / name

    return write


def test_names_and_texts_are_shown_as_they_are_and_run_nothing(sheet_of):
    page = Page(sheet_of("sheet.html").read_text(encoding="utf-8"))
    text = "".join(page.words)
    assert '<b>"a dog"</b> & more' in text
    assert "<script>\\nalert(1).mp4" in text
    assert "0:00:01.0 – 0:00:04.0" in text
    assert "0.432" in text
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert page.tags.count("b") == 1  # the score
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.pictures)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (5, 5, 1), (7, 5, 2)])
def test_a_picture_has_a_card_for_each_moment(sheet_of, count, columns, rows):
    picture = Image.open(sheet_of("sheet.png", count)).convert("RGB")
    assert picture.width == 12 + columns * 252
    red = [
        picture.getpixel((12 + column * 252 + 120, 12 + row * (picture.height - 12) // rows + 40))
        for row in range(rows)
        for column in range(columns)
    ]
    assert sum(pixel[0] > 200 and pixel[1] < 60 for pixel in red) == count


def test_a_search_writes_the_thumbnails_of_its_moments(vidx, samples_archive, tmp_path):
    sheet = tmp_path / "found.html"
    command = ["search", "an apple", "--archive", str(samples_archive[0]), "--top", "3", "--min-score", "-1"]
    run = vidx(*command, "--contact-sheet", str(sheet), "--json")
    assert f"contact sheet: {sheet}" in run.err
    wanted = []
    for moment in run.json["moments"]:
        where = f"video_id = '{moment['video_id']}' AND round(time_seconds, 6) = {moment['best_seconds']}"
        ((data,),) = run_sql(open_archive(str(samples_archive[0])), f"SELECT thumbnail FROM frames WHERE {where}")[1]
        wanted.append(base64.b64encode(data).decode())
    pictures = Page(sheet.read_text(encoding="utf-8")).pictures
    assert pictures == [f"data:image/jpeg;base64,{data}" for data in wanted]
    for place, word in (("found.gif", ".html or .png"), ("no/folder.png", "there is no folder")):
        refused = vidx(*command, "--contact-sheet", str(tmp_path / place))
        assert (refused.code, word in refused.err) == (2, True)


def test_pictures_are_drawn_in_a_terminal_and_nowhere_else(vidx, samples_archive):
    command = ["search", "an apple", "--archive", str(samples_archive[0]), "--top", "2", "--min-score", "-1", "--show"]
    piped = vidx(*command)
    assert (piped.code, "--contact-sheet" in piped.err, piped.out) == (2, True, "")
    colours = set(re.findall(rb"\x1b\[[0-9;]*48;2;\d+;\d+;\d+", in_terminal(command, columns=100)))
    assert len(colours) > 50  # a picture in half blocks has many
    assert b"the size of this terminal" in in_terminal(command, columns=0)


def in_terminal(command, columns):
    """What vidx writes into a terminal that answers no questions."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, columns))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    colours = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    with process_of([VIDX, *command], **streams, env={**os.environ, **colours}) as process:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(ours, 1 << 16):
                seen += data
        process.wait(300)
    os.close(ours)
    return seen


def test_an_archive_without_thumbnails_says_so_where_they_would_be(vidx, tmp_path):
    archive, sheet = tmp_path / "archive", tmp_path / "found.html"
    sources = [str(SAMPLES / name) for name in ("nano_scenes_1.mp4",)]
    assert vidx("index", *sources, "--archive", str(archive), "--no-thumbnails").code == 0
    _, rows = run_sql(open_archive(str(archive)), "SELECT DISTINCT octet_length(thumbnail) FROM frames")
    assert rows == [(0,)]
    command = ["search", "an apple", "--archive", str(archive), "--top", "2"]
    assert vidx(*command, "--contact-sheet", str(sheet)).code == 0
    page = Page(sheet.read_text(encoding="utf-8"))
    assert page.pictures == []
    assert "no thumbnail kept" in page.words
    assert vidx(*command, "--contact-sheet", str(tmp_path / "found.png")).code == 0
    assert Image.open(tmp_path / "found.png").width > 100
