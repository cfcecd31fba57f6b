"""A plain HTTP client for tests: whole answers, and streams piece by piece with the time of each."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

JSON = {"Content-Type": "application/json"}


def _connect(url: str) -> tuple[http.client.HTTPConnection, str]:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60), parts.path


def _bytes(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def post(url: str, body: Any, headers: dict[str, str] = JSON) -> tuple[int, str]:
    """Status and text of one whole answer."""
    connection, path = _connect(url)
    try:
        connection.request("POST", path, _bytes(body), headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def get(url: str) -> tuple[int, str]:
    connection, path = _connect(url)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def stream(url: str, body: Any, headers: dict[str, str] = JSON) -> Iterator[tuple[float, str]]:
    """The pieces of a streamed answer, each with the time it came. Closing the iterator ends the connection."""
    connection, path = _connect(url)
    try:
        connection.request("POST", path, _bytes(body), headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        while piece := response.read1():
            yield time.perf_counter(), piece.decode()
    finally:
        connection.close()


def events(text: str) -> list[Any]:
    """The bodies of server-sent events; the closing `[DONE]` as that string."""
    bodies = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [body if body == "[DONE]" else json.loads(body) for body in bodies]
