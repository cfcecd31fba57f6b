"""What every request goes through, on whatever route: ids, keys, origins and sizes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import sse_server
from gateway_process import Gateway, gateway
from sse_server import Recorder, steady, whole

KEY = "correct-horse"
ORIGIN = "https://page.example"


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    with sse_server.running(completions=steady(), chat=whole({"choices": []})) as recorder:
        yield recorder


@pytest.fixture(scope="module")
def front(recorder: Recorder) -> Iterator[Gateway]:
    options = ("--cors-origin", ORIGIN, "--max-request-size", "100KB")
    upstream = f"{recorder.url.removesuffix('/v1')}/predictions/demo"
    with gateway(upstream, options=options, TS_PARALLEL_API_KEY=f"other, {KEY}") as front:
        yield front


def ask(front: Gateway, headers: dict[str, str], path: str = "/v1/completions") -> httpx.Response:
    return httpx.post(f"{front.url}{path}", json={"prompt": "a", "max_tokens": 2}, headers=headers)


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}, {"x-api-key": "other"}])
def test_any_key_opens_in_either_header(front: Gateway, headers: dict[str, str]) -> None:
    assert ask(front, headers).status_code == 200


def test_key_of_a_client_goes_on_to_a_model_that_has_no_other(front: Gateway, recorder: Recorder) -> None:
    """And the gateway asks for its own sake with its first: the model may be one that asks for the same."""
    assert ask(front, {"x-api-key": KEY}).status_code == 200
    assert recorder.keys[-1] == f"Bearer {KEY}"
    assert httpx.get(f"{front.url}/health").status_code == 200
    assert set(recorder.keys_of_gets) == {"Bearer other"}


def test_key_of_a_model_is_sent_in_place_of_the_clients(recorder: Recorder, tmp_path: Path) -> None:
    file = tmp_path / "key_file.json"
    file.write_text('{"inference": {"key": "theirs"}}')
    upstream = f"{recorder.url.removesuffix('/v1')}/predictions/demo"
    with gateway(upstream, options=("--upstream-key-file", str(file))) as front:
        assert ask(front, {"x-api-key": "mine"}).status_code == 200
        assert recorder.keys[-1] == recorder.keys_of_gets[-1] == "Bearer theirs"
        file.unlink()
        got = ask(front, {})
        assert got.status_code == 503 and "--upstream-key-file" in got.json()["error"]["message"]
    recorder.keys_of_gets.clear()


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}, {"Authorization": "Bearer"}, {"x-api-key": "é"}],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/tokenize", "/no/such/route"])
def test_no_key_or_a_wrong_one_is_a_401(front: Gateway, headers: dict[str, str], path: str) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    got = httpx.post(f"{front.url}{path}", json={}, headers=encoded)  # type: ignore[arg-type]
    assert got.status_code == 401
    assert got.json()["error"]["code"] == "invalid_api_key"
    assert got.headers["www-authenticate"] == "Bearer"
    assert KEY not in got.text


def test_anthropics_clients_get_a_401_of_their_shape(front: Gateway) -> None:
    got = ask(front, {}, "/v1/messages")
    assert got.status_code == 401
    assert got.json()["type"] == "error" and got.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("path", ["/health", "/live", "/ready", "/metrics"])
def test_who_watches_over_it_needs_no_key(front: Gateway, path: str) -> None:
    assert httpx.get(f"{front.url}{path}").status_code == 200


def test_key_of_the_gateway_is_not_shown_to_the_command_line(front: Gateway) -> None:
    assert isinstance(front.process.args, list)
    assert not any(KEY in word for word in front.process.args)


def test_request_id_of_the_client_is_kept_and_passed_on(front: Gateway, recorder: Recorder) -> None:
    got = ask(front, {"x-api-key": KEY, "X-Request-Id": "abc-1"})
    assert got.headers.get_list("x-request-id") == ["abc-1"]
    assert recorder.headers[-1]["x-request-id"] == "abc-1"


def test_request_without_an_id_gets_one_of_its_own(front: Gateway, recorder: Recorder) -> None:
    ids = {ask(front, {"x-api-key": KEY, **more}).headers["x-request-id"] for more in ({}, {"X-Request-Id": "a b"})}
    assert len(ids) == 2 and all(own.startswith("req_") for own in ids)
    assert recorder.headers[-1]["x-request-id"] in ids


def test_preflight_of_an_allowed_origin_needs_no_key(front: Gateway) -> None:
    headers = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
    }
    got = httpx.options(f"{front.url}/v1/chat/completions", headers=headers)
    assert got.status_code == 200
    assert got.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in got.headers["access-control-allow-methods"]
    assert "x-stainless-os" in got.headers["access-control-allow-headers"]
    refused = httpx.options(f"{front.url}/v1/chat/completions", headers={**headers, "Origin": "https://other.example"})
    assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers


def test_answers_and_refusals_say_which_origin_may_read_them(front: Gateway) -> None:
    for key in (KEY, "wrong"):
        got = ask(front, {"x-api-key": key, "Origin": ORIGIN})
        assert got.headers["access-control-allow-origin"] == ORIGIN
    assert (
        "access-control-allow-origin" not in ask(front, {"x-api-key": KEY, "Origin": "https://other.example"}).headers
    )


@pytest.mark.parametrize(("size", "status"), [(99_999, 200), (100_000, 200), (100_001, 413)])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_body_above_the_limit_is_a_413(front: Gateway, size: int, status: int, is_chunked: bool) -> None:
    body = b'{"max_tokens": 2, "prompt": "'.ljust(size - 2, b"x") + b'"}'
    content = (body[at : at + 1000] for at in range(0, size, 1000)) if is_chunked else body
    got = httpx.post(f"{front.url}/v1/completions", content=content, headers={"x-api-key": KEY})
    assert got.status_code == status
    if status == 413:
        assert "--max-request-size" in got.json()["error"]["message"] and "100000" in got.json()["error"]["message"]


def test_413_comes_before_the_body_is_sent(front: Gateway) -> None:
    parts = urlsplit(front.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as client:
        client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nx-api-key: {KEY}\r\n".encode())
        client.sendall(b"Content-Length: 99999999999\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_unknown_route_and_wrong_method_have_their_clients_shape(front: Gateway) -> None:
    headers = {"x-api-key": KEY}
    got = ask(front, headers, "/v1/images")
    assert got.status_code == 404 and "'/v1/images'" in got.json()["error"]["message"]
    got = httpx.get(f"{front.url}/v1/completions", headers=headers)
    assert got.status_code == 405 and got.json()["error"]["message"] and "POST" in got.headers["allow"]
    assert ask(front, headers, "/v1/messages/x").json()["type"] == "error"
    assert isinstance(ask(front, headers, "/v2/x").json()["error"], str)


def test_metrics_count_what_came_by_which_route(front: Gateway) -> None:
    ask(front, {"x-api-key": KEY})
    ask(front, {}, "/made/up")
    httpx.get(f"{front.url}/v1/models/demo", headers={"x-api-key": KEY})
    text = httpx.get(f"{front.url}/metrics").text
    assert 'ts_parallel_gateway_requests_total{route="/v1/completions",status="200"}' in text
    assert 'ts_parallel_gateway_requests_total{route="other",status="401"}' in text
    assert 'ts_parallel_gateway_first_byte_seconds_bucket{route="/v1/completions",le="+Inf"}' in text
    assert 'ts_parallel_gateway_requests_total{route="/v1/models/{name:path}",status="200"} 1' in text
    assert "/made/up" not in text
