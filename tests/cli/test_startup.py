"""Whoever waits for a server to be ready sees what it is at, and can end it at any time."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from places import DEMO_MODEL

from ts_parallel.cli.server import startup
from ts_parallel.cli.server.startup import LogFollower, PlainStartup, shown_startup
from ts_parallel.cli.server.torchserve import free_ports
from ts_parallel.partition.prepared import CACHE_VARIABLE

COMMAND = str(Path(sys.executable).parent / "ts-parallel")
SHOWN_CURSOR = "\x1b[?25h"

LOG = """\
10:45:51 [INFO ] W-9000-demo_1.0-stdout MODEL_LOG - Torch worker started.
10:45:51 [INFO ] W-9000-demo_1.0-stdout MODEL_LOG - Torch worker started.
10:45:53 [INFO ] W-9000-demo_1.0-stdout MODEL_LOG - loading stage 0, rank 0 of 2: 50 % of 4000.0 MB in 2.00 s
10:45:54 [INFO ] W-9000-demo_1.0-stdout MODEL_LOG - loading stage 1, rank 0 of 2: 25 % of 4000.0 MB in 2.00 s
10:45:55 [INFO ] W-9000-demo_1.0-stdout MODEL_LOG - loading stage 0, rank 0 of 2: 4000.0 MB in 4.00 s
10:45:56 [INFO ] W-9000-demo_1.0-stdout MODEL_LOG - loading stage 1, rank 0 of 2: 4000.0 MB in 5.00 s
10:46:08 [INFO ] W-9000-demo_1.0-stdout MODEL_LOG - ts_parallel is ready: demo on 4 ranks
"""
PHASES = ["starting the ranks", "loading the weights", "making ready to answer"]
WHOLE = "loading the weights: 100% of 16.00 GB, 3.20 GB/s"


def follow(log: str) -> None:
    follower = LogFollower(PlainStartup(), num_stages=2)
    for line in log.splitlines():
        follower.follow(line)


def lines_of(text: str) -> list[str]:
    """Without the time that each begins with."""
    return [line.partition(" s  ")[2] for line in text.splitlines()]


def test_where_no_terminal_is_each_phase_is_a_line_and_the_whole_load_one(capsys: pytest.CaptureFixture[str]) -> None:
    follow(LOG)
    shown = capsys.readouterr()
    assert lines_of(shown.err) == [*PHASES[:2], WHOLE, PHASES[2]]
    assert shown.out == ""


def test_a_long_load_is_told_now_and_then_over_all_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "SECONDS_BETWEEN_LINES", 0.0)
    follow(LOG)
    assert lines_of(capsys.readouterr().err)[2:6] == [
        "loading the weights: 25% of 16.00 GB, 2.00 GB/s",  # the other stage is taken to be as large, and has not told
        "loading the weights: 38% of 16.00 GB, 3.00 GB/s",
        "loading the weights: 62% of 16.00 GB, 2.50 GB/s",
        WHOLE,
    ]


def test_ranks_that_are_started_again_begin_no_phase_again(capsys: pytest.CaptureFixture[str]) -> None:
    follow(LOG + LOG)
    assert lines_of(capsys.readouterr().err) == [*PHASES[:2], WHOLE, PHASES[2]]


def test_beside_other_output_lines_do_not_move(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes that for a terminal
    with shown_startup(is_plain=True) as shown:
        shown.begin("tracing the model")
    assert lines_of(capsys.readouterr().err) == ["tracing the model"]


@contextmanager
def served(is_terminal: bool, cache: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`serve` of the demo model, and where to read what it shows on standard error."""
    reader, writer = pty.openpty() if is_terminal else os.pipe()
    if is_terminal:
        termios.tcsetwinsize(writer, (24, 80))
    command = [COMMAND, "serve", str(DEMO_MODEL), "-pp", "2", "--port", str(free_ports(1)[0])]
    environment = {**os.environ, CACHE_VARIABLE: str(cache), "TERM": "xterm"}
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=writer, env=environment) as process:
            os.close(writer)
            family = []
            try:
                yield process, reader
            finally:
                family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
                process.kill()
                for each in family:
                    each.kill()
    finally:
        os.close(reader)


def read_until(text: str, descriptor: int, seconds: float = 240) -> str:
    """What comes up to it, or all that comes where it is empty."""
    shown, deadline = "", time.monotonic() + seconds
    while not text or text not in shown:
        assert time.monotonic() < deadline, shown
        try:
            piece = os.read(descriptor, 65536)
        except OSError:  # a terminal that nobody writes to any more
            piece = b""
        if not piece:
            assert not text, shown
            break
        shown += piece.decode(errors="replace")
    return shown


@pytest.mark.torchserve
@pytest.mark.parametrize(
    ("phase", "is_terminal"),
    [("tracing the model", False), ("starting TorchServe", True), ("starting the ranks", True)],
)
def test_ctrl_c_ends_a_start_with_all_that_it_began(phase: str, is_terminal: bool, tmp_path: Path) -> None:
    cache = tmp_path if phase == "tracing the model" else Path(os.environ[CACHE_VARIABLE])
    with served(is_terminal, cache) as (process, reader):
        shown = read_until(phase, reader)
        time.sleep(0.5)  # a process is started within the phase
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        shown += read_until("", reader)
        assert process.wait(60) == 0, shown
        assert process.stdout is not None
        assert process.stdout.read() == b""  # nothing is ready
    assert "stopping (SIGINT)" in shown
    assert "Traceback" not in shown
    assert not is_terminal or shown.rstrip().endswith(SHOWN_CURSOR)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children and not alive
