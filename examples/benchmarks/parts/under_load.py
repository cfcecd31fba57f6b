"""Many streams at once against a real TorchServe, with clients that leave and bodies that are wrong.

Before the load, an idle server answers each prompt once, greedily; under load it must give the same answers, refuse
what is wrong with a 4xx or 5xx and a JSON body, keep its worker, and give all KV blocks back. Exits with 1 if not.

    python examples/benchmarks/parts/under_load.py                             200 streams for 3 minutes
    python examples/benchmarks/parts/under_load.py --streams 40 --seconds 20   a short one

It starts its own server on loopback and sends nothing anywhere else.
"""

from __future__ import annotations

import argparse
import http.client
import json
import platform
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ts_parallel.cli.server.archive import handler_config
from ts_parallel.cli.server.serve import running
from ts_parallel.cli.server.torchserve import TorchServe, free_ports

DEMO_MODEL = Path(__file__).parents[2] / "demo_model"
MAX_MODEL_LEN = 512
LONGEST_PROMPT, LONGEST_ANSWER = 150, 120  # words, tokens
PART_OF_BAD_BODIES, PART_OF_LEAVING = 0.05, 0.2
SECONDS_TO_ANSWER = 120
SECONDS_TO_SETTLE = 30
WORDS = "return the value of a list that was given to this function open file name class module string with no items"

BAD_BODIES: tuple[tuple[str, bytes], ...] = (
    ("", b'{"prompt": "x", "max_tokens": "many"}'),
    ("", b'{"prompt": "x", "max_tokenz": 5}'),
    ("", b'{"prompt": ""}'),
    ("", b'{"prompt": "x", '),
    ("", b"\xff\xfe{"),
    ("", json.dumps({"prompt": "word " * 2 * MAX_MODEL_LEN}).encode()),
    ("1.0/v1/completions", b"[]"),
    ("1.0/v1/completions", b'{"prompt": [1, 999999]}'),
    ("1.0/v1/completions", json.dumps({"prompt": "x", "max_tokens": 10 * MAX_MODEL_LEN}).encode()),
    ("1.0/v1/completions", b'{"prompt": "x", "temperature": -1}'),
    ("1.0/v1/nothing", b"{}"),
)


@dataclass(frozen=True)
class Ask:
    """A greedy request, and how it is to be answered: as text, as server-sent events, or at once."""

    prompt: str
    max_tokens: int
    shape: str

    @property
    def route(self) -> str:
        return "1.0/v1/completions" if self.shape == "events" else ""

    def body(self) -> bytes:
        stream = self.shape != "whole"
        fields = {"prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0, "stream": stream}
        return json.dumps({**fields, "ignore_eos": True}).encode()

    def text(self, received: str) -> str:
        """What has been answered so far; of events those that are whole."""
        if self.shape == "text":
            return received
        if self.shape == "whole":
            return str(json.loads(received)["text"]) if received else ""
        lines = received[: received.rfind("\n\n") + 1].split("\n")
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ") and "[DONE]" not in line]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)


@dataclass
class Outcome:
    """What became of all requests. Owned by the lock."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    first_pieces: list[float] = field(default_factory=list)  # seconds
    num_tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, fault: str | None = None, *, num_tokens: int = 0) -> None:
        with self.lock:
            self.kinds[kind] += 1
            self.num_tokens += num_tokens
            if fault is not None:
                self.faults.append(f"{kind}: {fault[:500]}")


def make_asks(count: int, generator: random.Random) -> list[Ask]:
    """Some begin alike, so that prefixes are found; lengths are spread from one word to the longest."""
    words = WORDS.split()
    beginnings = [" ".join(generator.choices(words, k=40)) for _ in range(3)]
    asks = []
    for number in range(count):
        own = " ".join(generator.choices(words, k=generator.randint(1, LONGEST_PROMPT)))
        prompt = f"{generator.choice(beginnings)} {own}" if number % 3 == 0 else own
        asks.append(Ask(prompt, generator.randint(1, LONGEST_ANSWER), ("text", "events", "whole")[number % 3]))
    return asks


class Server:
    """One server's URL, and what it is asked over connections of their own."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path

    def post(self, route: str, body: bytes) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=SECONDS_TO_ANSWER)
        path = f"{self._path}/{route}" if route else self._path
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def figures(self) -> dict[str, float]:
        """The worker's metrics without labels, but for the reasons of ends."""
        connection, response = self.post("1.0/metrics", b"{}")
        with closing(connection):
            lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
        names = [(line.partition("{")[0].removeprefix("vllm:"), line) for line in lines]
        return {
            name + (line.rpartition("finished_reason=")[2].split('"')[1] if "finished_reason" in line else ""): float(
                line.rpartition(" ")[2]
            )
            for name, line in names
            if not name.endswith("_bucket")
        }


def answer(server: Server, ask: Ask) -> str:
    """The whole answer.

    Raises:
        RuntimeError: it is refused.
    """
    connection, response = server.post(ask.route, ask.body())
    with closing(connection):
        received = response.read().decode()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {received}")
    return ask.text(received)


