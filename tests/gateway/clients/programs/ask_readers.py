"""Readers without an SDK: requests' and httpx's lines and bytes, cut wherever they like."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import httpx
import requests
from telling import BASE, MODEL, deed, tell

URL = f"{BASE}/chat/completions"
BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
# Letters that some readers take for the end of a line, and some that are cut between bytes.
ODD = "a\u2028b\u0085c\u000b é 例 👩🏽‍🚀 ✅"


def text_of(lines: Iterable[Any]) -> str:
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]" and data.count("[DONE]") == 1
    chunks = [json.loads(own) for own in data[:-1]]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def by_requests(**fields: Any) -> str:
    with requests.post(URL, json={**BODY, **fields}, stream=True, timeout=60) as answer:
        return text_of(answer.iter_lines(decode_unicode=True))


def by_httpx(**fields: Any) -> str:
    with httpx.stream("POST", URL, json={**BODY, **fields}, timeout=60) as answer:
        return text_of(answer.iter_lines())


def by_bytes(size: int, **fields: Any) -> str:
    with requests.post(URL, json={**BODY, **fields}, stream=True, timeout=60) as answer:
        return text_of(b"".join(answer.iter_content(size)).decode().split("\n"))


@deed
def lines() -> Any:
    return [by_requests(), by_httpx(), by_bytes(1), by_bytes(7)]


@deed
def odd_letters() -> Any:
    own: dict[str, Any] = {"guided_choice": [ODD]}
    return [read(**own) == ODD for read in (by_requests, by_httpx, lambda **fields: by_bytes(3, **fields))]


@deed
def content_type() -> Any:
    with requests.post(URL, json=BODY, stream=True, timeout=60) as answer:
        return answer.headers["Content-Type"]


tell("requests", "httpx")
