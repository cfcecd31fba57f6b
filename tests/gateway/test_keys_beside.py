"""`serve --gateway-port` with keys and an origin: they open the model and its gateway alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from gateway_process import gateway
from serve_process import Served, chat_folder, served_with_gateway

pytestmark = pytest.mark.torchserve

KEY, OTHER, STALE, ORIGIN = "sk-one-7f", "sk-two-8e", "sk-old-9d", "https://page.example"
ASK: Any = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """By the option; the variable, which stands for it, has another key here, and so counts for nothing."""
    folder = chat_folder(tmp_path_factory.mktemp("keys") / "model")
    options = ("--api-key", f"{KEY},{OTHER}", "--cors-origin", ORIGIN)
    with served_with_gateway(folder, *options, TS_PARALLEL_API_KEY=STALE) as served:
        yield served


def bases(served: Served) -> tuple[str, str]:
    return served.direct, served.gateway


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_every_key_opens_both(served: Served, key: str) -> None:
    for base in bases(served):
        with openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0, timeout=60) as client:
            assert client.completions.create(model="demo", prompt="a", max_tokens=2).choices
            assert [own.id for own in client.models.list()] == ["demo"]
        for header in ("x-api-key", "api-key"):
            got = httpx.post(f"{base}/v1/chat/completions", json=ASK, headers={header: key}, timeout=60)
            assert got.status_code == 200, got.text
    with anthropic.Anthropic(base_url=served.gateway, api_key=key, max_retries=0, timeout=60) as claude:
        assert claude.messages.create(model="demo", **ASK).content


def test_no_key_or_a_wrong_one_opens_neither(served: Served) -> None:
    for base in bases(served):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {STALE}"}):
            got = httpx.post(f"{base}/v1/completions", json={"prompt": "a"}, headers=headers, timeout=60)
            assert got.status_code == 401 and KEY not in got.text


def test_gateway_asks_for_health_and_figures_with_a_key(served: Served) -> None:
    """Whoever watches over it has none."""
    assert httpx.get(f"{served.gateway}/health", timeout=60).json()["models"] == {"demo": "ok"}
    assert "vllm:cache_config_info" in httpx.get(f"{served.gateway}/metrics", timeout=60).text


def test_no_command_line_but_that_of_the_command_shows_a_key(served: Served) -> None:
    (gateway,) = served.family("--upstream")
    assert gateway.environ()["TS_PARALLEL_API_KEY"] == f"{KEY},{OTHER}"
    for own in served.process.children(recursive=True):
        assert KEY not in " ".join(own.cmdline())


def test_pages_of_the_origin_may_ask_both(served: Served) -> None:
    for base in bases(served):
        headers = {"Authorization": f"Bearer {KEY}", "Origin": ORIGIN}
        got = httpx.post(f"{base}/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers=headers, timeout=60)
        assert got.headers["access-control-allow-origin"] == ORIGIN
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, is_allowed in ((ORIGIN, True), ("https://other.example", False)):
        got = httpx.options(f"{served.gateway}/v1/completions", headers={"Origin": origin, **asked}, timeout=60)
        assert ("access-control-allow-origin" in got.headers) == is_allowed


def test_gateway_without_a_key_leaves_the_asking_to_the_model(served: Served) -> None:
    """One in front of a model that asks for keys passes its clients' on."""
    with gateway(served.direct.removesuffix("/1.0")) as front:
        for headers, status in (({"Authorization": f"Bearer {KEY}"}, 200), ({}, 401)):
            for route, fields in (("completions", {"prompt": "a", "max_tokens": 2}), ("messages", ASK)):
                got = httpx.post(f"{front.url}/v1/{route}", json=fields, headers=headers, timeout=60)
                assert got.status_code == status, got.text
