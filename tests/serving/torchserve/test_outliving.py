"""A process outlives a worker: whenever one of it dies, TorchServe answers all who wait, and nothing is left."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPException
from typing import Any

import psutil
import pytest
from deployment import is_healthy, log_end, starting, wait_until
from http_client import get, post, stream

from ts_parallel.cli.server.torchserve import TorchServe
from ts_parallel.serving.torchserve.ends import outlive
from ts_parallel.serving.torchserve.ends.outliving import HAS_DESCRIPTORS, seconds_until_front_end_waits

pytestmark = pytest.mark.skipif(not HAS_DESCRIPTORS, reason="no process descriptors")

# It dies right behind a reply: TorchServe, which reads both at once, has no list of open requests then to answer.
HANDLER = """
import os
import signal
import time

from ts_parallel.serving.torchserve.front_end import FrontEnd
from ts_parallel.serving.torchserve.streaming import StreamingHandler

NEXT = FrontEnd._next
is_last = False


def die_or_go_on(self, connection):
    if is_last:
        connection.close()  # as its end does, which takes longer with much memory
        os.kill(os.getpid(), signal.SIGKILL)
    return NEXT(self, connection)


FrontEnd._next = die_or_go_on


class Dying(StreamingHandler):
    def answer(self, request, stream):
        global is_last
        body = request.fields()
        for number in range(body["pieces"]):
            stream.send(f"{number}\\n")
            time.sleep(0.02)
        if body["dies"]:
            is_last = True
            stream.send("the last\\n")
            time.sleep(60)


_handler = Dying()


def handle(data, context):
    return _handler.handle(data, context)
"""
SETTINGS = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 16, "maxBatchDelay": 50, "deviceType": "cpu", "handler": {}}
NUM_STREAMS, NUM_TIMES = 8, 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    workspace = tmp_path_factory.mktemp("outliving")
    (workspace / "dying.py").write_text(HANDLER)
    (workspace / "files").mkdir()
    (workspace / "files" / "README").write_text("torch-model-archiver wants a file")
    settings = {**SETTINGS, "continuousBatching": True}
    with starting(workspace, settings, workspace / "files", workspace / "dying.py") as server:
        wait_until(lambda: is_healthy(server), lambda: log_end(server))
        assert get(f"{server.url}/1.0/health") == (200, '{"status": "ok"}')
        yield server


def end_of(server: TorchServe, body: dict[str, object], has_begun: threading.Event) -> str:
    """How a long stream ends; `TimeoutError` after a minute of silence."""
    try:
        for _ in stream(server.url, body):
            has_begun.set()
    except (HTTPException, OSError) as error:
        return type(error).__name__
    return "whole"


@pytest.mark.torchserve
def test_worker_that_dies_right_behind_a_reply_leaves_nobody_waiting(server: TorchServe) -> None:
    for _ in range(NUM_TIMES):
        begun = [threading.Event() for _ in range(NUM_STREAMS)]
        with ThreadPoolExecutor(NUM_STREAMS) as clients:
            body: dict[str, object] = {"pieces": 2000, "dies": False}
            streams = [clients.submit(end_of, server, body, has_begun) for has_begun in begun[1:]]
            wait_until(lambda: all(own.is_set() for own in begun[1:]), lambda: log_end(server))  # noqa: B023  # at once
            streams.append(clients.submit(end_of, server, {"pieces": 5, "dies": True}, begun[0]))
            ends = [own.result() for own in streams]
        assert "TimeoutError" not in ends and "whole" not in ends
        wait_until(lambda: answers(server), lambda: log_end(server))
    wait_until(lambda: len(outliving(server)) == 1)  # that of the last worker


def answers(server: TorchServe) -> bool:
    return post(server.url, {"pieces": 2, "dies": False}) == (200, "0\n1\n")


def outliving(server: TorchServe) -> list[psutil.Process]:
    """Those processes that belong to this server: they have its folder in their environment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if outlive.__file__ in (process.info["cmdline"] or ()):
            with suppress(psutil.Error):
                if process.environ().get("LOG_LOCATION") == str(server.log_folder):
                    found.append(process)
    return found


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])


