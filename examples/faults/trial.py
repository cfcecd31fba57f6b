"""One fault, once: streams are open, it strikes, and until all is as before everybody is watched."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from faults.clients import PROMPTS, Ask, Client, Seen, is_of
from faults.server import Server

SECONDS_TO_BEGIN = 60
SECONDS_TO_RECOVER = 240
_PROBE_TOKENS = 8
_ASKED_AT_ONCE = 6
_SECONDS_BETWEEN_PROBES = 0.1
_SECONDS_AFTER_RECOVERY = 20.0
_RIGHT_IN_A_ROW = 3


@dataclass
class Outcome:
    """What came of one trial. Times are seconds since the fault."""

    in_flight: int = 0
    hung: int = 0
    wrong: int = 0
    of_another: int = 0
    known: list[float] = field(default_factory=list)
    """Of each request that the fault ended."""
    recovered: float | None = None
    ends: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    """How long each of a crowd that was refused waited to hear it."""
    answered: list[float] = field(default_factory=list)
    """How long each of a crowd that was not refused took."""
    mebibytes: tuple[float, float] = (0.0, 0.0)
    """Of all processes, before and after."""
    seconds_to_start: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "ends": dict(self.ends)}


@dataclass
class Deed:
    """A fault that was made. `take_back` ends it, once it has lasted."""

    take_back: Callable[[], object] = lambda: None
    lasts: float = 0.0
    crowd: list[Client] = field(default_factory=list)
    """Who came with it; still more may come until it is taken back."""


class Probe(threading.Thread):
    """Asks a short question again and again; knows since when it was answered rightly every time."""

    def __init__(self, url: str, expected: dict[str, str]) -> None:
        super().__init__(name="probe", daemon=True)
        self._url, self._expected = url, expected
        self._has_ended = threading.Event()
        self.right_since: float | None = None
        self.num_right = 0
        self.wrong: list[Seen] = []

    def run(self) -> None:
        while not self._has_ended.is_set():
            client = Client(self._url, Ask(PROMPTS[0], "whole", _PROBE_TOKENS), SECONDS_TO_RECOVER)
            client.run()
            if client.seen.is_whole and client.seen.text == self._expected[f"{PROMPTS[0]} {_PROBE_TOKENS}"]:
                self.right_since = self.right_since or client.seen.ended_at
                self.num_right += 1
            else:
                self.right_since, self.num_right = None, 0
                if client.seen.is_whole:
                    self.wrong.append(client.seen)
            self._has_ended.wait(_SECONDS_BETWEEN_PROBES)

    def end(self) -> None:
        self._has_ended.set()


def expected_answers(server: Server) -> dict[str, str]:
    """What an undisturbed server answers, by prompt; the probe's too."""
    asks = [Ask(prompt, "whole") for prompt in PROMPTS]
    clients = [Client(server.url, ask) for ask in asks]
    for begin in range(0, len(clients), _ASKED_AT_ONCE):
        for client in clients[begin : begin + _ASKED_AT_ONCE]:
            client.start()
        for client in clients[begin : begin + _ASKED_AT_ONCE]:
            client.join()
    answers = {client.seen.ask.prompt: client.seen.text for client in clients if client.seen.is_whole}
    assert len(answers) == len(PROMPTS) and len(set(answers.values())) == len(PROMPTS), "a server that is not disturbed"
    probe = Client(server.url, Ask(PROMPTS[0], "whole", _PROBE_TOKENS))
    probe.run()
    assert probe.seen.is_whole
    return {**answers, f"{PROMPTS[0]} {_PROBE_TOKENS}": probe.seen.text}


