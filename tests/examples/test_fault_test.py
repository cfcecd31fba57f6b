"""The short form of examples/fault_test.py: a few of its faults, once each, against one real server; and its judgement.

The long form, with every fault and each many times, is run by hand; handlers/README.md has what came of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

SCRIPT = ROOT / "examples" / "fault_test.py"
FAULTS = ("kill-follower", "kill-agent", "stop-follower")
EXPECTED = {"a": "one two three four", "b": "five six seven eight"}


@pytest.mark.torchserve
def test_nobody_hangs_or_is_answered_wrongly_whatever_part_of_a_server_dies(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--faults", *FAULTS, "--streams", "4", "--json", str(report)]
    with tempfile.TemporaryDirectory(prefix="f-") as place:  # a name that sockets have room for
        environment = {**os.environ, "TMPDIR": place}
        result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert report.is_file(), result.stderr[-3000:]
    trials = {name: own["trials"] for name, own in json.loads(report.read_text())["faults"].items()}
    assert trials.keys() == set(FAULTS)
    for (outcome,) in trials.values():
        assert outcome["in_flight"] == 7
        assert (outcome["hung"], outcome["wrong"], outcome["of_another"], outcome["left"]) == (0, 0, 0, [])
        assert outcome["recovered"] is not None
        assert set(outcome["ends"]) <= {"error event", "cut off", "500", "whole"}


@pytest.fixture(autouse=True)
def _examples_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def seen(text: str, end: str) -> Any:
    from faults.clients import Ask, Seen

    return Seen(Ask("a"), text, end)


@pytest.mark.parametrize(
    ("text", "end", "verdict"),
    [
        ("one two three four", "whole", "right"),
        ("one two", "cut off", "right"),
        ("", "500", "right"),
        ("one two", "whole", "wrong"),
        ("one three", "cut off", "wrong"),
        ("five six seven", "cut off", "of another"),
    ],
)
def test_answer_is_compared_with_that_of_an_undisturbed_server(text: str, end: str, verdict: str) -> None:
    from faults.clients import is_of

    assert is_of(seen(text, end), EXPECTED) == verdict


def test_events_are_read_as_far_as_they_are_whole() -> None:
    from faults.clients import text_of

    events = [{"choices": [{"text": "one "}]}, {"choices": [{"text": "two"}]}]
    received = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    assert text_of(received, "events") == "one two"
    assert text_of(received[:-5], "events") == "one "


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"recovered": 9.0}, []),
        ({"recovered": 9.0, "hung": 2}, ["2 hung"]),
        ({"recovered": 9.0, "wrong": 1}, ["1 wrong"]),
        ({"recovered": 9.0, "of_another": 1}, ["1 of_another"]),
        ({"recovered": 9.0, "known": [0.1, 60.0]}, ["a client knew after 60.0 s"]),
        ({"recovered": 9.0, "left": ["process 7"]}, ["left process 7"]),
        ({"recovered": None}, ["1 times not right again"]),
        ({"recovered": 9.0, "refused": [0.1, 30.0]}, ["a client was refused after 30.0 s"]),
    ],
)
def test_what_must_not_be_is_complained_of(figures: dict[str, Any], says: list[str]) -> None:
    from faults.kinds import FAULTS as KNOWN
    from faults.report import Row
    from faults.trial import Outcome

    row = Row(KNOWN[0], [Outcome(in_flight=8, **figures)])
    assert [text.removeprefix(f"{KNOWN[0].name}: ") for text in row.complaints()] == says


def test_fault_that_this_machine_cannot_have_is_said_and_not_counted() -> None:
    from faults.kinds import FAULTS as KNOWN
    from faults.report import Row, table

    row = Row(KNOWN[0], skipped="only root can mount")
    assert row.complaints() == []
    assert "not tried: only root can mount" in table([row])
