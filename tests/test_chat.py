"""A conversation: what is shown and said before stays until the topic moves, and an answer can be stopped."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import VIDX, process_of

from pipeline.ask.answer import Asked, Asker
from pipeline.ask.chat import Conversation
from pipeline.ask.filter import Filter
from storage.archive.archive import open_archive
from storage.parts.read import read_tokens
from workers.llm.engine import ModelOptions
from workers.llm.prompt import build_prompt, load_tokenizer, prompt_ids
from workers.models.bundle import find_bundle

TINY = Path(__file__).parent / "reference" / "llava-mini-tiny" / "checkpoint"
CLIP = "nano_scenes_1.mp4"


@pytest.fixture(scope="module")
def archive(samples_archive):
    return open_archive(str(samples_archive[0]))


@pytest.fixture(scope="module")
def asker(archive):
    return Asker(archive, find_bundle("nano"), ModelOptions("cpu"))


class Talk:
    """A conversation on the samples; keeps what was streamed and announced."""

    def __init__(self, asker, within=None, history=False):
        bundle = find_bundle("nano")
        if history:  # as a model that was trained on conversations
            bundle = replace(bundle, card=replace(bundle.card, takes_history=True))
        self.streamed, self.announced, self.prompts = [], [], []
        self.conversation = Conversation(asker, bundle, within or Filter(), Asked(fuse="patches", most_tokens=20))

    def ask(self, question):
        return self.conversation.ask(question, self.streamed.append, self.announced.append)


def shown(talk):
    return talk.conversation._shown.moments


def test_a_prompt_has_the_turns_before_as_the_template_writes_them():
    tokenizer = load_tokenizer(find_bundle(str(TINY)))
    first = build_prompt(tokenizer, "What is there?")
    prompt = build_prompt(tokenizer, "And then?", [("What is there?", "a cow")])
    assert prompt.startswith(first)
    assert prompt.count("<image>") == 1
    after = prompt[len(first) :]
    assert after.index("assistant") < after.index("a cow") < after.index("user") < after.index("And then?")
    ids, more = (
        prompt_ids(tokenizer, "What is there?"),
        prompt_ids(tokenizer, "And then?", [("What is there?", "a cow")]),
    )
    assert more[: len(ids)] == ids  # so that what was computed of them is used again


def test_the_frames_stay_until_a_question_finds_others(asker):
    talk = Talk(asker)
    assert talk.ask("Is there an apple?").text == "yes"
    first = shown(talk)
    assert talk.conversation.last.moments == first
    for question in ("How many things are there?", "What is there?", "Where is it?"):  # fit any frame
        assert talk.ask(question).moments == tuple(replace(moment, score=None) for moment in first)
    assert talk.ask("Is there a cow?").text == "yes"
    assert shown(talk) != first
    talk.conversation.reset()
    assert talk.conversation.last is None
    assert talk.ask("Is there a submarine?") is None


def test_a_chosen_range_is_what_every_question_is_about(asker, archive):
    talk = Talk(asker, Filter(archive.videos.find(CLIP), 1.0, 5.0))
    answers = [talk.ask(question) for question in ("What is there?", "Is there an apple?", "Where is the tent?")]
    assert [answer.text for answer in answers] == ["a cow, a leaf and a tent", "no", "bottom left"]
    assert {answer.moments for answer in answers} == {answers[0].moments}
    talk.conversation.narrow(Filter(archive.videos.find(CLIP), 10.0, 14.0))
    assert talk.ask("Is there an apple?").text == "yes"


def test_a_model_of_single_questions_sees_none_before(asker, archive, monkeypatch):
    within = Filter(archive.videos.find(CLIP), 1.0, 5.0)
    seen = []
    answer = Asker.answer
    monkeypatch.setattr(
        Asker, "answer", lambda self, *args, history, **kwargs: (seen.append(history), answer(self, *args, **kwargs))[1]
    )
    for history in (False, True):
        talk = Talk(asker, within, history)
        talk.ask("What is there?")
        talk.ask("Where is the tent?")
    said = [("What is there?", "a cow, a leaf and a tent")]
    assert seen == [[], [], [], said]


def test_the_oldest_turns_go_when_the_context_is_full_and_it_is_said(asker, archive, monkeypatch):
    talk = Talk(asker, Filter(archive.videos.find(CLIP), 1.0, 5.0), history=True)
    talk.conversation._turns = [("What is there?", "a cow")] * 5
    monkeypatch.setattr(Asker, "fits", lambda self, question, chosen, asked, history: len(history) <= 2)
    talk.ask("Where is the tent?")
    assert talk.announced == ["the context is full: the model does not see the first 3 of 5 turns"]
    assert len(talk.conversation._turns) == 3


def test_what_was_said_before_an_answer_was_stopped_is_part_of_it(asker, archive):
    talk = Talk(asker, Filter(archive.videos.find(CLIP), 1.0, 5.0))

    def stop(piece):
        talk.streamed.append(piece)
        if len(talk.streamed) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.conversation.ask("What is there?", stop, talk.announced.append)
    (turn,) = talk.conversation._turns
    assert turn == ("What is there?", "".join(talk.streamed))
    assert talk.ask("Where is the tent?").text == "bottom left"


def chat(samples_archive, lines, *options):
    command = [VIDX, "chat", "--archive", str(samples_archive[0]), *options]
    return subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=300, check=False)


def test_commands_narrow_list_and_end(samples_archive, tmp_path):
    sheet = tmp_path / "sources.html"
    lines = ["/sources", f"/video {CLIP}", "/time 1 5", "What is there?", "/sources", f"/sources {sheet}", "/time 3"]
    lines += ["/dance", "/video nothing.mp4", "/time", "/reset", "/sources", "/help", "/quit", "What is there?"]
    run = chat(samples_archive, lines)
    assert run.returncode == 0
    assert run.stdout.count("What is there?") == 1  # what comes after /quit is not read
    assert "a cow, a leaf and a tent" in run.stdout
    assert "0:00:01.0" in run.stdout
    assert sheet.read_text().count("<img") == 1
    said = run.stderr
    for text in ("30 frames", "5 frames", "/time 3: give two", "/dance: no such command", "nothing.mp4: no such video"):
        assert text in said, text
    assert said.count("there is no answer yet") == 2
    assert "/sources FILE.html" in said


def test_answers_come_as_lines_of_json(samples_archive):
    run = chat(samples_archive, ["Is there an apple?", "Is there a submarine?"], "--json", "--fuse", "patches")
    one, other = map(json.loads, run.stdout.splitlines())
    assert (one["question"], one["answer"], one["found"], one["fuse"]) == ("Is there an apple?", "yes", True, "patches")
    assert one["moments"][0]["source"].endswith(CLIP)
    assert other["found"]  # it is about the moments that were shown last
    assert (one["moments"][0]["score"] is None, other["moments"][0]["score"]) == (False, None)
    assert other["answer"] in ("I do not know that", "no")
    (alone,) = map(json.loads, chat(samples_archive, ["Is there a submarine?"], "--json").stdout.splitlines())
    assert (alone["found"], alone["answer"], alone["moments"]) == (False, "", [])


def test_a_damaged_frame_spoils_the_questions_about_it_alone(archive_copy):
    stored = open_archive(str(archive_copy))
    frame = stored.frames.find(stored.videos.find(CLIP).video_number)[13]
    cell = read_tokens(stored.frames_uri, [frame]).tobytes()
    path = archive_copy / "frames" / frame.part
    data = path.read_bytes()
    assert data.count(cell) == 1
    path.write_bytes(data.replace(cell, cell[:-1] + bytes([cell[-1] ^ 1])))
    lines = ["/time 12 15", "What is there?", "/time 1 5", "What is there?"]
    run = chat([archive_copy], lines, "--video", CLIP, "--fuse", "patches", "--json")
    (answered,) = map(json.loads, run.stdout.splitlines())
    assert (run.returncode, answered["answer"]) == (5, "a cow, a leaf and a tent")
    assert "`vidx repair` repairs what it can" in run.stderr


WAITS_AFTER_A_WORD = """
import os, threading
from pipeline.ask.chat import Conversation
from pipeline.cli.main import main

