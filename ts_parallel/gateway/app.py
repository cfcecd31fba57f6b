"""All routes of a gateway, and what stands around them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ts_parallel.errors import EngineError, RequestError
from ts_parallel.gateway.batch.kserve import INFERENCE, KServe
from ts_parallel.gateway.batch.speech import Speech
from ts_parallel.gateway.counters import Counters
from ts_parallel.gateway.described.document import Document
from ts_parallel.gateway.described.fields import TEXT, body_of
from ts_parallel.gateway.dialects.messages import COUNTED, MESSAGE, Messages
from ts_parallel.gateway.dialects.responses import RESPONSE, Responses, ResponseStore
from ts_parallel.gateway.guard import Guard, is_open
from ts_parallel.gateway.page import PATHS, page
from ts_parallel.gateway.passing import Passing
from ts_parallel.gateway.refusals import refusal
from ts_parallel.gateway.settings import GatewaySettings
from ts_parallel.gateway.upstream.models import Upstreams
from ts_parallel.openapi import document as openapi
from ts_parallel.openapi.document import EVENTS, FORM, JSON, Operation, Schema

_OF_TEXT_MODELS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
_OF_BATCH_MODELS = ("/v1/embeddings", "/v1/classify", "/v1/score", "/v1/rerank")
_OF_SPEECH = ("/v1/audio/transcriptions", "/v1/audio/translations")
_PASSED = (*_OF_TEXT_MODELS, *_OF_BATCH_MODELS, *_OF_SPEECH)
_STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_NO_JSON = {"/metrics": "text/plain"} | dict.fromkeys(PATHS, "text/html")
# What bodies may have that do not pass as they are; of those the models tell.
_ANY_BODY = body_of({"model": TEXT})
_BODIES: Mapping[str, Schema] = {
    "/v1/responses": RESPONSE,
    "/v1/messages": MESSAGE,
    "/v1/messages/count_tokens": COUNTED,
    "/v2/models/{name}/infer": INFERENCE,
    "/v2/models/{name}/versions/{version}/infer": INFERENCE,
}


def make_app(settings: GatewaySettings) -> ASGIApp:
    """The gateway that `settings` tell of."""
    upstreams = Upstreams(settings.upstreams, settings.max_silence, next(iter(settings.api_keys), None))
    counters = Counters()
    document = Document(upstreams, has_keys=bool(settings.api_keys))
    routes = [*_routes(upstreams, counters), Route(f"/{openapi.ROUTE}", document.show)]
    document.tell_of([own for route in routes for own in _operations(route)], _PASSED)
    counters.count_by_name((route.path, route.endpoint) for route in routes)
    handlers = {RequestError: _refused, HTTPException: _unrouted, Exception: _failed}
    app: ASGIApp = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
    app = Guard(app, settings, counters)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def _routes(upstreams: Upstreams, counters: Counters) -> list[Route]:
    passing = Passing(upstreams, counters)
    responses = Responses(upstreams, ResponseStore())
    messages = Messages(upstreams)
    speech, kserve = Speech(passing), KServe(upstreams)
    return [
        *(Route(path, passing.ask_for_text, methods=["POST"]) for path in _OF_TEXT_MODELS),
        *(Route(path, passing.ask_batch, methods=["POST"]) for path in _OF_BATCH_MODELS),
        *(Route(path, speech.hear, methods=["POST"]) for path in _OF_SPEECH),
        *(Route(path, page) for path in PATHS),
        Route("/v1/models", passing.models),
        Route("/v1/models/{name:path}", passing.model),
        Route("/v1/responses", responses.create, methods=["POST"]),
        Route("/v1/responses/{id}", responses.retrieve),
        Route("/v1/responses/{id}", responses.delete, methods=["DELETE"]),
        Route("/v1/messages", messages.create, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count, methods=["POST"]),
        Route("/v2", kserve.server),
        Route("/v2/health/live", kserve.live),
        Route("/v2/health/ready", kserve.ready),
        Route("/v2/models/{name}", kserve.model),
        Route("/v2/models/{name}/ready", kserve.model_ready),
        Route("/v2/models/{name}/infer", kserve.infer, methods=["POST"]),
        Route("/v2/models/{name}/versions/{version}", kserve.model),
        Route("/v2/models/{name}/versions/{version}/ready", kserve.model_ready),
        Route("/v2/models/{name}/versions/{version}/infer", kserve.infer, methods=["POST"]),
        Route("/live", passing.live),
        Route("/health", passing.ready),
        Route("/ready", passing.ready),
        Route("/metrics", passing.metrics),
    ]


def _operations(route: Route) -> Iterator[Operation]:
    """As OpenAPI tells of them: the first line of its endpoint's docstring says what a route is for."""
    path = re.sub(r":\w+\}", "}", route.path)
    says = (route.endpoint.__doc__ or "").strip().splitlines()[0]
    kind = _NO_JSON.get(path, JSON)
    answers = (kind, EVENTS) if path in _STREAMED else (kind,)
    takes = (FORM,) if path in _OF_SPEECH else (JSON,)
    for method in sorted((route.methods or set()) - {"HEAD"}):
        bodies = (_BODIES.get(path, _ANY_BODY),) if method == "POST" else ()
        yield Operation(path, says, method.lower(), bodies, takes, answers, needs_key=not is_open(path))


async def _refused(request: Request, error: RequestError) -> Response:
    return refusal(request.url.path, error)


async def _unrouted(request: Request, error: HTTPException) -> Response:
    """No such route, or none for this method."""
    path = request.url.path
    said = f"no route {path!r}" if error.status_code == 404 else f"{request.method} {path}: {error.detail}"
    own = RequestError(said)
    own.status = error.status_code
    own.kind = "not_found_error" if error.status_code == 404 else own.kind
    answer = refusal(path, own)
    answer.headers.update(error.headers or {})
    return answer


async def _failed(request: Request, error: Exception) -> Response:
    return refusal(request.url.path, EngineError(f"the gateway failed: {type(error).__name__}: {error}"))
