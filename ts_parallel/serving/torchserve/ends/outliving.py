"""A rank's part in being outlived (`outlive.py`): it hands its connection over, and rank 0 is told when another ends.

Where there are no process descriptors (Linux before 5.3, other systems), ranks end as they can.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ts_parallel.serving.torchserve.ends import outlive

if TYPE_CHECKING:
    from ts_parallel.topology import Topology  # and with it torch, which not every handler needs

logger = logging.getLogger(__name__)

HAS_DESCRIPTORS = hasattr(os, "pidfd_open") and sys.platform == "linux"
SECONDS_UNTIL_THE_FRONT_END_WAITS = 0.3
_SECONDS_BESIDE_A_DELAY = 0.2
_SECONDS_TO_HAND_OVER = 30.0
_SECONDS_AFTER_AN_AGENT = outlive.SECONDS_FOR_LAST_ANSWERS + 2.0
_NOT_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # what tells a rank from other processes


class _Place(NamedTuple):
    """What the others have to know of a rank; rank 0's `address` is where connections are handed over."""

    host: str
    pid: int
    has_connection: bool
    address: str = ""


def seconds_until_front_end_waits(settings: Mapping[str, Any]) -> float:
    """How long after a reply TorchServe may still gather requests, by the keys of model-config.yaml."""
    if settings.get("continuousBatching"):
        return SECONDS_UNTIL_THE_FRONT_END_WAITS
    delay = float(settings.get("maxBatchDelay", 0)) / 1000
    return max(SECONDS_UNTIL_THE_FRONT_END_WAITS, delay + _SECONDS_BESIDE_A_DELAY)


def be_outlived(topology: Topology, seconds: float, on_end: Callable[[str], object]) -> None:
    """Start the process that outlives this worker. Every rank must call it, once loaded.

    Args:
        seconds: as of `seconds_until_front_end_waits`.
        on_end: called on rank 0, in a thread, with what has ended of the worker: it is to end then too.
    """
    connection = own_connection() if HAS_DESCRIPTORS else None
    address = f"ts_parallel-{secrets.token_hex(16)}" if topology.rank == 0 else ""
    with ExitStack() as held:
        listener = held.enter_context(_listener(address)) if connection is not None and address else None
        places = topology.gather(_Place(topology.host, os.getpid(), connection is not None, address))
        if connection is not None:
            held.enter_context(connection)
        if connection is None or any(place.host != topology.host or not place.has_connection for place in places):
            return  # a rank elsewhere, or no TorchServe
        if listener is None:
            with socket.socket(socket.AF_UNIX) as leader:
                leader.connect(f"\0{places[0].address}")
                socket.send_fds(leader, [b"."], [connection.fileno()])
            return
        others = [held.enter_context(_taken_over(listener)) for _ in places[1:]]
        _start([connection, *others], [place.pid for place in places], seconds, on_end)


def be_outlived_alone(seconds: float) -> None:
    """The same of a worker that is one process without torchrun: nothing else of it can end."""
    connection = own_connection() if HAS_DESCRIPTORS else None
    if connection is not None:
        with connection:
            _start([connection], [os.getpid()], seconds, lambda _: None)


def own_connection() -> socket.socket | None:
    """TorchServe's connection to this process, once more; None where there is none. It is the one that was accepted at
    a name of the file system, and TorchServe hands it to nobody before the model is loaded."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError, ValueError):
            if not os.readlink(entry).startswith("socket:"):
                continue
            found = socket.socket(fileno=os.dup(int(entry.name)))
            if found.family == socket.AF_UNIX and _is_accepted(found):
                return found
            found.close()
    return None


def _is_accepted(found: socket.socket) -> bool:
    if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    name = found.getsockname()
    return isinstance(name, str) and ".ts.sock." in name


def end_with_agent() -> Callable[[], None]:
    """End this rank once torchrun has ended, which would leave it to nobody.

    Returns: what to call once another sees to that; from then on this rank has the time to end in good order.
    """
    has_others = threading.Event()
    if not HAS_DESCRIPTORS or "TORCHELASTIC_RUN_ID" not in os.environ:
        return has_others.set
    agent = _open_agent()

    def watch() -> None:
        if agent is not None:
            poller = select.poll()
            poller.register(agent, select.POLLIN)
            poller.poll()
        if has_others.is_set():
            time.sleep(_SECONDS_AFTER_AN_AGENT)
        logger.error("torchrun has ended; so does this rank")
        os._exit(1)

    threading.Thread(target=watch, name="agent watch", daemon=True).start()
    return has_others.set


def _open_agent() -> int | None:
    """A descriptor of torchrun; None where it has ended, and another process has this one for its child."""
    parent = os.getppid()
    try:
        agent = os.pidfd_open(parent)
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return None
    if b"torch" in command:
        return agent
    os.close(agent)
    return None


def _listener(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{address}")
    listener.listen()
    listener.settimeout(_SECONDS_TO_HAND_OVER)
    return listener


def _taken_over(listener: socket.socket) -> socket.socket:
    giver, _ = listener.accept()
    with giver:
        giver.settimeout(_SECONDS_TO_HAND_OVER)
        _, (descriptor, *_), _, _ = socket.recv_fds(giver, 1, 1)
    return socket.socket(fileno=descriptor)


def _start(connections: list[socket.socket], pids: list[int], seconds: float, on_end: Callable[[str], object]) -> None:
    """
    Args:
        pids: of the ranks, in their order.
    """
    with ExitStack() as held:
        own_end, leader_end = socket.socketpair()
        held.enter_context(leader_end)

        def watched(name: str, pid: int) -> tuple[str, int]:
            descriptor = os.pidfd_open(pid)
            held.callback(os.close, descriptor)
            return f"{name} (process {pid})", descriptor

        ranks = [watched(f"rank {rank}", pid) for rank, pid in enumerate(pids)]
        agent = watched("torchrun", os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None
        numbers = [connection.fileno() for connection in connections]
        given = {"ranks": ranks, "agent": agent, "leader_end": leader_end.fileno(), "connections": numbers}
        command = [sys.executable, "-I", "-S", outlive.__file__, json.dumps({**given, "seconds": seconds})]
        inherited = [descriptor for _, descriptor in (*ranks, *([agent] if agent else []))]
        subprocess.Popen(
            command,
            pass_fds=[*inherited, leader_end.fileno(), *numbers],
            stdin=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name not in _NOT_OF_RANKS},
            start_new_session=True,  # what is sent to all of a worker's group is not for it
        )
    threading.Thread(target=_hear, args=(own_end, on_end), name="outliving", daemon=True).start()


def _hear(own_end: socket.socket, on_end: Callable[[str], object]) -> None:
    with own_end:
        if reason := own_end.recv(4096):
            on_end(reason.decode())
