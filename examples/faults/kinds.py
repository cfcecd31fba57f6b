"""The table of faults: what is done to a running server, and what its clients are to see then."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from faults.server import Server

Undo = Callable[[], None]
MAX_STEP_SECONDS = 5.0
_SECONDS_BESIDE_THE_BOUND = 5.0


@dataclass(frozen=True)
class Fault:
    """`strike` makes it, and returns what takes it back, if anything is to be."""

    name: str
    what: str
    strike: Callable[[Server], Undo | None]
    expected: str
    seconds_to_know: float = _SECONDS_BESIDE_THE_BOUND
    """At most, until every client in flight knows; of a stuck rank, beside `max_step_seconds`."""
    ends_server: bool = False


def kill(choose: Callable[[Server], psutil.Process]) -> Callable[[Server], None]:
    def strike(server: Server) -> None:
        choose(server).send_signal(signal.SIGKILL)

    return strike


def stop(choose: Callable[[Server], psutil.Process]) -> Callable[[Server], Undo]:
    def strike(server: Server) -> Undo:
        process = choose(server)
        process.send_signal(signal.SIGSTOP)

        def resume() -> None:
            if process.is_running():
                process.send_signal(signal.SIGCONT)

        return resume

    return strike


def kill_all_ranks(server: Server) -> None:
    for rank in server.ranks():
        rank.send_signal(signal.SIGKILL)


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
        "nobody notices: it only looks whether ranks live, and they do that by themselves",
    ),
    Fault(
        "kill-front-end",
        "kill -9 of TorchServe's Java",
        kill(lambda server: server.front_end()),
        "connections are cut off; `serve` ends with status 1 and leaves nothing: who runs it starts it again",
        ends_server=True,
    ),
)