def open_requests(server: Server, num_streams: int, num_whole: int) -> list[Client]:
    """Long requests, of which all streams have begun."""
    asks = [Ask(PROMPTS[index % len(PROMPTS)], ("text", "events")[index % 2]) for index in range(num_streams)]
    asks += [Ask(PROMPTS[(num_streams + index) % len(PROMPTS)], "whole") for index in range(num_whole)]
    clients = [Client(server.url, ask) for ask in asks]
    for client in clients:
        client.start()
    for client in clients[:num_streams]:
        assert client.seen.has_begun.wait(SECONDS_TO_BEGIN), "a stream did not begin"
    return clients


def run_trial(
    server: Server,
    expected: dict[str, str],
    strike: Callable[[Server], Deed | None],
    num_streams: int,
    num_whole: int,
    seconds_to_know: float,
) -> Outcome:
    """
    Args:
        strike: makes the fault.
        seconds_to_know: of a stream; after that it counts as hung.
    """
    clients = open_requests(server, num_streams, num_whole)
    time.sleep(random.uniform(0, 0.3))
    open_then = [client for client in clients if client.is_alive()]
    before, struck_at = mebibytes(server), time.monotonic()
    deed = strike(server) or Deed()
    probe = Probe(server.url, expected)
    probe.start()
    try:
        time.sleep(deed.lasts)
        if deed.lasts:
            deed.take_back()
        _wait([*open_then, *deed.crowd], probe, server, struck_at, deed.lasts + seconds_to_know)
    finally:
        probe.end()
        deed.take_back()
    outcome = judge(open_then, expected, struck_at)
    judge_crowd(outcome, deed.crowd, expected)
    outcome.wrong += len(probe.wrong)
    if probe.right_since is not None and probe.num_right >= _RIGHT_IN_A_ROW:
        outcome.recovered = max(0.0, probe.right_since - struck_at - deed.lasts)
    outcome.left = [f"process {stray.pid}" for stray in server.strays()]
    outcome.seconds_to_start = server.seconds_to_start
    outcome.mebibytes = (before, mebibytes(server))
    for client in (*clients, *deed.crowd):
        client.leave()
        client.join()
    return outcome


def mebibytes(server: Server) -> float:
    total = 0
    for process in server.family():
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return round(total / 2**20, 1)


def _wait(clients: list[Client], probe: Probe, server: Server, struck_at: float, seconds_to_know: float) -> None:
    """Until every request has ended and the server answers again, or too long a time has passed. Who gets pieces is
    slow and does not hang."""
    while (now := time.monotonic()) - struck_at < SECONDS_TO_RECOVER:
        waiting = [client for client in clients if client.is_alive()]
        hang = all(client.seen.is_silent(now, struck_at, seconds_to_know) for client in waiting)
        since = probe.right_since
        is_back = since is not None and probe.num_right >= _RIGHT_IN_A_ROW
        has_ended = not server.is_running
        if hang and (has_ended or (is_back and (not waiting or now - (since or now) > _SECONDS_AFTER_RECOVERY))):
            return
        time.sleep(0.02)


def judge(clients: list[Client], expected: dict[str, str], struck_at: float) -> Outcome:
    outcome = Outcome(in_flight=len(clients))
    for seen in (client.seen for client in clients):
        verdict = is_of(seen, expected)
        outcome.wrong += verdict == "wrong"
        outcome.of_another += verdict == "of another"
        if not seen.end:
            outcome.hung += 1
            outcome.ends["hung"] += 1
            continue
        outcome.ends[seen.end] += 1
        if not seen.is_whole:
            outcome.known.append(seen.ended_at - struck_at)
    return outcome


def judge_crowd(outcome: Outcome, crowd: list[Client], expected: dict[str, str]) -> None:
    for seen in (client.seen for client in crowd):
        outcome.ends[seen.end or "hung"] += 1
        outcome.hung += not seen.end
        if seen.end.startswith("429"):
            outcome.refused.append(seen.ended_at - seen.began_at)
        elif seen.is_whole:
            outcome.answered.append(seen.ended_at - seen.began_at)
            verdict = is_of(seen, expected)
            outcome.wrong += verdict == "wrong"
            outcome.of_another += verdict == "of another"
