"""Requests that nobody means to send, to every route of a model and of its gateway, beside streams.

    python tests/fuzz_routes.py --bodies 10000 --json fuzz.json

It starts a server of its own, draws bodies along the descriptions that the server gives (`openapi.json`), and prints
how many of each status came, by which of the two, and what is wrong: an answer of 5xx, one that is no JSON, a
connection that breaks, a hang, a stream beside that loses tokens. Half of the requests go to TorchServe directly.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from bodies_at_limits import Outcome, beside_streams, workers_of
from fuzz_cases import Request, drawn
from raw_requests import Answer, Bytes, exchange, raw_cases
from serve_process import Served, chat_folder, served_with_gateway

OPTIONS = ("--max-request-size", "16MiB", "--max-num-waiting", "64")
_SECONDS_TO_HANG = 90.0
_NUM_AT_ONCE = 6
_LONG_PROMPT = 10 << 20
# What TorchServe 0.12 itself answers before any of it reaches a handler, and no handler can change.
_TORCHSERVES_OWN: tuple[tuple[str, int, bytes], ...] = (
    ("17 MB", 413, b""),  # its refusal of a body that is too long has no body
    ("HTTP/2", 500, b"ArrayIndexOutOfBoundsException"),
)


@dataclass
class Fuzzed(Outcome):
    """What came of it."""

    by_server: dict[str, Counter[int]] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    num_of_torchserve: int = 0
    """Answers that are wrong in a way that is TorchServe's own."""
    num_closed: int = 0
    """Connections that were closed without an answer, of those that had sent no whole request."""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 1),
            "statuses": _sorted(self.statuses),
            "by_server": {name: _sorted(counts) for name, counts in self.by_server.items()},
            "wrong_by_torchserve_itself": self.num_of_torchserve,
            "closed_without_an_answer": self.num_closed,
            "streams_beside": self.num_streams,
            "largest_gap_seconds": round(self.largest_gap, 3),
            "failures": self.failures,
        }


def _sorted(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(status): counts[status] for status in sorted(counts)}


def fuzz(served: Served, num_bodies: int, number: int) -> Fuzzed:
    """Send so many bodies, and all raw cases, some at once."""
    fuzzed = Fuzzed()
    bases = {"direct": served.direct, "gateway": served.gateway}
    cases: list[tuple[str, str, Request | Bytes]] = []
    for name, base in bases.items():
        host, path = urlsplit(base).netloc, urlsplit(base).path
        document = httpx.get(f"{base}/openapi.json", timeout=60).json()
        cases += [(name, host, own) for own in drawn(path, document, num_bodies // len(bases), number)]
        cases += [(name, host, own) for own in raw_cases(f"{path}/v1/completions", host)]
        cases += [(name, host, own) for own in _large(path)]
    random.Random(number).shuffle(cases)  # the two, and what is slow, among each other
    begin = time.monotonic()
    with beside_streams(served, fuzzed), ThreadPoolExecutor(_NUM_AT_ONCE) as threads:
        list(threads.map(lambda case: _send(case[0], case[1], case[2], fuzzed), cases))
    fuzzed.seconds = time.monotonic() - begin
    return fuzzed


def _large(path: str) -> list[Request]:
    letters = b'{"model": "demo", "max_tokens": 1, "prompt": "' + b"a b " * (_LONG_PROMPT // 4) + b'"}'
    tokens = b'{"model": "demo", "max_tokens": 1, "prompt": [' + b"7, " * (_LONG_PROMPT // 3) + b"7]}"
    message = (
        b'{"model": "demo", "max_tokens": 1, "messages": [{"role": "user", "content": "' + b"a" * _LONG_PROMPT + b'"}]}'
    )
    types = (("Content-Type", "application/json"),)
    return [
        Request("10 MB of text", "POST", f"{path}/v1/completions", types, letters),
        Request("10 MB of tokens", "POST", f"{path}/v1/completions", types, tokens),
        Request("10 MB of a message", "POST", f"{path}/v1/chat/completions", types, message),
        Request("10 MB cut off", "POST", f"{path}/v1/completions", types, letters[:-9]),
        Request("17 MB", "POST", f"{path}/v1/completions", types, letters + b" " * (7 << 20)),
    ]


def _send(server: str, host: str, case: Request | Bytes, fuzzed: Fuzzed) -> None:
    name, _, port = host.partition(":")
    sent = case if isinstance(case, Bytes) else Bytes(case.kind, (case.wire(host),))
    what = f"{server}: {case if isinstance(case, Request) else sent.kind}"
    begin = time.monotonic()
    try:
        answers = exchange(name, int(port), sent, _SECONDS_TO_HANG)
    except TimeoutError:
        fuzzed.failures.append(f"{what}: nothing for {time.monotonic() - begin:.0f} s")
        return
    except (OSError, HTTPException) as error:
        fuzzed.failures.append(f"{what}: {error!r}")
        return
    fuzzed.num_closed += not answers
    for answer in answers:
        fuzzed.statuses[answer.status] += 1
        fuzzed.by_server.setdefault(server, Counter())[answer.status] += 1
        wrong = _wrong_with(answer)
        if wrong and server == "direct" and _is_torchserves_own(sent.kind, answer):
            fuzzed.num_of_torchserve += 1
        elif wrong:
            fuzzed.failures.append(f"{what}: {answer.status}, {wrong}: {answer.body[:300]!r}")


def _wrong_with(answer: Answer) -> str | None:
    """None where it is as every answer has to be."""
    if answer.status >= 500:
        return "a failure"
    if answer.status >= 400 or "json" in answer.content_type:
        try:
            body = json.loads(answer.body, parse_constant=_refuse)
        except ValueError as error:
            return f"no JSON ({error})"
        if answer.status >= 400 and not isinstance(body, dict):
            return "a refusal that is no object"
    return None


def _is_torchserves_own(kind: str, answer: Answer) -> bool:
    own = [(status, part) for name, status, part in _TORCHSERVES_OWN if name == kind]
    return any(answer.status == status and (part in answer.body if part else not answer.body) for status, part in own)


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def report(fuzzed: Fuzzed) -> list[str]:
    lines = [f"{sum(fuzzed.statuses.values())} answers in {fuzzed.seconds:.0f} s: {_sorted(fuzzed.statuses)}"]
    lines += [f"  {name}: {_sorted(counts)}" for name, counts in fuzzed.by_server.items()]
    lines.append(f"{fuzzed.num_of_torchserve} answers are wrong in a way that is TorchServe's own")
    lines.append(f"{fuzzed.num_closed} connections that sent no whole request were closed without an answer")
    lines.append(f"{fuzzed.num_streams} streams beside, largest gap {fuzzed.largest_gap:.3f} s")
    return [*lines, f"{len(fuzzed.failures)} failures", *fuzzed.failures[:40]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the counts to")
    own = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as folder,
        served_with_gateway(chat_folder(Path(folder) / "m"), *OPTIONS) as served,
    ):
        before = workers_of(served)
        fuzzed = fuzz(served, own.bodies, own.seed)
        if workers_of(served) != before:
            fuzzed.failures.append("the worker is another")
    print(*report(fuzzed), sep="\n")
    if own.json is not None:
        own.json.write_text(json.dumps(fuzzed.as_json(), indent=1) + "\n")
    return 1 if fuzzed.failures else 0


if __name__ == "__main__":
    sys.exit(main())