class Worker:
    """Processes in the place of two ranks and torchrun, and this test in that of the front end and of rank 0's end."""

    def __init__(self, seconds: float) -> None:
        self.ranks, self.agent = [sleeper(), sleeper()], sleeper()
        pairs = [socket.socketpair(), socket.socketpair()]
        self.front_end = [pair[0] for pair in pairs]
        self.leader_end, given_end = socket.socketpair()
        descriptors = [os.pidfd_open(process.pid) for process in (*self.ranks, self.agent)]
        given = {
            "ranks": [[f"rank {number}", descriptor] for number, descriptor in enumerate(descriptors[:2])],
            "agent": ["torchrun", descriptors[2]],
            "leader_end": given_end.fileno(),
            "connections": [pair[1].fileno() for pair in pairs],
            "seconds": seconds,
        }
        inherited = [*descriptors, given_end.fileno(), *(pair[1].fileno() for pair in pairs)]
        command = [sys.executable, "-I", "-S", outlive.__file__, json.dumps(given)]
        self.process = subprocess.Popen(command, pass_fds=inherited, stdout=subprocess.PIPE, text=True)
        for own in (given_end, *(pair[1] for pair in pairs)):
            own.close()
        for descriptor in descriptors:
            os.close(descriptor)

    def is_closed(self, seconds: float) -> bool:
        """Whether the front end sees a connection close in time."""
        poller = select.poll()
        for own in self.front_end:
            poller.register(own, select.POLLRDHUP)
        return bool(poller.poll(seconds * 1000))

    def end(self) -> None:
        processes: list[subprocess.Popen[Any]] = [*self.ranks, self.agent, self.process]
        for process in processes:
            process.kill()
            process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        for own in (*self.front_end, self.leader_end):
            own.close()


@contextmanager
def worker(seconds: float = 0.3) -> Iterator[Worker]:
    own = Worker(seconds)
    try:
        yield own
    finally:
        own.end()


def test_rank_0_is_told_who_died_and_connections_stay_until_it_has_ended() -> None:
    with worker() as own:
        own.ranks[1].kill()
        own.leader_end.settimeout(30)
        assert own.leader_end.recv(100) == b"rank 1 has ended"
        wait_until(lambda: psutil.Process(own.agent.pid).status() == psutil.STATUS_STOPPED)
        assert not own.is_closed(0.5)  # rank 0 is still answering its clients
        own.ranks[0].kill()
        assert own.is_closed(30)
        assert own.process.wait(30) == 0 and own.agent.wait(30) == -signal.SIGKILL


def test_front_end_that_sends_more_is_waiting_and_sees_the_end_at_once() -> None:
    with worker(seconds=600) as own:
        own.ranks[0].kill()
        assert own.ranks[1].wait(30) == -signal.SIGKILL
        assert not own.is_closed(0.3)
        own.front_end[1].sendall(b"I")  # what rank 1 has not read says nothing of a reply that rank 0 has given
        assert not own.is_closed(0.3)
        own.front_end[0].sendall(b"I")
        assert own.is_closed(30)


def test_whoever_reads_its_log_no_more_does_not_matter() -> None:
    """TorchServe closes the output of a worker whose torchrun has ended."""
    with worker() as own:
        assert own.process.stdout is not None
        own.process.stdout.close()
        own.agent.kill()
        own.leader_end.settimeout(30)
        assert own.leader_end.recv(100) == b"torchrun has ended"


def test_rank_0_that_does_not_end_is_killed() -> None:
    with worker() as own:
        own.agent.kill()
        assert own.ranks[0].wait(30) == -signal.SIGKILL and own.ranks[1].wait(30) == -signal.SIGKILL
        assert own.process.wait(30) == 0


def test_worker_that_torchserve_has_ended_may_end_by_itself_and_is_killed_where_it_does_not() -> None:
    with worker() as own:
        for connection in own.front_end:
            connection.close()
        time.sleep(0.5)
        assert own.ranks[0].poll() is None and own.agent.poll() is None
        assert own.process.wait(30) == 0
        for process in (*own.ranks, own.agent):
            assert process.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        ({"continuousBatching": True, "maxBatchDelay": 5000}, 0.3),
        ({"maxBatchDelay": 50}, 0.3),
        ({"maxBatchDelay": 5000}, 5.2),
        ({}, 0.3),
    ],
)
def test_front_end_has_the_time_to_gather_a_batch(settings: dict[str, object], seconds: float) -> None:
    assert seconds_until_front_end_waits(settings) == pytest.approx(seconds)


def test_process_that_outlives_is_small() -> None:
    with worker() as own:
        time.sleep(0.5)
        assert psutil.Process(own.process.pid).memory_info().rss < 32 << 20
