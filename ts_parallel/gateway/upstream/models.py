"""The models behind a gateway: which one a request is for, whether it answers, and what its refusals say."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from ts_parallel.errors import NotFoundError, RequestError
from ts_parallel.gateway.refusals import (
    SilentUpstreamError,
    UnavailableError,
    UnknownModelError,
    UpstreamError,
    UpstreamRefusal,
)
from ts_parallel.gateway.settings import UpstreamSettings
from ts_parallel.gateway.upstream.exchange import Exchange, request_bytes

_SECONDS_OF_A_PROBE = 5.0
_NEEDS_A_KEY = (401, 403)
_WORKER_ENDED = (500, 507)  # TorchServe's own, while it starts the worker again


class Upstream:
    """One model. Owns what is known of it: whether it has answered since it last failed, and of which kind it is."""

    def __init__(self, settings: UpstreamSettings, max_silence: float, own_key: str | None) -> None:
        """
        Args:
            own_key: with which the gateway asks for its own sake, where the settings name no other.
        """
        self.name = settings.name
        self.served_name = settings.served_name
        self.version = settings.path.rpartition("/")[2]
        self.since = int(time.time())
        self.is_ready = False
        self.card: dict[str, Any] | None = None
        """Its entry of `v1/models`; None where it has none, or does not show it to the gateway."""
        self.generates_text = False
        """Known once it has answered; models of batch inference do not."""
        self._settings = settings
        self._max_silence = max_silence
        self._own_key = own_key
        self._who = f"the model {settings.name!r}"
        self._probe: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def asked(
        self, method: str, route: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Exchange]:
        """Its answer from the head on; the connection is closed on leaving.

        Raises:
            RequestError: there is none.
        """
        exchange = await self.ask(method, route, body, headers)
        try:
            yield exchange
        finally:
            exchange.close()

    async def ask(
        self, method: str, route: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Exchange:
        """The same, to be closed by whoever asks. A model that has not answered yet is asked for its health first, so
        that a request never waits for one that is being loaded.

        Raises:
            RequestError: there is none.
        """
        if not self.is_ready:
            await self.look()
        try:
            return await self._send(method, route, body, headers or {}, self._max_silence)
        except (UnavailableError, UpstreamError):
            self.is_ready = False
            raise

    async def look(self) -> None:
        """Find out whether it answers; those who ask at the same time share one probe.

        Raises:
            UnavailableError: it does not.
        """
        if self._probe is None or self._probe.done():
            self._probe = asyncio.ensure_future(self._look())
        await asyncio.shield(self._probe)

    async def check_kind(self, generates_text: bool) -> None:
        """
        Raises:
            NotFoundError: it is of the other kind, so it has no such route.
            UnavailableError: it does not answer.
        """
        if not self.is_ready:
            await self.look()
        if self.generates_text and not generates_text:
            raise NotFoundError(f"{self._who} generates text: this route is for models of batch inference", "model")
        if generates_text and not self.generates_text:
            task = (self.card or {}).get("task")
            what = f"its task is {task}, and this" if task else "this"
            raise NotFoundError(f"{self._who} generates no text: {what} route is for models that do", "model")

    async def whole(self, exchange: Exchange) -> bytes:
        """The body of a whole answer.

        Raises:
            RequestError: it is a refusal, or does not come to its end.
        """
        status, body = await exchange.read_whole()
        if status < 400:
            return body
        error = self.refusal_of(status, body)
        self.is_ready = self.is_ready and not isinstance(error, (UnavailableError, UpstreamError))
        raise error

    def refusal_of(self, status: int, body: bytes) -> RequestError:
        """OpenAI's shape and TorchServe's own; what is the gateway's fault, or passes by itself, is called so."""
        try:
            fields = json.loads(body)
        except ValueError:
            fields = None
        inner = fields.get("error") if isinstance(fields, dict) else None
        if isinstance(inner, dict):
            own = inner.get("message"), inner.get("param"), inner.get("type"), inner.get("code")
            return UpstreamRefusal(status, str(own[0]), own[1], str(own[2] or "invalid_request_error"), own[3])
        message, kind = body[:500].decode("utf-8", "replace").strip(), ""
        if isinstance(fields, dict):
            message, kind = str(fields.get("message", message)), str(fields.get("type", ""))
        if status in _WORKER_ENDED:
            return UnavailableError(f"{self._who} was lost and is being started again: {message}; try again later")
        if status == 503:
            return UnavailableError(f"{self._who} takes no more for now: {message}; try again later")
        if kind in ("InvalidKeyException", "TokenAuthorizationException") or status in (401, 403):
            return UpstreamError(f"{self._who} refuses the gateway's key (--upstream-key-file): {message}")
        if status == 413:
            message = message or "the body is larger than the model's server takes (max_request_size)"
        return UpstreamRefusal(status, message or f"status {status}", None, "invalid_request_error", None)

    async def _look(self) -> None:
        try:
            health = await self._send("GET", "health", b"", {}, _SECONDS_OF_A_PROBE)
            try:
                if health.status >= 400:
                    error = self.refusal_of(health.status, await health.read_all())
                    raise UnavailableError(f"{self._who} is not ready: {error}; try again later")
                await health.read_all()
            finally:
                health.close()
            models = await self._send("GET", "v1/models", b"", {}, _SECONDS_OF_A_PROBE)
            try:
                self._know(models.status, await models.read_all())
            finally:
                models.close()
        except (SilentUpstreamError, UpstreamError) as error:
            self.is_ready = False
            raise UnavailableError(f"{self._who} is not ready: {error}; try again later") from None
        except UnavailableError:
            self.is_ready = False
            raise
        self.is_ready = True

    def _know(self, status: int, body: bytes) -> None:
        """Take in what it answers to `v1/models`."""
        if status >= 400 and status not in (404, *_NEEDS_A_KEY):
            raise UpstreamError(str(self.refusal_of(status, body)))
        self.card = self._card(body) if status == 200 else None
        # Batch inference names its task, and handlers ask for keys of their own only before text.
        self.generates_text = status in _NEEDS_A_KEY if self.card is None else "task" not in self.card

    def _card(self, body: bytes) -> dict[str, Any]:
        try:
            return {**json.loads(body)["data"][0], "id": self.name}
        except (ValueError, LookupError, TypeError):
            raise UpstreamError(f"{self._who} lists its models in no shape that is known") from None

    async def _send(
        self, method: str, route: str, body: bytes, headers: Mapping[str, str], max_silence: float
    ) -> Exchange:
        own = self._settings
        fields = dict(headers)
        try:
            key = own.key()
        except (OSError, ValueError) as error:
            raise UnavailableError(f"{self._who} has no key to ask with (--upstream-key-file): {error}") from None
        if key is not None:
            fields["Authorization"] = f"Bearer {key}"
        elif self._own_key is not None:
            fields.setdefault("Authorization", f"Bearer {self._own_key}")
        exchange = Exchange(self._who, max_silence)
        target = f"{own.path}/{route}" if route else own.path
        request = request_bytes(method, target, own.authority, fields, body)
        await exchange.begin(own.host, own.port, own.is_https, request)
        return exchange


