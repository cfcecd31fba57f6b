"""Bodies at and around every limit of `v1/limits`, to every route of a model and of its gateway, beside a stream.

By hand, for 2,000 of them and how many of each status came:

    python tests/bodies_at_limits.py
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from http_client import events
from places import DEMO_MODEL
from serve_process import Served, chat_folder, served_with_gateway
from transformers import AutoTokenizer

# So small that a body of each size is sent soon.
OPTIONS = ("--max-request-size", "1MiB", "--max-response-size", "128KiB", "--max-num-waiting", "16")
MESSAGES: Any = [{"role": "user", "content": "What is a list?"}]
COMPLETION, CHAT = {"prompt": "x", "max_tokens": 1}, {"messages": MESSAGES, "max_tokens": 1}
LETTER = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True).convert_tokens_to_ids("a")

_SECONDS_TO_HANG = 60
_NUM_AT_ONCE = 3


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def body_of_size(num_bytes: int) -> dict[str, Any]:
    body = {"prompt": "x", "max_tokens": 1, "metadata": ""}
    return {**body, "metadata": "a" * (num_bytes - len(json.dumps(body)))}


def schema_of_size(num_letters: int) -> dict[str, Any]:
    schema = {"type": "integer", "maximum": 9, "minimum": 1, "description": ""}
    return {**schema, "description": "a" * (num_letters - len(json.dumps(schema)))}


# What reaches so far up to each limit.
REACHING: dict[str, Callable[[int], tuple[str, dict[str, Any]]]] = {
    "max_model_len": lambda size: ("v1/completions", {"prompt": [7] * (size - 1), "max_tokens": 1}),
    "n": lambda size: ("v1/completions", {**COMPLETION, "n": size}),
    "open_requests": lambda size: ("v1/completions", {**COMPLETION, "prompt": ["x"] * size}),
    "logprobs": lambda size: ("v1/completions", {**COMPLETION, "logprobs": size}),
    "stop_strings": lambda size: ("v1/completions", {**COMPLETION, "stop": [f"s{at}" for at in range(size)]}),
    "stop_characters": lambda size: ("v1/chat/completions", {**CHAT, "stop": ["a" * (size - 9), "b" * 9]}),
    "bad_words": lambda size: ("v1/completions", {**COMPLETION, "bad_words": [f"word{at}" for at in range(size)]}),
    "bad_words_characters": lambda size: ("v1/completions", {**COMPLETION, "bad_words": ["a" * (size - 9), "b" * 9]}),
    "form_characters": lambda size: ("v1/completions", {**COMPLETION, "guided_json": schema_of_size(size)}),
    "form_choices": lambda size: (
        "v1/completions",
        {**COMPLETION, "guided_choice": [f"c{at:05}" for at in range(size)]},
    ),
    "fields": lambda size: ("v1/completions", COMPLETION | {f"x_{at}": 1 for at in range(size - len(COMPLETION))}),
    "levels": lambda size: ("v1/chat/completions", {**CHAT, "chat_template_kwargs": {"x": nested(size - 1)}}),
    "max_request_size": lambda size: ("v1/completions", body_of_size(size)),
    "max_response_size": lambda size: ("detokenize", {"tokens": [LETTER] * (size - len(json.dumps({"prompt": ""})))}),
}
# The same limits' fields in bodies of the other routes, which have them or refuse them.
_OF_ROUTES: Mapping[str, Mapping[str, Any]] = {
    "": COMPLETION,
    "v1/completions": COMPLETION,
    "v1/chat/completions": CHAT,
    "tokenize": {"prompt": "x"},
    "detokenize": {"tokens": [LETTER]},
    "v1/responses": {"input": "x", "max_output_tokens": 16},
    "v1/messages": CHAT,
    "v1/messages/count_tokens": {"messages": MESSAGES},
    "v1/embeddings": {"input": "x"},
    "v1/audio/transcriptions": {"file": "x"},
    "v2/models/demo/infer": {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["x"]}]},
    "v1/models": {},
    "v1/limits": {},
    "nowhere": {},
}
_ONLY_AT_THE_GATEWAY = tuple(own for own in _OF_ROUTES if own.startswith(("v1/responses", "v1/messages", "v2/")))
_ONLY_DIRECT = ("", "v1/limits")


@dataclass(frozen=True)
class Body:
    limit: str
    beyond: int
    """How much more than the limit."""
    url: str
    content: bytes
    content_type: str

    def __str__(self) -> str:
        return f"{self.limit}{self.beyond:+} as {self.content_type} to {self.url}"


def bodies(served: Served, limits: Mapping[str, int], seed: int = 0) -> list[Body]:
    """Some thousands in an order of their own, the same for each seed."""
    made = [
        Body(name, beyond, f"{base}/{route}".rstrip("/"), content, content_type)
        for name, most in limits.items()
        for beyond in (-1, 0, 1)
        for route, own in _OF_ROUTES.items()
        for base in _bases(served, route)
        for content, content_type in _written({**own, **_fields(name, most + beyond, route)})
    ]
    random.Random(seed).shuffle(made)
    return made


def _bases(served: Served, route: str) -> list[str]:
    direct = [] if route in _ONLY_AT_THE_GATEWAY else [served.direct]
    return direct if route in _ONLY_DIRECT else [*direct, served.gateway]


def _fields(limit: str, size: int, route: str) -> dict[str, Any]:
    """Those that reach up to a limit, under the names that a route has for them."""
    fields = REACHING[limit](size)[1]
    if limit == "max_response_size" and route == "tokenize":
        return {"prompt": "a " * (size // 12)}
    if route == "v1/messages" and "stop" in fields:
        return {"stop_sequences": fields["stop"]}
    has_prompt = "prompt" in _OF_ROUTES[route]
    return {name: value for name, value in fields.items() if has_prompt or name not in ("prompt", "max_tokens")}


def _written(fields: Mapping[str, Any]) -> Iterator[tuple[bytes, str]]:
    text = json.dumps({"model": "demo", **fields})
    yield text.encode(), "application/json"
    yield text.encode(), "text/plain"
    yield json.dumps({"model": "demo", "stream": True, **fields}).encode(), "application/json"
    yield text[:-1].encode(), "application/json"  # which is cut off
    yield text.encode("utf-16"), "application/json"


@dataclass
class Outcome:
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    num_streams: int = 0
    largest_gap: float = 0.0
    """Seconds between two pieces of a stream beside."""
    texts: set[str] = field(default_factory=set)
    """Of those streams, which are alike."""


def post_all(served: Served, own: Sequence[Body]) -> Outcome:
    """Post them, some at once, beside a stream after the other."""
    outcome = Outcome()

    def ask(body: Body) -> None:
        headers = {"Content-Type": body.content_type}
        try:
            with httpx.Client(timeout=_SECONDS_TO_HANG) as client:
                answer = client.post(body.url, content=body.content, headers=headers)
        except httpx.HTTPError as error:
            outcome.failures.append(f"{body}: {error!r}")
            return
        outcome.statuses[answer.status_code] += 1
        if answer.status_code >= 500:
            outcome.failures.append(f"{body}: {answer.status_code} {answer.text[:300]}")

    with beside_streams(served, outcome), ThreadPoolExecutor(_NUM_AT_ONCE) as threads:
        list(threads.map(ask, own))
    return outcome


@contextmanager
def beside_streams(served: Served, outcome: Outcome) -> Iterator[None]:
    has_ended, has_begun = threading.Event(), threading.Event()
    body = {"model": "demo", "prompt": "x", "max_tokens": 480, "ignore_eos": True, "stream": True, "temperature": 0}

    def read() -> None:
        while not has_ended.is_set():
            with httpx.stream("POST", f"{served.gateway}/v1/completions", json=body, timeout=_SECONDS_TO_HANG) as got:
                if got.status_code == 429:  # it is full for now
                    time.sleep(0.05)
                    continue
                last, text = time.monotonic(), ""
                for piece in got.iter_text():
                    now, text = time.monotonic(), text + piece
                    outcome.largest_gap, last = max(outcome.largest_gap, now - last), now
                    has_begun.set()
            outcome.num_streams += 1
            outcome.texts.add("".join(own["choices"][0]["text"] for own in events(text) if "choices" in own))
            if not text.endswith("data: [DONE]\n\n") or '"error"' in text:
                outcome.failures.append(f"a stream ended with {text[-300:]!r}")

    thread = threading.Thread(target=read)
    thread.start()
    try:
        assert has_begun.wait(60)
        yield
    finally:
        has_ended.set()
        thread.join()
    if len(outcome.texts) > 1:
        outcome.failures.append(f"streams beside differ: {len(outcome.texts)} texts")


def limits_of(served: Served) -> dict[str, int]:
    limits = httpx.get(f"{served.direct}/v1/limits").json()["limits"]
    return {name: limit["most"] for name, limit in limits.items() if limit["most"] is not None}


def workers_of(served: Served) -> set[int]:
    return {own.pid for own in served.family("model_service_worker.py")}


def main(num_bodies: int = 2000) -> None:
    with tempfile.TemporaryDirectory() as folder, served_with_gateway(chat_folder(Path(folder) / "m"), *OPTIONS) as own:
        before, begin = workers_of(own), time.monotonic()
        outcome = post_all(own, bodies(own, limits_of(own))[:num_bodies])
        print(f"{sum(outcome.statuses.values())} bodies in {time.monotonic() - begin:.0f} s: {dict(outcome.statuses)}")
        print(f"{outcome.num_streams} streams beside, largest gap {outcome.largest_gap:.3f} s")
        print("the worker is the same" if workers_of(own) == before else "THE WORKER IS ANOTHER")
        print(*outcome.failures, sep="\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