ask, asked = Conversation.ask, []

def ask_slowly(self, question, stream, announce):
    asked.append(question)
    def stream_and_wait(word):
        stream(word)
        if len(asked) == 1 and word:
            os.write(1, b"<waits>")
            threading.Event().wait()
    return ask(self, question, stream_and_wait, announce)

Conversation.ask = ask_slowly
main()
"""


def test_a_terminal_gets_words_as_they_come_and_control_c_stops_an_answer_alone(samples_archive):
    ours, theirs = pty.openpty()
    chosen = ["--archive", str(samples_archive[0]), "--video", CLIP, "--from", "1", "--to", "5"]
    command = [sys.executable, "-c", WAITS_AFTER_A_WORD, "chat", *chosen]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with process_of(command, **streams, start_new_session=True) as process:
        os.close(theirs)
        seen = b""

        def until(text):
            nonlocal seen
            while text not in seen:
                assert select.select([ours], [], [], 300)[0], seen
                seen += os.read(ours, 1 << 12)
            before, _, seen = seen.partition(text)
            return before

        until(b"does not see earlier ones")
        until(b"> ")
        os.write(ours, b"What is there?\n")
        until(b"\r\n")
        begun = until(b"<waits>").strip()
        assert begun
        assert b"a cow, a leaf and a tent".startswith(begun)
        process.send_signal(signal.SIGINT)
        until(b"stopped")
        until(b"> ")
        os.write(ours, b"What is there?\n")
        until(b"a cow, a leaf and a tent")
        until(b"> ")
        os.write(ours, b"/quit\n")
        assert process.wait(300) == 0
    os.close(ours)
