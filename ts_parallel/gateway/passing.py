"""The routes whose bodies and answers are the model's own: they pass as they are, and so do the models' lists."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ts_parallel import long_json
from ts_parallel.errors import RequestError
from ts_parallel.gateway.counters import PROMETHEUS, Counters, joined
from ts_parallel.gateway.guard import given_key
from ts_parallel.gateway.refusals import (
    SECONDS_TO_RETRY,
    UnavailableError,
    UnknownModelError,
    UpstreamError,
    UpstreamRefusal,
    error_of,
    headers_of,
    json_answer,
    refusal,
)
from ts_parallel.gateway.streams import EventStream
from ts_parallel.gateway.upstream.events import failed_events, is_stream, whole_events
from ts_parallel.gateway.upstream.exchange import MAY_LEAVE, Exchange
from ts_parallel.gateway.upstream.models import Upstream, Upstreams


class Passing:
    """Routes that pass bytes. The models are lent."""

    def __init__(self, upstreams: Upstreams, counters: Counters) -> None:
        self._upstreams = upstreams
        self._counters = counters

    async def ask_for_text(self, request: Request) -> Response:
        """`POST /v1/completions` and its like: the own route of that name of a model that generates text."""
        return await self._post(request, generates_text=True)

    async def ask_batch(self, request: Request) -> Response:
        """`POST /v1/embeddings` and its like: that of a model of batch inference."""
        return await self._post(request, generates_text=False)

    async def _post(self, request: Request, generates_text: bool) -> Response:
        body = await request.body()
        fields = await read_fields(body)
        upstream = self._upstreams.named(fields.get("model"))
        if fields.get("model") and upstream.served_name != upstream.name:
            body = await written({**fields, "model": upstream.served_name})
        return await self.pass_on(request, upstream.name, body, generates_text=generates_text)

    async def pass_on(
        self,
        request: Request,
        model: str | None,
        body: bytes,
        content_type: str = "application/json",
        *,
        generates_text: bool,
    ) -> Response:
        """The answer of the model's own route of that name.

        Args:
            generates_text: which kind of model has that route.

        Raises:
            RequestError: there is no such model, or it is of the other kind, or it does not answer.
        """
        upstream = self._upstreams.named(model)
        await upstream.check_kind(generates_text)
        route = request.url.path.removeprefix("/")
        exchange = await upstream.ask("POST", route, body, headers_to_pass(request, content_type))
        if is_stream(exchange) and exchange.status < 400:
            return EventStream(_passed(exchange, upstream))
        try:
            status, answer = await exchange.read_whole()
        except (UnavailableError, UpstreamError):
            upstream.is_ready = False
            raise
        finally:
            exchange.close()
        if status >= 400:
            return self._refused(request, upstream, exchange, status, answer)
        return Response(answer, status, media_type=exchange.headers.get("content-type", "application/json"))

    def _refused(
        self, request: Request, upstream: Upstream, exchange: Exchange, status: int, answer: bytes
    ) -> Response:
        """The model's own refusals as they are, TorchServe's in OpenAI's shape."""
        error = upstream.refusal_of(status, answer)
        if isinstance(error, UpstreamRefusal) and answer.lstrip().startswith(b'{"error"'):
            headers = {**headers_of(status), **_kept(exchange, "retry-after")}
            return Response(answer, status, headers, media_type="application/json")
        upstream.is_ready = upstream.is_ready and not isinstance(error, UnavailableError)
        return refusal(request.url.path, error)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: those that answer."""
        wrong = await self._upstreams.look()
        cards = [_card(own) for own in self._upstreams.all if wrong[own.name] is None]
        if not cards:
            raise next(error for error in wrong.values() if error is not None)
        return json_answer({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        name = request.path_params["name"]
        if not name:  # which is the list, with a slash behind it
            return await self.models(request)
        upstream = next((own for own in self._upstreams.all if own.name == name), None)
        if upstream is None:
            raise UnknownModelError(f"the model {name!r} does not exist", "model")
        await upstream.look()
        return json_answer(_card(upstream))

    async def live(self, request: Request) -> Response:
        """Whether the gateway itself answers."""
        return json_answer({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether every model does."""
        wrong = await self._upstreams.look()
        body = {"status": "failed" if any(wrong.values()) else "ok"}
        models = {name: "ok" if error is None else str(error) for name, error in wrong.items()}
        headers = {"Retry-After": str(SECONDS_TO_RETRY)} if any(wrong.values()) else None
        return json_answer({**body, "models": models}, 503 if any(wrong.values()) else 200, headers)

    async def metrics(self, request: Request) -> Response:
        """The figures of all models that tell theirs, and the gateway's."""
        texts = await asyncio.gather(*(_metrics(own) for own in self._upstreams.all))
        return Response(joined([*texts, self._counters.text()]), headers={"Content-Type": PROMETHEUS})


async def _passed(exchange: Exchange, upstream: Upstream) -> AsyncGenerator[bytes, None]:
    """An upstream's events, byte by byte; where it fails, that is said in their last."""
    try:
        async for events in whole_events(exchange):
            yield events
    except RequestError as error:
        upstream.is_ready = False
        yield failed_events(error_of(error))
    finally:
        exchange.close()


async def read_fields(body: bytes) -> dict[str, Any]:
    """A body as a JSON object. A long one is read in a thread: others are answered meanwhile.

    Raises:
        RequestError: it is none.
    """
    try:
        is_long = len(body) >= long_json.LONG
        fields = await asyncio.to_thread(long_json.loads, body) if is_long else json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RequestError(f"the body must be a JSON object, got {type(fields).__name__}")
    return fields


async def written(fields: Mapping[str, Any]) -> bytes:
    """As JSON; how long it is is not known before, so always in a thread where there is any list."""
    if any(isinstance(own, list) for own in fields.values()):
        return (await asyncio.to_thread(long_json.dumps, dict(fields))).encode()
    return json.dumps(fields).encode()


def headers_to_pass(request: Request, content_type: str = "application/json") -> dict[str, str]:
    """What an upstream is to know of a request beside its body; its key reaches those that have none of their own."""
    headers = {"Content-Type": content_type, "X-Request-Id": request.scope["request_id"], **MAY_LEAVE}
    key = given_key(request.headers)
    return headers if key is None else {**headers, "Authorization": f"Bearer {key}"}


def _kept(exchange: Exchange, name: str) -> Mapping[str, str]:
    return {name.title(): exchange.headers[name]} if name in exchange.headers else {}


def _card(upstream: Upstream) -> dict[str, Any]:
    """The model's own entry; of one that generates no text, what every entry has."""
    own = {"id": upstream.name, "object": "model", "created": upstream.since, "owned_by": "ts_parallel"}
    return upstream.card or own


async def _metrics(upstream: Upstream) -> str:
    """None of a model that is not there or has no such route."""
    try:
        async with upstream.asked("GET", "metrics") as exchange:
            text = (await exchange.read_all()).decode("utf-8", "replace")
            return text if exchange.status == 200 else ""
    except RequestError:
        return ""
