"""A rank that is stuck ends its worker, and nothing of it is left: by itself, over ranks, under a real TorchServe."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from deployment import is_healthy, log_end, num_ready, wait_until
from http_client import post, stream
from places import DEMO_MODEL, RANKS

from ts_parallel.cli.server.archive import handler_config
from ts_parallel.cli.server.serve import running
from ts_parallel.cli.server.torchserve import TorchServe, free_ports
from ts_parallel.serving.torchserve.rank_watch import TIMES_AS_LONG_AT_FIRST, RankWatch, StepTimer, Work
from ts_parallel.serving.torchserve.worker import follow_in_thread

SCRIPT = RANKS / "stopped_peer.py"
MAX_STEP_SECONDS = 5.0
BODY = {"prompt": "Return a list of", "max_tokens": 40, "stream": False}
LONG = {"prompt": "The", "max_tokens": 480, "ignore_eos": True, "temperature": 0, "stream": True}


def looks(timer: StepTimer, progress: int | None, seconds: float) -> bool:
    """Whether the step is late after that many more seconds."""
    for _ in range(round(seconds / timer.seconds_between_looks)):
        if timer.is_late(progress, timer.seconds_between_looks):
            return True
    return False


def test_step_is_late_once_it_has_taken_longer_than_it_may() -> None:
    timer = StepTimer(10)
    assert not looks(timer, 7, 9)
    assert looks(timer, 7, 2)


def test_each_step_that_is_done_begins_the_time_anew() -> None:
    timer = StepTimer(10)
    assert not any(looks(timer, number, 9) for number in range(1, 9))


def test_engine_without_a_step_is_never_late() -> None:
    timer = StepTimer(10)
    assert not looks(timer, None, 100)
    assert not looks(timer, 1, 9)
    assert not looks(timer, None, 1)
    assert not looks(timer, 1, 9)


def test_first_step_may_take_longer() -> None:
    timer = StepTimer(10)
    assert not looks(timer, 0, 10 * TIMES_AS_LONG_AT_FIRST - 1)
    assert looks(timer, 0, 2)


def test_what_this_process_has_slept_through_does_not_count() -> None:
    timer = StepTimer(10)
    assert not timer.is_late(1, 0.5)
    assert not timer.is_late(1, 3600)
    assert not looks(timer, 1, 8)
    assert looks(timer, 1, 2)


def test_rank_that_computes_may_take_ten_times_as_long_and_no_longer() -> None:
    timer = StepTimer(10)
    assert not timer.is_late(1, 0.5)
    assert looks(timer, 1, 11) and not timer.is_hopeless
    for _ in range(round(90 / timer.seconds_between_looks)):
        assert timer.is_late(1, timer.seconds_between_looks)
    assert timer.is_hopeless


def run_python(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.mark.parametrize(
    ("code", "is_stopped", "expected"),
    [
        ("while True: pass", False, True),
        ("while True: pass", True, False),
        ("import time; time.sleep(600)", False, False),
    ],
)
def test_ranks_are_at_work_while_one_computes_and_none_is_stopped(code: str, is_stopped: bool, expected: bool) -> None:
    process = run_python(code)
    try:
        wait_until(lambda: "time" not in code or psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)
        work = Work([psutil.Process(process.pid)])
        time.sleep(Work.SECONDS_BETWEEN_LOOKS)
        if is_stopped:
            process.send_signal(signal.SIGSTOP)
            wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        assert work.goes_on(time.monotonic()) == expected
    finally:
        process.kill()
        process.wait()
    assert not work.goes_on(time.monotonic())


def test_leader_that_stays_stopped_is_ended_by_who_follows_it(
    other: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    has_exited = threading.Event()
    with caplog.at_level(logging.ERROR):
        RankWatch({0: psutil.Process(other.pid)}, 0.2, has_exited.set).begin_with_leader()
        assert has_exited.wait(30)
    assert other.wait(30) == -signal.SIGKILL
    assert f"rank 0 (process {other.pid}) was stopped for 0.2 s; the worker ends" in caplog.text


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is stopped, in the place of another rank."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    yield process
    process.kill()
    process.wait()


def test_step_that_is_stuck_ends_the_worker_and_the_log_names_rank_bound_and_key(
    other: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    has_exited = threading.Event()
    with caplog.at_level(logging.ERROR):
        RankWatch({3: psutil.Process(other.pid)}, 0.2, has_exited.set).begin(SimpleNamespace(progress=8))
        assert has_exited.wait(30)
    assert other.wait(30) == -signal.SIGKILL
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"a step has taken longer than 0.2 s: rank 3 (process {other.pid}) is stopped; the worker ends "
        "(handler key 'max_step_seconds': 0.2)"
    )


def test_rank_alone_is_slow_and_not_stuck() -> None:
    before = threading.active_count()
    RankWatch({}, 0.01, lambda: pytest.fail("it has ended")).begin(SimpleNamespace(progress=8))
    assert threading.active_count() == before


def test_rank_that_has_lost_rank_0_kills_it_and_exits(other: subprocess.Popen[bytes]) -> None:
    def follow() -> None:
        raise RuntimeError("this rank has waited 120 s for rank 0")

    has_exited = threading.Event()
    follow_in_thread(follow, RankWatch({0: psutil.Process(other.pid)}, 30, has_exited.set))
    assert has_exited.wait(30)
    assert other.wait(30) == -signal.SIGKILL


@pytest.mark.ranks
def test_stopped_rank_of_a_team_is_waited_for_no_longer_than_the_patience(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.stdout == "the stopped rank has ended\n", result.stderr


@pytest.fixture(scope="module")
def server() -> Iterator[TorchServe]:
    config = handler_config(DEMO_MODEL, "cpu", tensor_parallel_size=2, max_step_seconds=MAX_STEP_SECONDS)
    port, metrics_port = free_ports(2)
    with running(config, DEMO_MODEL, "demo", "127.0.0.1", port, False, threading.Event(), metrics_port) as server:
        yield server


@pytest.fixture(scope="module")
def answer(server: TorchServe) -> str:
    """What a healthy worker answers."""
    return text_of(server)


def text_of(server: TorchServe) -> str:
    status, body = post(server.url, BODY)
    assert status == 200, body
    text: str = json.loads(body)["text"]
    return text


def ranks(server: TorchServe) -> dict[str, psutil.Process]:
    """The worker's processes by rank."""
    assert server.pid is not None
    children = psutil.Process(server.pid).children(recursive=True)
    return {rank: child for child in children if (rank := child.environ().get("RANK")) is not None}


