"""The table of faults: what is done to a running server, and what its clients are to see then."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from faults.clients import PROMPTS, Ask, Client
from faults.server import Server
from faults.sites import (
    MAX_STEP_SECONDS,
    Site,
    fill,
    own_checkpoint,
    plain,
    small_disk,
    small_shared_memory,
    two_replicas,
    with_options,
    without_its_end,
)
from faults.trial import Deed

_SECONDS_BESIDE_THE_BOUND = 5.0
_SECONDS_OF_A_CROWD, _SEATS = 30.0, 16
_NUM_SLOW, _NUM_SILENT = 8, 500
_SECONDS_TO_LOAD = 120


@dataclass(frozen=True)
class Fault:
    """`strike` makes it."""

    name: str
    what: str
    strike: Callable[[Server], Deed | None]
    expected: str
    seconds_to_know: float = _SECONDS_BESIDE_THE_BOUND
    """At most, until every client in flight knows; of a stuck rank, beside `max_step_seconds`."""
    ends_server: bool = False
    site: Site = plain
    is_unnoticed: bool = False
    """Whether every answer that is open comes to its end."""


def kill(choose: Callable[[Server], psutil.Process]) -> Callable[[Server], None]:
    def strike(server: Server) -> None:
        choose(server).send_signal(signal.SIGKILL)

    return strike


def stop(choose: Callable[[Server], psutil.Process]) -> Callable[[Server], Deed]:
    def strike(server: Server) -> Deed:
        process = choose(server)
        process.send_signal(signal.SIGSTOP)

        def resume() -> None:
            if process.is_running():
                process.send_signal(signal.SIGCONT)

        return Deed(resume)

    return strike


def kill_all_ranks(server: Server) -> None:
    for rank in server.ranks():
        rank.send_signal(signal.SIGKILL)


def kill_twice(server: Server) -> None:
    """Rank 1, and that of the next worker while it loads, as a machine does that has no memory left."""
    server.rank(1).send_signal(signal.SIGKILL)
    num_loads = server.log_text().count(_LOADING)

    def kill_next() -> None:
        deadline = time.monotonic() + _SECONDS_TO_LOAD
        while server.log_text().count(_LOADING) <= num_loads and time.monotonic() < deadline:
            time.sleep(0.05)
        server.rank(1).send_signal(signal.SIGKILL)

    threading.Thread(target=kill_next, daemon=True).start()


def limit_memory(server: Server) -> Deed:
    """Of rank 1, to what it has; a long prompt then asks for more."""
    rank = server.rank(1)
    rank.rlimit(psutil.RLIMIT_AS, (rank.memory_info().vms, psutil.RLIM_INFINITY))
    client = Client(server.url, Ask(PROMPTS[0], "whole", 8))
    client.start()
    return Deed()


def fill_disk(server: Server) -> Deed:
    return Deed(fill(server.folder), lasts=10.0)


def cut_checkpoint(server: Server) -> None:
    without_its_end(sorted(server.model.glob("*.safetensors")))


def replace_checkpoint(server: Server) -> None:
    for file in server.model.glob("*.safetensors"):
        other = file.with_suffix(".new")
        other.write_bytes(os.urandom(file.stat().st_size))
        other.replace(file)


def cut_checkpoint_and_kill(server: Server) -> None:
    cut_checkpoint(server)
    server.rank(1).send_signal(signal.SIGKILL)


def read_slowly(server: Server) -> Deed:
    """Half of them a byte a second, half nothing at all."""
    has_ended = threading.Event()
    connections = [_connection(server) for _ in range(_NUM_SLOW)]
    ask = Ask(PROMPTS[1], "events")
    head = f"POST {ask.route('/predictions/demo')} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    for connection in connections:
        body = ask.body()
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def read() -> None:
        while not has_ended.wait(1):
            for connection in connections[: _NUM_SLOW // 2]:
                connection.recv(1)

    threading.Thread(target=read, daemon=True).start()
    return Deed(lambda: (has_ended.set(), [own.close() for own in connections]), lasts=15.0)


def say_nothing(server: Server) -> Deed:
    connections = [_connection(server) for _ in range(_NUM_SILENT)]
    return Deed(lambda: [own.close() for own in connections], lasts=15.0)


def _connection(server: Server) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)  # else all of an answer finds room in it
    connection.settimeout(30)
    connection.connect(("127.0.0.1", server.port))
    return connection


def crowd(server: Server) -> Deed:
    """Ten clients for each seat; who is answered asks again, who is refused after the second that it is told."""
    deed = Deed(lasts=_SECONDS_OF_A_CROWD)
    has_ended = threading.Event()
    deed.take_back = has_ended.set

    def ask_again_and_again(number: int) -> None:
        while not has_ended.is_set():
            client = Client(server.url, Ask(PROMPTS[number % len(PROMPTS)], ("text", "whole")[number % 2]))
            deed.crowd.append(client)
            client.start()
            client.join()
            has_ended.wait(1 if client.seen.end == "429" else 0)

    for number in range(10 * _SEATS):
        threading.Thread(target=ask_again_and_again, args=(number,), daemon=True).start()
    return deed


_LOADING = "model_name: demo"
FAULT_OF_A_FOLLOWER = kill(lambda server: server.rank(1))
_TOLD = "streams end with an error event or are cut off, whole answers are a 500; the next worker answers"
_STUCK = MAX_STEP_SECONDS + _SECONDS_BESIDE_THE_BOUND

FAULTS: tuple[Fault, ...] = (
    Fault("kill-follower", "kill -9 of rank 1", kill(lambda server: server.rank(1)), _TOLD),
    Fault("kill-leader", "kill -9 of rank 0", kill(lambda server: server.rank(0)), _TOLD),
    Fault("kill-ranks", "kill -9 of both ranks", kill_all_ranks, _TOLD),
    Fault("kill-agent", "kill -9 of torchrun", kill(lambda server: server.agent()), _TOLD),
    Fault("stop-follower", "SIGSTOP of rank 1", stop(lambda server: server.rank(1)), _TOLD, _STUCK),
    Fault("stop-leader", "SIGSTOP of rank 0", stop(lambda server: server.rank(0)), _TOLD, _STUCK),
    Fault(
        "stop-agent",
        "SIGSTOP of torchrun",
        stop(lambda server: server.agent()),
        "nobody notices",
        is_unnoticed=True,
    ),
    Fault(
        "kill-front-end",
        "kill -9 of TorchServe's Java",
        kill(lambda server: server.front_end()),
        "connections are cut off; `serve` ends with status 1 and leaves nothing: who runs it starts it again",
        ends_server=True,
    ),
    Fault("kill-loading", "kill -9 of rank 1, and of the next while it loads", kill_twice, _TOLD),
    Fault("limit-memory", "rank 1 gets no more memory (RLIMIT_AS)", limit_memory, "as a rank that dies, or nothing"),
    Fault(
        "full-disk",
        "no room for logs and temporary files, 10 s",
        fill_disk,
        "nobody notices",
        site=small_disk,
        is_unnoticed=True,
    ),
    Fault(
        "small-shm", "kill -9 of rank 1 where /dev/shm has 64 KiB", FAULT_OF_A_FOLLOWER, _TOLD, site=small_shared_memory
    ),
    Fault(
        "cut-checkpoint",
        "checkpoint cut in half",
        cut_checkpoint,
        "nobody notices before the next start",
        site=own_checkpoint,
        is_unnoticed=True,
    ),
    Fault(
        "replace-checkpoint",
        "checkpoint replaced by noise",
        replace_checkpoint,
        "nobody notices before the next start",
        site=own_checkpoint,
        is_unnoticed=True,
    ),
    Fault(
        "cut-and-kill",
        "checkpoint cut in half, then kill -9 of rank 1",
        cut_checkpoint_and_kill,
        "`serve` ends with status 1 and says why: nobody waits for a model that cannot load",
        _SECONDS_BESIDE_THE_BOUND + _SECONDS_TO_LOAD,
        ends_server=True,
        site=own_checkpoint,
    ),
    Fault(
        "kill-replica",
        "kill -9 of a follower of one of two replicas",
        FAULT_OF_A_FOLLOWER,
        "its requests end as above; the other replica answers on",
        site=two_replicas,
    ),
    Fault(
        "slow-readers",
        "4 clients that read a byte a second, 4 that never read",
        read_slowly,
        "nobody else notices",
        is_unnoticed=True,
    ),
    Fault("silent", "500 connections that say nothing", say_nothing, "nobody else notices", is_unnoticed=True),
    Fault(
        "overload",
        f"{10 * _SEATS} clients where {_SEATS} have a seat, {_SECONDS_OF_A_CROWD:g} s",
        crowd,
        "who has no seat gets a 429 with Retry-After at once; who has one is answered",
        seconds_to_know=60.0,
        site=with_options("--max-num-seqs", str(_SEATS), "--max-num-waiting", "0"),
        is_unnoticed=True,
    ),
)