def stream(server: Server, ask: Ask, expected: str, most_pieces: int | None, outcome: Outcome) -> None:
    """Ask, read to the end or leave after `most_pieces`, and compare what came."""
    kind = "read to the end" if most_pieces is None else "left"
    started = time.perf_counter()
    connection, response = server.post(ask.route, ask.body())
    with closing(connection):
        received = b""
        for number, piece in enumerate(pieces(response)):
            if number == 0:
                outcome.first_pieces.append(time.perf_counter() - started)
            received += piece
            if response.status == 200 and number == most_pieces:
                break
    with outcome.lock:
        outcome.statuses[response.status] += 1
    if response.status != 200:
        return outcome.note("refused", None if is_refusal(response, received) else f"{response.status} {received!r}")
    if most_pieces is None:
        got = ask.text(received.decode())
        return outcome.note(kind, None if got == expected else f"{got!r}, not {expected!r}", num_tokens=ask.max_tokens)
    got = ask.text(received.decode(errors="ignore")) if ask.shape != "whole" or received.endswith(b"}") else ""
    return outcome.note(kind, None if expected.startswith(got) else f"{got!r} does not begin {expected!r}")


def pieces(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while piece := response.read1():
        yield piece


def refuse(server: Server, route: str, body: bytes, outcome: Outcome) -> None:
    """Send what is wrong."""
    connection, response = server.post(route, body)
    with closing(connection):
        text = response.read()
    with outcome.lock:
        outcome.statuses[response.status] += 1
    outcome.note("bad body", None if is_refusal(response, text) else f"{body[:60]!r} gets {response.status} {text!r}")


def is_refusal(response: http.client.HTTPResponse, text: bytes) -> bool:
    """A 4xx or 5xx with a JSON object."""
    try:
        return 400 <= response.status < 600 and isinstance(json.loads(text), dict)
    except ValueError:
        return False


def client(server: Server, asks: list[tuple[Ask, str]], deadline: float, seed: int, outcome: Outcome) -> None:
    """One client after the other until the deadline."""
    generator = random.Random(seed)
    while time.monotonic() < deadline:
        dice = generator.random()
        try:
            if dice < PART_OF_BAD_BODIES:
                refuse(server, *generator.choice(BAD_BODIES), outcome)
                continue
            ask, expected = generator.choice(asks)
            leaves = dice < PART_OF_BAD_BODIES + PART_OF_LEAVING
            stream(server, ask, expected, generator.randint(0, 20) if leaves else None, outcome)
        except (OSError, http.client.HTTPException, ValueError) as error:
            outcome.note("broken off", f"{type(error).__name__}: {error}")


def settled(server: Server) -> dict[str, float]:
    """The figures once nothing runs or waits, or after a while."""
    deadline = time.monotonic() + SECONDS_TO_SETTLE
    while True:
        figures = server.figures()
        busy = figures["num_requests_running"] + figures["num_requests_waiting"] + figures["kv_cache_usage_perc"]
        if not busy or time.monotonic() > deadline:
            return figures
        time.sleep(0.5)


def run_load(torchserve: TorchServe, num_streams: int, seconds: float, num_prompts: int, seed: int) -> dict[str, Any]:
    """The report; its `faults` are empty where all is well."""
    server = Server(torchserve.url)
    asks = [(ask, answer(server, ask)) for ask in make_asks(num_prompts, random.Random(seed))]
    before = settled(server)
    outcome = Outcome()
    started = time.monotonic()
    with ThreadPoolExecutor(num_streams) as pool:
        for number in range(num_streams):
            pool.submit(client, server, asks, started + seconds, seed + number, outcome)
    took = time.monotonic() - started
    after = settled(server)
    faults = list(outcome.faults)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        if after[name]:
            faults.append(f"{name} is {after[name]} at the end")
    num_starts = torchserve.log_text().count("ts_parallel is ready")
    if num_starts != 1 or "Worker died" in torchserve.log_text():
        faults.append(f"the worker was started {num_starts} times")
    grown = {name: after[name] - before[name] for name in after}
    return {
        "streams": num_streams,
        "seconds": round(took, 1),
        "requests": dict(outcome.kinds),
        "statuses": {str(status): count for status, count in sorted(outcome.statuses.items())},
        "faults": faults,
        "generated tokens/s": round(grown["generation_tokens_total"] / took, 1),
        "first piece, s": spread(outcome.first_pieces),
        "preemptions": grown["num_preemptions_total"],
        "prefix hits": round(grown["prefix_cache_hits_total"] / max(1, grown["prefix_cache_queries_total"]), 3),
        "ended": {reason: grown[f"request_success_total{reason}"] for reason in ("stop", "length", "abort")},
    }


def spread(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100) if len(values) > 1 else [0.0] * 99
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200, choices=range(1, 501), metavar="1…500")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--prompts", type=int, default=60, help="each is answered by the idle server first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--kv-cache-memory", default="6MiB", help="so little that requests are preempted")
    parser.add_argument("--json", type=Path, help="write the report to this file too")
    arguments = parser.parse_args()
    config = handler_config(
        DEMO_MODEL,
        "cpu",
        tensor_parallel_size=arguments.tensor_parallel_size,
        dtype="float32",  # in which answers do not depend on who shares a step
        max_model_len=MAX_MODEL_LEN,
        kv_cache_memory=arguments.kv_cache_memory,
    )
    with running(config, DEMO_MODEL, "demo", "127.0.0.1", free_ports(1)[0], False, threading.Event()) as torchserve:
        report = run_load(torchserve, arguments.streams, min(arguments.seconds, 600), arguments.prompts, arguments.seed)
    report = {"date": str(date.today()), "machine": platform.machine(), **report}
    print(json.dumps({**report, "faults": report["faults"][:20]}, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report))
    sys.exit(bool(report["faults"]))


if __name__ == "__main__":
    main()
