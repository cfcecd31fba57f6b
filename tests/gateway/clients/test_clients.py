"""Clients that people have before `serve --gateway-port`: the rows of the matrix in gateway/README.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_tokenizers import EOS
from client_programs import seen
from serve_process import Served, served_with_gateway
from table_model import GREETING, TOLD, table_model

pytestmark = pytest.mark.torchserve

PARIS = {"city": "Paris"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table_model(tmp_path_factory.mktemp("clients") / "model")


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with served_with_gateway(model) as served:
        yield served


def test_openais_sdk_over_responses(served: Served) -> None:
    assert seen("ask_openai", "openai", served.gateway) == {
        "whole": [GREETING, "completed", 6],
        "stream": [GREETING, GREETING],
        "tool_loop": ["get_weather", PARIS, TOLD, TOLD],
        "tool_stream": ["get_weather", PARIS, 1],
        "tool_choices": ["function_call", "function_call", "function_call", "message"],
        "typed": ["Paris", 0],
        "chat_typed": ["Paris", 0],
    }


def test_anthropics_sdk(served: Served) -> None:
    assert seen("ask_anthropic", "anthropic", served.gateway) == {
        "whole": [GREETING, "end_turn", 6],
        "stream": [GREETING, "end_turn"],
        "tool_loop": ["get_weather", PARIS, "tool_use", TOLD],
        "tool_stream": ["get_weather", PARIS],
        "tool_choices": ["tool_use", "tool_use", "tool_use", "text"],
        "tool_runner": TOLD,
        "stop_sequence": ["Hello from", "stop_sequence", "Hello from a", " table"],
        "count": True,
    }


def test_readers_without_an_sdk(served: Served) -> None:
    assert seen("ask_readers", "requests", served.gateway) == {
        "lines": [GREETING] * 4,
        "odd_letters": [True] * 3,
        "content_type": "text/event-stream; charset=utf-8",
    }


def test_langchain(served: Served) -> None:
    called = [["get_weather", PARIS]]
    assert seen("ask_langchain", "langchain_openai", served.gateway) == {
        "invoke": [GREETING, "stop", 6],
        "stream": [GREETING, "stop", 6],
        "at_once": [GREETING] * 3,
        "logprobs": f"{GREETING}{EOS}",
        "tool_loop": [called, "tool_calls", TOLD],
        "tool_stream": [called, "tool_calls"],
        "tool_choices": [called, called, called, called, []],
        "strict_tool": called,
        "structured_function_calling": ["Paris", 0],
        "structured_json_schema": [["Paris", 0], ["Paris", 0]],
        "structured_json_mode": ["Paris", 21],
        "structured_stream": {**PARIS, "degrees": 0},
        "over_responses": [GREETING, GREETING, called, TOLD, ["Paris", 0]],
        "completion": [GREETING.removeprefix("Hello")] * 2,
    }


def test_litellm(served: Served) -> None:
    called = [["get_weather", PARIS]]
    assert seen("ask_litellm", "litellm", served.gateway) == {
        "completion": [[GREETING, "stop"]] * 2,
        "usage": [6, 6],
        "stream": [[GREETING, "stop", 6]] * 2,
        "at_once": [GREETING] * 3,
        "tool_loop": [[called, "tool_calls", TOLD]] * 2,
        "tool_stream": [called, "tool_calls"],
        "tool_choices": [called, called, called, []],
        "typed": [PARIS, PARIS, {**PARIS, "degrees": 21}],
        "text_completion": GREETING.removeprefix("Hello"),
        "over_responses": [GREETING, GREETING],
        "over_messages": [GREETING, called, "tool_calls"],
        "refusal": ["BadRequestError", "NotFoundError", "ContextWindowExceededError"],
    }


def test_instructor(served: Served) -> None:
    assert seen("ask_instructor", "instructor", served.gateway) == {
        "tools": ["Paris", 0],
        "strict_tools": ["Paris", 0],
        "json": ["Paris", 21],
        "json_schema": ["Paris", 0],
        "markdown_json": ["Paris", 21],
        "parts": ["Paris", 0],
        "several": [["Paris", 0], ["Paris", 0]],
        "asked_again": ["Paris", 1],
        "with_completion": ["Paris", "tool_calls", "Weather"],
    }


def test_pydantic_ai(served: Served) -> None:
    parts = ["user-prompt", "tool-call", "tool-return", "text"]
    assert seen("ask_pydantic_ai", "pydantic_ai", served.gateway) == {
        "run": [GREETING, 6],
        "stream": GREETING,
        "tool_loop": [TOLD, parts],
        "tool_loop_streamed": [TOLD, parts],
        "typed_output": ["Paris", 0],
        "tool_output": ["Paris", 0],
        "native_output": ["Paris", 0],
        "prompted_output": ["Paris", 21],
        "typed_stream": ["Paris", 0],
        "over_responses": [GREETING, TOLD, ["Paris", 0], ["Paris", 0]],
    }


def test_lm_eval(served: Served, model: Path) -> None:
    assert seen("ask_lm_eval", "lm_eval", served.gateway, str(model)) == {
        "loglikelihood": [{"acc": 1.0}] * 3,
        "generate_until": [{"exact_match": 1.0}] * 2,
        "loglikelihood_rolling": True,
    }


def test_guidellm(served: Served, model: Path) -> None:
    asked = [6, 0, [24]]
    assert seen("ask_guidellm", "guidellm", served.gateway, str(model)) == {"chats": asked, "completions": asked}
