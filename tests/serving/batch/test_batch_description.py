"""`GET openapi.json` of a model of batch inference: its routes, each with the fields that its bodies may have."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from batch_worker import MINILM, Context, Worker, lone_rank
from openapi_spec_validator import OpenAPIV31SpecValidator


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with lone_rank():
        yield Worker("text_embedding", MINILM)


def ask(worker: Worker, route: str, body: object = None) -> tuple[int, dict[str, object]]:
    context = Context(headers={0: {"url_path": route}}, request_ids={0: "a"})
    (answer,) = worker.handler.handle([{"body": body}], context)
    return context.statuses[0][0], json.loads(answer)


def test_description_has_every_route_and_every_field_that_is_read(worker: Worker) -> None:
    status, document = ask(worker, "openapi.json")
    assert status == 200
    OpenAPIV31SpecValidator(document).validate()
    paths = json.loads(json.dumps(document["paths"]))
    _, refusal = ask(worker, "nowhere")
    named = json.loads(json.dumps(refusal))["error"]["message"].split("there are ")[1].split(", ")
    assert set(paths) == {"/", *(f"/{route}" for route in named)}
    for route in ("v1/embeddings", "v1/rerank", "v1/score"):
        fields = paths[f"/{route}"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert "truncate_prompt_tokens" in fields
        # None of them is unknown where it is sent, whatever else is wrong with the body; a name beside them is.
        for name in fields:
            status, refused = ask(worker, route, {name: {}})
            assert status == 400 and "unknown field" not in str(refused)
        assert "unknown field" in str(ask(worker, route, {"zzz": 1})[1])
