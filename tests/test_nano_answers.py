"""A small version of the table that `ops/nano/evaluate` makes: nano is right where the truth is known."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, SAMPLES

from ops.nano.pictograms import FONT

pytestmark = pytest.mark.skipif(not FONT.is_file(), reason="the pictograms' font is not installed")
REAL_SAMPLES = 5


@pytest.fixture(scope="module")
def table():
    size = ("--seed", "2000003", "--videos", "2", "--minutes", "1", "--check", "2", "--real", SAMPLES)
    command = [sys.executable, ROOT / "ops/nano/evaluate", *size, "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_questions_get_the_true_answer(table):
    moment, time = (table["accuracy"][name]["all"] for name in ("moment", "time"))
    assert min(moment["questions"], time["questions"]) > 100
    assert moment["exact"] >= 90
    assert time["exact"] >= 88
    assert moment["patches"] >= 0.96 * moment["exact"]
    for yardstick in ("chance", "no picture", "other pictures"):
        assert moment[yardstick] < 0.6 * moment["exact"]
    for yardstick in ("chance", "one frame"):
        assert time[yardstick] < 0.8 * time["exact"]


def test_texts_find_their_pictures(table):
    assert table["retrieval"]["captions_r1"] >= 90
    assert table["retrieval"]["words_r1"] >= 90


def test_real_footage_is_not_taken_for_what_it_knows(table):
    assert table["real"]["clips"] == REAL_SAMPLES
    assert table["real"]["claims_percent"] <= 10


def test_the_command_gives_the_answers_of_the_table(table):
    assert table["checked_with_vidx_ask"] == {"asked": 2, "same": 2}