@pytest.mark.torchserve
def test_rank_that_is_stopped_for_a_moment_loses_nothing(server: TorchServe, answer: str) -> None:
    follower = ranks(server)["1"]
    pieces = stream(server.url, {**LONG, "max_tokens": 200})
    text = next(pieces)[1]
    follower.suspend()
    try:
        time.sleep(MAX_STEP_SECONDS / 4)
    finally:
        follower.resume()
    text += "".join(piece for _, piece in pieces)
    assert text == "".join(piece for _, piece in stream(server.url, {**LONG, "max_tokens": 200}))
    assert ranks(server)["1"] == follower
    assert text_of(server) == answer


@pytest.mark.torchserve
def test_rank_that_is_stopped_ends_every_stream_and_the_next_worker_answers(server: TorchServe, answer: str) -> None:
    loaded, before = num_ready(server), ranks(server)
    have_begun = [threading.Event() for _ in range(6)]

    def read(has_begun: threading.Event) -> str:
        """How a stream ends."""
        text = ""
        try:
            for _, piece in stream(server.url, LONG):
                text += piece
                has_begun.set()
        except (HTTPException, OSError) as error:
            return type(error).__name__
        if '{"error"' not in text:
            return "whole"
        return "an error that says why" if "is stopped" in text else text

    with ThreadPoolExecutor(8) as clients:
        streams = [clients.submit(read, has_begun) for has_begun in have_begun]
        wait_until(lambda: all(has_begun.is_set() for has_begun in have_begun), lambda: log_end(server))
        before["1"].suspend()
        whole = [clients.submit(post, server.url, {**LONG, "stream": False}) for _ in range(2)]
        ends = [own.result(60) for own in streams]  # each would say TimeoutError after 60 s of silence
        statuses = [own.result(60)[0] for own in whole]
    assert set(ends) == {"an error that says why"}
    assert all(status in (200, 500, 503, 507) for status in statuses)  # one that came late runs on the next worker
    wait_until(lambda: num_ready(server) > loaded and is_healthy(server), lambda: log_end(server))
    assert not any(process.is_running() for process in before.values())
    assert f"rank 1 (process {before['1'].pid}) is stopped" in server.log_text()
    assert text_of(server) == answer
