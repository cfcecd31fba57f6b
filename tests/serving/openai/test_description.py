"""`GET openapi.json` of a model: the routes that it has, and bodies as the classes that check them have them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from places import DEMO_MODEL
from small_service import SmallService, small_service
from transformers import AutoTokenizer

from ts_parallel.serving.openai.about.description import description

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def served() -> Iterator[SmallService]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
    with small_service(Path(DEMO_MODEL), tokenizer) as own:
        yield own


@pytest.fixture(scope="module")
def document(served: SmallService) -> dict[str, Any]:
    status, told = served.send("openapi.json")
    assert status == 200
    return dict(told)


def test_description_is_openapi_3_1(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()
    assert document["openapi"] == "3.1.0"


def test_every_route_that_there_is_is_described_and_no_other(served: SmallService, document: dict[str, Any]) -> None:
    _, refusal = served.send("nowhere")  # which names all there are
    named = refusal["error"]["message"].split("there are ")[1].split(", ")
    assert set(document["paths"]) == {"/", "/v1/models/{name}", *(f"/{route}" for route in named)}


def test_refusal_is_of_the_shape_that_is_described(served: SmallService, document: dict[str, Any]) -> None:
    validator = Draft202012Validator(document["components"]["schemas"]["Error"])
    for fields in ({}, {"prompt": 5}, {"prompt": "x", "model": "none"}, {"prompt": "x" * 100_000}):
        status, refusal = served.send("v1/completions", **fields)
        assert status >= 400
        validator.validate(refusal)


# What a body may be: by the description, and by the server.
BODIES: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("/v1/completions", {"prompt": "x", "max_tokens": 1}, True),
    ("/v1/completions", {"prompt": ["x", "y"], "max_tokens": 1, "stop": "a", "stream_options": None}, True),
    ("/v1/completions", {"prompt": [1, 2], "max_tokens": 1, "user": "somebody"}, True),
    ("/v1/completions", {"max_tokens": 1}, False),
    ("/v1/completions", {"prompt": "x", "max_tokens": -2}, False),
    ("/v1/completions", {"prompt": "x", "top_p": 1.5}, False),
    ("/v1/completions", {"prompt": {"a": 1}}, False),
    ("/v1/completions", {"prompt": "x", "response_format": {"type": "none"}}, False),
    ("/v1/chat/completions", {"messages": []}, False),
    ("/v1/chat/completions", {"messages": MESSAGES, "top_logprobs": 21}, False),
    ("/tokenize", {"prompt": "x"}, True),
    ("/tokenize", {"prompt": 1}, False),
    ("/detokenize", {"tokens": [1, 2]}, True),
    ("/detokenize", {"tokens": "x"}, False),
)


@pytest.mark.parametrize(("path", "body", "is_right"), BODIES)
def test_body_is_right_by_its_description_where_the_server_takes_it(
    served: SmallService, document: dict[str, Any], path: str, body: dict[str, Any], is_right: bool
) -> None:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    whole = {**schema, "components": document["components"]}
    assert Draft202012Validator(whole).is_valid(body) == is_right
    assert (served.send(path[1:], **body)[0] == 200) == is_right


def test_strict_server_tells_that_it_refuses_unknown_fields(document: dict[str, Any]) -> None:
    strict = json.loads(description("m", ["v1/completions"], is_strict=True, has_keys=True))
    assert strict["components"]["schemas"]["CompletionBody"]["additionalProperties"] is False
    assert "additionalProperties" not in document["components"]["schemas"]["CompletionBody"]
    assert strict["paths"]["/v1/completions"]["post"]["security"] == [{"key": []}]


def test_route_that_nobody_has_told_of_is_an_error() -> None:
    with pytest.raises(KeyError):
        description("m", ["v1/new"], is_strict=False, has_keys=False)