class Upstreams:
    """All of them, by name."""

    def __init__(self, settings: Sequence[UpstreamSettings], max_silence: float, own_key: str | None = None) -> None:
        self.all = tuple(Upstream(own, max_silence, own_key) for own in settings)
        self._by_name = {own.name: own for own in self.all}

    def named(self, model: Any) -> Upstream:
        """
        Raises:
            RequestError: there is none of that name, or none is named and there are several.
        """
        if model in (None, ""):
            if len(self.all) == 1:
                return self.all[0]
            raise RequestError(f"'model' is missing: there are {self._names()}", "model")
        if not isinstance(model, str):
            raise RequestError(f"'model' must be a text, got {type(model).__name__}", "model")
        if model not in self._by_name:
            raise UnknownModelError(f"the model {model!r} does not exist: there are {self._names()}", "model")
        return self._by_name[model]

    async def look(self) -> dict[str, RequestError | None]:
        """Of each, by name, what is wrong with it; None where nothing is."""
        found = await asyncio.gather(*(own.look() for own in self.all), return_exceptions=True)
        for outcome in found:
            if isinstance(outcome, BaseException) and not isinstance(outcome, RequestError):
                raise outcome
        errors = (outcome if isinstance(outcome, RequestError) else None for outcome in found)
        return dict(zip(self._by_name, errors, strict=True))

    def _names(self) -> str:
        return ", ".join(self._by_name)
