"""`v1/audio/transcriptions` and `v1/audio/translations` by models of batch inference that hear."""

from __future__ import annotations

import io
import json
import sys
import wave
from array import array
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ts_parallel.errors import NotFoundError, RequestError
from ts_parallel.gateway.batch.items import ask_one, refuse_text_models
from ts_parallel.gateway.passing import headers_to_pass
from ts_parallel.gateway.refusals import json_answer
from ts_parallel.gateway.upstream.models import Upstreams

_KNOWN = frozenset({"file", "language", "max_new_tokens", "model", "response_format", "stream", "temperature"})
_FORMATS = ("json", "text")
_WAV = b"RIFF"


class Speech:
    """Routes that take a file of speech. The models are lent."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    async def transcribe(self, request: Request) -> Response:
        """`POST /v1/audio/transcriptions`: what is said, in the language it is said in."""
        return await self._hear(request, {})

    async def translate(self, request: Request) -> Response:
        """`POST /v1/audio/translations`: the same in English."""
        return await self._hear(request, {"task": "translate"})

    async def _hear(self, request: Request, options: Mapping[str, Any]) -> Response:
        form, file = await _form(request)
        how = form.get("response_format") or "json"
        if how not in _FORMATS:
            raise RequestError(f"response_format must be one of {', '.join(_FORMATS)}, got {how!r}", "response_format")
        upstream = self._upstreams.named(form.get("model"))
        await refuse_text_models(upstream)
        own = {**options, **({"language": form["language"]} if form.get("language") else {})}
        if form.get("max_new_tokens"):
            own["max_new_tokens"] = _whole(form["max_new_tokens"])
        body, kind = _asked(file, own)
        answer = await ask_one(upstream, body, headers_to_pass(request, kind))
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            raise NotFoundError(
                f"the model {upstream.name!r} does not answer with a text: its task is another", "model"
            )
        return PlainTextResponse(f"{answer['text']}\n") if how == "text" else json_answer({"text": answer["text"]})


async def _form(request: Request) -> tuple[dict[str, str], bytes]:
    """
    Raises:
        RequestError: the body is no form with a file, or has a field that cannot be honoured.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise RequestError("the body must be multipart/form-data with a 'file'")
    try:
        async with request.form() as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise RequestError("'file' is missing", "file")
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
            content = await file.read()
    except MultiPartException as error:
        raise RequestError(f"the body is no form that can be read: {error.message}") from None
    for name, value in fields.items():
        if name not in _KNOWN and value:
            raise RequestError(f"{name!r} is not supported", name)
    if fields.get("stream", "false").lower() not in ("false", "0", ""):
        raise RequestError("'stream' is not supported: the answer comes whole", "stream")
    if _number(fields.get("temperature") or "0") != 0:
        raise RequestError("'temperature' must be 0: answers are greedy", "temperature")
    return fields, content


def _asked(file: bytes, options: Mapping[str, Any]) -> tuple[bytes, str]:
    """The model's body: the file as it is, or its samples where something is to be said beside them.

    Raises:
        RequestError: the file is none that the gateway can take apart.
    """
    if not options:
        return file, "application/octet-stream"
    if not file.startswith(_WAV):
        raise RequestError("'language' and translations need a WAV file of 16 kHz, mono, 16 bits", "file")
    try:
        with wave.open(io.BytesIO(file)) as sound:
            shape = (sound.getnchannels(), sound.getsampwidth(), sound.getframerate())
            frames = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise RequestError(f"'file' is no WAV file that can be read: {error}", "file") from None
    if shape != (1, 2, 16000):
        raise RequestError(
            f"the WAV file has {shape[0]} channels of {8 * shape[1]} bits at {shape[2]} Hz; it must have 1 of 16 bits "
            "at 16000 Hz",
            "file",
        )
    samples = array("h", frames)
    if sys.byteorder == "big":
        samples.byteswap()
    return json.dumps({"audio": [sample / 32768 for sample in samples], **options}).encode(), "application/json"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"'temperature' must be a number, got {text!r}", "temperature") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RequestError(f"'max_new_tokens' must be a whole number, got {text!r}", "max_new_tokens") from None
