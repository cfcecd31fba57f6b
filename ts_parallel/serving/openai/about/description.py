"""`GET openapi.json`: all routes of a model that generates text, described by the classes that check their bodies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from ts_parallel.openapi import document as openapi
from ts_parallel.openapi.document import EVENTS, JSON, TEXT, Operation
from ts_parallel.serving.exchange import ERROR, HERE
from ts_parallel.serving.openai.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    NativeBody,
    TokenizeBody,
    TokenizeChatBody,
)

ONE_MODEL = "v1/models/"
"""Begins the route of each."""
# Each route that the service has, as it would be asked for below the model's own URL.
_TOLD: Mapping[str, Operation] = {
    "": Operation("/", "Go on with a prompt.", "post", (NativeBody,), (JSON, TEXT), (TEXT, JSON)),
    "health": Operation("/health", "Whether the model answers.", needs_key=False),
    "metrics": Operation("/metrics", "Figures for Prometheus.", answers=(TEXT,)),
    "v1/models": Operation("/v1/models", "The model under each of its names."),
    ONE_MODEL: Operation("/v1/models/{name}", "The model under one of its names."),
    "v1/limits": Operation("/v1/limits", "The limits of a request."),
    openapi.ROUTE: Operation(f"/{openapi.ROUTE}", "This description."),
    "v1/completions": Operation(
        "/v1/completions", "Go on with prompts.", "post", (CompletionBody,), answers=(JSON, EVENTS)
    ),
    "v1/chat/completions": Operation(
        "/v1/chat/completions", "Answer a conversation.", "post", (ChatBody,), answers=(JSON, EVENTS)
    ),
    "tokenize": Operation(
        "/tokenize", "The tokens of a text or of a conversation.", "post", (TokenizeBody, TokenizeChatBody)
    ),
    "detokenize": Operation("/detokenize", "The text of tokens.", "post", (DetokenizeBody,)),
}


def description(name: str, routes: Iterable[str], *, is_strict: bool, has_keys: bool) -> str:
    """
    Args:
        routes: all that the model has. One that is not told of here is an error of ours.
        is_strict: whether unknown fields are refused.
    """
    told = openapi.Description(
        f"The model {name}",
        [*(_TOLD[route] for route in routes), _TOLD[ONE_MODEL]],
        ERROR,
        takes_others=not is_strict,
        has_keys=has_keys,
        others=HERE,
    )
    return json.dumps(told.document())
