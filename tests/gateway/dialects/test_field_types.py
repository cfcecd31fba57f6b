"""Bodies of other dialects whose fields are of wrong types: each is a 400 that names the field, and none fails."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import sse_server
from gateway_process import Gateway, gateway
from openapi_spec_validator import OpenAPIV31SpecValidator
from sse_server import whole

_SAID = {
    "choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1},
}
RESPONSES, MESSAGES, INFER = "/v1/responses", "/v1/messages", "/v2/models/demo/infer"
RIGHT: dict[str, dict[str, Any]] = {
    RESPONSES: {"input": "x"},
    MESSAGES: {"max_tokens": 4, "messages": [{"role": "user", "content": "x"}]},
    INFER: {"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["x"]}]},
}
WRONG: tuple[tuple[str, str, Any], ...] = (
    (RESPONSES, "previous_response_id", ["x"]),
    (RESPONSES, "include", 5),
    (RESPONSES, "tools", "x"),
    (RESPONSES, "tool_choice", 3),
    (RESPONSES, "tool_choice", {"type": "function", "name": ["x"]}),
    (RESPONSES, "input", [{"type": ["message"]}]),
    (RESPONSES, "input", {"a": 1}),
    (RESPONSES, "metadata", {"a": [float("inf")]}),
    (RESPONSES, "store", "no"),
    (RESPONSES, "stream", 1),
    (MESSAGES, "output_config", "x"),
    (MESSAGES, "tools", 5),
    (MESSAGES, "tool_choice", {"type": {"a": 1}}),
    (MESSAGES, "max_tokens", "4"),
    (MESSAGES, "thinking", True),
    (MESSAGES, "metadata", float("nan")),
    (INFER, "parameters", [1]),
    (INFER, "outputs", 7),
    (INFER, "id", 7),
)


@pytest.fixture(scope="module")
def front() -> Iterator[Gateway]:
    completion = whole({"choices": [{"index": 0, "text": "hi", "finish_reason": "stop"}]})
    with (
        sse_server.running(chat=whole(_SAID), completions=completion) as recorder,
        gateway(f"demo={recorder.url.removesuffix('/v1')}/predictions/demo") as front,
    ):
        yield front


def ask(front: Gateway, route: str, body: dict[str, Any]) -> httpx.Response:
    tools = [{"type": "function", "name": "f", "input_schema": {}}] if "tool_choice" in body else []
    if tools:
        body = {"tools": tools if route == RESPONSES else [{"name": "f", "input_schema": {}}], **body}
    return httpx.post(f"{front.url}{route}", content=json.dumps(body), timeout=30)


@pytest.mark.parametrize("route", RIGHT)
def test_right_body_is_answered(front: Gateway, route: str) -> None:
    assert ask(front, route, RIGHT[route]).status_code == 200


@pytest.mark.parametrize(("route", "name", "value"), WRONG)
def test_field_of_a_wrong_type_is_a_400_that_names_it(front: Gateway, route: str, name: str, value: Any) -> None:
    got = ask(front, route, {**RIGHT[route], name: value})
    assert got.status_code == 400, got.text
    assert name in json.dumps(got.json()["error"])


def test_output_that_is_no_name_is_a_400(front: Gateway) -> None:
    assert ask(front, INFER, {**RIGHT[INFER], "outputs": [{"name": []}]}).status_code == 400


def test_description_is_there_though_the_model_tells_nothing(front: Gateway) -> None:
    document = httpx.get(f"{front.url}/openapi.json", timeout=30).json()
    OpenAPIV31SpecValidator(document).validate()
    assert {RESPONSES, MESSAGES, "/v2/models/{name}/infer", "/v1/completions"} <= document["paths"].keys()
    schema = document["paths"][MESSAGES]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["messages", "max_tokens"]


def test_what_is_no_http_is_refused_as_all_else_is(front: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(front.url).port or 0), timeout=30) as connection:
        connection.sendall(b"\x16\x03\x01 no http at all\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"application/json" in head
    assert "HTTP/1.1" in json.loads(body)["error"]["message"]
