"""The process that outlives a worker's ranks, so that a rank that dies takes no request with it. Rank 0 starts it.

TorchServe's front end interrupts itself when a connection to a rank closes. Where that comes while it passes a reply
on, before it has the next requests together, it clears its list of open jobs and answers none of them: their clients
wait until they give up (`WorkerThread.run` of TorchServe 0.12.0: `req` is null then, and `cleanJobs` follows). Where it
waits for a reply, it answers all. So this process holds every rank's connection open beside the rank. When one dies,
or torchrun, it has the others end in good order, lets the front end come to where it waits, and only then closes.

It imports nothing of this package: it is started without site-packages, and is to stay small.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

SECONDS_FOR_LAST_ANSWERS = 3.0
"""Rank 0 has so long to tell its clients."""
_SECONDS_TO_BE_KILLED = 5.0  # the front end kills torchrun once the connections are closed
_HUNG_UP = select.POLLHUP | select.POLLERR | select.POLLRDHUP


class Watched:
    """A process that is told apart from any later one of its number."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self.descriptor = descriptor

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, or does so in time."""
        return bool(_events([self.descriptor], seconds))

    def send(self, kind: signal.Signals) -> None:
        with suppress(OSError):
            signal.pidfd_send_signal(self.descriptor, kind)


def wait_for_an_end(watched: Sequence[Watched], connections: Sequence[socket.socket]) -> Watched | None:
    """Who of them has ended; None where the front end has ended the worker, or is gone."""
    by_descriptor = {own.descriptor: own for own in watched}
    poller = select.poll()
    for descriptor in by_descriptor:
        poller.register(descriptor, select.POLLIN)
    for connection in connections:
        poller.register(connection, select.POLLRDHUP)
    ended = {descriptor for descriptor, _ in poller.poll()}
    return None if has_hung_up(connections) else by_descriptor[min(ended)]


def see_to_the_end(watched: Sequence[Watched]) -> None:
    """Of a worker whose ranks end by themselves. torchrun may wait for minutes then, for a file that is gone."""
    deadline = time.monotonic() + _SECONDS_TO_BE_KILLED
    for own in watched:
        if not own.wait(max(0.0, deadline - time.monotonic())):
            own.send(signal.SIGKILL)


def end_in_good_order(
    ended: Watched, ranks: Sequence[Watched], agent: Watched | None, leader_end: socket.socket
) -> None:
    """Return once no rank is left.

    torchrun is stopped meanwhile: it would end rank 0 before its clients are told, and start ranks of its own that the
    front end knows nothing of. It is not killed: the front end would take that for a lack of memory, and answer 413.
    """
    if agent is not None and ended is not agent:
        agent.send(signal.SIGSTOP)
    leader, *followers = ranks
    for follower in followers:
        follower.send(signal.SIGKILL)
    with suppress(OSError):
        leader_end.sendall(f"{ended.name} has ended".encode())
    if not leader.wait(SECONDS_FOR_LAST_ANSWERS):
        leader.send(signal.SIGKILL)
    for rank in ranks:
        rank.wait(SECONDS_FOR_LAST_ANSWERS)


def let_front_end_wait(leaders: socket.socket, seconds: float) -> None:
    """Return once it waits for a reply that nobody will send: it has sent rank 0 what nobody has read, or sends
    nothing for so long."""
    _events([leaders.fileno()], seconds)


def has_hung_up(connections: Sequence[socket.socket]) -> bool:
    """Whether the front end has closed, or is gone."""
    return any(events & _HUNG_UP for events in _events([own.fileno() for own in connections], 0).values())


def _events(descriptors: Sequence[int], seconds: float | None) -> dict[int, int]:
    """What there is of each; waits for the first of it. Not by `select`, which knows 1024 descriptors alone."""
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN | select.POLLRDHUP)
    return dict(poller.poll(None if seconds is None else seconds * 1000))


def main(arguments: str) -> None:
    """`arguments`: the numbers of what this process has inherited, as JSON."""
    given = json.loads(arguments)
    ranks = [Watched(name, descriptor) for name, descriptor in given["ranks"]]
    agent = Watched(*given["agent"]) if given["agent"] else None
    leader_end = socket.socket(fileno=given["leader_end"])
    connections = [socket.socket(fileno=descriptor) for descriptor in given["connections"]]
    watched = [*ranks, *([agent] if agent is not None else [])]
    ended = wait_for_an_end(watched, connections)
    if ended is None:
        see_to_the_end(watched)
        return
    with suppress(OSError):  # TorchServe reads no more of a worker whose torchrun has ended
        print(f"ts_parallel: {ended.name} has ended; so does its worker, and TorchServe starts another", flush=True)
    end_in_good_order(ended, ranks, agent, leader_end)
    let_front_end_wait(connections[0], given["seconds"])
    for connection in connections:
        connection.close()
    see_to_the_end(watched)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main(sys.argv[1])
    os._exit(0)
