"""The short form of `tests/fuzz_routes.py`: some hundred odd requests to a real server and its gateway."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from bodies_at_limits import workers_of
from fuzz_routes import OPTIONS, fuzz, report
from openapi_spec_validator import OpenAPIV31SpecValidator
from places import ROOT
from serve_process import Served, chat_folder, served_with_gateway

pytestmark = pytest.mark.torchserve


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_with_gateway(chat_folder(tmp_path_factory.mktemp("fuzz") / "model"), *OPTIONS) as own:
        yield own


def test_every_odd_request_is_refused_or_answered_and_streams_beside_keep_their_tokens(served: Served) -> None:
    before = workers_of(served)
    fuzzed = fuzz(served, 600, number=20)
    print(*report(fuzzed), sep="\n")
    assert fuzzed.failures == []
    assert fuzzed.num_streams >= 1 and len(fuzzed.texts) == 1
    assert {200, 400, 404} <= fuzzed.statuses.keys()
    assert workers_of(served) == before


def test_every_route_of_the_pages_is_described(served: Served) -> None:
    direct = httpx.get(f"{served.direct}/openapi.json", timeout=60).json()
    gateway = httpx.get(f"{served.gateway}/openapi.json", timeout=60).json()
    for document in (direct, gateway):
        OpenAPIV31SpecValidator(document).validate()
    text = (ROOT / "handlers" / "README.md").read_text().split("\n## ")[1]
    own = {f"/{route}" for route in re.findall(r"…/1\.0/([\w/.]+)`", text)}
    assert own and own <= direct["paths"].keys()
    rows = (ROOT / "ts_parallel" / "gateway" / "README.md").read_text().split("## Routes")[1].split("\n## ")[0]
    named = set(re.findall(r"`(?:POST |GET |DELETE )?(/[\w/.]*)`", rows))
    assert len(named) > 15 and named <= {path.partition("{")[0].rstrip("/") or "/" for path in gateway["paths"]} | {
        "/v1/models/NAME",
        "/v2/models/NAME",
        "/v1/responses/ID",
    }


def test_bodies_of_routes_that_pass_are_the_models_own(served: Served) -> None:
    direct = httpx.get(f"{served.direct}/openapi.json", timeout=60).json()
    gateway = httpx.get(f"{served.gateway}/openapi.json", timeout=60).json()
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        own, passed = (
            document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            for document in (direct, gateway)
        )
        assert own == passed
    others = {name: own for name, own in direct["components"]["schemas"].items() if name != "Error"}
    assert others == {name: gateway["components"]["schemas"][name] for name in others}


def test_description_leads_to_its_routes(served: Served) -> None:
    """By the URL of its servers, which is beside it."""
    url = httpx.URL(f"{served.direct}/openapi.json")
    document = httpx.get(url, timeout=60).json()
    base = str(url.join(document["servers"][0]["url"])).rstrip("/")
    assert base == served.direct
    assert httpx.get(f"{base}/health", timeout=60).status_code == 200
    got = httpx.post(f"{base}/", json={"prompt": "x", "max_tokens": 1}, timeout=60)
    assert got.status_code == 200, got.text
